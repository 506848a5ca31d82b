//! Theory of operation: a hashed hierarchical timer wheel (Varghese and Lauck) over slot numbers of the flow
//! table. Each slot number is in at most one list, so memory is one link per flow and moving a timer costs a
//! few writes. Ticks are milliseconds; seven levels of 64 slots reach 139 years.
//!
//! A list also keeps the earliest deadline in it, so [`Wheel::next`] is exact and nothing wakes up only to
//! cascade. The owner reschedules lazily: it leaves an earlier timer alone when a deadline moves back, and
//! sets it again when it fires. A removed timer may leave the list's minimum too early, which costs at most
//! one idle wake-up per removal.

const LEVELS: usize = 7;
const SLOTS: usize = 64;
const NONE: u32 = u32::MAX;
const UNUSED: u16 = u16::MAX;

#[derive(Clone, Copy)]
struct Link {
    next: u32,
    prev: u32,
    list: u16,
    deadline: u64,
}

/// The wheel. See the module head.
pub struct Wheel {
    now: u64,
    links: Vec<Link>,
    heads: Box<[u32; LEVELS * SLOTS]>,
    mins: Box<[u64; LEVELS * SLOTS]>,
    occupied: [u64; LEVELS],
}

impl Wheel {
    /// An empty wheel at `now` milliseconds.
    #[must_use]
    pub fn new(now: u64) -> Wheel {
        Wheel {
            now,
            links: Vec::new(),
            heads: Box::new([NONE; LEVELS * SLOTS]),
            mins: Box::new([u64::MAX; LEVELS * SLOTS]),
            occupied: [0; LEVELS],
        }
    }

    /// When the timer of `index` is to fire, if it is set.
    #[must_use]
    pub fn deadline(&self, index: u32) -> Option<u64> {
        self.links.get(index as usize).filter(|l| l.list != UNUSED).map(|l| l.deadline)
    }

    /// Sets or moves the timer of `index` to `deadline` milliseconds.
    pub fn set(&mut self, index: u32, deadline: u64) {
        self.cancel(index);
        let i = index as usize;
        if i >= self.links.len() {
            self.links.resize(i + 1, Link { next: NONE, prev: NONE, list: UNUSED, deadline: 0 });
        }
        // A deadline in the past sits in the current slot, where the next expiry finds it.
        let list = self.list_of(deadline.max(self.now));
        let head = self.heads[list];
        self.links[i] = Link { next: head, prev: NONE, list: list as u16, deadline };
        if let Some(h) = self.links.get_mut(head as usize) {
            h.prev = index;
        }
        self.heads[list] = index;
        self.mins[list] = self.mins[list].min(deadline);
        self.occupied[list / SLOTS] |= 1 << (list % SLOTS);
    }

    /// Takes the timer of `index` out, if it is set.
    pub fn cancel(&mut self, index: u32) {
        let Some(&l) = self.links.get(index as usize) else { return };
        if l.list == UNUSED {
            return;
        }
        let list = usize::from(l.list);
        match self.links.get_mut(l.prev as usize) {
            Some(p) => p.next = l.next,
            None => self.heads[list] = l.next,
        }
        if let Some(n) = self.links.get_mut(l.next as usize) {
            n.prev = l.prev;
        }
        self.links[index as usize].list = UNUSED;
        if self.heads[list] == NONE {
            self.empty(list);
        }
    }

    /// The earliest deadline, in milliseconds.
    #[must_use]
    pub fn next(&self) -> Option<u64> {
        (0..LEVELS).filter_map(|level| self.first(level)).map(|list| self.mins[list]).min()
    }

    /// Takes out all timers with `deadline <= now` and appends their indices to `out`.
    pub fn expire(&mut self, now: u64, out: &mut Vec<u32>) {
        let from = out.len();
        for level in 0..LEVELS {
            while let Some(list) = self.first(level) {
                if self.mins[list] > now {
                    break;
                }
                let mut at = self.heads[list];
                while let Some(l) = self.links.get_mut(at as usize) {
                    l.list = UNUSED;
                    out.push(at);
                    at = l.next;
                }
                self.empty(list);
            }
        }
        self.now = self.now.max(now);
        // What shared a list with something due goes back, now in a finer list.
        let mut keep = from;
        for i in from..out.len() {
            let index = out[i];
            let deadline = self.links[index as usize].deadline;
            if deadline > now {
                self.set(index, deadline);
            } else {
                out[keep] = index;
                keep += 1;
            }
        }
        out.truncate(keep);
    }

    fn empty(&mut self, list: usize) {
        self.heads[list] = NONE;
        self.mins[list] = u64::MAX;
        self.occupied[list / SLOTS] &= !(1 << (list % SLOTS));
    }

    /// The finest level whose 64 slots, seen from the present, reach the deadline.
    fn list_of(&self, deadline: u64) -> usize {
        for level in 0..LEVELS {
            let shift = 6 * level as u32;
            if (deadline >> shift) - (self.now >> shift) < SLOTS as u64 {
                return level * SLOTS + (deadline >> shift) as usize % SLOTS;
            }
        }
        // Beyond the last level: its farthest slot, from where it is placed again.
        let shift = 6 * (LEVELS as u32 - 1);
        (LEVELS - 1) * SLOTS + ((self.now >> shift) as usize + SLOTS - 1) % SLOTS
    }

    /// The first list of a level that holds something, in order of time.
    fn first(&self, level: usize) -> Option<usize> {
        let occupied = self.occupied[level];
        if occupied == 0 {
            return None;
        }
        let at = (self.now >> (6 * level as u32)) as u32 % SLOTS as u32;
        let ahead = occupied.rotate_right(at).trailing_zeros();
        Some(level * SLOTS + ((at + ahead) as usize) % SLOTS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[test]
    fn one_timer_one_wake_up() {
        let mut w = Wheel::new(5);
        w.set(3, 300_005);
        assert_eq!(w.next(), Some(300_005));
        let mut out = Vec::new();
        w.expire(300_004, &mut out);
        assert!(out.is_empty() && w.next() == Some(300_005));
        w.expire(300_005, &mut out);
        assert_eq!((out.as_slice(), w.next()), ([3u32].as_slice(), None));
    }

    proptest! {
        // The wheel against a sorted map, with the same operations.
        #[test]
        fn same_as_a_sorted_map(
            ops in proptest::collection::vec((0u8..4, 0u32..40, 0u64..1_000_000_000, 0u32..30), 1..300),
        ) {
            let mut w = Wheel::new(1000);
            let mut model: BTreeMap<u32, u64> = BTreeMap::new();
            let mut now = 1000u64;
            for (op, index, delta, shift) in ops {
                match op {
                    0 | 1 => {
                        let at = now + (delta >> shift);
                        w.set(index, at);
                        model.insert(index, at);
                    }
                    2 => {
                        w.cancel(index);
                        model.remove(&index);
                    }
                    _ => {
                        now += delta >> shift;
                        let mut out = Vec::new();
                        w.expire(now, &mut out);
                        out.sort_unstable();
                        let due: Vec<u32> = model.iter().filter(|(_, d)| **d <= now).map(|(i, _)| *i).collect();
                        prop_assert_eq!(&out, &due);
                        model.retain(|_, d| *d > now);
                    }
                }
                for (i, d) in &model {
                    prop_assert_eq!(w.deadline(*i), Some(*d));
                }
                // Never late; early only by what a cancelled timer left behind.
                match (w.next(), model.values().min()) {
                    (Some(n), Some(m)) => prop_assert!(n <= *m),
                    (None, m) => prop_assert!(m.is_none()),
                    (Some(_), None) => prop_assert!(false, "a wake-up for nothing"),
                }
            }
        }
    }
}
