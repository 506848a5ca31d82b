//! Theory of operation: what a worker needs once, however many networks it serves: room for the frames at hand, and the
//! io_uring instance of the thread. A network has empty ones in their place, and gets these for its turn
//! ([`crate::runtime::shard::Shard::exchange`]). Nothing in them is kept from one turn to the next.

use crate::attachment::{FRAME_MAX, stream, vnet};
use crate::os::io_uring::Submitter;
use crate::uplink::udp::Inbox;

/// Buffers of one thread.
pub(crate) struct Buffers {
    /// A frame from a guest, behind its virtio header.
    pub frame: Vec<u8>,
    /// Many frames of a stream.
    pub stream: Vec<u8>,
    /// Datagrams from outside.
    pub inbox: Inbox,
    /// What was peeked from a TCP connection.
    pub peek: Vec<u8>,
    /// A large frame in one piece.
    pub linear: Vec<u8>,
    /// The frame that a core is making.
    pub scratch: Vec<u8>,
    /// Gathers small writes in one call.
    pub submitter: Submitter,
}

impl Buffers {
    /// For the calling thread, which alone may use them.
    pub(crate) fn new() -> Buffers {
        Buffers {
            frame: vec![0; FRAME_MAX + vnet::LEN_MRG],
            stream: vec![0; stream::READ_BUFFER],
            inbox: Inbox::new(),
            peek: Vec::new(),
            linear: Vec::new(),
            scratch: vec![0; FRAME_MAX],
            submitter: Submitter::new(true),
        }
    }
}
