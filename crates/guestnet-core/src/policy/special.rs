//! Theory of operation: addresses that have a meaning of their own, whatever the rules say. [`is_special`] names
//! those that can never be the destination of a flow; [`is_metadata`] names the ones among them where clouds keep
//! metadata and credentials. An IPv6 address that leads to an IPv4 address through a translator or a tunnel is
//! judged by the IPv4 address.

pub use crate::tables::addressing::Subnet;
use std::collections::HashSet;
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
                || embedded(a).any(is_special4)
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
            in_metadata6(a) || a.to_ipv4_mapped().is_some_and(is_metadata4) || embedded(a).any(is_metadata4)
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

/// Groups of addresses that rules name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Group {
    /// Everything that is in none of the other groups. Documentation ranges are in it, so that labs can use them.
    Public,
    /// RFC 1918 and unique local addresses (RFC 4193).
    Private,
    /// Addresses that carriers share, 100.64.0.0/10 (RFC 6598).
    Cgnat,
    /// 169.254.0.0/16 and fe80::/10.
    LinkLocal,
    /// Metadata services of clouds.
    Metadata,
    /// All addresses of this host.
    Host,
    /// The address that stands for the host's 127.0.0.1.
    HostLoopback,
    /// The gateway of the network.
    Gateway,
    /// The subnet of the network.
    Guests,
    /// Multicast.
    Multicast,
    /// All other special-purpose addresses that are not globally reachable (RFC 6890).
    Special,
}

/// What addresses mean in one network.
#[derive(Debug, Clone, Copy)]
pub struct Surroundings<'a> {
    /// Its subnet.
    pub subnet: Subnet,
    /// Its gateway.
    pub gateway: IpAddr,
    /// The gateway's IPv6 address, where the network has IPv6.
    pub gateway6: Option<Ipv6Addr>,
    /// The address that stands for the host's 127.0.0.1.
    pub host_loopback: Option<IpAddr>,
    /// The addresses of the host.
    pub host: &'a HashSet<IpAddr>,
}

impl Surroundings<'_> {
    fn is_gateway(&self, ip: IpAddr) -> bool {
        self.gateway == ip || self.gateway6.is_some_and(|own| ip == own)
    }
}

impl Group {
    /// Whether an address is in the group.
    #[must_use]
    pub fn includes(self, at: &Surroundings<'_>, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        match self {
            Group::Public => {
                const OTHERS: [Group; 10] = [
                    Group::Private,
                    Group::Cgnat,
                    Group::LinkLocal,
                    Group::Metadata,
                    Group::HostLoopback,
                    Group::Gateway,
                    Group::Guests,
                    Group::Multicast,
                    Group::Special,
                    Group::Host,
                ];
                !OTHERS.iter().any(|g| g.includes(at, ip))
            }
            Group::Private => either(ip, Ipv4Addr::is_private, Ipv6Addr::is_unique_local),
            Group::Cgnat => either(ip, |a| a.octets()[0] == 100 && a.octets()[1] & 0xc0 == 64, |_| false),
            Group::LinkLocal => either(ip, Ipv4Addr::is_link_local, Ipv6Addr::is_unicast_link_local),
            Group::Metadata => is_metadata(ip),
            Group::Host => at.host.contains(&ip),
            Group::HostLoopback => at.host_loopback == Some(ip),
            Group::Gateway => at.is_gateway(ip),
            Group::Guests => at.subnet.contains(ip) && !at.is_gateway(ip) && at.host_loopback != Some(ip),
            Group::Multicast => ip.is_multicast(),
            Group::Special => either(ip, is_not_global4, is_not_global6),
        }
    }
}

/// Judges an address of either family. An IPv6 address that leads to an IPv4 address is judged by that too.
fn either(ip: IpAddr, v4: impl Fn(&Ipv4Addr) -> bool, v6: impl Fn(&Ipv6Addr) -> bool) -> bool {
    match ip {
        IpAddr::V4(a) => v4(&a),
        IpAddr::V6(a) => v6(&a) || embedded(a).any(|a| v4(&a)),
    }
}

/// Special-purpose addresses (RFC 6890) that have no group of their own.
fn is_not_global4(a: &Ipv4Addr) -> bool {
    let o = a.octets();
    o[0] == 0
        || o[0] == 127
        || o[0] >= 240
        || (o[0] == 192 && o[1] == 0 && o[2] == 0)
        || (o[0] == 198 && o[1] & 0xfe == 18)
}

fn is_not_global6(a: &Ipv6Addr) -> bool {
    let s = a.segments();
    a.is_unspecified()
        || a.is_loopback()
        // Discard-only, benchmarking, ORCHID, site-local.
        || (s[0] == 0x100 && s[1..4] == [0, 0, 0])
        || (s[0] == 0x2001 && s[1] == 2 && s[2] == 0)
        || (s[0] == 0x2001 && s[1] & 0xfff0 == 0x10)
        || s[0] & 0xffc0 == 0xfec0
}

/// The IPv4 addresses that an IPv6 address leads to: see [`embedded4`]. A Teredo address (RFC 4380) has two, that of the
/// server and, inverted, that of the client.
pub(crate) fn embedded(a: Ipv6Addr) -> impl Iterator<Item = Ipv4Addr> {
    let o = a.octets();
    let is_teredo = o[..4] == [0x20, 0x01, 0, 0];
    let server = Ipv4Addr::new(o[4], o[5], o[6], o[7]);
    let client = Ipv4Addr::new(!o[12], !o[13], !o[14], !o[15]);
    let teredo = if is_teredo { [Some(server), Some(client)] } else { [None, None] };
    let local_use_nat64 =
        (o[..6] == [0, 0x64, 0xff, 0x9b, 0, 1]).then(|| Ipv4Addr::new(o[12], o[13], o[14], o[15]));
    teredo.into_iter().flatten().chain(embedded4(a)).chain(local_use_nat64)
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
