//! Theory of operation: DNS over TCP for guests (RFC 7766): framing, order, bounds, and how connections end.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod dns_support;
#[path = "common/net.rs"]
mod net;

use dns_support::*;
use guestnet_core::effects::Close;
use guestnet_core::types::{PortId, SockId};
use proptest::prelude::*;

/// A world in which `www.own.example` is cached.
fn world(limits: impl FnOnce(&mut guestnet_core::Limits)) -> World {
    let mut w = World::with(&[SERVER], limits);
    w.own(A, &query(7, "www.own.example", &[]), own("www.own.example", 7));
    w
}

fn known(id: u16) -> Vec<u8> {
    framed(&query(id, "www.own.example", &[]))
}

fn far(id: u16) -> Vec<u8> {
    framed(&query(id, &format!("n{id}.far.example"), &[]))
}

fn ids(got: &[Vec<u8>]) -> Vec<u16> {
    got.iter().map(|a| u16::from_be_bytes([a[0], a[1]])).collect()
}

#[test]
fn queries_are_answered_one_after_the_other_and_in_pieces() {
    let mut w = world(|_| {});
    let all: Vec<u8> = (0..100).flat_map(known).collect();
    // Other connections have their turn after some of them.
    let (n, got) = w.stream(A, 1, &all, false);
    assert_eq!((n, ids(&got)), (64 * known(1).len(), (0..64).collect()));
    assert_eq!(w.n.fx.streams_resumed, [SockId(1)]);
    let (n, got) = w.stream(A, 1, &all[n..], false);
    assert_eq!((n, ids(&got)), (36 * known(1).len(), (64..100).collect()));
    let mut data = Vec::new();
    let mut got = Vec::new();
    for piece in all.chunks(7) {
        data.extend_from_slice(piece);
        let (n, answers) = w.stream(A, 1, &data, false);
        data.drain(..n);
        got.extend(answers);
    }
    assert_eq!(ids(&got), (0..100).collect::<Vec<_>>());
    assert_eq!(w.counts().0, 200);
}

#[test]
fn a_slow_query_does_not_hold_up_the_others() {
    let mut w = world(|_| {});
    let (_, got) = w.stream(A, 1, &[far(1), known(2)].concat(), false);
    assert_eq!(ids(&got), [2]);
    w.reply(|sent| answer(sent, 1, 60, 7));
    assert_eq!(ids(&w.stream_got(1)), [1]);
    // The authority is asked like a name server.
    let (_, got) = w.stream(A, 1, &framed(&query(3, "vm1", &[])), false);
    assert_eq!(got.len(), 0);
    let ticket = w.n.fx.events.iter().find_map(|e| match e {
        guestnet_core::effects::Event::DnsQuestion { ticket, name, .. } if **name == *labels("vm1") => {
            Some(*ticket)
        }
        _ => None,
    });
    w.verdict(ticket.unwrap(), own("vm1", 8));
    assert_eq!(ids(&w.stream_got(1)), [3]);
}

#[test]
fn queries_of_one_connection_are_bounded_and_the_rest_is_read_later() {
    let mut w = world(|_| {});
    let all: Vec<u8> = (0..200).flat_map(far).collect();
    let (mut at, got) = w.stream(A, 1, &all, false);
    assert_eq!((got.len(), w.holds().2), (0, 32));
    let mut seen = Vec::new();
    for _ in 0..200 {
        w.n.fx.streams_resumed.clear();
        w.reply(|sent| answer(sent, 1, 60, 7));
        seen.extend(ids(&w.stream_got(1)));
        if at < all.len() {
            assert_eq!(w.n.fx.streams_resumed, [SockId(1)]);
        }
        let (n, got) = w.stream(A, 1, &all[at..], false);
        at += n;
        seen.extend(ids(&got));
        assert!(w.holds().2 <= 32);
        if at == all.len() && seen.len() == 169 {
            break;
        }
    }
    assert_eq!(at, all.len());
    let mut sorted = seen.clone();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted.len(), seen.len(), "each once");
}

#[test]
fn a_client_that_ends_its_side_still_gets_its_answers() {
    let mut w = world(|_| {});
    let (_, got) = w.stream(A, 1, &known(1).repeat(3), true);
    assert_eq!((got.len(), &w.n.fx.streams_closed[..]), (3, &[(SockId(1), Close::Graceful)][..]));
    w.n.fx.streams_closed.clear();
    w.stream(A, 2, &[far(1), far(2), known(3)[..5].to_vec()].concat(), true);
    assert_eq!(w.n.fx.streams_closed, []);
    w.reply(|sent| answer(sent, 1, 60, 7));
    assert_eq!(w.n.fx.streams_closed, []);
    w.pass(2000);
    assert_eq!(ids(&w.stream_got(2)), [2, 1]);
    assert_eq!(w.n.fx.streams_closed, [(SockId(2), Close::Graceful)]);
    assert_eq!(w.holds().3, 0);
}

#[test]
fn what_is_no_query_ends_the_connection() {
    for data in [vec![0, 0], framed(b"x"), framed(&[&[0, 1, 0x80, 0][..], &[0; 8]].concat())] {
        let mut w = world(|_| {});
        let (n, got) = w.stream(A, 1, &[known(1), data.clone(), known(2)].concat(), false);
        assert_eq!((n, ids(&got)), (known(1).len() * 2 + data.len(), vec![1]));
        assert_eq!(w.n.fx.streams_closed, [(SockId(1), Close::Graceful)]);
    }
    // What can be refused is.
    let mut w = world(|_| {});
    let mut transfer = query(5, "www.own.example", &[]);
    let at = transfer.len() - 3;
    transfer[at] = 252;
    let (_, got) = w.stream(A, 1, &[framed(&transfer), known(2)].concat(), false);
    assert_eq!((ids(&got), rcode(&got[0])), (vec![5, 2], REFUSED));
}

#[test]
fn an_idle_connection_is_closed() {
    for data in [vec![], vec![0], vec![0xff, 0xff], known(1)[..10].to_vec()] {
        let mut w = world(|_| {});
        w.stream(A, 1, &data, false);
        w.pass(9999);
        assert_eq!(w.n.fx.streams_closed, []);
        w.pass(1);
        assert_eq!((&w.n.fx.streams_closed[..], w.holds().3), (&[(SockId(1), Close::Graceful)][..], 0));
    }
    // Bytes that make no message do not keep it open; messages do.
    let mut w = world(|_| {});
    w.stream(A, 1, &[], false);
    w.stream(A, 2, &[], false);
    for n in 1..=9 {
        w.pass(1000);
        w.confirm();
        w.stream(A, 1, &known(1), false);
        w.stream(A, 2, &known(1)[..n], false);
    }
    w.pass(1000);
    assert_eq!(w.n.fx.streams_closed, [(SockId(2), Close::Graceful)]);
    // One that waits for a response stays.
    let mut w = world(|_| {});
    w.servers.timeout_ms = 10_000;
    w.confirm();
    w.stream(A, 1, &far(1), false);
    w.pass(9_999);
    assert_eq!((w.n.fx.streams_closed.len(), w.holds().3), (0, 1));
    w.pass(1);
    assert_eq!(rcode(&w.stream_got(1)[0]), SERVFAIL);
    w.pass(10_000);
    assert_eq!(w.n.fx.streams_closed.len(), 1);
}

#[test]
fn a_client_that_does_not_read_is_not_served_and_reset() {
    let mut w = world(|_| {});
    w.stream(A, 1, &known(1), false);
    w.n.fx.unread.insert(SockId(1), 64 << 10);
    assert_eq!(w.stream(A, 1, &known(1), false), (0, vec![]));
    w.pass(10_000);
    assert_eq!(w.n.fx.streams_closed, [(SockId(1), Close::Reset)]);
    // All connections of a guest count together, and other guests do not.
    let mut w = world(|_| {});
    for n in 0..70 {
        w.stream(A, n, &far(7), false);
        w.n.fx.unread.insert(SockId(n), 64 << 10);
    }
    w.stream(B, 100, &far(7), false);
    w.n.fx.unread.insert(SockId(0), (64 << 10) + 1);
    w.n.fx.unread.insert(SockId(100), 1 << 20);
    w.reply(|sent| answer(sent, 1, 60, 7));
    assert_eq!(w.n.fx.streams_closed, [(SockId(0), Close::Reset)]);
}

#[test]
fn connections_are_bounded_and_the_greediest_guest_loses_its_idlest() {
    let mut w = world(|l| l.dns_connections = 4);
    for n in 0..4 {
        w.stream(A, n, &known(1), false);
        w.n.now = w.n.now.plus_ms(1);
    }
    w.stream(A, 0, &known(1), false);
    w.stream(A, 4, &known(1), false);
    assert_eq!((&w.n.fx.streams_closed[..], w.holds().3), (&[(SockId(1), Close::Reset)][..], 4));
    // Another guest takes one from the first, and the first none from it.
    w.stream(B, 10, &known(1), false);
    for n in 20..40 {
        w.stream(A, n, &known(1), false);
    }
    assert!(!w.n.fx.streams_closed.contains(&(SockId(10), Close::Reset)));
    assert_eq!(w.holds().3, 4);
}

#[test]
fn queries_of_a_connection_that_has_ended_still_count() {
    let mut w = world(|l| l.dns_queries_per_port = 8);
    for n in 0..10u16 {
        let queries: Vec<u8> = (0..5).flat_map(|i| far(n * 10 + i)).collect();
        w.stream(A, u32::from(n), &[queries, framed(b"x")].concat(), false);
    }
    assert_eq!(w.holds().2, 8);
    let (_, got) = w.stream(B, 50, &far(999), false);
    assert_eq!((got.len(), w.holds().2), (0, 9), "others ask");
    w.pass(2000);
    assert_eq!(rcode(&w.stream_got(50)[0]), SERVFAIL);
    assert!(w.stream(A, 51, &far(998), false).1.is_empty(), "and the guest again");
}

#[test]
fn a_guest_that_asks_the_authority_too_much_is_read_later() {
    let mut w = world(|l| (l.service_datagrams_per_second, l.dns_queries_per_port) = (10, 1000));
    w.pass(2000);
    w.confirm();
    let asked = |n: u16| framed(&query(n, &format!("n{n}.own.example"), &[]));
    let all: Vec<u8> = (0..30).flat_map(asked).collect();
    let (mut at, _) = w.stream(A, 1, &all, false);
    assert_eq!(w.holds().2, 10);
    // It is not dropped, and takes nothing from another guest.
    assert_eq!(w.stream(B, 2, &asked(99), false).0, asked(99).len());
    let begin = w.n.now;
    while at < all.len() {
        w.n.fx.streams_resumed.clear();
        w.pass(20);
        w.confirm();
        if w.n.fx.streams_resumed.contains(&SockId(1)) {
            at += w.stream(A, 1, &all[at..], false).0;
        }
    }
    let ms = (w.n.now.0 - begin.0) / 1_000_000;
    assert!((1900..2200).contains(&ms), "{ms}");
}

#[test]
fn a_connection_that_is_gone_gets_nothing_and_its_number_is_used_again() {
    let mut w = world(|_| {});
    w.stream(A, 1, &far(1), false);
    w.n.core.stream_gone(SockId(1));
    w.stream(B, 1, &known(2), false);
    assert_eq!(ids(&w.stream_got(1)), Vec::<u16>::new());
    w.reply(|sent| answer(sent, 1, 60, 7));
    assert_eq!(w.stream_got(1), Vec::<Vec<u8>>::new());
    let (gone, data) = (PortId(77), known(1));
    let n = w.n.core.stream_received(w.n.now, gone, SockId(5), &data, false, &mut w.n.fx);
    assert_eq!(n, data.len(), "a guest that is gone");
    w.n.core.remove_port(w.n.now, B, &mut w.n.fx);
    w.n.core.audit().unwrap();
    assert_eq!(w.holds().3, 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_read_or_left_within_bounds(
        bytes in proptest::collection::vec(any::<u8>(), 0..300),
        good in 0usize..4,
        ended in any::<bool>(),
    ) {
        let mut w = world(|_| {});
        let data = [known(1).repeat(good), bytes].concat();
        let (n, got) = w.stream(A, 1, &data, ended);
        prop_assert!(n <= data.len() && got.len() >= good);
        // What is left begins with a message that is not whole.
        let rest = &data[n..];
        prop_assert!(rest.len() < 2 || rest.len() < 2 + usize::from(u16::from_be_bytes([rest[0], rest[1]])));
        w.pass(30_000);
        prop_assert_eq!((w.holds().2, w.holds().3), (0, 0));
    }
}
