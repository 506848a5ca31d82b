//! Theory of operation: the packets of the race: frames with an Ethernet header (the peer wants one), each at a
//! 64-byte boundary of one buffer. Flow `i` is a socket of its own; the order of packets is random.

use guestnet_wire::{checksum, ipv4, proto, put, tcp, udp};
use std::net::{IpAddr, Ipv4Addr};

/// Bytes in front of the IP packet.
pub const ETH: usize = 14;

/// What the packets are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Mix {
    /// 64 bytes of frame, UDP.
    Udp64,
    /// 1500 bytes of IP, TCP.
    Tcp1500,
}

#[derive(Clone)]
pub struct Load {
    pub bytes: Vec<u8>,
    /// Start and length of each IP packet.
    pub spans: Vec<(u32, u32)>,
}

/// xorshift: the order need not be secret.
struct Order(u64);
impl Order {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((u128::from(self.0) * n as u128) >> 64) as usize
    }
}

fn flow(i: usize) -> (Ipv4Addr, u16, Ipv4Addr, u16) {
    // Up to 2000 sockets per guest, up to a few hundred guests.
    let guest = 2 + (i / 2000) as u32;
    // Ports as stacks choose them, all over the range: 40_503 and 64_512 have no common factor.
    let port = 1024 + ((i as u64 % 2000 * 40_503 + u64::from(guest) * 9973) % 64_512) as u16;
    let remote = 0xc633_0000 | (i as u32).wrapping_mul(2_654_435_761) >> 20;
    (Ipv4Addr::from(0x0a00_0000 | guest), port, Ipv4Addr::from(remote), 4433)
}

fn frame(mix: Mix, (src, sport, dst, dport): (Ipv4Addr, u16, Ipv4Addr, u16), syn: bool) -> Vec<u8> {
    let len = match mix {
        Mix::Udp64 => 50,
        Mix::Tcp1500 => 1500,
    };
    let mut p = vec![0u8; len];
    let proto_ = if mix == Mix::Udp64 { proto::UDP } else { proto::TCP };
    ipv4::Ipv4 {
        src,
        dst,
        proto: proto_,
        ttl: 64,
        tos: 0,
        id: 7,
        frag: ipv4::DF,
        payload_len: (len - 20) as u16,
    }
    .emit(&mut p);
    let (s, d): (IpAddr, IpAddr) = (src.into(), dst.into());
    if mix == Mix::Udp64 {
        udp::emit(&mut p[20..], s, d, sport, dport);
    } else {
        let flags = if syn { tcp::flags::SYN } else { tcp::flags::ACK };
        let t = tcp::Tcp { src_port: sport, dst_port: dport, flags, window: 1000, ..Default::default() };
        t.emit(&tcp::Options::default(), &mut p[20..]);
        let n = p.len() as u32 - 20;
        let c = checksum::finish(checksum::sum(&p[20..], checksum::pseudo(s, d, proto_, n)));
        put(&mut p, 36, &c.to_be_bytes());
    }
    let mut f = vec![0u8; ETH];
    f[12] = 8;
    f.extend_from_slice(&p);
    f
}

impl Load {
    fn of(mix: Mix, flows: impl Iterator<Item = (Ipv4Addr, u16, Ipv4Addr, u16)>, syn: bool) -> Load {
        let mut l = Load { bytes: Vec::new(), spans: Vec::new() };
        for f in flows {
            let f = frame(mix, f, syn);
            l.spans.push(((l.bytes.len() + ETH) as u32, (f.len() - ETH) as u32));
            l.bytes.extend_from_slice(&f);
            l.bytes.resize(l.bytes.len().next_multiple_of(64), 0);
        }
        l
    }

    /// One packet of each flow, in random order.
    pub fn every_flow(flows: usize, mix: Mix) -> Load {
        let mut order: Vec<usize> = (0..flows).collect();
        let mut r = Order(0x9e37_79b9_7f4a_7c15);
        for i in (1..flows).rev() {
            order.swap(i, r.below(i + 1));
        }
        Load::of(mix, order.into_iter().map(flow), true)
    }

    /// Packets of random flows: at least as many as flows.
    pub fn random(flows: usize, mix: Mix) -> Load {
        let mut r = Order(0xdead_beef_cafe_f00d);
        let n = match mix {
            Mix::Udp64 => flows.max(8192),
            // As many as a driver's ring holds: what is in the cache when packets have just arrived.
            Mix::Tcp1500 => flows.max(512),
        };
        Load::of(mix, (0..n).map(|_| flow(r.below(flows))), false)
    }

    /// Tuples that differ only in high bits, in step: what an unkeyed multiply or mask maps to few slots.
    pub fn attack(flows: usize) -> Load {
        let tuple = |i: usize| {
            let src = Ipv4Addr::from(0x0a00_0002 + (i as u32 / 16384) * 0x1_0000);
            let port = 16384 + (i % 16384) as u16;
            (src, port, Ipv4Addr::new(198, 51, 100, 1), port)
        };
        Load::of(Mix::Udp64, (0..flows).map(tuple), false)
    }

    /// Makes the headers those of `master` again.
    pub fn restore(&mut self, master: &Load) {
        for (start, len) in &self.spans {
            let at = *start as usize..*start as usize + (*len as usize).min(40);
            self.bytes[at.clone()].copy_from_slice(&master.bytes[at]);
        }
    }

    /// Turns every packet round.
    pub fn mirror(&mut self) {
        for (start, _) in &self.spans {
            let p = &mut self.bytes[*start as usize..];
            for i in 0..4 {
                p.swap(12 + i, 16 + i);
            }
            for i in 0..2 {
                p.swap(20 + i, 22 + i);
            }
        }
    }
}
