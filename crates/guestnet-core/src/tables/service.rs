//! Theory of operation: the services of the gateway, by protocol, address and port. A UDP service receives datagrams as
//! events, with the port and MAC that they came from. A TCP service is a target that the relay connects to.

use crate::interface::types::ServiceId;
use guestnet_wire::proto;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// DHCP server port (RFC 2131).
pub const DHCP_SERVER: u16 = 67;
/// DHCP client port.
pub const DHCP_CLIENT: u16 = 68;
/// DHCPv6 client port (RFC 8415).
pub const DHCP6_CLIENT: u16 = 546;
/// DHCPv6 server port.
pub const DHCP6_SERVER: u16 = 547;
/// All DHCPv6 relay agents and servers of a link, `ff02::1:2`.
pub const DHCP6_SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);

struct Service {
    id: ServiceId,
    proto: u8,
    address: IpAddr,
    port: u16,
}

/// All services. There are a handful, so a scan is the fastest look-up.
#[derive(Default)]
pub struct Services {
    list: Vec<Service>,
}

impl Services {
    /// Adds one, in place of another of the same protocol, address and port.
    pub fn add(&mut self, id: ServiceId, proto: u8, address: IpAddr, port: u16) {
        self.list.retain(|s| (s.proto, s.address, s.port) != (proto, address, port));
        self.list.push(Service { id, proto, address, port });
    }

    /// The service at an address and port.
    #[inline]
    #[must_use]
    pub fn find(&self, proto: u8, to: SocketAddr) -> Option<ServiceId> {
        let hit = |s: &&Service| s.port == to.port() && s.proto == proto && s.address == to.ip();
        self.list.iter().find(hit).map(|s| s.id)
    }

    /// The DHCP service, which is reached by broadcast too.
    #[must_use]
    pub fn dhcp(&self) -> Option<ServiceId> {
        self.list.iter().find(|s| s.proto == proto::UDP && s.port == DHCP_SERVER).map(|s| s.id)
    }

    /// The DHCPv6 service, which is reached by multicast too.
    #[must_use]
    pub fn dhcp6(&self) -> Option<ServiceId> {
        self.list.iter().find(|s| s.proto == proto::UDP && s.port == DHCP6_SERVER).map(|s| s.id)
    }

    /// Whether some service has the address.
    #[inline]
    #[must_use]
    pub fn has_address(&self, ip: IpAddr) -> bool {
        self.list.iter().any(|s| s.address == ip)
    }
}
