//! Theory of operation: a packet from a guest. Known connection or new one; what may not begin one is refused
//! before anything is kept. A packet for one of our own external addresses is turned round (RFC 4787 REQ-9):
//! the other guest sees the first one's external end.

use crate::interface::stats::DropReason;
use crate::nat::config::unicast;
use crate::nat::engine::{Admission, NatEngine};
use crate::nat::packet::fragments::{Fate, Rule, SetKey};
use crate::nat::packet::{self, End, Kind, View};
use crate::nat::table::records::{HAIRPIN, Key, deltas};
use crate::nat::{NatDirection, NatResult};
use guestnet_wire::{icmp, proto, tcp};

impl NatEngine {
    pub(super) fn outbound(&mut self, p: &mut [u8], v: &View) -> NatResult {
        match v.kind {
            Kind::Error => return self.error_outbound(p, v),
            Kind::Tail => return self.tail(p, v, NatDirection::Outbound),
            Kind::Flow | Kind::Query => {}
        }
        let k = v.out_key();
        let found = self.table.find_out(&k);
        let known = self.alive(found);
        if known.is_none() {
            if self.admission == Admission::Asks {
                return NatResult::New;
            }
            if let Some(result) = self.unfit(p, v) {
                return result;
            }
        }
        let turned = match known.and_then(|id| self.table.sessions.get(id)) {
            Some(s) => s.links.spare & HAIRPIN != 0,
            None => self.table.is_external(v.dst),
        };
        if let Some(result) = self.blocked(p, v, NatDirection::Outbound, NatDirection::Outbound.way(turned)) {
            return result;
        }
        if v.fragment.is_some() && !self.admit_first(v, NatDirection::Outbound) {
            return NatResult::Dropped(DropReason::Reassembly);
        }
        let id = match known {
            Some(id) => {
                self.stats.hits += 1;
                id
            }
            None => match self.begin(&k, v) {
                Ok(id) => id,
                Err(DropReason::NoFlow) => return NatResult::Dropped(DropReason::NoFlow),
                Err(why) => return self.refuse(p, why),
            },
        };
        let Some(source) = self.external_end(id) else { return NatResult::Dropped(DropReason::NoFlow) };
        let destination = if turned {
            match self.turned(p, v, source) {
                Ok(end) => Some(end),
                Err(why) => return NatResult::Dropped(why),
            }
        } else {
            None
        };
        self.advance(id, v, true);
        packet::rewrite(p, v.ihl, v.proto, true, source, true);
        if let Some(end) = destination {
            packet::rewrite(p, v.ihl, v.proto, false, end, true);
        }
        let rule = v.fragment.map(|_| Rule {
            src: Some(source.ip),
            dst: destination.map(|d| d.ip),
            id: None,
            hairpin: destination.is_some(),
        });
        let done = if destination.is_some() { NatResult::Hairpinned } else { NatResult::Translated };
        match rule {
            Some(rule) => self.first_done(p, v, NatDirection::Outbound, rule, done),
            None => self.finish(p, v, NatDirection::Outbound.way(destination.is_some()), done),
        }
    }

    /// Why a packet may not begin a connection.
    fn unfit(&mut self, p: &[u8], v: &View) -> Option<NatResult> {
        let c = &self.config;
        if !c.internal.has(v.src) || c.internal.has(v.dst) || c.no_nat.iter().any(|n| n.has(v.dst)) {
            return Some(NatResult::PassThrough);
        }
        if matches!(v.proto, proto::TCP | proto::UDP) && (v.sport == 0 || v.dport == 0) || !unicast(v.dst) {
            return Some(NatResult::Dropped(DropReason::BadDestination));
        }
        let known =
            matches!(v.proto, proto::TCP | proto::UDP | proto::ICMP | proto::GRE | proto::ESP | proto::SCTP);
        if !known {
            return Some(NatResult::Dropped(DropReason::UnsupportedProtocol));
        }
        if c.denied.iter().any(|n| n.has(v.dst)) {
            return Some(self.refuse(p, DropReason::Policy));
        }
        if !c.hairpin && self.table.is_external(v.dst) {
            return Some(NatResult::Dropped(DropReason::Policy));
        }
        None
    }

    fn begin(&mut self, k: &Key, v: &View) -> Result<u32, DropReason> {
        self.stats.misses += 1;
        let state = self.opening(v, true).ok_or(DropReason::NoFlow)?;
        let id = self.new_session(k, None, state)?;
        if v.proto == proto::TCP
            && v.flags & tcp::flags::SYN != 0
            && !self.unsolicited.is_empty()
            && let Some(s) = self.table.sessions.get(id)
        {
            // RFC 5382 REQ-4: both sides opened; the outside's SYN was not unsolicited after all.
            let (ip, port) = (s.ext_ip, s.ext_port);
            let of_it = |u: &Key| {
                u.local == ip
                    && u.local_port == port
                    && u.remote == k.remote
                    && u.remote_port == k.remote_port
            };
            self.unsolicited.retain(|u| !of_it(&u.key));
        }
        Ok(id)
    }

    /// The guest that a packet to one of our own addresses is for, as seen from `source`.
    ///
    /// An ICMP query names its destination by the one identifier that it has (RFC 5508 REQ-7): it goes to the
    /// guest whose mapping that is outside, with the sender's external identifier, by which the answer finds
    /// the way back. It never comes back to its sender.
    fn turned(&mut self, p: &[u8], v: &View, source: End) -> Result<End, DropReason> {
        let query = v.kind == Kind::Query;
        let key = Key {
            local: v.dst,
            remote: source.ip,
            local_port: v.dport,
            remote_port: if query { 0 } else { source.port },
            proto: v.proto,
        };
        let mut as_inbound = *v;
        as_inbound.src = source.ip;
        let (mut end, session) = self.inbound_end(&key, &as_inbound)?;
        if query && end.ip == v.src {
            return Err(DropReason::NoFlow);
        }
        if let Some(id) = session {
            self.advance(id, v, false);
        }
        if query {
            // Source and destination share the field, which has the external identifier by now.
            if p.get(v.ihl).is_some_and(|kind| icmp::is_request(*kind)) {
                end.port = source.port;
            }
            (_, end.delta_l4) = deltas(v.proto, (v.dst, source.port), (end.ip, end.port));
        }
        Ok(end)
    }

    // ---- fragments ----------------------------------------------------------------------------------

    pub(super) fn admit_first(&mut self, v: &View, direction: NatDirection) -> bool {
        let key = SetKey::new(v, direction);
        self.fragments.admit_first(key, (v.total - v.ihl) as u32, self.now)
    }

    /// A first fragment whose addresses are done: gives its packet an id of its own on the outside (RFC 6864
    /// 5.3.1), and lets those go that waited for it.
    pub(super) fn first_done(
        &mut self,
        p: &mut [u8],
        v: &View,
        direction: NatDirection,
        mut rule: Rule,
        done: NatResult,
    ) -> NatResult {
        let key = SetKey::new(v, direction);
        if direction == NatDirection::Outbound {
            rule.id = self.fragments.rule(&key).and_then(|r| r.id).or_else(|| {
                self.next_id = self.next_id.wrapping_add(1);
                Some(self.next_id)
            });
        }
        if let Some(id) = rule.id {
            packet::set_id(p, id);
        }
        let to = direction.way(rule.hairpin);
        let result = self.finish(p, v, to, done);
        for mut held in self.fragments.first(key, rule) {
            let Ok(hv) = packet::read(&held) else { continue };
            match self.follow(&mut held, &hv, direction, rule) {
                NatResult::Translated | NatResult::Hairpinned => {
                    let fits = self.output.push(to, v.src, held);
                    self.count(
                        if fits { done } else { NatResult::Dropped(DropReason::BufferLimit) },
                        direction,
                    );
                }
                other => self.count(other, direction),
            }
        }
        result
    }

    /// A later fragment.
    pub(super) fn tail(&mut self, p: &mut [u8], v: &View, direction: NatDirection) -> NatResult {
        let ours = match direction {
            NatDirection::Outbound => self.config.internal.has(v.src) && !self.config.internal.has(v.dst),
            NatDirection::Inbound => self.table.is_external(v.dst),
        };
        if !ours {
            return NatResult::PassThrough;
        }
        if let Some(result) = self.blocked(p, v, direction, self.way(direction, v.dst)) {
            return result;
        }
        let from = v.fragment.map_or(0, |f| f.0);
        let range = (from, from + (v.total - v.ihl) as u32);
        let whole = p.get(..v.total).unwrap_or(&[]);
        match self.fragments.tail(SetKey::new(v, direction), range, whole, self.now) {
            Fate::Known(rule) => self.follow(p, v, direction, rule),
            Fate::Held => NatResult::Held,
            Fate::Refused => NatResult::Dropped(DropReason::Reassembly),
        }
    }

    /// Does to a later fragment what was done to the first.
    fn follow(&mut self, p: &mut [u8], v: &View, direction: NatDirection, rule: Rule) -> NatResult {
        for (new, old, at_source) in [(rule.src, v.src, true), (rule.dst, v.dst, false)] {
            if let Some(ip) = new {
                let (delta_ip, _) = deltas(0, (old, 0), (ip, 0));
                packet::rewrite(
                    p,
                    v.ihl,
                    v.proto,
                    at_source,
                    End { ip, port: 0, delta_ip, delta_l4: 0 },
                    false,
                );
            }
        }
        if let Some(id) = rule.id {
            packet::set_id(p, id);
        }
        let done = if rule.hairpin { NatResult::Hairpinned } else { NatResult::Translated };
        self.finish(p, v, direction.way(rule.hairpin), done)
    }
}
