//! Theory of operation: what a handler of flows sees besides its own state. [`Layers`] holds the components that all flows
//! use: the switch, the gateway and the policy. A call into a relay, the DNS forwarder or the uplink lends them out as a
//! [`Context`], together with the time and the effects.
//!
//! The fields are disjoint, so that a handler can use one while it holds another:
//!
//! ```text
//! cx.gateway.refuse(&mut cx.link, from, frame, p, why, error)     // layer 3 uses layer 2
//! cx.link.lan.count_drop(slot, why)                               // layer 2 alone
//! cx.policy.judge(&request)                                       // policy needs nothing else
//! cx.outbound(from, frame, p, remote)                             // a question that needs them all (policy::admission)
//! cx.link.fx.udp_send(...)                                        // the outside
//! ```
//!
//! Rules:
//! - Layer 2 ([`Lan`]) knows nothing of the layers above it; it reports to them by return values and notices.
//! - Layer 3 ([`Gateway`]) gets a [`Link`] and no more.
//! - Handlers of flows get a `Context` and do not see each other. Where one has to go on with the work of another, it
//!   returns what is to be done, and [`crate::network::Network`] passes that on.

use crate::interface::config::NetworkConfig;
use crate::interface::types::Time;
use crate::l2::lan::{Lan, Link};
use crate::l3::gateway::Gateway;
use crate::policy::Policy;

/// The components that all flows use.
pub(crate) struct Layers {
    /// Layer 2.
    pub lan: Lan,
    /// Layer 3.
    pub gateway: Gateway,
    /// What is allowed.
    pub policy: Policy,
}

/// What a handler of flows sees besides its own state, for one call. See the module head.
pub(crate) struct Context<'a, E> {
    /// Layer 2, the time and the effects.
    pub link: Link<'a, E>,
    /// Layer 3.
    pub gateway: &'a mut Gateway,
    /// What is allowed.
    pub policy: &'a mut Policy,
}

impl Layers {
    /// The layers of a network without ports.
    #[must_use]
    pub fn new(config: &NetworkConfig) -> Layers {
        let (mut lan, policy) = (Lan::new(config), Policy::new(config));
        lan.set_asks(!policy.guests_pass());
        Layers { lan, gateway: Gateway::new(config), policy }
    }

    /// All layers for one call.
    #[inline]
    pub fn context<'a, E>(&'a mut self, now: Time, fx: &'a mut E) -> Context<'a, E> {
        Context {
            link: Link { now, lan: &mut self.lan, fx },
            gateway: &mut self.gateway,
            policy: &mut self.policy,
        }
    }
}
