//! Theory of operation: the mode `bridged`, with a port that leads to a segment outside: who hears what, who may
//! say what.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/net.rs"]
mod net;

use guestnet_core::effects::Event;
use guestnet_core::stats::DropReason;
use guestnet_core::types::{Csum, FrameMeta, Gso, NetMode, PortConfig, PortId};
use guestnet_wire::arp;
use guestnet_wire::ether::Mac;
use guestnet_wire::proto;
use net::*;

const OUTSIDE: PortId = PortId(9);
const STATION: Mac = Mac([2, 9, 9, 9, 9, 9]);

fn bridged() -> Net {
    let mut c = config();
    c.mode = NetMode::Bridged;
    let mut n = Net::with(c);
    n.core.add_port(OUTSIDE, PortConfig { uplink: true, ..port_config() }).unwrap();
    n
}

/// UDP of a station of the segment, or of a guest, to a MAC.
fn udp_to(from: Mac, to: Mac) -> Vec<u8> {
    let h = Ip4 { mac: from, to_mac: to, ..Ip4::new(A, "198.51.100.7".parse().unwrap(), proto::UDP) };
    udp_from(&h, 5, 6, b"hello")
}

fn ports(n: &mut Net, from: PortId, frame: Vec<u8>) -> Vec<PortId> {
    let mut to: Vec<_> = n.ask(from, frame).iter().map(|s| s.port).collect();
    to.sort_unstable();
    to
}

#[test]
fn frames_go_where_their_station_is() {
    let mut n = bridged();
    // Known guests hear each other, and nobody else does.
    assert_eq!(ports(&mut n, A, udp_to(mac(A), mac(B))), [B]);
    // What is for no guest is for the segment, and not for other guests.
    assert_eq!(ports(&mut n, A, udp_to(mac(A), STATION)), [OUTSIDE]);
    assert_eq!(ports(&mut n, A, udp_to(mac(A), Mac::BROADCAST)), [B, OUTSIDE]);
    // The gateway of other modes is nobody here.
    assert_eq!(ports(&mut n, A, udp_to(mac(A), GATEWAY_MAC)), [OUTSIDE]);
    assert_eq!(ports(&mut n, OUTSIDE, udp_to(STATION, mac(B))), [B]);
    assert_eq!(ports(&mut n, OUTSIDE, udp_to(STATION, Mac::BROADCAST)), [A, B]);
    n.dropped(DropReason::NoEndpoint, |n| n.send(OUTSIDE, udp_to(STATION, Mac([2, 7, 7, 7, 7, 7]))));
    assert_eq!(n.all_drops(), 1);
    let asks = arp_frame(arp::REQUEST, mac(A), guest_ip(A), Mac::BROADCAST, ip(GATEWAY));
    assert_eq!(ports(&mut n, A, asks), [B, OUTSIDE], "nobody of ours answers");
}

#[test]
fn nobody_takes_the_mac_of_a_guest() {
    let mut n = bridged();
    n.dropped(DropReason::SpoofedMac, |n| n.send(A, udp_to(mac(B), STATION)));
    n.dropped(DropReason::SpoofedMac, |n| n.send(OUTSIDE, udp_to(mac(B), mac(A))));
    n.dropped(DropReason::SpoofedMac, |n| n.send(OUTSIDE, udp_to(Mac::BROADCAST, mac(A))));
    // However many stations there seem to be on the segment, guests are not forgotten for them.
    for i in 0..10_000u16 {
        let [a, b] = i.to_be_bytes();
        n.send(OUTSIDE, udp_to(Mac([2, 8, 8, 8, a, b]), mac(A)));
    }
    assert_eq!(ports(&mut n, A, udp_to(mac(A), Mac([2, 8, 8, 8, 0, 1]))), [OUTSIDE]);
    assert_eq!(ports(&mut n, A, udp_to(mac(A), mac(B))), [B]);
}

#[test]
fn no_guest_takes_the_mac_of_a_station() {
    let mut n = bridged();
    n.send(OUTSIDE, udp_to(STATION, mac(B)));
    n.dropped(DropReason::SpoofedMac, |n| n.send(A, udp_to(STATION, mac(B))));
    let c = PortId(3);
    n.core.add_port(c, port_config()).unwrap();
    n.dropped(DropReason::SpoofedMac, |n| n.send(c, udp_to(STATION, mac(B))));
    // One that a guest used before the station showed is the station's from then on.
    let other = Mac([2, 9, 9, 9, 9, 8]);
    assert_eq!(ports(&mut n, A, udp_to(other, STATION)), [OUTSIDE]);
    assert_eq!(ports(&mut n, OUTSIDE, udp_to(other, mac(B))), [B]);
    n.dropped(DropReason::SpoofedMac, |n| n.send(A, udp_to(other, STATION)));
    let mut h = Ip4::new(B, "198.51.100.7".parse().unwrap(), proto::UDP);
    h.to_mac = other;
    assert_eq!(ports(&mut n, B, udp_from(&h, 5, 6, b"")), [OUTSIDE]);
}

#[test]
fn a_guest_is_no_other_guest_no_server_and_no_bridge() {
    let mut n = bridged();
    let claim = arp_frame(arp::REPLY, mac(A), guest_ip(B), STATION, guest_ip(A));
    n.dropped(DropReason::SpoofedSource, |n| n.send(A, claim));
    let mut lies = arp_frame(arp::REPLY, mac(B), guest_ip(A), STATION, guest_ip(A));
    lies[6..12].copy_from_slice(&mac(A).0);
    n.dropped(DropReason::SpoofedMac, |n| n.send(A, lies));
    let mut h = Ip4::new(A, "255.255.255.255".parse().unwrap(), proto::UDP);
    h.to_mac = Mac::BROADCAST;
    n.dropped(DropReason::Policy, |n| n.send(A, udp_from(&h, 67, 68, b"offer")));
    h.src = guest_ip(B);
    n.dropped(DropReason::SpoofedSource, |n| n.send(A, udp_from(&h, 5, 6, b"")));
    // Spanning tree (a length and no type), and a frame for a VLAN.
    let bridges = Mac([1, 0x80, 0xc2, 0, 0, 0]);
    n.dropped(DropReason::Policy, |n| n.send(A, udp_to(mac(A), bridges)));
    let mut length = udp_to(mac(A), STATION);
    length[12..14].copy_from_slice(&[0, 38]);
    n.dropped(DropReason::UnsupportedProtocol, |n| n.send(A, length));
    let mut tagged = udp_to(mac(A), STATION);
    tagged.splice(12..12, [0x81, 0, 0, 7]);
    n.dropped(DropReason::UnsupportedProtocol, |n| n.send(A, tagged));
}

/// On the segment the clients are others' machines: nothing goes to their ports, tagged or not.
#[test]
fn no_guest_sends_to_dhcp_clients_of_the_segment() {
    let mut n = bridged();
    let mut h = Ip4::new(A, "255.255.255.255".parse().unwrap(), proto::UDP);
    h.to_mac = Mac::BROADCAST;
    for from in [67, 1067] {
        n.dropped(DropReason::Policy, |n| n.send(A, udp_from(&h, from, 68, b"offer")));
        for tag in [0x8100u16, 0x88a8, 0x9100, 0x9200, 0x9300] {
            let [a, b] = tag.to_be_bytes();
            let mut tagged = udp_from(&h, from, 68, b"offer");
            tagged.splice(12..12, [a, b, 0, 0]);
            n.dropped(DropReason::UnsupportedProtocol, |n| n.send(A, tagged));
        }
    }
    h.frag = 0x2000;
    let bytes = udp_bytes(h.src.into(), h.dst.into(), 1067, 68, &[0; 16]);
    n.dropped(DropReason::Policy, |n| n.send(A, h.frame(&bytes)));
    let mut six = vec![0x60, 0, 0, 0, 0, 16, 44, 64, 0xfe, 0x80];
    six.resize(39, 0);
    six.extend_from_slice(&[1, 17, 0, 0, 0, 0, 0, 0, 9, 6, 11, 2, 34, 0, 8, 0, 0]);
    six[24..26].copy_from_slice(&[0xfe, 0x80]);
    n.dropped(DropReason::Policy, |n| n.send(A, eth(mac(A), Mac([0x33, 0x33, 0, 0, 0, 1]), 0x86dd, &six)));
    // What the segment's own server sends comes in.
    h.frag = 0;
    h.mac = STATION;
    assert_eq!(n.ask(OUTSIDE, udp_from(&h, 67, 68, b"offer")).len(), 2);
}

#[test]
fn other_protocols_pass_as_they_are() {
    let mut n = bridged();
    let mut frame = udp_to(mac(A), mac(B));
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    let got = n.ask(A, frame.clone());
    assert_eq!((got[0].port, &got[0].frame), (B, &frame));
    let meta = FrameMeta { csum: Csum::Partial { start: 34, offset: 6 }, gso: None };
    n.dropped(DropReason::Malformed, |n| n.send_meta(A, frame.clone(), meta));
    let meta = FrameMeta { csum: Csum::Full, gso: Some(Gso::Tcp(9)) };
    n.dropped(DropReason::Malformed, |n| n.send_meta(A, frame.clone(), meta));
    frame.resize(1515, 0);
    n.dropped(DropReason::Oversized, |n| n.send(A, frame));
}

#[test]
fn the_owner_hears_of_macs_and_addresses_once() {
    let mut n = bridged();
    let c = PortId(3);
    n.core.add_port(c, port_config()).unwrap();
    let seen = |n: &mut Net| {
        let found = n.fx.events.iter().filter_map(|e| match e {
            Event::AddressSeen { address, .. } => Some(address.to_string()),
            _ => None,
        });
        let found: Vec<_> = found.collect();
        n.fx.events.clear();
        found
    };
    // Before it has an address: a DHCP client, or IPv6 alone.
    let mut h = Ip4::new(c, "255.255.255.255".parse().unwrap(), proto::UDP);
    (h.to_mac, h.src) = (Mac::BROADCAST, "0.0.0.0".parse().unwrap());
    n.send(c, udp_from(&h, 68, 67, b"discover"));
    n.send(c, udp_from(&h, 68, 67, b"discover"));
    assert_eq!(seen(&mut n), ["0.0.0.0"]);
    n.hello(c);
    for i in 0..40u8 {
        h.src = std::net::Ipv4Addr::new(203, 0, 113, i % 20);
        n.send(c, udp_from(&h, 5, 6, b""));
    }
    // A bounded number is remembered, so one that has many is told of again, at a bounded rate.
    assert_eq!(seen(&mut n).len(), 40);
    for _ in 0..3 {
        n.send(c, udp_from(&h, 5, 6, b""));
    }
    assert!(seen(&mut n).is_empty());
    for i in 0..1000u16 {
        h.src = std::net::Ipv4Addr::from(0x0a00_0000 | u32::from(i));
        n.send(c, udp_from(&h, 5, 6, b""));
    }
    assert!(seen(&mut n).len() <= 100);
}
