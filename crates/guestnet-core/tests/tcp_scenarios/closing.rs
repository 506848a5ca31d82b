//! Closing: half-close both ways, both at once, resets, TIME-WAIT, idle limits.

use crate::tcp_support::{PORT, Sim};
use guestnet_core::effects::Close;
use guestnet_core::tcp::Fate;

#[test]
fn the_guest_closes_first() {
    let mut s = Sim::open();
    s.send("F. 1 ack 1");
    s.recv(". 1 ack 2");
    assert!(s.host().shut);
    assert_eq!(s.tcb.state_name(), "close_wait");
    s.host_writes(100);
    s.recv("P. 1:101 ack 2");
    s.send(". 2 ack 101");
    s.host_closes();
    s.recv("F. 101 ack 2");
    assert_eq!(s.tcb.state_name(), "last_ack");
    s.send(". 2 ack 102");
    s.silent();
    s.closed(Close::Graceful);
    assert_eq!(s.fate, Fate::Closed);
    assert_eq!(s.host().discarded, 100);
}

#[test]
fn the_host_closes_first() {
    let mut s = Sim::open();
    s.host_closes();
    s.recv("F. 1 ack 1");
    assert_eq!(s.tcb.state_name(), "fin_wait_1");
    s.send(". 1 ack 2");
    assert_eq!(s.tcb.state_name(), "fin_wait_2");
    s.send("P. 1:101 ack 2");
    s.recv(". 2 ack 101");
    s.host_has(100);
    assert!(!s.host().shut);
    s.send("F. 101 ack 2");
    s.recv(". 2 ack 102");
    assert!(!s.host().shut, "the close says it");
    s.closed(Close::Graceful);
    s.live();
    assert!(s.tcb.is_over());
    assert_eq!(s.tcb.state_name(), "time_wait");
    s.send("F. 101 ack 2");
    s.recv(". 2 ack 102");
    s.pass(1999);
    s.live();
    s.pass(1);
    s.silent();
    assert_eq!(s.fate, Fate::Closed);
}

#[test]
fn half_closed_for_an_hour_still_carries_data() {
    let mut s = Sim::open();
    s.send("F. 1 ack 1");
    s.recv(". 1 ack 2");
    for _ in 0..60 {
        s.pass(60_000);
        if s.take().len() == 1 {
            // Asked whether it is still there.
            s.send(". 2 ack 1");
        }
    }
    s.live();
    s.host_writes(10);
    s.recv("P. 1:11 ack 2");
}

#[test]
fn both_close_at_once() {
    let mut s = Sim::open();
    s.host_closes();
    s.recv("F. 1 ack 1");
    s.send("F. 1 ack 1");
    s.recv(". 2 ack 2");
    assert_eq!(s.tcb.state_name(), "closing");
    s.send(". 2 ack 2");
    s.silent();
    assert_eq!(s.tcb.state_name(), "time_wait");
    s.closed(Close::Graceful);
}

#[test]
fn fin_with_data_and_ack_of_ours_in_one() {
    let mut s = Sim::open();
    s.host_closes();
    s.recv("F. 1 ack 1");
    s.send("F. 1:51 ack 2");
    s.recv(". 2 ack 52");
    s.host_has(50);
    assert_eq!(s.tcb.state_name(), "time_wait");
}

#[test]
fn the_fin_is_sent_again() {
    let mut s = Sim::open();
    s.host_writes(10);
    s.recv("P. 1:11");
    s.host_closes();
    s.recv("F. 11");
    s.pass(200);
    s.recv("FP. 1:11");
    s.send(". 1 ack 11");
    s.silent();
    s.pass(200);
    s.recv("F. 11");
    s.pass(30_000);
    assert!(s.take().iter().all(|f| f.payload.is_empty()));
    s.send(". 1 ack 12");
    assert_eq!(s.tcb.state_name(), "fin_wait_2");
    s.pass(299_000);
    s.silent();
}

#[test]
fn the_guests_fin_waits_for_what_is_buffered() {
    let mut s = Sim::open();
    s.host().send_room = Some(10);
    s.send("F. 1:101 ack 1");
    s.recv(". 1 ack 102");
    assert!(!s.host().shut);
    s.host().send_room = None;
    s.ready(false, true);
    s.host_has(100);
    assert!(s.host().shut);
    s.silent();
}

#[test]
fn closed_both_ways_but_the_socket_is_slow() {
    let mut s = Sim::open();
    s.host().send_room = Some(0);
    s.send("F. 1:101 ack 1");
    s.recv(". 1 ack 102");
    s.host_closes();
    s.recv("F. 1 ack 102");
    s.send(". 102 ack 2");
    s.live();
    s.host().send_room = None;
    s.ready(false, true);
    s.host_has(100);
    s.closed(Close::Graceful);
}

#[test]
fn a_fin_needs_no_window() {
    let mut s = Sim::open_with("S 0 mss 1000 ws 0", 0);
    s.host_closes();
    s.recv("F. 1 ack 1");
    s.send(". 1 ack 2 win 0");
    assert_eq!(s.tcb.state_name(), "fin_wait_2");
}

#[test]
fn a_guests_fin_into_a_full_buffer_is_taken() {
    let mut s = Sim::open();
    s.host().send_room = Some(0);
    let mut at = 1;
    while s.window_beyond(at) > 0 || at == 1 {
        let n = if at == 1 { 60_000 } else { s.window_beyond(at).min(60_000) };
        s.send(&format!(". {}:{} ack 1", at, at + n));
        at += n;
        s.take();
    }
    s.send(&format!("F. {at} ack 1"));
    s.recv(&format!(". 1 ack {} win 0", at + 1));
    s.host().send_room = None;
    s.ready(false, true);
    assert!(s.host().shut);
}

#[test]
fn a_reset_goes_through_both_ways() {
    let mut s = Sim::open();
    s.send("R 1");
    s.silent();
    s.closed(Close::Reset);
    let mut s = Sim::open();
    s.abort();
    s.recv("R. 1 ack 1");
    s.closed(Close::Reset);
}

#[test]
fn a_reset_with_bytes_still_buffered() {
    let mut s = Sim::open();
    s.host().send_room = Some(0);
    s.send("P. 1:5001 ack 1");
    s.send("P. 7001:8001 ack 1");
    s.take();
    assert!(s.budget.used > 0);
    s.send("R. 5001 ack 1");
    s.closed(Close::Reset);
    assert_eq!(s.budget.used, 0);
}

#[test]
fn time_wait_is_reopened_by_a_newer_syn_only() {
    let done = || {
        let mut s = Sim::open();
        s.host_closes();
        s.recv("F. 1");
        s.send("F. 1 ack 2");
        s.recv(". 2 ack 2");
        assert_eq!(s.tcb.state_name(), "time_wait");
        s
    };
    let mut s = done();
    s.send("S 0 mss 1460");
    s.live();
    s.recv(". 2 ack 2");
    s.send("S 100000 mss 1460");
    assert_eq!(s.fate, Fate::Reopen);
    s.silent();
    let mut s = done();
    s.send("R 2");
    assert_eq!(s.fate, Fate::Closed);
}

#[test]
fn time_wait_hears_no_socket() {
    let mut s = Sim::open();
    s.host_closes();
    s.recv("F. 1");
    s.send("F. 1 ack 2");
    s.recv(". 2 ack 2");
    s.ready(true, true);
    s.port_writable();
    s.silent();
    s.live();
}

#[test]
fn idle_limits() {
    let mut s = Sim::open();
    s.pass(7_439_000);
    s.live();
    s.take();
    // A keep-alive of the guest counts.
    s.send(". 0 ack 1");
    s.pass(7_439_000);
    s.live();
    s.take();
    s.pass(1_000);
    s.recv("R. 1 ack 1");
    s.closed(Close::Reset);
}

#[test]
fn both_closed_without_the_last_ack_ends() {
    let mut s = Sim::open();
    s.send("F. 1 ack 1");
    s.recv(". 1 ack 2");
    s.host_closes();
    s.recv("F. 1 ack 2");
    s.pass(200_000);
    s.live();
    s.take();
    s.pass(50_000);
    s.closed(Close::Reset);
}

#[test]
fn data_after_the_guests_fin_is_ignored() {
    let mut s = Sim::open();
    s.send("F. 1 ack 1");
    s.recv(". 1 ack 2");
    s.send("P. 2:12 ack 1");
    s.recv(". 1 ack 2");
    s.host_has(0);
    s.live();
}

#[test]
fn a_stack_that_forgot_the_closed_flow_takes_no_bytes_from_the_host() {
    let mut s = Sim::open();
    s.host_closes();
    s.recv("F. 1 ack 1");
    s.host().send_room = Some(0);
    s.send("F. 1:101 ack 2");
    s.recv(". 2 ack 102");
    // A late frame of ours reaches the guest's stack, which has no such flow any more.
    s.send("R 102");
    s.live();
    s.pass(1_000_000);
    s.live();
    s.host().send_room = None;
    s.ready(false, true);
    s.host_has(100);
    s.closed(Close::Graceful);
}

#[test]
fn a_reset_of_the_last_ack_is_an_orderly_end_with_data_missing_it_is_not() {
    for (acked, how) in [(101, Close::Graceful), (1, Close::Reset)] {
        let mut s = Sim::open();
        s.send("F. 1 ack 1");
        s.recv(". 1 ack 2");
        s.host_writes(100);
        s.recv("P. 1:101 ack 2");
        s.send(&format!(". 2 ack {acked}"));
        s.host_closes();
        s.recv("F. 101 ack 2");
        s.send("R 2");
        s.silent();
        s.closed(how);
    }
}

#[test]
fn the_last_bytes_carry_the_fin() {
    let mut s = Sim::open();
    s.host().tells_last = true;
    s.host().eof = true;
    let before = s.mock.peeks;
    s.host_writes(2000);
    s.recv("FP. 1:2001 ack 1 gso 1460");
    s.silent();
    assert_eq!((s.tcb.state_name(), s.mock.peeks), ("fin_wait_1", before + 1));
    // Both segments are lost; the second carries the FIN again.
    s.pass(200);
    s.recv("P. 1:1461 ack 1");
    s.send(". 1 ack 1461");
    s.recv("FP. 1461:2001 ack 1");
    s.send(". 1 ack 2002");
    assert_eq!((s.tcb.state_name(), s.host().discarded), ("fin_wait_2", 2000));
}

#[test]
fn a_full_port_keeps_the_last_bytes_and_their_fin() {
    let mut s = Sim::open();
    s.host().tells_last = true;
    s.host().eof = true;
    s.mock.port(PORT).room = 0;
    s.host_writes(100);
    s.silent();
    assert_eq!(s.tcb.state_name(), "established");
    s.mock.port(PORT).room = usize::MAX;
    s.port_writable();
    s.recv("FP. 1:101 ack 1");
    s.silent();
}
