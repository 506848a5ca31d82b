//! Checks that the accounts of the relay agree with each other: lists that run through the flow table, counts, sockets of
//! mappings. A wrong link would let one guest reach the flows of another, and no frame would show it. Only tests and
//! fuzzers ask.

use crate::l2::lan::Lan;
use crate::relay::Relay;
use crate::tables::flow::{Chain, Flow, List, NONE, State};

impl Relay {
    /// Checks everything that is kept twice.
    ///
    /// # Errors
    /// The first thing that does not agree.
    pub fn audit(&self, lan: &Lan) -> Result<(), String> {
        let of = |slot: u32| self.flows.iter().map(|(_, f)| f).filter(move |f| f.key.slot == slot);
        for (slot, g) in self.guests.iter() {
            let conversations = of(slot).filter(|f| !f.is_mapping()).count();
            if conversations != g.flows as usize {
                return Err(format!("slot {slot} has {conversations} flows and counts {}", g.flows));
            }
            let held: usize = of(slot).filter_map(held_by).sum();
            let stuck = of(slot).filter_map(held_by).filter(|held| *held > 0).count();
            if held != g.socket_memory || stuck != g.stuck as usize {
                return Err(format!("slot {slot} holds {held} bytes and counts {}", g.socket_memory));
            }
            let mappings = of(slot).filter(|f| f.is_mapping()).count();
            if mappings != g.sockets as usize {
                return Err(format!("slot {slot} has {mappings} sockets and counts {}", g.sockets));
            }
            let tcp = |f: &Flow| matches!(f.state, State::Tcp(_));
            self.walk(&g.lru, Chain::Lru, |f| f.key.slot == slot && !f.is_mapping() && tcp(f) == f.parked)?;
            self.walk(&g.records, Chain::Port, |f| f.key.slot == slot && !f.is_mapping())?;
            if g.records.len != g.flows {
                return Err(format!("slot {slot} lists {} of {} flows", g.records.len, g.flows));
            }
            self.walk(&g.waiting, Chain::Lru, |f| f.key.slot == slot && tcp(f) && !f.parked)?;
        }
        if self.flows.iter().filter_map(|(_, f)| held_by(f)).sum::<usize>() != self.socket_memory {
            return Err("the kernel's memory in all is not that of the flows".into());
        }
        self.walk(&self.batch, Chain::Siblings, |f| matches!(f.state, State::Tcp(_)))?;
        for (id, f) in self.flows.iter() {
            if lan.port(f.key.slot).is_none() {
                return Err(format!("{id:?} is of slot {}, which is empty", f.key.slot));
            }
            if self.flows.find(&f.key) != Some(id.index) {
                return Err(format!("{id:?} is not found by its key"));
            }
            if let State::Mapping { flows, .. } = &f.state {
                let ours =
                    |f: &Flow| matches!(f.state, State::Datagram { mapping, .. } if mapping == id.index);
                self.walk(flows, Chain::Siblings, ours)?;
                if flows.len == 0 || f.links[Chain::Lru as usize].is_linked() {
                    return Err(format!("the mapping {id:?} has no flow, or may be evicted by itself"));
                }
            }
        }
        Ok(())
    }

    fn walk(&self, list: &List, chain: Chain, fits: impl Fn(&Flow) -> bool) -> Result<(), String> {
        let (mut at, mut before, mut len) = (list.head, NONE, 0_u32);
        while at != NONE && len <= list.len {
            let Some(f) = self.flows.at(at) else {
                return Err(format!("a list leads to the empty record {at}"));
            };
            let l = &f.links[chain as usize];
            if !l.is_linked() || l.prev != before || !fits(f) {
                return Err(format!("record {at} is in a list that it does not belong to: {:?}", f.key));
            }
            (before, at, len) = (at, l.next, len.saturating_add(1));
        }
        if at == NONE && before == list.tail && len == list.len {
            Ok(())
        } else {
            Err(format!("a list of {} has {len} records and ends at {before}", list.len))
        }
    }
}

/// The kernel's memory behind a TCP flow.
fn held_by(f: &Flow) -> Option<usize> {
    match &f.state {
        State::Tcp(tcb) => Some(tcb.memory.held as usize),
        _ => None,
    }
}
