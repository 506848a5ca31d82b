//! Theory of operation: whether both ends of an idle connection are still there (RFC 9293 3.8.4, RFC 1122 4.2.3.6).
//! A relay stands between two TCPs, so neither end finds by itself that the other is gone. Three things make
//! keep-alive work as if the relay were not there:
//!
//! - **The guest is probed** when nothing was heard for [`IDLE_PROBE_MS`], or [`HALF_CLOSED_PROBE_MS`] where the
//!   guest has closed its side, and whenever the peer sends probes of its own. A guest that has forgotten the
//!   connection (its socket timed out, it rebooted) answers with a reset, and the flow ends. An answer counts
//!   as a sign of life. Silence ends a flow only where somebody waits for the truth: a peer that probes, or a
//!   half-closed flow, after [`SILENT_MS`]; a paused guest keeps its connections for that long.
//! - **The peer's probes are noticed** by looking at the kernel's count of segments: after [`LOOK_MIN_MS`] of
//!   silence for the first time, then at doubled intervals, and at the peer's own pace once it probes.
//! - **The guest's probes are passed on.** The relay does not answer one until the peer has answered the probe
//!   that the host's kernel then sends. Where it cannot know (data under way, a service), it answers at once.
//!
//! A flow whose guest is gone lives on only as long as something of the guest's waits for the peer, and moves.

use crate::interface::effects::{Close, Effects, Peer};
use crate::interface::types::Time;
use crate::relay::tcp::seq::Seq;
use crate::relay::tcp::types::KeepAlive;
use crate::relay::tcp::{Ctx, Fate, State, Tcb};
use guestnet_wire::tcp::{Tcp, flags};

/// Silence before the kernel's count of segments is looked at for the first time.
const LOOK_MIN_MS: u64 = 2_000;
/// Interval of these looks at most.
const LOOK_MAX_MS: u64 = 256_000;
/// Interval of probes on an idle flow.
const IDLE_PROBE_MS: u64 = 300_000;
/// The same where the guest has closed its side: a little more than Linux keeps a socket in FIN-WAIT-2 that no
/// program holds.
const HALF_CLOSED_PROBE_MS: u64 = 63_000;
/// Silence of a guest that is probed, before it counts as gone: as long as data is retransmitted to it.
const SILENT_MS: u64 = 900_000;
/// Probes without an answer that this takes at least.
const SILENT_PROBES: u8 = 3;
/// No progress of what a guest that is gone has left behind, before the peer counts as gone too.
pub(super) const ORPHAN_MS: u32 = 1_800_000;
/// How soon after a probe to the peer its answer is looked for, and how often, at doubled intervals: 4 s in all.
const ANSWER_MS: u64 = 4;
const ANSWER_LOOKS: u8 = 10;

impl KeepAlive {
    fn look_at(&self) -> Time {
        self.looked_at.plus_ms(u64::from(self.look_ms))
    }

    /// Counts the peer's segments: true when it has sent some since the last count, though nothing came of them.
    /// `fresh` is the first count since the flow was last active.
    fn look(&mut self, peer: Option<Peer>, now: Time, fresh: bool) -> bool {
        let passed = now.since(self.looked_at) / 1_000_000;
        self.looked_at = now;
        let Some(Peer { segments_in, .. }) = peer else {
            self.look_ms = LOOK_MAX_MS as u32;
            return false;
        };
        let new = segments_in.wrapping_sub(self.segments_in);
        self.segments_in = segments_in;
        self.peer_probes = !fresh && new > 0;
        let next = match (fresh, new) {
            (true, _) => LOOK_MIN_MS,
            (false, 0) => u64::from(self.look_ms) * 2,
            (false, n) => passed.checked_div(u64::from(n)).unwrap_or(passed),
        };
        self.look_ms = next.clamp(LOOK_MIN_MS, LOOK_MAX_MS) as u32;
        self.peer_probes
    }
}

impl Tcb {
    /// True for a flow that is being opened or over: when there is no room for another, the oldest of these goes.
    /// A guest that still wants one that is being opened repeats its SYN.
    #[must_use]
    pub fn may_be_evicted(&self) -> bool {
        self.state != State::Open
    }

    /// The guest forgot the flow; only what it left behind is still to be delivered.
    pub(super) fn guest_is_gone(&self) -> bool {
        self.keep.as_ref().is_some_and(|k| k.guest_gone)
    }

    /// The guest has all that it will ever get, or is gone.
    pub(super) fn guest_is_done(&self) -> bool {
        self.guest_is_gone() || self.guest_fin && self.fin_acked
    }

    /// When one of both ends last gave a sign of life.
    pub(super) fn alive_at(&self) -> Time {
        self.keep.as_ref().map_or(self.last_seen, |k| k.heard_at.max(self.last_seen))
    }

    /// When [`Tcb::check_ends`] is due, or the flow has been idle for too long.
    pub(super) fn check_at(&self) -> Time {
        let first = self.last_seen.plus_ms(LOOK_MIN_MS);
        let Some(k) = &self.keep else { return first };
        let due = if k.looked_at < self.last_seen {
            first
        } else {
            k.look_at().min(self.probe_at(k)).min(self.idle_at())
        };
        k.answer_at.map_or(due, |at| at.min(due))
    }

    fn probe_at(&self, k: &KeepAlive) -> Time {
        let ms = if self.guest_fin { HALF_CLOSED_PROBE_MS } else { IDLE_PROBE_MS };
        self.last_seen.max(k.probed_at).plus_ms(ms)
    }

    /// Looks at what is due of the above.
    pub(super) fn check_ends<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> Result<(), Fate> {
        if self.keep.as_ref().is_some_and(|k| k.answer_at.is_some_and(|at| at <= cx.now)) {
            self.look_for_answer(cx);
        }
        let k = self.keep.get_or_insert_default();
        let fresh = k.looked_at < self.last_seen;
        let look_at = if fresh { self.last_seen.plus_ms(LOOK_MIN_MS) } else { k.look_at() };
        let peer_probes = look_at <= cx.now && k.look(cx.fx.tcp_peer(self.sock), cx.now, fresh);
        let probe = self.keep.as_ref().is_some_and(|k| !fresh && self.probe_at(k) <= cx.now);
        if peer_probes || probe { self.probe_guest(cx) } else { Ok(()) }
    }

    /// Asks the guest whether it still knows the flow. Where something is under way, its timer asks already.
    fn probe_guest<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> Result<(), Fate> {
        let alive_at = self.alive_at();
        let k = self.keep.get_or_insert_default();
        k.probed_at = cx.now;
        let gone = cx.now.since(alive_at) >= SILENT_MS * 1_000_000 && k.probes >= SILENT_PROBES;
        let wanted = self.guest_fin || k.peer_probes;
        if self.retry_at.is_some() || self.snd_una != self.snd_max || self.guest_is_done() {
            return Ok(());
        }
        if gone && self.guest_fin {
            return self.guest_forgot(cx);
        }
        if gone && wanted {
            self.abort(cx);
            return Err(Fate::Closed);
        }
        if let Some(k) = &mut self.keep {
            k.probes = k.probes.saturating_add(1);
        }
        self.send_probe(cx);
        Ok(())
    }

    /// The guest may have forgotten its connections: asks it about this one, unless it was heard of just now.
    pub fn recheck<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> Fate {
        let last = self.keep.as_ref().map_or(Time(0), |k| k.probed_at).max(self.alive_at());
        if self.state != State::Open || cx.now < last.plus_ms(LOOK_MIN_MS) {
            return Fate::Live;
        }
        match self.probe_guest(cx) {
            Ok(()) => Fate::Live,
            Err(fate) => fate,
        }
    }

    /// A segment of the guest was in order. Nothing but the answer to a probe is no activity of the flow.
    #[inline]
    pub(super) fn note_heard(&mut self, now: Time, len: u32) {
        if let Some(k) = &mut self.keep
            && k.probes > 0
        {
            k.probes = 0;
            if len == 0 {
                k.heard_at = now;
                return;
            }
        }
        self.last_seen = now;
    }

    /// True for a reset that answers a probe (RFC 9293 3.10.7.1: it has no ACK).
    pub(super) fn answers_probe(&self, seg: &Tcp) -> bool {
        let probed = self.keep.as_ref().is_some_and(|k| k.probes > 0);
        self.state == State::Open && probed && seg.flags & flags::ACK == 0
    }

    /// The guest knows nothing of the flow any more. Where it had closed its side, that is an orderly end, and
    /// what it sent before is still delivered.
    pub(super) fn guest_forgot<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> Result<(), Fate> {
        if !self.guest_fin {
            self.finish(cx, Close::Reset);
            return Err(Fate::Forgotten);
        }
        self.keep = Some(Box::new(KeepAlive { guest_gone: true, ..KeepAlive::default() }));
        self.close_if_done(cx)
    }

    /// True for a keep-alive probe of the guest: an old sequence number, with no byte or one that is known, while
    /// nothing is under way. Looks like a probe of a closed window, which is always answered.
    pub(super) fn is_keep_alive(&self, seg: &Tcp, len: usize) -> bool {
        self.state == State::Open
            && len <= 1
            && Seq(seg.seq).plus(1) == self.rcv_nxt
            && seg.flags & (flags::ACK | flags::FIN | flags::SYN) == flags::ACK
            && Seq(seg.ack) == self.snd_una
            && self.snd_una == self.snd_max
            && self.last_ack == self.rcv_nxt
            && self.rcv_nxt.lt(self.rcv_adv)
            && self.waiting() == 0
    }

    /// The guest asks whether its peer is there: the peer is asked.
    pub(super) fn pass_keep_alive<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) {
        self.last_seen = cx.now;
        let k = self.keep.get_or_insert_default();
        k.probes = 0;
        match cx.fx.tcp_peer(self.sock) {
            Some(Peer { segments_in, busy: false }) => {
                // An answer may take longer than the looks for it: it counts when the guest asks again.
                if !std::mem::replace(&mut k.unanswered, true) {
                    k.answer_from = segments_in;
                }
                cx.fx.tcp_probe(self.sock);
                k.answer_looks = 0;
                k.answer_at = Some(cx.now.plus_ms(ANSWER_MS));
            }
            Some(Peer { busy: true, .. }) | None => self.challenge(cx),
        }
    }

    /// Looks whether the peer has answered, and if so, answers the guest.
    fn look_for_answer<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) {
        let peer = cx.fx.tcp_peer(self.sock);
        let Some(k) = &mut self.keep else { return };
        k.answer_at = None;
        let silent = peer.is_some_and(|Peer { segments_in, busy }| !busy && segments_in == k.answer_from);
        if !silent {
            k.unanswered = false;
            self.challenge(cx);
        } else if k.answer_looks < ANSWER_LOOKS {
            k.answer_looks = k.answer_looks.saturating_add(1);
            k.answer_at = Some(cx.now.plus_ms(ANSWER_MS << k.answer_looks));
        }
    }
}
