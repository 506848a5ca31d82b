//! Theory of operation: a flow that cannot be opened yet is pending. It waits for one thing ([`Awaits`]) until a
//! deadline, and is known by a [`Ticket`]. Then what it waits for comes ([`PendingFlows::resolve`]), or the deadline
//! does ([`PendingFlows::expired`]). A flow that ends by itself stays pending until then, and nothing goes on.
//!
//! Bounds: all guests together have `cap` pending flows. One guest has a quarter of them at most, and no more than
//! it leaves to others, so that a guest that answers nothing does not keep others' clients from waiting. Of the
//! packets for one destination four are kept (RFC 1122 2.3.2.2 asks for at least one).

use crate::interface::types::{FlowId, Time};
use crate::policy::verdict::Ticket;
use std::net::IpAddr;

/// Packets that wait for the same thing.
const PACKETS: usize = 4;

/// What a pending flow waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Awaits {
    /// The link-layer address of a guest, which ARP asks for.
    Neighbour(IpAddr),
}

/// What goes on when the wait is over.
#[derive(Debug, PartialEq, Eq)]
pub enum Held {
    /// Nothing yet: the ticket has been given out, and the flow is about to be opened.
    Reserved,
    /// A flow of the flow table that has sent nothing to its guest.
    Flow(FlowId),
    /// A frame for the guest, which lacks the destination MAC.
    Frame(Box<[u8]>),
}

/// A flow that waits.
#[derive(Debug)]
pub struct Pending {
    /// Its name.
    pub ticket: Ticket,
    /// Slot of the guest's port.
    pub slot: u32,
    /// What it waits for.
    pub awaits: Awaits,
    /// When it is given up.
    pub deadline: Time,
    /// What goes on then.
    pub held: Held,
}

/// There are too many pending flows, of the guest or in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooMany;

/// All pending flows of a network.
#[derive(Debug)]
pub struct PendingFlows {
    list: Vec<Pending>,
    cap: usize,
    tickets: u64,
}

impl PendingFlows {
    /// None; at most `cap` may wait.
    #[must_use]
    pub fn new(cap: u32) -> PendingFlows {
        PendingFlows { list: Vec::new(), cap: cap as usize, tickets: 0 }
    }

    /// Makes a flow pending.
    ///
    /// # Errors
    /// [`TooMany`]; nothing has changed then.
    pub fn defer(
        &mut self,
        slot: u32,
        awaits: Awaits,
        deadline: Time,
        held: Held,
    ) -> Result<Ticket, TooMany> {
        let of_guest = self.list.iter().filter(|p| p.slot == slot).count();
        let left = self.cap.saturating_sub(self.list.len());
        if of_guest >= self.cap.div_ceil(4).min(left) {
            return Err(TooMany);
        }
        if matches!(held, Held::Frame(_)) && self.packets(awaits) >= PACKETS {
            return Err(TooMany);
        }
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        self.list.push(Pending { ticket, slot, awaits, deadline, held });
        Ok(ticket)
    }

    /// Says what goes on for a ticket.
    ///
    /// # Errors
    /// [`TooMany`] packets wait for the same thing. The ticket has been given back then.
    pub fn attach(&mut self, ticket: Ticket, held: Held) -> Result<(), TooMany> {
        let Some(awaits) = self.list.iter().find(|p| p.ticket == ticket).map(|p| p.awaits) else {
            return Ok(());
        };
        if matches!(held, Held::Frame(_)) && self.packets(awaits) >= PACKETS {
            self.cancel(ticket);
            return Err(TooMany);
        }
        if let Some(p) = self.list.iter_mut().find(|p| p.ticket == ticket) {
            p.held = held;
        }
        Ok(())
    }

    fn packets(&self, awaits: Awaits) -> usize {
        self.list.iter().filter(|p| p.awaits == awaits && matches!(p.held, Held::Frame(_))).count()
    }

    /// Gives a ticket back.
    pub fn cancel(&mut self, ticket: Ticket) {
        self.list.retain(|p| p.ticket != ticket);
    }

    /// Takes out what has waited for this, oldest first.
    pub fn resolve(&mut self, awaits: Awaits) -> Vec<Pending> {
        self.take(|p| p.awaits == awaits)
    }

    /// Takes out what is pending for a guest's port, oldest first.
    pub fn remove_port(&mut self, slot: u32) -> Vec<Pending> {
        self.take(|p| p.slot == slot)
    }

    /// Takes out what has waited in vain, oldest first.
    pub fn expired(&mut self, now: Time) -> Vec<Pending> {
        self.take(|p| p.deadline <= now)
    }

    fn take(&mut self, fits: impl Fn(&Pending) -> bool) -> Vec<Pending> {
        if !self.list.iter().any(&fits) {
            return Vec::new();
        }
        let (out, rest) = std::mem::take(&mut self.list).into_iter().partition(fits);
        self.list = rest;
        out
    }

    /// The next deadline.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        self.list.iter().map(|p| p.deadline).min()
    }

    /// How many are pending.
    #[must_use]
    pub fn count(&self) -> usize {
        self.list.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn at(last: u8) -> Awaits {
        Awaits::Neighbour(IpAddr::V4(Ipv4Addr::new(192, 168, 64, last)))
    }

    const LATER: Time = Time(5);

    #[test]
    fn a_guest_has_a_quarter_and_leaves_as_much_as_it_has() {
        let mut pending = PendingFlows::new(16);
        let defer = |p: &mut PendingFlows, slot: u32| p.defer(slot, at(2), LATER, Held::Reserved).is_ok();
        assert_eq!((0..10).filter(|_| defer(&mut pending, 0)).count(), 4);
        for (slot, most) in [(1, 4), (2, 4), (3, 2), (4, 1), (5, 1), (6, 0)] {
            let got = (0..10).filter(|_| defer(&mut pending, slot)).count();
            assert_eq!(got, most, "guest {slot}");
        }
        assert_eq!(pending.count(), 16);
        assert_eq!(pending.remove_port(0).len(), 4);
        assert!(defer(&mut pending, 6));
    }

    #[test]
    fn four_packets_wait_for_a_destination() {
        let mut pending = PendingFlows::new(100);
        let frame = || Held::Frame([1, 2].into());
        let mut defer = |last| pending.defer(0, at(last), LATER, frame()).is_ok();
        assert_eq!((0..10).filter(|_| defer(2)).count(), 4);
        assert!(defer(3));
        let ticket = pending.defer(0, at(2), LATER, Held::Reserved).unwrap();
        assert_eq!(pending.attach(ticket, frame()), Err(TooMany));
        assert_eq!(pending.count(), 5, "the ticket was given back");
    }

    #[test]
    fn a_pending_flow_goes_on_once_or_is_given_up() {
        let mut pending = PendingFlows::new(100);
        let flow = |index| Held::Flow(FlowId { index, generation: 0 });
        let mut defer = |last, deadline| pending.defer(0, at(last), Time(deadline), Held::Reserved).unwrap();
        let tickets = [defer(2, 5), defer(3, 3), defer(2, 9), defer(4, 7)];
        for (ticket, index) in tickets.into_iter().zip(1..) {
            pending.attach(ticket, flow(index)).unwrap();
        }
        assert_eq!(pending.next_deadline(), Some(Time(3)));
        pending.cancel(tickets[3]);
        let flows = |list: Vec<Pending>| list.into_iter().map(|p| p.held).collect::<Vec<_>>();
        assert_eq!(flows(pending.resolve(at(2))), [flow(1), flow(3)]);
        assert_eq!(flows(pending.resolve(at(2))), []);
        assert_eq!(flows(pending.expired(Time(2))), []);
        assert_eq!(flows(pending.expired(Time(3))), [flow(2)]);
        assert_eq!((pending.count(), pending.next_deadline()), (0, None));
    }
}
