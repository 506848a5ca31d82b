//! Theory of operation: queries that guests send to the gateway's IPv6 address are answered from it, by the same forwarder
//! and from the same cache as those over IPv4.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod dns_support;
#[path = "common/net.rs"]
mod net;
#[path = "common/net6.rs"]
mod net6;

use dns_support::*;
use guestnet_core::effects::Event;
use guestnet_core::types::PortId;
use guestnet_core::{DnsVerdict, NameServers};
use guestnet_wire::proto;
use net6::{GATEWAY6, guest6, ip6, net6, read6, udp6};
use std::net::IpAddr;

fn world() -> World {
    let mut n = net6();
    for address in [GATEWAY, GATEWAY6] {
        n.core.add_service(DNS, proto::UDP, address.parse().unwrap(), 53);
    }
    let servers = NameServers {
        servers: vec![addr(SERVER)],
        timeout_ms: 2000,
        attempts: 1,
        rotate: false,
        use_tcp: false,
    };
    let mut w = World { n, generation: 0, servers };
    w.change();
    w.confirm();
    w
}

/// The response that a guest gets over IPv6, if there is one.
fn got(w: &mut World, port: PortId) -> Option<Vec<u8>> {
    let frames = w.n.fx.take();
    assert!(frames.len() <= 1);
    let got = read6(frames.first()?);
    assert_eq!(got.ends(), (IpAddr::V6(ip6(GATEWAY6)), IpAddr::V6(guest6(port))));
    assert_eq!((got.p.src_port, got.p.dst_port), (53, 4000));
    Some(got.payload().to_vec())
}

fn ask(w: &mut World, port: PortId, query: &[u8]) -> Option<Vec<u8>> {
    w.n.fx.frames.clear();
    w.n.send(port, udp6(port, 4000, &format!("[{GATEWAY6}]:53"), query));
    w.n.core.audit().unwrap();
    got(w, port)
}

#[test]
fn an_own_name_is_answered_over_ipv6_and_cached_for_both_families() {
    let mut w = world();
    let q = query(7, "vm1.guests.test", &[]);
    assert_eq!(ask(&mut w, A, &q), None);
    let ticket = w.n.fx.events.iter().rev().find_map(|e| match e {
        Event::DnsQuestion { port, ticket, .. } if *port == A => Some(*ticket),
        _ => None,
    });
    let (ticket, generation) = (ticket.expect("a question"), w.generation);
    let verdict: DnsVerdict = own("vm1.guests.test", 7);
    w.n.core.dns_verdict(w.n.now, ticket, generation, verdict, &mut w.n.fx);
    let first = got(&mut w, A).expect("a response");
    assert_eq!((&first[..4], rcode(&first)), (&[0, 7, 0x85, 0x80][..], 0));
    assert_eq!(ask(&mut w, B, &q).unwrap(), first);
    assert_eq!(w.ask(A, &q).unwrap(), first, "over IPv4");
}

#[test]
fn a_name_of_others_is_forwarded_and_answered_over_ipv6() {
    let mut w = world();
    let q = query(9, "www.example", &[]);
    assert_eq!(ask(&mut w, A, &q), None);
    let ((flow, sent), from) = (w.sent(), w.sent_to());
    w.n.fx.frames.clear();
    w.n.core.udp_received(w.n.now, flow, from, &answer(&sent, 1, 60, 5), 0, &mut w.n.fx);
    let response = got(&mut w, A).expect("a response");
    assert_eq!((&response[..2], rcode(&response), response[7]), (&[0, 9][..], 0, 1));
}

#[test]
fn a_flood_of_queries_over_ipv6_has_the_rate_of_its_guest() {
    let mut w = world();
    let mut answered = 0;
    for number in 0..20_000_u32 {
        let name = format!("n{number}.guests.test");
        answered += usize::from(ask(&mut w, A, &query(1, &name, &[])).is_some());
    }
    let asked = w.n.events(|e| matches!(e, Event::DnsQuestion { .. }));
    assert!(asked + answered < 20_000, "{asked} were asked of the authority, {answered} answered");
    let before = asked;
    assert_eq!(ask(&mut w, B, &query(1, "vm1.guests.test", &[])), None);
    assert_eq!(
        w.n.events(|e| matches!(e, Event::DnsQuestion { .. })),
        before + 1,
        "the other guest is served"
    );
}
