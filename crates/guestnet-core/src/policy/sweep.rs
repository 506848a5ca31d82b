//! Theory of operation: after a change of the rules, every flow that older rules admitted is judged again. A
//! [`Sweep`] remembers how far that has come, so that it is done a few flows at a time, between other work. Flows
//! that are opened meanwhile carry the new generation and are passed over. A change during a sweep begins anew.

/// The tables that a sweep goes through, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The flow table, from this slot on.
    Relays(u32),
    /// The sessions of the NAT engine, from this number on.
    Translations(u32),
    /// What guests say to each other, from this port's slot on.
    Conversations(u32),
    /// For which names guests got addresses, from this port's slot on.
    Pins(u32),
}

/// How far a sweep has come, and what it did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sweep {
    /// What is next.
    pub stage: Stage,
    /// Flows that were cut.
    pub cut: u64,
}

impl Sweep {
    /// A sweep from the beginning. `cut` counts what an unfinished sweep before it has cut.
    #[must_use]
    pub fn new(cut: u64) -> Sweep {
        Sweep { stage: Stage::Relays(0), cut }
    }
}

/// What one step of a sweep may do, so that it takes well under a millisecond.
#[derive(Debug)]
pub struct Budget {
    visits: u32,
    cuts: u32,
    /// Flows that were cut in this step.
    pub done: u64,
}

/// Records that one step looks at.
const VISITS: u32 = 1024;
/// Flows that one step cuts: each may cost system calls.
const CUTS: u32 = 64;

impl Budget {
    /// The budget of one step.
    #[must_use]
    pub fn of_step() -> Budget {
        Budget { visits: VISITS, cuts: CUTS, done: 0 }
    }

    /// Takes one visit; false when the step is over.
    pub fn visit(&mut self) -> bool {
        self.visit_many(1)
    }

    /// Returns true when the step is over.
    #[must_use]
    pub fn is_spent(&self) -> bool {
        self.visits == 0 || self.cuts == 0
    }

    /// Takes some visits at once; false when the step is over.
    pub fn visit_many(&mut self, visits: u32) -> bool {
        let more = !self.is_spent();
        self.visits = self.visits.saturating_sub(visits);
        more
    }

    /// Takes some visits at once if there are so many left, or all of the step. False: in the next step.
    pub fn visit_all(&mut self, visits: u32) -> bool {
        if self.visits < visits.min(VISITS) || self.cuts == 0 {
            return false;
        }
        self.visits = self.visits.saturating_sub(visits);
        true
    }

    /// Counts a flow that was cut.
    pub fn cut(&mut self) {
        self.cuts = self.cuts.saturating_sub(1);
        self.done += 1;
    }
}
