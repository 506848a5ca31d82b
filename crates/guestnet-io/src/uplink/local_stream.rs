//! Theory of operation: connections of guests to TCP services that the core serves itself. To the relay each is a socket
//! like any other, but it ends in memory: what the relay sends waits in `inbox` for the core, what the core sends in `outbox`
//! until the guest has acknowledged it. So a query costs no system call and no descriptor.
//!
//! A connection that the policy refuses gets its last words in the same way ([`LocalStreams::answer`]): nobody serves such
//! a socket, it holds what the guest is to read, and forgets what the guest sends.
//!
//! Numbers of these sockets have [`LOCAL`] set. News for the core wait in lists until the worker hands them over: calls
//! into the core never nest.
//!
//! Bounds: `inbox` holds one message of DNS over TCP; beyond, the relay is told to wait, and closes the guest's window.
//! `outbox` is bounded by the service.

use crate::memory::slab::Slab;
use guestnet_core::effects::{Close, Peek, SockError};
use guestnet_core::types::{FlowId, PortId, ServiceId, SockId};
use std::collections::HashSet;

/// Set in the number of each local socket.
const LOCAL: u32 = 1 << 31;
/// Bytes that wait for the core at most: a message of DNS over TCP with its length.
const INBOX_MAX: usize = 2 + 65535;
/// Acknowledged bytes in front of `outbox` that are not worth moving the rest for.
const SLACK: usize = 32 << 10;

struct LocalStream {
    flow: FlowId,
    /// The guest's port; `None` where nobody serves the connection.
    port: Option<PortId>,
    /// From the guest.
    inbox: Vec<u8>,
    /// The guest has ended its side.
    ended: bool,
    /// To the guest; the first `acknowledged` bytes are over.
    outbox: Vec<u8>,
    acknowledged: usize,
    /// How the service has ended it.
    closed: Option<Close>,
    /// The relay waits for room in `inbox`.
    wants_write: bool,
    /// It is in the list of those that the core is to read.
    to_read: bool,
    /// It is in the list of those that the relay is to read or write.
    ready: bool,
}

/// What the core is to read of a connection.
pub(crate) struct Input {
    pub sock: SockId,
    pub port: PortId,
    pub data: Vec<u8>,
    pub ended: bool,
}

/// All connections.
#[derive(Default)]
pub(crate) struct LocalStreams {
    slab: Slab<LocalStream>,
    /// Services that the core serves.
    services: HashSet<u32>,
    to_read: Vec<SockId>,
    ready: Vec<SockId>,
    gone: Vec<SockId>,
}

impl LocalStreams {
    /// Whether a socket is one of these.
    #[inline]
    pub(crate) fn has(sock: SockId) -> bool {
        sock.0 & LOCAL != 0
    }

    pub(crate) fn add_service(&mut self, service: ServiceId) {
        self.services.insert(service.0);
    }

    pub(crate) fn serves(&self, service: ServiceId) -> bool {
        self.services.contains(&service.0)
    }

    fn get(&mut self, sock: SockId) -> Option<&mut LocalStream> {
        self.slab.get_mut(sock.0 & !LOCAL)
    }

    /// A guest connects.
    pub(crate) fn open(&mut self, flow: FlowId, port: PortId) -> SockId {
        let sock = self.insert(flow, Some(port), Vec::new(), None);
        self.to_read.push(sock);
        sock
    }

    /// A connection from which the guest reads `answer` and the end.
    pub(crate) fn answer(&mut self, flow: FlowId, answer: &[u8]) -> SockId {
        self.insert(flow, None, answer.to_vec(), Some(Close::Graceful))
    }

    fn insert(
        &mut self,
        flow: FlowId,
        port: Option<PortId>,
        outbox: Vec<u8>,
        closed: Option<Close>,
    ) -> SockId {
        let index = self.slab.insert(LocalStream {
            flow,
            port,
            inbox: Vec::new(),
            ended: false,
            outbox,
            acknowledged: 0,
            closed,
            wants_write: false,
            to_read: true,
            ready: false,
        });
        SockId(index | LOCAL)
    }

    // ---- the relay's end ----------------------------------------------------------------------------

    pub(crate) fn send(&mut self, sock: SockId, data: &[u8]) -> Result<usize, SockError> {
        let s = self.get(sock).ok_or(SockError::Reset)?;
        match s.closed {
            Some(Close::Reset) => return Err(SockError::Reset),
            // The service reads no more, but the guest is to get what was sent before.
            Some(Close::Graceful) => return Ok(data.len()),
            None => {}
        }
        let n = data.len().min(INBOX_MAX.saturating_sub(s.inbox.len()));
        s.inbox.extend_from_slice(data.get(..n).unwrap_or(&[]));
        s.wants_write |= n < data.len();
        self.resume(sock);
        Ok(n)
    }

    pub(crate) fn peek(
        &mut self,
        sock: SockId,
        offset: usize,
        max: usize,
        scratch: &mut Vec<u8>,
    ) -> Result<Peek, SockError> {
        let s = self.get(sock).ok_or(SockError::Reset)?;
        if s.closed == Some(Close::Reset) {
            return Err(SockError::Reset);
        }
        let rest = s.outbox.get(s.acknowledged + offset..).unwrap_or(&[]);
        let data = rest.get(..max.min(rest.len())).unwrap_or(&[]);
        if data.is_empty() {
            return Ok(if s.closed.is_some() { Peek::Eof } else { Peek::Empty });
        }
        if scratch.len() < data.len() {
            scratch.resize(data.len(), 0);
        }
        if let Some(to) = scratch.get_mut(..data.len()) {
            to.copy_from_slice(data);
        }
        Ok(Peek::Data(data.len()))
    }

    pub(crate) fn discard(&mut self, sock: SockId, len: usize) {
        let Some(s) = self.get(sock) else { return };
        s.acknowledged = (s.acknowledged + len).min(s.outbox.len());
        if s.acknowledged == s.outbox.len() {
            // A connection that is idle holds nothing.
            (s.outbox, s.acknowledged) = (Vec::new(), 0);
        } else if s.acknowledged > SLACK {
            s.outbox.drain(..s.acknowledged);
            s.acknowledged = 0;
        }
        if !s.inbox.is_empty() {
            self.resume(sock);
        }
    }

    /// The guest has ended its side.
    pub(crate) fn shutdown(&mut self, sock: SockId) {
        if let Some(s) = self.get(sock) {
            s.ended = true;
            self.resume(sock);
        }
    }

    /// The relay is done with it.
    pub(crate) fn close(&mut self, sock: SockId) {
        if self.slab.remove(sock.0 & !LOCAL).is_some_and(|s| s.port.is_some()) {
            self.gone.push(sock);
        }
    }

    // ---- the service's end --------------------------------------------------------------------------

    /// Sends to the guest; bytes that it has not acknowledged.
    pub(crate) fn send_to_guest(&mut self, sock: SockId, data: &[u8]) -> usize {
        let Some(s) = self.get(sock).filter(|s| s.closed.is_none()) else { return 0 };
        s.outbox.extend_from_slice(data);
        let unread = s.outbox.len() - s.acknowledged;
        self.tell_relay(sock);
        unread
    }

    pub(crate) fn unread(&mut self, sock: SockId) -> usize {
        self.get(sock).map_or(0, |s| s.outbox.len() - s.acknowledged)
    }

    /// The core is to read it again.
    pub(crate) fn resume(&mut self, sock: SockId) {
        if let Some(s) = self.get(sock)
            && !std::mem::replace(&mut s.to_read, true)
        {
            self.to_read.push(sock);
        }
    }

    /// The service ends it. After a reset the relay's flow is to be told of the error.
    pub(crate) fn end(&mut self, sock: SockId, how: Close) -> Option<FlowId> {
        let s = self.get(sock)?;
        s.closed = Some(how);
        s.inbox = Vec::new();
        if how == Close::Reset {
            return Some(s.flow);
        }
        s.wants_write = true;
        self.tell_relay(sock);
        None
    }

    fn tell_relay(&mut self, sock: SockId) {
        if let Some(s) = self.get(sock)
            && !std::mem::replace(&mut s.ready, true)
        {
            self.ready.push(sock);
        }
    }

    // ---- news ---------------------------------------------------------------------------------------

    pub(crate) fn has_news(&self) -> bool {
        !self.to_read.is_empty() || !self.ready.is_empty() || !self.gone.is_empty()
    }

    /// Connections that are gone, before their numbers are used again.
    pub(crate) fn take_gone(&mut self) -> Vec<SockId> {
        std::mem::take(&mut self.gone)
    }

    /// What the core is to read. Each is given back with [`LocalStreams::has_read`].
    pub(crate) fn take_input(&mut self) -> Vec<Input> {
        let list = std::mem::take(&mut self.to_read);
        list.into_iter().filter_map(|sock| self.input(sock)).collect()
    }

    fn input(&mut self, sock: SockId) -> Option<Input> {
        let s = self.get(sock).filter(|s| s.to_read)?;
        s.to_read = false;
        let (data, open) = (std::mem::take(&mut s.inbox), s.closed.is_none());
        let port = s.port.filter(|_| open)?;
        Some(Input { sock, port, data, ended: s.ended })
    }

    /// The core has read the first `n` bytes of what it was given.
    pub(crate) fn has_read(&mut self, mut input: Input, n: usize) {
        let Some(s) = self.get(input.sock).filter(|s| s.closed.is_none()) else { return };
        input.data.drain(..n.min(input.data.len()));
        // Nothing came meanwhile, since calls do not nest.
        s.inbox = input.data;
        if s.inbox.is_empty() && s.inbox.capacity() > SLACK {
            s.inbox = Vec::new();
        }
        if s.wants_write && s.inbox.len() < INBOX_MAX {
            self.tell_relay(input.sock);
        }
    }

    /// Flows that have something to read, and whether there is room for what they have to send.
    pub(crate) fn take_ready(&mut self) -> Vec<(FlowId, bool)> {
        let list = std::mem::take(&mut self.ready);
        let ready = |sock| {
            let s = self.get(sock).filter(|s| s.ready)?;
            s.ready = false;
            Some((s.flow, std::mem::take(&mut s.wants_write)))
        };
        list.into_iter().filter_map(ready).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened() -> (LocalStreams, SockId, FlowId) {
        let mut l = LocalStreams::default();
        let flow = FlowId { index: 3, generation: 1 };
        let sock = l.open(flow, PortId(7));
        (l, sock, flow)
    }

    fn read(l: &mut LocalStreams, n: usize) -> Vec<(Vec<u8>, bool)> {
        let all = l.take_input();
        all.into_iter()
            .map(|input| {
                let got = (input.data.clone(), input.ended);
                l.has_read(input, n);
                got
            })
            .collect()
    }

    #[test]
    fn bytes_go_both_ways_and_what_is_not_read_comes_again() {
        let (mut l, sock, flow) = opened();
        assert!(LocalStreams::has(sock) && l.has_news());
        assert_eq!(read(&mut l, 0), [(vec![], false)], "the core hears of a new connection");
        assert_eq!(l.send(sock, b"abc"), Ok(3));
        assert_eq!(l.send(sock, b"def"), Ok(3));
        assert_eq!(read(&mut l, 2), [(b"abcdef".to_vec(), false)]);
        assert!(!l.has_news(), "until it asks for it");
        l.resume(sock);
        l.shutdown(sock);
        assert_eq!(read(&mut l, 4), [(b"cdef".to_vec(), true)]);
        let mut scratch = Vec::new();
        assert_eq!(l.peek(sock, 0, 10, &mut scratch), Ok(Peek::Empty));
        assert_eq!((l.send_to_guest(sock, b"answer"), l.send_to_guest(sock, b"s")), (6, 7));
        assert_eq!((l.take_ready(), l.take_ready()), (vec![(flow, false)], vec![]));
        assert_eq!(l.peek(sock, 2, 3, &mut scratch), Ok(Peek::Data(3)));
        assert_eq!(&scratch[..3], b"swe");
        l.discard(sock, 4);
        assert_eq!((l.unread(sock), l.peek(sock, 0, 10, &mut scratch)), (3, Ok(Peek::Data(3))));
        assert_eq!(&scratch[..3], b"ers");
        assert_eq!(l.end(sock, Close::Graceful), None);
        assert_eq!(l.peek(sock, 3, 10, &mut scratch), Ok(Peek::Eof));
        assert_eq!(l.send(sock, b"late"), Ok(4), "taken, and read by nobody");
        assert_eq!(read(&mut l, 4), []);
        l.close(sock);
        assert_eq!((l.take_gone(), l.take_ready()), (vec![sock], vec![]));
        assert_eq!((l.send(sock, b"x"), l.has_news()), (Err(SockError::Reset), false));
    }

    #[test]
    fn a_full_inbox_makes_the_relay_wait() {
        let (mut l, sock, flow) = opened();
        let large = vec![1; INBOX_MAX + 10];
        assert_eq!(l.send(sock, &large), Ok(INBOX_MAX));
        assert_eq!(l.send(sock, &large[INBOX_MAX..]), Ok(0));
        assert_eq!(read(&mut l, 0).len(), 1);
        assert_eq!(l.take_ready(), [], "it is still full");
        l.resume(sock);
        read(&mut l, 100);
        assert_eq!(l.take_ready(), [(flow, true)]);
        assert_eq!(l.send(sock, &large[INBOX_MAX..]), Ok(10));
    }

    #[test]
    fn an_answer_is_read_to_its_end_and_nobody_hears_of_it() {
        let mut l = LocalStreams::default();
        let sock = l.answer(FlowId { index: 3, generation: 1 }, b"denied");
        assert!(LocalStreams::has(sock));
        let mut scratch = Vec::new();
        assert_eq!(l.peek(sock, 0, 10, &mut scratch), Ok(Peek::Data(6)));
        assert_eq!(&scratch[..6], b"denied");
        assert_eq!(l.peek(sock, 6, 10, &mut scratch), Ok(Peek::Eof));
        assert_eq!(l.send(sock, b"what the guest still sends"), Ok(26));
        l.discard(sock, 6);
        assert_eq!(l.peek(sock, 0, 10, &mut scratch), Ok(Peek::Eof));
        l.shutdown(sock);
        l.close(sock);
        assert!(!l.has_news());
    }

    #[test]
    fn a_reset_is_an_error_for_the_flow() {
        let (mut l, sock, flow) = opened();
        l.send_to_guest(sock, b"answer");
        assert_eq!(l.end(sock, Close::Reset), Some(flow));
        assert_eq!(l.peek(sock, 0, 10, &mut Vec::new()), Err(SockError::Reset));
        assert_eq!(l.send(sock, b"x"), Err(SockError::Reset));
        assert_eq!(read(&mut l, 0), []);
    }
}
