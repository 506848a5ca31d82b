//! Theory of operation: how long the worker does one thing before others have their turn. There is one clock for
//! everything that is read in batches: guests of every attachment, listeners, published ports, the uplink.
//!
//! - A turn ends after so many frames, after [`BYTES`], or when its time is up: [`TIME`], and [`PER_BYTE`] for
//!   each byte that it moved. Frames that open flows take a hundred times as long as others, and a guest that
//!   floods is not to have the time of one that works.
//! - A guest has one turn in a round of the worker, whatever the number of its queues.
//! - The clock is looked at every few frames, and after each one where they are slow. So a turn is late by one
//!   slow frame at most, or by a few that are not.

use crate::os::sys;
use guestnet_core::types::Time;

/// Bytes of one turn: half a window, so that a guest goes on sending while we do.
pub(crate) const BYTES: usize = 512 << 10;
/// Time of a turn that moves nothing, in nanoseconds.
pub(crate) const TIME: u64 = 100_000;
/// Further time for each byte, in nanoseconds: a slow copy is no flood.
const PER_BYTE: u64 = 1;
/// Frames between two looks at the clock.
const LOOK: usize = 4;
/// Where a frame takes longer, in nanoseconds, the clock is looked at after each.
const SLOW: u64 = 10_000;

/// What a guest has had of the worker in this round.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    round: Time,
    /// When the present piece of the turn began.
    began: Time,
    /// Time of its earlier pieces, in nanoseconds.
    spent: u64,
    pub frames: usize,
    bytes: usize,
    /// Frames at the next look at the clock, and at the last one; what the clock said then.
    look: usize,
    looked: (usize, u64),
    over: bool,
}

impl Turn {
    /// A turn of one piece.
    pub(crate) fn new(round: Time) -> Turn {
        let mut turn = Turn::default();
        turn.begin(round);
        turn
    }

    /// Begins a turn of round `round`, or goes on with the one of that round.
    pub(crate) fn begin(&mut self, round: Time) {
        if self.round == round && self.look > 0 {
            // Others had the worker in between.
            self.see(self.spent);
        } else {
            *self = Turn { round, look: 1, ..Turn::default() };
        }
        self.began = sys::now();
    }

    /// True while the turn has time, bytes and frames left, of `most`.
    pub(crate) fn goes_on(&mut self, most: usize) -> bool {
        self.frames < most && self.has_time()
    }

    /// The same without a bound of frames.
    pub(crate) fn has_time(&mut self) -> bool {
        if self.frames >= self.look && !self.over {
            self.see(self.elapsed());
        }
        !self.over && self.bytes < BYTES
    }

    fn elapsed(&self) -> u64 {
        self.spent + sys::now().since(self.began)
    }

    /// The turn has taken so many nanoseconds.
    fn see(&mut self, elapsed: u64) {
        let (frames, before) = self.looked;
        let slow = elapsed.saturating_sub(before) > SLOW * (self.frames - frames).max(1) as u64;
        self.look = self.frames + if slow { 1 } else { LOOK };
        self.looked = (self.frames, elapsed);
        self.over = elapsed >= TIME + self.bytes as u64 * PER_BYTE;
    }

    /// A frame, or whatever is counted, of so many bytes was handled.
    pub(crate) fn frame(&mut self, bytes: usize) {
        self.frames += 1;
        self.bytes += bytes;
    }

    /// The end of a piece of the turn: others have the worker before it goes on.
    pub(crate) fn pause(&mut self) {
        self.spent = self.elapsed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Frames that a turn takes when each takes `each` nanoseconds and has `bytes`.
    fn frames(each: u64, bytes: usize) -> (usize, u64) {
        let mut t = Turn { look: 1, ..Turn::default() };
        let mut clock = 0;
        while t.frames < 1000 {
            if t.frames >= t.look {
                t.see(clock);
            }
            if t.over || t.bytes >= BYTES {
                break;
            }
            clock += each;
            t.frame(bytes);
        }
        (t.frames, clock)
    }

    #[test]
    fn slow_frames_end_a_turn_by_time_and_large_ones_by_bytes() {
        let (n, clock) = frames(500, 0);
        assert!((200..=204).contains(&n), "{n} frames, {clock} ns");
        // As slow as opening a flow: late by one frame at most.
        assert_eq!(frames(60_000, 60), (2, 120_000));
        assert_eq!(frames(20_000, 60), (6, 120_000));
        // Bulk.
        assert_eq!(frames(20_000, 64 << 10).0, 8);
    }

    #[test]
    fn a_turn_in_pieces_is_one_turn() {
        let mut t = Turn::default();
        t.begin(Time(7));
        for _ in 0..3 {
            assert!(t.goes_on(4));
            t.frame(60);
        }
        t.pause();
        t.begin(Time(7));
        assert!(t.goes_on(4));
        t.frame(60);
        assert!(!t.goes_on(4));
        t.spent = TIME + BYTES as u64;
        t.begin(Time(7));
        assert!(!t.has_time());
        t.begin(Time(8));
        assert!(t.has_time() && t.frames == 0);
    }
}
