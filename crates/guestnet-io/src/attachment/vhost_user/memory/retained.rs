//! Theory of operation: a page that this process allocated in a guest's memory stays charged to it until the file is
//! gone, which the front-end decides, even after it has left. So the charge stays too: inotify(7) reports when the
//! last user of the file has closed it, without keeping it alive. Whoever needs a charge looks for such reports.

// System calls take raw pointers.
#![allow(unsafe_code)]

use crate::attachment::quota::Charge;
use crate::os::sys;
use std::collections::HashMap;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

/// Bytes of a report that names no file.
const REPORT: usize = 16;

#[derive(Default)]
struct Retained {
    inotify: Option<OwnedFd>,
    by_watch: HashMap<i32, Vec<Charge>>,
    /// Of files that could not be watched: kept for good.
    unwatched: Vec<Charge>,
}

static RETAINED: Mutex<Option<Retained>> = Mutex::new(None);

/// Keeps a charge for pages of a file until the file is gone.
pub(super) fn keep(file: &OwnedFd, charge: Charge) {
    if charge.amount() == 0 {
        return;
    }
    let mut guard = RETAINED.lock().unwrap_or_else(PoisonError::into_inner);
    let retained = guard.get_or_insert_with(Retained::default);
    retained.release();
    match retained.watch(file) {
        Ok(watch) => retained.by_watch.entry(watch).or_default().push(charge),
        Err(_) => retained.unwatched.push(charge),
    }
}

/// Gives charges for files back that are gone by now.
pub(super) fn release() {
    if let Some(retained) = RETAINED.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
        retained.release();
    }
}

impl Retained {
    fn watch(&mut self, file: &OwnedFd) -> Result<i32, i32> {
        if self.inotify.is_none() {
            // SAFETY: no pointers, and a new descriptor that nobody else has.
            self.inotify = Some(unsafe {
                let fd = sys::check(libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC))?;
                OwnedFd::from_raw_fd(fd)
            });
        }
        let Some(inotify) = &self.inotify else { return Err(libc::EBADF) };
        let path = format!("/proc/self/fd/{}\0", file.as_raw_fd());
        // SAFETY: the path ends with NUL.
        sys::check(unsafe {
            libc::inotify_add_watch(inotify.as_raw_fd(), path.as_ptr().cast(), libc::IN_DELETE_SELF)
        })
    }

    fn release(&mut self) {
        let Some(inotify) = &self.inotify else { return };
        let mut reports = [0u8; 64 * REPORT];
        while let Ok(n) = sys::read(inotify, &mut reports) {
            if n == 0 {
                return;
            }
            for report in reports.get(..n).unwrap_or(&[]).chunks_exact(REPORT) {
                let &[w0, w1, w2, w3, ..] = report else { continue };
                self.by_watch.remove(&i32::from_ne_bytes([w0, w1, w2, w3]));
            }
        }
    }
}
