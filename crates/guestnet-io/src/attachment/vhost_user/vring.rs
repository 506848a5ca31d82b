//! Theory of operation: the device's side of a split virtqueue (virtio 1.2, 2.7) in the guest's memory. The
//! guest may write any of it at any moment, so each value is read once into a variable of ours and checked
//! there; a chain is walked with a bound, so that a loop in it ends. Buffers taken from the available ring are
//! counted as used in order, and become visible to the guest, all together, by [`Vring::publish`]; whether it
//! has to be told is then decided once for all of them.

// The rings are shared memory, reached through checked pointers.
#![allow(unsafe_code)]

use super::memory::{Fault, Memory};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering, fence};

/// The largest split queue there is.
const SIZE_MAX: u32 = 32768;
/// Descriptors of one chain at most, as in QEMU: what bounds the time for a frame.
pub(super) const CHAIN_MAX: u32 = 1024;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// used.flags: the guest need not kick.
const NO_NOTIFY: u16 = 1;
/// avail.flags: the guest need not be called.
const NO_INTERRUPT: u16 = 1;

/// The rings are not what rings are; the queue cannot be used any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Broken;

/// Why the buffers of a chain cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BadChain {
    /// It is not what it has to be.
    Malformed,
    /// Its memory is not allocated, and may not be allocated by us.
    NotAllocated,
}

impl From<Fault> for BadChain {
    fn from(fault: Fault) -> BadChain {
        match fault {
            Fault::TxContext => BadChain::Malformed,
            Fault::NotAllocated => BadChain::NotAllocated,
        }
    }
}

/// Where the three parts are, in the front-end's addresses.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Addresses {
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
}

/// The parts, found in the guest's memory.
#[derive(Clone, Copy)]
struct View {
    desc: NonNull<u8>,
    avail: NonNull<u16>,
    used: NonNull<u16>,
    size: u16,
}

// SAFETY: pointers that are used only by the thread that has the Memory they point into.
unsafe impl Send for View {}

/// Place in a ring, and what is published of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Place {
    /// The next entry of the available ring to be looked at.
    pub avail: u16,
    /// The next entry of the used ring to be filled.
    pub used: u16,
}

/// One virtqueue.
#[derive(Default)]
pub(super) struct Vring {
    /// Entries, a power of two; 0 while it was not set.
    size: u16,
    pub addresses: Option<Addresses>,
    view: Option<View>,
    pub event_idx: bool,
    pub at: Place,
    /// The guest's index of the available ring, as read last.
    seen: u16,
    /// The index of the used ring that the guest sees.
    published: u16,
    /// That index when the guest was called, or found not to want it, last.
    decided: Option<u16>,
}

impl Vring {
    /// Sets the number of entries; false when no split queue can have it.
    pub(super) fn set_size(&mut self, num: u32) -> bool {
        let fits = (1..=SIZE_MAX).contains(&num) && num.is_power_of_two();
        if fits {
            self.size = num as u16;
        }
        fits
    }

    /// Finds the rings in memory and begins at `self.at.avail`.
    pub(super) fn start(&mut self, memory: &mut Memory) -> Result<(), Fault> {
        self.view = None;
        let (a, n) = (self.addresses.ok_or(Fault::TxContext)?, usize::from(self.size));
        if n == 0 {
            return Err(Fault::TxContext);
        }
        let event = if self.event_idx { 2 } else { 0 };
        let desc = memory.ring(a.desc, 16 * n, 16)?;
        let avail = memory.ring(a.avail, 4 + 2 * n + event, 2)?;
        let used = memory.ring(a.used, 4 + 8 * n + event, 4)?;
        let view = View { desc, avail: avail.cast(), used: used.cast(), size: self.size };
        self.view = Some(view);
        // What the guest saw last; another back-end may have filled it before us.
        self.at.used = view.load(view.used, 1, Ordering::Acquire);
        self.published = self.at.used;
        self.seen = self.at.avail;
        self.decided = None;
        Ok(())
    }

    /// Finds the rings again after the memory was mapped anew; the place in them stays.
    pub(super) fn move_to(&mut self, memory: &mut Memory) -> Result<(), Fault> {
        if self.view.is_none() {
            return Ok(());
        }
        let (at, published, decided) = (self.at, self.published, self.decided);
        self.start(memory)?;
        (self.at, self.seen, self.published, self.decided) = (at, at.avail, published, decided);
        Ok(())
    }

    pub(super) fn stop(&mut self) {
        self.view = None;
    }

    pub(super) fn is_running(&self) -> bool {
        self.view.is_some()
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// Reads how many entries of the available ring there are.
    pub(super) fn look(&mut self) -> Result<u16, Broken> {
        let v = self.view.ok_or(Broken)?;
        self.seen = v.load(v.avail, 1, Ordering::Acquire);
        let n = self.seen.wrapping_sub(self.at.avail);
        if n > v.size { Err(Broken) } else { Ok(n) }
    }

    /// Takes the head of the next chain.
    pub(super) fn pop(&mut self) -> Result<Option<u16>, Broken> {
        let v = self.view.ok_or(Broken)?;
        if self.seen == self.at.avail && self.look()? == 0 {
            return Ok(None);
        }
        let head = v.read16(v.avail, 2 + usize::from(self.at.avail & (v.size - 1)));
        if head >= v.size {
            return Err(Broken);
        }
        self.at.avail = self.at.avail.wrapping_add(1);
        Ok(Some(head))
    }

    /// Walks a chain: calls `each` with address and length of its buffers, which must all be `writable` or none.
    /// Every descriptor takes one off `steps`, and a chain that has none left is a bad one. It ends early when `each`
    /// says that no more is wanted (false).
    pub(super) fn walk(
        &self,
        memory: &mut Memory,
        head: u16,
        writable: bool,
        steps: &mut u32,
        mut each: impl FnMut(&mut Memory, u64, usize) -> Result<bool, BadChain>,
    ) -> Result<(), BadChain> {
        let v = self.view.ok_or(BadChain::Malformed)?;
        let mut index = u32::from(head);
        // The indirect table, once there is one: address and entries.
        let mut table: Option<(u64, u32)> = None;
        loop {
            *steps = steps.checked_sub(1).ok_or(BadChain::Malformed)?;
            let mut bytes = [0u8; 16];
            match table {
                // Once into `bytes`, and from there alone.
                Some((at, n)) if index < n => {
                    memory.read(at.wrapping_add(u64::from(index) * 16), &mut bytes)?;
                }
                None if index < u32::from(v.size) => v.descriptor(index, &mut bytes),
                _ => return Err(BadChain::Malformed),
            }
            let (addr, len, flags, next) = split(bytes);
            if flags & INDIRECT != 0 {
                let whole = len != 0 && len.is_multiple_of(16) && len / 16 <= CHAIN_MAX;
                if table.is_some() || flags & NEXT != 0 || !whole {
                    return Err(BadChain::Malformed);
                }
                table = Some((addr, len / 16));
                index = 0;
                continue;
            }
            if (flags & WRITE != 0) != writable {
                return Err(BadChain::Malformed);
            }
            let more = each(memory, addr, len as usize)?;
            if !more || flags & NEXT == 0 {
                return Ok(());
            }
            index = u32::from(next);
        }
    }

    /// Gives a chain back, with `len` bytes written to it; unseen until [`Vring::publish`].
    pub(super) fn give_back(&mut self, head: u16, len: u32) {
        let Some(v) = self.view else { return };
        let at = 2 + 4 * usize::from(self.at.used & (v.size - 1));
        let words = [head, 0, len as u16, (len >> 16) as u16];
        for (i, w) in words.into_iter().enumerate() {
            v.write16(v.used, at + i, w);
        }
        self.at.used = self.at.used.wrapping_add(1);
    }

    /// Buffers given back that the guest does not see yet.
    pub(super) fn unpublished(&self) -> u16 {
        self.at.used.wrapping_sub(self.published)
    }

    /// Shows the guest what was given back; true when it is to be called for that.
    pub(super) fn publish(&mut self) -> bool {
        let Some(v) = self.view else { return false };
        if self.at.used == self.published {
            return false;
        }
        v.store(v.used, 1, self.at.used, Ordering::Release);
        self.published = self.at.used;
        // The guest sees the index before we look whether it wants to be called, and the other way round.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            return v.load(v.avail, 0, Ordering::Relaxed) & NO_INTERRUPT == 0;
        }
        let event = v.load(v.avail, 2 + usize::from(v.size), Ordering::Relaxed);
        let new = self.published;
        let Some(old) = self.decided.replace(new) else { return true };
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }

    /// Asks to be kicked for the next buffer. True when there is one by now, and nobody kicks for it.
    pub(super) fn want_kick(&mut self) -> Result<bool, Broken> {
        let v = self.view.ok_or(Broken)?;
        let before = self.seen;
        if self.event_idx {
            v.store(v.used, 2 + 4 * usize::from(v.size), before, Ordering::Relaxed);
        } else {
            v.store(v.used, 0, 0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.look()?;
        Ok(self.seen != before)
    }

    /// Asks not to be kicked, as far as one can.
    pub(super) fn spare_kicks(&self) {
        if let Some(v) = self.view.filter(|_| !self.event_idx) {
            v.store(v.used, 0, NO_NOTIFY, Ordering::Relaxed);
        }
        // With EVENT_IDX the guest kicks only when its index passes the one that was asked for.
    }
}

/// Address, length, flags and next of a descriptor.
fn split(b: [u8; 16]) -> (u64, u32, u16, u16) {
    let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = b;
    (
        u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
        u32::from_le_bytes([l0, l1, l2, l3]),
        u16::from_le_bytes([f0, f1]),
        u16::from_le_bytes([n0, n1]),
    )
}

impl View {
    /// Field `at` (in u16) of a ring, as an atomic.
    fn atomic(&self, ring: NonNull<u16>, at: usize) -> &AtomicU16 {
        // SAFETY: callers stay within the ring's length, which was mapped and aligned when the view was made,
        // and stays so as long as the view; the guest's writes are to be expected.
        unsafe { AtomicU16::from_ptr(ring.add(at).as_ptr()) }
    }

    fn load(&self, ring: NonNull<u16>, at: usize, order: Ordering) -> u16 {
        u16::from_le(self.atomic(ring, at).load(order))
    }

    fn store(&self, ring: NonNull<u16>, at: usize, value: u16, order: Ordering) {
        self.atomic(ring, at).store(value.to_le(), order);
    }

    fn read16(&self, ring: NonNull<u16>, at: usize) -> u16 {
        self.load(ring, at, Ordering::Relaxed)
    }

    fn write16(&self, ring: NonNull<u16>, at: usize, value: u16) {
        self.store(ring, at, value, Ordering::Relaxed);
    }

    /// Reads descriptor `index`, which is less than the size.
    fn descriptor(&self, index: u32, to: &mut [u8; 16]) {
        // SAFETY: the table was mapped with 16 bytes for each of `size` descriptors, aligned to 16.
        let words = unsafe {
            let at = self.desc.add(index as usize * 16).cast::<u64>();
            [at.read_volatile(), at.add(1).read_volatile()]
        };
        let (low, high) = to.split_at_mut(8);
        low.copy_from_slice(&words[0].to_ne_bytes());
        high.copy_from_slice(&words[1].to_ne_bytes());
    }
}
