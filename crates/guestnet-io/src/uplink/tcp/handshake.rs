//! Theory of operation: the handshake of a connection through a proxy ([`crate::uplink::proxy`]). Replies are peeked at,
//! so that what follows them stays in the kernel's queue for the core. The whole handshake has [`PATIENCE_S`] seconds.

use super::{Sock, SockKind, Socks};
use crate::os::sys;
use crate::uplink::proxy::{LOOK, PATIENCE_S, REMEMBERED, Trouble};
use guestnet_core::types::{SockId, Time};
use guestnet_wire::proxy::Step;

impl Socks {
    fn in_handshake(&self, id: SockId, generation: u32) -> bool {
        self.slab.generation(id.0) == generation
            && matches!(self.get(id), Some(Sock { kind: SockKind::Tcp(tcp), .. }) if tcp.via.is_some())
    }

    /// A handshake begins.
    pub(super) fn handshake_begins(&mut self, id: SockId, now: Time) {
        let mut all = std::mem::take(&mut self.handshakes.0);
        if all.len() >= REMEMBERED.max(2 * self.slab.len()) {
            all.retain(|(_, id, generation)| self.in_handshake(*id, *generation));
        }
        all.push_back((now.plus_s(PATIENCE_S), id, self.slab.generation(id.0)));
        self.handshakes.0 = all;
    }

    /// When [`Socks::end_old_handshakes`] has something to do.
    pub(crate) fn next_handshake(&self) -> Option<Time> {
        self.handshakes.0.front().map(|(at, ..)| *at)
    }

    /// Gives up handshakes that take too long. True if there were any.
    pub(crate) fn end_old_handshakes(&mut self, now: Time) -> bool {
        let mut any = false;
        while let Some((at, id, generation)) = self.handshakes.0.front().copied()
            && at <= now
        {
            self.handshakes.0.pop_front();
            if !self.in_handshake(id, generation) {
                continue;
            }
            if let Some(Sock { flow: Some(flow), kind: SockKind::Tcp(tcp), .. }) = self.get_mut(id) {
                let flow = *flow;
                (tcp.via, tcp.connecting) = (None, false);
                self.outcomes.push((flow, Err(Trouble::Silent.as_error())));
                any = true;
            }
        }
        any
    }

    /// Goes on with the handshake of a connection. The outcome, when it is known.
    pub(crate) fn tcp_handshake(
        &mut self,
        id: SockId,
        writable: bool,
        hung_up: bool,
    ) -> Option<Result<(), Trouble>> {
        let Some(Sock { fd, kind: SockKind::Tcp(tcp), .. }) = self.get_mut(id) else { return None };
        let via = tcp.via.as_mut()?;
        if hung_up {
            let error = sys::take_error(fd);
            if error != 0 {
                return Some(Err(Trouble::System(error)));
            }
        }
        // Messages are short and far apart, so that each fits into an empty buffer.
        let send = |message: &[u8]| match sys::send(fd, message) {
            Ok(n) if n == message.len() => Ok(()),
            Ok(_) => Err(Trouble::Closed),
            Err(e) => Err(Trouble::System(e)),
        };
        if via.first.is_some() && !writable {
            return None;
        }
        if let Some(first) = via.first.take()
            && let Err(trouble) = send(&first)
        {
            return Some(Err(trouble));
        }
        let mut buf = [0; LOOK];
        loop {
            let n = match sys::recv(fd, &mut buf, libc::MSG_PEEK) {
                Ok(0) => return Some(Err(Trouble::Closed)),
                Ok(n) => n,
                Err(e) if sys::would_block(e) => return None,
                Err(e) => return Some(Err(Trouble::System(e))),
            };
            let (taken, step) = via.handshake.receive(buf.get(..n).unwrap_or(&[]));
            if taken > 0
                && let Err(e) = sys::recv_discard(fd, taken)
            {
                return Some(Err(Trouble::System(e)));
            }
            match step {
                Step::Wait => {}
                Step::Send(message) => {
                    if let Err(trouble) = send(&message) {
                        return Some(Err(trouble));
                    }
                }
                Step::Open => {
                    tcp.via = None;
                    return Some(Ok(()));
                }
                Step::Failed(failure) => return Some(Err(Trouble::Failed(failure))),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attachment::quota::{Pool, Quota};
    use crate::os::epoll::Poller;
    use crate::runtime::stats::IoCounters;
    use guestnet_core::effects::SockError;
    use guestnet_core::types::{FlowId, IpFields, Target};
    use guestnet_wire::proxy::Protocol;
    use guestnet_wire::proxy::{Failure, Proxy};
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    const FLOW: FlowId = FlowId { index: 1, generation: 0 };

    /// Sockets with a proxy on loopback, and the proxy.
    fn proxied() -> (Socks, TcpListener) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut socks = Socks::new(&Quota::new(Pool::of_process()));
        socks.proxy = Some(Arc::new(Proxy { address, protocol: Protocol::Socks5, credentials: None }));
        (socks, listener)
    }

    fn connect(socks: &mut Socks) -> SockId {
        let (poller, mut c) = (Poller::new(4).unwrap(), IoCounters::default());
        let target = Target::Address("203.0.113.7:80".parse().unwrap());
        socks.tcp_connect(&poller, &mut c, FLOW, target, IpFields::ttl(64), false).unwrap()
    }

    fn outcome(socks: &mut Socks, id: SockId) -> Result<(), Trouble> {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let events = sys::poll_now(&socks.get(id).unwrap().fd, libc::POLLIN | libc::POLLOUT);
            let hung_up = events & (libc::POLLHUP | libc::POLLERR) != 0;
            if let Some(outcome) = socks.tcp_handshake(id, events & libc::POLLOUT != 0, hung_up) {
                return outcome;
            }
            assert!(Instant::now() < end, "the handshake never ended");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn accept(listener: &TcpListener, greeting: &[u8]) -> TcpStream {
        let (mut peer, _) = listener.accept().unwrap();
        peer.write_all(greeting).unwrap();
        peer
    }

    #[test]
    fn what_follows_the_reply_is_the_core_s() {
        let (mut socks, listener) = proxied();
        let id = connect(&mut socks);
        assert!(socks.outcomes.is_empty(), "the core hears nothing before the proxy has opened it");
        let mut peer = accept(&listener, b"\x05\x00\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00SSH-2.0");
        assert_eq!(outcome(&mut socks, id), Ok(()));
        let mut said = [0; 13];
        peer.read_exact(&mut said).unwrap();
        assert_eq!(said, *b"\x05\x01\x00\x05\x01\x00\x01\xcb\x00\x71\x07\x00\x50");
        let mut buf = [0; 64];
        let n = sys::recv(&socks.get(id).unwrap().fd, &mut buf, 0).unwrap();
        assert_eq!(&buf[..n], b"SSH-2.0");
    }

    #[test]
    fn a_proxy_that_fails_is_a_connection_that_failed() {
        let (mut socks, listener) = proxied();
        for (greeting, trouble, told) in [
            (&b"\x05\xff"[..], Trouble::Failed(Failure::Credentials), SockError::Prohibited),
            (b"\x05\x00\x05\x05", Trouble::Failed(Failure::Refused), SockError::Refused),
            (
                b"HTTP/1.1 400 Bad Request\r\n",
                Trouble::Failed(Failure::Malformed),
                SockError::HostUnreachable,
            ),
        ] {
            let id = connect(&mut socks);
            let _peer = accept(&listener, greeting);
            let seen = outcome(&mut socks, id);
            assert_eq!(seen, Err(trouble));
            assert_eq!(trouble.as_error(), told);
            assert_eq!(trouble.text().is_none(), told == SockError::Refused);
        }
        let id = connect(&mut socks);
        drop(accept(&listener, b"\x05"));
        assert!(matches!(outcome(&mut socks, id), Err(Trouble::Closed | Trouble::System(_))));
    }

    #[test]
    fn a_silent_proxy_has_half_a_minute() {
        let (mut socks, listener) = proxied();
        let id = connect(&mut socks);
        let _peer = accept(&listener, b"");
        let end = socks.next_handshake().unwrap();
        assert!(!socks.end_old_handshakes(Time(end.0 - 1)));
        assert!(socks.end_old_handshakes(end));
        assert_eq!(socks.outcomes, [(FLOW, Err(SockError::HostUnreachable))]);
        assert_eq!(socks.tcp_handshake(id, true, false), None, "it is over");
        assert_eq!(socks.next_handshake(), None);
    }

    #[test]
    fn handshakes_that_are_done_are_forgotten() {
        let (mut socks, _listener) = proxied();
        let id = connect(&mut socks);
        for _ in 0..10 * REMEMBERED {
            // Of a socket that is gone.
            socks.handshake_begins(SockId(id.0 + 1), Time(0));
        }
        assert!(socks.handshakes.0.len() <= REMEMBERED);
        assert!(socks.handshakes.0.iter().any(|(_, one, _)| *one == id));
    }

    #[test]
    fn a_proxy_that_is_not_there_is_not_gone_around() {
        let (mut socks, listener) = proxied();
        drop(listener);
        let id = connect(&mut socks);
        let failed = match socks.outcomes.pop() {
            Some((_, result)) => result.map_err(|_| Trouble::Closed),
            None => outcome(&mut socks, id),
        };
        assert!(failed.is_err());
    }

    #[test]
    fn nothing_but_tcp_has_a_way_out() {
        let (mut socks, _listener) = proxied();
        let (poller, mut c) = (Poller::new(4).unwrap(), IoCounters::default());
        let like = "203.0.113.7:53".parse().unwrap();
        assert_eq!(socks.udp_open(&poller, &mut c, FLOW, like), Err(SockError::Prohibited));
        let loopback = "127.0.0.53:53".parse().unwrap();
        assert_eq!(socks.udp_open(&poller, &mut c, FLOW, loopback), Err(SockError::Prohibited));
        assert_eq!(socks.ping_open(&poller, &mut c, FLOW, like.ip()), Err(SockError::Prohibited));
    }
}
