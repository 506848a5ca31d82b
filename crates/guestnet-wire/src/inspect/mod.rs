//! Theory of operation: what a conversation says of the name that it is for, read from the client's first bytes: the
//! server name of TLS ([`stream`], [`tls`]) and the host of HTTP/1 ([`http`]). Everything here is pure and bounded: bytes
//! go in as they arrive, in any pieces, and the result does not depend on the pieces. Nothing here knows a policy.
//!
//! - [`StreamInspector`] says what a TCP stream is. Of TLS it reads the ClientHello, and a second one after a
//!   HelloRetryRequest. HTTP is left to [`HttpInspector`], which reads every request head of a connection.
//! - [`QuicInspector`] reads the ClientHello of a QUIC connection from its Initial packets ([`quic`]).
//! - What looks like one of these protocols and breaks its rules is [`Progress::Malformed`]: a server may understand it
//!   in another way than is understood here. What looks like neither is [`Progress::Opaque`].

mod hello;
pub mod http;
mod name;
mod progress;
pub mod quic;
pub mod stream;
pub mod tls;

pub use hello::ClientHello;
pub use http::{HttpInspector, HttpProgress, RequestHead};
pub use progress::{HELD_MAX, Progress};
pub use quic::{QuicCheck, QuicInspector};
pub use stream::StreamInspector;

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
