//! Theory of operation: a Network whose ports are shared out among several cores. Each core has the ports of its
//! own worker, and a stand-in for every port of the others: a port that is `remote`, with its MAC and addresses
//! and nothing else. So the switch, the gateway and the checks of source addresses see the whole Network and need
//! to know of nothing but one branch where a frame leaves ([`crate::interface::effects::Effects::forward_remote`]). What a
//! core learns of its own ports it tells the others as [`PeerUpdate`], which the I/O side carries. What guests make it
//! learn is bounded by their rate and by the room there is for news; a frame that would teach more is dropped.
//! Where two cores have learned the same, both decide alike: what the control side said goes first, then the
//! port's own MAC, then the lower port number.

use crate::interface::effects::{Effects, TxError};
use crate::interface::stats::DropReason;
use crate::interface::types::{FrameMeta, PortConfig, PortId, Time};
use crate::network::Network;
use crate::tables::neighbour::{Binding, STALE_S};
use crate::tables::port::Port;
use guestnet_wire::ether::Mac;
use std::net::IpAddr;

/// An address that is in use is told again this often, in seconds, so that nobody takes it for a stale one.
const AGAIN_S: u64 = 60;

/// What a core tells the others of its own ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerUpdate {
    /// There is a port.
    PortUp {
        /// Its number.
        port: PortId,
        /// The MAC that the control side gave it.
        mac: Option<Mac>,
        /// Its IP MTU.
        mtu: u16,
    },
    /// A port is gone, and all it had.
    PortDown {
        /// Its number.
        port: PortId,
    },
    /// A port uses a MAC.
    Mac {
        /// The port.
        port: PortId,
        /// The MAC.
        mac: Mac,
        /// It is the port's own, not one of a bridge behind it.
        own: bool,
        /// One that it has no more.
        instead: Option<Mac>,
    },
    /// A port has an address.
    Address {
        /// The port.
        port: PortId,
        /// The address.
        ip: IpAddr,
        /// Its MAC where it is known.
        mac: Option<Mac>,
        /// The control side gave it.
        assigned: bool,
        /// One that it has no more.
        instead: Option<IpAddr>,
    },
    /// The control side took an address back.
    AddressGone {
        /// The address.
        ip: IpAddr,
    },
}

/// What a core of several knows of that.
pub(crate) struct Sharing {
    news: Vec<PeerUpdate>,
    /// PeerUpdate that guests may cause until they are next taken.
    room: usize,
    /// Ports by worker.
    ports: Vec<u32>,
}

impl Network {
    /// Makes this core one of several; `workers` is how many there are. To be called before anything else.
    pub fn share(&mut self, workers: u16) {
        self.sharing = Some(Sharing { news: Vec::new(), room: 0, ports: vec![0; usize::from(workers)] });
    }

    /// What is to be told to the other cores, oldest first. Guests may cause `room` more until the next call.
    pub fn take_peer_updates(&mut self, room: usize, out: &mut Vec<PeerUpdate>) {
        if let Some(s) = &mut self.sharing {
            out.append(&mut s.news);
            s.room = room;
        }
    }

    pub(crate) fn tell(&mut self, news: PeerUpdate) {
        if let Some(s) = &mut self.sharing {
            s.news.push(news);
        }
    }

    /// Whether a guest may teach the Network something, which all cores have to hear of.
    pub(crate) fn may_learn(&mut self, slot: u32) -> Result<(), DropReason> {
        let Some(s) = &self.sharing else { return Ok(()) };
        let room = s.news.len() < s.room;
        let now = self.now;
        let port = self.ports.get_mut(slot).filter(|_| room).ok_or(DropReason::RateLimit)?;
        if port.learn.allow(now) { Ok(()) } else { Err(DropReason::RateLimit) }
    }

    /// Tells of a binding that was used, once a while.
    pub(crate) fn tell_again(&mut self, b: Binding, before: Time) {
        if self.sharing.is_some() && !b.assigned && minutes(before) != minutes(b.seen) {
            self.tell_binding(&b, None);
        }
    }

    pub(crate) fn tell_binding(&mut self, b: &Binding, instead: Option<IpAddr>) {
        if self.sharing.is_some()
            && let Some(port) = self.ports.get(b.slot).filter(|p| p.remote.is_none()).map(|p| p.id)
        {
            self.tell(PeerUpdate::Address { port, ip: b.ip, mac: b.mac, assigned: b.assigned, instead });
        }
    }

    pub(crate) fn is_remote(&self, slot: u32) -> bool {
        self.ports.get(slot).is_some_and(|p| p.remote.is_some())
    }

    /// What worker `from` told. PeerUpdate of ports that are not its own are not believed.
    pub fn peer_update<E: Effects>(&mut self, now: Time, from: u16, news: PeerUpdate, fx: &mut E) {
        self.now = now;
        match news {
            PeerUpdate::PortUp { port, mac, mtu } => self.peer_port(from, port, mac, mtu),
            PeerUpdate::PortDown { port } => {
                if self.slot_at(from, port).is_some() {
                    self.remove_port(now, port, fx);
                }
            }
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
                self.peer_address(port, Binding { ip, slot, mac, assigned, seen: now }, fx);
            }
            PeerUpdate::AddressGone { ip } => {
                if self.neighbours.get(ip).is_some_and(|b| self.is_at(from, b.slot)) {
                    self.neighbours.remove(ip);
                }
            }
        }
    }

    /// A frame of another worker's guest, for a port of this one, or (`None`) for all of them. It was checked
    /// where it came in.
    pub fn peer_frame<E: Effects>(
        &mut self,
        now: Time,
        to: Option<PortId>,
        frame: &[u8],
        meta: FrameMeta,
        fx: &mut E,
    ) {
        self.now = now;
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
            // It left while the frame was under way.
            None => self.base.drop(DropReason::NoEndpoint),
        }
    }

    /// Sends a frame of a port to all ports of all other workers, one copy each.
    pub(crate) fn flood_remote<E: Effects>(&mut self, slot: u32, frame: &[u8], meta: FrameMeta, fx: &mut E) {
        let workers = self.sharing.as_ref().map_or(0, |s| s.ports.len());
        for worker in 0..workers {
            let some = self.sharing.as_ref().and_then(|s| s.ports.get(worker)).is_some_and(|n| *n > 0);
            if some && fx.forward_remote(worker as u16, None, frame, meta) == Err(TxError::Full) {
                self.drop_at(slot, DropReason::WorkerFull);
            }
        }
    }

    fn is_at(&self, worker: u16, slot: u32) -> bool {
        self.ports.get(slot).is_some_and(|p| p.remote == Some(worker))
    }

    fn slot_at(&self, worker: u16, port: PortId) -> Option<u32> {
        self.ports.slot(port).filter(|s| self.is_at(worker, *s))
    }

    fn peer_port(&mut self, from: u16, id: PortId, mac: Option<Mac>, mtu: u16) {
        let config =
            PortConfig { mac, addresses: Vec::new(), mtu, gso_max: 0, lax_offload: false, uplink: false };
        let mut port = Port::new(id, config, &self.cfg.limits, self.now);
        (port.mac, port.remote) = (None, Some(from));
        let Some(slot) = self.ports.insert(port) else { return };
        self.count_remote(from, true);
        if let Some(mac) = mac {
            self.claim_mac(slot, mac);
        }
    }

    pub(crate) fn count_remote(&mut self, worker: u16, up: bool) {
        if let Some(n) = self.sharing.as_mut().and_then(|s| s.ports.get_mut(usize::from(worker))) {
            *n = if up { *n + 1 } else { n.saturating_sub(1) };
        }
    }

    fn peer_mac(&mut self, slot: u32, port: PortId, mac: Mac, own: bool) {
        let owner = self.macs.get(mac).filter(|o| *o != slot);
        if let Some(o) = owner.and_then(|o| self.ports.get(o)).filter(|o| o.remote.is_none()) {
            let rank = if o.config.mac == Some(mac) { 2 } else { u8::from(o.mac == Some(mac)) };
            if rank > u8::from(own) || rank == u8::from(own) && o.id < port {
                // The other core has not heard of it yet, or decides as we do.
                let told = PeerUpdate::Mac { port: o.id, mac, own: rank > 0, instead: None };
                return self.tell(told);
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

    fn peer_address<E: Effects>(&mut self, port: PortId, news: Binding, fx: &mut E) {
        let old = self.neighbours.get(news.ip).copied().filter(|b| b.slot != news.slot);
        if let Some(b) = old
            && let Some(mine) = self.ports.get(b.slot).filter(|p| p.remote.is_none()).map(|p| p.id)
        {
            let in_use = b.assigned || b.seen.plus_s(STALE_S) > self.now;
            if b.assigned && !news.assigned || b.assigned == news.assigned && in_use && mine < port {
                return self.tell_binding(&b, None);
            }
        }
        if let Some(b) = old {
            self.forget_learned(b.slot, b.ip);
        }
        let ip = news.ip;
        self.neighbours.set(news);
        if let Some(w) = self.neighbours.resolved(ip) {
            self.give_up(w, fx);
        }
    }
}

fn minutes(t: Time) -> u64 {
    t.0 / (AGAIN_S * 1_000_000_000)
}
