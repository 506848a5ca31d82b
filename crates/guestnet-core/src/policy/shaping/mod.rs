//! Theory of operation: limits on what guests carry: bytes and packets a second each way, new and open flows, bytes in all.
//! (Those on DNS queries are kept by the forwarder.) There are limits of the network, of a guest, and of the flows that a rule admits; what passes must
//! be within all of them. Without limits, one flag says so, and nothing else is looked at.
//!
//! - **TCP** is slowed by its windows and loses nothing. A relayed flow asks how many bytes may pass ([`Shaping::allowance`]);
//!   what may not stays in the guest or in the host's socket. The flow waits in the queue of the limit that stopped it
//!   ([`Shaping::wait`]) and is called again when there is credit ([`Shaping::next_due`]). Queues are first come, first
//!   served; each flow gets [`QUANTUM`] bytes at a time, so that the flows of a limit share it evenly.
//! - **Datagrams, and packets of an uplink of packets**, are dropped beyond the limit ([`Shaping::police`]). While TCP flows
//!   wait in the same direction, datagrams get half of the rate.
//! - **Flows** beyond their limit are refused.
//!
//! A flow that is called has credit in the limit that called it. It makes progress, or waits for another limit that has no
//! credit, or for its socket or its guest; so a round of calls at one moment ends.
//!
//! Bounds: a flow is in one queue for each way, so all queues together are as long as the flow table, twice.

mod spec;
#[cfg(test)]
mod tests;

pub use spec::LimitSpec;

use crate::interface::types::{FlowId, PortId, Time};
use crate::tables::per_port::PerPort;
use crate::util::token_bucket::TokenBucket;
use std::collections::{BTreeSet, HashMap, VecDeque};

/// Bytes that a flow may carry before others that wait for the same limit have their turn.
pub const QUANTUM: u32 = 16 << 10;
/// The least credit with which a flow is called again, so that it can send a whole segment.
const LEAST: u64 = 1500;
/// Less credit than this is none: segments do not become small because of a limit.
pub const SEGMENT_LEAST: u32 = 1400;
/// A bucket holds what its rate allows in this part of a second, and two packets at least.
const BURST_PART: u64 = 50;
const BURST_LEAST: u64 = 3000;
/// Bytes of a packet of TCP, where packets are counted.
const PACKET: u64 = 1448;

/// The way of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// From a guest.
    Up,
    /// To a guest.
    Down,
}

/// Bytes that may pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowance {
    /// From the guest.
    pub up: u32,
    /// To the guest.
    pub down: u32,
    /// The largest window to offer the guest.
    pub window: u32,
}

impl Allowance {
    /// No limit.
    pub const ALL: Allowance = Allowance { up: u32::MAX, down: u32::MAX, window: u32::MAX };
}

/// Whose limit it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Scope {
    Network,
    /// The guest in this slot.
    Guest(u32),
    /// A rule by its number, of the network's table or of that of the guest on this port.
    Rule(Option<PortId>, u32),
}

/// What limits one way.
#[derive(Debug)]
struct Lane {
    bytes: Option<TokenBucket>,
    packets: Option<TokenBucket>,
    /// What datagrams may take while flows wait.
    datagrams: Option<TokenBucket>,
    /// Flows that wait for credit.
    waiting: VecDeque<FlowId>,
    /// When the first of them is called.
    due: Option<Time>,
}

impl Lane {
    fn new(bytes: Option<u64>, packets: Option<u64>, now: Time) -> Lane {
        let of_bytes = |rate: u64| TokenBucket::new(rate, rate.div_ceil(BURST_PART).max(BURST_LEAST), now);
        Lane {
            bytes: bytes.map(of_bytes),
            datagrams: bytes.map(|rate| of_bytes(rate.div_ceil(2))),
            packets: packets.map(|rate| TokenBucket::new(rate, rate.div_ceil(BURST_PART).max(2), now)),
            waiting: VecDeque::new(),
            due: None,
        }
    }

    /// Bytes that may pass now.
    fn left(&mut self, now: Time) -> u64 {
        let bytes = self.bytes.as_mut().map_or(u64::MAX, |b| b.left(now));
        let packets = self.packets.as_mut().map_or(u64::MAX, |p| p.left(now).saturating_mul(PACKET));
        bytes.min(packets)
    }

    fn take(&mut self, now: Time, bytes: u64, packets: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.take(now, bytes);
        }
        if let Some(bucket) = &mut self.packets {
            bucket.take(now, packets);
        }
    }

    fn when(&self) -> Option<Time> {
        let bytes = self.bytes.as_ref().map_or(Some(Time(0)), |b| b.when(LEAST))?;
        let packets = self.packets.as_ref().map_or(Some(Time(0)), |p| p.when(2))?;
        Some(bytes.max(packets))
    }
}

#[derive(Debug)]
struct Shaper {
    spec: LimitSpec,
    up: Lane,
    down: Lane,
    flows: Option<TokenBucket>,
    /// Bytes that are left of the total.
    total: Option<u64>,
}

impl Shaper {
    fn new(spec: LimitSpec, now: Time) -> Shaper {
        Shaper {
            spec,
            up: Lane::new(spec.up, spec.packets_up, now),
            down: Lane::new(spec.down, spec.packets_down, now),
            flows: spec.new_flows.map(|rate| TokenBucket::new(rate, rate.max(1), now)),
            total: spec.total,
        }
    }

    fn lane(&mut self, way: Way) -> &mut Lane {
        match way {
            Way::Up => &mut self.up,
            Way::Down => &mut self.down,
        }
    }

    fn left(&mut self, now: Time, way: Way) -> u64 {
        let total = self.total.unwrap_or(u64::MAX);
        self.lane(way).left(now).min(total)
    }

    fn take(&mut self, now: Time, way: Way, bytes: u64, packets: u64) {
        if bytes > 0 {
            self.lane(way).take(now, bytes, packets);
            // What is less than a segment is nothing: no flow waits for it.
            let left = self.total.map(|left| left.saturating_sub(bytes));
            self.total = left.map(|left| if left < LEAST { 0 } else { left });
        }
    }

    /// When the first flow that waits is called. `None`: nobody waits, or there will be no credit.
    fn when(&mut self, way: Way) -> Option<Time> {
        let nothing = self.total == Some(0);
        let lane = self.lane(way);
        if nothing || lane.waiting.is_empty() { None } else { lane.when() }
    }

    /// The window that keeps a flow busy at its rate, and no queue of seconds before the limit.
    fn window(&self) -> u32 {
        let packets = self.spec.packets_up.map(|p| p.saturating_mul(PACKET));
        let rate = self.spec.up.into_iter().chain(packets).min().unwrap_or(u64::MAX);
        u32::try_from((rate / 8).max(8192)).unwrap_or(u32::MAX)
    }
}

/// All limits of a network. See the module head.
#[derive(Debug, Default)]
pub struct Shaping {
    network: Option<Box<Shaper>>,
    guests: PerPort<Box<Shaper>>,
    rules: HashMap<(Option<PortId>, u32), Box<Shaper>>,
    /// There is some limit.
    active: bool,
    /// Limits whose first flow is called at a time.
    agenda: BTreeSet<(Time, Scope, Way)>,
    /// Flows whose limit has gone.
    released: VecDeque<(FlowId, Way)>,
}

/// What a flow belongs to.
#[derive(Debug, Clone, Copy)]
pub struct Owner {
    /// The slot of its guest.
    pub slot: u32,
    /// The rule of the owner that admitted it, with the port whose table has the rule.
    pub rule: Option<(Option<PortId>, u32)>,
}

impl Owner {
    fn scopes(self) -> [Option<Scope>; 3] {
        let rule = self.rule.map(|(port, number)| Scope::Rule(port, number));
        [Some(Scope::Guest(self.slot)), rule, Some(Scope::Network)]
    }
}

impl Shaping {
    /// Returns true when there is some limit, or a flow waits for one that has gone.
    #[inline]
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.active
    }

    /// Whether a rule has a limit.
    #[must_use]
    pub fn has_rule(&self, port: Option<PortId>, rule: u32) -> bool {
        self.rules.contains_key(&(port, rule))
    }

    fn shaper(&mut self, scope: Scope) -> Option<&mut Shaper> {
        match scope {
            Scope::Network => self.network.as_deref_mut(),
            Scope::Guest(slot) => self.guests.get_mut(slot).map(|s| &mut **s),
            Scope::Rule(port, rule) => self.rules.get_mut(&(port, rule)).map(|s| &mut **s),
        }
    }

    /// Sets the limit of the network, or takes it back. Flows that wait for the old one are called.
    pub fn set_network(&mut self, now: Time, spec: Option<LimitSpec>) {
        let new = spec.map(|s| Box::new(Shaper::new(s, now)));
        let old = std::mem::replace(&mut self.network, new);
        self.release(Scope::Network, old);
    }

    /// Sets the limit of the guest in a slot, or takes it back.
    pub fn set_guest(&mut self, now: Time, slot: u32, spec: Option<LimitSpec>) {
        let old = self.guests.remove(slot);
        if let Some(spec) = spec {
            self.guests.insert(slot, Box::new(Shaper::new(spec, now)));
        }
        self.release(Scope::Guest(slot), old);
    }

    /// Sets the limits of the rules of one table, in place of those that it had.
    pub fn set_rules(
        &mut self,
        now: Time,
        port: Option<PortId>,
        limits: impl Iterator<Item = (u32, LimitSpec)>,
    ) {
        let of_table: Vec<u32> =
            self.rules.keys().filter(|(of, _)| *of == port).map(|(_, rule)| *rule).collect();
        for rule in of_table {
            let old = self.rules.remove(&(port, rule));
            self.release(Scope::Rule(port, rule), old);
        }
        for (rule, spec) in limits {
            self.rules.insert((port, rule), Box::new(Shaper::new(spec, now)));
        }
        self.note_active();
    }

    fn release(&mut self, scope: Scope, old: Option<Box<Shaper>>) {
        if let Some(old) = old {
            for (way, lane) in [(Way::Up, old.up), (Way::Down, old.down)] {
                if let Some(due) = lane.due {
                    self.agenda.remove(&(due, scope, way));
                }
                self.released.extend(lane.waiting.into_iter().map(|flow| (flow, way)));
            }
        }
        self.note_active();
    }

    fn note_active(&mut self) {
        self.active = self.network.is_some()
            || self.guests.next_from(0).is_some()
            || !self.rules.is_empty()
            || !self.released.is_empty();
    }

    /// Bytes that a flow may carry now. `called`: it is the flow's turn to carry some this way. Otherwise flows that wait
    /// come first.
    pub fn allowance(&mut self, now: Time, owner: Owner, called: Option<Way>) -> Allowance {
        let mut found = Allowance::ALL;
        for scope in owner.scopes().into_iter().flatten() {
            let Some(shaper) = self.shaper(scope) else { continue };
            for (way, least) in [(Way::Up, &mut found.up), (Way::Down, &mut found.down)] {
                let left = u32::try_from(shaper.left(now, way)).unwrap_or(u32::MAX);
                let left = match shaper.lane(way).waiting.is_empty() {
                    true => left,
                    false if called == Some(way) => left.min(QUANTUM),
                    false => 0,
                };
                *least = left.min(*least);
            }
            found.window = found.window.min(shaper.window());
        }
        found
    }

    /// A flow has carried so many bytes.
    pub fn charge(&mut self, now: Time, owner: Owner, up: u64, down: u64) {
        if up == 0 && down == 0 {
            return;
        }
        for scope in owner.scopes().into_iter().flatten() {
            if let Some(shaper) = self.shaper(scope) {
                shaper.take(now, Way::Up, up, up.div_ceil(PACKET));
                shaper.take(now, Way::Down, down, down.div_ceil(PACKET));
            }
        }
    }

    /// A flow waits: it is called when the limit that stopped it has credit. The caller sees to it that a flow waits once
    /// each way.
    pub fn wait(&mut self, now: Time, owner: Owner, flow: FlowId, way: Way) {
        // A limit without credit, so that the flow is not called before there is some; else the one with a queue.
        let (mut empty, mut queue, mut last) = (None, None, None);
        for scope in owner.scopes().into_iter().flatten() {
            let Some(shaper) = self.shaper(scope) else { continue };
            last = Some(scope);
            if shaper.left(now, way) < LEAST {
                empty = empty.or(last);
            }
            if !shaper.lane(way).waiting.is_empty() {
                queue = queue.or(last);
            }
        }
        let Some(scope) = empty.or(queue).or(last) else {
            self.released.push_back((flow, way));
            self.active = true;
            return;
        };
        if let Some(shaper) = self.shaper(scope) {
            shaper.lane(way).waiting.push_back(flow);
        }
        self.schedule(scope, way);
    }

    /// Notes when the first flow that waits for a limit is called.
    fn schedule(&mut self, scope: Scope, way: Way) {
        let Some(shaper) = self.shaper(scope) else { return };
        let due = shaper.when(way);
        let before = std::mem::replace(&mut shaper.lane(way).due, due);
        if before == due {
            return;
        }
        if let Some(at) = before {
            self.agenda.remove(&(at, scope, way));
        }
        if let Some(at) = due {
            self.agenda.insert((at, scope, way));
        }
    }

    /// When [`Shaping::next_due`] has a flow.
    #[must_use]
    pub fn next_timer(&self, now: Time) -> Option<Time> {
        if !self.released.is_empty() {
            return Some(now);
        }
        self.agenda.first().map(|(at, ..)| *at)
    }

    /// The next flow whose turn it is to carry bytes this way. [`Shaping::turn_ended`] is called before the next one.
    pub fn next_due(&mut self, now: Time) -> Option<(FlowId, Way)> {
        if let Some(flow) = self.released.pop_front() {
            if self.released.is_empty() {
                self.note_active();
            }
            return Some(flow);
        }
        let (at, scope, way) = self.agenda.first().copied()?;
        if at > now {
            return None;
        }
        let lane = self.shaper(scope)?.lane(way);
        let flow = lane.waiting.pop_front()?;
        Some((flow, way))
    }

    /// The flow that was called last has had its turn: limits whose time has come are scheduled again.
    pub fn turn_ended(&mut self, now: Time) {
        if let Some((at, scope, way)) = self.agenda.first().copied()
            && at <= now
        {
            self.schedule(scope, way);
        }
    }

    /// Whether a datagram, or a packet of an uplink of packets, may pass; if so, it is charged.
    pub fn police(&mut self, now: Time, owner: Owner, way: Way, bytes: usize, packets: u32) -> bool {
        let bytes = bytes as u64;
        for scope in owner.scopes().into_iter().flatten() {
            let Some(shaper) = self.shaper(scope) else { continue };
            let waits = !shaper.lane(way).waiting.is_empty();
            if shaper.left(now, way) == 0 {
                return false;
            }
            if waits
                && let Some(share) = &mut shaper.lane(way).datagrams
                && !share.allow(now, bytes)
            {
                return false;
            }
        }
        for scope in owner.scopes().into_iter().flatten() {
            if let Some(shaper) = self.shaper(scope) {
                shaper.take(now, way, bytes, u64::from(packets));
            }
        }
        true
    }

    /// Whether a guest that has `open` flows may open one more.
    ///
    /// # Errors
    /// [`FlowRefused`].
    pub fn opens(&mut self, now: Time, slot: u32, open: u32, of_all: u32) -> Result<(), FlowRefused> {
        for (scope, open) in [(Scope::Guest(slot), open), (Scope::Network, of_all)] {
            let Some(shaper) = self.shaper(scope) else { continue };
            if shaper.total == Some(0) || shaper.spec.open_flows.is_some_and(|most| open >= most) {
                return Err(FlowRefused::TooMany);
            }
            if shaper.flows.as_mut().is_some_and(|f| f.left(now) == 0) {
                return Err(FlowRefused::TooFast);
            }
        }
        for scope in [Scope::Guest(slot), Scope::Network] {
            if let Some(flows) = self.shaper(scope).and_then(|s| s.flows.as_mut()) {
                flows.take(now, 1);
            }
        }
        Ok(())
    }

    /// A port was removed.
    pub fn remove_port(&mut self, slot: u32, port: PortId) {
        let old = self.guests.remove(slot);
        self.release(Scope::Guest(slot), old);
        self.set_rules(Time(0), Some(port), std::iter::empty());
    }
}

/// Why a flow is not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlowRefused {
    /// There are too many.
    TooMany,
    /// They are opened too fast.
    TooFast,
}
