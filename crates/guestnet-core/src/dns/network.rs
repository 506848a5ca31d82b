//! Theory of operation: how the forwarder meets the rest of the network. It knows nothing of slots and frames itself: calls
//! come here with a [`Context`], outcomes are counted, and responses are sent.

use super::guard::DenialNote;
use super::pending::Client;
use super::{DnsForwarder, Outcome, Reply, Tally, Verdict};
use crate::context::Context;
use crate::interface::config::{DatagramError, NetworkConfig};
use crate::interface::effects::{Effects, Event, NameDenied, SockError};
use crate::interface::stats::{Counters, DropReason};
use crate::interface::types::{FlowId, PortId, SockId};
use crate::l3::gateway::Datagram;
use crate::util::siphash::SipKey;
use std::net::SocketAddr;

fn count(counters: &mut Counters, outcome: Outcome) {
    counters.dns_hits += u64::from(outcome == Outcome::Hit);
    counters.dns_misses += u64::from(outcome != Outcome::Hit);
    counters.dns_asked += u64::from(outcome == Outcome::Asked);
    match outcome {
        Outcome::Dropped(why) => counters.drop(why),
        Outcome::Later => counters.drop(DropReason::RateLimit),
        Outcome::Hit | Outcome::Refused | Outcome::Asked | Outcome::Waits => {}
    }
}

impl DnsForwarder {
    /// The forwarder of a network.
    pub(crate) fn of_network(config: &NetworkConfig) -> DnsForwarder {
        let sip = SipKey::from_secret(&config.secret, 16).derive(u64::from(u32::MAX));
        DnsForwarder::new(sip, &config.limits)
    }

    /// A guest's datagram to the DNS service.
    pub(crate) fn serve<E: Effects>(&mut self, cx: &mut Context<'_, E>, d: &Datagram<'_>) {
        let slot = d.from.slot;
        let Some(port) = cx.link.lan.port(slot).map(|p| p.id) else { return };
        let Some(events) = cx.gateway.service_rate(slot) else { return };
        let client = Client::Datagram { port, mac: d.from.mac, src: d.src, dst: d.dst };
        let outcome = self.query(cx.link.now, client, d.payload, events, cx.link.fx);
        if let Some(c) = cx.link.lan.counters_mut(slot) {
            count(c, outcome);
        }
        self.send_replies(cx);
    }

    /// Bytes of a guest's TCP connection; how many were read.
    pub(crate) fn stream_received<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        port: PortId,
        sock: SockId,
        data: &[u8],
        ended: bool,
    ) -> usize {
        let Some(slot) = cx.link.lan.slot(port) else { return data.len() };
        let Some(events) = cx.gateway.service_rate(slot) else { return data.len() };
        let Some(counters) = cx.link.lan.counters_mut(slot) else { return data.len() };
        let judged = |outcome| count(counters, outcome);
        let read = self.stream(cx.link.now, port, sock, data, ended, events, cx.link.fx, judged);
        self.send_replies(cx);
        read
    }

    /// The authority's verdict on the name of a query.
    pub(crate) fn take_verdict<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        ticket: u64,
        generation: u64,
        verdict: Verdict,
    ) {
        self.verdict(cx.link.now, ticket, generation, verdict, cx.link.fx);
        self.send_replies(cx);
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
        let wrong = self.datagrams(cx.link.now, flow, from, payload, segment, cx.link.fx);
        (0..wrong).for_each(|_| cx.link.lan.base_mut().drop(DropReason::Filtered));
        self.send_replies(cx);
    }

    /// The kernel reported an error for what was sent to a name server.
    pub(crate) fn sock_error<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        flow: FlowId,
        error: &DatagramError<'_>,
    ) {
        let what = (error.dst, error.kind, error.payload);
        self.upstream_error(cx.link.now, flow, what, cx.link.fx);
        self.send_replies(cx);
    }

    /// The outcome of a connect to a name server.
    pub(crate) fn tcp_connected<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        flow: FlowId,
        result: Result<(), SockError>,
    ) {
        self.upstream_connected(cx.link.now, flow, result, cx.link.fx);
        self.send_replies(cx);
    }

    /// A connection to a name server has something to read.
    pub(crate) fn tcp_readable<E: Effects>(&mut self, cx: &mut Context<'_, E>, flow: FlowId) {
        self.upstream_readable(cx.link.now, flow, cx.link.fx);
        self.send_replies(cx);
    }

    /// Does what is due.
    pub(crate) fn run_timers<E: Effects>(&mut self, cx: &mut Context<'_, E>) {
        self.timers(cx.link.now, cx.link.fx);
        self.send_replies(cx);
    }

    /// Checks that what is kept twice agrees.
    pub(crate) fn audit(&self) -> Result<(), String> {
        if self.is_sound() { Ok(()) } else { Err("the DNS forwarder's books do not agree".into()) }
    }

    /// Notes which addresses guests got, and reports the queries that were refused.
    fn hand_on_notes<E: Effects>(&mut self, cx: &mut Context<'_, E>) {
        let now = cx.link.now;
        for pin in self.guard.pins.drain(..) {
            if let Some(slot) = cx.link.lan.slot(pin.port) {
                cx.policy.pins.note(slot, pin.ip, &pin.name, pin.life_s, now);
            }
        }
        for DenialNote { port, name, kind, rule, reason } in self.guard.denials.drain(..) {
            let Some(slot) = cx.link.lan.slot(port) else { continue };
            cx.link.lan.count_drop(slot, DropReason::Policy);
            let Some(unreported) = cx.gateway.count_denial(now, slot) else { continue };
            let denied = NameDenied { port, name, kind, rule, reason, unreported };
            if !cx.link.fx.event(Event::NameDenied(Box::new(denied))) {
                cx.link.lan.count_drop(slot, DropReason::EventRingFull);
            }
        }
    }

    #[inline]
    fn send_replies<E: Effects>(&mut self, cx: &mut Context<'_, E>) {
        if !self.has_replies() {
            return;
        }
        self.hand_on_notes(cx);
        let replies = self.take_replies();
        for (reply, bytes) in replies.iter() {
            send(cx, reply, bytes);
        }
        self.give_back(replies);
    }
}

fn send<E: Effects>(cx: &mut Context<'_, E>, reply: &Reply, bytes: &[u8]) {
    let lan = &mut *cx.link.lan;
    let Some(slot) = lan.slot(reply.client.port()) else {
        return lan.base_mut().drop(DropReason::NoEndpoint);
    };
    if reply.tally != Tally::Nothing
        && let Some(c) = lan.counters_mut(slot)
    {
        c.dns_refused += u64::from(reply.tally == Tally::Refused);
        c.dns_unanswered += u64::from(reply.tally != Tally::Refused);
        if reply.tally == Tally::Lost {
            c.drop(DropReason::EventRingFull);
        }
    }
    if let Client::Datagram { mac, src, dst, .. } = reply.client
        && let Err(why) = cx.gateway.frames().send_udp(&mut cx.link, slot, mac, dst, src, bytes, 0)
    {
        cx.link.lan.count_drop(slot, why);
    }
}
