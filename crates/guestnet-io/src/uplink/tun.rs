//! Theory of operation: a TUN device as the uplink: one packet per read and write, with virtio headers where it
//! was made with them, so that what the host's stack leaves unsummed and uncut comes in whole, and what a
//! guest leaves so goes out whole. The core handles packets behind an Ethernet header; here it is left out on
//! the way out, and room is left for it on the way in, and offsets are moved accordingly.

// readv takes raw pointers.
#![allow(unsafe_code)]

use crate::attachment::tap::{Kind, WriteOutcome, agree, lost};
use crate::attachment::{ReadOutcome, reason, vnet};
use crate::os::sys;
use guestnet_core::types::{Csum, FrameMeta, Gso};
use guestnet_wire::{ether, gso};
use std::os::fd::{AsRawFd, OwnedFd};

const ROOM: usize = ether::HEADER_LEN;
const NEEDS_CSUM: u8 = 1;

/// A TUN.
pub(crate) struct Tun {
    pub fd: OwnedFd,
    /// Length of the virtio header, 0 for none.
    header: usize,
    /// The kernel knows UDP segmentation (6.2).
    uso: bool,
    /// A packet whose checksum has to be completed.
    whole: Vec<u8>,
}

impl Tun {
    /// Takes a TUN and agrees with the kernel on headers and offloads.
    pub(crate) fn new(fd: OwnedFd) -> Result<Tun, String> {
        let (header, uso) = agree(&fd, Kind::Tun)?;
        Ok(Tun { fd, header, uso, whole: Vec::new() })
    }

    /// Reads a packet to `buf`, behind room for an Ethernet header: where it ends and what is known of it.
    pub(crate) fn read(&self, buf: &mut [u8]) -> ReadOutcome<(usize, FrameMeta)> {
        let mut head = [0u8; vnet::LEN_MRG];
        let Some(packet) = buf.get_mut(ROOM..) else { return ReadOutcome::Bad };
        let iov = [
            libc::iovec { iov_base: head.as_mut_ptr().cast(), iov_len: self.header.min(head.len()) },
            libc::iovec { iov_base: packet.as_mut_ptr().cast(), iov_len: packet.len() },
        ];
        // SAFETY: both entries describe live, writable slices.
        let n = match sys::check_len(unsafe { libc::readv(self.fd.as_raw_fd(), iov.as_ptr(), 2) }) {
            Ok(n) => n,
            Err(e) if sys::would_block(e) => return ReadOutcome::Empty,
            // The interface is down; it may come up.
            Err(libc::EIO) => return ReadOutcome::Empty,
            Err(e) => return ReadOutcome::Down(reason("the TUN device is gone", e)),
        };
        let Some(end) = n.checked_sub(self.header).map(|len| ROOM + len) else { return ReadOutcome::Bad };
        let (Some(header), Some(frame)) = (head.get_mut(..self.header), buf.get(..end)) else {
            return ReadOutcome::Bad;
        };
        if header.is_empty() {
            return ReadOutcome::Frame((end, FrameMeta::default()));
        }
        shift(header, |n| n.checked_add(ROOM as u16));
        match vnet::parse(header, frame) {
            Ok(meta) => ReadOutcome::Frame((end, meta)),
            Err(vnet::BadHeader) => ReadOutcome::Bad,
        }
    }

    /// Writes a packet that follows room for an Ethernet header; what the device cannot cut or sum is cut and
    /// summed here.
    pub(crate) fn write(&mut self, frame: &[u8], meta: FrameMeta) -> WriteOutcome {
        let begun = matches!(meta.csum, Csum::Partial { .. });
        match meta.gso {
            Some(gso) if self.header == 0 || !begun || (matches!(gso, Gso::Udp(_)) && !self.uso) => {
                let mut last = WriteOutcome::Yes;
                let done = gso::segment(frame, gso, |header, piece| {
                    let sent = self.put(&FrameMeta::default(), header, piece);
                    if sent != WriteOutcome::Yes {
                        last = sent;
                    }
                });
                if done.is_err() { WriteOutcome::Refused } else { last }
            }
            None if self.header == 0 && begun => {
                let Csum::Partial { start, offset } = meta.csum else { return WriteOutcome::Refused };
                let mut whole = std::mem::take(&mut self.whole);
                whole.clear();
                whole.extend_from_slice(frame);
                let sent = match gso::complete_checksum(&mut whole, start, offset) {
                    Ok(()) => self.put(&FrameMeta::default(), &whole, &[]),
                    Err(_) => WriteOutcome::Refused,
                };
                self.whole = whole;
                sent
            }
            _ => self.put(&meta, frame, &[]),
        }
    }

    fn put(&self, meta: &FrameMeta, front: &[u8], rest: &[u8]) -> WriteOutcome {
        let Some(packet) = front.get(ROOM..) else { return WriteOutcome::Refused };
        let sent = if self.header == 0 {
            sys::writev(&self.fd, &[packet, rest])
        } else {
            let Some(mut h) = vnet::emit(meta, front) else { return WriteOutcome::Refused };
            let h = h.get_mut(..self.header).unwrap_or(&mut []);
            shift(h, |n| n.checked_sub(ROOM as u16));
            sys::writev(&self.fd, &[h, packet, rest])
        };
        match sent {
            Ok(_) => WriteOutcome::Yes,
            Err(e) => lost("the TUN device is gone", e),
        }
    }
}

/// Moves the offsets of a virtio header: the length of all headers, and where the checksum starts.
fn shift(header: &mut [u8], by: impl Fn(u16) -> Option<u16>) {
    let needs = header.first().is_some_and(|f| f & NEEDS_CSUM != 0);
    for (at, used) in [(2, header.get(1).is_some_and(|k| *k != 0)), (6, needs)] {
        if let Some(field) = header.get_mut(at..at + 2).filter(|_| used)
            && let Ok(old) = <[u8; 2]>::try_from(&*field)
        {
            // What cannot be moved is wrong, and is found so: 0 lies in front of every transport header.
            field.copy_from_slice(&by(u16::from_le_bytes(old)).unwrap_or(0).to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_move_where_they_mean_something() {
        let mut h = [1, 1, 40, 0, 0, 0, 20, 0, 16, 0];
        shift(&mut h, |n| n.checked_add(14));
        assert_eq!(h, [1, 1, 54, 0, 0, 0, 34, 0, 16, 0]);
        shift(&mut h, |n| n.checked_sub(14));
        assert_eq!(h, [1, 1, 40, 0, 0, 0, 20, 0, 16, 0]);
        let mut none = [0, 0, 9, 0, 0, 0, 9, 0, 9, 0];
        shift(&mut none, |n| n.checked_add(14));
        assert_eq!(none, [0, 0, 9, 0, 0, 0, 9, 0, 9, 0]);
        let mut far = [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0];
        shift(&mut far, |n| n.checked_add(14));
        assert_eq!(far[6..8], [0, 0]);
    }
}
