//! Checks of single frames that need no state: sizes, offload requests, and messages that no guest may send to others.

use crate::interface::stats::DropReason;
use crate::interface::types::{Csum, FrameMeta, Gso};
use crate::tables::port::Port;
use guestnet_wire::parse::Packet;
use guestnet_wire::{be16, be32, icmp, ipv4, proto};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Room for one frame of the largest size: Ethernet header and 65535 bytes of IP.
pub(crate) const FRAME_MAX: usize = 14 + 65535;

/// The packet fits the MTU, or asks to be segmented into packets that do.
#[inline]
pub(crate) fn check_size(port: &Port, p: &Packet, meta: FrameMeta) -> Result<(), DropReason> {
    let mtu = usize::from(port.config.mtu);
    if port.config.lax_offload && meta.gso.is_none() {
        return Ok(());
    }
    let (want, size) = match meta.gso {
        None if p.ip_len() > mtu => return Err(DropReason::Oversized),
        None => return Ok(()),
        Some(Gso::Tcp(n)) => (proto::TCP, n),
        Some(Gso::Udp(n)) => (proto::UDP, n),
    };
    if p.proto != want
        || size == 0
        || p.fragment.is_some()
        || has_too_many_segments(p.payload_len(), size, want)
    {
        return Err(DropReason::Malformed);
    }
    // virtio counts bytes of payload per segment.
    if p.headers_len().saturating_add(usize::from(size)) > mtu && p.ip_len() > mtu {
        return Err(DropReason::Oversized);
    }
    Ok(())
}

/// Bytes of the largest IP packet that a frame is, or will be segmented into.
#[inline]
pub(crate) fn largest_packet(p: &Packet, meta: FrameMeta) -> usize {
    let whole = p.ip_len();
    match meta.gso {
        None => whole,
        Some(Gso::Tcp(n) | Gso::Udp(n)) => p.headers_len().saturating_add(usize::from(n)).min(whole),
    }
}

/// Whether a large send asks for more segments than any honest guest does: each is work here or on the host. Linux
/// segments UDP into 128 at most, and the 64 KiB of TCP that it sends at once into segments of 48 bytes or more.
pub(crate) fn has_too_many_segments(len: usize, size: u16, proto: u8) -> bool {
    len.div_ceil(usize::from(size)) > if proto == proto::UDP { 128 } else { 2048 }
}

/// A checksum that is left to us is where the protocol has it.
#[inline]
pub(crate) fn check_offload(frame: &[u8], p: &Packet, meta: FrameMeta) -> Result<(), DropReason> {
    let Csum::Partial { start, offset } = meta.csum else { return Ok(()) };
    let good = match p.proto {
        _ if p.fragment.is_some() => false,
        proto::TCP => offset == 16,
        proto::UDP => offset == 6,
        _ => usize::from(start).saturating_add(usize::from(offset)).saturating_add(2) <= frame.len(),
    };
    if good && usize::from(start) == p.l4 { Ok(()) } else { Err(DropReason::Malformed) }
}

/// The destination port of a UDP datagram; `None` for other protocols and for later fragments, which have no
/// ports. A receiver finds its socket by this port alone, so a filter must not ask for the source port too.
#[inline]
pub(crate) fn udp_destination(frame: &[u8], p: &Packet) -> Option<u16> {
    match p.fragment {
        _ if p.proto != proto::UDP => None,
        None => Some(p.dst_port),
        Some(f) if f.offset == 0 => Some(be16(frame, p.l4.saturating_add(2))),
        Some(_) => None,
    }
}

/// Whether it is a router advertisement (RFC 1256) or a redirect, first fragments included: no guest is a router to
/// others.
#[inline]
pub(crate) fn is_router_message(frame: &[u8], p: &Packet) -> bool {
    p.proto == proto::ICMP
        && p.fragment.is_none_or(|f| f.offset == 0)
        && matches!(frame.get(p.l4), Some(&(icmp::REDIRECT | icmp::ROUTER_ADVERTISEMENT)))
}

/// The destination of the packet that an ICMP or ICMPv6 error quotes; `Ok(None)` for other packets.
///
/// # Errors
/// [`DropReason::Policy`] for an error in fragments, which cannot be checked (none is over 1280 bytes), and
/// [`DropReason::Malformed`] for one without a quote or with an MTU that no link has.
pub(crate) fn quoted_destination(frame: &[u8], p: &Packet) -> Result<Option<IpAddr>, DropReason> {
    let (kind, code) = match frame.get(p.l4..).and_then(|b| b.first_chunk()) {
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
        let to = quote.get(24..40).and_then(|to| <[u8; 16]>::try_from(to).ok());
        return Ok(Some(IpAddr::V6(Ipv6Addr::from(to.ok_or(DropReason::Malformed)?))));
    }
    let too_big = (kind, code) == (icmp::UNREACHABLE, icmp::unreachable::FRAG_NEEDED);
    if quote.len() < ipv4::MIN_LEN || too_big && !icmp::is_path_mtu(be16(frame, p.l4.saturating_add(6))) {
        return Err(DropReason::Malformed);
    }
    Ok(Some(IpAddr::V4(Ipv4Addr::from(be32(quote, 16)))))
}
