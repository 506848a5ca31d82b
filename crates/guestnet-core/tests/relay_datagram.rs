//! Theory of operation: the relays of UDP and echo, published ports, reassembly, caps and expiry, with a
//! virtual clock. The numbers of requirements are those of RFC 4787 (UDP) and RFC 5508 (ICMP).
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/net.rs"]
mod net;

use guestnet_core::Filtering;
use guestnet_core::config::{DatagramError, ForwardSpec};
use guestnet_core::effects::{Event, SockError};
use guestnet_core::stats::DropReason;
use guestnet_core::types::{Csum, FlowId, ForwardId, FrameMeta, Gso, PortConfig, PortId, SockId};
use guestnet_wire::arp;
use guestnet_wire::ether::Mac;
use guestnet_wire::{be16, icmp, parse, proto};
use net::*;
use std::net::IpAddr;

const X1: &str = "203.0.113.1:7";

fn error(kind: SockError, dst: &str) -> DatagramError<'static> {
    DatagramError {
        kind,
        offender: None,
        icmp_type: 0,
        icmp_code: 0,
        mtu: 0,
        dst: addr(dst),
        seq: 0,
        payload: b"hello",
    }
}

#[test]
fn req_1_one_socket_for_all_destinations() {
    let mut n = Net::new();
    for to in [X1, "203.0.113.1:8", "203.0.113.2:7"] {
        n.udp(A, 4000, to, b"hello");
    }
    n.udp(B, 4000, X1, b"hello");
    n.udp(A, 4001, X1, b"hello");
    let socks: Vec<SockId> = n.fx.datagrams.iter().map(|d| d.sock).collect();
    assert!(socks[0] == socks[1] && socks[1] == socks[2]);
    assert_eq!((n.fx.opened.len(), n.core.flows().count()), (3, 5));
    let d = &n.fx.datagrams[0];
    assert_eq!((d.dst, d.payload.as_slice(), d.ttl, d.dont_fragment), (addr(X1), &b"hello"[..], 63, false));
    assert_eq!(n.events(|e| matches!(e, Event::FlowOpened { inbound: false, .. })), 5);
}

#[test]
fn replies_come_back() {
    let mut n = Net::new();
    n.udp(A, 4000, X1, b"hello");
    let (flow, _) = n.opened();
    n.udp_reply(flow, X1, b"world");
    let got = read(&n.fx.frames[0]);
    assert_eq!((got.src(), got.dst(), got.payload()), (addr(X1), guest_addr(A, 4000), &b"world"[..]));
    // An empty datagram is one too, both ways.
    n.udp(A, 4000, X1, b"");
    n.udp_reply(flow, X1, b"");
    assert_eq!((n.fx.datagrams[1].payload.len(), n.fx.frames.len()), (0, 2));
    let f = n.core.flows().next().unwrap();
    assert_eq!((f.bytes_out, f.bytes_in, f.state), (5, 5, "assured"));
}

/// A destination of all zeros is how a mapping is filed in the flow table, and is nobody's to name.
#[test]
fn nothing_can_be_sent_to_a_mapping() {
    let mut n = Net::new();
    n.udp(A, 4000, X1, b"hello");
    n.send(A, echo_frame(A, "203.0.113.1", 77, 1, 64, b"ping"));
    n.core.audit().unwrap();
    n.dropped(DropReason::BadDestination, |n| n.udp(A, 4000, "0.0.0.0:0", b"x"));
    n.core.audit().unwrap();
    n.dropped(DropReason::BadDestination, |n| n.send(A, echo_frame(A, "0.0.0.0", 77, 1, 64, b"x")));
    n.core.audit().unwrap();
    // The mapping goes with its flow, and its record is another guest's next.
    n.pass_ms(400_000);
    n.udp(B, 4000, X1, b"hello");
    n.core.audit().unwrap();
}

#[test]
fn req_8_filtering() {
    use Filtering::{AddressAndPortDependent, AddressDependent, EndpointIndependent};
    for (filtering, same_address, stranger) in [
        (EndpointIndependent, true, true),
        (AddressDependent, true, false),
        (AddressAndPortDependent, false, false),
    ] {
        let mut c = config();
        c.filtering = filtering;
        let mut n = Net::with(c);
        n.udp(A, 4000, X1, b"hello");
        let (flow, _) = n.opened();
        for (from, passes) in [("203.0.113.1:9", same_address), ("203.0.113.9:7", stranger)] {
            n.fx.frames.clear();
            n.udp_reply(flow, from, b"x");
            assert_eq!(n.fx.frames.len(), usize::from(passes), "{filtering:?} {from}");
        }
        // Nobody outside makes state, or speaks as someone that the guest must not believe.
        assert_eq!(n.core.flows().count(), 1);
        n.dropped(DropReason::Filtered, |n| n.udp_reply(flow, "127.0.0.1:7", b"x"));
        n.dropped(DropReason::Filtered, |n| n.udp_reply(flow, "192.168.64.12:7", b"x"));
    }
}

#[test]
fn req_5_and_6_timeouts() {
    let mut n = Net::new();
    n.udp(A, 4000, X1, b"hello");
    let (flow, sock) = n.opened();
    n.pass_ms(299_000);
    n.udp_reply(flow, X1, b"late");
    assert_eq!(n.fx.frames.len(), 1);
    n.pass_ms(299_000);
    assert!(n.fx.closed.is_empty());
    n.pass_ms(3_000);
    assert_eq!(n.fx.closed.len(), 1);
    assert_eq!((n.fx.closed[0].0, n.core.flows().count()), (sock, 0));
    assert_eq!(n.core.next_timer(), None);
    n.dropped(DropReason::NoFlow, |n| n.udp_reply(flow, X1, b"too late"));
    // An answered query of DNS goes soon, one that was not answered stays.
    n.udp(A, 4000, "203.0.113.1:53", b"query");
    n.udp(A, 4001, "203.0.113.1:53", b"query");
    let flow = n.fx.opened[1].0;
    n.udp_reply(flow, "203.0.113.1:53", b"answer");
    n.pass_ms(12_000);
    assert_eq!(n.core.flows().count(), 1);
}

#[test]
fn an_idle_network_sleeps() {
    let mut n = Net::new();
    assert_eq!(n.core.next_timer(), None);
    for port in 0..50 {
        n.udp(A, 4000 + port, X1, b"hello");
        n.pass_ms(3);
    }
    for _ in 0..100 {
        n.udp(A, 4000, X1, b"again");
        n.pass_ms(10);
    }
    // Nothing but expiry, and that in few steps.
    assert_eq!(n.pass_ms(290_000), 0);
    assert!(n.pass_ms(20_000) <= 3);
    assert_eq!(n.core.flows().count(), 0);
}

#[test]
fn the_cap_evicts_one_shot_flows_least_recently_used_first() {
    let mut n = Net::with_limits(|l| l.udp_sockets_per_port = 4);
    for port in 0..4 {
        n.udp(A, 4000 + port, X1, b"x");
    }
    // 4000 becomes a conversation, 4001 is used again.
    let flow = n.fx.opened[0].0;
    n.udp(A, 4000, X1, b"x");
    n.udp_reply(flow, X1, b"x");
    n.udp(A, 4001, X1, b"x");
    n.udp(A, 5000, X1, b"x");
    n.udp(A, 5001, X1, b"x");
    let mut guests: Vec<u16> = n.core.flows().map(|f| f.guest.port()).collect();
    guests.sort_unstable();
    assert_eq!((guests, n.fx.closed.len()), (vec![4000, 4001, 5000, 5001], 2));
    // Conversations are never evicted: then new ones are refused, and the guest is told.
    for i in 1..6 {
        let flow = n.fx.opened[i].0;
        for _ in 0..2 {
            n.udp_reply(flow, X1, b"x");
        }
    }
    n.fx.frames.clear();
    n.dropped(DropReason::FlowLimit, |n| n.udp(A, 6000, X1, b"x"));
    assert_eq!(read(&n.fx.frames[0]).icmp(), (icmp::UNREACHABLE, icmp::unreachable::ADMIN_PROHIBITED));
    assert_eq!(n.events(|e| matches!(e, Event::FlowDenied(d) if d.reason == DropReason::FlowLimit)), 1);
    // The other guest is unaffected.
    n.udp(B, 6000, X1, b"x");
    assert_eq!(n.core.flows().count(), 5);
}

#[test]
fn a_flood_of_flows_stays_within_the_caps() {
    let mut n = Net::with_limits(|l| {
        l.flows_per_port = 50;
        l.udp_sockets_per_port = 10;
        l.flows = 80;
    });
    for i in 0..2000u32 {
        let to = format!("203.0.{}.{}:9", i / 200, 1 + i % 200);
        n.udp(A, 1000 + (i % 7) as u16, &to, b"x");
        n.send(A, syn(A, 2000 + i as u16, &to));
    }
    let a = n.core.ports().next().unwrap();
    assert!(a.flows <= 50);
    assert!(n.fx.opened.len() + n.fx.connects.len() - n.fx.closed.len() <= 60);
    // Nobody answers, so the newest are there, in place of the oldest.
    assert_eq!(n.drops(DropReason::FlowLimit), 0);
    assert!(n.core.flows().any(|f| f.guest.port() == 3999));
    n.udp(B, 1, X1, b"x");
    assert_eq!(n.core.ports().nth(1).unwrap().flows, 1);
}

#[test]
fn who_wants_all_descriptors_leaves_some_to_the_next() {
    let mut n = Net::with_limits(|l| l.descriptors = 100);
    let flows = |n: &Net, i: usize| n.core.ports().nth(i).unwrap().flows;
    let greedy = |n: &mut Net, who, from: u16| {
        for port in from..from + 200 {
            let _refused = n.try_open_tcp(who, port, "203.0.113.1:80");
        }
    };
    greedy(&mut n, A, 4000);
    assert_eq!(flows(&n, 0), 71);
    greedy(&mut n, B, 4000);
    assert_eq!(flows(&n, 1), 16);
    // What ends is not the first one's again while the other has less.
    let ended: Vec<_> = n.fx.connects.iter().take(40).map(|(flow, _)| *flow).collect();
    for flow in ended {
        n.core.tcp_connected(n.now, flow, Err(SockError::HostUnreachable), &mut n.fx);
    }
    greedy(&mut n, B, 5000);
    greedy(&mut n, A, 5000);
    let (a, b) = (flows(&n, 0), flows(&n, 1));
    assert!(a + b <= 100 && b >= 40, "{a} and {b}");
}

#[test]
fn a_share_that_shrinks_refuses_new_flows_and_one_that_grows_lets_them_in() {
    let mut n = Net::with_limits(|l| l.descriptors = 1000);
    let flows = |n: &Net| n.core.ports().next().unwrap().flows;
    for port in 0..50 {
        n.open_tcp(A, 4000 + port, "203.0.113.1:80");
    }
    // Other networks of the process hold the rest.
    n.core.set_shares(60, usize::MAX);
    for port in 0..50 {
        let _refused = n.try_open_tcp(A, 5000 + port, "203.0.113.1:80");
    }
    assert_eq!(flows(&n), 50, "it keeps what it has");
    n.core.set_shares(1000, usize::MAX);
    n.open_tcp(A, 6000, "203.0.113.1:80");
    assert_eq!(flows(&n), 51);
}

#[test]
fn tcp_over_the_cap_is_reset() {
    let mut n = Net::with_limits(|l| l.flows_per_port = 3);
    for port in 0..3 {
        n.open_tcp(A, 4000 + port, "203.0.113.1:80");
    }
    let mut out = Vec::new();
    n.dropped(DropReason::FlowLimit, |n| out = n.ask(A, syn(A, 5000, "203.0.113.1:80")));
    let got = read(&out[0]);
    let seg = guestnet_wire::tcp::Tcp::parse(got.l4()).unwrap();
    assert_eq!((got.src(), seg.ack, seg.flags), (addr("203.0.113.1:80"), 1001, 0x14));
    assert_eq!(n.fx.connects.len(), 3);
}

#[test]
fn tcp_in_time_wait_makes_room_the_oldest_first() {
    use guestnet_wire::tcp::Tcp;
    use guestnet_wire::tcp::flags::{ACK, FIN};
    let mut n = Net::with_limits(|l| l.flows_per_port = 3);
    let segment = |from: u16, seq: u32, ack: u32, flags: u8| {
        let seg = Tcp { src_port: from, dst_port: 80, seq, ack, flags, window: 65535, ..Tcp::default() };
        tcp_frame(&Ip4::new(A, "203.0.113.1".parse().unwrap(), proto::TCP), &seg, &[])
    };
    for port in 4000..4003 {
        n.send(A, syn(A, port, "203.0.113.1:80"));
        let (flow, sock) = *n.fx.connects.last().unwrap();
        n.fx.frames.clear();
        n.core.tcp_connected(n.now, flow, Ok(()), &mut n.fx);
        let isn = Tcp::parse(read(&n.fx.take()[0]).l4()).unwrap().seq;
        // The host closes first, so the record stays in TIME-WAIT.
        n.send(A, segment(port, 1001, isn.wrapping_add(1), ACK));
        n.fx.sock(sock).eof = true;
        n.core.tcp_ready(n.now, flow, true, true, &mut n.fx);
        n.send(A, segment(port, 1001, isn.wrapping_add(2), ACK | FIN));
        n.core.audit().unwrap();
    }
    let states = |n: &Net| n.core.flows().map(|f| (f.guest.port(), f.state)).collect::<Vec<_>>();
    assert_eq!(states(&n), [(4000, "time_wait"), (4001, "time_wait"), (4002, "time_wait")]);
    n.send(A, syn(A, 5000, "203.0.113.1:80"));
    assert_eq!(states(&n), [(5000, "connecting"), (4001, "time_wait"), (4002, "time_wait")]);
    n.core.audit().unwrap();
    // A flow that lives is not evicted.
    for port in 5001..5004 {
        n.open_tcp(A, port, "203.0.113.1:80");
    }
    n.dropped(DropReason::FlowLimit, |n| n.send(A, syn(A, 5004, "203.0.113.1:80")));
    assert_eq!(n.core.flows().filter(|f| f.state == "established").count(), 3);
    n.core.audit().unwrap();
}

#[test]
fn large_sends_stay_in_one_piece() {
    let mut n = Net::new();
    let c = PortId(3);
    n.core.add_port(c, PortConfig { gso_max: 65000, ..port_config() }).unwrap();
    n.hello(c);
    let meta = FrameMeta { csum: Csum::Partial { start: 34, offset: 6 }, gso: Some(Gso::Udp(1000)) };
    n.send_meta(c, udp_frame(c, 4000, addr(X1), &[1; 5500]), meta);
    assert_eq!((n.fx.datagrams[0].payload.len(), n.fx.datagrams[0].segment), (5500, 1000));
    let (flow, _) = n.opened();
    n.core.udp_received(n.now, flow, addr(X1), &[2; 5500], 1000, &mut n.fx);
    assert_eq!((n.fx.frames.len(), n.fx.frames[0].meta), (1, meta));
    assert_eq!(read(&n.fx.frames[0]).payload().len(), 5500);
    // A port without GSO gets each datagram.
    n.udp(A, 4000, X1, b"x");
    let (flow, _) = n.opened();
    n.fx.frames.clear();
    n.core.udp_received(n.now, flow, addr(X1), &[2; 5500], 1000, &mut n.fx);
    let sizes: Vec<usize> = n.fx.frames.iter().map(|f| read(f).payload().len()).collect();
    assert_eq!(sizes, [1000, 1000, 1000, 1000, 1000, 500]);
}

/// RFC 7739 5: a counter that all guests see tells each how much the others get.
#[test]
fn identifications_tell_a_guest_nothing_of_others() {
    let mut n = Net::new();
    for port in [A, B] {
        n.udp(port, 4000, X1, b"hello");
    }
    let flows: Vec<FlowId> = n.fx.opened.iter().map(|o| o.0).collect();
    n.fx.frames.clear();
    for busy in [0, 7, 100] {
        n.udp_reply(flows[0], X1, b"world");
        for _ in 0..busy {
            n.udp_reply(flows[1], X1, b"world");
        }
    }
    let ids = |port| {
        let ours = n.fx.frames.iter().filter(move |f| f.port == port);
        ours.map(|f| be16(&f.frame, 18)).collect::<Vec<u16>>()
    };
    let of_a = ids(A);
    assert_eq!((of_a[1].wrapping_sub(of_a[0]), of_a[2].wrapping_sub(of_a[1])), (1, 1));
    assert_ne!(of_a[0], ids(B)[0], "each begins somewhere else");
}

#[test]
fn req_13_and_14_fragments() {
    let mut n = Net::new();
    n.udp(A, 4000, X1, b"x");
    let (flow, _) = n.opened();
    let body: Vec<u8> = (0..4000u32).map(|i| i as u8).collect();
    n.udp_reply(flow, X1, &body);
    assert!(n.fx.frames.iter().all(|f| f.frame.len() <= 1514) && n.fx.frames.len() == 3);
    // What goes out in fragments comes back as the same bytes, in any order.
    let bytes = udp_bytes(IpAddr::V4(guest_ip(A)), "203.0.113.1".parse().unwrap(), 4000, 7, &body);
    let h = Ip4::new(A, "203.0.113.1".parse().unwrap(), proto::UDP);
    let piece = |from: usize, to: usize, id: u16| {
        let more = if to < bytes.len() { 0x2000 } else { 0 };
        Ip4 { id, frag: more | (from / 8) as u16, ..h.clone() }.frame(&bytes[from..to])
    };
    let cuts = [(0usize, 1480usize), (1480, 2960), (2960, 4008)];
    for (i, order) in [[0, 1, 2], [2, 1, 0], [1, 0, 2], [2, 0, 1]].into_iter().enumerate() {
        n.fx.datagrams.clear();
        for k in order {
            n.send(A, piece(cuts[k].0, cuts[k].1, i as u16));
        }
        assert_eq!(n.fx.datagrams.len(), 1, "{order:?}");
        assert_eq!(n.fx.datagrams[0].payload, body);
    }
    assert_eq!((n.core.reassembly_bytes(), n.all_drops()), (0, 0));
    // An overlap ends the datagram for good.
    n.fx.datagrams.clear();
    n.send(A, piece(0, 1480, 99));
    n.dropped(DropReason::Reassembly, |n| n.send(A, piece(1472, 2944, 99)));
    n.dropped(DropReason::Reassembly, |n| n.send(A, piece(1480, 2960, 99)));
    n.dropped(DropReason::Reassembly, |n| n.send(A, piece(2960, 4008, 99)));
    assert!(n.fx.datagrams.is_empty());
    // Two ends, or an end before what came already.
    n.send(A, piece(2960, 4008, 100));
    n.dropped(DropReason::Reassembly, |n| {
        n.send(A, Ip4 { id: 100, frag: 125, ..h.clone() }.frame(&[0; 100]));
    });
    // "Ping of death": refused by its header alone.
    let death = Ip4 { id: 101, frag: 0x1fff, ..h.clone() }.frame(&[0; 100]);
    n.dropped(DropReason::Malformed, |n| n.send(A, death));
    // A first fragment that hides the ports or flags (RFC 1858).
    let h = Ip4 { proto: proto::TCP, ..h.clone() };
    n.dropped(DropReason::Reassembly, |n| {
        n.send(A, Ip4 { id: 102, frag: 0x2000, ..h.clone() }.frame(&[0; 16]))
    });
    n.dropped(DropReason::Reassembly, |n| n.send(A, Ip4 { id: 103, frag: 1, ..h.clone() }.frame(&[0; 16])));
}

#[test]
fn req_14a_incomplete_datagrams_are_bounded_and_time_out() {
    let mut n = Net::with_limits(|l| {
        l.reassembly_bytes = 100_000;
        l.reassemblies_per_port = 16;
    });
    let h = Ip4 { frag: 0x2000, ..Ip4::new(A, "203.0.113.1".parse().unwrap(), proto::UDP) };
    for id in 0..10_000u16 {
        n.send(A, Ip4 { id, ..h.clone() }.frame(&[0; 1480]));
        assert!(n.core.reassembly_bytes() <= 100_000);
    }
    assert!(n.drops(DropReason::Reassembly) >= 9_984);
    // The other guest's fragments come through all the same.
    let bytes = udp_bytes(IpAddr::V4(guest_ip(B)), "203.0.113.1".parse().unwrap(), 1, 2, &[3; 2000]);
    let hb = Ip4::new(B, "203.0.113.1".parse().unwrap(), proto::UDP);
    n.send(B, Ip4 { frag: 0x2000, ..hb.clone() }.frame(&bytes[..1480]));
    n.send(A, Ip4 { id: 7, ..h.clone() }.frame(&[0; 1480]));
    n.send(B, Ip4 { frag: 185, ..hb }.frame(&bytes[1480..]));
    assert_eq!(n.fx.datagrams.len(), 1);
    n.fx.frames.clear();
    n.pass_ms(31_000);
    assert_eq!((n.core.reassembly_bytes(), n.core.next_timer().is_some()), (0, true));
    assert_eq!(read(&n.fx.frames[0]).icmp(), (icmp::TIME_EXCEEDED, 1));
}

#[test]
fn errors_of_the_network_quote_the_guests_own_packet() {
    let mut n = Net::new();
    let h = Ip4 { id: 0xbeef, ttl: 3, ..Ip4::new(A, "203.0.113.1".parse().unwrap(), proto::UDP) };
    n.send(A, udp_from(&h, 4000, 7, b"hello"));
    let (flow, _) = n.opened();
    assert_eq!(n.fx.datagrams[0].ttl, 2);
    let e = DatagramError {
        offender: Some("198.51.100.7".parse().unwrap()),
        icmp_type: icmp::TIME_EXCEEDED,
        ..error(SockError::HostUnreachable, X1)
    };
    n.core.sock_error(n.now, flow, e, &mut n.fx);
    let got = read(&n.fx.frames[0]);
    assert_eq!(
        (got.icmp(), got.p.src),
        ((icmp::TIME_EXCEEDED, 0), "198.51.100.7".parse::<IpAddr>().unwrap())
    );
    let q = parse::parse_ip(got.payload(), 0).unwrap();
    assert_eq!((q.src, q.dst), (IpAddr::V4(guest_ip(A)), "203.0.113.1".parse().unwrap()));
    assert_eq!((q.src_port, q.dst_port, be16(got.payload(), 4)), (4000, 7, 0xbeef));
    assert!(parse::verify_l4(got.payload(), &q) && parse::verify_ipv4_header(got.payload(), &q));
    assert_eq!(&got.payload()[q.payload..q.end], b"hello");
    for (kind, want) in [
        (SockError::Refused, icmp::unreachable::PORT),
        (SockError::NetUnreachable, icmp::unreachable::NET),
        (SockError::HostUnreachable, icmp::unreachable::HOST),
        (SockError::MessageTooBig(1400), icmp::unreachable::FRAG_NEEDED),
    ] {
        n.fx.frames.clear();
        n.core.sock_error(n.now, flow, error(kind, X1), &mut n.fx);
        let got = read(&n.fx.frames[0]);
        assert_eq!((got.icmp(), got.p.src.to_string().as_str()), ((icmp::UNREACHABLE, want), GATEWAY));
    }
    assert_eq!(be16(read(&n.fx.frames[0]).l4(), 6), 1400);
    // No host address of ours leaks as an offender, and no error keeps a flow alive or ends it.
    n.fx.frames.clear();
    let e = DatagramError { offender: Some("127.0.0.1".parse().unwrap()), ..error(SockError::Refused, X1) };
    n.core.sock_error(n.now, flow, e, &mut n.fx);
    assert_eq!(read(&n.fx.frames[0]).p.src.to_string(), GATEWAY);
    n.dropped(DropReason::NoFlow, |n| {
        n.core.sock_error(n.now, flow, error(SockError::Refused, "203.0.113.2:7"), &mut n.fx)
    });
    assert_eq!(n.core.flows().count(), 1);
    n.pass_ms(302_000);
    assert_eq!(n.core.flows().count(), 0);
}

/// An echo that must not be cut is refused where it is too big, as a datagram is.
#[test]
fn an_echo_keeps_dont_fragment() {
    let mut n = Net::new();
    for (frag, df) in [(0, false), (0x4000, true), (0, false)] {
        let mut frame = echo_frame(A, "203.0.113.1", 7, 1, 64, &[1; 1000]);
        frame[20..22].copy_from_slice(&u16::to_be_bytes(frag));
        guestnet_wire::ipv4::fill_checksum(&mut frame[14..]);
        n.send(A, frame.clone());
        assert_eq!(n.fx.pings.last().unwrap().dont_fragment, df);
        n.fx.datagram_error = Some(SockError::MessageTooBig(600));
        let mut out = Vec::new();
        n.dropped(DropReason::HostError, |n| out = n.ask(A, frame));
        let got = read(&out[0]);
        assert_eq!((got.icmp(), guestnet_wire::be16(got.l4(), 6)), ((3, 4), 600));
    }
}

/// Whoever knows a guest's port can send the host an ICMP error, and the kernel passes on what it says.
#[test]
fn an_mtu_that_no_link_has_is_not_passed_on() {
    let mut n = Net::new();
    n.udp(A, 4000, "203.0.113.1:53", &[1; 1000]);
    let flow = n.opened().0;
    for (mtu, told) in [(1, None), (20, None), (67, None), (68, Some(68)), (552, Some(552)), (0, Some(1006))]
    {
        n.fx.frames.clear();
        let e = DatagramError {
            icmp_type: 3,
            icmp_code: 4,
            mtu,
            payload: &[1; 1000],
            ..error(SockError::MessageTooBig(mtu), "203.0.113.1:53")
        };
        let before = n.drops(DropReason::Malformed);
        n.core.sock_error(n.now, flow, e, &mut n.fx);
        let sent = n.fx.take();
        let got = sent.first().map(|s| guestnet_wire::be16(read(s).l4(), 6));
        assert_eq!(
            (got, n.drops(DropReason::Malformed) - before),
            (told, u64::from(told.is_none())),
            "MTU {mtu}"
        );
    }
    // What the host itself says of its own way out.
    n.fx.datagram_error = Some(SockError::MessageTooBig(20));
    let mut out = Vec::new();
    n.dropped(DropReason::HostError, |n| {
        out = n.ask(A, udp_frame(A, 4000, addr("203.0.113.1:53"), &[1; 1000]))
    });
    assert_eq!(guestnet_wire::be16(read(&out[0]).l4(), 6), 1006);
}

#[test]
fn errors_at_once_are_told_at_once() {
    let mut n = Net::new();
    n.udp(A, 4000, X1, b"x");
    n.fx.datagram_error = Some(SockError::MessageTooBig(1300));
    n.fx.frames.clear();
    n.dropped(DropReason::HostError, |n| n.udp(A, 4000, X1, &[0; 1400]));
    let got = read(&n.fx.frames[0]);
    assert_eq!((got.icmp(), be16(got.l4(), 6)), ((icmp::UNREACHABLE, icmp::unreachable::FRAG_NEEDED), 1300));
    n.fx.open_error = Some(SockError::Exhausted);
    n.fx.frames.clear();
    n.dropped(DropReason::HostError, |n| n.udp(A, 4001, X1, b"x"));
    assert_eq!(read(&n.fx.frames[0]).icmp(), (icmp::UNREACHABLE, icmp::unreachable::HOST));
    assert_eq!(n.core.flows().count(), 1);
    n.fx.open_error = Some(SockError::Prohibited);
    n.fx.frames.clear();
    n.send(A, echo_frame(A, "203.0.113.1", 1, 1, 64, b""));
    assert_eq!(read(&n.fx.frames[0]).icmp(), (icmp::UNREACHABLE, icmp::unreachable::ADMIN_PROHIBITED));
}

#[test]
fn echo_is_relayed() {
    let mut n = Net::new();
    n.send(A, echo_frame(A, "203.0.113.1", 77, 1, 64, b"ping"));
    n.send(A, echo_frame(A, "203.0.113.1", 77, 2, 5, b"ping"));
    n.send(A, echo_frame(A, "203.0.113.2", 77, 3, 64, b"ping"));
    n.send(B, echo_frame(B, "203.0.113.1", 77, 1, 64, b"ping"));
    let pings: Vec<(u16, u8)> = n.fx.pings.iter().map(|p| (p.seq, p.ttl)).collect();
    assert_eq!((pings, n.fx.opened.len()), (vec![(1, 63), (2, 4), (3, 63), (1, 63)], 2));
    let flow = n.fx.opened[0].0;
    n.core.ping_received(n.now, flow, "203.0.113.1".parse().unwrap(), 2, 60, b"ping", &mut n.fx);
    let got = read(&n.fx.frames[0]);
    assert_eq!((got.icmp(), got.p.src_port, be16(got.l4(), 6)), ((icmp::ECHO_REPLY, 0), 77, 2));
    assert_eq!((got.p.ttl, got.payload(), n.fx.frames[0].port), (59, &b"ping"[..], A));
    n.dropped(DropReason::Filtered, |n| {
        n.core.ping_received(n.now, flow, "203.0.113.9".parse().unwrap(), 2, 60, b"ping", &mut n.fx)
    });
    // Traceroute with echo: the error quotes identifier and sequence number.
    n.fx.frames.clear();
    let e = DatagramError {
        offender: Some("198.51.100.7".parse().unwrap()),
        icmp_type: icmp::TIME_EXCEEDED,
        seq: 2,
        ..error(SockError::HostUnreachable, "203.0.113.1:0")
    };
    n.core.sock_error(n.now, flow, e, &mut n.fx);
    let got = read(&n.fx.frames[0]);
    let q = parse::parse_ip(got.payload(), 0).unwrap();
    assert_eq!((got.icmp(), q.src_port, be16(got.payload(), 26)), ((icmp::TIME_EXCEEDED, 0), 77, 2));
    assert!(parse::verify_l4(got.payload(), &q));
    // REQ-2: at least 60 s.
    n.pass_ms(59_000);
    n.fx.frames.clear();
    n.core.ping_received(n.now, flow, "203.0.113.1".parse().unwrap(), 2, 60, b"ping", &mut n.fx);
    assert_eq!(n.fx.frames.len(), 1);
    n.pass_ms(62_000);
    assert_eq!((n.core.flows().count(), n.fx.closed.len()), (0, 2));
}

#[test]
fn errors_of_a_guest_are_checked_and_taken() {
    let mut n = Net::new();
    n.udp(A, 4000, X1, b"x");
    let quoted = |src: &str, dst: [u8; 4], to: u16| {
        let h = Ip4 { src: ip(src), dst: dst.into(), ..Ip4::new(A, "1.1.1.1".parse().unwrap(), proto::UDP) };
        udp_from(&h, 7, to, b"reply")[14..].to_vec()
    };
    let error = |quote: &[u8]| {
        let mut b = vec![0; 8 + quote.len()];
        icmp::emit(&mut b, icmp::UNREACHABLE, 3, [0; 4], quote);
        Ip4::new(A, "203.0.113.1".parse().unwrap(), proto::ICMP).frame(&b)
    };
    let good = quoted("203.0.113.1", guest_ip(A).octets(), 4000);
    n.send(A, error(&good));
    assert_eq!(n.all_drops(), 0);
    n.dropped(DropReason::NoFlow, |n| n.send(A, error(&quoted("203.0.113.2", guest_ip(A).octets(), 4000))));
    let of_another = quoted("203.0.113.1", guest_ip(B).octets(), 4000);
    n.dropped(DropReason::SpoofedSource, |n| n.send(A, error(&of_another)));
    n.dropped(DropReason::Truncated, |n| n.send(A, error(&good[..27])));
    let mut bad = good.clone();
    bad[8] ^= 1;
    n.dropped(DropReason::BadIpChecksum, |n| n.send(A, error(&bad)));
    n.dropped(DropReason::Malformed, |n| n.send(A, error(&[])));
}

fn forward(n: &mut Net, proto: u8, port: PortId) {
    n.core.add_forward(ForwardId(1), ForwardSpec::published(proto, guest_addr(port, 80)));
}

fn client(n: &mut Net, from: &str, payload: &[u8]) {
    let (sock, now) = (SockId(900), n.now);
    n.core.udp_forward_received(now, ForwardId(1), sock, addr(from), payload, 0, &mut n.fx);
}

#[test]
fn published_udp_keeps_the_clients_address() {
    let mut n = Net::new();
    forward(&mut n, proto::UDP, A);
    for (from, seen) in [
        ("203.0.113.9:5000", "203.0.113.9:5000"),
        ("127.0.0.1:5000", "192.168.64.1:5000"),
        ("192.168.64.12:5001", "192.168.64.1:5001"),
        ("[::ffff:203.0.113.9]:5002", "203.0.113.9:5002"),
    ] {
        n.fx.frames.clear();
        n.fx.datagrams.clear();
        client(&mut n, from, b"hi");
        let got = read(&n.fx.frames[0]);
        assert_eq!((got.src(), got.dst(), got.payload()), (addr(seen), guest_addr(A, 80), &b"hi"[..]));
        n.udp(A, 80, seen, b"yo");
        let d = &n.fx.datagrams[0];
        assert_eq!((d.sock, d.dst, d.via_forward, &*d.payload), (SockId(900), addr(from), true, &b"yo"[..]));
    }
    assert_eq!(n.core.flows().filter(|f| f.inbound).count(), 4);
    // Two clients that the guest would know by one name get two ports.
    n.fx.frames.clear();
    client(&mut n, "127.0.0.2:5000", b"hi");
    let got = read(&n.fx.frames[0]);
    assert_eq!(got.src().ip().to_string(), GATEWAY);
    assert_ne!(got.src().port(), 5000);
    n.udp(A, 80, &got.src().to_string(), b"yo");
    assert_eq!(n.fx.datagrams.last().unwrap().dst, addr("127.0.0.2:5000"));
    // The forward goes, and its flows with it: their socket does too.
    n.core.remove_forward(n.now, ForwardId(1), &mut n.fx);
    assert_eq!(n.core.flows().count(), 0);
    n.dropped(DropReason::NoFlow, |n| client(n, "203.0.113.9:5000", b"hi"));
}

#[test]
fn a_guest_is_asked_for_its_mac_while_clients_wait() {
    let mut n = Net::new();
    let c = PortId(3);
    n.core.add_port(c, port_config()).unwrap();
    n.core.bind_address(c, IpAddr::V4(guest_ip(c)), None).unwrap();
    n.core.add_forward(ForwardId(1), ForwardSpec::published(proto::UDP, guest_addr(c, 80)));
    n.core.add_forward(ForwardId(2), ForwardSpec::published(proto::TCP, guest_addr(c, 80)));
    client(&mut n, "203.0.113.9:5000", b"one");
    client(&mut n, "203.0.113.9:5000", b"two");
    let sock = n.fx.new_sock();
    let peer = addr("203.0.113.9:6000");
    assert!(n.core.tcp_accepted(n.now, ForwardId(2), sock, peer, &mut n.fx).is_some());
    let asked = n.fx.take();
    assert_eq!((asked.len(), asked[0].port), (1, c), "one question, on the guest's port alone");
    let a = arp::Arp::parse(&asked[0].frame[14..]).unwrap();
    assert_eq!((a.op, a.spa.to_string().as_str(), a.tpa), (arp::REQUEST, GATEWAY, guest_ip(c)));
    n.send(c, arp_frame(arp::REPLY, mac(c), guest_ip(c), GATEWAY_MAC, ip(GATEWAY)));
    let got: Vec<(u8, Vec<u8>)> =
        n.fx.take().iter().map(read).map(|g| (g.p.proto, g.payload().to_vec())).collect();
    assert_eq!(got.len(), 3, "{got:?}");
    assert!(got.contains(&(proto::UDP, b"one".to_vec())) && got.contains(&(proto::UDP, b"two".to_vec())));
    assert!(got.iter().any(|g| g.0 == proto::TCP));
    client(&mut n, "203.0.113.9:5000", b"three");
    assert_eq!(read(&n.fx.frames[0]).payload(), b"three");
}

#[test]
fn a_guest_that_does_not_answer_is_given_up() {
    let mut n = Net::new();
    let c = PortId(3);
    n.core.add_port(c, port_config()).unwrap();
    n.core.bind_address(c, IpAddr::V4(guest_ip(c)), None).unwrap();
    n.core.add_forward(ForwardId(2), ForwardSpec::published(proto::TCP, guest_addr(c, 80)));
    let sock = n.fx.new_sock();
    let peer = addr("203.0.113.9:6000");
    n.core.tcp_accepted(n.now, ForwardId(2), sock, peer, &mut n.fx).unwrap();
    n.pass_ms(5_000);
    assert_eq!((n.fx.closed.len(), n.core.flows().count()), (1, 0));
    let asked = n.fx.frames.iter().filter(|f| f.frame[..6] == Mac::BROADCAST.0 && f.frame[12..14] == [8, 6]);
    assert_eq!(asked.count(), 3);
    assert_eq!(n.core.next_timer(), None);
    // An address that nobody has.
    n.core.add_forward(ForwardId(3), ForwardSpec::published(proto::TCP, addr("192.168.64.99:80")));
    n.dropped(DropReason::NoEndpoint, |n| {
        let sock = n.fx.new_sock();
        assert_eq!(n.core.tcp_accepted(n.now, ForwardId(3), sock, peer, &mut n.fx), None);
    });
}

#[test]
fn published_tcp_opens_towards_the_guest() {
    let mut n = Net::new();
    forward(&mut n, proto::TCP, A);
    let mut seen = Vec::new();
    for from in ["203.0.113.9:6000", "127.0.0.1:6000", "127.0.0.2:6000"] {
        let sock = n.fx.new_sock();
        let id = n.core.tcp_accepted(n.now, ForwardId(1), sock, addr(from), &mut n.fx);
        assert!(id.is_some());
        let got = read(n.fx.frames.last().unwrap());
        assert_eq!((got.dst(), got.l4()[13]), (guest_addr(A, 80), guestnet_wire::tcp::flags::SYN));
        seen.push(got.src());
    }
    assert_eq!(seen[..2], [addr("203.0.113.9:6000"), addr("192.168.64.1:6000")]);
    assert!(seen[2].ip() == seen[1].ip() && seen[2] != seen[1]);
    // The guest refuses: the client's socket is reset.
    let h = Ip4::new(A, seen[1].ip(), proto::TCP);
    let syn = guestnet_wire::tcp::Tcp::parse(read(&n.fx.frames[1]).l4()).unwrap();
    let rst = guestnet_wire::tcp::Tcp {
        src_port: 80,
        dst_port: 6000,
        ack: syn.seq.wrapping_add(1),
        flags: 0x14,
        ..Default::default()
    };
    n.send(A, tcp_frame(&h, &rst, &[]));
    assert_eq!((n.fx.closed.len(), n.core.flows().count()), (1, 2));
    // Removing the forward leaves running flows alone.
    n.core.remove_forward(n.now, ForwardId(1), &mut n.fx);
    assert_eq!(n.core.flows().count(), 2);
}

#[test]
fn tcp_that_cannot_connect_is_told_why() {
    let mut n = Net::new();
    for (error, want) in [
        (SockError::Refused, None),
        (SockError::HostUnreachable, Some(icmp::unreachable::HOST)),
        (SockError::NetUnreachable, Some(icmp::unreachable::NET)),
        (SockError::Prohibited, Some(icmp::unreachable::ADMIN_PROHIBITED)),
    ] {
        for at_once in [false, true] {
            n.fx.frames.clear();
            if at_once {
                n.fx.open_error = Some(error);
                n.dropped(DropReason::HostError, |n| n.send(A, syn(A, 4000, "203.0.113.1:80")));
            } else {
                n.send(A, syn(A, 4000, "203.0.113.1:80"));
                assert!(n.fx.frames.is_empty(), "no answer before the host has one");
                let flow = n.fx.connects.last().unwrap().0;
                n.core.tcp_connected(n.now, flow, Err(error), &mut n.fx);
            }
            let got = read(&n.fx.frames[0]);
            match want {
                None => assert_eq!((got.p.proto, got.l4()[13]), (proto::TCP, 0x14)),
                Some(code) => {
                    assert_eq!(got.icmp(), (icmp::UNREACHABLE, code));
                    let q = parse::parse_ip(got.payload(), 0).unwrap();
                    assert_eq!((q.src_port, q.dst_port), (4000, 80));
                    assert_eq!(guestnet_wire::be32(got.payload(), 24), 1000, "the SYN's sequence number");
                }
            }
            assert_eq!(n.core.flows().count(), 0);
        }
    }
    n.core.tcp_connected(n.now, FlowId { index: 0, generation: 0 }, Ok(()), &mut n.fx);
}

#[test]
fn segments_of_no_flow_are_reset() {
    let mut n = Net::new();
    let h = Ip4::new(A, "203.0.113.1".parse().unwrap(), proto::TCP);
    let seg = |flags: u8| guestnet_wire::tcp::Tcp {
        src_port: 4000,
        dst_port: 80,
        seq: 5,
        ack: 77,
        flags,
        ..Default::default()
    };
    let mut out = Vec::new();
    n.dropped(DropReason::NoFlow, |n| out = n.ask(A, tcp_frame(&h, &seg(0x10), b"data")));
    let got = read(&out[0]);
    let rst = guestnet_wire::tcp::Tcp::parse(got.l4()).unwrap();
    assert_eq!((rst.flags, rst.seq), (4, 77));
    n.dropped(DropReason::NoFlow, |n| out = n.ask(A, tcp_frame(&h, &seg(0x14), b"")));
    assert!(out.is_empty(), "a reset is not answered");
}

/// Each guest has its own rate of ARP requests: one that answers none takes them from nobody.
#[test]
fn a_guest_that_answers_no_arp_leaves_requests_to_others() {
    let mut n = Net::with_limits(|l| l.neighbour_waiting = 100_000);
    n.core.add_port(PortId(3), port_config()).unwrap();
    n.core.add_port(PortId(4), port_config()).unwrap();
    let mut callers = 0u16;
    let mut call = |n: &mut Net, id: u32, host: u8| {
        let address = format!("192.168.64.{host}");
        n.core.bind_address(PortId(id), address.parse().unwrap(), None).unwrap();
        let forward = ForwardId(u32::from(host));
        let guest = addr(&format!("{address}:80"));
        n.core.add_forward(forward, ForwardSpec::published(proto::TCP, guest));
        callers += 1;
        let (sock, peer) = (n.fx.new_sock(), addr(&format!("203.0.113.9:{}", 1000 + callers)));
        n.core.tcp_accepted(n.now, forward, sock, peer, &mut n.fx);
    };
    n.fx.frames.clear();
    for host in 100..250 {
        call(&mut n, 3, host);
    }
    assert_eq!(n.fx.take().len(), 100);
    call(&mut n, 4, 99);
    assert_eq!(n.fx.take().iter().map(|f| f.port).collect::<Vec<_>>(), [PortId(4)]);
}

/// A guest that answers no ARP, and whoever calls it, leave room for the callers of others.
#[test]
fn what_waits_for_one_guest_leaves_room_for_another() {
    let mut n = Net::with_limits(|l| l.neighbour_waiting = 40);
    let now = n.now;
    for id in [3, 4] {
        let address = format!("192.168.64.9{id}");
        n.core.add_port(PortId(id), port_config()).unwrap();
        n.core.bind_address(PortId(id), address.parse().unwrap(), None).unwrap();
        let guest = addr(&format!("{address}:80"));
        n.core.add_forward(ForwardId(id), ForwardSpec::published(proto::TCP, guest));
    }
    let mut call = |forward: u32, port: u16| {
        let (sock, peer) = (n.fx.new_sock(), addr(&format!("203.0.113.9:{port}")));
        n.core.tcp_accepted(now, ForwardId(forward), sock, peer, &mut n.fx).is_some()
    };
    assert_eq!((0..100).filter(|i| call(3, 1000 + i)).count(), 10);
    assert!(call(4, 2000));
}

/// Many such guests together leave some room too.
#[test]
fn what_waits_for_many_guests_leaves_room_for_one_more() {
    let mut n = Net::with_limits(|l| l.neighbour_waiting = 400);
    let now = n.now;
    for id in 3..10 {
        let address = format!("192.168.64.{}", 90 + id);
        n.core.add_port(PortId(id), port_config()).unwrap();
        n.core.bind_address(PortId(id), address.parse().unwrap(), None).unwrap();
        let guest = addr(&format!("{address}:80"));
        n.core.add_forward(ForwardId(id), ForwardSpec::published(proto::TCP, guest));
    }
    let mut call = |id: u32, port: u16| {
        let (sock, peer) = (n.fx.new_sock(), addr(&format!("203.0.113.9:{port}")));
        n.core.tcp_accepted(now, ForwardId(id), sock, peer, &mut n.fx).is_some()
    };
    let waiting: Vec<_> = (3..9).map(|id| (0..400).filter(|i| call(id, 1000 + i)).count()).collect();
    assert_eq!(waiting, [100, 100, 100, 50, 25, 13]);
    assert!(call(9, 2000));
}

/// What is given up to make room is counted where it was: with whoever held most.
#[test]
fn reassembly_that_is_given_up_is_counted_at_its_guest() {
    let mut n = Net::with_limits(|l| l.reassembly_bytes = 20_000);
    let piece = |from: PortId, id: u16| {
        let h = Ip4 { id, frag: 0x2000, ..Ip4::new(from, "203.0.113.1".parse().unwrap(), proto::UDP) };
        h.frame(&[0; 1480])
    };
    for id in 0..12 {
        n.send(A, piece(A, id));
    }
    let lost = |n: &Net, port| n.core.port_counters(port).unwrap().drops[DropReason::Reassembly as usize];
    assert_eq!((lost(&n, A), lost(&n, B)), (0, 0));
    for id in 0..4 {
        n.send(B, piece(B, id));
    }
    assert_eq!((lost(&n, A), lost(&n, B)), (4, 0));
    assert!(n.core.reassembly_bytes() <= 20_000);
    let now = n.now;
    for port in [A, B] {
        n.core.remove_port(now, port, &mut n.fx);
    }
    assert_eq!(n.core.reassembly_bytes(), 0);
}
