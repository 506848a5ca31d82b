//! Theory of operation: the records behind the NAT. A *session* is one connection (five-tuple), one cache line,
//! found from both sides through two indexes. A *mapping* ties an internal address and port to an external
//! one; sessions count as its references and it goes with the last. A *peer* says that a mapping talked to an
//! address (address-dependent filtering; the first one is kept in the mapping itself), a *host* counts what an
//! internal address holds (caps) and keeps its external address (pooling "paired"). All are slabs;
//! none moves or is evicted.

pub mod hash;
pub mod index;
pub mod ports;
pub(crate) mod prefetch;
pub(crate) mod records;
pub(crate) mod state;

use crate::interface::stats::DropReason;
use crate::nat::config::{Behaviour, NatEngineConfig};
use crate::nat::engine::ForwardError;
use crate::nat::events::NatEvent;
use crate::nat::table::hash::{Keys, Random};
use crate::nat::table::index::Index;
use crate::nat::table::ports::PortSet;
use crate::nat::table::records::*;
use crate::nat::table::state::ConnState;
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
    /// What began and ended, for who asked to be told.
    pub news: Option<Vec<NatEvent>>,
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
            news: None,
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

    /// Takes an external port for an internal end. Where none is free, a port that rests after this very address had
    /// it will do (RFC 6888 REQ-8 keeps it from others).
    fn take_port(&mut self, external: u32, class: usize, (ip, wanted): (u32, u16)) -> Option<u16> {
        let parity = self.parity && class != 2;
        let got = port_set(&mut self.externals, self.range, external, class)?.allocate(
            wanted,
            self.preserve,
            parity,
            &mut self.random,
        );
        got.or_else(|| self.take_held(external, class, (ip, wanted)))
    }

    /// A resting port of this internal address: of the class and parity of `wanted` if there is one.
    fn take_held(&mut self, external: u32, class: usize, (ip, wanted): (u32, u16)) -> Option<u16> {
        if !self.held_of.contains_key(&ip) {
            return None;
        }
        let fits = |port: u16| match class {
            2 => 0,
            _ => {
                2 * u32::from((port < 1024) == (wanted < 1024))
                    + u32::from(self.parity && (port ^ wanted) & 1 == 0)
            }
        };
        let own = |h: &&Held| h.int_ip == ip && h.external == external && h.class == class;
        let best = self.held.iter().filter(own).map(|h| fits(h.port)).max()?;
        let good = |h: &Held| own(&h) && fits(h.port) == best;
        let count = self.held.iter().filter(|h| good(h)).count();
        let chosen = self.random.below(count as u32) as usize;
        let at = self.held.iter().enumerate().filter(|(_, h)| good(h)).nth(chosen)?.0;
        Some(self.forget_held(at)?.port)
    }

    /// The ports that rest after this internal address had them are nobody's own from now on.
    pub fn disown_held(&mut self, ip: u32) {
        if self.held_of.remove(&ip).is_some() {
            for h in self.held.iter_mut().filter(|h| h.int_ip == ip) {
                h.int_ip = 0;
            }
        }
    }

    /// Takes a resting port off the list; its bit stays set.
    fn forget_held(&mut self, at: usize) -> Option<Held> {
        let held = self.held.remove(at)?;
        if let Some(n) = self.held_of.get_mut(&held.int_ip) {
            *n -= 1;
            if *n == 0 {
                self.held_of.remove(&held.int_ip);
            }
        }
        Some(held)
    }

    fn add_mapping(&mut self, m: Mapping) -> u32 {
        let id = self.mappings.add(m);
        self.map_out.insert(m.out_key().hash(&self.keys), id);
        if port_class(m.proto).is_some() {
            self.map_in.insert(m.in_key().hash(&self.keys), id);
        }
        id
    }

    /// Whether a host may have one more session.
    fn check_sessions(&self, host: u32) -> Result<(), DropReason> {
        let share = match self.shares {
            true => share(self.sessions.limit as u64, self.sessions.len as u64),
            false => u32::MAX,
        };
        match self.hosts.get(host) {
            Some(h) if h.sessions < self.sessions_per_host.min(share) => Ok(()),
            _ => Err(DropReason::FlowLimit),
        }
    }

    /// Makes a mapping for the internal end of `k`, without references, where its host may have one more session.
    /// A port is taken last: one that rests loses its rest by it, which cannot be undone.
    fn new_mapping(&mut self, k: &Key, tick: u32) -> Result<u32, DropReason> {
        if self.mappings.is_full() {
            return Err(DropReason::TableFull);
        }
        // First, since what has rested is no longer taken.
        self.release_held(tick, RELEASES);
        let host = self.host(k.local)?;
        let Some(h) = self.hosts.get(host).copied() else { return Err(DropReason::TableFull) };
        if let Err(why) = self.check_sessions(host) {
            self.drop_host_if_idle(host);
            return Err(why);
        }
        let ext_ip = self.externals.get(h.external as usize).map_or(0, |e| e.ip);
        let mut ext_port = 0;
        if let Some(class) = port_class(k.proto) {
            let shares = self.shares;
            let set = self.port_set(h.external, class).filter(|_| shares);
            let share =
                set.map_or(u32::MAX, |s| share(u64::from(s.taken() + s.free()), u64::from(s.taken())));
            if h.ports >= self.ports_per_host.min(share) {
                self.drop_host_if_idle(host);
                return Err(DropReason::PortLimit);
            }
            match self.take_port(h.external, class, (k.local, k.local_port)) {
                Some(p) => ext_port = p,
                None => {
                    self.drop_host_if_idle(host);
                    return Err(DropReason::PortsExhausted);
                }
            }
        }
        if let Some(h) = self.hosts.get_mut(host) {
            h.ports += 1;
        }
        let name = self.mapping_key(k);
        Ok(self.add_mapping(Mapping {
            int_ip: k.local,
            ext_ip,
            rem_ip: name.remote,
            int_port: k.local_port,
            ext_port,
            rem_port: name.remote_port,
            proto: k.proto,
            published: false,
            refs: 0,
            host,
            first_peer: 0,
            first_count: 0,
        }))
    }

    /// Publishes a port of an external address. Nothing has changed after an error.
    pub fn publish(&mut self, p: u8, ext: (u32, u16), int: (u32, u16)) -> Result<u32, ForwardError> {
        let class = port_class(p).filter(|c| *c < 2).ok_or(ForwardError::Protocol)?;
        let address = || Ipv4Addr::from(ext.0);
        let external = self.externals.iter().position(|e| e.ip == ext.0);
        let external = external.ok_or_else(|| ForwardError::NotExternal(address()))? as u32;
        if self.mapping_in(ext.0, ext.1, p).is_some() {
            return Err(ForwardError::InUse(SocketAddrV4::new(address(), ext.1)));
        }
        if self.mappings.is_full() {
            return Err(ForwardError::Full);
        }
        // The last step that can fail.
        let host = self.host(int.0).map_err(|_| ForwardError::Full)?;
        // A resting port may be published at once: whoever still sends to it reaches a service that is meant to be
        // reached.
        let resting = |h: &Held| h.external == external && h.class == class && h.port == ext.1;
        if let Some(at) = self.held.iter().position(resting) {
            self.forget_held(at);
        }
        if let Some(set) = self.port_set(external, class) {
            set.take(ext.1);
        }
        if let Some(h) = self.hosts.get_mut(host) {
            h.ports += 1;
        }
        Ok(self.add_mapping(Mapping {
            int_ip: int.0,
            ext_ip: ext.0,
            rem_ip: 0,
            int_port: int.1,
            ext_port: ext.1,
            rem_port: 0,
            proto: p,
            published: true,
            refs: 1,
            host,
            first_peer: 0,
            first_count: 0,
        }))
    }

    /// Takes a published port back; its running connections live on.
    pub fn unpublish(&mut self, p: u8, ext: (u32, u16), tick: u32) -> bool {
        let Some(m) = self.mapping_in(ext.0, ext.1, p) else { return false };
        match self.mappings.get_mut(m) {
            Some(r) if r.published => r.published = false,
            _ => return false,
        }
        self.release_mapping(m, tick, true);
        true
    }

    /// Whether [`Table::retarget`] has room for the host of an internal address.
    ///
    /// # Errors
    /// [`ForwardError::Full`].
    pub fn check_retarget(&self, m: u32, int_ip: Ipv4Addr) -> Result<(), ForwardError> {
        // A host goes with its last mapping, and leaves room for another.
        let leaves = |m: &Mapping| self.hosts.get(m.host).is_some_and(|h| h.ports == 1);
        let room = !self.hosts.is_full()
            || self.find_host(u32::from(int_ip)).is_some()
            || self.mappings.get(m).is_some_and(leaves);
        if room { Ok(()) } else { Err(ForwardError::Full) }
    }

    /// Makes a published port that has no sessions lead to another internal end. [`Table::check_retarget`] has said
    /// that there is room.
    pub fn retarget(&mut self, m: u32, int: (u32, u16)) {
        let Some(old) = self.mappings.get(m).copied() else { return };
        let (keys, mappings) = (&self.keys, &self.mappings);
        self.map_out
            .remove(old.out_key().hash(keys), m, |x| mappings.get(x).map_or(0, |y| y.out_key().hash(keys)));
        if let Some(h) = self.hosts.get_mut(old.host) {
            h.ports = h.ports.saturating_sub(1);
        }
        self.drop_host_if_idle(old.host);
        // A mapping without host lets nobody in.
        let host = self.host(int.0).unwrap_or(NONE);
        if let Some(h) = self.hosts.get_mut(host) {
            h.ports += 1;
        }
        let new = Mapping { int_ip: int.0, int_port: int.1, host, ..old };
        if let Some(r) = self.mappings.get_mut(m) {
            *r = new;
        }
        self.map_out.insert(new.out_key().hash(&self.keys), m);
    }

    /// Gives up one reference of a mapping; the last one takes it away. Its port then rests, unless it was never
    /// `used`.
    fn release_mapping(&mut self, m: u32, tick: u32, used: bool) {
        let Some(r) = self.mappings.get_mut(m) else { return };
        r.refs = r.refs.saturating_sub(1);
        let r = *r;
        if r.refs > 0 {
            return;
        }
        let (keys, mappings) = (&self.keys, &self.mappings);
        self.map_out
            .remove(r.out_key().hash(keys), m, |x| mappings.get(x).map_or(0, |y| y.out_key().hash(keys)));
        if let Some(class) = port_class(r.proto) {
            self.map_in
                .remove(r.in_key().hash(keys), m, |x| mappings.get(x).map_or(0, |y| y.in_key().hash(keys)));
            let external = self.hosts.get(r.host).map_or(0, |h| h.external);
            let external = match self.externals.get(external as usize) {
                Some(e) if e.ip == r.ext_ip => external,
                // A published port need not be on the address that its host is paired with.
                _ => self.externals.iter().position(|e| e.ip == r.ext_ip).unwrap_or(0) as u32,
            };
            let rests =
                used && r.proto != proto::TCP && self.filtering(r.proto) == Behaviour::EndpointIndependent;
            let in_range = class == 2 || (self.range.0..=self.range.1).contains(&r.ext_port);
            if rests && in_range {
                self.held.push_back(Held {
                    until: tick + self.hold_ticks,
                    external,
                    class,
                    port: r.ext_port,
                    int_ip: r.int_ip,
                });
                *self.held_of.entry(r.int_ip).or_default() += 1;
            } else if let Some(set) = self.port_set(external, class) {
                set.release(r.ext_port);
            }
        }
        self.mappings.remove(m, NO_MAPPING);
        if let Some(h) = self.hosts.get_mut(r.host) {
            h.ports = h.ports.saturating_sub(1);
        }
        self.drop_host_if_idle(r.host);
    }

    /// Frees up to `most` of the ports that have rested long enough.
    #[inline]
    pub fn release_held(&mut self, tick: u32, most: usize) {
        for _ in 0..most {
            match self.held.front() {
                Some(h) if h.until <= tick => {}
                _ => return,
            }
            if let Some(Held { external, class, port, .. }) = self.forget_held(0)
                && let Some(set) = self.port_set(external, class)
            {
                set.release(port);
            }
        }
    }

    /// The tick at which the next port has rested long enough.
    pub fn next_release(&self) -> Option<u32> {
        self.held.front().map(|h| h.until)
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
        if let Some(news) = &mut self.news {
            news.push(NatEvent::Began { id, inbound: via.is_some() });
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
        if let Some(news) = &mut self.news {
            news.push(NatEvent::Ended { id, bytes_out: s.bytes_out, bytes_in: s.bytes_in });
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
