//! CRYPTO frames (RFC 9000 19.6), which come in any order, put together.

/// Pieces that wait for what is before them.
pub(super) const PIECES_MAX: usize = 64;

/// CRYPTO data, put together.
#[derive(Debug, Default, Clone)]
pub(super) struct Crypto {
    pub bytes: Vec<u8>,
    /// Pieces that have come, in order, with gaps between them.
    pub pieces: Vec<(usize, usize)>,
}

impl Crypto {
    /// Adds a piece that ends at `max` at most. False when it contradicts what came before, or is too much.
    pub fn add(&mut self, at: usize, data: &[u8], max: usize) -> bool {
        let Some(end) = at.checked_add(data.len()).filter(|end| *end <= max) else { return false };
        if data.is_empty() {
            return true;
        }
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        let overlaps = self.pieces.iter().filter(|(from, to)| *from < end && at < *to);
        for (from, to) in overlaps {
            let (from, to) = (at.max(*from), end.min(*to));
            if self.bytes.get(from..to) != data.get(from - at..to - at) {
                return false;
            }
        }
        if let Some(place) = self.bytes.get_mut(at..end) {
            place.copy_from_slice(data);
        }
        let (mut from, mut to) = (at, end);
        self.pieces.retain(|p| {
            let apart = p.1 < from || to < p.0;
            if !apart {
                (from, to) = (from.min(p.0), to.max(p.1));
            }
            apart
        });
        let place = self.pieces.partition_point(|p| p.0 < from);
        self.pieces.insert(place, (from, to));
        self.pieces.len() <= PIECES_MAX
    }

    /// Whether a piece says what is known already.
    pub fn repeats(&self, at: usize, data: &[u8]) -> bool {
        data.is_empty() || self.bytes.get(at..).is_some_and(|known| known.starts_with(data))
    }

    /// What has come without a gap.
    pub fn prefix(&self) -> &[u8] {
        match self.pieces.first() {
            Some((0, end)) => self.bytes.get(..*end).unwrap_or(&[]),
            _ => &[],
        }
    }

    /// Whether something has come that `read` bytes at the beginning are not all of.
    pub fn has_more(&self, read: usize) -> bool {
        self.pieces.iter().any(|(_, end)| *end > read)
    }
}
