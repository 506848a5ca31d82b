//! Theory of operation: a flow within the limits of the owner ([`crate::policy::shaping`]). Each call brings an allowance for
//! both ways. What the guest sends beyond it waits in the buffer, and the window closes; what the peer sends beyond it stays
//! in the socket. A flow that was stopped says so, and its caller puts it in a queue, once for each way. When its turn comes
//! it is called by [`Tcb::unthrottled`].

use crate::interface::effects::Effects;
use crate::interface::types::FlowId;
use crate::policy::shaping::{SEGMENT_LEAST, Way};
use crate::relay::tcp::{Ctx, Fate, State, Tcb};

/// Bits of `throttle`: a limit stopped the flow, and it is in a queue.
const UP: u8 = 1;
const DOWN: u8 = 2;
const QUEUED_UP: u8 = 4;
const QUEUED_DOWN: u8 = 8;

impl Tcb {
    /// How many of `wanted` bytes of the guest may go to the socket.
    #[inline]
    pub(super) fn may_go_up<E: Effects>(cx: &Ctx<'_, E>, wanted: usize) -> usize {
        wanted.min(cx.allowance.up as usize)
    }

    /// Of `wanted` bytes `may` could go to the socket, and `went` did. A socket that is full says when it is not; only
    /// where it took all that it was given, the limit stopped the flow.
    #[inline]
    pub(super) fn went_up<E: Effects>(
        &mut self,
        cx: &mut Ctx<'_, E>,
        wanted: usize,
        may: usize,
        went: usize,
    ) {
        if cx.allowance.up == u32::MAX {
            return;
        }
        cx.allowance.up = cx.allowance.up.saturating_sub(u32::try_from(went).unwrap_or(u32::MAX));
        if went == may && may < wanted {
            self.throttle |= UP;
        }
    }

    /// Whether a segment may go to the guest.
    #[inline]
    pub(super) fn may_go_down<E: Effects>(&mut self, cx: &Ctx<'_, E>) -> bool {
        let may = cx.allowance.down >= SEGMENT_LEAST;
        if !may {
            self.throttle |= DOWN;
        }
        may
    }

    /// So many bytes went to the guest.
    #[inline]
    pub(super) fn went_down<E: Effects>(cx: &mut Ctx<'_, E>, bytes: u32) {
        if cx.allowance.down != u32::MAX {
            cx.allowance.down = cx.allowance.down.saturating_sub(bytes);
        }
    }

    /// The flow that it is the state of.
    pub(crate) fn id(&self) -> FlowId {
        self.flow
    }

    /// Sets the largest window that the guest is offered from now on. What was promised before holds.
    #[inline]
    pub(crate) fn set_window_most(&mut self, most: u32) {
        self.window_most = most;
    }

    /// Returns true when the flow has to be put in a queue this way, and notes that it is.
    pub(crate) fn enters_queue(&mut self, way: Way) -> bool {
        let (stopped, queued) = match way {
            Way::Up => (UP, QUEUED_UP),
            Way::Down => (DOWN, QUEUED_DOWN),
        };
        let enters = self.throttle & (stopped | queued) == stopped && self.sock_open;
        if enters {
            self.throttle |= queued;
        }
        enters
    }

    /// It is the flow's turn this way.
    pub fn unthrottled<E: Effects>(&mut self, cx: &mut Ctx<'_, E>, way: Way) -> Fate {
        self.throttle &= !match way {
            Way::Up => UP | QUEUED_UP,
            Way::Down => DOWN | QUEUED_DOWN,
        };
        if self.state != State::Open || !self.sock_open {
            return Fate::Live;
        }
        if way == Way::Up
            && let Err(fate) = self.drain(cx)
        {
            return fate;
        }
        self.flush(cx)
    }
}
