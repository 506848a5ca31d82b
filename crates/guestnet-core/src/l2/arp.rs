//! Theory of operation: ARP (RFC 826) as the gateway speaks and polices it. What a guest says of itself is
//! checked before it is believed or passed on, so no guest can answer for another or for the gateway. A
//! request for an address whose port is known goes to that port alone. The same check of source addresses
//! guards IPv4 packets.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use crate::interface::effects::{Effects, Event};
use crate::interface::stats::DropReason;
use crate::interface::types::FrameMeta;
use crate::l2::switch::{transmit, wire_drop};
use crate::network::Network;
use crate::tables::neighbour::{Binding, STALE_S, Waiting};
use guestnet_wire::arp::{self, Arp};
use guestnet_wire::ether::{self, Ether, Mac};
use guestnet_wire::put;
use std::net::{IpAddr, Ipv4Addr};

const FRAME: usize = ether::HEADER_LEN + arp::LEN;

impl Network {
    /// An ARP message of a guest.
    pub(crate) fn arp_in<E: Effects>(
        &mut self,
        slot: u32,
        eth: Ether,
        frame: &[u8],
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let a = Arp::parse(frame.get(ether::HEADER_LEN..).unwrap_or(&[])).map_err(wire_drop)?;
        if !matches!(a.op, arp::REQUEST | arp::REPLY) {
            return Err(DropReason::Malformed);
        }
        if a.sha != eth.src {
            return Err(DropReason::SpoofedMac);
        }
        // A probe (RFC 5227 1.1) claims nothing yet.
        if !(a.spa.is_unspecified() && a.op == arp::REQUEST) {
            self.check_source(slot, eth.src, IpAddr::V4(a.spa), fx)?;
        }
        let target = IpAddr::V4(a.tpa);
        if a.op == arp::REPLY {
            if eth.dst == self.cfg.gateway_mac {
                return Ok(());
            }
            return self.bridge(slot, eth.dst, frame, FrameMeta::default(), fx);
        }
        if self.is_own(target) {
            let (from, to) = (a.tpa, (a.sha, a.spa));
            self.send_arp(slot, arp::REPLY, from, to, a.sha, fx);
            if eth.dst == Mac::BROADCAST && !a.spa.is_unspecified() {
                // It does not know the gateway, or not any more: as after a reboot.
                self.recheck(slot, fx);
            }
            return Ok(());
        }
        if !self.policy.is_host(target) {
            return Err(DropReason::BadDestination);
        }
        match self.neighbours.get(target).map(|b| b.slot) {
            Some(to) if to == slot => {
                // An announcement tells the others; a question among the guest's own interfaces nobody.
                if a.spa == a.tpa {
                    self.bridge(slot, eth.dst, frame, FrameMeta::default(), fx)
                } else {
                    Ok(())
                }
            }
            Some(to) => {
                self.deliver(to, frame, FrameMeta::default(), fx);
                Ok(())
            }
            None if eth.dst == self.cfg.gateway_mac => Ok(()),
            None => self.bridge(slot, eth.dst, frame, FrameMeta::default(), fx),
        }
    }

    /// Checks that a port may send from an address and learns it.
    pub(crate) fn check_source<E: Effects>(
        &mut self,
        slot: u32,
        mac: Mac,
        ip: IpAddr,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let now = self.now;
        let known = match self.neighbours.get_mut(ip) {
            Some(b) if b.slot == slot && b.mac == Some(mac) => {
                let before = std::mem::replace(&mut b.seen, now);
                let b = *b;
                self.tell_again(b, before);
                return Ok(());
            }
            Some(b) if b.slot == slot => true,
            Some(b) if b.assigned || b.seen.plus_s(STALE_S) > now => return Err(DropReason::SpoofedSource),
            _ => false,
        };
        if known {
            self.may_learn(slot)?;
            if let Some(b) = self.neighbours.get_mut(ip) {
                (b.seen, b.mac) = (now, Some(mac));
                let b = *b;
                self.tell_binding(&b, None);
            }
        } else {
            let reserved = self.cfg.reserved.get(&ip).is_some_and(|owner| *owner != mac);
            if reserved || !self.is_bridged() && (ip.is_ipv4() && !self.policy.is_host(ip) || self.is_own(ip))
            {
                return Err(DropReason::SpoofedSource);
            }
            self.may_learn(slot)?;
            if let Some(old) = self.neighbours.remove(ip) {
                self.forget_learned(old.slot, ip);
                self.tunnel_left(ip);
            }
            self.learn_address(slot, mac, ip)?;
        }
        if let Some(p) = self.ports.get_mut(slot)
            && ip.is_ipv4()
            && p.news.allow(now)
        {
            fx.event(Event::AddressSeen { port: p.id, mac, address: ip });
        }
        if let Some(w) = self.neighbours.resolved(ip) {
            self.kick_waiting(w, mac, fx);
        }
        Ok(())
    }

    fn learn_address(&mut self, slot: u32, mac: Mac, ip: IpAddr) -> Result<(), DropReason> {
        let cap = self.cfg.limits.addresses_per_port as usize;
        let port = self.ports.get_mut(slot).ok_or(DropReason::NoEndpoint)?;
        if cap == 0 {
            return Err(DropReason::SpoofedSource);
        }
        let learned = if ip.is_ipv4() { &mut port.learned } else { &mut port.learned6 };
        let oldest = if learned.len() >= cap { learned.pop_front() } else { None };
        learned.push_back(ip);
        if let Some(old) = oldest {
            self.neighbours.remove(old);
        }
        let b = Binding { ip, slot, mac: Some(mac), assigned: false, seen: self.now };
        self.neighbours.set(b);
        self.tell_binding(&b, oldest);
        Ok(())
    }

    /// Takes an address off a port's list of learned ones.
    pub(crate) fn forget_learned(&mut self, slot: u32, ip: IpAddr) {
        if let Some(p) = self.ports.get_mut(slot) {
            p.learned.retain(|a| *a != ip);
            p.learned6.retain(|a| *a != ip);
        }
    }

    /// Asks the guest on a port for an address.
    pub(crate) fn ask<E: Effects>(&mut self, slot: u32, ip: IpAddr, fx: &mut E) {
        let IpAddr::V4(target) = ip else { return };
        let now = self.now;
        if !self.ports.get_mut(slot).is_some_and(|p| p.asks.allow(now)) {
            self.drop_at(slot, DropReason::RateLimit);
            return;
        }
        let from = self.cfg.gateway4;
        self.send_arp(slot, arp::REQUEST, from, (Mac::default(), target), Mac::BROADCAST, fx);
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
        let src = self.cfg.gateway_mac;
        Ether { dst, src, ethertype: ether::ARP }.emit(&mut frame);
        let (_, body) = frame.split_at_mut(ether::HEADER_LEN);
        Arp { op, sha: src, spa: from, tha: to.0, tpa: to.1 }.emit(body);
        if let Some(port) = self.ports.get_mut(slot) {
            transmit(port, &frame, FrameMeta::default(), fx);
        }
    }

    /// An address was resolved: what waited for it goes out.
    fn kick_waiting<E: Effects>(&mut self, w: Waiting, mac: Mac, fx: &mut E) {
        for id in w.flows {
            if let Some(f) = self.flows.get_mut(id) {
                f.mac = mac;
            }
            self.with_flow(id, fx, |tcb, cx| tcb.kick(cx));
        }
        for mut frame in w.frames {
            put(&mut frame, 0, &mac.0);
            if let Some(port) = self.ports.get_mut(w.slot) {
                transmit(port, &frame, FrameMeta::default(), fx);
            }
        }
    }

    /// Nobody answered for an address: flows that waited end, datagrams are dropped.
    pub(crate) fn give_up<E: Effects>(&mut self, w: Waiting, fx: &mut E) {
        for id in w.flows {
            if self.flows.get_mut(id).is_some() {
                self.drop_at(w.slot, DropReason::NoEndpoint);
                self.close_flow(id.index, fx);
            }
        }
        for _ in w.frames {
            self.drop_at(w.slot, DropReason::NoEndpoint);
        }
    }

    /// Repeats ARP requests, or gives up.
    pub(crate) fn neighbour_timers<E: Effects>(&mut self, fx: &mut E) {
        while let Some(due) = self.neighbours.due(self.now) {
            match due {
                Ok((slot, ip)) => self.ask(slot, ip, fx),
                Err(w) => self.give_up(w, fx),
            }
        }
    }
}
