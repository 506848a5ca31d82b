//! Theory of operation: the neighbour table: the port and MAC of each address, and what waits for a MAC.
//!
//! - An assigned binding comes from the control side and stays until it is taken back. A learned one comes from a guest's
//!   own frames ([`crate::l2`] has the rules).
//! - Inbound flows and a few datagrams wait here until the guest answers ARP. Three requests are sent, a second apart. The
//!   number of waiting flows and frames is bounded, with a share for each port.

use crate::interface::types::{FlowId, Time};
use crate::util::siphash::{SipKey, address_words};
use guestnet_wire::ether::Mac;
use hashbrown::HashTable;
use std::net::IpAddr;

/// Seconds of silence after which another port may take a learned address.
pub const STALE_S: u64 = 300;
/// Requests that are sent before what waits is given up.
pub const TRIES: u8 = 3;
/// Datagrams that wait for one address (RFC 1122 2.3.2.2 asks for at least one).
const FRAMES: usize = 4;

/// One address.
#[derive(Debug, Clone, Copy)]
pub struct Binding {
    /// The address.
    pub ip: IpAddr,
    /// Slot of its port.
    pub slot: u32,
    /// Its MAC, once known.
    pub mac: Option<Mac>,
    /// Given by the control side.
    pub assigned: bool,
    /// When a frame last came from it.
    pub seen: Time,
}

/// What waits for one address.
pub struct Waiting {
    /// The address.
    pub ip: IpAddr,
    /// Slot of its port.
    pub slot: u32,
    /// Inbound TCP flows.
    pub flows: Vec<FlowId>,
    /// Frames that lack the destination MAC.
    pub frames: Vec<Box<[u8]>>,
    /// Requests sent.
    pub tries: u8,
    /// When the next one is due.
    pub next: Time,
}

/// All bindings.
pub struct Neighbours {
    table: HashTable<Binding>,
    key: SipKey,
    waiting: Vec<Waiting>,
    queued: usize,
    cap: usize,
}

impl Neighbours {
    /// An empty table; at most `cap` flows and frames may wait.
    #[must_use]
    pub fn new(key: SipKey, cap: u32) -> Neighbours {
        Neighbours { table: HashTable::new(), key, waiting: Vec::new(), queued: 0, cap: cap as usize }
    }

    fn hash(key: SipKey, ip: IpAddr) -> u64 {
        key.hash(&address_words(ip))
    }

    /// The binding of an address.
    #[inline]
    #[must_use]
    pub fn get(&self, ip: IpAddr) -> Option<&Binding> {
        self.table.find(Self::hash(self.key, ip), |b| b.ip == ip)
    }

    /// The binding of an address.
    #[inline]
    pub fn get_mut(&mut self, ip: IpAddr) -> Option<&mut Binding> {
        self.table.find_mut(Self::hash(self.key, ip), |b| b.ip == ip)
    }

    /// Sets the binding of an address.
    pub fn set(&mut self, binding: Binding) {
        self.remove(binding.ip);
        let key = self.key;
        self.table.insert_unique(Self::hash(key, binding.ip), binding, |b| Self::hash(key, b.ip));
    }

    /// Removes the binding of an address.
    pub fn remove(&mut self, ip: IpAddr) -> Option<Binding> {
        let entry = self.table.find_entry(Self::hash(self.key, ip), |b| b.ip == ip).ok()?;
        Some(entry.remove().0)
    }

    /// Removes all bindings of a port.
    pub fn remove_port(&mut self, slot: u32) {
        self.table.retain(|b| b.slot != slot);
    }

    /// Addresses of a port.
    pub fn of_port(&self, slot: u32) -> impl Iterator<Item = &Binding> {
        self.table.iter().filter(move |b| b.slot == slot)
    }

    /// Queues a flow for an address; `Ok(true)` when a request is to be sent now.
    ///
    /// # Errors
    /// When too much waits already.
    pub fn wait_flow(&mut self, now: Time, slot: u32, ip: IpAddr, flow: FlowId) -> Result<bool, ()> {
        let (w, new) = self.entry(now, slot, ip)?;
        w.flows.push(flow);
        self.queued += 1;
        Ok(new)
    }

    /// Queues a frame for an address; `Ok(true)` when a request is to be sent now.
    ///
    /// # Errors
    /// When too much waits already.
    pub fn wait_frame(&mut self, now: Time, slot: u32, ip: IpAddr, frame: &[u8]) -> Result<bool, ()> {
        let (w, new) = self.entry(now, slot, ip)?;
        if w.frames.len() >= FRAMES {
            return Err(());
        }
        w.frames.push(frame.into());
        self.queued += 1;
        Ok(new)
    }

    fn entry(&mut self, now: Time, slot: u32, ip: IpAddr) -> Result<(&mut Waiting, bool), ()> {
        let own = self.waiting.iter().filter(|w| w.slot == slot).map(|w| w.flows.len() + w.frames.len());
        // A port may have a quarter at most, and no more than it leaves to others.
        let left = self.cap.saturating_sub(self.queued);
        if own.sum::<usize>() >= self.cap.div_ceil(4).min(left) {
            return Err(());
        }
        if let Some(at) = self.waiting.iter().position(|w| w.ip == ip) {
            return Ok((self.waiting.get_mut(at).ok_or(())?, false));
        }
        let next = now.plus_s(1);
        self.waiting.push(Waiting { ip, slot, flows: Vec::new(), frames: Vec::new(), tries: 1, next });
        Ok((self.waiting.last_mut().ok_or(())?, true))
    }

    /// Removes and returns what waits for an address.
    pub fn resolved(&mut self, ip: IpAddr) -> Option<Waiting> {
        if self.waiting.is_empty() {
            return None;
        }
        let at = self.waiting.iter().position(|w| w.ip == ip)?;
        Some(self.take(at))
    }

    /// Removes and returns what waits for one of the addresses of a port.
    pub fn give_up_port(&mut self, slot: u32) -> Option<Waiting> {
        let at = self.waiting.iter().position(|w| w.slot == slot)?;
        Some(self.take(at))
    }

    fn take(&mut self, at: usize) -> Waiting {
        let w = self.waiting.swap_remove(at);
        self.queued -= w.flows.len() + w.frames.len();
        w
    }

    /// When the next request is due, or the end of a wait.
    #[must_use]
    pub fn next_timer(&self) -> Option<Time> {
        self.waiting.iter().map(|w| w.next).min()
    }

    /// The next address that is due: `Ok((slot, ip))` to send another request, `Err` with what waited in vain.
    pub fn due(&mut self, now: Time) -> Option<Result<(u32, IpAddr), Waiting>> {
        let at = self.waiting.iter().position(|w| w.next <= now)?;
        let w = self.waiting.get_mut(at)?;
        if w.tries >= TRIES {
            return Some(Err(self.take(at)));
        }
        w.tries += 1;
        w.next = now.plus_s(1);
        Some(Ok((w.slot, w.ip)))
    }
}
