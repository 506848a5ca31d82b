//! Theory of operation: the client's side of a TLS connection, as far as it is readable (RFC 8446). [`TlsReader`] takes
//! records apart, puts handshake messages together and reads ClientHellos.
//!
//! - The first message must be a ClientHello. It may be cut into records and segments anywhere.
//! - After a HelloRetryRequest a second one follows, perhaps behind early data. So the reader goes on until the client
//!   sends anything encrypted, or a handshake message that is no ClientHello.
//! - After ChangeCipherSpec a handshake record is the encrypted end of a resumed session of TLS 1.2, or the second
//!   ClientHello. It is taken for a ClientHello if TLS 1.3 was offered and its first two bytes fit. Where only they fit by
//!   chance, the application data behind it says so: nothing may stand between the records of a ClientHello.
//!
//! Bounds: one message of at most [`HELD_MAX`] bytes is held. Early data is passed over up to the same number of bytes.

use super::hello::ClientHello;
use super::progress::{HELD_MAX, Progress};
use crate::be16;

/// Record types.
const CHANGE_CIPHER_SPEC: u8 = 20;
const ALERT: u8 = 21;
pub(super) const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;
/// A record holds at most so many bytes of plaintext, and a little more encrypted (RFC 8446 5.1, 5.2).
const PLAIN_MAX: usize = 1 << 14;
const CIPHER_MAX: usize = PLAIN_MAX + 2048;
/// An encrypted Finished of TLS 1.2 is not longer, with padding.
const FINISHED_MAX: usize = 512;
const CLIENT_HELLO: u8 = 1;

/// The client waits for an answer to its ClientHello.
const BEHIND: &str = "bytes behind a ClientHello in its record";

/// The client's side of a connection. See the module head.
#[derive(Debug, Default)]
pub(super) struct TlsReader {
    /// The header of the record that is being read.
    header: [u8; 5],
    header_len: usize,
    /// Bytes of the record that have not come.
    left: usize,
    /// Handshake bytes that were not read.
    message: Vec<u8>,
    /// Bytes from the beginning of the record in which they begin, or of a header that is not whole.
    pending: usize,
    /// A ClientHello was read.
    after_hello: bool,
    early_data: bool,
    early_bytes: usize,
    changed_cipher: bool,
    tls13: bool,
    over: Option<Progress>,
}

impl TlsReader {
    /// Bytes that it holds.
    pub fn memory(&self) -> usize {
        self.message.capacity()
    }

    /// How many of the bytes that were taken last belong to a message that has not ended.
    pub fn pending(&self) -> usize {
        self.pending
    }

    /// Reads on, at most to the end of a ClientHello, and says how many bytes it took.
    pub fn feed(&mut self, bytes: &[u8]) -> (usize, Progress) {
        let mut taken = 0;
        loop {
            if let Some(over) = &self.over {
                return (taken, over.clone());
            }
            if let Some(progress) = self.read_message() {
                return (taken, progress);
            }
            if self.left == 0 && self.header_len == 5 {
                self.header_len = 0;
            }
            let rest = bytes.get(taken..).unwrap_or(&[]);
            if rest.is_empty() {
                return (taken, Progress::More);
            }
            if self.header_len < 5 {
                let n = rest.len().min(5 - self.header_len);
                crate::put(&mut self.header, self.header_len, rest.get(..n).unwrap_or(&[]));
                self.header_len += n;
                self.pending += n;
                taken += n;
                if self.header_len == 5
                    && let Err(progress) = self.begin_record()
                {
                    self.end(progress);
                }
                continue;
            }
            let now = rest.get(..rest.len().min(self.left)).unwrap_or(&[]);
            self.left -= now.len();
            taken += now.len();
            match self.header[0] {
                HANDSHAKE => {
                    self.message.extend_from_slice(now);
                    self.pending += now.len();
                }
                APPLICATION_DATA => self.early_bytes += now.len(),
                _ => {}
            }
        }
    }

    fn end(&mut self, progress: Progress) {
        (self.message, self.pending) = (Vec::new(), 0);
        self.over = Some(progress);
    }

    /// The header of a record is there.
    fn begin_record(&mut self) -> Result<(), Progress> {
        let [kind, major, _, _, _] = self.header;
        self.left = usize::from(be16(&self.header, 3));
        let wrong = |text| Err(Progress::Malformed(text));
        let max = if kind == APPLICATION_DATA || self.changed_cipher { CIPHER_MAX } else { PLAIN_MAX };
        if major != 3 || self.left == 0 || self.left > max {
            return wrong("a TLS record with a wrong version or length");
        }
        if kind != HANDSHAKE && self.message.is_empty() {
            self.pending = 0;
        }
        match kind {
            HANDSHAKE if self.missing().is_some_and(|missing| self.left > missing) => wrong(BEHIND),
            HANDSHAKE => Ok(()),
            // It was no ClientHello, but began like one by chance.
            APPLICATION_DATA if self.changed_cipher && !self.early_data && !self.message.is_empty() => {
                Err(Progress::Opaque("encrypted"))
            }
            _ if !self.message.is_empty() => wrong("a record in the middle of a handshake message"),
            _ if !self.after_hello => wrong("TLS that does not begin with a ClientHello"),
            CHANGE_CIPHER_SPEC if self.left == 1 => {
                self.changed_cipher = true;
                Ok(())
            }
            APPLICATION_DATA if self.early_data && self.early_bytes < HELD_MAX => Ok(()),
            APPLICATION_DATA => Err(Progress::Opaque("encrypted")),
            ALERT => Ok(()),
            _ => wrong("a TLS record of an unknown type"),
        }
    }

    /// Looks at the handshake bytes that have come.
    fn read_message(&mut self) -> Option<Progress> {
        let &kind = self.message.first()?;
        let whole = self.header_len == 5 && self.left == 0;
        let encrypted = self.changed_cipher && (!self.tls13 || self.message.get(1).is_some_and(|b| *b > 4));
        if self.after_hello && (kind != CLIENT_HELLO || encrypted) {
            self.end(Progress::Opaque("encrypted"));
            return self.over.clone();
        }
        if kind != CLIENT_HELLO {
            self.end(Progress::Malformed("TLS that does not begin with a ClientHello"));
            return self.over.clone();
        }
        let length = self.length()?;
        if length > HELD_MAX && self.changed_cipher && self.message.len() <= FINISHED_MAX {
            return None; // perhaps it is none
        }
        if length > HELD_MAX {
            self.end(Progress::Malformed("a ClientHello that is too long"));
            return self.over.clone();
        }
        let body = self.message.get(4..length)?;
        // Nothing may follow in the same record: the client waits for an answer.
        let read = match ClientHello::parse(body) {
            _ if self.message.len() > length || !whole => Err(BEHIND),
            read => read,
        };
        self.message = Vec::new();
        match read {
            Ok(hello) => {
                (self.after_hello, self.changed_cipher, self.early_bytes) = (true, false, 0);
                self.pending = 0;
                (self.early_data, self.tls13) = (hello.early_data, hello.tls13);
                Some(Progress::Tls(hello))
            }
            Err(why) => {
                self.end(Progress::Malformed(why));
                self.over.clone()
            }
        }
    }

    /// The length that a message says it has, with its header.
    fn length(&self) -> Option<usize> {
        let &[_, a, b, c] = self.message.first_chunk()?;
        Some(4 + (usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c)))
    }

    /// Bytes of a message that have not come.
    fn missing(&self) -> Option<usize> {
        Some(self.length()?.saturating_sub(self.message.len()))
    }
}
