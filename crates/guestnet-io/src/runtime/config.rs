//! Theory of operation: the settings of a network's workers, and how numbers are divided among them. A flow's number
//! names its worker in its high bits. A guest of a listener gets a port from the range of its worker.

use crate::control::port_names::PortNames;
use crate::uplink::source::Source;
use guestnet_core::config::NetworkConfig;
use guestnet_wire::proxy::Proxy;
use std::sync::Arc;

/// Most workers of one network.
pub const WORKERS_MAX: usize = 64;
/// Flows of one of several workers: the rest of the number says which worker.
pub(crate) const FLOWS_MAX: u32 = 1 << 26;
/// The first number of a port that was not asked for.
pub(crate) const FIRST_DYNAMIC: u32 = 0x8000_0000;
/// Numbers of ports that one of several workers has for guests of listeners.
pub(crate) const DYNAMIC_PORTS: u32 = (u32::MAX - FIRST_DYNAMIC) / WORKERS_MAX as u32 + 1;

/// What a worker does when nothing is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PollingStrategy {
    /// Polls without end: shortest delay, one processor.
    Busy,
    /// Polls for a moment after work, then sleeps.
    #[default]
    Adaptive,
    /// Sleeps.
    EventDriven,
}

/// Settings of the workers of one network.
#[derive(Clone)]
pub struct WorkerConfig {
    /// The network.
    pub core: NetworkConfig,
    /// What to do when nothing is ready.
    pub strategy: PollingStrategy,
    /// Frames of one guest before others have their turn, 1 to 1024.
    pub batch_size: usize,
    /// Most polls of the adaptive strategy before it sleeps.
    pub max_spins: u32,
    /// Events that wait for the control side, at least 128.
    pub event_ring: usize,
    /// Commands that wait for the worker, at least 16.
    pub command_ring: usize,
    /// Name of the network, for messages.
    pub name: String,
    /// Threads that share the ports, 1 to 64.
    pub workers: usize,
    /// Small writes of a batch are one call by io_uring, where the system has it.
    pub io_uring: bool,
    /// Where flows to the outside leave from, with the uplink of sockets.
    pub source: Source,
    /// The proxy that they go through, with the uplink of sockets.
    pub proxy: Option<Arc<Proxy>>,
    /// What captures call the ports.
    pub port_names: PortNames,
}

impl WorkerConfig {
    /// With the usual sizes.
    #[must_use]
    pub fn new(core: NetworkConfig) -> WorkerConfig {
        WorkerConfig {
            core,
            strategy: PollingStrategy::default(),
            batch_size: 64,
            max_spins: 1000,
            event_ring: 8192,
            command_ring: 1024,
            name: "guestnet".into(),
            workers: 1,
            io_uring: true,
            source: Source::default(),
            proxy: None,
            port_names: PortNames::default(),
        }
    }
}
