//! Theory of operation: where a packet of a guest may go, decided once per flow before any socket is opened.
//! Addresses that can never be a destination come first, then what belongs to the Network itself, then the
//! mode. Ordered CIDR rules will slot in after the mode: [`Policy::outbound`] already sees protocol, address
//! and port, and answers with the address that is dialled in truth, which is what rules must judge.

use crate::interface::config::NetworkConfig;
use crate::interface::stats::DropReason;
use crate::interface::types::NetMode;
use crate::tables::addressing::Subnet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The rules of one Network.
pub struct Policy {
    mode: NetMode,
    host_loopback: Option<IpAddr>,
    gateway4: Ipv4Addr,
    subnet: Subnet,
}

impl Policy {
    /// Takes them from the configuration.
    #[must_use]
    pub fn new(c: &NetworkConfig) -> Policy {
        Policy {
            mode: c.mode,
            host_loopback: c.host_loopback,
            gateway4: c.gateway4,
            subnet: Subnet::new(c.subnet4.0, c.subnet4.1),
        }
    }

    /// Where a new flow to `remote` goes in truth.
    ///
    /// # Errors
    /// The reason why it goes nowhere: [`DropReason::BadDestination`], [`DropReason::NoEndpoint`] for an address of the
    /// subnet that is not to be reached through the gateway, [`DropReason::Policy`].
    pub fn outbound(&self, _proto: u8, remote: SocketAddr) -> Result<SocketAddr, DropReason> {
        let ip = remote.ip();
        if never_a_destination(ip) || self.subnet.is_broadcast(ip) {
            return Err(DropReason::BadDestination);
        }
        let mapped = self.host_loopback == Some(ip);
        if !mapped && self.subnet.contains(ip) {
            return Err(DropReason::NoEndpoint);
        }
        if self.mode == NetMode::HostOnly {
            return Err(DropReason::Policy);
        }
        if mapped {
            return Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), remote.port()));
        }
        Ok(remote)
    }

    /// What the guest calls an address outside that sent something on a flow of its own: the reverse of
    /// [`Policy::outbound`]. `None` for addresses that no guest is to see.
    #[must_use]
    pub fn name_of(&self, outside: IpAddr) -> Option<IpAddr> {
        match outside {
            IpAddr::V4(a) if a.is_loopback() => self.host_loopback,
            other if never_a_destination(other) || self.subnet.contains(other) => None,
            other => Some(other),
        }
    }

    /// What the guest is to see as the address of a client that came through a Forward: its own, or the
    /// gateway's when its own means something else to the guest (loopback, the subnet, another family).
    #[must_use]
    pub fn client_name(&self, client: IpAddr) -> IpAddr {
        match client.to_canonical() {
            ip @ IpAddr::V4(_) if !never_a_destination(ip) && !self.subnet.contains(ip) => ip,
            _ => IpAddr::V4(self.gateway4),
        }
    }
}

/// Where clouds keep metadata and credentials beside link-local addresses: Azure, Alibaba, Oracle.
const METADATA4: [Ipv4Addr; 3] =
    [Ipv4Addr::new(168, 63, 129, 16), Ipv4Addr::new(100, 100, 100, 200), Ipv4Addr::new(192, 0, 0, 192)];
/// The same for IPv6, as prefixes: AWS, Google, Scaleway.
const METADATA6: [(Ipv6Addr, u32); 3] = [
    (Ipv6Addr::new(0xfd00, 0x0ec2, 0, 0, 0, 0, 0, 0), 32),
    (Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254), 128),
    (Ipv6Addr::new(0xfd00, 0x42, 0, 0, 0, 0, 0, 0x42), 128),
];

/// "This network", loopback, link-local (RFC 3927 2.7: never forwarded; also where clouds keep metadata and
/// credentials), other addresses of metadata, multicast, reserved and broadcast; in IPv6 also addresses that
/// hold such an IPv4 address.
#[inline]
#[must_use]
pub fn never_a_destination(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(a) => never_a_destination4(a),
        IpAddr::V6(a) => {
            a.is_unspecified()
                || a.is_loopback()
                || a.is_multicast()
                || a.to_ipv4_mapped().is_some()
                || a.is_unicast_link_local()
                || METADATA6.iter().any(|(net, len)| (a.to_bits() ^ net.to_bits()) >> (128 - len) == 0)
                || inner4(a).is_some_and(never_a_destination4)
        }
    }
}

#[inline]
fn never_a_destination4(a: Ipv4Addr) -> bool {
    let o = a.octets();
    o[0] == 0 || o[0] == 127 || o[0] >= 224 || (o[0] == 169 && o[1] == 254) || METADATA4.contains(&a)
}

/// The IPv4 address that a translator or tunnel on the way would make of an IPv6 address: NAT64's well-known
/// prefix (RFC 6052), 6to4 (RFC 3056), and the compatible addresses of old (RFC 4291 2.5.5.1).
fn inner4(a: Ipv6Addr) -> Option<Ipv4Addr> {
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
    use guestnet_wire::ether::Mac;

    fn policy(mode: NetMode, host_loopback: Option<&str>) -> Policy {
        let mut c = NetworkConfig::new(
            Mac([2, 0, 0, 0, 0, 1]),
            Ipv4Addr::new(192, 168, 64, 1),
            (Ipv4Addr::new(192, 168, 64, 0), 24),
            [0; 32],
        );
        c.mode = mode;
        c.host_loopback = host_loopback.map(|a| a.parse().unwrap());
        Policy::new(&c)
    }

    fn out(p: &Policy, to: &str) -> Result<SocketAddr, DropReason> {
        p.outbound(6, to.parse().unwrap())
    }

    #[test]
    fn what_is_never_a_destination() {
        let p = policy(NetMode::Nat, None);
        for to in [
            "0.0.0.0:80",
            "0.1.2.3:80",
            "127.0.0.1:80",
            "127.255.0.1:1",
            "224.0.0.1:5",
            "240.1.1.1:1",
            "255.255.255.255:67",
            "192.168.64.255:1",
            "169.254.169.254:80",
            "[::1]:80",
            "[::ffff:127.0.0.1]:80",
            "[fe80::1]:80",
        ] {
            assert_eq!(out(&p, to), Err(DropReason::BadDestination), "{to}");
        }
        assert_eq!(out(&p, "192.168.64.254:80"), Err(DropReason::NoEndpoint));
        assert_eq!(out(&p, "10.1.1.1:80"), Ok("10.1.1.1:80".parse().unwrap()));
    }

    #[test]
    fn metadata_of_clouds_is_never_a_destination() {
        for loopback in [None, Some("192.168.64.254")] {
            let p = policy(NetMode::Nat, loopback);
            for to in [
                "169.254.169.254:80",
                "169.254.170.2:80",
                "168.63.129.16:80",
                "168.63.129.16:32526",
                "100.100.100.200:80",
                "192.0.0.192:80",
                "[fd00:ec2::254]:80",
                "[fd00:ec2::23]:80",
                "[fd20:ce::254]:80",
                "[fd00:42::42]:80",
                "[fe80::a9fe:a9fe]:80",
                // By way of a translator or a tunnel.
                "[64:ff9b::169.254.169.254]:80",
                "[64:ff9b::100.100.100.200]:80",
                "[64:ff9b::127.0.0.1]:80",
                "[2002:a9fe:a9fe::1]:80",
                "[::169.254.169.254]:80",
            ] {
                let to: SocketAddr = to.parse().unwrap();
                for proto in [1, 6, 17, 47] {
                    assert_eq!(p.outbound(proto, to), Err(DropReason::BadDestination), "{to}");
                }
                assert_eq!(p.name_of(to.ip()), None, "{to}");
            }
            for to in ["168.63.129.17:80", "100.100.100.201:80", "192.0.0.193:80", "[fd00:ec3::254]:80"] {
                assert_eq!(out(&p, to), Ok(to.parse().unwrap()));
            }
            assert_eq!(out(&p, "[64:ff9b::8.8.8.8]:53"), Ok("[64:ff9b::8.8.8.8]:53".parse().unwrap()));
        }
    }

    #[test]
    fn host_loopback_only_when_asked_for() {
        let p = policy(NetMode::Nat, Some("192.168.64.254"));
        assert_eq!(out(&p, "192.168.64.254:80"), Ok("127.0.0.1:80".parse().unwrap()));
        assert_eq!(p.name_of("127.0.0.1".parse().unwrap()), Some("192.168.64.254".parse().unwrap()));
        assert_eq!(policy(NetMode::Nat, None).name_of("127.0.0.1".parse().unwrap()), None);
        let p = policy(NetMode::HostOnly, Some("192.168.64.254"));
        assert_eq!(out(&p, "192.168.64.254:80"), Err(DropReason::Policy));
        assert_eq!(out(&p, "10.1.1.1:80"), Err(DropReason::Policy));
    }

    #[test]
    fn clients_keep_their_address_where_it_means_the_same_to_the_guest() {
        let p = policy(NetMode::Nat, None);
        let name = |a: &str| p.client_name(a.parse().unwrap()).to_string();
        assert_eq!(name("203.0.113.9"), "203.0.113.9");
        assert_eq!(name("::ffff:203.0.113.9"), "203.0.113.9");
        assert_eq!(name("127.0.0.1"), "192.168.64.1");
        assert_eq!(name("192.168.64.7"), "192.168.64.1");
        assert_eq!(name("2001:db8::1"), "192.168.64.1");
    }
}
