//! Theory of operation: IPv4 header (RFC 791): offsets, and an emitter for headers without options.
//! Validation lives in [`crate::parse`]; the setters here keep the header checksum right incrementally.

use crate::{be16, checksum, put};
use std::net::Ipv4Addr;

/// Length of a header without options.
pub const MIN_LEN: usize = 20;
/// "Don't fragment" in the flags-and-offset word.
pub const DF: u16 = 0x4000;
/// "More fragments" in the flags-and-offset word.
pub const MF: u16 = 0x2000;

/// What an emitted header says.
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
        let total = self.payload_len.saturating_add(MIN_LEN as u16);
        put(b, 0, &[0x45, self.tos]);
        put(b, 2, &total.to_be_bytes());
        put(b, 4, &self.id.to_be_bytes());
        put(b, 6, &self.frag.to_be_bytes());
        put(b, 8, &[self.ttl, self.proto, 0, 0]);
        put(b, 12, &self.src.octets());
        put(b, 16, &self.dst.octets());
        let c = checksum::checksum(b.get(..MIN_LEN).unwrap_or(&[]));
        put(b, 10, &c.to_be_bytes());
    }
}

/// Recomputes the header checksum of the header at the front of `b` (options included).
pub fn fill_checksum(b: &mut [u8]) {
    let len = usize::from(b.first().copied().unwrap_or(0) & 0xf) * 4;
    put(b, 10, &[0, 0]);
    let c = checksum::checksum(b.get(..len).unwrap_or(&[]));
    put(b, 10, &c.to_be_bytes());
}

/// The checksum field of the header at the front of `b`.
#[must_use]
pub fn checksum_field(b: &[u8]) -> u16 {
    be16(b, 10)
}
