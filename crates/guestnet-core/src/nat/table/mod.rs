//! Theory of operation: the records behind the NAT. A *session* is one connection (five-tuple), one cache line,
//! found from both sides through two indexes. A *mapping* ties an internal address and port to an external
//! one; sessions count as its references and it goes with the last. A *peer* says that a mapping talked to an
//! address (address-dependent filtering; the first one is kept in the mapping itself), a *host* counts what an
//! internal address holds (caps) and keeps its external address (pooling "paired"). All are slabs;
//! none moves or is evicted.

pub mod hash;
pub mod index;
mod mappings;
pub mod ports;
pub(crate) mod prefetch;
pub(crate) mod records;
pub(crate) mod state;

use crate::interface::stats::DropReason;
use crate::nat::config::{Behaviour, NatEngineConfig};
use crate::nat::table::hash::{Keys, Random};
use crate::nat::table::index::Index;
use crate::nat::table::ports::PortSet;
use crate::nat::table::records::*;
use crate::nat::table::state::ConnState;
use crate::nat::types::{ForwardError, NatEvent};
use crate::util::timer_wheel::{NONE, TimerWheel};
use guestnet_wire::proto;
use std::collections::{BTreeMap, VecDeque};
use std::net::{Ipv4Addr, SocketAddrV4};

pub(super) struct External {
    pub ip: u32,
    hosts: u32,
    /// TCP, UDP, ICMP; made when first used.
    pub ports: [Option<Box<PortSet>>; 3],
}

/// Whether ports of this protocol are translated, and which set they come from.
pub(super) fn port_class(p: u8) -> Option<usize> {
    match p {
        proto::TCP => Some(0),
        proto::UDP => Some(1),
        proto::ICMP => Some(2),
        _ => None,
    }
}

fn port_set(
    externals: &mut [External],
    range: (u16, u16),
    external: u32,
    class: usize,
) -> Option<&mut PortSet> {
    // Identifiers are no ports: all of them may be used.
    let (first, last) = if class == 2 { (0, u16::MAX) } else { range };
    let slot = externals.get_mut(external as usize)?.ports.get_mut(class)?;
    Some(slot.get_or_insert_with(|| Box::new(PortSet::new(first, last))))
}

/// How many of `total` one host may have while `taken` are taken, see [`NatEngineConfig::shares`].
fn share(total: u64, taken: u64) -> u32 {
    let left = (total - total / 8).saturating_sub(taken);
    u32::try_from(left.saturating_mul(4).max(SHARE_MIN)).unwrap_or(u32::MAX)
}

/// What a host may have whatever others have, as long as there are any.
const SHARE_MIN: u64 = 16;

/// A port that rests: nobody but the address that had it last may have it before `until`.
struct Held {
    until: u32,
    external: u32,
    class: usize,
    port: u16,
    int_ip: u32,
}

/// How many resting ports one new mapping may free: all that one external address has of a protocol.
const RELEASES: usize = 1 << 16;

/// See the module head.
pub(crate) struct Table {
    pub keys: Keys,
    pub random: Random,
    pub sessions: Slab<Session>,
    pub out: Index,
    pub inn: Index,
    pub mappings: Slab<Mapping>,
    pub(super) map_out: Index,
    pub(super) map_in: Index,
    peers: Slab<Peer>,
    peer_index: Index,
    pub(super) hosts: Slab<Host>,
    pub(super) host_index: Index,
    pub(super) externals: Vec<External>,
    /// The lowest and the highest external address.
    outermost: (u32, u32),
    /// Resting ports, the first to be free first.
    held: VecDeque<Held>,
    /// How many of those an internal address had last.
    held_of: BTreeMap<u32, u32>,
    pub wheel: TimerWheel<4>,
    /// No look at the wheel is needed before this tick.
    pub due: u32,
    range: (u16, u16),
    pub(super) preserve: bool,
    pub(super) parity: bool,
    ports_per_host: u32,
    sessions_per_host: u32,
    shares: bool,
    mapping_udp: Behaviour,
    mapping_tcp: Behaviour,
    filtering_udp: Behaviour,
    filtering_tcp: Behaviour,
    hold_ticks: u32,
    /// Connections that began or ended, once events are recorded.
    pub events: Option<Vec<NatEvent>>,
}

impl Table {
    pub fn new(c: &NatEngineConfig) -> Table {
        let mut random = Random::new(&c.secret);
        let keys = Keys::new(&mut random);
        let n = c.table_size;
        let ips = || c.external.iter().map(|a| u32::from(*a));
        let hosts = n.min(1 << 20);
        Table {
            keys,
            random,
            sessions: Slab::new(n),
            out: Index::new(n),
            inn: Index::new(n),
            mappings: Slab::new(n),
            map_out: Index::new(n),
            map_in: Index::new(n),
            peers: Slab::new(n),
            peer_index: Index::new(n),
            hosts: Slab::new(hosts),
            host_index: Index::new(hosts),
            externals: ips().map(|ip| External { ip, hosts: 0, ports: [None, None, None] }).collect(),
            outermost: (ips().min().unwrap_or(u32::MAX), ips().max().unwrap_or(0)),
            held: VecDeque::new(),
            held_of: BTreeMap::new(),
            wheel: TimerWheel::new(0),
            due: u32::MAX,
            range: c.ports,
            preserve: c.port_preservation,
            parity: c.port_parity,
            ports_per_host: c.ports_per_endpoint,
            sessions_per_host: c.sessions_per_endpoint,
            shares: c.shares,
            mapping_udp: c.mapping_udp,
            mapping_tcp: c.mapping_tcp,
            filtering_udp: c.filtering_udp,
            filtering_tcp: c.filtering_tcp,
            hold_ticks: crate::nat::table::state::ticks(c.timeouts.port_hold),
            events: None,
        }
    }

    /// Touches the memory of connections and mappings.
    pub fn prefault(&mut self) {
        self.sessions.prefault(DEAD);
        self.mappings.prefault(NO_MAPPING);
        for index in [&mut self.out, &mut self.inn, &mut self.map_out, &mut self.map_in] {
            index.prefault();
        }
    }

    /// Address and length in bytes of each large piece of memory.
    pub fn ranges(&self) -> [(usize, usize); 8] {
        [
            self.sessions.range(),
            self.mappings.range(),
            self.peers.range(),
            self.out.range(),
            self.inn.range(),
            self.map_out.range(),
            self.map_in.range(),
            self.peer_index.range(),
        ]
    }

    #[inline]
    pub fn is_external(&self, ip: u32) -> bool {
        // Most addresses are far from all of them.
        (self.outermost.0..=self.outermost.1).contains(&ip) && self.externals.iter().any(|e| e.ip == ip)
    }

    pub fn filtering(&self, p: u8) -> Behaviour {
        if p == proto::TCP { self.filtering_tcp } else { self.filtering_udp }
    }

    pub(super) fn mapping_behaviour(&self, p: u8) -> Behaviour {
        match p {
            proto::TCP => self.mapping_tcp,
            proto::UDP => self.mapping_udp,
            // RFC 5508 REQ-1a: queries do not depend on the other side.
            _ => Behaviour::EndpointIndependent,
        }
    }

    #[inline]
    pub fn find_out(&self, k: &Key) -> Option<u32> {
        self.find_hashed(k, k.hash(&self.keys))
    }

    /// As [`Table::find_out`], for who has the hash.
    #[inline]
    pub fn find_hashed(&self, k: &Key, hash: u64) -> Option<u32> {
        self.out.find(hash, |r| self.sessions.get(r).is_some_and(|s| s.is_out(k)))
    }

    #[inline]
    pub fn find_in(&self, k: &Key) -> Option<u32> {
        self.inn.find(k.hash(&self.keys), |r| self.sessions.get(r).is_some_and(|s| s.is_in(k)))
    }

    /// The mapping of an internal end, as far as this remote end matters to it.
    pub fn mapping_out(&self, k: &Key) -> Option<u32> {
        let full = self.mapping_key(k);
        let find = |k: &Key| {
            self.map_out.find(k.hash(&self.keys), |r| self.mappings.get(r).is_some_and(|m| m.out_key() == *k))
        };
        find(&full).or_else(|| {
            // A published port depends on nobody.
            if self.mapping_behaviour(k.proto) == Behaviour::EndpointIndependent {
                return None;
            }
            find(&Key { remote: 0, remote_port: 0, ..*k })
        })
    }

    /// The mapping of an external end.
    pub fn mapping_in(&self, ip: u32, port: u16, p: u8) -> Option<u32> {
        let k = Key { local: ip, remote: 0, local_port: port, remote_port: 0, proto: p };
        self.map_in.find(k.hash(&self.keys), |r| self.mappings.get(r).is_some_and(|m| m.in_key() == k))
    }

    fn peer_hash(&self, mapping: u32, rem_ip: u32) -> u64 {
        self.keys.hash(u64::from(mapping) << 32 | u64::from(rem_ip), 1)
    }

    fn find_peer(&self, mapping: u32, rem_ip: u32) -> Option<u32> {
        self.peer_index.find(self.peer_hash(mapping, rem_ip), |r| {
            self.peers.get(r).is_some_and(|p| p.mapping == mapping && p.rem_ip == rem_ip)
        })
    }

    /// Whether somebody whose session is not known may come in through a mapping (RFC 4787 section 5).
    pub fn lets_in(&self, mapping: u32, rem_ip: u32) -> bool {
        let Some(m) = self.mappings.get(mapping) else { return false };
        m.published
            || match self.filtering(m.proto) {
                Behaviour::EndpointIndependent => true,
                Behaviour::AddressDependent => {
                    m.first_count > 0 && m.first_peer == rem_ip || self.find_peer(mapping, rem_ip).is_some()
                }
                Behaviour::AddressAndPortDependent => false,
            }
    }

    /// Notes one more session of a mapping with an address; gives what [`Table::drop_peer`] wants back.
    fn add_peer(&mut self, mapping: u32, rem_ip: u32) -> u32 {
        if let Some(m) = self.mappings.get_mut(mapping)
            && (m.first_count == 0 || m.first_peer == rem_ip)
        {
            m.first_peer = rem_ip;
            m.first_count += 1;
            return FIRST;
        }
        let peer = match self.find_peer(mapping, rem_ip) {
            Some(p) => p,
            None => {
                let p = self.peers.add(Peer { mapping, rem_ip, count: 0 });
                self.peer_index.insert(self.peer_hash(mapping, rem_ip), p);
                p
            }
        };
        if let Some(p) = self.peers.get_mut(peer) {
            p.count += 1;
        }
        peer
    }

    fn drop_peer(&mut self, mapping: u32, peer: u32) {
        if peer == FIRST {
            if let Some(m) = self.mappings.get_mut(mapping) {
                m.first_count = m.first_count.saturating_sub(1);
            }
            return;
        }
        let Some(p) = self.peers.get_mut(peer) else { return };
        p.count = p.count.saturating_sub(1);
        let p = *p;
        if p.count == 0 {
            let (keys, peers) = (&self.keys, &self.peers);
            let hash = |p: &Peer| keys.hash(u64::from(p.mapping) << 32 | u64::from(p.rem_ip), 1);
            self.peer_index.remove(hash(&p), peer, |x| peers.get(x).map_or(0, hash));
            self.peers.remove(peer, NO_PEER);
        }
    }

    pub(super) fn host_hash(&self, ip: u32) -> u64 {
        self.keys.hash(u64::from(ip), 2)
    }

    #[inline]
    fn find_host(&self, ip: u32) -> Option<u32> {
        self.host_index.find(self.host_hash(ip), |r| self.hosts.get(r).is_some_and(|h| h.ip == ip))
    }

    fn host(&mut self, ip: u32) -> Result<u32, DropReason> {
        if let Some(h) = self.find_host(ip) {
            return Ok(h);
        }
        if self.hosts.is_full() {
            return Err(DropReason::TableFull);
        }
        // The external address with the fewest hosts; the first from a random start where several have.
        let n = self.externals.len();
        let start = self.random.below(n as u32) as usize;
        let external = (0..n)
            .map(|i| (start + i) % n)
            .min_by_key(|i| self.externals.get(*i).map_or(u32::MAX, |e| e.hosts))
            .unwrap_or(0);
        if let Some(e) = self.externals.get_mut(external) {
            e.hosts += 1;
        }
        let h = self.hosts.add(Host { ip, external: external as u32, ports: 0, sessions: 0 });
        self.host_index.insert(self.host_hash(ip), h);
        Ok(h)
    }

    fn drop_host_if_idle(&mut self, h: u32) {
        let Some(host) = self.hosts.get(h).copied() else { return };
        if host.ports == 0 && host.sessions == 0 {
            if let Some(e) = self.externals.get_mut(host.external as usize) {
                e.hosts = e.hosts.saturating_sub(1);
            }
            let (keys, hosts) = (&self.keys, &self.hosts);
            self.host_index.remove(keys.hash(u64::from(host.ip), 2), h, |r| {
                keys.hash(hosts.get(r).map_or(0, |h| u64::from(h.ip)), 2)
            });
            self.hosts.remove(h, NO_HOST);
        }
    }

    fn port_set(&mut self, external: u32, class: usize) -> Option<&mut PortSet> {
        port_set(&mut self.externals, self.range, external, class)
    }

    /// Counts ticks from `ticks` later on. What was due before is due at tick 0.
    pub fn move_base(&mut self, ticks: u64) {
        let moved = |tick: u32| u64::from(tick).saturating_sub(ticks) as u32;
        self.wheel = TimerWheel::new(0);
        for id in 0..self.sessions.items.len() as u32 {
            let Some(s) = self.sessions.get_mut(id).filter(|s| s.proto != 0) else { continue };
            s.expires = moved(s.expires);
            let expires = s.expires;
            self.wheel.arm(&mut self.sessions, id, u64::from(expires));
        }
        self.due = self.next_deadline().unwrap_or(u32::MAX);
        for h in &mut self.held {
            h.until = moved(h.until);
        }
    }

    /// Makes a session for the internal end and remote end of `k`, and a mapping where there is none yet.
    /// `via`: the mapping that it came in through.
    ///
    /// # Errors
    /// `TableFull`, `FlowLimit`, `PortLimit`, `PortsExhausted`, and `Filtered` where the remote end cannot be
    /// told apart from that of another host (GRE, ESP, SCTP). Nothing has changed then.
    pub fn new_session(
        &mut self,
        k: &Key,
        via: Option<u32>,
        state: ConnState,
        expires: u32,
        flags: u16,
        tick: u32,
    ) -> Result<u32, DropReason> {
        if self.sessions.is_full() {
            return Err(DropReason::TableFull);
        }
        let (mapping, fresh) = match via.or_else(|| self.mapping_out(k)) {
            Some(m) => (m, false),
            None => (self.new_mapping(k, tick)?, true),
        };
        let Some(m) = self.mappings.get(mapping).copied() else { return Err(DropReason::TableFull) };
        if !fresh {
            self.check_sessions(m.host)?;
        }
        let mut s = Session {
            int_ip: k.local,
            ext_ip: m.ext_ip,
            rem_ip: k.remote,
            int_port: k.local_port,
            ext_port: m.ext_port,
            rem_port: k.remote_port,
            proto: k.proto,
            state,
            mapping,
            expires,
            ..DEAD
        };
        s.links.spare = flags;
        (s.delta_ip, s.delta_l4) = deltas(s.proto, (s.int_ip, s.int_port), (s.ext_ip, s.ext_port));
        let in_key = s.in_key();
        if port_class(k.proto).is_none() && self.find_in(&in_key).is_some() {
            if fresh {
                if let Some(m) = self.mappings.get_mut(mapping) {
                    m.refs = 1;
                }
                self.release_mapping(mapping, tick, false);
            }
            return Err(DropReason::Filtered);
        }
        if !m.published
            && self.filtering(k.proto) == Behaviour::AddressDependent
            && port_class(k.proto).is_some()
        {
            s.peer = self.add_peer(mapping, k.remote);
        }
        if let Some(m) = self.mappings.get_mut(mapping) {
            m.refs += 1;
        }
        if let Some(h) = self.hosts.get_mut(m.host) {
            h.sessions += 1;
        }
        let id = self.sessions.add(s);
        if let Some(events) = &mut self.events {
            events.push(NatEvent::Began { id, inbound: via.is_some() });
        }
        self.out.insert(k.hash(&self.keys), id);
        self.inn.insert(in_key.hash(&self.keys), id);
        self.wheel.arm(&mut self.sessions, id, u64::from(expires));
        self.due = self.due.min(expires);
        Ok(id)
    }

    /// Forgets a session, and what was there only for it.
    pub fn remove_session(&mut self, id: u32, tick: u32) {
        let Some(s) = self.sessions.get(id).copied() else { return };
        if s.proto == 0 {
            return;
        }
        self.wheel.disarm(&mut self.sessions, id);
        let (keys, sessions) = (&self.keys, &self.sessions);
        self.out
            .remove(s.out_key().hash(keys), id, |x| sessions.get(x).map_or(0, |y| y.out_key().hash(keys)));
        self.inn.remove(s.in_key().hash(keys), id, |x| sessions.get(x).map_or(0, |y| y.in_key().hash(keys)));
        self.sessions.remove(id, DEAD);
        if let Some(events) = &mut self.events {
            events.push(NatEvent::Ended { id, bytes_out: s.bytes_out, bytes_in: s.bytes_in });
        }
        self.drop_peer(s.mapping, s.peer);
        let host = self.mappings.get(s.mapping).map_or(NONE, |m| m.host);
        if let Some(h) = self.hosts.get_mut(host) {
            h.sessions = h.sessions.saturating_sub(1);
        }
        self.release_mapping(s.mapping, tick, true);
    }

    /// Reads what removing a session will need.
    #[inline]
    pub fn foresee_removal(&self, id: u32) -> u32 {
        let Some(s) = self.sessions.get(id) else { return 0 };
        let mut seen = self.out.first(s.out_key().hash(&self.keys));
        seen ^= self.inn.first(s.in_key().hash(&self.keys));
        if let Some(m) = self.mappings.get(s.mapping) {
            seen ^= self.map_out.first(m.out_key().hash(&self.keys));
            seen ^= self.map_in.first(m.in_key().hash(&self.keys));
        }
        seen
    }

    /// Moves a session's deadline to an earlier tick (a later one needs no move: the wheel looks again).
    #[inline(never)]
    pub fn shorten(&mut self, id: u32, expires: u32) {
        if let Some(s) = self.sessions.get_mut(id) {
            s.expires = expires;
            self.wheel.disarm(&mut self.sessions, id);
            self.wheel.arm(&mut self.sessions, id, u64::from(expires));
            self.due = self.due.min(expires);
        }
    }

    /// The tick at which the wheel has something to hand out.
    pub fn next_deadline(&self) -> Option<u32> {
        self.wheel.next().map(|tick| u32::try_from(tick).unwrap_or(u32::MAX))
    }

    /// Sessions tracked now.
    pub fn len(&self) -> usize {
        self.sessions.len
    }

    /// Mappings now, published ones included.
    pub fn mapping_count(&self) -> usize {
        self.mappings.len
    }

    /// External ports taken now, resting ones included.
    pub fn ports_taken(&self) -> u64 {
        self.externals.iter().flat_map(|e| e.ports.iter().flatten()).map(|p| u64::from(p.taken())).sum()
    }

    /// Bytes that the records and indexes take, as far as they have been touched.
    pub fn memory(&self) -> usize {
        self.sessions.memory()
            + self.mappings.memory()
            + self.peers.memory()
            + self.hosts.memory()
            + [&self.out, &self.inn, &self.map_out, &self.map_in, &self.peer_index, &self.host_index]
                .iter()
                .map(|i| i.memory())
                .sum::<usize>()
            + self.externals.iter().map(|e| e.ports.iter().flatten().count() * 8500).sum::<usize>()
            + self.held.capacity() * size_of::<Held>()
            + self.held_of.len() * size_of::<(u32, u32)>()
    }
}
