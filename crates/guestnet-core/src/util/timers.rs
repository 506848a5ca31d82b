//! Theory of operation: a timer for each of a number of indices, on one [`TimerWheel`]. The links and deadlines lie here
//! and not in the records of the owner, so setting one touches no record.
//!
//! The owner reschedules lazily: it leaves a timer alone when the deadline moves back, and sets it again when it fires.

use crate::util::timer_wheel::{Links, Records, TimerWheel};

/// Levels of the wheel: 64 to the power of 7 milliseconds are 139 years.
const LEVELS: usize = 7;

#[derive(Clone, Copy)]
struct Timer {
    links: Links,
    deadline: u64,
}

struct All(Vec<Timer>);

impl Records for All {
    #[inline]
    fn links(&mut self, record: u32) -> Option<&mut Links> {
        self.0.get_mut(record as usize).map(|t| &mut t.links)
    }
}

/// See the module head.
pub struct Timers {
    wheel: TimerWheel<LEVELS>,
    all: All,
}

impl Timers {
    /// No timers, at `now` milliseconds.
    #[must_use]
    pub fn new(now: u64) -> Timers {
        Timers { wheel: TimerWheel::new(now), all: All(Vec::new()) }
    }

    /// When the timer of `index` is to fire, if it is set.
    #[must_use]
    pub fn deadline(&self, index: u32) -> Option<u64> {
        self.all.0.get(index as usize).filter(|t| t.links.is_armed()).map(|t| t.deadline)
    }

    /// Sets or moves the timer of `index` to `deadline` milliseconds.
    pub fn set(&mut self, index: u32, deadline: u64) {
        let at = index as usize;
        if at >= self.all.0.len() {
            self.all.0.resize(at + 1, Timer { links: Links::UNARMED, deadline: 0 });
        }
        self.wheel.disarm(&mut self.all, index);
        if let Some(t) = self.all.0.get_mut(at) {
            t.deadline = deadline;
        }
        self.wheel.arm(&mut self.all, index, deadline);
    }

    /// Takes the timer of `index` out, if it is set.
    pub fn cancel(&mut self, index: u32) {
        self.wheel.disarm(&mut self.all, index);
    }

    /// The earliest deadline, in milliseconds.
    #[must_use]
    pub fn next(&self) -> Option<u64> {
        self.wheel.next()
    }

    /// Takes out all timers with `deadline <= now` and appends their indices to `out`.
    pub fn expire(&mut self, now: u64, out: &mut Vec<u32>) {
        while let Some(index) = self.wheel.pop(&mut self.all, now) {
            match self.all.0.get(index as usize).map(|t| t.deadline) {
                Some(deadline) if deadline > now => self.wheel.arm(&mut self.all, index, deadline),
                _ => out.push(index),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[test]
    fn one_timer_one_wake_up() {
        let mut t = Timers::new(5);
        t.set(3, 300_005);
        assert_eq!(t.next(), Some(300_005));
        let mut out = Vec::new();
        t.expire(300_004, &mut out);
        assert!(out.is_empty() && t.next() == Some(300_005));
        t.expire(300_005, &mut out);
        assert_eq!((out.as_slice(), t.next()), ([3u32].as_slice(), None));
    }

    proptest! {
        // The timers against a sorted map, with the same operations.
        #[test]
        fn same_as_a_sorted_map(
            ops in proptest::collection::vec((0u8..4, 0u32..40, 0u64..1_000_000_000, 0u32..30), 1..300),
        ) {
            let mut t = Timers::new(1000);
            let mut model: BTreeMap<u32, u64> = BTreeMap::new();
            let mut now = 1000u64;
            for (op, index, delta, shift) in ops {
                match op {
                    0 | 1 => {
                        let at = now + (delta >> shift);
                        t.set(index, at);
                        model.insert(index, at);
                    }
                    2 => {
                        t.cancel(index);
                        model.remove(&index);
                    }
                    _ => {
                        now += delta >> shift;
                        let mut out = Vec::new();
                        t.expire(now, &mut out);
                        out.sort_unstable();
                        let due: Vec<u32> = model.iter().filter(|(_, d)| **d <= now).map(|(i, _)| *i).collect();
                        prop_assert_eq!(&out, &due);
                        model.retain(|_, d| *d > now);
                    }
                }
                for (i, d) in &model {
                    prop_assert_eq!(t.deadline(*i), Some(*d));
                }
                // Never late; early only by what a cancelled timer left behind.
                match (t.next(), model.values().min()) {
                    (Some(n), Some(m)) => prop_assert!(n <= *m),
                    (None, m) => prop_assert!(m.is_none()),
                    (Some(_), None) => prop_assert!(false, "a wake-up for nothing"),
                }
            }
        }
    }
}
