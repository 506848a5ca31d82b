//! Theory of operation: neighbour discovery (RFC 4861) between guests, filtered as [`super::arp`] filters ARP.
//!
//! - An address belongs to the port that used it or solicited it first, and no guest advertises another's.
//! - A link-layer address in a message is the sender's own.
//! - Router advertisements and redirects of guests are dropped (RFC 6105), also behind extension headers or in fragments
//!   (RFC 7113, RFC 6980).
//! - Queries for the gateway's DHCPv6 service are found here. No other guest gets them, and without that service they are
//!   multicast as any.
//! - The gateway itself has no other IPv6.

use crate::interface::effects::Effects;
use crate::interface::stats::DropReason;
use crate::interface::types::{ServiceId, Time};
use crate::l2::frame_checks::udp_destination;
use crate::l2::lan::{Lan, Sender};
use crate::tables::service::{DHCP6_CLIENT, DHCP6_SERVER, DHCP6_SERVERS};
use guestnet_wire::parse::{FRAGMENT_HEADER, Packet, is_extension};
use guestnet_wire::{icmp, proto, tcp, udp};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
/// Options with a link-layer address: the sender's, the target's.
const SOURCE: u8 = 1;
const TARGET: u8 = 2;

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
            let discovery = p.proto == proto::ICMPV6 && (ROUTER_SOLICITATION..=REDIRECT).contains(&kind);
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
        if p.proto == proto::ICMPV6 { self.check_ndp(now, from, kind, p.src, message, fx) } else { Ok(()) }
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
        kind: u8,
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
