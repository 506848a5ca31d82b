//! Theory of operation: how much bulk TCP flows send before the worker does anything else. A flow with much to send sends
//! it in turns; all turns between two calls of [`crate::network::Network::batch_end`] are a round.
//!
//! - While only bulk flows are active, a turn and a round are long: fewer turns cost less.
//! - While anything else was active in the last [`QUIET`] (a request, an answer, a datagram, a connect), a round is
//!   one short turn, so that what arrives meanwhile waits for one frame and not for many.
//! - A flow's own small segments do not shorten its own turns.
//! - Bulk flows have as much time as others had in the same round. If others made a round long (a guest that floods),
//!   bulk flows send more than one short turn, so that the flood does not take their share.
//!
//! Bulk flows take turns in the order in which they asked; flows with little to send go before them.

use crate::interface::types::Time;

/// Bytes of one turn of a flow; at 10 Gbit/s some 200 microseconds.
pub(crate) const TURN: u32 = 256 << 10;
/// The same while others are active. A turn ends after the frame that reaches it, so this is one large frame.
pub(crate) const TURN_SHORT: u32 = 32 << 10;
/// Bytes of all turns of a round.
const ROUND: u32 = 4 * TURN;
/// Others count as active for this long after they last were, in nanoseconds.
const QUIET: u64 = 10_000_000;
/// Bytes that bulk flows may send for every two nanoseconds that others had: some 16 Gbit/s.
const BYTES_IN_2_NS: u64 = 4;
/// A flow is a bulk flow for so many milliseconds after it had a short turn's worth to send at once.
pub(crate) const BULK: u32 = 5;

/// Stands for everything that is not a TCP flow of the relay.
pub(crate) const NO_FLOW: u32 = u32::MAX;

/// Which sources were active, and what the round has sent.
#[derive(Debug)]
pub(crate) struct Turns {
    /// The last active source, and when it was active.
    source: u32,
    last: Time,
    /// When another source was active last.
    other: Time,
    sent: u32,
    /// Bytes of all turns of this round while others are active.
    short: u32,
}

impl Turns {
    /// No activity yet.
    pub(crate) fn new() -> Turns {
        Turns { source: NO_FLOW, last: Time(0), other: Time(0), sent: 0, short: TURN_SHORT }
    }

    /// `source`, a flow that is not a bulk flow or [`NO_FLOW`], was active.
    #[inline]
    pub(crate) fn active(&mut self, now: Time, source: u32) {
        if self.source != source {
            self.other = self.last;
            self.source = source;
        }
        self.last = now;
    }

    /// Bytes that a bulk flow may send now.
    #[inline]
    pub(crate) fn left(&self, now: Time, flow: u32) -> u32 {
        let other = if self.source == flow { self.other } else { self.last };
        let round = if now.since(other) < QUIET { self.short } else { ROUND };
        round.saturating_sub(self.sent).min(TURN)
    }

    #[inline]
    pub(crate) fn sent(&mut self, bytes: u64) {
        self.sent = self.sent.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
    }

    /// Others had the worker for so many nanoseconds of this round.
    #[inline]
    pub(crate) fn others_took(&mut self, ns: u64) {
        let bytes = u32::try_from(ns.saturating_mul(BYTES_IN_2_NS) / 2).unwrap_or(u32::MAX);
        self.short = bytes.clamp(TURN_SHORT, ROUND);
    }

    #[inline]
    pub(crate) fn round_ended(&mut self) {
        self.sent = 0;
        self.short = TURN_SHORT;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_is_short_only_while_another_source_is_active() {
        let (at, mut t) = (|ns| Time(1_000_000_000 + ns), Turns::new());
        assert_eq!(t.left(at(0), 1), TURN);
        t.active(at(0), 1);
        assert_eq!((t.left(at(0), 1), t.left(at(0), 2)), (TURN, TURN_SHORT));
        t.active(at(5), NO_FLOW);
        t.active(at(6), 1);
        assert_eq!((t.left(at(6), 1), t.left(at(6), 2)), (TURN_SHORT, TURN_SHORT));
        t.active(at(7), 1);
        assert_eq!(t.left(at(4 + QUIET), 1), TURN_SHORT);
        assert_eq!((t.left(at(5 + QUIET), 1), t.left(at(5 + QUIET), 2)), (TURN, TURN_SHORT));
        assert_eq!(t.left(at(7 + QUIET), 2), TURN);
    }

    #[test]
    fn bulk_flows_have_as_much_time_as_others_in_the_same_round() {
        let (now, mut t) = (Time(1_000_000_000), Turns::new());
        t.active(now, NO_FLOW);
        t.others_took(5_000);
        assert_eq!(t.left(now, 1), TURN_SHORT);
        t.others_took(100_000);
        assert_eq!(t.left(now, 1), 200_000);
        t.others_took(u64::MAX / 8);
        assert_eq!(t.left(now, 1), TURN);
        t.round_ended();
        assert_eq!(t.left(now, 1), TURN_SHORT);
    }

    #[test]
    fn a_round_is_bounded_over_all_flows() {
        let mut t = Turns::new();
        let now = Time(1_000_000_000);
        t.sent(u64::from(TURN));
        assert_eq!(t.left(now, 1), TURN);
        t.sent(u64::from(ROUND - TURN) - 1);
        assert_eq!(t.left(now, 2), 1);
        t.sent(u64::MAX);
        assert_eq!(t.left(now, 3), 0);
        t.round_ended();
        assert_eq!(t.left(now, 3), TURN);
    }
}
