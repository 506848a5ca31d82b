//! Theory of operation: flows whose rule says "ask": what is asked, what becomes of the answer, and what is bounded.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod inspection_support;
#[path = "common/net.rs"]
mod net;

use guestnet_core::effects::{Event, PolicyAsk};
use guestnet_core::policy::asks::ASKS_MAX;
use guestnet_core::policy::spec::{Action, Destination, RuleSpec};
use guestnet_core::stats::DropReason;
use inspection_support::{ALERT, Client, OK_TLS, denials, deny, exact, hello, pin, rule, set};
use net::*;

const TO: &str = "203.0.113.7:22";

fn asking() -> Net {
    let mut n = Net::new();
    set(&mut n, Action::Deny, vec![rule("the rest", Action::Ask, Destination::Any)]);
    n
}

fn asked(n: &Net) -> Vec<PolicyAsk> {
    let ask = |e: &Event| match e {
        Event::PolicyAsk(a) => Some((**a).clone()),
        _ => None,
    };
    n.fx.events.iter().filter_map(ask).collect()
}

fn ended(n: &Net) -> usize {
    n.fx.events.iter().filter(|e| matches!(e, Event::PolicyAskEnded { .. })).count()
}

fn decide(n: &mut Net, ticket: u64, allow: bool) -> bool {
    let done = n.core.decide(n.now, A, ticket, allow, &mut n.fx);
    n.core.audit().unwrap();
    done
}

#[test]
fn a_connection_waits_for_the_answer_and_is_opened_at_once() {
    let mut n = asking();
    let own = syn(A, 4000, TO);
    assert!(n.ask(A, own.clone()).is_empty());
    let ask = asked(&n).remove(0);
    assert_eq!((ask.port, ask.proto, &*ask.rule, ask.name), (A, 6, "the rest", None));
    assert_eq!((ask.remote, ask.guest.port()), (addr(TO), 4000));
    // The SYN is sent again meanwhile: nobody is asked twice.
    assert!(n.ask(A, own).is_empty());
    assert_eq!((asked(&n).len(), n.drops(DropReason::AwaitingDecision)), (1, 2));
    assert_eq!(n.fx.connects.len(), 0);
    assert!(decide(&mut n, ask.ticket, true));
    assert_eq!(n.fx.connects.len(), 1, "the held SYN opens the connection");
    assert!(!decide(&mut n, ask.ticket, true), "a question is answered once");
    // Another connection is another question.
    n.ask(A, syn(A, 4001, TO));
    assert_eq!(asked(&n).len(), 2);
}

#[test]
fn a_refusal_is_told_as_any_other() {
    let mut n = asking();
    n.ask(A, syn(A, 4000, TO));
    let ticket = asked(&n)[0].ticket;
    n.fx.frames.clear();
    assert!(decide(&mut n, ticket, false));
    assert_eq!(n.fx.take().len(), 1, "a reset");
    let denied = denials(&n).remove(0);
    assert_eq!((denied.rule.as_deref(), denied.reason), (Some("the rest"), DropReason::Policy));
    assert_eq!(n.fx.connects.len(), 0);
}

#[test]
fn no_answer_in_time_is_a_refusal() {
    let mut n = asking();
    n.ask(A, syn(A, 4000, TO));
    let ticket = asked(&n)[0].ticket;
    n.fx.frames.clear();
    n.pass_ms(29_000);
    assert_eq!((n.fx.frames.len(), ended(&n)), (0, 0));
    n.pass_ms(1_001);
    assert_eq!((n.fx.take().len(), ended(&n), denials(&n).len()), (1, 1, 1));
    assert!(!decide(&mut n, ticket, true), "too late");
}

#[test]
fn a_datagram_is_held_and_sent() {
    let mut n = asking();
    let to = addr("203.0.113.7:9999");
    n.ask(A, udp_frame(A, 5000, to, b"first"));
    n.ask(A, udp_frame(A, 5000, to, b"second"));
    let ticket = asked(&n)[0].ticket;
    assert!(decide(&mut n, ticket, true));
    let sent: Vec<_> = n.fx.datagrams.iter().map(|d| d.payload.clone()).collect();
    assert_eq!(sent, [b"first".to_vec()]);
    n.ask(A, udp_frame(A, 5000, to, b"third"));
    assert_eq!((n.fx.datagrams.len(), asked(&n).len()), (2, 1));
}

#[test]
fn a_name_that_was_allowed_must_be_shown() {
    let by_name = RuleSpec { label: "ask ok".into(), ..rule("", Action::Ask, exact("ok.example")) };
    let mut n = Net::new();
    set(&mut n, Action::Deny, vec![by_name]);
    pin(&mut n, "ok.example", "203.0.113.7");
    for (port, name, passes) in [(4000, "ok.example", true), (4001, "evil.example", false)] {
        n.fx.events.clear();
        n.ask(A, syn(A, port, OK_TLS));
        let ask = asked(&n).remove(0);
        assert_eq!(ask.name.as_deref(), Some("ok.example"));
        assert!(decide(&mut n, ask.ticket, true));
        let mut c = Client::connected(&mut n, port, OK_TLS);
        c.send(&mut n, &hello(name));
        let got = c.read(&mut n).bytes;
        assert_eq!(got != ALERT, passes, "{name}");
        assert_eq!(n.fx.sock(c.sock).sent.is_empty(), !passes, "{name}");
    }
}

#[test]
fn a_denied_name_above_stays_denied() {
    let mut n = Net::new();
    set(&mut n, Action::Deny, vec![deny("bad.example"), rule("the rest", Action::Ask, Destination::Any)]);
    n.ask(A, syn(A, 4000, OK_TLS));
    let ticket = asked(&n)[0].ticket;
    assert!(decide(&mut n, ticket, true));
    let mut c = Client::connected(&mut n, 4000, OK_TLS);
    c.send(&mut n, &hello("bad.example"));
    assert_eq!(c.read(&mut n).bytes, ALERT);
}

#[test]
fn a_name_that_is_allowed_is_no_way_to_one_that_would_be_asked_about() {
    let mut n = Net::new();
    set(&mut n, Action::Ask, vec![inspection_support::allow("ok.example")]);
    pin(&mut n, "ok.example", "203.0.113.7");
    let mut c = Client::open(&mut n, 4000, OK_TLS);
    c.send(&mut n, &hello("evil.example"));
    assert_eq!(c.read(&mut n).bytes, ALERT);
    assert_eq!(asked(&n).len(), 0);
}

#[test]
fn a_running_flow_is_not_asked_about_and_ends_by_a_denial() {
    let mut n = asking();
    n.ask(A, syn(A, 4000, TO));
    let ticket = asked(&n)[0].ticket;
    decide(&mut n, ticket, true);
    set(&mut n, Action::Ask, vec![]);
    assert_eq!(n.core.take_flows_cut(), Some(0));
    set(&mut n, Action::Deny, vec![]);
    assert_eq!(n.core.take_flows_cut(), Some(1));
}

#[test]
fn questions_are_bounded_and_leave_room_for_other_guests() {
    let mut n = asking();
    for port in 1000..1000 + 2 * ASKS_MAX as u16 {
        n.ask(A, syn(A, port, TO));
    }
    let of_a = asked(&n).len();
    assert!((ASKS_MAX / 8..=ASKS_MAX / 4).contains(&of_a), "{of_a}");
    assert_eq!(denials(&n).len().min(1), 1, "what is beyond the bound is refused");
    n.fx.events.clear();
    n.ask(B, syn(B, 4000, TO));
    assert_eq!(asked(&n).len(), 1);
    n.core.remove_port(n.now, A, &mut n.fx);
    assert_eq!(ended(&n), of_a);
}
