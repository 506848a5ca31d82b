//! Theory of operation: the ports of the switch. A port sits in a slot, and everything else refers to it by the number of
//! that slot. A slot is given to another port only after everything of the old port is gone.

use crate::interface::config::Limits;
use crate::interface::stats::Counters;
use crate::interface::types::{PortConfig, PortId, Time};
use crate::util::rate_limiter::RateLimiter;
use guestnet_wire::ether::Mac;
use std::collections::VecDeque;
use std::net::IpAddr;

/// Events a second about the addresses of one port.
const EVENTS_PER_SECOND: u32 = 100;

/// ARP requests a second from the gateway to one port. The limit is per port because clients outside decide how many
/// requests a guest that answers none gets.
const REQUESTS_PER_SECOND: u32 = 100;

/// One port.
pub struct Port {
    /// Its identifier.
    pub id: PortId,
    /// What the caller said of it.
    pub config: PortConfig,
    /// The MAC that is its own: configured, or the first seen. Never taken by another port.
    pub mac: Option<Mac>,
    /// Other source MACs seen (a bridge inside the guest), oldest first.
    pub macs: VecDeque<Mac>,
    /// IPv4 addresses learned, oldest first.
    pub learned: VecDeque<IpAddr>,
    /// IPv6 addresses learned, oldest first.
    pub learned6: VecDeque<IpAddr>,
    /// Its counters.
    pub counters: Counters,
    /// Rate of ARP requests from the gateway to it.
    pub requests: RateLimiter,
    /// Rate of events about its addresses to the control side.
    pub events: RateLimiter,
    /// Rate of its frames that go to several ports.
    pub flood: RateLimiter,
    /// Rate at which it may use new MACs and addresses, where other workers have to learn them.
    pub learn: RateLimiter,
    /// The worker that has the port, where that is another one.
    pub remote: Option<u16>,
}

/// All ports.
#[derive(Default)]
pub struct Ports {
    by_id: Vec<(PortId, u32)>,
    slots: Vec<Option<Port>>,
}

impl Ports {
    /// The slot of a port.
    #[inline]
    #[must_use]
    pub fn slot(&self, id: PortId) -> Option<u32> {
        let at = self.by_id.binary_search_by_key(&id, |e| e.0).ok()?;
        self.by_id.get(at).map(|e| e.1)
    }

    /// Puts a port in; false when the identifier is taken.
    pub fn insert(&mut self, port: Port) -> Option<u32> {
        let id = port.id;
        let at = self.by_id.binary_search_by_key(&id, |e| e.0).err()?;
        let slot = match self.slots.iter().position(Option::is_none) {
            Some(s) => {
                self.slots[s] = Some(port);
                s
            }
            None => {
                self.slots.push(Some(port));
                self.slots.len() - 1
            }
        } as u32;
        self.by_id.insert(at, (id, slot));
        Some(slot)
    }

    /// Takes a port out.
    pub fn remove(&mut self, slot: u32) -> Option<Port> {
        let port = self.slots.get_mut(slot as usize)?.take()?;
        self.by_id.retain(|e| e.0 != port.id);
        Some(port)
    }

    /// The port in a slot.
    #[inline]
    #[must_use]
    pub fn get(&self, slot: u32) -> Option<&Port> {
        self.slots.get(slot as usize)?.as_ref()
    }

    /// The port in a slot.
    #[inline]
    pub fn get_mut(&mut self, slot: u32) -> Option<&mut Port> {
        self.slots.get_mut(slot as usize)?.as_mut()
    }

    /// One past the highest slot in use.
    #[must_use]
    pub fn end(&self) -> u32 {
        self.slots.len() as u32
    }

    /// All ports with their slots.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Port)> {
        self.slots.iter().enumerate().filter_map(|(i, p)| Some((i as u32, p.as_ref()?)))
    }
}

impl Port {
    /// A port without traffic.
    #[must_use]
    pub fn new(id: PortId, config: PortConfig, limits: &Limits, now: Time) -> Port {
        Port {
            id,
            mac: None,
            config,
            macs: VecDeque::new(),
            learned: VecDeque::new(),
            learned6: VecDeque::new(),
            counters: Counters::default(),
            requests: RateLimiter::new(REQUESTS_PER_SECOND, now),
            events: RateLimiter::new(EVENTS_PER_SECOND, now),
            flood: RateLimiter::new(limits.floods_per_second, now),
            learn: RateLimiter::new(EVENTS_PER_SECOND, now),
            remote: None,
        }
    }
}
