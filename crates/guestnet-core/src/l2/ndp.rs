//! Theory of operation: neighbour discovery (RFC 4861) between guests, filtered as [`super::arp`] filters ARP.
//!
//! - An address belongs to the port that used it or solicited it first, and no guest advertises another's.
//! - A link-layer address in a message is the sender's own.
//! - Router advertisements and redirects of guests are dropped (RFC 6105), also behind extension headers or in fragments
//!   (RFC 7113, RFC 6980).
//! - Messages of neighbour discovery have a hop limit of 255 and a code of 0 (RFC 4861 6.1, 7.1): a router would have
//!   lowered the limit.
//! - Where the gateway has IPv6, solicitations for its addresses and for routers are its own ([`Verdict::Discover`]), and
//!   reports of multicast listeners go no further, since only routers need them (RFC 4541 3).
//! - Queries for the gateway's DHCPv6 service are found here. No other guest gets them, and without that service they are
//!   multicast as any.

use crate::interface::effects::Effects;
use crate::interface::stats::DropReason;
use crate::interface::types::{FrameMeta, ServiceId, Time};
use crate::l2::frame_checks::udp_destination;
use crate::l2::lan::{Lan, Notice, Sender, Verdict, transmit};
use crate::l3::router::link_layer;
use crate::tables::addressing::LINK_LOCAL;
use crate::tables::service::{DHCP6_CLIENT, DHCP6_SERVER, DHCP6_SERVERS};
use guestnet_wire::ether::Mac;
use guestnet_wire::frame::{self, FrameHeader, IpHeader};
use guestnet_wire::icmp6::option::{SOURCE, TARGET};
use guestnet_wire::icmp6::{
    ADVERTISEMENT, REDIRECT, ROUTER_ADVERTISEMENT, ROUTER_SOLICITATION, SOLICITATION,
    is_discovery as discovers,
};
use guestnet_wire::parse::{FRAGMENT_HEADER, Packet, is_extension};
use guestnet_wire::{icmp, icmp6, proto, put, tcp, udp};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Bytes of a neighbour solicitation with the option of the sender's MAC.
const SOLICITATION_FRAME: usize = frame::HEADER_MAX + icmp6::LEN + 24;

impl Lan {
    /// Checks that a guest may send an IPv6 packet to others.
    pub(super) fn check_v6<E: Effects>(
        &mut self,
        now: Time,
        from: Sender,
        frame: &[u8],
        p: &Packet,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        if p.src.is_multicast() {
            return Err(DropReason::SpoofedSource);
        }
        if !p.src.is_unspecified() {
            self.check_source(now, from, p.src, fx)?;
        }
        let message = frame.get(p.l4..p.end).unwrap_or(&[]);
        let kind = message.first().copied().unwrap_or(0);
        if let Some(f) = p.fragment {
            // Extension headers behind the fragment header could hide anything. The transport header must be in the
            // first fragment (RFC 7112), since later fragments are not inspected.
            let hidden = p.proto == FRAGMENT_HEADER || is_extension(p.proto);
            let discovery = p.proto == proto::ICMPV6 && discovers(kind);
            if hidden || f.offset == 0 && (discovery || message.len() < header_len(p.proto)) {
                return Err(DropReason::Policy);
            }
        }
        if udp_destination(frame, p) == Some(DHCP6_CLIENT)
            && (self.bridged || {
                let services = self.addressing.services();
                services.dhcp().or(services.dhcp6()).is_some()
            })
        {
            return Err(DropReason::Policy);
        }
        if p.proto == proto::ICMPV6 {
            self.check_icmp_error(from.slot, frame, p)?;
        }
        if p.fragment.is_some() {
            return Ok(());
        }
        if p.proto == proto::ICMPV6 {
            self.check_ndp(now, from, (kind, p.ttl), p.src, message, fx)
        } else {
            Ok(())
        }
    }

    /// Whether a checked ICMPv6 message concerns the gateway as a router, and what is left to be done with it. `None`: it is
    /// an ordinary packet.
    ///
    /// # Errors
    /// Why it is dropped.
    pub(super) fn for_router(
        &mut self,
        from: Sender,
        dst: Mac,
        frame: &[u8],
        p: &Packet,
        meta: FrameMeta,
    ) -> Result<Option<Verdict>, DropReason> {
        if p.proto != proto::ICMPV6 || p.fragment.is_some() {
            return Ok(None);
        }
        let message = frame.get(p.l4..p.end).unwrap_or(&[]);
        let to_gateway = dst == self.gateway_mac;
        let verdict = match message.first().copied().unwrap_or(0) {
            ROUTER_SOLICITATION => Verdict::Discover,
            SOLICITATION => {
                let target = message.get(8..24).and_then(|t| <[u8; 16]>::try_from(t).ok());
                let target = IpAddr::V6(target.ok_or(DropReason::Malformed)?.into());
                match self.addressing.is_own(target) {
                    true => Verdict::Discover,
                    false if to_gateway => return Err(DropReason::BadDestination),
                    false => return Ok(None),
                }
            }
            ADVERTISEMENT if to_gateway => Verdict::Done,
            icmp6::LISTENER_REPORT | icmp6::LISTENER_DONE | icmp6::LISTENER_REPORT2 => Verdict::Done,
            // No guest is a router to others.
            icmp6::LISTENER_QUERY => return Err(DropReason::Policy),
            _ => return Ok(None),
        };
        self.verify(from.slot, frame, p, meta)?;
        // The guest does not know the gateway, as after a restart.
        if verdict == Verdict::Discover && dst.is_multicast() && !p.src.is_unspecified() {
            self.notices.push_back(Notice::Restarted(from.slot));
        }
        Ok(Some(verdict))
    }

    /// Sends a neighbour solicitation of the gateway for an address to the port that should have it.
    pub(super) fn solicit<E: Effects>(&mut self, slot: u32, target: Ipv6Addr, fx: &mut E) {
        if self.addressing.gateway6().is_none() {
            return;
        }
        let mut body = [0u8; 24];
        put(&mut body, 0, &target.octets());
        put(&mut body, 16, &link_layer(SOURCE, self.gateway_mac));
        let group = icmp6::solicited_node(target);
        let mut frame = [0u8; SOLICITATION_FRAME];
        let ip = IpHeader {
            src: LINK_LOCAL.into(),
            dst: group.into(),
            proto: proto::ICMPV6,
            ttl: icmp6::HOP_LIMIT,
            tos: 0,
            id: 0,
            frag: 0,
        };
        let header = FrameHeader { dst: icmp6::multicast_mac(group), src: self.gateway_mac, ip };
        let (_, message) = frame.split_at_mut(frame::HEADER_MAX);
        let n = icmp6::emit(message, (LINK_LOCAL, group), (SOLICITATION, 0), [0; 4], &body);
        header.emit(&mut frame, n);
        if let Some(port) = self.ports.get_mut(slot) {
            transmit(port, &frame, FrameMeta::default(), fx);
        }
    }

    /// The DHCPv6 service, where the packet is a query for it: by multicast, or to its address.
    ///
    /// # Errors
    /// [`DropReason::Policy`] for a query from another than a link-local address, which RFC 8415 16 demands.
    #[inline]
    pub(super) fn dhcp6_query(&self, p: &Packet) -> Result<Option<ServiceId>, DropReason> {
        if p.proto != proto::UDP || p.dst_port != DHCP6_SERVER || p.fragment.is_some() {
            return Ok(None);
        }
        let services = self.addressing.services();
        let service = if p.dst == IpAddr::V6(DHCP6_SERVERS) {
            services.dhcp6()
        } else {
            services.find(proto::UDP, SocketAddr::new(p.dst, DHCP6_SERVER))
        };
        match p.src {
            IpAddr::V6(src) if src.is_unicast_link_local() => Ok(service),
            _ if service.is_some() => Err(DropReason::Policy),
            _ => Ok(None),
        }
    }

    fn check_ndp<E: Effects>(
        &mut self,
        now: Time,
        from: Sender,
        (kind, ttl): (u8, u8),
        src: IpAddr,
        message: &[u8],
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let (options, lladdr) = match kind {
            ROUTER_ADVERTISEMENT | REDIRECT => return Err(DropReason::Policy),
            ROUTER_SOLICITATION => (message.get(8..), SOURCE),
            SOLICITATION => (message.get(24..), SOURCE),
            ADVERTISEMENT => (message.get(24..), TARGET),
            _ => return Ok(()),
        };
        if ttl != icmp6::HOP_LIMIT || message.get(1) != Some(&0) {
            return Err(DropReason::Malformed);
        }
        let mut options = options.ok_or(DropReason::Malformed)?;
        while let Some((&kind, rest)) = options.split_first() {
            let len = usize::from(rest.first().copied().unwrap_or(0)) * 8;
            let (option, more) =
                options.split_at_checked(len).filter(|_| len > 0).ok_or(DropReason::Malformed)?;
            if kind == lladdr && option.get(2..8) != Some(&from.mac.0) {
                return Err(DropReason::SpoofedMac);
            }
            options = more;
        }
        let Some(target) = message.get(8..24).and_then(|t| <[u8; 16]>::try_from(t).ok()) else {
            return Ok(());
        };
        let target = IpAddr::V6(Ipv6Addr::from(target));
        match kind {
            ADVERTISEMENT => self.check_source(now, from, target, fx),
            SOLICITATION if src.is_unspecified() => {
                // Duplicate address detection (RFC 4862 5.4). A port that has the address already must receive this.
                let _owner_answers = self.check_source(now, from, target, fx);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// Bytes of a transport header that a filter may have to inspect; 0 for other protocols.
fn header_len(protocol: u8) -> usize {
    match protocol {
        proto::TCP => tcp::MIN_LEN,
        proto::UDP => udp::LEN,
        proto::ICMPV6 => icmp::LEN,
        _ => 0,
    }
}
