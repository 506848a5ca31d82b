//! Theory of operation: what vhost-user attachments are woken for: a front-end that speaks, comes or goes, and
//! a guest that kicks a queue. Frames from a queue are taken a batch at a time; one that has more is looked
//! at again in the next round. A queue that was emptied is looked at for as long as the worker is awake, so that
//! a busy guest need not kick at all; before the worker sleeps the guest is asked to.

use crate::attachment::ReadOutcome;
use crate::attachment::port_set::{Attachment, Port};
use crate::attachment::vhost_user::{self, LONG_ROUND, VhostUser};
use crate::os::epoll::{Kind, Ready, Token};
use crate::os::sys;
use crate::runtime::shard::Shard;
use guestnet_core::types::PortId;

impl Shard {
    fn vhost(&mut self, slot: u32) -> Option<&mut VhostUser> {
        match self.io.ports.get_mut(slot) {
            Some(Port { attachment: Attachment::VhostUser(v), .. }) => Some(v),
            _ => None,
        }
    }

    /// The socket of a front-end, or the one where it is waited for, is ready.
    pub(crate) fn on_front_end(&mut self, ready: Ready, id: PortId) {
        let Token { index: slot, generation, .. } = ready.token;
        let Some(v) = self.vhost(slot) else { return };
        if !v.is_connected() {
            if v.accept() {
                self.watch_front_end(ready.token, id);
            }
            return;
        }
        let poller = &self.io.poller;
        let Some(Port { attachment: Attachment::VhostUser(v), .. }) = self.io.ports.get_mut(slot) else {
            return;
        };
        match v.control(poller, slot, generation) {
            Ok(changes) => {
                if changes.writable {
                    self.io.ports.room_again(slot);
                }
                for queue in changes.started {
                    let token = self.io.ports.queue_token(slot, queue);
                    self.io.ports.look_again(token, false);
                }
                if let Some(why) = changes.refused {
                    self.warn(format!("a request of a vhost-user front-end was refused: {why}"));
                }
                self.report_fault(slot, id);
            }
            Err(why) => self.io.ports.leave(id, why),
        }
    }

    /// A front-end has come to the socket where it was waited for.
    fn watch_front_end(&mut self, token: Token, id: PortId) {
        let poller = &self.io.poller;
        let Some(Port { attachment: Attachment::VhostUser(v), .. }) = self.io.ports.get_mut(token.index)
        else {
            return;
        };
        // Nobody else is let in meanwhile.
        let watched = match (v.fd(), &v.listener) {
            (Some(fd), Some(listener)) => {
                poller.add(fd, token, libc::EPOLLIN).and_then(|()| poller.modify(listener, token, 0))
            }
            _ => Ok(()),
        };
        if let Err(e) = watched {
            let why = crate::attachment::reason("the front-end cannot be watched", e);
            self.io.ports.leave(id, why);
        }
        self.isolate_if_stalled(id);
    }

    /// A front-end has come. Where others from there made a worker wait, it has a thread of its own from the first.
    pub(crate) fn isolate_if_stalled(&mut self, port: PortId) {
        let Some(slot) = self.io.ports.slot(port) else { return };
        if self.vhost(slot).is_some_and(|v| v.is_stalled()) {
            self.isolate(slot, port);
        }
    }

    fn isolate(&mut self, slot: u32, port: PortId) {
        match self.io.ports.isolate(&self.io.poller, slot) {
            Ok(()) => {
                self.io.counters.front_ends_isolated += 1;
                self.warn(
                    "a vhost-user front-end makes the network wait for its guest's memory; it has a thread \
                           of its own from now on"
                        .into(),
                );
            }
            Err(why) => self.io.ports.leave(port, why),
        }
    }

    /// The worker is about to wait: front-ends that made it wait before leave it. They are looked for only after a
    /// round that took long and in which it slept.
    pub(crate) fn look_for_stalls(&mut self) {
        if !self.io.ports.had_front_ends {
            return;
        }
        let now = sys::now();
        let took = now.since(self.looked_at);
        if took >= LONG_ROUND && vhost_user::has_slept() {
            let until = vhost_user::after_long_round(now, took, self.io.ports.touched());
            self.suspicious_until = self.suspicious_until.max(until);
        }
        self.looked_at = now;
        if self.suspicious_until.is_some() {
            for (slot, port) in self.io.ports.stalled() {
                self.isolate(slot, port);
            }
            self.suspicious_until = self.suspicious_until.filter(|t| now <= *t);
        }
    }

    /// What the threads of front-ends have to tell.
    pub(crate) fn hear_isolated(&mut self) {
        let counters = &mut self.io.counters;
        let mut warnings = Vec::new();
        for isolated in self.io.ports.isolated() {
            counters.add_isolated(isolated.counts());
            warnings.extend(isolated.warning());
        }
        for warning in warnings {
            self.warn(warning);
        }
    }

    /// The front-end of a port is gone. True when it may come again to the same port.
    pub(crate) fn wait_for_front_end(&mut self, slot: u32, reason: &str) -> bool {
        let token = Token { kind: Kind::Port, ..self.io.ports.queue_token(slot, 0) };
        let token = Token { index: slot, ..token };
        let poller = &self.io.poller;
        let Some(Port { attachment: Attachment::VhostUser(v), .. }) = self.io.ports.get_mut(slot) else {
            return false;
        };
        let Some(listener) = v.listener.as_ref() else { return false };
        if poller.modify(listener, token, libc::EPOLLIN).is_err() {
            return false;
        }
        v.hang_up();
        self.io.ports.room_again(slot);
        self.warn(format!("a vhost-user front-end left, and may come again: {reason}"));
        true
    }

    /// A queue or a stream has more than its turn.
    pub(crate) fn on_again(&mut self, token: Token) {
        match token.kind {
            Kind::Kick => self.on_kick(token),
            Kind::Port if self.io.ports.is_current(token) => {
                if let Some(Port { id, attachment: Attachment::Stream(_), .. }) =
                    self.io.ports.get_mut(token.index)
                {
                    let id = *id;
                    self.stream_ready(token.index, id);
                }
            }
            _ => {}
        }
    }

    /// A queue was kicked, or has more than a batch.
    pub(crate) fn on_kick(&mut self, token: Token) {
        let Some((slot, queue)) = self.io.ports.queue(token) else { return };
        let Some(port) = self.io.ports.get_mut(slot).filter(|p| !p.is_leaving()) else { return };
        let id = port.id;
        let Attachment::VhostUser(v) = &mut port.attachment else { return };
        if queue.is_multiple_of(2) {
            v.spare_kicks(queue);
            return self.io.ports.room_again(slot);
        }
        let mut turn = self.io.ports.begin_turn(slot, self.now);
        let before = turn.frames;
        if !turn.goes_on(self.batch_size) {
            // Other queues of the guest have had its turn.
            self.io.ports.end_turn(slot, turn);
            return self.io.ports.look_again(token, true);
        }
        while turn.goes_on(self.batch_size) {
            let Some(Port { attachment: Attachment::VhostUser(v), .. }) = self.io.ports.get_mut(slot) else {
                return;
            };
            match v.read(queue, &mut self.frame) {
                ReadOutcome::Frame((from, to, meta)) => {
                    self.frame_in(id, from..to, meta);
                    turn.frame(to - from);
                }
                ReadOutcome::Bad => {
                    self.io.counters.bad_frames += 1;
                    turn.frame(0);
                }
                ReadOutcome::Empty => break,
                ReadOutcome::Down(why) => return self.io.ports.leave(id, why),
            }
        }
        turn.pause();
        self.count_batch(turn.frames - before);
        let more = self.vhost(slot).is_some_and(|v| v.end_batch(queue));
        let ports = &mut self.io.ports;
        ports.end_turn(slot, turn);
        if more {
            ports.look_again(token, false);
        } else if !ports.lingering.contains(&token) {
            ports.lingering.push(token);
        }
        self.report_fault(slot, id);
    }

    /// Looks whether there are frames in queues that do not kick. True when there are.
    pub(crate) fn look_at_queues(&mut self) -> bool {
        self.sort_queues(VhostUser::has_more, true)
    }

    /// The worker is about to sleep: queues are to kick. True when there are frames after all.
    pub(crate) fn rest_queues(&mut self) -> bool {
        self.sort_queues(VhostUser::rest, false)
    }

    /// Queues that linger and of which `due` says so are to be looked at again; the others stay where they are,
    /// or linger no longer.
    fn sort_queues(&mut self, due: impl Fn(&mut VhostUser, usize) -> bool, stay: bool) -> bool {
        if self.io.ports.lingering.is_empty() {
            return false;
        }
        let mut lingering = std::mem::take(&mut self.io.ports.lingering);
        let mut told = false;
        lingering.retain(|token| {
            let Some((slot, queue)) = self.io.ports.queue(*token) else { return false };
            let Some(v) = self.vhost(slot) else { return false };
            let due = due(v, queue);
            // Only looking at it may have shown that it is broken, and nothing else may ever show that again.
            if v.has_fault() {
                told = true;
                if let Some(id) = self.io.ports.get_mut(slot).map(|p| p.id) {
                    self.report_fault(slot, id);
                }
                return false;
            }
            if due {
                self.io.ports.look_again(*token, false);
            }
            !due && stay
        });
        self.io.ports.lingering = lingering;
        told || self.io.ports.has_again()
    }

    /// Tells of what a guest has broken.
    fn report_fault(&mut self, slot: u32, id: PortId) {
        match self.vhost(slot).and_then(VhostUser::take_fault) {
            Some(Ok(warning)) => self.warn(warning),
            Some(Err(why)) => self.io.ports.leave(id, why),
            None => {}
        }
    }
}
