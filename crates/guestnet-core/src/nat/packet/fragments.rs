//! Theory of operation: only the first fragment of a packet has ports. What it was translated to is kept under
//! (source, destination, id, protocol) and done to the others; others that come before it wait, bounded in
//! number, bytes and time (RFC 4787 REQ-14). A fragment that overlaps another kills its set (RFC 5722's
//! rule; what came before it can never become a whole packet). A packet may have as many fragments as fit its
//! 65535 bytes: to stop one after a number of them would only waste those that went. Each direction has half
//! of the sets and bytes, so nothing from outside pushes out what guests send. A source has 1/8 of its
//! direction's sets at most, and its own oldest set makes room; of the bytes it has at most as many as it
//! leaves to others.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use crate::nat::NatDirection;
use crate::util::account::charge;
use std::collections::{BTreeMap, VecDeque};

/// What the fragments of one packet have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SetKey {
    pub src: u32,
    pub dst: u32,
    pub id: u16,
    pub proto: u8,
    pub outbound: bool,
}

/// What is done to each of them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rule {
    pub src: Option<u32>,
    pub dst: Option<u32>,
    pub id: Option<u16>,
    pub hairpin: bool,
}

struct Set {
    serial: u64,
    until: u64,
    /// `None` until the first fragment has come.
    rule: Option<Rule>,
    dead: bool,
    /// Byte ranges seen, in order. None overlap, and all but one are whole units of 8 bytes, so there are at
    /// most 8192.
    seen: Vec<(u32, u32)>,
    held: Vec<Vec<u8>>,
    /// Bytes of `seen` and `held`.
    cost: usize,
}

/// What one sender, or all of a direction, have here.
#[derive(Debug, Clone, Copy, Default)]
struct Usage {
    sets: usize,
    bytes: usize,
}

/// Bytes of a range in [`Set::seen`].
const RANGE: usize = size_of::<(u32, u32)>();

/// What becomes of a fragment.
pub(crate) enum Fate {
    /// Its rule is known.
    Known(Rule),
    /// It waits.
    Held,
    /// It is dropped.
    Refused,
}

/// See the module head.
pub(crate) struct Fragments {
    sets: BTreeMap<SetKey, Set>,
    /// By direction and source.
    senders: BTreeMap<(bool, u32), Usage>,
    /// Inbound, outbound.
    all: [Usage; 2],
    order: VecDeque<(u64, SetKey)>,
    serial: u64,
    /// Of each direction.
    max: Usage,
    timeout_ns: u64,
}

impl Fragments {
    pub fn new(max_sets: usize, max_bytes: usize, timeout_s: u32) -> Fragments {
        Fragments {
            sets: BTreeMap::new(),
            senders: BTreeMap::new(),
            all: [Usage::default(); 2],
            order: VecDeque::new(),
            serial: 0,
            max: Usage { sets: (max_sets / 2).max(1), bytes: max_bytes / 2 },
            timeout_ns: u64::from(timeout_s) * 1_000_000_000,
        }
    }

    pub fn len(&self) -> usize {
        self.sets.len()
    }

    pub fn held_bytes(&self) -> usize {
        self.all.iter().map(|u| u.bytes).sum()
    }

    pub fn next_deadline(&self) -> Option<u64> {
        self.order.front().map(|(s, k)| self.sets.get(k).filter(|x| x.serial == *s).map_or(0, |x| x.until))
    }

    /// Forgets sets whose time is over.
    pub fn expire(&mut self, now: u64) {
        while let Some((serial, key)) = self.order.front().copied() {
            match self.sets.get(&key) {
                Some(s) if s.serial == serial && s.until > now => return,
                Some(s) if s.serial == serial => self.remove(&key),
                _ => {}
            }
            self.order.pop_front();
        }
    }

    fn usage(&self, key: &SetKey) -> (Usage, Usage) {
        let own = self.senders.get(&(key.outbound, key.src)).copied().unwrap_or_default();
        (own, self.all[usize::from(key.outbound)])
    }

    /// Changes what is counted for a set by what `change` does to the counts of its sender and direction.
    fn book(&mut self, key: &SetKey, change: impl Fn(&mut Usage)) {
        change(&mut self.all[usize::from(key.outbound)]);
        let sender = (key.outbound, key.src);
        let own = self.senders.entry(sender).or_default();
        change(own);
        if own.sets == 0 {
            self.senders.remove(&sender);
        }
    }

    fn remove(&mut self, key: &SetKey) {
        if let Some(set) = self.sets.remove(key) {
            self.book(key, |u| {
                u.bytes = u.bytes.saturating_sub(set.cost);
                u.sets = u.sets.saturating_sub(1);
            });
        }
    }

    /// Gives up the oldest set of a sender.
    fn evict(&mut self, outbound: bool, src: u32) {
        let of_it = |(_, k): &&(u64, SetKey)| (k.outbound, k.src) == (outbound, src);
        if let Some(oldest) = self.order.iter().find(of_it).map(|(_, k)| *k) {
            self.remove(&oldest);
            self.order.retain(|(_, k)| *k != oldest);
        }
    }

    /// Makes a set for a key that has none. A full sender's own oldest set makes room, else the oldest one of
    /// whoever has most.
    fn begin(&mut self, key: SetKey, now: u64) {
        let (own, all) = self.usage(&key);
        if own.sets >= (self.max.sets / 8).max(1) {
            self.evict(key.outbound, key.src);
        } else if all.sets >= self.max.sets {
            let greediest =
                self.senders.iter().filter(|((out, _), _)| *out == key.outbound).max_by_key(|(_, u)| u.sets);
            if let Some((outbound, src)) = greediest.map(|(sender, _)| *sender) {
                self.evict(outbound, src);
            }
        }
        self.serial = self.serial.wrapping_add(1);
        self.order.push_back((self.serial, key));
        self.book(&key, |u| charge(&mut u.sets, 1));
        let (serial, until) = (self.serial, now.saturating_add(self.timeout_ns));
        let (seen, held) = (Vec::new(), Vec::new());
        self.sets.insert(key, Set { serial, until, rule: None, dead: false, seen, held, cost: 0 });
    }

    /// Notes the byte range of a fragment, and the fragment where it has to wait.
    fn note(&mut self, key: SetKey, range: (u32, u32), waiting: Option<&[u8]>, now: u64) -> Noted {
        self.expire(now);
        if !self.sets.contains_key(&key) {
            self.begin(key, now);
        }
        let (own, all) = self.usage(&key);
        // A sender takes at most half of what it leaves to others, so there is always room for one more.
        let free = self.max.bytes.saturating_sub(all.bytes);
        let Some(set) = self.sets.get_mut(&key) else { return Noted::Refused };
        if set.dead {
            return Noted::Refused;
        }
        let at = set.seen.partition_point(|r| r.0 < range.0);
        if set.seen.get(at) == Some(&range) {
            // The very same again: a duplicate on the wire, harmless.
            return Noted::Again;
        }
        let before = at.checked_sub(1).and_then(|i| set.seen.get(i));
        if before.is_some_and(|r| r.1 > range.0) || set.seen.get(at).is_some_and(|r| r.0 < range.1) {
            set.dead = true;
            set.seen = Vec::new();
            set.held = Vec::new();
            let freed = std::mem::take(&mut set.cost);
            self.book(&key, |u| u.bytes = u.bytes.saturating_sub(freed));
            return Noted::Refused;
        }
        let waiting = waiting.filter(|_| set.rule.is_none());
        let cost = waiting.map_or(0, <[u8]>::len).saturating_add(RANGE);
        if own.bytes.saturating_add(cost) > free {
            return Noted::Refused;
        }
        set.seen.insert(at, range);
        charge(&mut set.cost, cost);
        if let Some(packet) = waiting {
            set.held.push(packet.to_vec());
        }
        self.book(&key, |u| charge(&mut u.bytes, cost));
        Noted::New
    }

    /// Whether the first fragment may go; asked before it is translated.
    pub fn admit_first(&mut self, key: SetKey, len: u32, now: u64) -> bool {
        !matches!(self.note(key, (0, len), None, now), Noted::Refused)
    }

    /// Says what the first fragment was translated to, and gives back those that waited for it.
    pub fn first(&mut self, key: SetKey, rule: Rule) -> Vec<Vec<u8>> {
        let Some(set) = self.sets.get_mut(&key) else { return Vec::new() };
        set.rule = Some(rule);
        let held = std::mem::take(&mut set.held);
        let freed = held.iter().map(Vec::len).sum::<usize>();
        set.cost = set.cost.saturating_sub(freed);
        self.book(&key, |u| u.bytes = u.bytes.saturating_sub(freed));
        held
    }

    /// The rule that a set has already (its first fragment came twice).
    pub fn rule(&self, key: &SetKey) -> Option<Rule> {
        self.sets.get(key).and_then(|s| s.rule)
    }

    /// A later fragment, its payload being `range` of the whole.
    pub fn tail(&mut self, key: SetKey, range: (u32, u32), packet: &[u8], now: u64) -> Fate {
        let noted = self.note(key, range, Some(packet), now);
        match (noted, self.rule(&key)) {
            (Noted::Refused, _) | (Noted::Again, None) => Fate::Refused,
            (_, Some(rule)) => Fate::Known(rule),
            (Noted::New, None) => Fate::Held,
        }
    }
}

/// What [`Fragments::note`] found.
enum Noted {
    New,
    Again,
    /// Its packet is given up, or there is no room.
    Refused,
}

impl SetKey {
    pub fn new(v: &crate::nat::packet::View, direction: NatDirection) -> SetKey {
        SetKey {
            src: v.src,
            dst: v.dst,
            id: v.id,
            proto: v.proto,
            outbound: direction == NatDirection::Outbound,
        }
    }
}
