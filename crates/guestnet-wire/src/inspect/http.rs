//! Theory of operation: the client's side of an HTTP/1 connection (RFC 9112). [`HttpInspector`] finds every request head
//! and passes over what follows it, so that each request can be judged before it goes on.
//!
//! What servers are known to read in different ways is malformed here: two Hosts, a Host that is not that of an absolute
//! target, targets that are neither a path nor a URL, folded lines, spaces before a colon, bare CR, lines of which some
//! end with CRLF and others with LF alone, Content-Length with Transfer-Encoding or twice, other transfer codings than
//! chunked. So are CONNECT, which would make the rest another conversation, and the beginning of HTTP/2.
//!
//! A server may switch to another protocol only in its answer to the first request: which of several answers a later 101
//! belongs to is not known on this side.
//!
//! Bounds: a head has at most [`HELD_MAX`] bytes, with empty lines before it. Bodies are counted and not held.

use super::name::host_name;
use super::progress::HELD_MAX;

/// Bytes of a line of a chunked body at most: a size, or a trailer.
const CHUNK_LINE_MAX: usize = 4096;

/// What a request head says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestHead {
    /// The host, in lower case, without port and final dot. `None` where HTTP/1.0 names none.
    pub host: Option<Box<[u8]>>,
    /// The first request of the connection, and it asks for another protocol than HTTP (RFC 9110 7.8).
    pub upgrade: bool,
}

/// What is known after some bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HttpProgress {
    /// No head ends in these bytes. Those of [`HttpInspector::pending`] belong to one.
    More,
    /// A head ends with the last byte that was taken.
    Head(RequestHead),
    /// What is wrong with the request.
    Malformed(&'static str),
}

/// See the module head.
#[derive(Debug, Default)]
pub struct HttpInspector {
    state: State,
    /// The head that is being read, or the line of a chunked body.
    held: Vec<u8>,
    /// Where the last line of the head begins.
    line: usize,
    /// The head has a line that is not empty.
    begun: bool,
    /// A head was found.
    later: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum State {
    /// In a head, or before one.
    #[default]
    Head,
    /// So many bytes of a body or chunk follow; behind a chunk, its line end.
    Body {
        left: u64,
        chunk: bool,
    },
    /// In the line end behind a chunk.
    ChunkEnd,
    /// In the line with the size of a chunk.
    ChunkSize,
    /// In the trailers.
    Trailers,
    Over(&'static str),
}

impl HttpInspector {
    /// An inspector at the beginning of a connection.
    #[must_use]
    pub fn new() -> Self {
        HttpInspector::default()
    }

    /// Bytes that it holds.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.held.capacity()
    }

    /// How many of the bytes that were taken last belong to a head that has not ended.
    #[must_use]
    pub fn pending(&self) -> usize {
        if self.state == State::Head { self.held.len() } else { 0 }
    }

    /// Takes bytes of the connection, at most to the end of the next head, and says how many.
    ///
    /// # Examples
    /// ```
    /// use guestnet_wire::inspect::{HttpInspector, HttpProgress};
    ///
    /// let mut http = HttpInspector::new();
    /// let (taken, progress) = http.feed(b"GET / HTTP/1.1\r\nHost: Ok.Example:80\r\n\r\nGET /2");
    /// let HttpProgress::Head(head) = progress else { panic!() };
    /// assert_eq!((taken, head.host.as_deref()), (39, Some(&b"ok.example"[..])));
    /// assert_eq!((http.feed(b"GET /2"), http.pending()), ((6, HttpProgress::More), 6));
    /// ```
    pub fn feed(&mut self, bytes: &[u8]) -> (usize, HttpProgress) {
        let mut taken = 0;
        while let Some(rest) = bytes.get(taken..)
            && !rest.is_empty()
        {
            let (n, progress) = self.step(rest);
            taken += n;
            if let Err(why) = progress {
                (self.state, self.held) = (State::Over(why), Vec::new());
                return (taken, HttpProgress::Malformed(why));
            }
            if let Ok(Some(head)) = progress {
                return (taken, HttpProgress::Head(head));
            }
        }
        (taken, HttpProgress::More)
    }

    fn step(&mut self, rest: &[u8]) -> (usize, Result<Option<RequestHead>, &'static str>) {
        match self.state {
            State::Over(why) => (0, Err(why)),
            State::Head => self.take_head(rest),
            State::Body { left, chunk } => {
                let n = rest.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                let left = left - n as u64;
                self.state = match (left, chunk) {
                    (0, true) => State::ChunkEnd,
                    (0, false) => State::Head,
                    _ => State::Body { left, chunk },
                };
                (n, Ok(None))
            }
            State::ChunkEnd | State::ChunkSize | State::Trailers => {
                let end = rest.iter().position(|b| *b == b'\n').map_or(rest.len(), |at| at + 1);
                let (line, _) = rest.split_at(end);
                if self.held.len() + end > CHUNK_LINE_MAX {
                    return (end, Err("a line of a chunked body that is too long"));
                }
                self.held.extend_from_slice(line);
                if !line.ends_with(b"\n") {
                    return (end, Ok(None));
                }
                let line = std::mem::take(&mut self.held);
                (end, self.chunk_line(&line).map(|()| None))
            }
        }
    }

    fn take_head(&mut self, rest: &[u8]) -> (usize, Result<Option<RequestHead>, &'static str>) {
        let mut taken = 0;
        for part in rest.split_inclusive(|b| *b == b'\n') {
            if part.len() > HELD_MAX.saturating_sub(self.held.len()) {
                return (taken, Err("a request head that is too long"));
            }
            self.held.extend_from_slice(part);
            taken += part.len();
            if !part.ends_with(b"\n") {
                break;
            }
            let is_empty = matches!(self.held.get(self.line..), Some(b"\r\n" | b"\n"));
            self.line = self.held.len();
            if !is_empty {
                self.begun = true;
            } else if self.begun {
                let held = std::mem::take(&mut self.held);
                (self.line, self.begun) = (0, false);
                return match read_head(&held) {
                    Ok((mut head, state)) => {
                        head.upgrade &= !std::mem::replace(&mut self.later, true);
                        self.state = state;
                        (taken, Ok(Some(head)))
                    }
                    Err(why) => (taken, Err(why)),
                };
            }
        }
        (taken, Ok(None))
    }

    /// A line of a chunked body has ended (RFC 9112 7.1).
    fn chunk_line(&mut self, line: &[u8]) -> Result<(), &'static str> {
        let line =
            line.strip_suffix(b"\r\n").ok_or("a line of a chunked body that does not end with CRLF")?;
        if line.iter().any(|b| is_control(*b)) {
            return Err("a control character in a chunked body");
        }
        self.state = match self.state {
            State::ChunkEnd if line.is_empty() => State::ChunkSize,
            State::ChunkEnd => return Err("a chunk that is longer than it says"),
            State::Trailers if line.is_empty() => State::Head,
            State::Trailers => State::Trailers,
            _ => match chunk_size(line)? {
                0 => State::Trailers,
                left => State::Body { left, chunk: true },
            },
        };
        Ok(())
    }
}

fn is_control(b: u8) -> bool {
    (b < b' ' && b != b'\t') || b == 0x7f
}

fn is_token(text: &[u8]) -> bool {
    !text.is_empty() && text.iter().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(b))
}

fn trim(text: &[u8]) -> &[u8] {
    let is_space = |b: &u8| matches!(b, b' ' | b'\t');
    let start = text.iter().take_while(|b| is_space(b)).count();
    let end = text.iter().rposition(|b| !is_space(b)).map_or(start, |at| at + 1);
    text.get(start..end).unwrap_or(&[])
}

fn chunk_size(line: &[u8]) -> Result<u64, &'static str> {
    let size = line.split(|b| *b == b';').next().map(trim).unwrap_or(&[]);
    let digits = std::str::from_utf8(size).unwrap_or("");
    if digits.len() > 15 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err("a chunk size that is no number");
    }
    u64::from_str_radix(digits, 16).map_err(|_| "a chunk size that is no number")
}

/// What the headers of a request say.
#[derive(Default)]
struct Headers<'a> {
    host: Option<&'a [u8]>,
    length: Option<u64>,
    chunked: bool,
    /// It names protocols to switch to.
    upgrade: bool,
    /// One of them is a version of HTTP.
    to_http: bool,
    wants_upgrade: bool,
}

/// Reads a whole head, empty lines before it included.
fn read_head(held: &[u8]) -> Result<(RequestHead, State), &'static str> {
    let ends = |with_cr| held.split_inclusive(|b| *b == b'\n').any(|line| line.ends_with(b"\r\n") == with_cr);
    if ends(true) && ends(false) {
        return Err("lines that end in different ways");
    }
    let mut lines = held
        .split(|b| *b == b'\n')
        .map(|line| line.strip_suffix(b"\r").unwrap_or(line))
        .skip_while(|line| line.is_empty())
        .take_while(|line| !line.is_empty());
    let first = lines.next().unwrap_or(&[]);
    let mut words = first.split(|b| *b == b' ');
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err("a request line that is not a method, a target and a version");
    };
    let old = match version {
        b"HTTP/1.1" => false,
        b"HTTP/1.0" => true,
        b"HTTP/2.0" => return Err("HTTP/2 on a connection of HTTP/1"),
        _ => return Err("an unknown version of HTTP"),
    };
    if !is_token(method) || target.is_empty() || target.iter().any(|b| is_control(*b) || *b == b'\t') {
        return Err("a request line that is not a method, a target and a version");
    }
    if method.eq_ignore_ascii_case(b"CONNECT") {
        return Err("CONNECT");
    }
    let mut headers = Headers::default();
    for line in lines {
        read_header(line, &mut headers)?;
    }
    if headers.chunked && (headers.length.is_some() || old) {
        return Err("Transfer-Encoding with Content-Length, or in HTTP/1.0");
    }
    let named = match headers.host {
        Some(value) => authority(value)?,
        None if old => None,
        None => return Err("no Host"),
    };
    let host = match absolute(target) {
        None if target.starts_with(b"/") || target == b"*" => named,
        None => return Err("a target that is neither a path nor a URL"),
        Some(there) => {
            let there = authority(there)?.ok_or("a target without a host")?;
            if named.as_ref().is_some_and(|n| *n != there) || headers.host.is_some() && named.is_none() {
                return Err("a Host that is not that of the target");
            }
            Some(there)
        }
    };
    let upgrade = headers.wants_upgrade && headers.upgrade && !headers.to_http;
    let state = match headers.length {
        _ if headers.chunked => State::ChunkSize,
        None | Some(0) => State::Head,
        Some(left) => State::Body { left, chunk: false },
    };
    Ok((RequestHead { host, upgrade }, state))
}

fn read_header<'a>(line: &'a [u8], headers: &mut Headers<'a>) -> Result<(), &'static str> {
    if matches!(line.first(), Some(b' ' | b'\t')) {
        return Err("a folded header line");
    }
    let colon = line.iter().position(|b| *b == b':').ok_or("a header line without a colon")?;
    let (name, value) = line.split_at(colon);
    let value = trim(value.get(1..).unwrap_or(&[]));
    if !is_token(name) || value.iter().any(|b| is_control(*b)) {
        return Err("a header with characters that it may not have");
    }
    if name.eq_ignore_ascii_case(b"host") {
        if headers.host.replace(value).is_some() {
            return Err("two Hosts");
        }
    } else if name.eq_ignore_ascii_case(b"content-length") {
        let digits = std::str::from_utf8(value).unwrap_or("");
        let is_number =
            !digits.is_empty() && digits.len() <= 18 && digits.bytes().all(|b| b.is_ascii_digit());
        let length = digits.parse().ok().filter(|_| is_number).ok_or("a Content-Length that is no number")?;
        if headers.length.replace(length).is_some() {
            return Err("two Content-Lengths");
        }
    } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
        if !value.eq_ignore_ascii_case(b"chunked") || std::mem::replace(&mut headers.chunked, true) {
            return Err("a transfer coding that is not chunked alone");
        }
    } else if name.eq_ignore_ascii_case(b"upgrade") {
        headers.upgrade = true;
        headers.to_http |= is_http(value);
    } else if name.eq_ignore_ascii_case(b"connection") {
        headers.wants_upgrade |=
            value.split(|b| *b == b',').any(|w| trim(w).eq_ignore_ascii_case(b"upgrade"));
    }
    Ok(())
}

/// Whether the list of protocols of an Upgrade header has another version of HTTP, which could ask other hosts on the
/// same connection.
fn is_http(protocols: &[u8]) -> bool {
    protocols.split(|b| *b == b',').map(trim).any(|p| {
        let name = p.split(|b| *b == b'/').next().unwrap_or(&[]).to_ascii_lowercase();
        name.starts_with(b"h2") || name.starts_with(b"h3") || name == b"http"
    })
}

/// The authority of a target that is a URL.
fn absolute(target: &[u8]) -> Option<&[u8]> {
    let at = target.windows(3).position(|w| w == b"://")?;
    if target.first() == Some(&b'/') || !target.iter().take(at).all(|b| b.is_ascii_alphanumeric()) {
        return None;
    }
    target.get(at + 3..)?.split(|b| matches!(b, b'/' | b'?' | b'#')).next()
}

/// The host of a Host header or of a URL; `None` for an empty one.
fn authority(text: &[u8]) -> Result<Option<Box<[u8]>>, &'static str> {
    const WRONG: &str = "a host that is no host";
    if text.is_empty() {
        return Ok(None);
    }
    let is_port = |p: &[u8]| p.len() <= 5 && p.iter().all(|b| b.is_ascii_digit());
    if let Some(rest) = text.strip_prefix(b"[") {
        let end = rest.iter().position(|b| *b == b']').ok_or(WRONG)?;
        let (address, port) = rest.split_at(end);
        let port = port.get(1..).unwrap_or(&[]);
        let is_address = address.iter().all(|b| b.is_ascii_hexdigit() || matches!(b, b':' | b'.'));
        let has_port = port.is_empty() || port.strip_prefix(b":").is_some_and(is_port);
        return if is_address && has_port {
            Ok(Some(address.to_ascii_lowercase().into()))
        } else {
            Err(WRONG)
        };
    }
    let (name, port) = match text.iter().position(|b| *b == b':') {
        Some(at) => (text.get(..at).unwrap_or(&[]), text.get(at + 1..).unwrap_or(&[])),
        None => (text, &[][..]),
    };
    if !is_port(port) {
        return Err(WRONG);
    }
    host_name(name).map(Some).ok_or(WRONG)
}
