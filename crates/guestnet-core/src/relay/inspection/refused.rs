//! What a guest reads when a conversation is refused by its name.

use std::fmt::Write;
use std::net::SocketAddr;

/// The body of a response with status 403.
pub(super) fn json(rule: &str, reason: &str, destination: SocketAddr, name: Option<&str>) -> String {
    let mut out = String::from("{\"error\":\"denied\",\"rule\":");
    quote(&mut out, rule);
    out.push_str(",\"reason\":");
    quote(&mut out, reason);
    out.push_str(",\"destination\":");
    quote(&mut out, &destination.to_string());
    out.push_str(",\"name\":");
    match name {
        Some(name) => quote(&mut out, name),
        None => out.push_str("null"),
    }
    out.push('}');
    out
}

/// A string of JSON (RFC 8259 7).
fn quote(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c < ' ' || c == '\x7f' => {
                // Writing to a string never fails.
                let _written = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_body_is_json_whatever_the_label() {
        let to = "192.0.2.1:80".parse().unwrap();
        assert_eq!(
            json("allow \"a\\b\"\n", "policy", to, Some("x.example")),
            "{\"error\":\"denied\",\"rule\":\"allow \\\"a\\\\b\\\"\\u000a\",\"reason\":\"policy\",\
             \"destination\":\"192.0.2.1:80\",\"name\":\"x.example\"}"
        );
        assert!(json("r", "policy", to, None).ends_with("\"name\":null}"));
    }
}
