//! Rules for flows between guests: who may open one, what passes as an answer, and what a change of the rules does.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/net.rs"]
mod net;

use guestnet_core::effects::{Event, FlowDenied};
use guestnet_core::policy::{Direction, Isolated};
use guestnet_core::stats::DropReason;
use guestnet_core::types::{NetMode, PortId};
use guestnet_wire::arp;
use guestnet_wire::ether::Mac;
use guestnet_wire::{icmp, proto};
use net::*;
use std::sync::Arc;

const C: PortId = PortId(3);

/// Three guests, of which those in `trusted` open flows to others.
fn isolated(trusted: &[PortId]) -> Net {
    let mut c = config();
    c.isolated = all_except(trusted);
    let mut n = Net::with(c);
    n.core.add_port(C, port_config()).unwrap();
    n.hello(C);
    n
}

fn all_except(trusted: &[PortId]) -> Isolated {
    Isolated::AllExcept(Arc::new(trusted.iter().copied().collect()))
}

/// A datagram between guests, to the guest's own MAC or to the gateway's.
fn datagram(from: (PortId, u16), to: (PortId, u16), routed: bool) -> Vec<u8> {
    let h = Ip4::new(from.0, guest_ip(to.0).into(), proto::UDP);
    let to_mac = if routed { GATEWAY_MAC } else { mac(to.0) };
    udp_from(&Ip4 { to_mac, ..h }, from.1, to.1, b"x")
}

fn denials(n: &Net) -> Vec<FlowDenied> {
    let denied = |e: &Event| match e {
        Event::FlowDenied(d) => Some((**d).clone()),
        _ => None,
    };
    n.fx.events.iter().filter_map(denied).collect()
}

/// The ports that a frame of a guest reaches.
fn reached(n: &mut Net, from: PortId, frame: Vec<u8>) -> Vec<PortId> {
    n.ask(from, frame).iter().map(|s| s.port).collect()
}

#[test]
fn an_isolated_guest_is_refused_on_the_wire_and_through_the_gateway() {
    for routed in [false, true] {
        let mut n = isolated(&[]);
        let told = n.ask(A, datagram((A, 1), (B, 2), routed));
        assert_eq!(told.len(), 1, "nothing reaches the other guest");
        let got = read(&told[0]);
        assert_eq!((told[0].port, got.icmp()), (A, (icmp::UNREACHABLE, icmp::unreachable::ADMIN_PROHIBITED)));
        assert_eq!(got.src().ip(), ip(GATEWAY));
        assert_eq!(n.drops(DropReason::Policy), 1);
        let d = denials(&n).remove(0);
        assert_eq!((d.direction, d.rule.as_deref()), (Direction::BetweenGuests, Some("isolated")));
        assert_eq!((d.port, d.guest, d.remote), (A, guest_addr(A, 1), guest_addr(B, 2)));
    }
}

#[test]
fn isolated_guests_still_reach_the_gateway_and_the_outside() {
    let mut n = isolated(&[]);
    assert_eq!(reached(&mut n, A, echo_frame(A, GATEWAY, 1, 1, 64, b"x")), [A]);
    n.open_tcp(A, 4000, "203.0.113.1:443");
    let question = arp_frame(arp::REQUEST, mac(A), guest_ip(A), Mac::BROADCAST, guest_ip(B));
    assert_eq!(reached(&mut n, A, question), [B], "so that a refusal is told at once");
}

#[test]
fn broadcasts_of_isolated_guests_reach_nobody() {
    let mut n = isolated(&[B]);
    let to_all = |from: PortId, to: &str| {
        let to_mac = Mac::BROADCAST;
        udp_from(&Ip4 { to_mac, ..Ip4::new(from, addr(to).ip(), proto::UDP) }, 5353, 5353, b"who is there")
    };
    for to in ["192.168.64.255:5353", "224.0.0.251:5353"] {
        assert_eq!(reached(&mut n, A, to_all(A, to)), []);
        assert_eq!(reached(&mut n, B, to_all(B, to)), [A, C]);
    }
    assert_eq!(n.drops(DropReason::Policy), 2);
}

#[test]
fn a_trusted_guest_opens_flows_and_gets_answers() {
    for routed in [false, true] {
        let mut n = isolated(&[B]);
        assert_eq!(reached(&mut n, A, datagram((A, 2), (B, 1), routed)), [A], "refused, and told");
        assert_eq!(reached(&mut n, B, datagram((B, 1), (A, 2), routed)), [A]);
        for _ in 0..3 {
            assert_eq!(reached(&mut n, A, datagram((A, 2), (B, 1), routed)), [B], "an answer");
        }
        assert_eq!(reached(&mut n, A, datagram((A, 3), (B, 1), routed)), [A], "another flow");
        assert_eq!(reached(&mut n, A, datagram((A, 2), (C, 1), routed)), [A], "another guest");
        assert_eq!(n.drops(DropReason::Policy), 3);
    }
}

#[test]
fn conversations_that_are_no_longer_allowed_are_cut_and_counted() {
    let mut n = isolated(&[B, C]);
    n.send(B, datagram((B, 1), (A, 2), false));
    n.send(C, datagram((C, 1), (A, 2), false));
    n.send(C, datagram((C, 1), (B, 2), false));
    assert!(n.core.set_policy(n.now, NetMode::Nat, all_except(&[C])));
    n.pass_ms(0);
    assert_eq!(n.core.take_flows_cut(), Some(1));
    assert_eq!(reached(&mut n, A, datagram((A, 2), (B, 1), false)), [A], "no longer an answer");
    assert_eq!(reached(&mut n, A, datagram((A, 2), (C, 1), false)), [C]);
    assert!(n.core.set_policy(n.now, NetMode::Nat, Isolated::Nobody));
    n.pass_ms(0);
    assert_eq!(n.core.take_flows_cut(), Some(0));
    assert_eq!(reached(&mut n, A, datagram((A, 2), (B, 1), false)), [B]);
}

#[test]
fn what_is_remembered_of_a_guest_goes_with_it() {
    let mut n = isolated(&[B]);
    n.send(B, datagram((B, 1), (A, 2), false));
    n.core.remove_port(n.now, B, &mut n.fx);
    n.core.add_port(B, port_config()).unwrap();
    n.hello(B);
    assert_eq!(reached(&mut n, A, datagram((A, 2), (B, 1), false)), [A]);
}

#[test]
fn fragments_between_guests_are_judged_too() {
    let mut n = isolated(&[]);
    let h = Ip4 { to_mac: mac(B), ..Ip4::new(A, guest_ip(B).into(), proto::UDP) };
    let whole = udp_bytes(guest_ip(A).into(), guest_ip(B).into(), 1, 2, &[0; 2000]);
    for (frag, bytes) in [(0x2000, &whole[..1480]), (1480 / 8, &whole[1480..])] {
        assert!(!reached(&mut n, A, Ip4 { frag, ..h.clone() }.frame(bytes)).contains(&B));
    }
    assert_eq!(n.drops(DropReason::Policy), 2);
}
