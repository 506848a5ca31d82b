//! Theory of operation: thin wrappers of what the system offers: readiness ([`epoll`]), batches of writes
//! ([`io_uring`]), large pages ([`hugepages`]), socket addresses and control messages ([`sockaddr`], [`cmsg`])
//! and plain system calls ([`sys`]).

pub(crate) mod cmsg;
pub(crate) mod epoll;
pub mod hugepages;
pub(crate) mod io_uring;
pub(crate) mod sockaddr;
pub(crate) mod sys;

pub use io_uring::io_uring_works;
pub use sys::{duplicate, error_text};
