//! Theory of operation: a token bucket for rates of bytes. Credit is kept in token-nanoseconds, so that no part of a token
//! is rounded away at any rate. A taker may leave a debt; then nothing is left until it is paid.

use crate::interface::types::Time;

const SECOND: i128 = 1_000_000_000;

/// A token bucket.
#[derive(Debug, Clone, Copy)]
pub struct TokenBucket {
    /// Tokens a second.
    rate: u64,
    /// Tokens that it holds at most, times [`SECOND`].
    most: i128,
    credit: i128,
    last: Time,
}

impl TokenBucket {
    /// A full bucket of `rate` tokens a second that holds `burst` tokens.
    #[must_use]
    pub fn new(rate: u64, burst: u64, now: Time) -> TokenBucket {
        let most = i128::from(burst).saturating_mul(SECOND);
        TokenBucket { rate, most, credit: most, last: now }
    }

    fn refill(&mut self, now: Time) {
        let more = i128::from(now.since(self.last)).saturating_mul(i128::from(self.rate));
        self.credit = self.credit.saturating_add(more).min(self.most);
        self.last = self.last.max(now);
    }

    /// Tokens that are there; 0 while there is a debt.
    pub fn left(&mut self, now: Time) -> u64 {
        self.refill(now);
        u64::try_from(self.credit.div_euclid(SECOND)).unwrap_or(0)
    }

    /// Takes tokens, also more than there are.
    pub fn take(&mut self, now: Time, tokens: u64) {
        self.refill(now);
        self.credit = self.credit.saturating_sub(i128::from(tokens).saturating_mul(SECOND));
    }

    /// Takes tokens if there is at least one; a debt may be left.
    pub fn allow(&mut self, now: Time, tokens: u64) -> bool {
        let is_allowed = self.left(now) > 0;
        if is_allowed {
            self.take(now, tokens);
        }
        is_allowed
    }

    /// When so many tokens are there, at most as many as it holds. `None`: never.
    #[must_use]
    pub fn when(&self, tokens: u64) -> Option<Time> {
        let wanted = i128::from(tokens).saturating_mul(SECOND).min(self.most);
        let missing = wanted.saturating_sub(self.credit).max(0);
        if missing == 0 {
            return Some(self.last);
        }
        let rate = i128::from(self.rate);
        let wait = missing.saturating_add(rate.saturating_sub(1)).checked_div(rate)?;
        Some(Time(self.last.0.saturating_add(u64::try_from(wait).ok()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Time = Time(5_000_000_000);

    /// Bytes that takers of `size` get in `ms` milliseconds, waiting as long as `when` says.
    fn through(rate: u64, size: u64, ms: u64) -> u64 {
        let mut bucket = TokenBucket::new(rate, (rate / 50).max(3000), NOW);
        bucket.take(NOW, (rate / 50).max(3000));
        let (mut now, mut sum) = (NOW, 0);
        while now < Time(NOW.0 + ms * 1_000_000) {
            match bucket.left(now) {
                left if left >= size => {
                    bucket.take(now, size);
                    sum += size;
                }
                _ => now = bucket.when(size).unwrap(),
            }
        }
        sum
    }

    #[test]
    fn every_rate_is_kept_exactly() {
        for rate in [12_500, 1_250_000, 30_000_001, 125_000_000, 1_250_000_000] {
            for size in [100, 999, 1500, 2999] {
                let ms = (100_000_000 * size / rate).clamp(100, 10_000);
                let (got, due) = (through(rate, size, ms), rate * ms / 1000);
                assert!(got.abs_diff(due) <= 2 * size + 1, "{rate} {size}: {got} of {due}");
            }
        }
    }

    #[test]
    fn a_debt_is_paid_before_more_is_there() {
        let mut bucket = TokenBucket::new(1000, 3000, NOW);
        assert!(bucket.allow(NOW, 64_000));
        assert!(!bucket.allow(NOW, 1));
        assert_eq!(bucket.when(1).unwrap(), Time(NOW.0 + 61_001_000_000));
        assert_eq!(bucket.left(Time(NOW.0 + 61_000_000_000)), 0);
        assert_eq!(bucket.left(Time(NOW.0 + 62_000_000_000)), 1000);
        assert_eq!(bucket.left(Time(u64::MAX)), 3000, "it holds no more");
        assert_eq!(bucket.when(u64::MAX).unwrap(), Time(u64::MAX), "more than it holds is never asked of it");
    }

    #[test]
    fn nothing_comes_back_at_a_rate_of_zero() {
        let mut bucket = TokenBucket::new(0, 10, NOW);
        assert_eq!(bucket.left(NOW), 10);
        bucket.take(NOW, u64::MAX);
        assert_eq!((bucket.left(Time(u64::MAX)), bucket.when(1)), (0, None));
    }
}
