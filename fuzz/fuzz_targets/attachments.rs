//! Theory of operation: the bytes that reach an attachment before any frame is known: stream framing, whole
//! and cut at any place, and the virtio header of a TAP. Framing must not depend on how the bytes came, and a
//! header that is believed must fit its frame.
#![no_main]

use guestnet_core::types::Csum;
use guestnet_io::fuzzing::{begin_checksum, stream_frames, vnet_emit, vnet_parse};
use libfuzzer_sys::fuzz_target;

/// The same bytes as two reads: what is left of the first waits for the second.
fn in_two(bytes: &[u8], at: usize) -> usize {
    let (first, down) = stream_frames(&bytes[..at]);
    if down {
        return first.len();
    }
    let used = first.last().map_or(0, |f| f.end);
    first.len() + stream_frames(&bytes[used..]).0.len()
}

fuzz_target!(|data: &[u8]| {
    let [cut, data @ ..] = data else { return };
    let (frames, _) = stream_frames(data);
    let mut last = 0;
    for f in &frames {
        assert_eq!(f.start, last + 4);
        assert_eq!(
            f.len(),
            u32::from_be_bytes([data[last], data[last + 1], data[last + 2], data[last + 3]]) as usize
        );
        last = f.end;
    }
    assert!(last <= data.len());
    assert_eq!(in_two(data, usize::from(*cut).min(data.len())), frames.len());

    let (header, frame) = data.split_at(data.len().min(10));
    if let Some(mut meta) = vnet_parse(header, frame) {
        if let Csum::Partial { start, offset } = meta.csum {
            assert!(start >= 14 && usize::from(start) + usize::from(offset) + 2 <= frame.len());
        }
        // What a guest sent may go on to another guest: the header made for that one must be as good.
        let mut frame = frame.to_vec();
        if meta.gso.is_none() || begin_checksum(&mut frame, &mut meta) {
            if let Some(again) = vnet_emit(&meta, &frame) {
                assert_eq!(vnet_parse(&again, &frame), Some(meta));
            }
        }
    }
});
