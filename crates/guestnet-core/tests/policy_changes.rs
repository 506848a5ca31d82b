//! Changes of the rules while flows run: what is no longer allowed is cut, in steps, and both sides see it.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/net.rs"]
mod net;

use guestnet_core::config::ForwardSpec;
use guestnet_core::effects::{Close, Event, FlowDenied};
use guestnet_core::policy::{Direction, Entry, Isolated};
use guestnet_core::stats::DropReason;
use guestnet_core::types::{ForwardId, NetMode, PortId, SockId};
use guestnet_wire::tcp::{Tcp, flags};
use guestnet_wire::{icmp, proto};
use net::*;

const X1: &str = "203.0.113.1:443";
const PROHIBITED: (u8, u8) = (icmp::UNREACHABLE, icmp::unreachable::ADMIN_PROHIBITED);

fn change(n: &mut Net, mode: NetMode) {
    assert!(n.core.set_policy(n.now, mode, Isolated::Nobody));
}

/// How many flows the change has cut, once that is known.
fn cut(n: &mut Net) -> u64 {
    n.pass_ms(0);
    n.core.audit().unwrap();
    n.core.take_flows_cut().expect("all flows have been judged again")
}

fn denials(n: &Net) -> Vec<FlowDenied> {
    let denied = |e: &Event| match e {
        Event::FlowDenied(d) => Some((**d).clone()),
        _ => None,
    };
    n.fx.events.iter().filter_map(denied).collect()
}

/// A client connects to a published port of A and the guest accepts. The client's socket.
fn accept(n: &mut Net, forward: u32, entry: Entry) -> SockId {
    let guest = guest_addr(A, 8000 + forward as u16);
    n.core.add_forward(ForwardId(forward), ForwardSpec { proto: proto::TCP, guest, entry });
    let sock = n.fx.new_sock();
    let client = addr("198.51.100.7:50000");
    n.fx.frames.clear();
    assert!(n.core.tcp_accepted(n.now, ForwardId(forward), sock, client, &mut n.fx).is_some());
    let isn = Tcp::parse(read(&n.fx.take()[0]).l4()).unwrap().seq;
    let seg = Tcp {
        src_port: guest.port(),
        dst_port: client.port(),
        seq: 5000,
        ack: isn.wrapping_add(1),
        flags: flags::SYN | flags::ACK,
        window: 65535,
        ..Tcp::default()
    };
    n.send(A, tcp_frame(&Ip4::new(A, client.ip(), proto::TCP), &seg, &[]));
    sock
}

#[test]
fn host_only_resets_connections_at_both_ends() {
    let mut n = Net::new();
    let (_, sock) = n.open_tcp(A, 4000, X1);
    n.fx.frames.clear();
    change(&mut n, NetMode::HostOnly);
    assert_eq!(cut(&mut n), 1);
    assert_eq!(n.fx.closed, [(sock, Close::Reset)]);
    let rst = read(&n.fx.take()[0]);
    assert_eq!((rst.src(), rst.dst()), (addr(X1), guest_addr(A, 4000)));
    assert_eq!(Tcp::parse(rst.l4()).unwrap().flags & flags::RST, flags::RST);
    assert_eq!(n.core.flows().count(), 0);
    let d = denials(&n).remove(0);
    assert_eq!(
        (d.direction, d.proto, d.rule.as_deref()),
        (Direction::Outbound, proto::TCP, Some("host_only"))
    );
    assert_eq!((d.port, d.guest, d.remote), (A, guest_addr(A, 4000), addr(X1)));
    // Its next connect is refused, and the other way round allowed again.
    assert!(n.try_open_tcp(A, 4001, X1).is_none());
    change(&mut n, NetMode::Nat);
    assert_eq!(cut(&mut n), 0);
    n.open_tcp(A, 4002, X1);
}

#[test]
fn host_only_ends_datagram_flows_and_refuses_what_follows() {
    let mut n = Net::new();
    n.udp(A, 4000, "203.0.113.1:53", b"x");
    n.send(A, echo_frame(A, "203.0.113.9", 7, 1, 64, b"x"));
    assert_eq!(n.core.flows().count(), 2);
    change(&mut n, NetMode::HostOnly);
    assert_eq!(cut(&mut n), 2);
    assert_eq!((n.core.flows().count(), n.fx.closed.len()), (0, 2));
    for frame in
        [udp_frame(A, 4000, addr("203.0.113.1:53"), b"y"), echo_frame(A, "203.0.113.9", 7, 2, 64, b"y")]
    {
        let told = n.ask(A, frame);
        assert_eq!(read(&told[0]).icmp(), PROHIBITED);
    }
}

#[test]
fn host_only_keeps_connections_through_published_ports_and_cuts_those_through_ports_of_guests() {
    let mut n = Net::new();
    let published = accept(&mut n, 1, Entry::Published);
    let opened_by_guest = accept(&mut n, 2, Entry::GuestPort);
    change(&mut n, NetMode::HostOnly);
    assert_eq!(cut(&mut n), 1);
    assert_eq!(n.fx.closed, [(opened_by_guest, Close::Reset)]);
    assert_ne!(published, opened_by_guest);
    let d = denials(&n).remove(0);
    assert_eq!((d.direction, d.rule.as_deref()), (Direction::Inbound(Entry::GuestPort), Some("host_only")));
    // New clients are judged in the same way.
    let client = addr("198.51.100.7:50001");
    let sock = n.fx.new_sock();
    n.dropped(DropReason::Policy, |n| {
        assert!(n.core.tcp_accepted(n.now, ForwardId(2), sock, client, &mut n.fx).is_none());
    });
    assert!(n.core.tcp_accepted(n.now, ForwardId(1), sock, client, &mut n.fx).is_some());
}

#[test]
fn connections_to_services_of_the_gateway_are_kept() {
    let mut n = Net::new();
    let gateway = format!("{GATEWAY}:53");
    n.core.add_service(guestnet_core::types::ServiceId(1), proto::TCP, addr(&gateway).ip(), 53);
    n.open_tcp(A, 4000, &gateway);
    change(&mut n, NetMode::HostOnly);
    assert_eq!(cut(&mut n), 0);
    assert_eq!(n.states(), [(4000, "established")]);
}

#[test]
fn many_flows_are_cut_in_small_steps() {
    let mut n = Net::new();
    for port in 1..=1000 {
        n.open_tcp(A, port, X1);
    }
    n.fx.events.clear();
    change(&mut n, NetMode::HostOnly);
    let (mut steps, mut before) = (0, 0);
    while n.core.take_flows_cut().is_none_or(|all| {
        assert_eq!(all, 1000);
        false
    }) {
        assert_eq!(n.core.next_timer(), Some(n.now), "there is more to do");
        n.core.timers(n.now, &mut n.fx);
        let closed = n.fx.closed.len();
        assert!(closed - before <= 64, "{} in one step", closed - before);
        (steps, before) = (steps + 1, closed);
    }
    assert!(steps >= 1000 / 64 && before == 1000);
    // Within the rate of one guest.
    assert_eq!(denials(&n).len(), 100);
}

#[test]
fn a_change_during_a_change_begins_anew_and_counts_what_both_cut() {
    let mut n = Net::new();
    for port in 1..=200 {
        n.open_tcp(A, port, X1);
    }
    change(&mut n, NetMode::HostOnly);
    n.core.timers(n.now, &mut n.fx);
    assert_eq!(n.core.take_flows_cut(), None);
    let gone = n.fx.closed.len() as u64;
    change(&mut n, NetMode::Nat);
    assert_eq!(cut(&mut n), gone);
    assert_eq!(n.core.flows().count() as u64, 200 - gone);
}

#[test]
fn a_flow_that_waits_for_its_guest_is_cut_without_a_segment() {
    let mut n = Net::new();
    let quiet = PortId(3);
    let addresses = vec![guest_ip(quiet).into()];
    n.core.add_port(quiet, guestnet_core::types::PortConfig { addresses, ..port_config() }).unwrap();
    let spec = ForwardSpec { proto: proto::TCP, guest: guest_addr(quiet, 80), entry: Entry::GuestPort };
    n.core.add_forward(ForwardId(1), spec);
    let sock = n.fx.new_sock();
    assert!(n.core.tcp_accepted(n.now, ForwardId(1), sock, addr("198.51.100.7:1"), &mut n.fx).is_some());
    n.fx.frames.clear();
    change(&mut n, NetMode::HostOnly);
    assert_eq!(cut(&mut n), 1);
    assert_eq!(n.fx.closed, [(sock, Close::Reset)]);
    assert!(n.fx.take().is_empty());
    n.pass_ms(10_000);
}

#[test]
fn a_bridged_network_has_no_rules_to_change() {
    let mut n = Net::new();
    assert!(!n.core.set_policy(n.now, NetMode::Bridged, Isolated::Nobody));
    let mut c = config();
    c.mode = NetMode::Bridged;
    let mut n = Net::with(c);
    assert!(!n.core.set_policy(n.now, NetMode::Nat, Isolated::Nobody));
}

#[test]
fn refused_flows_are_reported_within_a_rate_and_the_others_are_counted() {
    let mut c = config();
    c.mode = NetMode::HostOnly;
    let mut n = Net::with(c);
    for port in 1..=1000 {
        n.udp(A, port, X1, b"x");
    }
    assert_eq!(n.drops(DropReason::Policy), 1000);
    assert_eq!(denials(&n).len(), 100);
    n.pass_ms(1000);
    n.fx.events.clear();
    n.udp(A, 1, X1, b"x");
    n.udp(B, 1, X1, b"x");
    let unreported: Vec<(PortId, u32)> = denials(&n).iter().map(|d| (d.port, d.unreported)).collect();
    assert_eq!(unreported, [(A, 900), (B, 0)]);
}
