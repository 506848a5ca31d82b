//! Theory of operation: a thin layer over epoll. What is watched is named by a [`Token`] (what it is, which
//! slot, which generation of the slot), so an event leads to its owner without a table, and one for an owner
//! that is gone is recognised. Timeouts are exact to the nanosecond where the kernel has epoll_pwait2.

// System calls take raw pointers.
#![allow(unsafe_code)]

use crate::os::sys;
use guestnet_core::types::Time;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

/// What an event is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The command queue.
    Waker,
    /// An attachment, by slot.
    Port,
    /// An uplink socket.
    Sock,
    /// A socket on which guests arrive.
    Listener,
    /// A published TCP port.
    Forward,
    /// A queue of a vhost-user attachment.
    Kick,
    /// The uplink of packets.
    Tun,
    /// The worker itself has something to do.
    Worker,
    /// A network of the worker, by slot.
    Shard,
}

/// Names what is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Token {
    pub kind: Kind,
    pub index: u32,
    pub generation: u32,
}

impl Token {
    fn pack(self) -> u64 {
        (self.kind as u64) << 56 | u64::from(self.generation & 0xff_ffff) << 32 | u64::from(self.index)
    }

    fn unpack(v: u64) -> Token {
        let kind = match v >> 56 {
            1 => Kind::Port,
            2 => Kind::Sock,
            3 => Kind::Listener,
            4 => Kind::Forward,
            5 => Kind::Kick,
            6 => Kind::Tun,
            7 => Kind::Worker,
            8 => Kind::Shard,
            _ => Kind::Waker,
        };
        Token { kind, index: v as u32, generation: (v >> 32) as u32 & 0xff_ffff }
    }
}

/// One event.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ready {
    pub token: Token,
    pub events: u32,
}

impl Ready {
    pub(crate) fn has(self, bits: i32) -> bool {
        self.events & bits as u32 != 0
    }
}

/// A descriptor that is watched until this is dropped.
pub(crate) struct Watch {
    fd: Option<OwnedFd>,
    epoll: Arc<OwnedFd>,
}

impl Watch {
    /// The descriptor, which is not watched any more.
    pub(crate) fn into_fd(mut self) -> Option<OwnedFd> {
        self.end();
        self.fd.take()
    }

    fn end(&self) {
        let Some(fd) = &self.fd else { return };
        // SAFETY: both are open, and DEL takes no event. It can fail only when it is not watched.
        unsafe {
            libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_DEL, fd.as_raw_fd(), std::ptr::null_mut())
        };
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end();
    }
}

/// An epoll instance with room for a batch of events.
pub(crate) struct Poller {
    fd: Arc<OwnedFd>,
    events: Vec<libc::epoll_event>,
    ready: usize,
    /// The kernel has no epoll_pwait2 (before 5.11).
    coarse: bool,
}

impl Poller {
    pub(crate) fn new(batch: usize) -> Result<Poller, i32> {
        // SAFETY: no pointers.
        let fd = sys::check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: the kernel has just made it for us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Poller {
            fd: Arc::new(fd),
            events: vec![libc::epoll_event { events: 0, u64: 0 }; batch],
            ready: 0,
            coarse: false,
        })
    }

    fn ctl(&self, op: i32, fd: &OwnedFd, token: Token, events: i32) -> Result<(), i32> {
        self.ctl_raw(op, fd.as_raw_fd(), token, events)
    }

    fn ctl_raw(&self, op: i32, fd: RawFd, token: Token, events: i32) -> Result<(), i32> {
        let mut ev = libc::epoll_event { events: events as u32, u64: token.pack() };
        // SAFETY: the event lives.
        sys::check(unsafe { libc::epoll_ctl(self.fd.as_raw_fd(), op, fd, &mut ev) }).map(|_| ())
    }

    pub(crate) fn add(&self, fd: &OwnedFd, token: Token, events: i32) -> Result<(), i32> {
        self.ctl(libc::EPOLL_CTL_ADD, fd, token, events)
    }

    /// The same for a descriptor that somebody else has and keeps open.
    pub(crate) fn add_raw(&self, fd: RawFd, token: Token, events: i32) -> Result<(), i32> {
        self.ctl_raw(libc::EPOLL_CTL_ADD, fd, token, events)
    }

    pub(crate) fn modify(&self, fd: &OwnedFd, token: Token, events: i32) -> Result<(), i32> {
        self.ctl(libc::EPOLL_CTL_MOD, fd, token, events)
    }

    /// Watches a descriptor that another owner keeps open no more.
    pub(crate) fn remove_raw(&self, fd: RawFd) {
        let none = Token { kind: Kind::Waker, index: 0, generation: 0 };
        // It can fail only when it is not watched.
        let _gone = self.ctl_raw(libc::EPOLL_CTL_DEL, fd, none, 0);
    }

    /// Watches a descriptor no more. Needed only where others hold it too.
    pub(crate) fn remove(&self, fd: &OwnedFd) {
        let none = Token { kind: Kind::Waker, index: 0, generation: 0 };
        // It can fail only when it is not watched.
        let _gone = self.ctl(libc::EPOLL_CTL_DEL, fd, none, 0);
    }

    /// The descriptor of the instance itself: readable when something watched is ready.
    pub(crate) fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Watches a descriptor that others hold too for being written to: each write is reported, and nothing is
    /// read of it. Closing it would not end that, so dropping what is returned does.
    pub(crate) fn watch_edges(&self, fd: OwnedFd, token: Token) -> Result<Watch, i32> {
        self.add(&fd, token, libc::EPOLLIN | libc::EPOLLET)?;
        Ok(Watch { fd: Some(fd), epoll: Arc::clone(&self.fd) })
    }

    /// Waits until something is ready or `timeout` (nanoseconds; `None`: without end) is over; returns how
    /// many events there are.
    pub(crate) fn wait(&mut self, timeout: Option<u64>) -> Result<usize, i32> {
        self.ready = 0;
        let (events, max) = (self.events.as_mut_ptr(), self.events.len() as i32);
        if !self.coarse {
            let ts = timeout.map(|ns| libc::timespec {
                tv_sec: (ns / 1_000_000_000) as libc::time_t,
                tv_nsec: (ns % 1_000_000_000) as _,
            });
            let ts = ts.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
            // SAFETY: room for `max` events, a live timespec or null, no signal mask.
            let ret = unsafe {
                libc::syscall(
                    libc::SYS_epoll_pwait2,
                    self.fd.as_raw_fd(),
                    events,
                    max,
                    ts,
                    std::ptr::null::<libc::sigset_t>(),
                    0usize,
                )
            };
            match sys::check_len(ret as isize) {
                Ok(n) => {
                    self.ready = n;
                    return Ok(n);
                }
                Err(libc::EINTR) => return Ok(0),
                Err(libc::ENOSYS | libc::EPERM) => self.coarse = true,
                Err(e) => return Err(e),
            }
        }
        // Rounded up, so that a timer is due when it wakes.
        let ms = timeout.map_or(-1, |ns| i32::try_from(ns.div_ceil(1_000_000)).unwrap_or(i32::MAX));
        // SAFETY: room for `max` events.
        match sys::check(unsafe { libc::epoll_wait(self.fd.as_raw_fd(), events, max, ms) }) {
            Ok(n) => self.ready = n as usize,
            Err(libc::EINTR) => {}
            Err(e) => return Err(e),
        }
        Ok(self.ready)
    }

    /// Event `i` of the last wait.
    pub(crate) fn ready(&self, i: usize) -> Option<Ready> {
        let ev = self.events.get(..self.ready)?.get(i)?;
        Some(Ready { token: Token::unpack(ev.u64), events: ev.events })
    }
}

/// Nanoseconds from `now` until the earliest of `times`.
pub(crate) fn until(now: Time, times: impl IntoIterator<Item = Option<Time>>) -> Option<u64> {
    times.into_iter().flatten().min().map(|t| t.since(now))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_comes_back_as_it_went() {
        for kind in [
            Kind::Waker,
            Kind::Port,
            Kind::Sock,
            Kind::Listener,
            Kind::Forward,
            Kind::Kick,
            Kind::Tun,
            Kind::Shard,
        ] {
            let t = Token { kind, index: u32::MAX - 3, generation: 0xab_cdef };
            assert_eq!(Token::unpack(t.pack()), t);
        }
    }

    #[test]
    fn wakes_for_a_descriptor_and_for_the_time() {
        let mut p = Poller::new(4).unwrap();
        let e = sys::eventfd().unwrap();
        let t = Token { kind: Kind::Port, index: 7, generation: 1 };
        p.add(&e, t, libc::EPOLLIN).unwrap();
        let start = sys::now();
        assert_eq!(p.wait(Some(2_500_000)), Ok(0));
        assert!(sys::now().since(start) >= 2_500_000);
        sys::eventfd_signal(&e);
        assert_eq!(p.wait(None), Ok(1));
        let r = p.ready(0).unwrap();
        assert!(r.token == t && r.has(libc::EPOLLIN) && p.ready(1).is_none());
    }
}
