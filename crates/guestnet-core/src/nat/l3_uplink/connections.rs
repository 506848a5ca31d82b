//! Theory of operation: the life of a translated connection, beside what the engine keeps: it is counted at its port and
//! reported when it begins and when it ends, judged again after a change of the rules, and cut when they no longer allow it.

use super::{L3, L3Uplink, Opened, Pinned, TRANSLATED, deliver};
use crate::context::Context;
use crate::interface::effects::{Effects, Event};
use crate::interface::stats::DropReason;
use crate::interface::types::{FlowId, FrameMeta, PortId};
use crate::nat::cut_connections;
use crate::nat::{Connection, NatDirection, NatEvent};
use crate::policy::sweep::Budget;
use crate::policy::{Direction, Request, RuleId, Verdict};
use guestnet_wire::proto;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

impl L3Uplink {
    // ---- changes of the rules -----------------------------------------------------------------------

    /// Judges connections again, from number `at` on. Returns where to go on, or `None` at the end.
    pub(crate) fn judge_again<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        at: u32,
        budget: &mut Budget,
    ) -> Option<u32> {
        let now_in_force = cx.policy.generation();
        let mut next = None;
        for id in at..self.opened.len() as u32 {
            if !budget.visit() {
                next = Some(id);
                break;
            }
            let Some(o) = self.opened.get(id as usize).filter(|o| o.admitted != now_in_force) else {
                continue;
            };
            let (slot, inbound) = (o.slot, o.inbound);
            let Some(c) = self.engine.connection(id) else { continue };
            let port = slot.and_then(|s| cx.link.lan.port(s)).map_or(PortId(u32::MAX), |p| p.id);
            let (guest, remote) = (SocketAddr::from(c.internal), SocketAddr::from(c.remote));
            let (direction, source, destination) = match inbound {
                true => (Direction::Inbound(self.entry(c.proto, c.external)), remote, guest),
                false => (Direction::Outbound, guest, remote),
            };
            let request = Request { direction, endpoint: port, protocol: c.proto, source, destination };
            let verdict = match slot {
                Some(slot) if !inbound => cx.policy.judge_unread(cx.link.now, slot, &request),
                _ => cx.policy.judge(&request),
            };
            match verdict {
                Verdict::Allow { rule, .. } => {
                    if let Some(o) = self.opened.get_mut(id as usize) {
                        (o.admitted, o.rule) = (now_in_force, rule);
                    }
                }
                // A running flow is not asked about.
                Verdict::Ask { .. } | Verdict::Defer { .. } => {
                    if let Some(o) = self.opened.get_mut(id as usize) {
                        o.admitted = now_in_force;
                    }
                }
                Verdict::Deny { rule, .. } | Verdict::Inspect { rule, .. } => {
                    let reason = match verdict {
                        Verdict::Deny { reason, .. } => reason,
                        _ => DropReason::Policy,
                    };
                    if let Some(slot) = slot {
                        cx.report(slot, &request, reason, rule);
                    }
                    self.cut(cx, id, &c);
                    budget.cut();
                }
            }
        }
        self.after(cx);
        next
    }

    pub(super) fn cut<E: Effects>(&mut self, cx: &mut Context<'_, E>, id: u32, c: &Connection) {
        self.engine.end_connection(id);
        if c.proto == proto::TCP {
            self.cut.add(cx.link.now, c.external, c.remote);
            // Best effort: an end that does not get the probe is reset when it sends.
            let _sent =
                cx.link.fx.uplink(&cut_connections::probe(c.external, c.remote), FrameMeta::default());
            let mut frame = cut_connections::probe(c.remote, c.internal);
            let _delivered = deliver(cx, &mut frame, FrameMeta::default());
        }
    }

    // ---- what follows -------------------------------------------------------------------------------

    /// After each call of the engine: what it has to send itself, and what began and ended.
    pub(super) fn after<E: Effects>(&mut self, cx: &mut Context<'_, E>) {
        while let Some(ip) = self.left.pop() {
            self.engine.end_endpoint(ip);
        }
        if self.engine.output_len() > 0 {
            self.send_output(cx);
        }
        let mut news = std::mem::take(&mut self.news);
        self.engine.take_events(&mut news);
        for n in news.drain(..) {
            match n {
                NatEvent::Began { id, inbound } => self.connection_began(cx, id, inbound),
                NatEvent::Ended { id, bytes_out, bytes_in } => {
                    self.connection_ended(cx, id, bytes_out, bytes_in);
                }
            }
        }
        self.news = news;
    }

    pub(super) fn send_output<E: Effects>(&mut self, cx: &mut Context<'_, E>) {
        let mut frame = std::mem::take(&mut self.frame);
        while let Some((direction, packet)) = self.engine.poll_output() {
            frame.clear();
            frame.resize(L3, 0);
            frame.extend_from_slice(&packet);
            let done = match direction {
                NatDirection::Outbound => {
                    cx.link.fx.uplink(&frame, FrameMeta::default()).map_err(|_| DropReason::HostError)
                }
                NatDirection::Inbound => deliver(cx, &mut frame, FrameMeta::default()),
            };
            if let Err(why) = done {
                cx.link.lan.base_mut().drop(why);
            }
        }
        self.frame = frame;
    }

    pub(super) fn connection_began<E: Effects>(&mut self, cx: &mut Context<'_, E>, id: u32, inbound: bool) {
        let Some(c) = self.engine.connection(id) else { return };
        let slot = cx.link.lan.neighbour(IpAddr::V4(*c.internal.ip())).map(|b| b.slot);
        self.generation = self.generation.wrapping_add(1);
        let admitted = cx.policy.generation();
        let (generation, rule, at) = (self.generation, self.rule, cx.link.now);
        let remote = IpAddr::V4(*c.remote.ip());
        let name = slot.filter(|_| !inbound).and_then(|s| cx.policy.pins.of(s, remote).first());
        let name: Option<Arc<str>> = name.map(|n| n.to_string().into());
        if let (Some(slot), Some(name)) = (slot, &name)
            && cx.policy.pins.hold(slot, remote)
        {
            self.pinned.insert(id, Pinned { slot, remote, name: name.clone() });
        }
        let opened = Opened { slot, generation, admitted, rule, at, inbound };
        if self.opened.len() <= id as usize {
            self.opened.resize(id as usize + 1, Opened::default());
        }
        if let Some(o) = self.opened.get_mut(id as usize) {
            *o = opened;
        }
        let Some((port, _, counters)) = slot.and_then(|s| cx.link.lan.port_and_counters(s)) else {
            cx.link.lan.base_mut().flows_opened += 1;
            return;
        };
        counters.flows_opened += 1;
        if let Some(n) = slot.and_then(|s| self.translated.get_mut(s)) {
            *n += 1;
        }
        let reported = cx.link.fx.event(Event::FlowOpened {
            flow: FlowId { index: TRANSLATED | id, generation: opened.generation },
            port,
            proto: c.proto,
            guest: c.internal.into(),
            remote: c.remote.into(),
            inbound,
            rule: (rule != RuleId::NONE).then(|| cx.policy.label(port, rule)),
            name,
        });
        if !reported {
            counters.drop(DropReason::EventRingFull);
        }
    }

    pub(super) fn connection_ended<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        id: u32,
        out: u64,
        inn: u64,
    ) {
        let Some(o) = self.opened.get_mut(id as usize).map(std::mem::take) else { return };
        let pinned = if self.pinned.is_empty() { None } else { self.pinned.remove(&id) };
        if let Some(Pinned { slot, remote, .. }) = pinned {
            cx.policy.pins.release(slot, remote);
        }
        let Some((port, _, counters)) = o.slot.and_then(|s| cx.link.lan.port_and_counters(s)) else {
            cx.link.lan.base_mut().flows_closed += 1;
            return;
        };
        counters.flows_closed += 1;
        if let Some(n) = o.slot.and_then(|s| self.translated.get_mut(s)) {
            *n = n.saturating_sub(1);
        }
        let flow = FlowId { index: TRANSLATED | id, generation: o.generation };
        let current = o.rule != RuleId::NONE && o.admitted == cx.policy.generation();
        let closed = Event::FlowClosed {
            flow,
            port,
            bytes_out: out,
            bytes_in: inn,
            packets_out: None,
            packets_in: None,
            rule: current.then(|| cx.policy.label(port, o.rule)),
            name: pinned.map(|p| p.name),
            shown: None,
        };
        if !cx.link.fx.event(closed) {
            counters.drop(DropReason::EventRingFull);
        }
    }
}
