//! Loss: SACK blocks both ways (RFC 2018, 2883, 6675), RACK and tail loss probes (RFC 8985), rate reduction
//! (RFC 6937), timeouts (RFC 6298).

use crate::tcp_support::{Seen, Sim};

/// An open flow with SACK, without timestamps, and a round trip of 40 ms. Frames are single segments.
fn open() -> Sim {
    open_with("S 0 win 65535 mss 1000 ws 7 sackok")
}

fn open_with(syn: &str) -> Sim {
    let mut s = Sim::outbound(syn);
    s.path.gso_max = 0;
    s.connected(Ok(()));
    s.recv("S. 0 ack 1 sackok");
    s.pass(40);
    s.send(". 1 ack 1 win 65535");
    s.silent();
    s
}

/// Segments of 1000 bytes that were sent: the number of each.
fn segments(seen: &[Seen]) -> Vec<usize> {
    let first = |f: &Seen| f.tcp.seq.wrapping_sub(crate::tcp_support::OUR_ISN) as usize;
    seen.iter().filter(|f| !f.payload.is_empty()).map(|f| (first(f) - 1) / 1000).collect()
}

/// The guest acknowledges so many segments and reports those ranges of others.
fn ack(s: &mut Sim, una: u32, blocks: &[(u32, u32)]) -> Vec<usize> {
    let at = |n: u32| n * 1000 + 1;
    let blocks: Vec<String> = blocks.iter().map(|(l, r)| format!("{}:{}", at(*l), at(*r))).collect();
    let sack = if blocks.is_empty() { String::new() } else { format!(" sack {}", blocks.join(",")) };
    s.send(&format!(". 1 ack {}{sack}", at(una)));
    segments(&s.take())
}

fn write(s: &mut Sim, count: usize) -> Vec<usize> {
    s.host_writes(count * 1000);
    while s.tcb.wants_batch_end() {
        s.end();
    }
    segments(&s.take())
}

#[test]
fn sack_is_offered_where_the_guest_speaks_it() {
    let mut s = Sim::outbound("S 0 mss 1000 sackok");
    s.connected(Ok(()));
    assert!(s.recv("S. 0 ack 1").options.sack_permitted);
    let mut s = Sim::outbound("S 0 mss 1000");
    s.connected(Ok(()));
    assert!(!s.recv("S. 0 ack 1").options.sack_permitted);
    let mut s = Sim::inbound();
    s.start();
    assert!(s.recv("S 0").options.sack_permitted);
}

#[test]
fn only_the_holes_are_sent_again() {
    let mut s = open();
    assert_eq!(write(&mut s, 10).len(), 10);
    s.pass(40);
    // Segments 0, 3 and 4 are lost.
    assert_eq!(ack(&mut s, 0, &[(1, 2)]), []);
    assert_eq!(ack(&mut s, 0, &[(1, 3)]), []);
    assert_eq!(ack(&mut s, 0, &[(5, 6), (1, 3)]), [0]);
    assert_eq!(ack(&mut s, 0, &[(5, 7), (1, 3)]), [3]);
    assert_eq!(ack(&mut s, 0, &[(5, 8), (1, 3)]), [4]);
    assert_eq!(ack(&mut s, 0, &[(5, 9), (1, 3)]), []);
    assert_eq!(ack(&mut s, 0, &[(5, 10), (1, 3)]), []);
    s.pass(40);
    assert_eq!(ack(&mut s, 3, &[(5, 10)]), []);
    assert_eq!(ack(&mut s, 10, &[]), []);
    assert_eq!((s.counters.retransmits, s.host().discarded), (3, 10_000));
    // Until the idle guest is probed.
    s.pass(290_000);
    s.silent();
}

#[test]
fn new_data_goes_out_during_a_recovery_for_what_has_arrived() {
    let mut s = open();
    write(&mut s, 10);
    s.pass(40);
    assert_eq!(ack(&mut s, 0, &[(1, 4)]), [0]);
    s.host_writes(20_000);
    let before = segments(&s.take());
    let mut sent = before.len();
    for i in 5..=10 {
        sent += ack(&mut s, 0, &[(1, i)]).len();
    }
    // Seven tenths of the flight of ten, no burst and no pause (RFC 6937): the first hole was sent with three
    // that had arrived, then at most as many as arrive.
    assert!((3..=7).contains(&sent), "{sent}");
}

#[test]
fn two_segments_above_a_hole_are_waited_with_for_reordering() {
    let mut s = open();
    write(&mut s, 3);
    s.pass(40);
    assert_eq!(ack(&mut s, 0, &[(1, 3)]), []);
    // A quarter of the round trip (RFC 8985 6.2): 10 ms.
    s.pass(9);
    s.silent();
    s.pass(2);
    s.recv(". 1:1001");
    s.pass(40);
    assert_eq!(ack(&mut s, 3, &[]), []);
}

#[test]
fn reordering_is_no_loss_and_is_learned() {
    let mut s = open();
    write(&mut s, 10);
    s.pass(40);
    assert_eq!(ack(&mut s, 0, &[(1, 2)]), []);
    assert_eq!(ack(&mut s, 0, &[(1, 3)]), []);
    assert_eq!(ack(&mut s, 10, &[]), []);
    // From now on three segments above prove nothing before the window is over.
    write(&mut s, 10);
    s.pass(40);
    assert_eq!(ack(&mut s, 10, &[(11, 18)]), []);
    assert_eq!(ack(&mut s, 20, &[]), []);
    assert_eq!(s.counters.retransmits, 0);
    write(&mut s, 10);
    s.pass(40);
    assert_eq!(ack(&mut s, 20, &[(21, 28)]), []);
    s.pass(11);
    assert_eq!(segments(&s.take()).first(), Some(&20));
}

#[test]
fn a_lost_retransmission_is_sent_a_third_time_without_a_timeout() {
    let mut s = open();
    write(&mut s, 10);
    s.pass(40);
    assert_eq!(ack(&mut s, 0, &[(1, 5)])[0], 0);
    s.host_writes(20_000);
    s.take();
    for i in 6..=10 {
        ack(&mut s, 0, &[(1, i)]);
    }
    // What was sent after it arrives a round trip later, and the hole is still there.
    s.pass(42);
    assert_eq!(ack(&mut s, 0, &[(1, 12)])[0], 0);
    s.pass(40);
    assert!(ack(&mut s, 12, &[]).iter().all(|n| *n > 10));
    assert_eq!(s.counters.retransmits, 2);
}

#[test]
fn the_tail_of_a_flight_is_probed_after_two_round_trips() {
    let mut s = open();
    write(&mut s, 4);
    s.pass(40);
    // Segments 2 and 3 are lost; nothing would tell of it.
    assert_eq!(ack(&mut s, 2, &[]), []);
    s.pass(79);
    s.silent();
    s.pass(2);
    s.recv("P. 3001:4001");
    s.silent();
    s.pass(40);
    // The probe's SACK shows the hole, which is too old to be late.
    assert_eq!(ack(&mut s, 2, &[(3, 4)]), [2]);
    s.pass(40);
    assert_eq!(ack(&mut s, 4, &[]), []);
    // Until the idle guest is probed.
    s.pass(290_000);
    s.silent();
}

#[test]
fn a_tail_is_probed_once_then_times_out() {
    let mut s = open();
    write(&mut s, 3);
    s.pass(81);
    s.recv("P. 2001:3001");
    s.pass(201);
    s.recv(". 1:1001");
    s.silent();
    s.pass(40);
    assert_eq!(ack(&mut s, 1, &[]), [1, 2]);
    s.pass(40);
    assert_eq!(ack(&mut s, 3, &[]), []);
}

#[test]
fn a_probe_takes_new_data_where_there_is_some() {
    let mut s = open();
    s.host_writes(1_100_000);
    while s.tcb.wants_batch_end() {
        s.end();
    }
    // As much as is ever in flight, and more waits in the socket.
    assert_eq!(segments(&s.take()).last(), Some(&1047));
    s.pass(81);
    assert_eq!(segments(&s.take()), [1048]);
    s.pass(40);
    assert_eq!(ack(&mut s, 1049, &[]).first(), Some(&1049));
    assert_eq!(s.counters.retransmits, 0);
}

#[test]
fn a_full_port_is_not_probed() {
    let mut s = open();
    write(&mut s, 3);
    s.mock.port(s.path.port).room = 0;
    s.host_writes(1000);
    s.pass(600_000);
    s.silent();
    s.mock.port(s.path.port).room = usize::MAX;
    s.port_writable();
    assert_eq!(segments(&s.take()), [3]);
}

#[test]
fn a_probe_whose_original_arrived_too_changes_nothing() {
    let mut s = open();
    write(&mut s, 4);
    s.pass(81);
    s.recv("P. 3001:4001");
    assert_eq!(ack(&mut s, 4, &[]), []);
    // The second copy is reported as such (RFC 2883), and the window stays.
    s.send(". 1 ack 4001 sack 3001:4001");
    assert_eq!(write(&mut s, 900).len(), 900);
}

#[test]
fn after_a_timeout_what_was_reported_is_not_sent_again() {
    let mut s = open();
    write(&mut s, 6);
    s.pass(40);
    assert_eq!(ack(&mut s, 0, &[(2, 3)]), []);
    s.pass(10);
    assert_eq!(segments(&s.take()), [0], "one for the one that arrived");
    s.pass(200);
    // The timeout: from one segment on.
    assert_eq!(segments(&s.take()), [0]);
    s.pass(40);
    assert_eq!(ack(&mut s, 1, &[(2, 3)]), [1, 3]);
    s.pass(40);
    assert_eq!(ack(&mut s, 4, &[]), [4, 5]);
    s.pass(40);
    assert_eq!(ack(&mut s, 6, &[]), []);
}

#[test]
fn a_guest_that_throws_away_what_it_reported_gets_it_again() {
    let mut s = open();
    write(&mut s, 3);
    s.pass(40);
    ack(&mut s, 0, &[(1, 3)]);
    s.pass(20);
    s.take();
    // It acknowledges the first, and not what it had reported behind it.
    assert_eq!(ack(&mut s, 1, &[]), []);
    s.pass(400);
    assert!(segments(&s.take()).contains(&1));
    assert_eq!(ack(&mut s, 2, &[]), [2]);
    assert_eq!(ack(&mut s, 3, &[]), []);
}

#[test]
fn blocks_that_cannot_be_are_ignored() {
    let mut s = open();
    write(&mut s, 10);
    s.pass(40);
    for blocks in [&[(5, 4)][..], &[(4, 4)], &[(5, 11)], &[(0, 4)], &[(4_000_000, 4_000_001)]] {
        assert_eq!(ack(&mut s, 0, blocks), [], "{blocks:?}");
    }
    // Nothing is missing for all that.
    s.pass(30);
    s.silent();
    assert_eq!(ack(&mut s, 10, &[]), []);
    assert_eq!(s.counters.retransmits, 0);
}

#[test]
fn duplicate_acks_without_blocks_of_a_guest_with_sack_are_no_loss() {
    let mut s = open();
    write(&mut s, 10);
    for _ in 0..10 {
        assert_eq!(ack(&mut s, 0, &[]), []);
    }
}

#[test]
fn what_the_guest_sends_ahead_of_order_is_reported() {
    let mut s = open();
    s.send(". 1001:2001 ack 1");
    s.recv(". 1 ack 1 sack 1001:2001");
    s.send(". 3001:4001 ack 1");
    s.recv(". 1 ack 1 sack 3001:4001,1001:2001");
    s.send(". 4001:5001 ack 1");
    s.recv(". 1 ack 1 sack 3001:5001,1001:2001");
    s.send(". 7001:8001 ack 1");
    s.recv(". 1 ack 1 sack 7001:8001,3001:5001,1001:2001");
    s.send(". 2001:3001 ack 1");
    s.recv(". 1 ack 1 sack 1001:5001,7001:8001");
    s.send(". 1:1001 ack 1");
    s.recv(". 1 ack 5001 sack 7001:8001");
    s.send(". 5001:7001 ack 1");
    let last = s.recv(". 1 ack 8001");
    assert!(last.options.sack.is_empty());
    s.host_has(8000);
    assert_eq!(s.budget.used, 0);
}

#[test]
fn three_blocks_fit_beside_timestamps_and_the_latest_are_told() {
    let mut s = open_with("S 0 win 65535 mss 1000 ws 7 sackok ts 100 0");
    for i in 1..8 {
        s.send(&format!(". {}:{} ack 1 ts 101 0", i * 2000 + 1, i * 2000 + 1001));
    }
    let last = s.take().pop().unwrap();
    let at = |n: u32| crate::tcp_support::GUEST_ISN.wrapping_add(n);
    let blocks = [(at(14_001), at(15_001)), (at(12_001), at(13_001)), (at(10_001), at(11_001))];
    assert_eq!(last.options.sack.as_slice(), blocks);
}

#[test]
fn what_arrives_twice_is_reported_first() {
    let mut s = open();
    s.send(". 1:1001 ack 1");
    s.recv(". 1 ack 1001");
    s.send(". 1:1001 ack 1");
    s.recv(". 1 ack 1001 sack 1:1001");
    s.send(". 2001:3001 ack 1");
    s.recv(". 1 ack 1001 sack 2001:3001");
    s.send(". 2001:3001 ack 1");
    s.recv(". 1 ack 1001 sack 2001:3001,2001:3001");
    s.send(". 501:1501 ack 1");
    s.recv(". 1 ack 1501 sack 501:1001,2001:3001");
    s.send(". 1501:2001 ack 1");
    assert!(s.recv(". 1 ack 3001").options.sack.is_empty());
}

#[test]
fn without_sack_nothing_is_reported_and_nothing_believed() {
    let mut s = Sim::open();
    s.send(". 1001:2001 ack 1");
    assert!(s.recv(". 1 ack 1").options.sack.is_empty());
    s.path.gso_max = 0;
    s.host_writes(14_600);
    s.take();
    for _ in 0..5 {
        s.seg(". 1001:1002 ack 1 sack 5841:14601");
    }
    s.end();
    assert!(s.take().iter().all(|f| f.payload.is_empty()));
}

#[test]
fn memory_of_a_scoreboard_is_the_guests_and_is_given_back() {
    let mut s = open();
    write(&mut s, 400);
    for i in 0..100 {
        s.send(&format!(". 1 ack 1 sack {}:{}", (2 * i + 1) * 1000 + 1, (2 * i + 2) * 1000 + 1));
    }
    assert!((1000..50_000).contains(&s.budget.used), "{}", s.budget.used);
    s.send(". 1 ack 400001");
    assert_eq!(s.budget.used, 0);
    // A poor guest recovers too.
    let mut s = open();
    s.budget.limit = 0;
    write(&mut s, 400);
    for i in 0..100 {
        s.send(&format!(". 1 ack 1 sack {}:{}", (2 * i + 1) * 1000 + 1, (2 * i + 2) * 1000 + 1));
    }
    assert_eq!(s.budget.used, 0);
    assert!(segments(&s.take()).contains(&0));
    s.send(". 1 ack 400001");
    assert_eq!(s.host().discarded, 400_000);
}
