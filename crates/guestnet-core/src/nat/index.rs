//! Theory of operation: an open-addressed index of u32 slots into records kept elsewhere. A slot holds the
//! record number plus one (24 bits, 0 for empty) and 8 bits of hash, so that a probe rarely touches a record
//! in vain. It is sized once for the most records there can be, at most half full: it never grows, so no
//! packet ever pays for a rehash. Removal shifts the cluster back; there are no tombstones.

/// The most records that an index can name.
pub const MAX_RECORDS: usize = (1 << 24) - 2;
const MASK: u32 = 0x00ff_ffff;

/// See the module head.
#[derive(Debug)]
pub struct Index {
    slots: Vec<u32>,
    mask: usize,
}

impl Index {
    /// An index for at most `records` records.
    #[must_use]
    pub fn new(records: usize) -> Index {
        let n = (records.clamp(1, MAX_RECORDS) * 2).next_power_of_two();
        Index { slots: vec![0; n], mask: n - 1 }
    }

    /// Bytes that it takes.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.slots.len() * 4
    }

    /// The slot where `hash` starts: a record number whose tag matches, or a reason to probe.
    #[inline(always)]
    pub(crate) fn first(&self, hash: u64) -> u32 {
        self.slots.get(hash as usize & self.mask).copied().unwrap_or(0)
    }

    /// The record that a slot names, where there is one.
    #[inline(always)]
    pub(crate) fn record(slot: u32) -> Option<u32> {
        (slot & MASK).checked_sub(1)
    }

    /// The record with this hash that `same` confirms.
    #[inline]
    pub fn find(&self, hash: u64, mut same: impl FnMut(u32) -> bool) -> Option<u32> {
        let tag = tag(hash);
        let mut at = hash as usize & self.mask;
        loop {
            let slot = self.slots.get(at).copied().unwrap_or(0);
            let record = Self::record(slot)?;
            if slot & !MASK == tag && same(record) {
                return Some(record);
            }
            at = (at + 1) & self.mask;
        }
    }

    /// Adds a record; the caller has made sure that it is not there and that the index is not over-full.
    #[inline]
    pub fn insert(&mut self, hash: u64, record: u32) {
        let mut at = hash as usize & self.mask;
        while let Some(slot) = self.slots.get_mut(at) {
            if *slot == 0 {
                *slot = tag(hash) | (record + 1);
                return;
            }
            at = (at + 1) & self.mask;
        }
    }

    /// Removes a record. `hash_of` gives the hash of any record in the index.
    pub fn remove(&mut self, hash: u64, record: u32, hash_of: impl Fn(u32) -> u64) {
        let wanted = tag(hash) | (record + 1);
        let mut at = hash as usize & self.mask;
        loop {
            match self.slots.get(at) {
                Some(s) if *s == wanted => break,
                Some(0) | None => return,
                _ => at = (at + 1) & self.mask,
            }
        }
        // Fill the hole with the next of the cluster that may live there (its home is not past the hole).
        let mut next = at;
        loop {
            next = (next + 1) & self.mask;
            let slot = self.slots.get(next).copied().unwrap_or(0);
            let Some(r) = Self::record(slot) else { break };
            let home = hash_of(r) as usize & self.mask;
            if next.wrapping_sub(home) & self.mask >= next.wrapping_sub(at) & self.mask {
                if let Some(hole) = self.slots.get_mut(at) {
                    *hole = slot;
                }
                at = next;
            }
        }
        if let Some(hole) = self.slots.get_mut(at) {
            *hole = 0;
        }
    }

    /// The longest run of filled slots: what the unluckiest look-up costs.
    #[must_use]
    pub fn longest_run(&self) -> usize {
        let (mut best, mut run) = (0, 0);
        for s in &self.slots {
            run = if *s == 0 { 0 } else { run + 1 };
            best = best.max(run);
        }
        best
    }
}

#[inline(always)]
fn tag(hash: u64) -> u32 {
    ((hash >> 32) as u32) & !MASK
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        #[test]
        fn behaves_as_a_map(ops in proptest::collection::vec((any::<bool>(), 0u32..40), 1..400), clash in 1u64..20) {
            // Few distinct hashes force long clusters that wrap round the end.
            let hash = |r: u32| (u64::from(r) % clash).wrapping_mul(0x0100_0000_0000_003b).wrapping_sub(3);
            let mut index = Index::new(40);
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
}
