//! Theory of operation: packets that the engine itself sends: ICMP errors, fragments of a packet too big for
//! the next link, fragments that had to wait. They queue here, bounded in bytes, until the caller fetches them;
//! what does not fit is dropped and counted. A sender has at most as much of the queue as it leaves to others.
//! ICMP errors follow RFC 1812 4.3.2 and have a budget per second: one for each guest, one for the outside.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use crate::nat::NatDirection;
use crate::nat::config::unicast;
use crate::nat::packet::View;
use crate::util::account::{charge, release};
use guestnet_wire::frame::IpHeader;
use guestnet_wire::{be16, icmp, ipv4, proto};
use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv4Addr;

/// All guests together get so many times the ICMP errors that one gets: a bound for memory and work.
const GUESTS: u32 = 16;

/// A packet that waits, and the address whose packet it is about.
struct Waiting {
    direction: NatDirection,
    owner: u32,
    packet: Vec<u8>,
}

/// See the module head.
pub(crate) struct Output {
    queue: VecDeque<Waiting>,
    bytes: usize,
    /// Bytes by owner.
    owners: BTreeMap<u32, usize>,
    limit: usize,
    per_second: u32,
    /// The second that these are of: errors to each guest, to all guests, to the outside.
    second: u64,
    to_guest: BTreeMap<u32, u32>,
    to_guests: u32,
    to_outside: u32,
}

impl Output {
    pub fn new(limit: usize, per_second: u32) -> Output {
        Output {
            queue: VecDeque::new(),
            bytes: 0,
            owners: BTreeMap::new(),
            limit,
            per_second,
            second: u64::MAX,
            to_guest: BTreeMap::new(),
            to_guests: 0,
            to_outside: 0,
        }
    }

    pub fn push(&mut self, direction: NatDirection, owner: u32, packet: Vec<u8>) -> bool {
        if !self.has_room(owner, packet.len()) {
            return false;
        }
        charge(&mut self.bytes, packet.len());
        charge(self.owners.entry(owner).or_default(), packet.len());
        self.queue.push_back(Waiting { direction, owner, packet });
        true
    }

    pub fn pop(&mut self) -> Option<(NatDirection, Vec<u8>)> {
        let Waiting { direction, owner, packet } = self.queue.pop_front()?;
        release(&mut self.bytes, packet.len());
        if let Some(own) = self.owners.get_mut(&owner) {
            *own = own.saturating_sub(packet.len());
            if *own == 0 {
                self.owners.remove(&owner);
            }
        }
        Some((direction, packet))
    }

    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// Whether there is room for this many more bytes of an owner, who has no more than is left to others.
    pub fn has_room(&self, owner: u32, bytes: usize) -> bool {
        let own = self.owners.get(&owner).copied().unwrap_or(0);
        own.saturating_add(bytes) <= self.limit.saturating_sub(self.bytes)
    }

    fn allowed(&mut self, direction: NatDirection, guest: u32, second: u64) -> bool {
        if self.second != second {
            self.second = second;
            self.to_guest.clear();
            (self.to_guests, self.to_outside) = (0, 0);
        }
        if direction == NatDirection::Outbound {
            self.to_outside = self.to_outside.saturating_add(1);
            return self.to_outside <= self.per_second;
        }
        if self.to_guests >= self.per_second.saturating_mul(GUESTS) {
            return false;
        }
        let own = self.to_guest.entry(guest).or_default();
        let ok = *own < self.per_second;
        if ok {
            *own = own.saturating_add(1);
            self.to_guests = self.to_guests.saturating_add(1);
        }
        ok
    }

    /// Sends an ICMP error from `src` about `quoted`, which travelled the other way than `direction`. False
    /// when the rules or the budget of its receiver forbid it.
    pub fn icmp_error(
        &mut self,
        direction: NatDirection,
        second: u64,
        src: u32,
        quoted: &[u8],
        (icmp_type, code, rest): (u8, u8, [u8; 4]),
    ) -> bool {
        let Some(h) = quoted.first_chunk::<20>() else { return false };
        let (from, to) = (u32::from_be_bytes([h[12], h[13], h[14], h[15]]), guestnet_wire::be32(h, 16));
        let tail = be16(h, 6) & 0x1fff != 0;
        let ihl = usize::from(h[0] & 15) * 4;
        let about_error = h[9] == proto::ICMP && quoted.get(ihl).is_none_or(|t| icmp::is_error(*t));
        if tail || about_error || !unicast(from) || !unicast(to) || !self.allowed(direction, from, second) {
            return false;
        }
        let total = usize::from(be16(h, 2)).min(quoted.len());
        let body = quoted.get(..total.min(548)).unwrap_or(&[]);
        let len = body.len().saturating_add(icmp::LEN);
        let mut p = vec![0; len.saturating_add(ipv4::MIN_LEN)];
        let (src, dst) = (Ipv4Addr::from(src).into(), Ipv4Addr::from(from).into());
        IpHeader { src, dst, proto: proto::ICMP, ttl: 64, tos: 0xc0, id: 0, frag: 0 }.emit(&mut p, len);
        icmp::emit(p.get_mut(ipv4::MIN_LEN..).unwrap_or(&mut []), icmp_type, code, rest, body);
        self.push(direction, from, p)
    }

    /// Bytes of data in a fragment of a packet for an MTU of at least 68.
    fn piece(v: &View, mtu: usize) -> usize {
        (mtu.saturating_sub(v.ihl) & !7).max(8)
    }

    /// The most bytes that a packet has in fragments for an MTU.
    pub fn cut_bytes(v: &View, mtu: usize) -> usize {
        let data = v.total.saturating_sub(v.ihl);
        data.saturating_add(data.div_ceil(Output::piece(v, mtu)).saturating_mul(v.ihl))
    }

    /// Cuts a packet, on the account of its sender, in fragments of at most `mtu` bytes, in order. False when
    /// there is no room for all.
    pub fn fragment(&mut self, direction: NatDirection, p: &[u8], v: &View, mtu: usize) -> bool {
        if !self.has_room(v.src, Output::cut_bytes(v, mtu)) {
            return false;
        }
        ipv4::fragments(p.get(..v.total).unwrap_or(&[]), mtu, |header, piece| {
            self.push(direction, v.src, [header, piece].concat());
        })
    }
}
