//! Theory of operation: the mode `bridged`. There is no gateway: the switch joins its guests to a segment that is
//! there already, through one port that leads to it (a bridge or an interface of the host). What is for no guest
//! goes to that port. A guest has neither MAC nor address of another guest, nor the MAC of a station that was
//! seen on the segment, which cannot speak for a guest either. No guest advertises routers, serves DHCP, takes
//! part in spanning trees or sends into VLANs: on the segment it is a station. Other addresses are the
//! segment's business; the control side is told which ones a guest uses.

use crate::interface::effects::{Effects, Event};
use crate::interface::stats::DropReason;
use crate::interface::types::{Csum, FrameMeta, NetMode};
use crate::l2::switch::{check_offload, check_size, is_router_message, udp_destination, wire_drop};
use crate::network::Network;
use crate::tables::port::Port;
use crate::tables::service::DHCP_CLIENT;
use guestnet_wire::arp::Arp;
use guestnet_wire::ether::{self, Ether, Mac};
use guestnet_wire::{parse, proto};
use std::net::{IpAddr, Ipv4Addr};

/// Stations of the segment whose MACs are remembered; all are seen anew where there are more.
const STATIONS: u32 = 4096;
/// Smaller ones are lengths (IEEE 802.3).
const LOWEST_TYPE: u16 = 0x600;
/// EtherTypes of frames with a VLAN tag: IEEE 802.1Q and 802.1ad, and what was used before the latter.
const TAGGED: [u16; 5] = [0x8100, 0x88a8, 0x9100, 0x9200, 0x9300];

/// What bridges say among each other (IEEE 802.1Q 8.6.3): spanning trees, pauses, link discovery.
fn is_of_bridges(mac: Mac) -> bool {
    matches!(mac.0, [1, 0x80, 0xc2, 0, 0, n] if n < 0x10)
}

impl Network {
    pub(crate) fn is_bridged(&self) -> bool {
        self.cfg.mode == NetMode::Bridged
    }

    /// A frame in a network without a gateway.
    pub(crate) fn bridged<E: Effects>(
        &mut self,
        slot: u32,
        eth: Ether,
        frame: &mut [u8],
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let outside = self.ports.get(slot).ok_or(DropReason::NoEndpoint)?.config.uplink;
        if is_of_bridges(eth.dst) {
            return Err(DropReason::Policy);
        }
        if outside {
            self.seen_outside(slot, eth.src)?;
        } else {
            if eth.ethertype < LOWEST_TYPE || TAGGED.contains(&eth.ethertype) {
                return Err(DropReason::UnsupportedProtocol);
            }
            let is_new = self.macs.get(eth.src) != Some(slot);
            self.check_mac(slot, eth.src)?;
            self.tell_mac(slot, eth.src, is_new, fx);
        }
        let meta = self.check_frame(slot, eth, outside, frame, meta, fx)?;
        match if eth.dst.is_multicast() { None } else { self.macs.get(eth.dst) } {
            Some(to) if to == slot => Err(DropReason::NoEndpoint),
            Some(to) => {
                self.deliver(to, frame, meta, fx);
                Ok(())
            }
            None if outside && !eth.dst.is_multicast() => Err(DropReason::NoEndpoint),
            None => self.spread(slot, outside, !eth.dst.is_multicast(), frame, meta, fx),
        }
    }

    /// Remembers a station of the segment, whose MAC no guest gets then. A guest's own is not the segment's;
    /// one that it used besides is, from the moment that it shows there.
    fn seen_outside(&mut self, slot: u32, src: Mac) -> Result<(), DropReason> {
        let owner = self.macs.get(src);
        if owner == Some(slot) {
            return Ok(());
        }
        if !src.is_unicast() {
            return Err(DropReason::SpoofedMac);
        }
        if let Some(guest) = owner.and_then(|o| self.ports.get_mut(o)) {
            if guest.mac == Some(src) {
                return Err(DropReason::SpoofedMac);
            }
            guest.macs.retain(|m| *m != src);
        }
        if self.stations >= STATIONS {
            self.macs.remove_port(slot);
            self.stations = 0;
        }
        self.stations += 1;
        self.macs.set(src, slot);
        Ok(())
    }

    /// Tells the control side of a guest's MAC, once, before it has an address.
    fn tell_mac<E: Effects>(&mut self, slot: u32, mac: Mac, is_new: bool, fx: &mut E) {
        if is_new
            && let Some(p) = self.ports.get_mut(slot)
            && p.news.allow(self.now)
        {
            fx.event(Event::AddressSeen { port: p.id, mac, address: Ipv4Addr::UNSPECIFIED.into() });
        }
    }

    /// Sizes and offload requests are believed of no frame, whatever it carries, and no source of a guest's.
    fn check_frame<E: Effects>(
        &mut self,
        slot: u32,
        eth: Ether,
        outside: bool,
        frame: &mut [u8],
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<FrameMeta, DropReason> {
        let port = self.ports.get(slot).ok_or(DropReason::NoEndpoint)?;
        if !matches!(eth.ethertype, ether::IPV4 | ether::IPV6) {
            let meta = check_other(port, frame, meta)?;
            if eth.ethertype == ether::ARP && !outside {
                self.check_arp(slot, eth.src, frame, fx)?;
            }
            return Ok(meta);
        }
        let p = parse::parse_ip(frame, ether::HEADER_LEN).map_err(wire_drop)?;
        check_size(port, &p, meta)?;
        check_offload(frame, &p, meta)?;
        if p.src.is_ipv4() != (eth.ethertype == ether::IPV4) {
            return Err(DropReason::Malformed);
        }
        if outside {
            return Ok(meta);
        }
        if p.src.is_ipv6() {
            self.check_v6(slot, eth.src, frame, &p, fx)?;
        } else if udp_destination(frame, &p) == Some(DHCP_CLIENT) || is_router_message(frame, &p) {
            return Err(DropReason::Policy);
        } else if p.src.is_multicast() || p.src == IpAddr::V4(Ipv4Addr::BROADCAST) {
            return Err(DropReason::SpoofedSource);
        } else if !p.src.is_unspecified() {
            self.check_source(slot, eth.src, p.src, fx)?;
        }
        if p.proto == proto::ICMP {
            self.check_error(slot, frame, &p)?;
        }
        Ok(self.passable(slot, frame, &p, meta))
    }

    fn check_arp<E: Effects>(
        &mut self,
        slot: u32,
        mac: Mac,
        frame: &[u8],
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let a = Arp::parse(frame.get(ether::HEADER_LEN..).unwrap_or(&[])).map_err(wire_drop)?;
        if a.sha != mac {
            return Err(DropReason::SpoofedMac);
        }
        // A probe (RFC 5227 1.1) claims nothing yet.
        if a.spa.is_unspecified() { Ok(()) } else { self.check_source(slot, mac, IpAddr::V4(a.spa), fx) }
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
    ) -> Result<(), DropReason> {
        if !outside && !unknown {
            self.allow_flood(slot, frame.len(), meta)?;
        }
        let mut sent = false;
        for to in 0..self.ports.end() {
            let wanted = self.ports.get(to).is_some_and(|p| !unknown || p.config.uplink);
            if to != slot && wanted {
                self.deliver(to, frame, meta, fx);
                sent = true;
            }
        }
        if sent || !unknown { Ok(()) } else { Err(DropReason::NoEndpoint) }
    }
}

/// A frame that is not IP is carried as it is, if it is whole and asks for nothing.
fn check_other(port: &Port, frame: &[u8], meta: FrameMeta) -> Result<FrameMeta, DropReason> {
    if frame.len() > ether::HEADER_LEN + usize::from(port.config.mtu) {
        return Err(DropReason::Oversized);
    }
    if meta.gso.is_some() || matches!(meta.csum, Csum::Partial { .. }) {
        return Err(DropReason::Malformed);
    }
    Ok(meta)
}
