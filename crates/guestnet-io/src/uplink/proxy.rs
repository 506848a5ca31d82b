//! Theory of operation: TCP connections through a proxy, if the owner has chosen one. The socket connects to the proxy
//! instead, and exchanges the messages of [`guestnet_wire::proxy`] (`tcp/handshake.rs`) before the core learns that the
//! connection is open. A handshake that fails is a connection that failed: nothing goes around the proxy. Other sockets
//! have no way through a proxy and are refused when they are opened. Connections to the host's own loopback do not
//! leave the host, and are made directly.

use crate::os::sys;
use guestnet_core::effects::SockError;
use guestnet_core::types::{SockId, Time};
use guestnet_wire::proxy::{Failure, Handshake, Proxy};
use std::collections::VecDeque;
use std::net::SocketAddr;

/// Bytes of a reply that are looked at at once.
pub(super) const LOOK: usize = 1024;

/// Seconds for the connection to the proxy and the handshake. The proxy connects to the destination meanwhile.
pub(super) const PATIENCE_S: u64 = 30;
/// Handshakes that are remembered, done or not, before those that are done are looked for.
pub(super) const REMEMBERED: usize = 1024;

/// When handshakes have to be done, soonest first.
#[derive(Debug, Default)]
pub(crate) struct Deadlines(pub(super) VecDeque<(Time, SockId, u32)>);

/// A handshake of a connection under way.
#[derive(Debug)]
pub(crate) struct Via {
    /// The first message, until the proxy has accepted the connection.
    pub(super) first: Option<Vec<u8>>,
    pub(super) handshake: Handshake,
}

/// Why the proxy opened no connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// It cannot be reached: an errno.
    System(i32),
    /// It ended the connection.
    Closed,
    /// It has not answered in time.
    Silent,
    /// It said so.
    Failed(Failure),
}

impl Trouble {
    /// What the guest is told.
    pub(crate) fn as_error(self) -> SockError {
        match self {
            Trouble::Failed(Failure::Refused) => SockError::Refused,
            Trouble::Failed(Failure::NetUnreachable) => SockError::NetUnreachable,
            Trouble::Failed(Failure::Forbidden | Failure::Credentials) => SockError::Prohibited,
            Trouble::System(e) if sys::exhausted(e) => SockError::Exhausted,
            _ => SockError::HostUnreachable,
        }
    }

    /// What the owner is told; `None` where the trouble is with the destination and not with the proxy.
    pub(crate) fn text(self) -> Option<String> {
        match self {
            Trouble::System(e) => Some(sys::errno_text(e)),
            Trouble::Closed => Some("it closed the connection".into()),
            Trouble::Silent => Some("it does not answer".into()),
            Trouble::Failed(f @ (Failure::Credentials | Failure::Unable | Failure::Malformed)) => {
                Some(f.text().into())
            }
            Trouble::Failed(_) => None,
        }
    }
}

impl Via {
    /// For a connection to `destination`; and where its socket connects to.
    pub(crate) fn new(proxy: &Proxy, destination: SocketAddr) -> (SocketAddr, Box<Via>) {
        let (first, handshake) = proxy.begin(destination);
        (proxy.address, Box::new(Via { first: Some(first), handshake }))
    }
}
