//! Theory of operation: the gateway as an IPv6 router (RFC 4861). The switch passes on what guests ask of it.
//!
//! - It answers solicitations for its own addresses, those of duplicate address detection included, whatever options they
//!   have (RFC 7527).
//! - It answers a router solicitation at once, and the guest alone. The delay of RFC 4861 6.2.6 keeps several routers
//!   from answering together; here there is one, since advertisements of guests are dropped.
//! - It advertises itself to all guests every 200 to 600 seconds once a guest has asked, and three times, 16 seconds
//!   apart, after what it says has changed.
//! - While the host has no IPv6, the lifetime of the router is 0 (RFC 4861 6.2.3): guests then know at once that no route
//!   leads out. The prefix stays.
//! - It asks a guest for the MAC of an address as it does by ARP (`l2/lan.rs`).

use crate::interface::effects::Effects;
use crate::interface::stats::DropReason;
use crate::interface::types::{FrameMeta, Time};
use crate::l2::lan::{Link, Sender};
use crate::l3::frame_builder::header;
use crate::l3::gateway::Gateway;
use crate::tables::addressing::LINK_LOCAL;
use guestnet_wire::ether::Mac;
use guestnet_wire::frame::IpHeader;
use guestnet_wire::parse::Packet;
use guestnet_wire::{icmp6, ipv6, proto};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Seconds between advertisements that nobody asked for: at least, and how many more at most (RFC 4861 6.2.1).
const INTERVAL_S: u64 = 200;
const INTERVAL_SPREAD_S: u64 = 400;
/// How often and how far apart what has changed is advertised (RFC 4861 10).
const INITIAL: u8 = 3;
const INITIAL_INTERVAL_S: u64 = 16;
/// Lifetimes in seconds: of the router, and of names (RFC 8106 5.1); of the prefix (RFC 9096 3.1).
const ROUTER_LIFETIME_S: u16 = 1800;
const NAMES_LIFETIME_S: u32 = 1800;
const PREFERRED_S: u32 = 2700;
const VALID_S: u32 = 5400;
/// Bytes of domains to search that an advertisement has at most; the smallest MTU has room for them.
const SEARCH_MAX: usize = 512;

/// Flags of a neighbour advertisement: from a router, solicited, in place of what was known.
const ROUTER: u8 = 0x80;
const SOLICITED: u8 = 0x40;
const OVERRIDE: u8 = 0x20;
/// Flags of a router advertisement: addresses and other settings by DHCPv6.
const MANAGED: u8 = 0x80;
const OTHER: u8 = 0x40;

/// What the gateway says as a router.
#[derive(Debug)]
pub(crate) struct Router {
    /// Its address in the prefix.
    pub address: Ipv6Addr,
    /// The domains to search, as DNSSL carries them.
    search: Vec<u8>,
    /// The host has IPv6.
    upstream: bool,
    /// When the next advertisement to all guests is due; `None` until a guest asks.
    next: Option<Time>,
    /// Advertisements that follow each other quickly.
    quick: u8,
}

impl Router {
    /// A router that nobody has asked yet.
    pub fn new(address: Ipv6Addr, search: &[String], upstream: bool) -> Router {
        Router { address, search: encode(search), upstream, next: None, quick: 0 }
    }
}

/// Domains as DNSSL carries them (RFC 8106 5.2), as many as have room. What is no domain is left out.
fn encode(domains: &[String]) -> Vec<u8> {
    let mut out = Vec::new();
    for domain in domains {
        let mut name = Vec::new();
        let labels = domain.trim_end_matches('.').split('.');
        let good = labels.clone().all(|l| (1..=63).contains(&l.len()));
        for label in labels {
            name.push(label.len() as u8);
            name.extend_from_slice(label.as_bytes());
        }
        name.push(0);
        if good && name.len() <= 255 && out.len().saturating_add(name.len()) <= SEARCH_MAX {
            out.extend_from_slice(&name);
        }
    }
    out.resize(out.len().next_multiple_of(8), 0);
    out
}

impl Gateway {
    /// Answers a solicitation of a guest for the gateway, or for a router.
    ///
    /// # Errors
    /// Why it is not answered.
    pub fn answer_discovery<E: Effects>(
        &mut self,
        link: &mut Link<'_, E>,
        from: Sender,
        frame: &[u8],
        p: &Packet,
    ) -> Result<(), DropReason> {
        let IpAddr::V6(guest) = p.src else { return Err(DropReason::Malformed) };
        let message = frame.get(p.l4..p.end).unwrap_or(&[]);
        if message.first() == Some(&icmp6::ROUTER_SOLICITATION) {
            if !self.may_advertise(link.now, from.slot) {
                return Err(DropReason::RateLimit);
            }
            self.schedule(link.now);
            return match guest.is_unspecified() {
                true => {
                    self.advertise(link, from.slot, icmp6::multicast_mac(icmp6::ALL_NODES), icmp6::ALL_NODES)
                }
                false => self.advertise(link, from.slot, from.mac, guest),
            };
        }
        let target = message.get(8..24).and_then(|t| <[u8; 16]>::try_from(t).ok());
        let target = Ipv6Addr::from(target.ok_or(DropReason::Malformed)?);
        // RFC 4861 7.2.4: who detects duplicates has no address yet, and all nodes are told.
        let (mac, dst, flags) = match guest.is_unspecified() {
            true => (icmp6::multicast_mac(icmp6::ALL_NODES), icmp6::ALL_NODES, ROUTER | OVERRIDE),
            false => (from.mac, guest, ROUTER | SOLICITED | OVERRIDE),
        };
        let mut body = [0u8; 24];
        let (address, option) = body.split_at_mut(16);
        address.copy_from_slice(&target.octets());
        option.copy_from_slice(&link_layer(icmp6::option::TARGET, self.mac));
        let kind = (icmp6::ADVERTISEMENT, 0);
        let to = Sender { slot: from.slot, mac };
        self.send_discovery(link, to, (target, dst), kind, [flags, 0, 0, 0], &body)
    }

    /// The host's IPv6 has come or gone: all guests are told.
    pub fn set_upstream6<E: Effects>(&mut self, link: &mut Link<'_, E>, upstream: bool) {
        let Some(router) = &mut self.router else { return };
        if router.upstream != upstream {
            router.upstream = upstream;
            router.quick = INITIAL;
            router.next = Some(link.now);
            self.router_timer(link);
        }
    }

    /// When all guests are to be told again.
    pub(super) fn next_advertisement(&self) -> Option<Time> {
        self.router.as_ref()?.next
    }

    /// Advertises the router to all guests, if that is due.
    pub(super) fn router_timer<E: Effects>(&mut self, link: &mut Link<'_, E>) {
        if self.next_advertisement().is_none_or(|at| at > link.now) {
            return;
        }
        let slots: Vec<u32> = link.lan.local_ports().map(|(slot, _)| slot).collect();
        for slot in slots {
            let mac = icmp6::multicast_mac(icmp6::ALL_NODES);
            if let Err(why) = self.advertise(link, slot, mac, icmp6::ALL_NODES) {
                link.lan.count_drop(slot, why);
            }
        }
        if let Some(router) = &mut self.router {
            router.next = None;
            router.quick = router.quick.saturating_sub(1);
        }
        self.schedule(link.now);
    }

    fn schedule(&mut self, now: Time) {
        let spread = self.key.hash(&[now.0]).checked_rem(INTERVAL_SPREAD_S).unwrap_or(0);
        if let Some(router) = &mut self.router {
            let after = if router.quick > 0 { INITIAL_INTERVAL_S } else { INTERVAL_S.saturating_add(spread) };
            router.next.get_or_insert(now.plus_s(after));
        }
    }

    /// Sends a router advertisement to a port (RFC 4861 4.2).
    fn advertise<E: Effects>(
        &mut self,
        link: &mut Link<'_, E>,
        slot: u32,
        mac: Mac,
        dst: Ipv6Addr,
    ) -> Result<(), DropReason> {
        let Some(router) = &self.router else { return Err(DropReason::UnsupportedProtocol) };
        let mtu = link.lan.port(slot).ok_or(DropReason::NoEndpoint)?.config.mtu;
        let services = link.lan.addressing().services();
        let flags = if services.dhcp6().is_some() { MANAGED | OTHER } else { 0 };
        let lifetime = if router.upstream { ROUTER_LIFETIME_S } else { 0 };
        let [high, low] = lifetime.to_be_bytes();
        // Reachable time and retransmission timer are the guest's own.
        let mut body = vec![0u8; 8];
        body.extend_from_slice(&link_layer(icmp6::option::SOURCE, self.mac));
        if mtu >= ipv6::MIN_MTU {
            body.extend_from_slice(&[icmp6::option::MTU, 1, 0, 0]);
            body.extend_from_slice(&u32::from(mtu).to_be_bytes());
        }
        // On the link, and for addresses that guests make themselves.
        body.extend_from_slice(&[icmp6::option::PREFIX, 4, 64, 0xc0]);
        body.extend_from_slice(&VALID_S.to_be_bytes());
        body.extend_from_slice(&PREFERRED_S.to_be_bytes());
        body.extend_from_slice(&[0; 4]);
        let prefix = link.lan.addressing().subnet().prefix6().unwrap_or(Ipv6Addr::UNSPECIFIED);
        body.extend_from_slice(&prefix.octets());
        if services.find(proto::UDP, SocketAddr::new(router.address.into(), 53)).is_some() {
            body.extend_from_slice(&[icmp6::option::RDNSS, 3, 0, 0]);
            body.extend_from_slice(&NAMES_LIFETIME_S.to_be_bytes());
            body.extend_from_slice(&router.address.octets());
        }
        if !router.search.is_empty() {
            let units = router.search.len().div_ceil(8).saturating_add(1) as u8;
            body.extend_from_slice(&[icmp6::option::DNSSL, units, 0, 0]);
            body.extend_from_slice(&NAMES_LIFETIME_S.to_be_bytes());
            body.extend_from_slice(&router.search);
        }
        // A preference of 0 is the medium one (RFC 4191 2.1).
        let rest = [64, flags, high, low];
        let to = Sender { slot, mac };
        self.send_discovery(link, to, (LINK_LOCAL, dst), (icmp6::ROUTER_ADVERTISEMENT, 0), rest, &body)
    }

    fn send_discovery<E: Effects>(
        &mut self,
        link: &mut Link<'_, E>,
        to: Sender,
        (src, dst): (Ipv6Addr, Ipv6Addr),
        kind: (u8, u8),
        rest: [u8; 4],
        body: &[u8],
    ) -> Result<(), DropReason> {
        let b = self.frames.transport(body.len().saturating_add(icmp6::LEN))?;
        let n = icmp6::emit(b, (src, dst), kind, rest, body);
        let ip = IpHeader { ttl: icmp6::HOP_LIMIT, ..header(src.into(), dst.into(), proto::ICMPV6) };
        self.frames.send(link, to.slot, to.mac, ip, n, FrameMeta::default())
    }
}

/// An option with a MAC.
pub(crate) fn link_layer(kind: u8, Mac([a, b, c, d, e, f]): Mac) -> [u8; 8] {
    [kind, 1, a, b, c, d, e, f]
}

#[cfg(test)]
mod tests {
    use super::encode;

    #[test]
    fn domains_to_search_are_padded_and_bounded() {
        assert_eq!(encode(&["a.bc.".into()]), *b"\x01a\x02bc\0\0\0");
        assert!(encode(&[]).is_empty());
        for bad in ["", ".", "a..b", &"x".repeat(64)] {
            assert!(encode(&[bad.into()]).is_empty(), "{bad}");
        }
        let many: Vec<String> = (0..200).map(|i| format!("d{i}.example")).collect();
        assert!((400..=512).contains(&encode(&many).len()));
    }
}
