//! Theory of operation: how frames of an endpoint enter and leave. Every attachment reads one frame at a
//! time into a buffer of the worker, so that the frame is still in the cache when the core has it, and takes
//! frames to the guest as parts. TAP writes at once; sockets queue and are flushed at the end of the batch,
//! many frames a call. [`port_set`] holds the attachments and does in software what one of them cannot.

pub(crate) mod arrivals;
pub(crate) mod dgram;
pub(crate) mod listener;
pub(crate) mod port_set;
pub(crate) mod queue;
pub(crate) mod quota;
pub(crate) mod stream;
pub(crate) mod tap;
pub(crate) mod unixgram;
pub(crate) mod vhost_user;
pub(crate) mod vnet;

/// The longest frame that any attachment takes: QEMU's own bound is 4096 + 65536, the core's 14 + 65535.
pub(crate) const FRAME_MAX: usize = 65536 + 128;
/// Bytes that wait for a guest at most.
pub(crate) const QUEUE_MAX: usize = 1 << 20;
/// Below this a guest that was full takes frames again.
pub(crate) const QUEUE_LOW: usize = QUEUE_MAX / 2;

/// What became of a flush.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Flushed {
    /// Nothing waits any more.
    All,
    /// The kernel takes no more; EPOLLOUT tells when it does.
    Blocked,
    /// The kernel takes no more and does not tell; to be tried again soon.
    Retry,
    /// The peer is gone.
    Down(String),
}

/// One step of reading.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ReadOutcome<T> {
    /// A frame.
    Frame(T),
    /// Something that is not a frame that can be used; counted, and reading goes on.
    Bad,
    /// Nothing now.
    Empty,
    /// The peer is gone, or cannot be understood any more.
    Down(String),
}

/// "what: errno as text".
pub(crate) fn reason(what: &str, errno: i32) -> String {
    format!("{what}: {}", crate::os::sys::errno_text(errno))
}
