//! Theory of operation: RFC 7857 (updates to the behaviour documents), requirement by requirement, on the packet engine with a simulated outside.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod nat_common;
use guestnet_core::nat::Behaviour::{AddressAndPortDependent, EndpointIndependent};
use guestnet_core::nat::ConnState;
use guestnet_core::stats::DropReason;
use guestnet_wire::be16;
use guestnet_wire::tcp::flags::{ACK, FIN, RST, SYN};
use nat_common::*;

const G: &str = "192.168.64.2:50000";
const X: &str = "198.51.100.1:80";

fn guest(n: u32, port: u32) -> String {
    format!("192.168.64.{n}:{port}")
}

#[test]
fn rfc7857_2_1_state_machine_is_that_of_rfc6146() {
    let mut lab = Lab::default();
    let state = |l: &Lab| l.nat.connections().next().expect("one").state;
    let ext = lab.map(&tcp(G, X, SYN)).to_string();
    assert_eq!(state(&lab), ConnState::SynOut);
    assert_eq!(lab.out(&tcp(G, X, ACK)), Translated);
    assert_eq!(state(&lab), ConnState::SynOut, "nothing but the other SYN establishes");
    lab.take(&tcp(X, &ext, SYN | ACK));
    assert_eq!(state(&lab), ConnState::Established);
    lab.take(&tcp(X, &ext, FIN | ACK));
    assert_eq!(state(&lab), ConnState::FinIn);
    assert_eq!(lab.out(&tcp(G, X, FIN | ACK)), Translated);
    assert_eq!(state(&lab), ConnState::Closing);
    assert_eq!(
        lab.map(&tcp(G, X, SYN)).to_string(),
        ext,
        "the same five-tuple again, within the four minutes"
    );
    assert_eq!(state(&lab), ConnState::SynOut);
}

#[test]
fn rfc7857_2_2_opening_and_closing_timers_are_apart() {
    let mut lab = Lab::new(|c| (c.timeouts.tcp_opening, c.timeouts.tcp_closing) = (100, 50));
    let ext = lab.map(&tcp(G, X, SYN)).to_string();
    lab.wait(99);
    lab.take(&tcp(X, &ext, SYN | ACK));
    lab.take(&tcp(X, &ext, FIN | ACK));
    lab.out(&tcp(G, X, FIN | ACK));
    lab.wait(49);
    assert_eq!(lab.nat.connection_count(), 1);
    lab.wait(2);
    assert_eq!(lab.nat.connection_count(), 0);
}

#[test]
fn rfc7857_2_3_a_reset_is_translated_and_the_session_kept() {
    let mut lab = Lab::default();
    let ext = lab.map(&tcp(G, X, SYN)).to_string();
    lab.take(&tcp(X, &ext, SYN | ACK));
    let p = lab.take(&tcp(X, &ext, RST));
    assert_eq!((dst(&p), p[33] & RST), (at(G), RST));
    lab.wait(239);
    assert_eq!(lab.out(&tcp(G, X, ACK)), Translated);
    lab.wait(7000);
    lab.take(&tcp(X, &ext, ACK));
    lab.take(&tcp(X, &ext, RST));
    lab.wait(242);
    assert_eq!(lab.nat.connection_count(), 0, "four minutes of silence after a reset end it");
}

#[test]
fn rfc7857_3_port_overlap_only_without_independent_mapping() {
    // Not offered: an external port belongs to one internal end whatever the mapping behaviour.
    let mut lab = Lab::new(|c| c.mapping_udp = AddressAndPortDependent);
    let a = lab.map(&udp(&guest(2, 50000), "198.51.100.1:1"));
    let b = lab.map(&udp(&guest(3, 50000), "198.51.100.2:1"));
    assert_ne!(a, b);
}

#[test]
fn rfc7857_4_refusals_do_not_refresh() {
    let mut lab = Lab::new(|c| c.filtering_tcp = EndpointIndependent);
    let ext = lab.map(&tcp(G, X, SYN)).to_string();
    // Somebody outside knocks every 100 s and the guest refuses each time.
    for i in 1..=4 {
        lab.wait(100);
        let from = format!("192.0.2.1:{i}");
        if lab.inn(&tcp(&from, &ext, SYN)) != Translated {
            break;
        }
        assert_eq!(lab.out(&tcp(G, &from, RST | ACK)), Translated);
    }
    let about_x = lab.nat.connections().filter(|c| c.remote == at(X)).count();
    assert_eq!(about_x, 0, "the guest's own connection ended in its time");
}

#[test]
fn rfc7857_5_behaviour_per_protocol() {
    let mut lab = Lab::new(|c| {
        c.filtering_udp = EndpointIndependent;
        c.filtering_tcp = AddressAndPortDependent;
    });
    let u = lab.map(&udp(G, X)).to_string();
    let t = lab.map(&tcp(G, X, SYN)).to_string();
    lab.take(&udp("192.0.2.5:5", &u));
    assert_eq!(lab.inn(&tcp("192.0.2.5:5", &t, SYN)), Dropped(DropReason::Filtered));
}

#[test]
fn rfc7857_8_parity_may_be_off() {
    let mut lab = Lab::new(|c| c.port_parity = false);
    let odd = (0..100).filter(|i| lab.map(&udp(&guest(2, 1000 + 2 * i), X)).port() % 2 == 1).count();
    assert!((25..75).contains(&odd), "{odd}");
}

#[test]
fn rfc7857_9_port_randomisation() {
    let mut lab = Lab::new(|c| c.port_preservation = false);
    let mut ports: Vec<u16> = (0..100).map(|i| lab.map(&udp(&guest(2, 1000 + i), X)).port()).collect();
    let steps = ports.windows(2).filter(|w| w[0].abs_diff(w[1]) < 80).count();
    assert!(steps < 15, "{ports:?}");
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports.len(), 100);
}

#[test]
fn rfc7857_10_identification_of_fragments_is_unique_outside() {
    // RFC 6864 5.3.1: two guests fragment with the same id towards one host.
    let mut lab = Lab::default();
    let mut ids = std::collections::HashSet::new();
    for g in [2, 3] {
        let parts = udp_packet(at(&guest(g, 50000)), at(X), &[g as u8; 2000]).id(99).fragments(1000);
        let (_, first) = lab.send(&parts[0], Outbound);
        let (_, second) = lab.send(&parts[1], Outbound);
        assert_eq!(be16(&first, 4), be16(&second, 4));
        ids.insert(be16(&first, 4));
    }
    assert_eq!(ids.len(), 2);
}

#[test]
fn rfc7857_11_icmp_mapping_goes_with_its_last_session() {
    let mut lab = Lab::default();
    lab.map(&echo(A, X1, 8, 7));
    lab.wait(61);
    assert_eq!(lab.nat.conntrack_stats().mappings, 0);
}
