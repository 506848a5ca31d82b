//! Datagrams of a UDP flow that are held until it is known which name they show.
//!
//! Bounds: [`DATAGRAMS_MAX`] datagrams and [`BYTES_MAX`] bytes of a flow, within the guest's budget.

use crate::interface::types::{IpFields, Time};
use crate::policy::RuleId;
use guestnet_wire::be32;
use guestnet_wire::inspect::{QuicCheck, QuicInspector};

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

/// What an inspector takes at least.
const INSPECTOR_COST: usize = 2048;

/// What the datagrams of a flow are read for.
#[derive(Debug)]
pub(crate) struct Datagrams {
    /// The rule that admits the flow, or would.
    pub rule: RuleId,
    /// Something was allowed, so the flow has a socket.
    pub judged: bool,
    /// The connection that was allowed last.
    pub known: Option<Box<QuicInspector>>,
    /// The connection that is read.
    pub reading: Option<Box<QuicInspector>>,
    /// When that began.
    pub since: Time,
    pub held: Vec<HeldDatagram>,
    bytes: usize,
    /// Memory that is charged to the guest's budget.
    pub charged: usize,
}

impl Datagrams {
    pub fn new(rule: RuleId) -> Datagrams {
        Datagrams {
            rule,
            judged: false,
            known: None,
            reading: None,
            since: Time::default(),
            held: Vec::new(),
            bytes: 0,
            charged: 0,
        }
    }

    pub fn is_reading(&self) -> bool {
        !self.judged || self.reading.is_some()
    }

    /// Whether a datagram passes without being read.
    pub fn passes(&self, datagram: &[u8]) -> bool {
        match &self.known {
            Some(known) => known.check(datagram) == QuicCheck::Same,
            None => self.judged && self.reading.is_none() && !may_begin_quic(datagram),
        }
    }

    pub fn memory(&self) -> usize {
        let inspectors = self.known.iter().chain(&self.reading).map(|q| q.memory()).sum::<usize>();
        let held = self.held.len().saturating_mul(DATAGRAM_COST).saturating_add(self.bytes);
        inspectors.saturating_add(held)
    }

    /// Holds a datagram. False when there are too many.
    pub fn hold(&mut self, payload: &[u8], ip: IpFields, dont_fragment: bool, free: usize) -> bool {
        let bytes = self.bytes.saturating_add(payload.len());
        let inspector = if self.reading.is_some() { 0 } else { INSPECTOR_COST };
        let room = payload.len().saturating_add(DATAGRAM_COST).saturating_add(inspector) <= free;
        if self.held.len() >= DATAGRAMS_MAX || bytes > BYTES_MAX || !room {
            return false;
        }
        self.bytes = bytes;
        self.held.push(HeldDatagram { payload: payload.into(), ip, dont_fragment });
        true
    }

    pub fn take_held(&mut self) -> Vec<HeldDatagram> {
        self.bytes = 0;
        std::mem::take(&mut self.held)
    }
}

/// Whether a datagram has a long header of a version that is read here.
fn may_begin_quic(datagram: &[u8]) -> bool {
    datagram.first().is_some_and(|b| b & 0x80 != 0) && matches!(be32(datagram, 1), 1 | 0x6b33_43cf)
}
