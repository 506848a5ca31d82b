//! Theory of operation: the guest chooses the tuples, so every index hashes under a secret: two multiply-folds
//! (64 by 64 to 128 bits, halves xored), which cost a few cycles and give nothing to somebody who cannot see
//! the keys. Ports, ids and keys come from ChaCha with 8 rounds in counter mode, seeded by the caller.

/// Numbers of one ChaCha block.
const BLOCK: usize = 16;
/// Numbers that are kept at most.
const STOCK: usize = 4 * BLOCK;

/// Deterministic, unguessable numbers from a 32-byte secret (ChaCha8, RFC 8439 block layout).
#[derive(Debug, Clone)]
pub struct Random {
    key: [u32; 8],
    /// Block `n` of the stream lies in `stock` at `n * BLOCK % STOCK`, while it is one of the last four.
    stock: [u32; STOCK],
    /// Blocks made so far.
    made: u64,
    /// Numbers given out so far.
    used: u64,
}

impl Random {
    /// A generator for this secret.
    #[must_use]
    pub fn new(secret: &[u8; 32]) -> Random {
        let mut key = [0; 8];
        for (k, c) in key.iter_mut().zip(secret.chunks_exact(4)) {
            *k = u32::from_le_bytes([c[0], c[1], c[2], c[3]]);
        }
        Random { key, stock: [0; STOCK], made: 0, used: 0 }
    }

    /// The next number, all values equally likely.
    #[inline]
    pub fn u32(&mut self) -> u32 {
        self.prepare(1);
        let v = self.ahead(0);
        self.used += 1;
        v
    }

    /// Makes sure that [`Random::ahead`] knows the next `n` numbers, 48 at the most.
    #[inline]
    pub fn prepare(&mut self, n: usize) {
        while self.made * (BLOCK as u64) - self.used < n.min(STOCK - BLOCK) as u64 {
            self.refill();
        }
    }

    /// The number that will come after `n` others, which are not taken: anything at all where it has not been
    /// prepared.
    #[inline]
    pub fn ahead(&self, n: usize) -> u32 {
        self.stock.get((self.used as usize).wrapping_add(n) % STOCK).copied().unwrap_or(0)
    }

    /// As [`Random::u32`] with 64 bits.
    pub fn u64(&mut self) -> u64 {
        u64::from(self.u32()) << 32 | u64::from(self.u32())
    }

    /// A number under `n` (0 when `n` is 0), even to one part in 2^32 / n.
    #[inline]
    pub fn below(&mut self, n: u32) -> u32 {
        scale(self.u32(), n)
    }

    fn refill(&mut self) {
        let k = self.key;
        let init = [
            0x6170_7865,
            0x3320_646e,
            0x7962_2d32,
            0x6b20_6574,
            k[0],
            k[1],
            k[2],
            k[3],
            k[4],
            k[5],
            k[6],
            k[7],
            self.made as u32,
            (self.made >> 32) as u32,
            0,
            0,
        ];
        let mut s = init;
        for _ in 0..4 {
            for [a, b, c, d] in [
                [0, 4, 8, 12],
                [1, 5, 9, 13],
                [2, 6, 10, 14],
                [3, 7, 11, 15],
                [0, 5, 10, 15],
                [1, 6, 11, 12],
                [2, 7, 8, 13],
                [3, 4, 9, 14],
            ] {
                quarter(&mut s, a, b, c, d);
            }
        }
        let at = self.made as usize * BLOCK % STOCK;
        if let Some(block) = self.stock.get_mut(at..at + BLOCK) {
            for ((o, s), i) in block.iter_mut().zip(s).zip(init) {
                *o = s.wrapping_add(i);
            }
        }
        self.made += 1;
    }
}

/// What [`Random::below`] makes of a number.
#[inline]
#[must_use]
pub fn scale(drawn: u32, n: u32) -> u32 {
    ((u64::from(drawn) * u64::from(n)) >> 32) as u32
}

#[inline]
fn quarter(s: &mut [u32; 16], a: usize, b: usize, c: usize, d: usize) {
    s[a] = s[a].wrapping_add(s[b]);
    s[d] = (s[d] ^ s[a]).rotate_left(16);
    s[c] = s[c].wrapping_add(s[d]);
    s[b] = (s[b] ^ s[c]).rotate_left(12);
    s[a] = s[a].wrapping_add(s[b]);
    s[d] = (s[d] ^ s[a]).rotate_left(8);
    s[c] = s[c].wrapping_add(s[d]);
    s[b] = (s[b] ^ s[c]).rotate_left(7);
}

/// The keys of the index hash.
#[derive(Debug, Clone, Copy)]
pub struct Keys([u64; 4]);

impl Keys {
    /// Draws keys.
    #[must_use]
    pub fn new(random: &mut Random) -> Keys {
        Keys([random.u64(), random.u64(), random.u64(), random.u64() | 1])
    }

    /// Hash of two words.
    #[inline(always)]
    #[must_use]
    pub fn hash(&self, a: u64, b: u64) -> u64 {
        let [k0, k1, k2, k3] = self.0;
        fold(fold(a ^ k0, b ^ k1) ^ k2, k3)
    }
}

#[inline(always)]
fn fold(a: u64, b: u64) -> u64 {
    let m = u128::from(a) * u128::from(b);
    (m as u64) ^ ((m >> 64) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_is_chacha_and_repeats_for_a_secret() {
        // ChaCha8, key zero, counter zero: eSTREAM test vector, first bytes 3e00ef2f895f40d6...
        let mut r = Random::new(&[0; 32]);
        assert_eq!(r.u32().to_le_bytes(), [0x3e, 0x00, 0xef, 0x2f]);
        assert_eq!(r.u32().to_le_bytes(), [0x89, 0x5f, 0x40, 0xd6]);
        assert!((0..1000).all(|_| r.below(10) < 10));
        assert_eq!(r.below(0), 0);
    }

    #[test]
    fn looking_ahead_takes_nothing() {
        let (mut plain, mut looked) = (Random::new(&[3; 32]), Random::new(&[3; 32]));
        for round in 0..200 {
            looked.prepare(round % 49);
            let seen: Vec<u32> = (0..round % 49).map(|n| looked.ahead(n)).collect();
            let took: Vec<u32> = (0..round % 49).map(|_| plain.u32()).collect();
            assert_eq!(seen, took);
            assert!(took.iter().all(|t| *t == looked.u32()));
        }
    }

    #[test]
    fn close_keys_hash_far_apart() {
        let k = Keys::new(&mut Random::new(&[7; 32]));
        let mut low = std::collections::HashSet::new();
        for i in 0..4096u64 {
            low.insert(k.hash(1 << 32 | 2, i) & 0xffff);
        }
        // 4096 balls in 65536 bins leave about 3971 bins filled; a bad hash leaves far fewer.
        assert!(low.len() > 3850, "{}", low.len());
    }
}
