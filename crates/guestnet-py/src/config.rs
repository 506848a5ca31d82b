//! Theory of operation: what Python decides about a worker, by name. `guestnet.model.spec` has checked the values
//! with sentences for people; what is checked here keeps a wrong call from becoming a wrong network.

use crate::addresses;
use crate::errors::config_error;
use guestnet_core::config::{Filtering, Limits, NetworkConfig, Timeouts};
use guestnet_core::policy::Isolated;
use guestnet_core::types::NetMode;
use guestnet_io::{CREDENTIAL_MAX, ListenKind, PollingStrategy, Proxy, ProxyProtocol, Source, error_text};
use pyo3::prelude::*;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

/// Values by the names of the fields of [`Limits`] or [`Timeouts`].
pub type Named = HashMap<String, u32>;

fn unknown(py: Python<'_>, what: &str, name: &str) -> PyErr {
    config_error(py, format!("there is no {what} {name:?}"))
}

pub fn mode(py: Python<'_>, name: &str) -> PyResult<NetMode> {
    match name {
        "nat" => Ok(NetMode::Nat),
        "host_only" => Ok(NetMode::HostOnly),
        "bridged" => Ok(NetMode::Bridged),
        _ => Err(unknown(py, "mode", name)),
    }
}

pub fn strategy(py: Python<'_>, name: &str) -> PyResult<PollingStrategy> {
    match name {
        "busy" => Ok(PollingStrategy::Busy),
        "adaptive" => Ok(PollingStrategy::Adaptive),
        "event_driven" => Ok(PollingStrategy::EventDriven),
        _ => Err(unknown(py, "polling strategy", name)),
    }
}

/// An address or an interface of the host, which must be there.
pub fn source(py: Python<'_>, text: Option<&str>) -> PyResult<Source> {
    let Some(text) = text else { return Ok(Source::Routed) };
    let (source, what) = match text.parse() {
        Ok(ip) => (Source::Address(ip), "an address"),
        Err(_) => (Source::Interface(text.into()), "an interface"),
    };
    source.check().map_err(|e| {
        let why = error_text(&e);
        let remedy = "choose one that `ip address` lists";
        config_error(py, format!("`source` {text} is not {what} of this host ({why}): {remedy}."))
    })?;
    Ok(source)
}

/// Protocol, address, port, user name and password. Empty names and passwords are none.
pub type ProxyIn = (String, IpAddr, u16, Vec<u8>, Vec<u8>);

/// A proxy; whether there is one is not known before it is used.
pub fn proxy(py: Python<'_>, (protocol, ip, port, user, password): ProxyIn) -> PyResult<Arc<Proxy>> {
    let protocol = match protocol.as_str() {
        "socks5" => ProxyProtocol::Socks5,
        "http" => ProxyProtocol::Http,
        _ => return Err(unknown(py, "kind of proxy", &protocol)),
    };
    if user.len() > CREDENTIAL_MAX || password.len() > CREDENTIAL_MAX {
        return Err(config_error(py, format!("credentials are longer than {CREDENTIAL_MAX} bytes")));
    }
    let credentials = (!user.is_empty()).then(|| (user.into(), password.into()));
    Ok(Arc::new(Proxy { address: SocketAddr::new(ip, port), protocol, credentials }))
}

pub fn listen_kind(py: Python<'_>, name: &str) -> PyResult<ListenKind> {
    match name {
        "stream" => Ok(ListenKind::Stream),
        "dgram" => Ok(ListenKind::Dgram),
        "unixgram" => Ok(ListenKind::Unixgram),
        "vhost-user" => Ok(ListenKind::VhostUser),
        _ => Err(unknown(py, "kind of listener", name)),
    }
}

fn filtering(py: Python<'_>, name: &str) -> PyResult<Filtering> {
    match name {
        "endpoint_independent" => Ok(Filtering::EndpointIndependent),
        "address_dependent" => Ok(Filtering::AddressDependent),
        "address_and_port_dependent" => Ok(Filtering::AddressAndPortDependent),
        _ => Err(unknown(py, "filtering", name)),
    }
}

fn limits(py: Python<'_>, values: &Named) -> PyResult<Limits> {
    let mut l = Limits::default();
    for (name, &value) in values {
        match name.as_str() {
            "flows" => l.flows = value,
            "flows_per_port" => l.flows_per_port = value,
            "udp_sockets_per_port" => l.udp_sockets_per_port = value,
            "buffer_per_port" => l.buffer_per_port = value as usize,
            "socket_memory" => l.socket_memory = value as usize,
            "macs_per_port" => l.macs_per_port = value,
            "addresses_per_port" => l.addresses_per_port = value,
            "reassemblies_per_port" => l.reassemblies_per_port = value,
            "reassembly_bytes" => l.reassembly_bytes = value as usize,
            "icmp_errors_per_second" => l.icmp_errors_per_second = value,
            "floods_per_second" => l.floods_per_second = value,
            "service_datagrams_per_second" => l.service_datagrams_per_second = value,
            "neighbour_waiting" => l.neighbour_waiting = value,
            "name_bytes" => l.name_bytes = value as usize,
            "dns_queries" => l.dns_queries = value,
            "dns_queries_per_port" => l.dns_queries_per_port = value,
            "dns_connections" => l.dns_connections = value,
            _ => return Err(unknown(py, "limit", name)),
        }
    }
    Ok(l)
}

fn timeouts(py: Python<'_>, values: &Named) -> PyResult<Timeouts> {
    let mut t = Timeouts::default();
    for (name, &value) in values {
        match name.as_str() {
            "udp" => t.udp = value,
            "udp_dns" => t.udp_dns = value,
            "icmp" => t.icmp = value,
            "tcp_established" => t.tcp_established = value,
            "tcp_transitory" => t.tcp_transitory = value,
            "reassembly" => t.reassembly = value,
            _ => return Err(unknown(py, "timeout", name)),
        }
    }
    Ok(t)
}

/// What a Network is.
#[allow(clippy::too_many_arguments)] // One for each argument in Python.
pub fn core(
    py: Python<'_>,
    mode_name: &str,
    gateway: IpAddr,
    prefix: u8,
    gateway_mac: &[u8],
    secret: &[u8],
    host_loopback: Option<IpAddr>,
    isolated: bool,
    reserved: &[(IpAddr, Vec<u8>)],
    filtering_name: &str,
    limit_values: &Named,
    timeout_values: &Named,
) -> PyResult<NetworkConfig> {
    if !(8..=30).contains(&prefix) {
        return Err(config_error(py, format!("the prefix length {prefix} is not 8 to 30")));
    }
    let secret = <[u8; 32]>::try_from(secret)
        .map_err(|_| config_error(py, format!("the secret has 32 bytes, not {}", secret.len())))?;
    let mac = addresses::mac(py, gateway_mac)?;
    if !mac.is_unicast() {
        return Err(config_error(py, format!("the gateway's MAC {mac} is not one station's")));
    }
    let IpAddr::V4(gateway) = gateway else {
        return Err(config_error(py, format!("the gateway {gateway} is not an IPv4 address")));
    };
    let subnet = Ipv4Addr::from_bits(gateway.to_bits() & (u32::MAX << (32 - prefix)));
    let mut config = NetworkConfig::new(mac, gateway, (subnet, prefix), secret);
    config.mode = mode(py, mode_name)?;
    config.host_loopback = host_loopback;
    config.isolated = if isolated { Isolated::AllExcept(Arc::default()) } else { Isolated::Nobody };
    for (address, owner) in reserved {
        config.reserved.insert(*address, addresses::mac(py, owner)?);
    }
    config.filtering = filtering(py, filtering_name)?;
    config.limits = limits(py, limit_values)?;
    config.timeouts = timeouts(py, timeout_values)?;
    Ok(config)
}
