//! Theory of operation: a [`RuleTable`] is a policy compiled for lookups. It never changes, is shared by reference, and is
//! compiled outside the packet threads.
//!
//! A decision collects the rules that may match and looks at them in their order; the first that matches decides:
//!
//! - rules about a prefix, from a prefix trie: those of every prefix that covers the address;
//! - rules about a name, from hash tables: those of each name that the guest has pinned for the address, and of the name
//!   that the conversation shows, for each suffix of these names;
//! - all other rules (any destination, groups).
//!
//! Each source gives a list in ascending order, so they are merged without being copied. The cost does not depend on the
//! number of rules about prefixes and names.
//!
//! A rule about a name that is matched by the conversation needs both: the address pinned for the name, and the
//! conversation that shows it. Before the conversation has shown anything ([`Shown::NotYet`]), such a rule makes the
//! decision [`Decision::Inspect`]. A deny rule needs no pin: it is enough that the conversation shows the name. So while
//! nothing was shown, an allow rule below a deny rule about a name is `Inspect` too, but not a strict one.
//!
//! DNS: [`RuleTable::judge_name`] decides whether a name may be asked for. Where rules are about names, flows to other
//! resolvers than the gateway's are refused unless a rule names their port ([`RESOLVER`]).

use crate::interface::types::PortId;
use crate::policy::index::{Index, Lists};
use crate::policy::shaping::LimitSpec;
use crate::policy::spec::{
    Action, Destination, Name, NameMatch, NamePattern, Net, PolicyOptions, PolicySpec, PortRange, Protocol,
    RuleDirection, RuleSpec,
};
use crate::policy::special::{Surroundings, embedded};
use guestnet_wire::proto;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// The most rules of a policy.
pub const RULES_MAX: usize = 1 << 20;
/// The number of the rule that refuses other resolvers where rules are about names.
pub const RESOLVER: u32 = u32::MAX - 1;
/// The number that stands for the default.
pub const DEFAULT: u32 = u32::MAX;
/// DNS, and DNS over TLS or QUIC (RFC 7858, RFC 9250).
const RESOLVER_PORTS: [u16; 2] = [53, 853];

/// What a conversation has shown of the name that it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shown<'a> {
    /// It has not begun.
    NotYet,
    /// This name, in lower case and without a final dot.
    Name(&'a [u8]),
    /// None: it shows no name, cannot be understood, or its client is silent.
    Nothing,
}

/// What is known of a flow besides its addresses.
#[derive(Debug, Clone, Copy)]
pub struct Evidence<'a> {
    /// Names that this guest got in answers for the remote address.
    pub pins: &'a [Name],
    /// What the conversation has shown.
    pub shown: Shown<'a>,
}

impl Evidence<'_> {
    /// Nothing is known.
    pub const NONE: Evidence<'static> = Evidence { pins: &[], shown: Shown::NotYet };
}

/// A flow to the outside, as a table sees it.
#[derive(Debug, Clone, Copy)]
pub struct Outbound<'a> {
    /// The guest.
    pub endpoint: PortId,
    /// IP protocol.
    pub protocol: u8,
    /// Where it goes, as the guest names it.
    pub destination: SocketAddr,
    /// What is known of it.
    pub evidence: Evidence<'a>,
    /// What addresses mean.
    pub at: Surroundings<'a>,
}

/// What the rules say. `rule` is the number of the rule, [`DEFAULT`] or [`RESOLVER`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// It may be opened.
    Allow {
        /// The rule.
        rule: u32,
    },
    /// It may be opened, but what it shows decides.
    Inspect {
        /// The rule that would admit it.
        rule: u32,
        /// No byte of either side passes before that.
        strict: bool,
    },
    /// The owner is asked.
    Ask {
        /// The rule.
        rule: u32,
    },
    /// It is refused.
    Deny {
        /// The rule.
        rule: u32,
    },
}

/// Whether a name may be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameDecision {
    /// It may.
    Allow {
        /// The rule, or [`DEFAULT`].
        rule: u32,
        /// It is below the name of the rule, so that the guest chooses a part of it.
        below: bool,
    },
    /// It may not.
    Deny {
        /// The rule, or [`DEFAULT`].
        rule: u32,
        /// Only the type of the query is not allowed.
        by_type: bool,
    },
}

/// What is wrong with a policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// There are too many rules.
    #[error("a policy has at most {RULES_MAX} rules, not {0}: merge some of them")]
    TooMany(usize),
}

struct Rule {
    label: Arc<str>,
    action: Action,
    endpoints: Option<Box<[PortId]>>,
    from: Box<[Net]>,
    destination: Destination,
    ports: Box<[PortRange]>,
    by: NameMatch,
    log: bool,
    all_query_types: bool,
}

impl Rule {
    fn concerns(&self, endpoint: PortId) -> bool {
        self.endpoints.as_ref().is_none_or(|e| e.binary_search(&endpoint).is_ok())
    }

    fn is_about(&self, endpoint: PortId, protocol: u8, port: u16) -> bool {
        self.concerns(endpoint)
            && (self.ports.is_empty() || self.ports.iter().any(|r| includes(r, protocol, port)))
    }

    /// Whether the rule names this port by itself, and not among all ports.
    fn names_port(&self, port: u16) -> bool {
        self.ports.iter().any(|r| r.first <= port && port <= r.last && (r.first > 0 || r.last < u16::MAX))
    }
}

fn includes(range: &PortRange, protocol: u8, port: u16) -> bool {
    let in_range = range.first <= port && port <= range.last;
    match range.protocol {
        Protocol::Any => in_range,
        Protocol::Tcp => protocol == proto::TCP && in_range,
        Protocol::Udp => protocol == proto::UDP && in_range,
        Protocol::Icmp => matches!(protocol, proto::ICMP | proto::ICMPV6),
    }
}

/// Deny rules about names that share everything but the name: while a conversation has shown nothing, it is enough to
/// know the first of them.
struct Watch {
    first: u32,
    endpoints: Option<Box<[PortId]>>,
    ports: Box<[PortRange]>,
}

/// A compiled policy. See the module head.
pub struct RuleTable {
    rules: Box<[Rule]>,
    default: Action,
    options: PolicyOptions,
    out: Index,
    inbound: Vec<u32>,
    guests: Vec<u32>,
    watches: Vec<Watch>,
    /// Rules for outbound flows that admit any public address: names are open from them on.
    open: Vec<u32>,
    has_names: bool,
    /// Limits of rules.
    limits: Vec<(u32, LimitSpec)>,
}

impl std::fmt::Debug for RuleTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RuleTable").field("rules", &self.rules.len()).finish_non_exhaustive()
    }
}

impl RuleTable {
    /// Compiles a policy.
    ///
    /// # Errors
    /// [`CompileError`].
    pub fn compile(spec: PolicySpec) -> Result<RuleTable, CompileError> {
        use crate::policy::special::Group::Public;
        if spec.rules.len() > RULES_MAX {
            return Err(CompileError::TooMany(spec.rules.len()));
        }
        let mut table = RuleTable {
            rules: Box::default(),
            default: spec.default,
            options: spec.options,
            out: Index::default(),
            inbound: Vec::new(),
            guests: Vec::new(),
            watches: Vec::new(),
            open: Vec::new(),
            has_names: false,
            limits: Vec::new(),
        };
        for (rule, number) in spec.rules.iter().zip(0u32..) {
            table.limits.extend(rule.limit.map(|limit| (number, limit)));
            match rule.direction {
                RuleDirection::In => table.inbound.push(number),
                RuleDirection::Guests => table.guests.push(number),
                RuleDirection::Out => table.out.add(number, &rule.destination),
            }
            if rule.direction != RuleDirection::Out {
                continue;
            }
            match &rule.destination {
                Destination::Name(_) => {
                    table.has_names = true;
                    if rule.action == Action::Deny && rule.by == NameMatch::Conversation {
                        table.watch(number, rule);
                    }
                }
                Destination::Any | Destination::Group(Public) if rule.action != Action::Deny => {
                    table.open.push(number);
                }
                _ => {}
            }
        }
        let compiled = spec.rules.into_iter().map(|r| Rule {
            label: r.label,
            action: r.action,
            endpoints: r.endpoints.map(sorted),
            from: r.from.into(),
            destination: match r.destination {
                Destination::Endpoints(ports) => Destination::Endpoints(sorted(ports).into()),
                other => other,
            },
            ports: r.ports.into(),
            by: r.by,
            log: r.log,
            all_query_types: r.all_query_types,
        });
        table.rules = compiled.collect();
        Ok(table)
    }

    fn watch(&mut self, number: u32, rule: &RuleSpec) {
        let endpoints = rule.endpoints.clone().map(sorted);
        let same = |w: &Watch| w.endpoints == endpoints && *w.ports == *rule.ports;
        if !self.watches.iter().any(same) {
            self.watches.push(Watch { first: number, endpoints, ports: rule.ports.clone().into() });
        }
    }

    /// What holds for all rules.
    #[must_use]
    pub fn options(&self) -> &PolicyOptions {
        &self.options
    }

    /// The limits that rules have, by their numbers.
    pub fn limits(&self) -> impl Iterator<Item = (u32, LimitSpec)> {
        self.limits.iter().copied()
    }

    /// How many rules there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rules.len()
    }

    /// Whether there are no rules, only a default.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// The label of a rule.
    #[must_use]
    pub fn label(&self, rule: u32) -> Arc<str> {
        match (rule, self.rule(rule)) {
            (RESOLVER, _) => "other_resolver".into(),
            (_, Some(rule)) => rule.label.clone(),
            (_, None) => "default".into(),
        }
    }

    /// What becomes of flows that no rule matches.
    #[must_use]
    pub fn default_action(&self) -> Action {
        self.default
    }

    /// Whether flows that a rule admits are logged.
    #[must_use]
    pub fn is_logged(&self, rule: u32) -> bool {
        self.rule(rule).is_some_and(|r| r.log)
    }

    /// Whether names have to be looked at: queries are judged and what guests got in answers is noted.
    #[must_use]
    pub fn names_decide(&self) -> bool {
        self.has_names || self.default == Action::Deny || self.options.note_names
    }

    /// Whether flows between guests can be refused.
    #[must_use]
    pub fn has_guest_rules(&self) -> bool {
        !self.guests.is_empty()
    }

    fn rule(&self, number: u32) -> Option<&Rule> {
        self.rules.get(number as usize)
    }

    /// Decides about a flow to the outside.
    #[must_use]
    pub fn judge(&self, flow: &Outbound<'_>) -> Decision {
        let ip = flow.destination.ip().to_canonical();
        let decision = self.judge_address(flow, ip);
        // Another spelling of an address that a rule forbids is forbidden too.
        if let (IpAddr::V6(a), Decision::Allow { .. } | Decision::Inspect { .. } | Decision::Ask { .. }) =
            (ip, decision)
        {
            for a in embedded(a) {
                let of_v4 = self.judge_address(flow, IpAddr::V4(a));
                if matches!(of_v4, Decision::Deny { rule } if rule != DEFAULT) {
                    return of_v4;
                }
            }
        }
        decision
    }

    fn judge_address(&self, flow: &Outbound<'_>, ip: IpAddr) -> Decision {
        let Outbound { endpoint, protocol, evidence, .. } = *flow;
        let port = flow.destination.port();
        let mut lists = Lists::new();
        lists.add(&self.out.general);
        self.out.of_address(ip, &mut lists);
        for name in evidence.pins {
            self.out.of_name(name.as_bytes(), &mut lists);
        }
        if let Shown::Name(name) = evidence.shown {
            self.out.of_name(name, &mut lists);
        }
        for number in lists {
            let Some(rule) = self.rule(number) else { continue };
            if !rule.is_about(endpoint, protocol, port) {
                continue;
            }
            let matches = match &rule.destination {
                Destination::Any => true,
                Destination::Net(net) => net.contains(ip),
                Destination::Group(group) => group.includes(&flow.at, ip),
                Destination::Endpoints(_) => false,
                Destination::Name(pattern) => {
                    let pinned = evidence.pins.iter().any(|n| pattern.matches(n.as_bytes()));
                    match (rule.by, rule.action, evidence.shown) {
                        (NameMatch::Address, _, _) => pinned,
                        // What shows no name is no conversation that can be judged by one.
                        _ if !is_inspectable(protocol) => pinned && rule.action == Action::Deny,
                        (_, Action::Deny, Shown::Name(n)) => pattern.matches(n),
                        (_, Action::Deny, _) => false,
                        (_, Action::Allow, Shown::NotYet) if pinned => {
                            return self.but_resolver(
                                Decision::Inspect { rule: number, strict: true },
                                protocol,
                                port,
                            );
                        }
                        (_, Action::Ask, Shown::NotYet) => pinned,
                        (_, _, Shown::Name(n)) => pinned && pattern.matches(n),
                        (_, _, Shown::NotYet | Shown::Nothing) => false,
                    }
                }
            };
            if matches {
                return self.decide(number, rule.action, flow);
            }
        }
        self.decide(DEFAULT, self.default, flow)
    }

    fn decide(&self, rule: u32, action: Action, flow: &Outbound<'_>) -> Decision {
        let (protocol, port) = (flow.protocol, flow.destination.port());
        let decision = match action {
            Action::Deny => return Decision::Deny { rule },
            Action::Ask => Decision::Ask { rule },
            Action::Allow if flow.evidence.shown == Shown::NotYet && self.is_watched(rule, flow) => {
                Decision::Inspect { rule, strict: false }
            }
            Action::Allow => Decision::Allow { rule },
        };
        self.but_resolver(decision, protocol, port)
    }

    /// How a flow is inspected that a rule asked about and the owner allowed: strictly, or because a deny rule about a name
    /// is above the rule.
    #[must_use]
    pub fn inspects_after_asking(&self, flow: &Outbound<'_>, rule: u32) -> Option<bool> {
        let by_conversation = self.rule(rule).is_some_and(|r| {
            matches!(r.destination, Destination::Name(_)) && r.by == NameMatch::Conversation
        });
        match by_conversation && is_inspectable(flow.protocol) {
            true => Some(true),
            false => self.is_watched(rule, flow).then_some(false),
        }
    }

    /// Refuses another resolver than the gateway's where names decide.
    fn but_resolver(&self, decision: Decision, protocol: u8, port: u16) -> Decision {
        let (Decision::Allow { rule } | Decision::Inspect { rule, .. } | Decision::Ask { rule }) = decision
        else {
            return decision;
        };
        let is_resolver = self.has_names && is_inspectable(protocol) && RESOLVER_PORTS.contains(&port);
        if is_resolver && !self.rule(rule).is_some_and(|r| r.names_port(port)) {
            return Decision::Deny { rule: RESOLVER };
        }
        decision
    }

    /// Whether a deny rule about a name is above `rule` and about such flows.
    fn is_watched(&self, rule: u32, flow: &Outbound<'_>) -> bool {
        let (protocol, port) = (flow.protocol, flow.destination.port());
        is_inspectable(protocol)
            && self.watches.iter().any(|w| {
                w.first < rule
                    && w.endpoints.as_ref().is_none_or(|e| e.binary_search(&flow.endpoint).is_ok())
                    && (w.ports.is_empty() || w.ports.iter().any(|r| includes(r, protocol, port)))
            })
    }

    /// Whether a rule admits a flow to exactly this address, which lifts the floor. Returns the rule.
    #[must_use]
    pub fn lifts(&self, flow: &Outbound<'_>) -> Option<u32> {
        let mut lists = Lists::new();
        let ip = flow.destination.ip().to_canonical();
        self.out.of_address(ip, &mut lists);
        for number in lists {
            let rule = self.rule(number)?;
            let Destination::Net(net) = &rule.destination else { continue };
            if !rule.is_about(flow.endpoint, flow.protocol, flow.destination.port()) {
                continue;
            }
            match rule.action {
                Action::Deny => return None,
                Action::Allow if net.is_host() => return Some(number),
                Action::Allow | Action::Ask => {}
            }
        }
        None
    }

    /// Decides about a flow from the outside to a guest. `None`: no rule is about it.
    #[must_use]
    pub fn judge_inbound(
        &self,
        endpoint: PortId,
        protocol: u8,
        client: IpAddr,
        port: u16,
    ) -> Option<(Action, u32)> {
        self.inbound.iter().find_map(|number| {
            let rule = self.rule(*number)?;
            let from = rule.from.is_empty() || rule.from.iter().any(|n| n.contains(client));
            (from && rule.is_about(endpoint, protocol, port)).then_some((rule.action, *number))
        })
    }

    /// Decides about a flow of a guest to another one, which is on the port `to` where that is known. `None`: no rule is
    /// about it.
    #[must_use]
    pub fn judge_guests(
        &self,
        endpoint: PortId,
        to: Option<PortId>,
        protocol: u8,
        destination: SocketAddr,
    ) -> Option<(Action, u32)> {
        self.guests.iter().find_map(|number| {
            let rule = self.rule(*number)?;
            let matches = match &rule.destination {
                Destination::Net(net) => net.contains(destination.ip()),
                Destination::Endpoints(ports) => to.is_some_and(|to| ports.binary_search(&to).is_ok()),
                Destination::Any | Destination::Group(_) => true,
                Destination::Name(_) => false,
            };
            (matches && rule.is_about(endpoint, protocol, destination.port()))
                .then_some((rule.action, *number))
        })
    }

    /// Decides whether a guest may ask for a name (lower case, no dot at the end). `ordinary` says whether the type of the
    /// query is one that every allowed name may be asked for.
    #[must_use]
    pub fn judge_name(&self, endpoint: PortId, name: &[u8], ordinary: bool) -> NameDecision {
        let mut lists = Lists::new();
        self.out.of_name(name, &mut lists);
        lists.add(&self.open);
        for number in lists {
            let Some(rule) = self.rule(number) else { continue };
            if !rule.concerns(endpoint) {
                continue;
            }
            let exact = match &rule.destination {
                Destination::Name(NamePattern::Exact(_)) => true,
                Destination::Name(NamePattern::AtOrBelow(n)) => n.as_bytes() == name,
                Destination::Name(NamePattern::AnyOf(names)) => names.iter().any(|n| n.as_bytes() == name),
                _ => false,
            };
            let below = matches!(rule.destination, Destination::Name(_)) && !exact;
            match rule.action {
                // A deny rule for some ports alone leaves the name to others.
                Action::Deny if !rule.ports.is_empty() => {}
                Action::Deny => return NameDecision::Deny { rule: number, by_type: false },
                Action::Allow | Action::Ask if ordinary || rule.all_query_types => {
                    return NameDecision::Allow { rule: number, below };
                }
                // A rule that admits every address is not about names.
                Action::Allow | Action::Ask if !matches!(rule.destination, Destination::Name(_)) => {
                    return NameDecision::Allow { rule: number, below: false };
                }
                Action::Allow | Action::Ask => return NameDecision::Deny { rule: number, by_type: true },
            }
        }
        match self.default {
            Action::Allow | Action::Ask => NameDecision::Allow { rule: DEFAULT, below: false },
            Action::Deny => NameDecision::Deny { rule: DEFAULT, by_type: false },
        }
    }

    /// Whether a rule admits an address by itself, whatever names lead to it: then an answer may have it although it is
    /// private or one of the host's.
    #[must_use]
    pub fn admits_address(&self, endpoint: PortId, at: Surroundings<'_>, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        let mut lists = Lists::new();
        lists.add(&self.out.general);
        self.out.of_address(ip, &mut lists);
        for number in lists {
            let Some(rule) = self.rule(number) else { continue };
            let matches = match &rule.destination {
                Destination::Net(net) => net.contains(ip),
                Destination::Group(group) => group.includes(&at, ip),
                // A rule about everything does not say that it means this host or its neighbours.
                Destination::Any | Destination::Endpoints(_) | Destination::Name(_) => false,
            };
            if matches && rule.concerns(endpoint) {
                match rule.action {
                    Action::Allow | Action::Ask => return true,
                    Action::Deny if rule.ports.is_empty() => return false,
                    Action::Deny => {}
                }
            }
        }
        false
    }
}

fn is_inspectable(protocol: u8) -> bool {
    matches!(protocol, proto::TCP | proto::UDP)
}

fn sorted(mut ports: Vec<PortId>) -> Box<[PortId]> {
    ports.sort_unstable();
    ports.dedup();
    ports.into()
}

#[cfg(test)]
mod tests;
