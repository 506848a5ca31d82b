//! Theory of operation: what a conversation says of the name that it is for, read from the client's first bytes: the
//! server name of TLS ([`stream`], [`tls`]) and the host of HTTP/1 ([`http`]). Everything here is pure and bounded: bytes
//! go in as they arrive, in any pieces, and the result does not depend on the pieces. Nothing here knows a policy.
//!
//! - [`StreamInspector`] says what a TCP stream is. Of TLS it reads the ClientHello, and a second one after a
//!   HelloRetryRequest. HTTP is left to [`HttpInspector`], which reads every request head of a connection.
//! - [`QuicInspector`] reads the ClientHello of a QUIC connection from its Initial packets ([`quic`]).
//! - What looks like one of these protocols and breaks its rules is [`Progress::Malformed`]: a server may understand it
//!   in another way than is understood here. What looks like neither is [`Progress::Opaque`].

pub mod http;
pub mod quic;
pub mod stream;
pub mod tls;

pub use http::{HttpInspector, HttpProgress, RequestHead};
pub use quic::{QuicCheck, QuicInspector};
pub use stream::StreamInspector;
pub use tls::ClientHello;

/// Bytes that an inspector holds at most: of a ClientHello, or of a request head.
pub const HELD_MAX: usize = 1 << 16;
/// The longest host name, as text (RFC 1035 2.3.4).
const NAME_MAX: usize = 253;

/// What is known of a stream, or of the datagrams of a flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// Not enough yet.
    More,
    /// A ClientHello.
    Tls(ClientHello),
    /// HTTP/1: its first line says so.
    Http,
    /// Nothing more can be read: another protocol, or the encrypted part of TLS.
    Opaque(&'static str),
    /// It breaks the rules of its protocol.
    Malformed(&'static str),
}

/// A name as it is compared: lower case, without a final dot. `None` for what is no host name.
pub(crate) fn host_name(text: &[u8]) -> Option<Box<[u8]>> {
    let text = text.strip_suffix(b".").unwrap_or(text);
    let is_name = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let labels = text.split(|b| *b == b'.').all(|l| !l.is_empty() && l.len() <= 63);
    (labels && text.len() <= NAME_MAX && text.iter().all(is_name)).then(|| text.to_ascii_lowercase().into())
}

/// The record of the TLS alert access_denied (RFC 8446 6.2), for a client that waits for the ServerHello.
#[must_use]
pub fn alert_access_denied() -> &'static [u8] {
    &[21, 3, 3, 0, 2, 2, 49]
}

/// A response of HTTP/1.1 with status 403 and this JSON text, behind which the connection ends.
#[must_use]
pub fn forbidden_response(json: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 403 Forbidden\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
         Cache-Control: no-store\r\nConnection: close\r\n\r\n{json}",
        json.len()
    )
    .into_bytes()
}

#[cfg(test)]
mod tests;
