//! Theory of operation: the record of a flow. TCP, UDP and ICMP echo, opened from either side, share the shape [`Flow`] with
//! a [`Key`]; [`State`] holds what differs.
//!
//! A socket that serves one guest address and port for all destinations (an endpoint-independent mapping) is a record too,
//! whose key has no remote side. It lists its flows, and ends with the last one.

use crate::interface::config::FlowInfo;
use crate::interface::types::{FlowId, ForwardId, PortId, SockId, Time};
use crate::policy::{Direction, Generation, RuleId};
use crate::relay::tcp::Tcb;
use guestnet_wire::ether::Mac;
use guestnet_wire::proto;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// No record.
pub const NONE: u32 = u32::MAX;

/// What identifies a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// Slot of the guest's port.
    pub slot: u32,
    /// IP protocol.
    pub proto: u8,
    /// The guest's side; for echo the port is the identifier.
    pub guest: SocketAddr,
    /// The other side, as the guest names it; for echo the port is 0. Unspecified for a mapping.
    pub remote: SocketAddr,
}

impl Key {
    /// The key of the mapping that flows of this guest address and port share.
    #[must_use]
    pub fn mapping(slot: u32, proto: u8, guest: SocketAddr) -> Key {
        Key { slot, proto, guest, remote: SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0) }
    }
}

/// As the neighbour of a record: the record is in no list.
const FREE: u32 = u32::MAX - 1;

/// Neighbours in a list of records.
#[derive(Debug, Clone, Copy)]
pub struct Links {
    /// The next record.
    pub next: u32,
    /// The one before.
    pub prev: u32,
}

impl Links {
    /// In no list.
    pub const UNLINKED: Links = Links { next: FREE, prev: FREE };

    /// Whether the record is in a list.
    #[must_use]
    pub fn is_linked(self) -> bool {
        self.prev != FREE
    }
}

/// A list of records.
#[derive(Debug, Clone, Copy)]
pub struct List {
    /// Oldest.
    pub head: u32,
    /// Newest.
    pub tail: u32,
    /// How many.
    pub len: u32,
}

impl Default for List {
    fn default() -> Self {
        List { head: NONE, tail: NONE, len: 0 }
    }
}

/// Which list.
#[derive(Debug, Clone, Copy)]
pub enum Chain {
    /// One-shot flows (TCP: those being opened or in TIME-WAIT) of a port, least recently used first.
    Lru = 0,
    /// Flows of a mapping.
    Siblings = 1,
    /// All flows of a port, oldest first.
    Port = 2,
}

/// What differs between the kinds of flows.
pub enum State {
    /// The socket of one guest address and port.
    Mapping {
        /// The socket.
        sock: SockId,
        /// The flows that use it.
        flows: List,
    },
    /// UDP or echo over a mapping's socket.
    Datagram {
        /// Slot of the mapping in the flow table.
        mapping: u32,
        /// Where it goes, which may differ from what the guest names.
        target: SocketAddr,
        /// Identification of the guest's last packet, for the quotation in an ICMP error.
        ip_id: u16,
        /// Datagrams are looked at before they are sent, because of the name that the flow showed.
        watched: bool,
    },
    /// UDP whose datagrams are held until the name is known that they show. It has no socket.
    Held {
        /// Where it will go.
        target: SocketAddr,
        /// As above.
        ip_id: u16,
    },
    /// UDP of a client outside, through a forward.
    Forwarded {
        /// The forward's socket that the client reached.
        sock: SockId,
        /// The forward.
        forward: ForwardId,
        /// The client as the host sees it.
        client: SocketAddr,
    },
    /// TCP.
    Tcp(Box<Tcb>),
}

/// One record of the flow table.
pub struct Flow {
    /// What identifies it.
    pub key: Key,
    /// The guest's MAC.
    pub mac: Mac,
    /// Which way it was opened.
    pub direction: Direction,
    /// The rules that admitted it.
    pub admitted: Generation,
    /// The rule that did; the number is one of that generation.
    pub rule: RuleId,
    /// TCP: on the list of those that may be evicted.
    pub parked: bool,
    /// When it was opened.
    pub opened: Time,
    /// When it last carried something.
    pub last: Time,
    /// When it expires if nothing happens, in milliseconds.
    pub expires: u64,
    /// Payload from the guest.
    pub bytes_out: u64,
    /// Payload to the guest.
    pub bytes_in: u64,
    /// Datagrams or segments from the guest, stops at the maximum.
    pub packets_out: u32,
    /// Datagrams or segments to the guest, stops at the maximum.
    pub packets_in: u32,
    /// What differs by kind.
    pub state: State,
    /// Its places in lists, see [`Chain`].
    pub links: [Links; 3],
}

impl Flow {
    /// A record in no list.
    #[must_use]
    pub fn new(
        key: Key,
        mac: Mac,
        direction: Direction,
        admitted: Generation,
        now: Time,
        state: State,
    ) -> Flow {
        Flow {
            key,
            mac,
            direction,
            admitted,
            rule: RuleId::NONE,
            parked: false,
            opened: now,
            last: now,
            expires: u64::MAX,
            bytes_out: 0,
            bytes_in: 0,
            packets_out: 0,
            packets_in: 0,
            state,
            links: [Links::UNLINKED; 3],
        }
    }

    /// The same flow, with the rule that admitted it.
    #[must_use]
    pub fn by(mut self, rule: RuleId) -> Flow {
        self.rule = rule;
        self
    }

    /// A mapping is a socket, not a conversation.
    #[must_use]
    pub fn is_mapping(&self) -> bool {
        matches!(self.state, State::Mapping { .. })
    }

    /// Whether it is a TCP flow in a bulk transfer.
    #[must_use]
    pub fn is_bulk(&self, now: Time) -> bool {
        matches!(&self.state, State::Tcp(tcb) if tcb.is_bulk(now))
    }

    /// Whether both sides have sent, so that it is no one-shot exchange that may be evicted.
    #[must_use]
    pub fn assured(&self) -> bool {
        self.packets_out >= 2 && self.packets_in >= 1 || self.packets_in >= 2 && self.packets_out >= 1
    }

    /// Its entry in a listing.
    #[must_use]
    pub fn info(&self, flow: FlowId, port: PortId, now: Time) -> FlowInfo {
        let state = match &self.state {
            State::Tcp(tcb) => tcb.state_name(),
            State::Mapping { .. } => "mapping",
            _ if self.assured() => "assured",
            _ if self.packets_in > 0 && self.packets_out > 0 => "answered",
            _ => "one_way",
        };
        let (bytes_out, bytes_in) = match &self.state {
            State::Tcp(tcb) => tcb.totals(),
            _ => (self.bytes_out, self.bytes_in),
        };
        let guest_port = self.key.guest.port();
        FlowInfo {
            flow,
            port,
            proto: self.key.proto,
            guest: SocketAddr::new(self.key.guest.ip(), guest_port),
            remote: self.key.remote,
            inbound: self.direction.is_inbound(),
            state,
            bytes_out,
            bytes_in,
            age_ms: now.since(self.opened) / 1_000_000,
            idle_ms: now.since(self.last) / 1_000_000,
        }
    }

    /// Whether the remote side is a DNS server's port.
    #[must_use]
    pub fn is_dns(&self) -> bool {
        self.key.proto == proto::UDP && self.key.remote.port() == 53
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_small() {
        let flow = size_of::<Option<Flow>>();
        assert!(flow <= 272, "a flow takes {flow} bytes");
        let idle = flow + size_of::<Tcb>();
        assert!(idle <= 1024, "an idle TCP flow takes {idle} bytes");
    }
}
