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
use crate::nat::table::records::{HAIRPIN, Key, NO_MAPPING, Session};
use crate::nat::table::state::{ConnState, TICK_BITS, TICKS_MOST, Timers};
use crate::nat::{NatDirection, NatResult};
use guestnet_wire::{icmp, proto, tcp};
use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddrV4};

/// An inbound SYN that nobody asked for, until its time is over (RFC 5382 REQ-4).
pub(super) struct UnsolicitedSyn {
    pub until: u64,
    pub key: Key,
    pub quote: Vec<u8>,
}

/// How many of those are remembered; more are dropped in silence.
pub(super) const MAX_UNSOLICITED: usize = 128;

/// Records looked at in one step of making room, and how many such steps one packet may take: some 20 ms at worst.
pub(super) const ROOM_SLICE: usize = 4096;
pub(super) const ROOM_SLICES: usize = 16;

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
    pub(super) base: Option<u64>,
    pub(super) tick: u32,
    pub(super) fragments: Fragments,
    pub(super) output: Output,
    pub(super) unsolicited: VecDeque<UnsolicitedSyn>,
    pub(super) gateway: u32,
    pub(super) next_id: u16,
    pub(super) admission: Admission,
    /// The mapping of the last packet from outside that was asked about.
    pub(super) entered: u32,
    pub(super) stats: NatStats,
}

/// Whether packets that belong to no session are let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Admission {
    /// Whatever the configuration allows.
    Open,
    /// None, the caller is asked first ([`NatResult::New`]).
    Asks,
    /// The packet at hand is let in: the caller has been asked.
    Admitted,
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
            admission: Admission::Open,
            entered: u32::MAX,
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

    /// Has the engine report packets that belong to no session ([`NatResult::New`]) instead of letting them in.
    pub fn ask_before_sessions(&mut self) {
        self.admission = Admission::Asks;
    }

    /// Lets the next packets in although they belong to no session, until [`NatEngine::ask_before_sessions`].
    pub fn admit_next(&mut self) {
        self.admission = Admission::Admitted;
    }

    /// After [`NatResult::New`] for a packet from outside: the guest's end of the mapping that it would enter through.
    #[must_use]
    pub fn entered(&self) -> SocketAddrV4 {
        let m = self.table.mappings.get(self.entered).copied().unwrap_or(NO_MAPPING);
        SocketAddrV4::new(Ipv4Addr::from(m.int_ip), m.int_port)
    }

    /// Ends a connection; false when there is none with this number.
    pub fn end_connection(&mut self, id: u32) -> bool {
        let live = self.table.sessions.get(id).is_some_and(|s| s.proto != 0);
        if live {
            self.table.remove_session(id, self.tick);
        }
        live
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
            NatResult::New => {}
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
        direction.way(turned)
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

impl std::fmt::Debug for NatEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NatEngine")
            .field("external", &self.config.external)
            .field("connections", &self.connection_count())
            .finish_non_exhaustive()
    }
}
