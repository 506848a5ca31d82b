//! Theory of operation: DNS over TCP (RFC 7766) for guests. The relay ends a guest's connection in memory; what arrives
//! is read here as messages with a length before each, and answered in any order.
//!
//! Bounds: connections in all, where the guest that has the most loses the one that was idle longest for a new one;
//! queries of one connection that wait ([`PER_CONNECTION`]); bytes that a client has not read, of one connection
//! ([`UNREAD_PAUSE`], beyond it no query is read) and of all of a guest ([`UNREAD_MOST`], beyond it the connection is
//! reset). A connection that is idle for [`IDLE_S`] seconds is closed.

use crate::interface::effects::{Close, Effects};
use crate::interface::types::{PortId, SockId, Time};
use std::collections::BTreeMap;

/// Seconds that a connection may be idle.
const IDLE_S: u64 = 10;
/// Queries of one connection that wait at a time; more are not read until then.
const PER_CONNECTION: u32 = 32;
/// Bytes of responses that a client has not read, beyond which no query of its connection is read.
const UNREAD_PAUSE: usize = 64 << 10;
/// Bytes of responses that a guest has not read, on all its connections.
const UNREAD_MOST: usize = 4 << 20;
/// Milliseconds until a connection whose guest asks too much is read again.
const RETRY_MS: u64 = 20;

struct Stream {
    port: PortId,
    serial: u64,
    /// Queries that wait.
    waiting: u32,
    /// When the last message came or went.
    last: Time,
    /// The client has sent all that it will send.
    ended: bool,
    /// Something is left to be read.
    paused: bool,
    retry: Option<Time>,
}

/// All connections.
pub(super) struct Streams {
    list: BTreeMap<u32, Stream>,
    serial: u64,
    most: usize,
    /// Nothing is due before.
    next_check: Option<Time>,
}

/// A connection that may be read.
#[derive(Clone, Copy)]
pub(super) struct Readable {
    pub(super) port: PortId,
    pub(super) serial: u64,
}

impl Streams {
    pub(super) fn new(most: usize) -> Streams {
        Streams { list: BTreeMap::new(), serial: 0, most, next_check: None }
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    pub(super) fn is_sound(&self, waiting: usize) -> bool {
        self.list.len() <= self.most.max(1)
            && self.list.values().map(|s| s.waiting as usize).sum::<usize>() <= waiting
            && self.next_check.is_some() != self.list.is_empty()
    }

    pub(super) fn next_timer(&self) -> Option<Time> {
        self.next_check
    }

    fn check_at(&mut self, at: Time) {
        self.next_check = Some(self.next_check.map_or(at, |t| t.min(at)));
    }

    /// The connection, which is taken in when it is new.
    pub(super) fn open<E: Effects>(&mut self, now: Time, port: PortId, sock: SockId, fx: &mut E) -> Readable {
        if let Some(s) = self.list.get(&sock.0) {
            return Readable { port: s.port, serial: s.serial };
        }
        if self.list.len() >= self.most {
            self.make_room(fx);
        }
        self.serial += 1;
        let serial = self.serial;
        let s = Stream { port, serial, waiting: 0, last: now, ended: false, paused: false, retry: None };
        self.list.insert(sock.0, s);
        self.check_at(now.plus_s(IDLE_S));
        Readable { port, serial }
    }

    /// The guest that has the most connections loses the one that was idle longest.
    fn make_room<E: Effects>(&mut self, fx: &mut E) {
        let mut held: BTreeMap<PortId, u32> = BTreeMap::new();
        self.list.values().for_each(|s| *held.entry(s.port).or_default() += 1);
        let of = |s: &Stream| held.get(&s.port).copied().unwrap_or(0);
        let most = self.list.values().map(of).max().unwrap_or(0);
        let idle = self.list.iter().filter(|(_, s)| of(s) == most).min_by_key(|(_, s)| (s.last, s.serial));
        if let Some(sock) = idle.map(|(sock, _)| *sock) {
            self.end(SockId(sock), Close::Reset, fx);
        }
    }

    /// Whether another query of the connection may be read now; if not, the I/O side is told when it may.
    pub(super) fn may_read<E: Effects>(&mut self, sock: SockId, fx: &mut E) -> bool {
        let Some(s) = self.list.get_mut(&sock.0) else { return false };
        let free = s.waiting < PER_CONNECTION && fx.stream_unread(sock) < UNREAD_PAUSE;
        s.paused = !free;
        free
    }

    /// A whole message has come.
    pub(super) fn message_came(&mut self, now: Time, sock: SockId) {
        if let Some(s) = self.list.get_mut(&sock.0) {
            s.last = now;
        }
    }

    /// A query waits for its response.
    pub(super) fn waits(&mut self, sock: SockId) {
        if let Some(s) = self.list.get_mut(&sock.0) {
            s.waiting += 1;
        }
    }

    /// The guest asks too much: the connection is read again in a while.
    pub(super) fn retry(&mut self, now: Time, sock: SockId) {
        let at = now.plus_ms(RETRY_MS);
        if let Some(s) = self.list.get_mut(&sock.0) {
            s.retry = Some(at);
            self.check_at(at);
        }
    }

    /// The client has sent all that it will send, and it has been read: the connection ends with its last response.
    pub(super) fn ended<E: Effects>(&mut self, sock: SockId, fx: &mut E) {
        if let Some(s) = self.list.get_mut(&sock.0) {
            s.ended = true;
            self.end_if_done(sock, fx);
        }
    }

    fn end_if_done<E: Effects>(&mut self, sock: SockId, fx: &mut E) {
        if self.list.get(&sock.0).is_some_and(|s| s.ended && s.waiting == 0) {
            self.end(sock, Close::Graceful, fx);
        }
    }

    /// Ends a connection.
    pub(super) fn end<E: Effects>(&mut self, sock: SockId, how: Close, fx: &mut E) {
        if self.forget(sock) {
            fx.stream_close(sock, how);
        }
    }

    /// The connection is gone; true when there was one.
    pub(super) fn forget(&mut self, sock: SockId) -> bool {
        let was = self.list.remove(&sock.0).is_some();
        if self.list.is_empty() {
            self.next_check = None;
        }
        was
    }

    /// A port is gone, and its connections with it.
    pub(super) fn remove_port(&mut self, port: PortId) {
        self.list.retain(|_, s| s.port != port);
        if self.list.is_empty() {
            self.next_check = None;
        }
    }

    /// Sends a response with its length before it.
    pub(super) fn send<E: Effects>(
        &mut self,
        now: Time,
        sock: SockId,
        serial: u64,
        framed: &[u8],
        waited: bool,
        fx: &mut E,
    ) {
        let Some(s) = self.list.get_mut(&sock.0).filter(|s| s.serial == serial) else { return };
        if waited {
            s.waiting = s.waiting.saturating_sub(1);
        }
        s.last = now;
        let port = s.port;
        let resume = s.paused && s.waiting < PER_CONNECTION;
        let unread = fx.stream_send(sock, framed);
        if unread > UNREAD_PAUSE && self.unread_of(port, fx) > UNREAD_MOST {
            return self.end(sock, Close::Reset, fx);
        }
        if resume {
            fx.stream_resume(sock);
        }
        self.end_if_done(sock, fx);
    }

    fn unread_of<E: Effects>(&self, port: PortId, fx: &mut E) -> usize {
        let of_port = self.list.iter().filter(|(_, s)| s.port == port);
        of_port.map(|(sock, _)| fx.stream_unread(SockId(*sock))).sum()
    }

    /// Does what is due.
    pub(super) fn timers<E: Effects>(&mut self, now: Time, fx: &mut E) {
        if self.next_check.is_none_or(|t| now < t) {
            return;
        }
        let mut idle = Vec::new();
        let mut next = None;
        for (sock, s) in &mut self.list {
            if s.retry.is_some_and(|t| t <= now) {
                s.retry = None;
                fx.stream_resume(SockId(*sock));
            }
            let ends = s.last.plus_s(IDLE_S);
            if s.waiting == 0 && ends <= now {
                idle.push(SockId(*sock));
                continue;
            }
            // One that waits for a response is looked at again after that long.
            let ends = if ends <= now { now.plus_s(IDLE_S) } else { ends };
            let at = s.retry.map_or(ends, |t| t.min(ends));
            next = Some(next.map_or(at, |t: Time| t.min(at)));
        }
        self.next_check = next;
        for sock in idle {
            // What a client has not read for that long, it does not read.
            let how = if fx.stream_unread(sock) > 0 { Close::Reset } else { Close::Graceful };
            self.end(sock, how, fx);
        }
    }
}
