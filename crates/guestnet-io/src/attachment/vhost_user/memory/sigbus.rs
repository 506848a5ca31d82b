//! Theory of operation: a front-end can cut off the file behind the memory that it shares, and then any touch
//! of it is SIGBUS. The handler here knows the regions that are mapped: it puts an empty page of our own in the
//! place of the one that was touched and notes that the region is lost, so that nothing more of it is looked up,
//! and the worker gives the guest up at the end of the batch. Where even a page cannot be had, the process ends:
//! a failed replacement may leave a hole, which a mapping of another thread could take, and the guest's frames
//! would be written there. A SIGBUS from anywhere else goes to whoever handled it before.

// A signal handler and the calls it may make.
#![allow(unsafe_code)]

use crate::os::sys;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

/// Regions that can be watched at once, by all workers of the process.
const SLOTS: usize = 16384;

struct Slot {
    /// Where the region begins; 0: free, 1: being filled.
    start: AtomicUsize,
    len: AtomicUsize,
    /// Bytes of a page of it, a power of two.
    page: AtomicUsize,
    lost: AtomicBool,
}

static WATCHED: [Slot; SLOTS] = [const {
    Slot {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        lost: AtomicBool::new(false),
    }
}; SLOTS];

/// Who handled SIGBUS before us; lives for ever once set.
static BEFORE: AtomicPtr<libc::sigaction> = AtomicPtr::new(null_mut());

/// One watched mapping. To be dropped before the mapping is.
pub(super) struct Watched(&'static Slot);

impl Watched {
    /// Watches a mapping of whole pages of `page` bytes each.
    ///
    /// # Errors
    /// EMFILE when too many are watched, or what sigaction says.
    pub(super) fn new(start: usize, len: usize, page: usize) -> Result<Watched, i32> {
        install()?;
        for slot in &WATCHED {
            if slot.start.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                slot.lost.store(false, Ordering::Relaxed);
                slot.len.store(len, Ordering::Relaxed);
                slot.page.store(page, Ordering::Relaxed);
                slot.start.store(start, Ordering::Release);
                return Ok(Watched(slot));
            }
        }
        Err(libc::EMFILE)
    }

    /// True when what was behind the mapping is gone.
    pub(super) fn is_lost(&self) -> bool {
        self.0.lost.load(Ordering::Relaxed)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.0.start.store(0, Ordering::Release);
    }
}

/// Makes our handler the one, unless it is. Looked at for each guest: somebody may have put theirs over it.
fn install() -> Result<(), i32> {
    let ours = on_sigbus as extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) as usize;
    // SAFETY: a sigaction is plain data; zero is "default, no flags".
    let mut now: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: `now` is writable.
    sys::check(unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut now) })?;
    if now.sa_sigaction == ours {
        return Ok(());
    }
    // Never freed: a handler may be reading it. Handlers do not change often.
    BEFORE.store(Box::into_raw(Box::new(now)), Ordering::Release);
    // SAFETY: as above.
    let mut new: libc::sigaction = unsafe { std::mem::zeroed() };
    new.sa_sigaction = ours;
    new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `new` is a whole sigaction, and the handler makes async-signal-safe calls only.
    sys::check(unsafe { libc::sigaction(libc::SIGBUS, &new, null_mut()) })?;
    Ok(())
}

extern "C" fn on_sigbus(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid siginfo, of a fault where it was one; errno is this thread's own.
    let (at, errno) = unsafe { ((*info).si_addr() as usize, libc::__errno_location()) };
    // SAFETY: errno's address is valid for the thread.
    let kept = unsafe { *errno };
    let found = WATCHED.iter().find(|s| {
        let start = s.start.load(Ordering::Acquire);
        start > 1 && at >= start && at - start < s.len.load(Ordering::Relaxed)
    });
    if let Some(s) = found {
        let page = s.page.load(Ordering::Relaxed);
        s.lost.store(true, Ordering::Relaxed);
        // SAFETY: the page is within a mapping of ours that stays mapped while it is watched, and is in use by the
        // interrupted thread alone; only what is behind it changes. mmap is a plain system call.
        let new = unsafe {
            libc::mmap(
                (at & !(page - 1)) as *mut libc::c_void,
                page,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if new == libc::MAP_FAILED {
            let text = b"guestnet: no memory to replace a page of a guest's memory that was taken away\n";
            // SAFETY: the text lives; both calls are async-signal-safe.
            unsafe {
                libc::write(2, text.as_ptr().cast(), text.len());
                libc::abort();
            }
        }
    } else {
        // Not ours: the touch is repeated under the handler that was there before.
        let before = BEFORE.load(Ordering::Acquire);
        if !before.is_null() {
            // SAFETY: set once to a whole sigaction that is never freed.
            unsafe { libc::sigaction(libc::SIGBUS, before, null_mut()) };
        }
    }
    // SAFETY: as above.
    unsafe { *errno = kept };
}
