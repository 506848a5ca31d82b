//! Theory of operation: a [`Shard`] is what one worker has of one network: a core, its attachments, sockets, queues and
//! an epoll instance of its own. The worker gives it rounds. A round hands what is ready to the core, a batch for each
//! descriptor; does timers and commands; tells the core what came up meanwhile; and sends what was put off.
//!
//! - Buffers belong to the thread and are lent for a round ([`Shard::exchange`]).
//! - A worker with one network lets it wait on its own epoll instance ([`Shard::wait`]), without a bound on a round.
//! - A worker with several gives each a bounded turn ([`Shard::turn`]); descriptors that are left keep their place in the
//!   list of ready ones, and the next turn goes on with them.
//! - A shard ends in steps ([`Shard::end_step`]), so that others on the thread do not wait for it.

use crate::attachment::arrivals::Listener;
use crate::attachment::quota::{Charge, Resource};
use crate::attachment::vhost_user;
use crate::control::capture::Closing;
use crate::control::command::{Queued, Value, Waker};
use crate::control::event::Event;
use crate::memory::slab::Slab;
use crate::os::epoll::{Token, until};
use crate::os::sys;
use crate::runtime::config::{DYNAMIC_PORTS, FIRST_DYNAMIC, PollingStrategy, WorkerConfig};
use crate::runtime::io_context::IoContext;
use crate::runtime::stats::{IoCounters, Published, StatsSnapshot};
use crate::runtime::threads::adaptive::Spinner;
use crate::runtime::threads::buffers::Buffers;
use crate::runtime::threads::turn::Turn;
use crate::uplink::forward::{ForwardParts, Listening, Resting};
use crate::uplink::proxy::Trouble;
use crate::uplink::udp::Inbox;
use guestnet_core::Network;
use guestnet_core::types::Time;
use std::collections::HashMap;
use std::ops::Range;
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
/// Rounds of telling the core and sending before other descriptors have their turn.
const SETTLE_ROUNDS: usize = 4;
/// Descriptors that a shard has by itself: an epoll instance, and an eventfd each way.
const OWN_DESCRIPTORS: u64 = 3;
/// How long the rest of a capture may take to be written when the network ends, in seconds.
const CAPTURE_END_S: u64 = 1;
/// Time of a step of the end, in nanoseconds, and between two looks at a capture that is being written then.
const END_STEP: u64 = 200_000;
const END_FLOWS: usize = 64;
const END_POLL: u64 = 1_000_000;

/// What one worker has of one network.
pub(crate) struct Shard {
    pub core: Network,
    pub io: IoContext,
    pub queue: rtrb::Consumer<Queued>,
    pub waker: Arc<Waker>,
    pub commands_waiting: bool,
    pub stopping: bool,
    stop: Arc<AtomicBool>,
    published: Arc<Published>,
    published_at: Time,
    unpublished: bool,
    strategy: PollingStrategy,
    spinner: Spinner,
    /// Events of the last poll that were not handled yet.
    ready: Range<usize>,
    /// The worker has something to do besides this network.
    pub worker_called: bool,
    /// The end has begun, and captures have until then.
    ending_until: Option<Time>,
    /// The kernel's memory that connections hold, and the most that they may.
    memory_held: Charge,
    most_memory: usize,
    /// What the epoll instance and the queues take.
    _own: Charge,
    /// Small writes of a batch are one call where the thread has io_uring.
    batched: bool,
    pub batch_size: usize,
    pub now: Time,
    /// A frame from a guest, behind its virtio header. Lent by the thread, as the next two are.
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
    /// Changes of the rules that are acknowledged when all flows have been judged again.
    pub policy_changes: Vec<u64>,
    capture_flush: Option<Time>,
    /// When it was seen last whether front-ends made this thread wait.
    pub looked_at: Time,
    /// It waited since the last round began.
    may_have_slept: bool,
    /// Until when they are looked at more closely.
    pub suspicious_until: Option<Time>,
}

impl Shard {
    pub(super) fn new(
        config: WorkerConfig,
        io: IoContext,
        queue: rtrb::Consumer<Queued>,
        waker: Arc<Waker>,
        published: Arc<Published>,
        stop: Arc<AtomicBool>,
    ) -> Shard {
        let now = sys::now();
        let most_memory = config.core.limits.socket_memory;
        let mut core = Network::new(config.core, now);
        // The worker lends one.
        core.exchange_scratch(&mut Vec::new());
        let (mut first, mut last) = (FIRST_DYNAMIC, u32::MAX);
        if let Some(p) = &io.links {
            core.share(p.count() as u16);
            core.take_peer_updates(p.room(), &mut Vec::new());
            first += p.me() as u32 * DYNAMIC_PORTS;
            last = first + (DYNAMIC_PORTS - 1);
        }
        let quota = Arc::clone(&io.quota);
        let mut own = Charge::new(&quota, Resource::Sockets);
        own.measured(OWN_DESCRIPTORS);
        Shard {
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
            spinner: Spinner::new(config.max_spins),
            ready: 0..0,
            worker_called: false,
            ending_until: None,
            memory_held: Charge::new(&quota, Resource::SocketMemory),
            most_memory,
            _own: own,
            batched: config.io_uring,
            batch_size: config.batch_size.clamp(1, 1024),
            now,
            frame: Vec::new(),
            stream_buffer: Vec::new(),
            inbox: Inbox::empty(),
            listeners: Slab::default(),
            listener_in_use: None,
            next_port: first,
            port_range: (first, last),
            listening: Slab::default(),
            forwards: HashMap::new(),
            resting: Resting::default(),
            closing: Vec::new(),
            policy_changes: Vec::new(),
            capture_flush: None,
            looked_at: now,
            may_have_slept: true,
            suspicious_until: None,
        }
    }

    pub(super) fn strategy(&self) -> PollingStrategy {
        self.strategy
    }

    /// Swaps the buffers of the thread for the empty ones of this shard, or back.
    pub(super) fn exchange(&mut self, b: &mut Buffers) {
        std::mem::swap(&mut self.frame, &mut b.frame);
        std::mem::swap(&mut self.stream_buffer, &mut b.stream);
        std::mem::swap(&mut self.inbox, &mut b.inbox);
        self.core.exchange_scratch(&mut b.scratch);
        self.io.exchange(b, self.batched);
    }

    /// Rounds until the network is to end, or the worker has something else to do.
    pub(super) fn run_alone(&mut self) -> Result<(), i32> {
        self.worker_called = false;
        if !self.ready.is_empty() {
            // What the last turn left.
            self.round(None);
        }
        while !self.stopping && !self.worker_called {
            let n = self.wait()?;
            self.ready = 0..n;
            self.round(None);
        }
        Ok(())
    }

    /// A turn of a network that shares its worker: a round of `ns` nanoseconds, which its last descriptor may exceed.
    /// Returns for how many nanoseconds it has nothing to do; `None`: until a descriptor is ready.
    pub(super) fn turn(&mut self, ns: u64) -> Result<Option<u64>, i32> {
        if let Some(p) = &self.io.links {
            p.wake_up();
        }
        self.may_have_slept = true;
        if self.ready.is_empty() {
            let n = self.io.poller.wait(Some(0))?;
            self.count_poll(n, false);
            self.ready = 0..n;
        }
        self.round(Some(ns));
        self.look_at_queues();
        self.look_for_stalls();
        let timeout = if self.ready.is_empty() { self.timeout() } else { Some(0) };
        Ok(self.before_sleep(timeout))
    }

    /// Handles what is ready, within `ns` nanoseconds where that is bounded, and everything else that is due.
    fn round(&mut self, ns: Option<u64>) {
        self.now = sys::now();
        self.io.now = self.now;
        self.looked_at = self.now;
        let any = !self.ready.is_empty();
        let until = ns.map(|ns| Time(self.now.0 + ns));
        let over = || until.is_some_and(|t| sys::now() >= t);
        if self.io.ports.had_front_ends {
            vhost_user::begin_round(std::mem::take(&mut self.may_have_slept));
        }
        if self.waker.take_urgent() {
            self.urgent_commands();
        }
        let mut again = self.io.ports.take_again().into_iter();
        for token in again.by_ref() {
            self.on_again(token);
            if over() {
                break;
            }
        }
        for token in again {
            self.io.ports.look_again(token, true);
        }
        while let Some(i) = self.ready.next() {
            if let Some(ready) = self.io.poller.ready(i) {
                self.dispatch(ready);
            }
            if over() {
                break;
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
        self.unpublished |= any || received;
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
            for sock in io.socks.local.take_gone() {
                self.core.stream_gone(sock);
            }
            for input in io.socks.local.take_input() {
                let (port, sock, ended) = (input.port, input.sock, input.ended);
                let n = self.core.stream_received(now, port, sock, &input.data, ended, io);
                io.socks.local.has_read(input, n);
            }
            for (flow, room) in io.socks.local.take_ready() {
                self.core.tcp_ready(now, flow, true, room, io);
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
        if let Some(cut) = self.core.take_flows_cut() {
            for sequence in std::mem::take(&mut self.policy_changes) {
                let result = Ok(Value::FlowsCut(cut));
                self.io.events.send_reliable(Event::Done { sequence, result });
            }
        }
        if self.io.socks.end_old_handshakes(self.now) {
            self.io.proxy_failed(Trouble::Silent);
        }
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
        self.finish_captures();
    }

    /// Acknowledges captures that are written.
    fn finish_captures(&mut self) {
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
        let handshake = self.io.socks.next_handshake();
        until(now, [self.core.next_timer(), publish, closing, capture, linger, handshake, retry, rest, late])
    }

    fn wait(&mut self) -> Result<usize, i32> {
        self.look_at_queues();
        self.look_for_stalls();
        let timeout = self.timeout();
        let mut n = 0;
        if timeout != Some(0) && self.strategy == PollingStrategy::Adaptive && self.unpublished {
            n = self.spin()?;
        }
        if n == 0 {
            let timeout = self.before_sleep(timeout);
            n = self.io.poller.wait(timeout)?;
            if let Some(p) = self.io.links.as_ref().filter(|_| timeout != Some(0)) {
                p.wake_up();
            }
            self.count_poll(n, timeout != Some(0));
        } else {
            self.count_ready(n);
        }
        Ok(n)
    }

    /// Prepares for sleep of up to `timeout` nanoseconds: queues that were looked at are to kick, and other workers are to
    /// wake this one. Returns how long it may sleep after all.
    fn before_sleep(&mut self, mut timeout: Option<u64>) -> Option<u64> {
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
        timeout
    }

    /// Polls without sleeping, as often as that has paid recently.
    fn spin(&mut self) -> Result<usize, i32> {
        let mut spinner = std::mem::take(&mut self.spinner);
        let found = spinner.spin(self.now, || {
            let n = self.io.poller.wait(Some(0))?;
            self.io.counters.polls += 1;
            if n > 0 || self.look_at_queues() || self.io.links.as_ref().is_some_and(|p| p.has_items()) {
                return Ok(Some(n));
            }
            self.io.counters.empty_spins += 1;
            Ok(None)
        });
        self.spinner = spinner;
        Ok(found?.unwrap_or(0))
    }

    fn count_poll(&mut self, n: usize, slept: bool) {
        self.io.counters.polls += 1;
        self.io.counters.wakeups += u64::from(slept);
        self.count_ready(n);
    }

    fn count_ready(&mut self, n: usize) {
        self.io.counters.ready_events += n as u64;
        if let Some(b) = self.io.counters.poll_histogram.get_mut(IoCounters::bucket(n)) {
            *b += 1;
        }
    }

    fn publish(&mut self) {
        self.hear_isolated();
        self.io.counters.events_dropped = self.io.events.dropped;
        let mut io = self.io.counters;
        if let Some(c) = &self.io.capture {
            io.capture_dropped += c.dropped();
        }
        self.share();
        self.published.write(&StatsSnapshot { core: self.core.counters(), io });
        self.published_at = self.now;
        self.unpublished = false;
    }

    /// Tells the process what this network holds, and the core what it may come to hold.
    fn share(&mut self) {
        self.memory_held.measured(self.core.socket_memory() as u64);
        let quota = &self.io.quota;
        let of_each = |all: u64| all / self.io.links.as_ref().map_or(1, |p| p.count() as u64);
        let descriptors = of_each(quota.budget(Resource::Sockets));
        let memory = of_each(quota.budget(Resource::SocketMemory));
        let memory = usize::try_from(memory).unwrap_or(usize::MAX).min(self.most_memory);
        self.core.set_shares(u32::try_from(descriptors).unwrap_or(u32::MAX), memory);
    }

    /// A step of the end of the network on this worker. Connections that guests have not ended are reset, or a part
    /// would look to the outside like the whole; then captures are finished. Returns when the next step is due; `None`: it
    /// has ended.
    pub(super) fn end_step(&mut self) -> Option<Time> {
        self.now = sys::now();
        self.io.now = self.now;
        if self.ending_until.is_none() {
            loop {
                let first = self.core.ports().map(|p| p.port).next();
                let Some(port) = first else { break };
                let more = self.core.close_flows_of(self.now, port, END_FLOWS, &mut self.io);
                if !more {
                    self.core.remove_port(self.now, port, &mut self.io);
                }
                self.io.flush();
                if more || sys::now().since(self.now) >= END_STEP {
                    return Some(self.now);
                }
            }
            self.io.socks.end_lingering();
            // Captures that end already were waited for by the caller of their command.
            self.ending_until = Some(self.now);
            if let Some(c) = self.io.capture.take() {
                self.end_capture(c, None);
                self.ending_until = Some(self.now.plus_s(CAPTURE_END_S));
            }
        }
        self.finish_captures();
        if !self.closing.is_empty() && self.ending_until.is_some_and(|t| self.now < t) {
            return Some(Time(self.now.0 + END_POLL));
        }
        self.publish();
        self.io.events.flush();
        None
    }
}
