//! Theory of operation: responses of the network's own. They are built once, read as [`Answer`], and from there treated as
//! those of a name server. [`join`] puts a name server's records behind an alias of the network's own; their names are
//! expanded, since pointers mean places in the message that they came in. Names in data are only expanded where
//! compression is allowed (RFC 3597 section 4); all other data is copied.

use super::answer::Answer;
use super::format::{HEADER, IN, TCP_MAX, expand_name, flags};
use crate::{be16, be32};

/// A record: name and data in wire format, uncompressed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The name as labels.
    pub name: Box<[u8]>,
    /// The type.
    pub kind: u16,
    /// Seconds that it holds.
    pub ttl: u32,
    /// The data.
    pub data: Box<[u8]>,
}

/// The message of a response: `question` is name, type and class. `None` when it is over 65535 bytes.
#[must_use]
pub fn build(
    question: &[u8],
    code: u16,
    head: u16,
    answers: &[Record],
    authority: &[Record],
) -> Option<Vec<u8>> {
    let mut out = begin(question, code, head);
    answers.iter().chain(authority).try_for_each(|r| put_record(question, r, &mut out))?;
    finish(out, answers.len(), authority.len())
}

/// The message of a response that begins with the records of an alias, `chain`, and goes on with those of the response
/// to the name that it points to. `None` when that is malformed, or the whole is over 65535 bytes.
#[must_use]
pub fn join(question: &[u8], chain: &[Record], tail: &[u8], shape: &Answer) -> Option<Vec<u8>> {
    let mut out = begin(question, shape.rcode & 15, 0);
    chain.iter().try_for_each(|r| put_record(question, r, &mut out))?;
    let [answers, authorities, _] = shape.counts.map(usize::from);
    let (mut at, mut counts) = (shape.question.end, [chain.len(), 0]);
    for number in 0..answers + authorities {
        let before = out.len();
        let (next, class) = put_expanded(tail, at, &mut out)?;
        at = next;
        if class != IN {
            out.truncate(before);
        } else if let Some(count) = counts.get_mut(usize::from(number >= answers)) {
            *count += 1;
        }
        if out.len() > TCP_MAX {
            return None;
        }
    }
    let [answers, authorities] = counts;
    finish(out, answers, authorities)
}

/// The section that a record is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Section {
    /// The answer.
    Answer,
    /// The authority.
    Authority,
}

/// The records of the answer and the authority section of a message, of the class IN, without compression. `None` when
/// one of them is malformed.
#[must_use]
pub fn records(message: &[u8], shape: &Answer) -> Option<Vec<(Section, Record)>> {
    let [answers, authorities, _] = shape.counts.map(usize::from);
    let (mut at, mut out) = (shape.question.end, Vec::with_capacity(answers + authorities));
    for number in 0..answers + authorities {
        let mut bytes = Vec::new();
        let (next, class) = put_expanded(message, at, &mut bytes)?;
        at = next;
        if class != IN {
            continue;
        }
        let mut name = Vec::new();
        let fixed = expand_name(&bytes, 0, &mut name)?;
        let section = if number < answers { Section::Answer } else { Section::Authority };
        let data = bytes.get(fixed + 10..)?.into();
        let record =
            Record { name: name.into(), kind: be16(&bytes, fixed), ttl: be32(&bytes, fixed + 4), data };
        out.push((section, record));
    }
    Some(out)
}

/// The option of an extended error (RFC 8914), which people see who look at responses with a tool.
#[must_use]
pub fn explain(code: u16, text: &str) -> Vec<u8> {
    let words = [super::answer::EXPLANATION, 2 + text.len() as u16, code];
    let mut out: Vec<u8> = words.iter().flat_map(|w| w.to_be_bytes()).collect();
    out.extend_from_slice(text.as_bytes());
    out
}

fn begin(question: &[u8], code: u16, head: u16) -> Vec<u8> {
    let mut out = Vec::with_capacity(512);
    for word in [0, flags::QR | flags::RA | head | code & 15, 1, 0, 0, 0] {
        out.extend_from_slice(&word.to_be_bytes());
    }
    out.extend_from_slice(question);
    out
}

fn finish(mut out: Vec<u8>, answers: usize, authorities: usize) -> Option<Vec<u8>> {
    if out.len() > TCP_MAX {
        return None;
    }
    // Each record is longer than a byte, so the numbers fit.
    crate::put(&mut out, 6, &(answers as u16).to_be_bytes());
    crate::put(&mut out, 8, &(authorities as u16).to_be_bytes());
    Some(out)
}

/// The name that was asked for becomes a pointer to the question, which has the client's spelling.
fn put_record(question: &[u8], record: &Record, out: &mut Vec<u8>) -> Option<()> {
    let asked = question.get(..question.len().checked_sub(4)?)?;
    if record.name.eq_ignore_ascii_case(asked) {
        out.extend_from_slice(&[0xc0, HEADER as u8]);
    } else {
        out.extend_from_slice(&record.name);
    }
    out.extend_from_slice(&record.kind.to_be_bytes());
    out.extend_from_slice(&IN.to_be_bytes());
    out.extend_from_slice(&record.ttl.to_be_bytes());
    out.extend_from_slice(&u16::try_from(record.data.len()).ok()?.to_be_bytes());
    out.extend_from_slice(&record.data);
    (out.len() <= TCP_MAX).then_some(())
}

/// A part of a record's data.
enum Part {
    /// So many bytes.
    Bytes(usize),
    /// A string: its length and that many bytes.
    Text,
    /// A name that may be compressed.
    Name,
}

/// The parts of the data of a type in which names may be compressed, or may once have been; what follows is copied.
fn parts(kind: u16) -> &'static [Part] {
    use Part::{Bytes, Name, Text};
    match kind {
        // NS, MD, MF, CNAME, MB, MG, MR, PTR, NXT, DNAME
        2..=5 | 7..=9 | 12 | 30 | 39 => &[Name],
        // SOA, MINFO, RP
        6 | 14 | 17 => &[Name, Name],
        // MX, AFSDB, RT, KX
        15 | 18 | 21 | 36 => &[Bytes(2), Name],
        // SIG
        24 => &[Bytes(18), Name],
        // PX
        26 => &[Bytes(2), Name, Name],
        // SRV
        33 => &[Bytes(6), Name],
        // NAPTR
        35 => &[Bytes(4), Text, Text, Text, Name],
        _ => &[],
    }
}

/// Appends the record at `at` of another message without compression; where it ends there, and its class.
fn put_expanded(b: &[u8], at: usize, out: &mut Vec<u8>) -> Option<(usize, u16)> {
    let fixed = expand_name(b, at, out)?;
    let data = fixed + 10;
    let end = data + usize::from(be16(b, fixed + 8));
    if end > b.len() {
        return None;
    }
    let ttl = super::answer::seconds(be32(b, fixed + 4));
    out.extend_from_slice(b.get(fixed..fixed + 4)?);
    out.extend_from_slice(&ttl.to_be_bytes());
    out.extend_from_slice(&[0, 0]);
    let (start, mut at) = (out.len(), data);
    for part in parts(be16(b, fixed)) {
        let next = match part {
            Part::Bytes(n) => at + n,
            Part::Text => at + 1 + usize::from(*b.get(at)?),
            Part::Name => {
                // A name in the data of a record must end there; the place that a pointer leads to may be anywhere.
                at = expand_name(b, at, out).filter(|next| *next <= end)?;
                continue;
            }
        };
        out.extend_from_slice(b.get(at..next).filter(|_| next <= end)?);
        at = next;
    }
    out.extend_from_slice(b.get(at..end)?);
    let length = u16::try_from(out.len() - start).ok()?;
    crate::put(out, start - 2, &length.to_be_bytes());
    Some((end, be16(b, fixed + 2)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dns::ede;

    const QUESTION: &[u8] = b"\x02my\x07example\0\0\x01\0\x01";

    fn record(name: &[u8], kind: u16, data: &[u8]) -> Record {
        Record { name: name.into(), kind, ttl: 60, data: data.into() }
    }

    #[test]
    fn a_response_of_our_own_is_read_as_any_other() {
        let soa = [&b"\x02ns\0\x01h\0"[..], &[0; 16], &[0, 0, 0, 5]].concat();
        let (a, authority) = (record(b"\x02MY\x07example\0", 1, &[192, 0, 2, 7]), record(b"\0", 6, &soa));
        let message = build(QUESTION, 0, flags::AA, &[a], &[authority]).unwrap();
        let shape = Answer::parse(&message).unwrap();
        assert_eq!((shape.counts, shape.lifetime, shape.end), ([1, 1, 0], 60, message.len()));
        assert_eq!(shape.flags, flags::QR | flags::AA | flags::RA);
        assert_eq!(message[12 + QUESTION.len()..][..2], [0xc0, 12]);
        let large = record(b"\0", 16, &[0; 40_000]);
        assert_eq!(build(QUESTION, 0, 0, &[large.clone(), large], &[]), None);
    }

    #[test]
    fn the_records_of_an_alias_are_put_before_those_of_its_target() {
        // www.ab CNAME real.ab, real.ab A, all compressed; one of another class, and an SOA.
        let mut tail = vec![0, 0, 0x81, 0x80, 0, 1, 0, 3, 0, 1, 0, 0];
        tail.extend_from_slice(b"\x03www\x02ab\0\0\x01\0\x01");
        tail.extend_from_slice(b"\xc0\x0c\0\x05\0\x01\0\0\0\x3c\0\x07\x04real\xc0\x10");
        let real = tail.len() - 7;
        tail.extend_from_slice(&[0xc0, real as u8, 0, 1, 0, 1, 0, 0, 0, 30, 0, 4, 192, 0, 2, 80]);
        tail.extend_from_slice(b"\xc0\x0c\0\x41\0\xff\0\0\0\x3c\0\x01x");
        tail.extend_from_slice(b"\xc0\x10\0\x06\0\x01\0\0\0\x3c\0\x18\xc0\x0c\xc0\x10");
        tail.extend_from_slice(&[0; 20]);
        let shape = Answer::parse(&tail).unwrap();
        let chain = [record(b"\x02my\x07example\0", 5, b"\x03www\x02ab\0")];
        let message = join(QUESTION, &chain, &tail, &shape).unwrap();
        let joined = Answer::parse(&message).unwrap();
        assert_eq!(joined.counts, [3, 1, 0]);
        assert!(message.windows(18).any(|w| w == b"\x03www\x02ab\0\0\x05\0\x01\0\0\0\x3c\0\x09"));
        assert!(message.windows(9).any(|w| w == b"\x04real\x02ab\0"));
        let soa = [&b"\0\x20\x03www\x02ab\0\x02ab\0"[..], &[0; 20]].concat();
        assert!(message.ends_with(&soa), "names in data are expanded, and its length is right");
        // Only what is cut off or points out of order is refused.
        for n in shape.question.end..tail.len() {
            assert_eq!(join(QUESTION, &chain, &tail[..n], &shape), None, "{n}");
        }
    }

    #[test]
    fn an_explanation_is_an_option_of_edns() {
        assert_eq!(explain(ede::NO_REACHABLE_AUTHORITY, "no"), [0, 15, 0, 4, 0, 22, b'n', b'o']);
    }
}
