//! Theory of operation: a network whose ports are shared out among several workers. Each worker has a core of its own with
//! the ports of its guests, and a stand-in for every port of the others: a port that is `remote`, with its MAC and
//! addresses and nothing else. So the switch, the gateway and the checks of source addresses see the whole network, and
//! need one branch where a frame leaves ([`crate::interface::effects::Effects::forward_remote`]).
//!
//! - A core tells the others what it learns of its own ports, as [`PeerUpdate`]; the I/O side carries them.
//! - What guests can cause is bounded by their rate and by the room there is for updates. A frame that would teach more
//!   is dropped.
//! - Where two cores have learned the same, both decide alike: an assignment of the control side takes precedence, then
//!   the port's own MAC, then the lower port number.
//!
//! The types are here; [`crate::l2`] applies them.

use crate::interface::types::PortId;
use guestnet_wire::ether::Mac;
use std::net::IpAddr;

/// A change of a port that one core reports to the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerUpdate {
    /// A port was added.
    PortUp {
        /// Its number.
        port: PortId,
        /// The MAC that the control side assigned.
        mac: Option<Mac>,
        /// Its IP MTU.
        mtu: u16,
    },
    /// A port was removed, with its MACs and addresses.
    PortDown {
        /// Its number.
        port: PortId,
    },
    /// A port uses a MAC.
    Mac {
        /// The port.
        port: PortId,
        /// The MAC.
        mac: Mac,
        /// It is the port's own, not one of a bridge behind it.
        own: bool,
        /// One that it no longer has.
        instead: Option<Mac>,
    },
    /// A port has an address.
    Address {
        /// The port.
        port: PortId,
        /// The address.
        ip: IpAddr,
        /// Its MAC where it is known.
        mac: Option<Mac>,
        /// The control side assigned it.
        assigned: bool,
        /// One that it no longer has.
        instead: Option<IpAddr>,
    },
    /// The control side took an address back.
    AddressGone {
        /// The address.
        ip: IpAddr,
    },
}

/// What one of several cores keeps of the others.
pub(crate) struct Sharing {
    updates: Vec<PeerUpdate>,
    /// Updates that guests may cause until the next [`Sharing::take`].
    room: usize,
    /// How many ports each worker has.
    ports: Vec<u32>,
}

impl Sharing {
    /// For a network of so many workers.
    pub fn new(workers: u16) -> Sharing {
        Sharing { updates: Vec::new(), room: 0, ports: vec![0; usize::from(workers)] }
    }

    /// Queues an update for the other workers.
    pub fn push(&mut self, update: PeerUpdate) {
        self.updates.push(update);
    }

    /// Moves the queued updates to `out`, oldest first. Guests may cause `room` more until the next call.
    pub fn take(&mut self, room: usize, out: &mut Vec<PeerUpdate>) {
        out.append(&mut self.updates);
        self.room = room;
    }

    /// Whether a guest may cause another update.
    pub fn has_room(&self) -> bool {
        self.updates.len() < self.room
    }

    /// Counts a port of another worker that came or went.
    pub fn count(&mut self, worker: u16, added: bool) {
        if let Some(n) = self.ports.get_mut(usize::from(worker)) {
            *n = if added { *n + 1 } else { n.saturating_sub(1) };
        }
    }

    /// Whether a worker has ports.
    pub fn has_ports(&self, worker: u16) -> bool {
        self.ports.get(usize::from(worker)).is_some_and(|n| *n > 0)
    }

    /// How many workers there are.
    pub fn workers(&self) -> u16 {
        self.ports.len() as u16
    }
}
