//! Theory of operation: how bulk TCP flows share the worker with each other and with everything else. A round is
//! what the core sends between two ends of a batch; whatever arrives meanwhile waits for it.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/net.rs"]
mod net;

use guestnet_core::types::{FlowId, PortConfig, PortId, SockId};
use guestnet_wire::tcp::{Options, Tcp, flags};
use guestnet_wire::{checksum, proto};
use net::*;
use std::net::IpAddr;

const SERVER: &str = "203.0.113.1:80";
/// The largest frame, roughly.
const FRAME: usize = 64 << 10;
const TURN: usize = 256 << 10;
const TURN_SHORT: usize = 32 << 10;

fn net() -> Net {
    let mut n = Net::with(config());
    for port in [A, B] {
        n.core.remove_port(n.now, port, &mut n.fx);
        n.core.add_port(port, PortConfig { gso_max: 65535, ..port_config() }).unwrap();
        n.hello(port);
    }
    n
}

fn segment(port: PortId, from: u16, seg: Tcp, options: &Options) -> Vec<u8> {
    let h = Ip4::new(port, addr(SERVER).ip(), proto::TCP);
    let mut b = vec![0; 60];
    let len = Tcp { src_port: from, dst_port: 80, ..seg }.emit(options, &mut b);
    b.truncate(len);
    let s = checksum::pseudo(IpAddr::V4(h.src), IpAddr::V4(h.dst), proto::TCP, b.len() as u32);
    let c = checksum::finish(checksum::sum(&b, s));
    b[16..18].copy_from_slice(&c.to_be_bytes());
    h.frame(&b)
}

/// An open connection with a window of 8 MiB.
struct Conn {
    port: PortId,
    from: u16,
    flow: FlowId,
    sock: SockId,
    next: u32,
}

impl Conn {
    fn open(n: &mut Net, port: PortId, from: u16) -> Conn {
        let options = Options { mss: Some(1460), wscale: Some(7), ..Options::default() };
        let syn = Tcp { seq: 1000, flags: flags::SYN, window: 65535, ..Tcp::default() };
        n.send(port, segment(port, from, syn, &options));
        let (flow, sock) = *n.fx.connects.last().unwrap();
        n.fx.frames.clear();
        n.core.tcp_connected(n.now, flow, Ok(()), &mut n.fx);
        let answer = read(&n.fx.take()[0]);
        let next = guestnet_wire::be32(answer.l4(), 4) + 1;
        let mut c = Conn { port, from, flow, sock, next };
        c.ack(n, next);
        c
    }

    fn ack(&mut self, n: &mut Net, ack: u32) {
        self.next = ack;
        let seg = Tcp { seq: 1001, ack, flags: flags::ACK, window: 65535, ..Tcp::default() };
        n.core.frame(
            n.now,
            self.port,
            &mut segment(self.port, self.from, seg, &Options::default()),
            Default::default(),
            &mut n.fx,
        );
    }

    /// The server sends without end.
    fn download(&self, n: &mut Net) {
        n.fx.sock(self.sock).endless = true;
        n.core.tcp_ready(n.now, self.flow, true, false, &mut n.fx);
    }
}

/// Ends the batch: the payload of each frame that was sent since the last time, with the port it went to. The
/// guests acknowledge all of it.
fn round(n: &mut Net, conns: &mut [Conn]) -> Vec<(u16, usize)> {
    n.core.batch_end(n.now, &mut n.fx);
    let mut sent = Vec::new();
    for s in n.fx.take() {
        let got = read(&s);
        let to = got.dst().port();
        sent.push((to, got.payload().len()));
        if let Some(c) = conns.iter_mut().find(|c| c.from == to) {
            let end = guestnet_wire::be32(got.l4(), 4).wrapping_add(got.payload().len() as u32);
            c.ack(n, end);
        }
    }
    sent
}

fn bytes(sent: &[(u16, usize)]) -> usize {
    sent.iter().map(|(_, len)| len).sum()
}

#[test]
fn a_lone_download_has_long_turns() {
    let mut n = net();
    let mut conns = [Conn::open(&mut n, A, 4000)];
    conns[0].download(&mut n);
    round(&mut n, &mut conns);
    for _ in 0..20 {
        let sent = bytes(&round(&mut n, &mut conns));
        assert!((TURN..TURN + FRAME).contains(&sent), "{sent}");
        assert!(n.core.has_more());
    }
    n.core.audit().unwrap();
}

#[test]
fn a_round_trip_beside_downloads_waits_for_one_frame() {
    let mut n = net();
    let mut conns: Vec<Conn> = (0..8).map(|i| Conn::open(&mut n, [A, B][i % 2], 4000 + i as u16)).collect();
    for c in &conns {
        c.download(&mut n);
    }
    n.now = n.now.plus_ms(20);
    round(&mut n, &mut conns);
    let quiet = bytes(&round(&mut n, &mut conns));
    assert!((4 * TURN..4 * TURN + FRAME).contains(&quiet), "{quiet}");
    n.udp(A, 5000, "203.0.113.1:7", b"question");
    let (flow, _) = n.opened();
    n.fx.take();
    for _ in 0..10 {
        n.now = n.now.plus_ms(1);
        n.udp_reply(flow, "203.0.113.1:7", b"answer");
        let sent = round(&mut n, &mut conns);
        assert_eq!(sent[0], (5000, 6));
        assert!((TURN_SHORT..TURN_SHORT + FRAME).contains(&bytes(&sent)), "{sent:?}");
    }
    // Nobody else is active any more.
    n.now = n.now.plus_ms(15);
    let _first = round(&mut n, &mut conns);
    assert!(bytes(&round(&mut n, &mut conns)) >= 2 * TURN);
    n.core.audit().unwrap();
}

#[test]
fn downloads_have_their_turns_in_order_and_small_answers_go_before_them() {
    let mut n = net();
    let mut conns: Vec<Conn> = (0..5).map(|i| Conn::open(&mut n, A, 4000 + i)).collect();
    for c in &conns[1..] {
        c.download(&mut n);
    }
    n.udp(B, 5000, "203.0.113.1:7", b"question");
    let (flow, _) = n.opened();
    n.fx.take();
    round(&mut n, &mut conns);
    let small = (conns[0].flow, conns[0].sock);
    let mut turns = [0; 4];
    for k in 0..40 {
        n.now = n.now.plus_ms(1);
        n.udp_reply(flow, "203.0.113.1:7", b"x");
        n.fx.sock(small.1).inbox.extend([7; 100]);
        n.core.tcp_ready(n.now, small.0, true, false, &mut n.fx);
        // A socket that has news does not overtake those that wait.
        n.core.tcp_ready(n.now, conns[1].flow, true, false, &mut n.fx);
        let sent = round(&mut n, &mut conns);
        assert_eq!((sent[0].1, sent[1]), (1, (4000, 100)), "round {k}: {sent:?}");
        for (to, len) in &sent[2..] {
            turns[usize::from(*to) - 4001] += len;
        }
    }
    let (least, most) = (turns.iter().min().unwrap(), turns.iter().max().unwrap());
    assert!(*least > 0 && most - least <= 2 * FRAME, "{turns:?}");
    n.core.audit().unwrap();
}

/// The own requests and answers of a flow do not make it a stranger to itself.
#[test]
fn a_flow_that_begins_to_download_has_long_turns_from_the_second_on() {
    let mut n = net();
    let mut conns = [Conn::open(&mut n, A, 4000)];
    n.now = n.now.plus_ms(20);
    n.fx.sock(conns[0].sock).inbox.extend([7; 100]);
    n.core.tcp_ready(n.now, conns[0].flow, true, false, &mut n.fx);
    round(&mut n, &mut conns);
    conns[0].download(&mut n);
    assert!(bytes(&round(&mut n, &mut conns)) >= TURN_SHORT + TURN);
}

#[test]
fn a_port_with_many_flows_is_removed_in_steps() {
    let mut n = net();
    for i in 0..1000u16 {
        n.udp(A, 1000 + i % 10, &format!("203.0.113.1:{}", 2000 + i), b"x");
        n.udp(B, 1000 + i % 10, &format!("203.0.113.1:{}", 2000 + i), b"x");
    }
    assert_eq!(n.core.flows().count(), 2000);
    for left in [900, 800, 700] {
        assert!(n.core.close_flows_of(n.now, A, 100, &mut n.fx));
        assert_eq!(n.core.flows().filter(|f| f.port == A).count(), left);
        n.core.audit().unwrap();
    }
    assert!(!n.core.close_flows_of(n.now, A, 700, &mut n.fx));
    n.core.remove_port(n.now, A, &mut n.fx);
    assert!(!n.core.close_flows_of(n.now, A, 1, &mut n.fx));
    // The sockets went with the flows, and the other guest has all of its own.
    assert_eq!((n.core.flows().count(), n.fx.closed.len()), (1000, 10));
    n.core.audit().unwrap();
}

#[test]
fn flows_that_end_in_the_same_moment_end_in_steps() {
    let mut n = net();
    for i in 0..1000u16 {
        n.udp(A, 1000, &format!("203.0.113.1:{}", 2000 + i), b"x");
    }
    n.now = n.now.plus_ms(3_600_000);
    let mut left = 1000;
    while n.core.next_timer().is_some_and(|t| t <= n.now) {
        n.core.timers(n.now, &mut n.fx);
        let now = n.core.flows().count();
        assert!(left - now <= 256, "{left} to {now}");
        left = now;
    }
    assert_eq!(left, 0);
    n.core.audit().unwrap();
}
