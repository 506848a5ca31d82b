//! Theory of operation: a Network under test: the core, the mock of the world, a virtual clock, and two or
//! more guests whose frames are built here byte by byte.
#![allow(dead_code, missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::common::{Mock, Sent};
use guestnet_core::Network;
use guestnet_core::effects::Event;
use guestnet_core::stats::DropReason;
use guestnet_core::types::{Csum, FlowId, FrameMeta, PortConfig, PortId, SockId, Time};
use guestnet_core::{Limits, NetworkConfig};
use guestnet_wire::arp::{self, Arp};
use guestnet_wire::ether::{self, Ether, Mac};
use guestnet_wire::gso;
use guestnet_wire::ipv4::Ipv4;
use guestnet_wire::parse::{self, Packet};
use guestnet_wire::tcp::{Options, Tcp};
use guestnet_wire::{checksum, icmp, proto, udp};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

pub const GATEWAY_MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);
pub const GATEWAY: &str = "192.168.64.1";
/// Guest `n` is on port `n`, with MAC 02:..:1n and address 192.168.64.(10+n).
pub const A: PortId = PortId(1);
pub const B: PortId = PortId(2);

pub fn mac(port: PortId) -> Mac {
    Mac([2, 0, 0, 0, 1, port.0 as u8])
}

pub fn ip(text: &str) -> Ipv4Addr {
    text.parse().unwrap()
}

pub fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

pub fn guest_ip(port: PortId) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 64, 10 + port.0 as u8)
}

pub fn guest_addr(port: PortId, n: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(guest_ip(port)), n)
}

pub fn config() -> NetworkConfig {
    NetworkConfig::new(GATEWAY_MAC, ip(GATEWAY), (ip("192.168.64.0"), 24), [7; 32])
}

pub fn port_config() -> PortConfig {
    PortConfig { mac: None, addresses: Vec::new(), mtu: 1500, gso_max: 0, lax_offload: false, uplink: false }
}

pub struct Net {
    pub core: Network,
    pub fx: Mock,
    pub now: Time,
    /// Our initial sequence number of the connection opened last.
    pub isn: u32,
}

impl Net {
    /// Two guests that are known already.
    pub fn new() -> Net {
        Net::with(config())
    }

    pub fn with_limits(f: impl FnOnce(&mut Limits)) -> Net {
        let mut c = config();
        f(&mut c.limits);
        Net::with(c)
    }

    pub fn with(c: NetworkConfig) -> Net {
        let now = Time(1_000_000_000);
        let mut n = Net { core: Network::new(c, now), fx: Mock::new(), now, isn: 0 };
        for port in [A, B] {
            n.core.add_port(port, port_config()).unwrap();
            n.hello(port);
        }
        n
    }

    /// The guest announces itself.
    pub fn hello(&mut self, port: PortId) {
        let me = guest_ip(port);
        self.send(port, arp_frame(arp::REQUEST, mac(port), me, Mac::BROADCAST, me));
        self.fx.frames.clear();
        self.fx.events.clear();
    }

    pub fn send(&mut self, port: PortId, frame: Vec<u8>) {
        self.send_meta(port, frame, FrameMeta::default());
    }

    pub fn send_meta(&mut self, port: PortId, mut frame: Vec<u8>, meta: FrameMeta) {
        self.core.frame(self.now, port, &mut frame, meta, &mut self.fx);
        self.core.batch_end(self.now, &mut self.fx);
    }

    /// Sends and takes what comes back.
    pub fn ask(&mut self, port: PortId, frame: Vec<u8>) -> Vec<Sent> {
        self.fx.frames.clear();
        self.send(port, frame);
        self.fx.take()
    }

    /// UDP from a guest to the outside (or whatever `to` is) by way of the gateway.
    pub fn udp(&mut self, port: PortId, from: u16, to: &str, payload: &[u8]) {
        self.send(port, udp_frame(port, from, addr(to), payload));
    }

    /// Lets time pass, timer by timer.
    pub fn pass_ms(&mut self, ms: u64) -> usize {
        let end = self.now.plus_ms(ms);
        let mut fired = 0;
        while let Some(t) = self.core.next_timer().filter(|t| *t <= end) {
            self.now = self.now.max(t);
            self.core.timers(self.now, &mut self.fx);
            fired += 1;
            assert!(fired < 100_000, "timers never rest");
        }
        self.now = end;
        fired
    }

    /// A guest opens a TCP connection, up to the last ACK of the handshake.
    #[track_caller]
    pub fn open_tcp(&mut self, port: PortId, from: u16, to: &str) -> (FlowId, SockId) {
        self.try_open_tcp(port, from, to).expect("a connect")
    }

    /// As [`Net::open_tcp`]; `None` when it is refused.
    pub fn try_open_tcp(&mut self, port: PortId, from: u16, to: &str) -> Option<(FlowId, SockId)> {
        let before = self.fx.connects.len();
        self.send(port, syn(port, from, to));
        self.fx.connects.get(before)?;
        Some(self.finish_tcp(port, from, to))
    }

    /// The server of the last connect answers, and so does the guest.
    pub fn finish_tcp(&mut self, port: PortId, from: u16, to: &str) -> (FlowId, SockId) {
        let (flow, sock) = *self.fx.connects.last().unwrap();
        self.fx.frames.clear();
        self.core.tcp_connected(self.now, flow, Ok(()), &mut self.fx);
        let isn = Tcp::parse(read(&self.fx.take()[0]).l4()).unwrap().seq;
        self.isn = isn;
        self.segment(port, from, to, 1001, isn.wrapping_add(1), guestnet_wire::tcp::flags::ACK);
        (flow, sock)
    }

    /// A TCP segment of a guest, without data.
    pub fn segment(&mut self, port: PortId, from: u16, to: &str, seq: u32, ack: u32, flags: u8) {
        let to = addr(to);
        let seg =
            Tcp { src_port: from, dst_port: to.port(), seq, ack, flags, window: 65535, ..Tcp::default() };
        self.send(port, tcp_frame(&Ip4::new(port, to.ip(), proto::TCP), &seg, &[]));
    }

    /// The states of all flows with the guest's port, in the order of the table.
    pub fn states(&self) -> Vec<(u16, &'static str)> {
        self.core.flows().map(|f| (f.guest.port(), f.state)).collect()
    }

    pub fn drops(&self, why: DropReason) -> u64 {
        self.core.counters().drops[why as usize]
    }

    pub fn all_drops(&self) -> u64 {
        self.core.counters().drops.iter().sum()
    }

    #[track_caller]
    pub fn dropped(&mut self, why: DropReason, f: impl FnOnce(&mut Net)) {
        let (one, all) = (self.drops(why), self.all_drops());
        f(self);
        let new = self.core.counters().drops;
        assert_eq!(
            (self.drops(why) - one, self.all_drops() - all),
            (1, 1),
            "want {why:?}, drops are {new:?}"
        );
    }

    /// The flow and socket opened last by a datagram or echo request.
    #[track_caller]
    pub fn opened(&self) -> (FlowId, SockId) {
        *self.fx.opened.last().expect("a socket was opened")
    }

    /// A datagram comes in on the flow's socket.
    pub fn udp_reply(&mut self, flow: FlowId, from: &str, payload: &[u8]) {
        self.core.udp_received(self.now, flow, addr(from), payload, 0, &mut self.fx);
    }

    pub fn events(&self, f: impl Fn(&Event) -> bool) -> usize {
        self.fx.events.iter().filter(|e| f(e)).count()
    }
}

pub fn eth(src: Mac, dst: Mac, ethertype: u16, body: &[u8]) -> Vec<u8> {
    let mut f = vec![0; 14];
    Ether { dst, src, ethertype }.emit(&mut f);
    f.extend_from_slice(body);
    f
}

pub fn arp_frame(op: u16, sha: Mac, spa: Ipv4Addr, dst: Mac, tpa: Ipv4Addr) -> Vec<u8> {
    let mut body = [0; arp::LEN];
    Arp { op, sha, spa, tha: Mac::default(), tpa }.emit(&mut body);
    eth(sha, dst, ether::ARP, &body)
}

/// An IPv4 packet from a guest in an Ethernet frame.
#[derive(Clone)]
pub struct Ip4 {
    pub mac: Mac,
    pub to_mac: Mac,
    pub src: Ipv4Addr,
    pub dst: Ipv4Addr,
    pub proto: u8,
    pub ttl: u8,
    pub tos: u8,
    pub id: u16,
    pub frag: u16,
}

impl Ip4 {
    pub fn new(port: PortId, dst: IpAddr, proto: u8) -> Ip4 {
        let IpAddr::V4(dst) = dst else { panic!("IPv4 only") };
        Ip4 {
            mac: mac(port),
            to_mac: GATEWAY_MAC,
            src: guest_ip(port),
            dst,
            proto,
            ttl: 64,
            tos: 0,
            id: 0x1234,
            frag: 0,
        }
    }

    pub fn frame(&self, l4: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 20];
        Ipv4 {
            src: self.src,
            dst: self.dst,
            proto: self.proto,
            ttl: self.ttl,
            tos: self.tos,
            id: self.id,
            frag: self.frag,
            payload_len: l4.len() as u16,
        }
        .emit(&mut packet);
        packet.extend_from_slice(l4);
        eth(self.mac, self.to_mac, ether::IPV4, &packet)
    }
}

pub fn udp_bytes(src: IpAddr, dst: IpAddr, from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    let mut b = vec![0; 8];
    b.extend_from_slice(payload);
    udp::emit(&mut b, src, dst, from, to);
    b
}

pub fn udp_frame(port: PortId, from: u16, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    udp_from(&Ip4::new(port, to.ip(), proto::UDP), from, to.port(), payload)
}

pub fn udp_from(h: &Ip4, from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    h.frame(&udp_bytes(IpAddr::V4(h.src), IpAddr::V4(h.dst), from, to, payload))
}

pub fn tcp_frame(h: &Ip4, seg: &Tcp, payload: &[u8]) -> Vec<u8> {
    let mut b = vec![0; 60];
    let n = seg.emit(&Options::default(), &mut b);
    b.truncate(n);
    b.extend_from_slice(payload);
    let s = checksum::pseudo(IpAddr::V4(h.src), IpAddr::V4(h.dst), proto::TCP, b.len() as u32);
    let c = checksum::finish(checksum::sum(&b, s));
    b[16..18].copy_from_slice(&c.to_be_bytes());
    h.frame(&b)
}

pub fn syn(port: PortId, from: u16, to: &str) -> Vec<u8> {
    let to = addr(to);
    let seg = Tcp {
        src_port: from,
        dst_port: to.port(),
        seq: 1000,
        flags: guestnet_wire::tcp::flags::SYN,
        window: 65535,
        ..Tcp::default()
    };
    tcp_frame(&Ip4::new(port, to.ip(), proto::TCP), &seg, &[])
}

pub fn echo_frame(port: PortId, to: &str, id: u16, seq: u16, ttl: u8, body: &[u8]) -> Vec<u8> {
    let h = Ip4 { ttl, ..Ip4::new(port, to.parse().unwrap(), proto::ICMP) };
    let (i, s) = (id.to_be_bytes(), seq.to_be_bytes());
    let mut b = vec![0; 8 + body.len()];
    icmp::emit(&mut b, icmp::ECHO, 0, [i[0], i[1], s[0], s[1]], body);
    h.frame(&b)
}

/// A frame that was sent, checked: headers, checksums, MACs.
pub struct Got {
    pub p: Packet,
    pub frame: Vec<u8>,
}

impl Got {
    pub fn l4(&self) -> &[u8] {
        &self.frame[self.p.l4..self.p.end]
    }
    pub fn payload(&self) -> &[u8] {
        &self.frame[self.p.payload..self.p.end]
    }
    pub fn src(&self) -> SocketAddr {
        SocketAddr::new(self.p.src, self.p.src_port)
    }
    pub fn dst(&self) -> SocketAddr {
        SocketAddr::new(self.p.dst, self.p.dst_port)
    }
    pub fn icmp(&self) -> (u8, u8) {
        (self.l4()[0], self.l4()[1])
    }
}

/// Reads a sent IPv4 frame as a guest's stack would; what is left to offload is completed first.
#[track_caller]
pub fn read(s: &Sent) -> Got {
    let mut frame = s.frame.clone();
    if let (Csum::Partial { start, offset }, None) = (s.meta.csum, s.meta.gso) {
        gso::complete_checksum(&mut frame, start, offset).unwrap();
    }
    let e = Ether::parse(&frame).unwrap();
    assert_eq!((e.dst, e.ethertype), (mac(s.port), ether::IPV4), "to the guest's MAC");
    let p = parse::parse_ip(&frame, 14).unwrap();
    assert!(parse::verify_ipv4_header(&frame, &p), "IPv4 checksum");
    if s.meta.gso.is_none() && p.fragment.is_none() {
        assert!(parse::verify_l4(&frame, &p), "transport checksum");
    }
    Got { p, frame }
}
