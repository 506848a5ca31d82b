//! Theory of operation: TCP connections of guests through the whole core, with a virtual clock: which make room
//! for others, what ends those of a guest that rebooted, and what a guest hears of a connect that a router
//! answered.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/net.rs"]
mod net;

use guestnet_core::config::{DatagramError, ForwardSpec};
use guestnet_core::effects::{Close, Event, SockError};
use guestnet_core::stats::DropReason;
use guestnet_core::types::{ForwardId, PortId, SockId};
use guestnet_wire::arp;
use guestnet_wire::ether::{self, Mac};
use guestnet_wire::tcp::flags;
use guestnet_wire::{be16, be32, icmp, parse, proto};
use net::*;
use std::net::IpAddr;

const X1: &str = "203.0.113.1:80";

#[test]
fn connects_that_nobody_waits_for_make_room_the_oldest_first() {
    let mut n = Net::with_limits(|l| l.flows_per_port = 4);
    n.open_tcp(A, 4000, X1);
    for port in 4001..4004 {
        n.send(A, syn(A, port, X1));
    }
    // The program of one still waits: its SYN comes again.
    n.send(A, syn(A, 4001, X1));
    for port in 4004..4006 {
        n.send(A, syn(A, port, X1));
        n.core.audit().unwrap();
    }
    let mut states = n.states();
    states.sort_unstable();
    let connecting = |port| (port, "connecting");
    assert_eq!(states, [(4000, "established"), connecting(4001), connecting(4004), connecting(4005)]);
    assert_eq!((n.drops(DropReason::FlowLimit), n.fx.closed.len()), (0, 2));
    // One that was evicted is opened again by its next SYN, and completes.
    n.open_tcp(A, 4002, X1);
    assert!(n.states().contains(&(4002, "established")));
}

#[test]
fn a_flood_of_connects_to_a_black_hole_refuses_no_other_connect() {
    let mut n = Net::with_limits(|l| l.flows_per_port = 100);
    for i in 0..5000u16 {
        n.send(A, syn(A, 10_000 + i, "203.0.113.9:9"));
        if i % 50 == 0 {
            n.open_tcp(A, 4000 + i / 50, X1);
            let (port, end) = (4000 + i / 50, n.fx.connects.last().unwrap().1);
            n.segment(A, port, X1, 1001, 0, flags::RST);
            assert_eq!(n.fx.sock(end).closed, Some(Close::Reset));
        }
    }
    assert_eq!(n.drops(DropReason::FlowLimit), 0);
    assert_eq!(n.core.ports().next().unwrap().flows, 100);
    n.core.audit().unwrap();
}

#[test]
fn a_flood_of_clients_whose_guest_is_silent_refuses_no_connect_of_it() {
    let mut n = Net::with_limits(|l| l.flows_per_port = 20);
    n.core.add_forward(ForwardId(1), ForwardSpec::published(proto::TCP, guest_addr(A, 80)));
    for i in 0..200u16 {
        let sock = n.fx.new_sock();
        let peer = addr(&format!("198.51.100.7:{}", 2000 + i));
        assert!(n.core.tcp_accepted(n.now, ForwardId(1), sock, peer, &mut n.fx).is_some());
    }
    n.core.audit().unwrap();
    n.open_tcp(A, 4000, X1);
    assert!(n.states().contains(&(4000, "established")));
}

#[test]
fn a_connect_that_waits_for_a_full_port_keeps_its_place_in_one_list() {
    let mut n = Net::with_limits(|l| l.flows_per_port = 3);
    n.send(A, syn(A, 4000, X1));
    let (flow, _) = n.fx.connects[0];
    n.fx.port(A).room = 0;
    n.core.tcp_connected(n.now, flow, Ok(()), &mut n.fx);
    n.core.audit().unwrap();
    n.fx.port(A).room = usize::MAX;
    n.core.port_writable(n.now, A, &mut n.fx);
    n.core.audit().unwrap();
    assert_eq!(n.states(), [(4000, "syn_received")]);
    for port in 4001..4005 {
        n.send(A, syn(A, port, X1));
        n.core.audit().unwrap();
    }
    assert!(n.states().iter().all(|(port, _)| *port != 4000), "the oldest that is being opened went");
}

/// Frames to a guest that ask whether it still knows a connection: their source ports and ACK numbers.
fn probes(n: &mut Net) -> Vec<(u16, u32)> {
    let tcp = |s: &common::Sent| {
        let got = (be16(&s.frame, 12) == ether::IPV4).then(|| read(s))?;
        (got.p.proto == proto::TCP).then(|| (got.p.dst_port, be32(got.l4(), 8)))
    };
    n.fx.take().iter().filter_map(tcp).collect()
}

fn asks_for_the_gateway(n: &mut Net, port: PortId) {
    n.send(port, arp_frame(arp::REQUEST, mac(port), guest_ip(port), Mac::BROADCAST, ip(GATEWAY)));
}

#[test]
fn a_guest_that_looks_for_the_gateway_anew_is_asked_about_its_idle_connections() {
    let mut n = Net::new();
    let (_, first) = n.open_tcp(A, 4000, X1);
    let (_, second) = n.open_tcp(A, 4001, X1);
    n.open_tcp(B, 4000, X1);
    n.pass_ms(20_000);
    n.open_tcp(A, 4002, X1);
    n.fx.frames.clear();
    asks_for_the_gateway(&mut n, A);
    let asked = probes(&mut n);
    assert_eq!(asked, [(4000, 1001), (4001, 1001)], "what is idle, of this guest");
    n.segment(A, 4000, X1, 1001, 0, flags::RST);
    assert_eq!((n.fx.sock(first).closed, n.fx.sock(second).closed), (Some(Close::Reset), None));
    // A guest that asks again and again is not answered by a flood.
    asks_for_the_gateway(&mut n, A);
    n.pass_ms(5_000);
    asks_for_the_gateway(&mut n, A);
    assert!(probes(&mut n).is_empty());
}

#[test]
fn one_connection_that_a_guest_has_forgotten_leads_to_the_others() {
    let mut n = Net::new();
    let (_, first) = n.open_tcp(A, 4000, X1);
    n.pass_ms(60_000);
    let (_, second) = n.open_tcp(A, 4001, X1);
    n.pass_ms(30_000);
    assert!(probes(&mut n).is_empty());
    n.fx.sock(first).segments_in += 40;
    // The peer of the first probes; the guest has rebooted.
    n.pass_ms(60_000);
    assert_eq!(probes(&mut n)[0], (4000, 1001));
    n.segment(A, 4000, X1, 1001, 0, flags::RST);
    assert_eq!(probes(&mut n), [(4001, 1001)]);
    n.segment(A, 4001, X1, 1001, 0, flags::RST);
    assert_eq!(n.core.flows().count(), 0);
    for sock in [first, second] {
        assert_eq!(n.fx.sock(sock).closed, Some(Close::Reset));
    }
}

#[test]
fn an_icmp_error_of_a_router_for_a_connect_reaches_the_guest_as_it_came() {
    let mut n = Net::new();
    for (kind, code) in [
        (icmp::TIME_EXCEEDED, 0),
        (icmp::UNREACHABLE, icmp::unreachable::ADMIN_PROHIBITED),
        (icmp::UNREACHABLE, icmp::unreachable::PORT),
    ] {
        let seg = guestnet_wire::tcp::Tcp {
            src_port: 4000,
            dst_port: 80,
            seq: 1000,
            flags: flags::SYN,
            window: 65535,
            ..Default::default()
        };
        let h = Ip4 { ttl: 3, id: 0xbeef, ..Ip4::new(A, addr(X1).ip(), proto::TCP) };
        n.send(A, tcp_frame(&h, &seg, &[]));
        let (flow, sock) = *n.fx.connects.last().unwrap();
        assert_eq!(n.fx.sock(sock).ttl, 2);
        let router: IpAddr = "198.51.100.7".parse().unwrap();
        let error = DatagramError {
            kind: SockError::HostUnreachable,
            offender: Some(router),
            icmp_type: kind,
            icmp_code: code,
            mtu: 0,
            dst: addr(X1),
            seq: 0,
            payload: &[],
        };
        n.core.sock_error(n.now, flow, error, &mut n.fx);
        let got = read(&n.fx.take()[0]);
        assert_eq!((got.icmp(), got.p.src), ((kind, code), router));
        let q = parse::parse_ip(got.payload(), 0).unwrap();
        assert_eq!((q.src, q.dst), (IpAddr::V4(guest_ip(A)), addr(X1).ip()));
        assert_eq!((q.src_port, q.dst_port, be16(got.payload(), 4)), (4000, 80, 0xbeef));
        assert_eq!(be32(got.payload(), 24), 1000, "the SYN's sequence number");
        assert_eq!((n.core.flows().count(), n.fx.sock(sock).closed), (0, Some(Close::Reset)));
        // Late or for another state: nothing.
        n.core.sock_error(n.now, flow, error, &mut n.fx);
        let (open, sock) = n.open_tcp(A, 4000, X1);
        n.core.sock_error(n.now, open, error, &mut n.fx);
        assert_eq!((n.states(), n.fx.frames.len()), (vec![(4000, "established")], 0));
        n.segment(A, 4000, X1, 1001, 0, flags::RST);
        assert!(n.fx.sock(sock).closed.is_some());
    }
}

#[test]
fn the_dscp_of_a_guest_goes_out_and_follows_its_changes() {
    let mut n = Net::new();
    let to = addr(X1);
    let send = |n: &mut Net, tos: u8, flags: u8, seq: u32, ack: u32| {
        let seg = guestnet_wire::tcp::Tcp {
            src_port: 4000,
            dst_port: 80,
            seq,
            ack,
            flags,
            window: 9,
            ..Default::default()
        };
        n.send(A, tcp_frame(&Ip4 { tos, ..Ip4::new(A, to.ip(), proto::TCP) }, &seg, &[]));
    };
    send(&mut n, 0xb8, flags::SYN, 1000, 0);
    let (flow, sock) = n.fx.connects[0];
    assert_eq!(n.fx.sock(sock).tos, 0xb8);
    n.core.tcp_connected(n.now, flow, Ok(()), &mut n.fx);
    let isn = be32(read(&n.fx.take()[0]).l4(), 4);
    // ECN is between the guest and the gateway, so no change.
    send(&mut n, 0xba, flags::ACK, 1001, isn.wrapping_add(1));
    assert_eq!(n.fx.sock(sock).tos, 0xb8);
    send(&mut n, 0x20, flags::ACK, 1001, isn.wrapping_add(1));
    assert_eq!(n.fx.sock(sock).tos, 0x20);
    // Datagrams are marked one by one, ECN included.
    for tos in [0xb8, 0x02, 0] {
        n.send(A, udp_from(&Ip4 { tos, ..Ip4::new(A, to.ip(), proto::UDP) }, 5000, 7, b"x"));
        assert_eq!(n.fx.datagrams.last().unwrap().tos, tos);
    }
}

/// Opens connections of a guest to a server that sends more than the guest takes; refused ones are left out.
fn stuck(n: &mut Net, port: PortId, from: u16, count: u16, held: usize) -> Vec<SockId> {
    let mut socks = Vec::new();
    for i in 0..count {
        let Some((flow, sock)) = n.try_open_tcp(port, from + i, X1) else { continue };
        // Each takes what the kernel lets it.
        let s = n.fx.sock(sock);
        s.held = if s.tight { 8 << 10 } else { held };
        s.inbox.extend([0; 100]);
        n.core.tcp_ready(n.now, flow, true, false, &mut n.fx);
        socks.push(sock);
    }
    n.core.audit().unwrap();
    socks
}

fn held(n: &mut Net, socks: &[SockId]) -> usize {
    socks.iter().map(|s| n.fx.sock(*s).held).sum()
}

#[test]
fn downloads_that_a_guest_does_not_take_hold_no_more_than_its_share_of_the_kernels_memory() {
    const MB: usize = 1 << 20;
    let mut n = Net::with_limits(|l| l.socket_memory = 100 * MB);
    let a = stuck(&mut n, A, 10_000, 5000, 128 << 10);
    // Half of it with 400 connections, then a little for each of the others, and no more than 1024 of them.
    assert!((50 * MB..57 * MB).contains(&held(&mut n, &a)), "{}", held(&mut n, &a));
    assert!(a.iter().skip(420).all(|s| n.fx.sock(*s).tight));
    assert_eq!((a.len(), n.drops(DropReason::BufferLimit)), (1024 + 16, 5000 - 1024 - 16));
    // The next guest has its own share of what is left.
    let b = stuck(&mut n, B, 10_000, 60, 128 << 10);
    assert!(b.len() == 60 && b.iter().all(|s| !n.fx.sock(*s).tight));
    // A guest whose connections end gets whole ones again.
    for (sock, port) in a.iter().zip(10_000..) {
        n.fx.sock(*sock).held = 0;
        n.segment(A, port, X1, 1001, 0, flags::RST);
    }
    n.core.audit().unwrap();
    let (_, new) = n.open_tcp(A, 4000, X1);
    assert!(!n.fx.sock(new).tight);
}

#[test]
fn a_tight_connection_whose_guest_is_within_its_share_again_is_let_go() {
    let mut n = Net::with_limits(|l| l.socket_memory = 10 << 20);
    let socks = stuck(&mut n, A, 10_000, 200, 128 << 10);
    let last = *socks.last().unwrap();
    assert!(n.fx.sock(last).tight);
    for (sock, port) in socks.iter().zip(10_000..).take(199) {
        n.fx.sock(*sock).held = 0;
        n.segment(A, port, X1, 1001, 0, flags::RST);
    }
    // Nothing comes any more: it is seen when the idle flow is looked at.
    n.pass_ms(10_000);
    assert!(!n.fx.sock(last).tight);
    n.core.audit().unwrap();
}

#[test]
fn uploads_that_a_peer_does_not_take_are_measured_too() {
    let mut n = Net::with_limits(|l| l.socket_memory = 10 << 20);
    let mut tight = 0;
    for i in 0..400u16 {
        let (_, sock) = n.open_tcp(A, 10_000 + i, X1);
        let s = n.fx.sock(sock);
        (s.held, tight) = (if s.tight { 8 << 10 } else { 80 << 10 }, tight + usize::from(s.tight));
        let h = Ip4::new(A, addr(X1).ip(), proto::TCP);
        let mut at = 1001u32;
        let ack = n.isn.wrapping_add(1);
        for _ in 0..12 {
            let seg = guestnet_wire::tcp::Tcp {
                src_port: 10_000 + i,
                dst_port: 80,
                seq: at,
                ack,
                flags: flags::ACK,
                window: 65535,
                ..Default::default()
            };
            n.send(A, tcp_frame(&h, &seg, &[0; 1000]));
            at += 1000;
        }
        n.core.audit().unwrap();
    }
    assert!((250..=350).contains(&tight), "{tight} of 400 were opened tight");
    // The kernel got rid of it: this is seen by the looks at idle flows.
    for s in n.fx.socks.values_mut() {
        s.held = 0;
    }
    n.pass_ms(10_000);
    assert!(n.fx.socks.values().all(|s| !s.tight));
    n.core.audit().unwrap();
}

#[test]
fn few_connections_are_not_measured() {
    let mut n = Net::with_limits(|l| l.socket_memory = 1);
    for sock in stuck(&mut n, A, 10_000, 16, 6 << 20) {
        assert!(!n.fx.sock(sock).tight);
    }
}

#[test]
fn a_connection_that_ends_says_how_many_segments_it_had() {
    let mut n = Net::new();
    let (_, sock) = n.open_tcp(A, 4000, X1);
    for _ in 0..3 {
        n.segment(A, 4000, X1, 1001, n.isn.wrapping_add(1), flags::ACK);
    }
    n.segment(A, 4000, X1, 1001, n.isn.wrapping_add(1), flags::RST);
    assert_eq!(n.fx.sock(sock).closed, Some(Close::Reset));
    // SYN, the ACK of the handshake, three ACKs and the reset; the SYN-ACK.
    let closed = |e: &Event| matches!(e, Event::FlowClosed { packets_out: Some(6), packets_in: Some(1), .. });
    assert_eq!(n.events(closed), 1, "{:?}", n.fx.events);
}
