//! Theory of operation: sums of what guests send, for modules where plain arithmetic on integers is refused
//! (`clippy::arithmetic_side_effects`). A counter wraps: 64 bits do not run out. An account of bytes is bounded by its
//! owner, so it neither overflows nor falls below zero; where a fault in the code made it, it stays at its end, and tests
//! and fuzz targets fail.

/// Adds one to a counter.
#[inline]
pub(crate) fn count(counter: &mut u64) {
    *counter = counter.wrapping_add(1);
}

/// Adds `n` bytes to a counter.
#[inline]
pub(crate) fn count_bytes(counter: &mut u64, n: usize) {
    *counter = counter.wrapping_add(n as u64);
}

/// Adds `n` to an account.
#[inline]
pub(crate) fn charge(account: &mut usize, n: usize) {
    debug_assert!(account.checked_add(n).is_some(), "{account} + {n}");
    *account = account.saturating_add(n);
}

/// Takes `n` from an account.
#[inline]
pub(crate) fn release(account: &mut usize, n: usize) {
    debug_assert!(n <= *account, "{account} - {n}");
    *account = account.saturating_sub(n);
}
