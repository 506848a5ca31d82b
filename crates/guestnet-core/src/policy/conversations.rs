//! Theory of operation: what guests say to each other needs no flow record, since the switch passes frames on
//! unchanged. Where rules can deny such flows, the switch has to know which conversations were admitted, and by
//! whom they were opened: the answers of a guest pass although the guest may not open a flow itself.
//!
//! Each guest has a cache of the conversations that it opened, [`PER_GUEST`] at most, so that a guest which opens
//! many pushes out its own only. Entries that were used stay longer (CLOCK). A conversation that was pushed out is
//! judged again with its next packet, as if that packet opened it. An entry of an older generation of the rules
//! counts for nothing.

use crate::interface::types::PortId;
use crate::policy::verdict::{Direction, Generation, Request};
use crate::util::siphash::{SipKey, address_words};
use hashbrown::HashTable;
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// Conversations of one guest that are remembered; some 80 bytes each.
pub const PER_GUEST: usize = 1024;

/// Tells conversations of one guest apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuple {
    /// IP protocol.
    pub protocol: u8,
    /// The side that opened the conversation.
    pub opener: SocketAddr,
    /// The other side.
    pub other: SocketAddr,
}

impl Tuple {
    /// The same packet seen as an answer.
    #[must_use]
    pub fn reversed(self) -> Tuple {
        Tuple { opener: self.other, other: self.opener, ..self }
    }

    /// The same without ports, as a later fragment shows it.
    #[must_use]
    pub fn without_ports(self) -> Tuple {
        let bare = |a: SocketAddr| SocketAddr::new(a.ip(), 0);
        Tuple { opener: bare(self.opener), other: bare(self.other), ..self }
    }

    /// The question whether the opener may open it.
    #[must_use]
    pub fn request(&self, endpoint: PortId) -> Request {
        Request {
            direction: Direction::BetweenGuests,
            endpoint,
            protocol: self.protocol,
            source: self.opener,
            destination: self.other,
        }
    }
}

#[derive(Debug)]
struct Conversation {
    tuple: Tuple,
    generation: Generation,
    used: bool,
}

#[derive(Debug, Default)]
struct Opened {
    list: Vec<Conversation>,
    index: HashTable<u32>,
    hand: usize,
}

/// The conversations between guests. See the module head.
pub struct Conversations {
    guests: BTreeMap<u32, Opened>,
    key: SipKey,
}

impl Conversations {
    /// None.
    #[must_use]
    pub fn new(key: SipKey) -> Conversations {
        Conversations { guests: BTreeMap::new(), key }
    }

    /// Takes all conversations out; they are to be put back.
    #[must_use]
    pub fn take(&mut self) -> Conversations {
        Conversations { guests: std::mem::take(&mut self.guests), key: self.key }
    }

    fn hash(key: SipKey, t: &Tuple) -> u64 {
        let (a, b) = (address_words(t.opener.ip()), address_words(t.other.ip()));
        let ports =
            u64::from(t.protocol) << 32 | u64::from(t.opener.port()) << 16 | u64::from(t.other.port());
        key.hash(&[a[0], a[1], b[0], b[1], ports])
    }

    /// Returns true when the guest in `slot` opened the conversation and the rules in force admitted it.
    pub fn knows(&mut self, slot: u32, tuple: &Tuple, generation: Generation) -> bool {
        let Some(opened) = self.guests.get_mut(&slot) else { return false };
        let Opened { list, index, .. } = opened;
        let is_it = |i: &u32| list.get(*i as usize).is_some_and(|c| c.tuple == *tuple);
        let Some(at) = index.find(Self::hash(self.key, tuple), is_it).copied() else { return false };
        let Some(c) = list.get_mut(at as usize).filter(|c| c.generation == generation) else { return false };
        c.used = true;
        true
    }

    /// Remembers a conversation that the guest in `slot` opens.
    pub fn note(&mut self, slot: u32, tuple: Tuple, generation: Generation) {
        let key = self.key;
        let opened = self.guests.entry(slot).or_default();
        let hash = Self::hash(key, &tuple);
        let is_it = |list: &[Conversation], i: u32| list.get(i as usize).is_some_and(|c| c.tuple == tuple);
        let at = match opened.index.find(hash, |i| is_it(&opened.list, *i)).copied() {
            Some(at) => at,
            None => {
                let at = opened.place(key);
                let Opened { list, index, .. } = opened;
                let of = |i: &u32| list.get(*i as usize).map_or(0, |c| Self::hash(key, &c.tuple));
                index.insert_unique(hash, at, of);
                at
            }
        };
        // A mark from the start would let one that is used once push out one that is used all the time.
        let new = Conversation { tuple, generation, used: false };
        match opened.list.get_mut(at as usize) {
            Some(c) => *c = new,
            None => opened.list.push(new),
        }
    }

    /// Forgets what a guest opened.
    pub fn remove_port(&mut self, slot: u32) {
        self.guests.remove(&slot);
    }

    /// The first guest at `slot` or after that has opened a conversation.
    #[must_use]
    pub fn next_guest(&self, slot: u32) -> Option<u32> {
        self.guests.range(slot..).next().map(|(slot, _)| *slot)
    }

    /// Judges again what a guest opened: `allowed` says whether it stays. Returns how many are gone.
    pub fn judge_again(
        &mut self,
        slot: u32,
        generation: Generation,
        allowed: impl Fn(&Tuple) -> bool,
    ) -> u64 {
        let Some(old) = self.guests.remove(&slot) else { return 0 };
        let before = old.list.len();
        let mut kept = 0;
        for c in old.list {
            if allowed(&c.tuple) {
                self.note(slot, c.tuple, generation);
                kept += 1;
            }
        }
        (before - kept) as u64
    }

    /// How many conversations of a guest are remembered.
    #[must_use]
    pub fn of_guest(&self, slot: u32) -> usize {
        self.guests.get(&slot).map_or(0, |o| o.list.len())
    }
}

impl Opened {
    /// The place for another conversation: a new one, or that of one which was not used for a while.
    fn place(&mut self, key: SipKey) -> u32 {
        if self.list.len() < PER_GUEST {
            return self.list.len() as u32;
        }
        // Two rounds at most: the first takes the marks away.
        for _ in 0..2 * PER_GUEST {
            self.hand = (self.hand + 1) % PER_GUEST;
            let Some(c) = self.list.get_mut(self.hand) else { continue };
            if !std::mem::replace(&mut c.used, false) {
                break;
            }
        }
        let at = self.hand as u32;
        if let Some(c) = self.list.get(self.hand) {
            let hash = Conversations::hash(key, &c.tuple);
            if let Ok(entry) = self.index.find_entry(hash, |i| *i == at) {
                entry.remove();
            }
        }
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple(port: u16) -> Tuple {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        let mut opener = at("192.168.64.2:1");
        opener.set_port(port);
        Tuple { protocol: 6, opener, other: at("192.168.64.3:80") }
    }

    fn new() -> Conversations {
        Conversations::new(SipKey::from_secret(&[7; 32], 0))
    }

    #[test]
    fn a_conversation_is_known_by_its_opener_and_generation() {
        let (mut c, now, next) = (new(), Generation(1), Generation(2));
        c.note(0, tuple(1000), now);
        assert!(c.knows(0, &tuple(1000), now));
        assert!(!c.knows(0, &tuple(1000), next) && !c.knows(1, &tuple(1000), now));
        assert!(!c.knows(0, &tuple(1001), now) && !c.knows(0, &tuple(1000).reversed(), now));
        assert!(!c.knows(0, &Tuple { protocol: 17, ..tuple(1000) }, now));
        c.note(0, tuple(1000), next);
        assert!(c.knows(0, &tuple(1000), next) && c.of_guest(0) == 1);
        c.remove_port(0);
        assert!(!c.knows(0, &tuple(1000), next));
    }

    #[test]
    fn a_guest_that_opens_many_pushes_out_its_own_unused_ones() {
        let (mut c, now) = (new(), Generation(1));
        c.note(1, tuple(9), now);
        for port in 1..=60_000 {
            c.note(0, tuple(port), now);
            assert!(c.knows(0, &tuple(1), now), "used all the time, lost at {port}");
        }
        assert_eq!(c.of_guest(0), PER_GUEST);
        assert!(c.knows(1, &tuple(9), now));
        let known = (1..=60_000).filter(|port| c.knows(0, &tuple(*port), now)).count();
        assert_eq!(known, PER_GUEST);
    }

    #[test]
    fn conversations_that_are_no_longer_allowed_are_forgotten() {
        let (mut c, next) = (new(), Generation(2));
        for port in 1..=10 {
            c.note(3, tuple(port), Generation(1));
        }
        assert_eq!((c.next_guest(0), c.next_guest(4)), (Some(3), None));
        assert_eq!(c.judge_again(3, next, |t| t.opener.port() > 4), 4);
        let known: Vec<u16> = (1..=10).filter(|p| c.knows(3, &tuple(*p), next)).collect();
        assert_eq!(known, [5, 6, 7, 8, 9, 10]);
        assert_eq!(c.judge_again(8, next, |_| false), 0);
    }
}
