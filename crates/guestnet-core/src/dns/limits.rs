//! Theory of operation: how many queries a second the owner lets guests ask, one guest and all together. A query beyond the
//! limit is dropped over UDP, and waits over TCP.

use crate::interface::types::{PortId, Time};
use crate::util::token_bucket::TokenBucket;
use std::collections::HashMap;

/// The limits that there are.
#[derive(Debug, Default)]
pub(crate) struct QueryLimits {
    network: Option<TokenBucket>,
    guests: HashMap<PortId, TokenBucket>,
}

impl QueryLimits {
    /// Sets the limit of a guest, or of all together, or takes it back.
    pub fn set(&mut self, now: Time, port: Option<PortId>, rate: Option<u64>) {
        let bucket = rate.map(|rate| TokenBucket::new(rate, rate.max(1), now));
        match (port, bucket) {
            (None, bucket) => self.network = bucket,
            (Some(port), Some(bucket)) => drop(self.guests.insert(port, bucket)),
            (Some(port), None) => drop(self.guests.remove(&port)),
        }
    }

    /// Whether a guest may ask now; if so, the query is counted.
    #[inline]
    pub fn allow(&mut self, now: Time, port: PortId) -> bool {
        if self.network.is_none() && self.guests.is_empty() {
            return true;
        }
        let guest = self.guests.get_mut(&port);
        let mut both = [guest, self.network.as_mut()];
        let may = both.iter_mut().flatten().all(|b| b.left(now) > 0);
        if may {
            both.into_iter().flatten().for_each(|b| b.take(now, 1));
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_has_a_rate_and_all_together_have_one() {
        let (now, mut limits) = (Time(5_000_000_000), QueryLimits::default());
        let asked = |l: &mut QueryLimits, port, now| (0..50).filter(|_| l.allow(now, PortId(port))).count();
        assert_eq!(asked(&mut limits, 1, now), 50);
        limits.set(now, Some(PortId(1)), Some(2));
        assert_eq!((asked(&mut limits, 1, now), asked(&mut limits, 2, now)), (2, 50));
        limits.set(now, None, Some(10));
        let later = Time(now.0 + 1_000_000_000);
        assert_eq!((asked(&mut limits, 1, later), asked(&mut limits, 2, later)), (2, 8));
        limits.set(now, None, None);
        limits.set(now, Some(PortId(1)), None);
        assert_eq!(asked(&mut limits, 1, later), 50);
    }
}
