//! Theory of operation: packet pool and ring for Python. Indices are plain numbers; what goes wrong with one (a
//! second free, a foreign index) is a `ValueError` of the pool. A ring's two halves are behind locks, so any
//! Python thread may use either end; one at a time has it.

use crate::buffers::with_bytes;
use crate::errors::config_error;
use crate::numbers::Fits;
use guestnet_io::memory::pool::{self, PoolError};
use guestnet_io::memory::ring::{Consumer, DEFAULT_RING_CAPACITY, Producer};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub(crate) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pool_error(py: Python<'_>, e: PoolError) -> PyErr {
    config_error(py, format!("{e}."))
}

/// Preallocated packet buffers of one size, used by index.
///
/// Args:
///     capacity: Buffers in the pool.
///     buffer_size: Bytes of a buffer.
///
/// Raises:
///     ConfigError: A number is out of range, or an index is not held.
///
/// Example:
///     >>> pool = PacketPool(16, 2048)
///     >>> index = pool.put(b"a frame")
///     >>> pool.get(index), pool.available
///     (b'a frame', 15)
///     >>> pool.free(index)
#[pyclass(frozen, module = "guestnet._native")]
pub struct PacketPool {
    pub(crate) inner: Arc<pool::PacketPool>,
}

#[pymethods]
impl PacketPool {
    #[new]
    #[pyo3(signature = (capacity=Fits(pool::DEFAULT_POOL_CAPACITY), buffer_size=Fits(pool::DEFAULT_BUFFER_SIZE)))]
    fn new(py: Python<'_>, capacity: Fits<usize>, buffer_size: Fits<usize>) -> PyResult<Self> {
        let (capacity, buffer_size) = (capacity.0, buffer_size.0);
        let inner =
            pool::PacketPool::with_buffer_size(capacity, buffer_size).map_err(|e| pool_error(py, e))?;
        guestnet_io::os::hugepages::advise(&[inner.range()]);
        Ok(PacketPool { inner: Arc::new(inner) })
    }

    /// How many buffers there are.
    #[getter]
    fn capacity(&self) -> usize {
        self.inner.capacity()
    }

    /// How many bytes a buffer holds.
    #[getter]
    fn buffer_size(&self) -> usize {
        self.inner.buffer_size()
    }

    /// How many buffers are free.
    #[getter]
    fn available(&self) -> usize {
        self.inner.available()
    }

    /// Takes a buffer.
    ///
    /// Returns:
    ///     Its index, None when none is free.
    fn alloc(&self) -> Option<u32> {
        self.inner.alloc()
    }

    /// Gives a buffer back.
    ///
    /// Args:
    ///     index: The buffer.
    ///
    /// Raises:
    ///     ConfigError: The buffer is not held.
    fn free(&self, py: Python<'_>, index: Fits<u32>) -> PyResult<()> {
        self.inner.free(index.0).map_err(|e| pool_error(py, e))
    }

    /// Returns the bytes in use.
    ///
    /// Args:
    ///     index: The buffer.
    ///
    /// Returns:
    ///     A copy of them.
    ///
    /// Raises:
    ///     ConfigError: The buffer is not held.
    fn get<'py>(&self, py: Python<'py>, index: Fits<u32>) -> PyResult<Bound<'py, PyBytes>> {
        let b = self.inner.borrow(index.0).map_err(|e| pool_error(py, e))?;
        Ok(PyBytes::new(py, &b))
    }

    /// Returns the bytes in use, and frees the buffer.
    ///
    /// Args:
    ///     index: The buffer.
    ///
    /// Returns:
    ///     A copy of the bytes, None when the buffer is not held.
    fn take<'py>(&self, py: Python<'py>, index: Fits<u32>) -> Option<Bound<'py, PyBytes>> {
        let bytes = PyBytes::new(py, &self.inner.borrow(index.0).ok()?);
        self.inner.free(index.0).ok()?;
        Some(bytes)
    }

    /// Sets the bytes in use.
    ///
    /// Args:
    ///     index: The buffer.
    ///     data: Any object that has contiguous bytes.
    ///
    /// Raises:
    ///     ConfigError: The buffer is not held, or the bytes do not fit.
    fn set(&self, py: Python<'_>, index: Fits<u32>, data: &Bound<'_, PyAny>) -> PyResult<()> {
        let mut b = self.inner.borrow(index.0).map_err(|e| pool_error(py, e))?;
        with_bytes(data, |bytes| b.fill(bytes))?.map_err(|e| pool_error(py, e))
    }

    /// Takes a buffer and fills it.
    ///
    /// Args:
    ///     data: Any object that has contiguous bytes.
    ///
    /// Returns:
    ///     The index of the buffer, None when none is free.
    ///
    /// Raises:
    ///     ConfigError: The bytes do not fit.
    fn put(&self, py: Python<'_>, data: &Bound<'_, PyAny>) -> PyResult<Option<u32>> {
        let Some(index) = self.inner.alloc() else { return Ok(None) };
        match self.set(py, Fits(index), data) {
            Ok(()) => Ok(Some(index)),
            Err(e) => {
                self.free(py, Fits(index))?;
                Err(e)
            }
        }
    }

    fn __len__(&self) -> usize {
        self.inner.capacity()
    }

    fn __repr__(&self) -> String {
        format!(
            "<PacketPool of {} buffers of {} bytes, {} free>",
            self.inner.capacity(),
            self.inner.buffer_size(),
            self.inner.available()
        )
    }
}

/// A queue of buffer indexes. Any thread may use either end; one at a time does.
///
/// Args:
///     capacity: How many indexes it holds, rounded up to a power of two.
///
/// Raises:
///     ConfigError: The number is out of range.
///
/// Example:
///     >>> ring = Ring(4)
///     >>> ring.enqueue_batch([1, 2, 3]), ring.dequeue(), len(ring)
///     (3, 1, 2)
#[pyclass(frozen, module = "guestnet._native")]
pub struct Ring {
    producer: Mutex<Producer<u32>>,
    consumer: Mutex<Consumer<u32>>,
}

#[pymethods]
impl Ring {
    #[new]
    #[pyo3(signature = (capacity=Fits(DEFAULT_RING_CAPACITY)))]
    fn new(py: Python<'_>, capacity: Fits<usize>) -> PyResult<Self> {
        let ring = guestnet_io::memory::ring::Ring::new(capacity.0)
            .map_err(|e| config_error(py, format!("{e}.")))?;
        let (p, c) = ring.split();
        Ok(Ring { producer: Mutex::new(p), consumer: Mutex::new(c) })
    }

    /// How many indexes it holds at most.
    #[getter]
    fn capacity(&self) -> usize {
        lock(&self.producer).capacity()
    }

    /// Puts an index.
    ///
    /// Args:
    ///     index: A buffer.
    ///
    /// Returns:
    ///     Whether there was room.
    fn enqueue(&self, index: Fits<u32>) -> bool {
        lock(&self.producer).enqueue(index.0).is_ok()
    }

    /// Takes the oldest index.
    ///
    /// Returns:
    ///     The index, None when the ring is empty.
    fn dequeue(&self) -> Option<u32> {
        lock(&self.consumer).dequeue()
    }

    /// Puts as many indexes as there is room for, in order.
    ///
    /// Args:
    ///     indices: Buffers.
    ///
    /// Returns:
    ///     How many were put.
    fn enqueue_batch(&self, indices: Fits<Vec<u32>>) -> usize {
        lock(&self.producer).enqueue_batch(&indices.0)
    }

    /// Takes several indexes, oldest first.
    ///
    /// Args:
    ///     count: How many at most.
    ///
    /// Returns:
    ///     The indexes.
    fn dequeue_batch(&self, count: Fits<usize>) -> Vec<u32> {
        let mut c = lock(&self.consumer);
        let mut out = vec![0; count.0.min(c.len())];
        let n = c.dequeue_batch(&mut out);
        out.truncate(n);
        out
    }

    /// Whether it holds no index.
    #[getter]
    fn is_empty(&self) -> bool {
        lock(&self.consumer).is_empty()
    }

    /// Whether it has no room.
    #[getter]
    fn is_full(&self) -> bool {
        let p = lock(&self.producer);
        p.len() == p.capacity()
    }

    fn __len__(&self) -> usize {
        lock(&self.consumer).len()
    }

    fn __repr__(&self) -> String {
        format!("<Ring of {}, {} in it>", self.capacity(), self.__len__())
    }
}
