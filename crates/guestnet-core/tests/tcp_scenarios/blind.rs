//! Segments of an attacker that guesses, and nonsense (RFC 5961, RFC 9293 3.10.7.4).

use crate::tcp_support::Sim;
use guestnet_core::stats::DropReason;

#[test]
fn a_reset_in_the_window_is_challenged_beside_it_ignored() {
    let mut s = Sim::open();
    s.send("R 500");
    s.recv(". 1 ack 1");
    s.live();
    s.send("R 100000000");
    s.send("R 0");
    s.silent();
    s.live();
    assert_eq!(s.dropped(DropReason::OutOfWindow), 3);
    s.host_writes(5);
    s.recv("P. 1:6");
}

#[test]
fn a_syn_on_an_open_flow_is_challenged() {
    let mut s = Sim::open();
    s.send("S 1");
    s.recv(". 1 ack 1");
    s.send("S 70000");
    s.recv(". 1 ack 1");
    s.send("S. 1 ack 1");
    s.recv(". 1 ack 1");
    s.live();
}

#[test]
fn an_ack_of_the_future_or_the_far_past_is_challenged() {
    let mut s = Sim::open();
    s.send("P. 1:11 ack 5000");
    s.recv(". 1 ack 1");
    s.host_has(0);
    s.send("P. 1:11 ack 2000000000");
    s.recv(". 1 ack 1");
    s.host_has(0);
    s.live();
}

#[test]
fn challenges_are_limited() {
    let mut s = Sim::open();
    for _ in 0..1000 {
        s.send("R 500");
    }
    assert_eq!(s.take().len(), 10);
    assert_eq!(s.dropped(DropReason::RateLimit), 990);
    s.pass(1000);
    s.send("R 500");
    assert_eq!(s.take().len(), 1);
}

#[test]
fn without_ack_nothing_is_taken() {
    let mut s = Sim::open();
    s.send("- 1:11");
    s.send("P 1:11");
    s.send("F 1:11");
    s.silent();
    s.host_has(0);
    assert_eq!(s.dropped(DropReason::Malformed), 3);
}

#[test]
fn all_flags_at_once() {
    let mut s = Sim::open();
    s.send("SFP.U 1:11 ack 1");
    s.recv(". 1 ack 1");
    s.host_has(0);
    s.live();
}
