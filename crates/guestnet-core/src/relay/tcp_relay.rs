//! Theory of operation: what stands between the flow table and the TCP state machine of [`crate::relay::tcp`]. A
//! segment finds its flow or opens one; every call into a [`Tcb`] goes through [`Network::with_index`], which
//! lends it the port's counters and budget and then does what its [`Fate`] and its wishes (a timer, the end
//! of the batch, the port taking frames again) ask for.

use crate::interface::config::DatagramError;
use crate::interface::effects::{Effects, SockError};
use crate::interface::stats::DropReason;
use crate::interface::types::{FlowId, FrameMeta, IpFields, PortId, Target};
use crate::l2::switch::wire_drop;
use crate::l3::frame_builder::{Envelope, TTL};
use crate::l3::gateway::IcmpError;
use crate::network::Network;
use crate::relay::icmp::error_to_tell;
use crate::relay::socket_memory::FEW_FLOWS;
use crate::relay::tcp::{Ctx, Fate, Path, Tcb, Timeouts};
use crate::relay::turns::TURN_SHORT;
use crate::relay::udp::{icmp_for, v4};
use crate::tables::flow::{Chain, Flow, Key, State};
use crate::tables::port::Port;
use guestnet_wire::ether::Mac;
use guestnet_wire::ipv4::{self, Ipv4};
use guestnet_wire::parse::Packet;
use guestnet_wire::tcp::{Options, Tcp, flags};
use guestnet_wire::{be16, checksum, proto, put};
use std::net::{IpAddr, SocketAddr};

/// How often a guest is asked about all its idle connections, and about how many of them at once; the others
/// have timers of their own.
const RECHECK_MS: u64 = 10_000;
const RECHECK_MOST: usize = 1024;

impl Network {
    /// A TCP segment of a guest to the gateway's MAC.
    pub(crate) fn tcp_out<E: Effects>(
        &mut self,
        slot: u32,
        mac: Mac,
        frame: &mut [u8],
        p: &Packet,
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let bytes = frame.get(p.l4..p.end).unwrap_or(&[]);
        let seg = Tcp::parse(bytes).map_err(wire_drop)?;
        let options = Options::parse(bytes.get(20..usize::from(seg.header_len)).unwrap_or(&[]));
        let guest = SocketAddr::new(p.src, p.src_port);
        let remote = SocketAddr::new(p.dst, p.dst_port);
        let key = Key { slot, proto: proto::TCP, guest, remote };
        if let Some(index) = self.flows.find(&key) {
            self.check_ttl(slot, mac, frame, p, fx)?;
            if let Some(f) = self.flows.at_mut(index) {
                f.mac = mac;
                f.last = self.now;
                if p.end - p.payload >= TURN_SHORT as usize / 2
                    && let State::Tcp(tcb) = &mut f.state
                {
                    tcb.moves_bulk(self.now);
                }
                if f.parked
                    && let Some(port) = self.ports.get_mut(slot)
                {
                    self.flows.unlink(&mut port.lru, Chain::Lru, index);
                    self.flows.push(&mut port.lru, Chain::Lru, index);
                }
            }
            let payload = frame.get(p.payload..p.end).unwrap_or(&[]);
            let fate = self.with_index(index, fx, |tcb, cx| {
                tcb.note_tos(cx, p.tos);
                tcb.segment(cx, &seg, &options, payload)
            });
            if fate != Some(Fate::Reopen) {
                return Ok(());
            }
        }
        let syn = seg.flags & (flags::SYN | flags::ACK | flags::RST | flags::FIN) == flags::SYN;
        if p.src_port == 0 || p.dst_port == 0 || !syn {
            if !self.is_own(p.dst) && self.route_to_guest(slot, mac, frame, p, meta, fx)? {
                return Ok(());
            }
            let why = if syn { DropReason::BadDestination } else { DropReason::NoFlow };
            return self.reset(slot, mac, p, &seg, why, fx);
        }
        let target = match self.services.find(proto::TCP, remote) {
            Some(service) => {
                let Some(port) = self.ports.get(slot) else { return Ok(()) };
                Target::Service(service, port.id)
            }
            None if self.is_own(p.dst) && self.cfg.host_loopback != Some(p.dst) => {
                return self.reset(slot, mac, p, &seg, DropReason::BadDestination, fx);
            }
            None => {
                if self.route_to_guest(slot, mac, frame, p, meta, fx)? {
                    return Ok(());
                }
                Target::Address(self.outbound(slot, mac, frame, p, remote, fx)?)
            }
        };
        if let Err(why) = self.admit(slot, false, fx).and_then(|()| self.admit_memory(slot)) {
            if self.ports.get_mut(slot).is_some_and(|p| p.icmp.allow(self.now)) {
                self.denied(slot, proto::TCP, guest, remote, why, fx);
            }
            return self.reset(slot, mac, p, &seg, why, fx);
        }
        let id = self.flows.next_id();
        let ip = IpFields { ttl: p.ttl.saturating_sub(1).max(1), tos: p.tos };
        let tight = self.holds_too_much(slot);
        let sock = match fx.tcp_connect(id, target, ip, tight) {
            Ok(sock) => sock,
            Err(SockError::Refused | SockError::Reset | SockError::Exhausted) => {
                return self.reset(slot, mac, p, &seg, DropReason::HostError, fx);
            }
            Err(e) => return self.refuse(slot, mac, frame, p, DropReason::HostError, icmp_for(e, 0), fx),
        };
        let mut tcb = Tcb::outbound(id, sock, &seg, &options, self.isn(&key), self.tcp_timeouts(), self.now)
            .with_ip(be16(frame, p.l3 + 4), p.tos);
        tcb.memory.tight = tight;
        let id = self.open_flow(Flow::new(key, mac, false, self.now, State::Tcp(Box::new(tcb))), fx);
        self.wake_tcp(id.index);
        Ok(())
    }

    /// The guest on a port may have rebooted: it is asked about its idle connections, within a rate.
    pub(crate) fn recheck<E: Effects>(&mut self, slot: u32, fx: &mut E) {
        let now = self.now;
        let Some(port) = self.ports.get_mut(slot).filter(|p| p.rechecked.plus_ms(RECHECK_MS) <= now) else {
            return;
        };
        port.rechecked = now;
        let of_port = |(id, f): (FlowId, &Flow)| {
            (f.key.slot == slot && matches!(f.state, State::Tcp(_))).then_some(id.index)
        };
        let some: Vec<u32> = self.flows.iter().filter_map(of_port).take(RECHECK_MOST).collect();
        for index in some {
            self.with_index(index, fx, |tcb, cx| tcb.recheck(cx));
        }
    }

    /// The timeouts that flows of this Network live by.
    pub(crate) fn tcp_timeouts(&self) -> Timeouts {
        let t = &self.cfg.timeouts;
        Timeouts {
            established_ms: t.tcp_established.saturating_mul(1000),
            transitory_ms: t.tcp_transitory.saturating_mul(1000),
            ..Timeouts::default()
        }
    }

    /// Initial sequence number: a clock of 4.096 us steps plus a keyed hash of the flow (RFC 6528).
    pub(crate) fn isn(&self, key: &Key) -> u32 {
        let (g, r) = (
            crate::tables::flow_table::address_words(key.guest.ip()),
            crate::tables::flow_table::address_words(key.remote.ip()),
        );
        let ports = u64::from(key.guest.port()) << 16 | u64::from(key.remote.port());
        let hash = self.isn_key.hash(&[u64::from(key.slot), g[0], g[1], r[0], r[1], ports]);
        (hash as u32).wrapping_add((self.now.0 >> 12) as u32)
    }

    /// As [`Network::with_index`], unless the identifier is stale.
    pub(crate) fn with_flow<E: Effects>(
        &mut self,
        id: FlowId,
        fx: &mut E,
        f: impl FnOnce(&mut Tcb, &mut Ctx<'_, E>) -> Fate,
    ) -> Option<Fate> {
        self.flows.get_mut(id)?.last = self.now;
        self.with_index(id.index, fx, f)
    }

    /// Calls into the state machine of a flow and does what follows from it.
    pub(crate) fn with_index<E: Effects>(
        &mut self,
        index: u32,
        fx: &mut E,
        f: impl FnOnce(&mut Tcb, &mut Ctx<'_, E>) -> Fate,
    ) -> Option<Fate> {
        let now = self.now;
        let flow = self.flows.at_mut(index)?;
        let port = self.ports.get_mut(flow.key.slot)?;
        let path = Path {
            port: port.id,
            gateway_mac: self.cfg.gateway_mac,
            guest_mac: flow.mac,
            guest: flow.key.guest,
            remote: flow.key.remote,
            mtu: port.config.mtu,
            gso_max: port.config.gso_max,
        };
        let State::Tcp(tcb) = &mut flow.state else { return None };
        let before = port.counters.tx_bytes;
        let turn = if tcb.is_bulk(now) { self.turns.left(now, index) } else { TURN_SHORT };
        let Port { counters, budget, .. } = &mut *port;
        let mut cx = Ctx { now, fx, counters, path: &path, budget, turn };
        let fate = f(tcb, &mut cx);
        let bulk = tcb.is_bulk(now);
        if bulk {
            self.turns.sent(port.counters.tx_bytes - before);
        } else {
            self.turns.active(now, index);
        }
        if fate == Fate::Live {
            let (batch, waits) = (tcb.wants_batch_end(), tcb.waits_for_port() && !tcb.is_over());
            // A flow that waits for the port is in that list alone, since it is in one at a time.
            let park = tcb.may_be_evicted() && !waits;
            let parked = std::mem::replace(&mut flow.parked, park);
            let (measure, due) = (tcb.wants_measure(port.flows > FEW_FLOWS), tcb.deadline());
            if batch && bulk {
                self.flows.push(&mut self.batch, Chain::Siblings, index);
            } else if batch {
                self.flows.push_front(&mut self.batch, Chain::Siblings, index);
            }
            if parked != park {
                let (from, to) = match park {
                    true => (&mut port.waiting, Some(&mut port.lru)),
                    false => (&mut port.lru, None),
                };
                self.flows.unlink(from, Chain::Lru, index);
                if let Some(to) = to {
                    self.flows.push(to, Chain::Lru, index);
                }
            }
            if waits {
                self.flows.push(&mut port.waiting, Chain::Lru, index);
            }
            self.wake_by(index, due);
            if measure {
                self.measure(index, fx);
            }
            return Some(fate);
        }
        let (key, mac, id) = (flow.key, flow.mac, tcb.ip_id());
        self.close_flow(index, fx);
        match fate {
            Fate::Unreachable { error, seq } => {
                self.tell_unreachable(&key, mac, icmp_for(error, 0), None, seq, id, fx);
            }
            Fate::Forgotten => self.recheck(key.slot, fx),
            Fate::Live | Fate::Closed | Fate::Reopen => {}
        }
        Some(fate)
    }

    /// A router or the destination answered a connect with an ICMP error: it goes on to the guest as it came, from
    /// whoever sent it, and the connect is over.
    pub(crate) fn connect_error<E: Effects>(&mut self, id: FlowId, err: &DatagramError<'_>, fx: &mut E) {
        let Some(f) = self.flows.get_mut(id) else { return };
        let State::Tcp(tcb) = &f.state else { return };
        let Some(seq) = tcb.connecting() else { return };
        let (key, mac, ip_id) = (f.key, f.mac, tcb.ip_id());
        let error = match error_to_tell(err, 40) {
            Ok(error) => error,
            // Nobody ends a connect by an MTU that cannot be.
            Err(why @ DropReason::Malformed) => return self.drop_at(key.slot, why),
            Err(_) => {
                self.with_flow(id, fx, |tcb, cx| tcb.connected(cx, Err(err.kind)));
                return;
            }
        };
        self.close_flow(id.index, fx);
        self.tell_unreachable(&key, mac, error, err.offender, seq, ip_id, fx);
    }

    /// The connect failed in a way that only ICMP can tell: quotes the guest's SYN. From the gateway, where nobody
    /// else said so.
    #[allow(clippy::too_many_arguments)] // The error, and what is quoted.
    fn tell_unreachable<E: Effects>(
        &mut self,
        key: &Key,
        mac: Mac,
        error: IcmpError,
        offender: Option<IpAddr>,
        seq: u32,
        id: u16,
        fx: &mut E,
    ) {
        let (Some(guest), Some(remote)) = (v4(key.guest.ip()), v4(key.remote.ip())) else { return };
        let src = offender.and_then(|o| v4(self.policy.name_of(o.to_canonical())?));
        let mut quote = [0u8; 40];
        Ipv4 {
            src: guest,
            dst: remote,
            proto: proto::TCP,
            ttl: 1,
            tos: 0,
            id,
            frag: ipv4::DF,
            payload_len: 20,
        }
        .emit(&mut quote);
        let (_, syn) = quote.split_at_mut(ipv4::MIN_LEN);
        let (src_port, dst_port) = (key.guest.port(), key.remote.port());
        Tcp { src_port, dst_port, seq, flags: flags::SYN, ..Tcp::default() }.emit(&Options::default(), syn);
        let src = src.unwrap_or(self.cfg.gateway4);
        self.send_error(key.slot, mac, src, guest, &quote, error, fx);
    }

    /// Refuses a segment with a reset (RFC 9293 3.10.7.1), never one with RST set.
    fn reset<E: Effects>(
        &mut self,
        slot: u32,
        mac: Mac,
        p: &Packet,
        seg: &Tcp,
        why: DropReason,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let martian = crate::policy::never_a_destination(p.dst) || self.policy.is_broadcast(p.dst);
        if seg.flags & flags::RST != 0 || martian || p.src_port == 0 {
            return Err(if martian { DropReason::BadDestination } else { why });
        }
        let (IpAddr::V4(guest), IpAddr::V4(remote)) = (p.src, p.dst) else { return Err(why) };
        let len = (p.end - p.payload) as u32
            + u32::from(seg.flags & flags::SYN != 0)
            + u32::from(seg.flags & flags::FIN != 0);
        let (seq, ack, flags) = if seg.flags & flags::ACK != 0 {
            (seg.ack, 0, flags::RST)
        } else {
            (0, seg.seq.wrapping_add(len), flags::RST | flags::ACK)
        };
        let (src_port, dst_port) = (seg.dst_port, seg.src_port);
        let b = self.l4_buffer(20)?;
        Tcp { src_port, dst_port, seq, ack, flags, ..Tcp::default() }.emit(&Options::default(), b);
        let sum = checksum::pseudo(p.dst, p.src, proto::TCP, 20);
        let c = checksum::finish(checksum::sum(b, sum));
        put(b, 16, &c.to_be_bytes());
        let e = Envelope { mac, src: remote, dst: guest, proto: proto::TCP, ttl: TTL, tos: 0 };
        self.send_ipv4(slot, &e, 20, FrameMeta::default(), fx)?;
        Err(why)
    }

    /// Lets the flows that asked for it send what the batch called for, bulk flows until the round is full.
    pub(crate) fn flush_batch<E: Effects>(&mut self, fx: &mut E) {
        for _ in 0..self.batch.len {
            let index = self.batch.head;
            let full = self.turns.left(self.now, index) == 0;
            if full && self.flows.at(index).is_some_and(|f| f.is_bulk(self.now)) {
                break;
            }
            self.flows.unlink(&mut self.batch, Chain::Siblings, index);
            self.with_index(index, fx, |tcb, cx| tcb.batch_end(cx));
        }
        self.turns.round_ended();
    }

    /// A port takes frames again: the flows that waited for it go on, in turn, until it is full.
    pub(crate) fn kick_port<E: Effects>(&mut self, id: PortId, fx: &mut E) {
        let Some(slot) = self.ports.slot(id) else { return };
        let waiting = self.ports.get(slot).map_or(0, |p| p.waiting.len);
        for _ in 0..waiting {
            let Some(port) = self.ports.get_mut(slot) else { return };
            let index = port.waiting.head;
            if self.flows.at(index).is_none() || fx.port_room(id) == 0 {
                return;
            }
            self.flows.unlink(&mut port.waiting, Chain::Lru, index);
            self.with_index(index, fx, |tcb, cx| tcb.port_writable(cx));
        }
    }
}
