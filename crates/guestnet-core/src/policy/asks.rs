//! Theory of operation: flows whose rule says "ask". The first packet of such a flow is held, a question with a ticket goes
//! to the control side, and other packets of the flow wait for the answer as it does: they are dropped, and their sender
//! sends them again. With the answer, or after a deadline without one, the held packet is handled as if it had just come;
//! the answer is in force while that happens ([`Asks::answer`]). So an allowed flow is opened in the ordinary way, and a
//! refused one is refused in the ordinary way.
//!
//! Bounds: [`ASKS_MAX`] questions in all, a quarter of what is left for one guest. A packet over [`FRAME_MAX`] bytes is not
//! held; its sender sends it again.

use crate::interface::types::{PortId, Time};
use crate::policy::verdict::{Request, Ticket};
use guestnet_wire::parse::Packet;
use guestnet_wire::{checksum, proto, put};
use std::net::SocketAddr;

/// Open questions of a network.
pub const ASKS_MAX: usize = 1024;
/// Bytes of a packet that is held.
pub const FRAME_MAX: usize = 2048;

/// What identifies a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Flow {
    slot: u32,
    protocol: u8,
    guest: SocketAddr,
    remote: SocketAddr,
}

impl Flow {
    fn new(slot: u32, r: &Request) -> Flow {
        Flow { slot, protocol: r.protocol, guest: r.source, remote: r.destination }
    }
}

/// A question.
#[derive(Debug)]
pub struct Ask {
    /// Names it.
    pub ticket: Ticket,
    /// The guest's port.
    pub port: PortId,
    /// The packet that is held, whose transport checksum is complete.
    pub frame: Option<Box<[u8]>>,
    flow: Flow,
    deadline: Time,
}

/// What is known of a flow that a rule asks about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// Nothing: the question is new.
    New,
    /// The answer is awaited.
    Open,
    /// The owner allows it, or does not.
    Answered(bool),
}

/// All questions of a network.
#[derive(Debug, Default)]
pub struct Asks {
    list: Vec<Ask>,
    tickets: u64,
    /// The answer that is in force while a held packet is handled.
    answer: Option<(Flow, bool)>,
}

impl Asks {
    /// What is known of a flow.
    #[must_use]
    pub fn state(&self, slot: u32, request: &Request) -> Asked {
        let flow = Flow::new(slot, request);
        match self.answer {
            Some((answered, allow)) if answered == flow => Asked::Answered(allow),
            _ if self.list.iter().any(|a| a.flow == flow) => Asked::Open,
            _ => Asked::New,
        }
    }

    /// Opens a question about a flow whose first packet is `frame`. `None`: there are too many.
    pub fn open(
        &mut self,
        slot: u32,
        request: &Request,
        frame: &[u8],
        p: &Packet,
        deadline: Time,
    ) -> Option<Ticket> {
        let of_guest = self.list.iter().filter(|a| a.flow.slot == slot).count();
        let left = ASKS_MAX.saturating_sub(self.list.len());
        if of_guest >= left.div_ceil(4).min(ASKS_MAX / 4) {
            return None;
        }
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        let frame = (frame.len() <= FRAME_MAX).then(|| complete(frame, p));
        self.list.push(Ask {
            ticket,
            port: request.endpoint,
            frame,
            flow: Flow::new(slot, request),
            deadline,
        });
        Some(ticket)
    }

    /// Takes a question out, with its answer.
    pub fn take(&mut self, ticket: Ticket, port: PortId) -> Option<Ask> {
        let at = self.list.iter().position(|a| a.ticket == ticket && a.port == port)?;
        Some(self.list.remove(at))
    }

    /// Takes out the oldest question that nobody has answered in time.
    pub fn take_expired(&mut self, now: Time) -> Option<Ask> {
        let at = self.list.iter().position(|a| a.deadline <= now)?;
        Some(self.list.remove(at))
    }

    /// Takes out the questions of a port that was removed.
    pub fn remove_port(&mut self, slot: u32) -> Vec<Ask> {
        let (gone, kept) = std::mem::take(&mut self.list).into_iter().partition(|a| a.flow.slot == slot);
        self.list = kept;
        gone
    }

    /// The answer to a question is in force from now on, until [`Asks::forget_answer`].
    pub fn answer(&mut self, ask: &Ask, allow: bool) {
        self.answer = Some((ask.flow, allow));
    }

    /// No answer is in force any more.
    pub fn forget_answer(&mut self) {
        self.answer = None;
    }

    /// The next deadline.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        self.list.iter().map(|a| a.deadline).min()
    }
}

/// A copy of a frame with its transport checksum, which a guest may have left to others.
fn complete(frame: &[u8], p: &Packet) -> Box<[u8]> {
    let mut frame: Box<[u8]> = frame.into();
    let (at, pseudo) = match p.proto {
        proto::TCP => (16, true),
        proto::UDP => (6, true),
        proto::ICMP => (2, false),
        proto::ICMPV6 => (2, true),
        _ => return frame,
    };
    let at = p.l4 + at;
    let Some(length) = p.end.checked_sub(p.l4).and_then(|n| u32::try_from(n).ok()) else { return frame };
    put(&mut frame, at, &[0, 0]);
    let start = if pseudo { checksum::pseudo(p.src, p.dst, p.proto, length) } else { 0 };
    let sum = checksum::finish(checksum::sum(frame.get(p.l4..p.end).unwrap_or(&[]), start));
    // Zero means none in UDP.
    let sum = if p.proto == proto::UDP && sum == 0 { 0xffff } else { sum };
    put(&mut frame, at, &sum.to_be_bytes());
    frame
}
