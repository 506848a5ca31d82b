//! Theory of operation: responses that are to be sent, one behind the other in one buffer. Responses for a connection have
//! their length in front.

use super::pending::Client;
use guestnet_wire::dns::{self, ede};
use std::ops::Range;

/// What a response says of how its query fared, for the counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tally {
    Nothing,
    /// The guest was over its share.
    Refused,
    /// No name server responded, or the authority did not.
    Unanswered,
    /// The question to the authority was lost, for want of room.
    Lost,
}

/// A response.
pub(crate) struct Reply {
    pub(crate) client: Client,
    /// Where it is; nothing for a connection, which has it already.
    pub(super) at: Range<usize>,
    pub(crate) tally: Tally,
}

/// Responses that are to be sent.
#[derive(Default)]
pub(crate) struct Replies {
    pub(super) bytes: Vec<u8>,
    pub(super) list: Vec<Reply>,
}

impl Replies {
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Reply, &[u8])> {
        self.list.iter().map(|r| (r, self.bytes.get(r.at.clone()).unwrap_or(&[])))
    }

    pub(crate) fn clear(&mut self) {
        self.bytes.clear();
        self.list.clear();
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }
}

impl Replies {
    /// Where a response to the client begins.
    pub(super) fn begin(&mut self, client: Client) -> usize {
        let at = self.bytes.len();
        if client.is_tcp() {
            self.bytes.extend_from_slice(&[0, 0]);
        }
        at
    }

    /// The response is written.
    pub(super) fn finish(&mut self, at: usize, client: Client, tally: Tally) {
        if client.is_tcp() {
            let length = self.bytes.len().saturating_sub(at + 2) as u16;
            guestnet_wire::put(&mut self.bytes, at, &length.to_be_bytes());
        }
        self.list.push(Reply { client, at: at..self.bytes.len(), tally });
    }
}

/// Why a name without the search domain fails.
pub(super) fn searched_fails() -> Vec<u8> {
    dns::explain(ede::OTHER, "the name without the search domain cannot be resolved now")
}
