//! Theory of operation: the readers of guests' bytes that are private to this crate, for the fuzz targets
//! alone (`--cfg fuzzing`).

use crate::attachment::{ReadOutcome, stream, vhost_user, vnet};
use guestnet_core::types::FrameMeta;

/// What a stream attachment makes of the bytes that have come: where its complete frames are, and whether
/// it would hang up after them.
#[must_use]
pub fn stream_frames(bytes: &[u8]) -> (Vec<std::ops::Range<usize>>, bool) {
    let (mut frames, mut at) = (Vec::new(), 0);
    loop {
        match stream::next_frame(&bytes[at..]) {
            ReadOutcome::Frame((from, to)) => {
                frames.push(at + from..at + to);
                at += to;
            }
            ReadOutcome::Down(_) => return (frames, true),
            ReadOutcome::Bad | ReadOutcome::Empty => return (frames, false),
        }
    }
}

/// What a TAP attachment believes of a frame's virtio header.
#[must_use]
pub fn vnet_parse(header: &[u8], frame: &[u8]) -> Option<FrameMeta> {
    vnet::parse(header, frame).ok()
}

/// The virtio header that would go to a guest with a frame; `None` when the frame is not what `meta` says.
#[must_use]
pub fn vnet_emit(meta: &FrameMeta, frame: &[u8]) -> Option<[u8; vnet::LEN_MRG]> {
    vnet::emit(meta, frame)
}

/// Begins the checksum of a GSO frame; false when the frame is not what `meta` says.
pub fn begin_checksum(frame: &mut [u8], meta: &mut FrameMeta) -> bool {
    vnet::begin_checksum(frame, meta)
}

/// A vhost-user guest whose memory, features and messages are these bytes: frames taken from it and given to
/// it. How many of both there were.
#[must_use]
pub fn vhost_guest(bytes: &[u8]) -> (usize, usize) {
    vhost_user::fuzzed::play(bytes)
}
