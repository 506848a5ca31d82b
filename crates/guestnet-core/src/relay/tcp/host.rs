//! Theory of operation: the socket's side of a flow. What the guest sent drains into the socket, then its FIN;
//! when both directions are closed and acknowledged the socket is closed in order. Here too is the one place
//! where a flow gives back what it holds.

use crate::interface::effects::{Close, Effects, Peek};
use crate::relay::tcp::seq::Seq;
use crate::relay::tcp::{Budget, Ctx, Fate, State, Tcb};

impl Tcb {
    /// Gives the buffered bytes to the socket; afterwards the guest's FIN too, and a window that reopened.
    pub(super) fn drain<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> Result<(), Fate> {
        if self.buffer.is_some() {
            while let wanted = self.buffer.as_ref().map_or(0, |b| b.front().len())
                && wanted > 0
            {
                let asked = Tcb::may_go_up(cx, wanted);
                if asked == 0 {
                    self.went_up(cx, wanted, 0, 0);
                    break;
                }
                let Some(b) = &mut self.buffer else { break };
                match cx.fx.tcp_send(self.sock, b.front().get(..asked).unwrap_or(&[])) {
                    Ok(n) => {
                        b.consume(n.min(asked));
                        self.went_up(cx, wanted, asked, n.min(asked));
                        if n > 0 {
                            self.last_seen = cx.now;
                        }
                        if n < asked {
                            break;
                        }
                    }
                    Err(_) => {
                        self.abort(cx);
                        return Err(Fate::Closed);
                    }
                }
            }
            self.settle_buffer(cx.budget);
            if self.window_reopened(cx.budget, cx.path) {
                self.ack_now = true;
            }
            self.end_before_words(cx);
        }
        self.shut_if_done(cx)
    }

    /// Passes the guest's FIN on once everything before it is in the socket.
    pub(super) fn shut_if_done<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> Result<(), Fate> {
        if self.guest_fin && !self.shut && self.end_may_go() && self.sock_open {
            self.shut = true;
            // When the other direction is over too, the close that follows says it as well.
            if !(self.fin_sent && self.fin_acked) {
                cx.fx.tcp_shutdown(self.sock);
            }
        }
        self.close_if_done(cx)
    }

    /// Ends the flow when both directions are closed and acknowledged.
    pub(super) fn close_if_done<E: Effects>(&mut self, cx: &mut Ctx<'_, E>) -> Result<(), Fate> {
        if self.state == State::Open && self.shut && self.guest_is_gone() {
            self.finish(cx, Close::Graceful);
            return Err(Fate::Closed);
        }
        if self.state != State::Open || !self.shut || !self.fin_acked {
            return Ok(());
        }
        let undiscarded = std::mem::take(&mut self.undiscarded);
        if undiscarded > 0 {
            cx.fx.tcp_discard(self.sock, undiscarded as usize);
        }
        // The last ACK of the guest's FIN must not get lost with the record.
        if self.ack_pending || self.ack_now {
            self.send_ack(cx);
        }
        self.finish(cx, Close::Graceful);
        if !self.keeps_time_wait {
            return Err(Fate::Closed);
        }
        self.state = State::TimeWait;
        self.retry_at = None;
        self.last_seen = cx.now;
        Ok(())
    }

    /// Bytes that wait for the socket.
    pub(super) fn waiting(&self) -> usize {
        self.buffer.as_ref().map_or(0, |b| b.waiting())
    }

    /// Nothing of the guest waits for the socket, and nothing is to.
    #[inline]
    pub(super) fn is_direct(&self) -> bool {
        self.buffer.as_ref().is_none_or(|b| b.is_direct())
    }

    /// Accounts the buffer's size to the endpoint and frees it when empty.
    pub(super) fn settle_buffer(&mut self, budget: &mut Budget) {
        if let Some(b) = &mut self.buffer {
            b.settle(budget);
            if b.is_empty() {
                self.buffer = None;
            }
        }
    }

    pub(super) fn finish<E: Effects>(&mut self, cx: &mut Ctx<'_, E>, how: Close) {
        self.release(cx.fx, cx.budget, how);
    }

    pub(super) fn release<E: Effects>(&mut self, fx: &mut E, budget: &mut Budget, how: Close) {
        if let Some(mut b) = self.buffer.take() {
            b.clear();
            b.settle(budget);
        }
        self.drop_recovery(budget);
        if std::mem::take(&mut self.sock_open) {
            fx.close(self.sock, how);
        }
        self.retry_at = None;
        self.readable = false;
    }

    /// Peeks at the byte at `from`, which is not acknowledged; a failed socket ends the flow.
    pub(super) fn peek<E: Effects>(
        &mut self,
        cx: &mut Ctx<'_, E>,
        from: Seq,
        max: u32,
    ) -> Result<Peek, Fate> {
        let offset = from.since(self.snd_una).saturating_add(self.undiscarded);
        match cx.fx.tcp_peek(self.sock, offset as usize, max as usize) {
            Ok(peek) => Ok(peek),
            Err(_) => {
                self.abort(cx);
                Err(Fate::Closed)
            }
        }
    }
}
