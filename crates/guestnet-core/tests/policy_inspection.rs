//! Flows that a rule about a name admits: no byte passes until the conversation has shown the name, and a refusal says why.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod inspection_support;
#[path = "common/net.rs"]
mod net;

use guestnet_core::effects::{Close, Event, SockError};
use guestnet_core::nat::NatEngineConfig;
use guestnet_core::policy::spec::{Action, Destination, Ech, NameMatch, PolicyOptions, Refuse, RuleSpec};
use guestnet_core::stats::DropReason;
use guestnet_wire::icmp;
use guestnet_wire::tcp::{Tcp, flags};
use inspection_support::*;
use net::*;

/// The connection is refused with these last words, in order, and the server got nothing but a reset.
#[track_caller]
fn refused_with(n: &mut Net, c: &mut Client, words: &[u8]) {
    let told = c.read(n);
    assert_eq!(String::from_utf8_lossy(&told.bytes), String::from_utf8_lossy(words));
    assert!(told.fin && !told.rst, "{told:?}");
    assert_eq!(n.fx.sock(c.sock).closed, Some(Close::Reset));
    assert!(c.at_server(n).is_empty());
    c.fin(n);
    n.pass_ms(3000);
    assert_eq!(flows_of(n, A), 0, "the flow is gone");
    n.core.audit().unwrap();
}

#[track_caller]
fn reset(n: &mut Net, c: &mut Client) {
    let told = c.read(n);
    assert_eq!((told.rst, told.fin, told.bytes.len()), (true, false, 0));
    assert_eq!(n.fx.sock(c.sock).closed, Some(Close::Reset));
    assert!(c.at_server(n).is_empty());
    assert_eq!(flows_of(n, A), 0);
    n.core.audit().unwrap();
}

#[test]
fn tls_passes_once_its_name_is_allowed_and_is_not_looked_at_after() {
    let mut n = strict();
    let mut c = Client::open(&mut n, 4000, OK_TLS);
    c.server_says(&mut n, b"too early");
    assert_eq!(c.read(&mut n).bytes, b"");
    let hello = hello("ok.example");
    c.send(&mut n, &hello[..50]);
    assert!(c.at_server(&mut n).is_empty());
    c.send(&mut n, &hello[50..]);
    assert_eq!(c.at_server(&mut n), hello);
    assert_eq!(c.read(&mut n).bytes, b"too early");
    let finished = [record(20, &[1]), record(23, &[9; 60])].concat();
    c.send(&mut n, &finished);
    assert_eq!(c.at_server(&mut n), [hello.clone(), finished.clone()].concat());
    // Whatever follows, it passes.
    c.send(&mut n, b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n");
    assert_eq!(c.at_server(&mut n).len(), hello.len() + finished.len() + 38);
    assert!(denials(&n).is_empty());
    c.fin(&mut n);
    assert!(n.fx.sock(c.sock).shut);
    n.core.audit().unwrap();
}

#[test]
fn hellos_of_any_shape_are_put_together() {
    let large = hello_message(Some("ok.example"), 1700);
    let records: Vec<u8> = large.chunks(1024).flat_map(|part| record(22, part)).collect();
    let small: Vec<u8> = large.chunks(1).flat_map(|part| record(22, part)).collect();
    for (bytes, piece) in [(records.clone(), 1), (records, 1460), (small, 4000)] {
        let mut n = strict();
        let mut c = Client::open(&mut n, 4000, OK_TLS);
        for part in bytes.chunks(piece) {
            assert!(c.at_server(&mut n).is_empty());
            c.send(&mut n, part);
        }
        assert_eq!(c.at_server(&mut n), bytes);
    }
}

#[test]
fn segments_that_overlap_are_read_as_the_server_gets_them() {
    let mut n = strict();
    let mut c = Client::open(&mut n, 4000, OK_TLS);
    let (good, evil) = (hello("ok.example"), hello("no.example"));
    // The end first, ahead of order, then the beginning, with a part over it.
    let begin = c.seq;
    c.seq = begin.wrapping_add(40);
    c.send(&mut n, &evil[40..]);
    c.seq = begin;
    c.send(&mut n, &good[..60]);
    let told = c.read(&mut n);
    assert_eq!(told.bytes, ALERT);
    assert_eq!(denials(&n)[0].shown.as_deref(), Some("no.example"));
    // Another name over all of it: the server gets what was read.
    let mut c = Client::open(&mut n, 4001, OK_TLS);
    let begin = c.seq;
    c.seq = begin.wrapping_add(40);
    c.send(&mut n, &evil[40..]);
    c.seq = begin;
    c.send(&mut n, &good);
    assert_eq!(c.at_server(&mut n), good);
}

#[test]
fn another_name_or_none_gets_an_alert() {
    for name in ["other.example", "evil.example", "www.ok.example"] {
        let mut n = strict();
        let mut c = Client::open(&mut n, 4000, OK_TLS);
        c.send(&mut n, &hello(name));
        let d = denials(&n).remove(0);
        assert_eq!((d.shown.as_deref(), d.name.as_deref()), (Some(name), Some("ok.example")));
        assert_eq!((d.rule.as_deref(), d.reason), (Some("default"), DropReason::Policy));
        assert_eq!(n.drops(DropReason::Policy), 1);
        refused_with(&mut n, &mut c, ALERT);
    }
    for name in [None, Some("203.0.113.7")] {
        let mut n = strict();
        let mut c = Client::open(&mut n, 4000, OK_TLS);
        c.send(&mut n, &record(22, &hello_message(name, 10)));
        assert_eq!(denials(&n)[0].shown, None);
        refused_with(&mut n, &mut c, ALERT);
    }
}

#[test]
fn last_words_are_sent_again_when_they_get_lost() {
    let mut n = strict();
    let mut c = Client::open(&mut n, 4000, OK_TLS);
    c.send(&mut n, &hello("evil.example"));
    n.fx.frames.clear();
    n.pass_ms(1500);
    refused_with(&mut n, &mut c, ALERT);
}

#[test]
fn a_guest_that_ignores_its_last_words_is_reset_after_a_while() {
    let mut n = strict();
    let mut c = Client::open(&mut n, 4000, OK_TLS);
    c.send(&mut n, &hello("evil.example"));
    c.read(&mut n);
    n.pass_ms(9000);
    assert_eq!(flows_of(&n, A), 1);
    n.pass_ms(1500);
    assert_eq!(flows_of(&n, A), 0);
    assert!(c.read(&mut n).rst);
}

#[test]
fn an_address_that_is_not_pinned_is_refused_at_the_syn() {
    let mut n = strict();
    for to in ["203.0.113.8:443", "203.0.113.7:22"] {
        let told = n.ask(A, syn(A, 4000, to));
        assert_eq!(Tcp::parse(read(&told[0]).l4()).unwrap().flags, flags::RST | flags::ACK, "{to}");
    }
    // It is this guest's pin, and nobody else's.
    let told = n.ask(B, syn(B, 4000, OK_TLS));
    assert_eq!(Tcp::parse(read(&told[0]).l4()).unwrap().flags, flags::RST | flags::ACK);
    assert!(n.fx.connects.is_empty());
}

#[test]
fn a_connect_is_refused_by_icmp_where_the_owner_says_so() {
    let mut n = Net::new();
    let options = PolicyOptions { refuse: Refuse::Prohibited, ..PolicyOptions::default() };
    n.core.set_rules(n.now, None, Some(table(Action::Deny, vec![allow("ok.example")], options)));
    let told = n.ask(A, syn(A, 4000, OK_TLS));
    assert_eq!(read(&told[0]).icmp(), (icmp::UNREACHABLE, icmp::unreachable::ADMIN_PROHIBITED));
}

#[test]
fn a_client_that_stays_silent_is_reset() {
    let mut n = strict();
    let mut c = Client::open(&mut n, 4000, OK_TLS);
    c.server_says(&mut n, b"220 server speaks first\r\n");
    n.pass_ms(9900);
    assert_eq!(c.read(&mut n), Told::default());
    n.pass_ms(200);
    assert_eq!(denials(&n)[0].shown, None);
    reset(&mut n, &mut c);
}

#[test]
fn the_time_of_a_client_begins_when_the_server_has_answered() {
    let mut n = strict();
    n.send(A, syn(A, 4000, OK_TLS));
    let (flow, sock) = n.fx.connects[0];
    n.pass_ms(15_000);
    n.fx.frames.clear();
    n.core.tcp_connected(n.now, flow, Ok(()), &mut n.fx);
    let isn = Tcp::parse(read(&n.fx.take()[0]).l4()).unwrap().seq;
    let mut c = Client { flow, sock, port: 4000, to: OK_TLS, seq: 1001, ack: isn.wrapping_add(1) };
    n.pass_ms(9000);
    c.send(&mut n, &hello("ok.example"));
    assert!(!c.at_server(&mut n).is_empty());
    n.pass_ms(60_000);
    assert_eq!(flows_of(&n, A), 1);
}

#[test]
fn a_client_that_stops_in_the_middle_gets_an_alert() {
    let mut n = strict();
    let mut c = Client::open(&mut n, 4000, OK_TLS);
    c.send(&mut n, &hello("ok.example")[..60]);
    n.pass_ms(10_100);
    refused_with(&mut n, &mut c, ALERT);
}

#[test]
fn other_protocols_are_reset_at_once() {
    for bytes in
        [&b"SSH-2.0-OpenSSH\r\n"[..], b"\0\0\0\x08\x04\xd2\x16\x2f", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
    {
        let mut n = strict();
        let mut c = Client::open(&mut n, 4000, OK_TLS);
        c.send(&mut n, bytes);
        reset(&mut n, &mut c);
    }
}

#[test]
fn what_fills_the_window_and_is_not_understood_is_refused() {
    let mut n = strict();
    let mut c = Client::open(&mut n, 4000, OK_HTTP);
    c.send(&mut n, b"GET /");
    for _ in 0..60 {
        c.send(&mut n, &[b'a'; 1400]);
        c.read(&mut n);
    }
    assert_eq!(denials(&n).len(), 1);
    n.pass_ms(10_500);
    assert_eq!(flows_of(&n, A), 0);
    assert!(c.at_server(&mut n).is_empty());
    n.core.audit().unwrap();
}

#[test]
fn a_guest_that_closes_or_resets_early_leaves_nothing() {
    let mut n = strict();
    let mut c = Client::open(&mut n, 4000, OK_TLS);
    c.fin(&mut n);
    reset(&mut n, &mut c);
    let mut c = Client::open(&mut n, 4001, OK_TLS);
    c.send(&mut n, &hello("ok.example")[..20]);
    c.rst(&mut n);
    assert_eq!((n.fx.sock(c.sock).closed, flows_of(&n, A)), (Some(Close::Reset), 0));
    let mut c = Client::open(&mut n, 4002, OK_TLS);
    c.send(&mut n, &hello("ok.example")[..20]);
    c.fin(&mut n);
    refused_with(&mut n, &mut c, ALERT);
}

#[test]
fn a_server_that_goes_away_while_bytes_are_held_is_seen() {
    let mut n = strict();
    let mut c = Client::open(&mut n, 4000, OK_TLS);
    c.send(&mut n, &hello("ok.example")[..20]);
    n.fx.sock(c.sock).peek_error = Some(SockError::Reset);
    n.core.tcp_ready(n.now, c.flow, true, true, &mut n.fx);
    assert!(c.read(&mut n).rst);
    n.core.audit().unwrap();
}

#[test]
fn a_guest_without_budget_is_refused_and_others_do_not_notice() {
    let mut n = Net::with_limits(|l| l.buffer_per_port = 4096);
    set(&mut n, Action::Deny, vec![allow("ok.example")]);
    pin(&mut n, "ok.example", OK);
    let mut c = Client::open(&mut n, 4000, OK_TLS);
    c.send(&mut n, &record(22, &hello_message(Some("ok.example"), 9000)));
    assert!(n.core.ports().find(|p| p.port == A).unwrap().buffered <= 4096 + 4096);
    n.pass_ms(10_100);
    assert_eq!(c.read(&mut n).bytes, ALERT);
    let port = n.core.ports().find(|p| p.port == A).unwrap();
    assert_eq!(port.buffered, 0);
}

#[test]
fn the_second_hello_shows_the_same_name() {
    for (second, passes) in [("ok.example", true), ("also.example", false)] {
        let mut n = strict();
        let mut c = Client::open(&mut n, 4000, OK_TLS);
        c.send(&mut n, &hello("ok.example"));
        // HelloRetryRequest
        c.server_says(&mut n, &record(22, &[2, 0, 0, 4, 3, 3, 0, 0]));
        c.read(&mut n);
        let again = [record(20, &[1]), hello(second)].concat();
        let before = c.at_server(&mut n).len();
        c.send(&mut n, &again[..30]);
        c.send(&mut n, &again[30..]);
        let got = c.at_server(&mut n);
        if passes {
            assert_eq!(got[before..], again);
            continue;
        }
        assert!(got.len() <= before + 6, "nothing of the second hello");
        assert!(n.fx.sock(c.sock).shut, "the server hears that nothing follows");
        n.fx.sock(c.sock).eof = true;
        n.core.tcp_ready(n.now, c.flow, true, true, &mut n.fx);
        c.end_batch(&mut n);
        let told = c.read(&mut n);
        assert_eq!((&told.bytes[..], told.fin), (ALERT, true));
        assert_eq!(denials(&n)[0].shown.as_deref(), Some("also.example"));
    }
}

#[test]
fn early_data_is_not_held_back() {
    let mut n = strict();
    let mut c = Client::open(&mut n, 4000, OK_TLS);
    let mut message = hello_message(Some("ok.example"), 10);
    // The extension early_data, empty, at the end.
    message.extend_from_slice(&[0, 42, 0, 0]);
    let len = (message.len() as u32 - 4).to_be_bytes();
    message[1..4].copy_from_slice(&len[1..]);
    let extensions = 4 + 2 + 32 + 7;
    let total = (message.len() - extensions - 2) as u16;
    message[extensions..extensions + 2].copy_from_slice(&total.to_be_bytes());
    let stream = [record(22, &message), record(23, &[5; 300])].concat();
    c.send(&mut n, &stream);
    assert_eq!(c.at_server(&mut n), stream);
}

// ---- rules that deny a name ----------------------------------------------------------------------------

#[test]
fn a_deny_rule_holds_without_a_pin_and_lets_everything_else_pass() {
    let mut n = lenient();
    let mut c = Client::open(&mut n, 4000, "198.51.100.1:443");
    c.send(&mut n, &hello("bad.example"));
    refused_with(&mut n, &mut c, ALERT);
    for bytes in [
        hello("good.example"),
        record(22, &hello_message(None, 5)),
        b"SSH-2.0-x\r\n".to_vec(),
        get("good.example"),
    ] {
        let mut c = Client::open(&mut n, 4001, "198.51.100.1:443");
        c.send(&mut n, &bytes);
        assert_eq!(c.at_server(&mut n), bytes);
        c.rst(&mut n);
    }
}

#[test]
fn a_server_that_speaks_first_is_heard_where_nothing_strict_waits() {
    let mut n = lenient();
    let mut c = Client::open(&mut n, 4000, "198.51.100.1:25");
    c.server_says(&mut n, b"220 mail\r\n");
    assert_eq!(c.read(&mut n).bytes, b"220 mail\r\n");
    n.pass_ms(60_000);
    c.send(&mut n, b"EHLO me\r\n");
    assert_eq!(c.at_server(&mut n), b"EHLO me\r\n");
}

#[test]
fn a_deny_rule_is_not_evaded_by_being_slow() {
    let mut n = lenient();
    let mut c = Client::open(&mut n, 4000, "198.51.100.1:443");
    n.pass_ms(30_000);
    let hello = hello("bad.example");
    c.send(&mut n, &hello[..30]);
    n.pass_ms(10_100);
    assert_eq!(denials(&n)[0].reason, DropReason::NotUnderstood);
    refused_with(&mut n, &mut c, ALERT);
    let mut c = Client::open(&mut n, 4001, "198.51.100.1:443");
    n.pass_ms(60_000);
    c.send(&mut n, &hello);
    refused_with(&mut n, &mut c, ALERT);
}

#[test]
fn a_hello_that_may_hide_a_name_is_refused_where_the_owner_says_so() {
    for (ech, passes) in [(Ech::Outer, true), (Ech::Deny, false)] {
        let mut n = Net::new();
        let options = PolicyOptions { ech, ..PolicyOptions::default() };
        n.core.set_rules(n.now, None, Some(table(Action::Deny, vec![allow("ok.example")], options)));
        pin(&mut n, "ok.example", OK);
        let mut c = Client::open(&mut n, 4000, OK_TLS);
        let mut message = hello_message(Some("ok.example"), 4);
        // The key share becomes encrypted_client_hello.
        let at = message.windows(4).position(|w| w == [0, 51, 0, 4]).unwrap();
        message[at..at + 2].copy_from_slice(&[0xfe, 0x0d]);
        c.send(&mut n, &record(22, &message));
        assert_eq!(!c.at_server(&mut n).is_empty(), passes);
        if !passes {
            assert_eq!(denials(&n)[0].reason, DropReason::HiddenName);
            refused_with(&mut n, &mut c, ALERT);
        }
    }
}

// ---- changes and events --------------------------------------------------------------------------------

#[test]
fn a_flow_is_cut_when_its_name_is_no_longer_allowed_and_kept_while_it_is() {
    let mut n = strict();
    let mut kept = Client::open(&mut n, 4000, OK_TLS);
    kept.send(&mut n, &hello("ok.example"));
    let mut cut = Client::open(&mut n, 4001, OK_TLS);
    cut.send(&mut n, &hello("also.example"));
    let mut waits = Client::open(&mut n, 4002, OK_TLS);
    waits.send(&mut n, &hello("also.example")[..30]);
    for c in [&mut kept, &mut cut] {
        c.send(&mut n, &record(23, &[1; 20]));
        c.read(&mut n);
    }
    set(&mut n, Action::Deny, vec![allow("ok.example")]);
    assert_eq!(n.core.take_flows_cut(), Some(1));
    assert_eq!(n.fx.closed, [(cut.sock, Close::Reset)]);
    let d = denials(&n).remove(0);
    assert_eq!((d.shown.as_deref(), d.guest.port()), (Some("also.example"), 4001));
    // What is not decided is decided by the rules that hold then.
    n.fx.frames.clear();
    waits.send(&mut n, &hello("also.example")[30..]);
    assert_eq!(waits.read(&mut n).bytes, ALERT);
    set(&mut n, Action::Deny, vec![]);
    assert!(n.fx.closed.contains(&(kept.sock, Close::Reset)));
    n.core.audit().unwrap();
}

#[test]
fn a_new_rule_about_names_cuts_flows_that_cannot_be_looked_at_any_more() {
    let mut n = Net::new();
    for name in ["ok.example", "bad.example"] {
        pin(&mut n, name, if name == "ok.example" { OK } else { "198.51.100.9" });
    }
    let unknown = Client::open(&mut n, 4000, "198.51.100.1:443");
    let bad = Client::open(&mut n, 4001, "198.51.100.9:443");
    set(&mut n, Action::Allow, vec![deny("bad.example")]);
    assert_eq!(n.fx.closed, [(bad.sock, Close::Reset)], "its address was asked for by the denied name");
    set(&mut n, Action::Deny, vec![allow("ok.example")]);
    assert_eq!(n.fx.closed.last(), Some(&(unknown.sock, Close::Reset)));
    assert_eq!(flows_of(&n, A), 0);
}

#[test]
fn a_flow_keeps_its_pin_and_a_pin_that_ended_admits_no_new_one() {
    let mut n = strict();
    let mut c = Client::open(&mut n, 4000, OK_TLS);
    c.send(&mut n, &[hello("ok.example"), record(23, &[1; 20])].concat());
    n.pass_ms(400_000);
    Client::open(&mut n, 4001, OK_TLS).rst(&mut n);
    set(&mut n, Action::Deny, vec![allow("ok.example")]);
    assert_eq!(flows_of(&n, A), 1, "the flow is judged by the pin that it keeps");
    c.rst(&mut n);
    let told = n.ask(A, syn(A, 4002, OK_TLS));
    assert_eq!(Tcp::parse(read(&told[0]).l4()).unwrap().flags, flags::RST | flags::ACK);
}

#[test]
fn a_rule_that_is_matched_by_the_address_looks_at_nothing() {
    let mut n = Net::new();
    let by_address = RuleSpec { by: NameMatch::Address, ports: vec![], ..allow("db.example") };
    set(&mut n, Action::Deny, vec![by_address]);
    pin(&mut n, "db.example", OK);
    let mut c = Client::open(&mut n, 4000, "203.0.113.7:5432");
    c.server_says(&mut n, b"hello");
    assert_eq!(c.read(&mut n).bytes, b"hello");
    c.send(&mut n, b"anything");
    assert_eq!(c.at_server(&mut n), b"anything");
}

#[test]
fn events_name_the_rule_the_name_and_what_was_shown() {
    let mut n = strict();
    let mut c = Client::open(&mut n, 4000, OK_TLS);
    c.send(&mut n, &[hello("also.example"), record(23, &[1; 20])].concat());
    c.rst(&mut n);
    let opened = n.fx.events.iter().find_map(|e| match e {
        Event::FlowOpened { rule, name, .. } => Some((rule.clone(), name.clone())),
        _ => None,
    });
    let (rule, name) = opened.unwrap();
    assert_eq!((rule.as_deref(), name.as_deref()), (Some("ok.example"), Some("ok.example")));
    let closed = n.fx.events.iter().find_map(|e| match e {
        Event::FlowClosed { rule, shown, .. } => Some((rule.clone(), shown.clone())),
        _ => None,
    });
    let (rule, shown) = closed.unwrap();
    assert_eq!((rule.as_deref(), shown.as_deref()), (Some("also.example"), Some("also.example")));
}

#[test]
fn other_flows_of_the_same_policy_are_ordinary() {
    let mut n = Net::new();
    let net = guestnet_core::policy::spec::Net::new("198.51.100.0".parse().unwrap(), 24).unwrap();
    set(&mut n, Action::Deny, vec![allow("ok.example"), rule("net", Action::Allow, Destination::Net(net))]);
    pin(&mut n, "ok.example", OK);
    let mut c = Client::open(&mut n, 4000, "198.51.100.1:443");
    c.send(&mut n, &hello("evil.example"));
    assert_eq!(c.at_server(&mut n), hello("evil.example"));
}

// ---- the uplink of packets -----------------------------------------------------------------------------

/// The same policy with an uplink of packets.
fn tunnel(rules: Vec<RuleSpec>) -> Net {
    let mut n = Net::new();
    n.core
        .set_uplink(NatEngineConfig { ports: (1, 65535), ..NatEngineConfig::new(ip("198.51.100.200")) })
        .unwrap();
    set(&mut n, Action::Deny, rules);
    pin(&mut n, "ok.example", OK);
    n
}

#[test]
fn with_an_uplink_of_packets_only_flows_that_are_read_are_relayed() {
    let by_address = RuleSpec { by: NameMatch::Address, ports: vec![], ..allow("db.example") };
    let mut n = tunnel(vec![allow("ok.example"), by_address]);
    pin(&mut n, "db.example", "203.0.113.50");
    let mut c = Client::open(&mut n, 4000, OK_TLS);
    assert!(n.fx.uplink.is_empty());
    c.send(&mut n, &hello("ok.example"));
    assert_eq!(c.at_server(&mut n), hello("ok.example"));
    let mut bad = Client::open(&mut n, 4001, OK_TLS);
    bad.send(&mut n, &hello("bad.example"));
    refused_with_others(&mut n, &mut bad);
    n.send(A, syn(A, 4002, "203.0.113.50:5432"));
    assert_eq!((n.fx.uplink.len(), n.fx.connects.len()), (1, 2), "matched by the address: translated");
    n.udp(A, 4003, "203.0.113.50:5432", b"x");
    assert_eq!(n.fx.uplink.len(), 2);
    // The pin of a translated connection lives as long as it does, and its name is reported.
    let named = |e: &Event| matches!(e, Event::FlowOpened { name: Some(n), .. } if &**n == "db.example");
    assert_eq!(n.events(named), 2);
    n.pass_ms(200_000);
    set(&mut n, Action::Deny, vec![allow("ok.example")]);
    assert_eq!(n.core.flows().filter(|f| f.remote.ip() != addr(OK_TLS).ip()).count(), 0);
    assert_eq!(flows_of(&n, A), 1);
    n.core.audit().unwrap();
}

#[track_caller]
fn refused_with_others(n: &mut Net, c: &mut Client) {
    assert_eq!(c.read(n).bytes, ALERT);
    assert!(c.at_server(n).is_empty());
    c.fin(n);
    n.pass_ms(3000);
}
