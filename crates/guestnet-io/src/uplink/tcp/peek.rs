//! Theory of operation: data from the outside, which stays in the kernel's queue, or in bounds here, until the
//! guest has acknowledged it. It can be read again from anywhere behind the last acknowledgement.

use super::{Sock, SockKind, Socks, TcpSock};
use crate::os::sys;
use guestnet_core::effects::{Peek, SockError};
use guestnet_core::types::SockId;
use std::os::fd::OwnedFd;

/// Most bytes of one peek.
const PEEK_MAX: usize = 65536;
/// Most bytes that are peeked to skip them, where the kernel cannot peek at an offset.
const SKIP_MAX: usize = 4 << 20;
/// A read of less than this is worth keeping instead of peeking twice.
const SMALL: usize = 2048;
/// Bytes of one connection that are kept at most.
const KEEP_MAX: usize = 2 * SMALL;
/// Bytes of all connections that are kept at most; beyond it they are peeked.
const KEEP_ALL_MAX: usize = 4 << 20;

impl Socks {
    /// Peeks to `scratch`; says where in it the data is.
    pub(crate) fn tcp_peek(
        &mut self,
        id: SockId,
        offset: usize,
        max: usize,
        scratch: &mut Vec<u8>,
    ) -> Result<(Peek, usize), SockError> {
        let peek_off = self.peek_off;
        let may_keep = self.kept_all < KEEP_ALL_MAX;
        let Some(Sock { fd, kind: SockKind::Tcp(tcp), .. }) = self.slab.get_mut(id.0) else {
            return Err(SockError::Reset);
        };
        if let Some(e) = tcp.broken {
            return Err(e);
        }
        let max = max.min(PEEK_MAX);
        if scratch.len() < max {
            scratch.resize(max, 0);
        }
        // What was read before, when it is asked for again.
        let again = tcp.kept.get(offset..).unwrap_or(&[]);
        let have = again.len().min(max);
        if let (Some(to), Some(from)) = (scratch.get_mut(..have), again.get(..have)) {
            to.copy_from_slice(from);
        }
        if have == max {
            return Ok((Peek::Data(max), 0));
        }
        let mut got = have;
        if !tcp.bulk && may_keep && !tcp.unix && offset == tcp.kept.len() && offset < KEEP_MAX {
            let urgent = tcp.urgent && have == 0 && sys::at_mark(fd);
            let most = if urgent { 1 } else { max.min(SMALL) };
            let room = scratch.get_mut(..most).unwrap_or(&mut []);
            got = match sys::recv(fd, room, 0) {
                Ok(0) => return Ok((Peek::Eof, 0)),
                Ok(n) => n,
                Err(e) if sys::would_block(e) => return Ok((Peek::Empty, 0)),
                Err(e) => return Err(sys::sock_error(e)),
            };
            tcp.kept.extend_from_slice(scratch.get(..got).unwrap_or(&[]));
            self.kept_all += got;
            if let Some(o) = &mut tcp.offset {
                *o = o.saturating_sub(got);
            }
            if urgent {
                return Ok((Peek::Urgent, 0));
            }
            if got < max.min(SMALL) || got == max {
                return Ok((tcp.data(got, max), 0));
            }
            tcp.bulk = true;
        }
        // From here on the kernel's queue: `got` bytes are there already, and it goes on behind them.
        let (offset, max) = ((offset + got).saturating_sub(tcp.kept.len()), max - got);
        // A connection that never has more than one read in flight never needs the option.
        let first = offset == 0 && tcp.offset.is_none();
        let skip = if first || peek_off && (tcp.offset == Some(offset) || set_offset(fd, tcp, offset)) {
            0
        } else {
            offset
        };
        let want = (skip + max).min(SKIP_MAX);
        if scratch.len() < got + want {
            scratch.resize(got + want, 0);
        }
        let peeked = match sys::recv(fd, scratch.get_mut(got..got + want).unwrap_or(&mut []), libc::MSG_PEEK)
        {
            Ok(n) => n,
            Err(_) if got > 0 => 0,
            Err(e) if sys::would_block(e) => return Ok((Peek::Empty, 0)),
            Err(e) => return Err(sys::sock_error(e)),
        };
        if let Some(o) = &mut tcp.offset {
            *o += peeked;
        }
        tcp.bulk = got + peeked.saturating_sub(skip) >= SMALL;
        if peeked > skip {
            if got > 0 && skip > 0 {
                // The two parts are to be one.
                scratch.copy_within(got + skip..got + peeked, got);
                return Ok((tcp.data(got + peeked - skip, got + max), 0));
            }
            return Ok((tcp.data(got + peeked - skip, got + max), skip));
        }
        if got > 0 {
            return Ok((tcp.data(got, got + max), 0));
        }
        if skip == 0 {
            return Ok((Peek::Eof, 0));
        }
        // Everything was peeked before, and a plain peek does not tell "no more now" from "no more ever".
        Ok((if peer_closed(fd) { Peek::Eof } else { Peek::Empty }, 0))
    }

    pub(crate) fn tcp_discard(&mut self, id: SockId, len: usize) {
        let Some(Sock { fd, kind: SockKind::Tcp(tcp), .. }) = self.slab.get_mut(id.0) else { return };
        let kept = len.min(tcp.kept.len());
        if kept == tcp.kept.len() {
            tcp.kept = Vec::new();
        } else {
            tcp.kept.drain(..kept);
        }
        self.kept_all = self.kept_all.saturating_sub(kept);
        let len = len - kept;
        let mut left = len;
        while left > 0 {
            let got = if tcp.unix {
                let mut waste = [0; 4096];
                let most = left.min(waste.len());
                sys::recv(fd, waste.get_mut(..most).unwrap_or(&mut []), 0)
            } else {
                sys::recv_discard(fd, left)
            };
            match got {
                Ok(0) => break,
                Ok(n) => left -= n.min(left),
                Err(libc::EINTR) => {}
                // The peer reset meanwhile, and the data went with it; the next call tells the core.
                Err(_) => break,
            }
        }
        if let Some(o) = &mut tcp.offset {
            *o = o.saturating_sub(len - left);
        }
    }
}

impl TcpSock {
    /// What a read of `got` bytes, where `max` were asked for, says.
    fn data(&self, got: usize, max: usize) -> Peek {
        let last = got < max && self.ended && !self.urgent && !self.unix;
        if last { Peek::Last(got) } else { Peek::Data(got) }
    }
}

fn set_offset(fd: &OwnedFd, tcp: &mut TcpSock, offset: usize) -> bool {
    let Ok(value) = i32::try_from(offset) else { return false };
    let set = sys::set_opt(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, value).is_ok();
    tcp.offset = set.then_some(offset);
    set
}

/// True when the peer has sent its FIN.
fn peer_closed(fd: &OwnedFd) -> bool {
    sys::poll_now(fd, libc::POLLRDHUP) & libc::POLLRDHUP != 0
}

#[cfg(test)]
mod tests {
    use super::super::tests::{pair, peek, tcp, wait_for};
    use super::*;
    use crate::attachment::quota::{Pool, Quota};
    use crate::os::epoll::Poller;
    use crate::os::sockaddr::RawAddr;
    use crate::runtime::stats::IoCounters;
    use crate::temp_dir::TempDir;
    use guestnet_core::types::{FlowId, IpFields, PortId, Target};
    use std::io::Write;
    use std::net::Shutdown;

    #[test]
    fn peeking_at_an_offset_with_the_kernel_s_help_and_without() {
        for peek_off in [true, false] {
            let mut s = Socks::new(&Quota::new(Pool::of_process()));
            s.peek_off &= peek_off;
            let (id, mut other) = pair(&mut s);
            other.write_all(b"0123456789").unwrap();
            assert_eq!(peek(&mut s, id, 0, 4).unwrap(), b"0123");
            assert_eq!(peek(&mut s, id, 4, 100).unwrap(), b"456789");
            assert_eq!(peek(&mut s, id, 2, 3).unwrap(), b"234", "going back, as for a retransmission");
            s.tcp_discard(id, 3);
            assert_eq!(peek(&mut s, id, 0, 100).unwrap(), b"3456789");
            assert_eq!(s.tcp_peek(id, 7, 100, &mut Vec::new()), Ok((Peek::Empty, 0)));
            other.write_all(b"ab").unwrap();
            assert_eq!(peek(&mut s, id, 7, 100).unwrap(), b"ab");
            other.shutdown(Shutdown::Write).unwrap();
            wait_for(&s, id, libc::POLLRDHUP);
            assert_eq!(peek(&mut s, id, 9, 100), Err(Peek::Eof));
            assert_eq!(peek(&mut s, id, 5, 2).unwrap(), b"89");
            s.tcp_discard(id, 9);
            assert_eq!(peek(&mut s, id, 0, 1), Err(Peek::Eof));
        }
    }

    #[test]
    fn what_a_service_sent_is_thrown_away_too() {
        let dir = TempDir::new("tcp");
        let path = dir.join("s");
        let l = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let (poller, mut c, mut s) =
            (Poller::new(4).unwrap(), IoCounters::default(), Socks::new(&Quota::new(Pool::of_process())));
        s.services
            .insert(7, RawAddr::unix(std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str())).unwrap());
        let flow = FlowId { index: 0, generation: 0 };
        let target = Target::Service(guestnet_core::types::ServiceId(7), PortId(3));
        let id = s.tcp_connect(&poller, &mut c, flow, target, IpFields::ttl(9), false).unwrap();
        let (mut other, from) = l.accept().unwrap();
        #[cfg(target_os = "linux")]
        {
            use std::os::linux::net::SocketAddrExt;
            assert!(from.as_abstract_name().unwrap().starts_with(b"guestnet/3/"));
        }
        other.write_all(b"0123456789").unwrap();
        assert_eq!(peek(&mut s, id, 0, 6).unwrap(), b"012345");
        s.tcp_discard(id, 6);
        assert_eq!(peek(&mut s, id, 0, 100).unwrap(), b"6789");
        assert_eq!(peek(&mut s, id, 2, 100).unwrap(), b"89");
        s.tcp_discard(id, 4);
        assert_eq!(s.tcp_peek(id, 0, 100, &mut Vec::new()), Ok((Peek::Empty, 0)));
        other.write_all(b"ab").unwrap();
        assert_eq!(peek(&mut s, id, 0, 100).unwrap(), b"ab");
        other.shutdown(Shutdown::Write).unwrap();
        assert_eq!(peek(&mut s, id, 2, 100), Err(Peek::Eof));
    }

    /// Small reads are kept here, large ones stay in the kernel, and both can be asked for again.
    #[test]
    fn what_is_kept_and_what_is_peeked_are_one_stream() {
        let stream: Vec<u8> = (0..30_000u32).map(|i| (i * 7 % 251) as u8).collect();
        for peek_off in [true, false] {
            let mut s = Socks::new(&Quota::new(Pool::of_process()));
            s.peek_off &= peek_off;
            let (id, mut other) = pair(&mut s);
            let (mut from, mut seen, mut written) = (0, 0, 0);
            for (n, acked) in
                [(100, 40), (9, 69), (3000, 0), (500, 2000), (20, 0), (8000, 9520), (3, 3), (5000, 0)]
            {
                other.write_all(&stream[written..written + n]).unwrap();
                written += n;
                while seen < written {
                    let got = peek(&mut s, id, seen - from, 60_000).unwrap();
                    assert_eq!(got, stream[seen..seen + got.len()]);
                    seen += got.len();
                }
                s.tcp_discard(id, acked);
                from += acked;
                // From anywhere in between, as retransmissions do.
                for at in [from, from + (seen - from) / 2, seen.saturating_sub(1).max(from)] {
                    if at < seen {
                        let got = peek(&mut s, id, at - from, 60_000).unwrap();
                        assert_eq!(got, stream[at..seen], "from {at} of {from}..{seen}");
                        assert_eq!(peek(&mut s, id, at - from, 1).unwrap(), stream[at..=at]);
                    }
                }
                assert!(tcp(&mut s, id).kept.len() <= KEEP_MAX + SMALL);
            }
            let kept = tcp(&mut s, id).kept.len();
            assert_eq!(s.kept_all, kept);
            other.shutdown(Shutdown::Write).unwrap();
            assert_eq!(peek(&mut s, id, seen - from, 10), Err(Peek::Eof));
            s.remove(&mut IoCounters::default(), id);
            assert_eq!(s.kept_all, 0);
        }
    }

    #[test]
    fn nothing_is_kept_beyond_the_bound_of_all() {
        let mut s = Socks::new(&Quota::new(Pool::of_process()));
        let (id, mut other) = pair(&mut s);
        s.kept_all = KEEP_ALL_MAX;
        other.write_all(b"0123456789").unwrap();
        assert_eq!(peek(&mut s, id, 0, 100).unwrap(), b"0123456789");
        assert_eq!(peek(&mut s, id, 4, 100).unwrap(), b"456789");
        assert!(tcp(&mut s, id).kept.is_empty());
        s.tcp_discard(id, 10);
        assert_eq!(s.kept_all, KEEP_ALL_MAX);
    }

    #[test]
    fn the_last_bytes_are_told_as_such_unless_urgent_data_may_hide_more() {
        for urgent in [false, true] {
            let mut s = Socks::new(&Quota::new(Pool::of_process()));
            let (id, mut other) = pair(&mut s);
            other.write_all(b"0123456789").unwrap();
            other.shutdown(Shutdown::Write).unwrap();
            wait_for(&s, id, libc::POLLRDHUP);
            let t = tcp(&mut s, id);
            (t.ended, t.urgent) = (true, urgent);
            let mut scratch = Vec::new();
            assert_eq!(s.tcp_peek(id, 0, 4, &mut scratch), Ok((Peek::Data(4), 0)));
            let last = if urgent { Peek::Data(6) } else { Peek::Last(6) };
            assert_eq!(s.tcp_peek(id, 4, 100, &mut scratch), Ok((last, 0)));
            assert_eq!(s.tcp_peek(id, 10, 100, &mut scratch), Ok((Peek::Eof, 0)));
        }
    }
}
