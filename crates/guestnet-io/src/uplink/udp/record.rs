//! Theory of operation: what is remembered of a UDP socket, and the datagrams that wait for the end of the batch.

use guestnet_core::types::{IpFields, SockId};
use std::net::{IpAddr, SocketAddr};

/// State of one UDP socket.
#[derive(Debug, Default)]
pub(crate) struct UdpSock {
    pub(super) v6: bool,
    pub(super) ip: IpFields,
    pub(super) df: Option<bool>,
    /// Pieces of this size do not fit the path in a large send.
    pub(super) too_long: Option<usize>,
    /// The kernel was asked for larger buffers.
    pub(super) enlarged: bool,
}

pub(super) struct Pending {
    pub(super) sock: SockId,
    pub(super) dst: SocketAddr,
    pub(super) start: usize,
    pub(super) len: usize,
    /// Size of the pieces; `len` for one datagram.
    pub(super) piece: usize,
    /// Nothing can be added: its last piece is short.
    pub(super) closed: bool,
    pub(super) ip: IpFields,
    pub(super) df: bool,
    /// Local address to answer from (published ports).
    pub(super) from: Option<IpAddr>,
}

/// Datagrams that wait for the end of the batch.
#[derive(Default)]
pub(crate) struct UdpOut {
    pub(super) arena: Vec<u8>,
    pub(super) pending: Vec<Pending>,
}

impl Pending {
    /// Datagrams in it.
    pub(super) fn count(&self) -> u64 {
        if self.piece == 0 { 1 } else { self.len.div_ceil(self.piece) as u64 }
    }

    pub(super) fn is_gso(&self) -> bool {
        self.len > self.piece
    }

    pub(super) fn payload<'a>(&self, arena: &'a [u8]) -> &'a [u8] {
        arena.get(self.start..self.start + self.len).unwrap_or(&[])
    }
}
