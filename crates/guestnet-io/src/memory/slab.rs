//! Theory of operation: numbered slots that are used again. Each carries how often it was, so that an event
//! that the kernel reported for its last owner is known as stale.

struct Slot<T> {
    generation: u32,
    value: Option<T>,
}

/// Values by small numbers.
pub(crate) struct Slab<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Slab { slots: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    /// Puts a value in a free slot.
    pub(crate) fn insert(&mut self, value: T) -> u32 {
        if let Some(i) = self.free.pop()
            && let Some(s) = self.slots.get_mut(i as usize)
        {
            s.value = Some(value);
            return i;
        }
        self.slots.push(Slot { generation: 0, value: Some(value) });
        (self.slots.len() - 1) as u32
    }

    /// Takes the value out; the slot's generation moves on.
    pub(crate) fn remove(&mut self, index: u32) -> Option<T> {
        let s = self.slots.get_mut(index as usize)?;
        let v = s.value.take()?;
        // 24 bits travel through epoll.
        s.generation = (s.generation + 1) & 0xff_ffff;
        self.free.push(index);
        Some(v)
    }

    pub(crate) fn get(&self, index: u32) -> Option<&T> {
        self.slots.get(index as usize)?.value.as_ref()
    }

    pub(crate) fn get_mut(&mut self, index: u32) -> Option<&mut T> {
        self.slots.get_mut(index as usize)?.value.as_mut()
    }

    pub(crate) fn generation(&self, index: u32) -> u32 {
        self.slots.get(index as usize).map_or(0, |s| s.generation)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.slots.iter().enumerate().filter_map(|(i, s)| Some((i as u32, s.value.as_ref()?)))
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_that_is_used_again_is_another_generation() {
        let mut s = Slab::default();
        let a = s.insert('a');
        let g = s.generation(a);
        assert_eq!(s.remove(a), Some('a'));
        assert_eq!(s.remove(a), None);
        let b = s.insert('b');
        assert_eq!((a, s.len()), (b, 1));
        assert_ne!(g, s.generation(b));
        assert_eq!((s.get(b), s.get(7)), (Some(&'b'), None));
        assert_eq!(s.iter().count(), 1);
    }
}
