//! Theory of operation: relayed flows after a change of the rules. Each flow of an older generation is judged again as if
//! it were opened now. One that is no longer allowed, or that would lead elsewhere, is cut: the connection is reset at both
//! ends, a datagram flow is closed. Connections to services of the gateway are not subject to rules.

use crate::context::Context;
use crate::interface::effects::Effects;
use crate::interface::stats::DropReason;
use crate::interface::types::PortId;
use crate::policy::sweep::Budget;
use crate::policy::{Direction, Request, RuleId, Verdict};
use crate::relay::Relay;
use crate::relay::port_forward::UNKNOWN;
use crate::relay::tcp::Fate;
use crate::tables::flow::{Flow, State};

impl Relay {
    /// Judges flows again, from slot `at` of the flow table on. Returns where to go on, or `None` at the end.
    pub fn judge_again<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        at: u32,
        budget: &mut Budget,
    ) -> Option<u32> {
        let now_in_force = cx.policy.generation();
        for index in at..self.flows.end() {
            if !budget.visit() {
                return Some(index);
            }
            let Some(f) = self.flows.at_mut(index) else { continue };
            if f.admitted == now_in_force || f.is_mapping() {
                continue;
            }
            match verdict(cx, f) {
                None => f.admitted = now_in_force,
                Some((request, reason, rule)) => {
                    let slot = f.key.slot;
                    cx.report(slot, &request, reason, rule);
                    self.cut(cx, index);
                    budget.cut();
                }
            }
        }
        None
    }

    fn cut<E: Effects>(&mut self, cx: &mut Context<'_, E>, index: u32) {
        let Some(f) = self.flows.at(index) else { return };
        if matches!(f.state, State::Tcp(_)) && f.mac != UNKNOWN {
            self.with_index(cx, index, |tcb, cx| {
                tcb.abort(cx);
                Fate::Closed
            });
        } else {
            // Its guest has heard nothing of it, or hears when it sends.
            self.close_flow(cx, index);
        }
    }
}

/// Why a flow is not allowed any more; `None` when it is.
fn verdict<E>(cx: &Context<'_, E>, f: &Flow) -> Option<(Request, DropReason, RuleId)> {
    let key = &f.key;
    let services = cx.link.lan.addressing().services();
    if f.direction == Direction::Outbound && services.find(key.proto, key.remote).is_some() {
        return None;
    }
    let (source, destination) =
        if f.direction.is_inbound() { (key.remote, key.guest) } else { (key.guest, key.remote) };
    let endpoint = cx.link.lan.port(key.slot).map_or(PortId(u32::MAX), |p| p.id);
    let request = Request { direction: f.direction, endpoint, protocol: key.proto, source, destination };
    match (cx.policy.judge(&request), &f.state) {
        (Verdict::Deny { reason, rule }, _) => Some((request, reason, rule)),
        (Verdict::Allow { target, rule }, State::Datagram { target: was, .. }) if target != *was => {
            Some((request, DropReason::Policy, rule))
        }
        (Verdict::Inspect { rule, .. } | Verdict::Ask { rule, .. }, _) => {
            Some((request, DropReason::Policy, rule))
        }
        (Verdict::Allow { .. } | Verdict::Defer { .. }, _) => None,
    }
}
