//! Theory of operation: any bytes as the replies of a proxy. Nothing may panic, the handshake ends within its bounds, no
//! byte beyond the reply is taken, and the outcome does not depend on how the replies were cut into pieces.
#![no_main]

use guestnet_wire::proxy::{HEAD_MAX, Protocol, Proxy, Step};
use libfuzzer_sys::fuzz_target;

/// The messages that were sent, how many bytes were taken, and the end.
fn run(proxy: &Proxy, replies: &[u8], piece: usize) -> (Vec<Vec<u8>>, usize, Step) {
    let (first, mut handshake) = proxy.begin("203.0.113.7:443".parse().unwrap());
    let (mut sent, mut at, mut seen) = (vec![first], 0, piece.min(replies.len()));
    loop {
        let (taken, step) = handshake.receive(&replies[at..seen]);
        at += taken;
        assert!(at <= seen && at <= HEAD_MAX && sent.len() <= 3);
        match step {
            Step::Send(message) => sent.push(message),
            Step::Wait if seen == replies.len() => return (sent, at, Step::Wait),
            Step::Wait => {
                assert_eq!(at, seen);
                seen = (seen + piece).min(replies.len());
            }
            end => return (sent, at, end),
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&how, replies)) = data.split_first() else { return };
    let protocol = if how & 1 == 0 { Protocol::Socks5 } else { Protocol::Http };
    let credentials = (how & 2 != 0).then(|| (b"me"[..].into(), b"secret"[..].into()));
    let proxy = Proxy { address: "192.0.2.1:1080".parse().unwrap(), protocol, credentials };
    let whole = run(&proxy, replies, replies.len().max(1));
    assert_eq!(run(&proxy, replies, 1 + usize::from(how >> 2)), whole);
});
