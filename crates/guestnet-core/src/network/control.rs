//! The control side of a network: ports, addresses, services, forwards, the policy, the configuration of DNS and of the
//! uplink, and what is counted. Each call goes to the component that keeps the state.

use super::{Network, give_up};
use crate::interface::config::{AddressInUse, FlowInfo, ForwardSpec, NameServers, PortInfo};
use crate::interface::effects::{Effects, Event};
use crate::interface::stats::Counters;
use crate::interface::types::{ForwardId, NetMode, PortConfig, PortId, ServiceId, Time};
use crate::nat::l3_uplink::L3Uplink;
use crate::nat::{ConnTrackStats, ForwardError, NatConfigError, NatEngineConfig, NatStats};
use crate::policy::Isolated;
use crate::policy::shaping::LimitSpec;
use crate::policy::table::RuleTable;
use crate::shard::PeerUpdate;
use guestnet_wire::ether::Mac;
use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr, SocketAddrV4};
use std::sync::Arc;

impl Network {
    /// Changes what flows of all ports together can have of the process: [`Limits::descriptors`] and
    /// [`Limits::socket_memory`]. Flows that exist stay.
    ///
    /// [`Limits::descriptors`]: crate::config::Limits::descriptors
    /// [`Limits::socket_memory`]: crate::config::Limits::socket_memory
    pub fn set_shares(&mut self, descriptors: u32, socket_memory: usize) {
        self.relay.set_shares(descriptors, socket_memory);
    }

    /// Bytes of the kernel's memory that the flows of all ports hold, as measured.
    #[must_use]
    pub fn socket_memory(&self) -> usize {
        self.relay.socket_memory()
    }

    // ---- ports and addresses ------------------------------------------------------------------------

    /// Adds a port; one that exists already stays as it is.
    ///
    /// # Errors
    /// [`AddressInUse`] when one of its addresses is assigned to another port, or belongs to the gateway or a service.
    /// The port is not added then.
    pub fn add_port(&mut self, port: PortId, config: PortConfig) -> Result<(), AddressInUse> {
        let now = self.now;
        let Some(slot) = self.layers.lan.add_port(now, port, config)? else { return Ok(()) };
        self.layers.gateway.add_port(now, slot, port.0);
        self.relay.add_port(now, slot);
        if let Some(uplink) = &mut self.uplink {
            uplink.add_port(slot);
        }
        self.note_released();
        Ok(())
    }

    /// Closes up to `most` flows of a port that is to be removed. True when it has more: a port with many is
    /// removed in steps, so that others do not wait for all of them.
    pub fn close_flows_of<E: Effects>(&mut self, now: Time, port: PortId, most: usize, fx: &mut E) -> bool {
        self.now = now;
        let Some(slot) = self.layers.lan.slot(port) else { return false };
        self.relay.close_flows(&mut self.layers.context(now, fx), slot, most)
    }

    /// Removes a port: closes all its flows and frees its addresses.
    pub fn remove_port<E: Effects>(&mut self, now: Time, port: PortId, fx: &mut E) {
        self.now = now;
        let Some(slot) = self.layers.lan.slot(port) else { return };
        self.relay.remove_port(&mut self.layers.context(now, fx), slot);
        if let Some(uplink) = &mut self.uplink {
            uplink.remove_port(&mut self.layers.context(now, fx), slot);
        }
        self.dns.remove_port(port);
        self.dns.set_query_limit(now, Some(port), None);
        self.layers.policy.remove_port(port);
        let cx = &mut self.layers.context(now, fx);
        cx.policy.conversations.remove_port(slot);
        cx.policy.pins.remove_port(slot);
        cx.policy.shaping.remove_port(slot, port);
        for ask in cx.policy.asks.remove_port(slot) {
            let _best_effort = cx.link.fx.event(Event::PolicyAskEnded { port, ticket: ask.ticket.0 });
        }
        for pending in cx.policy.pending.remove_port(slot) {
            give_up(&mut self.relay, cx, pending);
        }
        self.layers.gateway.remove_port(slot);
        self.layers.lan.remove_port(slot);
    }

    /// Gives an address to a port. A port that only learned it loses it.
    ///
    /// # Errors
    /// [`AddressInUse`] when it is assigned to another port, belongs to the gateway or a service, or the port
    /// does not exist.
    pub fn bind_address(&mut self, port: PortId, ip: IpAddr, mac: Option<Mac>) -> Result<(), AddressInUse> {
        let done = self.layers.lan.bind_address(self.now, port, ip, mac);
        self.note_released();
        done
    }

    /// Takes an address back. Flows of it live on until they end by themselves.
    pub fn unbind_address<E: Effects>(&mut self, now: Time, ip: IpAddr, fx: &mut E) {
        self.now = now;
        self.layers.lan.unbind_address(ip);
        self.follow_notices(fx);
    }

    /// The uplink ends the connections of addresses that their port lost.
    pub(super) fn note_released(&mut self) {
        while let Some(ip) = self.layers.lan.take_released() {
            if let Some(uplink) = &mut self.uplink {
                uplink.address_released(ip);
            }
        }
    }

    /// The host's IPv6 has come or gone: guests learn whether a route of IPv6 leads out.
    pub fn set_upstream6<E: Effects>(&mut self, now: Time, upstream: bool, fx: &mut E) {
        self.now = now;
        let cx = &mut self.layers.context(now, fx);
        cx.gateway.set_upstream6(&mut cx.link, upstream);
    }

    // ---- services and forwards ----------------------------------------------------------------------

    /// Adds a service of the gateway: UDP datagrams come as [`crate::interface::effects::Event::Datagram`], TCP
    /// connects to [`crate::interface::types::Target::Service`]. UDP port 67 also takes what is broadcast.
    pub fn add_service(&mut self, service: ServiceId, proto: u8, address: IpAddr, port: u16) {
        self.layers.lan.addressing_mut().add_service(service, proto, address, port);
    }

    /// Adds a forward: a published port whose sockets the I/O side has.
    pub fn add_forward(&mut self, id: ForwardId, spec: ForwardSpec) {
        self.relay.add_forward(id, spec);
    }

    /// Makes a forward lead to another guest; false when there is no such forward. Running flows stay where they are.
    pub fn retarget_forward(&mut self, id: ForwardId, guest: SocketAddr) -> bool {
        self.relay.retarget_forward(id, guest)
    }

    /// Removes a forward. Its TCP flows live on; its UDP flows end, because their socket goes with it.
    pub fn remove_forward<E: Effects>(&mut self, now: Time, id: ForwardId, fx: &mut E) {
        self.now = now;
        self.relay.remove_forward(&mut self.layers.context(now, fx), id);
    }

    // ---- rules --------------------------------------------------------------------------------------

    /// Changes the rules of the running network: its mode, and which guests open no flows to others. Flows that are no
    /// longer allowed are cut by the next calls of [`Network::timers`], some at a time; then [`Network::take_flows_cut`]
    /// has their number.
    ///
    /// False, and nothing changes, for [`NetMode::Bridged`], which has no rules.
    #[must_use]
    pub fn set_policy(&mut self, now: Time, mode: NetMode, isolated: Isolated) -> bool {
        self.now = now;
        let policy = &mut self.layers.policy;
        if NetMode::Bridged == mode || policy.settings().mode == NetMode::Bridged {
            return false;
        }
        policy.change(mode, isolated);
        self.dns.set_names(policy.names());
        self.layers.lan.set_asks(!policy.guests_pass());
        true
    }

    /// Puts rules of the owner in force: those of one guest, or those of all guests that have none of their own. Flows are
    /// judged again as after [`Network::set_policy`]. Returns the rules that they replace.
    pub fn set_rules(
        &mut self,
        now: Time,
        port: Option<PortId>,
        table: Option<Arc<RuleTable>>,
    ) -> Option<Arc<RuleTable>> {
        self.now = now;
        let policy = &mut self.layers.policy;
        let replaced = policy.change_rules(now, port, table);
        self.dns.set_names(policy.names());
        self.layers.lan.set_asks(!policy.guests_pass());
        replaced
    }

    /// Limits what a guest carries, or all together; `None` takes a limit back. False when there is no such port.
    pub fn set_limit(&mut self, now: Time, port: Option<PortId>, limit: Option<LimitSpec>) -> bool {
        self.now = now;
        let shaping = &mut self.layers.policy.shaping;
        match port {
            None => shaping.set_network(now, limit),
            Some(port) => match self.layers.lan.slot(port) {
                Some(slot) => shaping.set_guest(now, slot, limit),
                None => return false,
            },
        }
        self.dns.set_query_limit(now, port, limit.and_then(|l| l.queries));
        true
    }

    /// Says which addresses this host has, for rules about them. Flows are judged again.
    pub fn set_host_addresses(&mut self, now: Time, addresses: Arc<HashSet<IpAddr>>) {
        self.now = now;
        self.layers.policy.change_host_addresses(addresses);
        self.dns.set_names(self.layers.policy.names());
    }

    /// Takes how many flows the last changes of the rules have cut. `None` while flows still have to be judged, and when
    /// it was taken.
    pub fn take_flows_cut(&mut self) -> Option<u64> {
        self.layers.policy.take_cut()
    }

    /// Notes that the guest on a port got an address in an answer for a name, as the DNS service does. False when it was
    /// not noted.
    #[doc(hidden)]
    pub fn note_pin(&mut self, now: Time, port: PortId, ip: IpAddr, name: &[u8], life_s: u32) -> bool {
        self.now = now;
        let Some(slot) = self.layers.lan.slot(port) else { return false };
        self.layers.policy.pins.note(slot, ip, name, life_s, now)
    }

    /// The names for which the guest on a port got an address, as text. Only tests ask.
    #[doc(hidden)]
    pub fn pins_of(&mut self, now: Time, port: PortId, ip: IpAddr) -> Vec<String> {
        let pins = &mut self.layers.policy.pins;
        let Some(slot) = self.layers.lan.slot(port) else { return Vec::new() };
        pins.prune(slot, ip, now);
        pins.of(slot, ip).iter().map(ToString::to_string).collect()
    }

    // ---- DNS ----------------------------------------------------------------------------------------

    /// Sets the names that the DNS service may know something of: `own` are names as labels in lower case; these and those
    /// below them may be its own. `generation` counts the changes of its records; what is older than what is known is
    /// ignored. Cached responses are forgotten.
    pub fn set_dns_zones(&mut self, service: ServiceId, generation: u64, own: Vec<Box<[u8]>>) {
        self.dns.set_zones(service, generation, own);
    }

    /// The guests that have names have changed.
    pub fn forget_guest_names(&mut self, generation: u64) {
        self.dns.forget_guest_names(generation);
    }

    /// Sets the name servers that names of others are asked of.
    pub fn set_name_servers(&mut self, now: Time, servers: NameServers) {
        self.now = now;
        self.dns.set_name_servers(now, servers);
    }

    /// What the DNS forwarder holds: cached responses, bytes of them, outstanding queries, connections of guests.
    #[must_use]
    pub fn dns_holds(&self) -> (usize, usize, usize, usize) {
        self.dns.holds()
    }

    // ---- the uplink of packets ----------------------------------------------------------------------

    /// Gives the network an uplink of packets. Of `config` the network decides what it knows itself: what is
    /// inside, its gateway, timeouts and filtering, keys, and that refusals are its own to tell. Limits are those
    /// of `config`: what is translated holds no descriptor.
    ///
    /// # Errors
    /// What is wrong with `config`.
    pub fn set_uplink(&mut self, config: NatEngineConfig) -> Result<(), NatConfigError> {
        let mut uplink = L3Uplink::new(&self.config, config)?;
        self.layers.lan.local_ports().for_each(|(slot, _)| uplink.add_port(slot));
        self.uplink = Some(Box::new(uplink));
        Ok(())
    }

    /// Counters of the uplink's engine, and what it holds; `None` without one.
    #[must_use]
    pub fn nat_stats(&self) -> Option<(NatStats, ConnTrackStats)> {
        self.uplink.as_ref().map(|u| u.stats())
    }

    /// Publishes a guest's port on an external address of the uplink. A guest that no endpoint can have
    /// (0.0.0.0) keeps the port until [`Network::retarget_uplink_forward`].
    ///
    /// # Errors
    /// [`ForwardError`]; nothing has changed then.
    pub fn add_uplink_forward(
        &mut self,
        id: ForwardId,
        external: SocketAddrV4,
        spec: ForwardSpec,
    ) -> Result<(), ForwardError> {
        let uplink = self.uplink.as_mut().ok_or(ForwardError::NotExternal(*external.ip()))?;
        uplink.add_forward(id, external, spec)
    }

    /// Whether a forward with this number is published on the uplink.
    #[must_use]
    pub fn has_uplink_forward(&self, id: ForwardId) -> bool {
        self.uplink.as_ref().is_some_and(|u| u.has_forward(id))
    }

    /// Makes a published port of the uplink lead to another guest; its connections end. False when no such forward
    /// is published on the uplink.
    ///
    /// # Errors
    /// [`ForwardError`]; the port leads where it led before then, and its connections live on.
    pub fn retarget_uplink_forward(
        &mut self,
        id: ForwardId,
        guest: SocketAddr,
    ) -> Result<bool, ForwardError> {
        self.uplink.as_mut().map_or(Ok(false), |u| u.retarget_forward(id, guest))
    }

    /// Takes a published port back, connections live on; false when it is not one of the uplink.
    pub fn remove_uplink_forward(&mut self, id: ForwardId) -> bool {
        self.uplink.as_mut().is_some_and(|u| u.remove_forward(id))
    }

    // ---- other workers ------------------------------------------------------------------------------

    /// Makes this one of several workers; `workers` is how many there are. To be called before anything else.
    pub fn share(&mut self, workers: u16) {
        self.layers.lan.share(workers);
    }

    /// Moves the updates for the other workers to `out`, oldest first. Guests may cause `room` more until the next call.
    pub fn take_peer_updates(&mut self, room: usize, out: &mut Vec<PeerUpdate>) {
        self.layers.lan.take_peer_updates(room, out);
    }

    // ---- listings -----------------------------------------------------------------------------------

    /// All counters of the network: those of its ports, of ports that are gone, and what belongs to none.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.layers.lan.counters()
    }

    /// Counters of one port.
    #[must_use]
    pub fn port_counters(&self, port: PortId) -> Option<&Counters> {
        let lan = &self.layers.lan;
        Some(&lan.port(lan.slot(port)?)?.counters)
    }

    /// All flows.
    pub fn flows(&self) -> impl Iterator<Item = FlowInfo> {
        let (lan, now) = (&self.layers.lan, self.now);
        let translated = self.uplink.iter().flat_map(move |u| u.flows(lan, now));
        self.relay.flows(lan, now).chain(translated)
    }

    /// All ports.
    pub fn ports(&self) -> impl Iterator<Item = PortInfo> {
        let lan = &self.layers.lan;
        lan.local_ports().map(move |(slot, p)| PortInfo {
            port: p.id,
            mac: p.mac,
            addresses: lan.addresses_of(slot),
            mtu: p.config.mtu,
            flows: self.relay.flows_of(slot) + self.uplink.as_ref().map_or(0, |u| u.translated(slot)),
            buffered: self.relay.buffered(slot),
        })
    }

    /// Bytes held for fragments, overhead included.
    #[must_use]
    pub fn reassembly_bytes(&self) -> usize {
        self.layers.gateway.reassembly_bytes()
    }

    /// Checks that what the components keep twice agrees. Only tests and fuzzers ask.
    ///
    /// # Errors
    /// The first thing that does not agree.
    #[doc(hidden)]
    pub fn audit(&self) -> Result<(), String> {
        self.relay.audit(&self.layers.lan)?;
        self.uplink.as_ref().map_or(Ok(()), |u| u.audit())?;
        self.dns.audit()
    }
}
