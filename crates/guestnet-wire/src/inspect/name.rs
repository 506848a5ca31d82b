//! Host names as they are compared.

/// The longest host name, as text (RFC 1035 2.3.4).
const NAME_MAX: usize = 253;

/// A name as it is compared: lower case, without a final dot. `None` for what is no host name.
pub(super) fn host_name(text: &[u8]) -> Option<Box<[u8]>> {
    let text = text.strip_suffix(b".").unwrap_or(text);
    let is_name = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let labels = text.split(|b| *b == b'.').all(|l| !l.is_empty() && l.len() <= 63);
    (labels && text.len() <= NAME_MAX && text.iter().all(is_name)).then(|| text.to_ascii_lowercase().into())
}
