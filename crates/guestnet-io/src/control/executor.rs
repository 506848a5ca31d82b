//! Theory of operation: what the commands of the control side do. A command either does all it says or
//! changes nothing and says why; either way it is acknowledged.

use crate::attachment::dgram::Dgram;
use crate::attachment::listener::{FLOWS_AT_ONCE, PORTS_MAX};
use crate::attachment::port_set::{Attachment, Leaving};
use crate::attachment::quota::Quota;
use crate::attachment::reason;
use crate::attachment::stream::Stream;
use crate::attachment::tap::Tap;
use crate::attachment::vhost_user::{FrontEnds, VhostUser};
use crate::control::capture::{Capture, Capturing};
use crate::control::command::{Command, CommandError, Value, WorkerCommand};
use crate::control::event::Event;
use crate::os::epoll::{Kind, Token};
use crate::os::sockaddr::RawAddr;
use crate::os::sys;
use crate::runtime::config::FIRST_DYNAMIC;
use crate::runtime::shard::Shard;
use crate::uplink::forward::{ForwardParts, Listening, Origins};
use crate::uplink::sockets::{Sock, SockKind};
use crate::uplink::tun::Tun;
use crate::uplink::{options, tcp};
use guestnet_core::NetworkError;
use guestnet_core::command::Outcome;
use guestnet_core::config::ForwardSpec;
use guestnet_core::nat::NatEngineConfig;
use guestnet_core::types::{ForwardId, FrameMeta, PortId, ServiceId};
use guestnet_wire::proto;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// Commands done before the network has its turn.
const BATCH: usize = 64;

impl Shard {
    /// Does what waits in the queue.
    pub(crate) fn commands(&mut self) {
        for _ in 0..BATCH {
            // Acknowledgements may not be lost, so nothing is done that could not be acknowledged. The
            // consumer wakes us when it has made room.
            if self.io.is_behind() {
                return;
            }
            let Ok((sequence, command)) = self.queue.pop() else {
                self.commands_waiting = false;
                return;
            };
            self.io.counters.commands += 1;
            let result = match *command {
                Command::Worker(WorkerCommand::StopCapture) if self.stop_capture(sequence) => continue,
                Command::RemovePort { port } if self.remove_in_steps(sequence, port) => continue,
                Command::Network(command) => match self.core.execute(self.now, command, &mut self.io) {
                    Ok(Outcome::JudgingFlows) => {
                        self.policy_changes.push(sequence);
                        continue;
                    }
                    Ok(Outcome::Done(value)) => Ok(value),
                    Err(e) => Err(e.into()),
                },
                Command::Worker(command) => self.worker_command(command).map(|()| Value::None),
                command => self.command(command).map(|()| Value::None),
            };
            self.io.events.send_reliable(Event::Done { sequence, result });
        }
    }

    /// Does what waits in the queue as long as it can be acknowledged: frames that have come are to find it done.
    pub(crate) fn urgent_commands(&mut self) {
        // Those that come meanwhile are for the next time.
        let waiting = self.queue.slots();
        for _ in 0..waiting.div_ceil(BATCH) {
            self.commands();
        }
        if self.io.is_behind() {
            self.waker.mark_urgent();
        }
    }

    fn command(&mut self, command: Command) -> Result<(), CommandError> {
        match command {
            Command::AddPort { port, config } => {
                if self.io.ports.slot(port).is_some() {
                    return Err(CommandError::PortExists(port));
                }
                if port.0 >= FIRST_DYNAMIC || self.io.ports.len() >= PORTS_MAX {
                    return Err(NetworkError::NumberInUse(port.0).into());
                }
                self.core.add_port(port, config).map_err(|e| NetworkError::AddressInUse(e.0))?;
                self.io.ports.add(port, None);
            }
            Command::RemovePort { port } => {
                self.port(port)?;
                self.core.remove_port(self.now, port, &mut self.io);
                if let Some(number) = self.io.ports.remove(port).and_then(|p| p.listener) {
                    self.forget_peer(number, port);
                }
                self.guest_left();
            }
            Command::AttachTap { port, fd } => self.attach(port, || Tap::new(fd).map(Attachment::Tap))?,
            Command::AttachStream { port, fd } => {
                self.attach(port, || Stream::new(fd).map(Attachment::Stream))?;
            }
            Command::AttachDgram { port, fd } => {
                self.attach(port, || Dgram::new(fd).map(Attachment::Dgram))?;
            }
            Command::AttachVhostUser { port, fd } => {
                let front_ends = FrontEnds::new(Quota::within(&self.io.quota));
                self.attach(port, || {
                    VhostUser::new(fd, front_ends).map(|v| Attachment::VhostUser(Box::new(v)))
                })?;
            }
            Command::AttachMemory { port } => self.attach(port, || Ok(Attachment::Memory))?,
            Command::Listen { listener, kind, fd, template } => {
                self.listen(listener, kind, fd, template)?;
            }
            Command::StopListening { listener } => self.stop_listening(listener)?,
            Command::AddForward { forward, proto, guest, entry, fds } => {
                self.add_forward(forward, ForwardSpec { proto, guest, entry }, fds)?;
            }
            Command::AttachTun { fd, config } => self.attach_tun(fd, *config)?,
            Command::RemoveForward { forward } if self.core.remove_uplink_forward(forward) => {}
            Command::RemoveForward { forward } => self.remove_forward(forward),
            Command::Inject { port, mut frame } => {
                self.port(port)?;
                self.io.capture_in(port, &frame);
                self.core.frame(self.now, port, &mut frame, FrameMeta::default(), &mut self.io);
            }
            Command::StartCapture { fd, snaplen } => {
                let capture =
                    Capture::start(fd, snaplen, self.now, self.io.port_names.clone()).map_err(|e| {
                        let errno = e.raw_os_error().unwrap_or(0);
                        CommandError::System { what: "the capture cannot start", errno }
                    })?;
                if let Some(old) = self.io.capture.replace(Capturing::Own(Box::new(capture))) {
                    self.end_capture(old, None);
                }
            }
            Command::Adopt(newcomer) => self.adopt(*newcomer),
            #[cfg(test)]
            Command::Panic => {
                // As a panic in the middle of a read does, which has the buffer.
                self.stream_buffer = Vec::new();
                panic!("as it was told");
            }
            // Done before this is called.
            Command::Network(_) | Command::Worker(_) => {}
        }
        Ok(())
    }

    fn worker_command(&mut self, command: WorkerCommand) -> Result<(), CommandError> {
        match command {
            WorkerCommand::AddService { service, proto, address, port, unix_path } => {
                self.add_service(service, proto, address, port, unix_path)?;
            }
            WorkerCommand::ShareCapture(shared) => {
                let first = self.io.links.as_ref().is_none_or(|p| p.me() == 0);
                if let Some(old) = self.io.capture.replace(Capturing::Shared(shared, first)) {
                    self.end_capture(old, None);
                }
            }
            // There is none.
            WorkerCommand::StopCapture => {}
            WorkerCommand::EnableFlowEvents { flows, denials } => {
                (self.io.flow_events, self.io.denial_events) = (flows, denials);
            }
            WorkerCommand::Stop => self.stopping = true,
        }
        Ok(())
    }

    /// Begins to remove a port that has many flows; acknowledged when it is done. False: it has few.
    fn remove_in_steps(&mut self, sequence: u64, port: PortId) -> bool {
        let Some(slot) = self.io.ports.slot(port) else { return false };
        if !self.core.close_flows_of(self.now, port, FLOWS_AT_ONCE, &mut self.io) {
            return false;
        }
        self.io.ports.begin_leaving(slot);
        self.io.ports.down.push_back((port, Leaving::Removed(sequence)));
        true
    }

    /// Ends the capture; acknowledged when all is written. False: there is none.
    fn stop_capture(&mut self, sequence: u64) -> bool {
        let Some(capture) = self.io.capture.take() else { return false };
        self.end_capture(capture, Some(sequence));
        true
    }

    pub(crate) fn end_capture(&mut self, capture: Capturing, sequence: Option<u64>) {
        match (capture.finish(), sequence) {
            (Some((closing, dropped)), sequence) => {
                self.io.counters.capture_dropped += dropped;
                self.closing.push((closing, sequence));
            }
            // Other workers still have it; the last one finishes it.
            (None, Some(sequence)) => {
                self.io.events.send_reliable(Event::Done { sequence, result: Ok(Value::None) });
            }
            (None, None) => {}
        }
    }

    fn port(&self, port: PortId) -> Result<u32, CommandError> {
        self.io.ports.slot(port).ok_or(NetworkError::NoSuchPort(port).into())
    }

    fn attach(
        &mut self,
        port: PortId,
        make: impl FnOnce() -> Result<Attachment, String>,
    ) -> Result<(), CommandError> {
        let slot = self.port(port)?;
        let free = self.io.ports.get_mut(slot).is_some_and(|p| matches!(p.attachment, Attachment::None));
        if !free {
            return Err(CommandError::Attached(port));
        }
        let a = make().map_err(CommandError::BadDescriptor)?;
        self.io
            .ports
            .attach(&self.io.poller, slot, a, true)
            .map_err(|e| CommandError::BadDescriptor(reason("the descriptor cannot be watched", e)))
    }

    fn attach_tun(&mut self, fd: OwnedFd, config: NatEngineConfig) -> Result<(), CommandError> {
        // The translator has one table, which is one worker's.
        if self.io.links.is_some() {
            return Err(CommandError::OneWorker);
        }
        if self.io.tun.is_some() {
            return Err(CommandError::HasUplink);
        }
        let tun = Tun::new(fd).map_err(CommandError::BadDescriptor)?;
        let token = Token { kind: Kind::Tun, index: 0, generation: 0 };
        self.io
            .poller
            .add(&tun.fd, token, libc::EPOLLIN)
            .map_err(|e| CommandError::BadDescriptor(reason("the TUN device cannot be watched", e)))?;
        // The network has an uplink only once the device is watched.
        if let Err(e) = self.core.set_uplink(config) {
            self.io.poller.remove(&tun.fd);
            return Err(NetworkError::from(e).into());
        }
        self.io.tun = Some(tun);
        Ok(())
    }

    fn add_service(
        &mut self,
        service: ServiceId,
        proto: u8,
        address: IpAddr,
        port: u16,
        unix_path: Option<PathBuf>,
    ) -> Result<(), CommandError> {
        match (proto, unix_path) {
            (proto::TCP, Some(path)) => {
                let addr = RawAddr::unix(path.as_os_str().as_bytes()).ok_or(CommandError::BadPath(path))?;
                self.io.socks.services.insert(service.0, addr);
            }
            (proto::TCP, None) => self.io.socks.local.add_service(service),
            (_, None) => {}
            (_, Some(_)) => {
                return Err(CommandError::BadDescriptor("only a TCP service has a path".into()));
            }
        }
        self.core.add_service(service, proto, address, port);
        Ok(())
    }

    fn add_forward(
        &mut self,
        id: ForwardId,
        spec: ForwardSpec,
        fds: Vec<OwnedFd>,
    ) -> Result<(), CommandError> {
        self.core.check_forward_number(id)?;
        let proto = spec.proto;
        let want = match proto {
            proto::TCP => libc::SOCK_STREAM,
            proto::UDP => libc::SOCK_DGRAM,
            _ => return Err(CommandError::BadDescriptor("only TCP and UDP ports can be published".into())),
        };
        for fd in &fds {
            let kind = sys::get_opt(fd, libc::SOL_SOCKET, libc::SO_TYPE);
            let listens = sys::get_opt(fd, libc::SOL_SOCKET, libc::SO_ACCEPTCONN);
            if kind != Ok(want) || listens != Ok(i32::from(want == libc::SOCK_STREAM)) {
                return Err(CommandError::BadDescriptor(
                    "a published port needs listening TCP sockets, or bound UDP sockets".into(),
                ));
            }
            sys::adopt(fd).map_err(|errno| CommandError::System { what: "a published port", errno })?;
        }
        self.forwards.insert(id.0, ForwardParts::default());
        for fd in fds {
            let watched =
                if proto == proto::TCP { self.publish_tcp(id, fd) } else { self.publish_udp(id, fd) };
            if let Err(errno) = watched {
                self.remove_forward(id);
                return Err(CommandError::System { what: "a published port cannot be watched", errno });
            }
        }
        self.core.add_forward(id, spec);
        Ok(())
    }

    fn publish_tcp(&mut self, forward: ForwardId, fd: OwnedFd) -> Result<(), i32> {
        tcp::prepare_listener(&fd);
        let slot = self.listening.insert(Listening { fd, forward });
        if let Some(parts) = self.forwards.get_mut(&forward.0) {
            parts.listening.push(slot);
        }
        let token = Token { kind: Kind::Forward, index: slot, generation: self.listening.generation(slot) };
        self.listening.get(slot).map_or(Ok(()), |l| self.io.poller.add(&l.fd, token, libc::EPOLLIN))
    }

    fn publish_udp(&mut self, forward: ForwardId, fd: OwnedFd) -> Result<(), i32> {
        options::set_gro(&fd);
        let origins = Origins::new(&fd);
        let sock = Sock { fd, flow: None, kind: SockKind::Forward { forward, origins, enlarged: false } };
        let id = self.io.socks.add(&self.io.poller, &mut self.io.counters, sock, libc::EPOLLIN)?;
        if let Some(parts) = self.forwards.get_mut(&forward.0) {
            parts.socks.push(id);
        }
        Ok(())
    }

    fn remove_forward(&mut self, id: ForwardId) {
        self.core.remove_forward(self.now, id, &mut self.io);
        let Some(parts) = self.forwards.remove(&id.0) else { return };
        // Others may have the same sockets, so closing ours alone would not end the watching.
        for slot in parts.listening {
            if let Some(l) = self.listening.remove(slot) {
                self.io.poller.remove(&l.fd);
            }
        }
        self.io.socks.udp_flush(&mut self.io.counters);
        for sock in parts.socks {
            if let Some(s) = self.io.socks.remove(&mut self.io.counters, sock) {
                self.io.poller.remove(&s.fd);
            }
        }
    }
}
