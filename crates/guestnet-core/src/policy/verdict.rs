//! Theory of operation: what is asked of the policy and what it answers. A caller describes the first packet of a
//! flow as a [`Request`] and acts on the [`Verdict`]. Everything here is plain data.

use crate::interface::stats::DropReason;
use crate::interface::types::PortId;
use std::net::SocketAddr;

/// How a flow from the outside reaches a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Entry {
    /// Through a port that the owner of the network published.
    Published,
    /// Through a port that the guest opened for itself (PCP).
    GuestPort,
    /// Through the mapping of a flow that the guest opened, within the filtering rule.
    Mapping,
}

/// Which way a flow goes, seen from the guest that it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// A guest opens a flow to the outside.
    Outbound,
    /// The outside opens a flow to a guest.
    Inbound(Entry),
    /// A guest opens a flow to another guest of the network.
    BetweenGuests,
}

impl Direction {
    /// The stable name of the direction, in snake case.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Direction::Outbound => "outbound",
            Direction::Inbound(_) => "inbound",
            Direction::BetweenGuests => "between_guests",
        }
    }

    /// Returns true when the outside opened the flow.
    #[must_use]
    pub fn is_inbound(self) -> bool {
        matches!(self, Direction::Inbound(_))
    }
}

/// A flow that is about to be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Which way it goes.
    pub direction: Direction,
    /// The guest's port; between guests, that of the guest that opens the flow.
    pub endpoint: PortId,
    /// IP protocol.
    pub protocol: u8,
    /// Where the flow comes from. The port is 0 where the protocol has none or a fragment hides it.
    pub source: SocketAddr,
    /// Where it goes to, as the sender names it.
    pub destination: SocketAddr,
}

/// A rule of a [`crate::policy::RuleSet`]: its place in the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleId(pub u16);

impl RuleId {
    /// No rule: connections to services of the gateway.
    pub const NONE: RuleId = RuleId(u16::MAX);
}

/// Counts the changes of the rules. A flow carries the generation that admitted it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Generation(pub u32);

impl Generation {
    /// The generation after this one.
    #[must_use]
    pub fn next(self) -> Generation {
        Generation(self.0.wrapping_add(1))
    }
}

/// Names a pending flow, see [`crate::policy::pending::PendingFlows`]. A ticket is never given out twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ticket(pub u64);

/// The answer to a [`Request`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The flow may be opened.
    Allow {
        /// Where it goes, which is not always the destination that the guest names.
        target: SocketAddr,
        /// The rule that decided.
        rule: RuleId,
    },
    /// The flow is refused.
    Deny {
        /// Why.
        reason: DropReason,
        /// The rule that decided.
        rule: RuleId,
    },
    /// The flow has to wait; it is pending under the ticket.
    Defer {
        /// Names the pending flow.
        ticket: Ticket,
    },
}
