//! What is known of some flows besides their records: the name for which the guest got the address of the other side, and
//! the name that the conversation showed. Flows that no name decides about have none.

use crate::context::Context;
use crate::relay::Relay;
use std::net::IpAddr;
use std::sync::Arc;

/// What is known of a flow by name.
#[derive(Debug, Default)]
pub(super) struct Evidence {
    /// A name for which the guest got the address of the other side.
    pub name: Option<Arc<str>>,
    /// The name that the conversation showed last.
    pub shown: Option<Arc<str>>,
}

impl Relay {
    /// A flow ends: gives what was known of it, the name of the address and the name that was shown.
    pub(super) fn drop_evidence<E>(
        &mut self,
        _cx: &mut Context<'_, E>,
        _slot: u32,
        _remote: IpAddr,
        index: u32,
    ) -> (Option<Arc<str>>, Option<Arc<str>>) {
        if self.evidence.is_empty() {
            return (None, None);
        }
        let known = self.evidence.remove(&index).map(|e| *e).unwrap_or_default();
        (known.name, known.shown)
    }
}
