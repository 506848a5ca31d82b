//! Theory of operation: [`Gateway`] is the network's host and router at layer 3 (RFC 1122, RFC 1812). The folder's other
//! files are its parts.
//!
//! - It answers echo requests to its addresses ([`Gateway::answer_echo`]).
//! - It routes packets on to other guests of the subnet ([`Gateway::route_to_guest`]), with TTL and MTU checked, in
//!   fragments where those are needed.
//! - It puts fragments together that cannot be routed on ([`Gateway::reassemble`]).
//! - It hands datagrams for its services to the control side ([`Gateway::punt`]).
//! - It tells guests by ICMP errors why a packet cannot go on ([`Gateway::icmp_error`]).
//!
//! What guests can cause here is limited for each port: ICMP errors, reports of refused flows and datagrams to services
//! have a rate each.

use crate::interface::config::{Limits, NetworkConfig};
use crate::interface::effects::{Effects, Event, FlowDenied};
use crate::interface::stats::DropReason;
use crate::interface::types::{Csum, FrameMeta, ServiceId, Time};
use crate::l2::frame_checks::largest_packet;
use crate::l2::lan::{Link, Sender};
use crate::l3::frame_builder::{FrameBuilder, header};
use crate::l3::icmp_error::{ERROR_MAX, ERROR6_MAX, IcmpError, may_answer, may_answer6};
use crate::l3::reassembly::{Outcome, Reassembly};
use crate::l3::router::Router;
use crate::policy::Direction;
use crate::policy::denials::Denials;
use crate::tables::addressing::LINK_LOCAL;
use crate::tables::per_port::PerPort;
use crate::util::account::count;
use crate::util::rate_limiter::RateLimiter;
use crate::util::siphash::SipKey;
use guestnet_wire::ether::{self, Ether, Mac};
use guestnet_wire::frame::IpHeader;
use guestnet_wire::parse::{self, Fragment, Packet};
use guestnet_wire::{gso, icmp, icmp6, ipv4, ipv6, proto, put};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

/// Bytes of a datagram to a UDP service that count as one datagram.
const COUNTED: usize = 1500;

/// Router advertisements a second that one guest gets for asking.
const ADVERTISEMENTS_PER_SECOND: u32 = 10;

/// A datagram of a guest to a UDP service of the gateway.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Datagram<'a> {
    /// The guest.
    pub from: Sender,
    /// The guest's address and port.
    pub src: SocketAddr,
    /// The address and port that it was sent to.
    pub dst: SocketAddr,
    /// The payload.
    pub payload: &'a [u8],
}

/// What is kept of each port.
struct Rates {
    /// ICMP errors to it.
    errors: RateLimiter,
    /// Its datagrams to UDP services.
    services: RateLimiter,
    /// Router advertisements that it asks for.
    advertisements: RateLimiter,
}

/// See the module head.
pub(crate) struct Gateway {
    pub(super) mac: Mac,
    pub(super) address: Ipv4Addr,
    /// Where ICMPv6 errors come from.
    address6: Ipv6Addr,
    pub(super) frames: FrameBuilder,
    pub(super) reassembly: Reassembly,
    /// The fragment that is being made of a routed packet.
    fragment: Vec<u8>,
    rates: PerPort<Rates>,
    denials: Denials,
    limits: Limits,
    pub(super) key: SipKey,
    /// Where the network has IPv6.
    pub(super) router: Option<Router>,
}

impl Gateway {
    /// A gateway that has seen nothing.
    #[must_use]
    pub fn new(config: &NetworkConfig) -> Gateway {
        let limits = config.limits.clone();
        Gateway {
            mac: config.gateway_mac,
            address: config.gateway4,
            address6: config.gateway6.map_or_else(|| link_local(config.gateway_mac), |(ip, _)| ip),
            frames: FrameBuilder::new(config.gateway_mac),
            reassembly: Reassembly::new(
                limits.reassembly_bytes,
                limits.reassemblies_per_port,
                config.timeouts.reassembly,
            ),
            fragment: Vec::with_capacity(2048),
            rates: PerPort::default(),
            denials: Denials::default(),
            key: SipKey::from_secret(&config.secret, 16),
            router: config.gateway6.map(|(ip, _)| Router::new(ip, &config.search, config.upstream6)),
            limits,
        }
    }

    /// See [`FrameBuilder::exchange_scratch`].
    pub fn exchange_scratch(&mut self, other: &mut Vec<u8>) {
        self.frames.exchange_scratch(other);
    }

    /// A port was added.
    pub fn add_port(&mut self, now: Time, slot: u32, port: u32) {
        let id = self.key.hash(&[now.0, u64::from(port)]);
        self.frames.add_port(slot, id as u32);
        self.denials.add_port(now, slot);
        self.rates.insert(
            slot,
            Rates {
                errors: RateLimiter::new(self.limits.icmp_errors_per_second, now),
                services: RateLimiter::new(self.limits.service_datagrams_per_second, now),
                advertisements: RateLimiter::new(ADVERTISEMENTS_PER_SECOND, now),
            },
        );
    }

    /// A port was removed.
    pub fn remove_port(&mut self, slot: u32) {
        self.frames.remove_port(slot);
        self.reassembly.remove_port(slot);
        self.rates.remove(slot);
        self.denials.remove_port(slot);
    }

    /// The gateway's MAC.
    #[inline]
    #[must_use]
    pub fn mac(&self) -> Mac {
        self.mac
    }

    /// Where packets of the gateway's own to a guest come from.
    #[must_use]
    pub fn address_for(&self, guest: IpAddr) -> IpAddr {
        if guest.is_ipv4() { self.address.into() } else { self.address6.into() }
    }

    /// The gateway's IPv4 address.
    #[inline]
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Makes the frames to guests.
    #[inline]
    pub fn frames(&mut self) -> &mut FrameBuilder {
        &mut self.frames
    }

    /// Bytes held for fragments, overhead included.
    #[must_use]
    pub fn reassembly_bytes(&self) -> usize {
        self.reassembly.bytes()
    }

    // ---- packets to the gateway's MAC ---------------------------------------------------------------

    /// Takes a fragment. Returns the whole packet as a frame with its last fragment.
    ///
    /// # Errors
    /// [`DropReason::Reassembly`] when the fragment was refused, and its packet with it.
    pub fn reassemble<E: Effects>(
        &mut self,
        link: &mut Link<'_, E>,
        slot: u32,
        frame: &[u8],
        p: &Packet,
        f: Fragment,
    ) -> Result<Option<Vec<u8>>, DropReason> {
        let outcome = self.reassembly.add(link.now, slot, frame, p, f);
        while let Some(loser) = self.reassembly.evicted.pop() {
            link.lan.count_drop(loser, DropReason::Reassembly);
        }
        match outcome {
            Outcome::Complete(whole) => Ok(Some(whole)),
            Outcome::Held => Ok(None),
            Outcome::Refused => Err(DropReason::Reassembly),
        }
    }

    /// Routes a packet on to another guest of the subnet. `Ok(true)`: it was sent. `Ok(false)`: it is not for a guest.
    ///
    /// # Errors
    /// Why it cannot be sent; the guest has been told.
    pub fn route_to_guest<E: Effects>(
        &mut self,
        link: &mut Link<'_, E>,
        from: Sender,
        frame: &mut [u8],
        p: &Packet,
        meta: FrameMeta,
    ) -> Result<bool, DropReason> {
        let addressing = link.lan.addressing();
        if !addressing.subnet().is_host(p.dst) || addressing.is_own(p.dst) {
            return Ok(false);
        }
        self.check_ttl(link, from, frame, p)?;
        let Some((to, dst)) = link.lan.neighbour(p.dst).and_then(|b| Some((b.slot, b.mac?))) else {
            let e = IcmpError::unreachable(icmp::unreachable::HOST);
            return Err(self.refuse(link, from, frame, p, DropReason::NoEndpoint, e));
        };
        let mtu = link.lan.port(to).ok_or(DropReason::NoEndpoint)?.config.mtu;
        let meta = link.lan.offload_of(from.slot, frame, p, meta);
        let too_big = largest_packet(p, meta) > usize::from(mtu);
        if too_big && (p.dont_fragment || meta.gso.is_some()) {
            return Err(self.refuse(link, from, frame, p, DropReason::Oversized, IcmpError::too_big(mtu)));
        }
        let (ethertype, ttl_at) = if p.dst.is_ipv4() { (ether::IPV4, 8) } else { (ether::IPV6, 7) };
        Ether { dst, src: self.mac, ethertype }.emit(frame);
        put(frame, p.l3.saturating_add(ttl_at), &[p.ttl.saturating_sub(1)]);
        if p.dst.is_ipv4()
            && let Some(b) = frame.get_mut(p.l3..)
        {
            ipv4::fill_checksum(b);
        }
        if too_big {
            return self.deliver_fragments(link, to, frame, p, meta, usize::from(mtu)).map(|()| true);
        }
        link.lan.deliver(to, frame, meta, link.fx);
        Ok(true)
    }

    /// Fragments a packet for a port with a smaller MTU (RFC 791 3.2).
    fn deliver_fragments<E: Effects>(
        &mut self,
        link: &mut Link<'_, E>,
        to: u32,
        frame: &mut [u8],
        p: &Packet,
        meta: FrameMeta,
        mtu: usize,
    ) -> Result<(), DropReason> {
        if let Csum::Partial { start, offset } = meta.csum {
            gso::complete_checksum(frame, start, offset)?;
        }
        let fragment = &mut self.fragment;
        let packet = frame.get(p.l3..p.end).unwrap_or(&[]);
        let done = ipv4::fragments(packet, mtu, |header, data| {
            fragment.clear();
            fragment.extend_from_slice(frame.get(..p.l3).unwrap_or(&[]));
            fragment.extend_from_slice(header);
            fragment.extend_from_slice(data);
            link.lan.deliver(to, fragment, FrameMeta::default(), link.fx);
        });
        if done { Ok(()) } else { Err(DropReason::Oversized) }
    }

    /// The TTL of a packet at its next hop (RFC 1812 5.3.1).
    ///
    /// # Errors
    /// [`DropReason::TtlExpired`]; the guest has been told.
    #[inline]
    pub fn check_ttl<E: Effects>(
        &mut self,
        link: &mut Link<'_, E>,
        from: Sender,
        frame: &[u8],
        p: &Packet,
    ) -> Result<u8, DropReason> {
        if p.ttl <= 1 && !link.lan.addressing().is_own(p.dst) {
            self.icmp_error(link, from, frame, p, IcmpError(icmp::TIME_EXCEEDED, 0, [0; 4]));
            return Err(DropReason::TtlExpired);
        }
        Ok(p.ttl.saturating_sub(1).max(1))
    }

    /// Answers an echo request to the gateway's own address.
    ///
    /// # Errors
    /// Why the answer could not be sent.
    pub fn answer_echo<E: Effects>(
        &mut self,
        link: &mut Link<'_, E>,
        from: Sender,
        frame: &[u8],
        p: &Packet,
    ) -> Result<(), DropReason> {
        let body = frame.get(p.payload..p.end).unwrap_or(&[]);
        let rest = match frame.get(p.l4..).and_then(|b| b.first_chunk()) {
            Some(&[_, _, _, _, a, b, c, d]) => [a, b, c, d],
            None => return Err(DropReason::Truncated),
        };
        let b = self.frames.transport(body.len().saturating_add(icmp::LEN))?;
        let mac = from.mac;
        let (n, src, protocol) = match (p.src, p.dst) {
            (IpAddr::V6(guest), IpAddr::V6(own)) => {
                // The address that means the routers of the prefix is no source (RFC 4291 2.6).
                let own =
                    if link.lan.addressing().subnet().is_host(own.into()) { own } else { self.address6 };
                let src = if p.dst == IpAddr::V6(LINK_LOCAL) { LINK_LOCAL } else { own };
                let n = icmp6::emit(b, (src, guest), (icmp6::ECHO_REPLY, 0), rest, body);
                (n, src.into(), proto::ICMPV6)
            }
            _ => (icmp::emit(b, icmp::ECHO_REPLY, 0, rest, body), self.address.into(), proto::ICMP),
        };
        let ip = IpHeader { tos: p.tos, ..header(src, p.src, protocol) };
        self.frames.send(link, from.slot, mac, ip, n, FrameMeta::default())
    }

    // ---- ICMP errors and timers ---------------------------------------------------------------------

    /// Sends an ICMP error that quotes the guest's packet; false when it must not be sent, or the rate forbids it.
    pub fn icmp_error<E: Effects>(
        &mut self,
        link: &mut Link<'_, E>,
        from: Sender,
        frame: &[u8],
        p: &Packet,
        error: IcmpError,
    ) -> bool {
        let guest = match p.src {
            IpAddr::V4(guest) => guest,
            IpAddr::V6(guest) => {
                let own = link.lan.addressing().is_own(p.dst);
                let error = error.for_packet6(p, own);
                return error.is_some_and(|e| self.icmp6_error(link, from, guest, frame, p, e));
            }
        };
        if !may_answer(link.lan.addressing().subnet(), frame, p) {
            return false;
        }
        let quote = frame.get(p.l3..p.end).unwrap_or(&[]);
        self.send_error(link, from, (self.address.into(), guest.into()), quote, error)
    }

    /// As [`Gateway::icmp_error`], for an error of ICMPv6.
    fn icmp6_error<E: Effects>(
        &mut self,
        link: &mut Link<'_, E>,
        from: Sender,
        guest: Ipv6Addr,
        frame: &[u8],
        p: &Packet,
        error: IcmpError,
    ) -> bool {
        if !may_answer6(frame, p) {
            return false;
        }
        let quote = frame.get(p.l3..p.end).unwrap_or(&[]);
        // A guest knows the gateway by this address where its own leads no further (RFC 6724).
        let src =
            if guest.is_unicast_link_local() && self.router.is_some() { LINK_LOCAL } else { self.address6 };
        self.send_error(link, from, (src.into(), guest.into()), quote, error)
    }

    /// Sends an ICMP error of the addresses' family with a quotation to a guest, as if from the first address; false when
    /// the rate forbids it.
    pub fn send_error<E: Effects>(
        &mut self,
        link: &mut Link<'_, E>,
        to: Sender,
        (src, dst): (IpAddr, IpAddr),
        quote: &[u8],
        error: IcmpError,
    ) -> bool {
        let Sender { slot, mac } = to;
        let Some(mtu) = link.lan.port(slot).map(|p| p.config.mtu) else { return false };
        if !self.may_send_error(link.now, slot) {
            link.lan.count_drop(slot, DropReason::RateLimit);
            return false;
        }
        if let Some(c) = link.lan.counters_mut(slot) {
            count(&mut c.icmp_errors);
        }
        let most = if dst.is_ipv4() { ERROR_MAX - ipv4::MIN_LEN } else { ERROR6_MAX - ipv6::LEN };
        let room = most.min(usize::from(mtu).saturating_sub(ipv4::MIN_LEN)).saturating_sub(icmp::LEN);
        let quote = quote.get(..quote.len().min(room)).unwrap_or(quote);
        let Ok(b) = self.frames.transport(quote.len().saturating_add(icmp::LEN)) else { return false };
        let IcmpError(kind, code, rest) = error;
        let (n, ip) = match (src, dst) {
            (IpAddr::V6(from), IpAddr::V6(guest)) => {
                let n = icmp6::emit(b, (from, guest), (kind, code), rest, quote);
                (n, header(src, dst, proto::ICMPV6))
            }
            _ => {
                let n = icmp::emit(b, kind, code, rest, quote);
                (n, IpHeader { tos: 0xc0, ..header(src, dst, proto::ICMP) })
            }
        };
        if let Err(why) = self.frames.send(link, slot, mac, ip, n, FrameMeta::default()) {
            link.lan.count_drop(slot, why);
        }
        true
    }

    /// Takes one from a port's rate of router advertisements; false when there is none left.
    pub(super) fn may_advertise(&mut self, now: Time, slot: u32) -> bool {
        self.rates.get_mut(slot).is_some_and(|r| r.advertisements.allow(now))
    }

    /// Checks that the source of a guest's IPv6 packet leads back to it: no address of the link goes further than the link
    /// (RFC 4291 2.5.6), and the answer to a foreign one would not come here (RFC 2827).
    ///
    /// # Errors
    /// [`DropReason::SpoofedSource`]; the guest has been told.
    pub fn check_scope<E: Effects>(
        &mut self,
        link: &mut Link<'_, E>,
        from: Sender,
        frame: &[u8],
        p: &Packet,
    ) -> Result<(), DropReason> {
        let addressing = link.lan.addressing();
        let IpAddr::V6(src) = p.src else { return Ok(()) };
        if addressing.subnet().is_host(p.src) || addressing.ends_here(p.dst) {
            return Ok(());
        }
        use icmp6::unreachable::{BEYOND_SCOPE, INGRESS_POLICY};
        let code = if src.is_unicast_link_local() { BEYOND_SCOPE } else { INGRESS_POLICY };
        self.icmp6_error(link, from, src, frame, p, IcmpError(icmp6::UNREACHABLE, code, [0; 4]));
        Err(DropReason::SpoofedSource)
    }

    /// When [`Gateway::timers`] has something to do.
    #[must_use]
    pub fn next_timer(&self) -> Option<Time> {
        self.reassembly.next_timer().into_iter().chain(self.next_advertisement()).min()
    }

    /// Advertises the IPv6 router. Gives up packets whose fragments did not come in time, and tells the guests (RFC 1122
    /// 3.3.2, RFC 8200 4.5).
    pub fn timers<E: Effects>(&mut self, link: &mut Link<'_, E>) {
        self.router_timer(link);
        while let Some(old) = self.reassembly.expire(link.now) {
            link.lan.count_drop(old.slot, DropReason::Reassembly);
            let Some(first) = old.first else { continue };
            if let (Ok(p), Ok(eth)) = (parse::parse_ip(&first, ether::HEADER_LEN), Ether::parse(&first)) {
                let e = IcmpError(icmp::TIME_EXCEEDED, 1, [0; 4]);
                self.icmp_error(link, Sender { slot: old.slot, mac: eth.src }, &first, &p, e);
            }
        }
    }

    // ---- services and refusals ----------------------------------------------------------------------

    /// Hands a datagram up to a UDP service. False when it was dropped, because its guest sends too many or because the
    /// queue to the control side is full. All guests share that queue, so each has a rate, which counts bytes too.
    pub fn punt<E: Effects>(&mut self, link: &mut Link<'_, E>, service: ServiceId, d: &Datagram<'_>) -> bool {
        let slot = d.from.slot;
        let Some(port) = link.lan.port(slot).map(|p| p.id) else { return false };
        let now = link.now;
        if !self.service_rate(slot).is_some_and(|r| r.allow_n(now, cost(d.payload))) {
            link.lan.count_drop(slot, DropReason::RateLimit);
            return false;
        }
        let Datagram { from: Sender { mac, .. }, src, dst, payload } = *d;
        let taken = link.fx.event(Event::Datagram { service, port, mac, src, dst, payload: payload.into() });
        if !taken {
            link.lan.count_drop(slot, DropReason::EventRingFull);
        }
        taken
    }

    /// How much a port's guest may have the control side do.
    pub fn service_rate(&mut self, slot: u32) -> Option<&mut RateLimiter> {
        self.rates.get_mut(slot).map(|r| &mut r.services)
    }

    /// Takes one from a port's rate of ICMP errors; false when there is none left.
    pub fn may_send_error(&mut self, now: Time, slot: u32) -> bool {
        self.rates.get_mut(slot).is_some_and(|r| r.errors.allow(now))
    }

    /// Refuses a packet that would have opened a flow, and returns `why`. The guest gets an ICMP error and the control
    /// side an event, each within the port's rate.
    pub fn refuse<E: Effects>(
        &mut self,
        link: &mut Link<'_, E>,
        from: Sender,
        frame: &[u8],
        p: &Packet,
        why: DropReason,
        error: IcmpError,
    ) -> DropReason {
        self.icmp_error(link, from, frame, p, error);
        let (guest, remote) = (SocketAddr::new(p.src, p.src_port), SocketAddr::new(p.dst, p.dst_port));
        let refused = Refusal::outbound(p.proto, guest, remote);
        self.report_denied(link, from.slot, refused, None, why);
        why
    }

    /// Reports a refused flow to the control side, within the rate of its guest. `rule` is the label of the rule that
    /// decided; `None` where a limit was reached.
    pub fn report_denied<E: Effects>(
        &mut self,
        link: &mut Link<'_, E>,
        slot: u32,
        refused: Refusal,
        rule: Option<Arc<str>>,
        reason: DropReason,
    ) {
        let Some((port, _, counters)) = link.lan.port_and_counters(slot) else { return };
        let Some(unreported) = self.denials.count(link.now, slot) else { return };
        let Refusal { direction, proto, guest, remote, name, shown } = refused;
        let denied =
            FlowDenied { port, direction, proto, guest, remote, rule, name, shown, reason, unreported };
        if !link.fx.event(Event::FlowDenied(Box::new(denied))) {
            counters.drop(DropReason::EventRingFull);
        }
    }
}

impl Gateway {
    /// Counts a query that was refused by a rule. Returns how many denials of the guest went unreported before it, or `None`
    /// when it is not to be reported either.
    pub fn count_denial(&mut self, now: Time, slot: u32) -> Option<u32> {
        self.denials.count(now, slot)
    }
}

/// A flow that was refused.
#[derive(Debug, Clone)]
pub(crate) struct Refusal {
    /// Which way it goes.
    pub direction: Direction,
    /// IP protocol.
    pub proto: u8,
    /// The guest's side.
    pub guest: SocketAddr,
    /// The other side, as the guest names it.
    pub remote: SocketAddr,
    /// A name for which the guest got the address of the other side.
    pub name: Option<Arc<str>>,
    /// The name that the conversation showed.
    pub shown: Option<Arc<str>>,
}

impl Refusal {
    /// A refused flow of a guest to the outside, of which no name is known.
    pub fn outbound(proto: u8, guest: SocketAddr, remote: SocketAddr) -> Refusal {
        Refusal { direction: Direction::Outbound, proto, guest, remote, name: None, shown: None }
    }
}

/// The address of a MAC in every network (RFC 4291 appendix A).
fn link_local(mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0;
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

fn cost(payload: &[u8]) -> usize {
    payload.len().div_ceil(COUNTED).max(1)
}
