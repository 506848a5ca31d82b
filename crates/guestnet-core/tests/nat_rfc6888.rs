//! Theory of operation: RFC 6888 (large NATs; "subscriber" reads as guest), requirement by requirement, on the packet engine with a simulated outside.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod nat_common;
use guestnet_core::nat::Behaviour::{AddressAndPortDependent, EndpointIndependent};
use guestnet_core::nat::Prefix;
use guestnet_core::stats::Drop;
use guestnet_wire::tcp::flags::SYN;
use nat_common::*;

const G: &str = "192.168.64.2:50000";
const X: &str = "198.51.100.1:80";

fn guest(n: u32, port: u32) -> String {
    format!("192.168.64.{n}:{port}")
}

#[test]
fn rfc6888_req4_cap_of_ports_per_guest() {
    let mut lab = Lab::new(|c| c.ports_per_endpoint = 10);
    for port in 0..10 {
        lab.map(&udp(&guest(2, 50000 + port), X));
    }
    assert_eq!(lab.out(&udp(&guest(2, 50010), X)), Dropped(Drop::PortLimit));
    assert_eq!(lab.out(&tcp(&guest(2, 50010), X, SYN)), Dropped(Drop::PortLimit), "all protocols count");
    // Ports that it has still serve, and others are unaffected.
    lab.map(&udp(&guest(2, 50009), "198.51.100.2:2"));
    lab.map(&udp(&guest(3, 50010), X));
    lab.wait(301);
    lab.map(&udp(&guest(2, 50010), X));
}

#[test]
fn rfc6888_req5_cap_of_state_per_guest() {
    let mut lab = Lab::new(|c| {
        c.sessions_per_endpoint = 10;
        c.filtering_tcp = EndpointIndependent;
    });
    let ext = lab.map(&tcp(G, X, SYN)).to_string();
    for port in 1..10 {
        lab.map(&tcp(G, &format!("198.51.100.1:{port}"), SYN));
    }
    assert_eq!(lab.out(&tcp(G, "198.51.100.1:10", SYN)), Dropped(Drop::FlowLimit));
    assert_eq!(lab.inn(&tcp("198.51.100.7:1", &ext, SYN)), Dropped(Drop::FlowLimit), "inbound counts too");
    lab.map(&tcp(&guest(3, 50000), X, SYN));
    assert_eq!(lab.nat.connection_count(), 11);
}

#[test]
fn rfc6888_req6_translation_off_for_destinations() {
    let mut lab = Lab::new(|c| c.no_nat = vec![Prefix::new(ip("100.64.0.0"), 10).unwrap()]);
    assert_eq!(lab.out(&udp(G, "100.64.1.1:5")), PassThrough);
    assert_eq!(lab.out(&udp(G, "100.128.1.1:5")), Translated);
}

#[test]
fn rfc6888_req7_endpoint_independent_filtering() {
    let mut lab = Lab::new(|c| {
        (c.filtering_udp, c.filtering_tcp) = (EndpointIndependent, EndpointIndependent);
    });
    let ext = lab.map(&udp(G, X)).to_string();
    lab.take(&udp("192.0.2.200:9", &ext));
}

#[test]
fn rfc6888_req8_a_freed_port_rests() {
    // Two ports; without preservation of the port by chance.
    let mut lab = Lab::new(|c| {
        c.ports = (60000, 60001);
        c.filtering_udp = EndpointIndependent;
    });
    let first = lab.map(&udp(&guest(2, 60000), X)).port();
    assert_eq!(first, 60000);
    lab.wait(301);
    assert_eq!(lab.nat.connection_count(), 0);
    assert_eq!(lab.map(&udp(&guest(3, 60000), X)).port(), 60001, "60000 rests, though it is asked for");
    lab.wait(121);
    assert_eq!(lab.map(&udp(&guest(4, 60000), X)).port(), 60000);
    // Exceptions A and C: TCP with a state machine, and dependent filtering, need no rest.
    for c in [true, false] {
        let mut lab = Lab::new(|x| {
            x.ports = (60000, 60001);
            if c {
                x.filtering_udp = AddressAndPortDependent;
            }
        });
        let packet = |g| if c { udp(&guest(g, 60000), X) } else { tcp(&guest(g, 60000), X, SYN) };
        lab.map(&packet(2));
        lab.wait(302);
        assert_eq!(lab.map(&packet(3)).port(), 60000);
    }
}

#[test]
fn rfc6888_req11_never_evict_to_make_room() {
    let mut lab = Lab::new(|c| c.ports = (60000, 60099));
    let all: Vec<_> = (0..100).map(|i| lab.map(&udp(&guest(2 + i, 5000), X))).collect();
    let ports: std::collections::HashSet<u16> = all.iter().map(|a| a.port()).collect();
    assert_eq!(ports.len(), 100, "the range is used to the last port");
    assert_eq!(lab.out(&udp(&guest(200, 5000), X)), Dropped(Drop::PortsExhausted));
    assert_eq!((lab.the_error().2, lab.nat.stats().drops_for(Drop::PortsExhausted)), (3, 1));
    for (i, ext) in all.iter().enumerate() {
        let p = lab.take(&udp(X, &ext.to_string()));
        assert_eq!(dst(&p), at(&guest(2 + i as u32, 5000)));
    }
    // TCP has ports of its own; and what has died makes room at once, though nobody did expiry work.
    lab.map(&tcp(&guest(200, 5000), X, SYN));
    lab.sleep(301);
    lab.map(&udp(&guest(200, 5000), X));
}

#[test]
fn rfc6888_req11_full_table() {
    let mut lab = Lab::new(|c| c.table_size = 50);
    for i in 0..50 {
        lab.map(&udp(&guest(2 + i, 5000), X));
    }
    assert_eq!(lab.out(&udp(&guest(100, 5000), X)), Dropped(Drop::TableFull));
    lab.map(&udp(&guest(2, 5000), X));
    lab.sleep(301);
    lab.map(&udp(&guest(100, 5000), X));
}

#[test]
fn rfc6888_req15_unguessable_ports() {
    let ports = |secret: u8| -> Vec<u16> {
        let mut lab = Lab::new(|c| {
            c.port_preservation = false;
            c.port_parity = false;
            c.secret = [secret; 32];
        });
        (0..200).map(|i| lab.map(&udp(&guest(2, 1000 + i), X)).port()).collect()
    };
    let (a, b) = (ports(1), ports(2));
    assert_ne!(a, b);
    assert_eq!(a, ports(1), "the secret decides, so tests repeat");
    let near = a.windows(2).filter(|w| w[0].abs_diff(w[1]) < 80).count();
    assert!(near < 20, "{near} of 199 next to each other");
    let quarter = a.iter().filter(|p| **p < 53248).count();
    assert!((20..80).contains(&quarter), "{quarter} of 200 in the first quarter");
}
