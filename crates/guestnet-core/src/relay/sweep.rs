//! Theory of operation: relayed flows after a change of the rules. Each flow of an older generation is judged again as if
//! it were opened now. One that is no longer allowed, or that would lead elsewhere, is cut: the connection is reset at both
//! ends, a datagram flow is closed. Connections to services of the gateway are not subject to rules.

use crate::context::Context;
use crate::interface::effects::Effects;
use crate::interface::stats::DropReason;
use crate::policy::sweep::Budget;
use crate::policy::{Direction, Request, RuleId, Verdict};
use crate::relay::Relay;
use crate::relay::port_forward::UNKNOWN;
use crate::relay::tcp::Fate;
use crate::tables::flow::State;

/// How many more visits a flow counts for that is judged by names.
const NAMED: u32 = 3;

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
            let Some(f) = self.flows.at(index) else { continue };
            if f.admitted == now_in_force || f.is_mapping() {
                continue;
            }
            let (slot, rule) = (f.key.slot, f.rule);
            if self.evidence.contains_key(&index) {
                budget.visit_many(NAMED);
            }
            match self.judge_old(cx, index).unwrap_or(Ok(rule)) {
                Ok(rule) => {
                    if let Some(f) = self.flows.at_mut(index) {
                        (f.admitted, f.rule) = (now_in_force, rule);
                    }
                }
                Err((request, reason, rule)) => {
                    let (name, shown) = self.names_of(index);
                    cx.report_names(slot, &request, reason, rule, name, shown);
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

impl Relay {
    /// Judges a flow of older rules: the rule that allows it, or why none does. `None`: no rule is about it.
    fn judge_old<E>(
        &self,
        cx: &mut Context<'_, E>,
        index: u32,
    ) -> Option<Result<RuleId, (Request, DropReason, RuleId)>> {
        let f = self.flows.at(index)?;
        let services = cx.link.lan.addressing().services();
        if f.direction == Direction::Outbound && services.find(f.key.proto, f.key.remote).is_some() {
            return None;
        }
        let (request, verdict) = self.judge_flow(cx, index, f);
        Some(match verdict {
            Verdict::Deny { reason, rule } => Err((request, reason, rule)),
            Verdict::Allow { target, rule } => match f.state {
                State::Datagram { target: was, .. } if target != was => {
                    Err((request, DropReason::Policy, rule))
                }
                _ => Ok(rule),
            },
            Verdict::Inspect { rule, .. } if self.is_inspected(index) => Ok(rule),
            Verdict::Inspect { rule, .. } => Err((request, DropReason::Policy, rule)),
            // A running flow is not asked about.
            Verdict::Ask { .. } | Verdict::Defer { .. } => Ok(f.rule),
        })
    }
}
