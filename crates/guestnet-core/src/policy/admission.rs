//! Theory of operation: how flows are admitted. Whoever is about to open a flow asks here, once, and gets back where
//! the flow goes or why it is refused. A refusal has been reported to the control side then, and the guest that opens
//! the flow has been told ([`super::refusal`]).
//!
//! - [`Context::outbound`]: a guest opens a flow to the outside, relayed or translated.
//! - [`Context::inbound`]: the outside opens a flow to a guest. It is deferred while the guest's MAC is not known.
//! - [`Context::between_guests`]: a guest sends to another guest. Asked for each packet where rules can deny such flows,
//!   since there is no flow record; the conversations that were admitted are remembered.

use crate::context::Context;
use crate::interface::effects::{Effects, Event, PolicyAsk};
use crate::interface::stats::DropReason;
use crate::interface::types::{FrameMeta, PortId};
use crate::l2::lan::Sender;
use crate::l3::gateway::Refusal;
use crate::policy::asks::Asked;
use crate::policy::conversations::{PER_GUEST, Tuple};
use crate::policy::pending::{Awaits, Held};
use crate::policy::sweep::Budget;
use crate::policy::table::Shown;
use crate::policy::verdict::{Direction, Entry, Request, RuleId, Ticket, Verdict};
use crate::tables::neighbour::Binding;
use guestnet_wire::parse::Packet;
use guestnet_wire::proto;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// A flow of a guest to the outside that may be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Admitted {
    /// Where it leads.
    pub target: SocketAddr,
    /// The rule that decided.
    pub rule: RuleId,
    /// What the conversation shows decides whether the flow goes on; true: no byte passes before.
    pub inspect: Option<bool>,
}

/// What a guest's conversations count in a step of a sweep.
const CONVERSATIONS: u32 = PER_GUEST as u32;

impl<E: Effects> Context<'_, E> {
    /// Asks about a new flow of a guest to the outside, and returns where it leads and by which rule.
    ///
    /// # Errors
    /// Why it is refused; the guest has been told.
    pub fn outbound(
        &mut self,
        from: Sender,
        frame: &[u8],
        p: &Packet,
        remote: SocketAddr,
    ) -> Result<Admitted, DropReason> {
        let port = self.link.lan.port(from.slot).ok_or(DropReason::NoEndpoint)?;
        let request = Request {
            direction: Direction::Outbound,
            endpoint: port.id,
            protocol: p.proto,
            source: SocketAddr::new(p.src, p.src_port),
            destination: remote,
        };
        let (target, rule, inspect) =
            match self.policy.judge_pinned(self.link.now, from.slot, &request, Shown::NotYet) {
                Verdict::Allow { target, rule } => (target, rule, None),
                Verdict::Inspect { target, rule, strict } => (target, rule, Some(strict)),
                Verdict::Deny { reason, rule } => {
                    return Err(self.deny(from, frame, p, &request, reason, rule));
                }
                Verdict::Ask { target, rule } => (target, rule, self.ask(from, frame, p, &request, rule)?),
                Verdict::Defer { .. } => return Err(DropReason::Policy),
            };
        self.gateway.check_ttl(&mut self.link, from, frame, p)?;
        Ok(Admitted { target, rule, inspect })
    }

    /// Asks the owner about a flow, or finds the answer. Returns how the flow is inspected when the owner allows it.
    ///
    /// # Errors
    /// Why it does not go on now: the owner is asked, or has refused it. The guest has been told of a refusal.
    #[cold]
    fn ask(
        &mut self,
        from: Sender,
        frame: &[u8],
        p: &Packet,
        request: &Request,
        rule: RuleId,
    ) -> Result<Option<bool>, DropReason> {
        match self.policy.asks.state(from.slot, request) {
            Asked::Open => return Err(DropReason::AwaitingDecision),
            Asked::Answered(true) => return Ok(self.policy.inspects_after_asking(request, rule)),
            Asked::Answered(false) => {}
            Asked::New => {
                let seconds = self.policy.table(request.endpoint).map_or(0, |t| t.options().ask_s);
                let deadline = self.link.now.plus_s(seconds.into());
                if let Some(ticket) = self.policy.asks.open(from.slot, request, frame, p, deadline) {
                    let ip = request.destination.ip();
                    let asked = PolicyAsk {
                        ticket: ticket.0,
                        port: request.endpoint,
                        proto: request.protocol,
                        guest: request.source,
                        remote: request.destination,
                        rule: self.policy.label(request.endpoint, rule),
                        name: self.policy.pins.of(from.slot, ip).first().map(|n| n.to_string().into()),
                    };
                    if self.link.fx.event(Event::PolicyAsk(Box::new(asked))) {
                        return Err(DropReason::AwaitingDecision);
                    }
                    let _not_asked = self.policy.asks.take(ticket, request.endpoint);
                    self.link.lan.count_drop(from.slot, DropReason::EventRingFull);
                }
            }
        }
        Err(self.deny(from, frame, p, request, DropReason::Policy, rule))
    }

    /// Asks about a new flow from the outside to the guest with `binding`. It is deferred while the guest's MAC is not
    /// known; then the flow may be opened, but nothing is sent to the guest before the pending flow goes on. A denial has
    /// been reported.
    pub fn inbound(
        &mut self,
        entry: Entry,
        protocol: u8,
        client: SocketAddr,
        guest: SocketAddr,
        binding: &Binding,
    ) -> Verdict {
        match self.judge_inbound(entry, protocol, client, guest, binding.slot) {
            Verdict::Allow { rule, .. } if binding.mac.is_none() => {
                match self.await_neighbour(binding.slot, guest.ip(), Held::Reserved) {
                    Ok(ticket) => Verdict::Defer { ticket },
                    Err(reason) => Verdict::Deny { reason, rule },
                }
            }
            verdict => verdict,
        }
    }

    /// Asks about a new flow from the outside to the guest on the port in `slot`. A denial has been reported.
    pub fn judge_inbound(
        &mut self,
        entry: Entry,
        protocol: u8,
        client: SocketAddr,
        guest: SocketAddr,
        slot: u32,
    ) -> Verdict {
        let (direction, endpoint) = (Direction::Inbound(entry), self.endpoint(slot));
        let request = Request { direction, endpoint, protocol, source: client, destination: guest };
        let verdict = self.policy.judge(&request);
        if let Verdict::Deny { reason, rule } = verdict {
            self.report(slot, &request, reason, rule);
        }
        verdict
    }

    /// Has something wait until the guest with an address answers ARP.
    ///
    /// # Errors
    /// [`DropReason::RateLimit`] when too much waits already.
    pub fn await_neighbour(&mut self, slot: u32, ip: IpAddr, held: Held) -> Result<Ticket, DropReason> {
        let until = self.link.lan.probe(self.link.now, slot, ip, self.link.fx);
        let deferred = self.policy.pending.defer(slot, Awaits::Neighbour(ip), until, held);
        deferred.map_err(|_| DropReason::RateLimit)
    }

    /// Asks about a packet of a guest to another one, on the port in slot `to`, or to several. To be called where
    /// [`crate::policy::Policy::guests_pass`] does not hold.
    ///
    /// # Errors
    /// Why it is refused; the guest has been told.
    #[cold]
    pub fn between_guests(
        &mut self,
        from: Sender,
        to: Option<u32>,
        frame: &[u8],
        p: &Packet,
    ) -> Result<(), DropReason> {
        // As ARP, which it is in IPv6. A refusal would be told late without the neighbour's address.
        let kind = frame.get(p.l4).copied().unwrap_or(0);
        if p.proto == proto::ICMPV6 && matches!(kind, NEIGHBOUR_SOLICITATION | NEIGHBOUR_ADVERTISEMENT) {
            return Ok(());
        }
        let (src, dst) = (SocketAddr::new(p.src, p.src_port), SocketAddr::new(p.dst, p.dst_port));
        let tuple = Tuple { protocol: p.proto, opener: src, other: dst };
        let generation = self.policy.generation();
        let known = &mut self.policy.conversations;
        let (opener, opened) = if known.knows(from.slot, &tuple, generation) {
            (from.slot, tuple)
        } else if let Some(to) = to.filter(|to| known.knows(*to, &tuple.reversed(), generation)) {
            (to, tuple.reversed())
        } else {
            let request = tuple.request(self.endpoint(from.slot));
            let to = to.map(|to| self.endpoint(to));
            if let Verdict::Deny { reason, rule } = self.policy.judge_between(&request, to) {
                return Err(self.deny(from, frame, p, &request, reason, rule));
            }
            self.policy.conversations.note(from.slot, tuple, generation);
            (from.slot, tuple)
        };
        // The other fragments of a packet have no ports.
        if p.fragment.is_some_and(|f| f.offset == 0) {
            self.policy.conversations.note(opener, opened.without_ports(), generation);
        }
        Ok(())
    }

    /// Routes a packet on to another guest of the subnet, if the policy lets it pass. `Ok(true)`: it was sent. `Ok(false)`:
    /// it is not for a guest.
    ///
    /// # Errors
    /// Why it cannot be sent; the guest has been told.
    pub fn route_to_guest(
        &mut self,
        from: Sender,
        frame: &mut [u8],
        p: &Packet,
        meta: FrameMeta,
    ) -> Result<bool, DropReason> {
        if !self.policy.guests_pass() {
            let addressing = self.link.lan.addressing();
            if addressing.subnet().is_host(p.dst) && !addressing.is_own(p.dst) {
                let to = self.link.lan.neighbour(p.dst).map(|b| b.slot);
                self.between_guests(from, to, frame, p)?;
            }
        }
        self.gateway.route_to_guest(&mut self.link, from, frame, p, meta)
    }

    /// Judges again what guests say to each other, guest by guest from `slot` on. Returns where to go on, or `None` at the
    /// end.
    pub fn judge_conversations(&mut self, slot: u32, budget: &mut Budget) -> Option<u32> {
        let mut slot = slot;
        while let Some(opener) = self.policy.conversations.next_guest(slot) {
            if !budget.visit_many(CONVERSATIONS) {
                return Some(opener);
            }
            let endpoint = self.endpoint(opener);
            // Taken out, so that the rules can be asked.
            let mut conversations = self.policy.conversations.take();
            let (policy, lan) = (&*self.policy, &*self.link.lan);
            let allowed = |t: &Tuple| {
                let to = lan.neighbour(t.other.ip()).and_then(|b| lan.port(b.slot)).map(|p| p.id);
                matches!(policy.judge_between(&t.request(endpoint), to), Verdict::Allow { .. })
            };
            budget.done += conversations.judge_again(opener, policy.generation(), allowed);
            self.policy.conversations = conversations;
            slot = opener + 1;
        }
        None
    }

    /// Reports a flow that was cut because the rules no longer allow it.
    pub fn report(&mut self, slot: u32, request: &Request, reason: DropReason, rule: RuleId) {
        let name = match request.direction {
            Direction::Outbound => self.policy.pins.of(slot, request.destination.ip()).first(),
            Direction::Inbound(_) | Direction::BetweenGuests => None,
        };
        let name = name.map(|n| n.to_string().into());
        self.report_names(slot, request, reason, rule, name, None);
    }

    /// As [`Context::report`], with what is known by name: what the guest asked for, and what the conversation showed.
    pub fn report_names(
        &mut self,
        slot: u32,
        request: &Request,
        reason: DropReason,
        rule: RuleId,
        name: Option<Arc<str>>,
        shown: Option<Arc<str>>,
    ) {
        let (guest, remote) = match request.direction {
            Direction::Inbound(_) => (request.destination, request.source),
            Direction::Outbound | Direction::BetweenGuests => (request.source, request.destination),
        };
        let (direction, proto) = (request.direction, request.protocol);
        let refused = Refusal { direction, proto, guest, remote, name, shown };
        let label = self.policy.label(request.endpoint, rule);
        self.gateway.report_denied(&mut self.link, slot, refused, Some(label), reason);
    }

    fn endpoint(&self, slot: u32) -> PortId {
        self.link.lan.port(slot).map_or(PortId(u32::MAX), |p| p.id)
    }
}

/// ICMPv6 messages of neighbour discovery (RFC 4861).
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
