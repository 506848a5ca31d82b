//! Theory of operation: published ports. What comes from outside becomes a flow whose remote side is the
//! client's own address and port, so the guest sees who it talks to; a client on loopback or inside the
//! subnet appears as the gateway, and a pair that a live flow has already gets another port. A guest whose
//! MAC is not known yet is asked by ARP while the flow (or a few datagrams) waits.

use crate::interface::effects::{Effects, Event};
use crate::interface::stats::DropReason;
use crate::interface::types::{FlowId, ForwardId, SockId};
use crate::network::Network;
use crate::relay::tcp::Tcb;
use crate::tables::flow::{Flow, Key, State};
use crate::tables::neighbour::Binding;
use guestnet_wire::ether::{self, Mac};
use guestnet_wire::ipv4::Ipv4;
use guestnet_wire::{proto, put, udp};
use std::net::{IpAddr, SocketAddr};

/// Other ports that are tried for a client whose own is taken.
const TRIES: u64 = 64;

/// The MAC of flows whose guest has not been found; never sent to.
const UNKNOWN: Mac = Mac::BROADCAST;

impl Network {
    /// A client connected to a Forward's listening socket.
    pub(crate) fn accept_tcp<E: Effects>(
        &mut self,
        forward: ForwardId,
        sock: SockId,
        peer: SocketAddr,
        fx: &mut E,
    ) -> Result<FlowId, DropReason> {
        let (key, binding) = self.inbound(forward, proto::TCP, peer, fx)?;
        self.admit_memory(key.slot)?;
        let id = self.flows.next_id();
        let mut tcb = Tcb::inbound(id, sock, self.isn(&key), self.tcp_timeouts(), self.now);
        if binding.mac.is_none() {
            tcb.hold(self.now);
        }
        let mac = binding.mac.unwrap_or(UNKNOWN);
        if binding.mac.is_none() {
            // Before the flow exists, so that a full queue leaves nothing to undo.
            let new = self
                .neighbours
                .wait_flow(self.now, key.slot, key.guest.ip(), id)
                .map_err(|()| DropReason::RateLimit)?;
            if new {
                self.ask(key.slot, key.guest.ip(), fx);
            }
        }
        let tight = self.holds_too_much(key.slot);
        let id = self.open_flow(Flow::new(key, mac, true, self.now, State::Tcp(Box::new(tcb))), fx);
        self.tighten(id.index, sock, tight, fx);
        if binding.mac.is_some() {
            self.with_index(id.index, fx, |tcb, cx| tcb.start(cx));
        } else {
            self.wake_tcp(id.index);
        }
        Ok(id)
    }

    /// Datagrams of a client on a Forward's socket.
    pub(crate) fn forward_in<E: Effects>(
        &mut self,
        forward: ForwardId,
        sock: SockId,
        from: SocketAddr,
        payload: &[u8],
        segment: u16,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let index = match self.clients.get(&(forward.0, from)) {
            Some(&index) => index,
            None => {
                let (key, binding) = self.inbound(forward, proto::UDP, from, fx)?;
                let mac = binding.mac.unwrap_or(UNKNOWN);
                let state = State::Forwarded { sock, forward, client: from };
                let id = self.open_flow(Flow::new(key, mac, true, self.now, state), fx);
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
            match self.neighbours.get(guest.ip()).and_then(|b| b.mac) {
                Some(mac) => f.mac = mac,
                None => {
                    self.touch(index);
                    return self.hold_datagram(slot, remote, guest, payload, segment, fx);
                }
            }
        }
        self.deliver_datagram(index, remote, payload, segment, fx);
        Ok(())
    }

    /// The key of a new inbound flow and the guest's binding, once it is admitted.
    fn inbound<E: Effects>(
        &mut self,
        forward: ForwardId,
        proto: u8,
        client: SocketAddr,
        fx: &mut E,
    ) -> Result<(Key, Binding), DropReason> {
        let spec = self.forwards.get(&forward.0).filter(|s| s.proto == proto).ok_or(DropReason::NoFlow)?;
        let guest = spec.guest;
        if !guest.is_ipv4() {
            return Err(DropReason::UnsupportedProtocol);
        }
        let binding = *self.neighbours.get(guest.ip()).ok_or(DropReason::NoEndpoint)?;
        if self.is_remote(binding.slot) {
            self.lives_elsewhere(&binding, fx);
            return Err(DropReason::NoEndpoint);
        }
        self.admit(binding.slot, false, fx)?;
        let name = self.policy.client_name(client.ip());
        let key = Key { slot: binding.slot, proto, guest, remote: SocketAddr::new(name, client.port()) };
        Ok((self.free_key(key).ok_or(DropReason::FlowLimit)?, binding))
    }

    /// The control side is to lead a Forward to the worker that has its guest.
    fn lives_elsewhere<E: Effects>(&mut self, b: &Binding, fx: &mut E) {
        let now = self.now;
        if let Some(p) = self.ports.get_mut(b.slot)
            && let Some(mac) = b.mac
            && p.news.allow(now)
        {
            fx.event(Event::AddressSeen { port: p.id, mac, address: b.ip });
        }
    }

    /// The key itself, or one with another remote port where a live flow has it.
    fn free_key(&self, key: Key) -> Option<Key> {
        let free = |k: &Key| k.remote.port() != 0 && self.flows.find(k).is_none();
        if free(&key) {
            return Some(key);
        }
        let seed =
            self.isn_key.hash(&[u64::from(key.remote.port()), u64::from(key.guest.port()), self.now.0]);
        (0..TRIES).find_map(|i| {
            let port = 1024 + ((seed.wrapping_add(i)) % 64512) as u16;
            let other = Key { remote: SocketAddr::new(key.remote.ip(), port), ..key };
            free(&other).then_some(other)
        })
    }

    /// Keeps a datagram until the guest's MAC is known. Larger ones are dropped: the client sends again.
    fn hold_datagram<E: Effects>(
        &mut self,
        slot: u32,
        src: SocketAddr,
        dst: SocketAddr,
        payload: &[u8],
        segment: u16,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let (IpAddr::V4(src4), IpAddr::V4(dst4)) = (src.ip(), dst.ip()) else {
            return Err(DropReason::UnsupportedProtocol);
        };
        let len = udp::LEN + payload.len();
        let mtu = self.ports.get(slot).ok_or(DropReason::NoEndpoint)?.config.mtu;
        if segment != 0 && payload.len() > usize::from(segment) || 20 + len > usize::from(mtu) {
            return Err(DropReason::NoEndpoint);
        }
        let mut frame = vec![0u8; ether::HEADER_LEN + 20 + len];
        put(&mut frame, 6, &self.cfg.gateway_mac.0);
        put(&mut frame, 12, &ether::IPV4.to_be_bytes());
        let (_, packet) = frame.split_at_mut(ether::HEADER_LEN);
        Ipv4 {
            src: src4,
            dst: dst4,
            proto: proto::UDP,
            ttl: crate::l3::frame_builder::TTL,
            tos: 0,
            id: 0,
            frag: 0,
            payload_len: len as u16,
        }
        .emit(packet);
        let (_, datagram) = packet.split_at_mut(20);
        put(datagram, udp::LEN, payload);
        udp::emit(datagram, src.ip(), dst.ip(), src.port(), dst.port());
        let waits = self.neighbours.wait_frame(self.now, slot, dst.ip(), &frame);
        if waits.map_err(|()| DropReason::RateLimit)? {
            self.ask(slot, dst.ip(), fx);
        }
        Ok(())
    }
}
