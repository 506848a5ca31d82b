//! Theory of operation: a Network whose gateway has IPv6, and packets of IPv6 that guests send, built here byte by byte.
#![allow(dead_code, missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::common::Sent;
use crate::net::{A, B, GATEWAY_MAC, Net, config, eth, mac};
use guestnet_core::NetworkConfig;
use guestnet_core::types::{Csum, PortId};
use guestnet_wire::ether::{self, Ether, Mac};
use guestnet_wire::parse::{self, Packet};
use guestnet_wire::tcp::{Options, Tcp};
use guestnet_wire::{checksum, gso, icmp6, proto, udp};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

pub const PREFIX: &str = "fd12:3456:789a:1::";
pub const GATEWAY6: &str = "fd12:3456:789a:1::1";
pub const LINK_LOCAL: &str = "fe80::1";

pub fn ip6(text: &str) -> Ipv6Addr {
    text.parse().unwrap()
}

/// The guest's address in the prefix, and on the link.
pub fn guest6(port: PortId) -> Ipv6Addr {
    Ipv6Addr::from_bits(ip6(PREFIX).to_bits() | u128::from(0x1000 + port.0))
}

pub fn link6(port: PortId) -> Ipv6Addr {
    Ipv6Addr::from_bits(ip6("fe80::").to_bits() | u128::from(0x1000 + port.0))
}

pub fn config6() -> NetworkConfig {
    NetworkConfig {
        gateway6: Some((ip6(GATEWAY6), 64)),
        search: vec!["guestnet.internal".into()],
        ..config()
    }
}

/// Two guests whose addresses are known.
pub fn net6() -> Net {
    net6_with(|_| {})
}

pub fn net6_with(f: impl FnOnce(&mut NetworkConfig)) -> Net {
    let mut c = config6();
    f(&mut c);
    let mut n = Net::with(c);
    for port in [A, B] {
        let dst = icmp6::ALL_NODES;
        let h = Ip6 { to_mac: icmp6::multicast_mac(dst), hops: 255, ..Ip6::new(port, dst, proto::ICMPV6) };
        n.send(port, h.frame(&neighbour(&h, icmp6::ADVERTISEMENT, guest6(port), &[])));
    }
    n.fx.frames.clear();
    n.fx.events.clear();
    assert_eq!(n.all_drops(), 0);
    n
}

/// An IPv6 packet of a guest in an Ethernet frame.
#[derive(Clone)]
pub struct Ip6 {
    pub mac: Mac,
    pub to_mac: Mac,
    pub src: Ipv6Addr,
    pub dst: Ipv6Addr,
    pub proto: u8,
    pub hops: u8,
    pub class: u8,
    /// Extension headers, the first of which has this number.
    pub extensions: Option<(u8, Vec<u8>)>,
}

impl Ip6 {
    pub fn new(port: PortId, dst: Ipv6Addr, proto: u8) -> Ip6 {
        Ip6 {
            mac: mac(port),
            to_mac: GATEWAY_MAC,
            src: guest6(port),
            dst,
            proto,
            hops: 64,
            class: 0,
            extensions: None,
        }
    }

    pub fn frame(&self, l4: &[u8]) -> Vec<u8> {
        let (first, extensions) = self.extensions.clone().unwrap_or((self.proto, Vec::new()));
        let len = (extensions.len() + l4.len()) as u16;
        let mut packet = vec![0x60 | self.class >> 4, self.class << 4, 0, 0];
        packet.extend_from_slice(&len.to_be_bytes());
        packet.extend_from_slice(&[first, self.hops]);
        packet.extend_from_slice(&self.src.octets());
        packet.extend_from_slice(&self.dst.octets());
        packet.extend_from_slice(&extensions);
        packet.extend_from_slice(l4);
        eth(self.mac, self.to_mac, ether::IPV6, &packet)
    }

    /// An ICMPv6 message with its checksum.
    pub fn icmp(&self, kind: u8, code: u8, rest: [u8; 4], body: &[u8]) -> Vec<u8> {
        let mut b = vec![0; 8 + body.len()];
        icmp6::emit(&mut b, (self.src, self.dst), (kind, code), rest, body);
        b
    }

    pub fn udp(&self, from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
        let mut b = vec![0; 8];
        b.extend_from_slice(payload);
        udp::emit(&mut b, self.src.into(), self.dst.into(), from, to);
        b
    }

    pub fn tcp(&self, seg: &Tcp, payload: &[u8]) -> Vec<u8> {
        let mut b = vec![0; 60];
        let mss = (seg.flags & guestnet_wire::tcp::flags::SYN != 0).then_some(1440);
        let n = seg.emit(&Options { mss, ..Options::default() }, &mut b);
        b.truncate(n);
        b.extend_from_slice(payload);
        let s = checksum::pseudo(self.src.into(), self.dst.into(), proto::TCP, b.len() as u32);
        let c = checksum::finish(checksum::sum(&b, s));
        b[16..18].copy_from_slice(&c.to_be_bytes());
        b
    }
}

/// A neighbour solicitation or advertisement.
pub fn neighbour(h: &Ip6, kind: u8, target: Ipv6Addr, options: &[u8]) -> Vec<u8> {
    h.icmp(kind, 0, [0; 4], &[&target.octets()[..], options].concat())
}

/// A solicitation of a guest at the group of its target.
pub fn solicitation(port: PortId, src: Ipv6Addr, target: Ipv6Addr, options: &[u8]) -> Vec<u8> {
    let dst = icmp6::solicited_node(target);
    let h = Ip6 { src, hops: 255, to_mac: icmp6::multicast_mac(dst), ..Ip6::new(port, dst, proto::ICMPV6) };
    h.frame(&neighbour(&h, icmp6::SOLICITATION, target, options))
}

pub fn echo6(port: PortId, dst: Ipv6Addr, hops: u8, body: &[u8]) -> Vec<u8> {
    let h = Ip6 { hops, ..Ip6::new(port, dst, proto::ICMPV6) };
    h.frame(&h.icmp(icmp6::ECHO, 0, [0, 7, 0, 1], body))
}

pub fn udp6(port: PortId, from: u16, to: &str, payload: &[u8]) -> Vec<u8> {
    let SocketAddr::V6(to) = to.parse().unwrap() else { panic!("IPv6 only") };
    let h = Ip6::new(port, *to.ip(), proto::UDP);
    h.frame(&h.udp(from, to.port(), payload))
}

pub fn tcp6(port: PortId, from: u16, to: &str, seg: Tcp, payload: &[u8]) -> Vec<u8> {
    let SocketAddr::V6(to) = to.parse().unwrap() else { panic!("IPv6 only") };
    let h = Ip6::new(port, *to.ip(), proto::TCP);
    h.frame(&h.tcp(&Tcp { src_port: from, dst_port: to.port(), window: 65535, ..seg }, payload))
}

/// A frame that was sent, checked.
pub struct Got6 {
    pub p: Packet,
    pub mac: Mac,
    pub frame: Vec<u8>,
}

impl Got6 {
    pub fn l4(&self) -> &[u8] {
        &self.frame[self.p.l4..self.p.end]
    }
    pub fn payload(&self) -> &[u8] {
        &self.frame[self.p.payload..self.p.end]
    }
    pub fn ends(&self) -> (IpAddr, IpAddr) {
        (self.p.src, self.p.dst)
    }
    pub fn icmp(&self) -> (u8, u8) {
        (self.l4()[0], self.l4()[1])
    }
    /// The options of a message of neighbour discovery that begin at this offset, by kind.
    pub fn options(&self, at: usize) -> Vec<(u8, Vec<u8>)> {
        let (mut rest, mut all) = (&self.l4()[at..], Vec::new());
        while let [kind, units, ..] = *rest {
            assert_ne!(units, 0);
            let (option, more) = rest.split_at(usize::from(units) * 8);
            all.push((kind, option[2..].to_vec()));
            rest = more;
        }
        all
    }
}

/// Reads a sent IPv6 frame as a guest's stack would; what is left to offload is completed first.
#[track_caller]
pub fn read6(s: &Sent) -> Got6 {
    let mut frame = s.frame.clone();
    if let (Csum::Partial { start, offset }, None) = (s.meta.csum, s.meta.gso) {
        gso::complete_checksum(&mut frame, start, offset).unwrap();
    }
    let e = Ether::parse(&frame).unwrap();
    assert_eq!((e.src, e.ethertype), (GATEWAY_MAC, ether::IPV6));
    let p = parse::parse_ip(&frame, 14).unwrap();
    if s.meta.gso.is_none() && p.fragment.is_none() {
        assert!(parse::verify_l4(&frame, &p), "transport checksum");
    }
    Got6 { p, mac: e.dst, frame }
}

/// The only frame that was sent.
#[track_caller]
pub fn only(sent: Vec<Sent>) -> Got6 {
    assert_eq!(sent.len(), 1, "{sent:?}");
    read6(&sent[0])
}
