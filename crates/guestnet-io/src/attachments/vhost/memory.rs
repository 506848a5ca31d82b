//! Theory of operation: the guest's memory, as the front-end shares it: up to [`REGIONS_MAX`] pieces of files,
//! mapped here. Two address spaces lead into it: the guest's physical addresses (in descriptors) and the
//! front-end's own (of the rings). Every address is checked against the regions each time it is used, and
//! everything is copied out before it is believed, since the guest can change it at any moment. Only memory
//! that cannot make us wait for somebody is taken: memfd, /dev/shm and huge pages, not a file system.

// Mapping, and copies from and to memory that others write.
#![allow(unsafe_code)]

use super::lost::Watched;
use crate::attachments::reason;
use crate::sys;
use std::os::fd::{AsRawFd, OwnedFd};

/// Regions that the protocol's table has room for.
pub(super) const REGIONS_MAX: usize = 8;

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

struct Region {
    spec: RegionSpec,
    /// Where its first byte is.
    base: *mut u8,
    map: *mut libc::c_void,
    map_len: usize,
    watched: Option<Watched>,
}

impl Region {
    fn new(spec: RegionSpec, fd: &OwnedFd) -> Result<Region, String> {
        let RegionSpec { guest, size, user, offset } = spec;
        let end = offset.checked_add(size).filter(|_| size > 0);
        let ends = (end, guest.checked_add(size), user.checked_add(size));
        let (Some(end), Some(_), Some(_)) = ends else {
            return Err("a region of the guest's memory is empty or wraps around".into());
        };
        let (len, block) = file(fd)?;
        if end > len {
            return Err(format!("a region ends at byte {end} of a file of {len}"));
        }
        // Huge pages are mapped whole.
        let from = offset / block * block;
        let map_len = usize::try_from((end - from).next_multiple_of(block))
            .map_err(|_| "a region is larger than the address space".to_owned())?;
        let from_signed =
            i64::try_from(from).map_err(|_| "a region begins too far in its file".to_owned())?;
        // SAFETY: a new mapping at a place of the kernel's choice; nothing of ours is changed.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                map_len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                fd.as_raw_fd(),
                from_signed,
            )
        };
        if map == libc::MAP_FAILED {
            return Err(reason("the guest's memory cannot be mapped", sys::errno()));
        }
        // SAFETY: `offset - from` is less than a block, and the mapping is at least that plus `size` long.
        let base = unsafe { map.cast::<u8>().add((offset - from) as usize) };
        // Unmapped by its drop when it cannot be watched.
        let mut region = Region { spec, base, map, map_len, watched: None };
        let watched = Watched::new(map as usize, map_len)
            .map_err(|e| reason("the guest's memory cannot be watched over", e))?;
        region.watched = Some(watched);
        Ok(region)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.watched = None;
        // SAFETY: exactly what `new` mapped; whoever had a pointer into it had borrowed the Memory.
        unsafe { libc::munmap(self.map, self.map_len) };
    }
}

/// Length of a file that guest memory may be in, and the size of its pages.
fn file(fd: &OwnedFd) -> Result<(u64, u64), String> {
    // SAFETY: plain numbers.
    let (mut fs, mut st): (libc::statfs, libc::stat) = unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
    // SAFETY: both structs are writable.
    let got = unsafe {
        sys::check(libc::fstatfs(fd.as_raw_fd(), &mut fs))
            .and_then(|_| sys::check(libc::fstat(fd.as_raw_fd(), &mut st)))
    };
    got.map_err(|e| reason("the guest's memory cannot be examined", e))?;
    // The type of the field differs between C libraries.
    #[allow(clippy::unnecessary_cast)]
    let (kind, huge) = (fs.f_type as i64, fs.f_bsize as u64);
    if st.st_mode & libc::S_IFMT != libc::S_IFREG || ![TMPFS, HUGETLBFS].contains(&kind) {
        return Err("the guest's memory is not in memory (memory-backend-memfd,share=on): a file system \
                    could make the network wait"
            .into());
    }
    // SAFETY: no pointers.
    let page = u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    let block = if kind == HUGETLBFS { huge.max(page) } else { page };
    Ok((u64::try_from(st.st_size).unwrap_or(0), block))
}

/// An address that no region has, or a stretch that leaves them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Outside;

/// A stretch of guest memory that was found in the regions. Good until the Memory is changed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    at: *mut u8,
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
        self.at = unsafe { self.at.add(n) };
        self.len -= n;
        front
    }

    /// Copies guest memory to `to`, which has the same length or less.
    ///
    /// # Safety
    /// The Memory that it was found in is still mapped.
    pub(super) unsafe fn read(&self, to: &mut [u8]) {
        let n = to.len().min(self.len);
        // SAFETY: `n` bytes are mapped (the caller), and `to` is ours alone. The guest may write meanwhile: what
        // arrives are bytes of any value, which is all that is expected of them.
        unsafe { std::ptr::copy_nonoverlapping(self.at.cast_const(), to.as_mut_ptr(), n) };
    }

    /// Copies `from`, which has the same length or less, to guest memory.
    ///
    /// # Safety
    /// The Memory that it was found in is still mapped.
    pub(super) unsafe fn write(&self, from: &[u8]) {
        let n = from.len().min(self.len);
        // SAFETY: as for `read`; guest memory is never the target of a reference of ours.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.at, n) };
    }
}

/// All regions of a guest.
#[derive(Default)]
pub(super) struct Memory {
    regions: Vec<Region>,
}

// SAFETY: the mappings belong to the Memory and are reached through it alone.
unsafe impl Send for Memory {}

impl Memory {
    /// Maps the regions, each from its file.
    pub(super) fn map(specs: &[RegionSpec], fds: &[OwnedFd]) -> Result<Memory, String> {
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
        let regions: Result<Vec<Region>, String> =
            specs.iter().zip(fds).map(|(spec, fd)| Region::new(*spec, fd)).collect();
        Ok(Memory { regions: regions? })
    }

    /// True when the file behind a region was cut off.
    pub(super) fn is_lost(&self) -> bool {
        self.regions.iter().any(|r| r.watched.as_ref().is_some_and(Watched::is_lost))
    }

    /// The stretch of `len` bytes at a guest address: its first piece, which is shorter than `len` where a
    /// region ends.
    pub(super) fn piece(&self, at: u64, len: usize) -> Result<Piece, Outside> {
        for r in &self.regions {
            let inside = at.wrapping_sub(r.spec.guest);
            if inside < r.spec.size {
                let left = (r.spec.size - inside).min(len as u64) as usize;
                // SAFETY: `inside` is less than the size of the region, which is mapped from `base` on.
                return Ok(Piece { at: unsafe { r.base.add(inside as usize) }, len: left });
            }
        }
        Err(Outside)
    }

    /// Calls `each` with the pieces of a stretch.
    pub(super) fn pieces(
        &self,
        mut at: u64,
        mut len: usize,
        mut each: impl FnMut(Piece),
    ) -> Result<(), Outside> {
        while len > 0 {
            let piece = self.piece(at, len)?;
            len -= piece.len();
            at = at.wrapping_add(piece.len() as u64);
            each(piece);
        }
        Ok(())
    }

    /// Copies `to.len()` bytes from a guest address.
    pub(super) fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Outside> {
        let mut done = 0;
        self.pieces(at, to.len(), |p| {
            if let Some(to) = to.get_mut(done..done + p.len()) {
                // SAFETY: found in this Memory, which is borrowed.
                unsafe { p.read(to) };
            }
            done += p.len();
        })
    }

    /// Where the front-end's address `user` is, when `len` bytes from it lie in one region and it is aligned.
    pub(super) fn ring(&self, user: u64, len: usize, align: usize) -> Option<*mut u8> {
        let r = self.regions.iter().find(|r| user.wrapping_sub(r.spec.user) < r.spec.size)?;
        let inside = user - r.spec.user;
        if len as u64 > r.spec.size - inside {
            return None;
        }
        // SAFETY: inside the region.
        let at = unsafe { r.base.add(inside as usize) };
        (at as usize).is_multiple_of(align).then_some(at)
    }
}
