//! Theory of operation: the hot paths alone, for counting instructions: `hotpaths PATH COUNT` does one of them
//! COUNT times with a world that takes everything and keeps nothing. Two runs with different counts differ by
//! the instructions of the path and by nothing else (scripts/instructions.py). A path that did not do its work
//! ends with a failure, so that it cannot look fast. The example `rules` uses the same world.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use guestnet_core::Network;
use guestnet_core::NetworkConfig;
use guestnet_core::effects::{Close, Effects, Event, Peek, Peer, SockError, TxError};
use guestnet_core::nat::{NatDirection, NatEngine, NatEngineConfig, NatResult, Prefix};
use guestnet_core::policy::Isolated;
use guestnet_core::types::{Csum, FlowId, FrameMeta, IpFields, PortConfig, PortId, SockId, Target, Time};
use guestnet_wire::arp::{self, Arp};
use guestnet_wire::ether::{self, Ether, Mac};
use guestnet_wire::ipv4::{self, Ipv4};
use guestnet_wire::tcp::{Options, Tcp, flags};
use guestnet_wire::{be16, be32, checksum, proto, put, udp};
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;

pub const GATEWAY_MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 64, 1);
pub const REMOTE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
pub const EXTERNAL: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
pub const A: PortId = PortId(1);
pub const B: PortId = PortId(2);
pub const SEGMENT: usize = 1448;
/// Where the fields of a TCP header without options lie in a frame.
pub const SEQ: usize = 14 + 20 + 4;
pub const ACK: usize = SEQ + 4;

/// Takes everything; remembers what the guest has to be told.
#[derive(Default)]
pub struct World {
    flow: Option<FlowId>,
    /// The sequence number of the last TCP segment to the guest.
    seq: u32,
    /// Payload bytes that the next peeks find.
    waiting: usize,
    /// What went out, in whatever direction.
    moved: usize,
    /// The source port of the last packet that left by the uplink.
    external_port: u16,
}

impl Effects for World {
    fn transmit(&mut self, _: PortId, frame: &[u8], _: FrameMeta) -> Result<(), TxError> {
        self.moved += frame.len();
        if frame.len() > ACK && frame[23] == proto::TCP {
            self.seq = be32(frame, SEQ);
        }
        Ok(())
    }
    fn transmit_peeked(
        &mut self,
        _: PortId,
        header: &[u8],
        payload: Range<usize>,
        _: FrameMeta,
    ) -> Result<(), TxError> {
        self.moved += payload.len();
        self.seq = be32(header, SEQ);
        Ok(())
    }
    fn port_room(&mut self, _: PortId) -> usize {
        usize::MAX
    }
    fn uplink(&mut self, frame: &[u8], _: FrameMeta) -> Result<(), TxError> {
        self.moved += frame.len();
        self.external_port = be16(frame, 34);
        Ok(())
    }
    fn tcp_connect(&mut self, flow: FlowId, _: Target, _: IpFields, _: bool) -> Result<SockId, SockError> {
        self.flow = Some(flow);
        Ok(SockId(1))
    }
    fn tcp_send(&mut self, _: SockId, data: &[u8]) -> Result<usize, SockError> {
        self.moved += black_box(data).len();
        Ok(data.len())
    }
    fn tcp_held(&mut self, _: SockId) -> usize {
        0
    }
    fn tcp_tighten(&mut self, _: SockId, _: bool) {}
    fn tcp_tos(&mut self, _: SockId, _: u8) {}
    fn tcp_send_urgent(&mut self, _: SockId, _: u8) -> Result<bool, SockError> {
        self.moved += 1;
        Ok(true)
    }
    fn tcp_peek(&mut self, _: SockId, offset: usize, max: usize) -> Result<Peek, SockError> {
        match self.waiting.saturating_sub(offset).min(max) {
            0 => Ok(Peek::Empty),
            n => Ok(Peek::Data(n)),
        }
    }
    fn tcp_discard(&mut self, _: SockId, len: usize) {
        self.waiting -= len;
    }
    fn tcp_shutdown(&mut self, _: SockId) {}
    fn tcp_peer(&mut self, _: SockId) -> Option<Peer> {
        None
    }
    fn tcp_probe(&mut self, _: SockId) {}
    fn udp_open(&mut self, flow: FlowId, _: SocketAddr) -> Result<SockId, SockError> {
        self.flow = Some(flow);
        Ok(SockId(2))
    }
    fn udp_send(
        &mut self,
        _: SockId,
        _: SocketAddr,
        payload: &[u8],
        _: u16,
        _: IpFields,
        _: bool,
    ) -> Result<(), SockError> {
        self.moved += black_box(payload).len();
        Ok(())
    }
    fn udp_send_forward(&mut self, _: SockId, _: SocketAddr, _: &[u8]) -> Result<(), SockError> {
        Ok(())
    }
    fn ping_open(&mut self, _: FlowId, _: IpAddr) -> Result<SockId, SockError> {
        Err(SockError::Refused)
    }
    fn ping_send(&mut self, _: SockId, _: IpAddr, _: u16, _: &[u8], _: u8, _: bool) -> Result<(), SockError> {
        Err(SockError::Refused)
    }
    fn close(&mut self, _: SockId, _: Close) {}
    fn event(&mut self, _: Event) -> bool {
        true
    }
}

pub fn mac(port: PortId) -> Mac {
    Mac([2, 0, 0, 0, 1, port.0 as u8])
}

pub fn address(port: PortId) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 64, 10 + port.0 as u8)
}

pub fn ip_frame(to_mac: Mac, src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, l4: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 34];
    Ether { dst: to_mac, src: mac(A), ethertype: ether::IPV4 }.emit(&mut frame);
    let payload_len = l4.len() as u16;
    let head = Ipv4 { src, dst, proto: protocol, ttl: 64, tos: 0, id: 7, frag: ipv4::DF, payload_len };
    head.emit(&mut frame[14..]);
    frame.extend_from_slice(l4);
    frame
}

pub fn udp_frame(to_mac: Mac, src: Ipv4Addr, dst: Ipv4Addr, payload: usize) -> Vec<u8> {
    let mut l4 = vec![7; 8 + payload];
    udp::emit(&mut l4, src.into(), dst.into(), 4000, 5000);
    ip_frame(to_mac, src, dst, proto::UDP, &l4)
}

pub fn tcp_frame(seq: u32, ack: u32, bits: u8, payload: usize) -> Vec<u8> {
    let seg = Tcp { src_port: 4000, dst_port: 80, seq, ack, flags: bits, window: 65535, ..Tcp::default() };
    let mut l4 = vec![0; 60];
    let n = seg.emit(&Options::default(), &mut l4);
    l4.truncate(n);
    l4.resize(n + payload, 7);
    let pseudo = checksum::pseudo(address(A).into(), REMOTE.into(), proto::TCP, l4.len() as u32);
    let sum = checksum::finish(checksum::sum(&l4, pseudo));
    put(&mut l4, 16, &sum.to_be_bytes());
    ip_frame(GATEWAY_MAC, address(A), REMOTE, proto::TCP, &l4)
}

/// A path's name and what goes through it so many times; gives how often that was done.
type Path = (&'static str, fn(usize) -> usize);

pub struct Net {
    pub core: Network,
    pub fx: World,
    pub now: Time,
}

impl Net {
    #[allow(clippy::new_without_default)]
    pub fn new() -> Net {
        Net::with(NetworkConfig::new(GATEWAY_MAC, GATEWAY, (Ipv4Addr::new(192, 168, 64, 0), 24), [7; 32]))
    }

    pub fn with(config: NetworkConfig) -> Net {
        let now = Time(1_000_000_000);
        let mut net = Net { core: Network::new(config, now), fx: World::default(), now };
        for port in [A, B] {
            let port_config = PortConfig {
                mac: None,
                addresses: Vec::new(),
                mtu: 1500,
                gso_max: 0,
                lax_offload: false,
                uplink: false,
            };
            net.core.add_port(port, port_config).unwrap();
            let mut frame = vec![0; 14 + arp::LEN];
            Ether { dst: Mac::BROADCAST, src: mac(port), ethertype: ether::ARP }.emit(&mut frame);
            let (sha, spa) = (mac(port), address(port));
            Arp { op: arp::REQUEST, sha, spa, tha: Mac::default(), tpa: spa }.emit(&mut frame[14..]);
            net.frame(port, &mut frame, FrameMeta::default());
        }
        net
    }

    pub fn frame(&mut self, port: PortId, frame: &mut [u8], meta: FrameMeta) {
        self.core.frame(self.now, port, frame, meta, &mut self.fx);
        self.core.batch_end(self.now, &mut self.fx);
    }

    /// Opens a TCP flow; gives the number of the first byte that the guest will get.
    pub fn connect(&mut self) -> u32 {
        self.frame(A, &mut tcp_frame(999, 0, flags::SYN, 0), FrameMeta::default());
        let flow = self.fx.flow.expect("the SYN connects");
        self.core.tcp_connected(self.now, flow, Ok(()), &mut self.fx);
        let first = self.fx.seq.wrapping_add(1);
        self.frame(A, &mut tcp_frame(1000, first, flags::ACK, 0), FrameMeta::default());
        first
    }
}

/// The checksum was looked at by the guest's own host: the path without it, as on a TAP with offloads.
fn checked() -> FrameMeta {
    FrameMeta { csum: Csum::Valid, ..FrameMeta::default() }
}

fn tcp_up(count: usize) -> usize {
    let mut net = Net::new();
    let first = net.connect();
    let template = tcp_frame(1000, first, flags::ACK | flags::PSH, SEGMENT);
    let mut frame = template.clone();
    net.fx.moved = 0;
    for i in 0..count {
        frame.copy_from_slice(&template);
        put(&mut frame, SEQ, &(1000 + (i * SEGMENT) as u32).to_be_bytes());
        net.frame(A, &mut frame, checked());
    }
    net.fx.moved / SEGMENT
}

fn tcp_down(count: usize) -> usize {
    let mut net = Net::new();
    let first = net.connect();
    let flow = net.fx.flow.expect("a flow");
    let template = tcp_frame(1000, first, flags::ACK, 0);
    let mut frame = template.clone();
    net.fx.moved = 0;
    for i in 0..count {
        net.fx.waiting += SEGMENT;
        net.core.tcp_ready(net.now, flow, true, false, &mut net.fx);
        frame.copy_from_slice(&template);
        let ack = first.wrapping_add(((i + 1) * SEGMENT) as u32);
        put(&mut frame, ACK, &ack.to_be_bytes());
        net.frame(A, &mut frame, checked());
    }
    net.fx.moved / SEGMENT
}

fn udp_up(count: usize) -> usize {
    let mut net = Net::new();
    let template = udp_frame(GATEWAY_MAC, address(A), REMOTE, 1400);
    let mut frame = template.clone();
    net.fx.moved = 0;
    for _ in 0..count {
        frame.copy_from_slice(&template);
        net.frame(A, &mut frame, FrameMeta::default());
    }
    net.fx.moved / 1400
}

fn udp_down(count: usize) -> usize {
    let mut net = Net::new();
    net.frame(A, &mut udp_frame(GATEWAY_MAC, address(A), REMOTE, 64), FrameMeta::default());
    let flow = net.fx.flow.expect("a flow");
    let from = SocketAddr::from((REMOTE, 5000));
    let payload = vec![7; 1400];
    net.fx.moved = 0;
    for _ in 0..count {
        net.core.udp_received(net.now, flow, from, &payload, 0, &mut net.fx);
    }
    net.fx.moved / 1400
}

fn switch(count: usize) -> usize {
    let mut net = Net::new();
    let template = udp_frame(mac(B), address(A), address(B), 1400);
    let mut frame = template.clone();
    net.fx.moved = 0;
    for _ in 0..count {
        frame.copy_from_slice(&template);
        net.frame(A, &mut frame, FrameMeta::default());
    }
    net.fx.moved / template.len()
}

/// New TCP flows of a guest, each up to its connect.
fn tcp_open(count: usize) -> usize {
    let mut net = Net::new();
    let template = tcp_frame(999, 0, flags::SYN, 0);
    let mut frame = template.clone();
    for i in 0..count {
        frame.copy_from_slice(&template);
        put(&mut frame, SEQ - 4, &(1024 + i as u16).to_be_bytes());
        net.frame(A, &mut frame, checked());
    }
    net.core.flows().count()
}

/// New sessions of the NAT engine.
fn tun_open(count: usize) -> usize {
    let mut net = tunnel();
    let template = udp_frame(GATEWAY_MAC, address(A), REMOTE, 64);
    let mut frame = template.clone();
    for i in 0..count {
        frame.copy_from_slice(&template);
        put(&mut frame, SEQ - 4, &(1024 + i as u16).to_be_bytes());
        net.frame(A, &mut frame, checked());
    }
    net.core.flows().count()
}

/// Frames between guests that rules are asked about: a conversation that was admitted.
fn switch_judged(count: usize) -> usize {
    let mut config = NetworkConfig::new(GATEWAY_MAC, GATEWAY, (Ipv4Addr::new(192, 168, 64, 0), 24), [7; 32]);
    config.isolated = Isolated::AllExcept(Arc::new([A].into()));
    let mut net = Net::with(config);
    let template = udp_frame(mac(B), address(A), address(B), 1400);
    let mut frame = template.clone();
    net.fx.moved = 0;
    for _ in 0..count {
        frame.copy_from_slice(&template);
        net.frame(A, &mut frame, FrameMeta::default());
    }
    net.fx.moved / template.len()
}

fn nat(count: usize) -> usize {
    let mut config = NatEngineConfig::new(EXTERNAL);
    config.internal = Prefix::new(Ipv4Addr::new(192, 168, 64, 0), 24).expect("a prefix");
    config.secret = [7; 32];
    let mut engine = NatEngine::new(config).expect("an engine");
    let template = udp_frame(GATEWAY_MAC, address(A), REMOTE, 1400).split_off(14);
    let mut packet = template.clone();
    let mut done = 0;
    for _ in 0..count {
        packet.copy_from_slice(&template);
        let result = engine.translate(&mut packet, NatDirection::Outbound, Time(1));
        done += usize::from(result == NatResult::Translated);
    }
    done
}

fn tunnel() -> Net {
    let mut net = Net::new();
    net.core.set_uplink(NatEngineConfig::new(EXTERNAL)).expect("an uplink");
    net
}

fn tun_up(count: usize) -> usize {
    let mut net = tunnel();
    let template = udp_frame(GATEWAY_MAC, address(A), REMOTE, 1400);
    let mut frame = template.clone();
    for _ in 0..count {
        frame.copy_from_slice(&template);
        net.frame(A, &mut frame, checked());
    }
    net.fx.moved / template.len()
}

fn tun_down(count: usize) -> usize {
    let mut net = tunnel();
    net.frame(A, &mut udp_frame(GATEWAY_MAC, address(A), REMOTE, 64), checked());
    let mut l4 = vec![7; 8 + 1400];
    udp::emit(&mut l4, REMOTE.into(), EXTERNAL.into(), 5000, net.fx.external_port);
    let template = ip_frame(GATEWAY_MAC, REMOTE, EXTERNAL, proto::UDP, &l4);
    let mut frame = template.clone();
    net.fx.moved = 0;
    for _ in 0..count {
        frame.copy_from_slice(&template);
        net.core.uplink_packet(net.now, &mut frame, checked(), &mut net.fx);
    }
    net.fx.moved / template.len()
}

fn sums(count: usize) -> usize {
    let data = vec![0x5a; 1500];
    (0..count).filter(|_| checksum::checksum(black_box(&data)) != 0).count()
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let paths: [Path; 12] = [
        ("tcp_up", tcp_up),
        ("tcp_down", tcp_down),
        ("udp_up", udp_up),
        ("udp_down", udp_down),
        ("switch", switch),
        ("switch_judged", switch_judged),
        ("tcp_open", tcp_open),
        ("nat", nat),
        ("tun_open", tun_open),
        ("tun_up", tun_up),
        ("tun_down", tun_down),
        ("checksum", sums),
    ];
    let (Some(path), Some(count)) = (args.get(1), args.get(2).and_then(|n| n.parse().ok())) else {
        println!("{}", paths.map(|(name, _)| name).join("\n"));
        return;
    };
    let (_, run) = paths.iter().find(|(name, _)| name == path).expect("one of the paths");
    let done = run(count);
    assert!(done >= count, "{path}: {done} of {count} were done");
}
