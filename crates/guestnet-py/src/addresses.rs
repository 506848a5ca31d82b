//! Theory of operation: how addresses cross the boundary. A MAC is six `bytes`; an IP address is one of the
//! module `ipaddress` (or its text, inwards); an address with a port is a tuple of both.

use crate::errors::config_error;
use guestnet_wire::ether::Mac;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// An address and a port, as Python writes them.
pub type Pair = (IpAddr, u16);

/// The Rust side of a [`Pair`].
pub fn socket(pair: Pair) -> SocketAddr {
    SocketAddr::new(pair.0, pair.1)
}

/// The Python side of a socket address.
pub fn pair(address: SocketAddr) -> Pair {
    (address.ip(), address.port())
}

/// A MAC from its six bytes.
pub fn mac(py: Python<'_>, bytes: &[u8]) -> PyResult<Mac> {
    <[u8; 6]>::try_from(bytes)
        .map(Mac)
        .map_err(|_| config_error(py, format!("a MAC address has 6 bytes, not {}", bytes.len())))
}

/// An IPv4 address, where the other family makes no sense.
#[derive(Clone, Copy)]
pub struct V4(pub Ipv4Addr);

impl<'a, 'py> FromPyObject<'a, 'py> for V4 {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        match object.extract() {
            Ok(IpAddr::V4(a)) => Ok(V4(a)),
            Ok(IpAddr::V6(a)) => Err(config_error(object.py(), format!("{a} is not an IPv4 address."))),
            Err(e) if e.is_instance_of::<PyValueError>(object.py()) => {
                Err(config_error(object.py(), format!("{object:?} is not an IPv4 address.")))
            }
            Err(e) => Err(e),
        }
    }
}
