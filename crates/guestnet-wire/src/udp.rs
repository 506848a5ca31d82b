//! Theory of operation: UDP header (RFC 768), 8 bytes. A checksum of zero means "none" over IPv4.

use crate::{checksum, put};
use std::net::IpAddr;

/// Length of the header.
pub const LEN: usize = 8;

/// Writes a UDP header in front of the payload that is already in `b[8..]` (all of it), checksum included.
///
/// # Examples
/// ```
/// use guestnet_wire::{checksum, proto, udp};
///
/// let (src, dst) = ("192.168.64.2".parse()?, "203.0.113.9".parse()?);
/// let mut datagram = [0; udp::LEN + 5];
/// datagram[udp::LEN..].copy_from_slice(b"hello");
/// udp::emit(&mut datagram, src, dst, 50000, 53);
/// let sum = checksum::sum(&datagram, checksum::pseudo(src, dst, proto::UDP, 13));
/// assert_eq!(checksum::finish(sum), 0);
/// # Ok::<(), std::net::AddrParseError>(())
/// ```
pub fn emit(b: &mut [u8], src: IpAddr, dst: IpAddr, src_port: u16, dst_port: u16) {
    let len = b.len().min(0xffff) as u16;
    let Some(h) = b.first_chunk_mut::<LEN>() else { return };
    h[..2].copy_from_slice(&src_port.to_be_bytes());
    h[2..4].copy_from_slice(&dst_port.to_be_bytes());
    h[4..6].copy_from_slice(&len.to_be_bytes());
    h[6..].fill(0);
    let c = checksum::finish(checksum::sum(b, checksum::pseudo(src, dst, crate::proto::UDP, u32::from(len))));
    // RFC 768: a computed zero goes out as all ones.
    let c = if c == 0 { 0xffff } else { c };
    put(b, 6, &c.to_be_bytes());
}
