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

use crate::context::Context;
use crate::interface::config::NetworkConfig;
use crate::interface::effects::Effects;
use crate::interface::stats::DropReason;
use crate::interface::types::{FlowId, IpFields, PortId, ServiceId, Time};
use crate::l2::lan::{Lan, Sender};
use crate::l3::gateway::Datagram;
use crate::tables::per_port::PerPort;
use crate::util::siphash::SipKey;
use cache::{Cache, Key};
use guestnet_wire::be16;
use guestnet_wire::dns::{Answer, HEADER, NOERROR, NXDOMAIN, Query, flags};
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
    /// Questions that each port waits for.
    waits: PerPort<u32>,
}

impl DnsForwarder {
    pub(crate) fn new(config: &NetworkConfig) -> DnsForwarder {
        DnsForwarder {
            sip: SipKey::from_secret(&config.secret, 16).derive(u64::from(u32::MAX)),
            service: None,
            generation: 0,
            epoch: 0,
            own: BTreeSet::new(),
            grant: None,
            failures: 0,
            cache: Cache::new(config.limits.name_bytes),
            asking: PendingQueries::default(),
            out: Vec::new(),
            waits: PerPort::default(),
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

    /// Checks that what is kept twice agrees.
    ///
    /// # Errors
    /// The first thing that does not agree.
    pub(crate) fn audit(&self, lan: &Lan) -> Result<(), String> {
        for (slot, p) in lan.local_ports() {
            let waiters = self.asking.waiters().filter(|w| w.port == p.id).count();
            if waiters != self.waits.get(slot).map_or(0, |n| *n as usize) {
                return Err(format!("slot {slot} waits for {waiters} names and counts otherwise"));
            }
        }
        if self.asking.is_sound() && self.cache.is_sound() {
            Ok(())
        } else {
            Err("what is known of names does not agree".into())
        }
    }

    /// A port was added.
    pub(crate) fn add_port(&mut self, slot: u32) {
        self.waits.insert(slot, 0);
    }

    /// What the control side says of the network's own names: `own` are names as labels in lower case; these and
    /// those below them may be its own. All that is known is forgotten. `generation` counts the changes of the
    /// service's records; what is older than what was said already is not taken.
    pub(crate) fn set_names(&mut self, service: ServiceId, generation: u64, own: Vec<Box<[u8]>>) {
        let names = &mut *self;
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
    pub(crate) fn forget_guest_names(&mut self, generation: u64) {
        if generation >= self.generation {
            self.generation = generation;
            self.cache.clear(true);
        }
    }

    /// Allows for a while to ask `server` for names that are not the network's own, and to give answers of it again.
    pub(crate) fn allow_names(&mut self, now: Time, generation: u64, server: Option<SocketAddr>) {
        if generation == self.generation && self.service.is_some() {
            self.grant = Some(Grant { server, since: now, looked: false });
        }
    }

    /// An answer of the DNS service to a query of a port's guest, that may be given again to whoever asks the same.
    /// `own`: it is about the network's own names, and good whatever name servers there are.
    pub(crate) fn keep_name(
        &mut self,
        now: Time,
        port: PortId,
        generation: u64,
        own: bool,
        query: &[u8],
        answer: &[u8],
    ) {
        if generation != self.generation {
            return;
        }
        let (Some(q), Some(shape)) = (Query::parse(query), Answer::parse(answer)) else { return };
        let names = &mut *self;
        let Some(key) = Key::new(names.sip, &q) else { return };
        let asked = answer.get(shape.question.clone()).unwrap_or(&[]);
        if !asked.eq_ignore_ascii_case(q.question) {
            return;
        }
        let kept = cache::Kept { own, local: own || names.may_be_own(key.name()), owner: port };
        names.cache.put(&key, shape, answer, kept, now);
    }

    /// Answers a query from what is known, or asks for it; false: it is for the service.
    fn answer<E: Effects>(&mut self, cx: &mut Context<'_, E>, d: &Datagram<'_>) -> bool {
        let now = cx.link.now;
        let slot = d.from.slot;
        let Some(q) = Query::parse(d.payload) else { return false };
        let Some(key) = Key::new(self.sip, &q) else { return false };
        let allowed = self.server(now);
        if let Some(e) = self.cache.get(&key, now).filter(|e| e.kept.own || allowed.is_some()) {
            e.emit(&q, now, &mut self.out);
            if let Some(c) = cx.link.lan.counters_mut(slot) {
                c.dns_hits += 1;
            }
            send_answer(cx, d.from, d.dst, d.src, &self.out);
            return true;
        }
        let Some(Some(server)) = allowed else { return false };
        let Some(port) = cx.link.lan.port(slot).map(|p| p.id) else { return false };
        if self.waits.get(slot).is_none_or(|n| *n >= QUESTIONS_PER_PORT) || self.may_be_own(key.name()) {
            return false;
        }
        let waiter = Waiter { port, mac: d.from.mac, src: d.src, dst: d.dst, query: d.payload.into() };
        let waiter = match self.asking.join(&key, waiter) {
            Err(Some(waiter)) => Some(waiter),
            Err(None) => return false,
            Ok(()) => None,
        };
        if let Some(waiter) = waiter {
            let Some((id, sock, socket)) = self.asking.prepare(now, self.sip, server, cx.link.fx) else {
                return false;
            };
            q.emit(id, &mut self.out);
            if cx.link.fx.udp_send(sock, server, &self.out, 0, IpFields::ttl(TTL), false).is_err() {
                self.failed();
                return false;
            }
            self.asking.insert(now, id, socket, server, self.epoch, key, waiter);
        }
        if let Some(n) = self.waits.get_mut(slot) {
            *n += 1;
        }
        if let Some(c) = cx.link.lan.counters_mut(slot) {
            c.dns_misses += 1;
            c.dns_asked += 1;
        }
        true
    }

    /// A query of a guest to the DNS service: answered here when the name is known or may be asked for, else handed up.
    pub(crate) fn query<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        service: ServiceId,
        d: &Datagram<'_>,
    ) {
        let now = cx.link.now;
        let look = self.is_look_due(now);
        if !look && self.answer(cx, d) {
            return;
        }
        // A guest that asks too much is not the one who has it looked at.
        if look && !cx.gateway.would_punt(now, d.from.slot, d.payload) && self.answer(cx, d) {
            return;
        }
        if let Some(c) = cx.link.lan.counters_mut(d.from.slot) {
            c.dns_misses += 1;
        }
        if cx.gateway.punt(&mut cx.link, service, d) {
            self.looked(now);
        }
    }

    /// Datagrams of a name server.
    pub(crate) fn receive<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        flow: FlowId,
        from: SocketAddr,
        payload: &[u8],
        segment: u16,
    ) {
        let size = if segment == 0 { payload.len().max(1) } else { usize::from(segment) };
        for message in payload.chunks(size) {
            self.name_in(cx, flow.generation, from, message);
        }
    }

    fn name_in<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        socket: u32,
        from: SocketAddr,
        message: &[u8],
    ) {
        let head = be16(message, 2);
        let shape = Answer::parse(message).filter(|_| head & flags::OPCODE == 0);
        let question = shape.as_ref().and_then(|s| message.get(s.question.clone()));
        // A server that did not understand the message sends no question back.
        let refusal = message.len() >= HEADER
            && head & flags::QR != 0
            && head & 15 != NOERROR
            && be16(message, 4) == 0
            && head & flags::OPCODE == 0;
        let asking = &mut self.asking;
        let asked = match (question, refusal) {
            (None, false) => asking.answered(socket, from, be16(message, 0), Some(&[]), cx.link.fx),
            (question, _) => asking.answered(socket, from, be16(message, 0), question, cx.link.fx),
        };
        let Some(asked) = asked else {
            cx.link.lan.base_mut().drop(DropReason::Filtered);
            for asked in self.asking.give_up(socket, cx.link.fx) {
                self.pass_on(cx, asked);
            }
            return;
        };
        self.failures = 0;
        match shape.filter(|s| s.flags & flags::TC == 0 && matches!(s.rcode, NOERROR | NXDOMAIN)) {
            Some(shape) => self.name_known(cx, asked, shape, message),
            None => self.pass_on(cx, asked),
        }
    }

    fn name_known<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        asked: Asked,
        shape: Answer,
        message: &[u8],
    ) {
        let records = message.get(shape.question.end..shape.end).unwrap_or(&[]);
        let explanation = message.get(shape.explanation.clone()).unwrap_or(&[]);
        let mut out = std::mem::take(&mut self.out);
        for w in &asked.waiters {
            let (Some(slot), Some(q)) = (self.waits_no_more(cx.link.lan, w.port), Query::parse(&w.query))
            else {
                continue;
            };
            shape.emit(&q, records, explanation, 0, &mut out);
            send_answer(cx, Sender { slot, mac: w.mac }, w.dst, w.src, &out);
        }
        self.out = out;
        let owner = asked.waiters.first().map(|w| w.port).filter(|p| cx.link.lan.slot(*p).is_some());
        if let Some(owner) = owner.filter(|_| asked.epoch == self.epoch) {
            let kept = cache::Kept { own: false, local: false, owner };
            self.cache.put(&asked.key, shape, message, kept, cx.link.now);
        }
    }

    /// The slot of a port that has waited for an answer.
    fn waits_no_more(&mut self, lan: &mut Lan, port: PortId) -> Option<u32> {
        let slot = lan.slot(port);
        match slot.and_then(|s| self.waits.get_mut(s)) {
            Some(n) => *n = n.saturating_sub(1),
            None => lan.base_mut().drop(DropReason::NoEndpoint),
        }
        slot
    }

    /// Hands a question to the service after all.
    fn pass_on<E: Effects>(&mut self, cx: &mut Context<'_, E>, asked: Asked) {
        let Some(service) = self.service else { return };
        for w in asked.waiters {
            if let Some(slot) = self.waits_no_more(cx.link.lan, w.port) {
                let from = Sender { slot, mac: w.mac };
                let d = Datagram { from, src: w.src, dst: w.dst, payload: &w.query };
                cx.gateway.punt(&mut cx.link, service, &d);
            }
        }
    }

    /// The kernel reported an error for a question; `payload` is what was sent, as far as is known.
    pub(crate) fn sock_error<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        flow: FlowId,
        server: SocketAddr,
        payload: &[u8],
    ) {
        self.suspend();
        if payload.len() < 2 {
            return;
        }
        if let Some(asked) = self.asking.answered(flow.generation, server, be16(payload, 0), None, cx.link.fx)
        {
            self.pass_on(cx, asked);
        }
    }

    pub(crate) fn timers<E: Effects>(&mut self, cx: &mut Context<'_, E>) {
        while let Some(asked) = self.asking.overdue(cx.link.now, cx.link.fx) {
            self.failed();
            self.pass_on(cx, asked);
        }
        self.asking.tidy(cx.link.now, cx.link.fx);
    }

    pub(crate) fn remove_port(&mut self, slot: u32, port: PortId) {
        self.waits.remove(slot);
        self.cache.remove_port(port);
        self.asking.remove_port(port);
    }
}

fn send_answer<E: Effects>(
    cx: &mut Context<'_, E>,
    to: Sender,
    src: SocketAddr,
    dst: SocketAddr,
    answer: &[u8],
) {
    if let Err(why) = cx.gateway.frames().send_udp(&mut cx.link, to.slot, to.mac, src, dst, answer, 0) {
        cx.link.lan.count_drop(to.slot, why);
    }
}
