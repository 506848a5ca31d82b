//! Theory of operation: the UDP sockets that queries to name servers leave from. A query leaves with an identifier that
//! cannot be guessed, from a socket whose port the kernel chose at random (RFC 5452). Few sockets are open at a time, so
//! that the queries of a batch leave in one call; each is replaced after [`USES`] queries or [`USED_S`] seconds, and when
//! somebody guesses at it. Sockets without outstanding queries are closed after [`IDLE_S`] seconds.

use crate::interface::effects::{Close, Effects};
use crate::interface::types::{FlowId, SockId, Time};
use std::net::SocketAddr;

/// Sockets at most, those that only wait for responses included.
const SOCKETS_MAX: usize = 32;
/// Queries from one socket.
const USES: u32 = 128;
/// Seconds for which queries leave from one socket.
const USED_S: u64 = 10;
/// Datagrams on one socket that are no response to a query: somebody is guessing.
const WRONG_MAX: u32 = 64;
/// Seconds until sockets without outstanding queries are closed.
const IDLE_S: u64 = 10;
/// Flow index of these sockets; the flow table never gets so long.
pub(super) const FLOW: u32 = u32::MAX;

/// Servers that one socket serves: of one family, and all on the host's loopback or none.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Class {
    v6: bool,
    loopback: bool,
}

struct Socket {
    serial: u32,
    sock: SockId,
    class: Class,
    opened: Time,
    used: u32,
    outstanding: u32,
    wrong: u32,
}

impl Socket {
    fn is_fresh(&self, class: Class, now: Time) -> bool {
        self.class == class && self.used < USES && now < self.opened.plus_s(USED_S)
    }
}

/// See the module head.
#[derive(Default)]
pub(super) struct UpstreamSockets {
    sockets: Vec<Socket>,
    last: Time,
    serial: u32,
}

impl UpstreamSockets {
    /// Queries that wait for a response on some socket.
    pub(super) fn outstanding(&self) -> u32 {
        self.sockets.iter().map(|s| s.outstanding).sum()
    }

    pub(super) fn is_sound(&self) -> bool {
        self.sockets.len() <= SOCKETS_MAX
    }

    /// A socket for a new query: its number here, and that of the I/O side. `None` where the host has no more.
    pub(super) fn take<E: Effects>(
        &mut self,
        now: Time,
        server: SocketAddr,
        fx: &mut E,
    ) -> Option<(u32, SockId)> {
        let class = Class { v6: server.is_ipv6(), loopback: server.ip().is_loopback() };
        self.sockets.retain(|s| {
            let stays = s.is_fresh(s.class, now) || s.outstanding > 0;
            if !stays {
                fx.close(s.sock, Close::Graceful);
            }
            stays
        });
        if !self.sockets.iter().any(|s| s.is_fresh(class, now)) && self.sockets.len() < SOCKETS_MAX {
            let serial = self.serial.wrapping_add(1);
            let sock = fx.udp_open(FlowId { index: FLOW, generation: serial }, server).ok()?;
            self.serial = serial;
            self.sockets.push(Socket { serial, sock, class, opened: now, used: 0, outstanding: 0, wrong: 0 });
        }
        let s = self.sockets.iter_mut().find(|s| s.is_fresh(class, now))?;
        s.used += 1;
        s.outstanding += 1;
        self.last = now;
        Some((s.serial, s.sock))
    }

    /// A query no longer waits for a response on a socket.
    pub(super) fn release<E: Effects>(&mut self, serial: u32, fx: &mut E) {
        let Some(at) = self.sockets.iter().position(|s| s.serial == serial) else { return };
        let Some(s) = self.sockets.get_mut(at) else { return };
        s.outstanding = s.outstanding.saturating_sub(1);
        if s.outstanding == 0 && s.used >= USES {
            fx.close(s.sock, Close::Graceful);
            self.sockets.swap_remove(at);
        }
    }

    /// A datagram was no response to a query. True when there were too many: the socket is used no more, and its
    /// queries are to be sent from another.
    pub(super) fn is_guessed_at(&mut self, serial: u32) -> bool {
        let Some(s) = self.sockets.iter_mut().find(|s| s.serial == serial) else { return false };
        s.wrong += 1;
        if s.wrong >= WRONG_MAX {
            s.used = USES;
        }
        s.wrong >= WRONG_MAX
    }

    /// When [`UpstreamSockets::tidy`] has something to do.
    pub(super) fn next_timer(&self) -> Option<Time> {
        let idle = !self.sockets.is_empty() && self.outstanding() == 0;
        idle.then(|| self.last.plus_s(IDLE_S))
    }

    /// Closes the sockets when none was used for long.
    pub(super) fn tidy<E: Effects>(&mut self, now: Time, fx: &mut E) {
        if self.next_timer().is_some_and(|t| t <= now) {
            for s in self.sockets.drain(..) {
                fx.close(s.sock, Close::Graceful);
            }
        }
    }
}
