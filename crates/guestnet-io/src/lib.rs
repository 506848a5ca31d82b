//! Theory of operation: everything of guestnet that touches the machine: packet pool, rings, attachments,
//! uplink sockets and the worker that drives the core with them. Unsafe code is here and in `buffers.rs`
//! of guestnet-py, nowhere else.
//!
//! - [`runtime`]: the packet threads, which drive the core.
//! - [`control`]: commands from the control side, events to it.
//! - `attachment`: how frames of guests enter and leave.
//! - `uplink`: host sockets and the TUN device.
//! - [`memory`]: the containers of the packet path.
//! - [`os`]: system calls.

mod attachment;
pub mod control;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod memory;
pub mod os;
pub mod runtime;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "../tests/common/temp_dir.rs"]
mod temp_dir;
mod uplink;

pub use control::{
    Command, CommandError, Event, Level, ListenKind, PortNames, QueueFull, SubmitError, Value, WorkerCommand,
};
pub use guestnet_wire::proxy::{CREDENTIAL_MAX, Protocol as ProxyProtocol, Proxy};
pub use os::{duplicate, error_text, io_uring_works};
pub use runtime::{
    IoCounters, IoError, PollingStrategy, Runtime, StatsSnapshot, WORKERS_MAX, WorkerConfig, WorkerGroup,
    confinement_works, processors, spawn,
};
pub use uplink::source::Source;
