//! Theory of operation: what stands between the flow table and the TCP state machine in [`crate::relay::tcp`]. A segment
//! finds its flow or opens one. Every call into a [`Tcb`] goes through [`Relay::with_index`], which lends it the guest's
//! counters and budget, and then does what the returned [`Fate`] asks for and what the flow wants: a timer, the end of the
//! batch, or a notice when the port takes frames again.

use crate::context::Context;
use crate::interface::effects::{Effects, SockError};
use crate::interface::stats::DropReason;
use crate::interface::types::{FlowId, FrameMeta, IpFields, PortId, Target, Time};
use crate::l2::lan::Sender;
use crate::l3::gateway::Refusal;
use crate::policy::shaping::{Allowance, Owner, Shaping, Way};
use crate::policy::{Direction, RuleId};
use crate::relay::Relay;
use crate::relay::errors::{connect_failed, icmp_for};
use crate::relay::socket_memory::FEW_FLOWS;
use crate::relay::tcp::{Ctx, Fate, Path, Tcb, Timeouts};
use crate::relay::turns::TURN_SHORT;
use crate::tables::flow::{Chain, Flow, Key, State};
use crate::util::siphash::address_words;
use guestnet_wire::ether::Mac;
use guestnet_wire::parse::Packet;
use guestnet_wire::tcp::{Options, Tcp, flags};
use guestnet_wire::{be16, proto};
use std::net::SocketAddr;

/// How often all idle connections of a guest are checked, and how many at once; the others have timers of their own.
const RECHECK_MS: u64 = 10_000;
const RECHECK_MOST: usize = 1024;
/// Bytes of a segment's data to a guest of IPv6 that does not say what it takes.
const DEFAULT_MSS6: u16 = 1220;

/// Flows that waited for a limit and are called before other work has its turn.
const CALLED_MOST: usize = 64;

/// What a flow may carry in a call.
#[cold]
#[inline(never)]
fn allowed(shaping: &mut Shaping, now: Time, owner: Owner, called: Option<Way>, tcb: &mut Tcb) -> Allowance {
    let allowance = shaping.allowance(now, owner, called);
    tcb.set_window_most(allowance.window);
    allowance
}

/// Charges what a flow has carried, of what it had and has, and puts it in a queue where a limit stopped it.
#[cold]
#[inline(never)]
fn settle(shaping: &mut Shaping, now: Time, owner: Owner, had: Allowance, has: Allowance, tcb: &mut Tcb) {
    let used = |had: u32, has: u32| u64::from(had.saturating_sub(has));
    shaping.charge(now, owner, used(had.up, has.up), used(had.down, has.down));
    for way in [Way::Up, Way::Down] {
        if tcb.enters_queue(way) {
            shaping.wait(now, owner, tcb.id(), way);
        }
    }
}

impl Relay {
    /// Relays a TCP segment of a guest.
    ///
    /// # Errors
    /// Why it is dropped; the guest has been told, where it should be.
    pub fn tcp_out<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        from: Sender,
        frame: &mut [u8],
        p: &Packet,
        meta: FrameMeta,
    ) -> Result<(), DropReason> {
        let bytes = frame.get(p.l4..p.end).unwrap_or(&[]);
        let seg = Tcp::parse(bytes)?;
        let options = Options::parse(bytes.get(20..usize::from(seg.header_len)).unwrap_or(&[]));
        let guest = SocketAddr::new(p.src, p.src_port);
        let remote = SocketAddr::new(p.dst, p.dst_port);
        let key = Key { slot: from.slot, proto: proto::TCP, guest, remote };
        if let Some(index) = self.flows.find(&key) {
            cx.gateway.check_ttl(&mut cx.link, from, frame, p)?;
            if let Some(f) = self.flows.at_mut(index) {
                f.mac = from.mac;
                f.last = cx.link.now;
                f.packets_out = f.packets_out.saturating_add(1);
                if p.payload_len() >= TURN_SHORT as usize / 2
                    && let State::Tcp(tcb) = &mut f.state
                {
                    tcb.moves_bulk(cx.link.now);
                }
                if f.parked
                    && let Some(guest) = self.guests.get_mut(from.slot)
                {
                    self.flows.unlink(&mut guest.lru, Chain::Lru, index);
                    self.flows.push(&mut guest.lru, Chain::Lru, index);
                }
            }
            let payload = frame.get(p.payload..p.end).unwrap_or(&[]);
            let fate = self.with_index(cx, index, |tcb, cx| {
                tcb.note_tos(cx, p.tos);
                tcb.segment(cx, &seg, &options, payload)
            });
            if fate != Some(Fate::Reopen) {
                return Ok(());
            }
        }
        let syn = seg.flags & (flags::SYN | flags::ACK | flags::RST | flags::FIN) == flags::SYN;
        if p.src_port == 0 || p.dst_port == 0 || !syn {
            let own = cx.link.lan.addressing().is_own(p.dst);
            if !own && cx.route_to_guest(from, frame, p, meta)? {
                return Ok(());
            }
            let why = if syn { DropReason::BadDestination } else { DropReason::NoFlow };
            return Err(cx.gateway.reset(&mut cx.link, from, p, &seg, why));
        }
        let addressing = cx.link.lan.addressing();
        let (target, rule, inspect) = match addressing.services().find(proto::TCP, remote) {
            Some(service) => {
                let Some(port) = cx.link.lan.port(from.slot) else { return Ok(()) };
                (Target::Service(service, port.id), RuleId::NONE, None)
            }
            None if addressing.ends_here(p.dst) => {
                return Err(cx.gateway.reset(&mut cx.link, from, p, &seg, DropReason::BadDestination));
            }
            None => {
                if cx.route_to_guest(from, frame, p, meta)? {
                    return Ok(());
                }
                let admitted = cx.outbound(from, frame, p, remote)?;
                (Target::Address(admitted.target), admitted.rule, admitted.inspect)
            }
        };
        let slot = from.slot;
        if let Err(why) = self.admit(cx, slot, false).and_then(|()| self.admit_memory(slot)) {
            let refused = Refusal::outbound(proto::TCP, guest, remote);
            cx.gateway.report_denied(&mut cx.link, slot, refused, None, why);
            return Err(cx.gateway.reset(&mut cx.link, from, p, &seg, why));
        }
        let id = self.flows.next_id();
        let ip = IpFields { ttl: p.ttl.saturating_sub(1).max(1), tos: p.tos };
        let mut options = options;
        if guest.is_ipv6() {
            // RFC 9293 3.7.1: what holds where a SYN does not say it.
            options.mss.get_or_insert(DEFAULT_MSS6);
        }
        let tight = self.holds_too_much(slot);
        let now = cx.link.now;
        let sock = match cx.link.fx.tcp_connect(id, target, ip, tight) {
            Ok(sock) => sock,
            Err(SockError::Refused | SockError::Reset | SockError::Exhausted) => {
                return Err(cx.gateway.reset(&mut cx.link, from, p, &seg, DropReason::HostError));
            }
            Err(e) => {
                let (why, error) = (DropReason::HostError, icmp_for(e, 0));
                return Err(cx.gateway.refuse(&mut cx.link, from, frame, p, why, error));
            }
        };
        let mut tcb = Tcb::outbound(id, sock, &seg, &options, self.isn(now, &key), self.tcp_timeouts(), now)
            .with_ip(be16(frame, p.l3.saturating_add(4)), p.tos);
        tcb.memory.tight = tight;
        if let Some(strict) = inspect {
            tcb = tcb.with_hold(strict);
        }
        let admitted = cx.policy.generation();
        let state = State::Tcp(Box::new(tcb));
        let mut flow = Flow::new(key, from.mac, Direction::Outbound, admitted, now, state).by(rule);
        flow.packets_out = 1;
        let id = self.open_flow(cx, flow, inspect);
        self.wake_tcp(now, id.index);
        Ok(())
    }

    /// Checks the idle connections of a guest that may have restarted, within a rate.
    pub fn recheck<E: Effects>(&mut self, cx: &mut Context<'_, E>, slot: u32) {
        let now = cx.link.now;
        let Some(guest) = self.guests.get_mut(slot).filter(|g| g.rechecked.plus_ms(RECHECK_MS) <= now) else {
            return;
        };
        guest.rechecked = now;
        let of_port = |(id, f): (FlowId, &Flow)| {
            (f.key.slot == slot && matches!(f.state, State::Tcp(_))).then_some(id.index)
        };
        let some: Vec<u32> = self.flows.iter().filter_map(of_port).take(RECHECK_MOST).collect();
        for index in some {
            self.with_index(cx, index, |tcb, cx| tcb.recheck(cx));
        }
    }

    /// The timeouts of TCP flows.
    pub(super) fn tcp_timeouts(&self) -> Timeouts {
        let t = &self.timeouts;
        Timeouts {
            established_ms: t.tcp_established.saturating_mul(1000),
            transitory_ms: t.tcp_transitory.saturating_mul(1000),
            ..Timeouts::default()
        }
    }

    /// Initial sequence number: a clock of 4.096 us steps plus a keyed hash of the flow (RFC 6528).
    pub(super) fn isn(&self, now: Time, key: &Key) -> u32 {
        let (g, r) = (address_words(key.guest.ip()), address_words(key.remote.ip()));
        let ports = u64::from(key.guest.port()) << 16 | u64::from(key.remote.port());
        let hash = self.isn_key.hash(&[u64::from(key.slot), g[0], g[1], r[0], r[1], ports]);
        (hash as u32).wrapping_add((now.0 >> 12) as u32)
    }

    /// As [`Relay::with_index`], unless the identifier is stale.
    pub(super) fn with_flow<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        id: FlowId,
        f: impl FnOnce(&mut Tcb, &mut Ctx<'_, E>) -> Fate,
    ) -> Option<Fate> {
        self.flows.get_mut(id)?.last = cx.link.now;
        self.with_index(cx, id.index, f)
    }

    /// Calls into the state machine of a flow and does what follows.
    pub(super) fn with_index<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        index: u32,
        f: impl FnOnce(&mut Tcb, &mut Ctx<'_, E>) -> Fate,
    ) -> Option<Fate> {
        let now = cx.link.now;
        let flow = self.flows.at_mut(index)?;
        let guest = self.guests.get_mut(flow.key.slot)?;
        let (port, config, counters) = cx.link.lan.port_and_counters(flow.key.slot)?;
        let path = Path {
            port,
            gateway_mac: cx.gateway.mac(),
            guest_mac: flow.mac,
            guest: flow.key.guest,
            remote: flow.key.remote,
            mtu: config.mtu,
            gso_max: config.gso_max,
        };
        let State::Tcp(tcb) = &mut flow.state else { return None };
        let (before, frames) = (counters.tx_bytes, counters.tx_frames);
        let limited = cx.policy.shaping.is_active();
        let mut allowance = Allowance::ALL;
        if limited {
            let called = std::mem::take(&mut self.called);
            let owner = cx.policy.owner(port, flow.key.slot, flow.rule);
            allowance = allowed(&mut cx.policy.shaping, now, owner, called, tcb);
        }
        let turn = if tcb.is_bulk(now) { self.turns.left(now, index) } else { TURN_SHORT };
        let budget = &mut guest.budget;
        let fx = &mut *cx.link.fx;
        let mut context = Ctx { now, fx, counters, path: &path, budget, turn, allowance };
        let fate = f(tcb, &mut context);
        if limited {
            let (had, has) = (allowance, context.allowance);
            let owner = cx.policy.owner(port, flow.key.slot, flow.rule);
            settle(&mut cx.policy.shaping, now, owner, had, has, tcb);
        }
        let sent = context.counters.tx_frames.wrapping_sub(frames);
        flow.packets_in = flow.packets_in.saturating_add(sent as u32);
        let bulk = tcb.is_bulk(now);
        if bulk {
            self.turns.sent(counters.tx_bytes.wrapping_sub(before));
        } else {
            self.turns.active(now, index);
        }
        if matches!(fate, Fate::Live | Fate::Look) {
            let (batch, waits) = (tcb.wants_batch_end(), tcb.waits_for_port() && !tcb.is_over());
            // A flow is in one of the two lists at a time; waiting for the port takes precedence.
            let park = tcb.may_be_evicted() && !waits;
            let parked = std::mem::replace(&mut flow.parked, park);
            let (measure, due) = (tcb.wants_measure(guest.flows > FEW_FLOWS), tcb.deadline());
            if batch && bulk {
                self.flows.push(&mut self.batch, Chain::Siblings, index);
            } else if batch {
                self.flows.push_front(&mut self.batch, Chain::Siblings, index);
            }
            if parked != park {
                let (from, to) = match park {
                    true => (&mut guest.waiting, Some(&mut guest.lru)),
                    false => (&mut guest.lru, None),
                };
                self.flows.unlink(from, Chain::Lru, index);
                if let Some(to) = to {
                    self.flows.push(to, Chain::Lru, index);
                }
            }
            if waits {
                self.flows.push(&mut guest.waiting, Chain::Lru, index);
            }
            self.wake_by(now, index, due);
            if measure {
                self.measure(cx.link.fx, index);
            }
            return Some(fate);
        }
        let (key, mac, id) = (flow.key, flow.mac, tcb.ip_id());
        self.close_flow(cx, index);
        match fate {
            Fate::Unreachable { error, seq } => {
                let error = icmp_for(error, 0);
                let error = if key.guest.is_ipv4() { Some(error) } else { error.for_v6() };
                if let Some(error) = error {
                    connect_failed(cx, &key, mac, error, None, seq, id);
                }
            }
            Fate::Forgotten => self.recheck(cx, key.slot),
            Fate::Live | Fate::Look | Fate::Closed | Fate::Reopen => {}
        }
        Some(fate)
    }

    /// The end of a batch of frames and socket events: the flows that asked for it send what the batch called for, bulk
    /// flows until the round is full.
    pub fn batch_end<E: Effects>(&mut self, cx: &mut Context<'_, E>) {
        let now = cx.link.now;
        for _ in 0..self.batch.len {
            let index = self.batch.head;
            let full = self.turns.left(now, index) == 0;
            if full && self.flows.at(index).is_some_and(|f| f.is_bulk(now)) {
                break;
            }
            self.flows.unlink(&mut self.batch, Chain::Siblings, index);
            if self.with_index(cx, index, |tcb, cx| tcb.batch_end(cx)) == Some(Fate::Look) {
                self.look(cx, index);
            }
        }
        self.turns.round_ended();
    }

    /// A port takes frames again: the flows that waited for it go on, in turn, until it is full.
    pub fn port_writable<E: Effects>(&mut self, cx: &mut Context<'_, E>, slot: u32, port: PortId) {
        let waiting = self.guests.get(slot).map_or(0, |g| g.waiting.len);
        for _ in 0..waiting {
            let Some(guest) = self.guests.get_mut(slot) else { return };
            let index = guest.waiting.head;
            if self.flows.at(index).is_none() || cx.link.fx.port_room(port) == 0 {
                return;
            }
            self.flows.unlink(&mut guest.waiting, Chain::Lru, index);
            self.with_index(cx, index, |tcb, cx| tcb.port_writable(cx));
        }
    }

    /// Calls flows that waited for a limit, as far as their limits have credit, some at a time.
    pub fn limits_due<E: Effects>(&mut self, cx: &mut Context<'_, E>) {
        for _ in 0..CALLED_MOST {
            let Some((id, way)) = cx.policy.shaping.next_due(cx.link.now) else { return };
            self.called = Some(way);
            self.with_flow(cx, id, |tcb, cx| tcb.unthrottled(cx, way));
            self.called = None;
            cx.policy.shaping.turn_ended(cx.link.now);
        }
    }

    /// The MAC of the guest is known that a flow waited for: it opens.
    pub fn resume<E: Effects>(&mut self, cx: &mut Context<'_, E>, id: FlowId, mac: Mac) {
        if let Some(f) = self.flows.get_mut(id) {
            f.mac = mac;
        }
        self.with_flow(cx, id, |tcb, cx| tcb.start(cx));
    }

    /// Closes a flow that waited for a guest that did not answer.
    pub fn give_up<E: Effects>(&mut self, cx: &mut Context<'_, E>, id: FlowId) {
        if let Some(slot) = self.flows.get_mut(id).map(|f| f.key.slot) {
            cx.link.lan.count_drop(slot, DropReason::NoEndpoint);
            self.close_flow(cx, id.index);
        }
    }
}
