//! Theory of operation: the uplink of packets with a simulated outside and a virtual clock. Every packet that
//! leaves is read as a router outside would read it, begun checksums completed first; what begins and ends is
//! counted at the guest's port, and the core's books are audited.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/net.rs"]
mod net;

use guestnet_core::config::ForwardSpec;
use guestnet_core::effects::Event;
use guestnet_core::nat::{ForwardError, NatEngineConfig};
use guestnet_core::policy::{Entry, Isolated};
use guestnet_core::stats::DropReason;
use guestnet_core::types::{Csum, ForwardId, FrameMeta, Gso, NetMode, PortConfig, PortId};
use guestnet_wire::tcp::{Tcp, flags};
use guestnet_wire::{gso, icmp, parse, proto};
use net::*;
use std::net::{IpAddr, SocketAddr, SocketAddrV4};

const OUT: &str = "198.51.100.9";
const SERVER: &str = "203.0.113.1:7";

fn uplink() -> NatEngineConfig {
    NatEngineConfig {
        ports: (1, 65535),
        mtu_outside: 1500,
        mtu_inside: 1500,
        ..NatEngineConfig::new(ip(OUT))
    }
}

fn tunnel() -> Net {
    tunnel_with(uplink())
}

fn tunnel_with(config: NatEngineConfig) -> Net {
    let mut n = Net::new();
    n.core.set_uplink(config).unwrap();
    n
}

/// Reads what left, as the next router would.
#[track_caller]
fn left(n: &mut Net) -> Vec<(Got, FrameMeta)> {
    let packets = std::mem::take(&mut n.fx.uplink);
    packets.into_iter().map(|(frame, meta)| (outside(frame, meta), meta)).collect()
}

#[track_caller]
fn outside(mut frame: Vec<u8>, meta: FrameMeta) -> Got {
    if let (Csum::Partial { start, offset }, None) = (meta.csum, meta.gso) {
        gso::complete_checksum(&mut frame, start, offset).unwrap();
    }
    let p = parse::parse_ip(&frame, 14).unwrap();
    assert!(parse::verify_ipv4_header(&frame, &p), "IPv4 checksum");
    if meta.gso.is_none() && p.fragment.is_none() {
        assert!(parse::verify_l4(&frame, &p), "transport checksum");
    }
    Got { p, frame }
}

fn one<T>(mut v: Vec<T>) -> T {
    assert_eq!(v.len(), 1);
    v.pop().unwrap()
}

fn arrive(n: &mut Net, frame: Vec<u8>) {
    arrive_meta(n, frame, FrameMeta::default());
}

fn arrive_meta(n: &mut Net, mut frame: Vec<u8>, meta: FrameMeta) {
    n.core.uplink_packet(n.now, &mut frame, meta, &mut n.fx);
    n.core.batch_end(n.now, &mut n.fx);
    n.core.audit().unwrap();
}

fn v4(a: SocketAddr) -> std::net::Ipv4Addr {
    match a.ip() {
        IpAddr::V4(a) => a,
        IpAddr::V6(_) => panic!("IPv4 only"),
    }
}

fn header(from: SocketAddr, to: SocketAddr, protocol: u8) -> Ip4 {
    Ip4 { src: v4(from), ..Ip4::new(A, to.ip(), protocol) }
}

fn udp(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    udp_from(&header(from, to, proto::UDP), from.port(), to.port(), payload)
}

fn tcp(from: SocketAddr, to: SocketAddr, flags: u8, payload: &[u8]) -> Vec<u8> {
    let seg =
        Tcp { src_port: from.port(), dst_port: to.port(), seq: 7, flags, window: 900, ..Tcp::default() };
    tcp_frame(&header(from, to, proto::TCP), &seg, payload)
}

fn opened(n: &Net) -> usize {
    n.events(|e| matches!(e, Event::FlowOpened { .. }))
}

fn closed(n: &Net) -> usize {
    n.events(|e| matches!(e, Event::FlowClosed { .. }))
}

#[test]
fn udp_leaves_translated_and_its_answer_comes_to_the_guest() {
    let mut n = tunnel();
    n.udp(A, 4000, SERVER, b"hello");
    let (got, _) = one(left(&mut n));
    assert_eq!((got.src(), got.dst()), (addr("198.51.100.9:4000"), addr(SERVER)));
    assert_eq!((got.payload(), got.p.ttl), (&b"hello"[..], 63));
    assert!(n.fx.opened.is_empty(), "no socket");
    arrive(&mut n, udp(addr(SERVER), got.src(), b"world"));
    let got = read(&one(n.fx.take()));
    assert_eq!((got.src(), got.dst(), got.payload()), (addr(SERVER), guest_addr(A, 4000), &b"world"[..]));
    assert_eq!(n.all_drops(), 0);
}

#[test]
fn flows_are_told_listed_counted_and_end() {
    let mut n = tunnel();
    n.udp(A, 4000, SERVER, b"hello");
    n.udp(B, 4000, SERVER, b"hello");
    let [a, b] = [left(&mut n)].concat_two();
    assert_ne!(a, b, "one external end each");
    let flows: Vec<_> = n.core.flows().collect();
    assert_eq!((flows.len(), flows[0].proto, flows[0].state), (2, proto::UDP, "udp"));
    assert_eq!((flows[0].guest, flows[0].remote), (guest_addr(A, 4000), addr(SERVER)));
    assert_eq!((opened(&n), closed(&n)), (2, 0));
    let flow = flows[0].flow;
    n.pass_ms(301_000);
    assert_eq!((opened(&n), closed(&n), n.core.flows().count()), (2, 2, 0));
    assert!(n.fx.events.iter().any(
        |e| matches!(e, Event::FlowClosed { flow: f, port: A, bytes_out: 33, bytes_in: 0, .. } if *f == flow)
    ));
    let c = n.core.counters();
    assert_eq!((c.flows_opened, c.flows_closed), (2, 2));
    n.core.audit().unwrap();
}

trait ConcatTwo {
    fn concat_two(self) -> [SocketAddr; 2];
}

impl ConcatTwo for [Vec<(Got, FrameMeta)>; 1] {
    fn concat_two(self) -> [SocketAddr; 2] {
        let [v] = self;
        assert_eq!(v.len(), 2);
        [v[0].0.src(), v[1].0.src()]
    }
}

#[test]
fn a_guest_that_leaves_takes_its_flows_along() {
    let mut n = tunnel();
    n.udp(A, 4000, SERVER, b"x");
    n.udp(A, 4001, SERVER, b"x");
    n.udp(B, 4002, SERVER, b"x");
    n.core.remove_port(n.now, A, &mut n.fx);
    n.core.audit().unwrap();
    assert_eq!((closed(&n), n.core.flows().count()), (2, 1));
    n.fx.frames.clear();
    n.dropped(DropReason::NoFlow, |n| arrive(n, udp(addr(SERVER), addr("198.51.100.9:4000"), b"late")));
    assert!(n.fx.frames.is_empty());
}

#[test]
fn who_gets_an_address_next_gets_nothing_of_its_last_owner() {
    let mut n = tunnel();
    n.udp(A, 4000, SERVER, b"x");
    let (got, _) = one(left(&mut n));
    n.core.unbind_address(n.now, IpAddr::V4(guest_ip(A)), &mut n.fx);
    n.core.bind_address(B, IpAddr::V4(guest_ip(A)), None).unwrap();
    n.fx.frames.clear();
    n.pass_ms(1);
    arrive(&mut n, udp(addr(SERVER), got.src(), b"for A"));
    assert!(n.fx.take().is_empty());
    assert_eq!(closed(&n), 1);
}

#[test]
fn a_begun_checksum_is_begun_anew_both_ways() {
    let mut n = tunnel();
    let begun = |frame: &mut Vec<u8>, offset: u16| {
        let p = parse::parse_ip(frame, 14).unwrap();
        let len = (p.end - p.l4) as u32;
        let sum = guestnet_wire::checksum::fold(guestnet_wire::checksum::pseudo(p.src, p.dst, p.proto, len));
        let at = 34 + usize::from(offset);
        frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        FrameMeta { csum: Csum::Partial { start: 34, offset }, gso: None }
    };
    let mut frame = udp_frame(A, 4000, addr(SERVER), b"partial");
    let meta = begun(&mut frame, 6);
    n.send_meta(A, frame, meta);
    let (got, sent) = one(left(&mut n));
    assert_eq!((sent, got.payload()), (meta, &b"partial"[..]));
    let mut back = udp(addr(SERVER), got.src(), b"back");
    let meta = begun(&mut back, 6);
    arrive_meta(&mut n, back, meta);
    let sent = one(n.fx.take());
    assert_eq!(sent.meta, meta);
    assert_eq!(read(&sent).dst(), guest_addr(A, 4000));
    // TCP, and a frame that stands for several: whole.
    let mut frame = tcp(guest_addr(A, 5000), addr(SERVER), flags::ACK, &[7; 9000]);
    let csum = begun(&mut frame, 16).csum;
    let large = FrameMeta { csum, gso: Some(Gso::Tcp(1448)) };
    n.send_meta(A, frame, large);
    let (frame, meta) = one(std::mem::take(&mut n.fx.uplink));
    assert_eq!(meta, large);
    let mut pieces = 0;
    gso::segment(&frame, Gso::Tcp(1448), |h, piece| {
        outside([h, piece].concat(), FrameMeta::default());
        pieces += 1;
    })
    .unwrap();
    assert_eq!(pieces, 7);
    // The begun sum of the whole is right too: completed without cutting it verifies.
    outside(frame, FrameMeta { csum, gso: None });
    assert_eq!(n.all_drops(), 0);
}

#[test]
fn begun_and_too_big_for_the_uplink_leaves_in_fragments_with_a_whole_checksum() {
    let mut n = tunnel_with(NatEngineConfig { mtu_outside: 1000, ..uplink() });
    let mut frame = udp_frame(A, 4000, addr(SERVER), &[9; 1400]);
    let p = parse::parse_ip(&frame, 14).unwrap();
    let sum = guestnet_wire::checksum::pseudo(p.src, p.dst, p.proto, (p.end - p.l4) as u32);
    frame[40..42].copy_from_slice(&guestnet_wire::checksum::fold(sum).to_be_bytes());
    n.send_meta(A, frame, FrameMeta { csum: Csum::Partial { start: 34, offset: 6 }, gso: None });
    let pieces = left(&mut n);
    assert_eq!(pieces.len(), 2);
    let mut whole = pieces[0].0.frame[..pieces[0].0.p.end].to_vec();
    whole.extend_from_slice(&pieces[1].0.frame[pieces[1].0.p.l4..pieces[1].0.p.end]);
    let len = (whole.len() - 14) as u16;
    whole[16..18].copy_from_slice(&len.to_be_bytes());
    whole[20..22].copy_from_slice(&[0, 0]);
    guestnet_wire::ipv4::fill_checksum(&mut whole[14..]);
    assert_eq!(outside(whole, FrameMeta::default()).payload(), [9; 1400]);
}

#[test]
fn too_big_and_not_to_be_cut_is_told_by_the_gateway() {
    let mut n = tunnel_with(NatEngineConfig { mtu_outside: 1000, ..uplink() });
    let mut frame = udp_frame(A, 4000, addr(SERVER), &[9; 1400]);
    frame[20] |= 0x40;
    guestnet_wire::ipv4::fill_checksum(&mut frame[14..]);
    n.dropped(DropReason::Oversized, |n| n.send(A, frame));
    let got = read(&one(n.fx.take()));
    assert_eq!((got.icmp(), got.p.src), ((3, 4), IpAddr::V4(ip(GATEWAY))));
    assert_eq!(guestnet_wire::be16(got.l4(), 6), 1000);
    assert_eq!(n.core.flows().count(), 0, "it opened nothing");
}

#[test]
fn ttl_runs_out_at_the_gateway_and_errors_from_outside_find_their_guest() {
    let mut n = tunnel();
    n.dropped(DropReason::TtlExpired, |n| n.send(A, echo_frame(A, "203.0.113.1", 5, 1, 1, b"x")));
    let got = read(&one(n.fx.take()));
    assert_eq!((got.icmp(), got.p.src), ((icmp::TIME_EXCEEDED, 0), IpAddr::V4(ip(GATEWAY))));
    n.send(A, echo_frame(A, "203.0.113.1", 5, 2, 2, b"x"));
    let (out, _) = one(left(&mut n));
    assert_eq!((out.p.ttl, out.p.src), (1, IpAddr::V4(ip(OUT))));
    // A router on the way answers, quoting the packet as it was outside.
    let router = header(addr("192.0.2.77:0"), SocketAddr::new(IpAddr::V4(ip(OUT)), 0), proto::ICMP);
    let quote = &out.frame[14..out.p.end];
    let mut b = vec![0; 8 + quote.len()];
    icmp::emit(&mut b, icmp::TIME_EXCEEDED, 0, [0; 4], quote);
    arrive(&mut n, router.frame(&b));
    let got = read(&one(n.fx.take()));
    assert_eq!((got.icmp(), got.p.src), ((icmp::TIME_EXCEEDED, 0), "192.0.2.77".parse::<IpAddr>().unwrap()));
    let quoted = parse::parse_ip(&got.l4()[8..], 0).unwrap();
    assert_eq!((quoted.src, quoted.src_port), (IpAddr::V4(guest_ip(A)), 5));
}

#[test]
fn policy_and_modes_hold() {
    let mut n = tunnel();
    for bad in ["169.254.169.254:80", "240.0.0.1:1", "0.1.2.3:9", "168.63.129.16:80", "100.100.100.200:80"] {
        n.dropped(DropReason::BadDestination, |n| n.udp(A, 4000, bad, b"x"));
    }
    let mut c = config();
    c.mode = NetMode::HostOnly;
    let mut closed = Net::with(c);
    closed.core.set_uplink(uplink()).unwrap();
    closed.dropped(DropReason::Policy, |n| n.udp(A, 4000, SERVER, b"x"));
    assert_eq!(closed.events(|e| matches!(e, Event::FlowDenied(d) if d.reason == DropReason::Policy)), 1);
    assert!(n.fx.uplink.is_empty() && closed.fx.uplink.is_empty());
    // The gateway and guests answer as ever.
    let got = read(&one(n.ask(A, echo_frame(A, GATEWAY, 1, 1, 1, b"x"))));
    assert_eq!(got.icmp(), (icmp::ECHO_REPLY, 0));
}

/// Puts other rules in force; how many connections that has cut.
fn change(n: &mut Net, mode: NetMode) -> u64 {
    assert!(n.core.set_policy(n.now, mode, Isolated::Nobody));
    n.pass_ms(0);
    n.core.audit().unwrap();
    n.core.take_flows_cut().expect("all connections have been judged again")
}

#[test]
fn a_connection_that_a_change_of_the_rules_cuts_is_reset_at_both_ends() {
    let mut n = tunnel();
    let server = addr(SERVER);
    n.send(A, syn(A, 4000, SERVER));
    n.udp(A, 4001, SERVER, b"x");
    let external = left(&mut n)[0].0.src();
    arrive(&mut n, tcp(server, external, flags::SYN | flags::ACK, b""));
    n.fx.frames.clear();
    n.fx.events.clear();
    assert_eq!(change(&mut n, NetMode::HostOnly), 2);
    assert_eq!((closed(&n), n.core.flows().count()), (2, 0));
    // Both ends get an ACK that they answer with one of their own.
    let (to_guest, to_server) = (read(&one(n.fx.take())), one(left(&mut n)).0);
    assert_eq!((to_guest.src(), to_guest.dst()), (server, guest_addr(A, 4000)));
    assert_eq!((to_server.src(), to_server.dst()), (external, server));
    for probe in [&to_guest, &to_server] {
        assert_eq!(Tcp::parse(probe.l4()).unwrap().flags, flags::ACK);
    }
    // And that is reset.
    n.segment(A, 4000, SERVER, 1001, 0x1111, flags::ACK);
    let rst = read(&one(n.fx.take()));
    assert_eq!(Tcp::parse(rst.l4()).map(|t| (t.flags, t.seq)), Ok((flags::RST, 0x1111)));
    assert!(left(&mut n).is_empty());
    let answer = Tcp { src_port: server.port(), dst_port: external.port(), ack: 0x2222, ..Tcp::default() };
    let h = header(server, external, proto::TCP);
    arrive(&mut n, tcp_frame(&h, &Tcp { flags: flags::ACK, ..answer }, &[]));
    let rst = one(left(&mut n)).0;
    assert_eq!((rst.src(), rst.dst()), (external, server));
    assert_eq!(Tcp::parse(rst.l4()).map(|t| (t.flags, t.seq)), Ok((flags::RST, 0x2222)));
    // Others are told nothing, as ever.
    arrive(&mut n, tcp_frame(&header(addr("203.0.113.77:1"), external, proto::TCP), &answer, &[]));
    assert!(left(&mut n).is_empty() && n.fx.take().is_empty());
    let denied = n.events(|e| matches!(e, Event::FlowDenied(d) if d.rule.as_deref() == Some("host_only")));
    assert_eq!(denied, 3, "two that were cut, and the guest's segment");
    assert_eq!(change(&mut n, NetMode::Nat), 0);
    n.udp(A, 4001, SERVER, b"y");
    assert_eq!(left(&mut n).len(), 1);
}

#[test]
fn host_only_closes_ports_of_guests_and_keeps_published_ones() {
    let mut n = tunnel();
    for (id, external, entry) in [(1, 8080, Entry::Published), (2, 8081, Entry::GuestPort)] {
        let spec = ForwardSpec { entry, ..ForwardSpec::published(proto::TCP, guest_addr(A, external)) };
        n.core.add_uplink_forward(ForwardId(id), SocketAddrV4::new(ip(OUT), external), spec).unwrap();
    }
    let knock = |n: &mut Net, client: u16| {
        [8080, 8081].map(|port| {
            n.fx.frames.clear();
            let from = addr(&format!("203.0.113.5:{client}"));
            arrive(n, tcp(from, addr(&format!("{OUT}:{port}")), flags::SYN, b""));
            n.fx.take().len()
        })
    };
    assert_eq!(knock(&mut n, 1), [1, 1]);
    assert_eq!(change(&mut n, NetMode::HostOnly), 1);
    assert_eq!(n.core.flows().map(|f| f.guest.port()).collect::<Vec<_>>(), [8080]);
    n.dropped(DropReason::Policy, |n| assert_eq!(knock(n, 2), [1, 0]));
}

#[test]
fn nobody_outside_speaks_for_a_guest_or_reaches_one_unasked() {
    let mut n = tunnel();
    n.udp(A, 4000, SERVER, b"x");
    let mapped = one(left(&mut n)).0.src();
    for from in [guest_addr(B, 7), addr("192.168.64.1:7"), addr("127.0.0.1:7"), addr("224.0.0.1:7")] {
        n.dropped(DropReason::SpoofedSource, |n| arrive(n, udp(from, mapped, b"x")));
    }
    n.dropped(DropReason::Filtered, |n| arrive(n, udp(addr("203.0.113.99:7"), mapped, b"x")));
    n.dropped(DropReason::NoFlow, |n| arrive(n, udp(addr(SERVER), addr("198.51.100.9:4999"), b"x")));
    n.dropped(DropReason::BadDestination, |n| arrive(n, udp(addr(SERVER), guest_addr(A, 4000), b"x")));
    assert!(n.fx.frames.is_empty());
}

#[test]
fn caps_are_the_guests_own_and_are_told() {
    let mut n = tunnel_with(NatEngineConfig { sessions_per_endpoint: 3, ..uplink() });
    for port in 4000..4003 {
        n.udp(A, port, SERVER, b"x");
    }
    n.dropped(DropReason::FlowLimit, |n| n.udp(A, 4003, SERVER, b"x"));
    assert_eq!(read(&one(n.fx.take())).icmp(), (3, 13));
    assert_eq!(n.events(|e| matches!(e, Event::FlowDenied(d) if d.reason == DropReason::FlowLimit)), 1);
    n.udp(B, 4000, SERVER, b"x");
    assert_eq!(n.core.flows().count(), 4);
}

/// Neither ports nor connections are first come, first served.
#[test]
fn one_guest_leaves_ports_and_connections_to_others() {
    for (config, why) in [
        (NatEngineConfig { ports: (40000, 40999), ..uplink() }, DropReason::PortLimit),
        (NatEngineConfig { table_size: 1000, ..uplink() }, DropReason::FlowLimit),
    ] {
        let mut n = tunnel_with(config);
        let opened = |n: &mut Net, port: PortId| {
            let before = n.fx.uplink.len();
            (0..1000u16).for_each(|i| n.send(port, udp_frame(port, 2000 + i, addr(SERVER), b"x")));
            n.fx.uplink.len() - before
        };
        let (first, second) = (opened(&mut n, A), opened(&mut n, B));
        assert!((690..=710).contains(&first) && (130..=160).contains(&second), "{first} and {second}");
        assert_eq!(n.drops(why), 2000 - (first + second) as u64);
        let c = PortId(3);
        n.core.add_port(c, port_config()).unwrap();
        n.hello(c);
        assert!(opened(&mut n, c) >= 16);
    }
}

fn publish(n: &mut Net, external: u16, to: SocketAddr) -> Result<(), ForwardError> {
    let spec = ForwardSpec::published(proto::TCP, to);
    n.core.add_uplink_forward(ForwardId(1), SocketAddrV4::new(ip(OUT), external), spec)
}

#[test]
fn a_published_port_leads_to_its_guest_also_from_inside() {
    let mut n = tunnel();
    publish(&mut n, 8080, guest_addr(A, 80)).unwrap();
    let taken = n.core.add_uplink_forward(
        ForwardId(2),
        SocketAddrV4::new(ip(OUT), 8080),
        ForwardSpec::published(proto::TCP, guest_addr(B, 80)),
    );
    assert!(matches!(taken, Err(ForwardError::InUse(_))));
    let client = addr("203.0.113.5:40000");
    arrive(&mut n, tcp(client, addr("198.51.100.9:8080"), flags::SYN, b""));
    let got = read(&one(n.fx.take()));
    assert_eq!((got.src(), got.dst()), (client, guest_addr(A, 80)));
    assert_eq!(n.events(|e| matches!(e, Event::FlowOpened { inbound: true, .. })), 1);
    n.send(A, tcp(guest_addr(A, 80), client, flags::SYN | flags::ACK, b""));
    let (got, _) = one(left(&mut n));
    assert_eq!((got.src(), got.dst()), (addr("198.51.100.9:8080"), client));
    // Hairpin: the other guest by the external address.
    n.send(B, {
        let mut f = tcp(guest_addr(B, 555), addr("198.51.100.9:8080"), flags::SYN, b"");
        f[6..12].copy_from_slice(&mac(B).0);
        f
    });
    let got = read(&one(n.fx.take()));
    assert_eq!((got.src(), got.dst()), (addr("198.51.100.9:555"), guest_addr(A, 80)));
    assert!(n.fx.uplink.is_empty());
    // Taken back: nobody new.
    assert!(n.core.remove_uplink_forward(ForwardId(1)) && !n.core.remove_uplink_forward(ForwardId(1)));
    n.dropped(DropReason::Filtered, |n| {
        arrive(n, tcp(addr("203.0.113.6:1"), addr("198.51.100.9:8080"), flags::SYN, b""));
    });
}

/// What is turned round does not leave by the uplink, whose MTU says nothing of it.
#[test]
fn a_hairpinned_packet_has_the_mtu_inside() {
    for (outside, inside) in [(1500, 1400), (1400, 1500)] {
        let config = NatEngineConfig { mtu_outside: outside, mtu_inside: inside, ..uplink() };
        let mut n = tunnel_with(config);
        let external = SocketAddrV4::new(ip(OUT), 8080);
        let spec = ForwardSpec::published(proto::UDP, guest_addr(A, 80));
        n.core.add_uplink_forward(ForwardId(1), external, spec).unwrap();
        let h = Ip4 { frag: 0x4000, ..Ip4::new(B, IpAddr::V4(ip(OUT)), proto::UDP) };
        for meta in [FrameMeta::default(), FrameMeta { csum: Csum::Valid, gso: Some(Gso::Udp(1422)) }] {
            let len = if meta.gso.is_some() { 4000 } else { 1422 };
            n.fx.frames.clear();
            n.send_meta(B, udp_from(&h, 555, 8080, &vec![7; len]), meta);
            let sent = n.fx.take();
            if inside < 1450 {
                let got = read(&one(sent));
                assert_eq!((got.icmp(), guestnet_wire::be16(got.l4(), 6)), ((3, 4), inside));
            } else {
                let one = one(sent);
                assert_eq!((one.port, one.meta.gso), (A, meta.gso));
            }
        }
        assert!(n.fx.uplink.is_empty());
    }
}

#[test]
fn a_published_port_waits_for_its_guest() {
    let mut n = tunnel();
    publish(&mut n, 8080, addr("0.0.0.0:80")).unwrap();
    n.dropped(DropReason::NoEndpoint, |n| {
        arrive(n, tcp(addr("203.0.113.6:1"), addr("198.51.100.9:8080"), flags::SYN, b""));
    });
    assert_eq!(n.core.retarget_uplink_forward(ForwardId(1), guest_addr(B, 81)), Ok(true));
    arrive(&mut n, tcp(addr("203.0.113.6:2"), addr("198.51.100.9:8080"), flags::SYN, b""));
    assert_eq!(read(&one(n.fx.take())).dst(), guest_addr(B, 81));
    assert_eq!(n.core.retarget_uplink_forward(ForwardId(9), guest_addr(B, 81)), Ok(false));
}

/// RFC 9868 puts options behind the datagram, within the IP packet.
#[test]
fn bytes_behind_a_datagram_leave_and_arrive_with_it() {
    let mut n = tunnel();
    let with_surplus = |mut frame: Vec<u8>| {
        frame.extend_from_slice(b"surplus!");
        let total = (frame.len() - 14) as u16;
        frame[16..18].copy_from_slice(&total.to_be_bytes());
        guestnet_wire::ipv4::fill_checksum(&mut frame[14..]);
        frame
    };
    n.send(A, with_surplus(udp_frame(A, 2000, addr(SERVER), b"x")));
    let (got, _) = one(left(&mut n));
    assert!(got.frame.ends_with(b"surplus!"));
    let external = got.src();
    arrive(&mut n, with_surplus(udp(addr(SERVER), external, b"y")));
    assert!(read(&one(n.fx.take())).frame.ends_with(b"surplus!"));
}

#[test]
fn a_refused_change_of_a_published_port_changes_nothing() {
    let mut n = tunnel();
    publish(&mut n, 8080, guest_addr(A, 80)).unwrap();
    arrive(&mut n, tcp(addr("203.0.113.6:1"), addr("198.51.100.9:8080"), flags::SYN, b""));
    for target in ["10.9.9.9:80", "[fd00::2]:80", "192.168.127.2:0", "0.0.0.0:0"] {
        let target = addr(target);
        assert!(n.core.retarget_uplink_forward(ForwardId(1), target).is_err(), "{target}");
    }
    // The number has a port already, which would stay published for ever.
    assert_eq!(publish(&mut n, 8081, guest_addr(B, 80)), Err(ForwardError::Exists(1)));
    assert_eq!(n.core.nat_stats().unwrap().1.connections, 1);
    n.fx.frames.clear();
    arrive(&mut n, tcp(addr("203.0.113.6:2"), addr("198.51.100.9:8080"), flags::SYN, b""));
    assert_eq!(read(&one(n.fx.take())).dst(), guest_addr(A, 80));
    n.dropped(DropReason::NoFlow, |n| {
        arrive(n, tcp(addr("203.0.113.6:1"), addr("198.51.100.9:8081"), flags::SYN, b""));
    });
}

#[test]
fn a_guest_that_was_never_heard_is_asked_for_its_mac_first() {
    let mut n = tunnel();
    let quiet = PortId(3);
    let addresses = vec![IpAddr::V4(guest_ip(quiet))];
    n.core.add_port(quiet, PortConfig { addresses, ..port_config() }).unwrap();
    publish(&mut n, 8080, guest_addr(quiet, 80)).unwrap();
    arrive(&mut n, tcp(addr("203.0.113.5:40000"), addr("198.51.100.9:8080"), flags::SYN, b""));
    let asked = one(n.fx.take());
    assert_eq!(guestnet_wire::be16(&asked.frame, 12), guestnet_wire::ether::ARP);
    let me = guest_ip(quiet);
    n.send(quiet, arp_frame(guestnet_wire::arp::REPLY, mac(quiet), me, GATEWAY_MAC, ip(GATEWAY)));
    assert_eq!(read(&one(n.fx.take())).dst(), guest_addr(quiet, 80));
}

#[test]
fn ports_published_on_sockets_stay_relays() {
    let mut n = tunnel();
    n.core.add_forward(ForwardId(1), ForwardSpec::published(proto::TCP, guest_addr(A, 80)));
    let sock = n.fx.new_sock();
    let client = addr("203.0.113.5:40000");
    assert!(n.core.tcp_accepted(n.now, ForwardId(1), sock, client, &mut n.fx).is_some());
    let syn = read(&one(n.fx.take()));
    let mut answer = Tcp {
        src_port: 80,
        dst_port: 40000,
        seq: 1,
        ack: guestnet_wire::be32(syn.l4(), 4).wrapping_add(1),
        flags: flags::SYN | flags::ACK,
        window: 65535,
        ..Tcp::default()
    };
    n.send(A, tcp_frame(&header(guest_addr(A, 80), client, proto::TCP), &answer, &[]));
    assert!(n.fx.uplink.is_empty(), "the answer is the relay's");
    // Another connection to the same client is not.
    answer.src_port = 81;
    answer.flags = flags::SYN;
    n.send(A, tcp_frame(&header(guest_addr(A, 81), client, proto::TCP), &answer, &[]));
    assert_eq!(left(&mut n).len(), 1);
}

#[test]
fn fragments_of_guests_leave_and_come_as_they_are() {
    let mut n = tunnel();
    let (src, dst) = (IpAddr::V4(guest_ip(A)), addr(SERVER).ip());
    let whole = udp_bytes(src, dst, 4000, 7, &[5; 2000]);
    let h = Ip4::new(A, dst, proto::UDP);
    n.send(A, Ip4 { frag: 0x2000, ..h.clone() }.frame(&whole[..1480]));
    n.send(A, Ip4 { frag: 1480 / 8, ..h }.frame(&whole[1480..]));
    let pieces = left(&mut n);
    assert_eq!(pieces.len(), 2);
    assert!(pieces.iter().all(|(g, _)| g.p.src == IpAddr::V4(ip(OUT))));
    assert_eq!(pieces[0].0.p.fragment.unwrap().id, pieces[1].0.p.fragment.unwrap().id);
}

#[test]
fn a_full_uplink_loses_the_packet_and_says_so() {
    let mut n = tunnel();
    n.fx.uplink_full = true;
    n.dropped(DropReason::PortFull, |n| n.udp(A, 4000, SERVER, b"x"));
}

#[test]
fn any_bytes_from_outside_are_counted_or_delivered_never_more() {
    let mut n = tunnel();
    n.udp(A, 4000, SERVER, b"x");
    let good = udp(addr(SERVER), addr("198.51.100.9:4000"), b"some payload");
    let mut seed = 1u64;
    for i in 0..20_000u32 {
        let mut frame = good.clone();
        for _ in 0..i % 4 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let at = 14 + (seed >> 33) as usize % (frame.len() - 14);
            frame[at] = (seed >> 20) as u8;
        }
        frame.truncate(14 + (i as usize * 7) % (frame.len() - 13));
        let before = n.all_drops();
        n.core.uplink_packet(n.now, &mut frame, FrameMeta::default(), &mut n.fx);
        let sent = n.fx.take().len() + n.fx.uplink.len();
        n.fx.uplink.clear();
        assert!(n.all_drops() - before <= 1 && sent <= 1);
    }
    n.core.audit().unwrap();
}
