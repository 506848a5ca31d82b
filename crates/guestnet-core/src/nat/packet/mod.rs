//! Theory of operation: what the NAT reads of an IPv4 packet, checked once against the bytes present, and the
//! few words that it writes. Checksums are changed by difference (RFC 1624 equation 3), never recomputed,
//! so a packet that came in broken leaves broken and its receiver finds out.

pub(crate) mod fragments;
pub(crate) mod icmp;
pub(crate) mod output;

use crate::interface::stats::DropReason;
use crate::nat::table::records::Key;
use guestnet_wire::checksum::{adjust, difference};
use guestnet_wire::ipv4::{self, Header};
use guestnet_wire::parse::{Packet, Transport};
use guestnet_wire::{be16, be32, proto, put};

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

/// What the NAT needs of one IPv4 packet.
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
    /// The packet stands for several (TSO, USO, GRO), of which the largest has this many bytes, IP header included.
    pub largest: Option<u16>,
}

impl View {
    /// What the NAT needs of a packet of `frame` that was parsed.
    ///
    /// # Errors
    /// As [`read`], and `UnsupportedProtocol` for IPv6.
    #[inline]
    pub fn new(frame: &[u8], p: &Packet) -> Result<View, DropReason> {
        let h = frame.get(p.l3..).and_then(|b| b.first_chunk::<{ ipv4::MIN_LEN }>());
        let Some(h) = h.filter(|_| p.src.is_ipv4()) else { return Err(DropReason::UnsupportedProtocol) };
        let v = View {
            kind: Kind::Flow,
            ihl: p.l4 - p.l3,
            total: usize::from(be16(h, 2)),
            src: be32(h, 12),
            dst: be32(h, 16),
            sport: p.src_port,
            dport: p.dst_port,
            proto: p.proto,
            ttl: p.ttl,
            flags: 0,
            id: be16(h, 4),
            dont_fragment: p.dont_fragment,
            fragment: None,
            largest: None,
        };
        match (p.fragment, p.proto) {
            (None, proto::TCP) => Ok(View { flags: frame.get(p.l4 + 13).copied().unwrap_or(0), ..v }),
            (None, proto::ICMP) => v.with_icmp(frame.get(p.l4..p.end).unwrap_or(&[])),
            (None, _) => Ok(v),
            (Some(f), _) => {
                let v = View { fragment: Some((f.offset, f.more)), ..v };
                v.with_transport(frame.get(p.l4..p.end).unwrap_or(&[]))
            }
        }
    }

    /// Adds what the bytes behind the IP header say.
    #[inline(always)]
    fn with_transport(mut self, b: &[u8]) -> Result<View, DropReason> {
        if let Some((offset, _)) = self.fragment
            && offset != 0
        {
            // RFC 1858: a second fragment that overwrites the TCP flags of the first.
            if self.proto == proto::TCP && offset < 20 {
                return Err(DropReason::Malformed);
            }
            self.kind = Kind::Tail;
            return Ok(self);
        }
        let t = Transport::parse(self.proto, b, self.fragment.is_none())?;
        (self.sport, self.dport) = (t.src_port, t.dst_port);
        match self.proto {
            proto::TCP => self.flags = b.get(13).copied().unwrap_or(0),
            proto::ICMP => return self.with_icmp(b),
            _ => {}
        }
        Ok(self)
    }

    fn with_icmp(mut self, b: &[u8]) -> Result<View, DropReason> {
        match b.first() {
            Some(0 | 8 | 13..=18) => {
                self.kind = Kind::Query;
                self.sport = be16(b, 4);
                self.dport = self.sport;
            }
            // An error in fragments cannot be checked, and none is over 1280 bytes.
            Some(3 | 11 | 12) if self.fragment.is_none() => self.kind = Kind::Error,
            _ => return Err(DropReason::UnsupportedProtocol),
        }
        Ok(self)
    }

    /// The bytes that the next link must carry in one piece, IP header included.
    #[inline]
    pub fn size(&self) -> usize {
        self.largest.map_or(self.total, usize::from)
    }

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

/// Reads the IPv4 packet at the front of `p`.
///
/// # Errors
/// `Truncated` or `Malformed` for headers that cannot be, `UnsupportedProtocol` for ICMP that no NAT should carry.
#[inline(always)]
pub(crate) fn read(p: &[u8]) -> Result<View, DropReason> {
    let h = Header::parse(p)?;
    let v = View {
        kind: Kind::Flow,
        ihl: h.len,
        total: h.total,
        src: h.src,
        dst: h.dst,
        sport: 0,
        dport: 0,
        proto: h.proto,
        ttl: h.ttl,
        flags: 0,
        id: h.id,
        dont_fragment: h.dont_fragment(),
        fragment: h.fragment().map(|f| (f.offset, f.more)),
        largest: None,
    };
    v.with_transport(p.get(h.len..h.total).unwrap_or(&[]))
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
    let delta = difference(be16(p, 4), id);
    put(p, 4, &id.to_be_bytes());
    let sum = adjust(be16(p, 10), delta);
    put(p, 10, &sum.to_be_bytes());
}
