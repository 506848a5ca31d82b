//! Theory of operation: the only place where Rust knows Python, and nothing else. [`dataplane`] is one network
//! with a method per command, on the threads of a [`runtime`]; [`events`] are the records that it brings up, [`errors`] leads from Rust's
//! errors to those of `guestnet.errors`. Packet threads never come here: Python asks, and takes what is there.
//!
//! Every class is frozen, and what can wait is done detached from the interpreter. The contract with Python
//! is `python/guestnet/_native.pyi`.

mod addresses;
mod buffers;
mod config;
mod dataplane;
mod errors;
mod events;
mod nat;
mod numbers;
mod policy;
mod pool;
mod records;
mod runtime;

/// The module `guestnet._native`.
#[pyo3::pymodule]
mod _native {
    #[pymodule_export]
    use super::dataplane::DataPlane;
    #[pymodule_export]
    use super::dataplane::{confinement_lack, io_uring_works};
    #[pymodule_export]
    use super::events::{
        AddressSeen, Datagram, DnsQuestion, Done, Failed, FlowClosed, FlowDenied, FlowOpened, Frame, Log,
        NameDenied, NameServer, PolicyAsk, PolicyAskEnded, PortDown, PortUp,
    };
    #[pymodule_export]
    use super::nat::{NatEngine, after_fork_in_child, after_fork_in_parent, before_fork, drop_reasons};
    #[pymodule_export]
    use super::policy::PolicyTable;
    #[pymodule_export]
    use super::pool::{PacketPool, Ring};
    #[pymodule_export]
    use super::records::{FlowInfo, PortInfo};
    #[pymodule_export]
    use super::runtime::Runtime;

    /// The version of the crate.
    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
