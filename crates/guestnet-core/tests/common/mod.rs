//! Theory of operation: a mock of the world for tests of the core. Everything that the core makes happen is
//! kept in plain vectors; host sockets are byte buffers whose room, data, end and errors the test sets. Use
//! of a closed or unknown socket, and a peek that breaks its contract, fail the test at once.
#![allow(dead_code, missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use guestnet_core::effects::{Close, Effects, Event, Peek, Peer, SockError, TxError};
use guestnet_core::types::{FlowId, FrameMeta, IpFields, PortId, SockId, Target};
use std::collections::{HashMap, HashSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

/// A frame that was sent to a port.
#[derive(Debug, Clone)]
pub struct Sent {
    pub port: PortId,
    pub frame: Vec<u8>,
    pub meta: FrameMeta,
}

/// One port's queue.
#[derive(Debug, Clone)]
pub struct MockPort {
    /// Bytes of frames that it still takes; `usize::MAX` for no limit.
    pub room: usize,
    pub gone: bool,
    /// Set when a frame or a question for room was answered with "full": the core is owed `port_writable`.
    pub owed_writable: bool,
}

impl Default for MockPort {
    fn default() -> Self {
        MockPort { room: usize::MAX, gone: false, owed_writable: false }
    }
}

/// One host socket.
#[derive(Debug, Clone, Default)]
pub struct MockSock {
    pub flow: Option<FlowId>,
    pub target: Option<Target>,
    pub ttl: u8,
    pub tos: u8,
    /// The kernel's memory that it holds, and whether it is told to take little.
    pub held: usize,
    pub tight: bool,
    /// Offsets of bytes that were sent as urgent.
    pub urgent: Vec<usize>,
    /// Bytes that `tcp_send` took.
    pub sent: Vec<u8>,
    /// How many more bytes `tcp_send` takes; `None` for no limit.
    pub send_room: Option<usize>,
    /// What the next `tcp_send` fails with.
    pub send_error: Option<SockError>,
    /// Unread bytes.
    pub inbox: VecDeque<u8>,
    /// There are zeros to read without end, whatever `inbox` has.
    pub endless: bool,
    /// The peer closed after `inbox`.
    pub eof: bool,
    /// Which bytes of all that ever came are urgent, as long as they were not peeked.
    pub marks: Vec<u64>,
    /// A peek that reaches the end says so with the bytes.
    pub tells_last: bool,
    /// What `tcp_peek` fails with.
    pub peek_error: Option<SockError>,
    /// What `tcp_peer` counts.
    pub segments_in: u32,
    /// What was sent is not acknowledged.
    pub busy: bool,
    /// The socket tells nothing of its peer.
    pub peer_unknown: bool,
    /// Keep-alive probes sent to the peer.
    pub probes: usize,
    /// SHUT_WR was done.
    pub shut: bool,
    pub closed: Option<Close>,
    /// Bytes discarded so far.
    pub discarded: u64,
    /// Set when a send fell short: the core is owed `tcp_ready(writable)`.
    pub owed_writable: bool,
}

/// A datagram that was sent through a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SentDatagram {
    pub sock: SockId,
    pub dst: SocketAddr,
    pub payload: Vec<u8>,
    pub segment: u16,
    pub ttl: u8,
    pub tos: u8,
    pub dont_fragment: bool,
    pub via_forward: bool,
}

/// An echo request that was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SentPing {
    pub sock: SockId,
    pub dst: IpAddr,
    pub seq: u16,
    pub body: Vec<u8>,
    pub ttl: u8,
    pub dont_fragment: bool,
}

/// The world.
#[derive(Debug, Default)]
pub struct Mock {
    /// Frames sent, oldest first; tests take them out.
    pub frames: Vec<Sent>,
    pub ports: HashMap<PortId, MockPort>,
    pub socks: HashMap<SockId, MockSock>,
    /// Every socket ever closed and how.
    pub closed: Vec<(SockId, Close)>,
    next_sock: u32,
    /// What the next `tcp_connect`, `udp_open`, `ping_open` fails with.
    pub open_error: Option<SockError>,
    /// What the next datagram or ping send fails with.
    pub datagram_error: Option<SockError>,
    /// TCP connects in order.
    pub connects: Vec<(FlowId, SockId)>,
    /// UDP and ping sockets in order of opening.
    pub opened: Vec<(FlowId, SockId)>,
    pub datagrams: Vec<SentDatagram>,
    pub pings: Vec<SentPing>,
    pub events: Vec<Event>,
    /// Events are lost for want of room.
    pub event_ring_full: bool,
    /// What left through the uplink of packets, behind 14 bytes that mean nothing.
    pub uplink: Vec<(Vec<u8>, FrameMeta)>,
    /// It takes no more.
    pub uplink_full: bool,
    /// What the core sent to guests on connections to its own services, by socket.
    pub streams: HashMap<SockId, Vec<u8>>,
    /// Bytes of those that the guest has not acknowledged, where a test says so.
    pub unread: HashMap<SockId, usize>,
    pub streams_closed: Vec<(SockId, Close)>,
    pub streams_resumed: Vec<SockId>,
    /// Sockets that hold the last words of refused connections, in order.
    pub answers: Vec<SockId>,
    /// There are no such sockets.
    pub no_answers: bool,
    scratch: Vec<u8>,
    /// Calls of `tcp_peek`, for tests that count system calls.
    pub peeks: usize,
    /// Sockets that were closed and whose numbers were not given again.
    dead: HashSet<SockId>,
}

impl Mock {
    pub fn new() -> Mock {
        Mock::default()
    }

    /// A new host socket, as `accept` would give it.
    pub fn new_sock(&mut self) -> SockId {
        self.next_sock += 1;
        let id = SockId(self.next_sock);
        self.socks.insert(id, MockSock::default());
        id
    }

    /// The socket; fails the test when it is unknown or closed.
    #[track_caller]
    pub fn sock(&mut self, id: SockId) -> &mut MockSock {
        self.socks.get_mut(&id).unwrap_or_else(|| panic!("{id:?} is not open"))
    }

    pub fn port(&mut self, id: PortId) -> &mut MockPort {
        self.ports.entry(id).or_default()
    }

    /// Takes all frames sent so far.
    pub fn take(&mut self) -> Vec<Sent> {
        std::mem::take(&mut self.frames)
    }

    #[track_caller]
    fn live(&mut self, id: SockId) -> &mut MockSock {
        assert!(!self.dead.contains(&id), "{id:?} used after close");
        self.socks.get_mut(&id).unwrap_or_else(|| panic!("{id:?} was never opened"))
    }

    fn open(&mut self, flow: FlowId) -> Result<SockId, SockError> {
        if let Some(e) = self.open_error.take() {
            return Err(e);
        }
        let id = self.new_sock();
        self.sock(id).flow = Some(flow);
        Ok(id)
    }

    fn queue(&mut self, port: PortId, frame: Vec<u8>, meta: FrameMeta) -> Result<(), TxError> {
        let p = self.ports.entry(port).or_default();
        if p.gone {
            return Err(TxError::Gone);
        }
        if p.room < frame.len() {
            p.owed_writable = true;
            return Err(TxError::Full);
        }
        if p.room != usize::MAX {
            p.room -= frame.len();
        }
        self.frames.push(Sent { port, frame, meta });
        Ok(())
    }
}

impl Effects for Mock {
    fn transmit(&mut self, port: PortId, frame: &[u8], meta: FrameMeta) -> Result<(), TxError> {
        self.queue(port, frame.to_vec(), meta)
    }

    fn transmit_peeked(
        &mut self,
        port: PortId,
        header: &[u8],
        payload: Range<usize>,
        meta: FrameMeta,
    ) -> Result<(), TxError> {
        let mut frame = header.to_vec();
        frame.extend_from_slice(&self.scratch[payload]);
        self.queue(port, frame, meta)
    }

    fn uplink(&mut self, frame: &[u8], meta: FrameMeta) -> Result<(), TxError> {
        if self.uplink_full {
            return Err(TxError::Full);
        }
        self.uplink.push((frame.to_vec(), meta));
        Ok(())
    }

    fn port_room(&mut self, port: PortId) -> usize {
        let p = self.ports.entry(port).or_default();
        if p.gone {
            return 0;
        }
        if p.room == 0 {
            p.owed_writable = true;
        }
        p.room
    }

    fn tcp_connect(
        &mut self,
        flow: FlowId,
        target: Target,
        ip: IpFields,
        tight: bool,
    ) -> Result<SockId, SockError> {
        let id = self.open(flow)?;
        let s = self.sock(id);
        s.target = Some(target);
        (s.ttl, s.tos, s.tight) = (ip.ttl, ip.tos, tight);
        self.connects.push((flow, id));
        Ok(id)
    }

    fn tcp_held(&mut self, sock: SockId) -> usize {
        self.live(sock).held
    }

    fn tcp_tighten(&mut self, sock: SockId, tight: bool) {
        let s = self.live(sock);
        assert_ne!(std::mem::replace(&mut s.tight, tight), tight, "said twice");
    }

    fn tcp_tos(&mut self, sock: SockId, tos: u8) {
        self.live(sock).tos = tos;
    }

    fn tcp_send_urgent(&mut self, sock: SockId, byte: u8) -> Result<bool, SockError> {
        let sent = self.tcp_send(sock, &[byte])? == 1;
        let s = self.live(sock);
        if sent {
            s.urgent.push(s.sent.len() - 1);
        }
        Ok(sent)
    }

    fn tcp_send(&mut self, sock: SockId, data: &[u8]) -> Result<usize, SockError> {
        let s = self.live(sock);
        assert!(!s.shut, "send after shutdown");
        if let Some(e) = s.send_error {
            return Err(e);
        }
        let n = data.len().min(s.send_room.unwrap_or(usize::MAX));
        s.sent.extend_from_slice(&data[..n]);
        if let Some(room) = &mut s.send_room {
            *room -= n;
        }
        if n < data.len() {
            s.owed_writable = true;
        }
        Ok(n)
    }

    fn tcp_peek(&mut self, sock: SockId, offset: usize, max: usize) -> Result<Peek, SockError> {
        self.peeks += 1;
        assert!(max > 0 && max <= 65536, "peek of {max}");
        let s = self.live(sock);
        if let Some(e) = s.peek_error {
            return Err(e);
        }
        if s.endless {
            self.scratch.clear();
            self.scratch.resize(max, 0);
            return Ok(Peek::Data(max));
        }
        assert!(offset <= s.inbox.len(), "peek at {offset} of {}", s.inbox.len());
        // A read ends before a mark, and at one it is a byte long.
        let at = s.discarded + offset as u64;
        let marked = s.marks.iter().position(|m| *m == at).map(|i| s.marks.swap_remove(i));
        let before = s.marks.iter().filter(|m| **m > at).map(|m| (m - at) as usize).min();
        let most = if marked.is_some() { 1 } else { max.min(before.unwrap_or(max)) };
        let bytes: Vec<u8> = s.inbox.iter().skip(offset).take(most).copied().collect();
        if bytes.is_empty() {
            return Ok(if s.eof { Peek::Eof } else { Peek::Empty });
        }
        let n = bytes.len();
        let last = s.eof && s.tells_last && n < max;
        self.scratch = bytes;
        Ok(match marked {
            Some(_) => Peek::Urgent,
            None if last => Peek::Last(n),
            None => Peek::Data(n),
        })
    }

    fn peeked(&self, len: usize) -> &[u8] {
        &self.scratch[..len.min(self.scratch.len())]
    }

    fn tcp_discard(&mut self, sock: SockId, len: usize) {
        let s = self.live(sock);
        if s.endless {
            s.discarded += len as u64;
            return;
        }
        assert!(len <= s.inbox.len(), "discard of {len} of {}", s.inbox.len());
        s.inbox.drain(..len);
        s.discarded += len as u64;
    }

    fn tcp_read(&mut self, sock: SockId, out: &mut Vec<u8>, max: usize) -> Result<Peek, SockError> {
        let s = self.live(sock);
        if let Some(e) = s.peek_error {
            return Err(e);
        }
        let n = s.inbox.len().min(max);
        out.extend(s.inbox.drain(..n));
        Ok(match n {
            0 if s.eof => Peek::Eof,
            0 => Peek::Empty,
            n => Peek::Data(n),
        })
    }

    fn tcp_answer(&mut self, flow: FlowId, answer: &[u8]) -> Result<SockId, SockError> {
        if self.no_answers {
            return Err(SockError::Exhausted);
        }
        let id = self.new_sock();
        let s = self.sock(id);
        (s.flow, s.eof) = (Some(flow), true);
        s.inbox.extend(answer);
        self.answers.push(id);
        Ok(id)
    }

    fn stream_send(&mut self, sock: SockId, data: &[u8]) -> usize {
        self.streams.entry(sock).or_default().extend_from_slice(data);
        self.stream_unread(sock)
    }

    fn stream_unread(&mut self, sock: SockId) -> usize {
        self.unread.get(&sock).copied().unwrap_or(0)
    }

    fn stream_resume(&mut self, sock: SockId) {
        self.streams_resumed.push(sock);
    }

    fn stream_close(&mut self, sock: SockId, how: Close) {
        self.streams_closed.push((sock, how));
    }

    fn tcp_shutdown(&mut self, sock: SockId) {
        let s = self.live(sock);
        assert!(!s.shut, "shut down twice");
        s.shut = true;
    }

    fn tcp_peer(&mut self, sock: SockId) -> Option<Peer> {
        let s = self.live(sock);
        (!s.peer_unknown).then_some(Peer { segments_in: s.segments_in, busy: s.busy })
    }

    fn tcp_probe(&mut self, sock: SockId) {
        self.live(sock).probes += 1;
    }

    fn udp_open(&mut self, flow: FlowId, _like: SocketAddr) -> Result<SockId, SockError> {
        let id = self.open(flow)?;
        self.opened.push((flow, id));
        Ok(id)
    }

    fn udp_send(
        &mut self,
        sock: SockId,
        dst: SocketAddr,
        payload: &[u8],
        segment: u16,
        ip: IpFields,
        dont_fragment: bool,
    ) -> Result<(), SockError> {
        self.live(sock);
        if let Some(e) = self.datagram_error.take() {
            return Err(e);
        }
        let payload = payload.to_vec();
        let (IpFields { ttl, tos }, via_forward) = (ip, false);
        self.datagrams.push(SentDatagram {
            sock,
            dst,
            payload,
            segment,
            ttl,
            tos,
            dont_fragment,
            via_forward,
        });
        Ok(())
    }

    fn udp_send_forward(&mut self, sock: SockId, dst: SocketAddr, payload: &[u8]) -> Result<(), SockError> {
        if let Some(e) = self.datagram_error.take() {
            return Err(e);
        }
        self.datagrams.push(SentDatagram {
            sock,
            dst,
            payload: payload.to_vec(),
            segment: 0,
            ttl: 0,
            tos: 0,
            dont_fragment: false,
            via_forward: true,
        });
        Ok(())
    }

    fn ping_open(&mut self, flow: FlowId, _like: IpAddr) -> Result<SockId, SockError> {
        let id = self.open(flow)?;
        self.opened.push((flow, id));
        Ok(id)
    }

    fn ping_send(
        &mut self,
        sock: SockId,
        dst: IpAddr,
        seq: u16,
        body: &[u8],
        ttl: u8,
        dont_fragment: bool,
    ) -> Result<(), SockError> {
        self.live(sock);
        if let Some(e) = self.datagram_error.take() {
            return Err(e);
        }
        self.pings.push(SentPing { sock, dst, seq, body: body.to_vec(), ttl, dont_fragment });
        Ok(())
    }

    fn close(&mut self, sock: SockId, how: Close) {
        let s = self.live(sock);
        s.closed = Some(how);
        self.closed.push((sock, how));
        self.dead.insert(sock);
    }

    fn event(&mut self, event: Event) -> bool {
        if self.event_ring_full {
            return false;
        }
        self.events.push(event);
        true
    }
}
