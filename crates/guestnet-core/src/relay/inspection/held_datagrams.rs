//! Datagrams of a UDP flow that are held until it is known which name they show.
//!
//! Bounds: [`DATAGRAMS_MAX`] datagrams and [`BYTES_MAX`] bytes of a flow, within the guest's budget.

use crate::interface::types::{IpFields, Time};
use crate::policy::RuleId;
use guestnet_wire::inspect::{Progress, QuicCheck, QuicInspector};
use std::sync::Arc;

/// Datagrams of a flow that are held. A ClientHello with post-quantum keys takes two.
const DATAGRAMS_MAX: usize = 16;
/// Bytes of them.
const BYTES_MAX: usize = 32 << 10;
/// What a datagram costs besides its bytes.
const DATAGRAM_COST: usize = 64;

/// A datagram that waits.
#[derive(Debug)]
pub(super) struct HeldDatagram {
    pub payload: Box<[u8]>,
    pub ip: IpFields,
    pub dont_fragment: bool,
}

/// Names of the connections of one flow.
const NAMES_MAX: usize = 8;
/// How long a guest may take for a ClientHello or a request head, in milliseconds.
pub(crate) const WAIT_MS: u64 = 10_000;
/// What an inspector takes at least.
const INSPECTOR_COST: usize = 2048;

/// What the datagrams of a flow are read for.
#[derive(Debug)]
pub(crate) struct Datagrams {
    /// The rule that admits the flow, or would.
    pub rule: RuleId,
    /// Something was allowed, so the flow has a socket.
    pub judged: bool,
    /// The connections that were allowed.
    known: Box<QuicInspector>,
    /// These, and one that is read. It takes their place when it is allowed.
    reading: Option<Box<QuicInspector>>,
    /// When that began.
    since: Time,
    pub held: Vec<HeldDatagram>,
    bytes: usize,
    /// The names of the connections that were allowed, each once; an empty one for what showed none.
    pub names: Vec<Arc<str>>,
    /// Memory that is charged to the guest's budget.
    pub charged: usize,
}

impl Datagrams {
    pub fn new(rule: RuleId) -> Datagrams {
        Datagrams {
            rule,
            judged: false,
            known: Box::default(),
            reading: None,
            since: Time::default(),
            held: Vec::new(),
            bytes: 0,
            names: Vec::new(),
            charged: 0,
        }
    }

    pub fn is_reading(&self) -> bool {
        !self.judged || self.reading.is_some()
    }

    /// Whether a datagram passes without being read.
    pub fn passes(&self, datagram: &[u8]) -> bool {
        let inspector = self.reading.as_ref().unwrap_or(&self.known);
        self.judged && inspector.check(datagram) == QuicCheck::Same
    }

    /// Reads a datagram.
    pub fn read(&mut self, datagram: &[u8], now: Time) -> Progress {
        if self.reading.is_some() && self.judged && self.waits_until() <= now {
            // What was begun before came to nothing.
            self.take_held();
            self.reading = None;
        }
        if self.reading.is_none() {
            self.since = now;
        }
        self.reading.get_or_insert_with(|| self.known.clone()).feed(datagram)
    }

    /// When what has begun has to be complete.
    pub fn waits_until(&self) -> Time {
        self.since.plus_ms(WAIT_MS)
    }

    /// What was read is allowed, and showed this name. False when there are too many names.
    pub fn allow(&mut self, name: &str) -> bool {
        if !self.names.iter().any(|n| **n == *name) {
            if self.names.len() >= NAMES_MAX {
                return false;
            }
            self.names.push(name.into());
        }
        self.judged = true;
        if let Some(inspector) = self.reading.take() {
            self.known = inspector;
        }
        true
    }

    /// What was read is refused. Returns how many datagrams of it were held.
    pub fn forget(&mut self) -> usize {
        self.reading = None;
        self.take_held().len()
    }

    pub fn memory(&self) -> usize {
        let reading = self.reading.as_ref().map_or(0, |q| q.memory());
        let inspectors = self.known.memory().saturating_add(reading);
        let held = self.held.len().saturating_mul(DATAGRAM_COST).saturating_add(self.bytes);
        inspectors.saturating_add(held)
    }

    /// Whether one more datagram can be read and held, when the guest has so much left.
    pub fn has_room(&self, len: usize, free: usize) -> bool {
        let inspector = if self.reading.is_some() { 0 } else { INSPECTOR_COST };
        let cost = len.saturating_add(DATAGRAM_COST).saturating_add(inspector);
        self.held.len() < DATAGRAMS_MAX && self.bytes.saturating_add(len) <= BYTES_MAX && cost <= free
    }

    pub fn hold(&mut self, payload: &[u8], ip: IpFields, dont_fragment: bool) {
        self.bytes = self.bytes.saturating_add(payload.len());
        self.held.push(HeldDatagram { payload: payload.into(), ip, dont_fragment });
    }

    pub fn take_held(&mut self) -> Vec<HeldDatagram> {
        self.bytes = 0;
        std::mem::take(&mut self.held)
    }
}
