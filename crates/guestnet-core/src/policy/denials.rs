//! Theory of operation: every refused flow is counted by its reason, and reported to the control side as an event
//! ([`crate::effects::FlowDenied`]). A guest can cause any number of refusals, so each has a rate of reports. An event
//! says how many refusals of its guest went unreported before it.

use crate::interface::types::Time;
use crate::tables::per_port::PerPort;
use crate::util::rate_limiter::RateLimiter;

/// Reports a second of one guest.
pub const PER_SECOND: u32 = 100;

#[derive(Debug)]
struct Guest {
    rate: RateLimiter,
    unreported: u32,
}

/// The reports of refused flows. See the module head.
#[derive(Debug, Default)]
pub struct Denials {
    guests: PerPort<Guest>,
}

impl Denials {
    /// A port was added.
    pub fn add_port(&mut self, now: Time, slot: u32) {
        self.guests.insert(slot, Guest { rate: RateLimiter::new(PER_SECOND, now), unreported: 0 });
    }

    /// A port was removed.
    pub fn remove_port(&mut self, slot: u32) {
        self.guests.remove(slot);
    }

    /// Counts a refusal of a guest. Returns how many went unreported before it, or `None` when it is not to be reported
    /// either.
    pub fn count(&mut self, now: Time, slot: u32) -> Option<u32> {
        let guest = self.guests.get_mut(slot)?;
        if guest.rate.allow(now) {
            return Some(std::mem::take(&mut guest.unreported));
        }
        guest.unreported = guest.unreported.saturating_add(1);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_is_refused_often_is_reported_within_its_rate() {
        let mut denials = Denials::default();
        denials.add_port(Time(0), 0);
        denials.add_port(Time(0), 1);
        let reported = (0..1000).filter(|_| denials.count(Time(0), 0).is_some()).count();
        assert_eq!(reported, PER_SECOND as usize);
        assert_eq!(denials.count(Time(0), 1), Some(0), "the other guest has a rate of its own");
        assert_eq!(denials.count(Time(0).plus_s(1), 0), Some(900));
        assert_eq!(denials.count(Time(0).plus_s(1), 0), Some(0));
        denials.remove_port(0);
        assert_eq!(denials.count(Time(0).plus_s(2), 0), None);
    }
}
