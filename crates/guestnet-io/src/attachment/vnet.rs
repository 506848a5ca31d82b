//! Theory of operation: virtio_net_hdr (virtio 1.2, 5.1.6), little-endian, 10 bytes or 12 with a count of
//! buffers. What a guest says in it is checked against the frame before anything believes it: a checksum
//! field outside the frame, a segment size of zero or a kind that was not offered make a bad frame. The
//! header length that it claims is never used; the frame is parsed instead.

use guestnet_core::types::{Csum, FrameMeta, Gso};
use guestnet_wire::{ether, parse, proto, tcp, udp};

/// Length without the count of buffers.
pub(crate) const LEN: usize = 10;
/// Length with it.
pub(crate) const LEN_MRG: usize = 12;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// The header says what cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BadHeader;

fn le16(b: &[u8], at: usize) -> u16 {
    match b.get(at..at + 2) {
        Some(&[lo, hi]) => u16::from_le_bytes([lo, hi]),
        _ => 0,
    }
}

/// Reads the header of a frame from a guest.
pub(crate) fn parse(header: &[u8], frame: &[u8]) -> Result<FrameMeta, BadHeader> {
    let &[flags, kind, ..] = header else { return Err(BadHeader) };
    let (size, start, offset) = (le16(header, 4), le16(header, 6), le16(header, 8));
    let csum = if flags & NEEDS_CSUM != 0 {
        // The checksum of something in front of the IP payload is nobody's to ask for.
        if usize::from(start) < ether::HEADER_LEN
            || usize::from(start) + usize::from(offset) + 2 > frame.len()
        {
            return Err(BadHeader);
        }
        Csum::Partial { start, offset }
    } else if flags & DATA_VALID != 0 {
        Csum::Valid
    } else {
        Csum::Full
    };
    let gso = match kind & !GSO_ECN {
        GSO_NONE => None,
        GSO_TCPV4 | GSO_TCPV6 => Some(Gso::Tcp(size)),
        GSO_UDP_L4 => Some(Gso::Udp(size)),
        _ => return Err(BadHeader),
    };
    if gso.is_some() && size == 0 {
        return Err(BadHeader);
    }
    Ok(FrameMeta { csum, gso })
}

/// Makes the header of a frame to a guest; `headers` is the front of the frame, with all its headers.
/// `None` when the frame is not what `meta` says.
pub(crate) fn emit(meta: &FrameMeta, headers: &[u8]) -> Option<[u8; LEN_MRG]> {
    let mut h = [0u8; LEN_MRG];
    match meta.csum {
        Csum::Full => {}
        Csum::Valid => h[0] = DATA_VALID,
        Csum::Partial { start, offset } => {
            h[0] = NEEDS_CSUM;
            h[6..8].copy_from_slice(&start.to_le_bytes());
            h[8..10].copy_from_slice(&offset.to_le_bytes());
        }
    }
    if let Some(gso) = meta.gso {
        // Segmentation without a partial checksum is nothing that a kernel takes.
        let Csum::Partial { start, .. } = meta.csum else { return None };
        let l4 = usize::from(start);
        let v6 = guestnet_wire::be16(headers, 12) == ether::IPV6;
        let (kind, size, len) = match gso {
            Gso::Tcp(n) => {
                let data = headers.get(l4 + 12)? >> 4;
                (if v6 { GSO_TCPV6 } else { GSO_TCPV4 }, n, usize::from(data) * 4)
            }
            Gso::Udp(n) => (GSO_UDP_L4, n, udp::LEN),
        };
        h[1] = kind;
        h[2..4].copy_from_slice(&((l4 + len) as u16).to_le_bytes());
        h[4..6].copy_from_slice(&size.to_le_bytes());
    }
    Some(h)
}

/// For GSO frames whose checksum is not begun (a switch passes on what another guest sent): begins it.
/// False when the frame is not what `meta` says.
pub(crate) fn begin_checksum(frame: &mut [u8], meta: &mut FrameMeta) -> bool {
    let Ok(p) = parse::parse_ip(frame, ether::HEADER_LEN) else { return false };
    let (want, offset, min) = match meta.gso {
        Some(Gso::Tcp(_)) => (proto::TCP, 16, tcp::MIN_LEN),
        Some(Gso::Udp(_)) => (proto::UDP, 6, udp::LEN),
        None => return true,
    };
    if p.proto != want || p.fragment.is_some() || p.end < p.l4 + min {
        return false;
    }
    let len = (p.end - p.l4) as u32;
    let sum = guestnet_wire::checksum::fold(guestnet_wire::checksum::pseudo(p.src, p.dst, want, len));
    guestnet_wire::put(frame, p.l4 + offset, &sum.to_be_bytes());
    meta.csum = Csum::Partial { start: p.l4 as u16, offset: offset as u16 };
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(flags: u8, kind: u8, size: u16, start: u16, offset: u16) -> [u8; 10] {
        let mut h = [flags, kind, 0xff, 0xff, 0, 0, 0, 0, 0, 0];
        h[4..6].copy_from_slice(&size.to_le_bytes());
        h[6..8].copy_from_slice(&start.to_le_bytes());
        h[8..10].copy_from_slice(&offset.to_le_bytes());
        h
    }

    #[test]
    fn believes_what_can_be() {
        let f = [0u8; 100];
        let m = parse(&header(1, 1 | 0x80, 1448, 34, 16), &f).unwrap();
        assert_eq!(m, FrameMeta { csum: Csum::Partial { start: 34, offset: 16 }, gso: Some(Gso::Tcp(1448)) });
        assert_eq!(parse(&header(2, 0, 7, 9999, 9999), &f).unwrap().csum, Csum::Valid);
        assert_eq!(parse(&[0; 12], &f), Ok(FrameMeta::default()));
    }

    #[test]
    fn refuses_what_cannot_be() {
        let f = [0u8; 100];
        for h in [
            header(1, 0, 0, 84, 15),
            header(1, 0, 0, 0xffff, 0xffff),
            header(1, 0, 0, 13, 2),
            header(0, 1, 0, 0, 0),
            header(0, 5, 0, 0, 0),
            header(0, 3, 100, 0, 0),
            header(0, 0x7f, 100, 0, 0),
        ] {
            assert_eq!(parse(&h, &f), Err(BadHeader), "{h:?}");
        }
        assert_eq!(parse(&[], &f), Err(BadHeader));
        assert!(parse(&header(1, 0, 0, 84, 14), &f).is_ok());
        assert_eq!(parse(&header(1, 0, 0, 14, 2), &[]), Err(BadHeader));
    }

    #[test]
    fn what_is_written_reads_back() {
        let mut frame = [0u8; 80];
        frame[12] = 8;
        frame[14 + 20 + 12] = 0x80;
        let csum = Csum::Partial { start: 34, offset: 16 };
        let meta = FrameMeta { csum, gso: Some(Gso::Tcp(1000)) };
        let h = emit(&meta, &frame).unwrap();
        assert_eq!(parse(&h, &frame), Ok(meta));
        assert_eq!(le16(&h, 2), 66);
        assert!(emit(&FrameMeta { csum: Csum::Full, gso: Some(Gso::Tcp(1)) }, &frame).is_none());
        assert!(emit(&FrameMeta { csum, gso: Some(Gso::Tcp(1)) }, &frame[..20]).is_none());
    }
}
