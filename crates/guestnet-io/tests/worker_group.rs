//! Theory of operation: several workers of one network. Guests are placed in turn, so the first is on worker 0,
//! the second on worker 1 and so on; what they send each other crosses the rings between workers.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::temp_dir::TempDir;
use common::{Guest, Link, Net, PATIENCE, StreamLink, port_config, tcp_echo, udp_echo};
use guestnet_core::policy::Entry;
use guestnet_core::stats::DropReason;
use guestnet_core::types::{ForwardId, PortId};
use guestnet_core::{NetworkCommand, NetworkError};
use guestnet_io::{Command, CommandError, ListenKind, PollingStrategy, Value, WorkerCommand};
use guestnet_wire::ether::Mac;
use guestnet_wire::proto;
use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

fn net(workers: usize) -> Net {
    Net::with(|c| c.workers = workers)
}

/// Waits until the counters, which are published a moment later, say so.
fn until(net: &Net, what: &str, done: impl Fn(&Net) -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done(net) {
        assert!(Instant::now() < end, "not {what}: {:?}", net.workers.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn drops(net: &Net, why: DropReason) -> u64 {
    net.workers.stats().core.drops[why as usize]
}

fn at<L: Link>(g: &Guest<L>, port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(g.ip, port)
}

/// One datagram from `a` to `b`, straight through the switch.
fn reach<L: Link, M: Link>(a: &mut Guest<L>, b: &mut Guest<M>, text: &[u8]) {
    a.udp_send_to(b.mac, 7000, at(b, 7001), text);
    let got = b.udp_receive(7001);
    assert_eq!((got.src, &got.payload[..]), (SocketAddr::V4(at(a, 7000)), text));
}

/// Sends something, so that the network knows the guest.
fn hello<L: Link>(g: &mut Guest<L>) {
    g.gateway();
}

#[test]
fn guests_of_two_workers_reach_each_other_and_the_outside() {
    for strategy in [PollingStrategy::Adaptive, PollingStrategy::EventDriven, PollingStrategy::Busy] {
        let net = Net::with(|c| {
            c.workers = 2;
            c.strategy = strategy;
        });
        let (mut a, mut b) = (net.stream_guest(1), net.dgram_guest(2));
        hello(&mut a);
        hello(&mut b);
        for i in 0..50u32 {
            reach(&mut a, &mut b, &i.to_be_bytes());
            reach(&mut b, &mut a, &i.to_le_bytes());
        }
        for g in [0, 1] {
            until(&net, "both have worked", |n| n.workers.stats_of_each()[g].core.rx_frames >= 50);
        }
        // A frame is counted where it comes in and where it goes out, once each.
        let sum = net.workers.stats().core;
        assert!(sum.tx_frames >= 100 && sum.tx_frames < 110, "{sum:?}");
        let (udp, tcp) = (udp_echo(), tcp_echo());
        a.udp_send(5000, udp, b"x");
        a.udp_receive(5000);
        b.udp_send(5000, udp, b"y");
        b.udp_receive(5000);
        let mut ca = a.connect(4000, tcp).unwrap();
        let mut cb = b.connect(4000, tcp).unwrap();
        a.exchange(&mut ca, &[1; 1000], 1000);
        b.exchange(&mut cb, &[2; 1000], 1000);
        let Value::Flows(flows) = net.command(NetworkCommand::ListFlows) else { panic!() };
        let ids: HashSet<_> = flows.iter().map(|f| f.flow).collect();
        let ports: HashSet<_> = flows.iter().map(|f| f.port).collect();
        assert_eq!((flows.len(), ids.len(), ports.len()), (4, 4, 2));
    }
}

#[test]
fn order_is_kept_and_nothing_is_lost_below_the_ring() {
    let net = net(2);
    let (mut a, mut b) = (net.stream_guest(1), net.stream_guest(2));
    hello(&mut a);
    hello(&mut b);
    let mut next = 0u32;
    for _ in 0..20 {
        for i in 0..200u32 {
            a.udp_send_to(b.mac, 7000, at(&b, 7001), &(next + i).to_be_bytes());
        }
        for _ in 0..200 {
            assert_eq!(b.udp_receive(7001).payload, next.to_be_bytes());
            next += 1;
        }
    }
}

#[test]
fn floods_reach_each_guest_once() {
    let net = net(3);
    let mut guests: Vec<_> = (1..=5).map(|n| net.dgram_guest(n)).collect();
    guests.iter_mut().for_each(hello);
    let (first, others) = guests.split_at_mut(1);
    let to = SocketAddrV4::new("192.168.64.255".parse().unwrap(), 9);
    let frame = first[0].udp_frame(Mac::BROADCAST, 9, to, b"all");
    Link::send(&mut first[0].link, &frame);
    for g in others.iter_mut() {
        let copies = std::iter::from_fn(|| Link::receive(&mut g.link, Duration::from_millis(100)));
        assert_eq!(copies.filter(|f| *f == frame).count(), 1);
    }
    assert!(std::iter::from_fn(|| Link::receive(&mut first[0].link, Duration::ZERO)).all(|f| f != frame));
}

#[test]
fn nobody_is_another_workers_guest() {
    let net = net(2);
    let (mut a, mut b) = (net.stream_guest(1), net.stream_guest(2));
    hello(&mut a);
    hello(&mut b);
    reach(&mut a, &mut b, b"x");
    let mine = b.mac;
    b.mac = a.mac;
    b.udp_send_to(a.mac, 1, at(&a, 2), b"with its MAC");
    until(&net, "its MAC refused", |n| drops(n, DropReason::SpoofedMac) == 1);
    (b.mac, b.ip) = (mine, a.ip);
    b.udp_send_to(a.mac, 1, at(&a, 2), b"with its address");
    until(&net, "its address refused", |n| drops(n, DropReason::SpoofedSource) == 1);
    // What the control side has assigned is known everywhere as well.
    let ip = "192.168.64.77".parse().unwrap();
    net.command(NetworkCommand::BindAddress { port: PortId(1), ip, mac: None });
    b.ip = "192.168.64.77".parse().unwrap();
    let end = Instant::now() + PATIENCE;
    while drops(&net, DropReason::SpoofedSource) < 2 {
        b.udp_send_to(a.mac, 1, at(&a, 2), b"with an assigned one");
        std::thread::sleep(Duration::from_millis(15));
        assert!(Instant::now() < end);
    }
    // A port that goes leaves nothing behind.
    net.command(Command::RemovePort { port: PortId(1) });
    net.command(Command::AddPort { port: PortId(3), config: port_config() });
    net.command(NetworkCommand::BindAddress { port: PortId(3), ip, mac: None });
}

#[test]
fn guests_of_a_listener_are_shared_out() {
    let net = net(2);
    let dir = TempDir::new("workers");
    let path = dir.join("net.sock");
    let fd = UnixListener::bind(&path).unwrap().into();
    net.command(Command::Listen { listener: 1, kind: ListenKind::Stream, fd, template: port_config() });
    let come = |n: u8| {
        let g = Guest::new(StreamLink::new(UnixStream::connect(&path).unwrap()), n);
        (g, net.port_up().0)
    };
    let mut guests: Vec<_> = (1..=4).map(come).collect();
    let worker = |p: PortId| (p.0 - 0x8000_0000) / 0x0200_0000;
    let places: Vec<u32> = guests.iter().map(|(_, p)| worker(*p)).collect();
    assert_eq!(places, [0, 1, 0, 1]);
    guests.iter_mut().for_each(|(g, _)| hello(g));
    let [(a, _), (b, _), (c, _), (d, gone)] = &mut guests[..] else { panic!() };
    reach(a, b, b"1");
    reach(b, c, b"2");
    reach(c, d, b"3");
    // One leaves: the next comes to its place, and may have its MAC.
    let gone = *gone;
    guests.pop();
    assert_eq!(net.port_down().0, gone);
    let (mut e, port) = come(4);
    assert_eq!(worker(port), 1);
    hello(&mut e);
    reach(&mut guests[0].0, &mut e, b"4");
    net.command(Command::StopListening { listener: 1 });
    let Value::Ports(ports) = net.command(NetworkCommand::PortStats) else { panic!() };
    assert_eq!(ports.len(), 4);
}

#[test]
fn published_ports_follow_their_guest() {
    let net = net(2);
    let (mut a, mut b) = (net.stream_guest(1), net.stream_guest(2));
    for (n, g) in [(1, &mut a), (2, &mut b)] {
        net.command(NetworkCommand::BindAddress { port: PortId(n), ip: g.ip.into(), mac: Some(g.mac) });
    }
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let (udp_to, tcp_to) = (udp.local_addr().unwrap(), tcp.local_addr().unwrap());
    let forward = |n, proto, fd, guest: SocketAddr| Command::AddForward {
        forward: ForwardId(n),
        proto,
        guest,
        entry: Entry::Published,
        fds: vec![fd],
    };
    net.command(forward(1, proto::UDP, udp.into(), at(&b, 53).into()));
    net.command(forward(2, proto::TCP, tcp.into(), at(&b, 80).into()));
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut buf = [0; 100];
    for (round, to) in [&mut b, &mut a].into_iter().enumerate() {
        if round == 1 {
            let at = |port| SocketAddr::from((to.ip, port));
            net.command(NetworkCommand::RetargetForward { forward: ForwardId(1), guest: at(53) });
            net.command(NetworkCommand::RetargetForward { forward: ForwardId(2), guest: at(80) });
        }
        client.send_to(b"ask", udp_to).unwrap();
        let got = to.udp_receive(53);
        let SocketAddr::V4(from) = got.src else { panic!() };
        to.udp_send(53, from, b"answer");
        assert_eq!(client.recv(&mut buf).unwrap(), 6);
        let mut c = TcpStream::connect(tcp_to).unwrap();
        let mut conn = to.accept(80);
        c.write_all(b"hello").unwrap();
        assert_eq!(to.exchange(&mut conn, b"world", 5), b"hello");
        c.read_exact(&mut buf[..5]).unwrap();
        assert_eq!(&buf[..5], b"world");
    }
    net.command(Command::RemoveForward { forward: ForwardId(2) });
    assert_eq!(TcpStream::connect(tcp_to).unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn all_workers_write_one_capture() {
    let net = net(2);
    let (mut a, mut b) = (net.stream_guest(1), net.stream_guest(2));
    hello(&mut a);
    hello(&mut b);
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    net.command(Command::StartCapture { fd: ours.into(), snaplen: 0 });
    reach(&mut a, &mut b, b"there");
    reach(&mut b, &mut a, b"back");
    net.command(WorkerCommand::StopCapture);
    let mut bytes = Vec::new();
    theirs.read_to_end(&mut bytes).unwrap();
    let (mut kinds, mut rest) = (Vec::new(), &bytes[..]);
    while !rest.is_empty() {
        let word = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().unwrap());
        kinds.push(word(0));
        rest = &rest[word(4) as usize..];
    }
    // One section, an interface for each guest, each frame as it came and as it went.
    assert_eq!(kinds.iter().filter(|k| **k == 0x0a0d_0d0a).count(), 1);
    assert_eq!(kinds.iter().filter(|k| **k == 1).count(), 2);
    assert_eq!(kinds.iter().filter(|k| **k == 6).count(), 4);
}

#[test]
fn commands_are_answered_once_and_refused_as_ever() {
    let net = net(4);
    let (port, no) = (net.add_port(1), PortId(7));
    assert_eq!(
        net.try_command(Command::AddPort { port, config: port_config() }),
        Err(CommandError::PortExists(port))
    );
    assert_eq!(
        net.try_command(Command::RemovePort { port: no }),
        Err(CommandError::Network(NetworkError::NoSuchPort(no)))
    );
    assert!(matches!(
        net.try_command(Command::RemoveForward { forward: ForwardId(9) }),
        Ok(Value::None) | Err(CommandError::Network(NetworkError::NoSuchForward(_)))
    ));
    assert_eq!(net.command(WorkerCommand::EnableFlowEvents { flows: false, denials: false }), Value::None);
    net.command(Command::RemovePort { port });
    assert_eq!(net.command(NetworkCommand::PortStats), Value::Ports(vec![]));
    assert_eq!(net.command(WorkerCommand::Stop), Value::None);
    net.workers.stop();
    net.workers.stop();
    assert!(!net.workers.is_healthy() && net.workers.submit(NetworkCommand::ListFlows).is_err());
}
