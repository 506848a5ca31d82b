//! Theory of operation: time in the packet engine. It may be counted from anywhere, start anywhere and leap; the timer
//! that the engine names and the work that it does at that time agree, so a loop over the two ends.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod nat_common;
use guestnet_core::nat::Behaviour::EndpointIndependent;
use guestnet_core::types::Time;
use guestnet_wire::tcp::flags::{ACK, SYN};
use nat_common::*;

const G: &str = "192.168.64.2:50000";
const X: &str = "198.51.100.1:80";
const SECOND: u64 = 1_000_000_000;
const YEAR: u64 = 365 * 24 * 3600 * SECOND;

/// Does expiry work as long as the engine says that there is some at the time of the lab.
fn expire_all(lab: &mut Lab) -> usize {
    let mut gone = lab.nat.expire(Time(lab.ns), 16);
    for _ in 0..10_000 {
        match lab.nat.next_timer() {
            Some(t) if t.0 <= lab.ns => gone += lab.nat.expire(Time(lab.ns), 16),
            _ => return gone,
        }
    }
    panic!("no progress at {}: the next timer is {:?}", lab.ns, lab.nat.next_timer());
}

/// Times at which 32-bit ticks of 67 ms since 1970 wrap, and others that programs use.
fn starts() -> impl Iterator<Item = u64> {
    let wraps = (1..8).map(|n| (n << 58) - 150 * SECOND);
    [0, 1, 5 * SECOND, 1_796_084_126 * SECOND, 4_000_000_000 * SECOND, u64::MAX / 2].into_iter().chain(wraps)
}

#[test]
fn sessions_end_on_time_wherever_time_starts() {
    for start in starts() {
        let mut lab = Lab::new(|c| c.inbound_refresh = false);
        lab.ns = start;
        let ext = lab.map(&udp(G, X)).to_string();
        let timer = lab.nat.next_timer().unwrap().0;
        assert!((start..=start + 301 * SECOND).contains(&timer), "{timer} from {start}");
        lab.sleep(299);
        assert_eq!(expire_all(&mut lab), 0, "from {start}");
        lab.take(&udp(X, &ext));
        lab.sleep(2);
        assert_ne!(lab.inn(&udp(X, &ext)), Translated, "from {start}");
        expire_all(&mut lab);
        assert_eq!((lab.nat.connection_count(), lab.nat.next_timer()), (0, None), "from {start}");
    }
}

#[test]
fn the_first_call_sets_the_start_of_time() {
    // Something without a time comes first; nothing is assumed about the clock.
    let mut lab = Lab::default();
    lab.nat.add_forward(6, at("203.0.113.1:80"), at("192.168.64.2:80")).unwrap();
    assert_eq!(lab.nat.next_timer(), None);
    lab.ns = 5;
    lab.map(&udp(G, X));
    lab.sleep(301);
    assert_eq!(expire_all(&mut lab), 1);
    // An earlier time counts as the latest.
    let late = lab.ns;
    lab.map(&udp(G, X));
    lab.ns = 0;
    lab.map(&udp(G, X));
    assert!(lab.nat.next_timer().unwrap().0 > late);
}

#[test]
fn a_connection_lives_across_every_four_years() {
    let mut lab = Lab { ns: 3 * SECOND, ..Lab::default() };
    let ext = lab.map(&tcp(G, X, SYN)).to_string();
    lab.take(&tcp(X, &ext, SYN | ACK));
    // Every hour for 40 years: the ticks of the engine begin anew nine times.
    for _ in 0..40 * 365 * 24 {
        lab.sleep(3600);
        assert_eq!(lab.out(&tcp(G, X, ACK)), Translated);
        lab.take(&tcp(X, &ext, ACK));
    }
    assert_eq!(lab.nat.connection_count(), 1);
    lab.sleep(7439);
    expire_all(&mut lab);
    assert_eq!(lab.nat.connection_count(), 1);
    lab.sleep(2);
    assert_eq!(expire_all(&mut lab), 1);
}

#[test]
fn a_leap_of_years_ends_what_was_over_and_nothing_that_begins_after_it() {
    for leap in [1, 4, 5, 9, 10, 19, 54, 250] {
        let mut lab = Lab::new(|c| {
            c.filtering_udp = EndpointIndependent;
            c.ports = (60_000, 60_009);
        });
        lab.ns = 7;
        for port in 0..5 {
            lab.map(&udp(&format!("192.168.64.2:{}", 60_000 + port), X));
        }
        lab.sleep(301);
        assert_eq!(expire_all(&mut lab), 5);
        assert_eq!(lab.nat.conntrack_stats().ports, 5, "they rest");
        for port in 5..10 {
            lab.map(&udp(&format!("192.168.64.2:{}", 60_000 + port), X));
        }
        lab.ns += leap * YEAR;
        lab.map(&udp("192.168.64.3:60000", X));
        lab.sleep(200);
        expire_all(&mut lab);
        assert_eq!(lab.nat.connection_count(), 1, "after {leap} years");
        lab.sleep(400);
        expire_all(&mut lab);
        lab.sleep(121);
        expire_all(&mut lab);
        let held = lab.nat.conntrack_stats();
        assert_eq!((held.connections, held.mappings, held.ports), (0, 0, 0), "after {leap} years");
        assert_eq!(lab.nat.next_timer(), None);
    }
}

#[test]
fn a_session_that_is_alive_when_ticks_begin_anew_keeps_its_deadline() {
    // 2^31 ticks of 2^26 ns.
    let edge = 1u64 << 57;
    for before in [1, 100, 299] {
        let mut lab = Lab::new(|c| c.inbound_refresh = false);
        lab.map(&udp("192.168.64.9:1", X));
        lab.ns = edge - before * SECOND;
        let ext = lab.map(&udp(G, X)).to_string();
        lab.sleep(299);
        lab.take(&udp(X, &ext));
        expire_all(&mut lab);
        lab.take(&udp(X, &ext));
        lab.sleep(2);
        assert_ne!(lab.inn(&udp(X, &ext)), Translated, "{before} s before");
        expire_all(&mut lab);
        assert_eq!(lab.nat.connection_count(), 0);
    }
}

#[test]
fn times_at_the_end_of_the_range_do_not_overflow() {
    let mut lab = Lab { ns: u64::MAX - SECOND, ..Lab::default() };
    let ext = lab.map(&udp(G, X)).to_string();
    lab.inn(&tcp(X, "203.0.113.1:50001", SYN));
    let parts = udp_packet(at(G), at(X), &[1; 2000]).fragments(1000);
    assert_eq!((lab.out(&parts[1]), lab.out(&parts[0])), (Held, Translated));
    assert_eq!(expire_all(&mut lab), 0);
    lab.ns = u64::MAX;
    lab.take(&udp(X, &ext));
    assert_eq!(expire_all(&mut lab), 0);
    assert_eq!((lab.nat.connection_count(), lab.nat.next_timer()), (1, None));
}
