//! Theory of operation: what a segment of the guest does, in the order of RFC 9293 3.10.7: sequence number,
//! RST, SYN, ACK, payload, FIN; with the checks of RFC 5961 (blind resets and ACKs are answered by a challenge
//! and change nothing) and RFC 7323 (a segment with an old timestamp is a stray). Nothing is sent here but
//! what cannot wait for the end of the batch: duplicate ACKs, challenges, resets, fast retransmissions.

use crate::interface::effects::{Close, Effects};
use crate::interface::stats::DropReason;
use crate::relay::tcp::buffer::Buffer;
use crate::relay::tcp::recovery::Acknowledged;
use crate::relay::tcp::seq::Seq;
use crate::relay::tcp::timers::PATIENT;
use crate::relay::tcp::{Ctx, Fate, State, Tcb};
use crate::util::account::{count, count_bytes};
use guestnet_wire::tcp::{Options, Tcp, flags};

/// After this silence an old timestamp proves nothing (RFC 7323 5.5: 24 days). Nanoseconds.
const TS_VALID_NS: u64 = 24 * 86_400 * 1_000_000_000;

impl Tcb {
    pub(super) fn input<E: Effects>(
        &mut self,
        cx: &mut Ctx<'_, E>,
        seg: &Tcp,
        options: &Options,
        payload: &[u8],
    ) -> Fate {
        let done = match self.state {
            State::Connecting => self.input_connecting(cx, seg, options),
            State::SynSent => self.input_syn_sent(cx, seg, options),
            _ => self.input_synchronised(cx, seg, options, payload),
        };
        match done {
            Ok(()) => Fate::Live,
            Err(fate) => fate,
        }
    }

    /// The host's connect is under way: the guest can only repeat its SYN, replace it, or give up.
    fn input_connecting<E: Effects>(
        &mut self,
        cx: &mut Ctx<'_, E>,
        seg: &Tcp,
        options: &Options,
    ) -> Result<(), Fate> {
        let again = Seq(seg.seq).plus(1) == self.rcv_nxt;
        match seg.flags & (flags::SYN | flags::RST | flags::ACK) {
            flags::SYN if again => {}
            flags::SYN => self.take_syn(seg, options),
            f if f & flags::RST != 0 && Seq(seg.seq) == self.rcv_nxt => {
                self.finish(cx, Close::Reset);
                return Err(Fate::Closed);
            }
            _ => cx.counters.drop(DropReason::OutOfWindow),
        }
        Ok(())
    }

    fn input_syn_sent<E: Effects>(
        &mut self,
        cx: &mut Ctx<'_, E>,
        seg: &Tcp,
        options: &Options,
    ) -> Result<(), Fate> {
        let acks = seg.flags & flags::ACK != 0;
        let acks_syn = acks && Seq(seg.ack) == self.iss.plus(1);
        if acks && !acks_syn {
            cx.counters.drop(DropReason::OutOfWindow);
            if seg.flags & flags::RST == 0 {
                self.send_rst_at(cx, seg.ack);
            }
            return Ok(());
        }
        if seg.flags & flags::RST != 0 {
            if acks_syn {
                self.finish(cx, Close::Reset);
                return Err(Fate::Closed);
            }
            cx.counters.drop(DropReason::OutOfWindow);
            return Ok(());
        }
        if seg.flags & flags::SYN == 0 {
            cx.counters.drop(DropReason::OutOfWindow);
            return Ok(());
        }
        self.take_syn(seg, options);
        self.last_seen = cx.now;
        self.end_backoff();
        if acks_syn {
            self.snd_una = self.snd_max;
            self.snd_wl2 = self.snd_una;
            self.state = State::Open;
            self.retry_at = None;
            self.measure(cx.now);
            self.ack_pending = true;
            self.wants_batch = true;
        } else {
            // Both opened at once (RFC 9293 3.5): our SYN goes out again, with the ACK of the guest's.
            self.state = State::SynReceived;
            self.send_syn(cx);
            self.arm(cx.now);
        }
        Ok(())
    }

    fn input_synchronised<E: Effects>(
        &mut self,
        cx: &mut Ctx<'_, E>,
        seg: &Tcp,
        options: &Options,
        payload: &[u8],
    ) -> Result<(), Fate> {
        let mut seq = Seq(seg.seq);
        let mut syn = seg.flags & flags::SYN != 0;
        let rst = seg.flags & flags::RST != 0;
        let fin = seg.flags & flags::FIN != 0;
        let acks = seg.flags & flags::ACK != 0;
        if syn && !rst {
            let again = seq.plus(1) == self.rcv_nxt;
            match self.state {
                State::SynReceived if again && !acks => {
                    // The guest did not get our SYN-ACK.
                    count(&mut cx.counters.retransmits);
                    self.send_syn(cx);
                    return Ok(());
                }
                State::SynReceived if again && Seq(seg.ack) == self.snd_max => {
                    (syn, seq) = (false, self.rcv_nxt);
                }
                State::TimeWait if !acks && self.is_newer(seq, options) => return Err(Fate::Reopen),
                _ => {}
            }
        }
        if self.is_stray(cx, options) && !rst {
            return self.unacceptable(cx, seq, payload.len().saturating_add(usize::from(fin)), fin);
        }
        let len = (payload.len() as u32).saturating_add(u32::from(syn)).saturating_add(u32::from(fin));
        let at_edge = seq == self.rcv_nxt;
        let acceptable = if len == 0 {
            // One past the window is let in: the ACKs of a guest that filled it carry that number.
            self.rcv_nxt.le(seq) && seq.le(self.rcv_adv)
        } else {
            (seq.lt(self.rcv_adv) && self.rcv_nxt.lt(seq.plus(len))) || at_edge
        };
        if rst {
            if at_edge && self.answers_probe(seg) {
                return self.guest_forgot(cx);
            }
            if at_edge && self.state == State::Open && self.guest_fin && self.fin_sent && self.flight() <= 1 {
                // CLOSING or LAST-ACK with at most our FIN unacknowledged: the guest's stack has forgotten a
                // flow that is over for it (RFC 9293 3.10.7.4). What we acknowledged still goes out, and the
                // outside sees an orderly end.
                self.fin_acked = true;
                self.snd_una = self.snd_max;
                self.retry_at = None;
                return self.close_if_done(cx);
            }
            if at_edge {
                self.finish(cx, Close::Reset);
                return Err(Fate::Closed);
            }
            cx.counters.drop(DropReason::OutOfWindow);
            if acceptable {
                self.challenge(cx);
            }
            return Ok(());
        }
        if !acceptable && self.is_keep_alive(seg, len as usize) {
            self.pass_keep_alive(cx);
            return Ok(());
        }
        if !acceptable {
            return self.unacceptable(cx, seq, len as usize, fin);
        }
        if syn {
            cx.counters.drop(DropReason::OutOfWindow);
            self.challenge(cx);
            return Ok(());
        }
        if !acks {
            cx.counters.drop(DropReason::Malformed);
            return Ok(());
        }
        self.note_heard(cx.now, len);
        if let Some((value, _)) = options.timestamps
            && self.ts_on
            && seq.le(self.last_ack)
        {
            self.ts_recent = value;
        }
        if self.state == State::TimeWait {
            if len > 0 {
                self.ack_now = true;
                self.wants_batch = true;
            }
            return Ok(());
        }
        if !self.take_ack(cx, seg, options, len)? {
            return Ok(());
        }
        if len > 0 {
            self.pushed = seg.flags & flags::PSH != 0;
            let urgent = (seg.flags & flags::URG != 0 && seg.urgent > 0)
                .then(|| seq.plus(u32::from(seg.urgent)).minus(1));
            self.take_text(cx, seq, payload, fin, urgent)?;
        }
        self.close_if_done(cx)
    }

    /// Sequence numbers sent and not acknowledged.
    fn flight(&self) -> u32 {
        self.snd_max.since(self.snd_una)
    }

    /// True for a SYN that may open a new connection over one in TIME-WAIT (RFC 1122 4.2.2.13, RFC 6191).
    fn is_newer(&self, seq: Seq, options: &Options) -> bool {
        let newer = options.timestamps.is_some_and(|(v, _)| Seq(self.ts_recent).lt(Seq(v)));
        self.rcv_nxt.le(seq) || (self.ts_on && newer)
    }

    /// RFC 7323 5.3, without its outdated-clock corner: a timestamp before the last one seen.
    fn is_stray<E: Effects>(&self, cx: &Ctx<'_, E>, options: &Options) -> bool {
        self.ts_on
            && options.timestamps.is_some_and(|(v, _)| Seq(v).lt(Seq(self.ts_recent)))
            && cx.now.since(self.last_seen) < TS_VALID_NS
    }

    /// A segment outside the window: answered with an ACK (keep-alive and window probes live by it, and a
    /// guest that missed our ACK). Without payload it counts against the limit of challenges, so that two
    /// confused stacks do not answer each other for ever.
    fn unacceptable<E: Effects>(
        &mut self,
        cx: &mut Ctx<'_, E>,
        seq: Seq,
        len: usize,
        fin: bool,
    ) -> Result<(), Fate> {
        cx.counters.drop(DropReason::OutOfWindow);
        if self.state == State::TimeWait {
            if fin {
                self.last_seen = cx.now;
            }
        } else {
            self.last_seen = cx.now;
        }
        if len > 0 {
            if seq.plus(len as u32).le(self.rcv_nxt) {
                self.note_repeated(seq, len);
            }
            self.ack_now = true;
            self.wants_batch = true;
        } else {
            self.challenge(cx);
        }
        Ok(())
    }

    /// The ACK field. False: the rest of the segment is not to be looked at.
    fn take_ack<E: Effects>(
        &mut self,
        cx: &mut Ctx<'_, E>,
        seg: &Tcp,
        options: &Options,
        len: u32,
    ) -> Result<bool, Fate> {
        let (seq, ack) = (Seq(seg.seq), Seq(seg.ack));
        if self.state == State::SynReceived {
            if ack != self.snd_max {
                cx.counters.drop(DropReason::OutOfWindow);
                self.send_rst_at(cx, seg.ack);
                return Ok(false);
            }
            self.state = State::Open;
            self.snd_una = ack;
            self.retry_at = None;
            self.measure(cx.now);
            self.wants_batch = true;
        }
        // RFC 5961 5.2
        if self.snd_max.lt(ack) || ack.lt(self.snd_una.minus(self.max_wnd)) {
            cx.counters.drop(DropReason::OutOfWindow);
            self.challenge(cx);
            return Ok(false);
        }
        let window = u32::from(seg.window) << self.snd_shift;
        let (mut bytes, mut duplicate) = (0, false);
        if self.snd_una.lt(ack) {
            bytes = ack.since(self.snd_una);
            self.advance(cx, ack);
        } else if ack == self.snd_una
            && len == 0
            && window == self.snd_wnd
            && window > 0
            && ack.lt(self.snd_max)
            && !self.sack_on
        {
            duplicate = true;
            self.dup_acks = self.dup_acks.saturating_add(1);
        }
        if self.minds_losses(&options.sack) && self.snd_una.le(ack) {
            let echo = options.timestamps.filter(|_| self.ts_on).map(|(_, echo)| echo);
            self.take_losses(cx, &Acknowledged { blocks: &options.sack, echo, bytes, duplicate });
        }
        if self.snd_una.le(ack) && (self.snd_wl1.lt(seq) || (self.snd_wl1 == seq && self.snd_wl2.le(ack))) {
            if (self.snd_una == self.snd_max || self.snd_wnd == 0) && self.retry_at.is_some() {
                // The persist timer runs, and the guest answers (RFC 1122 4.2.2.17).
                self.retries = 0;
                if window > 0 {
                    self.end_backoff();
                    self.retry_at = None;
                    if self.snd_una != self.snd_max {
                        self.arm(cx.now);
                    }
                }
            }
            if window > self.snd_wnd {
                self.wants_batch = true;
            }
            self.snd_wnd = window;
            self.max_wnd = self.max_wnd.max(window);
            (self.snd_wl1, self.snd_wl2) = (seq, ack);
        }
        Ok(true)
    }

    /// New bytes are acknowledged.
    fn advance<E: Effects>(&mut self, cx: &mut Ctx<'_, E>, ack: Seq) {
        let mut bytes = ack.since(self.snd_una);
        if self.fin_sent && ack == self.snd_max {
            self.fin_acked = true;
            bytes = bytes.saturating_sub(1);
        }
        self.undiscarded = self.undiscarded.saturating_add(bytes);
        count_bytes(&mut self.bytes_in, bytes as usize);
        self.snd_una = ack;
        self.measure(cx.now);
        self.dup_acks = 0;
        self.wants_batch = true;
        self.retry_at = None;
        if self.snd_una != self.snd_max {
            self.arm(cx.now);
        }
    }

    /// Payload and FIN of a segment that touches the window.
    fn take_text<E: Effects>(
        &mut self,
        cx: &mut Ctx<'_, E>,
        seq: Seq,
        payload: &[u8],
        mut fin: bool,
        urgent: Option<Seq>,
    ) -> Result<(), Fate> {
        self.wants_batch = true;
        self.ack_pending = true;
        if self.guest_fin {
            cx.counters.drop(DropReason::OutOfWindow);
            return Ok(());
        }
        let fin_at = seq.plus(payload.len() as u32);
        let (mut seq, mut data) = (seq, payload);
        if seq.lt(self.rcv_nxt) {
            let old = (self.rcv_nxt.since(seq) as usize).min(data.len());
            self.note_repeated(seq, old);
            data = &data[old..];
            seq = self.rcv_nxt;
        }
        let room = if seq.lt(self.rcv_adv) { self.rcv_adv.since(seq) as usize } else { 0 };
        if data.len() > room {
            cx.counters.drop(DropReason::OutOfWindow);
            data = &data[..room];
            fin = false;
        }
        if seq != self.rcv_nxt {
            self.keep_ahead(cx, seq, data, fin.then_some(fin_at));
            // The guest counts these: now, and one for each.
            self.send_ack(cx);
            return Ok(());
        }
        self.heard = true;
        let all = match urgent.map(|at| at.since(seq) as usize) {
            Some(at) if at < data.len() => self.deliver_marked(cx, data, at)?,
            _ => self.deliver(cx, data)?,
        };
        if all && self.buffer.is_some() {
            self.take_ahead(cx)?;
        }
        let ahead_fin = self.buffer.as_ref().and_then(|b| b.fin());
        if (fin && all && fin_at == self.rcv_nxt) || ahead_fin == Some(self.rcv_nxt) {
            self.rcv_nxt = self.rcv_nxt.plus(1);
            self.rcv_adv = self.rcv_adv.max(self.rcv_nxt);
            self.guest_fin = true;
            self.keeps_time_wait = self.fin_sent;
            if let Some(b) = &mut self.buffer {
                b.clear_ahead();
            }
            self.settle_buffer(cx.budget);
            self.shut_if_done(cx)?;
        }
        Ok(())
    }

    /// As [`Tcb::deliver`], where the byte at `at` is urgent. The mark is lost where bytes before it wait.
    fn deliver_marked<E: Effects>(
        &mut self,
        cx: &mut Ctx<'_, E>,
        data: &[u8],
        at: usize,
    ) -> Result<bool, Fate> {
        let (before, rest) = data.split_at(at);
        if !self.deliver(cx, before)? {
            return Ok(false);
        }
        let marked = match rest.first() {
            Some(&byte) if self.is_direct() => cx.fx.tcp_send_urgent(self.sock, byte),
            _ => Ok(false),
        };
        match marked {
            Ok(true) => {
                self.took(1);
                self.deliver(cx, rest.get(1..).unwrap_or(&[]))
            }
            Ok(false) => self.deliver(cx, rest),
            Err(_) => {
                self.abort(cx);
                Err(Fate::Closed)
            }
        }
    }

    /// So many bytes in order have found a place.
    fn took(&mut self, taken: usize) {
        self.rcv_nxt = self.rcv_nxt.plus(taken as u32);
        self.rcv_adv = self.rcv_adv.max(self.rcv_nxt);
        count_bytes(&mut self.bytes_out, taken);
    }

    /// Gives bytes in order to the socket, and what it does not take to the buffer. False when some found
    /// no room: they are not acknowledged, and the guest sends them again.
    fn deliver<E: Effects>(&mut self, cx: &mut Ctx<'_, E>, data: &[u8]) -> Result<bool, Fate> {
        if data.is_empty() {
            return Ok(true);
        }
        let mut taken = 0;
        if self.is_direct()
            && let may = Tcb::may_go_up(cx, data.len())
        {
            let went = if may > 0 { cx.fx.tcp_send(self.sock, &data[..may]) } else { Ok(0) };
            match went {
                Ok(n) => {
                    taken = n.min(may);
                    self.went_up(cx, data.len(), may, taken);
                }
                Err(_) => {
                    self.abort(cx);
                    return Err(Fate::Closed);
                }
            }
        }
        if taken < data.len() {
            let buffer = self.buffer.get_or_insert_with(Box::<Buffer>::default);
            taken = taken.saturating_add(buffer.append(&data[taken..], cx.budget));
            self.settle_buffer(cx.budget);
        }
        self.took(taken);
        if taken < data.len() {
            cx.counters.drop(DropReason::BufferLimit);
        }
        Ok(taken == data.len())
    }

    /// `len` bytes from `from` on arrived again.
    fn note_repeated(&mut self, from: Seq, len: usize) {
        (self.repeated, self.repeated_len) = (from, u16::try_from(len).unwrap_or(u16::MAX));
    }

    fn keep_ahead<E: Effects>(&mut self, cx: &mut Ctx<'_, E>, seq: Seq, data: &[u8], fin_at: Option<Seq>) {
        let end = seq.plus(data.len() as u32);
        if !data.is_empty() && self.buffer.as_ref().is_some_and(|b| b.holds(seq, end)) {
            self.note_repeated(seq, data.len());
        }
        let buffer = self.buffer.get_or_insert_with(Box::<Buffer>::default);
        // On a path that loses, the sender needs each ACK.
        (self.patience, self.ack_every) = (self.patience.min(PATIENT - 1), 0);
        if !buffer.insert(seq, data, cx.budget) {
            cx.counters.drop(DropReason::BufferLimit);
        } else if let Some(at) = fin_at {
            buffer.set_fin(at);
        }
        self.settle_buffer(cx.budget);
    }

    /// Delivers what came ahead of order and is now in order.
    fn take_ahead<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> Result<(), Fate> {
        while let Some((piece, old)) = self.buffer.as_mut().and_then(|b| b.take(self.rcv_nxt)) {
            // Its memory is free again before it is asked for in the queue.
            self.settle_buffer(cx.budget);
            if !self.deliver(cx, piece.get(old..).unwrap_or(&[]))? {
                break;
            }
        }
        self.settle_buffer(cx.budget);
        Ok(())
    }
}
