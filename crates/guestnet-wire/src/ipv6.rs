//! Theory of operation: the IPv6 header (RFC 8200), written without extension headers, and fragments of packets that
//! start here. [`crate::parse`] reads it.

use crate::{be16, put};
use std::net::Ipv6Addr;

/// Length of the header.
pub const LEN: usize = 40;
/// The smallest MTU of a link (RFC 8200 5).
pub const MIN_MTU: u16 = 1280;
/// Next header of a fragment header (RFC 8200 4.5).
pub const FRAGMENT_HEADER: u8 = 44;
const FRAGMENT_LEN: usize = 8;

/// What an emitted header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv6 {
    /// Source address.
    pub src: Ipv6Addr,
    /// Destination address.
    pub dst: Ipv6Addr,
    /// Protocol number.
    pub next_header: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// DSCP and ECN.
    pub traffic_class: u8,
    /// Bytes that follow the header.
    pub payload_len: u16,
}

impl Ipv6 {
    /// Writes 40 bytes at the front of `b`, with flow label 0.
    #[inline]
    pub fn emit(&self, b: &mut [u8]) {
        put(b, 0, &[0x60 | self.traffic_class >> 4, self.traffic_class << 4, 0, 0]);
        put(b, 4, &self.payload_len.to_be_bytes());
        put(b, 6, &[self.next_header, self.hop_limit]);
        put(b, 8, &self.src.octets());
        put(b, 24, &self.dst.octets());
    }
}

/// Splits a packet without extension headers into fragments of at most `mtu` bytes (RFC 8200 4.5) and calls `out` with
/// the headers and the data of each, in order. False, and nothing is called, where `mtu` has no room for eight bytes of
/// data.
pub fn fragments(packet: &[u8], mtu: usize, id: u32, mut out: impl FnMut(&[u8], &[u8])) -> bool {
    let room = mtu.saturating_sub(LEN + FRAGMENT_LEN) & !7;
    let (Some(head), Some(data)) = (packet.first_chunk::<LEN>(), packet.get(LEN..)) else { return false };
    if room < 8 {
        return false;
    }
    let data = data.get(..usize::from(be16(head, 4))).unwrap_or(data);
    let mut header = [0u8; LEN + FRAGMENT_LEN];
    put(&mut header, 0, head);
    put(&mut header, 6, &[FRAGMENT_HEADER]);
    put(&mut header, LEN, &[head[6]]);
    put(&mut header, LEN + 4, &id.to_be_bytes());
    let last = data.len().div_ceil(room).saturating_sub(1);
    for (n, piece) in data.chunks(room).enumerate() {
        let word = (n * room) as u16 | u16::from(n < last);
        put(&mut header, 4, &((FRAGMENT_LEN + piece.len()) as u16).to_be_bytes());
        put(&mut header, LEN + 2, &word.to_be_bytes());
        out(&header, piece);
    }
    true
}
