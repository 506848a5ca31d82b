//! Theory of operation: ICMP errors to guests. They quote the guest's packet, fit in 576 bytes (RFC 1812 4.3.2.3), and are
//! limited in rate for each port. None answers an error, a later fragment, or a packet to or from a group (RFC 1812
//! 4.3.2.7).

use crate::interface::effects::Effects;
use crate::interface::stats::DropReason;
use crate::interface::types::{FrameMeta, Time};
use crate::l2::lan::{Link, Sender};
use crate::l3::frame_builder::{Envelope, TTL};
use crate::l3::gateway::Gateway;
use crate::util::account::count;
use guestnet_wire::ether::{self, Ether};
use guestnet_wire::parse::{self, Packet};
use guestnet_wire::{icmp, proto};
use std::net::{IpAddr, Ipv4Addr};

/// Bytes of an ICMP error in all, IP header included (RFC 1812 4.3.2.3).
const ERROR_MAX: usize = 576;

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

impl Gateway {
    /// Sends an ICMP error that quotes the guest's packet; false when it must not be sent, or the rate forbids it.
    pub fn icmp_error<E: Effects>(
        &mut self,
        link: &mut Link<'_, E>,
        from: Sender,
        frame: &[u8],
        p: &Packet,
        error: IcmpError,
    ) -> bool {
        let kind = frame.get(p.l4).copied().unwrap_or(0);
        let subnet = link.lan.addressing().subnet();
        let silent = p.proto == proto::ICMP && icmp::is_error(kind)
            || p.fragment.is_some_and(|f| f.offset != 0)
            || p.dst.is_multicast()
            || subnet.is_broadcast(p.dst)
            || !subnet.is_host(p.src);
        let (IpAddr::V4(guest), false) = (p.src, silent) else { return false };
        let quote = frame.get(p.l3..p.end.min(p.l3.saturating_add(ERROR_MAX - 28))).unwrap_or(&[]);
        self.send_error(link, from, self.address, guest, quote, error)
    }

    /// Sends an ICMP error with a quotation to a guest, as if from `src`; false when the rate forbids it.
    pub fn send_error<E: Effects>(
        &mut self,
        link: &mut Link<'_, E>,
        to: Sender,
        src: Ipv4Addr,
        dst: Ipv4Addr,
        quote: &[u8],
        error: IcmpError,
    ) -> bool {
        let Sender { slot, mac } = to;
        let Some(mtu) = link.lan.port(slot).map(|p| p.config.mtu) else { return false };
        if !self.may_report(link.now, slot) {
            link.lan.count_drop(slot, DropReason::RateLimit);
            return false;
        }
        if let Some(c) = link.lan.counters_mut(slot) {
            count(&mut c.icmp_errors);
        }
        let room = usize::from(mtu).min(ERROR_MAX).saturating_sub(28);
        let quote = quote.get(..quote.len().min(room)).unwrap_or(quote);
        let Ok(b) = self.frames.transport(quote.len().saturating_add(icmp::LEN)) else { return false };
        let n = icmp::emit(b, error.0, error.1, error.2, quote);
        let e = Envelope { mac, src, dst, proto: proto::ICMP, ttl: TTL, tos: 0xc0 };
        if let Err(why) = self.frames.send_ipv4(link, slot, &e, n, FrameMeta::default()) {
            link.lan.count_drop(slot, why);
        }
        true
    }

    /// When [`Gateway::timers`] has something to do.
    #[must_use]
    pub fn next_timer(&self) -> Option<Time> {
        self.reassembly.next_timer()
    }

    /// Gives up packets whose fragments did not come in time, and tells the guests (RFC 1122 3.3.2).
    pub fn timers<E: Effects>(&mut self, link: &mut Link<'_, E>) {
        while let Some(old) = self.reassembly.expire(link.now) {
            link.lan.count_drop(old.slot, DropReason::Reassembly);
            let Some(first) = old.first else { continue };
            if let (Ok(p), Ok(eth)) = (parse::parse_ip(&first, ether::HEADER_LEN), Ether::parse(&first)) {
                let e = IcmpError(icmp::TIME_EXCEEDED, 1, [0; 4]);
                self.icmp_error(link, Sender { slot: old.slot, mac: eth.src }, &first, &p, e);
            }
        }
    }
}
