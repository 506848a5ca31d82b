//! Theory of operation: ICMP errors (RFC 5508 4). An error quotes a packet of ours as it looked on the side
//! where it met its end; the quote is put back to what the receiver of the error knows, at its addresses,
//! ports and checksums, and so is the error's own address. Errors refresh nothing, end nothing, and are
//! verified first: the outer ICMP checksum and the inner IP checksum, never the inner transport one, of
//! which mostly only a part was quoted; that a guest speaks of its own packets; that an MTU can be one.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use crate::interface::stats::DropReason;
use crate::nat::engine::NatEngine;
use crate::nat::packet::{self, End, View};
use crate::nat::table::records::{Key, deltas};
use crate::nat::{NatDirection, NatResult};
use crate::util::account::count;
use guestnet_wire::checksum::{checksum, fold, sum};
use guestnet_wire::icmp::unreachable::FRAG_NEEDED;
use guestnet_wire::{be16, be32, icmp, proto, put};

/// The packet that an error quotes.
struct Quote {
    /// Offset of its IP header in the error packet.
    at: usize,
    ihl: usize,
    src: u32,
    dst: u32,
    sport: u16,
    dport: u16,
    proto: u8,
}

fn quote(p: &[u8], v: &View) -> Result<Quote, DropReason> {
    let message = p.get(v.ihl..v.total).ok_or(DropReason::Truncated)?;
    if fold(sum(message, 0)) != 0xffff {
        return Err(DropReason::BadL4Checksum);
    }
    let too_big = (message.first(), message.get(1)) == (Some(&icmp::UNREACHABLE), Some(&FRAG_NEEDED));
    if too_big && !icmp::is_path_mtu(be16(message, 6)) {
        return Err(DropReason::Malformed);
    }
    let at = v.ihl.saturating_add(8);
    let q = message.get(8..).unwrap_or(&[]);
    let ihl = usize::from(q.first().copied().unwrap_or(0) & 15) * 4;
    if q.first().is_none_or(|b| b >> 4 != 4) || ihl < 20 {
        return Err(DropReason::Malformed);
    }
    let header = q.get(..ihl).ok_or(DropReason::Truncated)?;
    if fold(sum(header, 0)) != 0xffff {
        return Err(DropReason::BadIpChecksum);
    }
    let l4 = q.get(ihl..).and_then(|l4| l4.first_chunk::<8>()).ok_or(DropReason::Truncated)?;
    let proto_ = header[9];
    let (sport, dport) = match proto_ {
        // A quoted later fragment names no ports.
        _ if be16(header, 6) & 0x1fff != 0 => return Err(DropReason::NoFlow),
        proto::TCP | proto::UDP => (be16(l4, 0), be16(l4, 2)),
        proto::ICMP => match l4[0] {
            0 | 8 | 13..=18 => (be16(l4, 4), be16(l4, 4)),
            _ => return Err(DropReason::Malformed),
        },
        _ => (0, 0),
    };
    Ok(Quote { at, ihl, src: be32(header, 12), dst: be32(header, 16), sport, dport, proto: proto_ })
}

/// Puts one end of the quoted packet back, and completes the error's own checksum.
fn restore(p: &mut [u8], v: &View, q: &Quote, source: bool, end: End) {
    if let Some(inner) = p.get_mut(q.at..v.total) {
        // A transport checksum that the quote cut off is not there to be changed; `rewrite` leaves it.
        packet::rewrite(inner, q.ihl, q.proto, source, end, true);
    }
    let field = v.ihl.saturating_add(2);
    put(p, field, &[0, 0]);
    let c = checksum(p.get(v.ihl..v.total).unwrap_or(&[]));
    put(p, field, &c.to_be_bytes());
}

impl NatEngine {
    /// An error from outside about a guest's packet: the quote's source is ours.
    pub(in crate::nat) fn error_inbound(&mut self, p: &mut [u8], v: &View) -> NatResult {
        if !self.table.is_external(v.dst) {
            return NatResult::PassThrough;
        }
        if let Some(result) = self.blocked(p, v, NatDirection::Inbound, NatDirection::Inbound) {
            return result;
        }
        match self.enter_error(p, v) {
            Ok(()) => self.finish(p, v, NatDirection::Inbound, NatResult::Translated),
            Err(why) => NatResult::Dropped(why),
        }
    }

    fn enter_error(&mut self, p: &mut [u8], v: &View) -> Result<(), DropReason> {
        let q = quote(p, v)?;
        let key = Key {
            local: q.src,
            remote: q.dst,
            local_port: q.sport,
            remote_port: if q.proto == proto::ICMP { 0 } else { q.dport },
            proto: q.proto,
        };
        let found = self.table.find_in(&key);
        let inner = match self.alive(found).and_then(|id| self.table.sessions.get(id)) {
            Some(s) => (s.int_ip, s.int_port),
            None => {
                let m =
                    self.table.mapping_in(key.local, key.local_port, key.proto).ok_or(DropReason::NoFlow)?;
                self.table.mappings.get(m).map(|m| (m.int_ip, m.int_port)).ok_or(DropReason::NoFlow)?
            }
        };
        count(&mut self.stats.hits);
        let (delta_ip, delta_l4) = deltas(q.proto, (q.src, q.sport), inner);
        restore(p, v, &q, true, End { ip: inner.0, port: inner.1, delta_ip, delta_l4 });
        let (delta_ip, _) = deltas(0, (v.dst, 0), (inner.0, 0));
        packet::rewrite(p, v.ihl, 0, false, End { ip: inner.0, port: 0, delta_ip, delta_l4: 0 }, false);
        Ok(())
    }

    /// An error from a guest about a packet from outside: the quote's destination is the guest.
    pub(in crate::nat) fn error_outbound(&mut self, p: &mut [u8], v: &View) -> NatResult {
        let c = &self.config;
        if !c.internal.has(v.src) || c.internal.has(v.dst) || c.no_nat.iter().any(|n| n.has(v.dst)) {
            return NatResult::PassThrough;
        }
        let turned = self.table.is_external(v.dst);
        if let Some(result) = self.blocked(p, v, NatDirection::Outbound, NatDirection::Outbound.way(turned)) {
            return result;
        }
        // Two steps that can each fail; the bytes are put back if the second does.
        let before = if turned { p.to_vec() } else { Vec::new() };
        if let Err(why) = self.leave_error(p, v) {
            return NatResult::Dropped(why);
        }
        if turned {
            let inward = packet::read(p).and_then(|w| self.enter_error(p, &w));
            if let Err(why) = inward {
                p.copy_from_slice(&before);
                return NatResult::Dropped(why);
            }
            return self.finish(p, v, NatDirection::Inbound, NatResult::Hairpinned);
        }
        self.finish(p, v, NatDirection::Outbound, NatResult::Translated)
    }

    fn leave_error(&mut self, p: &mut [u8], v: &View) -> Result<(), DropReason> {
        let q = quote(p, v)?;
        // Guests trust each other with nothing, and none is a router: it speaks of packets that it got itself.
        if q.dst != v.src {
            return Err(DropReason::SpoofedSource);
        }
        let key = Key {
            local: q.dst,
            remote: q.src,
            local_port: q.dport,
            remote_port: if q.proto == proto::ICMP { 0 } else { q.sport },
            proto: q.proto,
        };
        let found = self.table.find_out(&key);
        let outer = match self.alive(found).and_then(|id| self.table.sessions.get(id)) {
            Some(s) => (s.ext_ip, s.ext_port),
            None => {
                let m = self.table.mapping_out(&key).ok_or(DropReason::NoFlow)?;
                self.table.mappings.get(m).map(|m| (m.ext_ip, m.ext_port)).ok_or(DropReason::NoFlow)?
            }
        };
        count(&mut self.stats.hits);
        let (delta_ip, delta_l4) = deltas(q.proto, (q.dst, q.dport), outer);
        restore(p, v, &q, false, End { ip: outer.0, port: outer.1, delta_ip, delta_l4 });
        let (delta_ip, _) = deltas(0, (v.src, 0), (outer.0, 0));
        packet::rewrite(p, v.ihl, 0, true, End { ip: outer.0, port: 0, delta_ip, delta_l4: 0 }, false);
        Ok(())
    }
}
