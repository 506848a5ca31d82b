//! Theory of operation: the packet threads. [`placement`] starts threads and places networks on them. [`worker`] is the
//! loop of one thread, and serves a [`shard`] of each of its networks; [`dispatch`] passes ready descriptors to the core,
//! and [`io_context`] passes what the core wants done to attachments and uplink. [`worker_group`] makes the shards of a
//! network look like one to the control side ([`shard_handle`] for each) with the table of `routing`, and moves published
//! ports between them (`forward_moves`). [`shard_links`] connects the shards to each other.

pub(crate) mod adaptive;
pub(crate) mod buffers;
pub(crate) mod config;
mod confinement;
mod dispatch;
mod error;
mod forward_moves;
pub(crate) mod io_context;
mod new_shard;
pub(crate) mod placement;
mod routing;
pub(crate) mod shard;
pub(crate) mod shard_handle;
pub(crate) mod shard_links;
pub(crate) mod stats;
pub(crate) mod turn;
pub mod wake_flag;
pub(crate) mod worker;
pub(crate) mod worker_group;

pub use config::{PollingStrategy, WORKERS_MAX, WorkerConfig};
pub use confinement::confinement_works;
pub use error::IoError;
pub use placement::{Runtime, processors};
pub use stats::{IoCounters, StatsSnapshot};
pub use worker_group::{WorkerGroup, spawn};
