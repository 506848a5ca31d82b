//! Theory of operation: the flow table.
//!
//! - Records live in a slab whose slots have generations, so that a [`FlowId`] that someone keeps goes stale by itself.
//! - A hash table with a keyed hash finds them by [`Key`].
//! - Lists (one-shot flows of a guest, flows of a mapping) run through the records, so nothing on the path of a packet
//!   allocates.

use crate::interface::types::FlowId;
use crate::tables::flow::{Chain, Flow, Key, Links, List, NONE};
use crate::util::siphash::{SipKey, address_words};
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use std::net::{IpAddr, SocketAddr};

struct Slot {
    generation: u32,
    flow: Option<Flow>,
}

/// An address that a mapping has sent to, with the number of its flows (address-dependent filtering).
struct Peer {
    mapping: u32,
    address: IpAddr,
    flows: u32,
}

/// The flow table. See the module head.
pub struct FlowTable {
    slots: Vec<Slot>,
    free: Vec<u32>,
    index: HashTable<u32>,
    peers: HashTable<Peer>,
    key: SipKey,
    cap: u32,
}

fn hash_key(sip: SipKey, k: &Key) -> u64 {
    let head = u64::from(k.slot) | u64::from(k.proto) << 32 | u64::from(k.guest.port()) << 48;
    match (k.guest, k.remote) {
        (SocketAddr::V4(g), SocketAddr::V4(r)) => {
            let both = u64::from(u32::from(*g.ip())) << 32 | u64::from(u32::from(*r.ip()));
            sip.hash(&[head, both, u64::from(r.port())])
        }
        (g, r) => {
            let (g, ip) = (address_words(g.ip()), address_words(r.ip()));
            sip.hash(&[head, g[0], g[1], ip[0], ip[1], u64::from(r.port())])
        }
    }
}

fn hash_peer(sip: SipKey, mapping: u32, ip: IpAddr) -> u64 {
    let a = address_words(ip);
    sip.hash(&[u64::from(mapping), a[0], a[1]])
}

impl FlowTable {
    /// An empty table for at most `cap` records.
    #[must_use]
    pub fn new(cap: u32, key: SipKey) -> FlowTable {
        FlowTable {
            slots: Vec::new(),
            free: Vec::new(),
            index: HashTable::new(),
            peers: HashTable::new(),
            key,
            cap: cap.min(NONE - 1),
        }
    }

    /// Number of records.
    #[must_use]
    pub fn count(&self) -> usize {
        self.index.len()
    }

    /// Whether `n` more records fit.
    #[must_use]
    pub fn has_room(&self, n: usize) -> bool {
        self.count() + n <= self.cap as usize
    }

    /// The slot of a key.
    #[inline]
    #[must_use]
    pub fn find(&self, key: &Key) -> Option<u32> {
        let slots = &self.slots;
        self.index
            .find(hash_key(self.key, key), |&i| flow_at(slots, i).is_some_and(|f| f.key == *key))
            .copied()
    }

    /// The identifier that the next [`FlowTable::insert`] gives, if nothing is removed before.
    #[must_use]
    pub fn next_id(&self) -> FlowId {
        match self.free.last() {
            Some(&index) => FlowId { index, generation: self.generation(index) },
            None => FlowId { index: self.slots.len() as u32, generation: 0 },
        }
    }

    /// Inserts a record. Its key must be new, and [`FlowTable::has_room`] true.
    pub fn insert(&mut self, flow: Flow) -> FlowId {
        let id = self.next_id();
        let hash = hash_key(self.key, &flow.key);
        if self.free.pop().is_none() {
            self.slots.push(Slot { generation: 0, flow: None });
        }
        if let Some(s) = self.slots.get_mut(id.index as usize) {
            s.flow = Some(flow);
        }
        let (slots, sip) = (&self.slots, self.key);
        self.index.insert_unique(hash, id.index, |&i| flow_at(slots, i).map_or(0, |f| hash_key(sip, &f.key)));
        id
    }

    /// Removes a record. It must be in no list.
    pub fn remove(&mut self, index: u32) -> Option<Flow> {
        let hash = hash_key(self.key, &self.at(index)?.key);
        if let Ok(entry) = self.index.find_entry(hash, |&i| i == index) {
            entry.remove();
        }
        let slot = self.slots.get_mut(index as usize)?;
        let flow = slot.flow.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(index);
        Some(flow)
    }

    /// The record in a slot.
    #[inline]
    #[must_use]
    pub fn at(&self, index: u32) -> Option<&Flow> {
        flow_at(&self.slots, index)
    }

    /// The record in a slot.
    #[inline]
    pub fn at_mut(&mut self, index: u32) -> Option<&mut Flow> {
        self.slots.get_mut(index as usize)?.flow.as_mut()
    }

    /// The record of an identifier, unless it is stale.
    #[inline]
    #[must_use]
    pub fn get(&self, id: FlowId) -> Option<&Flow> {
        self.slots.get(id.index as usize).filter(|s| s.generation == id.generation)?.flow.as_ref()
    }

    /// The record of an identifier, unless it is stale.
    #[inline]
    pub fn get_mut(&mut self, id: FlowId) -> Option<&mut Flow> {
        let slot = self.slots.get_mut(id.index as usize)?;
        if slot.generation != id.generation {
            return None;
        }
        slot.flow.as_mut()
    }

    /// The identifier of a slot.
    #[inline]
    #[must_use]
    pub fn id(&self, index: u32) -> FlowId {
        FlowId { index, generation: self.generation(index) }
    }

    fn generation(&self, index: u32) -> u32 {
        self.slots.get(index as usize).map_or(0, |s| s.generation)
    }

    /// One past the highest slot in use.
    #[must_use]
    pub fn end(&self) -> u32 {
        self.slots.len() as u32
    }

    /// All records.
    pub fn iter(&self) -> impl Iterator<Item = (FlowId, &Flow)> {
        self.slots.iter().enumerate().filter_map(|(i, s)| {
            Some((FlowId { index: i as u32, generation: s.generation }, s.flow.as_ref()?))
        })
    }

    /// Appends a record to a list.
    pub fn push(&mut self, list: &mut List, chain: Chain, index: u32) {
        let tail = list.tail;
        let Some(f) = self.at_mut(index) else { return };
        let l = &mut f.links[chain as usize];
        if l.is_linked() {
            return;
        }
        *l = Links { prev: tail, next: NONE };
        match self.at_mut(tail) {
            Some(t) => t.links[chain as usize].next = index,
            None => list.head = index,
        }
        list.tail = index;
        list.len += 1;
    }

    /// Puts a record at the front of a list, unless it is in one already.
    pub fn push_front(&mut self, list: &mut List, chain: Chain, index: u32) {
        let head = list.head;
        let Some(f) = self.at_mut(index) else { return };
        let l = &mut f.links[chain as usize];
        if l.is_linked() {
            return;
        }
        *l = Links { prev: NONE, next: head };
        match self.at_mut(head) {
            Some(h) => h.links[chain as usize].prev = index,
            None => list.tail = index,
        }
        list.head = index;
        list.len += 1;
    }

    /// Takes a record out of a list that it is in.
    pub fn unlink(&mut self, list: &mut List, chain: Chain, index: u32) {
        let Some(f) = self.at_mut(index) else { return };
        let l = &mut f.links[chain as usize];
        if !l.is_linked() {
            return;
        }
        let (prev, next) = (l.prev, l.next);
        *l = Links::UNLINKED;
        match self.at_mut(prev) {
            Some(p) => p.links[chain as usize].next = next,
            None => list.head = next,
        }
        match self.at_mut(next) {
            Some(n) => n.links[chain as usize].prev = prev,
            None => list.tail = prev,
        }
        list.len = list.len.saturating_sub(1);
    }

    /// Notes one more flow of a mapping to an address.
    pub fn add_peer(&mut self, mapping: u32, address: IpAddr) {
        let sip = self.key;
        let entry = self.peers.entry(
            hash_peer(sip, mapping, address),
            |p| p.mapping == mapping && p.address == address,
            |p| hash_peer(sip, p.mapping, p.address),
        );
        match entry {
            Entry::Occupied(mut e) => e.get_mut().flows += 1,
            Entry::Vacant(e) => {
                e.insert(Peer { mapping, address, flows: 1 });
            }
        }
    }

    /// Notes one flow less.
    pub fn drop_peer(&mut self, mapping: u32, address: IpAddr) {
        let hash = hash_peer(self.key, mapping, address);
        if let Ok(mut e) = self.peers.find_entry(hash, |p| p.mapping == mapping && p.address == address) {
            e.get_mut().flows -= 1;
            if e.get().flows == 0 {
                e.remove();
            }
        }
    }

    /// Whether the mapping has a flow to the address.
    #[must_use]
    pub fn has_peer(&self, mapping: u32, address: IpAddr) -> bool {
        let hash = hash_peer(self.key, mapping, address);
        self.peers.find(hash, |p| p.mapping == mapping && p.address == address).is_some()
    }
}

#[inline]
fn flow_at(slots: &[Slot], index: u32) -> Option<&Flow> {
    slots.get(index as usize)?.flow.as_ref()
}
