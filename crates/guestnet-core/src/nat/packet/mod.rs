//! Theory of operation: what the NAT reads of an IPv4 packet, checked once against the bytes present, and the
//! few words that it writes. Checksums are changed by difference (RFC 1624 equation 3), never recomputed,
//! so a packet that came in broken leaves broken and its receiver finds out.

pub(crate) mod fragments;
pub(crate) mod icmp;
pub(crate) mod output;

use crate::interface::stats::DropReason;
use crate::nat::table::records::Key;
use guestnet_wire::checksum::fold;
use guestnet_wire::{be16, be32, ipv4, proto, put};

/// What kind of packet it is to a NAT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// TCP, UDP, or a protocol followed by address.
    Flow,
    /// ICMP with an identifier.
    Query,
    /// ICMP that quotes a packet.
    Error,
    /// A later fragment, which has no ports.
    Tail,
}

/// One IPv4 packet, read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View {
    pub kind: Kind,
    /// Header length.
    pub ihl: usize,
    /// Length by the header; there may be padding after it.
    pub total: usize,
    pub src: u32,
    pub dst: u32,
    /// Ports, or the identifier of a query in both.
    pub sport: u16,
    pub dport: u16,
    pub proto: u8,
    pub ttl: u8,
    /// TCP flags.
    pub flags: u8,
    pub id: u16,
    pub dont_fragment: bool,
    /// Fragments: offset in bytes, and whether more follow.
    pub fragment: Option<(u32, bool)>,
}

impl View {
    /// As the outbound side names it.
    pub fn out_key(&self) -> Key {
        let query = self.kind == Kind::Query;
        Key {
            local: self.src,
            remote: self.dst,
            local_port: self.sport,
            remote_port: if query { 0 } else { self.dport },
            proto: self.proto,
        }
    }

    /// As the inbound side names it.
    pub fn in_key(&self) -> Key {
        let query = self.kind == Kind::Query;
        Key {
            local: self.dst,
            remote: self.src,
            local_port: self.dport,
            remote_port: if query { 0 } else { self.sport },
            proto: self.proto,
        }
    }
}

/// Reads an IPv4 packet.
///
/// # Errors
/// `Truncated`, `Malformed`, or `UnsupportedProtocol` for ICMP that no NAT should carry.
pub(crate) fn read(p: &[u8]) -> Result<View, DropReason> {
    let Some(h) = p.first_chunk::<20>() else { return Err(DropReason::Truncated) };
    let ihl = usize::from(h[0] & 15) * 4;
    let total = usize::from(be16(h, 2));
    if h[0] >> 4 != 4 || ihl < ipv4::MIN_LEN || total < ihl {
        return Err(DropReason::Malformed);
    }
    if total > p.len() {
        return Err(DropReason::Truncated);
    }
    let word = be16(h, 6);
    let (offset, more) = (u32::from(word & 0x1fff) * 8, word & ipv4::MF != 0);
    let data = (total - ihl) as u32;
    // RFC 791 3.2: a fragment past 65535 can only be an attack; all but the last carry whole units of 8.
    if offset + data > 0xffff || (more && (data == 0 || !data.is_multiple_of(8))) {
        return Err(DropReason::Malformed);
    }
    let mut v = View {
        kind: Kind::Flow,
        ihl,
        total,
        src: be32(h, 12),
        dst: be32(h, 16),
        sport: 0,
        dport: 0,
        proto: h[9],
        ttl: h[8],
        flags: 0,
        id: be16(h, 4),
        dont_fragment: word & ipv4::DF != 0,
        fragment: (offset != 0 || more).then_some((offset, more)),
    };
    if offset != 0 {
        // RFC 1858: a second fragment that overwrites the TCP flags of the first.
        if v.proto == proto::TCP && offset < 20 {
            return Err(DropReason::Malformed);
        }
        v.kind = Kind::Tail;
        return Ok(v);
    }
    transport(p.get(ihl..total).unwrap_or(&[]), &mut v)?;
    Ok(v)
}

fn transport(b: &[u8], v: &mut View) -> Result<(), DropReason> {
    match v.proto {
        proto::TCP => {
            if b.len() < 20 {
                return Err(DropReason::Truncated);
            }
            let len = usize::from(b[12] >> 4) * 4;
            if len < 20 || (len > b.len() && v.fragment.is_none()) {
                return Err(DropReason::Malformed);
            }
            v.flags = b[13];
        }
        proto::UDP => {
            if b.len() < 8 {
                return Err(DropReason::Truncated);
            }
            let len = usize::from(be16(b, 4));
            if len < 8 || (len > b.len() && v.fragment.is_none()) {
                return Err(DropReason::Malformed);
            }
        }
        proto::ICMP => {
            if b.len() < 8 {
                return Err(DropReason::Truncated);
            }
            match b[0] {
                0 | 8 | 13..=18 => {
                    v.kind = Kind::Query;
                    v.sport = be16(b, 4);
                    v.dport = v.sport;
                }
                // An error in fragments cannot be checked, and none is over 1280 bytes.
                3 | 11 | 12 if v.fragment.is_none() => v.kind = Kind::Error,
                _ => return Err(DropReason::UnsupportedProtocol),
            }
            return Ok(());
        }
        _ => return Ok(()),
    }
    v.sport = be16(b, 0);
    v.dport = be16(b, 2);
    Ok(())
}

/// RFC 1624: the checksum field after `delta` was added to the sum that it covers.
#[inline(always)]
pub(crate) fn adjust(field: u16, delta: u16) -> u16 {
    // Two folds of a sum of two 16-bit numbers.
    let s = u32::from(!field) + u32::from(delta);
    !((s & 0xffff) + (s >> 16)) as u16
}

/// One end of a packet, as it will be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct End {
    pub ip: u32,
    pub port: u16,
    pub delta_ip: u16,
    pub delta_l4: u16,
}

/// Offset of the transport checksum in its header.
#[inline(always)]
pub(crate) fn checksum_offset(p: u8) -> Option<usize> {
    match p {
        proto::TCP => Some(16),
        proto::UDP => Some(6),
        proto::ICMP => Some(2),
        _ => None,
    }
}

/// Replaces source (`at_source`) or destination of a packet whose transport header starts at `ihl`; `ports` is
/// false for later fragments, which have none.
pub(crate) fn rewrite(p: &mut [u8], ihl: usize, proto_: u8, at_source: bool, end: End, ports: bool) {
    put(p, if at_source { 12 } else { 16 }, &end.ip.to_be_bytes());
    let sum = adjust(be16(p, 10), end.delta_ip);
    put(p, 10, &sum.to_be_bytes());
    if !ports {
        return;
    }
    let Some(c) = checksum_offset(proto_) else { return };
    let port = match proto_ {
        proto::ICMP => ihl + 4,
        _ if at_source => ihl,
        _ => ihl + 2,
    };
    put(p, port, &end.port.to_be_bytes());
    adjust_l4(p, ihl + c, proto_, end.delta_l4);
}

/// Adjusts a transport checksum in place: UDP's "none" stays none, and its computed zero goes out as all ones.
pub(crate) fn adjust_l4(p: &mut [u8], at: usize, proto_: u8, delta: u16) {
    if at + 2 > p.len() {
        return;
    }
    let old = be16(p, at);
    if proto_ == proto::UDP && old == 0 {
        return;
    }
    let new = adjust(old, delta);
    let new = if proto_ == proto::UDP && new == 0 { 0xffff } else { new };
    put(p, at, &new.to_be_bytes());
}

/// Takes one from the TTL.
pub(crate) fn decrement_ttl(p: &mut [u8]) {
    let ttl = p.get(8).copied().unwrap_or(0);
    put(p, 8, &[ttl.saturating_sub(1)]);
    // The word of TTL and protocol fell by 0x0100.
    let sum = adjust(be16(p, 10), !0x0100);
    put(p, 10, &sum.to_be_bytes());
}

/// Replaces the identification.
pub(crate) fn set_id(p: &mut [u8], id: u16) {
    let delta = fold(u64::from(!be16(p, 4)) + u64::from(id));
    put(p, 4, &id.to_be_bytes());
    let sum = adjust(be16(p, 10), delta);
    put(p, 10, &sum.to_be_bytes());
}
