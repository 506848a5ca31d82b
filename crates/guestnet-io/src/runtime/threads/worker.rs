//! Theory of operation: a worker is one plain thread of a [`crate::runtime::threads::placement::Runtime`]. It serves the shards
//! of many networks and finishes what it reads.
//!
//! - With one network it lets that wait on its own epoll instance, so that nothing stands between the kernel and the
//!   network ([`Worker::serve_one`]).
//! - With several it watches their epoll instances from one of its own, keeps their next timers in one ordered set, and
//!   gives those that are due a turn of [`TURN`] each, in the order in which they became ready
//!   ([`Worker::serve_several`]). A network that has more to do goes to the end of the queue, so that a flood costs others
//!   one turn of it.
//! - A panic in a turn ends its network and is reported as its event. Buffers that the panic may have left half used are
//!   replaced, and the other networks go on.
//! - New networks come through a [`Mailbox`]; networks end in steps between the turns of others.

use crate::control::event::Event;
use crate::memory::slab::Slab;
use crate::os::epoll::{Kind, Poller, Token, until};
use crate::os::sys;
use crate::runtime::config::PollingStrategy;
use crate::runtime::new_shard::{NewShard, Presence};
use crate::runtime::shard::Shard;
use crate::runtime::threads::adaptive::Spinner;
use crate::runtime::threads::buffers::Buffers;
use crate::runtime::threads::confinement;
use guestnet_core::types::Time;
use std::collections::{BTreeSet, VecDeque};
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Time of one network's turn while it shares its worker, in nanoseconds.
const TURN: u64 = 250_000;
/// Networks reported at once.
const READY_MAX: usize = 256;
/// Most polls before a worker with several networks sleeps.
const SPINS_MAX: u32 = 1000;

/// How new networks come to a worker.
pub(crate) struct Mailbox {
    fd: OwnedFd,
    /// `None`: the worker takes no more.
    waiting: Mutex<Option<Vec<NewShard>>>,
}

impl Mailbox {
    pub(crate) fn new() -> Result<Mailbox, i32> {
        Ok(Mailbox { fd: sys::eventfd()?, waiting: Mutex::new(Some(Vec::new())) })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Vec<NewShard>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the worker a network.
    ///
    /// # Errors
    /// The network, where the worker has ended.
    pub(crate) fn put(&self, new: NewShard) -> Result<(), Box<NewShard>> {
        match &mut *self.lock() {
            Some(waiting) => waiting.push(new),
            None => return Err(Box::new(new)),
        }
        sys::eventfd_signal(&self.fd);
        Ok(())
    }

    /// The worker is to end once it has no network.
    pub(crate) fn close(&self) {
        *self.lock() = None;
        sys::eventfd_signal(&self.fd);
    }

    /// Takes what waits; `None` after the end.
    fn take(&self) -> Option<Vec<NewShard>> {
        sys::eventfd_clear(&self.fd);
        self.lock().as_mut().map(std::mem::take)
    }
}

/// A network on a worker.
struct Hosted {
    shard: Box<Shard>,
    /// Its place in the set of timers.
    due: Option<Time>,
    /// It is in the queue of those that have a turn.
    queued: bool,
    /// It is about to end, and its descriptors are not looked at any more.
    ending: bool,
    /// Tells the control side of the end, after everything else is dropped.
    presence: Presence,
}

/// Everything of one thread.
pub(crate) struct Worker {
    mailbox: Arc<Mailbox>,
    /// Watches the mailbox, and the epoll instances of networks while there are several.
    poller: Poller,
    watching: bool,
    networks: Slab<Hosted>,
    due: BTreeSet<(Time, u32)>,
    ready: VecDeque<u32>,
    /// A network had a turn since the worker slept.
    active: bool,
    spinner: Spinner,
    buffers: Buffers,
    /// What this thread could not give up.
    unconfined: Option<String>,
}

/// The body of a packet thread.
pub(crate) fn main(mailbox: Arc<Mailbox>, poller: Poller) {
    sys::block_signals();
    let unconfined = confinement::confine().err();
    let worker = Worker::new(Arc::clone(&mailbox), poller, unconfined);
    // Networks that are left when this fails end with it, and their control sides hear of it.
    let _failed = catch_unwind(AssertUnwindSafe(|| worker.run()));
    mailbox.close();
}

/// The poller of a worker.
pub(crate) fn poller(mailbox: &Mailbox) -> Result<Poller, i32> {
    let poller = Poller::new(READY_MAX)?;
    poller.add(&mailbox.fd, Token { kind: Kind::Worker, index: 0, generation: 0 }, libc::EPOLLIN)?;
    Ok(poller)
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    format!("the worker panicked: {}", text.unwrap_or_default())
}

impl Worker {
    /// For the calling thread.
    fn new(mailbox: Arc<Mailbox>, poller: Poller, unconfined: Option<String>) -> Worker {
        Worker {
            mailbox,
            poller,
            watching: false,
            networks: Slab::default(),
            due: BTreeSet::new(),
            ready: VecDeque::new(),
            active: false,
            spinner: Spinner::new(SPINS_MAX),
            buffers: Buffers::new(),
            unconfined,
        }
    }

    fn run(mut self) {
        loop {
            let open = self.take_new();
            if !open && self.networks.len() == 0 {
                return;
            }
            let served = match self.only() {
                Some(slot) => self.serve_one(slot),
                None => self.serve_several(),
            };
            if let Err(errno) = served {
                let slots: Vec<u32> = self.networks.iter().map(|(slot, _)| slot).collect();
                for slot in slots {
                    self.fail(slot, crate::attachment::reason("polling failed", errno));
                    while self.networks.get(slot).is_some() {
                        self.end_step(slot);
                    }
                }
                return;
            }
        }
    }

    /// Takes new networks in. False: there will be no more.
    fn take_new(&mut self) -> bool {
        let Some(new) = self.mailbox.take() else { return false };
        for new in new {
            let made = catch_unwind(AssertUnwindSafe(|| new.build()));
            // Its control side hears of the end when what is left of it is dropped.
            let Ok((mut shard, presence)) = made else { continue };
            if let Some(what) = &self.unconfined {
                shard.warn(format!("the packet thread is not confined as it should be: {what}"));
            }
            let slot =
                self.networks.insert(Hosted { shard, due: None, queued: false, ending: false, presence });
            if self.watching {
                self.watch(slot);
            }
            self.enqueue(slot);
        }
        true
    }

    /// The one network of this worker, where it has one that goes on.
    fn only(&self) -> Option<u32> {
        let (slot, hosted) = self.networks.iter().next()?;
        (self.networks.len() == 1 && !hosted.ending).then_some(slot)
    }

    // ---- one network --------------------------------------------------------------------------------

    fn serve_one(&mut self, slot: u32) -> Result<(), i32> {
        if std::mem::take(&mut self.watching) {
            self.unwatch(slot);
        }
        self.ready.clear();
        let Worker { networks, buffers, mailbox, .. } = self;
        let Some(hosted) = networks.get_mut(slot) else { return Ok(()) };
        hosted.queued = false;
        let shard = &mut hosted.shard;
        let token = Token { kind: Kind::Worker, index: 0, generation: 0 };
        shard.io.poller.add(&mailbox.fd, token, libc::EPOLLIN)?;
        shard.exchange(buffers);
        let ended = catch_unwind(AssertUnwindSafe(|| shard.run_alone()));
        shard.io.poller.remove_raw(mailbox.fd.as_raw_fd());
        match ended {
            Ok(result) => {
                shard.exchange(buffers);
                match result {
                    Ok(()) if shard.stopping => self.begin_end(slot),
                    Ok(()) => self.enqueue(slot),
                    Err(errno) => self.fail(slot, crate::attachment::reason("polling failed", errno)),
                }
            }
            Err(panic) => self.panicked(slot, panic.as_ref()),
        }
        Ok(())
    }

    // ---- several networks ---------------------------------------------------------------------------

    fn serve_several(&mut self) -> Result<(), i32> {
        if !std::mem::replace(&mut self.watching, true) {
            let slots: Vec<u32> = self.networks.iter().map(|(slot, _)| slot).collect();
            for slot in slots {
                self.watch(slot);
            }
        }
        let n = self.wait()?;
        for i in 0..n {
            let Some(event) = self.poller.ready(i) else { break };
            let Token { kind, index, generation } = event.token;
            if kind == Kind::Shard && self.networks.generation(index) == generation {
                self.enqueue(index);
            }
        }
        let now = sys::now();
        while let Some((time, slot)) = self.due.first().copied()
            && time <= now
        {
            self.enqueue(slot);
        }
        for _ in 0..self.ready.len() {
            let Some(slot) = self.ready.pop_front() else { break };
            let Some(hosted) = self.networks.get_mut(slot) else { continue };
            hosted.queued = false;
            if hosted.ending {
                self.end_step(slot);
            } else {
                self.turn(slot);
            }
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<usize, i32> {
        if !self.ready.is_empty() {
            return self.poller.wait(Some(0));
        }
        let timeout = until(sys::now(), [self.due.first().map(|(time, _)| *time)]);
        if timeout != Some(0) && std::mem::take(&mut self.active) {
            let Worker { poller, spinner, .. } = self;
            let found = spinner.spin(sys::now(), || Ok(Some(poller.wait(Some(0))?).filter(|n| *n > 0)))?;
            if let Some(n) = found {
                return Ok(n);
            }
        }
        // The time has passed on.
        let timeout = until(sys::now(), [self.due.first().map(|(time, _)| *time)]);
        self.poller.wait(timeout)
    }

    /// Watches the epoll instance of a network.
    fn watch(&mut self, slot: u32) {
        let token = Token { kind: Kind::Shard, index: slot, generation: self.networks.generation(slot) };
        let Some(hosted) = self.networks.get(slot).filter(|h| !h.ending) else { return };
        if let Err(errno) = self.poller.add_raw(hosted.shard.io.poller.fd(), token, libc::EPOLLIN) {
            self.fail(slot, crate::attachment::reason("the network cannot be watched", errno));
        }
    }

    fn unwatch(&self, slot: u32) {
        if let Some(hosted) = self.networks.get(slot) {
            self.poller.remove_raw(hosted.shard.io.poller.fd());
        }
    }

    /// A network is to have a turn, behind those that wait for theirs.
    fn enqueue(&mut self, slot: u32) {
        let Some(hosted) = self.networks.get_mut(slot) else { return };
        if let Some(time) = hosted.due.take() {
            self.due.remove(&(time, slot));
        }
        if !std::mem::replace(&mut hosted.queued, true) {
            self.ready.push_back(slot);
        }
    }

    /// A network is to have a turn at a time.
    fn schedule(&mut self, slot: u32, time: Option<Time>) {
        let Some(hosted) = self.networks.get_mut(slot) else { return };
        if hosted.due == time {
            return;
        }
        if let Some(old) = std::mem::replace(&mut hosted.due, time) {
            self.due.remove(&(old, slot));
        }
        if let Some(time) = time {
            self.due.insert((time, slot));
        }
    }

    fn turn(&mut self, slot: u32) {
        let Worker { networks, buffers, .. } = self;
        let Some(hosted) = networks.get_mut(slot) else { return };
        let shard = &mut hosted.shard;
        shard.exchange(buffers);
        let turn = match catch_unwind(AssertUnwindSafe(|| shard.turn(TURN))) {
            Ok(turn) => turn,
            Err(panic) => return self.panicked(slot, panic.as_ref()),
        };
        shard.exchange(buffers);
        self.active |= shard.strategy() == PollingStrategy::Adaptive;
        match turn {
            Ok(_) if shard.stopping => self.begin_end(slot),
            Ok(Some(0)) => self.enqueue(slot),
            Ok(ns) => self.schedule(slot, ns.map(|ns| Time(sys::now().0 + ns))),
            Err(errno) => self.fail(slot, crate::attachment::reason("polling failed", errno)),
        }
    }

    // ---- the end of a network -----------------------------------------------------------------------

    fn panicked(&mut self, slot: u32, panic: &(dyn std::any::Any + Send)) {
        // The network keeps the old ones, in which anything may be left.
        self.buffers = Buffers::new();
        self.fail(slot, panic_text(panic));
    }

    fn fail(&mut self, slot: u32, message: String) {
        if let Some(hosted) = self.networks.get_mut(slot) {
            hosted.shard.io.events.send_reliable(Event::Failed { message });
        }
        self.begin_end(slot);
    }

    fn begin_end(&mut self, slot: u32) {
        if self.watching {
            self.unwatch(slot);
        }
        if let Some(hosted) = self.networks.get_mut(slot) {
            hosted.ending = true;
            hosted.presence.unhealthy();
        }
        self.enqueue(slot);
    }

    fn end_step(&mut self, slot: u32) {
        let Worker { networks, buffers, .. } = self;
        let Some(hosted) = networks.get_mut(slot) else { return };
        let shard = &mut hosted.shard;
        shard.exchange(buffers);
        match catch_unwind(AssertUnwindSafe(|| shard.end_step())) {
            Ok(next) => {
                shard.exchange(buffers);
                if next.is_some() {
                    return self.schedule(slot, next);
                }
            }
            Err(_panic) => self.buffers = Buffers::new(),
        }
        self.schedule(slot, None);
        let gone = self.networks.remove(slot);
        let _panic = catch_unwind(AssertUnwindSafe(|| drop(gone)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attachment::quota::Pool;
    use crate::control::command::{Command, Value};
    use crate::runtime::config::WorkerConfig;
    use crate::runtime::shard_handle::ShardHandle;
    use guestnet_core::config::NetworkConfig;
    use guestnet_core::types::{ForwardId, PortConfig, PortId};
    use guestnet_wire::ether::Mac;
    use std::io::{ErrorKind, Read, Write};
    use std::net::{Ipv4Addr, TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    fn config() -> WorkerConfig {
        let (gateway, subnet) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 0));
        WorkerConfig::new(NetworkConfig::new(Mac([2, 0, 0, 0, 0, 1]), gateway, (subnet, 24), [7; 32]))
    }

    /// A worker without a thread, and the control sides of its networks.
    fn worker(networks: usize) -> (Worker, Vec<ShardHandle>) {
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let mut handles = Vec::new();
        for _ in 0..networks {
            let (new, handle) = NewShard::alone(config(), Pool::of_process());
            assert!(mailbox.put(new).is_ok());
            handles.push(handle);
        }
        let poller = poller(&mailbox).unwrap();
        let mut worker = Worker::new(mailbox, poller, None);
        assert!(worker.take_new());
        (worker, handles)
    }

    /// Guests on streams, each of which has sent `frames` broadcasts.
    fn guests(network: &ShardHandle, n: u32, frames: usize) -> Vec<UnixStream> {
        let guest = |i: u32| {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            let mut frame = [0; 4 + 60];
            frame[..4].copy_from_slice(&60u32.to_be_bytes());
            frame[4..10].copy_from_slice(&[0xff; 6]);
            frame[10..16].copy_from_slice(&[0x52, 0, 0, 0, 0, i as u8]);
            ours.write_all(&frame.repeat(frames)).unwrap();
            let addresses = vec![];
            let config = PortConfig {
                mac: None,
                addresses,
                mtu: 1500,
                gso_max: 65_450,
                lax_offload: false,
                uplink: false,
            };
            network.submit(Command::AddPort { port: PortId(i), config }).unwrap();
            network.submit(Command::AttachStream { port: PortId(i), fd: theirs.into() }).unwrap();
            ours
        };
        (1..=n).map(guest).collect()
    }

    fn frames(worker: &Worker, slot: u32) -> u64 {
        worker.networks.get(slot).map_or(0, |h| h.shard.core.counters().rx_frames)
    }

    fn acknowledged(network: &ShardHandle) -> usize {
        network
            .drain(1000)
            .iter()
            .filter(|e| matches!(e, Event::Done { result: Ok(Value::None), .. }))
            .count()
    }

    #[test]
    fn a_network_that_floods_leaves_another_its_turns() {
        let (mut worker, handles) = worker(2);
        let (many, each) = (100, 800);
        let _flood = guests(&handles[0], many, each);
        let _quiet = guests(&handles[1], 1, each);
        let mut rounds = 0;
        while frames(&worker, 1) < each as u64 {
            worker.serve_several().unwrap();
            rounds += 1;
            assert!(rounds < 1000, "the quiet network has its frames handled");
        }
        // One hundredth of the frames is the quiet network's. It would be done after nearly all of the other's in turns
        // without a bound.
        let flood = frames(&worker, 0);
        assert!(flood < u64::from(many) * each as u64 / 2, "{flood} frames in {rounds} rounds");
        while frames(&worker, 0) < u64::from(many) * each as u64 {
            worker.serve_several().unwrap();
            rounds += 1;
            assert!(rounds < 100_000, "none of the frames that a turn left is lost");
        }
        // Before the control sides, which wait for the end.
        drop(worker);
    }

    #[test]
    fn a_panic_ends_one_network_and_leaves_the_others_their_buffers() {
        let (mut worker, handles) = worker(3);
        let _guests = guests(&handles[0], 1, 1);
        handles[1].submit(Command::Panic).unwrap();
        while worker.networks.len() == 3 {
            worker.serve_several().unwrap();
        }
        assert!(handles[1].has_ended() && !handles[1].is_healthy());
        let told = handles[1].drain(1000);
        assert!(
            told.iter().any(|e| matches!(e, Event::Failed { message } if message.contains("as it was told"))),
            "{told:?}"
        );
        assert!(handles[1].submit(guestnet_core::NetworkCommand::ListFlows.into()).is_err());
        let _more = guests(&handles[2], 3, 100);
        while frames(&worker, 2) < 300 {
            worker.serve_several().unwrap();
        }
        assert!(frames(&worker, 0) == 1 && acknowledged(&handles[0]) == 2 && acknowledged(&handles[2]) == 6);
        assert!(handles[0].is_healthy() && handles[2].is_healthy());
        drop(worker);
        assert!(handles.iter().all(ShardHandle::has_ended));
    }

    #[test]
    fn a_network_is_served_by_itself_and_among_others_in_turn() {
        let (mut worker, mut handles) = worker(1);
        let mailbox = Arc::clone(&worker.mailbox);
        let _guests = guests(&handles[0], 1, 10);
        // Another comes: the one network lets the worker go, with nothing lost.
        let (new, handle) = NewShard::alone(config(), Pool::of_process());
        assert!(mailbox.put(new).is_ok());
        handles.push(handle);
        assert_eq!(worker.only(), Some(0));
        worker.serve_one(0).unwrap();
        assert!(worker.take_new() && worker.only().is_none());
        let _others = guests(&handles[1], 1, 10);
        while frames(&worker, 0) + frames(&worker, 1) < 20 {
            worker.serve_several().unwrap();
        }
        // It goes: the worker is for the first one again.
        handles[1].end();
        while worker.networks.len() == 2 {
            worker.serve_several().unwrap();
        }
        let _more = guests(&handles[0], 2, 10);
        handles[0].end();
        while worker.networks.len() == 1 {
            match worker.only() {
                Some(slot) => worker.serve_one(slot).unwrap(),
                None => worker.serve_several().unwrap(),
            }
        }
        assert!(handles.iter().all(ShardHandle::has_ended));
        assert!(worker.due.is_empty() && !worker.networks.iter().any(|_| true));
    }

    #[test]
    fn a_connection_beyond_the_networks_descriptors_is_reset_and_counted() {
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let pool = Pool::new(16, 0, 0);
        // What the network has by itself, and no more.
        pool.set_limits(3, 0);
        let (new, handle) = NewShard::alone(config(), &pool);
        assert!(mailbox.put(new).is_ok());
        let poller = poller(&mailbox).unwrap();
        let mut worker = Worker::new(mailbox, poller, None);
        assert!(worker.take_new());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (forward, proto, guest) = (ForwardId(1), 6, "10.0.0.2:80".parse().unwrap());
        let entry = guestnet_core::policy::Entry::Published;
        handle
            .submit(Command::AddForward { forward, proto, guest, entry, fds: vec![listener.into()] })
            .unwrap();
        let mut client = TcpStream::connect(address).unwrap();
        let refused = |w: &Worker| w.networks.get(0).map_or(0, |h| h.shard.io.counters.connections_refused);
        while refused(&worker) == 0 {
            worker.serve_several().unwrap();
        }
        assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert_eq!(refused(&worker), 1);
        drop(worker);
        assert!(handle.has_ended());
    }

    #[test]
    fn a_network_that_is_done_needs_no_turn_until_its_next_timer() {
        for strategy in [PollingStrategy::Adaptive, PollingStrategy::EventDriven] {
            let mailbox = Arc::new(Mailbox::new().unwrap());
            let config = WorkerConfig { strategy, ..config() };
            let (new, handle) = NewShard::alone(config, Pool::of_process());
            assert!(mailbox.put(new).is_ok());
            let poller = poller(&mailbox).unwrap();
            let mut worker = Worker::new(mailbox, poller, None);
            assert!(worker.take_new());
            let _guests = guests(&handle, 2, 10);
            // Counters are published a moment after the last frame; then nothing is left.
            while frames(&worker, 0) < 20 || worker.due.first().is_some() || !worker.ready.is_empty() {
                worker.serve_several().unwrap();
            }
            assert_eq!(handle.stats().core.rx_frames, 20);
            drop(worker);
        }
    }
}
