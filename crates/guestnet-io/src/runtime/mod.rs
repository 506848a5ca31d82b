//! Theory of operation: the packet threads and what runs on them.
//! - `threads` starts threads, places networks on them, and has the loop of a thread.
//! - [`shard`] is a network on one thread. [`dispatch`] passes ready descriptors to its core, and [`io_context`] passes what
//!   the core wants done to attachments and uplink. [`shard_handle`] is the control side's half of it, `new_shard` a shard
//!   on its way to its thread.
//! - [`group`] makes the shards of a network look like one to the control side.
//! - [`links`] connects the shards of a network to each other.

pub(crate) mod config;
mod dispatch;
mod error;
pub(crate) mod group;
pub(crate) mod io_context;
pub mod links;
mod new_shard;
pub(crate) mod shard;
pub(crate) mod shard_handle;
pub(crate) mod stats;
pub(crate) mod threads;

pub use config::{PollingStrategy, WORKERS_MAX, WorkerConfig};
pub use error::IoError;
pub use group::{WorkerGroup, spawn};
pub use stats::{IoCounters, StatsSnapshot};
pub use threads::confinement::confinement_works;
pub use threads::placement::{Runtime, processors};
