//! What the relay accounts to each guest: its flows, sockets and memory.

use crate::interface::types::Time;
use crate::relay::tcp::Budget;
use crate::tables::flow::List;

/// The accounts of one guest, by the port that it is on.
#[derive(Debug)]
pub(super) struct Guest {
    /// Records in the flow table, mappings not counted.
    pub flows: u32,
    /// Mappings, each with one socket.
    pub sockets: u32,
    /// All its flows, mappings not counted.
    pub records: List,
    /// Flows that may be evicted to make room for another one, least recently used first: datagram flows that were not
    /// answered more than once, and TCP flows that are being opened or in TIME-WAIT.
    pub lru: List,
    /// TCP flows that wait for the port to take frames again.
    pub waiting: List,
    /// Bytes of the kernel's memory that its TCP flows hold, as measured.
    pub socket_memory: usize,
    /// How many of its flows hold some.
    pub stuck: u32,
    /// Buffered bytes of its TCP flows.
    pub budget: Budget,
    /// When its idle TCP connections were last checked all together.
    pub rechecked: Time,
}

impl Guest {
    /// A guest without flows, which may have so many bytes buffered.
    pub fn new(buffer: usize, now: Time) -> Guest {
        Guest {
            flows: 0,
            sockets: 0,
            records: List::default(),
            lru: List::default(),
            waiting: List::default(),
            socket_memory: 0,
            stuck: 0,
            budget: Budget { used: 0, limit: buffer },
            rechecked: now,
        }
    }
}
