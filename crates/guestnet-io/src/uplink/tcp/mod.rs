//! Theory of operation: TCP connections to the outside. Data from the outside stays in the kernel's queue
//! until the guest has acknowledged it: it is peeked at an offset and thrown away later. Linux moves that
//! offset itself (SO_PEEK_OFF, 6.9); before, all from the start is peeked and the front skipped. A connection
//! that carries little at a time is read outright, one call in place of two, and what was read is kept here
//! instead, in bounds. Sockets are watched edge-triggered, because what was peeked but not thrown away keeps
//! them readable.

mod handshake;
mod peek;
mod record;

use super::options;
use super::proxy::Via;
use super::sockets::{Sock, SockKind, Socks};
use crate::os::epoll::Poller;
use crate::os::sockaddr::RawAddr;
use crate::os::sys;
use crate::runtime::stats::IoCounters;
use guestnet_core::effects::{Peek, Peer, SockError};
use guestnet_core::types::{FlowId, IpFields, PortId, SockId, Target};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};

pub(crate) use record::{Buffers, TcpSock, host_ttl, probe_peek_off, usual_buffers};

/// Bytes of one read outright.
const READ_MAX: usize = 65536;
/// Bytes of each direction that the kernel is to take of a connection of a guest that holds too much.
const TIGHT: i32 = 4096;
/// Which buffer sizes were set by the program and are not the kernel's to change (linux/socket.h).
const SO_BUF_LOCK: i32 = 72;
/// The largest that Linux takes for the interval of keep-alive probes, in seconds, and their number.
const KEEP_INTERVAL_MAX: i32 = 32767;
const KEEP_COUNT_MAX: i32 = 127;
/// The first send of a connection goes at once whatever its options, if it is one segment (RFC 9293 3.7.1).
const SEGMENT_MIN: usize = 536;

const WATCHED: i32 = libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLRDHUP | libc::EPOLLPRI | libc::EPOLLET;

/// What a listening socket of a published port is set to; its connections inherit it. Relayed segments were
/// already gathered by the guest's stack; urgent data stays among the rest, with a mark. Neither is worth
/// refusing one for.
pub(crate) fn prepare_listener(fd: &OwnedFd) {
    let _best_effort = sys::set_opt(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1);
    let _best_effort = sys::set_opt(fd, libc::SOL_SOCKET, libc::SO_OOBINLINE, 1);
}

/// Tells a service which port a connection comes from, so that it can treat guests alike: as the socket's own
/// name, `guestnet/PORT/` and something unique, in the abstract namespace where there is one.
fn name(fd: &OwnedFd, port: PortId) {
    if cfg!(target_os = "linux") {
        let text = format!("\0guestnet/{}/{}.{}", port.0, std::process::id(), fd.as_raw_fd());
        if let Some(own) = RawAddr::unix(text.as_bytes()) {
            let _best_effort = sys::bind(fd, &own);
        }
    }
}

impl Socks {
    pub(crate) fn tcp_connect(
        &mut self,
        poller: &Poller,
        counters: &mut IoCounters,
        flow: FlowId,
        target: Target,
        ip: IpFields,
        tight: bool,
    ) -> Result<SockId, SockError> {
        let mut via = None;
        let target = match (&self.proxy, target) {
            (Some(proxy), Target::Address(to)) if !to.ip().is_loopback() => {
                let (at, handshake) = Via::new(proxy, to);
                via = Some(handshake);
                Target::Address(at)
            }
            _ => target,
        };
        let (family, addr) = match target {
            Target::Address(a @ SocketAddr::V4(_)) => (libc::AF_INET, RawAddr::ip(a)),
            Target::Address(a @ SocketAddr::V6(_)) => (libc::AF_INET6, RawAddr::ip(a)),
            Target::Service(id, _) => (libc::AF_UNIX, *self.services.get(&id.0).ok_or(SockError::Refused)?),
        };
        let fd = sys::socket(family, libc::SOCK_STREAM, 0).map_err(sys::sock_error)?;
        if let Target::Address(to) = target {
            self.source.bind(&fd, to.ip())?;
        }
        let mut traced = false;
        if let Target::Service(_, port) = target {
            name(&fd, port);
        } else {
            let _best_effort = sys::set_opt(&fd, libc::SOL_SOCKET, libc::SO_OOBINLINE, 1);
            // A guest's TTL matters when it is small (traceroute); the host's own will do for another's.
            if via.is_none() && ip.ttl.saturating_add(1) < self.ttl {
                options::set_ttl(&fd, family == libc::AF_INET6, ip.ttl);
                traced = trace(&fd, family, true);
            }
            if tight {
                // Before the connect, which offers the peer a window.
                tighten(&fd, self.buffers, true);
            }
            if ip.tos != 0 {
                options::set_tos(&fd, family == libc::AF_INET6, ip.tos);
            }
        }
        let outcome = match sys::connect(&fd, &addr) {
            Ok(()) if via.is_some() => None,
            Ok(()) => Some(Ok(())),
            Err(libc::EINPROGRESS) => None,
            // A unix service whose queue is full: as good as refused, and the guest may try again.
            Err(libc::EAGAIN) => Some(Err(SockError::Refused)),
            Err(e) => Some(Err(sys::sock_error(e))),
        };
        let unix = family == libc::AF_UNIX;
        let proxied = via.is_some() && outcome.is_none();
        let tcp = TcpSock { connecting: outcome.is_none(), traced, unix, via, ..TcpSock::default() };
        let failed = matches!(outcome, Some(Err(_)));
        let sock = Sock { fd, flow: Some(flow), kind: SockKind::Tcp(tcp) };
        // An unconnected socket is always "hung up"; nothing is to be heard from one that failed.
        let events = if failed { 0 } else { WATCHED };
        let id = self.add(poller, counters, sock, events).map_err(sys::sock_error)?;
        if proxied {
            self.handshake_begins(id, sys::now());
        }
        if let Some(result) = outcome {
            self.outcomes.push((flow, result));
        }
        Ok(id)
    }

    /// Takes in a connection that somebody made to a published port. It is watched from
    /// [`Socks::tcp_adopt`] on.
    ///
    /// # Errors
    /// The connection, where the network has as many sockets as it may have.
    pub(crate) fn tcp_accepted(&mut self, counters: &mut IoCounters, fd: OwnedFd) -> Result<SockId, OwnedFd> {
        let tcp = TcpSock { no_delay: true, ..TcpSock::default() };
        let sock = Sock { fd, flow: None, kind: SockKind::Tcp(tcp) };
        self.insert(counters, sock).map_err(|sock| sock.fd)
    }

    /// The core made a flow of an accepted connection.
    pub(crate) fn tcp_adopt(&mut self, poller: &Poller, id: SockId, flow: FlowId) -> Result<(), i32> {
        if let Some(s) = self.get_mut(id) {
            s.flow = Some(flow);
        }
        self.watch(poller, id, WATCHED)
    }

    pub(crate) fn tcp_send(&mut self, id: SockId, data: &[u8]) -> Result<usize, SockError> {
        let Some(Sock { fd, kind: SockKind::Tcp(tcp), .. }) = self.get_mut(id) else {
            return Err(SockError::Reset);
        };
        if let Some(e) = tcp.broken {
            return Err(e);
        }
        if !tcp.waiting.is_empty() && !tcp.deferred {
            // It does not fit yet.
            tcp.wants_write = true;
            return Ok(0);
        }
        // Many connections send once, and most of those little: they need no option.
        if !tcp.no_delay && !tcp.unix && (tcp.spoken || data.len() > SEGMENT_MIN) {
            let _best_effort = sys::set_opt(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1);
            tcp.no_delay = true;
        }
        tcp.spoken = true;
        if self.defer(id, data) {
            return Ok(data.len());
        }
        if !self.send_waiting(id)? {
            return Ok(0);
        }
        let Some(Sock { fd, kind: SockKind::Tcp(tcp), .. }) = self.get_mut(id) else {
            return Err(SockError::Reset);
        };
        let sent = match sys::send(fd, data) {
            Ok(n) => n,
            Err(e) if sys::would_block(e) => 0,
            Err(e) => return Err(sys::sock_error(e)),
        };
        tcp.wants_write |= sent < data.len();
        Ok(sent)
    }

    /// Sends one byte as urgent; false where it has to wait.
    pub(crate) fn tcp_send_urgent(&mut self, id: SockId, byte: u8) -> Result<bool, SockError> {
        if !self.send_waiting(id)? {
            return Ok(false);
        }
        let Some(Sock { fd, kind: SockKind::Tcp(tcp), .. }) = self.get_mut(id) else {
            return Err(SockError::Reset);
        };
        if tcp.unix {
            return Ok(false);
        }
        match sys::send_urgent(fd, &[byte]) {
            Ok(n) => Ok(n == 1),
            Err(e) if sys::would_block(e) => Ok(false),
            Err(e) => Err(sys::sock_error(e)),
        }
    }

    /// Reads up to `max` bytes outright: for connections of the network itself, which are never peeked at.
    pub(crate) fn tcp_read(&mut self, id: SockId, out: &mut Vec<u8>, max: usize) -> Result<Peek, SockError> {
        let Some(Sock { fd, kind: SockKind::Tcp(_), .. }) = self.get(id) else {
            return Err(SockError::Reset);
        };
        let (start, max) = (out.len(), max.min(READ_MAX));
        out.resize(start + max, 0);
        let got = sys::recv(fd, out.get_mut(start..).unwrap_or(&mut []), 0);
        out.truncate(start + got.unwrap_or(0));
        match got {
            Ok(0) => Ok(Peek::Eof),
            Ok(n) => Ok(Peek::Data(n)),
            Err(e) if sys::would_block(e) => Ok(Peek::Empty),
            Err(e) => Err(sys::sock_error(e)),
        }
    }

    /// Bytes of the kernel's memory that the connection holds.
    pub(crate) fn tcp_held(&self, id: SockId) -> usize {
        self.get(id).and_then(|s| sys::socket_memory(&s.fd)).unwrap_or(0)
    }

    /// Bounds what the kernel takes, or no more.
    pub(crate) fn tcp_tighten(&self, id: SockId, tight: bool) {
        if let Some(Sock { fd, kind: SockKind::Tcp(TcpSock { unix: false, .. }), .. }) = self.get(id) {
            tighten(fd, self.buffers, tight);
        }
    }

    /// Marks what the connection sends from now on.
    pub(crate) fn tcp_tos(&mut self, id: SockId, tos: u8) {
        if let Some(Sock { fd, kind: SockKind::Tcp(TcpSock { unix: false, .. }), .. }) = self.get(id) {
            let v6 = sys::local_addr(fd).and_then(RawAddr::to_ip).is_some_and(|a| a.is_ipv6());
            options::set_tos(fd, v6, tos);
        }
    }

    /// What the kernel knows of the other end.
    pub(crate) fn tcp_peer(&self, id: SockId) -> Option<Peer> {
        let Some(Sock { fd, kind: SockKind::Tcp(tcp), .. }) = self.get(id) else { return None };
        let info = if tcp.unix { None } else { sys::tcp_info(fd) }?;
        let busy = info.unacked > 0 || info.unsent > 0 || !tcp.waiting.is_empty();
        Some(Peer { segments_in: info.segments_in, busy })
    }

    /// Sends one keep-alive probe: the idle time that is set has passed already, so the kernel's timer fires at
    /// once. By itself it sends none for hours, and never gives up.
    pub(crate) fn tcp_probe(&mut self, id: SockId) {
        let Some(Sock { fd, kind: SockKind::Tcp(tcp), .. }) = self.get_mut(id) else { return };
        if tcp.unix {
            return;
        }
        if !std::mem::replace(&mut tcp.probed, true) {
            let _best_effort = sys::set_opt(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1);
            let _best_effort = sys::set_opt(fd, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, KEEP_INTERVAL_MAX);
            let _best_effort = sys::set_opt(fd, libc::IPPROTO_TCP, libc::TCP_KEEPCNT, KEEP_COUNT_MAX);
        }
        let _best_effort = sys::set_opt(fd, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 1);
    }

    pub(crate) fn tcp_shutdown(&mut self, id: SockId) {
        let all = self.send_waiting(id);
        let Some(Sock { fd, kind: SockKind::Tcp(tcp), .. }) = self.slab.get_mut(id.0) else { return };
        match all {
            Ok(true) => sys::shutdown_write(fd),
            Ok(false) => tcp.ends = true,
            Err(e) => self.broke(id, e),
        }
    }
}

impl TcpSock {
    /// Bytes that are kept here.
    pub(crate) fn kept(&self) -> usize {
        self.kept.len()
    }
}

/// Has ICMP errors of a connect kept with their sender, or no more. On an open connection they would end it.
pub(crate) fn trace(fd: &OwnedFd, family: i32, on: bool) -> bool {
    family == libc::AF_INET && sys::set_opt(fd, libc::IPPROTO_IP, libc::IP_RECVERR, i32::from(on)).is_ok()
}

/// Bounds what the kernel takes of a connection, or leaves it to the kernel, beginning with `usual` sizes.
fn tighten(fd: &OwnedFd, usual: Buffers, tight: bool) {
    // The kernel doubles what it is given, for its own overhead.
    let (receive, send) = if tight { (TIGHT, TIGHT) } else { (usual.receive / 2, usual.send / 2) };
    let _best_effort = sys::set_opt(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, receive);
    let _best_effort = sys::set_opt(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, send);
    if !tight {
        // Before Linux 5.14 the sizes stay at the usual ones.
        let _best_effort = sys::set_opt(fd, libc::SOL_SOCKET, SO_BUF_LOCK, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attachment::quota::{Pool, Quota};
    use guestnet_core::effects::Peek;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    const PATIENCE: Duration = Duration::from_secs(10);

    pub(super) fn peek(s: &mut Socks, id: SockId, offset: usize, max: usize) -> Result<Vec<u8>, Peek> {
        let mut scratch = Vec::new();
        // What the other end wrote is not there at once.
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            match s.tcp_peek(id, offset, max, &mut scratch).unwrap() {
                (Peek::Data(n) | Peek::Last(n), at) => return Ok(scratch[at..at + n].to_vec()),
                (Peek::Urgent, at) => return Ok(vec![scratch[at]]),
                (Peek::Eof, _) => return Err(Peek::Eof),
                (Peek::Empty, _) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        Err(Peek::Empty)
    }

    /// Waits until something is so.
    pub(super) fn until(what: &str, mut done: impl FnMut() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done() {
            assert!(Instant::now() < end, "{what} never came");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until the kernel reports `events` of a socket.
    pub(super) fn wait_for(s: &Socks, id: SockId, events: i16) {
        let fd = &s.slab.get(id.0).unwrap().fd;
        until(&format!("{events:#x}"), || sys::poll_now(fd, events) & events != 0);
    }

    pub(super) fn pair(s: &mut Socks) -> (SockId, TcpStream) {
        let (poller, mut c) = (Poller::new(4).unwrap(), IoCounters::default());
        let l = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = Target::Address(l.local_addr().unwrap());
        let id = s
            .tcp_connect(&poller, &mut c, FlowId { index: 0, generation: 0 }, target, IpFields::ttl(9), false)
            .unwrap();
        let (other, _) = l.accept().unwrap();
        (id, other)
    }

    #[test]
    fn urgent_data_is_plain_data() {
        let mut s = Socks::new(&Quota::new(Pool::of_process()));
        let (id, other) = pair(&mut s);
        other.set_nodelay(true).unwrap();
        let raw = OwnedFd::from(other);
        sys::send(&raw, b"ab").unwrap();
        sys::send_urgent(&raw, b"c").unwrap();
        sys::send(&raw, b"d").unwrap();
        wait_for(&s, id, libc::POLLPRI);
        let mut got = Vec::new();
        while got.len() < 4 {
            let more = peek(&mut s, id, got.len(), 100).unwrap();
            got.extend(more);
        }
        assert_eq!(got, b"abcd");
    }

    #[test]
    fn an_urgent_byte_of_the_peer_is_read_alone_and_told_as_such() {
        let mut s = Socks::new(&Quota::new(Pool::of_process()));
        let (id, other) = pair(&mut s);
        other.set_nodelay(true).unwrap();
        let raw = OwnedFd::from(other);
        sys::send(&raw, b"ab").unwrap();
        sys::send_urgent(&raw, b"c").unwrap();
        sys::send(&raw, b"d").unwrap();
        // As the poller would tell of it.
        wait_for(&s, id, libc::POLLPRI);
        tcp(&mut s, id).urgent = true;
        let (mut scratch, mut seen) = (Vec::new(), Vec::new());
        while seen.len() < 4 {
            let at = seen.len();
            match s.tcp_peek(id, at, 100, &mut scratch).unwrap() {
                (Peek::Data(n), from) => seen.extend(scratch[from..from + n].iter().map(|b| (*b, false))),
                (Peek::Urgent, from) => seen.push((scratch[from], true)),
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        assert_eq!(seen, [(b'a', false), (b'b', false), (b'c', true), (b'd', false)]);
        // Sent again, it is data like the rest.
        assert_eq!(peek(&mut s, id, 1, 100).unwrap(), b"bcd");
    }

    #[test]
    fn an_urgent_byte_of_the_guest_is_urgent_for_the_peer() {
        let mut s = Socks::new(&Quota::new(Pool::of_process()));
        let (id, other) = pair(&mut s);
        let other = OwnedFd::from(other);
        assert_eq!(s.tcp_send(id, b"ab"), Ok(2));
        assert_eq!(s.tcp_send_urgent(id, b'!'), Ok(true));
        assert_eq!(s.tcp_send(id, b"cd"), Ok(2));
        let (mut oob, mut all) = ([0; 4], Vec::new());
        until("urgent data", || sys::recv(&other, &mut oob, libc::MSG_OOB) == Ok(1));
        assert_eq!(oob[0], b'!');
        while all.len() < 4 {
            let mut some = [0; 4];
            match sys::recv(&other, &mut some, 0) {
                Ok(n) => all.extend_from_slice(&some[..n]),
                Err(e) => assert!(sys::would_block(e), "{e}"),
            }
        }
        assert_eq!(all, b"abcd");
    }

    /// Has the peer send until it cannot any more; what the socket holds then.
    fn fill(s: &Socks, id: SockId, other: &mut TcpStream) -> (usize, usize) {
        let (mut sent, fd) = (0, OwnedFd::from(other.try_clone().unwrap()));
        // It is over when the peer's buffer is full and nothing is in flight: the window is closed.
        until("a closed window", || match other.write(&[7; 65536]) {
            Ok(n) => {
                sent += n;
                false
            }
            Err(_) => sys::tcp_info(&fd).is_some_and(|i| i.unacked == 0 && i.unsent > 0),
        });
        (sent, s.tcp_held(id))
    }

    #[test]
    fn a_tight_connection_holds_little_and_loses_nothing() {
        let mut s = Socks::new(&Quota::new(Pool::of_process()));
        let (poller, mut c) = (Poller::new(4).unwrap(), IoCounters::default());
        let l = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = Target::Address(l.local_addr().unwrap());
        let mut connect = |s: &mut Socks, tight| {
            let flow = FlowId { index: 0, generation: 0 };
            let id = s.tcp_connect(&poller, &mut c, flow, target, IpFields::ttl(64), tight).unwrap();
            let other = l.accept().unwrap().0;
            other.set_nonblocking(true).unwrap();
            (id, other)
        };
        let (wide, mut wide_peer) = connect(&mut s, false);
        let (_, all) = fill(&s, wide, &mut wide_peer);
        let (narrow, mut peer) = connect(&mut s, true);
        let (mut sent, little) = fill(&s, narrow, &mut peer);
        assert!(little > 0 && little * 4 < all, "{little} bytes of a tight connection, {all} of another");
        // One that has some already takes no more; and let go, it takes as much as any, from the first byte on.
        s.tcp_tighten(wide, true);
        s.tcp_tighten(narrow, false);
        let mut got = 0;
        for _ in 0..10_000 {
            if got >= sent && sent > 4 << 20 {
                break;
            }
            if sent <= 4 << 20
                && let Ok(n) = peer.write(&[7; 65536])
            {
                sent += n;
            }
            let mut scratch = Vec::new();
            match s.tcp_peek(narrow, 0, 65536, &mut scratch).unwrap() {
                (Peek::Data(n) | Peek::Last(n), at) => {
                    assert!(scratch[at..at + n].iter().all(|b| *b == 7));
                    s.tcp_discard(narrow, n);
                    got += n;
                }
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        assert!(sent > 4 << 20 && got == sent, "{got} of {sent}");
    }

    #[test]
    fn a_connection_is_marked_as_its_guest_marks_it() {
        let mut s = Socks::new(&Quota::new(Pool::of_process()));
        let (id, _other) = pair(&mut s);
        for tos in [0xb8, 0x20, 0] {
            s.tcp_tos(id, tos);
            let fd = &s.get(id).unwrap().fd;
            assert_eq!(sys::get_opt(fd, libc::IPPROTO_IP, libc::IP_TOS), Ok(i32::from(tos)));
        }
    }

    pub(super) fn tcp(s: &mut Socks, id: SockId) -> &mut TcpSock {
        match s.get_mut(id) {
            Some(Sock { kind: SockKind::Tcp(tcp), .. }) => tcp,
            _ => panic!("{id:?} is not a connection"),
        }
    }
}
