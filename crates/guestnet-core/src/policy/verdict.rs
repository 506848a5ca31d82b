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

/// A rule that decided: one of the built-in ones ([`crate::policy::RuleSet`]), or one of the owner's
/// ([`crate::policy::table::RuleTable`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleId(u32);

/// Above the numbers of the owner's rules, below what stands for the default.
const BUILT_IN: u32 = 0xfe00_0000;

impl RuleId {
    /// No rule: connections to services of the gateway.
    pub const NONE: RuleId = RuleId(BUILT_IN - 1);

    /// A built-in rule: its place in the order.
    #[must_use]
    pub fn built_in(at: u16) -> RuleId {
        RuleId(BUILT_IN | u32::from(at))
    }

    /// A rule of the policy that holds for the guest: its place in the order, or what stands for the default.
    #[must_use]
    pub fn owner(number: u32) -> RuleId {
        RuleId(number)
    }

    /// The place of a built-in rule, or as the error the number of one of the owner's.
    ///
    /// # Errors
    /// It is not a built-in rule.
    pub fn number(self) -> Result<u16, u32> {
        match u16::try_from(self.0 ^ BUILT_IN) {
            Ok(at) => Ok(at),
            Err(_) => Err(self.0),
        }
    }
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
    /// The flow may be opened, but the name that its conversation shows decides whether it goes on.
    Inspect {
        /// Where it goes.
        target: SocketAddr,
        /// The rule that would admit it.
        rule: RuleId,
        /// No byte of either side passes before that. Otherwise those of the server do.
        strict: bool,
    },
    /// The owner has to be asked whether the flow may be opened.
    Ask {
        /// Where it goes.
        target: SocketAddr,
        /// The rule that asks.
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

impl Verdict {
    /// The verdict on a flow that is open already, by the rule `opened_by`: what the owner has answered for that rule is not
    /// asked again.
    #[must_use]
    pub fn after_asking(self, opened_by: RuleId) -> Verdict {
        match self {
            Verdict::Ask { target, rule } if rule == opened_by => Verdict::Allow { target, rule },
            other => other,
        }
    }
}
