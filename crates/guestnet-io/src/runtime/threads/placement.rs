//! Theory of operation: a [`Runtime`] is the set of packet threads that networks of one process share. Each network is
//! placed on the threads with the fewest, one thread for each of its workers, and stays there. A thread starts when the
//! first network is placed on it and ends with its last one, so that a process without networks has no threads.
//!
//! Networks that name no runtime share the one of the process, which has a thread for each processor, and more where a
//! network asks for more workers. After a fork, the child has a copy of the parent's runtimes but none of their threads:
//! it gets a new runtime of its own, and the copies are refused.

use crate::runtime::config::WORKERS_MAX;
use crate::runtime::error::{IoError, system};
use crate::runtime::new_shard::NewShard;
use crate::runtime::threads::worker::{self, Mailbox};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Packet threads that networks share.
#[derive(Clone)]
pub struct Runtime {
    shared: Arc<Shared>,
}

struct Shared {
    name: String,
    /// Most threads; the runtime of the process has more where a network asks for more.
    workers: usize,
    of_process: bool,
    /// The process that has the threads.
    process: u32,
    threads: Mutex<Vec<Thread>>,
}

/// A thread, or the place of one.
#[derive(Default)]
struct Thread {
    networks: usize,
    running: Option<(Arc<Mailbox>, JoinHandle<()>)>,
}

/// The place of one network's worker on a thread, which it leaves when this is dropped.
pub(crate) struct Place {
    shared: Arc<Shared>,
    at: usize,
}

/// Processors that this process may use, up to [`WORKERS_MAX`].
#[must_use]
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(WORKERS_MAX)
}

impl Runtime {
    /// A runtime of up to `workers` threads, 1 to [`WORKERS_MAX`], called `name`, `name-1` and so on.
    #[must_use]
    pub fn new(name: &str, workers: usize) -> Runtime {
        Runtime::make(name, workers.clamp(1, WORKERS_MAX), false)
    }

    fn make(name: &str, workers: usize, of_process: bool) -> Runtime {
        let threads = Mutex::default();
        let shared = Shared {
            name: name.replace('\0', ""),
            workers,
            of_process,
            process: std::process::id(),
            threads,
        };
        Runtime { shared: Arc::new(shared) }
    }

    /// The runtime of networks that name none.
    #[must_use]
    pub fn of_process() -> Runtime {
        static OF_PROCESS: Mutex<Option<Runtime>> = Mutex::new(None);
        let mut slot = OF_PROCESS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(runtime) = slot.as_ref().filter(|r| !r.is_copy()) {
            return runtime.clone();
        }
        let new = Runtime::make("guestnet", processors(), true);
        // The threads of a copy are not ours to let go of.
        std::mem::forget(slot.replace(new.clone()));
        new
    }

    /// True in a fork of the process that made it.
    fn is_copy(&self) -> bool {
        self.shared.process != std::process::id()
    }

    /// Most threads.
    #[must_use]
    pub fn workers(&self) -> usize {
        self.shared.workers
    }

    /// Threads that run, and networks on them; a network counts once for each of its workers.
    #[must_use]
    pub fn load(&self) -> (usize, usize) {
        if self.is_copy() {
            return (0, 0);
        }
        let threads = self.shared.threads();
        let running = threads.iter().filter(|t| t.running.is_some()).count();
        (running, threads.iter().map(|t| t.networks).sum())
    }

    /// Places for the `n` workers of a network, on threads with the fewest networks.
    pub(crate) fn places(&self, n: usize) -> Result<Vec<Place>, IoError> {
        if self.is_copy() {
            return Err(IoError::Forked);
        }
        let mut threads = self.shared.threads();
        let workers = if self.shared.of_process { self.shared.workers.max(n) } else { self.shared.workers };
        if n > workers {
            return Err(IoError::TooFewWorkers { wanted: n, workers });
        }
        while threads.len() < workers {
            threads.push(Thread::default());
        }
        let mut order: Vec<usize> = (0..workers).collect();
        order.sort_by_key(|at| threads.get(*at).map_or(0, |t| t.networks));
        order.truncate(n);
        order.sort_unstable();
        let mut places = Vec::new();
        for at in order {
            if let Some(thread) = threads.get_mut(at) {
                thread.networks += 1;
                places.push(Place { shared: Arc::clone(&self.shared), at });
            }
        }
        Ok(places)
    }
}

impl Shared {
    fn threads(&self) -> MutexGuard<'_, Vec<Thread>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start_thread(&self, at: usize) -> Result<(Arc<Mailbox>, JoinHandle<()>), IoError> {
        let mailbox = Arc::new(Mailbox::new().map_err(system("no eventfd"))?);
        let poller = worker::poller(&mailbox).map_err(system("no epoll"))?;
        let name = if at == 0 { self.name.clone() } else { format!("{}-{at}", self.name) };
        let its = Arc::clone(&mailbox);
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || worker::main(its, poller))
            .map_err(|source| IoError::System { what: "no thread", source })?;
        Ok((mailbox, thread))
    }
}

impl Place {
    /// Starts a shard here, and the thread where it does not run.
    pub(crate) fn start(&self, new: NewShard) -> Result<(), IoError> {
        let mut threads = self.shared.threads();
        let Some(thread) = threads.get_mut(self.at) else { return Err(system("no thread")(libc::ENOENT)) };
        let mut new = Box::new(new);
        if let Some((mailbox, _)) = &thread.running {
            match mailbox.put(*new) {
                Ok(()) => return Ok(()),
                // The thread has failed.
                Err(back) => new = back,
            }
        }
        let (mailbox, handle) = self.shared.start_thread(self.at)?;
        if mailbox.put(*new).is_err() {
            return Err(system("no thread")(libc::ESRCH));
        }
        thread.running = Some((mailbox, handle));
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.shared.process != std::process::id() {
            return;
        }
        let ended = {
            let mut threads = self.shared.threads();
            let Some(thread) = threads.get_mut(self.at) else { return };
            thread.networks -= 1;
            if thread.networks == 0 { thread.running.take() } else { None }
        };
        if let Some((mailbox, thread)) = ended {
            mailbox.close();
            // What it failed with was reported to its networks.
            let _ended = thread.join();
        }
    }
}
