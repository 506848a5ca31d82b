//! Theory of operation: eventfds that a peer has sent. The peer holds the same description: it can fill the counter
//! and clear O_NONBLOCK at any moment, and write(2) would then wait for it to read. The kernel itself signals an
//! eventfd without ever waiting, as it does for each completion of asynchronous I/O (io_submit(2), `aio_resfd`):
//! reading nothing from an empty file of our own completes at once and signals the peer. Nothing but an eventfd is
//! taken: whatever else a peer sends would be written to with our rights.

// System calls take raw pointers.
#![allow(unsafe_code)]

use crate::os::sys;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Completions that wait to be taken out of the kernel's ring at most.
const COMPLETIONS: u32 = 128;
const PREAD: u16 = 0;
const FLAG_RESFD: u32 = 1;

/// An eventfd of a peer.
#[derive(Debug)]
pub(crate) struct PeerEventfd(OwnedFd);

impl PeerEventfd {
    /// Takes a descriptor that a peer has sent.
    pub(crate) fn new(fd: OwnedFd) -> Result<PeerEventfd, String> {
        let name = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).map_err(|e| {
            let why = sys::error_text(&e);
            format!("the kind of a descriptor cannot be seen, for which /proc is needed: {why}")
        })?;
        if name.as_os_str() != "anon_inode:[eventfd]" {
            return Err(format!("a descriptor for notifications is no eventfd but {}", name.display()));
        }
        Ok(PeerEventfd(fd))
    }

    /// Adds one to it, and never waits.
    pub(crate) fn signal(&self) {
        SIGNALLER.with_borrow_mut(|s| {
            let signalled = s.get_or_insert_with(Signaller::new).as_mut().is_some_and(|s| s.signal(&self.0));
            if !signalled {
                // A system without asynchronous I/O: as well as it can be had.
                let _best_effort = sys::adopt(&self.0);
                sys::eventfd_signal(&self.0);
            }
        });
    }

    pub(crate) fn into_fd(self) -> OwnedFd {
        self.0
    }
}

thread_local! {
    /// Of this thread; `Some(None)` where there is none to be had.
    static SIGNALLER: std::cell::RefCell<Option<Option<Signaller>>> = const { std::cell::RefCell::new(None) };
}

/// An operation, as in linux/aio_abi.h. `key` and `flags` of it are zero, so that their order does not matter.
#[repr(C)]
#[derive(Default)]
struct Iocb {
    data: u64,
    key: u32,
    flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buf: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    aio_flags: u32,
    resfd: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Completion {
    data: u64,
    obj: u64,
    res: i64,
    res2: i64,
}

/// A context of asynchronous I/O, and an empty file.
struct Signaller {
    context: libc::c_ulong,
    empty: OwnedFd,
    /// Completions in the ring.
    done: u32,
}

impl Signaller {
    fn new() -> Option<Signaller> {
        // SAFETY: a name, and a new descriptor that nobody else has.
        let empty = unsafe {
            let fd = sys::check(libc::memfd_create(c"guestnet-empty".as_ptr(), libc::MFD_CLOEXEC)).ok()?;
            OwnedFd::from_raw_fd(fd)
        };
        let mut context: libc::c_ulong = 0;
        // SAFETY: the context is writable and zero.
        let made = unsafe { libc::syscall(libc::SYS_io_setup, COMPLETIONS, &raw mut context) };
        (made == 0).then_some(Signaller { context, empty, done: 0 })
    }

    /// False when it could not be done.
    fn signal(&mut self, fd: &OwnedFd) -> bool {
        if self.done >= COMPLETIONS {
            self.take_completions();
        }
        let mut op = Iocb {
            opcode: PREAD,
            fd: self.empty.as_raw_fd().cast_unsigned(),
            aio_flags: FLAG_RESFD,
            resfd: fd.as_raw_fd().cast_unsigned(),
            ..Iocb::default()
        };
        let mut list = [&raw mut op];
        // SAFETY: one operation that lives until it is done, which is before the call returns: a read of no bytes
        // from a file in memory does not wait.
        let n = unsafe { libc::syscall(libc::SYS_io_submit, self.context, 1, list.as_mut_ptr()) };
        self.done += u32::from(n == 1);
        n == 1
    }

    fn take_completions(&mut self) {
        let mut events = [Completion::default(); COMPLETIONS as usize];
        let mut none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: room for as many events as are asked for, and a live timespec.
        unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                0,
                events.len(),
                events.as_mut_ptr(),
                &raw mut none,
            )
        };
        self.done = 0;
    }
}

impl Drop for Signaller {
    fn drop(&mut self) {
        // SAFETY: made by io_setup, and used by nobody any more.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocking_eventfd(count: u32) -> OwnedFd {
        // SAFETY: a new descriptor.
        unsafe { OwnedFd::from_raw_fd(libc::eventfd(count, libc::EFD_CLOEXEC)) }
    }

    #[test]
    fn a_peer_hears_each_signal() {
        let fd = blocking_eventfd(0);
        let peer = PeerEventfd::new(fd.try_clone().unwrap()).unwrap();
        for _ in 0..1000 {
            peer.signal();
        }
        let mut count = [0; 8];
        assert_eq!(sys::read(&fd, &mut count), Ok(8));
        assert_eq!(u64::from_ne_bytes(count), 1000);
    }

    #[test]
    fn a_full_counter_of_a_blocking_description_is_not_waited_for() {
        let fd = blocking_eventfd(0);
        let peer = PeerEventfd::new(fd.try_clone().unwrap()).unwrap();
        let full = (u64::MAX - 1).to_ne_bytes();
        assert_eq!(sys::writev(&fd, &[&full]), Ok(8));
        // write(2) would wait here for ever.
        for _ in 0..3 {
            peer.signal();
        }
    }

    #[test]
    fn nothing_but_an_eventfd_is_taken() {
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let pipe = std::io::pipe().unwrap().1;
        let file = std::fs::File::open("/dev/null").unwrap();
        // SAFETY: a new descriptor.
        let epoll = unsafe { OwnedFd::from_raw_fd(libc::epoll_create1(libc::EPOLL_CLOEXEC)) };
        for fd in [OwnedFd::from(socket), pipe.into(), file.into(), epoll] {
            assert!(PeerEventfd::new(fd).unwrap_err().contains("no eventfd"));
        }
    }
}
