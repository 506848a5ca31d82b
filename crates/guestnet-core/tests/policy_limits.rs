//! Limits of the owner: TCP is slowed by its windows and loses nothing, datagrams are dropped, flows are refused.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/net.rs"]
mod net;

use guestnet_core::config::ForwardSpec;
use guestnet_core::policy::shaping::LimitSpec;
use guestnet_core::policy::spec::{
    Action, Destination, Net as Prefix, PolicyOptions, PolicySpec, RuleDirection, RuleSpec,
};
use guestnet_core::policy::table::RuleTable;
use guestnet_core::stats::DropReason;
use guestnet_core::types::{ForwardId, PortId, SockId, Time};
use guestnet_wire::tcp::{Tcp, flags};
use guestnet_wire::{be16, be32, proto};
use net::*;
use std::sync::Arc;

const SERVER: &str = "203.0.113.1:80";
const OTHER: &str = "198.51.100.1:80";
const MSS: usize = 1460;

fn rate(up: u64, down: u64) -> LimitSpec {
    LimitSpec { up: Some(up), down: Some(down), ..LimitSpec::default() }
}

/// A guest that uploads within the window that it is offered.
struct Upload {
    port: PortId,
    from: u16,
    to: &'static str,
    sock: SockId,
    start: u32,
    next: u32,
    /// Right edge of the window.
    edge: u32,
    ours: u32,
}

impl Upload {
    fn open(n: &mut Net, port: PortId, from: u16, to: &'static str) -> Upload {
        n.send(port, syn(port, from, to));
        let (flow, sock) = *n.fx.connects.last().unwrap();
        n.fx.frames.clear();
        n.core.tcp_connected(n.now, flow, Ok(()), &mut n.fx);
        let answer = read(&n.fx.take()[0]);
        let (ours, start) = (be32(answer.l4(), 4).wrapping_add(1), 1001);
        let edge = start + u32::from(be16(answer.l4(), 14));
        n.segment(port, from, to, start, ours, flags::ACK);
        Upload { port, from, to, sock, start, next: start, edge, ours }
    }

    /// Takes in the ACKs among the frames for it.
    fn heed(&mut self, n: &Net) {
        for sent in &n.fx.frames {
            let got = read(sent);
            if got.dst() != guest_addr(self.port, self.from) || got.src() != addr(self.to) {
                continue;
            }
            // The guest did not ask for window scaling.
            self.edge = be32(got.l4(), 8).wrapping_add(u32::from(be16(got.l4(), 14)));
        }
    }

    /// Fills the window.
    fn push(&mut self, n: &mut Net) {
        while self.next + MSS as u32 <= self.edge {
            let seg = Tcp {
                src_port: self.from,
                dst_port: addr(self.to).port(),
                seq: self.next,
                ack: self.ours,
                flags: flags::ACK,
                window: 65535,
                ..Tcp::default()
            };
            let h = Ip4::new(self.port, addr(self.to).ip(), proto::TCP);
            n.send(self.port, tcp_frame(&h, &seg, &[7; MSS]));
            self.next += MSS as u32;
        }
    }

    fn carried(&self, n: &mut Net) -> usize {
        n.fx.sock(self.sock).sent.len()
    }
}

/// Runs uploads for so many milliseconds; bytes that each socket got.
fn run(n: &mut Net, uploads: &mut [Upload], ms: u64) -> Vec<usize> {
    let before: Vec<usize> = uploads.iter().map(|u| u.carried(n)).collect();
    let end = n.now.0 + ms * 1_000_000;
    while n.now.0 < end {
        for u in uploads.iter_mut() {
            u.push(n);
        }
        for u in uploads.iter_mut() {
            u.heed(n);
        }
        n.fx.frames.clear();
        let next = n.core.next_timer().map_or(end, |t| t.0.max(n.now.0 + 1)).min(n.now.0 + 1_000_000);
        n.now = Time(next.min(end));
        n.core.timers(n.now, &mut n.fx);
        n.core.batch_end(n.now, &mut n.fx);
        for u in uploads.iter_mut() {
            u.heed(n);
        }
    }
    n.core.audit().unwrap();
    uploads.iter().zip(before).map(|(u, was)| u.carried(n) - was).collect()
}

#[test]
fn an_upload_is_slowed_by_its_window_and_loses_nothing() {
    let mut n = Net::new();
    assert!(n.core.set_limit(n.now, Some(A), Some(rate(100_000, 100_000))));
    assert!(!n.core.set_limit(n.now, Some(PortId(99)), None));
    let mut uploads = [Upload::open(&mut n, A, 4000, SERVER), Upload::open(&mut n, B, 4000, SERVER)];
    run(&mut n, &mut uploads, 500);
    let drops = n.all_drops();
    let carried = run(&mut n, &mut uploads, 2_000);
    assert!(carried[0].abs_diff(200_000) < 4_000, "{carried:?}");
    assert!(carried[1] > 2_000_000, "another guest is not limited: {carried:?}");
    assert_eq!(n.all_drops(), drops, "nothing was dropped");
    // What waits here is a fraction of a second's worth.
    let waiting = uploads[0].next - uploads[0].start - uploads[0].carried(&mut n) as u32;
    assert!(waiting < 30_000, "{waiting}");
    // The limit goes: what waits is sent, and the window opens.
    assert!(n.core.set_limit(n.now, Some(A), None));
    let carried = run(&mut n, &mut uploads, 500);
    assert!(carried[0] > 500_000, "{carried:?}");
}

#[test]
fn flows_of_a_guest_and_guests_of_a_network_share_evenly() {
    let mut n = Net::new();
    assert!(n.core.set_limit(n.now, None, Some(rate(300_000, 300_000))));
    let mut uploads = [
        Upload::open(&mut n, A, 4000, SERVER),
        Upload::open(&mut n, A, 4001, SERVER),
        Upload::open(&mut n, B, 4000, SERVER),
    ];
    run(&mut n, &mut uploads, 1_000);
    let carried = run(&mut n, &mut uploads, 5_000);
    let sum: usize = carried.iter().sum();
    assert!(sum.abs_diff(1_500_000) < 30_000, "{carried:?}");
    assert!(carried.iter().all(|c| c.abs_diff(sum / 3) < sum / 20), "{carried:?}");
}

#[test]
fn a_download_is_left_in_the_socket() {
    let mut n = Net::new();
    assert!(n.core.set_limit(n.now, Some(A), Some(rate(100_000, 100_000))));
    let (flow, sock) = n.open_tcp(A, 4000, SERVER);
    n.fx.sock(sock).endless = true;
    n.core.tcp_ready(n.now, flow, true, false, &mut n.fx);
    let (mut next, mut got) = (n.isn.wrapping_add(1), 0usize);
    let end = n.now.0 + 3_000_000_000;
    while n.now.0 < end {
        for sent in n.fx.take() {
            let frame = read(&sent);
            let len = frame.payload().len();
            if len > 0 {
                got += len;
                next = be32(frame.l4(), 4).wrapping_add(len as u32);
            }
        }
        n.segment(A, 4000, SERVER, 1001, next, flags::ACK);
        n.now = Time(n.now.0 + 1_000_000);
        n.core.timers(n.now, &mut n.fx);
        n.core.batch_end(n.now, &mut n.fx);
    }
    assert!(got.abs_diff(303_000) < 8_000, "{got}");
    assert_eq!(n.drops(DropReason::RateLimit), 0);
}

#[test]
fn datagrams_beyond_the_rate_are_dropped_either_way() {
    let mut n = Net::new();
    assert!(n.core.set_limit(n.now, Some(A), Some(rate(100_000, 100_000))));
    n.udp(A, 4000, SERVER, &[1; 100]);
    let (flow, _) = n.opened();
    for _ in 0..1_000 {
        n.pass_ms(1);
        n.udp(A, 4000, SERVER, &[1; 1000]);
        n.udp_reply(flow, SERVER, &[2; 1000]);
    }
    let up: usize = n.fx.datagrams.iter().map(|d| d.payload.len()).sum();
    let down: usize = n.fx.frames.iter().map(|s| read(s).payload().len()).sum();
    assert!(up.abs_diff(103_000) < 3_000, "{up}");
    assert!(down.abs_diff(103_000) < 3_000, "{down}");
    let dropped = n.drops(DropReason::RateLimit);
    assert!((1_700..1_900).contains(&dropped), "{dropped}");
}

#[test]
fn a_flow_whose_first_datagram_is_dropped_ends_too() {
    let mut n = Net::new();
    assert!(n.core.set_limit(n.now, None, Some(rate(0, 0))));
    let guest = guest_addr(A, 53);
    n.core.add_forward(ForwardId(1), ForwardSpec::published(proto::UDP, guest));
    let sock = n.fx.new_sock();
    for client in 0..50 {
        n.udp(A, 5000 + client, SERVER, &[1; 1000]);
        let from = addr(&format!("198.51.100.7:{}", 50_000 + u32::from(client)));
        n.core.udp_forward_received(n.now, ForwardId(1), sock, from, &[2; 1000], 0, &mut n.fx);
    }
    assert_eq!(n.core.flows().count(), 100);
    assert!(n.drops(DropReason::RateLimit) > 90);
    n.pass_ms(301_000);
    assert_eq!(n.core.flows().count(), 0);
    n.core.audit().unwrap();
}

#[test]
fn flows_beyond_their_limits_are_refused() {
    let mut n = Net::new();
    let spec = LimitSpec { new_flows: Some(3), open_flows: Some(5), ..LimitSpec::default() };
    assert!(n.core.set_limit(n.now, Some(A), Some(spec)));
    let opened =
        |n: &mut Net, from: u16| (0..10).filter(|i| n.try_open_tcp(A, from + i, SERVER).is_some()).count();
    assert_eq!(opened(&mut n, 4000), 3);
    assert_eq!(n.drops(DropReason::RateLimit), 7);
    n.pass_ms(5_000);
    assert_eq!(opened(&mut n, 5000), 2);
    assert_eq!(n.drops(DropReason::FlowLimit), 8);
    assert!(n.try_open_tcp(B, 4000, SERVER).is_some());
}

#[test]
fn a_rule_limits_the_flows_that_it_admits() {
    let mut n = Net::new();
    let prefix = |text: &str| Destination::Net(Prefix::new(text.parse().unwrap(), 24).unwrap());
    let rule = |to: &str, limit| RuleSpec {
        label: to.into(),
        action: Action::Allow,
        direction: RuleDirection::Out,
        endpoints: None,
        from: Vec::new(),
        destination: prefix(to),
        ports: Vec::new(),
        by: guestnet_core::policy::spec::NameMatch::Conversation,
        log: false,
        limit,
        all_query_types: false,
    };
    let rules = vec![rule("203.0.113.0", Some(rate(100_000, 100_000))), rule("198.51.100.0", None)];
    let spec = PolicySpec { rules, default: Action::Deny, options: PolicyOptions::default() };
    let table = Arc::new(RuleTable::compile(spec).unwrap());
    n.core.set_rules(n.now, None, Some(table.clone()));
    let mut uploads = [
        Upload::open(&mut n, A, 4000, SERVER),
        Upload::open(&mut n, B, 4000, SERVER),
        Upload::open(&mut n, A, 4001, OTHER),
    ];
    run(&mut n, &mut uploads, 500);
    let carried = run(&mut n, &mut uploads, 2_000);
    assert!((carried[0] + carried[1]).abs_diff(200_000) < 8_000, "{carried:?}");
    assert!(carried[0].abs_diff(carried[1]) < 30_000, "{carried:?}");
    assert!(carried[2] > 2_000_000, "{carried:?}");
    n.core.set_rules(n.now, None, None);
    let carried = run(&mut n, &mut uploads, 500);
    assert!(carried[0] > 500_000 && carried[1] > 500_000, "{carried:?}");
}
