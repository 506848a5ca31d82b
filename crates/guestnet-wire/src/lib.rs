//! Theory of operation: a frame is a byte slice; this crate gives it meaning and nothing else.
//! Each module holds one protocol: offsets and accessors over `&[u8]` / `&mut [u8]`, checked once when
//! the view is made, so that accessors cannot fail afterwards. [`parse`] walks Ethernet, IP and the
//! transport header in one pass and keeps offsets. Nothing here allocates on the packet path, does I/O
//! or reads a clock, and no input can make it panic.
#![forbid(unsafe_code)]

pub mod arp;
pub mod checksum;
pub mod dns;
pub mod ether;
pub mod frame;
pub mod gro;
pub mod gso;
pub mod icmp;
pub mod icmp6;
pub mod inspect;
pub mod ipv4;
pub mod ipv6;
pub mod parse;
pub mod proxy;
pub mod tcp;
pub mod udp;

/// IP protocol numbers (IANA) that guestnet knows by name.
pub mod proto {
    /// ICMP for IPv4 (RFC 792).
    pub const ICMP: u8 = 1;
    /// TCP (RFC 9293).
    pub const TCP: u8 = 6;
    /// UDP (RFC 768).
    pub const UDP: u8 = 17;
    /// ICMPv6 (RFC 4443).
    pub const ICMPV6: u8 = 58;
    /// GRE (RFC 2784).
    pub const GRE: u8 = 47;
    /// ESP (RFC 4303).
    pub const ESP: u8 = 50;
    /// SCTP (RFC 9260).
    pub const SCTP: u8 = 132;
}

/// Why bytes are not the header that they claim to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum WireError {
    /// Fewer bytes than the header, or the length it names, needs.
    #[error("truncated")]
    Truncated,
    /// A length, version or offset field that contradicts the others or the bytes present.
    #[error("malformed header")]
    Malformed,
    /// A checksum that does not match.
    #[error("bad checksum")]
    BadChecksum,
    /// An EtherType or version that guestnet does not carry (802.1Q tags among them).
    #[error("unsupported protocol")]
    Unsupported,
}

/// Reads a big-endian u16 at `at`; 0 where the slice is too short (callers check first).
#[inline]
#[must_use]
pub fn be16(b: &[u8], at: usize) -> u16 {
    match b.get(at..at + 2) {
        Some(&[hi, lo]) => u16::from_be_bytes([hi, lo]),
        _ => 0,
    }
}

/// Reads a big-endian u32 at `at`; 0 where the slice is too short (callers check first).
#[inline]
#[must_use]
pub fn be32(b: &[u8], at: usize) -> u32 {
    match b.get(at..at + 4) {
        Some(&[a, c, d, e]) => u32::from_be_bytes([a, c, d, e]),
        _ => 0,
    }
}

/// Writes bytes at `at`; does nothing where the slice is too short (callers check first).
#[inline]
pub fn put(b: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(dst) = b.get_mut(at..at + bytes.len()) {
        dst.copy_from_slice(bytes);
    }
}
