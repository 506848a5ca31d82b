//! Theory of operation: the one table that leads from Rust's errors to the classes of `guestnet.errors`. The
//! classes live in Python, where people look for them, and are looked up when one is needed.

use guestnet_core::NetworkError;
use guestnet_core::nat::ForwardError;
use guestnet_io::{CommandError, IoError, SubmitError};
use pyo3::prelude::*;
use std::io;

// The same on every system.
const ENFILE: i32 = 23;
const EMFILE: i32 = 24;

/// An instance of a class of `guestnet.errors`; when that cannot be had, what stood in the way.
fn error(py: Python<'_>, class: &str, message: String) -> PyErr {
    let made = py.import("guestnet.errors").and_then(|m| m.getattr(class)).and_then(|c| c.call1((message,)));
    made.map_or_else(|e| e, PyErr::from_value)
}

/// A wrong value.
pub fn config_error(py: Python<'_>, message: String) -> PyErr {
    error(py, "ConfigError", message)
}

/// The network could not start.
pub fn start_error(py: Python<'_>, e: &IoError) -> PyErr {
    match e {
        IoError::System { .. } => error(py, "DataPlaneError", e.to_string()),
        IoError::TooFewWorkers { .. } => {
            let remedy = "give the runtime more workers, or the network fewer";
            error(py, "ConfigError", format!("{e}: {remedy}"))
        }
        IoError::Forked => error(py, "NotRunning", format!("{e}: make a new one here")),
    }
}

/// A command was not taken.
pub fn submit_error(py: Python<'_>, e: SubmitError) -> PyErr {
    match e {
        SubmitError::QueueFull(_) => {
            error(py, "BusyError", format!("{e}: wait for commands to be done, or start the network again"))
        }
        SubmitError::Forked => {
            error(py, "NotRunning", format!("{e}: use it there, or start a network of this process"))
        }
    }
}

/// A descriptor that cannot be taken over.
pub fn descriptor_error(py: Python<'_>, fd: i32, e: &io::Error) -> PyErr {
    if matches!(e.raw_os_error(), Some(EMFILE | ENFILE)) {
        let message = "Too many files are open: publish fewer ports, or raise the limit (`ulimit -n`).";
        return error(py, "TooManyFiles", message.into());
    }
    let why = guestnet_io::error_text(e);
    error(py, "AttachError", format!("descriptor {fd} cannot be taken over: {why}"))
}

/// What came of a command.
pub fn command_error(py: Python<'_>, e: &CommandError) -> PyErr {
    let class = match e {
        CommandError::Network(e) => return network_error(py, e),
        CommandError::PortExists(_) => "EndpointExists",
        CommandError::Attached(_) | CommandError::BadDescriptor(_) | CommandError::BadPath(_) => {
            "AttachError"
        }
        CommandError::HasUplink | CommandError::OneWorker => "ConfigError",
        CommandError::NoSuchListener(_) | CommandError::System { .. } => "DataPlaneError",
    };
    error(py, class, e.to_string())
}

/// What the logic of a network says to a command.
fn network_error(py: Python<'_>, e: &NetworkError) -> PyErr {
    let class = match e {
        NetworkError::NoSuchPort(_) => "EndpointNotFound",
        NetworkError::AddressInUse(_) => "AddressInUse",
        NetworkError::Nat(_) | NetworkError::NoUplink => "ConfigError",
        NetworkError::Forward(e) => return nat_error(py, *e),
        NetworkError::NoSuchForward(_) => "ForwardNotFound",
        NetworkError::Bridged => "UnsupportedError",
        NetworkError::NumberInUse(_) => "DataPlaneError",
    };
    error(py, class, e.to_string())
}

/// A port that cannot be published by the NAT engine.
pub fn nat_error(py: Python<'_>, e: ForwardError) -> PyErr {
    let class = match e {
        ForwardError::InUse(_) => "PortInUse",
        ForwardError::Full => "BusyError",
        ForwardError::NotPublished(_) => "ForwardNotFound",
        ForwardError::Exists(_) => "DataPlaneError",
        ForwardError::Protocol
        | ForwardError::NotExternal(_)
        | ForwardError::NotInternal(_)
        | ForwardError::PortZero
        | ForwardError::NotIpv4(_) => "ConfigError",
    };
    error(py, class, format!("{e}."))
}
