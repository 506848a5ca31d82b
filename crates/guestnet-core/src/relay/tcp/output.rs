//! Theory of operation: every frame of the relay is made here, on the stack, and handed to the port. Data is
//! peeked from the socket at the offset of the first byte not sent and goes out as one frame of up to
//! `gso_max` bytes, cut into segments by whoever takes it. A port that is full ends sending until it has
//! room. The window offered is decided here too: it never moves back, and moves on only in steps worth a
//! segment (RFC 9293 3.8.6.2.2).

use crate::interface::effects::{Effects, Peek, TxError};
use crate::interface::stats::DropReason;
use crate::interface::types::{Csum, FrameMeta, Gso, Time};
use crate::relay::tcp::seq::Seq;
use crate::relay::tcp::timers::PATIENT;
use crate::relay::tcp::{Ctx, FLOW_BUFFER, Fate, Path, RCV_SHIFT, State, Tcb};
use crate::relay::turns::TURN_SHORT;
use crate::util::account::{count, count_bytes};
use guestnet_wire::frame::{FrameHeader, IpHeader};
use guestnet_wire::tcp::{MIN_LEN, Options, SackBlocks, Tcp, flags};
use guestnet_wire::{checksum, frame, ipv4, ipv6, proto, put};
use std::num::NonZeroU64;

/// Offset of the checksum in the TCP header.
const SUM_AT: usize = 16;
/// Ethernet, IPv6 and TCP with all options that fit; most are sent with SACK blocks.
const HEADER_MAX: usize = frame::HEADER_MAX + MIN_LEN + 40;
/// TTL and hop limit of what the relay says for the other side (RFC 1122 3.2.1.7).
const TTL: u8 = 64;
/// Bytes of the timestamp option with its padding.
const TS_LEN: u16 = 12;
/// SACK blocks that fit beside the timestamps, and without them.
const SACK_WITH_TS: usize = 3;
const SACK_ALONE: usize = 4;
/// Challenges per flow and second (RFC 5961 7 and 10).
const CHALLENGES_MAX: u8 = 10;
/// Window that a flow with nothing buffered may always offer: the socket, not the buffer, is to take it.
const WINDOW_MIN: u32 = 16384;
/// The largest payload that fits an IP packet with all headers.
const PAYLOAD_MAX: u32 = 65535 - (ipv6::LEN + MIN_LEN + 24) as u32;

struct Header {
    bytes: [u8; HEADER_MAX],
    len: usize,
    l4: usize,
}

impl Header {
    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or(&[])
    }
}

pub(super) fn ip_overhead(path: &Path) -> u16 {
    if path.guest.is_ipv4() { (ipv4::MIN_LEN + MIN_LEN) as u16 } else { (ipv6::LEN + MIN_LEN) as u16 }
}

/// Headers of one frame; the checksum field holds the pseudo-header's sum alone.
fn header(path: &Path, tcp: &Tcp, options: &Options, payload: usize) -> Header {
    let mut bytes = [0u8; HEADER_MAX];
    let (src, dst) = (path.remote.ip(), path.guest.ip());
    // An atomic datagram needs no identification (RFC 6864 4.1).
    let ip = IpHeader { src, dst, proto: proto::TCP, ttl: TTL, tos: 0, id: 0, frag: ipv4::DF };
    let frame = FrameHeader { dst: path.guest_mac, src: path.gateway_mac, ip };
    let l4 = frame.len();
    let n = tcp.emit(options, bytes.get_mut(l4..).unwrap_or(&mut []));
    let l4_len = n.saturating_add(payload);
    frame.emit(&mut bytes, l4_len);
    let sum = checksum::fold(checksum::pseudo(src, dst, proto::TCP, l4_len as u32));
    put(&mut bytes, l4.saturating_add(SUM_AT), &sum.to_be_bytes());
    Header { bytes, len: l4.saturating_add(n), l4 }
}

impl Tcb {
    /// Payload bytes of one segment to the guest: its MSS or the path's MTU, less our options (RFC 6691).
    pub(super) fn segment_size(&self, path: &Path) -> u16 {
        let mss = self.mss.min(path.mtu.saturating_sub(ip_overhead(path)));
        mss.saturating_sub(if self.ts_on { TS_LEN } else { 0 }).max(8)
    }

    fn ts_clock(&self, now: Time) -> u32 {
        Self::ts_clock_at(self.iss, now).0
    }

    /// The timestamp clock. Timestamps lie on a circle, as sequence numbers do.
    pub(super) fn ts_clock_at(iss: Seq, at: Time) -> Seq {
        // Offset by the ISN, so that the machine's uptime is nobody's business.
        iss.plus(at.as_ms() as u32)
    }

    fn tcp(&self, path: &Path, seq: Seq, flags: u8, window: u16) -> Tcp {
        Tcp {
            src_port: path.remote.port(),
            dst_port: path.guest.port(),
            seq: seq.0,
            ack: if flags & flags::ACK != 0 { self.rcv_nxt.0 } else { 0 },
            flags,
            window,
            ..Tcp::default()
        }
    }

    fn options(&self, now: Time) -> Options {
        let timestamps = self.ts_on.then(|| (self.ts_clock(now), self.ts_recent));
        Options { timestamps, ..Options::default() }
    }

    /// Sends a frame without payload. False when the port was full, or the guest is not found yet.
    fn transmit<E: Effects>(&mut self, cx: &mut Ctx<'_, E>, tcp: &Tcp, options: &Options) -> bool {
        if !cx.path.guest_mac.is_unicast() {
            return false;
        }
        let mut h = header(cx.path, tcp, options, 0);
        let sum = checksum::finish(checksum::sum(h.bytes().get(h.l4..).unwrap_or(&[]), 0));
        put(&mut h.bytes, h.l4.saturating_add(SUM_AT), &sum.to_be_bytes());
        let sent = cx.fx.transmit(cx.path.port, h.bytes(), FrameMeta::default());
        self.sent(cx, sent, h.len)
    }

    fn sent<E: Effects>(&mut self, cx: &mut Ctx<'_, E>, result: Result<(), TxError>, len: usize) -> bool {
        match result {
            Ok(()) => {
                count(&mut cx.counters.tx_frames);
                count_bytes(&mut cx.counters.tx_bytes, len);
                true
            }
            Err(TxError::Full) => {
                self.waits_port = true;
                false
            }
            // The port goes, and core ends its flows.
            Err(TxError::Gone) => {
                cx.counters.drop(DropReason::NoEndpoint);
                false
            }
        }
    }

    /// A frame with our ACK went out.
    fn acked(&mut self) {
        self.ack_pending = false;
        self.ack_now = false;
        self.ack_at = None;
        self.thinned = false;
        self.repeated_len = 0;
        self.last_ack = self.rcv_nxt;
    }

    /// SYN, or SYN-ACK where the guest's SYN is known.
    pub(super) fn send_syn<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) {
        let answer = self.state == State::SynReceived;
        let window = if answer { self.offer(cx, true) } else { 65535 };
        let clock = self.ts_clock(cx.now);
        let options = Options {
            mss: Some(cx.path.mtu.saturating_sub(ip_overhead(cx.path)).max(1)),
            wscale: (!answer || self.rcv_shift > 0).then_some(RCV_SHIFT),
            sack_permitted: !answer || self.sack_on,
            timestamps: (!answer || self.ts_on).then_some((clock, if answer { self.ts_recent } else { 0 })),
            ..Options::default()
        };
        let flags = if answer { flags::SYN | flags::ACK } else { flags::SYN };
        let tcp = self.tcp(cx.path, self.iss, flags, window);
        let measured = self.retries == 0 && self.rtt_from.is_none();
        self.rtt_from = NonZeroU64::new(cx.now.0).filter(|_| measured);
        self.rtt_seq = self.iss.plus(1);
        if self.transmit(cx, &tcp, &options) && answer {
            self.acked();
        }
    }

    /// The sequence number of an ACK alone: the next one never sent, unless the guest took back its window.
    /// Beyond its window it would not look at the ACK, and two sides that do not look at each other's ACKs
    /// are stuck.
    fn ack_seq(&self) -> Seq {
        match self.state {
            State::Open => self.snd_una.plus(self.snd_wnd).min_of(self.snd_max),
            _ => self.snd_max,
        }
    }

    /// An ACK alone.
    pub(super) fn send_ack<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) {
        let window = self.offer(cx, false);
        let tcp = self.tcp(cx.path, self.ack_seq(), flags::ACK, window);
        let mut options = self.options(cx.now);
        if self.sack_on && (self.repeated_len > 0 || self.buffer.is_some()) {
            options.sack = self.sack_blocks();
        }
        self.ack_now = true;
        if self.transmit(cx, &tcp, &options) {
            self.acked();
        }
    }

    /// What an ACK says of bytes beside those in order: first what arrived twice (RFC 2883), then what is ahead of
    /// order, the latest first (RFC 2018 4). Data carries no blocks; what it answers had its ACK.
    #[cold]
    fn sack_blocks(&self) -> SackBlocks {
        let mut blocks = SackBlocks::default();
        if self.repeated_len > 0 {
            blocks.push(self.repeated.0, self.repeated.plus(u32::from(self.repeated_len)).0);
        }
        let most = if self.ts_on { SACK_WITH_TS } else { SACK_ALONE };
        if let Some(b) = &self.buffer {
            b.report(&mut blocks, most);
        }
        blocks
    }

    /// An ACK that says where we are, to one who may be guessing; limited per second.
    pub(super) fn challenge<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) {
        let second = (cx.now.as_ms() / 1000) as u16;
        if second != self.challenge_second {
            (self.challenge_second, self.challenges) = (second, 0);
        }
        if self.challenges < CHALLENGES_MAX {
            self.challenges = self.challenges.saturating_add(1);
            self.send_ack(cx);
        } else {
            cx.counters.drop(DropReason::RateLimit);
        }
    }

    /// Asks the guest for its window: a segment just before the window, which every stack answers with an
    /// ACK (RFC 9293 3.10.7.4) and which needs no bookkeeping, unlike a probe with a byte of data.
    pub(super) fn send_probe<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) {
        let window = self.offer(cx, false);
        let tcp = self.tcp(cx.path, self.snd_una.minus(1), flags::ACK, window);
        let options = self.options(cx.now);
        if self.transmit(cx, &tcp, &options) {
            self.acked();
        }
    }

    /// Resets the guest's side.
    pub(super) fn send_rst<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) {
        let (seq, flags) = match self.state {
            State::Connecting => (Seq(0), flags::RST | flags::ACK),
            State::SynSent => (self.snd_max, flags::RST),
            _ => (self.snd_max, flags::RST | flags::ACK),
        };
        let tcp = self.tcp(cx.path, seq, flags, 0);
        self.transmit(cx, &tcp, &Options::default());
    }

    /// Answers an ACK of something never sent (RFC 9293 3.10.7.3 and .4).
    pub(super) fn send_rst_at<E: Effects>(&mut self, cx: &mut Ctx<'_, E>, seq: u32) {
        let tcp = self.tcp(cx.path, Seq(seq), flags::RST, 0);
        self.transmit(cx, &tcp, &Options::default());
    }

    pub(super) fn window_max(&self) -> u32 {
        FLOW_BUFFER.min(65535 << self.rcv_shift).min(self.window_most)
    }

    /// Bytes that the relay can take now, counted from `rcv_nxt`.
    fn room(&self, free: usize) -> u32 {
        match &self.buffer {
            Some(b) if !b.is_direct() => {
                u32::try_from(b.room(self.window_max() as usize, free)).unwrap_or(u32::MAX)
            }
            _ => self.window_max().min(u32::try_from(free).unwrap_or(u32::MAX).max(WINDOW_MIN)),
        }
    }

    /// The right edge that could be offered, when it is worth it.
    fn new_edge(&self, free: usize, path: &Path) -> Option<Seq> {
        let edge = self.rcv_nxt.plus(self.room(free));
        let step = (self.window_max() / 2).min(2 * u32::from(self.segment_size(path)));
        (self.rcv_adv.lt(edge) && edge.since(self.rcv_adv) >= step).then_some(edge)
    }

    /// True when room came back that the guest must be told of.
    pub(super) fn window_reopened(&self, budget: &crate::relay::tcp::Budget, path: &Path) -> bool {
        !self.guest_fin && self.new_edge(budget.free(), path).is_some()
    }

    /// The window field of the next segment, and the promise that it makes. Rounded up to the scale, so that
    /// the edge does not move back by a remainder, as long as the buffer has a little more than it promises;
    /// else down, and what was promised before is still taken.
    fn offer<E: Effects>(&mut self, cx: &Ctx<'_, E>, syn: bool) -> u16 {
        let free = cx.budget.free();
        if let Some(edge) = self.new_edge(free, cx.path) {
            self.rcv_adv = if syn { self.rcv_adv.max(edge.min_of(self.rcv_nxt.plus(65535))) } else { edge };
        }
        let window = self.rcv_adv.since(self.rcv_nxt);
        let shift = if syn { 0 } else { self.rcv_shift };
        let hard = match &self.buffer {
            Some(b) if !b.is_direct() => b.limit_left(free),
            _ => usize::MAX,
        };
        let up = window.div_ceil(1 << shift);
        let field = if (up as usize) << shift <= hard { up } else { window >> shift };
        let field = u16::try_from(field).unwrap_or(u16::MAX);
        self.rcv_adv = self.rcv_adv.max(self.rcv_nxt.plus(u32::from(field) << shift));
        field
    }

    /// Sends as much as socket, window, loss control and port allow: first what is lost, then what is new.
    pub(super) fn push<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> Result<(), Fate> {
        let mss = u32::from(self.segment_size(cx.path));
        let limit = cx.path.gso_max.min(PAYLOAD_MAX).max(mss);
        let turn = if self.is_bulk(cx.now) { cx.turn } else { TURN_SHORT };
        self.bulk &= !1;
        let mut sent = 0;
        while !self.waits_port {
            if sent >= turn {
                self.wait_for_turn();
                return Ok(());
            }
            let mut next = (self.snd_max, u32::MAX);
            if self.recovery.is_some()
                && let Some(lost) = self.first_lost()
            {
                next = lost;
            } else if self.fin_sent || !self.readable {
                return Ok(());
            }
            let (from, most) = next;
            if !self.may_go_down(cx) {
                return Ok(());
            }
            let flight = self.in_flight();
            let window = self.snd_wnd.saturating_sub(from.since(self.snd_una));
            let usable = window.min(self.cwnd.saturating_sub(flight));
            if usable == 0 {
                return if self.snd_wnd == 0 && flight == 0 { self.window_closed(cx) } else { Ok(()) };
            }
            if flight > 0 && usable < mss.min(most) && usable < self.max_wnd / 2 {
                // Silly-window avoidance (RFC 9293 3.8.6.2.1): an ACK is to come, and more room with it.
                return Ok(());
            }
            let room = cx.fx.port_room(cx.path.port);
            if room == 0 {
                self.waits_port = true;
                return Ok(());
            }
            let room = u32::try_from(room.saturating_sub(HEADER_MAX)).unwrap_or(u32::MAX).max(mss);
            let mut want = usable.min(limit).min(room).min(most).min(cx.allowance.down);
            if want > mss && want < most {
                want = want.saturating_sub(want.checked_rem(mss).unwrap_or(0));
            }
            if most != u32::MAX {
                if !self.resend(cx, from, want)? {
                    return Ok(());
                }
                sent = sent.saturating_add(want);
                continue;
            }
            let peek = self.peek(cx, from, want)?;
            match peek {
                Peek::Data(n) | Peek::Last(n) => {
                    let n = u32::try_from(n).unwrap_or(u32::MAX).min(want);
                    if n < want && !self.hangup {
                        self.readable = false;
                    }
                    let end = if matches!(peek, Peek::Last(_)) && !self.has_words() {
                        flags::FIN | flags::PSH
                    } else if n < want {
                        flags::PSH
                    } else {
                        0
                    };
                    if n == 0 || !self.send_data(cx, from, n, mss, end) {
                        return Ok(());
                    }
                    sent = sent.saturating_add(n);
                    if sent >= TURN_SHORT {
                        self.moves_bulk(cx.now);
                    }
                }
                Peek::Urgent => {
                    if !self.send_data(cx, from, 1, mss, flags::URG | flags::PSH) {
                        return Ok(());
                    }
                    sent = sent.saturating_add(1);
                }
                Peek::Empty => {
                    (self.readable, self.hangup) = (false, false);
                    return Ok(());
                }
                Peek::Eof if self.has_words() => return self.say_words(cx),
                Peek::Eof => {
                    self.send_fin(cx, from);
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// The guest's window is closed and nothing is in flight: with data waiting the persist timer runs; an
    /// end of data needs no window.
    fn window_closed<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> Result<(), Fate> {
        if self.snd_una != self.snd_max {
            self.arm_if_off(cx.now);
            return Ok(());
        }
        match self.peek(cx, self.snd_max, 1)? {
            Peek::Data(_) | Peek::Last(_) | Peek::Urgent => self.arm_if_off(cx.now),
            Peek::Empty => self.readable = false,
            Peek::Eof if self.has_words() => {}
            Peek::Eof => self.send_fin(cx, self.snd_max),
        }
        Ok(())
    }

    /// Sends the first `n` peeked bytes at `from`, with the flags `end` on the last of them. False when the port
    /// did not take them.
    pub(super) fn send_data<E: Effects>(
        &mut self,
        cx: &mut Ctx<'_, E>,
        from: Seq,
        n: u32,
        mss: u32,
        end: u8,
    ) -> bool {
        let window = self.offer(cx, false);
        let mut tcp = self.tcp(cx.path, from, flags::ACK | end, window);
        // It points behind the urgent byte (RFC 6093 section 4: as all stacks do), which is the last.
        tcp.urgent = if end & flags::URG != 0 { n as u16 } else { 0 };
        let h = header(cx.path, &tcp, &self.options(cx.now), n as usize);
        let meta = FrameMeta {
            csum: Csum::Partial { start: h.l4 as u16, offset: SUM_AT as u16 },
            gso: (n > mss).then_some(Gso::Tcp(mss as u16)),
        };
        let sent = cx.fx.transmit_peeked(cx.path.port, h.bytes(), 0..n as usize, meta);
        if !self.sent(cx, sent, h.len.saturating_add(n as usize)) {
            // What was read must be asked for again when the port has room.
            self.readable = true;
            return false;
        }
        self.acked();
        if std::mem::take(&mut self.heard) {
            self.patience = self.patience.saturating_add(1).min(PATIENT);
        }
        let fin = end & flags::FIN != 0;
        self.fin_sent |= fin;
        self.last_seen = cx.now;
        self.put_in_flight(cx, from, n.saturating_add(u32::from(fin)));
        Tcb::went_down(cx, n);
        true
    }

    /// `len` sequence numbers from `from` on went out, for the first time or again.
    #[inline]
    fn put_in_flight<E: Effects>(&mut self, cx: &mut Ctx<'_, E>, from: Seq, len: u32) {
        if from != self.snd_max {
            count(&mut cx.counters.retransmits);
            return self.count_again(cx.now, from, len);
        }
        self.snd_max = from.plus(len);
        if self.rtt_from.is_none() {
            (self.rtt_from, self.rtt_seq) = (NonZeroU64::new(cx.now.0), self.snd_max);
        }
        if self.recovery.is_some() {
            self.count_new(len);
        }
        self.arm_if_off(cx.now);
    }

    /// Sends FIN at `from`, for the first time or again.
    fn send_fin<E: Effects>(&mut self, cx: &mut Ctx<'_, E>, from: Seq) {
        let window = self.offer(cx, false);
        let tcp = self.tcp(cx.path, from, flags::FIN | flags::ACK, window);
        let options = self.options(cx.now);
        if !self.transmit(cx, &tcp, &options) {
            return;
        }
        self.acked();
        self.fin_sent = true;
        self.put_in_flight(cx, from, 1);
    }

    /// Sends `len` sequence numbers from `from` on again, the FIN where it is among them. False when they could
    /// not all be sent.
    #[cold]
    pub(super) fn resend<E: Effects>(
        &mut self,
        cx: &mut Ctx<'_, E>,
        from: Seq,
        len: u32,
    ) -> Result<bool, Fate> {
        let fin = self.fin_sent && from.plus(len) == self.snd_max;
        let data = len.saturating_sub(u32::from(fin));
        let before = cx.counters.retransmits;
        if data == 0 {
            if fin {
                self.send_fin(cx, from);
            }
            return Ok(cx.counters.retransmits > before);
        }
        let mss = u32::from(self.segment_size(cx.path));
        Ok(match self.peek(cx, from, data)? {
            Peek::Data(n) | Peek::Last(n) => {
                let n = u32::try_from(n).unwrap_or(u32::MAX).min(data);
                let end = if fin && n == data { flags::FIN | flags::PSH } else { 0 };
                n > 0 && self.send_data(cx, from, n, mss, end) && n == data
            }
            Peek::Urgent => self.send_data(cx, from, 1, mss, flags::URG | flags::PSH) && data == 1,
            Peek::Empty | Peek::Eof => false,
        })
    }
}
