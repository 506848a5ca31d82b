//! Theory of operation: a token bucket. Tokens are kept in nanoseconds of credit, so that refilling is one
//! subtraction and nothing is rounded away.

use crate::interface::types::Time;

/// A token bucket of `rate` tokens a second that holds one second's worth.
#[derive(Debug, Clone, Copy)]
pub struct RateLimiter {
    cost: u64,
    credit: u64,
    last: Time,
}

const SECOND: u64 = 1_000_000_000;

impl RateLimiter {
    /// A full bucket; a rate of 0 never allows anything.
    #[must_use]
    pub fn new(rate: u32, now: Time) -> RateLimiter {
        RateLimiter {
            cost: SECOND.checked_div(u64::from(rate)).unwrap_or(u64::MAX),
            credit: SECOND,
            last: now,
        }
    }

    /// Takes a token; false when there is none.
    pub fn allow(&mut self, now: Time) -> bool {
        self.allow_n(now, 1)
    }

    /// Takes `n` tokens, or all of a full bucket where it holds fewer; false when there are not enough.
    pub fn allow_n(&mut self, now: Time, n: usize) -> bool {
        self.credit = self.credit.saturating_add(now.since(self.last)).min(SECOND);
        self.last = self.last.max(now);
        let cost = self.cost.saturating_mul(n as u64).min(self.cost.max(SECOND));
        if self.credit < cost {
            return false;
        }
        self.credit -= cost;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_the_rate() {
        let mut l = RateLimiter::new(100, Time(0));
        let took = |l: &mut RateLimiter, at: u64| (0..1000).filter(|_| l.allow(Time(at))).count();
        assert_eq!(took(&mut l, 0), 100);
        assert_eq!(took(&mut l, SECOND / 2), 50);
        assert_eq!(took(&mut l, SECOND * 100), 100);
        assert!(!RateLimiter::new(0, Time(0)).allow(Time(SECOND)));
        assert!(!RateLimiter::new(0, Time(0)).allow_n(Time(SECOND), 5000));
    }

    #[test]
    fn several_at_once() {
        let mut l = RateLimiter::new(100, Time(0));
        assert!(l.allow_n(Time(0), 60) && !l.allow_n(Time(0), 60) && l.allow_n(Time(0), 40));
        // More than it ever holds waits for all that it holds.
        assert!(!l.allow_n(Time(SECOND / 2), 1000) && l.allow_n(Time(SECOND), 1000));
    }
}
