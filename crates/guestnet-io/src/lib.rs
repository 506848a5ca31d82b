//! Theory of operation: everything of guestnet that touches the machine: packet pool, rings, attachments,
//! uplink sockets and the worker that drives the core with them. The only crate with `unsafe`.

pub mod pool;
pub mod ring;
mod sync;
