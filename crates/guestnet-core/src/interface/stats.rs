//! Theory of operation: plain counters that one worker owns and increments; the I/O side publishes them.
//! Every drop has a reason, every reason a counter and a name that does not change between releases.

use guestnet_wire::WireError;

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// Why something was dropped or refused.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum DropReason { $($(#[$doc])* $name,)* }
        impl DropReason {
            /// All reasons, in the order of their numbers.
            pub const ALL: &'static [DropReason] = &[$(DropReason::$name,)*];
            /// The stable name of the reason, in snake case.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(DropReason::$name => $text,)* }
            }
        }
    };
}

reasons! {
    /// Shorter than its headers say.
    Truncated = "truncated",
    /// Longer than the attachment or MTU allows.
    Oversized = "oversized",
    /// Header fields that contradict each other.
    Malformed = "malformed",
    /// IPv4 header checksum wrong.
    BadIpChecksum = "bad_ip_checksum",
    /// Transport checksum wrong.
    BadL4Checksum = "bad_l4_checksum",
    /// EtherType, tag or IP protocol that guestnet does not carry.
    UnsupportedProtocol = "unsupported_protocol",
    /// Source MAC is a group address, the gateway's, or another port's.
    SpoofedMac = "spoofed_mac",
    /// Source address belongs to another port, to the gateway, or not to the subnet.
    SpoofedSource = "spoofed_source",
    /// A destination that nothing can be sent to (0/8, 127/8, 224/4 and above, port 0).
    BadDestination = "bad_destination",
    /// Refused by policy or by `host_only`.
    Policy = "policy",
    /// TTL ran out here.
    TtlExpired = "ttl_expired",
    /// The per-endpoint cap of flows is reached.
    FlowLimit = "flow_limit",
    /// The table of flows is full.
    TableFull = "table_full",
    /// The per-endpoint cap of buffered bytes is reached.
    BufferLimit = "buffer_limit",
    /// Fragments: too many, overlapping, or timed out.
    Reassembly = "reassembly",
    /// A rate limit (ICMP errors, ARP).
    RateLimit = "rate_limit",
    /// The port that it goes to is full.
    PortFull = "port_full",
    /// No endpoint has the destination.
    NoEndpoint = "no_endpoint",
    /// No flow matches a segment that does not open one.
    NoFlow = "no_flow",
    /// Outside the window, a duplicate, or an old segment.
    OutOfWindow = "out_of_window",
    /// From an address that the flow did not talk to (filtering, RFC 4787 REQ-8).
    Filtered = "filtered",
    /// The host refused a send.
    HostError = "host_error",
    /// The event ring to the control side is full.
    EventRingFull = "event_ring_full",
    /// The per-endpoint cap of external ports is reached.
    PortLimit = "port_limit",
    /// No external port is free.
    PortsExhausted = "ports_exhausted",
    /// The ring to the worker that has the port is full.
    WorkerFull = "worker_full",
    /// A conversation that a rule about a name admits cannot be understood.
    NotUnderstood = "not_understood",
    /// A ClientHello may hide its name (ECH), and the policy refuses that.
    HiddenName = "hidden_name",
    /// The owner is asked about the flow, which waits. Its first packet is held; later ones are not needed.
    AwaitingDecision = "awaiting_decision",
}

impl From<WireError> for DropReason {
    /// The reason to drop bytes that are not the header that they claim to be.
    fn from(e: WireError) -> DropReason {
        match e {
            WireError::Truncated => DropReason::Truncated,
            WireError::Malformed => DropReason::Malformed,
            WireError::BadChecksum => DropReason::BadL4Checksum,
            WireError::Unsupported => DropReason::UnsupportedProtocol,
        }
    }
}

/// Counters of one worker or one port. They never fall.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counters {
    /// Frames from guests.
    pub rx_frames: u64,
    /// Bytes in those.
    pub rx_bytes: u64,
    /// Frames to guests.
    pub tx_frames: u64,
    /// Bytes in those.
    pub tx_bytes: u64,
    /// Flows opened, all protocols.
    pub flows_opened: u64,
    /// Flows closed.
    pub flows_closed: u64,
    /// TCP segments sent again.
    pub retransmits: u64,
    /// ICMP errors sent to guests.
    pub icmp_errors: u64,
    /// DNS queries answered from the cache.
    pub dns_hits: u64,
    /// Other DNS queries.
    pub dns_misses: u64,
    /// Those of them that were asked of name servers at once, duplicates of others included; the rest was asked of the
    /// control side, or refused.
    pub dns_asked: u64,
    /// DNS queries refused because their guest was over its share.
    pub dns_refused: u64,
    /// DNS queries that no name server responded to.
    pub dns_unanswered: u64,
    /// Drops by reason, indexed by `DropReason as usize`.
    pub drops: [u64; DropReason::ALL.len()],
}

impl Default for Counters {
    fn default() -> Self {
        Counters {
            rx_frames: 0,
            rx_bytes: 0,
            tx_frames: 0,
            tx_bytes: 0,
            flows_opened: 0,
            flows_closed: 0,
            retransmits: 0,
            icmp_errors: 0,
            dns_hits: 0,
            dns_misses: 0,
            dns_asked: 0,
            dns_refused: 0,
            dns_unanswered: 0,
            drops: [0; DropReason::ALL.len()],
        }
    }
}

impl Counters {
    /// Counts one drop.
    #[inline]
    pub fn drop(&mut self, why: DropReason) {
        if let Some(c) = self.drops.get_mut(why as usize) {
            *c += 1;
        }
    }

    /// Adds another's to these.
    pub fn add(&mut self, other: &Counters) {
        let Counters { rx_frames, rx_bytes, tx_frames, tx_bytes, .. } = other;
        self.rx_frames += rx_frames;
        self.rx_bytes += rx_bytes;
        self.tx_frames += tx_frames;
        self.tx_bytes += tx_bytes;
        self.flows_opened += other.flows_opened;
        self.flows_closed += other.flows_closed;
        self.retransmits += other.retransmits;
        self.icmp_errors += other.icmp_errors;
        self.dns_hits += other.dns_hits;
        self.dns_misses += other.dns_misses;
        self.dns_asked += other.dns_asked;
        self.dns_refused += other.dns_refused;
        self.dns_unanswered += other.dns_unanswered;
        for (mine, theirs) in self.drops.iter_mut().zip(&other.drops) {
            *mine += theirs;
        }
    }
}
