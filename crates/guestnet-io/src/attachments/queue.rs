//! Theory of operation: bytes that wait for a socket, in one buffer that is appended to at the end and sent
//! from the front. Bounded by who appends ([`super::QUEUE_MAX`]); memory goes back when it runs empty.

/// An empty queue keeps this much.
const KEEP: usize = 128 << 10;

/// Bytes in order.
#[derive(Default)]
pub(crate) struct Queue {
    buf: Vec<u8>,
    head: usize,
}

impl Queue {
    pub(crate) fn len(&self) -> usize {
        self.buf.len() - self.head
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.buf.get(self.head..).unwrap_or(&[])
    }

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        if self.buf.len() + bytes.len() > self.buf.capacity() && self.head > 0 {
            // Rather than growing.
            self.buf.drain(..self.head);
            self.head = 0;
        }
        self.buf.extend_from_slice(bytes);
    }

    /// The last `n` bytes appended.
    pub(crate) fn tail_mut(&mut self, n: usize) -> &mut [u8] {
        let at = self.buf.len().saturating_sub(n);
        self.buf.get_mut(at..).unwrap_or(&mut [])
    }

    /// Removes `n` bytes from the front.
    pub(crate) fn consume(&mut self, n: usize) {
        self.head = (self.head + n).min(self.buf.len());
        if self.is_empty() {
            self.buf.clear();
            self.head = 0;
            if self.buf.capacity() > KEEP {
                self.buf.shrink_to(KEEP);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_in_first_out() {
        let mut q = Queue::default();
        let (mut put, mut got) = (0u8, 0u8);
        for round in 0..500usize {
            for _ in 0..round % 7 {
                q.push(&[put]);
                put = put.wrapping_add(1);
            }
            let n = q.len().min(round % 5);
            for b in &q.bytes()[..n] {
                assert_eq!(*b, got);
                got = got.wrapping_add(1);
            }
            q.consume(n);
        }
        q.push(&[1, 2, 3]);
        q.tail_mut(2)[0] = 9;
        assert_eq!(&q.bytes()[q.len() - 3..], [1, 9, 3]);
        q.consume(usize::MAX / 2);
        assert!(q.is_empty());
    }
}
