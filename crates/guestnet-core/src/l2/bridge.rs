//! Theory of operation: the mode `bridged`. There is no gateway. The switch joins its guests to an existing segment
//! through one port that leads to it (a bridge or an interface of the host).
//!
//! - A frame for no guest goes to that port.
//! - A guest can have neither the MAC nor the address of another guest, nor the MAC of a station that was seen on the
//!   segment. A station of the segment cannot speak for a guest either.
//! - No guest advertises routers, serves DHCP, takes part in spanning trees or sends into VLANs.
//! - The segment assigns the addresses; the control side gets an event for each address seen.

use crate::interface::effects::Effects;
use crate::interface::stats::DropReason;
use crate::interface::types::{Csum, FrameMeta, Time};
use crate::l2::frame_checks::{check_offload, check_size, is_router_message, udp_destination};
use crate::l2::lan::{Lan, Sender};
use crate::tables::port::Port;
use crate::tables::service::DHCP_CLIENT;
use guestnet_wire::ether::{self, Ether, Mac};
use guestnet_wire::{parse, proto};
use std::net::{IpAddr, Ipv4Addr};

/// Stations of the segment whose MACs are remembered. When there are more, all are forgotten and learned again.
const STATIONS: u32 = 4096;
/// Smaller EtherTypes are lengths (IEEE 802.3).
const LOWEST_TYPE: u16 = 0x600;
/// EtherTypes of frames with a VLAN tag: IEEE 802.1Q and 802.1ad, and those used before 802.1ad.
const TAGGED: [u16; 5] = [0x8100, 0x88a8, 0x9100, 0x9200, 0x9300];

/// Addresses that bridges use among each other (IEEE 802.1Q 8.6.3): spanning trees, pauses, link discovery.
fn is_reserved_for_bridges(mac: Mac) -> bool {
    matches!(mac.0, [1, 0x80, 0xc2, 0, 0, n] if n < 0x10)
}

impl Lan {
    /// Handles a frame in a network without a gateway.
    pub(super) fn receive_bridged<E: Effects>(
        &mut self,
        now: Time,
        slot: u32,
        eth: Ether,
        frame: &mut [u8],
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let outside = self.ports.get(slot).ok_or(DropReason::NoEndpoint)?.config.uplink;
        if is_reserved_for_bridges(eth.dst) {
            return Err(DropReason::Policy);
        }
        if outside {
            self.learn_station(slot, eth.src)?;
        } else {
            if eth.ethertype < LOWEST_TYPE || TAGGED.contains(&eth.ethertype) {
                return Err(DropReason::UnsupportedProtocol);
            }
            let is_new = self.macs.get(eth.src) != Some(slot);
            self.check_mac(now, slot, eth.src)?;
            if is_new {
                // The control side learns of a guest before the guest has an address.
                self.report_address(now, slot, eth.src, Ipv4Addr::UNSPECIFIED.into(), fx);
            }
        }
        let meta = self.check_bridged(now, slot, eth, outside, frame, meta, fx)?;
        match if eth.dst.is_multicast() { None } else { self.macs.get(eth.dst) } {
            Some(to) if to == slot => return Err(DropReason::NoEndpoint),
            Some(to) => self.deliver(to, frame, meta, fx),
            None if outside && !eth.dst.is_multicast() => return Err(DropReason::NoEndpoint),
            None => self.flood_bridged(now, slot, outside, !eth.dst.is_multicast(), frame, meta, fx)?,
        }
        Ok(())
    }

    /// Remembers a station of the segment; no guest can have its MAC then. A guest keeps its own MAC, but loses another
    /// one that it used when a station uses it.
    fn learn_station(&mut self, slot: u32, src: Mac) -> Result<(), DropReason> {
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
        self.stations = self.stations.saturating_add(1);
        self.macs.set(src, slot);
        Ok(())
    }

    /// Checks sizes and offload requests of every frame, and the source addresses of a guest's.
    #[allow(clippy::too_many_arguments)] // The frame, where it came from, and what it asks for.
    fn check_bridged<E: Effects>(
        &mut self,
        now: Time,
        slot: u32,
        eth: Ether,
        outside: bool,
        frame: &mut [u8],
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<FrameMeta, DropReason> {
        let from = Sender { slot, mac: eth.src };
        let port = self.ports.get(slot).ok_or(DropReason::NoEndpoint)?;
        if !matches!(eth.ethertype, ether::IPV4 | ether::IPV6) {
            let meta = check_other(port, frame, meta)?;
            if eth.ethertype == ether::ARP && !outside {
                self.check_arp(now, from, frame, fx)?;
            }
            return Ok(meta);
        }
        let p = parse::parse_ip(frame, ether::HEADER_LEN)?;
        check_size(port, &p, meta)?;
        check_offload(frame, &p, meta)?;
        if p.src.is_ipv4() != (eth.ethertype == ether::IPV4) {
            return Err(DropReason::Malformed);
        }
        if outside {
            return Ok(meta);
        }
        if p.src.is_ipv6() {
            self.check_v6(now, from, frame, &p, fx)?;
        } else if udp_destination(frame, &p) == Some(DHCP_CLIENT) || is_router_message(frame, &p) {
            return Err(DropReason::Policy);
        } else if p.src.is_multicast() || p.src == IpAddr::V4(Ipv4Addr::BROADCAST) {
            return Err(DropReason::SpoofedSource);
        } else if !p.src.is_unspecified() {
            self.check_source(now, from, p.src, fx)?;
        }
        if p.proto == proto::ICMP {
            self.check_icmp_error(slot, frame, &p)?;
        }
        Ok(self.offload_of(slot, frame, &p, meta))
    }

    /// Floods a frame to every guest and to the segment; one for an `unknown` MAC goes to the segment alone.
    #[allow(clippy::too_many_arguments)] // As above.
    fn flood_bridged<E: Effects>(
        &mut self,
        now: Time,
        slot: u32,
        outside: bool,
        unknown: bool,
        frame: &[u8],
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        if !outside && !unknown {
            self.allow_flood(now, slot, frame.len(), meta)?;
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

/// A frame that is not IP is carried unchanged, if it fits and asks for no offload.
fn check_other(port: &Port, frame: &[u8], meta: FrameMeta) -> Result<FrameMeta, DropReason> {
    if frame.len() > ether::HEADER_LEN + usize::from(port.config.mtu) {
        return Err(DropReason::Oversized);
    }
    if meta.gso.is_some() || matches!(meta.csum, Csum::Partial { .. }) {
        return Err(DropReason::Malformed);
    }
    Ok(meta)
}
