//! Theory of operation: queries that wait for the control side or for a name server.
//!
//! Duplicate queries are coalesced: clients that ask the same wait for one response. So a query that comes back through
//! a name server that asks a guest does not go round, and a guest cannot have many chances at once to be lied to.
//! States: [`Stage::Authority`], then [`Stage::Udp`] and [`Stage::Tcp`] for each server that is tried, see
//! [`super::upstream`]. Each query has one deadline, kept in order.
//!
//! Bounds: queries in all and of one guest ([`Shares`]), clients of one query ([`WAITERS_MAX`]).

use super::cache::Key;
use crate::interface::config::NameServers;
use crate::interface::types::{PortId, SockId, Time};
use guestnet_wire::dns::{Answer, Edns, Query, Record};
use guestnet_wire::ether::Mac;
use hashbrown::HashTable;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

/// Clients that wait for one response.
const WAITERS_MAX: usize = 64;

/// Where a response goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Client {
    /// A guest's UDP socket.
    Datagram {
        /// Its port.
        port: PortId,
        /// Its MAC.
        mac: Mac,
        /// Its address.
        src: SocketAddr,
        /// The address that it sent to.
        dst: SocketAddr,
    },
    /// A guest's TCP connection.
    Stream {
        /// Its port.
        port: PortId,
        /// The connection.
        sock: SockId,
        /// Tells it from another that had the same number.
        serial: u64,
    },
}

impl Client {
    pub(crate) fn port(&self) -> PortId {
        match self {
            Client::Datagram { port, .. } | Client::Stream { port, .. } => *port,
        }
    }

    pub(crate) fn is_tcp(&self) -> bool {
        matches!(self, Client::Stream { .. })
    }
}

/// A client that waits, with what is needed of its query.
pub(super) struct Waiter {
    pub(super) client: Client,
    id: u16,
    flags: u16,
    question: Box<[u8]>,
    edns: Option<Edns>,
}

impl Waiter {
    pub(super) fn new(client: Client, q: &Query<'_>) -> Waiter {
        Waiter { client, id: q.id, flags: q.flags, question: q.question.into(), edns: q.edns }
    }

    /// The query as it was read.
    pub(super) fn query(&self) -> Query<'_> {
        let kind = |at| guestnet_wire::be16(&self.question, self.question.len().saturating_sub(at));
        let (kind, class) = (kind(4), kind(2));
        Query { id: self.id, flags: self.flags, question: &self.question, kind, class, edns: self.edns }
    }
}

/// An alias of the network's own that points to a name of others.
pub(super) struct Chain {
    /// The records up to there.
    pub(super) records: Vec<Record>,
    /// The name that the last points to.
    pub(super) key: Key,
}

/// What a query waits for.
pub(super) enum Stage {
    /// The control side says whether the name is the network's own.
    Authority,
    /// Between two tries.
    Next,
    /// A datagram to a name server.
    Udp {
        /// The query's identifier.
        id: u16,
        /// The number of the socket.
        socket: u32,
        /// The message asked for a response of more than what no link fragments.
        large: bool,
    },
    /// A connection to a name server.
    Tcp {
        sock: SockId,
        /// The message, with its length.
        message: Box<[u8]>,
        /// Bytes of the response, with their length.
        received: Vec<u8>,
        connected: bool,
    },
}

/// How far the name servers have been tried.
pub(super) struct Plan {
    pub(super) servers: Arc<NameServers>,
    /// Servers in the order in which they are tried, as often as they are tried.
    pub(super) order: std::vec::IntoIter<SocketAddr>,
    /// The one that is asked now.
    pub(super) server: Option<SocketAddr>,
    /// Whether it is asked with EDNS.
    pub(super) edns: bool,
    /// When its time is over.
    pub(super) try_ends: Time,
    /// When the time of all is over.
    pub(super) ends: Time,
    /// Those whose response says more about themselves than about the name.
    pub(super) poor: Vec<SocketAddr>,
    /// The first such response.
    pub(super) first_poor: Option<(Answer, Box<[u8]>)>,
}

/// A query.
pub(super) struct Pending {
    /// What the clients asked for.
    pub(super) key: Key,
    /// Recursion is desired.
    pub(super) rd: bool,
    /// The clients have TCP, so the whole response is needed.
    pub(super) tcp: bool,
    pub(super) waiters: Vec<Waiter>,
    pub(super) chain: Option<Box<Chain>>,
    pub(super) stage: Stage,
    pub(super) plan: Option<Box<Plan>>,
    deadline: Time,
}

impl Pending {
    /// What is asked of name servers.
    pub(super) fn target(&self) -> &Key {
        self.chain.as_ref().map_or(&self.key, |c| &c.key)
    }

    fn is_same(&self, key: &Key, rd: bool, tcp: bool) -> bool {
        (self.rd, self.tcp) == (rd, tcp) && self.key.bytes() == key.bytes()
    }
}

/// How much of the table guests have.
#[derive(Default)]
pub(super) struct Shares {
    ports: BTreeMap<PortId, u32>,
    total: u32,
}

/// Bounds of [`Shares`].
#[derive(Clone, Copy)]
pub(super) struct Bounds {
    /// Clients that wait, in all; beyond, each guest has [`ALWAYS`].
    pub(super) all: u32,
    /// Of those, clients of one guest.
    pub(super) of_one_port: u32,
}

/// Queries that each guest may have outstanding however many others have.
const ALWAYS: u32 = 8;

impl Shares {
    /// Whether a guest may have one more.
    pub(super) fn allow(&self, port: PortId, bounds: Bounds) -> bool {
        let most = if self.total >= bounds.all { ALWAYS.min(bounds.of_one_port) } else { bounds.of_one_port };
        self.of(port) < most
    }

    pub(super) fn of(&self, port: PortId) -> u32 {
        self.ports.get(&port).copied().unwrap_or(0)
    }

    fn add(&mut self, port: PortId) {
        *self.ports.entry(port).or_default() += 1;
        self.total += 1;
    }

    fn remove(&mut self, port: PortId) {
        if let Some(n) = self.ports.get_mut(&port) {
            *n -= 1;
            self.total -= 1;
            if *n == 0 {
                self.ports.remove(&port);
            }
        }
    }
}

/// All queries. A ticket names one for good.
pub(super) struct Table {
    list: BTreeMap<u64, Pending>,
    by_key: HashTable<u64>,
    by_id: BTreeMap<u16, u64>,
    deadlines: BTreeSet<(Time, u64)>,
    pub(super) shares: Shares,
    ticket: u64,
}

impl Table {
    /// `first`: the first ticket; random, so that a reply to another worker's question finds nothing.
    pub(super) fn new(first: u64) -> Table {
        Table {
            list: BTreeMap::new(),
            by_key: HashTable::new(),
            by_id: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            shares: Shares::default(),
            ticket: first,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    pub(super) fn get(&self, ticket: u64) -> Option<&Pending> {
        self.list.get(&ticket)
    }

    pub(super) fn get_mut(&mut self, ticket: u64) -> Option<&mut Pending> {
        self.list.get_mut(&ticket)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &Pending)> {
        self.list.iter().map(|(ticket, p)| (*ticket, p))
    }

    /// The query that asks the same.
    pub(super) fn find(&self, key: &Key, rd: bool, tcp: bool) -> Option<u64> {
        let same = |t: &u64| self.list.get(t).is_some_and(|p| p.is_same(key, rd, tcp));
        self.by_key.find(key.hash, same).copied()
    }

    /// Lets one more client wait; false when too many do.
    pub(super) fn join(&mut self, ticket: u64, waiter: Waiter) -> bool {
        let Some(p) = self.list.get_mut(&ticket).filter(|p| p.waiters.len() < WAITERS_MAX) else {
            return false;
        };
        self.shares.add(waiter.client.port());
        p.waiters.push(waiter);
        true
    }

    /// A new query.
    pub(super) fn insert(&mut self, key: Key, rd: bool, waiter: Waiter) -> u64 {
        self.ticket = self.ticket.wrapping_add(1);
        let (ticket, hash, tcp) = (self.ticket, key.hash, waiter.client.is_tcp());
        self.shares.add(waiter.client.port());
        let p = Pending {
            key,
            rd,
            tcp,
            waiters: vec![waiter],
            chain: None,
            stage: Stage::Next,
            plan: None,
            deadline: Time(u64::MAX),
        };
        self.list.insert(ticket, p);
        let list = &self.list;
        self.by_key.insert_unique(hash, ticket, |t| list.get(t).map_or(0, |p| p.key.hash));
        ticket
    }

    /// Takes out the clients of a query that `takes` chooses, in their order.
    pub(super) fn take_waiters(
        &mut self,
        ticket: u64,
        mut takes: impl FnMut(&Waiter) -> bool,
    ) -> Vec<Waiter> {
        let Some(p) = self.list.get_mut(&ticket) else { return Vec::new() };
        let (taken, kept) = std::mem::take(&mut p.waiters).into_iter().partition(|w| takes(w));
        p.waiters = kept;
        let taken: Vec<Waiter> = taken;
        taken.iter().for_each(|w| self.shares.remove(w.client.port()));
        taken
    }

    /// Ends a query. The caller has given its stage back.
    pub(super) fn remove(&mut self, ticket: u64) -> Option<Pending> {
        let p = self.list.remove(&ticket)?;
        if let Ok(found) = self.by_key.find_entry(p.key.hash, |t| *t == ticket) {
            found.remove();
        }
        self.deadlines.remove(&(p.deadline, ticket));
        p.waiters.iter().for_each(|w| self.shares.remove(w.client.port()));
        Some(p)
    }

    /// Sets when a query is to be looked at.
    pub(super) fn set_deadline(&mut self, ticket: u64, at: Time) {
        let Some(p) = self.list.get_mut(&ticket) else { return };
        self.deadlines.remove(&(p.deadline, ticket));
        p.deadline = at;
        self.deadlines.insert((at, ticket));
    }

    /// A query whose deadline is over.
    pub(super) fn overdue(&self, now: Time) -> Option<u64> {
        self.deadlines.first().filter(|d| d.0 <= now).map(|d| d.1)
    }

    pub(super) fn next_timer(&self) -> Option<Time> {
        self.deadlines.first().map(|d| d.0)
    }

    /// Reserves an identifier of a message; false when another query has it.
    pub(super) fn reserve(&mut self, id: u16, ticket: u64) -> bool {
        let free = !self.by_id.contains_key(&id);
        if free {
            self.by_id.insert(id, ticket);
        }
        free
    }

    pub(super) fn free(&mut self, id: u16) {
        self.by_id.remove(&id);
    }

    pub(super) fn by_id(&self, id: u16) -> Option<u64> {
        self.by_id.get(&id).copied()
    }

    /// A guest has left: it waits for nothing any more.
    pub(super) fn remove_port(&mut self, port: PortId) {
        for p in self.list.values_mut() {
            let before = p.waiters.len();
            p.waiters.retain(|w| w.client.port() != port);
            (p.waiters.len()..before).for_each(|_| self.shares.remove(port));
        }
    }

    /// Whether the books agree; `sockets` is how many queries UDP sockets say wait for a response.
    pub(super) fn is_sound(&self, sockets: u32) -> bool {
        let waiters: usize = self.list.values().map(|p| p.waiters.len()).sum();
        let udp = self.list.values().filter(|p| matches!(p.stage, Stage::Udp { .. })).count();
        self.by_key.len() == self.list.len()
            && self.deadlines.len() == self.list.len()
            && self.by_id.len() == udp
            && sockets as usize == udp
            && self.shares.total as usize == waiters
            && self.shares.ports.values().sum::<u32>() as usize == waiters
    }
}
