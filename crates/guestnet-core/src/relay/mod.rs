//! Relayed flows, each carried over a host socket. [`admission`] opens and closes flows within their limits;
//! [`tcp_relay`] joins the state machine in [`tcp`] to sockets; [`udp`] and [`icmp`] relay datagrams and echo requests;
//! [`port_forward`] accepts connections and datagrams of published ports. [`turns`] shares time among bulk flows, and
//! [`socket_memory`] the kernel's memory among guests.

mod admission;
mod icmp;
mod port_forward;
pub(crate) mod socket_memory;
pub mod tcp;
mod tcp_relay;
pub(crate) mod turns;
pub(crate) mod udp;
