//! Theory of operation: what the core keeps of each port of the switch. Ports sit in slots, which flows and
//! bindings refer to by number; a slot is given to another port only after everything of the old one is gone.

use crate::interface::stats::Counters;
use crate::interface::types::{PortConfig, PortId, Time};
use crate::relay::tcp::Budget;
use crate::tables::flow::List;
use crate::util::rate_limiter::RateLimiter;
use guestnet_wire::ether::Mac;
use std::collections::VecDeque;
use std::net::IpAddr;

/// Addresses a second of one port that the control side hears of.
const NEWS_PER_SECOND: u32 = 100;

/// ARP requests a second of the gateway to one port. Each port has its own: those to a guest that answers none
/// are as many as clients outside like.
const ASKS_PER_SECOND: u32 = 100;

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
    /// Records in the flow table, mappings not counted.
    pub flows: u32,
    /// Flows that are translated, which hold no descriptor and have limits of their own.
    pub translated: u32,
    /// Mappings, each with one socket.
    pub sockets: u32,
    /// All its flows, mappings not counted.
    pub records: List,
    /// One-shot flows, and TCP flows that are being opened or in TIME-WAIT: what makes room for another flow,
    /// least recently used first.
    pub lru: List,
    /// TCP flows that wait for the port to take frames again.
    pub waiting: List,
    /// Bytes of the kernel's memory that its TCP flows hold, as measured.
    pub socket_memory: usize,
    /// Flows of it that hold some.
    pub stuck: u32,
    /// Buffered bytes of its TCP flows.
    pub budget: Budget,
    /// ICMP errors (and refusals told) to it.
    pub icmp: RateLimiter,
    /// Datagrams of it to UDP services.
    pub service: RateLimiter,
    /// ARP requests of the gateway to it.
    pub asks: RateLimiter,
    /// Questions about names that it waits for.
    pub asking: u32,
    /// When the guest was last asked about all its idle TCP connections.
    pub rechecked: Time,
    /// PeerUpdate of its addresses to the control side.
    pub news: RateLimiter,
    /// Frames of it that go to several ports.
    pub flood: RateLimiter,
    /// Identification of the last IPv4 packet that was made for it. Its own: a counter that all share would
    /// tell each guest how much the others get (RFC 7739 5).
    pub ip_id: u16,
    /// MACs and addresses of it that other workers hear of.
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
    /// A port that nothing has happened on.
    #[must_use]
    pub fn new(id: PortId, config: PortConfig, limits: &crate::interface::config::Limits, now: Time) -> Port {
        Port {
            id,
            mac: config.mac,
            config,
            macs: VecDeque::new(),
            learned: VecDeque::new(),
            learned6: VecDeque::new(),
            counters: Counters::default(),
            flows: 0,
            translated: 0,
            sockets: 0,
            asking: 0,
            records: List::default(),
            lru: List::default(),
            waiting: List::default(),
            socket_memory: 0,
            stuck: 0,
            budget: Budget { used: 0, limit: limits.buffer_per_port },
            icmp: RateLimiter::new(limits.icmp_errors_per_second, now),
            service: RateLimiter::new(limits.service_datagrams_per_second, now),
            rechecked: now,
            asks: RateLimiter::new(ASKS_PER_SECOND, now),
            news: RateLimiter::new(NEWS_PER_SECOND, now),
            flood: RateLimiter::new(limits.floods_per_second, now),
            ip_id: 0,
            learn: RateLimiter::new(NEWS_PER_SECOND, now),
            remote: None,
        }
    }

    /// The identification of the next IPv4 packet for it.
    pub fn next_ip_id(&mut self) -> u16 {
        self.ip_id = self.ip_id.wrapping_add(1);
        self.ip_id
    }
}
