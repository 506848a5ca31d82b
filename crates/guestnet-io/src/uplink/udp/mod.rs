//! Theory of operation: UDP, a batch at a time. Datagrams to the outside are copied to one arena and go at
//! the end of the batch, those of one socket in one call, and runs of one size to one destination as one
//! large send that the kernel or the NIC cuts (UDP_SEGMENT). What comes in is read many at a time, and
//! merged by the kernel where it was one run (UDP_GRO). Sockets are bound to no address, or to the one that flows leave from ([`super::source`]), so that one serves
//! all destinations of a guest's port (RFC 4787 REQ-1).

// sendmmsg and recvmmsg take raw pointers.
#![allow(unsafe_code)]

mod inbox;
mod record;

use super::error_queue;
use super::options::{SOL_UDP, UDP_GRO, set_df, set_gro, set_recverr, set_tos, set_ttl};
use super::queued_error::QueuedError;
use super::sockets::{Sock, SockKind, Socks};
use crate::os::cmsg::{self, Control};
use crate::os::epoll::Poller;
use crate::os::sockaddr::RawAddr;
use crate::os::sys;
use crate::runtime::stats::IoCounters;
use guestnet_core::effects::SockError;
use guestnet_core::types::{FlowId, IpFields, SockId};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

pub(crate) use inbox::Inbox;
use record::Pending;
pub(crate) use record::{UdpOut, UdpSock};

/// Messages per call.
const BATCH: usize = 16;
/// Bytes gathered before they are sent, batch or not.
const ARENA: usize = 1 << 20;
/// What one large send can carry: the kernel takes 64 pieces, in one IP packet.
const SEGMENTS_MAX: usize = 64;
const PAYLOAD_MAX: usize = 65507;

/// What the kernel is asked to buffer of a busy socket, in bytes; its own limit is usually lower.
const BUFFER: i32 = 1 << 20;
/// Messages of one receive that make a socket a busy one.
pub(crate) const BUSY: usize = 4;

/// Errors that wait for the core at most.
const ERRORS_MAX: usize = 1024;

const UDP_SEGMENT: i32 = 103;

impl Socks {
    pub(crate) fn udp_open(
        &mut self,
        poller: &Poller,
        counters: &mut IoCounters,
        flow: FlowId,
        like: SocketAddr,
    ) -> Result<SockId, SockError> {
        if self.proxy.is_some() {
            return Err(SockError::Prohibited);
        }
        let v6 = like.is_ipv6();
        let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
        let fd = sys::socket(family, libc::SOCK_DGRAM, 0).map_err(sys::sock_error)?;
        self.source.bind(&fd, like.ip())?;
        set_recverr(&fd, v6);
        set_gro(&fd);
        // The first send binds it to a port that the kernel chooses, at random (RFC 6056).
        let kind = SockKind::Udp(UdpSock { v6, ..UdpSock::default() });
        self.add(poller, counters, Sock { fd, flow: Some(flow), kind }, libc::EPOLLIN)
            .map_err(sys::sock_error)
    }

    /// Queues a datagram, or several of `segment` bytes.
    #[allow(clippy::too_many_arguments)] // One datagram has that many properties.
    pub(crate) fn udp_queue(
        &mut self,
        counters: &mut IoCounters,
        sock: SockId,
        dst: SocketAddr,
        payload: &[u8],
        segment: u16,
        ip: IpFields,
        df: bool,
        from: Option<IpAddr>,
    ) {
        if self.out.arena.len() + payload.len() > ARENA {
            self.udp_flush(counters);
        }
        let too_long = match self.slab.get(sock.0).map(|s| &s.kind) {
            Some(SockKind::Udp(u)) => u.too_long.unwrap_or(usize::MAX),
            _ => usize::MAX,
        };
        let out = &mut self.out;
        let start = out.arena.len();
        out.arena.extend_from_slice(payload);
        if segment == 0
            && let Some(p) = out.pending.last_mut()
            && (p.sock, p.dst, p.ip, p.df, p.from) == (sock, dst, ip, df, from)
            && !p.closed
            && !payload.is_empty()
            && payload.len() <= p.piece
            && p.piece < too_long
            && p.len + payload.len() <= PAYLOAD_MAX
            && p.len / p.piece < SEGMENTS_MAX
        {
            p.len += payload.len();
            p.closed = payload.len() < p.piece;
            return;
        }
        let piece = if segment == 0 { payload.len() } else { usize::from(segment).min(payload.len()) };
        let closed = segment != 0 || payload.is_empty();
        out.pending.push(Pending { sock, dst, start, len: payload.len(), piece, closed, ip, df, from });
    }

    /// Sends all that waits.
    pub(crate) fn udp_flush(&mut self, counters: &mut IoCounters) {
        if self.out.pending.is_empty() {
            return;
        }
        let mut out = std::mem::take(&mut self.out);
        let mut errors = std::mem::take(&mut self.errors);
        let mut at = 0;
        while let Some(first) = out.pending.get(at) {
            let same = |p: &&Pending| (p.sock, p.ip, p.df) == (first.sock, first.ip, first.df);
            let n = out.pending.iter().skip(at).take_while(same).take(BATCH).count();
            let run = out.pending.get(at..at + n).unwrap_or(&[]);
            if let Some(sock) = self.get_mut(first.sock) {
                send_run(sock, &mut errors, counters, run, &out.arena);
            }
            at += n;
        }
        out.pending.clear();
        out.arena.clear();
        self.out = out;
        self.errors = errors;
    }
}

impl Sock {
    /// Asks the kernel for larger buffers, as far as it allows; false when it was asked before. Most sockets
    /// carry a question and an answer, and never need them.
    pub(crate) fn enlarge(&mut self) -> bool {
        let enlarged = match &mut self.kind {
            SockKind::Udp(u) => &mut u.enlarged,
            SockKind::Forward { enlarged, .. } => enlarged,
            _ => return false,
        };
        if std::mem::replace(enlarged, true) {
            return false;
        }
        let _as_it_was = sys::set_opt(&self.fd, libc::SOL_SOCKET, libc::SO_RCVBUF, BUFFER);
        let _as_it_was = sys::set_opt(&self.fd, libc::SOL_SOCKET, libc::SO_SNDBUF, BUFFER);
        true
    }
}

/// Sends messages of one socket that need the same settings.
fn send_run(
    sock: &mut Sock,
    errors: &mut Vec<QueuedError>,
    counters: &mut IoCounters,
    run: &[Pending],
    arena: &[u8],
) {
    let Some(first) = run.first() else { return };
    if let SockKind::Udp(u) = &mut sock.kind {
        if u.ip.ttl != first.ip.ttl {
            set_ttl(&sock.fd, u.v6, first.ip.ttl);
        }
        if u.ip.tos != first.ip.tos {
            set_tos(&sock.fd, u.v6, first.ip.tos);
        }
        u.ip = first.ip;
        if u.df != Some(first.df) {
            set_df(&sock.fd, u.v6, first.df);
            u.df = Some(first.df);
        }
    }
    let mut rest = run;
    // An error of an earlier datagram is reported by the next send, which it has nothing to do with.
    let mut again = true;
    while let Some(p) = rest.first() {
        counters.datagram_sends += 1;
        match send_batch(&sock.fd, rest, arena) {
            Ok(n) => {
                counters.datagrams_sent += rest.iter().take(n).map(Pending::count).sum::<u64>();
                rest = rest.get(n.max(1)..).unwrap_or(&[]);
                again = true;
            }
            Err(e) if again && e != libc::EMSGSIZE && !sys::would_block(e) => again = false,
            Err(e) if sys::would_block(e) && sock.enlarge() => {}
            Err(e) => {
                if p.is_gso() && !sys::would_block(e) {
                    // Pieces over the path's MTU, or no checksum offload on the way out: one by one, and from
                    // now on not gathered at all.
                    if let SockKind::Udp(u) = &mut sock.kind {
                        u.too_long = Some(u.too_long.unwrap_or(usize::MAX).min(p.piece));
                    }
                    let cut = |from: usize| Pending {
                        start: p.start + from,
                        len: p.piece.min(p.len - from),
                        piece: p.piece.min(p.len - from),
                        ..*p
                    };
                    let pieces: Vec<Pending> = (0..p.len).step_by(p.piece.max(1)).map(cut).collect();
                    send_run(sock, errors, counters, &pieces, arena);
                } else {
                    failed(sock, errors, counters, p.dst, p.payload(arena), e);
                }
                rest = rest.get(1..).unwrap_or(&[]);
                again = true;
            }
        }
    }
}

/// A datagram was refused: the core hears of it, unless the host was only busy.
fn failed(
    sock: &Sock,
    errors: &mut Vec<QueuedError>,
    counters: &mut IoCounters,
    dst: SocketAddr,
    payload: &[u8],
    errno: i32,
) {
    counters.datagrams_refused += 1;
    let mut kind = sys::sock_error(errno);
    if errno == libc::EMSGSIZE {
        // The queue names the MTU that it was too big for.
        kind = SockError::MessageTooBig(error_queue::drain(sock, errors));
    }
    if let Some(flow) = sock.flow
        && !sys::would_block(errno)
        && errors.len() < ERRORS_MAX
    {
        // An ICMP error quotes at most 548 bytes (RFC 1812 4.3.2.3).
        errors.push(QueuedError::local(flow, kind, dst, payload.get(..548).unwrap_or(payload)));
    }
}

fn send_batch(fd: &OwnedFd, run: &[Pending], arena: &[u8]) -> Result<usize, i32> {
    let mut names = [RawAddr::default(); BATCH];
    let mut controls = [Control::EMPTY; BATCH];
    let mut iov = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; BATCH];
    // SAFETY: an mmsghdr of zeros is an empty message.
    let mut msgs: [libc::mmsghdr; BATCH] = unsafe { std::mem::zeroed() };
    let slots = msgs.iter_mut().zip(&mut iov).zip(names.iter_mut().zip(&mut controls));
    for (((m, v), (name, control)), p) in slots.zip(run) {
        let bytes = p.payload(arena);
        *name = RawAddr::ip(p.dst);
        *v = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let h = &mut m.msg_hdr;
        h.msg_name = name.as_mut_ptr().cast();
        h.msg_namelen = name.len;
        h.msg_iov = v;
        h.msg_iovlen = 1;
        let mut end = 0;
        if p.is_gso() {
            end = cmsg::put(control, end, SOL_UDP, UDP_SEGMENT, p.piece as u16);
        }
        match p.from {
            Some(IpAddr::V4(a)) => {
                let info = libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(a.octets()) },
                    ipi_addr: libc::in_addr { s_addr: 0 },
                };
                end = cmsg::put(control, end, libc::IPPROTO_IP, libc::IP_PKTINFO, info);
            }
            Some(IpAddr::V6(a)) => {
                let info =
                    libc::in6_pktinfo { ipi6_addr: libc::in6_addr { s6_addr: a.octets() }, ipi6_ifindex: 0 };
                end = cmsg::put(control, end, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, info);
            }
            None => {}
        }
        if end > 0 {
            h.msg_control = control.0.as_mut_ptr().cast();
            h.msg_controllen = end;
        }
    }
    let n = run.len().min(BATCH) as u32;
    // SAFETY: the first `n` messages point to live names, iovecs and control buffers.
    sys::check(unsafe {
        libc::sendmmsg(fd.as_raw_fd(), msgs.as_mut_ptr(), n, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
    })
    .map(|n| n as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attachment::quota::{Pool, Quota};
    use std::net::UdpSocket;

    fn world() -> (Socks, Poller, IoCounters) {
        (Socks::new(&Quota::new(Pool::of_process())), Poller::new(8).unwrap(), IoCounters::default())
    }

    #[test]
    fn there_are_no_more_sockets_than_were_meant_for_guests() {
        let (_, poller, mut c) = world();
        let pool = Pool::new(16, 0, 0);
        pool.set_limits(2, 0);
        let mut socks = Socks::new(&Quota::new(&pool));
        let (flow, like) = (FlowId { index: 1, generation: 0 }, "127.0.0.1:1".parse().unwrap());
        let mut open = || socks.udp_open(&poller, &mut c, flow, like);
        let first = open().unwrap();
        open().unwrap();
        assert_eq!(open(), Err(SockError::Exhausted));
        socks.remove(&mut c, first);
        assert!(socks.udp_open(&poller, &mut c, flow, like).is_ok());
    }

    #[test]
    fn a_run_goes_as_one_send_and_comes_as_one_message() {
        let (mut socks, poller, mut c) = world();
        let flow = FlowId { index: 1, generation: 0 };
        let like = "127.0.0.1:1".parse().unwrap();
        let a = socks.udp_open(&poller, &mut c, flow, like).unwrap();
        let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
        set_gro(&peer.try_clone().unwrap().into());
        let dst = peer.local_addr().unwrap();
        for i in 0..10u8 {
            socks.udp_queue(&mut c, a, dst, &[i; 500], 0, IpFields::ttl(64), false, None);
        }
        socks.udp_queue(&mut c, a, dst, &[10; 99], 0, IpFields::ttl(64), false, None);
        socks.udp_queue(&mut c, a, dst, &[11; 99], 0, IpFields::ttl(64), false, None);
        socks.udp_queue(&mut c, a, dst, &[], 0, IpFields::ttl(64), false, None);
        assert_eq!(c.datagram_sends, 0, "deferred");
        socks.udp_flush(&mut c);
        assert_eq!((c.datagram_sends, c.datagrams_sent), (1, 13));
        let mut inbox = Inbox::new();
        let fd: OwnedFd = peer.into();
        let n = inbox.receive(&fd).unwrap();
        let all: Vec<_> = (0..n).filter_map(|i| inbox.message(i)).collect();
        assert_eq!((n, all[0].0.segment, all[0].1.len()), (3, 500, 5099));
        assert_eq!((all[1].0.segment, all[1].1), (0, &[11; 99][..]));
        assert_eq!(all[2].1.len(), 0);
    }

    #[test]
    fn an_icmp_error_comes_with_its_quote_and_the_next_datagram_is_not_lost() {
        let (mut socks, poller, mut c) = world();
        let flow = FlowId { index: 1, generation: 0 };
        let like = "127.0.0.1:1".parse().unwrap();
        let a = socks.udp_open(&poller, &mut c, flow, like).unwrap();
        let closed = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
        socks.udp_queue(&mut c, a, closed, b"nobody", 0, IpFields::ttl(64), false, None);
        socks.udp_flush(&mut c);
        socks.udp_queue(
            &mut c,
            a,
            peer.local_addr().unwrap(),
            b"somebody",
            0,
            IpFields::ttl(64),
            false,
            None,
        );
        socks.udp_flush(&mut c);
        let mut buf = [0; 20];
        assert_eq!(peer.recv(&mut buf).unwrap(), 8);
        let mut errors = Vec::new();
        error_queue::drain(socks.get(a).unwrap(), &mut errors);
        let [e] = &errors[..] else { panic!("{errors:?}") };
        assert_eq!((e.kind, e.icmp, e.dst), (SockError::Refused, (3, 3), closed));
        assert_eq!((&e.payload[..], e.offender), (&b"nobody"[..], Some("127.0.0.1".parse().unwrap())));
    }

    #[test]
    fn a_datagram_over_the_mtu_with_df_tells_the_mtu() {
        let (mut socks, poller, mut c) = world();
        let flow = FlowId { index: 1, generation: 0 };
        let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
        let dst = peer.local_addr().unwrap();
        let a = socks.udp_open(&poller, &mut c, flow, dst).unwrap();
        // Larger than loopback's MTU of 65536 with its headers is what no datagram can be.
        socks.udp_queue(&mut c, a, dst, &vec![0; 65508], 0, IpFields::ttl(64), true, None);
        socks.udp_flush(&mut c);
        let [e] = &socks.errors[..] else { panic!("{:?}", socks.errors) };
        assert!(matches!(e.kind, SockError::MessageTooBig(_)), "{e:?}");
        assert_eq!((e.dst, c.datagrams_refused), (dst, 1));
    }

    #[test]
    fn datagrams_of_one_size_from_one_sender_become_a_run() {
        let a = UdpSocket::bind("127.0.0.1:0").unwrap();
        let b = UdpSocket::bind("127.0.0.1:0").unwrap();
        let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = peer.local_addr().unwrap();
        let sent: [(&UdpSocket, usize); 11] = [
            (&a, 500),
            (&a, 500),
            (&a, 99),
            (&a, 99),
            (&b, 99),
            (&b, 0),
            (&b, 0),
            (&b, 7),
            (&b, 8),
            (&a, 8),
            (&a, 8),
        ];
        for (i, (from, len)) in sent.iter().enumerate() {
            from.send_to(&vec![i as u8; *len], to).unwrap();
        }
        let (fd, mut inbox): (OwnedFd, _) = (peer.into(), Inbox::new());
        let mut n = 0;
        while n < sent.len() {
            // All on one queue, so they are there at once.
            n += inbox.receive(&fd).unwrap();
        }
        assert_eq!(inbox.merge(), 8);
        let all: Vec<_> = (0..8).filter_map(|i| inbox.message(i)).collect();
        let shape: Vec<_> = all.iter().map(|(r, p)| (r.segment, r.len, p.len())).collect();
        let plain = |n| (0, n, n);
        assert_eq!(
            shape,
            [(500, 1099, 1099), plain(99), plain(99), plain(0), plain(0), plain(7), plain(8), (8, 16, 16)]
        );
        assert_eq!(all[0].1, [vec![0; 500], vec![1; 500], vec![2; 99]].concat());
        assert_eq!(all[7].1, [[9; 8], [10; 8]].concat());
        assert_eq!(all[7].0.from, a.local_addr().unwrap());
    }

    #[test]
    fn a_busy_socket_is_enlarged_once() {
        let (mut socks, poller, mut c) = world();
        let like = "127.0.0.1:1".parse().unwrap();
        let a = socks.udp_open(&poller, &mut c, FlowId { index: 1, generation: 0 }, like).unwrap();
        let sock = socks.get_mut(a).unwrap();
        let size = |s: &Sock| sys::get_opt(&s.fd, libc::SOL_SOCKET, libc::SO_RCVBUF).unwrap();
        let before = size(sock);
        assert!(sock.enlarge());
        assert!(size(sock) > before);
        assert!(!sock.enlarge(), "asked twice");
    }

    #[test]
    fn pieces_too_long_for_the_path_are_not_gathered_again() {
        let (mut socks, poller, mut c) = world();
        let flow = FlowId { index: 1, generation: 0 };
        let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
        let dst = peer.local_addr().unwrap();
        let a = socks.udp_open(&poller, &mut c, flow, dst).unwrap();
        for round in 1..=2 {
            for i in 0..4u8 {
                socks.udp_queue(&mut c, a, dst, &[i; 1000], 0, IpFields::ttl(64), false, None);
            }
            if round == 1 {
                let Some(Sock { kind: SockKind::Udp(u), .. }) = socks.get_mut(a) else { panic!() };
                u.too_long = Some(1001);
            }
            let gathered = socks.out.pending.len();
            socks.udp_flush(&mut c);
            assert_eq!((gathered, c.datagrams_sent), (1, 4 * round));
        }
        let Some(Sock { kind: SockKind::Udp(u), .. }) = socks.get_mut(a) else { panic!() };
        u.too_long = Some(1000);
        for i in 0..4u8 {
            socks.udp_queue(&mut c, a, dst, &[i; 1000], 0, IpFields::ttl(64), false, None);
            socks.udp_queue(&mut c, a, dst, &[i; 999], 0, IpFields::ttl(64), false, None);
        }
        assert_eq!(socks.out.pending.len(), 8);
        socks.udp_flush(&mut c);
        assert_eq!(c.datagrams_sent, 16);
    }
}
