//! Theory of operation: a vhost-user back-end for virtio-net. The front-end (QEMU, or any other) connects,
//! shares the guest's memory and hands over the queues; from then on frames go between guest memory and the
//! core without it. Even queues carry frames to the guest, odd ones from it. A kick wakes the worker, which
//! takes a batch and tells the guest once for all of it. [`protocol`] reads messages, [`session`] does what
//! they say, [`memory`] maps and checks, [`ring`] is a queue, [`send`] fills receive buffers.
//!
//! Not built on the `vhost` and `virtio-queue` crates: the one waits for the rest of a message that has begun,
//! and the other shows the guest each buffer of a frame as it is filled, ends a broken chain without a word
//! and cannot put off or leave out a notification without EVENT_IDX.

#[cfg(fuzzing)]
pub(crate) mod fuzzed;
mod lost;
mod memory;
mod protocol;
mod ring;
mod send;
mod session;

use super::{Got, vnet};
use crate::poller::{Poller, Watch};
use crate::sys;
use guestnet_core::types::{Csum, FrameMeta, Gso};
use guestnet_wire::{be16, ether};
use memory::{Memory, Piece};
use protocol::Channel;
use ring::{Broken, Ring};
use std::os::fd::OwnedFd;

/// Pairs of queues that a guest can have.
pub(crate) const PAIRS_MAX: usize = 8;
/// Queues of a guest.
pub(crate) const RINGS_MAX: usize = 2 * PAIRS_MAX;

/// Feature bits (virtio 1.2, 5.1.3 and 6; 30 is vhost-user's own).
mod feature {
    pub(super) const CSUM: u64 = 1 << 0;
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    pub(super) const MTU: u64 = 1 << 3;
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    pub(super) const GUEST_TSO6: u64 = 1 << 8;
    pub(super) const HOST_TSO4: u64 = 1 << 11;
    pub(super) const HOST_TSO6: u64 = 1 << 12;
    pub(super) const HOST_ECN: u64 = 1 << 13;
    pub(super) const MRG_RXBUF: u64 = 1 << 15;
    pub(super) const MQ: u64 = 1 << 22;
    pub(super) const ANY_LAYOUT: u64 = 1 << 27;
    pub(super) const INDIRECT: u64 = 1 << 28;
    pub(super) const EVENT_IDX: u64 = 1 << 29;
    pub(super) const PROTOCOL: u64 = 1 << 30;
    pub(super) const VERSION_1: u64 = 1 << 32;
    pub(super) const GUEST_USO4: u64 = 1 << 54;
    pub(super) const GUEST_USO6: u64 = 1 << 55;
    pub(super) const HOST_USO: u64 = 1 << 56;

    /// Everything that guests are offered.
    pub(super) const OFFERED: u64 = CSUM
        | GUEST_CSUM
        | MTU
        | GUEST_TSO4
        | GUEST_TSO6
        | HOST_TSO4
        | HOST_TSO6
        | HOST_ECN
        | MRG_RXBUF
        | MQ
        | ANY_LAYOUT
        | INDIRECT
        | EVENT_IDX
        | PROTOCOL
        | VERSION_1
        | GUEST_USO4
        | GUEST_USO6
        | HOST_USO;
}

/// A queue with what belongs to it.
#[derive(Default)]
struct Queue {
    ring: Ring,
    enabled: bool,
    kick: Option<Watch>,
    call: Option<OwnedFd>,
    err: Option<OwnedFd>,
}

impl Queue {
    fn usable(&self) -> bool {
        self.enabled && self.ring.is_running()
    }

    /// Shows the guest what it was given back, and calls it where it wants to be.
    fn publish(&mut self) {
        if self.ring.publish()
            && let Some(call) = &self.call
        {
            sys::eventfd_signal(call);
        }
    }

    /// Gives the queue up: its rings are not to be believed.
    fn give_up(&mut self) {
        // What came before was right.
        self.publish();
        self.ring.stop();
        self.kick = None;
        if let Some(err) = &self.err {
            sys::eventfd_signal(err);
        }
    }
}

/// What a front-end and its guest have agreed with us.
struct Session {
    channel: Channel,
    memory: Memory,
    features: u64,
    protocol_features: u64,
    /// Length of the virtio header.
    header: usize,
    queues: [Queue; RINGS_MAX],
    /// The pair on which frames of a hash came last, and on which those to it go.
    steering: [u8; 256],
    /// Pieces of the buffers for one frame.
    pieces: Vec<Piece>,
    /// Buffers of one frame: head and bytes.
    heads: Vec<(u16, u32)>,
    /// Queues that were found broken and are to be told of.
    broken: u32,
}

/// A vhost-user attachment: a connection, or a socket on which one is waited for.
pub(crate) struct Vhost {
    /// Where the front-end connects; it may come again.
    pub listener: Option<OwnedFd>,
    session: Option<Box<Session>>,
}

/// What came of the messages of a front-end.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    /// Queues from the guest that are to be looked at now.
    pub started: Vec<usize>,
    /// There may be buffers for frames to the guest now.
    pub writable: bool,
}

impl Vhost {
    /// Takes a connected stream socket, or a listening one to wait on.
    pub(crate) fn new(fd: OwnedFd) -> Result<Vhost, String> {
        sys::adopt(&fd).map_err(|e| super::reason("the socket cannot be set up", e))?;
        let opt = |name| sys::get_opt(&fd, libc::SOL_SOCKET, name);
        let kind = opt(libc::SO_TYPE).map_err(|e| super::reason("the descriptor is not a socket", e))?;
        if kind != libc::SOCK_STREAM || opt(libc::SO_DOMAIN) != Ok(libc::AF_UNIX) {
            return Err("a vhost-user front-end needs a unix socket of kind SOCK_STREAM".into());
        }
        if opt(libc::SO_ACCEPTCONN) == Ok(1) {
            return Ok(Vhost { listener: Some(fd), session: None });
        }
        Ok(Vhost { listener: None, session: Some(Box::new(Session::new(fd))) })
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
                self.session = Some(Box::new(Session::new(fd)));
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

    /// Does what the front-end says.
    pub(crate) fn control(&mut self, poller: &Poller, slot: u32, generation: u32) -> Result<Changes, String> {
        let Some(s) = &mut self.session else { return Ok(Changes::default()) };
        s.control(&session::Watching { poller, slot, generation })
    }

    /// Reads a frame of queue `index` to `buf`: where it is and what is known of it.
    pub(crate) fn read(&mut self, index: usize, buf: &mut [u8]) -> Got<(usize, usize, FrameMeta)> {
        match &mut self.session {
            Some(s) => s.read(index, buf),
            None => Got::Empty,
        }
    }

    /// The end of a batch from queue `index`: shows the guest what it was given back, once for all of it. True
    /// when there is more in it. Either way the guest does not kick until [`Vhost::rest`].
    pub(crate) fn end_batch(&mut self, index: usize) -> bool {
        let Some(s) = &mut self.session else { return false };
        if let Some(q) = s.queues.get_mut(index) {
            q.publish();
            q.ring.spare_kicks();
        }
        s.has_more(index)
    }

    /// Queue `index` was kicked, which is not needed any more.
    pub(crate) fn spare_kicks(&mut self, index: usize) {
        if let Some(q) = self.session.as_ref().and_then(|s| s.queues.get(index)) {
            q.ring.spare_kicks();
        }
    }

    /// True when there are frames in queue `index`.
    pub(crate) fn has_more(&mut self, index: usize) -> bool {
        self.session.as_mut().is_some_and(|s| s.has_more(index))
    }

    /// Nobody looks at queue `index` any more, and the guest is to kick for the next frame. True when there is
    /// one by now, for which it may not.
    pub(crate) fn rest(&mut self, index: usize) -> bool {
        self.session.as_mut().is_some_and(|s| s.rest(index))
    }

    /// True when there is something to complain of.
    pub(crate) fn is_troubled(&self) -> bool {
        self.session.as_ref().is_some_and(|s| s.broken != 0 || s.memory.is_lost())
    }

    /// What there is to complain of since the last time, if anything.
    pub(crate) fn complaint(&mut self) -> Option<Result<String, String>> {
        let s = self.session.as_mut()?;
        if s.memory.is_lost() {
            return Some(Err("the guest's memory was taken away from under it".into()));
        }
        let broken = std::mem::take(&mut s.broken);
        (broken != 0).then(|| {
            let list: Vec<String> =
                (0..RINGS_MAX).filter(|i| broken & 1 << i != 0).map(|i| i.to_string()).collect();
            Ok(format!("virtio queue {} of a guest is broken and was stopped", list.join(", ")))
        })
    }

    /// Sends a frame of front, with all headers, and rest; `linear` is for those that have to be changed.
    pub(crate) fn send(
        &mut self,
        linear: &mut Vec<u8>,
        segmented: &mut u64,
        front: &[u8],
        rest: &[u8],
        meta: FrameMeta,
    ) -> send::Sent {
        match &mut self.session {
            Some(s) => s.send(linear, segmented, front, rest, meta),
            None => send::Sent::Unplugged,
        }
    }

    /// True when a frame can be sent now; else the guest kicks when that changes.
    pub(crate) fn has_room(&mut self) -> bool {
        // Without a guest frames are thrown away rather than kept.
        self.session.as_mut().is_none_or(|s| s.has_room())
    }

    /// The end of a batch to the guest: shows it and calls the guest where it wants to be.
    pub(crate) fn flush(&mut self) {
        let Some(s) = &mut self.session else { return };
        for q in s.queues.iter_mut().step_by(2) {
            if q.ring.is_running() {
                q.publish();
            }
        }
    }
}

pub(crate) use send::Sent;

impl Session {
    fn new(fd: OwnedFd) -> Session {
        Session {
            channel: Channel::new(fd),
            memory: Memory::default(),
            features: 0,
            protocol_features: 0,
            header: vnet::LEN,
            queues: Default::default(),
            steering: [0; 256],
            pieces: Vec::new(),
            heads: Vec::new(),
            broken: 0,
        }
    }

    fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// A queue cannot be used any more.
    fn break_queue(&mut self, index: usize) {
        if let Some(q) = self.queues.get_mut(index) {
            q.give_up();
            self.broken |= 1 << index;
        }
    }

    fn read(&mut self, index: usize, buf: &mut [u8]) -> Got<(usize, usize, FrameMeta)> {
        let Some(q) = self.queues.get_mut(index).filter(|_| index % 2 == 1) else { return Got::Empty };
        if !q.ring.is_running() {
            return Got::Empty;
        }
        let head = match q.ring.pop() {
            Ok(Some(head)) => head,
            Ok(None) => return Got::Empty,
            Err(Broken) => {
                self.break_queue(index);
                return Got::Bad;
            }
        };
        let (mut len, mut steps) = (0, ring::CHAIN_MAX);
        let walked = q.ring.walk(&self.memory, head, false, &mut steps, |piece| {
            let to = buf.get_mut(len..len + piece.len()).ok_or(ring::BadChain)?;
            // SAFETY: the piece was found just now, and the memory is not changed while it is read.
            #[allow(unsafe_code)]
            unsafe {
                piece.read(to)
            };
            len += piece.len();
            Ok(())
        });
        q.ring.give_back(head, 0);
        if !q.enabled {
            // A queue that is not enabled is emptied all the same, and nothing comes of it.
            return Got::Bad;
        }
        let Some((header, frame)) =
            buf.get(..len).and_then(|b| b.split_at_checked(self.header)).filter(|_| walked.is_ok())
        else {
            return Got::Bad;
        };
        let Ok(meta) = vnet::parse(header, frame) else { return Got::Bad };
        if !self.agreed(&meta) {
            return Got::Bad;
        }
        if self.pairs() > 1 {
            let hash = send::hash(frame);
            if let Some(s) = self.steering.get_mut(usize::from(hash)) {
                *s = (index / 2) as u8;
            }
        }
        Got::Frame((self.header, len, meta))
    }

    /// True when the guest may ask for this of a frame that it sends.
    fn agreed(&self, meta: &FrameMeta) -> bool {
        let gso = match meta.gso {
            None => true,
            Some(Gso::Tcp(_)) => self.has(feature::HOST_TSO4 | feature::HOST_TSO6),
            Some(Gso::Udp(_)) => self.has(feature::HOST_USO),
        };
        gso && (self.has(feature::CSUM) || !matches!(meta.csum, Csum::Partial { .. }))
    }

    /// True when the guest takes a frame with this as it is.
    fn takes(&self, meta: &FrameMeta, front: &[u8]) -> bool {
        let v6 = be16(front, 12) == ether::IPV6;
        let gso = match (meta.gso, v6) {
            (None, _) => return self.has(feature::GUEST_CSUM) || !matches!(meta.csum, Csum::Partial { .. }),
            (Some(Gso::Tcp(_)), false) => feature::GUEST_TSO4,
            (Some(Gso::Tcp(_)), true) => feature::GUEST_TSO6,
            (Some(Gso::Udp(_)), false) => feature::GUEST_USO4,
            (Some(Gso::Udp(_)), true) => feature::GUEST_USO6,
        };
        self.has(gso) && self.has(feature::GUEST_CSUM)
    }

    fn has_more(&mut self, index: usize) -> bool {
        self.ask(index, |ring| ring.look().map(|n| n > 0))
    }

    fn rest(&mut self, index: usize) -> bool {
        self.ask(index, Ring::want_kick)
    }

    fn ask(&mut self, index: usize, what: impl FnOnce(&mut Ring) -> Result<bool, Broken>) -> bool {
        let Some(q) = self.queues.get_mut(index).filter(|q| q.ring.is_running()) else { return false };
        what(&mut q.ring).unwrap_or_else(|Broken| {
            self.break_queue(index);
            false
        })
    }

    /// Pairs of queues that frames to the guest can go to: those from the first on.
    fn pairs(&self) -> usize {
        self.queues.iter().step_by(2).take_while(|q| q.usable()).count()
    }
}
