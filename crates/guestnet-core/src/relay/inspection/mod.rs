//! Theory of operation: flows that a rule about a name admitted. Such a flow is opened to the host at once, but what its
//! conversation shows decides whether it goes on.
//!
//! - **TCP** ([`stream`]): the state machine holds back what the guest sends ([`crate::relay::tcp::Held`]), and reads
//!   nothing from the server where the verdict is strict. [`conversation`] reads the name of TLS, or the host of each
//!   request of HTTP/1. Allowed, the bytes go on, and a flow that shows no more names is an ordinary one from then on.
//! - **UDP** ([`datagrams`]): datagrams are held until the ClientHello of a QUIC connection is there, then sent in their
//!   order. Another connection from the same port is read anew.
//! - A guest has [`held_datagrams::WAIT_MS`] for a ClientHello or a request head, once the server has answered and once it has begun. One
//!   that says nothing shows no name. One that stops in the middle, or breaks the rules of the protocol, is refused:
//!   the server may understand what is not understood here.
//! - A refused flow hears why: TLS gets the alert access_denied, HTTP a response with status 403, other TCP a reset, and
//!   UDP an ICMP error. The server gets a reset, or the end of the requests that were allowed.
//! - **Evidence**: the names that are known of a flow are kept beside its record while it lives, and keep its pins alive. A
//!   change of the rules judges it again with what it has shown.
//!
//! Bounds: 64 KiB of a TCP flow and 32 KiB of a UDP flow are held back, within the guest's budget of buffered bytes. Only flows under rules about names
//! have anything here.

mod conversation;
mod datagrams;
pub(super) mod evidence;
mod held_datagrams;
mod refused;
mod stream;

use crate::context::Context;
use crate::interface::types::PortId;
use crate::policy::{Request, Shown, Verdict};
use crate::relay::Relay;
use crate::tables::flow::{Flow, Key, State};
use evidence::{Evidence, Inspection, text};
use held_datagrams::Datagrams;
use std::net::IpAddr;
use std::sync::Arc;

impl Relay {
    /// A flow of a guest to the outside is in the table: notes what is known of it by name. `inspect` is as in
    /// [`crate::policy::Admitted`].
    pub(super) fn note_evidence<E>(&mut self, cx: &mut Context<'_, E>, index: u32, inspect: Option<bool>) {
        let Some(f) = self.flows.at(index) else { return };
        let (Key { slot, remote, .. }, rule) = (f.key, f.rule);
        let is_tcp = matches!(f.state, State::Tcp(_));
        let name = cx.policy.pins.of(slot, remote.ip()).first().map(|n| text(n.as_bytes()));
        if name.is_none() && inspect.is_none() {
            return;
        }
        let holds_pins = name.is_some() && cx.policy.pins.hold(slot, remote.ip());
        let (inspection, datagrams) = match inspect {
            Some(strict) if is_tcp => (Some(Box::new(Inspection::new(rule, strict))), None),
            Some(_) => (None, Some(Box::new(Datagrams::new(rule)))),
            None => (None, None),
        };
        let evidence = Evidence { name, shown: None, holds_pins, inspection, datagrams };
        self.evidence.insert(index, Box::new(evidence));
    }

    /// A flow ends: gives what was known of it, the name of the address and the name that was shown.
    pub(super) fn drop_evidence<E>(
        &mut self,
        cx: &mut Context<'_, E>,
        slot: u32,
        remote: IpAddr,
        index: u32,
    ) -> (Option<Arc<str>>, Option<Arc<str>>) {
        if self.evidence.is_empty() {
            return (None, None);
        }
        let Some(mut known) = self.evidence.remove(&index) else { return (None, None) };
        if known.holds_pins {
            cx.policy.pins.release(slot, remote);
        }
        if let Some(inspection) = &mut known.inspection {
            self.charge_inspection(slot, inspection, 0);
        }
        if let Some(datagrams) = &known.datagrams {
            self.release_datagrams(slot, datagrams);
        }
        (known.name, known.shown.filter(|s| !s.is_empty()))
    }

    /// Judges a flow again, with what it has shown. A UDP flow with several connections is allowed if each of them is.
    pub(super) fn judge_flow<E>(&self, cx: &mut Context<'_, E>, index: u32, f: &Flow) -> (Request, Verdict) {
        let request = request_of(cx, f);
        let (slot, now) = (f.key.slot, cx.link.now);
        let mut judge = |name: &Arc<str>| {
            let shown = if name.is_empty() { Shown::Nothing } else { Shown::Name(name.as_bytes()) };
            cx.policy.judge_pinned(now, slot, &request, shown)
        };
        let evidence = self.evidence.get(&index);
        let names = evidence.and_then(|e| e.datagrams.as_ref()).map_or(&[][..], |d| &d.names);
        let denied = names.iter().map(&mut judge).find(|v| !matches!(v, Verdict::Allow { .. }));
        let verdict = match evidence.and_then(|e| e.shown.as_ref()) {
            _ if denied.is_some() => denied,
            Some(name) => Some(judge(name)),
            None => None,
        };
        let verdict = verdict.unwrap_or_else(|| match self.is_inspected(index) {
            true => cx.policy.judge_pinned(now, slot, &request, Shown::NotYet),
            false => cx.policy.judge_unread(now, slot, &request),
        });
        (request, verdict)
    }

    /// Whether what a flow shows is still read.
    pub(super) fn is_inspected(&self, index: u32) -> bool {
        let reads =
            |e: &Evidence| e.inspection.is_some() || e.datagrams.as_ref().is_some_and(|d| d.is_reading());
        self.evidence.get(&index).is_some_and(|e| reads(e))
    }

    /// What is known of a flow: the name of its address, and the name that it showed.
    pub(super) fn names_of(&self, index: u32) -> (Option<Arc<str>>, Option<Arc<str>>) {
        let known = self.evidence.get(&index);
        known.map_or((None, None), |e| (e.name.clone(), e.shown.clone().filter(|s| !s.is_empty())))
    }
}

/// What is asked of the policy about a flow.
pub(super) fn request_of<E>(cx: &Context<'_, E>, f: &Flow) -> Request {
    let key = &f.key;
    let (source, destination) =
        if f.direction.is_inbound() { (key.remote, key.guest) } else { (key.guest, key.remote) };
    let endpoint = cx.link.lan.port(key.slot).map_or(PortId(u32::MAX), |p| p.id);
    Request { direction: f.direction, endpoint, protocol: key.proto, source, destination }
}
