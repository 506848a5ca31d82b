//! Opening: both directions, refused, unreachable, repeated, both at once.

use crate::tcp_support::Sim;
use guestnet_core::effects::{Close, SockError};
use guestnet_core::tcp::{Fate, Tcb};

#[test]
fn syn_ack_only_when_the_host_connected() {
    let mut s = Sim::outbound("S 0 win 64240 mss 1460 ws 7");
    s.silent();
    s.pass(20_000);
    s.silent();
    s.connected(Ok(()));
    s.recv("S. 0 ack 1 win 65535 mss 1460 ws 5 nots");
    s.send(". 1 ack 1");
    s.silent();
    assert_eq!(s.tcb.state_name(), "established");
}

#[test]
fn a_repeated_syn_while_connecting_is_ignored() {
    let mut s = Sim::outbound("S 0 mss 1460");
    s.pass(1000);
    s.send("S 0 mss 1460");
    s.silent();
    s.connected(Ok(()));
    s.recv("S. 0 ack 1 nows");
}

#[test]
fn a_repeated_syn_afterwards_gets_the_syn_ack_again() {
    let mut s = Sim::outbound("S 0 mss 1460");
    s.connected(Ok(()));
    s.recv("S. 0 ack 1");
    s.send("S 0 mss 1460");
    s.recv("S. 0 ack 1");
    s.send(". 1 ack 1");
    s.silent();
}

#[test]
fn another_syn_while_connecting_replaces_the_first() {
    let mut s = Sim::outbound("S 0 mss 1460");
    s.send("S 5000 mss 1200 ws 2");
    s.connected(Ok(()));
    s.recv("S. 0 ack 5001 ws 5");
    s.send(". 5001 ack 1");
    assert_eq!(s.tcb.state_name(), "established");
}

#[test]
fn refused_is_a_reset() {
    let mut s = Sim::outbound("S 0");
    s.connected(Err(SockError::Refused));
    s.recv("R. 0 ack 1");
    s.silent();
    s.closed(Close::Reset);
}

#[test]
fn unreachable_is_told_with_the_sequence_number_of_the_syn() {
    for error in
        [SockError::HostUnreachable, SockError::NetUnreachable, SockError::TimedOut, SockError::Prohibited]
    {
        let mut s = Sim::outbound("S 0");
        s.connected(Err(error));
        s.silent();
        assert_eq!(s.fate, Fate::Unreachable { error, seq: crate::tcp_support::GUEST_ISN });
    }
}

#[test]
fn an_exhausted_host_resets() {
    let mut s = Sim::outbound("S 0");
    s.connected(Err(SockError::Exhausted));
    s.recv("R. 0 ack 1");
    s.closed(Close::Reset);
}

#[test]
fn a_connect_that_never_answers_ends_after_240_s() {
    let mut s = Sim::outbound("S 0");
    s.pass(239_000);
    s.live();
    s.pass(2_000);
    assert!(matches!(s.fate, Fate::Unreachable { error: SockError::TimedOut, .. }));
}

#[test]
fn a_guest_that_gives_up_while_connecting() {
    let mut s = Sim::outbound("S 0");
    s.send("R 5");
    s.live();
    s.send("R 1");
    s.silent();
    s.closed(Close::Reset);
}

#[test]
fn syn_with_data_is_taken_when_sent_again() {
    let mut s = Sim::outbound("S 0 mss 1460");
    s.send("S 0:100 mss 1460");
    s.connected(Ok(()));
    s.recv("S. 0 ack 1");
    s.send(". 1:101 ack 1");
    s.recv(". 1 ack 101");
    s.host_has(100);
}

#[test]
fn the_syn_ack_is_retransmitted_with_backoff_and_given_up() {
    let mut s = Sim::outbound("S 0");
    s.connected(Ok(()));
    s.recv("S. 0 ack 1");
    for wait in [1000, 2000, 4000, 8000, 16000, 32000] {
        s.pass(wait - 1);
        s.silent();
        s.pass(1);
        s.recv("S. 0 ack 1");
    }
    s.pass(64_000);
    s.recv("R. 1");
    s.closed(Close::Reset);
}

#[test]
fn data_rides_on_the_last_ack_of_the_handshake() {
    let mut s = Sim::outbound("S 0 mss 1460");
    s.connected(Ok(()));
    s.recv("S. 0 ack 1");
    s.send("P. 1:11 ack 1");
    s.recv(". 1 ack 11");
    s.host_has(10);
}

#[test]
fn a_wrong_ack_of_the_syn_ack_is_reset_and_changes_nothing() {
    let mut s = Sim::outbound("S 0 mss 1460");
    s.connected(Ok(()));
    s.recv("S. 0 ack 1");
    s.send(". 1 ack 77");
    s.recv("R 77");
    s.send(". 1 ack 1");
    assert_eq!(s.tcb.state_name(), "established");
}

#[test]
fn the_hosts_first_bytes_wait_for_the_guests_ack() {
    let mut s = Sim::outbound("S 0 mss 1460");
    s.connected(Ok(()));
    s.recv("S. 0 ack 1");
    s.host_writes(20);
    s.silent();
    s.send(". 1 ack 1");
    s.recv("P. 1:21 ack 1");
}

#[test]
fn a_client_gone_before_the_guest_answered_is_seen() {
    let mut s = Sim::outbound("S 0 mss 1460");
    s.connected(Ok(()));
    s.recv("S. 0 ack 1");
    s.host().peek_error = Some(SockError::Reset);
    s.ready(true, true);
    s.recv("R. 1 ack 1");
    s.closed(Close::Reset);
}

#[test]
fn inbound_opens() {
    let mut s = Sim::inbound();
    s.host().inbox.extend(crate::tcp_support::stream(0, 5));
    s.start();
    s.recv("S 0 win 65535 mss 1460 ws 5");
    s.send("S. 0 ack 1 mss 1400 ws 7");
    s.recv("P. 1:6 ack 1");
    s.send(". 1 ack 6");
    assert_eq!(s.host().discarded, 5);
    s.silent();
}

#[test]
fn inbound_acknowledges_at_once_when_there_is_nothing_to_send() {
    let mut s = Sim::inbound();
    s.start();
    s.recv("S 0");
    s.send("S. 0 ack 1 mss 1400");
    s.recv(". 1 ack 1");
    s.send("S. 0 ack 1 mss 1400");
    s.recv(". 1 ack 1");
}

#[test]
fn the_syn_of_an_inbound_connection_is_repeated_and_given_up() {
    let mut s = Sim::inbound();
    s.start();
    s.recv("S 0");
    s.pass(1000);
    s.recv("S 0");
    s.pass(2000);
    s.recv("S 0");
    s.pass(200_000);
    assert_eq!(s.take().len(), 4 + 1, "four more, and the reset");
    s.closed(Close::Reset);
}

#[test]
fn nothing_is_sent_to_a_guest_that_is_not_found_yet() {
    let mut s = Sim::inbound();
    let mac = std::mem::replace(&mut s.path.guest_mac, guestnet_wire::ether::Mac::BROADCAST);
    s.pass(5_000);
    s.silent();
    s.path.guest_mac = mac;
    s.start();
    s.recv("S 0");
    s.send("S. 0 ack 1 mss 1460");
    s.recv(". 1 ack 1");
    // One that is never found is given up.
    let mut s = Sim::inbound();
    s.path.guest_mac = guestnet_wire::ether::Mac::BROADCAST;
    s.pass(300_000);
    s.silent();
    s.closed(Close::Reset);
}

/// The socket of a client was lost after the flow began: it could not be watched, say.
#[test]
fn a_broken_socket_ends_an_inbound_flow_in_any_state() {
    let mut s = Sim::inbound();
    s.start();
    s.recv("S 0");
    s.connected(Err(SockError::Exhausted));
    s.recv("R 1");
    s.closed(Close::Reset);
    let mut s = Sim::open();
    s.connected(Ok(()));
    s.live();
    s.connected(Err(SockError::Exhausted));
    s.recv("R. 1 ack 1");
    s.closed(Close::Reset);
}

#[test]
fn inbound_refused_by_the_guest_is_a_reset_to_the_client() {
    let mut s = Sim::inbound();
    s.start();
    s.recv("S 0");
    s.send("R. 0 ack 1");
    s.silent();
    s.closed(Close::Reset);
}

#[test]
fn inbound_ignores_a_blind_reset_and_resets_a_wrong_ack() {
    let mut s = Sim::inbound();
    s.start();
    s.recv("S 0");
    s.send("R. 0 ack 9");
    s.send("R 0");
    s.silent();
    s.send("S. 0 ack 9");
    s.recv("R 9");
    s.live();
}

#[test]
fn both_open_at_once() {
    let mut s = Sim::inbound();
    s.start();
    s.recv("S 0");
    s.send("S 0 mss 1460 ws 7");
    s.recv("S. 0 ack 1");
    s.send("S. 0 ack 1 mss 1460 ws 7");
    assert_eq!(s.tcb.state_name(), "established");
    s.host_writes(3);
    s.recv("P. 1:4 ack 1");
}

#[test]
fn a_full_port_delays_the_syn_ack() {
    let mut s = Sim::outbound("S 0");
    s.mock.port(s.path.port).room = 0;
    s.connected(Ok(()));
    s.silent();
    assert!(s.tcb.waits_for_port());
    s.mock.port(s.path.port).room = usize::MAX;
    s.port_writable();
    s.recv("S. 0 ack 1");
}

#[test]
fn mss_is_the_guests_the_paths_or_the_default() {
    for (syn, mtu, size) in [
        ("S 0 mss 1000", 1500, 1000),
        ("S 0 mss 9000", 1500, 1460),
        ("S 0", 1500, 536),
        ("S 0 mss 0", 1500, 64),
        ("S 0 mss 1", 1500, 64),
        ("S 0 mss 1460", 68, 28),
        ("S 0 mss 1460 ts 5 0", 1500, 1448),
    ] {
        let mut s = Sim::outbound(syn);
        s.path.mtu = mtu;
        s.path.gso_max = 0;
        s.connected(Ok(()));
        s.recv("S. 0 ack 1");
        s.send(". 1 ack 1");
        s.host_writes(5000);
        let first = s.take().remove(0);
        assert_eq!(first.payload.len(), size, "{syn} {mtu}");
    }
}

#[test]
fn our_mss_is_what_the_path_carries() {
    let mut s = Sim::outbound("S 0 mss 1460");
    s.path.mtu = 9000;
    s.connected(Ok(()));
    s.recv("S. 0 ack 1 mss 8960");
    let mut s = Sim::outbound("S 0 mss 1460");
    s.path.guest = "[fd00::2]:40000".parse().unwrap();
    s.path.remote = "[2001:db8::1]:80".parse().unwrap();
    s.connected(Ok(()));
    s.recv("S. 0 ack 1 mss 1440");
    s.send(". 1 ack 1");
    s.host_writes(100);
    s.recv("P. 1:101 ack 1");
}

#[test]
fn timestamps_are_echoed_when_offered() {
    let mut s = Sim::outbound("S 0 mss 1460 ws 7 ts 100 0");
    s.connected(Ok(()));
    s.recv("S. 0 ack 1 ts 0 100");
    s.send(". 1 ack 1 ts 101 0");
    s.send("P. 1:11 ack 1 ts 102 0");
    s.recv(". 1 ack 11 ts 0 102");
    // An old one is a stray: answered, not taken (PAWS).
    s.send("P. 11:21 ack 1 ts 99 0");
    s.recv(". 1 ack 11 ts 0 102");
    s.host_has(10);
    s.send("P. 11:21 ack 1 ts 103 0");
    s.recv(". 1 ack 21 ts 0 103");
    s.host_has(20);
}

#[test]
fn the_record_is_small() {
    let size = std::mem::size_of::<Tcb>();
    assert!(size <= 256, "{size}");
}
