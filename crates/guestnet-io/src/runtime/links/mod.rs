//! Theory of operation: how workers of one Network reach each other. Between each two there is a ring each way of
//! frames and updates. A frame is copied once, into a buffer of the sender's pool, whose index travels; the receiver
//! sends it on from there and frees it. A ring takes frames up to a part of its length and drops what is more
//! (counted by the core), so that there is always room for some updates; updates that found none wait with the sender,
//! who takes no commands and no guests meanwhile. All of that is bounded, and nobody waits for anybody.

pub mod wake_flag;

use crate::attachment::FRAME_MAX;
use crate::control::command::{Command, CommandSender, Waker};
use crate::memory::pool::PacketPool;
use crate::memory::ring::{Consumer, Producer, Ring};
use crate::runtime::links::wake_flag::WakeFlag;
use guestnet_core::effects::TxError;
use guestnet_core::shard::PeerUpdate;
use guestnet_core::types::{FrameMeta, PortId};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Items of a ring.
const RING: usize = 1024;
/// Of which frames may be this many.
const FRAMES: usize = 256;
/// Buffers of one worker's pool at most. They take memory only once they were used.
const BUFFERS_MAX: usize = 2048;
/// What is in a ring.
#[derive(Clone, Copy)]
pub(crate) enum Item {
    /// A frame for a port, or for all, in a buffer of the sender's pool.
    Frame { port: Option<PortId>, buffer: u32, meta: FrameMeta },
    /// What the other core learned.
    PeerUpdate(PeerUpdate),
}

struct Outgoing {
    ring: Producer<Item>,
    delayed: VecDeque<PeerUpdate>,
    wake_flag: Arc<WakeFlag>,
    waker: Arc<Waker>,
    commands: Arc<CommandSender>,
    /// Something was put in since it was last rung for.
    dirty: bool,
}

struct Incoming {
    ring: Consumer<Item>,
    pool: Arc<PacketPool>,
}

/// The other workers, as one of them has them. Its own place is empty.
pub(crate) struct ShardLinks {
    me: usize,
    out: Vec<Option<Outgoing>>,
    inn: Vec<Option<Incoming>>,
    pool: Arc<PacketPool>,
    /// Frames that may be under way to one of them.
    frames: usize,
    wake_flag: Arc<WakeFlag>,
    loads: Arc<[AtomicU32]>,
    updates: Vec<PeerUpdate>,
}

/// What each worker brings.
pub(crate) struct WorkerHandle {
    pub waker: Arc<Waker>,
    pub commands: Arc<CommandSender>,
}

/// Joins workers to each other. `None`: the system has no memory for it.
pub(crate) fn join(handles: &[WorkerHandle], loads: &Arc<[AtomicU32]>) -> Option<Vec<ShardLinks>> {
    let n = handles.len();
    let buffers = (FRAMES * (n - 1)).min(BUFFERS_MAX);
    let mut all = Vec::new();
    for me in 0..n {
        all.push(ShardLinks {
            me,
            out: Vec::new(),
            inn: Vec::new(),
            pool: Arc::new(PacketPool::with_buffer_size(buffers, FRAME_MAX).ok()?),
            frames: buffers / (n - 1),
            wake_flag: Arc::default(),
            loads: Arc::clone(loads),
            updates: Vec::new(),
        });
    }
    for from in 0..n {
        for (to, handle) in handles.iter().enumerate() {
            if from == to {
                all[from].out.push(None);
                all[to].inn.push(None);
                continue;
            }
            let (producer, consumer) = Ring::new(RING).ok()?.split();
            let out = Outgoing {
                ring: producer,
                delayed: VecDeque::new(),
                wake_flag: Arc::clone(&all[to].wake_flag),
                waker: Arc::clone(&handle.waker),
                commands: Arc::clone(&handle.commands),
                dirty: false,
            };
            let pool = Arc::clone(&all[from].pool);
            all[from].out.push(Some(out));
            all[to].inn.push(Some(Incoming { ring: consumer, pool }));
        }
    }
    Some(all)
}

impl ShardLinks {
    pub(crate) fn me(&self) -> usize {
        self.me
    }

    pub(crate) fn count(&self) -> usize {
        self.inn.len()
    }

    /// Sends a frame to a port of another worker, or to all of them.
    pub(crate) fn send(
        &mut self,
        worker: u16,
        port: Option<PortId>,
        frame: &[u8],
        meta: FrameMeta,
    ) -> Result<(), TxError> {
        let out = self.out.get_mut(usize::from(worker)).and_then(Option::as_mut).ok_or(TxError::Gone)?;
        if out.ring.len() >= self.frames {
            return Err(TxError::Full);
        }
        let buffer = self.pool.alloc().ok_or(TxError::Full)?;
        let filled = self.pool.borrow(buffer).and_then(|mut b| b.fill(frame));
        if filled.is_err() || out.ring.enqueue(Item::Frame { port, buffer, meta }).is_err() {
            // It was ours, so it can be freed.
            let _freed = self.pool.free(buffer);
            return Err(TxError::Full);
        }
        out.dirty = true;
        Ok(())
    }

    /// Room for updates that may be refused, as much as there is in the fullest ring.
    pub(crate) fn room(&self) -> usize {
        let of = |o: &Outgoing| {
            let used = o.ring.len().max(FRAMES) + o.delayed.len();
            o.ring.capacity().saturating_sub(used) / 2
        };
        self.out.iter().flatten().map(of).min().unwrap_or(0)
    }

    /// Tells all others, in order.
    pub(crate) fn tell(&mut self, take: impl FnOnce(usize, &mut Vec<PeerUpdate>)) {
        let mut updates = std::mem::take(&mut self.updates);
        take(self.room(), &mut updates);
        for out in self.out.iter_mut().flatten() {
            out.delayed.extend(&updates);
            while let Some(next) = out.delayed.front() {
                if out.ring.enqueue(Item::PeerUpdate(*next)).is_err() {
                    break;
                }
                out.delayed.pop_front();
                out.dirty = true;
            }
        }
        updates.clear();
        self.updates = updates;
    }

    /// Updates wait because a ring was full.
    pub(crate) fn is_behind(&self) -> bool {
        self.out.iter().flatten().any(|o| !o.delayed.is_empty())
    }

    /// Wakes those who sleep over what was put in their rings.
    pub(crate) fn wake_sleepers(&mut self) {
        for out in self.out.iter_mut().flatten() {
            if std::mem::take(&mut out.dirty) && out.wake_flag.needs_wake() {
                out.waker.wake();
            }
        }
    }

    /// Something waits in a ring to this worker.
    pub(crate) fn has_items(&self) -> bool {
        self.inn.iter().flatten().any(|i| !i.ring.is_empty())
    }

    /// Says that this worker is about to sleep. False: it cannot, something came.
    pub(crate) fn fall_asleep(&self) -> bool {
        self.wake_flag.fall_asleep();
        let sleeps = !self.has_items();
        if !sleeps {
            self.wake_flag.wake_up();
        }
        sleeps
    }

    pub(crate) fn wake_up(&self) {
        self.wake_flag.wake_up();
    }

    /// Takes the oldest items of a worker.
    pub(crate) fn take(&mut self, from: usize, items: &mut [Item]) -> usize {
        self.inn.get_mut(from).and_then(Option::as_mut).map_or(0, |i| i.ring.dequeue_batch(items))
    }

    pub(crate) fn pool_of(&self, from: usize) -> Option<Arc<PacketPool>> {
        self.inn.get(from)?.as_ref().map(|i| Arc::clone(&i.pool))
    }

    /// The worker with the fewest guests, which gets one more.
    pub(crate) fn choose(&self) -> usize {
        choose(&self.loads)
    }

    /// A worker has one more guest.
    pub(crate) fn load(&self, worker: usize) {
        if let Some(n) = self.loads.get(worker) {
            n.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A guest is gone from a worker, or did not come to it after all.
    pub(crate) fn unload(&self, worker: usize) {
        unload(&self.loads, worker);
    }

    /// Gives another worker something to do.
    pub(crate) fn command(&self, worker: usize, command: Command) -> bool {
        let Some(Some(out)) = self.out.get(worker) else { return false };
        let sent = out.commands.send_from_worker(command).is_ok();
        if sent {
            out.waker.wake();
        }
        sent
    }
}

/// The place with the smallest number, which is one more then.
pub(crate) fn choose(loads: &[AtomicU32]) -> usize {
    let least = loads.iter().enumerate().min_by_key(|(_, n)| n.load(Ordering::Relaxed));
    let Some((at, n)) = least else { return 0 };
    n.fetch_add(1, Ordering::Relaxed);
    at
}

pub(crate) fn unload(loads: &[AtomicU32], at: usize) {
    if let Some(n) = loads.get(at) {
        let _was = n.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three() -> Vec<ShardLinks> {
        let handle = |_| WorkerHandle {
            waker: Arc::new(Waker::new().unwrap()),
            commands: Arc::new(crate::control::command::channel(16).0),
        };
        let handles: Vec<WorkerHandle> = (0..3).map(handle).collect();
        join(&handles, &(0..3).map(|_| AtomicU32::new(0)).collect()).unwrap()
    }

    fn take_all(p: &mut ShardLinks, from: usize) -> Vec<Item> {
        let mut items = [Item::PeerUpdate(PeerUpdate::PortDown { port: PortId(0) }); 100];
        let mut all = Vec::new();
        loop {
            let n = p.take(from, &mut items);
            all.extend_from_slice(&items[..n]);
            if n == 0 {
                return all;
            }
        }
    }

    #[test]
    fn a_ring_that_is_full_of_frames_refuses_more_and_leaves_the_others_room() {
        let mut all = three();
        let meta = FrameMeta::default();
        for round in 0..3u32 {
            let mut sent = 0u32;
            while all[0].send(1, Some(PortId(9)), &(round + sent).to_be_bytes(), meta).is_ok() {
                sent += 1;
            }
            assert_eq!(sent as usize, FRAMES);
            assert_eq!(all[0].send(2, None, b"x", meta), Ok(()));
            let items = take_all(&mut all[1], 0);
            let pool = all[1].pool_of(0).unwrap();
            for (i, item) in items.iter().enumerate() {
                let Item::Frame { port: Some(PortId(9)), buffer, .. } = *item else { panic!() };
                assert_eq!(*pool.borrow(buffer).unwrap(), (round + i as u32).to_be_bytes());
                pool.free(buffer).unwrap();
            }
            assert_eq!(items.len(), FRAMES);
            let Item::Frame { port: None, buffer, .. } = take_all(&mut all[2], 0)[0] else { panic!() };
            pool.free(buffer).unwrap();
            assert_eq!(pool.available(), pool.capacity());
        }
        assert_eq!(all[0].send(0, None, b"to itself", meta), Err(TxError::Gone));
        assert_eq!(all[0].send(9, None, b"to nobody", meta), Err(TxError::Gone));
        // Too long for a buffer: refused, and no buffer is lost.
        assert_eq!(all[0].send(1, None, &vec![0; FRAME_MAX + 1], meta), Err(TxError::Full));
        assert_eq!(all[0].pool.available(), all[0].pool.capacity());
    }

    #[test]
    fn news_wait_for_room_and_come_in_order() {
        let mut all = three();
        while all[0].send(1, None, b"x", FrameMeta::default()).is_ok() {}
        let room = all[0].room();
        assert!(room > 100);
        let updates = |n: u32| PeerUpdate::PortDown { port: PortId(n) };
        let total = RING as u32 * 2;
        all[0].tell(|r, out| {
            assert_eq!(r, room);
            out.extend((0..total).map(updates));
        });
        assert!(all[0].is_behind() && all[0].room() == 0);
        let mut got = [Vec::new(), Vec::new()];
        while got.iter().any(|g| g.len() < total as usize) {
            for (i, got) in got.iter_mut().enumerate() {
                got.extend(take_all(&mut all[i + 1], 0).iter().filter_map(|item| match item {
                    Item::PeerUpdate(n) => Some(*n),
                    Item::Frame { .. } => None,
                }));
            }
            all[0].tell(|_, _| ());
        }
        assert!(!all[0].is_behind());
        for g in got {
            assert!(g.iter().copied().eq((0..total).map(updates)));
        }
    }

    #[test]
    fn who_sleeps_is_woken_once_and_who_is_awake_not() {
        let mut all = three();
        let waker = |p: &ShardLinks| Arc::clone(&p.out[1].as_ref().unwrap().waker);
        let its = waker(&all[0]);
        let send = |all: &mut Vec<ShardLinks>| {
            assert_eq!(all[0].send(1, None, b"x", FrameMeta::default()), Ok(()));
            all[0].wake_sleepers();
        };
        send(&mut all);
        assert!(!its.take(), "it is awake");
        assert!(!all[1].fall_asleep(), "there is something for it");
        take_all(&mut all[1], 0);
        assert!(all[1].fall_asleep());
        send(&mut all);
        assert!(its.take());
        send(&mut all);
        assert!(!its.take(), "it was woken already");
    }

    #[test]
    fn guests_go_where_the_fewest_are() {
        let loads: Vec<AtomicU32> = (0..3).map(|_| AtomicU32::new(0)).collect();
        assert_eq!([0; 4].map(|_| choose(&loads)), [0, 1, 2, 0]);
        unload(&loads, 2);
        unload(&loads, 2);
        assert_eq!([0; 2].map(|_| choose(&loads)), [2, 1]);
    }
}
