//! Theory of operation: fewer ACKs in a long upload. Each ACK costs the guest a notification, an interrupt and a
//! walk through its stack, and where the batches of a worker are short (a virtual machine whose frames come one
//! by one) there would be one for every frame. So after a batch the ACK waits for more, up to so many bytes; how
//! many is found as TCP finds its window. It grows while the guest goes on sending without it, at first quickly;
//! when the guest stops for want of it, a timer of a millisecond sends it, and there is half as much and slow
//! growth from then on. A guest that pauses by itself (its last data was pushed) is not held against it.

use crate::interface::types::Time;
use crate::relay::tcp::{FLOW_BUFFER, State, Tcb};

/// Below this no ACK waits: batches are as long by themselves.
pub(super) const LEAST: u32 = 16 << 10;
/// At most this goes without an ACK, of a window of [`FLOW_BUFFER`].
pub(super) const MOST: u32 = FLOW_BUFFER / 4;
/// How long an ACK waits, in milliseconds.
const WAIT_MS: u64 = 1;
/// Growth for what is acknowledged, as a shift: before the guest stopped for the first time, and after.
const QUICK: u32 = 4;
const SLOW: u32 = 7;

impl Tcb {
    /// Whether the ACK that is due waits for more data; starts its timer then. To be asked when it would be sent.
    pub(super) fn ack_is_thinned(&mut self, now: Time) -> bool {
        let bytes = self.rcv_nxt.since(self.last_ack);
        let most = self.ack_every.min(self.window_max() / 4);
        let bulk = self.state == State::Open && !self.guest_fin && self.buffer.is_none();
        if bulk && self.timeouts.ack_delay_ms > 0 && most >= LEAST && bytes < most {
            if !self.thinned {
                // Sooner than what waits for an answer.
                self.ack_at = Some(now.plus_ms(WAIT_MS));
                self.thinned = true;
            }
            return true;
        }
        let shift = if self.ack_every < self.ack_slowly { QUICK } else { SLOW };
        self.ack_every = self.ack_every.saturating_add(bytes >> shift).min(MOST);
        false
    }

    /// Nothing came while an ACK waited for more.
    pub(super) fn thinned_too_far(&mut self) {
        self.thinned = false;
        if self.ack_pending && !self.pushed {
            self.ack_every /= 2;
            self.ack_slowly = self.ack_every;
        }
    }
}
