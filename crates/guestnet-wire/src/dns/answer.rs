//! Theory of operation: responses. Of a response the shape is read: where its records end, where their TTLs are, for how
//! long it holds. Its records stay bytes, and are sent again with what is left of their TTLs.

use super::format::{HEADER, UDP_MAX, flags, kind, name_end, opt, rcode};
use super::query::Query;
use crate::{be16, be32};
use std::ops::Range;

/// The option of an extended error (RFC 8914).
pub(super) const EXPLANATION: u16 = 15;
/// Bytes of an extended error that is passed on.
const EXPLANATION_MAX: usize = 256;
/// Seconds that a response holds at most (RFC 8767 section 4).
const DAY: u32 = 86_400;
/// Seconds that a negative response holds at most (RFC 2308 section 5 leaves it to the server).
const NEGATIVE_MAX: u32 = 900;

/// The shape of a response to one question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The header's flags.
    pub flags: u16,
    /// The response code, with the bits that EDNS adds.
    pub rcode: u16,
    /// Where the question is.
    pub question: Range<usize>,
    /// Records by section, without EDNS.
    pub counts: [u16; 3],
    /// Where the records end.
    pub end: usize,
    /// Where the TTLs are.
    pub ttls: Vec<u16>,
    /// Seconds that the response holds; 0: it is not to be sent again.
    pub lifetime: u32,
    /// The extended error (RFC 8914), an option of EDNS; empty without.
    pub explanation: Range<usize>,
}

impl Answer {
    /// Reads the shape. What follows an EDNS record is ignored.
    #[must_use]
    pub fn parse(b: &[u8]) -> Option<Answer> {
        let head = be16(b, 2);
        if b.len() < HEADER || b.len() > usize::from(u16::MAX) || head & flags::QR == 0 || be16(b, 4) != 1 {
            return None;
        }
        let question = HEADER..name_end(b, HEADER, false)? + 4;
        let asked = be16(b, question.end - 4);
        b.get(question.clone())?;
        let mut counts = [be16(b, 6), be16(b, 8), be16(b, 10)];
        let [answers, authorities, _] = counts.map(u32::from);
        let mut all: u32 = counts.iter().map(|n| u32::from(*n)).sum();
        let (mut at, mut number) = (question.end, 0);
        let mut ttls = Vec::new();
        let (mut shortest, mut positive, mut negative) = (u32::MAX, false, None);
        let (mut code, mut explanation) = (head & 15, 0..0);
        while number < all {
            let name = at;
            let fixed = name_end(b, at, true)?;
            let (kind, ttl, length) = (be16(b, fixed), be32(b, fixed + 4), be16(b, fixed + 8));
            let end = fixed + 10 + usize::from(length);
            if end > b.len() {
                return None;
            }
            if kind == kind::OPT {
                if number < answers + authorities || fixed != name + 1 {
                    return None;
                }
                code |= (ttl >> 24 << 4) as u16;
                explanation = find_explanation(b, fixed + 10..end);
                counts[2] = (number - answers - authorities) as u16;
                all = number;
                continue;
            }
            shortest = shortest.min(seconds(ttl));
            positive |= number < answers && (kind == asked || asked == kind::ANY);
            // RFC 2308 section 5: a negative response holds for what its SOA says.
            if kind == kind::SOA && (answers..answers + authorities).contains(&number) && length >= 20 {
                negative = negative.or(Some(be32(b, end - 4)));
            }
            ttls.push((fixed + 4) as u16);
            (at, number) = (end, number + 1);
        }
        let lifetime = match (code, positive, negative) {
            _ if head & flags::TC != 0 || ttls.is_empty() => 0,
            (rcode::NOERROR, true, _) => shortest.min(DAY),
            (rcode::NOERROR | rcode::NXDOMAIN, _, Some(minimum)) => shortest.min(minimum).min(NEGATIVE_MAX),
            _ => 0,
        };
        Some(Answer { flags: head, rcode: code, question, counts, end: at, ttls, lifetime, explanation })
    }

    /// Appends the response to `query` to `out`. `records` is what is between the question and EDNS, `explanation` the
    /// option, `age` the seconds since it was received, `largest` the bytes that the client takes. What does not fit is
    /// left out with TC set (RFC 2181 section 9).
    pub fn emit(
        &self,
        query: &Query<'_>,
        records: &[u8],
        explanation: &[u8],
        age: u32,
        largest: usize,
        out: &mut Vec<u8>,
    ) {
        if self.rcode > 15 && query.edns.is_none() {
            // The client could not see the upper bits.
            return query.respond(rcode::SERVFAIL, 0, &[], out);
        }
        let mut head = self.flags & (flags::AA | flags::TC);
        if query.wants_dnssec() || query.flags & flags::AD != 0 {
            head |= self.flags & flags::AD;
        }
        let last = if query.edns.is_some() { 11 + explanation.len() } else { 0 };
        let before = HEADER + query.question.len();
        let fits = head & flags::TC == 0 && before + records.len() + last <= largest;
        if !fits {
            return query.respond(self.rcode, head | flags::TC, explanation, out);
        }
        let start = out.len();
        query.head(self.rcode, head, self.counts, out);
        out.extend_from_slice(records);
        if age > 0 {
            for at in &self.ttls {
                let at = start + usize::from(*at);
                let ttl = seconds(be32(out, at)).saturating_sub(age);
                crate::put(out, at, &ttl.to_be_bytes());
            }
        }
        query.tail(self.rcode, explanation, out);
    }
}

impl Query<'_> {
    /// Appends a response without records. `head`: flags besides those that every response has; `explanation`: an
    /// option, see [`super::explain`].
    pub fn respond(&self, code: u16, head: u16, explanation: &[u8], out: &mut Vec<u8>) {
        self.head(code, head, [0; 3], out);
        self.tail(code, explanation, out);
    }

    fn head(&self, code: u16, head: u16, counts: [u16; 3], out: &mut Vec<u8>) {
        let head = flags::QR | flags::RA | head | self.flags & (flags::RD | flags::CD) | code & 15;
        let [answers, authorities, additionals] = counts;
        let additionals = additionals + u16::from(self.edns.is_some());
        for word in [self.id, head, 1, answers, authorities, additionals] {
            out.extend_from_slice(&word.to_be_bytes());
        }
        out.extend_from_slice(self.question);
    }

    fn tail(&self, code: u16, explanation: &[u8], out: &mut Vec<u8>) {
        if let Some(e) = self.edns {
            opt(UDP_MAX as u16, code, e.flags & flags::DO, explanation, out);
        }
    }
}

/// What a TTL field says: with its highest bit set it is zero (RFC 2181 section 8).
pub(super) fn seconds(ttl: u32) -> u32 {
    if ttl >> 31 == 0 { ttl } else { 0 }
}

/// The first extended error among the options of EDNS.
fn find_explanation(b: &[u8], options: Range<usize>) -> Range<usize> {
    let mut at = options.start;
    while at + 4 <= options.end {
        let (code, end) = (be16(b, at), at + 4 + usize::from(be16(b, at + 2)));
        if code == EXPLANATION && end <= options.end && end - at - 4 <= EXPLANATION_MAX {
            return at..end;
        }
        at = end;
    }
    0..0
}

#[cfg(test)]
mod tests {
    use super::*;

    const EDNS: &[u8] = &[0, 0, 41, 16, 0, 0, 0, 0, 0, 0, 0];

    fn query(more: &[u8], n: u8) -> Vec<u8> {
        let mut q =
            vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, n, 3, b'W', b'w', b'w', 2, b'a', b'b', 0, 0, 1, 0, 1];
        q.extend_from_slice(more);
        q
    }

    fn answer(records: &[u8], counts: [u8; 3], code: u8) -> Vec<u8> {
        let mut a = query(&[], 0);
        (a[2], a[3]) = (0x81, 0x80 | code);
        (a[7], a[9], a[11]) = (counts[0], counts[1], counts[2]);
        a.extend_from_slice(records);
        a
    }

    const ADDRESS: &[u8] = &[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 7];

    fn emit(a: &[u8], to: &[u8], age: u32) -> Vec<u8> {
        let (shape, q) = (Answer::parse(a).unwrap(), Query::parse(to).unwrap());
        let mut out = vec![7; 5];
        let records = &a[shape.question.end..shape.end];
        shape.emit(&q, records, &a[shape.explanation.clone()], age, q.largest(false), &mut out);
        assert_eq!(out[..5], [7; 5], "what was in the buffer stays");
        out.split_off(5)
    }

    #[test]
    fn a_cached_answer_has_what_is_left_of_its_ttls() {
        let mut other = ADDRESS.to_vec();
        other[9] = 20;
        let a = answer(&[ADDRESS, &other].concat(), [2, 0, 0], 0);
        let shape = Answer::parse(&a).unwrap();
        assert_eq!((shape.lifetime, shape.counts, shape.end), (20, [2, 0, 0], a.len()));
        let asked = query(EDNS, 1);
        let out = emit(&a, &asked, 15);
        let again = Answer::parse(&out).unwrap();
        assert_eq!((again.lifetime, again.counts), (5, [2, 0, 0]));
        assert_eq!((out[33], out[49]), (45, 5));
        // Never below zero.
        let out = emit(&a, &asked, 30);
        assert_eq!((out[33], out[49]), (30, 0));
    }

    #[test]
    fn an_invalid_ttl_stays_zero_with_age() {
        let mut high = ADDRESS.to_vec();
        high[6] = 0x80;
        let out = emit(&answer(&high, [1, 0, 0], 0), &query(&[], 0), 1);
        assert_eq!((&out[30..34], Answer::parse(&out).unwrap().lifetime), (&[0; 4][..], 0));
    }

    #[test]
    fn an_answer_that_does_not_fit_is_truncated() {
        let a = answer(&ADDRESS.repeat(40), [40, 0, 0], 0);
        let out = emit(&a, &query(&[], 0), 9);
        assert_eq!((out.len(), out[2] & 2, &out[6..12]), (24, 2, &[0; 6][..]));
        let edns = query(&[0, 0, 41, 3, 0, 0, 0, 0, 0, 0, 0], 1);
        let out = emit(&a, &edns, 0);
        assert_eq!((out.len(), out[2] & 2, out[7]), (24 + 640 + 11, 0, 40));
        let (shape, plain) = (Answer::parse(&a).unwrap(), query(&[], 0));
        let q = Query::parse(&plain).unwrap();
        let mut out = Vec::new();
        shape.emit(&q, &a[24..], &[], 0, q.largest(true), &mut out);
        assert_eq!((out.len(), out[2] & 2, out[7]), (24 + 640, 0, 40), "over TCP it fits");
    }

    #[test]
    fn lifetimes() {
        let soa = |ttl: u8, minimum: u8| {
            let mut r = vec![0xc0, 16, 0, 6, 0, 1, 0, 0, 0, ttl, 0, 22, 0, 0];
            r.extend_from_slice(&[0; 19]);
            r.push(minimum);
            r
        };
        let of =
            |records: &[u8], counts, code| Answer::parse(&answer(records, counts, code)).unwrap().lifetime;
        assert_eq!(of(ADDRESS, [1, 0, 0], 0), 60);
        assert_eq!(of(ADDRESS, [1, 0, 0], 2), 0, "a failure");
        assert_eq!(of(&[], [0, 0, 0], 0), 0, "no record, and no SOA that says for how long");
        assert_eq!(of(&soa(50, 9), [0, 1, 0], 3), 9);
        assert_eq!(of(&soa(8, 9), [0, 1, 0], 0), 8);
        assert_eq!(of(&soa(8, 9), [1, 0, 0], 0), 0, "an SOA in the wrong section");
        let mut high = ADDRESS.to_vec();
        high[6] = 0x80;
        assert_eq!(of(&high, [1, 0, 0], 0), 0);
        let mut truncated = answer(ADDRESS, [1, 0, 0], 0);
        truncated[2] |= 2;
        assert_eq!(Answer::parse(&truncated).unwrap().lifetime, 0);
    }

    #[test]
    fn extended_errors_are_kept_and_other_options_are_not() {
        let opt = [0, 0, 41, 4, 208, 1, 0, 0, 0, 0, 12, 0, 10, 0, 2, 1, 1, 0, 15, 0, 2, 0, 22];
        let a = answer(&opt, [0, 0, 1], 0);
        let shape = Answer::parse(&a).unwrap();
        assert_eq!((shape.rcode, shape.counts, shape.end), (16, [0; 3], 24));
        assert_eq!(&a[shape.explanation], &[0, 15, 0, 2, 0, 22]);
        assert!(Answer::parse(&answer(&opt, [0, 1, 0], 0)).is_none(), "EDNS in the wrong section");
        // Upper bits of the code need EDNS; a client without it sees a failure.
        let out = emit(&a, &query(EDNS, 1), 0);
        assert_eq!(Answer::parse(&out).unwrap().rcode, 16);
        assert_eq!(&out[out.len() - 6..], &[0, 15, 0, 2, 0, 22]);
        assert_eq!(emit(&a, &query(&[], 0), 0)[3] & 15, 2);
    }
}
