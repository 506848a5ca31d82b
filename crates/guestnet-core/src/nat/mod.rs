//! Theory of operation: a NAPT for IPv4 (RFC 3022) that rewrites packets in place, without I/O and without a clock.
//! [`NatEngine::translate`] takes an IP packet, the direction it travels and the time.
//!
//! - [`table`] holds the sessions, the free external ports, the expiry wheel and the TCP states.
//! - [`outbound`] and [`inbound`] translate one packet; [`batch`] is the fast path for groups of packets.
//! - [`packet`] reads and rewrites headers, ICMP errors and fragments, and queues the packets that the engine sends
//!   itself (ICMP errors and fragments).
//! - [`l3_uplink`] joins an engine to a network whose uplink is a TUN device.
//!
//! IPv6 packets pass unchanged.

mod batch;
mod config;
mod engine;
mod events;
mod inbound;
pub(crate) mod l3_uplink;
mod outbound;
mod packet;
mod stats;
pub mod table;

pub use batch::{Contiguous, PacketBatch};
pub use config::{Behaviour, NatConfigError, NatEngineConfig, NatTimeouts, Prefix, Refusal};
pub use engine::{ForwardError, NatEngine};
pub use events::NatEvent;
pub use stats::{ConnTrackStats, Connection, NatStats};
pub use table::state::ConnState;
pub use table::{hash, index, ports};

use crate::interface::stats::DropReason;

/// Which way a packet travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum NatDirection {
    /// From a guest to the outside.
    Outbound = 0,
    /// From the outside to a guest.
    Inbound = 1,
}

/// What became of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NatResult {
    /// Rewritten; send it on in its direction.
    Translated,
    /// Rewritten at both ends; it was outbound and goes to another guest.
    Hairpinned,
    /// None of the NAT's business; unchanged.
    PassThrough,
    /// A fragment that waits for the first of its packet; unchanged. It comes out of
    /// [`NatEngine::poll_output`] later. Do not send it.
    Held,
    /// Rewritten, and too big for the next link: its fragments wait in [`NatEngine::poll_output`]. Do not
    /// send it.
    Fragmented,
    /// Bigger than this MTU and must not be cut; unchanged. Its sender is told by ICMP. Do not send it.
    TooBig(u16),
    /// Refused for this reason; unchanged. Do not send it.
    Dropped(DropReason),
}
