//! Theory of operation: the guest's memory, as the front-end shares it: up to [`REGIONS_MAX`] pieces of files,
//! mapped here. Two address spaces lead into it: the guest's physical addresses (in descriptors) and the
//! front-end's own (of the rings). Every address is checked against the regions each time it is used, and
//! everything is copied out before it is believed, since the guest can change it at any moment. Only memory
//! that cannot make us wait for somebody is taken: memfd, /dev/shm and huge pages, not a file system.
//!
//! A page that nobody has written yet is a hole in its file. Touching one here would allocate it in this process's
//! name, and fill its memory instead of the guest's. So the first time that a page is used the file is asked: a hole
//! reads as zeros without being touched, and is written to only within the front-end's share of
//! [`Resource::Allocated`]. Huge pages have no such holes that can be seen, and are not counted as memory.

// Mapping, and copies from and to memory that others write.
#![allow(unsafe_code)]

mod bitmap;
mod copy;
mod retained;
mod sigbus;

use bitmap::Bitmap;
use copy::copy;
use sigbus::Watched;

use crate::attachment::quota::{Charge, Quota, Resource};
use crate::attachment::reason;
use crate::os::sys;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

/// Regions that the protocol's table has room for.
pub(super) const REGIONS_MAX: usize = 8;
/// Pages of one frame that the file is asked about at most: a frame of 64 KiB has 17, and one in small buffers on
/// pages of their own some dozens.
pub(super) const CHECKS_MAX: u32 = 256;
/// Allocated pages are charged in steps of so many bytes.
const ALLOCATED_STEP: u64 = 64 << 10;

const TMPFS: i64 = 0x0102_1994;
const HUGETLBFS: i64 = 0x9584_58f6;

/// What the front-end says of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RegionSpec {
    /// Where the guest has it.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// Where the front-end has it.
    pub user: u64,
    /// Where it begins in its file.
    pub offset: u64,
}

/// What memory is wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
}

/// Why a stretch of guest memory cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// No region has it, or it leaves them.
    TxContext,
    /// It is not allocated, and this process may allocate no more for this guest.
    NotAllocated,
}

/// Which pages of a region are known to be allocated.
struct Pages {
    known: Bitmap,
    /// The size of a page, as a power of two.
    shift: u32,
    /// Bytes that were allocated by us, and what is charged for them.
    allocated: u64,
    charge: Charge,
}

struct Region {
    spec: RegionSpec,
    /// Where its first byte is.
    base: *mut u8,
    map: *mut libc::c_void,
    map_len: usize,
    /// Where the mapping begins in the file.
    from: u64,
    /// A description of the file that is ours alone: whoever holds that of the front-end could hold its lock.
    file: OwnedFd,
    watched: Option<Watched>,
    /// `None` for huge pages.
    pages: Option<Pages>,
}

/// Bytes of a mapping for a region whose pages have `block` bytes, where it begins in its file, and where it ends.
fn extent(spec: &RegionSpec, block: u64) -> Result<(u64, u64, u64), String> {
    let RegionSpec { guest, size, user, offset } = *spec;
    let end = offset.checked_add(size).filter(|_| size > 0);
    let (Some(end), Some(_), Some(_)) = (end, guest.checked_add(size), user.checked_add(size)) else {
        return Err("a region of the guest's memory is empty or wraps around".into());
    };
    // Huge pages are mapped whole.
    let from = offset / block * block;
    let len =
        (end - from).checked_next_multiple_of(block).ok_or("a region is larger than the address space")?;
    Ok((len, from, end))
}

impl Region {
    fn new(spec: RegionSpec, fd: &OwnedFd, kind: Backing, quota: &Arc<Quota>) -> Result<Region, String> {
        let (map_len, from, end) = extent(&spec, kind.block)?;
        if end > kind.len {
            return Err(format!("a region ends at byte {end} of a file of {}", kind.len));
        }
        let file = sys::open_again(fd).map_err(|e| {
            reason("the file of the guest's memory cannot be opened once more (it has to be readable and writable)", e)
        })?;
        let len =
            usize::try_from(map_len).map_err(|_| "a region is larger than the address space".to_owned())?;
        let from_signed =
            i64::try_from(from).map_err(|_| "a region begins too far in its file".to_owned())?;
        // SAFETY: a new mapping at a place of the kernel's choice; nothing of ours is changed.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                from_signed,
            )
        };
        if map == libc::MAP_FAILED {
            return Err(reason("the guest's memory cannot be mapped", sys::errno()));
        }
        // SAFETY: the offset in the mapping is less than a block, and the mapping is at least that plus `size` long.
        let base = unsafe { map.cast::<u8>().add((spec.offset - from) as usize) };
        // Unmapped by its drop when what follows fails.
        let mut region = Region { spec, base, map, map_len: len, from, file, watched: None, pages: None };
        let watched = Watched::new(map as usize, len, kind.block as usize)
            .map_err(|e| reason("the guest's memory cannot be watched over", e))?;
        region.watched = Some(watched);
        if !kind.huge {
            let shift = kind.block.trailing_zeros();
            let known = Bitmap::new(map_len >> shift)
                .ok_or_else(|| reason("the guest's memory cannot be mapped", libc::ENOMEM))?;
            let charge = Charge::new(quota, Resource::Allocated);
            region.pages = Some(Pages { known, shift, allocated: 0, charge });
        }
        Ok(region)
    }

    fn is_lost(&self) -> bool {
        self.watched.as_ref().is_some_and(Watched::is_lost)
    }

    /// True when all of `len` bytes from byte `inside` on lie in the region, on pages that may be touched.
    #[inline]
    fn is_known(&self, inside: u64, len: usize) -> bool {
        if len as u64 > self.spec.size - inside {
            return false;
        }
        let Some(pages) = &self.pages else { return true };
        let first = inside + (self.spec.offset - self.from);
        let last = (first + len as u64).saturating_sub(1) >> pages.shift;
        (first >> pages.shift..=last).all(|page| pages.known.get(page))
    }

    /// The first piece of `len` bytes from byte `inside` on, which must lie in the region. It ends where pages of
    /// another kind begin.
    fn piece(&mut self, inside: u64, len: usize, access: Access, checks: &mut u32) -> Result<Piece, Fault> {
        // SAFETY: `inside` is less than the size of the region, which is mapped from `base` on.
        let at = NonNull::new(unsafe { self.base.add(inside as usize) });
        let Some(pages) = &mut self.pages else { return Ok(Piece { at, len }) };
        let first = inside + (self.spec.offset - self.from);
        let end = first + len as u64;
        let mut page = first >> pages.shift;
        loop {
            let start = page << pages.shift;
            if !pages.known.get(page) && !pages.look(&self.file, self.from + start, page, access, checks)? {
                if start > first {
                    return Ok(Piece { at, len: (start - first) as usize });
                }
                let hole = ((page + 1) << pages.shift).min(end) - first;
                return Ok(Piece { at: None, len: hole as usize });
            }
            page += 1;
            if page << pages.shift >= end {
                return Ok(Piece { at, len });
            }
        }
    }
}

impl Pages {
    /// Asks the file about a page, which begins at byte `start` of it. True when it may be touched, false when it
    /// is a hole that is to be read.
    fn look(
        &mut self,
        file: &OwnedFd,
        start: u64,
        page: u64,
        access: Access,
        checks: &mut u32,
    ) -> Result<bool, Fault> {
        *checks = checks.checked_sub(1).ok_or(Fault::TxContext)?;
        let size = 1u64 << self.shift;
        let hole = !sys::has_data(file, start, start + size);
        if hole && access == Access::Read {
            return Ok(false);
        }
        if hole && !is_whole(file) {
            let allocated = self.allocated + size;
            if allocated > self.charge.amount() {
                let step = ALLOCATED_STEP.max(size);
                self.charge
                    .add(step)
                    .or_else(|_| {
                        retained::release();
                        self.charge.add(step)
                    })
                    .map_err(|_| Fault::NotAllocated)?;
            }
            self.allocated = allocated;
        }
        self.known.set(page);
        Ok(true)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.watched = None;
        // SAFETY: exactly what `new` mapped; whoever had a pointer into it had borrowed the Memory.
        unsafe { libc::munmap(self.map, self.map_len) };
        if let Some(pages) = self.pages.take() {
            retained::keep(&self.file, pages.charge);
        }
    }
}

/// What the memory of a region is in.
#[derive(Debug, Clone, Copy)]
struct Backing {
    /// Length of the file.
    len: u64,
    /// Bytes of a page.
    block: u64,
    huge: bool,
}

/// True when all of a file is allocated, be it by fallocate(2), which leaves pages that count as holes.
fn is_whole(fd: &OwnedFd) -> bool {
    status(fd).is_ok_and(|st| st.st_blocks.saturating_mul(512) >= st.st_size)
}

fn status(fd: &OwnedFd) -> Result<libc::stat, i32> {
    // SAFETY: plain numbers.
    let mut st: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the struct is writable.
    sys::check(unsafe { libc::fstat(fd.as_raw_fd(), &mut st) })?;
    Ok(st)
}

/// What a file is that guest memory may be in.
fn backing(fd: &OwnedFd) -> Result<Backing, String> {
    // SAFETY: plain numbers.
    let mut fs: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the struct is writable.
    let st = sys::check(unsafe { libc::fstatfs(fd.as_raw_fd(), &mut fs) })
        .and_then(|_| status(fd))
        .map_err(|e| reason("the guest's memory cannot be examined", e))?;
    // The type of the field differs between C libraries.
    #[allow(clippy::unnecessary_cast)]
    let (kind, huge) = (fs.f_type as i64, fs.f_bsize as u64);
    if st.st_mode & libc::S_IFMT != libc::S_IFREG || ![TMPFS, HUGETLBFS].contains(&kind) {
        return Err("the guest's memory is not in memory (memory-backend-memfd,share=on): a file system \
                    could make the network wait"
            .into());
    }
    let page = sys::page_size();
    let (block, huge) = if kind == HUGETLBFS { (huge.max(page), true) } else { (page, false) };
    if !block.is_power_of_two() {
        return Err(format!("the guest's memory has pages of {block} bytes"));
    }
    Ok(Backing { len: u64::try_from(st.st_size).unwrap_or(0), block, huge })
}

/// A stretch of guest memory that was found in the regions. Good until the Memory is changed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    /// `None`: a hole, which reads as zeros.
    at: Option<NonNull<u8>>,
    len: usize,
}

// SAFETY: a pointer that is used only with the Memory it points into, by the thread that has both.
unsafe impl Send for Piece {}

impl Piece {
    /// Bytes.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Takes the first `n` bytes (all when there are fewer) off.
    pub(super) fn split(&mut self, n: usize) -> Piece {
        let n = n.min(self.len);
        let front = Piece { at: self.at, len: n };
        // SAFETY: at most one past the end.
        self.at = self.at.map(|at| unsafe { at.add(n) });
        self.len -= n;
        front
    }

    /// Copies guest memory to `to`, which has the same length or less.
    ///
    /// # Safety
    /// The Memory that it was found in is still mapped.
    pub(super) unsafe fn read(&self, to: &mut [u8]) {
        let n = to.len().min(self.len);
        let Some(at) = self.at else { return to.iter_mut().take(n).for_each(|b| *b = 0) };
        // SAFETY: `n` bytes are mapped (the caller), and `to` is ours alone. The guest may write meanwhile: what
        // arrives are bytes of any value, which is all that is expected of them.
        unsafe { copy(at.as_ptr().cast_const(), to.as_mut_ptr(), n) };
    }

    /// Copies `from`, which has the same length or less, to guest memory.
    ///
    /// # Safety
    /// The Memory that it was found in is still mapped.
    pub(super) unsafe fn write(&self, from: &[u8]) {
        let n = from.len().min(self.len);
        let Some(at) = self.at else { return };
        // SAFETY: as for `read`; guest memory is never the target of a reference of ours.
        unsafe { copy(from.as_ptr(), at.as_ptr(), n) };
    }
}

/// All regions of a guest.
#[derive(Default)]
pub(super) struct Memory {
    regions: Vec<Region>,
    /// The address space that they fill.
    _mapped: Option<Charge>,
    /// Pages that a file may still be asked about.
    checks: u32,
}

// SAFETY: the mappings belong to the Memory and are reached through it alone.
unsafe impl Send for Memory {}

impl Memory {
    /// Maps the regions, each from its file, within what `quota` allows.
    pub(super) fn map(specs: &[RegionSpec], fds: &[OwnedFd], quota: &Arc<Quota>) -> Result<Memory, String> {
        if specs.len() > REGIONS_MAX || specs.len() != fds.len() {
            return Err(format!("{} regions of memory came with {} files", specs.len(), fds.len()));
        }
        let overlap = |a: u64, b: u64, a_len: u64, b_len: u64| {
            a < b.saturating_add(b_len) && b < a.saturating_add(a_len)
        };
        for (i, a) in specs.iter().enumerate() {
            for b in specs.iter().skip(i + 1) {
                if overlap(a.guest, b.guest, a.size, b.size) || overlap(a.user, b.user, a.size, b.size) {
                    return Err("regions of the guest's memory overlap".into());
                }
            }
        }
        retained::release();
        let files = fds.iter().map(backing).collect::<Result<Vec<_>, _>>()?;
        let mut bytes = 0u64;
        for (spec, file) in specs.iter().zip(&files) {
            bytes = bytes.saturating_add(extent(spec, file.block)?.0);
        }
        let mut mapped = Charge::new(quota, Resource::Mapped);
        mapped.set(bytes).map_err(|e| format!("a front-end shares {bytes} bytes of memory: {e}"))?;
        let all = specs.iter().zip(fds).zip(files);
        let regions = all.map(|((spec, fd), file)| Region::new(*spec, fd, file, quota));
        Ok(Memory { regions: regions.collect::<Result<_, _>>()?, _mapped: Some(mapped), checks: 0 })
    }

    /// Regions, which hold a descriptor each.
    pub(super) fn len(&self) -> usize {
        self.regions.len()
    }

    /// True when the file behind a region was cut off.
    pub(super) fn is_lost(&self) -> bool {
        self.regions.iter().any(Region::is_lost)
    }

    /// A frame begins: its files may be asked about so many pages.
    pub(super) fn allow_checks(&mut self, n: u32) {
        self.checks = n;
    }

    /// How many of them are left.
    pub(super) fn checks_left(&self) -> u32 {
        self.checks
    }

    /// Calls `each` with the pieces of a stretch.
    pub(super) fn pieces(
        &mut self,
        mut at: u64,
        mut len: usize,
        access: Access,
        mut each: impl FnMut(Piece),
    ) -> Result<(), Fault> {
        while len > 0 {
            let (r, inside) = find(&mut self.regions, at)?;
            let n = (r.spec.size - inside).min(len as u64) as usize;
            let piece = r.piece(inside, n, access, &mut self.checks)?;
            len -= piece.len();
            at = at.wrapping_add(piece.len() as u64);
            each(piece);
        }
        Ok(())
    }

    /// Copies `to.len()` bytes from a guest address.
    #[inline]
    pub(super) fn read(&mut self, at: u64, to: &mut [u8]) -> Result<(), Fault> {
        let (r, inside) = find(&mut self.regions, at)?;
        if r.is_known(inside, to.len()) {
            // SAFETY: `inside` and as many bytes behind it are in the region, which is mapped; `to` is ours alone.
            unsafe { copy(r.base.add(inside as usize).cast_const(), to.as_mut_ptr(), to.len()) };
            return Ok(());
        }
        self.read_pieces(at, to)
    }

    /// The same piece by piece, for stretches of several regions or with pages that are not known.
    #[cold]
    fn read_pieces(&mut self, at: u64, to: &mut [u8]) -> Result<(), Fault> {
        let mut done = 0;
        self.pieces(at, to.len(), Access::Read, |p| {
            if let Some(to) = to.get_mut(done..done + p.len()) {
                // SAFETY: found in this Memory, which is borrowed.
                unsafe { p.read(to) };
            }
            done += p.len();
        })
    }

    /// Where the front-end's address `user` is, when `len` bytes from it lie in one region, can be touched, and it
    /// is aligned.
    pub(super) fn ring(&mut self, user: u64, len: usize, align: usize) -> Result<NonNull<u8>, Fault> {
        let r = self.regions.iter_mut().find(|r| user.wrapping_sub(r.spec.user) < r.spec.size);
        let r = r.ok_or(Fault::TxContext)?;
        let inside = user - r.spec.user;
        if len as u64 > r.spec.size - inside || r.is_lost() {
            return Err(Fault::TxContext);
        }
        // SAFETY: inside the region.
        let at = NonNull::new(unsafe { r.base.add(inside as usize) }).ok_or(Fault::TxContext)?;
        if !at.addr().get().is_multiple_of(align) {
            return Err(Fault::TxContext);
        }
        // As many as the ring has pages.
        let mut checks = u32::MAX;
        r.piece(inside, len, Access::Write, &mut checks)?;
        Ok(at)
    }
}

/// The region with a guest address, and where it is in it. Of one that is lost nothing more is touched.
#[inline]
fn find(regions: &mut [Region], at: u64) -> Result<(&mut Region, u64), Fault> {
    for r in regions {
        let inside = at.wrapping_sub(r.spec.guest);
        if inside < r.spec.size {
            return if r.is_lost() { Err(Fault::TxContext) } else { Ok((r, inside)) };
        }
    }
    Err(Fault::TxContext)
}
