//! Guests that would make the relay work, wait or remember more than they do themselves.

use crate::tcp_support::Sim;

#[test]
fn an_mss_of_one_byte_is_not_believed() {
    let mut s = Sim::open_with("S 0 win 65535 mss 1 ws 7", 65535);
    s.host_writes(30_000);
    // One frame for all, cut where the guest pays for it.
    s.recv(". 1:30001 ack 1 gso 64");
    s.silent();
    s.path.gso_max = 0;
    s.send(". 1 ack 30001");
    s.host_writes(640);
    for i in 0..10u32 {
        let from = 30_001 + 64 * i;
        s.recv(&format!(". {from}:{} ack 1", from + 64));
    }
    s.silent();
}

#[test]
fn a_window_opened_byte_by_byte_costs_a_frame_for_a_frame() {
    let mut s = Sim::outbound("S 0 win 65535 mss 1460");
    s.connected(Ok(()));
    s.recv("S. 0 ack 1");
    s.send(". 1 ack 1 win 1");
    s.host_writes(50_000);
    s.recv(". 1:2 ack 1");
    let peeks = s.mock.peeks;
    for i in 0..1000u32 {
        s.send(&format!(". 1 ack {} win 1", 2 + i));
        s.recv(&format!(". {}:{} ack 1", 2 + i, 3 + i));
        s.silent();
    }
    assert_eq!(s.mock.peeks - peeks, 1000);
    assert_eq!((s.budget.used, s.host().discarded), (0, 1000));
}

#[test]
fn a_guest_that_reads_nothing_is_told_nothing_more() {
    let mut s = Sim::outbound("S 0 win 65535 mss 1460");
    s.connected(Ok(()));
    s.recv("S. 0 ack 1");
    s.send(". 1 ack 1 win 2000");
    s.host_writes(10_000);
    s.recv(". 1:1461 ack 1");
    s.send(". 1 ack 1461 win 0");
    for _ in 0..500 {
        s.host_writes(10);
    }
    s.silent();
    assert_eq!((s.budget.used, s.host().inbox.len()), (0, 13_540));
    // An hour of probes, ever rarer, as long as it answers them.
    let mut probes = 0;
    for _ in 0..3600 {
        s.pass(1000);
        for seen in s.take() {
            assert!(seen.payload.is_empty());
            probes += 1;
            s.send(". 1 ack 1461 win 0");
        }
    }
    s.live();
    assert!((20..=40).contains(&probes), "{probes} probes");
}

#[test]
fn a_drip_of_single_bytes_is_acknowledged_no_oftener_than_it_comes() {
    let mut s = Sim::open_patient(10);
    for i in 0..500u32 {
        s.send(&format!("P. {}:{} ack 1", 1 + i, 2 + i));
        s.pass(1);
    }
    let acks = s.take().len();
    assert!(acks <= 500, "{acks} frames");
    s.host_has(500);
    assert_eq!(s.budget.used, 0);
}

#[test]
fn an_ack_in_doubt_is_sent_when_the_flow_has_nothing_else_to_do() {
    let mut s = Sim::open_patient(10);
    s.send("P. 1:2 ack 1");
    s.silent();
    assert_eq!(s.tcb.deadline(), Some(s.now.plus_ms(10)), "nothing else would wake it");
    s.pass(10);
    s.recv(". 1 ack 2");
    assert!(s.tcb.deadline() > Some(s.now.plus_ms(1_000)), "nothing else is due soon");
}
