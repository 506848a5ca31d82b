//! Theory of operation: RFC 3022 and 1624 (the basics of NAPT and of its checksums), requirement by requirement, on the packet engine with a simulated outside.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod nat_common;
use guestnet_core::stats::DropReason;
use guestnet_wire::tcp::flags::{ACK, SYN};
use guestnet_wire::{be16, checksum, proto, put};
use nat_common::*;

const G: &str = "192.168.64.2:50000";
const X: &str = "198.51.100.1:80";

#[test]
fn rfc3022_udp_checksum_zero_stays_zero() {
    let mut lab = Lab::default();
    let mut p = udp(G, X);
    put(&mut p, 26, &[0, 0]);
    let (r, q) = lab.send(&p, Outbound);
    assert_eq!((r, be16(&q, 26)), (Translated, 0));
    let mut p = udp(X, &src(&q).to_string());
    put(&mut p, 26, &[0, 0]);
    assert_eq!(be16(&lab.take(&p), 26), 0);
}

#[test]
fn rfc3022_a_computed_udp_zero_goes_out_as_ones() {
    let mut lab = Lab::new(|c| c.decrement_ttl = false);
    let ext = lab.map(&udp(G, X));
    // Choose data so that the translated packet's checksum computes to zero.
    let mut q = udp_packet(ext, at(X), &[0, 0]).bytes();
    let word = be16(&q, 26);
    put(&mut q, 28, &word.to_be_bytes());
    let p = udp_packet(at(G), at(X), &q[28..30]).bytes();
    let (_, out) = lab.send(&p, Outbound);
    assert_eq!(be16(&out, 26), 0xffff);
}

#[test]
fn rfc3022_a_partial_checksum_is_completed_first() {
    let mut lab = Lab::default();
    let mut p = udp(G, X);
    // What an offloading guest leaves: the pseudo-header's sum.
    let (s, d) = (ip(A).into(), ip(X1).into());
    let partial = checksum::fold(checksum::pseudo(s, d, proto::UDP, p.len() as u32 - 20));
    put(&mut p, 26, &partial.to_be_bytes());
    guestnet_wire::gso::complete_checksum(&mut p, 20, 6).unwrap();
    assert_eq!(lab.send(&p, Outbound).0, Translated);
}

#[test]
fn rfc3022_published_ports() {
    let mut lab = Lab::default();
    let nat = &mut lab.nat;
    nat.add_forward(proto::TCP, at("203.0.113.1:8080"), at("192.168.64.2:80")).unwrap();
    nat.add_forward(proto::UDP, at("203.0.113.1:53"), at("192.168.64.2:5353")).unwrap();
    assert!(nat.add_forward(proto::TCP, at("203.0.113.1:8080"), at("192.168.64.3:80")).is_err());
    assert!(nat.add_forward(proto::TCP, at("203.0.113.9:8080"), at("192.168.64.3:80")).is_err());
    assert!(nat.add_forward(proto::TCP, at("203.0.113.1:81"), at("10.0.0.1:80")).is_err());
    assert!(nat.add_forward(proto::ICMP, at("203.0.113.1:81"), at("192.168.64.3:80")).is_err());
    let p = lab.take(&tcp("192.0.2.1:4000", "203.0.113.1:8080", SYN));
    assert_eq!((src(&p), dst(&p)), (at("192.0.2.1:4000"), at("192.168.64.2:80")));
    let ext = lab.map(&tcp("192.168.64.2:80", "192.0.2.1:4000", SYN | ACK));
    assert_eq!(ext, at("203.0.113.1:8080"));
    lab.take(&udp("192.0.2.1:4000", "203.0.113.1:53"));
    assert_eq!(lab.map(&udp("192.168.64.2:5353", "192.0.2.1:4000")), at("203.0.113.1:53"));
    // Another guest reaches it by its external end.
    let (r, p) = lab.send(&tcp("192.168.64.3:999", "203.0.113.1:8080", SYN), Outbound);
    assert_eq!((r, dst(&p)), (Hairpinned, at("192.168.64.2:80")));
    assert!(lab.nat.remove_forward(proto::TCP, at("203.0.113.1:8080")));
    assert!(!lab.nat.remove_forward(proto::TCP, at("203.0.113.1:8080")));
    assert!(matches!(lab.inn(&tcp("192.0.2.1:4001", "203.0.113.1:8080", SYN)), Dropped(_)));
    lab.take(&tcp("192.0.2.1:4000", "203.0.113.1:8080", ACK));
}

#[test]
fn rfc3022_protocols_without_ports_only_where_unambiguous() {
    let mut lab = Lab::default();
    for p in [proto::GRE, proto::ESP, proto::SCTP] {
        let packet = |s: &str, d: &str| IpPacket::new(ip(s), ip(d), p, vec![7; 40]).bytes();
        let (r, q) = lab.send(&packet(A, X1), Outbound);
        assert_eq!((r, *src(&q).ip(), &q[20..]), (Translated, ip(EXT), &[7; 40][..]));
        assert_eq!(*dst(&lab.take(&packet(X1, EXT))).ip(), ip(A));
        assert_eq!(lab.out(&packet(B, X1)), Dropped(DropReason::Filtered), "whose would the answer be?");
        assert_eq!(lab.out(&packet(B, X2)), Translated);
        assert_eq!(lab.inn(&packet("192.0.2.1", EXT)), Dropped(DropReason::NoFlow));
    }
    let ah = IpPacket::new(ip(A), ip(X1), 51, vec![0; 40]).bytes();
    assert_eq!(lab.out(&ah), Dropped(DropReason::UnsupportedProtocol));
}

#[test]
fn rfc3022_what_is_not_ours_passes() {
    let mut lab = Lab::default();
    assert_eq!(lab.out(&udp("10.9.9.9:1", X)), PassThrough);
    assert_eq!(lab.out(&udp(G, "192.168.64.3:1")), PassThrough);
    assert_eq!(lab.inn(&udp(X, "203.0.113.77:1")), PassThrough);
    for bad in ["0.1.2.3:5", "127.0.0.1:5", "224.0.0.1:5", "255.255.255.255:5", "198.51.100.1:0"] {
        assert_eq!(lab.out(&udp(G, bad)), Dropped(DropReason::BadDestination), "{bad}");
    }
    let mut v6 = vec![0; 48];
    v6[0] = 0x60;
    assert_eq!(lab.out(&v6), PassThrough);
}
