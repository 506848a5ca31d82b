//! Theory of operation: the logic of a Network with nothing of the machine in it. A worker hands in frames,
//! socket events and the time; what is to happen comes out as calls on [`effects::Effects`], whose answers
//! (a short send, a refused connect) the core needs at once. It opens nothing, sleeps never, reads no clock.
//!
//! The way of a frame through these files: `core` (the API) -> `switch` (which port?) -> `arp`, `ndp`,
//! `gateway` (echo, ICMP errors, `service`s and `dns`, `reassembly`) or another port, or outside: `policy` ->
//! `table` of `flow`s (hit, or new by `lifecycle`) -> `udp`, `icmp`, `relay` with `tcp`.
//! With an uplink of packets what is for outside goes to `tun` instead and is translated by `nat`.
//! From outside: `forward` and `neighbour`, or `tun`. `wheel` keeps time, `emit` makes frames.
#![forbid(unsafe_code)]

mod arp;
mod audit;
pub mod config;
pub mod core;
mod dns;
pub mod effects;
mod emit;
mod flow;
mod forward;
mod gateway;
mod icmp;
mod lifecycle;
mod limiter;
pub mod nat;
mod ndp;
mod neighbour;
mod policy;
mod port;
mod reassembly;
mod relay;
pub mod remote;
mod segment;
mod service;
mod siphash;
mod socket_memory;
pub mod stats;
mod switch;
mod table;
pub mod tcp;
mod tun;
mod turns;
pub mod types;
mod udp;
mod wheel;

pub use config::{CoreConfig, Filtering, Limits, Timeouts};
pub use core::Core;
