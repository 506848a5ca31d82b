//! The files in `data` were made with aioquic: first flights of its client (v1, v2, large, other), the packet of RFC 9001
//! appendix A.2, and single packets with the frames that a test needs.

use super::*;
use proptest::prelude::*;

macro_rules! data {
    ($name:literal) => {
        include_bytes!(concat!("data/", $name, ".bin"))
    };
}

fn hello(name: &str) -> Progress {
    let server_name = Some(name.as_bytes().into());
    // The hello for ok.example is made by hand, without any other extension.
    Progress::Tls(ClientHello { server_name, ech: false, early_data: false, tls13: name != "ok.example" })
}

fn first(datagrams: &[&[u8]]) -> (QuicInspector, Progress) {
    let mut q = QuicInspector::new();
    let progress = datagrams.iter().map(|d| q.feed(d)).last().unwrap();
    (q, progress)
}

#[test]
fn the_packet_of_rfc_9001_appendix_a_2_is_read() {
    assert_eq!(first(&[data!("rfc9001")]).1, hello("example.com"));
}

#[test]
fn both_versions_are_read() {
    assert_eq!(first(&[data!("v1_0")]).1, hello("www.ok.example"));
    assert_eq!(first(&[data!("v2_0")]).1, hello("www.ok.example"));
}

#[test]
fn a_hello_is_put_together_from_several_datagrams_in_any_order() {
    let (a, b) = (&data!("large_0")[..], &data!("large_1")[..]);
    let mut q = QuicInspector::new();
    assert_eq!(q.feed(a), Progress::More);
    assert_eq!(q.feed(b), hello("large.example"));
    assert_eq!(q.feed(b), hello("large.example"), "it stays known");
    let mut q = QuicInspector::new();
    assert_eq!(q.feed(data!("second_half")), Progress::More);
    assert_eq!(q.feed(data!("ping_only")), Progress::More);
    assert_eq!(q.feed(data!("first_half")), hello("ok.example"));
}

#[test]
fn pieces_that_contradict_each_other_are_malformed() {
    let (_, progress) = first(&[data!("first_half"), data!("conflict")]);
    assert!(matches!(progress, Progress::Malformed(_)), "{progress:?}");
}

#[test]
fn a_retry_begins_again_with_other_keys() {
    let (_, progress) = first(&[data!("first_half"), data!("after_retry")]);
    assert_eq!(progress, hello("ok.example"));
}

#[test]
fn packets_of_a_datagram_are_read_one_after_the_other() {
    // A 0-RTT packet, whose type is skipped, before and behind the Initial packet.
    let early = [&[0xd0, 0, 0, 0, 1, 1, 9, 0, 5], &b"early"[..]].concat();
    let joined = [&early[..], data!("small"), &early].concat();
    assert_eq!(first(&[&joined]).1, hello("ok.example"));
    let two = [&data!("second_half")[..], data!("first_half")].concat();
    assert_eq!(first(&[&two]).1, hello("ok.example"));
    let padded = [&data!("small")[..], &[0; 600]].concat();
    assert_eq!(first(&[&padded]).1, hello("ok.example"));
}

#[test]
fn what_is_no_quic_is_opaque() {
    for bytes in [&b""[..], b"hello", &[0x40; 1200]] {
        assert!(matches!(first(&[bytes]).1, Progress::Opaque(_)), "{bytes:?}");
    }
    let version =
        |v: u32| [&[0xc0][..], &v.to_be_bytes(), &[8], b"12345678", &[0, 0, 0x44, 0xb0], &[7; 1200]].concat();
    for v in [0, 2, 0xff00_001d, 0x0a0a_0a0a] {
        assert_eq!(first(&[&version(v)]).1, Progress::Opaque("an unknown version of QUIC"));
    }
    // Nobody can read it.
    assert_eq!(first(&[&version(1)]).1, Progress::Opaque("QUIC without a beginning"));
}

#[test]
fn frames_that_an_initial_packet_must_not_have_are_malformed() {
    for bytes in [&data!("stream_frame")[..], data!("huge_offset")] {
        assert!(matches!(first(&[bytes]).1, Progress::Malformed(_)));
    }
}

#[test]
fn a_damaged_packet_changes_nothing() {
    let mut damaged = data!("small").to_vec();
    let last = damaged.len() - 1;
    damaged[last] ^= 1;
    assert_eq!(first(&[&damaged]).1, Progress::Opaque("QUIC without a beginning"));
    let (q, _) = first(&[data!("small")]);
    assert_eq!(q.check(&damaged), QuicCheck::Same);
}

#[test]
fn later_datagrams_of_the_connection_are_the_same_and_others_another() {
    let (q, _) = first(&[data!("small")]);
    let short_header = [0x43; 50];
    for same in [&data!("small")[..], data!("first_half"), data!("new_id_same_keys"), &short_header, b""] {
        assert_eq!(q.check(same), QuicCheck::Same);
    }
    for another in [&data!("another")[..], data!("other_0"), data!("conflict"), data!("after_retry")] {
        assert_eq!(q.check(another), QuicCheck::Another);
    }
    let behind = [&data!("new_id_same_keys")[..], data!("another")].concat();
    assert_eq!(q.check(&behind), QuicCheck::Another);
    let unknown = [&[0xc0, 9, 9, 9, 9, 8][..], b"12345678", &[0]].concat();
    assert_eq!(q.check(&unknown), QuicCheck::Another);
}

#[test]
fn memory_is_bounded() {
    let mut q = QuicInspector::new();
    for at in (0..HELD_MAX).step_by(1000).rev() {
        assert!(q.crypto.add(at, b"x") || q.crypto.pieces.len() > PIECES_MAX);
        if q.crypto.pieces.len() > PIECES_MAX {
            break;
        }
    }
    assert!(!q.crypto.add(HELD_MAX, b"x"));
    assert!(q.memory() < 2 * HELD_MAX + 4096);
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), keep in 0usize..1200) {
        let mut q = QuicInspector::new();
        let mixed = [&data!("v1_0")[..keep], &bytes].concat();
        let _any = (q.feed(&bytes), q.feed(&mixed), q.check(&mixed));
        let _frames = crypto_frames(&bytes, |_, _| true);
        prop_assert!(q.memory() <= 4 * HELD_MAX);
    }

    #[test]
    fn pieces_in_any_order_give_the_whole(cuts in prop::collection::vec(1usize..200, 0..20), seed in any::<u64>()) {
        let whole: Vec<u8> = (0..200u8).collect();
        let mut ends = [cuts, vec![0, 200]].concat();
        ends.sort_unstable();
        let mut pieces: Vec<_> = ends.windows(2).map(|w| (w[0], w[1])).collect();
        let mut state = seed;
        pieces.sort_by_key(|_| { state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1); state >> 33 });
        let mut c = Crypto::default();
        for (from, to) in pieces {
            prop_assert!(c.add(from, &whole[from..to]));
        }
        prop_assert_eq!(c.prefix(), &whole[..]);
    }
}
