//! Theory of operation: the expiry work of the engine, a little on each call and never all at once.
//!
//! - Each packet pays for a few records ([`NatEngine::reap`]); [`NatEngine::expire`] does what nobody's packet has paid.
//! - A packet that needs room collects connections that are over first, within a bound.
//! - Records go in groups, so the memory that removing one needs is fetched for all at once.

use crate::interface::types::Time;
use crate::nat::NatDirection;
use crate::nat::engine::{NatEngine, ROOM_SLICE, ROOM_SLICES};
use crate::nat::table::state::TICK_BITS;
use guestnet_wire::icmp;

impl NatEngine {
    /// True when all that is over has been collected.
    #[inline]
    pub(super) fn settled(&self) -> bool {
        self.tick < self.table.due
    }

    /// Collects what is over. False when there was too much of it for one packet.
    pub(super) fn settle(&mut self) -> bool {
        for _ in 0..ROOM_SLICES {
            if self.settled() {
                break;
            }
            self.reap(ROOM_SLICE);
        }
        self.settled()
    }

    /// Looks at up to `visits` records whose time may be over. Returns how many went. They go in groups, so
    /// that the memory that removing one needs is fetched for all at once.
    pub(super) fn reap(&mut self, visits: usize) -> usize {
        let mut gone = 0;
        let mut left = visits;
        let mut done = false;
        while left > 0 && !done {
            let mut dead = [0u32; 16];
            let mut n = 0;
            while n < dead.len() && left > 0 {
                let Some(id) = self.table.wheel.pop(&mut self.table.sessions, u64::from(self.tick)) else {
                    done = true;
                    break;
                };
                left -= 1;
                match self.table.sessions.get(id).map(|s| s.expires) {
                    Some(expires) if expires > self.tick => {
                        self.table.wheel.arm(&mut self.table.sessions, id, u64::from(expires));
                    }
                    _ => {
                        dead[n] = id;
                        n += 1;
                    }
                }
            }
            let dead = &dead[..n];
            std::hint::black_box(dead.iter().fold(0, |seen, id| seen ^ self.table.foresee_removal(*id)));
            for id in dead {
                self.table.remove_session(*id, self.tick);
            }
            gone += n;
        }
        if done {
            self.table.due = self.table.next_deadline().unwrap_or(u32::MAX);
        }
        self.stats.expired += gone as u64;
        gone
    }

    /// Does expiry work for up to `visits` records, and for fragments, resting ports and unsolicited SYNs.
    /// Returns how many connections ended. Call it when [`NatEngine::next_timer`] says, and again while that
    /// still says now; 256 visits take a fraction of a millisecond.
    pub fn expire(&mut self, now: Time, visits: usize) -> usize {
        self.set_time(now);
        self.fragments.expire(self.now);
        self.table.release_held(self.tick, visits.max(64));
        self.answer_unsolicited();
        self.reap(visits)
    }

    /// When [`NatEngine::expire`] has something to do next.
    #[must_use]
    pub fn next_timer(&self) -> Option<Time> {
        let ticks = [self.table.next_deadline(), self.table.next_release()].into_iter().flatten().min();
        // What lies past the end of time never comes.
        let ticks = ticks.and_then(|t| self.base.unwrap_or(0).checked_add(u64::from(t) << TICK_BITS));
        let syn = self.unsolicited.front().map(|s| s.until);
        [ticks, syn, self.fragments.next_deadline()].into_iter().flatten().min().map(Time)
    }

    fn answer_unsolicited(&mut self) {
        while self.unsolicited.front().is_some_and(|s| s.until <= self.now) {
            let Some(s) = self.unsolicited.pop_front() else { return };
            self.icmp_error(
                NatDirection::Outbound,
                s.key.local,
                &s.quote,
                icmp::UNREACHABLE,
                icmp::unreachable::PORT,
                [0; 4],
            );
        }
    }
}
