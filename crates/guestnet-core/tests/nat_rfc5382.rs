//! Theory of operation: RFC 5382 (TCP), requirement by requirement, on the packet engine with a simulated outside.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod nat_common;
use guestnet_core::nat::Behaviour::{AddressAndPortDependent, AddressDependent, EndpointIndependent};
use guestnet_core::nat::ConnState;
use guestnet_core::stats::DropReason;
use guestnet_wire::tcp::flags::{ACK, FIN, PSH, RST, SYN, URG};
use nat_common::*;

const G: &str = "192.168.64.2:50000";
const X: &str = "198.51.100.1:80";

/// A lab with one established connection, and its external end.
fn established(lab: &mut Lab) -> String {
    let ext = lab.map(&tcp(G, X, SYN)).to_string();
    lab.take(&tcp(X, &ext, SYN | ACK));
    assert_eq!(lab.out(&tcp(G, X, ACK)), Translated);
    ext
}

fn state(lab: &Lab) -> ConnState {
    lab.nat.connections().next().expect("a connection").state
}

#[test]
fn rfc5382_req1_endpoint_independent_mapping() {
    let mut lab = Lab::default();
    let first = lab.map(&tcp(G, "198.51.100.1:1", SYN));
    assert_eq!(lab.map(&tcp(G, "198.51.100.1:2", SYN)), first);
    assert_eq!(lab.map(&tcp(G, "198.51.100.2:1", SYN)), first);
}

#[test]
fn rfc5382_req2_all_valid_sequences() {
    let mut lab = Lab::default();
    let ext = established(&mut lab);
    // Urgent data, a zero window, data with every flag that TCP knows.
    for flags in [ACK | URG, ACK | PSH, ACK | 0x40, ACK | 0x80, ACK | PSH | URG] {
        assert_eq!(lab.out(&tcp(G, X, flags)), Translated);
        lab.take(&tcp(X, &ext, flags));
    }
    // A SYN with data (TCP Fast Open).
    let syn_data = tcp_packet(at("192.168.64.2:50001"), at(X), SYN, b"early").bytes();
    let (r, p) = lab.send(&syn_data, Outbound);
    assert_eq!((r, &p[40..]), (Translated, &b"early"[..]));
}

#[test]
fn rfc5382_req2_half_close_then_five_minutes_of_data() {
    let mut lab = Lab::default();
    let ext = established(&mut lab);
    assert_eq!(lab.out(&tcp(G, X, FIN | ACK)), Translated);
    for _ in 0..30 {
        lab.wait(10);
        lab.take(&tcp(X, &ext, ACK | PSH));
        assert_eq!(lab.out(&tcp(G, X, ACK)), Translated);
    }
    lab.wait(3600);
    lab.take(&tcp(X, &ext, ACK));
    lab.take(&tcp(X, &ext, FIN | ACK));
    assert_eq!(state(&lab), ConnState::Closing);
    assert_eq!(lab.out(&tcp(G, X, ACK)), Translated);
}

#[test]
fn rfc5382_req2a_simultaneous_open() {
    let mut lab = Lab::new(|c| c.filtering_tcp = AddressAndPortDependent);
    let ext = lab.map(&tcp(G, X, SYN)).to_string();
    lab.take(&tcp(X, &ext, SYN));
    assert_eq!(state(&lab), ConnState::Established);
    assert_eq!(lab.out(&tcp(G, X, SYN | ACK)), Translated);
    lab.take(&tcp(X, &ext, SYN | ACK));
    lab.wait(7000);
    lab.take(&tcp(X, &ext, ACK));
}

#[test]
fn rfc5382_req3_filtering() {
    for (b, other_port, other_host) in [
        (EndpointIndependent, true, true),
        (AddressDependent, true, false),
        (AddressAndPortDependent, false, false),
    ] {
        let mut lab = Lab::new(|c| c.filtering_tcp = b);
        let ext = established(&mut lab);
        assert_eq!(lab.inn(&tcp("198.51.100.1:81", &ext, SYN)) == Translated, other_port, "{b:?}");
        assert_eq!(lab.inn(&tcp("198.51.100.2:80", &ext, SYN)) == Translated, other_host, "{b:?}");
        // Nothing but a SYN opens.
        assert_eq!(lab.inn(&tcp("198.51.100.1:82", &ext, ACK)), Dropped(DropReason::NoFlow));
        assert_eq!(lab.inn(&tcp("198.51.100.1:82", &ext, SYN | ACK)), Dropped(DropReason::NoFlow));
    }
}

#[test]
fn rfc5382_req4_unsolicited_syn_waits_for_ours() {
    let mut lab = Lab::new(|c| c.filtering_tcp = AddressAndPortDependent);
    let ext = lab.map(&tcp(G, "198.51.100.9:9", SYN)).to_string();
    assert_eq!(lab.inn(&tcp(X, &ext, SYN)), Dropped(DropReason::Filtered));
    lab.wait(3);
    assert_eq!(lab.output(), [], "silent at first");
    // The guest opens the same connection: the SYN was no stranger's.
    assert_eq!(lab.out(&tcp(G, X, SYN)), Translated);
    lab.wait(10);
    assert_eq!(lab.output(), []);
    lab.take(&tcp(X, &ext, SYN));
    assert_eq!(lab.nat.connections().filter(|c| c.state == ConnState::Established).count(), 1);
}

#[test]
fn rfc5382_req4_unsolicited_syn_is_refused_after_six_seconds() {
    let mut lab = Lab::default();
    let syn = tcp(X, "203.0.113.1:50000", SYN);
    assert_eq!(lab.inn(&syn), Dropped(DropReason::NoFlow));
    lab.wait(5);
    assert_eq!(lab.output(), []);
    lab.wait(2);
    let (d, p, t, c) = lab.the_error();
    assert_eq!((d, t, c), (Outbound, 3, 3));
    assert_eq!((*src(&p).ip(), *dst(&p).ip()), (ip(EXT), ip(X1)));
    assert_eq!(p[28..], syn[..]);
    // By policy: nothing at all.
    let mut lab = Lab::new(|c| c.answer_unsolicited_syn = false);
    lab.inn(&syn);
    lab.wait(10);
    assert_eq!(lab.output(), []);
}

#[test]
fn rfc5382_req4_more_than_128_unsolicited_syns_are_dropped_in_silence() {
    let mut lab = Lab::new(|c| c.icmp_errors_per_second = 1000);
    for port in 0..200 {
        lab.inn(&tcp(&format!("198.51.100.1:{}", 1000 + port), "203.0.113.1:50000", SYN));
    }
    lab.wait(7);
    let told: Vec<u16> = lab.output().iter().map(|(_, p)| src(&p[28..]).port()).collect();
    assert_eq!(told, (1000..1128).collect::<Vec<u16>>());
}

#[test]
fn rfc5382_req5_established_lives_over_two_hours() {
    let mut lab = Lab::default();
    let ext = established(&mut lab);
    lab.wait(7439);
    lab.take(&tcp(X, &ext, ACK));
    lab.wait(7439);
    assert_eq!(lab.out(&tcp(G, X, ACK)), Translated);
    assert_eq!(state(&lab), ConnState::Established);
    lab.wait(7442);
    assert_eq!(lab.nat.connection_count(), 0);
}

#[test]
fn rfc5382_req5_transitory_lives_four_minutes() {
    let mut lab = Lab::default();
    let ext = lab.map(&tcp(G, X, SYN)).to_string();
    lab.wait(239);
    lab.take(&tcp(X, &ext, SYN | ACK));
    // Closed from both sides: the last segments still find their way.
    assert_eq!(lab.out(&tcp(G, X, FIN | ACK)), Translated);
    lab.take(&tcp(X, &ext, FIN | ACK));
    lab.wait(239);
    assert_eq!(lab.out(&tcp(G, X, ACK)), Translated);
    lab.wait(2);
    assert_eq!(lab.nat.connection_count(), 0);
}

#[test]
fn rfc5382_req6_no_alg_for_ftp() {
    let mut lab = Lab::default();
    let to = "198.51.100.1:21";
    lab.map(&tcp(G, to, SYN));
    let data = b"PORT 192,168,64,2,195,80\r\n";
    let (r, p) = lab.send(&tcp_packet(at(G), at(to), ACK, data).bytes(), Outbound);
    assert_eq!((r, &p[40..]), (Translated, &data[..]));
}

#[test]
fn rfc5382_req7_no_port_overloading() {
    let mut lab = Lab::default();
    let a = lab.map(&tcp("192.168.64.2:50000", X, SYN));
    let b = lab.map(&tcp("192.168.64.3:50000", X, SYN));
    assert_ne!(a, b);
}

#[test]
fn rfc5382_req8_hairpin() {
    let mut lab = Lab::new(|c| c.filtering_tcp = EndpointIndependent);
    let b = "192.168.64.3:50001";
    let b_ext = lab.map(&tcp(b, X, SYN)).to_string();
    let (r, syn) = lab.send(&tcp(G, &b_ext, SYN), Outbound);
    assert_eq!((r, *src(&syn).ip(), dst(&syn)), (Hairpinned, ip(EXT), at(b)));
    let a_ext = src(&syn).to_string();
    let (r, p) = lab.send(&tcp(b, &a_ext, SYN | ACK), Outbound);
    assert_eq!((r, src(&p), dst(&p)), (Hairpinned, at(&b_ext), at(G)));
    assert_eq!(lab.out(&tcp(G, &b_ext, ACK)), Hairpinned);
    let both: Vec<_> = lab.nat.connections().filter(|c| c.remote.ip() == &ip(EXT)).map(|c| c.state).collect();
    assert_eq!(both, [ConnState::Established; 2]);
    lab.wait(7000);
    assert_eq!(lab.out(&tcp(b, &a_ext, ACK)), Hairpinned);
}

#[test]
fn rfc5382_req9_icmp_unreachable_is_translated() {
    let mut lab = Lab::default();
    let (_, sent) = lab.send(&tcp(G, X, SYN), Outbound);
    for (code, rest) in [(0, [0; 4]), (1, [0; 4]), (4, [0, 0, 5, 0])] {
        let p = lab.take(&error("192.0.2.9", EXT, 3, code, rest, &sent));
        assert_eq!((p[20], p[21], &p[24..28]), (3, code, &rest[..]));
        assert_eq!((*dst(&p).ip(), src(&p[28..])), (ip(A), at(G)), "inner headers restored");
        // Eight bytes of TCP are quoted by old hosts; that must do.
        let p = lab.take(&error("192.0.2.9", EXT, 3, code, rest, &sent[..28]));
        assert_eq!(src(&p[28..]), at(G));
    }
}

#[test]
fn rfc5382_req10_icmp_does_not_end_the_connection() {
    let mut lab = Lab::default();
    let ext = established(&mut lab);
    let (_, sent) = lab.send(&tcp(G, X, ACK), Outbound);
    for code in 0..16 {
        lab.take(&error("192.0.2.9", EXT, 3, code, [0; 4], &sent));
    }
    assert_eq!(state(&lab), ConnState::Established);
    lab.take(&tcp(X, &ext, ACK));
}

#[test]
fn rfc5382_reset_ends_nothing_that_lives() {
    let mut lab = Lab::default();
    let ext = established(&mut lab);
    assert_eq!(lab.inn(&tcp(X, &ext, RST)), Translated);
    assert_eq!(lab.out(&tcp(G, X, ACK)), Translated);
    assert_eq!(state(&lab), ConnState::Established);
}
