//! Theory of operation: what the client's first bytes of a TCP stream are.
//!
//! - A TLS record begins with byte 22 and a version. Some servers take any version below 16 in the first record; the reader
//!   of TLS refuses those other than 3.
//! - A request of HTTP/1 begins with a line of a method, a target and a version; empty lines before it are allowed (RFC 9112
//!   2.2). A line that has `HTTP/` in any place is for the reader of heads, which refuses what is not in order: servers
//!   differ in what they take for a space. Until the first line has ended it may be something else. A byte that no method
//!   has ends the question.

use super::progress::{HELD_MAX, Progress};
use super::tls::{HANDSHAKE, TlsReader};

const NO_REQUEST: &str = "no request line";

/// See the module head.
#[derive(Debug)]
pub struct StreamInspector(State);

#[derive(Debug)]
enum State {
    /// The first line.
    Line(Line),
    Tls(TlsReader),
    Over(Progress),
}

/// The first line, as far as it has come.
#[derive(Debug, Default)]
struct Line {
    bytes: Vec<u8>,
    /// It has a byte that is no space.
    begun: bool,
    /// A method and a space have come.
    has_method: bool,
}

impl Default for StreamInspector {
    fn default() -> Self {
        StreamInspector::new()
    }
}

impl StreamInspector {
    /// An inspector that has seen nothing.
    #[must_use]
    pub fn new() -> Self {
        StreamInspector(State::Line(Line::default()))
    }

    /// Bytes that it holds.
    #[must_use]
    pub fn memory(&self) -> usize {
        match &self.0 {
            State::Line(line) => line.bytes.capacity(),
            State::Tls(reader) => reader.memory(),
            State::Over(_) => 0,
        }
    }

    /// Whether it began as TLS does.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        matches!(self.0, State::Tls(_))
    }

    /// How many of the bytes that were taken last belong to something that has not ended.
    #[must_use]
    pub fn pending(&self) -> usize {
        match &self.0 {
            State::Line(line) => line.bytes.len(),
            State::Tls(reader) => reader.pending(),
            State::Over(_) => 0,
        }
    }

    /// Takes the next bytes of the stream, at most to the end of a ClientHello, and says how many. After
    /// [`Progress::Tls`] it goes on: there may be a second ClientHello, until the stream is [`Progress::Opaque`]. The
    /// other results but `More` are final. On [`Progress::Http`] the stream is read again, by
    /// [`HttpInspector`](super::HttpInspector).
    ///
    /// # Examples
    /// ```
    /// use guestnet_wire::inspect::{Progress, StreamInspector};
    ///
    /// let mut inspector = StreamInspector::new();
    /// assert_eq!(inspector.feed(b"GET / HT"), (8, Progress::More));
    /// assert_eq!(inspector.feed(b"TP/1.1\r\nHost: ok.example\r\n\r\n").1, Progress::Http);
    /// ```
    pub fn feed(&mut self, bytes: &[u8]) -> (usize, Progress) {
        let all = bytes.len();
        if let State::Line(line) = &mut self.0 {
            let Some(first) = line.bytes.first().or(bytes.first()) else { return (0, Progress::More) };
            if *first != HANDSHAKE {
                let progress = line.read(bytes);
                if progress != Progress::More {
                    self.0 = State::Over(progress.clone());
                }
                return (all, progress);
            }
            let before = line.bytes.len();
            line.bytes.extend_from_slice(bytes.get(..bytes.len().min(2)).unwrap_or(&[]));
            match line.bytes.as_slice() {
                [_, 0..16, ..] => {
                    // What was held is its beginning; the bytes of this call follow below.
                    let mut reader = TlsReader::default();
                    reader.feed(line.bytes.get(..before).unwrap_or(&[]));
                    self.0 = State::Tls(reader);
                }
                [_, _, ..] => self.0 = State::Over(Progress::Opaque("not TLS")),
                _ => return (all, Progress::More),
            }
        }
        match &mut self.0 {
            State::Tls(reader) => reader.feed(bytes),
            State::Over(progress) => (all, progress.clone()),
            State::Line(_) => (all, Progress::More),
        }
    }
}

impl Line {
    /// Takes bytes of it.
    fn read(&mut self, bytes: &[u8]) -> Progress {
        for byte in bytes {
            match byte {
                b'\r' | b'\n' if !self.begun => {}
                b'\n' => return what_is(&self.bytes),
                b if is_space(*b) => self.has_method |= self.begun,
                b if !self.has_method && !is_method(*b) => return Progress::Opaque(NO_REQUEST),
                _ => self.begun = true,
            }
            self.bytes.push(*byte);
            if self.bytes.len() > HELD_MAX {
                return Progress::Malformed("a first line that is too long");
            }
        }
        Progress::More
    }
}

fn is_method(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b)
}

/// What some server takes for a space.
fn is_space(b: u8) -> bool {
    matches!(b, b' ' | b'\t' | 0x0b | 0x0c | 0x1c..=0x1f | 0x85 | 0xa0)
}

/// What a stream with this first line is.
fn what_is(line: &[u8]) -> Progress {
    if line.strip_suffix(b"\r").unwrap_or(line) == b"PRI * HTTP/2.0" {
        Progress::Opaque("HTTP/2 without TLS")
    } else if line.windows(5).any(|w| w.eq_ignore_ascii_case(b"HTTP/")) {
        Progress::Http
    } else {
        Progress::Opaque(NO_REQUEST)
    }
}
