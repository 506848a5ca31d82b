//! Host to guest: large segments, windows, loss, full ports.

use crate::tcp_support::Sim;
use guestnet_core::effects::{Close, SockError};

#[test]
fn one_large_frame_that_stays_in_the_socket_until_acknowledged() {
    let mut s = Sim::open();
    s.host_writes(50_000);
    s.recv("P. 1:50001 ack 1 gso 1460");
    s.silent();
    assert_eq!(s.host().discarded, 0);
    s.send(". 1 ack 20001");
    assert_eq!(s.host().discarded, 20_000);
    s.silent();
    s.send(". 1 ack 50001");
    assert_eq!(s.host().discarded, 50_000);
    assert_eq!(s.tcb.totals(), (0, 50_000));
    // Nothing is sent again.
    s.pass(299_000);
    s.silent();
}

#[test]
fn a_large_window_is_filled_in_turns() {
    let mut s = Sim::open();
    s.host_writes(1_000_000);
    let mut turns = Vec::new();
    loop {
        turns.push(s.take().iter().map(|f| f.payload.len()).sum::<usize>());
        if !s.tcb.wants_batch_end() {
            break;
        }
        s.end();
    }
    assert_eq!(turns.iter().sum::<usize>(), 1_000_000);
    // The first call is two turns: the socket's news and the end of that batch.
    assert!(turns.len() >= 3 && turns.iter().skip(1).all(|n| *n < 400_000), "{turns:?}");
}

#[test]
fn acks_of_a_batch_discard_once_and_push_once() {
    let mut s = Sim::open_with("S 0 mss 1460", 2920);
    s.host_writes(10_000);
    s.recv(". 1:2921");
    s.seg(". 1 ack 1461 win 2920");
    s.seg(". 1 ack 2921 win 2920");
    s.silent();
    s.end();
    s.recv(". 2921:5841");
    s.silent();
}

#[test]
fn frames_are_whole_segments_until_the_last() {
    let mut s = Sim::open();
    s.path.gso_max = 10_000;
    s.host_writes(25_000);
    s.recv(". 1:8761 gso 1460");
    s.recv(". 8761:17521 gso 1460");
    s.recv("P. 17521:25001 gso 1460");
    s.silent();
}

#[test]
fn without_gso_frames_are_segments() {
    let mut s = Sim::open();
    s.path.gso_max = 0;
    s.host_writes(3000);
    let frames = s.take();
    assert_eq!(frames.iter().map(|f| f.payload.len()).collect::<Vec<_>>(), [1460, 1460, 80]);
    assert!(frames.iter().all(|f| f.gso.is_none()));
}

#[test]
fn the_guests_window_is_kept() {
    let mut s = Sim::open_with("S 0 mss 1000 ws 0", 3000);
    s.host_writes(10_000);
    s.recv(". 1:3001");
    s.silent();
    // Less than a segment of room: wait for more (silly window).
    s.send(". 1 ack 1001 win 2100");
    s.silent();
    s.send(". 1 ack 3001 win 3000");
    s.recv(". 3001:6001");
}

#[test]
fn a_closed_window_is_probed_and_reopens() {
    let mut s = Sim::open_with("S 0 mss 1000 ws 0", 1000);
    s.host_writes(5000);
    s.recv(". 1:1001");
    s.send(". 1 ack 1001 win 0");
    s.silent();
    let mut waited = 0;
    for _ in 0..40 {
        s.pass(130_000);
        waited += 130;
        let probes = s.take();
        assert!(!probes.is_empty());
        assert!(probes.iter().all(|p| p.payload.is_empty()));
        // As long as the guest answers, the flow lives (RFC 1122 4.2.2.17).
        s.send(". 1 ack 1001 win 0");
        s.live();
    }
    assert!(waited > 5000);
    s.send(". 1 ack 1001 win 1000");
    s.recv(". 1001:2001");
}

#[test]
fn probes_without_any_answer_end_the_flow() {
    let mut s = Sim::open_with("S 0 mss 1000 ws 0", 1000);
    s.host_writes(5000);
    s.recv(". 1:1001");
    s.send(". 1 ack 1001 win 0");
    s.pass(3_600_000);
    let frames = s.take();
    assert!(frames.len() < 20, "{}", frames.len());
    s.closed(Close::Reset);
}

#[test]
fn a_window_taken_back_in_flight_is_probed_not_flooded() {
    let mut s = Sim::open_with("S 0 mss 1000 ws 0", 5000);
    s.host_writes(5000);
    s.recv("P. 1:5001");
    s.send(". 1 ack 1001 win 0");
    for _ in 0..40 {
        s.pass(130_000);
        assert!(s.take().iter().all(|f| f.payload.is_empty()));
        s.send(". 1 ack 1001 win 0");
        s.live();
    }
    s.send(". 1 ack 1001 win 5000");
    s.recv(". 1001:5001");
}

#[test]
fn what_was_in_flight_when_the_window_closed_and_reopened_is_still_timed() {
    let mut s = Sim::open_with("S 0 mss 1000 ws 0", 5000);
    s.host_writes(5000);
    s.recv("P. 1:5001");
    s.send(". 1 ack 1001 win 0");
    s.send(". 1 ack 1001 win 5000");
    s.silent();
    s.pass(300);
    s.recv(". 1001:2001");
}

#[test]
fn a_timeout_sends_again_with_backoff_then_recovers() {
    let mut s = Sim::open();
    s.host_writes(100);
    s.recv("P. 1:101");
    s.pass(199);
    s.silent();
    for wait in [1, 400, 800] {
        s.pass(wait);
        s.recv("P. 1:101");
        s.silent();
    }
    assert_eq!(s.counters.retransmits, 3);
    s.send(". 1 ack 101");
    s.pass(100_000);
    s.silent();
    assert_eq!(s.host().discarded, 100);
}

#[test]
fn after_a_timeout_sending_starts_small() {
    let mut s = Sim::open();
    s.host_writes(100_000);
    s.take();
    s.pass(1000);
    let first = s.take();
    assert!(first[0].payload.len() == 1460, "one segment after a timeout");
    // The guest had all but the first: its ACK jumps, and nothing of that is sent again.
    s.send(". 1 ack 100001");
    s.silent();
    assert_eq!(s.host().discarded, 100_000);
}

#[test]
fn three_duplicate_acks_send_the_first_segment_again() {
    let mut s = Sim::open();
    s.path.gso_max = 2920;
    s.host_writes(29_200);
    assert_eq!(s.take().len(), 10);
    for _ in 0..2 {
        s.send(". 1 ack 1");
        s.silent();
    }
    s.send(". 1 ack 1");
    s.recv(". 1:1461");
    s.silent();
    for _ in 0..4 {
        s.send(". 1 ack 1");
        s.silent();
    }
    // A partial ACK names the next hole (RFC 6582).
    s.send(". 1 ack 2921");
    s.recv(". 2921:4381");
    s.send(". 1 ack 29201");
    s.silent();
    assert_eq!(s.counters.retransmits, 2);
    assert_eq!(s.host().discarded, 29_200);
}

/// What was in flight when loss was last seen lies more than half of all sequence numbers back.
#[test]
fn duplicate_acks_mean_loss_after_gigabytes_too() {
    let mut s = Sim::open();
    s.host().endless = true;
    s.ready(true, false);
    let mut at = 1u32;
    while at <= 1 << 31 {
        at += s.mock.take().iter().map(|f| f.frame.len() as u32 - 54).sum::<u32>();
        s.send(&format!(". 1 ack {at}"));
    }
    assert_eq!(s.counters.retransmits, 0);
    s.mock.take();
    for _ in 0..3 {
        s.send(&format!(". 1 ack {at}"));
    }
    assert_eq!(s.counters.retransmits, 1);
}

#[test]
fn a_guest_that_never_answers_is_given_up() {
    let mut s = Sim::open();
    s.host_writes(100);
    s.take();
    s.pass(100_000);
    s.live();
    s.pass(3_600_000);
    assert!(s.take().len() < 20);
    s.closed(Close::Reset);
}

#[test]
fn a_full_port_is_waited_for() {
    let mut s = Sim::open();
    s.mock.port(s.path.port).room = 5000;
    s.host_writes(50_000);
    let first = s.take();
    let sent: usize = first.iter().map(|f| f.payload.len()).sum();
    assert!((1460..=5000).contains(&sent), "{sent}");
    assert!(s.tcb.waits_for_port());
    assert!(s.mock.port(s.path.port).owed_writable, "nobody would wake the flow");
    s.mock.port(s.path.port).room = usize::MAX;
    s.port_writable();
    s.recv(&format!("P. {}:50001", sent + 1));
    s.send(". 1 ack 50001");
    assert_eq!(s.host().discarded, 50_000);
}

#[test]
fn a_guest_that_does_not_read_its_port_is_no_loss() {
    let mut s = Sim::open();
    s.host_writes(1000);
    s.recv("P. 1:1001");
    s.mock.port(s.path.port).room = 0;
    s.host_writes(1000);
    s.pass(600_000);
    s.live();
    s.silent();
    s.mock.port(s.path.port).room = usize::MAX;
    s.port_writable();
    s.take();
    s.live();
}

#[test]
fn data_carries_the_ack() {
    let mut s = Sim::open();
    s.seg("P. 1:101 ack 1");
    s.host_writes(200);
    s.recv("P. 1:201 ack 101");
    s.silent();
}

#[test]
fn an_empty_socket_is_not_asked_again() {
    let mut s = Sim::open();
    s.host_writes(10);
    let peeks = s.mock.peeks;
    s.send(". 1 ack 11");
    for i in 0..10 {
        s.send(&format!(". {}:{} ack 11", 1 + i * 10, 11 + i * 10));
    }
    assert_eq!(s.mock.peeks, peeks);
}

#[test]
fn the_end_is_seen_when_it_came_with_the_data() {
    let mut s = Sim::open();
    s.host().inbox.extend(crate::tcp_support::stream(0, 10));
    s.host().eof = true;
    s.ready(true, true);
    s.recv("P. 1:11");
    s.recv("F. 11");
}

#[test]
fn a_reset_from_the_outside_resets_the_guest() {
    let mut s = Sim::open();
    s.host().peek_error = Some(SockError::Reset);
    s.ready(true, true);
    s.recv("R. 1 ack 1");
    s.closed(Close::Reset);
}

#[test]
fn sequence_numbers_wrap() {
    // Both sides start just below 2^32; a megabyte each way passes the wrap.
    let mut s = Sim::open();
    for i in 0..20u32 {
        s.host_writes(50_000);
        let to = (i + 1) * 50_000 + 1;
        s.take();
        s.send(&format!(". {}:{} ack {}", i * 1000 + 1, i * 1000 + 1001, to));
        s.take();
    }
    assert_eq!(s.host().discarded, 1_000_000);
    s.host_has(20_000);
}

#[test]
fn acks_stay_inside_a_window_that_was_taken_back() {
    let mut s = Sim::open_with("S 0 mss 1000 ws 0", 5000);
    s.host_writes(5000);
    s.recv("P. 1:5001");
    s.send("P. 1:11 ack 1001 win 0");
    s.recv(". 1001 ack 11");
    s.send("P. 11:21 ack 1001 win 2000");
    s.recv(". 3001 ack 21");
    s.send("P. 21:31 ack 5001 win 2000");
    s.recv(". 5001 ack 31");
}

#[test]
fn a_smaller_mtu_behind_the_guest_makes_smaller_segments() {
    let mut s = Sim::open();
    s.host_writes(5000);
    s.recv("P. 1:5001 gso 1460");
    // Not of this flight: ignored.
    s.path_mtu(1280, 5001);
    s.path_mtu(1280, 0);
    // No smaller than what it is: ignored.
    s.path_mtu(1500, 1);
    s.silent();
    s.path_mtu(1280, 1461);
    s.recv("P. 1:5001 gso 1240");
    // Told of each segment of the flight: once is enough.
    s.path_mtu(1280, 2921);
    s.silent();
    s.send(". 1 ack 5001");
    // No lie makes a packet for every few bytes.
    s.host_writes(640);
    s.recv("P. 5001:5641");
    s.path_mtu(1, 5001);
    s.recv("P. 5001:5641 gso 64");
    s.send(". 1 ack 5641");
    s.live();
}

#[test]
fn an_urgent_byte_of_the_peer_is_urgent_for_the_guest() {
    let mut s = Sim::open();
    s.host().marks = vec![5, 20];
    s.host_writes(10);
    s.ready(true, true);
    assert_eq!(s.recv("P. 1:6 ack 1").tcp.urgent, 0);
    assert_eq!(s.recv("PU. 6:7 ack 1").tcp.urgent, 1);
    assert_eq!(s.recv("P. 7:11 ack 1").tcp.urgent, 0);
    s.send(". 1 ack 11");
    // Sent again it is an ordinary byte, and what comes behind it too.
    s.host_writes(30);
    s.ready(true, true);
    s.recv("P. 11:21 ack 1");
    s.recv("PU. 21:22 ack 1");
    s.recv("P. 22:41 ack 1");
    s.silent();
    s.send(". 1 ack 41");
    assert_eq!(s.host().discarded, 40);
}
