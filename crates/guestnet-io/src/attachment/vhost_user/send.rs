//! Theory of operation: frames to the guest. The buffers for a whole frame are gathered first, as checked pieces
//! of memory, and only when they are enough is anything written, so that a frame is there whole or not at all
//! and one that finds no room leaves no trace. With mergeable buffers a frame takes as many as it needs, up to
//! half the queue: a guest that fills up its queue when it is half empty can then always make room. What the
//! guest did not agree to take (large frames, partial checksums) is done in software.

use super::feature;
use super::memory::{Access, CHECKS_MAX};
use super::state::{CHECK_STEPS, Session};
use super::vring::{self, BadChain, Broken, Place};
use crate::attachment::vnet;
use guestnet_core::types::{Csum, FrameMeta};
use guestnet_wire::{be16, ether, gso, proto};

/// Frames shown to the guest at once at most, before the end of the batch.
const PUBLISH_AT: u16 = 64;
/// Descriptors that are looked at for one frame at most.
const STEPS_MAX: u32 = vring::CHAIN_MAX;
/// How often a queue that is filled up drop by drop is looked at for one frame.
const TRIES: usize = 16;

/// What became of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WriteOutcome {
    Yes,
    /// No buffers; the guest kicks when it has put in more.
    Full,
    /// It fits in no buffers of this guest, or is not what it is said to be.
    Refused,
    /// Its buffers are on pages that are not allocated, and no more may be allocated for this guest.
    NotAllocated,
    /// There is no guest, or its driver is not running.
    Unplugged,
}

/// A number by which the frames of a flow, both ways, find the same queue.
pub(super) fn hash(frame: &[u8]) -> u8 {
    let (mut h, l4, p) = match be16(frame, 12) {
        ether::IPV4 => {
            let at = ether::HEADER_LEN;
            let ihl = usize::from(frame.get(at).copied().unwrap_or(0) & 15) * 4;
            let sum = (0..4).map(|i| be16(frame, at + 12 + 2 * i)).fold(0, |a, b| a ^ b);
            let fragment = be16(frame, at + 6) & 0x3fff != 0;
            (sum, at + ihl, if fragment { 0 } else { frame.get(at + 9).copied().unwrap_or(0) })
        }
        ether::IPV6 => {
            let at = ether::HEADER_LEN;
            let sum = (0..16).map(|i| be16(frame, at + 8 + 2 * i)).fold(0, |a, b| a ^ b);
            (sum, at + 40, frame.get(at + 6).copied().unwrap_or(0))
        }
        _ => return 0,
    };
    if p == proto::TCP || p == proto::UDP {
        h ^= be16(frame, l4) ^ be16(frame, l4 + 2);
    }
    (h ^ h >> 8) as u8
}

impl Session {
    pub(super) fn has_room(&mut self) -> bool {
        let pairs = self.pairs();
        // The first queue speaks for all: flows are spread, and a full one says so when it is met.
        pairs == 0 || self.room_of(0)
    }

    /// True when queue `index` has buffers; else the guest is asked to kick.
    fn room_of(&mut self, index: usize) -> bool {
        let Some(q) = self.queues.get_mut(index) else { return true };
        let room = match q.ring.look() {
            Ok(0) => {
                // It may have to be told of what it has before it gives more.
                q.publish();
                q.ring.want_kick()
            }
            Ok(_) => Ok(true),
            Err(e) => Err(e),
        };
        room.unwrap_or_else(|Broken| {
            self.break_queue(index);
            true
        })
    }

    pub(super) fn send(
        &mut self,
        linear: &mut Vec<u8>,
        segmented: &mut u64,
        front: &[u8],
        rest: &[u8],
        mut meta: FrameMeta,
    ) -> WriteOutcome {
        let pairs = self.pairs();
        if pairs == 0 {
            return WriteOutcome::Unplugged;
        }
        let pair = if pairs == 1 {
            0
        } else {
            let to = self.steering.get(usize::from(hash(front))).copied().unwrap_or(0);
            usize::from(to) % pairs
        };
        let index = 2 * pair;
        if meta.csum == Csum::Valid && !self.has(feature::GUEST_CSUM) {
            meta.csum = Csum::Full;
        }
        if self.takes(&meta, front) {
            let sent = if meta.gso.is_some() && !matches!(meta.csum, Csum::Partial { .. }) {
                // Large frames are taken only with a checksum that is begun.
                join(linear, front, rest);
                if vnet::begin_checksum(linear, &mut meta) {
                    self.put(index, &meta, linear, &[])
                } else {
                    return WriteOutcome::Refused;
                }
            } else {
                self.put(index, &meta, front, rest)
            };
            if sent != WriteOutcome::Refused || meta.gso.is_none() {
                return sent;
            }
            // Too large for the buffers of this guest: in smaller ones, then.
        }
        join(linear, front, rest);
        if let Some(gso) = meta.gso {
            *segmented += 1;
            let frames = linear.len() / usize::from(gso_size(gso)).max(1) + 1;
            let half = self.queues.get(index).map_or(0, |q| usize::from(q.ring.size() / 2));
            // More than half of a queue is never waited for: it may stay as it is.
            if frames <= half && !self.waits_for(index, frames) {
                return WriteOutcome::Full;
            }
            let mut last = WriteOutcome::Yes;
            let whole = std::mem::take(linear);
            let done = gso::segment(&whole, gso, |header, piece| {
                if self.put(index, &FrameMeta::default(), header, piece) != WriteOutcome::Yes {
                    last = WriteOutcome::Refused;
                }
            });
            *linear = whole;
            return if done.is_err() { WriteOutcome::Refused } else { last };
        }
        if let Csum::Partial { start, offset } = meta.csum
            && gso::complete_checksum(linear, start, offset).is_err()
        {
            return WriteOutcome::Refused;
        }
        self.put(index, &FrameMeta::default(), linear, &[])
    }

    /// True when a queue has `frames` buffers, or will not wait for them; else the guest was asked to kick.
    fn waits_for(&mut self, index: usize, frames: usize) -> bool {
        let Some(q) = self.queues.get_mut(index) else { return true };
        for _ in 0..TRIES {
            match q.ring.look() {
                Ok(n) if usize::from(n) >= frames => return true,
                Ok(_) => {}
                Err(Broken) => break,
            }
            q.publish();
            if q.ring.want_kick() == Ok(false) {
                return false;
            }
        }
        true
    }

    /// Writes one frame to buffers of a queue.
    fn put(&mut self, index: usize, meta: &FrameMeta, front: &[u8], rest: &[u8]) -> WriteOutcome {
        let Some(mut header) = vnet::emit(meta, front) else { return WriteOutcome::Refused };
        let total = self.header + front.len() + rest.len();
        let mut gathered = Ok(Gathered::TooSmall);
        for _ in 0..TRIES {
            let Some(place) = self.queues.get(index).map(|q| q.ring.at) else { return WriteOutcome::Refused };
            if self.steps_to_guest == 0 {
                return WriteOutcome::Refused;
            }
            gathered = self.gather(index, total);
            if matches!(gathered, Ok(Gathered::Enough | Gathered::NotAllocated) | Err(Broken)) {
                break;
            }
            self.undo(index, place);
            if gathered == Ok(Gathered::TooSmall) {
                break;
            }
            let Some(q) = self.queues.get_mut(index) else { return WriteOutcome::Refused };
            q.publish();
            match q.ring.want_kick() {
                Ok(false) => return WriteOutcome::Full,
                // More came this moment, and nobody may kick for it.
                Ok(true) => {}
                Err(Broken) => gathered = Err(Broken),
            }
        }
        match gathered {
            Ok(Gathered::Enough) => {}
            Ok(Gathered::Few | Gathered::TooSmall) => return WriteOutcome::Refused,
            Ok(Gathered::NotAllocated) => return self.return_unused(index),
            Err(Broken) => {
                self.break_queue(index);
                return WriteOutcome::Refused;
            }
        }
        let count = self.heads.len() as u16;
        if let Some(field) = header.get_mut(vnet::LEN..) {
            field.copy_from_slice(&count.to_le_bytes());
        }
        let header = header.get(..self.header).unwrap_or(&header);
        let mut parts = [header, front, rest].into_iter();
        let mut part: &[u8] = &[];
        for piece in &mut self.pieces {
            while piece.len() > 0 {
                if part.is_empty() {
                    match parts.next() {
                        Some(p) => part = p,
                        None => break,
                    }
                    continue;
                }
                let to = piece.split(part.len());
                let (now, later) = part.split_at(to.len());
                // SAFETY: gathered just now from the memory that is still there.
                #[allow(unsafe_code)]
                unsafe {
                    to.write(now)
                };
                part = later;
            }
        }
        let Some(q) = self.queues.get_mut(index) else { return WriteOutcome::Refused };
        let mut left = total as u32;
        for (head, len) in &self.heads {
            let written = left.min(*len);
            q.ring.give_back(*head, written);
            left -= written;
        }
        if q.ring.unpublished() >= PUBLISH_AT.min(q.ring.size() / 2).max(1) {
            q.publish();
        }
        WriteOutcome::Yes
    }

    /// Gives the buffers that were gathered back with nothing in them, so that the guest puts others in.
    fn return_unused(&mut self, index: usize) -> WriteOutcome {
        if let Some(q) = self.queues.get_mut(index) {
            for (head, _) in &self.heads {
                q.ring.give_back(*head, 0);
            }
        }
        self.not_allocated.get_or_insert(true);
        WriteOutcome::NotAllocated
    }

    fn undo(&mut self, index: usize, place: Place) {
        if let Some(q) = self.queues.get_mut(index) {
            q.ring.at = place;
        }
    }

    /// Takes buffers for `total` bytes; their pieces are in `self.pieces`, their heads in `self.heads`.
    fn gather(&mut self, index: usize, total: usize) -> Result<Gathered, Broken> {
        let mergeable = self.has(feature::MRG_RXBUF);
        let Session { queues, memory, pieces, heads, steps_to_guest, .. } = self;
        let Some(q) = queues.get_mut(index) else { return Ok(Gathered::Few) };
        pieces.clear();
        heads.clear();
        memory.allow_checks(CHECKS_MAX);
        let most = if mergeable { usize::from(q.ring.size() / 2).max(1) } else { 1 };
        let (mut have, mut steps) = (0, STEPS_MAX);
        let mut result = Ok(Gathered::Enough);
        while have < total {
            if heads.len() == most {
                result = Ok(Gathered::TooSmall);
                break;
            }
            let Some(head) = q.ring.pop()? else {
                result = Ok(Gathered::Few);
                break;
            };
            let mut room = 0u32;
            let walked = q.ring.walk(memory, head, true, &mut steps, |memory, at, len| {
                room = room.saturating_add(len as u32);
                let wanted = len.min(total - have);
                memory.pieces(at, wanted, Access::Write, |piece| pieces.push(piece))?;
                have += wanted;
                Ok(have < total)
            });
            heads.push((head, room));
            match walked {
                Ok(()) => {}
                Err(BadChain::NotAllocated) => {
                    result = Ok(Gathered::NotAllocated);
                    break;
                }
                // A guest that offers what is not memory gets nothing more: there is no telling what it expects.
                Err(BadChain::Malformed) => {
                    result = Err(Broken);
                    break;
                }
            }
        }
        let checks = CHECKS_MAX - memory.checks_left();
        *steps_to_guest = steps_to_guest.saturating_sub(STEPS_MAX - steps + CHECK_STEPS * checks);
        result
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gathered {
    Enough,
    /// The guest has put in too few by now.
    Few,
    /// It would take more than the queue will ever have.
    TooSmall,
    /// A buffer is on pages that may not be allocated.
    NotAllocated,
}

fn gso_size(gso: guestnet_core::types::Gso) -> u16 {
    match gso {
        guestnet_core::types::Gso::Tcp(n) | guestnet_core::types::Gso::Udp(n) => n,
    }
}

fn join(linear: &mut Vec<u8>, front: &[u8], rest: &[u8]) {
    linear.clear();
    linear.extend_from_slice(front);
    linear.extend_from_slice(rest);
}
