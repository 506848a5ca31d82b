//! Theory of operation: the mode `bridged`. There is no gateway: the switch joins its guests to a segment that is
//! there already, through one port that leads to it (a bridge or an interface of the host). What is for no guest
//! goes to that port. Guests still cannot take each other's MAC, nor can the segment speak for a guest; the
//! segment's own stations are not learned, so nothing outside can fill the table of MACs. Addresses are the
//! segment's business; the control side is told which ones a guest uses.

use crate::core::Core;
use crate::effects::{Effects, Event};
use crate::port::Port;
use crate::stats::Drop;
use crate::switch::{check_offload, check_size, wire_drop};
use crate::types::{Csum, FrameMeta};
use guestnet_wire::ether::{self, Ether};
use guestnet_wire::{be32, parse};
use std::net::Ipv4Addr;

/// Addresses of one guest that are remembered.
const ADDRESSES: usize = 16;

impl Core {
    /// A frame in a network without a gateway.
    pub(crate) fn bridged<E: Effects>(
        &mut self,
        slot: u32,
        eth: Ether,
        frame: &mut [u8],
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<(), Drop> {
        let outside = self.ports.get(slot).ok_or(Drop::NoEndpoint)?.config.uplink;
        if !outside {
            let is_new = self.macs.get(eth.src) != Some(slot);
            self.check_mac(slot, eth.src)?;
            self.note_address(slot, eth, frame, is_new, fx);
        } else if !eth.src.is_unicast() || self.macs.get(eth.src).is_some() {
            return Err(Drop::SpoofedMac);
        }
        let meta = self.check_frame(slot, eth, frame, meta)?;
        match if eth.dst.is_multicast() { None } else { self.macs.get(eth.dst) } {
            Some(to) if to == slot => Err(Drop::NoEndpoint),
            Some(to) => {
                self.deliver(to, frame, meta, fx);
                Ok(())
            }
            None if outside && !eth.dst.is_multicast() => Err(Drop::NoEndpoint),
            None => self.spread(slot, outside, !eth.dst.is_multicast(), frame, meta, fx),
        }
    }

    /// Tells the control side of a guest's MAC (with 0.0.0.0) and of each of its IPv4 addresses, once.
    fn note_address<E: Effects>(&mut self, slot: u32, eth: Ether, frame: &[u8], is_new: bool, fx: &mut E) {
        let at = match eth.ethertype {
            ether::IPV4 => ether::HEADER_LEN + 12,
            ether::ARP => ether::HEADER_LEN + 14,
            _ => return self.tell_address(slot, eth, is_new, Ipv4Addr::UNSPECIFIED, fx),
        };
        let ip = Ipv4Addr::from(frame.get(at..at + 4).map_or(0, |b| be32(b, 0)));
        let told = ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast();
        let known = self.ports.get(slot).is_some_and(|p| p.learned.contains(&ip.into()));
        if told || known {
            return self.tell_address(slot, eth, is_new, Ipv4Addr::UNSPECIFIED, fx);
        }
        if let Some(p) = self.ports.get_mut(slot) {
            if p.learned.len() >= ADDRESSES {
                p.learned.pop_front();
            }
            p.learned.push_back(ip.into());
        }
        self.tell_address(slot, eth, true, ip, fx);
    }

    fn tell_address<E: Effects>(&mut self, slot: u32, eth: Ether, news: bool, ip: Ipv4Addr, fx: &mut E) {
        if news
            && let Some(p) = self.ports.get_mut(slot)
            && p.news.allow(self.now)
        {
            fx.event(Event::AddressSeen { port: p.id, mac: eth.src, address: ip.into() });
        }
    }

    /// Sizes and offload requests are believed of no frame, whatever it carries.
    fn check_frame(
        &self,
        slot: u32,
        eth: Ether,
        frame: &mut [u8],
        meta: FrameMeta,
    ) -> Result<FrameMeta, Drop> {
        let port = self.ports.get(slot).ok_or(Drop::NoEndpoint)?;
        if !matches!(eth.ethertype, ether::IPV4 | ether::IPV6) {
            return check_other(port, frame, meta);
        }
        let p = parse::parse_ip(frame, ether::HEADER_LEN).map_err(wire_drop)?;
        check_size(port, &p, meta)?;
        check_offload(frame, &p, meta)?;
        Ok(self.passable(slot, frame, &p, meta))
    }

    /// To every guest, and to the segment; `unknown`: to the segment alone, whose station it is.
    fn spread<E: Effects>(
        &mut self,
        slot: u32,
        outside: bool,
        unknown: bool,
        frame: &[u8],
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<(), Drop> {
        if !outside && !unknown {
            self.allow_flood(slot, frame.len())?;
        }
        let mut sent = false;
        for to in 0..self.ports.end() {
            let wanted = self.ports.get(to).is_some_and(|p| !unknown || p.config.uplink);
            if to != slot && wanted {
                self.deliver(to, frame, meta, fx);
                sent = true;
            }
        }
        if sent || !unknown { Ok(()) } else { Err(Drop::NoEndpoint) }
    }
}

/// A frame that is not IP is carried as it is, if it is whole and asks for nothing.
fn check_other(port: &Port, frame: &[u8], meta: FrameMeta) -> Result<FrameMeta, Drop> {
    if frame.len() > ether::HEADER_LEN + usize::from(port.config.mtu) {
        return Err(Drop::Oversized);
    }
    if meta.gso.is_some() || matches!(meta.csum, Csum::Partial { .. }) {
        return Err(Drop::Malformed);
    }
    Ok(meta)
}
