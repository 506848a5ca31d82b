//! Theory of operation: the ClientHello of a QUIC connection is in the CRYPTO frames of Initial packets, which are encrypted
//! with keys that everybody can derive from the destination connection id of the client's first packet (RFC 9001 5.2;
//! RFC 9369 for version 2).
//!
//! - [`QuicInspector::feed`] takes the datagrams of the client until the ClientHello is complete. A datagram may have
//!   several packets, a ClientHello several datagrams, in any order. Packets with other keys are skipped.
//! - After a Retry the keys come from the connection id of the Retry. The client begins again with the same hello.
//! - [`QuicInspector::check`] takes the datagrams behind that. A new Initial packet that belongs to another connection is
//!   reported, so that it is inspected too.
//! - An Initial packet may have the frames PADDING, PING, ACK, CRYPTO and CONNECTION_CLOSE (RFC 9000 12.4).
//!
//! Bounds: [`HELD_MAX`] bytes of CRYPTO data, [`PIECES_MAX`] pieces with gaps between them, one decryption for each packet
//! of a datagram, [`PACKETS_MAX`] packets of it.

use super::tls::ClientHello;
use super::{HELD_MAX, Progress};
use crate::be32;
use aes::Aes128;
use aes::cipher::{BlockCipherEncrypt, KeyInit};
use aes_gcm::Aes128Gcm;
use aes_gcm::aead::{Aead, Payload};
use hkdf::Hkdf;
use sha2::Sha256;

const VERSION_1: u32 = 1;
const VERSION_2: u32 = 0x6b33_43cf;
const SALT_1: [u8; 20] = [
    0x38, 0x76, 0x2c, 0xf7, 0xf5, 0x59, 0x34, 0xb3, 0x4d, 0x17, 0x9a, 0xe6, 0xa4, 0xc8, 0x0c, 0xad, 0xcc,
    0xbb, 0x7f, 0x0a,
];
const SALT_2: [u8; 20] = [
    0x0d, 0xed, 0xe3, 0xde, 0xf7, 0x00, 0xa6, 0xdb, 0x81, 0x93, 0x81, 0xbe, 0x6e, 0x26, 0x9d, 0xcb, 0xf9,
    0xbd, 0x2e, 0xd9,
];
const CONNECTION_ID_MAX: usize = 20;
const TAG: usize = 16;
/// Pieces of CRYPTO data that wait for what is before them.
const PIECES_MAX: usize = 64;
/// Packets of a datagram that are looked at.
const PACKETS_MAX: usize = 8;
const CLIENT_HELLO: u8 = 1;

/// What a later datagram of a flow is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuicCheck {
    /// Of the connection that is known, or nothing that a server would take.
    Same,
    /// It begins another connection, or shows another ClientHello.
    Another,
}

/// The client's keys for Initial packets.
struct Keys {
    version: u32,
    connection_id: Vec<u8>,
    packet: Aes128Gcm,
    iv: [u8; 12],
    header: Aes128,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keys").field("version", &self.version).finish_non_exhaustive()
    }
}

/// `HKDF-Expand-Label` of TLS 1.3 without a context (RFC 8446 7.1).
fn expand(secret: &Hkdf<Sha256>, label: &str, out: &mut [u8]) -> Option<()> {
    let length = u16::try_from(out.len()).ok()?.to_be_bytes();
    let label_length = u8::try_from(label.len() + 6).ok()?;
    let info = [&length[..], &[label_length], b"tls13 ", label.as_bytes(), &[0]].concat();
    secret.expand(&info, out).ok()
}

impl Keys {
    fn new(version: u32, connection_id: &[u8]) -> Option<Keys> {
        let (salt, prefix) = match version {
            VERSION_1 => (SALT_1, "quic"),
            VERSION_2 => (SALT_2, "quicv2"),
            _ => return None,
        };
        let initial = Hkdf::<Sha256>::new(Some(&salt), connection_id);
        let mut secret = [0; 32];
        expand(&initial, "client in", &mut secret)?;
        let secret = Hkdf::<Sha256>::from_prk(&secret).ok()?;
        let (mut key, mut iv, mut header) = ([0; 16], [0; 12], [0; 16]);
        expand(&secret, &format!("{prefix} key"), &mut key)?;
        expand(&secret, &format!("{prefix} iv"), &mut iv)?;
        expand(&secret, &format!("{prefix} hp"), &mut header)?;
        Some(Keys {
            version,
            connection_id: connection_id.to_vec(),
            packet: Aes128Gcm::new(&key.into()),
            iv,
            header: Aes128::new(&header.into()),
        })
    }

    /// The frames of an Initial packet; `None` when it was made with other keys.
    fn open(&self, p: &Initial<'_>) -> Option<Vec<u8>> {
        let sample: [u8; 16] = p.bytes.get(p.number + 4..p.number + 20)?.try_into().ok()?;
        let mut mask = sample.into();
        self.header.encrypt_block(&mut mask);
        let mut head = p.bytes.get(..p.number + 4)?.to_vec();
        *head.first_mut()? ^= mask.first()? & 0x0f;
        let length = usize::from(head.first()? & 3) + 1;
        for (byte, mask) in head.get_mut(p.number..p.number + length)?.iter_mut().zip(mask.iter().skip(1)) {
            *byte ^= mask;
        }
        head.truncate(p.number + length);
        let mut nonce = self.iv;
        // A client counts its packets from 0, so the number is not shortened.
        for (n, byte) in nonce.iter_mut().rev().zip(head.get(p.number..)?.iter().rev()) {
            *n ^= byte;
        }
        let msg = p.bytes.get(p.number + length..)?;
        self.packet.decrypt(&nonce.into(), Payload { msg, aad: &head }).ok()
    }
}

/// An Initial packet.
struct Initial<'a> {
    version: u32,
    connection_id: &'a [u8],
    /// All of it.
    bytes: &'a [u8],
    /// Where its packet number begins.
    number: usize,
}

/// A packet of a datagram.
enum Packet<'a> {
    Initial(Initial<'a>),
    /// 0-RTT or Handshake.
    Other,
    /// A short header, or none: the rest of the datagram.
    Rest,
    /// A version that is not known.
    Unknown,
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
    let version = be32(b.get(1..5)?, 0);
    let mut at = 5;
    let mut connection_id = || {
        let length = usize::from(*b.get(at)?);
        let id = b.get(at + 1..at + 1 + length)?;
        at += 1 + length;
        Some(id)
    };
    let destination = connection_id()?;
    let source = connection_id()?;
    let (initial, retry) = match version {
        VERSION_1 => (0, 3),
        VERSION_2 => (1, 0),
        _ => return Some((Packet::Unknown, b.len())),
    };
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

/// CRYPTO data, put together.
#[derive(Debug, Default)]
struct Crypto {
    bytes: Vec<u8>,
    /// Pieces that have come, in order, with gaps between them.
    pieces: Vec<(usize, usize)>,
}

impl Crypto {
    /// Adds a piece. False when it contradicts what came before, or is too much.
    fn add(&mut self, at: usize, data: &[u8]) -> bool {
        let Some(end) = at.checked_add(data.len()).filter(|end| *end <= HELD_MAX) else { return false };
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        let overlaps = self.pieces.iter().filter(|(from, to)| *from < end && at < *to);
        for (from, to) in overlaps {
            let (from, to) = (at.max(*from), end.min(*to));
            if self.bytes.get(from..to) != data.get(from - at..to - at) {
                return false;
            }
        }
        if let Some(place) = self.bytes.get_mut(at..end) {
            place.copy_from_slice(data);
        }
        let (mut from, mut to) = (at, end);
        self.pieces.retain(|p| {
            let apart = p.1 < from || to < p.0;
            if !apart {
                (from, to) = (from.min(p.0), to.max(p.1));
            }
            apart
        });
        let place = self.pieces.partition_point(|p| p.0 < from);
        self.pieces.insert(place, (from, to));
        self.pieces.len() <= PIECES_MAX
    }

    /// Whether a piece says what is known already.
    fn repeats(&self, at: usize, data: &[u8]) -> bool {
        self.bytes.get(at..).is_some_and(|known| known.starts_with(data))
    }

    /// What has come without a gap.
    fn prefix(&self) -> &[u8] {
        match self.pieces.first() {
            Some((0, end)) => self.bytes.get(..*end).unwrap_or(&[]),
            _ => &[],
        }
    }

    /// The ClientHello; `None` while it is not complete.
    fn hello(&self) -> Option<Progress> {
        let bytes = self.prefix();
        if *bytes.first()? != CLIENT_HELLO {
            return Some(Progress::Malformed("CRYPTO data that begins with no ClientHello"));
        }
        let length = be32(bytes.get(..4)?, 0) as usize & 0x00ff_ffff;
        if length + 4 > HELD_MAX {
            return Some(Progress::Malformed("a ClientHello over 64 KiB"));
        }
        let body = bytes.get(4..4 + length)?;
        Some(match ClientHello::parse(body) {
            Ok(hello) => Progress::Tls(hello),
            Err(why) => Progress::Malformed(why),
        })
    }
}

/// Calls `each` with every CRYPTO frame. False for frames that an Initial packet must not have.
fn crypto_frames<'a>(b: &'a [u8], mut each: impl FnMut(usize, &'a [u8]) -> bool) -> bool {
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

/// Reads the ClientHello of a QUIC connection.
///
/// ```
/// use guestnet_wire::inspect::{Progress, QuicInspector};
/// // No long header: no QUIC connection begins like that.
/// assert_eq!(QuicInspector::new().feed(b"hello"), Progress::Opaque("no QUIC"));
/// ```
#[derive(Debug, Default)]
pub struct QuicInspector {
    keys: Option<Keys>,
    crypto: Crypto,
    known: Option<Progress>,
}

impl QuicInspector {
    /// Nothing has come.
    #[must_use]
    pub fn new() -> QuicInspector {
        QuicInspector::default()
    }

    /// Takes the next datagram of the client.
    pub fn feed(&mut self, datagram: &[u8]) -> Progress {
        if let Some(known) = &self.known {
            return known.clone();
        }
        let progress = self.read(datagram);
        if progress != Progress::More {
            self.known = Some(progress.clone());
        }
        progress
    }

    fn read(&mut self, datagram: &[u8]) -> Progress {
        let mut rest = datagram;
        for _ in 0..PACKETS_MAX {
            if rest.is_empty() {
                break;
            }
            let Some((packet, end)) = packet(rest) else {
                // Zeros behind the last packet are padding of some.
                return match self.keys {
                    Some(_) if rest.len() < datagram.len() => Progress::More,
                    _ => Progress::Malformed("a packet of QUIC that is cut off"),
                };
            };
            match packet {
                Packet::Initial(initial) => {
                    if let Some(progress) = self.initial(&initial) {
                        return progress;
                    }
                }
                Packet::Other => {}
                Packet::Unknown => return Progress::Opaque("an unknown version of QUIC"),
                Packet::Rest if self.keys.is_none() => return Progress::Opaque("no QUIC"),
                Packet::Rest => break,
            }
            rest = rest.get(end..).unwrap_or(&[]);
        }
        match self.keys {
            Some(_) => Progress::More,
            None => Progress::Opaque("QUIC without a beginning"),
        }
    }

    fn initial(&mut self, p: &Initial<'_>) -> Option<Progress> {
        let of_known = self.keys.as_ref().filter(|k| k.version == p.version).and_then(|k| k.open(p));
        let frames = match of_known {
            Some(frames) => frames,
            None => {
                if self.keys.as_ref().is_some_and(|k| k.connection_id == p.connection_id) {
                    return None; // a damaged packet, which a server does not take either
                }
                // The first packet, or the first one after a Retry: then all begins again.
                let keys = Keys::new(p.version, p.connection_id)?;
                let frames = keys.open(p)?;
                self.keys = Some(keys);
                self.crypto = Crypto::default();
                frames
            }
        };
        if !crypto_frames(&frames, |at, data| self.crypto.add(at, data)) {
            return Some(Progress::Malformed("an Initial packet with frames that it must not have"));
        }
        self.crypto.hello()
    }

    /// Says whether a later datagram of the flow begins another connection. To be asked once [`QuicInspector::feed`] has
    /// returned [`Progress::Tls`].
    #[must_use]
    pub fn check(&self, datagram: &[u8]) -> QuicCheck {
        let mut rest = datagram;
        for _ in 0..PACKETS_MAX {
            // Most datagrams have a short header, and are through here.
            if rest.first().is_none_or(|first| first & 0x80 == 0) {
                return QuicCheck::Same;
            }
            let Some((packet, end)) = packet(rest) else { return QuicCheck::Same };
            match packet {
                Packet::Initial(initial) if self.is_another(&initial) => return QuicCheck::Another,
                // A server may know a version that is not known here.
                Packet::Unknown => return QuicCheck::Another,
                Packet::Initial(_) | Packet::Other | Packet::Rest => {}
            }
            rest = rest.get(end..).unwrap_or(&[]);
        }
        QuicCheck::Same
    }

    fn is_another(&self, p: &Initial<'_>) -> bool {
        let of_known = self.keys.as_ref().filter(|k| k.version == p.version).and_then(|k| k.open(p));
        match of_known {
            Some(frames) => !crypto_frames(&frames, |at, data| self.crypto.repeats(at, data)),
            None => Keys::new(p.version, p.connection_id).is_some_and(|keys| keys.open(p).is_some()),
        }
    }

    /// Bytes of memory that it holds.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.crypto.bytes.capacity() + self.crypto.pieces.capacity() * 16 + size_of::<Keys>()
    }
}

#[cfg(test)]
mod tests;
