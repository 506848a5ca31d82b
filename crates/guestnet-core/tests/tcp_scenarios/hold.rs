//! Bytes that are held back until somebody has looked at them.

use crate::tcp_support::{Sim, stream};
use guestnet_core::effects::Close;
use guestnet_core::effects::SockError;
use guestnet_core::stats::DropReason;
use guestnet_core::tcp::Fate;
use guestnet_wire::tcp::flags;

/// What nobody has looked at.
fn unseen(s: &Sim) -> Vec<u8> {
    s.tcb.held().expect("it holds bytes back").unseen.concat()
}

#[test]
fn nothing_passes_in_either_direction_until_somebody_has_looked() {
    let mut s = Sim::open_held(true);
    s.host_writes(100);
    s.silent();
    s.seg("P. 1:11 ack 1");
    s.seg("P. 11:31 ack 1");
    s.end();
    assert_eq!((s.looks, unseen(&s)), (1, stream(0, 30)), "one look for the batch");
    s.silent();
    s.note_seen();
    s.recv(". 1 ack 31");
    assert!(unseen(&s).is_empty());
    s.host_has(0);
    s.send("P. 31:41 ack 1");
    assert_eq!((s.looks, unseen(&s)), (2, stream(30, 10)));
    assert_eq!(s.tcb.held().unwrap().len(), 40);
    s.end_hold();
    s.host_has(40);
    assert!(s.tcb.held().is_none());
    s.recv("P. 1:101 ack 41");
    s.send("P. 41:51 ack 101");
    s.host_has(50);
    assert_eq!((s.looks, s.budget.used), (2, 0));
}

#[test]
fn a_flow_that_is_held_one_way_passes_what_the_host_says() {
    let mut s = Sim::open_held(false);
    s.host_writes(100);
    s.recv("P. 1:101 ack 1");
    s.send("P. 1:11 ack 101");
    s.host_has(0);
    s.end_hold();
    s.host_has(10);
}

#[test]
fn bytes_are_let_pass_in_parts() {
    let mut s = Sim::open_held(true);
    s.send("P. 1:101 ack 1");
    s.let_pass(60);
    s.host_has(60);
    assert_eq!(unseen(&s).len(), 40);
    s.note_seen();
    assert_eq!(s.tcb.held().unwrap().len(), 40);
    s.take();
    s.host_writes(10);
    s.recv("P. 1:11 ack 101");
    s.send("P. 101:111 ack 11");
    s.let_pass(40);
    s.host_has(100);
    assert_eq!(unseen(&s), stream(100, 10));
}

#[test]
fn what_the_socket_does_not_take_waits_for_it() {
    let mut s = Sim::open_held(true);
    s.host().send_room = Some(20);
    s.send("P. 1:101 ack 1");
    s.let_pass(60);
    s.host_has(20);
    s.host().send_room = None;
    s.ready(false, true);
    s.host_has(60);
    s.let_pass(40);
    s.host_has(100);
}

#[test]
fn a_fin_is_held_like_the_bytes_before_it() {
    let mut s = Sim::open_held(true);
    s.send("F. 1 ack 1");
    assert!(s.tcb.held().unwrap().ended && s.looks == 1);
    s.note_seen();
    s.recv(". 1 ack 2");
    assert!(!s.host().shut);
    s.end_hold();
    assert!(s.host().shut);

    let mut s = Sim::open_held(true);
    s.send("FP. 1:11 ack 1");
    s.note_seen();
    assert!(!s.host().shut);
    s.let_pass(10);
    s.host_has(10);
    assert!(s.host().shut);
}

#[test]
fn a_reset_of_the_guest_ends_a_held_flow() {
    let mut s = Sim::open_held(true);
    s.send("P. 1:11 ack 1");
    s.send("R 11");
    s.closed(Close::Reset);
}

#[test]
fn a_peer_that_is_gone_is_seen_although_nothing_is_read() {
    let mut s = Sim::open_held(true);
    s.send("P. 1:11 ack 1");
    s.host().peek_error = Some(SockError::Reset);
    s.ready(true, true);
    s.recv("R. 1 ack 11");
    s.closed(Close::Reset);
}

#[test]
fn an_end_of_the_peer_waits_for_the_verdict() {
    let mut s = Sim::open_held(true);
    s.host().eof = true;
    s.ready(true, true);
    s.silent();
    s.end_hold();
    s.recv("F. 1 ack 1");
}

#[test]
fn the_window_is_what_may_be_held() {
    let mut s = Sim::open_held(true);
    let mut at = 1;
    while at <= 65535 {
        let to = (at + 1460).min(65536);
        s.send(&format!(". {at}:{to} ack 1"));
        s.note_seen();
        at = to;
    }
    assert!(s.tcb.held().unwrap().full);
    assert!(s.budget.used <= 80 << 10, "{} bytes", s.budget.used);
    let last = s.take().pop().unwrap();
    assert!(u32::from(last.tcp.window) << 5 < 4096, "but for rounding, nothing more is promised");
    s.end_hold();
    s.host_has(65535);
    assert!(s.take().pop().unwrap().tcp.window > 0, "the guest hears that there is room");
}

#[test]
fn what_the_budget_does_not_hold_is_not_acknowledged() {
    let mut s = Sim::open_held(true);
    s.budget.limit = 2048;
    s.send(". 1:2921 ack 1");
    s.note_seen();
    let ack = s.take().pop().unwrap();
    assert_eq!(ack.tcp.ack.wrapping_sub(crate::tcp_support::GUEST_ISN), 2049);
    assert_eq!(s.dropped(DropReason::BufferLimit), 1);
    s.end_hold();
    s.host_has(2048);
}

#[test]
fn overlapping_segments_are_seen_as_the_host_gets_them() {
    let mut s = Sim::open_held(true);
    s.seg(". 21:41 ack 1");
    s.seg(". 1:31 ack 1");
    s.end();
    assert_eq!(unseen(&s), stream(0, 40));
    s.end_hold();
    s.host_has(40);
}

#[test]
fn urgent_bytes_are_bytes_in_line() {
    let mut s = Sim::open_held(true);
    s.send("PU. 1:11 ack 1 urg 5");
    assert_eq!(unseen(&s), stream(0, 10));
    s.end_hold();
    s.host_has(10);
    assert!(s.host().urgent.is_empty());
}

#[test]
fn a_refusal_with_last_words_ends_in_order_for_the_guest_and_with_a_reset_for_the_peer() {
    let mut s = Sim::open_held(true);
    let host = s.sock;
    s.host_writes(100);
    s.send("P. 1:11 ack 1");
    s.answer(b"denied");
    assert_eq!(s.mock.sock(host).closed, Some(Close::Reset));
    assert!(s.mock.sock(host).sent.is_empty());
    assert_eq!(s.budget.used, 0);
    let words = s.mock.take();
    let seen = crate::tcp_support::dissect(&words[0], &s.path);
    assert_eq!((&seen.payload[..], seen.tcp.flags & flags::FIN), (&b"denied"[..], 0));
    assert_eq!(crate::tcp_support::dissect(&words[1], &s.path).tcp.flags & flags::FIN, flags::FIN);
    // They get lost, and are sent again.
    s.pass(1000);
    let again = s.mock.take();
    assert_eq!(crate::tcp_support::dissect(&again[0], &s.path).payload, b"denied");
    // What the guest still sends is taken and forgotten.
    s.send("P. 11:21 ack 8");
    s.send("F. 21 ack 8");
    assert_eq!(s.tcb.state_name(), "time_wait");
    assert_eq!(s.host().closed, Some(Close::Graceful));
}

#[test]
fn without_a_socket_for_last_words_the_guest_gets_a_reset() {
    let mut s = Sim::open_held(true);
    s.mock.no_answers = true;
    s.send("P. 1:11 ack 1");
    s.answer(b"denied");
    s.recv("R. 1 ack 11");
    assert_eq!(s.fate, Fate::Closed);
    s.closed(Close::Reset);
}

#[test]
fn last_words_do_not_get_into_what_the_host_has_said() {
    let mut s = Sim::open_held(false);
    s.host_writes(100);
    s.recv("P. 1:101 ack 1");
    s.send("P. 1:11 ack 1");
    s.answer(b"denied");
    s.recv("R. 101 ack 11");
    s.closed(Close::Reset);
}

#[test]
fn last_words_come_behind_the_answer_to_what_was_let_pass() {
    let mut s = Sim::open_held(true);
    let host = s.sock;
    s.host().send_room = Some(20);
    s.send("P. 1:101 ack 1");
    s.let_pass(60);
    s.take();
    s.answer(b"denied");
    assert!(!s.mock.sock(host).shut, "bytes that may pass still wait for the socket");
    s.host().send_room = None;
    s.ready(false, true);
    s.host_has(60);
    assert!(s.host().shut);
    s.send("P. 101:111 ack 1");
    s.note_seen();
    s.host_writes(50);
    s.host_closes();
    s.host_has(60);
    let told = s.take();
    assert_eq!(told.last().unwrap().payload, stream(0, 50));
    assert_eq!(s.mock.sock(host).closed, None, "the guest has not acknowledged the answer");
    s.send(". 111 ack 51");
    s.end();
    assert_eq!(s.mock.sock(host).closed, Some(Close::Graceful));
    s.sock = *s.mock.answers.last().unwrap();
    let told = s.mock.take();
    let texts: Vec<Vec<u8>> =
        told.iter().map(|f| crate::tcp_support::dissect(f, &s.path)).map(|f| f.payload).collect();
    assert!(texts.contains(&b"denied".to_vec()), "{texts:?}");
    s.send("F. 111 ack 58");
    assert_eq!(s.host().closed, Some(Close::Graceful));
}

#[test]
fn the_end_of_an_answer_that_comes_with_its_last_bytes_waits_for_the_words_too() {
    let mut s = Sim::open_held(true);
    s.send("P. 1:11 ack 1");
    s.let_pass(5);
    s.take();
    s.answer(b"denied");
    s.host().tells_last = true;
    s.host().eof = true;
    s.host_writes(50);
    let told = s.take();
    assert_eq!((told.len(), told[0].tcp.flags & flags::FIN), (1, 0));
}

#[test]
fn an_answer_that_is_awaited_is_known_by_its_first_bytes() {
    for (line, switches) in [(&b"HTTP/1.1 101 Switching"[..], true), (b"HTTP/1.1 200 OK", false)] {
        let mut s = Sim::open_held(true);
        s.send("P. 1:101 ack 1");
        s.let_pass(100);
        s.note_seen();
        s.take();
        assert!(s.await_answer());
        s.host().inbox.extend(&line[..5]);
        s.ready(true, false);
        s.silent();
        let looks = s.looks;
        s.host().inbox.extend(&line[5..]);
        s.ready(true, false);
        assert_eq!((s.looks, s.tcb.held().unwrap().switches), (looks + 1, Some(switches)));
        s.note_seen();
        assert_eq!(s.tcb.held().unwrap().switches, None);
        assert_eq!(crate::tcp_support::dissect(&s.mock.take()[0], &s.path).payload, line);
    }
    let mut s = Sim::open_held(false);
    s.host().inbox.extend(b"HTTP/1.1 200 OK");
    assert!(!s.await_answer(), "the peer has something else to say before");
}

#[test]
fn last_words_wait_for_the_window_of_the_guest() {
    let mut s = Sim::open_held(true);
    s.send("P. 1:11 ack 1 win 0");
    s.answer(b"denied");
    s.recv(". 1 ack 11");
    s.silent();
    s.pass(3000);
    for probe in s.take() {
        assert!(probe.payload.is_empty(), "asks for the window");
    }
    s.send(". 11 ack 1 win 3");
    let told = s.mock.take();
    assert_eq!(crate::tcp_support::dissect(&told[0], &s.path).payload, b"denied");
}

#[test]
fn a_guest_that_opens_no_window_still_has_its_bytes_held_and_passed() {
    let mut s = Sim::open_held(true);
    s.host_writes(100);
    s.send("P. 1:11 ack 1 win 0");
    s.end_hold();
    s.host_has(10);
    s.recv(". 1 ack 11");
    s.silent();
    s.send(". 11 ack 1 win 100");
    s.recv("P. 1:101 ack 11");
}
