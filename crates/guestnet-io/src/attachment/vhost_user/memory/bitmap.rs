//! Theory of operation: one bit for each page of a region. Zero at first, in memory that the system provides only
//! where a bit is set, so that a bitmap for a terabyte that nobody touches costs nothing.

// Zeroed memory that may not be had.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

/// Bits, all of them off at first.
pub(super) struct Bitmap {
    words: NonNull<u64>,
    layout: Layout,
    bits: u64,
}

impl Bitmap {
    /// `None` when there is no memory for it.
    pub(super) fn new(bits: u64) -> Option<Bitmap> {
        let words = usize::try_from(bits.div_ceil(64).max(1)).ok()?;
        let layout = Layout::array::<u64>(words).ok()?;
        // SAFETY: the layout has a size over zero.
        let words = NonNull::new(unsafe { alloc_zeroed(layout) }.cast())?;
        Some(Bitmap { words, layout, bits })
    }

    /// Bit `i`; off where there is none.
    pub(super) fn get(&self, i: u64) -> bool {
        if i >= self.bits {
            return false;
        }
        // SAFETY: less than `bits`, for which there are words.
        let word = unsafe { self.words.add((i / 64) as usize).read() };
        word >> (i % 64) & 1 != 0
    }

    /// Switches bit `i` on, if there is one.
    pub(super) fn set(&mut self, i: u64) {
        if i < self.bits {
            // SAFETY: as in `get`; `&mut self` excludes others.
            unsafe {
                let word = self.words.add((i / 64) as usize);
                word.write(word.read() | 1 << (i % 64));
            }
        }
    }
}

impl Drop for Bitmap {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `new`.
        unsafe { dealloc(self.words.as_ptr().cast(), self.layout) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_off_until_they_are_set() {
        let mut b = Bitmap::new(130).unwrap();
        assert!((0..200).all(|i| !b.get(i)));
        for i in [0, 63, 64, 129, 130, u64::MAX] {
            b.set(i);
        }
        let on: Vec<u64> = (0..200).filter(|i| b.get(*i)).collect();
        assert_eq!(on, [0, 63, 64, 129]);
    }
}
