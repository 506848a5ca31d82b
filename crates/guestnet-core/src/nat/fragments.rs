//! Theory of operation: only the first fragment of a packet has ports. What it was translated to is kept under
//! (source, destination, id, protocol) and done to the others; others that come before it wait, bounded in
//! number, bytes and time (RFC 4787 REQ-14). A fragment that overlaps another kills its set (RFC 5722's
//! rule; what came before it can never become a whole packet). A source has 1/16 of the sets at most, and its
//! own oldest set makes room, so one sender's incomplete packets do not push out another's.

use super::NatDirection;
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
    /// Byte ranges seen.
    seen: Vec<(u32, u32)>,
    held: Vec<Vec<u8>>,
}

/// What becomes of a fragment.
pub(crate) enum Fate {
    /// Its rule is known.
    Known(Rule),
    /// It waits.
    Held,
    /// It is dropped.
    Refused,
}

/// A packet has at most this many fragments here: 64 KiB in pieces of 1000 bytes, and some.
const MAX_PIECES: usize = 72;

/// See the module head.
pub(crate) struct Fragments {
    sets: BTreeMap<SetKey, Set>,
    by_source: BTreeMap<u32, usize>,
    order: VecDeque<(u64, SetKey)>,
    serial: u64,
    held_bytes: usize,
    max_sets: usize,
    max_bytes: usize,
    timeout_ns: u64,
}

impl Fragments {
    pub fn new(max_sets: usize, max_bytes: usize, timeout_s: u32) -> Fragments {
        Fragments {
            sets: BTreeMap::new(),
            by_source: BTreeMap::new(),
            order: VecDeque::new(),
            serial: 0,
            held_bytes: 0,
            max_sets,
            max_bytes,
            timeout_ns: u64::from(timeout_s) * 1_000_000_000,
        }
    }

    pub fn len(&self) -> usize {
        self.sets.len()
    }

    pub fn held_bytes(&self) -> usize {
        self.held_bytes
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

    fn remove(&mut self, key: &SetKey) {
        if let Some(set) = self.sets.remove(key) {
            self.held_bytes -= set.held.iter().map(Vec::len).sum::<usize>();
            if let Some(n) = self.by_source.get_mut(&key.src) {
                *n -= 1;
                if *n == 0 {
                    self.by_source.remove(&key.src);
                }
            }
        }
    }

    fn set(&mut self, key: SetKey, now: u64) -> &mut Set {
        if !self.sets.contains_key(&key) {
            let share = (self.max_sets / 16).max(1);
            if self.by_source.get(&key.src).is_some_and(|n| *n >= share) {
                if let Some(oldest) = self.order.iter().find(|(_, k)| k.src == key.src).map(|(_, k)| *k) {
                    self.remove(&oldest);
                    self.order.retain(|(_, k)| *k != oldest);
                }
            } else if self.sets.len() >= self.max_sets {
                while let Some((serial, oldest)) = self.order.pop_front() {
                    if self.sets.get(&oldest).is_some_and(|s| s.serial == serial) {
                        self.remove(&oldest);
                        break;
                    }
                }
            }
            self.serial += 1;
            self.order.push_back((self.serial, key));
            *self.by_source.entry(key.src).or_default() += 1;
        }
        let (serial, until) = (self.serial, now + self.timeout_ns);
        self.sets.entry(key).or_insert_with(|| Set {
            serial,
            until,
            rule: None,
            dead: false,
            seen: Vec::new(),
            held: Vec::new(),
        })
    }

    /// Notes a byte range; false when the set is dead, or now is because this overlaps.
    fn note(set: &mut Set, range: (u32, u32)) -> bool {
        if set.seen.contains(&range) {
            // The very same again: a duplicate on the wire, harmless.
            return !set.dead;
        }
        if set.seen.len() >= MAX_PIECES || set.seen.iter().any(|(a, b)| range.0 < *b && *a < range.1) {
            set.dead = true;
        }
        if !set.dead {
            set.seen.push(range);
        }
        !set.dead
    }

    /// Whether the first fragment may go; asked before it is translated.
    pub fn admit_first(&mut self, key: SetKey, len: u32, now: u64) -> bool {
        self.expire(now);
        let set = self.set(key, now);
        Self::note(set, (0, len))
    }

    /// Says what the first fragment was translated to, and gives back those that waited for it.
    pub fn first(&mut self, key: SetKey, rule: Rule) -> Vec<Vec<u8>> {
        let Some(set) = self.sets.get_mut(&key) else { return Vec::new() };
        set.rule = Some(rule);
        let held = std::mem::take(&mut set.held);
        self.held_bytes -= held.iter().map(Vec::len).sum::<usize>();
        held
    }

    /// The rule that a set has already (its first fragment came twice).
    pub fn rule(&self, key: &SetKey) -> Option<Rule> {
        self.sets.get(key).and_then(|s| s.rule)
    }

    /// A later fragment, its payload being `range` of the whole.
    pub fn tail(&mut self, key: SetKey, range: (u32, u32), packet: &[u8], now: u64) -> Fate {
        self.expire(now);
        let room = self.held_bytes + packet.len() <= self.max_bytes;
        let set = self.set(key, now);
        let known = set.seen.contains(&range);
        if !Self::note(set, range) {
            let freed: usize = set.held.drain(..).map(|h| h.len()).sum();
            self.held_bytes -= freed;
            return Fate::Refused;
        }
        match set.rule {
            Some(rule) => Fate::Known(rule),
            None if known => Fate::Refused,
            None if room => {
                set.held.push(packet.to_vec());
                self.held_bytes += packet.len();
                Fate::Held
            }
            None => {
                set.seen.retain(|r| *r != range);
                Fate::Refused
            }
        }
    }
}

impl SetKey {
    pub fn new(v: &super::packet::View, direction: NatDirection) -> SetKey {
        SetKey {
            src: v.src,
            dst: v.dst,
            id: v.id,
            proto: v.proto,
            outbound: direction == NatDirection::Outbound,
        }
    }
}
