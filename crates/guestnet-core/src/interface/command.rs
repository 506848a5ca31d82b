//! Theory of operation: what the control side can tell a network that only its logic has to know. A command says beside
//! its variants which of several workers it is for ([`NetworkCommand::scope`]), and
//! [`Network::execute`](crate::Network::execute) does it. It either does all it says or changes nothing and says why.
//! Commands that touch descriptors belong to the I/O side.

use crate::dns::Verdict as DnsVerdict;
use crate::interface::config::{FlowInfo, ForwardSpec, NameServers, PortInfo};
use crate::interface::stats::Counters;
use crate::interface::types::{ForwardId, NetMode, PortId, ServiceId};
use crate::nat::{ConnTrackStats, ForwardError, NatConfigError, NatStats};
use crate::policy::Isolated;
use crate::policy::shaping::LimitSpec;
use crate::policy::table::RuleTable;
use guestnet_wire::ether::Mac;
use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr, SocketAddrV4};
use std::sync::Arc;

/// Which of several workers of a network a command is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The worker of this port.
    Port(PortId),
    /// The worker of this listener.
    Listener(u32),
    /// The first worker: it is the only one of a network that can do this, or it says why this cannot be done.
    First,
    /// All workers. Acknowledged when all of them have done it.
    All,
    /// The group of workers has to decide: the command places something on a worker, moves it, or has to know where it is.
    Group,
}

/// What the logic of a network can be told to do.
#[derive(Debug, Clone)]
pub enum NetworkCommand {
    /// Gives an address to a port.
    BindAddress {
        /// The port.
        port: PortId,
        /// The address.
        ip: IpAddr,
        /// The guest's MAC where it is known.
        mac: Option<Mac>,
    },
    /// Takes an address back.
    UnbindAddress {
        /// The address.
        ip: IpAddr,
    },
    /// Sends the answer of a UDP service.
    ServiceSend {
        /// To which port.
        port: PortId,
        /// To which MAC.
        dst_mac: Mac,
        /// From where.
        src: SocketAddr,
        /// To where.
        dst: SocketAddr,
        /// UDP payload.
        payload: Vec<u8>,
    },
    /// The names that the DNS service may know something of: see [`Network::set_dns_zones`](crate::Network::set_dns_zones).
    SetDnsZones {
        /// The service.
        service: ServiceId,
        /// Counts the changes of its records.
        generation: u64,
        /// Names as labels, in lower case.
        own: Vec<Box<[u8]>>,
    },
    /// The guests that have names have changed: see
    /// [`Network::forget_guest_names`](crate::Network::forget_guest_names).
    ForgetGuestNames {
        /// As above.
        generation: u64,
    },
    /// The name servers that names of others are asked of: see
    /// [`Network::set_name_servers`](crate::Network::set_name_servers).
    SetNameServers {
        /// Which, and how.
        servers: NameServers,
    },
    /// The answer to a question of a port's guest: see [`Network::dns_verdict`](crate::Network::dns_verdict).
    DnsVerdict {
        /// The port that the question came with.
        port: PortId,
        /// Names the question.
        ticket: u64,
        /// As above, before the records were looked at.
        generation: u64,
        /// What the DNS service says of the name.
        verdict: DnsVerdict,
    },
    /// Answers the question that a rule asked about a flow: see [`Network::decide`](crate::Network::decide). Nothing
    /// happens when it is not open any more.
    Decide {
        /// The port that the question came with.
        port: PortId,
        /// Names the question.
        ticket: u64,
        /// Whether the flow may be opened.
        allow: bool,
    },
    /// Publishes a guest's port on an external address of the uplink of packets.
    AddUplinkForward {
        /// Its number, apart from those of all other forwards.
        forward: ForwardId,
        /// The external address and port.
        external: SocketAddrV4,
        /// Where it leads: the address of the guest is 0.0.0.0 while there is no guest.
        spec: ForwardSpec,
    },
    /// Leads a published port to another address and port; what runs stays where it is. An address that no
    /// port has (0.0.0.0) refuses every client until the guest is there.
    RetargetForward {
        /// Which.
        forward: ForwardId,
        /// The guest's address and port.
        guest: SocketAddr,
    },
    /// What the engine of the uplink did and holds: [`Value::Nat`].
    NatStats,
    /// Changes the rules of the network. Done when every flow that the old rules admitted has been judged by the new
    /// ones, and those that are no longer allowed have been cut: [`Value::FlowsCut`].
    SetPolicy {
        /// Whether anything leaves the network. [`NetMode::Bridged`] is refused, and so is any change of a network
        /// with that mode.
        mode: NetMode,
        /// Which guests open no flows to other guests.
        isolated: Isolated,
    },
    /// Puts rules of the owner in force. Done as [`NetworkCommand::SetPolicy`].
    SetRules {
        /// The guest that they are for; `None`: all guests that have none of their own.
        port: Option<PortId>,
        /// The rules. Whoever sends them keeps them until this is done, so that a worker frees no large table.
        table: Option<Arc<RuleTable>>,
    },
    /// Limits what a guest carries, or all together.
    SetLimit {
        /// The guest; `None`: the network.
        port: Option<PortId>,
        /// The limit; `None` takes it back.
        limit: Option<LimitSpec>,
    },
    /// The host's IPv6 has come or gone: guests learn whether a route of IPv6 leads out.
    SetUpstream6 {
        /// It has IPv6 now.
        upstream: bool,
    },
    /// Says which addresses this host has, for rules about them. Flows are judged again later.
    SetHostAddresses {
        /// The addresses.
        addresses: Arc<HashSet<IpAddr>>,
    },
    /// Lists the flows: [`Value::Flows`].
    ListFlows,
    /// Lists the ports and their counters: [`Value::Ports`].
    PortStats,
}

impl NetworkCommand {
    /// Which of several workers it is for.
    #[must_use]
    pub fn scope(&self) -> Scope {
        use NetworkCommand as C;
        match self {
            C::BindAddress { port, .. }
            | C::ServiceSend { port, .. }
            | C::DnsVerdict { port, .. }
            | C::Decide { port, .. }
            | C::SetLimit { port: Some(port), .. } => Scope::Port(*port),
            C::UnbindAddress { .. } | C::RetargetForward { .. } => Scope::Group,
            // The uplink of packets has one worker.
            C::AddUplinkForward { .. } | C::NatStats => Scope::First,
            C::SetDnsZones { .. }
            | C::ForgetGuestNames { .. }
            | C::SetNameServers { .. }
            | C::SetPolicy { .. }
            | C::SetRules { .. }
            | C::SetUpstream6 { .. }
            | C::SetHostAddresses { .. }
            | C::SetLimit { port: None, .. }
            | C::ListFlows
            | C::PortStats => Scope::All,
        }
    }

    /// What each of so many workers gets of a command for all of them.
    #[must_use]
    pub fn part(self, workers: usize) -> NetworkCommand {
        match self {
            NetworkCommand::SetLimit { port: None, limit } => {
                NetworkCommand::SetLimit { port: None, limit: limit.map(|l| l.part(workers)) }
            }
            other => other,
        }
    }

    /// What it changes is to hold for all frames that come after it was given.
    #[must_use]
    pub fn is_urgent(&self) -> bool {
        matches!(self, NetworkCommand::SetDnsZones { .. } | NetworkCommand::ForgetGuestNames { .. })
    }
}

/// What a command brought.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Nothing but that it is done.
    None,
    /// All flows.
    Flows(Vec<FlowInfo>),
    /// All ports with their counters.
    Ports(Vec<(PortInfo, Counters)>),
    /// How many flows a change of the rules has cut.
    FlowsCut(u64),
    /// Of the engine of the uplink of packets.
    Nat(Box<(NatStats, ConnTrackStats)>),
}

/// What came of a command that was not refused.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// It is done.
    Done(Value),
    /// It is in force, and done when [`Network::take_flows_cut`](crate::Network::take_flows_cut) has a number.
    JudgingFlows,
}

/// Why a command was not done; nothing has changed then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    /// No such port.
    #[error("there is no port {}", .0.0)]
    NoSuchPort(PortId),
    /// Another port or the gateway has the address.
    #[error("address {0} is in use")]
    AddressInUse(IpAddr),
    /// There is no uplink of packets.
    #[error("the network has no uplink of packets")]
    NoUplink,
    /// A network in the mode `bridged` has no rules, and no other network gets that mode.
    #[error("the mode `bridged` cannot be changed while a network runs")]
    Bridged,
    /// What the engine says to its configuration.
    #[error("{0}")]
    Nat(#[from] NatConfigError),
    /// Why a port cannot be published on an external address.
    #[error("{0}")]
    Forward(#[from] ForwardError),
    /// No such forward.
    #[error("there is no forward {}", .0.0)]
    NoSuchForward(ForwardId),
    /// The number is taken.
    #[error("number {0} is in use")]
    NumberInUse(u32),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_of_the_network_is_divided_and_one_of_a_guest_is_not() {
        let limit = Some(LimitSpec { open_flows: Some(100), ..LimitSpec::default() });
        let flows_of = |port| match (NetworkCommand::SetLimit { port, limit }).part(4) {
            NetworkCommand::SetLimit { limit: Some(limit), .. } => limit.open_flows,
            other => panic!("{other:?}"),
        };
        assert_eq!((flows_of(None), flows_of(Some(PortId(1)))), (Some(25), Some(100)));
        let scope = |port| NetworkCommand::SetLimit { port, limit }.scope();
        assert_eq!((scope(None), scope(Some(PortId(1)))), (Scope::All, Scope::Port(PortId(1))));
    }
}
