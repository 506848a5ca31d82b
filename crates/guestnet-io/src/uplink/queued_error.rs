//! Theory of operation: an error that the kernel reported for a datagram, an echo request or a connect, until the core hears of it.

use guestnet_core::config::DatagramError;
use guestnet_core::effects::SockError;
use guestnet_core::types::FlowId;
use std::net::{IpAddr, SocketAddr};

/// An error for the core.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct QueuedError {
    pub flow: FlowId,
    pub kind: SockError,
    pub offender: Option<IpAddr>,
    pub icmp: (u8, u8),
    pub mtu: u16,
    pub dst: SocketAddr,
    pub seq: u16,
    pub payload: Vec<u8>,
}

impl QueuedError {
    /// One that arose on this host.
    pub(crate) fn local(flow: FlowId, kind: SockError, dst: SocketAddr, payload: &[u8]) -> QueuedError {
        let mtu = if let SockError::MessageTooBig(mtu) = kind { mtu } else { 0 };
        QueuedError { flow, kind, offender: None, icmp: (0, 0), mtu, dst, seq: 0, payload: payload.to_vec() }
    }

    pub(crate) fn as_core(&self) -> DatagramError<'_> {
        DatagramError {
            kind: self.kind,
            offender: self.offender,
            icmp_type: self.icmp.0,
            icmp_code: self.icmp.1,
            mtu: self.mtu,
            dst: self.dst,
            seq: self.seq,
            payload: &self.payload,
        }
    }
}
