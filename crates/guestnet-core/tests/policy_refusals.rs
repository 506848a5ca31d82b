//! What a guest is told when the policy refuses it: a reset for TCP, an ICMP error that programs hear of at once for the
//! rest. Silence only where the protocols forbid an answer.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/net.rs"]
mod net;

use guestnet_core::policy::Isolated;
use guestnet_core::stats::DropReason;
use guestnet_core::types::NetMode;
use guestnet_wire::ether::{self, Ether};
use guestnet_wire::frame::{FrameHeader, IpHeader};
use guestnet_wire::parse::{self, Packet};
use guestnet_wire::tcp::{Options, Tcp, flags};
use guestnet_wire::{checksum, icmp, proto, udp};
use net::*;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

const PROHIBITED: (u8, u8) = (icmp::UNREACHABLE, icmp::unreachable::ADMIN_PROHIBITED);

fn host_only() -> Net {
    let mut c = config();
    c.mode = NetMode::HostOnly;
    Net::with(c)
}

/// Addresses of the floor: metadata services, link-local, loopback, reserved.
const FLOOR: [&str; 5] = ["169.254.169.254", "169.254.1.1", "100.100.100.200", "127.0.0.1", "240.0.0.1"];

#[test]
fn a_refused_datagram_or_echo_is_answered_with_administratively_prohibited() {
    let mut n = Net::new();
    for to in FLOOR {
        let told = n.ask(A, udp_frame(A, 4000, addr(&format!("{to}:80")), b"x"));
        assert_eq!((told.len(), read(&told[0]).icmp()), (1, PROHIBITED), "UDP to {to}");
        assert_eq!(read(&told[0]).src().ip(), ip(GATEWAY));
        let told = n.ask(A, echo_frame(A, to, 7, 1, 64, b"x"));
        assert_eq!((told.len(), read(&told[0]).icmp()), (1, PROHIBITED), "echo to {to}");
    }
    let mut n = host_only();
    let told = n.ask(A, udp_frame(A, 4000, addr("203.0.113.1:80"), b"x"));
    assert_eq!(read(&told[0]).icmp(), PROHIBITED);
}

#[test]
fn a_refused_connect_is_reset_by_the_address_that_it_names() {
    for (mut n, to) in [
        (Net::new(), "169.254.169.254:80"),
        (Net::new(), "169.254.1.1:80"),
        (Net::new(), "100.100.100.200:80"),
        (host_only(), "203.0.113.1:443"),
    ] {
        let told = n.ask(A, syn(A, 4000, to));
        assert_eq!(told.len(), 1, "{to}");
        let got = read(&told[0]);
        let rst = Tcp::parse(got.l4()).unwrap();
        assert_eq!((got.src(), got.dst()), (addr(to), guest_addr(A, 4000)));
        assert_eq!((rst.flags, rst.seq, rst.ack), (flags::RST | flags::ACK, 0, 1001), "{to}");
        assert!(n.fx.connects.is_empty());
    }
}

#[test]
fn a_connect_to_an_address_that_nothing_comes_from_is_prohibited() {
    let mut n = Net::new();
    for to in ["127.0.0.1:80", "0.1.2.3:80", "240.0.0.1:80"] {
        let told = n.ask(A, syn(A, 4000, to));
        assert_eq!((told.len(), read(&told[0]).icmp()), (1, PROHIBITED), "{to}");
    }
}

#[test]
fn what_is_sent_to_a_group_is_not_answered() {
    let mut n = Net::new();
    for frame in [udp_frame(A, 4000, addr("224.0.0.9:80"), b"x"), syn(A, 4000, "224.0.0.9:80")] {
        assert_eq!(n.ask(A, frame).len(), 0);
    }
    assert_eq!(n.drops(DropReason::BadDestination), 2);
}

#[test]
fn an_address_that_no_guest_has_is_unreachable_and_not_prohibited() {
    let mut n = Net::new();
    let told = n.ask(A, udp_frame(A, 4000, addr("192.168.64.77:80"), b"x"));
    assert_eq!(read(&told[0]).icmp(), (icmp::UNREACHABLE, icmp::unreachable::HOST));
}

fn guest6(port: guestnet_core::types::PortId) -> Ipv6Addr {
    Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x10 + port.0 as u16)
}

/// A packet of A to B over IPv6, on the wire between them.
fn frame6(proto: u8, l4: &[u8]) -> Vec<u8> {
    let (src, dst) = (guest6(A).into(), guest6(B).into());
    let ip = IpHeader { src, dst, proto, ttl: 64, tos: 0, id: 0, frag: 0 };
    let header = FrameHeader { dst: mac(B), src: mac(A), ip };
    let mut frame = vec![0; header.len()];
    header.emit(&mut frame, l4.len());
    frame.extend_from_slice(l4);
    frame
}

fn read6(frame: &[u8]) -> Packet {
    assert_eq!(Ether::parse(frame).unwrap().ethertype, ether::IPV6);
    let p = parse::parse_ip(frame, ether::HEADER_LEN).unwrap();
    assert!(parse::verify_l4(frame, &p), "checksum");
    p
}

#[test]
fn guests_are_told_in_ipv6_too() {
    let mut c = config();
    c.isolated = Isolated::AllExcept(Arc::new([].into()));
    let mut n = Net::with(c);
    let (src, dst): (IpAddr, IpAddr) = (guest6(A).into(), guest6(B).into());
    let mut datagram = vec![0; 12];
    udp::emit(&mut datagram, src, dst, 1, 2);
    let sent = frame6(proto::UDP, &datagram);
    let told = n.ask(A, sent.clone());
    assert_eq!((told.len(), told[0].port), (1, A));
    let p = read6(&told[0].frame);
    let message = &told[0].frame[p.l4..p.end];
    assert_eq!((p.proto, &message[..2]), (proto::ICMPV6, &[1, 1][..]));
    assert_eq!((p.dst, &message[8..]), (src, &sent[14..]));

    let mut segment = vec![0; 20];
    Tcp { src_port: 1, dst_port: 2, seq: 7, flags: flags::SYN, window: 9, ..Tcp::default() }
        .emit(&Options::default(), &mut segment);
    let sum = checksum::pseudo(src, dst, proto::TCP, 20);
    let sum = checksum::finish(checksum::sum(&segment, sum));
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    let told = n.ask(A, frame6(proto::TCP, &segment));
    let p = read6(&told[0].frame);
    let rst = Tcp::parse(&told[0].frame[p.l4..]).unwrap();
    assert_eq!((p.src, p.dst, rst.flags, rst.ack), (dst, src, flags::RST | flags::ACK, 8));

    // An ICMPv6 error is not answered with another.
    let mut error = vec![1, 4, 0, 0, 0, 0, 0, 0];
    error.extend_from_slice(&told[0].frame[14..]);
    assert_eq!(n.ask(A, frame6(proto::ICMPV6, &error)).len(), 0);
}
