//! Theory of operation: a rule that allows all names below a suffix lets the guest choose a part of each name, and each name
//! that is asked for carries that part out. So a guest may ask for so many distinct names below a suffix, and for so many
//! bytes of them, in [`WINDOW_S`] seconds. A name that was asked for in the window is free.
//!
//! Bounds: the names of a window are kept as hashes, [`RULES_MAX`] windows of a guest. When there are more, the oldest
//! window makes room.

use crate::interface::types::{PortId, Time};
use crate::util::siphash::SipKey;
use std::collections::{BTreeMap, BTreeSet};

/// Seconds of a window.
pub const WINDOW_S: u64 = 300;
/// Rules of one guest whose names are counted.
pub const RULES_MAX: usize = 256;

struct Window {
    began: Time,
    names: BTreeSet<u64>,
    bytes: u32,
}

/// What guests asked for below suffixes.
pub struct NameBudget {
    key: SipKey,
    guests: BTreeMap<PortId, BTreeMap<u32, Window>>,
}

impl NameBudget {
    /// Nothing was asked for. `key` keys the hashes of names.
    #[must_use]
    pub fn new(key: SipKey) -> NameBudget {
        NameBudget { key, guests: BTreeMap::new() }
    }

    /// Counts a name below the suffix of a rule. False when it is one too many.
    pub fn take(&mut self, now: Time, port: PortId, rule: u32, name: &[u8], names: u32, bytes: u32) -> bool {
        let hash = self.hash(name);
        let guest = self.guests.entry(port).or_default();
        if !guest.contains_key(&rule)
            && guest.len() >= RULES_MAX
            && let Some(oldest) = guest.iter().min_by_key(|(_, w)| w.began).map(|(rule, _)| *rule)
        {
            guest.remove(&oldest);
        }
        let new = || Window { began: now, names: BTreeSet::new(), bytes: 0 };
        let window = guest.entry(rule).or_insert_with(new);
        if now.since(window.began) >= WINDOW_S * 1_000_000_000 {
            *window = new();
        }
        if window.names.contains(&hash) {
            return true;
        }
        let more = window.bytes.saturating_add(u32::try_from(name.len()).unwrap_or(u32::MAX));
        if window.names.len() >= names as usize || more > bytes {
            return false;
        }
        window.names.insert(hash);
        window.bytes = more;
        true
    }

    fn hash(&self, name: &[u8]) -> u64 {
        let words = name.chunks(8).map(|c| c.iter().fold(c.len() as u64, |w, b| w << 8 | u64::from(*b)));
        self.key.hash(&words.collect::<Vec<_>>())
    }

    /// A port was removed.
    pub fn remove_port(&mut self, port: PortId) {
        self.guests.remove(&port);
    }

    /// Other rules are in force: their numbers mean other suffixes.
    pub fn clear(&mut self) {
        self.guests.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distinct_names_and_their_bytes_are_bounded_in_a_window() {
        let mut budget = NameBudget::new(SipKey::from_secret(&[7; 32], 0));
        let mut take = |now: u64, port, rule, name: &str| {
            budget.take(Time(now * 1_000_000_000), PortId(port), rule, name.as_bytes(), 3, 40)
        };
        assert!(take(0, 1, 1, "a.x.example") && take(0, 1, 1, "b.x.example") && take(0, 1, 1, "c.x.example"));
        assert!(!take(1, 1, 1, "d.x.example"), "a fourth name");
        assert!(take(2, 1, 1, "a.x.example"), "asked for already");
        assert!(take(2, 1, 2, "d.x.example") && take(2, 2, 1, "d.x.example"), "another rule, another guest");
        assert!(!take(299, 1, 1, "d.x.example"));
        assert!(take(300, 1, 1, "d.x.example"), "another window");
        let long = "l".repeat(30);
        assert!(!take(301, 1, 1, &long), "over 40 bytes");
    }

    #[test]
    fn windows_are_bounded() {
        let mut budget = NameBudget::new(SipKey::from_secret(&[7; 32], 0));
        for rule in 0..2 * RULES_MAX as u32 {
            assert!(budget.take(Time(u64::from(rule)), PortId(1), rule, b"a", 1, 9));
        }
        assert_eq!(budget.guests.get(&PortId(1)).map(BTreeMap::len), Some(RULES_MAX));
        budget.remove_port(PortId(1));
        assert!(budget.guests.is_empty());
    }
}
