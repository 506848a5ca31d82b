//! Theory of operation: the data plane alone, with no Python: one guest on a TAP device whose descriptor is
//! inherited, and nothing but NAT. For measuring and debugging. The guest configures itself as
//! 192.168.64.2/24 with the gateway 192.168.64.1; counters are printed when stdin ends. `MTU` and `SPINS` (most
//! polls before it sleeps) in the environment are the rest of its settings.
//!
//! `tap FD [dgram:FD] [HOST_PORT:GUEST_PORT/tcp|udp]...`; `dgram:FD` is a second guest, 192.168.64.3, on a
//! socket of one frame per datagram.
#![allow(unsafe_code)]

use guestnet_core::config::NetworkConfig;
use guestnet_core::policy::Entry;
use guestnet_core::types::{ForwardId, PortConfig, PortId};
use guestnet_io::{Command, WorkerConfig, spawn};
use guestnet_wire::ether::Mac;
use guestnet_wire::proto;
use std::error::Error;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{FromRawFd, OwnedFd};

fn forward(number: u32, spec: &str) -> Result<Command, Box<dyn Error>> {
    let (ports, proto) = spec.split_once('/').ok_or("a forward is HOST_PORT:GUEST_PORT/tcp|udp")?;
    let (host, guest) = ports.split_once(':').ok_or("a forward is HOST_PORT:GUEST_PORT/tcp|udp")?;
    let host = (Ipv4Addr::UNSPECIFIED, host.parse::<u16>()?);
    let (proto, fd): (u8, OwnedFd) = if proto == "udp" {
        (proto::UDP, UdpSocket::bind(host)?.into())
    } else {
        (proto::TCP, TcpListener::bind(host)?.into())
    };
    let guest = SocketAddr::from(([192, 168, 64, 2], guest.parse::<u16>()?));
    Ok(Command::AddForward {
        forward: ForwardId(number),
        proto,
        guest,
        entry: Entry::Published,
        fds: vec![fd],
    })
}

/// The descriptor that `text` names.
fn inherited(text: &str) -> Result<OwnedFd, Box<dyn Error>> {
    let fd: i32 = text.parse()?;
    // SAFETY: the caller hands over the descriptor that it names, and nobody else in this process knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn config(last: u8) -> Result<PortConfig, Box<dyn Error>> {
    let mtu = std::env::var("MTU").map_or(Ok(1500), |m| m.parse())?;
    let addresses = vec![Ipv4Addr::new(192, 168, 64, last).into()];
    Ok(PortConfig { mac: None, addresses, mtu, gso_max: 65_000, lax_offload: false, uplink: false })
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let tap = inherited(&args.next().ok_or("tap FD [dgram:FD] [FORWARD]...")?)?;
    let gateway = Ipv4Addr::new(192, 168, 64, 1);
    let mac = Mac([0x52, 0x94, 0xef, 0, 0, 1]);
    let core = NetworkConfig::new(mac, gateway, (Ipv4Addr::new(192, 168, 64, 0), 24), [7; 32]);
    let mut worker = WorkerConfig::new(core);
    worker.max_spins = std::env::var("SPINS").map_or(Ok(worker.max_spins), |n| n.parse())?;
    worker.batch_size = std::env::var("BATCH").map_or(Ok(worker.batch_size), |n| n.parse())?;
    let worker = spawn(worker)?;
    worker.submit(Command::AddPort { port: PortId(1), config: config(2)? })?;
    worker.submit(Command::AttachTap { port: PortId(1), fd: tap })?;
    for (number, spec) in args.enumerate() {
        if let Some(fd) = spec.strip_prefix("dgram:") {
            worker.submit(Command::AddPort { port: PortId(2), config: config(3)? })?;
            worker.submit(Command::AttachDgram { port: PortId(2), fd: inherited(fd)? })?;
        } else {
            worker.submit(forward(number as u32 + 1, &spec)?)?;
        }
    }
    println!("ready");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    for event in worker.drain(10_000) {
        eprintln!("{event:?}");
    }
    println!("{:#?}", worker.stats());
    worker.stop();
    Ok(())
}
