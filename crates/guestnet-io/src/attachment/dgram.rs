//! Theory of operation: one bare frame per packet, over a connected SOCK_DGRAM or SOCK_SEQPACKET socket, or to
//! one peer of a socket where guests arrive ([`super::unixgram`]). Frames that wait are sent many per call. A
//! receiver that is full shows as EAGAIN, where EPOLLOUT tells of room for a connected socket only, or as
//! ENOBUFS, where nothing tells; then it is tried again after a moment.

// System calls take raw pointers.
#![allow(unsafe_code)]

use super::queue::Queue;
use super::{FRAME_MAX, Flushed, ReadOutcome, reason};
use crate::os::sockaddr::RawAddr;
use crate::os::sys;
use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

/// Frames per call.
const BATCH: usize = 64;
/// Flushes in a row, a millisecond apart, after which a shared socket counts as stalled.
const STALLED: u32 = 100;

/// A packet socket, or one peer of it.
pub(crate) struct Dgram {
    pub fd: Arc<OwnedFd>,
    /// The peer, where the socket is not connected.
    to: Option<Peer>,
    /// Others use the socket too: then nothing tells when it takes more.
    shared: bool,
    /// Flushes in a row that sent nothing.
    stalled: u32,
    /// A length of zero is the end of a connection, not an empty packet.
    seqpacket: bool,
    out: Queue,
    lens: VecDeque<u32>,
    /// The kernel took less than there was.
    pub blocked: bool,
    /// Frames that the kernel did not take at all.
    pub refused: u64,
}

/// One peer of a socket that others use too: an address that leads to the socket that was found when it arrived,
/// whatever its path leads to later.
struct Peer {
    to: RawAddr,
    /// What the address stands for; an abstract name needs nothing.
    _found: Option<OwnedFd>,
}

impl Dgram {
    /// Over a connected socket.
    pub(crate) fn new(fd: OwnedFd) -> Result<Dgram, String> {
        sys::adopt(&fd).map_err(|e| reason("the socket cannot be set up", e))?;
        let kind = sys::get_opt(&fd, libc::SOL_SOCKET, libc::SO_TYPE)
            .map_err(|e| reason("the descriptor is not a socket", e))?;
        if kind != libc::SOCK_DGRAM && kind != libc::SOCK_SEQPACKET {
            return Err("the socket is neither SOCK_DGRAM nor SOCK_SEQPACKET".into());
        }
        set_buffers(&fd);
        let mut d = Dgram::connected(fd);
        d.seqpacket = kind == libc::SOCK_SEQPACKET;
        Ok(d)
    }

    /// Over a socket that is connected and set up.
    pub(crate) fn connected(fd: OwnedFd) -> Dgram {
        Dgram::over(Arc::new(fd), None)
    }

    /// To one peer of a socket that others use too. `found` is what the address stands for.
    pub(crate) fn peer(fd: Arc<OwnedFd>, to: RawAddr, found: Option<OwnedFd>) -> Dgram {
        Dgram::over(fd, Some(Peer { to, _found: found }))
    }

    fn over(fd: Arc<OwnedFd>, to: Option<Peer>) -> Dgram {
        Dgram {
            fd,
            shared: to.is_some(),
            to,
            stalled: 0,
            seqpacket: false,
            out: Queue::default(),
            lens: VecDeque::new(),
            blocked: false,
            refused: 0,
        }
    }

    /// Reads one frame to `buf`: its length.
    pub(crate) fn read(&self, buf: &mut [u8]) -> ReadOutcome<usize> {
        match sys::recv(&self.fd, buf, libc::MSG_TRUNC) {
            Ok(0) if self.seqpacket => ReadOutcome::Down("the peer closed the connection".into()),
            Ok(n) if n > buf.len().min(FRAME_MAX) => ReadOutcome::Bad,
            Ok(n) => ReadOutcome::Frame(n),
            Err(e) if sys::would_block(e) => ReadOutcome::Empty,
            // What an earlier send brought about; sending will tell.
            Err(libc::ECONNREFUSED) => ReadOutcome::Empty,
            Err(e) => ReadOutcome::Down(reason("the connection broke", e)),
        }
    }

    /// Bytes that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.out.len()
    }

    /// Adds a frame of two parts; what was added, for its checksum to be completed in place.
    pub(crate) fn push(&mut self, front: &[u8], rest: &[u8]) -> &mut [u8] {
        let len = front.len() + rest.len();
        self.out.push(front);
        self.out.push(rest);
        self.lens.push_back(len as u32);
        self.out.tail_mut(len)
    }

    /// True when enough waits that it should be sent now.
    pub(crate) fn is_heavy(&self) -> bool {
        !self.blocked && self.lens.len() >= BATCH
    }

    /// True once when nothing could be sent for [`STALLED`] flushes: somebody on the socket does not read.
    pub(crate) fn has_stalled(&mut self) -> bool {
        let stalled = self.stalled == STALLED;
        // Not again before something was sent.
        self.stalled += u32::from(stalled);
        stalled
    }

    /// The socket is this peer's alone from now on, as far as the kernel agrees: nobody else can send to it.
    pub(crate) fn take_socket(&mut self) {
        if let Some(p) = &self.to
            && sys::connect(&self.fd, &p.to).is_ok()
        {
            self.to = None;
        }
    }

    /// Sends what the kernel takes.
    pub(crate) fn flush(&mut self) -> Flushed {
        while !self.lens.is_empty() {
            match self.send_batch() {
                Ok(n) => {
                    self.stalled = 0;
                    for _ in 0..n {
                        self.consume();
                    }
                }
                Err(libc::EINTR) => {}
                // A socket that others use too is always writable by what epoll says.
                Err(libc::EAGAIN) if self.shared => {
                    self.stalled += u32::from(self.stalled < STALLED);
                    return Flushed::Retry;
                }
                Err(libc::EAGAIN) => return Flushed::Blocked,
                Err(libc::ENOBUFS | libc::ENOMEM) => return Flushed::Retry,
                // Longer than the socket takes: this frame alone is lost.
                Err(libc::EMSGSIZE | libc::EINVAL) => {
                    self.consume();
                    self.refused += 1;
                }
                Err(e) => return Flushed::Down(reason("the peer is gone", e)),
            }
        }
        Flushed::All
    }

    fn consume(&mut self) {
        if let Some(n) = self.lens.pop_front() {
            self.out.consume(n as usize);
        }
    }

    fn send_batch(&mut self) -> Result<usize, i32> {
        let mut iov = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; BATCH];
        // SAFETY: an mmsghdr of zeros is an empty message.
        let mut msgs: [libc::mmsghdr; BATCH] = unsafe { std::mem::zeroed() };
        let mut rest = self.out.bytes();
        let mut n = 0;
        for ((m, v), len) in msgs.iter_mut().zip(&mut iov).zip(&self.lens) {
            let Some((frame, more)) = rest.split_at_checked(*len as usize) else { break };
            rest = more;
            *v = libc::iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: frame.len() };
            m.msg_hdr.msg_iov = v;
            m.msg_hdr.msg_iovlen = 1;
            if let Some(peer) = &mut self.to {
                m.msg_hdr.msg_name = peer.to.as_mut_ptr().cast();
                m.msg_hdr.msg_namelen = peer.to.len;
            }
            n += 1;
        }
        // SAFETY: the first `n` messages point to live iovecs, which point into the queue.
        sys::check(unsafe {
            libc::sendmmsg(self.fd.as_raw_fd(), msgs.as_mut_ptr(), n, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
        })
        .map(|n| n as usize)
    }
}

/// Large buffers, as far as the kernel grants them (vfkit asks for these sizes).
pub(crate) fn set_buffers(fd: &OwnedFd) {
    let _as_granted = sys::set_opt(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, 1 << 20);
    let _as_granted = sys::set_opt(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, 4 << 20);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn many_frames_per_call_and_none_lost() {
        let (a, b) = UnixDatagram::pair().unwrap();
        let mut d = Dgram::new(b.into()).unwrap();
        for i in 0..500u16 {
            d.push(&i.to_be_bytes(), &[7; 1000]);
        }
        let (mut got, mut buf) = (0u16, [0; 2000]);
        loop {
            let f = d.flush();
            assert!(matches!(f, Flushed::All | Flushed::Blocked), "{f:?}");
            a.set_nonblocking(true).unwrap();
            while let Ok(n) = a.recv(&mut buf) {
                assert_eq!((n, &buf[..2]), (1002, &got.to_be_bytes()[..]));
                got += 1;
            }
            if f == Flushed::All && got == 500 {
                break;
            }
        }
        a.send(b"in").unwrap();
        assert_eq!(d.read(&mut buf), ReadOutcome::Frame(2));
        assert_eq!(d.read(&mut buf), ReadOutcome::Empty);
        a.send(&[0; 3000]).unwrap();
        assert_eq!(d.read(&mut buf), ReadOutcome::Bad);
        drop(a);
        d.push(b"x", b"");
        assert!(matches!(d.flush(), Flushed::Down(_)));
    }

    #[test]
    fn a_frame_longer_than_the_socket_takes_is_lost_alone() {
        let (a, b) = UnixDatagram::pair().unwrap();
        let mut d = Dgram::new(b.into()).unwrap();
        sys::set_opt(&d.fd, libc::SOL_SOCKET, libc::SO_SNDBUF, 1).unwrap();
        d.push(&[0; 60_000], &[]);
        d.push(b"after", b"");
        assert_eq!(d.flush(), Flushed::All);
        assert_eq!(d.refused, 1);
        assert_eq!(a.recv(&mut [0; 10]).unwrap(), 5);
    }
}
