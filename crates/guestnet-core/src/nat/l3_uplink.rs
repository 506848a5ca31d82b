//! Theory of operation: the uplink of packets. What guests send outside is translated in place by a
//! [`NatEngine`] and leaves as it is, through [`Effects::uplink`]; what comes back goes the same way. The
//! engine knows addresses and connections, the core knows guests: so policy, TTL, size and refusals of what a
//! guest sends are decided here, where the guest's own limits hold, and each connection that begins or ends is
//! counted at its port and told. Services, the host's loopback and ports that are published on sockets stay
//! relays. A checksum that is begun (virtio) covers only addresses so far and is begun anew; a frame that
//! stands for several stays whole.

use crate::interface::config::{Filtering, FlowInfo};
use crate::interface::effects::{Effects, Event, TxError};
use crate::interface::stats::DropReason;
use crate::interface::types::{Csum, FlowId, ForwardId, FrameMeta, Time};
use crate::l2::switch::{check_offload, largest, wire_drop};
use crate::l3::gateway::IcmpError;
use crate::nat::packet::View;
use crate::nat::{
    Behaviour, ConnTrackStats, ForwardError, NatConfigError, NatDirection, NatEngine, NatEngineConfig,
    NatEvent, NatResult, NatStats, Prefix, Refusal,
};
use crate::network::Network;
use crate::policy::never_a_destination;
use crate::tables::flow::Key;
use guestnet_wire::ether::{self, Ether, Mac};
use guestnet_wire::parse::{self, Packet};
use guestnet_wire::{be32, checksum, gso, icmp, proto, put};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};

/// Set in the index of flows that are translated; relays have theirs below.
const TRANSLATED: u32 = 1 << 31;
/// Expiry work of one call.
const VISITS: usize = 256;
const L3: usize = ether::HEADER_LEN;

/// What is remembered of a connection besides what the engine has.
#[derive(Clone, Copy, Default)]
struct Opened {
    /// Slot of the guest's port; none when there is no such guest.
    slot: Option<u32>,
    generation: u32,
    at: Time,
    inbound: bool,
}

/// A published port of an external address.
struct Published {
    proto: u8,
    external: SocketAddrV4,
}

/// See the module head.
pub(crate) struct Tun {
    engine: NatEngine,
    opened: Vec<Opened>,
    generation: u32,
    news: Vec<NatEvent>,
    published: BTreeMap<u32, Published>,
    /// Addresses that have another owner, or none: their connections are to end.
    left: Vec<Ipv4Addr>,
}

impl Network {
    /// Gives the Network an uplink of packets. Of `config` the network decides what it knows itself: what is
    /// inside, its gateway, timeouts and filtering, keys, and that refusals are its own to tell. Limits are those
    /// of `config`: what is translated holds no descriptor.
    ///
    /// # Errors
    /// What is wrong with `config`.
    pub fn set_uplink(&mut self, mut config: NatEngineConfig) -> Result<(), NatConfigError> {
        if let Some(internal) = Prefix::new(self.cfg.subnet4.0, self.cfg.subnet4.1) {
            config.internal = internal;
        }
        config.gateway = Some(self.cfg.gateway4);
        config.refusal = Refusal::Silent;
        let t = &self.cfg.timeouts;
        config.timeouts.udp = t.udp;
        config.timeouts.udp_dns = t.udp_dns;
        config.timeouts.icmp = t.icmp;
        config.timeouts.tcp_established = t.tcp_established;
        (config.timeouts.tcp_opening, config.timeouts.tcp_closing) = (t.tcp_transitory, t.tcp_transitory);
        config = config.with_filtering(match self.cfg.filtering {
            Filtering::EndpointIndependent => Behaviour::EndpointIndependent,
            Filtering::AddressDependent => Behaviour::AddressDependent,
            Filtering::AddressAndPortDependent => Behaviour::AddressAndPortDependent,
        });
        config.decrement_ttl = true;
        config.shares = true;
        config.secret = self.cfg.secret;
        let mut engine = NatEngine::new(config)?;
        engine.keep_news();
        self.tun = Some(Box::new(Tun {
            engine,
            opened: Vec::new(),
            generation: 0,
            news: Vec::new(),
            published: BTreeMap::new(),
            left: Vec::new(),
        }));
        Ok(())
    }

    /// A packet from the uplink: `frame` has room for an Ethernet header (14 bytes) in front of it.
    pub fn uplink_packet<E: Effects>(&mut self, now: Time, frame: &mut [u8], meta: FrameMeta, fx: &mut E) {
        self.now = now;
        let done = self.tunnel_in(frame, meta, fx);
        self.tunnel_after(fx);
        if let Err(why) = done {
            self.base.drop(why);
        }
    }

    /// Counters of the uplink's engine, and what it holds; `None` without one.
    #[must_use]
    pub fn nat_stats(&self) -> Option<(NatStats, ConnTrackStats)> {
        self.tun.as_ref().map(|t| (t.engine.stats(), t.engine.conntrack_stats()))
    }

    /// Publishes a guest's port on an external address of the uplink. A `guest` that no endpoint can have
    /// (0.0.0.0) keeps the port until [`Network::retarget_uplink_forward`].
    ///
    /// # Errors
    /// [`ForwardError`]; nothing has changed then.
    pub fn add_uplink_forward(
        &mut self,
        id: ForwardId,
        proto: u8,
        external: SocketAddrV4,
        guest: SocketAddr,
    ) -> Result<(), ForwardError> {
        let gateway = self.cfg.gateway4;
        let tun = self.tun.as_mut().ok_or(ForwardError::NotExternal(*external.ip()))?;
        if tun.published.contains_key(&id.0) {
            return Err(ForwardError::Exists(id.0));
        }
        tun.engine.add_forward(proto, external, internal_end(gateway, guest)?)?;
        tun.published.insert(id.0, Published { proto, external });
        Ok(())
    }

    /// Whether a forward with this number is published on the uplink.
    #[must_use]
    pub fn has_uplink_forward(&self, id: ForwardId) -> bool {
        self.tun.as_ref().is_some_and(|t| t.published.contains_key(&id.0))
    }

    /// Makes a published port of the uplink lead to another guest; its connections end. False when no such forward
    /// is published on the uplink.
    ///
    /// # Errors
    /// [`ForwardError`]; the port leads where it led before then, and its connections live on.
    pub fn retarget_uplink_forward(
        &mut self,
        id: ForwardId,
        guest: SocketAddr,
    ) -> Result<bool, ForwardError> {
        let gateway = self.cfg.gateway4;
        let Some(tun) = self.tun.as_mut() else { return Ok(false) };
        let Tun { engine, published, .. } = &mut **tun;
        let Some(p) = published.get(&id.0) else { return Ok(false) };
        engine.retarget_forward(p.proto, p.external, internal_end(gateway, guest)?)?;
        Ok(true)
    }

    /// Takes a published port back, connections live on; false when it is not one of the uplink.
    pub fn remove_uplink_forward(&mut self, id: ForwardId) -> bool {
        let Some(tun) = self.tun.as_mut() else { return false };
        let Some(p) = tun.published.remove(&id.0) else { return false };
        tun.engine.remove_forward(p.proto, p.external);
        true
    }

    // ---- out ----------------------------------------------------------------------------------------

    /// Whether a packet for the gateway's MAC is one for the uplink of packets.
    #[inline]
    pub(crate) fn is_tunneled<E: Effects>(
        &mut self,
        slot: u32,
        frame: &[u8],
        p: &Packet,
        fx: &mut E,
    ) -> bool {
        if self.tun.is_none()
            || self.policy.in_subnet(p.dst)
            || self.policy.is_broadcast(p.dst)
            || self.is_own(p.dst)
        {
            return false;
        }
        if self.flows.count() == 0 {
            return true;
        }
        // Relays to clients of ports that are published on sockets.
        match p.proto {
            _ if p.fragment.is_some() => self.clients.is_empty(),
            proto::TCP | proto::UDP => {
                let guest = SocketAddr::new(p.src, p.src_port);
                let remote = SocketAddr::new(p.dst, p.dst_port);
                self.flows.find(&Key { slot, proto: p.proto, guest, remote }).is_none()
            }
            proto::ICMP if icmp::is_error(frame.get(p.l4).copied().unwrap_or(0)) => {
                self.guest_error(slot, frame, p, fx).is_err()
            }
            _ => true,
        }
    }

    /// Sends a guest's packet out.
    pub(crate) fn tunnel_out<E: Effects>(
        &mut self,
        slot: u32,
        mac: Mac,
        frame: &mut [u8],
        p: &Packet,
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let done = self.tunnel_guest(slot, mac, frame, p, meta, fx);
        self.tunnel_after(fx);
        done
    }

    fn tunnel_guest<E: Effects>(
        &mut self,
        slot: u32,
        mac: Mac,
        frame: &mut [u8],
        p: &Packet,
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        self.outbound(slot, mac, frame, p, SocketAddr::new(p.dst, p.dst_port), fx)?;
        let mut meta = self.passable(slot, frame, p, meta);
        let large = large(p, meta);
        let now = self.now;
        let Some(tun) = self.tun.as_mut() else { return Err(DropReason::NoFlow) };
        let mtu = match p.dst {
            IpAddr::V4(dst) => tun.engine.mtu_to(dst),
            IpAddr::V6(_) => tun.engine.config().mtu_outside,
        };
        let mut view = View::new(frame, p);
        let (mut end, mut size) = (p.end, p.end - p.l3);
        if let Ok(v) = &mut view {
            v.largest = large;
            (end, size) = (p.l3 + v.total, v.size());
        }
        let too_big = size > usize::from(mtu);
        if too_big && (p.dont_fragment || large.is_some()) {
            self.icmp_error(slot, mac, frame, p, IcmpError::too_big(mtu), fx);
            return Err(DropReason::Oversized);
        }
        let frame = frame.get_mut(..end).ok_or(DropReason::Truncated)?;
        match tun.translate(
            now,
            frame,
            (p, view.as_ref().map_err(|why| *why)),
            &mut meta,
            too_big,
            NatDirection::Outbound,
        ) {
            NatResult::Translated => fx.uplink(frame, meta).map_err(|e| match e {
                TxError::Full => DropReason::PortFull,
                TxError::Gone => DropReason::HostError,
            }),
            NatResult::Hairpinned => self.tunnel_to_guest(frame, meta, fx),
            NatResult::Held | NatResult::Fragmented => Ok(()),
            NatResult::PassThrough => Err(DropReason::SpoofedSource),
            NatResult::TooBig(_) => Err(DropReason::Oversized),
            NatResult::Dropped(
                why @ (DropReason::FlowLimit
                | DropReason::TableFull
                | DropReason::PortLimit
                | DropReason::PortsExhausted),
            ) => {
                let e = IcmpError::unreachable(icmp::unreachable::ADMIN_PROHIBITED);
                self.refuse(slot, mac, frame, p, why, e, fx)
            }
            NatResult::Dropped(why) => Err(why),
        }
    }

    // ---- in -----------------------------------------------------------------------------------------

    fn tunnel_in<E: Effects>(
        &mut self,
        frame: &mut [u8],
        mut meta: FrameMeta,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let p = parse::parse_ip(frame, L3).map_err(wire_drop)?;
        if !p.src.is_ipv4() {
            return Err(DropReason::UnsupportedProtocol);
        }
        // Nobody outside speaks for a guest, for the gateway or for the host's loopback.
        if never_a_destination(p.src) || self.policy.in_subnet(p.src) {
            return Err(DropReason::SpoofedSource);
        }
        check_offload(frame, &p, meta)?;
        let large = large(&p, meta);
        let now = self.now;
        let Some(tun) = self.tun.as_mut() else { return Err(DropReason::NoFlow) };
        let mtu = usize::from(tun.engine.config().mtu_inside);
        let mut view = View::new(frame, &p);
        let mut end = p.end;
        if let Ok(v) = &mut view {
            v.largest = large;
            end = p.l3 + v.total;
        }
        let too_big = large.is_none() && end - p.l3 > mtu;
        let frame = frame.get_mut(..end).ok_or(DropReason::Truncated)?;
        match tun.translate(
            now,
            frame,
            (&p, view.as_ref().map_err(|why| *why)),
            &mut meta,
            too_big,
            NatDirection::Inbound,
        ) {
            NatResult::Translated | NatResult::Hairpinned => self.tunnel_to_guest(frame, meta, fx),
            NatResult::Held | NatResult::Fragmented => Ok(()),
            NatResult::PassThrough => Err(DropReason::BadDestination),
            NatResult::TooBig(_) => Err(DropReason::Oversized),
            NatResult::Dropped(why) => Err(why),
        }
    }

    /// Puts a translated packet on the port of the guest that it is for.
    fn tunnel_to_guest<E: Effects>(
        &mut self,
        frame: &mut [u8],
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let ip = IpAddr::V4(Ipv4Addr::from(be32(frame, L3 + 16)));
        let b = self.neighbours.get(ip).ok_or(DropReason::NoEndpoint)?;
        let (slot, mac) = (b.slot, b.mac);
        let dst = mac.unwrap_or(Mac::BROADCAST);
        Ether { dst, src: self.cfg.gateway_mac, ethertype: ether::IPV4 }.emit(frame);
        if mac.is_some() {
            self.deliver(slot, frame, meta, fx);
            return Ok(());
        }
        // The guest is asked for its MAC, and the packet waits; the sender sends a large one again.
        if meta.gso.is_some() {
            return Err(DropReason::NoEndpoint);
        }
        if let Csum::Partial { start, offset } = meta.csum {
            gso::complete_checksum(frame, start, offset).map_err(wire_drop)?;
        }
        let waits = self.neighbours.wait_frame(self.now, slot, ip, frame);
        if waits.map_err(|()| DropReason::RateLimit)? {
            self.ask(slot, ip, fx);
        }
        Ok(())
    }

    // ---- what follows -------------------------------------------------------------------------------

    /// After each call of the engine: what it has to send itself, and what began and ended.
    fn tunnel_after<E: Effects>(&mut self, fx: &mut E) {
        let Some(mut tun) = self.tun.take() else { return };
        while let Some(ip) = tun.left.pop() {
            tun.engine.end_endpoint(ip);
        }
        if tun.engine.output_len() > 0 {
            self.tunnel_output(&mut tun, fx);
        }
        let mut news = std::mem::take(&mut tun.news);
        tun.engine.take_peer_updates(&mut news);
        for n in news.drain(..) {
            match n {
                NatEvent::Began { id, inbound } => self.tunnel_began(&mut tun, id, inbound, fx),
                NatEvent::Ended { id, bytes_out, bytes_in } => {
                    self.tunnel_ended(&mut tun, id, bytes_out, bytes_in, fx);
                }
            }
        }
        tun.news = news;
        self.tun = Some(tun);
    }

    fn tunnel_output<E: Effects>(&mut self, tun: &mut Tun, fx: &mut E) {
        let mut frame = std::mem::take(&mut self.piece);
        while let Some((direction, packet)) = tun.engine.poll_output() {
            frame.clear();
            frame.resize(L3, 0);
            frame.extend_from_slice(&packet);
            let done = match direction {
                NatDirection::Outbound => {
                    fx.uplink(&frame, FrameMeta::default()).map_err(|_| DropReason::HostError)
                }
                NatDirection::Inbound => self.tunnel_to_guest(&mut frame, FrameMeta::default(), fx),
            };
            if let Err(why) = done {
                self.base.drop(why);
            }
        }
        self.piece = frame;
    }

    fn tunnel_began<E: Effects>(&mut self, tun: &mut Tun, id: u32, inbound: bool, fx: &mut E) {
        let Some(c) = tun.engine.connection(id) else { return };
        let slot = self.neighbours.get(IpAddr::V4(*c.internal.ip())).map(|b| b.slot);
        tun.generation = tun.generation.wrapping_add(1);
        let opened = Opened { slot, generation: tun.generation, at: self.now, inbound };
        if tun.opened.len() <= id as usize {
            tun.opened.resize(id as usize + 1, Opened::default());
        }
        if let Some(o) = tun.opened.get_mut(id as usize) {
            *o = opened;
        }
        let Some(port) = slot.and_then(|s| self.ports.get_mut(s)) else {
            self.base.flows_opened += 1;
            return;
        };
        port.translated += 1;
        port.counters.flows_opened += 1;
        fx.event(Event::FlowOpened {
            flow: FlowId { index: TRANSLATED | id, generation: opened.generation },
            port: port.id,
            proto: c.proto,
            guest: c.internal.into(),
            remote: c.remote.into(),
            inbound,
        });
    }

    fn tunnel_ended<E: Effects>(&mut self, tun: &mut Tun, id: u32, out: u64, inn: u64, fx: &mut E) {
        let Some(o) = tun.opened.get_mut(id as usize).map(std::mem::take) else { return };
        let Some(port) = o.slot.and_then(|s| self.ports.get_mut(s)) else {
            self.base.flows_closed += 1;
            return;
        };
        port.translated = port.translated.saturating_sub(1);
        port.counters.flows_closed += 1;
        let flow = FlowId { index: TRANSLATED | id, generation: o.generation };
        fx.event(Event::FlowClosed { flow, port: port.id, bytes_out: out, bytes_in: inn });
    }

    /// Ends the connections of a port that goes.
    pub(crate) fn tunnel_remove_port<E: Effects>(&mut self, slot: u32, fx: &mut E) {
        if self.ports.get(slot).is_none_or(|p| p.translated == 0) {
            return;
        }
        let Some(tun) = self.tun.as_mut() else { return };
        let mut addresses: Vec<Ipv4Addr> = tun
            .opened
            .iter()
            .enumerate()
            .filter(|(_, o)| o.slot == Some(slot))
            .filter_map(|(id, _)| Some(*tun.engine.connection(id as u32)?.internal.ip()))
            .collect();
        addresses.sort_unstable();
        addresses.dedup();
        tun.left.append(&mut addresses);
        self.tunnel_after(fx);
    }

    /// An address has another owner from now on, or none: who has it next gets nothing of the old one's.
    pub(crate) fn tunnel_left(&mut self, ip: IpAddr) {
        if let (Some(tun), IpAddr::V4(ip)) = (self.tun.as_mut(), ip) {
            tun.left.push(ip);
        }
    }

    /// Translated flows of a port.
    pub(crate) fn tunnel_count(&self, slot: u32) -> usize {
        self.tun.iter().flat_map(|t| &t.opened).filter(|o| o.slot == Some(slot)).count()
    }

    /// Does what is due.
    pub(crate) fn tunnel_timers<E: Effects>(&mut self, fx: &mut E) {
        if let Some(tun) = self.tun.as_mut() {
            tun.engine.expire(self.now, VISITS);
            self.tunnel_after(fx);
        }
    }

    /// When [`Network::tunnel_timers`] has something to do.
    pub(crate) fn tunnel_next_timer(&self) -> Option<Time> {
        let tun = self.tun.as_ref()?;
        if tun.left.is_empty() { tun.engine.next_timer() } else { Some(self.now) }
    }

    /// The translated flows.
    pub(crate) fn tunnel_flows(&self) -> impl Iterator<Item = FlowInfo> {
        self.tun.iter().flat_map(|tun| tun.engine.numbered_connections().map(move |c| (tun, c))).filter_map(
            |(tun, (id, c, idle_ms))| {
                let o = tun.opened.get(id as usize)?;
                Some(FlowInfo {
                    flow: FlowId { index: TRANSLATED | id, generation: o.generation },
                    port: self.ports.get(o.slot?)?.id,
                    proto: c.proto,
                    guest: c.internal.into(),
                    remote: c.remote.into(),
                    inbound: o.inbound,
                    state: c.state.name(),
                    bytes_out: c.bytes_out,
                    bytes_in: c.bytes_in,
                    age_ms: self.now.since(o.at) / 1_000_000,
                    idle_ms,
                })
            },
        )
    }
}

impl Tun {
    /// Translates the packet behind the Ethernet header, and keeps `meta` true.
    fn translate(
        &mut self,
        now: Time,
        frame: &mut [u8],
        (p, view): (&Packet, Result<&View, DropReason>),
        meta: &mut FrameMeta,
        too_big: bool,
        direction: NatDirection,
    ) -> NatResult {
        let mut partial = None;
        if let Csum::Partial { start, offset } = meta.csum {
            if !too_big && matches!(p.proto, proto::TCP | proto::UDP) {
                partial = Some(usize::from(start) + usize::from(offset));
            } else if gso::complete_checksum(frame, start, offset).is_ok() {
                meta.csum = Csum::Full;
            } else {
                return NatResult::Dropped(DropReason::Malformed);
            }
        }
        let Some(packet) = frame.get_mut(L3..) else { return NatResult::Dropped(DropReason::Truncated) };
        let result = self.engine.translate_view(packet, view, direction, now);
        if let (Some(at), NatResult::Translated | NatResult::Hairpinned) = (partial, result) {
            let end = |at| IpAddr::V4(Ipv4Addr::from(be32(frame, at)));
            let sum = checksum::pseudo(end(L3 + 12), end(L3 + 16), p.proto, (p.end - p.l4) as u32);
            put(frame, at, &checksum::fold(sum).to_be_bytes());
        }
        result
    }
}

/// The largest packet that a frame which stands for several will be cut into, IP header included.
fn large(p: &Packet, meta: FrameMeta) -> Option<u16> {
    meta.gso?;
    Some(largest(p, meta).min(0xffff) as u16)
}

/// Where a published port leads. Without a guest (an unspecified address) it leads to the gateway, which takes no
/// packet of it.
fn internal_end(gateway: Ipv4Addr, guest: SocketAddr) -> Result<SocketAddrV4, ForwardError> {
    match guest {
        SocketAddr::V4(a) if !a.ip().is_unspecified() => Ok(a),
        none if none.ip().is_unspecified() => Ok(SocketAddrV4::new(gateway, none.port())),
        other => Err(ForwardError::NotIpv4(other.ip())),
    }
}
