//! ICMP errors to guests: which ones there are, and which packets may have one.

use crate::tables::addressing::Subnet;
use guestnet_wire::parse::Packet;
use guestnet_wire::{icmp, proto};

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

/// Whether a packet of a guest may be answered with an error (RFC 1812 4.3.2.7): not an error itself, a later fragment,
/// or a packet to or from a group.
pub(super) fn may_answer(subnet: Subnet, frame: &[u8], p: &Packet) -> bool {
    let kind = frame.get(p.l4).copied().unwrap_or(0);
    let is_error = p.proto == proto::ICMP && icmp::is_error(kind);
    let is_later_fragment = p.fragment.is_some_and(|f| f.offset != 0);
    let to_group = p.dst.is_multicast() || subnet.is_broadcast(p.dst);
    !is_error && !is_later_fragment && !to_group && subnet.is_host(p.src)
}
