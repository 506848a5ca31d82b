//! Theory of operation: how a response reaches its client: filtered by the rules of its guest, written behind the others of
//! the batch, or to the client's connection.

use super::DnsForwarder;
use super::guard::Filtered;
use super::pending::{Client, Waiter};
use super::replies::{Replies, Tally};
use crate::interface::effects::Effects;
use crate::interface::types::Time;
use guestnet_wire::dns::{Answer, Query};

impl DnsForwarder {
    /// Sends a client its response, which `emit` appends: the one place where a guest's response is seen. `waited`: the
    /// client was waiting for it.
    pub(super) fn deliver<E: Effects>(
        &mut self,
        now: Time,
        client: Client,
        waited: bool,
        tally: Tally,
        fx: &mut E,
        emit: impl FnOnce(bool, &mut Vec<u8>),
    ) {
        let at = self.replies.begin(client);
        emit(client.is_tcp(), &mut self.replies.bytes);
        self.replies.finish(at, client, tally);
        self.pass_on(now, waited, fx);
    }

    /// Sends a client that waits the answer to its query, as the rules of its guest allow it.
    pub(super) fn deliver_answer<E: Effects>(
        &mut self,
        now: Time,
        w: &Waiter,
        name: &[u8],
        own: bool,
        answer: (&Answer, &[u8]),
        fx: &mut E,
    ) {
        self.send_answer(now, w, true, name, own, answer, fx);
    }

    #[allow(clippy::too_many_arguments)] // The client, and the answer.
    pub(super) fn send_answer<E: Effects>(
        &mut self,
        now: Time,
        w: &Waiter,
        waited: bool,
        name: &[u8],
        own: bool,
        (shape, message): (&Answer, &[u8]),
        fx: &mut E,
    ) {
        let filtered = match self.guard.watches(w.client.port()) {
            true => self.guard.filter(w.client.port(), name, own, shape, message),
            false => Filtered::Same,
        };
        self.deliver(now, w.client, waited, Tally::Nothing, fx, |tcp, out| match &filtered {
            Filtered::Same => emit(&w.query(), shape, message, tcp, out),
            Filtered::Other(shape, message) => emit(&w.query(), shape, message, tcp, out),
            Filtered::Refused(refusal) => w.query().respond(refusal.rcode, 0, &refusal.explanation, out),
        });
    }

    /// Writes the last reply to its connection, where it is for one.
    pub(super) fn pass_on<E: Effects>(&mut self, now: Time, waited: bool, fx: &mut E) {
        let Some(last) = self.replies.list.last_mut() else { return };
        if let Client::Stream { sock, serial, .. } = last.client {
            let at = std::mem::replace(&mut last.at, 0..0);
            let framed = self.replies.bytes.get(at.clone()).unwrap_or(&[]);
            self.streams.send(now, sock, serial, framed, waited, fx);
            self.replies.bytes.truncate(at.start);
        }
    }

    pub(crate) fn has_replies(&self) -> bool {
        !self.replies.is_empty()
    }

    /// The responses that are to be sent; given back when they are.
    pub(crate) fn take_replies(&mut self) -> Replies {
        std::mem::take(&mut self.replies)
    }

    pub(crate) fn give_back(&mut self, mut replies: Replies) {
        replies.clear();
        self.replies = replies;
    }
}

/// Appends the response to a query.
fn emit(q: &Query<'_>, shape: &Answer, message: &[u8], tcp: bool, out: &mut Vec<u8>) {
    let records = message.get(shape.question.end..shape.end).unwrap_or(&[]);
    let explanation = message.get(shape.explanation.clone()).unwrap_or(&[]);
    shape.emit(q, records, explanation, 0, q.largest(tcp), out);
}
