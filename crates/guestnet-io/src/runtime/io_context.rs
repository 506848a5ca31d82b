//! Theory of operation: the world as the core sees it: [`Effects`] over real attachments and sockets. It is
//! apart from the core so that the worker can lend it to the core's calls.

use crate::attachment::port_set::{PortSet, TxContext};
use crate::attachment::quota::Quota;
use crate::attachment::tap::WriteOutcome;
use crate::control::capture::{Capturing, Direction};
use crate::control::event::{Event, EventSender, Level};
use crate::control::port_names::PortNames;
use crate::os::epoll::Poller;
use crate::os::io_uring::{OPS_MAX, SMALL, Submitter};
use crate::os::sys;
use crate::runtime::links::ShardLinks;
use crate::runtime::stats::IoCounters;
use crate::runtime::threads::buffers::Buffers;
use crate::uplink::deferred_writes::Done;
use crate::uplink::local_stream::LocalStreams;
use crate::uplink::proxy::Trouble;
use crate::uplink::sockets::{Sock, SockKind, Socks};
use crate::uplink::tun::Tun;
use guestnet_core::effects::{self, Close, Effects, Peek, Peer, SockError, TxError};
use guestnet_core::types::{FlowId, FrameMeta, IpFields, PortId, SockId, Target, Time};
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;

/// Everything of a worker but the core.
pub(crate) struct IoContext {
    pub poller: Poller,
    pub ports: PortSet,
    pub socks: Socks,
    /// What the network holds of the process.
    pub quota: Arc<Quota>,
    /// The uplink of packets, where there is one.
    pub tun: Option<Tun>,
    pub events: EventSender,
    submitter: Submitter,
    pub capture: Option<Capturing>,
    /// What captures call the ports.
    pub port_names: PortNames,
    /// The other workers, where there are any.
    pub links: Option<Box<ShardLinks>>,
    pub counters: IoCounters,
    /// Whether the control side wants the events of flows that open and close.
    pub flow_events: bool,
    /// Whether the control side wants the events of denied flows.
    pub denial_events: bool,
    /// The time of the batch at hand.
    pub now: Time,
    /// What was peeked last, and where in the buffer it begins.
    scratch: Vec<u8>,
    peeked: usize,
    /// What a run of the submitter consists of.
    done: Vec<Done>,
    frames: Vec<u32>,
    /// Trouble with the proxy is not reported again before.
    proxy_reported: Time,
}

/// Seconds between reports of trouble with the proxy.
const PROXY_REPORT_S: u64 = 10;

impl IoContext {
    /// Without buffers: see [`IoContext::exchange`].
    pub(crate) fn new(poller: Poller, events: EventSender, quota: Arc<Quota>) -> IoContext {
        IoContext {
            poller,
            ports: PortSet::default(),
            socks: Socks::new(&quota),
            quota,
            tun: None,
            events,
            submitter: Submitter::new(false),
            capture: None,
            port_names: PortNames::default(),
            links: None,
            counters: IoCounters::default(),
            flow_events: true,
            denial_events: true,
            now: sys::now(),
            scratch: Vec::new(),
            peeked: 0,
            done: Vec::new(),
            frames: Vec::new(),
            proxy_reported: Time(0),
        }
    }

    /// Swaps the buffers of the thread for the empty ones in their place, or back. `batched`: small writes of a batch are
    /// to be one call, where the system can.
    pub(crate) fn exchange(&mut self, b: &mut Buffers, batched: bool) {
        std::mem::swap(&mut self.scratch, &mut b.peek);
        std::mem::swap(self.ports.linear(), &mut b.linear);
        if batched {
            std::mem::swap(&mut self.submitter, &mut b.submitter);
            self.socks.deferred.on = self.submitter.is_on();
        }
    }

    /// The ports, and what they need to send.
    pub(crate) fn split(&mut self) -> (&mut PortSet, TxContext<'_>) {
        let IoContext { poller, ports, events, counters, submitter, now, .. } = self;
        (ports, TxContext { poller, events, counters, submitter, now: *now })
    }

    /// A frame came from a guest.
    pub(crate) fn capture_in(&mut self, port: PortId, frame: &[u8]) {
        if let Some(c) = &mut self.capture {
            c.frame(self.now, port, Direction::FromGuest, &[frame]);
        }
    }

    /// The frame that is handled was refused: its capture says why.
    fn comment(&mut self, event: &effects::Event) {
        let Some(capture) = &mut self.capture else { return };
        match event {
            effects::Event::FlowDenied(d) => {
                let rule = d.rule.as_deref().unwrap_or("limit");
                capture.comment(d.port, &format!("guestnet: {rule}: {}", d.reason.name()));
            }
            effects::Event::NameDenied(d) => {
                capture.comment(d.port, &format!("guestnet: {}: {}", d.rule, d.reason));
            }
            _ => {}
        }
    }

    fn capture_out(&mut self, port: PortId, front: &[u8], payload: Range<usize>) {
        if let Some(c) = &mut self.capture {
            let rest = self.scratch.get(payload).unwrap_or(&[]);
            c.frame(self.now, port, Direction::ToGuest, &[front, rest]);
        }
    }

    /// The end of a batch: everything that is still put off goes out.
    pub(crate) fn flush(&mut self) {
        self.socks.udp_flush(&mut self.counters);
        let (ports, mut out) = self.split();
        ports.flush(&mut out);
        self.submit();
        if let Some(p) = &mut self.links {
            p.wake_sleepers();
        }
    }

    /// Does what was put off, in as few calls as may be.
    fn submit(&mut self) {
        while !self.socks.deferred.is_empty() || self.ports.has_frames() {
            let IoContext { poller, ports, socks, submitter, counters, done, frames, .. } = self;
            let taken = socks.take_deferred(OPS_MAX);
            let mut batch = submitter.batch();
            socks.add_to(&mut batch, taken, done);
            ports.add_frames(&mut batch, frames);
            let results = batch.run();
            counters.write_runs += 1;
            counters.writes_put_off += results.len() as u64;
            for (what, result) in done.iter().zip(results) {
                socks.did(counters, what, *result);
            }
            ports.did_frames(poller, counters, frames, results.get(done.len()..).unwrap_or(&[]));
            done.clear();
            frames.clear();
        }
    }

    /// The proxy opened no connection: the owner hears of it, if it is the proxy's fault, but not each time.
    pub(crate) fn proxy_failed(&mut self, trouble: Trouble) {
        let (Some(proxy), Some(why)) = (&self.socks.proxy, trouble.text()) else { return };
        if self.now < self.proxy_reported {
            return;
        }
        self.proxy_reported = self.now.plus_s(PROXY_REPORT_S);
        let message = format!("the proxy {} opens no connections: {why}", proxy.address);
        self.events.try_send(Event::Log { level: Level::Warning, message });
    }

    /// The control side or another worker does not take what it has to hear: nothing may be done meanwhile that
    /// makes more of it.
    pub(crate) fn is_behind(&self) -> bool {
        self.events.is_behind() || self.links.as_ref().is_some_and(|p| p.is_behind())
    }

    /// True when the core has to hear of something.
    pub(crate) fn has_news(&self) -> bool {
        !self.socks.outcomes.is_empty()
            || self.socks.local.has_news()
            || !self.socks.errors.is_empty()
            || !self.ports.writable.is_empty()
            || !self.ports.down.is_empty()
            || !self.ports.stalled.is_empty()
    }
}

impl Effects for IoContext {
    fn transmit(&mut self, port: PortId, frame: &[u8], meta: FrameMeta) -> Result<(), TxError> {
        let (ports, mut out) = self.split();
        ports.transmit(&mut out, port, frame, &[], meta)?;
        self.capture_out(port, frame, 0..0);
        Ok(())
    }

    fn transmit_peeked(
        &mut self,
        port: PortId,
        header: &[u8],
        payload: Range<usize>,
        meta: FrameMeta,
    ) -> Result<(), TxError> {
        let range = self.peeked + payload.start..self.peeked + payload.end;
        if payload.len() > SMALL {
            // A flow with much to send begins its turn: what others have put off does not wait for it.
            self.socks.udp_flush(&mut self.counters);
            self.submit();
        }
        let IoContext { poller, ports, events, counters, submitter, now, scratch, .. } = self;
        let mut out = TxContext { poller, events, counters, submitter, now: *now };
        let rest = scratch.get(range.clone()).unwrap_or(&[]);
        ports.transmit(&mut out, port, header, rest, meta)?;
        self.capture_out(port, header, range);
        Ok(())
    }

    fn uplink(&mut self, frame: &[u8], meta: FrameMeta) -> Result<(), TxError> {
        match self.tun.as_mut().map(|t| t.write(frame, meta)) {
            Some(WriteOutcome::Yes) => Ok(()),
            Some(WriteOutcome::Full) => Err(TxError::Full),
            // That the device is gone is found, and told, when it is read.
            Some(WriteOutcome::Refused | WriteOutcome::Down(_)) | None => Err(TxError::Gone),
        }
    }

    fn forward_remote(
        &mut self,
        worker: u16,
        port: Option<PortId>,
        frame: &[u8],
        meta: FrameMeta,
    ) -> Result<(), TxError> {
        self.links.as_mut().map_or(Err(TxError::Gone), |p| p.send(worker, port, frame, meta))
    }

    fn port_room(&mut self, port: PortId) -> usize {
        self.ports.room(port, &self.events)
    }

    fn tcp_connect(
        &mut self,
        flow: FlowId,
        target: Target,
        ip: IpFields,
        tight: bool,
    ) -> Result<SockId, SockError> {
        if let Target::Service(service, port) = target
            && self.socks.local.serves(service)
        {
            self.socks.outcomes.push((flow, Ok(())));
            return Ok(self.socks.local.open(flow, port));
        }
        self.socks.tcp_connect(&self.poller, &mut self.counters, flow, target, ip, tight)
    }

    fn tcp_held(&mut self, sock: SockId) -> usize {
        self.socks.tcp_held(sock)
    }

    fn tcp_tighten(&mut self, sock: SockId, tight: bool) {
        self.socks.tcp_tighten(sock, tight);
    }

    fn tcp_tos(&mut self, sock: SockId, tos: u8) {
        self.socks.tcp_tos(sock, tos);
    }

    fn tcp_send_urgent(&mut self, sock: SockId, byte: u8) -> Result<bool, SockError> {
        if LocalStreams::has(sock) {
            return Ok(false);
        }
        self.socks.tcp_send_urgent(sock, byte)
    }

    fn tcp_send(&mut self, sock: SockId, data: &[u8]) -> Result<usize, SockError> {
        if LocalStreams::has(sock) {
            return self.socks.local.send(sock, data);
        }
        self.socks.tcp_send(sock, data)
    }

    fn tcp_peek(&mut self, sock: SockId, offset: usize, max: usize) -> Result<Peek, SockError> {
        if LocalStreams::has(sock) {
            self.peeked = 0;
            return self.socks.local.peek(sock, offset, max, &mut self.scratch);
        }
        let (peek, at) = self.socks.tcp_peek(sock, offset, max, &mut self.scratch)?;
        self.peeked = at;
        Ok(peek)
    }

    fn tcp_read(&mut self, sock: SockId, out: &mut Vec<u8>, max: usize) -> Result<Peek, SockError> {
        self.socks.tcp_read(sock, out, max)
    }

    fn tcp_discard(&mut self, sock: SockId, len: usize) {
        if LocalStreams::has(sock) {
            return self.socks.local.discard(sock, len);
        }
        self.socks.tcp_discard(sock, len);
    }

    fn tcp_answer(&mut self, flow: FlowId, answer: &[u8]) -> Result<SockId, SockError> {
        Ok(self.socks.local.answer(flow, answer))
    }

    fn tcp_shutdown(&mut self, sock: SockId) {
        if LocalStreams::has(sock) {
            return self.socks.local.shutdown(sock);
        }
        self.socks.tcp_shutdown(sock);
    }

    fn tcp_peer(&mut self, sock: SockId) -> Option<Peer> {
        self.socks.tcp_peer(sock)
    }

    fn tcp_probe(&mut self, sock: SockId) {
        self.socks.tcp_probe(sock);
    }

    fn stream_send(&mut self, sock: SockId, data: &[u8]) -> usize {
        self.socks.local.send_to_guest(sock, data)
    }

    fn stream_unread(&mut self, sock: SockId) -> usize {
        self.socks.local.unread(sock)
    }

    fn stream_resume(&mut self, sock: SockId) {
        self.socks.local.resume(sock);
    }

    fn stream_close(&mut self, sock: SockId, how: Close) {
        if let Some(flow) = self.socks.local.end(sock, how) {
            self.socks.outcomes.push((flow, Err(SockError::Reset)));
        }
    }

    fn udp_open(&mut self, flow: FlowId, like: SocketAddr) -> Result<SockId, SockError> {
        self.socks.udp_open(&self.poller, &mut self.counters, flow, like)
    }

    fn udp_send(
        &mut self,
        sock: SockId,
        dst: SocketAddr,
        payload: &[u8],
        segment: u16,
        ip: IpFields,
        dont_fragment: bool,
    ) -> Result<(), SockError> {
        self.socks.udp_queue(&mut self.counters, sock, dst, payload, segment, ip, dont_fragment, None);
        Ok(())
    }

    fn udp_send_forward(&mut self, sock: SockId, dst: SocketAddr, payload: &[u8]) -> Result<(), SockError> {
        let Some(Sock { kind: SockKind::Forward { origins, .. }, .. }) = self.socks.get(sock) else {
            return Err(SockError::Reset);
        };
        let from = origins.local(&dst);
        self.socks.udp_queue(&mut self.counters, sock, dst, payload, 0, IpFields::default(), false, from);
        Ok(())
    }

    fn ping_open(&mut self, flow: FlowId, like: IpAddr) -> Result<SockId, SockError> {
        self.socks.ping_open(&self.poller, &mut self.counters, flow, like)
    }

    fn ping_send(
        &mut self,
        sock: SockId,
        dst: IpAddr,
        seq: u16,
        body: &[u8],
        ttl: u8,
        dont_fragment: bool,
    ) -> Result<(), SockError> {
        self.socks.ping_send(sock, dst, seq, body, ttl, dont_fragment)
    }

    fn close(&mut self, sock: SockId, how: Close) {
        if LocalStreams::has(sock) {
            return self.socks.local.close(sock);
        }
        match self.socks.get(sock).map(|s| &s.kind) {
            Some(SockKind::Tcp(_)) => self.socks.tcp_close(&mut self.counters, sock, how),
            Some(SockKind::Udp(_)) => {
                // What the guest sent before still goes.
                self.socks.udp_flush(&mut self.counters);
                self.socks.remove(&mut self.counters, sock);
            }
            Some(SockKind::Ping { .. }) => drop(self.socks.remove(&mut self.counters, sock)),
            // A published port is the Forward's, not a flow's.
            Some(SockKind::Forward { .. }) | None => {}
        }
    }

    fn event(&mut self, event: effects::Event) -> bool {
        use effects::Event::{FlowClosed, FlowDenied, FlowOpened, NameDenied};
        if self.capture.is_some() {
            self.comment(&event);
        }
        let wanted = match event {
            FlowOpened { .. } | FlowClosed { .. } => self.flow_events,
            FlowDenied(_) | NameDenied(_) => self.denial_events,
            _ => true,
        };
        !wanted || self.events.try_send(Event::Core(event))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attachment::quota::Pool;
    use crate::control::{command::Waker, event};
    use guestnet_core::types::{FlowId, Target};
    use std::io::Read;
    use std::net::{TcpListener, UdpSocket};

    #[test]
    fn what_is_put_off_does_not_wait_for_the_turn_of_a_large_flow() {
        for batched in [true, false] {
            let (events, _heard) = event::channel(64, Arc::new(Waker::new().unwrap())).unwrap();
            let mut io = IoContext::new(Poller::new(8).unwrap(), events, Quota::new(Pool::of_process()));
            io.exchange(&mut Buffers::new(), batched);
            io.socks.deferred.on = true;
            let flow = |index| FlowId { index, generation: 0 };
            let l = TcpListener::bind("127.0.0.1:0").unwrap();
            let target = Target::Address(l.local_addr().unwrap());
            let tcp = io.tcp_connect(flow(1), target, IpFields::ttl(64), false).unwrap();
            let mut connected = l.accept().unwrap().0;
            let other = UdpSocket::bind("127.0.0.1:0").unwrap();
            let at = other.local_addr().unwrap();
            let udp = io.udp_open(flow(2), at).unwrap();
            other.set_nonblocking(true).unwrap();
            connected.set_nonblocking(true).unwrap();

            let mut got = [0; 8];
            assert_eq!(io.tcp_send(tcp, b"small"), Ok(5));
            io.udp_send(udp, at, b"one", 0, IpFields::ttl(64), false).unwrap();
            // The port is not there, which changes nothing.
            let nowhere = PortId(7);
            let _no_port = io.transmit_peeked(nowhere, &[0; 54], 0..SMALL, FrameMeta::default());
            assert!(connected.read(&mut got).is_err() && other.recv(&mut got).is_err(), "the batch goes on");
            let _no_port = io.transmit_peeked(nowhere, &[0; 54], 0..SMALL + 1, FrameMeta::default());
            assert_eq!((connected.read(&mut got).unwrap(), &got[..5]), (5, &b"small"[..]));
            assert_eq!((other.recv(&mut got).unwrap(), &got[..3]), (3, &b"one"[..]));
        }
    }

    #[test]
    fn an_event_without_room_is_lost_and_an_unwanted_one_is_not() {
        let (events, heard) = event::channel(1024, Arc::new(Waker::new().unwrap())).unwrap();
        let mut io = IoContext::new(Poller::new(8).unwrap(), events, Quota::new(Pool::of_process()));
        let flow = FlowId { index: 1, generation: 0 };
        let closed = || event::flow_closed(flow, PortId(1));
        io.flow_events = false;
        assert!((0..2000).all(|_| io.event(closed())));
        assert_eq!((heard.drain(2000).len(), io.events.dropped), (0, 0));
        io.flow_events = true;
        let taken = (0..2000).filter(|_| io.event(closed())).count();
        assert_eq!((heard.drain(2000).len(), io.events.dropped), (taken, 2000 - taken as u64));
        assert!(taken > 0 && taken < 2000 && io.event(closed()));
    }
}
