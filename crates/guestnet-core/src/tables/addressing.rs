//! The addresses of a network: its subnet, and those that the gateway answers for. Read by every layer, changed only when
//! a service is added.

use crate::interface::config::NetworkConfig;
use crate::interface::types::ServiceId;
use crate::tables::service::Services;
use std::net::{IpAddr, Ipv4Addr};

/// An IPv4 subnet.
#[derive(Debug, Clone, Copy)]
pub struct Subnet {
    net: u32,
    mask: u32,
}

impl Subnet {
    /// The subnet of an address with a prefix length. Lengths over 32 count as 32.
    #[must_use]
    pub fn new(address: Ipv4Addr, prefix: u8) -> Subnet {
        let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
        Subnet { net: u32::from(address) & mask, mask }
    }

    /// Whether an address lies in the subnet.
    #[inline]
    #[must_use]
    pub fn contains(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(a) => u32::from(a) & self.mask == self.net,
            IpAddr::V6(_) => false,
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

    /// Whether an endpoint may have the address: in the subnet, neither its first nor its last.
    #[inline]
    #[must_use]
    pub fn is_host(&self, ip: IpAddr) -> bool {
        self.contains(ip) && !self.is_broadcast(ip) && ip != IpAddr::V4(Ipv4Addr::from(self.net))
    }
}

/// The addresses of one network. See the module head.
pub struct Addressing {
    subnet: Subnet,
    gateway4: Ipv4Addr,
    gateway6: Option<IpAddr>,
    host_loopback: Option<IpAddr>,
    services: Services,
}

impl Addressing {
    /// Takes them from the configuration; no services yet.
    #[must_use]
    pub fn new(config: &NetworkConfig) -> Addressing {
        Addressing {
            subnet: Subnet::new(config.subnet4.0, config.subnet4.1),
            gateway4: config.gateway4,
            gateway6: config.gateway6.map(|g| IpAddr::V6(g.0)),
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
            || self.gateway6 == Some(ip)
            || self.host_loopback == Some(ip)
            || self.services.has_address(ip)
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
