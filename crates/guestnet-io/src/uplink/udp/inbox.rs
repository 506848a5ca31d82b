//! Theory of operation: datagrams from the outside, read many at a time. Those that the kernel did not merge are
//! merged here where they are one run.

// recvmmsg takes raw pointers.
#![allow(unsafe_code)]

use super::{BATCH, PAYLOAD_MAX, SEGMENTS_MAX, SOL_UDP, UDP_GRO};
use crate::os::cmsg::{self, Control};
use crate::os::sockaddr::RawAddr;
use crate::os::sys;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

/// Bytes of one received message: the most that GRO gathers.
const MESSAGE_MAX: usize = 65536;

/// One datagram, or a run of them, as it came in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Received {
    pub from: SocketAddr,
    /// Local address that it was sent to, where the socket asked for it.
    pub local: Option<IpAddr>,
    /// Bytes of payload.
    pub len: usize,
    /// Size of the pieces of a run, 0 for one datagram.
    pub segment: u16,
    /// Which part of the memory it begins in.
    at: usize,
}

impl Received {
    fn piece(&self) -> usize {
        if self.segment == 0 { self.len } else { usize::from(self.segment) }
    }

    /// Whether `next` may be one more piece of this run.
    fn takes(&self, next: &Received) -> bool {
        let piece = self.piece();
        (self.from, self.local) == (next.from, next.local)
            && next.segment == 0
            && (1..=piece).contains(&next.len)
            && self.len.is_multiple_of(piece)
            && self.len / piece < SEGMENTS_MAX
            && self.len + next.len <= PAYLOAD_MAX
    }
}

/// Room for what comes in.
pub(crate) struct Inbox {
    memory: Vec<u8>,
    got: Vec<Received>,
}

impl Inbox {
    pub(crate) fn new() -> Inbox {
        Inbox { memory: vec![0; BATCH * MESSAGE_MAX], got: Vec::with_capacity(BATCH) }
    }

    /// Without room, for a network that has not its turn.
    pub(crate) fn empty() -> Inbox {
        Inbox { memory: Vec::new(), got: Vec::new() }
    }

    /// Message `i` of the last receive.
    pub(crate) fn message(&self, i: usize) -> Option<(Received, &[u8])> {
        let r = *self.got.get(i)?;
        Some((r, self.memory.get(r.at * MESSAGE_MAX..r.at * MESSAGE_MAX + r.len)?))
    }

    /// Receives up to a batch; how many messages there are. Fewer than [`Inbox::BATCH`] are all.
    pub(crate) fn receive(&mut self, fd: &OwnedFd) -> Result<usize, i32> {
        self.got.clear();
        let mut names = [RawAddr::default(); BATCH];
        let mut controls = [Control::EMPTY; BATCH];
        let mut iov = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; BATCH];
        // SAFETY: an mmsghdr of zeros is an empty message.
        let mut msgs: [libc::mmsghdr; BATCH] = unsafe { std::mem::zeroed() };
        let slots = msgs.iter_mut().zip(&mut iov).zip(names.iter_mut().zip(&mut controls));
        for (((m, v), (name, control)), bytes) in slots.zip(self.memory.chunks_exact_mut(MESSAGE_MAX)) {
            *v = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
            let h = &mut m.msg_hdr;
            h.msg_name = name.as_mut_ptr().cast();
            h.msg_namelen = name.len;
            h.msg_iov = v;
            h.msg_iovlen = 1;
            h.msg_control = control.0.as_mut_ptr().cast();
            h.msg_controllen = control.0.len();
        }
        // SAFETY: all messages point to live names, iovecs and control buffers.
        let n = sys::check(unsafe {
            libc::recvmmsg(
                fd.as_raw_fd(),
                msgs.as_mut_ptr(),
                BATCH as u32,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        })? as usize;
        for (at, (m, name)) in msgs.iter().zip(&mut names).take(n).enumerate() {
            name.len = m.msg_hdr.msg_namelen;
            let (mut segment, mut local) = (0, None);
            cmsg::for_each(&m.msg_hdr, |level, kind, data| {
                if (level, kind) == (SOL_UDP, UDP_GRO) {
                    segment = cmsg::as_i32(data).and_then(|v| u16::try_from(v).ok()).unwrap_or(0);
                } else {
                    local = local.or(cmsg::pktinfo_addr(level, kind, data));
                }
            });
            let len = (m.msg_len as usize).min(MESSAGE_MAX);
            let unspecified = SocketAddr::from(([0, 0, 0, 0], 0));
            let from = name.to_ip().unwrap_or(unspecified);
            self.got.push(Received {
                from,
                local,
                len,
                segment: if len > usize::from(segment) { segment } else { 0 },
                at,
            });
        }
        Ok(n)
    }

    /// Makes runs of datagrams of one size from one sender into one message each, as the kernel does where it
    /// can: they cost one frame. How many messages there are then.
    pub(crate) fn merge(&mut self) -> usize {
        let mut runs: usize = 0;
        for i in 0..self.got.len() {
            let Some(r) = self.got.get(i).copied() else { break };
            if let Some(head) = runs.checked_sub(1).and_then(|h| self.got.get_mut(h))
                && head.takes(&r)
            {
                let (from, to) = (r.at * MESSAGE_MAX, head.at * MESSAGE_MAX + head.len);
                self.memory.copy_within(from..from + r.len, to);
                head.segment = head.piece() as u16;
                head.len += r.len;
                continue;
            }
            if let Some(slot) = self.got.get_mut(runs) {
                *slot = r;
            }
            runs += 1;
        }
        self.got.truncate(runs);
        runs
    }

    /// Messages per receive.
    pub(crate) const BATCH: usize = BATCH;
}
