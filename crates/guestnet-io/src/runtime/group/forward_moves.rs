//! Theory of operation: published ports of a network with several workers.
//!
//! - A published port is at the worker that has its guest, and moves when the guest does. The group keeps its sockets
//!   too, so no client that waits in their queues is lost.
//! - A move adds the forward at the new worker first. When that is acknowledged, the old worker removes it, and only
//!   then is the move acknowledged. A move that fails leaves the forward where it was.
//! - A forward changes once at a time; up to [`WAITING_MAX`] commands wait for their turn.

use crate::control::command::{Command, CommandError, QueueFull};
use crate::runtime::group::WorkerGroup;
use crate::runtime::group::routing::{Published, Router, RoutingTable, Then};
use guestnet_core::NetworkCommand;
use guestnet_core::config::ForwardSpec;
use guestnet_core::types::{ForwardId, PortId};
use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

/// Addresses that are remembered with their port.
const ADDRESSES_MAX: usize = 65_536;
/// Commands that wait for a change of the same forward.
const WAITING_MAX: usize = 16;

impl WorkerGroup {
    pub(super) fn add_forward(
        &self,
        table: &mut RoutingTable,
        forward: ForwardId,
        spec: ForwardSpec,
        fds: Vec<OwnedFd>,
    ) -> Result<u64, QueueFull> {
        if let Some(at) = table.forwards.get(&forward).map(|f| f.at) {
            // Refused there.
            return self.submit_to(table, [(at, add_forward(forward, spec, fds))], Then::Nothing);
        }
        let at = table.of_address(spec.guest.ip(), self.shards.len()).unwrap_or(0);
        let kept = copies(&fds).ok_or(QueueFull)?;
        let n =
            self.submit_to(table, [(at, add_forward(forward, spec, fds))], Then::ForwardAdded(forward))?;
        let waiting = VecDeque::new();
        table.forwards.insert(forward, Published { spec, fds: kept, at, changing: Some(n), waiting });
        Ok(n)
    }

    pub(super) fn retarget(
        &self,
        table: &mut RoutingTable,
        forward: ForwardId,
        guest: SocketAddr,
    ) -> Result<u64, QueueFull> {
        let Some(f) = table.forwards.get_mut(&forward) else {
            return self.submit_to(
                table,
                [(0, NetworkCommand::RetargetForward { forward, guest }.into())],
                Then::Nothing,
            );
        };
        if f.changing.is_some() && f.waiting.len() >= WAITING_MAX {
            return Err(QueueFull);
        }
        let sequence = table.number();
        match table.forwards.get_mut(&forward) {
            Some(f) if f.changing.is_some() => f.waiting.push_back((sequence, guest)),
            _ => self.change_forward(table, sequence, true, forward, guest)?,
        }
        Ok(sequence)
    }

    /// Gives a forward to the worker that has the guest. The table follows when that worker has acknowledged it, and
    /// only then does the worker that had the forward remove it: a change that fails leaves it as it was.
    pub(super) fn change_forward(
        &self,
        table: &mut RoutingTable,
        sequence: u64,
        asked: bool,
        forward: ForwardId,
        guest: SocketAddr,
    ) -> Result<(), QueueFull> {
        let to = table.of_address(guest.ip(), self.shards.len());
        let f = table.forwards.get(&forward).ok_or(QueueFull)?;
        let (at, spec) = (to.unwrap_or(f.at), ForwardSpec { guest, ..f.spec });
        let command = if at == f.at {
            NetworkCommand::RetargetForward { forward, guest }.into()
        } else {
            add_forward(forward, spec, copies(&f.fds).ok_or(QueueFull)?)
        };
        self.submit_as(table, sequence, asked, [(at, command)], Then::ForwardMoved { forward, spec, at })?;
        if let Some(f) = table.forwards.get_mut(&forward) {
            f.changing = Some(sequence);
        }
        Ok(())
    }

    /// A change of a forward is over: the next one begins. What waits and cannot begin is refused.
    pub(super) fn next_change(
        &self,
        router: &Router,
        table: &mut RoutingTable,
        forward: ForwardId,
        sequence: u64,
    ) {
        let Some(f) = table.forwards.get_mut(&forward).filter(|f| f.changing == Some(sequence)) else {
            return;
        };
        f.changing = None;
        while let Some((next, guest)) = table.forwards.get_mut(&forward).and_then(|f| f.waiting.pop_front()) {
            if self.change_forward(table, next, true, forward, guest).is_ok() {
                return;
            }
            let busy = CommandError::System { what: "the forward stays where it is", errno: libc::EAGAIN };
            router.report(table, next, Err(busy));
        }
    }

    /// Addresses are at a port: forwards to them go where it is.
    pub(super) fn bind_addresses(&self, table: &mut RoutingTable, addresses: Vec<IpAddr>, port: PortId) {
        for ip in addresses {
            if table.addresses.len() < ADDRESSES_MAX || table.addresses.contains_key(&ip) {
                table.addresses.insert(ip, port);
            }
            self.follow_address(table, ip);
        }
        self.remove_stale_forwards(table);
    }

    /// Moves the forwards to an address that are not at the worker of its port.
    pub(super) fn follow_address(&self, table: &mut RoutingTable, ip: IpAddr) {
        let Some(to) = table.of_address(ip, self.shards.len()) else { return };
        let elsewhere = |f: &Published| f.spec.guest.ip() == ip && f.at != to && f.changing.is_none();
        let moving: Vec<(ForwardId, SocketAddr)> =
            table.forwards.iter().filter(|(_, f)| elsewhere(f)).map(|(id, f)| (*id, f.spec.guest)).collect();
        for (forward, guest) in moving {
            let sequence = table.number();
            // A worker whose queue is full gets it when the address is next heard of.
            let _full = self.change_forward(table, sequence, false, forward, guest);
        }
    }

    /// Ends what is left of forwards that have moved.
    pub(super) fn remove_stale_forwards(&self, table: &mut RoutingTable) {
        let RoutingTable { stale_forwards, forwards, .. } = &mut *table;
        stale_forwards.retain(|(at, forward)| {
            // It may have come back meanwhile.
            forwards.get(forward).is_none_or(|f| f.at != *at)
                && self.shards.get(*at).is_some_and(|t| {
                    t.is_healthy() && t.submit(Command::RemoveForward { forward: *forward }).is_err()
                })
        });
    }

    /// A change of a forward is acknowledged. Its guest may have got another port meanwhile.
    pub(super) fn end_change(
        &self,
        router: &Router,
        table: &mut RoutingTable,
        forward: ForwardId,
        sequence: u64,
        done: bool,
    ) {
        self.next_change(router, table, forward, sequence);
        if let Some(f) = table.forwards.get(&forward).filter(|_| done) {
            let ip = f.spec.guest.ip();
            self.follow_address(table, ip);
        }
    }
}

fn add_forward(forward: ForwardId, spec: ForwardSpec, fds: Vec<OwnedFd>) -> Command {
    let ForwardSpec { proto, guest, entry } = spec;
    Command::AddForward { forward, proto, guest, entry, fds }
}

fn copies(fds: &[OwnedFd]) -> Option<Vec<OwnedFd>> {
    fds.iter().map(|fd| fd.try_clone().ok()).collect()
}
