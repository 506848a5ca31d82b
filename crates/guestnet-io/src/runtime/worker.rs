//! Theory of operation: a worker is one plain thread that owns a core and everything it touches, and finishes
//! what it reads. A round: wait; hand what is ready to the core, a batch per descriptor; do timers and
//! commands; tell the core what came up meanwhile; send what was put off. With nothing to do it sleeps until
//! a descriptor or the next timer; the adaptive strategy first polls a little, as long as that has paid of late.
//! A panic ends the worker, not the process, and is told as an event.

use crate::attachment::listener::{FIRST_DYNAMIC, Listener};
use crate::attachment::{FRAME_MAX, stream, vhost_user, vnet};
use crate::control::capture::Closing;
use crate::control::command::{Command, Value, Waker};
use crate::control::event::Event;
use crate::control::port_names::PortNames;
use crate::memory::slab::Slab;
use crate::os::epoll::{Token, until};
use crate::os::sys;
use crate::runtime::io_context::IoContext;
use crate::runtime::stats::{IoCounters, Published, StatsSnapshot};
use crate::runtime::turn::Turn;
use crate::runtime::worker_group;
use crate::uplink::forward::{ForwardParts, Listening, Resting};
use crate::uplink::udp::Inbox;
use guestnet_core::Network;
use guestnet_core::config::NetworkConfig;
use guestnet_core::types::Time;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Counters are published at least this often while there is work, in nanoseconds.
const PUBLISH: u64 = 10_000_000;
/// Captured frames are handed to the writer at least this often.
const CAPTURE_FLUSH: u64 = 100_000_000;
/// How often a capture that is ending is looked at.
const CLOSING_POLL: u64 = 5_000_000;
/// How soon updates of ports are sent again for which a ring had no room.
const UPDATE_RETRY: u64 = 200_000;
/// Flows of one of several workers: the rest of the number says which worker.
pub(crate) const FLOWS_MAX: u32 = 1 << 26;
/// Rounds of telling the core and sending before other descriptors have their turn.
const SETTLE_ROUNDS: usize = 4;
/// Polls that the adaptive strategy begins with.
const SPINS_FIRST: u32 = 16;
/// A poll that took longer, in nanoseconds: somebody else had the processor.
const TAKEN_AWAY: u64 = 30_000;
/// How long there is no spinning then, in milliseconds; doubled as long as it stays so.
const CROWDED_MIN: u64 = 2;
const CROWDED_MAX: u64 = 64;

/// What a worker does when nothing is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PollingStrategy {
    /// Polls for ever: shortest delay, one processor.
    Busy,
    /// Polls for a moment after work, then sleeps.
    #[default]
    Adaptive,
    /// Sleeps.
    EventDriven,
}

/// What a worker is to be like.
#[derive(Clone)]
pub struct WorkerConfig {
    /// The Network.
    pub core: NetworkConfig,
    /// What to do when nothing is ready.
    pub strategy: PollingStrategy,
    /// Frames of one guest before others have their turn, 1 to 1024.
    pub batch_size: usize,
    /// Most polls of the adaptive strategy before it sleeps.
    pub max_spins: u32,
    /// Events that wait for the control side, at least 128.
    pub event_ring: usize,
    /// Commands that wait for the worker, at least 16.
    pub command_ring: usize,
    /// Name of the thread.
    pub name: String,
    /// Threads that share the ports, 1 to 64.
    pub workers: usize,
    /// Small writes of a batch are one call by io_uring, where the system has it.
    pub io_uring: bool,
    /// What captures call the ports.
    pub port_names: PortNames,
}

impl WorkerConfig {
    /// With the usual sizes.
    #[must_use]
    pub fn new(core: NetworkConfig) -> WorkerConfig {
        WorkerConfig {
            core,
            strategy: PollingStrategy::default(),
            batch_size: 64,
            max_spins: 1000,
            event_ring: 8192,
            command_ring: 1024,
            name: "guestnet".into(),
            workers: 1,
            io_uring: true,
            port_names: PortNames::default(),
        }
    }
}

/// Everything of a worker.
pub(crate) struct Worker {
    pub core: Network,
    pub io: IoContext,
    pub queue: rtrb::Consumer<(u64, Command)>,
    pub waker: Arc<Waker>,
    pub commands_waiting: bool,
    pub stopping: bool,
    stop: Arc<AtomicBool>,
    published: Arc<Published>,
    published_at: Time,
    unpublished: bool,
    strategy: PollingStrategy,
    max_spins: u32,
    /// Polls that are tried now; moves with how often they pay.
    spins: u32,
    /// Others want the processor: none are tried until then.
    crowded_until: Option<Time>,
    /// How long that is next time, in milliseconds.
    crowded_for: u64,
    pub batch_size: usize,
    pub now: Time,
    /// A frame from a guest, behind its virtio header.
    pub frame: Vec<u8>,
    /// Many frames of a stream.
    pub stream_buffer: Vec<u8>,
    pub inbox: Inbox,
    pub listeners: Slab<Listener>,
    /// A listener that stays even when its last guest has gone.
    pub listener_in_use: Option<u32>,
    pub next_port: u32,
    pub port_range: (u32, u32),
    pub listening: Slab<Listening>,
    pub forwards: HashMap<u32, ForwardParts>,
    pub resting: Resting<Token>,
    /// Captures that are being finished, and what is to be acknowledged then.
    pub closing: Vec<(Closing, Option<u64>)>,
    capture_flush: Option<Time>,
    /// When it was seen last whether front-ends made this thread wait.
    pub looked_at: Time,
    /// It waited since the last round began.
    may_have_slept: bool,
    /// Until when they are looked at more closely.
    pub suspicious_until: Option<Time>,
}

impl Worker {
    pub(super) fn new(
        config: WorkerConfig,
        io: IoContext,
        queue: rtrb::Consumer<(u64, Command)>,
        waker: Arc<Waker>,
        published: Arc<Published>,
        stop: Arc<AtomicBool>,
    ) -> Worker {
        let now = sys::now();
        let mut core = Network::new(config.core, now);
        let (mut first, mut last) = (FIRST_DYNAMIC, u32::MAX);
        if let Some(p) = &io.links {
            core.share(p.count() as u16);
            core.take_peer_updates(p.room(), &mut Vec::new());
            first += p.me() as u32 * worker_group::DYNAMIC_PORTS;
            last = first + (worker_group::DYNAMIC_PORTS - 1);
        }
        Worker {
            core,
            io,
            queue,
            waker,
            commands_waiting: false,
            stopping: false,
            stop,
            published,
            published_at: now,
            unpublished: true,
            strategy: config.strategy,
            max_spins: config.max_spins,
            spins: SPINS_FIRST.min(config.max_spins),
            crowded_until: None,
            crowded_for: CROWDED_MIN,
            batch_size: config.batch_size.clamp(1, 1024),
            now,
            frame: vec![0; FRAME_MAX + vnet::LEN_MRG],
            stream_buffer: vec![0; stream::READ_BUFFER],
            inbox: Inbox::new(),
            listeners: Slab::default(),
            listener_in_use: None,
            next_port: first,
            port_range: (first, last),
            listening: Slab::default(),
            forwards: HashMap::new(),
            resting: Resting::default(),
            closing: Vec::new(),
            capture_flush: None,
            looked_at: now,
            may_have_slept: true,
            suspicious_until: None,
        }
    }

    pub(super) fn run(&mut self) -> Result<(), i32> {
        while !self.stopping {
            let n = self.wait()?;
            self.round(n);
        }
        Ok(())
    }

    /// One round, with `n` descriptors ready.
    fn round(&mut self, n: usize) {
        self.now = sys::now();
        self.io.now = self.now;
        self.looked_at = self.now;
        if self.io.ports.had_front_ends {
            vhost_user::begin_round(std::mem::take(&mut self.may_have_slept));
        }
        if self.waker.take_urgent() {
            self.urgent_commands();
        }
        for token in self.io.ports.take_again() {
            self.on_again(token);
        }
        for i in 0..n {
            if let Some(ready) = self.io.poller.ready(i) {
                self.dispatch(ready);
            }
        }
        let received = self.io.links.is_some() && self.receive_from_shards();
        if self.core.next_timer().is_some_and(|t| t <= self.now) {
            self.core.timers(self.now, &mut self.io);
        }
        self.housekeeping();
        if self.commands_waiting {
            self.commands();
        }
        self.stopping |= self.stop.load(Ordering::Relaxed);
        if self.core.has_more() {
            self.core.others_took(sys::now().since(self.now));
        }
        self.settle();
        self.io.events.flush();
        self.unpublished |= n > 0 || received;
        if self.unpublished && self.now.since(self.published_at) >= PUBLISH {
            self.publish();
        }
    }

    /// Tells the core what came up and sends what was put off, until there is nothing left of both.
    fn settle(&mut self) {
        let mut turn = Turn::new(self.now);
        for _ in 0..SETTLE_ROUNDS {
            let (now, io) = (self.now, &mut self.io);
            for (flow, result) in std::mem::take(&mut io.socks.outcomes) {
                self.core.tcp_connected(now, flow, result, io);
            }
            for e in std::mem::take(&mut io.socks.errors) {
                self.core.sock_error(now, e.flow, e.as_core(), io);
            }
            for port in std::mem::take(&mut io.ports.writable) {
                self.core.port_writable(now, port, io);
            }
            for port in std::mem::take(&mut self.io.ports.stalled) {
                self.socket_stalled(port);
            }
            while turn.has_time()
                && let Some((port, why)) = self.io.ports.down.pop_front()
            {
                self.remove_gone(port, why);
                turn.frame(0);
            }
            self.core.batch_end(self.now, &mut self.io);
            if let Some(p) = &mut self.io.links {
                p.tell(|room, out| self.core.take_peer_updates(room, out));
            }
            self.io.flush();
            if !self.io.has_news() || !turn.has_time() {
                return;
            }
        }
    }

    /// What is due besides the core's timers.
    fn housekeeping(&mut self) {
        self.resume();
        self.io.socks.end_old_lingering(&mut self.io.counters, self.now);
        if let Some(c) = &mut self.io.capture {
            if self.capture_flush.is_some_and(|t| t <= self.now) {
                self.capture_flush = None;
                if !c.flush(self.now) {
                    self.io.counters.capture_dropped += c.dropped();
                    self.io.capture = None;
                    self.warn("the capture ended: its file cannot be written".into());
                }
            } else if c.is_dirty() && self.capture_flush.is_none() {
                self.capture_flush = Some(Time(self.now.0 + CAPTURE_FLUSH));
            }
        }
        let mut i = 0;
        while let Some((closing, sequence)) = self.closing.get_mut(i) {
            let Some(written) = closing.poll() else {
                i += 1;
                continue;
            };
            let sequence = *sequence;
            self.closing.swap_remove(i);
            if !written {
                self.warn("the capture is not whole: its file could not be written to the end".into());
            }
            if let Some(sequence) = sequence {
                self.io.events.send_reliable(Event::Done { sequence, result: Ok(Value::None) });
            }
        }
    }

    /// How long to sleep at most; `None` without end.
    fn timeout(&self) -> Option<u64> {
        let busy = self.io.has_news()
            || self.core.has_more()
            || self.io.ports.has_again()
            || self.commands_waiting && !self.io.is_behind()
            || self.io.links.as_ref().is_some_and(|p| p.has_items());
        if busy || self.strategy == PollingStrategy::Busy {
            return Some(0);
        }
        let now = sys::now();
        let publish = self.unpublished.then_some(Time(self.published_at.0 + PUBLISH));
        let closing = (!self.closing.is_empty()).then_some(Time(self.now.0 + CLOSING_POLL));
        let capture = self.capture_flush;
        let linger = self.io.socks.lingering_until();
        let (retry, rest) = (self.io.ports.retry_at, self.resting.until);
        let late = self.io.links.as_ref().is_some_and(|p| p.is_behind());
        let late = late.then_some(Time(self.now.0 + UPDATE_RETRY));
        until(now, [self.core.next_timer(), publish, closing, capture, linger, retry, rest, late])
    }

    fn wait(&mut self) -> Result<usize, i32> {
        self.look_at_queues();
        self.look_for_stalls();
        let mut timeout = self.timeout();
        let mut n = 0;
        if timeout != Some(0) && self.strategy == PollingStrategy::Adaptive && self.unpublished {
            n = self.spin()?;
        }
        if n == 0 {
            // What spinning found in a queue, or of one, is not slept over.
            let found = self.io.has_news() || self.io.ports.has_again();
            let lingering = !self.io.ports.lingering.is_empty();
            if lingering {
                self.looked_at = sys::now();
            }
            if timeout != Some(0) && (found || self.rest_queues()) {
                timeout = Some(0);
            }
            if lingering {
                self.look_for_stalls();
                timeout = if self.io.has_news() { Some(0) } else { timeout };
            }
            let sleeps = timeout != Some(0);
            self.may_have_slept |= sleeps;
            if let Some(p) = self.io.links.as_ref().filter(|_| sleeps)
                && !p.fall_asleep()
            {
                timeout = Some(0);
            }
            n = self.io.poller.wait(timeout)?;
            if let Some(p) = self.io.links.as_ref().filter(|_| sleeps) {
                p.wake_up();
            }
            self.io.counters.polls += 1;
            self.io.counters.wakeups += u64::from(timeout != Some(0));
        }
        self.io.counters.ready_events += n as u64;
        if let Some(b) = self.io.counters.poll_histogram.get_mut(IoCounters::bucket(n)) {
            *b += 1;
        }
        Ok(n)
    }

    /// Polls without sleeping. How often follows from whether it found anything of late. Between two polls
    /// whoever else wants this processor has it, and where they keep it, it is not ours to spin on: a guest
    /// or server that waits for it would wait for us to stop waiting for them.
    fn spin(&mut self) -> Result<usize, i32> {
        if self.crowded_until.is_some_and(|t| self.now < t) {
            return Ok(0);
        }
        let mut before = sys::now();
        for _ in 0..self.spins {
            let n = self.io.poller.wait(Some(0))?;
            self.io.counters.polls += 1;
            if n > 0 || self.look_at_queues() || self.io.links.as_ref().is_some_and(|p| p.has_items()) {
                self.spins = (self.spins * 2).clamp(1, self.max_spins);
                self.crowded_for = CROWDED_MIN;
                return Ok(n);
            }
            self.io.counters.empty_spins += 1;
            sys::yield_now();
            let now = sys::now();
            if now.since(before) > TAKEN_AWAY {
                self.crowded_until = Some(now.plus_ms(self.crowded_for));
                self.crowded_for = (self.crowded_for * 2).min(CROWDED_MAX);
                return Ok(0);
            }
            before = now;
        }
        self.spins = (self.spins / 2).max(1).min(self.max_spins);
        Ok(0)
    }

    fn publish(&mut self) {
        self.hear_isolated();
        self.io.counters.events_dropped = self.io.events.dropped;
        let mut io = self.io.counters;
        if let Some(c) = &self.io.capture {
            io.capture_dropped += c.dropped();
        }
        self.published.write(&StatsSnapshot { core: self.core.counters(), io });
        self.published_at = self.now;
        self.unpublished = false;
    }

    /// The last things: connections (those that guests have not ended are reset, or a part would look to the
    /// outside like the whole), counters, captures, events.
    pub(super) fn end(&mut self) {
        let ports: Vec<_> = self.core.ports().map(|p| p.port).collect();
        for port in ports {
            self.core.remove_port(sys::now(), port, &mut self.io);
        }
        self.io.flush();
        self.io.socks.end_lingering();
        // Those that end already were waited for by who ended them.
        let mut deadline = sys::now();
        if let Some(c) = self.io.capture.take() {
            self.end_capture(c, None);
            deadline = deadline.plus_s(1);
        }
        while !self.closing.is_empty() && sys::now() < deadline {
            self.housekeeping();
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        self.publish();
        self.io.events.flush();
    }
}
