//! The gateway over a switch, without flows.

use crate::common::Mock;
use crate::interface::config::Limits;
use crate::interface::effects::Event;
use crate::interface::stats::DropReason;
use crate::interface::types::{FrameMeta, PortConfig, ServiceId, Time};
use crate::l2::lan::{Lan, Link, Sender};
use crate::l3::gateway::{Datagram, Gateway};
use crate::net::{
    A, B, Ip4, addr, config, guest_addr, guest_ip, mac, port_config, read, udp_bytes, udp_frame, udp_from,
};
use guestnet_wire::parse::{self, Packet};
use guestnet_wire::{icmp, ipv4, proto};

const NOW: Time = Time(1_000_000_000);

struct World {
    lan: Lan,
    gateway: Gateway,
    fx: Mock,
}

impl World {
    fn new(limit: impl FnOnce(&mut Limits)) -> World {
        let mut c = config();
        limit(&mut c.limits);
        let mut w = World { lan: Lan::new(&c), gateway: Gateway::new(&c), fx: Mock::new() };
        for port in [A, B] {
            let slot = w
                .lan
                .add_port(NOW, port, PortConfig { mac: Some(mac(port)), ..port_config() })
                .unwrap()
                .unwrap();
            w.lan.bind_address(NOW, port, guest_ip(port).into(), None).unwrap();
            w.gateway.add_port(NOW, slot, port.0);
        }
        w
    }

    fn link(&mut self) -> (&mut Gateway, Link<'_, Mock>) {
        (&mut self.gateway, Link { now: NOW, lan: &mut self.lan, fx: &mut self.fx })
    }

    fn drops(&self, why: DropReason) -> u64 {
        self.lan.counters().drops[why as usize]
    }
}

fn packet(frame: &[u8]) -> Packet {
    parse::parse_ip(frame, 14).unwrap()
}

const FROM_A: Sender = Sender { slot: 0, mac: guestnet_wire::ether::Mac([2, 0, 0, 0, 1, 1]) };

#[test]
fn a_packet_to_another_guest_is_routed_with_its_ttl_one_less() {
    let mut w = World::new(|_| ());
    let mut frame = udp_frame(A, 1, guest_addr(B, 9), b"hello");
    let p = packet(&frame);
    let (gateway, mut link) = w.link();
    assert_eq!(gateway.route_to_guest(&mut link, FROM_A, &mut frame, &p, FrameMeta::default()), Ok(true));
    let got = read(&w.fx.take()[0]);
    assert_eq!((got.p.ttl, got.payload()), (63, &b"hello"[..]));
    let mut outside = udp_frame(A, 1, addr("203.0.113.9:9"), b"hello");
    let p = packet(&outside);
    let (gateway, mut link) = w.link();
    assert_eq!(gateway.route_to_guest(&mut link, FROM_A, &mut outside, &p, FrameMeta::default()), Ok(false));
}

#[test]
fn icmp_errors_quote_the_packet_within_the_rate_of_the_port() {
    let mut w = World::new(|l| l.icmp_errors_per_second = 2);
    let h = Ip4 { ttl: 1, ..Ip4::new(A, addr("203.0.113.9:9").ip(), proto::UDP) };
    let frame = udp_from(&h, 1, 9, b"traceroute");
    let p = packet(&frame);
    for _ in 0..3 {
        let (gateway, mut link) = w.link();
        let done = gateway.check_ttl(&mut link, FROM_A, &frame, &p);
        assert_eq!(done, Err(DropReason::TtlExpired));
    }
    let sent = w.fx.take();
    assert_eq!((sent.len(), w.drops(DropReason::RateLimit)), (2, 1));
    let got = read(&sent[0]);
    assert_eq!(got.icmp(), (icmp::TIME_EXCEEDED, 0));
    assert_eq!(&got.l4()[8..], &frame[14..]);
}

#[test]
fn fragments_become_one_packet() {
    let mut w = World::new(|_| ());
    let to = addr("203.0.113.9:9");
    let whole = udp_bytes(guest_ip(A).into(), to.ip(), 1, 9, &[7; 100]);
    let fragment = |frag, part: &[u8]| Ip4 { frag, ..Ip4::new(A, to.ip(), proto::UDP) }.frame(part);
    let (first, last) = (fragment(ipv4::MF, &whole[..48]), fragment(6, &whole[48..]));
    let mut add = |frame: &[u8]| {
        let p = packet(frame);
        let (gateway, mut link) = w.link();
        gateway.reassemble(&mut link, 0, frame, &p, p.fragment.unwrap())
    };
    assert_eq!(add(&first), Ok(None));
    let got = add(&last).unwrap().unwrap();
    assert_eq!(&got[34..], &whole[..]);
    assert_eq!(w.gateway.reassembly_bytes(), 0);
}

#[test]
fn a_datagram_that_the_control_side_did_not_get_is_counted() {
    let mut w = World::new(|l| l.service_datagrams_per_second = 2);
    let payload = [7; 40];
    let d = Datagram { from: FROM_A, src: guest_addr(A, 1), dst: addr("192.168.64.1:53"), payload: &payload };
    let mut punt = |full| {
        w.fx.event_ring_full = full;
        let (gateway, mut link) = w.link();
        gateway.punt(&mut link, ServiceId(1), &d)
    };
    assert_eq!([punt(false), punt(true), punt(false)], [true, false, false]);
    assert_eq!((w.drops(DropReason::EventRingFull), w.drops(DropReason::RateLimit)), (1, 1));
    assert!(matches!(&w.fx.events[..], [Event::Datagram { port: A, .. }]));
}
