//! Theory of operation: the NAT engine as an object behind a lock. A result is one byte: its kind, or 16 and the
//! number of the reason for a drop; `guestnet.nat.engine` makes words of it. Batches run detached from the
//! interpreter, on the buffers themselves. A fork waits for those that run: a lock that one of them held would
//! stay locked in the child, where its thread does not exist.

use crate::addresses::{self, V4};
use crate::buffers::Foreign;
use crate::errors::{config_error, nat_error};
use crate::numbers::Fits;
use crate::pool::{PacketPool, lock};
use guestnet_core::nat::{
    self, Behaviour, NatDirection, NatEngineConfig, NatResult, NatTimeouts, PacketBatch, Prefix, Refusal,
};
use guestnet_core::stats::DropReason;
use guestnet_core::types::Time;
use guestnet_wire::{ether, proto};
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};
use std::collections::HashMap;
use std::net::SocketAddrV4;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// From here on a result is a drop.
const DROPPED: u8 = 16;

fn code(r: NatResult) -> u8 {
    match r {
        NatResult::Translated => 0,
        NatResult::Hairpinned => 1,
        // Only engines of a network ask about new sessions.
        NatResult::PassThrough | NatResult::New => 2,
        NatResult::Held => 3,
        NatResult::Fragmented => 4,
        NatResult::TooBig(_) => 5,
        NatResult::Dropped(why) => DROPPED + why as u8,
    }
}

fn direction(outbound: bool) -> NatDirection {
    if outbound { NatDirection::Outbound } else { NatDirection::Inbound }
}

fn behaviour(py: Python<'_>, name: &str) -> PyResult<Behaviour> {
    match name {
        "endpoint_independent" => Ok(Behaviour::EndpointIndependent),
        "address_dependent" => Ok(Behaviour::AddressDependent),
        "address_and_port_dependent" => Ok(Behaviour::AddressAndPortDependent),
        _ => Err(config_error(py, format!("There is no mapping or filtering behaviour {name:?}."))),
    }
}

fn prefix(py: Python<'_>, (V4(address), len): (V4, u8)) -> PyResult<Prefix> {
    Prefix::new(address, len).ok_or_else(|| config_error(py, format!("{address}/{len} is not a network.")))
}

fn timeouts(py: Python<'_>, values: &HashMap<String, u32>) -> PyResult<NatTimeouts> {
    let mut t = NatTimeouts::default();
    for (name, value) in values {
        let field = match name.as_str() {
            "udp" => &mut t.udp,
            "udp_dns" => &mut t.udp_dns,
            "icmp" => &mut t.icmp,
            "tcp_established" => &mut t.tcp_established,
            "tcp_opening" => &mut t.tcp_opening,
            "tcp_closing" => &mut t.tcp_closing,
            "other" => &mut t.other,
            "fragment" => &mut t.fragment,
            "port_hold" => &mut t.port_hold,
            "unsolicited_syn" => &mut t.unsolicited_syn,
            _ => return Err(config_error(py, format!("There is no timeout {name:?}."))),
        };
        *field = *value;
    }
    Ok(t)
}

/// The names of the reasons for drops, by number.
#[pyfunction]
pub fn drop_reasons() -> Vec<&'static str> {
    DropReason::ALL.iter().map(|d| d.name()).collect()
}

/// Work on engines that is done detached now.
static DETACHED: AtomicU32 = AtomicU32::new(0);
/// Forks that have begun and not ended.
static FORKS: AtomicU32 = AtomicU32::new(0);
const FORK_PAUSE: Duration = Duration::from_micros(20);

/// Work on an engine that is done detached; none begins while a fork is under way. Not to be made or waited for by who
/// has the interpreter: the fork has it.
struct Detached;

impl Detached {
    fn begin() -> Detached {
        loop {
            DETACHED.fetch_add(1, Ordering::SeqCst);
            if FORKS.load(Ordering::SeqCst) == 0 {
                return Detached;
            }
            DETACHED.fetch_sub(1, Ordering::SeqCst);
            while FORKS.load(Ordering::SeqCst) != 0 {
                std::thread::sleep(FORK_PAUSE);
            }
        }
    }
}

impl std::ops::Drop for Detached {
    fn drop(&mut self) {
        DETACHED.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Waits until no engine is in use by another thread, and keeps it so until the fork is over.
#[pyfunction]
pub fn before_fork() {
    FORKS.fetch_add(1, Ordering::SeqCst);
    while DETACHED.load(Ordering::SeqCst) != 0 {
        std::thread::sleep(FORK_PAUSE);
    }
}

/// The end of a fork in the process that did it.
#[pyfunction]
pub fn after_fork_in_parent() {
    FORKS.fetch_sub(1, Ordering::SeqCst);
}

/// The end of a fork in the new process, which has none of the other threads.
#[pyfunction]
pub fn after_fork_in_child() {
    DETACHED.store(0, Ordering::SeqCst);
    FORKS.store(0, Ordering::SeqCst);
}

/// In-place NAT with connection tracking.
#[pyclass(frozen, module = "guestnet._native")]
pub struct NatEngine {
    inner: Mutex<nat::NatEngine>,
}

/// Packets of a pool, by index.
struct Pooled<'a> {
    buffers: Vec<guestnet_io::memory::pool::PoolBuffer<'a>>,
}

impl PacketBatch for Pooled<'_> {
    fn len(&self) -> usize {
        self.buffers.len()
    }
    #[inline(always)]
    fn packet(&mut self, i: usize) -> &mut [u8] {
        match self.buffers.get_mut(i) {
            Some(b) => b,
            None => &mut [],
        }
    }
}

impl NatEngine {
    fn batch<B: PacketBatch + Send>(
        &self,
        py: Python<'_>,
        mut packets: B,
        outbound: bool,
        now: u64,
    ) -> Vec<u8> {
        py.detach(|| {
            let _working = Detached::begin();
            let mut engine = lock(&self.inner);
            let mut codes = Vec::with_capacity(packets.len());
            // In steps, so that the results in between stay in the cache.
            let mut results = [NatResult::PassThrough; 512];
            let mut from = 0;
            while from < packets.len() {
                let n = results.len().min(packets.len() - from);
                let mut part = Part { all: &mut packets, from, len: n };
                engine.translate_batch(&mut part, direction(outbound), Time(now), &mut results[..n]);
                codes.extend(results[..n].iter().map(|r| code(*r)));
                from += n;
            }
            codes
        })
    }
}

/// Some of the packets of a batch.
struct Part<'a, B: ?Sized> {
    all: &'a mut B,
    from: usize,
    len: usize,
}

impl<B: PacketBatch + ?Sized> PacketBatch for Part<'_, B> {
    fn len(&self) -> usize {
        self.len
    }
    #[inline(always)]
    fn packet(&mut self, i: usize) -> &mut [u8] {
        self.all.packet(self.from + i)
    }
}

/// Numbers from a buffer of unsigned 32-bit integers, or from any sequence.
fn numbers(py: Python<'_>, object: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    match PyBuffer::<u32>::get(object) {
        Ok(b) => b.to_vec(py),
        Err(_) => Ok(object.extract::<Fits<Vec<u32>>>()?.0),
    }
}

#[pymethods]
#[allow(clippy::too_many_arguments)] // Keywords in Python.
impl NatEngine {
    #[new]
    #[pyo3(signature = (*, external, internal, secret, gateway=None, ports=(49152, 65535), table_size=65536,
        prefault=false, timeouts=HashMap::new(), mapping_udp="endpoint_independent",
        mapping_tcp="endpoint_independent", filtering_udp="address_dependent",
        filtering_tcp="address_dependent", port_preservation=true, port_parity=true, inbound_refresh=true,
        tcp_pickup=true, hairpin=true, decrement_ttl=true, mtu_outside=65535, mtu_inside=65535,
        ports_per_endpoint=65536, sessions_per_endpoint=u32::MAX, no_nat=Vec::new(), denied=Vec::new(),
        refusal="prohibited", answer_unsolicited_syn=true, icmp_errors_per_second=100, fragment_sets=1024,
        fragment_bytes=1 << 20, output_bytes=1 << 20))]
    fn new(
        py: Python<'_>,
        external: Vec<V4>,
        internal: (V4, u8),
        secret: &[u8],
        gateway: Option<V4>,
        ports: (u16, u16),
        table_size: usize,
        prefault: bool,
        timeouts: HashMap<String, u32>,
        mapping_udp: &str,
        mapping_tcp: &str,
        filtering_udp: &str,
        filtering_tcp: &str,
        port_preservation: bool,
        port_parity: bool,
        inbound_refresh: bool,
        tcp_pickup: bool,
        hairpin: bool,
        decrement_ttl: bool,
        mtu_outside: u16,
        mtu_inside: u16,
        ports_per_endpoint: u32,
        sessions_per_endpoint: u32,
        no_nat: Vec<(V4, u8)>,
        denied: Vec<(V4, u8)>,
        refusal: &str,
        answer_unsolicited_syn: bool,
        icmp_errors_per_second: u32,
        fragment_sets: usize,
        fragment_bytes: usize,
        output_bytes: usize,
    ) -> PyResult<Self> {
        let prefixes =
            |list: Vec<(V4, u8)>| list.into_iter().map(|p| prefix(py, p)).collect::<PyResult<Vec<_>>>();
        let config = NatEngineConfig {
            external: external.into_iter().map(|a| a.0).collect(),
            internal: prefix(py, internal)?,
            gateway: gateway.map(|a| a.0),
            ports,
            table_size,
            timeouts: self::timeouts(py, &timeouts)?,
            mapping_udp: behaviour(py, mapping_udp)?,
            mapping_tcp: behaviour(py, mapping_tcp)?,
            filtering_udp: behaviour(py, filtering_udp)?,
            filtering_tcp: behaviour(py, filtering_tcp)?,
            port_preservation,
            port_parity,
            inbound_refresh,
            tcp_pickup,
            hairpin,
            decrement_ttl,
            mtu_outside,
            mtu_inside,
            ports_per_endpoint,
            sessions_per_endpoint,
            shares: false,
            no_nat: prefixes(no_nat)?,
            denied: prefixes(denied)?,
            refusal: match refusal {
                "prohibited" => Refusal::Prohibited,
                "host_unreachable" => Refusal::HostUnreachable,
                "silent" => Refusal::Silent,
                _ => return Err(config_error(py, format!("There is no refusal {refusal:?}."))),
            },
            answer_unsolicited_syn,
            icmp_errors_per_second,
            fragment_sets,
            fragment_bytes,
            output_bytes,
            secret: secret.try_into().map_err(|_| config_error(py, "The secret is not 32 bytes.".into()))?,
        };
        let engine = py
            .detach(|| {
                let mut engine = nat::NatEngine::new(config)?;
                guestnet_io::os::hugepages::advise(&engine.memory_ranges());
                if prefault {
                    engine.prefault();
                }
                Ok::<_, nat::NatConfigError>(engine)
            })
            .map_err(|e| config_error(py, format!("{e}.")))?;
        Ok(NatEngine { inner: Mutex::new(engine) })
    }

    /// Translates one packet in place.
    #[pyo3(signature = (packet, outbound, now, offset=Fits(0)))]
    fn translate(
        &self,
        packet: &Bound<'_, PyAny>,
        outbound: bool,
        now: Fits<u64>,
        offset: Fits<usize>,
    ) -> PyResult<u8> {
        let mut one = Foreign::each(1, std::iter::once(packet.clone()))?;
        let result =
            lock(&self.inner).translate_at(one.packet(0), offset.0, direction(outbound), Time(now.0));
        Ok(code(result))
    }

    /// Translates the IPv4 packet of an Ethernet frame in place; other frames are none of the engine's business.
    /// Returns the result, and the length of the frame in bytes.
    fn translate_frame(
        &self,
        frame: &Bound<'_, PyAny>,
        outbound: bool,
        now: Fits<u64>,
    ) -> PyResult<(u8, usize)> {
        let mut one = Foreign::each(1, std::iter::once(frame.clone()))?;
        let bytes = one.packet(0);
        let length = bytes.len();
        let result = match ether::Ether::parse(bytes) {
            Ok(e) if e.ethertype != ether::IPV4 => NatResult::PassThrough,
            _ => lock(&self.inner).translate_at(bytes, ether::HEADER_LEN, direction(outbound), Time(now.0)),
        };
        Ok((code(result), length))
    }

    /// Translates packets of one buffer in place; `lengths` defaults to "up to the next".
    #[pyo3(signature = (buffer, offsets, lengths, outbound, now))]
    fn translate_spans<'py>(
        &self,
        py: Python<'py>,
        buffer: &Bound<'py, PyAny>,
        offsets: &Bound<'py, PyAny>,
        lengths: Option<&Bound<'py, PyAny>>,
        outbound: bool,
        now: Fits<u64>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let offsets = numbers(py, offsets)?;
        let mut packets = Foreign::each(1, std::iter::once(buffer.clone()))?;
        match lengths {
            Some(lengths) => {
                let lengths = numbers(py, lengths)?;
                if lengths.len() != offsets.len() {
                    return Err(config_error(py, "There are not as many lengths as offsets.".into()));
                }
                packets.cut(offsets.into_iter().zip(lengths));
            }
            None => {
                let end = packets.packet(0).len().min(u32::MAX as usize) as u32;
                let ends = offsets.iter().copied().skip(1).chain([end]);
                packets.cut(offsets.iter().copied().zip(ends).map(|(a, b)| (a, b.saturating_sub(a))));
            }
        }
        Ok(PyBytes::new(py, &self.batch(py, packets, outbound, now.0)))
    }

    /// Translates packets that are a buffer each.
    fn translate_each<'py>(
        &self,
        py: Python<'py>,
        packets: &Bound<'py, PyList>,
        outbound: bool,
        now: Fits<u64>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let packets = Foreign::each(packets.len(), packets.iter())?;
        Ok(PyBytes::new(py, &self.batch(py, packets, outbound, now.0)))
    }

    /// Translates packets of a pool, by index.
    fn translate_pool<'py>(
        &self,
        py: Python<'py>,
        pool: &Bound<'py, PacketPool>,
        indices: &Bound<'py, PyAny>,
        outbound: bool,
        now: Fits<u64>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let pool = &pool.get().inner;
        let buffers = numbers(py, indices)?
            .into_iter()
            .map(|i| pool.borrow(i))
            .collect::<Result<_, _>>()
            .map_err(|e| config_error(py, format!("{e}.")))?;
        Ok(PyBytes::new(py, &self.batch(py, Pooled { buffers }, outbound, now.0)))
    }

    /// The next packet that the engine itself sends: whether it goes out, and its bytes.
    fn poll_output<'py>(&self, py: Python<'py>) -> Option<(bool, Bound<'py, PyBytes>)> {
        let (way, packet) = lock(&self.inner).poll_output()?;
        Some((way == NatDirection::Outbound, PyBytes::new(py, &packet)))
    }

    /// Expiry work for up to `visits` records; returns how many connections ended.
    fn expire(&self, py: Python<'_>, now: Fits<u64>, visits: Fits<usize>) -> usize {
        py.detach(|| {
            let _working = Detached::begin();
            lock(&self.inner).expire(Time(now.0), visits.0)
        })
    }

    /// When there is expiry work next, in nanoseconds.
    fn next_timer(&self) -> Option<u64> {
        lock(&self.inner).next_timer().map(|t| t.0)
    }

    /// Publishes a port.
    fn add_forward(
        &self,
        py: Python<'_>,
        protocol: &str,
        external: (V4, u16),
        internal: (V4, u16),
    ) -> PyResult<()> {
        let (external, internal) = (socket4(external), socket4(internal));
        lock(&self.inner)
            .add_forward(protocol_number(py, protocol)?, external, internal)
            .map_err(|e| nat_error(py, e))
    }

    /// Takes a published port back; False when it was not published.
    fn remove_forward(&self, py: Python<'_>, protocol: &str, external: (V4, u16)) -> PyResult<bool> {
        Ok(lock(&self.inner).remove_forward(protocol_number(py, protocol)?, socket4(external)))
    }

    /// Connections tracked now.
    #[getter]
    fn connection_count(&self) -> usize {
        lock(&self.inner).connection_count()
    }

    /// Counters since the engine was made.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let s = lock(&self.inner).stats();
        stats(py, &s)
    }

    /// What the engine holds now.
    fn conntrack_stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let s = lock(&self.inner).conntrack_stats();
        conntrack_stats(py, &s)
    }

    /// The live connections: protocol, state, internal, external and remote end, bytes out and in.
    #[allow(clippy::type_complexity)]
    fn connections(
        &self,
    ) -> Vec<(u8, &'static str, addresses::Pair, addresses::Pair, addresses::Pair, u64, u64)> {
        let at = |a: SocketAddrV4| addresses::pair(a.into());
        lock(&self.inner)
            .connections()
            .map(|c| {
                let ends = (at(c.internal), at(c.external), at(c.remote));
                (c.proto, c.state.name(), ends.0, ends.1, ends.2, c.bytes_out, c.bytes_in)
            })
            .collect()
    }
}

fn socket4((V4(ip), port): (V4, u16)) -> SocketAddrV4 {
    SocketAddrV4::new(ip, port)
}

fn protocol_number(py: Python<'_>, name: &str) -> PyResult<u8> {
    match name {
        "tcp" => Ok(proto::TCP),
        "udp" => Ok(proto::UDP),
        _ => Err(config_error(py, format!("There is no protocol {name:?} to publish: \"tcp\" or \"udp\"."))),
    }
}

/// Counters of an engine, by name.
pub fn stats<'py>(py: Python<'py>, s: &nat::NatStats) -> PyResult<Bound<'py, PyDict>> {
    let d = PyDict::new(py);
    for (name, value) in [
        ("outbound", s.outbound),
        ("inbound", s.inbound),
        ("hairpinned", s.hairpinned),
        ("passed", s.passed),
        ("fragmented", s.fragmented),
        ("held", s.held),
        ("too_big", s.too_big),
        ("icmp_errors", s.icmp_errors),
    ] {
        d.set_item(name, value)?;
    }
    let drops = PyDict::new(py);
    for (why, count) in DropReason::ALL.iter().zip(s.drops) {
        drops.set_item(why.name(), count)?;
    }
    d.set_item("drops", drops)?;
    Ok(d)
}

/// What an engine holds, by name.
pub fn conntrack_stats<'py>(py: Python<'py>, s: &nat::ConnTrackStats) -> PyResult<Bound<'py, PyDict>> {
    let d = PyDict::new(py);
    for (name, value) in [
        ("connections", s.connections as u64),
        ("mappings", s.mappings as u64),
        ("ports", s.ports),
        ("capacity", s.capacity as u64),
        ("memory", s.memory as u64),
        ("created", s.created),
        ("expired", s.expired),
        ("hits", s.hits),
        ("misses", s.misses),
    ] {
        d.set_item(name, value)?;
    }
    Ok(d)
}
