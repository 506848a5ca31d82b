//! Theory of operation: how records of the flow table come and go. A new flow must be admitted: within the
//! port's cap, the table's, and for sockets the port's cap of those; one-shot datagram flows and TCP flows
//! that are being opened or in TIME-WAIT of the same port make room, least recently used first, never anybody
//! else's. (A program that gave up on a connect says nothing; one that still waits repeats its SYN, which opens
//! the flow again.) Timers are lazy: a flow that is used only notes its new end, and the wheel finds out when the old one comes.

use crate::interface::effects::{Close, Effects, Event};
use crate::interface::stats::DropReason;
use crate::interface::types::{FlowId, PortId, Time};
use crate::network::Network;
use crate::relay::tcp::Fate;
use crate::tables::flow::{Chain, Flow, Key, State};
use guestnet_wire::proto;

/// Evictions that one new flow may cause; more only happens when many flows share one socket.
const EVICTIONS: u32 = 32;
/// Ends further away than this many milliseconds are rounded up to a second, so that they fire together.
const COARSE_MS: u64 = 10_000;

/// Rounds a far deadline up; milliseconds.
fn coarse(now: u64, deadline: u64) -> u64 {
    if deadline > now.saturating_add(COARSE_MS) {
        deadline.div_ceil(1000).saturating_mul(1000)
    } else {
        deadline
    }
}

impl Network {
    /// Makes room for a new flow of a port, and a new socket where `socket`.
    ///
    /// # Errors
    /// [`DropReason::FlowLimit`] or [`DropReason::TableFull`] when nothing can be evicted.
    pub(crate) fn admit<E: Effects>(
        &mut self,
        slot: u32,
        socket: bool,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let limits = self.cfg.limits.clone();
        let records = 1 + usize::from(socket);
        for _ in 0..=EVICTIONS {
            let most = limits.of_one_port(u32::try_from(self.flows.count()).unwrap_or(u32::MAX));
            let port = self.ports.get(slot).ok_or(DropReason::NoEndpoint)?;
            let over = if !self.flows.has_room(records) {
                DropReason::TableFull
            } else if port.flows >= most || socket && port.sockets >= limits.udp_sockets_per_port {
                DropReason::FlowLimit
            } else {
                return Ok(());
            };
            let oldest = port.lru.head;
            if self.flows.at(oldest).is_none() {
                return Err(over);
            }
            self.close_flow(oldest, fx);
        }
        Err(DropReason::FlowLimit)
    }

    /// Puts an admitted flow in the table, counts it and tells of it.
    pub(crate) fn open_flow<E: Effects>(&mut self, mut flow: Flow, fx: &mut E) -> FlowId {
        let Key { slot, proto, guest, remote } = flow.key;
        let inbound = flow.inbound;
        let tcp = matches!(flow.state, State::Tcp(_));
        flow.parked = tcp;
        let id = self.flows.insert(flow);
        if let Some(p) = self.ports.get_mut(slot) {
            if tcp {
                self.flows.push(&mut p.lru, Chain::Lru, id.index);
            }
            p.flows += 1;
            p.counters.flows_opened += 1;
            self.flows.push(&mut p.records, Chain::Port, id.index);
            fx.event(Event::FlowOpened { flow: id, port: p.id, proto, guest, remote, inbound });
        }
        id
    }

    /// Ends a flow and closes its socket (that of a mapping with the last flow of it). Says nothing to the
    /// guest.
    pub(crate) fn close_flow<E: Effects>(&mut self, index: u32, fx: &mut E) {
        let Some(f) = self.flows.at(index) else { return };
        if f.is_mapping() {
            return;
        }
        let id = self.flows.id(index);
        let (slot, tcp, parked) = (f.key.slot, matches!(f.state, State::Tcp(_)), f.parked);
        if let Some(port) = self.ports.get_mut(slot) {
            let list = if tcp && !parked { &mut port.waiting } else { &mut port.lru };
            self.flows.unlink(list, Chain::Lru, index);
            self.flows.unlink(&mut port.records, Chain::Port, index);
        }
        if tcp {
            self.flows.unlink(&mut self.batch, Chain::Siblings, index);
        }
        if let Some(State::Datagram { mapping, .. }) = self.flows.at(index).map(|f| &f.state) {
            let mapping = *mapping;
            self.leave_mapping(index, mapping, fx);
        }
        self.wheel.cancel(index);
        let Some(mut f) = self.flows.remove(index) else { return };
        let (mut bytes_out, mut bytes_in) = (f.bytes_out, f.bytes_in);
        let mut port_id = PortId(u32::MAX);
        if let Some(port) = self.ports.get_mut(slot) {
            port_id = port.id;
            port.flows = port.flows.saturating_sub(1);
            port.counters.flows_closed += 1;
            if let State::Tcp(tcb) = &mut f.state {
                tcb.discard(fx, &mut port.budget);
                let held = tcb.note_memory(0);
                self.book_memory(slot, held, 0);
                (bytes_out, bytes_in) = tcb.totals();
            }
        }
        if let State::Forwarded { forward, client, .. } = f.state {
            self.clients.remove(&(forward.0, client));
        }
        fx.event(Event::FlowClosed { flow: id, port: port_id, bytes_out, bytes_in });
    }

    /// Takes a flow off its mapping; the last one takes the mapping along.
    fn leave_mapping<E: Effects>(&mut self, index: u32, mapping: u32, fx: &mut E) {
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
            if let Some(p) = self.ports.get_mut(m.key.slot) {
                p.sockets = p.sockets.saturating_sub(1);
            }
        }
    }

    /// Puts a flow on the list of its mapping.
    pub(crate) fn join_mapping(&mut self, index: u32, mapping: u32) {
        let Some(remote) = self.flows.at(index).map(|f| f.key.remote.ip()) else { return };
        self.flows.add_peer(mapping, remote);
        let Some(State::Mapping { flows, .. }) = self.flows.at(mapping).map(|m| &m.state) else { return };
        let mut list = *flows;
        self.flows.push(&mut list, Chain::Siblings, index);
        if let Some(State::Mapping { flows, .. }) = self.flows.at_mut(mapping).map(|m| &mut m.state) {
            *flows = list;
        }
    }

    /// Notes that a datagram flow was used: a new end, and its place among those that may be evicted.
    pub(crate) fn touch(&mut self, index: u32) {
        let now = self.now.as_ms();
        let t = self.cfg.timeouts;
        // A mapping ends with its flows, and is never in the list of what may be evicted.
        let Some(f) = self.flows.at_mut(index).filter(|f| !f.is_mapping()) else { return };
        f.last = self.now;
        let seconds = if f.key.proto == proto::ICMP {
            t.icmp
        } else if f.is_dns() && f.packets_in > 0 {
            t.udp_dns
        } else {
            t.udp
        };
        let deadline = coarse(now, now.saturating_add(u64::from(seconds) * 1000));
        f.expires = deadline;
        let (slot, assured) = (f.key.slot, f.assured());
        self.wake_at(index, deadline);
        if let Some(port) = self.ports.get_mut(slot)
            && (assured || port.lru.tail != index)
        {
            self.flows.unlink(&mut port.lru, Chain::Lru, index);
            if !assured {
                self.flows.push(&mut port.lru, Chain::Lru, index);
            }
        }
    }

    /// Makes sure that the flow's timer fires at `deadline` milliseconds or before.
    pub(crate) fn wake_at(&mut self, index: u32, deadline: u64) {
        if self.wheel.deadline(index).is_none_or(|d| d > deadline) {
            self.wheel.set(index, deadline);
        }
    }

    /// As [`Network::wake_at`], for the exact times of TCP.
    pub(crate) fn wake_tcp(&mut self, index: u32) {
        let Some(State::Tcp(tcb)) = self.flows.at(index).map(|f| &f.state) else { return };
        let due = tcb.deadline();
        self.wake_by(index, due);
    }

    /// Makes sure that the flow's timer fires not long after `due`.
    #[inline]
    pub(crate) fn wake_by(&mut self, index: u32, due: Option<Time>) {
        let Some(ms) = due.map(|at| at.0.div_ceil(1_000_000)) else { return };
        // It mostly does already.
        if self.wheel.deadline(index).is_none_or(|d| d > ms) {
            let deadline = coarse(self.now.as_ms(), ms);
            self.wake_at(index, deadline);
        }
    }

    /// The wheel has fired for a record.
    pub(crate) fn flow_timer<E: Effects>(&mut self, index: u32, fx: &mut E) {
        let now = self.now;
        let Some(f) = self.flows.at(index) else { return };
        match &f.state {
            State::Tcp(tcb) => match tcb.deadline() {
                Some(at) if at <= now => {
                    let fate = self.with_index(index, fx, |tcb, cx| tcb.timer(cx));
                    if fate == Some(Fate::Live) {
                        self.measure_idle(index, fx);
                    }
                }
                _ => self.wake_tcp(index),
            },
            State::Mapping { .. } => {}
            _ if f.expires > now.as_ms() => {
                let at = f.expires;
                self.wake_at(index, at);
            }
            _ => self.close_flow(index, fx),
        }
    }
}
