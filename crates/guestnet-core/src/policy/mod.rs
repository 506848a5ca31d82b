//! Theory of operation: [`Policy`] decides whether a flow may be opened. It is asked once, with a [`Request`] for the
//! flow's first packet: for flows to the outside (relayed or translated), for flows from the outside and for flows
//! between guests. The packets that follow do not ask.
//!
//! - [`rule`] has the rules: an ordered list, of which the first that matches decides.
//! - [`verdict`] has the question and the answer.
//! - [`admission`] has the questions that callers ask.
//! - [`pending`] keeps flows that have to wait before they can be opened.
//! - [`conversations`] remembers what guests say to each other, where rules ask about that.
//! - [`refusal`] tells guests what was refused.
//! - [`denials`] limits how many refused flows are reported.
//! - [`special`] says which addresses mean something by themselves.
//!
//! A flow carries the [`Generation`] of the rules that admitted it. When the rules change, flows of an older
//! generation are judged again, a few at a time ([`sweep`]), and those that are no longer allowed are cut.

mod admission;
pub mod conversations;
pub mod denials;
pub mod pending;
mod refusal;
pub mod rule;
pub mod special;
pub mod sweep;
pub mod verdict;

use crate::interface::config::NetworkConfig;
pub use crate::interface::types::Isolated;
use crate::interface::types::NetMode;
use crate::tables::addressing::Subnet;
use crate::util::siphash::SipKey;
pub(crate) use admission::Admitted;
use conversations::Conversations;
use pending::PendingFlows;
pub use rule::{RuleSet, Settings};
pub use special::is_special;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use sweep::Sweep;
pub use verdict::{Direction, Entry, Generation, Request, RuleId, Ticket, Verdict};

/// The policy of a network: its rules and what addresses mean to its guests.
pub struct Policy {
    settings: Settings,
    rules: RuleSet,
    generation: Generation,
    subnet: Subnet,
    gateway4: Ipv4Addr,
    /// Flows that wait before they are opened.
    pub(crate) pending: PendingFlows,
    /// What guests say to each other.
    pub(crate) conversations: Conversations,
    /// The sweep that a change of the rules began, while it goes on.
    pub(crate) sweep: Option<Sweep>,
    /// How many flows the last sweep has cut, until that is asked for.
    cut: Option<u64>,
}

impl Policy {
    /// The policy that a configuration describes.
    #[must_use]
    pub fn new(c: &NetworkConfig) -> Policy {
        let settings =
            Settings { mode: c.mode, host_loopback: c.host_loopback, isolated: c.isolated.clone() };
        let subnet = Subnet::new(c.subnet4.0, c.subnet4.1);
        Policy {
            rules: RuleSet::built_in(&settings, subnet),
            settings,
            generation: Generation::default(),
            subnet,
            gateway4: c.gateway4,
            pending: PendingFlows::new(c.limits.neighbour_waiting),
            conversations: Conversations::new(SipKey::from_secret(&c.secret, 0)),
            sweep: None,
            cut: None,
        }
    }

    /// Decides about a flow.
    #[inline]
    #[must_use]
    pub fn judge(&self, request: &Request) -> Verdict {
        self.rules.judge(request)
    }

    /// Returns true when no flow between guests can be denied, so that nobody has to ask about one.
    #[inline]
    #[must_use]
    pub fn guests_pass(&self) -> bool {
        self.rules.guests_pass()
    }

    /// The generation of the rules in force.
    #[inline]
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The settings that the rules in force are made from.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The label of a rule in force.
    #[must_use]
    pub fn label(&self, rule: RuleId) -> Arc<str> {
        self.rules.label(rule)
    }

    /// Puts other rules in force and begins a sweep: flows that older rules admitted are judged again.
    pub fn change(&mut self, mode: NetMode, isolated: Isolated) {
        (self.settings.mode, self.settings.isolated) = (mode, isolated);
        self.rules = RuleSet::built_in(&self.settings, self.subnet);
        self.generation = self.generation.next();
        let unfinished = self.sweep.map_or(0, |s| s.cut);
        self.sweep = Some(Sweep::new(unfinished + self.cut.take().unwrap_or(0)));
    }

    /// Ends the sweep.
    pub(crate) fn finish_sweep(&mut self) {
        self.cut = self.sweep.take().map(|s| s.cut);
    }

    /// Takes how many flows the last change of the rules has cut. `None` while that is not known, and when it was taken.
    pub fn take_cut(&mut self) -> Option<u64> {
        self.cut.take()
    }

    /// The address by which a guest knows an outside address that sent something on a flow of the guest: the
    /// reverse of the target of [`Verdict::Allow`]. `None` for addresses that no guest is to see.
    #[must_use]
    pub fn name_of(&self, outside: IpAddr) -> Option<IpAddr> {
        match outside {
            IpAddr::V4(a) if a.is_loopback() => self.settings.host_loopback,
            other if is_special(other) || self.subnet.contains(other) => None,
            other => Some(other),
        }
    }

    /// The address by which a guest knows a client that came through a published port: the client's own, or the
    /// gateway's where the client's means something else to the guest (loopback, the subnet, another family).
    #[must_use]
    pub fn client_name(&self, client: IpAddr) -> IpAddr {
        match client.to_canonical() {
            ip @ IpAddr::V4(_) if !is_special(ip) && !self.subnet.contains(ip) => ip,
            _ => IpAddr::V4(self.gateway4),
        }
    }
}

#[cfg(test)]
mod tests;
