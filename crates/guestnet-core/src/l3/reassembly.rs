//! Theory of operation: reassembly of fragments of guests (RFC 791 3.2, RFC 8200 4.5). Fragments are kept in order of offset until
//! they cover the datagram.
//!
//! - Memory is charged for what is held, not for what a header announces. Each port has a limit of datagrams, all ports
//!   together one of bytes. Over the limit, the oldest datagram of the port that holds most is dropped.
//! - A fragment that is the whole packet waits for no others and disturbs none (RFC 6946).
//! - The headers in front of an IPv6 fragment header are dropped: they were for nodes on the way.
//! - Any overlap makes the whole datagram invalid (RFC 5722, applied to IPv4 too). Overlaps come from attacks; after a
//!   duplicated fragment the sender has to retransmit.

use crate::interface::types::Time;
use crate::util::account::{charge, release};
use guestnet_wire::parse::{Fragment, Packet};
use guestnet_wire::{ether, ipv4, ipv6, proto, put, tcp};
use std::collections::VecDeque;
use std::net::IpAddr;

/// Bytes charged for a fragment besides its data.
const OVERHEAD: usize = 64;
/// Pieces of one datagram: 64 KiB over the smallest MTU that we allow (68) gives 1365.
const MAX_PIECES: usize = 1400;

#[derive(PartialEq, Eq, Clone, Copy)]
struct Id {
    src: IpAddr,
    dst: IpAddr,
    proto: u8,
    id: u32,
}

struct Datagram {
    id: Id,
    since: Time,
    /// Ethernet and IP header of the first fragment.
    header: Vec<u8>,
    pieces: Vec<(u32, Box<[u8]>)>,
    total: Option<u32>,
    held: u32,
    cost: usize,
    poisoned: bool,
}

/// The result of adding a fragment.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It waits for the others.
    Held,
    /// The datagram is complete: a frame with an IP header that says so.
    Complete(Vec<u8>),
    /// It was refused, and its datagram with it.
    Refused,
}

/// A datagram whose fragments did not come in time, with its first fragment for the ICMP error, if that came.
pub struct Expired {
    /// Slot of the port.
    pub slot: u32,
    /// The first fragment as a frame.
    pub first: Option<Vec<u8>>,
}

/// All datagrams with missing fragments.
pub struct Reassembly {
    ports: Vec<Queue>,
    bytes: usize,
    max_bytes: usize,
    per_port: usize,
    timeout_s: u64,
    /// Ports whose datagrams were dropped to make room, one entry for each, not yet counted.
    pub evicted: Vec<u32>,
}

/// What one port holds.
#[derive(Default)]
struct Queue {
    list: VecDeque<Datagram>,
    bytes: usize,
}

impl Reassembly {
    /// No fragments.
    #[must_use]
    pub fn new(max_bytes: usize, per_port: u32, timeout_s: u32) -> Reassembly {
        Reassembly {
            ports: Vec::new(),
            bytes: 0,
            max_bytes,
            per_port: per_port as usize,
            timeout_s: u64::from(timeout_s),
            evicted: Vec::new(),
        }
    }

    /// Bytes held, overhead included.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Takes the fragment `f` of packet `p` in `frame`, which came from the port in `slot`.
    pub fn add(&mut self, now: Time, slot: u32, frame: &[u8], p: &Packet, f: Fragment) -> Outcome {
        let Some(data) = frame.get(p.l4..p.end) else { return Outcome::Refused };
        if f.offset == 0 && !f.more {
            let header = header_of_first(frame, p, data.len()).unwrap_or_default();
            return finish(header, &[(0, data.into())]).map_or(Outcome::Refused, Outcome::Complete);
        }
        let id = Id { src: p.src, dst: p.dst, proto: p.proto, id: f.id };
        if self.ports.len() <= slot as usize {
            self.ports.resize_with((slot as usize).saturating_add(1), Queue::default);
        }
        let Some(Queue { list, bytes }) = self.ports.get_mut(slot as usize) else { return Outcome::Refused };
        let before = *bytes;
        let at = match list.iter().position(|d| d.id == id) {
            Some(at) => at,
            None => {
                if self.per_port == 0 {
                    return Outcome::Refused;
                }
                if list.len() >= self.per_port {
                    self.evicted.push(slot);
                    release(bytes, list.pop_front().map_or(0, |d| d.cost));
                }
                charge(bytes, OVERHEAD);
                list.push_back(Datagram {
                    id,
                    since: now,
                    header: Vec::new(),
                    pieces: Vec::new(),
                    total: None,
                    held: 0,
                    cost: OVERHEAD,
                    poisoned: false,
                });
                list.len().saturating_sub(1)
            }
        };
        let Some(d) = list.get_mut(at) else { return Outcome::Refused };
        let cost = d.cost;
        let fits = d.take(frame, p, f, data);
        charge(bytes, d.cost);
        release(bytes, cost);
        let is_done = fits && d.total == Some(d.held) && !d.header.is_empty();
        let done = if is_done { list.remove(at) } else { None };
        release(bytes, done.as_ref().map_or(0, |d| d.cost));
        charge(&mut self.bytes, *bytes);
        release(&mut self.bytes, before);
        if !fits {
            return Outcome::Refused;
        }
        if is_done {
            return done.and_then(Datagram::assemble).map_or(Outcome::Refused, Outcome::Complete);
        }
        while self.bytes > self.max_bytes {
            if !self.evict() {
                break;
            }
        }
        Outcome::Held
    }

    /// Drops the oldest datagram of the port that holds most.
    fn evict(&mut self) -> bool {
        let Some((slot, q)) = self.ports.iter_mut().enumerate().max_by_key(|(_, q)| q.bytes) else {
            return false;
        };
        let Some(d) = q.list.pop_front() else { return false };
        release(&mut q.bytes, d.cost);
        release(&mut self.bytes, d.cost);
        self.evicted.push(slot as u32);
        true
    }

    /// When the oldest datagram times out.
    #[must_use]
    pub fn next_timer(&self) -> Option<Time> {
        if self.bytes == 0 {
            return None;
        }
        self.ports
            .iter()
            .filter_map(|q| q.list.front())
            .map(|d| d.since)
            .min()
            .map(|t| t.plus_s(self.timeout_s))
    }

    /// Removes one datagram that timed out.
    pub fn expire(&mut self, now: Time) -> Option<Expired> {
        let timeout = self.timeout_s;
        if self.bytes == 0 {
            return None;
        }
        let old = |q: &Queue| q.list.front().is_some_and(|d| d.since.plus_s(timeout) <= now);
        let slot = self.ports.iter().position(old)?;
        let q = self.ports.get_mut(slot)?;
        let d = q.list.pop_front()?;
        release(&mut q.bytes, d.cost);
        release(&mut self.bytes, d.cost);
        let first = match d.pieces.into_iter().next() {
            Some((0, data)) if !d.header.is_empty() => {
                let mut frame = d.header;
                frame.extend_from_slice(&data);
                Some(frame)
            }
            _ => None,
        };
        Some(Expired { slot: slot as u32, first })
    }

    /// Forgets everything of a port.
    pub fn remove_port(&mut self, slot: u32) {
        if let Some(q) = self.ports.get_mut(slot as usize) {
            release(&mut self.bytes, std::mem::take(&mut q.bytes));
            q.list.clear();
        }
    }
}

impl Datagram {
    /// Puts a piece in; false when it was refused.
    fn take(&mut self, frame: &[u8], p: &Packet, f: Fragment, data: &[u8]) -> bool {
        if self.poisoned {
            return false;
        }
        let end = f.offset.saturating_add(data.len() as u32);
        let at = self.pieces.partition_point(|(o, _)| *o < f.offset);
        let overlaps = |i: Option<usize>, with: &dyn Fn(u32, u32) -> bool| {
            i.and_then(|i| self.pieces.get(i))
                .is_some_and(|(o, d)| with(*o, o.saturating_add(d.len() as u32)))
        };
        // Fragments that leave the ports or the TCP flags to another one evade filters (RFC 1858).
        let tiny = f.offset == 0 && data.len() < if p.proto == proto::TCP { tcp::MIN_LEN } else { 8 }
            || p.proto == proto::TCP && f.offset > 0 && (f.offset as usize) < tcp::MIN_LEN;
        let bad = tiny
            || data.is_empty()
            || self.pieces.len() >= MAX_PIECES
            || overlaps(at.checked_sub(1), &|_, e| e > f.offset)
            || overlaps(Some(at), &|o, _| o < end)
            || self.total.is_some_and(|t| end > t || !f.more && end != t)
            || (!f.more && self.pieces.last().is_some_and(|(o, d)| o.saturating_add(d.len() as u32) > end));
        if bad {
            self.poisoned = true;
            self.pieces = Vec::new();
            self.header = Vec::new();
            self.cost = OVERHEAD;
            return false;
        }
        if !f.more {
            self.total = Some(end);
        }
        if f.offset == 0 {
            self.header = header_of_first(frame, p, data.len()).unwrap_or_default();
            charge(&mut self.cost, self.header.len());
        }
        self.pieces.insert(at, (f.offset, data.into()));
        self.held = self.held.saturating_add(data.len() as u32);
        charge(&mut self.cost, data.len().saturating_add(OVERHEAD));
        true
    }

    /// The whole datagram as a frame. `None` when header and data exceed 65535 bytes ("ping of death").
    fn assemble(self) -> Option<Vec<u8>> {
        finish(self.header, &self.pieces)
    }
}

/// Offset of an IPv6 header's next header in a frame, and where the fragment header is in what is kept.
const NEXT_HEADER: usize = ether::HEADER_LEN + 6;
const FRAGMENT: usize = ether::HEADER_LEN + ipv6::LEN;
const FRAGMENT_LEN: usize = 8;

/// What comes before the data of a first fragment; of IPv6 the fixed header and the fragment header, as if there were no
/// others.
fn header_of_first(frame: &[u8], p: &Packet, data: usize) -> Option<Vec<u8>> {
    if p.src.is_ipv4() {
        return Some(frame.get(..p.l4)?.to_vec());
    }
    let fragment = frame.get(p.l4.checked_sub(FRAGMENT_LEN)?..p.l4)?;
    let mut header = [frame.get(..FRAGMENT)?, fragment].concat();
    let len = u16::try_from(data.saturating_add(FRAGMENT_LEN)).ok()?;
    put(&mut header, ether::HEADER_LEN + 4, &len.to_be_bytes());
    put(&mut header, NEXT_HEADER, &[ipv6::FRAGMENT_HEADER]);
    Some(header)
}

/// The whole packet as a frame. `None` where it exceeds 65535 bytes ("ping of death").
fn finish(header: Vec<u8>, pieces: &[(u32, Box<[u8]>)]) -> Option<Vec<u8>> {
    let l3 = ether::HEADER_LEN;
    let is_v6 = header.get(l3)? >> 4 == 6;
    let mut frame = header;
    if is_v6 {
        let next = *frame.get(FRAGMENT)?;
        frame.truncate(FRAGMENT);
        put(&mut frame, NEXT_HEADER, &[next]);
    }
    for (_, data) in pieces {
        frame.extend_from_slice(data);
    }
    let total = u16::try_from(frame.len().checked_sub(l3)?).ok()?;
    if is_v6 {
        put(&mut frame, l3 + 4, &total.checked_sub(ipv6::LEN as u16)?.to_be_bytes());
        return Some(frame);
    }
    put(&mut frame, l3 + 2, &total.to_be_bytes());
    put(&mut frame, l3 + 6, &[0, 0]);
    ipv4::fill_checksum(frame.get_mut(l3..)?);
    Some(frame)
}
