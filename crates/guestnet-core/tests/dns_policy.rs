//! Theory of operation: rules about names and the DNS forwarder: what is asked, what guests get, and what is noted of it.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod dns_support;
mod inspection_support;
#[path = "common/net.rs"]
mod net;

use dns_support::{REFUSED, World, labels, own, query, question_end, rcode, why};
use guestnet_core::effects::Event;
use guestnet_core::policy::spec::{
    Action, Destination, DnsRefusal, Name, NamePattern, Net as Prefix, PolicyOptions, RuleSpec,
};
use guestnet_core::policy::special::Group;
use guestnet_core::stats::DropReason;
use inspection_support::{allow, deny, rule, table};
use net::{A, B};
use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

const NXDOMAIN: u8 = 3;
const EDNS: &[u8] = dns_support::EDNS;

fn below(text: &str) -> RuleSpec {
    let name = Name::new(text.as_bytes()).unwrap();
    rule(&format!("*.{text}"), Action::Allow, Destination::Name(NamePattern::Below(name)))
}

fn net(text: &str, length: u8) -> Destination {
    Destination::Net(Prefix::new(text.parse().unwrap(), length).unwrap())
}

fn world(default: Action, rules: Vec<RuleSpec>, options: PolicyOptions) -> World {
    let mut w = World::new();
    w.n.core.set_rules(w.n.now, None, Some(table(default, rules, options)));
    w
}

fn strict(rules: Vec<RuleSpec>) -> World {
    world(Action::Deny, rules, PolicyOptions::default())
}

fn of_kind(name: &str, kind: u16) -> Vec<u8> {
    let mut q = query(7, name, EDNS);
    let at = question_end(&q) - 4;
    q[at..at + 2].copy_from_slice(&kind.to_be_bytes());
    q
}

/// A response with these records; names are written out.
fn records(query: &[u8], list: &[(&str, u16, u32, Vec<u8>)]) -> Vec<u8> {
    let mut a = query[..question_end(query)].to_vec();
    (a[2], a[3]) = (0x81, 0x80);
    a[4..12].copy_from_slice(&[0, 1, 0, list.len() as u8, 0, 0, 0, 0]);
    for (name, kind, ttl, data) in list {
        a.extend_from_slice(&labels(name));
        a.extend_from_slice(&kind.to_be_bytes());
        a.extend_from_slice(&[0, 1]);
        a.extend_from_slice(&ttl.to_be_bytes());
        a.extend_from_slice(&(data.len() as u16).to_be_bytes());
        a.extend_from_slice(data);
    }
    a
}

fn a(name: &str, ip: [u8; 4]) -> (&str, u16, u32, Vec<u8>) {
    (name, 1, 60, ip.to_vec())
}

/// Whether the guest's connect to an address at port 443 is let through to be inspected.
fn is_pinned(w: &mut World, port: guestnet_core::types::PortId, ip: &str) -> bool {
    !w.n.core.pins_of(w.n.now, port, ip.parse().unwrap()).is_empty()
}

#[test]
fn a_name_without_a_rule_is_refused_and_never_asked_for() {
    let mut w = strict(vec![allow("ok.example"), deny("bad.example")]);
    for (name, label) in [("evil.example", "default"), ("bad.example", "no bad.example")] {
        let got = w.ask(A, &query(7, name, EDNS)).unwrap();
        assert_eq!(rcode(&got), NXDOMAIN);
        assert_eq!(why(&got), format!("guestnet: {label}: name not allowed"));
        let denied = w.n.fx.events.iter().rev().find_map(|e| match e {
            Event::NameDenied(d) => Some((**d).clone()),
            _ => None,
        });
        let denied = denied.unwrap();
        assert_eq!((&*denied.name, denied.kind, &*denied.rule, denied.port), (name, 1, label, A));
    }
    assert_eq!(w.n.fx.datagrams.len(), 0, "nothing was asked upstream");
    assert_eq!(w.n.drops(DropReason::Policy), 2);
    let got = w.resolve(A, &query(7, "OK.example", EDNS), |q| dns_support::answer(q, 1, 60, 7));
    assert_eq!(rcode(&got), 0);
    // Names that search domains make, reverse names, and types of DNSSEC.
    for q in [
        query(7, "ok.example.corp.example", EDNS),
        of_kind("7.2.0.192.in-addr.arpa", 12),
        of_kind("evil.example", 48),
    ] {
        assert_eq!(rcode(&w.ask(A, &q).unwrap()), NXDOMAIN);
    }
}

#[test]
fn a_refusal_is_refused_by_choice_and_over_tcp_too() {
    let options = PolicyOptions { dns_refusal: DnsRefusal::Refused, ..PolicyOptions::default() };
    let mut w = world(Action::Deny, vec![allow("ok.example")], options);
    assert_eq!(rcode(&w.ask(A, &query(7, "evil.example", &[])).unwrap()), REFUSED);
    let framed = dns_support::framed(&query(7, "evil.example", EDNS));
    let (read, got) = w.stream(A, 9, &framed, false);
    assert_eq!((read, rcode(&got[0])), (framed.len(), REFUSED));
    assert_eq!(why(&got[0]), "guestnet: default: name not allowed");
}

#[test]
fn types_that_carry_any_data_need_a_rule_that_says_so() {
    let every = RuleSpec { all_query_types: true, ..allow("data.example") };
    let mut w = strict(vec![allow("ok.example"), every]);
    for kind in [10, 16, 255, 99, 65280] {
        let got = w.ask(A, &of_kind("ok.example", kind)).unwrap();
        assert_eq!(
            (rcode(&got), why(&got)),
            (NXDOMAIN, "guestnet: ok.example: query type not allowed".into())
        );
        assert!(w.ask(A, &of_kind("data.example", kind)).is_none());
    }
    for kind in [1, 28, 5, 65, 43, 48] {
        assert!(w.ask(A, &of_kind("ok.example", kind)).is_none(), "type {kind} is asked upstream");
    }
}

#[test]
fn what_is_cached_for_one_guest_is_not_told_to_another_that_may_not_ask() {
    let mut w = World::new();
    w.resolve(B, &query(7, "secret.example", EDNS), |q| dns_support::answer(q, 1, 60, 7));
    w.n.core.set_rules(w.n.now, Some(A), Some(table(Action::Deny, vec![], PolicyOptions::default())));
    assert_eq!(rcode(&w.ask(A, &query(7, "secret.example", EDNS)).unwrap()), NXDOMAIN);
    assert_eq!(rcode(&w.ask(B, &query(7, "secret.example", EDNS)).unwrap()), 0);
    assert!(!is_pinned(&mut w, B, "192.0.2.7"), "nobody needs pins of a guest without rules");
}

#[test]
fn own_names_are_the_authoritys_and_are_pinned() {
    let mut w = strict(vec![allow("www.own.example")]);
    let got = w.own(A, &query(7, "www.own.example", EDNS), own("www.own.example", 7));
    assert_eq!((rcode(&got), got[7]), (0, 1));
    assert!(is_pinned(&mut w, A, "192.0.2.7"));
    // One that the authority does not know after all is judged as any other.
    let ticket = w.ticket(A, &query(7, "other.own.example", EDNS)).unwrap();
    let got = w.verdict(ticket, guestnet_core::DnsVerdict::Forward).remove(0).1;
    assert_eq!(rcode(&got), NXDOMAIN);
    assert_eq!(w.n.fx.datagrams.len(), 0);
}

#[test]
fn clients_of_one_query_are_judged_one_by_one() {
    let mut w = World::new();
    w.n.core.set_rules(w.n.now, Some(A), Some(table(Action::Deny, vec![], PolicyOptions::default())));
    let q = query(7, "x.own.example", EDNS);
    let ticket = w.ticket(A, &q).unwrap();
    assert_eq!(w.ask(B, &q), None);
    let got = w.verdict(ticket, guestnet_core::DnsVerdict::Forward);
    assert_eq!((got.len(), got[0].0, rcode(&got[0].1)), (1, A, NXDOMAIN));
    let got = w.reply(|q| dns_support::answer(q, 1, 60, 7));
    assert_eq!((got.len(), got[0].0, rcode(&got[0].1)), (1, B, 0));
}

#[test]
fn answers_with_addresses_that_are_not_public_are_left_out() {
    let mut w = strict(vec![allow("ok.example"), rule("db", Action::Allow, net("10.9.0.0", 16))]);
    let host: HashSet<IpAddr> = ["203.0.113.9".parse().unwrap()].into();
    w.n.core.set_host_addresses(w.n.now, Arc::new(host));
    let q = query(7, "ok.example", EDNS);
    let list = [
        a("ok.example", [10, 0, 0, 1]),
        a("ok.example", [127, 0, 0, 1]),
        a("ok.example", [203, 0, 113, 9]),
        a("ok.example", [192, 168, 64, 1]),
        a("ok.example", [169, 254, 169, 254]),
        a("ok.example", [10, 9, 0, 1]),
        a("ok.example", [192, 0, 2, 7]),
        a("other.example", [192, 0, 2, 8]),
    ];
    let got = w.resolve(A, &q, |q| records(q, &list));
    assert_eq!((rcode(&got), got[7]), (0, 3), "one private, one public, and one of another name");
    for (ip, pinned) in [("10.0.0.1", false), ("203.0.113.9", false), ("10.9.0.1", true), ("192.0.2.7", true)]
    {
        assert_eq!(is_pinned(&mut w, A, ip), pinned, "{ip}");
    }
    assert!(!is_pinned(&mut w, A, "192.0.2.8"), "an address of a name that nobody asked for");
    assert!(!is_pinned(&mut w, B, "192.0.2.7"), "another guest did not ask");
    // The cached response is filtered for each guest, and pins for it.
    let got = w.ask(B, &q).unwrap();
    assert_eq!((got[7], is_pinned(&mut w, B, "192.0.2.7")), (3, true));
    let only = query(7, "ok.example", EDNS);
    let mut w = strict(vec![allow("ok.example")]);
    let got = w.resolve(A, &only, |q| records(q, &[a("ok.example", [10, 0, 0, 1])]));
    assert_eq!((rcode(&got), got[7]), (0, 0));
    let private = rule("lan", Action::Allow, Destination::Group(Group::Private));
    let mut w = strict(vec![allow("ok.example"), private]);
    let got = w.resolve(A, &only, |q| records(q, &[a("ok.example", [10, 0, 0, 1])]));
    assert_eq!(got[7], 1, "a rule allows private addresses");
}

#[test]
fn aliases_are_followed_and_a_denied_one_denies_the_whole() {
    let mut w = strict(vec![deny("tracker.example"), allow("ok.example"), allow("cdn.example")]);
    let q = query(7, "ok.example", EDNS);
    let chain = |to: &str| {
        let to: &'static str = Box::leak(to.to_string().into_boxed_str());
        vec![("ok.example", 5, 60, labels(to)), a(to, [192, 0, 2, 7])]
    };
    let got = w.resolve(A, &q, |q| records(q, &chain("tracker.example")));
    assert_eq!((rcode(&got), got[7]), (NXDOMAIN, 0));
    assert_eq!(why(&got), "guestnet: no tracker.example: an alias for a name that is not allowed");
    assert!(!is_pinned(&mut w, A, "192.0.2.7"));
    let mut w = strict(vec![allow("ok.example"), allow("cdn.example")]);
    let got = w.resolve(A, &q, |q| records(q, &chain("cdn.example")));
    assert_eq!((rcode(&got), got[7]), (0, 2));
    let names = w.n.core.pins_of(w.n.now, A, "192.0.2.7".parse().unwrap());
    assert_eq!(names, ["ok.example", "cdn.example"]);
    let mut w = strict(vec![allow("ok.example")]);
    w.resolve(A, &q, |q| records(q, &chain("edge.other.example")));
    assert_eq!(
        w.n.core.pins_of(w.n.now, A, "192.0.2.7".parse().unwrap()),
        ["ok.example"],
        "its alias has no rule"
    );
}

#[test]
fn service_bindings_lose_ech_and_hints_that_are_not_allowed() {
    let param = |key: u16, value: &[u8]| {
        [&key.to_be_bytes()[..], &(value.len() as u16).to_be_bytes(), value].concat()
    };
    let hints = [192, 0, 2, 7, 10, 0, 0, 1];
    let mut hints6 = [0u8; 16];
    (hints6[0], hints6[1]) = (0xfd, 1);
    let data = [
        &[0, 1, 0][..],
        &param(1, b"\x02h2"),
        &param(4, &hints),
        &param(5, b"encrypted"),
        &param(6, &hints6),
    ]
    .concat();
    let mut w = strict(vec![allow("ok.example")]);
    let got = w.resolve(A, &of_kind("ok.example", 65), |q| records(q, &[("ok.example", 65, 60, data)]));
    let wanted = [&[0, 1, 0][..], &param(1, b"\x02h2"), &param(4, &[192, 0, 2, 7])].concat();
    assert!(got.windows(wanted.len()).any(|w| w == wanted), "{got:02x?}");
    assert!(!got.windows(9).any(|w| w == b"encrypted") && !got.windows(4).any(|w| w == [10, 0, 0, 1]));
    assert!(is_pinned(&mut w, A, "192.0.2.7") && !is_pinned(&mut w, A, "10.0.0.1"));
}

#[test]
fn names_below_a_suffix_have_a_budget() {
    let options = PolicyOptions { names_per_suffix: 3, ..PolicyOptions::default() };
    let mut w = world(Action::Deny, vec![below("ok.example")], options);
    for n in 0..3 {
        assert!(w.ask(A, &query(7, &format!("n{n}.ok.example"), EDNS)).is_none());
    }
    let got = w.ask(A, &query(7, "n3.ok.example", EDNS)).unwrap();
    assert_eq!(why(&got), "guestnet: *.ok.example: too many names below a suffix");
    assert!(w.ask(B, &query(7, "n3.ok.example", EDNS)).is_none(), "another guest has its own");
    w.pass(301_000);
    w.confirm();
    assert!(w.ask(A, &query(7, "n4.ok.example", EDNS)).is_none());
}

#[test]
fn names_that_could_be_read_in_two_ways_are_refused() {
    let mut w = strict(vec![below("ok.example")]);
    // One label that has a dot in it.
    let mut q = query(7, "aXb.ok.example", EDNS);
    let at = q.iter().position(|b| *b == b'X').unwrap();
    for byte in [b'.', 0, b' ', b'\\', 0xff] {
        q[at] = byte;
        assert_eq!(rcode(&w.ask(A, &q).unwrap()), NXDOMAIN, "{byte}");
    }
    assert_eq!(w.n.fx.datagrams.len(), 0);
}

#[test]
fn pins_of_names_that_are_no_longer_allowed_are_forgotten() {
    let mut w = strict(vec![allow("ok.example"), allow("two.example")]);
    w.resolve(A, &query(7, "ok.example", EDNS), |q| records(q, &[a("ok.example", [192, 0, 2, 7])]));
    w.resolve(A, &query(7, "two.example", EDNS), |q| records(q, &[a("two.example", [192, 0, 2, 7])]));
    let ip: IpAddr = "192.0.2.7".parse().unwrap();
    assert_eq!(w.n.core.pins_of(w.n.now, A, ip), ["ok.example", "two.example"]);
    let other = table(Action::Deny, vec![allow("two.example")], PolicyOptions::default());
    w.n.core.set_rules(w.n.now, None, Some(other));
    w.pass(0);
    assert_eq!(w.n.core.pins_of(w.n.now, A, ip), ["two.example"]);
    // A pin lives for its answer, and at least for 30 s.
    w.pass(59_000);
    assert_eq!(w.n.core.pins_of(w.n.now, A, ip), ["two.example"]);
    w.pass(3_000);
    assert_eq!(w.n.core.pins_of(w.n.now, A, ip), [""; 0]);
}

#[test]
fn without_rules_about_names_answers_are_as_they_were() {
    let mut w =
        world(Action::Allow, vec![rule("no", Action::Deny, net("10.0.0.0", 8))], PolicyOptions::default());
    let q = query(7, "any.example", EDNS);
    let list = [a("any.example", [10, 0, 0, 1]), ("any.example", 16, 60, b"\x03txt".to_vec())];
    let got = w.resolve(A, &q, |q| records(q, &list));
    assert_eq!(got[7], 2);
    assert!(!is_pinned(&mut w, A, "10.0.0.1"));
}
