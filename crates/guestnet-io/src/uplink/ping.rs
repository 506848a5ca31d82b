//! Theory of operation: echo requests through ping sockets, for which the kernel chooses the identifier and
//! filters the replies. Where `net.ipv4.ping_group_range` forbids them, a raw socket does the same if the
//! process may open one; the kernel would give it all replies of the host, and is told to leave those to other
//! identifiers out. Where neither may be, the guest is told that it is prohibited.

// recvmsg takes raw pointers.
#![allow(unsafe_code)]

use super::sockets::{Sock, SockKind, Socks};
use super::{error_queue, options};
use crate::os::cmsg::{self, Control};
use crate::os::epoll::Poller;
use crate::os::sockaddr::RawAddr;
use crate::os::sys;
use crate::runtime::stats::IoCounters;
use guestnet_core::effects::SockError;
use guestnet_core::types::{FlowId, SockId};
use guestnet_wire::checksum;
use std::mem::size_of;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

const ECHO: u8 = 8;
const ECHO_REPLY: u8 = 0;
const ECHO6: u8 = 128;
const ECHO6_REPLY: u8 = 129;
const HEADER: usize = 8;
/// struct icmp_filter: a set bit is a type that is not passed on.
const ICMP_FILTER: i32 = 1;

/// Instructions of classic BPF (linux/bpf_common.h).
const LDX_HEADER_LEN: u16 = 0xb1;
const LD_HALF_AT_X: u16 = 0x48;
const JUMP_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;

/// A reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reply {
    pub from: IpAddr,
    pub seq: u16,
    pub ttl: u8,
    /// Where the body is in the buffer.
    pub start: usize,
    pub end: usize,
}

impl Socks {
    pub(crate) fn ping_open(
        &mut self,
        poller: &Poller,
        counters: &mut IoCounters,
        flow: FlowId,
        like: IpAddr,
    ) -> Result<SockId, SockError> {
        if self.proxy.is_some() {
            return Err(SockError::Prohibited);
        }
        let v6 = like.is_ipv6();
        let (family, protocol) =
            if v6 { (libc::AF_INET6, libc::IPPROTO_ICMPV6) } else { (libc::AF_INET, libc::IPPROTO_ICMP) };
        let (fd, raw) = match sys::socket(family, libc::SOCK_DGRAM, protocol) {
            Ok(fd) => (fd, None),
            // A raw ICMPv6 socket would need its own filter; hosts without ping sockets are v4's legacy.
            Err(e) if v6 => return Err(sys::sock_error(e)),
            Err(_) => {
                let id = identifier();
                let fd = raw_socket(id).map_err(|e| match e {
                    libc::EPROTONOSUPPORT => SockError::Prohibited,
                    e => sys::sock_error(e),
                })?;
                (fd, Some(id))
            }
        };
        self.source.bind(&fd, like)?;
        options::set_recverr(&fd, v6);
        let (level, name) = if v6 {
            (libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT)
        } else {
            (libc::IPPROTO_IP, libc::IP_RECVTTL)
        };
        let _without = sys::set_opt(&fd, level, name, 1);
        let kind = SockKind::Ping { raw, v6, ttl: 0, df: None };
        self.add(poller, counters, Sock { fd, flow: Some(flow), kind }, libc::EPOLLIN)
            .map_err(sys::sock_error)
    }

    pub(crate) fn ping_send(
        &mut self,
        id: SockId,
        dst: IpAddr,
        seq: u16,
        body: &[u8],
        ttl: u8,
        dont_fragment: bool,
    ) -> Result<(), SockError> {
        let Some(Sock { fd, kind: SockKind::Ping { raw, v6, ttl: now, df }, .. }) = self.get_mut(id) else {
            return Err(SockError::Reset);
        };
        if *df != Some(dont_fragment) {
            options::set_df(fd, *v6, dont_fragment);
            *df = Some(dont_fragment);
        }
        if *now != ttl {
            options::set_ttl(fd, *v6, ttl);
            *now = ttl;
        }
        let mut packet = Vec::with_capacity(HEADER + body.len());
        packet.extend_from_slice(&[if *v6 { ECHO6 } else { ECHO }, 0, 0, 0]);
        packet.extend_from_slice(&raw.unwrap_or(0).to_be_bytes());
        packet.extend_from_slice(&seq.to_be_bytes());
        packet.extend_from_slice(body);
        if !*v6 {
            let sum = checksum::finish(checksum::sum(&packet, 0));
            guestnet_wire::put(&mut packet, 2, &sum.to_be_bytes());
        }
        let to = RawAddr::ip(SocketAddr::new(dst, 0));
        let mut sent = sys::send_to(fd, &packet, &to);
        if let Err(e) = sent
            && !sys::would_block(e)
        {
            // The error of an earlier request is reported by the next send.
            sent = sys::send_to(fd, &packet, &to);
        }
        match sent {
            Ok(_) => Ok(()),
            // The host is busy; a ping may be lost.
            Err(e) if sys::would_block(e) => Ok(()),
            Err(libc::EMSGSIZE) => {
                // The queue names the MTU that it was too big for.
                let mut errors = std::mem::take(&mut self.errors);
                let mtu = self.get(id).map_or(0, |sock| error_queue::drain(sock, &mut errors));
                self.errors = errors;
                Err(SockError::MessageTooBig(mtu))
            }
            Err(e) => Err(sys::sock_error(e)),
        }
    }
}

/// An identifier that no other raw socket of this host is likely to have, and that nobody can guess.
fn identifier() -> u16 {
    use std::hash::{BuildHasher, Hasher};
    // Keyed from the operating system's randomness.
    std::hash::RandomState::new().build_hasher().finish() as u16
}

/// A raw socket for replies to one identifier.
fn raw_socket(id: u16) -> Result<OwnedFd, i32> {
    let fd = sys::socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP)?;
    let _all = sys::set_opt(&fd, libc::SOL_RAW, ICMP_FILTER, !(1 << ECHO_REPLY));
    let op = |code, jf, k| libc::sock_filter { code, jt: 0, jf, k };
    let mut own = [
        // X: length of the IP header. A: the identifier behind it. All of the packet, or nothing.
        op(LDX_HEADER_LEN, 0, 0),
        op(LD_HALF_AT_X, 0, 4),
        op(JUMP_EQUAL, 1, u32::from(id)),
        op(RETURN, 0, u32::MAX),
        op(RETURN, 0, 0),
    ];
    // Without, `receive` leaves them out.
    let _all = sys::attach_filter(&fd, &mut own);
    Ok(fd)
}

/// Receives one ICMP message to `buf`. `Ok(None)`: it was not a reply to us.
pub(crate) fn receive(
    fd: &OwnedFd,
    raw: Option<u16>,
    v6: bool,
    buf: &mut [u8],
) -> Result<Option<Reply>, i32> {
    let mut control = Control::EMPTY;
    let mut name = RawAddr::default();
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    let mut msg = cmsg::msghdr();
    msg.msg_name = name.as_mut_ptr().cast();
    msg.msg_namelen = name.len;
    msg.msg_iov = &raw mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control.0.as_mut_ptr().cast();
    msg.msg_controllen = control.0.len();
    // SAFETY: name, data and control buffer live and are as long as the message says.
    let n = sys::check_len(unsafe { libc::recvmsg(fd.as_raw_fd(), &mut msg, libc::MSG_DONTWAIT) })?;
    name.len = msg.msg_namelen;
    let mut ttl = 64;
    cmsg::for_each(&msg, |level, kind, data| {
        if matches!(
            (level, kind),
            (libc::IPPROTO_IP, libc::IP_TTL) | (libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT)
        ) && data.len() >= size_of::<i32>()
        {
            ttl = cmsg::as_i32(data).and_then(|v| u8::try_from(v).ok()).unwrap_or(64);
        }
    });
    // A raw socket gets the IP header too.
    let start = match raw {
        Some(_) => usize::from(buf.first().copied().unwrap_or(0) & 0xf) * 4,
        None => 0,
    };
    let (Some(from), Some(&[kind, _, _, _, id_hi, id_lo, seq_hi, seq_lo])) =
        (name.to_ip(), buf.get(..n).and_then(|b| b.get(start..start + HEADER)))
    else {
        return Ok(None);
    };
    let want = if v6 { ECHO6_REPLY } else { ECHO_REPLY };
    if kind != want || raw.is_some_and(|id| id != u16::from_be_bytes([id_hi, id_lo])) {
        return Ok(None);
    }
    let seq = u16::from_be_bytes([seq_hi, seq_lo]);
    Ok(Some(Reply { from: from.ip(), seq, ttl, start: start + HEADER, end: n }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attachment::quota::{Pool, Quota};

    /// As root where ping sockets are forbidden: one guest may have a thousand sockets, and each reply that the
    /// host gets would be read by all of them.
    #[test]
    fn a_raw_socket_is_not_woken_by_replies_to_others() {
        let fd = match raw_socket(0x1234) {
            Ok(fd) => fd,
            Err(e) => return assert!(matches!(e, libc::EPERM | libc::EACCES), "{e}"),
        };
        let lo = RawAddr::ip("127.0.0.1:0".parse().unwrap());
        let send = |id: u16| {
            let [hi, lo_] = id.to_be_bytes();
            let mut reply = [ECHO_REPLY, 0, 0, 0, hi, lo_, 0, 7, b'x'];
            let sum = checksum::finish(checksum::sum(&reply, 0));
            guestnet_wire::put(&mut reply, 2, &sum.to_be_bytes());
            sys::send_to(&fd, &reply, &lo).unwrap();
        };
        for id in 0x1230..0x1234 {
            send(id);
        }
        assert_eq!(sys::poll_now(&fd, libc::POLLIN), 0, "woken by what is for others");
        send(0x1234);
        assert_eq!(sys::poll_now(&fd, libc::POLLIN), libc::POLLIN);
        let mut buf = [0; 200];
        let r = receive(&fd, Some(0x1234), false, &mut buf).unwrap().unwrap();
        assert_eq!((r.seq, &buf[r.start..r.end]), (7, &b"x"[..]));
    }

    #[test]
    fn an_echo_on_loopback_comes_back() {
        let (mut socks, poller) = (Socks::new(&Quota::new(Pool::of_process())), Poller::new(4).unwrap());
        let mut c = IoCounters::default();
        let lo: IpAddr = "127.0.0.1".parse().unwrap();
        let id = match socks.ping_open(&poller, &mut c, FlowId { index: 0, generation: 0 }, lo) {
            Ok(id) => id,
            Err(e) => return assert_eq!(e, SockError::Prohibited),
        };
        socks.ping_send(id, lo, 77, b"body", 9, true).unwrap();
        let Some(Sock { fd, kind: SockKind::Ping { raw, .. }, .. }) = socks.get(id) else { panic!() };
        let mut buf = [0; 200];
        for _ in 0..100 {
            sys::poll_now(fd, libc::POLLIN);
            match receive(fd, *raw, false, &mut buf) {
                Ok(Some(r)) => {
                    assert_eq!((r.from, r.seq, &buf[r.start..r.end]), (lo, 77, &b"body"[..]));
                    return;
                }
                Ok(None) => {}
                Err(_) => std::thread::yield_now(),
            }
        }
        panic!("no reply");
    }
}
