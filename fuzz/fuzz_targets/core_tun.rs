//! Theory of operation: the input is a little program for a core with an uplink of packets: frames of two
//! guests, packets from outside that continue what left (or not), guests and addresses that come and go, ports
//! that are published, led elsewhere and taken back, time that passes. What leaves must be readable, from the
//! external address and no larger than agreed; a checksum that was left begun must be right when completed; the
//! core's books must agree, and at the end all connections must end.
#![no_main]

#[path = "../../crates/guestnet-core/tests/common/mod.rs"]
mod common;

use common::Mock;
use guestnet_core::config::{ForwardSpec, NetworkConfig};
use guestnet_core::Network;
use guestnet_core::nat::NatEngineConfig;
use guestnet_core::types::{Csum, ForwardId, FrameMeta, Gso, PortConfig, PortId, Time};
use guestnet_wire::ether::{self, Ether, Mac};
use guestnet_wire::ipv4::{self, Ipv4};
use guestnet_wire::{checksum, parse, proto, put, gso};
use libfuzzer_sys::fuzz_target;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};

const GATEWAY_MAC: Mac = Mac([0x52, 0x94, 0xef, 0, 0, 1]);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 64, 1);
const EXTERNAL: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 9);
const MTU: u16 = 1500;
const FLOWS: usize = 32;
const STEPS: usize = 400;

fn guest_mac(port: u32) -> Mac {
    Mac([0x52, 0x94, 0xef, 0, 0, 2 + port as u8])
}

fn guest_ip(port: u32) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 64, 2 + port as u8)
}

struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn u8(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }
    fn u16(&mut self) -> u16 {
        u16::from_be_bytes([self.u8(), self.u8()])
    }
    fn bytes(&mut self, n: usize) -> &'a [u8] {
        let (front, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        front
    }
}

struct World {
    core: Network,
    fx: Mock,
    now: Time,
    /// Packets that left, the last few: what the outside answers.
    left: Vec<Vec<u8>>,
}

/// An IPv4 packet behind an Ethernet header: `input` chooses the transport's bytes, or a plain header.
fn packet(input: &mut Input<'_>, src: Ipv4Addr, dst: Ipv4Addr) -> (Vec<u8>, FrameMeta) {
    let (kind, len) = (input.u8(), usize::from(input.u16()) % 3000);
    let proto = [proto::UDP, proto::TCP, proto::ICMP, proto::GRE][usize::from(kind & 3)];
    let head = input.bytes(40);
    let mut l4 = vec![0; len.max(head.len())];
    put(&mut l4, 0, head);
    match proto {
        proto::UDP if kind & 4 != 0 => {
            let n = l4.len() as u16;
            put(&mut l4, 4, &n.to_be_bytes());
        }
        proto::TCP if kind & 4 != 0 => put(&mut l4, 12, &[0x50]),
        proto::ICMP if kind & 4 != 0 => put(&mut l4, 0, &[kind >> 4 & 8, 0]),
        _ => {}
    }
    let frag = if kind & 8 != 0 { input.u16() } else { u16::from(kind & 16) << 10 };
    let mut frame = vec![0; ether::HEADER_LEN + ipv4::MIN_LEN];
    let ttl = input.u8();
    let payload_len = l4.len() as u16;
    Ipv4 { src, dst, proto, ttl, tos: 0, id: 7, frag, payload_len }.emit(&mut frame[ether::HEADER_LEN..]);
    frame.extend_from_slice(&l4);
    let mut meta = FrameMeta::default();
    let offset = if proto == proto::TCP { 16 } else { 6 };
    if kind & 32 != 0 && l4.len() > 20 && kind & 2 == 0 {
        let sum = checksum::pseudo(src.into(), dst.into(), proto, l4.len() as u32);
        put(&mut frame, 34 + usize::from(offset), &checksum::fold(sum).to_be_bytes());
        meta.csum = Csum::Partial { start: 34, offset };
        if kind & 64 != 0 {
            let size = input.u16();
            meta.gso = Some(if proto == proto::TCP { Gso::Tcp(size) } else { Gso::Udp(size) });
        }
    }
    (frame, meta)
}

impl World {
    fn new() -> World {
        let mut config = NetworkConfig::new(GATEWAY_MAC, GATEWAY, (Ipv4Addr::new(192, 168, 64, 0), 24), [7; 32]);
        config.limits.reassembly_bytes = 64 << 10;
        let mut core = Network::new(config, Time(1));
        let uplink = NatEngineConfig {
            ports: (40000, 40063),
            table_size: FLOWS,
            sessions_per_endpoint: 20,
            mtu_outside: 1000,
            mtu_inside: MTU,
            fragment_bytes: 32 << 10,
            output_bytes: 64 << 10,
            ..NatEngineConfig::new(EXTERNAL)
        };
        core.set_uplink(uplink).expect("a good configuration");
        let mut world = World { core, fx: Mock::new(), now: Time(1), left: Vec::new() };
        world.add_port(0);
        world.add_port(1);
        world
    }

    fn add_port(&mut self, n: u32) {
        let config = PortConfig {
            mac: (n == 0).then(|| guest_mac(n)),
            addresses: vec![IpAddr::V4(guest_ip(n))],
            mtu: MTU,
            gso_max: if n == 1 { 65000 } else { 0 },
            lax_offload: false,
            uplink: false,
        };
        // The address may be assigned to another port by now.
        let _refused = self.core.add_port(PortId(n), config);
    }

    fn look(&mut self) {
        for (frame, meta) in std::mem::take(&mut self.fx.uplink) {
            self.check(&frame, meta);
            let p = parse::parse_ip(&frame, ether::HEADER_LEN).expect("an unreadable packet left");
            assert_eq!(p.src, IpAddr::V4(EXTERNAL), "a guest's own address left");
            assert!(meta.gso.is_some() || p.end - p.l3 <= 1000, "a packet over the MTU left whole");
            self.left.push(frame);
            if self.left.len() > 8 {
                self.left.remove(0);
            }
        }
        for sent in self.fx.take() {
            let e = Ether::parse(&sent.frame).expect("a frame without a header was sent");
            if e.ethertype == ether::IPV4 && e.src == GATEWAY_MAC {
                self.check(&sent.frame, sent.meta);
            }
        }
        if let Err(why) = self.core.audit() {
            panic!("{why}");
        }
        assert!(self.core.flows().count() <= FLOWS);
    }

    fn check(&self, frame: &[u8], meta: FrameMeta) {
        let p = parse::parse_ip(frame, ether::HEADER_LEN).expect("an unreadable packet was sent");
        assert!(parse::verify_ipv4_header(frame, &p), "a wrong header checksum was sent");
        if let Csum::Partial { start, offset } = meta.csum {
            let mut whole = frame.to_vec();
            gso::complete_checksum(&mut whole, start, offset).expect("a checksum outside the frame");
            assert!(parse::verify_l4(&whole, &p), "a partial checksum went wrong");
        }
    }

    fn outside(&mut self, input: &mut Input<'_>) {
        let (which, port) = (input.u8(), input.u16());
        let answered = self.left.get(usize::from(which & 7)).cloned();
        let src = match &answered {
            Some(out) if which & 8 == 0 => Ipv4Addr::from(guestnet_wire::be32(out, 30)),
            _ => Ipv4Addr::new(203, 0, 113, which),
        };
        let dst = if which & 16 == 0 { EXTERNAL } else { guest_ip(0) };
        let (mut frame, meta) = packet(input, src, dst);
        if which & 32 == 0 && frame.len() >= 38 {
            // Back to the port that it left by, or to one that is chosen.
            let to = answered.as_ref().filter(|o| o.len() >= 38).map_or(port, |o| guestnet_wire::be16(o, 34));
            let from =
                answered.as_ref().filter(|o| o.len() >= 38).map_or(port, |o| guestnet_wire::be16(o, 36));
            put(&mut frame, 34, &from.to_be_bytes());
            put(&mut frame, 36, &to.to_be_bytes());
        }
        if which & 64 != 0
            && let Some(out) = &answered
        {
            // An error that quotes it.
            let quote = out.get(ether::HEADER_LEN..).unwrap_or(&[]);
            let quote = &quote[..quote.len().min(120)];
            let mut b = vec![0; 8 + quote.len()];
            guestnet_wire::icmp::emit(&mut b, 3 + 8 * (which >> 7), (port & 15) as u8, [0; 4], quote);
            frame.truncate(ether::HEADER_LEN);
            frame.resize(ether::HEADER_LEN + ipv4::MIN_LEN, 0);
            let (proto, payload_len) = (proto::ICMP, b.len() as u16);
            Ipv4 { src, dst, proto, ttl: 60, tos: 0, id: 1, frag: 0, payload_len }
                .emit(&mut frame[ether::HEADER_LEN..]);
            frame.extend_from_slice(&b);
            self.core.uplink_packet(self.now, &mut frame, FrameMeta::default(), &mut self.fx);
            return;
        }
        self.core.uplink_packet(self.now, &mut frame, meta, &mut self.fx);
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() % 16 {
            0..=5 => {
                let who = u32::from(input.u8() & 1);
                let dst = match input.u8() {
                    0 => EXTERNAL,
                    n => Ipv4Addr::new(203, 0, 113, n & 3),
                };
                let (mut frame, meta) = packet(input, guest_ip(who), dst);
                Ether { dst: GATEWAY_MAC, src: guest_mac(who), ethertype: ether::IPV4 }.emit(&mut frame);
                self.core.frame(self.now, PortId(who), &mut frame, meta, &mut self.fx);
            }
            6..=10 => self.outside(input),
            11 => {
                let (what, port) = (input.u8(), input.u16() & 63);
                let id = ForwardId(u32::from(what >> 4 & 3));
                let guest = SocketAddr::from((guest_ip(u32::from(what >> 6 & 1)), 1 + (port & 7)));
                let nobody = SocketAddr::from(([0, 0, 0, 0], 80));
                match what & 3 {
                    0 | 1 => {
                        let proto = if what & 4 == 0 { proto::TCP } else { proto::UDP };
                        let at = SocketAddrV4::new(EXTERNAL, 40000 + port);
                        // Taken back first: a number is given once.
                        self.core.remove_uplink_forward(id);
                        let _taken = self.core.add_uplink_forward(id, at, ForwardSpec::published(proto, guest));
                    }
                    2 => drop(
                        self.core.retarget_uplink_forward(id, if what & 8 == 0 { guest } else { nobody }),
                    ),
                    _ => drop(self.core.remove_uplink_forward(id)),
                }
            }
            12 => {
                let what = input.u8();
                let n = u32::from(what & 1);
                let ip = IpAddr::V4(guest_ip(u32::from(what >> 1 & 1)));
                match what >> 2 & 3 {
                    0 => self.core.remove_port(self.now, PortId(n), &mut self.fx),
                    1 => self.add_port(n),
                    2 => drop(self.core.bind_address(PortId(n), ip, None)),
                    _ => self.core.unbind_address(self.now, ip, &mut self.fx),
                }
            }
            13 => self.fx.uplink_full = input.u8() & 1 != 0,
            _ => {
                let ms = u64::from(input.u16()) * 8;
                self.pass(ms);
            }
        }
        self.look();
    }

    fn pass(&mut self, ms: u64) {
        let until = self.now.plus_ms(ms);
        for _ in 0..100_000 {
            match self.core.next_timer() {
                Some(at) if at <= until => {
                    self.now = self.now.max(at);
                    self.core.timers(self.now, &mut self.fx);
                    self.look();
                }
                _ => {
                    self.now = until;
                    return;
                }
            }
        }
        panic!("the core's timers never come to rest: next {:?}, now {:?}", self.core.next_timer(), self.now);
    }
}

fuzz_target!(|data: &[u8]| {
    let mut world = World::new();
    let mut input = Input(data);
    for _ in 0..STEPS {
        if input.0.is_empty() {
            break;
        }
        world.step(&mut input);
    }
    world.pass(2 * 7440 * 1000 + 60_000);
    assert_eq!(world.core.flows().count(), 0, "connections outlive every timeout");
});
