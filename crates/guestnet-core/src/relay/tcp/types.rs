//! Theory of operation: what callers of the relay hand in (where the flow runs, the endpoint's budget, time
//! and world) and get back (what is to become of the record).

use crate::interface::effects::{Effects, SockError};
use crate::interface::stats::Counters;
use crate::interface::types::{PortId, Time};
use crate::policy::shaping::Allowance;
use guestnet_wire::ether::Mac;
use std::net::SocketAddr;

/// Bytes that wait for one host socket at most, and so the largest window offered.
pub const FLOW_BUFFER: u32 = 1 << 20;
/// Window scale that we offer: 65535 << 5 covers [`FLOW_BUFFER`].
pub(super) const RCV_SHIFT: u8 = 5;
/// Bytes in flight to the guest at most; a local link needs no more, and the host's socket holds them all.
pub(super) const MAX_FLIGHT: u32 = 1 << 20;

/// Where a flow runs: the guest's side of it, as core knows it now.
#[derive(Debug, Clone, Copy)]
pub struct Path {
    /// Port of the guest.
    pub port: PortId,
    /// Source MAC of frames to the guest.
    pub gateway_mac: Mac,
    /// Destination MAC of frames to the guest; nothing is sent while it is not a unicast address.
    pub guest_mac: Mac,
    /// The guest's address and port.
    pub guest: SocketAddr,
    /// The other side, as the guest names it.
    pub remote: SocketAddr,
    /// IP MTU towards the guest in bytes.
    pub mtu: u16,
    /// Largest payload of one frame when the port takes GSO frames, 0 for none.
    pub gso_max: u32,
}

/// Buffered bytes of an endpoint, shared by all its flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// In use now.
    pub used: usize,
    /// May be used.
    pub limit: usize,
}

impl Budget {
    /// Bytes that are left.
    #[must_use]
    pub fn free(&self) -> usize {
        self.limit.saturating_sub(self.used)
    }
}

/// How long a flow may be silent. Milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// Established (RFC 5382 REQ-5: at least 7440 s); a half-closed flow too.
    pub established_ms: u32,
    /// Opening or closed both ways but for the last ACK (RFC 5382 REQ-5: at least 240 s).
    pub transitory_ms: u32,
    /// TIME-WAIT. The link is local: long enough to answer a FIN that is sent again, no more.
    pub time_wait_ms: u32,
    /// How long the ACK of a little data may wait for an answer to travel with (RFC 9293 3.8.6.3: under
    /// 500), 0 for not at all.
    pub ack_delay_ms: u32,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts { established_ms: 7_440_000, transitory_ms: 240_000, time_wait_ms: 2_000, ack_delay_ms: 10 }
    }
}

/// What an entry point needs from its caller.
pub struct Ctx<'a, E: Effects> {
    /// Now.
    pub now: Time,
    /// The world.
    pub fx: &'a mut E,
    /// Where frames sent (`tx_frames`, `tx_bytes`), retransmissions and drops are counted.
    pub counters: &'a mut Counters,
    /// The guest's side.
    pub path: &'a Path,
    /// The endpoint's buffered bytes.
    pub budget: &'a mut Budget,
    /// Bytes that a bulk flow may send in this call.
    pub turn: u32,
    /// Bytes that may pass within the limits of the owner.
    pub allowance: Allowance,
}

/// What is to become of a flow's record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Fate {
    /// It lives on.
    Live,
    /// It lives on, and somebody is to look at the bytes that it holds back ([`Tcb::held`]).
    ///
    /// [`Tcb::held`]: crate::relay::tcp::Tcb::held
    Look,
    /// It is over, the socket is closed; the record goes.
    Closed,
    /// As `Closed`: the guest knew nothing of an open connection any more, and perhaps nothing of others.
    Forgotten,
    /// The connect failed in a way that ICMP tells: the record goes, and the guest is to get a destination
    /// unreachable that quotes its SYN.
    Unreachable {
        /// Why ([`SockError::TimedOut`], [`SockError::HostUnreachable`], [`SockError::NetUnreachable`],
        /// [`SockError::Prohibited`]).
        error: SockError,
        /// Sequence number of the guest's SYN, for the quote.
        seq: u32,
    },
    /// The record goes, and the SYN that was handed in opens a new flow (RFC 1122 4.2.2.13).
    Reopen,
}

/// What is known of both ends of a flow. It exists once the flow was silent for a while.
#[derive(Debug, Default)]
pub(super) struct KeepAlive {
    /// When the segments of the peer were counted last, and how many there were.
    pub(super) looked_at: Time,
    pub(super) segments_in: u32,
    /// Interval to the next count.
    pub(super) look_ms: u32,
    /// When the guest was probed last, and when it answered last.
    pub(super) probed_at: Time,
    pub(super) heard_at: Time,
    /// Probes of the guest that are not answered.
    pub(super) probes: u8,
    /// The peer sends probes.
    pub(super) peer_probes: bool,
    /// The guest probes: when the peer's answer is looked for next, how often it was, whether one is still owed, and
    /// the count of segments before.
    pub(super) answer_at: Option<Time>,
    pub(super) answer_looks: u8,
    pub(super) unanswered: bool,
    pub(super) answer_from: u32,
    /// The guest has forgotten the flow, and something of it still waits for the socket.
    pub(super) guest_gone: bool,
}

/// What a flow sends before its socket's memory is measured for the first time.
const FIRST_SAMPLE: u64 = 8 << 10;

/// What is known of the kernel's memory behind one flow, see `relay::socket_memory`.
#[derive(Debug)]
pub(crate) struct SocketMemory {
    /// Bytes, as measured last.
    pub held: u32,
    /// The kernel takes a few kilobytes at most.
    pub tight: bool,
    /// Nothing has come to it since it was measured.
    pub settled: bool,
    /// It is measured again when the guest has sent so many bytes.
    pub sample_at: u64,
}

impl Default for SocketMemory {
    fn default() -> Self {
        SocketMemory { held: 0, tight: false, settled: true, sample_at: FIRST_SAMPLE }
    }
}
