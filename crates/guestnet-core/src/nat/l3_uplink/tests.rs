//! The uplink built alone, over the layers that it uses.

use super::*;
use crate::common::Mock;
use crate::context::Layers;
use crate::interface::types::PortConfig;
use crate::net::{
    A, GATEWAY_MAC, addr, config, eth, guest_addr, guest_ip, mac, port_config, udp_bytes, udp_frame,
};
use guestnet_wire::ipv4::Ipv4;

const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 9);
const NOW: Time = Time(1_000_000_000);

/// The uplink over the layers that it uses, without relays, and the slot of its guest A.
fn one_guest() -> (Layers, L3Uplink, u32) {
    let c = config();
    let mut layers = Layers::new(&c);
    let mut uplink = L3Uplink::new(&c, NatEngineConfig::new(OUTSIDE)).unwrap();
    let slot =
        layers.lan.add_port(NOW, A, PortConfig { mac: Some(mac(A)), ..port_config() }).unwrap().unwrap();
    layers.lan.bind_address(NOW, A, guest_ip(A).into(), None).unwrap();
    layers.gateway.add_port(NOW, slot, A.0);
    uplink.add_port(slot);
    (layers, uplink, slot)
}

#[test]
fn a_partial_checksum_does_not_cover_bytes_behind_a_datagram() {
    let (now, mut fx) = (NOW, Mock::new());
    let (mut layers, mut uplink, slot) = one_guest();

    let remote = addr("203.0.113.1:7");
    // In the packet (RFC 9868), behind the packet (padding of Ethernet), and both.
    for (surplus, padding) in [(7, 0), (0, 9), (3, 5)] {
        let mut datagram = udp_bytes(guest_ip(A).into(), remote.ip(), 4000, 7, b"ping");
        let sum = checksum::pseudo(guest_ip(A).into(), remote.ip(), proto::UDP, datagram.len() as u32);
        put(&mut datagram, 6, &checksum::fold(sum).to_be_bytes());
        datagram.extend_from_slice(&[0xa5; 7][..surplus]);
        let mut frame = crate::net::Ip4::new(A, remote.ip(), proto::UDP).frame(&datagram);
        frame.extend_from_slice(&[0x5a; 9][..padding]);
        let p = parse::parse_ip(&frame, L3).unwrap();
        let meta = FrameMeta { csum: Csum::Partial { start: 34, offset: 6 }, ..FrameMeta::default() };
        let cx = &mut layers.context(now, &mut fx);
        uplink.packet_out(cx, Sender { slot, mac: mac(A) }, &mut frame, &p, meta).unwrap();
        let (mut sent, meta) = fx.uplink.pop().unwrap();
        if let Csum::Partial { start, offset } = meta.csum {
            gso::complete_checksum(&mut sent, start, offset).unwrap();
        }
        let p = parse::parse_ip(&sent, L3).unwrap();
        assert!(parse::verify_l4(&sent, &p), "{surplus} bytes behind it, {padding} of padding");
    }
}

#[test]
fn a_packet_goes_out_translated_and_its_answer_comes_back() {
    let (now, mut fx) = (NOW, Mock::new());
    let (mut layers, mut uplink, slot) = one_guest();

    let remote = addr("203.0.113.1:7");
    assert!(L3Uplink::takes(layers.lan.addressing(), remote.ip()));
    assert!(!L3Uplink::takes(layers.lan.addressing(), guest_ip(A).into()));
    let mut frame = udp_frame(A, 4000, remote, b"ping");
    let p = parse::parse_ip(&frame, L3).unwrap();
    let from = Sender { slot, mac: mac(A) };
    let cx = &mut layers.context(now, &mut fx);
    uplink.packet_out(cx, from, &mut frame, &p, FrameMeta::default()).unwrap();
    let (sent, _) = fx.uplink.pop().unwrap();
    let p = parse::parse_ip(&sent, L3).unwrap();
    assert_eq!((p.src, p.dst, p.ttl), (OUTSIDE.into(), remote.ip(), 63));
    assert_eq!(uplink.translated(slot), 1);
    uplink.audit().unwrap();

    let mut packet = vec![0; 20];
    let answer = udp_bytes(remote.ip(), OUTSIDE.into(), 7, p.src_port, b"pong");
    let (src, dst, payload_len) = (Ipv4Addr::new(203, 0, 113, 1), OUTSIDE, answer.len() as u16);
    Ipv4 { src, dst, proto: proto::UDP, ttl: 60, tos: 0, id: 1, frag: 0, payload_len }.emit(&mut packet);
    packet.extend_from_slice(&answer);
    let mut frame = eth(Mac::default(), Mac::default(), 0, &packet);
    uplink.packet_in(&mut layers.context(now, &mut fx), &mut frame, FrameMeta::default()).unwrap();
    let got = crate::net::read(&fx.take()[0]);
    assert_eq!((got.src(), got.dst()), (remote, guest_addr(A, 4000)));
    assert_eq!(Ether::parse(&got.frame).unwrap().src, GATEWAY_MAC);

    uplink.remove_port(&mut layers.context(now, &mut fx), slot);
    assert_eq!(uplink.translated(slot), 0);
    uplink.audit().unwrap();
}
