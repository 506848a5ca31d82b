//! Keep-alive both ways, and flows that outlive an end: the guest is probed, its probes are passed on.

use crate::tcp_support::Sim;
use guestnet_core::effects::Close;
use guestnet_core::stats::DropReason;
use guestnet_core::tcp::Fate;

/// A flow whose guest has closed its side.
fn half_closed() -> Sim {
    let mut s = Sim::open();
    s.send("F. 1 ack 1");
    s.recv(". 1 ack 2");
    s
}

/// A probe of the relay: an old sequence number and no data.
fn is_probe(seen: &crate::tcp_support::Seen, seq: u32) -> bool {
    seen.payload.is_empty() && seen.tcp.seq == crate::tcp_support::OUR_ISN.wrapping_add(seq)
}

#[test]
fn a_half_closed_flow_that_the_guest_has_forgotten_ends_in_order() {
    let mut s = half_closed();
    s.pass(62_000);
    s.silent();
    s.pass(1_000);
    s.recv(". 0 ack 2");
    s.send("R 2");
    s.silent();
    s.closed(Close::Graceful);
    assert_eq!(s.fate, Fate::Closed);
}

#[test]
fn a_half_closed_flow_whose_guest_answers_lives_on() {
    let mut s = half_closed();
    for _ in 0..200 {
        s.pass(63_000);
        s.recv(". 0 ack 2");
        s.send(". 2 ack 1");
        s.silent();
    }
    s.host_writes(10);
    s.recv("P. 1:11 ack 2");
    s.live();
}

#[test]
fn a_half_closed_flow_of_a_silent_guest_ends_after_a_quarter_of_an_hour() {
    let mut s = half_closed();
    s.pass(899_000);
    s.live();
    assert!(s.take().iter().all(|f| is_probe(f, 0)));
    s.pass(64_000);
    s.closed(Close::Graceful);
}

#[test]
fn what_a_forgotten_guest_left_is_still_delivered() {
    for delivered in [true, false] {
        let mut s = Sim::open();
        s.host().send_room = Some(0);
        s.send("F. 1:101 ack 1");
        s.recv(". 1 ack 102");
        s.pass(63_000);
        s.recv(". 0 ack 102");
        s.send("R 102");
        s.live();
        // The guest hears nothing any more.
        s.host_writes(10);
        s.silent();
        if delivered {
            s.host().send_room = None;
            s.ready(false, true);
            s.host_has(100);
            s.closed(Close::Graceful);
        } else {
            s.pass(1_700_000);
            s.live();
            s.pass(101_000);
            s.closed(Close::Reset);
        }
    }
}

#[test]
fn a_reset_of_the_guests_program_is_no_answer_to_a_probe() {
    let mut s = half_closed();
    s.pass(63_000);
    s.recv(". 0 ack 2");
    s.send("R. 2 ack 1");
    s.closed(Close::Reset);
}

#[test]
fn an_idle_flow_is_probed_and_an_answer_is_a_sign_of_life() {
    let mut s = Sim::open();
    for _ in 0..50 {
        s.pass(300_000);
        s.recv(". 0 ack 1");
        s.send(". 1 ack 1");
        s.silent();
    }
    s.live();
    // From here on silence: nobody waits for the truth, so a paused guest has its two hours.
    s.pass(7_430_000);
    s.live();
    assert!(s.take().iter().all(|f| is_probe(f, 0)));
    s.pass(10_000);
    s.recv("R. 1 ack 1");
    s.closed(Close::Reset);
}

#[test]
fn an_open_flow_that_the_guest_has_forgotten_is_reset() {
    let mut s = Sim::open();
    s.pass(300_000);
    s.recv(". 0 ack 1");
    s.send("R 1");
    s.silent();
    s.forgotten();
}

#[test]
fn the_peers_keep_alive_finds_that_the_guest_has_forgotten() {
    let mut s = Sim::open();
    // It probes each second.
    for _ in 0..6 {
        s.host().segments_in += 1;
        s.pass(1_000);
        if !s.mock.frames.is_empty() {
            break;
        }
    }
    s.recv(". 0 ack 1");
    s.send("R 1");
    s.forgotten();
}

#[test]
fn the_peers_keep_alive_finds_a_guest_that_answers_and_disturbs_it_no_more_often_than_the_peer_does() {
    let mut s = Sim::open();
    let mut probes = 0;
    for _ in 0..120 {
        s.host().segments_in += 1;
        s.pass(60_000);
        for seen in s.take() {
            assert!(is_probe(&seen, 0));
            probes += 1;
            s.send(". 1 ack 1");
        }
    }
    s.live();
    assert!((60..=150).contains(&probes), "{probes} probes of the guest for 120 of the peer");
}

#[test]
fn a_peer_that_probes_hears_that_the_guest_is_silent() {
    let mut s = Sim::open();
    for i in 0..20 {
        s.host().segments_in += 1;
        s.pass(60_000);
        if s.fate != Fate::Live {
            assert!(i >= 14, "after {i} minutes");
            break;
        }
    }
    s.closed(Close::Reset);
}

#[test]
fn looking_at_an_idle_socket_gets_rarer() {
    let mut s = Sim::open();
    let mut times = 0;
    let end = s.now.plus_s(3600);
    while let Some(at) = s.tcb.deadline()
        && at <= end
    {
        s.pass(at.since(s.now) / 1_000_000 + 1);
        times += 1;
        for _ in s.take() {
            s.send(". 1 ack 1");
        }
    }
    assert!(times < 50, "{times} timers in an hour of silence");
}

#[test]
fn a_guests_keep_alive_goes_out_and_is_answered_when_the_peer_answers() {
    let mut s = Sim::open();
    for i in 1..=3 {
        s.pass(5_000);
        s.send(". 0 ack 1");
        s.silent();
        assert_eq!(s.host().probes, i);
        s.pass(50);
        s.silent();
        s.host().segments_in += 1;
        s.pass(100);
        s.recv(". 1 ack 1");
        s.silent();
    }
    // With a byte that was there before, as old stacks send it.
    s.send("P. 1:11 ack 1");
    s.recv(". 1 ack 11");
    s.pass(5_000);
    s.send(". 10:11 ack 1");
    s.silent();
    s.host().segments_in += 1;
    s.pass(10);
    s.recv(". 1 ack 11");
    assert_eq!(s.dropped(DropReason::OutOfWindow), 0);
}

#[test]
fn a_guests_keep_alive_is_not_answered_for_a_peer_that_is_gone() {
    let mut s = Sim::open();
    s.pass(5_000);
    for i in 1..=9 {
        s.send(". 0 ack 1");
        s.pass(1_000);
        s.silent();
        assert_eq!(s.host().probes, i);
    }
    s.pass(60_000);
    s.silent();
    // The guest's own conclusion.
    s.send("R. 1 ack 1");
    s.closed(Close::Reset);
}

#[test]
fn a_late_answer_of_the_peer_counts() {
    let mut s = Sim::open();
    s.pass(5_000);
    s.send(". 0 ack 1");
    s.pass(900);
    s.host().segments_in += 1;
    s.send(". 0 ack 1");
    s.pass(10);
    s.recv(". 1 ack 1");
}

#[test]
fn an_answer_that_takes_longer_than_it_is_looked_for_counts_for_the_next_probe() {
    let mut s = Sim::open();
    for _ in 0..3 {
        s.pass(75_000);
        s.send(". 0 ack 1");
        s.pass(20_000);
        s.silent();
        s.host().segments_in += 1;
        s.pass(55_000);
        // It may look like a probe of the peer.
        assert!(s.take().iter().all(|f| is_probe(f, 0)));
        s.send(". 0 ack 1");
        s.pass(10);
        s.recv(". 1 ack 1");
    }
    s.live();
}

#[test]
fn a_keep_alive_is_answered_at_once_where_the_truth_is_not_to_be_had() {
    // The kernel's own timers ask the peer; a service has no peer of that kind.
    for (busy, unknown) in [(true, false), (false, true)] {
        let mut s = Sim::open();
        (s.host().busy, s.host().peer_unknown) = (busy, unknown);
        s.pass(5_000);
        s.send(". 0 ack 1");
        s.recv(". 1 ack 1");
        assert_eq!(s.host().probes, 0);
    }
}

#[test]
fn a_probe_of_a_closed_window_is_always_answered() {
    let mut s = Sim::open();
    s.host().send_room = Some(0);
    let mut at = 1;
    while at == 1 || s.window_beyond(at) > 0 {
        let n = if at == 1 { 60_000 } else { s.window_beyond(at).min(60_000) };
        s.send(&format!(". {}:{} ack 1", at, at + n));
        at += n;
        s.take();
    }
    s.send(&format!(". {} ack 1", at - 1));
    s.recv(&format!(". 1 ack {at} win 0"));
    assert_eq!(s.host().probes, 0);
}

#[test]
fn a_guest_that_may_have_rebooted_is_asked_about_what_is_idle() {
    let mut s = Sim::open();
    s.recheck();
    s.silent();
    s.pass(10_000);
    s.recheck();
    s.recv(". 0 ack 1");
    s.recheck();
    s.silent();
    s.send("R 1");
    s.forgotten();
}
