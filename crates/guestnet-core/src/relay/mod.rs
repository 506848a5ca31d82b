//! Theory of operation: [`Relay`] carries flows over host sockets: TCP connections, UDP datagrams and echo requests that
//! guests open, and those that come in through published ports.
//!
//! What goes in: packets of guests that are addressed to the gateway's MAC ([`Relay::tcp_out`], [`Relay::udp_out`],
//! [`Relay::icmp_out`]), events of sockets ([`Relay::tcp_ready`] and others), timers. What comes out: calls of
//! [`crate::effects::Effects`], frames to guests through the layers below, and a service where a datagram is for one.
//!
//! - [`admission`] opens and closes flows within their limits. One flow table holds all of them, one timer wheel ends
//!   them.
//! - [`tcp_relay`] joins the state machine in [`tcp`] to sockets; [`udp`] and [`icmp`] relay datagrams and echo requests;
//!   [`errors`] passes errors of sockets and guests on.
//! - [`inspection`] reads the names that conversations show, where rules are about names.
//! - [`sweep`] judges flows again after a change of the rules.
//! - [`port_forward`] accepts connections and datagrams of published ports.
//! - [`turns`] shares time among bulk flows, [`socket_memory`] the kernel's memory among guests.
//!
//! Invariants ([`Relay::audit`] checks them):
//! - A record of the flow table is in the lists that its state says, and in no other.
//! - What is accounted to a guest is the sum over its flows.
//! - A mapping has a flow, and its socket is closed with the last one.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

mod admission;
mod audit;
mod errors;
mod guest;
mod icmp;
mod inspection;
mod port_forward;
mod socket_memory;
mod sweep;
pub mod tcp;
mod tcp_relay;
#[cfg(test)]
mod tests;
mod turns;
mod udp;

use crate::context::Context;
use crate::interface::config::{Filtering, FlowInfo, ForwardSpec, Limits, NetworkConfig, Timeouts};
use crate::interface::effects::{Effects, SockError};
use crate::interface::stats::DropReason;
use crate::interface::types::{FlowId, ForwardId, FrameMeta, Time};
use crate::l2::lan::{Lan, Sender};
use crate::l3::icmp_error::IcmpError;
use crate::policy::shaping::Way;
use crate::tables::flow::{Key, List, NONE};
use crate::tables::flow_table::FlowTable;
use crate::tables::per_port::PerPort;
use crate::util::siphash::SipKey;
use crate::util::timers::Timers;
use guest::Guest;
use guestnet_wire::parse::Packet;
use guestnet_wire::proto;
use inspection::evidence::Evidence;
use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use turns::{NO_FLOW, Turns};

/// Flows whose timers are handled before other work has its turn; many end in the same second.
const TIMERS: usize = 256;

/// See the module head.
pub(crate) struct Relay {
    limits: Limits,
    timeouts: Timeouts,
    filtering: Filtering,
    flows: FlowTable,
    /// What is known by name of flows, by their slots in the table. Most have nothing here.
    evidence: HashMap<u32, Box<Evidence>>,
    wheel: Timers,
    /// Flows whose timers fired and that have not had their turn yet.
    due: Vec<u32>,
    /// TCP flows that asked for [`Relay::batch_end`]: those with little to send, then bulk flows in turn.
    batch: List,
    turns: Turns,
    /// It is the turn of the flow that is called next to carry bytes this way.
    called: Option<Way>,
    /// What is accounted to each guest.
    guests: PerPort<Guest>,
    forwards: BTreeMap<u32, ForwardSpec>,
    /// UDP clients of forwards, by forward and the client's true address.
    clients: BTreeMap<(u32, SocketAddr), u32>,
    /// Keys the initial sequence numbers of RFC 6528.
    isn_key: SipKey,
    /// Bytes of the kernel's memory that the flows of all guests hold, as measured.
    socket_memory: usize,
}

impl Relay {
    /// A relay without flows.
    #[must_use]
    pub fn new(config: &NetworkConfig, now: Time) -> Relay {
        Relay {
            flows: FlowTable::new(config.limits.flows, SipKey::from_secret(&config.secret, 0)),
            evidence: HashMap::new(),
            wheel: Timers::new(now.as_ms()),
            due: Vec::new(),
            batch: List::default(),
            turns: Turns::new(),
            called: None,
            guests: PerPort::default(),
            forwards: BTreeMap::new(),
            clients: BTreeMap::new(),
            isn_key: SipKey::from_secret(&config.secret, 16),
            socket_memory: 0,
            limits: config.limits.clone(),
            timeouts: config.timeouts,
            filtering: config.filtering,
        }
    }

    /// Changes what all flows together can have.
    pub fn set_shares(&mut self, descriptors: u32, socket_memory: usize) {
        self.limits.descriptors = descriptors;
        self.limits.socket_memory = socket_memory;
    }

    /// Bytes of the kernel's memory that all flows hold.
    #[must_use]
    pub fn socket_memory(&self) -> usize {
        self.socket_memory
    }

    // ---- ports and forwards -------------------------------------------------------------------------

    /// A port was added.
    pub fn add_port(&mut self, now: Time, slot: u32) {
        self.guests.insert(slot, Guest::new(self.limits.buffer_per_port, now));
    }

    /// Closes up to `most` flows of a port. True when it has more.
    pub fn close_flows<E: Effects>(&mut self, cx: &mut Context<'_, E>, slot: u32, most: usize) -> bool {
        for _ in 0..most {
            match self.guests.get(slot).map(|g| g.records.head) {
                Some(index) if index != NONE => self.close_flow(cx, index),
                _ => return false,
            }
        }
        self.guests.get(slot).is_some_and(|g| g.records.len > 0)
    }

    /// A port was removed: closes its flows and forgets it.
    pub fn remove_port<E: Effects>(&mut self, cx: &mut Context<'_, E>, slot: u32) {
        self.close_flows(cx, slot, usize::MAX);
        self.guests.remove(slot);
    }

    /// Adds a forward.
    pub fn add_forward(&mut self, id: ForwardId, spec: ForwardSpec) {
        self.forwards.insert(id.0, spec);
    }

    /// Whether there is a forward with this number.
    #[must_use]
    pub fn has_forward(&self, id: ForwardId) -> bool {
        self.forwards.contains_key(&id.0)
    }

    /// Makes a forward lead to another guest; false when there is no such forward. Running flows stay where they are.
    pub fn retarget_forward(&mut self, id: ForwardId, guest: SocketAddr) -> bool {
        let found = self.forwards.get_mut(&id.0).map(|spec| spec.guest = guest);
        found.is_some()
    }

    /// Removes a forward. Its TCP flows live on; its UDP flows end, because their socket goes with it.
    pub fn remove_forward<E: Effects>(&mut self, cx: &mut Context<'_, E>, id: ForwardId) {
        self.forwards.remove(&id.0);
        let gone: Vec<u32> = self.clients.iter().filter(|(k, _)| k.0 == id.0).map(|(_, i)| *i).collect();
        for index in gone {
            self.close_flow(cx, index);
        }
    }

    // ---- turns and timers ---------------------------------------------------------------------------

    /// Something that is not a bulk flow was active: bulk flows take shorter turns.
    #[inline]
    pub fn others_active(&mut self, now: Time) {
        self.turns.active(now, NO_FLOW);
    }

    /// Frames and socket events took so many nanoseconds since the last [`Relay::batch_end`].
    pub fn others_took(&mut self, ns: u64) {
        self.turns.others_took(ns);
    }

    /// True when flows have more to send, and only let others have their turn.
    #[must_use]
    pub fn has_more(&self) -> bool {
        self.batch.len > 0
    }

    /// When [`Relay::timers`] has something to do.
    #[must_use]
    pub fn next_timer(&self, now: Time) -> Option<Time> {
        if !self.due.is_empty() {
            return Some(now);
        }
        self.wheel.next().map(|ms| Time(ms.saturating_mul(1_000_000)))
    }

    /// Handles the timers of flows that are due, some of them at a time.
    pub fn timers<E: Effects>(&mut self, cx: &mut Context<'_, E>) {
        if cx.policy.shaping.is_active() {
            self.limits_due(cx);
        }
        if self.due.is_empty() {
            self.wheel.expire(cx.link.now.as_ms(), &mut self.due);
        }
        let mut due = std::mem::take(&mut self.due);
        for index in due.drain(..due.len().min(TIMERS)) {
            self.flow_timer(cx, index);
        }
        self.due = due;
    }

    // ---- listings -----------------------------------------------------------------------------------

    /// Flows of a port.
    #[must_use]
    pub fn flows_of(&self, slot: u32) -> u32 {
        self.guests.get(slot).map_or(0, |g| g.flows)
    }

    /// Bytes buffered for the TCP flows of a port.
    #[must_use]
    pub fn buffered(&self, slot: u32) -> usize {
        self.guests.get(slot).map_or(0, |g| g.budget.used)
    }

    /// All flows.
    pub fn flows(&self, lan: &Lan, now: Time) -> impl Iterator<Item = FlowInfo> {
        self.flows.iter().filter(|(_, f)| !f.is_mapping()).filter_map(move |(id, f)| {
            let port = lan.port(f.key.slot)?.id;
            Some(f.info(id, port, now))
        })
    }

    // ---- packets of guests --------------------------------------------------------------------------

    /// Whether a packet of a guest to the outside belongs to a relayed flow although the network has an uplink of packets:
    /// to a client of a published port, or of a flow that a name decides about. ICMP errors about such flows are handled
    /// here.
    pub fn claims<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        slot: u32,
        frame: &[u8],
        p: &Packet,
    ) -> bool {
        if self.flows.count() == 0 {
            return false;
        }
        match p.proto {
            _ if p.fragment.is_some() => !self.clients.is_empty() || !self.evidence.is_empty(),
            proto::TCP | proto::UDP => {
                let guest = SocketAddr::new(p.src, p.src_port);
                let remote = SocketAddr::new(p.dst, p.dst_port);
                self.flows.find(&Key { slot, proto: p.proto, guest, remote }).is_some()
            }
            proto::ICMP if guestnet_wire::icmp::is_error(frame.get(p.l4).copied().unwrap_or(0)) => {
                self.guest_error(cx, slot, frame, p).is_ok()
            }
            _ => false,
        }
    }

    /// Handles a packet of a protocol that cannot be relayed: it is routed to another guest, or refused.
    ///
    /// # Errors
    /// Why it is dropped; the guest has been told, where it should be.
    pub fn other_out<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        from: Sender,
        frame: &mut [u8],
        p: &Packet,
        meta: FrameMeta,
    ) -> Result<(), DropReason> {
        if !cx.link.lan.addressing().is_own(p.dst) {
            if cx.route_to_guest(from, frame, p, meta)? {
                return Ok(());
            }
            cx.outbound(from, frame, p, SocketAddr::new(p.dst, 0))?;
        }
        let error = IcmpError::unreachable(guestnet_wire::icmp::unreachable::PROTOCOL);
        Err(cx.gateway.refuse(&mut cx.link, from, frame, p, DropReason::UnsupportedProtocol, error))
    }

    // ---- events of TCP sockets ----------------------------------------------------------------------

    /// The outcome of [`Effects::tcp_connect`].
    pub fn tcp_connected<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        flow: FlowId,
        result: Result<(), SockError>,
    ) {
        self.with_flow(cx, flow, |tcb, cx| tcb.connected(cx, result));
        if !self.evidence.is_empty() {
            self.inspection_begins(cx, flow);
        }
    }

    /// A TCP socket became readable or writable; both on hang-up or error.
    pub fn tcp_ready<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        flow: FlowId,
        readable: bool,
        writable: bool,
    ) {
        self.with_flow(cx, flow, |tcb, cx| tcb.ready(cx, readable, writable));
        self.measure_arrival(cx.link.fx, flow);
    }
}
