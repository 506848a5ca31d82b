//! Theory of operation: all sockets of the uplink in numbered slots, and what they have to tell the core
//! besides plain readiness. Outcomes and errors that come up in the middle of a call into the core wait here
//! until the worker hands them over.

use super::deferred_queue::DeferredWrites;
use super::forward::Origins;
use super::local_stream::LocalStreams;
use super::queued_error::QueuedError;
use super::source::Source;
use super::tcp::{Buffers, TcpSock};
use super::udp::{UdpOut, UdpSock};
use crate::attachment::quota::{Charge, Quota, Resource};
use crate::memory::slab::Slab;
use crate::os::epoll::{Kind, Poller, Token};
use crate::os::sockaddr::RawAddr;
use crate::runtime::stats::IoCounters;
use guestnet_core::effects::SockError;
use guestnet_core::types::{FlowId, ForwardId, SockId};
use guestnet_wire::proxy::Proxy;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// What a socket is for.
pub(crate) enum SockKind {
    Tcp(TcpSock),
    Udp(UdpSock),
    /// Echo; `raw` carries the identifier that a raw socket has to write itself.
    Ping {
        raw: Option<u16>,
        v6: bool,
        ttl: u8,
        /// "Don't fragment" as it was last set.
        df: Option<bool>,
    },
    /// A published UDP port.
    Forward {
        forward: ForwardId,
        origins: Origins,
        /// Its buffers were enlarged.
        enlarged: bool,
    },
}

/// One socket.
pub(crate) struct Sock {
    pub fd: OwnedFd,
    /// Whose it is; none for published ports, and for connections that the core has not taken yet.
    pub flow: Option<FlowId>,
    pub kind: SockKind,
}

/// All sockets.
pub(crate) struct Socks {
    pub slab: Slab<Sock>,
    /// TCP services behind a unix socket, by number.
    pub services: HashMap<u32, RawAddr>,
    /// Connections to TCP services of the core.
    pub local: LocalStreams,
    /// What waits for the end of the batch.
    pub deferred: DeferredWrites,
    /// Outcomes of connects.
    pub outcomes: Vec<(FlowId, Result<(), SockError>)>,
    /// Errors of datagrams.
    pub errors: Vec<QueuedError>,
    /// Datagrams that go out at the end of the batch.
    pub out: UdpOut,
    /// SO_PEEK_OFF works for TCP (Linux 6.9).
    pub peek_off: bool,
    /// Bytes read from TCP connections that the core may ask for again.
    pub kept_all: usize,
    /// What new connections may buffer.
    pub buffers: Buffers,
    /// The TTL that the host gives its packets.
    pub ttl: u8,
    /// Where flows to the outside leave from.
    pub source: Source,
    /// What they go through.
    pub proxy: Option<Arc<Proxy>>,
    /// Handshakes with the proxy.
    pub handshakes: super::proxy::Deadlines,
    /// The network's share of the process's descriptors.
    held: Charge,
}

impl Socks {
    /// Sockets of a network with this quota.
    pub(crate) fn new(quota: &Arc<Quota>) -> Socks {
        Socks {
            slab: Slab::default(),
            services: HashMap::new(),
            local: LocalStreams::default(),
            deferred: DeferredWrites::default(),
            outcomes: Vec::new(),
            errors: Vec::new(),
            out: UdpOut::default(),
            peek_off: super::tcp::probe_peek_off(),
            kept_all: 0,
            buffers: super::tcp::usual_buffers(),
            ttl: super::tcp::host_ttl(),
            source: Source::default(),
            proxy: None,
            handshakes: Default::default(),
            held: Charge::new(quota, Resource::Sockets),
        }
    }

    /// Takes a socket in and watches it.
    pub(crate) fn add(
        &mut self,
        poller: &Poller,
        counters: &mut IoCounters,
        sock: Sock,
        events: i32,
    ) -> Result<SockId, i32> {
        let id = self.insert(counters, sock).map_err(|_sock| libc::EMFILE)?;
        if let Err(e) = self.watch(poller, id, events) {
            self.remove(counters, id);
            return Err(e);
        }
        Ok(id)
    }

    /// Takes a socket in.
    ///
    /// # Errors
    /// The socket, where the network has its share of the process's descriptors.
    pub(crate) fn insert(&mut self, counters: &mut IoCounters, sock: Sock) -> Result<SockId, Sock> {
        if self.held.add(1).is_err() {
            return Err(sock);
        }
        let index = self.slab.insert(sock);
        counters.sockets_open = self.slab.len() as u64;
        counters.sockets_peak = counters.sockets_peak.max(counters.sockets_open);
        Ok(SockId(index))
    }

    pub(crate) fn watch(&self, poller: &Poller, id: SockId, events: i32) -> Result<(), i32> {
        let token = Token { kind: Kind::Sock, index: id.0, generation: self.slab.generation(id.0) };
        self.slab.get(id.0).map_or(Ok(()), |s| poller.add(&s.fd, token, events))
    }

    /// The socket that an event is for.
    pub(crate) fn current(&mut self, token: Token) -> Option<&mut Sock> {
        if self.slab.generation(token.index) != token.generation {
            return None;
        }
        self.slab.get_mut(token.index)
    }

    pub(crate) fn get(&self, id: SockId) -> Option<&Sock> {
        self.slab.get(id.0)
    }

    pub(crate) fn get_mut(&mut self, id: SockId) -> Option<&mut Sock> {
        self.slab.get_mut(id.0)
    }

    pub(crate) fn remove(&mut self, counters: &mut IoCounters, id: SockId) -> Option<Sock> {
        let s = self.slab.remove(id.0);
        if let Some(Sock { kind: SockKind::Tcp(tcp), .. }) = &s {
            self.kept_all = self.kept_all.saturating_sub(tcp.kept());
        }
        self.count_held();
        counters.sockets_open = self.slab.len() as u64;
        s
    }

    fn count_held(&mut self) {
        self.held.measured(self.slab.len() as u64);
    }
}
