//! Theory of operation: sequence numbers live on a circle of 2^32 (RFC 9293 3.4), so they have no order but
//! one of distance. Every comparison of the relay goes through this type and none through plain integers.

/// A TCP sequence number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Seq(pub u32);

impl Seq {
    /// `n` further on.
    #[inline]
    pub fn plus(self, n: u32) -> Seq {
        Seq(self.0.wrapping_add(n))
    }
    /// `n` back.
    #[inline]
    pub fn minus(self, n: u32) -> Seq {
        Seq(self.0.wrapping_sub(n))
    }
    /// Distance from `earlier` to this, which the caller knows to be not before it.
    #[inline]
    pub fn since(self, earlier: Seq) -> u32 {
        self.0.wrapping_sub(earlier.0)
    }
    /// Before `other`, by the shorter way round.
    #[inline]
    pub fn lt(self, other: Seq) -> bool {
        (self.0.wrapping_sub(other.0) as i32) < 0
    }
    /// Before or equal.
    #[inline]
    pub fn le(self, other: Seq) -> bool {
        !other.lt(self)
    }
    /// The earlier of both.
    #[inline]
    pub fn min_of(self, other: Seq) -> Seq {
        if other.lt(self) { other } else { self }
    }
    /// The later of both.
    #[inline]
    pub fn max(self, other: Seq) -> Seq {
        if self.lt(other) { other } else { self }
    }
}

#[cfg(test)]
mod tests {
    use super::Seq;

    #[test]
    fn order_holds_across_the_wrap() {
        let a = Seq(u32::MAX - 5);
        let b = a.plus(10);
        assert_eq!(b, Seq(4));
        assert!(a.lt(b) && a.le(b) && !b.lt(a) && !b.le(a) && a.le(a) && !a.lt(a));
        assert_eq!(b.since(a), 10);
        assert_eq!(b.minus(10), a);
        assert_eq!(a.max(b), b);
    }
}
