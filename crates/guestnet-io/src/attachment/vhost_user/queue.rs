//! Theory of operation: one queue of a session: its ring, and the descriptors by which both sides call each other.

use super::eventfd::PeerEventfd;
use super::vring::Vring;
use crate::os::epoll::Watch;

/// A queue with what belongs to it.
#[derive(Default)]
pub(super) struct Queue {
    pub(super) ring: Vring,
    pub(super) enabled: bool,
    pub(super) kick: Option<Watch>,
    pub(super) call: Option<PeerEventfd>,
    pub(super) err: Option<PeerEventfd>,
}

impl Queue {
    pub(super) fn usable(&self) -> bool {
        self.enabled && self.ring.is_running()
    }

    /// Shows the guest what it was given back, and calls it where it wants to be.
    pub(super) fn publish(&mut self) {
        if self.ring.publish()
            && let Some(call) = &self.call
        {
            call.signal();
        }
    }

    /// Gives the queue up: its rings are not to be believed.
    pub(super) fn give_up(&mut self) {
        // What came before was right.
        self.publish();
        self.ring.stop();
        self.kick = None;
        if let Some(err) = &self.err {
            err.signal();
        }
    }
}
