//! Theory of operation: the input is a little program for the whole core. Each step is an operation byte and
//! its arguments: a raw frame from a guest, a TCP segment that continues a conversation the guest has, data
//! or an end or an error on a host socket, a client at a Forward, a port that fills up or goes, time that
//! passes. The mock world of the core's own tests keeps the contract of `Effects` and fails on any breach
//! (use after close, peek past the end, send after shutdown). Rules about names come and go, and guests speak TLS, HTTP
//! and QUIC under them: what a server got while one policy held must show allowed names only. What goes to a guest must be readable, cut as it
//! asks to be, and never say what only a gateway may say. At the end all that is open must expire.
#![no_main]

#[path = "../../crates/guestnet-core/tests/common/mod.rs"]
mod common;

use common::{Mock, Sent, SentDatagram};
use guestnet_core::config::{DatagramError, ForwardSpec, Limits, NameServers, NetworkConfig};
use guestnet_core::{DnsVerdict, Network};
use guestnet_core::effects::{Event, SockError};
use guestnet_core::policy::shaping::LimitSpec;
use guestnet_core::policy::spec::{
    Action, Destination, Name, NameMatch, NamePattern, PolicyOptions, PolicySpec, RuleDirection, RuleSpec,
};
use guestnet_core::policy::table::RuleTable;
use guestnet_core::types::{Csum, ForwardId, FrameMeta, Gso, PortConfig, PortId, ServiceId, SockId, Target, Time};
use guestnet_wire::dns::Record;
use guestnet_wire::ether::{self, Ether, Mac};
use guestnet_wire::inspect::{HttpInspector, HttpProgress, Progress, StreamInspector};
use guestnet_wire::ipv4::{self, Ipv4};
use guestnet_wire::tcp::{Options, Tcp};
use guestnet_wire::{parse, proto, gso, udp};
use libfuzzer_sys::fuzz_target;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;

const GATEWAY_MAC: Mac = Mac([0x52, 0x94, 0xef, 0, 0, 1]);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 64, 1);
const MTU: u16 = 1500;
const FLOWS: u32 = 64;
/// Room for a few answers.
const NAME_BYTES: usize = 2000;
/// Ports: one that takes no large frames, one that does, and one whose guest leaves work undone without
/// saying so.
const PORTS: u8 = 3;
/// Steps of one input; more adds time and no new states.
const STEPS: usize = 400;

fn guest_mac(port: u8) -> Mac {
    Mac([0x52, 0x94, 0xef, 0, 0, 2 + port])
}

fn guest_ip(port: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 64, 2 + port)
}

/// The arguments, read from the front; zeros when they run out.
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

fn outside(choice: u8) -> SocketAddr {
    SocketAddr::from(([203, 0, 113, 2 + (choice & 3)], 7 + u16::from(choice >> 2)))
}

fn name_server() -> SocketAddr {
    SocketAddr::from(([203, 0, 113, 53], 53))
}

fn error(choice: u8) -> SockError {
    match choice % 9 {
        0 => SockError::Refused,
        1 => SockError::Reset,
        2 => SockError::NetUnreachable,
        3 => SockError::HostUnreachable,
        4 => SockError::TimedOut,
        5 => SockError::Prohibited,
        6 => SockError::MessageTooBig(u16::from(choice) * 8),
        7 => SockError::Exhausted,
        _ => SockError::Other(i32::from(choice)),
    }
}

struct World {
    core: Network,
    fx: Mock,
    now: Time,
    /// Bytes of a long payload, so that lengths can grow without long inputs.
    filler: Vec<u8>,
    /// The last TCP header that went to a guest, by the guest's port: what an answer continues.
    heard: Vec<(PortId, SocketAddr, SocketAddr, Tcp, u32)>,
    /// The clock of the last timestamp that went to a guest.
    clock: u32,
    /// Which rules hold, and how often they have changed.
    rules: u8,
    changes: usize,
    /// How often they had changed when each connection was opened.
    opened_under: Vec<usize>,
}

/// Rules about names: nothing is allowed but one name, or everything but one.
fn rules(choice: u8) -> Option<Arc<RuleTable>> {
    let name = |text: &str| Destination::Name(NamePattern::Exact(Name::new(text.as_bytes()).unwrap()));
    let rule = |action, destination| RuleSpec {
        label: "names".into(),
        action,
        direction: RuleDirection::Out,
        endpoints: None,
        from: vec![],
        destination,
        ports: vec![],
        by: NameMatch::Conversation,
        log: false,
        limit: (choice & 4 != 0).then_some(limit(choice)),
        all_query_types: false,
    };
    let (default, rules) = match choice & 3 {
        0 => return None,
        1 => (Action::Deny, vec![rule(Action::Allow, name("ok.example"))]),
        2 => (Action::Allow, vec![rule(Action::Deny, name("bad.example"))]),
        _ => (Action::Deny, vec![]),
    };
    let spec = PolicySpec { rules, default, options: PolicyOptions::default() };
    Some(Arc::new(RuleTable::compile(spec).unwrap()))
}

/// A limit of which each part may be missing.
fn limit(choice: u8) -> LimitSpec {
    let part = |bit: u8, most: u64| (choice & bit != 0).then_some(most);
    LimitSpec {
        up: part(8, 20_000),
        down: part(16, 20_000),
        packets_up: part(32, 50),
        packets_down: part(32, 50),
        new_flows: part(64, 5),
        open_flows: (choice & 128 != 0).then_some(10),
        queries: part(64, 5),
        total: part(128, 100_000),
    }
}

/// Whether rules allow a name that a conversation shows.
fn allows(choice: u8, name: Option<&[u8]>) -> bool {
    match choice & 3 {
        1 => name == Some(b"ok.example"),
        2 => name != Some(b"bad.example"),
        _ => true,
    }
}

/// A ClientHello for a name, which offers TLS 1.3.
fn hello(name: &str) -> Vec<u8> {
    let len = name.len() as u16;
    let sni = [&(len + 3).to_be_bytes()[..], &[0], &len.to_be_bytes(), name.as_bytes()].concat();
    let mut extensions = [&[0, 43, 0, 3, 2, 3, 4, 0, 0][..], &(sni.len() as u16).to_be_bytes(), &sni].concat();
    extensions.splice(..0, (extensions.len() as u16).to_be_bytes());
    let body = [&[3, 3][..], &[7; 32], &[0, 0, 2, 0x13, 1, 1, 0], &extensions].concat();
    let message = [&[1, 0][..], &(body.len() as u16).to_be_bytes(), &body].concat();
    [&[22, 3, 1][..], &(message.len() as u16).to_be_bytes(), &message].concat()
}

/// What guests say under rules about names.
fn line(choice: u8) -> Vec<u8> {
    match choice % 10 {
        0 => hello("ok.example"),
        1 => hello("bad.example"),
        2 => vec![20, 3, 3, 0, 1, 1],
        3 => [&[23, 3, 3, 0, 40][..], &[9; 40]].concat(),
        4 => b"GET / HTTP/1.1\r\nHost: ok.example\r\n\r\n".to_vec(),
        5 => b"GET / HTTP/1.1\r\nHost: bad.example\r\n\r\n".to_vec(),
        6 => b"POST / HTTP/1.1\r\nHost: ok.example\r\nContent-Length: 40\r\n\r\n".to_vec(),
        7 => b"POST / HTTP/1.1\r\nHost: ok.example\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n".to_vec(),
        8 => b"SSH-2.0-x\r\n".to_vec(),
        _ => b"\r\n0\r\n\r\n".to_vec(),
    }
}

/// First flights of QUIC clients.
fn flight(choice: u8) -> &'static [u8] {
    macro_rules! data {
        ($name:literal) => {
            &include_bytes!(concat!("../../crates/guestnet-core/tests/inspection_support/quic/", $name, ".bin"))[..]
        };
    }
    match choice % 7 {
        0 => data!("small"),
        1 => data!("first_half"),
        2 => data!("large_0"),
        3 => data!("large_1"),
        4 => data!("after_retry"),
        5 => data!("conflict"),
        _ => data!("v1_0"),
    }
}

impl World {
    fn new() -> World {
        let mut config = NetworkConfig::new(GATEWAY_MAC, GATEWAY, (Ipv4Addr::new(192, 168, 64, 0), 24), [7; 32]);
        config.host_loopback = Some(IpAddr::from([192, 168, 64, 254]));
        config.limits = Limits {
            flows: FLOWS,
            flows_per_port: 24,
            udp_sockets_per_port: 8,
            buffer_per_port: 128 << 10,
            reassembly_bytes: 64 << 10,
            name_bytes: NAME_BYTES,
            ..Limits::default()
        };
        let mut world = World {
            core: Network::new(config, Time(1)),
            fx: Mock::new(),
            now: Time(1),
            filler: (0..70_000u32).map(|i| i as u8).collect(),
            heard: Vec::new(),
            clock: 0,
            rules: 0,
            changes: 0,
            opened_under: Vec::new(),
        };
        for port in 0..PORTS {
            world.add_port(port);
        }
        world.core.add_service(ServiceId(1), proto::UDP, IpAddr::V4(GATEWAY), 67);
        world.core.add_service(ServiceId(2), proto::UDP, IpAddr::V4(GATEWAY), 53);
        world.core.add_service(ServiceId(3), proto::TCP, IpAddr::V4(GATEWAY), 53);
        for (id, proto) in [(1, proto::TCP), (2, proto::UDP)] {
            let guest = SocketAddr::from((guest_ip(0), 80));
            world.core.add_forward(ForwardId(id), ForwardSpec::published(proto, guest));
        }
        world
    }

    fn add_port(&mut self, n: u8) {
        let config = PortConfig {
            mac: (n == 0).then(|| guest_mac(n)),
            addresses: vec![IpAddr::V4(guest_ip(n))],
            mtu: MTU,
            gso_max: if n == 1 { 65000 } else { 0 },
            lax_offload: n == 2,
            uplink: false,
        };
        self.fx.port(PortId(u32::from(n))).gone = false;
        // The address may be assigned to another port by now.
        let _refused = self.core.add_port(PortId(u32::from(n)), config);
    }

    fn frame(&mut self, port: PortId, frame: &mut [u8], meta: FrameMeta) {
        self.core.frame(self.now, port, frame, meta, &mut self.fx);
        self.listen();
    }

    /// What went to guests: every frame must be one that a guest can read, and no larger than was agreed.
    fn listen(&mut self) {
        for sent in self.fx.take() {
            let e = Ether::parse(&sent.frame).expect("a frame without a header was sent");
            pieces(&sent, e.src == GATEWAY_MAC);
            if e.src != GATEWAY_MAC {
                assert!(!is_gateway_talk(&sent.frame), "a guest was let say what only a router says");
            }
            if e.ethertype != ether::IPV4 || e.src != GATEWAY_MAC {
                continue;
            }
            let p = parse::parse_ip(&sent.frame, ether::HEADER_LEN).expect("an unreadable packet was sent");
            assert!(parse::verify_ipv4_header(&sent.frame, &p), "a wrong header checksum was sent");
            assert_eq!(p.end, sent.frame.len());
            assert!(
                sent.meta.gso.is_some() || p.end - p.l3 <= usize::from(MTU),
                "a packet over the MTU was sent whole"
            );
            if sent.meta.csum == Csum::Full && sent.meta.gso.is_none() && p.fragment.is_none() {
                assert!(parse::verify_l4(&sent.frame, &p), "a wrong transport checksum was sent");
            }
            if p.proto == proto::TCP && p.fragment.is_none() {
                let tcp = Tcp::parse(&sent.frame[p.l4..p.end]).expect("an unreadable segment was sent");
                let options = Options::parse(&sent.frame[p.l4 + 20..p.payload]);
                self.clock = options.timestamps.map_or(self.clock, |t| t.0);
                let from = SocketAddr::new(p.src, p.src_port);
                let to = SocketAddr::new(p.dst, p.dst_port);
                let used =
                    (p.end - p.payload) as u32 + u32::from(tcp.flags & 1) + u32::from(tcp.flags >> 1 & 1);
                self.heard.retain(|h| (h.1, h.2) != (to, from));
                self.heard.push((sent.port, to, from, tcp, used));
                if self.heard.len() > 32 {
                    self.heard.remove(0);
                }
            }
        }
    }

    /// A segment that continues a conversation: acknowledges what was heard, give or take.
    fn answer(&mut self, input: &mut Input<'_>) {
        let (which, flags, len) = (usize::from(input.u8()), input.u8(), input.u16());
        let (seq_off, ack_off, window) = (input.u8() as i8, input.u8() as i8, input.u16());
        if self.heard.is_empty() {
            return;
        }
        let (port, from, to, tcp, used) = self.heard[which % self.heard.len()];
        let (SocketAddr::V4(from), SocketAddr::V4(to)) = (from, to) else { return };
        let payload = usize::from(len % 1461);
        // The upper bits of the length: whether there are options, and which.
        let mut options = self.options(len >> 11);
        if flags & 0x40 != 0 {
            // A block somewhere in what was heard of the stream.
            let left = tcp.seq.wrapping_add_signed(i32::from(ack_off) * 64);
            options.sack.push(left, left.wrapping_add_signed(i32::from(seq_off) * 16));
        }
        let segment = Tcp {
            src_port: from.port(),
            dst_port: to.port(),
            seq: tcp.ack.wrapping_add_signed(i32::from(seq_off)),
            ack: tcp.seq.wrapping_add(used).wrapping_add_signed(i32::from(ack_off)),
            flags,
            window,
            urgent: u16::from(flags & 0x20 != 0) * 3,
            header_len: 20,
        };
        self.segment(port, from, to, &segment, &options, payload);
    }

    /// Options of a guest; the lowest bit asks for a timestamp.
    fn options(&self, bits: u16) -> Options {
        let timestamp = || u32::from(bits).wrapping_mul(0x1fff_ffff).wrapping_add(self.now.as_ms() as u32);
        Options {
            mss: (bits & 8 != 0).then_some(bits << 4),
            wscale: (bits & 4 != 0).then_some((bits & 15) as u8),
            sack_permitted: bits & 2 != 0,
            timestamps: (bits & 1 != 0).then(|| (timestamp(), self.clock)),
            ..Options::default()
        }
    }

    fn segment(
        &mut self,
        port: PortId,
        from: SocketAddrV4,
        to: SocketAddrV4,
        tcp: &Tcp,
        options: &Options,
        payload: usize,
    ) {
        let filler = std::mem::take(&mut self.filler);
        self.segment_of(port, from, to, tcp, options, &filler[..payload]);
        self.filler = filler;
    }

    fn segment_of(
        &mut self,
        port: PortId,
        from: SocketAddrV4,
        to: SocketAddrV4,
        tcp: &Tcp,
        options: &Options,
        payload: &[u8],
    ) {
        let mut header = [0u8; 60];
        let n = tcp.emit(options, &mut header);
        let mut frame = vec![0u8; ether::HEADER_LEN + 20 + n + payload.len()];
        let mac = guest_mac(port.0 as u8);
        Ether { dst: GATEWAY_MAC, src: mac, ethertype: ether::IPV4 }.emit(&mut frame);
        let ip = Ipv4 {
            src: *from.ip(),
            dst: *to.ip(),
            proto: proto::TCP,
            ttl: 64,
            tos: 0,
            id: 1,
            frag: ipv4::DF,
            payload_len: (n + payload.len()) as u16,
        };
        ip.emit(&mut frame[ether::HEADER_LEN..]);
        frame[ether::HEADER_LEN + 20..][..n].copy_from_slice(&header[..n]);
        frame[ether::HEADER_LEN + 20 + n..].copy_from_slice(payload);
        self.frame(port, &mut frame, FrameMeta { csum: Csum::Valid, gso: None });
    }

    /// A guest opens a connection; the host may take it at once.
    fn open(&mut self, input: &mut Input<'_>) {
        let (what, to, bits, seq) = (input.u8(), input.u8(), input.u16(), input.u16());
        let n = what % PORTS;
        let from = SocketAddrV4::new(guest_ip(n), 1024 + u16::from(what >> 5));
        let SocketAddr::V4(to) = outside(to) else { return };
        let tcp = Tcp {
            src_port: from.port(),
            dst_port: to.port(),
            // Also where numbers wrap around.
            seq: u32::from(seq).wrapping_shl(16).wrapping_sub(300),
            flags: 2,
            window: bits.rotate_left(5),
            header_len: 20,
            ..Tcp::default()
        };
        let before = self.fx.connects.len();
        let options = self.options(bits);
        self.segment(PortId(u32::from(n)), from, to, &tcp, &options, usize::from(bits & 7));
        if what & 16 != 0 && self.fx.connects.len() > before {
            let (flow, _) = self.fx.connects[before];
            self.core.tcp_connected(self.now, flow, Ok(()), &mut self.fx);
        }
    }

    /// A published port goes, comes back, or leads elsewhere.
    fn publish(&mut self, input: &mut Input<'_>) {
        let what = input.u8();
        let (id, proto) = if what & 1 == 0 { (1, proto::TCP) } else { (2, proto::UDP) };
        if what & 2 != 0 {
            self.core.remove_forward(self.now, ForwardId(id), &mut self.fx);
        }
        if what & 12 != 0 {
            let guest = SocketAddr::from((guest_ip((what >> 4) % (PORTS + 1)), 80));
            self.core.add_forward(ForwardId(id), ForwardSpec::published(proto, guest));
        }
    }

    fn raw(&mut self, input: &mut Input<'_>) {
        let (flags, len) = (input.u8(), input.u16() % 2048);
        let port = PortId(if flags & 64 != 0 { 2 } else { u32::from(flags & 1) });
        let mut frame = input.bytes(usize::from(len)).to_vec();
        if flags & 2 != 0 && frame.len() >= ether::HEADER_LEN + 20 {
            ipv4::fill_checksum(&mut frame[ether::HEADER_LEN..]);
        }
        let csum = match flags >> 2 & 3 {
            0 => Csum::Full,
            3 => Csum::Partial { start: input.u16() & 0xff, offset: u16::from(input.u8() & 31) },
            _ => Csum::Valid,
        };
        let gso = match flags >> 4 & 3 {
            1 => Some(Gso::Tcp(input.u16())),
            2 => Some(Gso::Udp(input.u16())),
            _ => None,
        };
        self.frame(port, &mut frame, FrameMeta { csum, gso });
    }

    /// Something happens to a TCP socket that the core opened.
    fn socket(&mut self, input: &mut Input<'_>) {
        let (which, what, len) = (usize::from(input.u8()), input.u8(), input.u16());
        if self.fx.connects.is_empty() {
            return;
        }
        let (flow, id) = self.fx.connects[which % self.fx.connects.len()];
        let s = self.fx.sock(id);
        if what & 1 != 0 {
            s.inbox.extend(&self.filler[..usize::from(len)]);
        }
        s.eof |= what & 2 != 0;
        if what & 4 != 0 {
            s.send_room = Some(usize::from(len));
        }
        if what & 8 != 0 {
            s.send_room = None;
        }
        if what & 0x70 == 0x70 {
            s.peek_error = Some(error(len as u8));
            s.send_error = s.peek_error;
        }
        let (readable, writable) =
            (what & 3 != 0 || what & 0x70 == 0x70, what & 8 != 0 || what & 0x70 == 0x70);
        self.core.tcp_ready(self.now, flow, readable, writable, &mut self.fx);
    }

    fn datagram(&mut self, input: &mut Input<'_>) {
        let (which, what, from, len) = (usize::from(input.u8()), input.u8(), input.u8(), input.u16());
        if self.fx.opened.is_empty() {
            return;
        }
        let (flow, _) = self.fx.opened[which % self.fx.opened.len()];
        let from = match self.fx.datagrams.last() {
            Some(last) if what & 1 == 0 => last.dst,
            _ => outside(from),
        };
        let payload = &self.filler[..usize::from(len).min(65507)];
        let segment = if what & 2 != 0 { (len / 3).max(1) } else { 0 };
        match what >> 2 & 3 {
            0 | 1 => self.core.udp_received(self.now, flow, from, payload, segment, &mut self.fx),
            2 => {
                let seq = self.fx.pings.last().map_or(len, |p| p.seq);
                let payload = &payload[..payload.len().min(1400)];
                self.core.ping_received(self.now, flow, from.ip(), seq, what, payload, &mut self.fx);
            }
            _ => {
                let e = DatagramError {
                    kind: error(len as u8),
                    offender: (what & 16 == 0).then(|| from.ip()),
                    icmp_type: what >> 5,
                    icmp_code: len as u8,
                    mtu: len,
                    dst: from,
                    seq: len,
                    payload: &payload[..payload.len().min(600)],
                };
                self.core.sock_error(self.now, flow, e, &mut self.fx);
            }
        }
    }

    fn client(&mut self, input: &mut Input<'_>) {
        let (what, peer, len) = (input.u8(), input.u8(), input.u16());
        let peer = outside(peer);
        if what & 1 == 0 {
            let sock = self.fx.new_sock();
            let forward = ForwardId(1 + u32::from(what >> 1 & 1) * 8);
            match self.core.tcp_accepted(self.now, forward, sock, peer, &mut self.fx) {
                Some(flow) => self.fx.connects.push((flow, sock)),
                None => drop(self.fx.socks.remove(&sock)),
            }
        } else {
            let payload = &self.filler[..usize::from(len).min(65507)];
            let segment = if what & 2 != 0 { (len / 3).max(1) } else { 0 };
            let sock = SockId(0xffff);
            let f = ForwardId(2);
            self.core.udp_forward_received(self.now, f, sock, peer, payload, segment, &mut self.fx);
        }
    }

    fn port(&mut self, input: &mut Input<'_>) {
        let (what, room) = (input.u8(), input.u16());
        let n = if what & 16 != 0 { 2 } else { what & 1 };
        let port = PortId(u32::from(n));
        match what >> 1 & 7 {
            0 | 1 => self.fx.port(port).room = usize::from(room),
            2 | 3 => {
                self.fx.port(port).room = usize::MAX;
                self.core.port_writable(self.now, port, &mut self.fx);
            }
            4 => {
                self.fx.port(port).gone = true;
                self.core.remove_port(self.now, port, &mut self.fx);
            }
            5 => self.add_port(n),
            6 => drop(self.core.bind_address(port, IpAddr::from([192, 168, 64, room as u8]), None)),
            _ => self.core.unbind_address(self.now, IpAddr::from([192, 168, 64, room as u8]), &mut self.fx),
        }
    }

    /// Lets time pass and does what is due on the way. A timer that stays due is a loop without end.
    fn pass(&mut self, ms: u64) {
        let until = self.now.plus_ms(ms);
        for _ in 0..100_000 {
            match self.core.next_timer() {
                Some(at) if at <= until => {
                    self.now = self.now.max(at);
                    self.core.timers(self.now, &mut self.fx);
                    self.listen();
                }
                _ => {
                    self.now = until;
                    return;
                }
            }
        }
        panic!("the core's timers never come to rest: next {:?}, now {:?}", self.core.next_timer(), self.now);
    }

    /// A guest asks for a name, a name server answers, or the DNS service says what it knows. Messages are good
    /// ones, with bytes changed.
    fn names(&mut self, what: u8, input: &mut Input<'_>) {
        let (n, edits) = (input.u8(), input.u8() % 4);
        let mut change = |message: &mut Vec<u8>| {
            for _ in 0..edits {
                let (at, byte) = (usize::from(input.u8()), input.u8());
                match message.get_mut(at) {
                    Some(b) => *b = byte,
                    None => message.push(byte),
                }
            }
        };
        let top = if n & 1 == 0 { *b"\x03own\0" } else { *b"\x03far\0" };
        let mut query = vec![0, n, 1, 0, 0, 1, 0, 0, 0, 0, 0, n >> 1 & 1, 2, b'n', n >> 2];
        query.extend_from_slice(&top);
        query.extend_from_slice(&[0, 1, 0, 1]);
        let mut answer = query.clone();
        answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 2, 0, 0, 0, 0]);
        answer.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, n].repeat(2));
        if n & 2 != 0 {
            query.extend_from_slice(&[0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
        }
        let port = PortId(u32::from(what & 1));
        let generation = u64::from(n >> 6);
        match what >> 1 & 3 {
            0 => {
                change(&mut query);
                let (guest, mac) = (guest_ip(port.0 as u8), guest_mac(port.0 as u8));
                let mut frame = vec![0u8; ether::HEADER_LEN + 28];
                frame.extend_from_slice(&query);
                Ether { dst: GATEWAY_MAC, src: mac, ethertype: ether::IPV4 }.emit(&mut frame);
                let (proto, payload_len) = (proto::UDP, 8 + query.len() as u16);
                let (ttl, tos, id, frag) = (64, 0, 1, ipv4::DF);
                let ip = Ipv4 { src: guest, dst: GATEWAY, proto, ttl, tos, id, frag, payload_len };
                ip.emit(&mut frame[ether::HEADER_LEN..]);
                let l4 = &mut frame[ether::HEADER_LEN + 20..];
                udp::emit(l4, IpAddr::V4(guest), IpAddr::V4(GATEWAY), 4000, 53);
                self.frame(port, &mut frame, FrameMeta { csum: Csum::Valid, gso: None });
            }
            1 => {
                let server = name_server();
                // Guests may send there too; the sockets of questions are of no flow in the table.
                let flow =
                    |d: &SentDatagram| self.fx.socks.get(&d.sock)?.flow.filter(|f| f.index == u32::MAX);
                let asked = self.fx.datagrams.iter().rev().find_map(|d| Some((flow(d)?, d)));
                let Some((flow, asked)) = asked else { return };
                answer.splice(..2, asked.payload.iter().take(2).copied());
                if n & 2 != 0 {
                    // The very question, and not one like it.
                    let end = asked.payload.len() - 11;
                    answer.splice(12..answer.len() - 32, asked.payload[12..end].iter().copied());
                }
                change(&mut answer);
                let segment = if what & 1 != 0 { u16::from(n) } else { 0 };
                self.core.udp_received(self.now, flow, server, &answer, segment, &mut self.fx);
            }
            2 => {
                let question = self.fx.events.iter().rev().find_map(|e| match e {
                    Event::DnsQuestion { ticket, .. } => Some(*ticket),
                    _ => None,
                });
                let name = query[12..query.len().min(19)].into();
                let data = Box::from([192, 0, 2, n]);
                let record = Record { name, kind: u16::from(n >> 3), ttl: 60, data };
                let verdict = match what & 8 {
                    0 => DnsVerdict::Forward,
                    _ => DnsVerdict::Own {
                        rcode: u16::from(n & 3),
                        answers: vec![record.clone(); usize::from(n & 3)],
                        authority: vec![record; usize::from(n >> 2 & 1)],
                        searched: (n & 16 != 0).then(|| Box::from(&b"\x01x\0"[..])),
                        target: (n & 32 != 0).then(|| Box::from(&b"\x02nn\x03far\0"[..])),
                    },
                };
                let ticket = question.unwrap_or(u64::from(n));
                self.core.dns_verdict(self.now, ticket, generation, verdict, &mut self.fx);
            }
            _ => match n & 7 {
                0 => self.core.set_dns_zones(ServiceId(2), generation, vec![top.into()]),
                1 => self.core.forget_guest_names(generation),
                2 | 3 => {
                    // A connection of a guest.
                    change(&mut query);
                    let length = query.len() as u16;
                    let data = [&length.to_be_bytes()[..], &query].concat().repeat(1 + usize::from(n >> 6));
                    let sock = SockId(u32::from(n >> 3 & 3) | 1 << 31);
                    let read = self.core.stream_received(
                        self.now,
                        port,
                        sock,
                        &data,
                        n & 32 != 0,
                        &mut self.fx,
                    );
                    assert!(read <= data.len());
                }
                4 => self.core.stream_gone(SockId(u32::from(n >> 3 & 3) | 1 << 31)),
                _ => {
                    let servers = NameServers {
                        servers: vec![name_server(); usize::from(n >> 3 & 1)],
                        timeout_ms: 1000,
                        attempts: 1 + u32::from(n >> 4 & 1),
                        rotate: n & 32 != 0,
                        use_tcp: n & 64 != 0,
                    };
                    self.core.set_name_servers(self.now, servers);
                }
            },
        }
        let (_, bytes, outstanding, connections) = self.core.dns_holds();
        assert!(bytes <= NAME_BYTES && outstanding <= 1024 + 16 && connections <= 256);
    }

    /// Rules about names change, a guest gets an address for a name, or speaks under the rules.
    fn speak(&mut self, input: &mut Input<'_>) {
        let (what, choice, cut) = (input.u8(), input.u8(), input.u8());
        let n = what >> 3 & 1;
        let port = PortId(u32::from(n));
        match what & 7 {
            0 => {
                self.rules = choice;
                self.changes += 1;
                self.core.set_rules(self.now, None, rules(choice));
                let of = (cut & 1 == 0).then_some(port);
                let _no_port = self.core.set_limit(self.now, of, (cut & 6 == 6).then(|| limit(cut)));
            }
            1 => {
                let name: &[u8] = if choice & 1 == 0 { b"ok.example" } else { b"large.example" };
                let life = u32::from(cut);
                self.core.note_pin(self.now, port, outside(choice >> 1).ip(), name, life);
            }
            2 => {
                let payload = flight(choice);
                let mut frame = vec![0u8; ether::HEADER_LEN + 28];
                frame.extend_from_slice(payload);
                Ether { dst: GATEWAY_MAC, src: guest_mac(n), ethertype: ether::IPV4 }.emit(&mut frame);
                let (src, to) = (guest_ip(n), outside(cut));
                let (IpAddr::V4(dst), payload_len) = (to.ip(), 8 + payload.len() as u16) else { return };
                let ip = Ipv4 { src, dst, proto: proto::UDP, ttl: 64, tos: 0, id: 1, frag: ipv4::DF, payload_len };
                ip.emit(&mut frame[ether::HEADER_LEN..]);
                let l4 = &mut frame[ether::HEADER_LEN + 20..];
                udp::emit(l4, IpAddr::V4(src), to.ip(), 4000 + u16::from(what >> 4 & 1), to.port());
                self.frame(port, &mut frame, FrameMeta { csum: Csum::Valid, gso: None });
            }
            _ => {
                if self.heard.is_empty() {
                    return;
                }
                let (port, from, to, tcp, used) = self.heard[usize::from(what >> 3) % self.heard.len()];
                let (SocketAddr::V4(from), SocketAddr::V4(to)) = (from, to) else { return };
                let mut payload = line(choice);
                if cut & 1 != 0 {
                    payload.extend_from_slice(&line(choice / 10));
                }
                if cut & 2 != 0 {
                    payload.truncate(1 + usize::from(cut >> 3) * 2);
                }
                let segment = Tcp {
                    src_port: from.port(),
                    dst_port: to.port(),
                    seq: tcp.ack,
                    ack: tcp.seq.wrapping_add(used),
                    flags: 0x18 | u8::from(cut & 4 != 0),
                    window: 60_000,
                    header_len: 20,
                    ..Tcp::default()
                };
                let options = self.options(u16::from(tcp.window & 1));
                self.segment_of(port, from, to, &segment, &options, &payload);
            }
        }
    }

    /// What servers got under rules that have not changed since the connection was opened shows allowed names only.
    fn check_servers(&mut self) {
        for (at, (_, sock)) in self.fx.connects.iter().enumerate() {
            if self.opened_under.get(at) != Some(&self.changes) || !matches!(self.fx.socks[sock].target, Some(Target::Address(_))) {
                continue;
            }
            let sent = &self.fx.socks[sock].sent;
            let mut stream = StreamInspector::new();
            match stream.feed(sent).1 {
                Progress::Tls(h) => assert!(allows(self.rules, h.server_name.as_deref()), "a denied name passed"),
                Progress::Http => {
                    let (mut http, mut rest) = (HttpInspector::new(), &sent[..]);
                    while let (n, HttpProgress::Head(head)) = http.feed(rest) {
                        assert!(allows(self.rules, head.host.as_deref()), "a denied host passed");
                        rest = &rest[n..];
                    }
                }
                Progress::Opaque(_) | Progress::Malformed(_) => {
                    assert!(allows(self.rules, None), "something without a name passed");
                }
                Progress::More => assert!(sent.is_empty() || self.rules & 3 != 1, "half a hello passed"),
            }
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() % 20 {
            19 => self.speak(input),
            0..=3 => self.raw(input),
            4..=6 => self.answer(input),
            7 => {
                let (which, how) = (usize::from(input.u8()), input.u8());
                if !self.fx.connects.is_empty() {
                    let (flow, _) = self.fx.connects[which % self.fx.connects.len()];
                    let result = if how & 1 == 0 { Ok(()) } else { Err(error(how >> 1)) };
                    self.core.tcp_connected(self.now, flow, result, &mut self.fx);
                }
            }
            8 | 9 => self.socket(input),
            10 => self.datagram(input),
            11 => self.client(input),
            12 => self.port(input),
            13 => {
                let ms = u64::from(input.u16());
                self.pass(ms);
            }
            14 => self.core.batch_end(self.now, &mut self.fx),
            16 | 17 => self.open(input),
            18 => self.publish(input),
            _ => {
                let (what, len) = (input.u8(), usize::from(input.u16()));
                if what & 1 != 0 {
                    self.fx.open_error = Some(error(what >> 1));
                } else if what & 2 != 0 {
                    self.fx.datagram_error = Some(error(what >> 2));
                } else if what & 4 != 0 {
                    self.names(what >> 3, input);
                } else {
                    let (src, dst) = (SocketAddr::from((GATEWAY, 53)), SocketAddr::from((guest_ip(0), 4000)));
                    let payload = &self.filler[..len.min(9000)];
                    let mac = guest_mac(0);
                    self.core.service_send(self.now, PortId(0), mac, src, dst, payload, &mut self.fx);
                }
            }
        }
        self.listen();
        self.opened_under.resize(self.fx.connects.len().max(self.opened_under.len()), self.changes);
        if let Err(why) = self.core.audit() {
            panic!("{why}");
        }
        assert!(self.core.flows().count() <= FLOWS as usize);
        assert!(self.core.reassembly_bytes() <= 64 << 10);
    }
}

/// A large frame must be one that can be cut, into pieces that fit, and not too many of them.
fn pieces(sent: &Sent, ours: bool) {
    let Some(gso) = sent.meta.gso else {
        assert!(sent.frame.len() <= ether::HEADER_LEN + usize::from(MTU), "a frame over the MTU was sent");
        return;
    };
    let (mut count, mut bytes) = (0, 0);
    let cut = gso::segment(&sent.frame, gso, |header, piece| {
        count += 1;
        bytes += piece.len();
        let whole = [header, piece].concat();
        assert!(whole.len() <= ether::HEADER_LEN + usize::from(MTU), "a piece over the MTU");
        if ours {
            let p = parse::parse_ip(&whole, ether::HEADER_LEN).expect("an unreadable piece");
            assert!(parse::verify_ipv4_header(&whole, &p) && parse::verify_l4(&whole, &p));
        }
    });
    assert!(!ours || cut.is_ok(), "a large frame that cannot be cut was sent");
    assert!(count <= 2048 && bytes <= sent.frame.len(), "{count} pieces");
}

/// Whether a host that follows every header would read a router advertisement or redirect.
fn is_gateway_talk(frame: &[u8]) -> bool {
    let byte = |at: usize| frame.get(at).copied();
    if frame.get(12..14) != Some(&[0x86, 0xdd]) {
        return false;
    }
    let (mut next, mut at) = (byte(20), 54);
    loop {
        match next {
            Some(58) => return matches!(byte(at), Some(134 | 137)),
            Some(0 | 43 | 60) => {
                next = byte(at);
                at += 8 + usize::from(byte(at + 1).unwrap_or(0)) * 8;
            }
            // What does not begin here is nobody's to read as a header.
            Some(44) if byte(at + 2) == Some(0) && byte(at + 3).is_some_and(|b| b & 0xf8 == 0) => {
                next = byte(at);
                at += 8;
            }
            _ => return false,
        }
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
    world.check_servers();
    // The longest timeout there is, twice: a timer may be set again by the first.
    world.fx.open_error = None;
    world.pass(2 * 7440 * 1000 + 60_000);
    world.pass(2 * 7440 * 1000 + 60_000);
    world.check_servers();
    assert_eq!(world.core.flows().count(), 0, "flows outlive every timeout");
    assert_eq!(world.core.reassembly_bytes(), 0, "fragments outlive every timeout");
    let open = world.fx.socks.values().filter(|s| s.closed.is_none()).count();
    assert_eq!(open, 0, "sockets outlive their flows");
});
