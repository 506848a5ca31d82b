//! Theory of operation: what the client's first bytes of a TCP stream are. A TLS record begins with byte 22 and version 3.
//! A request of HTTP/1 begins with a line of a method, a target and a version; empty lines before it are allowed (RFC 9112
//! 2.2). Until the first line has ended it may be something else; a byte that no such line has ends the question.

use super::tls::{HANDSHAKE, TlsReader};
use super::{HELD_MAX, Progress};

/// Bytes of a method at most; the registered ones have 17.
const METHOD_MAX: usize = 32;

const NO_REQUEST: &str = "no request line";

/// See the module head.
#[derive(Debug)]
pub struct StreamInspector(State);

#[derive(Debug)]
enum State {
    /// The first line, as far as it has come.
    Line(Vec<u8>),
    Tls(TlsReader),
    Over(Progress),
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
        StreamInspector(State::Line(Vec::new()))
    }

    /// Bytes that it holds.
    #[must_use]
    pub fn memory(&self) -> usize {
        match &self.0 {
            State::Line(line) => line.capacity(),
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
            State::Line(line) => line.len(),
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
            let Some(first) = line.first().or(bytes.first()) else { return (0, Progress::More) };
            if *first != HANDSHAKE {
                let progress = read_line(line, bytes);
                if progress != Progress::More {
                    self.0 = State::Over(progress.clone());
                }
                return (all, progress);
            }
            line.extend_from_slice(bytes.get(..bytes.len().min(2)).unwrap_or(&[]));
            match line.as_slice() {
                [_, 3, ..] => {
                    // What was held is its beginning; the bytes of this call follow below.
                    let before = line.len() - bytes.len().min(2);
                    let mut reader = TlsReader::default();
                    reader.feed(line.get(..before).unwrap_or(&[]));
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

/// Takes bytes of the first line.
fn read_line(line: &mut Vec<u8>, bytes: &[u8]) -> Progress {
    let mut in_method = !line.contains(&b' ');
    let mut begun = line.iter().any(|b| !matches!(b, b'\r' | b'\n'));
    for byte in bytes {
        match byte {
            b'\r' | b'\n' if !begun => {}
            b'\n' => return first_line(line),
            b' ' if begun => in_method = false,
            b if in_method && !is_method(*b) => return Progress::Opaque(NO_REQUEST),
            b'\r' | b'\t' | b'!'..=b'~' | 0x80.. => {}
            _ => return Progress::Opaque(NO_REQUEST),
        }
        begun |= !matches!(byte, b'\r' | b'\n');
        line.push(*byte);
        if line.len() > HELD_MAX {
            return Progress::Malformed("a first line that is too long");
        }
        if in_method && line.len() > METHOD_MAX && begun {
            return Progress::Opaque(NO_REQUEST);
        }
    }
    Progress::More
}

fn is_method(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b)
}

/// What a stream with this first line is.
fn first_line(line: &[u8]) -> Progress {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let version = line.iter().rposition(|b| *b == b' ').and_then(|at| line.get(at + 1..)).unwrap_or(&[]);
    match version {
        b"HTTP/2.0" => Progress::Opaque("HTTP/2 without TLS"),
        v if v.len() > 5 && v.get(..5).is_some_and(|v| v.eq_ignore_ascii_case(b"HTTP/")) => Progress::Http,
        _ => Progress::Opaque(NO_REQUEST),
    }
}
