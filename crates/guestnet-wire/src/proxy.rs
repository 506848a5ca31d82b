//! Theory of operation: the client's side of a proxy's handshake, without I/O: SOCKS5 (RFC 1928) with user name and
//! password (RFC 1929), and HTTP CONNECT (RFC 9110 9.3.6) with Basic authentication (RFC 7617).
//!
//! [`Proxy::begin`] gives the first message and a [`Handshake`]. [`Handshake::receive`] is given what the proxy has sent and
//! says how many bytes of it belong to the handshake, and what comes next. What follows the last reply is the stream's, so
//! no byte beyond it is ever taken. Replies are bounded: a SOCKS5 reply by its format, a response head by [`HEAD_MAX`].
//! Every reply that is not understood ends the handshake.

use std::net::SocketAddr;

/// Bytes of the head of an HTTP response at most.
pub const HEAD_MAX: usize = 8192;
/// Bytes of a user name or a password at most, which is what RFC 1929 can carry.
pub const CREDENTIAL_MAX: usize = 255;

const VERSION: u8 = 5;
const NO_AUTHENTICATION: u8 = 0;
const USER_PASSWORD: u8 = 2;
const CONNECT: u8 = 1;
const IPV4: u8 = 1;
const NAME: u8 = 3;
const IPV6: u8 = 4;

/// What a proxy speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// SOCKS5.
    Socks5,
    /// HTTP/1.1 with CONNECT.
    Http,
}

/// User name and password, each 1 to [`CREDENTIAL_MAX`] bytes.
pub type Credentials = (Box<[u8]>, Box<[u8]>);

/// A proxy.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    /// Where it is.
    pub address: SocketAddr,
    /// What it speaks.
    pub protocol: Protocol,
    /// What it asks for.
    pub credentials: Option<Credentials>,
}

/// Without the credentials.
impl std::fmt::Debug for Proxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} at {}", self.protocol, self.address)
    }
}

/// Why a handshake failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The proxy wants credentials, or others.
    Credentials,
    /// Its rules forbid the destination.
    Forbidden,
    /// The destination's network is unreachable.
    NetUnreachable,
    /// The destination is unreachable.
    HostUnreachable,
    /// The destination refused the connection.
    Refused,
    /// The proxy does not do that, or failed.
    Unable,
    /// Its reply is not one of the protocol.
    Malformed,
}

impl Failure {
    /// What it says to the owner.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Failure::Credentials => "it wants other credentials",
            Failure::Forbidden => "its rules forbid it",
            Failure::NetUnreachable => "the network is unreachable",
            Failure::HostUnreachable => "the host is unreachable",
            Failure::Refused => "the connection was refused",
            Failure::Unable => "it cannot do that",
            Failure::Malformed => "its reply is not understood",
        }
    }
}

/// What comes next.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// More of the reply.
    Wait,
    /// This is to be sent.
    Send(Vec<u8>),
    /// The connection is the stream's from here on.
    Open,
    /// There is none.
    Failed(Failure),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Method,
    Authentication,
    Reply,
    /// This many bytes of the head were taken.
    Head(usize),
    Over,
}

/// A handshake under way.
#[derive(Debug)]
pub struct Handshake {
    state: State,
    destination: SocketAddr,
    /// The message of RFC 1929, until it is sent.
    authentication: Option<Vec<u8>>,
    /// What was taken of the reply at hand; of HTTP the status line and the last bytes.
    reply: Vec<u8>,
}

impl Proxy {
    /// Begins a handshake for a connection to `destination`. The first message, and the handshake.
    #[must_use]
    pub fn begin(&self, destination: SocketAddr) -> (Vec<u8>, Handshake) {
        let with =
            |state, authentication| Handshake { state, destination, authentication, reply: Vec::new() };
        match self.protocol {
            Protocol::Socks5 => {
                let method = if self.credentials.is_some() { USER_PASSWORD } else { NO_AUTHENTICATION };
                let authentication = self.credentials.as_ref().map(|(user, password)| {
                    // The subnegotiation has a version of its own.
                    let mut message = vec![1];
                    for part in [user, password] {
                        let part = part.get(..CREDENTIAL_MAX).unwrap_or(part);
                        message.push(part.len() as u8);
                        message.extend_from_slice(part);
                    }
                    message
                });
                (vec![VERSION, 1, method], with(State::Method, authentication))
            }
            Protocol::Http => {
                let mut head = format!("CONNECT {destination} HTTP/1.1\r\nHost: {destination}\r\n");
                if let Some((user, password)) = &self.credentials {
                    let both = [user, b":".as_slice(), password].concat();
                    head.push_str(&format!("Proxy-Authorization: Basic {}\r\n", base64(&both)));
                }
                head.push_str("\r\n");
                (head.into_bytes(), with(State::Head(0), None))
            }
        }
    }
}

impl Handshake {
    /// Takes what the proxy has sent. How many bytes of it belonged to the handshake, and what comes next. After
    /// [`Step::Send`] the rest of the bytes is to be given again.
    pub fn receive(&mut self, bytes: &[u8]) -> (usize, Step) {
        match self.state {
            State::Head(taken) => self.head(taken, bytes),
            State::Over => (0, Step::Failed(Failure::Malformed)),
            _ => self.socks(bytes),
        }
    }

    fn over(&mut self, taken: usize, step: Step) -> (usize, Step) {
        self.state = State::Over;
        (taken, step)
    }

    fn socks(&mut self, bytes: &[u8]) -> (usize, Step) {
        let mut taken = 0;
        for byte in bytes {
            self.reply.push(*byte);
            taken += 1;
            let reply = self.reply.as_slice();
            let step = match (self.state, reply) {
                (State::Reply, [VERSION, 0, _, kind, rest @ ..]) => {
                    // Address and port that the proxy uses follow; nobody needs them.
                    let length = match (*kind, rest) {
                        (IPV4, _) => 6,
                        (IPV6, _) => 18,
                        (NAME, []) => 1,
                        (NAME, [length, ..]) => usize::from(*length) + 3,
                        _ => return self.over(taken, Step::Failed(Failure::Malformed)),
                    };
                    if rest.len() < length {
                        continue;
                    }
                    return self.over(taken, Step::Open);
                }
                (State::Reply, [VERSION, code, ..]) if *code != 0 => {
                    return self.over(taken, Step::Failed(refusal(*code)));
                }
                (State::Method | State::Reply, [VERSION]) | (State::Authentication, [1]) => continue,
                (State::Reply, [VERSION, 0] | [VERSION, 0, _]) => continue,
                (State::Method, [VERSION, NO_AUTHENTICATION]) if self.authentication.is_none() => {
                    self.request()
                }
                (State::Method, [VERSION, USER_PASSWORD]) => match self.authentication.take() {
                    Some(message) => {
                        self.state = State::Authentication;
                        message
                    }
                    None => return self.over(taken, Step::Failed(Failure::Malformed)),
                },
                (State::Method, [VERSION, 0xff]) => {
                    return self.over(taken, Step::Failed(Failure::Credentials));
                }
                // Some proxies answer with the version of SOCKS here.
                (State::Authentication, [_, 0]) => self.request(),
                (State::Authentication, [_, _]) => {
                    return self.over(taken, Step::Failed(Failure::Credentials));
                }
                _ => return self.over(taken, Step::Failed(Failure::Malformed)),
            };
            self.reply.clear();
            return (taken, Step::Send(step));
        }
        (taken, Step::Wait)
    }

    fn request(&mut self) -> Vec<u8> {
        self.state = State::Reply;
        let mut message = vec![VERSION, CONNECT, 0];
        match self.destination {
            SocketAddr::V4(a) => {
                message.push(IPV4);
                message.extend_from_slice(&a.ip().octets());
            }
            SocketAddr::V6(a) => {
                message.push(IPV6);
                message.extend_from_slice(&a.ip().octets());
            }
        }
        message.extend_from_slice(&self.destination.port().to_be_bytes());
        message
    }

    fn head(&mut self, before: usize, bytes: &[u8]) -> (usize, Step) {
        let mut taken = 0;
        for byte in bytes {
            taken += 1;
            self.reply.push(*byte);
            let all = before + taken;
            if self.reply.ends_with(b"\r\n\r\n") {
                let step = match status(&self.reply) {
                    Some(200..=299) => Step::Open,
                    Some(407 | 401) => Step::Failed(Failure::Credentials),
                    Some(403 | 451) => Step::Failed(Failure::Forbidden),
                    Some(502..=504) => Step::Failed(Failure::HostUnreachable),
                    // 1xx: another head follows, and no proxy sends one to CONNECT.
                    Some(_) => Step::Failed(Failure::Unable),
                    None => Step::Failed(Failure::Malformed),
                };
                return self.over(taken, step);
            }
            if all >= HEAD_MAX || (all == STATUS_LINE && status(&self.reply).is_none()) {
                return self.over(taken, Step::Failed(Failure::Malformed));
            }
        }
        self.state = State::Head(before + taken);
        (taken, Step::Wait)
    }
}

/// Bytes of `HTTP/1.1 200` and what ends the number.
const STATUS_LINE: usize = 13;

/// The status of a response head.
fn status(head: &[u8]) -> Option<u16> {
    let rest = head.strip_prefix(b"HTTP/1.0 ").or_else(|| head.strip_prefix(b"HTTP/1.1 "))?;
    let [a @ b'1'..=b'9', b @ b'0'..=b'9', c @ b'0'..=b'9', b' ' | b'\r', ..] = rest else { return None };
    let digit = |d: &u8| u16::from(d - b'0');
    Some(digit(a) * 100 + digit(b) * 10 + digit(c))
}

/// Reply codes of RFC 1928 section 6.
fn refusal(code: u8) -> Failure {
    match code {
        2 => Failure::Forbidden,
        3 => Failure::NetUnreachable,
        4 | 6 => Failure::HostUnreachable,
        5 => Failure::Refused,
        _ => Failure::Unable,
    }
}

fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let mut three = [0u8; 3];
        for (to, from) in three.iter_mut().zip(chunk) {
            *to = *from;
        }
        let word = u32::from_be_bytes([0, three[0], three[1], three[2]]);
        for i in 0..4u32 {
            let digit = (word >> (18 - 6 * i)) as usize & 63;
            let letter = ALPHABET.get(digit).copied().unwrap_or(b'=');
            text.push(char::from(if i as usize <= chunk.len() { letter } else { b'=' }));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxy(protocol: Protocol, credentials: Option<(&str, &str)>) -> Proxy {
        let bytes = |s: &str| s.as_bytes().into();
        let credentials = credentials.map(|(u, p)| (bytes(u), bytes(p)));
        Proxy { address: "192.0.2.1:1080".parse().unwrap(), protocol, credentials }
    }

    fn to() -> SocketAddr {
        "203.0.113.7:443".parse().unwrap()
    }

    /// Runs a handshake whose replies come `size` bytes at a time: what was sent, the bytes left over, the end.
    fn run(proxy: &Proxy, to: SocketAddr, replies: &[u8], size: usize) -> (Vec<Vec<u8>>, usize, Step) {
        let (first, mut h) = proxy.begin(to);
        let (mut sent, mut at, mut seen) = (vec![first], 0, size.min(replies.len()));
        loop {
            let (taken, step) = h.receive(&replies[at..seen]);
            at += taken;
            match step {
                Step::Send(message) => sent.push(message),
                Step::Wait if seen == replies.len() => return (sent, replies.len() - at, Step::Wait),
                Step::Wait => seen = (seen + size).min(replies.len()),
                end => return (sent, replies.len() - at, end),
            }
        }
    }

    #[test]
    fn socks5_without_credentials_whole_and_byte_by_byte() {
        let replies = b"\x05\x00\x05\x00\x00\x01\x0a\x00\x00\x01\x12\x34hello";
        for size in 1..=replies.len() {
            let (sent, left, end) = run(&proxy(Protocol::Socks5, None), to(), replies, size);
            assert_eq!(end, Step::Open);
            assert_eq!(sent, [&b"\x05\x01\x00"[..], b"\x05\x01\x00\x01\xcb\x00\x71\x07\x01\xbb"]);
            assert_eq!(left, 5, "the stream's bytes are not taken");
        }
    }

    #[test]
    fn socks5_with_credentials_to_an_ipv6_address_and_a_reply_with_a_name() {
        let replies = b"\x05\x02\x01\x00\x05\x00\x00\x03\x04host\x00\x50";
        let p = proxy(Protocol::Socks5, Some(("me", "secret")));
        for size in [1, 2, 3, replies.len()] {
            let (sent, left, end) = run(&p, "[2001:db8::7]:80".parse().unwrap(), replies, size);
            assert_eq!((end, left), (Step::Open, 0));
            assert_eq!(sent[0], b"\x05\x01\x02");
            assert_eq!(sent[1], b"\x01\x02me\x06secret");
            assert_eq!(sent[2][..4], *b"\x05\x01\x00\x04");
            assert_eq!(sent[2].len(), 22);
        }
    }

    #[test]
    fn socks5_refusals_and_replies_that_are_none() {
        let with = proxy(Protocol::Socks5, Some(("me", "secret")));
        let without = proxy(Protocol::Socks5, None);
        let cases: &[(&Proxy, &[u8], Failure)] = &[
            (&without, b"\x05\xff", Failure::Credentials),
            (&with, b"\x05\x02\x01\x01", Failure::Credentials),
            (&without, b"\x04\x00", Failure::Malformed),
            (&without, b"HTTP/1.1 400", Failure::Malformed),
            (&without, b"\x05\x07", Failure::Malformed),
            // It asks for credentials that nobody offered, or takes none although that was not offered.
            (&without, b"\x05\x02", Failure::Malformed),
            (&with, b"\x05\x00", Failure::Malformed),
            (&without, b"\x05\x00\x05\x01", Failure::Unable),
            (&without, b"\x05\x00\x05\x02", Failure::Forbidden),
            (&without, b"\x05\x00\x05\x03", Failure::NetUnreachable),
            (&without, b"\x05\x00\x05\x04", Failure::HostUnreachable),
            (&without, b"\x05\x00\x05\x05", Failure::Refused),
            (&without, b"\x05\x00\x05\x00\x00\x09", Failure::Malformed),
            (&without, b"\x05\x00\x04\x00", Failure::Malformed),
        ];
        for (proxy, replies, failure) in cases {
            for size in [1, replies.len()] {
                assert_eq!(run(proxy, to(), replies, size).2, Step::Failed(*failure), "{replies:x?}");
            }
        }
    }

    #[test]
    fn http_connect_takes_the_head_and_nothing_else() {
        let p = proxy(Protocol::Http, Some(("Aladdin", "open sesame")));
        let replies = b"HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\nhello";
        let (sent, left, end) = run(&p, to(), replies, replies.len());
        assert_eq!((end, left), (Step::Open, 5));
        assert_eq!(
            sent,
            [b"CONNECT 203.0.113.7:443 HTTP/1.1\r\nHost: 203.0.113.7:443\r\n\
               Proxy-Authorization: Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==\r\n\r\n"]
        );
        for size in 1..8 {
            assert_eq!(run(&p, to(), &replies[..replies.len() - 5], size).1, 0);
            assert_eq!(run(&p, to(), &replies[..replies.len() - 5], size).2, Step::Open);
        }
        let (sent, _, _) = run(&proxy(Protocol::Http, None), "[2001:db8::7]:80".parse().unwrap(), b"", 1);
        assert_eq!(sent, [b"CONNECT [2001:db8::7]:80 HTTP/1.1\r\nHost: [2001:db8::7]:80\r\n\r\n"]);
    }

    #[test]
    fn http_refusals_and_replies_that_are_none() {
        let p = proxy(Protocol::Http, None);
        let endless = [&b"HTTP/1.1 200 "[..], &[b'x'; HEAD_MAX]].concat();
        let cases: &[(&[u8], Failure)] = &[
            (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", Failure::Credentials),
            (b"HTTP/1.0 403 Forbidden\r\nA: b\r\n\r\n", Failure::Forbidden),
            (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", Failure::HostUnreachable),
            (b"HTTP/1.1 405 No\r\n\r\n", Failure::Unable),
            (b"HTTP/1.1 100 Continue\r\n\r\n", Failure::Unable),
            (b"HTTP/1.1 2000 OK\r\n\r\n", Failure::Malformed),
            (b"HTTP/2 200\r\n\r\n", Failure::Malformed),
            (b"SSH-2.0-OpenSSH\r\n", Failure::Malformed),
            (b"\r\n\r\n", Failure::Malformed),
            (&endless, Failure::Malformed),
        ];
        for (replies, failure) in cases {
            for size in [1, 7, replies.len()] {
                assert_eq!(run(&p, to(), replies, size).2, Step::Failed(*failure));
            }
        }
        // A head that has not ended is waited for.
        assert_eq!(run(&p, to(), b"HTTP/1.1 200 OK\r\n", 4).2, Step::Wait);
    }

    #[test]
    fn credentials_are_not_shown() {
        let p = proxy(Protocol::Socks5, Some(("me", "secret")));
        assert_eq!(format!("{p:?}"), "Socks5 at 192.0.2.1:1080");
    }

    #[test]
    fn base64_pads() {
        let cases = [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")];
        for (plain, coded) in cases {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }
}
