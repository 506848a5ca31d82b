//! Theory of operation: all ports and what is attached to them. A frame to a guest is written at once (TAP)
//! or queued (sockets) and sent at the end of the batch. What an attachment cannot do is done here: a large
//! frame is cut, a partial checksum completed. A guest that does not read fills its own queue and nobody
//! else's; the core is told when there is room again.

mod transmit;

use super::QUEUE_MAX;
use super::dgram::Dgram;
use super::stream::Stream;
use super::tap::Tap;
use super::vhost_user::{self, FrontEnds, Isolated, VhostUser};
use crate::attachment::quota::Charge;
use crate::control::event::EventSender;
use crate::memory::slab::Slab;
use crate::os::epoll::{Kind, Poller, Token};
use crate::runtime::stats::IoCounters;
use crate::runtime::threads::turn::Turn;
use guestnet_core::types::{PortId, Time};
use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;

pub(crate) use transmit::TxContext;

/// How frames of a port enter and leave.
pub(crate) enum Attachment {
    /// Not at all: an unplugged cable.
    None,
    Tap(Tap),
    Stream(Stream),
    Dgram(Dgram),
    VhostUser(Box<VhostUser>),
    /// By commands and events.
    Memory,
}

impl Attachment {
    fn fd(&self) -> Option<&OwnedFd> {
        match self {
            Attachment::Tap(t) => Some(&t.fd),
            Attachment::Stream(s) => Some(&s.fd),
            Attachment::Dgram(d) => Some(&d.fd),
            Attachment::VhostUser(v) => v.fd(),
            Attachment::None | Attachment::Memory => None,
        }
    }

    fn waiting(&self) -> usize {
        match self {
            Attachment::Stream(s) => s.waiting(),
            Attachment::Dgram(d) => d.waiting(),
            _ => 0,
        }
    }
}

/// A port.
pub(crate) struct Port {
    pub id: PortId,
    pub attachment: Attachment,
    /// The listener on which the guest came.
    pub listener: Option<u32>,
    /// Its connection, as its listener is charged for it.
    pub held: Option<Charge>,
    /// Its front-end has a thread of its own, and the attachment leads to that; with what it was attached by.
    pub isolated: Option<(Isolated, Box<VhostUser>)>,
    /// The core was told that the port is full.
    owed: bool,
    /// It is in the list of ports to be flushed.
    dirty: bool,
    /// EPOLLOUT is watched.
    out_watched: bool,
    /// What it had of the worker in this round.
    turn: Turn,
    /// Its peer is gone, and it is in the list of ports that are to be removed.
    leaving: bool,
}

impl Port {
    pub(crate) fn is_leaving(&self) -> bool {
        self.leaving
    }
}

/// Why a port goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Leaving {
    /// Its peer is gone: why.
    PeerGone(String),
    /// The control side removes it, by the command of this number.
    Removed(u64),
}

/// All ports.
#[derive(Default)]
pub(crate) struct PortSet {
    slab: Slab<Port>,
    by_id: HashMap<PortId, u32>,
    /// The port that was looked up last: frames come in runs.
    last: Option<(PortId, u32)>,
    dirty: Vec<u32>,
    /// Ports with a TAP for which frames wait for the end of the batch.
    taps: Vec<u32>,
    retry: Vec<u32>,
    /// When `retry` is due.
    pub retry_at: Option<Time>,
    /// Memory ports that wait for room in the event ring.
    pub events_full: bool,
    /// Ports that the core is to be told of.
    pub writable: Vec<PortId>,
    /// Queues of vhost-user and streams that have more frames, of which nothing else tells; first those that had
    /// no turn in the last round.
    again: Vec<Token>,
    /// How many those are.
    deferred: usize,
    /// Queues of vhost-user that are looked at while the worker is awake, and do not kick meanwhile.
    pub lingering: Vec<Token>,
    /// Ports on a shared datagram socket that takes nothing for long.
    pub stalled: Vec<PortId>,
    /// Ports that go.
    pub down: VecDeque<(PortId, Leaving)>,
    /// A large frame in one piece.
    linear: Vec<u8>,
    /// A port has, or had, a vhost-user attachment.
    pub had_front_ends: bool,
}

impl PortSet {
    /// Room for a large frame in one piece, which the thread lends.
    pub(crate) fn linear(&mut self) -> &mut Vec<u8> {
        &mut self.linear
    }

    pub(crate) fn slot(&self, id: PortId) -> Option<u32> {
        self.by_id.get(&id).copied()
    }

    pub(crate) fn get_mut(&mut self, slot: u32) -> Option<&mut Port> {
        self.slab.get_mut(slot)
    }

    pub(crate) fn len(&self) -> usize {
        self.slab.len()
    }

    /// The port that watches queues, by the token of one, and which queue it is.
    pub(crate) fn queue(&self, token: Token) -> Option<(u32, usize)> {
        let per_port = vhost_user::RINGS_MAX as u32;
        let slot = token.index / per_port;
        (self.slab.generation(slot) == token.generation).then_some((slot, (token.index % per_port) as usize))
    }

    /// The token of a queue.
    pub(crate) fn queue_token(&self, slot: u32, queue: usize) -> Token {
        let index = slot * vhost_user::RINGS_MAX as u32 + queue as u32;
        Token { kind: Kind::Kick, index, generation: self.slab.generation(slot) }
    }

    /// There are buffers for frames to the guest again.
    pub(crate) fn room_again(&mut self, slot: u32) {
        if let Some(p) = self.slab.get_mut(slot)
            && std::mem::take(&mut p.owed)
        {
            self.writable.push(p.id);
        }
    }

    pub(crate) fn is_current(&self, token: Token) -> bool {
        self.slab.generation(token.index) == token.generation
    }

    /// Adds a port that does not exist yet.
    pub(crate) fn add(&mut self, id: PortId, listener: Option<u32>) -> u32 {
        let port = Port {
            id,
            attachment: Attachment::None,
            listener,
            held: None,
            isolated: None,
            owed: false,
            dirty: false,
            out_watched: false,
            turn: Turn::default(),
            leaving: false,
        };
        let slot = self.slab.insert(port);
        self.by_id.insert(id, slot);
        slot
    }

    /// Removes a port; what is attached is closed.
    pub(crate) fn remove(&mut self, id: PortId) -> Option<Port> {
        let slot = self.by_id.remove(&id)?;
        self.last = None;
        self.taps.retain(|tap| *tap != slot);
        self.slab.remove(slot)
    }

    /// Attaches to a port that has no attachment. `watch`: it has a descriptor of its own.
    pub(crate) fn attach(
        &mut self,
        poller: &Poller,
        slot: u32,
        a: Attachment,
        watch: bool,
    ) -> Result<(), i32> {
        let generation = self.slab.generation(slot);
        let Some(port) = self.slab.get_mut(slot) else { return Ok(()) };
        if let Some(fd) = a.fd().filter(|_| watch) {
            poller.add(fd, Token { kind: Kind::Port, index: slot, generation }, libc::EPOLLIN)?;
        }
        self.had_front_ends |= matches!(a, Attachment::VhostUser(_));
        port.attachment = a;
        port.out_watched = false;
        Ok(())
    }

    /// Moves the front-end of a port to a thread of its own.
    pub(crate) fn isolate(&mut self, poller: &Poller, slot: u32) -> Result<(), String> {
        let generation = self.slab.generation(slot);
        let Some(port) = self.slab.get_mut(slot) else { return Ok(()) };
        let mut vhost = match std::mem::replace(&mut port.attachment, Attachment::None) {
            Attachment::VhostUser(v) => v,
            other => {
                port.attachment = other;
                return Ok(());
            }
        };
        let isolated = vhost.isolate(poller).and_then(|(isolated, fd)| {
            let token = Token { kind: Kind::Port, index: slot, generation };
            let watched = poller.add(&fd, token, libc::EPOLLIN);
            watched.map_err(|e| super::reason("a front-end's thread cannot be watched", e))?;
            Ok((isolated, fd))
        });
        match isolated {
            Ok((isolated, fd)) => {
                port.attachment = Attachment::Tap(Tap::of_packets(fd));
                port.out_watched = false;
                port.isolated = Some((isolated, vhost));
                if std::mem::take(&mut port.owed) {
                    self.writable.push(port.id);
                }
                Ok(())
            }
            Err(why) => {
                port.attachment = Attachment::VhostUser(vhost);
                Err(why)
            }
        }
    }

    /// Ends what [`PortSet::isolate`] began: the port is as it was before a front-end came. Why it ended, where its
    /// thread has said so.
    pub(crate) fn end_isolation(&mut self, counters: &mut IoCounters, slot: u32) -> Option<String> {
        let port = self.slab.get_mut(slot)?;
        let (isolated, vhost) = port.isolated.take()?;
        counters.add_isolated(isolated.counts());
        port.attachment = Attachment::VhostUser(vhost);
        port.out_watched = false;
        self.taps.retain(|tap| *tap != slot);
        isolated.ended()
    }

    /// All ports with a front-end that made this thread wait.
    pub(crate) fn stalled(&self) -> Vec<(u32, PortId)> {
        let stalled = |a: &Attachment| matches!(a, Attachment::VhostUser(v) if v.is_stalled());
        self.slab.iter().filter(|(_, p)| stalled(&p.attachment)).map(|(i, p)| (i, p.id)).collect()
    }

    /// Front-ends whose memory was touched in this round.
    pub(crate) fn touched(&self) -> impl Iterator<Item = &Arc<FrontEnds>> {
        self.slab.iter().filter_map(|(_, p)| match &p.attachment {
            Attachment::VhostUser(v) => v.touched(),
            _ => None,
        })
    }

    /// Threads of front-ends.
    pub(crate) fn isolated(&self) -> impl Iterator<Item = &Isolated> {
        self.slab.iter().filter_map(|(_, p)| p.isolated.as_ref().map(|(isolated, _)| isolated))
    }

    /// Takes the attachment away; frames that wait in it are lost.
    pub(crate) fn detach(&mut self, slot: u32) {
        self.taps.retain(|tap| *tap != slot);
        if let Some(p) = self.slab.get_mut(slot) {
            p.attachment = Attachment::None;
            p.isolated = None;
            if std::mem::take(&mut p.owed) {
                self.writable.push(p.id);
            }
        }
    }

    fn find(&mut self, id: PortId) -> Option<u32> {
        if let Some((last, slot)) = self.last
            && last == id
        {
            return Some(slot);
        }
        let slot = self.by_id.get(&id).copied()?;
        self.last = Some((id, slot));
        Some(slot)
    }

    /// Bytes that the port takes now; 0 is a promise to tell when that changes.
    pub(crate) fn room(&mut self, id: PortId, events: &EventSender) -> usize {
        let Some(slot) = self.find(id) else { return 0 };
        let Some(port) = self.slab.get_mut(slot) else { return 0 };
        let room = match &mut port.attachment {
            Attachment::Stream(_) | Attachment::Dgram(_) => {
                QUEUE_MAX.saturating_sub(port.attachment.waiting())
            }
            Attachment::Memory if !events.frame_room() => {
                self.events_full = true;
                0
            }
            Attachment::VhostUser(v) => {
                let room = v.has_room();
                if v.has_fault() && !port.dirty {
                    // Told at the end of the batch.
                    port.dirty = true;
                    self.dirty.push(slot);
                }
                if room { QUEUE_MAX } else { 0 }
            }
            _ => QUEUE_MAX,
        };
        port.owed |= room == 0;
        room
    }

    fn lost(&mut self, slot: u32, why: String) {
        if let Some(id) = self.slab.get(slot).map(|p| p.id) {
            self.leave(id, why);
        }
    }

    /// The peer of a port is gone. What is attached is closed at once, the rest of the port follows in its time.
    pub(crate) fn leave(&mut self, id: PortId, why: String) {
        let Some(slot) = self.slot(id) else { return };
        if self.begin_leaving(slot) {
            self.down.push_back((id, Leaving::PeerGone(why)));
        }
    }

    /// Closes what is attached to a port that goes. False when it is going already. A front-end of vhost-user may
    /// come again, so that what belongs to it stays until that is known.
    pub(crate) fn begin_leaving(&mut self, slot: u32) -> bool {
        let Some(p) = self.slab.get_mut(slot) else { return false };
        if std::mem::replace(&mut p.leaving, true) {
            return false;
        }
        if p.isolated.is_none() && !matches!(p.attachment, Attachment::VhostUser(_)) {
            self.detach(slot);
        }
        true
    }

    /// Takes a front-end of vhost-user away that is gone.
    pub(crate) fn unplug_front_end(&mut self, slot: u32) {
        if matches!(self.slab.get(slot), Some(Port { attachment: Attachment::VhostUser(_), .. })) {
            self.detach(slot);
        }
    }

    /// The port stays after all.
    pub(crate) fn stays(&mut self, slot: u32) {
        if let Some(p) = self.slab.get_mut(slot) {
            p.leaving = false;
        }
    }

    // ---- turns --------------------------------------------------------------------------------------

    /// The turn of a port in round `round`, begun or gone on with; to be given back by [`PortSet::end_turn`] where
    /// the port may have several pieces of it.
    pub(crate) fn begin_turn(&mut self, slot: u32, round: Time) -> Turn {
        let mut turn = self.slab.get_mut(slot).map(|p| std::mem::take(&mut p.turn)).unwrap_or_default();
        turn.begin(round);
        turn
    }

    pub(crate) fn end_turn(&mut self, slot: u32, turn: Turn) {
        if let Some(p) = self.slab.get_mut(slot) {
            p.turn = turn;
        }
    }

    /// Has a queue or a stream looked at in the next round; before others where it had no turn in this one.
    pub(crate) fn look_again(&mut self, token: Token, deferred: bool) {
        if self.again.contains(&token) {
            return;
        }
        if deferred {
            self.again.insert(self.deferred, token);
            self.deferred += 1;
        } else {
            self.again.push(token);
        }
    }

    pub(crate) fn take_again(&mut self) -> Vec<Token> {
        self.deferred = 0;
        std::mem::take(&mut self.again)
    }

    /// True when there is something to be looked at again.
    pub(crate) fn has_again(&self) -> bool {
        !self.again.is_empty()
    }

    /// The token of a port.
    pub(crate) fn port_token(&self, slot: u32) -> Token {
        Token { kind: Kind::Port, index: slot, generation: self.slab.generation(slot) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_that_had_no_turn_are_first_in_the_next_round() {
        let mut ports = PortSet::default();
        let q = |index| Token { kind: Kind::Kick, index, generation: 0 };
        // In each round one queue has the guest's whole turn, and has more.
        let mut turns = [0; 4];
        for index in 0..4 {
            ports.look_again(q(index), false);
        }
        for _ in 0..40 {
            let mut had_turn = false;
            for token in ports.take_again() {
                ports.look_again(token, had_turn);
                ports.look_again(token, had_turn);
                if !std::mem::replace(&mut had_turn, true) {
                    turns[token.index as usize] += 1;
                }
            }
        }
        assert_eq!(turns, [10; 4]);
    }
}
