//! Theory of operation: how addresses cross the boundary. A MAC is six `bytes`; an IP address is one of the
//! module `ipaddress` (or its text, inwards); an address with a port is a tuple of both.

use crate::errors::config_error;
use guestnet_wire::ether::Mac;
use pyo3::prelude::*;
use std::net::{IpAddr, SocketAddr};

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
