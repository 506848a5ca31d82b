//! Theory of operation: one pass over an IP packet that checks every length against the bytes present and
//! keeps offsets, so that what follows never measures again. Checksums are not verified here
//! ([`verify_l4`], [`verify_ipv4_header`]): an attachment may have said that they need not be.

pub use crate::ipv4::Fragment;
use crate::{WireError, be16, be32, checksum, ipv4, ipv6, proto, tcp, udp};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// One packet, as offsets from the start of the slice that was parsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Offset of the IP header.
    pub l3: usize,
    /// Offset of what follows the IP header (transport header, or fragment data).
    pub l4: usize,
    /// Offset of the transport payload (equal to `l4` where the transport has no parsed header).
    pub payload: usize,
    /// End of the packet by the IP header's own length; bytes after it are link padding.
    pub end: usize,
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// Transport protocol.
    pub proto: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// TCP/UDP source port; ICMP echo: the identifier; else 0.
    pub src_port: u16,
    /// TCP/UDP destination port; ICMP echo: the identifier; else 0.
    pub dst_port: u16,
    /// DSCP and ECN byte.
    pub tos: u8,
    /// IPv4: DF is set. IPv6: true.
    pub dont_fragment: bool,
    /// Set for fragments; then ports are 0 and `payload == l4`.
    pub fragment: Option<Fragment>,
}

impl Packet {
    /// Bytes of the packet, IP header included.
    #[inline]
    #[must_use]
    pub fn ip_len(&self) -> usize {
        self.end - self.l3
    }

    /// Bytes after the IP header: transport header and payload, or fragment data.
    #[inline]
    #[must_use]
    pub fn transport_len(&self) -> usize {
        self.end - self.l4
    }

    /// Bytes of the transport payload.
    #[inline]
    #[must_use]
    pub fn payload_len(&self) -> usize {
        self.end - self.payload
    }

    /// Bytes of the IP and transport headers.
    #[inline]
    #[must_use]
    pub fn headers_len(&self) -> usize {
        self.payload - self.l3
    }
}

/// Parses the IP packet that starts at `l3` in `frame`; version by its first nibble.
///
/// # Errors
/// [`WireError`] naming what is wrong; the packet must then be dropped.
///
/// # Examples
/// ```
/// use guestnet_wire::WireError;
/// use guestnet_wire::parse::parse_ip;
///
/// let packet = [
///     0x45, 0, 0, 28, 0, 1, 0, 0, 64, 17, 0, 0, 192, 168, 64, 2, 203, 0, 113, 9, // IPv4
///     0xc3, 0x50, 0, 53, 0, 8, 0, 0, // UDP from port 50000 to port 53
/// ];
/// let read = parse_ip(&packet, 0)?;
/// assert_eq!((read.src_port, read.dst_port), (50000, 53));
/// assert_eq!((read.l4, read.payload, read.end), (20, 28, 28));
/// assert_eq!(parse_ip(&packet[..27], 0), Err(WireError::Truncated));
/// # Ok::<(), WireError>(())
/// ```
#[inline]
pub fn parse_ip(frame: &[u8], l3: usize) -> Result<Packet, WireError> {
    match frame.get(l3).ok_or(WireError::Truncated)? >> 4 {
        4 => parse_v4(frame, l3),
        6 => parse_v6(frame, l3),
        _ => Err(WireError::Malformed),
    }
}

#[inline]
fn parse_v4(frame: &[u8], l3: usize) -> Result<Packet, WireError> {
    let h = ipv4::Header::parse(frame.get(l3..).unwrap_or(&[]))?;
    let p = Packet {
        l3,
        l4: l3 + h.len,
        payload: l3 + h.len,
        end: l3 + h.total,
        src: IpAddr::V4(Ipv4Addr::from(h.src)),
        dst: IpAddr::V4(Ipv4Addr::from(h.dst)),
        proto: h.proto,
        ttl: h.ttl,
        src_port: 0,
        dst_port: 0,
        tos: h.tos,
        dont_fragment: h.dont_fragment(),
        fragment: h.fragment(),
    };
    with_transport(frame, p)
}

pub use crate::ipv6::FRAGMENT_HEADER;
/// IPv6 and IPv4 authentication header (RFC 4302).
const AUTHENTICATION_HEADER: u8 = 51;
/// IPv6 routing header (RFC 8200 4.4).
const ROUTING_HEADER: u8 = 43;

/// True for an IPv6 extension header that another header follows, the fragment header excepted (RFC 7045):
/// hop-by-hop options, routing, authentication, destination options, mobility, HIP and Shim6.
#[must_use]
pub fn is_extension(next_header: u8) -> bool {
    matches!(next_header, 0 | 43 | AUTHENTICATION_HEADER | 60 | 135 | 139 | 140)
}

fn parse_v6(frame: &[u8], l3: usize) -> Result<Packet, WireError> {
    let h = frame.get(l3..).unwrap_or(&[]);
    if h.len() < ipv6::LEN {
        return Err(WireError::Truncated);
    }
    let len = usize::from(be16(h, 4));
    if ipv6::LEN + len > h.len() {
        return Err(WireError::Truncated);
    }
    let addr = |at: usize| -> Ipv6Addr {
        let mut a = [0u8; 16];
        a.copy_from_slice(&h[at..at + 16]);
        Ipv6Addr::from(a)
    };
    let (mut next, mut at) = (h[6], ipv6::LEN);
    let end = ipv6::LEN + len;
    let mut fragment = None;
    // At most 8 extension headers (RFC 8504 5.3 lets a node bound the chain).
    for _ in 0..8 {
        match next {
            FRAGMENT_HEADER => {
                if at + 8 > end {
                    return Err(WireError::Truncated);
                }
                let word = be16(h, at + 2);
                fragment = Some(Fragment {
                    id: be32(h, at + 4),
                    offset: u32::from(word & 0xfff8),
                    more: word & 1 != 0,
                });
                next = h[at];
                at += 8;
                break;
            }
            _ if is_extension(next) => {
                if at + 8 > end {
                    return Err(WireError::Truncated);
                }
                let units = usize::from(h[at + 1]);
                // RFC 5095 3: a packet that would be routed by its own header is dropped.
                if next == ROUTING_HEADER && h[at + 2] == 0 && h[at + 3] != 0 {
                    return Err(WireError::Malformed);
                }
                // An authentication header counts its length in units of 4 bytes, less 2 (RFC 4302 2.2).
                let len = if next == AUTHENTICATION_HEADER { (units + 2) * 4 } else { (units + 1) * 8 };
                next = h[at];
                at += len;
            }
            _ => break,
        }
        if at > end {
            return Err(WireError::Truncated);
        }
    }
    // More of them than that would hide what comes behind.
    if fragment.is_none() && (next == FRAGMENT_HEADER || is_extension(next)) {
        return Err(WireError::Malformed);
    }
    if fragment.is_some_and(|f| !f.is_possible(end - at)) {
        return Err(WireError::Malformed);
    }
    let p = Packet {
        l3,
        l4: l3 + at,
        payload: l3 + at,
        end: l3 + end,
        src: IpAddr::V6(addr(8)),
        dst: IpAddr::V6(addr(24)),
        proto: next,
        ttl: h[7],
        src_port: 0,
        dst_port: 0,
        tos: (h[0] << 4) | (h[1] >> 4),
        dont_fragment: true,
        fragment,
    };
    with_transport(frame, p)
}

#[inline]
fn with_transport(frame: &[u8], mut p: Packet) -> Result<Packet, WireError> {
    if p.fragment.is_some() {
        return Ok(p);
    }
    let t = Transport::parse(p.proto, frame.get(p.l4..p.end).ok_or(WireError::Truncated)?, true)?;
    p.payload = p.l4 + t.payload;
    p.end = p.l4 + t.end;
    (p.src_port, p.dst_port) = (t.src_port, t.dst_port);
    Ok(p)
}

/// What a transport header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transport {
    /// TCP/UDP source port; ICMP echo: the identifier; else 0.
    pub src_port: u16,
    /// TCP/UDP destination port; ICMP echo: the identifier; else 0.
    pub dst_port: u16,
    /// Offset of the payload from the transport header; 0 for a protocol that has no parsed header.
    pub payload: usize,
    /// Offset of the end of the payload; a UDP datagram may be shorter than the packet that carries it.
    pub end: usize,
}

impl Transport {
    /// Reads the header of a protocol at the front of `b`. `whole` says that `b` is all of the packet's data, and not
    /// that of a first fragment, whose lengths may reach past it.
    ///
    /// # Errors
    /// [`WireError::Truncated`] where `b` ends within the header, [`WireError::Malformed`] for lengths that cannot be.
    #[inline]
    pub fn parse(protocol: u8, b: &[u8], whole: bool) -> Result<Transport, WireError> {
        let mut t = Transport { src_port: 0, dst_port: 0, payload: 0, end: b.len() };
        match protocol {
            proto::TCP => {
                let Some(h) = b.first_chunk::<{ tcp::MIN_LEN }>() else { return Err(WireError::Truncated) };
                let len = usize::from(h[12] >> 4) * 4;
                if len < tcp::MIN_LEN || (whole && len > b.len()) {
                    return Err(WireError::Malformed);
                }
                t.payload = len.min(b.len());
                (t.src_port, t.dst_port) = (be16(h, 0), be16(h, 2));
            }
            proto::UDP => {
                let Some(h) = b.first_chunk::<{ udp::LEN }>() else { return Err(WireError::Truncated) };
                let len = usize::from(be16(h, 4));
                // Linux's USO and GRO frames carry the sum in the length field, so equality is what holds
                // for every honest sender; a shorter one would hide bytes (RFC 768: header and data).
                if len < udp::LEN || (whole && len > b.len()) {
                    return Err(WireError::Malformed);
                }
                t.payload = udp::LEN;
                t.end = len.min(b.len());
                (t.src_port, t.dst_port) = (be16(h, 0), be16(h, 2));
            }
            proto::ICMP | proto::ICMPV6 => {
                let Some(h) = b.first_chunk::<8>() else { return Err(WireError::Truncated) };
                t.payload = 8;
                let echo =
                    if protocol == proto::ICMP { matches!(h[0], 0 | 8) } else { matches!(h[0], 128 | 129) };
                if echo {
                    t.src_port = be16(h, 4);
                    t.dst_port = t.src_port;
                }
            }
            _ => {}
        }
        Ok(t)
    }
}

/// Verifies the IPv4 header checksum of a parsed packet; true for IPv6.
#[inline]
#[must_use]
pub fn verify_ipv4_header(frame: &[u8], p: &Packet) -> bool {
    match p.src {
        IpAddr::V4(_) => {
            let ihl = usize::from(frame.get(p.l3).copied().unwrap_or(0) & 0xf) * 4;
            frame.get(p.l3..p.l3 + ihl).is_some_and(|h| checksum::fold(checksum::sum(h, 0)) == 0xffff)
        }
        IpAddr::V6(_) => true,
    }
}

/// Verifies the TCP, UDP, ICMP or ICMPv6 checksum of a parsed packet that is not a fragment. True for
/// protocols without one that guestnet knows, and for UDP over IPv4 without a checksum.
#[inline]
#[must_use]
pub fn verify_l4(frame: &[u8], p: &Packet) -> bool {
    let Some(b) = frame.get(p.l4..p.end) else { return false };
    let pseudo = match p.proto {
        proto::TCP | proto::ICMPV6 => checksum::pseudo(p.src, p.dst, p.proto, b.len() as u32),
        proto::UDP => {
            if be16(b, 6) == 0 {
                return p.src.is_ipv4();
            }
            checksum::pseudo(p.src, p.dst, p.proto, b.len() as u32)
        }
        proto::ICMP => 0,
        _ => return true,
    };
    checksum::fold(checksum::sum(b, pseudo)) == 0xffff
}
