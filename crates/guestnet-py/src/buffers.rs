//! Theory of operation: packets that live in Python objects (bytearray, memoryview, NumPy arrays), as slices that
//! may be changed in place while other Python threads run. Holding the buffer keeps its memory where it is;
//! one packet is a slice at a time, so packets that share bytes are never two slices at once.

// Writing into an exporter's memory without holding the interpreter is what the buffer protocol is for, and
// cannot be said without `unsafe`. It is all here.
#![allow(unsafe_code)]

use guestnet_core::nat::PacketBatch;
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

/// Memory of one Python object, held by its buffer.
#[derive(Clone, Copy)]
struct Region {
    start: *mut u8,
    len: usize,
}

// SAFETY: a region is an address and a length; whose turn it is to touch the bytes is decided by `Foreign`,
// which is moved and not shared.
unsafe impl Send for Region {}

/// Writable packets in Python objects.
pub struct Foreign {
    /// Keep the memory of `regions` in place. Dropped with the interpreter attached or not; PyO3 sees to it.
    held: Vec<PyBuffer<u8>>,
    regions: Vec<Region>,
}

fn region(buffer: &PyBuffer<u8>) -> PyResult<Region> {
    if buffer.readonly() {
        return Err(PyTypeError::new_err("packets are changed in place: give a writable buffer, not bytes"));
    }
    match buffer.as_slice_ptr() {
        Some(whole) => Ok(Region { start: whole.as_ptr().cast(), len: whole.len() }),
        None => Err(PyTypeError::new_err("packets must lie in one piece: give a C-contiguous buffer")),
    }
}

impl Foreign {
    /// One packet an object.
    pub fn each(objects: &[Bound<'_, PyAny>]) -> PyResult<Foreign> {
        let held = objects.iter().map(PyBuffer::get).collect::<PyResult<Vec<_>>>()?;
        let regions = held.iter().map(region).collect::<PyResult<_>>()?;
        Ok(Foreign { held, regions })
    }

    /// Packets in one object, by start and length in bytes; spans outside of it are empty packets.
    pub fn spans(object: &Bound<'_, PyAny>, spans: impl Iterator<Item = (u32, u32)>) -> PyResult<Foreign> {
        let buffer = PyBuffer::get(object)?;
        let whole = region(&buffer)?;
        let regions = spans
            .map(|(start, len)| {
                let (start, len) = (start as usize, len as usize);
                if start + len > whole.len {
                    return Region { start: whole.start, len: 0 };
                }
                // SAFETY: start <= whole.len, so the address is in the buffer or one past its end.
                Region { start: unsafe { whole.start.add(start) }, len }
            })
            .collect();
        Ok(Foreign { held: vec![buffer], regions })
    }
}

impl PacketBatch for Foreign {
    fn len(&self) -> usize {
        self.regions.len()
    }

    #[inline(always)]
    fn packet(&mut self, i: usize) -> &mut [u8] {
        match self.regions.get(i) {
            // An empty buffer may have no address at all.
            Some(r) if r.len > 0 => {
                debug_assert!(!self.held.is_empty());
                // SAFETY: the exporter keeps start..start+len valid and writable while `held` lives. `&mut
                // self` makes this the only slice of it here; Python threads that write to the same buffer
                // meanwhile break the rule that translating documents, as with any call that works on a
                // buffer detached, and every access below is bounds-checked whatever the bytes say.
                unsafe { std::slice::from_raw_parts_mut(r.start, r.len) }
            }
            _ => &mut [],
        }
    }
}
