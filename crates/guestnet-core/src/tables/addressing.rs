//! The addresses of a network: its subnet, and those that the gateway answers for. Read by every layer, changed only when
//! a service is added.

use crate::interface::config::NetworkConfig;
use crate::interface::types::ServiceId;
use crate::tables::service::Services;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The gateway's address on the link, in every network with IPv6.
pub const LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// The subnet of a network: IPv4, and the IPv6 prefix of 64 bits where there is one.
#[derive(Debug, Clone, Copy)]
pub struct Subnet {
    net: u32,
    mask: u32,
    /// The upper half of IPv6 addresses.
    prefix6: Option<u64>,
}

impl Subnet {
    /// The subnet of an address with a prefix length. Lengths over 32 count as 32.
    #[must_use]
    pub fn new(address: Ipv4Addr, prefix: u8) -> Subnet {
        let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
        Subnet { net: u32::from(address) & mask, mask, prefix6: None }
    }

    /// Both subnets of a network.
    #[must_use]
    pub fn of(config: &NetworkConfig) -> Subnet {
        let prefix6 = config.gateway6.map(|(ip, _)| upper(ip));
        Subnet { prefix6, ..Subnet::new(config.subnet4.0, config.subnet4.1) }
    }

    /// The IPv6 prefix, as its first address.
    #[must_use]
    pub fn prefix6(&self) -> Option<Ipv6Addr> {
        self.prefix6.map(|upper| Ipv6Addr::from_bits(u128::from(upper) << 64))
    }

    /// Whether an address lies in the subnet.
    #[inline]
    #[must_use]
    pub fn contains(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(a) => u32::from(a) & self.mask == self.net,
            IpAddr::V6(a) => self.prefix6 == Some(upper(a)),
        }
    }

    /// Whether it is the subnet's broadcast address or the limited broadcast.
    #[inline]
    #[must_use]
    pub fn is_broadcast(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(a) => a.is_broadcast() || u32::from(a) == self.net | !self.mask,
            IpAddr::V6(_) => false,
        }
    }

    /// Whether an endpoint may have the address: in the subnet, neither its first nor, in IPv4, its last. The first of an
    /// IPv6 prefix means its routers (RFC 4291 2.6.1).
    #[inline]
    #[must_use]
    pub fn is_host(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(a) => self.contains(ip) && !self.is_broadcast(ip) && u32::from(a) != self.net,
            IpAddr::V6(a) => self.contains(ip) && a.to_bits() as u64 != 0,
        }
    }
}

fn upper(ip: Ipv6Addr) -> u64 {
    (ip.to_bits() >> 64) as u64
}

/// The addresses of one network. See the module head.
pub struct Addressing {
    subnet: Subnet,
    gateway4: Ipv4Addr,
    gateway6: Option<Ipv6Addr>,
    host_loopback: Option<IpAddr>,
    services: Services,
}

impl Addressing {
    /// Takes them from the configuration; no services yet.
    #[must_use]
    pub fn new(config: &NetworkConfig) -> Addressing {
        Addressing {
            subnet: Subnet::of(config),
            gateway4: config.gateway4,
            gateway6: config.gateway6.map(|g| g.0),
            host_loopback: config.host_loopback,
            services: Services::default(),
        }
    }

    /// The subnet.
    #[inline]
    #[must_use]
    pub fn subnet(&self) -> Subnet {
        self.subnet
    }

    /// The gateway's IPv6 address in the prefix, where the network has IPv6.
    #[inline]
    #[must_use]
    pub fn gateway6(&self) -> Option<Ipv6Addr> {
        self.gateway6
    }

    /// The services of the gateway.
    #[inline]
    #[must_use]
    pub fn services(&self) -> &Services {
        &self.services
    }

    /// Adds a service. Its address is the gateway's own from now on.
    pub fn add_service(&mut self, id: ServiceId, proto: u8, address: IpAddr, port: u16) {
        self.services.add(id, proto, address, port);
    }

    /// Whether the gateway answers ARP for an address, so that no endpoint may have it.
    #[inline]
    #[must_use]
    pub fn is_own(&self, ip: IpAddr) -> bool {
        ip == IpAddr::V4(self.gateway4)
            || self.is_own6(ip)
            || self.host_loopback == Some(ip)
            || self.services.has_address(ip)
    }

    /// The gateway's addresses of IPv6: on the link, in the prefix, and the one that means the routers of the prefix.
    #[inline]
    fn is_own6(&self, ip: IpAddr) -> bool {
        match (ip, self.gateway6) {
            (IpAddr::V6(a), Some(own)) => a == own || a == LINK_LOCAL || self.subnet.prefix6() == Some(a),
            _ => false,
        }
    }

    /// Whether packets to an address end at the gateway: its own addresses, but not the one that stands for the host's
    /// loopback, which is relayed.
    #[inline]
    #[must_use]
    pub fn ends_here(&self, ip: IpAddr) -> bool {
        self.host_loopback != Some(ip) && self.is_own(ip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guestnet_wire::ether::Mac;
    use guestnet_wire::proto;

    fn ip(a: &str) -> IpAddr {
        a.parse().unwrap()
    }

    #[test]
    fn the_first_and_last_address_of_a_subnet_are_no_hosts() {
        let s = Subnet::new(Ipv4Addr::new(10, 1, 2, 3), 24);
        assert!(s.is_host(ip("10.1.2.1")) && s.is_host(ip("10.1.2.254")));
        for other in ["10.1.2.0", "10.1.2.255", "255.255.255.255", "10.1.3.1", "fd00::1"] {
            assert!(!s.is_host(ip(other)), "{other}");
        }
        assert!(s.is_broadcast(ip("255.255.255.255")) && s.is_broadcast(ip("10.1.2.255")));
    }

    #[test]
    fn the_first_address_of_a_prefix_means_its_routers() {
        let gateway = Ipv4Addr::new(10, 0, 0, 1);
        let mut c = NetworkConfig::new(Mac([2; 6]), gateway, (gateway, 24), [0; 32]);
        assert!(!Addressing::new(&c).is_own(ip("fe80::1")));
        c.gateway6 = Some(("fd00::1".parse().unwrap(), 64));
        let a = Addressing::new(&c);
        for own in ["fd00::", "fd00::1", "fe80::1"] {
            assert!(a.is_own(ip(own)) && a.ends_here(ip(own)), "{own}");
        }
        assert!(a.subnet().is_host(ip("fd00::2")) && !a.subnet().is_host(ip("fd00::")));
        assert!(!a.subnet().contains(ip("fd00:0:0:1::2")) && !a.is_own(ip("fe80::2")));
    }

    #[test]
    fn the_gateway_owns_its_services_and_the_name_of_the_host() {
        let gateway = Ipv4Addr::new(10, 0, 0, 1);
        let mut c = NetworkConfig::new(Mac([2; 6]), gateway, (gateway, 24), [0; 32]);
        c.host_loopback = Some(ip("10.0.0.254"));
        let mut a = Addressing::new(&c);
        assert!(a.is_own(ip("10.0.0.1")) && a.ends_here(ip("10.0.0.1")));
        assert!(a.is_own(ip("10.0.0.254")) && !a.ends_here(ip("10.0.0.254")));
        assert!(!a.is_own(ip("10.0.0.53")));
        a.add_service(ServiceId(1), proto::UDP, ip("10.0.0.53"), 53);
        assert!(a.is_own(ip("10.0.0.53")) && a.ends_here(ip("10.0.0.53")));
    }
}
