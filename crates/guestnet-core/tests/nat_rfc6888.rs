//! Theory of operation: RFC 6888 (large NATs; "subscriber" reads as guest), requirement by requirement, on the packet engine with a simulated outside.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod nat_common;
use guestnet_core::nat::Behaviour::{AddressAndPortDependent, EndpointIndependent};
use guestnet_core::nat::Prefix;
use guestnet_core::stats::DropReason;
use guestnet_wire::tcp::flags::{ACK, SYN};
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
    assert_eq!(lab.out(&udp(&guest(2, 50010), X)), Dropped(DropReason::PortLimit));
    assert_eq!(
        lab.out(&tcp(&guest(2, 50010), X, SYN)),
        Dropped(DropReason::PortLimit),
        "all protocols count"
    );
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
    assert_eq!(lab.out(&tcp(G, "198.51.100.1:10", SYN)), Dropped(DropReason::FlowLimit));
    assert_eq!(
        lab.inn(&tcp("198.51.100.7:1", &ext, SYN)),
        Dropped(DropReason::FlowLimit),
        "inbound counts too"
    );
    lab.map(&tcp(&guest(3, 50000), X, SYN));
    assert_eq!(lab.nat.connection_count(), 11);
}

/// Flows of one guest that are over, and after them many of others, which are collected first.
fn dead_flows(lab: &mut Lab, own: u32, others: u32) {
    for i in 0..own {
        lab.map(&udp(&guest(2, 1000 + i), X));
    }
    for i in 0..others {
        let from = format!("192.168.{}.{}:{}", 65 + i / 4000 % 100, 2 + i / 16 % 250, 1000 + i % 16);
        lab.map(&udp(&from, X));
    }
    lab.sleep(700);
}

fn capped(set: impl FnOnce(&mut guestnet_core::nat::NatEngineConfig)) -> Lab {
    Lab::new(|c| {
        c.internal = Prefix::new(ip("192.168.0.0"), 16).unwrap();
        c.ports = (1024, 65535);
        set(c);
    })
}

#[test]
fn rfc6888_req4_cap_of_ports_does_not_count_expired_flows() {
    for others in [0, 100, 20_000] {
        let mut lab = capped(|c| c.ports_per_endpoint = 50);
        dead_flows(&mut lab, 50, others);
        lab.map(&tcp(&guest(2, 9999), X, SYN));
        assert_eq!(lab.nat.stats().drops_for(DropReason::PortLimit), 0, "after {others} of others");
    }
}

#[test]
fn rfc6888_req5_cap_of_state_does_not_count_expired_flows() {
    for others in [0, 100, 20_000] {
        let mut lab = capped(|c| c.sessions_per_endpoint = 50);
        dead_flows(&mut lab, 50, others);
        lab.map(&tcp(&guest(2, 9999), X, SYN));
        assert_eq!(lab.nat.stats().drops_for(DropReason::FlowLimit), 0, "after {others} of others");
    }
}

#[test]
fn rfc6888_req5_caps_do_not_count_expired_flows_in_batches() {
    for set in [(|c| c.ports_per_endpoint = 50) as fn(&mut guestnet_core::nat::NatEngineConfig), |c| {
        c.sessions_per_endpoint = 50
    }] {
        let mut lab = capped(set);
        dead_flows(&mut lab, 50, 20_000);
        let mut packets: Vec<Vec<u8>> = (0..50).map(|i| udp(&guest(2, 9000 + i), X)).collect();
        let mut results = vec![PassThrough; 50];
        let now = guestnet_core::types::Time(lab.ns);
        lab.nat.translate_batch(&mut packets[..], Outbound, now, &mut results);
        assert!(results.iter().all(|r| *r == Translated), "{results:?}");
    }
}

#[test]
fn rfc6888_req5_inbound_flows_do_not_count_expired_ones() {
    let mut lab = capped(|c| {
        c.sessions_per_endpoint = 50;
        c.filtering_tcp = EndpointIndependent;
    });
    lab.nat.add_forward(6, at("203.0.113.1:2000"), at("192.168.64.2:80")).unwrap();
    dead_flows(&mut lab, 50, 20_000);
    lab.take(&tcp("198.51.100.9:5", "203.0.113.1:2000", SYN));
    // A mapping that lives lets others in, though much is over and not collected.
    let ext = lab.map(&tcp(&guest(3, 50000), X, SYN)).to_string();
    lab.take(&tcp(X, &ext, SYN | ACK));
    dead_flows(&mut lab, 0, 20_000);
    lab.take(&tcp("198.51.100.9:6", &ext, SYN));
}

#[test]
fn rfc6888_req5_a_refused_flow_takes_no_port() {
    let mut lab = Lab::new(|c| {
        c.sessions_per_endpoint = 1;
        c.filtering_udp = EndpointIndependent;
        c.ports = (60000, 60009);
    });
    lab.map(&udp(&guest(2, 50000), X));
    for port in 0..1000 {
        assert_eq!(lab.out(&udp(&guest(2, 1000 + port), X)), Dropped(DropReason::FlowLimit));
    }
    assert_eq!(lab.nat.conntrack_stats().ports, 1, "none is taken, and none rests");
    lab.map(&udp(&guest(3, 50000), X));
}

#[test]
fn a_port_of_an_expired_flow_can_be_published() {
    let mut lab = Lab::default();
    let ext = lab.map(&udp(G, X));
    assert!(lab.nat.add_forward(17, ext, at("192.168.64.3:53")).is_err());
    lab.sleep(700);
    lab.inn(&udp(X, "203.0.113.1:1"));
    lab.nat.add_forward(17, ext, at("192.168.64.3:53")).unwrap();
    assert_eq!(dst(&lab.take(&udp(X, &ext.to_string()))), at("192.168.64.3:53"));
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

/// UDP with endpoint-independent filtering, whose ports rest.
fn resting(first: u16, last: u16) -> Lab {
    Lab::new(|c| {
        c.filtering_udp = EndpointIndependent;
        c.ports = (first, last);
    })
}

#[test]
fn rfc6888_req8_a_resting_port_goes_to_nobody_else_when_the_range_is_full() {
    let mut lab = resting(60000, 60009);
    for i in 0..10 {
        lab.map(&udp(&guest(2, 5000 + i), X));
    }
    lab.wait(302);
    assert_eq!(lab.nat.connection_count(), 0);
    assert_eq!(lab.out(&udp(&guest(3, 5000), X)), Dropped(DropReason::PortsExhausted));
    assert_eq!(lab.the_error().2, 3);
    // The guest that had them may have one again, of the parity that it asks for.
    let again = lab.map(&udp(&guest(2, 7001), X)).port();
    assert_eq!(again % 2, 1);
    assert_eq!(lab.out(&udp(&guest(3, 5000), X)), Dropped(DropReason::PortsExhausted));
    lab.wait(120);
    lab.map(&udp(&guest(3, 5000), X));
}

#[test]
fn rfc6888_req8_resting_ports_are_not_inherited_with_an_address() {
    let mut lab = resting(60000, 60009);
    for i in 0..10 {
        lab.map(&udp(&guest(2, 5000 + i), X));
    }
    assert_eq!(lab.nat.end_endpoint(ip(A)), 10);
    assert_eq!(lab.out(&udp(&guest(2, 5000), X)), Dropped(DropReason::PortsExhausted));
    lab.wait(121);
    lab.map(&udp(&guest(2, 5000), X));
}

#[test]
fn rfc6888_req8_ports_that_have_rested_are_free_without_expiry_work() {
    let mut lab = resting(60000, 60099);
    for i in 0..100 {
        lab.map(&udp(&guest(2 + i % 50, 5000 + i), X));
    }
    lab.sleep(302);
    // Other traffic collects what is over.
    for i in 0..200 {
        lab.map(&tcp(&guest(200, 5000 + i % 20), X, SYN));
    }
    assert_eq!(lab.out(&udp(&guest(201, 5000), X)), Dropped(DropReason::PortsExhausted));
    lab.sleep(121);
    for i in 0..100 {
        lab.map(&udp(&guest(201, 5000 + i), X));
    }
}

#[test]
fn rfc6888_req8_ports_that_have_rested_count_against_no_share() {
    let mut lab = Lab::new(|c| {
        c.filtering_udp = EndpointIndependent;
        c.ports = (60000, 60199);
        c.shares = true;
    });
    for i in 0..100 {
        lab.map(&udp(&guest(2 + i % 50, 5000 + i), X));
    }
    lab.sleep(302);
    for _ in 0..100 {
        lab.map(&tcp(&guest(200, 5000), X, SYN));
    }
    lab.sleep(121);
    // More than a guest may have of what was left while they rested.
    for i in 0..130 {
        lab.map(&udp(&guest(201, 5000 + i), X));
    }
}

#[test]
fn rfc6888_req8_the_next_timer_knows_of_resting_ports() {
    let mut lab = resting(49152, 65535);
    for i in 0..1000 {
        lab.map(&udp(&guest(2, 50000 + i), X));
    }
    lab.wait(302);
    let held = lab.nat.conntrack_stats();
    assert_eq!((held.connections, held.ports), (0, 1000));
    assert!(lab.nat.next_timer().is_some_and(|t| t.0 > lab.ns));
    lab.wait(121);
    assert_eq!((lab.nat.conntrack_stats().ports, lab.nat.next_timer()), (0, None));
}

#[test]
fn rfc6888_req8_a_resting_port_can_be_published() {
    let mut lab = resting(60000, 60001);
    let ext = lab.map(&udp(&guest(2, 60000), X));
    lab.wait(302);
    lab.nat.add_forward(17, ext, at("192.168.64.3:53")).unwrap();
    lab.wait(200);
    assert!(lab.nat.remove_forward(17, ext));
    assert_eq!(lab.nat.conntrack_stats().ports, 1, "it rests again");
    lab.wait(121);
    assert_eq!(lab.nat.conntrack_stats().ports, 0);
}

#[test]
fn rfc6888_req11_never_evict_to_make_room() {
    let mut lab = Lab::new(|c| c.ports = (60000, 60099));
    let all: Vec<_> = (0..100).map(|i| lab.map(&udp(&guest(2 + i, 5000), X))).collect();
    let ports: std::collections::HashSet<u16> = all.iter().map(|a| a.port()).collect();
    assert_eq!(ports.len(), 100, "the range is used to the last port");
    assert_eq!(lab.out(&udp(&guest(200, 5000), X)), Dropped(DropReason::PortsExhausted));
    assert_eq!((lab.the_error().2, lab.nat.stats().drops_for(DropReason::PortsExhausted)), (3, 1));
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
    assert_eq!(lab.out(&udp(&guest(100, 5000), X)), Dropped(DropReason::TableFull));
    lab.map(&udp(&guest(2, 5000), X));
    lab.sleep(301);
    lab.map(&udp(&guest(100, 5000), X));
}

#[test]
fn rfc6888_req15_a_port_that_is_kept_is_the_guests_own() {
    let mut lab = Lab::default();
    assert_eq!(lab.map(&udp(&guest(2, 50_000), X)).port(), 50_000);
    assert_ne!(lab.map(&udp(&guest(3, 50_000), X)).port(), 50_000, "taken: another is drawn");
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
    // Neither are those of a range that was used up before, with nobody to do expiry work.
    let mut lab = resting(50000, 50199);
    let order: Vec<u16> = (0..200)
        .map(|i| {
            lab.sleep(1);
            lab.map(&udp(&guest(2, 1000 + i), X)).port()
        })
        .collect();
    lab.sleep(301);
    lab.map(&tcp(&guest(4, 9), X, SYN));
    for _ in 0..100 {
        lab.map(&tcp(&guest(4, 9), X, SYN));
    }
    lab.sleep(121);
    let age = |p: u16| order.iter().position(|q| *q == p).unwrap();
    let new: Vec<u16> = (0..60).map(|i| lab.map(&udp(&guest(3, 3000 + 2 * i), X)).port()).collect();
    let near = new.windows(2).filter(|w| age(w[0]).abs_diff(age(w[1])) == 1).count();
    assert!(near < 10, "{near} of 59 in the order in which they were used");
    assert!(new.iter().all(|p| p % 2 == 0), "even for even: {new:?}");
    let quarter = a.iter().filter(|p| **p < 53248).count();
    assert!((20..80).contains(&quarter), "{quarter} of 200 in the first quarter");
}
