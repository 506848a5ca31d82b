//! Theory of operation: which front-ends make their worker wait. A worker that slept in a long round measures
//! each touch of guest memory for a while. A front-end for which the thread slept gets, with all others of its
//! listener, a thread of its own.

use crate::attachment::quota::Quota;
use crate::os::sys;
use guestnet_core::types::Time;
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// A worker that slept in a round that took longer, in nanoseconds, looks for the front-end that made it wait.
pub(crate) const LONG_ROUND: u64 = 10_000_000;
/// After a round that took longer, in nanoseconds, no second one is waited for where only one can be the cause.
pub(super) const VERY_LONG_ROUND: u64 = 250_000_000;
/// Rounds in a row without waiting after which it is looked how often the thread has slept.
const ROUNDS: u64 = 32;
/// What one front-end makes the worker wait at most, in nanoseconds.
pub(super) const STALL: u64 = 5_000_000;
/// How long front-ends are looked at after a long round, in seconds; doubled each time.
pub(super) const WATCH_S: u64 = 10;
const WATCH_MAX_S: u64 = 86_400;

/// What is known of all front-ends that come to one listener, or to one port.
#[derive(Debug)]
pub(crate) struct FrontEnds {
    /// What they hold.
    pub quota: Arc<Quota>,
    /// One of them made a worker wait: all have threads of their own.
    pub(super) stalled: AtomicBool,
    /// Until when they are looked at, and for how many seconds next time. 0: they are not.
    pub(super) watched_until: AtomicU64,
    watch_s: AtomicU64,
}

impl FrontEnds {
    pub(crate) fn new(quota: Arc<Quota>) -> Arc<FrontEnds> {
        let (stalled, watched_until) = (AtomicBool::new(false), AtomicU64::new(0));
        Arc::new(FrontEnds { quota, stalled, watched_until, watch_s: AtomicU64::new(WATCH_S) })
    }

    /// A round took long at `now`, and one of these may be why. Returns until when they are looked at.
    pub(super) fn suspect(&self, now: Time) -> Time {
        let seconds = self.watch_s.load(Ordering::Relaxed);
        self.watch_s.store((seconds * 2).min(WATCH_MAX_S), Ordering::Relaxed);
        let until = now.plus_s(seconds);
        self.watched_until.fetch_max(until.0, Ordering::Relaxed);
        until
    }

    /// One of these made a worker wait.
    pub(super) fn convict(&self) {
        self.stalled.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_stalled(&self) -> bool {
        self.stalled.load(Ordering::Relaxed)
    }
}

thread_local! {
    /// Rounds of this thread, and how often it had slept when the last one began.
    pub(super) static ROUND: Cell<u64> = const { Cell::new(0) };
    static SLEPT: Cell<i64> = const { Cell::new(0) };
}

/// A round of a worker begins that has front-ends. `slept`: it may have waited for something to do since the last one.
pub(crate) fn begin_round(slept: bool) {
    let round = ROUND.get() + 1;
    ROUND.set(round);
    // Now and then all the same: other calls sleep too.
    if slept || round.is_multiple_of(ROUNDS) {
        SLEPT.set(sys::times_slept());
    }
}

/// A round took `took` nanoseconds until `now`, and the thread slept in it. `touched` are those whose memory was
/// touched. Returns until when they are looked at.
pub(crate) fn after_long_round<'a>(
    now: Time,
    took: u64,
    touched: impl Iterator<Item = &'a Arc<FrontEnds>>,
) -> Option<Time> {
    let touched: Vec<_> = touched.collect();
    let first = touched.first()?;
    if took >= VERY_LONG_ROUND && touched.iter().all(|t| Arc::ptr_eq(t, first)) {
        first.convict();
    }
    touched.iter().map(|t| t.suspect(now)).max()
}

/// True when this thread has slept since the round began or this was asked last.
pub(crate) fn has_slept() -> bool {
    let slept = sys::times_slept();
    SLEPT.replace(slept) != slept
}
