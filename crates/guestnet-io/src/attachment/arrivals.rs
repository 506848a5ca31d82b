//! Theory of operation: a socket that guests come to, what their ports are made like, and how many guests may come in a
//! second. [`crate::attachment::listener`] makes ports of those that come.

use crate::attachment::unixgram::Unixgram;
use crate::attachment::vhost_user::FrontEnds;
use crate::control::command::Encapsulation;
use guestnet_core::types::{PortConfig, Time};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Guests of a listener that may come in a second, and at once after a pause. Each is a port that comes and one
/// that goes, which the control side has to hear of.
const ARRIVALS_PER_SECOND: u64 = 500;
const ARRIVALS_AT_ONCE: u64 = 256;

/// Where guests arrive.
pub(crate) struct Listener {
    pub number: u32,
    pub(super) template: PortConfig,
    pub kind: Arrivals,
    /// Its guests, all together, and what they hold.
    pub(super) front_ends: Arc<FrontEnds>,
    pub(super) pace: Pace,
}

/// How many guests may come.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// When the allowance was last counted, and how much of it there was, in guests times a thousand.
    at: Time,
    left: u64,
    pub(super) looked_for_gone: Time,
}

impl Pace {
    pub(super) fn new(now: Time) -> Pace {
        Pace { at: now, left: ARRIVALS_AT_ONCE * 1000, looked_for_gone: Time(0) }
    }

    /// Whether one more may come now.
    pub(super) fn allows(&mut self, now: Time) -> bool {
        let more = now.since(self.at) / 1_000_000 * ARRIVALS_PER_SECOND;
        if more > 0 {
            self.left = (self.left + more).min(ARRIVALS_AT_ONCE * 1000);
            self.at = now;
        }
        let allowed = self.left >= 1000;
        if allowed {
            self.left -= 1000;
        }
        allowed
    }
}

/// How they arrive.
pub(crate) enum Arrivals {
    /// Connections, and what they carry.
    Connections { fd: OwnedFd, encapsulation: Encapsulation },
    /// Datagrams on one socket.
    Datagrams(Unixgram),
}

impl Listener {
    pub(super) fn fd(&self) -> &OwnedFd {
        match &self.kind {
            Arrivals::Connections { fd, .. } => fd,
            Arrivals::Datagrams(u) => &u.fd,
        }
    }
}
