//! Layer 2: [`switch`] decides which port a frame goes to, [`arp`] and [`ndp`] check and learn addresses, [`bridge`]
//! joins the network to a physical segment in mode `bridged`.

mod arp;
mod bridge;
mod ndp;
pub(crate) mod switch;
