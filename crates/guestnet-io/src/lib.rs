//! Theory of operation: everything of guestnet that touches the machine: packet pool, rings, attachments,
//! uplink sockets and the worker that drives the core with them. The only crate with `unsafe`.
//!
//! [`worker`] is the loop; [`dispatch`] leads from the kernel's events to the core, [`io_state`] from the core
//! to [`attachments`] and [`uplink`]; [`control`] does the [`commands`] of the control side, which hears by
//! [`events`].

mod attachments;
pub mod bell;
mod capture;
pub mod commands;
mod confinement;
mod control;
mod dispatch;
mod eventfd;
pub mod events;
pub mod front;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod huge;
mod io_state;
mod listener;
mod peers;
mod poller;
pub mod pool;
mod port_names;
mod quota;
pub mod ring;
mod slab;
pub mod stats;
mod submit;
mod sync;
mod sys;
mod turn;
mod uplink;
mod vhost_events;
pub mod worker;

pub use commands::{Command, CommandError, ListenKind, QueueFull, Value};
pub use confinement::confinement_works;
pub use events::{Event, Level};
pub use front::{Worker, spawn};
pub use port_names::PortNames;
pub use stats::{IoCounters, StatsSnapshot};
pub use submit::io_uring_works;
pub use sys::{duplicate, error_text};
pub use worker::{IoError, PollingStrategy, WorkerConfig};
