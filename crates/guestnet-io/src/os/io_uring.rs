//! Theory of operation: the small writes of a batch in one system call, by io_uring. Each of them wakes
//! somebody (the guest's program, a server), and the kernel would give that one the processor as soon as the
//! call is over; so that of thirty exchanges that are ready, thirty go one by one, with two switches of tasks
//! each. In one call all are done before anybody else runs, and who wakes up finds all that there is to do.
//! Everything that is submitted is done at once or not at all (MSG_DONTWAIT, RWF_NOWAIT: without these io_uring
//! would wait, whatever the descriptor says), so nothing is ever left in the ring: a run returns when all is
//! done. Without io_uring (an old kernel, a container that forbids it) nothing is put off and writes are plain
//! calls.

// Submissions take raw pointers and descriptors.
#![allow(unsafe_code)]

use crate::os::sys;
use io_uring::{IoUring, opcode, squeue, types};
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

/// Operations of one call.
pub(crate) const OPS_MAX: usize = 128;
/// A run that takes longer is given up for good.
const PATIENCE: types::Timespec = types::Timespec::new().sec(1);
/// Bytes of one write that is worth copying for it.
pub(crate) const SMALL: usize = 2048;

/// True when small writes can be gathered in one call here.
#[must_use]
pub fn io_uring_works() -> bool {
    Submitter::new(true).is_on()
}

/// Numbers of descriptors, which [`Batch`] holds borrowed; [`Op::Close`] owns its own.
#[derive(Clone, Copy)]
enum Op {
    Send(RawFd, usize, usize),
    Write(RawFd, usize, usize),
    Close(RawFd),
    /// A close that the ring has. It is never repeated: once the kernel has closed the descriptor, its number may
    /// be somebody else's. If the ring fails before, the descriptor stays open.
    Closing,
}

/// Memory that the kernel reads while a run lasts.
struct Memory {
    bytes: Vec<u8>,
}

/// Does operations in one call, where it can.
pub(crate) struct Submitter {
    ring: Option<IoUring>,
    memory: Memory,
    ops: Vec<Op>,
    results: Vec<i32>,
}

/// Operations that are about to be done; in the order in which they are added.
#[must_use]
pub(crate) struct Batch<'s, 'fd> {
    by: &'s mut Submitter,
    descriptors: PhantomData<&'fd OwnedFd>,
}

impl Submitter {
    /// With io_uring, where it is `wanted` and the system has it (Linux 6.0).
    pub(crate) fn new(wanted: bool) -> Submitter {
        let ring = || {
            let mut builder = IoUring::builder();
            builder.setup_single_issuer().setup_coop_taskrun().setup_submit_all();
            let mut ring = builder.build(OPS_MAX as u32).ok()?;
            // It can be made where it must not be used.
            // SAFETY: an operation that does nothing points to nothing.
            unsafe { ring.submission().push(&opcode::Nop::new().build()) }.ok()?;
            ring.submit_and_wait(1).ok()?;
            let done = ring.completion().next().is_some();
            done.then_some(ring)
        };
        Submitter {
            ring: wanted.then(ring).flatten(),
            memory: Memory { bytes: Vec::new() },
            ops: Vec::new(),
            results: Vec::new(),
        }
    }

    /// True where several operations are one call, and putting them off is worth it.
    pub(crate) fn is_on(&self) -> bool {
        self.ring.is_some()
    }

    /// A run of up to [`OPS_MAX`] operations.
    pub(crate) fn batch<'fd>(&mut self) -> Batch<'_, 'fd> {
        self.memory.bytes.clear();
        // Of a run that was not made: closes are due all the same.
        for op in self.ops.drain(..) {
            if matches!(op, Op::Close(_)) {
                self.memory.do_one(op);
            }
        }
        self.results.clear();
        Batch { by: self, descriptors: PhantomData }
    }
}

impl<'s, 'fd> Batch<'s, 'fd> {
    pub(crate) fn is_full(&self) -> bool {
        self.by.ops.len() >= OPS_MAX
    }

    fn copy(&mut self, data: &[u8]) -> (usize, usize) {
        let at = self.by.memory.bytes.len();
        self.by.memory.bytes.extend_from_slice(data);
        (at, data.len())
    }

    /// Sends to a socket what it takes now.
    pub(crate) fn send(&mut self, fd: &'fd OwnedFd, data: &[u8]) {
        let (at, len) = self.copy(data);
        self.by.ops.push(Op::Send(fd.as_raw_fd(), at, len));
    }

    /// Writes to a descriptor that does not block; EOPNOTSUPP where the kernel cannot promise that.
    pub(crate) fn write(&mut self, fd: &'fd OwnedFd, data: &[u8]) {
        let (at, len) = self.copy(data);
        self.by.ops.push(Op::Write(fd.as_raw_fd(), at, len));
    }

    /// Closes a descriptor.
    pub(crate) fn close(&mut self, fd: OwnedFd) {
        self.by.ops.push(Op::Close(fd.into_raw_fd()));
    }

    /// Does them all; results as of system calls, in order, with errors as negative numbers.
    pub(crate) fn run(self) -> &'s [i32] {
        let by = self.by;
        by.run();
        &by.results
    }
}

impl Submitter {
    fn run(&mut self) {
        if self.ops.len() > 1 && self.ring.is_some() {
            self.results.resize(self.ops.len(), -libc::ECANCELED);
            self.run_ring();
        } else {
            for op in self.ops.drain(..) {
                self.results.push(self.memory.do_one(op));
            }
        }
        self.ops.clear();
    }

    fn run_ring(&mut self) {
        let Submitter { ring: slot, memory, ops, results } = self;
        let Some(ring) = slot else { return };
        let mut pushed = 0;
        for (i, op) in ops.iter_mut().enumerate() {
            let entry = memory.entry(*op).user_data(i as u64);
            // SAFETY: what the entry points to is in `memory`, which does not change before the completion is
            // seen below, and is leaked where that is not to be had; descriptors are borrowed as long.
            if unsafe { ring.submission().push(&entry) }.is_ok() {
                pushed += 1;
                if matches!(op, Op::Close(_)) {
                    *op = Op::Closing;
                }
            }
        }
        let mut done = 0;
        let mut failed = false;
        while done < pushed {
            let wait = types::SubmitArgs::new().timespec(&PATIENCE);
            if let Err(e) = ring.submitter().submit_with_args(pushed - done, &wait)
                && !matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
            {
                // Cannot be, with a ring that worked.
                failed = true;
            }
            for c in ring.completion() {
                done += 1;
                if let Some(r) = usize::try_from(c.user_data()).ok().and_then(|i| results.get_mut(i)) {
                    *r = c.result();
                }
            }
            if failed {
                break;
            }
        }
        if failed {
            // What the kernel did not even take is done one by one; it might still read what it did take.
            let taken = pushed - ring.submission().len().min(pushed);
            for (op, result) in ops.iter().zip(results).skip(taken) {
                *result = memory.do_one(*op);
            }
            std::mem::forget(std::mem::take(&mut memory.bytes));
            *slot = None;
        }
    }
}

impl Memory {
    fn bytes(&self, at: usize, len: usize) -> &[u8] {
        self.bytes.get(at..at + len).unwrap_or(&[])
    }

    fn entry(&self, op: Op) -> squeue::Entry {
        match op {
            Op::Send(fd, at, len) => {
                let data = self.bytes(at, len);
                opcode::Send::new(types::Fd(fd), data.as_ptr(), data.len() as u32)
                    .flags(libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT)
                    .build()
            }
            Op::Write(fd, at, len) => {
                let data = self.bytes(at, len);
                opcode::Write::new(types::Fd(fd), data.as_ptr(), data.len() as u32)
                    .rw_flags(libc::RWF_NOWAIT)
                    .build()
            }
            Op::Close(fd) => opcode::Close::new(types::Fd(fd)).build(),
            Op::Closing => opcode::Nop::new().build(),
        }
    }

    fn do_one(&self, op: Op) -> i32 {
        let length = |r: Result<usize, i32>| r.map_or_else(|e| -e, |n| n as i32);
        // SAFETY: `Batch` holds what was given to it until this is done.
        let open = |fd: &RawFd| unsafe { BorrowedFd::borrow_raw(*fd) };
        match op {
            Op::Send(fd, at, len) => length(sys::send(&open(&fd), self.bytes(at, len))),
            Op::Write(fd, at, len) => length(sys::writev(&open(&fd), &[self.bytes(at, len)])),
            Op::Close(fd) => {
                // SAFETY: it was given to be closed, and this is the only time.
                drop(unsafe { OwnedFd::from_raw_fd(fd) });
                0
            }
            Op::Closing => -libc::ECANCELED,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    /// Both ways do the same.
    fn each(test: impl Fn(&mut Submitter)) {
        test(&mut Submitter::new(false));
        let mut ring = Submitter::new(true);
        if ring.is_on() {
            test(&mut ring);
            assert!(ring.is_on());
        }
    }

    #[test]
    fn operations_are_done_in_order_and_their_results_told() {
        each(|s| {
            let (a, mut b) = UnixStream::pair().unwrap();
            let (c, d) = UnixStream::pair().unwrap();
            for x in [&a, &c] {
                x.set_nonblocking(true).unwrap();
            }
            let (a, c) = (OwnedFd::from(a), OwnedFd::from(c));
            drop(d);
            let mut batch = s.batch();
            batch.send(&a, b"one ");
            batch.send(&c, b"nobody");
            batch.write(&a, b"two");
            assert_eq!(batch.run(), [4, -libc::EPIPE, 3]);
            let mut batch = s.batch();
            batch.send(&a, b" end");
            batch.close(c);
            assert_eq!(batch.run(), [4, 0]);
            drop(a);
            let mut text = String::new();
            b.read_to_string(&mut text).unwrap();
            assert_eq!(text, "one two end");
        });
    }

    #[test]
    fn a_close_is_not_repeated_when_the_ring_fails() {
        let mut s = Submitter::new(true);
        let Some(ring) = &s.ring else { return };
        // From now on the ring is a file that takes no submissions.
        let null = std::fs::File::open("/dev/null").unwrap();
        // SAFETY: both are open, and the ring's number stays what the ring believes to be its own.
        assert!(unsafe { libc::dup2(null.as_raw_fd(), ring.as_raw_fd()) } >= 0);
        let (a, mut b) = UnixStream::pair().unwrap();
        let (c, _d) = UnixStream::pair().unwrap();
        let number = c.as_raw_fd();
        let a = OwnedFd::from(a);
        let mut batch = s.batch();
        batch.close(c.into());
        batch.send(&a, b"goes all the same");
        assert_eq!(batch.run(), [-libc::ECANCELED, 17]);
        assert!(!s.is_on());
        let mut got = [0; 17];
        b.read_exact(&mut got).unwrap();
        // SAFETY: no pointers.
        assert!(unsafe { libc::fcntl(number, libc::F_GETFD) } >= 0, "nobody else's descriptor is closed");
    }

    #[test]
    fn what_does_not_fit_is_not_waited_for() {
        each(|s| {
            let (a, _b) = UnixStream::pair().unwrap();
            a.set_nonblocking(true).unwrap();
            let a = OwnedFd::from(a);
            let mut last = Vec::new();
            for _ in 0..1000 {
                let mut batch = s.batch();
                batch.send(&a, &[7; SMALL]);
                batch.send(&a, &[7; SMALL]);
                last = batch.run().to_vec();
                if last.contains(&-libc::EAGAIN) {
                    break;
                }
            }
            assert!(last.contains(&-libc::EAGAIN), "{last:?}");
        });
    }
}
