//! Theory of operation: ICMP for IPv4 (RFC 792): echo fields and the errors that a gateway sends.
//! Error bodies quote the offending packet as RFC 1812 4.3.2.3 says, up to 576 bytes in all.

use crate::{checksum, put};

/// Length of the fixed header.
pub const LEN: usize = 8;
/// Echo reply.
pub const ECHO_REPLY: u8 = 0;
/// Destination unreachable.
pub const UNREACHABLE: u8 = 3;
/// Redirect.
pub const REDIRECT: u8 = 5;
/// Echo request.
pub const ECHO: u8 = 8;
/// Router advertisement (RFC 1256).
pub const ROUTER_ADVERTISEMENT: u8 = 9;
/// Time exceeded.
pub const TIME_EXCEEDED: u8 = 11;
/// Parameter problem.
pub const PARAMETER_PROBLEM: u8 = 12;

/// Codes of destination unreachable.
pub mod unreachable {
    /// Network unreachable.
    pub const NET: u8 = 0;
    /// Host unreachable.
    pub const HOST: u8 = 1;
    /// Protocol unreachable.
    pub const PROTOCOL: u8 = 2;
    /// Port unreachable.
    pub const PORT: u8 = 3;
    /// Fragmentation needed and DF set.
    pub const FRAG_NEEDED: u8 = 4;
    /// Communication administratively prohibited.
    pub const ADMIN_PROHIBITED: u8 = 13;
}

/// True for the ICMPv4 types that are errors and quote a packet.
#[must_use]
pub fn is_error(icmp_type: u8) -> bool {
    matches!(icmp_type, UNREACHABLE | 4 | REDIRECT | TIME_EXCEEDED | PARAMETER_PROBLEM)
}

/// True for the ICMPv4 types that ask something and have an identifier: echo, timestamp, information and
/// address mask requests.
#[must_use]
pub fn is_request(icmp_type: u8) -> bool {
    matches!(icmp_type, ECHO | 13 | 15 | 17)
}

/// The smallest IPv4 MTU (RFC 791 3.2): every link carries packets of this size.
pub const MIN_MTU: u16 = 68;

/// True for the next-hop MTU of a "fragmentation needed" that may be believed: 0 is of routers before RFC 1191,
/// and no link has less than [`MIN_MTU`].
#[must_use]
pub fn is_path_mtu(mtu: u16) -> bool {
    mtu == 0 || mtu >= MIN_MTU
}

/// Writes an ICMPv4 message: header with `rest` as bytes 4 to 7, then `body`, checksum included, at the
/// front of `b`, which must hold `8 + body.len()` bytes. Returns that length.
///
/// # Examples
/// ```
/// use guestnet_wire::{checksum, icmp};
///
/// let mut message = [0; icmp::LEN + 4];
/// let len = icmp::emit(&mut message, 8, 0, [0, 7, 0, 1], b"ping");
/// assert_eq!(len, message.len());
/// assert_eq!(checksum::checksum(&message), 0);
/// ```
pub fn emit(b: &mut [u8], icmp_type: u8, code: u8, rest: [u8; 4], body: &[u8]) -> usize {
    let n = LEN + body.len();
    put(b, 0, &[icmp_type, code, 0, 0]);
    put(b, 4, &rest);
    put(b, LEN, body);
    let c = checksum::checksum(b.get(..n).unwrap_or(&[]));
    put(b, 2, &c.to_be_bytes());
    n
}
