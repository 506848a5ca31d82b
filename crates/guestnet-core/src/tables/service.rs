//! Theory of operation: what the gateway answers itself. UDP services get the datagram as an event, with
//! the port and MAC it came from; TCP services are a target that the relay connects to. Addresses of
//! services in the subnet are the gateway's own: it answers ARP for them and no endpoint may have them.

use crate::interface::effects::{Effects, Event};
use crate::interface::stats::DropReason;
use crate::interface::types::ServiceId;
use crate::network::Network;
use crate::tables::port::Port;
use guestnet_wire::ether::Mac;
use guestnet_wire::proto;
use std::net::{IpAddr, SocketAddr};

/// DHCP server port (RFC 2131).
pub const DHCP_SERVER: u16 = 67;
/// DHCP client port.
pub const DHCP_CLIENT: u16 = 68;
/// DHCPv6 client port (RFC 8415).
pub const DHCP6_CLIENT: u16 = 546;

/// Bytes of a datagram to a UDP service that count as one.
const COUNTED: usize = 1500;

struct Service {
    id: ServiceId,
    proto: u8,
    address: IpAddr,
    port: u16,
}

/// All services. There are a handful, so a scan is the fastest look-up.
#[derive(Default)]
pub struct Services {
    list: Vec<Service>,
}

impl Services {
    /// Adds one, in place of another of the same protocol, address and port.
    pub fn add(&mut self, id: ServiceId, proto: u8, address: IpAddr, port: u16) {
        self.list.retain(|s| (s.proto, s.address, s.port) != (proto, address, port));
        self.list.push(Service { id, proto, address, port });
    }

    /// The service at an address and port.
    #[must_use]
    pub fn find(&self, proto: u8, to: SocketAddr) -> Option<ServiceId> {
        let hit = |s: &&Service| s.port == to.port() && s.proto == proto && s.address == to.ip();
        self.list.iter().find(hit).map(|s| s.id)
    }

    /// The DHCP service, which is reached by broadcast too.
    #[must_use]
    pub fn dhcp(&self) -> Option<ServiceId> {
        self.list.iter().find(|s| s.proto == proto::UDP && s.port == DHCP_SERVER).map(|s| s.id)
    }

    /// Whether some service has the address.
    #[must_use]
    pub fn has_address(&self, ip: IpAddr) -> bool {
        self.list.iter().any(|s| s.address == ip)
    }
}

impl Network {
    /// Hands a datagram, or several of `segment` bytes each, to a UDP service.
    #[allow(clippy::too_many_arguments)] // The fields of the event.
    pub(crate) fn punt<E: Effects>(
        &mut self,
        service: ServiceId,
        slot: u32,
        mac: Mac,
        src: SocketAddr,
        dst: SocketAddr,
        payload: &[u8],
        segment: u16,
        fx: &mut E,
    ) {
        if payload.is_empty() {
            return self.serve(service, slot, mac, src, dst, payload, fx);
        }
        let size = if segment == 0 { payload.len() } else { usize::from(segment) };
        payload.chunks(size).for_each(|piece| self.serve(service, slot, mac, src, dst, piece, fx));
    }

    /// One datagram: answered here when it asks for a name that is known or may be asked for, else handed up.
    #[allow(clippy::too_many_arguments)] // As above.
    fn serve<E: Effects>(
        &mut self,
        service: ServiceId,
        slot: u32,
        mac: Mac,
        src: SocketAddr,
        dst: SocketAddr,
        payload: &[u8],
        fx: &mut E,
    ) {
        if !self.names.is_service(service) {
            self.punt_one(service, slot, mac, src, dst, payload, fx);
            return;
        }
        let now = self.now;
        let look = self.names.is_look_due(now);
        if !look && self.answer_name(slot, mac, src, dst, payload, fx) {
            return;
        }
        let goes_up = |p: &Port| { p.service }.allow_n(now, cost(payload));
        // A guest that asks too much is not the one who has it looked at.
        if look
            && !self.ports.get(slot).is_some_and(goes_up)
            && self.answer_name(slot, mac, src, dst, payload, fx)
        {
            return;
        }
        if let Some(p) = self.ports.get_mut(slot) {
            p.counters.dns_misses += 1;
        }
        if self.punt_one(service, slot, mac, src, dst, payload, fx) {
            self.names.looked(now);
        }
    }

    /// Hands a datagram up; false when there are too many of its guest.
    #[allow(clippy::too_many_arguments)] // As above.
    pub(crate) fn punt_one<E: Effects>(
        &mut self,
        service: ServiceId,
        slot: u32,
        mac: Mac,
        src: SocketAddr,
        dst: SocketAddr,
        payload: &[u8],
        fx: &mut E,
    ) -> bool {
        let now = self.now;
        let Some(p) = self.ports.get_mut(slot) else { return false };
        // All guests share the queue, and its room is bytes as well as places.
        if !p.service.allow_n(now, cost(payload)) {
            p.counters.drop(DropReason::RateLimit);
            return false;
        }
        fx.event(Event::Datagram { service, port: p.id, mac, src, dst, payload: payload.into() });
        true
    }
}

fn cost(payload: &[u8]) -> usize {
    payload.len().div_ceil(COUNTED).max(1)
}
