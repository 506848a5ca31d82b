//! Theory of operation: the configuration of a network, and the plain records that pass between the core and its callers.
//! Every limit on what one guest can cost is a field of [`Limits`], so that tests can make it small.

use crate::interface::effects::SockError;
use crate::interface::types::{FlowId, Isolated, NetMode, PortId};
use crate::policy::Entry;
use guestnet_wire::ether::Mac;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Which datagrams from outside a UDP mapping lets in (RFC 4787 section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Filtering {
    /// Anyone who knows the mapping's port.
    EndpointIndependent,
    /// Any port of an address that the guest has sent to from that port.
    #[default]
    AddressDependent,
    /// Only an address and port that the guest has sent to from that port.
    AddressAndPortDependent,
}

/// Limits on what guests can make the host hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Flows in all.
    pub flows: u32,
    /// Flows of one port.
    pub flows_per_port: u32,
    /// UDP and ping sockets of one port.
    pub udp_sockets_per_port: u32,
    /// Bytes buffered for the TCP flows of one port.
    pub buffer_per_port: usize,
    /// Bytes of the host kernel's memory that the TCP sockets of all ports may hold. A port may have as much as is
    /// left; one that has more gets a few kilobytes for each of its connections that are stuck, and for new ones.
    pub socket_memory: usize,
    /// Source MACs of one port that are remembered.
    pub macs_per_port: u32,
    /// Addresses of one port that are learned, of each family (assigned ones do not count).
    pub addresses_per_port: u32,
    /// Datagrams of one port that wait for fragments.
    pub reassemblies_per_port: u32,
    /// Bytes of fragments held, all ports together.
    pub reassembly_bytes: usize,
    /// ICMP errors a second to one port (RFC 1812 4.3.2.8).
    pub icmp_errors_per_second: u32,
    /// Frames a second of one port that go to more than one port (broadcast, multicast, unknown MAC). A frame
    /// counts once for each 1514 bytes (or each piece that it is to be cut into) and each 64 ports begun.
    pub floods_per_second: u32,
    /// Datagrams a second of one port to UDP services; the control side serves all ports from one queue. A
    /// datagram counts once for each 1500 bytes begun.
    pub service_datagrams_per_second: u32,
    /// Flows that all ports together can have a descriptor for. A port may have as many as four times those that
    /// are left of seven eighths of these (a dynamic threshold, as switches share their buffer): a port alone gets
    /// 70 %, who comes when others have much gets less, and the last eighth is for ports that have next to nothing.
    /// The same holds for `flows`.
    pub descriptors: u32,
    /// Inbound flows and datagrams that wait for a guest's answer to ARP, all ports together; of one port a
    /// quarter of it at most, and no more than it leaves to others.
    pub neighbour_waiting: u32,
    /// Bytes of DNS responses that are cached, all ports together; some 15,000 ordinary ones in 4 MiB.
    pub name_bytes: usize,
    /// DNS queries that wait for a response, all ports together; beyond, each port may have a few.
    pub dns_queries: u32,
    /// Of those, queries of one port.
    pub dns_queries_per_port: u32,
    /// TCP connections of guests to the DNS service; the port that has the most loses one for a new one.
    pub dns_connections: u32,
}

/// How much of what is left a port may have, see [`Limits::descriptors`].
const PORT_SHARE: u32 = 4;
/// Flows that a port may have whatever others have, as long as there are any.
const PORT_MIN: u32 = 16;

impl Limits {
    /// Flows that one port may have while all ports have `flows`.
    pub(crate) fn of_one_port(&self, flows: u32) -> u32 {
        let all = self.descriptors.min(self.flows);
        let left = (all - all / 8).saturating_sub(flows);
        self.flows_per_port.min(left.saturating_mul(PORT_SHARE).max(PORT_MIN))
    }

    /// The same for a process that can have so many descriptors: each TCP flow is one and each UDP socket, and
    /// no port is to have them all ([`Limits::descriptors`]).
    #[must_use]
    pub fn within(mut self, descriptors: u32) -> Limits {
        self.descriptors = self.descriptors.min(descriptors);
        self.udp_sockets_per_port = self.udp_sockets_per_port.min(descriptors / 8);
        self
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            flows: 131_072,
            flows_per_port: 16_384,
            udp_sockets_per_port: 1024,
            buffer_per_port: 64 << 20,
            socket_memory: usize::MAX,
            macs_per_port: 8,
            addresses_per_port: 16,
            reassemblies_per_port: 32,
            reassembly_bytes: 4 << 20,
            icmp_errors_per_second: 100,
            floods_per_second: 1000,
            service_datagrams_per_second: 1000,
            descriptors: u32::MAX,
            neighbour_waiting: 1024,
            name_bytes: 4 << 20,
            dns_queries: 1024,
            dns_queries_per_port: 128,
            dns_connections: 256,
        }
    }
}

/// How long a flow lives without traffic. All in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// UDP (RFC 4787 REQ-5: at least 120, 300 recommended).
    pub udp: u32,
    /// UDP to port 53 once it was answered (RFC 4787 REQ-5a).
    pub udp_dns: u32,
    /// ICMP echo (RFC 5508 REQ-2: at least 60).
    pub icmp: u32,
    /// TCP, established (RFC 5382 REQ-5: at least 7440).
    pub tcp_established: u32,
    /// TCP, opening or closing (RFC 5382 REQ-5: at least 240).
    pub tcp_transitory: u32,
    /// Fragments of one datagram (RFC 1122 3.3.2: 60 to 120 is for hosts; a gateway need not hold that long).
    pub reassembly: u32,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            udp: 300,
            udp_dns: 10,
            icmp: 60,
            tcp_established: 7440,
            tcp_transitory: 240,
            reassembly: 30,
        }
    }
}

/// The configuration of a network.
#[derive(Clone)]
pub struct NetworkConfig {
    /// Whether anything leaves.
    pub mode: NetMode,
    /// The gateway's MAC.
    pub gateway_mac: Mac,
    /// The gateway's IPv4 address, inside `subnet4`.
    pub gateway4: Ipv4Addr,
    /// The IPv4 subnet: address and prefix length (8 to 30).
    pub subnet4: (Ipv4Addr, u8),
    /// The gateway's IPv6 address, and the length of the prefix, which is 64. `None`: the gateway has no IPv6.
    pub gateway6: Option<(Ipv6Addr, u8)>,
    /// The domains that guests search, for router advertisements (RFC 8106).
    pub search: Vec<String>,
    /// Whether the host has IPv6 at the start: else the gateway is no router of IPv6 until it has
    /// (`Network::set_upstream6`).
    pub upstream6: bool,
    /// The address that guests name the host's 127.0.0.1 by; `None` keeps the host's loopback out of reach.
    pub host_loopback: Option<IpAddr>,
    /// Which guests open no flows to other guests.
    pub isolated: Isolated,
    /// Addresses that are promised to a MAC (static leases): no other guest takes such an address, and none has
    /// such a MAC besides its own.
    pub reserved: BTreeMap<IpAddr, Mac>,
    /// Bounds.
    pub limits: Limits,
    /// Timeouts.
    pub timeouts: Timeouts,
    /// UDP filtering.
    pub filtering: Filtering,
    /// Random bytes that key the hash of the flow table and the ISNs. From the operating system, never shown.
    pub secret: [u8; 32],
}

impl NetworkConfig {
    /// A `nat` network with default limits.
    #[must_use]
    pub fn new(
        gateway_mac: Mac,
        gateway4: Ipv4Addr,
        subnet4: (Ipv4Addr, u8),
        secret: [u8; 32],
    ) -> NetworkConfig {
        NetworkConfig {
            mode: NetMode::Nat,
            gateway_mac,
            gateway4,
            subnet4,
            gateway6: None,
            search: Vec::new(),
            upstream6: true,
            host_loopback: None,
            isolated: Isolated::default(),
            reserved: BTreeMap::new(),
            limits: Limits::default(),
            timeouts: Timeouts::default(),
            filtering: Filtering::default(),
            secret,
        }
    }
}

/// The upstream DNS servers, and how they are queried.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NameServers {
    /// In the order in which they are tried.
    pub servers: Vec<SocketAddr>,
    /// Milliseconds for each attempt.
    pub timeout_ms: u64,
    /// Attempts for each server.
    pub attempts: u32,
    /// Each query starts with the next server.
    pub rotate: bool,
    /// Queries go over TCP only.
    pub use_tcp: bool,
}

/// The address belongs to another port, or to the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("address {0} is in use")]
pub struct AddressInUse(pub IpAddr);

/// Where a forward leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ForwardSpec {
    /// IP protocol: TCP or UDP.
    pub proto: u8,
    /// The guest's address and port.
    pub guest: SocketAddr,
    /// Who opened the port.
    pub entry: Entry,
}

impl ForwardSpec {
    /// A port that the owner of the network published.
    #[must_use]
    pub fn published(proto: u8, guest: SocketAddr) -> ForwardSpec {
        ForwardSpec { proto, guest, entry: Entry::Published }
    }
}

/// An error that the host's kernel reported for a datagram or echo request (IP_RECVERR).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DatagramError<'a> {
    /// What the kernel made of it.
    pub kind: SockError,
    /// Who sent the ICMP error; `None` when it arose on this host.
    pub offender: Option<IpAddr>,
    /// ICMP type as it came (0 when it arose on this host).
    pub icmp_type: u8,
    /// ICMP code as it came.
    pub icmp_code: u8,
    /// Next-hop MTU for "fragmentation needed", else 0.
    pub mtu: u16,
    /// Where the datagram went; for echo the port is 0.
    pub dst: SocketAddr,
    /// Echo: the sequence number quoted.
    pub seq: u16,
    /// The payload quoted, as far as the error carried it; may be empty.
    pub payload: &'a [u8],
}

/// One flow, for listings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlowInfo {
    /// The flow.
    pub flow: FlowId,
    /// The port of the guest.
    pub port: PortId,
    /// IP protocol.
    pub proto: u8,
    /// The guest's side.
    pub guest: SocketAddr,
    /// The other side, as the guest names it; for ICMP the port is 0.
    pub remote: SocketAddr,
    /// True when the outside opened it.
    pub inbound: bool,
    /// Stable lower-case word for its state ("established", "one_way", "assured", ...).
    pub state: &'static str,
    /// Bytes of payload from the guest.
    pub bytes_out: u64,
    /// Bytes of payload to the guest.
    pub bytes_in: u64,
    /// Milliseconds since it was opened.
    pub age_ms: u64,
    /// Milliseconds since it last carried something.
    pub idle_ms: u64,
}

/// One port, for listings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortInfo {
    /// The port.
    pub port: PortId,
    /// The MAC that belongs to it, once known.
    pub mac: Option<Mac>,
    /// Addresses assigned or learned.
    pub addresses: Vec<IpAddr>,
    /// IP MTU.
    pub mtu: u16,
    /// Live flows.
    pub flows: u32,
    /// Bytes buffered for its TCP flows.
    pub buffered: usize,
}
