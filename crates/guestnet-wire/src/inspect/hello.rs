//! The ClientHello of TLS (RFC 8446 4.1.2), of version 1.3 and those before it.

use super::name::host_name;
use crate::be16;
use std::net::IpAddr;

/// Extensions.
const SERVER_NAME: u16 = 0;
const EARLY_DATA: u16 = 42;
const SUPPORTED_VERSIONS: u16 = 43;
const ENCRYPTED_CLIENT_HELLO: u16 = 0xfe0d;
/// The extension of drafts before it.
const ENCRYPTED_SERVER_NAME: u16 = 0xffce;

/// What a ClientHello says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientHello {
    /// The server name, in lower case and without a final dot. An address is none (RFC 6066 3).
    pub server_name: Option<Box<[u8]>>,
    /// It has the extension encrypted_client_hello: perhaps another name is hidden in it, or nothing (GREASE).
    pub ech: bool,
    /// It offers early data, which may follow at once.
    pub early_data: bool,
    /// It offers TLS 1.3, so a second ClientHello may follow.
    pub tls13: bool,
}

/// Reads a length and as many bytes; the rest is left.
fn vector<'a>(b: &mut &'a [u8], length_bytes: usize) -> Option<&'a [u8]> {
    let (length, rest) = b.split_at_checked(length_bytes)?;
    let length = length.iter().fold(0usize, |n, byte| n << 8 | usize::from(*byte));
    let (value, rest) = rest.split_at_checked(length)?;
    *b = rest;
    Some(value)
}

impl ClientHello {
    /// Reads the body of a ClientHello message.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(body: &[u8]) -> Result<ClientHello, &'static str> {
        const SHORT: &str = "a ClientHello with lengths that do not fit";
        let mut b = body.get(34..).ok_or(SHORT)?;
        let session = vector(&mut b, 1).ok_or(SHORT)?;
        let suites = vector(&mut b, 2).ok_or(SHORT)?;
        let compression = vector(&mut b, 1).ok_or(SHORT)?;
        if session.len() > 32 || suites.is_empty() || suites.len() % 2 != 0 || compression.is_empty() {
            return Err(SHORT);
        }
        let mut hello = ClientHello { server_name: None, ech: false, early_data: false, tls13: false };
        if b.is_empty() {
            return Ok(hello);
        }
        let mut extensions = vector(&mut b, 2).ok_or(SHORT)?;
        if !b.is_empty() {
            return Err(SHORT);
        }
        let mut has_name = false;
        while !extensions.is_empty() {
            let kind = be16(extensions, 0);
            extensions = extensions.get(2..).ok_or(SHORT)?;
            let data = vector(&mut extensions, 2).ok_or(SHORT)?;
            match kind {
                SERVER_NAME if std::mem::replace(&mut has_name, true) => return Err("two server names"),
                SERVER_NAME => hello.server_name = server_name(data)?,
                EARLY_DATA => hello.early_data = true,
                SUPPORTED_VERSIONS => hello.tls13 |= offers_tls13(data),
                ENCRYPTED_CLIENT_HELLO | ENCRYPTED_SERVER_NAME => hello.ech = true,
                _ => {}
            }
        }
        Ok(hello)
    }
}

/// Whether a list of versions has TLS 1.3 or a draft of it (RFC 8446 4.2.1).
fn offers_tls13(mut data: &[u8]) -> bool {
    let versions = vector(&mut data, 1).unwrap_or(&[]);
    versions.chunks_exact(2).any(|v| matches!(v, [3, 4..=255] | [0x7f, _]))
}

/// The name in the extension server_name (RFC 6066 3).
fn server_name(mut data: &[u8]) -> Result<Option<Box<[u8]>>, &'static str> {
    const WRONG: &str = "a server name extension that is not one host name";
    let mut list = vector(&mut data, 2).ok_or(WRONG)?;
    let (kind, rest) = list.split_first().ok_or(WRONG)?;
    list = rest;
    let name = vector(&mut list, 2).ok_or(WRONG)?;
    if *kind != 0 || !list.is_empty() || !data.is_empty() {
        return Err(WRONG);
    }
    if std::str::from_utf8(name).is_ok_and(|text| text.parse::<IpAddr>().is_ok()) {
        return Ok(None);
    }
    host_name(name).map(Some).ok_or("a server name that is no host name")
}
