//! Theory of operation: the packet threads that networks share. A [`crate::dataplane::DataPlane`] that names no runtime
//! is on the one of the process.

use crate::errors::config_error;
use guestnet_io::WORKERS_MAX;
use pyo3::prelude::*;

/// Packet threads that networks share.
#[pyclass(frozen, module = "guestnet._native")]
pub struct Runtime {
    pub inner: guestnet_io::Runtime,
}

#[pymethods]
impl Runtime {
    #[new]
    #[pyo3(signature = (*, workers=None, name="guestnet"))]
    fn new(py: Python<'_>, workers: Option<usize>, name: &str) -> PyResult<Runtime> {
        let workers = workers.unwrap_or_else(guestnet_io::processors);
        if !(1..=WORKERS_MAX).contains(&workers) {
            return Err(config_error(
                py,
                format!("the number of workers {workers} is not 1 to {WORKERS_MAX}"),
            ));
        }
        Ok(Runtime { inner: guestnet_io::Runtime::new(name, workers) })
    }

    /// The runtime of networks that name none.
    #[staticmethod]
    fn of_process() -> Runtime {
        Runtime { inner: guestnet_io::Runtime::of_process() }
    }

    /// Most threads.
    #[getter]
    fn workers(&self) -> usize {
        self.inner.workers()
    }

    /// Threads that run now.
    #[getter]
    fn threads(&self) -> usize {
        self.inner.load().0
    }

    /// Networks on them; one with several workers counts once for each.
    #[getter]
    fn networks(&self) -> usize {
        self.inner.load().1
    }
}
