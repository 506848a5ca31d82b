//! Theory of operation: names that could not be resolved a moment ago.
//!
//! A stub resolver tries a name as it is, and after a failure with each search domain behind it. glibc and Go report the
//! outcome of the last try. If `www.example.org.guestnet.internal` were NXDOMAIN while `www.example.org` cannot be
//! resolved, the guest would take a temporary failure for a permanent one. So failures are remembered for as long as a
//! stub resolver may take to reach its search list, and both names get SERVFAIL.
//!
//! Bounds: [`PER_PORT`] names of one guest, [`MOST`] in all; beyond, the guest that has the most loses its oldest.

use crate::interface::types::{PortId, Time};
use std::collections::{BTreeMap, VecDeque};

/// Seconds: longer than the retries of one name take (resolv.conf(5): two of 5 s each).
pub(super) const SECONDS: u64 = 15;
const PER_PORT: usize = 64;
const MOST: usize = 4096;

struct Failure {
    name: Box<[u8]>,
    until: Time,
    /// The name fails for every guest, not for this one alone.
    shared: bool,
}

/// See the module head. Names are labels in lower case.
#[derive(Default)]
pub(super) struct Failures {
    ports: BTreeMap<PortId, VecDeque<Failure>>,
    /// Shared ones by name.
    shared: BTreeMap<Box<[u8]>, u32>,
    total: usize,
}

impl Failures {
    #[cfg(test)]
    fn len(&self) -> usize {
        self.total
    }

    /// A query of a port's guest failed; `shared`: it fails for every guest.
    pub(super) fn add(&mut self, name: &[u8], port: PortId, now: Time, shared: bool) {
        let of_port = self.ports.entry(port).or_default();
        let gone = |f: &Failure| f.until <= now || *f.name == *name;
        let mut removed: Vec<Failure> = Vec::new();
        of_port.retain_mut(|f| {
            let go = gone(f);
            if go {
                removed.push(Failure { name: std::mem::take(&mut f.name), ..*f });
            }
            !go
        });
        if of_port.len() >= PER_PORT {
            removed.extend(of_port.pop_front());
        }
        of_port.push_back(Failure { name: name.into(), until: now.plus_s(SECONDS), shared });
        self.total += 1;
        if shared {
            *self.shared.entry(name.into()).or_default() += 1;
        }
        removed.iter().for_each(|f| self.forget(f));
        while self.total > MOST {
            let Some(most) = self.ports.values_mut().max_by_key(|f| f.len()) else { return };
            let Some(oldest) = most.pop_front() else { return };
            self.forget(&oldest);
        }
    }

    /// Whether the name failed for this guest, or for all, in the last [`SECONDS`].
    pub(super) fn has(&self, name: &[u8], port: PortId, now: Time) -> bool {
        let is = |f: &Failure| *f.name == *name && f.until > now;
        self.ports.get(&port).is_some_and(|own| own.iter().any(is))
            || self.shared.contains_key(name) && self.ports.values().flatten().any(|f| f.shared && is(f))
    }

    /// The name has an answer, perhaps that there is none.
    pub(super) fn remove(&mut self, name: &[u8]) {
        if self.shared.remove(name).is_none() {
            return;
        }
        for of_port in self.ports.values_mut() {
            let before = of_port.len();
            of_port.retain(|f| *f.name != *name);
            self.total -= before - of_port.len();
        }
        self.ports.retain(|_, f| !f.is_empty());
    }

    /// A guest has left.
    pub(super) fn remove_port(&mut self, port: PortId) {
        for f in self.ports.remove(&port).unwrap_or_default() {
            self.forget(&f);
        }
    }

    /// Forgets everything: there are other name servers now.
    pub(super) fn clear(&mut self) {
        *self = Failures::default();
    }

    fn forget(&mut self, f: &Failure) {
        self.total -= 1;
        if f.shared
            && let Some(count) = self.shared.get_mut(&f.name)
        {
            *count -= 1;
            if *count == 0 {
                self.shared.remove(&f.name);
            }
        }
    }

    /// Whether the counts agree.
    pub(super) fn is_sound(&self) -> bool {
        let all = || self.ports.values().flatten();
        self.total == all().count()
            && self.total <= MOST
            && self.ports.values().all(|f| f.len() <= PER_PORT)
            && self.shared.values().map(|n| *n as usize).sum::<usize>() == all().filter(|f| f.shared).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Time = Time(5);

    fn name(n: usize) -> Vec<u8> {
        n.to_string().into_bytes()
    }

    #[test]
    fn failures_are_bounded_with_a_share_for_each_guest() {
        let mut kept = Failures::default();
        let quiet = PortId(1);
        kept.add(b"victim", quiet, NOW, true);
        for n in 0..10 * PER_PORT {
            kept.add(&name(n), PortId(2), NOW, true);
            assert!(kept.is_sound());
        }
        assert_eq!(kept.len(), PER_PORT + 1);
        assert!(kept.has(b"victim", PortId(3), NOW) && !kept.has(b"0", PortId(2), NOW));
        for port in 10..10 + 2 * MOST / PER_PORT {
            for n in 0..PER_PORT {
                kept.add(&name(n), PortId(port as u32), NOW, false);
            }
        }
        assert!(kept.is_sound() && kept.len() <= MOST && kept.has(b"victim", quiet, NOW));
        kept.clear();
        assert_eq!(kept.len(), 0);
    }

    #[test]
    fn a_failure_ends_with_time_with_an_answer_and_with_its_guest() {
        let (mut kept, one, two) = (Failures::default(), PortId(1), PortId(2));
        kept.add(b"a", one, NOW, true);
        kept.add(b"b", one, NOW, false);
        assert!(kept.has(b"a", two, NOW) && kept.has(b"b", one, NOW) && !kept.has(b"b", two, NOW));
        let later = NOW.plus_s(SECONDS);
        assert!(!kept.has(b"a", two, later) && !kept.has(b"b", one, later));
        kept.add(b"a", two, later, true);
        kept.remove(b"a");
        assert!(!kept.has(b"a", two, later) && kept.is_sound());
        kept.add(b"c", one, later, true);
        assert!(kept.len() == 1 && kept.is_sound(), "what is over was removed");
        kept.remove_port(one);
        assert!(kept.len() == 0 && kept.is_sound() && !kept.has(b"c", two, later));
    }
}
