//! Theory of operation: [`Network`] is all that a worker calls. It holds the components and routes each call to the one that
//! handles it; it keeps no other state. Each call does its work to the end and says what is to happen through [`Effects`].
//! Nothing is left for later but what a timer or [`Network::batch_end`] is asked for.
//!
//! A frame of a guest takes this way ([`Network::frame`]):
//! 1. `l2` checks and learns addresses, answers ARP and floods. For an IP packet it returns a [`Verdict`].
//! 2. A packet to another guest is delivered. A broadcast of a DHCP client goes to the service.
//! 3. A packet to the gateway's MAC goes to the uplink of packets, where there is one, unless a relayed flow has it or the
//!    name that its conversation shows is to decide. Else it goes to the relay of its protocol, fragments put together
//!    first.
//! 4. A datagram to a service goes to the DNS forwarder where that serves it, else to the control side.

mod control;
mod execute;

use crate::context::Context;
use crate::context::Layers;
use crate::dns::{DnsForwarder, Verdict as DnsVerdict};
use crate::interface::config::{DatagramError, NetworkConfig};
use crate::interface::effects::{Effects, Event, SockError};
use crate::interface::stats::DropReason;
use crate::interface::types::{FlowId, ForwardId, FrameMeta, Gso, PortId, ServiceId, SockId, Time};
use crate::l2::lan::{Notice, Sender, Verdict};
use crate::l3::gateway::Datagram;
use crate::nat::l3_uplink::L3Uplink;
use crate::policy::Ticket;
use crate::policy::asks::Ask;
use crate::policy::pending::{Awaits, Held, Pending};
use crate::policy::sweep::{Budget, Stage, Sweep};
use crate::relay::Relay;
use crate::shard::PeerUpdate;
use guestnet_wire::ether::{self, Ether, Mac};
use guestnet_wire::parse::{self, Packet};
use guestnet_wire::{proto, put};
use std::net::{IpAddr, SocketAddr};

/// A frame between guests that is no part of a bulk transfer.
const SMALL_FRAME: usize = 1024;

/// The logic of one network. See the module head.
pub struct Network {
    config: NetworkConfig,
    now: Time,
    layers: Layers,
    relay: Relay,
    dns: DnsForwarder,
    /// The uplink of packets, where there is one.
    uplink: Option<Box<L3Uplink>>,
}

impl Network {
    /// A network without ports.
    #[must_use]
    pub fn new(config: NetworkConfig, now: Time) -> Network {
        Network {
            layers: Layers::new(&config),
            relay: Relay::new(&config, now),
            dns: DnsForwarder::of_network(&config),
            uplink: None,
            now,
            config,
        }
    }

    /// Swaps the buffer in which frames are made for another one. A caller with many networks lends one buffer to each for
    /// its turn, and an empty one is in its place between them: a call that makes a frame drops it then.
    pub fn exchange_scratch(&mut self, other: &mut Vec<u8>) {
        self.layers.gateway.exchange_scratch(other);
    }

    /// Passes on what the switch found out about guests to the flows that it concerns.
    #[cold]
    fn follow_notices<E: Effects>(&mut self, fx: &mut E) {
        self.note_released();
        while let Some(notice) = self.layers.lan.take_notice() {
            let cx = &mut self.layers.context(self.now, fx);
            match notice {
                Notice::Restarted(slot) => self.relay.recheck(cx, slot),
                Notice::Resolved(ip, mac) => {
                    for pending in cx.policy.pending.resolve(Awaits::Neighbour(ip)) {
                        resume(&mut self.relay, cx, pending, mac);
                    }
                }
                Notice::Unanswered(ip) => {
                    for pending in cx.policy.pending.resolve(Awaits::Neighbour(ip)) {
                        give_up(&mut self.relay, cx, pending);
                    }
                }
            }
        }
    }

    /// Sends the answer of a UDP service to a guest.
    #[allow(clippy::too_many_arguments)] // The fields of a datagram.
    pub fn service_send<E: Effects>(
        &mut self,
        now: Time,
        port: PortId,
        dst_mac: Mac,
        src: SocketAddr,
        dst: SocketAddr,
        payload: &[u8],
        fx: &mut E,
    ) {
        self.now = now;
        let Some(slot) = self.layers.lan.slot(port) else {
            self.layers.lan.base_mut().drop(DropReason::NoEndpoint);
            return;
        };
        let cx = &mut self.layers.context(now, fx);
        if let Err(why) = cx.gateway.frames().send_udp(&mut cx.link, slot, dst_mac, src, dst, payload, 0) {
            cx.link.lan.count_drop(slot, why);
        }
    }

    // ---- frames of guests ---------------------------------------------------------------------------

    /// Handles a frame from a guest.
    pub fn frame<E: Effects>(
        &mut self,
        now: Time,
        port: PortId,
        frame: &mut [u8],
        meta: FrameMeta,
        fx: &mut E,
    ) {
        self.now = now;
        let Some(slot) = self.layers.lan.count_received(port, frame.len()) else { return };
        if let Err(why) = self.receive(slot, frame, meta, fx) {
            self.layers.lan.count_drop(slot, why);
        }
        if self.layers.lan.has_notices() {
            self.follow_notices(fx);
        }
    }

    #[inline]
    fn receive<E: Effects>(
        &mut self,
        slot: u32,
        frame: &mut [u8],
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let (now, lan) = (self.now, &mut self.layers.lan);
        let Some(eth) = lan.receive(now, slot, frame, meta, fx)? else { return Ok(()) };
        let p = parse::parse_ip(frame, ether::HEADER_LEN)?;
        match lan.receive_packet(now, slot, eth, frame, &p, meta, fx)? {
            Verdict::Done => {}
            Verdict::Forward { to, meta } => {
                if frame.len() <= SMALL_FRAME {
                    self.relay.others_active(now);
                }
                let from = Sender { slot, mac: eth.src };
                if !self.layers.policy.guests_pass() {
                    self.layers.context(now, fx).between_guests(from, Some(to), frame, &p)?;
                }
                self.layers.lan.deliver(to, frame, meta, fx);
            }
            Verdict::Flood { meta } => {
                let from = Sender { slot, mac: eth.src };
                self.layers.context(now, fx).between_guests(from, None, frame, &p)?;
                self.layers.lan.flood(now, slot, frame, meta, fx)?;
            }
            Verdict::Discover => {
                let cx = &mut self.layers.context(now, fx);
                return cx.gateway.answer_discovery(&mut cx.link, Sender { slot, mac: eth.src }, frame, &p);
            }
            Verdict::Route => return self.route(Sender { slot, mac: eth.src }, frame, &p, meta, fx),
            Verdict::Serve(service) => {
                self.serve(service, Sender { slot, mac: eth.src }, frame, &p, 0, fx);
            }
        }
        Ok(())
    }

    /// Routes a packet that is addressed to the gateway's MAC.
    fn route<E: Effects>(
        &mut self,
        from: Sender,
        frame: &mut [u8],
        p: &Packet,
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let now = self.now;
        let cx = &mut self.layers.context(now, fx);
        if let Some(uplink) = &mut self.uplink
            && L3Uplink::takes(cx.link.lan.addressing(), p.dst)
            && !self.relay.claims(cx, from.slot, frame, p)
            && uplink.packet_out(cx, from, frame, p, meta)?
        {
            return Ok(());
        }
        if p.src.is_ipv6() {
            cx.gateway.check_scope(&mut cx.link, from, frame, p)?;
        }
        if let Some(f) = p.fragment {
            if cx.gateway.route_to_guest(&mut cx.link, from, frame, p, meta)? {
                return Ok(());
            }
            return match cx.gateway.reassemble(&mut cx.link, from.slot, frame, p, f)? {
                Some(whole) => self.route_whole(from, whole, fx),
                None => Ok(()),
            };
        }
        cx.link.lan.verify(from.slot, frame, p, meta)?;
        if p.proto == proto::TCP {
            return self.relay.tcp_out(cx, from, frame, p, meta);
        }
        self.relay.others_active(now);
        match p.proto {
            proto::UDP => {
                if let Some(service) = self.relay.udp_out(cx, from, frame, p, meta)? {
                    let segment = if let Some(Gso::Udp(n)) = meta.gso { n } else { 0 };
                    self.serve(service, from, frame, p, segment, fx);
                }
                Ok(())
            }
            proto::ICMP if p.src.is_ipv4() => self.relay.icmp_out(cx, from, frame, p, meta),
            proto::ICMPV6 if p.src.is_ipv6() => self.relay.icmp_out(cx, from, frame, p, meta),
            _ => self.relay.other_out(cx, from, frame, p, meta),
        }
    }

    /// Routes a packet that was put together from fragments.
    fn route_whole<E: Effects>(
        &mut self,
        from: Sender,
        mut whole: Vec<u8>,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let mut p = parse::parse_ip(&whole, ether::HEADER_LEN)?;
        if p.fragment.is_some() {
            return Err(DropReason::Malformed);
        }
        // The source of an IPv6 packet has cut it, so it may be cut again.
        p.dont_fragment &= p.src.is_ipv4();
        self.route(from, &mut whole, &p, FrameMeta::default(), fx)
    }

    /// Passes a datagram, or several of `segment` bytes each when that is not 0, to a UDP service of the gateway.
    fn serve<E: Effects>(
        &mut self,
        service: ServiceId,
        from: Sender,
        frame: &[u8],
        p: &Packet,
        segment: u16,
        fx: &mut E,
    ) {
        let cx = &mut self.layers.context(self.now, fx);
        let payload = frame.get(p.payload..p.end).unwrap_or(&[]);
        let (src, dst) = (SocketAddr::new(p.src, p.src_port), SocketAddr::new(p.dst, p.dst_port));
        let size = if segment == 0 { payload.len() } else { usize::from(segment) };
        let mut rest = payload;
        loop {
            let (payload, more) = rest.split_at(size.min(rest.len()));
            let datagram = Datagram { from, src, dst, payload };
            if self.dns.is_service(service) {
                self.dns.serve(cx, &datagram);
            } else {
                cx.gateway.punt(&mut cx.link, service, &datagram);
            }
            if more.is_empty() {
                return;
            }
            rest = more;
        }
    }

    /// The end of a batch of frames and socket events: sends the ACKs that are due, one per flow.
    pub fn batch_end<E: Effects>(&mut self, now: Time, fx: &mut E) {
        self.now = now;
        self.relay.batch_end(&mut self.layers.context(now, fx));
    }

    /// Before [`Network::batch_end`]: frames and socket events took so many nanoseconds since the last one.
    pub fn others_took(&mut self, ns: u64) {
        self.relay.others_took(ns);
    }

    /// True when flows have more to send, and only let others have their turn: [`Network::batch_end`] is due again.
    #[must_use]
    pub fn has_more(&self) -> bool {
        self.relay.has_more()
    }

    /// A port that was full takes frames again.
    pub fn port_writable<E: Effects>(&mut self, now: Time, port: PortId, fx: &mut E) {
        self.now = now;
        if let Some(slot) = self.layers.lan.slot(port) {
            self.relay.port_writable(&mut self.layers.context(now, fx), slot, port);
        }
    }

    // ---- events of sockets --------------------------------------------------------------------------

    /// The outcome of [`Effects::tcp_connect`].
    pub fn tcp_connected<E: Effects>(
        &mut self,
        now: Time,
        flow: FlowId,
        result: Result<(), SockError>,
        fx: &mut E,
    ) {
        self.now = now;
        let cx = &mut self.layers.context(now, fx);
        if DnsForwarder::is_flow(flow) {
            return self.dns.tcp_connected(cx, flow, result);
        }
        self.relay.tcp_connected(cx, flow, result);
    }

    /// A TCP socket became readable or writable; both on hang-up or error.
    pub fn tcp_ready<E: Effects>(
        &mut self,
        now: Time,
        flow: FlowId,
        readable: bool,
        writable: bool,
        fx: &mut E,
    ) {
        self.now = now;
        let cx = &mut self.layers.context(now, fx);
        if DnsForwarder::is_flow(flow) {
            return self.dns.tcp_readable(cx, flow);
        }
        self.relay.tcp_ready(cx, flow, readable, writable);
    }

    /// A client connected to a forward's TCP socket. `None`: refused, and the caller resets the socket.
    pub fn tcp_accepted<E: Effects>(
        &mut self,
        now: Time,
        forward: ForwardId,
        sock: SockId,
        peer: SocketAddr,
        fx: &mut E,
    ) -> Option<FlowId> {
        self.now = now;
        let accepted = self.relay.accept_tcp(&mut self.layers.context(now, fx), forward, sock, peer);
        accepted.map_err(|why| self.layers.lan.base_mut().drop(why)).ok()
    }

    /// A datagram came in on the socket of `flow`, or several of `segment` bytes each when that is not 0.
    pub fn udp_received<E: Effects>(
        &mut self,
        now: Time,
        flow: FlowId,
        from: SocketAddr,
        payload: &[u8],
        segment: u16,
        fx: &mut E,
    ) {
        self.now = now;
        self.relay.others_active(now);
        let cx = &mut self.layers.context(now, fx);
        if DnsForwarder::is_flow(flow) {
            return self.dns.receive(cx, flow, from, payload, segment);
        }
        self.relay.udp_in(cx, flow, from, payload, segment);
    }

    /// A datagram came in on a forward's socket.
    #[allow(clippy::too_many_arguments)] // One call from one place; a struct would only rename them.
    pub fn udp_forward_received<E: Effects>(
        &mut self,
        now: Time,
        forward: ForwardId,
        sock: SockId,
        from: SocketAddr,
        payload: &[u8],
        segment: u16,
        fx: &mut E,
    ) {
        self.now = now;
        self.relay.others_active(now);
        let cx = &mut self.layers.context(now, fx);
        if let Err(why) = self.relay.forward_in(cx, forward, sock, from, payload, segment) {
            self.layers.lan.base_mut().drop(why);
        }
    }

    /// An echo reply came in on the socket of `flow`. `ttl` is as it came from the outside.
    #[allow(clippy::too_many_arguments)] // As above.
    pub fn ping_received<E: Effects>(
        &mut self,
        now: Time,
        flow: FlowId,
        from: IpAddr,
        seq: u16,
        ttl: u8,
        body: &[u8],
        fx: &mut E,
    ) {
        self.now = now;
        self.relay.others_active(now);
        self.relay.echo_in(&mut self.layers.context(now, fx), flow, from, seq, ttl, body);
    }

    /// The kernel reported an error for a datagram, echo request or connect of `flow`.
    pub fn sock_error<E: Effects>(&mut self, now: Time, flow: FlowId, error: DatagramError<'_>, fx: &mut E) {
        self.now = now;
        let cx = &mut self.layers.context(now, fx);
        if DnsForwarder::is_flow(flow) {
            return self.dns.sock_error(cx, flow, &error);
        }
        self.relay.sock_error(cx, flow, &error);
    }

    // ---- flows that wait for the owner's answer ---------------------------------------------------------

    /// Answers the question that a rule asked about a flow. False when the question is not open.
    pub fn decide<E: Effects>(
        &mut self,
        now: Time,
        port: PortId,
        ticket: u64,
        allow: bool,
        fx: &mut E,
    ) -> bool {
        self.now = now;
        let Some(ask) = self.layers.policy.asks.take(Ticket(ticket), port) else { return false };
        self.answer(ask, allow, fx);
        true
    }

    /// Handles the packet that was held, with the answer in force.
    fn answer<E: Effects>(&mut self, ask: Ask, allow: bool, fx: &mut E) {
        self.layers.policy.asks.answer(&ask, allow);
        if let (Some(mut frame), Some(slot)) = (ask.frame, self.layers.lan.slot(ask.port)) {
            if let Err(why) = self.receive(slot, &mut frame, FrameMeta::default(), fx) {
                self.layers.lan.count_drop(slot, why);
            }
            if self.layers.lan.has_notices() {
                self.follow_notices(fx);
            }
        }
        self.layers.policy.asks.forget_answer();
    }

    // ---- timers -------------------------------------------------------------------------------------

    /// When [`Network::timers`] is to be called next. `None`: not until something else happens.
    #[must_use]
    pub fn next_timer(&self) -> Option<Time> {
        let uplink = self.uplink.as_ref().and_then(|u| u.next_timer(self.now));
        let Layers { lan, gateway, .. } = &self.layers;
        [
            self.layers.policy.sweep.is_some().then_some(self.now),
            self.layers.policy.shaping.next_timer(self.now),
            self.layers.policy.pending.next_deadline(),
            self.layers.policy.asks.next_deadline(),
            self.relay.next_timer(self.now),
            uplink,
            self.dns.next_timer(),
            gateway.next_timer(),
            lan.next_timer(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Does what is due.
    pub fn timers<E: Effects>(&mut self, now: Time, fx: &mut E) {
        self.now = now;
        self.relay.timers(&mut self.layers.context(now, fx));
        self.layers.lan.timers(now, fx);
        if self.layers.lan.has_notices() {
            self.follow_notices(fx);
        }
        let cx = &mut self.layers.context(now, fx);
        for pending in cx.policy.pending.expired(now) {
            give_up(&mut self.relay, cx, pending);
        }
        while let Some(ask) = self.layers.policy.asks.take_expired(now) {
            let _best_effort = fx.event(Event::PolicyAskEnded { port: ask.port, ticket: ask.ticket.0 });
            self.answer(ask, false, fx);
        }
        self.sweep(fx);
        let cx = &mut self.layers.context(now, fx);
        cx.gateway.timers(&mut cx.link);
        if let Some(uplink) = &mut self.uplink {
            uplink.timers(cx);
        }
        self.dns.run_timers(cx);
        self.relay.batch_end(cx);
    }

    /// Goes on judging flows by new rules, a step.
    fn sweep<E: Effects>(&mut self, fx: &mut E) {
        let Some(Sweep { mut stage, cut }) = self.layers.policy.sweep else { return };
        let mut budget = Budget::of_step();
        let cx = &mut self.layers.context(self.now, fx);
        loop {
            let next = match stage {
                Stage::Relays(at) => match self.relay.judge_again(cx, at, &mut budget) {
                    Some(at) => Some(Stage::Relays(at)),
                    None => Some(Stage::Translations(0)),
                },
                Stage::Translations(at) => {
                    let uplink = self.uplink.as_mut();
                    match uplink.and_then(|u| u.judge_again(cx, at, &mut budget)) {
                        Some(at) => Some(Stage::Translations(at)),
                        None => Some(Stage::Conversations(0)),
                    }
                }
                Stage::Conversations(slot) => match cx.judge_conversations(slot, &mut budget) {
                    Some(slot) => Some(Stage::Conversations(slot)),
                    None => Some(Stage::Pins(0)),
                },
                // Only now: what a running flow's address was asked for was part of the judgement.
                Stage::Pins(slot) => {
                    let lan = &*cx.link.lan;
                    let port_of = |slot| lan.port(slot).map(|p| p.id);
                    cx.policy.forget_denied_pins(slot, &mut budget, port_of).map(Stage::Pins)
                }
            };
            match next {
                Some(next) if !budget.is_spent() && next != stage => stage = next,
                next => {
                    let stage = next.unwrap_or(stage);
                    cx.policy.sweep = Some(Sweep { stage, cut: cut + budget.done });
                    if next.is_none() {
                        cx.policy.finish_sweep();
                    }
                    return;
                }
            }
        }
    }

    /// The DNS service's verdict on the name of an [`crate::interface::effects::Event::DnsQuestion`], from records of
    /// that `generation`.
    pub fn dns_verdict<E: Effects>(
        &mut self,
        now: Time,
        ticket: u64,
        generation: u64,
        verdict: DnsVerdict,
        fx: &mut E,
    ) {
        self.now = now;
        self.dns.take_verdict(&mut self.layers.context(now, fx), ticket, generation, verdict);
    }

    /// Bytes of a guest's TCP connection to the DNS service; `ended`: they are the last. Returns how many were read: the
    /// rest is to be passed again, with what came meanwhile or when [`Effects::stream_resume`] says so.
    pub fn stream_received<E: Effects>(
        &mut self,
        now: Time,
        port: PortId,
        sock: SockId,
        data: &[u8],
        ended: bool,
        fx: &mut E,
    ) -> usize {
        self.now = now;
        self.dns.stream_received(&mut self.layers.context(now, fx), port, sock, data, ended)
    }

    /// A guest's TCP connection to the DNS service is gone.
    pub fn stream_gone(&mut self, sock: SockId) {
        self.dns.stream_gone(sock);
    }

    /// A packet from the uplink: `frame` has room for an Ethernet header (14 bytes) in front of it.
    pub fn uplink_packet<E: Effects>(&mut self, now: Time, frame: &mut [u8], meta: FrameMeta, fx: &mut E) {
        self.now = now;
        let done = match &mut self.uplink {
            Some(uplink) => uplink.packet_in(&mut self.layers.context(now, fx), frame, meta),
            None => Err(DropReason::NoFlow),
        };
        if let Err(why) = done {
            self.layers.lan.base_mut().drop(why);
        }
    }

    /// Applies an update of worker `from`. Updates of ports that are not its own are ignored.
    pub fn peer_update<E: Effects>(&mut self, now: Time, from: u16, update: PeerUpdate, fx: &mut E) {
        self.now = now;
        match update {
            PeerUpdate::PortDown { port } => {
                if self.layers.lan.slot_at(from, port).is_some() {
                    self.remove_port(now, port, fx);
                }
            }
            update => self.layers.lan.apply_peer_update(now, from, update),
        }
        self.follow_notices(fx);
    }

    /// A frame of another worker's guest, for a port of this one, or (`None`) for all of them. It was checked
    /// where it came in.
    pub fn peer_frame<E: Effects>(
        &mut self,
        now: Time,
        to: Option<PortId>,
        frame: &[u8],
        meta: FrameMeta,
        fx: &mut E,
    ) {
        self.now = now;
        if !self.layers.policy.guests_pass()
            && let Some(to) = to
            && let Err(why) = self.judge_peer_frame(to, frame, fx)
        {
            return self.layers.lan.base_mut().drop(why);
        }
        self.layers.lan.receive_from_peer(to, frame, meta, fx);
    }

    /// Remembers a conversation that a guest of another worker opens with one of this worker, so that the answers pass.
    fn judge_peer_frame<E: Effects>(
        &mut self,
        to: PortId,
        frame: &[u8],
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let Ok(p) = parse::parse_ip(frame, ether::HEADER_LEN) else { return Ok(()) };
        let lan = &self.layers.lan;
        let Some(from) = lan.neighbour(p.src).map(|b| b.slot).filter(|s| lan.is_remote(*s)) else {
            return Ok(());
        };
        let (from, to) = (Sender { slot: from, mac: Ether::parse(frame)?.src }, lan.slot(to));
        self.layers.context(self.now, fx).between_guests(from, to, frame, &p)
    }
}

/// What a pending flow waited for has come: it goes on.
fn resume<E: Effects>(relay: &mut Relay, cx: &mut Context<'_, E>, pending: Pending, mac: Mac) {
    match pending.held {
        Held::Reserved => {}
        Held::Flow(id) => relay.resume(cx, id, mac),
        Held::Frame(mut frame) => {
            put(&mut frame, 0, &mac.0);
            cx.link.lan.transmit(pending.slot, &frame, FrameMeta::default(), cx.link.fx);
        }
    }
}

/// What a pending flow waited for does not come: it ends.
fn give_up<E: Effects>(relay: &mut Relay, cx: &mut Context<'_, E>, pending: Pending) {
    match pending.held {
        Held::Reserved => {}
        Held::Flow(id) => relay.give_up(cx, id),
        Held::Frame(_) => cx.link.lan.count_drop(pending.slot, DropReason::NoEndpoint),
    }
}
