//! Theory of operation: what a group of workers keeps to look like one.
//!
//! - The table knows the worker of each port, the port of each address, and the worker of each published port.
//! - It learns addresses and places of forwards when a worker has acknowledged them, so a command that fails leaves it
//!   as it was. Ports are booked when they are submitted, since later commands must follow them, and taken back.
//! - A command for several workers has one number, and one result once all have acknowledged it.

use crate::control::command::{Command, CommandError, Value};
use crate::control::event::Event;
use crate::os::epoll::{Kind, Poller, Token};
use crate::os::sys;
use crate::runtime::config::{DYNAMIC_PORTS, FIRST_DYNAMIC, FLOWS_MAX};
use crate::runtime::error::{IoError, system};
use crate::runtime::shard_handle::ShardHandle;
use guestnet_core::NetworkCommand;
use guestnet_core::config::{FlowInfo, ForwardSpec};
use guestnet_core::types::{FlowId, ForwardId, PortId};
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What it takes to make several look like one.
pub(super) struct Router {
    /// Watches the eventfds of all.
    pub(super) poller: Poller,
    /// Written when `ready` has something.
    pub(super) ready_fd: OwnedFd,
    pub(super) loads: Arc<[AtomicU32]>,
    pub(super) table: Mutex<RoutingTable>,
}

#[derive(Default)]
pub(super) struct RoutingTable {
    pub(super) next: u64,
    /// Commands under way: by worker and its number for them.
    pub(super) in_flight: HashMap<(usize, u64), u64>,
    pub(super) pending: HashMap<u64, PendingCommand>,
    pub(super) ports: HashMap<PortId, usize>,
    pub(super) addresses: HashMap<IpAddr, PortId>,
    pub(super) forwards: HashMap<ForwardId, Published>,
    /// Forwards that are to end at a worker which had no room for the command.
    pub(super) stale_forwards: Vec<(usize, ForwardId)>,
    pub(super) ready: VecDeque<Event>,
    /// Whose events are drained first.
    pub(super) turn: usize,
}

/// A command that is not acknowledged yet.
pub(super) struct PendingCommand {
    pub(super) left: usize,
    pub(super) result: Result<Value, CommandError>,
    pub(super) then: Then,
    /// False for what the group does of its own accord: its acknowledgement is not reported.
    pub(super) asked: bool,
}

/// What the table learns when a command is acknowledged.
pub(super) enum Then {
    Nothing,
    /// The port is at the worker. Booked when it is submitted, because later commands must follow it there.
    PortAdded {
        port: PortId,
        at: usize,
        addresses: Vec<IpAddr>,
    },
    PortGone(PortId),
    AddressBound {
        port: PortId,
        address: IpAddr,
    },
    ForwardAdded(ForwardId),
    ForwardMoved {
        forward: ForwardId,
        spec: ForwardSpec,
        at: usize,
    },
    /// The worker that had the forward before has removed it.
    ForwardLeft(ForwardId),
}

pub(super) struct Published {
    /// As the workers have acknowledged it.
    pub(super) spec: ForwardSpec,
    pub(super) fds: Vec<OwnedFd>,
    pub(super) at: usize,
    /// The command that changes it now.
    pub(super) changing: Option<u64>,
    /// Changes of the target that wait for that command, with their numbers.
    pub(super) waiting: VecDeque<(u64, SocketAddr)>,
}

impl Then {
    /// What the table learns of a command that one worker does.
    pub(super) fn of(command: &Command) -> Then {
        match command {
            Command::RemovePort { port } => Then::PortGone(*port),
            Command::Network(NetworkCommand::BindAddress { port, ip, .. }) => {
                Then::AddressBound { port: *port, address: *ip }
            }
            _ => Then::Nothing,
        }
    }
}

impl Router {
    pub(super) fn new(shards: &[ShardHandle], loads: Arc<[AtomicU32]>) -> Result<Router, IoError> {
        let poller = Poller::new(1).map_err(system("no epoll"))?;
        let ready_fd = sys::eventfd().map_err(system("no eventfd"))?;
        let token = Token { kind: Kind::Waker, index: 0, generation: 0 };
        let fds = shards.iter().map(ShardHandle::event_fd).chain([ready_fd.as_raw_fd()]);
        for fd in fds {
            poller.add_raw(fd, token, libc::EPOLLIN).map_err(system("no epoll"))?;
        }
        Ok(Router { poller, ready_fd, loads, table: Mutex::default() })
    }

    pub(super) fn table(&self) -> MutexGuard<'_, RoutingTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An acknowledgement of our own.
    pub(super) fn acknowledge(&self, table: &mut RoutingTable, result: Result<Value, CommandError>) -> u64 {
        let sequence = table.number();
        self.report(table, sequence, result);
        sequence
    }

    pub(super) fn report(
        &self,
        table: &mut RoutingTable,
        sequence: u64,
        result: Result<Value, CommandError>,
    ) {
        table.ready.push_back(Event::Done { sequence, result });
        sys::eventfd_signal(&self.ready_fd);
    }
}

impl RoutingTable {
    pub(super) fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// The worker of a port; any for one that does not exist, which will say so.
    pub(super) fn at(&self, port: PortId, workers: usize) -> usize {
        let dynamic = || port.0.checked_sub(FIRST_DYNAMIC).map(|n| (n / DYNAMIC_PORTS) as usize);
        self.ports.get(&port).copied().or_else(dynamic).filter(|at| *at < workers).unwrap_or(0)
    }

    pub(super) fn of_address(&self, ip: IpAddr, workers: usize) -> Option<usize> {
        self.addresses.get(&ip).map(|p| self.at(*p, workers))
    }

    /// Nobody has the address any more, whatever is still on its way.
    pub(super) fn forget_address(&mut self, ip: IpAddr) {
        self.addresses.remove(&ip);
        for p in self.pending.values_mut() {
            match &mut p.then {
                Then::PortAdded { addresses, .. } => addresses.retain(|a| *a != ip),
                Then::AddressBound { address, .. } if *address == ip => p.then = Then::Nothing,
                _ => {}
            }
        }
    }

    pub(super) fn forget_port(&mut self, port: PortId) {
        self.ports.remove(&port);
        self.addresses.retain(|_, p| *p != port);
    }
}

/// A flow's number among those of all workers.
pub(super) fn numbered(flow: &mut FlowId, worker: usize) {
    flow.index |= worker as u32 * FLOWS_MAX;
}

/// Joins what two workers say to one command.
pub(super) fn merge_results(
    sum: &mut Result<Value, CommandError>,
    from: usize,
    more: Result<Value, CommandError>,
) {
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

fn renumbered(mut flows: Vec<FlowInfo>, from: usize) -> Vec<FlowInfo> {
    flows.iter_mut().for_each(|f| numbered(&mut f.flow, from));
    flows
}
