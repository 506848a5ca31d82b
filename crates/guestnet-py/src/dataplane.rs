//! Theory of operation: the workers of a network as one object. Every command is a method that queues it and
//! returns its number; the number comes back in a `Done` event. Nothing here waits but `stop`, and a full queue
//! is an error at once. Descriptors are duplicated: the caller's stay the caller's.

use crate::addresses::{Pair, V4, mac, socket};
use crate::buffers::with_bytes;
use crate::config::{self, Named};
use crate::errors::{config_error, descriptor_error, start_error, submit_error};
use crate::policy::{self, LimitTuple, PolicyTable};
use crate::runtime::Runtime;
use crate::{events, records};
use guestnet_core::NetworkCommand;
use guestnet_core::config::ForwardSpec;
use guestnet_core::nat::NatEngineConfig;
use guestnet_core::policy::{Entry, Isolated};
use guestnet_core::types::{ForwardId, PortConfig, PortId, ServiceId};
use guestnet_core::{DnsVerdict, NameServers};
use guestnet_io::WORKERS_MAX;
use guestnet_io::{Command, Event, WorkerCommand, WorkerConfig, WorkerGroup, duplicate};
use guestnet_wire::dns::Record;
use guestnet_wire::proto;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;

/// Most that guests are offered in one piece where their attachment cannot cut: the largest IP packet.
const MTU_MAX: u16 = 65_520;
/// The least that IPv4 allows (RFC 791).
const MTU_MIN: u16 = 68;

/// True when small writes can be gathered in one call of io_uring here.
#[pyfunction]
pub fn io_uring_works() -> bool {
    guestnet_io::io_uring_works()
}

/// None when packet threads can give up here what they never need; else what they cannot.
#[pyfunction]
pub fn confinement_lack(py: Python<'_>) -> Option<String> {
    py.detach(|| guestnet_io::confinement_works().err())
}

/// A DNS record: name as labels, type, TTL in seconds, data.
type DnsRecord = (Vec<u8>, u16, u32, Vec<u8>);

/// A running network.
#[pyclass(frozen, module = "guestnet._native")]
pub struct DataPlane {
    workers: WorkerGroup,
    /// Flows in all and of one guest, where the uplink translates and they hold no descriptor.
    translated: (usize, u32),
}

fn take(py: Python<'_>, fd: RawFd) -> PyResult<OwnedFd> {
    duplicate(fd).map_err(|e| descriptor_error(py, fd, &e))
}

fn port_config(
    py: Python<'_>,
    mac_bytes: Option<&[u8]>,
    addresses: Vec<IpAddr>,
    mtu: u16,
    gso_max: u32,
    lax_offload: bool,
) -> PyResult<PortConfig> {
    if !(MTU_MIN..=MTU_MAX).contains(&mtu) {
        return Err(config_error(py, format!("the MTU {mtu} is not between {MTU_MIN} and {MTU_MAX}")));
    }
    let mac = mac_bytes.map(|m| mac(py, m)).transpose()?;
    Ok(PortConfig { mac, addresses, mtu, gso_max, lax_offload, uplink: false })
}

fn entry(opened_by_guest: bool) -> Entry {
    if opened_by_guest { Entry::GuestPort } else { Entry::Published }
}

fn protocol(py: Python<'_>, name: &str) -> PyResult<u8> {
    match name {
        "tcp" => Ok(proto::TCP),
        "udp" => Ok(proto::UDP),
        _ => Err(config_error(py, format!("there is no protocol {name:?}: \"tcp\" or \"udp\""))),
    }
}

impl DataPlane {
    fn submit(&self, py: Python<'_>, command: impl Into<Command>) -> PyResult<u64> {
        self.workers.submit(command).map_err(|e| submit_error(py, e))
    }
}

#[pymethods]
#[allow(clippy::too_many_arguments)] // Keywords in Python.
impl DataPlane {
    #[new]
    #[pyo3(signature = (*, gateway, prefix, gateway_mac, secret, mode="nat", host_loopback=None, isolated=false, reserved=Vec::new(),
        filtering="address_dependent", limits=Named::new(), timeouts=Named::new(), strategy="adaptive",
        batch_size=64, max_spins=1000, event_ring=8192, command_ring=1024, name="guestnet", workers=1,
        io_uring=true, source=None, proxy=None, runtime=None, gateway6=None, search=Vec::new(), upstream6=true))]
    fn new(
        py: Python<'_>,
        gateway: IpAddr,
        prefix: u8,
        gateway_mac: &[u8],
        secret: &[u8],
        mode: &str,
        host_loopback: Option<IpAddr>,
        isolated: bool,
        reserved: Vec<(IpAddr, Vec<u8>)>,
        filtering: &str,
        limits: Named,
        timeouts: Named,
        strategy: &str,
        batch_size: usize,
        max_spins: u32,
        event_ring: usize,
        command_ring: usize,
        name: &str,
        workers: usize,
        io_uring: bool,
        source: Option<&str>,
        proxy: Option<config::ProxyIn>,
        runtime: Option<&Runtime>,
        gateway6: Option<IpAddr>,
        search: Vec<String>,
        upstream6: bool,
    ) -> PyResult<Self> {
        let mut core = config::core(
            py,
            mode,
            gateway,
            prefix,
            gateway_mac,
            secret,
            host_loopback,
            isolated,
            &reserved,
            filtering,
            &limits,
            &timeouts,
        )?;
        core.gateway6 = match gateway6 {
            Some(IpAddr::V6(ip)) => Some((ip, 64)),
            Some(ip) => return Err(config_error(py, format!("the gateway {ip} is not an IPv6 address"))),
            None => None,
        };
        (core.search, core.upstream6) = (search, upstream6);
        // A connection that is over counts for four more minutes; still no guest has the table to itself.
        let flows = core.limits.flows;
        let of_one = limits.get("flows_per_port").copied().unwrap_or(flows / 2);
        let translated = (flows as usize, of_one);
        if !(1..=1024).contains(&batch_size) {
            return Err(config_error(py, format!("the batch size {batch_size} is not 1 to 1024")));
        }
        if !(1..=WORKERS_MAX).contains(&workers) {
            return Err(config_error(
                py,
                format!("the number of workers {workers} is not 1 to {WORKERS_MAX}"),
            ));
        }
        let config = WorkerConfig {
            workers,
            io_uring,
            source: config::source(py, source)?,
            proxy: proxy.map(|p| config::proxy(py, p)).transpose()?,
            strategy: config::strategy(py, strategy)?,
            batch_size,
            max_spins,
            event_ring: event_ring.clamp(128, 1 << 20),
            command_ring: command_ring.clamp(16, 1 << 20),
            name: name.replace('\0', ""),
            ..WorkerConfig::new(core)
        };
        // Looked up while this thread has the GIL: a fork that another thread makes cannot come in between.
        let runtime = runtime.map_or_else(guestnet_io::Runtime::of_process, |r| r.inner.clone());
        let workers = py.detach(|| runtime.spawn(config)).map_err(|e| start_error(py, &e))?;
        Ok(DataPlane { workers, translated })
    }

    /// Readable when there are events.
    #[getter]
    fn event_fd(&self) -> RawFd {
        self.workers.event_fd()
    }

    /// False when the worker has ended.
    #[getter]
    fn is_healthy(&self) -> bool {
        self.workers.is_healthy()
    }

    /// Takes up to `max` events, oldest first.
    fn drain<'py>(&self, py: Python<'py>, max: usize) -> PyResult<Bound<'py, PyList>> {
        let taken: Vec<Event> = self.workers.drain(max);
        let list = PyList::empty(py);
        for event in taken {
            list.append(events::into_object(py, event)?)?;
        }
        Ok(list)
    }

    /// The counters.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        records::snapshot(py, &self.workers.stats())
    }

    /// The counters of each worker.
    fn worker_stats<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        self.workers.stats_of_each().iter().map(|s| records::snapshot(py, s)).collect()
    }

    /// Asks the network to end, and does not wait: `event_fd` becomes readable when it has.
    fn begin_stop(&self) {
        self.workers.begin_stop();
    }

    /// True when nothing of the network runs any more.
    #[getter]
    fn has_ended(&self) -> bool {
        self.workers.has_ended()
    }

    /// Ends the network and waits for that.
    fn stop(&self, py: Python<'_>) {
        py.detach(|| self.workers.stop());
    }

    #[pyo3(signature = (port, *, mac=None, addresses=Vec::new(), mtu=1500, gso_max=65_000, lax_offload=false,
        uplink=false))]
    fn add_port(
        &self,
        py: Python<'_>,
        port: u32,
        mac: Option<&[u8]>,
        addresses: Vec<IpAddr>,
        mtu: u16,
        gso_max: u32,
        lax_offload: bool,
        uplink: bool,
    ) -> PyResult<u64> {
        let mut config = port_config(py, mac, addresses, mtu, gso_max, lax_offload)?;
        config.uplink = uplink;
        self.submit(py, Command::AddPort { port: PortId(port), config })
    }

    fn remove_port(&self, py: Python<'_>, port: u32) -> PyResult<u64> {
        self.submit(py, Command::RemovePort { port: PortId(port) })
    }

    fn attach_tap(&self, py: Python<'_>, port: u32, fd: RawFd) -> PyResult<u64> {
        self.submit(py, Command::AttachTap { port: PortId(port), fd: take(py, fd)? })
    }

    fn attach_stream(&self, py: Python<'_>, port: u32, fd: RawFd) -> PyResult<u64> {
        self.submit(py, Command::AttachStream { port: PortId(port), fd: take(py, fd)? })
    }

    fn attach_dgram(&self, py: Python<'_>, port: u32, fd: RawFd) -> PyResult<u64> {
        self.submit(py, Command::AttachDgram { port: PortId(port), fd: take(py, fd)? })
    }

    fn attach_vhost_user(&self, py: Python<'_>, port: u32, fd: RawFd) -> PyResult<u64> {
        self.submit(py, Command::AttachVhostUser { port: PortId(port), fd: take(py, fd)? })
    }

    fn attach_memory(&self, py: Python<'_>, port: u32) -> PyResult<u64> {
        self.submit(py, Command::AttachMemory { port: PortId(port) })
    }

    #[pyo3(signature = (listener, kind, fd, *, mtu=1500, gso_max=65_000, lax_offload=false))]
    fn listen(
        &self,
        py: Python<'_>,
        listener: u32,
        kind: &str,
        fd: RawFd,
        mtu: u16,
        gso_max: u32,
        lax_offload: bool,
    ) -> PyResult<u64> {
        let template = port_config(py, None, Vec::new(), mtu, gso_max, lax_offload)?;
        let kind = config::listen_kind(py, kind)?;
        self.submit(py, Command::Listen { listener, kind, fd: take(py, fd)?, template })
    }

    fn stop_listening(&self, py: Python<'_>, listener: u32) -> PyResult<u64> {
        self.submit(py, Command::StopListening { listener })
    }

    #[pyo3(signature = (port, ip, mac=None))]
    fn bind_address(&self, py: Python<'_>, port: u32, ip: IpAddr, mac: Option<&[u8]>) -> PyResult<u64> {
        let mac = mac.map(|m| crate::addresses::mac(py, m)).transpose()?;
        self.submit(py, NetworkCommand::BindAddress { port: PortId(port), ip, mac })
    }

    fn unbind_address(&self, py: Python<'_>, ip: IpAddr) -> PyResult<u64> {
        self.submit(py, NetworkCommand::UnbindAddress { ip })
    }

    #[pyo3(signature = (service, proto, address, port, unix_path=None))]
    fn add_service(
        &self,
        py: Python<'_>,
        service: u32,
        proto: &str,
        address: IpAddr,
        port: u16,
        unix_path: Option<PathBuf>,
    ) -> PyResult<u64> {
        let proto = protocol(py, proto)?;
        self.submit(
            py,
            WorkerCommand::AddService { service: ServiceId(service), proto, address, port, unix_path },
        )
    }

    fn service_send(
        &self,
        py: Python<'_>,
        port: u32,
        dst_mac: &[u8],
        src: Pair,
        dst: Pair,
        payload: &[u8],
    ) -> PyResult<u64> {
        let dst_mac = mac(py, dst_mac)?;
        let (src, dst, payload) = (socket(src), socket(dst), payload.to_vec());
        self.submit(py, NetworkCommand::ServiceSend { port: PortId(port), dst_mac, src, dst, payload })
    }

    fn set_dns_zones(
        &self,
        py: Python<'_>,
        service: u32,
        generation: u64,
        own: Vec<Vec<u8>>,
    ) -> PyResult<u64> {
        let own = own.into_iter().map(Vec::into_boxed_slice).collect();
        self.submit(py, NetworkCommand::SetDnsZones { service: ServiceId(service), generation, own })
    }

    fn forget_guest_names(&self, py: Python<'_>, generation: u64) -> PyResult<u64> {
        self.submit(py, NetworkCommand::ForgetGuestNames { generation })
    }

    #[pyo3(signature = (servers, *, timeout=2.0, attempts=2, rotate=false, use_tcp=false))]
    fn set_name_servers(
        &self,
        py: Python<'_>,
        servers: Vec<String>,
        timeout: f64,
        attempts: u32,
        rotate: bool,
        use_tcp: bool,
    ) -> PyResult<u64> {
        let server = |text: String| {
            text.parse()
                .map_err(|_| config_error(py, format!("{text:?} is not the address of a name server")))
        };
        let servers = servers.into_iter().map(server).collect::<PyResult<_>>()?;
        let timeout_ms = (timeout.clamp(0.001, 3600.0) * 1000.0) as u64;
        let attempts = attempts.clamp(1, 100);
        let servers = NameServers { servers, timeout_ms, attempts, rotate, use_tcp };
        self.submit(py, NetworkCommand::SetNameServers { servers })
    }

    /// Answers the question that a rule asked about a flow.
    fn decide(&self, py: Python<'_>, port: u32, ticket: u64, allow: bool) -> PyResult<u64> {
        self.submit(py, NetworkCommand::Decide { port: PortId(port), ticket, allow })
    }

    fn forward_dns(&self, py: Python<'_>, port: u32, ticket: u64, generation: u64) -> PyResult<u64> {
        let verdict = DnsVerdict::Forward;
        self.submit(py, NetworkCommand::DnsVerdict { port: PortId(port), ticket, generation, verdict })
    }

    #[pyo3(signature = (port, ticket, generation, rcode, answers, authority, searched=None, target=None))]
    #[allow(clippy::too_many_arguments)] // The parts of an answer.
    fn answer_dns(
        &self,
        py: Python<'_>,
        port: u32,
        ticket: u64,
        generation: u64,
        rcode: u16,
        answers: Vec<DnsRecord>,
        authority: Vec<DnsRecord>,
        searched: Option<Vec<u8>>,
        target: Option<Vec<u8>>,
    ) -> PyResult<u64> {
        let records = |all: Vec<DnsRecord>| {
            let record = |(name, kind, ttl, data): DnsRecord| Record {
                name: name.into(),
                kind,
                ttl,
                data: data.into(),
            };
            all.into_iter().map(record).collect()
        };
        let verdict = DnsVerdict::Own {
            rcode,
            answers: records(answers),
            authority: records(authority),
            searched: searched.map(Vec::into_boxed_slice),
            target: target.map(Vec::into_boxed_slice),
        };
        self.submit(py, NetworkCommand::DnsVerdict { port: PortId(port), ticket, generation, verdict })
    }

    #[pyo3(signature = (forward, proto, guest, fds, *, opened_by_guest=false))]
    fn add_forward(
        &self,
        py: Python<'_>,
        forward: u32,
        proto: &str,
        guest: Pair,
        fds: Vec<RawFd>,
        opened_by_guest: bool,
    ) -> PyResult<u64> {
        let (proto, entry) = (protocol(py, proto)?, entry(opened_by_guest));
        let fds = fds.into_iter().map(|fd| take(py, fd)).collect::<PyResult<_>>()?;
        let (forward, guest) = (ForwardId(forward), socket(guest));
        self.submit(py, Command::AddForward { forward, proto, guest, entry, fds })
    }

    #[pyo3(signature = (fd, *, external, ports=None, mtu=1500))]
    fn attach_tun(
        &self,
        py: Python<'_>,
        fd: RawFd,
        external: Vec<V4>,
        ports: Option<(u16, u16)>,
        mtu: u16,
    ) -> PyResult<u64> {
        let usual = NatEngineConfig::new(Ipv4Addr::UNSPECIFIED);
        let config = NatEngineConfig {
            external: external.into_iter().map(|a| a.0).collect(),
            ports: ports.unwrap_or(usual.ports),
            table_size: self.translated.0,
            sessions_per_endpoint: self.translated.1,
            mtu_outside: mtu,
            mtu_inside: mtu,
            ..usual
        };
        self.submit(py, Command::AttachTun { fd: take(py, fd)?, config: Box::new(config) })
    }

    #[pyo3(signature = (forward, proto, external, guest, *, opened_by_guest=false))]
    fn add_uplink_forward(
        &self,
        py: Python<'_>,
        forward: u32,
        proto: &str,
        external: (V4, u16),
        guest: Pair,
        opened_by_guest: bool,
    ) -> PyResult<u64> {
        let (proto, entry) = (protocol(py, proto)?, entry(opened_by_guest));
        let external = SocketAddrV4::new(external.0.0, external.1);
        let (forward, guest) = (ForwardId(forward), socket(guest));
        self.submit(
            py,
            NetworkCommand::AddUplinkForward { forward, external, spec: ForwardSpec { proto, guest, entry } },
        )
    }

    fn nat_stats(&self, py: Python<'_>) -> PyResult<u64> {
        self.submit(py, NetworkCommand::NatStats)
    }

    fn retarget_forward(&self, py: Python<'_>, forward: u32, guest: Pair) -> PyResult<u64> {
        self.submit(py, NetworkCommand::RetargetForward { forward: ForwardId(forward), guest: socket(guest) })
    }

    fn remove_forward(&self, py: Python<'_>, forward: u32) -> PyResult<u64> {
        self.submit(py, Command::RemoveForward { forward: ForwardId(forward) })
    }

    fn inject(&self, py: Python<'_>, port: u32, frame: &Bound<'_, PyAny>) -> PyResult<u64> {
        let frame = with_bytes(frame, <[u8]>::to_vec)?;
        self.submit(py, Command::Inject { port: PortId(port), frame })
    }

    /// What captures call a port; None forgets it.
    #[pyo3(signature = (port, name))]
    fn name_port(&self, port: u32, name: Option<&str>) {
        self.workers.port_names().set(PortId(port), name);
    }

    #[pyo3(signature = (fd, snaplen=0))]
    fn start_capture(&self, py: Python<'_>, fd: RawFd, snaplen: u32) -> PyResult<u64> {
        self.submit(py, Command::StartCapture { fd: take(py, fd)?, snaplen })
    }

    fn stop_capture(&self, py: Python<'_>) -> PyResult<u64> {
        self.submit(py, WorkerCommand::StopCapture)
    }

    /// Changes the rules. With `isolated` guests open no flows to each other, except those on the ports in `trusted`.
    #[pyo3(signature = (mode, *, isolated=false, trusted=Vec::new()))]
    fn set_policy(&self, py: Python<'_>, mode: &str, isolated: bool, trusted: Vec<u32>) -> PyResult<u64> {
        let trusted = trusted.into_iter().map(PortId).collect();
        let isolated = if isolated { Isolated::AllExcept(Arc::new(trusted)) } else { Isolated::Nobody };
        self.submit(py, NetworkCommand::SetPolicy { mode: config::mode(py, mode)?, isolated })
    }

    /// Puts a policy in force, for one guest or for all that have none of their own; None: no rules.
    fn set_rules(
        &self,
        py: Python<'_>,
        endpoint: Option<u32>,
        table: Option<PyRef<'_, PolicyTable>>,
    ) -> PyResult<u64> {
        let table = table.map(|t| t.table.clone());
        self.submit(py, NetworkCommand::SetRules { port: endpoint.map(PortId), table })
    }

    /// Limits what a guest carries, or all together; None takes the limit back.
    fn set_limit(&self, py: Python<'_>, endpoint: Option<u32>, limit: Option<LimitTuple>) -> PyResult<u64> {
        let limit = limit.map(policy::limit);
        self.submit(py, NetworkCommand::SetLimit { port: endpoint.map(PortId), limit })
    }

    /// Says whether this host has IPv6: guests learn whether a route of IPv6 leads out.
    fn set_upstream6(&self, py: Python<'_>, upstream: bool) -> PyResult<u64> {
        self.submit(py, NetworkCommand::SetUpstream6 { upstream })
    }

    /// Says which addresses this host has, for rules about them.
    fn set_host_addresses(&self, py: Python<'_>, addresses: Vec<IpAddr>) -> PyResult<u64> {
        let addresses = addresses.iter().map(IpAddr::to_canonical).collect();
        self.submit(py, NetworkCommand::SetHostAddresses { addresses: Arc::new(addresses) })
    }

    #[pyo3(signature = (flows, *, denials))]
    fn tell_flows(&self, py: Python<'_>, flows: bool, denials: bool) -> PyResult<u64> {
        self.submit(py, WorkerCommand::EnableFlowEvents { flows, denials })
    }

    fn list_flows(&self, py: Python<'_>) -> PyResult<u64> {
        self.submit(py, NetworkCommand::ListFlows)
    }

    fn port_stats(&self, py: Python<'_>) -> PyResult<u64> {
        self.submit(py, NetworkCommand::PortStats)
    }
}
