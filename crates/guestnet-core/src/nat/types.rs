//! Theory of operation: what the engine takes and gives: directions, results, errors and events. No other module of the
//! engine is imported here.

use crate::interface::stats::DropReason;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};

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
    /// [`NatEngine::poll_output`](crate::nat::NatEngine::poll_output) later. Do not send it.
    Held,
    /// Rewritten, and too big for the next link: its fragments wait in
    /// [`NatEngine::poll_output`](crate::nat::NatEngine::poll_output). Do not send it.
    Fragmented,
    /// Bigger than this MTU and must not be cut; unchanged. The sender gets an ICMP error. Do not send it.
    TooBig(u16),
    /// Refused for this reason; unchanged. Do not send it.
    Dropped(DropReason),
    /// It belongs to no session, and the engine is configured to ask
    /// ([`NatEngine::ask_before_sessions`](crate::nat::NatEngine::ask_before_sessions)); unchanged and not counted.
    /// Translate it again after [`NatEngine::admit_next`](crate::nat::NatEngine::admit_next), or do not send it.
    New,
}

impl NatDirection {
    /// The way that a packet leaves which travels in this direction: a hairpinned one goes inside.
    #[inline]
    pub(super) fn way(self, hairpin: bool) -> NatDirection {
        if hairpin { NatDirection::Inbound } else { self }
    }
}

/// Why a port cannot be published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ForwardError {
    /// Not TCP or UDP.
    #[error("only TCP and UDP ports can be published")]
    Protocol,
    /// Not one of the engine's external addresses.
    #[error("{0} is not an external address of this engine")]
    NotExternal(Ipv4Addr),
    /// Not an internal address.
    #[error("{0} is not inside the internal network")]
    NotInternal(Ipv4Addr),
    /// Port 0 at either end.
    #[error("port 0 cannot be published")]
    PortZero,
    /// A connection or another published port has it.
    #[error("external port {0} is in use")]
    InUse(SocketAddrV4),
    /// The engine translates IPv4 alone.
    #[error("{0} is not an IPv4 address")]
    NotIpv4(IpAddr),
    /// A forward with this number is there already.
    #[error("forward {0} exists already")]
    Exists(u32),
    /// There is no such published port.
    #[error("{0} is not a published port")]
    NotPublished(SocketAddrV4),
    /// The table has no room for one more mapping or internal address.
    #[error("the NAT table is full: try again when connections have ended, or use a larger table")]
    Full,
}

/// Something that happened to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NatEvent {
    /// It began.
    Began {
        /// Its number, which another may have after its end.
        id: u32,
        /// The outside opened it, through a published port or a mapping.
        inbound: bool,
    },
    /// It ended.
    Ended {
        /// Its number.
        id: u32,
        /// IP bytes outbound.
        bytes_out: u64,
        /// IP bytes inbound.
        bytes_in: u64,
    },
}
