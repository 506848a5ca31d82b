//! Theory of operation: limits as the owner sets them, as plain data. The control side reads texts such as `10mbit/2mbit`.

/// Limits of a guest, of the network, or of the flows that a rule admits. `None` and 0 in a field mean no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct LimitSpec {
    /// Bytes a second from guests: of payload over sockets, of IP packets on an uplink of packets.
    pub up: Option<u64>,
    /// Bytes a second to guests: of frames.
    pub down: Option<u64>,
    /// Packets a second from guests.
    pub packets_up: Option<u64>,
    /// Packets a second to guests.
    pub packets_down: Option<u64>,
    /// New flows a second.
    pub new_flows: Option<u64>,
    /// Flows that are open at the same time.
    pub open_flows: Option<u32>,
    /// DNS queries a second.
    pub queries: Option<u64>,
    /// Bytes both ways together, after which nothing passes any more.
    pub total: Option<u64>,
}

impl LimitSpec {
    /// The same for one of `parts` workers that share the limit.
    #[must_use]
    pub fn part(&self, parts: usize) -> LimitSpec {
        let parts = u64::try_from(parts.max(1)).unwrap_or(u64::MAX);
        let of = |n: Option<u64>| n.map(|n| n.div_ceil(parts));
        LimitSpec {
            up: of(self.up),
            down: of(self.down),
            packets_up: of(self.packets_up),
            packets_down: of(self.packets_down),
            new_flows: of(self.new_flows),
            open_flows: self.open_flows.map(|n| n.div_ceil(u32::try_from(parts).unwrap_or(u32::MAX))),
            queries: of(self.queries),
            total: of(self.total),
        }
    }
}
