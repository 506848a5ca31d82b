//! QUIC under rules about names: datagrams are held until the ClientHello is there. The packets were made with aioquic
//! (`inspection_support/quic`).
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod inspection_support;
#[path = "common/net.rs"]
mod net;

use guestnet_core::effects::{Event, SockError};
use guestnet_core::policy::spec::Action;
use guestnet_core::stats::DropReason;
use guestnet_core::types::{FrameMeta, Gso, PortId};
use guestnet_wire::icmp;
use inspection_support::*;
use net::*;

macro_rules! data {
    ($name:literal) => {
        &include_bytes!(concat!("inspection_support/quic/", $name, ".bin"))[..]
    };
}

const TO: &str = "203.0.113.7:443";
const PROHIBITED: (u8, u8) = (icmp::UNREACHABLE, icmp::unreachable::ADMIN_PROHIBITED);

/// Allows `names`, all of which the guest got [`OK`] for.
fn allows(names: &[&str]) -> Net {
    let mut n = Net::new();
    set(&mut n, Action::Deny, names.iter().map(|name| allow(name)).collect());
    for name in ["ok.example", "www.ok.example", "large.example", "other.example"] {
        pin(&mut n, name, OK);
    }
    n
}

/// What the guest is told about a datagram.
fn told(n: &mut Net, payload: &[u8]) -> Vec<(u8, u8)> {
    let frames = n.ask(A, udp_frame(A, 4000, addr(TO), payload));
    frames.iter().map(|f| read(f).icmp()).collect()
}

fn buffered(n: &Net) -> usize {
    n.core.ports().find(|p| p.port == A).unwrap().buffered
}

#[test]
fn an_allowed_connection_passes_and_its_later_datagrams_too() {
    for (first, name) in
        [(data!("small"), "ok.example"), (data!("v1_0"), "www.ok.example"), (data!("v2_0"), "www.ok.example")]
    {
        let mut n = allows(&[name]);
        assert_eq!(told(&mut n, first), []);
        assert_eq!(udp_sent(&n), [first.to_vec()]);
        let short = vec![0x43; 60];
        n.udp(A, 4000, TO, &short);
        n.udp(A, 4000, TO, first);
        assert_eq!(udp_sent(&n), [first.to_vec(), short, first.to_vec()]);
        let (flow, _) = n.opened();
        n.fx.frames.clear();
        n.udp_reply(flow, TO, b"server");
        assert_eq!(read(&n.fx.frames[0]).payload(), b"server");
        assert!(denials(&n).is_empty());
        n.core.audit().unwrap();
    }
}

#[test]
fn a_hello_of_several_datagrams_is_held_and_sent_in_order() {
    let mut n = allows(&["large.example"]);
    let parts = [data!("large_0"), data!("large_1")];
    assert_eq!(told(&mut n, parts[0]), []);
    assert!(udp_sent(&n).is_empty() && n.fx.opened.is_empty(), "no socket yet");
    assert!(buffered(&n) >= parts[0].len());
    assert_eq!(told(&mut n, parts[1]), []);
    assert_eq!(udp_sent(&n), parts.map(<[u8]>::to_vec));
    n.pass_ms(400_000);
    assert_eq!((flows_of(&n, A), buffered(&n)), (0, 0));
    n.core.audit().unwrap();
}

#[test]
fn a_refused_connection_gets_icmp_and_nothing_leaves() {
    let mut n = allows(&["ok.example"]);
    assert_eq!(told(&mut n, data!("v1_0")), [PROHIBITED]);
    let d = denials(&n).remove(0);
    assert_eq!((d.shown.as_deref(), d.rule.as_deref()), (Some("www.ok.example"), Some("default")));
    assert_eq!(n.drops(DropReason::Policy), 1);
    // Sent again, it is told again.
    assert_eq!(told(&mut n, data!("v1_0")), [PROHIBITED]);
    assert!(udp_sent(&n).is_empty() && n.fx.opened.is_empty());
    assert_eq!((flows_of(&n, A), buffered(&n)), (0, 0));
    let mut n = allows(&["ok.example"]);
    assert_eq!(told(&mut n, data!("large_0")), []);
    assert_eq!(told(&mut n, data!("large_1")), [PROHIBITED]);
    assert_eq!(n.drops(DropReason::Policy), 2, "what was held is counted");
    n.core.audit().unwrap();
}

#[test]
fn what_is_no_quic_or_cannot_be_read_is_refused() {
    let version = [&[0xc0, 0, 0, 0, 9, 8][..], b"12345678", &[0, 0, 0x44, 0xb0], &[7; 1200]].concat();
    for bytes in [&b"hello"[..], &[0x40; 1200], &version, data!("stream_frame")] {
        let mut n = allows(&["ok.example"]);
        assert_eq!(told(&mut n, bytes), [PROHIBITED]);
        assert!(udp_sent(&n).is_empty());
        assert_eq!(flows_of(&n, A), 0);
    }
}

#[test]
fn an_address_that_is_not_pinned_is_refused_at_the_first_datagram() {
    let mut n = allows(&["ok.example"]);
    let frames = n.ask(A, udp_frame(A, 4000, addr("203.0.113.8:443"), data!("small")));
    assert_eq!(read(&frames[0]).icmp(), PROHIBITED);
    let frames = n.ask(A, udp_frame(A, 4000, addr("203.0.113.7:53"), data!("small")));
    assert_eq!(read(&frames[0]).icmp(), PROHIBITED);
}

#[test]
fn a_hello_that_does_not_end_is_refused_after_a_while() {
    let mut n = allows(&["large.example"]);
    n.udp(A, 4000, TO, data!("large_0"));
    n.pass_ms(9900);
    assert_eq!(flows_of(&n, A), 1);
    n.fx.frames.clear();
    n.pass_ms(200);
    let frames = n.fx.take();
    let got = read(&frames[0]);
    assert_eq!((frames.len(), got.icmp(), flows_of(&n, A), buffered(&n)), (1, PROHIBITED, 0, 0));
    // It quotes what the guest sent.
    assert_eq!(&got.l4()[8 + 28..8 + 28 + 20], &data!("large_0")[..20]);
    assert_eq!((denials(&n).len(), n.drops(DropReason::Policy)), (1, 1));
}

#[test]
fn another_connection_from_the_same_port_is_read_anew() {
    let mut n = allows(&["ok.example", "large.example"]);
    n.udp(A, 4000, TO, data!("small"));
    assert_eq!(udp_sent(&n).len(), 1);
    assert_eq!(told(&mut n, data!("v1_0")), [PROHIBITED], "its name is not allowed");
    assert_eq!((udp_sent(&n).len(), flows_of(&n, A)), (1, 1));
    // The first one goes on.
    n.udp(A, 4000, TO, &[0x43; 60]);
    assert_eq!(udp_sent(&n).len(), 2);
    n.udp(A, 4000, TO, data!("large_0"));
    n.udp(A, 4000, TO, &[0x44; 60]);
    assert_eq!(udp_sent(&n).len(), 3, "what belongs to the first passes while the other is read");
    n.udp(A, 4000, TO, data!("large_1"));
    assert_eq!(udp_sent(&n)[3..], [data!("large_0").to_vec(), data!("large_1").to_vec()]);
    // The same keys, but another ClientHello.
    assert_eq!(told(&mut n, data!("v1_0")), [PROHIBITED]);
    n.core.audit().unwrap();
}

#[test]
fn a_retry_begins_with_the_same_name_and_passes() {
    let mut n = allows(&["ok.example"]);
    n.udp(A, 4000, TO, data!("small"));
    n.udp(A, 4000, TO, data!("after_retry"));
    assert_eq!(udp_sent(&n).len(), 2);
}

#[test]
fn a_hello_with_pieces_that_contradict_each_other_is_refused() {
    let mut n = allows(&["ok.example"]);
    n.udp(A, 4000, TO, data!("first_half"));
    assert_eq!(told(&mut n, data!("conflict")), [PROHIBITED]);
    let mut n = allows(&["ok.example"]);
    n.udp(A, 4000, TO, data!("small"));
    n.udp(A, 4000, TO, data!("conflict"));
    assert_eq!(udp_sent(&n).len(), 1, "behind the connection that was allowed it does not pass either");
}

#[test]
fn what_is_held_is_bounded_for_each_flow_and_guest() {
    let mut n = allows(&["large.example"]);
    let before = n.drops(DropReason::BufferLimit);
    for _ in 0..40 {
        n.udp(A, 4000, TO, data!("large_0"));
    }
    assert_eq!(n.drops(DropReason::BufferLimit) - before, 24);
    let mut n = Net::with_limits(|l| l.buffer_per_port = 10_000);
    set(&mut n, Action::Deny, vec![allow("large.example")]);
    pin(&mut n, "large.example", OK);
    for port in 0..40 {
        n.udp(A, 4000 + port, TO, data!("large_0"));
    }
    assert!(buffered(&n) < 20_000, "{}", buffered(&n));
    assert!(n.drops(DropReason::BufferLimit) > 30);
    n.core.remove_port(n.now, A, &mut n.fx);
    n.core.audit().unwrap();
}

#[test]
fn datagrams_of_one_large_send_are_read_one_by_one() {
    let mut n = allows(&["ok.example"]);
    let two = [data!("small"), data!("small")].concat();
    let size = data!("small").len() as u16;
    let meta = FrameMeta { gso: Some(Gso::Udp(size)), ..FrameMeta::default() };
    n.send_meta(A, udp_frame(A, 4000, addr(TO), &two), meta);
    assert_eq!(udp_sent(&n), [data!("small").to_vec(), data!("small").to_vec()]);
}

#[test]
fn a_socket_that_cannot_be_opened_is_told() {
    let mut n = allows(&["ok.example"]);
    n.fx.open_error = Some(SockError::NetUnreachable);
    assert_eq!(told(&mut n, data!("small")), [(icmp::UNREACHABLE, icmp::unreachable::NET)]);
    assert_eq!((flows_of(&n, A), buffered(&n)), (0, 0));
    n.core.audit().unwrap();
}

#[test]
fn a_deny_rule_holds_without_a_pin_and_lets_other_datagrams_pass() {
    let mut n = Net::new();
    set(&mut n, Action::Allow, vec![deny("ok.example")]);
    assert_eq!(told(&mut n, data!("small")), [PROHIBITED]);
    assert_eq!(denials(&n)[0].rule.as_deref(), Some("no ok.example"));
    n.udp(A, 4000, TO, data!("v1_0"));
    n.udp(A, 4000, TO, b"\x80 something");
    assert_eq!(udp_sent(&n).len(), 2);
    n.udp(A, 4001, "198.51.100.1:4500", b"some protocol");
    n.udp(A, 4001, "198.51.100.1:4500", b"\x80 of its own");
    assert_eq!(udp_sent(&n).len(), 4);
    let frames = n.ask(A, udp_frame(A, 4001, addr("198.51.100.1:4500"), data!("small")));
    assert_eq!(read(&frames[0]).icmp(), PROHIBITED, "QUIC behind something else");
    assert_eq!(udp_sent(&n).len(), 4);
}

#[test]
fn a_change_of_the_rules_cuts_a_flow_by_the_name_that_it_showed() {
    let mut n = allows(&["ok.example", "www.ok.example"]);
    n.udp(A, 4000, TO, data!("small"));
    n.udp(A, 4001, TO, data!("v1_0"));
    n.udp(A, 4002, TO, data!("large_0"));
    set(&mut n, Action::Deny, vec![allow("ok.example")]);
    assert_eq!(n.core.take_flows_cut(), Some(1));
    let ports: Vec<u16> = n.core.flows().map(|f| f.guest.port()).collect();
    assert_eq!(ports, [4000, 4002]);
    assert_eq!(denials(&n)[0].shown.as_deref(), Some("www.ok.example"));
    set(&mut n, Action::Deny, vec![]);
    assert_eq!((flows_of(&n, A), buffered(&n)), (0, 0));
    n.core.audit().unwrap();
}

#[test]
fn the_end_of_a_flow_names_what_it_showed() {
    let mut n = allows(&["ok.example"]);
    n.udp(A, 4000, TO, data!("small"));
    n.pass_ms(400_000);
    let closed = |e: &Event| matches!(e, Event::FlowClosed { port: PortId(1), shown: Some(s), packets_out: Some(1), .. } if &**s == "ok.example");
    assert_eq!(n.events(closed), 1);
}

#[test]
fn a_flow_with_two_connections_is_cut_when_either_is_no_longer_allowed() {
    for (kept, cut) in
        [(&["ok.example", "large.example"][..], 0), (&["large.example"], 1), (&["ok.example"], 1)]
    {
        let mut n = allows(&["ok.example", "large.example"]);
        for part in [data!("small"), data!("large_0"), data!("large_1")] {
            n.udp(A, 4000, TO, part);
        }
        assert_eq!(udp_sent(&n).len(), 3);
        set(&mut n, Action::Deny, kept.iter().map(|name| allow(name)).collect());
        assert_eq!(n.core.take_flows_cut(), Some(cut), "{kept:?}");
    }
}

#[test]
fn a_connection_that_was_refused_is_refused_again() {
    let mut n = allows(&["ok.example"]);
    n.udp(A, 4000, TO, data!("small"));
    for _ in 0..3 {
        assert_eq!(told(&mut n, data!("v1_0")), [PROHIBITED]);
    }
    assert_eq!((udp_sent(&n).len(), denials(&n).len()), (1, 3));
    set(&mut n, Action::Deny, vec![allow("ok.example")]);
    assert_eq!(n.core.take_flows_cut(), Some(0), "what was refused does not count");
}
