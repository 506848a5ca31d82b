//! Theory of operation: a bounded queue between two threads, one that puts and one that takes. Two counters
//! that only grow, each written by one side and on cache lines of its own; each side keeps a copy of the
//! other's counter and reads the real one only when the copy says full or empty. A batch costs one release
//! store. The two halves are separate values that need `&mut`, so a second producer does not compile.

// The cells are shared between the halves by the protocol of the two counters.
#![allow(unsafe_code)]

use crate::memory::sync::{AtomicUsize, Ordering, Padded, UnsafeCell};
use std::mem::MaybeUninit;
use std::sync::Arc;

/// Items in a ring of buffer indices where nothing else is asked for.
pub const DEFAULT_RING_CAPACITY: usize = 4096;

/// What [`Ring::new`] refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a ring holds between 1 and 2^31 items, not {0}")]
pub struct RingCapacityError(pub usize);

struct Shared<T> {
    /// Items ever put. Written by the producer.
    tail: Padded<AtomicUsize>,
    /// Items ever taken. Written by the consumer.
    head: Padded<AtomicUsize>,
    slots: Box<[UnsafeCell<MaybeUninit<T>>]>,
}

// SAFETY: a slot is touched by the producer only while `head <= i < tail + capacity` says it is empty and by
// the consumer only while `head <= i < tail` says it is full; the release store of a counter and the acquire
// load of it by the other side order the two.
unsafe impl<T: Copy + Send> Sync for Shared<T> {}
// SAFETY: T is Send and nothing in here is tied to a thread.
unsafe impl<T: Copy + Send> Send for Shared<T> {}

/// A single-producer single-consumer queue, before it is split into its halves.
///
/// # Examples
/// ```
/// use guestnet_io::memory::ring::{Ring, RingCapacityError};
///
/// let (mut producer, mut consumer) = Ring::new(4)?.split();
/// std::thread::scope(|threads| {
///     threads.spawn(move || assert_eq!(producer.enqueue_batch(&[1, 2, 3]), 3));
/// });
/// assert_eq!(consumer.dequeue(), Some(1));
/// assert_eq!(consumer.len(), 2);
/// # Ok::<(), RingCapacityError>(())
/// ```
pub struct Ring<T> {
    shared: Arc<Shared<T>>,
}

impl<T: Copy + Send> Ring<T> {
    /// Makes a ring for at least `capacity` items (rounded up to a power of two).
    ///
    /// # Errors
    /// [`RingCapacityError`] for 0 or more than 2^31.
    pub fn new(capacity: usize) -> Result<Ring<T>, RingCapacityError> {
        if capacity == 0 || capacity > 1 << 31 {
            return Err(RingCapacityError(capacity));
        }
        let slots =
            (0..capacity.next_power_of_two()).map(|_| UnsafeCell::new(MaybeUninit::uninit())).collect();
        Ok(Ring {
            shared: Arc::new(Shared {
                tail: Padded(AtomicUsize::new(0)),
                head: Padded(AtomicUsize::new(0)),
                slots,
            }),
        })
    }

    /// The two halves.
    #[must_use]
    pub fn split(self) -> (Producer<T>, Consumer<T>) {
        let shared = Arc::clone(&self.shared);
        (Producer { shared: self.shared, tail: 0, head: 0 }, Consumer { shared, head: 0, tail: 0 })
    }
}

/// The half that puts.
pub struct Producer<T> {
    shared: Arc<Shared<T>>,
    tail: usize,
    /// Last known head.
    head: usize,
}

impl<T: Copy + Send> Producer<T> {
    /// How many items the ring holds at most.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.shared.slots.len()
    }

    /// Items in the ring now (the consumer may be taking some).
    #[must_use]
    pub fn len(&self) -> usize {
        self.tail.wrapping_sub(self.shared.head.0.load(Ordering::Acquire))
    }

    /// True when the ring was seen empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    #[inline]
    fn room(&mut self, wanted: usize) -> usize {
        let cap = self.shared.slots.len();
        let mut room = cap - self.tail.wrapping_sub(self.head);
        if room < wanted {
            self.head = self.shared.head.0.load(Ordering::Acquire);
            room = cap - self.tail.wrapping_sub(self.head);
        }
        room
    }

    /// Puts one item; gives it back when the ring is full.
    ///
    /// # Errors
    /// The item itself.
    #[inline]
    pub fn enqueue(&mut self, item: T) -> Result<(), T> {
        if self.enqueue_batch(std::slice::from_ref(&item)) == 1 { Ok(()) } else { Err(item) }
    }

    /// Puts as many of `items` as there is room for, in order; returns how many.
    #[inline]
    pub fn enqueue_batch(&mut self, items: &[T]) -> usize {
        let n = self.room(items.len()).min(items.len());
        if n == 0 {
            return 0;
        }
        let slots = &self.shared.slots;
        let mask = slots.len() - 1;
        for (k, item) in items[..n].iter().enumerate() {
            slots[self.tail.wrapping_add(k) & mask].with_mut(|p| {
                // SAFETY: `room` says that slots tail..tail+n are empty, so the consumer does not touch
                // them until the store below, and `&mut self` makes this the only producer.
                unsafe { (*p).write(*item) };
            });
        }
        self.tail = self.tail.wrapping_add(n);
        self.shared.tail.0.store(self.tail, Ordering::Release);
        n
    }
}

/// The half that takes.
pub struct Consumer<T> {
    shared: Arc<Shared<T>>,
    head: usize,
    /// Last known tail.
    tail: usize,
}

impl<T: Copy + Send> Consumer<T> {
    /// How many items the ring holds at most.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.shared.slots.len()
    }

    /// Items in the ring now (the producer may be adding some).
    #[must_use]
    pub fn len(&self) -> usize {
        self.shared.tail.0.load(Ordering::Acquire).wrapping_sub(self.head)
    }

    /// True when the ring was seen empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    #[inline]
    fn filled(&mut self, wanted: usize) -> usize {
        let mut n = self.tail.wrapping_sub(self.head);
        if n < wanted {
            self.tail = self.shared.tail.0.load(Ordering::Acquire);
            n = self.tail.wrapping_sub(self.head);
        }
        n
    }

    /// Takes the oldest item.
    #[inline]
    pub fn dequeue(&mut self) -> Option<T> {
        if self.filled(1) == 0 {
            return None;
        }
        let item = self.read(0);
        self.release(1);
        Some(item)
    }

    /// Takes up to `out.len()` items into the front of `out`, oldest first; returns how many.
    #[inline]
    pub fn dequeue_batch(&mut self, out: &mut [T]) -> usize {
        let n = self.filled(out.len()).min(out.len());
        if n == 0 {
            return 0;
        }
        for (k, o) in out[..n].iter_mut().enumerate() {
            *o = self.read(k);
        }
        self.release(n);
        n
    }

    /// Reads the item `k` places behind the oldest; only called with `k < filled()`.
    #[inline(always)]
    fn read(&self, k: usize) -> T {
        let slots = &self.shared.slots;
        slots[self.head.wrapping_add(k) & (slots.len() - 1)].with(|p| {
            // SAFETY: `filled` said, by an acquire load of the tail, that this slot was written and will
            // not be written again before `release`; T is Copy, so the copy left behind needs no drop.
            unsafe { (*p).assume_init_read() }
        })
    }

    #[inline(always)]
    fn release(&mut self, n: usize) {
        self.head = self.head.wrapping_add(n);
        self.shared.head.0.store(self.head, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn refuses_impossible_capacities() {
        assert_eq!(Ring::<u32>::new(0).err(), Some(RingCapacityError(0)));
        assert!(Ring::<u32>::new((1 << 31) + 1).is_err());
    }

    #[test]
    fn keeps_order_and_bounds() {
        let (mut p, mut c) = Ring::new(5).unwrap().split();
        assert_eq!(p.capacity(), 8);
        assert_eq!(p.enqueue_batch(&(0..20).collect::<Vec<u32>>()), 8);
        assert_eq!(p.enqueue(99), Err(99));
        let mut out = [0; 5];
        assert_eq!(c.dequeue_batch(&mut out), 5);
        assert_eq!(out, [0, 1, 2, 3, 4]);
        assert_eq!(p.enqueue_batch(&[8, 9]), 2);
        assert_eq!(c.len(), 5);
        assert_eq!(std::iter::from_fn(|| c.dequeue()).collect::<Vec<_>>(), [5, 6, 7, 8, 9]);
        assert!(c.is_empty() && p.is_empty());
        assert_eq!(c.dequeue_batch(&mut out), 0);
        assert_eq!(p.enqueue_batch(&[]), 0);
    }

    #[test]
    fn two_threads_lose_and_repeat_nothing() {
        let (mut p, mut c) = Ring::new(64).unwrap().split();
        const N: u32 = 400_000;
        let t = thread::spawn(move || {
            let mut i = 0u32;
            while i < N {
                let batch: Vec<u32> = (i..N.min(i + 1 + i % 37)).collect();
                let n = p.enqueue_batch(&batch);
                i += n as u32;
                if n == 0 {
                    thread::yield_now();
                }
            }
        });
        let (mut want, mut out) = (0u32, [0u32; 29]);
        while want < N {
            let n = c.dequeue_batch(&mut out);
            for v in &out[..n] {
                assert_eq!(*v, want);
                want += 1;
            }
            if n == 0 {
                thread::yield_now();
            }
        }
        t.join().unwrap();
    }
}
