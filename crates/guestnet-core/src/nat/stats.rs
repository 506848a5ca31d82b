//! Theory of operation: what a NAT engine counts, and what it shows of its connections. The engine owns the counters
//! and only ever increments them; a snapshot is a copy.

use crate::interface::stats::DropReason;

/// Counters of a [`crate::nat::NatEngine`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NatStats {
    /// Packets translated on the way out.
    pub outbound: u64,
    /// Packets translated on the way in.
    pub inbound: u64,
    /// Packets turned round to another guest.
    pub hairpinned: u64,
    /// Packets that are none of the NAT's business.
    pub passed: u64,
    /// Packets cut in fragments for the next link.
    pub fragmented: u64,
    /// Fragments kept until the first of their packet comes.
    pub held: u64,
    /// Packets too big for the next link that must not be cut.
    pub too_big: u64,
    /// ICMP errors made.
    pub icmp_errors: u64,
    /// Connections begun.
    pub created: u64,
    /// Connections that ran out.
    pub expired: u64,
    /// Packets that found their connection.
    pub hits: u64,
    /// Packets that did not.
    pub misses: u64,
    /// Drops by reason, indexed by `DropReason as usize`.
    pub drops: [u64; DropReason::ALL.len()],
}

impl Default for NatStats {
    fn default() -> Self {
        NatStats {
            outbound: 0,
            inbound: 0,
            hairpinned: 0,
            passed: 0,
            fragmented: 0,
            held: 0,
            too_big: 0,
            icmp_errors: 0,
            created: 0,
            expired: 0,
            hits: 0,
            misses: 0,
            drops: [0; DropReason::ALL.len()],
        }
    }
}

impl NatStats {
    /// Counts a drop.
    pub(crate) fn drop(&mut self, why: DropReason) {
        if let Some(c) = self.drops.get_mut(why as usize) {
            *c += 1;
        }
    }

    /// All drops.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.drops.iter().sum()
    }

    /// Drops for one reason.
    #[must_use]
    pub fn drops_for(&self, why: DropReason) -> u64 {
        self.drops.get(why as usize).copied().unwrap_or(0)
    }
}

/// What a [`crate::nat::NatEngine`] holds at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnTrackStats {
    /// Connections.
    pub connections: usize,
    /// Mappings of an internal to an external end.
    pub mappings: usize,
    /// External ports taken, resting ones included.
    pub ports: u64,
    /// Connections that there is room for.
    pub capacity: usize,
    /// Bytes of records and indexes.
    pub memory: usize,
    /// Connections begun so far.
    pub created: u64,
    /// Connections that ran out so far.
    pub expired: u64,
    /// Packets that found their connection.
    pub hits: u64,
    /// Packets that did not.
    pub misses: u64,
}

/// One connection, for display.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connection {
    /// IP protocol.
    pub proto: u8,
    /// State.
    pub state: crate::nat::ConnState,
    /// Internal end.
    pub internal: std::net::SocketAddrV4,
    /// External end that stands for it.
    pub external: std::net::SocketAddrV4,
    /// The other side; port 0 for ICMP.
    pub remote: std::net::SocketAddrV4,
    /// IP bytes outbound.
    pub bytes_out: u64,
    /// IP bytes inbound.
    pub bytes_in: u64,
}
