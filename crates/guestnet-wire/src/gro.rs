//! Theory of operation: the opposite of [`crate::gso`], for guests that cannot send large frames. Frames
//! that lie one behind the other in a buffer, as one read of a stream brought them, and that continue the same
//! TCP flow become one: the payload of the next moves up to the end of the run, and at the end the headers are
//! made right for the whole, which then looks as if a guest that can segment had sent it. Nothing that the
//! frames say besides their length and place may differ, so that cutting the run again gives the same frames.
//! Checksums are verified before anything is joined; a frame that stays alone is left as it came.

use crate::gso::{Csum, Gso};
use crate::{be16, be32, checksum, ether, ipv4, parse, proto, put, tcp};
use std::ops::Range;

const L3: usize = ether::HEADER_LEN;
const L4: usize = L3 + ipv4::MIN_LEN;
/// Bytes of a packet at most.
const PACKET_MAX: usize = 65535;

/// A frame that may be continued, where it fits: lengths of headers and payload.
#[derive(Debug, Clone, Copy)]
struct Shape {
    headers: usize,
    payload: usize,
    /// The sender pushed: nothing follows in the same breath.
    push: bool,
}

/// IPv4 without options or fragments, TCP with nothing but data and an ACK, and no byte behind it.
fn shape(frame: &[u8]) -> Option<Shape> {
    let plain = be16(frame, 12) == ether::IPV4
        && frame.get(L3) == Some(&0x45)
        && frame.get(L3 + 9) == Some(&proto::TCP)
        && be16(frame, L3 + 6) & 0x3fff == 0
        && L3 + usize::from(be16(frame, L3 + 2)) == frame.len();
    if !plain {
        return None;
    }
    let headers = L4 + usize::from(frame.get(L4 + 12)? >> 4) * 4;
    let flags = *frame.get(L4 + 13)?;
    let payload = frame.len().checked_sub(headers).filter(|n| *n > 0 && headers >= L4 + tcp::MIN_LEN)?;
    (flags & !tcp::flags::PSH == tcp::flags::ACK).then_some(Shape {
        headers,
        payload,
        push: flags & tcp::flags::PSH != 0,
    })
}

/// Both checksums of a frame of that shape.
fn verified(frame: &[u8]) -> bool {
    parse::parse_ip(frame, L3)
        .is_ok_and(|p| parse::verify_ipv4_header(frame, &p) && parse::verify_l4(frame, &p))
}

/// Frames that became one, or the first that may.
#[derive(Debug)]
pub struct Run {
    from: usize,
    end: usize,
    first: Shape,
    /// Sequence number of the byte behind it.
    next: u32,
    frames: usize,
    /// Something may follow.
    open: bool,
}

impl Run {
    /// A run of the one frame at `at`, which may be of any kind.
    #[must_use]
    pub fn begin(buf: &[u8], at: Range<usize>) -> Run {
        let frame = buf.get(at.clone()).unwrap_or(&[]);
        let shape = shape(frame);
        let first = shape.unwrap_or(Shape { headers: 0, payload: 0, push: true });
        let next = be32(frame, L4 + 4).wrapping_add(first.payload as u32);
        Run { from: at.start, end: at.end, first, next, frames: 1, open: !first.push }
    }

    /// Adds the frame at `at`, which lies behind the run. False when it does not continue it; then `buf` is
    /// as it was.
    pub fn add(&mut self, buf: &mut [u8], at: Range<usize>) -> bool {
        if !self.open {
            return false;
        }
        let (Some((run, _)), Some(frame)) = (
            buf.get(self.from..).and_then(|b| b.split_at_checked(self.end - self.from)),
            buf.get(at.clone()),
        ) else {
            return false;
        };
        let Some(next) = shape(frame) else { return false };
        let headers = self.first.headers;
        let same = |r: Range<usize>| run.get(r.clone()) == frame.get(r);
        let continues = next.headers == headers
            && be32(frame, L4 + 4) == self.next
            && next.payload <= self.first.payload
            && self.end - self.from - L3 + next.payload <= PACKET_MAX
            // All but total length, identification and header checksum.
            && same(0..L3 + 2)
            && same(L3 + 6..L3 + 10)
            && same(L3 + 12..L3 + ipv4::MIN_LEN)
            // All but sequence number, PSH and checksum.
            && same(L4..L4 + 4)
            && same(L4 + 8..L4 + 13)
            && same(L4 + 14..L4 + 16)
            && same(L4 + 18..headers);
        if !continues || !verified(frame) {
            return false;
        }
        if self.frames == 1 && !verified(run) {
            self.open = false;
            return false;
        }
        buf.copy_within(at.start + headers..at.end, self.end);
        self.end += next.payload;
        self.next = self.next.wrapping_add(next.payload as u32);
        self.frames += 1;
        self.open = !next.push && next.payload == self.first.payload;
        if next.push {
            put(buf, self.from + L4 + 13, &[tcp::flags::ACK | tcp::flags::PSH]);
        }
        true
    }

    /// The end of the run: where the frame is now, and what is to be said of it.
    #[must_use]
    pub fn finish(self, buf: &mut [u8]) -> (Range<usize>, Csum, Option<Gso>) {
        let at = self.from..self.end;
        if self.frames == 1 {
            return (at, Csum::Full, None);
        }
        let Some(frame) = buf.get_mut(at.clone()) else { return (at, Csum::Full, None) };
        let packet = frame.len() - L3;
        put(frame, L3 + 2, &(packet as u16).to_be_bytes());
        ipv4::fill_checksum(frame.get_mut(L3..).unwrap_or(&mut []));
        let length = packet - ipv4::MIN_LEN;
        let addresses = frame.get(L3 + 12..L3 + ipv4::MIN_LEN).unwrap_or(&[]);
        let sum = checksum::sum(addresses, u64::from(proto::TCP) + length as u64);
        put(frame, L4 + 16, &checksum::fold(sum).to_be_bytes());
        (at, Csum::Partial { start: L4 as u16, offset: 16 }, Some(Gso::Tcp(self.first.payload as u16)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gso::{complete_checksum, segment};

    /// A large frame of `len` bytes of payload, and the frames of `size` that it is cut into.
    fn cut(len: usize, size: u16, options: &[u8], flags: u8) -> (Vec<u8>, Vec<Vec<u8>>) {
        let mut f = vec![2; 12];
        f.extend_from_slice(&[8, 0]);
        let ip = ipv4::Ipv4 {
            src: [10, 0, 0, 2].into(),
            dst: [192, 0, 2, 1].into(),
            proto: proto::TCP,
            ttl: 64,
            tos: 0,
            id: 77,
            frag: ipv4::DF,
            payload_len: (tcp::MIN_LEN + options.len() + len) as u16,
        };
        let mut header = [0; ipv4::MIN_LEN];
        ip.emit(&mut header);
        f.extend_from_slice(&header);
        let offset = ((tcp::MIN_LEN + options.len()) / 4) as u8;
        f.extend_from_slice(&[
            1,
            2,
            3,
            4,
            0xff,
            0xff,
            0xf0,
            0,
            9,
            9,
            9,
            9,
            offset << 4,
            flags,
            5,
            5,
            0,
            0,
            0,
            0,
        ]);
        f.extend_from_slice(options);
        f.extend((0..len).map(|i| (i * 7 % 251) as u8));
        let mut pieces = Vec::new();
        segment(&f, Gso::Tcp(size), |h, p| pieces.push([h, p].concat())).unwrap();
        (f, pieces)
    }

    /// Frames as they lie in the buffer of a stream, and where.
    fn lay(frames: &[Vec<u8>]) -> (Vec<u8>, Vec<Range<usize>>) {
        let (mut buf, mut at) = (Vec::new(), Vec::new());
        for f in frames {
            buf.extend_from_slice(&(f.len() as u32).to_be_bytes());
            at.push(buf.len()..buf.len() + f.len());
            buf.extend_from_slice(f);
        }
        (buf, at)
    }

    /// What comes of frames: each that is left, with what is said of it.
    fn merge(frames: &[Vec<u8>]) -> Vec<(Vec<u8>, Csum, Option<Gso>)> {
        let (mut buf, at) = lay(frames);
        let (mut out, mut run) = (Vec::new(), None::<Run>);
        for r in at {
            if run.as_mut().is_some_and(|run| run.add(&mut buf, r.clone())) {
                continue;
            }
            if let Some(run) = run.replace(Run::begin(&buf, r)) {
                let (r, c, g) = run.finish(&mut buf);
                out.push((buf[r].to_vec(), c, g));
            }
        }
        if let Some(run) = run {
            let (r, c, g) = run.finish(&mut buf);
            out.push((buf[r].to_vec(), c, g));
        }
        out
    }

    const STAMPS: [u8; 12] = [1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2];

    #[test]
    fn what_was_cut_is_whole_again_and_cut_once_more_the_same() {
        for (len, flags) in [(3 * 1448, 0x10), (20_000, 0x18), (64_000, 0x10), (1449, 0x18)] {
            let (_, pieces) = cut(len, 1448, &STAMPS, flags);
            let merged = merge(&pieces);
            assert_eq!(merged.len(), 1, "{len}");
            let (frame, csum, gso) = &merged[0];
            assert_eq!((*csum, *gso), (Csum::Partial { start: 34, offset: 16 }, Some(Gso::Tcp(1448))));
            let mut again = Vec::new();
            segment(frame, Gso::Tcp(1448), |h, p| again.push([h, p].concat())).unwrap();
            assert!(again == pieces);
            // Its partial checksum is one that can be completed.
            let mut done = frame.clone();
            complete_checksum(&mut done, 34, 16).unwrap();
            assert!(verified(&done));
        }
    }

    #[test]
    fn a_frame_alone_is_as_it_came() {
        let (_, pieces) = cut(100, 1448, &[], 0x18);
        let mut arp = vec![0xff; 42];
        arp[12..14].copy_from_slice(&[8, 6]);
        for f in [pieces[0].clone(), arp, vec![], vec![0; 14], vec![0x45; 60]] {
            assert_eq!(merge(std::slice::from_ref(&f)), [(f.clone(), Csum::Full, None)]);
            assert_eq!(merge(&[f.clone(), f.clone()]).len(), 2);
        }
    }

    #[test]
    fn nothing_is_joined_that_differs_in_anything() {
        let (_, pieces) = cut(2 * 1448, 1448, &STAMPS, 0x10);
        let count = pieces[0].len();
        for at in 0..count {
            // What is cut again in the same way may differ: identification, and what is verified instead.
            let free = [L3 + 2, L3 + 3, L3 + 4, L3 + 5, L3 + 10, L3 + 11, L4 + 16, L4 + 17];
            let (mut second, bit) = (pieces[1].clone(), 1 << (at % 8));
            second[at] ^= bit;
            if at == L4 + 13 && bit == tcp::flags::PSH {
                continue;
            }
            if at < count - 1448 && !free.contains(&at) {
                // With checksums that are right all the same.
                fix(&mut second);
            }
            let out = merge(&[pieces[0].clone(), second.clone()]);
            assert_eq!(out.len(), 2, "byte {at}");
            assert!(out[0] == (pieces[0].clone(), Csum::Full, None) && out[1] == (second, Csum::Full, None));
        }
    }

    fn fix(frame: &mut [u8]) {
        ipv4::fill_checksum(&mut frame[L3..]);
        if let Ok(p) = parse::parse_ip(frame, L3)
            && p.proto == proto::TCP
        {
            let at = p.l4 + 16;
            put(frame, at, &[0, 0]);
            let sum = checksum::pseudo(p.src, p.dst, p.proto, (p.end - p.l4) as u32);
            let sum = checksum::finish(checksum::sum(&frame[p.l4..p.end], sum));
            put(frame, at, &sum.to_be_bytes());
        }
    }

    #[test]
    fn a_first_frame_with_a_wrong_checksum_takes_nobody_with_it() {
        let (_, mut pieces) = cut(3 * 1448, 1448, &[], 0x10);
        pieces[0][100] ^= 1;
        let out = merge(&pieces);
        assert_eq!(out.len(), 2);
        assert!(out[0] == (pieces[0].clone(), Csum::Full, None));
        assert_eq!(out[1].0.len(), L4 + tcp::MIN_LEN + 2 * 1448);
    }

    #[test]
    fn a_push_or_a_short_frame_ends_it_and_so_does_the_largest_packet() {
        let (_, a) = cut(2000, 1448, &[], 0x18);
        // What follows goes on where the sequence numbers do, but not in the same run.
        let mut next = a[1].clone();
        let seq = be32(&next, L4 + 4).wrapping_add(552);
        put(&mut next, L4 + 4, &seq.to_be_bytes());
        fix(&mut next);
        assert_eq!(merge(&[a[0].clone(), a[1].clone(), next]).len(), 2);
        let (_, mut most) = cut(65_000, 1000, &[], 0x10);
        let mut last = most[64].clone();
        let seq = be32(&last, L4 + 4).wrapping_add(1000);
        put(&mut last, L4 + 4, &seq.to_be_bytes());
        fix(&mut last);
        most.push(last);
        let out = merge(&most);
        assert_eq!(out.len(), 2);
        assert!(out.iter().all(|(f, ..)| f.len() <= L3 + PACKET_MAX));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_survived(frames in proptest::collection::vec(proptest::collection::vec(proptest::num::u8::ANY, 0..90), 1..6)) {
            let out = merge(&frames);
            proptest::prop_assert!(out.len() <= frames.len());
        }
    }
}
