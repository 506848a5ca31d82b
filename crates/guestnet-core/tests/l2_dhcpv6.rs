//! Theory of operation: DHCPv6 of guests as the switch sees it. Queries reach the gateway's service and nobody else.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/net.rs"]
mod net;

use guestnet_core::effects::Event;
use guestnet_core::stats::DropReason;
use guestnet_core::types::{PortId, ServiceId};
use guestnet_wire::ether::{self, Mac};
use guestnet_wire::{parse, proto};
use net::*;
use std::net::{IpAddr, Ipv6Addr};

/// A UDP datagram of a guest in IPv6, with its checksum.
fn udp6(from: PortId, to_mac: Mac, src: &str, dst: &str, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let (src, dst): (Ipv6Addr, Ipv6Addr) = (src.parse().unwrap(), dst.parse().unwrap());
    let datagram = udp_bytes(src.into(), dst.into(), ports.0, ports.1, payload);
    let mut packet = vec![0x60, 0, 0, 0, 0, datagram.len() as u8, proto::UDP, 1];
    packet.extend_from_slice(&src.octets());
    packet.extend_from_slice(&dst.octets());
    packet.extend_from_slice(&datagram);
    eth(mac(from), to_mac, ether::IPV6, &packet)
}

/// RFC 8415: by multicast, and from a link-local address alone.
#[test]
fn dhcpv6_reaches_its_service_and_no_other_guest() {
    let mut n = Net::new();
    let servers = Mac([0x33, 0x33, 0, 1, 0, 2]);
    let query = |src: &str, dst: &str, m: Mac| udp6(A, m, src, dst, (546, 547), b"solicit");
    let solicit = query("fe80::a", "ff02::1:2", servers);
    assert_eq!(n.ask(A, solicit.clone()).len(), 1, "no service: as any multicast");
    n.core.add_service(ServiceId(5), proto::UDP, "fe80::1".parse().unwrap(), 547);
    assert!(n.ask(A, solicit.clone()).is_empty(), "the service's alone");
    let got = n.fx.events.last().unwrap().clone();
    let Event::Datagram { service, port, mac: m, src, dst, payload } = got else { panic!("{got:?}") };
    assert_eq!((service, port, m, &*payload), (ServiceId(5), A, mac(A), &b"solicit"[..]));
    assert_eq!((src, dst), (addr("[fe80::a]:546"), addr("[ff02::1:2]:547")));
    // To the server itself: it says that this is not allowed.
    n.send(A, query("fe80::a", "fe80::1", GATEWAY_MAC));
    assert_eq!(n.events(|e| matches!(e, Event::Datagram { .. })), 2);
    for src in ["fd00::a", "::"] {
        n.dropped(DropReason::Policy, |n| n.send(A, query(src, "ff02::1:2", servers)));
    }
    n.dropped(DropReason::SpoofedSource, |n| {
        n.send(B, udp6(B, servers, "fe80::1", "ff02::1:2", (546, 547), b"solicit"));
    });
    let mut damaged = solicit;
    *damaged.last_mut().unwrap() ^= 1;
    n.dropped(DropReason::BadL4Checksum, |n| n.send(A, damaged));
    // Another guest's port 547 is not the service's, and no guest answers in its place.
    assert_eq!(n.ask(A, query("fe80::a", "fe80::b", mac(B))).len(), 1);
    let reply = udp6(A, mac(B), "fe80::a", "fe80::b", (547, 546), b"advertise");
    n.dropped(DropReason::Policy, |n| n.send(A, reply));
    assert_eq!(n.events(|e| matches!(e, Event::Datagram { .. })), 2);
    n.fx.frames.clear();
    let (to, now) = (addr("[fe80::a]:546"), n.now);
    n.core.service_send(now, A, mac(A), addr("[fe80::1]:547"), to, b"advertise", &mut n.fx);
    let frame = &n.fx.frames[0].frame;
    let p = parse::parse_ip(frame, ether::HEADER_LEN).unwrap();
    assert!(parse::verify_l4(frame, &p), "in IPv6 a checksum is needed");
    assert_eq!((p.src, p.src_port), ("fe80::1".parse::<IpAddr>().unwrap(), 547));
    assert_eq!((p.dst, p.dst_port), (to.ip(), 546));
    assert_eq!(&frame[p.payload..p.end], b"advertise");
}

/// DHCPv6 is asked at a rate for each guest, in which its DHCPv4 counts too.
#[test]
fn a_flood_of_dhcpv6_is_limited_for_its_guest() {
    let mut n = Net::new();
    n.core.add_service(ServiceId(5), proto::UDP, "fe80::1".parse().unwrap(), 547);
    let solicit = |from: PortId, src: &str| {
        udp6(from, Mac([0x33, 0x33, 0, 1, 0, 2]), src, "ff02::1:2", (546, 547), b"solicit")
    };
    for _ in 0..10_000 {
        n.send(A, solicit(A, "fe80::a"));
    }
    let taken = n.events(|e| matches!(e, Event::Datagram { .. }));
    assert!(taken < 2000, "{taken} of 10000 reached the service");
    assert_eq!(n.drops(DropReason::RateLimit) as usize, 10_000 - taken);
    n.send(B, solicit(B, "fe80::b"));
    assert_eq!(n.events(|e| matches!(e, Event::Datagram { .. })), taken + 1);
}
