//! Theory of operation: a new connection reads and writes places that no cache holds: the slots of its mapping and
//! of its two names in the indexes, and the records that become free next. One after the other, each would be
//! waited for. So before the new connections of a group are made, what all of them will need is worked out, the
//! ports included (the random numbers that will be drawn are known), and read in passes whose reads do not wait for
//! each other. Nothing is changed and nothing is promised: where a guess is wrong, a place is waited for.

use crate::nat::config::Behaviour;
use crate::nat::table::hash::scale;
use crate::nat::table::index::Index;
use crate::nat::table::ports::PortSet;
use crate::nat::table::records::Key;
use crate::nat::table::{Table, port_class};

/// How many new connections are looked at together.
pub(crate) const GROUP: usize = 32;

impl Table {
    /// Reads what making connections with these keys will need, in their order.
    pub fn foresee(&mut self, keys: &[Key]) {
        let keys = keys.get(..GROUP).unwrap_or(keys);
        self.random.prepare(keys.len());
        let table = &*self;
        let mut seen = table.sessions.touch_free(keys.len()) ^ table.mappings.touch_free(keys.len());
        // A loop that waits for memory does as little else as can be: the less there is between two reads, the
        // more of them the processor has under way.
        let mut hashes = [[0u64; 2]; GROUP];
        for (hash, k) in hashes.iter_mut().zip(keys) {
            *hash = [table.mapping_key(k).hash(&table.keys), table.host_hash(k.local)];
        }
        let hashes = &hashes[..keys.len()];
        let mut slots = [[0u32; 2]; GROUP];
        for (slot, hash) in slots.iter_mut().zip(hashes) {
            *slot = [table.map_out.first(hash[0]), table.host_index.first(hash[1])];
        }
        for ([mapping, host], hash) in slots.iter_mut().zip(hashes) {
            *mapping = table.map_out.likely(hash[0], *mapping);
            *host = table.host_index.likely(hash[1], *host);
        }
        for ([_, host], k) in slots.iter().zip(keys) {
            seen ^= table.ports_of(*host, k).map_or(0, |(_, ports)| ports.word(k.local_port) as u32);
        }
        let mut names = [[0u64; 2]; GROUP];
        let mut drawn = 0;
        for ((name, [mapping, host]), k) in names.iter_mut().zip(slots).zip(keys) {
            let external = match Index::record(mapping).and_then(|r| table.mappings.get(r)) {
                Some(m) => Some((m.ext_ip, m.ext_port)),
                None => table.next_external(host, k, &mut drawn),
            };
            let (local, local_port) = external.unwrap_or_default();
            let inner = Key { local, local_port, ..*k };
            *name = [inner, Key { remote: 0, remote_port: 0, ..inner }].map(|k| k.hash(&table.keys));
        }
        for [inner, outer] in &names[..keys.len()] {
            seen ^= table.inn.first(*inner) ^ table.map_in.first(*outer);
        }
        std::hint::black_box(seen);
    }

    /// What the mapping of `k` is called inside.
    #[inline]
    pub(super) fn mapping_key(&self, k: &Key) -> Key {
        let b = self.mapping_behaviour(k.proto);
        Key {
            remote: if b == Behaviour::EndpointIndependent { 0 } else { k.remote },
            remote_port: if b == Behaviour::AddressAndPortDependent { k.remote_port } else { 0 },
            ..*k
        }
    }

    /// The external address of a host, and its ports for the protocol of `k`.
    #[inline(always)]
    fn ports_of(&self, host_slot: u32, k: &Key) -> Option<(u32, &PortSet)> {
        let host = self.hosts.get(Index::record(host_slot)?)?;
        let external = self.externals.get(host.external as usize)?;
        Some((external.ip, external.ports.get(port_class(k.proto)?)?.as_ref()?))
    }

    /// The external end that a new mapping for `k` gets when `drawn` random numbers were taken before.
    #[inline]
    fn next_external(&self, host_slot: u32, k: &Key, drawn: &mut usize) -> Option<(u32, u16)> {
        let Some((ip, ports)) = self.ports_of(host_slot, k) else {
            // The address of a new host is drawn first.
            *drawn += 1;
            return None;
        };
        let below = |n| {
            *drawn += 1;
            scale(self.random.ahead(*drawn - 1), n)
        };
        Some((ip, ports.choose(k.local_port, self.preserve, self.parity, below)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nat::config::NatEngineConfig;
    use crate::nat::table::state::ConnState;
    use guestnet_wire::proto;
    use std::net::Ipv4Addr;

    #[test]
    fn what_is_foreseen_comes_true() {
        let mut c = NatEngineConfig::new(Ipv4Addr::new(203, 0, 113, 1));
        c.external = (1..=3).map(|i| Ipv4Addr::new(203, 0, 113, i)).collect();
        c.secret = [5; 32];
        let mut table = Table::new(&c);
        let key = |guest: u32, port: u16| Key {
            local: 0xc0a8_4000 | guest,
            remote: 0xc633_6401,
            local_port: port,
            remote_port: 4433,
            proto: proto::UDP,
        };
        let mut right = 0;
        // Guests want ports that others had in turns before.
        for turn in 0..100u32 {
            let port = |i: u32| 49152 + ((turn + i % 9) % 100 * 4 + i / 9) as u16;
            let keys: Vec<Key> = (0..GROUP as u32).map(|i| key(2 + i % 9, port(i))).collect();
            table.foresee(&keys);
            let mut drawn = 0;
            let guesses: Vec<Option<(u32, u16)>> = keys
                .iter()
                .map(|k| {
                    let hash = table.host_hash(k.local);
                    let host = table.host_index.likely(hash, table.host_index.first(hash));
                    table.next_external(host, k, &mut drawn)
                })
                .collect();
            for (k, guess) in keys.iter().zip(guesses) {
                let id = table.new_session(k, None, ConnState::Udp, 1000, 0, 0).unwrap();
                let s = table.sessions.get(id).unwrap();
                right += usize::from(guess == Some((s.ext_ip, s.ext_port)));
            }
        }
        // Wrong are the first of each guest, those whose port another of the same group has drawn, and the drawn ones
        // that come after such in their group.
        assert!(right > 90 * GROUP, "{right} of {}", 100 * GROUP);
    }
}
