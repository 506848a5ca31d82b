//! Theory of operation: queries of guests: what is refused, cached, asked of the authority, and said of temporary
//! failures. Name servers are in `dns_upstream.rs`, connections of guests in `dns_streams.rs`.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod dns_support;
#[path = "common/net.rs"]
mod net;

use dns_support::*;
use guestnet_core::DnsVerdict;
use guestnet_core::stats::DropReason;
use guestnet_core::types::PortId;
use proptest::prelude::*;

#[test]
fn a_cached_answer_is_sent_until_it_expires() {
    let mut w = World::new();
    let q = query(7, "www.own.example", &[]);
    let first = w.own(A, &q, own("www.own.example", 7));
    assert_eq!((&first[..4], ttl(&first)), (&[0, 7, 0x85, 0x80][..], 60));
    assert_eq!(w.ask(A, &q).unwrap(), first);
    // Another guest, another number, another spelling; the response repeats both.
    let other = query(0xbeef, "wWw.OWN.exAMPle", &[]);
    w.pass(42_999);
    let got = w.ask(B, &other).unwrap();
    assert_eq!((&got[..2], &got[12..29], ttl(&got)), (&other[..2], &other[12..29], 18));
    w.pass(17_000);
    assert_eq!(ttl(&w.ask(B, &other).unwrap()), 1);
    w.pass(1);
    assert!(w.goes_up(B, &other));
    assert_eq!(w.counts(), (3, 2, 0));
}

#[test]
fn a_response_fits_what_the_client_takes() {
    let mut w = World::new();
    let plain = query(7, "www.own.example", &[]);
    let answers = (0..40).map(|n| record("www.own.example", 1, &[192, 0, 2, n])).collect();
    let many = DnsVerdict::Own { rcode: 0, answers, authority: Vec::new(), searched: None, target: None };
    // 40 addresses are more than 512 bytes, and less than 1232.
    for cut in [w.own(A, &plain, many), w.ask(A, &plain).unwrap()] {
        assert_eq!((cut.len(), cut[2] & 2, &cut[6..12]), (plain.len(), 2, &[0; 6][..]));
    }
    let edns = query(8, "www.own.example", EDNS);
    let got = w.ask(A, &edns).unwrap();
    assert_eq!((got[2] & 2, got[7], got[11]), (0, 40, 1));
    assert_eq!(&got[got.len() - 11..], EDNS);
    // DNSSEC records, or unverified ones, are another question.
    let mut dnssec = edns.clone();
    let at = dnssec.len() - 4;
    dnssec[at] = 0x80;
    assert!(w.goes_up(A, &dnssec));
    let mut unchecked = edns.clone();
    unchecked[3] |= 0x10;
    assert!(w.goes_up(A, &unchecked));
    let mut kind = plain.clone();
    let at = kind.len() - 3;
    kind[at] = 28;
    assert!(w.goes_up(A, &kind));
    // Options of EDNS are skipped.
    let cookie = [&[0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 12, 0, 10, 0, 8][..], &[1; 8]].concat();
    assert_eq!(w.ask(A, &query(9, "www.own.example", &cookie)).unwrap()[7], 40);
}

#[test]
fn what_no_server_should_answer_is_refused_here() {
    let mut w = World::new();
    let q = query(7, "www.far.example", EDNS);
    let mut refused = |at: usize, byte: u8| {
        let mut b = q.clone();
        b[at] = byte;
        w.ask(A, &b)
    };
    let end = q.len() - EDNS.len();
    assert_eq!(rcode(&refused(2, 0x10).unwrap()), 4, "another kind of query");
    assert_eq!(rcode(&refused(5, 2).unwrap()), 1, "two questions");
    assert_eq!(rcode(&refused(end - 1, 3).unwrap()), REFUSED, "another class");
    for kind in [251, 252, 128, 250] {
        assert_eq!(rcode(&refused(end - 3, kind).unwrap()), REFUSED, "no data: {kind}");
    }
    for kind in [0, 41] {
        assert_eq!(rcode(&refused(end - 3, kind).unwrap()), 1, "type {kind}");
    }
    let version = refused(end + 6, 1).unwrap();
    assert_eq!((rcode(&version), version[version.len() - 6]), (0, 1), "BADVERS");
    assert_eq!(refused(2, 0x81), None, "a response gets no response");
    assert_eq!(w.ask(A, &q[..11]), None);
    assert_eq!((w.n.drops(DropReason::Malformed), w.n.drops(DropReason::Truncated)), (1, 1));
    assert_eq!((w.n.fx.datagrams.len(), w.n.fx.events.len()), (0, 0));
    assert_eq!(w.counts(), (0, 12, 0));
}

#[test]
fn what_was_cached_before_a_change_is_not_sent_after_it() {
    let mut w = World::new();
    let (q, far) = (query(7, "www.own.example", &[]), query(7, "www.far.example", &[]));
    w.own(A, &q, own("www.own.example", 7));
    w.resolve(A, &far, |sent| answer(sent, 1, 600, 7));
    assert!(w.ask(A, &q).is_some() && w.ask(A, &far).is_some());
    // A guest arrived: answers about guests may change.
    w.generation += 1;
    w.n.core.forget_guest_names(w.generation);
    assert!(w.ask(A, &far).is_some());
    // A verdict from before the change is sent, and not kept.
    let ticket = w.ticket(A, &q).unwrap();
    w.change();
    w.generation -= 1;
    assert_eq!(w.verdict(ticket, own("www.own.example", 7)).len(), 1);
    w.generation += 1;
    let got = w.own(A, &q, own("www.own.example", 8));
    assert_eq!(got[got.len() - 1], 8);
    assert_eq!(w.ask(A, &q).unwrap(), got);
    // Other records: nothing holds any more, since a name of others may be an own one now.
    w.change();
    assert!(w.goes_up(A, &q) && !w.goes_up(A, &far));
    assert_eq!(w.holds().0, 0);
    // News that were overtaken.
    w.n.core.set_dns_zones(DNS, 1, Vec::new());
    assert!(w.goes_up(B, &query(1, "other.own.example", &[])));
    // What a guest's queries brought goes with it.
    let ticket = w.ticket(B, &query(1, "third.own.example", &[])).unwrap();
    w.verdict(ticket, own("third.own.example", 7));
    assert_eq!(w.holds().0, 1);
    for port in [A, B] {
        w.n.core.remove_port(w.n.now, port, &mut w.n.fx);
    }
    w.n.core.audit().unwrap();
    assert_eq!(w.holds().0, 0);
}

#[test]
fn names_that_may_be_own_are_asked_of_the_authority_and_all_others_are_not() {
    let mut w = World::new();
    for name in
        ["guests.test", "vm1.Guests.test", "own.example", "x.y.own.EXAMPLE", "vm1", "", &"a.".repeat(17)]
    {
        assert!(w.goes_up(A, &query(1, name, &[])), "{name}");
    }
    assert_eq!(w.n.fx.datagrams.len(), 0);
    assert!(!w.goes_up(A, &query(1, "www.far.example", &[])));
    assert_eq!(w.n.fx.datagrams.len(), 1);
    // A bare name that no guest has is somebody else's, and forgotten when guests change.
    let bare = query(2, "vm2", &[]);
    let ticket = w.ticket(B, &bare).unwrap();
    assert_eq!(w.verdict(ticket, DnsVerdict::Forward), []);
    assert_eq!(w.reply(|sent| answer(sent, 1, 60, 9)).len(), 1);
    assert!(w.ask(A, &bare).is_some());
    w.n.core.forget_guest_names(w.generation);
    assert!(w.goes_up(A, &bare));
}

#[test]
fn duplicate_questions_to_the_authority_are_coalesced() {
    let mut w = World::new();
    let q = query(7, "www.own.example", &[]);
    let ticket = w.ticket(A, &q).unwrap();
    assert_eq!(w.ticket(B, &query(8, "WWW.own.example", EDNS)), None);
    let got = w.verdict(ticket, own("www.own.example", 7));
    assert_eq!(got.iter().map(|g| (g.0, g.1[1])).collect::<Vec<_>>(), [(A, 7), (B, 8)]);
    assert_eq!(&got[1].1[12..16], b"\x03WWW");
    // A second verdict, or one on nothing, changes nothing.
    assert_eq!(w.verdict(ticket, own("www.own.example", 9)), []);
    assert_eq!(w.verdict(ticket + 1, own("www.own.example", 9)), []);
    assert_eq!(w.counts(), (0, 2, 0));
}

#[test]
fn an_alias_to_a_name_of_others_is_followed_there() {
    let mut w = World::new();
    let q = query(7, "my.own.example", EDNS);
    let alias = || DnsVerdict::Own {
        rcode: 0,
        answers: vec![record("my.own.example", 5, &labels("www.far.example"))],
        authority: Vec::new(),
        searched: None,
        target: Some(labels("www.far.example").into()),
    };
    let ticket = w.ticket(A, &q).unwrap();
    assert_eq!(w.verdict(ticket, alias()), []);
    let (_, sent) = w.sent();
    assert_eq!(sent[12..question_end(&sent) - 4], labels("www.far.example"));
    let got = w.reply(|sent| answer(sent, 2, 60, 7)).remove(0).1;
    assert_eq!((got[1], got[7], got[2] & 4), (7, 3, 0));
    assert_eq!(got[12..question_end(&got) - 4], labels("my.own.example"));
    // The target is known now, by both names.
    assert!(w.ask(B, &query(1, "www.far.example", &[])).is_some());
    let again = w.own(B, &q, alias());
    assert_eq!(again, got);
    // Where nobody answers for it, that is a failure.
    w.servers.servers.clear();
    w.confirm();
    let failed = w.own(A, &q, alias());
    assert_eq!((rcode(&failed), &why(&failed)[..]), (SERVFAIL, "no name server is configured on the host"));
}

#[test]
fn the_control_side_looks_for_name_servers_once_a_second_and_not_in_vain() {
    let mut w = World::new();
    let known = query(7, "www.known.example", &[]);
    let got = w.resolve(A, &known, |sent| answer(sent, 1, 600, 7));
    assert_eq!(w.ask(A, &known), Some(got));
    w.pass(1000);
    // One query waits for the control side, and others do not wait for it.
    let ticket = w.ticket(A, &known).unwrap();
    assert!(w.ask(A, &query(8, "www.known.example", &[])).is_some());
    assert!(!w.goes_up(B, &query(7, "www.far.example", &[])));
    assert_eq!(w.verdict(ticket, DnsVerdict::Forward).len(), 1);
    assert_eq!(w.n.fx.datagrams.len(), 2, "the cached response");
    // After five seconds without a word all queries wait, a second at most.
    w.pass(5000);
    assert!(w.goes_up(A, &known) && w.goes_up(B, &query(7, "www.near.example", &[])));
    let sent = w.n.fx.datagrams.len();
    let got = w.pass(1000);
    assert_eq!(got.len(), 1, "{got:?}");
    assert_eq!(w.n.fx.datagrams.len(), sent + 1);
    // Then what was known is used for a while, and one looks again.
    assert!(w.ask(A, &known).is_some());
    w.pass(1000);
    assert!(w.goes_up(A, &known) && w.ask(B, &query(9, "www.known.example", &[])).is_some());
}

#[test]
fn an_own_name_that_the_authority_does_not_answer_for_is_a_failure() {
    let mut w = World::new();
    assert!(w.goes_up(A, &query(7, "www.own.example", EDNS)));
    let got = w.pass(1000).remove(0).1;
    assert_eq!((rcode(&got), &why(&got)[..]), (SERVFAIL, "the network's own names cannot be looked up now"));
    assert_eq!((w.n.core.counters().dns_unanswered, w.holds().2), (1, 0));
}

#[test]
fn a_question_that_is_lost_fails_at_once_and_is_counted() {
    let mut w = World::new();
    w.n.fx.event_ring_full = true;
    let got = w.ask(A, &query(7, "www.own.example", EDNS)).unwrap();
    assert_eq!((rcode(&got), &why(&got)[..]), (SERVFAIL, "the network's own names cannot be looked up now"));
    assert_eq!((w.n.drops(DropReason::EventRingFull), w.holds().2), (1, 0));
    // Where the control side was only to look for name servers, the query goes on.
    w.pass(1000);
    assert_eq!(w.ask(A, &query(7, "www.far.example", &[])), None);
    assert_eq!(w.n.fx.datagrams.len(), 1);
}

#[test]
fn other_name_servers_may_know_other_things() {
    let mut w = World::new();
    let (far, q) = (query(7, "www.far.example", &[]), query(7, "www.own.example", &[]));
    w.resolve(A, &far, |sent| answer(sent, 1, 600, 7));
    w.own(A, &q, own("www.own.example", 7));
    // A response of a server that is no longer asked is sent, and not kept.
    let slow = query(7, "slow.far.example", &[]);
    assert!(!w.goes_up(A, &slow));
    w.servers.servers = vec![addr(SECOND)];
    w.confirm();
    assert_eq!(w.reply(|sent| answer(sent, 1, 60, 7)).len(), 1);
    assert!(w.ask(A, &q).is_some(), "own names are what they were");
    assert_eq!(w.resolve(A, &far, |sent| answer(sent, 1, 60, 8)).last(), Some(&8));
    assert_eq!(w.resolve(A, &slow, |sent| answer(sent, 1, 60, 8)).last(), Some(&8));
    assert_eq!(w.sent_to(), addr(SECOND));
    // None at all.
    w.servers.servers.clear();
    w.confirm();
    let got = w.ask(A, &query(7, "www.far.example", EDNS)).unwrap();
    assert_eq!((rcode(&got), &why(&got)[..]), (SERVFAIL, "no name server is configured on the host"));
}

#[test]
fn without_recursion_the_name_server_is_asked_each_time() {
    let mut w = World::new();
    let mut q = query(7, "www.far.example", &[]);
    w.resolve(A, &q, |sent| answer(sent, 1, 600, 7));
    q[2] = 0;
    for _ in 0..2 {
        let got = w.resolve(A, &q, |sent| {
            assert_eq!(sent[2], 0);
            answer(sent, 1, 600, 8)
        });
        assert_eq!((got[2] & 1, got.last()), (0, Some(&8)));
    }
    q[2] = 1;
    assert_eq!(w.ask(A, &q).unwrap().last(), Some(&7));
}

#[test]
fn a_temporary_failure_stays_one_with_the_search_domain() {
    let mut w = World::new();
    let name = "www.far.example";
    let (far, searched) = (query(7, name, &[]), query(8, "www.far.example.guests.test", EDNS));
    let ask_searched = |w: &mut World, port| match w.ticket(port, &searched) {
        Some(ticket) => w.verdict(ticket, nothing(Some(name))).remove(0).1,
        None => panic!("a hit is for `ask`"),
    };
    // Nobody asked for the name.
    assert_eq!(rcode(&ask_searched(&mut w, A)), NXDOMAIN);
    assert_eq!(rcode(&w.ask(A, &searched).unwrap()), NXDOMAIN, "cached");
    // It is being asked for.
    assert!(!w.goes_up(A, &far));
    assert_eq!(rcode(&w.ask(B, &searched).unwrap()), SERVFAIL);
    for failure in [SERVFAIL, REFUSED] {
        assert_eq!(rcode(&w.reply(|sent| code(sent, failure)).remove(0).1), failure);
        let got = w.ask(B, &searched).unwrap();
        assert_eq!(rcode(&got), SERVFAIL, "after {failure}, also for others");
        assert_eq!(why(&got), "the name without the search domain cannot be resolved now");
        assert!(!w.goes_up(A, &far));
    }
    // An answer ends it, also a negative one, and so does time.
    w.reply(|sent| code(sent, NXDOMAIN));
    assert_eq!(rcode(&w.ask(A, &searched).unwrap()), NXDOMAIN);
    w.resolve(A, &far, |sent| code(sent, SERVFAIL));
    w.pass(14_999);
    let ticket = w.ticket(A, &searched).unwrap();
    assert_eq!(rcode(&w.verdict(ticket, nothing(Some(name))).remove(0).1), SERVFAIL);
    w.pass(1);
    assert_eq!(rcode(&w.ask(A, &searched).unwrap()), NXDOMAIN);
    // Without a name server everything else is a temporary failure.
    w.servers.servers.clear();
    w.confirm();
    assert_eq!(rcode(&w.ask(A, &searched).unwrap()), SERVFAIL);
    // A name that could not be somebody else's is just not there.
    let ticket = w.ticket(A, &query(9, "nobody.guests.test", &[])).unwrap();
    assert_eq!(rcode(&w.verdict(ticket, nothing(None)).remove(0).1), NXDOMAIN);
}

#[test]
fn a_guest_over_its_share_is_refused_and_others_are_not() {
    let mut w = World::with(&[SERVER], |l| {
        (l.dns_queries, l.dns_queries_per_port) = (20, 12);
    });
    let ask = |w: &mut World, port, n: u32| w.ask(port, &query(7, &format!("n{n}.far.example"), EDNS));
    for n in 0..12 {
        assert_eq!(ask(&mut w, A, n), None);
    }
    let got = ask(&mut w, A, 12).unwrap();
    assert_eq!((rcode(&got), &why(&got)[..]), (REFUSED, "too many questions at once"));
    // Its own refusal is temporary for it alone.
    for (port, expected) in [(A, SERVFAIL), (B, NXDOMAIN)] {
        let searched = query(8, "n12.far.example.guests.test", &[]);
        let got = match w.ask(port, &searched) {
            // Refused too: the guest may not even have the authority asked.
            Some(got) if port == A => {
                assert_eq!(rcode(&got), REFUSED);
                continue;
            }
            got => got,
        };
        assert_eq!(got, None);
        let ticket = w.n.fx.events.iter().rev().find_map(|e| match e {
            guestnet_core::effects::Event::DnsQuestion { ticket, .. } => Some(*ticket),
            _ => None,
        });
        let got = w.verdict(ticket.unwrap(), nothing(Some("n12.far.example"))).remove(0).1;
        assert_eq!(rcode(&got), expected);
    }
    let searched = w.ask(A, &query(8, "n12.far.example.guests.test", &[])).unwrap();
    assert_eq!(rcode(&searched), SERVFAIL, "a hit");
    // When all is taken, each guest has a few.
    for n in 0..8 {
        assert_eq!(ask(&mut w, B, 100 + n), None);
    }
    assert_eq!(w.holds().2, 20);
    assert_eq!(rcode(&ask(&mut w, B, 200).unwrap()), REFUSED);
    assert_eq!(w.n.core.counters().dns_refused, 3);
    // A guest that leaves waits no more, and takes nothing from others.
    w.n.core.remove_port(w.n.now, A, &mut w.n.fx);
    w.n.core.audit().unwrap();
    assert_eq!(ask(&mut w, B, 3), None);
    assert_eq!(w.n.fx.datagrams.len(), 20, "what the guest asked is still asked");
    assert_eq!(w.pass(2000).len(), 9);
    assert_eq!(w.holds().2, 0);
}

#[test]
fn questions_to_the_authority_have_a_rate() {
    let mut w = World::with(&[SERVER], |l| {
        (l.service_datagrams_per_second, l.dns_queries_per_port) = (10, 1000);
    });
    let up = |w: &mut World, port, n: u32| w.goes_up(port, &query(7, &format!("n{n}.own.example"), &[]));
    assert_eq!((0..30).filter(|n| up(&mut w, A, *n)).count(), 10);
    assert_eq!(w.n.drops(DropReason::RateLimit), 20);
    assert!(up(&mut w, B, 100));
    // A guest that asks too much is not the one that has the control side look; it goes on with what is known.
    let known = query(7, "www.known.example", &[]);
    w.resolve(B, &known, |sent| answer(sent, 1, 600, 7));
    w.pass(1000);
    assert_eq!((0..30).filter(|n| up(&mut w, A, 200 + *n)).count(), 10);
    w.confirm();
    w.n.now = w.n.now.plus_ms(5);
    assert!(w.ask(A, &known).is_some());
}

#[test]
fn a_network_without_queries_has_no_timer() {
    let mut w = World::new();
    w.own(A, &query(7, "www.own.example", &[]), own("www.own.example", 7));
    w.resolve(A, &query(7, "www.far.example", &[]), |sent| answer(sent, 1, 60, 7));
    w.pass(11_000);
    assert_eq!(w.n.fx.closed.len(), w.n.fx.opened.len());
    assert_eq!(w.n.core.next_timer(), None);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn any_query_gets_its_own_answer_a_refusal_or_waits(
        id in any::<u16>(),
        upper in any::<u64>(),
        edits in proptest::collection::vec((any::<u16>(), any::<u8>()), 0..3),
        edns in prop_oneof![Just(Vec::new()), Just(EDNS.to_vec()), proptest::collection::vec(any::<u8>(), 0..20)],
        cut in prop_oneof![4 => Just(0usize), 1 => 0usize..40],
        age in 0u64..90_000,
    ) {
        let mut w = World::new();
        let first = query(1, "www.own.example", &[]);
        w.own(A, &first, own("www.own.example", 7));
        let name: String = "www.own.example".chars().enumerate()
            .map(|(i, c)| if upper >> i & 1 == 1 { c.to_ascii_uppercase() } else { c }).collect();
        let mut q = query(id, &name, &edns);
        for (at, byte) in edits {
            let at = usize::from(at) % q.len();
            q[at] = byte;
        }
        q.truncate(q.len().saturating_sub(cut));
        w.n.pass_ms(age);
        w.confirm();
        let (events, drops) = (w.n.fx.events.len(), w.n.all_drops());
        let got = w.ask(A, &q);
        let up = w.n.fx.events.len() > events;
        match got {
            Some(a) if a[7] == 1 => {
                prop_assert!(!up && age < 60_000);
                let end = question_end(&first);
                prop_assert_eq!(&a[..2], &q[..2]);
                prop_assert_eq!(&a[12..end], &q[12..end]);
                prop_assert!(q[12..end - 4].eq_ignore_ascii_case(&first[12..end - 4]));
                let left = 60 - (age / 1000) as u32;
                prop_assert_eq!(&a[end..end + 16], &answer(&first, 1, left, 7)[end..]);
            }
            Some(a) => {
                prop_assert_eq!(&a[..2], &q[..2]);
                prop_assert!(!up && a[2] & 0x80 != 0 && a[6..10] == [0; 4]);
                let bad_version = a.len() > 12 && a[11] == 1 && a[a.len() - 6] == 1;
                prop_assert!([1, 4, 5].contains(&rcode(&a)) || bad_version || a[2] & 2 != 0, "{:?}", a);
            }
            None => prop_assert!(up || !w.n.fx.datagrams.is_empty() || w.n.all_drops() > drops),
        }
        w.n.core.audit().unwrap();
    }

    #[test]
    fn any_verdict_is_one_answer(
        code in 0u16..30,
        records in proptest::collection::vec((0usize..4, any::<u16>(), proptest::collection::vec(any::<u8>(), 0..40)), 0..6),
        searched in any::<bool>(),
    ) {
        let mut w = World::new();
        let names = ["www.own.example", "far.example", "", "x"];
        let answers = records.iter().map(|(n, kind, data)| record(names[*n], *kind, data)).collect();
        let verdict = DnsVerdict::Own {
            rcode: code,
            answers,
            authority: Vec::new(),
            searched: searched.then(|| labels("www").into()),
            target: None,
        };
        let got = w.own(A, &query(7, "www.own.example", EDNS), verdict);
        prop_assert_eq!(&got[..2], &[0, 7]);
        prop_assert!(got.len() <= 1232);
        prop_assert_eq!(w.holds().2, 0);
    }
}

#[test]
fn ports_are_told_apart() {
    let mut w = World::new();
    assert!(w.goes_up(A, &query(1, "vm1", &[])));
    assert_eq!(w.n.core.port_counters(A).unwrap().dns_misses, 1);
    assert_eq!(w.n.core.port_counters(PortId(2)).unwrap().dns_misses, 0);
}
