//! Theory of operation: what the gateway does as a host and as a router (RFC 1122, RFC 1812). It answers ARP
//! for its own addresses, echo at its address, and routes what is for its MAC: to a service, to a flow, to
//! another guest, outside. ICMP errors say why something cannot go on; they are limited in rate per port and
//! never answer an error, a later fragment, or anything that went to or came from a group.

use crate::interface::effects::{Effects, Event};
use crate::interface::stats::DropReason;
use crate::interface::types::{Csum, FrameMeta};
use crate::l2::switch::{largest, wire_drop};
use crate::l3::frame_builder::{Envelope, TTL};
use crate::l3::reassembly::Outcome;
use crate::network::Network;
use crate::relay::turns::NO_FLOW;
use guestnet_wire::ether::{self, Ether, Mac};
use guestnet_wire::parse::{self, Packet};
use guestnet_wire::{gso, icmp, ipv4, proto, put};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// Bytes of an ICMP error in all, IP header included (RFC 1812 4.3.2.3).
const ERROR_MAX: usize = 576;

/// An ICMP error: type, code, bytes 4 to 7.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct IcmpError(pub u8, pub u8, pub [u8; 4]);

impl IcmpError {
    pub(crate) fn unreachable(code: u8) -> IcmpError {
        IcmpError(icmp::UNREACHABLE, code, [0; 4])
    }

    pub(crate) fn too_big(mtu: u16) -> IcmpError {
        let m = mtu.to_be_bytes();
        IcmpError(icmp::UNREACHABLE, icmp::unreachable::FRAG_NEEDED, [0, 0, m[0], m[1]])
    }
}

impl Network {
    /// Whether the gateway itself answers for an address.
    #[must_use]
    pub(crate) fn is_own(&self, ip: IpAddr) -> bool {
        ip == IpAddr::V4(self.cfg.gateway4)
            || self.cfg.gateway6.is_some_and(|g| ip == IpAddr::V6(g.0))
            || self.cfg.host_loopback == Some(ip)
            || self.services.has_address(ip)
    }

    /// What is for the gateway's MAC.
    pub(crate) fn routed<E: Effects>(
        &mut self,
        slot: u32,
        mac: Mac,
        frame: &mut [u8],
        p: &Packet,
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        if self.is_tunneled(slot, frame, p, fx) {
            return self.tunnel_out(slot, mac, frame, p, meta, fx);
        }
        if let Some(f) = p.fragment {
            if self.route_to_guest(slot, mac, frame, p, meta, fx)? {
                return Ok(());
            }
            let outcome = self.reassembly.add(self.now, slot, frame, p, f);
            while let Some(loser) = self.reassembly.evicted.pop() {
                self.drop_at(loser, DropReason::Reassembly);
            }
            let Outcome::Complete(mut whole) = outcome else {
                return if outcome == Outcome::Held { Ok(()) } else { Err(DropReason::Reassembly) };
            };
            let p = parse::parse_ip(&whole, ether::HEADER_LEN).map_err(wire_drop)?;
            if p.fragment.is_some() {
                return Err(DropReason::Malformed);
            }
            return self.routed(slot, mac, &mut whole, &p, FrameMeta::default(), fx);
        }
        self.verify(slot, frame, p, meta)?;
        if p.proto != proto::TCP {
            self.turns.active(self.now, NO_FLOW);
        }
        match p.proto {
            proto::TCP => self.tcp_out(slot, mac, frame, p, meta, fx),
            proto::UDP => self.udp_out(slot, mac, frame, p, meta, fx),
            proto::ICMP => self.icmp_out(slot, mac, frame, p, meta, fx),
            _ => {
                self.transit(slot, mac, frame, p, meta, fx)?;
                let e = IcmpError::unreachable(icmp::unreachable::PROTOCOL);
                self.refuse(slot, mac, frame, p, DropReason::UnsupportedProtocol, e, fx)
            }
        }
    }

    /// Routes a packet on to another guest of the subnet; `Err` with [`DropReason::NoEndpoint`] tells that there is
    /// none, `Ok(true)` that it went, `Ok(false)` that it is not for a guest.
    pub(crate) fn route_to_guest<E: Effects>(
        &mut self,
        slot: u32,
        mac: Mac,
        frame: &mut [u8],
        p: &Packet,
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<bool, DropReason> {
        if !self.policy.is_host(p.dst) || self.is_own(p.dst) {
            return Ok(false);
        }
        self.check_ttl(slot, mac, frame, p, fx)?;
        let Some((to, dst)) = self.neighbours.get(p.dst).and_then(|b| Some((b.slot, b.mac?))) else {
            let e = IcmpError::unreachable(icmp::unreachable::HOST);
            self.refuse(slot, mac, frame, p, DropReason::NoEndpoint, e, fx)?;
            return Ok(true);
        };
        let Some(mtu) = self.ports.get(to).map(|t| t.config.mtu) else { return Err(DropReason::NoEndpoint) };
        let meta = self.passable(slot, frame, p, meta);
        let too_big = largest(p, meta) > usize::from(mtu);
        if too_big && (p.dont_fragment || meta.gso.is_some()) {
            self.refuse(slot, mac, frame, p, DropReason::Oversized, IcmpError::too_big(mtu), fx)?;
            return Ok(true);
        }
        Ether { dst, src: self.cfg.gateway_mac, ethertype: ether::IPV4 }.emit(frame);
        put(frame, p.l3 + 8, &[p.ttl - 1]);
        if let Some(b) = frame.get_mut(p.l3..) {
            ipv4::fill_checksum(b);
        }
        if too_big {
            return self.deliver_fragments(to, frame, p, meta, usize::from(mtu), fx).map(|()| true);
        }
        self.deliver(to, frame, meta, fx);
        Ok(true)
    }

    /// Cuts a packet for a port with a smaller MTU (RFC 791 3.2).
    fn deliver_fragments<E: Effects>(
        &mut self,
        to: u32,
        frame: &mut [u8],
        p: &Packet,
        meta: FrameMeta,
        mtu: usize,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        if let Csum::Partial { start, offset } = meta.csum {
            gso::complete_checksum(frame, start, offset).map_err(wire_drop)?;
        }
        let mut piece = std::mem::take(&mut self.piece);
        let packet = frame.get(p.l3..p.end).unwrap_or(&[]);
        let done = ipv4::fragments(packet, mtu, |header, data| {
            piece.clear();
            piece.extend_from_slice(frame.get(..p.l3).unwrap_or(&[]));
            piece.extend_from_slice(header);
            piece.extend_from_slice(data);
            self.deliver(to, &piece, FrameMeta::default(), fx);
        });
        self.piece = piece;
        if done { Ok(()) } else { Err(DropReason::Oversized) }
    }

    /// What neither flow nor service takes: another guest, or the reason why it goes nowhere.
    fn transit<E: Effects>(
        &mut self,
        slot: u32,
        mac: Mac,
        frame: &mut [u8],
        p: &Packet,
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        if !self.is_own(p.dst) && !self.route_to_guest(slot, mac, frame, p, meta, fx)? {
            self.policy.outbound(p.proto, SocketAddr::new(p.dst, 0))?;
        }
        Ok(())
    }

    /// TTL for the next hop (RFC 1812 5.3.1).
    pub(crate) fn check_ttl<E: Effects>(
        &mut self,
        slot: u32,
        mac: Mac,
        frame: &[u8],
        p: &Packet,
        fx: &mut E,
    ) -> Result<u8, DropReason> {
        if p.ttl <= 1 && !self.is_own(p.dst) {
            self.icmp_error(slot, mac, frame, p, IcmpError(icmp::TIME_EXCEEDED, 0, [0; 4]), fx);
            return Err(DropReason::TtlExpired);
        }
        Ok(p.ttl.saturating_sub(1).max(1))
    }

    /// Refuses a packet that would have opened something: an ICMP error to the guest and an event, both
    /// within the port's rate.
    #[allow(clippy::too_many_arguments)] // What is refused, why, and how that is told.
    pub(crate) fn refuse<E: Effects>(
        &mut self,
        slot: u32,
        mac: Mac,
        frame: &[u8],
        p: &Packet,
        why: DropReason,
        error: IcmpError,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        if self.icmp_error(slot, mac, frame, p, error, fx) {
            let guest = SocketAddr::new(p.src, p.src_port);
            self.denied(slot, p.proto, guest, SocketAddr::new(p.dst, p.dst_port), why, fx);
        }
        Err(why)
    }

    /// Tells the control side of a refusal.
    pub(crate) fn denied<E: Effects>(
        &mut self,
        slot: u32,
        proto: u8,
        guest: SocketAddr,
        remote: SocketAddr,
        reason: DropReason,
        fx: &mut E,
    ) {
        if let Some(port) = self.ports.get(slot).map(|p| p.id) {
            fx.event(Event::Denied { port, proto, guest, remote, reason });
        }
    }

    /// Sends an ICMP error that quotes the guest's packet; false when the rate or RFC 1812 4.3.2.7 forbids.
    pub(crate) fn icmp_error<E: Effects>(
        &mut self,
        slot: u32,
        mac: Mac,
        frame: &[u8],
        p: &Packet,
        error: IcmpError,
        fx: &mut E,
    ) -> bool {
        let kind = frame.get(p.l4).copied().unwrap_or(0);
        let silent = p.proto == proto::ICMP && icmp::is_error(kind)
            || p.fragment.is_some_and(|f| f.offset != 0)
            || p.dst.is_multicast()
            || self.policy.is_broadcast(p.dst)
            || !self.policy.is_host(p.src);
        let (IpAddr::V4(guest), false) = (p.src, silent) else { return false };
        let quote = frame.get(p.l3..p.end.min(p.l3 + ERROR_MAX - 28)).unwrap_or(&[]);
        self.send_error(slot, mac, self.cfg.gateway4, guest, quote, error, fx)
    }

    /// Sends an ICMP error with a ready quotation, as if from `src`; false when the rate forbids.
    #[allow(clippy::too_many_arguments)] // The fields of the message.
    pub(crate) fn send_error<E: Effects>(
        &mut self,
        slot: u32,
        mac: Mac,
        src: Ipv4Addr,
        dst: Ipv4Addr,
        quote: &[u8],
        error: IcmpError,
        fx: &mut E,
    ) -> bool {
        let now = self.now;
        let Some(port) = self.ports.get_mut(slot) else { return false };
        if !port.icmp.allow(now) {
            port.counters.drop(DropReason::RateLimit);
            return false;
        }
        port.counters.icmp_errors += 1;
        let room = usize::from(port.config.mtu).min(ERROR_MAX).saturating_sub(28);
        let quote = quote.get(..quote.len().min(room)).unwrap_or(quote);
        let Ok(b) = self.l4_buffer(icmp::LEN + quote.len()) else { return false };
        let n = icmp::emit(b, error.0, error.1, error.2, quote);
        let e = Envelope { mac, src, dst, proto: proto::ICMP, ttl: TTL, tos: 0xc0 };
        if let Err(why) = self.send_ipv4(slot, &e, n, FrameMeta::default(), fx) {
            self.drop_at(slot, why);
        }
        true
    }

    /// ICMP of a guest: echo to the gateway is answered here, the rest is in `relay::icmp`.
    fn icmp_out<E: Effects>(
        &mut self,
        slot: u32,
        mac: Mac,
        frame: &mut [u8],
        p: &Packet,
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let (kind, code) = match frame.get(p.l4..p.l4 + 2) {
            Some(&[kind, code]) => (kind, code),
            _ => return Err(DropReason::Truncated),
        };
        if icmp::is_error(kind) && (self.is_own(p.dst) || !self.policy.in_subnet(p.dst)) {
            return self.guest_error(slot, frame, p, fx);
        }
        if !self.is_own(p.dst) && self.route_to_guest(slot, mac, frame, p, meta, fx)? {
            return Ok(());
        }
        if kind != icmp::ECHO || code != 0 {
            return Err(DropReason::UnsupportedProtocol);
        }
        if p.dst != IpAddr::V4(self.cfg.gateway4) {
            return self.echo_out(slot, mac, frame, p, fx);
        }
        let IpAddr::V4(guest) = p.src else { return Err(DropReason::UnsupportedProtocol) };
        let body = frame.get(p.payload..p.end).unwrap_or(&[]);
        let rest = match frame.get(p.l4 + 4..p.l4 + 8) {
            Some(&[a, b, c, d]) => [a, b, c, d],
            _ => return Err(DropReason::Truncated),
        };
        let src = self.cfg.gateway4;
        let n = icmp::emit(self.l4_buffer(icmp::LEN + body.len())?, icmp::ECHO_REPLY, 0, rest, body);
        let e = Envelope { mac, src, dst: guest, proto: proto::ICMP, ttl: TTL, tos: p.tos };
        self.send_ipv4(slot, &e, n, FrameMeta::default(), fx)
    }

    /// Tells guests whose datagrams ran out of time in reassembly (RFC 1122 3.3.2).
    pub(crate) fn reassembly_timers<E: Effects>(&mut self, fx: &mut E) {
        while let Some(old) = self.reassembly.expire(self.now) {
            self.drop_at(old.slot, DropReason::Reassembly);
            let Some(first) = old.first else { continue };
            if let (Ok(p), Ok(eth)) = (parse::parse_ip(&first, ether::HEADER_LEN), Ether::parse(&first)) {
                let e = IcmpError(icmp::TIME_EXCEEDED, 1, [0; 4]);
                self.icmp_error(old.slot, eth.src, &first, &p, e, fx);
            }
        }
    }
}
