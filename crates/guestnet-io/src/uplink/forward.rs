//! Theory of operation: published ports. Connections are accepted as long as the host has descriptors; when
//! it has none, the listener is left alone for a moment instead of reporting the same connection for ever.
//! A UDP socket on the wildcard address answers each client from the address that the client sent to, which
//! is remembered for the clients seen last.

use crate::os::sockaddr::RawAddr;
use crate::os::sys;
use guestnet_core::types::{ForwardId, SockId, Time};
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

/// How long a listener rests when the host has no more descriptors, in nanoseconds.
pub(crate) const REST: u64 = 100_000_000;
/// Clients of one UDP socket whose addresses are remembered.
const CLIENTS_MAX: usize = 4096;

/// A listening TCP socket.
pub(crate) struct Listening {
    pub fd: OwnedFd,
    pub forward: ForwardId,
}

/// What a Forward holds.
#[derive(Default)]
pub(crate) struct ForwardParts {
    /// Slots of listening sockets.
    pub listening: Vec<u32>,
    /// UDP sockets.
    pub socks: Vec<SockId>,
}

/// Listeners that rest, and until when.
pub(crate) struct Resting<T> {
    pub until: Option<Time>,
    who: Vec<T>,
}

impl<T> Default for Resting<T> {
    fn default() -> Self {
        Resting { until: None, who: Vec::new() }
    }
}

impl<T> Resting<T> {
    pub(crate) fn put(&mut self, now: Time, who: T) {
        self.until.get_or_insert(Time(now.0 + REST));
        self.who.push(who);
    }

    /// Those that have rested.
    pub(crate) fn take(&mut self, now: Time) -> Vec<T> {
        if self.until.is_none_or(|t| t > now) {
            return Vec::new();
        }
        self.until = None;
        std::mem::take(&mut self.who)
    }
}

/// Which local address each client of a UDP socket sent to.
#[derive(Default)]
pub(crate) struct Origins {
    /// The socket is bound to a wildcard address, so that it matters.
    wildcard: bool,
    by_client: HashMap<SocketAddr, IpAddr>,
    order: VecDeque<SocketAddr>,
}

impl Origins {
    /// Of a bound socket, which is asked to tell.
    pub(crate) fn new(fd: &OwnedFd) -> Origins {
        let addr = sys::local_addr(fd).and_then(RawAddr::to_ip);
        let wildcard = addr.is_none_or(|a| a.ip().is_unspecified());
        if wildcard {
            // One of the two is of the socket's family.
            let _other = sys::set_opt(fd, libc::IPPROTO_IP, libc::IP_PKTINFO, 1);
            let _other = sys::set_opt(fd, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1);
        }
        Origins { wildcard, ..Origins::default() }
    }

    pub(crate) fn note(&mut self, client: SocketAddr, local: Option<IpAddr>) {
        let Some(local) = local.filter(|_| self.wildcard) else { return };
        if self.by_client.insert(client, local).is_none() {
            self.order.push_back(client);
            if self.order.len() > CLIENTS_MAX
                && let Some(oldest) = self.order.pop_front()
            {
                self.by_client.remove(&oldest);
            }
        }
    }

    pub(crate) fn local(&self, client: &SocketAddr) -> Option<IpAddr> {
        self.by_client.get(client).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembers_a_bounded_number_of_clients() {
        let fd = std::net::UdpSocket::bind("0.0.0.0:0").unwrap().into();
        let mut o = Origins::new(&fd);
        let client = |p: usize| SocketAddr::from(([10, 0, (p >> 8) as u8, p as u8], 9));
        let local = Some(IpAddr::from([127, 0, 0, 2]));
        for p in 0..CLIENTS_MAX + 10 {
            o.note(client(p), local);
        }
        assert_eq!((o.local(&client(9)), o.local(&client(10))), (None, local));
        assert_eq!(o.by_client.len(), CLIENTS_MAX);
        let fd = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().into();
        let mut o = Origins::new(&fd);
        o.note(client(1), local);
        assert_eq!(o.local(&client(1)), None);
    }

    #[test]
    fn rest_ends() {
        let mut r = Resting::default();
        r.put(Time(5), 'a');
        r.put(Time(REST), 'b');
        assert!(r.take(Time(REST)).is_empty());
        assert_eq!(r.take(Time(REST + 5)), ['a', 'b']);
        assert_eq!(r.until, None);
    }
}
