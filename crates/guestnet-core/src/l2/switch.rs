//! Theory of operation: a learning switch that guests cannot fool. A source MAC belongs to the port where it
//! was configured or first seen; the gateway's belongs to the gateway. Source addresses are checked before
//! a frame goes anywhere, another guest included. Frames for several ports (broadcast, multicast, unknown
//! MAC) are limited in rate per port. Frames between guests pass unchanged, offload requests and all; what
//! is for the gateway's MAC goes on in [`crate::l3::gateway`].

use crate::interface::effects::{Effects, TxError};
use crate::interface::stats::DropReason;
use crate::interface::types::{Csum, FrameMeta, Gso, PortId};
use crate::network::Network;
use crate::relay::turns::NO_FLOW;
use crate::shard::PeerUpdate;
use crate::tables::port::Port;
use crate::tables::service::{DHCP_CLIENT, DHCP_SERVER};
use guestnet_wire::ether::{self, Ether, Mac};
use guestnet_wire::parse::{self, Packet};
use guestnet_wire::{WireError, be16, checksum, icmp, proto, put};
use std::net::SocketAddr;

/// Bytes of a frame, and ports that it goes to, that count as one frame against the rate of floods.
const FLOOD_BYTES: usize = 1514;
const FLOOD_PORTS: usize = 64;
/// Bytes of a frame in front of its payload, about.
const HEADERS: usize = 54;
/// A frame between guests that is no part of a bulk transfer.
const SMALL_FRAME: usize = 1024;

/// The drop reason for bytes that are not the header that they claim to be.
pub(crate) fn wire_drop(e: WireError) -> DropReason {
    match e {
        WireError::Truncated => DropReason::Truncated,
        WireError::Malformed => DropReason::Malformed,
        WireError::BadChecksum => DropReason::BadL4Checksum,
        WireError::Unsupported => DropReason::UnsupportedProtocol,
    }
}

impl Network {
    /// A frame from a guest: every one is counted, and every one that goes nowhere is counted with why.
    pub(crate) fn ingress<E: Effects>(&mut self, id: PortId, frame: &mut [u8], meta: FrameMeta, fx: &mut E) {
        let Some(slot) = self.ports.slot(id) else {
            self.base.drop(DropReason::NoEndpoint);
            return;
        };
        if let Some(p) = self.ports.get_mut(slot) {
            p.counters.rx_frames += 1;
            p.counters.rx_bytes += frame.len() as u64;
        }
        if let Err(why) = self.switch(slot, frame, meta, fx) {
            self.drop_at(slot, why);
        }
    }

    fn switch<E: Effects>(
        &mut self,
        slot: u32,
        frame: &mut [u8],
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let eth = Ether::parse(frame).map_err(wire_drop)?;
        if frame.len() > crate::network::FRAME_MAX {
            return Err(DropReason::Oversized);
        }
        if self.is_bridged() {
            return self.bridged(slot, eth, frame, meta, fx);
        }
        self.check_mac(slot, eth.src)?;
        match eth.ethertype {
            ether::IPV4 => self.switch_v4(slot, eth, frame, meta, fx),
            ether::ARP => self.arp_in(slot, eth, frame, fx),
            ether::IPV6 => self.switch_v6(slot, eth, frame, meta, fx),
            _ => Err(DropReason::UnsupportedProtocol),
        }
    }

    /// Nobody sends with another's MAC; new ones are learned.
    pub(crate) fn check_mac(&mut self, slot: u32, src: Mac) -> Result<(), DropReason> {
        let port = self.ports.get(slot).ok_or(DropReason::NoEndpoint)?;
        if port.mac == Some(src) {
            return Ok(());
        }
        if !src.is_unicast() || src == self.cfg.gateway_mac {
            return Err(DropReason::SpoofedMac);
        }
        match self.macs.get(src) {
            Some(owner) if owner == slot => Ok(()),
            // A port that begins with it goes before one that used it besides its own.
            Some(owner)
                if port.mac.is_none()
                    && self.ports.get(owner).is_some_and(|o| o.mac != Some(src) && !o.config.uplink) =>
            {
                self.first_mac(slot, src)
            }
            Some(_) => Err(DropReason::SpoofedMac),
            None if port.mac.is_none() => self.first_mac(slot, src),
            None => self.learn_mac(slot, src),
        }
    }

    /// A port begins to use a MAC.
    fn first_mac(&mut self, slot: u32, mac: Mac) -> Result<(), DropReason> {
        self.may_learn(slot)?;
        self.claim_mac(slot, mac);
        if let Some(port) = self.ports.get(slot).map(|p| p.id) {
            self.tell(PeerUpdate::Mac { port, mac, own: true, instead: None });
        }
        Ok(())
    }

    /// Makes `mac` the port's own; a port that was not configured with it loses it.
    pub(crate) fn claim_mac(&mut self, slot: u32, mac: Mac) {
        // What the control side says here goes before what it said of a port elsewhere, which is on its way out.
        let elsewhere = self.is_remote(slot);
        if let Some(owner) = self.macs.get(mac)
            && let Some(p) = self.ports.get_mut(owner)
        {
            if p.config.mac == Some(mac) && owner != slot && (elsewhere || p.remote.is_none()) {
                return;
            }
            if p.mac == Some(mac) {
                p.mac = None;
            }
            p.macs.retain(|m| *m != mac);
        }
        self.macs.set(mac, slot);
        if let Some(p) = self.ports.get_mut(slot) {
            p.mac = Some(mac);
        }
    }

    /// Remembers a further MAC of a port; the oldest makes room.
    fn learn_mac(&mut self, slot: u32, mac: Mac) -> Result<(), DropReason> {
        let cap = self.cfg.limits.macs_per_port as usize;
        if cap <= 1 || self.reserved_macs.contains(&mac) {
            return Err(DropReason::SpoofedMac);
        }
        self.may_learn(slot)?;
        let port = self.ports.get_mut(slot).ok_or(DropReason::NoEndpoint)?;
        let id = port.id;
        let oldest = if port.macs.len() + 1 >= cap { port.macs.pop_front() } else { None };
        port.macs.push_back(mac);
        if let Some(old) = oldest {
            self.macs.remove(old);
        }
        self.macs.set(mac, slot);
        self.tell(PeerUpdate::Mac { port: id, mac, own: false, instead: oldest });
        Ok(())
    }

    fn switch_v4<E: Effects>(
        &mut self,
        slot: u32,
        eth: Ether,
        frame: &mut [u8],
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let p = parse::parse_ip(frame, ether::HEADER_LEN).map_err(wire_drop)?;
        if !p.src.is_ipv4() {
            return Err(DropReason::Malformed);
        }
        if !parse::verify_ipv4_header(frame, &p) {
            return Err(DropReason::BadIpChecksum);
        }
        let port = self.ports.get(slot).ok_or(DropReason::NoEndpoint)?;
        check_size(port, &p, meta)?;
        check_offload(frame, &p, meta)?;
        let server = SocketAddr::new(p.dst, DHCP_SERVER);
        let asks_dhcp = p.proto == proto::UDP
            && (p.src_port, p.dst_port) == (DHCP_CLIENT, DHCP_SERVER)
            && (self.policy.is_broadcast(p.dst) || self.services.find(proto::UDP, server).is_some());
        // A client that has no address, or one of another network, may still ask for one.
        if !(asks_dhcp && (p.src.is_unspecified() || !self.policy.in_subnet(p.src))) {
            self.check_source(slot, eth.src, p.src, fx)?;
        }
        // With a DHCP service, no guest plays server to another; none plays router.
        if udp_destination(frame, &p) == Some(DHCP_CLIENT) && self.services.dhcp().is_some()
            || is_router_message(frame, &p)
        {
            return Err(DropReason::Policy);
        }
        if p.proto == proto::ICMP {
            self.check_error(slot, frame, &p)?;
        }
        if eth.dst == self.cfg.gateway_mac {
            return self.routed(slot, eth.src, frame, &p, meta, fx);
        }
        if asks_dhcp
            && self.policy.is_broadcast(p.dst)
            && let Some(service) = self.services.dhcp()
        {
            self.verify(slot, frame, &p, meta)?;
            let (src, dst) = (SocketAddr::new(p.src, p.src_port), SocketAddr::new(p.dst, p.dst_port));
            let payload = frame.get(p.payload..p.end).unwrap_or(&[]);
            self.punt(service, slot, eth.src, src, dst, payload, 0, fx);
            return Ok(());
        }
        let meta = self.passable(slot, frame, &p, meta);
        self.bridge(slot, eth.dst, frame, meta, fx)
    }

    fn switch_v6<E: Effects>(
        &mut self,
        slot: u32,
        eth: Ether,
        frame: &mut [u8],
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let p = parse::parse_ip(frame, ether::HEADER_LEN).map_err(wire_drop)?;
        if !p.src.is_ipv6() {
            return Err(DropReason::Malformed);
        }
        let port = self.ports.get(slot).ok_or(DropReason::NoEndpoint)?;
        check_size(port, &p, meta)?;
        check_offload(frame, &p, meta)?;
        self.check_v6(slot, eth.src, frame, &p, fx)?;
        if eth.dst == self.cfg.gateway_mac {
            return Err(DropReason::UnsupportedProtocol);
        }
        let meta = self.passable(slot, frame, &p, meta);
        self.bridge(slot, eth.dst, frame, meta, fx)
    }

    /// Sends a frame of a port on to the port that has the MAC, or to all others.
    pub(crate) fn bridge<E: Effects>(
        &mut self,
        slot: u32,
        dst: Mac,
        frame: &[u8],
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        match if dst.is_multicast() { None } else { self.macs.get(dst) } {
            Some(to) if to == slot => Err(DropReason::NoEndpoint),
            Some(to) => {
                if frame.len() <= SMALL_FRAME {
                    self.turns.active(self.now, NO_FLOW);
                }
                self.deliver(to, frame, meta, fx);
                Ok(())
            }
            None => {
                self.allow_flood(slot, frame.len(), meta)?;
                for to in 0..self.ports.end() {
                    if to != slot && !self.is_remote(to) {
                        self.deliver(to, frame, meta, fx);
                    }
                }
                if self.sharing.is_some() {
                    self.flood_remote(slot, frame, meta, fx);
                }
                Ok(())
            }
        }
    }

    /// A frame of a guest that goes to all ports counts by what it costs: its bytes, or the frames that it is
    /// cut into where a port cannot take it whole.
    pub(crate) fn allow_flood(&mut self, slot: u32, len: usize, meta: FrameMeta) -> Result<(), DropReason> {
        let pieces = match meta.gso {
            Some(Gso::Tcp(n) | Gso::Udp(n)) => len.saturating_sub(HEADERS).div_ceil(usize::from(n).max(1)),
            None => 1,
        };
        let frames = len.div_ceil(FLOOD_BYTES).max(pieces);
        let cost = frames * (self.ports.end() as usize).div_ceil(FLOOD_PORTS);
        let port = self.ports.get_mut(slot).ok_or(DropReason::NoEndpoint)?;
        if port.flood.allow_n(self.now, cost) { Ok(()) } else { Err(DropReason::RateLimit) }
    }

    /// Puts a frame of another port on a port, if its MTU takes it.
    pub(crate) fn deliver<E: Effects>(&mut self, to: u32, frame: &[u8], meta: FrameMeta, fx: &mut E) {
        let Some(port) = self.ports.get_mut(to) else { return };
        let mtu = usize::from(port.config.mtu);
        let fits = match meta.gso {
            None => frame.len() <= ether::HEADER_LEN + mtu,
            Some(_) if frame.len() <= ether::HEADER_LEN + mtu => true,
            Some(_) => parse::parse_ip(frame, ether::HEADER_LEN).is_ok_and(|p| largest(&p, meta) <= mtu),
        };
        if !fits {
            port.counters.drop(DropReason::Oversized);
            return;
        }
        transmit(port, frame, meta, fx);
    }

    /// What may be said of a frame that goes on to another port. Guests on a port with lax offload leave
    /// segmentation and checksums to us without saying so.
    pub(crate) fn passable(&self, slot: u32, frame: &mut [u8], p: &Packet, meta: FrameMeta) -> FrameMeta {
        let Some(port) = self.ports.get(slot).filter(|p| p.config.lax_offload) else { return meta };
        let offset = match p.proto {
            proto::TCP => 16u16,
            proto::UDP => 6,
            _ => return meta,
        };
        if p.fragment.is_some() || meta != FrameMeta::default() {
            return meta;
        }
        let sum = checksum::pseudo(p.src, p.dst, p.proto, (p.end - p.l4) as u32);
        put(frame, p.l4 + usize::from(offset), &checksum::fold(sum).to_be_bytes());
        let room = usize::from(port.config.mtu).saturating_sub(p.payload - p.l3);
        let big = p.end - p.payload > room && room > 0;
        let cut = big && p.proto == proto::TCP && !too_many(p.end - p.payload, room as u16, proto::TCP);
        let gso = cut.then_some(Gso::Tcp(room as u16));
        FrameMeta { csum: Csum::Partial { start: p.l4 as u16, offset }, gso }
    }

    /// Verifies the transport checksum where nobody vouches for it.
    pub(crate) fn verify(
        &self,
        slot: u32,
        frame: &[u8],
        p: &Packet,
        meta: FrameMeta,
    ) -> Result<(), DropReason> {
        let lax = self.ports.get(slot).is_some_and(|p| p.config.lax_offload);
        if meta.csum == Csum::Full && !lax && !parse::verify_l4(frame, p) {
            return Err(DropReason::BadL4Checksum);
        }
        Ok(())
    }

    /// Counts a drop at a port.
    pub(crate) fn drop_at(&mut self, slot: u32, why: DropReason) {
        match self.ports.get_mut(slot) {
            Some(p) => p.counters.drop(why),
            None => self.base.drop(why),
        }
    }
}

/// Puts a frame on a port and counts what became of it.
pub(crate) fn transmit<E: Effects>(port: &mut Port, frame: &[u8], meta: FrameMeta, fx: &mut E) {
    if let Some(worker) = port.remote {
        // Counted as sent by the worker that does it.
        match fx.forward_remote(worker, Some(port.id), frame, meta) {
            Ok(()) => {}
            Err(TxError::Full) => port.counters.drop(DropReason::WorkerFull),
            Err(TxError::Gone) => port.counters.drop(DropReason::NoEndpoint),
        }
        return;
    }
    match fx.transmit(port.id, frame, meta) {
        Ok(()) => {
            port.counters.tx_frames += 1;
            port.counters.tx_bytes += frame.len() as u64;
        }
        Err(TxError::Full) => port.counters.drop(DropReason::PortFull),
        Err(TxError::Gone) => port.counters.drop(DropReason::NoEndpoint),
    }
}

/// The packet fits the MTU, or asks to be cut into pieces that do.
pub(crate) fn check_size(port: &Port, p: &Packet, meta: FrameMeta) -> Result<(), DropReason> {
    let mtu = usize::from(port.config.mtu);
    if port.config.lax_offload && meta.gso.is_none() {
        return Ok(());
    }
    let (want, size) = match meta.gso {
        None if p.end - p.l3 > mtu => return Err(DropReason::Oversized),
        None => return Ok(()),
        Some(Gso::Tcp(n)) => (proto::TCP, n),
        Some(Gso::Udp(n)) => (proto::UDP, n),
    };
    if p.proto != want || size == 0 || p.fragment.is_some() || too_many(p.end - p.payload, size, want) {
        return Err(DropReason::Malformed);
    }
    // virtio counts bytes of payload per piece.
    if p.payload - p.l3 + usize::from(size) > mtu && p.end - p.l3 > mtu {
        return Err(DropReason::Oversized);
    }
    Ok(())
}

/// Bytes of the largest IP packet that a frame is, or will be cut into.
pub(crate) fn largest(p: &Packet, meta: FrameMeta) -> usize {
    let whole = p.end - p.l3;
    match meta.gso {
        None => whole,
        Some(Gso::Tcp(n) | Gso::Udp(n)) => (p.payload - p.l3 + usize::from(n)).min(whole),
    }
}

/// Whether a large send asks for more pieces than any honest guest: each is work here or on the host. Linux
/// cuts UDP in 128 at most, and TCP in no pieces smaller than 48 bytes of the 64 KiB that it sends at once.
fn too_many(len: usize, size: u16, proto: u8) -> bool {
    len.div_ceil(usize::from(size)) > if proto == proto::UDP { 128 } else { 2048 }
}

/// A checksum that is left to us is where the protocol has it.
pub(crate) fn check_offload(frame: &[u8], p: &Packet, meta: FrameMeta) -> Result<(), DropReason> {
    let Csum::Partial { start, offset } = meta.csum else { return Ok(()) };
    let good = match p.proto {
        _ if p.fragment.is_some() => false,
        proto::TCP => offset == 16,
        proto::UDP => offset == 6,
        _ => usize::from(start) + usize::from(offset) + 2 <= frame.len(),
    };
    if good && usize::from(start) == p.l4 { Ok(()) } else { Err(DropReason::Malformed) }
}

/// The destination port of a UDP datagram; `None` for other protocols and for later fragments, which have no
/// ports. A receiver finds its socket by this port alone, so a filter must not ask for the source port too.
pub(crate) fn udp_destination(frame: &[u8], p: &Packet) -> Option<u16> {
    match p.fragment {
        _ if p.proto != proto::UDP => None,
        None => Some(p.dst_port),
        Some(f) if f.offset == 0 => Some(be16(frame, p.l4 + 2)),
        Some(_) => None,
    }
}

/// Whether it is a router advertisement (RFC 1256) or a redirect, first fragments included: a guest is no
/// router to others.
pub(crate) fn is_router_message(frame: &[u8], p: &Packet) -> bool {
    p.proto == proto::ICMP
        && p.fragment.is_none_or(|f| f.offset == 0)
        && matches!(frame.get(p.l4), Some(&(icmp::REDIRECT | icmp::ROUTER_ADVERTISEMENT)))
}
