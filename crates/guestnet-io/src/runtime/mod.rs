//! Theory of operation: the packet threads. [`worker`] is the loop of one thread, which
//! [`worker_thread`] starts and ends; [`dispatch`] passes ready
//! descriptors to the core, and [`io_context`] passes what the core wants done to attachments and uplink.
//! [`worker_group`] makes several workers look like one, and [`shard_links`] connects them to each other.

mod confinement;
mod dispatch;
pub(crate) mod io_context;
pub(crate) mod shard_links;
pub(crate) mod stats;
pub(crate) mod turn;
pub mod wake_flag;
pub(crate) mod worker;
pub(crate) mod worker_group;
pub(crate) mod worker_thread;

pub use confinement::confinement_works;
pub use stats::{IoCounters, StatsSnapshot};
pub use worker::{PollingStrategy, WorkerConfig};
pub use worker_group::{WORKERS_MAX, WorkerGroup, spawn};
pub use worker_thread::IoError;
