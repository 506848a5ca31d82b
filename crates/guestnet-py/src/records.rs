//! Theory of operation: what commands bring back, as plain objects. Counters cross as dictionaries whose keys
//! are the stable names of `guestnet_core::stats`.

use crate::addresses::{Pair, pair};
use guestnet_core::config;
use guestnet_core::stats::{Counters, DropReason};
use guestnet_io::{IoCounters, StatsSnapshot};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use std::net::IpAddr;

/// One flow.
#[pyclass(frozen, get_all, module = "guestnet._native")]
pub struct FlowInfo {
    /// Slot and generation: a number that no other flow of this worker has had.
    flow: (u32, u32),
    port: u32,
    proto: u8,
    guest: Pair,
    remote: Pair,
    inbound: bool,
    state: &'static str,
    bytes_out: u64,
    bytes_in: u64,
    age_ms: u64,
    idle_ms: u64,
}

impl From<config::FlowInfo> for FlowInfo {
    fn from(f: config::FlowInfo) -> Self {
        FlowInfo {
            flow: (f.flow.index, f.flow.generation),
            port: f.port.0,
            proto: f.proto,
            guest: pair(f.guest),
            remote: pair(f.remote),
            inbound: f.inbound,
            state: f.state,
            bytes_out: f.bytes_out,
            bytes_in: f.bytes_in,
            age_ms: f.age_ms,
            idle_ms: f.idle_ms,
        }
    }
}

/// One port with its counters.
#[pyclass(frozen, module = "guestnet._native")]
pub struct PortInfo {
    info: config::PortInfo,
    counters: Counters,
}

impl From<(config::PortInfo, Counters)> for PortInfo {
    fn from((info, counters): (config::PortInfo, Counters)) -> Self {
        PortInfo { info, counters }
    }
}

#[pymethods]
impl PortInfo {
    #[getter]
    fn port(&self) -> u32 {
        self.info.port.0
    }

    #[getter]
    fn mac<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        self.info.mac.map(|m| PyBytes::new(py, &m.0))
    }

    #[getter]
    fn addresses(&self) -> Vec<IpAddr> {
        self.info.addresses.clone()
    }

    #[getter]
    fn mtu(&self) -> u16 {
        self.info.mtu
    }

    #[getter]
    fn flows(&self) -> u32 {
        self.info.flows
    }

    #[getter]
    fn buffered(&self) -> usize {
        self.info.buffered
    }

    #[getter]
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        counters(py, &self.counters)
    }
}

/// The counters of a port or a worker; `drops` is a dictionary of its own, by reason.
pub fn counters<'py>(py: Python<'py>, c: &Counters) -> PyResult<Bound<'py, PyDict>> {
    let plain = [
        ("rx_frames", c.rx_frames),
        ("rx_bytes", c.rx_bytes),
        ("tx_frames", c.tx_frames),
        ("tx_bytes", c.tx_bytes),
        ("flows_opened", c.flows_opened),
        ("flows_closed", c.flows_closed),
        ("retransmits", c.retransmits),
        ("icmp_errors", c.icmp_errors),
        ("dns_hits", c.dns_hits),
        ("dns_misses", c.dns_misses),
        ("dns_asked", c.dns_asked),
        ("dns_refused", c.dns_refused),
        ("dns_unanswered", c.dns_unanswered),
    ];
    let out = PyDict::new(py);
    for (name, value) in plain {
        out.set_item(name, value)?;
    }
    let drops = PyDict::new(py);
    for (reason, value) in DropReason::ALL.iter().zip(c.drops) {
        drops.set_item(reason.name(), value)?;
    }
    out.set_item("drops", drops)?;
    Ok(out)
}

/// The counters of a worker, with those of its I/O side under `io`.
pub fn snapshot<'py>(py: Python<'py>, s: &StatsSnapshot) -> PyResult<Bound<'py, PyDict>> {
    let out = counters(py, &s.core)?;
    let io = PyDict::new(py);
    for (name, value) in IoCounters::NAMES.iter().zip(s.io.values()) {
        io.set_item(*name, value)?;
    }
    io.set_item("poll_histogram", s.io.poll_histogram)?;
    io.set_item("batch_histogram", s.io.batch_histogram)?;
    out.set_item("io", io)?;
    Ok(out)
}
