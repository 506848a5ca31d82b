//! Theory of operation: queries. A query may carry up to [`RECORDS_MAX`] records besides its question: EDNS, a signature,
//! and what nobody knows yet. They are skipped but for EDNS, so a query costs a bounded amount of work.

use super::format::{HEADER, PLAIN_MAX, TCP_MAX, UDP_MAX, flags, kind, name_end, opt};
use crate::{be16, be32};

/// Records that come with a question at most.
const RECORDS_MAX: u32 = 16;

/// What the client says of itself in its EDNS record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Edns {
    /// Bytes of a response over UDP that it takes.
    pub size: u16,
    /// The version, 0 today.
    pub version: u8,
    /// The flags.
    pub flags: u16,
}

/// A query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Query<'a> {
    /// The number that its response repeats.
    pub id: u16,
    /// The header's flags.
    pub flags: u16,
    /// Name, type and class as they were sent.
    pub question: &'a [u8],
    /// The type that is asked for.
    pub kind: u16,
    /// The class.
    pub class: u16,
    /// EDNS, where the client speaks it.
    pub edns: Option<Edns>,
}

/// Why a message is no query that can be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreadable {
    /// Shorter than a header: it deserves no response.
    TooShort,
    /// A response; an answer to it could go on without end.
    Response,
    /// A kind of query other than the ordinary one: NOTIMP.
    NotImplemented,
    /// Not one question, or something is malformed: FORMERR.
    Malformed,
}

impl<'a> Query<'a> {
    /// Reads a query.
    ///
    /// # Errors
    /// [`Unreadable`] says why it is none.
    pub fn parse(b: &'a [u8]) -> Result<Query<'a>, Unreadable> {
        if b.len() < HEADER {
            return Err(Unreadable::TooShort);
        }
        let head = be16(b, 2);
        if head & flags::QR != 0 {
            return Err(Unreadable::Response);
        }
        if head & flags::OPCODE != 0 {
            return Err(Unreadable::NotImplemented);
        }
        Query::body(b, head).ok_or(Unreadable::Malformed)
    }

    fn body(b: &'a [u8], head: u16) -> Option<Query<'a>> {
        let before = u32::from(be16(b, 6)) + u32::from(be16(b, 8));
        let records = before + u32::from(be16(b, 10));
        if be16(b, 4) != 1 || records > RECORDS_MAX {
            return None;
        }
        let end = name_end(b, HEADER, false)?;
        let question = b.get(HEADER..end + 4)?;
        let mut at = end + 4;
        let mut edns = None;
        for number in 0..records {
            let fixed = name_end(b, at, true)?;
            let data = fixed + 10;
            let next = data + usize::from(be16(b, fixed + 8));
            if next > b.len() || data > b.len() {
                return None;
            }
            if be16(b, fixed) == kind::OPT {
                if edns.is_some() || number < before || fixed != at + 1 {
                    return None;
                }
                let ttl = be32(b, fixed + 4);
                edns = Some(Edns { size: be16(b, fixed + 2), version: (ttl >> 16) as u8, flags: ttl as u16 });
            }
            at = next;
        }
        let (kind, class) = (be16(b, end), be16(b, end + 2));
        Some(Query { id: be16(b, 0), flags: head, question, kind, class, edns })
    }

    /// The name as labels.
    #[must_use]
    pub fn name(&self) -> &'a [u8] {
        self.question.get(..self.question.len().saturating_sub(4)).unwrap_or(&[])
    }

    /// The DO bit.
    #[must_use]
    pub fn wants_dnssec(&self) -> bool {
        self.edns.is_some_and(|e| e.flags & flags::DO != 0)
    }

    /// Bytes of a response that the client takes.
    #[must_use]
    pub fn largest(&self, tcp: bool) -> usize {
        match self.edns {
            _ if tcp => TCP_MAX,
            Some(e) => usize::from(e.size).clamp(PLAIN_MAX, UDP_MAX),
            None => PLAIN_MAX,
        }
    }
}

/// Puts the query for a name server in `out`: nothing of the client's message but what has a meaning there. EDNS is
/// between neighbours (RFC 6891 section 6.1.1), so the client's own options stay here. `size`: bytes of a response that is
/// asked for with EDNS; `None` for no EDNS.
pub fn emit_query(
    id: u16,
    client_flags: u16,
    question: &[u8],
    dnssec: bool,
    size: Option<u16>,
    out: &mut Vec<u8>,
) {
    out.clear();
    out.extend_from_slice(&id.to_be_bytes());
    out.extend_from_slice(&(client_flags & (flags::RD | flags::CD) | flags::AD).to_be_bytes());
    out.extend_from_slice(&[0, 1, 0, 0, 0, 0, 0, u8::from(size.is_some())]);
    out.extend_from_slice(question);
    if let Some(size) = size {
        opt(size, 0, if dnssec { flags::DO } else { 0 }, &[], out);
    }
}

/// Appends the response to a message that could not be read: only its header (RFC 1035 section 4.1.1). `b` has a header.
pub fn refuse(b: &[u8], code: u16, out: &mut Vec<u8>) {
    let head = flags::QR | be16(b, 2) & (flags::OPCODE | flags::RD) | code & 15;
    for word in [be16(b, 0), head, 0, 0, 0, 0] {
        out.extend_from_slice(&word.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EDNS: [u8; 11] = [0, 0, 41, 16, 0, 0, 0, 0x80, 0, 0, 0];

    fn query(more: &[u8], n: u8) -> Vec<u8> {
        let mut q =
            vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, n, 3, b'W', b'w', b'w', 2, b'a', b'b', 0, 0, 1, 0, 1];
        q.extend_from_slice(more);
        q
    }

    #[test]
    fn a_query_is_read_with_and_without_edns() {
        let plain = query(&[], 0);
        let q = Query::parse(&plain).unwrap();
        assert_eq!((q.id, q.flags, q.kind, q.class, q.edns), (0xabcd, flags::RD, 1, 1, None));
        assert_eq!((q.largest(false), q.largest(true)), (512, 65535));
        assert_eq!(q.name(), b"\x03Www\x02ab\0");
        let edns = query(&EDNS, 1);
        let q = Query::parse(&edns).unwrap();
        assert_eq!(q.edns, Some(Edns { size: 4096, version: 0, flags: 0x8000 }));
        assert_eq!((q.largest(false), q.wants_dnssec()), (1232, true));
        let mut out = Vec::new();
        emit_query(7, q.flags, q.question, q.wants_dnssec(), Some(1232), &mut out);
        let again = Query::parse(&out).unwrap();
        assert_eq!((again.id, again.question, again.wants_dnssec()), (7, q.question, true));
        emit_query(7, q.flags, q.question, true, None, &mut out);
        assert_eq!(Query::parse(&out).unwrap().edns, None);
    }

    #[test]
    fn options_and_unknown_records_are_skipped() {
        let cookie = [&[0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 12, 0, 10, 0, 8][..], &[1; 8]].concat();
        let with = query(&cookie, 1);
        assert_eq!(Query::parse(&with).unwrap().edns.unwrap().size, 1232);
        let other = [&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 1, 9][..], &EDNS].concat();
        let with = query(&other, 2);
        assert_eq!(Query::parse(&with).unwrap().edns.unwrap().size, 4096);
        let bytes_behind = query(&[0], 0);
        assert!(Query::parse(&bytes_behind).is_ok());
    }

    #[test]
    fn an_unreadable_message_says_how_it_is_refused() {
        let plain = query(&[], 0);
        assert_eq!(Query::parse(&plain[..11]), Err(Unreadable::TooShort));
        let with = |at: usize, byte: u8| {
            let mut b = plain.clone();
            b[at] = byte;
            Query::parse(&b).map(|_| ())
        };
        assert_eq!(with(2, 0x81), Err(Unreadable::Response));
        for opcode in 1..16 {
            assert_eq!(with(2, opcode << 3), Err(Unreadable::NotImplemented));
        }
        for (at, byte, what) in [
            (5, 0, "no question"),
            (5, 2, "two questions"),
            (12, 0xc0, "a compressed name"),
            (12, 0x40, "a label of an unknown kind"),
            (11, 1, "a record that is not there"),
            (11, 17, "too many records"),
        ] {
            assert_eq!(with(at, byte), Err(Unreadable::Malformed), "{what}");
        }
        for n in 12..plain.len() {
            assert_eq!(Query::parse(&plain[..n]), Err(Unreadable::Malformed), "{n}");
        }
        let edns = query(&EDNS, 1);
        for n in plain.len()..edns.len() {
            assert_eq!(Query::parse(&edns[..n]), Err(Unreadable::Malformed), "{n}");
        }
        assert_eq!(Query::parse(&query(&EDNS.repeat(2), 2)), Err(Unreadable::Malformed), "two EDNS records");
        let mut misplaced = query(&EDNS, 0);
        misplaced[7] = 1;
        assert_eq!(Query::parse(&misplaced), Err(Unreadable::Malformed), "EDNS in the answer section");
        let named = query(&[&[1, b'a'][..], &EDNS].concat(), 1);
        assert_eq!(Query::parse(&named), Err(Unreadable::Malformed), "EDNS with a name");
        let mut out = Vec::new();
        refuse(&plain, 1, &mut out);
        assert_eq!(out, [0xab, 0xcd, 0x81, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_name_has_255_bytes_at_most() {
        let name = |labels: usize, last: usize| {
            let mut q = query(&[], 0)[..12].to_vec();
            q.extend_from_slice(&b"\x03abc".repeat(labels));
            q.push(last as u8);
            q.extend_from_slice(&vec![b'a'; last]);
            q.extend_from_slice(if last > 0 { &[0, 0, 1, 0, 1] } else { &[0, 1, 0, 1] });
            q
        };
        assert!(Query::parse(&name(63, 1)).is_ok(), "255 bytes");
        assert_eq!(Query::parse(&name(63, 2)), Err(Unreadable::Malformed), "256 bytes");
    }
}
