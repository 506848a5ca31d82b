//! Theory of operation: the worker as the control side sees it: commands and their answers, end,
//! counters, captures.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::temp_dir::TempDir;
use common::{Net, port_config, tcp_echo, udp_echo};
use guestnet_core::policy::Entry;
use guestnet_core::types::{ForwardId, PortConfig, PortId};
use guestnet_core::{NetworkCommand, NetworkError};
use guestnet_io::{Command, CommandError, Event, ListenKind, Value, WorkerCommand};
use std::net::{SocketAddrV4, UdpSocket};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::time::{Duration, Instant};

#[test]
fn stopping_is_quick_and_may_be_repeated() {
    let net = Net::new();
    let mut g = net.stream_guest(1);
    let mut c = g.connect(4000, tcp_echo()).unwrap();
    g.exchange(&mut c, b"x", 1);
    let start = Instant::now();
    net.workers.stop();
    net.workers.stop();
    assert!(start.elapsed() < common::PATIENCE);
    assert!(!net.workers.is_healthy());
    assert!(net.workers.submit(NetworkCommand::ListFlows).is_err());
}

#[test]
fn a_stop_command_is_acknowledged() {
    let net = Net::new();
    assert_eq!(net.command(WorkerCommand::Stop), Value::None);
    net.workers.stop();
    assert!(!net.workers.is_healthy());
}

#[test]
fn commands_that_cannot_be_done_say_why() {
    let net = Net::new();
    let port = net.add_port(1);
    let no = PortId(7);
    let pair = || UnixStream::pair().unwrap();
    let refused = |c: Command| net.try_command(c).unwrap_err();
    assert_eq!(refused(Command::AddPort { port, config: port_config() }), CommandError::PortExists(port));
    assert!(matches!(
        refused(Command::AddPort { port: PortId(0x8000_0000), config: port_config() }),
        CommandError::Network(NetworkError::NumberInUse(_))
    ));
    assert_eq!(
        refused(Command::RemovePort { port: no }),
        CommandError::Network(NetworkError::NoSuchPort(no))
    );
    assert_eq!(
        refused(Command::AttachMemory { port: no }),
        CommandError::Network(NetworkError::NoSuchPort(no))
    );
    assert!(matches!(
        refused(Command::AttachTap { port, fd: pair().0.into() }),
        CommandError::BadDescriptor(why) if why.contains("TAP")
    ));
    assert!(matches!(
        refused(Command::AttachDgram { port, fd: pair().0.into() }),
        CommandError::BadDescriptor(why) if why.contains("SOCK_DGRAM")
    ));
    net.command(Command::AttachMemory { port });
    assert_eq!(refused(Command::AttachMemory { port }), CommandError::Attached(port));
    assert!(matches!(
        refused(Command::Listen {
            listener: 1,
            kind: ListenKind::Stream,
            fd: pair().0.into(),
            template: port_config()
        }),
        CommandError::BadDescriptor(_)
    ));
    let gateway = common::GATEWAY.into();
    assert_eq!(
        refused(NetworkCommand::BindAddress { port, ip: gateway, mac: None }.into()),
        CommandError::Network(NetworkError::AddressInUse(gateway))
    );
    let config = || PortConfig { addresses: vec![gateway], ..port_config() };
    let other = PortId(port.0 + 1);
    for _ in 0..2 {
        let refused = refused(Command::AddPort { port: other, config: config() });
        assert_eq!(refused, CommandError::Network(NetworkError::AddressInUse(gateway)));
    }
    assert!(matches!(
        refused(Command::AddForward {
            forward: ForwardId(1),
            proto: 6,
            guest: "192.168.64.2:80".parse().unwrap(),
            entry: Entry::Published,
            fds: vec![pair().0.into()]
        }),
        CommandError::BadDescriptor(_)
    ));
    // Nothing of all that is left.
    net.command(Command::RemovePort { port });
    assert_eq!(net.command(NetworkCommand::PortStats), Value::Ports(vec![]));
    assert_eq!(net.command(NetworkCommand::ListFlows), Value::Flows(vec![]));
}

#[test]
fn a_command_queue_without_end_is_refused_and_every_answer_comes() {
    let net = Net::with(|c| {
        c.event_ring = 128;
        c.command_ring = 64;
    });
    // Nobody drains: the worker stops taking commands rather than losing answers.
    let mut taken = Vec::new();
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        match net.workers.submit(NetworkCommand::UnbindAddress { ip: common::HOST.into() }) {
            Ok(n) => taken.push(n),
            Err(_) if taken.len() > 150 => break,
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
        assert!(Instant::now() < end, "{}", taken.len());
    }
    for n in taken {
        net.wait("answer", |e| matches!(e, Event::Done { sequence, .. } if *sequence == n).then_some(()));
    }
}

#[test]
fn flows_and_ports_are_listed() {
    let net = Net::new();
    let mut g = net.stream_guest(1);
    let to = tcp_echo();
    let mut c = g.connect(4000, to).unwrap();
    g.exchange(&mut c, &[1; 1000], 1000);
    let Value::Flows(flows) = net.command(NetworkCommand::ListFlows) else { panic!() };
    let [f] = &flows[..] else { panic!("{flows:?}") };
    assert_eq!((f.port, f.proto, f.inbound), (PortId(1), 6, false));
    assert_eq!((f.bytes_out, f.bytes_in, f.remote), (1000, 1000, std::net::SocketAddr::V4(to)));
    let Value::Ports(ports) = net.command(NetworkCommand::PortStats) else { panic!() };
    let [(p, counters)] = &ports[..] else { panic!("{ports:?}") };
    assert_eq!((p.port, p.mac, p.flows), (PortId(1), Some(g.mac), 1));
    assert!(counters.rx_frames >= 4 && counters.tx_bytes > 1000);
}

#[test]
fn a_peer_that_goes_leaves_the_port_for_another() {
    let net = Net::new();
    let g = net.dgram_guest(1);
    let s = net.stream_guest(2);
    drop(s);
    let (port, _) = net.port_down();
    assert_eq!(port, PortId(2));
    let (ours, theirs) = UnixStream::pair().unwrap();
    net.command(Command::AttachStream { port, fd: theirs.into() });
    let mut s = common::Guest::new(common::StreamLink::new(ours), 2);
    s.gateway();
    drop(g);
    // A datagram socket only tells when something is sent to it.
    s.udp_send(1, std::net::SocketAddrV4::new(std::net::Ipv4Addr::BROADCAST, 9), b"all");
    assert!(net.workers.is_healthy());
}

#[test]
fn capture() {
    let net = Net::new();
    let mut g = net.dgram_guest(1);
    g.gateway();
    let dir = TempDir::new("capture");
    let path = dir.join("capture.pcapng");
    let file = std::fs::File::create(&path).unwrap();
    net.command(Command::StartCapture { fd: file.into(), snaplen: 0 });
    for i in 0..10u8 {
        g.udp_send(5000, udp_echo(), &[i; 300]);
        g.udp_receive(5000);
    }
    net.command(WorkerCommand::StopCapture);
    // Acknowledged means written.
    let bytes = std::fs::read(&path).unwrap();
    let (mut at, mut packets) = (0, 0);
    while at < bytes.len() {
        let word = |o: usize| u32::from_le_bytes(bytes[at + o..at + o + 4].try_into().unwrap());
        packets += u32::from(word(0) == 6);
        at += word(4) as usize;
    }
    assert_eq!((at, packets), (bytes.len(), 20));
    // Without a capture there is nothing to stop.
    net.command(WorkerCommand::StopCapture);
}

#[test]
fn a_capture_that_nobody_reads_stops_nothing() {
    let net = Net::new();
    let mut g = net.stream_guest(1);
    let (a, b) = UnixStream::pair().unwrap();
    net.command(Command::StartCapture { fd: a.into(), snaplen: 0 });
    let mut c = g.connect(4000, tcp_echo()).unwrap();
    let data = common::pattern(8_000_000);
    assert!(g.exchange(&mut c, &data, data.len()) == data);
    net.until("the capture has lost frames", |s| s.io.capture_dropped > 0);
    drop(b);
    let start = Instant::now();
    net.workers.stop();
    assert!(start.elapsed() < common::PATIENCE);
}

#[test]
fn many_connections_at_once() {
    let net = Net::new();
    let mut g = net.stream_guest(1);
    let echo = tcp_echo();
    let mut all: Vec<_> = (0..500u16).map(|i| g.connect(10_000 + i, echo).unwrap()).collect();
    for c in &mut all {
        assert_eq!(g.exchange(c, b"ping", 4), b"ping");
    }
    for c in &mut all {
        g.close(c);
    }
    net.until("all sockets closed", |s| s.io.sockets_open == 0);
}

#[test]
fn a_datagram_socket_whose_peer_is_gone_is_noticed_when_it_is_sent_to() {
    let net = Net::new();
    let port = net.add_port(1);
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    net.command(Command::AttachDgram { port, fd: theirs.into() });
    let mut g = common::Guest::new(ours, 1);
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let at = SocketAddrV4::new(common::HOST, server.local_addr().unwrap().port());
    g.udp_send(5000, at, b"bye");
    let (_, from) = server.recv_from(&mut [0; 8]).unwrap();
    drop(g);
    server.send_to(b"too late", from).unwrap();
    assert_eq!(net.port_down().0, port);
}
