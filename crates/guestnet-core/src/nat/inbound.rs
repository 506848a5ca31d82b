//! Theory of operation: a packet from outside. It is for a guest when it belongs to a connection, or when the
//! mapping of its destination lets its sender in. UDP and ICMP let in by a mapping alone leave no state:
//! nobody outside can fill the table. TCP has state from its SYN on, counted against the guest's cap, and so
//! has UDP to a published port, whose answers must leave from that very port.

use crate::interface::stats::DropReason;
use crate::nat::engine::{Admission, MAX_UNSOLICITED, NatEngine, UnsolicitedSyn};
use crate::nat::packet::fragments::Rule;
use crate::nat::packet::{self, End, Kind, View};
use crate::nat::table::records::{Key, deltas};
use crate::nat::{NatDirection, NatResult};
use guestnet_wire::{proto, tcp};

impl NatEngine {
    pub(super) fn inbound(&mut self, p: &mut [u8], v: &View) -> NatResult {
        match v.kind {
            Kind::Error => return self.error_inbound(p, v),
            Kind::Tail => return self.tail(p, v, NatDirection::Inbound),
            Kind::Flow | Kind::Query => {}
        }
        let k = v.in_key();
        let found = self.table.find_in(&k);
        let known = self.alive(found);
        if known.is_none() && !self.table.is_external(v.dst) {
            return NatResult::PassThrough;
        }
        if known.is_none() {
            // Looked at before TTL and size, so that a port that is closed answers nothing.
            match self.may_enter(&k, v) {
                Ok(mapping) => self.entered = mapping,
                Err(why) => {
                    self.note_unsolicited(p, v, &k);
                    self.stats.misses += 1;
                    return NatResult::Dropped(why);
                }
            }
            if self.admission == Admission::Asks {
                return NatResult::New;
            }
        }
        if let Some(result) = self.blocked(p, v, NatDirection::Inbound, NatDirection::Inbound) {
            return result;
        }
        if v.fragment.is_some() && !self.admit_first(v, NatDirection::Inbound) {
            return NatResult::Dropped(DropReason::Reassembly);
        }
        let (end, session) = match self.inbound_end(&k, v) {
            Ok(got) => got,
            Err(why) => return NatResult::Dropped(why),
        };
        if let Some(id) = session {
            self.advance(id, v, false);
        }
        packet::rewrite(p, v.ihl, v.proto, false, end, true);
        if v.fragment.is_some() {
            let rule = Rule { src: None, dst: Some(end.ip), id: None, hairpin: false };
            return self.first_done(p, v, NatDirection::Inbound, rule, NatResult::Translated);
        }
        self.finish(p, v, NatDirection::Inbound, NatResult::Translated)
    }

    /// The mapping through which a packet without connection may enter.
    fn may_enter(&mut self, k: &Key, v: &View) -> Result<u32, DropReason> {
        // What is over but not yet collected must not keep a mapping open.
        let settled = self.settle();
        let m = self.table.mapping_in(k.local, k.local_port, k.proto).ok_or(DropReason::NoFlow)?;
        if k.proto == proto::TCP && self.opening(v, false).is_none() {
            return Err(DropReason::NoFlow);
        }
        let published = self.table.mappings.get(m).is_some_and(|m| m.published);
        if !published && !settled || !self.table.lets_in(m, k.remote) {
            return Err(DropReason::Filtered);
        }
        Ok(m)
    }

    /// The internal end of an inbound packet, and its session where it has one.
    pub(super) fn inbound_end(&mut self, k: &Key, v: &View) -> Result<(End, Option<u32>), DropReason> {
        let found = self.table.find_in(k);
        if let Some(id) = self.alive(found) {
            self.stats.hits += 1;
            let s = self.table.sessions.get(id).ok_or(DropReason::NoFlow)?;
            let end = End {
                ip: s.int_ip,
                port: s.int_port,
                // One's complement: undoing is adding the complement.
                delta_ip: !s.delta_ip,
                delta_l4: !s.delta_l4,
            };
            return Ok((end, Some(id)));
        }
        self.stats.misses += 1;
        let m = self.may_enter(k, v)?;
        let mapping = self.table.mappings.get(m).copied().ok_or(DropReason::NoFlow)?;
        let (delta_ip, delta_l4) =
            deltas(k.proto, (k.local, k.local_port), (mapping.int_ip, mapping.int_port));
        let end = End { ip: mapping.int_ip, port: mapping.int_port, delta_ip, delta_l4 };
        if k.proto != proto::TCP && !mapping.published {
            return Ok((end, None));
        }
        let state = self.opening(v, false).ok_or(DropReason::NoFlow)?;
        let inside = Key { local: mapping.int_ip, local_port: mapping.int_port, ..*k };
        // The guest may have this very five-tuple already, under another external port.
        let taken = self.table.find_out(&inside);
        if self.alive(taken).is_some() {
            return Err(DropReason::Filtered);
        }
        let id = self.new_session(&inside, Some(m), state)?;
        Ok((end, Some(id)))
    }

    /// RFC 5382 REQ-4: an unsolicited SYN is remembered for a while before it is refused.
    fn note_unsolicited(&mut self, p: &[u8], v: &View, k: &Key) {
        let syn = v.flags & (tcp::flags::SYN | tcp::flags::ACK | tcp::flags::RST) == tcp::flags::SYN;
        if k.proto == proto::TCP
            && v.kind == Kind::Flow
            && syn
            && self.config.answer_unsolicited_syn
            && self.unsolicited.len() < MAX_UNSOLICITED
            && !self.unsolicited.iter().any(|u| u.key == *k)
        {
            let wait = u64::from(self.config.timeouts.unsolicited_syn) * 1_000_000_000;
            let until = self.now.saturating_add(wait);
            let quote = p.get(..v.total.min(v.ihl + 40)).unwrap_or(&[]).to_vec();
            self.unsolicited.push_back(UnsolicitedSyn { until, key: *k, quote });
        }
    }
}
