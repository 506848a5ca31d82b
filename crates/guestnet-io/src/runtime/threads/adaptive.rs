//! Theory of operation: the adaptive polling strategy. After work, a worker polls a little before it sleeps, because a
//! poll that finds something costs less than being woken.
//!
//! - The number of polls doubles when one of them finds something, and halves when none does.
//! - Between two polls other threads may have the processor. Where they keep it, the worker stops polling for a while: a
//!   guest or server that waits for the processor would wait for the worker to stop waiting for it.

use crate::os::sys;
use guestnet_core::types::Time;

/// Polls to begin with.
const FIRST: u32 = 16;
/// A poll that took longer, in nanoseconds: another thread had the processor.
const TAKEN_AWAY: u64 = 30_000;
/// How long there is no polling then, in milliseconds; doubled as long as it stays so.
const CROWDED_MIN: u64 = 2;
const CROWDED_MAX: u64 = 64;

/// How often a worker polls before it sleeps.
#[derive(Debug, Default)]
pub(crate) struct Spinner {
    max: u32,
    /// Polls that are tried now.
    spins: u32,
    /// Other threads want the processor: no polls until then.
    crowded_until: Option<Time>,
    /// How long that is next time, in milliseconds.
    crowded_for: u64,
}

impl Spinner {
    /// Of up to `max` polls.
    pub(crate) fn new(max: u32) -> Spinner {
        Spinner { max, spins: FIRST.min(max), crowded_until: None, crowded_for: CROWDED_MIN }
    }

    /// Polls until `poll` finds something, or long enough.
    pub(crate) fn spin<T>(
        &mut self,
        now: Time,
        mut poll: impl FnMut() -> Result<Option<T>, i32>,
    ) -> Result<Option<T>, i32> {
        if self.crowded_until.is_some_and(|t| now < t) {
            return Ok(None);
        }
        let mut before = sys::now();
        for _ in 0..self.spins {
            if let Some(found) = poll()? {
                self.spins = (self.spins * 2).clamp(1, self.max);
                self.crowded_for = CROWDED_MIN;
                return Ok(Some(found));
            }
            sys::yield_now();
            let now = sys::now();
            if now.since(before) > TAKEN_AWAY {
                self.crowded_until = Some(now.plus_ms(self.crowded_for));
                self.crowded_for = (self.crowded_for * 2).min(CROWDED_MAX);
                return Ok(None);
            }
            before = now;
        }
        self.spins = (self.spins / 2).max(1).min(self.max);
        Ok(None)
    }
}
