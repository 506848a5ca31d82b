//! Theory of operation: SipHash-1-3 over whole 64-bit words. The guest chooses the tuples that it opens, so
//! the flow table's hash is keyed with a secret (Aumasson and Bernstein, "SipHash", 2012); the same function
//! with another key gives the ISNs of RFC 6528.

use std::net::IpAddr;

/// A 128-bit key.
#[derive(Clone, Copy)]
pub struct SipKey(u64, u64);

impl SipKey {
    /// Takes 16 bytes of a secret, starting at `at`.
    #[must_use]
    pub fn from_secret(secret: &[u8; 32], at: usize) -> SipKey {
        let word = |at: usize| {
            let mut w = [0u8; 8];
            if let Some(b) = secret.get(at..at + 8) {
                w.copy_from_slice(b);
            }
            u64::from_le_bytes(w)
        };
        SipKey(word(at), word(at + 8))
    }

    /// Another key, for another purpose.
    #[must_use]
    pub fn derive(self, purpose: u64) -> SipKey {
        SipKey(self.hash(&[purpose]), self.hash(&[purpose, purpose]))
    }

    /// Hashes the words.
    #[inline]
    #[must_use]
    pub fn hash(self, words: &[u64]) -> u64 {
        let mut v = [
            self.0 ^ 0x736f_6d65_7073_6575,
            self.1 ^ 0x646f_7261_6e64_6f6d,
            self.0 ^ 0x6c79_6765_6e65_7261,
            self.1 ^ 0x7465_6462_7974_6573,
        ];
        for &m in words {
            v[3] ^= m;
            round(&mut v);
            v[0] ^= m;
        }
        let last = ((words.len() as u64 * 8) & 0xff) << 56;
        v[3] ^= last;
        round(&mut v);
        v[0] ^= last;
        v[2] ^= 0xff;
        for _ in 0..3 {
            round(&mut v);
        }
        v[0] ^ v[1] ^ v[2] ^ v[3]
    }
}

#[inline]
fn round(v: &mut [u64; 4]) {
    v[0] = v[0].wrapping_add(v[1]);
    v[2] = v[2].wrapping_add(v[3]);
    v[1] = v[1].rotate_left(13) ^ v[0];
    v[3] = v[3].rotate_left(16) ^ v[2];
    v[0] = v[0].rotate_left(32);
    v[2] = v[2].wrapping_add(v[1]);
    v[0] = v[0].wrapping_add(v[3]);
    v[1] = v[1].rotate_left(17) ^ v[2];
    v[3] = v[3].rotate_left(21) ^ v[0];
    v[2] = v[2].rotate_left(32);
}

/// The words of an address for hashing.
pub(crate) fn address_words(ip: IpAddr) -> [u64; 2] {
    match ip {
        IpAddr::V4(a) => [0, u64::from(u32::from(a))],
        IpAddr::V6(a) => {
            let a = u128::from(a);
            [(a >> 64) as u64, a as u64]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::hash::Hasher;

    #[test]
    fn same_as_the_standard_library_with_a_zero_key() {
        // std's DefaultHasher is SipHash-1-3 with keys 0, 0.
        let mut words = Vec::new();
        for n in 0..9u64 {
            let mut std = std::collections::hash_map::DefaultHasher::new();
            for w in &words {
                std.write(&u64::to_le_bytes(*w));
            }
            assert_eq!(SipKey(0, 0).hash(&words), std.finish(), "{n} words");
            words.push(n.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        }
    }

    #[test]
    fn the_key_matters() {
        let a = SipKey::from_secret(&[1; 32], 0);
        let b = SipKey::from_secret(&[2; 32], 16);
        assert_ne!(a.hash(&[7]), b.hash(&[7]));
    }
}
