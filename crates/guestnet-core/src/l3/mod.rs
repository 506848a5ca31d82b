//! Layer 3: [`gateway`] handles packets that are addressed to the gateway's MAC, [`reassembly`] puts IPv4 fragments
//! together, [`frame_builder`] makes the packets that start here.

pub(crate) mod frame_builder;
pub(crate) mod gateway;
pub(crate) mod reassembly;
