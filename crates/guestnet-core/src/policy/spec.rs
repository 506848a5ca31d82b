//! Theory of operation: what the owner of a network says about its flows, as plain data. The control side reads files and
//! command lines, resolves tags, presets and default ports, and makes a [`PolicySpec`] of them.
//! [`crate::policy::table::RuleTable`] compiles it.

use crate::interface::types::PortId;
use crate::policy::shaping::LimitSpec;
use crate::policy::special::Group;
use std::borrow::Borrow;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

/// The bytes of the longest name, as text without a final dot (RFC 1035 2.3.4).
pub const NAME_MAX: usize = 253;

/// What is done with a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// It may be opened.
    Allow,
    /// It is refused.
    Deny,
    /// The owner is asked.
    Ask,
}

/// Which flows a rule is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RuleDirection {
    /// Those that guests open to the outside.
    Out,
    /// Those that the outside opens to guests.
    In,
    /// Those that guests open to other guests.
    Guests,
}

/// A host name: labels in lower case with dots between them, no dot at the end.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Arc<[u8]>);

impl Name {
    /// Checks a name and puts it into lower case. `None` for one that no DNS name can be.
    #[must_use]
    pub fn new(text: &[u8]) -> Option<Name> {
        let text = text.strip_suffix(b".").unwrap_or(text);
        let is_label = |l: &[u8]| !l.is_empty() && l.len() <= 63 && !l.contains(&0);
        let fits = text.len() <= NAME_MAX && text.split(|b| *b == b'.').all(is_label);
        fits.then(|| Name(text.to_ascii_lowercase().into()))
    }

    /// Its text.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether there is another one with the same memory.
    pub(crate) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

impl Borrow<[u8]> for Name {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

/// Names that a rule matches.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum NamePattern {
    /// This name alone.
    Exact(Name),
    /// Every name below it.
    Below(Name),
    /// It and every name below it.
    AtOrBelow(Name),
    /// Each of these and every name below them.
    AnyOf(Arc<[Name]>),
}

impl NamePattern {
    /// Whether a name (lower case, no dot at the end) matches.
    #[must_use]
    pub fn matches(&self, name: &[u8]) -> bool {
        let is_below = |n: &Name| {
            name.strip_suffix(n.as_bytes()).is_some_and(|rest| rest.len() > 1 && rest.ends_with(b"."))
        };
        match self {
            NamePattern::Exact(n) => n.as_bytes() == name,
            NamePattern::Below(n) => is_below(n),
            NamePattern::AtOrBelow(n) => n.as_bytes() == name || is_below(n),
            NamePattern::AnyOf(names) => names.iter().any(|n| n.as_bytes() == name || is_below(n)),
        }
    }
}

/// An address prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Net {
    bits: u128,
    length: u8,
    v6: bool,
}

impl Net {
    /// The prefix of `length` bits that `address` is in; bits beyond it are ignored. `None` when it is longer than an
    /// address. A prefix of IPv4-mapped addresses is the IPv4 prefix.
    #[must_use]
    pub fn new(address: IpAddr, length: u8) -> Option<Net> {
        let (bits, width, length) = match (address, address.to_canonical()) {
            (IpAddr::V4(a), _) => (u128::from(a.to_bits()), 32, length),
            (IpAddr::V6(_), IpAddr::V4(a)) if length >= 96 => (u128::from(a.to_bits()), 32, length - 96),
            (IpAddr::V6(a), _) => (a.to_bits(), 128, length),
        };
        if u32::from(length) > width {
            return None;
        }
        let mask = u128::MAX.checked_shl(width - u32::from(length)).unwrap_or(0);
        Some(Net { bits: bits & mask, length, v6: width == 128 })
    }

    /// Whether an address is in it.
    #[must_use]
    pub fn contains(&self, ip: IpAddr) -> bool {
        let (bits, width) = bits_of(ip);
        (width == 128) == self.v6
            && (bits ^ self.bits).checked_shr(width.saturating_sub(u32::from(self.length))).unwrap_or(0) == 0
    }

    /// Whether it is one address.
    #[must_use]
    pub fn is_host(&self) -> bool {
        self.length == if self.v6 { 128 } else { 32 }
    }

    /// Its bits, its length, and whether it is of IPv6.
    #[must_use]
    pub fn parts(&self) -> (u128, u8, bool) {
        (self.bits, self.length, self.v6)
    }
}

/// The bits of an address and how many there are. An IPv4-mapped address is its IPv4 address.
pub(crate) fn bits_of(ip: IpAddr) -> (u128, u32) {
    match ip.to_canonical() {
        IpAddr::V4(a) => (u128::from(a.to_bits()), 32),
        IpAddr::V6(a) => (a.to_bits(), 128),
    }
}

/// Destinations that a rule matches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// All.
    Any,
    /// A prefix.
    Net(Net),
    /// A group of addresses.
    Group(Group),
    /// Addresses that the guest got in answers for matching names.
    Name(NamePattern),
    /// The guests on these ports. In rules for flows to guests.
    Endpoints(Vec<PortId>),
}

/// The protocol of a port range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// All.
    Any,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP and ICMPv6; ports mean nothing.
    Icmp,
}

/// Ports of a protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PortRange {
    /// The protocol.
    pub protocol: Protocol,
    /// The first port.
    pub first: u16,
    /// The last port.
    pub last: u16,
}

/// How a rule with a name is matched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum NameMatch {
    /// The address must be pinned for the name, and the conversation must show it.
    #[default]
    Conversation,
    /// The address must be pinned for the name.
    Address,
}

/// A rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleSpec {
    /// The name by which people know it.
    pub label: Arc<str>,
    /// What it does.
    pub action: Action,
    /// Which flows it is about.
    pub direction: RuleDirection,
    /// The guests that it is about; `None` for all of them.
    pub endpoints: Option<Vec<PortId>>,
    /// Clients that it is about, in rules for inbound flows; none for all of them.
    pub from: Vec<Net>,
    /// Where the flows go.
    pub destination: Destination,
    /// Ports; none for every protocol and port.
    pub ports: Vec<PortRange>,
    /// How a name is matched.
    pub by: NameMatch,
    /// Whether flows that it admits are logged.
    pub log: bool,
    /// What the flows that it admits may carry together.
    pub limit: Option<LimitSpec>,
    /// Whether queries of every type may be made for its names, and not only of ordinary types.
    pub all_query_types: bool,
}

/// How the guest hears that a flow is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Refuse {
    /// TCP by a reset.
    #[default]
    Reset,
    /// TCP by ICMP, administratively prohibited.
    Prohibited,
}

/// What happens to a ClientHello with the extension encrypted_client_hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Ech {
    /// It is judged by its outer name.
    #[default]
    Outer,
    /// It is refused.
    Deny,
}

/// The response to a query for a name that is not allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum DnsRefusal {
    /// The name does not exist.
    #[default]
    NxDomain,
    /// The query is refused.
    Refused,
}

/// What holds for all rules of a policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PolicyOptions {
    /// How guests hear of refused flows.
    pub refuse: Refuse,
    /// What becomes of ECH.
    pub ech: Ech,
    /// What becomes of queries for names that are not allowed.
    pub dns_refusal: DnsRefusal,
    /// The shortest life of a pin, in seconds.
    pub pin_min_s: u32,
    /// Distinct names below an allowed suffix, of one guest in five minutes.
    pub names_per_suffix: u32,
    /// Bytes of such names.
    pub name_bytes_per_suffix: u32,
    /// Names that guests ask for are noted even where no rule is about names.
    pub note_names: bool,
    /// Seconds that a flow waits for the answer of the owner.
    pub ask_s: u32,
}

impl Default for PolicyOptions {
    fn default() -> Self {
        PolicyOptions {
            refuse: Refuse::default(),
            ech: Ech::default(),
            dns_refusal: DnsRefusal::default(),
            pin_min_s: 30,
            names_per_suffix: 100,
            name_bytes_per_suffix: 4096,
            note_names: false,
            ask_s: 30,
        }
    }
}

/// A policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicySpec {
    /// The rules, of which the first that matches decides.
    pub rules: Vec<RuleSpec>,
    /// What becomes of outbound flows that no rule matches.
    pub default: Action,
    /// What holds for all rules.
    pub options: PolicyOptions,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::new(text.as_bytes()).unwrap()
    }

    fn net(text: &str) -> Net {
        let (address, length) = text.split_once('/').unwrap();
        Net::new(address.parse().unwrap(), length.parse().unwrap()).unwrap()
    }

    #[test]
    fn names_are_labels_in_lower_case() {
        assert_eq!(name("PyPI.org."), name("pypi.org"));
        for wrong in ["", ".", "a..b", ".a", "a\0b", &"a".repeat(64), &["a"; 128].join(".")] {
            assert_eq!(Name::new(wrong.as_bytes()), None, "{wrong:?}");
        }
        assert!(Name::new(["a"; 127].join(".").as_bytes()).is_some());
    }

    #[test]
    fn a_pattern_matches_whole_labels() {
        let (exact, below, both) = (
            NamePattern::Exact(name("ok.example")),
            NamePattern::Below(name("ok.example")),
            NamePattern::AtOrBelow(name("ok.example")),
        );
        for (text, expected) in [
            ("ok.example", [true, false, true]),
            ("a.ok.example", [false, true, true]),
            ("b.a.ok.example", [false, true, true]),
            ("nok.example", [false, false, false]),
            (".ok.example", [false, false, false]),
            ("example", [false, false, false]),
            ("ok.example.evil", [false, false, false]),
        ] {
            let got = [&exact, &below, &both].map(|p| p.matches(text.as_bytes()));
            assert_eq!(got, expected, "{text}");
        }
    }

    #[test]
    fn a_prefix_of_mapped_addresses_is_the_prefix_of_ipv4() {
        assert_eq!(net("::ffff:10.1.2.3/104"), net("10.0.0.0/8"));
        assert!(net("10.0.0.0/8").contains("::ffff:10.9.9.9".parse().unwrap()));
        assert!(net("0.0.0.0/0").contains("1.2.3.4".parse().unwrap()));
        assert!(!net("0.0.0.0/0").contains("2001:db8::1".parse().unwrap()));
        assert!(net("::/0").contains("2001:db8::1".parse().unwrap()));
        assert!(net("192.0.2.7/32").is_host() && !net("192.0.2.7/31").is_host());
        assert_eq!(Net::new("10.0.0.0".parse().unwrap(), 33), None);
    }
}
