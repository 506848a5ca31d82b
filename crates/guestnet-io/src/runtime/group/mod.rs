//! Theory of operation: the control side's view of a network's workers, as if they were one.
//!
//! - Each guest is placed on the worker with the fewest guests, and stays there.
//! - A command goes to the worker of its port, or to all where it is about the network. It is acknowledged once all
//!   have done it (`routing`).
//! - A published port follows its guest (`forward_moves`).
//! - Events of all workers are drained in turn.
//! - A single worker is driven directly, without a table.

mod forward_moves;
mod routing;

use crate::control::capture::{Capture, SharedCapture};
use crate::control::command::{Command, CommandError, QueueFull, SubmitError, Value, WorkerCommand};
use crate::control::event::Event;
use crate::control::port_names::PortNames;
use crate::os::sys;
use crate::runtime::config::{FIRST_DYNAMIC, WORKERS_MAX, WorkerConfig};
use crate::runtime::error::IoError;
use crate::runtime::group::routing::{PendingCommand, Router, RoutingTable, Then, merge_results, numbered};
use crate::runtime::links;
use crate::runtime::shard_handle::{self, ShardHandle};
use crate::runtime::stats::StatsSnapshot;
use crate::runtime::threads::placement::Runtime;
use guestnet_core::command::Scope;
use guestnet_core::config::ForwardSpec;
use guestnet_core::effects;
use guestnet_core::types::{PortConfig, PortId};
use guestnet_core::{NetworkCommand, NetworkError};
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

/// The running workers of a Network.
pub struct WorkerGroup {
    shards: Vec<ShardHandle>,
    router: Option<Router>,
    port_names: PortNames,
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

impl Runtime {
    /// Starts a network on this runtime: see [`spawn`].
    ///
    /// # Errors
    /// [`IoError`].
    pub fn spawn(&self, config: WorkerConfig) -> Result<WorkerGroup, IoError> {
        spawn_on(self, config)
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
    pub fn submit(&self, command: impl Into<Command>) -> Result<u64, SubmitError> {
        if self.shards.first().is_some_and(ShardHandle::is_copy) {
            return Err(SubmitError::Forked);
        }
        let number = match (&self.router, self.shards.first()) {
            (Some(s), _) => self.route(s, &mut s.table(), command.into()),
            (None, Some(t)) => t.submit(command.into()),
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
            Command::Network(c) if c.scope() == Scope::All => {
                let part = c.part(self.shards.len());
                self.submit_to_all(table, part)
            }
            Command::Worker(c) => self.submit_to_all(table, c),
            command => {
                let workers = self.shards.len();
                let to = match command.scope() {
                    Scope::Port(port) => table.at(port, workers),
                    Scope::Listener(listener) => listener as usize % workers,
                    Scope::First => 0,
                    Scope::All | Scope::Group => return self.place(router, table, command),
                };
                let then = Then::of(&command);
                self.submit_to(table, [(to, command)], then)
            }
        }
    }

    /// Commands whose effect the group keeps track of.
    fn place(&self, router: &Router, table: &mut RoutingTable, command: Command) -> Result<u64, QueueFull> {
        match command {
            Command::AddPort { port, config } => self.add_port(router, table, port, config),
            Command::Network(NetworkCommand::UnbindAddress { ip }) => {
                let n = self.submit_to_all(table, NetworkCommand::UnbindAddress { ip })?;
                table.forget_address(ip);
                Ok(n)
            }
            Command::AddForward { forward, proto, guest, entry, fds } => {
                self.add_forward(table, forward, ForwardSpec { proto, guest, entry }, fds)
            }
            Command::Network(NetworkCommand::RetargetForward { forward, guest }) => {
                self.retarget(table, forward, guest)
            }
            Command::RemoveForward { forward } => {
                // It cannot fail. While it changes, two workers may have it.
                let all = (0..self.shards.len()).map(|i| (i, Command::RemoveForward { forward }));
                let n = self.submit_to(table, all, Then::Nothing)?;
                for (sequence, _) in table.forwards.remove(&forward).into_iter().flat_map(|f| f.waiting) {
                    router.report(table, sequence, Err(NetworkError::NoSuchForward(forward).into()));
                }
                Ok(n)
            }
            Command::StartCapture { fd, snaplen } => {
                match Capture::start(fd, snaplen, sys::now(), self.port_names.clone()) {
                    Ok(c) => self.submit_to_all(table, WorkerCommand::ShareCapture(SharedCapture::new(c))),
                    Err(e) => {
                        let errno = e.raw_os_error().unwrap_or(0);
                        Ok(router.acknowledge(
                            table,
                            Err(CommandError::System { what: "the capture cannot start", errno }),
                        ))
                    }
                }
            }
            // One worker gives it to another.
            Command::Adopt(_) => Err(QueueFull),
            other => {
                debug_assert!(false, "nothing places {other:?}");
                Err(QueueFull)
            }
        }
    }

    /// Gives commands to workers; one number for all of them.
    fn submit_to(
        &self,
        table: &mut RoutingTable,
        commands: impl IntoIterator<Item = (usize, Command)>,
        then: Then,
    ) -> Result<u64, QueueFull> {
        let sequence = table.number();
        self.submit_as(table, sequence, true, commands, then)?;
        Ok(sequence)
    }

    /// As [`WorkerGroup::submit_to`], with a number that exists.
    fn submit_as(
        &self,
        table: &mut RoutingTable,
        sequence: u64,
        asked: bool,
        commands: impl IntoIterator<Item = (usize, Command)>,
        then: Then,
    ) -> Result<(), QueueFull> {
        let mut left = 0;
        for (to, command) in commands {
            let number = self.shards.get(to).ok_or(QueueFull)?.submit(command)?;
            table.in_flight.insert((to, number), sequence);
            left += 1;
        }
        table.pending.insert(sequence, PendingCommand { left, result: Ok(Value::None), then, asked });
        Ok(())
    }

    fn submit_to_all(
        &self,
        table: &mut RoutingTable,
        command: impl Into<Command> + Clone,
    ) -> Result<u64, QueueFull> {
        let all = (0..self.shards.len()).map(|i| (i, command.clone().into()));
        self.submit_to(table, all, Then::Nothing)
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
            return self.submit_to(table, [(at, command)], Then::Nothing);
        }
        let to = links::choose(&router.loads);
        match self.submit_to(table, [(to, command)], Then::PortAdded { port, at: to, addresses }) {
            Ok(n) => {
                table.ports.insert(port, to);
                Ok(n)
            }
            Err(full) => {
                links::unload(&router.loads, to);
                Err(full)
            }
        }
    }

    // ---- events of several workers ------------------------------------------------------------------

    /// Books what a command has done. False when there is more to do before it is acknowledged.
    fn settle(
        &self,
        router: &Router,
        table: &mut RoutingTable,
        sequence: u64,
        then: Then,
        result: &Result<Value, CommandError>,
        asked: bool,
    ) -> bool {
        let done = result.is_ok();
        match then {
            Then::Nothing => {}
            Then::PortAdded { port, addresses, .. } if done => self.bind_addresses(table, addresses, port),
            Then::PortAdded { port, at, .. } => {
                table.forget_port(port);
                links::unload(&router.loads, at);
            }
            Then::PortGone(port) => table.forget_port(port),
            Then::AddressBound { port, address } if done => self.bind_addresses(table, vec![address], port),
            Then::AddressBound { .. } => {}
            Then::ForwardAdded(forward) => {
                let mine = table.forwards.get(&forward).is_some_and(|f| f.changing == Some(sequence));
                if mine && !done {
                    let waiting = table.forwards.remove(&forward).map(|f| f.waiting).unwrap_or_default();
                    for (sequence, _) in waiting {
                        router.report(table, sequence, Err(NetworkError::NoSuchForward(forward).into()));
                    }
                }
                self.end_change(router, table, forward, sequence, done);
            }
            Then::ForwardMoved { forward, spec, at } => {
                if let Some(f) =
                    table.forwards.get_mut(&forward).filter(|f| done && f.changing == Some(sequence))
                {
                    let from = std::mem::replace(&mut f.at, at);
                    f.spec = spec;
                    let remove = [(from, Command::RemoveForward { forward })];
                    if from != at {
                        let left = Then::ForwardLeft(forward);
                        if self.submit_as(table, sequence, asked, remove, left).is_ok() {
                            return false;
                        }
                        table.stale_forwards.push((from, forward));
                    }
                }
                self.end_change(router, table, forward, sequence, done);
            }
            Then::ForwardLeft(forward) => self.end_change(router, table, forward, sequence, done),
        }
        true
    }

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
                let PendingCommand { result, then, asked, .. } = table.pending.remove(&number)?;
                self.settle(router, table, number, then, &result, asked)
                    .then_some(Event::Done { sequence: number, result })
                    .filter(|_| asked)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::event::Event;
    use crate::runtime::config::DYNAMIC_PORTS;
    use guestnet_core::config::NetworkConfig;
    use guestnet_core::types::ForwardId;
    use guestnet_wire::ether::Mac;
    use std::net::{Ipv4Addr, SocketAddr, TcpListener};
    use std::sync::atomic::Ordering;

    fn port_config() -> PortConfig {
        let addresses = vec!["10.0.0.7".parse().unwrap()];
        PortConfig { mac: None, addresses, mtu: 1500, gso_max: 65_450, lax_offload: false, uplink: false }
    }

    fn two_workers() -> WorkerGroup {
        let (gateway, subnet) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 0));
        let core = NetworkConfig::new(Mac([2, 0, 0, 0, 0, 1]), gateway, (subnet, 24), [7; 32]);
        spawn(WorkerConfig { workers: 2, ..WorkerConfig::new(core) }).unwrap()
    }

    /// Waits for the acknowledgement of a command.
    fn result(group: &WorkerGroup, number: u64) -> Result<Value, CommandError> {
        loop {
            for event in group.drain(100) {
                match event {
                    Event::Done { sequence, result } if sequence == number => return result,
                    _ => {}
                }
            }
            std::thread::yield_now();
        }
    }

    fn done(group: &WorkerGroup, command: impl Into<Command>) -> Result<Value, CommandError> {
        result(group, group.submit(command).unwrap())
    }

    /// A forward to the guest of port 1, which is at worker 0; port 2 is at worker 1.
    fn published(group: &WorkerGroup) -> [SocketAddr; 2] {
        let guests: [SocketAddr; 2] = ["10.0.0.7:80".parse().unwrap(), "10.0.0.8:80".parse().unwrap()];
        for (n, guest) in [1, 2].into_iter().zip(guests) {
            let config = PortConfig { addresses: vec![guest.ip()], ..port_config() };
            done(group, Command::AddPort { port: PortId(n), config }).unwrap();
        }
        let fds = vec![TcpListener::bind("127.0.0.1:0").unwrap().into()];
        let spec = ForwardSpec::published(6, guests[0]);
        let ForwardSpec { proto, guest, entry } = spec;
        done(group, Command::AddForward { forward: ForwardId(1), proto, guest, entry, fds }).unwrap();
        guests
    }

    fn place(group: &WorkerGroup) -> (usize, SocketAddr) {
        let table = group.router.as_ref().unwrap().table();
        let f = &table.forwards[&ForwardId(1)];
        assert!(f.changing.is_none() && f.waiting.is_empty());
        (f.at, f.spec.guest)
    }

    #[test]
    fn a_forward_moves_when_the_new_worker_has_acknowledged_it() {
        let group = two_workers();
        let [a, b] = published(&group);
        let forward = ForwardId(1);
        // The second one waits for the first.
        let n = group.submit(NetworkCommand::RetargetForward { forward, guest: b }).unwrap();
        let m = group.submit(NetworkCommand::RetargetForward { forward, guest: a }).unwrap();
        assert_eq!(group.router.as_ref().unwrap().table().forwards[&forward].spec.guest, a);
        assert_eq!((result(&group, n), result(&group, m)), (Ok(Value::None), Ok(Value::None)));
        assert_eq!(place(&group), (0, a));
        done(&group, NetworkCommand::RetargetForward { forward, guest: b }).unwrap();
        assert_eq!(place(&group), (1, b));
        done(&group, Command::RemoveForward { forward }).unwrap();
        let gone = done(&group, NetworkCommand::RetargetForward { forward, guest: a });
        assert_eq!(gone, Err(NetworkError::NoSuchForward(forward).into()));
    }

    #[test]
    fn a_move_that_fails_leaves_the_forward_where_it_was() {
        let group = two_workers();
        let [a, b] = published(&group);
        let forward = ForwardId(1);
        let router = group.router.as_ref().unwrap();
        let mut table = router.table();
        let n = group
            .route(router, &mut table, NetworkCommand::RetargetForward { forward, guest: b }.into())
            .unwrap();
        // As when worker 1 refuses it.
        let (from, sequence) = table.in_flight.iter().find(|(_, number)| **number == n).unwrap().0.to_owned();
        let refused = Err(NetworkError::NumberInUse(1).into());
        let event = Event::Done { sequence, result: refused.clone() };
        let told = group.handle_event(router, &mut table, from, event);
        assert_eq!((from, told), (1, Some(Event::Done { sequence: n, result: refused })));
        assert!(table.pending.is_empty());
        drop(table);
        assert_eq!(place(&group), (0, a));
    }

    #[test]
    fn an_address_that_is_refused_moves_no_forward() {
        let group = two_workers();
        let [a, _] = published(&group);
        // Worker 1 would have this port.
        let port = PortId(FIRST_DYNAMIC + DYNAMIC_PORTS);
        let refused = done(&group, NetworkCommand::BindAddress { port, ip: a.ip(), mac: None });
        assert_eq!(refused, Err(NetworkError::NoSuchPort(port).into()));
        assert_eq!(place(&group), (0, a));
        let config = PortConfig { addresses: vec![Ipv4Addr::new(10, 0, 0, 1).into()], ..port_config() };
        let refused = done(&group, Command::AddPort { port: PortId(3), config });
        assert!(matches!(refused, Err(CommandError::Network(NetworkError::AddressInUse(_)))));
        let table = group.router.as_ref().unwrap().table();
        assert_eq!((table.addresses.len(), table.ports.len()), (2, 2));
        assert_eq!(table.addresses[&a.ip()], PortId(1));
    }

    #[test]
    fn a_command_that_no_worker_takes_leaves_nothing_booked() {
        let group = two_workers();
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
