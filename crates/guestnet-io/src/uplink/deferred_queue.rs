//! Theory of operation: what waits for the end of the batch ([`super::deferred_writes`]).

use crate::os::io_uring::OPS_MAX;
use guestnet_core::types::Time;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;

/// A slot and its generation, which says whether its socket is still the same.
pub(super) type Place = (u32, u32);

/// What waits for the end of the batch.
#[derive(Default)]
pub(crate) struct DeferredWrites {
    /// Putting off is worth it.
    pub on: bool,
    pub(super) sends: Vec<Place>,
    pub(super) closes: Vec<OwnedFd>,
    /// Connections that linger, the oldest first, and until when.
    pub(super) lingering: VecDeque<(Place, Time)>,
}

impl DeferredWrites {
    pub(crate) fn is_empty(&self) -> bool {
        self.sends.is_empty() && self.closes.is_empty()
    }

    /// Closes a descriptor, at the end of the batch where that is worth it.
    pub(crate) fn close(&mut self, fd: OwnedFd) {
        // Bounded, since a descriptor that waits counts as none.
        if self.on && self.closes.len() < OPS_MAX {
            self.closes.push(fd);
        }
    }
}
