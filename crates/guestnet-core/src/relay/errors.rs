//! Theory of operation: errors that flows cause.
//!
//! - Errors that the kernel reports for what a guest sent become ICMP errors that quote the guest's own packet, with the
//!   router that reported them as their source. So traceroute and path MTU discovery work. They neither refresh nor end a
//!   flow (RFC 5508 REQ-6).
//! - ICMP errors that a guest sends about its flows are checked and accepted. A socket has no way to pass them on, but a
//!   smaller MTU behind the guest makes the segments of its connection smaller.

use crate::context::Context;
use crate::interface::config::DatagramError;
use crate::interface::effects::{Effects, SockError};
use crate::interface::stats::DropReason;
use crate::interface::types::FlowId;
use crate::l2::lan::Sender;
use crate::l3::icmp_error::IcmpError;
use crate::relay::Relay;
use crate::tables::flow::{Key, State};
use guestnet_wire::ether::Mac;
use guestnet_wire::frame::IpHeader;
use guestnet_wire::parse::Packet;
use guestnet_wire::tcp::{Options, Tcp, flags};
use guestnet_wire::{be16, be32, checksum, icmp, icmp6, ipv4, ipv6, proto, put, tcp, udp};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// Payload that an error quotes at most: 576 bytes less both pairs of headers.
pub(super) const QUOTED: usize = 576 - 28 - 28;
/// Bytes of a packet that is quoted at most.
pub(super) const QUOTE_MAX: usize = ipv6::LEN + udp::LEN + QUOTED;

impl Relay {
    /// Handles an error of the kernel about something that a guest sent: the guest gets an ICMP error.
    pub fn sock_error<E: Effects>(&mut self, cx: &mut Context<'_, E>, id: FlowId, err: &DatagramError<'_>) {
        let Some(key) = self.flows.get_mut(id).map(|f| f.key) else {
            cx.link.lan.base_mut().drop(DropReason::NoFlow);
            return;
        };
        if key.proto == proto::TCP {
            return self.connect_error(cx, id, err);
        }
        let name = cx.policy.name_of(err.dst.ip().to_canonical());
        let port = if key.proto == proto::UDP { err.dst.port() } else { 0 };
        let flow = name.and_then(|ip| self.flows.find(&Key { remote: SocketAddr::new(ip, port), ..key }));
        let Some(f) = flow.and_then(|i| self.flows.at(i)) else {
            cx.link.lan.count_drop(key.slot, DropReason::NoFlow);
            return;
        };
        let State::Datagram { ip_id, .. } = f.state else { return };
        let mut quote = [0u8; QUOTE_MAX];
        let payload = err.payload.get(..err.payload.len().min(QUOTED)).unwrap_or(err.payload);
        let (key, mac) = (f.key, f.mac);
        let Some(n) = requote(&mut quote, &key, ip_id, err, payload) else { return };
        let error = match relayed_error(err, n) {
            Ok(error) => error,
            Err(why) => return cx.link.lan.count_drop(key.slot, why),
        };
        let src = source_of_error(cx, &key, err.offender);
        let to = Sender { slot: key.slot, mac };
        cx.gateway.send_error(&mut cx.link, to, (src, key.guest.ip()), quote.get(..n).unwrap_or(&[]), error);
    }

    /// Handles an ICMP error in answer to a connect: it is passed on to the guest as it came, as if from its sender, and the
    /// connect ends.
    fn connect_error<E: Effects>(&mut self, cx: &mut Context<'_, E>, id: FlowId, err: &DatagramError<'_>) {
        let Some(f) = self.flows.get_mut(id) else { return };
        let State::Tcp(tcb) = &f.state else { return };
        let Some(seq) = tcb.connecting() else { return };
        let (key, mac, ip_id) = (f.key, f.mac, tcb.ip_id());
        let error = match relayed_error(err, 40) {
            Ok(error) => error,
            // An impossible MTU does not end a connect.
            Err(why @ DropReason::Malformed) => return cx.link.lan.count_drop(key.slot, why),
            Err(_) => {
                self.with_flow(cx, id, |tcb, cx| tcb.connected(cx, Err(err.kind)));
                return;
            }
        };
        self.close_flow(cx, id.index);
        connect_failed(cx, &key, mac, error, err.offender, seq, ip_id);
    }

    /// Handles an ICMP error of a guest about a packet of one of its flows.
    ///
    /// # Errors
    /// Why it is dropped; [`DropReason::NoFlow`] when it is about no flow.
    pub fn guest_error<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        slot: u32,
        frame: &[u8],
        p: &Packet,
    ) -> Result<(), DropReason> {
        if p.src.is_ipv6() {
            return self.guest_error6(cx, slot, frame, p);
        }
        let quote = frame.get(p.payload..p.end).unwrap_or(&[]);
        let ihl = usize::from(quote.first().copied().unwrap_or(0) & 0xf) * 4;
        if quote.first().is_none_or(|b| b >> 4 != 4) || ihl < ipv4::MIN_LEN {
            return Err(DropReason::Malformed);
        }
        let Some(header) = quote.get(..ihl).filter(|_| quote.len() >= ihl.saturating_add(8)) else {
            return Err(DropReason::Truncated);
        };
        // RFC 5508 REQ-3a; by 3c the transport checksum is not verified.
        if checksum::fold(checksum::sum(header, 0)) != 0xffff {
            return Err(DropReason::BadIpChecksum);
        }
        let ip = |at: usize| {
            let a = be32(header, at);
            IpAddr::V4(Ipv4Addr::from(a))
        };
        let proto = header.get(9).copied().unwrap_or(0);
        let (from, to) = (be16(quote, ihl), be16(quote, ihl.saturating_add(2)));
        let (guest, remote) = match proto {
            proto::ICMP => (be16(quote, ihl.saturating_add(4)), 0),
            _ => (to, from),
        };
        let key = Key {
            slot,
            proto,
            guest: SocketAddr::new(ip(16), guest),
            remote: SocketAddr::new(ip(12), remote),
        };
        let index = self.flows.find(&key).ok_or(DropReason::NoFlow)?;
        let message = frame.get(p.l4..p.end).unwrap_or(&[]);
        let too_big = message.starts_with(&[icmp::UNREACHABLE, icmp::unreachable::FRAG_NEEDED]);
        if too_big && !icmp::is_path_mtu(be16(message, 6)) {
            return Err(DropReason::Malformed);
        }
        if proto == proto::TCP && too_big {
            let mtu = match be16(message, 6) {
                0 => plateau(usize::from(be16(quote, 2))),
                mtu => mtu,
            };
            let seq = be32(quote, ihl.saturating_add(4));
            self.with_index(cx, index, |tcb, cx| tcb.path_mtu(cx, mtu, seq));
        }
        Ok(())
    }
}

impl Relay {
    /// As [`Relay::guest_error`], of ICMPv6. What guests get from here has no extension headers, so neither has what they
    /// quote, fragments excepted, which belong to no flow.
    fn guest_error6<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        slot: u32,
        frame: &[u8],
        p: &Packet,
    ) -> Result<(), DropReason> {
        let quote = frame.get(p.payload..p.end).unwrap_or(&[]);
        let Some(header) = quote.get(..ipv6::LEN).filter(|_| quote.len() >= ipv6::LEN + 8) else {
            return Err(DropReason::Truncated);
        };
        if header.first().is_none_or(|b| b >> 4 != 6) {
            return Err(DropReason::Malformed);
        }
        let ip = |at: usize| {
            let bytes = header.get(at..at.saturating_add(16)).and_then(|b| <[u8; 16]>::try_from(b).ok());
            IpAddr::V6(bytes.unwrap_or([0; 16]).into())
        };
        let proto = header.get(6).copied().unwrap_or(0);
        let (from, to) = (be16(quote, ipv6::LEN), be16(quote, ipv6::LEN + 2));
        let (guest, remote) = match proto {
            proto::ICMPV6 => (be16(quote, ipv6::LEN + 4), 0),
            _ => (to, from),
        };
        let guest = SocketAddr::new(ip(24), guest);
        let key = Key { slot, proto, guest, remote: SocketAddr::new(ip(8), remote) };
        let index = self.flows.find(&key).ok_or(DropReason::NoFlow)?;
        let message = frame.get(p.l4..p.end).unwrap_or(&[]);
        if message.first() == Some(&icmp6::TOO_BIG) {
            let mtu = u16::try_from(be32(message, 4)).unwrap_or(u16::MAX);
            if mtu < ipv6::MIN_MTU {
                return Err(DropReason::Malformed);
            }
            if proto == proto::TCP {
                let seq = be32(quote, ipv6::LEN + 4);
                self.with_index(cx, index, |tcb, cx| tcb.path_mtu(cx, mtu, seq));
            }
        }
        Ok(())
    }
}

/// Tells a guest by an ICMP error that quotes its SYN that a connect failed. The error comes from `offender` where a router
/// or host sent it, else from the gateway.
pub(super) fn connect_failed<E: Effects>(
    cx: &mut Context<'_, E>,
    key: &Key,
    mac: Mac,
    error: IcmpError,
    offender: Option<IpAddr>,
    seq: u32,
    id: u16,
) {
    let (from, to) = (key.guest.ip(), key.remote.ip());
    let mut quote = [0u8; ipv6::LEN + tcp::MIN_LEN];
    let ip = IpHeader { src: from, dst: to, proto: proto::TCP, ttl: 1, tos: 0, id, frag: ipv4::DF };
    ip.emit(&mut quote, tcp::MIN_LEN);
    let (src_port, dst_port) = (key.guest.port(), key.remote.port());
    if let Some(syn) = quote.get_mut(ip.len()..) {
        Tcp { src_port, dst_port, seq, flags: flags::SYN, ..Tcp::default() }.emit(&Options::default(), syn);
    }
    let quote = quote.get(..ip.len().saturating_add(tcp::MIN_LEN)).unwrap_or(&[]);
    let src = source_of_error(cx, key, offender);
    let to = Sender { slot: key.slot, mac };
    cx.gateway.send_error(&mut cx.link, to, (src, from), quote, error);
}

/// Where an ICMP error about a flow comes from, as its guest sees it: the router or host that sent it, else the gateway.
fn source_of_error<E>(cx: &Context<'_, E>, key: &Key, offender: Option<IpAddr>) -> IpAddr {
    let guest = key.guest.ip();
    let named = offender.and_then(|o| cx.policy.name_of(o.to_canonical()));
    named.filter(|o| o.is_ipv4() == guest.is_ipv4()).unwrap_or_else(|| cx.gateway.address_for(guest))
}

/// The ICMP error for an error of a host socket.
pub(super) fn icmp_for(e: SockError, packet_len: usize) -> IcmpError {
    use icmp::unreachable::{ADMIN_PROHIBITED, HOST, NET, PORT};
    IcmpError::unreachable(match e {
        SockError::Refused | SockError::Reset => PORT,
        SockError::NetUnreachable => NET,
        SockError::Prohibited => ADMIN_PROHIBITED,
        SockError::MessageTooBig(mtu) if mtu >= icmp::MIN_MTU => return IcmpError::too_big(mtu),
        SockError::MessageTooBig(_) => return IcmpError::too_big(plateau(packet_len)),
        SockError::HostUnreachable | SockError::TimedOut | SockError::Exhausted | SockError::Other(_) => HOST,
    })
}

/// The next lower MTU in use (RFC 1191 7.1), for errors that do not say which.
pub(super) fn plateau(packet_len: usize) -> u16 {
    [32000u16, 17914, 8166, 4352, 2002, 1492, 1006, 508, 296]
        .into_iter()
        .find(|m| usize::from(*m) < packet_len)
        .unwrap_or(68)
}

/// Writes the guest's packet to the front of `b`, as far as it is known; returns its length.
pub(super) fn requote(
    b: &mut [u8],
    key: &Key,
    id: u16,
    err: &DatagramError<'_>,
    payload: &[u8],
) -> Option<usize> {
    let (src, dst) = (key.guest.ip(), key.remote.ip());
    let len = payload.len().saturating_add(udp::LEN);
    // The full length, though only a part may be quoted.
    let whole = err.payload.len().saturating_add(udp::LEN).min(65515) as u16;
    let ip = IpHeader { src, dst, proto: key.proto, ttl: 1, tos: 0, id, frag: 0 };
    ip.emit(b, usize::from(whole));
    let l4 = b.get_mut(ip.len()..)?.get_mut(..len)?;
    if key.proto == proto::UDP {
        put(l4, udp::LEN, payload);
        udp::emit(l4, key.guest.ip(), key.remote.ip(), key.guest.port(), key.remote.port());
        put(l4, 4, &whole.to_be_bytes());
    } else {
        let (i, s) = (key.guest.port().to_be_bytes(), err.seq.to_be_bytes());
        let rest = [i[0], i[1], s[0], s[1]];
        match (src, dst) {
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                icmp6::emit(l4, (src, dst), (icmp6::ECHO, 0), rest, payload)
            }
            _ => icmp::emit(l4, icmp::ECHO, 0, rest, payload),
        };
    }
    Some(len.saturating_add(ip.len()))
}

/// The ICMP error for a reported one: as it came from the network, or made from the kernel's own errno.
///
/// # Errors
/// [`DropReason::Malformed`] for an MTU that no link has: the kernel passes on what a message says unchecked, and anybody
/// may have sent it. [`DropReason::UnsupportedProtocol`] for messages that are not for guests.
pub(super) fn relayed_error(err: &DatagramError<'_>, quoted: usize) -> Result<IcmpError, DropReason> {
    if err.dst.ip().to_canonical().is_ipv6() {
        return relayed_error6(err, quoted);
    }
    match (err.icmp_type, err.icmp_code) {
        (0, _) => Ok(icmp_for(err.kind, quoted.max(err.payload.len().saturating_add(28)))),
        (icmp::UNREACHABLE, icmp::unreachable::FRAG_NEEDED) => {
            let told = match (err.mtu, err.kind) {
                (0, SockError::MessageTooBig(m)) => m,
                (m, _) => m,
            };
            match told {
                0 => Ok(IcmpError::too_big(plateau(err.payload.len().saturating_add(28)))),
                told if icmp::is_path_mtu(told) => Ok(IcmpError::too_big(told)),
                _ => Err(DropReason::Malformed),
            }
        }
        (kind @ (icmp::UNREACHABLE | icmp::TIME_EXCEEDED | icmp::PARAMETER_PROBLEM), code) => {
            Ok(IcmpError(kind, code, [0; 4]))
        }
        // Source quench and redirects end here (RFC 6633, RFC 1122 3.2.2.2).
        _ => Err(DropReason::UnsupportedProtocol),
    }
}

/// As [`relayed_error`], of ICMPv6.
fn relayed_error6(err: &DatagramError<'_>, quoted: usize) -> Result<IcmpError, DropReason> {
    match (err.icmp_type, err.icmp_code) {
        (0, _) => {
            let error = icmp_for(err.kind, quoted.max(err.payload.len().saturating_add(48)));
            error.for_v6().ok_or(DropReason::UnsupportedProtocol)
        }
        (icmp6::TOO_BIG, _) => {
            let told = match (err.mtu, err.kind) {
                (0, SockError::MessageTooBig(m)) => m,
                (m, _) => m,
            };
            // RFC 8201 4: no path has less.
            let [a, b] = told.to_be_bytes();
            let error = IcmpError(icmp6::TOO_BIG, 0, [0, 0, a, b]);
            if told >= ipv6::MIN_MTU { Ok(error) } else { Err(DropReason::Malformed) }
        }
        (kind @ (icmp6::UNREACHABLE | icmp6::TIME_EXCEEDED | icmp6::PARAMETER_PROBLEM), code) => {
            Ok(IcmpError(kind, code, [0; 4]))
        }
        _ => Err(DropReason::UnsupportedProtocol),
    }
}
