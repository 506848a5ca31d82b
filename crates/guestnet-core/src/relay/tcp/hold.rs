//! Theory of operation: bytes of the guest that wait until somebody has looked at them. The flow acknowledges them and keeps
//! them in its [`buffer`], up to 64 KiB. [`Tcb::batch_end`] returns [`Fate::Look`] when there is something new; the caller
//! then reads [`Tcb::held`] and answers with [`Tcb::let_pass`], [`Tcb::end_hold`], [`Tcb::answer`] or [`Tcb::abort`].
//!
//! - A flow that is held both ways reads nothing from its socket either: no byte passes in any direction. The peer's reset
//!   is still seen.
//! - The guest's FIN is kept like its bytes. Urgent bytes are bytes in line, so that what is looked at is what the peer
//!   gets.
//! - A flow without a hold knows nothing of this file: the hold is in the buffer, which such a flow does not have.
//!
//! [`buffer`]: super::buffer

use crate::interface::effects::{Close, Effects, Peek};
use crate::relay::tcp::buffer::{HELD_FULL, Hold};
use crate::relay::tcp::{Ctx, Fate, State, Tcb};

/// What a flow holds back that nobody has looked at.
#[derive(Debug, Clone, Copy)]
pub struct Held<'a> {
    /// New bytes, in two pieces.
    pub unseen: [&'a [u8]; 2],
    /// Bytes that were looked at and not let pass.
    pub seen: usize,
    /// The guest has sent its last byte.
    pub ended: bool,
    /// No more bytes find room before some pass.
    pub full: bool,
}

impl Tcb {
    /// The same flow, whose bytes are held back from the first one on; `both_ways`: so are those of the peer.
    #[must_use]
    pub fn with_hold(mut self, both_ways: bool) -> Tcb {
        let hold = Hold { both_ways, holds_end: true, ..Hold::default() };
        self.buffer.get_or_insert_default().hold = Some(hold);
        self.readable = !both_ways;
        self
    }

    /// What is held back; `None` where bytes pass.
    #[must_use]
    pub fn held(&self) -> Option<Held<'_>> {
        let b = self.buffer.as_ref()?;
        let hold = b.hold.as_ref()?;
        Some(Held {
            unseen: b.unseen(),
            seen: hold.seen.saturating_sub(hold.released),
            ended: self.guest_fin,
            full: b.held() >= HELD_FULL,
        })
    }

    /// True when there is something that nobody has looked at.
    pub(super) fn wants_look(&self) -> bool {
        let hold = self.buffer.as_ref().and_then(|b| b.hold.as_ref().map(|h| (b, h)));
        hold.is_some_and(|(b, h)| b.waiting() > h.seen || self.guest_fin && !h.end_seen)
    }

    /// All that is held back was looked at. The ACK of it goes out.
    pub fn note_seen<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> Fate {
        let ended = self.guest_fin;
        if let Some(b) = &mut self.buffer {
            let len = b.waiting();
            if let Some(h) = &mut b.hold {
                (h.seen, h.end_seen) = (len, ended);
            }
        }
        self.flush(cx)
    }

    /// The first `bytes` of those that are held back may pass, and those of the peer. More are looked at before they pass.
    pub fn let_pass<E: Effects>(&mut self, cx: &mut Ctx<'_, E>, bytes: usize) -> Fate {
        if let Some(h) = self.buffer.as_mut().and_then(|b| b.hold.as_mut()) {
            h.released = h.released.saturating_add(bytes);
            h.seen = h.seen.max(h.released);
            h.holds_end = false;
            let waited = std::mem::replace(&mut h.both_ways, false);
            self.readable |= waited;
            self.hangup |= h.hangup;
        }
        self.go_on(cx)
    }

    /// Nothing is held back any more: what was passes, and what follows is not looked at.
    pub fn end_hold<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> Fate {
        if let Some(h) = self.buffer.as_mut().and_then(|b| b.hold.take()) {
            self.readable |= h.both_ways;
            self.hangup |= h.hangup;
        }
        self.settle_buffer(cx.budget);
        self.go_on(cx)
    }

    fn go_on<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> Fate {
        match self.state {
            State::Open => match self.drain(cx) {
                Ok(()) => self.flush(cx),
                Err(fate) => fate,
            },
            _ => Fate::Live,
        }
    }

    /// True when what the peer has sent since the flow let bytes pass is all with the guest, so that the guest waits for
    /// nothing but the answer to what it sends next.
    pub fn is_answered<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> bool {
        self.state == State::Open
            && self.sock_open
            && self.snd_una == self.snd_max
            && !self.fin_sent
            && (!self.readable || matches!(self.peek(cx, self.snd_max, 1), Ok(Peek::Empty)))
    }

    /// Refuses the flow with some last words for the guest, behind which it ends in order. The peer gets a reset. Where
    /// bytes of the peer are on their way to the guest, or there is no socket for the words, the guest gets a reset too.
    pub fn answer<E: Effects>(&mut self, cx: &mut Ctx<'_, E>, words: &[u8]) -> Fate {
        let fresh = self.state == State::Open && self.snd_una == self.snd_max && !self.fin_sent;
        let sock = if fresh && self.sock_open { cx.fx.tcp_answer(self.flow, words).ok() } else { None };
        let Some(sock) = sock else {
            self.abort(cx);
            return Fate::Closed;
        };
        let undiscarded = std::mem::take(&mut self.undiscarded);
        if undiscarded > 0 {
            cx.fx.tcp_discard(self.sock, undiscarded as usize);
        }
        cx.fx.close(std::mem::replace(&mut self.sock, sock), Close::Reset);
        self.shut = false;
        if let Some(b) = &mut self.buffer {
            b.clear();
        }
        self.settle_buffer(cx.budget);
        // The end follows the words.
        (self.readable, self.hangup) = (true, true);
        self.ack_now = true;
        match self.shut_if_done(cx) {
            Ok(()) => self.flush(cx),
            Err(fate) => fate,
        }
    }

    /// The socket is ready while bytes are held back: nothing is read where the flow is held both ways, but a peer that
    /// is gone is seen.
    pub(super) fn note_held_back<E: Effects>(
        &mut self,
        cx: &mut Ctx<'_, E>,
        readable: bool,
    ) -> Result<(), Fate> {
        let Some(h) = self.buffer.as_mut().and_then(|b| b.hold.as_mut()).filter(|h| h.both_ways) else {
            return Ok(());
        };
        h.hangup |= std::mem::take(&mut self.hangup);
        self.readable = false;
        if readable && cx.fx.tcp_peek(self.sock, 0, 1).is_err() {
            self.abort(cx);
            return Err(Fate::Closed);
        }
        Ok(())
    }

    /// Nothing of the guest waits before its end, and the end may go to the socket.
    #[inline]
    pub(super) fn end_may_go(&self) -> bool {
        self.buffer.as_ref().is_none_or(|b| b.waiting() == 0 && b.hold.as_ref().is_none_or(|h| !h.holds_end))
    }
}
