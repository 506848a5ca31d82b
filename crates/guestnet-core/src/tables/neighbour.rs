//! Theory of operation: which port and MAC has an address. Assigned bindings come from the control side and
//! belong to their port until taken back; learned ones come from a guest's own frames, go to another port
//! only when long unused, and give way to an assignment at once. An address whose MAC is needed and not known is
//! probed: three requests are sent, a second apart. Each probe is for somebody who waits
//! ([`crate::policy::pending`]), and there are no more of them.

use crate::interface::types::Time;
use crate::util::siphash::{SipKey, address_words};
use guestnet_wire::ether::Mac;
use hashbrown::HashTable;
use std::net::IpAddr;

/// A learned address that was silent this long may be taken by another port.
pub const STALE_S: u64 = 300;
/// Requests that are sent before giving up.
pub const TRIES: u8 = 3;

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

/// An address that the gateway asks for.
struct Probe {
    ip: IpAddr,
    /// Slot of its port.
    slot: u32,
    /// Requests sent.
    tries: u8,
    /// When the next one is due, or the end.
    next: Time,
}

/// What a probe needs next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbeStep {
    /// Another request for the address, to the port in this slot.
    Request(u32, IpAddr),
    /// Nothing: nobody has answered for the address.
    Unanswered(IpAddr),
}

/// All bindings.
pub struct Neighbours {
    table: HashTable<Binding>,
    key: SipKey,
    probes: Vec<Probe>,
}

impl Neighbours {
    /// No bindings.
    #[must_use]
    pub fn new(key: SipKey) -> Neighbours {
        Neighbours { table: HashTable::new(), key, probes: Vec::new() }
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

    /// Puts a binding in, in place of any other of the address.
    pub fn set(&mut self, binding: Binding) {
        self.remove(binding.ip);
        let key = self.key;
        self.table.insert_unique(Self::hash(key, binding.ip), binding, |b| Self::hash(key, b.ip));
    }

    /// Takes a binding out.
    pub fn remove(&mut self, ip: IpAddr) -> Option<Binding> {
        let entry = self.table.find_entry(Self::hash(self.key, ip), |b| b.ip == ip).ok()?;
        Some(entry.remove().0)
    }

    /// Takes out all bindings and probes of a port.
    pub fn remove_port(&mut self, slot: u32) {
        self.table.retain(|b| b.slot != slot);
        self.probes.retain(|p| p.slot != slot);
    }

    /// Addresses of a port.
    pub fn of_port(&self, slot: u32) -> impl Iterator<Item = &Binding> {
        self.table.iter().filter(move |b| b.slot == slot)
    }

    /// Begins to probe an address, unless that goes on already. Returns whether a request is to be sent now, and when the
    /// probe ends at the latest.
    pub fn probe(&mut self, now: Time, slot: u32, ip: IpAddr) -> (bool, Time) {
        let end = |p: &Probe| p.next.plus_s(u64::from(TRIES.saturating_sub(p.tries)));
        if let Some(p) = self.probes.iter().find(|p| p.ip == ip) {
            return (false, end(p));
        }
        let p = Probe { ip, slot, tries: 1, next: now.plus_s(1) };
        let until = end(&p);
        self.probes.push(p);
        (true, until)
    }

    /// Ends the probe of an address; false when there is none.
    pub fn end_probe(&mut self, ip: IpAddr) -> bool {
        let found = self.probes.iter().position(|p| p.ip == ip);
        found.map(|at| self.probes.swap_remove(at)).is_some()
    }

    /// When the next probe needs something.
    #[must_use]
    pub fn next_timer(&self) -> Option<Time> {
        self.probes.iter().map(|p| p.next).min()
    }

    /// What the next probe needs that is due.
    pub fn due(&mut self, now: Time) -> Option<ProbeStep> {
        let at = self.probes.iter().position(|p| p.next <= now)?;
        let p = self.probes.get_mut(at)?;
        if p.tries >= TRIES {
            return Some(ProbeStep::Unanswered(self.probes.swap_remove(at).ip));
        }
        p.tries += 1;
        p.next = now.plus_s(1);
        Some(ProbeStep::Request(p.slot, p.ip))
    }
}
