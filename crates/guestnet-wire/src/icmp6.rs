//! Theory of operation: ICMPv6 (RFC 4443) and the messages of neighbour discovery (RFC 4861) that a router sends. The
//! checksum covers the addresses of the IP header, so whoever writes a message names them.

use crate::ether::Mac;
use crate::{checksum, proto, put};
use std::net::{IpAddr, Ipv6Addr};

/// Length of the fixed header.
pub const LEN: usize = 8;
/// Destination unreachable.
pub const UNREACHABLE: u8 = 1;
/// Packet too big.
pub const TOO_BIG: u8 = 2;
/// Time exceeded.
pub const TIME_EXCEEDED: u8 = 3;
/// Parameter problem.
pub const PARAMETER_PROBLEM: u8 = 4;
/// Echo request.
pub const ECHO: u8 = 128;
/// Echo reply.
pub const ECHO_REPLY: u8 = 129;
/// Multicast listener query (RFC 2710, RFC 3810).
pub const LISTENER_QUERY: u8 = 130;
/// Multicast listener report (RFC 2710).
pub const LISTENER_REPORT: u8 = 131;
/// Multicast listener done (RFC 2710).
pub const LISTENER_DONE: u8 = 132;
/// Router solicitation.
pub const ROUTER_SOLICITATION: u8 = 133;
/// Router advertisement.
pub const ROUTER_ADVERTISEMENT: u8 = 134;
/// Neighbour solicitation.
pub const SOLICITATION: u8 = 135;
/// Neighbour advertisement.
pub const ADVERTISEMENT: u8 = 136;
/// Redirect.
pub const REDIRECT: u8 = 137;
/// Multicast listener report, version 2 (RFC 3810).
pub const LISTENER_REPORT2: u8 = 143;

/// Codes of destination unreachable (RFC 4443 3.1).
pub mod unreachable {
    /// No route to the destination.
    pub const NO_ROUTE: u8 = 0;
    /// Administratively prohibited.
    pub const ADMIN_PROHIBITED: u8 = 1;
    /// Beyond the scope of the source address.
    pub const BEYOND_SCOPE: u8 = 2;
    /// Address unreachable.
    pub const ADDRESS: u8 = 3;
    /// Port unreachable.
    pub const PORT: u8 = 4;
    /// The source address failed an ingress policy.
    pub const INGRESS_POLICY: u8 = 5;
}

/// Options of neighbour discovery.
pub mod option {
    /// The sender's link-layer address.
    pub const SOURCE: u8 = 1;
    /// The target's link-layer address.
    pub const TARGET: u8 = 2;
    /// A prefix of the link.
    pub const PREFIX: u8 = 3;
    /// The MTU of the link.
    pub const MTU: u8 = 5;
    /// Recursive name servers (RFC 8106).
    pub const RDNSS: u8 = 25;
    /// Domains to search (RFC 8106).
    pub const DNSSL: u8 = 31;
}

/// All nodes of the link.
pub const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// The hop limit that messages of neighbour discovery must have: a router would have lowered it (RFC 4861 3.1).
pub const HOP_LIMIT: u8 = 255;

/// True for the messages of neighbour discovery.
#[must_use]
pub fn is_discovery(kind: u8) -> bool {
    (ROUTER_SOLICITATION..=REDIRECT).contains(&kind)
}

/// True for errors, which quote a packet (RFC 4443 2.1).
#[must_use]
pub fn is_error(kind: u8) -> bool {
    kind < 128
}

/// The group at which an address is solicited (RFC 4291 2.7.1).
#[must_use]
pub fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let o = address.octets();
    Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, o[13], o[14], o[15]])
}

/// The MAC of a group (RFC 2464 7).
///
/// ```
/// use guestnet_wire::{ether::Mac, icmp6};
///
/// assert_eq!(icmp6::multicast_mac(icmp6::ALL_NODES), Mac([0x33, 0x33, 0, 0, 0, 1]));
/// ```
#[must_use]
pub fn multicast_mac(group: Ipv6Addr) -> Mac {
    let o = group.octets();
    Mac([0x33, 0x33, o[12], o[13], o[14], o[15]])
}

/// Writes a message at the front of `b`, which must hold `8 + body.len()` bytes: header with `rest` as bytes 4 to 7, then
/// `body`, checksum included. Returns that length.
pub fn emit(
    b: &mut [u8],
    (src, dst): (Ipv6Addr, Ipv6Addr),
    (kind, code): (u8, u8),
    rest: [u8; 4],
    body: &[u8],
) -> usize {
    let n = LEN + body.len();
    put(b, 0, &[kind, code, 0, 0]);
    put(b, 4, &rest);
    put(b, LEN, body);
    let pseudo = checksum::pseudo(IpAddr::V6(src), IpAddr::V6(dst), proto::ICMPV6, n as u32);
    let c = checksum::finish(checksum::sum(b.get(..n).unwrap_or(&[]), pseudo));
    put(b, 2, &c.to_be_bytes());
    n
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{FrameHeader, IpHeader};
    use crate::parse;

    #[test]
    fn a_message_has_the_checksum_of_its_addresses() {
        let (src, dst) = ("fe80::1".parse().unwrap(), "fd00::7".parse().unwrap());
        let mut frame = [0u8; 14 + 40 + LEN + 4];
        let n = emit(&mut frame[54..], (src, dst), (ECHO, 0), [0, 7, 0, 1], b"ping");
        let ip = IpHeader {
            src: src.into(),
            dst: dst.into(),
            proto: proto::ICMPV6,
            ttl: 255,
            tos: 0,
            id: 0,
            frag: 0,
        };
        FrameHeader { dst: Mac([2; 6]), src: Mac([4; 6]), ip }.emit(&mut frame, n);
        let p = parse::parse_ip(&frame, 14).unwrap();
        assert!(parse::verify_l4(&frame, &p));
        assert_eq!((p.src_port, p.payload_len()), (7, 4));
    }

    #[test]
    fn an_address_is_solicited_at_its_group() {
        let group = solicited_node("fd00::ab:cdef".parse().unwrap());
        assert_eq!(group, "ff02::1:ffab:cdef".parse::<Ipv6Addr>().unwrap());
        assert_eq!(multicast_mac(group), Mac([0x33, 0x33, 0xff, 0xab, 0xcd, 0xef]));
    }
}
