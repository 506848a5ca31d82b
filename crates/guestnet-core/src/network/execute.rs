//! Theory of operation: commands of the control side: each variant of [`NetworkCommand`] and the call that does it.

use super::Network;
use crate::interface::command::{NetworkCommand, NetworkError, Outcome, Value};
use crate::interface::effects::Effects;
use crate::interface::types::{ForwardId, PortId, Time};

impl Network {
    /// Does what a command says, or nothing.
    ///
    /// # Errors
    /// [`NetworkError`]: why it was not done.
    pub fn execute<E: Effects>(
        &mut self,
        now: Time,
        command: NetworkCommand,
        fx: &mut E,
    ) -> Result<Outcome, NetworkError> {
        use NetworkCommand as C;
        let value = match command {
            C::BindAddress { port, ip, mac } => {
                self.check_port(port)?;
                self.bind_address(port, ip, mac).map_err(|e| NetworkError::AddressInUse(e.0))?;
                Value::None
            }
            C::UnbindAddress { ip } => {
                self.unbind_address(now, ip, fx);
                Value::None
            }
            C::ServiceSend { port, dst_mac, src, dst, payload } => {
                self.check_port(port)?;
                self.service_send(now, port, dst_mac, src, dst, &payload, fx);
                Value::None
            }
            C::SetDnsZones { service, generation, own } => {
                self.set_dns_zones(service, generation, own);
                Value::None
            }
            C::ForgetGuestNames { generation } => {
                self.forget_guest_names(generation);
                Value::None
            }
            C::SetNameServers { servers } => {
                self.set_name_servers(now, servers);
                Value::None
            }
            C::DnsVerdict { port: _, ticket, generation, verdict } => {
                self.dns_verdict(now, ticket, generation, verdict, fx);
                Value::None
            }
            C::Decide { port, ticket, allow } => {
                let _still_open = self.decide(now, port, ticket, allow, fx);
                Value::None
            }
            C::AddUplinkForward { forward, external, spec } => {
                if self.uplink.is_none() {
                    return Err(NetworkError::NoUplink);
                }
                self.check_forward_number(forward)?;
                self.add_uplink_forward(forward, external, spec)?;
                Value::None
            }
            C::RetargetForward { forward, guest } => {
                if !self.retarget_uplink_forward(forward, guest)? && !self.retarget_forward(forward, guest) {
                    return Err(NetworkError::NoSuchForward(forward));
                }
                Value::None
            }
            C::NatStats => Value::Nat(Box::new(self.nat_stats().ok_or(NetworkError::NoUplink)?)),
            C::SetPolicy { mode, isolated } => {
                if !self.set_policy(now, mode, isolated) {
                    return Err(NetworkError::Bridged);
                }
                return Ok(Outcome::JudgingFlows);
            }
            C::SetRules { port, table } => {
                let replaced = self.set_rules(now, port, table);
                drop(replaced); // its owner has it too
                return Ok(Outcome::JudgingFlows);
            }
            C::SetLimit { port, limit } => {
                port.map_or(Ok(()), |port| self.check_port(port))?;
                self.set_limit(now, port, limit);
                Value::None
            }
            C::SetUpstream6 { upstream } => {
                self.set_upstream6(now, upstream, fx);
                Value::None
            }
            C::SetHostAddresses { addresses } => {
                self.set_host_addresses(now, addresses);
                Value::None
            }
            C::ListFlows => Value::Flows(self.flows().collect()),
            C::PortStats => {
                let counters = |p| self.port_counters(p).cloned().unwrap_or_default();
                Value::Ports(self.ports().map(|p| (counters(p.port), p)).map(|(c, p)| (p, c)).collect())
            }
        };
        Ok(Outcome::Done(value))
    }

    /// Forwards of sockets and of the uplink share their numbers.
    ///
    /// # Errors
    /// [`NetworkError::NumberInUse`]
    pub fn check_forward_number(&self, id: ForwardId) -> Result<(), NetworkError> {
        if self.relay.has_forward(id) || self.has_uplink_forward(id) {
            return Err(NetworkError::NumberInUse(id.0));
        }
        Ok(())
    }

    fn check_port(&self, port: PortId) -> Result<(), NetworkError> {
        // Ports of other workers have stand-ins here, and are not ours.
        let slot = self.layers.lan.slot(port).ok_or(NetworkError::NoSuchPort(port))?;
        if self.layers.lan.is_remote(slot) { Err(NetworkError::NoSuchPort(port)) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::Mock;
    use crate::interface::config::{ForwardSpec, NetworkConfig};
    use crate::interface::types::PortConfig;
    use guestnet_wire::ether::Mac;
    use std::net::Ipv4Addr;

    #[test]
    fn commands_that_cannot_be_done_say_why_and_change_nothing() {
        let (gateway, subnet) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 0));
        let config = NetworkConfig::new(Mac([2, 0, 0, 0, 0, 1]), gateway, (subnet, 24), [7; 32]);
        let (mut net, mut fx, now) =
            (Network::new(config, Time::default()), Mock::default(), Time::default());
        let (port, ip) = (PortId(1), "10.0.0.7".parse().unwrap());
        let bind = NetworkCommand::BindAddress { port, ip, mac: None };
        assert_eq!(net.execute(now, bind.clone(), &mut fx), Err(NetworkError::NoSuchPort(port)));
        let ports =
            |net: &mut Network, fx: &mut Mock| net.execute(now, NetworkCommand::PortStats, fx).unwrap();
        assert_eq!(ports(&mut net, &mut fx), Outcome::Done(Value::Ports(vec![])));

        let addresses = vec![];
        let config =
            PortConfig { mac: None, addresses, mtu: 1500, gso_max: 0, lax_offload: false, uplink: false };
        net.add_port(port, config).unwrap();
        assert_eq!(net.execute(now, bind, &mut fx), Ok(Outcome::Done(Value::None)));
        let Outcome::Done(Value::Ports(all)) = ports(&mut net, &mut fx) else { panic!("no list of ports") };
        assert_eq!(all[0].0.addresses, vec![ip]);

        let (forward, guest) = (ForwardId(4), "10.0.0.7:80".parse().unwrap());
        let retarget = NetworkCommand::RetargetForward { forward, guest };
        assert_eq!(net.execute(now, retarget.clone(), &mut fx), Err(NetworkError::NoSuchForward(forward)));
        let spec = ForwardSpec::published(6, guest);
        let external = "192.0.2.1:80".parse().unwrap();
        let publish = NetworkCommand::AddUplinkForward { forward, external, spec };
        assert_eq!(net.execute(now, publish, &mut fx), Err(NetworkError::NoUplink));
        assert_eq!(net.execute(now, NetworkCommand::NatStats, &mut fx), Err(NetworkError::NoUplink));
        net.add_forward(forward, spec);
        assert_eq!(net.check_forward_number(forward), Err(NetworkError::NumberInUse(4)));
        assert_eq!(net.execute(now, retarget, &mut fx), Ok(Outcome::Done(Value::None)));
    }

    #[test]
    fn a_change_of_the_rules_is_done_when_flows_are_judged() {
        let (gateway, subnet) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 0));
        let config = NetworkConfig::new(Mac([2, 0, 0, 0, 0, 1]), gateway, (subnet, 24), [7; 32]);
        let (mut net, mut fx, now) =
            (Network::new(config, Time::default()), Mock::default(), Time::default());
        let rules = NetworkCommand::SetRules { port: None, table: None };
        assert_eq!(net.execute(now, rules, &mut fx), Ok(Outcome::JudgingFlows));
        assert_eq!(net.take_flows_cut(), None);
        net.timers(now, &mut fx);
        assert_eq!(net.take_flows_cut(), Some(0));
        let bridged =
            NetworkCommand::SetPolicy { mode: crate::types::NetMode::Bridged, isolated: Default::default() };
        assert_eq!(net.execute(now, bridged, &mut fx), Err(NetworkError::Bridged));
    }
}
