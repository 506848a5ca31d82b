//! Theory of operation: a NAPT for IPv4 (RFC 3022) that rewrites packets in place, without I/O and without a
//! clock: [`NatEngine::translate`] takes an IP packet, the direction it travels and the time. [`table`] holds
//! who talks to whom, [`state`] what TCP is about, [`ports`] which external ports are free, [`wheel`] when
//! things end; [`outbound`], [`inbound`], [`icmp`] and [`fragments`] are the ways that a packet can go, and
//! [`batch`] the short way for most of them, with [`foresight`] of what new ones need. Packets that the engine itself sends (ICMP errors, fragments)
//! wait in [`output`]. IPv6 needs no NAT: it passes.

mod batch;
mod config;
mod engine;
mod foresight;
mod fragments;
pub mod hash;
mod icmp;
mod inbound;
pub mod index;
mod outbound;
mod output;
mod packet;
pub mod ports;
mod records;
mod state;
mod stats;
mod table;
mod watch;
pub mod wheel;

pub use batch::{Contiguous, PacketBatch};
pub use config::{Behaviour, NatConfigError, NatEngineConfig, NatTimeouts, Prefix, Refusal};
pub use engine::{ForwardError, NatEngine};
pub use state::ConnState;
pub use stats::{ConnTrackStats, Connection, NatStats};
pub use watch::NatNews;

use crate::stats::Drop;

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
    Dropped(Drop),
}
