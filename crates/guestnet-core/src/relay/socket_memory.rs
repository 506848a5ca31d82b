//! Theory of operation: the kernel's memory behind TCP flows. What the outside sends waits in the host's socket until
//! the guest takes it, and what a peer does not take waits there too. The kernel bounds this for each socket and
//! for the whole host, so a guest with thousands of stuck connections could take the memory of all TCP of the host.
//! Here it is bounded for each guest, as a switch shares its buffer: a port may hold as much as is left of
//! [`crate::Limits::socket_memory`].
//!
//! - A flow is measured when data arrives that the guest does not take at once, when its socket takes no more,
//!   after each doubling of what it sent, and when it is looked at because it is idle. Ports with few flows are
//!   left alone: what these can hold is bounded by the kernel.
//! - While a port holds more than its share, its flows that hold something, and new ones, are **tight**: the kernel
//!   is told to take a few kilobytes of each and no more. Nothing is lost; the peer waits, as for any slow reader.
//! - A port that holds too much and has more than [`STUCK_MANY`] flows that hold something gets no new ones: each costs
//!   its peer memory too, and the peer may be on this host.
//! - A flow is no longer tight when it is measured and the port is within its share.

use crate::interface::effects::Effects;
use crate::interface::stats::DropReason;
use crate::interface::types::{FlowId, SockId};
use crate::network::Network;
use crate::tables::flow::State;

/// Ports with no more flows are not measured.
pub(crate) const FEW_FLOWS: u32 = 16;
/// What a flow sends before it is measured for the first time.
const FIRST_SAMPLE: u64 = 8 << 10;
/// What a port may hold whatever others hold.
const PORT_MIN: usize = 1 << 20;

/// So many flows of a port may be stuck, however little of each is taken.
const STUCK_MANY: u32 = 1024;

/// What is known of the kernel's memory behind one flow.
#[derive(Debug)]
pub(crate) struct SocketMemory {
    /// Bytes, as measured last.
    pub held: u32,
    /// The kernel is told to take no more than a little.
    pub tight: bool,
    /// Nothing has come to it since it was measured.
    pub settled: bool,
    /// It is measured when the guest has sent so many bytes.
    pub sample_at: u64,
}

impl Default for SocketMemory {
    fn default() -> Self {
        SocketMemory { held: 0, tight: false, settled: true, sample_at: FIRST_SAMPLE }
    }
}

impl Network {
    /// True when a port's flows hold more of the kernel's memory than their share.
    pub(crate) fn holds_too_much(&self, slot: u32) -> bool {
        let left = self.cfg.limits.socket_memory.saturating_sub(self.socket_memory);
        self.ports.get(slot).is_some_and(|p| p.socket_memory > left.max(PORT_MIN))
    }

    /// Refuses a new flow to a port that has far too many that are stuck.
    ///
    /// # Errors
    /// [`DropReason::BufferLimit`].
    pub(crate) fn admit_memory(&self, slot: u32) -> Result<(), DropReason> {
        let many = self.ports.get(slot).is_some_and(|p| p.stuck >= STUCK_MANY);
        if many && self.holds_too_much(slot) { Err(DropReason::BufferLimit) } else { Ok(()) }
    }

    /// Books what a flow of a port holds now and held before.
    pub(crate) fn book_memory(&mut self, slot: u32, before: u32, held: u32) {
        let change = |sum: usize| sum.saturating_sub(before as usize) + held as usize;
        self.socket_memory = change(self.socket_memory);
        if let Some(port) = self.ports.get_mut(slot) {
            port.socket_memory = change(port.socket_memory);
            port.stuck = port.stuck.saturating_sub(u32::from(before > 0)) + u32::from(held > 0);
        }
    }

    /// Measures a flow, and tightens it or lets it go.
    pub(crate) fn measure<E: Effects>(&mut self, index: u32, fx: &mut E) {
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
            self.tighten(index, sock, over, fx);
        }
    }

    /// Something arrived at a socket: measured where the guest did not take all of it.
    pub(crate) fn measure_arrival<E: Effects>(&mut self, id: FlowId, fx: &mut E) {
        let Some(f) = self.flows.get_mut(id) else { return };
        let (State::Tcp(tcb), Some(port)) = (&f.state, self.ports.get(f.key.slot)) else { return };
        if tcb.memory.tight || port.flows > FEW_FLOWS && tcb.holds_data() {
            self.measure(id.index, fx);
        }
    }

    /// A flow was looked at because it is idle.
    pub(crate) fn measure_idle<E: Effects>(&mut self, index: u32, fx: &mut E) {
        let Some(f) = self.flows.at(index) else { return };
        let (State::Tcp(tcb), Some(port)) = (&f.state, self.ports.get(f.key.slot)) else { return };
        if tcb.memory.held > 0 || tcb.memory.tight || port.flows > FEW_FLOWS {
            self.measure(index, fx);
        }
    }

    /// Bounds what the kernel takes of a flow, or no more.
    pub(crate) fn tighten<E: Effects>(&mut self, index: u32, sock: SockId, tight: bool, fx: &mut E) {
        let Some(State::Tcp(tcb)) = self.flows.at_mut(index).map(|f| &mut f.state) else { return };
        if std::mem::replace(&mut tcb.memory.tight, tight) != tight {
            fx.tcp_tighten(sock, tight);
        }
    }
}
