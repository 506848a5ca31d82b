//! Theory of operation: a worker under test, and a guest made of bytes: it resolves its gateway, sends and
//! receives datagrams, opens and takes TCP connections, over whatever carries frames. Every frame that it
//! gets must be whole and have right checksums. All traffic stays on this machine: the host's loopback is
//! what the Network maps 192.168.64.254 to.
#![allow(dead_code, missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod temp_dir;
pub mod vhost;

use guestnet_core::config::NetworkConfig;
use guestnet_core::types::{PortConfig, PortId};
use guestnet_io::{Command, CommandError, Event, Runtime, StatsSnapshot, Value, WorkerConfig, WorkerGroup};
use guestnet_wire::arp::{self, Arp};
use guestnet_wire::ether::{self, Ether, Mac};
use guestnet_wire::ipv4::{self, Ipv4};
use guestnet_wire::parse::{self, Packet};
use guestnet_wire::tcp::{Options, Tcp, flags};
use guestnet_wire::{be16, checksum, proto, udp};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::rc::Rc;
use std::time::{Duration, Instant};

pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 64, 1);
pub const HOST: Ipv4Addr = Ipv4Addr::new(192, 168, 64, 254);
pub const PATIENCE: Duration = Duration::from_secs(10);

pub fn port_config() -> PortConfig {
    PortConfig { mac: None, addresses: vec![], mtu: 1500, gso_max: 65_450, lax_offload: false, uplink: false }
}

/// A worker and what it told that nobody asked for yet.
pub struct Net {
    pub workers: WorkerGroup,
    events: RefCell<VecDeque<Event>>,
}

impl Net {
    pub fn new() -> Net {
        Net::with(|_| ())
    }

    pub fn with(change: impl FnOnce(&mut WorkerConfig)) -> Net {
        Net::on(&Runtime::of_process(), change)
    }

    /// On the threads of a runtime.
    pub fn on(runtime: &Runtime, change: impl FnOnce(&mut WorkerConfig)) -> Net {
        let mut core = NetworkConfig::new(
            Mac([2, 0, 0, 0, 0, 1]),
            GATEWAY,
            (Ipv4Addr::new(192, 168, 64, 0), 24),
            [9; 32],
        );
        core.host_loopback = Some(HOST.into());
        let mut config = WorkerConfig::new(core);
        change(&mut config);
        Net { workers: runtime.spawn(config).unwrap(), events: RefCell::default() }
    }

    fn pump(&self) {
        self.events.borrow_mut().extend(self.workers.drain(1000));
    }

    /// Events of a kind that were told and that nobody took.
    pub fn count(&self, kind: impl Fn(&Event) -> bool) -> usize {
        self.pump();
        self.events.borrow().iter().filter(|e| kind(e)).count()
    }

    /// Waits for the first event that `pick` makes something of, and takes it.
    pub fn wait<T>(&self, what: &str, mut pick: impl FnMut(&Event) -> Option<T>) -> T {
        let end = Instant::now() + PATIENCE;
        loop {
            self.pump();
            let found = self.events.borrow().iter().enumerate().find_map(|(i, e)| Some((i, pick(e)?)));
            if let Some((i, value)) = found {
                self.events.borrow_mut().remove(i);
                return value;
            }
            assert!(Instant::now() < end, "no {what}; there is {:?}", self.events.borrow());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until the counters, which are published a moment later, say so.
    pub fn until(&self, what: &str, done: impl Fn(&StatsSnapshot) -> bool) -> StatsSnapshot {
        let end = Instant::now() + PATIENCE;
        loop {
            let stats = self.workers.stats();
            if done(&stats) {
                return stats;
            }
            assert!(Instant::now() < end, "not {what}: {stats:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn try_command(&self, command: impl Into<Command>) -> Result<Value, CommandError> {
        let n = self.workers.submit(command).unwrap();
        self.wait("acknowledgement", |e| match e {
            Event::Done { sequence, result } if *sequence == n => Some(result.clone()),
            _ => None,
        })
    }

    #[track_caller]
    pub fn command(&self, command: impl Into<Command>) -> Value {
        self.try_command(command).unwrap()
    }

    pub fn add_port(&self, n: u32) -> PortId {
        let port = PortId(n);
        self.command(Command::AddPort { port, config: port_config() });
        port
    }

    /// Waits for a guest of a listener.
    pub fn port_up(&self) -> (PortId, String) {
        self.wait("port", |e| match e {
            Event::PortUp { port, peer, .. } => Some((*port, peer.clone())),
            _ => None,
        })
    }

    pub fn port_down(&self) -> (PortId, String) {
        self.wait("port's end", |e| match e {
            Event::PortDown { port, reason } => Some((*port, reason.clone())),
            _ => None,
        })
    }

    /// A guest on a stream socket.
    pub fn stream_guest(&self, n: u32) -> Guest<StreamLink> {
        let port = self.add_port(n);
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.command(Command::AttachStream { port, fd: theirs.into() });
        Guest::new(StreamLink::new(ours), n as u8)
    }

    pub fn dgram_guest(&self, n: u32) -> Guest<UnixDatagram> {
        let port = self.add_port(n);
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        self.command(Command::AttachDgram { port, fd: theirs.into() });
        Guest::new(ours, n as u8)
    }

    pub fn memory_guest(self: &Rc<Self>, n: u32) -> Guest<MemoryLink> {
        let port = self.add_port(n);
        self.command(Command::AttachMemory { port });
        Guest::new(MemoryLink { net: Rc::clone(self), port }, n as u8)
    }
}

/// What carries frames.
pub trait Link {
    fn send(&mut self, frame: &[u8]);
    fn receive(&mut self, wait: Duration) -> Option<Vec<u8>>;
}

pub struct StreamLink {
    pub stream: UnixStream,
    got: Vec<u8>,
}

impl StreamLink {
    pub fn new(stream: UnixStream) -> StreamLink {
        StreamLink { stream, got: Vec::new() }
    }

    fn first(&mut self) -> Option<Vec<u8>> {
        let len = u32::from_be_bytes(self.got.get(..4)?.try_into().unwrap()) as usize;
        let frame = self.got.get(4..4 + len)?.to_vec();
        self.got.drain(..4 + len);
        Some(frame)
    }
}

impl Link for StreamLink {
    fn send(&mut self, frame: &[u8]) {
        let mut bytes = (frame.len() as u32).to_be_bytes().to_vec();
        bytes.extend_from_slice(frame);
        self.stream.write_all(&bytes).unwrap();
    }

    fn receive(&mut self, wait: Duration) -> Option<Vec<u8>> {
        let end = Instant::now() + wait;
        let mut buf = [0; 65536];
        loop {
            if let Some(frame) = self.first() {
                return Some(frame);
            }
            let left = end.saturating_duration_since(Instant::now());
            self.stream.set_read_timeout(Some(left.max(Duration::from_micros(100)))).unwrap();
            match self.stream.read(&mut buf) {
                Ok(0) => return None,
                Ok(n) => self.got.extend_from_slice(&buf[..n]),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    if Instant::now() >= end {
                        return None;
                    }
                }
                Err(e) => panic!("{e}"),
            }
        }
    }
}

impl Link for UnixDatagram {
    fn send(&mut self, frame: &[u8]) {
        UnixDatagram::send(self, frame).unwrap();
    }

    fn receive(&mut self, wait: Duration) -> Option<Vec<u8>> {
        self.set_read_timeout(Some(wait.max(Duration::from_micros(100)))).unwrap();
        let mut buf = vec![0; 70000];
        let n = self.recv(&mut buf).ok()?;
        buf.truncate(n);
        Some(buf)
    }
}

pub struct MemoryLink {
    net: Rc<Net>,
    port: PortId,
}

impl Link for MemoryLink {
    fn send(&mut self, frame: &[u8]) {
        self.net.command(Command::Inject { port: self.port, frame: frame.to_vec() });
    }

    fn receive(&mut self, wait: Duration) -> Option<Vec<u8>> {
        let end = Instant::now() + wait;
        loop {
            self.net.pump();
            let mut events = self.net.events.borrow_mut();
            let mine = |e: &Event| matches!(e, Event::Frame { port, .. } if *port == self.port);
            if let Some(i) = events.iter().position(mine)
                && let Some(Event::Frame { frame, .. }) = events.remove(i)
            {
                return Some(frame.into_vec());
            }
            drop(events);
            if Instant::now() >= end {
                return None;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

/// A guest.
pub struct Guest<L> {
    pub link: L,
    pub mac: Mac,
    pub ip: Ipv4Addr,
    gateway: Option<Mac>,
    /// Frames that came while another was waited for.
    later: VecDeque<Vec<u8>>,
}

/// A datagram or segment that came.
#[derive(Debug, Clone)]
pub struct Got {
    pub src: SocketAddr,
    pub dst: SocketAddr,
    pub tcp: Option<Tcp>,
    pub options: Options,
    pub payload: Vec<u8>,
}

/// One TCP connection of a guest: in order, no loss, which is what these links give.
#[derive(Debug, Clone, Copy)]
pub struct Conn {
    pub local: u16,
    pub remote: SocketAddrV4,
    pub snd: u32,
    pub una: u32,
    pub rcv: u32,
    pub window: u32,
    pub shift: u8,
    /// The peer's FIN has come.
    pub ended: bool,
}

impl<L: Link> Guest<L> {
    pub fn new(link: L, n: u8) -> Guest<L> {
        Guest {
            link,
            mac: Mac([0x52, 0x54, 0, 0, 0, n]),
            ip: Ipv4Addr::new(192, 168, 64, 10 + n),
            gateway: None,
            later: VecDeque::new(),
        }
    }

    fn ethernet(&self, dst: Mac, ethertype: u16, body: &[u8]) -> Vec<u8> {
        let mut f = vec![0; ether::HEADER_LEN];
        Ether { dst, src: self.mac, ethertype }.emit(&mut f);
        f.extend_from_slice(body);
        f
    }

    pub fn arp(&mut self, op: u16, tha: Mac, tpa: Ipv4Addr) {
        let mut b = [0; arp::LEN];
        Arp { op, sha: self.mac, spa: self.ip, tha, tpa }.emit(&mut b);
        let dst = if op == arp::REQUEST { Mac::BROADCAST } else { tha };
        let f = self.ethernet(dst, ether::ARP, &b);
        self.link.send(&f);
    }

    /// The next frame that is for this guest; answers ARP on the way.
    fn next(&mut self, wait: Duration) -> Option<Vec<u8>> {
        let end = Instant::now() + wait;
        loop {
            let f = self.link.receive(end.saturating_duration_since(Instant::now()))?;
            let e = Ether::parse(&f).unwrap();
            if e.dst != self.mac && e.dst != Mac::BROADCAST {
                continue;
            }
            if e.ethertype == ether::ARP {
                let a = Arp::parse(&f[14..]).unwrap();
                if a.op == arp::REQUEST && a.tpa == self.ip {
                    self.arp(arp::REPLY, a.sha, a.spa);
                    continue;
                }
            }
            return Some(f);
        }
    }

    pub fn gateway(&mut self) -> Mac {
        if let Some(mac) = self.gateway {
            return mac;
        }
        self.arp(arp::REQUEST, Mac::default(), GATEWAY);
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            let Some(f) = self.next(PATIENCE) else { break };
            if Ether::parse(&f).unwrap().ethertype == ether::ARP {
                let a = Arp::parse(&f[14..]).unwrap();
                if a.op == arp::REPLY && a.spa == GATEWAY {
                    self.gateway = Some(a.sha);
                    return a.sha;
                }
            } else {
                self.later.push_back(f);
            }
        }
        panic!("the gateway does not answer ARP");
    }

    pub fn ipv4(&mut self, proto: u8, dst: Ipv4Addr, body: &[u8]) -> Vec<u8> {
        let mac = self.gateway();
        self.ipv4_to(mac, proto, dst, body)
    }

    fn ipv4_to(&self, mac: Mac, proto: u8, dst: Ipv4Addr, body: &[u8]) -> Vec<u8> {
        let mut b = vec![0; ipv4::MIN_LEN];
        let payload_len = body.len() as u16;
        Ipv4 { src: self.ip, dst, proto, ttl: 64, tos: 0, id: 7, frag: 0, payload_len }.emit(&mut b);
        b.extend_from_slice(body);
        self.ethernet(mac, ether::IPV4, &b)
    }

    pub fn udp_send(&mut self, from: u16, to: SocketAddrV4, payload: &[u8]) {
        let mut b = vec![0; udp::LEN];
        b.extend_from_slice(payload);
        udp::emit(&mut b, self.ip.into(), (*to.ip()).into(), from, to.port());
        let f = self.ipv4(proto::UDP, *to.ip(), &b);
        self.link.send(&f);
    }

    fn parse(f: &[u8]) -> Option<(Packet, Got)> {
        if Ether::parse(f).unwrap().ethertype != ether::IPV4 {
            return None;
        }
        let p = parse::parse_ip(f, 14).unwrap();
        assert!(f.len() <= 1514 && p.end == f.len(), "a frame of {} bytes", f.len());
        assert_eq!(checksum::finish(checksum::sum(&f[14..p.l4], 0)), 0, "IP checksum");
        let l4 = &f[p.l4..p.end];
        let pseudo = checksum::pseudo(p.src, p.dst, p.proto, l4.len() as u32);
        if p.proto != proto::ICMP && p.fragment.is_none() {
            assert_eq!(checksum::finish(checksum::sum(l4, pseudo)), 0, "transport checksum");
        }
        let tcp = (p.proto == proto::TCP).then(|| Tcp::parse(l4).unwrap());
        let options = tcp.map_or(Options::default(), |t| Options::parse(&l4[20..usize::from(t.header_len)]));
        let got = Got {
            src: SocketAddr::new(p.src, p.src_port),
            dst: SocketAddr::new(p.dst, p.dst_port),
            tcp,
            options,
            payload: f[p.payload..p.end].to_vec(),
        };
        Some((p, got))
    }

    /// The next packet of a protocol to a port of this guest.
    pub fn receive(&mut self, proto: u8, port: u16, wait: Duration) -> Option<Got> {
        let end = Instant::now() + wait;
        let mine = |f: &[u8]| {
            let (p, g) = Self::parse(f)?;
            (p.proto == proto && g.dst.port() == port && IpAddr::V4(self.ip) == p.dst).then_some(g)
        };
        for i in 0..self.later.len() {
            if let Some(g) = mine(&self.later[i]) {
                self.later.remove(i);
                return Some(g);
            }
        }
        loop {
            let f = self.next(end.saturating_duration_since(Instant::now()))?;
            let ip = self.ip;
            if let Some((p, g)) = Self::parse(&f) {
                if p.proto == proto && g.dst.port() == port && IpAddr::V4(ip) == p.dst {
                    return Some(g);
                }
                self.later.push_back(f);
            }
        }
    }

    /// A datagram in a frame to that MAC.
    pub fn udp_frame(&self, to: Mac, from: u16, dst: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
        let mut b = vec![0; udp::LEN];
        b.extend_from_slice(payload);
        udp::emit(&mut b, self.ip.into(), (*dst.ip()).into(), from, dst.port());
        self.ipv4_to(to, proto::UDP, *dst.ip(), &b)
    }

    pub fn udp_send_to(&mut self, to: Mac, from: u16, dst: SocketAddrV4, payload: &[u8]) {
        let f = self.udp_frame(to, from, dst, payload);
        self.link.send(&f);
    }

    /// A TCP segment of no connection, with a whole checksum.
    pub fn tcp_to(&self, to: Mac, from: u16, dst: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
        let c = Conn { local: from, remote: dst, snd: 1, una: 1, rcv: 1, window: 0, shift: 0, ended: false };
        let b = self.tcp_bytes(&c, flags::ACK, &Options::default(), payload);
        self.ipv4_to(to, proto::TCP, *dst.ip(), &b)
    }

    pub fn udp_receive(&mut self, port: u16) -> Got {
        self.receive(proto::UDP, port, PATIENCE).expect("a datagram")
    }

    pub fn tcp_bytes(&self, c: &Conn, flags: u8, options: &Options, payload: &[u8]) -> Vec<u8> {
        let t = Tcp {
            src_port: c.local,
            dst_port: c.remote.port(),
            seq: c.snd,
            ack: c.rcv,
            flags,
            window: 65535,
            ..Tcp::default()
        };
        let mut b = vec![0; 60];
        let n = t.emit(options, &mut b);
        b.truncate(n);
        b.extend_from_slice(payload);
        let s = checksum::pseudo(self.ip.into(), (*c.remote.ip()).into(), proto::TCP, b.len() as u32);
        let sum = checksum::finish(checksum::sum(&b, s));
        b[16..18].copy_from_slice(&sum.to_be_bytes());
        b
    }

    pub fn segment(&mut self, c: &Conn, flags: u8, options: &Options, payload: &[u8]) {
        let b = self.tcp_bytes(c, flags, options, payload);
        let f = self.ipv4(proto::TCP, *c.remote.ip(), &b);
        self.link.send(&f);
    }

    fn wscale() -> Options {
        Options { mss: Some(1460), wscale: Some(7), ..Options::default() }
    }

    /// Opens a connection; `Err` is the segment that came instead of a SYN-ACK.
    pub fn connect(&mut self, local: u16, remote: SocketAddrV4) -> Result<Conn, Box<Got>> {
        let isn = 0xffff_f000;
        let mut c = Conn { local, remote, snd: isn, una: isn, rcv: 0, window: 0, shift: 0, ended: false };
        self.segment(&c, flags::SYN, &Self::wscale(), &[]);
        let got = self.receive(proto::TCP, local, PATIENCE).expect("an answer to the SYN");
        let t = got.tcp.unwrap();
        if t.flags & (flags::SYN | flags::ACK) != flags::SYN | flags::ACK {
            return Err(Box::new(got));
        }
        assert_eq!(t.ack, isn.wrapping_add(1));
        c.snd = t.ack;
        c.una = t.ack;
        c.rcv = t.seq.wrapping_add(1);
        c.window = u32::from(t.window);
        c.shift = got.options.wscale.unwrap_or(0);
        self.segment(&c, flags::ACK, &Options::default(), &[]);
        Ok(c)
    }

    /// Takes a connection on `local`.
    pub fn accept(&mut self, local: u16) -> Conn {
        let got = self.receive(proto::TCP, local, PATIENCE).expect("a SYN");
        let t = got.tcp.unwrap();
        assert_eq!(t.flags & (flags::SYN | flags::ACK), flags::SYN);
        let SocketAddr::V4(remote) = got.src else { panic!() };
        let mut c = Conn {
            local,
            remote,
            snd: 1000,
            una: 1000,
            rcv: t.seq.wrapping_add(1),
            window: u32::from(t.window),
            shift: got.options.wscale.unwrap_or(0),
            ended: false,
        };
        self.segment(&c, flags::SYN | flags::ACK, &Self::wscale(), &[]);
        let ack = self.receive(proto::TCP, local, PATIENCE).expect("the last ACK");
        assert_eq!(ack.tcp.unwrap().flags & flags::ACK, flags::ACK);
        c.snd += 1;
        c.una = c.snd;
        c.window = u32::from(ack.tcp.unwrap().window) << c.shift;
        c
    }

    /// Sends all of `data` and receives until `want` bytes came or the peer closed, at the same time.
    pub fn exchange(&mut self, c: &mut Conn, data: &[u8], want: usize) -> Vec<u8> {
        let (mut sent, mut got) = (0usize, Vec::new());
        let first = c.snd;
        let mut quiet = 0;
        loop {
            while sent < data.len() && c.snd.wrapping_sub(c.una) + 1400 <= c.window.clamp(1400, 100_000) {
                let n = 1400.min(data.len() - sent);
                self.segment(c, flags::ACK | flags::PSH, &Options::default(), &data[sent..sent + n]);
                c.snd = c.snd.wrapping_add(n as u32);
                sent += n;
            }
            if sent == data.len() && c.una == c.snd && got.len() >= want {
                return got;
            }
            let Some(g) = self.receive(proto::TCP, c.local, Duration::from_millis(300)) else {
                quiet += 1;
                assert!(quiet < 30, "stuck: {sent} of {} sent, {} of {want} got", data.len(), got.len());
                // Everything again from the first byte not acknowledged.
                c.snd = c.una;
                sent = c.una.wrapping_sub(first) as usize;
                continue;
            };
            quiet = 0;
            let t = g.tcp.unwrap();
            assert_eq!(t.flags & flags::RST, 0, "reset");
            if t.ack.wrapping_sub(c.una) <= data.len() as u32 {
                c.una = t.ack;
                if c.snd.wrapping_sub(c.una) > i32::MAX as u32 {
                    c.snd = c.una;
                }
            }
            c.window = u32::from(t.window) << c.shift;
            if t.seq == c.rcv {
                got.extend_from_slice(&g.payload);
                c.rcv = c.rcv.wrapping_add(g.payload.len() as u32);
                if t.flags & flags::FIN != 0 {
                    c.ended = true;
                    c.rcv = c.rcv.wrapping_add(1);
                    self.segment(c, flags::ACK, &Options::default(), &[]);
                    return got;
                }
            }
            if !g.payload.is_empty() {
                self.segment(c, flags::ACK, &Options::default(), &[]);
            }
        }
    }

    /// Sends a FIN and receives until the peer's, which may have come with its last bytes before.
    pub fn close(&mut self, c: &mut Conn) -> Vec<u8> {
        self.segment(c, flags::FIN | flags::ACK, &Options::default(), &[]);
        c.snd = c.snd.wrapping_add(1);
        c.una = c.snd;
        if c.ended { Vec::new() } else { self.exchange(c, &[], usize::MAX) }
    }
}

impl Guest<vhost::VhostLink> {
    /// Sends a segment as one large frame to be cut, its checksum begun.
    pub fn segment_large(&mut self, c: &Conn, payload: &[u8]) {
        let b = self.tcp_bytes(c, flags::ACK | flags::PSH, &Options::default(), payload);
        let mut f = self.ipv4(proto::TCP, *c.remote.ip(), &b);
        let header = vhost::as_tso(&mut f, 1448);
        self.link.send_with(&header, &f);
    }
}

/// Bytes that repeat late and look like nothing.
pub fn pattern(len: usize) -> Vec<u8> {
    let mut x = 0x1234_5678_9abc_def1u64;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x as u8
        })
        .collect()
}

/// A TCP server on loopback that sends back what it gets, and how to name it as a guest.
pub fn tcp_echo() -> SocketAddrV4 {
    let l = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = l.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for s in l.incoming() {
            let mut s = s.unwrap();
            std::thread::spawn(move || {
                let mut r = s.try_clone().unwrap();
                let _end = std::io::copy(&mut r, &mut s);
                let _closed = s.shutdown(std::net::Shutdown::Write);
            });
        }
    });
    SocketAddrV4::new(HOST, port)
}

/// A UDP server on loopback that sends back what it gets.
pub fn udp_echo() -> SocketAddrV4 {
    let s = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = s.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let mut buf = [0; 65536];
        while let Ok((n, from)) = s.recv_from(&mut buf) {
            let _lost = s.send_to(&buf[..n], from);
        }
    });
    SocketAddrV4::new(HOST, port)
}

pub fn ether_type(f: &[u8]) -> u16 {
    be16(f, 12)
}
