//! Theory of operation: a hierarchical timer wheel (Varghese and Lauck) whose lists run through the records themselves,
//! so arming and disarming are a few stores and nothing is allocated.
//!
//! - Level 0 has a list for each tick of the current 64, level 1 one for each 64 ticks of the current 4096, and so on.
//!   Deadlines beyond the last level are armed at its end, from where they are armed again.
//! - Each list keeps the earliest deadline in it, so [`TimerWheel::next`] is exact and nothing wakes up only to move
//!   records to finer lists. A record that was disarmed may leave that deadline too early, which costs one wake-up.
//! - A record's deadline may have moved since it was armed. [`TimerWheel::pop`] hands records out when their list is
//!   due; the caller arms those again that are not due themselves.
//! - Work can stop after any record, so a million deadlines at once cost no pause.

const BITS: u32 = 6;
const SLOTS: usize = 1 << BITS;
/// No record.
pub const NONE: u32 = u32::MAX;
const UNARMED: u16 = u16::MAX;

/// What the wheel keeps in each record.
#[derive(Debug, Clone, Copy)]
pub struct Links {
    next: u32,
    prev: u32,
    list: u16,
    /// Room that alignment leaves over; the record may use it.
    pub spare: u16,
}

impl Links {
    /// Not armed.
    pub const UNARMED: Links = Links { next: NONE, prev: NONE, list: UNARMED, spare: 0 };

    /// True while the record is on the wheel.
    #[must_use]
    pub fn is_armed(&self) -> bool {
        self.list != UNARMED
    }
}

/// Records that the wheel can run through.
pub trait Records {
    /// The links of a record; `None` for a number out of range.
    fn links(&mut self, record: u32) -> Option<&mut Links>;
}

/// A wheel that keeps delays of up to `64.pow(LEVELS) * 63 / 64` ticks exactly.
#[derive(Debug)]
pub struct TimerWheel<const LEVELS: usize> {
    levels: Box<[Level; LEVELS]>,
    /// All deadlines before this tick have been handed out.
    tick: u64,
}

#[derive(Debug, Clone, Copy)]
struct Level {
    /// Lists that have records.
    filled: u64,
    heads: [u32; SLOTS],
    /// The earliest deadline of each filled list, or an earlier tick.
    earliest: [u64; SLOTS],
}

impl<const LEVELS: usize> TimerWheel<LEVELS> {
    /// The longest delay that is kept exactly.
    pub const MAX_DELAY: u64 = (1 << (BITS * LEVELS as u32)) - (1 << (BITS * (LEVELS as u32 - 1)));

    /// An empty wheel at `tick`.
    #[must_use]
    pub fn new(tick: u64) -> Self {
        let level = Level { filled: 0, heads: [NONE; SLOTS], earliest: [u64::MAX; SLOTS] };
        TimerWheel { levels: Box::new([level; LEVELS]), tick }
    }

    /// Arms a record that is not armed.
    pub fn arm(&mut self, records: &mut impl Records, record: u32, deadline: u64) {
        let deadline = deadline.clamp(self.tick, self.tick.saturating_add(Self::MAX_DELAY));
        // The highest digit in which the deadline differs from the present.
        let level = ((deadline ^ self.tick | 1).ilog2() / BITS).min(LEVELS as u32 - 1);
        let slot = (deadline >> (level * BITS)) as usize % SLOTS;
        let Some(l) = self.levels.get_mut(level as usize) else { return };
        let old = std::mem::replace(&mut l.heads[slot], record);
        l.earliest[slot] = l.earliest[slot].min(deadline);
        l.filled |= 1 << slot;
        if let Some(links) = records.links(record) {
            let list = (level as usize * SLOTS + slot) as u16;
            *links = Links { next: old, prev: NONE, list, spare: links.spare };
        }
        if let Some(links) = records.links(old) {
            links.prev = record;
        }
    }

    /// Disarms a record; nothing happens when it is not armed.
    pub fn disarm(&mut self, records: &mut impl Records, record: u32) {
        let Some(links) = records.links(record) else { return };
        let Links { next, prev, list, spare } = *links;
        *links = Links { spare, ..Links::UNARMED };
        if list == UNARMED {
            return;
        }
        if let Some(n) = records.links(next) {
            n.prev = prev;
        }
        if let Some(p) = records.links(prev) {
            p.next = next;
        } else if let Some(l) = self.levels.get_mut(usize::from(list) / SLOTS) {
            let slot = usize::from(list) % SLOTS;
            l.heads[slot] = next;
            if next == NONE {
                l.filled &= !(1 << slot);
                l.earliest[slot] = u64::MAX;
            }
        }
    }

    /// The first tick at which [`TimerWheel::pop`] has something to hand out.
    #[must_use]
    pub fn next(&self) -> Option<u64> {
        self.first().map(|(at, _)| at)
    }

    /// The list that is due first: its tick, and its first record.
    #[inline]
    fn first(&self) -> Option<(u64, u32)> {
        let mut best: Option<(u64, u32)> = None;
        for (level, l) in self.levels.iter().enumerate() {
            if l.filled == 0 {
                continue;
            }
            // The lists of a level follow each other in time, the present one first.
            let here = (self.tick >> (level as u32 * BITS)) as u32 % SLOTS as u32;
            let slot = (here + l.filled.rotate_right(here).trailing_zeros()) as usize % SLOTS;
            let at = l.earliest[slot];
            if best.is_none_or(|(b, _)| at < b) {
                best = Some((at, l.heads[slot]));
            }
        }
        best
    }

    /// Takes the next record whose list is due at `now` off the wheel. Its own deadline may be later: then the caller
    /// arms it again. `None` when nothing is due.
    pub fn pop(&mut self, records: &mut impl Records, now: u64) -> Option<u32> {
        match self.first() {
            Some((at, record)) if at <= now => {
                self.tick = self.tick.max(at);
                self.disarm(records, record);
                Some(record)
            }
            _ => {
                self.tick = self.tick.max(now);
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Recs(Vec<Links>);
    impl Records for Recs {
        fn links(&mut self, record: u32) -> Option<&mut Links> {
            self.0.get_mut(record as usize)
        }
    }

    proptest! {
        #[test]
        fn hands_out_at_the_deadline_and_not_before(
            start in 0u64..100_000,
            ops in proptest::collection::vec((0u32..30, 0u64..20_000_000, 0u64..3_000_000, any::<bool>()), 1..200),
        ) {
            let mut recs = Recs(vec![Links::UNARMED; 30]);
            let mut wheel = TimerWheel::<4>::new(start);
            let mut due: Vec<Option<u64>> = vec![None; 30];
            let mut now = start;
            for (r, delay, step, moved) in ops {
                if !moved || due[r as usize].is_none() {
                    wheel.disarm(&mut recs, r);
                    wheel.arm(&mut recs, r, now + delay);
                }
                // A deadline that moves later is not armed again.
                due[r as usize] = due[r as usize].filter(|_| moved).max(Some(now + delay));
                now += step;
                while let Some(r) = wheel.pop(&mut recs, now) {
                    let d = due[r as usize];
                    prop_assert!(d.is_some());
                    if d > Some(now) {
                        wheel.arm(&mut recs, r, d.unwrap_or(0));
                    } else {
                        due[r as usize] = None;
                    }
                }
                prop_assert!(due.iter().flatten().all(|d| *d > now));
                prop_assert_eq!(wheel.next().is_some(), due.iter().any(Option::is_some));
                prop_assert!(wheel.next().is_none_or(|n| n > now), "nothing is left that is due");
            }
        }
    }
}
