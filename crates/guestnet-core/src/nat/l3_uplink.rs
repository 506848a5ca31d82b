//! Theory of operation: the uplink of packets. What guests send outside is translated in place by a
//! [`NatEngine`] and leaves as it is, through [`Effects::uplink`]; what comes back goes the same way. The
//! engine knows addresses and connections, the core knows guests: so policy, TTL, size and refusals of what a
//! guest sends are decided here, where the guest's own limits hold, and each connection that begins or ends is
//! counted at its port and told. Services, the host's loopback and ports that are published on sockets stay
//! relays. A checksum that is partial (virtio) covers only addresses so far and is partial anew; a frame that
//! stands for several stays whole.

mod connections;

use crate::context::Context;
use crate::interface::config::{Filtering, FlowInfo, ForwardSpec, NetworkConfig};
use crate::interface::effects::{Effects, TxError};
use crate::interface::stats::DropReason;
use crate::interface::types::{Csum, FlowId, ForwardId, FrameMeta, Gso, Time};
use crate::l2::frame_checks::{check_offload, largest_packet};
use crate::l2::lan::{Lan, Sender};
use crate::l3::icmp_error::IcmpError;
use crate::nat::cut_connections::{self, CutConnections};
use crate::nat::packet::View;
use crate::nat::{
    Behaviour, ConnTrackStats, ForwardError, NatConfigError, NatDirection, NatEngine, NatEngineConfig,
    NatEvent, NatResult, NatStats, Prefix, Refusal,
};
use crate::policy::pending::Held;
use crate::policy::shaping::{FlowRefused, Owner, Way};
use crate::policy::{Entry, Generation, RuleId, Verdict, is_special};
use crate::tables::addressing::Addressing;
use crate::tables::per_port::PerPort;
use guestnet_wire::ether::{self, Ether, Mac};
use guestnet_wire::parse::{self, Packet};
use guestnet_wire::tcp::Tcp;
use guestnet_wire::{be32, checksum, gso, icmp, proto, put};
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;

/// Set in the index of flows that are translated; relays have theirs below.
const TRANSLATED: u32 = 1 << 31;
/// Expiry work of one call.
const VISITS: usize = 256;
const L3: usize = ether::HEADER_LEN;

/// What is remembered of a connection besides what the engine has.
#[derive(Clone, Copy)]
struct Opened {
    /// Slot of the guest's port; none when there is no such guest.
    slot: Option<u32>,
    generation: u32,
    /// The rules that admitted it.
    admitted: Generation,
    /// The rule that did; the number is one of that generation.
    rule: RuleId,
    at: Time,
    inbound: bool,
}

impl Default for Opened {
    fn default() -> Self {
        let (admitted, rule) = (Generation::default(), RuleId::NONE);
        Opened { slot: None, generation: 0, admitted, rule, at: Time::default(), inbound: false }
    }
}

/// The address of a connection is one that the guest got for a name, and its pins live as long as the connection.
struct Pinned {
    slot: u32,
    remote: IpAddr,
    name: Arc<str>,
}

/// A published port of an external address.
struct Published {
    proto: u8,
    external: SocketAddrV4,
    entry: Entry,
}

/// See the module head.
pub(crate) struct L3Uplink {
    gateway: Ipv4Addr,
    engine: NatEngine,
    opened: Vec<Opened>,
    generation: u32,
    news: Vec<NatEvent>,
    published: BTreeMap<u32, Published>,
    /// Addresses that have another owner, or none: their connections are to end.
    left: Vec<Ipv4Addr>,
    /// Connections of each port.
    translated: PerPort<u32>,
    /// What is known by name of connections.
    pinned: HashMap<u32, Pinned>,
    /// Connections that a change of the rules has cut.
    cut: CutConnections,
    /// The rule that admits what begins in this call.
    rule: RuleId,
    /// The packet of the engine that is being sent.
    frame: Vec<u8>,
}

impl L3Uplink {
    /// An uplink of packets. Of `config` the network decides what it knows itself: what is inside, its gateway, timeouts
    /// and filtering, keys, and that refusals are its own to tell. Limits are those of `config`: what is translated holds
    /// no descriptor.
    ///
    /// # Errors
    /// What is wrong with `config`.
    pub(crate) fn new(
        network: &NetworkConfig,
        mut config: NatEngineConfig,
    ) -> Result<L3Uplink, NatConfigError> {
        if let Some(internal) = Prefix::new(network.subnet4.0, network.subnet4.1) {
            config.internal = internal;
        }
        config.gateway = Some(network.gateway4);
        config.refusal = Refusal::Silent;
        let t = &network.timeouts;
        config.timeouts.udp = t.udp;
        config.timeouts.udp_dns = t.udp_dns;
        config.timeouts.icmp = t.icmp;
        config.timeouts.tcp_established = t.tcp_established;
        (config.timeouts.tcp_opening, config.timeouts.tcp_closing) = (t.tcp_transitory, t.tcp_transitory);
        config = config.with_filtering(match network.filtering {
            Filtering::EndpointIndependent => Behaviour::EndpointIndependent,
            Filtering::AddressDependent => Behaviour::AddressDependent,
            Filtering::AddressAndPortDependent => Behaviour::AddressAndPortDependent,
        });
        config.decrement_ttl = true;
        config.shares = true;
        config.secret = network.secret;
        let mut engine = NatEngine::new(config)?;
        engine.record_events();
        engine.ask_before_sessions();
        Ok(L3Uplink {
            gateway: network.gateway4,
            engine,
            opened: Vec::new(),
            generation: 0,
            news: Vec::new(),
            published: BTreeMap::new(),
            left: Vec::new(),
            translated: PerPort::default(),
            pinned: HashMap::new(),
            cut: CutConnections::default(),
            rule: RuleId::NONE,
            frame: Vec::new(),
        })
    }

    /// A port was added.
    pub(crate) fn add_port(&mut self, slot: u32) {
        self.translated.insert(slot, 0);
    }

    /// Handles a packet from the uplink: `frame` has room for an Ethernet header (14 bytes) in front of it.
    ///
    /// # Errors
    /// Why it is dropped.
    pub(crate) fn packet_in<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        frame: &mut [u8],
        meta: FrameMeta,
    ) -> Result<(), DropReason> {
        let done = self.translate_in(cx, frame, meta);
        self.after(cx);
        done
    }

    /// Counters of the engine, and what it holds.
    #[must_use]
    pub(crate) fn stats(&self) -> (NatStats, ConnTrackStats) {
        (self.engine.stats(), self.engine.conntrack_stats())
    }

    /// Publishes a guest's port on an external address. A `guest` that no endpoint can have (0.0.0.0) keeps the port until
    /// [`L3Uplink::retarget_forward`].
    ///
    /// # Errors
    /// [`ForwardError`]; nothing has changed then.
    pub(crate) fn add_forward(
        &mut self,
        id: ForwardId,
        external: SocketAddrV4,
        spec: ForwardSpec,
    ) -> Result<(), ForwardError> {
        let ForwardSpec { proto, guest, entry } = spec;
        if self.published.contains_key(&id.0) {
            return Err(ForwardError::Exists(id.0));
        }
        self.engine.add_forward(proto, external, internal_end(self.gateway, guest)?)?;
        self.published.insert(id.0, Published { proto, external, entry });
        Ok(())
    }

    /// Whether a forward with this number is published here.
    #[must_use]
    pub(crate) fn has_forward(&self, id: ForwardId) -> bool {
        self.published.contains_key(&id.0)
    }

    /// Makes a published port lead to another guest; its connections end. False when no such forward is published here.
    ///
    /// # Errors
    /// [`ForwardError`]; the port leads where it led before then, and its connections live on.
    pub(crate) fn retarget_forward(
        &mut self,
        id: ForwardId,
        guest: SocketAddr,
    ) -> Result<bool, ForwardError> {
        let Some(p) = self.published.get(&id.0) else { return Ok(false) };
        self.engine.retarget_forward(p.proto, p.external, internal_end(self.gateway, guest)?)?;
        Ok(true)
    }

    /// Takes a published port back, connections live on; false when it is not one of the uplink.
    pub(crate) fn remove_forward(&mut self, id: ForwardId) -> bool {
        let Some(p) = self.published.remove(&id.0) else { return false };
        self.engine.remove_forward(p.proto, p.external);
        true
    }

    // ---- out ----------------------------------------------------------------------------------------

    /// Whether a packet for the gateway's MAC has a destination outside.
    #[inline]
    pub(crate) fn takes(addressing: &Addressing, dst: IpAddr) -> bool {
        let subnet = addressing.subnet();
        dst.is_ipv4() && !subnet.contains(dst) && !subnet.is_broadcast(dst) && !addressing.is_own(dst)
    }

    /// Sends a guest's packet out. False when it opens a flow that the relay has to carry, because the name that its
    /// conversation shows decides: a translator cannot hold bytes back. Nothing was done with it then.
    ///
    /// # Errors
    /// Why it is dropped; the guest has been told, where it should be.
    pub(crate) fn packet_out<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        from: Sender,
        frame: &mut [u8],
        p: &Packet,
        meta: FrameMeta,
    ) -> Result<bool, DropReason> {
        let done = self.translate_out(cx, from, frame, p, meta);
        self.after(cx);
        done
    }

    fn translate_out<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        from: Sender,
        frame: &mut [u8],
        p: &Packet,
        meta: FrameMeta,
    ) -> Result<bool, DropReason> {
        if p.fragment.is_some_and(|f| f.offset != 0) {
            // It waits for the first of its packet, if that is on its way.
            if cx.outbound(from, frame, p, SocketAddr::new(p.dst, 0))?.inspect.is_some() {
                return Ok(false);
            }
        }
        cx.gateway.check_ttl(&mut cx.link, from, frame, p)?;
        if cx.policy.shaping.is_active() && !within_limits(cx, from.slot, Way::Up, p.ip_len(), meta) {
            return Err(DropReason::RateLimit);
        }
        let mut meta = cx.link.lan.offload_of(from.slot, frame, p, meta);
        let large = large(p, meta);
        let now = cx.link.now;
        let mtu = match p.dst {
            IpAddr::V4(dst) => self.engine.mtu_to(dst),
            IpAddr::V6(_) => self.engine.config().mtu_outside,
        };
        let mut view = View::new(frame, p);
        let (mut end, mut size) = (p.end, p.end - p.l3);
        if let Ok(v) = &mut view {
            v.largest = large;
            (end, size) = (p.l3 + v.total, v.size());
        }
        let too_big = size > usize::from(mtu);
        if too_big && (p.dont_fragment || large.is_some()) {
            cx.gateway.icmp_error(&mut cx.link, from, frame, p, IcmpError::too_big(mtu));
            return Err(DropReason::Oversized);
        }
        let frame = frame.get_mut(..end).ok_or(DropReason::Truncated)?;
        let read = (p, view.as_ref().map_err(|why| *why));
        let mut result = self.translate(now, frame, read, &mut meta, too_big, NatDirection::Outbound);
        if result == NatResult::New {
            let admitted = cx.outbound(from, frame, p, SocketAddr::new(p.dst, p.dst_port))?;
            if admitted.inspect.is_some() {
                return Ok(false);
            }
            if cx.policy.shaping.is_active() {
                self.may_open(cx, from.slot)?;
            }
            self.rule = admitted.rule;
            self.engine.admit_next();
            result = self.translate(now, frame, read, &mut meta, too_big, NatDirection::Outbound);
            self.engine.ask_before_sessions();
        }
        match result {
            NatResult::New => Err(DropReason::Policy),
            NatResult::Translated => match cx.link.fx.uplink(frame, meta) {
                Ok(()) => Ok(true),
                Err(TxError::Full) => Err(DropReason::PortFull),
                Err(TxError::Gone) => Err(DropReason::HostError),
            },
            NatResult::Hairpinned => deliver(cx, frame, meta).map(|()| true),
            NatResult::Held | NatResult::Fragmented => Ok(true),
            NatResult::PassThrough => Err(DropReason::SpoofedSource),
            NatResult::TooBig(_) => Err(DropReason::Oversized),
            NatResult::Dropped(
                why @ (DropReason::FlowLimit
                | DropReason::TableFull
                | DropReason::PortLimit
                | DropReason::PortsExhausted),
            ) => {
                let e = IcmpError::unreachable(icmp::unreachable::ADMIN_PROHIBITED);
                Err(cx.gateway.refuse(&mut cx.link, from, frame, p, why, e))
            }
            NatResult::Dropped(why) => Err(why),
        }
    }

    #[cold]
    fn may_open<E>(&self, cx: &mut Context<'_, E>, slot: u32) -> Result<(), DropReason> {
        let (of_guest, of_all) = (self.translated(slot), self.engine.connection_count());
        let of_all = u32::try_from(of_all).unwrap_or(u32::MAX);
        cx.policy.shaping.opens(cx.link.now, slot, of_guest, of_all).map_err(|refused| match refused {
            FlowRefused::TooMany => DropReason::FlowLimit,
            FlowRefused::TooFast => DropReason::RateLimit,
        })
    }

    // ---- in -----------------------------------------------------------------------------------------

    fn translate_in<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        frame: &mut [u8],
        mut meta: FrameMeta,
    ) -> Result<(), DropReason> {
        let p = parse::parse_ip(frame, L3)?;
        if !p.src.is_ipv4() {
            return Err(DropReason::UnsupportedProtocol);
        }
        // Nobody outside speaks for a guest, for the gateway or for the host's loopback.
        if is_special(p.src) || cx.link.lan.addressing().subnet().contains(p.src) {
            return Err(DropReason::SpoofedSource);
        }
        check_offload(frame, &p, meta)?;
        let large = large(&p, meta);
        let now = cx.link.now;
        let mtu = usize::from(self.engine.config().mtu_inside);
        let mut view = View::new(frame, &p);
        let mut end = p.end;
        if let Ok(v) = &mut view {
            v.largest = large;
            end = p.l3 + v.total;
        }
        let too_big = large.is_none() && end - p.l3 > mtu;
        let frame = frame.get_mut(..end).ok_or(DropReason::Truncated)?;
        let read = (&p, view.as_ref().map_err(|why| *why));
        let mut result = self.translate(now, frame, read, &mut meta, too_big, NatDirection::Inbound);
        if result == NatResult::New {
            self.rule = self.inbound(cx, &p)?;
            self.engine.admit_next();
            result = self.translate(now, frame, read, &mut meta, too_big, NatDirection::Inbound);
            self.engine.ask_before_sessions();
        }
        match result {
            NatResult::New => Err(DropReason::Policy),
            NatResult::Translated | NatResult::Hairpinned => deliver(cx, frame, meta),
            NatResult::Held | NatResult::Fragmented => Ok(()),
            NatResult::PassThrough => Err(DropReason::BadDestination),
            NatResult::TooBig(_) => Err(DropReason::Oversized),
            NatResult::Dropped(why) => {
                self.answer_cut(cx, frame, &p);
                Err(why)
            }
        }
    }

    /// Asks the policy about a packet from outside that belongs to no session. One that is for no guest is not asked
    /// about: it ends at the gateway.
    fn inbound<E: Effects>(&self, cx: &mut Context<'_, E>, p: &Packet) -> Result<RuleId, DropReason> {
        let guest = self.engine.entered();
        let slot = cx.link.lan.neighbour(IpAddr::V4(*guest.ip())).ok_or(DropReason::NoEndpoint)?.slot;
        let entry = match end_of(p.dst, p.dst_port) {
            Some(external) => self.entry(p.proto, external),
            None => Entry::Mapping,
        };
        let client = SocketAddr::new(p.src, p.src_port);
        match cx.judge_inbound(entry, p.proto, client, guest.into(), slot) {
            Verdict::Allow { rule, .. } => Ok(rule),
            Verdict::Deny { reason, .. } => Err(reason),
            Verdict::Inspect { .. } | Verdict::Ask { .. } | Verdict::Defer { .. } => Err(DropReason::Policy),
        }
    }

    /// How packets to an external address and port come in.
    fn entry(&self, proto: u8, external: SocketAddrV4) -> Entry {
        let published = self.published.values().find(|p| (p.proto, p.external) == (proto, external));
        published.map_or(Entry::Mapping, |p| p.entry)
    }

    /// Resets the outside's end of a connection that was cut.
    fn answer_cut<E: Effects>(&self, cx: &mut Context<'_, E>, frame: &[u8], p: &Packet) {
        let (Some(remote), Some(external)) = (end_of(p.src, p.src_port), end_of(p.dst, p.dst_port)) else {
            return;
        };
        if p.proto == proto::TCP
            && self.cut.contains(cx.link.now, external, remote)
            && let Ok(segment) = Tcp::parse(frame.get(p.l4..p.end).unwrap_or(&[]))
            && let Some(reset) = cut_connections::reset(remote, external, &segment)
        {
            // Best effort: the outside sends again.
            let _sent = cx.link.fx.uplink(&reset, FrameMeta::default());
        }
    }

    /// Ends the connections of a port that goes.
    pub(crate) fn remove_port<E: Effects>(&mut self, cx: &mut Context<'_, E>, slot: u32) {
        if self.translated(slot) == 0 {
            return;
        }
        let mut addresses: Vec<Ipv4Addr> = self
            .opened
            .iter()
            .enumerate()
            .filter(|(_, o)| o.slot == Some(slot))
            .filter_map(|(id, _)| Some(*self.engine.connection(id as u32)?.internal.ip()))
            .collect();
        addresses.sort_unstable();
        addresses.dedup();
        self.left.append(&mut addresses);
        self.after(cx);
    }

    /// The owner of an address has changed. The connections of the previous owner do not pass to the next one.
    pub(crate) fn address_released(&mut self, ip: IpAddr) {
        if let IpAddr::V4(ip) = ip {
            self.left.push(ip);
        }
    }

    /// Translated flows of a port.
    pub(crate) fn translated(&self, slot: u32) -> u32 {
        self.translated.get(slot).copied().unwrap_or(0)
    }

    /// Checks that what is kept twice agrees.
    ///
    /// # Errors
    /// The first thing that does not agree.
    pub(crate) fn audit(&self) -> Result<(), String> {
        for (slot, n) in self.translated.iter() {
            if self.opened.iter().filter(|o| o.slot == Some(slot)).count() != *n as usize {
                return Err(format!("slot {slot} says that {n} flows are translated"));
            }
        }
        Ok(())
    }

    /// Does what is due.
    pub(crate) fn timers<E: Effects>(&mut self, cx: &mut Context<'_, E>) {
        self.engine.expire(cx.link.now, VISITS);
        self.after(cx);
    }

    /// When [`L3Uplink::timers`] has something to do.
    pub(crate) fn next_timer(&self, now: Time) -> Option<Time> {
        if self.left.is_empty() { self.engine.next_timer() } else { Some(now) }
    }

    /// The translated flows.
    pub(crate) fn flows(&self, lan: &Lan, now: Time) -> impl Iterator<Item = FlowInfo> {
        self.engine.numbered_connections().filter_map(move |(id, c, idle_ms)| {
            let o = self.opened.get(id as usize)?;
            Some(FlowInfo {
                flow: FlowId { index: TRANSLATED | id, generation: o.generation },
                port: lan.port(o.slot?)?.id,
                proto: c.proto,
                guest: c.internal.into(),
                remote: c.remote.into(),
                inbound: o.inbound,
                state: c.state.name(),
                bytes_out: c.bytes_out,
                bytes_in: c.bytes_in,
                age_ms: now.since(o.at) / 1_000_000,
                idle_ms,
            })
        })
    }

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
        // A frame that stands for several has nothing behind its last one.
        if meta.gso.is_some() && p.end != frame.len() {
            return NatResult::Dropped(DropReason::Malformed);
        }
        let mut partial = None;
        if let Csum::Partial { start, offset } = meta.csum {
            if !too_big && matches!(p.proto, proto::TCP | proto::UDP) {
                partial = Some((start, offset));
            } else if gso::complete_checksum(frame, start, offset).is_ok() {
                meta.csum = Csum::Full;
            } else {
                return NatResult::Dropped(DropReason::Malformed);
            }
        }
        let Some(packet) = frame.get_mut(L3..) else { return NatResult::Dropped(DropReason::Truncated) };
        let result = self.engine.translate_view(packet, view, direction, now);
        if let (Some((start, offset)), NatResult::Translated | NatResult::Hairpinned) = (partial, result) {
            let end = |at| IpAddr::V4(Ipv4Addr::from(be32(frame, at)));
            let sum = checksum::pseudo(end(L3 + 12), end(L3 + 16), p.proto, (p.end - p.l4) as u32);
            put(frame, usize::from(start) + usize::from(offset), &checksum::fold(sum).to_be_bytes());
            // Whoever completes a partial checksum sums up to the end of the frame. Bytes behind a datagram (RFC 9868)
            // or padding are not part of the sum, so it is completed here.
            if p.end < frame.len() {
                let whole = frame.get_mut(..p.end).map(|f| gso::complete_checksum(f, start, offset));
                if !matches!(whole, Some(Ok(()))) {
                    return NatResult::Dropped(DropReason::Malformed);
                }
                meta.csum = Csum::Full;
            }
        }
        result
    }
}

/// The largest packet that a frame which stands for several will be cut into, IP header included.
fn large(p: &Packet, meta: FrameMeta) -> Option<u16> {
    meta.gso?;
    Some(largest_packet(p, meta).min(0xffff) as u16)
}

/// One end of a packet's connection.
fn end_of(ip: IpAddr, port: u16) -> Option<SocketAddrV4> {
    match ip {
        IpAddr::V4(ip) => Some(SocketAddrV4::new(ip, port)),
        IpAddr::V6(_) => None,
    }
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

/// Whether a packet is within the limits of the owner; if so, it is charged. It belongs to no rule: its session, which
/// does, is in the engine.
#[cold]
fn within_limits<E>(cx: &mut Context<'_, E>, slot: u32, way: Way, bytes: usize, meta: FrameMeta) -> bool {
    let packets = match meta.gso {
        Some(Gso::Tcp(n) | Gso::Udp(n)) => bytes.div_ceil(usize::from(n.max(1))),
        None => 1,
    };
    let packets = u32::try_from(packets).unwrap_or(u32::MAX);
    cx.policy.shaping.police(cx.link.now, Owner { slot, rule: None }, way, bytes, packets)
}

/// Puts a translated packet on the port of the guest that it is for.
fn deliver<E: Effects>(cx: &mut Context<'_, E>, frame: &mut [u8], meta: FrameMeta) -> Result<(), DropReason> {
    let ip = IpAddr::V4(Ipv4Addr::from(be32(frame, L3 + 16)));
    let b = cx.link.lan.neighbour(ip).ok_or(DropReason::NoEndpoint)?;
    let (slot, mac) = (b.slot, b.mac);
    let bytes = frame.len().saturating_sub(L3);
    if cx.policy.shaping.is_active() && !within_limits(cx, slot, Way::Down, bytes, meta) {
        return Err(DropReason::RateLimit);
    }
    let dst = mac.unwrap_or(Mac::BROADCAST);
    Ether { dst, src: cx.gateway.mac(), ethertype: ether::IPV4 }.emit(frame);
    if mac.is_some() {
        cx.link.lan.deliver(slot, frame, meta, cx.link.fx);
        return Ok(());
    }
    // The guest is asked for its MAC, and the packet waits; the sender sends a large one again.
    if meta.gso.is_some() {
        return Err(DropReason::NoEndpoint);
    }
    if let Csum::Partial { start, offset } = meta.csum {
        gso::complete_checksum(frame, start, offset)?;
    }
    cx.await_neighbour(slot, ip, Held::Frame((&*frame).into())).map(drop)
}

#[cfg(test)]
mod tests;
