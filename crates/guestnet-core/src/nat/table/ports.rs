//! Theory of operation: which ports (or ICMP identifiers) of one external address and protocol are taken, one
//! bit each, and above it one bit per 64 that says whether an even or an odd one is free. A free port nearest
//! after a random start is found in a bounded number of steps however full the range is, so allocation never
//! collides and never gets slow; it fails only when nothing is free.

use crate::nat::table::hash::Random;

const EVEN: u64 = 0x5555_5555_5555_5555;
const WORDS: usize = 1024;

/// See the module head.
#[derive(Debug, Clone)]
pub struct PortSet {
    /// Set bits are taken or outside the range.
    taken: Vec<u64>,
    /// Per parity: set bits name words of `taken` with such a port free.
    free_words: [[u64; WORDS / 64]; 2],
    first: u16,
    last: u16,
    free: u32,
}

impl PortSet {
    /// All of `first..=last` free.
    #[must_use]
    pub fn new(first: u16, last: u16) -> PortSet {
        let mut set = PortSet {
            taken: vec![u64::MAX; WORDS],
            free_words: [[0; WORDS / 64]; 2],
            first,
            last,
            free: u32::from(last.saturating_sub(first)) + 1,
        };
        for word in usize::from(first >> 6)..=usize::from(last >> 6) {
            let from = usize::from(first).saturating_sub(word * 64).min(63);
            let to = (usize::from(last) - word * 64).min(63);
            let free = (u64::MAX << from) & (u64::MAX >> (63 - to));
            if let Some(w) = set.taken.get_mut(word) {
                *w = !free;
            }
            set.summarise(word);
        }
        set
    }

    /// Ports free now.
    #[must_use]
    pub fn free(&self) -> u32 {
        self.free
    }

    /// Ports of the range that are taken now.
    #[must_use]
    pub fn taken(&self) -> u32 {
        u32::from(self.last) - u32::from(self.first) + 1 - self.free
    }

    /// True when the port is in the range and free.
    #[must_use]
    pub fn is_free(&self, port: u16) -> bool {
        self.word(port) & (1 << (port & 63)) == 0
    }

    /// The 64 ports around `port`: a set bit is taken.
    #[inline]
    pub(crate) fn word(&self, port: u16) -> u64 {
        self.taken.get(usize::from(port >> 6)).copied().unwrap_or(u64::MAX)
    }

    /// Takes this very port if it is free.
    pub fn take(&mut self, port: u16) -> bool {
        if !self.is_free(port) {
            return false;
        }
        self.free -= 1;
        self.set(port, true);
        true
    }

    /// Gives a port back; ports outside the range and free ones are left as they are.
    pub fn release(&mut self, port: u16) {
        if (self.first..=self.last).contains(&port) && !self.is_free(port) {
            self.free += 1;
            self.set(port, false);
        }
    }

    fn set(&mut self, port: u16, taken: bool) {
        let word = usize::from(port >> 6);
        let Some(w) = self.taken.get_mut(word) else { return };
        if taken {
            *w |= 1 << (port & 63);
        } else {
            *w &= !(1 << (port & 63));
        }
        self.summarise(word);
    }

    #[inline]
    fn summarise(&mut self, word: usize) {
        let free = !self.taken.get(word).copied().unwrap_or(u64::MAX);
        for (parity, mask) in [EVEN, !EVEN].into_iter().enumerate() {
            if let Some(s) = self.free_words[parity].get_mut(word / 64) {
                *s = (*s & !(1 << (word & 63))) | (u64::from(free & mask != 0) << (word & 63));
            }
        }
    }

    /// Takes a port for the internal port `wanted`: that one (RFC 4787 4.2.1, when `preserve`), else a random
    /// one of the same class (REQ-3a: below 1024 or not) and, when `parity`, the same parity (REQ-4), else
    /// any. `None` when the range is exhausted.
    pub fn allocate(
        &mut self,
        wanted: u16,
        preserve: bool,
        parity: bool,
        random: &mut Random,
    ) -> Option<u16> {
        let port = self.choose(wanted, preserve, parity, |n| random.below(n))?;
        self.take(port);
        Some(port)
    }

    /// The port that [`PortSet::allocate`] takes when `below` draws its numbers.
    #[inline]
    pub fn choose(
        &self,
        wanted: u16,
        preserve: bool,
        parity: bool,
        mut below: impl FnMut(u32) -> u32,
    ) -> Option<u16> {
        if preserve && self.is_free(wanted) {
            return Some(wanted);
        }
        if self.free == 0 {
            return None;
        }
        let low = (self.first, self.last.min(1023));
        let high = (self.first.max(1024), self.last);
        let classes = if wanted < 1024 { [low, high] } else { [high, low] };
        let odd = usize::from(wanted & 1);
        for (first, last) in classes {
            if first > last {
                continue;
            }
            let start = first + below(u32::from(last - first) + 1) as u16;
            let parities: &[Option<usize>] = if parity { &[Some(odd), Some(1 - odd)] } else { &[None] };
            for p in parities {
                let found = self.search(start, last, *p).or_else(|| self.search(first, start, *p));
                if found.is_some() {
                    return found;
                }
            }
        }
        None
    }

    /// The first free port of `from..=to`, of that parity if one is named.
    fn search(&self, from: u16, to: u16, parity: Option<usize>) -> Option<u16> {
        let mask = match parity {
            Some(0) => EVEN,
            Some(_) => !EVEN,
            None => u64::MAX,
        };
        let word = usize::from(from >> 6);
        let here = !self.taken.get(word)? & mask & (u64::MAX << (from & 63));
        let bit = if here != 0 {
            word * 64 + here.trailing_zeros() as usize
        } else {
            let next = self.next_word(word + 1, parity)?;
            next * 64 + (!self.taken.get(next)? & mask).trailing_zeros() as usize
        };
        u16::try_from(bit).ok().filter(|p| *p <= to)
    }

    fn next_word(&self, from: usize, parity: Option<usize>) -> Option<usize> {
        let mut group = from / 64;
        let mut keep = u64::MAX << (from & 63);
        while group < WORDS / 64 {
            let free = match parity {
                Some(p) => self.free_words.get(p)?[group],
                None => self.free_words[0][group] | self.free_words[1][group],
            } & keep;
            if free != 0 {
                return Some(group * 64 + free.trailing_zeros() as usize);
            }
            group += 1;
            keep = u64::MAX;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random() -> Random {
        Random::new(&[1; 32])
    }

    #[test]
    fn every_port_once_and_then_none() {
        for (first, last) in [(49152, 65535), (0, 65535), (1000, 1100), (65535, 65535), (5, 5)] {
            for parity in [true, false] {
                let mut set = PortSet::new(first, last);
                let n = u32::from(last) - u32::from(first) + 1;
                assert_eq!(set.free(), n);
                let mut seen = std::collections::HashSet::new();
                let mut r = random();
                for _ in 0..n {
                    let p = set.allocate(7, true, parity, &mut r).unwrap();
                    assert!((first..=last).contains(&p) && seen.insert(p));
                }
                assert_eq!(set.allocate(7, true, parity, &mut r), None);
                set.release(last);
                set.release(last);
                assert_eq!(set.free(), 1);
                assert_eq!(set.allocate(7, true, parity, &mut r), Some(last));
            }
        }
    }

    #[test]
    fn keeps_port_then_class_then_parity() {
        let mut r = random();
        let mut set = PortSet::new(1, 65535);
        assert_eq!(set.allocate(500, true, true, &mut r), Some(500));
        for _ in 0..511 {
            let p = set.allocate(500, true, true, &mut r).unwrap();
            if set.search(1, 1023, Some(0)).is_some() {
                assert!(p < 1024 && p.is_multiple_of(2));
            }
        }
        let p = set.allocate(5001, false, true, &mut r).unwrap();
        assert!(p >= 1024 && p % 2 == 1);
    }

    #[test]
    fn random_when_not_preserved() {
        let mut r = random();
        let mut set = PortSet::new(49152, 65535);
        let got: Vec<u16> = (0..100).filter_map(|_| set.allocate(2000, true, true, &mut r)).collect();
        let steps = got.windows(2).filter(|w| w[1].wrapping_sub(w[0]) < 8).count();
        assert!(got.len() == 100 && steps < 10, "{got:?}");
    }
}
