//! Theory of operation: what is put off to the end of the batch, or until a flow with much to send takes its
//! turn, where one call can do it for many connections (`os/io_uring.rs`): little data to send and closes. The
//! core was told that the data is taken, so it is kept here until the kernel has it: what the kernel leaves
//! goes when it has room again, before anything else, and until then the connection takes nothing more. A
//! connection that is closed in order and still has some lingers until it is gone; where too many do, it is
//! reset: a part must not look like the whole.

use super::deferred_queue::Place;
use super::sockets::{Sock, SockKind, Socks};
use super::tcp::TcpSock;
use crate::os::io_uring::{Batch, SMALL};
use crate::os::sys;
use crate::runtime::stats::IoCounters;
use guestnet_core::effects::{Close, SockError};
use guestnet_core::types::{SockId, Time};
use std::os::fd::OwnedFd;

/// Bytes of one connection that are put off.
const WAITING_MAX: usize = 2 * SMALL;
/// Connections that linger at most, and how long, in seconds.
const LINGER_MAX: usize = 256;
const LINGER_S: u64 = 60;

/// What a run did, in the order of its operations.
pub(crate) enum Done {
    Send(Place),
    Close,
}

impl Socks {
    fn place(&self, id: SockId) -> Place {
        (id.0, self.slab.generation(id.0))
    }

    fn at(&mut self, (index, generation): Place) -> Option<&mut Sock> {
        if self.slab.generation(index) != generation {
            return None;
        }
        self.slab.get_mut(index)
    }

    /// Takes data that is to be sent at the end of the batch; false where it has to go at once.
    pub(crate) fn defer(&mut self, id: SockId, data: &[u8]) -> bool {
        if !self.deferred.on || data.len() > SMALL {
            return false;
        }
        let place = self.place(id);
        let Some(Sock { kind: SockKind::Tcp(tcp), .. }) = self.slab.get_mut(id.0) else { return false };
        if tcp.waiting.len() + data.len() > WAITING_MAX {
            return false;
        }
        tcp.waiting.extend_from_slice(data);
        if !std::mem::replace(&mut tcp.deferred, true) {
            self.deferred.sends.push(place);
        }
        true
    }

    /// Sends what waits of a connection: true when nothing is left.
    ///
    /// # Errors
    /// As of sending.
    pub(crate) fn send_waiting(&mut self, id: SockId) -> Result<bool, SockError> {
        let Some(Sock { fd, kind: SockKind::Tcp(tcp), .. }) = self.slab.get_mut(id.0) else {
            return Ok(true);
        };
        if let Some(e) = tcp.broken {
            return Err(e);
        }
        if tcp.waiting.is_empty() {
            return Ok(true);
        }
        let sent = match sys::send(fd, &tcp.waiting) {
            Ok(n) => n,
            Err(e) if sys::would_block(e) => 0,
            Err(e) => return Err(sys::sock_error(e)),
        };
        tcp.sent(fd, sent);
        Ok(tcp.waiting.is_empty())
    }

    /// What was put off could not be sent, and the core is to hear of it.
    pub(crate) fn broke(&mut self, id: SockId, why: SockError) {
        let Some(Sock { flow, kind: SockKind::Tcp(tcp), .. }) = self.slab.get_mut(id.0) else { return };
        tcp.broken = Some(why);
        tcp.waiting = Vec::new();
        self.outcomes.extend(flow.map(|flow| (flow, Err(why))));
    }

    /// Closes a connection; in order, it goes when all that waits has been sent.
    pub(crate) fn tcp_close(&mut self, counters: &mut IoCounters, id: SockId, how: Close) {
        let mut how = how;
        // Before a reset too: what came first is to arrive first.
        let sent = self.send_waiting(id);
        if how == Close::Graceful {
            match sent {
                Ok(true) => {}
                Ok(false) => return self.begin_lingering(counters, id),
                Err(_) => how = Close::Reset,
            }
        }
        self.tcp_end(counters, id, how);
    }

    fn begin_lingering(&mut self, counters: &mut IoCounters, id: SockId) {
        let place = self.place(id);
        if let Some(Sock { flow, kind: SockKind::Tcp(tcp), .. }) = self.slab.get_mut(id.0) {
            (*flow, tcp.lingers) = (None, true);
            self.deferred.lingering.push_back((place, sys::now().plus_s(LINGER_S)));
        }
        if self.deferred.lingering.len() > LINGER_MAX
            && let Some((place, _)) = self.deferred.lingering.pop_front()
        {
            self.tcp_end(counters, SockId(place.0), Close::Reset);
        }
    }

    fn tcp_end(&mut self, counters: &mut IoCounters, id: SockId, how: Close) {
        if let Some(s) = self.remove(counters, id) {
            if how == Close::Reset {
                sys::set_abort(&s.fd);
            }
            self.deferred.close(s.fd);
        }
    }

    /// A connection that lingers has room, or has `failed`.
    pub(crate) fn linger(&mut self, counters: &mut IoCounters, id: SockId, failed: bool) {
        let how = match self.send_waiting(id) {
            Ok(false) if !failed => return,
            Ok(true) => Close::Graceful,
            Ok(false) | Err(_) => Close::Reset,
        };
        let place = self.place(id);
        self.deferred.lingering.retain(|(other, _)| *other != place);
        self.tcp_end(counters, id, how);
    }

    /// When the oldest of those that linger has done so for too long.
    pub(crate) fn lingering_until(&self) -> Option<Time> {
        self.deferred.lingering.front().map(|(_, until)| *until)
    }

    /// Resets those that linger for too long.
    pub(crate) fn end_old_lingering(&mut self, counters: &mut IoCounters, now: Time) {
        while let Some((place, until)) = self.deferred.lingering.front().copied()
            && until <= now
        {
            self.deferred.lingering.pop_front();
            self.tcp_end(counters, SockId(place.0), Close::Reset);
        }
    }

    /// The worker ends: connections that linger have not sent all.
    pub(crate) fn end_lingering(&mut self) {
        for (_, s) in self.slab.iter() {
            if matches!(&s.kind, SockKind::Tcp(tcp) if tcp.lingers) {
                sys::set_abort(&s.fd);
            }
        }
    }

    /// Takes what waits, up to what a run takes, for the run.
    pub(crate) fn take_deferred(&mut self, room: usize) -> Taken {
        let deferred = &mut self.deferred;
        let mut room = room;
        let mut part = |n: usize| {
            let take = n.min(room);
            room -= take;
            n - take
        };
        let sends = deferred.sends.split_off(part(deferred.sends.len()));
        let closes = deferred.closes.split_off(part(deferred.closes.len()));
        for place in &sends {
            if let Some(Sock { kind: SockKind::Tcp(tcp), .. }) = self.at(*place) {
                tcp.deferred = false;
            }
        }
        Taken { sends, closes }
    }

    /// Adds what was taken to a run.
    pub(crate) fn add_to<'fd>(&'fd self, batch: &mut Batch<'_, 'fd>, taken: Taken, done: &mut Vec<Done>) {
        let sock = |(index, generation): Place| {
            (self.slab.generation(index) == generation).then(|| self.slab.get(index)).flatten()
        };
        for place in taken.sends {
            if let Some(Sock { fd, kind: SockKind::Tcp(tcp), .. }) = sock(place)
                && !tcp.waiting.is_empty()
            {
                batch.send(fd, &tcp.waiting);
                done.push(Done::Send(place));
            }
        }
        for fd in taken.closes {
            batch.close(fd);
            done.push(Done::Close);
        }
    }

    /// What became of an operation of a run.
    pub(crate) fn did(&mut self, counters: &mut IoCounters, what: &Done, result: i32) {
        match *what {
            Done::Close => {}
            Done::Send(place) => {
                let Some(Sock { fd, kind: SockKind::Tcp(tcp), .. }) = self.at(place) else { return };
                let lingers = tcp.lingers;
                match usize::try_from(result) {
                    Ok(n) => tcp.sent(fd, n),
                    Err(_) if sys::would_block(-result) => tcp.sent(fd, 0),
                    Err(_) => self.broke(SockId(place.0), sys::sock_error(-result)),
                }
                if lingers {
                    self.linger(counters, SockId(place.0), false);
                }
            }
        }
    }
}

/// What is to be done in one run.
pub(crate) struct Taken {
    sends: Vec<Place>,
    closes: Vec<OwnedFd>,
}

impl TcpSock {
    /// The kernel took so much of what waits; it tells when it has room for the rest. Behind all of it goes the
    /// end, if that was said.
    fn sent(&mut self, fd: &OwnedFd, n: usize) {
        if n >= self.waiting.len() {
            self.waiting = Vec::new();
            if std::mem::take(&mut self.ends) {
                sys::shutdown_write(fd);
            }
        } else {
            self.waiting.drain(..n);
            self.wants_write = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attachment::quota::{Pool, Quota};
    use crate::os::epoll::Poller;
    use crate::os::io_uring::OPS_MAX;
    use crate::os::io_uring::Submitter;
    use guestnet_core::types::{FlowId, IpFields, Target};
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};

    struct Rig {
        socks: Socks,
        poller: Poller,
        submitter: Submitter,
    }

    /// With io_uring, where there is one, and without: what is put off is the same.
    fn each(test: impl Fn(&mut Rig)) {
        for wanted in [true, false] {
            let mut socks = Socks::new(&Quota::new(Pool::of_process()));
            socks.deferred.on = true;
            test(&mut Rig { socks, poller: Poller::new(8).unwrap(), submitter: Submitter::new(wanted) });
        }
    }

    impl Rig {
        fn connect(&mut self, l: &TcpListener, number: u32) -> (SockId, FlowId) {
            let flow = FlowId { index: number, generation: 0 };
            let target = Target::Address(l.local_addr().unwrap());
            let counters = &mut IoCounters::default();
            (
                self.socks
                    .tcp_connect(&self.poller, counters, flow, target, IpFields::ttl(64), false)
                    .unwrap(),
                flow,
            )
        }

        fn pair(&mut self) -> (SockId, TcpStream) {
            let l = TcpListener::bind("127.0.0.1:0").unwrap();
            let (id, _) = self.connect(&l, 1);
            self.submit();
            (id, l.accept().unwrap().0)
        }

        fn submit(&mut self) {
            let (mut done, taken) = (Vec::new(), self.socks.take_deferred(OPS_MAX));
            let mut batch = self.submitter.batch();
            self.socks.add_to(&mut batch, taken, &mut done);
            for (what, result) in done.iter().zip(batch.run()) {
                self.socks.did(&mut IoCounters::default(), what, *result);
            }
        }

        fn tcp(&mut self, id: SockId) -> &mut TcpSock {
            match self.socks.get_mut(id) {
                Some(Sock { kind: SockKind::Tcp(tcp), .. }) => tcp,
                _ => panic!("no connection"),
            }
        }

        /// Fills the kernel's buffer, so that something is left here: how much went before.
        fn stuff(&mut self, id: SockId) -> usize {
            let mut sent = 0;
            while self.tcp(id).waiting.is_empty() {
                sent += self.socks.tcp_send(id, &[b'x'; 1000]).unwrap();
                self.submit();
            }
            sent
        }
    }

    #[test]
    fn what_a_batch_sends_goes_together_and_in_order() {
        each(|r| {
            let (id, mut other) = r.pair();
            for part in [&b"one "[..], b"two ", &[b'z'; SMALL + 1], b" end"] {
                assert_eq!(r.socks.tcp_send(id, part), Ok(part.len()));
            }
            r.submit();
            assert!(r.socks.deferred.is_empty());
            let mut all = vec![0; 12 + SMALL + 1];
            other.read_exact(&mut all).unwrap();
            assert!(all.starts_with(b"one two zzz") && all.ends_with(b"zz end"));
            assert_eq!(r.socks.tcp_send(id, b"next"), Ok(4));
            r.submit();
            other.read_exact(&mut all[..4]).unwrap();
            assert_eq!(&all[..4], b"next");
        });
    }

    #[test]
    fn what_the_kernel_leaves_goes_first_and_then_the_end() {
        each(|r| {
            let (id, mut other) = r.pair();
            let sent = r.stuff(id);
            assert_eq!(r.socks.tcp_send(id, b"later"), Ok(0), "nothing more is taken");
            r.socks.tcp_shutdown(id);
            let mut got = 0;
            let mut buffer = vec![0; 1 << 16];
            loop {
                let left = !r.socks.send_waiting(id).unwrap();
                match other.read(&mut buffer).unwrap() {
                    0 => break,
                    n => got += n,
                }
                assert!(left || got <= sent);
            }
            assert_eq!(got, sent, "all of it, and the end behind it");
        });
    }

    #[test]
    fn the_end_follows_what_was_put_off_before_it() {
        each(|r| {
            let (id, mut other) = r.pair();
            let sent = r.stuff(id);
            // As if all of what waits had been put off just now, with the kernel full already.
            let place = r.socks.place(id);
            r.tcp(id).deferred = true;
            r.socks.deferred.sends.push(place);
            r.socks.tcp_shutdown(id);
            assert!(r.tcp(id).ends);
            let (mut got, mut buffer) = (0, vec![0; 1 << 16]);
            while got + r.tcp(id).waiting.len() < sent {
                got += other.read(&mut buffer).unwrap();
            }
            r.submit();
            assert!(r.tcp(id).waiting.is_empty() && !r.tcp(id).ends);
            loop {
                match other.read(&mut buffer).unwrap() {
                    0 => break,
                    n => got += n,
                }
            }
            assert_eq!(got, sent);
        });
    }

    #[test]
    fn a_connection_that_is_closed_leaves_nothing_behind() {
        each(|r| {
            let (id, mut other) = r.pair();
            let sent = r.stuff(id);
            let counters = &mut IoCounters::default();
            r.socks.tcp_close(counters, id, Close::Graceful);
            assert!(r.tcp(id).lingers);
            let (mut got, mut buffer) = (0, vec![0; 1 << 16]);
            loop {
                match other.read(&mut buffer).unwrap() {
                    0 => break,
                    n => got += n,
                }
                if r.socks.get(id).is_some() {
                    r.socks.linger(counters, id, false);
                    r.submit();
                }
            }
            assert_eq!((got, r.socks.slab.len(), r.socks.deferred.lingering.len()), (sent, 0, 0));
        });
    }

    #[test]
    fn what_came_before_a_reset_arrives_before_it() {
        each(|r| {
            let (id, mut other) = r.pair();
            assert_eq!(r.socks.tcp_send(id, b"last words"), Ok(10));
            r.socks.tcp_close(&mut IoCounters::default(), id, Close::Reset);
            let mut buffer = [0; 10];
            other.read_exact(&mut buffer).unwrap();
            assert_eq!(&buffer, b"last words");
            r.submit();
            assert_eq!(other.read(&mut buffer).unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
        });
    }

    #[test]
    fn a_broken_connection_is_told() {
        each(|r| {
            let (id, other) = r.pair();
            sys::set_abort(&OwnedFd::from(other));
            for _ in 0..2 {
                // The first may still be taken; the reset answers it.
                if r.tcp(id).broken.is_none() {
                    assert_eq!(r.socks.tcp_send(id, b"hello"), Ok(5));
                    r.submit();
                }
            }
            let told: Vec<_> =
                r.socks.outcomes.iter().map(|(flow, result)| (*flow, result.is_err())).collect();
            assert!(told.contains(&(FlowId { index: 1, generation: 0 }, true)), "{told:?}");
            r.socks.tcp_shutdown(id);
            r.socks.tcp_close(&mut IoCounters::default(), id, Close::Graceful);
            assert_eq!((r.socks.slab.len(), r.socks.deferred.lingering.len()), (0, 0));
            let (id, _other) = r.pair();
            r.socks.broke(id, SockError::Reset);
            assert!(r.socks.tcp_send(id, b"more").is_err());
            assert!(r.socks.tcp_peek(id, 0, 10, &mut Vec::new()).is_err());
        });
    }
}
