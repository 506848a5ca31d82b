//! Theory of operation: tables of many megabytes are read at random, and with pages of 4 KB most reads wait for
//! the page table too. The system is asked to back them with large pages (2 MB on x86-64); it is free not to.

#![allow(unsafe_code)]

/// Shorter pieces of memory would waste more than they gain.
const SHORTEST: usize = 4 << 20;
const PAGE: usize = 4096;

/// Asks for large pages for pieces of memory, given as address and length in bytes. What cannot be is not done.
pub fn advise(ranges: &[(usize, usize)]) {
    for (start, len) in ranges {
        let Some(first) = start.checked_next_multiple_of(PAGE) else { continue };
        let end = start.saturating_add(*len) / PAGE * PAGE;
        if *len < SHORTEST || end <= first {
            continue;
        }
        #[cfg(target_os = "linux")]
        // SAFETY: MADV_HUGEPAGE changes how memory is backed and never what is in it, so any range will do; one
        // that is not mapped is an error, which is ignored.
        unsafe {
            libc::madvise(std::ptr::without_provenance_mut(first), end - first, libc::MADV_HUGEPAGE);
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn any_range_is_harmless() {
        let v = vec![7u8; 8 << 20];
        super::advise(&[
            (v.as_ptr().addr(), v.len()),
            (0, usize::MAX),
            (usize::MAX - 5, 9 << 20),
            (4096, 8 << 20),
        ]);
        assert!(v.iter().all(|b| *b == 7));
    }
}
