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
use pyo3::types::PyBytes;
use pyo3::{PyErr, ffi};

/// Memory of one Python object, held by its buffer.
#[derive(Clone, Copy)]
struct Region {
    start: *mut u8,
    len: usize,
}

// SAFETY: a region is an address and a length; whose turn it is to touch the bytes is decided by `Foreign`,
// which is moved and not shared.
unsafe impl Send for Region {}

/// Buffers of many objects, each where the object filled it in, since it may point into itself: the room is there
/// from the beginning and never grows. (PyO3 allocates for each, and asks for more than is needed here.)
struct Views(Vec<ffi::Py_buffer>);

// SAFETY: a buffer may be released by any thread that is attached, and `drop` attaches; nothing else is done with
// them.
unsafe impl Send for Views {}

impl Views {
    /// A writable buffer of bytes in one piece. `None` when the object has no such thing to offer or there is no
    /// room; no Python error is left behind.
    #[inline]
    fn hold(&mut self, object: &Bound<'_, PyAny>) -> Option<Region> {
        let at = self.0.len();
        let room = self.0.spare_capacity_mut().first_mut()?;
        let flags = ffi::PyBUF_WRITABLE | ffi::PyBUF_FORMAT | ffi::PyBUF_ND;
        // SAFETY: attached, as the `Bound` shows; `room` is memory for a Py_buffer, which the call fills in when
        // it gives 0, and which stays where it is.
        if unsafe { ffi::PyObject_GetBuffer(object.as_ptr(), room.as_mut_ptr(), flags) } != 0 {
            drop(PyErr::take(object.py()));
            return None;
        }
        // SAFETY: the first `at + 1` are filled in.
        unsafe { self.0.set_len(at + 1) };
        let view = self.0.get(at)?;
        // SAFETY: when not null it is a string that ends with a zero and lives as long as the buffer.
        let bytes = view.itemsize == 1
            && (view.format.is_null()
                || of_bytes(unsafe { std::ffi::CStr::from_ptr(view.format) }.to_bytes()));
        // One that is not of bytes is kept too, until all are released.
        bytes.then_some(Region { start: view.buf.cast(), len: usize::try_from(view.len).unwrap_or(0) })
    }
}

impl Drop for Views {
    fn drop(&mut self) {
        if !self.0.is_empty() {
            Python::attach(|_| {
                for view in &mut self.0 {
                    // SAFETY: filled in by PyObject_GetBuffer, not moved since, released once.
                    unsafe { ffi::PyBuffer_Release(view) };
                }
            });
        }
    }
}

/// Whether a format of the `struct` module says one byte. The arrays of `ctypes` name a byte order too.
fn of_bytes(format: &[u8]) -> bool {
    let item = match format {
        [b'@' | b'=' | b'<' | b'>' | b'!', item @ ..] => item,
        item => item,
    };
    matches!(item, [] | [b'B' | b'b' | b'c'])
}

/// Calls `f` with the bytes of any object that has some in one piece: bytes, bytearray, memoryview, arrays. `f` must
/// not call Python.
pub fn with_bytes<R>(object: &Bound<'_, PyAny>, f: impl FnOnce(&[u8]) -> R) -> PyResult<R> {
    if let Ok(bytes) = object.cast::<PyBytes>() {
        return Ok(f(bytes.as_bytes()));
    }
    let mut views = Views(Vec::with_capacity(1));
    let Some(room) = views.0.spare_capacity_mut().first_mut() else { return Ok(f(&[])) };
    // SAFETY: attached, as the `Bound` shows; `room` is memory for a Py_buffer, which the call fills in when it
    // gives 0.
    if unsafe { ffi::PyObject_GetBuffer(object.as_ptr(), room.as_mut_ptr(), ffi::PyBUF_SIMPLE) } != 0 {
        return Err(PyErr::fetch(object.py()));
    }
    // SAFETY: the first is filled in.
    unsafe { views.0.set_len(1) };
    let bytes = match views.0.first() {
        Some(view) if view.len > 0 && !view.buf.is_null() => {
            // SAFETY: the exporter keeps `len` bytes from `buf` valid while the buffer is held. Other Python
            // threads wait for the interpreter, which `f` does not give up; one that translates these very
            // bytes detached breaks the rule that translating documents.
            unsafe { std::slice::from_raw_parts(view.buf.cast::<u8>(), view.len.unsigned_abs()) }
        }
        _ => &[],
    };
    Ok(f(bytes))
}

/// Writable packets in Python objects.
pub struct Foreign {
    /// Keep the memory of `regions` in place. Dropped with the interpreter attached or not; PyO3 sees to it.
    held: Vec<PyBuffer<u8>>,
    /// The same, for objects of the usual kind.
    views: Views,
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
    /// One packet an object, the first `count` of them.
    pub fn each<'py>(count: usize, objects: impl Iterator<Item = Bound<'py, PyAny>>) -> PyResult<Foreign> {
        let mut all = Foreign {
            held: Vec::new(),
            views: Views(Vec::with_capacity(count)),
            regions: Vec::with_capacity(count),
        };
        for object in objects.take(count) {
            all.add(&object)?;
        }
        Ok(all)
    }

    #[inline]
    fn add(&mut self, object: &Bound<'_, PyAny>) -> PyResult<()> {
        let found = match self.views.hold(object) {
            Some(found) => found,
            None => {
                let buffer = PyBuffer::get(object)?;
                let found = region(&buffer)?;
                self.held.push(buffer);
                found
            }
        };
        self.regions.push(found);
        Ok(())
    }

    /// Makes packets of the first one, by start and length in bytes; spans outside of it are empty packets.
    pub fn cut(&mut self, spans: impl Iterator<Item = (u32, u32)>) {
        let Some(whole) = self.regions.first().copied() else { return };
        let regions = spans.map(|(start, len)| {
            let (start, len) = (start as usize, len as usize);
            if start + len > whole.len {
                return Region { start: whole.start, len: 0 };
            }
            // SAFETY: start <= whole.len, so the address is in the buffer or one past its end.
            Region { start: unsafe { whole.start.add(start) }, len }
        });
        self.regions = regions.collect();
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
                debug_assert!(!self.held.is_empty() || !self.views.0.is_empty());
                // SAFETY: the exporter keeps start..start+len valid and writable while `held` and `views` live. `&mut
                // self` makes this the only slice of it here; Python threads that write to the same buffer
                // meanwhile break the rule that translating documents, as with any call that works on a
                // buffer detached, and every access below is bounds-checked whatever the bytes say.
                unsafe { std::slice::from_raw_parts_mut(r.start, r.len) }
            }
            _ => &mut [],
        }
    }
}
