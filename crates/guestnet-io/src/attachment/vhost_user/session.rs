//! Theory of operation: what the messages of a front-end do. Each is checked against what was agreed and what
//! there is; one that asks for what cannot be is answered so where an answer is wanted, and else ends the
//! connection. A queue runs from the moment that it has its kick (whether or not anything was kicked: what was
//! put in before is seen) until its base is asked for. New memory is taken into use as a whole: queues that
//! run are found again in it, and stopped where they are not there any more.

use super::feature;
use super::memory::{Fault, Memory};
use super::protocol::{Message, Request};
use super::queue::Queue;
use super::state::{Changes, PAIRS_MAX, RINGS_MAX, Session};
use super::vring::Addresses;
use crate::attachment::vhost_user::eventfd::PeerEventfd;
use crate::attachment::{ReadOutcome, vnet};
use crate::os::epoll::{Kind, Poller, Token};
use std::os::fd::OwnedFd;

/// Several queue pairs.
const PROTOCOL_MQ: u64 = 1 << 0;
/// Answers on request.
const PROTOCOL_REPLY_ACK: u64 = 1 << 3;
const PROTOCOL_OFFERED: u64 = PROTOCOL_MQ | PROTOCOL_REPLY_ACK;

/// Messages done before others have their turn.
const BATCH: usize = 32;

/// How kicks are watched for.
pub(super) struct Watching<'a> {
    pub poller: &'a Poller,
    pub slot: u32,
    pub generation: u32,
}

impl Watching<'_> {
    pub(super) fn token(&self, index: usize) -> Token {
        Token {
            kind: Kind::Kick,
            index: self.slot * RINGS_MAX as u32 + index as u32,
            generation: self.generation,
        }
    }
}

/// What a message is answered with.
pub(super) enum Answer {
    Nothing,
    Number(u64),
    Vring(u32, u32),
}

impl Session {
    pub(super) fn control(&mut self, watching: &Watching<'_>) -> Result<Changes, String> {
        let mut changes = Changes::default();
        for _ in 0..BATCH {
            let message = match self.channel.receive() {
                ReadOutcome::Frame(m) => m,
                ReadOutcome::Empty | ReadOutcome::Bad => {
                    self.count_descriptors()?;
                    break;
                }
                ReadOutcome::Down(why) => return Err(why),
            };
            let Message { number, need_reply, request } = message;
            let answered = self.apply(watching, request, &mut changes);
            self.count_descriptors()?;
            // Asked for once it was agreed.
            let need_reply = need_reply && self.protocol_features & PROTOCOL_REPLY_ACK != 0;
            match answered {
                Ok(Answer::Number(n)) => self.channel.reply(number, &n.to_ne_bytes())?,
                Ok(Answer::Vring(index, base)) => {
                    let mut body = [0; 8];
                    guestnet_wire::put(&mut body, 0, &index.to_ne_bytes());
                    guestnet_wire::put(&mut body, 4, &base.to_ne_bytes());
                    self.channel.reply(number, &body)?;
                }
                Ok(Answer::Nothing) if need_reply => self.channel.reply(number, &0u64.to_ne_bytes())?,
                Ok(Answer::Nothing) => {}
                Err(why) if need_reply => {
                    changes.refused = Some(why);
                    self.channel.reply(number, &1u64.to_ne_bytes())?;
                }
                Err(why) => return Err(why),
            }
        }
        Ok(changes)
    }

    fn queue(&mut self, index: u32) -> Result<&mut Queue, String> {
        self.queues
            .get_mut(index as usize)
            .ok_or_else(|| format!("the front-end names queue {index}, of {RINGS_MAX}"))
    }

    pub(super) fn apply(
        &mut self,
        watching: &Watching<'_>,
        request: Request,
        changes: &mut Changes,
    ) -> Result<Answer, String> {
        match request {
            Request::GetFeatures => return Ok(Answer::Number(feature::OFFERED)),
            Request::SetFeatures(bits) => self.set_features(bits)?,
            Request::GetProtocolFeatures => return Ok(Answer::Number(PROTOCOL_OFFERED)),
            Request::SetProtocolFeatures(bits) if bits & !PROTOCOL_OFFERED == 0 => {
                self.protocol_features = bits;
            }
            Request::SetProtocolFeatures(bits) => {
                return Err(format!("the front-end wants protocol features {bits:#x} that were not offered"));
            }
            Request::GetQueueNum => return Ok(Answer::Number(PAIRS_MAX as u64)),
            Request::SetOwner => {}
            Request::ResetOwner => {
                for q in &mut self.queues {
                    q.ring.stop();
                    q.kick = None;
                    q.enabled = false;
                }
            }
            Request::SetMemory(specs, fds) => {
                let mut new = Memory::map(&specs, &fds, &self.quota)?;
                for (i, q) in self.queues.iter_mut().enumerate() {
                    if q.ring.move_to(&mut new).is_err() {
                        q.give_up();
                        self.broken |= 1 << i;
                    } else if q.ring.is_running() {
                        changes.looked_at(i as u32);
                    }
                }
                // Nothing points into the old one any more.
                self.memory = new;
            }
            Request::SetVringNum { index, num } => {
                let q = self.queue(index)?;
                if q.ring.is_running() || !q.ring.set_size(num) {
                    return Err(format!("queue {index} cannot have {num} entries"));
                }
            }
            Request::SetVringAddr { index, desc, used, avail } => {
                let Session { queues, memory, .. } = self;
                let q = queues.get_mut(index as usize).ok_or("the front-end names a queue too many")?;
                q.ring.addresses = Some(Addresses { desc, avail, used });
                // Of a queue that runs only what is logged changes, or so it should be.
                if q.ring.move_to(memory).is_err() {
                    q.give_up();
                    self.broken |= 1 << index;
                } else if q.ring.is_running() {
                    changes.looked_at(index);
                }
            }
            Request::SetVringBase { index, base } => {
                let q = self.queue(index)?;
                if q.ring.is_running() {
                    return Err(format!("the base of queue {index} was set while it runs"));
                }
                q.ring.at.avail = base as u16;
            }
            Request::GetVringBase { index } => {
                let q = self.queue(index)?;
                q.publish();
                q.ring.stop();
                q.kick = None;
                return Ok(Answer::Vring(index, u32::from(q.ring.at.avail)));
            }
            Request::SetVringKick { index, fd } => self.start(watching, index, fd, changes)?,
            Request::SetVringCall { index, fd } => {
                let fd = fd.map(PeerEventfd::new).transpose()?;
                let q = self.queue(index)?;
                q.call = fd;
                // Whatever went before was told to the old one, or to nobody.
                if let Some(call) = q.call.as_ref().filter(|_| q.ring.is_running()) {
                    call.signal();
                }
            }
            Request::SetVringErr { index, fd } => {
                let fd = fd.map(PeerEventfd::new).transpose()?;
                self.queue(index)?.err = fd;
            }
            Request::SetVringEnable { index, on } => {
                let q = self.queue(index)?;
                q.enabled = on;
                if on && q.ring.is_running() {
                    changes.looked_at(index);
                }
            }
            Request::Unknown => return Err("the front-end asks for something that was not offered".into()),
        }
        Ok(Answer::Nothing)
    }

    pub(super) fn set_features(&mut self, bits: u64) -> Result<(), String> {
        if bits & !feature::OFFERED != 0 {
            return Err(format!("the front-end wants features {bits:#x} that were not offered"));
        }
        self.features = bits;
        let long = self.has(feature::VERSION_1 | feature::MRG_RXBUF);
        self.header = if long { vnet::LEN_MRG } else { vnet::LEN };
        Ok(())
    }

    fn start(
        &mut self,
        watching: &Watching<'_>,
        index: u32,
        fd: Option<OwnedFd>,
        changes: &mut Changes,
    ) -> Result<(), String> {
        let event_idx = self.has(feature::EVENT_IDX);
        let enabled_by_message = self.has(feature::PROTOCOL);
        let Session { queues, memory, .. } = self;
        let q = queues.get_mut(index as usize).ok_or("the front-end names a queue too many")?;
        let fd = fd.map(PeerEventfd::new).transpose()?.map(PeerEventfd::into_fd);
        let kick = fd.map(|fd| watching.poller.watch_edges(fd, watching.token(index as usize))).transpose();
        q.kick = kick.map_err(|e| super::super::reason("a kick cannot be watched", e))?;
        if !q.ring.is_running() {
            q.ring.event_idx = event_idx;
            if let Err(fault) = q.ring.start(memory) {
                q.kick = None;
                let why = match fault {
                    Fault::TxContext => "is not in the guest's memory",
                    Fault::NotAllocated => "is on pages that are not allocated (prealloc=on)",
                };
                return Err(format!("queue {index} {why}"));
            }
            q.ring.spare_kicks();
        }
        q.enabled |= !enabled_by_message;
        changes.looked_at(index);
        Ok(())
    }
}

impl Changes {
    /// A queue may have something in it now.
    fn looked_at(&mut self, index: u32) {
        if index % 2 == 1 {
            self.started.push(index as usize);
        } else {
            self.writable = true;
        }
    }
}
