//! The packets of a datagram of a QUIC client (RFC 9000 17, RFC 9369), and the frames of an Initial packet.

use crate::be32;

pub(super) const VERSION_1: u32 = 1;
pub(super) const VERSION_2: u32 = 0x6b33_43cf;
const CONNECTION_ID_MAX: usize = 20;
const TAG: usize = 16;

/// An Initial packet.
#[derive(Debug)]
pub(super) struct Initial<'a> {
    pub version: u32,
    pub connection_id: &'a [u8],
    /// All of it.
    pub bytes: &'a [u8],
    /// Where its packet number begins.
    pub number: usize,
}

/// A packet of a datagram.
#[derive(Debug)]
pub(super) enum Packet<'a> {
    Initial(Initial<'a>),
    /// 0-RTT or Handshake.
    Other,
    /// A short header, or none: the rest of the datagram.
    Rest,
    /// A version that is not known, in all of what is left.
    Unknown,
}

/// Packets of a datagram at most. A client sends up to four in one: one for each kind of keys.
const PACKETS_MAX: usize = 8;

/// The packets of a datagram. What follows a malformed one is dropped by a server too.
///
/// # Errors
/// There are too many.
pub(super) fn packets(datagram: &[u8]) -> Result<Vec<Packet<'_>>, &'static str> {
    let (mut rest, mut all) = (datagram, Vec::new());
    while !rest.is_empty()
        && let Some((packet, end)) = packet(rest)
    {
        if all.len() == PACKETS_MAX {
            return Err("a datagram with too many packets of QUIC");
        }
        all.push(packet);
        rest = rest.get(end..).unwrap_or(&[]);
    }
    Ok(all)
}

/// Reads a variable-length integer (RFC 9000 16) at `at`, and moves on.
fn varint(b: &[u8], at: &mut usize) -> Option<u64> {
    let first = *b.get(*at)?;
    let length = 1 << (first >> 6);
    let bytes = b.get(*at..*at + length)?;
    *at += length;
    Some(bytes.iter().skip(1).fold(u64::from(first & 0x3f), |n, byte| n << 8 | u64::from(*byte)))
}

fn varint_size(b: &[u8], at: &mut usize) -> Option<usize> {
    usize::try_from(varint(b, at)?).ok()
}

/// Reads the packet at the beginning of `b`, and says where the next one is. `None`: it is malformed.
fn packet(b: &[u8]) -> Option<(Packet<'_>, usize)> {
    let first = *b.first()?;
    if first & 0x80 == 0 {
        return Some((Packet::Rest, b.len()));
    }
    let (initial, retry) = match b.get(1..5).map(|v| be32(v, 0)) {
        Some(VERSION_1) => (0, 3),
        Some(VERSION_2) => (1, 0),
        _ => return Some((Packet::Unknown, b.len())),
    };
    let version = be32(b, 1);
    let mut at = 5;
    let mut connection_id = || {
        let length = usize::from(*b.get(at)?);
        let id = b.get(at + 1..at + 1 + length)?;
        at += 1 + length;
        Some(id)
    };
    let destination = connection_id()?;
    let source = connection_id()?;
    if destination.len() > CONNECTION_ID_MAX || source.len() > CONNECTION_ID_MAX {
        return None;
    }
    let kind = first >> 4 & 3;
    if kind == retry {
        return None; // a server's
    }
    if kind == initial {
        let token = varint_size(b, &mut at)?;
        at = at.checked_add(token)?;
    }
    let length = varint_size(b, &mut at)?;
    let end = at.checked_add(length)?;
    let bytes = b.get(..end)?;
    if kind != initial {
        return Some((Packet::Other, end));
    }
    // The sample of the header protection begins four bytes behind the number (RFC 9001 5.4.2).
    if length < 4 + TAG {
        return None;
    }
    Some((Packet::Initial(Initial { version, connection_id: destination, bytes, number: at }), end))
}

/// Calls `each` with every CRYPTO frame. False for frames that an Initial packet must not have.
pub(super) fn crypto_frames<'a>(b: &'a [u8], mut each: impl FnMut(usize, &'a [u8]) -> bool) -> bool {
    let mut at = 0;
    while at < b.len() {
        let fine = frame(b, &mut at, &mut each);
        if fine != Some(true) {
            return false;
        }
    }
    true
}

/// Reads one frame. `None`: it is cut off.
fn frame<'a>(b: &'a [u8], at: &mut usize, each: &mut impl FnMut(usize, &'a [u8]) -> bool) -> Option<bool> {
    match varint(b, at)? {
        // PADDING, PING.
        0 | 1 => Some(true),
        // ACK, with counts of ECN or without.
        kind @ (2 | 3) => {
            let (_largest, _delay) = (varint(b, at)?, varint(b, at)?);
            let ranges = varint(b, at)?;
            let counts = if kind == 3 { 3 } else { 0 };
            // Each takes two bytes at least, so the packet bounds them.
            for _ in 0..ranges.checked_mul(2)?.checked_add(1 + counts)? {
                varint(b, at)?;
            }
            Some(true)
        }
        6 => {
            let (offset, length) = (varint_size(b, at)?, varint_size(b, at)?);
            let data = b.get(*at..at.checked_add(length)?)?;
            *at += length;
            Some(each(offset, data))
        }
        // CONNECTION_CLOSE.
        0x1c => {
            let (_error, _frame) = (varint(b, at)?, varint(b, at)?);
            let reason = varint_size(b, at)?;
            *at = at.checked_add(reason).filter(|end| *end <= b.len())?;
            Some(true)
        }
        _ => Some(false),
    }
}
