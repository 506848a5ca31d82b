//! Theory of operation: the messages of vhost-user (QEMU, docs/interop/vhost-user.rst) on their socket: a header
//! of request, flags and length, a body, and descriptors that come along. Read as they arrive and never waited
//! for; a front-end that sends half a message keeps nobody waiting. All numbers have this machine's byte order.

// recvmsg and sendmsg take raw pointers.
#![allow(unsafe_code)]

use super::memory::{REGIONS_MAX, RegionSpec};
use crate::attachment::{ReadOutcome, reason};
use crate::os::cmsg::{self, Control};
use crate::os::sys;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Bytes of a header.
const HEADER: usize = 12;
/// Bytes of the longest body that is understood: a table of eight regions.
const BODY_MAX: usize = 8 + 32 * REGIONS_MAX;
/// Descriptors that come with one message at most.
const FDS_MAX: usize = REGIONS_MAX;

const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;

/// Bit of SET_VRING_KICK and its like: no descriptor comes along.
const NO_FD: u64 = 0x100;

/// What the front-end asks for.
#[derive(Debug)]
pub(super) enum Request {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemory(Vec<RegionSpec>, Vec<OwnedFd>),
    SetVringNum {
        index: u32,
        num: u32,
    },
    SetVringAddr {
        index: u32,
        desc: u64,
        used: u64,
        avail: u64,
    },
    SetVringBase {
        index: u32,
        base: u32,
    },
    GetVringBase {
        index: u32,
    },
    SetVringKick {
        index: u32,
        fd: Option<OwnedFd>,
    },
    SetVringCall {
        index: u32,
        fd: Option<OwnedFd>,
    },
    SetVringErr {
        index: u32,
        fd: Option<OwnedFd>,
    },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable {
        index: u32,
        on: bool,
    },
    /// Nothing that was offered.
    Unknown,
}

/// A message.
#[derive(Debug)]
pub(super) struct Message {
    /// The number of the request, for the reply.
    pub number: u32,
    /// The front-end waits to hear whether it was done.
    pub need_reply: bool,
    pub request: Request,
}

/// The connection to a front-end.
pub(super) struct Channel {
    pub fd: OwnedFd,
    buf: [u8; HEADER + BODY_MAX],
    have: usize,
    fds: Vec<OwnedFd>,
}

impl Channel {
    pub(super) fn new(fd: OwnedFd) -> Channel {
        Channel { fd, buf: [0; HEADER + BODY_MAX], have: 0, fds: Vec::new() }
    }

    /// The next message, when all of it is there.
    pub(super) fn receive(&mut self) -> ReadOutcome<Message> {
        loop {
            let want = if self.have < HEADER { HEADER } else { HEADER + self.body_len() };
            if want > self.buf.len() {
                return ReadOutcome::Down(format!("the front-end sent a message of {want} bytes"));
            }
            if self.have == want && self.have >= HEADER {
                return self.take();
            }
            match self.read(want) {
                Ok(0) => return ReadOutcome::Down("the front-end closed the connection".into()),
                Ok(n) => self.have += n,
                Err(e) if sys::would_block(e) => return ReadOutcome::Empty,
                Err(libc::EMSGSIZE) => {
                    return ReadOutcome::Down("the front-end sent too many descriptors".into());
                }
                Err(e) => return ReadOutcome::Down(reason("the connection to the front-end broke", e)),
            }
            if self.have == HEADER && self.body_len() == 0 {
                return self.take();
            }
        }
    }

    /// Descriptors of a message that is not whole yet.
    pub(super) fn descriptors(&self) -> usize {
        self.fds.len()
    }

    fn word(&self, at: usize) -> u32 {
        u32::from_ne_bytes(array(&self.buf, at))
    }

    fn body_len(&self) -> usize {
        self.word(8) as usize
    }

    /// Reads up to byte `want` of the message, and the descriptors that come with it.
    fn read(&mut self, want: usize) -> Result<usize, i32> {
        let Some(free) = self.buf.get_mut(self.have..want) else { return Err(libc::EINVAL) };
        let mut control = Control::EMPTY;
        let mut iov = libc::iovec { iov_base: free.as_mut_ptr().cast(), iov_len: free.len() };
        let mut msg = cmsg::msghdr();
        msg.msg_iov = &raw mut iov;
        msg.msg_iovlen = 1;
        msg.msg_control = control.0.as_mut_ptr().cast();
        msg.msg_controllen = control.0.len() as _;
        // SAFETY: the buffers live and have the lengths given.
        let got = sys::check_len(unsafe {
            libc::recvmsg(self.fd.as_raw_fd(), &mut msg, libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC)
        })?;
        let fds = &mut self.fds;
        cmsg::for_each(&msg, |level, kind, data| {
            if level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS {
                for raw in data.chunks_exact(4) {
                    // SAFETY: the kernel has just given us this descriptor.
                    fds.push(unsafe { OwnedFd::from_raw_fd(i32::from_ne_bytes(array(raw, 0))) });
                }
            }
        });
        if msg.msg_flags & libc::MSG_CTRUNC != 0 || self.fds.len() > FDS_MAX {
            return Err(libc::EMSGSIZE);
        }
        Ok(got)
    }

    /// The message in the buffer.
    fn take(&mut self) -> ReadOutcome<Message> {
        let (number, flags, len) = (self.word(0), self.word(4), self.body_len());
        let body = self.buf.get(HEADER..HEADER + len).unwrap_or(&[]);
        let fds = std::mem::take(&mut self.fds);
        self.have = 0;
        if flags & (VERSION | 2 | REPLY) != VERSION {
            return ReadOutcome::Down(format!("the front-end sent a message with flags {flags:#x}"));
        }
        match parse(number, body, fds) {
            Some(request) => {
                ReadOutcome::Frame(Message { number, need_reply: flags & NEED_REPLY != 0, request })
            }
            None => ReadOutcome::Down(format!("message {number} of the front-end is not of its form")),
        }
    }

    /// Answers a message. The front-end reads it soon, or is given up.
    pub(super) fn reply(&self, number: u32, body: &[u8]) -> Result<(), String> {
        let mut out = [0u8; HEADER + 8];
        let len = HEADER + body.len().min(8);
        for (at, v) in [number, VERSION | REPLY, body.len() as u32].into_iter().enumerate() {
            guestnet_wire::put(&mut out, at * 4, &v.to_ne_bytes());
        }
        guestnet_wire::put(&mut out, HEADER, body);
        match sys::send(&self.fd, &out[..len]) {
            Ok(n) if n == len => Ok(()),
            Ok(_) => Err("the front-end does not read its replies".into()),
            Err(e) => Err(reason("the front-end takes no reply", e)),
        }
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..at + N).and_then(|b| b.try_into().ok()).unwrap_or([0; N])
}

/// A request without descriptors from any bytes, for the fuzzer.
#[cfg(fuzzing)]
pub(super) fn any(number: u32, body: &[u8]) -> Option<Request> {
    parse(number, body, Vec::new())
}

/// Reads a request; `None` when its body or its descriptors are not what it is to have.
fn parse(number: u32, body: &[u8], mut fds: Vec<OwnedFd>) -> Option<Request> {
    let u32_at = |at: usize| u32::from_ne_bytes(array(body, at));
    let u64_at = |at: usize| u64::from_ne_bytes(array(body, at));
    let sized = |len: usize| (body.len() == len).then_some(());
    let mut vring_fd = || -> Option<(u32, Option<OwnedFd>)> {
        sized(8)?;
        let v = u64_at(0);
        let fd = fds.pop();
        // Nothing besides the index and the bit; a descriptor exactly where the bit says so.
        (v & !(NO_FD | 0xff) == 0 && fds.is_empty() && fd.is_none() == (v & NO_FD != 0))
            .then_some(((v & 0xff) as u32, fd))
    };
    Some(match number {
        1 => Request::GetFeatures,
        2 => sized(8).map(|()| Request::SetFeatures(u64_at(0)))?,
        3 => Request::SetOwner,
        4 => Request::ResetOwner,
        5 => {
            let count = u32_at(0) as usize;
            if count > REGIONS_MAX || body.len() != 8 + 32 * count || fds.len() != count {
                return None;
            }
            let region = |i: usize| {
                let at = 8 + 32 * i;
                RegionSpec {
                    guest: u64_at(at),
                    size: u64_at(at + 8),
                    user: u64_at(at + 16),
                    offset: u64_at(at + 24),
                }
            };
            Request::SetMemory((0..count).map(region).collect(), fds)
        }
        8 => sized(8).map(|()| Request::SetVringNum { index: u32_at(0), num: u32_at(4) })?,
        9 => sized(40).map(|()| Request::SetVringAddr {
            index: u32_at(0),
            desc: u64_at(8),
            used: u64_at(16),
            avail: u64_at(24),
        })?,
        10 => sized(8).map(|()| Request::SetVringBase { index: u32_at(0), base: u32_at(4) })?,
        11 => sized(8).map(|()| Request::GetVringBase { index: u32_at(0) })?,
        12 => vring_fd().map(|(index, fd)| Request::SetVringKick { index, fd })?,
        13 => vring_fd().map(|(index, fd)| Request::SetVringCall { index, fd })?,
        14 => vring_fd().map(|(index, fd)| Request::SetVringErr { index, fd })?,
        15 => Request::GetProtocolFeatures,
        16 => sized(8).map(|()| Request::SetProtocolFeatures(u64_at(0)))?,
        17 => Request::GetQueueNum,
        18 => sized(8).map(|()| Request::SetVringEnable { index: u32_at(0), on: u32_at(4) != 0 })?,
        _ => Request::Unknown,
    })
}
