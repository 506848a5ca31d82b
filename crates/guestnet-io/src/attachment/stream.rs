//! Theory of operation: a connected stream socket with QEMU's framing: four bytes of length, big-endian, then
//! the frame. A read takes as many frames as there are; the beginning of one that is not complete is kept for
//! the next read, and whole ones where the guest's turn is over. Frames to the guest are gathered and written
//! many at a time.

use super::queue::Queue;
use super::{FRAME_MAX, Flushed, ReadOutcome, reason};
use crate::os::sys;
use std::os::fd::OwnedFd;

/// Bytes read at once, of whole frames and pieces.
pub(crate) const READ_BUFFER: usize = 256 << 10;
/// Frames of one read, about: a guest that sends small ones is read in smaller pieces, so that others have
/// their turn after as much work and not after as many bytes.
const READ_FRAMES: usize = 256;
/// Bytes read at once at least.
const READ_MIN: usize = 8 << 10;
/// Bytes of the length.
const PREFIX: usize = 4;
/// Written at once when this much waits, rather than at the end of the batch.
const WRITE_AT: usize = 256 << 10;

/// A connected stream socket.
pub(crate) struct Stream {
    pub fd: OwnedFd,
    /// The beginning of a frame.
    partial: Vec<u8>,
    /// Bytes of the next read at most.
    limit: usize,
    out: Queue,
    /// The kernel took less than there was.
    pub blocked: bool,
}

/// What a read put in the buffer.
pub(crate) struct Filled {
    /// Bytes of frames.
    pub len: usize,
    /// There may be more in the socket.
    pub more: bool,
}

impl Stream {
    pub(crate) fn new(fd: OwnedFd) -> Result<Stream, String> {
        sys::adopt(&fd).map_err(|e| reason("the socket cannot be set up", e))?;
        let opt = |name| sys::get_opt(&fd, libc::SOL_SOCKET, name);
        let kind = opt(libc::SO_TYPE).map_err(|e| reason("the descriptor is not a socket", e))?;
        if kind != libc::SOCK_STREAM || opt(libc::SO_ACCEPTCONN) != Ok(0) {
            return Err("the socket is not a connected SOCK_STREAM".into());
        }
        // More in flight than the small default of unix sockets; the kernel limits what it grants.
        for name in [libc::SO_SNDBUF, libc::SO_RCVBUF] {
            let _as_granted = sys::set_opt(&fd, libc::SOL_SOCKET, name, 1 << 20);
        }
        Ok(Stream { fd, partial: Vec::new(), limit: READ_MIN, out: Queue::default(), blocked: false })
    }

    /// Reads what fits in `buf`, behind what was left over last time.
    pub(crate) fn fill(&mut self, buf: &mut [u8]) -> ReadOutcome<Filled> {
        let kept = self.partial.len();
        let Some((front, free)) = buf.split_at_mut_checked(kept) else {
            return ReadOutcome::Down("a frame is longer than the read buffer".into());
        };
        front.copy_from_slice(&self.partial);
        if self.has_frame() {
            self.partial.clear();
            return ReadOutcome::Frame(Filled { len: kept, more: true });
        }
        let most = free.len().min(self.limit);
        let free = free.get_mut(..most).unwrap_or(&mut []);
        match sys::recv(&self.fd, free, 0) {
            Ok(0) if kept > 0 => {
                ReadOutcome::Down("the peer closed the connection in the middle of a frame".into())
            }
            Ok(0) => ReadOutcome::Down("the peer closed the connection".into()),
            Ok(n) => {
                self.partial.clear();
                ReadOutcome::Frame(Filled { len: kept + n, more: n == free.len() })
            }
            Err(e) if sys::would_block(e) => ReadOutcome::Empty,
            Err(e) => ReadOutcome::Down(reason("the connection broke", e)),
        }
    }

    /// True when there is a frame, or nonsense, that was read and not taken.
    pub(crate) fn has_frame(&self) -> bool {
        !matches!(next_frame(&self.partial), ReadOutcome::Empty)
    }

    /// Keeps what is left, the bytes of a frame that is not complete or of whole ones, after `frames` in `bytes`
    /// that were taken. `full`: the read brought as much as it asked for.
    pub(crate) fn keep(&mut self, rest: &[u8], frames: usize, bytes: usize, full: bool) {
        let wish = match bytes.checked_div(frames) {
            // The turn had time for no more.
            _ if !matches!(next_frame(rest), ReadOutcome::Empty) => bytes,
            Some(size) => size * READ_FRAMES,
            None if full => READ_BUFFER,
            None => self.limit,
        };
        // Growing in steps: a few large frames do not open the door for many small ones.
        self.limit = wish.min(self.limit * 2).clamp(READ_MIN, READ_BUFFER);
        self.partial.clear();
        self.partial.extend_from_slice(rest);
        if self.partial.capacity() > READ_MIN && rest.len() <= READ_MIN {
            self.partial.shrink_to(READ_MIN);
        }
    }

    /// Bytes that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.out.len()
    }

    /// Adds a frame of two parts; what was added of it, for its checksum to be completed in place.
    pub(crate) fn push(&mut self, front: &[u8], rest: &[u8]) -> &mut [u8] {
        let len = front.len() + rest.len();
        self.out.push(&(len as u32).to_be_bytes());
        self.out.push(front);
        self.out.push(rest);
        self.out.tail_mut(len)
    }

    /// True when enough waits that it should be written now.
    pub(crate) fn is_heavy(&self) -> bool {
        !self.blocked && self.out.len() >= WRITE_AT
    }

    /// Writes what the kernel takes.
    pub(crate) fn flush(&mut self) -> Flushed {
        while !self.out.is_empty() {
            match sys::send(&self.fd, self.out.bytes()) {
                Ok(n) => self.out.consume(n),
                Err(libc::EINTR) => {}
                Err(libc::EAGAIN) => return Flushed::Blocked,
                Err(libc::ENOBUFS | libc::ENOMEM) => return Flushed::Retry,
                Err(e) => return Flushed::Down(reason("the connection broke", e)),
            }
        }
        Flushed::All
    }
}

/// The first frame in `bytes`: where it begins and ends. `Empty` when it is not complete.
pub(crate) fn next_frame(bytes: &[u8]) -> ReadOutcome<(usize, usize)> {
    let Some(prefix) = bytes.get(..PREFIX) else { return ReadOutcome::Empty };
    let len = guestnet_wire::be32(prefix, 0) as usize;
    if len > FRAME_MAX {
        return ReadOutcome::Down(format!(
            "the peer announced a frame of {len} bytes; the limit is {FRAME_MAX}"
        ));
    }
    if bytes.len() < PREFIX + len { ReadOutcome::Empty } else { ReadOutcome::Frame((PREFIX, PREFIX + len)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_frame_may_come_byte_by_byte() {
        let (mut a, b) = UnixStream::pair().unwrap();
        let mut s = Stream::new(b.into()).unwrap();
        let mut buf = vec![0; READ_BUFFER];
        let mut wire = Vec::new();
        for f in [&b"hello"[..], b"", b"wonderful world"] {
            wire.extend_from_slice(&(f.len() as u32).to_be_bytes());
            wire.extend_from_slice(f);
        }
        let mut got = Vec::new();
        for byte in wire {
            a.write_all(&[byte]).unwrap();
            let ReadOutcome::Frame(f) = s.fill(&mut buf) else { panic!() };
            let mut at = 0;
            while let ReadOutcome::Frame((from, to)) = next_frame(&buf[at..f.len]) {
                got.push(buf[at + from..at + to].to_vec());
                at += to;
            }
            s.keep(&buf[at..f.len], usize::from(at > 0), at, f.more);
        }
        assert_eq!(got, [&b"hello"[..], b"", b"wonderful world"]);
        assert!(matches!(s.fill(&mut buf), ReadOutcome::Empty));
        a.write_all(&[0, 0]).unwrap();
        let ReadOutcome::Frame(f) = s.fill(&mut buf) else { panic!() };
        s.keep(&buf[..f.len], 0, 0, f.more);
        drop(a);
        assert!(matches!(s.fill(&mut buf), ReadOutcome::Down(why) if why.contains("middle")));
    }

    #[test]
    fn frames_that_a_turn_leaves_are_taken_before_more_is_read() {
        let (mut a, b) = UnixStream::pair().unwrap();
        let mut s = Stream::new(b.into()).unwrap();
        let mut buf = vec![0; READ_BUFFER];
        let mut wire = Vec::new();
        for n in 0..200u8 {
            wire.extend_from_slice(&[0, 0, 0, 2, n, n]);
        }
        a.write_all(&wire).unwrap();
        assert!(!s.has_frame());
        let mut next = 0;
        while next < 200 {
            let ReadOutcome::Frame(f) = s.fill(&mut buf) else { panic!() };
            // Three frames a turn.
            let mut at = 0;
            for _ in 0..3 {
                let ReadOutcome::Frame((from, to)) = next_frame(&buf[at..f.len]) else { break };
                assert_eq!(buf[at + from..at + to], [next, next]);
                at += to;
                next += 1;
            }
            s.keep(&buf[at..f.len], 3, at, f.more);
            assert_eq!(s.has_frame(), next < 200);
        }
        assert!(matches!(s.fill(&mut buf), ReadOutcome::Empty));
        assert_eq!(s.limit, READ_MIN);
        // Nonsense is found too, without another read.
        a.write_all(&[0, 0, 0, 1, 7, 0xff, 0, 0, 0]).unwrap();
        let ReadOutcome::Frame(f) = s.fill(&mut buf) else { panic!() };
        s.keep(&buf[5..f.len], 1, 5, f.more);
        assert!(s.has_frame());
    }

    /// Frames of one read after another, of `size` bytes each, from a socket that is always full.
    fn reads(s: &mut Stream, peer: &mut UnixStream, size: usize, count: usize) -> Vec<usize> {
        let mut wire = (size as u32).to_be_bytes().to_vec();
        wire.resize(PREFIX + size, 7);
        let wire = wire.repeat(READ_BUFFER / wire.len() + 1);
        let mut buf = vec![0; READ_BUFFER];
        let (mut sent, mut got) = (0, Vec::new());
        peer.set_nonblocking(true).unwrap();
        // To the end of what was begun, so that another kind of frame can follow.
        while got.len() < count || sent > 0 || !s.partial.is_empty() {
            while got.len() < count || sent > 0 {
                let Ok(n) = peer.write(&wire[sent..]) else { break };
                sent = (sent + n) % wire.len();
            }
            let ReadOutcome::Frame(f) = s.fill(&mut buf) else { break };
            let (mut at, mut frames) = (0, 0);
            while let ReadOutcome::Frame((_, to)) = next_frame(&buf[at..f.len]) {
                at += to;
                frames += 1;
            }
            s.keep(&buf[at..f.len], frames, at, f.more);
            got.push(frames);
        }
        while let ReadOutcome::Frame(f) = s.fill(&mut buf) {
            assert!(s.partial.is_empty() && f.len > 0);
        }
        got
    }

    #[test]
    fn a_read_is_bounded_in_frames_as_in_bytes() {
        let (mut a, b) = UnixStream::pair().unwrap();
        let mut s = Stream::new(b.into()).unwrap();
        // Large frames soon fill the buffer.
        let large = reads(&mut s, &mut a, 60_000, 12);
        assert!(large.iter().skip(6).sum::<usize>() >= 6 * 3, "{large:?}");
        // Small ones after them may be many once.
        let small = reads(&mut s, &mut a, 14, 12);
        assert!(small.iter().skip(1).all(|n| *n <= 2 * READ_FRAMES), "{small:?}");
        // A guest that sends in drips does not get more at once for it.
        let mut buf = vec![0; READ_BUFFER];
        for byte in [0, 0, 0] {
            a.write_all(&[byte]).unwrap();
            let ReadOutcome::Frame(f) = s.fill(&mut buf) else { panic!() };
            s.keep(&buf[..f.len], 0, 0, f.more);
        }
        assert_eq!(s.limit, READ_MIN);
    }

    #[test]
    fn an_oversize_length_is_the_end() {
        assert!(matches!(next_frame(&[0, 1, 0, 0x80, 9]), ReadOutcome::Empty));
        assert!(matches!(next_frame(&[0, 1, 0, 0x81]), ReadOutcome::Down(_)));
        assert!(matches!(next_frame(&[0xff; 4]), ReadOutcome::Down(_)));
        assert!(matches!(next_frame(&[0, 0, 0]), ReadOutcome::Empty));
        assert_eq!(next_frame(&[0, 0, 0, 0]), ReadOutcome::Frame((4, 4)));
    }

    #[test]
    fn a_short_write_goes_on_where_it_stopped() {
        let (mut a, b) = UnixStream::pair().unwrap();
        let mut s = Stream::new(b.into()).unwrap();
        let mut sent = Vec::new();
        for i in 0..100u8 {
            s.push(&[i; 30_000], &[0xee; 10_000]);
            sent.extend_from_slice(&40_000u32.to_be_bytes());
            sent.extend_from_slice(&[i; 30_000]);
            sent.extend_from_slice(&[0xee; 10_000]);
        }
        let (mut got, mut buf) = (Vec::new(), vec![0; 77_777]);
        while s.flush() == Flushed::Blocked {
            let n = a.read(&mut buf).unwrap();
            got.extend_from_slice(&buf[..n]);
        }
        drop(s);
        a.read_to_end(&mut got).unwrap();
        assert!(got == sent);
    }
}
