//! Theory of operation: a TAP, one frame per read and write, with virtio headers where it was made with them,
//! so that the kernel on the other side neither segments nor sums. Each offload is asked for and left out when
//! refused. A write hands the frame to the guest's stack at once; there is no queue of ours.

// ioctl takes raw pointers.
#![allow(unsafe_code)]

use super::{ReadOutcome, reason, vnet};
use crate::os::io_uring::SMALL;
use crate::os::sys;
use guestnet_core::types::{Csum, FrameMeta, Gso};
use std::os::fd::{AsRawFd, OwnedFd};

const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
const TUNGETIFF: libc::Ioctl = 0x8004_54d2_u32 as libc::Ioctl;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;
const TUNGETVNETHDRSZ: libc::Ioctl = 0x8004_54d7_u32 as libc::Ioctl;

const F_CSUM: libc::c_ulong = 0x01;
const F_TSO4: libc::c_ulong = 0x02;
const F_TSO6: libc::c_ulong = 0x04;
const F_USO4: libc::c_ulong = 0x20;
const F_USO6: libc::c_ulong = 0x40;

/// A TAP.
pub(crate) struct Tap {
    pub fd: OwnedFd,
    /// Length of the virtio header, 0 for none.
    header: usize,
    /// The kernel knows UDP segmentation (6.2).
    uso: bool,
    /// Small frames with their virtio headers that go at the end of the batch, one after the other.
    deferred: Vec<u8>,
    /// Where each ends, and how many have gone.
    ends: Vec<usize>,
    gone: usize,
    /// The kernel cannot promise that a write does not block.
    unhurried: bool,
}

/// Frames that wait at most.
const LATER_MAX: usize = 64;

/// Whether a frame waits for the end of the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Deferred {
    /// It does, and no other did.
    First,
    Yes,
    /// It is too large, or there are too many.
    No,
}

/// What became of a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum WriteOutcome {
    Yes,
    /// To be tried again at EPOLLOUT.
    Full,
    /// Refused: the interface is down, or the kernel does not like the frame.
    Refused,
    Down(String),
}

impl Tap {
    /// Takes a TAP and agrees with the kernel on headers and offloads. A packet socket (packet(7)) that is bound
    /// to an interface, with PACKET_VNET_HDR or without, is used in the same way.
    pub(crate) fn new(fd: OwnedFd) -> Result<Tap, String> {
        if sys::get_opt(&fd, libc::SOL_SOCKET, libc::SO_DOMAIN) == Ok(libc::AF_PACKET) {
            sys::adopt(&fd).map_err(|e| reason("the packet socket cannot be set up", e))?;
            let with_header = sys::get_opt(&fd, libc::SOL_PACKET, libc::PACKET_VNET_HDR) == Ok(1);
            let header = if with_header { vnet::LEN } else { 0 };
            return Ok(Tap::with(fd, header, false));
        }
        let (header, uso) = agree(&fd, Kind::Tap)?;
        Ok(Tap::with(fd, header, uso))
    }

    /// Takes a socket whose peer reads and writes as a TAP does, with virtio headers, and takes every offload.
    pub(crate) fn of_packets(fd: OwnedFd) -> Tap {
        Tap::with(fd, vnet::LEN, true)
    }

    fn with(fd: OwnedFd, header: usize, uso: bool) -> Tap {
        Tap { fd, header, uso, deferred: Vec::new(), ends: Vec::new(), gone: 0, unhurried: false }
    }

    /// Takes a small frame that [`Tap::takes`], to be written at the end of the batch.
    pub(crate) fn defer(&mut self, meta: &FrameMeta, front: &[u8], rest: &[u8]) -> Deferred {
        let large = meta.gso.is_some() || front.len() + rest.len() > SMALL;
        if large || self.unhurried || self.ends.len() >= LATER_MAX {
            return Deferred::No;
        }
        if self.header != 0 {
            let Some(h) = vnet::emit(meta, front) else { return Deferred::No };
            self.deferred.extend_from_slice(h.get(..self.header).unwrap_or(&h));
        }
        self.deferred.extend_from_slice(front);
        self.deferred.extend_from_slice(rest);
        self.ends.push(self.deferred.len());
        if self.ends.len() == 1 { Deferred::First } else { Deferred::Yes }
    }

    pub(crate) fn waits(&self) -> bool {
        !self.ends.is_empty()
    }

    /// The frames that wait.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(&0).chain(&self.ends);
        let frames = starts.zip(&self.ends).skip(self.gone);
        frames.map(|(from, to)| self.deferred.get(*from..*to).unwrap_or(&[]))
    }

    /// The first of them was written, or is lost: what became of it.
    pub(crate) fn gone_one(&mut self, result: i32) -> i32 {
        let mut result = result;
        if result == -libc::EOPNOTSUPP {
            // Before Linux 6.4; from now on each is written for itself.
            self.unhurried = true;
            let frame = self.waiting().next().unwrap_or(&[]);
            result = sys::writev(&self.fd, &[frame]).map_or_else(|e| -e, |n| n as i32);
        }
        self.gone += 1;
        if self.gone >= self.ends.len() {
            self.gone = 0;
            self.ends.clear();
            self.deferred.clear();
        }
        result
    }

    /// True when the frame can be written as it is.
    pub(crate) fn takes(&self, meta: &FrameMeta) -> bool {
        self.header != 0 && (self.uso || !matches!(meta.gso, Some(Gso::Udp(_))))
            || meta.gso.is_none() && !matches!(meta.csum, Csum::Partial { .. })
    }

    /// Reads a frame to `buf`: where it is and what is known of it.
    pub(crate) fn read(&self, buf: &mut [u8]) -> ReadOutcome<(usize, usize, FrameMeta)> {
        let n = match sys::read(&self.fd, buf) {
            // A socket's peer has closed it; a TAP has no end.
            Ok(0) => return ReadOutcome::Down("the peer closed the connection".into()),
            Ok(n) => n,
            Err(e) if sys::would_block(e) => return ReadOutcome::Empty,
            // The interface is down; it may come up.
            Err(libc::EIO) => return ReadOutcome::Empty,
            Err(e) => return ReadOutcome::Down(reason("the TAP is gone", e)),
        };
        let Some((header, frame)) = buf.get(..n).and_then(|b| b.split_at_checked(self.header)) else {
            return ReadOutcome::Bad;
        };
        if self.header == 0 {
            return ReadOutcome::Frame((0, n, FrameMeta::default()));
        }
        match vnet::parse(header, frame) {
            Ok(meta) => ReadOutcome::Frame((self.header, n, meta)),
            Err(vnet::BadHeader) => ReadOutcome::Bad,
        }
    }

    /// Writes a frame that [`Tap::takes`]: its front, with all headers, and the rest.
    pub(crate) fn write(&self, meta: &FrameMeta, front: &[u8], rest: &[u8]) -> WriteOutcome {
        let sent = if self.header == 0 {
            sys::writev(&self.fd, &[front, rest])
        } else {
            let Some(h) = vnet::emit(meta, front) else { return WriteOutcome::Refused };
            let h = h.get(..self.header).unwrap_or(&h);
            if rest.is_empty() {
                sys::writev(&self.fd, &[h, front])
            } else {
                sys::writev(&self.fd, &[h, front, rest])
            }
        };
        match sent {
            Ok(_) => WriteOutcome::Yes,
            Err(e) => lost("the TAP is gone", e),
        }
    }
}

/// What a failed write means.
pub(crate) fn lost(gone: &str, errno: i32) -> WriteOutcome {
    match errno {
        e if sys::would_block(e) => WriteOutcome::Full,
        e @ (libc::EBADFD | libc::EBADF | libc::ENODEV) => WriteOutcome::Down(reason(gone, e)),
        _ => WriteOutcome::Refused,
    }
}

/// The two devices of linux/if_tun.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Ethernet frames.
    Tap,
    /// IP packets.
    Tun,
}

/// Agrees with the kernel on headers and offloads: length of the virtio header, and whether UDP is cut.
pub(crate) fn agree(fd: &OwnedFd, kind: Kind) -> Result<(usize, bool), String> {
    let (name, flag) = match kind {
        Kind::Tap => ("TAP", libc::IFF_TAP),
        Kind::Tun => ("TUN", libc::IFF_TUN),
    };
    sys::adopt(fd).map_err(|e| reason(&format!("the descriptor of the {name} cannot be set up"), e))?;
    let raw = fd.as_raw_fd();
    // SAFETY: an ifreq is plain bytes.
    let mut ifr: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: `ifr` is writable.
    sys::check(unsafe { libc::ioctl(raw, TUNGETIFF, &raw mut ifr) })
        .map_err(|e| reason(&format!("the descriptor is not a {name} that is set up"), e))?;
    // SAFETY: TUNGETIFF fills the flags.
    let flags = i32::from(unsafe { ifr.ifr_ifru.ifru_flags });
    if flags & flag == 0 || flags & libc::IFF_NO_PI == 0 {
        return Err(format!("the descriptor is not a {name} made with IFF_{name} and IFF_NO_PI"));
    }
    if flags & libc::IFF_VNET_HDR == 0 {
        return Ok((0, false));
    }
    let header = header_len(raw)?;
    // From all to none; what a kernel does not know it refuses as a whole.
    let wishes =
        [F_CSUM | F_TSO4 | F_TSO6 | F_USO4 | F_USO6, F_CSUM | F_TSO4 | F_TSO6, F_CSUM | F_TSO4, F_CSUM, 0];
    for w in wishes {
        // SAFETY: the argument is a number.
        if unsafe { libc::ioctl(raw, TUNSETOFFLOAD, w) } == 0 {
            return Ok((header, w & F_USO4 != 0));
        }
    }
    Ok((header, false))
}

fn header_len(raw: i32) -> Result<usize, String> {
    for want in [vnet::LEN, vnet::LEN_MRG] {
        let n = want as libc::c_int;
        // SAFETY: the kernel reads an int.
        if unsafe { libc::ioctl(raw, TUNSETVNETHDRSZ, &raw const n) } == 0 {
            return Ok(want);
        }
    }
    let mut n: libc::c_int = 0;
    // SAFETY: the kernel writes an int.
    sys::check(unsafe { libc::ioctl(raw, TUNGETVNETHDRSZ, &raw mut n) })
        .map_err(|e| reason("the TAP does not tell the length of its headers", e))?;
    usize::try_from(n)
        .ok()
        .filter(|n| [vnet::LEN, vnet::LEN_MRG].contains(n))
        .ok_or_else(|| format!("the TAP has headers of {n} bytes, which nothing here can read"))
}
