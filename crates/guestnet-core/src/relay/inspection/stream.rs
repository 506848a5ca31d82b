//! Inspection of TCP flows: what follows from what a conversation shows. See [the module above](super).

use super::conversation::{Conversation, Found, Shown};
use super::evidence::{Inspection, text};
use super::held_datagrams::WAIT_MS;
use super::{refused, request_of};
use crate::context::Context;
use crate::interface::effects::Effects;
use crate::interface::stats::DropReason;
use crate::interface::types::FlowId;
use crate::policy::spec::Ech;
use crate::policy::{self, Request, RuleId, Verdict};
use crate::relay::Relay;
use crate::relay::tcp::Fate;
use crate::tables::flow::State;
use crate::util::account::{charge, release};
use guestnet_wire::inspect::{alert_access_denied, forbidden_response};

/// Requests of one connection that are judged in one batch; the others have their turn in the next.
const LOOKS: usize = 64;
/// How long a refused flow may take to read its last words, in milliseconds.
const LAST_WORDS_MS: u64 = 10_000;

/// Why a conversation is refused.
struct Refusal {
    request: Request,
    reason: DropReason,
    rule: RuleId,
}

impl Relay {
    /// The server of a flow has answered: from now on its guest is waited for.
    pub(in crate::relay) fn inspection_begins<E: Effects>(&mut self, cx: &mut Context<'_, E>, id: FlowId) {
        let strict = self.inspection_mut(id.index).is_some_and(|i| i.strict);
        if strict && self.flows.get_mut(id).is_some() {
            self.wait_for_guest(cx, id.index, true);
        }
    }

    fn inspection_mut(&mut self, index: u32) -> Option<&mut Inspection> {
        self.evidence.get_mut(&index)?.inspection.as_deref_mut()
    }

    /// The guest has so long for what it has begun, or `waits` for nothing.
    fn wait_for_guest<E>(&mut self, cx: &Context<'_, E>, index: u32, waits: bool) {
        let Some(f) = self.flows.at_mut(index) else { return };
        if !waits {
            f.expires = u64::MAX;
        } else if f.expires == u64::MAX {
            f.expires = cx.link.now.as_ms().saturating_add(WAIT_MS);
            let at = f.expires;
            self.wake_at(index, at);
        }
    }

    /// Looks at what a flow holds back, and lets it pass or refuses it.
    #[cold]
    pub(in crate::relay) fn look<E: Effects>(&mut self, cx: &mut Context<'_, E>, index: u32) {
        for _ in 0..LOOKS {
            if !self.look_once(cx, index) {
                return;
            }
        }
        // The rest is looked at in the next batch.
        self.with_index(cx, index, |tcb, _| {
            tcb.look_again();
            Fate::Live
        });
    }

    /// Looks at what a flow holds back, to the end of a ClientHello or request. True when there may be more.
    fn look_once<E: Effects>(&mut self, cx: &mut Context<'_, E>, index: u32) -> bool {
        let Some(State::Tcp(tcb)) = self.flows.at(index).map(|f| &f.state) else { return false };
        let inspection = self.evidence.get_mut(&index).and_then(|e| e.inspection.as_deref_mut());
        let (Some(held), Some(inspection)) = (tcb.held(), inspection) else {
            // Nobody reads it: nothing is held back.
            self.with_index(cx, index, |tcb, cx| tcb.end_hold(cx));
            return false;
        };
        let found = inspection.conversation.read(&held);
        let begun = !held.is_empty();
        self.settle_inspection(index);
        match found {
            Found::Nothing { pass, wait } => {
                let opens = pass > 0 || self.inspection_mut(index).is_some_and(|i| i.judged.is_some());
                self.with_index(cx, index, |tcb, cx| match tcb.note_seen(cx) {
                    Fate::Live if opens => tcb.let_pass(cx, pass),
                    fate => fate,
                });
                let silent =
                    !begun && self.inspection_mut(index).is_some_and(|i| i.strict && i.judged.is_none());
                self.wait_for_guest(cx, index, wait || silent);
                false
            }
            Found::Name(shown) => self.judge_shown(cx, index, shown),
            Found::Opaque => {
                self.judge_nothing(cx, index);
                false
            }
            Found::Malformed(_) => {
                self.refuse_unread(cx, index);
                false
            }
        }
    }

    /// A ClientHello or request shows a name, or that it has none. True when it is allowed.
    fn judge_shown<E: Effects>(&mut self, cx: &mut Context<'_, E>, index: u32, shown: Shown) -> bool {
        let Some(f) = self.flows.at(index) else { return false };
        let request = request_of(cx, f);
        let slot = f.key.slot;
        let generation = cx.policy.generation();
        let name = shown.name.as_deref().unwrap_or(&[]);
        let Some(evidence) = self.evidence.get_mut(&index) else { return false };
        let Some(inspection) = evidence.inspection.as_deref() else { return false };
        let same = inspection.judged.is_some() && evidence.shown.as_deref().map(str::as_bytes) == Some(name);
        if matches!(inspection.conversation, Conversation::Tls(_)) && !same {
            // The second ClientHello must be for the same name (RFC 8446 4.1.2).
            let refusal = Refusal { request, reason: DropReason::Policy, rule: inspection.rule };
            evidence.shown = Some(text(name));
            self.refuse(cx, index, refusal);
            return false;
        }
        let hides =
            shown.ech && cx.policy.table(request.endpoint).is_some_and(|t| t.options().ech == Ech::Deny);
        let rule = inspection.rule;
        let is_judged = same && inspection.judged == Some(generation);
        evidence.shown = Some(text(name));
        let verdict = match is_judged {
            _ if hides => Verdict::Deny { reason: DropReason::HiddenName, rule },
            true => Verdict::Allow { target: request.destination, rule },
            false => {
                let shown = if name.is_empty() { policy::Shown::Nothing } else { policy::Shown::Name(name) };
                cx.policy.judge_pinned(cx.link.now, slot, &request, shown).after_asking(rule)
            }
        };
        match verdict {
            Verdict::Allow { rule, .. } => {
                self.note_allowed(index, rule, generation, shown.switches);
                self.let_pass(cx, index, shown.pass, shown.switches)
            }
            verdict => {
                self.refuse_by(cx, index, request, &verdict);
                false
            }
        }
    }

    fn note_allowed(&mut self, index: u32, rule: RuleId, generation: policy::Generation, switches: bool) {
        if let Some(f) = self.flows.at_mut(index) {
            (f.rule, f.admitted, f.expires) = (rule, generation, u64::MAX);
        }
        if let Some(inspection) = self.inspection_mut(index) {
            inspection.rule = rule;
            inspection.judged = Some(generation);
            inspection.conversation.allowed(switches);
        }
    }

    /// Lets bytes pass. True when the flow lives and there may be more to look at.
    fn let_pass<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        index: u32,
        bytes: usize,
        switches: bool,
    ) -> bool {
        let mut awaits = false;
        let fate = self.with_index(cx, index, |tcb, cx| {
            let fate = tcb.let_pass_only(cx, bytes);
            awaits = switches && fate == Fate::Live && tcb.await_answer(cx);
            fate
        });
        if switches
            && !awaits
            && let Some(inspection) = self.inspection_mut(index)
        {
            inspection.conversation.does_not_switch();
        }
        fate == Some(Fate::Live)
    }

    /// A conversation shows no name, and will show none: it is another protocol, or the client is silent.
    fn judge_nothing<E: Effects>(&mut self, cx: &mut Context<'_, E>, index: u32) {
        let Some(f) = self.flows.at(index) else { return };
        let (request, slot, opened_by) = (request_of(cx, f), f.key.slot, f.rule);
        let generation = cx.policy.generation();
        let judged = self.inspection_mut(index).is_some_and(|i| i.judged.is_some());
        if !judged {
            if let Some(evidence) = self.evidence.get_mut(&index) {
                evidence.shown = Some(text(&[]));
            }
            let verdict = cx.policy.judge_pinned(cx.link.now, slot, &request, policy::Shown::Nothing);
            match verdict.after_asking(opened_by) {
                Verdict::Allow { rule, .. } => self.note_allowed(index, rule, generation, false),
                verdict => return self.refuse_by(cx, index, request, &verdict),
            }
        }
        self.end_inspection(index);
        self.with_index(cx, index, |tcb, cx| tcb.end_hold(cx));
    }

    /// The inspection of a flow is over, and it is an ordinary one.
    fn end_inspection(&mut self, index: u32) {
        let Some(f) = self.flows.at_mut(index) else { return };
        f.expires = u64::MAX;
        let slot = f.key.slot;
        let Some(mut inspection) = self.evidence.get_mut(&index).and_then(|e| e.inspection.take()) else {
            return;
        };
        self.charge_inspection(slot, &mut inspection, 0);
    }

    /// The time of a guest that is waited for is over.
    pub(in crate::relay) fn inspection_due<E: Effects>(&mut self, cx: &mut Context<'_, E>, index: u32) {
        let Some(f) = self.flows.at_mut(index) else { return };
        f.expires = u64::MAX;
        let State::Tcp(tcb) = &f.state else { return };
        let begun = tcb.held().is_some_and(|h| !h.is_empty());
        match self.inspection_mut(index).map(|i| &i.conversation) {
            None => {}
            Some(Conversation::Refused) => {
                self.with_index(cx, index, |tcb, cx| {
                    tcb.abort(cx);
                    Fate::Closed
                });
            }
            Some(Conversation::Begins(_)) if !begun => self.judge_silent(cx, index),
            Some(_) if begun => self.refuse_unread(cx, index),
            Some(_) => {}
        }
    }

    /// The guest says nothing. Where that is allowed, the server may speak, and what the guest says then is still looked at.
    fn judge_silent<E: Effects>(&mut self, cx: &mut Context<'_, E>, index: u32) {
        let Some(f) = self.flows.at(index) else { return };
        let (request, slot, opened_by) = (request_of(cx, f), f.key.slot, f.rule);
        let verdict = cx.policy.judge_pinned(cx.link.now, slot, &request, policy::Shown::Nothing);
        match verdict.after_asking(opened_by) {
            Verdict::Allow { .. } => {
                if let Some(inspection) = self.inspection_mut(index) {
                    inspection.strict = false;
                }
                self.with_index(cx, index, |tcb, cx| tcb.let_peer_pass(cx));
            }
            verdict => self.refuse_by(cx, index, request, &verdict),
        }
    }

    /// A conversation that cannot be understood is refused, by what the policy says of one without a name if that is a
    /// refusal.
    fn refuse_unread<E: Effects>(&mut self, cx: &mut Context<'_, E>, index: u32) {
        let Some(f) = self.flows.at(index) else { return };
        let (request, slot, rule) = (request_of(cx, f), f.key.slot, f.rule);
        let refusal = match cx.policy.judge_pinned(cx.link.now, slot, &request, policy::Shown::Nothing) {
            Verdict::Deny { reason, rule } => Refusal { request, reason, rule },
            _ => Refusal { request, reason: DropReason::NotUnderstood, rule },
        };
        self.refuse(cx, index, refusal);
    }

    fn refuse_by<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        index: u32,
        request: Request,
        verdict: &Verdict,
    ) {
        let refusal = match *verdict {
            Verdict::Deny { reason, rule } => Refusal { request, reason, rule },
            Verdict::Inspect { rule, .. } | Verdict::Ask { rule, .. } | Verdict::Allow { rule, .. } => {
                Refusal { request, reason: DropReason::Policy, rule }
            }
            Verdict::Defer { .. } => Refusal { request, reason: DropReason::Policy, rule: RuleId::NONE },
        };
        self.refuse(cx, index, refusal);
    }

    /// Refuses a flow: tells the guest, the server and the control side.
    fn refuse<E: Effects>(&mut self, cx: &mut Context<'_, E>, index: u32, refusal: Refusal) {
        let Some(f) = self.flows.at(index) else { return };
        let (slot, remote) = (f.key.slot, f.key.remote);
        let Refusal { request, reason, rule } = refusal;
        let Some(evidence) = self.evidence.get_mut(&index) else { return };
        let shown = evidence.shown.clone().filter(|s| !s.is_empty());
        cx.report_names(slot, &request, reason, rule, evidence.name.clone(), shown.clone());
        cx.link.lan.count_drop(slot, reason);
        let words = match evidence.inspection.as_deref().map(|i| &i.conversation) {
            Some(Conversation::Http(_) | Conversation::Switching(_)) => {
                let label = cx.policy.label(request.endpoint, rule);
                forbidden_response(&refused::json(&label, reason.name(), remote, shown.as_deref()))
            }
            Some(Conversation::Tls(_)) => alert_access_denied().to_vec(),
            Some(Conversation::Begins(s)) if s.is_tls() => alert_access_denied().to_vec(),
            _ => Vec::new(),
        };
        if let Some(inspection) = evidence.inspection.as_deref_mut() {
            inspection.conversation = Conversation::Refused;
        }
        self.settle_inspection(index);
        self.with_index(cx, index, |tcb, cx| {
            if words.is_empty() {
                tcb.abort(cx);
                return Fate::Closed;
            }
            tcb.answer(cx, &words)
        });
        if let Some(f) = self.flows.at_mut(index) {
            f.expires = cx.link.now.as_ms().saturating_add(LAST_WORDS_MS);
            let at = f.expires;
            self.wake_at(index, at);
        }
    }

    /// Charges what the inspection of a flow holds to the guest's budget.
    fn settle_inspection(&mut self, index: u32) {
        let Some(slot) = self.flows.at(index).map(|f| f.key.slot) else { return };
        let Some(mut inspection) = self.evidence.get_mut(&index).and_then(|e| e.inspection.take()) else {
            return;
        };
        let memory = inspection.conversation.memory();
        self.charge_inspection(slot, &mut inspection, memory);
        if let Some(evidence) = self.evidence.get_mut(&index) {
            evidence.inspection = Some(inspection);
        }
    }

    pub(super) fn charge_inspection(&mut self, slot: u32, inspection: &mut Inspection, memory: usize) {
        if let Some(guest) = self.guests.get_mut(slot) {
            charge(&mut guest.budget.used, memory);
            release(&mut guest.budget.used, inspection.charged);
        }
        inspection.charged = memory;
    }
}
