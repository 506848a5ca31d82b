//! Theory of operation: [`Network`] holds a Network together and is all that a worker calls. Each call does its
//! work to the end and says what is to happen through [`Effects`]; nothing is left for later but what a
//! timer or [`Network::batch_end`] is asked for. The work itself is in the modules that the crate's head names,
//! each an `impl Network` over the fields below.

use crate::dns::DnsForwarder;
use crate::interface::config::{AddressInUse, DatagramError, FlowInfo, ForwardSpec, NetworkConfig, PortInfo};
use crate::interface::effects::{Effects, SockError};
use crate::interface::stats::Counters;
use crate::interface::types::{FlowId, ForwardId, FrameMeta, PortConfig, PortId, ServiceId, SockId, Time};
use crate::l3::reassembly::Reassembly;
use crate::nat::l3_uplink::Tun;
use crate::policy::Policy;
use crate::relay::turns::{NO_FLOW, Turns};
use crate::shard::{PeerUpdate, Sharing};
use crate::tables::flow::{List, NONE};
use crate::tables::flow_table::FlowTable;
use crate::tables::mac::Macs;
use crate::tables::neighbour::{Binding, Neighbours};
use crate::tables::port::{Port, Ports};
use crate::tables::service::Services;
use crate::util::siphash::SipKey;
use crate::util::timer_wheel::Wheel;
use guestnet_wire::ether::Mac;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

/// Room for one frame of the largest size: Ethernet header and 65535 bytes of IP.
pub(crate) const FRAME_MAX: usize = 14 + 65535;

/// Flows whose timers are worked off before other work has its turn; many end in the same second.
const TIMERS: usize = 256;

/// The logic of one Network. See the module head.
pub struct Network {
    pub(crate) cfg: NetworkConfig,
    pub(crate) policy: Policy,
    pub(crate) ports: Ports,
    pub(crate) macs: Macs,
    pub(crate) neighbours: Neighbours,
    pub(crate) reassembly: Reassembly,
    pub(crate) services: Services,
    pub(crate) forwards: BTreeMap<u32, ForwardSpec>,
    /// UDP clients of Forwards, by Forward and the client's true address.
    pub(crate) clients: BTreeMap<(u32, SocketAddr), u32>,
    pub(crate) flows: FlowTable,
    pub(crate) wheel: Wheel,
    /// TCP flows that asked for [`Network::batch_end`]: those with little to send, then bulk flows in turn.
    pub(crate) batch: List,
    pub(crate) turns: Turns,
    /// Keys the ISNs of RFC 6528.
    pub(crate) isn_key: SipKey,
    /// The frame that is being made.
    pub(crate) scratch: Vec<u8>,
    /// A fragment of it.
    pub(crate) piece: Vec<u8>,
    /// Flows whose timers fired and that have not had their turn yet.
    due: Vec<u32>,
    /// What belongs to no port, and what ports that are gone had counted.
    pub(crate) base: Counters,
    /// Where the ports are shared out among several cores.
    pub(crate) sharing: Option<Sharing>,
    pub(crate) now: Time,
    /// Bytes of the kernel's memory that the flows of all ports hold, as measured.
    pub(crate) socket_memory: usize,
    /// Stations of the segment that `macs` holds, in mode `bridged`.
    pub(crate) stations: u32,
    /// MACs that an address is reserved for.
    pub(crate) reserved_macs: BTreeSet<Mac>,
    /// What is known of names.
    pub(crate) names: DnsForwarder,
    /// The uplink of packets, where there is one.
    pub(crate) tun: Option<Box<Tun>>,
}

impl Network {
    /// A Network without ports.
    #[must_use]
    pub fn new(config: NetworkConfig, now: Time) -> Network {
        let key = SipKey::from_secret(&config.secret, 0);
        let limits = &config.limits;
        Network {
            reserved_macs: config.reserved.values().copied().collect(),
            policy: Policy::new(&config),
            ports: Ports::default(),
            macs: Macs::new(key),
            neighbours: Neighbours::new(key, limits.neighbour_waiting),
            reassembly: Reassembly::new(
                limits.reassembly_bytes,
                limits.reassemblies_per_port,
                config.timeouts.reassembly,
            ),
            services: Services::default(),
            forwards: BTreeMap::new(),
            clients: BTreeMap::new(),
            flows: FlowTable::new(limits.flows, key),
            wheel: Wheel::new(now.as_ms()),
            batch: List::default(),
            turns: Turns::new(),
            isn_key: SipKey::from_secret(&config.secret, 16),
            names: DnsForwarder::new(
                SipKey::from_secret(&config.secret, 16).derive(u64::from(u32::MAX)),
                limits,
            ),
            scratch: vec![0; FRAME_MAX],
            piece: Vec::with_capacity(2048),
            due: Vec::new(),
            base: Counters::default(),
            sharing: None,
            now,
            socket_memory: 0,
            tun: None,
            stations: 0,
            cfg: config,
        }
    }

    /// Adds a port; one that exists already stays as it is. Addresses that are in use by others are left out.
    pub fn add_port(&mut self, port: PortId, config: PortConfig) {
        let addresses = config.addresses.clone();
        let mac = config.mac.filter(|m| m.is_unicast() && *m != self.cfg.gateway_mac);
        let mtu = config.mtu;
        let mut new = Port::new(port, config, &self.cfg.limits, self.now);
        new.mac = None;
        new.ip_id = (self.isn_key.hash(&[self.now.0, u64::from(port.0)]) & 0xffff) as u16;
        let Some(slot) = self.ports.insert(new) else { return };
        self.tell(PeerUpdate::PortUp { port, mac, mtu });
        if let Some(mac) = mac {
            self.claim_mac(slot, mac);
        }
        for ip in addresses {
            // The caller decides who has which address; one that it gave twice stays with the first.
            let _taken = self.bind_address(port, ip, mac);
        }
    }

    /// Closes up to `most` flows of a port that is to be removed. True when it has more: a port with many is
    /// removed in steps, so that others do not wait for all of them.
    pub fn close_flows_of<E: Effects>(&mut self, now: Time, port: PortId, most: usize, fx: &mut E) -> bool {
        self.now = now;
        let Some(slot) = self.ports.slot(port) else { return false };
        self.close_flows(slot, most, fx);
        self.ports.get(slot).is_some_and(|p| p.records.len > 0)
    }

    fn close_flows<E: Effects>(&mut self, slot: u32, most: usize, fx: &mut E) {
        for _ in 0..most {
            let Some(index) = self.ports.get(slot).map(|p| p.records.head).filter(|i| *i != NONE) else {
                return;
            };
            self.close_flow(index, fx);
        }
    }

    /// Removes a port: closes all its flows and frees its addresses.
    pub fn remove_port<E: Effects>(&mut self, now: Time, port: PortId, fx: &mut E) {
        self.now = now;
        let Some(slot) = self.ports.slot(port) else { return };
        match self.ports.get(slot).and_then(|p| p.remote) {
            Some(worker) => self.count_remote(worker, false),
            None => self.tell(PeerUpdate::PortDown { port }),
        }
        self.close_flows(slot, usize::MAX, fx);
        self.tunnel_remove_port(slot, fx);
        while self.neighbours.give_up_port(slot).is_some() {}
        self.neighbours.remove_port(slot);
        self.macs.remove_port(slot);
        self.reassembly.remove_port(slot);
        self.names_remove_port(port);
        if let Some(p) = self.ports.remove(slot) {
            self.base.add(&p.counters);
        }
    }

    /// Gives an address to a port. A port that only learned it loses it.
    ///
    /// # Errors
    /// [`AddressInUse`] when it is assigned to another port, belongs to the gateway or a service, or the port
    /// does not exist.
    pub fn bind_address(&mut self, port: PortId, ip: IpAddr, mac: Option<Mac>) -> Result<(), AddressInUse> {
        let slot = self.ports.slot(port).ok_or(AddressInUse(ip))?;
        if self.is_own(ip) {
            return Err(AddressInUse(ip));
        }
        let old = self.neighbours.get(ip).copied();
        if let Some(b) = old {
            // Of ports elsewhere the control side knows more than this core does yet.
            if b.assigned && b.slot != slot && !self.is_remote(b.slot) {
                return Err(AddressInUse(ip));
            }
            self.forget_learned(b.slot, ip);
            if b.slot != slot {
                self.tunnel_left(ip);
            }
        }
        let known = old.filter(|b| b.slot == slot).and_then(|b| b.mac);
        let own = self.ports.get(slot).and_then(|p| p.mac);
        let mac = mac.or(known).or(own);
        let b = Binding { ip, slot, mac, assigned: true, seen: self.now };
        self.neighbours.set(b);
        self.tell_binding(&b, None);
        Ok(())
    }

    /// Takes an address back. Flows of it live on until they end by themselves.
    pub fn unbind_address<E: Effects>(&mut self, now: Time, ip: IpAddr, fx: &mut E) {
        self.now = now;
        if let Some(b) = self.neighbours.remove(ip) {
            self.forget_learned(b.slot, ip);
            self.tunnel_left(ip);
            if !self.is_remote(b.slot) {
                self.tell(PeerUpdate::AddressGone { ip });
            }
        }
        if let Some(w) = self.neighbours.resolved(ip) {
            self.give_up(w, fx);
        }
    }

    /// Adds a service of the gateway: UDP datagrams come as [`crate::interface::effects::Event::Datagram`], TCP
    /// connects to [`crate::interface::types::Target::Service`]. UDP port 67 also takes what is broadcast.
    pub fn add_service(&mut self, service: ServiceId, proto: u8, address: IpAddr, port: u16) {
        self.services.add(service, proto, address, port);
    }

    /// Adds a Forward.
    pub fn add_forward(&mut self, id: ForwardId, spec: ForwardSpec) {
        self.forwards.insert(id.0, spec);
    }

    /// Removes a Forward. Its TCP flows live on; its UDP flows end, because their socket goes with it.
    pub fn remove_forward<E: Effects>(&mut self, now: Time, id: ForwardId, fx: &mut E) {
        self.now = now;
        self.forwards.remove(&id.0);
        let gone: Vec<u32> = self.clients.iter().filter(|(k, _)| k.0 == id.0).map(|(_, i)| *i).collect();
        for index in gone {
            self.close_flow(index, fx);
        }
    }

    /// A frame from a guest.
    pub fn frame<E: Effects>(
        &mut self,
        now: Time,
        port: PortId,
        frame: &mut [u8],
        meta: FrameMeta,
        fx: &mut E,
    ) {
        self.now = now;
        self.ingress(port, frame, meta, fx);
    }

    /// The end of a batch of frames and socket events: sends the ACKs that are due, one per flow.
    pub fn batch_end<E: Effects>(&mut self, now: Time, fx: &mut E) {
        self.now = now;
        self.flush_batch(fx);
    }

    /// Before [`Network::batch_end`]: frames and socket events took so many nanoseconds since the last one.
    pub fn others_took(&mut self, ns: u64) {
        self.turns.others_took(ns);
    }

    /// True when flows have more to send, and only let others have their turn: [`Network::batch_end`] is due again.
    #[must_use]
    pub fn has_more(&self) -> bool {
        self.batch.len > 0
    }

    /// A port that was full takes frames again.
    pub fn port_writable<E: Effects>(&mut self, now: Time, port: PortId, fx: &mut E) {
        self.now = now;
        self.kick_port(port, fx);
    }

    /// The outcome of [`Effects::tcp_connect`].
    pub fn tcp_connected<E: Effects>(
        &mut self,
        now: Time,
        flow: FlowId,
        result: Result<(), SockError>,
        fx: &mut E,
    ) {
        self.now = now;
        self.with_flow(flow, fx, |tcb, cx| tcb.connected(cx, result));
    }

    /// A TCP socket became readable or writable; both on hang-up or error.
    pub fn tcp_ready<E: Effects>(
        &mut self,
        now: Time,
        flow: FlowId,
        readable: bool,
        writable: bool,
        fx: &mut E,
    ) {
        self.now = now;
        self.with_flow(flow, fx, |tcb, cx| tcb.ready(cx, readable, writable));
        self.measure_arrival(flow, fx);
    }

    /// A client connected to a Forward's TCP socket. `None`: refused, and the caller resets the socket.
    pub fn tcp_accepted<E: Effects>(
        &mut self,
        now: Time,
        forward: ForwardId,
        sock: SockId,
        peer: SocketAddr,
        fx: &mut E,
    ) -> Option<FlowId> {
        self.now = now;
        match self.accept_tcp(forward, sock, peer, fx) {
            Ok(flow) => Some(flow),
            Err(why) => {
                self.base.drop(why);
                None
            }
        }
    }

    /// A datagram came in on the socket of `flow`, or several of `segment` bytes each when that is not 0.
    pub fn udp_received<E: Effects>(
        &mut self,
        now: Time,
        flow: FlowId,
        from: SocketAddr,
        payload: &[u8],
        segment: u16,
        fx: &mut E,
    ) {
        self.now = now;
        self.turns.active(now, NO_FLOW);
        if DnsForwarder::is_flow(flow) {
            return self.names_in(flow, from, payload, segment, fx);
        }
        self.udp_in(flow, from, payload, segment, fx);
    }

    /// A datagram came in on a Forward's socket.
    #[allow(clippy::too_many_arguments)] // One call from one place; a struct would only rename them.
    pub fn udp_forward_received<E: Effects>(
        &mut self,
        now: Time,
        forward: ForwardId,
        sock: SockId,
        from: SocketAddr,
        _local: SocketAddr,
        payload: &[u8],
        segment: u16,
        fx: &mut E,
    ) {
        self.now = now;
        self.turns.active(now, NO_FLOW);
        if let Err(why) = self.forward_in(forward, sock, from, payload, segment, fx) {
            self.base.drop(why);
        }
    }

    /// An echo reply came in on the socket of `flow`. `ttl` is as it came from the outside.
    #[allow(clippy::too_many_arguments)] // As above.
    pub fn ping_received<E: Effects>(
        &mut self,
        now: Time,
        flow: FlowId,
        from: IpAddr,
        seq: u16,
        ttl: u8,
        body: &[u8],
        fx: &mut E,
    ) {
        self.now = now;
        self.turns.active(now, NO_FLOW);
        self.echo_in(flow, from, seq, ttl, body, fx);
    }

    /// The kernel reported an error for a datagram, echo request or connect of `flow`.
    pub fn sock_error<E: Effects>(&mut self, now: Time, flow: FlowId, error: DatagramError<'_>, fx: &mut E) {
        self.now = now;
        if DnsForwarder::is_flow(flow) {
            return self.names_error(flow, error.dst, error.payload, fx);
        }
        self.relay_error(flow, &error, fx);
    }

    /// The answer of a UDP service to a guest.
    #[allow(clippy::too_many_arguments)] // As above.
    pub fn service_send<E: Effects>(
        &mut self,
        now: Time,
        port: PortId,
        dst_mac: Mac,
        src: SocketAddr,
        dst: SocketAddr,
        payload: &[u8],
        fx: &mut E,
    ) {
        self.now = now;
        let Some(slot) = self.ports.slot(port) else {
            self.base.drop(crate::interface::stats::DropReason::NoEndpoint);
            return;
        };
        if let Err(why) = self.send_udp(slot, dst_mac, src, dst, payload, 0, fx) {
            self.drop_at(slot, why);
        }
    }

    /// When [`Network::timers`] is to be called next. `None`: not until something else happens.
    #[must_use]
    pub fn next_timer(&self) -> Option<Time> {
        if !self.due.is_empty() {
            return Some(self.now);
        }
        let wheel = self.wheel.next().map(|ms| Time(ms.saturating_mul(1_000_000)));
        let tunnel = self.tunnel_next_timer();
        let names = self.names.next_timer();
        [wheel, tunnel, names, self.reassembly.next_timer(), self.neighbours.next_timer()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Does what is due.
    pub fn timers<E: Effects>(&mut self, now: Time, fx: &mut E) {
        self.now = now;
        if self.due.is_empty() {
            self.wheel.expire(now.as_ms(), &mut self.due);
        }
        let mut due = std::mem::take(&mut self.due);
        for index in due.drain(..due.len().min(TIMERS)) {
            self.flow_timer(index, fx);
        }
        self.due = due;
        self.neighbour_timers(fx);
        self.reassembly_timers(fx);
        self.tunnel_timers(fx);
        self.names_timers(fx);
        self.flush_batch(fx);
    }

    /// All counters of the Network: those of its ports, of ports that are gone, and what belongs to none.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let mut sum = self.base.clone();
        for (_, p) in self.ports.iter() {
            sum.add(&p.counters);
        }
        sum
    }

    /// Counters of one port.
    #[must_use]
    pub fn port_counters(&self, port: PortId) -> Option<&Counters> {
        Some(&self.ports.get(self.ports.slot(port)?)?.counters)
    }

    /// All flows.
    pub fn flows(&self) -> impl Iterator<Item = FlowInfo> {
        let relays = self.flows.iter().filter(|(_, f)| !f.is_mapping()).filter_map(|(id, f)| {
            let port = self.ports.get(f.key.slot)?.id;
            Some(f.info(id, port, self.now))
        });
        relays.chain(self.tunnel_flows())
    }

    /// All ports.
    pub fn ports(&self) -> impl Iterator<Item = PortInfo> {
        self.ports.iter().filter(|(_, p)| p.remote.is_none()).map(|(slot, p)| PortInfo {
            port: p.id,
            mac: p.mac,
            addresses: {
                let mut a: Vec<IpAddr> = self.neighbours.of_port(slot).map(|b| b.ip).collect();
                a.sort_unstable();
                a
            },
            mtu: p.config.mtu,
            flows: p.flows + p.translated,
            buffered: p.budget.used,
        })
    }

    /// Bytes held for fragments, overhead included.
    #[must_use]
    pub fn reassembly_bytes(&self) -> usize {
        self.reassembly.bytes()
    }
}
