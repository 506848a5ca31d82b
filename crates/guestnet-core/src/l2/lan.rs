//! Theory of operation: [`Lan`] is layer 2 of a network: the ports of the switch, and which MAC and address belongs to
//! which port. The folder's other files are its parts.
//!
//! What goes in: frames of guests ([`Lan::receive`], [`Lan::receive_packet`]), frames and updates of other workers, commands of the control side
//! (ports, addresses, services), and what the layers above send to guests ([`Lan::transmit`], [`Lan::deliver`],
//! [`Lan::probe`]).
//!
//! What comes out:
//! - frames to ports, by [`Effects::transmit`] and [`Effects::forward_remote`];
//! - a [`Verdict`] for each IP packet, which says what is left to be done with it;
//! - a [`Notice`] where something concerns flows, which this layer knows nothing of.
//!
//! Invariants:
//! - A MAC and an address belong to one port at a time, and no guest takes them from another (see [`super::addresses`]
//!   and [`super::switch`]).
//! - Whatever is learned from a guest is bounded for its port.
//! - Every frame that is dropped is counted: at its port, or at the network where there is no port.

use crate::interface::config::{AddressInUse, Limits, NetworkConfig};
use crate::interface::effects::{Effects, TxError};
use crate::interface::stats::{Counters, DropReason};
use crate::interface::types::{FrameMeta, NetMode, PortConfig, PortId, ServiceId, Time};
use crate::l2::frame_checks::largest_packet;
use crate::shard::{PeerUpdate, Sharing};
use crate::tables::addressing::Addressing;
use crate::tables::mac::Macs;
use crate::tables::neighbour::{Binding, Neighbours, ProbeStep};
use crate::tables::port::{Port, Ports};
use crate::util::account::{count, count_bytes};
use crate::util::siphash::SipKey;
use guestnet_wire::ether::{self, Mac};
use guestnet_wire::parse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr};

/// Where a frame came from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sender {
    /// Slot of the port.
    pub slot: u32,
    /// Source MAC.
    pub mac: Mac,
}

/// Layer 2 as the layers above use it.
pub(crate) struct Link<'a, E> {
    /// The time of this call.
    pub now: Time,
    /// The ports and what is known of them.
    pub lan: &'a mut Lan,
    /// The outside.
    pub fx: &'a mut E,
}

/// What is left to be done with a packet of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing: it was flooded.
    Done,
    /// The packet is for another guest, to be delivered if the policy lets it pass.
    Forward {
        /// Slot of the port that has its destination MAC.
        to: u32,
        /// Its offload requests.
        meta: FrameMeta,
    },
    /// The IP packet is for several guests, to be flooded if the policy lets it pass. Only where [`Lan::set_asks`] is on.
    Flood {
        /// Its offload requests.
        meta: FrameMeta,
    },
    /// The packet is addressed to the gateway's MAC.
    Route,
    /// An IPv6 solicitation for the gateway, or for a router.
    Discover,
    /// The packet was broadcast and is for this service (DHCP).
    Serve(ServiceId),
}

/// What the flows of a guest have to learn.
#[derive(Debug)]
pub(crate) enum Notice {
    /// The guest on a port sent an ARP request for the gateway by broadcast: it may have restarted.
    Restarted(u32),
    /// The MAC of an address is known now, for which [`Lan::probe`] was called.
    Resolved(IpAddr, Mac),
    /// Nobody answered for such an address.
    Unanswered(IpAddr),
}

/// See the module head.
pub(crate) struct Lan {
    pub(super) gateway_mac: Mac,
    pub(super) gateway4: Ipv4Addr,
    /// Mode `bridged`: no gateway, and one port leads to a segment.
    pub(super) bridged: bool,
    pub(super) limits: Limits,
    /// Addresses that belong to a MAC (static leases), and those MACs.
    pub(super) reserved: BTreeMap<IpAddr, Mac>,
    pub(super) reserved_macs: BTreeSet<Mac>,
    pub(super) addressing: Addressing,
    /// Floods of IP packets are returned to the caller, which asks the policy.
    pub(super) asks: bool,
    pub(super) ports: Ports,
    pub(super) macs: Macs,
    /// Stations of the segment that `macs` holds, in mode `bridged`.
    pub(super) stations: u32,
    pub(super) neighbours: Neighbours,
    /// Where the ports are shared out among several workers.
    pub(super) sharing: Option<Sharing>,
    /// What belongs to no port, and what ports that are gone had counted.
    base: Counters,
    pub(super) notices: VecDeque<Notice>,
    /// Addresses that their port lost.
    pub(super) released: Vec<IpAddr>,
}

impl Lan {
    /// A segment without ports.
    #[must_use]
    pub fn new(config: &NetworkConfig) -> Lan {
        let key = SipKey::from_secret(&config.secret, 0);
        Lan {
            gateway_mac: config.gateway_mac,
            gateway4: config.gateway4,
            bridged: config.mode == NetMode::Bridged,
            reserved: config.reserved.clone(),
            reserved_macs: config.reserved.values().copied().collect(),
            addressing: Addressing::new(config),
            asks: false,
            ports: Ports::default(),
            macs: Macs::new(key),
            stations: 0,
            neighbours: Neighbours::new(key),
            sharing: None,
            base: Counters::default(),
            notices: VecDeque::new(),
            released: Vec::new(),
            limits: config.limits.clone(),
        }
    }

    /// Has IP packets for several guests returned ([`Verdict::Flood`]) instead of flooded, or flooded again.
    pub fn set_asks(&mut self, on: bool) {
        self.asks = on;
    }

    // ---- what others ask ----------------------------------------------------------------------------

    /// The addresses of the network.
    #[inline]
    #[must_use]
    pub fn addressing(&self) -> &Addressing {
        &self.addressing
    }

    /// The addresses of the network, for a service to be added.
    pub fn addressing_mut(&mut self) -> &mut Addressing {
        &mut self.addressing
    }

    /// The slot of a port.
    #[inline]
    #[must_use]
    pub fn slot(&self, port: PortId) -> Option<u32> {
        self.ports.slot(port)
    }

    /// The port in a slot.
    #[inline]
    #[must_use]
    pub fn port(&self, slot: u32) -> Option<&Port> {
        self.ports.get(slot)
    }

    /// The counters of a port.
    #[inline]
    pub fn counters_mut(&mut self, slot: u32) -> Option<&mut Counters> {
        self.ports.get_mut(slot).map(|p| &mut p.counters)
    }

    /// The configuration of a port, and its counters.
    #[inline]
    pub fn port_and_counters(&mut self, slot: u32) -> Option<(PortId, &PortConfig, &mut Counters)> {
        self.ports.get_mut(slot).map(|p| (p.id, &p.config, &mut p.counters))
    }

    /// The ports of this worker with their slots.
    pub fn local_ports(&self) -> impl Iterator<Item = (u32, &Port)> {
        self.ports.iter().filter(|(_, p)| p.remote.is_none())
    }

    /// Whether a port belongs to another worker.
    #[must_use]
    pub fn is_remote(&self, slot: u32) -> bool {
        self.ports.get(slot).is_some_and(|p| p.remote.is_some())
    }

    /// The port and MAC of an address.
    #[inline]
    #[must_use]
    pub fn neighbour(&self, ip: IpAddr) -> Option<&Binding> {
        self.neighbours.get(ip)
    }

    /// The addresses of a port, in order.
    #[must_use]
    pub fn addresses_of(&self, slot: u32) -> Vec<IpAddr> {
        let mut a: Vec<IpAddr> = self.neighbours.of_port(slot).map(|b| b.ip).collect();
        a.sort_unstable();
        a
    }

    /// The counters of all ports, those that are gone included.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let mut sum = self.base.clone();
        self.ports.iter().for_each(|(_, p)| sum.add(&p.counters));
        sum
    }

    /// Counts a drop at a port, or at the network where it is gone.
    pub fn count_drop(&mut self, slot: u32, why: DropReason) {
        match self.ports.get_mut(slot) {
            Some(p) => p.counters.drop(why),
            None => self.base.drop(why),
        }
    }

    /// The counters of what belongs to no port.
    pub fn base_mut(&mut self) -> &mut Counters {
        &mut self.base
    }

    // ---- ports --------------------------------------------------------------------------------------

    /// Adds a port and returns its slot; `None` where the identifier is taken.
    ///
    /// # Errors
    /// [`AddressInUse`] when one of its addresses is assigned to another port, or belongs to the gateway or a service.
    /// The port is not added then.
    pub fn add_port(
        &mut self,
        now: Time,
        port: PortId,
        config: PortConfig,
    ) -> Result<Option<u32>, AddressInUse> {
        if self.ports.slot(port).is_some() {
            return Ok(None);
        }
        let addresses = config.addresses.clone();
        addresses.iter().try_for_each(|ip| self.check_unassigned(*ip, None))?;
        let mac = config.mac.filter(|m| m.is_unicast() && *m != self.gateway_mac);
        let mtu = config.mtu;
        let Some(slot) = self.ports.insert(Port::new(port, config, &self.limits, now)) else {
            return Ok(None);
        };
        self.announce(PeerUpdate::PortUp { port, mac, mtu });
        if let Some(mac) = mac {
            self.claim_mac(slot, mac);
        }
        for ip in addresses {
            self.bind_address(now, port, ip, mac)?;
        }
        Ok(Some(slot))
    }

    /// Removes a port with its MACs and addresses. What waited for them is dropped.
    pub fn remove_port(&mut self, slot: u32) {
        let Some(p) = self.ports.get(slot) else { return };
        match (p.remote, p.id) {
            (Some(worker), _) => self.count_remote(worker, false),
            (None, port) => self.announce(PeerUpdate::PortDown { port }),
        }
        self.neighbours.remove_port(slot);
        self.macs.remove_port(slot);
        if let Some(p) = self.ports.remove(slot) {
            self.base.add(&p.counters);
        }
    }

    // ---- frames to ports ----------------------------------------------------------------------------

    /// Puts a frame on a port and counts the outcome.
    #[inline]
    pub fn transmit<E: Effects>(&mut self, slot: u32, frame: &[u8], meta: FrameMeta, fx: &mut E) {
        if let Some(port) = self.ports.get_mut(slot) {
            transmit(port, frame, meta, fx);
        }
    }

    /// Puts a frame of another port on a port, if its MTU takes it.
    pub fn deliver<E: Effects>(&mut self, slot: u32, frame: &[u8], meta: FrameMeta, fx: &mut E) {
        let Some(port) = self.ports.get_mut(slot) else { return };
        let mtu = usize::from(port.config.mtu);
        let fits = match meta.gso {
            None => frame.len() <= ether::HEADER_LEN + mtu,
            Some(_) if frame.len() <= ether::HEADER_LEN + mtu => true,
            Some(_) => {
                parse::parse_ip(frame, ether::HEADER_LEN).is_ok_and(|p| largest_packet(&p, meta) <= mtu)
            }
        };
        if !fits {
            port.counters.drop(DropReason::Oversized);
            return;
        }
        transmit(port, frame, meta, fx);
    }

    // ---- addresses without a MAC --------------------------------------------------------------------

    /// Asks the guest on a port for the MAC of an address, for somebody who waits. A [`Notice`] tells the outcome, at the
    /// returned time at the latest.
    pub fn probe<E: Effects>(&mut self, now: Time, slot: u32, ip: IpAddr, fx: &mut E) -> Time {
        let (first, until) = self.neighbours.probe(now, slot, ip);
        if first {
            self.request(now, slot, ip, fx);
        }
        until
    }

    /// The MAC of an address is known.
    pub(super) fn resolved(&mut self, ip: IpAddr, mac: Mac) {
        if self.neighbours.end_probe(ip) {
            self.notices.push_back(Notice::Resolved(ip, mac));
        }
    }

    /// Nobody will answer for an address.
    pub(super) fn give_up(&mut self, ip: IpAddr) {
        if self.neighbours.end_probe(ip) {
            self.notices.push_back(Notice::Unanswered(ip));
        }
    }

    /// When [`Lan::timers`] has something to do.
    #[must_use]
    pub fn next_timer(&self) -> Option<Time> {
        self.neighbours.next_timer()
    }

    /// Repeats ARP requests and solicitations, or gives up.
    pub fn timers<E: Effects>(&mut self, now: Time, fx: &mut E) {
        while let Some(due) = self.neighbours.due(now) {
            match due {
                ProbeStep::Request(slot, ip) => self.request(now, slot, ip, fx),
                ProbeStep::Unanswered(ip) => self.notices.push_back(Notice::Unanswered(ip)),
            }
        }
    }

    // ---- what the layers above have to learn --------------------------------------------------------

    /// Whether there are notices or released addresses to be taken.
    #[inline]
    #[must_use]
    pub fn has_notices(&self) -> bool {
        !self.notices.is_empty() || !self.released.is_empty()
    }

    /// Takes the oldest notice.
    pub fn take_notice(&mut self) -> Option<Notice> {
        self.notices.pop_front()
    }

    /// Takes an address that its port lost: its next owner must get nothing that was meant for the last one.
    pub fn take_released(&mut self) -> Option<IpAddr> {
        self.released.pop()
    }
}

/// Puts a frame on a port and counts the outcome.
#[inline]
pub(super) fn transmit<E: Effects>(port: &mut Port, frame: &[u8], meta: FrameMeta, fx: &mut E) {
    if let Some(worker) = port.remote {
        // The worker that has the port counts it as sent.
        match fx.forward_remote(worker, Some(port.id), frame, meta) {
            Ok(()) => {}
            Err(TxError::Full) => port.counters.drop(DropReason::WorkerFull),
            Err(TxError::Gone) => port.counters.drop(DropReason::NoEndpoint),
        }
        return;
    }
    match fx.transmit(port.id, frame, meta) {
        Ok(()) => {
            count(&mut port.counters.tx_frames);
            count_bytes(&mut port.counters.tx_bytes, frame.len());
        }
        Err(TxError::Full) => port.counters.drop(DropReason::PortFull),
        Err(TxError::Gone) => port.counters.drop(DropReason::NoEndpoint),
    }
}
