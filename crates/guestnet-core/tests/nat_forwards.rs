//! Theory of operation: published ports of the NAT engine, above all that a change which fails changes nothing.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod nat_common;

use guestnet_core::nat::{Behaviour, ForwardError};
use guestnet_core::stats::DropReason;
use guestnet_wire::proto;
use nat_common::*;

const CLIENT: &str = "198.51.100.1:4000";
const PUBLISHED: &str = "203.0.113.1:8080";
const FIRST: &str = "192.168.64.2:80";
const SECOND: &str = "192.168.64.3:81";

fn published() -> Lab {
    with_table(64)
}

fn with_table(size: usize) -> Lab {
    let mut lab = Lab::new(|c| c.table_size = size);
    lab.nat.add_forward(proto::UDP, at(PUBLISHED), at(FIRST)).unwrap();
    lab
}

#[test]
fn a_retargeted_port_reaches_the_new_guest_and_ends_the_old_connections() {
    let mut lab = published();
    assert_eq!(dst(&lab.take(&udp(CLIENT, PUBLISHED))), at(FIRST));
    lab.nat.retarget_forward(proto::UDP, at(PUBLISHED), at(SECOND)).unwrap();
    assert_eq!(lab.nat.connection_count(), 0);
    assert_eq!(dst(&lab.take(&udp(CLIENT, PUBLISHED))), at(SECOND));
    // The answers of the new guest leave from the published port; the first guest gets another one.
    assert_eq!(lab.map(&udp(SECOND, CLIENT)), at(PUBLISHED));
    assert_ne!(lab.map(&udp(FIRST, CLIENT)), at(PUBLISHED));
    assert!(lab.nat.remove_forward(proto::UDP, at(PUBLISHED)));
    lab.wait(1000);
    let s = lab.nat.conntrack_stats();
    assert_eq!((s.connections, s.mappings, s.ports), (0, 0, 0));
}

#[test]
fn a_refused_retarget_leaves_the_port_and_its_connections() {
    let mut lab = published();
    lab.take(&udp(CLIENT, PUBLISHED));
    let before = lab.nat.conntrack_stats();
    let mut retarget = |to: &str| lab.nat.retarget_forward(proto::UDP, at(PUBLISHED), at(to));
    assert_eq!(retarget("10.9.9.9:80"), Err(ForwardError::NotInternal(ip("10.9.9.9"))));
    assert_eq!(retarget("192.168.64.3:0"), Err(ForwardError::PortZero));
    let other = lab.nat.retarget_forward(proto::TCP, at(PUBLISHED), at(SECOND));
    assert_eq!(other, Err(ForwardError::NotPublished(at(PUBLISHED))));
    let after = lab.nat.conntrack_stats();
    assert_eq!((after.connections, after.ports), (before.connections, before.ports));
    assert_eq!(lab.map(&udp(FIRST, CLIENT)), at(PUBLISHED));
    assert_eq!(dst(&lab.take(&udp("198.51.100.2:1", PUBLISHED))), at(FIRST));
}

#[test]
fn the_mapping_of_a_connection_cannot_be_retargeted() {
    let mut lab = Lab::default();
    let external = lab.map(&udp(FIRST, CLIENT));
    let refused = lab.nat.retarget_forward(proto::UDP, external, at(SECOND));
    assert_eq!(refused, Err(ForwardError::NotPublished(external)));
    assert_eq!(lab.nat.connection_count(), 1);
}

#[test]
fn a_port_can_be_retargeted_while_the_table_is_full() {
    let mut lab = with_table(2);
    lab.nat.add_forward(proto::UDP, at("203.0.113.1:8081"), at("192.168.64.4:80")).unwrap();
    let more = lab.nat.add_forward(proto::UDP, at("203.0.113.1:8082"), at("192.168.64.5:80"));
    assert_eq!(more, Err(ForwardError::Full));
    lab.nat.retarget_forward(proto::UDP, at(PUBLISHED), at(SECOND)).unwrap();
    assert_eq!(dst(&lab.take(&udp(CLIENT, PUBLISHED))), at(SECOND));
    // The room that expired connections take is used.
    lab.sleep(1000);
    assert!(lab.nat.remove_forward(proto::UDP, at("203.0.113.1:8081")));
    lab.nat.add_forward(proto::UDP, at("203.0.113.1:8082"), at("192.168.64.5:80")).unwrap();
}

#[test]
fn a_full_table_and_a_port_in_use_are_different_errors() {
    let mut lab = with_table(1);
    let again = lab.nat.add_forward(proto::UDP, at(PUBLISHED), at(SECOND));
    assert_eq!(again, Err(ForwardError::InUse(at(PUBLISHED))));
    let other = lab.nat.add_forward(proto::TCP, at(PUBLISHED), at(SECOND));
    assert_eq!(other, Err(ForwardError::Full));
}

/// Ports rest only where everybody may answer, see RFC 6888 REQ-8.
fn with_resting_port(sessions: u32, table: usize) -> Lab {
    let mut lab = Lab::new(|c| {
        c.filtering_udp = Behaviour::EndpointIndependent;
        c.ports = (60000, 60001);
        c.table_size = table;
        c.sessions_per_endpoint = sessions;
    });
    assert_eq!(lab.map(&udp("192.168.64.2:60000", CLIENT)), at("203.0.113.1:60000"));
    lab.wait(302);
    let s = lab.nat.conntrack_stats();
    assert_eq!((s.connections, s.ports), (0, 1), "the port rests");
    lab
}

#[test]
fn a_port_that_cannot_be_published_keeps_its_rest() {
    let mut lab = with_resting_port(100, 1);
    lab.map(&tcp("192.168.64.2:1000", CLIENT, guestnet_wire::tcp::flags::SYN));
    let refused = lab.nat.add_forward(proto::UDP, at("203.0.113.1:60000"), at(SECOND));
    assert_eq!(refused, Err(ForwardError::Full));
    assert_eq!(lab.nat.conntrack_stats().ports, 2);
    lab.wait(1000);
    assert_eq!(lab.nat.conntrack_stats().ports, 0, "no port is lost");
}

#[test]
fn a_refused_connection_does_not_shorten_the_rest_of_a_port() {
    let mut lab = with_resting_port(1, 64);
    // The other port of the range goes to the same guest, whose only session it has; a further one could only have
    // the resting port.
    lab.map(&udp("192.168.64.2:60001", CLIENT));
    assert_eq!(lab.out(&udp("192.168.64.2:5000", CLIENT)), Dropped(DropReason::FlowLimit));
    assert_eq!(lab.nat.conntrack_stats().ports, 2);
    assert_eq!(lab.out(&udp("192.168.64.3:5000", CLIENT)), Dropped(DropReason::PortsExhausted));
}
