//! Theory of operation: the headers of a frame that is made here, the same for IPv4 and IPv6. Whoever makes a packet
//! names its addresses and fields once ([`IpHeader`], [`FrameHeader`]) and need not know the family; the transport bytes
//! follow the headers.

use crate::ether::{self, Ether, Mac};
use crate::ipv4::{self, Ipv4};
use crate::ipv6::{self, Ipv6};
use std::net::{IpAddr, Ipv6Addr};

/// The longest [`FrameHeader`].
pub const HEADER_MAX: usize = ether::HEADER_LEN + ipv6::LEN;

/// An IP header without options or extension headers. Both addresses are of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IpHeader {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// Protocol number, or next header.
    pub proto: u8,
    /// TTL, or hop limit.
    pub ttl: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// IPv4: identification.
    pub id: u16,
    /// IPv4: flags and fragment offset ([`ipv4::DF`], [`ipv4::MF`]). IPv6 never fragments on the way.
    pub frag: u16,
}

impl IpHeader {
    /// Length of the header.
    #[inline]
    #[must_use]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        if self.dst.is_ipv4() { ipv4::MIN_LEN } else { ipv6::LEN }
    }

    /// EtherType of the packet.
    #[inline]
    #[must_use]
    pub fn ethertype(&self) -> u16 {
        if self.dst.is_ipv4() { ether::IPV4 } else { ether::IPV6 }
    }

    /// Writes the header at the front of `b` for a payload of this many bytes.
    #[inline]
    pub fn emit(&self, b: &mut [u8], payload_len: usize) {
        let payload_len = payload_len as u16;
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let IpHeader { proto, ttl, tos, id, frag, .. } = *self;
                Ipv4 { src, dst, proto, ttl, tos, id, frag, payload_len }.emit(b);
            }
            (src, dst) => Ipv6 {
                src: six(src),
                dst: six(dst),
                next_header: self.proto,
                hop_limit: self.ttl,
                traffic_class: self.tos,
                payload_len,
            }
            .emit(b),
        }
    }
}

fn six(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(a) => a.to_ipv6_mapped(),
        IpAddr::V6(a) => a,
    }
}

/// Ethernet and IP header of a frame.
///
/// ```
/// use guestnet_wire::frame::{FrameHeader, IpHeader};
/// use guestnet_wire::{ether::Mac, ipv4, parse, proto, udp};
///
/// let (src, dst) = ([192, 0, 2, 1].into(), [192, 0, 2, 2].into());
/// let ip = IpHeader { src, dst, proto: proto::UDP, ttl: 64, tos: 0, id: 0, frag: ipv4::DF };
/// let header = FrameHeader { dst: Mac([2; 6]), src: Mac([4; 6]), ip };
/// let mut frame = vec![0; header.len() + udp::LEN];
/// udp::emit(&mut frame[header.len()..], src, dst, 53, 1024);
/// header.emit(&mut frame, udp::LEN);
/// assert_eq!(parse::parse_ip(&frame, 14)?.dst_port, 1024);
/// # Ok::<(), guestnet_wire::WireError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// Destination MAC.
    pub dst: Mac,
    /// Source MAC.
    pub src: Mac,
    /// The packet in it.
    pub ip: IpHeader,
}

impl FrameHeader {
    /// Length of both headers: where the transport header begins.
    #[inline]
    #[must_use]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        ether::HEADER_LEN + self.ip.len()
    }

    /// Writes both headers at the front of `frame` for this many transport bytes.
    #[inline]
    pub fn emit(&self, frame: &mut [u8], payload_len: usize) {
        Ether { dst: self.dst, src: self.src, ethertype: self.ip.ethertype() }.emit(frame);
        if let Some(packet) = frame.get_mut(ether::HEADER_LEN..) {
            self.ip.emit(packet, payload_len);
        }
    }
}

/// Splits a packet of either family into fragments of at most `mtu` bytes and calls `out` with the headers and the data
/// of each, in order. IPv6 uses `id`, IPv4 the identification in the packet. False, and nothing is called, where `mtu`
/// has no room for eight bytes of data.
pub fn fragments(packet: &[u8], mtu: usize, id: u32, out: impl FnMut(&[u8], &[u8])) -> bool {
    match packet.first().map(|b| b >> 4) {
        Some(6) => ipv6::fragments(packet, mtu, id, out),
        _ => ipv4::fragments(packet, mtu, out),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{parse, proto, udp};

    fn addresses(v6: bool) -> (IpAddr, IpAddr) {
        match v6 {
            false => ([192, 0, 2, 1].into(), [198, 51, 100, 7].into()),
            true => ("2001:db8::1".parse().unwrap(), "fd00::7".parse().unwrap()),
        }
    }

    fn datagram(v6: bool, payload: usize) -> Vec<u8> {
        let (src, dst) = addresses(v6);
        let ip = IpHeader { src, dst, proto: proto::UDP, ttl: 63, tos: 0xb9, id: 5, frag: 0 };
        let header = FrameHeader { dst: Mac([2; 6]), src: Mac([4; 6]), ip };
        let mut frame = vec![0; header.len() + udp::LEN + payload];
        for (i, b) in frame.iter_mut().skip(header.len() + udp::LEN).enumerate() {
            *b = i as u8;
        }
        udp::emit(&mut frame[header.len()..], src, dst, 53, 1024);
        header.emit(&mut frame, udp::LEN + payload);
        frame
    }

    #[test]
    fn what_was_written_is_read() {
        for v6 in [false, true] {
            let frame = datagram(v6, 100);
            let p = parse::parse_ip(&frame, ether::HEADER_LEN).unwrap();
            assert_eq!(Ether::parse(&frame).unwrap().ethertype, if v6 { ether::IPV6 } else { ether::IPV4 });
            assert_eq!((p.src, p.dst), addresses(v6));
            assert_eq!((p.proto, p.ttl, p.tos), (proto::UDP, 63, 0xb9));
            assert_eq!((p.src_port, p.dst_port, p.end), (53, 1024, frame.len()));
            assert!(parse::verify_ipv4_header(&frame, &p) && parse::verify_l4(&frame, &p));
        }
    }

    #[test]
    fn fragments_are_the_packet_again() {
        for v6 in [false, true] {
            let whole = datagram(v6, 3000).split_off(ether::HEADER_LEN);
            let head = if v6 { ipv6::LEN } else { ipv4::MIN_LEN };
            for mtu in [1280, 1283, 1500, 2999] {
                let (mut data, mut ends) = (Vec::new(), Vec::new());
                assert!(fragments(&whole, mtu, 77, |header, piece| {
                    let packet = [header, piece].concat();
                    assert!(packet.len() <= mtu);
                    let p = parse::parse_ip(&packet, 0).unwrap();
                    assert!(parse::verify_ipv4_header(&packet, &p));
                    let f = p.fragment.unwrap();
                    assert_eq!((f.id, f.offset as usize), (if v6 { 77 } else { 5 }, data.len()));
                    assert_eq!(
                        (p.src, p.dst, p.proto, p.ttl),
                        (addresses(v6).0, addresses(v6).1, proto::UDP, 63)
                    );
                    data.extend_from_slice(&packet[p.l4..p.end]);
                    ends.push(f.more);
                }));
                assert_eq!(data, whole[head..]);
                assert!(!ends.pop().unwrap() && ends.iter().all(|more| *more) && !ends.is_empty());
            }
            assert!(!fragments(&whole, head + 7, 0, |_, _| panic!("no room")));
        }
    }
}
