//! Theory of operation: the switch, ARP and the gateway as guests see them: frames in, frames out.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/net.rs"]
mod net;

use guestnet_core::config::AddressInUse;
use guestnet_core::config::ForwardSpec;
use guestnet_core::effects::Event;
use guestnet_core::stats::DropReason;
use guestnet_core::types::{Csum, ForwardId, FrameMeta, Gso, NetMode, PortConfig, PortId, ServiceId, Time};
use guestnet_wire::arp::{self, Arp};
use guestnet_wire::ether::{self, Mac};
use guestnet_wire::tcp::{Tcp, flags};
use guestnet_wire::{icmp, proto};
use net::*;
use std::net::IpAddr;

const C: PortId = PortId(3);

fn to_b(payload: &[u8]) -> Vec<u8> {
    udp_from(&Ip4 { to_mac: mac(B), ..Ip4::new(A, IpAddr::V4(guest_ip(B)), proto::UDP) }, 5, 6, payload)
}

#[test]
fn guests_reach_each_other_unchanged() {
    let mut n = Net::new();
    n.core.add_port(C, port_config()).unwrap();
    n.hello(C);
    let frame = to_b(b"hello");
    let out = n.ask(A, frame.clone());
    assert_eq!(out.len(), 1);
    assert_eq!((out[0].port, &out[0].frame), (B, &frame));
    // A large send with its offload request passes as it is.
    let big = to_b(&[1; 4000]);
    let meta = FrameMeta { csum: Csum::Partial { start: 34, offset: 6 }, gso: Some(Gso::Udp(1000)) };
    n.send_meta(A, big.clone(), meta);
    let out = n.fx.take();
    assert_eq!((out.len(), out[0].meta, &out[0].frame), (1, meta, &big));
}

#[test]
fn a_port_with_an_address_in_use_is_not_added() {
    let mut n = Net::new();
    let with = |addresses: &[IpAddr]| PortConfig { addresses: addresses.to_vec(), ..port_config() };
    let (free, taken) = (IpAddr::V4(guest_ip(C)), IpAddr::V4(guest_ip(B)));
    n.core.bind_address(B, taken, None).unwrap();
    assert_eq!(n.core.add_port(C, with(&[free, taken])), Err(AddressInUse(taken)));
    let gateway = IpAddr::V4(ip(GATEWAY));
    assert_eq!(n.core.add_port(C, with(&[gateway])), Err(AddressInUse(gateway)));
    assert!(n.core.ports().all(|p| p.port != C));
    // What was refused left nothing behind; an address may be named twice.
    n.core.add_port(C, with(&[free, free])).unwrap();
    n.core.remove_port(n.now, B, &mut n.fx);
    n.core.add_port(B, with(&[taken])).unwrap();
    n.core.add_port(B, with(&[gateway])).unwrap();
    assert_eq!(n.core.ports().count(), 3);
}

/// A frame that asks to be cut in many pieces is that many frames to a guest whose attachment cannot cut.
#[test]
fn a_flood_costs_what_it_is_cut_into() {
    let mut n = Net::with_limits(|l| l.floods_per_second = 100);
    n.pass_ms(2000);
    let to_all = |proto| Ip4 { to_mac: Mac::BROADCAST, ..Ip4::new(A, ip("255.255.255.255").into(), proto) };
    let segment = Tcp { src_port: 9, dst_port: 9, flags: 0x10, ..Tcp::default() };
    let tcp = tcp_frame(&to_all(proto::TCP), &segment, &[0; 1440]);
    let udp = udp_from(&to_all(proto::UDP), 9, 9, &[0; 1200]);
    for (frame, gso, pieces) in [(tcp, Gso::Tcp(36), 40), (udp, Gso::Udp(30), 40)] {
        n.pass_ms(2000);
        let meta = FrameMeta { csum: Csum::Valid, gso: Some(gso) };
        n.fx.frames.clear();
        for _ in 0..100 {
            n.send_meta(A, frame.clone(), meta);
        }
        assert_eq!(n.fx.frames.len(), 100 / pieces, "{gso:?}");
    }
}

#[test]
fn floods_reach_everyone_else_and_are_limited() {
    let mut n = Net::with_limits(|l| l.floods_per_second = 10);
    n.core.add_port(C, port_config()).unwrap();
    n.hello(C);
    n.pass_ms(2000);
    let mut h = Ip4::new(A, "255.255.255.255".parse().unwrap(), proto::UDP);
    h.to_mac = Mac::BROADCAST;
    let ports: Vec<PortId> = n.ask(A, udp_from(&h, 9, 9, b"x")).iter().map(|s| s.port).collect();
    assert_eq!(ports, [B, C]);
    // An unknown MAC is flooded too.
    h.to_mac = Mac([2, 9, 9, 9, 9, 9]);
    h.dst = ip("192.168.64.200");
    assert_eq!(n.ask(A, udp_from(&h, 9, 9, b"x")).len(), 2);
    for _ in 0..20 {
        n.send(A, udp_from(&h, 9, 9, b"x"));
    }
    assert_eq!(n.drops(DropReason::RateLimit), 12);
    // It counts what a flood costs: large frames more, and with more ports.
    n.pass_ms(2000);
    let meta = FrameMeta { csum: Csum::Valid, gso: Some(Gso::Udp(1400)) };
    n.fx.frames.clear();
    for _ in 0..3 {
        n.send_meta(A, udp_from(&h, 9, 9, &[0; 6000]), meta);
    }
    assert_eq!(n.fx.frames.len(), 2 * 2);
    n.pass_ms(2000);
    for port in 10..200 {
        n.core.add_port(PortId(port), port_config()).unwrap();
    }
    n.fx.frames.clear();
    for _ in 0..10 {
        n.send(A, udp_from(&h, 9, 9, b"x"));
    }
    assert_eq!(n.fx.frames.len(), 2 * 192);
    // B's rate is its own.
    let mut h = Ip4::new(B, "255.255.255.255".parse().unwrap(), proto::UDP);
    h.to_mac = Mac::BROADCAST;
    assert_eq!(n.ask(B, udp_from(&h, 9, 9, b"x")).len(), 192);
}

#[test]
fn nobody_sends_with_anothers_mac_or_address() {
    let mut n = Net::new();
    for bad in [mac(B), GATEWAY_MAC, Mac::BROADCAST, Mac([1, 0, 0, 0, 0, 9]), Mac::default()] {
        let h = Ip4 { mac: bad, ..Ip4::new(A, "10.0.0.9".parse().unwrap(), proto::UDP) };
        n.dropped(DropReason::SpoofedMac, |n| n.send(A, udp_from(&h, 1, 2, b"")));
    }
    for bad in ["192.168.64.12", GATEWAY, "10.0.0.1", "0.0.0.0", "192.168.64.255", "127.0.0.1"] {
        let h = Ip4 { src: ip(bad), ..Ip4::new(A, "10.0.0.9".parse().unwrap(), proto::UDP) };
        n.dropped(DropReason::SpoofedSource, |n| n.send(A, udp_from(&h, 1, 2, b"")));
        let h = Ip4 { to_mac: mac(B), ..h };
        n.dropped(DropReason::SpoofedSource, |n| n.send(A, udp_from(&h, 1, 2, b"")));
    }
    assert!(n.fx.frames.is_empty() && n.fx.datagrams.is_empty());
    // ARP that claims another's address, or says another sent it.
    for (spa, to) in [(guest_ip(B), mac(B)), (ip(GATEWAY), Mac::BROADCAST)] {
        let f = arp_frame(arp::REPLY, mac(A), spa, to, guest_ip(B));
        n.dropped(DropReason::SpoofedSource, |n| n.send(A, f));
    }
    let mut f = arp_frame(arp::REPLY, mac(A), guest_ip(A), mac(B), guest_ip(B));
    f[22..28].copy_from_slice(&mac(B).0);
    n.dropped(DropReason::SpoofedMac, |n| n.send(A, f));
    assert!(n.fx.frames.is_empty());
}

#[test]
fn a_guest_has_a_bounded_number_of_macs_and_addresses() {
    let mut n = Net::with_limits(|l| {
        l.macs_per_port = 3;
        l.addresses_per_port = 4;
    });
    for i in 0..100u8 {
        let h = Ip4 {
            mac: Mac([2, 7, 7, 7, 7, i]),
            src: ip(&format!("192.168.64.{}", 100 + i)),
            ..Ip4::new(A, "10.0.0.9".parse().unwrap(), proto::UDP)
        };
        n.send(A, udp_from(&h, 1, 2, b""));
    }
    let a = n.core.ports().find(|p| p.port == A).unwrap();
    assert_eq!((a.mac, a.addresses.len()), (Some(mac(A)), 4));
    // Its first MAC stays its own, and what it no longer uses is free for others.
    n.core.add_port(C, port_config()).unwrap();
    let h = Ip4 { mac: Mac([2, 7, 7, 7, 7, 1]), ..Ip4::new(C, "10.0.0.9".parse().unwrap(), proto::UDP) };
    let before = n.drops(DropReason::SpoofedMac);
    n.send(C, udp_from(&h, 1, 2, b""));
    assert_eq!(n.drops(DropReason::SpoofedMac), before);
}

#[test]
fn a_configured_mac_cannot_be_taken_beforehand() {
    let mut n = Net::new();
    // A sends with what will be C's MAC, and with an unknown port's first frame so does port 4.
    let h = Ip4 { mac: mac(C), ..Ip4::new(A, "10.0.0.9".parse().unwrap(), proto::UDP) };
    n.send(A, udp_from(&h, 1, 2, b""));
    n.core.add_port(C, PortConfig { mac: Some(mac(C)), ..port_config() }).unwrap();
    n.dropped(DropReason::SpoofedMac, |n| n.send(A, udp_from(&h, 1, 2, b"")));
    n.hello(C);
    let d = PortId(4);
    n.core.add_port(d, port_config()).unwrap();
    let h =
        Ip4 { mac: mac(PortId(5)), src: guest_ip(d), ..Ip4::new(d, "10.0.0.9".parse().unwrap(), proto::UDP) };
    n.send(d, udp_from(&h, 1, 2, b""));
    n.core.add_port(PortId(5), PortConfig { mac: Some(mac(PortId(5))), ..port_config() }).unwrap();
    n.dropped(DropReason::SpoofedMac, |n| n.send(d, udp_from(&h, 1, 2, b"")));
    n.udp(PortId(5), 1, "10.0.0.9:2", b"");
    assert_eq!(n.core.port_counters(PortId(5)).unwrap().drops.iter().sum::<u64>(), 0);
    // Two ports configured alike: the first has it.
    n.core.add_port(PortId(6), PortConfig { mac: Some(mac(C)), ..port_config() }).unwrap();
    let h = Ip4 { mac: mac(C), ..Ip4::new(PortId(6), "10.0.0.9".parse().unwrap(), proto::UDP) };
    n.dropped(DropReason::SpoofedMac, |n| n.send(PortId(6), udp_from(&h, 1, 2, b"")));
}

/// A guest that leaves and comes back finds its MAC free, whoever used it meanwhile besides his own.
#[test]
fn a_mac_that_another_only_borrowed_goes_to_the_port_that_begins_with_it() {
    let mut n = Net::new();
    let now = n.now;
    n.core.remove_port(now, B, &mut n.fx);
    let borrowed = Ip4 { mac: mac(B), ..Ip4::new(A, "10.0.0.9".parse().unwrap(), proto::UDP) };
    n.send(A, udp_from(&borrowed, 1, 2, b""));
    n.core.add_port(B, port_config()).unwrap();
    n.udp(B, 1, "10.0.0.9:2", b"");
    assert_eq!(n.core.port_counters(B).unwrap().drops.iter().sum::<u64>(), 0);
    n.dropped(DropReason::SpoofedMac, |n| n.send(A, udp_from(&borrowed, 1, 2, b"")));
    // Once it has one, it takes no other's.
    let h = Ip4 { mac: mac(C), ..Ip4::new(A, "10.0.0.9".parse().unwrap(), proto::UDP) };
    n.send(A, udp_from(&h, 1, 2, b""));
    let h = Ip4 { mac: mac(C), ..Ip4::new(B, "10.0.0.9".parse().unwrap(), proto::UDP) };
    n.dropped(DropReason::SpoofedMac, |n| n.send(B, udp_from(&h, 1, 2, b"")));
    // Nor one that is another's first.
    n.core.add_port(PortId(7), port_config()).unwrap();
    let h = Ip4 { mac: mac(A), ..Ip4::new(PortId(7), "10.0.0.9".parse().unwrap(), proto::UDP) };
    n.dropped(DropReason::SpoofedMac, |n| n.send(PortId(7), udp_from(&h, 1, 2, b"")));
}

#[test]
fn one_guest_cannot_crowd_the_services() {
    let mut n = Net::with_limits(|l| l.service_datagrams_per_second = 20);
    n.core.add_service(ServiceId(1), proto::UDP, GATEWAY.parse().unwrap(), 53);
    for _ in 0..50 {
        n.udp(A, 4000, "192.168.64.1:53", b"query");
    }
    n.udp(B, 4000, "192.168.64.1:53", b"query");
    assert_eq!(n.drops(DropReason::RateLimit), 30);
    assert_eq!(n.events(|e| matches!(e, Event::Datagram { port: B, .. })), 1);
    // A large one counts as what it takes in the queue that all share.
    n.pass_ms(2000);
    n.fx.events.clear();
    let meta = FrameMeta { csum: Csum::Valid, gso: Some(Gso::Udp(7500)) };
    n.core.add_port(C, PortConfig { mtu: 9000, ..port_config() }).unwrap();
    n.hello(C);
    for _ in 0..3 {
        n.send_meta(C, udp_frame(C, 4000, addr("192.168.64.1:53"), &[0; 15_000]), meta);
    }
    assert_eq!(n.events(|e| matches!(e, Event::Datagram { port: C, .. })), 4);
}

#[test]
fn a_request_for_a_lease_is_no_way_out_for_a_false_source() {
    let mut n = Net::new();
    n.core.add_service(ServiceId(4), proto::UDP, GATEWAY.parse().unwrap(), 67);
    let h = Ip4 { src: ip("1.2.3.4"), ..Ip4::new(A, "10.0.0.9".parse().unwrap(), proto::UDP) };
    n.dropped(DropReason::SpoofedSource, |n| n.send(A, udp_from(&h, 68, 67, b"")));
    assert!(n.fx.opened.is_empty());
    // The gateway has addresses at which there is no such service.
    let mut c = config();
    c.host_loopback = Some("192.168.64.254".parse().unwrap());
    let mut n = Net::with(c);
    n.core.add_service(ServiceId(4), proto::UDP, GATEWAY.parse().unwrap(), 67);
    let h = Ip4 { dst: ip("192.168.64.254"), ..h };
    n.dropped(DropReason::SpoofedSource, |n| n.send(A, udp_from(&h, 68, 67, b"")));
    assert!(n.fx.opened.is_empty());
}

#[test]
fn assigned_addresses_are_kept_and_learned_ones_give_way() {
    let mut n = Net::new();
    let free = IpAddr::V4(ip("192.168.64.77"));
    n.core.bind_address(A, free, None).unwrap();
    assert!(n.core.bind_address(B, free, None).is_err());
    let h = Ip4 { src: ip("192.168.64.77"), ..Ip4::new(B, "10.0.0.9".parse().unwrap(), proto::UDP) };
    n.dropped(DropReason::SpoofedSource, |n| n.send(B, udp_from(&h, 1, 2, b"")));
    // The learned address of A goes to B when the control side says so.
    n.core.bind_address(B, IpAddr::V4(guest_ip(A)), None).unwrap();
    n.dropped(DropReason::SpoofedSource, |n| n.udp(A, 1, "10.0.0.9:2", b""));
    for own in [GATEWAY, "192.168.64.5"] {
        n.core.add_service(ServiceId(1), proto::UDP, "192.168.64.5".parse().unwrap(), 53);
        assert!(n.core.bind_address(A, own.parse().unwrap(), None).is_err(), "{own} is the gateway's");
    }
    n.core.unbind_address(n.now, free, &mut n.fx);
    n.core.bind_address(B, free, None).unwrap();
}

/// A static lease is its MAC's also while nobody has come with it: what is published there leads to nobody else.
#[test]
fn a_reserved_address_is_taken_by_its_mac_alone() {
    let mut c = config();
    let promised = ip("192.168.64.77");
    c.reserved.insert(promised.into(), mac(C));
    let mut n = Net::with(c);
    // By its address, as a second address of a guest that has another MAC.
    let claim = arp_frame(arp::REQUEST, mac(A), promised, Mac::BROADCAST, promised);
    n.dropped(DropReason::SpoofedSource, |n| n.send(A, claim));
    let h = Ip4 { src: promised, ..Ip4::new(A, "10.0.0.9".parse().unwrap(), proto::UDP) };
    n.dropped(DropReason::SpoofedSource, |n| n.send(A, udp_from(&h, 1, 2, b"")));
    // By its MAC, as a second one.
    let h = Ip4 { mac: mac(C), ..h };
    n.dropped(DropReason::SpoofedMac, |n| n.send(A, udp_from(&h, 1, 2, b"")));
    n.core.add_forward(ForwardId(1), ForwardSpec::published(proto::TCP, addr("192.168.64.77:80")));
    n.dropped(DropReason::NoEndpoint, |n| {
        let sock = n.fx.new_sock();
        let peer = addr("203.0.113.9:6000");
        assert_eq!(n.core.tcp_accepted(n.now, ForwardId(1), sock, peer, &mut n.fx), None);
    });
    // Its owner comes, and needs no DHCP for it.
    n.core.add_port(C, port_config()).unwrap();
    n.fx.frames.clear();
    n.send(C, arp_frame(arp::REQUEST, mac(C), promised, Mac::BROADCAST, promised));
    let sock = n.fx.new_sock();
    n.fx.frames.clear();
    n.core.tcp_accepted(n.now, ForwardId(1), sock, addr("203.0.113.9:6001"), &mut n.fx).unwrap();
    assert_eq!(n.fx.frames.iter().map(|f| f.port).collect::<Vec<_>>(), [C]);
}

#[test]
fn arp_is_answered_for_the_gateway_and_services_alone() {
    let mut c = config();
    c.host_loopback = Some("192.168.64.254".parse().unwrap());
    let mut n = Net::with(c);
    n.core.add_service(ServiceId(1), proto::UDP, "192.168.64.5".parse().unwrap(), 53);
    for own in [GATEWAY, "192.168.64.254", "192.168.64.5"] {
        let out = n.ask(A, arp_frame(arp::REQUEST, mac(A), guest_ip(A), Mac::BROADCAST, ip(own)));
        assert_eq!((out.len(), out[0].port), (1, A), "{own}");
        let a = Arp::parse(&out[0].frame[14..]).unwrap();
        let want = Arp { op: arp::REPLY, sha: GATEWAY_MAC, spa: ip(own), tha: mac(A), tpa: guest_ip(A) };
        assert_eq!(a, want);
    }
    // Another guest gets the question itself; nobody answers for an unused address.
    let out = n.ask(A, arp_frame(arp::REQUEST, mac(A), guest_ip(A), Mac::BROADCAST, guest_ip(B)));
    assert_eq!((out.len(), out[0].port), (1, B));
    let out = n.ask(A, arp_frame(arp::REQUEST, mac(A), guest_ip(A), Mac::BROADCAST, ip("192.168.64.99")));
    assert!(out.iter().all(|s| s.port != A));
    // A probe (RFC 5227) for the gateway's address finds it taken.
    let probe = arp_frame(arp::REQUEST, mac(A), ip("0.0.0.0"), Mac::BROADCAST, ip(GATEWAY));
    assert_eq!(n.ask(A, probe).len(), 1);
}

#[test]
fn an_address_is_announced_to_the_control_side() {
    let mut n = Net::new();
    n.core.add_port(C, port_config()).unwrap();
    n.udp(C, 1, "10.0.0.9:2", b"");
    let want = Event::AddressSeen { port: C, mac: mac(C), address: IpAddr::V4(guest_ip(C)) };
    assert_eq!(n.events(|e| *e == want), 1);
    n.udp(C, 1, "10.0.0.9:2", b"");
    assert_eq!(n.events(|e| *e == want), 1);
}

#[test]
fn echo_is_answered_by_the_gateway() {
    let mut n = Net::new();
    let out = n.ask(A, echo_frame(A, GATEWAY, 7, 9, 1, b"abcdefg"));
    let got = read(&out[0]);
    assert_eq!((got.icmp(), got.p.src_port, got.payload()), ((icmp::ECHO_REPLY, 0), 7, &b"abcdefg"[..]));
    assert_eq!(&got.l4()[4..8], [0, 7, 0, 9]);
}

#[test]
fn ttl_runs_out_here() {
    let mut n = Net::new();
    let h = Ip4 { ttl: 1, ..Ip4::new(A, "10.0.0.9".parse().unwrap(), proto::UDP) };
    let mut out = Vec::new();
    n.dropped(DropReason::TtlExpired, |n| out = n.ask(A, udp_from(&h, 1, 33434, b"probe")));
    let got = read(&out[0]);
    assert_eq!((got.icmp(), got.p.src), ((icmp::TIME_EXCEEDED, 0), IpAddr::V4(ip(GATEWAY))));
    // It quotes the guest's own packet.
    assert_eq!(got.payload(), &udp_from(&h, 1, 33434, b"probe")[14..]);
    assert!(n.fx.opened.is_empty());
}

#[test]
fn icmp_errors_are_limited_in_rate_and_never_answer_errors() {
    let mut n = Net::with_limits(|l| l.icmp_errors_per_second = 5);
    for _ in 0..50 {
        n.udp(A, 1, "192.168.64.1:9", b"");
    }
    assert_eq!((n.fx.frames.len(), n.core.counters().icmp_errors), (5, 5));
    assert_eq!(n.events(|e| matches!(e, Event::FlowDenied(_))), 50, "reports have a rate of their own");
    let mut n = Net::new();
    let mut error = vec![0; 8 + 28];
    icmp::emit(&mut error, icmp::UNREACHABLE, 3, [0; 4], &[0; 28]);
    let h = Ip4 { ttl: 1, ..Ip4::new(A, "10.0.0.9".parse().unwrap(), proto::ICMP) };
    assert!(n.ask(A, h.frame(&error)).is_empty());
}

#[test]
fn guests_on_host_routes_reach_each_other_through_the_gateway() {
    let mut n = Net::new();
    let out = n.ask(A, udp_frame(A, 5, guest_addr(B, 6), b"via"));
    let got = read(&out[0]);
    assert_eq!((out[0].port, got.p.ttl, got.src(), got.dst()), (B, 63, guest_addr(A, 5), guest_addr(B, 6)));
    // In fragments too, which are not put together on the way.
    let h = Ip4 { frag: 0x2000, ..Ip4::new(A, IpAddr::V4(guest_ip(B)), proto::UDP) };
    assert_eq!(n.ask(A, h.frame(&[0; 1480])).len(), 1);
    assert_eq!(n.core.reassembly_bytes(), 0);
    // Nobody there: told so.
    let out = n.ask(A, udp_frame(A, 5, addr("192.168.64.99:6"), b"via"));
    assert_eq!(read(&out[0]).icmp(), (icmp::UNREACHABLE, icmp::unreachable::HOST));
}

#[test]
fn tags_and_unknown_types_are_refused_not_misread() {
    let mut n = Net::new();
    for ethertype in [ether::VLAN, ether::QINQ, 0x88cc, 0x0064] {
        let f = eth(mac(A), mac(B), ethertype, &[0; 60]);
        n.dropped(DropReason::UnsupportedProtocol, |n| n.send(A, f));
    }
    n.dropped(DropReason::Truncated, |n| n.send(A, vec![0; 13]));
    n.dropped(DropReason::Truncated, |n| n.send(A, Vec::new()));
    n.dropped(DropReason::NoEndpoint, |n| n.send(PortId(99), to_b(b"")));
    assert!(n.fx.frames.is_empty());
}

#[test]
fn ipv6_is_switched_but_not_routed() {
    let mut n = Net::new();
    let mut packet = vec![0x60, 0, 0, 0, 0, 8, 59, 64];
    packet.extend_from_slice(&[0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    packet.extend_from_slice(&[0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    packet.extend_from_slice(&[0; 8]);
    assert_eq!(n.ask(A, eth(mac(A), mac(B), ether::IPV6, &packet)).len(), 1);
    n.dropped(DropReason::UnsupportedProtocol, |n| n.send(A, eth(mac(A), GATEWAY_MAC, ether::IPV6, &packet)));
    // A router advertisement is nobody's but the gateway's.
    packet[6] = proto::ICMPV6;
    packet[40] = 134;
    n.dropped(DropReason::Policy, |n| n.send(A, eth(mac(A), mac(B), ether::IPV6, &packet)));
}

fn lladdr(n: u8) -> [u8; 16] {
    let mut a = [0; 16];
    (a[0], a[1], a[15]) = (0xfe, 0x80, n);
    a
}

/// An IPv6 packet of a guest; the payload's checksum is nobody's care here.
fn six(from: PortId, src: [u8; 16], dst: [u8; 16], next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, payload.len() as u8, next, 255];
    packet.extend_from_slice(&src);
    packet.extend_from_slice(&dst);
    packet.extend_from_slice(payload);
    eth(mac(from), mac(if from == A { B } else { A }), ether::IPV6, &packet)
}

/// RFC 7113: what a router says is not let through because it is wrapped up.
#[test]
fn a_router_advertisement_cannot_hide() {
    let mut n = Net::new();
    let ra = [134, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let (src, dst) = (lladdr(1), lladdr(2));
    for headers in [1, 8, 9, 12] {
        let mut payload = Vec::new();
        for i in 1..=headers {
            let next = if i == headers { proto::ICMPV6 } else { 60 };
            payload.extend_from_slice(&[next, 0, 1, 4, 0, 0, 0, 0]);
        }
        payload.extend_from_slice(&ra);
        let before = n.all_drops();
        assert!(n.ask(A, six(A, src, dst, 60, &payload)).is_empty(), "behind {headers} headers");
        assert_eq!(n.all_drops(), before + 1);
    }
    // In a fragment, and in one that leaves the rest of the headers to the next.
    let fragment = |next: u8, rest: &[u8]| [&[next, 0, 0, 1, 0, 0, 0, 9], rest].concat();
    n.dropped(DropReason::Policy, |n| n.send(A, six(A, src, dst, 44, &fragment(proto::ICMPV6, &ra))));
    n.dropped(DropReason::Policy, |n| {
        n.send(A, six(A, src, dst, 44, &fragment(60, &[58, 0, 1, 4, 0, 0, 0, 0])))
    });
    // Other fragments pass, and a plain echo behind a few headers.
    assert_eq!(n.ask(A, six(A, src, dst, 44, &fragment(proto::UDP, &[0; 16]))).len(), 1);
    let echo = [&[proto::ICMPV6, 0, 1, 4, 0, 0, 0, 0][..], &[128, 0, 0, 0, 0, 0, 0, 0]].concat();
    assert_eq!(n.ask(A, six(A, src, dst, 60, &echo)).len(), 1);
}

/// Neighbour discovery (RFC 4861) is policed as ARP is: nobody answers for another.
#[test]
fn nobody_answers_for_another_in_ipv6() {
    let mut n = Net::new();
    let (a, b, none) = (lladdr(1), lladdr(2), [0; 16]);
    let message = |kind: u8, target: [u8; 16], option: u8, m: Mac| {
        [&[kind, 0, 0, 0, 0, 0, 0, 0][..], &target, &[option, 1], &m.0].concat()
    };
    // B looks whether its address is free (RFC 4862 5.4): from then on it is B's.
    let probe = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &b].concat();
    assert_eq!(n.ask(B, six(B, none, lladdr(9), proto::ICMPV6, &probe)).len(), 1);
    let claim = message(136, b, 2, mac(A));
    n.dropped(DropReason::SpoofedSource, |n| n.send(A, six(A, a, lladdr(9), proto::ICMPV6, &claim)));
    n.dropped(DropReason::SpoofedSource, |n| n.send(A, six(A, b, lladdr(9), proto::ICMPV6, &claim)));
    n.dropped(DropReason::SpoofedSource, |n| n.send(A, six(A, b, a, 59, &[])));
    // Its own it may tell, with its own MAC.
    assert_eq!(n.ask(A, six(A, a, b, proto::ICMPV6, &message(136, a, 2, mac(A)))).len(), 1);
    assert_eq!(n.ask(A, six(A, a, b, proto::ICMPV6, &message(135, b, 1, mac(A)))).len(), 1);
    for (kind, option) in [(136, 2), (135, 1), (133, 1)] {
        let target = if kind == 133 { none } else { a };
        let mut m = message(kind, target, option, mac(B));
        if kind == 133 {
            m = [&m[..8], &m[24..]].concat();
        }
        n.dropped(DropReason::SpoofedMac, |n| n.send(A, six(A, a, b, proto::ICMPV6, &m)));
    }
    n.dropped(DropReason::Malformed, |n| {
        n.send(A, six(A, a, b, proto::ICMPV6, &[136, 0, 0, 0, 0, 0, 0, 0, 1]))
    });
    let endless = [&message(136, a, 2, mac(A))[..24], &[2, 0, 0, 0, 0, 0, 0, 0]].concat();
    n.dropped(DropReason::Malformed, |n| n.send(A, six(A, a, b, proto::ICMPV6, &endless)));
    // A probe for an address that another has reaches that one, who answers.
    let probe = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &b].concat();
    assert_eq!(n.ask(A, six(A, none, lladdr(9), proto::ICMPV6, &probe)).len(), 1);
    n.dropped(DropReason::SpoofedSource, |n| n.send(A, six(A, b, a, 59, &[])));
    // A port's addresses are bounded, and those of IPv4 are not among them.
    for i in 0..100 {
        n.send(A, six(A, lladdr(100 + i), b, 59, &[]));
    }
    let p = n.core.ports().find(|p| p.port == A).unwrap();
    assert!(p.addresses.len() <= 17 && p.addresses.contains(&IpAddr::V4(guest_ip(A))), "{p:?}");
}

#[test]
fn bad_checksums_and_sizes() {
    let mut n = Net::new();
    let mut f = udp_frame(A, 1, addr("10.0.0.9:2"), b"abc");
    f[24] ^= 1;
    n.dropped(DropReason::BadIpChecksum, |n| n.send(A, f));
    let mut f = udp_frame(A, 1, addr("10.0.0.9:2"), b"abc");
    f[42] ^= 1;
    n.dropped(DropReason::BadL4Checksum, |n| n.send(A, f.clone()));
    // Somebody vouches for it.
    n.send_meta(A, f.clone(), FrameMeta { csum: Csum::Valid, gso: None });
    n.send_meta(A, f.clone(), FrameMeta { csum: Csum::Partial { start: 34, offset: 6 }, gso: None });
    assert_eq!(n.fx.datagrams.len(), 2);
    for (start, offset) in [(34, 16), (35, 6), (65535, 65535)] {
        let meta = FrameMeta { csum: Csum::Partial { start, offset }, gso: None };
        n.dropped(DropReason::Malformed, |n| n.send_meta(A, f.clone(), meta));
    }
    n.dropped(DropReason::Oversized, |n| n.udp(A, 1, "10.0.0.9:2", &[0; 1473]));
    let big = udp_frame(A, 1, addr("10.0.0.9:2"), &[0; 5000]);
    for (gso, why) in [
        (Gso::Udp(0), DropReason::Malformed),
        (Gso::Tcp(1000), DropReason::Malformed),
        (Gso::Udp(1473), DropReason::Oversized),
    ] {
        let meta = FrameMeta { csum: Csum::Valid, gso: Some(gso) };
        n.dropped(why, |n| n.send_meta(A, big.clone(), meta));
    }
}

/// One large frame is work for as many small ones as it asks for, on this side and the next.
#[test]
fn a_large_send_cannot_ask_for_any_number_of_pieces() {
    let mut n = Net::new();
    let meta = |gso| FrameMeta { csum: Csum::Valid, gso: Some(gso) };
    let to_x = udp_frame(A, 1, addr("10.0.0.9:2"), &[0; 60_000]);
    n.dropped(DropReason::Malformed, |n| n.send_meta(A, to_x.clone(), meta(Gso::Udp(1))));
    n.send_meta(A, to_x, meta(Gso::Udp(60_000_u16.div_ceil(128))));
    assert_eq!(n.fx.datagrams.len(), 1);
    let h = Ip4 { to_mac: mac(B), ..Ip4::new(A, IpAddr::V4(guest_ip(B)), proto::TCP) };
    let to_b = tcp_frame(&h, &guestnet_wire::tcp::Tcp::default(), &[1; 60_000]);
    n.dropped(DropReason::Malformed, |n| n.send_meta(A, to_b.clone(), meta(Gso::Tcp(1))));
    n.fx.frames.clear();
    n.send_meta(A, to_b, meta(Gso::Tcp(48)));
    assert_eq!(n.fx.frames.len(), 1);
}

#[test]
fn a_large_frame_of_a_lax_port_is_not_cut_into_crumbs() {
    let mut n = Net::new();
    n.core.add_port(C, PortConfig { lax_offload: true, mtu: 68, ..port_config() }).unwrap();
    n.hello(C);
    let h = Ip4 { to_mac: mac(B), ..Ip4::new(C, IpAddr::V4(guest_ip(B)), proto::TCP) };
    let f = tcp_frame(&h, &guestnet_wire::tcp::Tcp::default(), &[1; 60_000]);
    n.fx.frames.clear();
    n.dropped(DropReason::Oversized, |n| n.send(C, f));
    assert!(n.fx.frames.is_empty());
}

#[test]
fn lax_ports_may_leave_checksums_and_segmentation_to_us() {
    let mut n = Net::new();
    n.core.add_port(C, PortConfig { lax_offload: true, ..port_config() }).unwrap();
    n.hello(C);
    // Wrong checksum, and larger than the MTU.
    let h = Ip4::new(C, "10.0.0.9".parse().unwrap(), proto::UDP);
    let mut f = udp_from(&h, 1, 2, &[1; 3000]);
    f[40] ^= 0xff;
    n.send(C, f);
    assert_eq!(n.fx.datagrams.len(), 1);
    // To another guest it goes with the work still to do, well described.
    let h = Ip4 { to_mac: mac(B), ..Ip4::new(C, IpAddr::V4(guest_ip(B)), proto::TCP) };
    let out = n.ask(C, tcp_frame(&h, &guestnet_wire::tcp::Tcp::default(), &[1; 3000]));
    let want = FrameMeta { csum: Csum::Partial { start: 34, offset: 16 }, gso: Some(Gso::Tcp(1460)) };
    assert_eq!(out[0].meta, want);
    let mut count = 0;
    guestnet_wire::gso::segment(&out[0].frame, Gso::Tcp(1460), |h, p| {
        let whole = [h, p].concat();
        let packet = guestnet_wire::parse::parse_ip(&whole, 14).unwrap();
        assert!(guestnet_wire::parse::verify_l4(&whole, &packet));
        count += 1;
    })
    .unwrap();
    assert_eq!(count, 3);
}

#[test]
fn dhcp_reaches_its_service_and_no_guest_plays_server() {
    let mut n = Net::new();
    let mut h = Ip4::new(A, "255.255.255.255".parse().unwrap(), proto::UDP);
    (h.src, h.to_mac) = (ip("0.0.0.0"), Mac::BROADCAST);
    let discover = udp_from(&h, 68, 67, b"discover");
    assert_eq!(n.ask(A, discover.clone()).len(), 1, "no service: as any broadcast");
    n.core.add_service(ServiceId(4), proto::UDP, GATEWAY.parse().unwrap(), 67);
    assert!(n.ask(A, discover).is_empty(), "the service's alone");
    let got = n.fx.events.last().unwrap().clone();
    let Event::Datagram { service, port, mac: m, src, dst, payload } = got else { panic!("{got:?}") };
    assert_eq!((service, port, m, &*payload), (ServiceId(4), A, mac(A), &b"discover"[..]));
    assert_eq!((src, dst), (addr("0.0.0.0:68"), addr("255.255.255.255:67")));
    // Renewal is unicast; a client with an address of another network may ask too.
    n.udp(A, 68, "192.168.64.1:67", b"renew");
    h.src = ip("10.9.9.9");
    n.send(A, udp_from(&h, 68, 67, b"rebind"));
    assert_eq!(n.events(|e| matches!(e, Event::Datagram { .. })), 3);
    let mut h = Ip4::new(A, IpAddr::V4(guest_ip(B)), proto::UDP);
    h.to_mac = mac(B);
    n.dropped(DropReason::Policy, |n| n.send(A, udp_from(&h, 67, 68, b"offer")));
    h.frag = 0x2000;
    let bytes = udp_bytes(IpAddr::V4(h.src), IpAddr::V4(h.dst), 67, 68, &[0; 16]);
    n.dropped(DropReason::Policy, |n| n.send(A, h.frame(&bytes)));
    // Nor by way of the gateway.
    h.to_mac = GATEWAY_MAC;
    n.dropped(DropReason::Policy, |n| n.send(A, h.frame(&bytes)));
    h.frag = 0;
    n.dropped(DropReason::Policy, |n| n.send(A, udp_from(&h, 67, 68, b"offer")));
    // The answer.
    n.fx.frames.clear();
    let (to, now) = (addr("255.255.255.255:68"), n.now);
    n.core.service_send(now, A, mac(A), addr("192.168.64.1:67"), to, b"offer", &mut n.fx);
    let got = read(&n.fx.frames[0]);
    assert_eq!((got.src(), got.dst(), got.payload()), (addr("192.168.64.1:67"), to, &b"offer"[..]));
}

/// A client takes what comes to its port, whatever port it came from; and whatever is in front of the port.
#[test]
fn no_guest_sends_to_a_dhcp_client_from_any_port_or_in_any_fragment() {
    let mut n = Net::new();
    n.core.add_service(ServiceId(4), proto::UDP, GATEWAY.parse().unwrap(), 67);
    let to_b = Ip4 { to_mac: mac(B), ..Ip4::new(A, IpAddr::V4(guest_ip(B)), proto::UDP) };
    let to_all = Ip4 {
        to_mac: Mac::BROADCAST,
        dst: ip("255.255.255.255"),
        ..Ip4::new(A, IpAddr::V4(guest_ip(B)), proto::UDP)
    };
    let routed = Ip4 { to_mac: GATEWAY_MAC, ..to_b.clone() };
    for h in [to_b, to_all, routed] {
        for from in [67, 68, 1067, 4011, 65535] {
            n.dropped(DropReason::Policy, |n| n.send(A, udp_from(&h, from, 68, b"offer")));
            let bytes = udp_bytes(IpAddr::V4(h.src), IpAddr::V4(h.dst), from, 68, &[0; 16]);
            for first in [&bytes[..8], &bytes[..24]] {
                let h = Ip4 { frag: 0x2000, ..h.clone() };
                n.dropped(DropReason::Policy, |n| n.send(A, h.frame(first)));
            }
        }
    }
    assert!(n.fx.frames.is_empty());
    // Another port is nobody's business.
    let h = Ip4 { to_mac: mac(B), ..Ip4::new(A, IpAddr::V4(guest_ip(B)), proto::UDP) };
    assert_eq!(n.ask(A, udp_from(&h, 67, 69, b"hello")).len(), 1);
}

/// Without a DHCP service of the gateway a guest may be the network's DHCP server.
#[test]
fn a_guest_may_serve_dhcp_where_the_gateway_does_not() {
    let mut n = Net::new();
    let h = Ip4 { to_mac: mac(B), ..Ip4::new(A, IpAddr::V4(guest_ip(B)), proto::UDP) };
    assert_eq!(n.ask(A, udp_from(&h, 67, 68, b"offer")).len(), 1);
}

#[test]
fn no_guest_sends_to_a_dhcpv6_client_behind_any_header() {
    let mut n = Net::new();
    n.core.add_service(ServiceId(4), proto::UDP, GATEWAY.parse().unwrap(), 67);
    let (src, dst) = (lladdr(1), lladdr(2));
    let reply = |from: u16| {
        let [a, b] = from.to_be_bytes();
        [&[a, b, 2, 34, 0, 16, 0, 0][..], &[7; 8]].concat()
    };
    for from in [547, 546, 1547, 0] {
        n.dropped(DropReason::Policy, |n| n.send(A, six(A, src, dst, proto::UDP, &reply(from))));
        // First fragments: an atomic one (RFC 6946), and one that others follow.
        for more in [0, 1] {
            let fragment = [&[proto::UDP, 0, 0, more, 0, 0, 0, 9], &reply(from)[..]].concat();
            n.dropped(DropReason::Policy, |n| n.send(A, six(A, src, dst, 44, &fragment)));
            let behind = [&[44, 0, 1, 4, 0, 0, 0, 0], &fragment[..]].concat();
            n.dropped(DropReason::Policy, |n| n.send(A, six(A, src, dst, 60, &behind)));
        }
    }
    // Each extension header that another one may follow; an authentication header counts in units of 4 bytes.
    for (header, len) in [(0, 0), (43, 0), (51, 1), (60, 0), (135, 0), (139, 0), (140, 0)] {
        let extension = [proto::UDP, len, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let extension = &extension[..if header == 51 { 12 } else { 8 }];
        let packet = [extension, &reply(1547)].concat();
        n.dropped(DropReason::Policy, |n| n.send(A, six(A, src, dst, header, &packet)));
        // Behind the fragment header it could hide anything, in the first fragment and in others.
        for offset in [0, 8] {
            let fragment = [&[header, 0, 0, offset | 1, 0, 0, 0, 9], extension, &[0; 4]].concat();
            let fragment = &fragment[..fragment.len() & !7];
            n.dropped(DropReason::Policy, |n| n.send(A, six(A, src, dst, 44, fragment)));
        }
    }
    assert!(n.fx.frames.is_empty());
    // A first fragment has the whole transport header (RFC 7112), and pieces are whole units (RFC 8200 4.5).
    let tiny = [&[proto::TCP, 0, 0, 1, 0, 0, 0, 9], &[0; 8][..]].concat();
    n.dropped(DropReason::Policy, |n| n.send(A, six(A, src, dst, 44, &tiny)));
    for data in [0, 7] {
        let odd = [&[proto::UDP, 0, 0, 1, 0, 0, 0, 9], &[0; 8][..data]].concat();
        n.dropped(DropReason::Malformed, |n| n.send(A, six(A, src, dst, 44, &odd)));
    }
    let far = [&[proto::UDP, 0, 0xff, 0xf8, 0, 0, 0, 9], &[0; 16][..]].concat();
    n.dropped(DropReason::Malformed, |n| n.send(A, six(A, src, dst, 44, &far)));
}

/// RFC 1256 advertisements and redirects are a router's, and no guest is one.
#[test]
fn no_guest_plays_ipv4_router_to_another() {
    let mut n = Net::new();
    for to_mac in [mac(B), GATEWAY_MAC] {
        for kind in [icmp::REDIRECT, icmp::ROUTER_ADVERTISEMENT] {
            let mut message = [0; 16];
            icmp::emit(&mut message, kind, 0, [1, 2, 7, 8], &[0; 8]);
            let h = Ip4 { to_mac, ..Ip4::new(A, IpAddr::V4(guest_ip(B)), proto::ICMP) };
            n.dropped(DropReason::Policy, |n| n.send(A, h.frame(&message)));
            let h = Ip4 { frag: 0x2000, ..h };
            n.dropped(DropReason::Policy, |n| n.send(A, h.frame(&message)));
        }
    }
    assert!(n.fx.frames.is_empty());
}

/// An error ends or slows a connection, so nobody tells one of a packet that another got.
#[test]
fn no_guest_sends_errors_about_the_packets_of_others() {
    let mut n = Net::new();
    let about = |to: std::net::Ipv4Addr| {
        let h = Ip4 { src: ip("203.0.113.1"), dst: to, ..Ip4::new(A, IpAddr::V4(to), proto::UDP) };
        udp_from(&h, 53, 4000, b"data")[14..].to_vec()
    };
    let error = |kind: u8, code: u8, mtu: u16, quote: &[u8]| {
        let [a, b] = mtu.to_be_bytes();
        let mut message = vec![0; 8 + quote.len()];
        icmp::emit(&mut message, kind, code, [0, 0, a, b], quote);
        message
    };
    for to_mac in [mac(B), GATEWAY_MAC] {
        let h = Ip4 { to_mac, ..Ip4::new(A, IpAddr::V4(guest_ip(B)), proto::ICMP) };
        for (kind, code) in [(3, 1), (3, 3), (3, 4), (4, 0), (11, 0), (12, 0)] {
            let forged = error(kind, code, 600, &about(guest_ip(B)));
            n.dropped(DropReason::SpoofedSource, |n| n.send(A, h.frame(&forged)));
            let outside = error(kind, code, 600, &about(ip("203.0.113.9")));
            n.dropped(DropReason::SpoofedSource, |n| n.send(A, h.frame(&outside)));
            // Fragments cannot be checked.
            let first = Ip4 { frag: 0x2000, ..h.clone() };
            n.dropped(DropReason::Policy, |n| n.send(A, first.frame(&forged[..32])));
        }
        n.dropped(DropReason::Malformed, |n| n.send(A, h.frame(&error(3, 3, 0, &[0x45; 19]))));
        n.dropped(DropReason::Malformed, |n| n.send(A, h.frame(&error(3, 4, 20, &about(guest_ip(A))))));
        // About its own packets it may, and of an address that it has besides.
        assert_eq!(n.ask(A, h.frame(&error(3, 3, 0, &about(guest_ip(A))))).len(), 1);
        let second = Ip4 { src: ip("192.168.64.77"), ..h.clone() };
        n.send(A, second.frame(&error(3, 3, 0, &about(ip("192.168.64.77")))));
        assert_eq!(n.ask(A, h.frame(&error(11, 0, 0, &about(ip("192.168.64.77"))))).len(), 1);
    }
    let (a, b, group) = (lladdr(1), lladdr(2), [0xff; 16]);
    n.ask(B, six(B, b, a, 59, &[]));
    let about = |to: [u8; 16]| {
        let quote = [&[0x60, 0, 0, 0, 0, 0, 59, 64][..], &lladdr(9), &to].concat();
        [&[1, 3, 0, 0, 0, 0, 0, 0][..], &quote].concat()
    };
    for kind in 1..=4 {
        let forged = |to| [&[kind], &about(to)[1..]].concat();
        n.dropped(DropReason::SpoofedSource, |n| n.send(A, six(A, a, b, proto::ICMPV6, &forged(b))));
        assert_eq!(n.ask(A, six(A, a, b, proto::ICMPV6, &forged(a))).len(), 1);
        assert_eq!(n.ask(A, six(A, a, b, proto::ICMPV6, &forged(group))).len(), 1);
        let fragment = [&[proto::ICMPV6, 0, 0, 1, 0, 0, 0, 9], &forged(a)[..]].concat();
        n.dropped(DropReason::Policy, |n| n.send(A, six(A, a, b, 44, &fragment)));
    }
    n.dropped(DropReason::Malformed, |n| n.send(A, six(A, a, b, proto::ICMPV6, &about(a)[..40])));
}

/// Between ports of different MTU the gateway is a router (RFC 1812 5.2.7.3): what may be cut is cut, what may not
/// is told.
#[test]
fn a_packet_for_a_guest_with_a_smaller_mtu_is_cut_or_refused() {
    let mut n = Net::new();
    n.core.add_port(C, PortConfig { mtu: 1300, ..port_config() }).unwrap();
    n.hello(C);
    let h = Ip4::new(A, IpAddr::V4(guest_ip(C)), proto::UDP);
    let data: Vec<u8> = (0..1400).map(|i| (i / 8) as u8).collect();
    let whole = udp_from(&h, 5, 6, &data);
    for meta in [FrameMeta::default(), FrameMeta { csum: Csum::Partial { start: 34, offset: 6 }, gso: None }]
    {
        n.fx.frames.clear();
        let mut frame = whole.clone();
        if meta.csum != Csum::Full {
            let sum = guestnet_wire::checksum::pseudo(h.src.into(), h.dst.into(), proto::UDP, 1408);
            frame[40..42].copy_from_slice(&guestnet_wire::checksum::fold(sum).to_be_bytes());
        }
        n.send_meta(A, frame, meta);
        let got: Vec<_> = n.fx.take().iter().map(read).collect();
        assert_eq!(got.len(), 2);
        let mut joined = Vec::new();
        for g in &got {
            assert!(g.frame.len() <= 14 + 1300);
            assert_eq!((g.p.fragment.unwrap().offset as usize, g.p.ttl), (joined.len(), 63));
            joined.extend_from_slice(g.l4());
        }
        assert_eq!(joined, whole[34..]);
    }
    let mut out = Vec::new();
    let df = Ip4 { frag: 0x4000, ..h.clone() };
    n.dropped(DropReason::Oversized, |n| out = n.ask(A, udp_from(&df, 5, 6, &data)));
    let told = |out: &[common::Sent]| {
        let got = read(&out[0]);
        assert_eq!((out.len(), out[0].port, got.icmp()), (1, A, (3, 4)));
        assert_eq!(got.l4()[6..8], 1300u16.to_be_bytes());
    };
    told(&out);
    // A large send asks for pieces: those are what must fit.
    let big = |h: &Ip4| udp_from(h, 5, 6, &[1; 8000]);
    let meta = |n| FrameMeta { csum: Csum::Valid, gso: Some(Gso::Udp(n)) };
    n.fx.frames.clear();
    n.dropped(DropReason::Oversized, |n| n.send_meta(A, big(&h), meta(1400)));
    told(&n.fx.take());
    n.send_meta(A, big(&h), meta(1200));
    assert_eq!((n.fx.take().len(), n.drops(DropReason::Oversized)), (1, 2));
    // Nothing on the segment fragments a packet, and nothing sends an error.
    let direct = Ip4 { to_mac: mac(C), ..h };
    n.dropped(DropReason::Oversized, |n| n.send(A, udp_from(&direct, 5, 6, &data)));
    n.dropped(DropReason::Oversized, |n| n.send_meta(A, big(&direct), meta(1400)));
    assert!(n.fx.take().is_empty());
    n.send_meta(A, big(&direct), meta(1200));
    assert_eq!(n.fx.take().len(), 1);
}

#[test]
fn services_answer_at_their_address_alone() {
    let mut n = Net::new();
    n.core.add_service(ServiceId(1), proto::UDP, GATEWAY.parse().unwrap(), 53);
    n.core.add_service(ServiceId(2), proto::TCP, "169.254.169.254".parse().unwrap(), 80);
    n.udp(A, 4000, "192.168.64.1:53", b"query");
    assert_eq!(n.events(|e| matches!(e, Event::Datagram { service: ServiceId(1), .. })), 1);
    assert!(n.fx.opened.is_empty());
    let out = n.ask(A, udp_frame(A, 4000, addr("192.168.64.1:54"), b"query"));
    assert_eq!(read(&out[0]).icmp(), (icmp::UNREACHABLE, icmp::unreachable::PORT));
    n.send(A, syn(A, 4000, "169.254.169.254:80"));
    assert_eq!(n.fx.connects.len(), 1);
    // Large answers go out in fragments.
    n.fx.frames.clear();
    let (src, dst, now) = (addr("192.168.64.1:53"), guest_addr(A, 4000), n.now);
    n.core.service_send(now, A, mac(A), src, dst, &[7; 4000], &mut n.fx);
    assert_eq!(n.fx.frames.len(), 3);
    assert!(n.fx.frames.iter().all(|s| s.frame.len() <= 1514));
}

#[test]
fn loopback_and_martians_never_reach_a_host_socket() {
    for loopback in [None, Some("192.168.64.254".parse().unwrap())] {
        let mut c = config();
        c.host_loopback = loopback;
        let mut n = Net::with(c);
        for to in ["127.0.0.1", "127.1.2.3", "0.0.0.0", "0.0.0.7", "224.0.0.1", "239.1.1.1", "240.0.0.1"]
            .into_iter()
            .chain(["255.255.255.255", "192.168.64.255", "192.168.64.0", "169.254.169.254", GATEWAY])
            .chain(["168.63.129.16", "100.100.100.200", "192.0.0.192"])
        {
            for port in [80, 53, 0] {
                n.udp(A, 4000, &format!("{to}:{port}"), b"x");
                n.send(A, syn(A, 4000, &format!("{to}:{port}")));
            }
            if to != GATEWAY {
                n.send(A, echo_frame(A, to, 1, 1, 64, b""));
            }
        }
        n.udp(A, 4000, "10.0.0.9:0", b"x");
        n.send(A, syn(A, 4000, "10.0.0.9:0"));
        n.udp(A, 0, "10.0.0.9:80", b"x");
        n.send(A, syn(A, 0, "10.0.0.9:80"));
        assert!(n.fx.opened.is_empty() && n.fx.connects.is_empty() && n.fx.pings.is_empty());
        // What loopback says of the host is only there when asked for.
        n.udp(A, 4000, "192.168.64.254:80", b"x");
        n.send(A, syn(A, 4000, "192.168.64.254:80"));
        match loopback {
            None => assert!(n.fx.opened.is_empty() && n.fx.connects.is_empty()),
            Some(_) => {
                assert_eq!(n.fx.datagrams[0].dst, addr("127.0.0.1:80"));
                assert_eq!(n.fx.connects.len(), 1);
                let (flow, _) = n.opened();
                n.fx.frames.clear();
                n.udp_reply(flow, "127.0.0.1:80", b"y");
                assert_eq!(read(&n.fx.frames[0]).src(), addr("192.168.64.254:80"));
            }
        }
    }
}

#[test]
fn host_only_lets_nothing_out() {
    let mut c = config();
    c.mode = NetMode::HostOnly;
    c.host_loopback = Some("192.168.64.254".parse().unwrap());
    let mut n = Net::with(c);
    n.core.add_service(ServiceId(1), proto::UDP, GATEWAY.parse().unwrap(), 53);
    for to in ["10.0.0.9:80", "192.168.64.254:80"] {
        let out = n.ask(A, udp_frame(A, 4000, addr(to), b"x"));
        assert_eq!(read(&out[0]).icmp(), (icmp::UNREACHABLE, icmp::unreachable::ADMIN_PROHIBITED));
        let out = n.ask(A, syn(A, 4000, to));
        assert_eq!(Tcp::parse(read(&out[0]).l4()).unwrap().flags, flags::RST | flags::ACK);
    }
    n.send(A, echo_frame(A, "10.0.0.9", 1, 1, 64, b""));
    assert_eq!(n.drops(DropReason::Policy), 5);
    assert!(n.fx.opened.is_empty() && n.fx.connects.is_empty());
    assert_eq!(n.ask(A, to_b(b"x")).len(), 1);
    n.udp(A, 4000, "192.168.64.1:53", b"query");
    assert_eq!(n.events(|e| matches!(e, Event::Datagram { .. })), 1);
}

#[test]
fn a_full_port_drops_and_others_do_not_notice() {
    let mut n = Net::new();
    n.core.add_port(C, port_config()).unwrap();
    n.hello(C);
    n.fx.port(B).room = 0;
    let mut h = Ip4::new(A, "255.255.255.255".parse().unwrap(), proto::UDP);
    h.to_mac = Mac::BROADCAST;
    n.dropped(DropReason::PortFull, |n| n.send(A, udp_from(&h, 9, 9, b"x")));
    assert_eq!(n.fx.frames.len(), 1);
    assert_eq!(n.core.port_counters(B).unwrap().drops[DropReason::PortFull as usize], 1);
}

#[test]
fn a_port_that_goes_frees_everything() {
    let mut n = Net::new();
    n.udp(A, 4000, "10.0.0.9:53", b"x");
    n.send(A, syn(A, 4001, "10.0.0.9:80"));
    n.send(A, echo_frame(A, "10.0.0.9", 1, 1, 64, b""));
    assert_eq!(n.core.flows().count(), 3);
    let before = n.core.counters();
    n.core.remove_port(n.now, A, &mut n.fx);
    assert_eq!((n.core.flows().count(), n.fx.closed.len()), (0, 3));
    assert_eq!(n.core.next_timer(), None);
    let after = n.core.counters();
    assert_eq!((after.rx_frames, after.flows_closed), (before.rx_frames, 3));
    // Its MAC and address are free, its slot can be used again.
    n.core.add_port(C, port_config()).unwrap();
    let h = Ip4 { mac: mac(A), src: guest_ip(A), ..Ip4::new(C, "10.0.0.9".parse().unwrap(), proto::UDP) };
    n.send(C, udp_from(&h, 1, 2, b""));
    assert_eq!(n.core.flows().count(), 1);
    assert_eq!(n.all_drops(), before.drops.iter().sum::<u64>());
    let _: Time = n.now;
}
