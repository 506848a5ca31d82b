//! Theory of operation: the stages of a query that is not answered at once. It is asked of the authority if the name may be
//! its own, then of the name servers, and ends with a response to all clients that wait for it.

use super::cache::Kept;
use super::pending::Stage;
use super::replies::Tally;
use super::upstream::{Heard, Step};
use super::{AUTHORITY_MS, DnsForwarder};
use crate::interface::effects::{Effects, Event};
use crate::interface::types::{PortId, Time};
use guestnet_wire::dns::{self, Answer, ede, rcode};
use std::sync::Arc;

impl DnsForwarder {
    pub(super) fn ask_authority<E: Effects>(&mut self, now: Time, ticket: u64, port: PortId, fx: &mut E) {
        let Some(p) = self.table.get_mut(ticket) else { return };
        p.stage = Stage::Authority;
        let (name, kind) = (p.key.name().into(), p.key.kind());
        self.table.set_deadline(ticket, now.plus_ms(AUTHORITY_MS));
        self.looking = true;
        if !fx.event(Event::DnsQuestion { port, ticket, name, kind }) {
            self.without_authority(now, ticket, Tally::Lost, fx);
        }
    }

    /// The control side has said nothing in time, or has no room for the question: what was known is used.
    pub(super) fn without_authority<E: Effects>(&mut self, now: Time, ticket: u64, tally: Tally, fx: &mut E) {
        // Others do not wait for it in vain, for a while.
        (self.confirmed, self.looking) = (now, false);
        let Some(p) = self.table.get_mut(ticket) else { return };
        p.stage = Stage::Next;
        let name: Box<[u8]> = p.key.name().into();
        if self.may_be_own(&name) {
            let why = dns::explain(ede::NOT_READY, "the network's own names cannot be looked up now");
            return self.fail(now, ticket, &why, tally, fx);
        }
        self.forward(now, ticket, fx);
    }

    /// Asks name servers, unless the response is known already or cannot be.
    pub(super) fn forward<E: Effects>(&mut self, now: Time, ticket: u64, fx: &mut E) {
        self.refuse_waiters(now, ticket, fx);
        let Some(p) = self.table.get(ticket) else { return };
        let (target, rd) = (p.target().clone(), p.rd);
        if let Some(entry) = self.cache.get(&target, now).filter(|_| rd) {
            let message = entry.message(&target, now);
            if let Some(shape) = Answer::parse(&message) {
                return self.finish(now, ticket, Some((shape, message.into())), false, fx);
            }
        }
        if self.upstream.servers.servers.is_empty() {
            let why = dns::explain(ede::OTHER, "no name server is configured on the host");
            return self.fail(now, ticket, &why, Tally::Unanswered, fx);
        }
        let step = self.upstream.ask(now, &mut self.table, ticket, fx);
        self.land(now, ticket, step, fx);
    }

    /// Refuses clients of a name that turned out to be no own one, where the rules of their guests do not allow it.
    pub(super) fn refuse_waiters<E: Effects>(&mut self, now: Time, ticket: u64, fx: &mut E) {
        let Some(p) = self.table.get(ticket).filter(|p| p.chain.is_none()) else { return };
        let key = p.key.clone();
        if !p.waiters.iter().any(|w| self.guard.watches(w.client.port())) || !self.may_be_own(key.name()) {
            return;
        }
        let guard = &mut self.guard;
        let mut refusals = Vec::new();
        let refused = self.table.take_waiters(ticket, |w| {
            let refusal = guard.query(now, w.client.port(), key.name(), key.kind());
            let is_refused = refusal.is_some();
            refusals.extend(refusal);
            is_refused
        });
        for (w, refusal) in refused.iter().zip(refusals) {
            self.deliver(now, w.client, true, Tally::Nothing, fx, |_, out| {
                w.query().respond(refusal.rcode, 0, &refusal.explanation, out);
            });
        }
        if self.table.get(ticket).is_some_and(|p| p.waiters.is_empty()) {
            let _nobody_waits = self.table.remove(ticket);
        }
    }

    pub(super) fn land<E: Effects>(&mut self, now: Time, ticket: u64, step: Step, fx: &mut E) {
        if let Step::Done(heard) = step {
            self.finish(now, ticket, heard, true, fx);
        }
    }

    /// The end of a query that name servers were asked, or would have been: `fresh` says which.
    pub(super) fn finish<E: Effects>(
        &mut self,
        now: Time,
        ticket: u64,
        heard: Option<Heard>,
        fresh: bool,
        fx: &mut E,
    ) {
        let Some(p) = self.table.get(ticket) else { return };
        let failed = heard.as_ref().is_none_or(|(shape, _)| super::upstream::is_poor(shape.rcode));
        if failed {
            let mut ports: Vec<PortId> = p.waiters.iter().map(|w| w.client.port()).collect();
            ports.dedup();
            ports.iter().for_each(|port| self.failures.add(p.target().name(), *port, now, true));
        } else {
            self.failures.remove(p.target().name());
        }
        let Some((shape, message)) = heard else {
            let why = dns::explain(ede::NO_REACHABLE_AUTHORITY, "no name server of the host answers");
            return self.fail(now, ticket, &why, Tally::Unanswered, fx);
        };
        let joined = match &p.chain {
            Some(chain) => {
                let joined = dns::join(&p.key.question(), &chain.records, &message, &shape);
                match joined.and_then(|m| Some((Answer::parse(&m)?, m.into_boxed_slice()))) {
                    Some(joined) => Some(joined),
                    None => return self.fail(now, ticket, &[], Tally::Nothing, fx),
                }
            }
            None => None,
        };
        let Some(p) = self.table.remove(ticket) else { return };
        let (sent, bytes) = joined.as_ref().map_or((&shape, &message), |(shape, message)| (shape, message));
        for w in &p.waiters {
            self.deliver_answer(now, w, p.key.name(), false, (sent, bytes), fx);
        }
        // What servers said that are no longer asked is sent, and not kept.
        let current = p.plan.as_ref().is_some_and(|plan| Arc::ptr_eq(&plan.servers, &self.upstream.servers));
        if let Some(owner) = p.waiters.first().map(|w| w.client.port()).filter(|_| fresh && current && p.rd) {
            let local = self.may_be_own(p.target().name());
            let kept = Kept { own: false, local, owner, searched: None };
            self.cache.put(p.target(), shape, &message, kept, now);
        }
    }

    /// The end of a query that cannot be answered.
    pub(super) fn fail<E: Effects>(&mut self, now: Time, ticket: u64, why: &[u8], tally: Tally, fx: &mut E) {
        self.upstream.withdraw(&mut self.table, ticket, fx);
        let Some(p) = self.table.remove(ticket) else { return };
        for w in &p.waiters {
            self.deliver(now, w.client, true, tally, fx, |_, out| {
                w.query().respond(rcode::SERVFAIL, 0, why, out);
            });
        }
    }
}
