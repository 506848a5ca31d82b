//! Theory of operation: the ICMP relay (RFC 5508). A guest's echo identifier is mapped like a UDP port: one
//! ping socket for all destinations, one flow for each. Errors that the kernel reports for what a guest sent
//! become ICMP errors that quote the guest's own packet, with whoever complained as their source, so
//! traceroute and path MTU discovery work; they neither refresh nor end a flow (REQ-6). Errors that a guest
//! sends about its flows are checked and accepted: a socket has no way to pass them on, but a smaller MTU
//! behind the guest makes the segments of its connection smaller.

use crate::interface::config::DatagramError;
use crate::interface::effects::Effects;
use crate::interface::stats::DropReason;
use crate::interface::types::{FlowId, FrameMeta};
use crate::l3::frame_builder::{Envelope, TTL};
use crate::l3::gateway::IcmpError;
use crate::network::Network;
use crate::relay::udp::{Refused, Way, icmp_for, plateau, v4};
use crate::tables::flow::{Key, State};
use guestnet_wire::ether::Mac;
use guestnet_wire::ipv4::{self, Ipv4};
use guestnet_wire::parse::Packet;
use guestnet_wire::{be16, checksum, icmp, proto, put, udp};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Payload that an error quotes at most: 576 bytes less both pairs of headers.
const QUOTED: usize = 576 - 28 - 28;

impl Network {
    /// An echo request of a guest to somewhere else than the gateway.
    pub(crate) fn echo_out<E: Effects>(
        &mut self,
        slot: u32,
        mac: Mac,
        frame: &[u8],
        p: &Packet,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        // Before the table is asked: all zeros is how it files a mapping.
        if p.dst.is_unspecified() {
            return Err(DropReason::BadDestination);
        }
        let remote = SocketAddr::new(p.dst, 0);
        let key = Key { slot, proto: proto::ICMP, guest: SocketAddr::new(p.src, p.src_port), remote };
        let index = match self.flows.find(&key) {
            Some(index) => index,
            None => {
                let target = self.outbound(slot, mac, frame, p, remote, fx)?;
                match self.open_datagram(key, mac, target, fx) {
                    Ok(index) => index,
                    Err(Refused(why, e)) => return self.refuse(slot, mac, frame, p, why, e, fx),
                }
            }
        };
        let ttl = self.check_ttl(slot, mac, frame, p, fx)?;
        let body = frame.get(p.payload..p.end).unwrap_or(&[]);
        let Some(Way::Mapping(mapping, target)) =
            self.note_out(index, mac, be16(frame, p.l3 + 4), body.len())
        else {
            return Err(DropReason::NoFlow);
        };
        let Some(State::Mapping { sock, .. }) = self.flows.at(mapping).map(|m| &m.state) else {
            return Err(DropReason::NoFlow);
        };
        let seq = be16(frame, p.l4 + 6);
        let sent = fx.ping_send(*sock, target.ip(), seq, body, ttl, p.dont_fragment);
        self.touch(index);
        sent.map_err(|e| {
            self.icmp_error(slot, mac, frame, p, icmp_for(e, p.end - p.l3), fx);
            DropReason::HostError
        })
    }

    /// An echo reply for a guest.
    pub(crate) fn echo_in<E: Effects>(
        &mut self,
        id: FlowId,
        from: IpAddr,
        seq: u16,
        ttl: u8,
        body: &[u8],
        fx: &mut E,
    ) {
        let slot = self.flows.get_mut(id).map(|f| f.key.slot);
        let done = self.echo_to_guest(id, from, seq, ttl, body, fx);
        if let Err(why) = done {
            match slot {
                Some(slot) => self.drop_at(slot, why),
                None => self.base.drop(why),
            }
        }
    }

    fn echo_to_guest<E: Effects>(
        &mut self,
        id: FlowId,
        from: IpAddr,
        seq: u16,
        ttl: u8,
        body: &[u8],
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let (index, remote) = self.admit_inbound(id, SocketAddr::new(from, 0))?;
        let f = self.flows.at_mut(index).ok_or(DropReason::NoFlow)?;
        f.bytes_in += body.len() as u64;
        f.packets_in = f.packets_in.saturating_add(1);
        let (slot, mac, guest) = (f.key.slot, f.mac, f.key.guest);
        self.touch(index);
        let (Some(src), Some(dst)) = (v4(remote.ip()), v4(guest.ip())) else {
            return Err(DropReason::UnsupportedProtocol);
        };
        let (i, s) = (guest.port().to_be_bytes(), seq.to_be_bytes());
        let b = self.l4_buffer(icmp::LEN + body.len())?;
        let n = icmp::emit(b, icmp::ECHO_REPLY, 0, [i[0], i[1], s[0], s[1]], body);
        let ttl = if ttl == 0 { TTL } else { ttl.saturating_sub(1).max(1) };
        let e = Envelope { mac, src, dst, proto: proto::ICMP, ttl, tos: 0 };
        self.send_ipv4(slot, &e, n, FrameMeta::default(), fx)
    }

    /// An error of the kernel about something that a guest sent: an ICMP error to the guest.
    pub(crate) fn relay_error<E: Effects>(&mut self, id: FlowId, err: &DatagramError<'_>, fx: &mut E) {
        let Some(key) = self.flows.get_mut(id).map(|f| f.key) else {
            self.base.drop(DropReason::NoFlow);
            return;
        };
        if key.proto == proto::TCP {
            return self.connect_error(id, err, fx);
        }
        let name = self.policy.name_of(err.dst.ip().to_canonical());
        let port = if key.proto == proto::UDP { err.dst.port() } else { 0 };
        let flow = name.and_then(|ip| self.flows.find(&Key { remote: SocketAddr::new(ip, port), ..key }));
        let Some(f) = flow.and_then(|i| self.flows.at(i)) else {
            self.drop_at(key.slot, DropReason::NoFlow);
            return;
        };
        let State::Datagram { ip_id, .. } = f.state else { return };
        let mut quote = [0u8; 28 + QUOTED];
        let payload = err.payload.get(..err.payload.len().min(QUOTED)).unwrap_or(err.payload);
        let (key, mac) = (f.key, f.mac);
        let Some(n) = requote(&mut quote, &key, ip_id, err, payload) else { return };
        let error = match error_to_tell(err, n) {
            Ok(error) => error,
            Err(why) => return self.drop_at(key.slot, why),
        };
        let offender = err.offender.and_then(|o| v4(self.policy.name_of(o.to_canonical())?));
        let src = offender.unwrap_or(self.cfg.gateway4);
        let Some(guest) = v4(key.guest.ip()) else { return };
        self.send_error(key.slot, mac, src, guest, quote.get(..n).unwrap_or(&[]), error, fx);
    }

    /// An ICMP error of a guest about a packet that it got from us.
    pub(crate) fn guest_error<E: Effects>(
        &mut self,
        slot: u32,
        frame: &[u8],
        p: &Packet,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let quote = frame.get(p.payload..p.end).unwrap_or(&[]);
        let ihl = usize::from(quote.first().copied().unwrap_or(0) & 0xf) * 4;
        if quote.first().is_none_or(|b| b >> 4 != 4) || ihl < ipv4::MIN_LEN {
            return Err(DropReason::Malformed);
        }
        let Some(header) = quote.get(..ihl).filter(|_| quote.len() >= ihl + 8) else {
            return Err(DropReason::Truncated);
        };
        // RFC 5508 REQ-3a; 3c: the transport checksum is not looked at.
        if checksum::fold(checksum::sum(header, 0)) != 0xffff {
            return Err(DropReason::BadIpChecksum);
        }
        let ip = |at: usize| {
            let a = guestnet_wire::be32(header, at);
            IpAddr::V4(Ipv4Addr::from(a))
        };
        let proto = header.get(9).copied().unwrap_or(0);
        let (from, to) = (be16(quote, ihl), be16(quote, ihl + 2));
        let (guest, remote) = match proto {
            proto::ICMP => (be16(quote, ihl + 4), 0),
            _ => (to, from),
        };
        let key = Key {
            slot,
            proto,
            guest: SocketAddr::new(ip(16), guest),
            remote: SocketAddr::new(ip(12), remote),
        };
        let index = self.flows.find(&key).ok_or(DropReason::NoFlow)?;
        let too_big = frame.get(p.l4..p.l4 + 2) == Some(&[icmp::UNREACHABLE, icmp::unreachable::FRAG_NEEDED]);
        if too_big && !icmp::is_path_mtu(be16(frame, p.l4 + 6)) {
            return Err(DropReason::Malformed);
        }
        if proto == proto::TCP && too_big {
            let mtu = match be16(frame, p.l4 + 6) {
                0 => plateau(usize::from(be16(quote, 2))),
                mtu => mtu,
            };
            let seq = guestnet_wire::be32(quote, ihl + 4);
            self.with_index(index, fx, |tcb, cx| tcb.path_mtu(cx, mtu, seq));
        }
        Ok(())
    }
}

/// What an ICMP or ICMPv6 error says that it is about: the destination of the packet that it quotes. `Ok(None)`
/// for what is no error.
///
/// # Errors
/// [`DropReason::Policy`] for an error in fragments, which cannot be checked (none is over 1280 bytes), and
/// [`DropReason::Malformed`] for one without a quote or with an MTU that no link has.
pub(crate) fn quoted_destination(frame: &[u8], p: &Packet) -> Result<Option<IpAddr>, DropReason> {
    let (kind, code) = match frame.get(p.l4..p.l4 + 2) {
        Some(&[kind, code]) => (kind, code),
        _ => return Ok(None),
    };
    let is_error = match p.proto {
        proto::ICMP => icmp::is_error(kind),
        // RFC 4443 2.1: errors have the highest bit clear.
        proto::ICMPV6 => kind < 128,
        _ => false,
    };
    match p.fragment {
        _ if !is_error => return Ok(None),
        Some(f) if f.offset == 0 => return Err(DropReason::Policy),
        Some(_) => return Ok(None),
        None => {}
    }
    let quote = frame.get(p.payload..p.end).unwrap_or(&[]);
    if p.src.is_ipv6() {
        let to =
            quote.get(24..40).and_then(|to| <[u8; 16]>::try_from(to).ok()).ok_or(DropReason::Malformed)?;
        return Ok(Some(IpAddr::V6(Ipv6Addr::from(to))));
    }
    let too_big = (kind, code) == (icmp::UNREACHABLE, icmp::unreachable::FRAG_NEEDED);
    if quote.len() < ipv4::MIN_LEN || too_big && !icmp::is_path_mtu(be16(frame, p.l4 + 6)) {
        return Err(DropReason::Malformed);
    }
    Ok(Some(IpAddr::V4(Ipv4Addr::from(guestnet_wire::be32(quote, 16)))))
}

impl Network {
    /// A guest tells others only of packets that it got itself: what it says of others' connections would end or
    /// slow them.
    pub(crate) fn check_error(&self, slot: u32, frame: &[u8], p: &Packet) -> Result<(), DropReason> {
        match quoted_destination(frame, p)? {
            None => Ok(()),
            Some(about) if about == p.src => Ok(()),
            // RFC 4443 2.4 (e): one may also be about a packet to a group.
            Some(about @ IpAddr::V6(_)) if about.is_multicast() => Ok(()),
            Some(about) if self.neighbours.get(about).is_some_and(|b| b.slot == slot) => Ok(()),
            Some(_) => Err(DropReason::SpoofedSource),
        }
    }
}

/// Lays the guest's packet at the front of `b` as it was, as far as that is known; returns its length.
fn requote(b: &mut [u8], key: &Key, id: u16, err: &DatagramError<'_>, payload: &[u8]) -> Option<usize> {
    let (src, dst) = (v4(key.guest.ip())?, v4(key.remote.ip())?);
    let len = udp::LEN + payload.len();
    // The full length, though only a part may be quoted.
    let whole = (udp::LEN + err.payload.len()).min(65515) as u16;
    Ipv4 { src, dst, proto: key.proto, ttl: 1, tos: 0, id, frag: 0, payload_len: whole }.emit(b);
    let l4 = b.get_mut(ipv4::MIN_LEN..ipv4::MIN_LEN + len)?;
    if key.proto == proto::UDP {
        put(l4, udp::LEN, payload);
        udp::emit(l4, key.guest.ip(), key.remote.ip(), key.guest.port(), key.remote.port());
        put(l4, 4, &whole.to_be_bytes());
    } else {
        let (i, s) = (key.guest.port().to_be_bytes(), err.seq.to_be_bytes());
        icmp::emit(l4, icmp::ECHO, 0, [i[0], i[1], s[0], s[1]], payload);
    }
    Some(ipv4::MIN_LEN + len)
}

/// The error as it came from the network, or what the kernel's own word for it means. The kernel passes on what
/// a message says without a look at it, and anybody may have sent that.
pub(crate) fn error_to_tell(err: &DatagramError<'_>, quoted: usize) -> Result<IcmpError, DropReason> {
    match (err.icmp_type, err.icmp_code) {
        (0, _) => Ok(icmp_for(err.kind, quoted.max(28 + err.payload.len()))),
        (icmp::UNREACHABLE, icmp::unreachable::FRAG_NEEDED) => {
            let told = match (err.mtu, err.kind) {
                (0, crate::interface::effects::SockError::MessageTooBig(m)) => m,
                (m, _) => m,
            };
            match told {
                0 => Ok(IcmpError::too_big(plateau(28 + err.payload.len()))),
                told if icmp::is_path_mtu(told) => Ok(IcmpError::too_big(told)),
                _ => Err(DropReason::Malformed),
            }
        }
        (kind @ (icmp::UNREACHABLE | icmp::TIME_EXCEEDED | icmp::PARAMETER_PROBLEM), code) => {
            Ok(IcmpError(kind, code, [0; 4]))
        }
        // Source quench and redirects are not for guests (RFC 6633, RFC 1122 3.2.2.2).
        _ => Err(DropReason::UnsupportedProtocol),
    }
}
