//! Theory of operation: one retry timer and one idle limit per flow. The retry timer (RFC 6298) sends again
//! what is unacknowledged: SYN, data, FIN; with nothing in flight and a closed window it is the persist timer
//! (RFC 9293 3.8.6.1). The idle limit is a distance from the last segment seen, so traffic never re-arms
//! anything: [`Tcb::deadline`] says when to look again, and [`Tcb::timer`] looks what is due.

use crate::interface::effects::{Close, Effects, SockError};
use crate::interface::types::Time;
use crate::relay::tcp::keepalive::ORPHAN_MS;
use crate::relay::tcp::{Ctx, Fate, Path, State, Tcb};
use crate::util::account::count;

/// Before the first measurement (RFC 6298 2.1).
pub(super) const RTO_INITIAL_MS: u32 = 1000;
/// Lower bound. RFC 6298 2.4 wants 1 s for the Internet's sake; this link has no Internet in it.
const RTO_MIN_MS: u32 = 200;
/// Upper bound of the backoff (RFC 6298 2.5 allows 60 s or more).
const RTO_MAX_MS: u32 = 120_000;
/// SYN and SYN-ACK: given up after the seventh, 127 s.
const SYN_RETRIES: u8 = 6;
/// Data, FIN, unanswered probes: about a quarter of an hour (RFC 1122 4.2.3.5: at least 100 s), so that a
/// guest may be paused for a while.
const RETRIES: u8 = 15;
/// From this patience on ACKs wait for answers.
pub(super) const PATIENT: i8 = 2;
/// What is left of it when no answer came in time: so many more answers must be seen before.
const IMPATIENT: i8 = -6;
/// More than this is never left without an ACK for long.
const ACK_BYTES: u32 = 4096;

impl Tcb {
    /// When [`Tcb::timer`] is due. It only moves closer within a call of the Tcb, so ask after each.
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        let mut due = if self.state == State::Open { self.check_at() } else { self.idle_at() };
        if let Some(at) = self.retry_at {
            due = due.min(at);
        }
        if let Some(at) = self.ack_at {
            due = due.min(at);
        }
        Some(if self.recovery.is_some() { self.detect_due(due) } else { due })
    }

    pub(super) fn idle_at(&self) -> Time {
        let t = &self.timeouts;
        let ms = match self.state {
            State::Connecting | State::SynSent | State::SynReceived => t.transitory_ms,
            // A slow socket may take its time for what the guest sent before it closed.
            State::Open if self.guest_fin && self.fin_sent && self.shut => t.transitory_ms,
            State::Open if self.guest_is_done() => t.established_ms.min(ORPHAN_MS),
            State::Open => t.established_ms,
            State::TimeWait => t.time_wait_ms,
        };
        self.alive_at().plus_ms(u64::from(ms))
    }

    /// Does what is due at `cx.now`; early calls do nothing.
    pub fn timer<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> Fate {
        if self.idle_at() <= cx.now {
            return self.idled(cx);
        }
        if self.state == State::Open
            && self.check_at() <= cx.now
            && let Err(fate) = self.check_ends(cx)
        {
            return fate;
        }
        if self.ack_at.is_some_and(|at| at <= cx.now) {
            self.ack_at = None;
            if self.thinned {
                self.thinned_too_far();
            } else {
                self.patience = IMPATIENT;
            }
            if self.ack_pending {
                self.send_ack(cx);
            }
        }
        if self.detects(cx.now)
            && let Err(fate) = self.detect_late(cx)
        {
            return fate;
        }
        if self.retry_at.is_none_or(|at| cx.now < at) {
            return Fate::Live;
        }
        self.retry_at = None;
        match self.retry(cx) {
            Ok(()) => Fate::Live,
            Err(fate) => fate,
        }
    }

    fn idled<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> Fate {
        match self.state {
            State::Connecting => {
                self.finish(cx, Close::Reset);
                Fate::Unreachable { error: SockError::TimedOut, seq: self.rcv_nxt.minus(1).0 }
            }
            _ => {
                self.abort(cx);
                Fate::Closed
            }
        }
    }

    fn retry<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> Result<(), Fate> {
        let (limit, syn) = match self.state {
            State::SynSent | State::SynReceived => (SYN_RETRIES, true),
            State::Open => (RETRIES, false),
            State::Connecting | State::TimeWait => return Ok(()),
        };
        if self.waits_port && !syn {
            // The guest does not read; that is no loss. `port_writable` starts the timer again.
            return Ok(());
        }
        if std::mem::take(&mut self.probing) && !syn && self.snd_una != self.snd_max && self.snd_wnd > 0 {
            self.probe_tail(cx)?;
            self.arm_timeout(cx.now);
            return Ok(());
        }
        self.retries = self.retries.saturating_add(1);
        if self.retries > limit {
            self.abort(cx);
            return Err(Fate::Closed);
        }
        self.rto_ms = self.rto_ms.saturating_mul(2).min(RTO_MAX_MS);
        self.rtt_from = None;
        if syn {
            count(&mut cx.counters.retransmits);
            self.send_syn(cx);
        } else if self.snd_una == self.snd_max || self.snd_wnd == 0 {
            // Persist. What was in flight when the guest closed its window is sent again when it opens.
            self.rewind();
            self.send_probe(cx);
        } else {
            self.time_out(cx);
            self.push(cx)?;
        }
        self.arm_timeout(cx.now);
        Ok(())
    }

    /// Whether the ACK that is due may wait for an answer to travel with, and if so, starts its timer: less
    /// than two segments are without one (RFC 9293 3.8.6.3), and answers have come quickly before.
    pub(super) fn ack_may_wait(&mut self, now: Time, path: &Path) -> bool {
        let delay = self.timeouts.ack_delay_ms;
        let most = (2 * u32::from(self.segment_size(path))).min(ACK_BYTES);
        let may = delay > 0
            && self.state == State::Open
            && self.patience >= PATIENT
            && !(self.guest_fin && self.fin_sent)
            && self.buffer.is_none()
            && self.rcv_nxt.since(self.last_ack) < most;
        if may && self.ack_at.is_none() {
            self.ack_at = Some(now.plus_ms(u64::from(delay)));
        }
        may
    }

    /// Starts the retry timer anew, for a tail loss probe where one is due before the timeout.
    pub(super) fn arm(&mut self, now: Time) {
        self.arm_timeout(now);
        if self.sack_on {
            self.arm_sooner(now);
        }
    }

    /// Starts the retry timer anew, for the timeout.
    pub(super) fn arm_timeout(&mut self, now: Time) {
        self.retry_at = Some(now.plus_ms(u64::from(self.rto_ms)));
        self.probing = false;
    }

    /// Starts it where it does not run, or sooner where what was sent makes a tail that can be probed.
    #[inline]
    pub(super) fn arm_if_off(&mut self, now: Time) {
        if self.retry_at.is_none() {
            self.arm(now);
        } else if self.sack_on && !self.probing {
            self.arm_sooner(now);
        }
    }

    fn arm_sooner(&mut self, now: Time) {
        let probe = now.plus_ms(self.probe_after_ms());
        if self.state == State::Open && self.retry_at.is_some_and(|at| probe < at) {
            self.retry_at = Some(probe);
            self.probing = true;
        }
    }

    /// Takes a measurement when the segment that was timed is acknowledged (RFC 6298 2, Karn's rule: its
    /// retransmission clears `rtt_from`), and ends any backoff. An ACK that had to wait for a hole before it
    /// measures nothing; the SACK block did.
    pub(super) fn measure(&mut self, now: Time) {
        if let Some(from) = self.rtt_from.map(|ns| Time(ns.get()))
            && self.rtt_seq.le(self.snd_una)
        {
            self.rtt_from = None;
            if self.recovery.is_none() || self.may_measure(now.since(from)) {
                self.take_rtt(now.since(from));
            }
        }
        self.end_backoff();
    }

    /// A measured round trip, in nanoseconds.
    pub(super) fn take_rtt(&mut self, ns: u64) {
        let r = (ns / 1000).clamp(1, 60_000_000) as u32;
        if self.srtt_us == 0 {
            (self.srtt_us, self.rttvar_us) = (r, r / 2);
        } else {
            let delta = self.srtt_us.abs_diff(r);
            self.rttvar_us = (self.rttvar_us / 4).saturating_mul(3).saturating_add(delta / 4);
            self.srtt_us = (self.srtt_us / 8).saturating_mul(7).saturating_add(r / 8).max(1);
        }
    }

    /// The retransmission timeout as the measurements give it.
    pub(super) fn end_backoff(&mut self) {
        self.retries = 0;
        self.rto_ms = if self.srtt_us == 0 {
            RTO_INITIAL_MS
        } else {
            (self.srtt_us.saturating_add(self.rttvar_us.max(1).saturating_mul(4)) / 1000)
                .clamp(RTO_MIN_MS, RTO_MAX_MS)
        };
    }
}
