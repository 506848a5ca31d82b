//! What all DNS messages have in common (RFC 1035 section 4): sizes, flags, codes, names and the OPT record.

/// Length of the header.
pub const HEADER: usize = 12;
/// Bytes of the longest name.
pub const NAME_MAX: usize = 255;
/// Bytes of the longest label.
pub const LABEL_MAX: u8 = 63;
/// Bytes of a response over UDP that every client takes.
pub const PLAIN_MAX: usize = 512;
/// Bytes of a response over UDP that no link fragments.
pub const UDP_MAX: usize = 1232;
/// Bytes of the longest message over TCP.
pub const TCP_MAX: usize = 65535;
/// The class of all names that are served or forwarded.
pub const IN: u16 = 1;

/// Bits of the header.
pub mod flags {
    /// A response.
    pub const QR: u16 = 0x8000;
    /// The kind of query; 0 is an ordinary one.
    pub const OPCODE: u16 = 0x7800;
    /// From the zone's own server.
    pub const AA: u16 = 0x0400;
    /// Truncated: records are missing.
    pub const TC: u16 = 0x0200;
    /// Recursion desired.
    pub const RD: u16 = 0x0100;
    /// Recursion available.
    pub const RA: u16 = 0x0080;
    /// Verified by DNSSEC.
    pub const AD: u16 = 0x0020;
    /// Not to be verified.
    pub const CD: u16 = 0x0010;
    /// In the flags of EDNS: DNSSEC records are wanted.
    pub const DO: u16 = 0x8000;
}

/// Response codes (RFC 1035 section 4.1.1, RFC 6891 section 9).
pub mod rcode {
    /// The name exists.
    pub const NOERROR: u16 = 0;
    /// The query could not be read.
    pub const FORMERR: u16 = 1;
    /// A temporary failure.
    pub const SERVFAIL: u16 = 2;
    /// There is no such name.
    pub const NXDOMAIN: u16 = 3;
    /// The kind of query is not implemented.
    pub const NOTIMP: u16 = 4;
    /// The server does not want to answer.
    pub const REFUSED: u16 = 5;
    /// The version of EDNS is not implemented.
    pub const BADVERS: u16 = 16;
}

/// Codes of extended errors (RFC 8914 section 4).
pub mod ede {
    /// An error without a code of its own; the text says what it is.
    pub const OTHER: u16 = 0;
    /// The server cannot answer yet.
    pub const NOT_READY: u16 = 14;
    /// The name is blocked by a policy of the one who operates the server.
    pub const BLOCKED: u16 = 15;
    /// No name server answers.
    pub const NO_REACHABLE_AUTHORITY: u16 = 22;
}

/// Types that the code knows by number.
pub mod kind {
    /// An IPv4 address.
    pub const A: u16 = 1;
    /// An alias.
    pub const CNAME: u16 = 5;
    /// The start of a zone.
    pub const SOA: u16 = 6;
    /// An IPv6 address.
    pub const AAAA: u16 = 28;
    /// A service binding (RFC 9460).
    pub const SVCB: u16 = 64;
    /// A service binding of HTTPS.
    pub const HTTPS: u16 = 65;
    /// The pseudo-record of EDNS.
    pub const OPT: u16 = 41;
    /// Any type.
    pub const ANY: u16 = 255;
}

/// Whether a type is no data: meta types and transfers (RFC 6895 section 3.1), ANY excepted.
#[must_use]
pub fn is_meta(kind: u16) -> bool {
    (128..=254).contains(&kind)
}

/// Where an uncompressed name ends; with `compressed` one that may end in a pointer, which is not followed.
pub(super) fn name_end(b: &[u8], start: usize, compressed: bool) -> Option<usize> {
    let mut at = start;
    loop {
        let length = usize::from(*b.get(at)?);
        match length {
            0 => break,
            1..=63 => at += 1 + length,
            192.. if compressed && at - start <= NAME_MAX => return (at + 2 <= b.len()).then_some(at + 2),
            _ => return None,
        }
        if at - start >= NAME_MAX {
            return None;
        }
    }
    Some(at + 1)
}

/// Appends the name at `start` to `out` without compression, and says where it ends in `b`. `None` when it is malformed:
/// cut off, too long, or with a pointer that does not lead backwards.
#[must_use]
pub fn expand_name(b: &[u8], start: usize, out: &mut Vec<u8>) -> Option<usize> {
    let begin = out.len();
    let (mut at, mut end, mut lowest) = (start, None, start);
    loop {
        let length = *b.get(at)?;
        match length {
            0..=LABEL_MAX => {
                let next = at + 1 + usize::from(length);
                out.extend_from_slice(b.get(at..next)?);
                if out.len() - begin > NAME_MAX {
                    return None;
                }
                at = next;
                if length == 0 {
                    return Some(end.unwrap_or(at));
                }
            }
            192.. => {
                let to = usize::from(length & 0x3f) << 8 | usize::from(*b.get(at + 1)?);
                end = end.or(Some(at + 2));
                if to >= lowest {
                    return None;
                }
                (at, lowest) = (to, to);
            }
            _ => return None,
        }
    }
}

/// Puts the OPT record of a message in `out`.
pub(super) fn opt(size: u16, rcode: u16, edns_flags: u16, options: &[u8], out: &mut Vec<u8>) {
    let [s0, s1] = size.to_be_bytes();
    let [f0, f1] = edns_flags.to_be_bytes();
    let [l0, l1] = (options.len() as u16).to_be_bytes();
    out.extend_from_slice(&[0, 0, kind::OPT as u8, s0, s1, (rcode >> 4) as u8, 0, f0, f1, l0, l1]);
    out.extend_from_slice(options);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_expanded_along_pointers_that_lead_backwards_only() {
        let message =
            [&[9u8; 2][..], b"\x03org\0", b"\x07example\xc0\x02", b"\x03www\xc0\x07", b"tail"].concat();
        let mut out = Vec::new();
        assert_eq!(expand_name(&message, 17, &mut out), Some(23));
        assert_eq!(out, b"\x03www\x07example\x03org\0");
        for (name, what) in [
            (&b"\xc0\x00"[..], "a pointer to itself"),
            (b"\x01a\xc0\x00", "a pointer to its own start"),
            (b"\xc0\x02\xc0\x00", "a pointer forwards"),
            (b"\x01", "a label that is cut off"),
            (b"\x80a\0", "a label of an unknown kind"),
            (b"\xc0", "half a pointer"),
            (b"", "nothing"),
        ] {
            assert_eq!(expand_name(name, 0, &mut Vec::new()), None, "{what}");
        }
        let long = [b"\x3f", &[b'a'; 63][..]].concat().repeat(4);
        assert_eq!(expand_name(&[&long[..], b"\0"].concat(), 0, &mut Vec::new()), None, "over 255 bytes");
    }
}
