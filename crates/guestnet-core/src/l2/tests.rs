//! The switch alone: no gateway, no flows.

use crate::common::Mock;
use crate::interface::stats::DropReason;
use crate::interface::types::{FrameMeta, PortConfig, PortId, ServiceId, Time};
use crate::l2::lan::{Lan, Notice, Verdict};
use crate::net::{
    A, B, GATEWAY, GATEWAY_MAC, Ip4, arp_frame, config, guest_addr, guest_ip, ip, mac, port_config,
    udp_frame, udp_from,
};
use guestnet_wire::ether::{self, Mac};
use guestnet_wire::{arp, parse, proto};
use std::net::IpAddr;

const NOW: Time = Time(1_000_000_000);

struct World {
    lan: Lan,
    fx: Mock,
}

impl World {
    fn new() -> World {
        let mut w = World { lan: Lan::new(&config()), fx: Mock::new() };
        for port in [A, B] {
            w.lan.add_port(NOW, port, PortConfig { mac: Some(mac(port)), ..port_config() }).unwrap().unwrap();
            w.lan.bind_address(NOW, port, guest_ip(port).into(), None).unwrap();
        }
        w
    }

    fn slot(&self, port: PortId) -> u32 {
        self.lan.slot(port).unwrap()
    }

    fn send(&mut self, port: PortId, mut frame: Vec<u8>) -> Result<Verdict, DropReason> {
        let slot = self.lan.count_received(port, frame.len()).unwrap();
        let meta = FrameMeta::default();
        let Some(eth) = self.lan.receive(NOW, slot, &mut frame, meta, &mut self.fx)? else {
            return Ok(Verdict::Done);
        };
        let p = parse::parse_ip(&frame, ether::HEADER_LEN)?;
        self.lan.receive_packet(NOW, slot, eth, &mut frame, &p, meta, &mut self.fx)
    }
}

#[test]
fn a_packet_is_routed_forwarded_or_flooded_by_its_destination_mac() {
    let mut w = World::new();
    let to = guest_addr(B, 9);
    assert_eq!(w.send(A, udp_frame(A, 1, to, b"x")), Ok(Verdict::Route));
    let with_mac = |to_mac| {
        let h = Ip4 { to_mac, ..Ip4::new(A, to.ip(), proto::UDP) };
        udp_from(&h, 1, 9, b"x")
    };
    let forward = Verdict::Forward { to: w.slot(B), meta: FrameMeta::default() };
    assert_eq!(w.send(A, with_mac(mac(B))), Ok(forward));
    assert!(w.fx.take().is_empty(), "the caller delivers it");
    assert_eq!(w.send(A, with_mac(Mac([2, 9, 9, 9, 9, 9]))), Ok(Verdict::Done));
    let flooded = w.fx.take();
    assert_eq!((flooded.len(), flooded[0].port), (1, B));
}

#[test]
fn a_guest_cannot_use_the_mac_or_address_of_another() {
    let mut w = World::new();
    let to = guest_addr(B, 9);
    let h = Ip4::new(A, to.ip(), proto::UDP);
    let send = |w: &mut World, h: Ip4| w.send(A, udp_from(&h, 1, 9, b"x"));
    assert_eq!(send(&mut w, Ip4 { mac: mac(B), ..h.clone() }), Err(DropReason::SpoofedMac));
    assert_eq!(send(&mut w, Ip4 { mac: GATEWAY_MAC, ..h.clone() }), Err(DropReason::SpoofedMac));
    assert_eq!(send(&mut w, Ip4 { src: guest_ip(B), ..h.clone() }), Err(DropReason::SpoofedSource));
    assert_eq!(send(&mut w, Ip4 { src: ip(GATEWAY), ..h.clone() }), Err(DropReason::SpoofedSource));
    assert_eq!(send(&mut w, h), Ok(Verdict::Route));
}

#[test]
fn a_dhcp_query_that_is_broadcast_goes_to_the_service() {
    let mut w = World::new();
    let h = Ip4 {
        to_mac: Mac::BROADCAST,
        src: ip("0.0.0.0"),
        ..Ip4::new(A, IpAddr::V4(ip("255.255.255.255")), proto::UDP)
    };
    let query = udp_from(&h, 68, 67, b"discover");
    assert_eq!(w.send(A, query.clone()), Ok(Verdict::Done));
    assert_eq!(w.fx.take().len(), 1, "without a service it is a broadcast as any other");
    w.lan.addressing_mut().add_service(ServiceId(3), proto::UDP, ip(GATEWAY).into(), 67);
    assert_eq!(w.send(A, query), Ok(Verdict::Serve(ServiceId(3))));
    assert!(w.fx.take().is_empty());
}

#[test]
fn a_broadcast_request_for_the_gateway_is_answered_and_noticed() {
    let mut w = World::new();
    let ask = |dst| arp_frame(arp::REQUEST, mac(A), guest_ip(A), dst, ip(GATEWAY));
    w.send(A, ask(GATEWAY_MAC)).unwrap();
    assert_eq!((w.fx.take().len(), w.lan.has_notices()), (1, false));
    w.send(A, ask(Mac::BROADCAST)).unwrap();
    assert_eq!(w.fx.take().len(), 1);
    assert!(matches!(w.lan.take_notice(), Some(Notice::Restarted(slot)) if slot == w.slot(A)));
}

#[test]
fn a_probe_of_an_address_ends_with_its_answer_or_after_three_requests() {
    let mut w = World::new();
    let (c, address) = (PortId(3), guest_ip(PortId(3)));
    w.lan.add_port(NOW, c, port_config()).unwrap().unwrap();
    w.lan.bind_address(NOW, c, address.into(), None).unwrap();
    let slot = w.slot(c);
    let probe = |w: &mut World| {
        let ends = [0, 1].map(|_| w.lan.probe(NOW, slot, address.into(), &mut w.fx));
        assert_eq!(ends, [NOW.plus_s(3); 2]);
        w.fx.take().len()
    };
    assert_eq!(probe(&mut w), 1, "one request for both");
    let reply = arp_frame(arp::REPLY, mac(c), address, GATEWAY_MAC, ip(GATEWAY));
    w.send(c, reply).unwrap();
    let notice = w.lan.take_notice();
    assert!(matches!(notice, Some(Notice::Resolved(ip, m)) if ip == address && m == mac(c)));

    // The guest is gone: three requests, a second apart.
    probe(&mut w);
    let mut now = NOW;
    while let Some(at) = w.lan.next_timer() {
        assert!(at > now);
        now = at;
        w.lan.timers(now, &mut w.fx);
    }
    assert_eq!(w.fx.take().len(), 2);
    assert_eq!(now, NOW.plus_s(3));
    assert!(matches!(w.lan.take_notice(), Some(Notice::Unanswered(ip)) if ip == address));
}

#[test]
fn an_address_that_its_port_lost_is_released() {
    let mut w = World::new();
    let address = IpAddr::V4(guest_ip(A));
    w.lan.unbind_address(address);
    assert_eq!((w.lan.take_released(), w.lan.take_released()), (Some(address), None));
    w.lan.bind_address(NOW, B, address, None).unwrap();
    assert!(w.lan.bind_address(NOW, A, address, None).is_err(), "it is assigned to B");
    assert_eq!(w.lan.addresses_of(w.slot(B)), [address, guest_ip(B).into()]);
}
