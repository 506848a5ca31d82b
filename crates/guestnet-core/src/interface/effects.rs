//! Theory of operation: [`Effects`] is everything that the core can cause outside. The I/O side implements it with sockets
//! and attachments, tests with vectors. A call returns at once and never blocks. A call that fails says why and changes
//! nothing. Events go up to the control side through [`Effects::event`].

use crate::interface::stats::DropReason;
use crate::interface::types::{FlowId, FrameMeta, IpFields, PortId, ServiceId, SockId, Target};
use crate::policy::Direction;
use guestnet_wire::ether::Mac;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;

/// Why a frame was not taken by a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TxError {
    /// The port's queue is full; `Network::port_writable` will be called when it has drained.
    Full,
    /// There is no such port any more.
    Gone,
}

/// Why a socket call failed, in the terms that guests can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SockError {
    /// ECONNREFUSED.
    Refused,
    /// ECONNRESET, EPIPE, ECONNABORTED.
    Reset,
    /// ENETUNREACH, ENETDOWN, EADDRNOTAVAIL.
    NetUnreachable,
    /// EHOSTUNREACH, EHOSTDOWN.
    HostUnreachable,
    /// ETIMEDOUT.
    TimedOut,
    /// EACCES, EPERM: the host forbids it.
    Prohibited,
    /// EMSGSIZE, with the path MTU where the kernel told it (0: unknown).
    MessageTooBig(u16),
    /// EMFILE, ENFILE, ENOMEM, ENOBUFS: the host has no more of it.
    Exhausted,
    /// Anything else, an errno.
    Other(i32),
}

/// What [`Effects::tcp_peek`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peek {
    /// This many bytes (at least 1) are in the scratch buffer. When it is fewer than asked for, the socket
    /// has no more now and `tcp_ready` will tell of more.
    Data(usize),
    /// As `Data`, and they are the last: the peer closed its side behind them.
    Last(usize),
    /// One byte is in the scratch buffer, which the peer sent as urgent. More may follow. Asked for again, it is
    /// `Data`.
    Urgent,
    /// Nothing there now; `tcp_ready` will tell.
    Empty,
    /// The peer closed its side and all data before `offset` is all there is.
    Eof,
}

/// How a host TCP socket is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Close {
    /// Ordinary close: what was sent is still delivered.
    Graceful,
    /// Abort: the other side sees a reset.
    Reset,
}

/// What the host's kernel knows about the peer of a TCP socket, see [`Effects::tcp_peer`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Segments that the peer sent on this connection, whatever was in them; wraps around.
    pub segments_in: u32,
    /// Bytes wait to be sent or acknowledged: the kernel's own timers find out whether the peer is there.
    pub busy: bool,
}

/// A report to the control side. Plain data; the ring that carries it bounds the number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A datagram for a UDP service of the gateway.
    Datagram {
        /// Which service.
        service: ServiceId,
        /// The port it came from.
        port: PortId,
        /// The guest's MAC.
        mac: Mac,
        /// The guest's address and port.
        src: SocketAddr,
        /// The address and port it was sent to.
        dst: SocketAddr,
        /// The payload.
        payload: Box<[u8]>,
    },
    /// A guest asks for a name that may be the network's own, or the control side is to look which name servers there
    /// are: `Network::dns_verdict` is to answer.
    DnsQuestion {
        /// The port of the guest.
        port: PortId,
        /// Names the query.
        ticket: u64,
        /// The name as labels in lower case.
        name: Box<[u8]>,
        /// The type that is asked for.
        kind: u16,
    },
    /// A name server does not respond, or does so again. Told once while that lasts.
    NameServer {
        /// The server.
        server: SocketAddr,
        /// Why it does not; `None`: it responds again.
        trouble: Option<&'static str>,
    },
    /// A guest was seen to use an address.
    AddressSeen {
        /// The port.
        port: PortId,
        /// Its MAC.
        mac: Mac,
        /// The address.
        address: IpAddr,
    },
    /// A flow began.
    FlowOpened {
        /// The flow.
        flow: FlowId,
        /// The port of the guest.
        port: PortId,
        /// IP protocol.
        proto: u8,
        /// The guest's side.
        guest: SocketAddr,
        /// The other side, as the guest names it.
        remote: SocketAddr,
        /// True when the outside opened it, through a Forward.
        inbound: bool,
        /// The label of the rule that allowed it; `None` for services of the gateway, which no rule is about.
        rule: Option<Arc<str>>,
        /// A name for which the guest got the address of the other side.
        name: Option<Arc<str>>,
    },
    /// A flow ended.
    FlowClosed {
        /// The flow.
        flow: FlowId,
        /// The port of the guest.
        port: PortId,
        /// Bytes of payload from the guest.
        bytes_out: u64,
        /// Bytes of payload to the guest.
        bytes_in: u64,
        /// Datagrams or segments from the guest, one that is segmented later counts once; `None` where they are not
        /// counted.
        packets_out: Option<u32>,
        /// Datagrams or segments to the guest.
        packets_in: Option<u32>,
        /// The label of the rule that allowed it; `None` when the rules have changed since.
        rule: Option<Arc<str>>,
        /// A name for which the guest got the address of the other side.
        name: Option<Arc<str>>,
        /// The name that the conversation showed.
        shown: Option<Arc<str>>,
    },
    /// A new flow was refused, or one was cut by a change of the rules. At most
    /// [`crate::policy::denials::PER_SECOND`] a second for each guest.
    FlowDenied(Box<FlowDenied>),
    /// A query of a guest was refused by a rule, or its answer was. Within the rate of [`Event::FlowDenied`].
    NameDenied(Box<NameDenied>),
    /// A flow waits for the owner's answer: [`crate::Network::decide`].
    PolicyAsk(Box<PolicyAsk>),
    /// A flow waits no longer: nobody answered in time, or its guest is gone.
    PolicyAskEnded {
        /// The guest's port.
        port: PortId,
        /// Named the question.
        ticket: u64,
    },
}

/// A flow that waits for the owner's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyAsk {
    /// Names the question.
    pub ticket: u64,
    /// The guest's port.
    pub port: PortId,
    /// IP protocol.
    pub proto: u8,
    /// The guest's side.
    pub guest: SocketAddr,
    /// The other side.
    pub remote: SocketAddr,
    /// The label of the rule that asks.
    pub rule: Arc<str>,
    /// A name for which the guest got the address of the other side.
    pub name: Option<Arc<str>>,
}

/// A refused query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NameDenied {
    /// The port of the guest.
    pub port: PortId,
    /// The name, in lower case without a final dot; bytes that are no text are escaped.
    pub name: Arc<str>,
    /// The type that was asked for.
    pub kind: u16,
    /// The label of the rule that decided.
    pub rule: Arc<str>,
    /// Why.
    pub reason: &'static str,
    /// Denials of this guest that were not reported since the last one that was.
    pub unreported: u32,
}

/// A refused flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlowDenied {
    /// The port of the guest; between guests, of the guest that opened the flow.
    pub port: PortId,
    /// Which way the flow goes.
    pub direction: Direction,
    /// IP protocol.
    pub proto: u8,
    /// The guest's side.
    pub guest: SocketAddr,
    /// The other side, as the guest names it.
    pub remote: SocketAddr,
    /// The label of the rule that decided; `None` where a limit was reached.
    pub rule: Option<Arc<str>>,
    /// A name for which the guest got the address of the other side.
    pub name: Option<Arc<str>>,
    /// The name that the conversation showed.
    pub shown: Option<Arc<str>>,
    /// Why.
    pub reason: DropReason,
    /// Denials of this guest that were not reported since the last one that was.
    pub unreported: u32,
}

/// What the core can cause outside. See the module head for the rules of all calls.
pub trait Effects {
    // ---- frames -------------------------------------------------------------------------------------
    /// Sends one frame (Ethernet header first) to a port. The I/O side completes checksums and segments
    /// where `meta` asks for it and the attachment cannot.
    fn transmit(&mut self, port: PortId, frame: &[u8], meta: FrameMeta) -> Result<(), TxError>;

    /// Sends one frame to a port of another worker, or (`None`) to all its ports. [`TxError::Full`] is final:
    /// nothing tells when there is room again. Only called after `Network::share`.
    fn forward_remote(
        &mut self,
        _worker: u16,
        _port: Option<PortId>,
        _frame: &[u8],
        _meta: FrameMeta,
    ) -> Result<(), TxError> {
        Err(TxError::Gone)
    }

    /// Sends one frame whose header is `header` and whose payload is that range of the bytes of the last
    /// [`Effects::tcp_peek`].
    fn transmit_peeked(
        &mut self,
        port: PortId,
        header: &[u8],
        payload: Range<usize>,
        meta: FrameMeta,
    ) -> Result<(), TxError>;

    /// How many more bytes of frames the port takes now without [`TxError::Full`]; 0 for full, and then
    /// `Network::port_writable` will be called.
    fn port_room(&mut self, port: PortId) -> usize;

    /// Sends a packet out through the uplink of packets. In `frame` it follows the 14 bytes of an Ethernet
    /// header that means nothing; offsets in `meta` count from there.
    ///
    /// # Errors
    /// [`TxError::Full`] when the uplink takes no more now (the packet is lost), [`TxError::Gone`] when there
    /// is no such uplink, or it refused the packet.
    fn uplink(&mut self, frame: &[u8], meta: FrameMeta) -> Result<(), TxError>;

    // ---- TCP sockets --------------------------------------------------------------------------------
    /// Starts a non-blocking connect for `flow`; `Network::tcp_connected` tells the outcome, also when it is
    /// known at once. `tight` is as in [`Effects::tcp_tighten`], from the first byte on.
    fn tcp_connect(
        &mut self,
        flow: FlowId,
        target: Target,
        ip: IpFields,
        tight: bool,
    ) -> Result<SockId, SockError>;

    /// Bytes of the kernel's memory that the socket holds, with what it takes to keep them.
    fn tcp_held(&mut self, sock: SockId) -> usize;

    /// Has the kernel take only a few kilobytes, or again as much as it likes.
    fn tcp_tighten(&mut self, sock: SockId, tight: bool);

    /// Changes the DSCP of what the socket sends; `tos` is as in [`IpFields`].
    fn tcp_tos(&mut self, sock: SockId, tos: u8);

    /// Sends; `Ok(n)` with `n < data.len()` (0 included) when the kernel takes no more now, and then
    /// `tcp_ready(writable)` will be called.
    fn tcp_send(&mut self, sock: SockId, data: &[u8]) -> Result<usize, SockError>;

    /// Sends one byte as urgent (MSG_OOB); `Ok(false)` when the kernel takes no more now, and then it goes with
    /// the others.
    fn tcp_send_urgent(&mut self, sock: SockId, byte: u8) -> Result<bool, SockError>;

    /// Copies up to `max` (at most 65536) bytes of the socket's unread data, starting `offset` bytes after
    /// the first byte not yet discarded, to the scratch buffer, without consuming them.
    fn tcp_peek(&mut self, sock: SockId, offset: usize, max: usize) -> Result<Peek, SockError>;

    /// The first `len` bytes that the last [`Effects::tcp_peek`] found, or fewer where it found fewer.
    fn peeked(&self, _len: usize) -> &[u8] {
        &[]
    }

    /// Consumes the first `len` bytes of unread data: the guest acknowledged them.
    fn tcp_discard(&mut self, sock: SockId, len: usize);

    /// Appends up to `max` bytes that were read from the socket to `out`, and consumes them: for connections of the
    /// network itself. [`Peek::Data`], [`Peek::Empty`] and [`Peek::Eof`] are as in [`Effects::tcp_peek`].
    fn tcp_read(&mut self, _sock: SockId, _out: &mut Vec<u8>, _max: usize) -> Result<Peek, SockError> {
        Err(SockError::Reset)
    }

    /// Makes a socket in memory for `flow` from which `answer` and then the end is read, and which takes and forgets what
    /// is sent. A connection that is refused gets its last words from it.
    ///
    /// # Errors
    /// There are no such sockets, or no more of them.
    fn tcp_answer(&mut self, _flow: FlowId, _answer: &[u8]) -> Result<SockId, SockError> {
        Err(SockError::Exhausted)
    }

    /// Sends FIN to the host side (SHUT_WR).
    fn tcp_shutdown(&mut self, sock: SockId);

    /// What is known of the peer; `None` where the host's system does not tell, and for services.
    fn tcp_peer(&mut self, sock: SockId) -> Option<Peer>;

    /// Sends one keep-alive probe to the peer (RFC 9293 3.8.4). An answer shows in [`Effects::tcp_peer`]; that
    /// there is none has no other effect.
    fn tcp_probe(&mut self, sock: SockId);

    // ---- connections to services of the core ----------------------------------------------------------
    // A guest's connection to a TCP service that the core serves itself is one in memory: the relay has one end like any
    // other socket, the core the other. What the guest sends comes as `Network::stream_received`.

    /// Sends data to the guest. Returns how many bytes it has not acknowledged yet.
    fn stream_send(&mut self, _sock: SockId, _data: &[u8]) -> usize {
        0
    }

    /// Bytes that the guest has not acknowledged.
    fn stream_unread(&mut self, _sock: SockId) -> usize {
        0
    }

    /// Has `Network::stream_received` called again, when something is left to be read.
    fn stream_resume(&mut self, _sock: SockId) {}

    /// Ends the connection: in order, behind what was sent, or with a reset.
    fn stream_close(&mut self, _sock: SockId, _how: Close) {}

    // ---- datagram sockets ---------------------------------------------------------------------------
    /// Opens a socket for one guest source port (endpoint-independent mapping, RFC 4787 REQ-1), for
    /// destinations of the family of `like`. A loopback `like` says that all destinations are loopback addresses.
    /// Datagrams come in as `Network::udp_received(flow, ...)`.
    fn udp_open(&mut self, flow: FlowId, like: SocketAddr) -> Result<SockId, SockError>;

    /// Sends one datagram, or several of `segment` bytes each (the last may be shorter) when it is not 0.
    /// May be deferred to the end of the batch; a late error comes as `Network::sock_error`. `payload` must be
    /// part of the frame that is being handled, or it is copied.
    fn udp_send(
        &mut self,
        sock: SockId,
        dst: SocketAddr,
        payload: &[u8],
        segment: u16,
        ip: IpFields,
        dont_fragment: bool,
    ) -> Result<(), SockError>;

    /// Sends one datagram from a Forward's listening socket back to its client.
    fn udp_send_forward(&mut self, sock: SockId, dst: SocketAddr, payload: &[u8]) -> Result<(), SockError>;

    /// Opens a ping socket (or raw, where only that is allowed) for one guest's echo identifier, for destinations of the
    /// family of `like`.
    fn ping_open(&mut self, flow: FlowId, like: IpAddr) -> Result<SockId, SockError>;

    /// Sends an echo request with sequence number and body; the identifier is the socket's own. With
    /// `dont_fragment` one that is too big for the path is [`SockError::MessageTooBig`], else it is cut.
    fn ping_send(
        &mut self,
        sock: SockId,
        dst: IpAddr,
        seq: u16,
        body: &[u8],
        ttl: u8,
        dont_fragment: bool,
    ) -> Result<(), SockError>;

    // ---- both ---------------------------------------------------------------------------------------
    /// Closes any socket that was opened or accepted; its number may be used again afterwards.
    fn close(&mut self, sock: SockId, how: Close);

    /// Reports to the control side. False when it was lost, for want of room; the core counts that as
    /// [`DropReason::EventRingFull`].
    #[must_use]
    fn event(&mut self, event: Event) -> bool;
}
