//! Theory of operation: what a NIC does with a large send, in software. A frame may come with the request
//! that virtio calls GSO (cut the TCP or UDP payload in pieces of `gso_size`, each with its own headers)
//! and with a checksum that is only begun (`Partial`). An attachment that can pass both on does; for any
//! other, [`segment`] makes plain frames of it.

use crate::{WireError, be16, be32, checksum, ether, ipv4, parse, proto, put, tcp, udp};

/// How a frame's payload is to be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gso {
    /// TCP segmentation (IPv4 or IPv6) into payloads of this many bytes.
    Tcp(u16),
    /// UDP segmentation into datagrams of this many payload bytes.
    Udp(u16),
}

/// What a frame's transport checksum field holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Csum {
    /// The full checksum, to be verified by whoever takes the frame.
    #[default]
    Full,
    /// The full checksum was verified, or the frame never left this machine (virtio DATA_VALID).
    Valid,
    /// The field holds the folded pseudo-header sum; the rest is to be summed from `start` (offset in the
    /// frame) to the end and stored at `start + offset` (virtio NEEDS_CSUM).
    Partial {
        /// Where summing starts.
        start: u16,
        /// Where the field is, from `start`.
        offset: u16,
    },
}

/// Completes a partial checksum in place.
///
/// # Errors
/// [`WireError::Malformed`] when the offsets lie outside the frame.
pub fn complete_checksum(frame: &mut [u8], start: u16, offset: u16) -> Result<(), WireError> {
    let (start, field) = (usize::from(start), usize::from(start) + usize::from(offset));
    if field + 2 > frame.len() || start >= frame.len() {
        return Err(WireError::Malformed);
    }
    let c = checksum::finish(checksum::sum(&frame[start..], 0));
    // Only UDP gives zero a meaning; 0xffff is the same number for all others (RFC 1624).
    let c = if c == 0 && offset == 6 { 0xffff } else { c };
    put(frame, field, &c.to_be_bytes());
    Ok(())
}

/// Cuts `frame` (Ethernet, headers right for the whole) as `gso` asks and calls `out` with each piece: a
/// header of Ethernet, IP and transport with complete checksums, and the payload piece. `scratch` holds the
/// header while it is built.
///
/// # Errors
/// [`WireError`] when the frame is not what `gso` says.
///
/// # Examples
/// ```
/// use guestnet_wire::gso::{Gso, segment};
/// use guestnet_wire::{WireError, ether, ipv4, proto, udp};
///
/// let mut frame = [0; ether::HEADER_LEN + ipv4::MIN_LEN + udp::LEN + 10];
/// let (src, dst) = ([192, 168, 64, 2], [203, 0, 113, 9]);
/// ether::Ether { dst: ether::Mac([2; 6]), src: ether::Mac([4; 6]), ethertype: ether::IPV4 }.emit(&mut frame);
/// let header = ipv4::Ipv4 {
///     src: src.into(),
///     dst: dst.into(),
///     proto: proto::UDP,
///     ttl: 64,
///     tos: 0,
///     id: 1,
///     frag: 0,
///     payload_len: 18,
/// };
/// header.emit(&mut frame[14..]);
/// udp::emit(&mut frame[34..], src.into(), dst.into(), 50000, 53);
/// let mut pieces = Vec::new();
/// segment(&frame, Gso::Udp(4), |headers, payload| pieces.push((headers.len(), payload.len())))?;
/// assert_eq!(pieces, [(42, 4), (42, 4), (42, 2)]);
/// # Ok::<(), WireError>(())
/// ```
pub fn segment(frame: &[u8], gso: Gso, mut out: impl FnMut(&[u8], &[u8])) -> Result<(), WireError> {
    let p = parse::parse_ip(frame, ether::HEADER_LEN)?;
    let (want, size) = match gso {
        Gso::Tcp(n) => (proto::TCP, n),
        Gso::Udp(n) => (proto::UDP, n),
    };
    if p.proto != want || size == 0 || p.fragment.is_some() {
        return Err(WireError::Malformed);
    }
    let hlen = p.payload;
    let mut header = [0u8; 160];
    let header = header.get_mut(..hlen).ok_or(WireError::Malformed)?;
    let payload = frame.get(hlen..p.end).ok_or(WireError::Truncated)?;
    let (l3, l4) = (p.l3, p.l4);
    let id = be16(frame, l3 + 4);
    let seq = be32(frame, l4 + 4);
    let flags = frame.get(l4 + 13).copied().unwrap_or(0);
    let count = payload.len().div_ceil(usize::from(size)).max(1);
    for i in 0..count {
        let from = i * usize::from(size);
        let piece = &payload[from..payload.len().min(from + usize::from(size))];
        header.copy_from_slice(&frame[..hlen]);
        if p.src.is_ipv4() {
            put(header, l3 + 2, &((hlen - l3 + piece.len()) as u16).to_be_bytes());
            put(header, l3 + 4, &id.wrapping_add(i as u16).to_be_bytes());
            ipv4::fill_checksum(&mut header[l3..]);
        } else {
            put(header, l3 + 4, &((hlen - l3 - 40 + piece.len()) as u16).to_be_bytes());
        }
        let (field, len) = (if want == proto::TCP { 16 } else { 6 }, hlen - l4 + piece.len());
        if want == proto::TCP {
            put(header, l4 + 4, &seq.wrapping_add(from as u32).to_be_bytes());
            let mut f = flags;
            if i + 1 < count {
                f &= !(tcp::flags::FIN | tcp::flags::PSH);
            }
            if i > 0 {
                f &= !tcp::flags::CWR;
            }
            put(header, l4 + 13, &[f]);
        } else {
            put(header, l4 + 4, &((udp::LEN + piece.len()) as u16).to_be_bytes());
        }
        put(header, l4 + field, &[0, 0]);
        let mut s = checksum::pseudo(p.src, p.dst, want, len as u32);
        // The transport header has even length, so the payload sums on from an even offset.
        s = checksum::sum(&header[l4..], s);
        let c = checksum::finish(checksum::sum(piece, s));
        let c = if c == 0 && want == proto::UDP { 0xffff } else { c };
        put(header, l4 + field, &c.to_be_bytes());
        out(header, piece);
    }
    Ok(())
}
