//! Theory of operation: what the kernel's error queue (IP_RECVERR) holds for datagram sockets, and for TCP
//! connects under way whose TTL is small: ICMP errors with the packet that they quote, and errors that arose on
//! this host. They are read out as plain records, because they come up both on their own and in the middle of
//! sending.

// recvmsg takes raw pointers.
#![allow(unsafe_code)]

use super::queued_error::QueuedError;
use super::sockets::{Sock, SockKind};
use crate::os::cmsg::{self, Control};
use crate::os::sockaddr::RawAddr;
use crate::os::sys;
use guestnet_core::effects::SockError;
use std::mem::size_of;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

/// Errors read at once; more are left for the next round.
const BATCH: usize = 64;

/// Reads the error queue of a socket. Returns the MTU that a local "too big" told of, 0 for none.
pub(crate) fn drain(sock: &Sock, out: &mut Vec<QueuedError>) -> u16 {
    let mut local_mtu = 0;
    let mut buf = [0u8; 2048];
    for _ in 0..BATCH {
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
        let got = sys::check_len(unsafe {
            libc::recvmsg(sock.fd.as_raw_fd(), &mut msg, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT)
        });
        let Ok(n) = got else { break };
        name.len = msg.msg_namelen;
        let mut found = None;
        cmsg::for_each(&msg, |level, kind, data| {
            if matches!(
                (level, kind),
                (libc::IPPROTO_IP, libc::IP_RECVERR) | (libc::IPPROTO_IPV6, libc::IPV6_RECVERR)
            ) {
                found = extended(data);
            }
        });
        let Some((e, offender)) = found else { continue };
        if e.ee_origin == libc::SO_EE_ORIGIN_LOCAL {
            if e.ee_errno == libc::EMSGSIZE as u32 {
                local_mtu = u16::try_from(e.ee_info).unwrap_or(u16::MAX);
            }
            continue;
        }
        let (Some(flow), Some(dst)) = (sock.flow, name.to_ip()) else { continue };
        let mtu = if e.ee_errno == libc::EMSGSIZE as u32 {
            u16::try_from(e.ee_info).unwrap_or(u16::MAX)
        } else {
            0
        };
        let kind = match sys::sock_error(e.ee_errno as i32) {
            SockError::MessageTooBig(_) => SockError::MessageTooBig(mtu),
            k => k,
        };
        let mut quoted = buf.get(..n).unwrap_or(&[]);
        let mut seq = 0;
        if let SockKind::Ping { raw, .. } = &sock.kind {
            let [_, _, _, _, id_hi, id_lo, seq_hi, seq_lo, body @ ..] = quoted else { continue };
            // Every raw socket hears of every error.
            if raw.is_some_and(|id| id != u16::from_be_bytes([*id_hi, *id_lo])) {
                continue;
            }
            (seq, quoted) = (u16::from_be_bytes([*seq_hi, *seq_lo]), body);
        }
        out.push(QueuedError {
            flow,
            kind,
            offender,
            icmp: (e.ee_type, e.ee_code),
            mtu,
            dst,
            seq,
            payload: quoted.to_vec(),
        });
    }
    // An error without a record (the queue had no room for it) would make the socket ready for ever.
    sys::take_error(&sock.fd);
    local_mtu
}

/// The record of a control message, and who sent the ICMP error.
fn extended(data: &[u8]) -> Option<(libc::sock_extended_err, Option<IpAddr>)> {
    let (head, tail) = data.split_at_checked(size_of::<libc::sock_extended_err>())?;
    // SAFETY: `head` is as long as the struct, which is plain numbers.
    let e = unsafe { head.as_ptr().cast::<libc::sock_extended_err>().read_unaligned() };
    let mut raw = RawAddr::default();
    let n = tail.len().min(size_of::<libc::sockaddr_in6>());
    // SAFETY: the storage is larger than any of these addresses.
    unsafe { std::ptr::copy_nonoverlapping(tail.as_ptr(), raw.as_mut_ptr().cast::<u8>(), n) };
    raw.len = n as u32;
    Some((e, raw.to_ip().map(|a| a.ip())))
}
