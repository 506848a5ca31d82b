//! Theory of operation: whole numbers that Python gives. A number that no machine integer of the wanted size
//! holds is a wrong value, so it is a ConfigError like every other, and not Python's OverflowError. What is no
//! number stays a TypeError.

use crate::errors::config_error;
use pyo3::exceptions::PyOverflowError;
use pyo3::prelude::*;

/// A number, or a list of them, that fits `T`.
#[derive(Clone, Copy)]
pub struct Fits<T>(pub T);

impl<'a, 'py, T: FromPyObject<'a, 'py>> FromPyObject<'a, 'py> for Fits<T> {
    type Error = PyErr;

    #[inline]
    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        object.extract::<T>().map(Fits).map_err(|e| out_of_range(object, e.into()))
    }
}

#[cold]
fn out_of_range(object: Borrowed<'_, '_, PyAny>, e: PyErr) -> PyErr {
    let py = object.py();
    if !e.is_instance_of::<PyOverflowError>(py) {
        return e;
    }
    let text = object.repr().map(|r| r.to_string()).unwrap_or_default();
    let shown: String = text.chars().take(60).collect();
    let more = if shown.len() < text.len() { "..." } else { "" };
    config_error(py, format!("{shown}{more} is out of range: give a whole number that is not below 0."))
}
