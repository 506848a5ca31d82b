//! Theory of operation: a [`RuleSet`] is an ordered list of rules, of which the first that matches a request
//! decides. [`RuleSet::built_in`] compiles the list from the [`Settings`] of a network. Nothing matches: denied. The
//! list depends on its input alone and never changes; a change of the settings makes another one.
//!
//! The built-in rules, in their order:
//!
//! | label | direction | what it decides |
//! |---|---|---|
//! | `metadata`, `special_address`, `broadcast` | outbound | the floor: addresses that are never a destination |
//! | `host_loopback` | outbound | one address of the subnet stands for the host's 127.0.0.1 |
//! | `subnet` | outbound | no guest of the subnet is reached through the gateway's uplink |
//! | `host_only` | outbound, inbound | nothing leaves; the guest's own ports are closed |
//! | `outside` | outbound | everything else is allowed |
//! | `published`, `guest_port`, `mapping` | inbound | ports of the owner, ports of guests (PCP), answers |
//! | `isolated`, `guests` | between guests | guests open flows to each other, or do not |

use crate::interface::stats::DropReason;
use crate::interface::types::{Isolated, NetMode, PortId};
use crate::policy::special::{is_metadata, is_special};
use crate::policy::verdict::{Direction, Entry, Request, RuleId, Verdict};
use crate::tables::addressing::Subnet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

/// What the owner of a network decides about it, from which its rules are made.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Settings {
    /// Whether anything leaves the network.
    pub mode: NetMode,
    /// The address by which guests reach the host's 127.0.0.1.
    pub host_loopback: Option<IpAddr>,
    /// Which guests open no flows to other guests.
    pub isolated: Isolated,
}

/// Guests that a rule is about.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    Any,
    Isolated(Isolated),
}

impl Source {
    fn includes(&self, endpoint: PortId) -> bool {
        match self {
            Source::Any => true,
            Source::Isolated(ports) => ports.includes(endpoint),
        }
    }
}

/// Destinations that a rule matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Destination {
    Any,
    Metadata,
    Special,
    Broadcast,
    Subnet,
    Address(IpAddr),
}

impl Destination {
    #[inline]
    fn includes(self, subnet: &Subnet, ip: IpAddr) -> bool {
        match self {
            Destination::Any => true,
            Destination::Metadata => is_metadata(ip),
            Destination::Special => is_special(ip),
            Destination::Broadcast => subnet.is_broadcast(ip),
            Destination::Subnet => subnet.contains(ip),
            Destination::Address(a) => a == ip,
        }
    }
}

/// What a rule does with a flow that it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Allow,
    /// Allows it, to the host's loopback address.
    AllowLoopback,
    Deny(DropReason),
}

#[derive(Debug, Clone)]
struct Rule {
    label: Arc<str>,
    direction: Direction,
    source: Source,
    destination: Destination,
    action: Action,
}

/// The rules of a network. See the module head.
#[derive(Debug, Clone)]
pub struct RuleSet {
    subnet: Subnet,
    rules: Vec<Rule>,
    /// No rule denies a flow between guests, so the switch need not ask.
    guests_pass: bool,
}

impl RuleSet {
    /// The rules of a network with these settings.
    #[must_use]
    pub fn built_in(settings: &Settings, subnet: Subnet) -> RuleSet {
        use Action::{Allow, AllowLoopback, Deny};
        use Direction::{BetweenGuests, Inbound, Outbound};
        let host_only = settings.mode == NetMode::HostOnly;
        let mut set = RuleSet {
            subnet,
            rules: Vec::with_capacity(10),
            guests_pass: settings.isolated == Isolated::Nobody,
        };
        set.push("metadata", Outbound, Destination::Metadata, Deny(DropReason::BadDestination));
        set.push("special_address", Outbound, Destination::Special, Deny(DropReason::BadDestination));
        set.push("broadcast", Outbound, Destination::Broadcast, Deny(DropReason::BadDestination));
        if let Some(ip) = settings.host_loopback {
            match host_only {
                false => set.push("host_loopback", Outbound, Destination::Address(ip), AllowLoopback),
                true => {
                    set.push("host_only", Outbound, Destination::Address(ip), Deny(DropReason::Policy));
                }
            }
        }
        set.push("subnet", Outbound, Destination::Subnet, Deny(DropReason::NoEndpoint));
        set.push("published", Inbound(Entry::Published), Destination::Any, Allow);
        if host_only {
            set.push("host_only", Outbound, Destination::Any, Deny(DropReason::Policy));
            set.push("host_only", Inbound(Entry::GuestPort), Destination::Any, Deny(DropReason::Policy));
            set.push("host_only", Inbound(Entry::Mapping), Destination::Any, Deny(DropReason::Policy));
        } else {
            set.push("outside", Outbound, Destination::Any, Allow);
            set.push("guest_port", Inbound(Entry::GuestPort), Destination::Any, Allow);
            set.push("mapping", Inbound(Entry::Mapping), Destination::Any, Allow);
        }
        if settings.isolated != Isolated::Nobody {
            set.push("isolated", BetweenGuests, Destination::Any, Deny(DropReason::Policy));
            if let Some(rule) = set.rules.last_mut() {
                rule.source = Source::Isolated(settings.isolated.clone());
            }
        }
        set.push("guests", BetweenGuests, Destination::Any, Allow);
        set
    }

    fn push(&mut self, label: &str, direction: Direction, destination: Destination, action: Action) {
        let source = Source::Any;
        self.rules.push(Rule { label: label.into(), direction, source, destination, action });
    }

    /// Returns true when every flow between guests is allowed. Then nobody has to ask about one.
    #[inline]
    #[must_use]
    pub fn guests_pass(&self) -> bool {
        self.guests_pass
    }

    /// Decides about a flow.
    #[must_use]
    pub fn judge(&self, request: &Request) -> Verdict {
        let ip = request.destination.ip();
        for (rule, at) in self.rules.iter().zip(0u16..) {
            if rule.direction != request.direction
                || !rule.source.includes(request.endpoint)
                || !rule.destination.includes(&self.subnet, ip)
            {
                continue;
            }
            let rule_id = RuleId::built_in(at);
            let port = request.destination.port();
            return match rule.action {
                Action::Allow => Verdict::Allow { target: request.destination, rule: rule_id },
                Action::AllowLoopback => Verdict::Allow {
                    target: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port),
                    rule: rule_id,
                },
                Action::Deny(reason) => Verdict::Deny { reason, rule: rule_id },
            };
        }
        Verdict::Deny { reason: DropReason::Policy, rule: RuleId::built_in(u16::MAX) }
    }

    /// The label of a rule, by which people know it. `default` for what no rule matched.
    #[must_use]
    pub fn label(&self, rule: u16) -> Arc<str> {
        match self.rules.get(usize::from(rule)) {
            Some(rule) => rule.label.clone(),
            None => "default".into(),
        }
    }
}
