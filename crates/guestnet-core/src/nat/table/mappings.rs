//! Theory of operation: mappings and external ports of the NAT table.
//!
//! - A mapping is made with its first session or by publishing, and goes with its last reference.
//! - Where everybody may answer (endpoint-independent filtering), the port of a mapping that goes rests for a while:
//!   nobody but the address that had it gets it (RFC 6888 REQ-8).
//! - Each step that can fail comes before the first change, so a refusal leaves ports and mappings as they were.

use super::*;

impl Table {
    /// Takes an external port for an internal end. Where none is free, a port that rests after this very address had
    /// it will do (RFC 6888 REQ-8 keeps it from others).
    pub(super) fn take_port(&mut self, external: u32, class: usize, (ip, wanted): (u32, u16)) -> Option<u16> {
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
    pub(super) fn take_held(&mut self, external: u32, class: usize, (ip, wanted): (u32, u16)) -> Option<u16> {
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
    pub(super) fn forget_held(&mut self, at: usize) -> Option<Held> {
        let held = self.held.remove(at)?;
        if let Some(n) = self.held_of.get_mut(&held.int_ip) {
            *n -= 1;
            if *n == 0 {
                self.held_of.remove(&held.int_ip);
            }
        }
        Some(held)
    }

    pub(super) fn add_mapping(&mut self, m: Mapping) -> u32 {
        let id = self.mappings.add(m);
        self.map_out.insert(m.out_key().hash(&self.keys), id);
        if port_class(m.proto).is_some() {
            self.map_in.insert(m.in_key().hash(&self.keys), id);
        }
        id
    }

    /// Whether a host may have one more session.
    pub(super) fn check_sessions(&self, host: u32) -> Result<(), DropReason> {
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
    pub(super) fn new_mapping(&mut self, k: &Key, tick: u32) -> Result<u32, DropReason> {
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
    pub(super) fn release_mapping(&mut self, m: u32, tick: u32, used: bool) {
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
}
