//! Theory of operation: a learning switch that guests cannot deceive.
//!
//! - A source MAC belongs to the port where it was configured or first seen; the gateway's belongs to the gateway. A port
//!   has at most [`crate::config::Limits::macs_per_port`] MACs.
//! - Source addresses are checked before a frame goes anywhere, to another guest included.
//! - Frames for several ports (broadcast, multicast, unknown MAC) are limited in rate for each port, by what they cost.
//! - Frames between guests pass unchanged, offload requests included.
//! - An IP packet to the gateway's MAC or to that of another guest is checked here, and returned to the caller as
//!   [`Verdict::Route`] or [`Verdict::Forward`].

use crate::interface::effects::Effects;
use crate::interface::stats::DropReason;
use crate::interface::types::{Csum, FrameMeta, Gso, PortId, ServiceId, Time};
use crate::l2::frame_checks::{
    FRAME_MAX, check_offload, check_size, has_too_many_segments, is_router_message, udp_destination,
};
use crate::l2::lan::{Lan, Sender, Verdict};
use crate::shard::PeerUpdate;
use crate::tables::service::{DHCP_CLIENT, DHCP_SERVER};
use crate::util::account::{count, count_bytes};
use guestnet_wire::ether::{self, Ether, Mac};
use guestnet_wire::parse::{self, Packet};
use guestnet_wire::{checksum, proto, put};
use std::net::SocketAddr;

/// Bytes of a frame, and ports that it goes to, that count as one frame against the rate of floods.
const FLOOD_BYTES: usize = 1514;
const FLOOD_PORTS: usize = 64;
/// Bytes of a frame in front of its payload, about.
const HEADERS: usize = 54;

impl Lan {
    /// Counts a frame of a guest and returns the slot of its port. `None`, and a drop, where there is no such port.
    #[inline]
    pub fn count_received(&mut self, port: PortId, len: usize) -> Option<u32> {
        let slot = self.ports.slot(port);
        match slot.and_then(|s| self.ports.get_mut(s)) {
            Some(p) => {
                count(&mut p.counters.rx_frames);
                count_bytes(&mut p.counters.rx_bytes, len);
            }
            None => self.base_mut().drop(DropReason::NoEndpoint),
        }
        slot
    }

    /// Handles a frame of a guest. An IP packet is left to [`Lan::receive_packet`]: its Ethernet header is returned.
    ///
    /// # Errors
    /// Why the frame is dropped.
    #[inline(always)]
    pub fn receive<E: Effects>(
        &mut self,
        now: Time,
        slot: u32,
        frame: &mut [u8],
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<Option<Ether>, DropReason> {
        let eth = Ether::parse(frame)?;
        if frame.len() > FRAME_MAX {
            return Err(DropReason::Oversized);
        }
        if self.bridged {
            return self.receive_bridged(now, slot, eth, frame, meta, fx).map(|()| None);
        }
        self.check_mac(now, slot, eth.src)?;
        match eth.ethertype {
            ether::IPV4 | ether::IPV6 => Ok(Some(eth)),
            ether::ARP => {
                self.receive_arp(now, Sender { slot, mac: eth.src }, eth.dst, frame, fx).map(|()| None)
            }
            _ => Err(DropReason::UnsupportedProtocol),
        }
    }

    /// Checks an IP packet of a guest, and says what is left to be done with it.
    ///
    /// # Errors
    /// Why the packet is dropped.
    #[allow(clippy::too_many_arguments)] // The packet, where it came from, and what it asks for.
    #[inline(always)]
    pub fn receive_packet<E: Effects>(
        &mut self,
        now: Time,
        slot: u32,
        eth: Ether,
        frame: &mut [u8],
        p: &Packet,
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<Verdict, DropReason> {
        let from = Sender { slot, mac: eth.src };
        if p.src.is_ipv4() != (eth.ethertype == ether::IPV4) {
            return Err(DropReason::Malformed);
        }
        if p.src.is_ipv4() && !parse::verify_ipv4_header(frame, p) {
            return Err(DropReason::BadIpChecksum);
        }
        let port = self.ports.get(slot).ok_or(DropReason::NoEndpoint)?;
        check_size(port, p, meta)?;
        check_offload(frame, p, meta)?;
        if p.src.is_ipv6() {
            return self.receive_v6(now, from, eth.dst, frame, p, meta, fx);
        }
        let broadcast_dhcp = self.check_v4(now, from, frame, p, fx)?;
        if eth.dst == self.gateway_mac {
            return Ok(Verdict::Route);
        }
        if let Some(service) = broadcast_dhcp {
            self.verify(slot, frame, p, meta)?;
            return Ok(Verdict::Serve(service));
        }
        self.forward_packet(now, from, eth.dst, frame, p, meta, fx)
    }

    /// Checks an IPv6 packet of a guest, and says what is left to be done with it.
    #[allow(clippy::too_many_arguments)] // As above.
    fn receive_v6<E: Effects>(
        &mut self,
        now: Time,
        from: Sender,
        dst: Mac,
        frame: &mut [u8],
        p: &Packet,
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<Verdict, DropReason> {
        self.check_v6(now, from, frame, p, fx)?;
        if let Some(service) = self.dhcp6_query(p)? {
            self.verify(from.slot, frame, p, meta)?;
            return Ok(Verdict::Serve(service));
        }
        if self.addressing.gateway6().is_some() {
            if let Some(verdict) = self.for_router(from, dst, frame, p, meta)? {
                return Ok(verdict);
            }
            if dst == self.gateway_mac {
                return Ok(Verdict::Route);
            }
        } else if dst == self.gateway_mac {
            return Err(DropReason::UnsupportedProtocol);
        }
        self.forward_packet(now, from, dst, frame, p, meta, fx)
    }

    /// Checks that a guest may send an IPv4 packet to others. Returns the DHCP service where the packet is a query that
    /// was broadcast.
    #[inline(always)]
    fn check_v4<E: Effects>(
        &mut self,
        now: Time,
        from: Sender,
        frame: &[u8],
        p: &Packet,
        fx: &mut E,
    ) -> Result<Option<ServiceId>, DropReason> {
        if p.proto == proto::UDP {
            let (subnet, services) = (self.addressing.subnet(), self.addressing.services());
            let to_server = (p.src_port, p.dst_port) == (DHCP_CLIENT, DHCP_SERVER);
            let broadcast = to_server && subnet.is_broadcast(p.dst);
            let server = SocketAddr::new(p.dst, DHCP_SERVER);
            let query = broadcast || to_server && services.find(proto::UDP, server).is_some();
            let reply = udp_destination(frame, p) == Some(DHCP_CLIENT) && services.dhcp().is_some();
            let service = if broadcast { services.dhcp() } else { None };
            // A client without an address, or with one of another network, may still ask for one.
            if !(query && (p.src.is_unspecified() || !subnet.contains(p.src))) {
                self.check_source(now, from, p.src, fx)?;
            }
            // With a DHCP service, no guest is a DHCP server to another.
            return if reply { Err(DropReason::Policy) } else { Ok(service) };
        }
        self.check_source(now, from, p.src, fx)?;
        if is_router_message(frame, p) {
            return Err(DropReason::Policy);
        }
        if p.proto == proto::ICMP {
            self.check_icmp_error(from.slot, frame, p)?;
        }
        Ok(None)
    }

    /// Decides where a checked IP packet goes.
    #[allow(clippy::too_many_arguments)] // The packet, where it came from, and what it asks for.
    #[inline(always)]
    fn forward_packet<E: Effects>(
        &mut self,
        now: Time,
        from: Sender,
        dst: Mac,
        frame: &mut [u8],
        p: &Packet,
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<Verdict, DropReason> {
        let meta = self.offload_of(from.slot, frame, p, meta);
        match if dst.is_multicast() { None } else { self.macs.get(dst) } {
            Some(to) if to == from.slot => Err(DropReason::NoEndpoint),
            Some(to) => Ok(Verdict::Forward { to, meta }),
            None if self.asks => Ok(Verdict::Flood { meta }),
            None => self.flood(now, from.slot, frame, meta, fx).map(|()| Verdict::Done),
        }
    }

    /// Sends a frame that is not IP on to the port that has the MAC, or floods it.
    pub(super) fn forward<E: Effects>(
        &mut self,
        now: Time,
        slot: u32,
        dst: Mac,
        frame: &[u8],
        fx: &mut E,
    ) -> Result<(), DropReason> {
        match if dst.is_multicast() { None } else { self.macs.get(dst) } {
            Some(to) if to == slot => Err(DropReason::NoEndpoint),
            Some(to) => {
                self.deliver(to, frame, FrameMeta::default(), fx);
                Ok(())
            }
            None => self.flood(now, slot, frame, FrameMeta::default(), fx),
        }
    }

    /// Sends a frame of a port to all other ports, of other workers too.
    pub fn flood<E: Effects>(
        &mut self,
        now: Time,
        slot: u32,
        frame: &[u8],
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        self.allow_flood(now, slot, frame.len(), meta)?;
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

    /// Charges a flood to its port by what it costs: its bytes, or the segments it becomes where a port cannot take it
    /// whole.
    pub(super) fn allow_flood(
        &mut self,
        now: Time,
        slot: u32,
        len: usize,
        meta: FrameMeta,
    ) -> Result<(), DropReason> {
        let segments = match meta.gso {
            Some(Gso::Tcp(n) | Gso::Udp(n)) => len.saturating_sub(HEADERS).div_ceil(usize::from(n).max(1)),
            None => 1,
        };
        let frames = len.div_ceil(FLOOD_BYTES).max(segments);
        let cost = frames.saturating_mul((self.ports.end() as usize).div_ceil(FLOOD_PORTS));
        let port = self.ports.get_mut(slot).ok_or(DropReason::NoEndpoint)?;
        if port.flood.allow_n(now, cost) { Ok(()) } else { Err(DropReason::RateLimit) }
    }

    /// Checks that a port may send with a MAC, and learns new ones.
    #[inline]
    pub(super) fn check_mac(&mut self, now: Time, slot: u32, src: Mac) -> Result<(), DropReason> {
        let port = self.ports.get(slot).ok_or(DropReason::NoEndpoint)?;
        if port.mac == Some(src) {
            return Ok(());
        }
        if !src.is_unicast() || src == self.gateway_mac {
            return Err(DropReason::SpoofedMac);
        }
        match self.macs.get(src) {
            Some(owner) if owner == slot => Ok(()),
            // A port whose first MAC it is takes precedence over one that used it besides its own.
            Some(owner)
                if port.mac.is_none()
                    && self.ports.get(owner).is_some_and(|o| o.mac != Some(src) && !o.config.uplink) =>
            {
                self.first_mac(now, slot, src)
            }
            Some(_) => Err(DropReason::SpoofedMac),
            None if port.mac.is_none() => self.first_mac(now, slot, src),
            None => self.learn_mac(now, slot, src),
        }
    }

    /// A port begins to use a MAC.
    fn first_mac(&mut self, now: Time, slot: u32, mac: Mac) -> Result<(), DropReason> {
        self.may_learn(now, slot)?;
        self.claim_mac(slot, mac);
        if let Some(port) = self.ports.get(slot).map(|p| p.id) {
            self.announce(PeerUpdate::Mac { port, mac, own: true, instead: None });
        }
        Ok(())
    }

    /// Makes `mac` the port's own; a port that was not configured with it loses it.
    pub(super) fn claim_mac(&mut self, slot: u32, mac: Mac) {
        // A MAC configured here takes precedence over one configured for a port elsewhere, which is about to go.
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
    fn learn_mac(&mut self, now: Time, slot: u32, mac: Mac) -> Result<(), DropReason> {
        let cap = self.limits.macs_per_port as usize;
        if cap <= 1 || self.reserved_macs.contains(&mac) {
            return Err(DropReason::SpoofedMac);
        }
        self.may_learn(now, slot)?;
        let port = self.ports.get_mut(slot).ok_or(DropReason::NoEndpoint)?;
        let id = port.id;
        let oldest = if port.macs.len().saturating_add(1) >= cap { port.macs.pop_front() } else { None };
        port.macs.push_back(mac);
        if let Some(old) = oldest {
            self.macs.remove(old);
        }
        self.macs.set(mac, slot);
        self.announce(PeerUpdate::Mac { port: id, mac, own: false, instead: oldest });
        Ok(())
    }

    /// The offload requests of a frame that goes on to another port. Guests on a port with lax offload leave segmentation
    /// and checksums to us without a virtio header that says so.
    #[inline]
    pub fn offload_of(&self, slot: u32, frame: &mut [u8], p: &Packet, meta: FrameMeta) -> FrameMeta {
        let Some(port) = self.ports.get(slot).filter(|p| p.config.lax_offload) else { return meta };
        let offset = match p.proto {
            proto::TCP => 16u16,
            proto::UDP => 6,
            _ => return meta,
        };
        if p.fragment.is_some() || meta != FrameMeta::default() {
            return meta;
        }
        let sum = checksum::pseudo(p.src, p.dst, p.proto, p.transport_len() as u32);
        put(frame, p.l4.saturating_add(usize::from(offset)), &checksum::fold(sum).to_be_bytes());
        let room = usize::from(port.config.mtu).saturating_sub(p.headers_len());
        let big = p.payload_len() > room && room > 0;
        let split =
            big && p.proto == proto::TCP && !has_too_many_segments(p.payload_len(), room as u16, proto::TCP);
        let gso = split.then_some(Gso::Tcp(room as u16));
        FrameMeta { csum: Csum::Partial { start: p.l4 as u16, offset }, gso }
    }

    /// Verifies the transport checksum, unless the port's virtio header vouches for it.
    ///
    /// # Errors
    /// [`DropReason::BadL4Checksum`].
    #[inline]
    pub fn verify(&self, slot: u32, frame: &[u8], p: &Packet, meta: FrameMeta) -> Result<(), DropReason> {
        let lax = self.ports.get(slot).is_some_and(|p| p.config.lax_offload);
        if meta.csum == Csum::Full && !lax && !parse::verify_l4(frame, p) {
            return Err(DropReason::BadL4Checksum);
        }
        Ok(())
    }
}
