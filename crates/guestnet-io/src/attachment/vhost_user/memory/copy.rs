//! Theory of operation: copies from and to memory that a guest may change meanwhile. To the compiler an ordinary copy
//! is of memory that nobody else writes, and it may read it twice; these are done in assembly, or word by word with
//! volatile accesses, so that each byte is touched once and what arrives are bytes of some value.

// Raw pointers to shared memory.
#![allow(unsafe_code)]

/// Copies `len` bytes.
///
/// # Safety
/// `from` is readable and `to` writable for `len` bytes, and they do not overlap. Either may be changed by others.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(super) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the caller's; the direction flag is clear at every call.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags)
        );
    }
}

/// Copies `len` bytes.
///
/// # Safety
/// `from` is readable and `to` writable for `len` bytes, and they do not overlap. Either may be changed by others.
#[cfg(not(target_arch = "x86_64"))]
#[inline]
pub(super) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the caller's.
    unsafe { by_words(from, to, len) }
}

/// A word at any address.
#[cfg(any(test, not(target_arch = "x86_64")))]
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Word(u64);

/// The same, word by word.
///
/// # Safety
/// As of [`copy`].
#[cfg(any(test, not(target_arch = "x86_64")))]
unsafe fn by_words(from: *const u8, to: *mut u8, len: usize) {
    let mut at = 0;
    while at < len {
        // SAFETY: `at` is less than `len`, a word is copied only where it fits, and its type needs no alignment.
        unsafe {
            if len - at >= size_of::<Word>() {
                to.add(at).cast::<Word>().write_volatile(from.add(at).cast::<Word>().read_volatile());
                at += size_of::<Word>();
            } else {
                to.add(at).write_volatile(from.add(at).read_volatile());
                at += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_and_alignment_is_copied_whole_and_no_more() {
        let from: Vec<u8> = (0..200u8).collect();
        for f in [copy as unsafe fn(*const u8, *mut u8, usize), by_words] {
            for len in 0..80 {
                for (a, b) in [(0, 0), (1, 1), (3, 0), (0, 5), (7, 7)] {
                    let mut to = vec![0xff; 100];
                    // SAFETY: both are long enough.
                    unsafe { f(from.as_ptr().add(a), to.as_mut_ptr().add(b), len) };
                    assert_eq!(to[b..b + len], from[a..a + len]);
                    assert!(to[..b].iter().chain(&to[b + len..]).all(|x| *x == 0xff));
                }
            }
        }
    }
}
