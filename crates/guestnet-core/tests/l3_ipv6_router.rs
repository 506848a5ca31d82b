//! Theory of operation: the gateway as an IPv6 router, with a virtual clock: neighbour discovery and router advertisements
//! (RFC 4861, 4862, 8106), and what guests do to it.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/net.rs"]
mod net;
#[path = "common/net6.rs"]
mod net6;

use guestnet_core::stats::DropReason;
use guestnet_core::types::{PortConfig, ServiceId};
use guestnet_wire::ether::Mac;
use guestnet_wire::{icmp6, proto};
use net::*;
use net6::*;
use std::net::Ipv6Addr;

const ALL_ROUTERS: &str = "ff02::2";
const UNSPECIFIED: Ipv6Addr = Ipv6Addr::UNSPECIFIED;

fn own_mac(kind: u8, Mac(m): Mac) -> Vec<u8> {
    [&[kind, 1][..], &m].concat()
}

fn router_solicitation(src: Ipv6Addr, hops: u8) -> Vec<u8> {
    let dst = ip6(ALL_ROUTERS);
    let h = Ip6 { src, hops, to_mac: icmp6::multicast_mac(dst), ..Ip6::new(A, dst, proto::ICMPV6) };
    h.frame(&h.icmp(icmp6::ROUTER_SOLICITATION, 0, [0; 4], &[]))
}

#[test]
fn rfc4861_7_2_4_the_gateway_answers_for_its_addresses() {
    let mut n = net6();
    for target in [GATEWAY6, LINK_LOCAL, PREFIX] {
        let sent = n.ask(A, solicitation(A, guest6(A), ip6(target), &own_mac(1, mac(A))));
        assert_eq!(sent[0].port, A);
        let got = only(sent);
        assert_eq!((got.icmp(), got.p.ttl, got.mac), ((136, 0), 255, mac(A)));
        assert_eq!(got.ends(), (ip6(target).into(), guest6(A).into()));
        // From a router, solicited, in place of what was known.
        assert_eq!((got.l4()[4], &got.l4()[8..24]), (0xe0, &ip6(target).octets()[..]));
        assert_eq!(got.options(24), [(2, GATEWAY_MAC.0.to_vec())]);
    }
}

/// The solicitation goes no further: nobody else may answer it.
#[test]
fn rfc4862_5_4_a_duplicate_of_the_gateways_address_is_detected() {
    let mut n = net6();
    // The nonce of RFC 7527 is tolerated.
    for options in [&[][..], &[14, 1, 1, 2, 3, 4, 5, 6]] {
        let sent = n.ask(A, solicitation(A, UNSPECIFIED, ip6(GATEWAY6), options));
        assert_eq!(sent[0].port, A);
        let got = only(sent);
        assert_eq!(got.ends(), (ip6(GATEWAY6).into(), icmp6::ALL_NODES.into()));
        assert_eq!((got.l4()[4], got.mac), (0xa0, Mac([0x33, 0x33, 0, 0, 0, 1])));
    }
    // One of the guest's own addresses is nobody's yet, and the other guest is asked.
    let sent = n.ask(A, solicitation(A, UNSPECIFIED, ip6("fd12:3456:789a:1::77"), &[]));
    assert_eq!(sent.iter().map(|s| s.port).collect::<Vec<_>>(), [B]);
}

#[test]
fn rfc4861_7_1_a_hop_limit_below_255_is_refused() {
    let mut n = net6();
    for target in [ip6(GATEWAY6), guest6(B)] {
        let mut frame = solicitation(A, guest6(A), target, &[]);
        frame[14 + 7] = 254;
        n.dropped(DropReason::Malformed, |n| n.send(A, frame));
    }
    n.dropped(DropReason::Malformed, |n| n.send(A, router_solicitation(link6(A), 64)));
    let mut frame = solicitation(A, guest6(A), ip6(GATEWAY6), &[]);
    frame[14 + 40 + 3] ^= 1;
    n.dropped(DropReason::BadL4Checksum, |n| n.send(A, frame));
    assert!(n.fx.frames.is_empty());
}

#[test]
fn rfc4861_4_2_what_a_router_advertisement_says() {
    let mut n = net6();
    n.core.add_service(ServiceId(1), proto::UDP, ip6(GATEWAY6).into(), 53);
    let sent = n.ask(A, router_solicitation(link6(A), 255));
    assert_eq!(sent[0].port, A);
    let got = only(sent);
    assert_eq!((got.icmp(), got.p.ttl, got.mac), ((134, 0), 255, mac(A)));
    assert_eq!(got.ends(), (ip6(LINK_LOCAL).into(), link6(A).into()));
    // Hop limit; no DHCPv6 and the medium preference (RFC 4191); a lifetime of half an hour; the guest's own timers.
    assert_eq!(got.l4()[4..16], [64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0]);
    let options = got.options(16);
    assert_eq!(options.iter().map(|o| o.0).collect::<Vec<_>>(), [1, 5, 3, 25, 31]);
    assert_eq!(options[0].1, GATEWAY_MAC.0);
    assert_eq!(options[1].1, [0, 0, 0, 0, 0x05, 0xdc]);
    // On the link and for SLAAC: valid for 5400 s, preferred for 2700 s.
    let prefix = [&[64, 0xc0, 0, 0, 0x15, 0x18, 0, 0, 0x0a, 0x8c, 0, 0, 0, 0][..], &ip6(PREFIX).octets()];
    assert_eq!(options[2].1, prefix.concat());
    assert_eq!(options[3].1, [&[0, 0, 0, 0, 0x07, 0x08][..], &ip6(GATEWAY6).octets()].concat());
    let names = [&[0, 0, 0, 0, 0x07, 0x08][..], b"\x08guestnet\x08internal\0\0\0\0\0\0"];
    assert_eq!(options[4].1, names.concat());
    // With DHCPv6, addresses and other settings come from there too.
    n.core.add_service(ServiceId(2), proto::UDP, ip6(GATEWAY6).into(), 547);
    assert_eq!(only(n.ask(A, router_solicitation(link6(A), 255))).l4()[5], 0xc0);
}

#[test]
fn rfc4861_6_2_6_a_guest_without_an_address_is_answered_at_the_group() {
    let mut n = net6();
    let sent = n.ask(A, router_solicitation(UNSPECIFIED, 255));
    assert_eq!(sent[0].port, A);
    let got = only(sent);
    assert_eq!((got.p.dst, got.mac), (icmp6::ALL_NODES.into(), Mac([0x33, 0x33, 0, 0, 0, 1])));
    assert_eq!(got.options(16).iter().map(|o| o.0).collect::<Vec<_>>(), [1, 5, 3, 31], "no DNS service");
}

#[test]
fn a_guest_that_asks_without_end_is_answered_ten_times_a_second() {
    let mut n = net6();
    let answers = (0..100).filter(|_| !n.ask(A, router_solicitation(link6(A), 255)).is_empty()).count();
    assert_eq!((answers, n.drops(DropReason::RateLimit)), (10, 90));
}

#[test]
fn rfc4861_6_2_1_guests_hear_of_the_router_from_time_to_time() {
    let mut n = net6();
    assert_eq!(n.core.next_timer(), None, "nobody has asked yet");
    n.ask(A, router_solicitation(link6(A), 255));
    let mut last = n.now;
    for _ in 0..20 {
        let at = n.core.next_timer().unwrap();
        let after = at.since(last) / 1_000_000_000;
        assert!((200..600).contains(&after), "{after}");
        n.fx.frames.clear();
        n.pass_ms(at.since(n.now) / 1_000_000);
        let sent = n.fx.take();
        assert_eq!(sent.iter().map(|s| s.port).collect::<Vec<_>>(), [A, B]);
        assert_eq!(read6(&sent[0]).p.dst, "ff02::1".parse::<std::net::IpAddr>().unwrap());
        last = n.now;
    }
}

/// Guests never have a route that leads nowhere.
#[test]
fn rfc4861_6_2_3_the_router_comes_and_goes_with_the_hosts_ipv6() {
    let mut n = net6_with(|c| c.upstream6 = false);
    let lifetime = |got: &Got6| u16::from_be_bytes([got.l4()[6], got.l4()[7]]);
    let got = only(n.ask(A, router_solicitation(link6(A), 255)));
    assert_eq!(lifetime(&got), 0);
    assert!(got.options(16).iter().any(|o| o.0 == 3), "the prefix stays");
    n.fx.frames.clear();
    for (upstream, want) in [(true, 1800), (false, 0), (true, 1800)] {
        n.core.set_upstream6(n.now, upstream, &mut n.fx);
        let sent = n.fx.take();
        assert_eq!(
            sent.iter().map(|s| (s.port, lifetime(&read6(s)))).collect::<Vec<_>>(),
            [(A, want), (B, want)]
        );
        n.core.set_upstream6(n.now, upstream, &mut n.fx);
        assert!(n.fx.take().is_empty(), "nothing has changed");
    }
    // Three times in all, since one may be lost.
    assert_eq!(n.pass_ms(33_000), 2);
    assert_eq!(n.fx.take().len(), 4);
    assert_eq!(n.pass_ms(160_000), 0);
}

#[test]
fn rfc4861_6_2_3_an_mtu_that_ipv6_cannot_have_is_not_advertised() {
    let mut n = net6();
    n.core.remove_port(n.now, A, &mut n.fx);
    n.core.add_port(A, PortConfig { mtu: 1000, ..port_config() }).unwrap();
    let got = only(n.ask(A, router_solicitation(link6(A), 255)));
    assert!(got.options(16).iter().all(|o| o.0 != 5));
}

#[test]
fn rfc4443_4_2_the_gateway_answers_echo_requests() {
    let mut n = net6();
    for (to, from) in [(GATEWAY6, GATEWAY6), (LINK_LOCAL, LINK_LOCAL), (PREFIX, GATEWAY6)] {
        let got = only(n.ask(A, echo6(A, ip6(to), 1, b"body")));
        assert_eq!((got.icmp(), got.ends()), ((129, 0), (ip6(from).into(), guest6(A).into())));
        assert_eq!(got.l4()[4..], [&[0, 7, 0, 1][..], b"body"].concat());
    }
    let mut h = Ip6::new(A, ip6(LINK_LOCAL), proto::ICMPV6);
    h.src = link6(A);
    let got = only(n.ask(A, h.frame(&h.icmp(icmp6::ECHO, 0, [0; 4], b""))));
    assert_eq!(got.ends(), (ip6(LINK_LOCAL).into(), link6(A).into()));
}

/// RFC 4291 2.5.6, RFC 2827.
#[test]
fn rfc4443_3_1_a_source_that_leads_nowhere_is_refused() {
    let mut n = net6();
    let to = ip6("2001:db8::9");
    for (src, code) in [(link6(A), 2), (ip6("2001:db8:1::5"), 5)] {
        let h = Ip6 { src, ..Ip6::new(A, to, proto::UDP) };
        n.dropped(DropReason::SpoofedSource, |n| n.send(A, h.frame(&h.udp(5, 6, b"x"))));
        let got = only(n.fx.take());
        assert_eq!((got.icmp(), got.p.dst), ((1, code), src.into()));
        assert_eq!(got.payload()[8..24], src.octets());
    }
    assert!(n.fx.opened.is_empty());
}

#[test]
fn rfc8200_4_headers_are_walked_to_a_bound() {
    let mut n = net6();
    // Each option header fills itself with PadN.
    let chain = |count: usize| {
        let mut headers = Vec::new();
        for i in 1..=count {
            headers.extend_from_slice(&[if i == count { proto::ICMPV6 } else { 60 }, 0, 1, 4, 0, 0, 0, 0]);
        }
        let h = Ip6 { extensions: Some((60, headers)), ..Ip6::new(A, ip6(GATEWAY6), proto::ICMPV6) };
        h.frame(&h.icmp(icmp6::ECHO, 0, [0; 4], b""))
    };
    for count in [1, 8] {
        assert_eq!(only(n.ask(A, chain(count))).icmp(), (129, 0), "{count} headers");
    }
    n.dropped(DropReason::Malformed, |n| n.send(A, chain(9)));
    // RFC 5095: routing header 0 with segments left.
    let routing = [&[proto::ICMPV6, 2, 0, 1, 0, 0, 0, 0][..], &guest6(B).octets()].concat();
    let h = Ip6 { extensions: Some((43, routing)), ..Ip6::new(A, ip6(GATEWAY6), proto::ICMPV6) };
    n.dropped(DropReason::Malformed, |n| n.send(A, h.frame(&h.icmp(icmp6::ECHO, 0, [0; 4], b""))));
    // A protocol that nobody knows: the field that names it is told (RFC 4443 3.4).
    n.fx.frames.clear();
    n.dropped(DropReason::UnsupportedProtocol, |n| {
        n.send(A, Ip6::new(A, ip6(GATEWAY6), 253).frame(&[0; 8]));
    });
    let got = only(n.fx.take());
    assert_eq!((got.icmp(), &got.l4()[4..8]), ((4, 1), &[0, 0, 0, 6][..]));
}

/// Between guests that use the gateway although they share a link.
#[test]
fn rfc8200_3_a_packet_for_another_guest_is_routed_on() {
    let mut n = net6();
    let sent = n.ask(A, udp6(A, 5, &format!("[{}]:6", guest6(B)), b"hello"));
    assert_eq!(sent[0].port, B);
    let got = only(sent);
    assert_eq!((got.p.ttl, got.mac, got.payload()), (63, mac(B), &b"hello"[..]));
    // RFC 4443 3.3 and 3.1.
    let h = Ip6 { hops: 1, ..Ip6::new(A, guest6(B), proto::UDP) };
    n.dropped(DropReason::TtlExpired, |n| n.send(A, h.frame(&h.udp(5, 6, b"x"))));
    assert_eq!(only(n.fx.take()).icmp(), (3, 0));
    let nobody = Ip6::new(A, ip6("fd12:3456:789a:1::99"), proto::UDP);
    n.dropped(DropReason::NoEndpoint, |n| n.send(A, nobody.frame(&nobody.udp(5, 6, b"x"))));
    assert_eq!(only(n.fx.take()).icmp(), (1, 3));
}

#[test]
fn rfc4541_3_reports_of_listeners_end_here() {
    let mut n = net6();
    let dst = ip6("ff02::16");
    let alert = vec![proto::ICMPV6, 0, 5, 2, 0, 0, 1, 0];
    let h = Ip6 {
        src: link6(A),
        hops: 1,
        to_mac: icmp6::multicast_mac(dst),
        extensions: Some((0, alert)),
        ..Ip6::new(A, dst, proto::ICMPV6)
    };
    assert!(n.ask(A, h.frame(&h.icmp(143, 0, [0; 4], &[0; 4]))).is_empty());
    assert_eq!(n.all_drops(), 0);
    // RFC 3810 5.1.14: a query is a router's.
    n.dropped(DropReason::Policy, |n| n.send(A, h.frame(&h.icmp(130, 0, [0; 4], &[0; 16]))));
}

/// RFC 6105, RFC 4861 8: a guest is no router to others, nor to the gateway.
#[test]
fn advertisements_and_redirects_of_guests_are_dropped() {
    let mut n = net6();
    for kind in [icmp6::ROUTER_ADVERTISEMENT, icmp6::REDIRECT] {
        for (dst, to_mac) in
            [(icmp6::ALL_NODES, icmp6::multicast_mac(icmp6::ALL_NODES)), (ip6(LINK_LOCAL), GATEWAY_MAC)]
        {
            let h = Ip6 { src: link6(A), hops: 255, to_mac, ..Ip6::new(A, dst, proto::ICMPV6) };
            n.dropped(DropReason::Policy, |n| n.send(A, h.frame(&h.icmp(kind, 0, [0; 4], &[0; 32]))));
        }
    }
    // Nor does one answer for the gateway.
    for own in [GATEWAY6, LINK_LOCAL, PREFIX] {
        let h = Ip6 { hops: 255, to_mac: mac(B), ..Ip6::new(A, guest6(B), proto::ICMPV6) };
        let frame = h.frame(&neighbour(&h, icmp6::ADVERTISEMENT, ip6(own), &own_mac(2, mac(A))));
        n.dropped(DropReason::SpoofedSource, |n| n.send(A, frame));
        let h = Ip6 { src: ip6(own), to_mac: mac(B), ..Ip6::new(A, guest6(B), proto::UDP) };
        n.dropped(DropReason::SpoofedSource, |n| n.send(A, h.frame(&h.udp(1, 2, b""))));
    }
    assert!(n.fx.frames.is_empty());
}

/// 10,000 addresses of one guest cost it its oldest ones, and nobody else anything.
#[test]
fn a_flood_of_addresses_is_bounded_for_each_guest() {
    let mut n = net6();
    for i in 0..10_000_u128 {
        let src = Ipv6Addr::from_bits(ip6(PREFIX).to_bits() | 0xa_0000 | i);
        n.send(A, solicitation(A, src, ip6(GATEWAY6), &[]));
    }
    let known = |n: &Net, port| n.core.ports().into_iter().find(|p| p.port == port).unwrap().addresses;
    let of_a = known(&n, A).into_iter().filter(|a| a.is_ipv6()).count();
    assert_eq!(of_a, guestnet_core::Limits::default().addresses_per_port as usize);
    assert!(known(&n, B).contains(&guest6(B).into()));
    // The other guest is answered as ever.
    n.fx.frames.clear();
    assert_eq!(only(n.ask(B, echo6(B, ip6(GATEWAY6), 64, b""))).icmp(), (129, 0));
}

#[test]
fn without_a_prefix_the_gateway_has_no_ipv6() {
    let mut n = net6_with(|c| c.gateway6 = None);
    assert_eq!(n.ask(A, router_solicitation(link6(A), 255)).len(), 1, "flooded as any packet to a group");
    n.dropped(DropReason::UnsupportedProtocol, |n| n.send(A, echo6(A, ip6(LINK_LOCAL), 64, b"")));
}
