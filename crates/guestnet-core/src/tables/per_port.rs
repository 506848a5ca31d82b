//! What a component keeps of each port of the switch, by the port's slot. Each component has a table of its own, so that
//! no other one can change its accounts.

/// A value for each port that has one.
#[derive(Debug)]
pub struct PerPort<T>(Vec<Option<T>>);

impl<T> Default for PerPort<T> {
    fn default() -> Self {
        PerPort(Vec::new())
    }
}

impl<T> PerPort<T> {
    /// The value of a port.
    #[inline]
    #[must_use]
    pub fn get(&self, slot: u32) -> Option<&T> {
        self.0.get(slot as usize)?.as_ref()
    }

    /// The value of a port.
    #[inline]
    pub fn get_mut(&mut self, slot: u32) -> Option<&mut T> {
        self.0.get_mut(slot as usize)?.as_mut()
    }

    /// Sets the value of a port.
    pub fn insert(&mut self, slot: u32, value: T) {
        let at = slot as usize;
        if self.0.len() <= at {
            self.0.resize_with(at + 1, || None);
        }
        if let Some(entry) = self.0.get_mut(at) {
            *entry = Some(value);
        }
    }

    /// Takes the value of a port out.
    pub fn remove(&mut self, slot: u32) -> Option<T> {
        self.0.get_mut(slot as usize)?.take()
    }

    /// The first slot from this one on that has a value.
    #[must_use]
    pub fn next_from(&self, slot: u32) -> Option<u32> {
        let rest = self.0.get(slot as usize..)?;
        rest.iter().position(Option::is_some).map(|n| slot + n as u32)
    }

    /// All values with the slots of their ports.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.0.iter().enumerate().filter_map(|(i, v)| Some((i as u32, v.as_ref()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_slot_has_its_own_value() {
        let mut t = PerPort::default();
        t.insert(2, 'c');
        assert_eq!((t.get(0), t.get(2), t.get(3)), (None, Some(&'c'), None));
        *t.get_mut(2).unwrap() = 'd';
        t.insert(0, 'a');
        assert_eq!(t.iter().collect::<Vec<_>>(), [(0, &'a'), (2, &'d')]);
        assert_eq!([0, 1, 2, 3, 9].map(|slot| t.next_from(slot)), [Some(0), Some(2), Some(2), None, None]);
        assert_eq!((t.remove(2), t.remove(2), t.remove(9)), (Some('d'), None, None));
    }
}
