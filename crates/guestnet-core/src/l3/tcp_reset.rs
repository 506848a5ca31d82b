//! Theory of operation: TCP resets of the gateway, for segments of guests that belong to no connection.

use crate::interface::effects::Effects;
use crate::interface::stats::DropReason;
use crate::interface::types::FrameMeta;
use crate::l2::lan::{Link, Sender};
use crate::l3::frame_builder::header;
use crate::l3::gateway::Gateway;
use guestnet_wire::parse::Packet;
use guestnet_wire::tcp::{Options, Tcp, flags};
use guestnet_wire::{checksum, proto, put};
use std::net::IpAddr;

impl Gateway {
    /// True when a guest's stack takes a reset that comes from this address: it is no group, and no address that means
    /// the guest itself or nothing.
    pub fn may_reset_from<E>(&self, link: &Link<'_, E>, ip: IpAddr) -> bool {
        let ordinary = match ip {
            IpAddr::V4(a) => !matches!(a.octets()[0], 0 | 127 | 224..),
            IpAddr::V6(a) => !a.is_unspecified() && !a.is_loopback() && !a.is_multicast(),
        };
        ordinary && !link.lan.addressing().subnet().is_broadcast(ip)
    }

    /// Refuses a segment with a reset (RFC 9293 3.10.7.1), never one with RST set. Returns why it is dropped.
    pub fn reset<E: Effects>(
        &mut self,
        link: &mut Link<'_, E>,
        from: Sender,
        p: &Packet,
        seg: &Tcp,
        why: DropReason,
    ) -> DropReason {
        let martian = !self.may_reset_from(link, p.dst);
        if seg.flags & flags::RST != 0 || martian || p.src_port == 0 {
            return if martian { DropReason::BadDestination } else { why };
        }
        let len = (p.payload_len() as u32)
            .saturating_add(u32::from(seg.flags & flags::SYN != 0))
            .saturating_add(u32::from(seg.flags & flags::FIN != 0));
        let (seq, ack, flags) = if seg.flags & flags::ACK != 0 {
            (seg.ack, 0, flags::RST)
        } else {
            (0, seg.seq.wrapping_add(len), flags::RST | flags::ACK)
        };
        let (src_port, dst_port) = (seg.dst_port, seg.src_port);
        let b = match self.frames.transport(20) {
            Ok(b) => b,
            Err(e) => return e,
        };
        Tcp { src_port, dst_port, seq, ack, flags, ..Tcp::default() }.emit(&Options::default(), b);
        let sum = checksum::pseudo(p.dst, p.src, proto::TCP, 20);
        let c = checksum::finish(checksum::sum(b, sum));
        put(b, 16, &c.to_be_bytes());
        let ip = header(p.dst, p.src, proto::TCP);
        match self.frames.send(link, from.slot, from.mac, ip, 20, FrameMeta::default()) {
            Ok(()) => why,
            Err(e) => e,
        }
    }
}
