//! Theory of operation: TCP connections through the uplink of packets that a change of the rules has cut. Both ends
//! are to learn that at once, and a reset needs a sequence number that the end accepts, which a translator does not
//! keep. So each end gets an ACK that it cannot accept. It answers with an ACK of its own (RFC 9293 3.10.7.4), whose
//! acknowledgment number is what it expects next, and that answer is reset.
//!
//! A guest's answer belongs to no connection and is refused by the rules, so the guest is reset like for any segment
//! without a connection. For answers from the outside the connection is remembered: for a minute, and the last
//! [`MOST`] of them.

use crate::interface::types::Time;
use guestnet_wire::ether;
use guestnet_wire::ipv4::{self, Ipv4};
use guestnet_wire::tcp::{Options, Tcp, flags};
use guestnet_wire::{checksum, proto, put};
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddrV4};

/// Where the IP header is in a frame.
const L3: usize = ether::HEADER_LEN;
/// Connections that are remembered.
const MOST: usize = 16_384;
/// For how many seconds.
const SECONDS: u64 = 60;
/// Length of the segments that are made here, with an IPv4 header and room for an Ethernet header.
const LEN: usize = L3 + ipv4::MIN_LEN + 20;

/// The two ends of a connection as the outside sees them: a guest's external end, and the other side.
type Ends = (SocketAddrV4, SocketAddrV4);

/// See the module head.
#[derive(Default)]
pub(crate) struct CutConnections {
    until: HashMap<Ends, Time>,
    order: VecDeque<(Ends, Time)>,
}

impl CutConnections {
    /// Remembers a connection.
    pub fn add(&mut self, now: Time, external: SocketAddrV4, remote: SocketAddrV4) {
        let (ends, until) = ((external, remote), now.plus_s(SECONDS));
        self.until.insert(ends, until);
        self.order.push_back((ends, until));
        while let Some((old, at)) = self.order.front().copied()
            && (self.order.len() > MOST || at <= now)
        {
            self.order.pop_front();
            // It may have been cut again since.
            if self.until.get(&old) == Some(&at) {
                self.until.remove(&old);
            }
        }
    }

    /// Returns true when this connection was cut a short time ago.
    #[inline]
    #[must_use]
    pub fn contains(&self, now: Time, external: SocketAddrV4, remote: SocketAddrV4) -> bool {
        !self.until.is_empty() && self.until.get(&(external, remote)).is_some_and(|until| *until > now)
    }
}

/// An ACK that its receiver answers with an ACK, as a frame with room for an Ethernet header.
#[must_use]
pub(crate) fn probe(src: SocketAddrV4, dst: SocketAddrV4) -> [u8; LEN] {
    segment(src, dst, 0, flags::ACK)
}

/// The reset that answers a segment of a cut connection from `src`. `None` for one that must not be answered.
#[must_use]
pub(crate) fn reset(src: SocketAddrV4, dst: SocketAddrV4, received: &Tcp) -> Option<[u8; LEN]> {
    let answers = received.flags & (flags::ACK | flags::RST) == flags::ACK;
    answers.then(|| segment(dst, src, received.ack, flags::RST))
}

fn segment(src: SocketAddrV4, dst: SocketAddrV4, seq: u32, flags: u8) -> [u8; LEN] {
    let mut frame = [0; LEN];
    let (_, packet) = frame.split_at_mut(L3);
    let (source, destination) = (*src.ip(), *dst.ip());
    Ipv4 {
        src: source,
        dst: destination,
        proto: proto::TCP,
        ttl: 64,
        tos: 0,
        id: 0,
        frag: ipv4::DF,
        payload_len: 20,
    }
    .emit(packet);
    let (_, body) = packet.split_at_mut(ipv4::MIN_LEN);
    let (src_port, dst_port) = (src.port(), dst.port());
    Tcp { src_port, dst_port, seq, flags, ..Tcp::default() }.emit(&Options::default(), body);
    let sum = checksum::pseudo(IpAddr::V4(source), IpAddr::V4(destination), proto::TCP, 20);
    let sum = checksum::finish(checksum::sum(body, sum));
    put(body, 16, &sum.to_be_bytes());
    frame
}

#[cfg(test)]
mod tests {
    use super::*;
    use guestnet_wire::parse;

    fn ends() -> Ends {
        ("203.0.113.1:50000".parse().unwrap(), "198.51.100.7:443".parse().unwrap())
    }

    #[test]
    fn a_cut_connection_is_remembered_for_a_minute_and_the_oldest_make_room() {
        let mut cut = CutConnections::default();
        let (external, remote) = ends();
        assert!(!cut.contains(Time(0), external, remote));
        cut.add(Time(0), external, remote);
        assert!(cut.contains(Time(0).plus_s(59), external, remote));
        assert!(!cut.contains(Time(0).plus_s(60), external, remote));
        assert!(!cut.contains(Time(0), remote, external));
        for n in 0..3 * MOST as u32 {
            let other = SocketAddrV4::new(*remote.ip(), (n % 60_000) as u16);
            cut.add(Time(u64::from(n)), SocketAddrV4::new((n / 60_000).into(), 1), other);
        }
        assert!(!cut.contains(Time(1), external, remote));
        assert!(cut.until.len() <= MOST && cut.order.len() <= MOST);
    }

    #[test]
    fn segments_are_whole_and_the_reset_is_what_the_sender_expects_next() {
        let (external, remote) = ends();
        let whole = |frame: &[u8]| {
            let p = parse::parse_ip(frame, L3).unwrap();
            assert!(parse::verify_ipv4_header(frame, &p) && parse::verify_l4(frame, &p));
            let at = |ip: IpAddr, port| std::net::SocketAddr::new(ip, port);
            (at(p.src, p.src_port), at(p.dst, p.dst_port), Tcp::parse(&frame[p.l4..p.end]).unwrap())
        };
        let (src, dst, ack) = whole(&probe(external, remote));
        assert_eq!((src, dst, ack.flags), (external.into(), remote.into(), flags::ACK));
        let answer = Tcp { ack: 0x1234_5678, flags: flags::ACK, ..Tcp::default() };
        let (src, dst, rst) = whole(&reset(remote, external, &answer).unwrap());
        assert_eq!((src, dst), (external.into(), remote.into()));
        assert_eq!((rst.flags, rst.seq), (flags::RST, 0x1234_5678));
        for unanswered in [flags::RST, flags::RST | flags::ACK, flags::SYN] {
            assert_eq!(reset(remote, external, &Tcp { flags: unanswered, ..answer }), None);
        }
    }
}
