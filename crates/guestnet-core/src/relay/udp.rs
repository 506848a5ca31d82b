//! Theory of operation: the UDP relay.
//!
//! - One host socket serves one address and port of a guest for all destinations (RFC 4787 REQ-1): the mapping. Each
//!   remote side is a flow of its own, so that timeouts, counters and filtering are by conversation.
//! - A datagram from outside without a flow is delivered if the filtering rule lets it in, and leaves no state: the
//!   outside cannot fill the table.
//! - Large sends of a guest (USO) and of the host (GRO) stay in one piece as far as both sides can.

use crate::context::Context;
use crate::interface::config::Filtering;
use crate::interface::effects::{Effects, SockError};
use crate::interface::stats::DropReason;
use crate::interface::types::{FlowId, FrameMeta, Gso, IpFields, ServiceId, SockId};
use crate::l2::lan::Sender;
use crate::l3::icmp_error::IcmpError;
use crate::policy::{Admitted, Direction, Entry, Request, Verdict, shaping};
use crate::relay::Relay;
use crate::relay::errors::icmp_for;
use crate::tables::flow::{Flow, Key, State};
use crate::tables::service::DHCP_SERVER;
use crate::util::account::count_bytes;
use guestnet_wire::ether::Mac;
use guestnet_wire::parse::Packet;
use guestnet_wire::{be16, icmp, proto};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Why a flow was not opened, and what the guest gets as a response.
pub(super) struct Refused(pub DropReason, pub IcmpError);

/// Where a guest's datagram leaves.
pub(super) enum Way {
    /// Through the mapping in this slot, to this address.
    Mapping(u32, SocketAddr),
    /// Through a forward's socket, to this client.
    Forward(SockId, SocketAddr),
    /// It has to be read first.
    Read,
}

impl Relay {
    /// Relays a datagram of a guest. Returns the service where it is for one of the gateway's.
    ///
    /// # Errors
    /// Why it is dropped; the guest has been told, where it should be.
    #[inline]
    pub fn udp_out<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        from: Sender,
        frame: &mut [u8],
        p: &Packet,
        meta: FrameMeta,
    ) -> Result<Option<ServiceId>, DropReason> {
        let segment = match meta.gso {
            Some(Gso::Udp(n)) if p.payload_len() > usize::from(n) => n,
            _ => 0,
        };
        let guest = SocketAddr::new(p.src, p.src_port);
        let remote = SocketAddr::new(p.dst, p.dst_port);
        let key = Key { slot: from.slot, proto: proto::UDP, guest, remote };
        // Before the table is asked: it files a mapping under zeros.
        if p.src_port == 0 || p.dst_port == 0 {
            return Err(DropReason::BadDestination);
        }
        if let Some(index) = self.flows.find(&key) {
            return self.send_datagram(cx, index, from, frame, p, segment).map(|()| None);
        }
        let addressing = cx.link.lan.addressing();
        let broadcast = p.dst_port == DHCP_SERVER && addressing.subnet().is_broadcast(p.dst);
        let service = addressing.services().find(proto::UDP, remote);
        let service = service.or_else(|| if broadcast { addressing.services().dhcp() } else { None });
        if service.is_some() {
            return Ok(service);
        }
        if addressing.ends_here(p.dst) {
            let e = IcmpError::unreachable(icmp::unreachable::PORT);
            return Err(cx.gateway.refuse(&mut cx.link, from, frame, p, DropReason::BadDestination, e));
        }
        if cx.route_to_guest(from, frame, p, meta)? {
            return Ok(None);
        }
        let admitted = cx.outbound(from, frame, p, remote)?;
        let opened = match admitted.inspect {
            None => self.open_datagram(cx, key, from.mac, admitted),
            Some(_) => self.open_held(cx, key, from.mac, admitted),
        };
        match opened {
            Ok(index) => self.send_datagram(cx, index, from, frame, p, segment).map(|()| None),
            Err(Refused(why, e)) => Err(cx.gateway.refuse(&mut cx.link, from, frame, p, why, e)),
        }
    }

    /// Opens a UDP or echo flow, and the socket of its guest address and port if that is new.
    pub(super) fn open_datagram<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        key: Key,
        mac: Mac,
        Admitted { target, rule, .. }: Admitted,
    ) -> Result<u32, Refused> {
        let mapping = self.shared_mapping(cx, key, mac, target)?;
        let admitted = cx.policy.generation();
        let state = State::Datagram { mapping, target, ip_id: 0, watched: false };
        let flow = Flow::new(key, mac, Direction::Outbound, admitted, cx.link.now, state).by(rule);
        let id = self.open_flow(cx, flow, None);
        self.join_mapping(id.index, mapping);
        Ok(id.index)
    }

    /// The mapping of a guest's address and port, with its socket, which is opened if it is new.
    pub(super) fn shared_mapping<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        key: Key,
        mac: Mac,
        target: SocketAddr,
    ) -> Result<u32, Refused> {
        let shared = Key::mapping(key.slot, key.proto, key.guest);
        let admitted = cx.policy.generation();
        let prohibited = IcmpError::unreachable(icmp::unreachable::ADMIN_PROHIBITED);
        let new = self.flows.find(&shared).is_none();
        self.admit(cx, key.slot, new).map_err(|why| Refused(why, prohibited))?;
        // Making room may have closed the mapping and its socket: then there is room for a new one.
        Ok(match self.flows.find(&shared) {
            Some(mapping) => mapping,
            None => {
                let id = self.flows.next_id();
                // It is for every destination of the guest's port, not for the first alone.
                let like = match target {
                    SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
                    SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
                };
                let sock = if key.proto == proto::UDP {
                    cx.link.fx.udp_open(id, SocketAddr::new(like, 0))
                } else {
                    cx.link.fx.ping_open(id, like)
                };
                let sock = sock.map_err(|e| Refused(DropReason::HostError, icmp_for(e, 0)))?;
                let state = State::Mapping { sock, flows: Default::default() };
                if let Some(guest) = self.guests.get_mut(key.slot) {
                    guest.sockets = guest.sockets.saturating_add(1);
                }
                let flow = Flow::new(shared, mac, Direction::Outbound, admitted, cx.link.now, state);
                self.flows.insert(flow).index
            }
        })
    }

    /// Sends a guest's datagram on its flow.
    #[inline]
    fn send_datagram<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        index: u32,
        from: Sender,
        frame: &[u8],
        p: &Packet,
        segment: u16,
    ) -> Result<(), DropReason> {
        let ttl = cx.gateway.check_ttl(&mut cx.link, from, frame, p)?;
        let payload = frame.get(p.payload..p.end).unwrap_or(&[]);
        if cx.policy.shaping.is_active()
            && !self.within_limits(cx, index, shaping::Way::Up, payload.len(), segment)
        {
            // A new flow ends like any other.
            self.touch(cx.link.now, index);
            return Err(DropReason::RateLimit);
        }
        let sent = match self.note_out(index, from.mac, be16(frame, p.l3.saturating_add(4)), payload.len()) {
            Some(Way::Mapping(mapping, target)) => {
                let Some(State::Mapping { sock, .. }) = self.flows.at(mapping).map(|m| &m.state) else {
                    return Err(DropReason::NoFlow);
                };
                cx.link.fx.udp_send(
                    *sock,
                    target,
                    payload,
                    segment,
                    IpFields { ttl, tos: p.tos },
                    p.dont_fragment,
                )
            }
            Some(Way::Forward(sock, client)) if segment == 0 => {
                cx.link.fx.udp_send_forward(sock, client, payload)
            }
            Some(Way::Forward(sock, client)) => payload
                .chunks(usize::from(segment))
                .try_for_each(|piece| cx.link.fx.udp_send_forward(sock, client, piece)),
            Some(Way::Read) => return self.read_datagrams(cx, index, from, frame, p, segment),
            None => Err(SockError::Other(0)),
        };
        self.touch(cx.link.now, index);
        sent.map_err(|e| {
            cx.gateway.icmp_error(&mut cx.link, from, frame, p, icmp_for(e, p.ip_len()));
            DropReason::HostError
        })
    }

    /// Whether datagrams of a flow are within the limits of the owner; if so, they are charged.
    #[cold]
    fn within_limits<E>(
        &self,
        cx: &mut Context<'_, E>,
        index: u32,
        way: shaping::Way,
        bytes: usize,
        segment: u16,
    ) -> bool {
        let Some(f) = self.flows.at(index) else { return true };
        let Some(port) = cx.link.lan.port(f.key.slot) else { return true };
        let owner = cx.policy.owner(port.id, f.key.slot, f.rule);
        let packets = bytes.checked_div(usize::from(segment)).map_or(1, |n| n.max(1));
        let packets = u32::try_from(packets).unwrap_or(u32::MAX);
        cx.policy.shaping.police(cx.link.now, owner, way, bytes, packets)
    }

    /// Counts what a guest sends on a flow, and returns where it leaves.
    #[inline]
    pub(super) fn note_out(&mut self, index: u32, mac: Mac, id: u16, bytes: usize) -> Option<Way> {
        let f = self.flows.at_mut(index)?;
        f.mac = mac;
        count_bytes(&mut f.bytes_out, bytes);
        f.packets_out = f.packets_out.saturating_add(1);
        match &mut f.state {
            State::Datagram { mapping, target, ip_id, watched } => {
                *ip_id = id;
                if *watched {
                    return Some(Way::Read);
                }
                let way = (*mapping, *target);
                if let Some(m) = self.flows.at_mut(way.0) {
                    m.mac = mac;
                }
                Some(Way::Mapping(way.0, way.1))
            }
            State::Forwarded { sock, client, .. } => Some(Way::Forward(*sock, *client)),
            State::Held { ip_id, .. } => {
                *ip_id = id;
                Some(Way::Read)
            }
            _ => None,
        }
    }

    /// Finds the flow of a mapping that a datagram from outside belongs to, or the mapping itself where the filtering rule
    /// lets it in without a flow. Also returns the address that the guest knows the sender by.
    ///
    /// # Errors
    /// [`DropReason::NoFlow`], [`DropReason::Filtered`], and the reason of the policy.
    pub(super) fn admit_inbound<E>(
        &self,
        cx: &Context<'_, E>,
        id: FlowId,
        from: SocketAddr,
    ) -> Result<(u32, SocketAddr), DropReason> {
        let key = self.flows.get(id).filter(|f| f.is_mapping()).ok_or(DropReason::NoFlow)?.key;
        let name = cx.policy.name_of(from.ip().to_canonical()).ok_or(DropReason::Filtered)?;
        let remote = SocketAddr::new(name, from.port());
        if let Some(index) = self.flows.find(&Key { remote, ..key }) {
            return Ok((index, remote));
        }
        let open = match self.filtering {
            _ if key.proto != proto::UDP => false,
            Filtering::EndpointIndependent => true,
            Filtering::AddressDependent => self.flows.has_peer(id.index, name),
            Filtering::AddressAndPortDependent => false,
        };
        if !open {
            return Err(DropReason::Filtered);
        }
        let request = Request {
            direction: Direction::Inbound(Entry::Mapping),
            endpoint: cx.link.lan.port(key.slot).ok_or(DropReason::NoEndpoint)?.id,
            protocol: key.proto,
            source: remote,
            destination: key.guest,
        };
        match cx.policy.judge(&request) {
            Verdict::Deny { reason, .. } => Err(reason),
            // Only flows to the outside are inspected or asked about.
            Verdict::Allow { .. } | Verdict::Inspect { .. } | Verdict::Ask { .. } | Verdict::Defer { .. } => {
                Ok((id.index, remote))
            }
        }
    }

    /// Handles datagrams that came in on a socket of a mapping, several of `segment` bytes each when that is not 0.
    #[inline]
    pub fn udp_in<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        id: FlowId,
        from: SocketAddr,
        payload: &[u8],
        segment: u16,
    ) {
        match self.admit_inbound(cx, id, from) {
            Ok((index, remote)) => self.deliver_datagram(cx, index, remote, payload, segment),
            Err(why) => match self.flows.get_mut(id).map(|f| f.key.slot) {
                Some(slot) => cx.link.lan.count_drop(slot, why),
                None => cx.link.lan.base_mut().drop(why),
            },
        }
    }

    /// Sends datagrams of a flow to its guest.
    #[inline]
    pub(super) fn deliver_datagram<E: Effects>(
        &mut self,
        cx: &mut Context<'_, E>,
        index: u32,
        remote: SocketAddr,
        payload: &[u8],
        segment: u16,
    ) {
        if cx.policy.shaping.is_active()
            && !self.within_limits(cx, index, shaping::Way::Down, payload.len(), segment)
        {
            self.touch(cx.link.now, index);
            if let Some(slot) = self.flows.at(index).map(|f| f.key.slot) {
                cx.link.lan.count_drop(slot, DropReason::RateLimit);
            }
            return;
        }
        let Some(f) = self.flows.at_mut(index) else { return };
        count_bytes(&mut f.bytes_in, payload.len());
        f.packets_in = f.packets_in.saturating_add(1);
        let (slot, mac, guest, mapping) = (f.key.slot, f.mac, f.key.guest, f.is_mapping());
        if !mapping {
            self.touch(cx.link.now, index);
        }
        let frames = cx.gateway.frames();
        if let Err(why) = frames.send_udp(&mut cx.link, slot, mac, remote, guest, payload, segment) {
            cx.link.lan.count_drop(slot, why);
        }
    }
}
