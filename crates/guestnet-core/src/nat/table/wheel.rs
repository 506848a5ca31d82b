//! Theory of operation: a hierarchical timer wheel whose lists run through the records themselves (next and
//! previous), so arming, disarming and moving are a few stores and nothing is allocated. Four levels of 64
//! slots cover 2^24 ticks. A record's deadline may have moved later since it was armed: whoever is handed the
//! record looks and arms it again. Work is done in slices of the caller's choosing and can stop anywhere, so
//! a million deadlines at once cost no pause.

const LEVELS: usize = 4;
const BITS: u32 = 6;
const SLOTS: usize = 1 << BITS;
/// No record, no slot.
pub const NONE: u32 = u32::MAX;
const UNARMED: u16 = u16::MAX;
/// The longest delay in ticks that the wheel keeps exactly; longer ones come round early and are armed again.
pub const MAX_DELAY: u32 = (1 << (BITS * LEVELS as u32)) - SLOTS as u32 * SLOTS as u32 * SLOTS as u32;

/// What the wheel keeps in each record.
#[derive(Debug, Clone, Copy)]
pub struct Links {
    next: u32,
    prev: u32,
    slot: u16,
    /// Room that alignment leaves over; the record may use it.
    pub spare: u16,
}

impl Links {
    /// Not armed.
    pub const UNARMED: Links = Links { next: NONE, prev: NONE, slot: UNARMED, spare: 0 };

    /// True while the record is on the wheel.
    #[must_use]
    pub fn is_armed(&self) -> bool {
        self.slot != UNARMED
    }
}

/// Records that the wheel can run through.
pub trait Records {
    /// The links of a record; `None` for a number out of range.
    fn links(&mut self, record: u32) -> Option<&mut Links>;
}

/// See the module head.
#[derive(Debug)]
pub struct Wheel {
    heads: Vec<u32>,
    filled: [u64; LEVELS],
    /// All deadlines before this tick have been handed out.
    tick: u32,
}

impl Wheel {
    /// An empty wheel at `tick`.
    #[must_use]
    pub fn new(tick: u32) -> Wheel {
        Wheel { heads: vec![NONE; LEVELS * SLOTS], filled: [0; LEVELS], tick }
    }

    /// Arms a record that is not armed.
    pub fn arm(&mut self, records: &mut impl Records, record: u32, deadline: u32) {
        let deadline = deadline.clamp(self.tick, self.tick.saturating_add(MAX_DELAY));
        let differ = deadline ^ self.tick;
        let level =
            if differ == 0 { 0 } else { ((31 - differ.leading_zeros()) / BITS).min(LEVELS as u32 - 1) };
        let in_level = (deadline >> (level * BITS)) as usize % SLOTS;
        let slot = level as usize * SLOTS + in_level;
        let Some(head) = self.heads.get_mut(slot) else { return };
        let old = std::mem::replace(head, record);
        if let Some(l) = records.links(record) {
            *l = Links { next: old, prev: NONE, slot: slot as u16, spare: l.spare };
        }
        if let Some(l) = records.links(old) {
            l.prev = record;
        }
        if let Some(f) = self.filled.get_mut(level as usize) {
            *f |= 1 << in_level;
        }
    }

    /// Disarms a record; nothing when it is not armed.
    pub fn disarm(&mut self, records: &mut impl Records, record: u32) {
        let Some(l) = records.links(record) else { return };
        let Links { next, prev, slot, spare } = *l;
        *l = Links { spare, ..Links::UNARMED };
        if slot == UNARMED {
            return;
        }
        if let Some(n) = records.links(next) {
            n.prev = prev;
        }
        if let Some(p) = records.links(prev) {
            p.next = next;
        } else if let Some(head) = self.heads.get_mut(usize::from(slot)) {
            *head = next;
            if next == NONE
                && let Some(f) = self.filled.get_mut(usize::from(slot) / SLOTS)
            {
                *f &= !(1 << (usize::from(slot) % SLOTS));
            }
        }
    }

    /// The earliest tick at which there is something to do: a deadline, or a list to be spread out.
    #[must_use]
    pub fn next(&self) -> Option<u32> {
        let mut best: Option<u32> = None;
        for (level, filled) in self.filled.iter().enumerate() {
            if *filled == 0 {
                continue;
            }
            let shift = level as u32 * BITS;
            let here = (self.tick >> shift) as usize % SLOTS;
            let ahead = filled.rotate_right(here as u32).trailing_zeros();
            let base = (self.tick >> shift).wrapping_add(ahead) << shift;
            let at = base.max(self.tick);
            best = Some(best.map_or(at, |b| b.min(at)));
        }
        best
    }

    /// Takes the next record whose list is due at `now` off the wheel. Its own deadline may still be later: then
    /// the caller arms it again (that is also how records move down the levels). `None` when nothing is due.
    pub fn pop(&mut self, records: &mut impl Records, now: u32) -> Option<u32> {
        let at = match self.next() {
            Some(at) if at <= now => at,
            _ => {
                self.tick = self.tick.max(now);
                return None;
            }
        };
        self.tick = at;
        for level in 0..LEVELS {
            let slot = level * SLOTS + (at >> (level as u32 * BITS)) as usize % SLOTS;
            let head = self.heads.get(slot).copied().unwrap_or(NONE);
            if head != NONE {
                self.disarm(records, head);
                return Some(head);
            }
        }
        None
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
            start in 0u32..100_000,
            ops in proptest::collection::vec((0u32..30, 0u32..20_000_000, 0u32..3_000_000), 1..200),
        ) {
            let mut recs = Recs(vec![Links::UNARMED; 30]);
            let mut wheel = Wheel::new(start);
            let mut due: Vec<Option<u32>> = vec![None; 30];
            let mut now = start;
            for (r, delay, step) in ops {
                wheel.disarm(&mut recs, r);
                let delay = delay.min(MAX_DELAY);
                wheel.arm(&mut recs, r, now + delay);
                due[r as usize] = Some(now + delay);
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
            }
        }
    }
}
