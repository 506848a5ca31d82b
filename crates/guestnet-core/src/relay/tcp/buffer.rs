//! Theory of operation: what the guest sent and the socket has not taken. In order: a byte queue. Ahead of
//! order: a few pieces, sorted by sequence number and never overlapping, and where the FIN is. The buffer
//! exists only while there is something in it, or while bytes in order are held back ([`Hold`]). All memory it holds is
//! charged to the endpoint's [`Budget`], by capacity and not by fill, so that a guest of many small pieces pays for what
//! it costs.

use crate::relay::tcp::seq::Seq;
use crate::relay::tcp::{Budget, FLOW_BUFFER};
use crate::util::account::{charge, release};
use guestnet_wire::tcp::SackBlocks;
use std::collections::VecDeque;

/// Bytes in order at most: the window, and a little for its rounding.
const QUEUE_MAX: usize = FLOW_BUFFER as usize + 4096;
/// Pieces ahead of order at most.
const PIECES_MAX: usize = 256;
/// Neighbouring pieces are joined up to this size.
const PIECE_JOIN: usize = 65536;
/// What a piece costs besides its bytes.
const PIECE_COST: usize = 64;
/// Runs of pieces that are remembered as the latest, for SACK blocks.
const LATEST: usize = 4;
/// The smallest allocation of the queue.
const QUEUE_MIN: usize = 2048;

/// Bytes in order that are held back at most, as far as the window promises.
const HELD_MAX: usize = 1 << 16;
/// So many held bytes fill the window of a connection that is being opened, which is not scaled.
pub(super) const HELD_FULL: usize = u16::MAX as usize;

/// Bytes in order are held back until somebody has looked at them and lets them pass.
#[derive(Debug, Default)]
pub(super) struct Hold {
    /// Bytes at the front of the queue that may go to the socket.
    pub released: usize,
    /// Bytes at the front of the queue that were looked at.
    pub seen: usize,
    /// The end of the guest's bytes was looked at.
    pub end_seen: bool,
    /// The end may not go to the socket.
    pub holds_end: bool,
    /// Nothing is read from the socket either.
    pub both_ways: bool,
    /// The socket has hung up meanwhile.
    pub hangup: bool,
    /// Some bytes were let pass.
    pub passed: bool,
    /// Whether the peer's next bytes are looked at.
    pub answer: Answer,
    /// The guest gets these last words when the peer has said all that it had to say.
    pub words: Option<Box<[u8]>>,
}

/// The first bytes of what the peer says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Answer {
    /// Nobody asks.
    #[default]
    Unasked,
    /// They are not there yet.
    Awaited,
    /// They are those that were asked for, or others.
    Known(bool),
}

#[derive(Debug)]
struct Piece {
    seq: Seq,
    data: Vec<u8>,
}

impl Piece {
    fn end(&self) -> Seq {
        self.seq.plus(self.data.len() as u32)
    }
}

#[derive(Debug, Default)]
pub(super) struct Buffer {
    queue: VecDeque<u8>,
    pieces: Vec<Piece>,
    /// Places in the runs of pieces that grew last, the latest first. Some may be in order by now.
    latest: [Option<Seq>; LATEST],
    fin: Option<Seq>,
    charged: usize,
    /// Bytes in order are held back.
    pub hold: Option<Hold>,
}

impl Buffer {
    /// Bytes in order that wait for the socket.
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Bytes in order may go to the socket without waiting here.
    pub fn is_direct(&self) -> bool {
        self.queue.is_empty() && self.hold.is_none()
    }

    /// Bytes in order that are held back.
    pub fn held(&self) -> usize {
        self.hold.as_ref().map_or(0, |h| self.queue.len().saturating_sub(h.released))
    }

    /// Bytes in order that nobody has looked at.
    pub fn unseen(&self) -> [&[u8]; 2] {
        self.from(self.hold.as_ref().map_or(usize::MAX, |h| h.seen))
    }

    /// Bytes in order behind the first `from`.
    pub fn from(&self, from: usize) -> [&[u8]; 2] {
        let (front, back) = self.queue.as_slices();
        let in_back = from.saturating_sub(front.len());
        [front.get(from..).unwrap_or(&[]), back.get(in_back..).unwrap_or(&[])]
    }

    /// Bytes in order that may be promised, of `window` in all, when `free` of the budget is left.
    pub fn room(&self, window: usize, free: usize) -> usize {
        let left = window.saturating_sub(self.queue.len()).min(free.saturating_add(self.spare()));
        if self.hold.is_some() { left.min(HELD_MAX.saturating_sub(self.held())) } else { left }
    }

    /// Bytes in order that the queue takes.
    fn most(&self) -> usize {
        let left = QUEUE_MAX.saturating_sub(self.queue.len());
        let slack = HELD_MAX.saturating_add(4096);
        if self.hold.is_some() { left.min(slack.saturating_sub(self.held())) } else { left }
    }

    /// Bytes that fit without a new allocation.
    pub fn spare(&self) -> usize {
        self.queue.capacity().saturating_sub(self.queue.len())
    }

    /// Bytes in order that can be taken before the bound or the budget (`free` of it left) ends it.
    pub fn limit_left(&self, free: usize) -> usize {
        self.most().min(free.saturating_add(self.spare()))
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.pieces.is_empty() && self.fin.is_none() && self.hold.is_none()
    }

    /// The first run of waiting bytes that may go to the socket.
    pub fn front(&self) -> &[u8] {
        let front = self.queue.as_slices().0;
        match &self.hold {
            Some(h) => front.get(..h.released.min(front.len())).unwrap_or(&[]),
            None => front,
        }
    }

    /// The socket took the first `n` bytes.
    pub fn consume(&mut self, n: usize) {
        self.queue.drain(..n.min(self.queue.len()));
        if let Some(h) = &mut self.hold {
            (h.released, h.seen) = (h.released.saturating_sub(n), h.seen.saturating_sub(n));
        }
    }

    /// Queues as much of `data` as bounds and budget allow; returns how much.
    pub fn append(&mut self, data: &[u8], budget: &mut Budget) -> usize {
        let (len, cap) = (self.queue.len(), self.queue.capacity());
        let mut n = data.len().min(self.most());
        if len.saturating_add(n) > cap {
            let most = cap.saturating_add(budget.free());
            n = n.min(most.saturating_sub(len));
            let least = len.saturating_add(n);
            let want = least.max(cap.saturating_mul(2)).clamp(QUEUE_MIN, QUEUE_MAX);
            let target = want.min(most).max(least);
            self.queue.reserve_exact(target.saturating_sub(len));
        }
        self.queue.extend(data.get(..n).unwrap_or(&[]));
        self.settle(budget);
        n
    }

    /// Keeps a piece that came ahead of order. False when any of it found no room.
    pub fn insert(&mut self, mut seq: Seq, mut data: &[u8], budget: &mut Budget) -> bool {
        let first = seq;
        let mut i = 0;
        while !data.is_empty() {
            while self.pieces.get(i).is_some_and(|p| p.end().le(seq)) {
                i = i.saturating_add(1);
            }
            let n = match self.pieces.get(i) {
                Some(p) if p.seq.le(seq) => {
                    let have = (p.end().since(seq) as usize).min(data.len());
                    seq = seq.plus(have as u32);
                    data = &data[have..];
                    continue;
                }
                Some(p) => data.len().min(p.seq.since(seq) as usize),
                None => data.len(),
            };
            let (now, later) = data.split_at(n);
            if !self.store(i, seq, now, budget) {
                self.remember(first);
                return false;
            }
            seq = seq.plus(n as u32);
            data = later;
        }
        self.remember(first);
        true
    }

    /// The run that holds `seq` is the latest.
    fn remember(&mut self, seq: Seq) {
        let Some((from, to)) = self.run_at(seq) else { return };
        let other = |s: &Option<Seq>| s.is_some_and(|s| s.lt(from) || to.le(s));
        let mut latest = [None; LATEST];
        let others = self.latest.iter().filter(|s| other(s));
        for (place, run) in latest.iter_mut().zip([&Some(from)].into_iter().chain(others)) {
            *place = *run;
        }
        self.latest = latest;
    }

    /// The run of neighbouring pieces that holds the byte at `at`.
    fn run_at(&self, at: Seq) -> Option<(Seq, Seq)> {
        let i = self.pieces.partition_point(|p| p.end().le(at));
        let p = self.pieces.get(i).filter(|p| p.seq.le(at))?;
        let (mut from, mut to) = (p.seq, p.end());
        for p in self.pieces.get(..i).unwrap_or(&[]).iter().rev() {
            if p.end() != from {
                break;
            }
            from = p.seq;
        }
        for p in self.pieces.get(i.saturating_add(1)..).unwrap_or(&[]) {
            if p.seq != to {
                break;
            }
            to = p.end();
        }
        Some((from, to))
    }

    /// The run that holds all of `from..to`, if there is one.
    pub fn holds(&self, from: Seq, to: Seq) -> bool {
        self.run_at(from).is_some_and(|run| to.le(run.1))
    }

    /// Adds the runs ahead of order to `blocks`, the latest first, until there are `most` blocks.
    pub fn report(&self, blocks: &mut SackBlocks, most: usize) {
        let runs = self.latest.iter().flatten().filter_map(|at| self.run_at(*at));
        for (from, to) in runs.take(most.saturating_sub(blocks.as_slice().len())) {
            blocks.push(from.0, to.0);
        }
    }

    /// Stores a piece that overlaps no other before index `i`, joined to its neighbour where it can be.
    fn store(&mut self, i: usize, seq: Seq, data: &[u8], budget: &mut Budget) -> bool {
        let before = i.checked_sub(1).and_then(|j| self.pieces.get_mut(j));
        let joined = |p: &Piece| p.data.len().saturating_add(data.len());
        if let Some(p) = before.filter(|p| p.end() == seq && joined(p) <= PIECE_JOIN) {
            let (len, cap) = (p.data.len(), p.data.capacity());
            if joined(p) > cap {
                let target = joined(p).max(cap.saturating_mul(2).min(PIECE_JOIN));
                if target.saturating_sub(cap) > budget.free() {
                    return false;
                }
                p.data.reserve_exact(target.saturating_sub(len));
            }
            p.data.extend_from_slice(data);
        } else {
            if self.pieces.len() >= PIECES_MAX || data.len().saturating_add(PIECE_COST) > budget.free() {
                return false;
            }
            self.pieces.insert(i, Piece { seq, data: data.to_vec() });
        }
        self.settle(budget);
        true
    }

    /// Takes the piece that starts at or before `at` out, with the number of its bytes that lie before.
    pub fn take(&mut self, at: Seq) -> Option<(Vec<u8>, usize)> {
        let first = self.pieces.first()?;
        if at.lt(first.seq) {
            return None;
        }
        let piece = self.pieces.remove(0);
        let skip = (at.since(piece.seq) as usize).min(piece.data.len());
        Some((piece.data, skip))
    }

    /// Remembers where a FIN is that came ahead of order.
    pub fn set_fin(&mut self, at: Seq) {
        self.fin = Some(at);
    }

    /// Where it is.
    pub fn fin(&self) -> Option<Seq> {
        self.fin
    }

    /// Forgets all that is ahead of order.
    pub fn clear_ahead(&mut self) {
        self.pieces = Vec::new();
        self.latest = [None; LATEST];
        self.fin = None;
    }

    /// Forgets what is held back; what was let pass still waits for the socket.
    pub fn forget_held(&mut self) {
        self.clear_ahead();
        if let Some(h) = &mut self.hold {
            self.queue.truncate(h.released);
            h.seen = h.released;
        }
    }

    pub fn clear(&mut self) {
        self.clear_ahead();
        self.hold = None;
        self.queue = VecDeque::new();
    }

    /// Charges what is held now to the budget.
    pub fn settle(&mut self, budget: &mut Budget) {
        if self.queue.is_empty() && self.queue.capacity() > 0 {
            self.queue = VecDeque::new();
        }
        let pieces: usize = self.pieces.iter().map(|p| p.data.capacity().saturating_add(PIECE_COST)).sum();
        let now = self.queue.capacity().saturating_add(pieces);
        charge(&mut budget.used, now);
        release(&mut budget.used, self.charged);
        self.charged = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn byte(at: u32) -> u8 {
        (at % 251) as u8
    }

    proptest! {
        /// Pieces in any order and overlap give back exactly the stream, and the budget returns to nothing.
        #[test]
        fn pieces_make_the_stream(cuts in proptest::collection::vec((0u32..3000, 1u32..700), 1..60), base: u32) {
            let mut budget = Budget { used: 0, limit: 1 << 20 };
            let mut b = Buffer::default();
            let mut have = vec![false; 4000];
            for (from, len) in cuts {
                let data: Vec<u8> = (from..from + len).map(byte).collect();
                prop_assert!(b.insert(Seq(base).plus(from), &data, &mut budget));
                for h in &mut have[from as usize..(from + len) as usize] {
                    *h = true;
                }
            }
            let mut at = 0u32;
            loop {
                while let Some((data, skip)) = b.take(Seq(base).plus(at)) {
                    for &d in &data[skip..] {
                        prop_assert_eq!(d, byte(at));
                        prop_assert!(have[at as usize]);
                        at += 1;
                    }
                }
                if at as usize >= have.len() {
                    break;
                }
                prop_assert!(!have[at as usize], "byte {} was lost", at);
                at += 1;
            }
            b.settle(&mut budget);
            prop_assert_eq!(budget.used, 0);
        }

        /// Neither queue nor pieces ever take more than the budget has.
        #[test]
        fn budget_is_kept(ops in proptest::collection::vec((any::<bool>(), 0u32..100_000, 0usize..5000), 1..80), limit in 0usize..100_000) {
            let mut budget = Budget { used: 0, limit };
            let mut b = Buffer::default();
            for (queue, at, len) in ops {
                let data = vec![7; len];
                if queue { b.append(&data, &mut budget); } else { b.insert(Seq(at), &data, &mut budget); }
                prop_assert!(budget.used <= limit);
            }
            b.clear();
            b.settle(&mut budget);
            prop_assert_eq!(budget.used, 0);
        }
    }
}
