//! Theory of operation: why a network cannot start. What runs reports its errors as events and as results of commands.

/// A network could not start.
#[derive(Debug, thiserror::Error)]
pub enum IoError {
    /// The system has no descriptor, memory or thread for it.
    #[error("the worker cannot start: {what}: {}", crate::os::sys::error_text(source))]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// A network asks for more threads than its runtime has.
    #[error("the network asks for {wanted} workers, and its runtime has {workers}")]
    TooFewWorkers {
        /// Workers of the network.
        wanted: usize,
        /// Workers of the runtime.
        workers: usize,
    },
    /// The runtime is a copy that a fork made.
    #[error("the runtime belongs to the process that this one was forked from")]
    Forked,
}

pub(crate) fn system(what: &'static str) -> impl Fn(i32) -> IoError {
    move |errno| IoError::System { what, source: std::io::Error::from_raw_os_error(errno) }
}
