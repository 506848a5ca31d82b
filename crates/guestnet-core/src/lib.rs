//! Theory of operation: the logic of a network, without I/O. A worker passes in frames, socket events and the time; the
//! network calls [`effects::Effects`] with what is to be done, because it needs some answers at once (a short write, a
//! refused connect). It opens nothing, never sleeps and reads no clock.
//!
//! The folders follow the path of a frame. Each of the first six is a component with private state:
//! - `l2` decides which port a frame goes to and checks who may use which address.
//! - `l3` is the gateway: routing, echo, ICMP errors, fragments, datagrams for services.
//! - `policy` decides whether a new flow is allowed.
//! - `relay` carries flows over host sockets.
//! - `dns` answers and forwards DNS queries.
//! - [`nat`] translates packets for an uplink that takes packets.
//! - [`network`] is the API. It routes each call to the component that handles it.
//! - `context` is what a component sees of the others.
//! - `tables` holds what components look up, `util` their small parts.
//! - [`shard`] defines what the networks of several workers tell each other.
//! - [`interface`] is the contract with the callers.
#![forbid(unsafe_code)]

// The mock of the outside is shared with the tests of whole networks, which name this crate.
#[cfg(test)]
extern crate self as guestnet_core;

#[cfg(test)]
#[path = "../tests/common/mod.rs"]
mod common;
mod context;
mod dns;
pub mod interface;
mod l2;
mod l3;
pub mod nat;
#[cfg(test)]
#[path = "../tests/common/net.rs"]
mod net;
pub mod network;
pub mod policy;
mod relay;
pub mod shard;
mod tables;
mod util;

pub use dns::Verdict as DnsVerdict;
pub use interface::command::{NetworkCommand, NetworkError};
pub use interface::config::{Filtering, Limits, NameServers, NetworkConfig, Timeouts};
pub use interface::{command, config, effects, stats, types};
pub use network::Network;
pub use relay::tcp;
