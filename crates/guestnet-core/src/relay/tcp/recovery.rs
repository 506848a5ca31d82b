//! Theory of operation: loss towards the guest. As long as nothing is lost a flow has no state for it. A SACK
//! block, three duplicate ACKs of a guest without SACK, or a timeout make a [`Recovery`]; it goes when the window
//! is back at its largest and nothing is missing. What the RFCs call it:
//! - *scoreboard* ([`crate::relay::tcp::scoreboard`]): RFC 2018, with RACK's time-based detection (RFC 8985), or a NewReno
//!   partial ACK (RFC 6582) where the guest has no SACK;
//! - *tail loss probe* (RFC 8985 7): when the end of a flight stays unanswered for two round trips, its last
//!   segment is sent again, so that its SACK shows what else is missing;
//! - *proportional rate reduction* (RFC 6937): how much may be sent for what arrives during a recovery;
//! - *CUBIC* ([`crate::relay::tcp::cubic`]): the window from there on.
//!
//! Phases: `Open` (the window grows), `Recovery` (loss was found; until all is acknowledged that was in flight
//! then, the window is what PRR says), `Loss` (a timeout; slow start from one segment). What is lost is sent by
//! [`Tcb::push`], which asks the scoreboard before it sends anything new.

use crate::interface::effects::{Effects, Peek};
use crate::interface::types::Time;
use crate::relay::tcp::cubic::Cubic;
use crate::relay::tcp::scoreboard::{Delivery, Rule, Scoreboard};
use crate::relay::tcp::seq::Seq;
use crate::relay::tcp::{Budget, Ctx, Fate, MAX_FLIGHT, Tcb};
use guestnet_wire::tcp::{SackBlocks, flags};

/// Duplicate ACKs that mean loss to a sender without SACK (RFC 5681 3.2).
const DUP_ACKS: u8 = 3;
/// Growth of the reordering window at most, in quarters of a round trip (RFC 8985 6.2.4).
const PATIENCE_MAX: u8 = 16;
/// A tail loss probe waits at least this long: a guest's processor may be busy elsewhere.
const PROBE_MIN_MS: u64 = 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    Recovery,
    Loss,
}

/// A flow's state of loss.
#[derive(Debug)]
pub(super) struct Recovery {
    board: Scoreboard,
    cubic: Cubic,
    phase: Phase,
    /// End of what was in flight when the phase began.
    until: Seq,
    ssthresh: u32,
    /// PRR: bytes that arrived and that were sent since the recovery began, and the window before it.
    delivered: u32,
    sent: u32,
    before: u32,
    /// Bytes that duplicate ACKs of a guest without SACK stand for.
    duplicates: u32,
    /// The latest resend that has arrived, and the round-trip time of what arrived last.
    newest: Time,
    rtt: u64,
    /// The least round-trip time of recent samples.
    least: u64,
    /// Quarters of the least round-trip time that reordering may take.
    patience: u8,
    /// When the reordering window of something is over.
    detect_at: Option<Time>,
    /// A tail loss probe is on its way: its end, and whether it was a retransmission.
    probe: Option<(Seq, bool)>,
}

/// What an ACK said, as far as it concerns loss.
pub(super) struct Acknowledged<'a> {
    pub blocks: &'a SackBlocks,
    /// The timestamp that it echoes.
    pub echo: Option<u32>,
    /// Bytes by which it moved on.
    pub bytes: u32,
    pub duplicate: bool,
}

impl Recovery {
    /// A measured round trip. An old minimum fades, or a path that became longer would never be believed.
    fn see_rtt(&mut self, ns: u64) {
        self.least = self.least.saturating_add(self.least / 64).min(ns);
    }
}

impl Tcb {
    /// Bytes that the network should still have.
    pub(super) fn in_flight(&self) -> u32 {
        match &self.recovery {
            None => self.snd_max.since(self.snd_una),
            Some(r) => r.board.in_flight(self.snd_max).saturating_sub(r.duplicates),
        }
    }

    /// The first bytes that are to be sent again.
    #[cold]
    pub(super) fn first_lost(&self) -> Option<(Seq, u32)> {
        self.recovery.as_ref().and_then(|r| r.board.first_lost())
    }

    /// The earlier of `due` and the time when the reordering window of something is over.
    #[cold]
    pub(super) fn detect_due(&self, due: Time) -> Time {
        self.recovery.as_ref().and_then(|r| r.detect_at).map_or(due, |at| at.min(due))
    }

    /// Whether the reordering window of something is over.
    pub(super) fn detects(&self, now: Time) -> bool {
        self.recovery.as_ref().and_then(|r| r.detect_at).is_some_and(|at| at <= now)
    }

    /// True when an ACK concerns loss: [`Tcb::take_losses`] is due.
    #[inline]
    pub(super) fn minds_losses(&self, blocks: &SackBlocks) -> bool {
        self.recovery.is_some() || (self.sack_on && !blocks.is_empty()) || self.dup_acks >= DUP_ACKS
    }

    /// True when an ACK that took `ns` nanoseconds measures the path: it did not wait for a hole.
    #[cold]
    pub(super) fn may_measure(&mut self, ns: u64) -> bool {
        let Some(r) = &mut self.recovery else { return true };
        if r.board.is_empty() {
            r.see_rtt(ns);
        }
        r.board.is_empty()
    }

    /// True while a recovery is under way or one may be near.
    fn is_recovering(&self) -> bool {
        let near = |r: &Recovery| r.phase != Phase::Open || r.probe.is_some() || !r.board.is_empty();
        self.recovery.as_ref().is_some_and(|r| near(r))
    }

    /// Forgets all of it and gives back its memory.
    pub(super) fn drop_recovery(&mut self, budget: &mut Budget) {
        if let Some(mut r) = self.recovery.take() {
            r.board.release(budget);
        }
    }

    fn take_recovery(&mut self) -> Box<Recovery> {
        self.recovery.take().unwrap_or_else(|| {
            Box::new(Recovery {
                board: Scoreboard::new(self.snd_una),
                cubic: Cubic::default(),
                phase: Phase::Open,
                until: self.snd_una,
                ssthresh: MAX_FLIGHT,
                delivered: 0,
                sent: 0,
                before: 1,
                duplicates: 0,
                newest: Time(0),
                rtt: u64::from(self.srtt_us) * 1000,
                least: u64::from(self.srtt_us) * 1000,
                patience: 1,
                detect_at: None,
                probe: None,
            })
        })
    }

    /// Puts it back where it is still of use.
    fn keep_recovery(&mut self, mut r: Box<Recovery>, budget: &mut Budget) {
        if r.board.is_empty() {
            r.board.release(budget);
            if r.phase == Phase::Open && self.cwnd >= MAX_FLIGHT && r.probe.is_none() {
                return;
            }
        }
        self.recovery = Some(r);
    }

    /// What an ACK says of bytes that arrived, are late or lost, and the window that follows from it.
    #[cold]
    pub(super) fn take_losses<E: Effects>(&mut self, cx: &mut Ctx<'_, E>, ack: &Acknowledged<'_>) {
        let mss = u32::from(self.segment_size(cx.path));
        let una = self.snd_una;
        let mut r = self.take_recovery();
        let mut d = Delivery::default();
        let (iss, now, least) = (self.iss, cx.now, r.least);
        // The resend arrived if the echoed timestamp is not older; without one, if there was time for it.
        let genuine = |at: Time| match ack.echo {
            Some(echo) => Self::ts_clock_at(iss, at).le(Seq(echo)),
            None => now.since(at) >= least,
        };
        r.board.acknowledge(una, genuine, &mut d);
        let mut repeated = false;
        if self.sack_on {
            for (i, &(left, right)) in ack.blocks.as_slice().iter().enumerate() {
                let (left, right) = (Seq(left), Seq(right));
                if i == 0 && self.is_repeat(left, right, ack.blocks) {
                    repeated = true;
                } else if una.lt(left) && left.lt(right) && right.le(self.snd_max) {
                    r.board.sack((left, right), now, genuine, cx.budget, &mut d);
                }
            }
            if let Some(from) = self.rtt_from.map(|ns| Time(ns.get()))
                && una.lt(self.rtt_seq)
                && r.board.has(self.rtt_seq.minus(1))
            {
                self.rtt_from = None;
                self.take_rtt(now.since(from));
                r.see_rtt(now.since(from));
            }
        } else if ack.bytes > 0 {
            r.duplicates = r.duplicates.saturating_sub(ack.bytes.saturating_sub(mss));
        } else if ack.duplicate && r.phase == Phase::Recovery {
            let more = mss.min(r.board.in_flight(self.snd_max).saturating_sub(r.duplicates));
            r.duplicates = r.duplicates.saturating_add(more);
            d.bytes = d.bytes.saturating_add(more);
        }
        r.rtt = u64::from(self.srtt_us) * 1000;
        if let Some(at) = d.resent {
            r.newest = r.newest.max(at);
            r.rtt = now.since(at);
            if ack.echo.is_some() {
                // Karn's rule allows it where the echo names the transmission (RFC 7323 4).
                self.take_rtt(r.rtt);
                r.see_rtt(r.rtt);
            }
        }
        self.reordered |= self.sack_on && d.reordered;
        if repeated {
            r.patience = r.patience.saturating_add(1).min(PATIENCE_MAX);
        }
        let probe_arrived = self.end_probe(&mut r, ack, repeated);
        let mut loss = false;
        if r.phase != Phase::Open && r.until.le(una) {
            if r.phase == Phase::Recovery {
                self.cwnd = r.ssthresh;
            }
            r.phase = Phase::Open;
            r.duplicates = 0;
            loss = r.board.lost() > 0;
        } else if r.phase == Phase::Recovery && !self.sack_on && ack.bytes > 0 {
            // A partial ACK names the next hole.
            r.board.lose_first(mss, self.snd_max);
        }
        if r.phase == Phase::Open && self.dup_acks >= DUP_ACKS {
            r.board.lose_first(mss, self.snd_max);
            loss = true;
        }
        self.dup_acks = if self.dup_acks >= DUP_ACKS { 0 } else { self.dup_acks };
        let newly = self.detect(&mut r, now, mss, probe_arrived.is_some());
        if r.phase == Phase::Open && (loss || newly > 0) {
            self.enter_recovery(&mut r, now, mss);
        } else if r.phase == Phase::Open && probe_arrived == Some(true) && r.board.is_empty() {
            // The probe itself filled the hole: there was loss all the same.
            let window = self.cwnd.min(self.snd_max.since(una).saturating_add(d.bytes));
            r.ssthresh = r.cubic.reduce(window, mss);
            self.cwnd = r.ssthresh;
        }
        match r.phase {
            Phase::Recovery => self.reduce_rate(&mut r, mss, d.bytes, ack.bytes > 0 && newly == 0),
            Phase::Loss => self.grow(&mut r, now, mss, d.bytes),
            Phase::Open if r.board.is_empty() => self.grow(&mut r, now, mss, d.bytes),
            Phase::Open => {}
        }
        self.wants_batch = true;
        self.keep_recovery(r, cx.budget);
        if ack.bytes > 0 && una != self.snd_max {
            // Now that it is known whether something is missing.
            self.arm(now);
        }
    }

    /// True for a first block that reports bytes which arrived twice (RFC 2883 4).
    fn is_repeat(&self, left: Seq, right: Seq, blocks: &SackBlocks) -> bool {
        let within = |&(l, r): &(u32, u32)| Seq(l).le(left) && right.le(Seq(r));
        let old = right.le(self.snd_una) && self.snd_una.minus(self.max_wnd.max(1)).le(left);
        left.lt(right) && (old || blocks.as_slice().get(1).is_some_and(within))
    }

    /// Marks what is lost by now, and notes when to look again.
    fn detect(&self, r: &mut Recovery, now: Time, mss: u32, hasty: bool) -> u32 {
        let rule = Rule {
            mss,
            window: (r.least / 4).saturating_mul(u64::from(r.patience)).min(u64::from(self.srtt_us) * 1000),
            rtt: r.rtt,
            newest: r.newest,
            reordered: self.reordered,
            hasty: hasty || r.phase != Phase::Open,
        };
        let (newly, again) = r.board.detect(now, &rule);
        r.detect_at = again;
        newly
    }

    fn enter_recovery(&mut self, r: &mut Recovery, now: Time, mss: u32) {
        r.phase = Phase::Recovery;
        r.until = self.snd_max;
        r.before = self.cwnd.min(self.snd_max.since(self.snd_una)).max(1);
        r.ssthresh = r.cubic.reduce(r.before, mss);
        (r.delivered, r.sent) = (0, 0);
        r.probe = None;
        if !self.sack_on {
            let dups = mss.saturating_mul(u32::from(DUP_ACKS));
            r.duplicates = dups.min(r.board.in_flight(self.snd_max));
        }
        self.arm_timeout(now);
    }

    /// The window in a recovery, after `bytes` arrived (RFC 6937 3.1). `safe`: the ACK moved on and showed no
    /// new loss.
    fn reduce_rate(&mut self, r: &mut Recovery, mss: u32, bytes: u32, safe: bool) {
        r.delivered = r.delivered.saturating_add(bytes);
        let pipe = r.board.in_flight(self.snd_max).saturating_sub(r.duplicates);
        let more = if pipe > r.ssthresh {
            let share = u64::from(r.delivered).saturating_mul(u64::from(r.ssthresh));
            let share = share.div_ceil(u64::from(r.before));
            u32::try_from(share).unwrap_or(u32::MAX).saturating_sub(r.sent)
        } else {
            let arrived = r.delivered.saturating_sub(r.sent).max(bytes);
            r.ssthresh.saturating_sub(pipe).min(arrived.saturating_add(if safe { mss } else { 0 }))
        };
        // The first segment is sent again whatever the rest says.
        self.cwnd = pipe.saturating_add(more.max(if r.sent == 0 { mss } else { 0 }));
    }

    /// More window for `bytes` that arrived, where the window was used.
    fn grow(&mut self, r: &mut Recovery, now: Time, mss: u32, bytes: u32) {
        let pipe = r.board.in_flight(self.snd_max);
        if bytes == 0 || (r.phase == Phase::Open && pipe.saturating_add(bytes) < self.cwnd.div_ceil(2)) {
            return;
        }
        self.cwnd = if self.cwnd < r.ssthresh {
            self.cwnd.saturating_add(bytes).min(r.ssthresh)
        } else {
            r.cubic.grow(self.cwnd, bytes, mss, self.srtt_us, now)
        }
        .min(MAX_FLIGHT);
    }

    /// The retransmission timer ran out: all that is in flight is sent again, from one segment on.
    pub(super) fn time_out<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) {
        let mss = u32::from(self.segment_size(cx.path));
        let mut r = self.take_recovery();
        if r.phase == Phase::Open {
            r.ssthresh = r.cubic.reduce(self.cwnd.min(self.snd_max.since(self.snd_una)), mss);
        }
        r.phase = Phase::Loss;
        r.until = self.snd_max;
        self.cwnd = mss;
        self.lose_all(&mut r);
        self.recovery = Some(r);
    }

    /// All that is in flight is to be sent again, and not for congestion.
    pub(super) fn rewind(&mut self) {
        let mut r = self.take_recovery();
        self.lose_all(&mut r);
        self.recovery = Some(r);
    }

    fn lose_all(&mut self, r: &mut Recovery) {
        // A guest that does not answer to what it lacks may have thrown away what it reported.
        let distrust = self.retries > 1 || r.board.reneged();
        r.board.lose_all(self.snd_max, distrust);
        r.duplicates = 0;
        (r.detect_at, r.probe) = (None, None);
        self.dup_acks = 0;
        self.rtt_from = None;
    }

    /// The time has come to look again for what is lost.
    pub(super) fn detect_late<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> Result<(), Fate> {
        let mss = u32::from(self.segment_size(cx.path));
        let Some(mut r) = self.recovery.take() else { return Ok(()) };
        let newly = self.detect(&mut r, cx.now, mss, false);
        if newly > 0 && r.phase == Phase::Open {
            self.enter_recovery(&mut r, cx.now, mss);
        }
        if newly > 0 && r.phase == Phase::Recovery {
            self.reduce_rate(&mut r, mss, mss, false);
        }
        self.recovery = Some(r);
        if newly > 0 { self.push(cx) } else { Ok(()) }
    }

    /// `len` sequence numbers went out for the first time.
    #[cold]
    pub(super) fn count_new(&mut self, len: u32) {
        if let Some(r) = self.recovery.as_mut().filter(|r| r.phase == Phase::Recovery) {
            r.sent = r.sent.saturating_add(len);
        }
    }

    /// `len` sequence numbers from `from` on went out again.
    #[cold]
    pub(super) fn count_again(&mut self, now: Time, from: Seq, len: u32) {
        self.count_new(len);
        if from.lt(self.rtt_seq) && self.rtt_seq.le(from.plus(len)) {
            self.rtt_from = None;
        }
        if let Some(r) = &mut self.recovery
            && r.board.first_lost().is_some_and(|(at, _)| at == from)
        {
            r.board.resent(len, now, self.snd_max);
        }
        if from == self.snd_una {
            // The timeout counts from the last time that the first segment was sent.
            self.arm_timeout(now);
        } else {
            self.arm_if_off(now);
        }
    }

    // ---- tail loss probes

    /// How long a flight may stay unanswered before its end is probed; [`u64::MAX`] where none is due.
    pub(super) fn probe_after_ms(&self) -> u64 {
        let flight = self.snd_max.since(self.snd_una);
        // A guest may wait long before it acknowledges one segment: the timeout is no later then.
        if flight <= u32::from(self.mss) || self.srtt_us == 0 || self.is_recovering() {
            return u64::MAX;
        }
        (u64::from(self.srtt_us) * 2 / 1000).max(PROBE_MIN_MS)
    }

    /// Sends a new segment, or the last one again.
    pub(super) fn probe_tail<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> Result<(), Fate> {
        let mss = u32::from(self.segment_size(cx.path));
        let room = self.snd_una.plus(self.snd_wnd).since(self.snd_max);
        if self.readable && !self.fin_sent && self.snd_max.lt(self.snd_una.plus(self.snd_wnd)) {
            let want = mss.min(room);
            if let Peek::Data(n) | Peek::Last(n) = self.peek(cx, self.snd_max, want)? {
                let n = u32::try_from(n).unwrap_or(u32::MAX).min(want);
                if n > 0 && self.send_data(cx, self.snd_max, n, mss, flags::PSH) {
                    self.note_probe(false);
                }
                return Ok(());
            }
        }
        let fin = u32::from(self.fin_sent);
        let len = self.snd_max.since(self.snd_una).saturating_sub(fin).min(mss);
        let len = len.saturating_add(fin);
        if self.resend(cx, self.snd_max.minus(len), len)? {
            self.note_probe(true);
        }
        Ok(())
    }

    /// A probe went out that ends where all does.
    fn note_probe(&mut self, again: bool) {
        let mut r = self.take_recovery();
        r.probe = Some((self.snd_max, again));
        self.recovery = Some(r);
    }

    /// Whether this ACK is the answer to a probe; true for one that filled a hole (RFC 8985 7.4.2).
    fn end_probe(&self, r: &mut Recovery, ack: &Acknowledged<'_>, repeated: bool) -> Option<bool> {
        let (end, again) = r.probe?;
        let reported = ack.blocks.as_slice().iter().any(|(_, right)| end.le(Seq(*right)));
        let repaired = again && !repeated && end.lt(self.snd_una);
        let over = end.lt(self.snd_una) || reported || repeated || (!again && end.le(self.snd_una));
        if !over {
            return None;
        }
        r.probe = None;
        Some(repaired)
    }
}
