//! Theory of operation: events go up to the control side through one ring per worker. The consumer waits on
//! an eventfd and says so by the `armed` flag; the worker writes the eventfd only when that flag is set, once
//! per batch. A ring that is full, holds too many payload bytes or too many events of one guest drops what may be
//! dropped and counts it.
//! Acknowledgements and the coming and going of ports may not: they wait in the worker's own overflow, and
//! while there is any, no more commands and guests are taken, so that it stays small.

use crate::attachment::FRAME_MAX;
use crate::control::command::{CommandError, Value, Waker};
use crate::os::sys;
use guestnet_core::effects;
use guestnet_core::types::PortId;
use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of payload that wait in the ring at most.
const PAYLOAD_MAX: usize = 8 << 20;
/// Quarters of the ring that frames leave free.
const FRAME_QUARTERS: usize = 1;
/// Slots that only events that may not be lost can use.
const RESERVED: usize = 64;

/// How much a log record matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Of use when looking for a fault.
    Debug,
    /// Ordinary.
    Info,
    /// Something does not work as it should.
    Warning,
    /// Something does not work.
    Error,
}

/// What a worker tells.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// From the core.
    Core(effects::Event),
    /// A command is done. Never lost.
    Done {
        /// The number that [`crate::WorkerGroup::submit`] gave it.
        sequence: u64,
        /// What came of it.
        result: Result<Value, CommandError>,
    },
    /// A guest came to a listener; nothing of it is told before this. Never lost.
    PortUp {
        /// Its port.
        port: PortId,
        /// The listener.
        listener: u32,
        /// Its address, where it has one (a path).
        peer: String,
    },
    /// The attachment of a port is gone. The port of a listener's guest is gone with it. Never lost.
    PortDown {
        /// The port.
        port: PortId,
        /// Why, for people.
        reason: String,
    },
    /// A frame to a guest with a memory attachment.
    Frame {
        /// The port.
        port: PortId,
        /// Ethernet header first; all checksums complete.
        frame: Box<[u8]>,
    },
    /// A log record.
    Log {
        /// How much it matters.
        level: Level,
        /// One sentence.
        message: String,
    },
    /// The worker has failed and is gone. Never lost.
    Failed {
        /// Why.
        message: String,
    },
}

impl Event {
    fn payload_len(&self) -> usize {
        match self {
            Event::Core(effects::Event::Datagram { payload, .. }) => payload.len(),
            Event::Core(effects::Event::DnsQuestion { name, .. }) => name.len(),
            Event::Frame { frame, .. } => frame.len(),
            _ => 0,
        }
    }

    /// Quarters of the ring that it leaves to what matters more. One guest with many short flows, or one
    /// that is sent much, is not to keep others from services.
    fn quarters_left(&self) -> usize {
        use effects::Event::{FlowClosed, FlowDenied, FlowOpened, NameDenied};
        match self {
            Event::Core(FlowOpened { .. } | FlowClosed { .. } | FlowDenied(_) | NameDenied(_)) => 2,
            Event::Frame { .. } => FRAME_QUARTERS,
            _ => 0,
        }
    }
}

/// How many times what is left of the ring one guest's events may take: it alone has four fifths.
const SHARE: usize = 4;

/// The guest that an event which may be lost is about.
fn guest(event: &Event) -> Option<PortId> {
    use effects::Event::{
        AddressSeen, Datagram, DnsQuestion, FlowClosed, FlowDenied, FlowOpened, NameDenied, PolicyAsk,
    };
    match event {
        Event::Core(
            Datagram { port, .. }
            | AddressSeen { port, .. }
            | DnsQuestion { port, .. }
            | FlowOpened { port, .. }
            | FlowClosed { port, .. },
        ) => Some(*port),
        Event::Core(FlowDenied(denied)) => Some(denied.port),
        Event::Core(NameDenied(denied)) => Some(denied.port),
        Event::Core(PolicyAsk(asked)) => Some(asked.port),
        _ => None,
    }
}

/// Whose events are in the ring. The ring itself tells only how many there are, so that their order is kept here.
#[derive(Default)]
struct Owners {
    order: VecDeque<Option<PortId>>,
    counts: HashMap<PortId, usize>,
}

impl Owners {
    /// Forgets those that the consumer has taken out.
    fn settle(&mut self, in_ring: usize) {
        while self.order.len() > in_ring {
            let Some(Some(port)) = self.order.pop_front() else { continue };
            if let Some(n) = self.counts.get_mut(&port) {
                *n -= 1;
                if *n == 0 {
                    self.counts.remove(&port);
                }
            }
        }
    }

    fn note(&mut self, owner: Option<PortId>) {
        self.order.push_back(owner);
        if let Some(port) = owner {
            *self.counts.entry(port).or_default() += 1;
        }
    }

    fn of(&self, port: PortId) -> usize {
        self.counts.get(&port).copied().unwrap_or(0)
    }
}

struct Shared {
    fd: OwnedFd,
    /// The consumer has seen the ring empty and waits for the eventfd.
    armed: AtomicBool,
    /// The worker waits for room.
    wanted: AtomicBool,
    /// Payload bytes in the ring.
    bytes: AtomicUsize,
}

/// The worker's half.
pub(crate) struct EventSender {
    ring: rtrb::Producer<Box<Event>>,
    capacity: usize,
    shared: Arc<Shared>,
    overflow: VecDeque<Event>,
    owners: Owners,
    dirty: bool,
    /// Events dropped for want of room.
    pub dropped: u64,
}

/// The control side's half.
pub(crate) struct EventReceiver {
    ring: Mutex<rtrb::Consumer<Box<Event>>>,
    shared: Arc<Shared>,
    waker: Arc<Waker>,
}

/// Wakes the control side.
pub(crate) struct EventSignal(Arc<Shared>);

impl EventSignal {
    pub(crate) fn signal(&self) {
        sys::eventfd_signal(&self.0.fd);
    }
}

/// A ring for `capacity` events.
pub(crate) fn channel(capacity: usize, waker: Arc<Waker>) -> Result<(EventSender, EventReceiver), i32> {
    let capacity = capacity.max(RESERVED * 2);
    let (producer, consumer) = rtrb::RingBuffer::new(capacity);
    let shared = Arc::new(Shared {
        fd: sys::eventfd()?,
        armed: AtomicBool::new(true),
        wanted: AtomicBool::new(false),
        bytes: AtomicUsize::new(0),
    });
    let sender = EventSender {
        ring: producer,
        capacity,
        shared: Arc::clone(&shared),
        overflow: VecDeque::new(),
        owners: Owners::default(),
        dirty: false,
        dropped: 0,
    };
    Ok((sender, EventReceiver { ring: Mutex::new(consumer), shared, waker }))
}

impl EventSender {
    /// True when an event of `len` payload bytes that may be lost would be taken, with so many quarters of the
    /// ring and its bytes left free.
    fn has_room(&self, len: usize, quarters: usize) -> bool {
        self.ring.slots() > RESERVED + self.capacity / 4 * quarters
            && self.overflow.is_empty()
            && self.shared.bytes.load(Ordering::Relaxed) + len <= PAYLOAD_MAX / 4 * (4 - quarters)
    }

    /// True when a frame of any size would be taken; else this worker is woken when there may be room.
    pub(crate) fn frame_room_or_wake(&self) -> bool {
        if self.frame_room() {
            return true;
        }
        // Asked for before looking again, so that room made meanwhile is not missed.
        self.want_room();
        fence(Ordering::SeqCst);
        self.frame_room()
    }

    /// True when a frame of any size would be taken now.
    pub(crate) fn frame_room(&self) -> bool {
        self.has_room(FRAME_MAX, FRAME_QUARTERS)
    }

    /// Asks for a wake-up of this worker when the consumer has made room.
    fn want_room(&self) {
        self.shared.wanted.store(true, Ordering::SeqCst);
    }

    /// Sends what may be lost. False: it was.
    pub(crate) fn try_send(&mut self, event: Event) -> bool {
        let (len, quarters) = (event.payload_len(), event.quarters_left());
        if !self.has_room(len, quarters) || !self.has_share(&event, quarters) {
            self.dropped += 1;
            return false;
        }
        self.shared.bytes.fetch_add(len, Ordering::Relaxed);
        self.dirty = true;
        self.push(event).is_ok()
    }

    /// Whether a guest has less of the ring than its share, so that what others have to tell is not lost for it.
    fn has_share(&mut self, event: &Event, quarters: usize) -> bool {
        let Some(port) = guest(event) else { return true };
        let slots = self.ring.slots();
        self.owners.settle(self.capacity - slots);
        let left = slots.saturating_sub(RESERVED + self.capacity / 4 * quarters);
        self.owners.of(port) < left * SHARE
    }

    /// Puts an event in the ring, or gives it back. In the ring it is a pointer: all places of the ring come in use over
    /// time, and a process may have a thousand rings.
    fn push(&mut self, event: Event) -> Result<(), Event> {
        if self.ring.is_full() {
            return Err(event);
        }
        let owner = guest(&event);
        self.ring.push(Box::new(event)).map_err(|rtrb::PushError::Full(event)| *event)?;
        self.owners.settle(self.capacity - self.ring.slots() - 1);
        self.owners.note(owner);
        Ok(())
    }

    /// Sends what may not be lost.
    pub(crate) fn send_reliable(&mut self, event: Event) {
        self.dirty = true;
        if !self.overflow.is_empty() {
            self.overflow.push_back(event);
        } else if let Err(event) = self.push(event) {
            self.overflow.push_back(event);
        }
    }

    /// True while events that may not be lost wait for room.
    pub(crate) fn is_behind(&self) -> bool {
        !self.overflow.is_empty()
    }

    /// The end of a batch: moves what waits, wakes the consumer if it sleeps.
    pub(crate) fn flush(&mut self) {
        if !self.overflow.is_empty() {
            // Said before the ring is looked at, so that room made meanwhile is not missed.
            self.want_room();
            fence(Ordering::SeqCst);
            while let Some(event) = self.overflow.pop_front() {
                if let Err(event) = self.push(event) {
                    self.overflow.push_front(event);
                    break;
                }
            }
        }
        if std::mem::take(&mut self.dirty) {
            fence(Ordering::SeqCst);
            if self.shared.armed.swap(false, Ordering::SeqCst) {
                sys::eventfd_signal(&self.shared.fd);
            }
        }
    }
}

impl EventReceiver {
    pub(crate) fn signal(&self) -> EventSignal {
        EventSignal(Arc::clone(&self.shared))
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.shared.fd.as_raw_fd()
    }

    /// Up to `max` events, oldest first. When it returns fewer, the eventfd tells of more.
    pub(crate) fn drain(&self, max: usize) -> Vec<Event> {
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        sys::eventfd_clear(&self.shared.fd);
        let mut out = Vec::with_capacity(max.min(ring.slots()));
        let mut bytes = 0;
        let mut rest = false;
        loop {
            while out.len() < max {
                let Ok(event) = ring.pop() else { break };
                bytes += event.payload_len();
                out.push(*event);
            }
            if out.len() >= max {
                rest = true;
                break;
            }
            self.shared.armed.store(true, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            if ring.is_empty() {
                break;
            }
            // Something came in between; nobody needs to be woken for it.
            self.shared.armed.store(false, Ordering::SeqCst);
        }
        if rest {
            // The caller stopped early: it is to be called again.
            sys::eventfd_signal(&self.shared.fd);
        }
        self.shared.bytes.fetch_sub(bytes, Ordering::Relaxed);
        // The room is there before the wish for it is looked at; the worker does it the other way round.
        fence(Ordering::SeqCst);
        if !out.is_empty() && self.shared.wanted.swap(false, Ordering::SeqCst) {
            self.waker.wake();
        }
        out
    }
}

/// The end of a flow that carried nothing.
#[cfg(test)]
pub(crate) fn flow_closed(flow: guestnet_core::types::FlowId, port: PortId) -> effects::Event {
    effects::Event::FlowClosed {
        flow,
        port,
        bytes_out: 0,
        bytes_in: 0,
        packets_out: None,
        packets_in: None,
        rule: None,
        name: None,
        shown: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guestnet_core::types::{FlowId, ServiceId};
    use guestnet_wire::ether::Mac;

    fn pair(n: usize) -> (EventSender, EventReceiver) {
        channel(n, Arc::new(Waker::new().unwrap())).unwrap()
    }

    fn log(i: usize) -> Event {
        Event::Log { level: Level::Info, message: i.to_string() }
    }

    fn readable(fd: RawFd) -> bool {
        let mut p = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        #[allow(unsafe_code)]
        // SAFETY: one live pollfd.
        let n = unsafe { libc::poll(&mut p, 1, 0) };
        n == 1
    }

    #[test]
    fn the_eventfd_is_written_only_for_a_sleeping_consumer() {
        let (mut s, r) = pair(256);
        assert!(s.try_send(log(0)));
        assert!(!readable(r.fd()));
        s.flush();
        assert!(readable(r.fd()));
        // Not drained yet: no second write.
        s.try_send(log(1));
        s.flush();
        assert_eq!(r.drain(1).len(), 1);
        assert!(readable(r.fd()), "more is there");
        assert_eq!(r.drain(10).len(), 1);
        assert!(!readable(r.fd()));
        s.try_send(log(2));
        s.flush();
        assert!(readable(r.fd()));
    }

    #[test]
    fn what_may_not_be_lost_is_not() {
        let (mut s, r) = pair(128);
        let mut taken = 0;
        while s.try_send(log(taken)) {
            taken += 1;
        }
        assert_eq!((taken, s.dropped), (64, 1));
        for i in 0..200 {
            s.send_reliable(Event::Done { sequence: i, result: Ok(Value::None) });
        }
        s.flush();
        assert!(s.is_behind());
        let mut done = Vec::new();
        while done.len() < 200 {
            for e in r.drain(7) {
                if let Event::Done { sequence, .. } = e {
                    done.push(sequence);
                }
            }
            s.flush();
        }
        assert!(!s.is_behind() && done.is_sorted());
        assert!(r.waker.take(), "the worker was woken to go on");
    }

    /// What one guest's flows have to tell, or a guest in memory is sent, leaves room for what other guests
    /// ask of services.
    #[test]
    fn news_of_flows_and_frames_leave_room_for_services() {
        let (mut s, r) = pair(1024);
        let flow = FlowId { index: 1, generation: 2 };
        let closed = |port| Event::Core(flow_closed(flow, PortId(port)));
        let flows = (0..2000).filter(|i| s.try_send(closed(i % 300))).count();
        let frame = || Event::Frame { port: PortId(1), frame: vec![0; 60].into() };
        let frames = (0..2000).filter(|_| s.try_send(frame())).count();
        let asked = (0..2000).filter(|i| s.try_send(datagram_of(i % 300, 100))).count();
        assert_eq!((flows, frames, asked), (512 - RESERVED, 256, 256));
        assert_eq!(r.drain(2000).len(), flows + frames + asked);
        // Neither do the bytes of frames.
        let large = || Event::Frame { port: PortId(1), frame: vec![0; 65536].into() };
        while s.try_send(large()) {}
        assert!(s.try_send(datagram(65_507)));
    }

    /// One guest's events leave room for those of the same kind of others, and what was taken out counts no more.
    #[test]
    fn one_guest_does_not_fill_the_ring() {
        let (mut s, r) = pair(1024);
        let flow = FlowId { index: 1, generation: 2 };
        let closed = |port| Event::Core(flow_closed(flow, PortId(port)));
        let told = |s: &mut EventSender, port| (0..2000).filter(|_| s.try_send(closed(port))).count();
        for _ in 0..3 {
            let shares = [1, 2, 3].map(|port| told(&mut s, port));
            assert_eq!(shares, [359, 72, 14], "of {}", 512 - RESERVED);
            let asked = [1, 4].map(|port| (0..2000).filter(|_| s.try_send(datagram_of(port, 9))).count());
            assert!(asked[0] > 0 && asked[1] > 0, "{asked:?}");
            let all = shares.iter().chain(&asked).sum::<usize>();
            assert_eq!(r.drain(all / 2).len() + r.drain(2000).len(), all);
        }
        assert_eq!(s.owners.counts.values().sum::<usize>(), s.owners.order.iter().flatten().count());
    }

    #[test]
    fn who_finds_no_room_is_woken_when_there_is() {
        let (mut s, r) = pair(128);
        assert!(s.frame_room_or_wake());
        while s.try_send(log(0)) {}
        r.waker.take();
        assert!(!s.frame_room_or_wake());
        assert_eq!(r.drain(1000).len(), 64);
        assert!(r.waker.take());
        assert!(s.frame_room_or_wake());
    }

    fn datagram(len: usize) -> Event {
        datagram_of(1, len)
    }

    fn datagram_of(port: u32, len: usize) -> Event {
        let at = "192.0.2.1:53".parse().unwrap();
        Event::Core(effects::Event::Datagram {
            service: ServiceId(1),
            port: PortId(port),
            mac: Mac([2; 6]),
            src: at,
            dst: at,
            payload: vec![0; len].into(),
        })
    }

    #[test]
    fn payload_bytes_are_bounded() {
        let (mut s, r) = pair(1024);
        let n = (0..1000).filter(|_| s.try_send(datagram(65536))).count();
        assert_eq!(n, PAYLOAD_MAX / 65536);
        assert_eq!(r.drain(1000).len(), n);
        assert!(s.try_send(datagram(65536)));
    }
}
