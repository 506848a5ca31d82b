//! Theory of operation: a guest made of the fuzzer's bytes. They are its features, a few messages, and then its
//! memory, in which two queues of eight lie at fixed places: descriptors, rings and buffers are whatever they
//! happen to be, and change half-way. Nothing may come of it but frames that fit and buffers given back.

use super::memory::{Memory, RegionSpec};
use super::protocol;
use super::session::Watching;
use super::vring::Addresses;
use super::{Changes, Session, feature};
use crate::attachment::quota::{Pool, Quota};
use crate::attachment::{FRAME_MAX, ReadOutcome, vnet};
use crate::os::epoll::Poller;
use crate::os::sys;
use guestnet_core::types::{Csum, FrameMeta, Gso};
use std::cell::RefCell;
use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// Where the guest has its memory, and where the front-end says that it has it.
const GUEST: u64 = 0x1000;
const USER: u64 = 0x10_0000;
const LEN: u64 = 0x1000;
const SIZE: u32 = 8;

struct World {
    memory: File,
    session: Session,
    poller: Poller,
}

fn world() -> Result<World, String> {
    // SAFETY: a name, and a new descriptor that nobody else has.
    #[allow(unsafe_code)]
    let fd = unsafe {
        let fd = libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(crate::attachment::reason("no memfd", sys::errno()));
        }
        OwnedFd::from_raw_fd(fd)
    };
    let memory = File::from(fd.try_clone().map_err(|e| e.to_string())?);
    memory.set_len(LEN).map_err(|e| e.to_string())?;
    let mut session =
        Session::new(sys::eventfd().map_err(|e| e.to_string())?, &Quota::new(Pool::of_process()));
    // In two regions, so that buffers cross from one to the other.
    let half = LEN / 2;
    let region = |at| RegionSpec { guest: GUEST + at, size: half, user: USER + at, offset: at };
    let fds = [fd.try_clone().map_err(|e| e.to_string())?, fd];
    session.memory = Memory::map(&[region(0), region(half)], &fds, &Quota::new(Pool::of_process()))?;
    Ok(World { memory, session, poller: Poller::new(4).map_err(|e| e.to_string())? })
}

thread_local! {
    static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
}

/// See [`crate::fuzzing::vhost_guest`].
pub(crate) fn play(bytes: &[u8]) -> (usize, usize) {
    WORLD.with_borrow_mut(|w| {
        if w.is_none() {
            *w = world().ok();
        }
        w.as_mut().map_or((0, 0), |w| w.play(bytes))
    })
}

impl World {
    fn play(&mut self, bytes: &[u8]) -> (usize, usize) {
        let Some((head, bytes)) = bytes.split_at_checked(10) else { return (0, 0) };
        let &[f0, f1, f2, messages, base0, base1, sizes, gso, at, more] = head else { return (0, 0) };
        let bits = u64::from(f0) | u64::from(f1) << 8 | u64::from(f2) << 15 | u64::from(f0) << 27 | 1 << 32;
        let memory = std::mem::take(&mut self.session.memory);
        let Ok(fd) = sys::eventfd() else { return (0, 0) };
        self.session = Session::new(fd, &Quota::new(Pool::of_process()));
        self.session.memory = memory;
        let _offered = self.session.set_features(bits & feature::OFFERED);
        let (first, second) = bytes.split_at(bytes.len().min(LEN as usize));
        self.fill(0, first);
        for (i, base) in [(0, base0), (1, base1)] {
            let q = &mut self.session.queues[i];
            let at = USER + 0x200 * i as u64;
            q.ring.addresses = Some(Addresses { desc: at, avail: at + 128, used: at + 256 });
            q.ring.event_idx = self.session.features & feature::EVENT_IDX != 0;
            q.ring.at.avail = u16::from(base);
            assert!(q.ring.set_size(SIZE) && q.ring.start(&mut self.session.memory).is_ok());
            q.enabled = true;
        }
        let mut got = self.frames();
        let mut sent = self.send(sizes, gso);
        // The guest writes while nobody looks.
        self.fill(u64::from(at) * 8, second);
        self.talk(messages, second);
        got += self.frames();
        sent += self.send(more, gso);
        (got, sent)
    }

    fn fill(&self, at: u64, bytes: &[u8]) {
        let room = (LEN - at.min(LEN)) as usize;
        let _written = self.memory.write_all_at(&bytes[..bytes.len().min(room)], at);
    }

    /// Takes what there is; every frame fits.
    fn frames(&mut self) -> usize {
        let mut buf = vec![0; FRAME_MAX + vnet::LEN_MRG];
        let mut got = 0;
        self.session.begin_turn();
        for _ in 0..2 * SIZE {
            match self.session.read(1, &mut buf) {
                ReadOutcome::Frame((from, to, meta)) => {
                    assert!(from <= to && to <= buf.len());
                    if let Csum::Partial { start, offset } = meta.csum {
                        assert!(usize::from(start) + usize::from(offset) + 2 <= to - from);
                    }
                    got += 1;
                }
                ReadOutcome::Bad => {}
                ReadOutcome::Empty => break,
                ReadOutcome::Down(_) => unreachable!("a queue does not end a connection"),
            }
        }
        let q = &mut self.session.queues[1];
        q.publish();
        q.ring.spare_kicks();
        assert!(q.ring.unpublished() == 0 || !q.ring.is_running());
        let _more = self.session.has_more(1) | self.session.rest(1);
        got
    }

    /// Gives frames of some sizes.
    fn send(&mut self, sizes: u8, gso: u8) -> usize {
        let mut linear = Vec::new();
        let (mut sent, mut segmented) = (0, 0);
        for i in 0..4 {
            let mut frame = vec![0; [60, 1514, 9000, 65_000][usize::from(sizes >> (2 * i)) & 3]];
            frame[12] = 8;
            frame[14] = 0x45;
            let total = (frame.len() - 14) as u16;
            frame[16..18].copy_from_slice(&total.to_be_bytes());
            frame[23] = 6;
            frame[46] = 0x50;
            let large = gso & 1 << i != 0;
            let meta = FrameMeta {
                csum: if gso & 16 << i != 0 { Csum::Partial { start: 34, offset: 16 } } else { Csum::Full },
                gso: large.then_some(Gso::Tcp(1000)),
            };
            let (front, rest) = frame.split_at(54);
            if self.session.send(&mut linear, &mut segmented, front, rest, meta) == super::WriteOutcome::Yes {
                sent += 1;
            }
            let _room = self.session.has_room();
        }
        self.session.queues[0].publish();
        self.session.steps_to_guest = super::state::BATCH_STEPS;
        sent
    }

    /// Messages of the front-end, in the middle of it all.
    fn talk(&mut self, messages: u8, bytes: &[u8]) {
        for chunk in bytes.chunks(44).take(usize::from(messages & 3)) {
            let number = u32::from(chunk.first().copied().unwrap_or(0) % 20);
            let len = chunk.get(1).map_or(0, |n| usize::from(*n) % 41);
            let body = chunk.get(2..2 + len).unwrap_or(&[]);
            // Its memory stays: mapping is not what is looked for here.
            if number != 5
                && let Some(request) = protocol::any(number, body)
            {
                let watching = Watching { poller: &self.poller, slot: 0, generation: 0 };
                let _answer = self.session.apply(&watching, request, &mut Changes::default());
            }
        }
    }
}
