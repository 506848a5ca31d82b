//! Theory of operation: the control side's view of a Network's workers, as if they were one. Each guest is placed
//! on the worker with the fewest, and stays there; a command goes to the worker of its port, or to all where it is
//! about the Network, and is acknowledged once all have done it. Events of all are drained in turn. A published
//! port is at the worker that has its guest, and moves when the guest does: the sockets are kept here too, so no
//! client that waits in their queues is lost. One worker alone is driven directly, and nothing of this exists.

use crate::attachment::listener::FIRST_DYNAMIC;
use crate::control::capture::{Capture, SharedCapture};
use crate::control::command::{Command, CommandError, QueueFull, Value};
use crate::control::event::Event;
use crate::control::port_names::PortNames;
use crate::os::epoll::{Kind, Poller, Token};
use crate::os::sys;
use crate::runtime::shard_links;
use crate::runtime::stats::StatsSnapshot;
use crate::runtime::worker::{self, FLOWS_MAX, IoError, Thread, WorkerConfig};
use guestnet_core::effects;
use guestnet_core::types::{FlowId, ForwardId, PortId};
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most workers of one Network.
pub const WORKERS_MAX: usize = 64;
/// Numbers of ports that one of several workers has for guests of listeners.
pub(crate) const DYNAMIC_PORTS: u32 = (u32::MAX - FIRST_DYNAMIC) / WORKERS_MAX as u32 + 1;
/// Addresses that are remembered with their port.
const ADDRESSES_MAX: usize = 65_536;

/// The running workers of a Network.
pub struct Worker {
    threads: Vec<Thread>,
    several: Option<Several>,
    port_names: PortNames,
}

/// What it takes to make several look like one.
struct Several {
    /// Watches the eventfds of all.
    poller: Poller,
    /// Written when `ready` has something.
    told: OwnedFd,
    loads: Arc<[AtomicU32]>,
    book: Mutex<Book>,
}

#[derive(Default)]
struct Book {
    next: u64,
    /// Commands under way: by worker and its number for them.
    pending: HashMap<(usize, u64), u64>,
    joint: HashMap<u64, Joint>,
    ports: HashMap<PortId, usize>,
    addresses: HashMap<IpAddr, PortId>,
    forwards: HashMap<ForwardId, Published>,
    /// Forwards that are to end at a worker which had no room for the command.
    leftover: Vec<(usize, ForwardId)>,
    ready: VecDeque<Event>,
    /// Whose events are drained first.
    turn: usize,
}

/// A command that is not acknowledged yet.
struct Joint {
    left: usize,
    result: Result<Value, CommandError>,
    undo: Undo,
}

/// What is to be forgotten when a command failed, or (`Gone`) was done.
enum Undo {
    Nothing,
    Port(PortId, usize),
    Forward(ForwardId),
    Gone(PortId),
}

struct Published {
    proto: u8,
    guest: SocketAddr,
    fds: Vec<OwnedFd>,
    at: usize,
}

/// Starts the workers of a Network. Raises the process's soft limit of descriptors to its hard limit, since
/// every relayed connection is one.
///
/// # Errors
/// [`IoError`] when the system has no descriptor, memory or thread for it.
pub fn spawn(config: WorkerConfig) -> Result<Worker, IoError> {
    let n = config.workers.clamp(1, WORKERS_MAX);
    let loads: Arc<[AtomicU32]> = (0..n).map(|_| AtomicU32::new(0)).collect();
    let port_names = config.port_names.clone();
    let threads = worker::start(config, &loads)?;
    let several = if n > 1 { Some(Several::new(&threads, loads)?) } else { None };
    Ok(Worker { threads, several, port_names })
}

impl Several {
    fn new(threads: &[Thread], loads: Arc<[AtomicU32]>) -> Result<Several, IoError> {
        let poller = Poller::new(1).map_err(worker::io_error("no epoll"))?;
        let told = sys::eventfd().map_err(worker::io_error("no eventfd"))?;
        let token = Token { kind: Kind::Waker, index: 0, generation: 0 };
        let fds = threads.iter().map(Thread::event_fd).chain([told.as_raw_fd()]);
        for fd in fds {
            poller.add_raw(fd, token, libc::EPOLLIN).map_err(worker::io_error("no epoll"))?;
        }
        Ok(Several { poller, told, loads, book: Mutex::default() })
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An acknowledgement of our own.
    fn answer(&self, book: &mut Book, result: Result<Value, CommandError>) -> u64 {
        let sequence = book.number();
        book.ready.push_back(Event::Done { sequence, result });
        sys::eventfd_signal(&self.told);
        sequence
    }
}

impl Worker {
    /// Readable when there are events.
    #[must_use]
    pub fn event_fd(&self) -> RawFd {
        match (&self.several, self.threads.first()) {
            (Some(s), _) => s.poller.fd(),
            (None, Some(t)) => t.event_fd(),
            (None, None) => -1,
        }
    }

    /// Takes up to `max` events (and, of several workers, acknowledgements besides), those of one worker in
    /// their order. The descriptor of [`Worker::event_fd`] is readable again when there are more.
    #[must_use]
    pub fn drain(&self, max: usize) -> Vec<Event> {
        let Some(s) = &self.several else {
            return self.threads.first().map_or(Vec::new(), |t| t.drain(max));
        };
        let mut book = s.book();
        sys::eventfd_clear(&s.told);
        let mut out: Vec<Event> = book.ready.drain(..).collect();
        let n = self.threads.len();
        book.turn = (book.turn + 1) % n;
        for k in 0..n {
            let i = (book.turn + k) % n;
            let room = max.saturating_sub(out.len());
            let Some(t) = self.threads.get(i).filter(|_| room > 0) else { continue };
            for event in t.drain(room) {
                out.extend(self.heard(s, &mut book, i, event));
            }
        }
        self.tidy(&mut book);
        out
    }

    /// Names of ports for captures.
    #[must_use]
    pub fn port_names(&self) -> &PortNames {
        &self.port_names
    }

    /// Gives the workers something to do. The number comes back in [`Event::Done`].
    ///
    /// # Errors
    /// [`QueueFull`]; the command, and the descriptors in it, are dropped.
    pub fn submit(&self, command: Command) -> Result<u64, QueueFull> {
        match (&self.several, self.threads.first()) {
            (Some(s), _) => self.route(s, &mut s.book(), command),
            (None, Some(t)) => t.submit(command),
            (None, None) => Err(QueueFull),
        }
    }

    /// The counters of all workers, at most some 10 milliseconds old. `sockets_peak` is the sum of each one's.
    #[must_use]
    pub fn stats(&self) -> StatsSnapshot {
        let mut sum = StatsSnapshot::default();
        for t in &self.threads {
            sum.add(&t.stats());
        }
        sum
    }

    /// The counters of each worker.
    #[must_use]
    pub fn stats_of_each(&self) -> Vec<StatsSnapshot> {
        self.threads.iter().map(Thread::stats).collect()
    }

    /// False when a worker has ended, by [`Worker::stop`] or by a failure.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        self.threads.iter().all(Thread::is_healthy)
    }

    /// Ends the workers and waits for them. May be called again. What is being written to a capture gets a
    /// second to be finished; nothing else can make it wait.
    pub fn stop(&self) {
        self.threads.iter().for_each(Thread::end);
        self.threads.iter().for_each(Thread::stop);
    }

    // ---- commands of several workers ----------------------------------------------------------------

    fn route(&self, s: &Several, book: &mut Book, command: Command) -> Result<u64, QueueFull> {
        // So that a command for all is not done by some.
        if !self.threads.iter().all(Thread::has_room) {
            return Err(QueueFull);
        }
        match command {
            Command::AddPort { port, config } => {
                let known = book.ports.get(&port).copied();
                let to = known.unwrap_or_else(|| shard_links::choose(&s.loads));
                let addresses = config.addresses.clone();
                let undo = if known.is_some() { Undo::Nothing } else { Undo::Port(port, to) };
                book.ports.insert(port, to);
                let n = self.give(book, [(to, Command::AddPort { port, config })], undo)?;
                if known.is_none() {
                    self.settled(book, addresses, port);
                }
                Ok(n)
            }
            Command::RemovePort { port } => {
                let to = book.at(port, self.threads.len());
                self.give(book, [(to, command)], Undo::Gone(port))
            }
            Command::AttachTap { port, .. }
            | Command::AttachStream { port, .. }
            | Command::AttachDgram { port, .. }
            | Command::AttachVhostUser { port, .. }
            | Command::AttachMemory { port }
            | Command::ServiceSend { port, .. }
            | Command::KeepName { port, .. }
            | Command::Inject { port, .. } => {
                let to = book.at(port, self.threads.len());
                self.give(book, [(to, command)], Undo::Nothing)
            }
            Command::BindAddress { port, ip, .. } => {
                let to = book.at(port, self.threads.len());
                let n = self.give(book, [(to, command)], Undo::Nothing)?;
                self.settled(book, vec![ip], port);
                Ok(n)
            }
            Command::UnbindAddress { ip } => {
                book.addresses.remove(&ip);
                self.give_all(book, || Command::UnbindAddress { ip })
            }
            Command::Listen { listener, .. } | Command::StopListening { listener } => {
                let to = listener as usize % self.threads.len();
                self.give(book, [(to, command)], Undo::Nothing)
            }
            Command::AddService { service, proto, address, port, unix_path } => self.give_all(book, || {
                Command::AddService { service, proto, address, port, unix_path: unix_path.clone() }
            }),
            Command::SetNames { service, generation, own } => {
                self.give_all(book, || Command::SetNames { service, generation, own: own.clone() })
            }
            Command::ForgetGuestNames { generation } => {
                self.give_all(book, || Command::ForgetGuestNames { generation })
            }
            Command::AllowNames { generation, server } => {
                self.give_all(book, || Command::AllowNames { generation, server })
            }
            Command::AddForward { forward, proto, guest, fds } => {
                self.add_forward(book, forward, proto, guest, fds)
            }
            Command::RetargetForward { forward, guest } => self.retarget(book, forward, guest),
            Command::RemoveForward { forward } => {
                let at = book.forwards.remove(&forward).map_or(0, |f| f.at);
                self.give(book, [(at, command)], Undo::Nothing)
            }
            Command::StartCapture { fd, snaplen } => {
                match Capture::start(fd, snaplen, sys::now(), self.port_names.clone()) {
                    Ok(c) => {
                        let shared = SharedCapture::new(c);
                        self.give_all(book, || Command::ShareCapture(shared.clone()))
                    }
                    Err(e) => {
                        let errno = e.raw_os_error().unwrap_or(0);
                        Ok(s.answer(
                            book,
                            Err(CommandError::System { what: "the capture cannot start", errno }),
                        ))
                    }
                }
            }
            Command::StopCapture => self.give_all(book, || Command::StopCapture),
            Command::TellFlows { on } => self.give_all(book, || Command::TellFlows { on }),
            Command::ListFlows => self.give_all(book, || Command::ListFlows),
            Command::PortStats => self.give_all(book, || Command::PortStats),
            Command::Stop => self.give_all(book, || Command::Stop),
            // The translator has one table, which is one worker's.
            Command::AttachTun { .. } => Ok(s.answer(book, Err(CommandError::OneWorker))),
            Command::AddUplinkForward { .. } | Command::NatStats => {
                Ok(s.answer(book, Err(CommandError::NoUplink)))
            }
            Command::ShareCapture(_) | Command::Adopt(_) => Err(QueueFull),
        }
    }

    /// Gives commands to workers; one number for all of them.
    fn give(
        &self,
        book: &mut Book,
        commands: impl IntoIterator<Item = (usize, Command)>,
        undo: Undo,
    ) -> Result<u64, QueueFull> {
        let sequence = book.number();
        let mut left = 0;
        for (to, command) in commands {
            let number = self.threads.get(to).ok_or(QueueFull)?.submit(command)?;
            book.pending.insert((to, number), sequence);
            left += 1;
        }
        book.joint.insert(sequence, Joint { left, result: Ok(Value::None), undo });
        Ok(sequence)
    }

    fn give_all(&self, book: &mut Book, make: impl Fn() -> Command) -> Result<u64, QueueFull> {
        self.give(book, (0..self.threads.len()).map(|i| (i, make())), Undo::Nothing)
    }

    // ---- published ports ----------------------------------------------------------------------------

    fn add_forward(
        &self,
        book: &mut Book,
        forward: ForwardId,
        proto: u8,
        guest: SocketAddr,
        fds: Vec<OwnedFd>,
    ) -> Result<u64, QueueFull> {
        if let Some(at) = book.forwards.get(&forward).map(|f| f.at) {
            // Refused there.
            return self.give(book, [(at, add_forward(forward, proto, guest, fds))], Undo::Nothing);
        }
        let at = book.of_address(guest.ip(), self.threads.len()).unwrap_or(0);
        let kept = copies(&fds).ok_or(QueueFull)?;
        book.forwards.insert(forward, Published { proto, guest, fds: kept, at });
        self.give(book, [(at, add_forward(forward, proto, guest, fds))], Undo::Forward(forward))
    }

    fn retarget(&self, book: &mut Book, forward: ForwardId, guest: SocketAddr) -> Result<u64, QueueFull> {
        let to = book.of_address(guest.ip(), self.threads.len());
        let Some(f) = book.forwards.get_mut(&forward) else {
            return self.give(book, [(0, Command::RetargetForward { forward, guest })], Undo::Nothing);
        };
        let (from, proto) = (f.at, f.proto);
        f.guest = guest;
        match to.filter(|to| *to != from) {
            None => self.give(book, [(from, Command::RetargetForward { forward, guest })], Undo::Nothing),
            Some(to) => {
                let fds = copies(&f.fds).ok_or(QueueFull)?;
                f.at = to;
                let commands = [
                    (to, add_forward(forward, proto, guest, fds)),
                    (from, Command::RemoveForward { forward }),
                ];
                self.give(book, commands, Undo::Nothing)
            }
        }
    }

    /// Addresses are at a port: forwards to them go where it is.
    fn settled(&self, book: &mut Book, addresses: Vec<IpAddr>, port: PortId) {
        let to = book.at(port, self.threads.len());
        for ip in addresses {
            if book.addresses.len() < ADDRESSES_MAX || book.addresses.contains_key(&ip) {
                book.addresses.insert(ip, port);
            }
            let Book { forwards, leftover, .. } = &mut *book;
            for (id, f) in forwards.iter_mut().filter(|(_, f)| f.guest.ip() == ip && f.at != to) {
                let Some(fds) = copies(&f.fds) else { continue };
                let moved = self.threads.get(to).map(|t| t.submit(add_forward(*id, f.proto, f.guest, fds)));
                // A worker whose queue is full will do when the address is next heard of.
                if let Some(Ok(_)) = moved {
                    leftover.push((f.at, *id));
                    f.at = to;
                }
            }
        }
        self.tidy(book);
    }

    /// Ends what is left of forwards that have moved.
    fn tidy(&self, book: &mut Book) {
        let Book { leftover, forwards, .. } = &mut *book;
        leftover.retain(|(at, forward)| {
            // It may have come back meanwhile.
            forwards.get(forward).is_none_or(|f| f.at != *at)
                && self.threads.get(*at).is_some_and(|t| {
                    t.is_healthy() && t.submit(Command::RemoveForward { forward: *forward }).is_err()
                })
        });
    }

    // ---- events of several workers ------------------------------------------------------------------

    fn heard(&self, s: &Several, book: &mut Book, from: usize, event: Event) -> Option<Event> {
        match event {
            Event::Done { sequence, result } => {
                let number = book.pending.remove(&(from, sequence))?;
                let joint = book.joint.get_mut(&number)?;
                joint.left -= 1;
                merge(&mut joint.result, from, result);
                if joint.left > 0 {
                    return None;
                }
                let Joint { result, undo, .. } = book.joint.remove(&number)?;
                match undo {
                    Undo::Port(port, at) if result.is_err() => {
                        book.ports.remove(&port);
                        shard_links::unload(&s.loads, at);
                    }
                    Undo::Forward(forward) if result.is_err() => drop(book.forwards.remove(&forward)),
                    Undo::Gone(port) => book.gone(port),
                    _ => {}
                }
                Some(Event::Done { sequence: number, result })
            }
            Event::PortDown { port, reason } => {
                if port.0 >= FIRST_DYNAMIC {
                    book.gone(port);
                }
                Some(Event::PortDown { port, reason })
            }
            Event::Core(effects::Event::AddressSeen { port, address, .. }) => {
                self.settled(book, vec![address], port);
                Some(event)
            }
            Event::Core(mut event) => {
                use effects::Event::{FlowClosed, FlowOpened};
                if let FlowOpened { flow, .. } | FlowClosed { flow, .. } = &mut event {
                    numbered(flow, from);
                }
                Some(Event::Core(event))
            }
            Event::Failed { message } => Some(Event::Failed { message: format!("worker {from}: {message}") }),
            other => Some(other),
        }
    }
}

impl Book {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// The worker of a port; any for one that does not exist, which will say so.
    fn at(&self, port: PortId, workers: usize) -> usize {
        let dynamic = || port.0.checked_sub(FIRST_DYNAMIC).map(|n| (n / DYNAMIC_PORTS) as usize);
        self.ports.get(&port).copied().or_else(dynamic).filter(|at| *at < workers).unwrap_or(0)
    }

    fn of_address(&self, ip: IpAddr, workers: usize) -> Option<usize> {
        self.addresses.get(&ip).map(|p| self.at(*p, workers))
    }

    fn gone(&mut self, port: PortId) {
        self.ports.remove(&port);
        self.addresses.retain(|_, p| *p != port);
    }
}

fn add_forward(forward: ForwardId, proto: u8, guest: SocketAddr, fds: Vec<OwnedFd>) -> Command {
    Command::AddForward { forward, proto, guest, fds }
}

fn copies(fds: &[OwnedFd]) -> Option<Vec<OwnedFd>> {
    fds.iter().map(|fd| fd.try_clone().ok()).collect()
}

/// A flow's number among those of all workers.
fn numbered(flow: &mut FlowId, worker: usize) {
    flow.index |= worker as u32 * FLOWS_MAX;
}

/// Joins what two workers say to one command.
fn merge(sum: &mut Result<Value, CommandError>, from: usize, more: Result<Value, CommandError>) {
    match (sum, more) {
        (Ok(Value::Flows(all)), Ok(Value::Flows(more))) => all.extend(renumbered(more, from)),
        (Ok(Value::Ports(all)), Ok(Value::Ports(more))) => all.extend(more),
        (sum @ Ok(Value::None), Ok(Value::Flows(more))) => *sum = Ok(Value::Flows(renumbered(more, from))),
        (sum @ Ok(_), more @ (Err(_) | Ok(Value::Ports(_) | Value::Nat(_)))) => *sum = more,
        _ => {}
    }
}

fn renumbered(
    mut flows: Vec<guestnet_core::config::FlowInfo>,
    from: usize,
) -> Vec<guestnet_core::config::FlowInfo> {
    flows.iter_mut().for_each(|f| numbered(&mut f.flow, from));
    flows
}
