//! Theory of operation: RFC 5508 (ICMP), requirement by requirement, on the packet engine with a simulated outside.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod nat_common;
use guestnet_core::nat::Behaviour::EndpointIndependent;
use guestnet_core::nat::{Prefix, Refusal};
use guestnet_core::stats::DropReason;
use guestnet_wire::tcp::flags::SYN;
use guestnet_wire::{checksum, ipv4, put};
use nat_common::*;

const G: &str = "192.168.64.2:50000";
const X: &str = "198.51.100.1:80";

#[test]
fn rfc5508_req1_queries_of_two_guests_with_one_id() {
    let mut lab = Lab::default();
    for host in [X1, X2] {
        let a = lab.map(&echo(A, host, 8, 7));
        let b = lab.map(&echo(B, host, 8, 7));
        assert_ne!(a.port(), b.port());
        for (ext, guest) in [(a, A), (b, B)] {
            let p = lab.take(&echo(host, EXT, 0, ext.port()));
            assert_eq!(dst(&p), at(&format!("{guest}:7")));
        }
    }
}

#[test]
fn rfc5508_req1a_identifier_mapping_is_endpoint_independent() {
    let mut lab = Lab::default();
    let first = lab.map(&echo(A, X1, 8, 7));
    assert_eq!(lab.map(&echo(A, X2, 8, 7)), first);
    assert_eq!(lab.map(&echo(A, X2, 13, 7)), first, "timestamps are queries too");
}

#[test]
fn rfc5508_req2_query_lives_60_seconds() {
    for (wait, lives) in [(59, true), (61, false)] {
        let mut lab = Lab::default();
        let ext = lab.map(&echo(A, X1, 8, 7));
        lab.wait(wait);
        assert_eq!(lab.inn(&echo(X1, EXT, 0, ext.port())) == Translated, lives);
    }
}

#[test]
fn rfc5508_req3_bad_outer_checksum_is_dropped() {
    let mut lab = Lab::default();
    let (_, sent) = lab.send(&udp(G, X), Outbound);
    let mut e = error(X1, EXT, 3, 3, [0; 4], &sent);
    e[22] ^= 1;
    assert_eq!(lab.inn(&e), Dropped(DropReason::BadL4Checksum));
}

#[test]
fn rfc5508_req3a_bad_inner_ip_checksum_is_dropped() {
    let mut lab = Lab::default();
    let (_, mut sent) = lab.send(&udp(G, X), Outbound);
    sent[10] ^= 1;
    assert_eq!(lab.inn(&error(X1, EXT, 3, 3, [0; 4], &sent)), Dropped(DropReason::BadIpChecksum));
}

#[test]
fn rfc5508_req3b_inner_options_are_understood() {
    let mut lab = Lab::default();
    let plain = udp_packet(at(G), at(X), b"data").options(&[0x94, 4, 0, 0]).bytes();
    let (r, sent) = lab.send(&plain, Outbound);
    assert_eq!(r, Translated);
    let p = lab.take(&error(X1, EXT, 3, 3, [0; 4], &sent));
    assert_eq!(src(&p[28..]), at(G));
    assert_eq!(p[28 + 20..28 + 24], [0x94, 4, 0, 0]);
}

#[test]
fn rfc5508_req3c_inner_transport_checksum_is_not_verified() {
    let mut lab = Lab::default();
    let (_, mut sent) = lab.send(&tcp(G, X, SYN), Outbound);
    sent[36] ^= 0x55;
    let p = lab.take(&error(X1, EXT, 3, 1, [0; 4], &sent));
    assert_eq!(src(&p[28..]), at(G));
}

#[test]
fn rfc5508_req3d_extensions_are_left_alone() {
    let mut lab = Lab::default();
    let (_, sent) = lab.send(&udp(G, X), Outbound);
    // RFC 4884: the quote padded to 128 bytes, then an extension structure.
    let mut quote = sent;
    quote.resize(128, 0);
    quote.extend_from_slice(&[0x20, 0, 0, 0, 0, 8, 1, 1, 0xde, 0xad, 0xbe, 0xef]);
    let p = lab.take(&error(X1, EXT, 11, 0, [0, 32, 0, 0], &quote));
    assert_eq!(p[p.len() - 12..], quote[128..]);
    assert_eq!(src(&p[28..]), at(G));
}

#[test]
fn rfc5508_req4_error_from_outside_is_reverted() {
    let mut lab = Lab::new(|c| c.decrement_ttl = false);
    for original in
        [udp(G, X), tcp(G, X, SYN), echo(A, X1, 8, 9), udp_packet(at(G), at(X), &[3; 900]).bytes()]
    {
        let (_, sent) = lab.send(&original, Outbound);
        let kinds = (0..16).map(|c| (3, c)).chain([(11, 0), (11, 1), (12, 0)]);
        for (kind, code) in kinds {
            let p = lab.take(&error("192.0.2.77", EXT, kind, code, [1, 2, 3, 4], &sent));
            assert_eq!((p[20], p[21], &p[24..28]), (kind, code, &[1, 2, 3, 4][..]));
            assert_eq!((*src(&p).ip(), *dst(&p).ip()), (ip("192.0.2.77"), ip(A)));
            assert_eq!(p[28..], original[..], "the quote is what the guest sent");
        }
    }
    let (_, sent) = Lab::default().send(&udp("192.168.64.9:51000", X), Outbound);
    assert_eq!(lab.inn(&error(X1, EXT, 3, 3, [0; 4], &sent)), Dropped(DropReason::NoFlow), "no mapping");
}

#[test]
fn rfc5508_req5_error_from_inside_is_reverted() {
    let mut lab = Lab::default();
    let ext = lab.map(&udp(G, X)).to_string();
    let from_outside = udp(X, &ext);
    let seen = lab.take(&from_outside);
    let (r, p) = lab.send(&error(A, X1, 3, 3, [0; 4], &seen), Outbound);
    assert_eq!(r, Translated);
    assert_eq!((*src(&p).ip(), *dst(&p).ip()), (ip(EXT), ip(X1)));
    assert_eq!((src(&p[28..]), dst(&p[28..])), (at(X), at(&ext)));
    // But for the TTL that was taken on the way it is what the outside sent.
    let mut quote = p[28..].to_vec();
    quote[8] += 1;
    ipv4::fill_checksum(&mut quote);
    assert_eq!(quote, from_outside);
}

/// One guest does not speak for another: REQ-5 lets a router inside do so, but no guest is one.
#[test]
fn rfc5508_req5_error_about_another_guests_packet_is_dropped() {
    let mut lab = Lab::new(|c| c.filtering_udp = EndpointIndependent);
    for (guest, remote) in [(udp(G, X), udp(X, G)), (tcp(G, X, SYN), tcp(X, G, SYN))] {
        lab.map(&guest);
        for (kind, code) in [(3, 1), (3, 3), (3, 4), (11, 0), (12, 0)] {
            let forged = error(B, X1, kind, code, [0, 0, 4, 0], &remote);
            assert_eq!(lab.out(&forged), Dropped(DropReason::SpoofedSource), "{kind}/{code}");
            assert_eq!(lab.out(&error(A, X1, kind, code, [0, 0, 4, 0], &remote)), Translated);
        }
    }
    // Nor to a third guest by way of the external address.
    let ext = lab.map(&udp(G, X)).to_string();
    let (_, seen) = lab.send(&udp("192.168.64.4:1", &ext), Outbound);
    assert_eq!(lab.out(&error(B, EXT, 3, 3, [0; 4], &seen)), Dropped(DropReason::SpoofedSource));
}

/// No link has an MTU under 68 (RFC 791), so nobody is told of one; 0 is what routers of old say.
#[test]
fn rfc5508_req4_an_mtu_that_no_link_has_is_not_passed_on() {
    let mut lab = Lab::default();
    let original = udp_packet(at(G), at(X), &[3; 900]).bytes();
    let (_, sent) = lab.send(&original, Outbound);
    let from_guest = udp_packet(at(X), at(G), &[3; 900]).bytes();
    for (mtu, believed) in [(0, true), (1, false), (20, false), (67, false), (68, true), (552, true)] {
        let [a, b] = u16::to_be_bytes(mtu);
        let want = if believed { Translated } else { Dropped(DropReason::Malformed) };
        assert_eq!(lab.inn(&error(X2, EXT, 3, 4, [0, 0, a, b], &sent)), want, "MTU {mtu}");
        assert_eq!(lab.out(&error(A, X1, 3, 4, [0, 0, a, b], &from_guest)), want, "MTU {mtu}");
    }
    // In other errors these bytes mean something else.
    assert_eq!(lab.inn(&error(X2, EXT, 3, 3, [0, 0, 0, 20], &sent)), Translated);
}

#[test]
fn rfc5508_req6_errors_refresh_nothing() {
    let mut lab = Lab::new(|c| c.inbound_refresh = false);
    let (_, sent) = lab.send(&udp(G, X), Outbound);
    let ext = src(&sent).to_string();
    for _ in 0..29 {
        lab.wait(10);
        lab.take(&error(X1, EXT, 3, 3, [0; 4], &sent));
        let seen = udp(X, G);
        assert_eq!(lab.out(&error(A, X1, 3, 3, [0; 4], &seen)), Translated);
    }
    lab.wait(12);
    assert_eq!(lab.nat.connection_count(), 0);
    assert_eq!(lab.inn(&udp(X, &ext)), Dropped(DropReason::NoFlow));
}

/// A query goes to the guest whose identifier it names, and the answer to whoever asked, among several.
#[test]
fn rfc5508_req7_hairpinned_query() {
    let mut lab = Lab::new(|c| c.filtering_udp = EndpointIndependent);
    let b_ext = lab.map(&echo(B, X1, 8, 77));
    for asking in [A, "192.168.64.4", "192.168.64.5"] {
        for kind in [8, 13] {
            // The identifier that B's mapping has outside: the one who asks gets another for itself.
            let (r, p) = lab.send(&echo(asking, EXT, kind, b_ext.port()), Outbound);
            assert_eq!(r, Hairpinned);
            assert_eq!((*src(&p).ip(), *dst(&p).ip(), p[20]), (ip(EXT), ip(B), kind));
            let answer = echo(B, EXT, if kind == 8 { 0 } else { 14 }, dst(&p).port());
            let (r, p) = lab.send(&answer, Outbound);
            assert_eq!(r, Hairpinned);
            assert_eq!((*src(&p).ip(), dst(&p)), (ip(EXT), at(&format!("{asking}:{}", b_ext.port()))));
        }
    }
    // B's own conversation goes on.
    assert_eq!(dst(&lab.take(&echo(X1, EXT, 0, b_ext.port()))), at(&format!("{B}:77")));
}

/// An identifier that is nobody else's leads to nobody, and not back to its sender.
#[test]
fn rfc5508_req7_hairpinned_query_never_returns_to_its_sender() {
    let mut lab = Lab::new(|c| c.filtering_udp = EndpointIndependent);
    assert_eq!(lab.out(&echo(A, EXT, 8, 7)), Dropped(DropReason::NoFlow));
    let own = lab.map(&echo(A, X1, 8, 9));
    assert_eq!(lab.out(&echo(A, EXT, 8, own.port())), Dropped(DropReason::NoFlow));
    // Filtering holds inside too.
    let mut lab = Lab::default();
    let b_ext = lab.map(&echo(B, X1, 8, 77));
    assert_eq!(lab.out(&echo(A, EXT, 8, b_ext.port())), Dropped(DropReason::Filtered));
}

#[test]
fn rfc5508_req7a_hairpinned_error() {
    let mut lab = Lab::new(|c| c.filtering_udp = EndpointIndependent);
    let b = "192.168.64.3:50001";
    let b_ext = lab.map(&udp(b, X)).to_string();
    let sent = udp(G, &b_ext);
    let (r, seen) = lab.send(&sent, Outbound);
    assert_eq!((r, dst(&seen)), (Hairpinned, at(b)));
    let (r, p) = lab.send(&error(B, EXT, 3, 3, [0; 4], &seen), Outbound);
    assert_eq!(r, Hairpinned);
    assert_eq!((*src(&p).ip(), *dst(&p).ip()), (ip(EXT), ip(A)));
    assert_eq!((src(&p[28..]), dst(&p[28..])), (at(G), at(&b_ext)));
    let mut quote = p[28..].to_vec();
    quote[8] += 1;
    ipv4::fill_checksum(&mut quote);
    assert_eq!(quote, sent);
    // An error about nothing known changes no byte (checked by `send`).
    let stranger = udp("203.0.113.1:1000", "192.168.64.3:2");
    assert!(matches!(lab.out(&error(B, EXT, 3, 3, [0; 4], &stranger)), Dropped(DropReason::NoFlow)));
}

#[test]
fn rfc5508_req8_refusal_is_told() {
    for (refusal, code) in [(Refusal::Prohibited, 13), (Refusal::HostUnreachable, 1)] {
        let mut lab = Lab::new(|c| {
            c.refusal = refusal;
            c.denied = vec![Prefix::new(ip("192.0.2.0"), 24).unwrap()];
            c.sessions_per_endpoint = 3;
            c.icmp_errors_per_second = 10;
        });
        assert_eq!(lab.out(&udp(G, "192.0.2.1:1")), Dropped(DropReason::Policy));
        let (d, p, t, c) = lab.the_error();
        assert_eq!((d, t, c), (Inbound, 3, code));
        assert_eq!((*src(&p).ip(), *dst(&p).ip()), (ip("192.168.64.1"), ip(A)));
        for port in 1..=3 {
            lab.map(&udp(G, &format!("198.51.100.1:{port}")));
        }
        assert_eq!(lab.out(&udp(G, "198.51.100.1:4")), Dropped(DropReason::FlowLimit));
        assert_eq!(lab.the_error().3, code);
        for _ in 0..1000 {
            lab.out(&udp(G, "192.0.2.1:1"));
        }
        assert_eq!(lab.output().len(), 8, "rate limited: ten in this second");
        lab.wait(1);
        lab.out(&udp(G, "192.0.2.1:1"));
        assert_eq!(lab.output().len(), 1);
    }
}

/// The budget of errors is each guest's own: one that has all its packets refused costs another none.
#[test]
fn rfc5508_req8_errors_of_one_guest_leave_those_of_another() {
    let mut lab = Lab::new(|c| c.icmp_errors_per_second = 10);
    let dying = |guest: &str| udp_packet(at(guest), at(X), b"x").ttl(1).bytes();
    for _ in 0..1000 {
        lab.out(&dying(G));
    }
    assert_eq!(lab.output().len(), 10);
    for guest in 3..100 {
        assert_eq!(lab.out(&dying(&format!("192.168.64.{guest}:5"))), Dropped(DropReason::TtlExpired));
    }
    let told = lab.output();
    assert_eq!(told.len(), 97);
    assert!(told.iter().all(|(d, p)| *d == Inbound && p[20] == 11));
    // All together have a bound, and the outside has its own.
    for guest in 3..250 {
        for _ in 0..10 {
            lab.out(&dying(&format!("192.168.64.{guest}:5")));
        }
    }
    assert_eq!(lab.output().len(), 16 * 10 - 107);
    lab.wait(1);
    let ext = lab.map(&udp(G, X));
    let packet = udp_packet(at(X), ext, b"x").ttl(1).bytes();
    for _ in 0..100 {
        lab.inn(&packet);
    }
    assert_eq!(lab.output().iter().filter(|(d, _)| *d == Outbound).count(), 10);
    assert_eq!((lab.out(&dying(G)), lab.output().len()), (Dropped(DropReason::TtlExpired), 1));
}

#[test]
fn rfc5508_req10_unreachable_time_exceeded_and_echo() {
    let mut lab = Lab::default();
    for (ttl, expires) in [(0, true), (1, true), (2, false)] {
        let packet = udp_packet(at(G), at(X), b"x").ttl(ttl).bytes();
        let (r, p) = lab.send(&packet, Outbound);
        if expires {
            assert_eq!(r, Dropped(DropReason::TtlExpired));
            let (d, e, t, c) = lab.the_error();
            assert_eq!((d, t, c), (Inbound, 11, 0));
            assert_eq!((*src(&e).ip(), *dst(&e).ip()), (ip("192.168.64.1"), ip(A)));
            assert_eq!(e[28..], packet[..]);
        } else {
            assert_eq!((r, p[8]), (Translated, 1));
        }
    }
    // The same from outside, towards the outside.
    let ext = lab.map(&udp(G, X));
    let packet = udp_packet(at(X), ext, b"x").ttl(1).bytes();
    assert_eq!(lab.inn(&packet), Dropped(DropReason::TtlExpired));
    let (d, e, t, _) = lab.the_error();
    assert_eq!((d, t, *src(&e).ip()), (Outbound, 11, ip(EXT)));
    // No error about an error.
    let (_, sent) = lab.send(&udp(G, X), Outbound);
    let mut e = error(X1, EXT, 3, 3, [0; 4], &sent);
    put(&mut e, 8, &[1]);
    ipv4::fill_checksum(&mut e);
    assert_eq!(lab.inn(&e), Dropped(DropReason::TtlExpired));
    assert_eq!(lab.output(), []);
    assert_eq!(checksum::checksum(&e[..20]), 0);
}

#[test]
fn rfc5508_other_icmp_is_refused() {
    let mut lab = Lab::default();
    let (_, sent) = lab.send(&udp(G, X), Outbound);
    for kind in [4, 5, 9, 10, 30, 40, 255] {
        let r = lab.inn(&error(X1, EXT, kind, 0, [0; 4], &sent));
        assert_eq!(r, Dropped(DropReason::UnsupportedProtocol), "type {kind}");
    }
}
