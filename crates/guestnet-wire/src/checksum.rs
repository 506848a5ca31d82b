//! Theory of operation: the Internet checksum (RFC 1071) as a one's complement sum that is kept wide and
//! folded once. Sums are over big-endian words; `sum` may start at any address and any length, an odd
//! tail counts as padded with zero. Incremental updates follow RFC 1624 equation 3.

use std::net::IpAddr;

/// Adds the 16-bit big-endian words of `data` to `acc`, not folded. `data` is taken to start at an even
/// offset of whatever is summed; its odd last byte is padded with zero (RFC 1071).
#[inline]
#[must_use]
pub fn sum(data: &[u8], acc: u64) -> u64 {
    // Summed in native order eight bytes at a time with end-around carry (RFC 1071 section 2 B: the sum
    // is byte-order independent), then swapped once.
    let mut native: u64 = 0;
    let mut chunks = data.chunks_exact(32);
    for c in &mut chunks {
        let (mut s, mut carry) = (0u64, 0u64);
        let mut i = 0;
        while i < 32 {
            let w = u64::from_ne_bytes([
                c[i],
                c[i + 1],
                c[i + 2],
                c[i + 3],
                c[i + 4],
                c[i + 5],
                c[i + 6],
                c[i + 7],
            ]);
            s = s.wrapping_add(w & 0xffff_ffff);
            carry = carry.wrapping_add(w >> 32);
            i += 8;
        }
        native = native.wrapping_add(s).wrapping_add(carry);
    }
    let mut rest = chunks.remainder().chunks_exact(2);
    for c in &mut rest {
        native = native.wrapping_add(u64::from(u16::from_ne_bytes([c[0], c[1]])));
    }
    if let [last] = rest.remainder() {
        native = native.wrapping_add(u64::from(u16::from_ne_bytes([*last, 0])));
    }
    acc + u64::from(u16::from_be(fold_raw(native)))
}

#[inline]
fn fold_raw(mut s: u64) -> u16 {
    s = (s & 0xffff_ffff) + (s >> 32);
    s = (s & 0xffff) + ((s >> 16) & 0xffff) + (s >> 32);
    s = (s & 0xffff) + (s >> 16);
    s = (s & 0xffff) + (s >> 16);
    s as u16
}

/// Folds a sum to 16 bits without complementing it.
#[inline]
#[must_use]
pub fn fold(s: u64) -> u16 {
    fold_raw(s)
}

/// Folds and complements: the value that goes into a checksum field.
#[inline]
#[must_use]
pub fn finish(s: u64) -> u16 {
    !fold_raw(s)
}

/// Checksum of `data` alone (IPv4 header, ICMPv4).
///
/// # Examples
/// ```
/// use guestnet_wire::checksum::checksum;
///
/// let mut header = [0x45, 0, 0, 28, 0, 1, 0, 0, 64, 17, 0, 0, 192, 168, 64, 2, 203, 0, 113, 9];
/// let field = checksum(&header);
/// header[10..12].copy_from_slice(&field.to_be_bytes());
/// assert_eq!(checksum(&header), 0);
/// ```
#[inline]
#[must_use]
pub fn checksum(data: &[u8]) -> u16 {
    finish(sum(data, 0))
}

/// Sum of the pseudo-header (RFC 9293 3.1, RFC 768, RFC 8200 8.1), not folded. Mixed families count as
/// what each address is, so callers pass two of one family.
#[inline]
#[must_use]
pub fn pseudo(src: IpAddr, dst: IpAddr, proto: u8, len: u32) -> u64 {
    let addr = |a: IpAddr| match a {
        IpAddr::V4(a) => sum(&a.octets(), 0),
        IpAddr::V6(a) => sum(&a.octets(), 0),
    };
    // Five numbers of at most 18 bits.
    let len = u64::from(len >> 16).wrapping_add(u64::from(len & 0xffff));
    addr(src).wrapping_add(addr(dst)).wrapping_add(u64::from(proto)).wrapping_add(len)
}

/// What replacing `old` by `new` adds to a one's complement sum, for [`adjust`].
#[inline]
#[must_use]
pub fn difference(old: u16, new: u16) -> u16 {
    add16(!old, new)
}

/// RFC 1624 equation 3: the checksum field after `difference` was added to the sum that it covers.
///
/// # Examples
/// ```
/// use guestnet_wire::checksum::{adjust, checksum, difference};
///
/// let (old, new) = ([0x12, 0x34, 0xab, 0xcd], [0x12, 0x34, 0x00, 0x50]);
/// let field = adjust(checksum(&old), difference(0xabcd, 0x0050));
/// assert_eq!(field, checksum(&new));
/// ```
#[inline(always)]
#[must_use]
pub fn adjust(field: u16, difference: u16) -> u16 {
    !add16(!field, difference)
}

/// One's complement addition: the carry comes back in at the end.
#[inline(always)]
fn add16(a: u16, b: u16) -> u16 {
    let (sum, carry) = a.overflowing_add(b);
    // After a carry the sum is 0xfffe at the most.
    sum.wrapping_add(u16::from(carry))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn slow(data: &[u8]) -> u16 {
        let mut s: u32 = 0;
        for c in data.chunks(2) {
            s += u32::from(u16::from_be_bytes([c[0], *c.get(1).unwrap_or(&0)]));
            s = (s & 0xffff) + (s >> 16);
        }
        !(s as u16)
    }

    #[test]
    fn updates_fold_as_sums_do() {
        let edges = [0, 1, 2, 0x7fff, 0x8000, 0xfffd, 0xfffe, 0xffff];
        for field in edges {
            for old in edges {
                for new in edges {
                    let sum = u64::from(!field) + u64::from(!old) + u64::from(new);
                    assert_eq!(adjust(field, difference(old, new)), finish(sum), "{field:x} {old:x} {new:x}");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn same_as_the_definition(data in proptest::collection::vec(any::<u8>(), 0..3000), skip in 0usize..9) {
            let d = &data[skip.min(data.len())..];
            prop_assert_eq!(checksum(d), slow(d));
        }

        #[test]
        fn incremental_same_as_full(mut data in proptest::collection::vec(any::<u8>(), 4..80), at in 0usize..20, new in any::<u16>()) {
            let at = (at * 2) % (data.len() & !1);
            // A field of 0xffff in an all-zero packet is the one state where +0 and -0 differ.
            prop_assume!(data.iter().any(|b| *b != 0) && new != 0);
            let before = checksum(&data);
            let old = crate::be16(&data, at);
            crate::put(&mut data, at, &new.to_be_bytes());
            prop_assert_eq!(adjust(before, difference(old, new)), checksum(&data));
        }
    }
}
