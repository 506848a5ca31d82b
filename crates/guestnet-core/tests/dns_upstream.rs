//! Theory of operation: how name servers are asked: failover, time-outs, truncation and TCP, EDNS, and what is believed.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod dns_support;
#[path = "common/net.rs"]
mod net;

use dns_support::*;
use guestnet_core::config::DatagramError;
use guestnet_core::effects::{Event, SockError};
use guestnet_core::stats::DropReason;
use guestnet_core::types::{FlowId, PortId};
use guestnet_wire::dns::Query;
use proptest::prelude::*;

const NAME: &str = "www.far.example";

fn ask() -> Vec<u8> {
    query(7, NAME, &[])
}

/// The reports about name servers.
fn reports(w: &World) -> Vec<(String, Option<&'static str>)> {
    let told = |e: &Event| match e {
        Event::NameServer { server, trouble } => Some((server.to_string(), *trouble)),
        _ => None,
    };
    w.n.fx.events.iter().filter_map(told).collect()
}

fn refused(w: &mut World) {
    let ((flow, sent), dst) = (w.sent(), w.sent_to());
    let e = DatagramError {
        kind: SockError::Refused,
        offender: None,
        icmp_type: 3,
        icmp_code: 3,
        mtu: 0,
        dst,
        seq: 0,
        payload: &sent,
    };
    w.n.core.sock_error(w.n.now, flow, e, &mut w.n.fx);
    w.n.core.audit().unwrap();
}

#[test]
fn a_query_is_forwarded_without_what_is_between_neighbours() {
    let mut w = World::new();
    let cookie = [&[0, 0, 41, 16, 0, 0, 0, 0, 0, 0, 12, 0, 10, 0, 8][..], &[1; 8]].concat();
    let mut q = query(7, "wWw.far.example", &cookie);
    q[3] = 0x20;
    assert!(!w.goes_up(A, &q));
    let (_, sent) = w.sent();
    // The client's spelling and its RD; an identifier of our own, AD, and EDNS.
    assert_eq!(&sent[2..12], &[1, 0x20, 0, 1, 0, 0, 0, 0, 0, 1]);
    assert_eq!(&sent[12..], [&q[12..question_end(&q)], EDNS].concat());
    let got = w.reply(|sent| answer(sent, 1, 60, 7)).remove(0).1;
    assert_eq!(&got[12..question_end(&got)], &q[12..question_end(&q)]);
    // DNSSEC is asked for when the client wants it, and told to those who asked.
    let mut dnssec = query(8, NAME, EDNS);
    let at = dnssec.len() - 4;
    dnssec[at] = 0x80;
    let verified = |sent: &[u8]| {
        let mut a = answer(sent, 1, 60, 7);
        a[3] |= 0x20;
        a
    };
    assert_eq!(w.resolve(A, &dnssec, verified)[3] & 0x20, 0x20);
    let (_, sent) = w.sent();
    assert!(Query::parse(&sent).unwrap().wants_dnssec());
    assert_eq!(w.resolve(A, &query(9, "two.far.example", EDNS), verified)[3] & 0x20, 0);
}

#[test]
fn duplicate_queries_are_coalesced() {
    let mut w = World::new();
    let (q, edns) = (ask(), query(8, "www.FAR.example", EDNS));
    assert!(!w.goes_up(A, &q) && !w.goes_up(B, &edns));
    assert_eq!((w.n.fx.datagrams.len(), w.holds().2), (1, 1));
    let heard = w.reply(|sent| answer(sent, 1, 60, 7));
    let mut with = answer(&edns, 1, 60, 7);
    with.extend_from_slice(EDNS);
    with[11] = 1;
    assert_eq!(heard, [(A, answer(&q, 1, 60, 7)), (B, with)]);
    assert_eq!(w.counts(), (0, 2, 2));
    // A second response is one to nothing.
    let before = w.n.drops(DropReason::Filtered);
    assert_eq!(w.reply(|sent| answer(sent, 1, 60, 9)), []);
    assert_eq!(w.n.drops(DropReason::Filtered), before + 1);
    // One client asks no more than once by repeating itself, and not without end.
    let again = query(7, "again.far.example", &[]);
    assert!((0..64).all(|_| !w.goes_up(A, &again)));
    assert_eq!(rcode(&w.ask(A, &again).unwrap()), REFUSED);
    assert_eq!((w.n.fx.datagrams.len(), w.holds().2), (2, 1));
}

#[test]
fn only_a_response_to_the_query_is_believed() {
    let mut w = World::with(&[SERVER, SECOND], |_| {});
    assert!(!w.goes_up(A, &ask()));
    let (flow, sent) = w.sent();
    let good = answer(&sent, 1, 60, 7);
    let with = |at: usize, bit: u8| {
        let mut b = good.clone();
        b[at] ^= bit;
        b
    };
    let kind = question_end(&sent) - 3;
    let mut cut = good.clone();
    cut.pop();
    let name = answer(&query(u16::from_be_bytes([sent[0], sent[1]]), "ww2.far.example", &[]), 1, 60, 7);
    let mut no_question = code(&sent, 0)[..12].to_vec();
    no_question[5] = 0;
    for wrong in [
        &with(1, 1),
        &with(2, 0x80),
        &with(2, 8),
        &with(kind, 28),
        &cut,
        &name,
        &sent,
        &good[..11].to_vec(),
        &no_question,
        &vec![],
    ] {
        assert_eq!(w.hear(flow, SERVER, wrong), [], "{wrong:?}");
    }
    assert_eq!(w.n.drops(DropReason::Filtered), 10);
    assert_eq!(w.hear(flow, "203.0.113.53:54", &good), [], "another port");
    assert_eq!(w.hear(flow, SECOND, &good), [], "a server that was not asked");
    let stale = FlowId { generation: flow.generation + 1, ..flow };
    assert_eq!(w.hear(stale, SERVER, &good), [], "another socket");
    assert_eq!(w.hear(flow, SERVER, &good), [(A, answer(&ask(), 1, 60, 7))]);
}

#[test]
fn guessing_moves_the_query_to_another_socket_and_server() {
    let mut w = World::with(&[SERVER, SECOND], |_| {});
    assert!(!w.goes_up(A, &ask()));
    let (flow, sent) = w.sent();
    for n in 0..64u16 {
        let mut guess = answer(&sent, 1, 60, 66);
        let id = u16::from_be_bytes([sent[0], sent[1]]).wrapping_add(n + 1);
        guess[..2].copy_from_slice(&id.to_be_bytes());
        assert_eq!(w.hear(flow, SERVER, &guess), []);
    }
    assert_eq!(reports(&w), [(SERVER.into(), Some("too many answers to other questions"))]);
    assert_ne!(w.sent().0, flow);
    assert_eq!(w.sent_to(), addr(SECOND));
    assert_eq!(w.hear(flow, SERVER, &answer(&sent, 1, 60, 66)), [], "too late");
    assert_eq!(w.reply(|sent| answer(sent, 1, 60, 7)), [(A, answer(&ask(), 1, 60, 7))]);
    // A lone server is given up.
    let mut w = World::new();
    assert!(!w.goes_up(A, &ask()));
    let flow = w.sent().0;
    let mut got = Vec::new();
    for _ in 0..64 {
        got.extend(w.hear(flow, SERVER, &[0; 22]));
    }
    assert_eq!(got.iter().map(|g| rcode(&g.1)).collect::<Vec<_>>(), [SERVFAIL]);
    assert_eq!(w.n.fx.closed.len(), 1);
}

#[test]
fn identifiers_are_in_no_order_and_sockets_are_changed() {
    let mut w = World::with(&[SERVER], |l| l.dns_queries_per_port = 1000);
    let mut ids = Vec::new();
    for n in 0..300 {
        assert!(!w.goes_up(A, &query(7, &format!("n{n}.far.example"), &[])));
        ids.push(u16::from_be_bytes([w.sent().1[0], w.sent().1[1]]));
    }
    let steps = ids.windows(2).filter(|p| p[1].wrapping_sub(p[0]) < 1000).count();
    assert!(steps < 30, "{ids:?}");
    assert_eq!(w.n.fx.opened.len(), 3, "128 queries each");
    w.pass(2000);
    w.pass(8000);
    assert!(!w.goes_up(A, &query(7, "later.far.example", &[])) || w.n.fx.opened.len() == 3);
    w.confirm();
    w.n.fx.events.clear();
    assert!(!w.goes_up(B, &query(7, "last.far.example", &[])));
    assert_eq!(w.n.fx.opened.len(), 4, "after ten seconds");
}

#[test]
fn a_silent_server_is_passed_over_and_then_tried_last() {
    let mut w = World::with(&[SERVER, SECOND], |_| {});
    assert!(!w.goes_up(A, &ask()));
    assert_eq!(w.sent_to(), addr(SERVER));
    assert_eq!(w.pass(1999), []);
    assert_eq!(w.sent_to(), addr(SERVER));
    w.pass(1);
    assert_eq!(w.sent_to(), addr(SECOND));
    assert_eq!(w.reply(|sent| answer(sent, 1, 60, 7)).len(), 1);
    assert_eq!(reports(&w), [(SERVER.into(), Some("no answer in time"))]);
    // It is asked last for half a minute.
    for n in 0..3 {
        w.confirm();
        w.resolve(A, &query(7, &format!("n{n}.far.example"), &[]), |sent| code(sent, NXDOMAIN));
        assert_eq!(w.sent_to(), addr(SECOND));
        w.pass(9000);
    }
    w.pass(3001);
    w.confirm();
    w.resolve(A, &query(7, "first.far.example", &[]), |sent| code(sent, NXDOMAIN));
    assert_eq!(w.sent_to(), addr(SERVER));
    assert_eq!(reports(&w).last().unwrap(), &(SERVER.into(), None), "it responds again");
}

#[test]
fn a_query_whose_servers_are_all_silent_fails_and_says_so() {
    let mut w = World::with(&[SERVER, SECOND], |_| {});
    w.servers.attempts = 2;
    w.confirm();
    assert!(!w.goes_up(A, &query(7, NAME, EDNS)));
    let mut asked = vec![w.sent_to()];
    for _ in 0..3 {
        assert_eq!(w.pass(2000), []);
        asked.push(w.sent_to());
    }
    assert_eq!(asked, [SERVER, SECOND, SERVER, SECOND].map(addr));
    let got = w.pass(2000).remove(0).1;
    assert_eq!((rcode(&got), &why(&got)[..]), (SERVFAIL, "no name server of the host answers"));
    assert_eq!(w.n.core.counters().dns_unanswered, 1);
    assert_eq!(reports(&w).len(), 2, "each is reported once");
    assert_eq!(w.holds().2, 0);
}

#[test]
fn all_tries_together_have_an_end() {
    let mut w = World::new();
    (w.servers.timeout_ms, w.servers.attempts) = (5000, 5);
    w.confirm();
    assert!(!w.goes_up(A, &ask()));
    assert_eq!(w.pass(11_999), []);
    assert_eq!(rcode(&w.pass(1).remove(0).1), SERVFAIL);
    assert_eq!(w.n.fx.datagrams.len(), 3);
}

#[test]
fn a_server_that_fails_is_passed_over_and_its_word_is_the_last_resort() {
    let mut w = World::with(&[SERVER, SECOND], |_| {});
    w.servers.attempts = 2;
    w.confirm();
    for bad in [SERVFAIL, REFUSED] {
        let q = query(7, &format!("n{bad}.far.example"), &[]);
        assert!(!w.goes_up(A, &q));
        assert_eq!(w.reply(|sent| code(sent, bad)), []);
        assert_eq!(w.sent_to(), addr(SECOND));
        assert_eq!(w.reply(|sent| answer(sent, 1, 60, 7)).len(), 1);
        // Both fail: the first word counts, and nobody is asked twice.
        let q = query(7, &format!("m{bad}.far.example"), &[]);
        assert!(!w.goes_up(A, &q));
        w.reply(|sent| code(sent, bad));
        let before = w.n.fx.datagrams.len();
        assert_eq!(rcode(&w.reply(|sent| code(sent, 5)).remove(0).1), bad);
        assert_eq!(w.n.fx.datagrams.len(), before);
        // It is not cached.
        assert!(!w.goes_up(A, &q));
        w.reply(|sent| answer(sent, 1, 60, 7));
    }
    assert_eq!(reports(&w), [], "they respond");
}

#[test]
fn an_error_passes_a_server_over_at_once() {
    let mut w = World::with(&[SERVER, SECOND], |_| {});
    assert!(!w.goes_up(A, &ask()));
    refused(&mut w);
    assert_eq!(w.sent_to(), addr(SECOND));
    assert_eq!(reports(&w), [(SERVER.into(), Some("connection refused"))]);
    assert_eq!(w.reply(|sent| answer(sent, 1, 60, 7)).len(), 1);
    // An error of another query, or one that says nothing, changes nothing.
    let (flow, sent) = w.sent();
    for payload in [&sent[..], &[]] {
        let e = DatagramError {
            kind: SockError::Refused,
            offender: None,
            icmp_type: 3,
            icmp_code: 3,
            mtu: 0,
            dst: addr(SECOND),
            seq: 0,
            payload,
        };
        w.n.core.sock_error(w.n.now, flow, e, &mut w.n.fx);
    }
    w.n.core.audit().unwrap();
    // Where the host has no socket, or refuses to send.
    w.n.pass_ms(10_500);
    w.confirm();
    w.n.fx.open_error = Some(SockError::Exhausted);
    assert!(!w.goes_up(A, &query(7, "two.far.example", &[])));
    w.n.fx.datagram_error = Some(SockError::NetUnreachable);
    assert!(!w.goes_up(A, &query(7, "three.far.example", &[])));
    w.n.core.audit().unwrap();
    assert_eq!(w.holds().2, 2, "the other server was asked");
}

#[test]
fn rotation_begins_each_query_with_another_server() {
    let mut w = World::with(&[SERVER, SECOND], |_| {});
    w.servers.rotate = true;
    w.confirm();
    let mut asked = Vec::new();
    for n in 0..4 {
        w.resolve(A, &query(7, &format!("n{n}.far.example"), &[]), |sent| code(sent, NXDOMAIN));
        asked.push(w.sent_to());
    }
    assert_eq!(asked, [SERVER, SECOND, SERVER, SECOND].map(addr));
}

#[test]
fn a_server_that_does_not_know_edns_is_asked_without() {
    for (bad, bare) in [(1, true), (4, false), (1, false)] {
        let mut w = World::new();
        assert!(!w.goes_up(A, &ask()));
        let refuse = |sent: &[u8]| {
            let mut a = code(sent, bad);
            if bare {
                a[5] = 0;
                a.truncate(12);
            }
            a
        };
        assert_eq!(w.reply(refuse), []);
        assert_eq!(Query::parse(&w.sent().1).unwrap().edns, None);
        assert_eq!(w.reply(|sent| answer(sent, 1, 60, 7)).len(), 1);
        // That is remembered.
        w.resolve(A, &query(7, "two.far.example", &[]), |sent| {
            assert_eq!(Query::parse(sent).unwrap().edns, None);
            answer(sent, 1, 60, 7)
        });
        // Without EDNS it is its word.
        assert_eq!(rcode(&w.resolve(A, &query(7, "three.far.example", &[]), refuse)), bad);
    }
}

#[test]
fn a_client_on_udp_gets_a_truncated_answer_and_the_whole_on_tcp() {
    let mut w = World::new();
    let cut = w.resolve(A, &ask(), truncated);
    assert_eq!((cut[2] & 2, cut[7]), (2, 0));
    assert_eq!(w.n.fx.connects, [], "what does not fit is not fetched before it is wanted");
    let (_, got) = w.stream(A, 9, &framed(&ask()), false);
    assert_eq!(got, Vec::<Vec<u8>>::new());
    assert_eq!(w.reply(truncated), []);
    let (flow, sock, sent) = w.connect();
    assert_eq!(sent[12..question_end(&sent)], ask()[12..]);
    // In pieces, and with more behind it.
    let whole = framed(&answer(&sent, 200, 60, 7));
    w.hear_tcp(flow, sock, &whole[..1], false);
    w.hear_tcp(flow, sock, &whole[1..100], false);
    assert_eq!(w.stream_got(9), Vec::<Vec<u8>>::new());
    w.hear_tcp(flow, sock, &[&whole[100..], b"more"].concat(), false);
    let got = w.stream_got(9).remove(0);
    assert_eq!((got[2] & 2, got[7], got.len()), (0, 200, ask().len() + 200 * 16));
    assert_eq!(w.n.fx.closed.last().unwrap().0, sock);
    // It is cached, for clients on UDP too.
    assert_eq!(w.ask(A, &ask()).unwrap()[2] & 2, 2);
    assert_eq!(w.counts().0, 1);
}

#[test]
fn a_server_that_truncates_and_has_no_tcp_is_asked_for_a_larger_datagram() {
    let fail: [fn(&mut World); 5] = [
        |w| {
            let (flow, _) = *w.n.fx.connects.last().unwrap();
            w.n.core.tcp_connected(w.n.now, flow, Err(SockError::Refused), &mut w.n.fx);
        },
        |w| _ = w.pass(1000),
        |w| {
            let (flow, sock, _) = w.connect();
            w.hear_tcp(flow, sock, &[], true);
        },
        |w| {
            let (flow, sock, sent) = w.connect();
            w.hear_tcp(flow, sock, &framed(&truncated(&sent)), false);
        },
        |w| {
            let (flow, sock, _) = w.connect();
            w.hear_tcp(flow, sock, &framed(&[0xff; 30]), false);
        },
    ];
    for (i, fail) in fail.into_iter().enumerate() {
        let mut w = World::new();
        w.stream(A, 9, &framed(&ask()), false);
        w.reply(truncated);
        fail(&mut w);
        w.n.core.audit().unwrap();
        assert_eq!(Query::parse(&w.sent().1).unwrap().edns.unwrap().size, 4096, "{i}");
        w.reply(|sent| answer(sent, 100, 60, 7));
        assert_eq!(w.stream_got(9).remove(0)[7], 100, "{i}");
        // If that is truncated too, there is nothing left.
        w.confirm();
        w.stream(A, 9, &framed(&query(8, "two.far.example", EDNS)), false);
        w.reply(truncated);
        fail(&mut w);
        w.reply(truncated);
        assert_eq!(rcode(&w.stream_got(9).remove(0)), SERVFAIL, "{i}");
        assert_eq!(w.holds().2, 0);
        w.pass(11_000);
        w.n.core.stream_gone(guestnet_core::types::SockId(9));
        assert_eq!(w.n.fx.closed.len(), w.n.fx.opened.len() + w.n.fx.connects.len());
    }
}

#[test]
fn servers_that_are_asked_over_tcp_alone() {
    let mut w = World::with(&[SERVER, SECOND], |_| {});
    w.servers.use_tcp = true;
    w.confirm();
    assert!(!w.goes_up(A, &ask()));
    let (flow, sock, sent) = w.connect();
    let got = w.hear_tcp(flow, sock, &framed(&answer(&sent, 1, 60, 7)), false);
    assert_eq!(got, [(A, answer(&ask(), 1, 60, 7))]);
    // One that does not accept is passed over.
    assert!(!w.goes_up(A, &query(7, "two.far.example", &[])));
    let (flow, _) = *w.n.fx.connects.last().unwrap();
    w.n.core.tcp_connected(w.n.now, flow, Err(SockError::Refused), &mut w.n.fx);
    let (flow, sock, sent) = w.connect();
    assert_eq!(w.hear_tcp(flow, sock, &framed(&answer(&sent, 1, 60, 7)), false).len(), 1);
    assert_eq!((w.n.fx.datagrams.len(), w.n.fx.connects.len()), (0, 3));
}

#[test]
fn connections_to_name_servers_are_bounded() {
    let mut w = World::with(&[SERVER], |l| l.dns_queries_per_port = 1000);
    w.servers.use_tcp = true;
    w.confirm();
    let asked = (0..100u16).filter(|n| w.ask(A, &query(*n, &format!("n{n}.far.example"), &[])).is_none());
    assert_eq!(asked.count(), 64);
    assert_eq!(w.n.fx.connects.len(), 64);
    w.pass(12_000);
    assert_eq!((w.holds().2, w.n.fx.closed.len()), (0, 64));
}

#[test]
fn a_guest_that_leaves_takes_no_answer_from_others() {
    let mut w = World::new();
    assert!(!w.goes_up(A, &ask()) && !w.goes_up(B, &ask()));
    w.n.core.remove_port(w.n.now, A, &mut w.n.fx);
    w.n.core.audit().unwrap();
    assert_eq!(w.reply(|sent| answer(sent, 1, 60, 7)), [(B, answer(&ask(), 1, 60, 7))]);
    // Nor does one that was alone leave anything behind.
    assert!(!w.goes_up(B, &query(7, "two.far.example", &[])));
    w.n.core.remove_port(w.n.now, B, &mut w.n.fx);
    assert_eq!(w.reply(|sent| answer(sent, 1, 60, 7)), []);
    assert_eq!(w.holds(), (0, 0, 0, 0));
}

#[test]
fn extended_errors_of_a_server_are_passed_on() {
    let mut w = World::new();
    let got = w.resolve(A, &query(7, NAME, EDNS), |sent| {
        let mut a = code(sent, SERVFAIL);
        a[11] = 1;
        a.extend_from_slice(&[0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 11, 0, 15, 0, 7, 0, 6]);
        a.extend_from_slice(b"bogus");
        a
    });
    assert_eq!((rcode(&got), &why(&got)[..]), (SERVFAIL, "bogus"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_server_says_each_client_gets_its_own_answer(
        edits in proptest::collection::vec((any::<u16>(), any::<u8>()), 0..6),
        records in 0u8..5,
        cut in 0usize..30,
        segment in prop_oneof![Just(0u16), 1u16..200],
        alias in any::<bool>(),
        tcp in any::<bool>(),
    ) {
        let mut w = World::new();
        if alias {
            let target = Some(labels(NAME).into());
            let answers = vec![record("my.own.example", 5, &labels(NAME))];
            let verdict = guestnet_core::DnsVerdict::Own {
                rcode: 0, answers, authority: Vec::new(), searched: None, target,
            };
            let ticket = w.ticket(A, &query(7, "my.own.example", EDNS)).unwrap();
            w.verdict(ticket, verdict);
        }
        if tcp {
            w.stream(B, 9, &framed(&query(7, NAME, EDNS)), false);
        } else {
            assert!(!w.goes_up(B, &query(7, NAME, EDNS)));
        }
        for _ in 0..2 {
            let (flow, sent) = w.sent();
            let mut a = answer(&sent, records, 60, 7);
            for (at, byte) in &edits {
                let at = usize::from(*at) % a.len();
                a[at] = *byte;
            }
            a.truncate(a.len() - cut.min(a.len()));
            w.n.fx.frames.clear();
            w.n.core.udp_received(w.n.now, flow, addr(SERVER), &a, segment, &mut w.n.fx);
            for (port, got) in w.taken() {
                prop_assert_eq!(&got[..2], &[0, 7]);
                let name = if port == PortId(1) { "my.own.example" } else { NAME };
                prop_assert!(got[12..].starts_with(&labels(name)));
            }
            w.n.core.audit().unwrap();
        }
        w.pass(30_000);
        prop_assert_eq!(w.holds().2, 0);
        w.n.core.stream_gone(guestnet_core::types::SockId(9));
        prop_assert_eq!(w.n.core.next_timer(), None);
    }

    #[test]
    fn whatever_comes_on_a_connection_is_an_answer_or_none(
        bytes in proptest::collection::vec(any::<u8>(), 0..60),
        good in any::<bool>(),
        eof in any::<bool>(),
    ) {
        let mut w = World::new();
        w.servers.use_tcp = true;
        w.confirm();
        assert!(!w.goes_up(A, &ask()));
        let (flow, sock, sent) = w.connect();
        let prefix = if good { framed(&answer(&sent, 1, 60, 7)) } else { Vec::new() };
        let got = w.hear_tcp(flow, sock, &[&prefix[..], &bytes].concat(), eof);
        prop_assert_eq!(got.iter().filter(|g| rcode(&g.1) == 0).count(), usize::from(good));
        w.pass(20_000);
        prop_assert_eq!(w.holds().2, 0);
    }
}
