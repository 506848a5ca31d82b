//! Theory of operation: bytes that wait for a socket, in one buffer that is appended to at the end and sent
//! from the front. Bounded by who appends ([`super::QUEUE_MAX`]); memory goes back once it ran empty many times
//! without having needed it, and not at once: a busy queue runs empty all the time, and fresh memory costs more
//! than what it is for.

/// An empty queue keeps this much.
const KEEP: usize = 128 << 10;
/// Runs empty so often, with no more than that in it, before the rest goes back.
const QUIET: u8 = 32;

/// Bytes in order.
#[derive(Default)]
pub(crate) struct Queue {
    buf: Vec<u8>,
    head: usize,
    /// Times that it ran empty since there was more than [`KEEP`] in it.
    quiet: u8,
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
        if self.buf.len() + bytes.len() > self.buf.capacity() && self.head >= self.len() {
            // Rather than growing, when at least as much was sent as is moved: a reader of crumbs must not
            // make every frame cost all that waits.
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
        if self.is_empty() && self.head > 0 {
            self.quiet = if self.buf.len() > KEEP { 0 } else { self.quiet.saturating_add(1) };
            self.buf.clear();
            self.head = 0;
            if self.quiet >= QUIET && self.buf.capacity() > KEEP {
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

    #[test]
    fn memory_is_kept_while_it_is_used_and_goes_back_then() {
        let mut q = Queue::default();
        for _ in 0..100 {
            q.push(&vec![7; 4 * KEEP]);
            q.consume(4 * KEEP);
            assert!(q.buf.capacity() >= 4 * KEEP);
        }
        for _ in 0..QUIET {
            assert!(q.buf.capacity() >= 4 * KEEP);
            q.push(&[7; 100]);
            q.consume(100);
        }
        assert!(q.buf.capacity() <= KEEP);
        q.consume(1);
        assert!(q.is_empty());
    }

    /// A guest that reads in crumbs must not make every frame cost as much as all that waits.
    #[test]
    fn appending_moves_no_more_than_it_appends() {
        let mut q = Queue::default();
        while q.len() < (1 << 20) - 2000 {
            q.push(&[7; 64]);
        }
        let (mut moved, mut pushed) = (0, 0);
        for _ in 0..20_000 {
            q.consume(1000);
            let (head, len) = (q.head, q.len());
            q.push(&[7; 1000]);
            pushed += 1000;
            if q.head < head {
                moved += len;
            }
        }
        assert!(moved <= 2 * pushed, "{moved} bytes moved for {pushed}");
        assert!(q.buf.capacity() <= 4 << 20);
    }
}
