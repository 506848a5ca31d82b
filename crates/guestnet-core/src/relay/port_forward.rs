//! Theory of operation: published ports.
//!
//! - What comes from outside becomes a flow whose remote side is the client's own address and port, so the guest sees its
//!   peer. A client on loopback or inside the subnet appears as the gateway. A pair that a live flow has already gets
//!   another port.
//! - While the MAC of the guest is not known, the flow waits for ARP; so do a few datagrams.
//! - A guest on another worker cannot be reached from here: the control side is told, and moves the forward.

use crate::context::Context;
use crate::interface::effects::Effects;
use crate::interface::stats::DropReason;
use crate::interface::types::{FlowId, ForwardId, SockId, Time};
use crate::l2::lan::Link;
use crate::l3::frame_builder::TTL;
use crate::relay::Relay;
use crate::relay::tcp::Tcb;
use crate::tables::flow::{Flow, Key, State};
use crate::tables::neighbour::Binding;
use guestnet_wire::ether::Mac;
use guestnet_wire::frame::{FrameHeader, IpHeader};
use guestnet_wire::{proto, put, udp};
use std::net::SocketAddr;

/// Other ports that are tried for a client whose own is taken.
const TRIES: u64 = 64;

/// The MAC of flows whose guest has not been found; never sent to.
const UNKNOWN: Mac = Mac::BROADCAST;

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
        let (key, binding) = self.inbound(cx, forward, proto::TCP, peer)?;
        self.admit_memory(key.slot)?;
        let now = cx.link.now;
        let id = self.flows.next_id();
        let mut tcb = Tcb::inbound(id, sock, self.isn(now, &key), self.tcp_timeouts(), now);
        if binding.mac.is_none() {
            tcb.hold(now);
            // Before the flow exists, so that a full queue leaves nothing to undo.
            cx.link.lan.wait_flow(now, key.slot, key.guest.ip(), id, cx.link.fx)?;
        }
        let mac = binding.mac.unwrap_or(UNKNOWN);
        let tight = self.holds_too_much(key.slot);
        let flow = Flow::new(key, mac, true, now, State::Tcp(Box::new(tcb)));
        let id = self.open_flow(&mut cx.link, flow);
        self.tighten(cx.link.fx, id.index, sock, tight);
        if binding.mac.is_some() {
            self.with_index(cx, id.index, |tcb, cx| tcb.start(cx));
        } else {
            self.wake_tcp(now, id.index);
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
        let index = match self.clients.get(&(forward.0, from)) {
            Some(&index) => index,
            None => {
                let (key, binding) = self.inbound(cx, forward, proto::UDP, from)?;
                let mac = binding.mac.unwrap_or(UNKNOWN);
                let state = State::Forwarded { sock, forward, client: from };
                let flow = Flow::new(key, mac, true, cx.link.now, state);
                let id = self.open_flow(&mut cx.link, flow);
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
                    return hold_datagram(
                        &mut cx.link,
                        cx.gateway.mac(),
                        slot,
                        remote,
                        guest,
                        payload,
                        segment,
                    );
                }
            }
        }
        self.deliver_datagram(cx, index, remote, payload, segment);
        Ok(())
    }

    /// The key of a new inbound flow and the guest's binding, once it is admitted.
    fn inbound<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        forward: ForwardId,
        proto: u8,
        client: SocketAddr,
    ) -> Result<(Key, Binding), DropReason> {
        let spec = self.forwards.get(&forward.0).filter(|s| s.proto == proto).ok_or(DropReason::NoFlow)?;
        let guest = spec.guest;
        if !guest.is_ipv4() {
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
        self.admit(&mut cx.link, binding.slot, false)?;
        let name = cx.policy.client_name(client.ip());
        let key = Key { slot: binding.slot, proto, guest, remote: SocketAddr::new(name, client.port()) };
        Ok((self.free_key(cx.link.now, key).ok_or(DropReason::FlowLimit)?, binding))
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

/// Keeps a datagram until the guest's MAC is known. One over the MTU is dropped: the client sends again.
fn hold_datagram<E: Effects>(
    link: &mut Link<'_, E>,
    gateway: Mac,
    slot: u32,
    src: SocketAddr,
    dst: SocketAddr,
    payload: &[u8],
    segment: u16,
) -> Result<(), DropReason> {
    if src.is_ipv4() != dst.is_ipv4() {
        return Err(DropReason::UnsupportedProtocol);
    }
    let len = payload.len().saturating_add(udp::LEN);
    let mtu = usize::from(link.lan.port(slot).ok_or(DropReason::NoEndpoint)?.config.mtu);
    // The MAC is not known yet.
    let ip = IpHeader { src: src.ip(), dst: dst.ip(), proto: proto::UDP, ttl: TTL, tos: 0, id: 0, frag: 0 };
    let header = FrameHeader { dst: Mac::default(), src: gateway, ip };
    if segment != 0 && payload.len() > usize::from(segment) || len > mtu.saturating_sub(ip.len()) {
        return Err(DropReason::NoEndpoint);
    }
    let mut frame = vec![0u8; header.len().saturating_add(len)];
    header.emit(&mut frame, len);
    let (_, datagram) = frame.split_at_mut(header.len());
    put(datagram, udp::LEN, payload);
    udp::emit(datagram, src.ip(), dst.ip(), src.port(), dst.port());
    link.lan.wait_frame(link.now, slot, dst.ip(), &frame, link.fx)
}
