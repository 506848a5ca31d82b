//! Theory of operation: from what the kernel reports to the calls of the core. Each descriptor gets a batch
//! at a time, so that a busy one keeps nobody waiting; what is left is reported again.

use crate::attachment::ReadOutcome;
use crate::attachment::port_set::{Attachment, Port};
use crate::attachment::stream::{self, Filled};
use crate::os::epoll::{Kind, Ready, Token};
use crate::os::sys;
use crate::runtime::links::Item;
use crate::runtime::shard::Shard;
use crate::runtime::stats::IoCounters;
use crate::runtime::threads::turn::Turn;
use crate::uplink::error_queue;
use crate::uplink::forward::Listening;
use crate::uplink::ping;
use crate::uplink::proxy::Trouble;
use crate::uplink::sockets::{Sock, SockKind};
use crate::uplink::tcp::trace;
use crate::uplink::udp::{self, Inbox};
use guestnet_core::effects::{Close, Effects};
use guestnet_core::shard::PeerUpdate;
use guestnet_core::types::{FlowId, FrameMeta, PortId, SockId};
use guestnet_wire::gro::Run;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::OwnedFd;

/// Connections accepted before others have their turn.
const ACCEPTS: usize = 64;
/// Calls that receive datagrams before others have their turn.
const RECEIVES: usize = 4;
/// Items of another worker that are taken at once.
const PEER_BATCH: usize = 16;
/// Bytes of frames from one worker before others have their turn.
const PEER_BATCH_BYTES: usize = 512 << 10;
const HUNG_UP: i32 = libc::EPOLLHUP | libc::EPOLLERR;

impl Shard {
    pub(crate) fn dispatch(&mut self, ready: Ready) {
        match ready.token.kind {
            Kind::Waker => self.commands_waiting = self.waker.take() || self.commands_waiting,
            Kind::Port if self.io.ports.is_current(ready.token) => self.on_port(ready),
            Kind::Port => {}
            Kind::Sock => self.on_sock(ready),
            Kind::Listener => self.on_listener(ready.token),
            Kind::Forward => self.on_forward(ready.token),
            Kind::Kick => self.on_kick(ready.token),
            Kind::Tun => self.on_tun(),
            Kind::Worker | Kind::Shard => self.worker_called = true,
        }
    }

    // ---- other workers ------------------------------------------------------------------------------

    /// Does what other workers sent; false when there was nothing.
    pub(crate) fn receive_from_shards(&mut self) -> bool {
        let mut any = false;
        let mut items = [Item::PeerUpdate(PeerUpdate::PortDown { port: PortId(0) }); PEER_BATCH];
        for from in 0..self.io.links.as_ref().map_or(0, |p| p.count()) {
            let mut bytes = 0;
            while bytes < PEER_BATCH_BYTES {
                let Some(p) = &mut self.io.links else { break };
                let n = p.take(from, &mut items);
                let Some(pool) = p.pool_of(from).filter(|_| n > 0) else { break };
                any = true;
                for item in items.iter().take(n) {
                    match *item {
                        Item::PeerUpdate(update) => {
                            self.core.peer_update(self.now, from as u16, update, &mut self.io);
                        }
                        Item::Frame { port, buffer, meta } => {
                            if let Ok(frame) = pool.borrow(buffer) {
                                bytes += frame.len();
                                self.core.peer_frame(self.now, port, &frame, meta, &mut self.io);
                            }
                            // It came with the ring, so it is ours to free.
                            let _freed = pool.free(buffer);
                        }
                    }
                }
                if n < PEER_BATCH {
                    break;
                }
            }
        }
        any
    }

    // ---- attachments --------------------------------------------------------------------------------

    /// A frame from a guest, in the frame buffer.
    pub(crate) fn frame_in(&mut self, port: PortId, at: Range<usize>, meta: FrameMeta) {
        let Some(frame) = self.frame.get_mut(at) else { return };
        self.io.capture_in(port, frame);
        self.core.frame(self.now, port, frame, meta, &mut self.io);
    }

    pub(crate) fn count_batch(&mut self, frames: usize) {
        if let Some(b) = self.io.counters.batch_histogram.get_mut(IoCounters::bucket(frames)) {
            *b += 1;
        }
    }

    fn on_port(&mut self, ready: Ready) {
        let slot = ready.token.index;
        if ready.has(libc::EPOLLOUT) {
            let (ports, mut out) = self.io.split();
            ports.out_ready(&mut out, slot);
        }
        if !ready.has(libc::EPOLLIN | HUNG_UP) {
            return;
        }
        let id = match self.io.ports.get_mut(slot) {
            Some(p) if !p.is_leaving() => p.id,
            _ => return,
        };
        let (frames, down) = match self.io.ports.get_mut(slot).map(|p| &p.attachment) {
            Some(Attachment::Stream(_)) => return self.stream_ready(slot, id),
            Some(Attachment::VhostUser(_)) => return self.on_front_end(ready, id),
            Some(Attachment::Tap(_) | Attachment::Dgram(_)) => {
                let (frames, down) = self.read_frames(slot, id);
                // Of these, reading does not always tell.
                let hung_up = frames == 0 && ready.has(HUNG_UP);
                (frames, down.or_else(|| hung_up.then(|| "the peer hung up".into())))
            }
            _ => return,
        };
        self.count_batch(frames);
        if let Some(why) = down {
            self.io.ports.leave(id, why);
        }
    }

    /// A turn of a guest on a stream, which may have frames that were read before.
    pub(crate) fn stream_ready(&mut self, slot: u32, id: PortId) {
        let mut turn = self.io.ports.begin_turn(slot, self.now);
        let before = turn.frames;
        let down = self.read_stream(slot, id, &mut turn);
        turn.pause();
        self.count_batch(turn.frames - before);
        let ports = &mut self.io.ports;
        ports.end_turn(slot, turn);
        if let Some(why) = down {
            ports.leave(id, why);
        } else if let Some(Port { attachment: Attachment::Stream(s), .. }) = ports.get_mut(slot)
            && s.has_frame()
        {
            // Nothing else tells of it.
            ports.look_again(ports.port_token(slot), false);
        }
    }

    fn read_frames(&mut self, slot: u32, id: PortId) -> (usize, Option<String>) {
        let mut turn = Turn::new(self.now);
        while turn.goes_on(self.batch_size) {
            let Some(Port { attachment, .. }) = self.io.ports.get_mut(slot) else { break };
            let got = match attachment {
                Attachment::Tap(t) => t.read(&mut self.frame),
                Attachment::Dgram(d) => match d.read(&mut self.frame) {
                    ReadOutcome::Frame(n) => ReadOutcome::Frame((0, n, FrameMeta::default())),
                    ReadOutcome::Bad => ReadOutcome::Bad,
                    ReadOutcome::Empty => ReadOutcome::Empty,
                    ReadOutcome::Down(why) => ReadOutcome::Down(why),
                },
                _ => break,
            };
            match got {
                ReadOutcome::Frame((from, to, meta)) => {
                    self.frame_in(id, from..to, meta);
                    turn.frame(to - from);
                }
                ReadOutcome::Bad => {
                    self.io.counters.bad_frames += 1;
                    turn.frame(0);
                }
                ReadOutcome::Empty => break,
                ReadOutcome::Down(why) => return (turn.frames, Some(why)),
            }
        }
        (turn.frames, None)
    }

    /// A frame in `buf`, or several that became one.
    fn run_in(&mut self, port: PortId, run: Run, buf: &mut [u8]) {
        let (at, csum, gso) = run.finish(buf);
        if let Some(frame) = buf.get_mut(at) {
            self.core.frame(self.now, port, frame, FrameMeta { csum, gso }, &mut self.io);
        }
    }

    fn read_stream(&mut self, slot: u32, id: PortId, turn: &mut Turn) -> Option<String> {
        let mut buf = std::mem::take(&mut self.stream_buffer);
        let mut down = None;
        while turn.goes_on(self.batch_size) {
            let Some(Port { attachment: Attachment::Stream(s), .. }) = self.io.ports.get_mut(slot) else {
                break;
            };
            let Filled { len, more } = match s.fill(&mut buf) {
                ReadOutcome::Frame(f) => f,
                ReadOutcome::Down(why) => {
                    down = Some(why);
                    break;
                }
                ReadOutcome::Empty | ReadOutcome::Bad => break,
            };
            let (mut at, before) = (0, turn.frames);
            let mut run: Option<Run> = None;
            // Of frames that a read brought together only the time is bounded: those that become one cost little.
            while turn.has_time() {
                match stream::next_frame(buf.get(at..len).unwrap_or(&[])) {
                    ReadOutcome::Frame((from, to)) => {
                        let frame = at + from..at + to;
                        if let Some(frame) = buf.get_mut(frame.clone()) {
                            self.io.capture_in(id, frame);
                        }
                        if !run.as_mut().is_some_and(|r| r.add(&mut buf, frame.clone()))
                            && let Some(whole) = run.replace(Run::begin(&buf, frame))
                        {
                            self.run_in(id, whole, &mut buf);
                        }
                        turn.frame(to - from);
                        at += to;
                    }
                    ReadOutcome::Down(why) => {
                        down = Some(why);
                        break;
                    }
                    ReadOutcome::Empty | ReadOutcome::Bad => break,
                }
            }
            if let Some(whole) = run {
                self.run_in(id, whole, &mut buf);
            }
            if down.is_some() {
                break;
            }
            if let Some(Port { attachment: Attachment::Stream(s), .. }) = self.io.ports.get_mut(slot) {
                s.keep(buf.get(at..len).unwrap_or(&[]), turn.frames - before, at, more);
            }
            if !more {
                break;
            }
        }
        self.stream_buffer = buf;
        down
    }

    // ---- uplink of packets --------------------------------------------------------------------------

    fn on_tun(&mut self) {
        let mut turn = Turn::new(self.now);
        while turn.goes_on(self.batch_size) {
            let Some(tun) = &self.io.tun else { break };
            match tun.read(&mut self.frame) {
                ReadOutcome::Frame((end, meta)) => {
                    let Some(frame) = self.frame.get_mut(..end) else { break };
                    self.core.uplink_packet(self.now, frame, meta, &mut self.io);
                    turn.frame(end);
                }
                ReadOutcome::Bad => {
                    self.io.counters.bad_frames += 1;
                    turn.frame(0);
                }
                ReadOutcome::Empty => break,
                ReadOutcome::Down(why) => {
                    self.io.tun = None;
                    self.warn(format!("the uplink ended: {why}"));
                    break;
                }
            }
        }
        self.count_batch(turn.frames);
    }

    // ---- uplink -------------------------------------------------------------------------------------

    fn on_sock(&mut self, ready: Ready) {
        let id = SockId(ready.token.index);
        let Some(sock) = self.io.socks.current(ready.token) else { return };
        let flow = sock.flow;
        match &mut sock.kind {
            SockKind::Tcp(tcp) if tcp.lingers => {
                if ready.has(libc::EPOLLOUT | HUNG_UP) {
                    self.io.socks.linger(&mut self.io.counters, id, ready.has(HUNG_UP));
                }
            }
            SockKind::Tcp(tcp) => {
                let Some(flow) = flow else { return };
                if tcp.via.is_some() {
                    return self.on_handshake(id, flow, ready);
                }
                if tcp.connecting {
                    if !ready.has(libc::EPOLLOUT | HUNG_UP) {
                        return;
                    }
                    tcp.connecting = false;
                    let error = if ready.has(HUNG_UP) { sys::take_error(&sock.fd) } else { 0 };
                    if std::mem::take(&mut tcp.traced) {
                        if error != 0 && self.drain_errors(ready.token) {
                            // The core hears of it with who said so.
                            return;
                        }
                        if let Some(sock) = self.io.socks.current(ready.token) {
                            trace(&sock.fd, libc::AF_INET, false);
                        }
                    }
                    let result = if error == 0 { Ok(()) } else { Err(sys::sock_error(error)) };
                    self.core.tcp_connected(self.now, flow, result, &mut self.io);
                    if error != 0 {
                        return;
                    }
                }
                self.on_tcp(flow, ready);
            }
            SockKind::Udp(_) | SockKind::Forward { .. } => self.on_udp(ready),
            SockKind::Ping { .. } => self.on_ping(id, ready),
        }
    }

    /// A connection through a proxy that is not open yet.
    fn on_handshake(&mut self, id: SockId, flow: FlowId, ready: Ready) {
        let (writable, hung_up) = (ready.has(libc::EPOLLOUT), ready.has(HUNG_UP));
        let Some(outcome) = self.io.socks.tcp_handshake(id, writable, hung_up) else { return };
        if let Some(Sock { kind: SockKind::Tcp(tcp), .. }) = self.io.socks.current(ready.token) {
            tcp.connecting = false;
        }
        if let Err(trouble) = outcome {
            self.io.proxy_failed(trouble);
        }
        self.core.tcp_connected(self.now, flow, outcome.map_err(Trouble::as_error), &mut self.io);
        if outcome.is_ok() {
            self.on_tcp(flow, ready);
        }
    }

    fn on_tcp(&mut self, flow: FlowId, ready: Ready) {
        let Some(Sock { kind: SockKind::Tcp(tcp), .. }) = self.io.socks.current(ready.token) else { return };
        tcp.ended |= ready.has(libc::EPOLLRDHUP) && !ready.has(libc::EPOLLERR);
        tcp.urgent |= ready.has(libc::EPOLLPRI);
        let mut room = ready.has(libc::EPOLLOUT) && std::mem::take(&mut tcp.wants_write);
        if room && !tcp.deferred && !tcp.waiting.is_empty() {
            // What the core has handed over goes first.
            room = match self.io.socks.send_waiting(SockId(ready.token.index)) {
                Ok(all) => all,
                Err(e) => {
                    self.io.socks.broke(SockId(ready.token.index), e);
                    return;
                }
            };
        }
        // Behind the end of the data, an error or urgent data nothing more is reported: the core reads until
        // there is nothing.
        if ready.has(HUNG_UP | libc::EPOLLRDHUP | libc::EPOLLPRI) {
            return self.core.tcp_ready(self.now, flow, true, true, &mut self.io);
        }
        if ready.has(libc::EPOLLIN) {
            self.core.tcp_ready(self.now, flow, true, false, &mut self.io);
        }
        if room {
            self.core.tcp_ready(self.now, flow, false, true, &mut self.io);
        }
    }

    fn on_udp(&mut self, ready: Ready) {
        if ready.has(HUNG_UP) {
            self.drain_errors(ready.token);
        }
        if !ready.has(libc::EPOLLIN) {
            return;
        }
        let mut turn = Turn::new(self.now);
        while turn.goes_on(RECEIVES) {
            turn.frame(0);
            let Some(sock) = self.io.socks.current(ready.token) else { return };
            self.io.counters.datagram_receives += 1;
            let n = match self.inbox.receive(&sock.fd) {
                Ok(n) => n,
                Err(e) if sys::would_block(e) => return,
                // The error of an earlier send, which is read here.
                Err(_) => {
                    self.drain_errors(ready.token);
                    continue;
                }
            };
            if n >= udp::BUSY {
                sock.enlarge();
            }
            self.io.counters.datagrams_received += n as u64;
            for i in 0..self.inbox.merge() {
                // The flow may have ended by what came before.
                let Some(Sock { flow, kind, .. }) = self.io.socks.current(ready.token) else { return };
                let Some((r, payload)) = self.inbox.message(i) else { break };
                match (kind, *flow) {
                    (SockKind::Forward { forward, origins, .. }, _) => {
                        let forward = *forward;
                        origins.note(r.from, r.local);
                        let sock = SockId(ready.token.index);
                        self.core.udp_forward_received(
                            self.now,
                            forward,
                            sock,
                            r.from,
                            payload,
                            r.segment,
                            &mut self.io,
                        );
                    }
                    (_, Some(flow)) => {
                        self.core.udp_received(self.now, flow, r.from, payload, r.segment, &mut self.io);
                    }
                    _ => {}
                }
            }
            if n < Inbox::BATCH {
                return;
            }
        }
    }

    /// Reads the error queue of a socket; true when something was in it.
    fn drain_errors(&mut self, token: Token) -> bool {
        let mut found = std::mem::take(&mut self.io.socks.errors);
        let before = found.len();
        if let Some(sock) = self.io.socks.current(token) {
            error_queue::drain(sock, &mut found);
        }
        let some = found.len() > before;
        self.io.socks.errors = found;
        some
    }

    fn on_ping(&mut self, id: SockId, ready: Ready) {
        if ready.has(HUNG_UP) {
            self.drain_errors(ready.token);
        }
        let mut turn = Turn::new(self.now);
        while turn.goes_on(self.batch_size) {
            turn.frame(0);
            let Some(Sock { fd, flow: Some(flow), kind: SockKind::Ping { raw, v6, .. } }) =
                self.io.socks.get(id)
            else {
                return;
            };
            let flow = *flow;
            match ping::receive(fd, *raw, *v6, &mut self.frame) {
                Ok(Some(r)) => {
                    let body = self.frame.get(r.start..r.end).unwrap_or(&[]);
                    self.core.ping_received(self.now, flow, r.from, r.seq, r.ttl, body, &mut self.io);
                }
                Ok(None) => {}
                Err(_) => return,
            }
            if self.io.socks.current(ready.token).is_none() {
                return;
            }
        }
    }

    fn on_forward(&mut self, token: Token) {
        let mut turn = Turn::new(self.now);
        while turn.goes_on(ACCEPTS) {
            turn.frame(0);
            if self.listening.generation(token.index) != token.generation {
                return;
            }
            let Some(Listening { fd, forward }) = self.listening.get(token.index) else { return };
            let forward = *forward;
            let (conn, peer) = match sys::accept(fd) {
                Ok((conn, from)) => match from.to_ip() {
                    Some(peer) => (conn, peer),
                    None => continue,
                },
                Err(e) if sys::exhausted(e) => {
                    self.io.counters.listener_pauses += 1;
                    return self.rest_forward(token);
                }
                Err(e) if sys::would_block(e) => return,
                // Somebody who left before he was let in.
                Err(_) => continue,
            };
            self.accept_forward(conn, peer, forward);
        }
    }

    fn accept_forward(&mut self, conn: OwnedFd, peer: SocketAddr, forward: guestnet_core::types::ForwardId) {
        let sock = match self.io.socks.tcp_accepted(&mut self.io.counters, conn) {
            Ok(sock) => sock,
            Err(conn) => {
                // The client hears of it at once, as from a host that cannot serve it.
                sys::set_abort(&conn);
                self.io.counters.connections_refused += 1;
                return;
            }
        };
        let flow = self.core.tcp_accepted(self.now, forward, sock, peer, &mut self.io);
        match flow {
            Some(flow) => {
                if let Err(e) = self.io.socks.tcp_adopt(&self.io.poller, sock, flow) {
                    // Never to be heard of again; the core is told as of a broken connection.
                    self.io.socks.outcomes.push((flow, Err(sys::sock_error(e))));
                }
            }
            None => self.io.close(sock, Close::Reset),
        }
    }

    fn rest_forward(&mut self, token: Token) {
        if let Some(l) = self.listening.get(token.index) {
            let _gone = self.io.poller.modify(&l.fd, token, 0);
            self.resting.put(self.now, token);
        }
    }

    /// Listeners that have rested.
    pub(crate) fn resume(&mut self) {
        for token in self.resting.take(self.now) {
            if token.kind == Kind::Listener {
                self.resume_listener(token);
            } else if self.listening.generation(token.index) == token.generation
                && let Some(l) = self.listening.get(token.index)
            {
                let _gone = self.io.poller.modify(&l.fd, token, libc::EPOLLIN);
            }
        }
    }
}
