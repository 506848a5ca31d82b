//! Guest to host: short sends, the window, order, budget.

use crate::tcp_support::{GUEST_ISN, Sim};
use guestnet_core::effects::{Close, SockError};
use guestnet_core::stats::DropReason;
use guestnet_core::tcp::FLOW_BUFFER;

#[test]
fn payload_goes_straight_to_the_socket_and_a_batch_gets_one_ack() {
    let mut s = Sim::open();
    for i in 0..10 {
        s.seg(&format!(". {}:{} ack 1", 1 + i * 1000, 1001 + i * 1000));
        s.silent();
    }
    s.end();
    s.recv(". 1 ack 10001");
    s.silent();
    s.host_has(10_000);
    assert_eq!(s.budget.used, 0);
    assert_eq!(s.tcb.totals(), (10_000, 0));
}

#[test]
fn what_a_short_send_leaves_is_acknowledged_kept_and_sent_later() {
    let mut s = Sim::open();
    s.host().send_room = Some(300);
    s.send("P. 1:1001 ack 1");
    s.recv(". 1 ack 1001");
    s.host_has(300);
    assert!(s.budget.used >= 700);
    s.send("P. 1001:2001 ack 1");
    s.recv(". 1 ack 2001");
    s.host_has(300);
    s.host().send_room = Some(500);
    s.ready(false, true);
    s.host_has(800);
    s.host().send_room = None;
    s.ready(false, true);
    s.host_has(2000);
    assert_eq!(s.budget.used, 0);
    s.send("P. 2001:2101 ack 1");
    s.host_has(2100);
}

#[test]
fn the_window_is_what_the_buffer_can_take() {
    let mut s = Sim::open();
    s.host().send_room = Some(0);
    let mut at = 1;
    // The guest fills whatever it is offered.
    loop {
        s.send(&format!(". {}:{} ack 1", at, at + 50_000));
        at += 50_000;
        for seen in s.take() {
            assert_eq!(seen.tcp.ack, crate::tcp_support::GUEST_ISN.wrapping_add(at));
        }
        if s.window_beyond(at) < 50_000 {
            break;
        }
    }
    let rest = s.window_beyond(at);
    if rest > 0 {
        s.send(&format!(". {}:{} ack 1", at, at + rest));
        at += rest;
        s.recv(&format!(". 1 ack {at} win 0"));
    }
    assert!((FLOW_BUFFER..=FLOW_BUFFER + 4096).contains(&(at - 1)), "{at}");
    // A window probe of one byte is answered, not taken.
    s.send(&format!(". {}:{} ack 1", at, at + 1));
    s.recv(&format!(". 1 ack {at} win 0"));
    // The window reopens only by a step that is worth it.
    s.host().send_room = Some(1000);
    s.ready(false, true);
    s.silent();
    s.host().send_room = Some(5000);
    s.ready(false, true);
    s.recv(&format!(". 1 ack {at}"));
    assert!(s.window_beyond(at) >= 5000, "{}", s.window_beyond(at));
    s.host().send_room = None;
    s.ready(false, true);
    s.recv(&format!(". 1 ack {at}"));
    assert!(s.window_beyond(at) >= FLOW_BUFFER);
    s.host_has(at as usize - 1);
    assert_eq!(s.budget.used, 0);
}

#[test]
fn a_trickle_into_a_full_buffer_closes_the_window_and_loses_nothing() {
    let mut s = Sim::open();
    s.host().send_room = Some(0);
    let mut at = 1;
    loop {
        let n = if at == 1 { 60_000 } else { s.window_beyond(at).saturating_sub(at).min(60_000) };
        let n = if n > 1000 && s.window_beyond(at) > 61_000 { n.max(1000) } else { 1 };
        s.send(&format!(". {}:{} ack 1", at, at + n));
        at += n;
        let seen = s.take().pop().expect("an ACK");
        assert_eq!(seen.tcp.ack, crate::tcp_support::GUEST_ISN.wrapping_add(at), "lost at {at}");
        if seen.tcp.window == 0 {
            break;
        }
        assert!(at < FLOW_BUFFER + 8192, "the window never closes");
    }
    assert_eq!(s.dropped(DropReason::BufferLimit), 0);
    s.host().send_room = None;
    s.ready(false, true);
    s.host_has(at as usize - 1);
}

#[test]
fn no_window_scale_means_64k() {
    let mut s = Sim::open_with("S 0 mss 1460", 65535);
    s.send("P. 1:2001 ack 1");
    let seen = s.recv(". 1 ack 2001");
    assert!(seen.tcp.window >= 65535 - 2920);
}

#[test]
fn out_of_order_waits_and_is_told_at_once() {
    let mut s = Sim::open();
    s.seg("P. 1001:2001 ack 1");
    s.recv(". 1 ack 1");
    s.seg("P. 3001:4001 ack 1");
    s.recv(". 1 ack 1");
    s.seg("P. 2001:3001 ack 1");
    s.recv(". 1 ack 1");
    s.host_has(0);
    s.seg("P. 1:1001 ack 1");
    s.end();
    s.recv(". 1 ack 4001");
    s.silent();
    s.host_has(4000);
    assert_eq!(s.budget.used, 0);
}

#[test]
fn overlaps_and_repeats_deliver_each_byte_once() {
    let mut s = Sim::open();
    s.send("P. 501:1501 ack 1");
    s.send("P. 1001:2001 ack 1");
    s.send("P. 1:801 ack 1");
    s.send("P. 1:801 ack 1");
    s.send("P. 1501:2501 ack 1");
    s.take();
    s.host_has(2500);
    assert_eq!(s.budget.used, 0);
}

#[test]
fn a_fin_ahead_of_order_waits_too() {
    let mut s = Sim::open();
    s.send("F. 101:201 ack 1");
    s.recv(". 1 ack 1");
    assert!(!s.host().shut);
    s.send("P. 1:101 ack 1");
    s.recv(". 1 ack 202");
    s.host_has(200);
    assert!(s.host().shut);
}

#[test]
fn urgent_is_plain_data() {
    // A pointer before, behind or without the data, and where bytes before it wait for the socket.
    for (line, room) in
        [("PU. 1:11 ack 1", None), ("PU. 1:11 ack 1 urg 11", None), ("PU. 1:11 ack 1 urg 5", Some(3))]
    {
        let mut s = Sim::open();
        s.host().send_room = room;
        s.send(line);
        s.recv(". 1 ack 11");
        s.host().send_room = None;
        s.ready(false, true);
        s.host_has(10);
        assert_eq!(s.host().urgent, [0usize; 0]);
    }
}

#[test]
fn an_urgent_byte_is_urgent_at_the_host() {
    let mut s = Sim::open();
    s.send("PU. 1:11 ack 1 urg 10");
    s.recv(". 1 ack 11");
    s.send("PU. 11:21 ack 1 urg 1");
    s.recv(". 1 ack 21");
    // Sent again with more behind it: the byte went already.
    s.send("PU. 11:31 ack 1 urg 1");
    s.recv(". 1 ack 31");
    s.host_has(30);
    assert_eq!(s.host().urgent, [9, 10]);
    // With room for what is before it alone, it goes with the others.
    s.host().send_room = Some(4);
    s.send("PU. 31:41 ack 1 urg 5");
    s.recv(". 1 ack 41");
    s.host().send_room = None;
    s.ready(false, true);
    s.host_has(40);
    assert_eq!(s.host().urgent, [9, 10]);
}

#[test]
fn beyond_the_window_is_not_taken() {
    let mut s = Sim::open_with("S 0 mss 1460", 65535);
    s.send(". 1:70001 ack 1");
    let got = s.host().sent.len();
    assert_eq!(got, 65535);
    s.recv(". 1 ack 65536");
    s.send(". 900000:900100 ack 1");
    s.recv(". 1 ack 65536");
    s.host_has(got);
}

#[test]
fn a_dead_socket_resets_the_guest() {
    let mut s = Sim::open();
    s.host().send_error = Some(SockError::Reset);
    s.send("P. 1:11 ack 1");
    s.recv("R. 1");
    s.closed(Close::Reset);
    // Also when the error shows while the buffer drains.
    let mut s = Sim::open();
    s.host().send_room = Some(0);
    s.send("P. 1:11 ack 1");
    s.recv(". 1 ack 11");
    s.host().send_error = Some(SockError::Reset);
    s.ready(true, true);
    s.recv("R. 1 ack 11");
    s.closed(Close::Reset);
}

#[test]
fn a_spent_budget_takes_no_more_and_recovers() {
    let mut s = Sim::open();
    s.budget.limit = 3000;
    s.host().send_room = Some(0);
    s.send("P. 1:5001 ack 1");
    assert!(s.budget.used <= 3000);
    assert_eq!(s.dropped(DropReason::BufferLimit), 1);
    s.recv(". 1 ack 3001");
    s.send("P. 6001:7001 ack 1");
    s.recv(". 1 ack 3001");
    assert!(s.budget.used <= 3000);
    s.host().send_room = None;
    s.ready(false, true);
    s.take();
    s.send("P. 3001:8001 ack 1");
    s.recv(". 1 ack 8001");
    s.host_has(8000);
    assert_eq!(s.budget.used, 0);
}

#[test]
fn a_full_port_keeps_the_ack_for_later() {
    let mut s = Sim::open();
    s.mock.port(s.path.port).room = 10;
    s.send("P. 1:101 ack 1");
    s.silent();
    s.host_has(100);
    assert!(s.tcb.waits_for_port());
    s.mock.port(s.path.port).room = usize::MAX;
    s.port_writable();
    s.recv(". 1 ack 101");
    s.silent();
}

#[test]
fn many_tiny_pieces_ahead_of_order_are_bounded() {
    let mut s = Sim::open();
    for i in 0..5000u32 {
        let at = 3 + i * 2;
        s.seg(&format!(". {}:{} ack 1", at, at + 1));
    }
    s.end();
    s.take();
    assert!(s.budget.used < 256 * 100, "{}", s.budget.used);
    assert!(s.dropped(DropReason::BufferLimit) > 4000);
    s.abort();
    assert_eq!(s.budget.used, 0);
}

#[test]
fn an_answer_carries_the_ack_of_its_question() {
    let mut s = Sim::open_patient(10);
    for i in 0..20 {
        let (from, to) = (1 + 100 * i, 101 + 100 * i);
        s.send(&format!("P. {from}:{to} ack {from}"));
        s.silent();
        s.pass(9);
        s.silent();
        s.host_writes(100);
        s.recv(&format!("P. {from}:{to} ack {to}"));
        s.silent();
    }
    s.host_has(2000);
}

#[test]
fn without_an_answer_the_ack_waits_once() {
    let mut s = Sim::open_patient(10);
    s.send("P. 1:101 ack 1");
    s.pass(10);
    s.recv(". 1 ack 101");
    s.send("P. 101:201 ack 1");
    s.recv(". 1 ack 201");
    // Answers make it wait again, but not the first of them.
    for i in 0..8 {
        let (from, to) = (201 + 100 * i, 301 + 100 * i);
        s.send(&format!("P. {from}:{to} ack {}", 1 + 10 * i));
        s.recv(&format!(". {} ack {to}", 1 + 10 * i));
        s.host_writes(10);
        s.recv(&format!("P. {}:{} ack {to}", 1 + 10 * i, 11 + 10 * i));
    }
    s.send("P. 1001:1101 ack 81");
    s.silent();
    s.pass(10);
    s.recv(". 81 ack 1101");
    s.silent();
}

#[test]
fn much_data_and_what_is_ahead_of_order_wait_for_no_answer() {
    let mut s = Sim::open_patient(10);
    s.send(". 1:2001 ack 1");
    s.silent();
    s.send("P. 2001:3001 ack 1");
    s.recv(". 1 ack 3001");
    s.send("P. 3101:3201 ack 1");
    s.recv(". 1 ack 3001");
    // Neither does what fills the gap (RFC 5681 4.2).
    s.send("P. 3001:3101 ack 1");
    s.recv(". 1 ack 3201");
}

#[test]
fn the_ack_of_a_fin_travels_with_ours() {
    let mut s = Sim::open_patient(10);
    s.send("F. 1 ack 1");
    s.silent();
    assert!(s.host().shut);
    s.host_closes();
    s.recv("F. 1 ack 2");
    s.send(". 2 ack 2");
    s.silent();
    s.closed(Close::Graceful);
    // When the host takes its time, alone; and the last of all at once.
    let mut s = Sim::open_patient(10);
    s.send("F. 1 ack 1");
    s.pass(10);
    s.recv(". 1 ack 2");
    let mut s = Sim::open_patient(10);
    s.host_closes();
    s.recv("F. 1 ack 1");
    s.send("F. 1 ack 1");
    s.recv(". 2 ack 2");
}

/// Batches of four segments of a bulk upload from byte `from` on, the next as soon as the one before was taken;
/// how many bytes each ACK was for.
fn bulk(s: &mut Sim, from: &mut usize, acked: &mut usize, batches: usize, pause: u64) -> Vec<usize> {
    let mut steps = Vec::new();
    for _ in 0..batches {
        for _ in 0..4 {
            let to = *from + 1460;
            s.seg(&format!(". {from}:{to} ack 1"));
            *from = to;
        }
        s.end();
        s.pass(pause);
        for seen in s.take() {
            let to = 1 + seen.tcp.ack.wrapping_sub(GUEST_ISN.wrapping_add(1)) as usize;
            steps.push(to - *acked);
            *acked = to;
        }
    }
    steps
}

#[test]
fn in_a_long_upload_acks_get_rarer_and_never_too_rare() {
    let mut s = Sim::open_patient(10);
    let (mut from, mut acked) = (1, 1);
    let first = bulk(&mut s, &mut from, &mut acked, 20, 0);
    assert!(first.iter().all(|n| *n == 4 * 1460), "one for each batch: {first:?}");
    let later = bulk(&mut s, &mut from, &mut acked, 2000, 0);
    let last = &later[later.len() - 5..];
    assert!(last.iter().all(|n| (200_000..=262_144 + 4 * 1460).contains(n)), "{last:?}");
    // What was left goes without more data after a moment.
    let rest = from - acked;
    s.pass(1);
    let end = s.take();
    assert_eq!(end.len(), usize::from(rest > 0));
    assert!(end.iter().all(|f| f.tcp.ack == GUEST_ISN.wrapping_add(from as u32)));
    s.host_has(from - 1);
}

#[test]
fn a_guest_that_stops_for_want_of_an_ack_gets_more_of_them() {
    let mut s = Sim::open_patient(10);
    let (mut from, mut acked) = (1, 1);
    bulk(&mut s, &mut from, &mut acked, 1000, 0);
    // It has room for 58 400 bytes: it stops, and goes on when the ACK has come.
    let mut stops = 0;
    for _ in 0..400 {
        let steps = bulk(&mut s, &mut from, &mut acked, 10, 0);
        if steps.is_empty() {
            s.silent();
            s.pass(1);
            let seen = s.take();
            assert_eq!(seen.len(), 1, "in a millisecond");
            acked = from;
            stops += 1;
        }
    }
    assert!((1..40).contains(&stops), "{stops} times of 400");
}

#[test]
fn a_pause_after_a_push_is_no_stop() {
    let mut s = Sim::open_patient(10);
    let (mut from, mut acked) = (1, 1);
    bulk(&mut s, &mut from, &mut acked, 2000, 0);
    for _ in 0..20 {
        let to = from + 100;
        s.send(&format!("P. {from}:{to} ack 1"));
        s.pass(20);
        assert_eq!(s.take().len(), 1);
        (from, acked) = (to, to);
    }
    let steps = bulk(&mut s, &mut from, &mut acked, 200, 0);
    assert!(steps.iter().all(|n| *n > 200_000), "{steps:?}");
}
