//! Theory of operation: which port has which IP address, and who may send from it.
//!
//! - The control side assigns addresses ([`Lan::bind_address`]). An assigned address belongs to its port until it is
//!   taken back.
//! - A guest that sends from an address nobody has learns it for its port ([`Lan::check_source`]). Another port gets a
//!   learned address only by assignment, or after it was silent for [`STALE_S`] seconds.
//! - Addresses of the gateway and of its services, reserved ones of another MAC and, in IPv4, addresses outside the
//!   subnet are never learned.
//! - Each port has at most [`crate::config::Limits::addresses_per_port`] learned addresses of each family; the oldest
//!   makes room.

use crate::interface::config::AddressInUse;
use crate::interface::effects::{Effects, Event};
use crate::interface::stats::DropReason;
use crate::interface::types::{PortId, Time};
use crate::l2::frame_checks::quoted_destination;
use crate::l2::lan::{Lan, Sender};
use crate::shard::PeerUpdate;
use crate::tables::neighbour::{Binding, STALE_S};
use guestnet_wire::ether::Mac;
use guestnet_wire::parse::Packet;
use std::net::IpAddr;

impl Lan {
    /// Gives an address to a port. A port that only learned it loses it.
    ///
    /// # Errors
    /// [`AddressInUse`] when it is assigned to another port, belongs to the gateway or a service, or the port
    /// does not exist.
    pub fn bind_address(
        &mut self,
        now: Time,
        port: PortId,
        ip: IpAddr,
        mac: Option<Mac>,
    ) -> Result<(), AddressInUse> {
        let slot = self.ports.slot(port).ok_or(AddressInUse(ip))?;
        self.check_unassigned(ip, Some(slot))?;
        let old = self.neighbours.get(ip).copied();
        if let Some(b) = old {
            self.forget_learned(b.slot, ip);
            if b.slot != slot {
                self.released.push(ip);
            }
        }
        let known = old.filter(|b| b.slot == slot).and_then(|b| b.mac);
        let own = self.ports.get(slot).and_then(|p| p.mac);
        let mac = mac.or(known).or(own);
        let b = Binding { ip, slot, mac, assigned: true, seen: now };
        self.neighbours.set(b);
        self.announce_binding(&b, None);
        Ok(())
    }

    /// Checks that an address may be assigned to a port, which may not exist yet.
    ///
    /// # Errors
    /// [`AddressInUse`] when it is assigned to another port, or belongs to the gateway or a service.
    pub(super) fn check_unassigned(&self, ip: IpAddr, slot: Option<u32>) -> Result<(), AddressInUse> {
        // Of ports elsewhere the control side knows more than this worker does yet.
        let taken = |b: &Binding| b.assigned && Some(b.slot) != slot && !self.is_remote(b.slot);
        if self.addressing.is_own(ip) || self.neighbours.get(ip).is_some_and(taken) {
            return Err(AddressInUse(ip));
        }
        Ok(())
    }

    /// Takes an address back. Flows of it live on until they end by themselves.
    pub fn unbind_address(&mut self, ip: IpAddr) {
        if let Some(b) = self.neighbours.remove(ip) {
            self.forget_learned(b.slot, ip);
            self.released.push(ip);
            if !self.is_remote(b.slot) {
                self.announce(PeerUpdate::AddressGone { ip });
            }
        }
        self.give_up(ip);
    }

    /// Checks that a guest may send from an address, and learns it for the guest's port.
    ///
    /// # Errors
    /// [`DropReason::SpoofedSource`] when the address belongs to another; [`DropReason::RateLimit`] when all workers
    /// would have to learn it and the port has had enough of that.
    pub(super) fn check_source<E: Effects>(
        &mut self,
        now: Time,
        from: Sender,
        ip: IpAddr,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let Sender { slot, mac } = from;
        let known = match self.neighbours.get_mut(ip) {
            Some(b) if b.slot == slot && b.mac == Some(mac) => {
                let before = std::mem::replace(&mut b.seen, now);
                let b = *b;
                self.announce_again(b, before);
                return Ok(());
            }
            Some(b) if b.slot == slot => true,
            Some(b) if b.assigned || b.seen.plus_s(STALE_S) > now => return Err(DropReason::SpoofedSource),
            _ => false,
        };
        if known {
            self.may_learn(now, slot)?;
            if let Some(b) = self.neighbours.get_mut(ip) {
                (b.seen, b.mac) = (now, Some(mac));
                let b = *b;
                self.announce_binding(&b, None);
            }
        } else {
            let reserved = self.reserved.get(&ip).is_some_and(|owner| *owner != mac);
            let a = &self.addressing;
            let foreign = ip.is_ipv4() && !a.subnet().is_host(ip) || a.is_own(ip);
            if reserved || !self.bridged && foreign {
                return Err(DropReason::SpoofedSource);
            }
            self.may_learn(now, slot)?;
            if let Some(old) = self.neighbours.remove(ip) {
                self.forget_learned(old.slot, ip);
                self.released.push(ip);
            }
            self.learn_address(now, from, ip)?;
        }
        if !matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local()) {
            self.report_address(now, slot, mac, ip, fx);
        }
        self.resolved(ip, mac);
        Ok(())
    }

    fn learn_address(&mut self, now: Time, from: Sender, ip: IpAddr) -> Result<(), DropReason> {
        let cap = self.limits.addresses_per_port as usize;
        let port = self.ports.get_mut(from.slot).ok_or(DropReason::NoEndpoint)?;
        if cap == 0 {
            return Err(DropReason::SpoofedSource);
        }
        let learned = if ip.is_ipv4() { &mut port.learned } else { &mut port.learned6 };
        let oldest = if learned.len() >= cap { learned.pop_front() } else { None };
        learned.push_back(ip);
        if let Some(old) = oldest {
            self.neighbours.remove(old);
        }
        let b = Binding { ip, slot: from.slot, mac: Some(from.mac), assigned: false, seen: now };
        self.neighbours.set(b);
        self.announce_binding(&b, oldest);
        Ok(())
    }

    /// Takes an address off a port's list of learned ones.
    pub(super) fn forget_learned(&mut self, slot: u32, ip: IpAddr) {
        if let Some(p) = self.ports.get_mut(slot) {
            p.learned.retain(|a| *a != ip);
            p.learned6.retain(|a| *a != ip);
        }
    }

    /// Reports to the control side that a guest uses an address, within a rate for each port.
    pub fn report_address<E: Effects>(
        &mut self,
        now: Time,
        slot: u32,
        mac: Mac,
        address: IpAddr,
        fx: &mut E,
    ) {
        if let Some(p) = self.ports.get_mut(slot)
            && p.events.allow(now)
            && !fx.event(Event::AddressSeen { port: p.id, mac, address })
        {
            p.counters.drop(DropReason::EventRingFull);
        }
    }

    /// Checks that an ICMP error is about a packet to the guest that sends it: one about another guest's connections
    /// would end or slow them.
    ///
    /// # Errors
    /// [`DropReason::SpoofedSource`], and those of [`quoted_destination`].
    pub(super) fn check_icmp_error(&self, slot: u32, frame: &[u8], p: &Packet) -> Result<(), DropReason> {
        match quoted_destination(frame, p)? {
            None => Ok(()),
            Some(about) if about == p.src => Ok(()),
            // RFC 4443 2.4 (e): one may also be about a packet to a group.
            Some(about @ IpAddr::V6(_)) if about.is_multicast() => Ok(()),
            Some(about) if self.neighbours.get(about).is_some_and(|b| b.slot == slot) => Ok(()),
            Some(_) => Err(DropReason::SpoofedSource),
        }
    }
}
