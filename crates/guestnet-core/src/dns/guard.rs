//! Theory of operation: rules about names, applied to queries and responses.
//!
//! - A query for a name that no rule allows is refused before the cache is looked at, and nothing is asked upstream: a
//!   resolver is a way out too. The network's own names are the authority's, which has the last word on them.
//! - A response is filtered for each guest that gets it. Addresses that the guest may not reach are left out (DNS
//!   rebinding). An alias for a name that a rule denies denies the whole. Service bindings lose `ech` and hints that are not
//!   allowed. The additional section goes: nobody asked for it.
//! - What is left is noted: for which names the guest got an address (`policy/pins.rs`).
//! - A refusal says why, by an extended error (RFC 8914): `guestnet: RULE: REASON`.
//!
//! The guard notes pins and denials; [`super::network`] hands them on.

use crate::interface::types::{PortId, Time};
use crate::policy::name_budget::NameBudget;
use crate::policy::spec::DnsRefusal;
use crate::policy::special::Group;
use crate::policy::table::{DEFAULT, NameDecision, RuleTable};
use crate::policy::{Action, NamePolicy};
use crate::util::siphash::SipKey;
use guestnet_wire::dns::{self, Answer, Record, Section, ede, flags, kind, rcode};
use guestnet_wire::{be16, put};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

/// Types that every allowed name may be asked for: addresses, aliases, delegations, services, and what DNSSEC needs. Others,
/// such as TXT and NULL, carry data of any kind.
const ORDINARY: [u16; 20] = [
    kind::A,
    2,
    kind::CNAME,
    kind::SOA,
    12,
    15,
    kind::AAAA,
    33,
    39,
    43,
    46,
    47,
    48,
    50,
    51,
    52,
    59,
    kind::SVCB,
    kind::HTTPS,
    257,
];
/// Keys of service bindings (RFC 9460 section 14.3.2).
const IPV4_HINT: u16 = 4;
const ECH: u16 = 5;
const IPV6_HINT: u16 = 6;
/// What refuses addresses that are not allowed.
const REBINDING: &str = "rebinding";
/// Pins and denials that are noted at most until they are handed on.
const NOTES_MAX: usize = 4096;

/// An address that a guest got for a name.
pub(super) struct PinNote {
    pub port: PortId,
    pub ip: IpAddr,
    pub name: Arc<[u8]>,
    pub life_s: u32,
}

/// A query that was refused.
pub(super) struct DenialNote {
    pub port: PortId,
    pub name: Arc<str>,
    pub kind: u16,
    pub rule: Arc<str>,
    pub reason: &'static str,
}

/// How a query is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub rcode: u16,
    /// The option of the extended error.
    pub explanation: Vec<u8>,
}

/// What a filter made of a response.
pub(super) enum Filtered {
    /// The guest gets it as it is.
    Same,
    /// It gets this one.
    Other(Answer, Vec<u8>),
    /// It is refused.
    Refused(Refusal),
}

/// The rules about names, and what they have brought about.
pub(super) struct Guard {
    policy: Option<NamePolicy>,
    budget: NameBudget,
    pub pins: Vec<PinNote>,
    pub denials: Vec<DenialNote>,
}

impl Guard {
    pub fn new(key: SipKey) -> Guard {
        Guard { policy: None, budget: NameBudget::new(key), pins: Vec::new(), denials: Vec::new() }
    }

    pub fn set(&mut self, policy: Option<NamePolicy>) {
        self.policy = policy;
        self.budget.clear();
    }

    pub fn remove_port(&mut self, port: PortId) {
        self.budget.remove_port(port);
    }

    /// Whether the names of a guest are judged.
    #[inline]
    pub fn watches(&self, port: PortId) -> bool {
        self.policy.as_ref().is_some_and(|p| p.table(port).is_some())
    }

    /// Judges a query for a name, as labels in lower case. `None`: it may be made.
    pub fn query(&mut self, now: Time, port: PortId, name: &[u8], kind: u16) -> Option<Refusal> {
        let table = self.policy.as_ref()?.table(port)?;
        let (rule, reason) = match text(name) {
            None => (DEFAULT, "a name that is none"),
            Some(text) => match table.judge_name(port, &text, ORDINARY.contains(&kind)) {
                NameDecision::Allow { rule, below } => {
                    let options = table.options();
                    let (names, bytes) = (options.names_per_suffix, options.name_bytes_per_suffix);
                    if !below || self.budget.take(now, port, rule, &text, names, bytes) {
                        return None;
                    }
                    (rule, "too many names below a suffix")
                }
                NameDecision::Deny { rule, by_type: false } => (rule, "name not allowed"),
                NameDecision::Deny { rule, by_type: true } => (rule, "query type not allowed"),
            },
        };
        let label = table.label(rule);
        let refusal = refusal(table, &label, reason);
        self.note_denial(port, name, kind, label, reason);
        Some(refusal)
    }

    fn note_denial(&mut self, port: PortId, name: &[u8], kind: u16, rule: Arc<str>, reason: &'static str) {
        if self.denials.len() < NOTES_MAX {
            self.denials.push(DenialNote { port, name: shown(name), kind, rule, reason });
        }
    }

    /// Filters the response to a query of a guest. `own`: it is about the network's own names, whose addresses are the
    /// owner's choice.
    pub fn filter(
        &mut self,
        port: PortId,
        name: &[u8],
        own: bool,
        shape: &Answer,
        message: &[u8],
    ) -> Filtered {
        let Some((policy, table)) = self.policy.as_ref().and_then(|p| Some((p, p.table(port)?))) else {
            return Filtered::Same;
        };
        let (Some(records), Some(asked)) = (dns::records(message, shape), text(name)) else {
            return Filtered::Refused(refusal(table, &table.label(DEFAULT), "a response that is malformed"));
        };
        let kind = be16(message, shape.question.end.saturating_sub(4));
        let mut work = Work { policy, table, port, own, removed: false, pins: Vec::new() };
        let mut names = vec![(name.to_ascii_lowercase().into_boxed_slice(), asked.clone())];
        let (mut answers, mut authority, mut denied) = (Vec::new(), Vec::new(), None);
        for (section, record) in records {
            if section == Section::Authority {
                if matches!(record.kind, kind::SOA | 46 | 47 | 50) {
                    authority.push(record);
                }
                continue;
            }
            let of_chain = names.iter().any(|(n, _)| **n == *record.name.to_ascii_lowercase());
            if record.kind == kind::CNAME
                && of_chain
                && let Some(alias) = text(&record.data.to_ascii_lowercase())
            {
                if let NameDecision::Deny { rule, by_type: false } = table.judge_name(port, &alias, true)
                    && rule != DEFAULT
                {
                    denied = Some(rule);
                    break;
                }
                names.push((record.data.to_ascii_lowercase().into(), alias));
            }
            if let Some(record) = work.record(record, of_chain) {
                answers.push(record);
            }
        }
        if let Some(rule) = denied {
            let label = table.label(rule);
            let refused = refusal(table, &label, "an alias for a name that is not allowed");
            self.note_denial(port, name, kind, label, "an alias for a name that is not allowed");
            return Filtered::Refused(refused);
        }
        let Work { removed, pins, .. } = work;
        // The name that was asked for, and aliases that rules allow themselves.
        let allowed = |n: &[u8]| matches!(table.judge_name(port, n, true), NameDecision::Allow { .. });
        let names: Vec<Arc<[u8]>> = names
            .into_iter()
            .enumerate()
            .filter(|(at, (_, n))| *at == 0 || allowed(n))
            .map(|(_, (_, n))| n.into())
            .collect();
        let least = table.options().pin_min_s;
        let nothing_left = removed && !answers.iter().any(|r: &Record| r.kind == kind);
        let label: Option<Arc<str>> = removed.then(|| REBINDING.into());
        for (ip, ttl) in pins {
            for name in &names {
                if self.pins.len() < NOTES_MAX {
                    let life_s = ttl.max(least);
                    self.pins.push(PinNote { port, ip, name: name.clone(), life_s });
                }
            }
        }
        let reason = "an address that is not allowed";
        if let Some(label) = &label {
            self.note_denial(port, name, kind, label.clone(), reason);
        }
        let head = shape.flags & (flags::AA | flags::TC | flags::AD);
        let head = if removed { head & !flags::AD } else { head };
        let question = message.get(shape.question.clone()).unwrap_or(&[]);
        let Some(mut message) = dns::build(question, shape.rcode & 15, head, &answers, &authority) else {
            return Filtered::Same;
        };
        if nothing_left && let Some(label) = label {
            let option = dns::explain(ede::BLOCKED, &format!("guestnet: {label}: {reason}"));
            append_edns(&mut message, &option);
        }
        match Answer::parse(&message) {
            Some(shape) => Filtered::Other(shape, message),
            None => Filtered::Same,
        }
    }
}

/// A response at work.
struct Work<'a> {
    policy: &'a NamePolicy,
    table: &'a RuleTable,
    port: PortId,
    own: bool,
    removed: bool,
    pins: Vec<(IpAddr, u32)>,
}

impl Work<'_> {
    /// Whether an answer may have an address.
    fn may_have(&self, ip: IpAddr) -> bool {
        let at = self.policy.surroundings();
        self.own
            || self.table.default_action() == Action::Allow
            || Group::Public.includes(&at, ip)
            || self.table.admits_address(self.port, at, ip)
    }

    /// The record as the guest gets it. `of_chain`: its name is the one that was asked for, or an alias of it.
    fn record(&mut self, mut record: Record, of_chain: bool) -> Option<Record> {
        let ip = match record.kind {
            kind::A => <[u8; 4]>::try_from(&*record.data).ok().map(|b| IpAddr::V4(Ipv4Addr::from(b))),
            kind::AAAA => <[u8; 16]>::try_from(&*record.data).ok().map(|b| IpAddr::V6(Ipv6Addr::from(b))),
            kind::SVCB | kind::HTTPS => {
                record.data = self.binding(&record.data, record.ttl, of_chain)?;
                return Some(record);
            }
            _ => return Some(record),
        };
        let Some(ip) = ip.filter(|ip| self.may_have(*ip)) else {
            self.removed = true;
            return None;
        };
        if of_chain {
            self.pins.push((ip, record.ttl));
        }
        Some(record)
    }

    /// The data of a service binding without `ech` and without hints that are not allowed. `None` when it is malformed.
    fn binding(&mut self, data: &[u8], ttl: u32, of_chain: bool) -> Option<Box<[u8]>> {
        let mut target = Vec::new();
        let mut at = dns::expand_name(data, 2, &mut target)?;
        let mut out = data.get(..at)?.to_vec();
        while at < data.len() {
            let value = data.get(at + 4..at + 4 + usize::from(be16(data.get(at..at + 4)?, 2)))?;
            let key = be16(data, at);
            at += 4 + value.len();
            let width = match key {
                ECH => continue,
                IPV4_HINT => 4,
                IPV6_HINT => 16,
                _ => 0,
            };
            let mut kept = value.to_vec();
            if width > 0 {
                kept.clear();
                for hint in value.chunks(width) {
                    let ip = match (<[u8; 4]>::try_from(hint), <[u8; 16]>::try_from(hint)) {
                        (Ok(b), _) => IpAddr::V4(Ipv4Addr::from(b)),
                        (_, Ok(b)) => IpAddr::V6(Ipv6Addr::from(b)),
                        _ => return None,
                    };
                    if self.may_have(ip) {
                        kept.extend_from_slice(hint);
                        if of_chain {
                            self.pins.push((ip, ttl));
                        }
                    }
                }
                if kept.is_empty() {
                    continue;
                }
            }
            out.extend_from_slice(&key.to_be_bytes());
            out.extend_from_slice(&u16::try_from(kept.len()).ok()?.to_be_bytes());
            out.extend_from_slice(&kept);
        }
        Some(out.into())
    }
}

fn refusal(table: &RuleTable, label: &str, reason: &str) -> Refusal {
    let rcode = match table.options().dns_refusal {
        DnsRefusal::NxDomain => rcode::NXDOMAIN,
        DnsRefusal::Refused => rcode::REFUSED,
    };
    Refusal { rcode, explanation: dns::explain(ede::BLOCKED, &format!("guestnet: {label}: {reason}")) }
}

/// A name as text: labels with dots between them. `None` for the root and for a name with a label that a host name cannot
/// have, since two such names could be written alike.
fn text(labels: &[u8]) -> Option<Vec<u8>> {
    let (mut rest, mut out) = (labels, Vec::with_capacity(labels.len()));
    loop {
        let (length, more) = rest.split_first()?;
        if *length == 0 {
            return (!out.is_empty()).then_some(out);
        }
        let (label, next) = more.split_at_checked(usize::from(*length))?;
        if !label.iter().all(|b| b.is_ascii_graphic() && *b != b'.' && *b != b'\\') {
            return None;
        }
        if !out.is_empty() {
            out.push(b'.');
        }
        out.extend(label.iter().map(u8::to_ascii_lowercase));
        rest = next;
    }
}

/// A name for people.
fn shown(labels: &[u8]) -> Arc<str> {
    match text(labels).map(String::from_utf8) {
        Some(Ok(text)) => text.into(),
        _ => labels.escape_ascii().to_string().into(),
    }
}

/// Appends an EDNS record with one option to a message that has none.
fn append_edns(message: &mut Vec<u8>, option: &[u8]) {
    let [l0, l1] = u16::try_from(option.len()).unwrap_or(0).to_be_bytes();
    message.extend_from_slice(&[0, 0, kind::OPT as u8, 4, 208, 0, 0, 0, 0, l0, l1]);
    message.extend_from_slice(option);
    put(message, 10, &1u16.to_be_bytes());
}
