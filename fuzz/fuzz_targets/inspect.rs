//! Theory of operation: any bytes as the beginning of a conversation. Nothing may panic, memory is bounded, and what a
//! stream is does not depend on how it was cut into pieces.
#![no_main]

use guestnet_wire::inspect::{
    HELD_MAX, HttpInspector, HttpProgress, Progress, QuicInspector, StreamInspector,
};
use libfuzzer_sys::fuzz_target;

/// The first progress that is not `More`.
fn stream(pieces: &[&[u8]]) -> Progress {
    let mut s = StreamInspector::new();
    for piece in pieces {
        let progress = s.feed(piece);
        assert!(s.memory() <= 2 * HELD_MAX);
        if progress != Progress::More {
            return progress;
        }
    }
    Progress::More
}

/// All heads, and what ended them.
fn http(pieces: &[&[u8]]) -> (Vec<HttpProgress>, usize) {
    let (mut h, mut heads, mut passed) = (HttpInspector::new(), Vec::new(), 0);
    for piece in pieces {
        let mut rest = *piece;
        while !rest.is_empty() {
            let (taken, progress) = h.feed(rest);
            assert!(taken <= rest.len() && h.pending() <= HELD_MAX);
            passed += taken;
            rest = &rest[taken..];
            match progress {
                HttpProgress::More => assert!(rest.is_empty()),
                HttpProgress::Head(_) => heads.push(progress),
                HttpProgress::Malformed(_) => {
                    heads.push(progress);
                    return (heads, 0);
                }
            }
        }
    }
    (heads, passed)
}

fuzz_target!(|data: &[u8]| {
    let Some((cut, bytes)) = data.split_first() else { return };
    let (a, b) = bytes.split_at(usize::from(*cut).min(bytes.len()));
    let single: Vec<&[u8]> = bytes.chunks(1).collect();
    let whole = stream(&[bytes]);
    assert_eq!(whole, stream(&[a, b]));
    assert_eq!(whole, stream(&single));
    let whole = http(&[bytes]);
    assert_eq!(whole, http(&[a, b]));
    assert_eq!(whole, http(&single));
    let mut q = QuicInspector::new();
    let _datagrams = (q.feed(bytes), q.feed(b), q.check(a), q.check(bytes));
    assert!(q.memory() <= 4 * HELD_MAX);
});
