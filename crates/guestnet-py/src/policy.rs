//! Theory of operation: policies. Python reads files and command lines and makes plain tuples of them; [`PolicyTable`]
//! compiles these in the caller's thread, detached from the interpreter. The same table is asked by `Policy.check` and put
//! in force in the data plane, so both give the same verdicts.

use crate::addresses::{Pair, V4, socket};
use crate::errors::config_error;
use guestnet_core::policy::shaping::LimitSpec;
use guestnet_core::policy::spec::{
    Destination, DnsRefusal, Ech, Name, NameMatch, NamePattern, Net, PolicyOptions, PolicySpec, PortRange,
    Protocol, Refuse, RuleDirection, RuleSpec,
};
use guestnet_core::policy::special::Subnet;
use guestnet_core::policy::special::{Group, Surroundings};
use guestnet_core::policy::table::{DEFAULT, Decision, NameDecision, Outbound, RESOLVER, RuleTable};
use guestnet_core::policy::{Action, Evidence, Shown};
use guestnet_core::types::PortId;
use guestnet_wire::proto;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

/// `(label, action, direction, endpoints, from, destination, ports, by, log, query_types)`.
type RuleTuple<'py> = (
    String,
    String,
    String,
    Option<Vec<u32>>,
    Vec<String>,
    Bound<'py, PyTuple>,
    Vec<(String, u16, u16)>,
    String,
    bool,
    String,
    Option<LimitTuple>,
);
/// The verdict, the number of the rule that decided, its label.
type Verdict = (&'static str, Option<u32>, String);

/// A compiled policy.
#[pyclass(frozen, module = "guestnet._native")]
pub struct PolicyTable {
    /// Shared with the data planes where it is in force.
    pub table: Arc<RuleTable>,
}

#[pymethods]
impl PolicyTable {
    #[new]
    fn new(
        py: Python<'_>,
        rules: Vec<RuleTuple<'_>>,
        default: &str,
        options: &Bound<'_, PyDict>,
    ) -> PyResult<PolicyTable> {
        let rules = rules.into_iter().map(|r| rule(py, r)).collect::<PyResult<Vec<_>>>()?;
        let spec = PolicySpec { rules, default: action(py, default)?, options: read_options(options)? };
        let table = py.detach(|| RuleTable::compile(spec));
        Ok(PolicyTable { table: Arc::new(table.map_err(|e| config_error(py, e.to_string()))?) })
    }

    fn __len__(&self) -> usize {
        self.table.len()
    }

    /// Whether queries for names are judged.
    #[getter]
    fn names_decide(&self) -> bool {
        self.table.names_decide()
    }

    /// What becomes of a flow of the port `endpoint`.
    #[pyo3(signature = (direction, protocol, source, destination, *, endpoint=0, pins=Vec::new(), shown=None,
                        host_addresses=Vec::new(), subnet=None, gateway=None, host_loopback=None))]
    #[allow(clippy::too_many_arguments)] // One for each argument in Python.
    fn judge(
        &self,
        py: Python<'_>,
        direction: &str,
        protocol: &str,
        source: Option<IpAddr>,
        destination: Pair,
        endpoint: u32,
        pins: Vec<String>,
        shown: Option<String>,
        host_addresses: Vec<IpAddr>,
        subnet: Option<(V4, u8)>,
        gateway: Option<IpAddr>,
        host_loopback: Option<IpAddr>,
    ) -> PyResult<Verdict> {
        let table = &self.table;
        let (endpoint, destination, protocol) =
            (PortId(endpoint), socket(destination), number(py, protocol)?);
        let of_action = |found: Option<(Action, u32)>| match found {
            Some((Action::Deny, rule)) => ("deny", rule),
            Some((_, rule)) => ("allow", rule),
            None => ("allow", DEFAULT),
        };
        let (verdict, rule) = match directed(py, direction)? {
            RuleDirection::In => {
                let client = source.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
                of_action(table.judge_inbound(endpoint, protocol, client, destination.port()))
            }
            RuleDirection::Guests => of_action(table.judge_guests(endpoint, None, protocol, destination)),
            RuleDirection::Out => {
                let pins = pins.iter().map(|p| name(py, p)).collect::<PyResult<Vec<_>>>()?;
                let shown = shown.as_deref().map(str::to_ascii_lowercase);
                let shown = match shown.as_deref() {
                    None => Shown::NotYet,
                    Some("") => Shown::Nothing,
                    Some(text) => Shown::Name(text.strip_suffix('.').unwrap_or(text).as_bytes()),
                };
                let host: HashSet<IpAddr> = host_addresses.iter().map(IpAddr::to_canonical).collect();
                // Of a network that has none, nothing is in it.
                let (net, prefix) = subnet.map_or((Ipv4Addr::BROADCAST, 32), |(net, prefix)| (net.0, prefix));
                let at = Surroundings {
                    subnet: Subnet::new(net, prefix),
                    gateway: gateway.unwrap_or(IpAddr::V4(Ipv4Addr::BROADCAST)),
                    gateway6: None,
                    host_loopback,
                    host: &host,
                };
                let evidence = Evidence { pins: &pins, shown };
                match table.judge(&Outbound { endpoint, protocol, destination, evidence, at }) {
                    Decision::Allow { rule } => ("allow", rule),
                    Decision::Inspect { rule, .. } => ("inspect", rule),
                    Decision::Ask { rule } => ("ask", rule),
                    Decision::Deny { rule } => ("deny", rule),
                }
            }
        };
        Ok(self.verdict(verdict, rule))
    }

    /// Whether the port `endpoint` may ask for a name.
    #[pyo3(signature = (name, *, endpoint=0, ordinary=true))]
    fn judge_name(&self, name: &str, endpoint: u32, ordinary: bool) -> Verdict {
        let name = name.to_ascii_lowercase();
        let name = name.strip_suffix('.').unwrap_or(&name);
        match self.table.judge_name(PortId(endpoint), name.as_bytes(), ordinary) {
            NameDecision::Allow { rule, .. } => self.verdict("allow", rule),
            NameDecision::Deny { rule, .. } => self.verdict("deny", rule),
        }
    }
}

impl PolicyTable {
    fn verdict(&self, verdict: &'static str, rule: u32) -> Verdict {
        let number = (rule != DEFAULT && rule != RESOLVER).then_some(rule);
        (verdict, number, self.table.label(rule).to_string())
    }
}

fn none_of(py: Python<'_>, what: &str, value: &str, known: &str) -> PyErr {
    config_error(py, format!("{what} {value:?} is none of {known}: choose one of them."))
}

fn action(py: Python<'_>, text: &str) -> PyResult<Action> {
    match text {
        "allow" => Ok(Action::Allow),
        "deny" => Ok(Action::Deny),
        "ask" => Ok(Action::Ask),
        other => Err(none_of(py, "action", other, "'allow', 'deny', 'ask'")),
    }
}

fn directed(py: Python<'_>, text: &str) -> PyResult<RuleDirection> {
    match text {
        "out" => Ok(RuleDirection::Out),
        "in" => Ok(RuleDirection::In),
        "guests" => Ok(RuleDirection::Guests),
        other => Err(none_of(py, "direction", other, "'out', 'in', 'guests'")),
    }
}

fn number(py: Python<'_>, text: &str) -> PyResult<u8> {
    match text {
        "tcp" => Ok(proto::TCP),
        "udp" => Ok(proto::UDP),
        "icmp" => Ok(proto::ICMP),
        other => other.parse().map_err(|_| none_of(py, "protocol", other, "'tcp', 'udp', 'icmp', a number")),
    }
}

fn name(py: Python<'_>, text: &str) -> PyResult<Name> {
    Name::new(text.as_bytes()).ok_or_else(|| config_error(py, format!("{text:?} is not a host name.")))
}

fn net(py: Python<'_>, text: &str) -> PyResult<Net> {
    let (address, length) = text.split_once('/').map_or((text, None), |(a, l)| (a, Some(l)));
    let wrong =
        || config_error(py, format!("{text:?} is not an address or prefix: write one such as 10.0.0.0/8."));
    let ip: IpAddr = address.parse().map_err(|_| wrong())?;
    let length = match length {
        Some(text) => text.parse().map_err(|_| wrong())?,
        None if ip.is_ipv4() => 32,
        None => 128,
    };
    Net::new(ip, length).ok_or_else(wrong)
}

fn group(py: Python<'_>, text: &str) -> PyResult<Group> {
    Ok(match text {
        "public" => Group::Public,
        "private" => Group::Private,
        "cgnat" => Group::Cgnat,
        "link_local" => Group::LinkLocal,
        "metadata" => Group::Metadata,
        "host" => Group::Host,
        "host_loopback" => Group::HostLoopback,
        "gateway" => Group::Gateway,
        "guests" => Group::Guests,
        "multicast" => Group::Multicast,
        "special" => Group::Special,
        other => {
            let known = "'public', 'private', 'cgnat', 'link_local', 'metadata', 'host', 'host_loopback', \
                         'gateway', 'guests', 'multicast', 'special'";
            return Err(none_of(py, "group", other, known));
        }
    })
}

fn destination(py: Python<'_>, tuple: &Bound<'_, PyTuple>) -> PyResult<Destination> {
    let kind: String = tuple.get_item(0)?.extract()?;
    let text = || tuple.get_item(1)?.extract::<String>();
    Ok(match kind.as_str() {
        "any" => Destination::Any,
        "net" => Destination::Net(net(py, &text()?)?),
        "group" => Destination::Group(group(py, &text()?)?),
        "name" => Destination::Name(NamePattern::Exact(name(py, &text()?)?)),
        "below" => Destination::Name(NamePattern::Below(name(py, &text()?)?)),
        "at_or_below" => Destination::Name(NamePattern::AtOrBelow(name(py, &text()?)?)),
        "any_of" => {
            let names: PyResult<_> = text()?.split(' ').map(|one| name(py, one)).collect();
            Destination::Name(NamePattern::AnyOf(names?))
        }
        "endpoints" => {
            let ports: Vec<u32> = tuple.get_item(1)?.extract()?;
            Destination::Endpoints(ports.into_iter().map(PortId).collect())
        }
        other => {
            let known = "'any', 'net', 'group', 'name', 'below', 'at_or_below', 'any_of', 'endpoints'";
            return Err(none_of(py, "destination", other, known));
        }
    })
}

fn range(py: Python<'_>, (protocol, first, last): (String, u16, u16)) -> PyResult<PortRange> {
    let protocol = match protocol.as_str() {
        "any" => Protocol::Any,
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "icmp" => Protocol::Icmp,
        other => return Err(none_of(py, "protocol", other, "'any', 'tcp', 'udp', 'icmp'")),
    };
    Ok(PortRange { protocol, first, last })
}

/// A limit as Python hands it over: bytes a second from and to guests, packets a second from and to them, new flows a
/// second, open flows, queries a second, bytes in all.
pub(crate) type LimitTuple =
    (Option<u64>, Option<u64>, Option<u64>, Option<u64>, Option<u64>, Option<u32>, Option<u64>, Option<u64>);

pub(crate) fn limit(tuple: LimitTuple) -> LimitSpec {
    let (up, down, packets_up, packets_down, new_flows, open_flows, queries, total) = tuple;
    LimitSpec { up, down, packets_up, packets_down, new_flows, open_flows, queries, total }
}

fn rule(py: Python<'_>, tuple: RuleTuple<'_>) -> PyResult<RuleSpec> {
    let (label, does, direction, endpoints, from, to, ports, by, log, query_types, limits) = tuple;
    Ok(RuleSpec {
        label: label.into(),
        action: action(py, &does)?,
        direction: directed(py, &direction)?,
        endpoints: endpoints.map(|ports| ports.into_iter().map(PortId).collect()),
        from: from.iter().map(|n| net(py, n)).collect::<PyResult<_>>()?,
        destination: destination(py, &to)?,
        ports: ports.into_iter().map(|r| range(py, r)).collect::<PyResult<_>>()?,
        by: match by.as_str() {
            "conversation" => NameMatch::Conversation,
            "address" => NameMatch::Address,
            other => return Err(none_of(py, "match", other, "'conversation', 'address'")),
        },
        log,
        limit: limits.map(limit),
        all_query_types: match query_types.as_str() {
            "ordinary" => false,
            "all" => true,
            other => return Err(none_of(py, "query_types", other, "'ordinary', 'all'")),
        },
    })
}

fn read_options(given: &Bound<'_, PyDict>) -> PyResult<PolicyOptions> {
    let py = given.py();
    let mut options = PolicyOptions::default();
    for (key, value) in given {
        let key: String = key.extract()?;
        let text = || value.extract::<String>();
        match key.as_str() {
            "refuse" => {
                options.refuse = match text()?.as_str() {
                    "reset" => Refuse::Reset,
                    "prohibited" => Refuse::Prohibited,
                    other => return Err(none_of(py, "refuse", other, "'reset', 'prohibited'")),
                }
            }
            "ech" => {
                options.ech = match text()?.as_str() {
                    "outer" => Ech::Outer,
                    "deny" => Ech::Deny,
                    other => return Err(none_of(py, "ech", other, "'outer', 'deny'")),
                }
            }
            "dns_refusal" => {
                options.dns_refusal = match text()?.as_str() {
                    "nxdomain" => DnsRefusal::NxDomain,
                    "refused" => DnsRefusal::Refused,
                    other => return Err(none_of(py, "dns_refusal", other, "'nxdomain', 'refused'")),
                }
            }
            "pin_min_s" => options.pin_min_s = value.extract()?,
            "names_per_suffix" => options.names_per_suffix = value.extract()?,
            "name_bytes_per_suffix" => options.name_bytes_per_suffix = value.extract()?,
            "note_names" => options.note_names = value.extract()?,
            "ask_s" => options.ask_s = value.extract()?,
            other => return Err(config_error(py, format!("there is no policy option {other:?}."))),
        }
    }
    Ok(options)
}
