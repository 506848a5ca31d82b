//! Theory of operation: asking name servers.
//!
//! Servers are tried one after the other, each as often as resolv.conf says, with a time-out for each try and one for all
//! ([`PATIENCE_MS`]). A server that did not respond is tried last for [`SLOW_S`] seconds. A try is a datagram; it becomes
//! - one without EDNS, where the server does not know EDNS (remembered for [`PLAIN_S`] seconds);
//! - a TCP connection, where the response is truncated and the clients need all of it;
//! - a datagram that asks for [`LARGE_UDP`] bytes, where the server has no TCP, against RFC 7766.
//!
//! A response must come from the server, on the socket, with the identifier and the question of its query (RFC 5452).
//! One that says more about the server than about the name is kept until another server says something better.

use super::cache::Key;
use super::pending::{Pending, Plan, Stage, Table};
use super::upstream_sockets::{FLOW, UpstreamSockets};
use crate::interface::config::NameServers;
use crate::interface::effects::{Close, Effects, Event, Peek, SockError};
use crate::interface::types::{FlowId, IpFields, Target, Time};
use crate::util::siphash::SipKey;
use guestnet_wire::be16;
use guestnet_wire::dns::{Answer, HEADER, IN, TCP_MAX, UDP_MAX, build, emit_query, flags, rcode};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

/// Milliseconds for one query, with all servers and tries.
const PATIENCE_MS: u64 = 12_000;
const SLOW_S: u64 = 30;
const PLAIN_S: u64 = 600;
/// Servers that are remembered as slow, or as without EDNS.
const REMEMBERED: usize = 64;
/// Bytes of a response by UDP that are asked for where TCP fails: it may come in fragments, or not at all.
const LARGE_UDP: u16 = 4096;
/// Connections to name servers at a time.
const TCP_MOST: usize = 64;
/// Flow index of those connections.
const FLOW_TCP: u32 = u32::MAX - 1;
const TTL: u8 = 64;

/// Whether a response says more about the server than about the name.
pub(super) fn is_poor(code: u16) -> bool {
    use rcode::{BADVERS, FORMERR, NOTIMP, REFUSED, SERVFAIL};
    matches!(code, FORMERR | SERVFAIL | NOTIMP | REFUSED | BADVERS)
}

/// A response and its message.
pub(super) type Heard = (Answer, Box<[u8]>);

/// What became of a query.
pub(super) enum Step {
    /// It waits for something.
    Waits,
    /// It is over, with the best response that the servers have; `None`: no server responded.
    Done(Option<Heard>),
}

/// The server side of the forwarder.
pub(super) struct Upstream {
    sip: SipKey,
    drawn: u64,
    pub(super) servers: Arc<NameServers>,
    sockets: UpstreamSockets,
    /// Connections by the generation of their flow.
    connections: BTreeMap<u32, u64>,
    connection: u32,
    slow: BTreeMap<SocketAddr, Time>,
    plain: BTreeMap<SocketAddr, Time>,
    turn: usize,
    out: Vec<u8>,
}

fn same(a: SocketAddr, b: SocketAddr) -> bool {
    (a.ip().to_canonical(), a.port()) == (b.ip().to_canonical(), b.port())
}

fn remember(list: &mut BTreeMap<SocketAddr, Time>, server: SocketAddr, until: Time) {
    if list.len() >= REMEMBERED {
        list.clear();
    }
    list.insert(server, until);
}

fn describe(error: SockError) -> &'static str {
    match error {
        SockError::Refused => "connection refused",
        SockError::Reset => "it hung up",
        SockError::NetUnreachable => "network is unreachable",
        SockError::HostUnreachable => "no route to host",
        SockError::TimedOut => "no answer in time",
        SockError::Prohibited => "the host forbids it",
        SockError::MessageTooBig(_) => "message too long",
        SockError::Exhausted => "the host has no more sockets",
        SockError::Other(_) => "the host refused it",
    }
}

/// The response, when it is one to the query.
fn accept(target: &Key, message: &[u8]) -> Option<Heard> {
    let head = be16(message, 2);
    if message.len() < HEADER || head & flags::QR == 0 || head & flags::OPCODE != 0 {
        return None;
    }
    if be16(message, 4) == 0 && is_poor(head & 15) {
        // A server that did not understand the message sends no question back.
        let message = build(&target.question(), head & 15, 0, &[], &[])?;
        return Some((Answer::parse(&message)?, message.into()));
    }
    let shape = Answer::parse(message)?;
    let asked = message.get(shape.question.clone())?;
    let (name, rest) = asked.split_at(asked.len().saturating_sub(4));
    let matches =
        name.eq_ignore_ascii_case(target.name()) && (be16(rest, 0), be16(rest, 2)) == (target.kind(), IN);
    matches.then(|| (shape, message.into()))
}

impl Upstream {
    pub(super) fn new(sip: SipKey) -> Upstream {
        Upstream {
            sip,
            drawn: 0,
            servers: Arc::default(),
            sockets: UpstreamSockets::default(),
            connections: BTreeMap::new(),
            connection: 0,
            slow: BTreeMap::new(),
            plain: BTreeMap::new(),
            turn: 0,
            out: Vec::new(),
        }
    }

    /// Whether a flow is one of the sockets here.
    pub(super) fn is_flow(flow: FlowId) -> bool {
        flow.index >= FLOW_TCP
    }

    /// A number that cannot be guessed.
    pub(super) fn draw(&mut self) -> u64 {
        self.drawn = self.drawn.wrapping_add(1);
        self.sip.hash(&[self.drawn, 0])
    }

    /// Queries that wait for a datagram.
    pub(super) fn outstanding(&self) -> u32 {
        self.sockets.outstanding()
    }

    pub(super) fn is_sound(&self) -> bool {
        self.sockets.is_sound() && self.connections.len() <= TCP_MOST
    }

    pub(super) fn next_timer(&self) -> Option<Time> {
        self.sockets.next_timer()
    }

    pub(super) fn tidy<E: Effects>(&mut self, now: Time, fx: &mut E) {
        self.sockets.tidy(now, fx);
    }

    // ---- the order of tries ---------------------------------------------------------------------------

    /// Asks the servers.
    pub(super) fn ask<E: Effects>(&mut self, now: Time, table: &mut Table, ticket: u64, fx: &mut E) -> Step {
        let servers = Arc::clone(&self.servers);
        let mut order = servers.servers.clone();
        if servers.rotate && !order.is_empty() {
            order.rotate_left(self.turn % servers.servers.len());
            self.turn = self.turn.wrapping_add(1);
        }
        order.sort_by_key(|s| self.slow.get(s).is_some_and(|until| now < *until));
        let order = order.repeat(servers.attempts as usize);
        let plan = Plan {
            servers,
            order: order.into_iter(),
            server: None,
            edns: true,
            try_ends: now,
            ends: now.plus_ms(PATIENCE_MS),
            poor: Vec::new(),
            first_poor: None,
        };
        if let Some(p) = table.get_mut(ticket) {
            p.plan = Some(Box::new(plan));
        }
        self.next(now, table, ticket, fx)
    }

    /// Asks the next server.
    fn next<E: Effects>(&mut self, now: Time, table: &mut Table, ticket: u64, fx: &mut E) -> Step {
        loop {
            let Some(plan) = table.get_mut(ticket).and_then(|p| p.plan.as_mut()) else {
                return Step::Done(None);
            };
            let poor = &plan.poor;
            let server = plan.order.by_ref().find(|s| !poor.contains(s)).filter(|_| now < plan.ends);
            let Some(server) = server else { return Step::Done(plan.first_poor.take()) };
            plan.server = Some(server);
            plan.edns = self.plain.get(&server).is_none_or(|until| *until <= now);
            plan.try_ends = now.plus_ms(plan.servers.timeout_ms).min(plan.ends);
            match self.send_again(now, table, ticket, fx) {
                Ok(()) => return Step::Waits,
                Err(e) => self.silent(now, server, describe(e), fx),
            }
        }
    }

    /// Sends the query to the server of the try, by the way that the try begins with.
    fn send_again<E: Effects>(
        &mut self,
        now: Time,
        table: &mut Table,
        ticket: u64,
        fx: &mut E,
    ) -> Result<(), SockError> {
        let Some(plan) = table.get(ticket).and_then(|p| p.plan.as_ref()) else { return Ok(()) };
        if plan.servers.use_tcp {
            return self.send_tcp(table, ticket, plan.try_ends, fx);
        }
        self.send_udp(now, table, ticket, false, fx)
    }

    /// The try has failed, and the server is tried last for a while.
    fn fail<E: Effects>(
        &mut self,
        now: Time,
        table: &mut Table,
        ticket: u64,
        trouble: &'static str,
        fx: &mut E,
    ) -> Step {
        self.withdraw(table, ticket, fx);
        if let Some(server) = table.get(ticket).and_then(|p| p.plan.as_ref()?.server) {
            self.silent(now, server, trouble, fx);
        }
        self.next(now, table, ticket, fx)
    }

    /// A server does not respond. It is reported once while that lasts: guests decide how often a server is asked.
    fn silent<E: Effects>(&mut self, now: Time, server: SocketAddr, trouble: &'static str, fx: &mut E) {
        if self.slow.get(&server).is_none_or(|until| *until <= now) {
            let _lost_reports_change_nothing = fx.event(Event::NameServer { server, trouble: Some(trouble) });
        }
        remember(&mut self.slow, server, now.plus_s(SLOW_S));
    }

    /// Takes back what the query waits for.
    pub(super) fn withdraw<E: Effects>(&mut self, table: &mut Table, ticket: u64, fx: &mut E) {
        let Some(p) = table.get_mut(ticket) else { return };
        match std::mem::replace(&mut p.stage, Stage::Next) {
            Stage::Authority | Stage::Next => {}
            Stage::Udp { id, socket, .. } => {
                table.free(id);
                self.sockets.release(socket, fx);
            }
            Stage::Tcp { sock, .. } => {
                self.connections.retain(|_, t| *t != ticket);
                fx.close(sock, Close::Reset);
            }
        }
    }

    /// A response to the try of a query that waits for nothing any more.
    fn heard<E: Effects>(
        &mut self,
        now: Time,
        table: &mut Table,
        ticket: u64,
        way: Way,
        heard: Heard,
        fx: &mut E,
    ) -> Step {
        let Some(p) = table.get_mut(ticket) else { return Step::Waits };
        let tcp = p.tcp;
        let Some(plan) = p.plan.as_mut() else { return Step::Done(None) };
        let Some(server) = plan.server else { return Step::Done(None) };
        if self.slow.remove(&server).is_some() {
            let _as_above = fx.event(Event::NameServer { server, trouble: None });
        }
        let (code, truncated) = (heard.0.rcode, heard.0.flags & flags::TC != 0);
        if plan.edns && matches!(code, rcode::FORMERR | rcode::NOTIMP | rcode::BADVERS) {
            plan.edns = false;
            remember(&mut self.plain, server, now.plus_s(PLAIN_S));
            return match self.send_again(now, table, ticket, fx) {
                Ok(()) => Step::Waits,
                Err(e) => self.fail(now, table, ticket, describe(e), fx),
            };
        }
        if truncated && (way == Way::Tcp || way == Way::LargeUdp) {
            return self.fail(now, table, ticket, "truncated, and no TCP", fx);
        }
        if truncated && tcp {
            let until = plan.try_ends.min(now.plus_ms(plan.servers.timeout_ms / 2));
            return match self.send_tcp(table, ticket, until, fx) {
                Ok(()) => Step::Waits,
                Err(e) => self.tcp_failed(now, table, ticket, describe(e), fx),
            };
        }
        if is_poor(code) {
            plan.poor.push(server);
            plan.first_poor.get_or_insert(heard);
            return self.next(now, table, ticket, fx);
        }
        Step::Done(Some(heard))
    }

    /// A query's time for what it waits for is over.
    pub(super) fn timed_out<E: Effects>(
        &mut self,
        now: Time,
        table: &mut Table,
        ticket: u64,
        fx: &mut E,
    ) -> Step {
        let trouble = describe(SockError::TimedOut);
        match table.get(ticket).map(|p| &p.stage) {
            Some(Stage::Tcp { .. }) => self.tcp_failed(now, table, ticket, trouble, fx),
            _ => self.fail(now, table, ticket, trouble, fx),
        }
    }

    fn message(&mut self, p: &Pending, id: u16, large: bool) {
        let target = p.target();
        let size = if large { LARGE_UDP } else { UDP_MAX as u16 };
        let mut head = if p.rd { flags::RD } else { 0 };
        head |= if target.is_unchecked() { flags::CD } else { 0 };
        // The first client's spelling, which is nothing but another one.
        let spelled = p.waiters.first().filter(|_| p.chain.is_none()).map(|w| w.query().question);
        let edns = p.plan.as_ref().is_some_and(|plan| plan.edns);
        let question = target.question();
        emit_query(
            id,
            head,
            spelled.unwrap_or(&question),
            target.wants_dnssec(),
            edns.then_some(size),
            &mut self.out,
        );
    }

    // ---- datagrams ------------------------------------------------------------------------------------

    fn send_udp<E: Effects>(
        &mut self,
        now: Time,
        table: &mut Table,
        ticket: u64,
        large: bool,
        fx: &mut E,
    ) -> Result<(), SockError> {
        let Some(plan) = table.get(ticket).and_then(|p| p.plan.as_ref()) else { return Ok(()) };
        let Some(server) = plan.server else { return Ok(()) };
        let until = plan.try_ends;
        let drawn = self.draw();
        // Few of all numbers are taken, so one of these is free but for bad luck.
        let ids = [drawn as u16, (drawn >> 16) as u16, (drawn >> 32) as u16, (drawn >> 48) as u16];
        let id = ids.into_iter().find(|id| table.reserve(*id, ticket)).ok_or(SockError::Exhausted)?;
        let Some((socket, sock)) = self.sockets.take(now, server, fx) else {
            table.free(id);
            return Err(SockError::Exhausted);
        };
        if let Some(p) = table.get_mut(ticket) {
            p.stage = Stage::Udp { id, socket, large };
            self.message(p, id, large);
        }
        if let Err(e) = fx.udp_send(sock, server, &self.out, 0, IpFields::ttl(TTL), false) {
            self.withdraw(table, ticket, fx);
            return Err(e);
        }
        table.set_deadline(ticket, until);
        Ok(())
    }

    /// A datagram on one of the sockets. The steps of the queries that it concerns; `Err`: it is no response.
    pub(super) fn datagram<E: Effects>(
        &mut self,
        now: Time,
        table: &mut Table,
        flow: FlowId,
        from: SocketAddr,
        message: &[u8],
        fx: &mut E,
    ) -> Result<(u64, Step), Vec<(u64, Step)>> {
        let found = table.by_id(be16(message, 0)).and_then(|ticket| {
            let p = table.get(ticket)?;
            let server = p.plan.as_ref()?.server?;
            let Stage::Udp { socket, large, .. } = p.stage else { return None };
            let way = if large { Way::LargeUdp } else { Way::Udp };
            let is_it = socket == flow.generation && same(server, from);
            Some((ticket, way, accept(p.target(), message).filter(|_| is_it)?))
        });
        if let Some((ticket, way, heard)) = found {
            self.withdraw(table, ticket, fx);
            return Ok((ticket, self.heard(now, table, ticket, way, heard, fx)));
        }
        if !self.sockets.is_guessed_at(flow.generation) {
            return Err(Vec::new());
        }
        let on_it = |(ticket, p): (u64, &Pending)| match p.stage {
            Stage::Udp { socket, .. } if socket == flow.generation => Some(ticket),
            _ => None,
        };
        let tickets: Vec<u64> = table.iter().filter_map(on_it).collect();
        let trouble = "too many answers to other questions";
        Err(tickets.into_iter().map(|t| (t, self.fail(now, table, t, trouble, fx))).collect())
    }

    /// The kernel reported an error for a query; `payload` is what was sent, as far as is known.
    pub(super) fn error<E: Effects>(
        &mut self,
        now: Time,
        table: &mut Table,
        flow: FlowId,
        (server, kind, payload): (SocketAddr, SockError, &[u8]),
        fx: &mut E,
    ) -> Option<(u64, Step)> {
        if flow.index != FLOW {
            return self.connected(now, table, flow, Err(kind), fx);
        }
        let ticket = table.by_id(be16(payload, 0)).filter(|_| payload.len() >= 2)?;
        let p = table.get(ticket)?;
        let is_it = matches!(p.stage, Stage::Udp { socket, .. } if socket == flow.generation)
            && p.plan.as_ref()?.server.is_some_and(|s| same(s, server));
        is_it.then(|| (ticket, self.fail(now, table, ticket, describe(kind), fx)))
    }

    // ---- connections ----------------------------------------------------------------------------------

    fn send_tcp<E: Effects>(
        &mut self,
        table: &mut Table,
        ticket: u64,
        until: Time,
        fx: &mut E,
    ) -> Result<(), SockError> {
        let Some(server) = table.get(ticket).and_then(|p| p.plan.as_ref()?.server) else { return Ok(()) };
        if self.connections.len() >= TCP_MOST {
            return Err(SockError::Exhausted);
        }
        self.connection = self.connection.wrapping_add(1);
        let flow = FlowId { index: FLOW_TCP, generation: self.connection };
        let sock = fx.tcp_connect(flow, Target::Address(server), IpFields::ttl(TTL), false)?;
        let id = self.draw() as u16;
        if let Some(p) = table.get_mut(ticket) {
            self.message(p, id, false);
            let length = self.out.len() as u16;
            let message = [&length.to_be_bytes()[..], &self.out].concat().into();
            p.stage = Stage::Tcp { sock, message, received: Vec::new(), connected: false };
        }
        self.connections.insert(flow.generation, ticket);
        table.set_deadline(ticket, until);
        Ok(())
    }

    fn tcp_failed<E: Effects>(
        &mut self,
        now: Time,
        table: &mut Table,
        ticket: u64,
        trouble: &'static str,
        fx: &mut E,
    ) -> Step {
        self.withdraw(table, ticket, fx);
        let again = table
            .get(ticket)
            .and_then(|p| p.plan.as_ref())
            .is_some_and(|plan| plan.edns && !plan.servers.use_tcp && now < plan.try_ends);
        if again && self.send_udp(now, table, ticket, true, fx).is_ok() {
            return Step::Waits;
        }
        self.fail(now, table, ticket, trouble, fx)
    }

    /// The outcome of a connect.
    pub(super) fn connected<E: Effects>(
        &mut self,
        now: Time,
        table: &mut Table,
        flow: FlowId,
        result: Result<(), SockError>,
        fx: &mut E,
    ) -> Option<(u64, Step)> {
        let ticket = *self.connections.get(&flow.generation)?;
        let Some(Stage::Tcp { sock, message, connected, .. }) = table.get_mut(ticket).map(|p| &mut p.stage)
        else {
            return None;
        };
        *connected = true;
        // A new connection takes a message of this size at once.
        let sent = result.and_then(|()| fx.tcp_send(*sock, message));
        match sent {
            Ok(n) if n == message.len() => None,
            Ok(_) => Some((ticket, self.tcp_failed(now, table, ticket, describe(SockError::Exhausted), fx))),
            Err(e) => Some((ticket, self.tcp_failed(now, table, ticket, describe(e), fx))),
        }
    }

    /// A connection has something to read.
    pub(super) fn readable<E: Effects>(
        &mut self,
        now: Time,
        table: &mut Table,
        flow: FlowId,
        fx: &mut E,
    ) -> Option<(u64, Step)> {
        let ticket = *self.connections.get(&flow.generation)?;
        let p = table.get_mut(ticket)?;
        let Stage::Tcp { sock, message: sent, received, connected: true } = &mut p.stage else { return None };
        let mut hung_up = false;
        loop {
            let whole = 2 + if received.len() < 2 { TCP_MAX } else { usize::from(be16(received, 0)) };
            if received.len() >= whole {
                break;
            }
            match fx.tcp_read(*sock, received, whole - received.len()) {
                Ok(Peek::Data(n)) if n > 0 => {}
                Ok(Peek::Empty) => return None,
                _ => {
                    hung_up = true;
                    break;
                }
            }
        }
        let (sent, received) = (std::mem::take(sent), std::mem::take(received));
        let whole = 2 + usize::from(be16(&received, 0));
        let message = received.get(2..whole).filter(|m| !hung_up && be16(m, 0) == be16(&sent, 2));
        let heard = message.and_then(|m| accept(p.target(), m));
        let Some(heard) = heard.filter(|h| h.0.flags & flags::TC == 0) else {
            let trouble = if hung_up { describe(SockError::Reset) } else { "not an answer to the question" };
            return Some((ticket, self.tcp_failed(now, table, ticket, trouble, fx)));
        };
        self.withdraw(table, ticket, fx);
        Some((ticket, self.heard(now, table, ticket, Way::Tcp, heard, fx)))
    }
}

/// How a response came.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Udp,
    LargeUdp,
    Tcp,
}
