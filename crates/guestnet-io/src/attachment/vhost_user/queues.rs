//! Theory of operation: the queues of a session: frames from the guest, turns, and notifications.

use super::memory::CHECKS_MAX;
use super::state::{BATCH_STEPS, CHECK_STEPS, Session, TURN_STEPS};
use super::vring::{self, BadChain, Broken, Vring};
use super::{feature, send};
use crate::attachment::{ReadOutcome, vnet};
use guestnet_core::types::{Csum, FrameMeta, Gso};
use guestnet_wire::{be16, ether};

impl Session {
    pub(super) fn end_batch(&mut self, index: usize) -> bool {
        if let Some(q) = self.queues.get_mut(index) {
            q.publish();
            q.ring.spare_kicks();
        }
        self.begin_turn();
        self.has_more(index)
    }

    pub(super) fn spare_kicks(&mut self, index: usize) {
        if let Some(q) = self.queues.get(index) {
            q.ring.spare_kicks();
        }
    }

    pub(super) fn flush(&mut self) {
        self.steps_to_guest = BATCH_STEPS;
        for q in self.queues.iter_mut().step_by(2) {
            if q.ring.is_running() {
                q.publish();
            }
        }
    }

    /// Queues from the guest share a turn.
    pub(super) fn begin_turn(&mut self) {
        let queues = self.queues.iter().skip(1).step_by(2).filter(|q| q.ring.is_running()).count();
        self.turn_steps = TURN_STEPS / queues.max(1) as u32;
    }

    pub(super) fn read(&mut self, index: usize, buf: &mut [u8]) -> ReadOutcome<(usize, usize, FrameMeta)> {
        let Session { queues, memory, turn_steps, .. } = self;
        let Some(q) = queues.get_mut(index).filter(|_| index % 2 == 1) else { return ReadOutcome::Empty };
        if !q.ring.is_running() || *turn_steps == 0 {
            return ReadOutcome::Empty;
        }
        let head = match q.ring.pop() {
            Ok(Some(head)) => head,
            Ok(None) => return ReadOutcome::Empty,
            Err(Broken) => {
                self.break_queue(index);
                return ReadOutcome::Bad;
            }
        };
        let (mut len, mut steps) = (0, vring::CHAIN_MAX);
        memory.allow_checks(CHECKS_MAX);
        let walked = q.ring.walk(memory, head, false, &mut steps, |memory, at, n| {
            let to = buf.get_mut(len..len + n).ok_or(BadChain::Malformed)?;
            memory.read(at, to)?;
            len += n;
            Ok(true)
        });
        let checks = CHECKS_MAX - memory.checks_left();
        *turn_steps = turn_steps.saturating_sub(vring::CHAIN_MAX - steps + CHECK_STEPS * checks);
        q.ring.give_back(head, 0);
        if !q.enabled {
            // A queue that is not enabled is emptied all the same, and nothing comes of it.
            return ReadOutcome::Bad;
        }
        let Some((header, frame)) =
            buf.get(..len).and_then(|b| b.split_at_checked(self.header)).filter(|_| walked.is_ok())
        else {
            return ReadOutcome::Bad;
        };
        let Ok(meta) = vnet::parse(header, frame) else { return ReadOutcome::Bad };
        if !self.agreed(&meta) {
            return ReadOutcome::Bad;
        }
        if self.pairs() > 1 {
            let hash = send::hash(frame);
            if let Some(s) = self.steering.get_mut(usize::from(hash)) {
                *s = (index / 2) as u8;
            }
        }
        ReadOutcome::Frame((self.header, len, meta))
    }

    /// True when the guest may ask for this of a frame that it sends.
    pub(super) fn agreed(&self, meta: &FrameMeta) -> bool {
        let gso = match meta.gso {
            None => true,
            Some(Gso::Tcp(_)) => self.has(feature::HOST_TSO4 | feature::HOST_TSO6),
            Some(Gso::Udp(_)) => self.has(feature::HOST_USO),
        };
        gso && (self.has(feature::CSUM) || !matches!(meta.csum, Csum::Partial { .. }))
    }

    /// True when the guest takes a frame with this as it is.
    pub(super) fn takes(&self, meta: &FrameMeta, front: &[u8]) -> bool {
        let v6 = be16(front, 12) == ether::IPV6;
        let gso = match (meta.gso, v6) {
            (None, _) => return self.has(feature::GUEST_CSUM) || !matches!(meta.csum, Csum::Partial { .. }),
            (Some(Gso::Tcp(_)), false) => feature::GUEST_TSO4,
            (Some(Gso::Tcp(_)), true) => feature::GUEST_TSO6,
            (Some(Gso::Udp(_)), false) => feature::GUEST_USO4,
            (Some(Gso::Udp(_)), true) => feature::GUEST_USO6,
        };
        self.has(gso) && self.has(feature::GUEST_CSUM)
    }

    pub(super) fn has_more(&mut self, index: usize) -> bool {
        self.ask(index, |ring| ring.look().map(|n| n > 0))
    }

    pub(super) fn rest(&mut self, index: usize) -> bool {
        self.ask(index, Vring::want_kick)
    }

    pub(super) fn ask(
        &mut self,
        index: usize,
        what: impl FnOnce(&mut Vring) -> Result<bool, Broken>,
    ) -> bool {
        let Some(q) = self.queues.get_mut(index).filter(|q| q.ring.is_running()) else { return false };
        what(&mut q.ring).unwrap_or_else(|Broken| {
            self.break_queue(index);
            false
        })
    }

    /// Pairs of queues that frames to the guest can go to: those from the first on.
    pub(super) fn pairs(&self) -> usize {
        self.queues.iter().step_by(2).take_while(|q| q.usable()).count()
    }
}
