//! ICMP errors to guests: which ones there are, and which packets may have one.

use crate::tables::addressing::Subnet;
use guestnet_wire::parse::Packet;
use guestnet_wire::{icmp, icmp6, ipv6, proto};

/// Bytes of an ICMP error in all, IP header included (RFC 1812 4.3.2.3).
pub(super) const ERROR_MAX: usize = 576;

/// An ICMP error: type, code, bytes 4 to 7.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct IcmpError(pub u8, pub u8, pub [u8; 4]);

impl IcmpError {
    /// "Destination unreachable" with a code.
    pub fn unreachable(code: u8) -> IcmpError {
        IcmpError(icmp::UNREACHABLE, code, [0; 4])
    }

    /// "Fragmentation needed" with the MTU of the next hop.
    pub fn too_big(mtu: u16) -> IcmpError {
        let m = mtu.to_be_bytes();
        IcmpError(icmp::UNREACHABLE, icmp::unreachable::FRAG_NEEDED, [0, 0, m[0], m[1]])
    }
}

/// Bytes of an ICMPv6 error in all, IP header included (RFC 4443 2.4 c).
pub(super) const ERROR6_MAX: usize = ipv6::MIN_MTU as usize;

impl IcmpError {
    /// The same for IPv6 (RFC 4443 3); `None` where IPv6 has no such error.
    pub(crate) fn for_v6(self) -> Option<IcmpError> {
        use icmp::unreachable::{ADMIN_PROHIBITED, FRAG_NEEDED, HOST, NET, PORT};
        let [_, _, a, b] = self.2;
        Some(match (self.0, self.1) {
            (icmp::UNREACHABLE, NET) => IcmpError(1, 0, [0; 4]),
            (icmp::UNREACHABLE, ADMIN_PROHIBITED) => IcmpError(1, 1, [0; 4]),
            (icmp::UNREACHABLE, HOST) => IcmpError(1, 3, [0; 4]),
            (icmp::UNREACHABLE, PORT) => IcmpError(1, 4, [0; 4]),
            (icmp::UNREACHABLE, FRAG_NEEDED) => {
                let [a, b] = u16::from_be_bytes([a, b]).max(ipv6::MIN_MTU).to_be_bytes();
                IcmpError(2, 0, [0, 0, a, b])
            }
            (icmp::TIME_EXCEEDED, code) => IcmpError(3, code, [0; 4]),
            _ => return None,
        })
    }
}

impl IcmpError {
    /// As [`IcmpError::for_v6`], about this packet. A protocol that nobody here knows is a problem with the header that names
    /// it (RFC 8200 4), if the packet is to the gateway's `own` address; else it may not pass.
    pub(super) fn for_packet6(self, p: &Packet, own: bool) -> Option<IcmpError> {
        match (self.0, self.1) {
            (icmp::UNREACHABLE, icmp::unreachable::PROTOCOL) if own => {
                let plain = p.l4.saturating_sub(p.l3) == ipv6::LEN;
                plain.then_some(IcmpError(icmp6::PARAMETER_PROBLEM, 1, [0, 0, 0, 6]))
            }
            (icmp::UNREACHABLE, icmp::unreachable::PROTOCOL) => {
                Some(IcmpError(icmp6::UNREACHABLE, icmp6::unreachable::ADMIN_PROHIBITED, [0; 4]))
            }
            _ => self.for_v6(),
        }
    }
}

/// Whether an IPv6 packet of a guest may be answered with an error (RFC 4443 2.4 e).
pub(super) fn may_answer6(frame: &[u8], p: &Packet) -> bool {
    let is_error = p.proto == proto::ICMPV6 && frame.get(p.l4).is_none_or(|kind| *kind < 128);
    let is_later_fragment = p.fragment.is_some_and(|f| f.offset != 0);
    !is_error
        && !is_later_fragment
        && !p.dst.is_multicast()
        && !p.src.is_multicast()
        && !p.src.is_unspecified()
}

/// Whether a packet of a guest may be answered with an error (RFC 1812 4.3.2.7): not an error itself, a later fragment,
/// or a packet to or from a group.
pub(super) fn may_answer(subnet: Subnet, frame: &[u8], p: &Packet) -> bool {
    let kind = frame.get(p.l4).copied().unwrap_or(0);
    let is_error = p.proto == proto::ICMP && icmp::is_error(kind);
    let is_later_fragment = p.fragment.is_some_and(|f| f.offset != 0);
    let to_group = p.dst.is_multicast() || subnet.is_broadcast(p.dst);
    !is_error && !is_later_fragment && !to_group && subnet.is_host(p.src)
}
