//! Theory of operation: the UDP relay. One host socket serves one guest address and port for whatever it
//! sends to (RFC 4787 REQ-1); each remote side is a flow of its own, so that time-outs, counters and
//! filtering are by conversation. What comes in without a flow but within the filtering rule is delivered
//! and leaves no state, so the outside cannot fill the table. Large sends of a guest (USO) and of the host
//! (GRO) stay in one piece as far as both sides can.

use crate::interface::config::Filtering;
use crate::interface::effects::{Effects, SockError};
use crate::interface::stats::DropReason;
use crate::interface::types::{FlowId, FrameMeta, Gso, IpFields};
use crate::l3::gateway::IcmpError;
use crate::network::Network;
use crate::tables::flow::{Flow, Key, State};
use guestnet_wire::ether::Mac;
use guestnet_wire::parse::Packet;
use guestnet_wire::{be16, icmp, proto};
use std::net::{IpAddr, SocketAddr};

/// Why a flow was not opened, and how the guest is told.
pub(crate) struct Refused(pub DropReason, pub IcmpError);

/// How an error of the host is told to a guest.
pub(crate) fn icmp_for(e: SockError, packet_len: usize) -> IcmpError {
    use icmp::unreachable::{ADMIN_PROHIBITED, HOST, NET, PORT};
    IcmpError::unreachable(match e {
        SockError::Refused | SockError::Reset => PORT,
        SockError::NetUnreachable => NET,
        SockError::Prohibited => ADMIN_PROHIBITED,
        SockError::MessageTooBig(mtu) if mtu >= icmp::MIN_MTU => return IcmpError::too_big(mtu),
        SockError::MessageTooBig(_) => return IcmpError::too_big(plateau(packet_len)),
        SockError::HostUnreachable | SockError::TimedOut | SockError::Exhausted | SockError::Other(_) => HOST,
    })
}

/// The next lower MTU in use (RFC 1191 7.1), for when nobody says which.
pub(crate) fn plateau(packet_len: usize) -> u16 {
    [32000u16, 17914, 8166, 4352, 2002, 1492, 1006, 508, 296]
        .into_iter()
        .find(|m| usize::from(*m) < packet_len)
        .unwrap_or(68)
}

impl Network {
    /// A datagram of a guest to the gateway's MAC.
    pub(crate) fn udp_out<E: Effects>(
        &mut self,
        slot: u32,
        mac: Mac,
        frame: &mut [u8],
        p: &Packet,
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let segment = match meta.gso {
            Some(Gso::Udp(n)) if p.end - p.payload > usize::from(n) => n,
            _ => 0,
        };
        let guest = SocketAddr::new(p.src, p.src_port);
        let remote = SocketAddr::new(p.dst, p.dst_port);
        let key = Key { slot, proto: proto::UDP, guest, remote };
        // Before the table is asked: all zeros is how it files a mapping.
        if p.src_port == 0 || p.dst_port == 0 {
            return Err(DropReason::BadDestination);
        }
        if let Some(index) = self.flows.find(&key) {
            return self.send_datagram(index, slot, mac, frame, p, segment, fx);
        }
        let broadcast = p.dst_port == crate::tables::service::DHCP_SERVER && self.policy.is_broadcast(p.dst);
        let service = self.services.find(proto::UDP, remote);
        if let Some(service) = service.or(if broadcast { self.services.dhcp() } else { None }) {
            let payload = frame.get(p.payload..p.end).unwrap_or(&[]);
            self.punt(service, slot, mac, guest, remote, payload, segment, fx);
            return Ok(());
        }
        if self.is_own(p.dst) && self.cfg.host_loopback != Some(p.dst) {
            let e = IcmpError::unreachable(icmp::unreachable::PORT);
            return self.refuse(slot, mac, frame, p, DropReason::BadDestination, e, fx);
        }
        if self.route_to_guest(slot, mac, frame, p, meta, fx)? {
            return Ok(());
        }
        let target = self.outbound(slot, mac, frame, p, remote, fx)?;
        match self.open_datagram(key, mac, target, fx) {
            Ok(index) => self.send_datagram(index, slot, mac, frame, p, segment, fx),
            Err(Refused(why, e)) => self.refuse(slot, mac, frame, p, why, e, fx),
        }
    }

    /// Asks the policy where a new flow goes and tells the guest when it goes nowhere.
    pub(crate) fn outbound<E: Effects>(
        &mut self,
        slot: u32,
        mac: Mac,
        frame: &[u8],
        p: &Packet,
        remote: SocketAddr,
        fx: &mut E,
    ) -> Result<SocketAddr, DropReason> {
        let why = match self.policy.outbound(p.proto, remote) {
            Ok(target) => {
                self.check_ttl(slot, mac, frame, p, fx)?;
                return Ok(target);
            }
            Err(why) => why,
        };
        let code = match why {
            DropReason::Policy => icmp::unreachable::ADMIN_PROHIBITED,
            _ => icmp::unreachable::HOST,
        };
        self.refuse(slot, mac, frame, p, why, IcmpError::unreachable(code), fx)?;
        Err(why)
    }

    /// Opens a UDP or echo flow, and the socket of its guest address and port if that is new.
    pub(crate) fn open_datagram<E: Effects>(
        &mut self,
        key: Key,
        mac: Mac,
        target: SocketAddr,
        fx: &mut E,
    ) -> Result<u32, Refused> {
        let shared = Key::mapping(key.slot, key.proto, key.guest);
        let prohibited = IcmpError::unreachable(icmp::unreachable::ADMIN_PROHIBITED);
        let new = self.flows.find(&shared).is_none();
        self.admit(key.slot, new, fx).map_err(|why| Refused(why, prohibited))?;
        // Making room may have taken the mapping along, with its socket: then there is room for a new one.
        let mapping = match self.flows.find(&shared) {
            Some(mapping) => mapping,
            None => {
                let id = self.flows.next_id();
                let sock = if key.proto == proto::UDP {
                    fx.udp_open(id, target)
                } else {
                    fx.ping_open(id, target.ip())
                };
                let sock = sock.map_err(|e| Refused(DropReason::HostError, icmp_for(e, 0)))?;
                let state = State::Mapping { sock, flows: Default::default() };
                if let Some(port) = self.ports.get_mut(key.slot) {
                    port.sockets += 1;
                }
                self.flows.insert(Flow::new(shared, mac, false, self.now, state)).index
            }
        };
        let state = State::Datagram { mapping, target, ip_id: 0 };
        let id = self.open_flow(Flow::new(key, mac, false, self.now, state), fx);
        self.join_mapping(id.index, mapping);
        Ok(id.index)
    }

    /// Sends a guest's datagram on its flow.
    #[allow(clippy::too_many_arguments)] // The frame and what is known of it.
    fn send_datagram<E: Effects>(
        &mut self,
        index: u32,
        slot: u32,
        mac: Mac,
        frame: &[u8],
        p: &Packet,
        segment: u16,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let ttl = self.check_ttl(slot, mac, frame, p, fx)?;
        let payload = frame.get(p.payload..p.end).unwrap_or(&[]);
        let sent = match self.note_out(index, mac, be16(frame, p.l3 + 4), payload.len()) {
            Some(Way::Mapping(mapping, target)) => {
                let Some(State::Mapping { sock, .. }) = self.flows.at(mapping).map(|m| &m.state) else {
                    return Err(DropReason::NoFlow);
                };
                fx.udp_send(*sock, target, payload, segment, IpFields { ttl, tos: p.tos }, p.dont_fragment)
            }
            Some(Way::Forward(sock, client)) if segment == 0 => fx.udp_send_forward(sock, client, payload),
            Some(Way::Forward(sock, client)) => payload
                .chunks(usize::from(segment))
                .try_for_each(|piece| fx.udp_send_forward(sock, client, piece)),
            None => Err(SockError::Other(0)),
        };
        self.touch(index);
        sent.map_err(|e| {
            self.icmp_error(slot, mac, frame, p, icmp_for(e, p.end - p.l3), fx);
            DropReason::HostError
        })
    }

    /// Counts what a guest sends on a flow, and tells which way it goes.
    pub(crate) fn note_out(&mut self, index: u32, mac: Mac, id: u16, bytes: usize) -> Option<Way> {
        let f = self.flows.at_mut(index)?;
        f.mac = mac;
        f.bytes_out += bytes as u64;
        f.packets_out = f.packets_out.saturating_add(1);
        match &mut f.state {
            State::Datagram { mapping, target, ip_id } => {
                *ip_id = id;
                let way = (*mapping, *target);
                if let Some(m) = self.flows.at_mut(way.0) {
                    m.mac = mac;
                }
                Some(Way::Mapping(way.0, way.1))
            }
            State::Forwarded { sock, client, .. } => Some(Way::Forward(*sock, *client)),
            _ => None,
        }
    }

    /// The flow of a mapping that something from outside belongs to, or the mapping itself where the
    /// filtering rule lets it in without one; with the name that the guest knows the sender by.
    pub(crate) fn admit_inbound(
        &self,
        id: FlowId,
        from: SocketAddr,
    ) -> Result<(u32, SocketAddr), DropReason> {
        let m = self.flows.at(id.index).filter(|f| f.is_mapping() && self.flows.id(id.index) == id);
        let key = m.ok_or(DropReason::NoFlow)?.key;
        let name = self.policy.name_of(from.ip().to_canonical()).ok_or(DropReason::Filtered)?;
        let remote = SocketAddr::new(name, from.port());
        if let Some(index) = self.flows.find(&Key { remote, ..key }) {
            return Ok((index, remote));
        }
        let open = match self.cfg.filtering {
            _ if key.proto != proto::UDP => false,
            Filtering::EndpointIndependent => true,
            Filtering::AddressDependent => self.flows.has_peer(id.index, name),
            Filtering::AddressAndPortDependent => false,
        };
        if open { Ok((id.index, remote)) } else { Err(DropReason::Filtered) }
    }

    /// Datagrams for a guest on one of its sockets.
    pub(crate) fn udp_in<E: Effects>(
        &mut self,
        id: FlowId,
        from: SocketAddr,
        payload: &[u8],
        segment: u16,
        fx: &mut E,
    ) {
        match self.admit_inbound(id, from) {
            Ok((index, remote)) => self.deliver_datagram(index, remote, payload, segment, fx),
            Err(why) => match self.flows.get_mut(id).map(|f| f.key.slot) {
                Some(slot) => self.drop_at(slot, why),
                None => self.base.drop(why),
            },
        }
    }

    /// Sends datagrams of a flow to its guest.
    pub(crate) fn deliver_datagram<E: Effects>(
        &mut self,
        index: u32,
        remote: SocketAddr,
        payload: &[u8],
        segment: u16,
        fx: &mut E,
    ) {
        let Some(f) = self.flows.at_mut(index) else { return };
        f.bytes_in += payload.len() as u64;
        f.packets_in = f.packets_in.saturating_add(1);
        let (slot, mac, guest, mapping) = (f.key.slot, f.mac, f.key.guest, f.is_mapping());
        if !mapping {
            self.touch(index);
        }
        if let Err(why) = self.send_udp(slot, mac, remote, guest, payload, segment, fx) {
            self.drop_at(slot, why);
        }
    }
}

/// Where a guest's datagram leaves.
pub(crate) enum Way {
    /// Through the mapping in this slot, to this address.
    Mapping(u32, SocketAddr),
    /// Through a Forward's socket, to this client.
    Forward(crate::interface::types::SockId, SocketAddr),
}

/// The address of a flow's other side as an IPv4 address, for packets that are made here.
pub(crate) fn v4(ip: IpAddr) -> Option<std::net::Ipv4Addr> {
    match ip {
        IpAddr::V4(a) => Some(a),
        IpAddr::V6(_) => None,
    }
}
