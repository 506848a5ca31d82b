//! Theory of operation: [`Policy`] decides whether a flow may be opened. It is asked once, with a [`Request`] for the
//! flow's first packet: for flows to the outside (relayed or translated), for flows from the outside and for flows
//! between guests. The packets that follow do not ask.
//!
//! - [`rule`] has the built-in rules: an ordered list, of which the first that matches decides.
//! - [`spec`] has the owner's rules as plain data, and [`table`] compiled. They decide about what the built-in rules
//!   would allow; a network and each of its guests can have a table.
//! - [`verdict`] has the question and the answer.
//! - [`admission`] has the questions that callers ask.
//! - [`pins`] remembers for which names guests got which addresses.
//! - [`pending`] keeps flows that have to wait before they can be opened.
//! - [`conversations`] remembers what guests say to each other, where rules ask about that.
//! - [`refusal`] tells guests what was refused.
//! - [`denials`] limits how many refused flows are reported.
//! - [`shaping`] limits what guests carry.
//! - [`special`] says which addresses mean something by themselves.
//!
//! A flow carries the [`Generation`] of the rules that admitted it. When the rules change, flows of an older
//! generation are judged again, a few at a time ([`sweep`]), and those that are no longer allowed are cut.

mod admission;
pub mod asks;
pub mod conversations;
pub mod denials;
mod index;
pub mod name_budget;
pub mod pending;
pub mod pins;
mod refusal;
pub mod rule;
pub mod shaping;
pub mod spec;
pub mod special;
pub mod sweep;
pub mod table;
pub mod verdict;

use crate::interface::config::NetworkConfig;
use crate::interface::stats::DropReason;
pub use crate::interface::types::Isolated;
use crate::interface::types::{NetMode, PortId, Time};
use crate::tables::addressing::Subnet;
use crate::util::siphash::SipKey;
pub(crate) use admission::Admitted;
use conversations::Conversations;
use pending::PendingFlows;
use pins::Pins;
pub use rule::{RuleSet, Settings};
use shaping::{Owner, Shaping};
pub use spec::Action;
pub use special::is_special;
use special::{Surroundings, is_metadata};
use std::collections::{BTreeMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use sweep::{Budget, Sweep};
use table::{Decision, Outbound, RuleTable};
pub use table::{Evidence, NameDecision, Shown};
pub use verdict::{Direction, Entry, Generation, Request, RuleId, Ticket, Verdict};

/// The owner's rules.
#[derive(Default, Clone)]
struct Tables {
    network: Option<Arc<RuleTable>>,
    /// Of guests that have rules of their own.
    endpoints: BTreeMap<PortId, Arc<RuleTable>>,
    /// The addresses of this host.
    host: Arc<HashSet<IpAddr>>,
    /// One of them has rules about flows between guests.
    about_guests: bool,
}

impl Tables {
    #[inline]
    fn of(&self, endpoint: PortId) -> Option<&RuleTable> {
        if self.endpoints.is_empty() {
            return self.network.as_deref();
        }
        self.endpoints.get(&endpoint).or(self.network.as_ref()).map(|t| &**t)
    }
}

/// The policy of a network: its rules and what addresses mean to its guests.
pub struct Policy {
    settings: Settings,
    rules: RuleSet,
    tables: Tables,
    generation: Generation,
    subnet: Subnet,
    gateway4: Ipv4Addr,
    gateway6: Option<Ipv6Addr>,
    /// Flows whose rule says "ask".
    pub(crate) asks: asks::Asks,
    /// Flows that wait before they are opened.
    pub(crate) pending: PendingFlows,
    /// What guests say to each other.
    pub(crate) conversations: Conversations,
    /// For which names guests got which addresses.
    pub(crate) pins: Pins,
    /// Limits on what guests carry.
    pub(crate) shaping: Shaping,
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
        let subnet = Subnet::of(c);
        Policy {
            rules: RuleSet::built_in(&settings, subnet),
            tables: Tables::default(),
            settings,
            generation: Generation::default(),
            subnet,
            gateway4: c.gateway4,
            gateway6: c.gateway6.map(|(ip, _)| ip),
            asks: asks::Asks::default(),
            pending: PendingFlows::new(c.limits.neighbour_waiting),
            conversations: Conversations::new(SipKey::from_secret(&c.secret, 0)),
            pins: Pins::default(),
            shaping: Shaping::default(),
            sweep: None,
            cut: None,
        }
    }

    /// Decides about a flow of which nothing is known but its addresses.
    #[inline]
    #[must_use]
    pub fn judge(&self, request: &Request) -> Verdict {
        self.judge_with(request, Evidence::NONE)
    }

    /// Decides about a flow between guests. `to` is the port of the guest that it goes to, where that is known.
    #[must_use]
    pub fn judge_between(&self, request: &Request, to: Option<PortId>) -> Verdict {
        let (verdict, destination) = (self.rules.judge(request), request.destination);
        let (Some(table), Verdict::Allow { .. }) = (self.tables.of(request.endpoint), verdict) else {
            return verdict;
        };
        match table.judge_guests(request.endpoint, to, request.protocol, destination) {
            Some((Action::Deny, rule)) => {
                Verdict::Deny { reason: DropReason::Policy, rule: RuleId::owner(rule) }
            }
            Some((Action::Allow | Action::Ask, _)) | None => verdict,
        }
    }

    /// Decides about a flow.
    #[inline]
    #[must_use]
    pub fn judge_with(&self, request: &Request, evidence: Evidence<'_>) -> Verdict {
        let verdict = self.rules.judge(request);
        match self.tables.of(request.endpoint) {
            None => verdict,
            Some(table) => self.judge_by(table, request, evidence, verdict),
        }
    }

    /// Decides about a flow of the guest in `slot` to the outside that has shown this.
    pub(crate) fn judge_pinned(
        &mut self,
        now: Time,
        slot: u32,
        request: &Request,
        shown: Shown<'_>,
    ) -> Verdict {
        if self.tables.of(request.endpoint).is_none() {
            return self.rules.judge(request);
        }
        let ip = request.destination.ip();
        self.pins.prune(slot, ip, now);
        self.judge_with(request, Evidence { pins: self.pins.of(slot, ip), shown })
    }

    /// What a flow belongs to, for its limits. `rule` admitted it.
    pub(crate) fn owner(&self, endpoint: PortId, slot: u32, rule: RuleId) -> Owner {
        let rule = rule
            .number()
            .err()
            .map(|number| (self.tables.endpoints.contains_key(&endpoint).then_some(endpoint), number));
        Owner { slot, rule: rule.filter(|(port, number)| self.shaping.has_rule(*port, *number)) }
    }

    /// How a flow that the owner allowed is inspected: strictly where its rule is about a name that the conversation shows.
    pub(crate) fn inspects_after_asking(&self, request: &Request, rule: RuleId) -> Option<bool> {
        let table = self.tables.of(request.endpoint)?;
        table.inspects_after_asking(&self.flow(request, Evidence::NONE), rule.number().err()?)
    }

    /// Decides again about a flow to the outside that nobody has looked at. It may have shown any of the names of its
    /// address, or none: it is allowed if no rule denies it for one of these.
    pub(crate) fn judge_unread(&mut self, now: Time, slot: u32, request: &Request) -> Verdict {
        let verdict = self.judge_pinned(now, slot, request, Shown::NotYet);
        if !matches!(verdict, Verdict::Inspect { strict: false, .. }) {
            return verdict;
        }
        let pins = self.pins.of(slot, request.destination.ip());
        let judge = |shown| self.judge_with(request, Evidence { pins, shown });
        let names = pins.iter().map(|n| judge(Shown::Name(n.as_bytes())));
        let denied = names.into_iter().find(|v| matches!(v, Verdict::Deny { .. }));
        denied.unwrap_or_else(|| judge(Shown::Nothing))
    }

    /// What the owner's rules make of the verdict of the built-in ones.
    fn judge_by(&self, table: &RuleTable, r: &Request, evidence: Evidence<'_>, built_in: Verdict) -> Verdict {
        let (reason, destination) = (DropReason::Policy, r.destination);
        match (r.direction, built_in) {
            (Direction::Outbound, Verdict::Allow { target, .. }) => {
                match table.judge(&self.flow(r, evidence)) {
                    Decision::Allow { rule } => Verdict::Allow { target, rule: RuleId::owner(rule) },
                    Decision::Inspect { rule, strict } => {
                        Verdict::Inspect { target, rule: RuleId::owner(rule), strict }
                    }
                    Decision::Ask { rule } => Verdict::Ask { target, rule: RuleId::owner(rule) },
                    Decision::Deny { rule } => Verdict::Deny { reason, rule: RuleId::owner(rule) },
                }
            }
            (Direction::Outbound, Verdict::Deny { .. }) if can_be_lifted(destination.ip()) => {
                match table.lifts(&self.flow(r, evidence)) {
                    Some(rule) => Verdict::Allow { target: destination, rule: RuleId::owner(rule) },
                    None => built_in,
                }
            }
            (Direction::Inbound(_), Verdict::Allow { .. }) => {
                let client = r.source.ip();
                match table.judge_inbound(r.endpoint, r.protocol, client, destination.port()) {
                    Some((Action::Deny, rule)) => Verdict::Deny { reason, rule: RuleId::owner(rule) },
                    Some((Action::Allow | Action::Ask, _)) | None => built_in,
                }
            }
            (Direction::BetweenGuests, _) => self.judge_between(r, None),
            _ => built_in,
        }
    }

    fn flow<'a>(&'a self, r: &Request, evidence: Evidence<'a>) -> Outbound<'a> {
        let Request { endpoint, protocol, destination, .. } = *r;
        Outbound { endpoint, protocol, destination, evidence, at: self.surroundings() }
    }

    /// What addresses mean in this network.
    #[must_use]
    pub fn surroundings(&self) -> Surroundings<'_> {
        Surroundings {
            subnet: self.subnet,
            gateway: IpAddr::V4(self.gateway4),
            gateway6: self.gateway6,
            host_loopback: self.settings.host_loopback,
            host: &self.tables.host,
        }
    }

    /// The owner's rules for a guest.
    #[inline]
    #[must_use]
    pub fn table(&self, endpoint: PortId) -> Option<&RuleTable> {
        self.tables.of(endpoint)
    }

    /// Returns true when no flow between guests can be denied, so that nobody has to ask about one.
    #[inline]
    #[must_use]
    pub fn guests_pass(&self) -> bool {
        self.rules.guests_pass() && !self.tables.about_guests
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

    /// The label of a rule in force for a guest.
    #[must_use]
    pub fn label(&self, endpoint: PortId, rule: RuleId) -> Arc<str> {
        match (rule.number(), self.tables.of(endpoint)) {
            (Ok(built_in), _) => self.rules.label(built_in),
            (Err(number), Some(table)) => table.label(number),
            (Err(_), None) => "default".into(),
        }
    }

    /// Puts other rules in force and begins a sweep: flows that older rules admitted are judged again.
    pub fn change(&mut self, mode: NetMode, isolated: Isolated) {
        (self.settings.mode, self.settings.isolated) = (mode, isolated);
        self.rules = RuleSet::built_in(&self.settings, self.subnet);
        self.begin_sweep();
    }

    /// Puts other rules of the owner in force, for a guest or for all that have none of their own, and begins a sweep.
    /// Returns the rules that they replace, so that they are freed elsewhere.
    pub fn change_rules(
        &mut self,
        now: Time,
        endpoint: Option<PortId>,
        table: Option<Arc<RuleTable>>,
    ) -> Option<Arc<RuleTable>> {
        self.shaping.set_rules(now, endpoint, table.iter().flat_map(|t| t.limits()));
        let replaced = match (endpoint, table) {
            (None, table) => std::mem::replace(&mut self.tables.network, table),
            (Some(endpoint), Some(table)) => self.tables.endpoints.insert(endpoint, table),
            (Some(endpoint), None) => self.tables.endpoints.remove(&endpoint),
        };
        let tables = &mut self.tables;
        tables.about_guests =
            tables.network.iter().chain(tables.endpoints.values()).any(|t| t.has_guest_rules());
        self.begin_sweep();
        replaced
    }

    /// Forgets pins of names that no rule allows any more, guest by guest from `slot` on. `port_of` says which port is in
    /// a slot. Returns where to go on, or `None` at the end.
    pub fn forget_denied_pins(
        &mut self,
        slot: u32,
        budget: &mut Budget,
        port_of: impl Fn(u32) -> Option<PortId>,
    ) -> Option<u32> {
        let (tables, mut slot) = (&self.tables, slot);
        while let Some(guest) = self.pins.next_guest(slot) {
            let pins = u32::try_from(self.pins.count(guest)).unwrap_or(u32::MAX);
            if !budget.visit_all(pins.max(1)) {
                return Some(guest);
            }
            let port = port_of(guest);
            self.pins.retain(guest, |name| {
                let Some(port) = port else { return false };
                tables.of(port).is_none_or(|table| {
                    matches!(table.judge_name(port, name.as_bytes(), true), NameDecision::Allow { .. })
                })
            });
            slot = guest + 1;
        }
        self.pins.forget_names();
        None
    }

    /// The rules as the DNS forwarder needs them; `None` where no rule is about names.
    #[must_use]
    pub fn names(&self) -> Option<NamePolicy> {
        let mut all = self.tables.network.iter().chain(self.tables.endpoints.values());
        all.any(|t| t.names_decide()).then(|| NamePolicy {
            tables: self.tables.clone(),
            subnet: self.subnet,
            gateway: IpAddr::V4(self.gateway4),
            gateway6: self.gateway6,
            host_loopback: self.settings.host_loopback,
        })
    }

    /// The addresses of this host are others from now on. Flows are judged again.
    pub fn change_host_addresses(&mut self, host: Arc<HashSet<IpAddr>>) {
        let is_used = self.tables.network.is_some() || !self.tables.endpoints.is_empty();
        self.tables.host = host;
        if is_used {
            self.begin_sweep();
        }
    }

    /// Forgets the rules of a guest that was removed.
    pub fn remove_port(&mut self, endpoint: PortId) {
        self.tables.endpoints.remove(&endpoint);
    }

    fn begin_sweep(&mut self) {
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
    pub fn client_name(&self, client: IpAddr, guest: IpAddr) -> IpAddr {
        let gateway = match (guest, self.gateway6) {
            (IpAddr::V6(_), Some(gateway)) => IpAddr::V6(gateway),
            _ => IpAddr::V4(self.gateway4),
        };
        let ip = client.to_canonical();
        let own = ip.is_ipv4() == guest.is_ipv4() && !is_special(ip) && !self.subnet.contains(ip);
        if own { ip } else { gateway }
    }
}

/// What the rules say of names. See [`Policy::names`].
pub struct NamePolicy {
    tables: Tables,
    subnet: Subnet,
    gateway: IpAddr,
    gateway6: Option<Ipv6Addr>,
    host_loopback: Option<IpAddr>,
}

impl NamePolicy {
    /// The rules for a guest, where they are about names.
    #[must_use]
    pub fn table(&self, endpoint: PortId) -> Option<&RuleTable> {
        self.tables.of(endpoint).filter(|t| t.names_decide())
    }

    /// What addresses mean in this network.
    #[must_use]
    pub fn surroundings(&self) -> Surroundings<'_> {
        let NamePolicy { subnet, gateway, gateway6, host_loopback, .. } = *self;
        Surroundings { subnet, gateway, gateway6, host_loopback, host: &self.tables.host }
    }
}

/// The part of the floor that a rule with exactly this address lifts.
fn can_be_lifted(ip: IpAddr) -> bool {
    let is_local = match ip.to_canonical() {
        IpAddr::V4(a) => a.is_loopback() || a.is_link_local(),
        IpAddr::V6(a) => a.is_loopback() || a.is_unicast_link_local(),
    };
    is_local || is_metadata(ip)
}

#[cfg(test)]
mod tests;
