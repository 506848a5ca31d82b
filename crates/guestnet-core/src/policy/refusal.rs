//! Theory of operation: what a guest is told when the policy refuses a packet of it. A refusal is never silent, as far as
//! the protocols have a word for it:
//!
//! | packet | answer |
//! |---|---|
//! | TCP | a reset from the address that it was sent to |
//! | a connect, where the policy says `refuse = "prohibited"` | ICMP 3/13 |
//! | TCP to an address that nothing may come from (loopback, reserved) | ICMP 3/13 |
//! | UDP, echo and other protocols | ICMP 3/13, "administratively prohibited"; ICMPv6 1/1 |
//! | anything to an address of the subnet that no guest has | as above, but "host unreachable" (ICMP 3/1, ICMPv6 1/3) |
//! | to a group or a broadcast address, an ICMP error, a later fragment | nothing: RFC 1122 3.2.2 forbids an answer |
//!
//! Systems report 3/13 to programs at once, also for UDP. They keep "host unreachable" to themselves there, and the
//! program would wait. ICMP errors are sent within the rate of the guest's port.

use crate::context::Context;
use crate::interface::effects::Effects;
use crate::interface::stats::DropReason;
use crate::l2::lan::Sender;
use crate::l3::icmp_error::IcmpError;
use crate::policy::spec::Refuse;
use crate::policy::verdict::{Request, RuleId};
use guestnet_wire::parse::Packet;
use guestnet_wire::tcp::{Tcp, flags};
use guestnet_wire::{icmp, proto};

impl<E: Effects> Context<'_, E> {
    /// Refuses a packet of a guest: tells the guest and the control side. Returns `reason`.
    pub(crate) fn deny(
        &mut self,
        from: Sender,
        frame: &[u8],
        p: &Packet,
        request: &Request,
        reason: DropReason,
        rule: RuleId,
    ) -> DropReason {
        self.report(from.slot, request, reason, rule);
        let by_icmp =
            self.policy.table(request.endpoint).is_some_and(|t| t.options().refuse == Refuse::Prohibited);
        self.answer_refused(from, frame, p, reason, by_icmp)
    }

    /// Tells a guest that a packet of it is refused. Returns `reason`.
    pub(crate) fn refuse(
        &mut self,
        from: Sender,
        frame: &[u8],
        p: &Packet,
        reason: DropReason,
    ) -> DropReason {
        self.answer_refused(from, frame, p, reason, false)
    }

    /// `by_icmp`: a connect is answered by ICMP, not by a reset.
    fn answer_refused(
        &mut self,
        from: Sender,
        frame: &[u8],
        p: &Packet,
        reason: DropReason,
        by_icmp: bool,
    ) -> DropReason {
        if let Some(segment) = segment(frame, p)
            && !(by_icmp && opens(&segment))
            && self.gateway.may_reset_from(&self.link, p.dst)
        {
            return self.gateway.reset(&mut self.link, from, p, &segment, reason);
        }
        let code = match reason {
            DropReason::NoEndpoint => icmp::unreachable::HOST,
            _ => icmp::unreachable::ADMIN_PROHIBITED,
        };
        self.gateway.icmp_error(&mut self.link, from, frame, p, IcmpError::unreachable(code));
        reason
    }
}

/// Whether a segment opens a connection. The sender of any other takes one for open, and ICMP would not end it.
fn opens(segment: &Tcp) -> bool {
    segment.flags & (flags::SYN | flags::ACK | flags::RST | flags::FIN) == flags::SYN
}

/// The TCP header of a packet.
fn segment(frame: &[u8], p: &Packet) -> Option<Tcp> {
    if p.proto != proto::TCP || p.fragment.is_some() {
        return None;
    }
    Tcp::parse(frame.get(p.l4..p.end)?).ok()
}
