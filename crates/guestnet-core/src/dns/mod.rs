//! Theory of operation: the DNS forwarder of a network.
//!
//! Every query of a guest, over UDP or TCP, takes this path:
//! 1. [`DnsForwarder::query`] reads and judges it. What no server should answer is refused here, and so are names that no
//!    rule allows ([`guard`]).
//! 2. A cached response is sent ([`cache`]).
//! 3. A name that may be the network's own is asked of the control side, the authority: an event goes up, and its
//!    [`Verdict`] comes down. The authority has the zones, the guests' names and hooks; the names that it may know
//!    something of are compiled down to a list. Its responses are cached until it says that something changed.
//! 4. All other names are asked of name servers ([`upstream`]).
//! 5. [`DnsForwarder::deliver`] sends each client its response, filtered by the rules of its guest.
//!
//! The control side also says which name servers there are. It is asked to look again with one query in [`LOOK_S`]
//! seconds, which waits for it. After [`STALE_S`] seconds without a word all queries wait for it, [`AUTHORITY_MS`] at most;
//! then what was known is used, so a control side that stalls does not stop the network.
//!
//! Bounds: outstanding queries in all and of one guest, cached bytes with a share for each guest, events of one guest a
//! second, and those of [`streams`]. A guest over its share gets REFUSED with a reason.

mod authority;
mod cache;
mod failures;
mod guard;
mod limits;
mod network;
mod pending;
mod replies;
mod resolution;
mod responses;
mod streams;
mod upstream;
mod upstream_sockets;

use crate::interface::config::Limits;
use crate::interface::effects::{Close, Effects, SockError};
use crate::interface::stats::DropReason;
use crate::interface::types::{FlowId, PortId, ServiceId, SockId, Time};
use crate::util::rate_limiter::RateLimiter;
use crate::util::siphash::SipKey;
use cache::{Cache, Key};
use failures::Failures;
use guard::Guard;
use guestnet_wire::be16;
use guestnet_wire::dns::{self, Answer, IN, Query, Record, Unreadable, ede, flags, kind, rcode};
use limits::QueryLimits;
use pending::{Bounds, Client, Pending, Stage, Table, Waiter};
use replies::searched_fails;
pub(crate) use replies::{Replies, Reply, Tally};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use streams::{Readable, Streams};
use upstream::Upstream;

/// Seconds after which the control side looks for other name servers.
const LOOK_S: u64 = 1;
/// Seconds without a word from the control side, after which all queries wait for it.
const STALE_S: u64 = 5;
/// Milliseconds that a query waits for the control side.
const AUTHORITY_MS: u64 = 1000;
/// Queries of one connection that are read before others have their turn.
const STREAM_BATCH: usize = 64;
/// Labels of a name that is looked for in the list of own names.
const LABELS_MAX: usize = 16;
/// Outstanding queries in all, shares of single guests included.
const OUTSTANDING_MAX: usize = 8192;

/// What the authority says of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is not one of its own: name servers are to be asked.
    Forward,
    /// It is its own.
    Own {
        /// The response code.
        rcode: u16,
        /// Records of the answer section.
        answers: Vec<Record>,
        /// Records of the authority section.
        authority: Vec<Record>,
        /// The name of others before the search domain, where the name itself does not exist: while that fails, this
        /// is a temporary failure too.
        searched: Option<Box<[u8]>>,
        /// The last answer is an alias for this name, which is not the network's own.
        target: Option<Box<[u8]>>,
    },
}

/// What became of a query at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It was answered from what was known.
    Hit,
    /// It was answered, with a refusal or a failure.
    Refused,
    /// It waits for a name server.
    Asked,
    /// It waits for the control side.
    Waits,
    /// It deserves no response.
    Dropped(DropReason),
    /// The guest asks the control side too much: not now.
    Later,
}

/// The forwarder. See the module head.
pub(crate) struct DnsForwarder {
    sip: SipKey,
    service: Option<ServiceId>,
    /// Counts the changes of the authority's records.
    generation: u64,
    /// Names that, with all below them, may be the network's own.
    own: BTreeSet<Box<[u8]>>,
    /// Of the owner.
    limits: QueryLimits,
    bounds: Bounds,
    cache: Cache,
    failures: Failures,
    table: Table,
    upstream: Upstream,
    streams: Streams,
    /// Rules about names.
    guard: Guard,
    /// When the control side last said which name servers there are.
    confirmed: Time,
    /// A query went up to have it look again.
    looking: bool,
    replies: Replies,
}

impl DnsForwarder {
    /// `sip` keys hashes and numbers that must not be guessed.
    pub(crate) fn new(sip: SipKey, limits: &Limits) -> DnsForwarder {
        let mut upstream = Upstream::new(sip.derive(1));
        DnsForwarder {
            sip,
            service: None,
            generation: 0,
            own: BTreeSet::new(),
            limits: QueryLimits::default(),
            bounds: Bounds { all: limits.dns_queries, of_one_port: limits.dns_queries_per_port },
            cache: Cache::new(limits.name_bytes),
            failures: Failures::default(),
            table: Table::new(upstream.draw()),
            upstream,
            streams: Streams::new(limits.dns_connections as usize),
            guard: Guard::new(sip.derive(2)),
            confirmed: Time::default(),
            looking: false,
            replies: Replies::default(),
        }
    }

    // ---- queries ------------------------------------------------------------------------------------------

    /// Limits the queries a second of a guest, or of all together.
    pub(crate) fn set_query_limit(&mut self, now: Time, port: Option<PortId>, rate: Option<u64>) {
        self.limits.set(now, port, rate);
    }

    pub(crate) fn is_service(&self, service: ServiceId) -> bool {
        self.service == Some(service)
    }

    /// A query of a guest. `events` limits how much the guest makes the control side do.
    pub(crate) fn query<E: Effects>(
        &mut self,
        now: Time,
        client: Client,
        message: &[u8],
        events: &mut RateLimiter,
        fx: &mut E,
    ) -> Outcome {
        if !self.limits.allow(now, client.port()) {
            return Outcome::Later;
        }
        let q = match Query::parse(message) {
            Ok(q) => q,
            Err(why) => return self.refuse(now, client, message, why, fx),
        };
        if let Some(code) = judge(&q) {
            self.deliver(now, client, false, Tally::Nothing, fx, |_, out| q.respond(code, 0, &[], out));
            return Outcome::Refused;
        }
        let Some(key) = Key::new(self.sip, &q) else { return Outcome::Dropped(DropReason::Malformed) };
        let rd = q.flags & flags::RD != 0;
        let look = self.is_look_due(now);
        let watched = self.guard.watches(client.port());
        if watched && !self.may_be_own(key.name()) && self.refuse_name(now, client, &q, &key, fx) {
            return Outcome::Refused;
        }
        if self.send_cached(now, client, &q, &key, rd, look, fx) {
            return Outcome::Hit;
        }
        let tcp = client.is_tcp();
        let may_be_own = self.may_be_own(key.name());
        if let Some(ticket) = self.table.find(&key, rd, tcp) {
            let asks = matches!(self.table.get(ticket).map(|p| &p.stage), Some(Stage::Authority));
            if watched && may_be_own && !asks && self.refuse_name(now, client, &q, &key, fx) {
                return Outcome::Refused;
            }
            let waits = match self.table.get(ticket).map(|p| &p.stage) {
                Some(Stage::Authority) => Outcome::Waits,
                _ => Outcome::Asked,
            };
            return self.join(now, client, &q, &key, Ok((ticket, waits)), fx);
        }
        if may_be_own || look {
            if events.allow(now) {
                return self.join(now, client, &q, &key, Err(Outcome::Waits), fx);
            }
            if may_be_own {
                return Outcome::Later;
            }
            // A guest that asks too much is not the one that has the control side look.
            if self.send_cached(now, client, &q, &key, rd, false, fx) {
                return Outcome::Hit;
            }
        }
        self.join(now, client, &q, &key, Err(Outcome::Asked), fx)
    }

    /// Refuses a query for a name that the rules of its guest do not allow; false when they do.
    fn refuse_name<E: Effects>(
        &mut self,
        now: Time,
        client: Client,
        q: &Query<'_>,
        key: &Key,
        fx: &mut E,
    ) -> bool {
        let Some(refusal) = self.guard.query(now, client.port(), key.name(), q.kind) else { return false };
        self.deliver(now, client, false, Tally::Nothing, fx, |_, out| {
            q.respond(refusal.rcode, 0, &refusal.explanation, out);
        });
        true
    }

    /// Sends a cached response, unless the control side is to look for other name servers first.
    #[allow(clippy::too_many_arguments)] // The query, and what is known of it.
    fn send_cached<E: Effects>(
        &mut self,
        now: Time,
        client: Client,
        q: &Query<'_>,
        key: &Key,
        rd: bool,
        look: bool,
        fx: &mut E,
    ) -> bool {
        let Some(entry) = self.cache.get(key, now).filter(|e| e.kept.own || rd && !look) else {
            return false;
        };
        if let Some(name) = &entry.kept.searched {
            let name = name.clone();
            if self.is_failing(&name, client.port(), now) {
                self.deliver(now, client, false, Tally::Nothing, fx, |_, out| {
                    q.respond(rcode::SERVFAIL, 0, &searched_fails(), out);
                });
                return true;
            }
        }
        let Some(entry) = self.cache.get(key, now) else { return false };
        if self.guard.watches(client.port()) {
            let own = entry.kept.own;
            let message = entry.message(key, now);
            // What is no own name after all is judged when it is forwarded.
            if !own && self.may_be_own(key.name()) && self.refuse_name(now, client, q, key, fx) {
                return true;
            }
            let Some(shape) = Answer::parse(&message) else { return false };
            let waiter = Waiter::new(client, q);
            self.send_answer(now, &waiter, false, key.name(), own, (&shape, &message), fx);
            return true;
        }
        let at = self.replies.begin(client);
        entry.emit(q, now, q.largest(client.is_tcp()), &mut self.replies.bytes);
        self.replies.finish(at, client, Tally::Nothing);
        self.pass_on(now, false, fx);
        true
    }

    /// Lets a client wait: for the query that asks the same, or for a new one at the given stage.
    fn join<E: Effects>(
        &mut self,
        now: Time,
        client: Client,
        q: &Query<'_>,
        key: &Key,
        to: Result<(u64, Outcome), Outcome>,
        fx: &mut E,
    ) -> Outcome {
        let port = client.port();
        let share = self.table.shares.allow(port, self.bounds) && self.table.len() < OUTSTANDING_MAX;
        let joined = match to {
            Ok((ticket, _)) if share => self.table.join(ticket, Waiter::new(client, q)),
            Err(_) => share,
            Ok(_) => false,
        };
        if !joined {
            self.failures.add(key.name(), port, now, false);
            let why = dns::explain(ede::OTHER, "too many questions at once");
            self.deliver(now, client, false, Tally::Refused, fx, |_, out| {
                q.respond(rcode::REFUSED, 0, &why, out);
            });
            return Outcome::Refused;
        }
        let (ticket, outcome) = match to {
            Ok(found) => found,
            Err(outcome) => {
                let waiter = Waiter::new(client, q);
                (self.table.insert(key.clone(), q.flags & flags::RD != 0, waiter), outcome)
            }
        };
        if let Client::Stream { sock, .. } = client {
            self.streams.waits(sock);
        }
        match to {
            Err(Outcome::Waits) => self.ask_authority(now, ticket, port, fx),
            Err(_) => self.forward(now, ticket, fx),
            Ok(_) => {}
        }
        outcome
    }

    /// A message that is no query, or not one that can be read.
    fn refuse<E: Effects>(
        &mut self,
        now: Time,
        client: Client,
        message: &[u8],
        why: Unreadable,
        fx: &mut E,
    ) -> Outcome {
        let code = match why {
            Unreadable::TooShort => return Outcome::Dropped(DropReason::Truncated),
            Unreadable::Response => return Outcome::Dropped(DropReason::Malformed),
            Unreadable::NotImplemented => rcode::NOTIMP,
            Unreadable::Malformed => rcode::FORMERR,
        };
        self.deliver(now, client, false, Tally::Nothing, fx, |_, out| dns::refuse(message, code, out));
        Outcome::Refused
    }

    /// Whether name servers were asked for a name without a result: they do not respond, or did not yet.
    fn is_failing(&self, name: &[u8], port: PortId, now: Time) -> bool {
        self.upstream.servers.servers.is_empty()
            || self.failures.has(name, port, now)
            || self.table.iter().any(|(_, p)| p.target().name() == name)
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

    fn is_look_due(&self, now: Time) -> bool {
        let stale = self.confirmed.plus_s(STALE_S) <= now;
        stale || !self.looking && self.confirmed.plus_s(LOOK_S) <= now
    }

    // ---- name servers ---------------------------------------------------------------------------------------

    /// Whether a flow is a socket to name servers.
    pub(crate) fn is_flow(flow: FlowId) -> bool {
        Upstream::is_flow(flow)
    }

    /// Datagrams of a name server, of `segment` bytes each when that is not 0. Returns how many were no response.
    pub(crate) fn datagrams<E: Effects>(
        &mut self,
        now: Time,
        flow: FlowId,
        from: SocketAddr,
        payload: &[u8],
        segment: u16,
        fx: &mut E,
    ) -> usize {
        let size = if segment == 0 { payload.len().max(1) } else { usize::from(segment) };
        let mut wrong = 0;
        for message in payload.chunks(size) {
            match self.upstream.datagram(now, &mut self.table, flow, from, message, fx) {
                Ok((ticket, step)) => self.land(now, ticket, step, fx),
                Err(steps) => {
                    wrong += 1;
                    steps.into_iter().for_each(|(ticket, step)| self.land(now, ticket, step, fx));
                }
            }
        }
        wrong + usize::from(payload.is_empty())
    }

    /// The kernel reported an error for what was sent to a name server.
    pub(crate) fn upstream_error<E: Effects>(
        &mut self,
        now: Time,
        flow: FlowId,
        error: (SocketAddr, SockError, &[u8]),
        fx: &mut E,
    ) {
        if let Some((ticket, step)) = self.upstream.error(now, &mut self.table, flow, error, fx) {
            self.land(now, ticket, step, fx);
        }
    }

    /// The outcome of a connect to a name server.
    pub(crate) fn upstream_connected<E: Effects>(
        &mut self,
        now: Time,
        flow: FlowId,
        result: Result<(), SockError>,
        fx: &mut E,
    ) {
        if let Some((ticket, step)) = self.upstream.connected(now, &mut self.table, flow, result, fx) {
            self.land(now, ticket, step, fx);
        }
    }

    /// A connection to a name server has something to read.
    pub(crate) fn upstream_readable<E: Effects>(&mut self, now: Time, flow: FlowId, fx: &mut E) {
        if let Some((ticket, step)) = self.upstream.readable(now, &mut self.table, flow, fx) {
            self.land(now, ticket, step, fx);
        }
    }

    // ---- connections of guests --------------------------------------------------------------------------------

    /// Bytes of a guest's connection; `ended`: they are the last. `judged` hears what became of each query. Returns how
    /// many were read: a part of a message is left, and what the connection's bounds leave.
    #[allow(clippy::too_many_arguments)] // The connection, and what came.
    pub(crate) fn stream<E: Effects>(
        &mut self,
        now: Time,
        port: PortId,
        sock: SockId,
        data: &[u8],
        ended: bool,
        events: &mut RateLimiter,
        fx: &mut E,
        mut judged: impl FnMut(Outcome),
    ) -> usize {
        let Readable { port, serial } = self.streams.open(now, port, sock, fx);
        let (mut at, mut batch) = (0, STREAM_BATCH);
        while let Some(message) = data.get(at..).and_then(next_message) {
            if batch == 0 {
                fx.stream_resume(sock);
                return at;
            }
            if !self.streams.may_read(sock, fx) {
                return at;
            }
            batch -= 1;
            let client = Client::Stream { port, sock, serial };
            let outcome = self.query(now, client, message, events, fx);
            if outcome == Outcome::Later {
                self.streams.retry(now, sock);
                return at;
            }
            judged(outcome);
            self.streams.message_came(now, sock);
            at += 2 + message.len();
            if matches!(outcome, Outcome::Dropped(_)) {
                // There is no telling what else comes.
                self.streams.end(sock, Close::Graceful, fx);
                return data.len();
            }
        }
        if ended {
            self.streams.ended(sock, fx);
            return data.len();
        }
        at
    }

    /// A guest's connection is gone.
    pub(crate) fn stream_gone(&mut self, sock: SockId) {
        self.streams.forget(sock);
    }

    // ---- the rest ---------------------------------------------------------------------------------------------

    pub(crate) fn next_timer(&self) -> Option<Time> {
        let times = [self.table.next_timer(), self.upstream.next_timer(), self.streams.next_timer()];
        times.into_iter().flatten().min()
    }

    pub(crate) fn timers<E: Effects>(&mut self, now: Time, fx: &mut E) {
        while let Some(ticket) = self.table.overdue(now) {
            if matches!(self.table.get(ticket).map(|p| &p.stage), Some(Stage::Authority)) {
                self.without_authority(now, ticket, Tally::Unanswered, fx);
            } else {
                let step = self.upstream.timed_out(now, &mut self.table, ticket, fx);
                self.land(now, ticket, step, fx);
            }
        }
        self.upstream.tidy(now, fx);
        self.streams.timers(now, fx);
    }

    /// A port is gone.
    pub(crate) fn remove_port(&mut self, port: PortId) {
        self.cache.remove_port(port);
        self.guard.remove_port(port);
        self.table.remove_port(port);
        self.streams.remove_port(port);
        self.failures.remove_port(port);
    }

    /// What is held: cached responses, bytes of them, outstanding queries, connections.
    pub(crate) fn holds(&self) -> (usize, usize, usize, usize) {
        (self.cache.len(), self.cache.bytes(), self.table.len(), self.streams.len())
    }

    /// Whether the books agree.
    pub(crate) fn is_sound(&self) -> bool {
        let waiters: usize = self.table.iter().map(|(_, p): (u64, &Pending)| p.waiters.len()).sum();
        self.cache.is_sound()
            && self.failures.is_sound()
            && self.table.is_sound(self.upstream.outstanding())
            && self.upstream.is_sound()
            && self.streams.is_sound(waiters)
    }
}

/// The one place where a query is judged: the code that it is refused with.
fn judge(q: &Query<'_>) -> Option<u16> {
    if q.edns.is_some_and(|e| e.version != 0) {
        return Some(rcode::BADVERS);
    }
    if q.kind == 0 || q.kind == kind::OPT {
        return Some(rcode::FORMERR);
    }
    // Other classes hold data about servers; transfers and transactions are not for guests.
    (q.class != IN || dns::is_meta(q.kind)).then_some(rcode::REFUSED)
}

/// The first whole message of a stream, without its length.
fn next_message(data: &[u8]) -> Option<&[u8]> {
    data.get(2..2 + usize::from(be16(data, 0))).filter(|_| data.len() >= 2)
}
