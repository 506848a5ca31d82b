//! Theory of operation: everything that can be chosen about a [`crate::nat::NatEngine`], with the defaults that the
//! RFCs ask for, checked once when the engine is made, so that the packet path trusts it.

use std::net::Ipv4Addr;

/// How much of the other side's address a mapping or a filter depends on (RFC 4787 4.1 and 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Behaviour {
    /// Not at all.
    EndpointIndependent,
    /// On the address.
    #[default]
    AddressDependent,
    /// On address and port.
    AddressAndPortDependent,
}

/// What the guest is told when a new flow is refused by a cap or by policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Refusal {
    /// ICMP 3/13, communication administratively prohibited (RFC 5508 REQ-8).
    #[default]
    Prohibited,
    /// ICMP 3/1, host unreachable, a soft error (RFC 6888 REQ-11).
    HostUnreachable,
    /// Nothing.
    Silent,
}

/// An IPv4 prefix.
///
/// # Examples
/// ```
/// use guestnet_core::nat::Prefix;
///
/// let inside = Prefix::new("192.168.64.0".parse()?, 24).expect("a length of at most 32");
/// assert!(inside.contains("192.168.64.2".parse()?));
/// assert!(!inside.contains("192.168.65.2".parse()?));
/// # Ok::<(), std::net::AddrParseError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Prefix {
    pub(crate) net: u32,
    pub(crate) mask: u32,
}

impl Prefix {
    /// The prefix of this length that contains `address`; `None` for a length over 32.
    #[must_use]
    pub fn new(address: Ipv4Addr, len: u8) -> Option<Prefix> {
        let mask = match len {
            0 => 0,
            1..=32 => u32::MAX << (32 - len),
            _ => return None,
        };
        Some(Prefix { net: u32::from(address) & mask, mask })
    }

    /// True when the address is in it.
    #[inline]
    #[must_use]
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        self.has(u32::from(address))
    }

    #[inline]
    pub(crate) fn has(&self, address: u32) -> bool {
        address & self.mask == self.net
    }
}

/// Timeouts in seconds, each 1 to 1,000,000.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NatTimeouts {
    /// UDP (RFC 4787 REQ-5: at least 120, default 300).
    pub udp: u32,
    /// UDP to port 53 once an answer came (REQ-5a).
    pub udp_dns: u32,
    /// ICMP queries (RFC 5508 REQ-2: at least 60).
    pub icmp: u32,
    /// Established TCP (RFC 5382 REQ-5: at least 7440).
    pub tcp_established: u32,
    /// Opening TCP (RFC 7857 2.2: 240).
    pub tcp_opening: u32,
    /// Closing TCP, and after a reset (RFC 7857 2.2: 240).
    pub tcp_closing: u32,
    /// GRE, ESP and SCTP, which are followed by address alone.
    pub other: u32,
    /// How long a fragment waits for the others of its packet.
    pub fragment: u32,
    /// How long a freed port rests (RFC 6888 REQ-8: 120). Its exceptions A and C apply: TCP, which has a state
    /// machine, and filtering other than endpoint-independent do not rest.
    pub port_hold: u32,
    /// How long an unsolicited SYN is neither answered nor refused (RFC 5382 REQ-4: at least 6).
    pub unsolicited_syn: u32,
}

impl Default for NatTimeouts {
    fn default() -> Self {
        NatTimeouts {
            udp: 300,
            udp_dns: 10,
            icmp: 60,
            tcp_established: 7440,
            tcp_opening: 240,
            tcp_closing: 240,
            other: 300,
            fragment: 15,
            port_hold: 120,
            unsolicited_syn: 6,
        }
    }
}

/// Configuration of a [`crate::nat::NatEngine`].
#[derive(Debug, Clone)]
pub struct NatEngineConfig {
    /// External addresses, 1 to 1024. An internal address keeps one of them (RFC 4787 REQ-2).
    pub external: Vec<Ipv4Addr>,
    /// What is inside.
    pub internal: Prefix,
    /// Where the gateway's ICMP errors to guests come from; `None`: the first address of `internal`.
    pub gateway: Option<Ipv4Addr>,
    /// External ports for TCP and UDP, first and last. Identifiers of ICMP queries use all of 0 to 65535.
    pub ports: (u16, u16),
    /// The most connections tracked at once, 1 to 16,777,214. Memory is touched as it is used.
    pub table_size: usize,
    /// Timeouts.
    pub timeouts: NatTimeouts,
    /// Mapping behaviour for UDP (RFC 4787 REQ-1: endpoint-independent).
    pub mapping_udp: Behaviour,
    /// Mapping behaviour for TCP (RFC 5382 REQ-1).
    pub mapping_tcp: Behaviour,
    /// Filtering behaviour for UDP and ICMP queries (RFC 4787 REQ-8).
    pub filtering_udp: Behaviour,
    /// Filtering behaviour for TCP (RFC 5382 REQ-3).
    pub filtering_tcp: Behaviour,
    /// Keep the guest's port where it is free (RFC 4787 4.2.1).
    pub port_preservation: bool,
    /// Keep its parity where the port cannot be kept (RFC 4787 REQ-4; RFC 7857 8 lets it be off).
    pub port_parity: bool,
    /// Inbound packets too keep a UDP or ICMP flow alive (RFC 4787 REQ-6a).
    pub inbound_refresh: bool,
    /// Outbound TCP segments without SYN may begin a flow, as after a restart of the engine.
    pub tcp_pickup: bool,
    /// Guests may reach each other by external address (RFC 4787 REQ-9).
    pub hairpin: bool,
    /// Decrement the TTL and answer when it runs out (RFC 3022 4.3, RFC 5508 REQ-10).
    pub decrement_ttl: bool,
    /// IP MTU towards the outside in bytes, 68 to 65535.
    pub mtu_outside: u16,
    /// IP MTU towards the inside in bytes, 68 to 65535.
    pub mtu_inside: u16,
    /// External ports per internal address, all protocols (RFC 6888 REQ-4).
    pub ports_per_endpoint: u32,
    /// Connections per internal address (RFC 6888 REQ-5).
    pub sessions_per_endpoint: u32,
    /// Within these caps an internal address has no more connections, and no more external ports of a protocol,
    /// than four times what is left of seven eighths of them: one alone gets 70 %, and some are left for those
    /// that have next to nothing.
    pub shares: bool,
    /// Destinations that are not translated (RFC 6888 REQ-6).
    pub no_nat: Vec<Prefix>,
    /// Destinations that are refused.
    pub denied: Vec<Prefix>,
    /// What a guest is told when it is refused.
    pub refusal: Refusal,
    /// Answer an unsolicited SYN with ICMP 3/3 after its time (RFC 5382 REQ-4); off is its "silent by policy".
    pub answer_unsolicited_syn: bool,
    /// ICMP errors that the engine makes per second for one guest, and for all of the outside; for all guests
    /// together 16 times as many.
    pub icmp_errors_per_second: u32,
    /// Sets of fragments followed at once, half of them in each direction, and of those an eighth of one
    /// source.
    pub fragment_sets: usize,
    /// Bytes of fragments kept until the first of their packet comes, half of them in each direction. A source
    /// has no more than it leaves to others.
    pub fragment_bytes: usize,
    /// Bytes of packets that wait to be fetched with [`crate::nat::NatEngine::poll_output`]. A sender has no more than
    /// it leaves to others.
    pub output_bytes: usize,
    /// Seeds hash keys and ports. From the system's random source; a fixed one makes tests repeatable.
    pub secret: [u8; 32],
}

/// What is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NatConfigError {
    /// No external address, or more than 1024.
    #[error("give 1 to 1024 external addresses, not {0}")]
    ExternalCount(usize),
    /// An address that no packet can come from.
    #[error("{0} cannot be an external address")]
    ExternalAddress(Ipv4Addr),
    /// An external address inside.
    #[error("external address {0} lies inside the internal network")]
    ExternalInside(Ipv4Addr),
    /// The same external address twice.
    #[error("external address {0} is given twice")]
    ExternalTwice(Ipv4Addr),
    /// First port 0 or over the last.
    #[error("port range {0}-{1} is empty or starts at 0")]
    PortRange(u16, u16),
    /// Not 1 to 16,777,214.
    #[error("table size {0} is not between 1 and 16777214")]
    TableSize(usize),
    /// A timeout of zero or over 1,000,000 seconds.
    #[error("timeout {0} is not between 1 and 1000000 seconds")]
    Timeout(&'static str),
    /// An MTU under 68.
    #[error("an MTU of {0} is under 68, the least that IPv4 allows")]
    Mtu(u16),
    /// A limit of zero.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
}

impl NatEngineConfig {
    /// The defaults, for one external address and the internal prefix 192.168.64.0/24.
    #[must_use]
    pub fn new(external: Ipv4Addr) -> NatEngineConfig {
        NatEngineConfig {
            external: vec![external],
            internal: Prefix { net: 0xc0a8_4000, mask: 0xffff_ff00 },
            gateway: None,
            ports: (49152, 65535),
            table_size: 65536,
            timeouts: NatTimeouts::default(),
            mapping_udp: Behaviour::EndpointIndependent,
            mapping_tcp: Behaviour::EndpointIndependent,
            filtering_udp: Behaviour::AddressDependent,
            filtering_tcp: Behaviour::AddressDependent,
            port_preservation: true,
            port_parity: true,
            inbound_refresh: true,
            tcp_pickup: true,
            hairpin: true,
            decrement_ttl: true,
            mtu_outside: 65535,
            mtu_inside: 65535,
            ports_per_endpoint: 65536,
            sessions_per_endpoint: u32::MAX,
            shares: false,
            no_nat: Vec::new(),
            denied: Vec::new(),
            refusal: Refusal::default(),
            answer_unsolicited_syn: true,
            icmp_errors_per_second: 100,
            fragment_sets: 1024,
            fragment_bytes: 1 << 20,
            output_bytes: 1 << 20,
            secret: [0; 32],
        }
    }

    /// Sets mapping behaviour for UDP and TCP.
    #[must_use]
    pub fn with_mapping(mut self, b: Behaviour) -> Self {
        (self.mapping_udp, self.mapping_tcp) = (b, b);
        self
    }

    /// Sets filtering behaviour for UDP, ICMP and TCP.
    #[must_use]
    pub fn with_filtering(mut self, b: Behaviour) -> Self {
        (self.filtering_udp, self.filtering_tcp) = (b, b);
        self
    }

    pub(crate) fn gateway_address(&self) -> u32 {
        self.gateway.map_or(self.internal.net.wrapping_add(1), u32::from)
    }

    /// Says what is wrong, if anything.
    ///
    /// # Errors
    /// The first [`NatConfigError`] found.
    pub fn validate(&self) -> Result<(), NatConfigError> {
        use NatConfigError as E;
        if self.external.is_empty() || self.external.len() > 1024 {
            return Err(E::ExternalCount(self.external.len()));
        }
        for (i, a) in self.external.iter().enumerate() {
            if !unicast(u32::from(*a)) {
                return Err(E::ExternalAddress(*a));
            }
            if self.internal.contains(*a) {
                return Err(E::ExternalInside(*a));
            }
            if self.external.iter().take(i).any(|b| b == a) {
                return Err(E::ExternalTwice(*a));
            }
        }
        if self.ports.0 == 0 || self.ports.0 > self.ports.1 {
            return Err(E::PortRange(self.ports.0, self.ports.1));
        }
        if self.table_size == 0 || self.table_size > crate::nat::table::index::MAX_RECORDS {
            return Err(E::TableSize(self.table_size));
        }
        let t = &self.timeouts;
        for (name, v) in [
            ("udp", t.udp),
            ("udp_dns", t.udp_dns),
            ("icmp", t.icmp),
            ("tcp_established", t.tcp_established),
            ("tcp_opening", t.tcp_opening),
            ("tcp_closing", t.tcp_closing),
            ("other", t.other),
            ("fragment", t.fragment),
            ("port_hold", t.port_hold),
            ("unsolicited_syn", t.unsolicited_syn),
        ] {
            if !(1..=1_000_000).contains(&v) {
                return Err(E::Timeout(name));
            }
        }
        for mtu in [self.mtu_outside, self.mtu_inside] {
            if mtu < 68 {
                return Err(E::Mtu(mtu));
            }
        }
        for (name, zero) in [
            ("ports per endpoint", self.ports_per_endpoint == 0),
            ("sessions per endpoint", self.sessions_per_endpoint == 0),
            ("ICMP errors per second", self.icmp_errors_per_second == 0),
            ("fragment sets", self.fragment_sets == 0),
        ] {
            if zero {
                return Err(E::Zero(name));
            }
        }
        Ok(())
    }
}

/// True for an address that one host can have: not 0/8, 127/8, 224/4 and above.
pub(crate) fn unicast(a: u32) -> bool {
    !matches!(a >> 24, 0 | 127 | 224..)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_configuration_is_a_typed_error() {
        use NatConfigError as E;
        let good = || NatEngineConfig::new(Ipv4Addr::new(203, 0, 113, 1));
        let bad = |f: fn(&mut NatEngineConfig)| {
            let mut c = good();
            f(&mut c);
            c.validate().err()
        };
        assert_eq!(good().validate(), Ok(()));
        assert_eq!(bad(|c| c.external.clear()), Some(E::ExternalCount(0)));
        assert_eq!(bad(|c| c.ports = (5, 4)), Some(E::PortRange(5, 4)));
        assert_eq!(bad(|c| c.ports = (0, 4)), Some(E::PortRange(0, 4)));
        let inside = Ipv4Addr::new(192, 168, 64, 9);
        assert_eq!(bad(|c| c.external[0] = Ipv4Addr::new(192, 168, 64, 9)), Some(E::ExternalInside(inside)));
        assert_eq!(
            bad(|c| c.external[0] = Ipv4Addr::LOCALHOST),
            Some(E::ExternalAddress(Ipv4Addr::LOCALHOST))
        );
        assert!(matches!(bad(|c| c.external.push(c.external[0])), Some(E::ExternalTwice(_))));
        assert_eq!(bad(|c| c.timeouts.udp = 0), Some(E::Timeout("udp")));
        assert_eq!(bad(|c| c.table_size = 0), Some(E::TableSize(0)));
        assert_eq!(bad(|c| c.mtu_inside = 67), Some(E::Mtu(67)));
        assert!(Prefix::new(inside, 33).is_none());
    }
}
