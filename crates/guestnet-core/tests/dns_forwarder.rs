//! Theory of operation: names that the core answers or asks for by itself. The control side and the name server are
//! played by the test, time by a variable.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/net.rs"]
mod net;

use guestnet_core::config::DatagramError;
use guestnet_core::effects::{Event, SockError};
use guestnet_core::stats::DropReason;
use guestnet_core::types::{FlowId, PortId, ServiceId};
use guestnet_wire::proto;
use net::*;
use proptest::prelude::*;

const DNS: ServiceId = ServiceId(2);
const SERVER: &str = "203.0.113.53:53";
const EDNS: &[u8] = &[0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0];

fn labels(name: &str) -> Vec<u8> {
    let mut out = Vec::new();
    for label in name.split('.').filter(|l| !l.is_empty()) {
        out.push(label.len() as u8);
        out.extend_from_slice(label.as_bytes());
    }
    out.push(0);
    out
}

fn query(id: u16, name: &str, edns: &[u8]) -> Vec<u8> {
    let mut q = id.to_be_bytes().to_vec();
    q.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, u8::from(!edns.is_empty())]);
    q.extend_from_slice(&labels(name));
    q.extend_from_slice(&[0, 1, 0, 1]);
    q.extend_from_slice(edns);
    q
}

/// An answer with `count` addresses to a query.
fn answer(query: &[u8], count: u8, ttl: u32, address: u8) -> Vec<u8> {
    let end = 12 + query[12..].iter().position(|b| *b == 0).unwrap() + 5;
    let mut a = query[..end].to_vec();
    (a[2], a[3]) = (0x81, 0x80);
    a[4..12].copy_from_slice(&[0, 1, 0, count, 0, 0, 0, 0]);
    for _ in 0..count {
        a.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1]);
        a.extend_from_slice(&ttl.to_be_bytes());
        a.extend_from_slice(&[0, 4, 192, 0, 2, address]);
    }
    a
}

fn ttl(a: &[u8]) -> u32 {
    let at = 12 + a[12..].iter().position(|b| *b == 0).unwrap() + 5 + 6;
    u32::from_be_bytes(a[at..at + 4].try_into().unwrap())
}

struct World {
    n: Net,
    generation: u64,
}

impl World {
    /// A network whose DNS service has spoken, and allows to ask others.
    fn new() -> World {
        let mut n = Net::new();
        n.core.add_service(DNS, proto::UDP, GATEWAY.parse().unwrap(), 53);
        let mut w = World { n, generation: 0 };
        w.change();
        w.allow();
        w
    }

    fn change(&mut self) {
        self.generation += 1;
        let own = ["guests.test", "own.example"].map(|n| labels(n).into());
        self.n.core.set_names(DNS, self.generation, own.to_vec());
    }

    fn allow(&mut self) {
        self.n.core.allow_names(self.n.now, self.generation, Some(addr(SERVER)));
    }

    fn keep(&mut self, own: bool, query: &[u8], answer: &[u8]) {
        self.n.core.keep_name(self.n.now, A, self.generation, own, query, answer);
    }

    /// What a guest's query gets at once.
    fn ask(&mut self, port: PortId, query: &[u8]) -> Option<Vec<u8>> {
        let out = self.n.ask(port, udp_frame(port, 4000, addr("192.168.64.1:53"), query));
        assert!(out.len() <= 1 && out.iter().all(|s| s.port == port));
        let got = read(out.first()?);
        assert_eq!((got.src(), got.dst()), (addr("192.168.64.1:53"), guest_addr(port, 4000)));
        Some(got.payload().to_vec())
    }

    /// Whether the query went up to the service.
    fn goes_up(&mut self, port: PortId, query: &[u8]) -> bool {
        let (events, sent) = (self.n.fx.events.len(), self.n.fx.datagrams.len());
        assert_eq!(self.ask(port, query), None);
        let up = self.n.fx.events.get(events..).unwrap().iter().any(
            |e| matches!(e, Event::Datagram { port: p, payload, .. } if *p == port && **payload == *query),
        );
        assert!(!up || self.n.fx.datagrams.len() == sent, "asked twice");
        up
    }

    /// What was sent to the name server last: the flow of its socket, and the question.
    fn sent(&self) -> (FlowId, Vec<u8>) {
        let d = self.n.fx.datagrams.last().unwrap();
        assert_eq!(d.dst, addr(SERVER));
        (self.n.fx.socks[&d.sock].flow.unwrap(), d.payload.clone())
    }

    fn hear(&mut self, flow: FlowId, from: &str, message: &[u8]) -> Vec<(PortId, Vec<u8>)> {
        self.n.fx.frames.clear();
        self.n.core.udp_received(self.n.now, flow, addr(from), message, 0, &mut self.n.fx);
        self.n.core.audit().unwrap();
        self.n.fx.take().iter().map(|s| (s.port, read(s).payload().to_vec())).collect()
    }

    fn counts(&self) -> (u64, u64, u64) {
        let c = self.n.core.counters();
        (c.dns_hits, c.dns_misses, c.dns_asked)
    }
}

#[test]
fn a_known_answer_is_given_again_until_it_is_too_old() {
    let mut w = World::new();
    let q = query(7, "www.own.example", &[]);
    assert!(w.goes_up(A, &q));
    w.keep(true, &q, &answer(&q, 2, 60, 7));
    let got = w.ask(A, &q).unwrap();
    assert_eq!(got, answer(&q, 2, 60, 7));
    // Another guest, another number, another spelling; the answer repeats both.
    let other = query(0xbeef, "wWw.OWN.exAMPle", &[]);
    w.n.pass_ms(42_999);
    w.allow();
    let got = w.ask(B, &other).unwrap();
    assert_eq!((got.clone(), ttl(&got)), (answer(&other, 2, 18, 7), 18));
    w.n.pass_ms(17_000);
    w.allow();
    assert_eq!(ttl(&w.ask(B, &other).unwrap()), 1);
    w.n.pass_ms(1);
    assert!(w.goes_up(B, &other));
    assert_eq!(w.counts(), (3, 2, 0));
}

#[test]
fn what_the_asker_says_of_itself_decides_how_it_is_answered() {
    let mut w = World::new();
    let plain = query(7, "www.own.example", &[]);
    w.keep(true, &plain, &answer(&plain, 40, 60, 7));
    // 40 addresses are more than 512 bytes, and less than 1232.
    let cut = w.ask(A, &plain).unwrap();
    assert_eq!((cut.len(), cut[2] & 2, &cut[6..12]), (plain.len(), 2, &[0; 6][..]));
    let edns = query(8, "www.own.example", EDNS);
    let got = w.ask(A, &edns).unwrap();
    assert_eq!((got[2] & 2, got[7], got[11]), (0, 40, 1));
    assert_eq!(&got[got.len() - 11..], EDNS);
    // Who wants DNSSEC records, or none verified, asks for something else.
    let mut dnssec = edns.clone();
    let at = dnssec.len() - 4;
    dnssec[at] = 0x80;
    assert!(w.goes_up(A, &dnssec));
    let mut unchecked = edns.clone();
    unchecked[3] |= 0x10;
    assert!(w.goes_up(A, &unchecked));
    // Whatever is odd is for the service: a cookie, two questions, another type.
    let cookie = [&[0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 12, 0, 10, 0, 8][..], &[1; 8]].concat();
    assert!(w.goes_up(A, &query(9, "www.own.example", &cookie)));
    let mut two = plain.clone();
    two[5] = 2;
    assert!(w.goes_up(A, &two));
    let mut kind = plain.clone();
    let at = kind.len() - 3;
    kind[at] = 28;
    assert!(w.goes_up(A, &kind));
}

#[test]
fn what_was_known_before_a_change_is_not_said_after_it() {
    let mut w = World::new();
    let (own, other) = (query(7, "www.own.example", &[]), query(7, "www.far.example", &[]));
    w.keep(true, &own, &answer(&own, 1, 60, 7));
    w.keep(false, &other, &answer(&other, 1, 60, 7));
    assert!(w.ask(A, &own).is_some() && w.ask(A, &other).is_some());
    // A guest came: what is said of guests may change.
    w.generation += 1;
    w.n.core.forget_guest_names(w.generation);
    assert!(w.goes_up(A, &own) && w.ask(A, &other).is_some());
    // An answer from before.
    w.n.core.keep_name(w.n.now, A, w.generation - 1, true, &own, &answer(&own, 1, 60, 7));
    assert!(w.goes_up(A, &own));
    w.keep(true, &own, &answer(&own, 1, 60, 8));
    assert_eq!(w.ask(A, &own).unwrap(), answer(&own, 1, 60, 8));
    // Other records, or other name servers: nothing holds any more, permission neither.
    w.change();
    assert!(w.goes_up(A, &own) && w.goes_up(A, &other));
    assert_eq!(w.n.core.names_held(), (0, 0, 0));
    // PeerUpdate that were overtaken.
    w.n.core.set_names(DNS, 1, Vec::new());
    w.n.core.allow_names(w.n.now, 1, Some(addr(SERVER)));
    w.n.core.keep_name(w.n.now, A, 1, true, &own, &answer(&own, 1, 60, 7));
    assert!(w.goes_up(A, &own) && w.goes_up(A, &other));
    // What a guest's questions brought goes with it.
    w.keep(true, &own, &answer(&own, 1, 60, 7));
    assert_eq!(w.n.core.names_held().0, 1);
    w.n.core.remove_port(w.n.now, A, &mut w.n.fx);
    assert_eq!(w.n.core.names_held(), (0, 0, 0));
}

#[test]
fn only_an_answer_to_the_question_is_kept() {
    let mut w = World::new();
    let q = query(7, "www.own.example", &[]);
    for not in [
        answer(&query(7, "ww2.own.example", &[]), 1, 60, 7),
        answer(&q, 1, 0, 7),
        answer(&q, 0, 60, 7),
        q.clone(),
        answer(&q, 1, 60, 7)[..40].to_vec(),
    ] {
        w.keep(true, &q, &not);
        assert!(w.goes_up(A, &q), "{not:?}");
    }
}

#[test]
fn others_are_asked_from_here_and_the_networks_own_are_not() {
    let mut w = World::new();
    for own in
        ["guests.test", "vm1.Guests.test", "own.example", "x.y.own.EXAMPLE", "vm1", "", &"a.".repeat(17)]
    {
        assert!(w.goes_up(A, &query(1, own, &[])), "{own}");
    }
    let q = query(7, "wWw.far.example", &[]);
    assert!(!w.goes_up(A, &q));
    let (flow, sent) = w.sent();
    // The guest's spelling, its RD; a number of our own, and EDNS.
    assert_eq!(&sent[2..12], &[1, 0x20, 0, 1, 0, 0, 0, 0, 0, 1]);
    assert_eq!(&sent[12..], [&q[12..], EDNS].concat());
    // The other asks the same in its way, and waits for the same answer.
    let edns = query(8, "www.FAR.example", EDNS);
    assert!(!w.goes_up(B, &edns));
    assert_eq!((w.n.fx.datagrams.len(), w.n.core.names_held().2), (1, 1));
    let heard = w.hear(flow, SERVER, &answer(&sent, 1, 60, 7));
    let mut with = answer(&edns, 1, 60, 7);
    with.extend_from_slice(EDNS);
    with[11] = 1;
    assert_eq!(heard, [(A, answer(&q, 1, 60, 7)), (B, with)]);
    // From now on it is known.
    w.n.pass_ms(500);
    assert_eq!(w.ask(B, &q).unwrap(), answer(&q, 1, 60, 7));
    assert_eq!(w.counts(), (1, 9, 2));
    // A second answer is one to nothing.
    let before = w.n.drops(DropReason::Filtered);
    assert_eq!(w.hear(flow, SERVER, &answer(&sent, 1, 60, 9)), []);
    assert_eq!(w.n.drops(DropReason::Filtered), before + 1);
    // Sockets are not kept for nothing.
    w.n.pass_ms(11_000);
    assert_eq!(w.n.fx.closed.len(), w.n.fx.opened.len());
    assert_eq!(w.n.core.next_timer(), None);
}

#[test]
fn an_answer_must_be_one_to_the_question() {
    let mut w = World::new();
    let q = query(7, "www.far.example", &[]);
    assert!(!w.goes_up(A, &q));
    let (flow, sent) = w.sent();
    let good = answer(&sent, 1, 60, 7);
    let mut id = good.clone();
    id[1] ^= 1;
    let mut no_answer = good.clone();
    no_answer[2] &= 0x7f;
    let mut other_kind = good.clone();
    other_kind[2] |= 8;
    let mut type_ = good.clone();
    let at = sent.len() - EDNS.len() - 3;
    type_[at] = 28;
    let mut cut = good.clone();
    cut.pop();
    let name = answer(&query(u16::from_be_bytes([sent[0], sent[1]]), "ww2.far.example", &[]), 1, 60, 7);
    for wrong in [&id, &no_answer, &other_kind, &type_, &cut, &name, &sent, &good[..11].to_vec(), &vec![]] {
        assert_eq!(w.hear(flow, SERVER, wrong), [], "{wrong:?}");
    }
    assert_eq!(w.hear(flow, "203.0.113.53:54", &good), [], "another port");
    assert_eq!(w.hear(flow, "203.0.113.54:53", &good), [], "another server");
    let stale = FlowId { generation: flow.generation + 1, ..flow };
    assert_eq!(w.hear(stale, SERVER, &good), [], "another socket");
    assert_eq!(w.hear(flow, SERVER, &good), [(A, answer(&q, 1, 60, 7))]);
}

#[test]
fn who_guesses_gets_no_second_chance() {
    let mut w = World::new();
    assert!(!w.goes_up(A, &query(7, "www.far.example", &[])));
    let (flow, sent) = w.sent();
    w.n.fx.events.clear();
    for n in 0..64u16 {
        let mut guess = answer(&sent, 1, 60, 66);
        let id = u16::from_be_bytes([sent[0], sent[1]]).wrapping_add(n + 1);
        guess[..2].copy_from_slice(&id.to_be_bytes());
        assert_eq!(w.hear(flow, SERVER, &guess), []);
    }
    // The service asks instead, and the socket is used no more.
    assert_eq!(w.n.events(|e| matches!(e, Event::Datagram { .. })), 1);
    assert_eq!(w.hear(flow, SERVER, &answer(&sent, 1, 60, 66)), []);
    assert_eq!((w.n.fx.closed.len(), w.n.core.names_held()), (1, (0, 0, 0)));
    assert!(!w.goes_up(A, &query(7, "www.far.example", &[])));
    assert_ne!(w.sent().0, flow);
}

#[test]
fn what_does_not_end_well_is_for_the_service() {
    let mut w = World::new();
    let q = query(7, "www.far.example", &[]);
    let ups = |w: &World| w.n.fx.events.iter().filter(|e| matches!(e, Event::Datagram { .. })).count();
    // No such server, a truncated answer, one without its question.
    let kinds: [fn(&mut Vec<u8>); 3] = [
        |a| a[3] |= 2,
        |a| a[2] |= 2,
        |a| {
            a[3] |= 1;
            a[5] = 0;
            a.truncate(12);
        },
    ];
    for (i, change) in kinds.into_iter().enumerate() {
        assert!(!w.goes_up(A, &q));
        let (flow, sent) = w.sent();
        let mut a = answer(&sent, 1, 60, 7);
        change(&mut a);
        assert_eq!(w.hear(flow, SERVER, &a), []);
        assert_eq!(ups(&w), i + 1);
    }
    // No answer: after three in a row nobody is asked until the service allows it again.
    w.allow();
    for i in 0..3 {
        assert!(!w.goes_up(A, &q), "{i}");
        w.n.pass_ms(999);
        w.allow();
        assert_eq!(ups(&w), 3 + i);
        w.n.pass_ms(1);
        assert_eq!(ups(&w), 4 + i);
    }
    assert!(w.goes_up(A, &q));
    w.allow();
    // An error: at once.
    assert!(!w.goes_up(A, &q));
    let (flow, sent) = w.sent();
    let up = ups(&w);
    let e = DatagramError {
        kind: SockError::Refused,
        offender: None,
        icmp_type: 3,
        icmp_code: 3,
        mtu: 0,
        dst: addr(SERVER),
        seq: 0,
        payload: &sent,
    };
    w.n.core.sock_error(w.n.now, flow, e, &mut w.n.fx);
    assert_eq!((ups(&w), w.n.core.names_held().2), (up + 1, 0));
    assert!(w.goes_up(A, &q));
    // And where the host has no socket, or refuses to send.
    w.n.pass_ms(11_000);
    w.allow();
    w.n.fx.open_error = Some(SockError::Exhausted);
    assert!(w.goes_up(A, &q));
    w.n.fx.datagram_error = Some(SockError::NetUnreachable);
    assert!(w.goes_up(A, &q));
    assert!(!w.goes_up(A, &q));
    w.n.core.audit().unwrap();
}

#[test]
fn permission_is_looked_at_each_second_and_ends() {
    let mut w = World::new();
    let known = query(7, "www.known.example", &[]);
    w.keep(false, &known, &answer(&known, 1, 600, 7));
    assert!(w.ask(A, &known).is_some());
    w.n.pass_ms(1000);
    // One goes up, and the rest does not wait for it.
    assert!(w.goes_up(A, &known));
    assert!(w.ask(A, &known).is_some() && !w.goes_up(A, &query(7, "www.far.example", &[])));
    w.n.pass_ms(4000);
    assert!(w.goes_up(A, &known) && w.goes_up(A, &query(7, "www.near.example", &[])));
    w.allow();
    assert!(w.ask(A, &known).is_some());
    // To be asked is one thing, to be known another.
    w.n.core.allow_names(w.n.now, w.generation, None);
    assert!(w.ask(A, &known).is_some() && w.goes_up(A, &query(7, "www.near.example", &[])));
}

#[test]
fn a_guest_that_asks_too_much_does_not_keep_others_from_it() {
    let mut w = World::new();
    let ask = |w: &mut World, port, n: u32| {
        let q = query(7, &format!("n{n}.far.example"), &[]);
        w.goes_up(port, &q)
    };
    let up = (0..400).filter(|n| ask(&mut w, A, *n)).count();
    assert_eq!((up, w.n.core.names_held().2), (400 - 128, 128));
    assert!(!ask(&mut w, B, 1000));
    // Sockets are changed, and are few.
    assert_eq!(w.n.fx.opened.len(), 2);
    // The service's own limit is that of what goes up.
    (0..2000).for_each(|n| _ = ask(&mut w, A, n));
    assert!(w.n.drops(DropReason::RateLimit) > 0);
    // A permission is looked at by those who may still go up.
    w.n.pass_ms(1000);
    (0..2000).for_each(|n| _ = ask(&mut w, A, n));
    w.allow();
    let id = |w: &World| u16::from_be_bytes([w.sent().1[0], w.sent().1[1]]);
    // Numbers are not told in order.
    let mut ids = Vec::new();
    for n in 0..100 {
        assert!(!ask(&mut w, B, 5000 + n), "{n}");
        ids.push(id(&w));
    }
    let steps: Vec<u16> = ids.windows(2).map(|p| p[1].wrapping_sub(p[0])).collect();
    assert!(steps.iter().filter(|s| **s < 1000).count() < 20, "{steps:?}");
    // A guest that leaves waits no more.
    w.n.core.remove_port(w.n.now, B, &mut w.n.fx);
    w.n.core.audit().unwrap();
    let (flow, sent) = w.sent();
    assert_eq!(w.hear(flow, SERVER, &answer(&sent, 1, 60, 7)), []);
}

#[test]
fn an_answer_from_before_a_change_is_said_but_not_kept() {
    let mut w = World::new();
    let q = query(7, "www.far.example", &[]);
    assert!(!w.goes_up(A, &q));
    let (flow, sent) = w.sent();
    w.change();
    assert_eq!(w.hear(flow, SERVER, &answer(&sent, 1, 60, 7)).len(), 1);
    assert_eq!(w.n.core.names_held(), (0, 0, 0));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn any_query_gets_its_own_answer_or_goes_up(
        id in any::<u16>(),
        upper in any::<u64>(),
        edits in proptest::collection::vec((any::<u16>(), any::<u8>()), 0..3),
        edns in prop_oneof![Just(Vec::new()), Just(EDNS.to_vec()), proptest::collection::vec(any::<u8>(), 0..20)],
        cut in prop_oneof![4 => Just(0usize), 1 => 0usize..40],
        age in 0u64..900_000,
    ) {
        let mut w = World::new();
        let first = query(1, "www.own.example", &[]);
        w.keep(true, &first, &answer(&first, 3, 600, 7));
        let name: String = "www.own.example".chars().enumerate()
            .map(|(i, c)| if upper >> i & 1 == 1 { c.to_ascii_uppercase() } else { c }).collect();
        let mut q = query(id, &name, &edns);
        for (at, byte) in edits {
            let at = usize::from(at) % q.len();
            q[at] = byte;
        }
        q.truncate(q.len().saturating_sub(cut));
        w.n.pass_ms(age);
        w.allow();
        let events = w.n.fx.events.len();
        let got = w.ask(A, &q);
        let up = w.n.fx.events.len() > events;
        match got {
            Some(a) => {
                prop_assert!(!up && age < 600_000);
                let end = 12 + labels("www.own.example").len() + 4;
                prop_assert_eq!(&a[..2], &q[..2]);
                prop_assert_eq!(&a[12..end], &q[12..end]);
                prop_assert!(q[12..end - 4].eq_ignore_ascii_case(&first[12..end - 4]));
                let left = 600 - (age / 1000) as u32;
                prop_assert_eq!(&a[end..end + 48], &answer(&first, 3, left, 7)[end..]);
                prop_assert_eq!(a.len(), end + 48 + if q.len() > end { 11 } else { 0 });
                prop_assert_eq!((a[2], a[3] & 0x8f, a[7]), (0x81, 0x80, 3));
            }
            None => prop_assert!(up || !w.n.fx.datagrams.is_empty()),
        }
        w.n.core.audit().unwrap();
    }

    #[test]
    fn whatever_a_server_says_only_one_answer_is_believed(
        edits in proptest::collection::vec((any::<u16>(), any::<u8>()), 0..6),
        records in 0u8..5,
        cut in 0usize..30,
        segment in prop_oneof![Just(0u16), 1u16..200],
    ) {
        let mut w = World::new();
        assert!(!w.goes_up(A, &query(7, "www.far.example", EDNS)));
        let (flow, sent) = w.sent();
        let mut a = answer(&sent, records, 60, 7);
        for (at, byte) in edits {
            let at = usize::from(at) % a.len();
            a[at] = byte;
        }
        a.truncate(a.len() - cut);
        w.n.fx.frames.clear();
        w.n.core.udp_received(w.n.now, flow, addr(SERVER), &a, segment, &mut w.n.fx);
        for s in w.n.fx.take() {
            let got = read(&s);
            prop_assert_eq!(&got.payload()[..2], &[0, 7]);
            prop_assert!(got.payload()[12..].starts_with(&labels("www.far.example")));
        }
        w.n.core.audit().unwrap();
        w.n.pass_ms(20_000);
        prop_assert_eq!(w.n.core.next_timer(), None);
        prop_assert_eq!(w.n.core.names_held().2, 0);
    }
}
