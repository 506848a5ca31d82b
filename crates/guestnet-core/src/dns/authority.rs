//! Theory of operation: what the authority, on the control side, tells the forwarder: which names may be its own, which name
//! servers there are, and its verdicts on names that it was asked about.

use super::cache::{Kept, Key};
use super::pending::{Chain, Stage};
use super::replies::Tally;
use super::replies::searched_fails;
use super::upstream::Heard;
use super::{DnsForwarder, Verdict};
use crate::interface::config::NameServers;
use crate::interface::effects::Effects;
use crate::interface::types::{ServiceId, Time};
use crate::policy::NamePolicy;
use guestnet_wire::dns::{self, Answer, flags, rcode};
use std::sync::Arc;

impl DnsForwarder {
    /// The authority serves DNS as `service`; `own` are names as labels in lower case, and these and those below them
    /// may be its own. Its cached responses are forgotten. `generation` counts the changes of its records; what is older
    /// than what is known is ignored.
    pub(crate) fn set_zones(&mut self, service: ServiceId, generation: u64, own: Vec<Box<[u8]>>) {
        if generation < self.generation {
            return;
        }
        (self.service, self.generation) = (Some(service), generation);
        self.own = own.into_iter().collect();
        // A name of others may be the network's own from now on, or the other way round.
        self.cache.clear();
    }

    /// Other rules about names are in force, or none.
    pub(crate) fn set_names(&mut self, policy: Option<NamePolicy>) {
        self.guard.set(policy);
    }

    /// The guests that have names have changed.
    pub(crate) fn forget_guest_names(&mut self, generation: u64) {
        if generation >= self.generation {
            self.generation = generation;
            self.cache.remove_if(|kept| kept.local);
        }
    }

    /// The name servers that names of others are asked of.
    pub(crate) fn set_name_servers(&mut self, now: Time, servers: NameServers) {
        (self.confirmed, self.looking) = (now, false);
        if servers != *self.upstream.servers {
            // Others may know other things: a VPN came or went.
            self.upstream.servers = Arc::new(servers);
            self.cache.remove_if(|kept| !kept.own);
            self.failures.clear();
        }
    }

    /// The authority's verdict on the name of a query; `generation` is that of its records.
    pub(crate) fn verdict<E: Effects>(
        &mut self,
        now: Time,
        ticket: u64,
        generation: u64,
        verdict: Verdict,
        fx: &mut E,
    ) {
        (self.confirmed, self.looking) = (now, false);
        let Some(p) = self.table.get_mut(ticket).filter(|p| matches!(p.stage, Stage::Authority)) else {
            return;
        };
        p.stage = Stage::Next;
        match verdict {
            Verdict::Forward => self.forward(now, ticket, fx),
            Verdict::Own { answers, target: Some(target), .. } => {
                let (kind, dnssec, cd) = (p.key.kind(), p.key.wants_dnssec(), p.key.is_unchecked());
                match Key::of(self.sip, &target, kind, dnssec, cd) {
                    Some(key) => p.chain = Some(Box::new(Chain { records: answers, key })),
                    None => return self.fail(now, ticket, &[], Tally::Nothing, fx),
                }
                self.forward(now, ticket, fx);
            }
            Verdict::Own { rcode, answers, authority, searched, target: None } => {
                let head = if rcode == rcode::SERVFAIL { 0 } else { flags::AA };
                let question = p.key.question();
                let message = dns::build(&question, rcode, head, &answers, &authority)
                    // More than a message holds: truncated, also over TCP.
                    .or_else(|| dns::build(&question, rcode, head | flags::TC, &[], &[]));
                let heard = message.and_then(|m| Some((Answer::parse(&m)?, m.into_boxed_slice())));
                self.own_response(now, ticket, generation, heard, searched, fx);
            }
        }
    }

    pub(super) fn own_response<E: Effects>(
        &mut self,
        now: Time,
        ticket: u64,
        generation: u64,
        heard: Option<Heard>,
        searched: Option<Box<[u8]>>,
        fx: &mut E,
    ) {
        let Some((shape, message)) = heard else { return self.fail(now, ticket, &[], Tally::Nothing, fx) };
        let Some(p) = self.table.remove(ticket) else { return };
        for w in &p.waiters {
            let port = w.client.port();
            let fails = searched.as_ref().is_some_and(|name| self.is_failing(name, port, now));
            if fails {
                self.deliver(now, w.client, true, Tally::Nothing, fx, |_, out| {
                    w.query().respond(rcode::SERVFAIL, 0, &searched_fails(), out);
                });
            } else {
                self.deliver_answer(now, w, p.key.name(), true, (&shape, &message), fx);
            }
        }
        let owner = p.waiters.first().map(|w| w.client.port());
        if let Some(owner) = owner.filter(|_| generation == self.generation) {
            let kept = Kept { own: true, local: true, owner, searched };
            self.cache.put(&p.key, shape, &message, kept, now);
        }
    }
}
