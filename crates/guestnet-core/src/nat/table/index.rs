//! Theory of operation: an open-addressed index of u32 slots into records kept elsewhere. A slot holds the
//! record number plus one (24 bits, 0 for empty), how far it is from its home slot (4 bits, 15 for "15 or
//! more") and 4 bits of hash, so that a probe rarely touches a record in vain, and removal, which shifts the
//! cluster back and leaves no tombstones, hardly ever touches one at all. It is sized once for the most
//! records there can be, at most half full: it never grows, so no packet ever pays for a rehash.

/// The most records that an index can name.
pub const MAX_RECORDS: usize = (1 << 24) - 2;
/// Bytes of the smallest page of memory, and of the next larger.
const PAGE: usize = 4096;
const LARGE_PAGE: usize = 2 << 20;
const MASK: u32 = 0x00ff_ffff;
/// "This far from home or more."
const FAR: u32 = 15;

/// See the module head.
#[derive(Debug)]
pub struct Index {
    /// The slots, from `first` on. Large ones start at the border of a large page, or a good part of them could not
    /// lie in large pages.
    memory: Vec<u32>,
    first: usize,
    mask: usize,
}

impl Index {
    /// An index for at most `records` records. Zeroed memory comes as untouched pages.
    #[must_use]
    pub fn new(records: usize) -> Index {
        let n = (records.clamp(1, MAX_RECORDS) * 2).next_power_of_two();
        let spare = if n * 4 >= LARGE_PAGE { LARGE_PAGE / 4 } else { 0 };
        let memory = vec![0; n + spare];
        let first = if spare == 0 { 0 } else { memory.as_ptr().addr().wrapping_neg() % LARGE_PAGE / 4 };
        Index { memory, first, mask: n - 1 }
    }

    #[inline(always)]
    fn slot(&self, at: usize) -> u32 {
        self.memory.get(self.first + at).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn slot_mut(&mut self, at: usize) -> Option<&mut u32> {
        self.memory.get_mut(self.first + at)
    }

    fn slots(&self) -> &[u32] {
        self.memory.get(self.first..=self.first + self.mask).unwrap_or(&[])
    }

    /// Touches all of its memory.
    pub(crate) fn prefault(&mut self) {
        for slot in self.memory.iter_mut().skip(self.first).take(self.mask + 1).step_by(PAGE / 4) {
            *slot = std::hint::black_box(*slot);
        }
    }

    /// Address and length in bytes of its memory.
    pub(crate) fn range(&self) -> (usize, usize) {
        (self.slots().as_ptr().addr(), self.memory())
    }

    /// Bytes that it takes.
    #[must_use]
    pub fn memory(&self) -> usize {
        (self.mask + 1) * 4
    }

    /// The slot where `hash` starts: a record number whose tag matches, or a reason to probe.
    #[inline(always)]
    pub(crate) fn first(&self, hash: u64) -> u32 {
        self.slot(hash as usize & self.mask)
    }

    /// The slot that most likely is that of `hash`, from where it starts; 0 when there certainly is none. Reads
    /// no record.
    #[inline(always)]
    pub(crate) fn likely(&self, hash: u64, first: u32) -> u32 {
        let tag = tag(hash);
        let mut slot = first;
        let mut at = hash as usize & self.mask;
        let mut distance = 0;
        while slot != 0 && slot & !MASK != tag | distance << 24 {
            at = (at + 1) & self.mask;
            distance = (distance + 1).min(FAR);
            slot = self.slot(at);
        }
        slot
    }

    /// The record that a slot names, where there is one.
    #[inline(always)]
    pub(crate) fn record(slot: u32) -> Option<u32> {
        (slot & MASK).checked_sub(1)
    }

    /// A slot that names a record, for [`Index::record`].
    #[inline(always)]
    pub(crate) fn naming(record: u32) -> u32 {
        record + 1
    }

    /// The record with this hash that `same` confirms.
    #[inline]
    pub fn find(&self, hash: u64, mut same: impl FnMut(u32) -> bool) -> Option<u32> {
        let tag = tag(hash);
        let mut at = hash as usize & self.mask;
        let mut distance = 0;
        loop {
            let slot = self.slot(at);
            let record = Self::record(slot)?;
            if slot & !MASK == tag | distance << 24 && same(record) {
                return Some(record);
            }
            at = (at + 1) & self.mask;
            distance = (distance + 1).min(FAR);
        }
    }

    /// Adds a record; the caller has made sure that it is not there and that the index is not over-full.
    #[inline]
    pub fn insert(&mut self, hash: u64, record: u32) {
        let mut at = hash as usize & self.mask;
        let mut distance = 0;
        while let Some(slot) = self.slot_mut(at) {
            if *slot == 0 {
                *slot = tag(hash) | distance << 24 | (record + 1);
                return;
            }
            at = (at + 1) & self.mask;
            distance = (distance + 1).min(FAR);
        }
    }

    /// Removes a record. `hash_of` gives the hash of any record in the index.
    pub fn remove(&mut self, hash: u64, record: u32, hash_of: impl Fn(u32) -> u64) {
        let mut at = hash as usize & self.mask;
        loop {
            match self.slot(at) {
                s if s & MASK == record + 1 => break,
                0 => return,
                _ => at = (at + 1) & self.mask,
            }
        }
        // Fill the hole with the next of the cluster whose home is not past the hole.
        let mut next = at;
        loop {
            next = (next + 1) & self.mask;
            let slot = self.slot(next);
            let Some(r) = Self::record(slot) else { break };
            let distance = match slot >> 24 & 15 {
                FAR => next.wrapping_sub(hash_of(r) as usize) & self.mask,
                d => d as usize,
            };
            let hole = next.wrapping_sub(at) & self.mask;
            if distance >= hole {
                if let Some(h) = self.slot_mut(at) {
                    *h = slot & !(FAR << 24) | ((distance - hole) as u32).min(FAR) << 24;
                }
                at = next;
            }
        }
        if let Some(hole) = self.slot_mut(at) {
            *hole = 0;
        }
    }

    /// The longest run of filled slots: what the unluckiest look-up costs.
    #[must_use]
    pub fn longest_run(&self) -> usize {
        let (mut best, mut run) = (0, 0);
        for s in self.slots() {
            run = if *s == 0 { 0 } else { run + 1 };
            best = best.max(run);
        }
        best
    }
}

#[inline(always)]
fn tag(hash: u64) -> u32 {
    ((hash >> 32) as u32) & 0xf000_0000
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        #[test]
        fn behaves_as_a_map(ops in proptest::collection::vec((any::<bool>(), 0u32..40), 1..600), clash in 1u64..20) {
            // Few distinct hashes force long clusters that wrap round the end.
            let hash = |r: u32| (u64::from(r) % clash).wrapping_mul(0x0100_0000_0000_003b).wrapping_sub(3);
            let mut index = Index::new(40);
            if clash % 2 == 0 {
                index.prefault();
            }
            let mut model: HashMap<u32, ()> = HashMap::new();
            for (add, r) in ops {
                if add {
                    if model.insert(r, ()).is_none() {
                        index.insert(hash(r), r);
                    }
                } else {
                    model.remove(&r);
                    index.remove(hash(r), r, hash);
                }
                for k in 0..40 {
                    prop_assert_eq!(index.find(hash(k), |x| x == k).is_some(), model.contains_key(&k));
                }
            }
        }
    }

    #[test]
    fn large_ones_begin_at_a_large_page() {
        let mut index = Index::new(1 << 18);
        index.prefault();
        let (start, len) = index.range();
        assert_eq!((start % LARGE_PAGE, len), (0, 2 << 20));
        // The last slots and the first, past the end.
        for r in 0..3 {
            index.insert((1 << 19) - 2, r);
        }
        assert_eq!((index.slot((1 << 19) - 1) & MASK, index.slot(0) & MASK), (2, 3));
        assert_eq!(index.longest_run(), 2);
        for r in 0..3 {
            assert_eq!(index.find((1 << 19) - 2, |x| x == r), Some(r));
        }
    }
}
