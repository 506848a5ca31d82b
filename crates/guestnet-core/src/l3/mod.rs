//! Layer 3. [`gateway`] is the component and holds its state: it routes packets that are addressed to the gateway's MAC.
//! [`icmp_error`] has the errors that tell guests why one cannot go on, [`reassembly`] puts fragments together, [`router`] is the IPv6 router, [`frame_builder`] makes
//! the packets that start here.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

pub(crate) mod frame_builder;
pub(crate) mod gateway;
pub(crate) mod icmp_error;
mod reassembly;
pub(crate) mod router;
mod tcp_reset;
#[cfg(test)]
mod tests;
