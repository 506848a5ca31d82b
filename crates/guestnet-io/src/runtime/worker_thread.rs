//! Theory of operation: the threads of workers: what each starts with, its share of the limits, and how the
//! control side reaches and ends it.

use crate::attachment::quota::Pool;
use crate::control::command::{self, Command, CommandSender, QueueFull, Waker};
use crate::control::event::{self, Event, EventReceiver, EventSender};
use crate::os::epoll::{Kind, Poller, Token};
use crate::os::sys;
use crate::runtime::confinement;
use crate::runtime::io_context::IoContext;
use crate::runtime::shard_links::{self, ShardLinks, WorkerHandle};
use crate::runtime::stats::{Published, StatsSnapshot};
use crate::runtime::worker::{FLOWS_MAX, Worker, WorkerConfig};
use guestnet_core::config::Limits;
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Descriptors reported at once.
const READY_MAX: usize = 256;

/// A worker could not start.
#[derive(Debug, thiserror::Error)]
#[error("the worker cannot start: {what}: {}", crate::os::sys::error_text(source))]
pub struct IoError {
    what: &'static str,
    source: std::io::Error,
}

pub(crate) fn io_error(what: &'static str) -> impl Fn(i32) -> IoError {
    move |errno| IoError { what, source: std::io::Error::from_raw_os_error(errno) }
}

/// A running thread, as [`crate::runtime::worker_group::WorkerGroup`] has it.
pub(crate) struct WorkerThread {
    commands: Arc<CommandSender>,
    events: EventReceiver,
    waker: Arc<Waker>,
    published: Arc<Published>,
    healthy: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// The process that has the thread.
    process: u32,
}

/// What a thread starts with.
struct Seed {
    poller: Poller,
    waker: Arc<Waker>,
    events: (EventSender, EventReceiver),
    commands: Arc<CommandSender>,
    queue: rtrb::Consumer<(u64, Command)>,
}

fn seed(config: &WorkerConfig) -> Result<Seed, IoError> {
    let waker = Arc::new(Waker::new().map_err(io_error("no eventfd"))?);
    let poller = Poller::new(READY_MAX).map_err(io_error("no epoll"))?;
    let token = Token { kind: Kind::Waker, index: 0, generation: 0 };
    poller.add(waker.fd(), token, libc::EPOLLIN).map_err(io_error("no epoll"))?;
    let events = event::channel(config.event_ring, Arc::clone(&waker)).map_err(io_error("no eventfd"))?;
    let (commands, queue) = command::channel(config.command_ring);
    Ok(Seed { poller, waker, events, commands: Arc::new(commands), queue })
}

/// Starts the threads, as many as the configuration says; `loads` has a place for each. Raises the process's
/// soft limit of descriptors to its hard limit, since every relayed connection is one.
pub(crate) fn start(
    mut config: WorkerConfig,
    loads: &Arc<[AtomicU32]>,
) -> Result<Vec<WorkerThread>, IoError> {
    let n = loads.len();
    let limit = sys::raise_descriptor_limit();
    Pool::of_process().set_descriptors(limit.into());
    let descriptors = limit / n as u32;
    // A third of what TCP of the host may have; the rest is for its own, and for peers that are on it.
    config.core.limits.socket_memory = config.core.limits.socket_memory.min(sys::tcp_memory() / 3);
    config.core.limits = shares(config.core.limits, n as u32).within(for_sockets(descriptors));
    let seeds = (0..n).map(|_| seed(&config)).collect::<Result<Vec<_>, _>>()?;
    let mut links: Vec<Option<Box<ShardLinks>>> = (0..n).map(|_| None).collect();
    if n > 1 {
        let handle =
            |s: &Seed| WorkerHandle { waker: Arc::clone(&s.waker), commands: Arc::clone(&s.commands) };
        let handles: Vec<WorkerHandle> = seeds.iter().map(handle).collect();
        let linked = shard_links::join(&handles, loads).ok_or_else(|| io_error("no memory")(libc::ENOMEM))?;
        links = linked.into_iter().map(|p| Some(Box::new(p))).collect();
    }
    let all = seeds.into_iter().zip(links).enumerate();
    all.map(|(i, (seed, links))| {
        let mut config = config.clone();
        if i > 0 {
            config.name = format!("{}-{i}", config.name);
        }
        spawn(config, descriptors, seed, links)
    })
    .collect()
}

/// Of so many descriptors, those for sockets of flows: an eighth is for attachments and the control side.
fn for_sockets(descriptors: u32) -> u32 {
    descriptors - descriptors / 8
}

/// What one of `n` workers may use of what the Network may use. A guest has its own limits on whichever it is.
fn shares(mut l: Limits, n: u32) -> Limits {
    if n > 1 {
        l.flows = (l.flows / n).max(l.flows.min(l.flows_per_port)).min(FLOWS_MAX);
        l.socket_memory /= n as usize;
        l.reassembly_bytes /= n as usize;
        l.name_bytes /= n as usize;
        l.neighbour_waiting = l.neighbour_waiting.div_ceil(n);
    }
    l
}

fn spawn(
    config: WorkerConfig,
    descriptors: u32,
    seed: Seed,
    links: Option<Box<ShardLinks>>,
) -> Result<WorkerThread, IoError> {
    let Seed { poller, waker, events: (event_tx, event_rx), commands: command_tx, queue: command_rx } = seed;
    let published = Arc::new(Published::new());
    let healthy = Arc::new(AtomicBool::new(true));
    let stop = Arc::new(AtomicBool::new(false));
    let shared = (Arc::clone(&waker), Arc::clone(&published), Arc::clone(&healthy), Arc::clone(&stop));
    let name = config.name.clone();
    let main = move || {
        sys::block_signals();
        let confined = confinement::confine();
        let (waker, published, healthy, stop) = shared;
        let mut io = IoContext::new(poller, event_tx, config.io_uring);
        io.links = links;
        io.port_names = config.port_names.clone();
        io.socks.most = for_sockets(descriptors) as usize;
        let mut worker = Worker::new(config, io, command_rx, waker, published, stop);
        if let Err(what) = confined {
            worker.warn(format!("the packet thread is not confined as it should be: {what}"));
        }
        let ended = catch_unwind(AssertUnwindSafe(|| worker.run()));
        let failed = match ended {
            Ok(Ok(())) => None,
            Ok(Err(errno)) => Some(crate::attachment::reason("polling failed", errno)),
            Err(panic) => Some(panic_text(panic.as_ref())),
        };
        if let Some(message) = failed {
            worker.io.events.send_reliable(Event::Failed { message });
        }
        healthy.store(false, Ordering::SeqCst);
        let _end = catch_unwind(AssertUnwindSafe(|| worker.end()));
    };
    let thread = std::thread::Builder::new()
        .name(name)
        .spawn(main)
        .map_err(|source| IoError { what: "no thread", source })?;
    Ok(WorkerThread {
        commands: command_tx,
        events: event_rx,
        waker,
        published,
        healthy,
        stop,
        thread: Mutex::new(Some(thread)),
        process: std::process::id(),
    })
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    format!("the worker panicked: {}", text.unwrap_or_default())
}

impl WorkerThread {
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
        self.healthy.load(Ordering::SeqCst)
    }

    /// Asks it to end.
    pub(crate) fn end(&self) {
        if self.process == std::process::id() {
            self.stop.store(true, Ordering::SeqCst);
            self.waker.wake();
        }
    }

    pub(crate) fn stop(&self) {
        if self.process != std::process::id() {
            // A fork of the process has a copy of this, but not the thread: there is nobody to wait for, and
            // what is shared (the eventfd) is not ours to write to.
            return;
        }
        self.end();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(t) = thread {
            // A panic was caught inside and told as an event.
            let _ended = t.join();
        }
    }
}

impl Drop for WorkerThread {
    fn drop(&mut self) {
        self.stop();
    }
}
