//! Theory of operation: the engine ties the parts together: reads the packet, sends it down the way of its
//! direction, counts what came of it, and does a little of the expiry work on each call, never all at once.

use crate::interface::stats::DropReason;
use crate::interface::types::Time;
use crate::nat::config::{NatConfigError, NatEngineConfig, Refusal};
use crate::nat::packet::fragments::Fragments;
use crate::nat::packet::output::Output;
use crate::nat::packet::{self, End, Kind, View};
use crate::nat::stats::{ConnTrackStats, Connection, NatStats};
use crate::nat::table::Table;
use crate::nat::table::records::{HAIRPIN, Key, Session};
use crate::nat::table::state::{ConnState, TICK_BITS, TICKS_MOST, Timers};
use crate::nat::{NatDirection, NatResult};
use guestnet_wire::{icmp, proto, tcp};
use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};

/// Why a port cannot be published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ForwardError {
    /// Not TCP or UDP.
    #[error("only TCP and UDP ports can be published")]
    Protocol,
    /// Not one of the engine's external addresses.
    #[error("{0} is not an external address of this engine")]
    NotExternal(Ipv4Addr),
    /// Not an internal address.
    #[error("{0} is not inside the internal network")]
    NotInternal(Ipv4Addr),
    /// Port 0 at either end.
    #[error("port 0 cannot be published")]
    PortZero,
    /// A connection or another published port has it.
    #[error("external port {0} is in use")]
    InUse(SocketAddrV4),
    /// The engine translates IPv4 alone.
    #[error("{0} is not an IPv4 address")]
    NotIpv4(IpAddr),
    /// A forward with this number is there already.
    #[error("forward {0} exists already")]
    Exists(u32),
    /// There is no such published port.
    #[error("{0} is not a published port")]
    NotPublished(SocketAddrV4),
    /// The table has no room for one more mapping or internal address.
    #[error("the NAT table is full: try again when connections have ended, or use a larger table")]
    Full,
}

/// An inbound SYN that nobody asked for, until its time is over (RFC 5382 REQ-4).
pub(super) struct UnsolicitedSyn {
    pub until: u64,
    pub key: Key,
    pub quote: Vec<u8>,
}

/// How many of those are remembered; more are dropped in silence.
pub(super) const MAX_UNSOLICITED: usize = 128;

/// Records looked at in one step of making room, and how many such steps one packet may take: some 20 ms at worst.
const ROOM_SLICE: usize = 4096;
const ROOM_SLICES: usize = 16;

/// In-place NAT with connection tracking. See the module head of [`super`].
///
/// Time is whatever the caller counts in, in nanoseconds: since boot, since 1970, since the first packet of a capture.
/// The first call that gives a time sets the start; from then on a time earlier than the latest counts as
/// the latest.
///
/// # Examples
/// ```
/// use guestnet_core::nat::{NatDirection, NatEngine, NatEngineConfig, NatResult};
/// use guestnet_core::types::Time;
///
/// let mut engine = NatEngine::new(NatEngineConfig::new("203.0.113.1".parse()?))?;
/// let mut packet = [
///     0x45, 0, 0, 28, 0, 1, 0, 0, 64, 17, 0x3e, 0x1c, 192, 168, 64, 2, 203, 0, 113, 9, // IPv4
///     0xc3, 0x50, 0, 53, 0, 8, 0, 0, // UDP from port 50000 to port 53, no checksum
/// ];
/// assert_eq!(engine.translate(&mut packet, NatDirection::Outbound, Time(0)), NatResult::Translated);
/// assert_eq!(packet[12..16], [203, 0, 113, 1]);
/// assert_eq!(engine.connection_count(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct NatEngine {
    pub(super) config: NatEngineConfig,
    pub(super) table: Table,
    pub(super) timers: Timers,
    pub(super) now: u64,
    /// The time of tick 0; `None` until a call gives a time. It moves when ticks would no longer fit.
    base: Option<u64>,
    pub(super) tick: u32,
    pub(super) fragments: Fragments,
    pub(super) output: Output,
    pub(super) unsolicited: VecDeque<UnsolicitedSyn>,
    pub(super) gateway: u32,
    pub(super) next_id: u16,
    pub(super) stats: NatStats,
}

impl NatEngine {
    /// Makes an engine.
    ///
    /// # Errors
    /// What [`NatEngineConfig::validate`] finds.
    pub fn new(config: NatEngineConfig) -> Result<NatEngine, NatConfigError> {
        config.validate()?;
        let mut table = Table::new(&config);
        let next_id = table.random.u32() as u16;
        Ok(NatEngine {
            table,
            timers: Timers::new(&config),
            now: 0,
            base: None,
            tick: 0,
            fragments: Fragments::new(config.fragment_sets, config.fragment_bytes, config.timeouts.fragment),
            output: Output::new(config.output_bytes, config.icmp_errors_per_second),
            unsolicited: VecDeque::new(),
            gateway: config.gateway_address(),
            next_id,
            stats: NatStats::default(),
            config,
        })
    }

    /// Touches all memory of the tables (about 150 bytes a connection), so that no packet waits for a page.
    pub fn prefault(&mut self) {
        self.table.prefault();
    }

    /// Address and length in bytes of the memory of the tables, which stays where it is: for who asks the
    /// system for larger pages. Use it before [`NatEngine::prefault`].
    #[must_use]
    pub fn memory_ranges(&self) -> [(usize, usize); 8] {
        self.table.ranges()
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &NatEngineConfig {
        &self.config
    }

    /// Translates one IP packet in place. Its length never changes; where the result is not `Translated`,
    /// `Hairpinned` or `Fragmented` no byte does. Bytes after the packet's own length are left alone.
    pub fn translate(&mut self, packet: &mut [u8], direction: NatDirection, now: Time) -> NatResult {
        self.begin_packet(now);
        self.translate_now(packet, direction)
    }

    /// As [`NatEngine::translate`] for a packet whose headers were read before.
    pub(crate) fn translate_view(
        &mut self,
        packet: &mut [u8],
        view: Result<&View, DropReason>,
        direction: NatDirection,
        now: Time,
    ) -> NatResult {
        self.begin_packet(now);
        self.translate_read(packet, view, direction)
    }

    #[inline]
    fn begin_packet(&mut self, now: Time) {
        self.set_time(now);
        if self.tick >= self.table.due {
            self.reap(4);
        }
    }

    /// As [`NatEngine::translate`] for a packet that starts at `offset` of `frame` (14 behind Ethernet).
    pub fn translate_at(
        &mut self,
        frame: &mut [u8],
        offset: usize,
        direction: NatDirection,
        now: Time,
    ) -> NatResult {
        match frame.get_mut(offset..) {
            Some(packet) => self.translate(packet, direction, now),
            None => self.translate(&mut [], direction, now),
        }
    }

    pub(super) fn translate_now(&mut self, p: &mut [u8], direction: NatDirection) -> NatResult {
        if p.first().is_some_and(|b| b >> 4 == 6) {
            self.count(NatResult::PassThrough, direction);
            return NatResult::PassThrough;
        }
        let view = packet::read(p);
        self.translate_read(p, view.as_ref().map_err(|why| *why), direction)
    }

    #[inline(always)]
    fn translate_read(
        &mut self,
        p: &mut [u8],
        view: Result<&View, DropReason>,
        direction: NatDirection,
    ) -> NatResult {
        let result = match (view, direction) {
            (Ok(v), NatDirection::Outbound) => self.outbound(p, v),
            (Ok(v), NatDirection::Inbound) => self.inbound(p, v),
            (Err(why), _) => NatResult::Dropped(why),
        };
        self.count(result, direction);
        result
    }

    pub(super) fn count(&mut self, result: NatResult, direction: NatDirection) {
        let s = &mut self.stats;
        match result {
            NatResult::Translated | NatResult::Fragmented => {
                if result == NatResult::Fragmented {
                    s.fragmented += 1;
                }
                match direction {
                    NatDirection::Outbound => s.outbound += 1,
                    NatDirection::Inbound => s.inbound += 1,
                }
            }
            NatResult::Hairpinned => s.hairpinned += 1,
            NatResult::PassThrough => s.passed += 1,
            NatResult::Held => s.held += 1,
            NatResult::TooBig(_) => s.too_big += 1,
            NatResult::Dropped(why) => s.drop(why),
        }
    }

    pub(super) fn set_time(&mut self, now: Time) {
        if now.0 <= self.now && self.base.is_some() {
            return;
        }
        let base = *self.base.get_or_insert(now.0);
        self.now = now.0;
        let tick = now.0.saturating_sub(base) >> TICK_BITS;
        if tick < TICKS_MOST {
            self.tick = tick as u32;
        } else {
            self.move_base(base, tick);
        }
    }

    /// Makes `tick` after `base` the new tick 0. One pass over the table, once in four years or after such a leap.
    #[cold]
    fn move_base(&mut self, base: u64, tick: u64) {
        self.base = Some(base + (tick << TICK_BITS));
        self.tick = 0;
        self.table.move_base(tick);
    }

    /// The next packet that the engine itself sends, and the way it travels.
    pub fn poll_output(&mut self) -> Option<(NatDirection, Vec<u8>)> {
        self.output.pop()
    }

    /// How many packets wait in [`NatEngine::poll_output`].
    #[must_use]
    pub fn output_len(&self) -> usize {
        self.output.len()
    }

    // ---- sessions -----------------------------------------------------------------------------------

    /// The session if it is not dead; a dead one is taken away on the spot.
    pub(super) fn alive(&mut self, id: Option<u32>) -> Option<u32> {
        let id = id?;
        if self.table.sessions.get(id).is_some_and(|s| s.expires > self.tick) {
            return Some(id);
        }
        self.table.remove_session(id, self.tick);
        self.stats.expired += 1;
        None
    }

    pub(super) fn new_session(
        &mut self,
        k: &Key,
        via: Option<u32>,
        state: ConnState,
    ) -> Result<u32, DropReason> {
        let expires = self.tick.saturating_add(self.timers.ticks[state as usize]);
        let flags = if self.table.is_external(k.remote) { HAIRPIN } else { 0 };
        let mut made = self.table.new_session(k, via, state, expires, flags, self.tick);
        // What is over and not yet collected holds nothing against the living; what lives makes no room.
        for _ in 0..ROOM_SLICES {
            let full = matches!(
                made,
                Err(DropReason::TableFull
                    | DropReason::PortsExhausted
                    | DropReason::PortLimit
                    | DropReason::FlowLimit)
            );
            if !full || self.settled() {
                break;
            }
            self.reap(ROOM_SLICE);
            made = self.table.new_session(k, via, state, expires, flags, self.tick);
        }
        if made.is_ok() {
            self.stats.created += 1;
        }
        made
    }

    /// Notes that a packet passed: state, deadline, bytes.
    pub(super) fn advance(&mut self, id: u32, v: &View, outbound: bool) {
        let tick = self.tick;
        let Some(s) = self.table.sessions.get_mut(id) else { return };
        if outbound {
            s.bytes_out += v.total as u64;
        } else {
            s.bytes_in += v.total as u64;
        }
        let before = s.state;
        let refresh = match before {
            ConnState::Dns | ConnState::DnsAnswered => {
                s.state = if outbound { ConnState::Dns } else { ConnState::DnsAnswered };
                outbound || before == ConnState::Dns
            }
            ConnState::Udp | ConnState::Icmp | ConnState::Other => {
                outbound || self.timers.plain[1][before as usize] != 0
            }
            _ => {
                let step = crate::nat::table::state::tcp(before, v.flags, outbound);
                s.state = step.state;
                step.refresh
            }
        };
        if refresh {
            let until = tick.saturating_add(self.timers.ticks[s.state as usize]);
            if until < s.expires {
                self.table.shorten(id, until);
            } else {
                s.expires = until;
            }
        }
    }

    /// True when all that is over has been collected.
    #[inline]
    fn settled(&self) -> bool {
        self.tick < self.table.due
    }

    /// Collects what is over. False when there was too much of it for one packet.
    pub(super) fn settle(&mut self) -> bool {
        for _ in 0..ROOM_SLICES {
            if self.settled() {
                break;
            }
            self.reap(ROOM_SLICE);
        }
        self.settled()
    }

    /// Looks at up to `visits` records whose time may be over. Returns how many went. They go in groups, so
    /// that the memory that removing one needs is fetched for all at once.
    pub(super) fn reap(&mut self, visits: usize) -> usize {
        let mut gone = 0;
        let mut left = visits;
        let mut done = false;
        while left > 0 && !done {
            let mut dead = [0u32; 16];
            let mut n = 0;
            while n < dead.len() && left > 0 {
                let Some(id) = self.table.wheel.pop(&mut self.table.sessions, u64::from(self.tick)) else {
                    done = true;
                    break;
                };
                left -= 1;
                match self.table.sessions.get(id).map(|s| s.expires) {
                    Some(expires) if expires > self.tick => {
                        self.table.wheel.arm(&mut self.table.sessions, id, u64::from(expires));
                    }
                    _ => {
                        dead[n] = id;
                        n += 1;
                    }
                }
            }
            let dead = &dead[..n];
            std::hint::black_box(dead.iter().fold(0, |seen, id| seen ^ self.table.foresee_removal(*id)));
            for id in dead {
                self.table.remove_session(*id, self.tick);
            }
            gone += n;
        }
        if done {
            self.table.due = self.table.next_deadline().unwrap_or(u32::MAX);
        }
        self.stats.expired += gone as u64;
        gone
    }

    /// Does expiry work for up to `visits` records, and for fragments, resting ports and unsolicited SYNs.
    /// Returns how many connections ended. Call it when [`NatEngine::next_timer`] says, and again while that
    /// still says now; 256 visits take a fraction of a millisecond.
    pub fn expire(&mut self, now: Time, visits: usize) -> usize {
        self.set_time(now);
        self.fragments.expire(self.now);
        self.table.release_held(self.tick, visits.max(64));
        self.answer_unsolicited();
        self.reap(visits)
    }

    /// When [`NatEngine::expire`] has something to do next.
    #[must_use]
    pub fn next_timer(&self) -> Option<Time> {
        let ticks = [self.table.next_deadline(), self.table.next_release()].into_iter().flatten().min();
        // What lies past the end of time never comes.
        let ticks = ticks.and_then(|t| self.base.unwrap_or(0).checked_add(u64::from(t) << TICK_BITS));
        let syn = self.unsolicited.front().map(|s| s.until);
        [ticks, syn, self.fragments.next_deadline()].into_iter().flatten().min().map(Time)
    }

    fn answer_unsolicited(&mut self) {
        while self.unsolicited.front().is_some_and(|s| s.until <= self.now) {
            let Some(s) = self.unsolicited.pop_front() else { return };
            self.icmp_error(
                NatDirection::Outbound,
                s.key.local,
                &s.quote,
                icmp::UNREACHABLE,
                icmp::unreachable::PORT,
                [0; 4],
            );
        }
    }

    // ---- errors -------------------------------------------------------------------------------------

    pub(super) fn icmp_error(
        &mut self,
        direction: NatDirection,
        src: u32,
        quoted: &[u8],
        icmp_type: u8,
        code: u8,
        rest: [u8; 4],
    ) {
        let second = self.now / 1_000_000_000;
        if self.output.icmp_error(direction, second, src, quoted, (icmp_type, code, rest)) {
            self.stats.icmp_errors += 1;
        }
    }

    /// Refuses a guest's packet by policy or for want of resources, and says so (RFC 5508 REQ-8).
    pub(super) fn refuse(&mut self, p: &[u8], why: DropReason) -> NatResult {
        let code = match self.config.refusal {
            Refusal::Prohibited => icmp::unreachable::ADMIN_PROHIBITED,
            Refusal::HostUnreachable => icmp::unreachable::HOST,
            Refusal::Silent => return NatResult::Dropped(why),
        };
        self.icmp_error(NatDirection::Inbound, self.gateway, p, icmp::UNREACHABLE, code, [0; 4]);
        NatResult::Dropped(why)
    }

    /// What stops a packet that came in one direction and leaves in another (`to`): TTL, then size.
    #[inline]
    pub(super) fn blocked(
        &mut self,
        p: &[u8],
        v: &View,
        direction: NatDirection,
        to: NatDirection,
    ) -> Option<NatResult> {
        if v.ttl > 1 && v.size() <= usize::from(self.mtu(to)) {
            return None;
        }
        self.stopped(p, v, direction, to)
    }

    fn stopped(
        &mut self,
        p: &[u8],
        v: &View,
        direction: NatDirection,
        to: NatDirection,
    ) -> Option<NatResult> {
        // The error goes back where the packet came from, and speaks for the side it came from.
        let (back, src) = match direction {
            NatDirection::Outbound => (NatDirection::Inbound, self.gateway),
            NatDirection::Inbound => (NatDirection::Outbound, v.dst),
        };
        let mtu = self.mtu(to);
        if self.config.decrement_ttl && v.ttl <= 1 {
            self.icmp_error(back, src, p, icmp::TIME_EXCEEDED, 0, [0; 4]);
            return Some(NatResult::Dropped(DropReason::TtlExpired));
        }
        if v.size() > usize::from(mtu) {
            if v.dont_fragment || v.largest.is_some() {
                let m = mtu.to_be_bytes();
                let code = icmp::unreachable::FRAG_NEEDED;
                self.icmp_error(back, src, p, icmp::UNREACHABLE, code, [0, 0, m[0], m[1]]);
                return Some(NatResult::TooBig(mtu));
            }
            // Now, while the packet can still be left as it is.
            if !self.output.has_room(v.src, Output::cut_bytes(v, usize::from(mtu))) {
                return Some(NatResult::Dropped(DropReason::BufferLimit));
            }
        }
        None
    }

    /// The IP MTU of the links in a direction.
    fn mtu(&self, to: NatDirection) -> u16 {
        match to {
            NatDirection::Outbound => self.config.mtu_outside,
            NatDirection::Inbound => self.config.mtu_inside,
        }
    }

    /// The IP MTU of the link that a guest's packet to `destination` leaves by: what is for an external address
    /// goes back inside.
    #[must_use]
    pub fn mtu_to(&self, destination: Ipv4Addr) -> u16 {
        self.mtu(self.way(NatDirection::Outbound, u32::from(destination)))
    }

    /// Which way a packet to `dst` that travels in a direction leaves.
    pub(super) fn way(&self, direction: NatDirection, dst: u32) -> NatDirection {
        let turned = direction == NatDirection::Outbound && self.table.is_external(dst);
        crate::nat::outbound::way(direction, turned)
    }

    /// The last steps of a packet whose addresses are done: TTL, and fragments where it is too big. There is room for
    /// those: [`NatEngine::blocked`] has looked, and nothing was sent since.
    #[inline]
    pub(super) fn finish(&mut self, p: &mut [u8], v: &View, to: NatDirection, done: NatResult) -> NatResult {
        if self.config.decrement_ttl {
            packet::decrement_ttl(p);
        }
        if v.size() > usize::from(self.mtu(to)) { self.cut(p, v, to) } else { done }
    }

    fn cut(&mut self, p: &mut [u8], v: &View, to: NatDirection) -> NatResult {
        if v.fragment.is_none() && self.config.internal.has(v.src) {
            // Guests share an external address: two with one identification would be put together as one packet
            // (RFC 6864 5.3.1), by chance or because one of them wants it.
            self.next_id = self.next_id.wrapping_add(1);
            packet::set_id(p, self.next_id);
        }
        if self.output.fragment(to, p, v, usize::from(self.mtu(to))) {
            NatResult::Fragmented
        } else {
            NatResult::Dropped(DropReason::BufferLimit)
        }
    }

    // ---- published ports ----------------------------------------------------------------------------

    /// Publishes `external` (DNAT) as `internal`, for TCP (6) or UDP (17). Everybody outside may use it.
    ///
    /// # Errors
    /// [`ForwardError`].
    pub fn add_forward(
        &mut self,
        protocol: u8,
        external: SocketAddrV4,
        internal: SocketAddrV4,
    ) -> Result<(), ForwardError> {
        if !matches!(protocol, proto::TCP | proto::UDP) {
            return Err(ForwardError::Protocol);
        }
        if external.port() == 0 {
            return Err(ForwardError::PortZero);
        }
        if !self.table.is_external(u32::from(*external.ip())) {
            return Err(ForwardError::NotExternal(*external.ip()));
        }
        self.check_internal(internal)?;
        self.with_room(|table| table.publish(protocol, end(external), end(internal)).map(|_| ()))
    }

    /// Makes a published port lead to another internal end. Its connections end: their guest has gone or moved.
    ///
    /// # Errors
    /// [`ForwardError`]; the port leads where it led before then, and its connections live on.
    pub fn retarget_forward(
        &mut self,
        protocol: u8,
        external: SocketAddrV4,
        internal: SocketAddrV4,
    ) -> Result<(), ForwardError> {
        self.check_internal(internal)?;
        let (ip, port) = end(external);
        let mapping = self.table.mapping_in(ip, port, protocol);
        let mapping = mapping.filter(|m| self.table.mappings.get(*m).is_some_and(|m| m.published));
        let mapping = mapping.ok_or(ForwardError::NotPublished(external))?;
        self.with_room(|table| table.check_retarget(mapping, *internal.ip()))?;
        self.end_where(|s| s.mapping == mapping);
        self.table.retarget(mapping, end(internal));
        Ok(())
    }

    fn check_internal(&self, internal: SocketAddrV4) -> Result<(), ForwardError> {
        if internal.port() == 0 {
            return Err(ForwardError::PortZero);
        }
        if !self.config.internal.contains(*internal.ip()) {
            return Err(ForwardError::NotInternal(*internal.ip()));
        }
        Ok(())
    }

    /// Does something to the table, and again without the connections whose time is over if it failed with them.
    fn with_room(
        &mut self,
        mut step: impl FnMut(&mut Table) -> Result<(), ForwardError>,
    ) -> Result<(), ForwardError> {
        let done = step(&mut self.table);
        if done.is_ok() || self.settled() {
            return done;
        }
        self.settle();
        step(&mut self.table)
    }

    /// Takes a published port back; connections through it live on. False when it was not published.
    pub fn remove_forward(&mut self, protocol: u8, external: SocketAddrV4) -> bool {
        let (ip, port) = end(external);
        self.table.unpublish(protocol, (ip, port), self.tick)
    }

    // ---- looking ------------------------------------------------------------------------------------

    /// Counters since the engine was made.
    #[must_use]
    pub fn stats(&self) -> NatStats {
        self.stats
    }

    /// Connections tracked now, those included whose time is over but not their removal.
    #[must_use]
    pub fn connection_count(&self) -> usize {
        self.table.len()
    }

    /// What the engine holds now.
    #[must_use]
    pub fn conntrack_stats(&self) -> ConnTrackStats {
        ConnTrackStats {
            connections: self.table.len(),
            mappings: self.table.mapping_count(),
            ports: self.table.ports_taken(),
            capacity: self.config.table_size,
            memory: self.table.memory(),
            created: self.stats.created,
            expired: self.stats.expired,
            hits: self.stats.hits,
            misses: self.stats.misses,
        }
    }

    /// Sets and bytes of fragments kept now.
    #[must_use]
    pub fn fragment_usage(&self) -> (usize, usize) {
        (self.fragments.len(), self.fragments.held_bytes())
    }

    /// The longest run in the busiest index: what the unluckiest look-up costs in probes.
    #[must_use]
    pub fn longest_probe(&self) -> usize {
        self.table.out.longest_run().max(self.table.inn.longest_run())
    }

    /// The live connections.
    pub fn connections(&self) -> impl Iterator<Item = Connection> {
        let tick = self.tick;
        let live = move |s: &&Session| s.proto != 0 && s.expires > tick;
        self.table.sessions.items.iter().filter(live).map(Connection::of)
    }

    /// The outbound rewriting of a session: its external end.
    pub(super) fn external_end(&self, id: u32) -> Option<End> {
        self.table.sessions.get(id).map(|s| End {
            ip: s.ext_ip,
            port: s.ext_port,
            delta_ip: s.delta_ip,
            delta_l4: s.delta_l4,
        })
    }

    /// The state that a first packet gives a new connection; `None` when it may not begin one.
    pub(super) fn opening(&self, v: &View, outbound: bool) -> Option<ConnState> {
        Some(match v.proto {
            proto::TCP if v.flags & tcp::flags::RST != 0 => return None,
            proto::TCP if v.flags & tcp::flags::SYN != 0 => {
                // A SYN-ACK answers; from outside it opens nothing.
                match (outbound, v.flags & tcp::flags::ACK != 0) {
                    (true, _) => ConnState::SynOut,
                    (false, false) => ConnState::SynIn,
                    (false, true) => return None,
                }
            }
            proto::TCP if outbound && self.config.tcp_pickup => ConnState::PickedUp,
            proto::TCP => return None,
            proto::UDP if outbound && v.dport == 53 => ConnState::Dns,
            proto::UDP => ConnState::Udp,
            proto::ICMP if v.kind == Kind::Query => ConnState::Icmp,
            proto::GRE | proto::ESP | proto::SCTP => ConnState::Other,
            _ => return None,
        })
    }
}

/// An address and port as the table has them.
fn end(a: SocketAddrV4) -> (u32, u16) {
    (u32::from(*a.ip()), a.port())
}

impl std::fmt::Debug for NatEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NatEngine")
            .field("external", &self.config.external)
            .field("connections", &self.connection_count())
            .finish_non_exhaustive()
    }
}
