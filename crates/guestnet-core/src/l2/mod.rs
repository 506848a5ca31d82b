//! Layer 2. [`lan`] is the component and holds its state. [`switch`] decides which port a frame goes to; [`addresses`],
//! [`arp`] and [`ndp`] check and learn who uses which address; [`bridge`] joins the network to a physical segment in mode
//! `bridged`; [`peers`] stands in for the ports of other workers; [`frame_checks`] needs no state.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

mod addresses;
mod arp;
mod bridge;
pub(crate) mod frame_checks;
pub(crate) mod lan;
mod ndp;
mod peers;
mod switch;
#[cfg(test)]
mod tests;
