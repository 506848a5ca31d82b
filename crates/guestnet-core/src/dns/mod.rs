//! Theory of operation: names that the core resolves by itself, within what the control side's DNS service, which
//! stays the authority, allows. A query with nothing odd about it is answered from [`cache`], or asked of the name
//! server in the service's place by [`pending_queries`]; all others go up. So does whatever does not end well: no answer in
//! time, a truncated one, one that says more about the server than about the name. The service says which names may
//! be the network's own (those go up, until it has sent an answer and allows to give it again), and which server is
//! to be asked. That permission is for a while: each second one query goes up, and the service looks whether it
//! still stands; without word from it, all go up. Each change of its records has a number, so nothing that was
//! learned before a change is kept after it.

mod cache;
mod pending_queries;

use crate::interface::config::Limits;
use crate::interface::effects::Effects;
use crate::interface::stats::DropReason;
use crate::interface::types::{FlowId, IpFields, PortId, ServiceId, Time};
use crate::network::Network;
use crate::util::siphash::SipKey;
use cache::{Cache, Key};
use guestnet_wire::be16;
use guestnet_wire::dns::{Answer, HEADER, NOERROR, NXDOMAIN, Query, flags};
use guestnet_wire::ether::Mac;
use pending_queries::{Asked, PendingQueries, QUESTIONS_PER_PORT, Waiter};
use std::collections::BTreeSet;
use std::net::SocketAddr;

/// Seconds after which a permission is looked at again.
const LOOK_S: u64 = 1;
/// Seconds after which it is over.
const OVER_S: u64 = 5;
/// Questions in a row that were not answered, before the server is asked no more.
const FAILURES: u32 = 3;
/// Labels of a name that is asked for here.
const LABELS_MAX: usize = 16;
const TTL: u8 = 64;

struct Grant {
    server: Option<SocketAddr>,
    since: Time,
    /// A query went up to have it looked at.
    looked: bool,
}

/// What is known of names.
pub(crate) struct DnsForwarder {
    sip: SipKey,
    service: Option<ServiceId>,
    generation: u64,
    epoch: u64,
    /// DnsForwarder that, with all below them, may be the network's own.
    own: BTreeSet<Box<[u8]>>,
    grant: Option<Grant>,
    failures: u32,
    cache: Cache,
    asking: PendingQueries,
    out: Vec<u8>,
}

impl DnsForwarder {
    pub(crate) fn new(sip: SipKey, limits: &Limits) -> DnsForwarder {
        DnsForwarder {
            sip,
            service: None,
            generation: 0,
            epoch: 0,
            own: BTreeSet::new(),
            grant: None,
            failures: 0,
            cache: Cache::new(limits.name_bytes),
            asking: PendingQueries::default(),
            out: Vec::new(),
        }
    }

    pub(crate) fn is_service(&self, service: ServiceId) -> bool {
        self.service == Some(service)
    }

    /// Whether a flow is a socket of questions.
    pub(crate) fn is_flow(flow: FlowId) -> bool {
        flow.index == pending_queries::FLOW
    }

    /// Whether the next query is to go up, for the permission to be looked at.
    pub(crate) fn is_look_due(&self, now: Time) -> bool {
        self.grant.as_ref().is_some_and(|g| !g.looked && g.since.plus_s(LOOK_S) <= now)
    }

    /// A query has gone up.
    pub(crate) fn looked(&mut self, now: Time) {
        if self.is_look_due(now)
            && let Some(g) = &mut self.grant
        {
            g.looked = true;
        }
    }

    /// Whether a name (in lower case) may be the network's own, or has too many labels to tell.
    fn may_be_own(&self, name: &[u8]) -> bool {
        let (mut rest, mut labels) = (name, 0);
        while let Some((length, more)) = rest.split_first().filter(|(n, _)| **n > 0) {
            labels += 1;
            if labels > LABELS_MAX || self.own.contains(rest) {
                return true;
            }
            rest = more.get(usize::from(*length)..).unwrap_or(&[]);
        }
        // The bare names of guests, and everything where all names are.
        labels < 2 || self.own.contains(&[0][..])
    }

    fn server(&self, now: Time) -> Option<Option<SocketAddr>> {
        self.grant.as_ref().filter(|g| now < g.since.plus_s(OVER_S)).map(|g| g.server)
    }

    fn failed(&mut self) {
        self.failures += 1;
        if self.failures >= FAILURES {
            self.suspend();
        }
    }

    fn suspend(&mut self) {
        self.failures = 0;
        if let Some(g) = &mut self.grant {
            g.server = None;
        }
    }

    pub(crate) fn next_timer(&self) -> Option<Time> {
        self.asking.next_timer()
    }

    /// Answers kept, bytes of them, and questions under way.
    pub(crate) fn holds(&self) -> (usize, usize, usize) {
        (self.cache.len(), self.cache.bytes(), self.asking.len())
    }

    /// Whether the books agree.
    pub(crate) fn is_sound(&self) -> bool {
        self.asking.is_sound() && self.cache.is_sound()
    }

    /// Questions that a port waits for.
    pub(crate) fn waits(&self, port: PortId) -> usize {
        self.asking.waiters().filter(|w| w.port == port).count()
    }
}

impl Network {
    /// What the control side says of the network's own names: `own` are names as labels in lower case; these and
    /// those below them may be its own. All that is known is forgotten. `generation` counts the changes of the
    /// service's records; what is older than what was said already is not taken.
    pub fn set_names(&mut self, service: ServiceId, generation: u64, own: Vec<Box<[u8]>>) {
        let names = &mut self.names;
        if generation < names.generation {
            return;
        }
        (names.service, names.generation) = (Some(service), generation);
        names.epoch += 1;
        names.own = own.into_iter().collect();
        names.grant = None;
        names.cache.clear(false);
    }

    /// The guests that have names have changed.
    pub fn forget_guest_names(&mut self, generation: u64) {
        if generation >= self.names.generation {
            self.names.generation = generation;
            self.names.cache.clear(true);
        }
    }

    /// Allows for a while to ask `server` for names that are not the network's own, and to give answers of it again.
    pub fn allow_names(&mut self, now: Time, generation: u64, server: Option<SocketAddr>) {
        self.now = now;
        if generation == self.names.generation && self.names.service.is_some() {
            self.names.grant = Some(Grant { server, since: now, looked: false });
        }
    }

    /// An answer of the DNS service to a query of a port's guest, that may be given again to whoever asks the same.
    /// `own`: it is about the network's own names, and good whatever name servers there are.
    pub fn keep_name(
        &mut self,
        now: Time,
        port: PortId,
        generation: u64,
        own: bool,
        query: &[u8],
        answer: &[u8],
    ) {
        self.now = now;
        if generation != self.names.generation || self.ports.slot(port).is_none() {
            return;
        }
        let (Some(q), Some(shape)) = (Query::parse(query), Answer::parse(answer)) else { return };
        let names = &mut self.names;
        let Some(key) = Key::new(names.sip, &q) else { return };
        let asked = answer.get(shape.question.clone()).unwrap_or(&[]);
        if !asked.eq_ignore_ascii_case(q.question) {
            return;
        }
        let kept = cache::Kept { own, local: own || names.may_be_own(key.name()), owner: port };
        names.cache.put(&key, shape, answer, kept, now);
    }

    /// Answers kept, bytes of them, and questions under way.
    #[must_use]
    pub fn names_held(&self) -> (usize, usize, usize) {
        self.names.holds()
    }

    /// Answers a query from what is known, or asks for it; false: it is for the service.
    #[allow(clippy::too_many_arguments)] // Where it came from.
    pub(crate) fn answer_name<E: Effects>(
        &mut self,
        slot: u32,
        mac: Mac,
        src: SocketAddr,
        dst: SocketAddr,
        query: &[u8],
        fx: &mut E,
    ) -> bool {
        let now = self.now;
        let Some(q) = Query::parse(query) else { return false };
        let names = &mut self.names;
        let Some(key) = Key::new(names.sip, &q) else { return false };
        let allowed = names.server(now);
        if let Some(e) = names.cache.get(&key, now).filter(|e| e.kept.own || allowed.is_some()) {
            e.emit(&q, now, &mut names.out);
            if let Some(p) = self.ports.get_mut(slot) {
                p.counters.dns_hits += 1;
            }
            let out = std::mem::take(&mut self.names.out);
            self.send_name(slot, mac, dst, src, &out, fx);
            self.names.out = out;
            return true;
        }
        let Some(Some(server)) = allowed else { return false };
        let Some(p) = self.ports.get_mut(slot) else { return false };
        if p.asking >= QUESTIONS_PER_PORT || names.may_be_own(key.name()) {
            return false;
        }
        let waiter = Waiter { port: p.id, mac, src, dst, query: query.into() };
        let waiter = match names.asking.join(&key, waiter) {
            Err(Some(waiter)) => Some(waiter),
            Err(None) => return false,
            Ok(()) => None,
        };
        if let Some(waiter) = waiter {
            let Some((id, sock, socket)) = names.asking.prepare(now, names.sip, server, fx) else {
                return false;
            };
            q.emit(id, &mut names.out);
            if fx.udp_send(sock, server, &names.out, 0, IpFields::ttl(TTL), false).is_err() {
                names.failed();
                return false;
            }
            names.asking.insert(now, id, socket, server, names.epoch, key, waiter);
        }
        p.asking += 1;
        p.counters.dns_misses += 1;
        p.counters.dns_asked += 1;
        true
    }

    fn send_name<E: Effects>(
        &mut self,
        slot: u32,
        mac: Mac,
        from: SocketAddr,
        to: SocketAddr,
        answer: &[u8],
        fx: &mut E,
    ) {
        if let Err(why) = self.send_udp(slot, mac, from, to, answer, 0, fx) {
            self.drop_at(slot, why);
        }
    }

    /// Datagrams of a name server.
    pub(crate) fn names_in<E: Effects>(
        &mut self,
        flow: FlowId,
        from: SocketAddr,
        payload: &[u8],
        segment: u16,
        fx: &mut E,
    ) {
        let size = if segment == 0 { payload.len().max(1) } else { usize::from(segment) };
        for message in payload.chunks(size) {
            self.name_in(flow.generation, from, message, fx);
        }
    }

    fn name_in<E: Effects>(&mut self, socket: u32, from: SocketAddr, message: &[u8], fx: &mut E) {
        let head = be16(message, 2);
        let shape = Answer::parse(message).filter(|_| head & flags::OPCODE == 0);
        let question = shape.as_ref().and_then(|s| message.get(s.question.clone()));
        // A server that did not understand the message sends no question back.
        let refusal = message.len() >= HEADER
            && head & flags::QR != 0
            && head & 15 != NOERROR
            && be16(message, 4) == 0
            && head & flags::OPCODE == 0;
        let asking = &mut self.names.asking;
        let asked = match (question, refusal) {
            (None, false) => asking.answered(socket, from, be16(message, 0), Some(&[]), fx),
            (question, _) => asking.answered(socket, from, be16(message, 0), question, fx),
        };
        let Some(asked) = asked else {
            self.base.drop(DropReason::Filtered);
            for asked in self.names.asking.give_up(socket, fx) {
                self.pass_on(asked, fx);
            }
            return;
        };
        self.names.failures = 0;
        match shape.filter(|s| s.flags & flags::TC == 0 && matches!(s.rcode, NOERROR | NXDOMAIN)) {
            Some(shape) => self.name_known(asked, shape, message, fx),
            None => self.pass_on(asked, fx),
        }
    }

    fn name_known<E: Effects>(&mut self, asked: Asked, shape: Answer, message: &[u8], fx: &mut E) {
        let records = message.get(shape.question.end..shape.end).unwrap_or(&[]);
        let explanation = message.get(shape.explanation.clone()).unwrap_or(&[]);
        let mut out = std::mem::take(&mut self.names.out);
        for w in &asked.waiters {
            let (Some(slot), Some(q)) = (self.waits_no_more(w.port), Query::parse(&w.query)) else {
                continue;
            };
            shape.emit(&q, records, explanation, 0, &mut out);
            self.send_name(slot, w.mac, w.dst, w.src, &out, fx);
        }
        self.names.out = out;
        let owner = asked.waiters.first().map(|w| w.port).filter(|p| self.ports.slot(*p).is_some());
        if let Some(owner) = owner.filter(|_| asked.epoch == self.names.epoch) {
            let kept = cache::Kept { own: false, local: false, owner };
            self.names.cache.put(&asked.key, shape, message, kept, self.now);
        }
    }

    /// The slot of a port that has waited for an answer.
    fn waits_no_more(&mut self, port: PortId) -> Option<u32> {
        let slot = self.ports.slot(port);
        match slot.and_then(|s| self.ports.get_mut(s)) {
            Some(p) => p.asking = p.asking.saturating_sub(1),
            None => self.base.drop(DropReason::NoEndpoint),
        }
        slot
    }

    /// Hands a question to the service after all.
    fn pass_on<E: Effects>(&mut self, asked: Asked, fx: &mut E) {
        let Some(service) = self.names.service else { return };
        for w in asked.waiters {
            if let Some(slot) = self.waits_no_more(w.port) {
                self.punt_one(service, slot, w.mac, w.src, w.dst, &w.query, fx);
            }
        }
    }

    /// The kernel reported an error for a question; `payload` is what was sent, as far as is known.
    pub(crate) fn names_error<E: Effects>(
        &mut self,
        flow: FlowId,
        server: SocketAddr,
        payload: &[u8],
        fx: &mut E,
    ) {
        self.names.suspend();
        if payload.len() < 2 {
            return;
        }
        if let Some(asked) = self.names.asking.answered(flow.generation, server, be16(payload, 0), None, fx) {
            self.pass_on(asked, fx);
        }
    }

    pub(crate) fn names_timers<E: Effects>(&mut self, fx: &mut E) {
        while let Some(asked) = self.names.asking.overdue(self.now, fx) {
            self.names.failed();
            self.pass_on(asked, fx);
        }
        self.names.asking.tidy(self.now, fx);
    }

    pub(crate) fn names_remove_port(&mut self, port: PortId) {
        self.names.cache.remove_port(port);
        self.names.asking.remove_port(port);
    }
}
