//! Theory of operation: the relays of TCP, UDP and echo over IPv6, fragments, errors both ways and published ports, with a
//! virtual clock. Numbers name the RFC and its section.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/net.rs"]
mod net;
#[path = "common/net6.rs"]
mod net6;

use common::Sent;
use guestnet_core::config::{DatagramError, ForwardSpec};
use guestnet_core::effects::SockError;
use guestnet_core::stats::DropReason;
use guestnet_core::types::{Csum, ForwardId, FrameMeta, Gso, ServiceId, Target};
use guestnet_wire::tcp::{Tcp, flags};
use guestnet_wire::{be16, icmp6, proto};
use net::*;
use net6::*;
use std::net::IpAddr;

const X: &str = "[2001:db8::9]:80";

fn syn6(to: &str) -> Vec<u8> {
    tcp6(A, 4000, to, Tcp { seq: 1000, flags: flags::SYN, ..Tcp::default() }, b"")
}

fn x() -> IpAddr {
    addr(X).ip()
}

fn error6(kind: SockError, icmp: (u8, u8), offender: Option<&str>) -> DatagramError<'static> {
    DatagramError {
        kind,
        offender: offender.map(|o| o.parse().unwrap()),
        icmp_type: icmp.0,
        icmp_code: icmp.1,
        mtu: if let SockError::MessageTooBig(mtu) = kind { mtu } else { 0 },
        dst: addr(X),
        seq: 9,
        payload: b"hello",
    }
}

#[test]
fn rfc9293_3_5_a_connection_is_relayed() {
    let mut n = net6();
    n.send(A, syn6(X));
    let (flow, sock) = n.fx.connects[0];
    assert_eq!(n.fx.sock(sock).target, Some(Target::Address(addr(X))));
    assert_eq!(n.fx.sock(sock).ttl, 63);
    n.core.tcp_connected(n.now, flow, Ok(()), &mut n.fx);
    let got = only(n.fx.take());
    assert_eq!((got.ends(), got.mac), ((x(), guest6(A).into()), mac(A)));
    let answer = Tcp::parse(got.l4()).unwrap();
    assert_eq!((answer.flags & flags::SYN, answer.ack), (flags::SYN, 1001));
    // RFC 6691: the MTU less both headers.
    let mss = got.l4()[20..].windows(4).find(|o| o[..2] == [2, 4]).map(|o| be16(o, 2));
    assert_eq!(mss, Some(1500 - 60));
    let ack = Tcp { seq: 1001, ack: answer.seq.wrapping_add(1), flags: flags::ACK, ..Tcp::default() };
    n.send(A, tcp6(A, 4000, X, ack, b"request"));
    assert_eq!(n.fx.sock(sock).sent, b"request");
    n.fx.sock(sock).inbox.extend(vec![7; 4000]);
    n.fx.frames.clear();
    n.core.tcp_ready(n.now, flow, true, false, &mut n.fx);
    n.core.batch_end(n.now, &mut n.fx);
    let sent = n.fx.take();
    let sizes: Vec<usize> = sent.iter().map(|s| read6(s).payload().len()).filter(|n| *n > 0).collect();
    assert_eq!(sizes, [1440, 1440, 1120]);
    let info = n.core.flows().next().unwrap();
    assert_eq!((info.proto, info.guest.ip(), info.remote), (proto::TCP, guest6(A).into(), addr(X)));
    assert_eq!(info.bytes_out, 7);
}

/// RFC 8201 4, RFC 4443 3.2: a guest behind a narrow link says so.
#[test]
fn rfc8201_4_segments_shrink_to_the_guests_path() {
    let mut n = net6();
    n.send(A, syn6(X));
    let (flow, sock) = n.fx.connects[0];
    n.core.tcp_connected(n.now, flow, Ok(()), &mut n.fx);
    let isn = Tcp::parse(only(n.fx.take()).l4()).unwrap().seq;
    let ack = Tcp { seq: 1001, ack: isn.wrapping_add(1), flags: flags::ACK, ..Tcp::default() };
    n.send(A, tcp6(A, 4000, X, ack, b""));
    n.fx.sock(sock).inbox.extend(vec![7; 1440]);
    n.core.tcp_ready(n.now, flow, true, false, &mut n.fx);
    n.core.batch_end(n.now, &mut n.fx);
    let large = read6(n.fx.take().last().unwrap());
    let h = Ip6::new(A, ip6(GATEWAY6), proto::ICMPV6);
    let too_big = |mtu: u16| {
        let [a, b] = mtu.to_be_bytes();
        h.frame(&h.icmp(icmp6::TOO_BIG, 0, [0, 0, a, b], &large.frame[14..14 + 100]))
    };
    n.dropped(DropReason::Malformed, |n| n.send(A, too_big(1279)));
    assert!(n.fx.frames.is_empty());
    n.send(A, too_big(1280));
    let sizes: Vec<usize> = n.fx.take().iter().map(|s| read6(s).payload().len()).collect();
    assert_eq!(sizes, [1220, 220]);
}

#[test]
fn rfc9293_3_10_7_1_a_segment_without_a_connection_is_reset() {
    let mut n = net6();
    n.send(A, tcp6(A, 4000, X, Tcp { seq: 5, ack: 77, flags: flags::ACK, ..Tcp::default() }, b""));
    let got = only(n.fx.take());
    let reset = Tcp::parse(got.l4()).unwrap();
    assert_eq!((got.ends(), reset.flags, reset.seq), ((x(), guest6(A).into()), flags::RST, 77));
}

/// No client waits for a host without IPv6, RFC 6724's rules aside.
#[test]
fn rfc4443_3_1_a_host_without_a_route_is_told_at_once() {
    let mut n = net6();
    n.fx.open_error = Some(SockError::NetUnreachable);
    n.dropped(DropReason::HostError, |n| n.send(A, syn6(X)));
    let got = only(n.fx.take());
    assert_eq!((got.icmp(), got.ends()), ((1, 0), (ip6(GATEWAY6).into(), guest6(A).into())));
    // One that fails later quotes the SYN.
    n.send(A, syn6(X));
    let (flow, _) = n.fx.connects[0];
    n.core.tcp_connected(n.now, flow, Err(SockError::NetUnreachable), &mut n.fx);
    let got = only(n.fx.take());
    assert_eq!(got.icmp(), (1, 0));
    assert_eq!((be16(got.payload(), 40), be16(got.payload(), 42)), (4000, 80));
    // Refused is a reset.
    n.send(A, syn6(X));
    let (flow, _) = *n.fx.connects.last().unwrap();
    n.core.tcp_connected(n.now, flow, Err(SockError::Refused), &mut n.fx);
    assert_ne!(Tcp::parse(only(n.fx.take()).l4()).unwrap().flags & flags::RST, 0);
    // A datagram, too.
    n.fx.datagram_error = Some(SockError::NetUnreachable);
    n.dropped(DropReason::HostError, |n| n.send(A, udp6(A, 5000, X, b"x")));
    assert_eq!(only(n.fx.take()).icmp(), (1, 0));
}

#[test]
fn rfc4787_req_1_one_socket_for_all_destinations() {
    let mut n = net6();
    for to in [X, "[2001:db8::9]:81", "[2001:db8::a]:80"] {
        n.send(A, udp6(A, 4000, to, b"hello"));
    }
    assert_eq!((n.fx.opened.len(), n.fx.datagrams.len()), (1, 3));
    let (flow, _) = n.opened();
    assert_eq!((n.fx.datagrams[0].dst, n.fx.datagrams[0].ttl), (addr(X), 63));
    n.udp_reply(flow, X, b"answer");
    let got = only(n.fx.take());
    assert_eq!((got.ends(), got.payload()), ((x(), guest6(A).into()), &b"answer"[..]));
    assert_eq!((got.p.src_port, got.p.dst_port), (80, 4000));
    n.dropped(DropReason::Filtered, |n| n.udp_reply(flow, "[2001:db8::77]:80", b"x"));
}

/// The path of large sends (USO of the guest, GRO of the host).
#[test]
fn datagrams_of_one_size_travel_together() {
    let mut n = net6();
    let meta = FrameMeta { csum: Csum::Partial { start: 54, offset: 6 }, gso: Some(Gso::Udp(1000)) };
    n.send_meta(A, udp6(A, 4000, X, &[1; 2500]), meta);
    assert_eq!((n.fx.datagrams[0].segment, n.fx.datagrams[0].payload.len()), (1000, 2500));
    let (flow, _) = n.opened();
    n.core.udp_received(n.now, flow, addr(X), &[2; 2500], 1000, &mut n.fx);
    let sizes: Vec<usize> = n.fx.take().iter().map(|s| read6(s).payload().len()).collect();
    assert_eq!(sizes, [1000, 1000, 500], "a port without GSO");
}

#[test]
fn rfc8200_8_1_a_datagram_without_a_checksum_is_refused() {
    let mut n = net6();
    let mut frame = udp6(A, 4000, X, b"hello");
    frame[14 + 40 + 6..14 + 40 + 8].fill(0);
    n.dropped(DropReason::BadL4Checksum, |n| n.send(A, frame));
}

#[test]
fn rfc5508_req_1_echo_is_relayed() {
    let mut n = net6();
    n.send(A, echo6(A, ip6("2001:db8::9"), 9, b"body"));
    let ping = n.fx.pings[0].clone();
    assert_eq!((ping.dst, ping.seq, ping.ttl, &ping.body[..]), (x(), 1, 8, &b"body"[..]));
    let (flow, _) = n.opened();
    n.core.ping_received(n.now, flow, x(), 1, 60, b"body", &mut n.fx);
    let got = only(n.fx.take());
    assert_eq!((got.icmp(), got.ends(), got.p.ttl), ((129, 0), (x(), guest6(A).into()), 59));
    assert_eq!(got.l4()[4..], [&[0, 7, 0, 1][..], b"body"].concat());
    assert_eq!(n.core.flows().map(|f| f.proto).collect::<Vec<_>>(), [proto::ICMPV6]);
    n.pass_ms(61_000);
    assert_eq!(n.core.flows().count(), 0);
    // RFC 4443 3.3.
    n.dropped(DropReason::TtlExpired, |n| n.send(A, echo6(A, ip6("2001:db8::9"), 1, b"")));
    assert_eq!(only(n.fx.take()).icmp(), (3, 0));
}

/// traceroute6 and path MTU discovery: errors of the network come from who sent them.
#[test]
fn rfc4443_2_4_errors_of_the_network_quote_the_guests_packet() {
    let mut n = net6();
    n.send(A, udp6(A, 4000, X, b"hello"));
    let (flow, _) = n.opened();
    let cases = [
        (error6(SockError::HostUnreachable, (3, 0), Some("2001:db8:ffff::1")), (3, 0), "2001:db8:ffff::1", 0),
        (error6(SockError::Refused, (1, 4), Some("2001:db8::9")), (1, 4), "2001:db8::9", 0),
        (
            error6(SockError::MessageTooBig(1300), (2, 0), Some("2001:db8:ffff::2")),
            (2, 0),
            "2001:db8:ffff::2",
            1300,
        ),
        // One that arose on this host comes from the gateway.
        (error6(SockError::MessageTooBig(1400), (0, 0), None), (2, 0), GATEWAY6, 1400),
        (error6(SockError::NetUnreachable, (0, 0), None), (1, 0), GATEWAY6, 0),
    ];
    for (error, icmp, from, mtu) in cases {
        n.core.sock_error(n.now, flow, error, &mut n.fx);
        let got = only(n.fx.take());
        assert_eq!((got.icmp(), got.ends()), (icmp, (from.parse().unwrap(), guest6(A).into())), "{error:?}");
        assert_eq!(be16(got.l4(), 6), mtu);
        let quote = got.payload();
        assert_eq!((&quote[8..24], &quote[40..42]), (&guest6(A).octets()[..], &4000u16.to_be_bytes()[..]));
        assert!(quote.ends_with(b"hello"));
    }
    // RFC 8201 4: no path is narrower than 1280.
    let narrow = error6(SockError::MessageTooBig(1000), (2, 0), Some("2001:db8:ffff::2"));
    n.dropped(DropReason::Malformed, |n| n.core.sock_error(n.now, flow, narrow, &mut n.fx));
    assert!(n.fx.frames.is_empty());
    // An echo request is quoted as such.
    n.send(A, echo6(A, ip6("2001:db8::9"), 9, b"hello"));
    let (flow, _) = n.opened();
    let error = error6(SockError::HostUnreachable, (3, 0), Some("2001:db8:ffff::1"));
    n.core.sock_error(n.now, flow, error, &mut n.fx);
    let got = only(n.fx.take());
    let quoted = &got.payload()[40..];
    assert_eq!((quoted[0], &quoted[4..8], &quoted[8..]), (128, &[0, 7, 0, 9][..], &b"hello"[..]));
}

#[test]
fn rfc4443_2_4_errors_have_a_rate() {
    let mut n = net6_with(|c| c.limits.icmp_errors_per_second = 5);
    for _ in 0..50 {
        n.fx.datagram_error = Some(SockError::NetUnreachable);
        n.send(A, udp6(A, 5000, X, b"x"));
    }
    assert_eq!((n.fx.frames.len(), n.drops(DropReason::RateLimit)), (5, 45));
}

fn fragment(id: u32, offset: u16, more: bool, piece: &[u8]) -> Vec<u8> {
    let mut header = vec![proto::UDP, 0];
    header.extend_from_slice(&(offset | u16::from(more)).to_be_bytes());
    header.extend_from_slice(&id.to_be_bytes());
    let h = Ip6 { extensions: Some((44, header)), ..Ip6::new(A, ip6("2001:db8::9"), proto::UDP) };
    h.frame(piece)
}

#[test]
fn rfc8200_4_5_fragments_are_put_together() {
    let mut n = net6();
    let whole = Ip6::new(A, ip6("2001:db8::9"), proto::UDP).udp(4000, 80, &[9; 3000]);
    n.send(A, fragment(1, 1400, true, &whole[1400..2800]));
    n.send(A, fragment(1, 2800, false, &whole[2800..]));
    assert!(n.fx.datagrams.is_empty());
    n.send(A, fragment(1, 0, true, &whole[..1400]));
    assert_eq!((n.fx.datagrams[0].payload.len(), n.fx.datagrams[0].dst), (3000, addr(X)));
    assert!(!n.fx.datagrams[0].dont_fragment, "its source has cut it");
    assert_eq!(n.core.reassembly_bytes(), 0);
    // What does not come in time is told (RFC 4443 3.3), where the first fragment came.
    n.send(A, fragment(2, 0, true, &whole[..1400]));
    n.pass_ms(31_000);
    assert_eq!(only(n.fx.take()).icmp(), (3, 1));
}

#[test]
fn rfc5722_overlapping_fragments_are_refused_with_their_packet() {
    let mut n = net6();
    let whole = Ip6::new(A, ip6("2001:db8::9"), proto::UDP).udp(4000, 80, &[9; 2000]);
    n.send(A, fragment(1, 0, true, &whole[..1400]));
    n.dropped(DropReason::Reassembly, |n| n.send(A, fragment(1, 1392, false, &whole[1392..])));
    n.dropped(DropReason::Reassembly, |n| n.send(A, fragment(1, 1400, false, &whole[1400..])));
    assert!(n.fx.datagrams.is_empty());
}

#[test]
fn rfc6946_an_atomic_fragment_disturbs_no_other() {
    let mut n = net6();
    let whole = Ip6::new(A, ip6("2001:db8::9"), proto::UDP).udp(4000, 80, &[9; 2000]);
    let small = Ip6::new(A, ip6("2001:db8::9"), proto::UDP).udp(4000, 80, b"atom");
    n.send(A, fragment(1, 0, true, &whole[..1400]));
    n.send(A, fragment(1, 0, false, &small));
    assert_eq!(n.fx.datagrams[0].payload, b"atom");
    n.send(A, fragment(1, 1400, false, &whole[1400..]));
    assert_eq!(n.fx.datagrams[1].payload.len(), 2000);
}

/// A datagram over the guest's MTU leaves here in fragments, as only its source may make them.
#[test]
fn rfc8200_5_large_datagrams_reach_guests_in_fragments() {
    let mut n = net6();
    n.send(A, udp6(A, 4000, X, b"hello"));
    let (flow, _) = n.opened();
    n.udp_reply(flow, X, &[5; 3000]);
    let sent: Vec<Sent> = n.fx.take();
    assert_eq!(sent.len(), 3);
    assert!(sent.iter().all(|s| s.frame.len() <= 1514 && read6(s).p.fragment.is_some()));
}

/// Rules and the floor judge an IPv6 address by the IPv4 address that it leads to.
#[test]
fn forbidden_addresses_are_forbidden_in_every_spelling() {
    let mut n = net6();
    for to in [
        "::1",
        "::ffff:127.0.0.1",
        "::ffff:192.0.2.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "2002:a9fe:a9fe::1",
        "fd00:ec2::254",
        "fe80::5",
        "ff02::1",
        "ff0e::1",
    ] {
        let before = n.all_drops();
        n.send(A, udp6(A, 4000, &format!("[{to}]:80"), b"x"));
        n.send(A, syn6(&format!("[{to}]:80")));
        n.send(A, echo6(A, ip6(to), 64, b""));
        assert_eq!(n.all_drops() - before, 3, "{to}");
    }
    assert!(n.fx.opened.is_empty() && n.fx.connects.is_empty());
}

#[test]
fn services_of_the_gateway_are_reached_over_ipv6() {
    let mut n = net6();
    let gateway = addr(&format!("[{GATEWAY6}]:53"));
    n.core.add_service(ServiceId(4), proto::TCP, gateway.ip(), 53);
    n.core.add_service(ServiceId(5), proto::UDP, gateway.ip(), 99);
    n.send(A, syn6(&gateway.to_string()));
    let sock = n.fx.connects[0].1;
    assert_eq!(n.fx.sock(sock).target, Some(Target::Service(ServiceId(4), A)));
    n.send(A, udp6(A, 4000, &format!("[{GATEWAY6}]:99"), b"question"));
    assert_eq!(n.events(|e| matches!(e, guestnet_core::effects::Event::Datagram { .. })), 1);
    n.fx.frames.clear();
    let (src, dst) = (addr(&format!("[{GATEWAY6}]:99")), (guest6(A), 4000).into());
    n.core.service_send(n.now, A, mac(A), src, dst, b"answer", &mut n.fx);
    assert_eq!(only(n.fx.take()).payload(), b"answer");
    // Nothing listens at other ports.
    n.dropped(DropReason::BadDestination, |n| n.send(A, udp6(A, 4000, &format!("[{GATEWAY6}]:98"), b"x")));
    assert_eq!(only(n.fx.take()).icmp(), (1, 4));
}

#[test]
fn a_published_port_leads_to_a_guest_over_ipv6() {
    let mut n = net6();
    let guest = (guest6(A), 80).into();
    n.core.add_forward(ForwardId(1), ForwardSpec::published(proto::TCP, guest));
    let cases = [
        ("[2001:db8::5]:999", "2001:db8::5"),
        ("[::1]:999", GATEWAY6),
        ("192.0.2.5:999", GATEWAY6),
        ("[fd12:3456:789a:1::77]:999", GATEWAY6),
    ];
    for (client, seen) in cases {
        let sock = n.fx.new_sock();
        assert!(
            n.core.tcp_accepted(n.now, ForwardId(1), sock, addr(client), &mut n.fx).is_some(),
            "{client}"
        );
        let got = only(n.fx.take());
        assert_eq!((got.ends(), got.mac), ((seen.parse().unwrap(), guest6(A).into()), mac(A)), "{client}");
    }
}

/// RFC 4861 7.2.2: the gateway asks for a guest's MAC, and gives up after three seconds.
#[test]
fn rfc4861_7_2_2_a_guest_is_solicited_before_a_client_reaches_it() {
    let mut n = net6();
    let quiet = ip6("fd12:3456:789a:1::abcd");
    n.core.remove_port(n.now, B, &mut n.fx);
    n.core.add_port(B, port_config()).unwrap();
    n.core.bind_address(B, quiet.into(), None).unwrap();
    n.core.add_forward(ForwardId(1), ForwardSpec::published(proto::UDP, (quiet, 80).into()));
    let sock = n.fx.new_sock();
    let client = addr("[2001:db8::5]:999");
    n.core.udp_forward_received(n.now, ForwardId(1), sock, client, b"hello", 0, &mut n.fx);
    let sent = n.fx.take();
    assert_eq!(sent[0].port, B);
    let got = only(sent);
    assert_eq!((got.icmp(), got.p.ttl), ((135, 0), 255));
    assert_eq!(got.ends(), (ip6(LINK_LOCAL).into(), icmp6::solicited_node(quiet).into()));
    assert_eq!(
        (got.mac, &got.l4()[8..24]),
        (icmp6::multicast_mac(icmp6::solicited_node(quiet)), &quiet.octets()[..])
    );
    assert_eq!(got.options(24), [(1, GATEWAY_MAC.0.to_vec())]);
    // Asked three times in all.
    n.pass_ms(2500);
    assert_eq!(n.fx.take().len(), 2);
    let h = Ip6 { src: quiet, hops: 255, ..Ip6::new(B, ip6(LINK_LOCAL), proto::ICMPV6) };
    let sent = n.ask(B, h.frame(&neighbour(&h, icmp6::ADVERTISEMENT, quiet, &[])));
    let got = only(sent);
    assert_eq!((got.payload(), got.mac, got.p.src), (&b"hello"[..], mac(B), client.ip()));
}
