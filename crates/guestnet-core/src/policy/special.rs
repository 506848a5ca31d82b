//! Theory of operation: addresses that have a meaning of their own, whatever the rules say. [`is_special`] names
//! those that can never be the destination of a flow; [`is_metadata`] names the ones among them where clouds keep
//! metadata and credentials. An IPv6 address that leads to an IPv4 address through a translator or a tunnel is
//! judged by the IPv4 address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Metadata services outside the link-local range: Azure, Alibaba, Oracle.
const METADATA4: [Ipv4Addr; 3] =
    [Ipv4Addr::new(168, 63, 129, 16), Ipv4Addr::new(100, 100, 100, 200), Ipv4Addr::new(192, 0, 0, 192)];
/// The metadata service of most clouds, and the one for containers at AWS.
const METADATA4_LINK_LOCAL: [Ipv4Addr; 2] =
    [Ipv4Addr::new(169, 254, 169, 254), Ipv4Addr::new(169, 254, 170, 2)];
/// Metadata services over IPv6, as prefixes: AWS, Google, Scaleway.
const METADATA6: [(Ipv6Addr, u32); 3] = [
    (Ipv6Addr::new(0xfd00, 0x0ec2, 0, 0, 0, 0, 0, 0), 32),
    (Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254), 128),
    (Ipv6Addr::new(0xfd00, 0x42, 0, 0, 0, 0, 0, 0x42), 128),
];

/// Returns true for an address that no flow can have as its destination: "this network", loopback, link-local
/// (RFC 3927 2.7: never forwarded), metadata services, multicast, reserved and broadcast addresses, and IPv6
/// addresses that embed such an IPv4 address.
#[inline]
#[must_use]
pub fn is_special(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(a) => is_special4(a),
        IpAddr::V6(a) => {
            a.is_unspecified()
                || a.is_loopback()
                || a.is_multicast()
                || a.to_ipv4_mapped().is_some()
                || a.is_unicast_link_local()
                || in_metadata6(a)
                || embedded4(a).is_some_and(is_special4)
        }
    }
}

/// Returns true for an address of a cloud's metadata service.
#[must_use]
pub fn is_metadata(ip: IpAddr) -> bool {
    let is_metadata4 = |a| METADATA4.contains(&a) || METADATA4_LINK_LOCAL.contains(&a);
    match ip {
        IpAddr::V4(a) => is_metadata4(a),
        IpAddr::V6(a) => {
            in_metadata6(a) || a.to_ipv4_mapped().or_else(|| embedded4(a)).is_some_and(is_metadata4)
        }
    }
}

#[inline]
fn is_special4(a: Ipv4Addr) -> bool {
    let o = a.octets();
    o[0] == 0 || o[0] == 127 || o[0] >= 224 || (o[0] == 169 && o[1] == 254) || METADATA4.contains(&a)
}

fn in_metadata6(a: Ipv6Addr) -> bool {
    METADATA6.iter().any(|(net, len)| (a.to_bits() ^ net.to_bits()) >> (128 - len) == 0)
}

/// The IPv4 address that a translator or tunnel extracts from an IPv6 address: NAT64's well-known prefix
/// (RFC 6052), 6to4 (RFC 3056), and the deprecated IPv4-compatible addresses (RFC 4291 2.5.5.1).
fn embedded4(a: Ipv6Addr) -> Option<Ipv4Addr> {
    match a.octets() {
        [0, 0x64, 0xff, 0x9b, 0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d]
        | [0x20, 0x02, a, b, c, d, ..]
        | [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d] => Some(Ipv4Addr::new(a, b, c, d)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn every_metadata_address_is_special() {
        for a in [
            "169.254.169.254",
            "169.254.170.2",
            "168.63.129.16",
            "100.100.100.200",
            "192.0.0.192",
            "fd00:ec2::254",
            "fd20:ce::254",
            "fd00:42::42",
            "64:ff9b::169.254.169.254",
            "64:ff9b::100.100.100.200",
            "2002:a9fe:a9fe::1",
            "::169.254.169.254",
            "::ffff:169.254.169.254",
        ] {
            assert!(is_metadata(ip(a)) && is_special(ip(a)), "{a}");
        }
    }

    #[test]
    fn addresses_beside_the_special_ones_are_ordinary() {
        for a in ["1.0.0.0", "126.1.1.1", "128.0.0.1", "169.253.1.1", "223.255.255.255", "168.63.129.17"] {
            assert!(!is_special(ip(a)) && !is_metadata(ip(a)), "{a}");
        }
        for a in ["fd00:ec3::254", "fec0::1", "64:ff9b::8.8.8.8", "2001:db8::1"] {
            assert!(!is_special(ip(a)) && !is_metadata(ip(a)), "{a}");
        }
        for a in ["127.0.0.1", "fe80::1", "::1", "::ffff:10.0.0.1", "224.0.0.1", "64:ff9b::127.0.0.1"] {
            assert!(is_special(ip(a)) && !is_metadata(ip(a)), "{a}");
        }
    }
}
