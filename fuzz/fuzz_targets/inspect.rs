//! Theory of operation: any bytes as the beginning of a conversation. Nothing may panic, memory is bounded, and what a
//! stream is does not depend on how it was cut into pieces. Under the fuzzer packets of QUIC are not authentic
//! (`Keys::open`), so that it can change what is in them.
#![no_main]

use guestnet_wire::inspect::{
    HELD_MAX, HttpInspector, HttpProgress, Progress, QuicCheck, QuicInspector, StreamInspector,
};
use libfuzzer_sys::fuzz_target;

/// All that is not `More`, to the end of what can be read.
fn stream(pieces: &[&[u8]]) -> Vec<Progress> {
    let (mut s, mut all) = (StreamInspector::new(), Vec::new());
    for piece in pieces {
        let mut rest = *piece;
        while !rest.is_empty() {
            let (taken, progress) = s.feed(rest);
            assert!(taken <= rest.len() && s.memory() <= 2 * HELD_MAX);
            rest = &rest[taken..];
            match progress {
                Progress::More => assert!(rest.is_empty()),
                Progress::Tls(_) => all.push(progress),
                Progress::Http | Progress::Opaque(_) | Progress::Malformed(_) => {
                    all.push(progress);
                    return all;
                }
            }
        }
    }
    all
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

/// What was read is nothing new, except where the inspector has no more to say or is in the middle.
fn quic(datagrams: &[&[u8]]) {
    let mut q = QuicInspector::new();
    for datagram in datagrams {
        let _before = q.check(datagram);
        let progress = q.feed(datagram);
        assert!(q.memory() <= 4 * HELD_MAX);
        if matches!(progress, Progress::Tls(_)) {
            assert_eq!(q.check(datagram), QuicCheck::Same);
        }
    }
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
    quic(&[bytes, b, a, bytes]);
    // As in a recording: each datagram behind its length.
    let (mut rest, mut datagrams) = (bytes, Vec::new());
    while let Some((length, more)) = rest.split_first_chunk() {
        let (datagram, more) = more.split_at(usize::from(u16::from_be_bytes(*length)).min(more.len()));
        datagrams.push(datagram);
        rest = more;
    }
    quic(&datagrams);
});
