//! Theory of operation: the interface to the control side. A [`command`] goes down to a worker, where
//! [`executor`] carries it out; an [`event`] goes up. Captures, and the names of ports in them, belong here too.

pub(crate) mod capture;
pub(crate) mod command;
pub(crate) mod event;
mod executor;
pub(crate) mod port_names;

pub use command::{Command, CommandError, ListenKind, QueueFull, SubmitError, Value, WorkerCommand};
pub use event::{Event, Level};
pub use port_names::PortNames;
