//! Theory of operation: the control side's view of a Network's workers, as if they were one. Each guest is placed
//! on the worker with the fewest, and stays there; a command goes to the worker of its port, or to all where it is
//! about the Network, and is acknowledged once all have done it. Events of all are drained in turn. A published
//! port is at the worker that has its guest, and moves when the guest does: the sockets are kept here too, so no
//! client that waits in their queues is lost. One worker alone is driven directly, and nothing of this exists.

use crate::attachment::listener::FIRST_DYNAMIC;
use crate::control::capture::{Capture, SharedCapture};
use crate::control::command::{Command, CommandError, QueueFull, SubmitError, Value};
use crate::control::event::Event;
use crate::control::port_names::PortNames;
use crate::os::epoll::{Kind, Poller, Token};
use crate::os::sys;
use crate::runtime::placement::{IoError, Runtime, system};
use crate::runtime::shard::{FLOWS_MAX, WorkerConfig};
use crate::runtime::shard_handle::{self, ShardHandle};
use crate::runtime::shard_links;
use crate::runtime::stats::StatsSnapshot;
use guestnet_core::config::ForwardSpec;
use guestnet_core::effects;
use guestnet_core::types::{FlowId, ForwardId, PortConfig, PortId};
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
pub struct WorkerGroup {
    shards: Vec<ShardHandle>,
    router: Option<Router>,
    port_names: PortNames,
}

/// What it takes to make several look like one.
struct Router {
    /// Watches the eventfds of all.
    poller: Poller,
    /// Written when `ready` has something.
    ready_fd: OwnedFd,
    loads: Arc<[AtomicU32]>,
    table: Mutex<RoutingTable>,
}

#[derive(Default)]
struct RoutingTable {
    next: u64,
    /// Commands under way: by worker and its number for them.
    in_flight: HashMap<(usize, u64), u64>,
    pending: HashMap<u64, PendingCommand>,
    ports: HashMap<PortId, usize>,
    addresses: HashMap<IpAddr, PortId>,
    forwards: HashMap<ForwardId, Published>,
    /// Forwards that are to end at a worker which had no room for the command.
    stale_forwards: Vec<(usize, ForwardId)>,
    ready: VecDeque<Event>,
    /// Whose events are drained first.
    turn: usize,
}

/// A command that is not acknowledged yet.
struct PendingCommand {
    left: usize,
    result: Result<Value, CommandError>,
    rollback: Rollback,
}

/// What is to be forgotten when a command failed, or (`PortGone`) was done.
enum Rollback {
    None,
    Port(PortId, usize),
    Forward(ForwardId),
    PortGone(PortId),
}

struct Published {
    spec: ForwardSpec,
    fds: Vec<OwnedFd>,
    at: usize,
}

/// Starts a network on the runtime of the process. Raises the process's soft limit of descriptors to its hard limit, since
/// every relayed connection is one.
///
/// # Errors
/// [`IoError`] when the system has no descriptor, memory or thread for it.
pub fn spawn(config: WorkerConfig) -> Result<WorkerGroup, IoError> {
    spawn_on(&Runtime::of_process(), config)
}

pub(crate) fn spawn_on(runtime: &Runtime, config: WorkerConfig) -> Result<WorkerGroup, IoError> {
    let n = config.workers.clamp(1, WORKERS_MAX);
    let loads: Arc<[AtomicU32]> = (0..n).map(|_| AtomicU32::new(0)).collect();
    let port_names = config.port_names.clone();
    let shards = shard_handle::start(runtime, config, &loads)?;
    let router = if n > 1 { Some(Router::new(&shards, loads)?) } else { None };
    Ok(WorkerGroup { shards, router, port_names })
}

impl Router {
    fn new(shards: &[ShardHandle], loads: Arc<[AtomicU32]>) -> Result<Router, IoError> {
        let poller = Poller::new(1).map_err(system("no epoll"))?;
        let ready_fd = sys::eventfd().map_err(system("no eventfd"))?;
        let token = Token { kind: Kind::Waker, index: 0, generation: 0 };
        let fds = shards.iter().map(ShardHandle::event_fd).chain([ready_fd.as_raw_fd()]);
        for fd in fds {
            poller.add_raw(fd, token, libc::EPOLLIN).map_err(system("no epoll"))?;
        }
        Ok(Router { poller, ready_fd, loads, table: Mutex::default() })
    }

    fn table(&self) -> MutexGuard<'_, RoutingTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An acknowledgement of our own.
    fn acknowledge(&self, table: &mut RoutingTable, result: Result<Value, CommandError>) -> u64 {
        let sequence = table.number();
        table.ready.push_back(Event::Done { sequence, result });
        sys::eventfd_signal(&self.ready_fd);
        sequence
    }
}

impl WorkerGroup {
    /// Readable when there are events.
    #[must_use]
    pub fn event_fd(&self) -> RawFd {
        match (&self.router, self.shards.first()) {
            (Some(s), _) => s.poller.fd(),
            (None, Some(t)) => t.event_fd(),
            (None, None) => -1,
        }
    }

    /// Takes up to `max` events (and, of several workers, acknowledgements besides), those of one worker in
    /// their order. The descriptor of [`WorkerGroup::event_fd`] is readable again when there are more.
    #[must_use]
    pub fn drain(&self, max: usize) -> Vec<Event> {
        let Some(s) = &self.router else {
            return self.shards.first().map_or(Vec::new(), |t| t.drain(max));
        };
        let mut table = s.table();
        sys::eventfd_clear(&s.ready_fd);
        let mut out: Vec<Event> = table.ready.drain(..).collect();
        let n = self.shards.len();
        table.turn = (table.turn + 1) % n;
        for k in 0..n {
            let i = (table.turn + k) % n;
            let room = max.saturating_sub(out.len());
            let Some(t) = self.shards.get(i).filter(|_| room > 0) else { continue };
            for event in t.drain(room) {
                out.extend(self.handle_event(s, &mut table, i, event));
            }
        }
        self.remove_stale_forwards(&mut table);
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
    /// [`SubmitError`]; the command, and the descriptors in it, are dropped.
    pub fn submit(&self, command: Command) -> Result<u64, SubmitError> {
        if self.shards.first().is_some_and(ShardHandle::is_copy) {
            return Err(SubmitError::Forked);
        }
        let number = match (&self.router, self.shards.first()) {
            (Some(s), _) => self.route(s, &mut s.table(), command),
            (None, Some(t)) => t.submit(command),
            (None, None) => Err(QueueFull),
        };
        number.map_err(SubmitError::from)
    }

    /// The counters of all workers, at most some 10 milliseconds old. `sockets_peak` is the sum of each one's.
    #[must_use]
    pub fn stats(&self) -> StatsSnapshot {
        let mut sum = StatsSnapshot::default();
        for t in &self.shards {
            sum.add(&t.stats());
        }
        sum
    }

    /// The counters of each worker.
    #[must_use]
    pub fn stats_of_each(&self) -> Vec<StatsSnapshot> {
        self.shards.iter().map(ShardHandle::stats).collect()
    }

    /// False when a worker has ended, by [`WorkerGroup::stop`] or by a failure.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        self.shards.iter().all(ShardHandle::is_healthy)
    }

    /// Asks the workers to end, and does not wait: [`WorkerGroup::event_fd`] becomes readable when they have.
    pub fn begin_stop(&self) {
        self.shards.iter().for_each(ShardHandle::end);
    }

    /// True when nothing of the network runs any more.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.shards.iter().all(ShardHandle::has_ended)
    }

    /// Ends the workers and waits for them. May be called again. What is being written to a capture gets a
    /// second to be finished; nothing else can make it wait.
    pub fn stop(&self) {
        self.shards.iter().for_each(ShardHandle::end);
        self.shards.iter().for_each(ShardHandle::stop);
    }

    // ---- commands of several workers ----------------------------------------------------------------

    fn route(&self, router: &Router, table: &mut RoutingTable, command: Command) -> Result<u64, QueueFull> {
        // So that a command for all is not done by some. Only the control side takes this room.
        if !self.shards.iter().all(ShardHandle::has_room) {
            return Err(QueueFull);
        }
        match command {
            Command::AddPort { port, config } => self.add_port(router, table, port, config),
            Command::RemovePort { port } => {
                let to = table.at(port, self.shards.len());
                self.submit_to(table, [(to, command)], Rollback::PortGone(port))
            }
            Command::AttachTap { port, .. }
            | Command::AttachStream { port, .. }
            | Command::AttachDgram { port, .. }
            | Command::AttachVhostUser { port, .. }
            | Command::AttachMemory { port }
            | Command::ServiceSend { port, .. }
            | Command::DnsVerdict { port, .. }
            | Command::Inject { port, .. } => {
                let to = table.at(port, self.shards.len());
                self.submit_to(table, [(to, command)], Rollback::None)
            }
            Command::BindAddress { port, ip, .. } => {
                let to = table.at(port, self.shards.len());
                let n = self.submit_to(table, [(to, command)], Rollback::None)?;
                self.bind_addresses(table, vec![ip], port);
                Ok(n)
            }
            Command::UnbindAddress { ip } => {
                let n = self.submit_to_all(table, || Command::UnbindAddress { ip })?;
                table.addresses.remove(&ip);
                Ok(n)
            }
            Command::Listen { listener, .. } | Command::StopListening { listener } => {
                let to = listener as usize % self.shards.len();
                self.submit_to(table, [(to, command)], Rollback::None)
            }
            Command::AddService { service, proto, address, port, unix_path } => {
                self.submit_to_all(table, || Command::AddService {
                    service,
                    proto,
                    address,
                    port,
                    unix_path: unix_path.clone(),
                })
            }
            Command::SetDnsZones { service, generation, own } => {
                self.submit_to_all(table, || Command::SetDnsZones { service, generation, own: own.clone() })
            }
            Command::ForgetGuestNames { generation } => {
                self.submit_to_all(table, || Command::ForgetGuestNames { generation })
            }
            Command::SetNameServers { servers } => {
                self.submit_to_all(table, || Command::SetNameServers { servers: servers.clone() })
            }
            Command::AddForward { forward, proto, guest, entry, fds } => {
                self.add_forward(table, forward, ForwardSpec { proto, guest, entry }, fds)
            }
            Command::RetargetForward { forward, guest } => self.retarget(table, forward, guest),
            Command::RemoveForward { forward } => {
                let at = table.forwards.get(&forward).map_or(0, |f| f.at);
                let n = self.submit_to(table, [(at, command)], Rollback::None)?;
                table.forwards.remove(&forward);
                Ok(n)
            }
            Command::StartCapture { fd, snaplen } => {
                match Capture::start(fd, snaplen, sys::now(), self.port_names.clone()) {
                    Ok(c) => {
                        let shared = SharedCapture::new(c);
                        self.submit_to_all(table, || Command::ShareCapture(shared.clone()))
                    }
                    Err(e) => {
                        let errno = e.raw_os_error().unwrap_or(0);
                        Ok(router.acknowledge(
                            table,
                            Err(CommandError::System { what: "the capture cannot start", errno }),
                        ))
                    }
                }
            }
            Command::StopCapture => self.submit_to_all(table, || Command::StopCapture),
            Command::SetPolicy { mode, isolated } => {
                self.submit_to_all(table, || Command::SetPolicy { mode, isolated: isolated.clone() })
            }
            Command::SetRules { port, table: rules } => {
                self.submit_to_all(table, || Command::SetRules { port, table: rules.clone() })
            }
            Command::SetHostAddresses { addresses } => {
                self.submit_to_all(table, || Command::SetHostAddresses { addresses: addresses.clone() })
            }
            Command::EnableFlowEvents { flows, denials } => {
                self.submit_to_all(table, || Command::EnableFlowEvents { flows, denials })
            }
            Command::ListFlows => self.submit_to_all(table, || Command::ListFlows),
            Command::PortStats => self.submit_to_all(table, || Command::PortStats),
            Command::Stop => self.submit_to_all(table, || Command::Stop),
            #[cfg(test)]
            Command::Panic => self.submit_to(table, [(0, command)], Rollback::None),
            // The translator has one table, which is one worker's.
            Command::AttachTun { .. } => Ok(router.acknowledge(table, Err(CommandError::OneWorker))),
            Command::AddUplinkForward { .. } | Command::NatStats => {
                Ok(router.acknowledge(table, Err(CommandError::NoUplink)))
            }
            Command::ShareCapture(_) | Command::Adopt(_) => Err(QueueFull),
        }
    }

    /// Gives commands to workers; one number for all of them.
    fn submit_to(
        &self,
        table: &mut RoutingTable,
        commands: impl IntoIterator<Item = (usize, Command)>,
        rollback: Rollback,
    ) -> Result<u64, QueueFull> {
        let sequence = table.number();
        let mut left = 0;
        for (to, command) in commands {
            let number = self.shards.get(to).ok_or(QueueFull)?.submit(command)?;
            table.in_flight.insert((to, number), sequence);
            left += 1;
        }
        table.pending.insert(sequence, PendingCommand { left, result: Ok(Value::None), rollback });
        Ok(sequence)
    }

    fn submit_to_all(&self, table: &mut RoutingTable, make: impl Fn() -> Command) -> Result<u64, QueueFull> {
        self.submit_to(table, (0..self.shards.len()).map(|i| (i, make())), Rollback::None)
    }

    fn add_port(
        &self,
        router: &Router,
        table: &mut RoutingTable,
        port: PortId,
        config: PortConfig,
    ) -> Result<u64, QueueFull> {
        let addresses = config.addresses.clone();
        let command = Command::AddPort { port, config };
        if let Some(at) = table.ports.get(&port).copied() {
            // Refused there.
            return self.submit_to(table, [(at, command)], Rollback::None);
        }
        let to = shard_links::choose(&router.loads);
        match self.submit_to(table, [(to, command)], Rollback::Port(port, to)) {
            Ok(n) => {
                table.ports.insert(port, to);
                self.bind_addresses(table, addresses, port);
                Ok(n)
            }
            Err(full) => {
                shard_links::unload(&router.loads, to);
                Err(full)
            }
        }
    }

    // ---- published ports ----------------------------------------------------------------------------

    fn add_forward(
        &self,
        table: &mut RoutingTable,
        forward: ForwardId,
        spec: ForwardSpec,
        fds: Vec<OwnedFd>,
    ) -> Result<u64, QueueFull> {
        if let Some(at) = table.forwards.get(&forward).map(|f| f.at) {
            // Refused there.
            return self.submit_to(table, [(at, add_forward(forward, spec, fds))], Rollback::None);
        }
        let at = table.of_address(spec.guest.ip(), self.shards.len()).unwrap_or(0);
        let kept = copies(&fds).ok_or(QueueFull)?;
        let n = self.submit_to(table, [(at, add_forward(forward, spec, fds))], Rollback::Forward(forward))?;
        table.forwards.insert(forward, Published { spec, fds: kept, at });
        Ok(n)
    }

    fn retarget(
        &self,
        table: &mut RoutingTable,
        forward: ForwardId,
        guest: SocketAddr,
    ) -> Result<u64, QueueFull> {
        let to = table.of_address(guest.ip(), self.shards.len());
        let Some(f) = table.forwards.get(&forward) else {
            return self.submit_to(table, [(0, Command::RetargetForward { forward, guest })], Rollback::None);
        };
        let from = f.at;
        let (at, spec) = (to.unwrap_or(from), ForwardSpec { guest, ..f.spec });
        let n = if at == from {
            self.submit_to(table, [(from, Command::RetargetForward { forward, guest })], Rollback::None)?
        } else {
            let fds = copies(&f.fds).ok_or(QueueFull)?;
            let commands =
                [(at, add_forward(forward, spec, fds)), (from, Command::RemoveForward { forward })];
            self.submit_to(table, commands, Rollback::None)?
        };
        if let Some(f) = table.forwards.get_mut(&forward) {
            (f.spec, f.at) = (spec, at);
        }
        Ok(n)
    }

    /// Addresses are at a port: forwards to them go where it is.
    fn bind_addresses(&self, table: &mut RoutingTable, addresses: Vec<IpAddr>, port: PortId) {
        let to = table.at(port, self.shards.len());
        for ip in addresses {
            if table.addresses.len() < ADDRESSES_MAX || table.addresses.contains_key(&ip) {
                table.addresses.insert(ip, port);
            }
            let RoutingTable { forwards, stale_forwards, .. } = &mut *table;
            for (id, f) in forwards.iter_mut().filter(|(_, f)| f.spec.guest.ip() == ip && f.at != to) {
                let Some(fds) = copies(&f.fds) else { continue };
                let moved = self.shards.get(to).map(|t| t.submit(add_forward(*id, f.spec, fds)));
                // A worker whose queue is full will do when the address is next heard of.
                if let Some(Ok(_)) = moved {
                    stale_forwards.push((f.at, *id));
                    f.at = to;
                }
            }
        }
        self.remove_stale_forwards(table);
    }

    /// Ends what is left of forwards that have moved.
    fn remove_stale_forwards(&self, table: &mut RoutingTable) {
        let RoutingTable { stale_forwards, forwards, .. } = &mut *table;
        stale_forwards.retain(|(at, forward)| {
            // It may have come back meanwhile.
            forwards.get(forward).is_none_or(|f| f.at != *at)
                && self.shards.get(*at).is_some_and(|t| {
                    t.is_healthy() && t.submit(Command::RemoveForward { forward: *forward }).is_err()
                })
        });
    }

    // ---- events of several workers ------------------------------------------------------------------

    fn handle_event(
        &self,
        router: &Router,
        table: &mut RoutingTable,
        from: usize,
        event: Event,
    ) -> Option<Event> {
        match event {
            Event::Done { sequence, result } => {
                let number = table.in_flight.remove(&(from, sequence))?;
                let pending = table.pending.get_mut(&number)?;
                pending.left -= 1;
                merge_results(&mut pending.result, from, result);
                if pending.left > 0 {
                    return None;
                }
                let PendingCommand { result, rollback, .. } = table.pending.remove(&number)?;
                match rollback {
                    Rollback::Port(port, at) if result.is_err() => {
                        table.forget_port(port);
                        shard_links::unload(&router.loads, at);
                    }
                    Rollback::Forward(forward) if result.is_err() => drop(table.forwards.remove(&forward)),
                    Rollback::PortGone(port) => table.forget_port(port),
                    _ => {}
                }
                Some(Event::Done { sequence: number, result })
            }
            Event::PortDown { port, reason } => {
                if port.0 >= FIRST_DYNAMIC {
                    table.forget_port(port);
                }
                Some(Event::PortDown { port, reason })
            }
            Event::Core(effects::Event::AddressSeen { port, address, .. }) => {
                self.bind_addresses(table, vec![address], port);
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

impl RoutingTable {
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

    fn forget_port(&mut self, port: PortId) {
        self.ports.remove(&port);
        self.addresses.retain(|_, p| *p != port);
    }
}

fn add_forward(forward: ForwardId, spec: ForwardSpec, fds: Vec<OwnedFd>) -> Command {
    let ForwardSpec { proto, guest, entry } = spec;
    Command::AddForward { forward, proto, guest, entry, fds }
}

fn copies(fds: &[OwnedFd]) -> Option<Vec<OwnedFd>> {
    fds.iter().map(|fd| fd.try_clone().ok()).collect()
}

/// A flow's number among those of all workers.
fn numbered(flow: &mut FlowId, worker: usize) {
    flow.index |= worker as u32 * FLOWS_MAX;
}

/// Joins what two workers say to one command.
fn merge_results(sum: &mut Result<Value, CommandError>, from: usize, more: Result<Value, CommandError>) {
    match (sum, more) {
        (Ok(Value::Flows(all)), Ok(Value::Flows(more))) => all.extend(renumbered(more, from)),
        (Ok(Value::Ports(all)), Ok(Value::Ports(more))) => all.extend(more),
        (sum @ Ok(Value::None), Ok(Value::Flows(more))) => *sum = Ok(Value::Flows(renumbered(more, from))),
        (Ok(Value::FlowsCut(all)), Ok(Value::FlowsCut(more))) => *all += more,
        (sum @ Ok(_), more @ (Err(_) | Ok(Value::Ports(_) | Value::Nat(_) | Value::FlowsCut(_)))) => {
            *sum = more;
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::event::Event;
    use guestnet_core::config::NetworkConfig;
    use guestnet_wire::ether::Mac;
    use std::net::Ipv4Addr;
    use std::sync::atomic::Ordering;

    fn port_config() -> PortConfig {
        let addresses = vec!["10.0.0.7".parse().unwrap()];
        PortConfig { mac: None, addresses, mtu: 1500, gso_max: 65_450, lax_offload: false, uplink: false }
    }

    #[test]
    fn a_command_that_no_worker_takes_leaves_nothing_booked() {
        let (gateway, subnet) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 0));
        let core = NetworkConfig::new(Mac([2, 0, 0, 0, 0, 1]), gateway, (subnet, 24), [7; 32]);
        let group = spawn(WorkerConfig { workers: 2, ..WorkerConfig::new(core) }).unwrap();
        group.submit(Command::Panic).unwrap();
        while group.shards[0].has_room() {
            std::thread::yield_now();
        }
        let router = group.router.as_ref().unwrap();
        let mut table = router.table();
        let guest = "10.0.0.7:80".parse().unwrap();
        // As when the worker fails after it was seen that all have room.
        for _ in 0..2 {
            assert!(group.add_port(router, &mut table, PortId(1), port_config()).is_err());
            assert!(
                group
                    .add_forward(&mut table, ForwardId(1), ForwardSpec::published(6, guest), vec![])
                    .is_err()
            );
        }
        let loads: Vec<u32> = router.loads.iter().map(|n| n.load(Ordering::Relaxed)).collect();
        assert_eq!((loads, table.ports.len(), table.addresses.len()), (vec![0, 0], 0, 0));
        assert!(table.forwards.is_empty() && table.pending.keys().count() <= 1);
        drop(table);
        let failed = |e: &Event| matches!(e, Event::Failed { message } if message.starts_with("worker 0"));
        while !group.drain(100).iter().any(failed) {
            std::thread::yield_now();
        }
    }
}
