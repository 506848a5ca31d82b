//! Theory of operation: cached responses, by question. Names come from guests, so the hash is keyed.
//!
//! Bounded in bytes, with all that it takes to keep an entry. Entries count for the port whose query brought them. When
//! the cache is full, the port that has the most gives way: a guest that queries many names replaces its own entries,
//! oldest first, but those that were used meanwhile have a second chance. A response is the same for all guests, so a hit
//! does not look at the port.

use crate::interface::types::{PortId, Time};
use crate::util::siphash::SipKey;
use guestnet_wire::dns::{Answer, IN, NAME_MAX, Query, flags};
use hashbrown::HashTable;
use std::collections::{BTreeMap, VecDeque};

/// Bytes of the longest message that is kept: one response does not push out many.
const MESSAGE_MAX: usize = 16384;
/// Entries that get a second chance while one is removed.
const CHANCES: u32 = 8;
/// Bytes that an entry takes besides its data.
const OVERHEAD: usize = 240;
/// Name, type, and flags.
const KEY_MAX: usize = NAME_MAX + 3;
const KEY_WORDS: usize = KEY_MAX.div_ceil(8) + 1;

/// What is asked for: name in lower case, type, DO and CD.
#[derive(Clone)]
pub(crate) struct Key {
    bytes: [u8; KEY_MAX],
    len: usize,
    pub(crate) hash: u64,
}

impl Key {
    pub(crate) fn new(sip: SipKey, q: &Query<'_>) -> Option<Key> {
        Key::of(sip, q.name(), q.kind, q.wants_dnssec(), q.flags & flags::CD != 0)
    }

    /// `None`: no name is that long.
    pub(crate) fn of(sip: SipKey, name: &[u8], kind: u16, dnssec: bool, unchecked: bool) -> Option<Key> {
        let len = name.len() + 3;
        let mut bytes = [0; KEY_MAX];
        let (to, rest) = bytes.split_at_mut_checked(name.len())?;
        to.copy_from_slice(name);
        // Lengths of labels are no letters, so all bytes can be lowered alike.
        to.make_ascii_lowercase();
        let [k0, k1] = kind.to_be_bytes();
        rest.get_mut(..3)?.copy_from_slice(&[k0, k1, u8::from(dnssec) | u8::from(unchecked) << 1]);
        let mut words = [0; KEY_WORDS];
        for (word, piece) in words.iter_mut().zip(bytes.get(..len)?.chunks(8)) {
            *word = piece.iter().fold(0, |w, b| w << 8 | u64::from(*b));
        }
        let used = len.div_ceil(8);
        *words.get_mut(used)? = len as u64;
        let hash = sip.hash(words.get(..=used)?);
        Some(Key { bytes, len, hash })
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or(&[])
    }

    /// The name in lower case.
    pub(crate) fn name(&self) -> &[u8] {
        self.bytes.get(..self.len.saturating_sub(3)).unwrap_or(&[])
    }

    /// The type.
    pub(crate) fn kind(&self) -> u16 {
        guestnet_wire::be16(&self.bytes, self.len.saturating_sub(3))
    }

    fn flags(&self) -> u8 {
        self.bytes().last().copied().unwrap_or(0)
    }

    /// Whether DNSSEC records are wanted.
    pub(crate) fn wants_dnssec(&self) -> bool {
        self.flags() & 1 != 0
    }

    /// Whether nothing is to be verified.
    pub(crate) fn is_unchecked(&self) -> bool {
        self.flags() & 2 != 0
    }

    /// The question section of a query.
    pub(crate) fn question(&self) -> Vec<u8> {
        [self.name(), &self.kind().to_be_bytes(), &IN.to_be_bytes()].concat()
    }
}

/// A cached response.
pub(crate) struct Entry {
    hash: u64,
    key: Box<[u8]>,
    shape: Answer,
    /// The records, and the extended error behind them.
    data: Box<[u8]>,
    records: usize,
    received: Time,
    expires: Time,
    pub(crate) kept: Kept,
    /// Used since it was last considered for removal.
    used: bool,
}

/// What is known of a response besides its bytes.
#[derive(Clone)]
pub(crate) struct Kept {
    /// It is about the network's own names, and holds whatever name servers there are.
    pub(crate) own: bool,
    /// A guest that comes or goes may change it.
    pub(crate) local: bool,
    /// The port whose query brought it.
    pub(crate) owner: PortId,
    /// The name of others before the search domain: while that fails, this response is a temporary failure too.
    pub(crate) searched: Option<Box<[u8]>>,
}

impl Entry {
    fn size(&self) -> usize {
        OVERHEAD + self.key.len() + self.data.len() + 2 * self.shape.ttls.len()
    }

    /// Appends the response to `query` to `out`.
    pub(crate) fn emit(&self, query: &Query<'_>, now: Time, largest: usize, out: &mut Vec<u8>) {
        let (records, explanation) = self.data.split_at(self.records.min(self.data.len()));
        let age = u32::try_from(now.since(self.received) / 1_000_000_000).unwrap_or(u32::MAX);
        self.shape.emit(query, records, explanation, age, largest, out);
    }

    /// The message, with what is left of its TTLs, as it would be sent to somebody who takes all of it.
    pub(crate) fn message(&self, key: &Key, now: Time) -> Vec<u8> {
        let question = key.question();
        let q =
            Query { id: 0, flags: flags::RD, question: &question, kind: key.kind(), class: IN, edns: None };
        let mut out = Vec::new();
        self.emit(&q, now, usize::MAX, &mut out);
        out
    }
}

#[derive(Default)]
struct Share {
    /// Its entries, oldest first.
    entries: VecDeque<u32>,
    bytes: usize,
}

/// See the module head.
#[derive(Default)]
pub(crate) struct Cache {
    index: HashTable<u32>,
    slots: Vec<Option<Entry>>,
    free: Vec<u32>,
    shares: BTreeMap<PortId, Share>,
    bytes: usize,
    limit: usize,
}

impl Cache {
    /// An empty one for so many bytes.
    pub(crate) fn new(limit: usize) -> Cache {
        Cache { limit, ..Cache::default() }
    }

    pub(crate) fn len(&self) -> usize {
        self.index.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Entries and bytes that a port's queries brought.
    #[cfg(test)]
    pub(crate) fn share(&self, port: PortId) -> (usize, usize) {
        self.shares.get(&port).map_or((0, 0), |s| (s.entries.len(), s.bytes))
    }

    /// Whether the books agree.
    pub(crate) fn is_sound(&self) -> bool {
        let live = || self.slots.iter().flatten();
        let sums = |entries: usize, bytes: usize, of: Option<PortId>| {
            let own = || live().filter(|e| of.is_none_or(|port| e.kept.owner == port));
            (entries, bytes) == (own().count(), own().map(Entry::size).sum::<usize>())
        };
        sums(self.len(), self.bytes, None)
            && self.bytes <= self.limit
            && self.shares.iter().all(|(port, s)| sums(s.entries.len(), s.bytes, Some(*port)))
    }

    fn find(&self, key: &Key) -> Option<u32> {
        let same = |e: &Entry| *e.key == *key.bytes();
        self.index.find(key.hash, |i| self.at(*i).is_some_and(same)).copied()
    }

    fn at(&self, index: u32) -> Option<&Entry> {
        self.slots.get(index as usize)?.as_ref()
    }

    /// A response that still holds.
    pub(crate) fn get(&mut self, key: &Key, now: Time) -> Option<&Entry> {
        let index = self.find(key)?;
        let entry = self.slots.get_mut(index as usize)?.as_mut().filter(|e| now < e.expires)?;
        entry.used = true;
        Some(entry)
    }

    /// Keeps a response that may be kept: `message` is what `shape` was read from.
    pub(crate) fn put(&mut self, key: &Key, shape: Answer, message: &[u8], kept: Kept, now: Time) {
        let records = message.get(shape.question.end..shape.end).unwrap_or(&[]);
        let explanation = message.get(shape.explanation.clone()).unwrap_or(&[]);
        if let Some(old) = self.find(key) {
            self.remove(old);
        }
        if shape.lifetime == 0 || message.len() > MESSAGE_MAX {
            return;
        }
        let expires = now.plus_s(u64::from(shape.lifetime));
        let (data, n) = ([records, explanation].concat().into(), records.len());
        let (hash, key, owner) = (key.hash, key.bytes().into(), kept.owner);
        let entry = Entry { hash, key, shape, data, records: n, received: now, expires, kept, used: false };
        let size = entry.size();
        if size > self.limit {
            return;
        }
        self.make_room(size);
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                self.slots.push(None);
                self.slots.len() as u32 - 1
            }
        };
        if let Some(slot) = self.slots.get_mut(index as usize) {
            *slot = Some(entry);
        }
        let slots = &self.slots;
        let rehash = |i: &u32| slots.get(*i as usize).and_then(|e| e.as_ref()).map_or(0, |e| e.hash);
        self.index.insert_unique(hash, index, rehash);
        self.bytes += size;
        let share = self.shares.entry(owner).or_default();
        share.bytes += size;
        share.entries.push_back(index);
    }

    fn make_room(&mut self, size: usize) {
        let mut chances = CHANCES;
        while self.bytes + size > self.limit {
            let most = self.shares.values_mut().max_by_key(|s| s.bytes);
            let Some(entries) = most.map(|s| &mut s.entries) else { return };
            let Some(oldest) = entries.front().copied() else { return };
            match self.slots.get_mut(oldest as usize) {
                Some(Some(e)) if e.used && chances > 0 => {
                    e.used = false;
                    chances -= 1;
                    entries.rotate_left(1);
                }
                _ => self.remove(oldest),
            }
        }
    }

    fn remove(&mut self, index: u32) {
        let Some(entry) = self.slots.get_mut(index as usize).and_then(Option::take) else { return };
        if let Ok(found) = self.index.find_entry(entry.hash, |i| *i == index) {
            found.remove();
        }
        self.free.push(index);
        self.bytes -= entry.size();
        if let Some(share) = self.shares.get_mut(&entry.kept.owner) {
            share.bytes -= entry.size();
            if let Some(at) = share.entries.iter().position(|i| *i == index) {
                share.entries.remove(at);
            }
            if share.entries.is_empty() {
                self.shares.remove(&entry.kept.owner);
            }
        }
    }

    /// Removes the entries that a port's queries brought.
    pub(crate) fn remove_port(&mut self, port: PortId) {
        while let Some(index) = self.shares.get(&port).and_then(|s| s.entries.back()) {
            self.remove(*index);
        }
    }

    /// Removes the entries that `stale` says.
    pub(crate) fn remove_if(&mut self, stale: impl Fn(&Kept) -> bool) {
        for index in 0..self.slots.len() as u32 {
            if self.at(index).is_some_and(|e| stale(&e.kept)) {
                self.remove(index);
            }
        }
    }

    /// Removes everything.
    pub(crate) fn clear(&mut self) {
        *self = Cache::new(self.limit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(name: &str, records: usize) -> Vec<u8> {
        let mut m = vec![0, 0, 0x81, 0x80, 0, 1, 0, records as u8, 0, 0, 0, 0, name.len() as u8];
        m.extend_from_slice(name.as_bytes());
        m.extend_from_slice(&[0, 0, 1, 0, 1]);
        for _ in 0..records {
            m.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 7]);
        }
        m
    }

    fn key(name: &str) -> Key {
        let mut labels = vec![name.len() as u8];
        labels.extend_from_slice(name.as_bytes());
        labels.push(0);
        Key::of(SipKey::from_secret(&[3; 32], 0), &labels, 1, false, false).unwrap()
    }

    fn kept(owner: u32) -> Kept {
        Kept { own: false, local: false, owner: PortId(owner), searched: None }
    }

    fn put(c: &mut Cache, name: &str, records: usize, owner: u32) {
        let m = message(name, records);
        c.put(&key(name), Answer::parse(&m).unwrap(), &m, kept(owner), Time(5));
        check(c);
    }

    fn check(c: &Cache) {
        assert!(c.is_sound());
    }

    fn fill(c: &mut Cache, name: &str, records: usize, owner: u32, count: usize) {
        for n in 0..count {
            let name = format!("{name}{n:05}");
            let m = message(&name, records);
            c.put(&key(&name), Answer::parse(&m).unwrap(), &m, kept(owner), Time(5));
        }
        check(c);
    }

    /// Room for this many answers of one record, whose names have `letters`.
    fn room_for(count: usize, letters: usize) -> Cache {
        Cache::new(count * (OVERHEAD + letters + 5 + 16 + 2))
    }

    #[test]
    fn a_guest_with_many_names_replaces_its_own_entries() {
        let mut c = room_for(1000, 6);
        put(&mut c, "first0", 1, 1);
        fill(&mut c, "n", 1, 2, 1010);
        assert_eq!((c.share(PortId(1)).0, c.share(PortId(2)).0), (1, 999));
        assert!(c.get(&key("first0"), Time(5)).is_some());
        assert!(c.get(&key("n00010"), Time(5)).is_none() && c.get(&key("n00011"), Time(5)).is_some());
        // Others have room as long as they have less.
        fill(&mut c, "o", 1, 3, 100);
        assert_eq!((c.share(PortId(2)).0, c.share(PortId(3)).0), (899, 100));
        c.remove_port(PortId(2));
        check(&c);
        assert_eq!((c.share(PortId(2)), c.len()), ((0, 0), 101));
        c.clear();
        assert_eq!((c.len(), c.bytes()), (0, 0));
        put(&mut c, "first0", 1, 1);
        assert_eq!(c.len(), 1);
    }

    #[test]
    fn an_entry_that_is_used_stays() {
        let mut c = room_for(1000, 6);
        put(&mut c, "popula", 1, 1);
        for n in 0..4 {
            fill(&mut c, &format!("{n}"), 1, 1, 500);
            assert!(c.get(&key("popula"), Time(5)).is_some(), "{n}");
        }
        // When all are used, one is removed all the same, after few chances.
        for n in 0..500 {
            assert!(c.get(&key(&format!("3{n:05}")), Time(5)).is_some());
        }
        fill(&mut c, "m", 1, 1, 2000);
        assert!(c.get(&key("popula"), Time(5)).is_none());
    }

    #[test]
    fn large_answers_are_counted_by_their_bytes() {
        let mut c = room_for(1000, 6);
        put(&mut c, "small0", 1, 1);
        fill(&mut c, "l", 200, 2, 300);
        assert!((60..90).contains(&c.share(PortId(2)).0), "{}", c.share(PortId(2)).0);
        assert!(c.get(&key("small0"), Time(5)).is_some());
        // Nothing is kept where there is no room, or none for this one.
        let mut c = Cache::new(0);
        put(&mut c, "small0", 1, 1);
        assert_eq!(c.len(), 0);
        let mut c = room_for(1, 6);
        put(&mut c, "small0", 1, 1);
        put(&mut c, "large0", 200, 1);
        assert_eq!(c.share(PortId(1)).0, 1);
    }

    #[test]
    fn an_entry_ends_with_its_lifetime_and_is_replaced() {
        let mut c = room_for(10, 6);
        put(&mut c, "Name", 1, 1);
        put(&mut c, "nAME", 1, 2);
        assert_eq!((c.len(), c.share(PortId(1))), (1, (0, 0)));
        assert!(c.get(&key("name"), Time(60_000_000_004)).is_some());
        assert!(c.get(&key("name"), Time(60_000_000_005)).is_none());
        // The same question with a response that is not to be kept.
        let m = message("name", 0);
        c.put(&key("name"), Answer::parse(&m).unwrap(), &m, kept(1), Time(5));
        assert_eq!(c.len(), 0);
        check(&c);
    }
}
