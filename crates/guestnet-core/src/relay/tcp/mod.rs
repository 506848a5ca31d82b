//! Theory of operation: a relay between a guest's TCP and a host socket, as a state machine without I/O.
//! Towards the guest it speaks TCP itself (RFC 9293, 7323, 5961, 6298; the link is local, so
//! sending starts at full speed and only loss makes it careful); towards the outside it uses a socket.
//!
//! Guest to host: payload goes to the socket straight from the frame. What the socket does not take waits in
//! a [`buffer`] that exists only then, and the window offered is what that buffer can still take. The ACK
//! goes out once per batch ([`Tcb::batch_end`]), at once where the guest counts duplicates. In a conversation
//! of questions and answers it waits a moment for the answer to carry it ([`timers`]), in a long upload for
//! more to acknowledge ([`ack_thinning`]).
//!
//! Host to guest: bytes stay in the kernel's socket until the guest acknowledged them. [`output`] peeks at
//! the offset of the first byte not yet sent and sends one large segment; an ACK discards from the front.
//! So a retransmission is another peek, and there is no send buffer. What is lost is found and sent again as
//! [`recovery`] says; before the first loss a flow has no state for it.
//!
//! Each entry point returns a [`Fate`]. Unless it is [`Fate::Live`], the socket was closed and the buffer's
//! bytes were given back, and the record must go. Files: [`input`] (segments), [`output`] (frames),
//! [`timers`] (retransmission, idle), [`keepalive`] (are both ends there), [`limits`] (limits of the owner), [`recovery`] with [`scoreboard`] and
//! [`cubic`] (loss towards the guest), [`host`] (the socket's side), [`buffer`] (what waits for the socket), [`hold`] (what
//! waits until somebody has looked at it), [`seq`], [`types`] (what callers hand in and get back).

mod ack_thinning;
mod buffer;
mod cubic;
mod hold;
mod host;
mod input;
mod keepalive;
mod limits;
mod output;
mod recovery;
mod scoreboard;
mod seq;
mod timers;
mod types;

pub use hold::Held;
pub use types::{Budget, Ctx, FLOW_BUFFER, Fate, Path, Timeouts};
use types::{KeepAlive, MAX_FLIGHT, RCV_SHIFT, SocketMemory};

use crate::interface::effects::{Close, Effects, SockError};
use crate::interface::types::{FlowId, SockId, Time};
use crate::relay::turns::BULK;
use crate::util::account::count;
use buffer::Buffer;
use guestnet_wire::tcp::{Options, Tcp};
use recovery::Recovery;
use seq::Seq;
use std::num::NonZeroU64;

/// Segment size where the guest names none (RFC 9293 3.7.1).
const DEFAULT_MSS: u16 = 536;
/// The smallest segment size that a guest is believed: below, it would make us send a packet per few bytes.
/// The path's MTU may still force smaller segments.
const MIN_MSS: u16 = 64;

/// DSCP in the type of service; ECN is between neighbours in TCP, so the kernel's (RFC 3168 6.1).
const DSCP: u8 = 0xfc;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The host's connect is under way; the guest has heard nothing.
    Connecting,
    /// Our SYN is on its way to the guest.
    SynSent,
    /// Our SYN-ACK is on its way.
    SynReceived,
    /// Open in at least one direction. Which, the FIN flags say.
    Open,
    /// Both directions closed; a late FIN is still answered.
    TimeWait,
}

/// The state of one relayed TCP connection.
#[derive(Debug)]
pub struct Tcb {
    flow: FlowId,
    sock: SockId,
    state: State,
    // ---- guest to host
    /// Next byte expected.
    rcv_nxt: Seq,
    /// Right edge of the window that was offered.
    rcv_adv: Seq,
    /// `rcv_nxt` as of the last ACK that was sent.
    last_ack: Seq,
    buffer: Option<Box<Buffer>>,
    /// Bytes that arrived twice, for the next ACK to say so (RFC 2883): from where, and how many.
    repeated: Seq,
    repeated_len: u16,
    // ---- host to guest
    iss: Seq,
    /// First byte not acknowledged.
    snd_una: Seq,
    /// First byte never sent.
    snd_max: Seq,
    snd_wl1: Seq,
    snd_wl2: Seq,
    snd_wnd: u32,
    /// Largest window seen.
    max_wnd: u32,
    cwnd: u32,
    /// What is lost and how the window comes back; `None` while nothing was ever lost.
    recovery: Option<Box<Recovery>>,
    /// Acknowledged, but not yet discarded from the socket (done once per batch).
    undiscarded: u32,
    mss: u16,
    ip_id: u16,
    dscp: u8,
    snd_shift: u8,
    rcv_shift: u8,
    dup_acks: u8,
    retries: u8,
    challenges: u8,
    // ---- timestamps
    ts_on: bool,
    ts_recent: u32,
    // ---- times
    timeouts: Timeouts,
    last_seen: Time,
    retry_at: Option<Time>,
    /// When the segment that is measured left, in nanoseconds.
    rtt_from: Option<NonZeroU64>,
    rtt_seq: Seq,
    srtt_us: u32,
    rttvar_us: u32,
    rto_ms: u32,
    challenge_second: u16,
    /// When the ACK that waits for an answer goes out alone.
    ack_at: Option<Time>,
    /// Rises with each answer that follows a question; from [`timers::PATIENT`] on ACKs wait.
    patience: i8,
    /// Bytes of a bulk transfer that go without an ACK, below [`ack_thinning::LEAST`] none; and where that grows slowly.
    ack_every: u32,
    ack_slowly: u32,
    // ---- flags
    /// `ack_at` waits for more data, not for an answer.
    thinned: bool,
    /// The last data of the guest had PSH.
    pushed: bool,
    /// The socket is ours to close.
    sock_open: bool,
    /// The socket may have something to read.
    readable: bool,
    /// A hang-up was signalled: peek until the end is seen.
    hangup: bool,
    /// SHUT_WR was done.
    shut: bool,
    /// The guest's FIN was received in sequence.
    guest_fin: bool,
    /// Our FIN was sent; `snd_max` is one past it.
    fin_sent: bool,
    fin_acked: bool,
    /// We closed first or both at once, so we keep TIME-WAIT.
    keeps_time_wait: bool,
    ack_pending: bool,
    ack_now: bool,
    /// Both sides speak SACK.
    sack_on: bool,
    /// Segments to the guest were seen to overtake each other.
    reordered: bool,
    /// `retry_at` is for a tail loss probe.
    probing: bool,
    /// The guest said something since we last did.
    heard: bool,
    wants_batch: bool,
    waits_port: bool,
    /// Which ways a limit has stopped it, and in which queues it waits ([`limits`]).
    throttle: u8,
    /// The largest window to offer.
    window_most: u32,
    // ---- both ends
    keep: Option<Box<KeepAlive>>,
    // ---- turns
    /// It counts as a bulk flow until then, in milliseconds (31 bits, wraps around), and while it waits for its
    /// turn: the lowest bit.
    bulk: u32,
    // ---- totals
    bytes_out: u64,
    bytes_in: u64,
    /// The kernel's memory behind it.
    pub(crate) memory: SocketMemory,
}

impl Tcb {
    fn new(flow: FlowId, sock: SockId, state: State, isn: u32, timeouts: Timeouts, now: Time) -> Tcb {
        let iss = Seq(isn);
        let zero = Seq(0);
        Tcb {
            flow,
            sock,
            state,
            rcv_nxt: zero,
            rcv_adv: zero,
            last_ack: zero,
            buffer: None,
            repeated: zero,
            repeated_len: 0,
            iss,
            snd_una: iss,
            snd_max: iss,
            snd_wl1: zero,
            snd_wl2: iss,
            snd_wnd: 0,
            max_wnd: 0,
            cwnd: MAX_FLIGHT,
            recovery: None,
            undiscarded: 0,
            mss: DEFAULT_MSS,
            ip_id: 0,
            dscp: 0,
            snd_shift: 0,
            rcv_shift: 0,
            dup_acks: 0,
            retries: 0,
            challenges: 0,
            ts_on: false,
            ts_recent: 0,
            timeouts,
            last_seen: now,
            retry_at: None,
            rtt_from: None,
            rtt_seq: iss,
            srtt_us: 0,
            rttvar_us: 0,
            rto_ms: timers::RTO_INITIAL_MS,
            challenge_second: 0,
            ack_at: None,
            patience: timers::PATIENT,
            ack_every: 0,
            ack_slowly: ack_thinning::MOST,
            thinned: false,
            pushed: false,
            sock_open: true,
            readable: true,
            hangup: false,
            shut: false,
            guest_fin: false,
            fin_sent: false,
            fin_acked: false,
            keeps_time_wait: false,
            ack_pending: false,
            ack_now: false,
            sack_on: false,
            reordered: false,
            probing: false,
            heard: false,
            wants_batch: false,
            waits_port: false,
            throttle: 0,
            window_most: u32::MAX,
            keep: None,
            bulk: (now.as_ms() as u32) << 1,
            bytes_out: 0,
            bytes_in: 0,
            memory: SocketMemory::default(),
        }
    }

    /// A flow that the guest opens: its SYN (`syn`, `options`) arrived and the connect of `sock` is under
    /// way. Payload of the SYN is not taken; the guest sends it again, as RFC 9293 3.10.7.2 allows.
    #[must_use]
    pub fn outbound(
        flow: FlowId,
        sock: SockId,
        syn: &Tcp,
        options: &Options,
        isn: u32,
        timeouts: Timeouts,
        now: Time,
    ) -> Tcb {
        let mut t = Tcb::new(flow, sock, State::Connecting, isn, timeouts, now);
        t.take_syn(syn, options);
        t
    }

    /// With what the IP header of the SYN said: its identification, for the quotation in an ICMP error, and its
    /// type of service, which the socket has already.
    #[must_use]
    pub fn with_ip(mut self, id: u16, tos: u8) -> Tcb {
        (self.ip_id, self.dscp) = (id, tos & DSCP);
        self
    }

    /// True when the socket has, or may have, something that the guest did not take yet, or does not take something
    /// of the guest.
    pub(crate) fn holds_data(&self) -> bool {
        self.sock_open
            && self.state != State::Connecting
            && (self.readable || self.snd_una != self.snd_max || self.waiting() > 0)
    }

    /// True when the socket's memory is to be measured now, of a port that has `many` flows.
    #[inline]
    pub(crate) fn wants_measure(&self, many: bool) -> bool {
        let m = &self.memory;
        many && (self.bytes_out >= m.sample_at || m.held == 0 && self.waiting() > 0)
            || m.held > 0 && !m.settled && !self.holds_data()
    }

    /// Notes what the socket holds; gives what it held before.
    pub(crate) fn note_memory(&mut self, held: u32) -> u32 {
        let settled = !self.holds_data();
        let m = &mut self.memory;
        m.settled = settled;
        // Where nothing can be measured, it is not tried again and again.
        m.sample_at = m.sample_at.max(self.bytes_out.saturating_mul(2));
        std::mem::replace(&mut m.held, held)
    }

    /// The guest marks its packets from now on otherwise, and so does the socket.
    #[inline]
    pub fn note_tos<E: Effects>(&mut self, cx: &mut Ctx<'_, E>, tos: u8) {
        if tos & DSCP != self.dscp && self.sock_open {
            self.dscp = tos & DSCP;
            cx.fx.tcp_tos(self.sock, self.dscp);
        }
    }

    /// The identification of the packet that carried the guest's SYN.
    #[must_use]
    pub fn ip_id(&self) -> u16 {
        self.ip_id
    }

    /// While the host's connect is under way, the sequence number of the guest's SYN.
    #[must_use]
    pub fn connecting(&self) -> Option<u32> {
        (self.state == State::Connecting).then_some(self.rcv_nxt.minus(1).0)
    }

    /// A flow that the outside opens: `sock` was accepted. [`Tcb::start`] sends the SYN.
    #[must_use]
    pub fn inbound(flow: FlowId, sock: SockId, isn: u32, timeouts: Timeouts, now: Time) -> Tcb {
        Tcb::new(flow, sock, State::SynSent, isn, timeouts, now)
    }

    /// Sends the SYN of an inbound flow and starts its timer. To be called once the guest's MAC is known.
    pub fn start<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> Fate {
        if self.state == State::SynSent {
            self.snd_max = self.iss.plus(1);
            self.send_syn(cx);
            self.arm(cx.now);
        }
        Fate::Live
    }

    /// The outcome of the host's connect. In any other state an error says that the socket is of no use, and
    /// that nobody will hear of it again.
    pub fn connected<E: Effects>(&mut self, cx: &mut Ctx<'_, E>, result: Result<(), SockError>) -> Fate {
        if self.state != State::Connecting {
            if result.is_ok() || !self.sock_open {
                return Fate::Live;
            }
            self.abort(cx);
            return Fate::Closed;
        }
        match result {
            Ok(()) => {
                self.state = State::SynReceived;
                self.last_seen = cx.now;
                self.snd_max = self.iss.plus(1);
                self.send_syn(cx);
                self.arm(cx.now);
                Fate::Live
            }
            Err(
                error @ (SockError::NetUnreachable
                | SockError::HostUnreachable
                | SockError::TimedOut
                | SockError::Prohibited),
            ) => {
                self.finish(cx, Close::Reset);
                Fate::Unreachable { error, seq: self.rcv_nxt.minus(1).0 }
            }
            Err(_) => {
                self.abort(cx);
                Fate::Closed
            }
        }
    }

    /// A segment of the guest for this flow. `payload` is what follows its header.
    pub fn segment<E: Effects>(
        &mut self,
        cx: &mut Ctx<'_, E>,
        seg: &Tcp,
        options: &Options,
        payload: &[u8],
    ) -> Fate {
        self.input(cx, seg, options, payload)
    }

    /// The socket became readable or writable (both on hang-up or error).
    pub fn ready<E: Effects>(&mut self, cx: &mut Ctx<'_, E>, readable: bool, writable: bool) -> Fate {
        if !self.sock_open {
            return Fate::Live;
        }
        self.readable |= readable;
        self.hangup |= readable && writable;
        match self.state {
            State::Connecting | State::TimeWait => Fate::Live,
            State::SynSent | State::SynReceived => {
                // Nothing is read yet, but a peer that has gone is seen.
                if readable && let Err(_gone) = cx.fx.tcp_peek(self.sock, 0, 1) {
                    self.abort(cx);
                    return Fate::Closed;
                }
                Fate::Live
            }
            State::Open => {
                if self.buffer.is_some()
                    && let Err(fate) = self.note_held_back(cx, readable)
                {
                    return fate;
                }
                if writable && let Err(fate) = self.drain(cx) {
                    return fate;
                }
                if self.is_bulk(cx.now) {
                    // It waits for its turn behind the bulk flows that asked before.
                    self.wait_for_turn();
                    return Fate::Live;
                }
                self.flush(cx)
            }
        }
    }

    /// The port takes frames again.
    pub fn port_writable<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> Fate {
        if !std::mem::take(&mut self.waits_port) {
            return Fate::Live;
        }
        match self.state {
            State::SynSent | State::SynReceived => self.send_syn(cx),
            State::Connecting => {}
            State::Open | State::TimeWait => {
                let fate = self.flush(cx);
                if fate == Fate::Live && self.snd_una != self.snd_max {
                    self.arm_if_off(cx.now);
                }
                return fate;
            }
        }
        Fate::Live
    }

    /// The end of a batch: what the batch's segments called for is sent. To be called when
    /// [`Tcb::wants_batch_end`] says so.
    pub fn batch_end<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> Fate {
        self.wants_batch = false;
        if self.buffer.is_some() && self.wants_look() {
            return Fate::Look;
        }
        self.flush(cx)
    }

    /// True when [`Tcb::batch_end`] is to be called at the end of this batch.
    #[must_use]
    pub fn wants_batch_end(&self) -> bool {
        self.wants_batch
    }

    /// True while the flow moves so much that others are not to wait for all of it.
    #[inline]
    pub(crate) fn is_bulk(&self, now: Time) -> bool {
        self.bulk & 1 != 0 || (self.bulk.wrapping_sub((now.as_ms() as u32) << 1) as i32) > 0
    }

    /// A bulk transfer goes on, either way.
    #[inline]
    pub(crate) fn moves_bulk(&mut self, now: Time) {
        self.bulk = (now.as_ms() as u32).wrapping_add(BULK) << 1 | self.bulk & 1;
    }

    /// Has [`Tcb::batch_end`] called when the bulk flows that asked before have had their turns.
    fn wait_for_turn(&mut self) {
        self.wants_batch = true;
        self.bulk |= 1;
    }

    /// True when something could not be sent because the port was full: [`Tcb::port_writable`] is due when
    /// it has room.
    #[must_use]
    pub fn waits_for_port(&self) -> bool {
        self.waits_port
    }

    /// The guest, or a router behind it, says that our segment at sequence number `seq` was larger than `mtu`
    /// bytes (RFC 1191 6.3). Believed only of what is in flight (RFC 5927 4.1); segments get smaller, and what
    /// is in flight is sent again.
    pub fn path_mtu<E: Effects>(&mut self, cx: &mut Ctx<'_, E>, mtu: u16, seq: u32) -> Fate {
        let seq = Seq(seq);
        if self.state != State::Open || !self.snd_una.le(seq) || !seq.lt(self.snd_max) {
            return Fate::Live;
        }
        let mss = mtu.saturating_sub(output::ip_overhead(cx.path)).max(MIN_MSS);
        if mss >= self.mss.min(cx.path.mtu.saturating_sub(output::ip_overhead(cx.path))) {
            return Fate::Live;
        }
        self.mss = mss;
        self.rewind();
        count(&mut cx.counters.retransmits);
        self.flush(cx)
    }

    /// True in TIME-WAIT: nothing is lost when the record goes.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.state == State::TimeWait
    }

    /// Ends the flow: a reset to both sides.
    pub fn abort<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) {
        if self.state != State::TimeWait {
            self.send_rst(cx);
        }
        self.finish(cx, Close::Reset);
    }

    /// Ends the flow without a word to the guest (its port is gone). What the guest ended itself is delivered;
    /// what it did not end must not look to the outside as if it had.
    pub fn discard<E: Effects>(&mut self, fx: &mut E, budget: &mut Budget) {
        self.release(fx, budget, if self.shut { Close::Graceful } else { Close::Reset });
    }

    /// Bytes of payload taken from the guest, and acknowledged by it.
    #[must_use]
    pub fn totals(&self) -> (u64, u64) {
        (self.bytes_out, self.bytes_in)
    }

    /// The flow's id.
    #[must_use]
    pub fn flow(&self) -> FlowId {
        self.flow
    }

    /// The host socket, as long as it is open.
    #[must_use]
    pub fn sock(&self) -> Option<SockId> {
        self.sock_open.then_some(self.sock)
    }

    /// Name of the state, as RFC 9293 3.3.2 calls it, seen from the guest's side of the relay. The guest's FIN
    /// counts when the outside has it too.
    #[must_use]
    pub fn state_name(&self) -> &'static str {
        match (self.state, self.guest_fin && self.shut, self.fin_sent, self.fin_acked) {
            (State::Connecting, ..) => "connecting",
            (State::SynSent, ..) => "syn_sent",
            (State::SynReceived, ..) => "syn_received",
            (State::TimeWait, ..) => "time_wait",
            (State::Open, false, false, _) => "established",
            (State::Open, true, false, _) => "close_wait",
            (State::Open, false, true, false) => "fin_wait_1",
            (State::Open, false, true, true) => "fin_wait_2",
            (State::Open, true, true, _) if self.keeps_time_wait => "closing",
            (State::Open, true, true, _) => "last_ack",
        }
    }

    /// What a SYN of the guest says of its side (RFC 9293 3.7.1, RFC 7323).
    fn take_syn(&mut self, syn: &Tcp, options: &Options) {
        self.rcv_nxt = Seq(syn.seq).plus(1);
        self.rcv_adv = self.rcv_nxt;
        self.last_ack = self.rcv_nxt;
        self.mss = options.mss.unwrap_or(DEFAULT_MSS).max(MIN_MSS);
        (self.snd_shift, self.rcv_shift) = match options.wscale {
            Some(shift) => (shift.min(14), RCV_SHIFT),
            None => (0, 0),
        };
        self.sack_on = options.sack_permitted;
        self.ts_on = options.timestamps.is_some();
        self.ts_recent = options.timestamps.map_or(0, |(value, _)| value);
        // The window of a SYN is never scaled (RFC 7323 2.2).
        self.snd_wnd = u32::from(syn.window);
        self.max_wnd = self.snd_wnd;
        self.snd_wl1 = Seq(syn.seq);
    }

    /// Sends what is due: new data or FIN, else the ACK alone.
    fn flush<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> Fate {
        if self.state == State::Open && !self.guest_is_gone() {
            if self.sock_open && self.undiscarded > 0 {
                cx.fx.tcp_discard(self.sock, self.undiscarded as usize);
                self.undiscarded = 0;
            }
            if let Err(fate) = self.push(cx) {
                return fate;
            }
        }
        let waits = |t: &mut Tcb| t.ack_may_wait(cx.now, cx.path) || t.ack_is_thinned(cx.now);
        if self.ack_now || self.ack_pending && !waits(self) {
            self.send_ack(cx);
        }
        Fate::Live
    }
}
