//! Theory of operation: ARP (RFC 826), answered for the gateway's addresses and filtered for all others.
//!
//! - A message whose sender addresses are not the guest's own is dropped, so no guest can answer for another or for the
//!   gateway.
//! - A request for an address whose port is known goes to that port alone; others are flooded.
//! - A broadcast request for the gateway means that the guest does not know it, as after a restart: the guest's idle
//!   connections are then checked ([`Notice::Restarted`]).

use crate::interface::effects::Effects;
use crate::interface::stats::DropReason;
use crate::interface::types::{FrameMeta, Time};
use crate::l2::lan::{Lan, Notice, Sender, transmit};
use guestnet_wire::arp::{self, Arp};
use guestnet_wire::ether::{self, Ether, Mac};
use std::net::{IpAddr, Ipv4Addr};

const FRAME: usize = ether::HEADER_LEN + arp::LEN;

impl Lan {
    /// Handles an ARP message of a guest.
    pub(super) fn receive_arp<E: Effects>(
        &mut self,
        now: Time,
        from: Sender,
        dst: Mac,
        frame: &[u8],
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let slot = from.slot;
        let a = self.check_arp(now, from, frame, fx)?;
        let target = IpAddr::V4(a.tpa);
        if a.op == arp::REPLY {
            if dst == self.gateway_mac {
                return Ok(());
            }
            return self.forward(now, slot, dst, frame, fx);
        }
        if self.addressing.is_own(target) {
            self.send_arp(slot, arp::REPLY, a.tpa, (a.sha, a.spa), a.sha, fx);
            if dst == Mac::BROADCAST && !a.spa.is_unspecified() {
                self.notices.push_back(Notice::Restarted(slot));
            }
            return Ok(());
        }
        if !self.addressing.subnet().is_host(target) {
            return Err(DropReason::BadDestination);
        }
        match self.neighbours.get(target).map(|b| b.slot) {
            // Others need an announcement; a request among the guest's own interfaces concerns nobody else.
            Some(to) if to == slot && a.spa != a.tpa => Ok(()),
            Some(to) if to != slot => {
                self.deliver(to, frame, FrameMeta::default(), fx);
                Ok(())
            }
            None if dst == self.gateway_mac => Ok(()),
            _ => self.forward(now, slot, dst, frame, fx),
        }
    }

    /// Checks that an ARP message says nothing about others' addresses.
    pub(super) fn check_arp<E: Effects>(
        &mut self,
        now: Time,
        from: Sender,
        frame: &[u8],
        fx: &mut E,
    ) -> Result<Arp, DropReason> {
        let a = Arp::parse(frame.get(ether::HEADER_LEN..).unwrap_or(&[]))?;
        if !self.bridged && !matches!(a.op, arp::REQUEST | arp::REPLY) {
            return Err(DropReason::Malformed);
        }
        if a.sha != from.mac {
            return Err(DropReason::SpoofedMac);
        }
        // A probe (RFC 5227 1.1) claims nothing yet.
        let probe = a.spa.is_unspecified() && (a.op == arp::REQUEST || self.bridged);
        if !probe {
            self.check_source(now, from, IpAddr::V4(a.spa), fx)?;
        }
        Ok(a)
    }

    /// Sends an ARP request, or a neighbour solicitation, of the gateway for an address to the port that should have it.
    pub(super) fn request<E: Effects>(&mut self, now: Time, slot: u32, ip: IpAddr, fx: &mut E) {
        if !self.ports.get_mut(slot).is_some_and(|p| p.requests.allow(now)) {
            self.count_drop(slot, DropReason::RateLimit);
            return;
        }
        match ip {
            IpAddr::V4(target) => {
                let to = (Mac::default(), target);
                self.send_arp(slot, arp::REQUEST, self.gateway4, to, Mac::BROADCAST, fx);
            }
            IpAddr::V6(target) => self.solicit(slot, target, fx),
        }
    }

    fn send_arp<E: Effects>(
        &mut self,
        slot: u32,
        op: u16,
        from: Ipv4Addr,
        to: (Mac, Ipv4Addr),
        dst: Mac,
        fx: &mut E,
    ) {
        let mut frame = [0u8; FRAME];
        let src = self.gateway_mac;
        Ether { dst, src, ethertype: ether::ARP }.emit(&mut frame);
        let (_, body) = frame.split_at_mut(ether::HEADER_LEN);
        Arp { op, sha: src, spa: from, tha: to.0, tpa: to.1 }.emit(body);
        if let Some(port) = self.ports.get_mut(slot) {
            transmit(port, &frame, FrameMeta::default(), fx);
        }
    }
}
