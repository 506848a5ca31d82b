//! Theory of operation: questions that are on their way to a name server. Each has a number that cannot be guessed,
//! unlike those of all others under way, and leaves from a socket whose port the kernel chose at random and that is
//! changed often (one, so that the questions of a batch leave in one call); an answer must come from the server, on that socket, with that number and question
//! (RFC 5452). Who asks what is being asked already waits with the first, so a guest cannot have many chances to be
//! lied to at once. Bounded in number, for each guest and for all. Time-outs are all alike, so a queue keeps them.

use crate::dns::cache::Key;
use crate::interface::effects::{Close, Effects};
use crate::interface::types::{FlowId, PortId, SockId, Time};
use crate::util::siphash::SipKey;
use guestnet_wire::be16;
use guestnet_wire::dns::IN;
use guestnet_wire::ether::Mac;
use hashbrown::HashTable;
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;

/// Questions under way in all.
pub(crate) const QUESTIONS: usize = 1024;
/// Of those that one port may wait for.
pub(crate) const QUESTIONS_PER_PORT: u32 = 128;
/// Who waits for one answer.
const WAITERS: usize = 32;
/// Milliseconds until the control side is asked instead.
pub(crate) const PATIENCE_MS: u64 = 1000;
/// Sockets, those that only wait for answers included.
const SOCKETS_MAX: usize = 16;
/// Questions from one socket.
const USES: u32 = 128;
/// Seconds for which questions leave from one socket.
const USED_S: u64 = 10;
/// Datagrams on one socket that are no answer: somebody is guessing.
const WRONG_MAX: u32 = 64;
/// Seconds until sockets without questions are closed.
const IDLE_S: u64 = 10;
/// Flow index of the sockets here; the flow table never gets so long.
pub(crate) const FLOW: u32 = u32::MAX;

/// A query that waits.
pub(crate) struct Waiter {
    pub(crate) port: PortId,
    pub(crate) mac: Mac,
    pub(crate) src: SocketAddr,
    pub(crate) dst: SocketAddr,
    pub(crate) query: Box<[u8]>,
}

/// A question under way.
pub(crate) struct Asked {
    pub(crate) key: Key,
    pub(crate) waiters: Vec<Waiter>,
    /// What was known when it was asked.
    pub(crate) epoch: u64,
    serial: u64,
    server: SocketAddr,
    socket: u32,
}

struct Socket {
    serial: u32,
    sock: SockId,
    v6: bool,
    opened: Time,
    used: u32,
    waits: u32,
    wrong: u32,
}

/// See the module head.
#[derive(Default)]
pub(crate) struct PendingQueries {
    asked: BTreeMap<u16, Asked>,
    questions: HashTable<u16>,
    order: VecDeque<(Time, u16, u64)>,
    sockets: Vec<Socket>,
    last: Time,
    serial: u64,
    socket_serial: u32,
    drawn: u64,
}

fn same(a: SocketAddr, b: SocketAddr) -> bool {
    (a.ip().to_canonical(), a.port()) == (b.ip().to_canonical(), b.port())
}

impl PendingQueries {
    pub(crate) fn len(&self) -> usize {
        self.asked.len()
    }

    /// All that wait.
    pub(crate) fn waiters(&self) -> impl Iterator<Item = &Waiter> {
        self.asked.values().flat_map(|a| &a.waiters)
    }

    /// Whether the books agree.
    pub(crate) fn is_sound(&self) -> bool {
        let waits: u32 = self.sockets.iter().map(|s| s.waits).sum();
        self.questions.len() == self.asked.len()
            && waits as usize == self.asked.len()
            && self.asked.len() <= QUESTIONS
            && self.sockets.len() <= SOCKETS_MAX
            && self.order.len() <= 2 * QUESTIONS
    }

    /// Lets one more wait for a question that is under way; the waiter back when it is not, or has too many.
    pub(crate) fn join(&mut self, key: &Key, waiter: Waiter) -> Result<(), Option<Waiter>> {
        let asked = &self.asked;
        let equal = |id: &u16| asked.get(id).is_some_and(|a| a.key.bytes() == key.bytes());
        let Some(id) = self.questions.find(key.hash, equal).copied() else { return Err(Some(waiter)) };
        match self.asked.get_mut(&id).filter(|a| a.waiters.len() < WAITERS) {
            Some(a) => a.waiters.push(waiter),
            None => return Err(None),
        }
        Ok(())
    }

    /// A random number.
    fn draw(&mut self, sip: SipKey) -> u64 {
        self.drawn = self.drawn.wrapping_add(1);
        sip.hash(&[self.drawn, 0])
    }

    /// A number for a new question, and a socket for it.
    pub(crate) fn prepare<E: Effects>(
        &mut self,
        now: Time,
        sip: SipKey,
        server: SocketAddr,
        fx: &mut E,
    ) -> Option<(u16, SockId, u32)> {
        if self.asked.len() >= QUESTIONS {
            return None;
        }
        let drawn = self.draw(sip);
        let id = drawn as u16;
        // With a 64th of all numbers taken, another try will find a free one.
        let id = if self.asked.contains_key(&id) { (drawn >> 16) as u16 } else { id };
        if self.asked.contains_key(&id) {
            return None;
        }
        let v6 = server.is_ipv6();
        let fresh = |s: &Socket| s.v6 == v6 && s.used < USES && now < s.opened.plus_s(USED_S);
        self.sockets.retain(|s| {
            let stays = fresh(s) || s.waits > 0;
            if !stays {
                fx.close(s.sock, Close::Graceful);
            }
            stays
        });
        if !self.sockets.iter().any(fresh) && self.sockets.len() < SOCKETS_MAX {
            let serial = self.socket_serial.wrapping_add(1);
            let sock = fx.udp_open(FlowId { index: FLOW, generation: serial }, server).ok()?;
            self.socket_serial = serial;
            self.sockets.push(Socket { serial, sock, v6, opened: now, used: 0, waits: 0, wrong: 0 });
        }
        let s = self.sockets.iter_mut().find(|s| fresh(s))?;
        s.used += 1;
        Some((id, s.sock, s.serial))
    }

    /// Notes a question that was sent.
    #[allow(clippy::too_many_arguments)] // What a question is made of.
    pub(crate) fn insert(
        &mut self,
        now: Time,
        id: u16,
        socket: u32,
        server: SocketAddr,
        epoch: u64,
        key: Key,
        waiter: Waiter,
    ) {
        self.serial += 1;
        self.last = now;
        if self.order.len() >= 2 * QUESTIONS {
            // Those that were answered while an older one was not.
            let asked = &self.asked;
            self.order.retain(|at| asked.get(&at.1).is_some_and(|a| a.serial == at.2));
        }
        self.order.push_back((now.plus_ms(PATIENCE_MS), id, self.serial));
        if let Some(s) = self.sockets.iter_mut().find(|s| s.serial == socket) {
            s.waits += 1;
        }
        let hash = key.hash;
        let asked = Asked { key, waiters: vec![waiter], epoch, serial: self.serial, server, socket };
        self.asked.insert(id, asked);
        let asked = &self.asked;
        self.questions.insert_unique(hash, id, |id| asked.get(id).map_or(0, |a| a.key.hash));
    }

    fn take<E: Effects>(&mut self, id: u16, fx: &mut E) -> Option<Asked> {
        let asked = self.asked.remove(&id)?;
        if let Ok(found) = self.questions.find_entry(asked.key.hash, |i| *i == id) {
            found.remove();
        }
        let current = |at: &(Time, u16, u64)| self.asked.get(&at.1).is_some_and(|a| a.serial == at.2);
        while self.order.front().is_some_and(|at| !current(at)) {
            self.order.pop_front();
        }
        if let Some(at) = self.sockets.iter().position(|s| s.serial == asked.socket) {
            let s = self.sockets.get_mut(at)?;
            s.waits -= 1;
            if s.waits == 0 && s.used >= USES {
                fx.close(s.sock, Close::Graceful);
                self.sockets.swap_remove(at);
            }
        }
        Some(asked)
    }

    /// The question that a message from `from` answers, `question` being the one that it repeats; `None`: none.
    pub(crate) fn answered<E: Effects>(
        &mut self,
        socket: u32,
        from: SocketAddr,
        id: u16,
        question: Option<&[u8]>,
        fx: &mut E,
    ) -> Option<Asked> {
        let fits = self.asked.get(&id).is_some_and(|a| {
            let repeats = |q: &[u8]| {
                let (name, rest) = q.split_at(q.len().saturating_sub(4));
                let kind = a.key.bytes().get(name.len()..name.len() + 2);
                name.eq_ignore_ascii_case(a.key.name()) && rest.get(..2) == kind && be16(rest, 2) == IN
            };
            a.socket == socket && same(a.server, from) && question.is_none_or(repeats)
        });
        if fits {
            return self.take(id, fx);
        }
        if let Some(s) = self.sockets.iter_mut().find(|s| s.serial == socket) {
            s.wrong += 1;
        }
        None
    }

    /// The questions of a socket on which somebody guesses; it is used no more.
    pub(crate) fn give_up<E: Effects>(&mut self, socket: u32, fx: &mut E) -> Vec<Asked> {
        let Some(s) = self.sockets.iter_mut().find(|s| s.serial == socket && s.wrong >= WRONG_MAX) else {
            return Vec::new();
        };
        let (sock, waits) = (s.sock, s.waits);
        s.used = USES;
        if waits == 0 {
            fx.close(sock, Close::Graceful);
            self.sockets.retain(|s| s.serial != socket);
        }
        let ids: Vec<u16> =
            self.asked.iter().filter(|(_, a)| a.socket == socket).map(|(id, _)| *id).collect();
        ids.into_iter().filter_map(|id| self.take(id, fx)).collect()
    }

    /// A question whose time is over.
    pub(crate) fn overdue<E: Effects>(&mut self, now: Time, fx: &mut E) -> Option<Asked> {
        let (_, id, _) = self.order.front().filter(|at| at.0 <= now)?;
        self.take(*id, fx)
    }

    /// A port is gone, and nobody there waits any more.
    pub(crate) fn remove_port(&mut self, port: PortId) {
        self.asked.values_mut().for_each(|a| a.waiters.retain(|w| w.port != port));
    }

    /// Closes sockets that nobody has used for long.
    pub(crate) fn tidy<E: Effects>(&mut self, now: Time, fx: &mut E) {
        if self.asked.is_empty() && self.last.plus_s(IDLE_S) <= now {
            for s in self.sockets.drain(..) {
                fx.close(s.sock, Close::Graceful);
            }
        }
    }

    pub(crate) fn next_timer(&self) -> Option<Time> {
        let idle = (!self.sockets.is_empty()).then(|| self.last.plus_s(IDLE_S));
        self.order.front().map(|at| at.0).or(idle)
    }
}
