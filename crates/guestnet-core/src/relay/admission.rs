//! Theory of operation: how flows are opened and closed, and their timers.
//!
//! - A new flow must be admitted: within the cap of its guest, that of the table, and the guest's cap of sockets.
//! - Where there is no room, flows of the same guest are evicted, least recently used first: one-shot datagram flows, and
//!   TCP flows that are being opened or in TIME-WAIT. Flows of other guests are never evicted. (A program that gave up a
//!   connect sends nothing; one that still waits repeats its SYN, which opens the flow again.)
//! - Timers are lazy. A flow that is used only notes its new deadline; when the old one comes, the wheel is set again.

use crate::context::Context;
use crate::interface::effects::{Close, Effects, Event};
use crate::interface::stats::DropReason;
use crate::interface::types::{FlowId, Time};
use crate::policy::RuleId;
use crate::policy::shaping::FlowRefused;
use crate::relay::Relay;
use crate::relay::tcp::Fate;
use crate::tables::flow::{Chain, Flow, Key, State};
use crate::util::account::count;
use guestnet_wire::proto;

/// Evictions that one new flow may cause; more only happens when many flows share one socket.
const EVICTIONS: u32 = 32;
/// Deadlines further away than this many milliseconds are rounded up to a second, so that they fire together.
const COARSE_MS: u64 = 10_000;

/// Rounds a far deadline up; milliseconds.
fn coarse(now: u64, deadline: u64) -> u64 {
    if deadline > now.saturating_add(COARSE_MS) {
        deadline.div_ceil(1000).saturating_mul(1000)
    } else {
        deadline
    }
}

impl Relay {
    /// Makes room for a new flow of a port, and a new socket where `socket`.
    ///
    /// # Errors
    /// [`DropReason::FlowLimit`] or [`DropReason::TableFull`] when nothing can be evicted.
    pub(super) fn admit<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        slot: u32,
        socket: bool,
    ) -> Result<(), DropReason> {
        if cx.policy.shaping.is_active() {
            let open = self.guests.get(slot).map_or(0, |g| g.flows);
            let of_all = u32::try_from(self.flows.count()).unwrap_or(u32::MAX);
            cx.policy.shaping.opens(cx.link.now, slot, open, of_all).map_err(|refused| match refused {
                FlowRefused::TooMany => DropReason::FlowLimit,
                FlowRefused::TooFast => DropReason::RateLimit,
            })?;
        }
        let records = if socket { 2 } else { 1 };
        for _ in 0..=EVICTIONS {
            let most = self.limits.of_one_port(u32::try_from(self.flows.count()).unwrap_or(u32::MAX));
            let guest = self.guests.get(slot).ok_or(DropReason::NoEndpoint)?;
            let over = if !self.flows.has_room(records) {
                DropReason::TableFull
            } else if guest.flows >= most || socket && guest.sockets >= self.limits.udp_sockets_per_port {
                DropReason::FlowLimit
            } else {
                return Ok(());
            };
            let oldest = guest.lru.head;
            if self.flows.at(oldest).is_none() {
                return Err(over);
            }
            self.close_flow(cx, oldest);
        }
        Err(DropReason::FlowLimit)
    }

    /// Puts an admitted flow in the table, counts it and reports it.
    /// `inspect` is as in [`crate::policy::Admitted`].
    pub(super) fn open_flow<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        mut flow: Flow,
        inspect: Option<bool>,
    ) -> FlowId {
        let Key { slot, proto, guest, remote } = flow.key;
        let inbound = flow.direction.is_inbound();
        let tcp = matches!(flow.state, State::Tcp(_));
        flow.parked = tcp;
        let rule = flow.rule;
        let id = self.flows.insert(flow);
        if inspect.is_some() || !inbound && cx.policy.pins.has_some(slot) {
            self.note_evidence(cx, id.index, inspect);
        }
        if let Some(g) = self.guests.get_mut(slot) {
            if tcp {
                self.flows.push(&mut g.lru, Chain::Lru, id.index);
            }
            g.flows = g.flows.saturating_add(1);
            self.flows.push(&mut g.records, Chain::Port, id.index);
        }
        if let Some((port, _, counters)) = cx.link.lan.port_and_counters(slot) {
            count(&mut counters.flows_opened);
            let rule = (rule != RuleId::NONE).then(|| cx.policy.label(port, rule));
            let name = self.evidence.get(&id.index).and_then(|e| e.name.clone());
            let opened = Event::FlowOpened { flow: id, port, proto, guest, remote, inbound, rule, name };
            if !cx.link.fx.event(opened) {
                counters.drop(DropReason::EventRingFull);
            }
        }
        id
    }

    /// Ends a flow and closes its socket (that of a mapping with the last flow of it). Nothing is sent to the guest.
    pub(super) fn close_flow<E: Effects>(&mut self, cx: &mut Context<'_, E>, index: u32) {
        let Some(f) = self.flows.at(index) else { return };
        if f.is_mapping() {
            return;
        }
        let id = self.flows.id(index);
        let (slot, tcp, parked) = (f.key.slot, matches!(f.state, State::Tcp(_)), f.parked);
        if let Some(guest) = self.guests.get_mut(slot) {
            let list = if tcp && !parked { &mut guest.waiting } else { &mut guest.lru };
            self.flows.unlink(list, Chain::Lru, index);
            self.flows.unlink(&mut guest.records, Chain::Port, index);
        }
        if tcp {
            self.flows.unlink(&mut self.batch, Chain::Siblings, index);
        }
        if let Some(State::Datagram { mapping, .. }) = self.flows.at(index).map(|f| &f.state) {
            let mapping = *mapping;
            self.leave_mapping(cx.link.fx, index, mapping);
        }
        self.wheel.cancel(index);
        let Some(mut f) = self.flows.remove(index) else { return };
        let (mut bytes_out, mut bytes_in) = (f.bytes_out, f.bytes_in);
        let (packets_out, packets_in) = (Some(f.packets_out), Some(f.packets_in));
        if let Some(guest) = self.guests.get_mut(slot) {
            guest.flows = guest.flows.saturating_sub(1);
            if let State::Tcp(tcb) = &mut f.state {
                tcb.discard(cx.link.fx, &mut guest.budget);
                let held = tcb.note_memory(0);
                self.book_memory(slot, held, 0);
                (bytes_out, bytes_in) = tcb.totals();
            }
        }
        if let State::Forwarded { forward, client, .. } = f.state {
            self.clients.remove(&(forward.0, client));
        }
        let (name, shown) = self.drop_evidence(cx, slot, f.key.remote.ip(), index);
        if let Some((port, _, counters)) = cx.link.lan.port_and_counters(slot) {
            count(&mut counters.flows_closed);
            let current = f.rule != RuleId::NONE && f.admitted == cx.policy.generation();
            let rule = current.then(|| cx.policy.label(port, f.rule));
            let closed = Event::FlowClosed {
                flow: id,
                port,
                bytes_out,
                bytes_in,
                packets_out,
                packets_in,
                rule,
                name,
                shown,
            };
            if !cx.link.fx.event(closed) {
                counters.drop(DropReason::EventRingFull);
            }
        }
    }

    /// Takes a flow off its mapping; the last one takes the mapping along.
    fn leave_mapping<E: Effects>(&mut self, fx: &mut E, index: u32, mapping: u32) {
        if let Some(remote) = self.flows.at(index).map(|f| f.key.remote.ip()) {
            self.flows.drop_peer(mapping, remote);
        }
        let Some(State::Mapping { flows, sock }) = self.flows.at(mapping).map(|m| &m.state) else { return };
        let (mut list, sock) = (*flows, *sock);
        self.flows.unlink(&mut list, Chain::Siblings, index);
        if list.len > 0 {
            if let Some(State::Mapping { flows, .. }) = self.flows.at_mut(mapping).map(|m| &mut m.state) {
                *flows = list;
            }
            return;
        }
        if let Some(m) = self.flows.remove(mapping) {
            fx.close(sock, Close::Graceful);
            if let Some(g) = self.guests.get_mut(m.key.slot) {
                g.sockets = g.sockets.saturating_sub(1);
            }
        }
    }

    /// Closes the socket of a mapping that has no flow.
    pub(super) fn close_empty<E: Effects>(&mut self, cx: &mut Context<'_, E>, mapping: u32) {
        let Some(State::Mapping { flows, sock }) = self.flows.at(mapping).map(|m| &m.state) else { return };
        let sock = *sock;
        if flows.len == 0
            && let Some(m) = self.flows.remove(mapping)
        {
            cx.link.fx.close(sock, Close::Graceful);
            if let Some(g) = self.guests.get_mut(m.key.slot) {
                g.sockets = g.sockets.saturating_sub(1);
            }
        }
    }

    /// Puts a flow on the list of its mapping.
    pub(super) fn join_mapping(&mut self, index: u32, mapping: u32) {
        let Some(remote) = self.flows.at(index).map(|f| f.key.remote.ip()) else { return };
        self.flows.add_peer(mapping, remote);
        let Some(State::Mapping { flows, .. }) = self.flows.at(mapping).map(|m| &m.state) else { return };
        let mut list = *flows;
        self.flows.push(&mut list, Chain::Siblings, index);
        if let Some(State::Mapping { flows, .. }) = self.flows.at_mut(mapping).map(|m| &mut m.state) {
            *flows = list;
        }
    }

    /// Notes that a datagram flow was used: it gets a new deadline and a new place among those that may be evicted.
    pub(super) fn touch(&mut self, at: Time, index: u32) {
        let now = at.as_ms();
        let t = self.timeouts;
        // A mapping ends with its flows, and is never evicted by itself.
        let Some(f) = self.flows.at_mut(index).filter(|f| !f.is_mapping()) else { return };
        f.last = at;
        let seconds = if matches!(f.key.proto, proto::ICMP | proto::ICMPV6) {
            t.icmp
        } else if f.is_dns() && f.packets_in > 0 {
            t.udp_dns
        } else {
            t.udp
        };
        let deadline = coarse(now, now.saturating_add(u64::from(seconds) * 1000));
        f.expires = deadline;
        let (slot, assured) = (f.key.slot, f.assured());
        let may_be_evicted = f.links[Chain::Lru as usize].is_linked();
        self.wake_at(index, deadline);
        if assured && !may_be_evicted {
            return;
        }
        if let Some(guest) = self.guests.get_mut(slot)
            && (assured || guest.lru.tail != index)
        {
            self.flows.unlink(&mut guest.lru, Chain::Lru, index);
            if !assured {
                self.flows.push(&mut guest.lru, Chain::Lru, index);
            }
        }
    }

    /// Makes sure that the flow's timer fires at `deadline` milliseconds or before.
    pub(super) fn wake_at(&mut self, index: u32, deadline: u64) {
        if self.wheel.deadline(index).is_none_or(|d| d > deadline) {
            self.wheel.set(index, deadline);
        }
    }

    /// Makes sure that the timer of a TCP flow fires when the flow needs it.
    pub(super) fn wake_tcp(&mut self, now: Time, index: u32) {
        let Some(f) = self.flows.at(index) else { return };
        let State::Tcp(tcb) = &f.state else { return };
        let (due, expires) = (tcb.deadline(), f.expires);
        self.wake_by(now, index, due);
        if expires != u64::MAX {
            self.wake_at(index, expires);
        }
    }

    /// Makes sure that the flow's timer fires not long after `due`.
    #[inline]
    pub(super) fn wake_by(&mut self, now: Time, index: u32, due: Option<Time>) {
        let Some(ms) = due.map(|at| at.0.div_ceil(1_000_000)) else { return };
        if self.wheel.deadline(index).is_none_or(|d| d > ms) {
            let deadline = coarse(now.as_ms(), ms);
            self.wake_at(index, deadline);
        }
    }

    /// Handles the timer of a flow.
    pub(super) fn flow_timer<E: Effects>(&mut self, cx: &mut Context<'_, E>, index: u32) {
        let now = cx.link.now;
        let Some(f) = self.flows.at(index) else { return };
        match &f.state {
            State::Tcp(_) if f.expires <= now.as_ms() => {
                self.inspection_due(cx, index);
                self.wake_tcp(now, index);
            }
            State::Tcp(tcb) => match tcb.deadline() {
                Some(at) if at <= now => {
                    let fate = self.with_index(cx, index, |tcb, cx| tcb.timer(cx));
                    if fate == Some(Fate::Live) {
                        self.measure_idle(cx.link.fx, index);
                        self.wake_tcp(now, index);
                    }
                }
                _ => self.wake_tcp(now, index),
            },
            State::Mapping { .. } => {}
            _ if f.expires > now.as_ms() => {
                let at = f.expires;
                self.wake_at(index, at);
            }
            State::Held { .. } => self.datagrams_due(cx, index),
            _ => self.close_flow(cx, index),
        }
    }
}
