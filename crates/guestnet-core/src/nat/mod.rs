//! Theory of operation: a NAPT for IPv4 (RFC 3022) that rewrites packets in place, without I/O and without a clock.
//! [`NatEngine::translate`] takes an IP packet, the direction it travels and the time.
//!
//! - [`table`] holds the sessions, the free external ports, the expiry wheel and the TCP states.
//! - [`outbound`] and [`inbound`] translate one packet; [`batch`] is the fast path for groups of packets.
//! - [`packet`] reads and rewrites headers, ICMP errors and fragments, and queues the packets that the engine sends
//!   itself (ICMP errors and fragments).
//! - [`cut_connections`] has what is left of connections that a change of the rules has cut.
//! - [`l3_uplink`] joins an engine to a network whose uplink is a TUN device.
//!
//! IPv6 packets pass unchanged.

mod batch;
mod config;
mod cut_connections;
mod engine;
mod events;
mod expiry;
mod forwards;
mod inbound;
pub(crate) mod l3_uplink;
mod outbound;
mod packet;
mod stats;
pub mod table;
mod types;

pub use batch::{Contiguous, PacketBatch};
pub use config::{Behaviour, NatConfigError, NatEngineConfig, NatTimeouts, Prefix, Refusal};
pub use engine::NatEngine;
pub use stats::{ConnTrackStats, Connection, NatStats};
pub use table::state::ConnState;
pub use table::{hash, index, ports};
pub use types::{ForwardError, NatDirection, NatEvent, NatResult};
