//! Lookup tables without behaviour of their own: MACs, neighbours, ports, flows and the gateway's services. Each keeps
//! its state private, is bounded by [`crate::config::Limits`], and can be built alone in a test.

pub(crate) mod addressing;
pub(crate) mod flow;
pub(crate) mod flow_table;
pub(crate) mod mac;
pub(crate) mod neighbour;
pub(crate) mod per_port;
pub(crate) mod port;
pub(crate) mod service;
