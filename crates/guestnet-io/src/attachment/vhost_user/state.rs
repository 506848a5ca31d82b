//! Theory of operation: the state of a session with a front-end: what was agreed, its memory, its queues, and what it holds
//! of the process. The other files work on it.

use super::memory::{Memory, Piece};
use super::protocol::Channel;
use super::queue::Queue;
use crate::attachment::quota::{Charge, Quota, Resource};
use crate::attachment::vnet;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Pairs of queues that a guest can have.
pub(crate) const PAIRS_MAX: usize = 8;
/// Queues of a guest.
pub(crate) const RINGS_MAX: usize = 2 * PAIRS_MAX;
/// Descriptors of a guest that are read in one turn, all its queues together, before others have theirs: as many as
/// 64 large frames have, and some 100 us where each is a cache miss. A turn ends with the frame that exceeds it.
pub(super) const TURN_STEPS: u32 = 2048;
/// Descriptors that are read for frames to a guest in one batch. What does not fit is dropped.
pub(super) const BATCH_STEPS: u32 = 4096;
/// What it costs to ask a file about a page, in descriptors.
pub(super) const CHECK_STEPS: u32 = 4;

/// What a front-end and its guest have agreed with us.
pub(super) struct Session {
    pub(super) channel: Channel,
    pub(super) memory: Memory,
    pub(super) features: u64,
    pub(super) protocol_features: u64,
    /// Length of the virtio header.
    pub(super) header: usize,
    pub(super) queues: [Queue; RINGS_MAX],
    /// The pair on which frames of a hash came last, and on which those to it go.
    pub(super) steering: [u8; 256],
    /// Pieces of the buffers for one frame.
    pub(super) pieces: Vec<Piece>,
    /// Buffers of one frame: head and bytes.
    pub(super) heads: Vec<(u16, u32)>,
    /// Queues that were found broken and are to be told of.
    pub(super) broken: u32,
    /// What the front-end holds.
    pub(super) quota: Arc<Quota>,
    /// Its descriptors, but for the connection, and how many of them are not its own but needed for it.
    pub(super) descriptors: Charge,
    pub(super) extra_descriptors: u64,
    /// Descriptors of a turn, and of a batch to the guest, that are left.
    pub(super) turn_steps: u32,
    pub(super) steps_to_guest: u32,
    /// A frame was dropped because its buffer was not allocated; whether that is still to be told of.
    pub(super) not_allocated: Option<bool>,
}

/// What came of the messages of a front-end.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    /// Queues from the guest that are to be looked at now.
    pub started: Vec<usize>,
    /// There may be buffers for frames to the guest now.
    pub writable: bool,
    /// Why a message was refused.
    pub refused: Option<String>,
}

impl Session {
    pub(super) fn new(fd: OwnedFd, quota: &Arc<Quota>) -> Session {
        let quota = Quota::within(quota);
        Session {
            channel: Channel::new(fd),
            memory: Memory::default(),
            features: 0,
            protocol_features: 0,
            header: vnet::LEN,
            queues: Default::default(),
            steering: [0; 256],
            pieces: Vec::new(),
            heads: Vec::new(),
            broken: 0,
            descriptors: Charge::new(&quota, Resource::Descriptors),
            extra_descriptors: 0,
            quota,
            turn_steps: TURN_STEPS,
            steps_to_guest: BATCH_STEPS,
            not_allocated: None,
        }
    }

    /// Counts the descriptors that the front-end has sent and that are kept.
    pub(super) fn count_descriptors(&mut self) -> Result<(), String> {
        let of_queue = |q: &Queue| {
            u64::from(q.kick.is_some()) + u64::from(q.call.is_some()) + u64::from(q.err.is_some())
        };
        let queues: u64 = self.queues.iter().map(of_queue).sum();
        let n = queues + self.extra_descriptors + (self.memory.len() + self.channel.descriptors()) as u64;
        self.descriptors.set(n).map_err(|e| format!("a front-end sent {n} descriptors: {e}"))
    }

    pub(super) fn has_fault(&self) -> bool {
        self.broken != 0 || self.not_allocated == Some(true) || self.memory.is_lost()
    }

    pub(super) fn take_fault(&mut self) -> Option<Result<String, String>> {
        if self.memory.is_lost() {
            return Some(Err("the guest's memory was taken away from under it".into()));
        }
        if self.not_allocated == Some(true) {
            self.not_allocated = Some(false);
            return Some(Ok(
                "frames to a guest are dropped: their buffers are on pages of its memory that are not \
                            allocated, and guestnet may allocate no more of them; start the machine with its \
                            memory allocated (prealloc=on)"
                    .into(),
            ));
        }
        let broken = std::mem::take(&mut self.broken);
        (broken != 0).then(|| {
            let list: Vec<String> =
                (0..RINGS_MAX).filter(|i| broken & 1 << i != 0).map(|i| i.to_string()).collect();
            Ok(format!("virtio queue {} of a guest is broken and was stopped", list.join(", ")))
        })
    }

    pub(super) fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// A queue cannot be used any more.
    pub(super) fn break_queue(&mut self, index: usize) {
        if let Some(q) = self.queues.get_mut(index) {
            q.give_up();
            self.broken |= 1 << index;
        }
    }
}
