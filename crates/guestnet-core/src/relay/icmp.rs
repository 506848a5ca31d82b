//! Theory of operation: the relay of echo requests (RFC 5508), of both families. A guest's echo identifier is mapped as a UDP port is: one
//! ping socket for all destinations, one flow for each.

use crate::context::Context;
use crate::interface::effects::Effects;
use crate::interface::stats::DropReason;
use crate::interface::types::{FlowId, FrameMeta};
use crate::l2::lan::Sender;
use crate::l3::frame_builder::{TTL, header};
use crate::relay::Relay;
use crate::relay::errors::icmp_for;
use crate::relay::udp::{Refused, Way};
use crate::tables::flow::{Key, State};
use crate::util::account::count_bytes;
use guestnet_wire::frame::IpHeader;
use guestnet_wire::parse::Packet;
use guestnet_wire::{be16, icmp, icmp6, proto};
use std::net::{IpAddr, SocketAddr};

impl Relay {
    /// Handles an ICMP packet of a guest: an error about one of its flows, or an echo request, which is relayed if it is
    /// not for the gateway.
    ///
    /// # Errors
    /// Why it is dropped; the guest has been told, where it should be.
    pub fn icmp_out<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        from: Sender,
        frame: &mut [u8],
        p: &Packet,
        meta: FrameMeta,
    ) -> Result<(), DropReason> {
        let (kind, code) = match frame.get(p.l4..).and_then(|b| b.first_chunk()) {
            Some(&[kind, code]) => (kind, code),
            None => return Err(DropReason::Truncated),
        };
        let addressing = cx.link.lan.addressing();
        let own = addressing.is_own(p.dst);
        let (request, is_error) = match p.proto {
            proto::ICMPV6 => (icmp6::ECHO, icmp6::is_error(kind)),
            _ => (icmp::ECHO, icmp::is_error(kind)),
        };
        if is_error && (own || !addressing.subnet().contains(p.dst)) {
            return self.guest_error(cx, from.slot, frame, p);
        }
        if !own && cx.route_to_guest(from, frame, p, meta)? {
            return Ok(());
        }
        if kind != request || code != 0 {
            return Err(DropReason::UnsupportedProtocol);
        }
        let to_gateway = match p.dst {
            IpAddr::V4(ip) => ip == cx.gateway.address(),
            IpAddr::V6(_) => cx.link.lan.addressing().ends_here(p.dst),
        };
        if to_gateway {
            return cx.gateway.answer_echo(&mut cx.link, from, frame, p);
        }
        self.echo_out(cx, from, frame, p)
    }

    fn echo_out<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        from: Sender,
        frame: &[u8],
        p: &Packet,
    ) -> Result<(), DropReason> {
        // Before the table is asked: it files a mapping under zeros.
        if p.dst.is_unspecified() {
            return Err(DropReason::BadDestination);
        }
        let remote = SocketAddr::new(p.dst, 0);
        let key = Key { slot: from.slot, proto: p.proto, guest: SocketAddr::new(p.src, p.src_port), remote };
        let index = match self.flows.find(&key) {
            Some(index) => index,
            None => {
                let admitted = cx.outbound(from, frame, p, remote)?;
                match self.open_datagram(cx, key, from.mac, admitted) {
                    Ok(index) => index,
                    Err(Refused(why, e)) => {
                        return Err(cx.gateway.refuse(&mut cx.link, from, frame, p, why, e));
                    }
                }
            }
        };
        let ttl = cx.gateway.check_ttl(&mut cx.link, from, frame, p)?;
        let body = frame.get(p.payload..p.end).unwrap_or(&[]);
        let Some(Way::Mapping(mapping, target)) =
            self.note_out(index, from.mac, be16(frame, p.l3.saturating_add(4)), body.len())
        else {
            return Err(DropReason::NoFlow);
        };
        let Some(State::Mapping { sock, .. }) = self.flows.at(mapping).map(|m| &m.state) else {
            return Err(DropReason::NoFlow);
        };
        let seq = be16(frame, p.l4.saturating_add(6));
        let sent = cx.link.fx.ping_send(*sock, target.ip(), seq, body, ttl, p.dont_fragment);
        self.touch(cx.link.now, index);
        sent.map_err(|e| {
            cx.gateway.icmp_error(&mut cx.link, from, frame, p, icmp_for(e, p.ip_len()));
            DropReason::HostError
        })
    }

    /// Handles an echo reply that came in on a socket of a mapping. `ttl` is as it came from outside.
    pub fn echo_in<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        id: FlowId,
        from: IpAddr,
        seq: u16,
        ttl: u8,
        body: &[u8],
    ) {
        let slot = self.flows.get_mut(id).map(|f| f.key.slot);
        let done = self.echo_to_guest(cx, id, from, seq, ttl, body);
        if let Err(why) = done {
            match slot {
                Some(slot) => cx.link.lan.count_drop(slot, why),
                None => cx.link.lan.base_mut().drop(why),
            }
        }
    }

    fn echo_to_guest<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        id: FlowId,
        from: IpAddr,
        seq: u16,
        ttl: u8,
        body: &[u8],
    ) -> Result<(), DropReason> {
        let (index, remote) = self.admit_inbound(cx, id, SocketAddr::new(from, 0))?;
        let f = self.flows.at_mut(index).ok_or(DropReason::NoFlow)?;
        count_bytes(&mut f.bytes_in, body.len());
        f.packets_in = f.packets_in.saturating_add(1);
        let (slot, mac, guest) = (f.key.slot, f.mac, f.key.guest);
        self.touch(cx.link.now, index);
        let (src, dst) = (remote.ip(), guest.ip());
        let (i, s) = (guest.port().to_be_bytes(), seq.to_be_bytes());
        let b = cx.gateway.frames().transport(body.len().saturating_add(icmp::LEN))?;
        let rest = [i[0], i[1], s[0], s[1]];
        let (n, protocol) = match (src, dst) {
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                (icmp6::emit(b, (src, dst), (icmp6::ECHO_REPLY, 0), rest, body), proto::ICMPV6)
            }
            (IpAddr::V4(_), IpAddr::V4(_)) => (icmp::emit(b, icmp::ECHO_REPLY, 0, rest, body), proto::ICMP),
            _ => return Err(DropReason::UnsupportedProtocol),
        };
        let ttl = if ttl == 0 { TTL } else { ttl.saturating_sub(1).max(1) };
        let ip = IpHeader { ttl, ..header(src, dst, protocol) };
        cx.gateway.frames().send(&mut cx.link, slot, mac, ip, n, FrameMeta::default())
    }
}
