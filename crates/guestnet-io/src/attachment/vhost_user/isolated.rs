//! Theory of operation: a front-end with a thread of its own. A touch of a guest's memory can wait: while the
//! front-end punches holes in it, or while it is swapped in. No check before the touch helps, since the front-end can
//! begin right after it. So a front-end that made its worker wait leaves it: its session moves to a thread that does
//! nothing else, and frames cross a SOCK_SEQPACKET socket pair, each with its virtio header in front, which the
//! worker reads and writes as it does a TAP. The worker never waits for that thread; the thread may wait for the
//! worker. It ends when the front-end is gone, or when the worker has closed its end.

use super::send::WriteOutcome;
use super::session::Watching;
use super::state::{RINGS_MAX, Session};
use crate::attachment::{FRAME_MAX, ReadOutcome, reason, vnet};
use crate::os::epoll::{Kind, Poller, Ready, Token};
use crate::os::sys;
use guestnet_core::types::FrameMeta;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Threads of this kind in the process at most.
const THREADS_MAX: usize = 32;
/// Frames of one queue, or to the guest, before others have their turn.
const BATCH: usize = 64;
/// Descriptors that the thread needs besides those of the session: its epoll instance and the pair.
const DESCRIPTORS: u64 = 3;
/// Bytes in flight each way that are asked for.
const BUFFER: i32 = 1 << 20;
const HUNG_UP: i32 = libc::EPOLLHUP | libc::EPOLLERR;
const GONE: &str = "the network let the front-end go";

static THREADS: AtomicUsize = AtomicUsize::new(0);

/// A place among [`THREADS_MAX`].
struct Place;

impl Place {
    fn take() -> Option<Place> {
        let more = |n: usize| (n < THREADS_MAX).then_some(n + 1);
        THREADS.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok().then_some(Place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        THREADS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What the thread has to tell.
#[derive(Default)]
struct News {
    ended: Mutex<Option<String>>,
    warning: Mutex<Option<String>>,
    bad: AtomicU64,
    refused: AtomicU64,
    unallocated: AtomicU64,
    segmented: AtomicU64,
}

/// Frames that a thread has dropped or cut since it was asked last.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counts {
    pub bad: u64,
    pub refused: u64,
    pub unallocated: u64,
    pub segmented: u64,
}

/// A thread that has a front-end.
pub(crate) struct Isolated {
    news: Arc<News>,
}

impl Isolated {
    /// Moves a session to a thread. The descriptor carries its frames, with virtio headers of [`vnet::LEN`] bytes.
    pub(super) fn start(mut session: Box<Session>) -> Result<(Isolated, OwnedFd), String> {
        let place = Place::take().ok_or("too many front-ends make the network wait")?;
        session.extra_descriptors = DESCRIPTORS;
        session.count_descriptors()?;
        let failed = |e| reason("a front-end that makes the network wait cannot have a thread of its own", e);
        let (ours, theirs) = sys::packet_pair().map_err(failed)?;
        for fd in [&ours, &theirs] {
            let _as_granted = sys::set_opt(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, BUFFER);
        }
        sys::adopt(&ours).map_err(failed)?;
        let poller = Poller::new(2 + RINGS_MAX).map_err(failed)?;
        let news = Arc::new(News::default());
        let mut thread = Thread {
            session,
            pair: theirs,
            poller,
            again: Vec::new(),
            frame: vec![0; FRAME_MAX + vnet::LEN_MRG],
            out: vec![0; FRAME_MAX + vnet::LEN],
            pending: None,
            linear: Vec::new(),
            news: Arc::clone(&news),
        };
        thread.watch().map_err(failed)?;
        let run = move || {
            let _place = place;
            sys::block_signals();
            let why = thread.run();
            *thread.news.ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
        };
        std::thread::Builder::new()
            .name("guestnet-vhost".into())
            .spawn(run)
            .map_err(|e| failed(e.raw_os_error().unwrap_or(libc::EAGAIN)))?;
        Ok((Isolated { news }, ours))
    }

    /// Why it ended, once it has.
    pub(crate) fn ended(&self) -> Option<String> {
        self.news.ended.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// What is to be told of the guest.
    pub(crate) fn warning(&self) -> Option<String> {
        self.news.warning.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub(crate) fn counts(&self) -> Counts {
        let take = |n: &AtomicU64| n.swap(0, Ordering::Relaxed);
        let News { bad, refused, unallocated, segmented, .. } = &*self.news;
        Counts {
            bad: take(bad),
            refused: take(refused),
            unallocated: take(unallocated),
            segmented: take(segmented),
        }
    }
}

struct Thread {
    session: Box<Session>,
    pair: OwnedFd,
    poller: Poller,
    /// Queues from the guest that are to be looked at.
    again: Vec<usize>,
    /// A frame from the guest.
    frame: Vec<u8>,
    /// A frame to the guest, and its end and description while it waits for buffers.
    out: Vec<u8>,
    pending: Option<(usize, FrameMeta)>,
    linear: Vec<u8>,
    news: Arc<News>,
}

const PAIR: Token = Token { kind: Kind::Sock, index: 0, generation: 0 };
const CHANNEL: Token = Token { kind: Kind::Port, index: 0, generation: 0 };

impl Thread {
    /// Watches everything with the poller of this thread.
    fn watch(&mut self) -> Result<(), i32> {
        self.poller.add(&self.pair, PAIR, libc::EPOLLIN)?;
        self.poller.add(&self.session.channel.fd, CHANNEL, libc::EPOLLIN)?;
        let watching = Watching { poller: &self.poller, slot: 0, generation: 0 };
        for (i, q) in self.session.queues.iter_mut().enumerate() {
            if let Some(kick) = q.kick.take().and_then(crate::os::epoll::Watch::into_fd) {
                q.kick = Some(self.poller.watch_edges(kick, watching.token(i))?);
            }
            if i % 2 == 1 {
                self.again.push(i);
            }
        }
        Ok(())
    }

    fn run(&mut self) -> String {
        loop {
            if let Err(why) = self.round() {
                return why;
            }
        }
    }

    fn round(&mut self) -> Result<(), String> {
        let busy = !self.again.is_empty() || self.rest();
        let n = self.poller.wait(busy.then_some(0)).map_err(|e| reason("polling failed", e))?;
        for i in 0..n {
            if let Some(ready) = self.poller.ready(i) {
                self.on_ready(ready)?;
            }
        }
        for queue in std::mem::take(&mut self.again) {
            self.take_turn(queue)?;
        }
        self.session.flush();
        match self.session.take_fault() {
            Some(Err(why)) => return Err(why),
            Some(Ok(message)) => {
                *self.news.warning.lock().unwrap_or_else(PoisonError::into_inner) = Some(message);
            }
            None => {}
        }
        Ok(())
    }

    /// Asks for kicks. True when there are frames by now.
    fn rest(&mut self) -> bool {
        for queue in (1..RINGS_MAX).step_by(2) {
            if self.session.rest(queue) {
                self.again.push(queue);
            }
        }
        !self.again.is_empty()
    }

    fn on_ready(&mut self, ready: Ready) -> Result<(), String> {
        match ready.token.kind {
            Kind::Sock if ready.has(HUNG_UP) => Err(GONE.into()),
            Kind::Sock => self.send_to_guest(),
            Kind::Kick => {
                let queue = ready.token.index as usize;
                if queue % 2 == 1 {
                    self.look_at(queue);
                    return Ok(());
                }
                self.session.spare_kicks(queue);
                self.send_to_guest()
            }
            _ => {
                let watching = Watching { poller: &self.poller, slot: 0, generation: 0 };
                let changes = self.session.control(&watching)?;
                for queue in changes.started {
                    self.look_at(queue);
                }
                if changes.writable { self.send_to_guest() } else { Ok(()) }
            }
        }
    }

    fn look_at(&mut self, queue: usize) {
        if !self.again.contains(&queue) {
            self.again.push(queue);
        }
    }

    /// Frames that the worker has written, as long as there are buffers for them.
    fn send_to_guest(&mut self) -> Result<(), String> {
        for _ in 0..BATCH {
            let waited = self.pending.is_some();
            let Some((end, meta)) = self.next_to_guest()? else { break };
            let mut segmented = 0;
            let frame = self.out.get(vnet::LEN..end).unwrap_or(&[]);
            let sent = self.session.send(&mut self.linear, &mut segmented, frame, &[], meta);
            self.news.segmented.fetch_add(segmented, Ordering::Relaxed);
            match sent {
                WriteOutcome::Full => {
                    self.pending = Some((end, meta));
                    if !waited {
                        // Nothing more until the guest kicks.
                        self.poller.modify(&self.pair, PAIR, 0).map_err(|e| reason("polling failed", e))?;
                    }
                    return Ok(());
                }
                WriteOutcome::Refused => drop(self.news.refused.fetch_add(1, Ordering::Relaxed)),
                WriteOutcome::NotAllocated => drop(self.news.unallocated.fetch_add(1, Ordering::Relaxed)),
                WriteOutcome::Yes | WriteOutcome::Unplugged => {}
            }
            if waited {
                self.poller
                    .modify(&self.pair, PAIR, libc::EPOLLIN)
                    .map_err(|e| reason("polling failed", e))?;
            }
        }
        Ok(())
    }

    /// The next frame to the guest: the end of it in `out`.
    fn next_to_guest(&mut self) -> Result<Option<(usize, FrameMeta)>, String> {
        if let Some(pending) = self.pending.take() {
            return Ok(Some(pending));
        }
        let n = match sys::recv(&self.pair, &mut self.out, 0) {
            Ok(0) => return Err(GONE.into()),
            Ok(n) => n,
            Err(e) if sys::would_block(e) => return Ok(None),
            Err(e) => return Err(reason("the network let the front-end go", e)),
        };
        let parts = self.out.get(..n).and_then(|b| b.split_at_checked(vnet::LEN));
        let meta = parts.and_then(|(header, frame)| vnet::parse(header, frame).ok());
        // It comes from our own worker, and is whole.
        Ok(meta.map(|meta| (n, meta)))
    }

    /// A turn of a queue from the guest.
    fn take_turn(&mut self, queue: usize) -> Result<(), String> {
        for _ in 0..BATCH {
            match self.session.read(queue, &mut self.frame) {
                ReadOutcome::Frame((from, to, meta)) => self.hand_over(from, to, meta)?,
                ReadOutcome::Bad => drop(self.news.bad.fetch_add(1, Ordering::Relaxed)),
                ReadOutcome::Empty => break,
                ReadOutcome::Down(why) => return Err(why),
            }
        }
        if self.session.end_batch(queue) {
            self.look_at(queue);
        }
        Ok(())
    }

    /// Hands a frame to the worker, and waits until there is room for it.
    fn hand_over(&mut self, from: usize, to: usize, mut meta: FrameMeta) -> Result<(), String> {
        let Some(frame) = self.frame.get_mut(from..to) else { return Ok(()) };
        if meta.gso.is_some() && !vnet::begin_checksum(frame, &mut meta) {
            self.news.bad.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        let Some(header) = vnet::emit(&meta, frame) else {
            self.news.bad.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        };
        let header = header.get(..vnet::LEN).unwrap_or(&header);
        loop {
            match sys::writev(&self.pair, &[header, frame]) {
                Ok(_) => return Ok(()),
                Err(libc::EINTR) => {}
                Err(libc::EPIPE | libc::ECONNRESET) => return Err(GONE.into()),
                Err(_) => {
                    self.news.refused.fetch_add(1, Ordering::Relaxed);
                    return Ok(());
                }
            }
        }
    }
}
