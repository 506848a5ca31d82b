//! Theory of operation: the kernel's memory behind TCP flows. Data from outside waits in the host's socket until the guest
//! takes it, and data that a peer does not take waits there too. The kernel bounds this for each socket and for the whole
//! host, so a guest with thousands of stuck connections could take all TCP memory of the host. Here it is bounded for each
//! guest, as a switch shares its buffer: a guest may hold as much as is left of [`crate::Limits::socket_memory`].
//!
//! - A flow is measured when data arrives that the guest does not take at once, when its socket takes no more,
//!   after each doubling of what it sent, and when its idle timer fires. Guests with few flows are not measured: the kernel
//!   bounds what these can hold.
//! - While a guest holds more than its share, its flows that hold something, and new ones, are **tight**: the kernel
//!   takes a few kilobytes of each and no more. Nothing is lost; the peer waits, as for any slow reader.
//! - A guest that holds too much and has more than [`STUCK_MANY`] flows that hold something gets no new ones: each costs
//!   its peer memory too, and the peer may be on this host.
//! - A flow is no longer tight when it is measured and the guest is within its share.

use crate::interface::effects::Effects;
use crate::interface::stats::DropReason;
use crate::interface::types::{FlowId, SockId};
use crate::relay::Relay;
use crate::tables::flow::State;

/// Guests with no more flows are not measured.
pub(crate) const FEW_FLOWS: u32 = 16;
/// What a guest may hold whatever others hold.
const GUEST_MIN: usize = 1 << 20;

/// So many flows of a guest may be stuck, however little of each is taken.
const STUCK_MANY: u32 = 1024;

impl Relay {
    /// True when a guest's flows hold more of the kernel's memory than their share.
    pub(super) fn holds_too_much(&self, slot: u32) -> bool {
        let left = self.limits.socket_memory.saturating_sub(self.socket_memory);
        self.guests.get(slot).is_some_and(|g| g.socket_memory > left.max(GUEST_MIN))
    }

    /// Refuses a new flow of a guest that has far too many that are stuck.
    ///
    /// # Errors
    /// [`DropReason::BufferLimit`].
    pub(super) fn admit_memory(&self, slot: u32) -> Result<(), DropReason> {
        let many = self.guests.get(slot).is_some_and(|g| g.stuck >= STUCK_MANY);
        if many && self.holds_too_much(slot) { Err(DropReason::BufferLimit) } else { Ok(()) }
    }

    /// Accounts what a flow of a guest holds now and held before.
    pub(super) fn book_memory(&mut self, slot: u32, before: u32, held: u32) {
        let change = |sum: usize| sum.saturating_sub(before as usize).saturating_add(held as usize);
        self.socket_memory = change(self.socket_memory);
        if let Some(guest) = self.guests.get_mut(slot) {
            guest.socket_memory = change(guest.socket_memory);
            guest.stuck =
                guest.stuck.saturating_sub(u32::from(before > 0)).saturating_add(u32::from(held > 0));
        }
    }

    /// Measures a flow, and tightens or loosens it.
    pub(super) fn measure<E: Effects>(&mut self, fx: &mut E, index: u32) {
        let Some(f) = self.flows.at_mut(index) else { return };
        let slot = f.key.slot;
        let State::Tcp(tcb) = &mut f.state else { return };
        let sock = tcb.sock();
        let held = sock.map_or(0, |s| u32::try_from(fx.tcp_held(s)).unwrap_or(u32::MAX));
        let before = tcb.note_memory(held);
        self.book_memory(slot, before, held);
        let over = self.holds_too_much(slot);
        if let Some(sock) = sock
            && (held > 0 || !over)
        {
            self.tighten(fx, index, sock, over);
        }
    }

    /// Data arrived at a socket: the flow is measured where the guest did not take all of it.
    pub(super) fn measure_arrival<E: Effects>(&mut self, fx: &mut E, id: FlowId) {
        let Some(f) = self.flows.get_mut(id) else { return };
        let (State::Tcp(tcb), Some(guest)) = (&f.state, self.guests.get(f.key.slot)) else { return };
        if tcb.memory.tight || guest.flows > FEW_FLOWS && tcb.holds_data() {
            self.measure(fx, id.index);
        }
    }

    /// The idle timer of a flow has fired.
    pub(super) fn measure_idle<E: Effects>(&mut self, fx: &mut E, index: u32) {
        let Some(f) = self.flows.at(index) else { return };
        let (State::Tcp(tcb), Some(guest)) = (&f.state, self.guests.get(f.key.slot)) else { return };
        if tcb.memory.held > 0 || tcb.memory.tight || guest.flows > FEW_FLOWS {
            self.measure(fx, index);
        }
    }

    /// Has the kernel take a few kilobytes of a flow at most, or as much as it likes.
    pub(super) fn tighten<E: Effects>(&mut self, fx: &mut E, index: u32, sock: SockId, tight: bool) {
        let Some(State::Tcp(tcb)) = self.flows.at_mut(index).map(|f| &mut f.state) else { return };
        if std::mem::replace(&mut tcb.memory.tight, tight) != tight {
            fx.tcp_tighten(sock, tight);
        }
    }
}
