//! Theory of operation: the stand-ins for ports of other workers, and the updates that keep them true. See
//! [`crate::shard`] for the rules.

use crate::interface::effects::{Effects, TxError};
use crate::interface::stats::DropReason;
use crate::interface::types::{FrameMeta, PortConfig, PortId, Time};
use crate::l2::lan::Lan;
use crate::shard::{PeerUpdate, Sharing};
use crate::tables::neighbour::{Binding, STALE_S};
use crate::tables::port::Port;
use guestnet_wire::ether::Mac;
use std::net::IpAddr;

/// A learned address that is in use is announced again this often, in seconds, so that no worker takes it for stale.
const AGAIN_S: u64 = 60;

impl Lan {
    /// Makes this one of several workers; `workers` is how many there are. To be called before anything else.
    pub fn share(&mut self, workers: u16) {
        self.sharing = Some(Sharing::new(workers));
    }

    /// Moves the updates for the other workers to `out`, oldest first. Guests may cause `room` more until the next call.
    pub fn take_peer_updates(&mut self, room: usize, out: &mut Vec<PeerUpdate>) {
        if let Some(s) = &mut self.sharing {
            s.take(room, out);
        }
    }

    /// Queues an update for the other workers, if there are any.
    #[inline]
    pub(super) fn announce(&mut self, update: PeerUpdate) {
        if let Some(s) = &mut self.sharing {
            s.push(update);
        }
    }

    /// Whether a guest may use a new MAC or address, which all workers have to learn.
    pub(super) fn may_learn(&mut self, now: Time, slot: u32) -> Result<(), DropReason> {
        let Some(s) = &self.sharing else { return Ok(()) };
        let room = s.has_room();
        let port = self.ports.get_mut(slot).filter(|_| room).ok_or(DropReason::RateLimit)?;
        if port.learn.allow(now) { Ok(()) } else { Err(DropReason::RateLimit) }
    }

    /// Announces a learned binding that is in use, once a while; `before` is when it was used before.
    #[inline]
    pub(super) fn announce_again(&mut self, b: Binding, before: Time) {
        if self.sharing.is_some() && !b.assigned && minutes(before) != minutes(b.seen) {
            self.announce_binding(&b, None);
        }
    }

    /// Announces the address of a local port, in place of another one.
    pub(super) fn announce_binding(&mut self, b: &Binding, instead: Option<IpAddr>) {
        if self.sharing.is_some()
            && let Some(port) = self.ports.get(b.slot).filter(|p| p.remote.is_none()).map(|p| p.id)
        {
            self.announce(PeerUpdate::Address { port, ip: b.ip, mac: b.mac, assigned: b.assigned, instead });
        }
    }

    /// The slot of a port, if worker `from` has it.
    #[must_use]
    pub fn slot_at(&self, from: u16, port: PortId) -> Option<u32> {
        self.ports.slot(port).filter(|s| self.is_at(from, *s))
    }

    /// Applies an update of worker `from`. Updates of ports that are not its own are ignored. A port that went
    /// ([`PeerUpdate::PortDown`]) is the caller's to remove.
    pub fn apply_peer_update(&mut self, now: Time, from: u16, update: PeerUpdate) {
        match update {
            PeerUpdate::PortUp { port, mac, mtu } => self.peer_port(now, from, port, mac, mtu),
            PeerUpdate::PortDown { .. } => {}
            PeerUpdate::Mac { port, mac, own, instead } => {
                let Some(slot) = self.slot_at(from, port) else { return };
                if let Some(old) = instead.filter(|m| self.macs.get(*m) == Some(slot)) {
                    self.macs.remove(old);
                }
                self.peer_mac(slot, port, mac, own);
            }
            PeerUpdate::Address { port, ip, mac, assigned, instead } => {
                let Some(slot) = self.slot_at(from, port) else { return };
                if let Some(old) =
                    instead.filter(|ip| self.neighbours.get(*ip).is_some_and(|b| b.slot == slot))
                {
                    self.neighbours.remove(old);
                }
                self.peer_address(now, port, Binding { ip, slot, mac, assigned, seen: now });
            }
            PeerUpdate::AddressGone { ip } => {
                if self.neighbours.get(ip).is_some_and(|b| self.is_at(from, b.slot)) {
                    self.neighbours.remove(ip);
                }
            }
        }
    }

    /// Delivers a frame of another worker's guest to a port of this one, or (`None`) to all of them. It was checked
    /// where it came in.
    pub fn receive_from_peer<E: Effects>(
        &mut self,
        to: Option<PortId>,
        frame: &[u8],
        meta: FrameMeta,
        fx: &mut E,
    ) {
        let Some(port) = to else {
            for slot in 0..self.ports.end() {
                if !self.is_remote(slot) {
                    self.deliver(slot, frame, meta, fx);
                }
            }
            return;
        };
        match self.ports.slot(port).filter(|s| !self.is_remote(*s)) {
            Some(slot) => self.deliver(slot, frame, meta, fx),
            // The port went while the frame was under way.
            None => self.base_mut().drop(DropReason::NoEndpoint),
        }
    }

    /// Sends a frame of a port to all ports of all other workers, one copy each.
    pub(super) fn flood_remote<E: Effects>(&mut self, slot: u32, frame: &[u8], meta: FrameMeta, fx: &mut E) {
        let workers = self.sharing.as_ref().map_or(0, Sharing::workers);
        for worker in 0..workers {
            let some = self.sharing.as_ref().is_some_and(|s| s.has_ports(worker));
            if some && fx.forward_remote(worker, None, frame, meta) == Err(TxError::Full) {
                self.count_drop(slot, DropReason::WorkerFull);
            }
        }
    }

    fn is_at(&self, worker: u16, slot: u32) -> bool {
        self.ports.get(slot).is_some_and(|p| p.remote == Some(worker))
    }

    fn peer_port(&mut self, now: Time, from: u16, id: PortId, mac: Option<Mac>, mtu: u16) {
        let config =
            PortConfig { mac, addresses: Vec::new(), mtu, gso_max: 0, lax_offload: false, uplink: false };
        let mut port = Port::new(id, config, &self.limits, now);
        port.remote = Some(from);
        let Some(slot) = self.ports.insert(port) else { return };
        self.count_remote(from, true);
        if let Some(mac) = mac {
            self.claim_mac(slot, mac);
        }
    }

    pub(super) fn count_remote(&mut self, worker: u16, added: bool) {
        if let Some(s) = &mut self.sharing {
            s.count(worker, added);
        }
    }

    fn peer_mac(&mut self, slot: u32, port: PortId, mac: Mac, own: bool) {
        let owner = self.macs.get(mac).filter(|o| *o != slot);
        if let Some(o) = owner.and_then(|o| self.ports.get(o)).filter(|o| o.remote.is_none()) {
            let rank = if o.config.mac == Some(mac) { 2 } else { u8::from(o.mac == Some(mac)) };
            if rank > u8::from(own) || rank == u8::from(own) && o.id < port {
                // The other core does not know of it yet, or decides as this one.
                let ours = PeerUpdate::Mac { port: o.id, mac, own: rank > 0, instead: None };
                return self.announce(ours);
            }
        }
        if own {
            return self.claim_mac(slot, mac);
        }
        if let Some(o) = owner.and_then(|o| self.ports.get_mut(o)) {
            o.macs.retain(|m| *m != mac);
            if o.mac == Some(mac) {
                o.mac = None;
            }
        }
        self.macs.set(mac, slot);
    }

    fn peer_address(&mut self, now: Time, port: PortId, theirs: Binding) {
        let old = self.neighbours.get(theirs.ip).copied().filter(|b| b.slot != theirs.slot);
        if let Some(b) = old
            && let Some(mine) = self.ports.get(b.slot).filter(|p| p.remote.is_none()).map(|p| p.id)
        {
            let in_use = b.assigned || b.seen.plus_s(STALE_S) > now;
            if b.assigned && !theirs.assigned || b.assigned == theirs.assigned && in_use && mine < port {
                return self.announce_binding(&b, None);
            }
        }
        if let Some(b) = old {
            self.forget_learned(b.slot, b.ip);
        }
        self.neighbours.set(theirs);
        self.give_up(theirs.ip);
    }
}

fn minutes(t: Time) -> u64 {
    t.0 / (AGAIN_S * 1_000_000_000)
}
