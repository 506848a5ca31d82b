//! Theory of operation: guests that come by themselves. Each gets a port of its own with a number from
//! 0x8000_0000, made like the listener's template, and is told of before anything else of it happens. When
//! its peer goes, its port goes too. While the control side does not take events, no more guests are taken.

use crate::attachment::arrivals::{Arrivals, Listener, Pace};
use crate::attachment::dgram::Dgram;
use crate::attachment::port_set::{Attachment, Leaving, Port};
use crate::attachment::quota::{Charge, Quota, Resource};
use crate::attachment::stream::Stream;
use crate::attachment::unixgram::{PEERS_MAX, Sender, Unixgram};
use crate::attachment::vhost_user::{FrontEnds, VhostUser};
use crate::control::command::{AcceptedGuest, Command, CommandError, Encapsulation, ListenKind, Value};
use crate::control::event::{Event, Level};
use crate::os::epoll::{Kind, Token};
use crate::os::sys;
use crate::runtime::shard::Shard;
use crate::runtime::threads::turn::Turn;
use guestnet_core::NetworkError;
use guestnet_core::types::{FrameMeta, PortConfig, PortId};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Descriptors of a guest on a datagram listener at most: its own socket, and its place in the file system.
const DESCRIPTORS_OF_PEER: u64 = 2;
/// Ports of one worker, all together.
pub(crate) const PORTS_MAX: usize = 4096;
/// Connections taken before others have their turn.
const ACCEPTS: usize = 16;
/// How often it is looked for guests of a datagram listener that are gone, in nanoseconds, and up to how many guests
/// each time that one comes.
const LOOK_FOR_GONE: u64 = 100_000_000;
const FEW: usize = 16;
/// Flows of a port that are closed at once. A port that has more goes in steps, so that others do not wait.
pub(crate) const FLOWS_AT_ONCE: usize = 1024;
/// Flows of one step.
const STEP: usize = 16;

fn bad(message: &str) -> CommandError {
    CommandError::BadDescriptor(message.into())
}

impl Shard {
    /// The slots of a listener: its socket, and those that were left to guests.
    fn slots(&self, number: u32) -> Vec<u32> {
        self.listeners.iter().filter(|(_, l)| l.number == number).map(|(i, _)| i).collect()
    }

    pub(crate) fn listen(
        &mut self,
        number: u32,
        kind: ListenKind,
        fd: OwnedFd,
        template: PortConfig,
    ) -> Result<(), CommandError> {
        if !self.slots(number).is_empty() {
            return Err(NetworkError::NumberInUse(number).into());
        }
        let opt = |name| sys::get_opt(&fd, libc::SOL_SOCKET, name).map_err(|_| bad("it is not a socket"));
        let (kind_of, listening) = (opt(libc::SO_TYPE)?, opt(libc::SO_ACCEPTCONN)? != 0);
        let fits = match kind {
            ListenKind::Stream => kind_of != libc::SOCK_DGRAM && listening,
            ListenKind::Dgram | ListenKind::Unixgram => kind_of == libc::SOCK_DGRAM,
            ListenKind::VhostUser => kind_of == libc::SOCK_STREAM && listening,
        };
        if !fits {
            return Err(bad("the socket is not of the kind that was asked for, or does not listen"));
        }
        sys::adopt(&fd).map_err(|errno| CommandError::System { what: "the listener", errno })?;
        let kind = match kind {
            ListenKind::Stream if kind_of == libc::SOCK_SEQPACKET => {
                Arrivals::Connections { fd, encapsulation: Encapsulation::Packets }
            }
            ListenKind::Stream => Arrivals::Connections { fd, encapsulation: Encapsulation::Framed },
            ListenKind::VhostUser => Arrivals::Connections { fd, encapsulation: Encapsulation::VhostUser },
            ListenKind::Dgram => Arrivals::Datagrams(Unixgram::new(fd, false)),
            ListenKind::Unixgram => Arrivals::Datagrams(Unixgram::new(fd, true)),
        };
        let front_ends = FrontEnds::new(Quota::within(&self.io.quota));
        let pace = Pace::new(self.now);
        let slot = self.listeners.insert(Listener { number, template, kind, front_ends, pace });
        self.watch_listener(slot).map_err(|errno| {
            self.listeners.remove(slot);
            CommandError::System { what: "the listener cannot be watched", errno }
        })
    }

    fn watch_listener(&self, slot: u32) -> Result<(), i32> {
        let token = Token { kind: Kind::Listener, index: slot, generation: self.listeners.generation(slot) };
        self.listeners.get(slot).map_or(Ok(()), |l| self.io.poller.add(l.fd(), token, libc::EPOLLIN))
    }

    pub(crate) fn stop_listening(&mut self, number: u32) -> Result<(), CommandError> {
        let slots = self.slots(number);
        if slots.is_empty() {
            return Err(CommandError::NoSuchListener(number));
        }
        for slot in slots {
            if let Some(Listener { kind: Arrivals::Datagrams(u), .. }) = self.listeners.remove(slot) {
                for peer in u.peers.into_values() {
                    self.io.ports.leave(peer.port, "its listener was closed".into());
                }
            }
        }
        Ok(())
    }

    /// A listener is to be watched again.
    pub(crate) fn resume_listener(&mut self, token: Token) {
        if self.listeners.generation(token.index) == token.generation
            && let Some(l) = self.listeners.get(token.index)
        {
            let _gone = self.io.poller.modify(l.fd(), token, libc::EPOLLIN);
        }
    }

    fn rest_listener(&mut self, token: Token) {
        if let Some(l) = self.listeners.get(token.index) {
            // Watched for nothing, rather than reporting the same guest for ever.
            let _gone = self.io.poller.modify(l.fd(), token, 0);
            self.resting.put(self.now, token);
        }
    }

    pub(crate) fn on_listener(&mut self, token: Token) {
        if self.listeners.generation(token.index) != token.generation {
            return;
        }
        if self.io.is_behind() {
            return self.rest_listener(token);
        }
        match self.listeners.get(token.index).map(|l| &l.kind) {
            Some(Arrivals::Connections { .. }) => self.accept_guests(token),
            Some(Arrivals::Datagrams(_)) => self.datagrams_of_guests(token),
            None => {}
        }
    }

    fn accept_guests(&mut self, token: Token) {
        let mut turn = Turn::new(self.now);
        while turn.goes_on(ACCEPTS) {
            turn.frame(0);
            let now = self.now;
            let Some(Listener { kind: Arrivals::Connections { fd, encapsulation }, pace, .. }) =
                self.listeners.get_mut(token.index)
            else {
                return;
            };
            if !pace.allows(now) {
                // They wait in the listener's queue.
                self.io.counters.listener_pauses += 1;
                return self.rest_listener(token);
            }
            let (conn, from) = match sys::accept(fd) {
                Ok(c) => c,
                Err(e) if sys::exhausted(e) => {
                    self.io.counters.listener_pauses += 1;
                    self.warn(format!("no guest can be taken: {}", sys::errno_text(e)));
                    return self.rest_listener(token);
                }
                // Nobody there, or somebody who left again; a listener that is broken says so by nothing.
                Err(_) => return,
            };
            let encapsulation = *encapsulation;
            let peer = from.to_path().map_or(String::new(), |p| String::from_utf8_lossy(&p).into_owned());
            let Some(l) = self.listeners.get(token.index) else { return };
            let mut held = Charge::new(&l.front_ends.quota, Resource::Descriptors);
            if let Err(e) = held.set(1) {
                self.io.counters.guests_refused += 1;
                self.warn(format!("a guest was refused: {e}"));
                continue;
            }
            let (template, front_ends) = (l.template.clone(), Arc::clone(&l.front_ends));
            let new =
                AcceptedGuest { listener: l.number, conn, encapsulation, template, peer, held, front_ends };
            match self.io.links.as_ref().map(|p| (p.choose(), p.me())) {
                Some((to, me)) if to != me => self.hand_over(to, new),
                _ => self.adopt(new),
            }
        }
    }

    /// Gives a guest that has come to another worker.
    fn hand_over(&mut self, to: usize, new: AcceptedGuest) {
        let Some(p) = &self.io.links else { return };
        if !p.command(to, Command::Adopt(Box::new(new))) {
            p.unload(to);
            self.io.counters.guests_refused += 1;
            self.warn("a guest was refused: the worker that it is for takes no more commands".into());
        }
    }

    /// Attaches a guest that has come, here or to another worker. It is counted already as one of ours.
    pub(crate) fn adopt(&mut self, new: AcceptedGuest) {
        let attachment = match new.encapsulation {
            Encapsulation::Framed => Stream::new(new.conn).map(Attachment::Stream),
            Encapsulation::Packets => Dgram::new(new.conn).map(Attachment::Dgram),
            Encapsulation::VhostUser => {
                VhostUser::new(new.conn, new.front_ends).map(|v| Attachment::VhostUser(Box::new(v)))
            }
        };
        let port = match attachment {
            Ok(a) => self.welcome(new.listener, new.template, a, true, Some(new.held), new.peer),
            Err(why) => {
                self.io.counters.guests_refused += 1;
                self.warn(format!("a guest was refused: {why}"));
                None
            }
        };
        match port {
            Some(port) => self.isolate_if_stalled(port),
            None => self.guest_left(),
        }
    }

    /// There is one guest less, which counts where the next one is placed.
    pub(crate) fn guest_left(&self) {
        if let Some(p) = &self.io.links {
            p.unload(p.me());
        }
    }

    /// Makes a port of a guest that has come. `watch`: it has a descriptor of its own that tells when there is
    /// something to do; `held`: what it holds of its listener's share.
    fn welcome(
        &mut self,
        number: u32,
        config: PortConfig,
        a: Attachment,
        watch: bool,
        held: Option<Charge>,
        peer: String,
    ) -> Option<PortId> {
        if self.io.ports.len() >= PORTS_MAX {
            self.io.counters.guests_refused += 1;
            return None;
        }
        let port = PortId(self.next_port);
        let (first, last) = self.port_range;
        self.next_port = if port.0 < last { port.0 + 1 } else { first };
        let at = self.io.ports.add(port, Some(number));
        if let Some(p) = self.io.ports.get_mut(at) {
            p.held = held;
        }
        if let Err(e) = self.io.ports.attach(&self.io.poller, at, a, watch) {
            self.io.ports.remove(port);
            self.io.counters.guests_refused += 1;
            self.warn(crate::attachment::reason("a guest was refused", e));
            return None;
        }
        if let Err(e) = self.core.add_port(port, config) {
            self.io.ports.remove(port);
            self.io.counters.guests_refused += 1;
            self.warn(format!("a guest was refused: {}", NetworkError::AddressInUse(e.0)));
            return None;
        }
        self.io.events.send_reliable(Event::PortUp { port, listener: number, peer });
        Some(port)
    }

    fn datagrams_of_guests(&mut self, token: Token) {
        let mut turn = Turn::new(self.now);
        while turn.goes_on(self.batch_size) {
            let now = self.now;
            let Some(Listener { number, kind: Arrivals::Datagrams(u), pace, .. }) =
                self.listeners.get_mut(token.index)
            else {
                return;
            };
            let number = *number;
            match u.read(now, &mut self.frame) {
                Sender::Known(port, n) => {
                    self.frame_in(port, 0..n, FrameMeta::default());
                    turn.frame(n);
                }
                Sender::New { .. } if !pace.allows(now) => {
                    self.io.counters.guests_refused += 1;
                    turn.frame(0);
                }
                Sender::New { path, user, frame, old } => {
                    turn.frame(frame.unwrap_or(0));
                    // The guest may have come to a socket that was here before.
                    let again = old.is_some();
                    let old = old.or_else(|| self.peer_elsewhere(number, &path));
                    let port = match (old, frame) {
                        (Some(port), Some(_)) if !again => Some(port),
                        (Some(_), None) if !self.may_restart(token.index) => {
                            self.io.counters.guests_refused += 1;
                            None
                        }
                        (old, _) => {
                            // The socket may have been left to the old one, and is the new one's now.
                            self.listener_in_use = Some(token.index);
                            if let Some(old) = old {
                                self.end_port(old, "the guest started again".into());
                            }
                            let new = self.welcome_peer(token.index, &path, user);
                            self.listener_in_use = None;
                            new
                        }
                    };
                    if let (Some(port), Some(n)) = (port, frame) {
                        self.frame_in(port, 0..n, FrameMeta::default());
                    }
                }
                Sender::Refused => {
                    self.io.counters.guests_refused += 1;
                    turn.frame(0);
                }
                Sender::Empty => break,
                Sender::Broken(e) => {
                    self.warn(crate::attachment::reason("a listener broke", e));
                    return self.rest_listener(token);
                }
            }
        }
        self.count_batch(turn.frames);
    }

    fn may_restart(&mut self, slot: u32) -> bool {
        let now = self.now;
        match self.listeners.get_mut(slot).map(|l| &mut l.kind) {
            Some(Arrivals::Datagrams(u)) => u.may_restart(now),
            _ => false,
        }
    }

    fn peer_elsewhere(&self, number: u32, path: &[u8]) -> Option<PortId> {
        self.slots(number).into_iter().find_map(|slot| match &self.listeners.get(slot)?.kind {
            Arrivals::Datagrams(u) => u.peers.get(path).map(|p| p.port),
            Arrivals::Connections { .. } => None,
        })
    }

    fn welcome_peer(&mut self, slot: u32, path: &[u8], user: Option<u32>) -> Option<PortId> {
        let now = self.now;
        let number = self.listeners.get(slot)?.number;
        let sockets: Vec<u32> = self.slots(number);
        let of = |at: &u32| match &self.listeners.get(*at)?.kind {
            Arrivals::Datagrams(u) => Some(u),
            Arrivals::Connections { .. } => None,
        };
        let count: usize = sockets.iter().filter_map(of).map(|u| u.peers.len()).sum();
        // Nothing else tells that a guest to which nothing is sent has gone. With many guests it costs time.
        let looked = self.listeners.get(slot)?.pace.looked_for_gone;
        let mut gone = Vec::new();
        if count <= FEW || now.since(looked) >= LOOK_FOR_GONE {
            gone.extend(sockets.iter().filter_map(of).flat_map(Unixgram::gone));
            self.listeners.get_mut(slot)?.pace.looked_for_gone = now;
        }
        let left = count - gone.len();
        for port in gone {
            self.end_port(port, "the guest's socket is gone".into());
        }
        if left >= PEERS_MAX {
            self.io.counters.guests_refused += 1;
            return None;
        }
        let l = self.listeners.get(slot)?;
        let mut held = Charge::new(&l.front_ends.quota, Resource::Descriptors);
        if let Err(e) = held.set(DESCRIPTORS_OF_PEER) {
            self.io.counters.guests_refused += 1;
            self.warn(format!("a guest was refused: {e}"));
            return None;
        }
        let arrival = match &l.kind {
            Arrivals::Datagrams(u) => u.attach(path, user),
            Arrivals::Connections { .. } => return None,
        };
        let arrival = match arrival {
            Ok(arrival) => arrival,
            Err(why) => {
                self.io.counters.guests_refused += 1;
                self.warn(format!("a guest was refused: {why}"));
                return None;
            }
        };
        let how = arrival.how;
        let name = String::from_utf8_lossy(path).into_owned();
        let template = self.listeners.get(slot)?.template.clone();
        // A socket of its own tells when it takes more.
        let attachment = Attachment::Dgram(arrival.dgram);
        let port = self.welcome(number, template, attachment, !how.connected, Some(held), name)?;
        if let Some(p) = &self.io.links {
            p.load(p.me());
        }
        if let Some(Listener { kind: Arrivals::Datagrams(u), .. }) = self.listeners.get_mut(slot) {
            u.arrived(now, path, port, how);
        }
        if how.connected {
            self.replace_socket(slot, port);
        }
        Some(port)
    }

    /// Leaves the socket to the guest that came to it, where a new one can take its place.
    fn replace_socket(&mut self, slot: u32, port: PortId) {
        let Some(Listener { number, template, kind: Arrivals::Datagrams(u), front_ends, pace }) =
            self.listeners.get_mut(slot)
        else {
            return;
        };
        let Some(mut next) = u.replace() else { return };
        u.owner = Some(port);
        u.hand_on(&mut next);
        let kind = Arrivals::Datagrams(next);
        let next = Listener {
            number: *number,
            template: template.clone(),
            kind,
            front_ends: Arc::clone(front_ends),
            pace: *pace,
        };
        let next = self.listeners.insert(next);
        if let Err(e) = self.watch_listener(next) {
            self.warn(crate::attachment::reason("no more guests can be taken", e));
        }
    }

    /// A socket that several guests share takes nothing for long: one of them does not read, and it cannot be
    /// said which. It is left to the one that came first.
    pub(crate) fn socket_stalled(&mut self, port: PortId) {
        let Some(slot) = self.io.ports.slot(port) else { return };
        let Some(number) = self.io.ports.get_mut(slot).and_then(|p| p.listener) else { return };
        let left = self.slots(number).into_iter().find_map(|at| match self.listeners.get_mut(at) {
            Some(Listener { kind: Arrivals::Datagrams(u), .. })
                if u.peers.values().any(|p| p.port == port) =>
            {
                u.leave_to()
            }
            _ => None,
        });
        let Some((owner, others)) = left else { return };
        for other in others {
            self.forget_peer(number, other);
            let why = "it shares its socket with a guest that came in the same moment, and one of them does not read: \
                       start it again";
            self.io.ports.leave(other, why.into());
        }
        if let Some(slot) = self.io.ports.slot(owner)
            && let Some(Port { attachment: Attachment::Dgram(d), .. }) = self.io.ports.get_mut(slot)
        {
            d.take_socket();
        }
    }

    /// Ends a port before another one takes its place, at once unless it has many flows.
    fn end_port(&mut self, port: PortId, reason: String) {
        let Some(slot) = self.io.ports.slot(port) else { return };
        if let Some(number) = self.io.ports.get_mut(slot).and_then(|p| p.listener) {
            self.forget_peer(number, port);
        }
        if self.core.close_flows_of(self.now, port, FLOWS_AT_ONCE, &mut self.io) {
            self.io.ports.leave(port, reason);
        } else if self.io.ports.begin_leaving(slot) {
            self.remove_gone(port, Leaving::PeerGone(reason));
        }
    }

    /// A port goes. Ports of listeners, and those that the control side removes, go with all that they have, a
    /// step at a time; others whose peer is gone are left without attachment.
    pub(crate) fn remove_gone(&mut self, port: PortId, mut why: Leaving) {
        let Some(slot) = self.io.ports.slot(port) else {
            if let Leaving::Removed(sequence) = why {
                let result = Err(NetworkError::NoSuchPort(port).into());
                self.io.events.send_reliable(Event::Done { sequence, result });
            }
            return;
        };
        if let Leaving::PeerGone(reason) = &mut why {
            if let Some(known) = self.io.ports.end_isolation(&mut self.io.counters, slot) {
                *reason = known;
            }
            if self.wait_for_front_end(slot, reason) {
                return self.io.ports.stays(slot);
            }
        }
        let listener = self.io.ports.get_mut(slot).and_then(|p| p.listener);
        if listener.is_some() || matches!(why, Leaving::Removed(_)) {
            if self.core.close_flows_of(self.now, port, STEP, &mut self.io) {
                return self.io.ports.down.push_back((port, why));
            }
            self.core.remove_port(self.now, port, &mut self.io);
            self.io.ports.remove(port);
            if let Some(number) = listener {
                self.forget_peer(number, port);
            }
            self.guest_left();
        } else {
            // Another attachment may be there by now.
            self.io.ports.unplug_front_end(slot);
            self.io.ports.stays(slot);
        }
        match why {
            Leaving::PeerGone(reason) => self.io.events.send_reliable(Event::PortDown { port, reason }),
            Leaving::Removed(sequence) => {
                self.io.events.send_reliable(Event::Done { sequence, result: Ok(Value::None) });
            }
        }
    }

    /// A port of a listener is gone, and a socket that was left to it with it.
    pub(crate) fn forget_peer(&mut self, number: u32, port: PortId) {
        for slot in self.slots(number) {
            if let Some(Listener { kind: Arrivals::Datagrams(u), .. }) = self.listeners.get_mut(slot) {
                u.peers.retain(|_, p| p.port != port);
                if u.owner.is_some() && u.peers.is_empty() && self.listener_in_use != Some(slot) {
                    self.listeners.remove(slot);
                }
            }
        }
    }

    pub(crate) fn warn(&mut self, message: String) {
        self.io.events.try_send(Event::Log { level: Level::Warning, message });
    }
}
