//! Theory of operation: any bytes through every reader of guestnet-wire. Nothing may panic, every offset
//! that comes out must lie inside the frame, and what is cut must be what was there.
#![no_main]

use guestnet_wire::gro::Run;
use guestnet_wire::gso::{self, Gso};
use guestnet_wire::{arp, checksum, dns, ether, parse, proto, tcp};
use libfuzzer_sys::fuzz_target;

/// Pieces, joined and cut again, are the same pieces.
fn joined(frame: &[u8], gso: Gso) {
    let (mut pieces, mut buf) = (Vec::new(), Vec::new());
    let _ = gso::segment(frame, gso, |h, p| pieces.push([h, p].concat()));
    pieces.truncate(40);
    let mut run: Option<(Run, usize)> = None;
    let check = |buf: &mut Vec<u8>, run: Run, first: usize, end: usize| {
        let (at, _, gso) = run.finish(buf);
        let mut again = Vec::new();
        match gso {
            Some(gso) => gso::segment(&buf[at], gso, |h, p| again.push([h, p].concat()))
                .expect("what was joined can be cut"),
            None => again.push(buf[at].to_vec()),
        }
        assert!(again == pieces[first..end]);
    };
    for (i, piece) in pieces.iter().enumerate() {
        let at = buf.len()..buf.len() + piece.len();
        buf.extend_from_slice(piece);
        if run.as_mut().is_some_and(|(r, _)| r.add(&mut buf, at.clone())) {
            // Its bytes have moved; what comes next still lies behind where it was.
            continue;
        }
        if let Some((run, first)) = run.replace((Run::begin(&buf, at), i)) {
            check(&mut buf, run, first, i);
        }
    }
    if let Some((run, first)) = run {
        check(&mut buf, run, first, pieces.len());
    }
}

fuzz_target!(|data: &[u8]| {
    // Two bytes of choices, then the frame.
    let [a, b, frame @ ..] = data else { return };
    let choice = u16::from_be_bytes([*a, *b]);

    let _ = ether::Ether::parse(frame);
    let _ = arp::Arp::parse(frame.get(ether::HEADER_LEN..).unwrap_or(&[]));
    let _ = checksum::checksum(frame);

    if let Ok(p) = parse::parse_ip(frame, ether::HEADER_LEN) {
        assert!(p.l3 <= p.l4 && p.l4 <= p.payload && p.payload <= p.end && p.end <= frame.len());
        let _ = parse::verify_ipv4_header(frame, &p);
        let _ = parse::verify_l4(frame, &p);
        if p.proto == proto::TCP && p.fragment.is_none() {
            let segment = &frame[p.l4..p.end];
            let header = tcp::Tcp::parse(segment).expect("parse_ip has checked the header");
            let options = tcp::Options::parse(&segment[tcp::MIN_LEN..usize::from(header.header_len)]);
            // What is written again says the same.
            let mut out = [0u8; 60];
            let n = header.emit(&options, &mut out);
            let again = tcp::Tcp::parse(&out[..n]).expect("emit writes what parse reads");
            assert_eq!(tcp::Options::parse(&out[tcp::MIN_LEN..n]), options);
            assert_eq!((again.seq, again.ack, again.flags), (header.seq, header.ack, header.flags));
        }
        let size = (choice >> 1).max(1);
        let gso = if choice & 1 == 0 { Gso::Tcp(size) } else { Gso::Udp(size) };
        let mut total = 0;
        let cut = gso::segment(frame, gso, |header, payload| {
            total += payload.len();
            assert!(payload.len() <= usize::from(size) && !header.is_empty());
        });
        if cut.is_ok() {
            assert_eq!(total, p.end - p.payload);
        }
        if matches!(gso, Gso::Tcp(_)) {
            joined(frame, gso);
        }
    }

    names(frame, choice);

    let mut copy = frame.to_vec();
    let _ = gso::complete_checksum(&mut copy, choice & 0xff, choice >> 8);
});

/// DNS: what is read of a message lies inside it, and a response that is sent again can be read and says the same.
fn names(message: &[u8], choice: u16) {
    let mut out = Vec::new();
    if let Ok(q) = dns::Query::parse(message) {
        assert!(q.name().len() <= dns::NAME_MAX && q.question.len() == q.name().len() + 4);
        let size = (choice & 1 != 0).then_some(1232);
        dns::emit_query(choice, q.flags, q.question, q.wants_dnssec(), size, &mut out);
        let again = dns::Query::parse(&out).expect("a query that nobody understands");
        assert_eq!((again.id, again.question, again.edns.is_some()), (choice, q.question, size.is_some()));
        out.clear();
    } else if message.len() >= dns::HEADER {
        dns::refuse(message, choice, &mut out);
        assert_eq!(out.len(), dns::HEADER);
        out.clear();
    }
    let Some(a) = dns::Answer::parse(message) else { return };
    let records = &message[a.question.end..a.end];
    let explanation = &message[a.explanation.clone()];
    let mut query = choice.to_be_bytes().to_vec();
    query.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, (choice & 1) as u8]);
    query.extend_from_slice(&message[a.question.clone()]);
    if choice & 1 != 0 {
        query.extend_from_slice(&[0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
    }
    let Ok(q) = dns::Query::parse(&query) else { return };
    let largest = q.largest(choice & 2 != 0);
    a.emit(&q, records, explanation, u32::from(choice), largest, &mut out);
    assert!(out.len() <= largest || out[2] & 2 != 0 || a.rcode > 15);
    let again = dns::Answer::parse(&out).expect("a response that nobody understands");
    assert_eq!(&out[again.question.clone()], q.question);
    if again.flags & dns::flags::TC == 0 && (a.rcode <= 15 || q.edns.is_some()) {
        assert_eq!((again.counts, again.end - again.question.end), (a.counts, records.len()));
        assert!(again.lifetime <= a.lifetime);
    }
    // Behind an alias of our own its records are whole, without a pointer.
    let chain = dns::Record { name: q.name().into(), kind: 5, ttl: 60, data: Box::from(&b"\x01x\0"[..]) };
    if let Some(joined) = dns::join(q.question, &[chain], message, &a) {
        let shape = dns::Answer::parse(&joined).expect("a response of our own");
        assert!(shape.counts[0] <= a.counts[0] + 1 && shape.counts[2] == 0);
        assert_eq!(shape.end, joined.len());
    }
}
