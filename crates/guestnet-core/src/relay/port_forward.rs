//! Theory of operation: published ports.
//!
//! - What comes from outside becomes a flow whose remote side is the client's own address and port, so the guest sees its
//!   peer. A client on loopback or inside the subnet appears as the gateway. A pair that a live flow has already gets
//!   another port.
//! - While the MAC of the guest is not known, the flow is pending; so are a few datagrams.
//! - A guest on another worker cannot be reached from here: the control side gets an event and moves the forward.

use crate::context::Context;
use crate::interface::effects::Effects;
use crate::interface::stats::DropReason;
use crate::interface::types::{FlowId, ForwardId, SockId, Time};
use crate::l3::frame_builder::TTL;
use crate::policy::pending::Held;
use crate::policy::{Direction, RuleId, Ticket, Verdict};
use crate::relay::Relay;
use crate::relay::tcp::Tcb;
use crate::tables::flow::{Flow, Key, State};
use guestnet_wire::ether::Mac;
use guestnet_wire::frame::{FrameHeader, IpHeader};
use guestnet_wire::{proto, put, udp};
use std::net::SocketAddr;

/// Other ports that are tried for a client whose own is taken.
const TRIES: u64 = 64;

/// The MAC of flows whose guest has not been found; never sent to.
pub(super) const UNKNOWN: Mac = Mac::BROADCAST;

impl Relay {
    /// Opens a flow for a client that connected to a forward's listening socket.
    ///
    /// # Errors
    /// Why it is refused; the caller resets the socket.
    pub fn accept_tcp<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        forward: ForwardId,
        sock: SockId,
        peer: SocketAddr,
    ) -> Result<FlowId, DropReason> {
        let new = self.inbound(cx, forward, proto::TCP, peer)?;
        if let Err(why) = self.admit_memory(new.key.slot) {
            return Err(new.refused(cx, why));
        }
        let Inbound { key, mac, ticket, direction, rule } = new;
        let now = cx.link.now;
        let id = self.flows.next_id();
        let tcb = Tcb::inbound(id, sock, self.isn(now, &key), self.tcp_timeouts(), now);
        let tight = self.holds_too_much(key.slot);
        let admitted = cx.policy.generation();
        let flow = Flow::new(key, mac, direction, admitted, now, State::Tcp(Box::new(tcb))).by(rule);
        let id = self.open_flow(cx, flow, None);
        self.tighten(cx.link.fx, id.index, sock, tight);
        match ticket {
            Some(ticket) => {
                // A flow, unlike a packet, is never one too many for its ticket.
                let _attached = cx.policy.pending.attach(ticket, Held::Flow(id));
                self.wake_tcp(now, id.index);
            }
            None => {
                self.with_index(cx, id.index, |tcb, cx| tcb.start(cx));
            }
        }
        Ok(id)
    }

    /// Handles datagrams of a client that came in on a forward's socket, several of `segment` bytes each when that is not 0.
    ///
    /// # Errors
    /// Why they are dropped.
    pub fn forward_in<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        forward: ForwardId,
        sock: SockId,
        from: SocketAddr,
        payload: &[u8],
        segment: u16,
    ) -> Result<(), DropReason> {
        let mut ticket = None;
        let index = match self.clients.get(&(forward.0, from)) {
            Some(&index) => index,
            None => {
                let new = self.inbound(cx, forward, proto::UDP, from)?;
                ticket = new.ticket;
                let state = State::Forwarded { sock, forward, client: from };
                let admitted = cx.policy.generation();
                let flow =
                    Flow::new(new.key, new.mac, new.direction, admitted, cx.link.now, state).by(new.rule);
                let id = self.open_flow(cx, flow, None);
                self.clients.insert((forward.0, from), id.index);
                id.index
            }
        };
        let f = self.flows.at_mut(index).ok_or(DropReason::NoFlow)?;
        if let State::Forwarded { sock: s, .. } = &mut f.state {
            *s = sock;
        }
        let (remote, guest, slot) = (f.key.remote, f.key.guest, f.key.slot);
        if f.mac == UNKNOWN {
            match cx.link.lan.neighbour(guest.ip()).and_then(|b| b.mac) {
                Some(mac) => f.mac = mac,
                None => {
                    self.touch(cx.link.now, index);
                    let held = held_datagram(cx, slot, remote, guest, payload, segment);
                    return match (held, ticket) {
                        (Ok(held), Some(ticket)) => {
                            cx.policy.pending.attach(ticket, held).map_err(|_| DropReason::RateLimit)
                        }
                        (Ok(held), None) => cx.await_neighbour(slot, guest.ip(), held).map(drop),
                        (Err(why), ticket) => {
                            ticket.into_iter().for_each(|t| cx.policy.pending.cancel(t));
                            Err(why)
                        }
                    };
                }
            }
        }
        self.deliver_datagram(cx, index, remote, payload, segment);
        Ok(())
    }

    /// Asks whether a client may open a flow, and makes room for it.
    fn inbound<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        forward: ForwardId,
        proto: u8,
        client: SocketAddr,
    ) -> Result<Inbound, DropReason> {
        let spec = *self.forwards.get(&forward.0).filter(|s| s.proto == proto).ok_or(DropReason::NoFlow)?;
        let guest = spec.guest;
        if guest.is_ipv6() && cx.link.lan.addressing().gateway6().is_none() {
            return Err(DropReason::UnsupportedProtocol);
        }
        let binding = *cx.link.lan.neighbour(guest.ip()).ok_or(DropReason::NoEndpoint)?;
        if cx.link.lan.is_remote(binding.slot) {
            // The control side is to move the forward to the worker that has its guest.
            if let Some(mac) = binding.mac {
                let now = cx.link.now;
                cx.link.lan.report_address(now, binding.slot, mac, binding.ip, cx.link.fx);
            }
            return Err(DropReason::NoEndpoint);
        }
        let name = cx.policy.client_name(client.ip(), guest.ip());
        let key = Key { slot: binding.slot, proto, guest, remote: SocketAddr::new(name, client.port()) };
        let (ticket, rule) = match cx.inbound(spec.entry, proto, client, guest, &binding) {
            // Only flows to the outside are inspected or asked about.
            Verdict::Allow { rule, .. } | Verdict::Inspect { rule, .. } | Verdict::Ask { rule, .. } => {
                (None, rule)
            }
            Verdict::Defer { ticket } => (Some(ticket), RuleId::NONE),
            Verdict::Deny { reason, .. } => return Err(reason),
        };
        let mac = binding.mac.unwrap_or(UNKNOWN);
        let mut new = Inbound { key, mac, ticket, direction: Direction::Inbound(spec.entry), rule };
        if let Err(why) = self.admit(cx, binding.slot, false) {
            return Err(new.refused(cx, why));
        }
        match self.free_key(cx.link.now, key) {
            Some(key) => new.key = key,
            None => return Err(new.refused(cx, DropReason::FlowLimit)),
        }
        Ok(new)
    }

    /// The key itself, or one with another remote port where a live flow has it.
    fn free_key(&self, now: Time, key: Key) -> Option<Key> {
        let free = |k: &Key| k.remote.port() != 0 && self.flows.find(k).is_none();
        if free(&key) {
            return Some(key);
        }
        let seed = self.isn_key.hash(&[u64::from(key.remote.port()), u64::from(key.guest.port()), now.0]);
        (0..TRIES).find_map(|i| {
            let port = 1024_u16.saturating_add((seed.wrapping_add(i) % 64512) as u16);
            let other = Key { remote: SocketAddr::new(key.remote.ip(), port), ..key };
            free(&other).then_some(other)
        })
    }
}

/// A flow from the outside that may be opened.
struct Inbound {
    key: Key,
    /// The guest's MAC, or [`UNKNOWN`].
    mac: Mac,
    /// The flow is pending under this ticket.
    ticket: Option<Ticket>,
    direction: Direction,
    /// The rule that allows it, where it does not wait.
    rule: RuleId,
}

impl Inbound {
    /// The flow cannot be opened after all. Returns why.
    fn refused<E>(&self, cx: &mut Context<'_, E>, why: DropReason) -> DropReason {
        self.ticket.into_iter().for_each(|t| cx.policy.pending.cancel(t));
        why
    }
}

/// A datagram that waits until the guest's MAC is known. One over the MTU is dropped: the client sends again.
fn held_datagram<E: Effects>(
    cx: &Context<'_, E>,
    slot: u32,
    src: SocketAddr,
    dst: SocketAddr,
    payload: &[u8],
    segment: u16,
) -> Result<Held, DropReason> {
    if src.is_ipv4() != dst.is_ipv4() {
        return Err(DropReason::UnsupportedProtocol);
    }
    let len = payload.len().saturating_add(udp::LEN);
    let mtu = usize::from(cx.link.lan.port(slot).ok_or(DropReason::NoEndpoint)?.config.mtu);
    // The MAC is not known yet.
    let ip = IpHeader { src: src.ip(), dst: dst.ip(), proto: proto::UDP, ttl: TTL, tos: 0, id: 0, frag: 0 };
    let header = FrameHeader { dst: Mac::default(), src: cx.gateway.mac(), ip };
    if segment != 0 && payload.len() > usize::from(segment) || len > mtu.saturating_sub(ip.len()) {
        return Err(DropReason::NoEndpoint);
    }
    let mut frame = vec![0u8; header.len().saturating_add(len)];
    header.emit(&mut frame, len);
    let (_, datagram) = frame.split_at_mut(header.len());
    put(datagram, udp::LEN, payload);
    udp::emit(datagram, src.ip(), dst.ip(), src.port(), dst.port());
    Ok(Held::Frame(frame.into()))
}
