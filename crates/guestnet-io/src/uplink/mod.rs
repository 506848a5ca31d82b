//! Theory of operation: how traffic of guests leaves the host without privileges: as ordinary sockets of this
//! process. [`sockets`] numbers them and carries TCP, [`udp`] sends and receives datagrams in batches, [`ping`]
//! echo requests, [`forward`] takes what comes in on published ports. [`deferred_writes`] is what TCP puts off
//! to the end of a batch; [`error_queue`] reads what the kernel says went wrong with a datagram; [`source`] is where
//! sockets leave from, and [`proxy`] what connections go through, if the owner has chosen. Where there is the
//! privilege to make one, [`tun`] is a device that whole packets leave through instead.

mod deferred_queue;
pub(crate) mod deferred_writes;
pub(crate) mod error_queue;
pub(crate) mod forward;
pub(crate) mod local_stream;
pub(crate) mod options;
pub(crate) mod ping;
pub(crate) mod proxy;
mod queued_error;
pub(crate) mod sockets;
pub(crate) mod source;
pub(crate) mod tcp;
pub(crate) mod tun;
pub(crate) mod udp;
