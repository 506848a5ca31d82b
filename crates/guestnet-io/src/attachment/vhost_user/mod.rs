//! Theory of operation: a vhost-user back-end for virtio-net. The front-end (QEMU, or any other) connects,
//! shares the guest's memory and hands over the queues; from then on frames go between guest memory and the
//! core without it. Even queues carry frames to the guest, odd ones from it. A kick wakes the worker, which
//! takes a batch and tells the guest once for all of it. [`protocol`] reads messages, [`session`] does what
//! they say, [`memory`] maps and checks, [`vring`] is a queue, [`queues`] takes frames from the guest, [`send`]
//! fills receive buffers. A front-end whose memory makes the worker wait ([`front_ends`]) gets a thread of its own
//! ([`isolated`]).
//!
//! Not built on the `vhost` and `virtio-queue` crates: the one waits for the rest of a message that has begun,
//! and the other shows the guest each buffer of a frame as it is filled, ends a broken chain without a word
//! and cannot put off or leave out a notification without EVENT_IDX.

mod dispatch;
mod eventfd;
mod feature;
mod front_ends;
#[cfg(fuzzing)]
pub(crate) mod fuzzed;
mod isolated;
mod memory;
mod protocol;
mod queue;
mod queues;
mod send;
mod session;
mod state;
mod vring;

use super::ReadOutcome;
use crate::os::epoll::Poller;
use crate::os::sys;
use guestnet_core::types::FrameMeta;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

pub(crate) use front_ends::{FrontEnds, LONG_ROUND, after_long_round, begin_round, has_slept};
use front_ends::{ROUND, STALL};
pub(crate) use isolated::{Counts, Isolated};
pub(crate) use send::WriteOutcome;
use state::Session;
pub(crate) use state::{Changes, RINGS_MAX};

/// A vhost-user attachment: a connection, or a socket on which one is waited for.
pub(crate) struct VhostUser {
    /// Where the front-end connects; it may come again.
    pub listener: Option<OwnedFd>,
    session: Option<Box<Session>>,
    /// All that may come here.
    front_ends: Arc<FrontEnds>,
    /// The round in which its memory was touched last.
    touched: u64,
}

impl VhostUser {
    /// Takes a connected stream socket, or a listening one to wait on.
    pub(crate) fn new(fd: OwnedFd, front_ends: Arc<FrontEnds>) -> Result<VhostUser, String> {
        sys::adopt(&fd).map_err(|e| super::reason("the socket cannot be set up", e))?;
        let opt = |name| sys::get_opt(&fd, libc::SOL_SOCKET, name);
        let kind = opt(libc::SO_TYPE).map_err(|e| super::reason("the descriptor is not a socket", e))?;
        if kind != libc::SOCK_STREAM || opt(libc::SO_DOMAIN) != Ok(libc::AF_UNIX) {
            return Err("a vhost-user front-end needs a unix socket of kind SOCK_STREAM".into());
        }
        if opt(libc::SO_ACCEPTCONN) == Ok(1) {
            return Ok(VhostUser { listener: Some(fd), session: None, front_ends, touched: 0 });
        }
        let session = Some(Box::new(Session::new(fd, &front_ends.quota)));
        Ok(VhostUser { listener: None, session, front_ends, touched: 0 })
    }

    /// The descriptor to be watched now.
    pub(crate) fn fd(&self) -> Option<&OwnedFd> {
        self.session.as_ref().map(|s| &s.channel.fd).or(self.listener.as_ref())
    }

    /// A front-end connects to the listening socket. True when there is one now.
    pub(crate) fn accept(&mut self) -> bool {
        let Some(listener) = self.listener.as_ref().filter(|_| self.session.is_none()) else { return false };
        match sys::accept(listener) {
            Ok((fd, _)) => {
                self.session = Some(Box::new(Session::new(fd, &self.front_ends.quota)));
                true
            }
            Err(_) => false,
        }
    }

    /// True while a front-end is connected.
    pub(crate) fn is_connected(&self) -> bool {
        self.session.is_some()
    }

    /// The front-end is gone; another may come where one is waited for.
    pub(crate) fn hang_up(&mut self) {
        self.session = None;
    }

    // ---- front-ends that make the worker wait -------------------------------------------------------------

    /// All that may come here, when the memory of the one that is here was touched in this round.
    pub(crate) fn touched(&self) -> Option<&Arc<FrontEnds>> {
        (self.session.is_some() && self.touched == ROUND.get()).then_some(&self.front_ends)
    }

    /// True when its front-end is to have a thread of its own.
    pub(crate) fn is_stalled(&self) -> bool {
        self.session.is_some() && self.front_ends.is_stalled()
    }

    /// Moves the front-end to a thread of its own. The descriptor carries its frames from then on, with virtio
    /// headers of [`super::vnet::LEN`] bytes.
    pub(crate) fn isolate(&mut self, poller: &Poller) -> Result<(Isolated, OwnedFd), String> {
        let session = self.session.take().ok_or("there is no front-end")?;
        poller.remove(&session.channel.fd);
        Isolated::start(session)
    }

    /// Does something that touches the guest's memory, and notes when this thread had to sleep for it.
    fn with<T>(&mut self, what: impl FnOnce(&mut Session) -> T) -> Option<T> {
        let s = self.session.as_mut()?;
        self.touched = ROUND.get();
        let watched_until = self.front_ends.watched_until.load(Ordering::Relaxed);
        if watched_until == 0 {
            return Some(what(s));
        }
        let before = sys::now();
        let result = what(s);
        let now = sys::now();
        // A thread that had only to wait for the processor did not sleep.
        if now.since(before) >= STALL && has_slept() {
            self.front_ends.convict();
        }
        if now.0 > watched_until {
            let same = self.front_ends.watched_until.compare_exchange(
                watched_until,
                0,
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
            let _extended = same;
        }
        Some(result)
    }

    // ---- queues -------------------------------------------------------------------------------------------

    /// Does what the front-end says.
    pub(crate) fn control(&mut self, poller: &Poller, slot: u32, generation: u32) -> Result<Changes, String> {
        self.with(|s| s.control(&session::Watching { poller, slot, generation }))
            .unwrap_or(Ok(Changes::default()))
    }

    /// Reads a frame of queue `index` to `buf`: where it is and what is known of it. `Empty` also when the guest's
    /// turn is over, until [`VhostUser::end_batch`].
    pub(crate) fn read(&mut self, index: usize, buf: &mut [u8]) -> ReadOutcome<(usize, usize, FrameMeta)> {
        self.with(|s| s.read(index, buf)).unwrap_or(ReadOutcome::Empty)
    }

    /// The end of a batch from queue `index`: shows the guest what it was given back, once for all of it. True
    /// when there is more in it. Either way the guest does not kick until [`VhostUser::rest`].
    pub(crate) fn end_batch(&mut self, index: usize) -> bool {
        self.with(|s| s.end_batch(index)).unwrap_or(false)
    }

    /// Queue `index` was kicked, which is not needed any more.
    pub(crate) fn spare_kicks(&mut self, index: usize) {
        self.with(|s| s.spare_kicks(index));
    }

    /// True when there are frames in queue `index`.
    pub(crate) fn has_more(&mut self, index: usize) -> bool {
        self.with(|s| s.has_more(index)).unwrap_or(false)
    }

    /// Nobody looks at queue `index` any more, and the guest is to kick for the next frame. True when there is
    /// one by now, for which it may not.
    pub(crate) fn rest(&mut self, index: usize) -> bool {
        self.with(|s| s.rest(index)).unwrap_or(false)
    }

    /// True when there is something to complain of.
    pub(crate) fn has_fault(&self) -> bool {
        self.session.as_ref().is_some_and(|s| s.has_fault())
    }

    /// What there is to complain of since the last time, if anything.
    pub(crate) fn take_fault(&mut self) -> Option<Result<String, String>> {
        self.session.as_mut()?.take_fault()
    }

    /// Sends a frame of front, with all headers, and rest; `linear` is for those that have to be changed.
    pub(crate) fn send(
        &mut self,
        linear: &mut Vec<u8>,
        segmented: &mut u64,
        front: &[u8],
        rest: &[u8],
        meta: FrameMeta,
    ) -> send::WriteOutcome {
        self.with(|s| s.send(linear, segmented, front, rest, meta)).unwrap_or(send::WriteOutcome::Unplugged)
    }

    /// True when a frame can be sent now; else the guest kicks when that changes.
    pub(crate) fn has_room(&mut self) -> bool {
        // Without a guest frames are thrown away rather than kept.
        self.with(Session::has_room).unwrap_or(true)
    }

    /// The end of a batch to the guest: shows it and calls the guest where it wants to be.
    pub(crate) fn flush(&mut self) {
        self.with(Session::flush);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attachment::quota::{Pool, Quota};
    use front_ends::{VERY_LONG_ROUND, WATCH_S};
    use memory::{CHECKS_MAX, Memory, RegionSpec};
    use state::BATCH_STEPS;
    use std::fs::File;
    use std::os::fd::FromRawFd;
    use std::os::unix::fs::{FileExt, MetadataExt};
    use vring::Addresses;

    const LEN: u64 = 8 << 20;
    const PAGE: u64 = 4096;
    const SIZE: u16 = 64;
    /// What may be allocated in all.
    const ALLOCATED: u64 = 256 << 10;

    fn memfd() -> File {
        // SAFETY: a name, and a new descriptor that nobody else has.
        #[allow(unsafe_code)]
        let fd = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC)) };
        let file = File::from(fd);
        file.set_len(LEN).unwrap();
        file
    }

    /// A guest of one queue for frames to it, whose first two pages have the rings and whose others are holes.
    struct Guest {
        session: Session,
        file: File,
        offered: u16,
    }

    impl Guest {
        fn new(pool: &Arc<Pool>, file: File) -> Guest {
            file.write_all_at(&[0; 2 * PAGE as usize], 0).unwrap();
            let quota = Quota::new(pool);
            let mut session = Session::new(sys::eventfd().unwrap(), &quota);
            let all = RegionSpec { guest: 0, size: LEN, user: 0, offset: 0 };
            let fd = OwnedFd::from(file.try_clone().unwrap());
            session.memory = Memory::map(&[all], &[fd], &session.quota).unwrap();
            session.set_features(feature::VERSION_1 | feature::MRG_RXBUF).unwrap();
            let Session { queues, memory, .. } = &mut session;
            let [q, ..] = queues;
            q.ring.addresses = Some(Addresses { desc: 0, avail: 2048, used: PAGE });
            assert!(q.ring.set_size(SIZE.into()) && q.ring.start(memory).is_ok());
            q.enabled = true;
            Guest { session, file, offered: 0 }
        }

        /// Puts a buffer of a page in.
        fn offer(&mut self, page: u64) {
            let slot = u64::from(self.offered % SIZE);
            let d = [(page * PAGE).to_le_bytes(), (PAGE | 2 << 32).to_le_bytes()].concat();
            self.file.write_all_at(&d, 16 * slot).unwrap();
            self.file.write_all_at(&(slot as u16).to_le_bytes(), 2048 + 4 + 2 * slot).unwrap();
            self.offered = self.offered.wrapping_add(1);
            self.file.write_all_at(&self.offered.to_le_bytes(), 2048 + 2).unwrap();
        }

        fn send(&mut self) -> WriteOutcome {
            let frame = [0x55; 100];
            let sent = self.session.send(&mut Vec::new(), &mut 0, &frame, &[], FrameMeta::default());
            self.session.queues[0].publish();
            self.session.steps_to_guest = BATCH_STEPS;
            sent
        }

        /// Bytes in the buffer that came back last.
        fn last_used(&self) -> u32 {
            let mut b = [0; 4];
            let at = self.session.queues[0].ring.at.used.wrapping_sub(1) % SIZE;
            self.file.read_exact_at(&mut b, PAGE + 4 + 8 * u64::from(at) + 4).unwrap();
            u32::from_le_bytes(b)
        }

        fn allocated(&self) -> u64 {
            self.file.metadata().unwrap().blocks() * 512
        }
    }

    #[test]
    fn frames_allocate_no_more_of_a_guest_than_its_share() {
        let pool = Pool::new(0, 1 << 40, ALLOCATED);
        let mut g = Guest::new(&pool, memfd());
        let before = g.allocated();
        let (mut sent, mut refused) = (0, 0);
        for page in 2..LEN / PAGE {
            g.offer(page);
            match g.send() {
                WriteOutcome::Yes => sent += 1,
                WriteOutcome::NotAllocated => {
                    refused += 1;
                    assert_eq!(g.last_used(), 0, "the buffer comes back unused");
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(sent > 0 && refused > 0);
        assert!(g.allocated() - before <= ALLOCATED);
        // A buffer that is allocated, by the guest or by us before, still takes frames.
        g.offer(2);
        assert_eq!(g.send(), WriteOutcome::Yes);
        assert_eq!(g.last_used(), 112);
        g.file.write_all_at(&[1; PAGE as usize], 2000 * PAGE).unwrap();
        g.offer(2000);
        assert_eq!(g.send(), WriteOutcome::Yes);
        // It is told once.
        let front_ends = FrontEnds::new(Quota::new(&pool));
        let mut v = VhostUser { listener: None, session: Some(Box::new(g.session)), front_ends, touched: 0 };
        assert!(v.has_fault());
        assert!(v.take_fault().unwrap().unwrap().contains("prealloc=on"));
        assert_eq!(v.take_fault(), None);
    }

    #[test]
    fn a_front_end_stalls_when_the_thread_sleeps_for_it_and_not_when_it_is_slow() {
        let slow = || {
            let begin = sys::now();
            while sys::now().since(begin) < 2 * STALL {}
        };
        let sleep = || std::thread::sleep(std::time::Duration::from_nanos(2 * STALL));
        let pool = Pool::new(0, 1 << 40, ALLOCATED);
        let vhost = || {
            let session = Some(Box::new(Guest::new(&pool, memfd()).session));
            VhostUser { listener: None, session, front_ends: FrontEnds::new(Quota::new(&pool)), touched: 0 }
        };
        let (mut honest, mut hostile) = (vhost(), vhost());
        begin_round(true);
        honest.with(|_| ());
        hostile.with(|_| sleep());
        assert!(!hostile.is_stalled(), "nobody looks yet");
        let now = sys::now();
        let both = [&honest, &hostile].into_iter().filter_map(|v| v.touched());
        assert_eq!(after_long_round(now, u64::MAX, both), Some(now.plus_s(WATCH_S)));
        assert!(!honest.is_stalled() && !hostile.is_stalled(), "it may have been either");
        begin_round(true);
        hostile.with(|_| sleep());
        assert!(hostile.is_stalled());
        // What the other one slept is not its doing.
        honest.with(|_| slow());
        assert!(!honest.is_stalled());
        // It is looked at longer each time.
        let again = after_long_round(now, LONG_ROUND, honest.touched().into_iter());
        assert_eq!(again, Some(now.plus_s(2 * WATCH_S)));
        assert!(!honest.is_stalled());
    }

    #[test]
    fn one_very_long_round_is_enough_where_only_one_front_end_can_be_the_cause() {
        let pool = Pool::new(0, 1 << 40, ALLOCATED);
        let session = Some(Box::new(Guest::new(&pool, memfd()).session));
        let front_ends = FrontEnds::new(Quota::new(&pool));
        let mut v = VhostUser { listener: None, session, front_ends, touched: 0 };
        begin_round(true);
        assert!(v.touched().is_none());
        v.with(|_| ());
        begin_round(true);
        assert!(v.touched().is_none(), "that was another round");
        v.with(|_| ());
        after_long_round(sys::now(), LONG_ROUND, v.touched().into_iter());
        assert!(!v.is_stalled());
        after_long_round(sys::now(), VERY_LONG_ROUND, v.touched().into_iter());
        assert!(v.is_stalled());
    }

    #[test]
    fn memory_that_fallocate_reserved_counts_as_allocated() {
        let file = memfd();
        // SAFETY: no pointers.
        #[allow(unsafe_code)]
        let done = unsafe { libc::fallocate(std::os::fd::AsRawFd::as_raw_fd(&file), 0, 0, LEN as i64) };
        assert_eq!(done, 0);
        let mut g = Guest::new(&Pool::new(0, 1 << 40, 0), file);
        for page in 2..LEN / PAGE {
            g.offer(page);
            assert_eq!(g.send(), WriteOutcome::Yes);
        }
    }

    #[test]
    fn pages_stay_charged_until_their_file_is_gone() {
        let pool = Pool::new(0, 1 << 40, ALLOCATED);
        let fill = |g: &mut Guest| {
            (2..LEN / PAGE)
                .filter(|page| {
                    g.offer(*page);
                    g.send() == WriteOutcome::Yes
                })
                .count()
        };
        let mut first = Guest::new(&pool, memfd());
        assert_eq!(fill(&mut first) as u64, ALLOCATED / PAGE);
        // The front-end leaves, and keeps its file.
        let kept = first.file.try_clone().unwrap();
        drop(first);
        let mut second = Guest::new(&pool, memfd());
        assert_eq!(fill(&mut second), 0);
        drop(kept);
        assert_eq!(fill(&mut second) as u64, ALLOCATED / PAGE);
    }

    #[test]
    fn holes_are_read_as_zeros_and_stay_holes() {
        let pool = Pool::new(0, 1 << 40, ALLOCATED);
        let mut g = Guest::new(&pool, memfd());
        g.file.write_all_at(&[7; 16], 11 * PAGE - 16).unwrap();
        let before = g.allocated();
        let mut got = vec![0xff; 3 * PAGE as usize];
        g.session.memory.allow_checks(CHECKS_MAX);
        g.session.memory.read(10 * PAGE - 5, &mut got).unwrap();
        assert!(got.iter().enumerate().all(|(i, b)| *b == if (4085..4101).contains(&i) { 7 } else { 0 }));
        g.session.memory.allow_checks(2);
        assert!(
            g.session.memory.read(100 * PAGE, &mut got).is_err(),
            "what is asked for one frame has a bound"
        );
        assert_eq!(g.allocated(), before);
    }

    #[test]
    fn more_address_space_than_its_share_is_refused_before_it_is_mapped() {
        let pool = Pool::new(0, 1 << 30, 0);
        let quota = Quota::new(&pool);
        let file = memfd();
        file.set_len(1 << 62).unwrap();
        let map = |size: u64| {
            let spec = RegionSpec { guest: 0, size, user: 0, offset: 0 };
            Memory::map(&[spec], &[file.try_clone().unwrap().into()], &quota)
        };
        for size in [1 << 30, 1 << 46, (1 << 62) - 4096] {
            let why = map(size).err().unwrap();
            assert!(why.contains("share of the address space"), "{why}");
        }
        let held: Vec<Memory> = std::iter::from_fn(|| map(1 << 28).ok()).collect();
        assert_eq!(held.len(), 2);
        drop(held);
        assert!(map(1 << 29).is_ok());
    }
}
