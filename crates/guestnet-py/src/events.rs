//! Theory of operation: events cross in batches, each an object of the class that names its kind, so that
//! Python leads it to its handler by one look at a dictionary. An object holds Rust's values; what Python
//! never looks at is never made into a Python object.

use crate::addresses::{Pair, pair};
use crate::errors::command_error;
use crate::nat;
use crate::records::{FlowInfo, PortInfo};
use guestnet_core::effects;
use guestnet_io::{CommandError, Event, Level, Value};
use guestnet_wire::ether::Mac;
use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::net::IpAddr;
use std::sync::Arc;

/// A datagram for a UDP service.
#[pyclass(frozen, module = "guestnet._native")]
pub struct Datagram {
    #[pyo3(get)]
    service: u32,
    #[pyo3(get)]
    port: u32,
    #[pyo3(get)]
    src: Pair,
    #[pyo3(get)]
    dst: Pair,
    mac: Mac,
    payload: Box<[u8]>,
}

#[pymethods]
impl Datagram {
    #[getter]
    fn mac<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.mac.0)
    }

    #[getter]
    fn payload<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.payload)
    }
}

/// A guest asks for a name that may be the network's own.
#[pyclass(frozen, module = "guestnet._native")]
pub struct DnsQuestion {
    #[pyo3(get)]
    port: u32,
    #[pyo3(get)]
    ticket: u64,
    name: Box<[u8]>,
    #[pyo3(get)]
    kind: u16,
}

#[pymethods]
impl DnsQuestion {
    #[getter]
    fn name<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.name)
    }
}

/// A name server does not respond, or does so again.
#[pyclass(frozen, get_all, module = "guestnet._native")]
pub struct NameServer {
    server: Pair,
    trouble: Option<&'static str>,
}

/// A guest was seen to use an address.
#[pyclass(frozen, module = "guestnet._native")]
pub struct AddressSeen {
    #[pyo3(get)]
    port: u32,
    #[pyo3(get)]
    address: IpAddr,
    mac: Mac,
}

#[pymethods]
impl AddressSeen {
    #[getter]
    fn mac<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.mac.0)
    }
}

/// A flow began.
#[pyclass(frozen, get_all, module = "guestnet._native")]
pub struct FlowOpened {
    flow: (u32, u32),
    port: u32,
    proto: u8,
    guest: Pair,
    remote: Pair,
    inbound: bool,
    /// The rule that allowed it; None for services of the gateway.
    rule: Option<String>,
    /// A name for which the guest got the remote address.
    name: Option<String>,
}

/// A flow ended.
#[pyclass(frozen, get_all, module = "guestnet._native")]
pub struct FlowClosed {
    flow: (u32, u32),
    port: u32,
    bytes_out: u64,
    bytes_in: u64,
    /// Datagrams from the guest; None where they are not counted.
    packets_out: Option<u32>,
    /// Datagrams to the guest.
    packets_in: Option<u32>,
    /// The rule that allowed it; None when the rules have changed since.
    rule: Option<String>,
    /// A name for which the guest got the remote address.
    name: Option<String>,
    /// The name that the conversation showed.
    shown: Option<String>,
}

/// A new flow was refused.
#[pyclass(frozen, get_all, module = "guestnet._native")]
pub struct FlowDenied {
    port: u32,
    /// "outbound", "inbound" or "between_guests".
    direction: &'static str,
    proto: u8,
    guest: Pair,
    remote: Pair,
    /// The rule that decided; None where a limit was reached.
    rule: Option<String>,
    /// A name for which the guest got the remote address.
    name: Option<String>,
    /// The name that the conversation showed.
    shown: Option<String>,
    reason: &'static str,
    /// How many denials of the guest were not reported since the last one that was.
    unreported: u32,
}

/// A query of a guest was refused by a rule, or its answer was.
#[pyclass(frozen, get_all, module = "guestnet._native")]
pub struct NameDenied {
    port: u32,
    name: String,
    /// The number of the type that was asked for.
    kind: u16,
    rule: String,
    reason: &'static str,
    /// How many denials of the guest were not reported since the last one that was.
    unreported: u32,
}

/// A flow waits for the owner's answer.
#[pyclass(frozen, get_all, module = "guestnet._native")]
pub struct PolicyAsk {
    ticket: u64,
    port: u32,
    proto: u8,
    guest: Pair,
    remote: Pair,
    rule: String,
    name: Option<String>,
}

/// A flow waits no longer for the owner's answer.
#[pyclass(frozen, get_all, module = "guestnet._native")]
pub struct PolicyAskEnded {
    ticket: u64,
    port: u32,
}

/// A command is done.
#[pyclass(frozen, module = "guestnet._native")]
pub struct Done {
    #[pyo3(get)]
    sequence: u64,
    result: Result<Value, CommandError>,
}

#[pymethods]
impl Done {
    /// Why it was not done, an instance of a class of `guestnet.errors`.
    #[getter]
    fn error(&self, py: Python<'_>) -> Option<PyErr> {
        self.result.as_ref().err().map(|e| command_error(py, e))
    }

    /// What it brought.
    #[getter]
    fn value<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        match &self.result {
            Ok(Value::Flows(flows)) => {
                flows.iter().cloned().map(FlowInfo::from).collect::<Vec<_>>().into_pyobject(py)
            }
            Ok(Value::Ports(ports)) => {
                ports.iter().cloned().map(PortInfo::from).collect::<Vec<_>>().into_pyobject(py)
            }
            Ok(Value::Nat(both)) => (nat::stats(py, &both.0)?, nat::conntrack_stats(py, &both.1)?)
                .into_pyobject(py)
                .map(Bound::into_any),
            Ok(Value::FlowsCut(flows)) => flows.into_bound_py_any(py),
            Ok(Value::None) | Err(_) => Ok(py.None().into_bound(py)),
        }
    }
}

/// A guest came to a listener.
#[pyclass(frozen, get_all, module = "guestnet._native")]
pub struct PortUp {
    port: u32,
    listener: u32,
    peer: String,
}

/// The attachment of a port is gone.
#[pyclass(frozen, get_all, module = "guestnet._native")]
pub struct PortDown {
    port: u32,
    reason: String,
}

/// A frame to a guest with a memory attachment.
#[pyclass(frozen, module = "guestnet._native")]
pub struct Frame {
    #[pyo3(get)]
    port: u32,
    frame: Box<[u8]>,
}

#[pymethods]
impl Frame {
    #[getter]
    fn frame<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.frame)
    }
}

/// A log record.
#[pyclass(frozen, get_all, module = "guestnet._native")]
pub struct Log {
    /// As in the module `logging`: 10, 20, 30 or 40.
    level: u8,
    message: String,
}

/// The worker has failed and is gone.
#[pyclass(frozen, get_all, module = "guestnet._native")]
pub struct Failed {
    message: String,
}

fn object<'py, T>(py: Python<'py>, value: T) -> PyResult<Bound<'py, PyAny>>
where
    T: pyo3::PyClass + Into<PyClassInitializer<T>>,
{
    Bound::new(py, value).map(Bound::into_any)
}

/// The Python object of one event.
pub fn into_object(py: Python<'_>, event: Event) -> PyResult<Bound<'_, PyAny>> {
    match event {
        Event::Core(e) => core_event(py, e),
        Event::Done { sequence, result } => object(py, Done { sequence, result }),
        Event::PortUp { port, listener, peer } => object(py, PortUp { port: port.0, listener, peer }),
        Event::PortDown { port, reason } => object(py, PortDown { port: port.0, reason }),
        Event::Frame { port, frame } => object(py, Frame { port: port.0, frame }),
        Event::Log { level, message } => object(py, Log { level: level_number(level), message }),
        Event::Failed { message } => object(py, Failed { message }),
    }
}

fn level_number(level: Level) -> u8 {
    match level {
        Level::Debug => 10,
        Level::Info => 20,
        Level::Warning => 30,
        Level::Error => 40,
    }
}

fn core_event(py: Python<'_>, event: effects::Event) -> PyResult<Bound<'_, PyAny>> {
    use effects::Event as E;
    match event {
        E::Datagram { service, port, mac, src, dst, payload } => object(
            py,
            Datagram { service: service.0, port: port.0, src: pair(src), dst: pair(dst), mac, payload },
        ),
        E::DnsQuestion { port, ticket, name, kind } => {
            object(py, DnsQuestion { port: port.0, ticket, name, kind })
        }
        E::NameServer { server, trouble } => object(py, NameServer { server: pair(server), trouble }),
        E::AddressSeen { port, mac, address } => object(py, AddressSeen { port: port.0, address, mac }),
        E::FlowOpened { flow, port, proto, guest, remote, inbound, rule, name } => object(
            py,
            FlowOpened {
                flow: (flow.index, flow.generation),
                port: port.0,
                proto,
                guest: pair(guest),
                remote: pair(remote),
                inbound,
                rule: text(rule),
                name: text(name),
            },
        ),
        E::FlowClosed { flow, port, bytes_out, bytes_in, packets_out, packets_in, rule, name, shown } => {
            object(
                py,
                FlowClosed {
                    flow: (flow.index, flow.generation),
                    port: port.0,
                    bytes_out,
                    bytes_in,
                    packets_out,
                    packets_in,
                    rule: text(rule),
                    name: text(name),
                    shown: text(shown),
                },
            )
        }
        E::PolicyAsk(a) => object(
            py,
            PolicyAsk {
                ticket: a.ticket,
                port: a.port.0,
                proto: a.proto,
                guest: pair(a.guest),
                remote: pair(a.remote),
                rule: a.rule.to_string(),
                name: text(a.name),
            },
        ),
        E::PolicyAskEnded { port, ticket } => object(py, PolicyAskEnded { ticket, port: port.0 }),
        E::NameDenied(d) => object(
            py,
            NameDenied {
                port: d.port.0,
                name: d.name.to_string(),
                kind: d.kind,
                rule: d.rule.to_string(),
                reason: d.reason,
                unreported: d.unreported,
            },
        ),
        E::FlowDenied(d) => object(
            py,
            FlowDenied {
                port: d.port.0,
                direction: d.direction.name(),
                proto: d.proto,
                guest: pair(d.guest),
                remote: pair(d.remote),
                rule: text(d.rule),
                name: text(d.name),
                shown: text(d.shown),
                reason: d.reason.name(),
                unreported: d.unreported,
            },
        ),
    }
}

fn text(shared: Option<Arc<str>>) -> Option<String> {
    shared.map(|t| t.to_string())
}
