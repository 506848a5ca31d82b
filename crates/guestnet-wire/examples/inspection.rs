//! Theory of operation: what it costs to read the first bytes of a conversation. Prints the best of many rounds, in
//! nanoseconds for each conversation.

use guestnet_wire::inspect::{
    HttpInspector, HttpProgress, Progress, QuicCheck, QuicInspector, StreamInspector,
};
use std::hint::black_box;
use std::time::Instant;

const HELLO: &[u8] = include_bytes!("../src/inspect/data/hello_517.bin");
const LARGE: &[u8] = include_bytes!("../src/inspect/data/hello_large.bin");
const QUIC: &[u8] = include_bytes!("../src/inspect/data/rfc9001.bin");
const REQUEST: &[u8] = b"GET /index.html HTTP/1.1\r\nHost: www.ok.example\r\nUser-Agent: curl/8.5.0\r\n\
    Accept: */*\r\n\r\n";

/// The shortest time of a call, in rounds of a thousand.
fn best(mut call: impl FnMut()) -> f64 {
    let round = |_| {
        let start = Instant::now();
        (0..1000).for_each(|_| call());
        start.elapsed().as_secs_f64() * 1e6
    };
    (0..300).map(round).fold(f64::MAX, f64::min)
}

fn hello(pieces: &[&[u8]]) {
    let mut s = StreamInspector::new();
    let last = pieces.iter().map(|piece| s.feed(black_box(piece)).1).last();
    assert!(matches!(last, Some(Progress::Tls(_))));
}

fn main() {
    let print = |name, ns: f64| println!("{name:36} {ns:>9.0} ns");
    print("ClientHello of 517 bytes", best(|| hello(&[HELLO])));
    print("ClientHello of 1571 bytes", best(|| hello(&[LARGE])));
    let (a, b) = LARGE.split_at(1448);
    print("ClientHello of 1571 bytes, in two", best(|| hello(&[a, b])));
    let single: Vec<&[u8]> = HELLO.chunks(1).collect();
    print("ClientHello of 517 bytes, in 517", best(|| hello(&single)));
    print(
        "HTTP/1 request head",
        best(|| {
            let progress = HttpInspector::new().feed(black_box(REQUEST)).1;
            assert!(matches!(progress, HttpProgress::Head(_)));
        }),
    );
    print(
        "QUIC Initial of 1200 bytes",
        best(|| {
            assert!(matches!(QuicInspector::new().feed(black_box(QUIC)), Progress::Tls(_)));
        }),
    );
    let mut known = QuicInspector::new();
    known.feed(QUIC);
    print("QUIC Initial, known", best(|| assert_eq!(known.check(black_box(QUIC)), QuicCheck::Same)));
    let short = [0x43; 1200];
    print("QUIC short header, known", best(|| assert_eq!(known.check(black_box(&short)), QuicCheck::Same)));
}
