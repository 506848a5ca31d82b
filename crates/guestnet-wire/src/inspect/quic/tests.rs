//! The recordings in `../data` are those of aioquic's client (`fuzz/record.py`), and the client's packets of RFC
//! 9001 and RFC 9369, appendices A.2. Everything else is sealed here.

use super::packet::{VERSION_1, VERSION_2};
use super::*;
use proptest::prelude::*;

macro_rules! data {
    ($name:literal) => {
        &include_bytes!(concat!("../data/", $name, ".bin"))[..]
    };
}

/// The datagrams of a recording.
fn datagrams(mut recording: &[u8]) -> Vec<&[u8]> {
    let mut all = Vec::new();
    while let Some((length, rest)) = recording.split_first_chunk() {
        let (datagram, rest) = rest.split_at(usize::from(u16::from_be_bytes(*length)));
        all.push(datagram);
        recording = rest;
    }
    all
}

fn name(progress: &Progress) -> Option<&str> {
    match progress {
        Progress::Tls(h) => h.server_name.as_deref().map(|n| std::str::from_utf8(n).unwrap()),
        _ => None,
    }
}

fn is_malformed(progress: &Progress) -> bool {
    matches!(progress, Progress::Malformed(_))
}

/// A ClientHello for a name, with so many bytes of something else before it.
fn client_hello(name: &str, before: usize) -> Vec<u8> {
    let n = name.len() as u16;
    let sni = [&(n + 3).to_be_bytes()[..], &[0], &n.to_be_bytes(), name.as_bytes()].concat();
    let mut extensions = Vec::new();
    for (kind, value) in [(51u16, vec![7; before]), (0, sni)] {
        extensions.extend([&kind.to_be_bytes()[..], &(value.len() as u16).to_be_bytes(), &value].concat());
    }
    let length = (extensions.len() as u16).to_be_bytes();
    let body = [&[3, 3][..], &[5; 32], &[0, 0, 2, 0x13, 1, 1, 0], &length, &extensions].concat();
    [&[1][..], &(body.len() as u32).to_be_bytes()[1..], &body].concat()
}

fn crypto(at: usize, data: &[u8]) -> Vec<u8> {
    let number = |n: usize| (n as u32 | 0x8000_0000).to_be_bytes();
    [&[6][..], &number(at), &number(data.len()), data].concat()
}

/// A client, by the connection id from which its keys come.
struct Client {
    keys: Keys,
    number: u64,
}

impl Client {
    fn new(id: &[u8]) -> Client {
        Client::of_version(VERSION_1, id)
    }

    fn of_version(version: u32, id: &[u8]) -> Client {
        Client { keys: Keys::new(version, id).unwrap(), number: 0 }
    }

    /// An Initial packet with these frames, to a connection id.
    fn to(&mut self, id: &[u8], number_bytes: usize, frames: &[u8]) -> Vec<u8> {
        let kind = if self.keys.version == VERSION_2 { 0xd0 } else { 0xc0 };
        let version = self.keys.version.to_be_bytes();
        let head = [&[kind][..], &version, &[id.len() as u8], id, &[0, 3], b"tok"].concat();
        let frames = [frames, &[0; 4]].concat();
        self.number += 1;
        self.keys.seal(&head, self.number - 1, number_bytes, &frames)
    }

    fn send(&mut self, frames: &[u8]) -> Vec<u8> {
        let id = self.keys.connection_id.clone();
        self.to(&id, 2, frames)
    }

    fn hello(&mut self, name: &str) -> Vec<u8> {
        self.send(&crypto(0, &client_hello(name, 100)))
    }
}

fn halves(name: &str) -> (Vec<u8>, Vec<u8>) {
    let hello = client_hello(name, 100);
    let (a, b) = hello.split_at(150);
    (crypto(0, a), crypto(150, b))
}

#[test]
fn the_packets_of_the_rfcs_are_read() {
    for packet in [data!("rfc9001"), data!("rfc9369")] {
        assert_eq!(name(&QuicInspector::new().feed(packet)), Some("example.com"));
    }
}

/// What a client does to a flow: its hello comes first, and nothing else is to be read unless it begins again.
#[test]
fn real_conversations_pass() {
    for (recording, first, again) in [
        (data!("quic_1"), 1, 0),
        (data!("quic_2"), 1, 0),
        (data!("quic_early_data"), 1, 0),
        (data!("quic_goes_on_in_2"), 1, 0),
        (data!("quic_retry"), 1, 1),
        (data!("quic_large_retry"), 2, 2),
        (data!("quic_again_in_1"), 1, 1),
    ] {
        let (mut q, mut hellos, mut fed, mut waits) = (QuicInspector::new(), Vec::new(), 0, true);
        for datagram in datagrams(recording) {
            if !waits && q.check(datagram) == QuicCheck::Same {
                continue;
            }
            fed += 1;
            let progress = q.feed(datagram);
            waits = progress == Progress::More;
            assert!(
                waits || name(&progress) == Some("www.ok.example"),
                "{progress:?} for {:x?}",
                &datagram[..20]
            );
            hellos.extend((!waits).then_some(fed));
        }
        let expected: Vec<i32> = if again == 0 { vec![first] } else { vec![first, first + again] };
        assert_eq!(hellos, expected);
    }
}

#[test]
fn a_hello_is_put_together_from_frames_in_any_order() {
    let (a, b) = halves("ok.example");
    let mut c = Client::new(b"12345678");
    let mut q = QuicInspector::new();
    assert_eq!(q.feed(&c.send(&b)), Progress::More);
    assert_eq!(q.feed(&c.send(&[1, 2, 0, 0, 0, 0])), Progress::More, "PING and ACK");
    assert_eq!(q.feed(b"early data"), Progress::More);
    let datagram = c.send(&a);
    assert_eq!(name(&q.feed(&datagram)), Some("ok.example"));
    assert_eq!(name(&q.feed(&datagram)), Some("ok.example"), "it stays known");
    // As Chrome sends it: small frames in disorder, with PING and PADDING between them.
    let hello = client_hello("ok.example", 100);
    let mut pieces: Vec<Vec<u8>> = hello.chunks(9).enumerate().map(|(n, p)| crypto(n * 9, p)).collect();
    pieces.reverse();
    pieces.swap(3, 11);
    let frames = pieces.join(&[0, 1, 0, 0][..]);
    assert_eq!(name(&QuicInspector::new().feed(&Client::new(b"12345678").send(&frames))), Some("ok.example"));
}

#[test]
fn packets_of_a_datagram_are_read_one_after_the_other() {
    let (a, b) = halves("ok.example");
    let mut c = Client::new(b"12345678");
    let (a, b) = (c.send(&a), c.send(&b));
    let early = [&[0xd0, 0, 0, 0, 1, 1, 9, 0, 5], &b"early"[..]].concat();
    for parts in [[&early[..], &a, &b, &early], [&b, &early, &a, &[0; 600]], [&a, &b, &[0x41; 30], &[]]] {
        assert_eq!(name(&QuicInspector::new().feed(&parts.concat())), Some("ok.example"));
    }
    // What a server drops behind a packet hides nothing.
    for rest in [&[0xc0, 0, 0, 0, 1, 30][..], &[0xc0, 0, 0, 0, 9, 0, 0, 1, 2], &[0xf0, 0, 0, 0, 1, 0, 0, 1]] {
        let progress = QuicInspector::new().feed(&[&a[..], &b, rest].concat());
        assert_eq!(name(&progress), Some("ok.example"));
    }
    let many = [&early.repeat(8)[..], &a].concat();
    assert!(is_malformed(&QuicInspector::new().feed(&many)));
}

/// Each of these would have a server read evil.example where ok.example was judged.
#[test]
fn nothing_is_hidden_from_the_inspector() {
    let (evil_a, evil_b) = halves("evil.example");
    let ok = crypto(0, &client_hello("ok.example", 102));
    // Pieces that contradict each other.
    let mut c = Client::new(b"12345678");
    let mut q = QuicInspector::new();
    assert_eq!(q.feed(&c.send(&evil_b)), Progress::More);
    assert!(is_malformed(&q.feed(&c.send(&ok))));
    // Another connection between the pieces.
    let mut q = QuicInspector::new();
    let (mut c, mut other) = (Client::new(b"12345678"), Client::new(b"another!"));
    assert_eq!(q.feed(&c.send(&evil_a)), Progress::More);
    assert_eq!(q.feed(&other.send(&[1])), Progress::More);
    assert!(is_malformed(&q.feed(&c.send(&ok))), "the first piece is still known");
    // A packet number of which the server has seen more than its last byte.
    let mut c = Client::new(b"12345678");
    let mut q = QuicInspector::new();
    c.number = 255;
    let id = b"12345678";
    assert_eq!(q.feed(&c.to(id, 1, &[1])), Progress::More);
    assert_eq!(q.feed(&c.to(id, 1, &evil_b)), Progress::More, "256, sent as 0");
    assert!(is_malformed(&q.feed(&c.to(id, 2, &ok))));
    // One that is in neither place.
    let mut c = Client::new(b"12345678");
    let mut q = QuicInspector::new();
    let first = c.send(&[1]);
    c.number = 600;
    assert_eq!(q.feed(&first), Progress::More);
    assert!(is_malformed(&q.feed(&c.to(id, 1, &evil_b))));
    // An unknown version in the middle.
    let mut q = QuicInspector::new();
    assert_eq!(q.feed(&Client::new(b"12345678").send(&evil_a)), Progress::More);
    assert!(is_malformed(&q.feed(&[0xc0, 9, 9, 9, 9, 0, 0, 1])));
    // Nobody but the server may have dropped the first hello: the second one is not passed over.
    let mut c = Client::new(b"12345678");
    let mut q = QuicInspector::new();
    assert_eq!(name(&q.feed(&c.send(&ok))), Some("ok.example"));
    let evil = c.send(&crypto(0, &client_hello("evil.example", 100)));
    assert_eq!(q.check(&evil), QuicCheck::Another);
    assert!(is_malformed(&q.feed(&evil)));
}

#[test]
fn a_second_hello_after_a_hello_retry_request_has_the_same_name() {
    let first = client_hello("ok.example", 100);
    for second in ["ok.example", "evil.example"] {
        let mut c = Client::new(b"12345678");
        let mut q = QuicInspector::new();
        assert_eq!(name(&q.feed(&c.send(&crypto(0, &first)))), Some("ok.example"));
        let hello = client_hello(second, 300);
        let (a, b) = hello.split_at(50);
        let a = c.to(b"chosen", 2, &crypto(first.len(), a));
        let b = c.to(b"chosen", 2, &crypto(first.len() + 50, b));
        assert_eq!(q.check(&a), QuicCheck::Another);
        assert_eq!(q.feed(&a), Progress::More);
        let progress = q.feed(&b);
        assert_eq!(name(&progress), (second == "ok.example").then_some(second));
        assert!(second == "ok.example" || is_malformed(&progress));
        assert!(second != "ok.example" || q.check(&b) == QuicCheck::Same);
    }
}

#[test]
fn later_datagrams_of_the_connection_are_the_same_and_others_another() {
    let mut c = Client::new(b"12345678");
    let mut q = QuicInspector::new();
    let hello = c.hello("ok.example");
    q.feed(&hello);
    let chosen = c.to(b"chosen", 2, &[2, 0, 0, 0, 0]);
    for same in [&hello[..], &chosen, &[0x43; 50], b"", b"hello"] {
        assert_eq!(q.check(same), QuicCheck::Same);
    }
    let another = Client::new(b"another!").hello("other.example");
    let coalesced = [&chosen[..], &another].concat();
    let unknown = [&[0xc0, 9, 9, 9, 9, 8][..], b"12345678", &[0]].concat();
    let mut damaged = hello.clone();
    *damaged.last_mut().unwrap() ^= 1;
    for news in [&another[..], &coalesced, &unknown, &damaged] {
        assert_eq!(q.check(news), QuicCheck::Another);
    }
    assert_eq!(q.feed(&unknown), Progress::Opaque("an unknown version of QUIC"));
    assert_eq!(name(&q.feed(&another)), Some("other.example"));
    // While a connection waits, the others go on.
    let third = client_hello("third.example", 100);
    let mut t = Client::new(b"thethird");
    let (a, b) = (t.send(&crypto(0, &third[..150])), t.send(&crypto(150, &third[150..])));
    assert_eq!((q.check(&a), q.feed(&a)), (QuicCheck::Another, Progress::More));
    let early = [&[0xd0, 0, 0, 0, 1, 1, 9, 0, 5], &b"early"[..]].concat();
    for waits in [&a, &t.send(&[1]), &early] {
        assert_eq!(q.check(waits), QuicCheck::Another);
    }
    for same in [&hello[..], &chosen, &[0x43; 50]] {
        assert_eq!(q.check(same), QuicCheck::Same);
    }
    assert_eq!(name(&q.feed(&b)), Some("third.example"));
    // The first connection is still known, and a flow that began with something else is watched too.
    assert_eq!(q.check(&c.to(b"chosen", 2, &[1])), QuicCheck::Same);
    let mut q = QuicInspector::new();
    assert_eq!(q.feed(b"hello"), Progress::Opaque("no QUIC"));
    assert_eq!((q.check(b"hello"), q.check(&another)), (QuicCheck::Same, QuicCheck::Another));
    assert_eq!(name(&q.feed(&another)), Some("other.example"));
}

#[test]
fn old_connections_are_forgotten_and_those_that_wait_are_bounded() {
    let mut q = QuicInspector::new();
    for n in 0..20 {
        let progress = q.feed(&Client::new(&[n; 8]).hello("ok.example"));
        assert_eq!(name(&progress), Some("ok.example"));
        assert!(q.connections.len() <= CONNECTIONS_MAX);
    }
    let (a, b) = halves("ok.example");
    let mut q = QuicInspector::new();
    let mut clients: Vec<Client> = (0..4).map(|n| Client::new(&[n; 8])).collect();
    assert!(clients.iter_mut().all(|c| q.feed(&c.send(&a)) == Progress::More));
    let last: Vec<Progress> = clients.iter_mut().map(|c| q.feed(&c.send(&b))).collect();
    assert_eq!(last.iter().map(name).collect::<Vec<_>>(), [None, None, None, Some("ok.example")]);
    let mut q = QuicInspector::new();
    let progress: Vec<Progress> = (0..5).map(|n| q.feed(&Client::new(&[n; 8]).send(&a))).collect();
    assert!(is_malformed(&progress[4]));
}

#[test]
fn what_is_no_quic_is_opaque() {
    let version =
        |v: u32| [&[0xc0][..], &v.to_be_bytes(), &[8], b"12345678", &[0, 0, 0x44, 0xb0], &[7; 1200]].concat();
    let rtp = [0x80, 0, 0x12, 0x34, 0, 1];
    for bytes in [&b""[..], b"hello", &[0x40; 1200], &[0x80], &[0xff, 1, 2], &rtp, &version(0), &version(2)] {
        let progress = QuicInspector::new().feed(bytes);
        assert!(matches!(progress, Progress::Opaque(_)), "{bytes:?} {progress:?}");
    }
    for bytes in [&version(1)[..], &[0xc0, 0, 0, 0, 1, 8]] {
        assert!(is_malformed(&QuicInspector::new().feed(bytes)), "{bytes:?}");
    }
    let early = [&[0xd0, 0, 0, 0, 1, 1, 9, 0, 5], &b"early"[..]].concat();
    assert_eq!(QuicInspector::new().feed(&early), Progress::Opaque("QUIC without a beginning"));
}

#[test]
fn frames_that_an_initial_packet_must_not_have_are_malformed() {
    let cut = [&[6, 0, 9][..], b"short"].concat();
    for frames in [&[8, 0, 1, 1][..], &[0x1e], &crypto(HELD_MAX, b"x"), &cut, &crypto(0, &[2, 0, 0, 4])] {
        assert!(
            is_malformed(&QuicInspector::new().feed(&Client::new(b"12345678").send(frames))),
            "{frames:?}"
        );
    }
    let close = [0x1c, 0, 0, 2, b'n', b'o'];
    assert_eq!(QuicInspector::new().feed(&Client::new(b"12345678").send(&close)), Progress::More);
}

#[test]
fn memory_is_bounded() {
    let mut q = QuicInspector::new();
    let mut c = Client::new(b"12345678");
    let mut last = Progress::More;
    for at in (0..HELD_MAX).step_by(1000).rev() {
        last = q.feed(&c.send(&crypto(at, b"x")));
        assert!(q.memory() < 2 * HELD_MAX + 16384);
    }
    assert!(is_malformed(&last), "too many pieces, or none of a ClientHello");
    let mut q = QuicInspector::new();
    for n in 0..4 {
        let _any = q.feed(&Client::new(&[n; 8]).send(&crypto(HELD_MAX - 100, b"x")));
        assert!(q.memory() < 2 * HELD_MAX + 16384);
    }
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_a_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        frames in prop::collection::vec(any::<u8>(), 0..300),
        keep in 0usize..1200,
    ) {
        let mut q = QuicInspector::new();
        let mixed = [&data!("rfc9001")[..keep], &bytes].concat();
        let _any = (q.feed(&bytes), q.feed(&mixed), q.check(&mixed));
        let _frames = QuicInspector::new().feed(&Client::new(&[1; 8]).send(&frames));
        prop_assert!(q.memory() <= 4 * HELD_MAX);
    }

    /// Frames of a hello in any order and any packets give the hello, or what came before it is complete.
    #[test]
    fn pieces_in_any_order_give_the_whole(cuts in prop::collection::vec(1usize..200, 0..20), seed in any::<u64>()) {
        let hello = client_hello("ok.example", 120);
        let cuts = cuts.into_iter().filter(|cut| *cut < hello.len()).collect();
        let mut ends: Vec<usize> = [cuts, vec![0, hello.len()]].concat();
        ends.sort_unstable();
        let mut pieces: Vec<_> = ends.windows(2).map(|w| crypto(w[0], &hello[w[0]..w[1]])).collect();
        let mut state = seed;
        pieces.sort_by_key(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state >> 33
        });
        let (mut q, mut c) = (QuicInspector::new(), Client::new(b"12345678"));
        let mut last = Progress::More;
        for piece in pieces {
            prop_assert_eq!(&last, &Progress::More);
            last = q.feed(&c.send(&piece));
            if name(&last).is_some() {
                break;
            }
        }
        prop_assert_eq!(name(&last), Some("ok.example"));
    }
}
