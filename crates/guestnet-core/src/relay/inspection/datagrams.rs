//! Inspection of UDP flows: QUIC. See [the module above](super).
//!
//! A flow that is to be read has no socket yet ([`State::Held`]): its datagrams are held until the ClientHello is there, and
//! then sent in their order, or dropped. Behind that the flow is an ordinary one that is watched: a datagram that begins
//! another connection, or shows another ClientHello, is read in the same way before it passes. Everything else passes at
//! once. A connection that is refused is forgotten, so that it is read again when it is sent again, and those that were
//! allowed go on.
//!
//! [`super::held_datagrams`] keeps what is held, within its bounds.

use super::evidence::text;
use super::held_datagrams::{Datagrams, HeldDatagram};
use super::request_of;
use crate::context::Context;
use crate::interface::config::DatagramError;
use crate::interface::effects::{Effects, SockError};
use crate::interface::stats::DropReason;
use crate::interface::types::{IpFields, SockId};
use crate::l2::lan::Sender;
use crate::l3::icmp_error::IcmpError;
use crate::policy::spec::Ech;
use crate::policy::{self, Admitted, Direction, Request, RuleId, Verdict};
use crate::relay::Relay;
use crate::relay::errors::{QUOTE_MAX, QUOTED, icmp_for, requote};
use crate::relay::udp::Refused;
use crate::tables::flow::{Flow, Key, State};
use crate::util::account::{charge, release};
use guestnet_wire::ether::Mac;
use guestnet_wire::icmp;
use guestnet_wire::inspect::Progress;
use guestnet_wire::parse::Packet;
use std::net::SocketAddr;

/// A guest's packet whose datagrams are read.
struct Arrived<'a> {
    from: Sender,
    frame: &'a [u8],
    p: &'a Packet,
    ip: IpFields,
}

impl Relay {
    /// Opens a UDP flow that is read before it has a socket.
    pub(in crate::relay) fn open_held<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        key: Key,
        mac: Mac,
        Admitted { target, rule, inspect }: Admitted,
    ) -> Result<u32, Refused> {
        let prohibited = IcmpError::unreachable(icmp::unreachable::ADMIN_PROHIBITED);
        self.admit(cx, key.slot, false).map_err(|why| Refused(why, prohibited))?;
        let admitted = cx.policy.generation();
        let state = State::Held { target, ip_id: 0 };
        let flow = Flow::new(key, mac, Direction::Outbound, admitted, cx.link.now, state).by(rule);
        Ok(self.open_flow(cx, flow, inspect).index)
    }

    /// Reads the datagrams of a guest's packet on a flow that is read or watched.
    ///
    /// # Errors
    /// Why they are dropped; the guest has been told, where it should be.
    #[cold]
    pub(in crate::relay) fn read_datagrams<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        index: u32,
        from: Sender,
        frame: &[u8],
        p: &Packet,
        segment: u16,
    ) -> Result<(), DropReason> {
        let ttl = cx.gateway.check_ttl(&mut cx.link, from, frame, p)?;
        let payload = frame.get(p.payload..p.end).unwrap_or(&[]);
        let arrived = Arrived { from, frame, p, ip: IpFields { ttl, tos: p.tos } };
        let size = if segment == 0 { payload.len().max(1) } else { usize::from(segment) };
        let mut done = Ok(());
        if payload.is_empty() {
            return self.read_datagram(cx, index, &arrived, payload);
        }
        for piece in payload.chunks(size) {
            match (self.read_datagram(cx, index, &arrived, piece), done) {
                (Err(why), Ok(())) => done = Err(why),
                // The first is counted by the caller.
                (Err(why), Err(_)) => cx.link.lan.count_drop(from.slot, why),
                (Ok(()), _) => {}
            }
        }
        done
    }

    fn datagrams_mut(&mut self, index: u32) -> Option<&mut Datagrams> {
        self.evidence.get_mut(&index)?.datagrams.as_deref_mut()
    }

    fn read_datagram<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        index: u32,
        arrived: &Arrived<'_>,
        payload: &[u8],
    ) -> Result<(), DropReason> {
        let slot = arrived.from.slot;
        let now = cx.link.now;
        let free = self.guests.get(slot).map_or(0, |g| g.budget.free());
        let Some(d) = self.datagrams_mut(index) else { return Err(DropReason::NoFlow) };
        if d.passes(payload) {
            self.touch(now, index);
            return self.send_read(cx, index, arrived, payload);
        }
        if !d.has_room(payload.len(), free) {
            if !d.judged && d.held.is_empty() {
                self.close_flow(cx, index);
            }
            return Err(DropReason::BufferLimit);
        }
        let progress = d.read(payload, now);
        d.hold(payload, arrived.ip, arrived.p.dont_fragment);
        let (until, judged) = (d.waits_until(), d.judged);
        self.settle_datagrams(slot, index);
        self.touch(now, index);
        if !judged && let Some(f) = self.flows.at_mut(index) {
            f.expires = until.as_ms();
            self.wake_at(index, until.as_ms());
        }
        let (name, ech, malformed) = match progress {
            Progress::More => return Ok(()),
            Progress::Tls(hello) => (hello.server_name.unwrap_or_default(), hello.ech, false),
            Progress::Opaque(_) => (Box::default(), false, false),
            Progress::Http | Progress::Malformed(_) => (Box::default(), false, true),
        };
        match self.judge_datagrams(cx, index, &name, ech, malformed) {
            Ok(rule) => self.let_datagrams_pass(cx, index, arrived, rule, &name),
            Err((request, reason, rule)) => {
                self.report_datagrams(cx, index, &request, reason, rule, &name);
                self.drop_datagrams(cx, index, reason, 1);
                Err(cx.refuse(arrived.from, arrived.frame, arrived.p, reason))
            }
        }
    }

    /// Judges what was read: a name, or an empty one where none was shown. What is malformed is refused in any case.
    /// Returns the rule that allows it.
    fn judge_datagrams<E>(
        &mut self,
        cx: &mut Context<'_, E>,
        index: u32,
        name: &[u8],
        ech: bool,
        malformed: bool,
    ) -> Result<RuleId, (Request, DropReason, RuleId)> {
        let Some(f) = self.flows.at(index) else { return Ok(RuleId::NONE) };
        let (request, slot, rule) = (request_of(cx, f), f.key.slot, f.rule);
        if ech && cx.policy.table(request.endpoint).is_some_and(|t| t.options().ech == Ech::Deny) {
            return Err((request, DropReason::HiddenName, rule));
        }
        let shown = if name.is_empty() { policy::Shown::Nothing } else { policy::Shown::Name(name) };
        match cx.policy.judge_pinned(cx.link.now, slot, &request, shown).after_asking(rule) {
            Verdict::Deny { reason, rule } => Err((request, reason, rule)),
            _ if malformed => Err((request, DropReason::NotUnderstood, rule)),
            Verdict::Allow { rule, .. } => Ok(rule),
            Verdict::Inspect { rule, .. } | Verdict::Ask { rule, .. } => {
                Err((request, DropReason::Policy, rule))
            }
            Verdict::Defer { .. } => Err((request, DropReason::Policy, rule)),
        }
    }

    /// What was read is allowed: what is held is sent.
    fn let_datagrams_pass<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        index: u32,
        arrived: &Arrived<'_>,
        rule: RuleId,
        name: &[u8],
    ) -> Result<(), DropReason> {
        let generation = cx.policy.generation();
        let name = text(name);
        if !self.datagrams_mut(index).is_some_and(|d| d.allow(&name)) {
            self.drop_datagrams(cx, index, DropReason::FlowLimit, 1);
            return Err(cx.refuse(arrived.from, arrived.frame, arrived.p, DropReason::FlowLimit));
        }
        if let Some(evidence) = self.evidence.get_mut(&index)
            && (!name.is_empty() || evidence.shown.is_none())
        {
            evidence.shown = Some(name);
        }
        if let Err(Refused(why, error)) = self.give_socket(cx, index) {
            if let Some(d) = self.datagrams_mut(index) {
                d.judged = false;
            }
            self.drop_datagrams(cx, index, why, 1);
            return Err(cx.gateway.refuse(&mut cx.link, arrived.from, arrived.frame, arrived.p, why, error));
        }
        if let Some(f) = self.flows.at_mut(index) {
            (f.rule, f.admitted) = (rule, generation);
        }
        let Some(d) = self.datagrams_mut(index) else { return Err(DropReason::NoFlow) };
        d.rule = rule;
        let held = d.take_held();
        self.settle_datagrams(arrived.from.slot, index);
        self.touch(cx.link.now, index);
        let Some((sock, target)) = self.socket_of(index) else { return Err(DropReason::NoFlow) };
        let mut done = Ok(());
        for HeldDatagram { payload, ip, dont_fragment } in held {
            let sent = cx.link.fx.udp_send(sock, target, &payload, 0, ip, dont_fragment);
            if sent.is_err() && done.is_err() {
                cx.link.lan.count_drop(arrived.from.slot, DropReason::HostError);
            }
            done = done.and(sent.map_err(|_| DropReason::HostError));
        }
        done
    }

    /// Gives a flow that was read its socket.
    fn give_socket<E: Effects>(&mut self, cx: &mut Context<'_, E>, index: u32) -> Result<(), Refused> {
        let Some(f) = self.flows.at(index) else { return Ok(()) };
        let State::Held { target, ip_id } = f.state else { return Ok(()) };
        let (key, mac) = (f.key, f.mac);
        let mapping = self.shared_mapping(cx, key, mac, target)?;
        // Making room may have closed this very flow.
        let Some(f) = self.flows.at_mut(index).filter(|f| f.key == key) else {
            let prohibited = IcmpError::unreachable(icmp::unreachable::ADMIN_PROHIBITED);
            self.close_empty(cx, mapping);
            return Err(Refused(DropReason::FlowLimit, prohibited));
        };
        f.state = State::Datagram { mapping, target, ip_id, watched: true };
        self.join_mapping(index, mapping);
        Ok(())
    }

    fn socket_of(&self, index: u32) -> Option<(SockId, SocketAddr)> {
        let State::Datagram { mapping, target, .. } = self.flows.at(index)?.state else { return None };
        let State::Mapping { sock, .. } = self.flows.at(mapping)?.state else { return None };
        Some((sock, target))
    }

    fn send_read<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        index: u32,
        arrived: &Arrived<'_>,
        payload: &[u8],
    ) -> Result<(), DropReason> {
        let Arrived { from, frame, p, ip } = *arrived;
        let (sock, target) = self.socket_of(index).ok_or(DropReason::NoFlow)?;
        cx.link.fx.udp_send(sock, target, payload, 0, ip, p.dont_fragment).map_err(|e| {
            cx.gateway.icmp_error(&mut cx.link, from, frame, p, icmp_for(e, p.ip_len()));
            DropReason::HostError
        })
    }

    fn report_datagrams<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        index: u32,
        request: &Request,
        reason: DropReason,
        rule: RuleId,
        shown: &[u8],
    ) {
        let Some(slot) = self.flows.at(index).map(|f| f.key.slot) else { return };
        let shown = (!shown.is_empty()).then(|| text(shown));
        cx.report_names(slot, request, reason, rule, self.names_of(index).0, shown);
    }

    /// Drops what is held of a flow, of which `told` datagrams are counted elsewhere. A flow that nothing was allowed of
    /// ends.
    fn drop_datagrams<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        index: u32,
        reason: DropReason,
        told: usize,
    ) {
        let Some(slot) = self.flows.at(index).map(|f| f.key.slot) else { return };
        let Some(d) = self.datagrams_mut(index) else { return };
        let (dropped, judged) = (d.forget().saturating_sub(told), d.judged);
        for _ in 0..dropped {
            cx.link.lan.count_drop(slot, reason);
        }
        self.settle_datagrams(slot, index);
        if !judged {
            self.close_flow(cx, index);
        }
    }

    /// The time for a flow that is read is over: it is refused.
    pub(in crate::relay) fn datagrams_due<E: Effects>(&mut self, cx: &mut Context<'_, E>, index: u32) {
        let Some(f) = self.flows.at(index) else { return };
        let State::Held { ip_id, .. } = f.state else { return };
        let (key, mac) = (f.key, f.mac);
        let first = self.evidence.get(&index).and_then(|e| e.datagrams.as_ref()?.held.first());
        let payload: Box<[u8]> = first.map(|d| d.payload.clone()).unwrap_or_default();
        if let Err((request, reason, rule)) = self.judge_datagrams(cx, index, &[], false, true) {
            self.report_datagrams(cx, index, &request, reason, rule, &[]);
            self.drop_datagrams(cx, index, reason, 0);
        }
        let err = DatagramError {
            kind: SockError::Prohibited,
            offender: None,
            icmp_type: 0,
            icmp_code: 0,
            mtu: 0,
            dst: key.remote,
            seq: 0,
            payload: &payload,
        };
        let mut quote = [0u8; QUOTE_MAX];
        let quoted = payload.get(..payload.len().min(QUOTED)).unwrap_or(&payload);
        let Some(n) = requote(&mut quote, &key, ip_id, &err, quoted) else { return };
        let guest = key.guest.ip();
        let error = IcmpError::unreachable(icmp::unreachable::ADMIN_PROHIBITED);
        let error = if guest.is_ipv4() { Some(error) } else { error.for_v6() };
        let (Some(error), to) = (error, Sender { slot: key.slot, mac }) else { return };
        let ends = (cx.gateway.address_for(guest), guest);
        cx.gateway.send_error(&mut cx.link, to, ends, quote.get(..n).unwrap_or(&[]), error);
    }

    /// Charges what is held of a flow to the guest's budget.
    fn settle_datagrams(&mut self, slot: u32, index: u32) {
        let Some(d) = self.evidence.get_mut(&index).and_then(|e| e.datagrams.as_deref_mut()) else { return };
        let memory = d.memory();
        let before = std::mem::replace(&mut d.charged, memory);
        self.charge_datagrams(slot, before, memory);
    }

    fn charge_datagrams(&mut self, slot: u32, before: usize, memory: usize) {
        if let Some(guest) = self.guests.get_mut(slot) {
            charge(&mut guest.budget.used, memory);
            release(&mut guest.budget.used, before);
        }
    }

    /// A flow ends: gives back what is charged for its datagrams.
    pub(super) fn release_datagrams(&mut self, slot: u32, datagrams: &Datagrams) {
        self.charge_datagrams(slot, datagrams.charged, 0);
    }
}
