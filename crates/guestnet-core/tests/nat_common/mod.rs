//! Theory of operation: a NAT with a simulated outside and a virtual clock. [`Lab`] builds packets, sends them
//! through the engine and checks on the way that whatever comes out has correct checksums and whatever was
//! not translated is byte for byte what it was.
#![allow(dead_code, unused_imports, missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use guestnet_core::nat::{NatDirection, NatEngine, NatEngineConfig, NatResult};
use guestnet_core::types::Time;
use guestnet_wire::{be16, be32, checksum, icmp, ipv4, parse, proto, put, tcp, udp};
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};

pub use NatDirection::{Inbound, Outbound};
pub use NatResult::{Dropped, Fragmented, Hairpinned, Held, PassThrough, TooBig, Translated};

pub fn ip(s: &str) -> Ipv4Addr {
    s.parse().unwrap()
}
pub fn at(s: &str) -> SocketAddrV4 {
    s.parse().unwrap()
}

/// Guests A and B, the NAT's external address, hosts outside.
pub const A: &str = "192.168.64.2";
pub const B: &str = "192.168.64.3";
pub const EXT: &str = "203.0.113.1";
pub const X1: &str = "198.51.100.1";
pub const X2: &str = "198.51.100.2";

#[derive(Clone)]
pub struct IpPacket {
    pub src: Ipv4Addr,
    pub dst: Ipv4Addr,
    pub proto: u8,
    pub ttl: u8,
    pub id: u16,
    pub frag: u16,
    pub options: Vec<u8>,
    pub payload: Vec<u8>,
}

impl IpPacket {
    pub fn new(src: Ipv4Addr, dst: Ipv4Addr, proto: u8, payload: Vec<u8>) -> Self {
        IpPacket { src, dst, proto, ttl: 64, id: 0x1234, frag: 0, options: vec![], payload }
    }
    pub fn ttl(mut self, ttl: u8) -> Self {
        self.ttl = ttl;
        self
    }
    pub fn df(mut self) -> Self {
        self.frag = ipv4::DF;
        self
    }
    pub fn id(mut self, id: u16) -> Self {
        self.id = id;
        self
    }
    pub fn options(mut self, options: &[u8]) -> Self {
        self.options = options.to_vec();
        self
    }
    pub fn bytes(&self) -> Vec<u8> {
        let mut b = vec![0; 20];
        ipv4::Ipv4 {
            src: self.src,
            dst: self.dst,
            proto: self.proto,
            ttl: self.ttl,
            tos: 0,
            id: self.id,
            frag: self.frag,
            payload_len: (self.options.len() + self.payload.len()) as u16,
        }
        .emit(&mut b);
        b[0] = 0x45 + (self.options.len() / 4) as u8;
        b.extend_from_slice(&self.options);
        ipv4::fill_checksum(&mut b);
        b.extend_from_slice(&self.payload);
        b
    }
    /// Cuts the payload in pieces of `size` bytes.
    pub fn fragments(&self, size: usize) -> Vec<Vec<u8>> {
        let n = self.payload.len().div_ceil(size);
        self.payload
            .chunks(size)
            .enumerate()
            .map(|(i, c)| {
                let mut f = self.clone();
                f.payload = c.to_vec();
                f.frag = (i * size / 8) as u16 | if i + 1 < n { ipv4::MF } else { 0 };
                f.bytes()
            })
            .collect()
    }
}

pub fn udp_packet(src: SocketAddrV4, dst: SocketAddrV4, data: &[u8]) -> IpPacket {
    let mut b = vec![0; 8];
    b.extend_from_slice(data);
    udp::emit(&mut b, (*src.ip()).into(), (*dst.ip()).into(), src.port(), dst.port());
    IpPacket::new(*src.ip(), *dst.ip(), proto::UDP, b)
}

pub fn udp(src: &str, dst: &str) -> Vec<u8> {
    udp_packet(at(src), at(dst), b"data").bytes()
}

pub fn tcp_packet(src: SocketAddrV4, dst: SocketAddrV4, flags: u8, data: &[u8]) -> IpPacket {
    let mut b = vec![0; 20];
    let t = tcp::Tcp {
        src_port: src.port(),
        dst_port: dst.port(),
        seq: 1,
        ack: 2,
        flags,
        window: 1000,
        urgent: 0,
        header_len: 20,
    };
    t.emit(&tcp::Options::default(), &mut b);
    b.extend_from_slice(data);
    let (s, d): (IpAddr, IpAddr) = ((*src.ip()).into(), (*dst.ip()).into());
    let c = checksum::finish(checksum::sum(&b, checksum::pseudo(s, d, proto::TCP, b.len() as u32)));
    put(&mut b, 16, &c.to_be_bytes());
    IpPacket::new(*src.ip(), *dst.ip(), proto::TCP, b)
}

pub fn tcp(src: &str, dst: &str, flags: u8) -> Vec<u8> {
    tcp_packet(at(src), at(dst), flags, if flags & tcp::flags::SYN != 0 { b"" } else { b"data" }).bytes()
}

pub fn echo_packet(src: Ipv4Addr, dst: Ipv4Addr, kind: u8, id: u16) -> IpPacket {
    let mut b = vec![0; 8 + 16];
    let i = id.to_be_bytes();
    icmp::emit(&mut b, kind, 0, [i[0], i[1], 0, 1], b"0123456789abcdef");
    IpPacket::new(src, dst, proto::ICMP, b)
}

pub fn echo(src: &str, dst: &str, kind: u8, id: u16) -> Vec<u8> {
    echo_packet(ip(src), ip(dst), kind, id).bytes()
}

/// An ICMP error from `src` to `dst` that quotes `quote` (as much as is given).
pub fn error(src: &str, dst: &str, kind: u8, code: u8, rest: [u8; 4], quote: &[u8]) -> Vec<u8> {
    let mut b = vec![0; 8 + quote.len()];
    icmp::emit(&mut b, kind, code, rest, quote);
    IpPacket::new(ip(src), ip(dst), proto::ICMP, b).bytes()
}

pub fn src(p: &[u8]) -> SocketAddrV4 {
    let l4 = usize::from(p[0] & 15) * 4;
    let port = if p[9] == proto::ICMP { be16(p, l4 + 4) } else { be16(p, l4) };
    SocketAddrV4::new(be32(p, 12).into(), port)
}
pub fn dst(p: &[u8]) -> SocketAddrV4 {
    let l4 = usize::from(p[0] & 15) * 4;
    let port = if p[9] == proto::ICMP { be16(p, l4 + 4) } else { be16(p, l4 + 2) };
    SocketAddrV4::new(be32(p, 16).into(), port)
}

/// Every checksum by full recomputation.
pub fn assert_checksums(p: &[u8]) {
    let v = parse::parse_ip(p, 0).unwrap();
    assert!(parse::verify_ipv4_header(p, &v), "IP checksum of {p:02x?}");
    if v.fragment.is_none() {
        assert!(parse::verify_l4(p, &v), "transport checksum of {p:02x?}");
    }
}

pub struct Lab {
    pub nat: NatEngine,
    pub ns: u64,
}

impl Default for Lab {
    fn default() -> Self {
        Lab::new(|_| {})
    }
}

impl Lab {
    pub fn new(set: impl FnOnce(&mut NatEngineConfig)) -> Lab {
        let mut c = NatEngineConfig::new(ip(EXT));
        c.secret = [42; 32];
        set(&mut c);
        Lab { nat: NatEngine::new(c).unwrap(), ns: 0 }
    }

    /// Lets time pass, doing the expiry work of each second of it.
    pub fn wait(&mut self, seconds: u64) {
        let end = self.ns + seconds * 1_000_000_000;
        while let Some(t) = self.nat.next_timer().filter(|t| t.0 <= end) {
            self.ns = self.ns.max(t.0);
            self.nat.expire(Time(self.ns), 1000);
        }
        self.ns = end;
        self.nat.expire(Time(end), 0);
    }

    /// Lets time pass without anybody doing expiry work.
    pub fn sleep(&mut self, seconds: u64) {
        self.ns += seconds * 1_000_000_000;
    }

    pub fn send(&mut self, p: &[u8], direction: NatDirection) -> (NatResult, Vec<u8>) {
        let mut q = p.to_vec();
        let r = self.nat.translate(&mut q, direction, Time(self.ns));
        match r {
            Translated | Hairpinned | Fragmented => {
                assert_eq!(p.len(), q.len());
                let good =
                    parse::parse_ip(p, 0).is_ok_and(|v| v.fragment.is_none() && parse::verify_l4(p, &v));
                if good {
                    assert_checksums(&q);
                }
            }
            _ => assert_eq!(p, q, "an untranslated packet was changed: {r:?}"),
        }
        (r, q)
    }

    pub fn out(&mut self, p: &[u8]) -> NatResult {
        self.send(p, Outbound).0
    }
    pub fn inn(&mut self, p: &[u8]) -> NatResult {
        self.send(p, Inbound).0
    }
    /// Sends outbound; it must be translated; gives the external end.
    pub fn map(&mut self, p: &[u8]) -> SocketAddrV4 {
        let (r, q) = self.send(p, Outbound);
        assert!(matches!(r, Translated | Hairpinned), "{r:?}");
        src(&q)
    }
    /// Sends inbound; it must be translated; gives the packet.
    pub fn take(&mut self, p: &[u8]) -> Vec<u8> {
        let (r, q) = self.send(p, Inbound);
        assert_eq!(r, Translated);
        q
    }
    /// Everything that waits in the output.
    pub fn output(&mut self) -> Vec<(NatDirection, Vec<u8>)> {
        let all: Vec<_> = std::iter::from_fn(|| self.nat.poll_output()).collect();
        for (_, p) in &all {
            assert_checksums(p);
        }
        all
    }
    /// The one ICMP error that waits: direction, packet, type, code.
    pub fn the_error(&mut self) -> (NatDirection, Vec<u8>, u8, u8) {
        let mut all = self.output();
        assert_eq!(all.len(), 1, "{all:?}");
        let (d, p) = all.remove(0);
        assert_eq!(p[9], proto::ICMP);
        let (t, c) = (p[20], p[21]);
        (d, p, t, c)
    }
}
