use super::*;
use crate::policy::special::Group;
use crate::tables::addressing::Subnet;
use proptest::prelude::*;
use std::collections::HashSet;
use std::net::Ipv4Addr;

fn name(text: &str) -> Name {
    Name::new(text.as_bytes()).unwrap()
}

fn net(text: &str) -> Destination {
    let (address, length) = text.split_once('/').unwrap();
    Destination::Net(Net::new(address.parse().unwrap(), length.parse().unwrap()).unwrap())
}

fn rule(action: Action, destination: Destination) -> RuleSpec {
    RuleSpec {
        label: "r".into(),
        action,
        direction: RuleDirection::Out,
        endpoints: None,
        from: vec![],
        destination,
        ports: vec![],
        by: NameMatch::Conversation,
        log: false,
        limit: None,
        all_query_types: false,
    }
}

fn tcp(first: u16, last: u16) -> PortRange {
    PortRange { protocol: Protocol::Tcp, first, last }
}

fn by_name(action: Action, pattern: NamePattern) -> RuleSpec {
    let web = vec![tcp(80, 80), tcp(443, 443), PortRange { protocol: Protocol::Udp, first: 443, last: 443 }];
    let ports = if action == Action::Deny { vec![] } else { web };
    RuleSpec { ports, ..rule(action, Destination::Name(pattern)) }
}

fn exact(text: &str) -> NamePattern {
    NamePattern::Exact(name(text))
}

fn table(default: Action, rules: Vec<RuleSpec>) -> RuleTable {
    RuleTable::compile(PolicySpec { rules, default, options: PolicyOptions::default() }).unwrap()
}

/// What a table is asked in these tests.
struct World {
    host: HashSet<IpAddr>,
}

impl World {
    fn new() -> World {
        World { host: HashSet::from(["203.0.113.9".parse().unwrap()]) }
    }

    fn at(&self) -> Surroundings<'_> {
        Surroundings {
            subnet: Subnet::new(Ipv4Addr::new(192, 168, 64, 0), 24),
            gateway: "192.168.64.1".parse().unwrap(),
            gateway6: None,
            host_loopback: Some("192.168.64.254".parse().unwrap()),
            host: &self.host,
        }
    }

    fn ask(&self, t: &RuleTable, protocol: u8, to: &str, pins: &[Name], shown: Shown<'_>) -> Decision {
        let destination = to.parse().unwrap();
        let evidence = Evidence { pins, shown };
        t.judge(&Outbound { endpoint: PortId(1), protocol, destination, evidence, at: self.at() })
    }

    fn plain(&self, t: &RuleTable, to: &str) -> Decision {
        self.ask(t, 6, to, &[], Shown::NotYet)
    }
}

const ALLOWED: Decision = Decision::Allow { rule: 0 };
const REST: Decision = Decision::Deny { rule: DEFAULT };

#[test]
fn the_first_rule_that_matches_decides() {
    let w = World::new();
    let t = table(
        Action::Deny,
        vec![
            rule(Action::Deny, net("10.1.0.0/16")),
            rule(Action::Allow, net("10.0.0.0/8")),
            rule(Action::Deny, net("10.2.0.0/16")),
        ],
    );
    assert_eq!(w.plain(&t, "10.1.2.3:80"), Decision::Deny { rule: 0 });
    assert_eq!(w.plain(&t, "10.2.2.3:80"), Decision::Allow { rule: 1 });
    assert_eq!(w.plain(&t, "11.2.2.3:80"), REST);
    assert_eq!((t.len(), t.label(0).as_ref(), t.label(DEFAULT).as_ref()), (3, "r", "default"));
}

#[test]
fn ports_and_protocols_are_part_of_a_rule() {
    let w = World::new();
    let ports = vec![tcp(8000, 8100), PortRange { protocol: Protocol::Icmp, first: 0, last: u16::MAX }];
    let t = table(Action::Deny, vec![RuleSpec { ports, ..rule(Action::Allow, net("192.0.2.0/24")) }]);
    for (protocol, to, expected) in [
        (6, "192.0.2.1:8000", ALLOWED),
        (6, "192.0.2.1:8100", ALLOWED),
        (6, "192.0.2.1:8101", REST),
        (17, "192.0.2.1:8000", REST),
        (1, "192.0.2.1:0", ALLOWED),
        (1, "192.0.2.1:77", ALLOWED),
        (47, "192.0.2.1:0", REST),
    ] {
        assert_eq!(w.ask(&t, protocol, to, &[], Shown::NotYet), expected, "{protocol} {to}");
    }
}

#[test]
fn groups_are_what_their_addresses_mean() {
    let w = World::new();
    let groups = [
        (Group::Public, &["8.8.8.8", "192.0.2.1", "2001:db8::1", "2600::1"][..]),
        (Group::Private, &["10.0.0.1", "172.31.0.1", "192.168.1.1", "fd00::1", "64:ff9b::10.0.0.1"][..]),
        (Group::Cgnat, &["100.64.0.1", "100.127.255.255"][..]),
        (Group::LinkLocal, &["169.254.1.1", "fe80::1"][..]),
        (Group::Metadata, &["169.254.169.254", "168.63.129.16", "fd00:ec2::254"][..]),
        (Group::Host, &["203.0.113.9", "::ffff:203.0.113.9"][..]),
        (Group::HostLoopback, &["192.168.64.254"][..]),
        (Group::Gateway, &["192.168.64.1"][..]),
        (Group::Guests, &["192.168.64.7"][..]),
        (Group::Multicast, &["224.0.0.1", "ff02::1"][..]),
        (Group::Special, &["127.0.0.1", "240.0.0.1", "198.18.0.1", "192.0.0.8", "::1"][..]),
    ];
    for (group, members) in groups {
        for text in members {
            let ip: IpAddr = text.parse().unwrap();
            assert!(group.includes(&w.at(), ip), "{group:?} {text}");
            assert_eq!(Group::Public.includes(&w.at(), ip), group == Group::Public, "{text}");
        }
    }
    assert!(!Group::Cgnat.includes(&w.at(), "100.128.0.1".parse().unwrap()));
}

#[test]
fn a_name_needs_the_pin_and_the_conversation() {
    let w = World::new();
    let t = table(Action::Deny, vec![by_name(Action::Allow, exact("ok.example"))]);
    let pins = [name("ok.example")];
    let to = "192.0.2.1:443";
    assert_eq!(w.plain(&t, to), REST, "no pin");
    assert_eq!(w.ask(&t, 6, to, &pins, Shown::NotYet), Decision::Inspect { rule: 0, strict: true });
    assert_eq!(w.ask(&t, 17, to, &pins, Shown::NotYet), Decision::Inspect { rule: 0, strict: true });
    assert_eq!(w.ask(&t, 6, to, &pins, Shown::Name(b"ok.example")), ALLOWED);
    assert_eq!(w.ask(&t, 6, to, &[], Shown::Name(b"ok.example")), REST, "shown, not pinned");
    assert_eq!(w.ask(&t, 6, to, &pins, Shown::Name(b"evil.example")), REST);
    assert_eq!(w.ask(&t, 6, to, &pins, Shown::Nothing), REST);
    assert_eq!(w.ask(&t, 1, to, &pins, Shown::NotYet), REST, "ping shows no name");
    assert_eq!(w.ask(&t, 6, "192.0.2.1:22", &pins, Shown::NotYet), REST, "another port");
    let other = [name("other.example")];
    assert_eq!(w.ask(&t, 6, to, &other, Shown::Name(b"ok.example")), REST, "pinned for another name");
}

#[test]
fn a_shared_address_is_judged_by_what_is_shown() {
    let w = World::new();
    let below = by_name(Action::Allow, NamePattern::Below(name("debian.org")));
    let t = table(Action::Deny, vec![by_name(Action::Allow, exact("ok.example")), below]);
    let pins = [name("ok.example"), name("deb.debian.org")];
    let to = "192.0.2.1:443";
    assert_eq!(w.ask(&t, 6, to, &pins, Shown::Name(b"ok.example")), ALLOWED);
    assert_eq!(w.ask(&t, 6, to, &pins, Shown::Name(b"deb.debian.org")), Decision::Allow { rule: 1 });
    // The address is pinned for a name of the rule, and the rule allows every name that it matches.
    assert_eq!(w.ask(&t, 6, to, &pins, Shown::Name(b"x.debian.org")), Decision::Allow { rule: 1 });
    assert_eq!(w.ask(&t, 6, to, &pins, Shown::Name(b"debian.org")), REST);
}

#[test]
fn a_name_by_address_needs_the_pin_alone() {
    let w = World::new();
    let ssh = RuleSpec {
        by: NameMatch::Address,
        ports: vec![tcp(22, 22)],
        ..by_name(Action::Allow, exact("git.example"))
    };
    let t = table(Action::Deny, vec![ssh]);
    let pins = [name("git.example")];
    assert_eq!(w.ask(&t, 6, "192.0.2.1:22", &pins, Shown::NotYet), ALLOWED);
    assert_eq!(w.plain(&t, "192.0.2.1:22"), REST);
}

#[test]
fn a_group_of_names_has_what_is_below_them() {
    let w = World::new();
    let group = NamePattern::AnyOf([name("dns.example"), name("doh.test")].into());
    let t = table(Action::Allow, vec![by_name(Action::Deny, group)]);
    let to = "192.0.2.1:443";
    for shown in ["dns.example", "x.dns.example", "doh.test"] {
        assert_eq!(w.ask(&t, 6, to, &[], Shown::Name(shown.as_bytes())), Decision::Deny { rule: 0 });
        let asked = t.judge_name(PortId(1), shown.as_bytes(), true);
        assert_eq!(asked, NameDecision::Deny { rule: 0, by_type: false });
    }
    assert_eq!(w.ask(&t, 6, to, &[], Shown::Name(b"xdns.example")), Decision::Allow { rule: DEFAULT });
}

#[test]
fn a_denied_name_is_denied_without_a_pin() {
    let w = World::new();
    let t = table(Action::Allow, vec![by_name(Action::Deny, exact("evil.example"))]);
    let to = "192.0.2.1:443";
    assert_eq!(w.plain(&t, to), Decision::Inspect { rule: DEFAULT, strict: false });
    assert_eq!(w.ask(&t, 6, to, &[], Shown::Name(b"evil.example")), Decision::Deny { rule: 0 });
    assert_eq!(w.ask(&t, 6, to, &[], Shown::Name(b"ok.example")), Decision::Allow { rule: DEFAULT });
    assert_eq!(w.ask(&t, 6, to, &[], Shown::Nothing), Decision::Allow { rule: DEFAULT });
    assert_eq!(w.ask(&t, 1, to, &[], Shown::NotYet), Decision::Allow { rule: DEFAULT });
    assert_eq!(w.ask(&t, 1, to, &[name("evil.example")], Shown::NotYet), Decision::Deny { rule: 0 });
}

#[test]
fn an_allow_rule_above_a_denied_name_needs_no_inspection() {
    let w = World::new();
    let allow = rule(Action::Allow, net("192.0.2.0/24"));
    let t = table(Action::Allow, vec![allow, by_name(Action::Deny, exact("evil.example"))]);
    assert_eq!(w.plain(&t, "192.0.2.1:443"), ALLOWED);
    assert_eq!(w.plain(&t, "192.0.3.1:443"), Decision::Inspect { rule: DEFAULT, strict: false });
}

#[test]
fn other_resolvers_are_refused_where_names_decide() {
    let w = World::new();
    let names = by_name(Action::Allow, exact("ok.example"));
    let t = table(Action::Deny, vec![names.clone(), rule(Action::Allow, Destination::Group(Group::Public))]);
    for (protocol, to) in [(17, "8.8.8.8:53"), (6, "8.8.8.8:53"), (6, "8.8.8.8:853"), (17, "8.8.8.8:853")] {
        let got = w.ask(&t, protocol, to, &[], Shown::NotYet);
        assert_eq!(got, Decision::Deny { rule: RESOLVER }, "{protocol} {to}");
    }
    assert_eq!(t.label(RESOLVER).as_ref(), "other_resolver");
    let dns = PortRange { protocol: Protocol::Any, first: 53, last: 53 };
    let named = RuleSpec { ports: vec![dns], ..rule(Action::Allow, net("8.8.8.8/32")) };
    let t = table(Action::Deny, vec![names, named]);
    assert_eq!(w.ask(&t, 17, "8.8.8.8:53", &[], Shown::NotYet), Decision::Allow { rule: 1 });
    let t = table(Action::Allow, vec![]);
    assert_eq!(w.ask(&t, 17, "8.8.8.8:53", &[], Shown::NotYet), Decision::Allow { rule: DEFAULT });
}

#[test]
fn another_spelling_of_a_forbidden_address_is_forbidden() {
    let w = World::new();
    let deny = rule(Action::Deny, net("192.0.2.0/24"));
    let t = table(Action::Allow, vec![deny]);
    for to in [
        "192.0.2.1:80",
        "[::ffff:192.0.2.1]:80",
        "[64:ff9b::192.0.2.1]:80",
        "[64:ff9b:1::192.0.2.1]:80",
        "[2002:c000:201::1]:80",
        "[::192.0.2.1]:80",
        // Teredo: the server, and the client's address inverted.
        "[2001:0:c000:201::1]:80",
        "[2001:0:808:808::3fff:fdfe]:80",
    ] {
        assert_eq!(w.plain(&t, to), Decision::Deny { rule: 0 }, "{to}");
    }
    assert_eq!(w.plain(&t, "[64:ff9b::198.51.100.1]:80"), Decision::Allow { rule: DEFAULT });
}

#[test]
fn only_exactly_its_address_lifts_the_floor() {
    let w = World::new();
    let lifts = |rules: Vec<RuleSpec>, to: &str| {
        let t = table(Action::Allow, rules);
        let destination = to.parse().unwrap();
        let endpoint = PortId(1);
        t.lifts(&Outbound { endpoint, protocol: 6, destination, evidence: Evidence::NONE, at: w.at() })
    };
    let metadata = "169.254.169.254:80";
    assert_eq!(lifts(vec![rule(Action::Allow, Destination::Any)], metadata), None);
    assert_eq!(lifts(vec![rule(Action::Allow, Destination::Group(Group::Metadata))], metadata), None);
    assert_eq!(lifts(vec![rule(Action::Allow, net("169.254.0.0/16"))], metadata), None);
    let one = rule(Action::Allow, net("169.254.169.254/32"));
    assert_eq!(lifts(vec![one.clone()], metadata), Some(0));
    assert_eq!(lifts(vec![rule(Action::Deny, net("169.254.0.0/16")), one.clone()], metadata), None);
    assert_eq!(lifts(vec![one], "169.254.169.253:80"), None);
}

#[test]
fn a_guest_has_the_rules_that_are_about_it() {
    let w = World::new();
    let other =
        RuleSpec { endpoints: Some(vec![PortId(9), PortId(2)]), ..rule(Action::Allow, Destination::Any) };
    let t = table(Action::Deny, vec![other]);
    assert_eq!(w.plain(&t, "192.0.2.1:80"), REST);
    let destination = "192.0.2.1:80".parse().unwrap();
    for endpoint in [PortId(2), PortId(9)] {
        let flow = Outbound { endpoint, protocol: 6, destination, evidence: Evidence::NONE, at: w.at() };
        assert_eq!(t.judge(&flow), ALLOWED);
    }
}

#[test]
fn names_without_a_rule_are_not_asked_for() {
    let asked = |t: &RuleTable, text: &str| t.judge_name(PortId(1), text.as_bytes(), true);
    let allow = |rule, below| NameDecision::Allow { rule, below };
    let deny = |rule| NameDecision::Deny { rule, by_type: false };
    let t = table(
        Action::Deny,
        vec![
            by_name(Action::Deny, exact("bad.ok.example")),
            by_name(Action::Allow, NamePattern::AtOrBelow(name("ok.example"))),
            rule(Action::Allow, net("10.0.0.0/8")),
        ],
    );
    assert!(t.names_decide());
    assert_eq!(asked(&t, "ok.example"), allow(1, false));
    assert_eq!(asked(&t, "a.ok.example"), allow(1, true));
    assert_eq!(asked(&t, "bad.ok.example"), deny(0));
    assert_eq!(asked(&t, "other.example"), deny(DEFAULT));
    assert_eq!(t.judge_name(PortId(1), b"ok.example", false), NameDecision::Deny { rule: 1, by_type: true });
    let open = table(
        Action::Deny,
        vec![
            by_name(Action::Deny, exact("evil.example")),
            rule(Action::Allow, Destination::Group(Group::Public)),
        ],
    );
    assert_eq!(asked(&open, "any.example"), allow(1, false));
    assert_eq!(asked(&open, "evil.example"), deny(0));
    assert!(!table(Action::Allow, vec![]).names_decide());
    let ports = vec![tcp(25, 25)];
    let mail = RuleSpec { ports, ..by_name(Action::Deny, exact("mail.example")) };
    assert_eq!(asked(&table(Action::Allow, vec![mail]), "mail.example"), allow(DEFAULT, false));
}

#[test]
fn inbound_rules_ask_where_the_client_is() {
    let from = vec![Net::new("198.51.100.0".parse().unwrap(), 24).unwrap()];
    let inbound =
        |action, from| RuleSpec { direction: RuleDirection::In, from, ..rule(action, Destination::Any) };
    let t = table(Action::Deny, vec![inbound(Action::Allow, from), inbound(Action::Deny, vec![])]);
    let ask = |client: &str| t.judge_inbound(PortId(1), 6, client.parse().unwrap(), 80);
    assert_eq!(ask("198.51.100.7"), Some((Action::Allow, 0)));
    assert_eq!(ask("203.0.113.7"), Some((Action::Deny, 1)));
    assert_eq!(table(Action::Deny, vec![]).judge_inbound(PortId(1), 6, "::1".parse().unwrap(), 1), None);
}

#[test]
fn an_answer_may_have_an_address_that_a_rule_names() {
    let w = World::new();
    let admits = |rules: Vec<RuleSpec>, ip: &str| {
        table(Action::Deny, rules).admits_address(PortId(1), w.at(), ip.parse().unwrap())
    };
    assert!(!admits(vec![rule(Action::Allow, Destination::Any)], "10.0.0.1"));
    assert!(admits(vec![rule(Action::Allow, Destination::Group(Group::Private))], "10.0.0.1"));
    assert!(admits(vec![rule(Action::Allow, net("10.0.0.0/8"))], "10.0.0.1"));
    assert!(!admits(vec![rule(Action::Allow, Destination::Group(Group::Private))], "203.0.113.9"));
    assert!(admits(vec![rule(Action::Allow, Destination::Group(Group::Host))], "203.0.113.9"));
    let deny = rule(Action::Deny, net("10.0.0.1/32"));
    assert!(!admits(vec![deny, rule(Action::Allow, net("10.0.0.0/8"))], "10.0.0.1"));
}

// ---- the table against a walk through all rules ---------------------------------------------------------

fn any_destination() -> impl Strategy<Value = Destination> {
    let label = prop::sample::select(vec!["a.example", "b.example", "x.a.example", "example"]);
    prop_oneof![
        Just(Destination::Any),
        (0u8..4, 0u8..=32).prop_map(|(last, length)| {
            Destination::Net(Net::new(Ipv4Addr::new(192, 0, 2, last).into(), length).unwrap())
        }),
        prop::sample::select(vec![Group::Public, Group::Private, Group::Host]).prop_map(Destination::Group),
        (0u8..3, label).prop_map(|(kind, label)| Destination::Name(match kind {
            0 => NamePattern::Exact(name(label)),
            1 => NamePattern::Below(name(label)),
            _ => NamePattern::AtOrBelow(name(label)),
        })),
    ]
}

fn any_rule() -> impl Strategy<Value = RuleSpec> {
    let action = prop::sample::select(vec![Action::Allow, Action::Deny, Action::Ask]);
    let ports = prop::sample::select(vec![vec![], vec![tcp(443, 443)], vec![tcp(80, 80), tcp(443, 443)]]);
    let by = prop::sample::select(vec![NameMatch::Conversation, NameMatch::Address]);
    (action, any_destination(), ports, by).prop_map(|(action, to, ports, by)| RuleSpec {
        ports,
        by,
        ..rule(action, to)
    })
}

/// The definition, one rule after the other.
fn naive(spec: &PolicySpec, flow: &Outbound<'_>) -> Decision {
    let ip = flow.destination.ip();
    let port = flow.destination.port();
    let Evidence { pins, shown } = flow.evidence;
    let mut watched = false;
    let finish = |rule: u32, action: Action, watched: bool| match action {
        Action::Deny => Decision::Deny { rule },
        Action::Ask => Decision::Ask { rule },
        Action::Allow if watched => Decision::Inspect { rule, strict: false },
        Action::Allow => Decision::Allow { rule },
    };
    for (r, number) in spec.rules.iter().zip(0u32..) {
        if !r.ports.is_empty() && !r.ports.iter().any(|p| p.first <= port && port <= p.last) {
            continue;
        }
        let matched = match &r.destination {
            Destination::Any => true,
            Destination::Net(net) => net.contains(ip),
            Destination::Group(group) => group.includes(&flow.at, ip),
            Destination::Endpoints(_) => false,
            Destination::Name(pattern) => {
                let pinned = pins.iter().any(|n| pattern.matches(n.as_bytes()));
                let is_shown = matches!(shown, Shown::Name(n) if pattern.matches(n));
                match (r.by, r.action) {
                    (NameMatch::Address, _) => pinned,
                    (_, Action::Deny) => {
                        watched |= shown == Shown::NotYet;
                        is_shown
                    }
                    (_, Action::Allow) if shown == Shown::NotYet && pinned => {
                        return Decision::Inspect { rule: number, strict: true };
                    }
                    (_, Action::Ask) if shown == Shown::NotYet => pinned,
                    _ => pinned && is_shown,
                }
            }
        };
        if matched {
            return finish(number, r.action, watched);
        }
    }
    finish(DEFAULT, spec.default, watched)
}

proptest! {
    #[test]
    fn the_table_says_what_a_walk_through_all_rules_says(
        rules in prop::collection::vec(any_rule(), 0..24),
        default in prop::sample::select(vec![Action::Allow, Action::Deny]),
        last in 0u8..4,
        port in prop::sample::select(vec![80u16, 443, 22]),
        pinned in prop::sample::subsequence(vec!["a.example", "b.example", "x.a.example", "c.example"], 0..4),
        shown in prop::sample::select(vec!["", "-", "a.example", "x.a.example", "c.example"]),
    ) {
        let w = World::new();
        let pins: Vec<Name> = pinned.into_iter().map(name).collect();
        let shown = match shown {
            "" => Shown::NotYet,
            "-" => Shown::Nothing,
            text => Shown::Name(text.as_bytes()),
        };
        let destination = SocketAddr::new(Ipv4Addr::new(192, 0, 2, last).into(), port);
        let evidence = Evidence { pins: &pins, shown };
        let flow = Outbound { endpoint: PortId(1), protocol: 6, destination, evidence, at: w.at() };
        let spec = PolicySpec { rules, default, options: PolicyOptions::default() };
        let expected = naive(&spec, &flow);
        prop_assert_eq!(RuleTable::compile(spec).unwrap().judge(&flow), expected);
    }
}
