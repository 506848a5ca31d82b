//! Theory of operation: a pin says that a guest got an address in an answer for a name. Rules about names match pinned
//! addresses only, and only those of the guest that asked.
//!
//! - A pin lives as long as its answer says, within bounds that the caller sets ([`LIFE_MAX_S`] at most), and while a flow
//!   uses its address ([`Pins::hold`]).
//! - Each guest has [`PER_GUEST`] pins at most. A new one replaces the one that ends first and that no flow uses; where
//!   there is none, it is not noted.
//! - Names are shared by the pins of all guests. Most addresses have one name, which takes no memory besides that of the
//!   table.

use crate::interface::types::Time;
use crate::policy::spec::Name;
use crate::tables::per_port::PerPort;
use smallvec::SmallVec;
use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

/// Pins of one guest: as many addresses as fit in a hash table of 2048 places.
pub const PER_GUEST: usize = 1792;
/// Names of one address. Shared hosts have many, but one guest asks for few.
pub const PER_ADDRESS: usize = 64;
/// The longest life of a pin that no flow uses, in seconds.
pub const LIFE_MAX_S: u32 = 86_400;

/// The names of an address.
#[derive(Debug, Default)]
struct Address {
    names: SmallVec<[Name; 1]>,
    /// When the pin of each name ends, in seconds, rounded up.
    until: SmallVec<[u32; 1]>,
    /// Flows that use it.
    holds: u32,
}

#[derive(Debug, Default)]
struct Guest {
    addresses: HashMap<IpAddr, Address>,
    /// Names of all addresses together.
    count: usize,
}

/// The pins of all guests.
#[derive(Debug, Default)]
pub struct Pins {
    guests: PerPort<Guest>,
    names: HashSet<Name>,
}

fn seconds(now: Time) -> u32 {
    u32::try_from(now.0 / 1_000_000_000).unwrap_or(u32::MAX)
}

impl Pins {
    /// Notes that the guest in `slot` got `ip` for a name, for `life_s` seconds. False when there is no room.
    pub fn note(&mut self, slot: u32, ip: IpAddr, name: &[u8], life_s: u32, now: Time) -> bool {
        let Some(name) = self.intern(name) else { return false };
        let ip = ip.to_canonical();
        if self.guests.get(slot).is_none() {
            self.guests.insert(slot, Guest::default());
        }
        let Some(guest) = self.guests.get_mut(slot) else { return false };
        let until = seconds(now).saturating_add(1).saturating_add(life_s.min(LIFE_MAX_S));
        let known = guest.addresses.get(&ip).and_then(|a| a.names.iter().position(|n| *n == name));
        if known.is_none() && guest.count >= PER_GUEST && !guest.make_room(seconds(now)) {
            self.forget_name(name);
            return false;
        }
        let address = guest.addresses.entry(ip).or_default();
        match known.and_then(|at| address.until.get_mut(at)) {
            Some(ends) => *ends = until.max(*ends),
            None if address.names.len() >= PER_ADDRESS => {
                let oldest = address.until.iter().enumerate().min_by_key(|(_, u)| **u).map(|(at, _)| at);
                if let Some((name_at, ends)) =
                    oldest.and_then(|at| Some((address.names.get_mut(at)?, address.until.get_mut(at)?)))
                {
                    (*name_at, *ends) = (name, until);
                }
            }
            None => {
                address.names.push(name);
                address.until.push(until);
                guest.count += 1;
            }
        }
        true
    }

    /// The shared form of a name.
    fn intern(&mut self, text: &[u8]) -> Option<Name> {
        if let Some(name) = self.names.get(text) {
            return Some(name.clone());
        }
        let name = Name::new(text)?;
        if let Some(known) = self.names.get(&name) {
            return Some(known.clone());
        }
        // Names that nobody has any more make room before the set grows.
        if self.names.len() == self.names.capacity() {
            self.names.retain(Name::is_shared);
        }
        self.names.insert(name.clone());
        Some(name)
    }

    fn forget_name(&mut self, name: Name) {
        let text = name.as_bytes().to_vec();
        drop(name);
        if self.names.get(text.as_slice()).is_some_and(|n| !n.is_shared()) {
            self.names.remove(text.as_slice());
        }
    }

    /// Forgets the pins of an address that have ended. To be called before [`Pins::of`].
    pub fn prune(&mut self, slot: u32, ip: IpAddr, now: Time) {
        let Some(guest) = self.guests.get_mut(slot) else { return };
        let ip = ip.to_canonical();
        let Some(address) = guest.addresses.get_mut(&ip) else { return };
        guest.count -= address.prune(seconds(now));
        if address.names.is_empty() {
            guest.addresses.remove(&ip);
        }
    }

    /// Whether a guest got any address for a name.
    #[inline]
    #[must_use]
    pub fn has_some(&self, slot: u32) -> bool {
        self.guests.get(slot).is_some()
    }

    /// The names for which a guest got an address.
    #[must_use]
    pub fn of(&self, slot: u32, ip: IpAddr) -> &[Name] {
        let guest = self.guests.get(slot);
        guest.and_then(|g| g.addresses.get(&ip.to_canonical())).map_or(&[], |a| &a.names)
    }

    /// A flow uses an address: its pins live as long as the flow. False when it has none, and nothing is to be released.
    pub fn hold(&mut self, slot: u32, ip: IpAddr) -> bool {
        let guest = self.guests.get_mut(slot);
        let address = guest.and_then(|g| g.addresses.get_mut(&ip.to_canonical()));
        address.map(|a| a.holds = a.holds.saturating_add(1)).is_some()
    }

    /// The flow has ended.
    pub fn release(&mut self, slot: u32, ip: IpAddr) {
        let Some(guest) = self.guests.get_mut(slot) else { return };
        let ip = ip.to_canonical();
        let Some(address) = guest.addresses.get_mut(&ip) else { return };
        address.holds = address.holds.saturating_sub(1);
        if address.holds == 0 && address.names.is_empty() {
            guest.addresses.remove(&ip);
        }
    }

    /// Forgets the pins of a guest whose names do not satisfy `keep`. Flows that use their addresses are judged by the
    /// rules that hold now.
    pub fn retain(&mut self, slot: u32, mut keep: impl FnMut(&Name) -> bool) {
        let Some(guest) = self.guests.get_mut(slot) else { return };
        guest.addresses.retain(|_, a| {
            guest.count -= a.retain(|name, _| keep(name));
            !a.names.is_empty() || a.holds > 0
        });
    }

    /// Forgets names that no pin has any more.
    pub fn forget_names(&mut self) {
        self.names.retain(Name::is_shared);
    }

    /// The first guest from a slot on that has, or had, pins.
    #[must_use]
    pub fn next_guest(&self, slot: u32) -> Option<u32> {
        self.guests.next_from(slot)
    }

    /// A port was removed.
    pub fn remove_port(&mut self, slot: u32) {
        self.guests.remove(slot);
        self.names.retain(Name::is_shared);
    }

    /// Pins of a guest.
    #[must_use]
    pub fn count(&self, slot: u32) -> usize {
        self.guests.get(slot).map_or(0, |g| g.count)
    }
}

impl Address {
    /// Keeps names that satisfy `keep`; returns how many it forgot.
    fn retain(&mut self, mut keep: impl FnMut(&Name, u32) -> bool) -> usize {
        let before = self.names.len();
        let kept: Vec<bool> = self.names.iter().zip(self.until.iter()).map(|(n, u)| keep(n, *u)).collect();
        let (mut names, mut ends) = (kept.iter(), kept.iter());
        self.names.retain(|_| names.next().is_some_and(|k| *k));
        self.until.retain(|_| ends.next().is_some_and(|k| *k));
        before - self.names.len()
    }

    fn prune(&mut self, now: u32) -> usize {
        if self.holds > 0 || self.until.iter().all(|u| *u > now) {
            return 0;
        }
        self.retain(|_, until| until > now)
    }
}

impl Guest {
    /// Forgets pins that have ended, or else those of the address that ends first. False when flows use all addresses.
    fn make_room(&mut self, now: u32) -> bool {
        let before = self.count;
        self.addresses.retain(|_, a| {
            self.count -= a.prune(now);
            !a.names.is_empty() || a.holds > 0
        });
        if self.count < before {
            return true;
        }
        let ends = |a: &Address| a.until.iter().max().copied();
        let first = self.addresses.iter().filter(|(_, a)| a.holds == 0).min_by_key(|(_, a)| ends(a));
        let Some(ip) = first.map(|(ip, _)| *ip) else { return false };
        self.count -= self.addresses.remove(&ip).map_or(0, |a| a.names.len());
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Time = Time(5_000_000_000);

    fn ip(last: u32) -> IpAddr {
        IpAddr::from((0xcb00_7100 + last).to_be_bytes())
    }

    fn names(pins: &mut Pins, slot: u32, at: IpAddr, now: Time) -> Vec<String> {
        pins.prune(slot, at, now);
        pins.of(slot, at).iter().map(Name::to_string).collect()
    }

    #[test]
    fn a_pin_is_of_one_guest_and_ends_with_its_answer() {
        let mut pins = Pins::default();
        assert!(pins.note(0, ip(1), b"OK.example.", 30, NOW));
        assert!(pins.note(0, ip(1), b"other.example", 60, NOW));
        assert_eq!(names(&mut pins, 0, ip(1), NOW), ["ok.example", "other.example"]);
        assert_eq!(names(&mut pins, 1, ip(1), NOW), [""; 0]);
        assert_eq!(names(&mut pins, 0, "::ffff:203.0.113.1".parse().unwrap(), NOW).len(), 2);
        assert_eq!(names(&mut pins, 0, ip(1), NOW.plus_s(30)).len(), 2);
        assert_eq!(names(&mut pins, 0, ip(1), NOW.plus_s(31)), ["other.example"]);
        // Asked again, it lives longer; it never ends sooner.
        pins.note(0, ip(1), b"other.example", 90, NOW);
        pins.note(0, ip(1), b"other.example", 1, NOW);
        assert_eq!(names(&mut pins, 0, ip(1), NOW.plus_s(90)).len(), 1);
        assert_eq!(names(&mut pins, 0, ip(1), NOW.plus_s(91)).len(), 0);
        assert_eq!((pins.count(0), pins.guests.get(0).unwrap().addresses.len()), (0, 0));
        assert!(!pins.note(0, ip(1), b"a..b", 30, NOW));
        pins.note(0, ip(2), b"long.example", u32::MAX, NOW);
        assert_eq!(names(&mut pins, 0, ip(2), NOW.plus_s(u64::from(LIFE_MAX_S) + 1)).len(), 0);
    }

    #[test]
    fn a_flow_keeps_the_pins_of_its_address() {
        let mut pins = Pins::default();
        pins.note(0, ip(1), b"ok.example", 30, NOW);
        assert!(pins.hold(0, ip(1)) && pins.hold(0, ip(1)) && !pins.hold(0, ip(2)));
        let later = NOW.plus_s(1000);
        pins.release(0, ip(1));
        assert_eq!(names(&mut pins, 0, ip(1), later).len(), 1);
        pins.release(0, ip(1));
        assert_eq!(names(&mut pins, 0, ip(1), later).len(), 0);
        pins.release(0, ip(1));
    }

    #[test]
    fn a_guest_has_a_bounded_number_of_pins_and_costs_others_none() {
        let mut pins = Pins::default();
        pins.note(1, ip(0), b"mine.example", 30, NOW);
        for n in 0..PER_GUEST as u32 {
            assert!(pins.note(0, ip(n), b"many.example", 30 + n, NOW));
        }
        assert!(pins.hold(0, ip(0)));
        assert!(pins.note(0, ip(9999), b"new.example", 30, NOW));
        assert_eq!(pins.count(0), PER_GUEST);
        assert_eq!(
            (pins.of(0, ip(0)).len(), pins.of(0, ip(1)).len()),
            (1, 0),
            "in use, and the first to end"
        );
        assert_eq!(pins.of(1, ip(0)).len(), 1);
        for n in 0..2 * PER_ADDRESS as u32 {
            pins.note(2, ip(1), format!("n{n}.example").as_bytes(), 30 + n, NOW);
        }
        assert_eq!(pins.count(2), PER_ADDRESS);
        assert!(pins.of(2, ip(1)).iter().any(|n| n.as_bytes() == b"n127.example"));
        // All in use: nothing is noted.
        let mut pins = Pins::default();
        for n in 0..PER_GUEST as u32 {
            pins.note(0, ip(n), b"many.example", 30, NOW);
            pins.hold(0, ip(n));
        }
        assert!(!pins.note(0, ip(9999), b"new.example", 30, NOW));
        assert_eq!(pins.names.len(), 1, "a name that is not noted is forgotten");
    }

    #[test]
    fn names_are_shared_and_forgotten_with_their_pins() {
        let mut pins = Pins::default();
        for slot in 0..3 {
            pins.note(slot, ip(1), b"ok.example", 30, NOW);
            pins.note(slot, ip(2), b"other.example", 30, NOW);
        }
        assert_eq!(pins.names.len(), 2);
        pins.hold(2, ip(2));
        for slot in 0..3 {
            assert_eq!(pins.next_guest(slot), Some(slot));
            pins.retain(slot, |name| slot != 2 && name.as_bytes() == b"ok.example");
        }
        pins.forget_names();
        assert_eq!(pins.next_guest(3), None);
        assert_eq!((pins.count(0), pins.count(2), pins.names.len()), (1, 0, 1));
        assert_eq!(pins.of(2, ip(2)), []);
        pins.release(2, ip(2));
        assert_eq!(pins.guests.get(2).unwrap().addresses.len(), 0);
        for slot in 0..3 {
            pins.remove_port(slot);
        }
        assert_eq!(pins.names.len(), 0);
    }
}
