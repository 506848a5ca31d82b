//! Theory of operation: the ClientHello of a QUIC connection is in the CRYPTO frames of Initial packets, which are encrypted
//! with keys that everybody can derive from the destination connection id of the client's first packet ([`keys`]).
//!
//! - One inspector reads the datagrams of a flow as long as it lives. [`QuicInspector::feed`] takes them until every
//!   ClientHello that has begun is complete. A datagram may have several packets, a ClientHello several datagrams, in any
//!   order. Then [`QuicInspector::check`] says whether a datagram shows anything new, which is for `feed` again.
//! - Each connection id under whose keys a packet opens is a connection of its own. After a Retry the client begins again
//!   with the id of the Retry, and after a Version Negotiation with another version. After the server's first packet it
//!   uses an id that the server chose, and the same keys; the server may have it go on in another version (RFC 9368).
//! - After a HelloRetryRequest a second ClientHello follows the first one in the same stream. It has the same name.
//! - An Initial packet may have the frames PADDING, PING, ACK, CRYPTO and CONNECTION_CLOSE (RFC 9000 12.4).
//! - Nothing that a server may read is skipped: an Initial packet that no known key opens, frames that contradict each
//!   other, and more packets than a client sends are malformed.
//!
//! Bounds: [`HELD_MAX`] bytes of CRYPTO data of all connections, 64 pieces of one with gaps between them, eight packets of a
//! datagram, and [`CONNECTIONS_MAX`] connections, of which the oldest is forgotten.

mod crypto;
mod keys;
mod packet;

use super::hello::ClientHello;
use super::progress::{HELD_MAX, Progress};
use crypto::Crypto;
use keys::Keys;
use packet::{Initial, Packet, crypto_frames, packets};

/// Connections that are known at a time.
const CONNECTIONS_MAX: usize = 4;
const CLIENT_HELLO: u8 = 1;

/// What a later datagram of a flow is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuicCheck {
    /// Of a connection that is known, with nothing new to read.
    Same,
    /// It begins another connection, or shows something else. [`QuicInspector::feed`] has to read it.
    Another,
}

/// A connection: the keys of its first packet, and what has come under them.
#[derive(Debug, Clone)]
struct Connection {
    keys: Keys,
    /// The largest packet number.
    largest: u64,
    crypto: Crypto,
    /// Bytes of it that are ClientHellos.
    read: usize,
    hello: Option<ClientHello>,
    /// The caller knows of the hello.
    reported: bool,
}

impl Connection {
    /// Whether more has to come.
    fn waits(&self) -> bool {
        self.hello.is_none() || self.crypto.has_more(self.read)
    }

    /// Opens a packet of the same version.
    fn open(&self, p: &Initial<'_>) -> Option<(Vec<u8>, u64)> {
        if self.keys.version == p.version { self.keys.open(p, Some(self.largest)) } else { None }
    }

    /// Opens a packet of another version that goes on with this connection. Some clients still use the keys of the first
    /// version then.
    fn open_other_version(&self, p: &Initial<'_>) -> Option<(Vec<u8>, u64)> {
        if self.keys.version == p.version || self.keys.connection_id == p.connection_id {
            return None;
        }
        let largest = Some(self.largest);
        let opened = Keys::new(p.version, &self.keys.connection_id)?.open(p, largest);
        opened.or_else(|| self.keys.open(p, largest))
    }

    /// Reads the frames of a packet, with `room` for so many bytes of CRYPTO data.
    fn take(&mut self, frames: &[u8], number: u64, room: usize) -> Result<(), &'static str> {
        self.largest = self.largest.max(number);
        if !crypto_frames(frames, |at, data| self.crypto.add(at, data, room)) {
            return Err("an Initial packet with frames that it must not have, or that contradict others");
        }
        while let Some(message) = self.crypto.prefix().get(self.read..)
            && let Some(kind) = message.first()
        {
            if *kind != CLIENT_HELLO {
                return Err("CRYPTO data that is no ClientHello");
            }
            let Some(&[_, a, b, c]) = message.first_chunk() else { break };
            let length = 4 + (usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c));
            if length > HELD_MAX {
                return Err("a ClientHello that is too long");
            }
            let Some(body) = message.get(4..length) else { break };
            let hello = ClientHello::parse(body)?;
            if self.hello.as_ref().is_some_and(|first| first.server_name != hello.server_name) {
                return Err("a second ClientHello for another name");
            }
            (self.hello, self.reported) = (Some(hello), false);
            self.read += length;
        }
        Ok(())
    }
}

/// Reads the ClientHellos of the QUIC connections of a flow.
///
/// ```
/// use guestnet_wire::inspect::{Progress, QuicInspector};
/// // No long header: no QUIC connection begins like that.
/// assert_eq!(QuicInspector::new().feed(b"hello"), Progress::Opaque("no QUIC"));
/// ```
#[derive(Debug, Default, Clone)]
pub struct QuicInspector {
    /// The newest is the last.
    connections: Vec<Connection>,
    /// What was wrong.
    malformed: Option<&'static str>,
}

impl QuicInspector {
    /// Nothing has come.
    #[must_use]
    pub fn new() -> QuicInspector {
        QuicInspector::default()
    }

    /// Takes the next datagram of the client.
    ///
    /// - [`Progress::More`]: something has begun. This datagram and those behind it must wait.
    /// - [`Progress::Tls`]: all that has begun is complete, and this is its ClientHello.
    /// - [`Progress::Opaque`]: it is no beginning of a QUIC connection. A later datagram may be one.
    /// - [`Progress::Malformed`] is final.
    pub fn feed(&mut self, datagram: &[u8]) -> Progress {
        let read = match self.malformed {
            Some(why) => Err(why),
            None => self.read(datagram),
        };
        read.unwrap_or_else(|why| {
            (self.malformed, self.connections) = (Some(why), Vec::new());
            Progress::Malformed(why)
        })
    }

    fn read(&mut self, datagram: &[u8]) -> Result<Progress, &'static str> {
        let packets = packets(datagram)?;
        for packet in &packets {
            if let Packet::Initial(initial) = packet {
                self.initial(initial)?;
            }
        }
        let waits = self.waits();
        match packets.first() {
            Some(Packet::Unknown) if waits => return Err("an unknown version of QUIC within a ClientHello"),
            Some(Packet::Unknown) => return Ok(Progress::Opaque("an unknown version of QUIC")),
            _ if waits => return Ok(Progress::More),
            None if !datagram.is_empty() => return Err("a packet of QUIC that is cut off"),
            Some(Packet::Rest) | None => return Ok(Progress::Opaque("no QUIC")),
            _ => {}
        }
        let mut new = None::<ClientHello>;
        for c in self.connections.iter_mut().filter(|c| !c.reported) {
            c.reported = true;
            let Some(hello) = &c.hello else { continue };
            match &mut new {
                Some(n) if n.server_name != hello.server_name => {
                    return Err("two connections for different names at once");
                }
                Some(n) => n.ech |= hello.ech,
                None => new = Some(hello.clone()),
            }
        }
        let known = || self.connections.last().and_then(|c| c.hello.clone());
        Ok(new.or_else(known).map_or(Progress::Opaque("QUIC without a beginning"), Progress::Tls))
    }

    /// Whether something has begun and is not complete.
    fn waits(&self) -> bool {
        self.connections.iter().any(Connection::waits)
    }

    /// Room for CRYPTO data of a connection beside the `others`.
    fn room<'a>(others: impl Iterator<Item = &'a Connection>) -> usize {
        HELD_MAX.saturating_sub(others.map(|c| c.crypto.bytes.len()).sum())
    }

    fn initial(&mut self, p: &Initial<'_>) -> Result<(), &'static str> {
        let mut opened = self.open(p);
        if opened.is_none()
            && let Some(keys) = Keys::new(p.version, p.connection_id)
            && let Some((frames, number)) = keys.open(p, None)
        {
            self.make_room()?;
            let (largest, crypto, read) = (number, Crypto::default(), 0);
            self.connections.push(Connection { keys, largest, crypto, read, hello: None, reported: false });
            opened = Some((self.connections.len() - 1, frames, number));
        }
        let opened = opened.or_else(|| self.open_other_version(p));
        let (at, frames, number) = opened.ok_or("an Initial packet that no known key opens")?;
        let others = self.connections.iter().enumerate().filter(|(n, _)| *n != at).map(|(_, c)| c);
        let room = Self::room(others);
        match self.connections.get_mut(at) {
            Some(c) => c.take(&frames, number, room),
            None => Ok(()),
        }
    }

    /// Opens a packet with the keys of a known connection, and says of which.
    fn open(&self, p: &Initial<'_>) -> Option<(usize, Vec<u8>, u64)> {
        let opens = |(at, c): (usize, &Connection)| c.open(p).map(|(frames, number)| (at, frames, number));
        self.connections.iter().enumerate().rev().find_map(opens)
    }

    fn open_other_version(&self, p: &Initial<'_>) -> Option<(usize, Vec<u8>, u64)> {
        let opens = |(at, c): (usize, &Connection)| {
            c.open_other_version(p).map(|(frames, number)| (at, frames, number))
        };
        self.connections.iter().enumerate().rev().find_map(opens)
    }

    /// Forgets the oldest connection if there are too many.
    fn make_room(&mut self) -> Result<(), &'static str> {
        if self.connections.len() < CONNECTIONS_MAX {
            return Ok(());
        }
        let oldest = self.connections.iter().position(|c| !c.waits() && c.reported);
        self.connections.remove(oldest.ok_or("too many connections at once")?);
        Ok(())
    }

    /// Says whether a datagram shows anything that [`QuicInspector::feed`] has to read, or belongs to a connection that
    /// is not complete. A datagram of a connection that is complete is [`QuicCheck::Same`] while another one waits too.
    #[must_use]
    pub fn check(&self, datagram: &[u8]) -> QuicCheck {
        // Most datagrams have a short header, and are through here.
        if datagram.first().is_none_or(|first| first & 0x80 == 0) {
            return QuicCheck::Same;
        }
        let Ok(packets) = packets(datagram) else { return QuicCheck::Another };
        let waits = self.waits();
        let news = |p: &Packet<'_>| match p {
            Packet::Initial(initial) => self.is_news(initial),
            Packet::Other => waits,
            Packet::Rest | Packet::Unknown => false,
        };
        let unknown = matches!(packets.first(), Some(Packet::Unknown));
        if unknown || packets.iter().any(news) { QuicCheck::Another } else { QuicCheck::Same }
    }

    fn is_news(&self, p: &Initial<'_>) -> bool {
        let known = self.open(p).or_else(|| {
            // Its own keys come first, as above.
            let own = Keys::new(p.version, p.connection_id).is_some_and(|keys| keys.open(p, None).is_some());
            if own { None } else { self.open_other_version(p) }
        });
        let Some((at, frames, _)) = known else { return true };
        let Some(c) = self.connections.get(at) else { return true };
        c.waits() || !crypto_frames(&frames, |at, data| c.crypto.repeats(at, data))
    }

    /// Bytes of memory that it holds.
    #[must_use]
    pub fn memory(&self) -> usize {
        let crypto: usize = self
            .connections
            .iter()
            .map(|c| c.crypto.bytes.capacity() + c.crypto.pieces.capacity() * 16)
            .sum();
        crypto + self.connections.capacity() * size_of::<Connection>()
    }
}

#[cfg(test)]
mod tests;
