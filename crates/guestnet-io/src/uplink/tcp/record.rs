//! Theory of operation: what is remembered of a TCP connection, and what a new one begins with.

use crate::os::sys;
use crate::uplink::proxy::Via;
use guestnet_core::effects::SockError;

/// State of one connection.
#[derive(Debug, Default)]
pub(crate) struct TcpSock {
    /// The outcome of the connect is not known yet.
    pub connecting: bool,
    /// A send fell short, and the core waits to hear of room.
    pub wants_write: bool,
    /// The peer closed its side in order: all that it ever sends is in the queue.
    pub ended: bool,
    /// It sent urgent data, at which the kernel ends a read.
    pub urgent: bool,
    /// Errors of the connect are read with who sent them (IP_RECVERR).
    pub traced: bool,
    /// The handshake with a proxy, while it is under way.
    pub via: Option<Box<Via>>,
    /// Keep-alive probes can be sent.
    pub(super) probed: bool,
    /// The last read was a large one.
    pub(super) bulk: bool,
    /// Something was sent.
    pub(super) spoken: bool,
    /// Nagle's algorithm is off.
    pub(super) no_delay: bool,
    /// Taken from the core, and not yet by the kernel.
    pub waiting: Vec<u8>,
    /// It is in the list of what goes at the end of the batch.
    pub deferred: bool,
    /// The core said the end, which goes when nothing waits any more.
    pub ends: bool,
    /// The core has closed it, and something still waits.
    pub lingers: bool,
    /// What was put off could not be sent: the core is to hear of it.
    pub broken: Option<SockError>,
    /// Read and not yet thrown away; the kernel's queue goes on behind it.
    pub(super) kept: Vec<u8>,
    /// Where the kernel peeks next; `None` while SO_PEEK_OFF was never set.
    pub(super) offset: Option<usize>,
    /// A unix socket to a service: what is thrown away must be read, MSG_TRUNC is TCP's.
    pub(super) unix: bool,
}

/// True when the kernel can peek at an offset of a TCP socket.
pub(crate) fn probe_peek_off() -> bool {
    sys::socket(libc::AF_INET, libc::SOCK_STREAM, 0)
        .and_then(|s| sys::set_opt(&s, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 0))
        .is_ok()
}

/// The TTL that the host gives its packets.
pub(crate) fn host_ttl() -> u8 {
    let ttl = sys::socket(libc::AF_INET, libc::SOCK_STREAM, 0)
        .and_then(|s| sys::get_opt(&s, libc::IPPROTO_IP, libc::IP_TTL));
    ttl.ok().and_then(|t| u8::try_from(t).ok()).unwrap_or(64)
}

/// Sizes of a socket's buffers, as the kernel counts them.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Buffers {
    pub(super) receive: i32,
    pub(super) send: i32,
}

/// What a new connection begins with.
pub(crate) fn usual_buffers() -> Buffers {
    let Ok(fd) = sys::socket(libc::AF_INET, libc::SOCK_STREAM, 0) else { return Buffers::default() };
    let size = |name| sys::get_opt(&fd, libc::SOL_SOCKET, name).unwrap_or(128 << 10);
    Buffers { receive: size(libc::SO_RCVBUF), send: size(libc::SO_SNDBUF) }
}
