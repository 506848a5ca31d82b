//! Theory of operation: whether the core's own books agree with each other: lists that run through the flow
//! table, counts that say how long they are, sockets that hang on mappings. A wrong link would let one guest
//! reach the flows of another, and no frame would show it. Only tests and the fuzzer ask.

use crate::network::Network;
use crate::tables::flow::{Chain, Flow, List, NONE, State};

impl Network {
    /// Looks through everything that is kept twice.
    ///
    /// # Errors
    /// The first thing that does not agree.
    #[doc(hidden)]
    pub fn audit(&self) -> Result<(), String> {
        let of = |slot: u32| self.flows.iter().map(|(_, f)| f).filter(move |f| f.key.slot == slot);
        for (slot, p) in self.ports.iter() {
            let conversations = of(slot).filter(|f| !f.is_mapping()).count();
            if self.tunnel_count(slot) != p.translated as usize {
                return Err(format!("slot {slot} says that {} flows are translated", p.translated));
            }
            if conversations != p.flows as usize {
                return Err(format!("slot {slot} has {conversations} flows and says {}", p.flows));
            }
            if p.remote.is_none() && self.names.waits(p.id) != p.asking as usize {
                return Err(format!("slot {slot} says that it waits for {} names", p.asking));
            }
            let held: usize = of(slot).filter_map(held_by).sum();
            let stuck = of(slot).filter_map(held_by).filter(|held| *held > 0).count();
            if held != p.socket_memory || stuck != p.stuck as usize {
                return Err(format!("slot {slot} holds {held} bytes and says {}", p.socket_memory));
            }
            let mappings = of(slot).filter(|f| f.is_mapping()).count();
            if mappings != p.sockets as usize {
                return Err(format!("slot {slot} has {mappings} sockets and says {}", p.sockets));
            }
            let tcp = |f: &Flow| matches!(f.state, State::Tcp(_));
            self.walk(&p.lru, Chain::Lru, |f| f.key.slot == slot && !f.is_mapping() && tcp(f) == f.parked)?;
            self.walk(&p.records, Chain::Port, |f| f.key.slot == slot && !f.is_mapping())?;
            if p.records.len != p.flows {
                return Err(format!("slot {slot} lists {} of {} flows", p.records.len, p.flows));
            }
            self.walk(&p.waiting, Chain::Lru, |f| f.key.slot == slot && tcp(f) && !f.parked)?;
        }
        if self.flows.iter().filter_map(|(_, f)| held_by(f)).sum::<usize>() != self.socket_memory {
            return Err("the kernel's memory in all is not that of the flows".into());
        }
        if !self.names.is_sound() {
            return Err("what is known of names does not agree".into());
        }
        self.walk(&self.batch, Chain::Siblings, |f| matches!(f.state, State::Tcp(_)))?;
        for (id, f) in self.flows.iter() {
            if self.ports.get(f.key.slot).is_none() {
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
        let (mut at, mut before, mut len) = (list.head, NONE, 0);
        while at != NONE && len <= list.len {
            let Some(f) = self.flows.at(at) else {
                return Err(format!("a list leads to the empty record {at}"));
            };
            let l = &f.links[chain as usize];
            if !l.is_linked() || l.prev != before || !fits(f) {
                return Err(format!("record {at} is in a list that it does not belong to: {:?}", f.key));
            }
            (before, at, len) = (at, l.next, len + 1);
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
