//! Theory of operation: the IPv4 header (RFC 791).
//!
//! - [`Header::parse`] reads a header and checks its lengths against the bytes present; [`crate::parse`] goes on to the
//!   transport header.
//! - [`Ipv4::emit`] writes a header without options, its checksum included.
//! - [`fragments`] splits a packet for a smaller MTU.

use crate::{WireError, be16, be32, checksum, put};
use std::net::Ipv4Addr;

/// Length of a header without options.
pub const MIN_LEN: usize = 20;
/// "Don't fragment" in the flags-and-offset word.
pub const DF: u16 = 0x4000;
/// "More fragments" in the flags-and-offset word.
pub const MF: u16 = 0x2000;

/// Where a packet is a fragment of a larger one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fragment {
    /// Identification (IPv4: 16 bits).
    pub id: u32,
    /// Offset in bytes of this fragment's payload in the whole.
    pub offset: u32,
    /// More fragments follow.
    pub more: bool,
}

impl Fragment {
    /// Whether an honest sender makes this fragment with `data` bytes: one that ends past 65535 can only be an attack
    /// (RFC 791 3.2, RFC 8200 4.5), and all but the last carry a multiple of 8 bytes.
    #[must_use]
    pub(crate) fn is_possible(&self, data: usize) -> bool {
        let past = self.offset as usize + data > 0xffff;
        !past && !(self.more && (data == 0 || !data.is_multiple_of(8)))
    }
}

/// A header that was read and checked against the bytes present.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Length of the header, options included.
    pub len: usize,
    /// Length of the packet; link padding may follow.
    pub total: usize,
    /// Source address.
    pub src: u32,
    /// Destination address.
    pub dst: u32,
    /// Protocol number.
    pub proto: u8,
    /// Time to live.
    pub ttl: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// Identification.
    pub id: u16,
    /// Flags and fragment offset word ([`DF`], [`MF`], offset in units of 8 bytes).
    pub frag: u16,
}

impl Header {
    /// Reads the header at the front of `b`. Its checksum is not verified.
    ///
    /// # Errors
    /// [`WireError::Truncated`] where `b` ends before the packet does, [`WireError::Malformed`] for lengths that
    /// cannot be.
    #[inline]
    pub fn parse(b: &[u8]) -> Result<Header, WireError> {
        let Some(h) = b.first_chunk::<MIN_LEN>() else { return Err(WireError::Truncated) };
        let len = usize::from(h[0] & 0xf) * 4;
        let total = usize::from(be16(h, 2));
        if h[0] >> 4 != 4 || len < MIN_LEN || total < len {
            return Err(WireError::Malformed);
        }
        if total > b.len() {
            return Err(WireError::Truncated);
        }
        let header = Header {
            len,
            total,
            src: be32(h, 12),
            dst: be32(h, 16),
            proto: h[9],
            ttl: h[8],
            tos: h[1],
            id: be16(h, 4),
            frag: be16(h, 6),
        };
        if header.fragment().is_some_and(|f| !f.is_possible(total - len)) {
            return Err(WireError::Malformed);
        }
        Ok(header)
    }

    /// Must not be fragmented (DF).
    #[inline]
    #[must_use]
    pub fn dont_fragment(&self) -> bool {
        self.frag & DF != 0
    }

    /// Where the packet is a fragment of a larger one.
    #[inline]
    #[must_use]
    pub fn fragment(&self) -> Option<Fragment> {
        (self.frag & (MF | 0x1fff) != 0).then(|| Fragment {
            id: u32::from(self.id),
            offset: u32::from(self.frag & 0x1fff) * 8,
            more: self.frag & MF != 0,
        })
    }
}

/// What an emitted header says.
///
/// # Examples
/// ```
/// use guestnet_wire::ipv4::{self, Header, Ipv4};
/// use guestnet_wire::proto;
///
/// let header = Ipv4 {
///     src: "192.168.64.2".parse()?,
///     dst: "203.0.113.9".parse()?,
///     proto: proto::UDP,
///     ttl: 64,
///     tos: 0,
///     id: 1,
///     frag: ipv4::DF,
///     payload_len: 8,
/// };
/// let mut packet = [0; ipv4::MIN_LEN + 8];
/// header.emit(&mut packet);
/// let read = Header::parse(&packet).expect("a header that was just written");
/// assert!(read.dont_fragment());
/// assert_eq!((read.total, read.ttl), (28, 64));
/// # Ok::<(), std::net::AddrParseError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv4 {
    /// Source address.
    pub src: Ipv4Addr,
    /// Destination address.
    pub dst: Ipv4Addr,
    /// Protocol number.
    pub proto: u8,
    /// Time to live.
    pub ttl: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// Identification.
    pub id: u16,
    /// Flags and fragment offset word ([`DF`], [`MF`], offset in units of 8 bytes).
    pub frag: u16,
    /// Bytes that follow the header.
    pub payload_len: u16,
}

impl Ipv4 {
    /// Writes 20 bytes at the front of `b`, checksum included.
    #[inline]
    pub fn emit(&self, b: &mut [u8]) {
        let Some(b) = b.first_chunk_mut::<MIN_LEN>() else { return };
        let total = self.payload_len.saturating_add(MIN_LEN as u16);
        let mut h = [0; MIN_LEN];
        (h[0], h[1], h[8], h[9]) = (0x45, self.tos, self.ttl, self.proto);
        h[2..4].copy_from_slice(&total.to_be_bytes());
        h[4..6].copy_from_slice(&self.id.to_be_bytes());
        h[6..8].copy_from_slice(&self.frag.to_be_bytes());
        h[12..16].copy_from_slice(&self.src.octets());
        h[16..].copy_from_slice(&self.dst.octets());
        let c = checksum::checksum(&h);
        h[10..12].copy_from_slice(&c.to_be_bytes());
        *b = h;
    }
}

/// Recomputes the header checksum of the header at the front of `b` (options included).
pub fn fill_checksum(b: &mut [u8]) {
    let len = usize::from(b.first().copied().unwrap_or(0) & 0xf) * 4;
    put(b, 10, &[0, 0]);
    let c = checksum::checksum(b.get(..len).unwrap_or(&[]));
    put(b, 10, &c.to_be_bytes());
}

/// Cuts a packet into fragments of at most `mtu` bytes (RFC 791 3.2) and calls `out` with the header and the data of
/// each, in order. The packet may be a fragment itself. False, and nothing is called, where `mtu` has no room for
/// eight bytes of data.
pub fn fragments(packet: &[u8], mtu: usize, mut out: impl FnMut(&[u8], &[u8])) -> bool {
    let ihl = usize::from(packet.first().copied().unwrap_or(0) & 0xf) * 4;
    let total = usize::from(be16(packet, 2)).min(packet.len());
    let (Some(head), Some(data)) = (packet.get(..ihl), packet.get(ihl..total)) else { return false };
    let word = be16(packet, 6);
    let (base, more) = (word & 0x1fff, word & MF);
    let mut first = head.to_vec();
    let mut later = copied_options(head);
    let room = mtu.saturating_sub(first.len()) & !7;
    if room < 8 {
        return false;
    }
    let mut at = 0;
    while at < data.len() {
        let piece = data.get(at..data.len().min(at + room)).unwrap_or(&[]);
        let header = if at == 0 { &mut first } else { &mut later };
        let is_last = at + piece.len() >= data.len();
        let word = (base + (at / 8) as u16) | if is_last { more } else { MF };
        let length = (header.len() + piece.len()) as u16;
        put(header, 2, &length.to_be_bytes());
        put(header, 6, &word.to_be_bytes());
        fill_checksum(header);
        out(header, piece);
        at += piece.len();
    }
    true
}

/// The header for all fragments but the first: only options with the copied flag (RFC 791 3.1).
fn copied_options(head: &[u8]) -> Vec<u8> {
    let mut out = head.get(..MIN_LEN).unwrap_or(&[]).to_vec();
    let mut rest = head.get(MIN_LEN..).unwrap_or(&[]);
    while let Some(kind) = rest.first().copied() {
        let len = match kind {
            0 => break,
            1 => 1,
            _ => usize::from(rest.get(1).copied().unwrap_or(0)).max(2),
        };
        let Some(option) = rest.get(..len) else { break };
        if kind & 0x80 != 0 {
            out.extend_from_slice(option);
        }
        rest = rest.get(len..).unwrap_or(&[]);
    }
    while !out.len().is_multiple_of(4) {
        out.push(0);
    }
    let words = (out.len() / 4) as u8;
    put(&mut out, 0, &[0x40 | words]);
    out
}
