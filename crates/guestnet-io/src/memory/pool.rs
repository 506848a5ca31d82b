//! Theory of operation: one block of memory cut into buffers of one size, named by u32 index. Free buffers
//! form a lock-free stack through `next` (the head carries a tag against ABA). Each buffer has a state:
//! free, held (somebody has its index) or borrowed (somebody has its bytes). `alloc` makes it held, `free`
//! gives it back, and `borrow` turns an index into bytes; a second free, a second borrow or a foreign index
//! is an error and never aliased memory, so indices may travel through rings and through Python.

// One block of raw memory is shared out by the state words.
#![allow(unsafe_code)]

use crate::memory::sync::{AtomicU32, AtomicU64, Ordering, Padded, UnsafeCell};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Buffers in a pool where nothing else is asked for.
pub const DEFAULT_POOL_CAPACITY: usize = 8192;
/// Bytes in a buffer where nothing else is asked for: a 1500-byte packet with all headers that may go in front.
pub const DEFAULT_BUFFER_SIZE: usize = 2048;

const PAGE: usize = 4096;

const FREE: u32 = 0;
const HELD: u32 = 1;
const BORROWED: u32 = 2;
const NONE: u32 = u32::MAX;

/// What a [`PacketPool`] refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// Capacity or buffer size that no pool can have.
    #[error("a pool needs 1 to 16777216 buffers of 64 to 1048576 bytes, at most 64 GiB in all")]
    BadSize,
    /// The system has no memory for it.
    #[error("out of memory for the packet pool")]
    OutOfMemory,
    /// The index is not of this pool.
    #[error("no buffer {0} in this pool")]
    NoSuchBuffer(u32),
    /// The buffer was free already.
    #[error("buffer {0} is already free")]
    AlreadyFree(u32),
    /// Somebody has the bytes of the buffer.
    #[error("buffer {0} is borrowed")]
    Borrowed(u32),
    /// A length over the buffer size.
    #[error("length over the buffer size of {0} bytes")]
    TooLong(usize),
}

struct Slot {
    state: AtomicU32,
    next: AtomicU32,
    /// Bytes of the buffer in use. Only written by whoever holds it.
    len: AtomicU32,
    /// Nothing in it: under loom it finds two borrowers at once.
    guard: UnsafeCell<()>,
}

/// Preallocated packet buffers of one size.
///
/// # Examples
/// ```
/// use guestnet_io::memory::pool::{PacketPool, PoolError};
///
/// let pool = PacketPool::with_buffer_size(16, 2048)?;
/// let index = pool.alloc().expect("an empty pool has room");
/// pool.borrow(index)?.fill(b"a frame")?;
/// assert_eq!(pool.get(index)?, b"a frame");
/// pool.free(index)?;
/// assert_eq!(pool.free(index), Err(PoolError::AlreadyFree(index)));
/// # Ok::<(), PoolError>(())
/// ```
pub struct PacketPool {
    /// Where the buffers begin, at a page's boundary.
    memory: NonNull<u8>,
    /// What was allocated.
    block: NonNull<u8>,
    layout: Layout,
    size: usize,
    stride: usize,
    /// Tag in the upper half, index of the first free buffer in the lower.
    head: Padded<AtomicU64>,
    available: Padded<AtomicU32>,
    slots: Box<[Slot]>,
}

// SAFETY: the memory is reached only through `PoolBuffer`, of which the state word allows one per buffer.
unsafe impl Send for PacketPool {}
// SAFETY: as above; everything else is atomic.
unsafe impl Sync for PacketPool {}

impl PacketPool {
    /// A pool of `capacity` buffers of [`DEFAULT_BUFFER_SIZE`] bytes.
    ///
    /// # Errors
    /// [`PoolError::BadSize`], [`PoolError::OutOfMemory`].
    pub fn new(capacity: usize) -> Result<PacketPool, PoolError> {
        Self::with_buffer_size(capacity, DEFAULT_BUFFER_SIZE)
    }

    /// A pool of `capacity` buffers of `size` bytes each. Pages are touched when first used.
    ///
    /// # Errors
    /// [`PoolError::BadSize`], [`PoolError::OutOfMemory`].
    pub fn with_buffer_size(capacity: usize, size: usize) -> Result<PacketPool, PoolError> {
        if capacity == 0 || capacity > 1 << 24 || !(64..=1 << 20).contains(&size) {
            return Err(PoolError::BadSize);
        }
        // An odd number of cache lines: with a power of two the first lines of all buffers, which is where the
        // headers are, would share a few places of the cache and push each other out.
        let stride = (size.div_ceil(64) | 1) * 64;
        let bytes = stride.checked_mul(capacity).filter(|b| *b <= 64 << 30).ok_or(PoolError::BadSize)?;
        // Asked for at a page's boundary, the allocator would write all the zeros itself and so take all the
        // memory at once. As it is, untouched pages are the system's own: the boundary is found behind.
        let layout = Layout::from_size_align(bytes + PAGE, 8).map_err(|_| PoolError::BadSize)?;
        // SAFETY: the layout has a size over zero.
        let block = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(PoolError::OutOfMemory)?;
        let offset = block.as_ptr().align_offset(PAGE).min(PAGE);
        // SAFETY: the block has a page more than the buffers take, so they end within it.
        let memory = unsafe { block.add(offset) };
        let slots = (0..capacity)
            .map(|i| Slot {
                state: AtomicU32::new(FREE),
                next: AtomicU32::new(if i + 1 < capacity { i as u32 + 1 } else { NONE }),
                len: AtomicU32::new(0),
                guard: UnsafeCell::new(()),
            })
            .collect();
        Ok(PacketPool {
            memory,
            block,
            layout,
            size,
            stride,
            head: Padded(AtomicU64::new(0)),
            available: Padded(AtomicU32::new(capacity as u32)),
            slots,
        })
    }

    /// Buffers in the pool.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.slots.len()
    }

    /// Bytes that a buffer holds.
    #[must_use]
    pub fn buffer_size(&self) -> usize {
        self.size
    }

    /// Buffers that are free now.
    #[must_use]
    pub fn available(&self) -> usize {
        self.available.0.load(Ordering::Relaxed) as usize
    }

    /// Address and length in bytes of its memory, for who asks the system for larger pages.
    #[must_use]
    pub fn range(&self) -> (usize, usize) {
        (self.memory.addr().get(), self.layout.size())
    }

    /// Takes a buffer; the caller holds it from now on, with length 0. `None` when none is free.
    #[inline]
    pub fn alloc(&self) -> Option<u32> {
        let mut head = self.head.0.load(Ordering::Acquire);
        loop {
            let index = head as u32;
            let slot = self.slots.get(index as usize)?;
            let next = slot.next.load(Ordering::Relaxed);
            let new = tagged(head, next);
            match self.head.0.compare_exchange_weak(head, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    self.available.0.fetch_sub(1, Ordering::Relaxed);
                    slot.len.store(0, Ordering::Relaxed);
                    slot.state.store(HELD, Ordering::Release);
                    return Some(index);
                }
                Err(h) => head = h,
            }
        }
    }

    /// Gives a held buffer back.
    ///
    /// # Errors
    /// [`PoolError::NoSuchBuffer`], [`PoolError::AlreadyFree`], or [`PoolError::Borrowed`]; the pool is then
    /// as it was.
    #[inline]
    pub fn free(&self, index: u32) -> Result<(), PoolError> {
        let slot = self.slots.get(index as usize).ok_or(PoolError::NoSuchBuffer(index))?;
        match slot.state.compare_exchange(HELD, FREE, Ordering::AcqRel, Ordering::Relaxed) {
            Ok(_) => self.push(index, slot),
            Err(FREE) => return Err(PoolError::AlreadyFree(index)),
            Err(_) => return Err(PoolError::Borrowed(index)),
        }
        Ok(())
    }

    /// Puts a free buffer on the stack.
    fn push(&self, index: u32, slot: &Slot) {
        let mut head = self.head.0.load(Ordering::Relaxed);
        // Counted before it can be taken, so that the number never goes below zero.
        self.available.0.fetch_add(1, Ordering::Relaxed);
        loop {
            slot.next.store(head as u32, Ordering::Relaxed);
            match self.head.0.compare_exchange_weak(
                head,
                tagged(head, index),
                Ordering::AcqRel,
                Ordering::Relaxed,
            ) {
                Ok(_) => return,
                Err(h) => head = h,
            }
        }
    }

    /// The bytes of a held buffer, to one borrower at a time.
    ///
    /// # Errors
    /// [`PoolError::NoSuchBuffer`], [`PoolError::AlreadyFree`] when nobody holds it, [`PoolError::Borrowed`]
    /// when somebody has its bytes already.
    #[inline]
    pub fn borrow(&self, index: u32) -> Result<PoolBuffer<'_>, PoolError> {
        let slot = self.slots.get(index as usize).ok_or(PoolError::NoSuchBuffer(index))?;
        match slot.state.compare_exchange(HELD, BORROWED, Ordering::AcqRel, Ordering::Relaxed) {
            Ok(_) => {
                // Under loom this finds a second borrower.
                slot.guard.with_mut(|_| ());
                Ok(PoolBuffer { pool: self, index, len: slot.len.load(Ordering::Relaxed) })
            }
            Err(FREE) => Err(PoolError::AlreadyFree(index)),
            Err(_) => Err(PoolError::Borrowed(index)),
        }
    }

    /// A copy of the bytes in use of a held buffer.
    ///
    /// # Errors
    /// As [`PacketPool::borrow`].
    pub fn get(&self, index: u32) -> Result<Vec<u8>, PoolError> {
        Ok(self.borrow(index)?.to_vec())
    }

    /// The same as [`PacketPool::borrow`], under the name of the seed.
    ///
    /// # Errors
    /// As [`PacketPool::borrow`].
    #[inline]
    pub fn get_mut(&self, index: u32) -> Result<PoolBuffer<'_>, PoolError> {
        self.borrow(index)
    }
}

#[inline]
fn tagged(old: u64, index: u32) -> u64 {
    (((old >> 32).wrapping_add(1)) << 32) | u64::from(index)
}

impl Drop for PacketPool {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `with_buffer_size`; a PoolBuffer borrows the pool, so none
        // is left.
        unsafe { dealloc(self.block.as_ptr(), self.layout) }
    }
}

impl std::fmt::Debug for PacketPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PacketPool")
            .field("capacity", &self.capacity())
            .field("buffer_size", &self.size)
            .field("available", &self.available())
            .finish()
    }
}

/// The bytes of a held buffer. Dereferences to the bytes in use; dropping it leaves the buffer held.
pub struct PoolBuffer<'a> {
    pool: &'a PacketPool,
    index: u32,
    len: u32,
}

impl PoolBuffer<'_> {
    /// Index of the buffer.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Sets how many bytes are in use.
    ///
    /// # Errors
    /// [`PoolError::TooLong`] over the buffer size.
    pub fn set_len(&mut self, len: usize) -> Result<(), PoolError> {
        if len > self.pool.size {
            return Err(PoolError::TooLong(self.pool.size));
        }
        self.len = len as u32;
        Ok(())
    }

    /// The whole buffer, used or not.
    #[must_use]
    pub fn whole(&mut self) -> &mut [u8] {
        let size = self.pool.size;
        // SAFETY: see `slice`.
        unsafe { std::slice::from_raw_parts_mut(self.start(), size) }
    }

    /// Copies `bytes` in and makes them the bytes in use.
    ///
    /// # Errors
    /// [`PoolError::TooLong`] over the buffer size.
    pub fn fill(&mut self, bytes: &[u8]) -> Result<(), PoolError> {
        self.set_len(bytes.len())?;
        self.copy_from_slice(bytes);
        Ok(())
    }

    fn start(&self) -> *mut u8 {
        // SAFETY: `borrow` checked the index.
        unsafe { self.pool.memory.as_ptr().add(self.index as usize * self.pool.stride) }
    }
}

impl Deref for PoolBuffer<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the memory is initialised (zeroed), lives as long as the pool, which is borrowed, and the
        // state BORROWED makes this the one borrower; `len <= size <= stride`.
        unsafe { std::slice::from_raw_parts(self.start(), self.len as usize) }
    }
}

impl DerefMut for PoolBuffer<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` excludes other slices of it.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.len as usize) }
    }
}

impl Drop for PoolBuffer<'_> {
    fn drop(&mut self) {
        if let Some(slot) = self.pool.slots.get(self.index as usize) {
            slot.guard.with_mut(|_| ());
            slot.len.store(self.len, Ordering::Relaxed);
            slot.state.store(HELD, Ordering::Release);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::sync::Arc;
    use std::thread;

    #[cfg(target_os = "linux")]
    #[test]
    fn takes_memory_only_where_it_is_used() {
        let resident = || {
            let text = std::fs::read_to_string("/proc/self/statm").unwrap();
            text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
        };
        let before = resident();
        let pool = PacketPool::with_buffer_size(1 << 14, 1 << 16).unwrap(); // a gigabyte
        let index = pool.alloc().unwrap();
        let mut buffer = pool.borrow(index).unwrap();
        buffer.fill(&[1; 1 << 16]).unwrap();
        assert_eq!(buffer.as_ptr() as usize % 4096, 0);
        assert!(resident().saturating_sub(before) < 128 << 20);
    }

    #[test]
    fn refuses_impossible_sizes() {
        for (n, s) in [(0, 2048), (1 << 25, 64), (1, 63), (1, (1 << 20) + 1), (1 << 24, 1 << 20)] {
            assert_eq!(PacketPool::with_buffer_size(n, s).err(), Some(PoolError::BadSize), "{n} {s}");
        }
    }

    #[test]
    fn hands_out_each_buffer_once() {
        let pool = PacketPool::with_buffer_size(100, 100).unwrap();
        let got: HashSet<u32> = std::iter::from_fn(|| pool.alloc()).collect();
        assert_eq!(got.len(), 100);
        assert_eq!((pool.available(), pool.alloc()), (0, None));
        for i in &got {
            pool.free(*i).unwrap();
        }
        assert_eq!(pool.available(), 100);
        assert_eq!(pool.free(3), Err(PoolError::AlreadyFree(3)));
        assert_eq!(pool.free(100), Err(PoolError::NoSuchBuffer(100)));
        assert_eq!(pool.borrow(3).err(), Some(PoolError::AlreadyFree(3)));
        assert_eq!(pool.available(), 100);
    }

    #[test]
    fn headers_lie_on_different_cache_lines() {
        // A cache of 64 sets of lines: 64 buffers in a row use them all.
        for size in [64, 100, 128, 2048, 4096] {
            let pool = PacketPool::with_buffer_size(64, size).unwrap();
            let sets: HashSet<usize> =
                (0..64).map(|i| (pool.memory.addr().get() + i * pool.stride) / 64 % 64).collect();
            assert_eq!(sets.len(), 64, "{size}");
            assert!(pool.range().1 >= 64 * size);
        }
    }

    #[test]
    fn bytes_go_to_one_borrower() {
        let pool = PacketPool::with_buffer_size(2, 64).unwrap();
        let (a, b) = (pool.alloc().unwrap(), pool.alloc().unwrap());
        let mut ba = pool.borrow(a).unwrap();
        assert_eq!(pool.borrow(a).err(), Some(PoolError::Borrowed(a)));
        assert_eq!(pool.free(a), Err(PoolError::Borrowed(a)));
        ba.fill(b"hello").unwrap();
        assert_eq!(ba.fill(&[0; 65]), Err(PoolError::TooLong(64)));
        ba.whole()[63] = 9;
        drop(ba);
        assert_eq!(pool.get(a).unwrap(), b"hello");
        assert!(pool.get_mut(b).unwrap().is_empty());
        pool.free(a).unwrap();
        assert_eq!(pool.alloc(), Some(a));
        assert!(pool.get(a).unwrap().is_empty());
    }

    #[test]
    fn many_threads_never_share_a_buffer() {
        let pool = Arc::new(PacketPool::with_buffer_size(16, 64).unwrap());
        let threads: Vec<_> = (0..4u8)
            .map(|t| {
                let pool = Arc::clone(&pool);
                thread::spawn(move || {
                    for _ in 0..20_000 {
                        let Some(i) = pool.alloc() else { continue };
                        pool.borrow(i).unwrap().fill(&[t; 64]).unwrap();
                        assert_eq!(pool.get(i).unwrap(), [t; 64]);
                        pool.free(i).unwrap();
                    }
                })
            })
            .collect();
        for t in threads {
            t.join().unwrap();
        }
        assert_eq!(pool.available(), 16);
    }
}
