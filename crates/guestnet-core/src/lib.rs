//! Theory of operation: the logic of a Network with nothing of the machine in it. A worker hands in frames,
//! socket events and the time; what is to happen comes out as calls on [`effects::Effects`], whose answers
//! (a short send, a refused connect) the core needs at once. It opens nothing, sleeps never, reads no clock.
//!
//! The way of a frame through these files: [`switch`] (which port?) -> [`gateway`] (ARP, echo, services) or
//! another port, or outside: [`policy`] -> [`flow`] (hit or new) -> [`tcp`], [`udp`], [`icmp`] relays.
//! [`core`] holds them together; [`nat`] is the packet translator of the `tun` uplink.
#![forbid(unsafe_code)]

pub mod config;
pub mod effects;
pub mod nat;
pub mod stats;
pub mod tcp;
pub mod types;
