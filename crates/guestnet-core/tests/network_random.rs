//! Theory of operation: whatever frames, sockets and clocks do, the core does not panic, accounts for every
//! frame, stays within its bounds, and comes to rest. Frames are random, or good ones with bytes changed.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/net.rs"]
mod net;
#[path = "common/net6.rs"]
mod net6;

use guestnet_core::Limits;
use guestnet_core::config::{DatagramError, ForwardSpec};
use guestnet_core::effects::SockError;
use guestnet_core::types::{Csum, FlowId, ForwardId, FrameMeta, Gso, PortConfig, PortId, ServiceId, SockId};
use guestnet_wire::tcp::Tcp;
use guestnet_wire::{arp, icmp6, ipv4, proto};
use net::*;
use net6::*;
use proptest::prelude::*;
use std::net::IpAddr;

const LAX: PortId = PortId(3);

#[derive(Debug, Clone)]
enum Op {
    Random(u32, Vec<u8>),
    Good { port: u32, kind: u8, n: u16, edits: Vec<(u16, u8)>, fix: bool, meta: FrameMeta },
    Socket { which: u16, kind: u8, n: u16 },
    Client { n: u16, tcp: bool },
    Room(u32, usize),
    Pass(u32),
    Replug(u32),
}

fn meta() -> impl Strategy<Value = FrameMeta> {
    let csum = prop_oneof![
        4 => Just(Csum::Full),
        2 => Just(Csum::Valid),
        2 => (prop_oneof![Just(34u16), Just(54u16)], prop_oneof![Just(6u16), Just(16u16)])
            .prop_map(|(start, offset)| Csum::Partial { start, offset }),
        1 => any::<(u16, u16)>().prop_map(|(start, offset)| Csum::Partial { start, offset }),
    ];
    let gso = prop_oneof![
        6 => Just(None),
        1 => (0u16..3000).prop_map(|n| Some(Gso::Tcp(n))),
        1 => (0u16..3000).prop_map(|n| Some(Gso::Udp(n))),
    ];
    (csum, gso).prop_map(|(csum, gso)| FrameMeta { csum, gso })
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        2 => (1u32..5, proptest::collection::vec(any::<u8>(), 0..200)).prop_map(|(p, b)| Op::Random(p, b)),
        8 => (
            1u32..4,
            0u8..20,
            any::<u16>(),
            proptest::collection::vec((any::<u16>(), any::<u8>()), 0..4),
            any::<bool>(),
            meta()
        )
            .prop_map(|(port, kind, n, edits, fix, meta)| Op::Good { port, kind, n, edits, fix, meta }),
        4 => (any::<u16>(), 0u8..8, any::<u16>()).prop_map(|(which, kind, n)| Op::Socket { which, kind, n }),
        2 => (any::<u16>(), any::<bool>()).prop_map(|(n, tcp)| Op::Client { n, tcp }),
        1 => (1u32..4, prop_oneof![Just(0usize), Just(3000), Just(usize::MAX)]).prop_map(|(p, r)| Op::Room(p, r)),
        1 => (0u32..400_000).prop_map(Op::Pass),
        1 => (1u32..4).prop_map(Op::Replug),
    ]
}

fn good(port: PortId, kind: u8, n: u16) -> Vec<u8> {
    let outside = format!("203.0.113.{}", 1 + n % 5);
    let to = addr(&format!("{outside}:{}", if n.is_multiple_of(3) { 53 } else { n % 40 }));
    let from = 4000 + n % 30;
    match kind {
        0 => udp_frame(port, from, to, &vec![1; usize::from(n) % 1472]),
        1 => syn(port, from, &to.to_string()),
        2 => echo_frame(port, &outside, n % 4, n, (n % 70) as u8, b"body"),
        3 => arp_frame(arp::REQUEST, mac(port), guest_ip(port), GATEWAY_MAC, ip(GATEWAY)),
        4 => udp_from(
            &Ip4 { to_mac: mac(A), ..Ip4::new(port, IpAddr::V4(guest_ip(A)), proto::UDP) },
            67,
            68,
            b"offer",
        ),
        5 | 6 => {
            let h = Ip4 {
                frag: if n.is_multiple_of(2) { 0x2000 } else { 0 } | ((n % 8) * 3),
                id: n % 6,
                ..Ip4::new(port, to.ip(), proto::UDP)
            };
            h.frame(&udp_bytes(IpAddr::V4(h.src), to.ip(), from, 9, &[0; 16]))
        }
        7 => udp_frame(port, from, addr(&format!("192.168.64.{}:{}", n % 256, n % 100)), b"near"),
        8 => {
            // Something for a flow that may exist.
            let seg = Tcp {
                src_port: if n.is_multiple_of(2) { 80 } else { from },
                dst_port: to.port(),
                seq: 1000 + u32::from(n % 4),
                ack: u32::from(n) << 16,
                flags: n as u8,
                window: n,
                ..Tcp::default()
            };
            tcp_frame(&Ip4::new(port, to.ip(), proto::TCP), &seg, &vec![2; usize::from(n) % 900])
        }
        9 => {
            let quote = udp_frame(A, 7, guest_addr(port, from), b"quoted");
            let mut b = vec![0; 8 + quote.len() - 14];
            guestnet_wire::icmp::emit(&mut b, 3, n as u8, [0; 4], &quote[14..]);
            Ip4::new(port, to.ip(), proto::ICMP).frame(&b)
        }
        10 => Ip4::new(port, to.ip(), n as u8).frame(&[0; 40]),
        12.. => good6(port, kind, n),
        _ => {
            let mut h = Ip4::new(port, "255.255.255.255".parse().unwrap(), proto::UDP);
            h.to_mac = guestnet_wire::ether::Mac::BROADCAST;
            udp_from(&h, 68, 67, b"discover")
        }
    }
}

/// The same over IPv6.
fn good6(port: PortId, kind: u8, n: u16) -> Vec<u8> {
    let outside = format!("2001:db8::{}", 1 + n % 5);
    let to = format!("[{outside}]:{}", if n.is_multiple_of(3) { 53 } else { 1 + n % 40 });
    let from = 4000 + n % 30;
    let target = [ip6(GATEWAY6), ip6(LINK_LOCAL), guest6(A), guest6(port)][usize::from(n % 4)];
    match kind {
        12 => udp6(port, from, &to, &vec![1; usize::from(n) % 1400]),
        13 => {
            let (seq, ack) = (1000 + u32::from(n % 4), u32::from(n) << 16);
            let flags = if n.is_multiple_of(2) { 2 } else { n as u8 };
            tcp6(port, from, &to, Tcp { seq, ack, flags, ..Tcp::default() }, &vec![2; usize::from(n) % 900])
        }
        14 => echo6(port, if n.is_multiple_of(2) { ip6(&outside) } else { target }, n as u8, b"body"),
        15 => solicitation(port, if n.is_multiple_of(3) { ip6("::") } else { guest6(port) }, target, &[]),
        16 => {
            let h = Ip6 { src: link6(port), hops: 255, ..Ip6::new(port, ip6("ff02::2"), proto::ICMPV6) };
            h.frame(&h.icmp(130 + (n % 14) as u8, 0, [0; 4], &[0; 24]))
        }
        17 => {
            let mut header = vec![proto::UDP, 0];
            header.extend_from_slice(&(((n % 8) * 8) | u16::from(n.is_multiple_of(2))).to_be_bytes());
            header.extend_from_slice(&u32::from(n % 6).to_be_bytes());
            let h = Ip6 { extensions: Some((44, header)), ..Ip6::new(port, ip6(&outside), proto::UDP) };
            h.frame(&h.udp(from, 9, &[0; 16]))
        }
        18 => {
            let quote = udp6(A, 7, &format!("[{}]:{from}", guest6(port)), b"quoted");
            let h = Ip6::new(port, ip6(&outside), proto::ICMPV6);
            h.frame(&h.icmp((n % 5) as u8, 0, [0, 0, (n >> 8) as u8, n as u8], &quote[14..]))
        }
        _ => {
            let chain = [n as u8, (n % 3) as u8, 1, 4, 0, 0, 0, 0].repeat(1 + usize::from(n % 10));
            let first = [0, 43, 60, 44, 51][usize::from(n % 5)];
            Ip6 { extensions: Some((first, chain)), ..Ip6::new(port, target, 17) }.frame(&[0; 40])
        }
    }
}

fn limit(l: &mut Limits) {
    l.flows = 60;
    l.flows_per_port = 30;
    l.udp_sockets_per_port = 8;
    l.socket_memory = 4 << 20;
    l.reassembly_bytes = 20_000;
    l.reassemblies_per_port = 5;
    l.neighbour_waiting = 6;
    l.addresses_per_port = 3;
    l.macs_per_port = 3;
    l.buffer_per_port = 20_000;
}

fn network() -> Net {
    let mut c = config6();
    limit(&mut c.limits);
    let mut n = Net::with(c);
    n.core
        .add_port(LAX, PortConfig { lax_offload: true, gso_max: 60_000, mtu: 900, ..port_config() })
        .unwrap();
    n.core.bind_address(LAX, IpAddr::V4(guest_ip(LAX)), None).unwrap();
    n.core.add_service(ServiceId(1), proto::UDP, GATEWAY.parse().unwrap(), 67);
    n.core.add_service(ServiceId(2), proto::TCP, GATEWAY.parse().unwrap(), 53);
    n.core.add_service(ServiceId(3), proto::UDP, ip6(GATEWAY6).into(), 53);
    for (i, port) in [A, LAX].into_iter().enumerate() {
        let guest = guest_addr(port, 80);
        n.core.add_forward(ForwardId(i as u32 * 2), ForwardSpec::published(proto::UDP, guest));
        n.core.add_forward(ForwardId(i as u32 * 2 + 1), ForwardSpec::published(proto::TCP, guest));
    }
    n
}

fn socket_event(n: &mut Net, which: u16, kind: u8, v: u16) {
    let now = n.now;
    let pick = |list: &[(FlowId, SockId)]| list.get(usize::from(which) % list.len().max(1)).copied();
    let from = addr(&format!("203.0.113.{}:{}", 1 + v % 6, if v.is_multiple_of(3) { 53 } else { v % 40 }));
    let six =
        addr(&format!("[2001:db8::{}]:{}", 1 + v % 6, if v.is_multiple_of(3) { 53 } else { 1 + v % 40 }));
    let from = if which.is_multiple_of(2) { from } else { six };
    let payload = vec![3; usize::from(v) % 5000];
    if kind < 4 {
        let Some((flow, _)) = pick(&n.fx.opened) else { return };
        let e = DatagramError {
            kind: if v.is_multiple_of(2) { SockError::MessageTooBig(v) } else { SockError::Refused },
            offender: v.is_multiple_of(3).then_some(from.ip()),
            icmp_type: (v % 14) as u8,
            icmp_code: (v % 16) as u8,
            mtu: v,
            dst: from,
            seq: v,
            payload: &payload,
        };
        match kind {
            0 => n.core.udp_received(now, flow, from, &payload, 0, &mut n.fx),
            1 => n.core.udp_received(now, flow, from, &payload, 1 + v % 1500, &mut n.fx),
            2 => n.core.ping_received(now, flow, from.ip(), v, v as u8, &payload, &mut n.fx),
            _ => n.core.sock_error(now, flow, e, &mut n.fx),
        }
        return;
    }
    let Some((flow, sock)) = pick(&n.fx.connects) else { return };
    match kind {
        4 => n.core.tcp_connected(now, flow, Ok(()), &mut n.fx),
        5 => n.core.tcp_connected(now, flow, Err(SockError::HostUnreachable), &mut n.fx),
        _ => {
            if n.fx.socks.get(&sock).is_some_and(|s| s.closed.is_none()) {
                n.fx.sock(sock).inbox.extend(&payload);
                n.fx.sock(sock).eof = kind == 7;
                n.fx.sock(sock).held = usize::from(v) * 1000;
            }
            n.core.tcp_ready(now, flow, true, v.is_multiple_of(2), &mut n.fx);
        }
    }
}

/// What every step must leave behind.
fn check(n: &Net) {
    n.core.audit().unwrap();
    let mut flows = 0;
    for p in n.core.ports() {
        assert!(p.flows <= 30 && p.addresses.len() <= 7, "{p:?}");
        assert!(p.buffered <= 20_000 + 2048);
        flows += p.flows;
    }
    assert_eq!(n.core.flows().count(), flows as usize);
    assert!(n.core.reassembly_bytes() <= 20_000);
    let c = n.core.counters();
    assert_eq!(c.flows_opened - c.flows_closed, u64::from(flows));
    let open = n.fx.opened.len() + n.fx.connects.len() - n.fx.closed.len().min(n.fx.opened.len());
    assert!(open < 100_000);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_events(ops in proptest::collection::vec(op(), 1..250)) {
        let mut n = network();
        for op in ops {
            n.fx.frames.clear();
            n.fx.events.clear();
            match op {
                Op::Random(port, bytes) => frame(&mut n, PortId(port), bytes, FrameMeta::default()),
                Op::Good { port, kind, n: v, edits, fix, meta } => {
                    let mut f = good(PortId(port), kind, v);
                    for (at, byte) in edits {
                        let at = usize::from(at) % f.len();
                        f[at] = byte;
                    }
                    if fix && f.len() > 34 {
                        ipv4::fill_checksum(&mut f[14..]);
                    }
                    frame(&mut n, PortId(port), f, meta);
                }
                Op::Socket { which, kind, n: v } => socket_event(&mut n, which, kind, v),
                Op::Client { n: v, tcp } => {
                    let forward = ForwardId(u32::from(v % 2) * 2 + u32::from(tcp));
                    let from = addr(&format!("203.0.113.{}:{}", v % 9, 1 + v % 50));
                    let now = n.now;
                    if tcp {
                        let sock = n.fx.new_sock();
                        n.core.tcp_accepted(now, forward, sock, from, &mut n.fx);
                    } else {
                        let payload = vec![4; usize::from(v) % 3000];
                        let segment = if v % 5 == 0 { 700 } else { 0 };
                        n.core.udp_forward_received(now, forward, SockId(9), from, &payload, segment, &mut n.fx);
                    }
                }
                Op::Room(port, room) => {
                    n.fx.port(PortId(port)).room = room;
                    let now = n.now;
                    n.core.port_writable(now, PortId(port), &mut n.fx);
                }
                Op::Pass(ms) => {
                    n.pass_ms(u64::from(ms));
                }
                Op::Replug(port) => {
                    let now = n.now;
                    n.core.remove_port(now, PortId(port), &mut n.fx);
                    n.core.add_port(PortId(port), port_config()).unwrap();
                }
            }
            let now = n.now;
            n.core.batch_end(now, &mut n.fx);
            check(&n);
        }
        // Everything ends by itself, and then nothing is left to wake up for.
        n.pass_ms(9_000_000);
        prop_assert_eq!(n.core.flows().count(), 0);
        // But for the router, which advertises itself to all once somebody has asked.
        n.fx.frames.clear();
        if let Some(at) = n.core.next_timer() {
            n.pass_ms(at.since(n.now) / 1_000_000 + 1);
            prop_assert!(n.fx.frames.iter().all(|s| s.frame[54] == icmp6::ROUTER_ADVERTISEMENT));
        }
        prop_assert_eq!(n.core.reassembly_bytes(), 0);
        let open: Vec<_> = n.fx.socks.values().filter(|s| s.flow.is_some() && s.closed.is_none()).collect();
        prop_assert!(open.is_empty(), "sockets left open: {:?}", open);
        for p in n.core.ports() {
            prop_assert_eq!((p.flows, p.buffered), (0, 0));
        }
    }
}

/// Hands in a frame: it is counted, and what is dropped is counted once and with nothing else done.
fn frame(n: &mut Net, port: PortId, bytes: Vec<u8>, meta: FrameMeta) {
    let known = n.core.port_counters(port).is_some();
    let before = n.core.counters();
    n.send_meta(port, bytes, meta);
    let after = n.core.counters();
    assert_eq!(after.rx_frames - before.rx_frames, u64::from(known));
    if !known {
        let drops = |c: &guestnet_core::stats::Counters| c.drops.iter().sum::<u64>();
        assert_eq!(drops(&after) - drops(&before), 1);
    }
    let sent = n.fx.frames.len() as u64;
    assert_eq!(after.tx_frames - before.tx_frames, sent, "every frame to a guest is counted");
}
