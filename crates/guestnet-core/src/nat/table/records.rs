//! Theory of operation: the records of [`crate::nat::table`], plain and small, and the slab that they live in: a vector,
//! and beside it a stack of what is free, so that the next records to be used can be fetched before they are. A session is one cache line.

use crate::nat::table::hash::Keys;
use crate::nat::table::state::ConnState;
use crate::util::timer_wheel::{Links, NONE, Records};
use guestnet_wire::checksum::fold;
use guestnet_wire::proto;

/// A five-tuple as one side sees it: `local` is the internal (outbound) or external (inbound) end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Key {
    pub local: u32,
    pub remote: u32,
    pub local_port: u16,
    pub remote_port: u16,
    pub proto: u8,
}

impl Key {
    #[inline(always)]
    pub fn hash(&self, keys: &Keys) -> u64 {
        keys.hash(
            u64::from(self.local) << 32 | u64::from(self.remote),
            u64::from(self.proto) << 32 | u64::from(self.local_port) << 16 | u64::from(self.remote_port),
        )
    }
}

/// One connection.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Session {
    pub int_ip: u32,
    pub ext_ip: u32,
    pub rem_ip: u32,
    pub int_port: u16,
    pub ext_port: u16,
    pub rem_port: u16,
    pub proto: u8,
    pub state: ConnState,
    /// What the change outbound adds to the IP and to the transport checksum's sum; inbound it is complemented.
    pub delta_ip: u16,
    pub delta_l4: u16,
    pub mapping: u32,
    pub peer: u32,
    /// Tick from which it is dead.
    pub expires: u32,
    pub links: Links,
    pub bytes_out: u64,
    pub bytes_in: u64,
}

/// In `Session::peer`: the first peer of the mapping.
pub(crate) const FIRST: u32 = NONE - 1;

/// Flag in `links.spare`: the other side is one of our own external addresses.
pub(crate) const HAIRPIN: u16 = 1;

impl Session {
    #[inline(always)]
    pub fn is_out(&self, k: &Key) -> bool {
        self.int_ip == k.local
            && self.rem_ip == k.remote
            && self.int_port == k.local_port
            && self.rem_port == k.remote_port
            && self.proto == k.proto
    }
    #[inline(always)]
    pub fn is_in(&self, k: &Key) -> bool {
        self.ext_ip == k.local
            && self.rem_ip == k.remote
            && self.ext_port == k.local_port
            && self.rem_port == k.remote_port
            && self.proto == k.proto
    }
    pub fn out_key(&self) -> Key {
        Key {
            local: self.int_ip,
            remote: self.rem_ip,
            local_port: self.int_port,
            remote_port: self.rem_port,
            proto: self.proto,
        }
    }
    pub fn in_key(&self) -> Key {
        Key { local: self.ext_ip, local_port: self.ext_port, ..self.out_key() }
    }
}

/// An internal address and port, and the external ones that stand for it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mapping {
    pub int_ip: u32,
    pub ext_ip: u32,
    /// What the mapping depends on besides, zero where it does not.
    pub rem_ip: u32,
    pub int_port: u16,
    pub ext_port: u16,
    pub rem_port: u16,
    pub proto: u8,
    /// A published port: lives until it is taken back, lets everybody in.
    pub published: bool,
    /// Sessions, and one for being published.
    pub refs: u32,
    pub host: u32,
    /// The first address that it talked to, and how many sessions with it there are.
    pub first_peer: u32,
    pub first_count: u32,
}

impl Mapping {
    pub fn out_key(&self) -> Key {
        Key {
            local: self.int_ip,
            remote: self.rem_ip,
            local_port: self.int_port,
            remote_port: self.rem_port,
            proto: self.proto,
        }
    }
    pub fn in_key(&self) -> Key {
        Key { local: self.ext_ip, remote: 0, local_port: self.ext_port, remote_port: 0, proto: self.proto }
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Peer {
    pub mapping: u32,
    pub rem_ip: u32,
    pub count: u32,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Host {
    pub ip: u32,
    pub external: u32,
    pub ports: u32,
    pub sessions: u32,
}

/// A record of a slab.
pub(crate) trait Slot: Copy {
    /// Some of it: reading that brings the record into the cache.
    fn word(&self) -> u32;
}
impl Slot for Session {
    fn word(&self) -> u32 {
        self.expires
    }
}
impl Slot for Mapping {
    fn word(&self) -> u32 {
        self.refs
    }
}
impl Slot for Peer {
    fn word(&self) -> u32 {
        self.count
    }
}
impl Slot for Host {
    fn word(&self) -> u32 {
        self.ip
    }
}

#[derive(Debug)]
pub(crate) struct Slab<T> {
    pub items: Vec<T>,
    /// Numbers of the free ones, the next to be given out last.
    free: Vec<u32>,
    pub len: usize,
    pub limit: usize,
}

impl<T: Slot> Slab<T> {
    pub fn new(limit: usize) -> Self {
        // Address space only: pages come as records do, unless `prefault` is called.
        Slab { items: Vec::with_capacity(limit), free: Vec::with_capacity(limit), len: 0, limit }
    }
    /// Touches all of its memory.
    pub fn prefault(&mut self, blank: T) {
        let used = self.items.len();
        self.items.resize(self.limit.max(used), blank);
        self.items.truncate(used);
        let used = self.free.len();
        self.free.resize(self.limit.max(used), 0);
        self.free.truncate(used);
    }
    /// Address and length in bytes of its memory.
    pub fn range(&self) -> (usize, usize) {
        (self.items.as_ptr().addr(), self.items.capacity() * size_of::<T>())
    }
    /// Reads up to `n` of the records that are given out next.
    #[inline]
    pub fn touch_free(&self, n: usize) -> u32 {
        let next = self.free.iter().rev().take(n);
        next.fold(0, |seen, at| seen ^ self.items.get(*at as usize).map_or(0, T::word))
    }
    pub fn is_full(&self) -> bool {
        self.len >= self.limit
    }
    pub fn add(&mut self, item: T) -> u32 {
        self.len += 1;
        if let Some(at) = self.free.pop()
            && let Some(slot) = self.items.get_mut(at as usize)
        {
            *slot = item;
            return at;
        }
        self.items.push(item);
        (self.items.len() - 1) as u32
    }
    /// `dead` is what the free record looks like.
    pub fn remove(&mut self, at: u32, dead: T) {
        if let Some(slot) = self.items.get_mut(at as usize) {
            *slot = dead;
            self.free.push(at);
            self.len -= 1;
        }
    }
    /// Bytes that it takes, as far as they were used.
    pub fn memory(&self) -> usize {
        self.items.len() * (size_of::<T>() + size_of::<u32>())
    }
    #[inline(always)]
    pub fn get(&self, at: u32) -> Option<&T> {
        self.items.get(at as usize)
    }
    #[inline(always)]
    pub fn get_mut(&mut self, at: u32) -> Option<&mut T> {
        self.items.get_mut(at as usize)
    }
}

impl Records for Slab<Session> {
    #[inline]
    fn links(&mut self, record: u32) -> Option<&mut Links> {
        self.items.get_mut(record as usize).map(|s| &mut s.links)
    }
}

pub(crate) const NO_MAPPING: Mapping = Mapping {
    int_ip: 0,
    ext_ip: 0,
    rem_ip: 0,
    int_port: 0,
    ext_port: 0,
    rem_port: 0,
    proto: 0,
    published: false,
    refs: 0,
    host: NONE,
    first_peer: 0,
    first_count: 0,
};
pub(crate) const NO_PEER: Peer = Peer { mapping: NONE, rem_ip: 0, count: 0 };
pub(crate) const NO_HOST: Host = Host { ip: 0, external: 0, ports: 0, sessions: 0 };

pub(crate) const DEAD: Session = Session {
    int_ip: 0,
    ext_ip: 0,
    rem_ip: 0,
    int_port: 0,
    ext_port: 0,
    rem_port: 0,
    proto: 0,
    state: ConnState::Other,
    delta_ip: 0,
    delta_l4: 0,
    mapping: NONE,
    peer: NONE,
    expires: 0,
    links: Links::UNARMED,
    bytes_out: 0,
    bytes_in: 0,
};

/// What replacing `old` by `new` adds to the IP header's and to the transport's one's complement sum.
pub(crate) fn deltas(p: u8, old: (u32, u16), new: (u32, u16)) -> (u16, u16) {
    let half = |a: u32| u64::from(a >> 16) + u64::from(a & 0xffff);
    let ip = half(!old.0) + half(new.0);
    let port = u64::from(!old.1) + u64::from(new.1);
    let l4 = match p {
        proto::TCP | proto::UDP => ip + port,
        proto::ICMP => port,
        _ => 0,
    };
    (fold(ip), fold(l4))
}
