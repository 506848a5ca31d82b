//! Theory of operation: as much of DNS messages (RFC 1035 section 4, EDNS by RFC 6891) as it takes to give an answer
//! again. A query is read only when nothing about it is out of the ordinary: whatever else there may be is for a
//! server that knows all of it. Of an answer the shape is read, and where its TTLs are; its records stay bytes. Names
//! are skipped and never followed, so nothing can loop, and each byte is looked at a bounded number of times.

use crate::{be16, be32};
use std::ops::Range;

/// Length of the header.
pub const HEADER: usize = 12;
/// Bytes of the longest name.
pub const NAME_MAX: usize = 255;
/// Bytes of an answer that anyone takes over UDP.
pub const PLAIN_MAX: usize = 512;
/// Bytes of an answer over UDP that no link splits.
pub const UDP_MAX: usize = 1232;
/// The class of all names here.
pub const IN: u16 = 1;

/// Bits of the header.
pub mod flags {
    /// An answer.
    pub const QR: u16 = 0x8000;
    /// The kind of query; 0 is an ordinary one.
    pub const OPCODE: u16 = 0x7800;
    /// By the zone's own server.
    pub const AA: u16 = 0x0400;
    /// Records are missing.
    pub const TC: u16 = 0x0200;
    /// Others are to be asked.
    pub const RD: u16 = 0x0100;
    /// Others are asked.
    pub const RA: u16 = 0x0080;
    /// Verified by DNSSEC.
    pub const AD: u16 = 0x0020;
    /// Not to be verified.
    pub const CD: u16 = 0x0010;
    /// In the flags of EDNS: DNSSEC records are wanted.
    pub const DO: u16 = 0x8000;
}

/// The names exist (RFC 1035 section 4.1.1).
pub const NOERROR: u16 = 0;
/// There is no such name.
pub const NXDOMAIN: u16 = 3;

const SOA: u16 = 6;
const OPT: u16 = 41;
const ANY: u16 = 255;
/// Types that are no data (RFC 6895 section 3.1), ANY apart.
const META: std::ops::RangeInclusive<u16> = 128..=255;
const EXPLANATION: u16 = 15;
const EXPLANATION_MAX: usize = 256;
const DAY: u32 = 86_400;
/// Seconds that a negative answer is good for at most (RFC 2308 section 5 leaves it to the server).
const NEGATIVE_MAX: u32 = 900;

/// An ordinary query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Query<'a> {
    /// Its number.
    pub id: u16,
    /// The header's flags: RD, and of AD and CD any.
    pub flags: u16,
    /// Name, type and class as they were sent.
    pub question: &'a [u8],
    /// What is asked for.
    pub kind: u16,
    /// The size that the asker takes and the flags, where it speaks EDNS.
    pub edns: Option<(u16, u16)>,
}

impl<'a> Query<'a> {
    /// Reads a query that has nothing out of the ordinary: recursion desired, one question of class IN for data,
    /// uncompressed, with at most an EDNS record of version 0 without options, and nothing behind. `None`: not one of
    /// those.
    #[must_use]
    pub fn parse(b: &'a [u8]) -> Option<Query<'a>> {
        let flags = be16(b, 2);
        let counts = b.get(4..HEADER)?;
        let (&[0, 1, 0, 0, 0, 0, 0, more @ (0 | 1)], true) =
            (counts, flags & !(flags::AD | flags::CD) == flags::RD)
        else {
            return None;
        };
        let end = name_end(b, HEADER, false)?;
        let (kind, class) = (be16(b, end), be16(b, end + 2));
        let question = b.get(HEADER..end + 4)?;
        if class != IN || kind == 0 || kind == OPT || META.contains(&kind) {
            return None;
        }
        let rest = b.get(end + 4..)?;
        let edns = match (more, rest) {
            (0, []) => None,
            // Root, OPT, size, no part of an rcode, version 0, flags, no options.
            (1, &[0, 0, 41, s0, s1, 0, 0, f0, f1, 0, 0]) => {
                Some((u16::from_be_bytes([s0, s1]), u16::from_be_bytes([f0, f1])))
            }
            _ => return None,
        };
        Some(Query { id: be16(b, 0), flags, question, kind, edns })
    }

    /// The name as labels.
    #[must_use]
    pub fn name(&self) -> &'a [u8] {
        self.question.get(..self.question.len().saturating_sub(4)).unwrap_or(&[])
    }

    /// The DO bit.
    #[must_use]
    pub fn wants_dnssec(&self) -> bool {
        self.edns.is_some_and(|(_, f)| f & flags::DO != 0)
    }

    /// Bytes of an answer that the asker takes over UDP.
    #[must_use]
    pub fn largest(&self) -> usize {
        self.edns.map_or(PLAIN_MAX, |(size, _)| usize::from(size).clamp(PLAIN_MAX, UDP_MAX))
    }

    /// Puts the query for a name server in `out`: nothing of the asker's message but what has a meaning there.
    pub fn emit(&self, id: u16, out: &mut Vec<u8>) {
        out.clear();
        out.extend_from_slice(&id.to_be_bytes());
        out.extend_from_slice(&(self.flags & (flags::RD | flags::CD) | flags::AD).to_be_bytes());
        out.extend_from_slice(&[0, 1, 0, 0, 0, 0, 0, 1]);
        out.extend_from_slice(self.question);
        opt(if self.wants_dnssec() { flags::DO } else { 0 }, &[], out);
    }
}

fn opt(edns_flags: u16, options: &[u8], out: &mut Vec<u8>) {
    let [s0, s1] = (UDP_MAX as u16).to_be_bytes();
    let [f0, f1] = edns_flags.to_be_bytes();
    let [l0, l1] = (options.len() as u16).to_be_bytes();
    out.extend_from_slice(&[0, 0, OPT as u8, s0, s1, 0, 0, f0, f1, l0, l1]);
    out.extend_from_slice(options);
}

/// Where a name ends.
fn name_end(b: &[u8], start: usize, compressed: bool) -> Option<usize> {
    let mut at = start;
    loop {
        let length = usize::from(*b.get(at)?);
        match length {
            0 => break,
            1..=63 => at += 1 + length,
            192.. if compressed && at - start <= NAME_MAX => return (at + 2 <= b.len()).then_some(at + 2),
            _ => return None,
        }
        if at - start >= NAME_MAX {
            return None;
        }
    }
    Some(at + 1)
}

/// The shape of an answer to one question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The header's flags.
    pub flags: u16,
    /// With the bits that EDNS adds.
    pub rcode: u16,
    /// Where the question is.
    pub question: Range<usize>,
    /// Records by section, without EDNS.
    pub counts: [u16; 3],
    /// Where the records end.
    pub end: usize,
    /// Where the TTLs are.
    pub ttls: Vec<u16>,
    /// Seconds that the answer is good for; 0: it is not to be given again.
    pub lifetime: u32,
    /// The extended error (RFC 8914), an option of EDNS; empty without.
    pub explanation: Range<usize>,
}

impl Answer {
    /// Reads the shape. What follows an EDNS record is not taken.
    #[must_use]
    pub fn parse(b: &[u8]) -> Option<Answer> {
        let flags = be16(b, 2);
        if b.len() < HEADER || b.len() > usize::from(u16::MAX) || flags & flags::QR == 0 || be16(b, 4) != 1 {
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
        let (mut shortest, mut said, mut negative) = (u32::MAX, false, None);
        let (mut rcode, mut explanation) = (flags & 15, 0..0);
        while number < all {
            let name = at;
            let fixed = name_end(b, at, true)?;
            let (kind, ttl, length) = (be16(b, fixed), be32(b, fixed + 4), be16(b, fixed + 8));
            let end = fixed + 10 + usize::from(length);
            if end > b.len() {
                return None;
            }
            if kind == OPT {
                if number < answers + authorities || fixed != name + 1 {
                    return None;
                }
                rcode |= (ttl >> 24 << 4) as u16;
                explanation = explained(b, fixed + 10..end);
                counts[2] = (number - answers - authorities) as u16;
                all = number;
                continue;
            }
            shortest = shortest.min(seconds(ttl));
            said |= number < answers && (kind == asked || asked == ANY);
            // RFC 2308 section 5: a negative answer is good for what its SOA says.
            if kind == SOA && (answers..answers + authorities).contains(&number) && length >= 20 {
                negative = negative.or(Some(be32(b, end - 4)));
            }
            ttls.push((fixed + 4) as u16);
            (at, number) = (end, number + 1);
        }
        let lifetime = match (rcode, said, negative) {
            _ if flags & flags::TC != 0 || ttls.is_empty() => 0,
            (NOERROR, true, _) => shortest.min(DAY),
            (NOERROR | NXDOMAIN, _, Some(minimum)) => shortest.min(minimum).min(NEGATIVE_MAX),
            _ => 0,
        };
        Some(Answer { flags, rcode, question, counts, end: at, ttls, lifetime, explanation })
    }

    /// Puts the answer to `query` in `out`: `records` is what is between the question and EDNS, `explanation` the
    /// option, `age` the seconds since it was heard. What the asker does not take is left out with TC set (RFC 2181
    /// section 9).
    pub fn emit(&self, query: &Query<'_>, records: &[u8], explanation: &[u8], age: u32, out: &mut Vec<u8>) {
        let mut said = flags::QR | flags::RA | query.flags & (flags::RD | flags::CD) | self.rcode & 15;
        said |= self.flags & (flags::AA | flags::TC);
        if query.wants_dnssec() || query.flags & flags::AD != 0 {
            said |= self.flags & flags::AD;
        }
        let last = if query.edns.is_some() { 11 + explanation.len() } else { 0 };
        let before = HEADER + query.question.len();
        let fits = said & flags::TC == 0 && before + records.len() + last <= query.largest();
        let (records, mut counts) = if fits { (records, self.counts) } else { (&[][..], [0; 3]) };
        said |= if fits { 0 } else { flags::TC };
        counts[2] += u16::from(last > 0);
        out.clear();
        for word in [query.id, said, 1].into_iter().chain(counts) {
            out.extend_from_slice(&word.to_be_bytes());
        }
        out.extend_from_slice(query.question);
        out.extend_from_slice(records);
        if age > 0 && fits {
            for at in &self.ttls {
                let at = usize::from(*at);
                let ttl = seconds(be32(out, at)).saturating_sub(age);
                crate::put(out, at, &ttl.to_be_bytes());
            }
        }
        if let Some((_, f)) = query.edns {
            opt(f & flags::DO, explanation, out);
        }
    }
}

/// What a TTL field says: with its highest bit set it is zero (RFC 2181 section 8).
fn seconds(ttl: u32) -> u32 {
    if ttl >> 31 == 0 { ttl } else { 0 }
}

/// The first extended error among the options of EDNS.
fn explained(b: &[u8], options: Range<usize>) -> Range<usize> {
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

    fn query(more: &[u8], n: u8) -> Vec<u8> {
        let mut q =
            vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, n, 3, b'W', b'w', b'w', 2, b'a', b'b', 0, 0, 1, 0, 1];
        q.extend_from_slice(more);
        q
    }

    #[test]
    fn ordinary_queries() {
        let plain = query(&[], 0);
        let q = Query::parse(&plain).unwrap();
        assert_eq!((q.id, q.flags, q.kind, q.edns, q.largest()), (0xabcd, flags::RD, 1, None, 512));
        assert_eq!(q.name(), b"\x03Www\x02ab\0");
        let edns = query(&[0, 0, 41, 16, 0, 0, 0, 0x80, 0, 0, 0], 1);
        let q = Query::parse(&edns).unwrap();
        assert_eq!((q.edns, q.largest(), q.wants_dnssec()), (Some((4096, 0x8000)), 1232, true));
        let mut out = Vec::new();
        q.emit(7, &mut out);
        let again = Query::parse(&out).unwrap();
        assert_eq!((again.id, again.question, again.wants_dnssec()), (7, q.question, true));
    }

    #[test]
    fn whatever_is_odd_is_left_to_others() {
        let edns = [0, 0, 41, 16, 0, 0, 0, 0, 0, 0, 0];
        let base = query(&edns, 1);
        assert!(Query::parse(&base).is_some());
        // Each byte of the header but the number and AD and CD, the class, each byte of EDNS but size and flags.
        for (at, bit) in (2..12).flat_map(|at| (0..8).map(move |bit| (at, 1u8 << bit))) {
            let mut b = base.clone();
            b[at] ^= bit;
            assert_eq!(Query::parse(&b).is_some(), at == 3 && bit & 0x30 != 0, "{at} {bit}");
        }
        for at in [22, 23, 24, 25, 26, 29, 30, 33, 34] {
            let mut b = base.clone();
            b[at] ^= 4;
            assert!(Query::parse(&b).is_none(), "{at}");
        }
        for kind in [0u16, 41, 128, 251, 252, 255] {
            let mut b = base.clone();
            b[20..22].copy_from_slice(&kind.to_be_bytes());
            assert!(Query::parse(&b).is_none(), "{kind}");
        }
        for n in 0..base.len() {
            assert!(Query::parse(&base[..n]).is_none(), "{n}");
        }
        assert!(Query::parse(&query(&[0], 0)).is_none(), "something behind");
        let mut long = query(&[], 0)[..12].to_vec();
        for _ in 0..64 {
            long.extend_from_slice(b"\x03abc");
        }
        long.extend_from_slice(&[0, 0, 1, 0, 1]);
        assert!(Query::parse(&long).is_none(), "a name over 255 bytes");
    }

    fn answer(records: &[u8], counts: [u8; 3], rcode: u8) -> Vec<u8> {
        let mut a = query(&[], 0);
        (a[2], a[3]) = (0x81, 0x80 | rcode);
        (a[7], a[9], a[11]) = (counts[0], counts[1], counts[2]);
        a.extend_from_slice(records);
        a
    }

    const ADDRESS: &[u8] = &[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 7];

    #[test]
    fn an_answer_is_given_again_with_what_is_left_of_its_ttl() {
        let mut other = ADDRESS.to_vec();
        other[9] = 20;
        let a = answer(&[ADDRESS, &other].concat(), [2, 0, 0], 0);
        let shape = Answer::parse(&a).unwrap();
        assert_eq!((shape.lifetime, shape.counts, shape.end), (20, [2, 0, 0], a.len()));
        let asked = query(&[0, 0, 41, 16, 0, 0, 0, 0, 0, 0, 0], 1);
        let q = Query::parse(&asked).unwrap();
        let mut out = Vec::new();
        shape.emit(&q, &a[shape.question.end..shape.end], &[], 15, &mut out);
        let again = Answer::parse(&out).unwrap();
        assert_eq!((again.lifetime, again.counts), (5, [2, 0, 0]));
        assert_eq!((out[33], out[49]), (45, 5));
        // Nor under zero, whatever the age.
        shape.emit(&q, &a[shape.question.end..shape.end], &[], 30, &mut out);
        assert_eq!((out[33], out[49]), (30, 0));
    }

    #[test]
    fn a_ttl_that_is_none_does_not_become_one_with_age() {
        let mut high = ADDRESS.to_vec();
        high[6] = 0x80;
        let a = answer(&high, [1, 0, 0], 0);
        let shape = Answer::parse(&a).unwrap();
        let mut out = Vec::new();
        shape.emit(&Query::parse(&query(&[], 0)).unwrap(), &a[shape.question.end..], &[], 1, &mut out);
        assert_eq!((&out[30..34], Answer::parse(&out).unwrap().lifetime), (&[0; 4][..], 0));
    }

    #[test]
    fn what_does_not_fit_is_cut_and_said_to_be() {
        let a = answer(&ADDRESS.repeat(40), [40, 0, 0], 0);
        let shape = Answer::parse(&a).unwrap();
        let records = &a[shape.question.end..shape.end];
        let mut out = Vec::new();
        let plain = query(&[], 0);
        shape.emit(&Query::parse(&plain).unwrap(), records, &[], 9, &mut out);
        assert_eq!((out.len(), out[2] & 2, &out[6..12]), (24, 2, &[0; 6][..]));
        let edns = query(&[0, 0, 41, 3, 0, 0, 0, 0, 0, 0, 0], 1);
        shape.emit(&Query::parse(&edns).unwrap(), records, &[], 0, &mut out);
        assert_eq!((out.len(), out[2] & 2, out[7]), (24 + 640 + 11, 0, 40));
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
            |records: &[u8], counts, rcode| Answer::parse(&answer(records, counts, rcode)).unwrap().lifetime;
        assert_eq!(of(ADDRESS, [1, 0, 0], 0), 60);
        assert_eq!(of(ADDRESS, [1, 0, 0], 2), 0, "a failure");
        assert_eq!(of(&[], [0, 0, 0], 0), 0, "nothing, and nobody says for how long");
        assert_eq!(of(&soa(50, 9), [0, 1, 0], 3), 9);
        assert_eq!(of(&soa(8, 9), [0, 1, 0], 0), 8);
        assert_eq!(of(&soa(8, 9), [1, 0, 0], 0), 0, "an SOA in the wrong section");
        let mut high = ADDRESS.to_vec();
        high[6] = 0x80;
        assert_eq!(of(&high, [1, 0, 0], 0), 0);
        let mut cut = answer(ADDRESS, [1, 0, 0], 0);
        cut[2] |= 2;
        assert_eq!(Answer::parse(&cut).unwrap().lifetime, 0);
    }

    #[test]
    fn extended_errors_are_kept_and_other_options_are_not() {
        let opt = [0, 0, 41, 4, 208, 1, 0, 0, 0, 0, 12, 0, 10, 0, 2, 1, 1, 0, 15, 0, 2, 0, 22];
        let a = answer(&opt, [0, 0, 1], 0);
        let shape = Answer::parse(&a).unwrap();
        assert_eq!((shape.rcode, shape.counts, shape.end), (16, [0; 3], 24));
        assert_eq!(&a[shape.explanation], &[0, 15, 0, 2, 0, 22]);
        assert!(Answer::parse(&answer(&opt, [0, 1, 0], 0)).is_none(), "EDNS in the wrong section");
    }
}
