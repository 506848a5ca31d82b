//! The records of inspection: what is known of a flow by name, and what its conversation is read for.

use super::conversation::Conversation;
use super::held_datagrams::Datagrams;
use crate::policy::{Generation, RuleId};
use std::sync::Arc;

/// What is known of a flow by name.
#[derive(Debug, Default)]
pub(crate) struct Evidence {
    /// A name for which the guest got the address of the other side.
    pub name: Option<Arc<str>>,
    /// The name that the conversation showed last; an empty one: that it showed none.
    pub shown: Option<Arc<str>>,
    /// The pins of the address live as long as the flow.
    pub(super) holds_pins: bool,
    /// TCP: it is read on.
    pub(super) inspection: Option<Box<Inspection>>,
    /// UDP: its datagrams are read.
    pub(super) datagrams: Option<Box<Datagrams>>,
}

/// What a flow's conversation is read for.
#[derive(Debug)]
pub(crate) struct Inspection {
    pub(super) conversation: Conversation,
    /// The server's bytes are held back too until a name is allowed.
    pub(super) strict: bool,
    /// The rule that would admit it.
    pub(super) rule: RuleId,
    /// The rules that judged the name that was shown last.
    pub(super) judged: Option<Generation>,
    /// Memory that is charged to the guest's budget.
    pub(super) charged: usize,
}

impl Inspection {
    /// The inspection of a flow that `rule` would admit.
    pub fn new(rule: RuleId, strict: bool) -> Inspection {
        Inspection { conversation: Conversation::new(), strict, rule, judged: None, charged: 0 }
    }
}

/// A name for people and programs.
pub(super) fn text(name: &[u8]) -> Arc<str> {
    String::from_utf8_lossy(name).into()
}
