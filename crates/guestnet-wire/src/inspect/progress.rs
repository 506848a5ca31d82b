//! What the inspectors of streams and datagrams say, and how much they hold.

use super::hello::ClientHello;

/// Bytes that an inspector holds at most: of a ClientHello, or of a request head.
pub const HELD_MAX: usize = 1 << 16;

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
