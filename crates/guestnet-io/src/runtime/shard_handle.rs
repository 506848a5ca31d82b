//! Theory of operation: the control side's half of a [`crate::runtime::shard::Shard`]: the ends of its queues, its
//! counters, and how it is stopped. A shard is made of a [`NewShard`], which travels to its worker; the worker's half holds a [`Presence`], whose
//! end is what [`ShardHandle::stop`] waits for.

use crate::attachment::quota::{Pool, Quota, Resource};
use crate::control::command::{self, Command, CommandSender, QueueFull, Queued, Waker};
use crate::control::event::{self, Event, EventReceiver, EventSender};
use crate::os::epoll::{Kind, Poller, Token};
use crate::os::sys;
use crate::runtime::config::{FLOWS_MAX, WorkerConfig};
use crate::runtime::error::{IoError, system};
use crate::runtime::links::{self, ShardLinks, WorkerHandle};
use crate::runtime::new_shard::{Life, NewShard, Presence};
use crate::runtime::stats::{Published, StatsSnapshot};
use crate::runtime::threads::placement::{Place, Runtime};
use guestnet_core::config::Limits;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Descriptors reported at once.
const READY_MAX: usize = 256;

/// A shard, as [`crate::runtime::group::WorkerGroup`] has it.
pub(crate) struct ShardHandle {
    commands: Arc<CommandSender>,
    events: EventReceiver,
    waker: Arc<Waker>,
    published: Arc<Published>,
    life: Arc<Life>,
    stop: Arc<AtomicBool>,
    place: Mutex<Option<Place>>,
    /// The process that has the thread.
    process: u32,
}

/// The two halves of a shard, apart from where it is to be.
struct Parts {
    poller: Poller,
    waker: Arc<Waker>,
    events: (EventSender, EventReceiver),
    commands: Arc<CommandSender>,
    queue: rtrb::Consumer<Queued>,
}

fn parts(config: &WorkerConfig) -> Result<Parts, IoError> {
    let waker = Arc::new(Waker::new().map_err(system("no eventfd"))?);
    let poller = Poller::new(READY_MAX).map_err(system("no epoll"))?;
    let token = Token { kind: Kind::Waker, index: 0, generation: 0 };
    poller.add(waker.fd(), token, libc::EPOLLIN).map_err(system("no epoll"))?;
    let events = event::channel(config.event_ring, Arc::clone(&waker)).map_err(system("no eventfd"))?;
    let (commands, queue) = command::channel(config.command_ring);
    Ok(Parts { poller, waker, events, commands: Arc::new(commands), queue })
}

/// Starts the shards of a network, one for each place in `loads`. Raises the process's soft limit of descriptors to its
/// hard limit, since every relayed connection is one.
pub(crate) fn start(
    runtime: &Runtime,
    mut config: WorkerConfig,
    loads: &Arc<[AtomicU32]>,
) -> Result<Vec<ShardHandle>, IoError> {
    let n = loads.len();
    let limit = sys::raise_descriptor_limit();
    let pool = Pool::of_process();
    // A third of what TCP of the host may have; the rest is for its own, and for peers that are on it.
    pool.set_limits(limit.into(), (sys::tcp_memory() / 3) as u64);
    let descriptors = u32::try_from(pool.all(Resource::Sockets)).unwrap_or(u32::MAX);
    let memory = usize::try_from(pool.all(Resource::SocketMemory)).unwrap_or(usize::MAX);
    config.core.limits.socket_memory = config.core.limits.socket_memory.min(memory);
    config.core.limits = shares(config.core.limits, n as u32).within(descriptors / n as u32);
    let quota = Quota::of_network(pool);
    let places = runtime.places(n)?;
    let all = (0..n).map(|_| parts(&config)).collect::<Result<Vec<_>, _>>()?;
    let mut links: Vec<Option<Box<ShardLinks>>> = (0..n).map(|_| None).collect();
    if n > 1 {
        let handle =
            |p: &Parts| WorkerHandle { waker: Arc::clone(&p.waker), commands: Arc::clone(&p.commands) };
        let handles: Vec<WorkerHandle> = all.iter().map(handle).collect();
        let linked = links::join(&handles, loads).ok_or_else(|| system("no memory")(libc::ENOMEM))?;
        links = linked.into_iter().map(|p| Some(Box::new(p))).collect();
    }
    let all = all.into_iter().zip(links).zip(places);
    all.map(|((parts, links), place)| start_one(config.clone(), Arc::clone(&quota), parts, links, place))
        .collect()
}

/// What one of `n` workers may use of what the network may use. A guest has its own limits on whichever it is.
fn shares(mut l: Limits, n: u32) -> Limits {
    if n > 1 {
        l.flows = (l.flows / n).max(l.flows.min(l.flows_per_port)).min(FLOWS_MAX);
        l.socket_memory /= n as usize;
        l.reassembly_bytes /= n as usize;
        l.name_bytes /= n as usize;
        l.dns_connections = l.dns_connections.div_ceil(n);
        l.neighbour_waiting = l.neighbour_waiting.div_ceil(n);
    }
    l
}

fn start_one(
    config: WorkerConfig,
    quota: Arc<Quota>,
    parts: Parts,
    links: Option<Box<ShardLinks>>,
    place: Place,
) -> Result<ShardHandle, IoError> {
    let (new, handle) = halves(config, quota, parts, links);
    place.start(new)?;
    *handle.place.lock().unwrap_or_else(PoisonError::into_inner) = Some(place);
    Ok(handle)
}

/// What goes to the worker, and what stays.
fn halves(
    config: WorkerConfig,
    quota: Arc<Quota>,
    parts: Parts,
    links: Option<Box<ShardLinks>>,
) -> (NewShard, ShardHandle) {
    let Parts { poller, waker, events: (events, receiver), commands, queue } = parts;
    let published = Arc::new(Published::new());
    let life = Arc::new(Life::default());
    let stop = Arc::new(AtomicBool::new(false));
    let presence = Presence { life: Arc::clone(&life), events: receiver.signal() };
    let new = NewShard {
        config,
        quota,
        poller,
        waker: Arc::clone(&waker),
        events,
        queue,
        links,
        published: Arc::clone(&published),
        stop: Arc::clone(&stop),
        presence,
    };
    let process = std::process::id();
    let place = Mutex::default();
    (new, ShardHandle { commands, events: receiver, waker, published, life, stop, place, process })
}

impl ShardHandle {
    pub(crate) fn event_fd(&self) -> RawFd {
        self.events.fd()
    }

    pub(crate) fn drain(&self, max: usize) -> Vec<Event> {
        self.events.drain(max)
    }

    pub(crate) fn submit(&self, command: Command) -> Result<u64, QueueFull> {
        let urgent = command.is_urgent();
        let sequence = self.commands.send(command)?;
        if urgent {
            self.waker.mark_urgent();
        }
        self.waker.wake();
        Ok(sequence)
    }

    pub(crate) fn has_room(&self) -> bool {
        self.commands.has_room()
    }

    pub(crate) fn stats(&self) -> StatsSnapshot {
        self.published.read()
    }

    pub(crate) fn is_healthy(&self) -> bool {
        !self.life.failed_or_ended.load(Ordering::SeqCst)
    }

    /// True in a fork of the process: it has a copy of this, but not the thread.
    pub(crate) fn is_copy(&self) -> bool {
        self.process != std::process::id()
    }

    pub(crate) fn has_ended(&self) -> bool {
        *self.life.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks it to end.
    pub(crate) fn end(&self) {
        if !self.is_copy() {
            self.stop.store(true, Ordering::SeqCst);
            self.waker.wake();
        }
    }

    /// Ends it and waits for that; the last one of a thread ends the thread.
    pub(crate) fn stop(&self) {
        if self.is_copy() {
            // There is nobody to wait for, and what is shared (the eventfd) is not ours to write to.
            return;
        }
        self.end();
        let mut ended = self.life.ended.lock().unwrap_or_else(PoisonError::into_inner);
        while !*ended {
            ended = self.life.changed.wait(ended).unwrap_or_else(PoisonError::into_inner);
        }
        drop(ended);
        drop(self.place.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

impl Drop for ShardHandle {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
impl NewShard {
    /// A network of one worker that is on no thread.
    pub(crate) fn alone(config: WorkerConfig, pool: &Arc<Pool>) -> (NewShard, ShardHandle) {
        let parts = parts(&config).unwrap();
        halves(config, Quota::of_network(pool), parts, None)
    }
}
