//! Theory of operation: bytes of the guest that wait until somebody has looked at them. The flow acknowledges them and keeps
//! them in its [`buffer`], up to 64 KiB. [`Tcb::batch_end`] returns [`Fate::Look`] when there is something new; the caller
//! then reads [`Tcb::held`] and answers with [`Tcb::note_seen`], [`Tcb::let_pass`], [`Tcb::end_hold`], [`Tcb::answer`] or
//! [`Tcb::abort`].
//!
//! - A flow that is held both ways reads nothing from its socket either: no byte passes in any direction. The peer's reset
//!   is still seen.
//! - The guest's FIN is kept like its bytes. Urgent bytes are bytes in line, so that what is looked at is what the peer
//!   gets.
//! - A flow that is refused can get last words ([`Tcb::answer`]). Where bytes were let pass before, the peer is told that
//!   no more follow, and the words come behind all that it has to say.
//! - [`Tcb::await_answer`] has the first bytes of the peer's next answer looked at.
//! - A flow without a hold knows nothing of this file: the hold is in the buffer, which such a flow does not have.
//!
//! [`buffer`]: super::buffer

use crate::interface::effects::{Close, Effects, Peek};
use crate::relay::tcp::buffer::{Answer, HELD_FULL, Hold};
use crate::relay::tcp::{Ctx, Fate, State, Tcb};

/// How the answer to a request for another protocol begins that is granted (RFC 9110 15.2.2).
const SWITCHING: &[u8] = b"HTTP/1.1 101";

/// What a flow holds back.
#[derive(Debug, Clone, Copy)]
pub struct Held<'a> {
    /// Bytes that nobody has looked at, in two pieces.
    pub unseen: [&'a [u8]; 2],
    /// All bytes that were not let pass, in two pieces.
    pub all: [&'a [u8]; 2],
    /// The guest has sent its last byte.
    pub ended: bool,
    /// No more bytes find room before some pass.
    pub full: bool,
    /// Whether the peer switches to another protocol, where that was asked and is known.
    pub switches: Option<bool>,
}

impl Held<'_> {
    /// Bytes that were not let pass.
    #[must_use]
    pub fn len(&self) -> usize {
        self.all.iter().map(|part| part.len()).sum()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
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

    fn hold_mut(&mut self) -> Option<&mut Hold> {
        self.buffer.as_mut()?.hold.as_mut()
    }

    /// What is held back; `None` where bytes pass.
    #[must_use]
    pub fn held(&self) -> Option<Held<'_>> {
        let b = self.buffer.as_ref()?;
        let hold = b.hold.as_ref()?;
        Some(Held {
            unseen: b.unseen(),
            all: b.from(hold.released),
            ended: self.guest_fin,
            full: b.held() >= HELD_FULL,
            switches: if let Answer::Known(switches) = hold.answer { Some(switches) } else { None },
        })
    }

    /// True when there is something that nobody has looked at.
    pub(super) fn wants_look(&self) -> bool {
        let hold = self.buffer.as_ref().and_then(|b| b.hold.as_ref().map(|h| (b, h)));
        hold.is_some_and(|(b, h)| {
            b.waiting() > h.seen || self.guest_fin && !h.end_seen || matches!(h.answer, Answer::Known(_))
        })
    }

    /// All that is held back was looked at. The ACK of it goes out.
    pub fn note_seen<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> Fate {
        let (ended, len) = (self.guest_fin, self.waiting());
        if let Some(h) = self.hold_mut() {
            (h.seen, h.end_seen) = (len, ended);
            if let Answer::Known(_) = h.answer {
                h.answer = Answer::Unasked;
            }
        }
        self.flush(cx)
    }

    /// As [`Tcb::let_pass`], where those behind the first `bytes` are to be looked at, whatever was looked at before.
    pub fn let_pass_only<E: Effects>(&mut self, cx: &mut Ctx<'_, E>, bytes: usize) -> Fate {
        if let Some(h) = self.hold_mut() {
            h.seen = h.released.saturating_add(bytes);
        }
        self.let_pass(cx, bytes)
    }

    /// Has what is held back looked at in the next batch.
    pub fn look_again(&mut self) {
        self.wants_batch = true;
    }

    /// The first `bytes` of those that are held back may pass, and those of the peer. More are looked at before they pass.
    pub fn let_pass<E: Effects>(&mut self, cx: &mut Ctx<'_, E>, bytes: usize) -> Fate {
        let mut hung_up = false;
        if let Some(h) = self.hold_mut() {
            h.released = h.released.saturating_add(bytes);
            h.seen = h.seen.max(h.released);
            (h.holds_end, h.passed) = (false, h.passed || bytes > 0);
            hung_up = h.hangup;
        }
        self.read_peer(hung_up);
        self.go_on(cx)
    }

    /// The bytes of the peer may pass. Those of the guest are held back as before.
    pub fn let_peer_pass<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> Fate {
        let hung_up = self.hold_mut().is_some_and(|h| h.hangup);
        self.read_peer(hung_up);
        self.flush(cx)
    }

    fn read_peer(&mut self, hung_up: bool) {
        let waited = self.hold_mut().is_some_and(|h| std::mem::replace(&mut h.both_ways, false));
        self.readable |= waited;
        self.hangup |= waited && hung_up;
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

    /// Has the first bytes of the peer's next answer looked at. False when the peer may still have something else to
    /// say before it.
    pub fn await_answer<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> bool {
        let idle = self.state == State::Open && self.snd_una == self.snd_max && !self.fin_sent;
        let quiet = idle && self.sock_open && matches!(self.peek(cx, self.snd_max, 1), Ok(Peek::Empty));
        if quiet && let Some(h) = self.hold_mut() {
            h.answer = Answer::Awaited;
        }
        quiet
    }

    /// Refuses the flow with some last words for the guest, behind which it ends in order. The peer gets a reset, or the
    /// end of what was let pass to it. Where the words would get into what the peer says, or there is no socket for them,
    /// the guest gets a reset.
    pub fn answer<E: Effects>(&mut self, cx: &mut Ctx<'_, E>, words: &[u8]) -> Fate {
        let open = self.state == State::Open && !self.fin_sent && self.sock_open;
        let passed = self.hold_mut().is_some_and(|h| h.passed);
        if open && passed && !self.shut {
            if let Some(b) = &mut self.buffer {
                b.forget_held();
            }
            if let Some(h) = self.hold_mut() {
                (h.words, h.answer) = (Some(words.into()), Answer::Unasked);
            }
            self.settle_buffer(cx.budget);
            self.end_before_words(cx);
            self.readable = true;
            return self.flush(cx);
        }
        if !open || passed || self.snd_una != self.snd_max || !self.speak(cx, words) {
            self.abort(cx);
            return Fate::Closed;
        }
        match self.shut_if_done(cx) {
            Ok(()) => self.flush(cx),
            Err(fate) => fate,
        }
    }

    /// Where last words are to come, the peer hears that nothing follows what was let pass to it.
    pub(super) fn end_before_words<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) {
        if !self.shut
            && self.sock_open
            && self.has_words()
            && self.hold_mut().is_some_and(|h| h.released == 0)
        {
            self.shut = true;
            cx.fx.tcp_shutdown(self.sock);
        }
    }

    /// Exchanges the socket for one that has the words. False when there is none.
    fn speak<E: Effects>(&mut self, cx: &mut Ctx<'_, E>, words: &[u8]) -> bool {
        let Ok(sock) = cx.fx.tcp_answer(self.flow, words) else { return false };
        let undiscarded = std::mem::take(&mut self.undiscarded);
        if undiscarded > 0 {
            cx.fx.tcp_discard(self.sock, undiscarded as usize);
        }
        let how = if self.shut { Close::Graceful } else { Close::Reset };
        cx.fx.close(std::mem::replace(&mut self.sock, sock), how);
        self.shut = false;
        if let Some(b) = &mut self.buffer {
            b.clear();
        }
        self.settle_buffer(cx.budget);
        // The end follows the words.
        (self.readable, self.hangup) = (true, true);
        self.ack_now = true;
        true
    }

    /// True when the guest gets last words behind what the peer says.
    #[inline]
    pub(super) fn has_words(&self) -> bool {
        self.buffer.as_ref().is_some_and(|b| b.hold.as_ref().is_some_and(|h| h.words.is_some()))
    }

    /// The peer has said all: the last words follow, once the guest has acknowledged what was said before.
    pub(super) fn say_words<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> Result<(), Fate> {
        if self.snd_una != self.snd_max {
            return Ok(());
        }
        let words = self.hold_mut().and_then(|h| h.words.take()).unwrap_or_default();
        if !self.speak(cx, &words) {
            self.abort(cx);
            return Err(Fate::Closed);
        }
        self.wants_batch = true;
        self.shut_if_done(cx)
    }

    /// The socket is ready while bytes are held back. Nothing is read where the flow is held both ways, but a peer that
    /// is gone is seen. The first bytes of an answer that is awaited are looked at.
    pub(super) fn note_held_back<E: Effects>(
        &mut self,
        cx: &mut Ctx<'_, E>,
        readable: bool,
    ) -> Result<(), Fate> {
        let (sock, hung_up, offset) = (self.sock, self.hangup, self.undiscarded as usize);
        let Some(h) = self.hold_mut() else { return Ok(()) };
        if h.both_ways {
            h.hangup |= hung_up;
            (self.readable, self.hangup) = (false, false);
            if readable && cx.fx.tcp_peek(sock, 0, 1).is_err() {
                self.abort(cx);
                return Err(Fate::Closed);
            }
        } else if h.answer == Answer::Awaited && readable {
            let known = match cx.fx.tcp_peek(sock, offset, SWITCHING.len()) {
                Ok(Peek::Data(n)) if n < SWITCHING.len() => None,
                Ok(Peek::Data(_) | Peek::Last(_)) => Some(cx.fx.peeked(SWITCHING.len()) == SWITCHING),
                Ok(Peek::Empty) => None,
                Ok(Peek::Urgent | Peek::Eof) | Err(_) => Some(false),
            };
            match known {
                Some(switches) => {
                    h.answer = Answer::Known(switches);
                    (self.readable, self.wants_batch) = (true, true);
                }
                None => self.readable = false,
            }
        }
        Ok(())
    }

    /// Nothing of the guest waits before its end, and the end may go to the socket.
    #[inline]
    pub(super) fn end_may_go(&self) -> bool {
        self.buffer.as_ref().is_none_or(|b| b.waiting() == 0 && b.hold.as_ref().is_none_or(|h| !h.holds_end))
    }
}
