//! Theory of operation: whole ways through a worker, guest to loopback and back, over every attachment that
//! needs no privileges.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::temp_dir::TempDir;
use common::{
    GATEWAY, Got, Guest, HOST, Link, Net, PATIENCE, StreamLink, pattern, port_config, tcp_echo, udp_echo,
};
use guestnet_core::effects;
use guestnet_core::policy::Entry;
use guestnet_core::types::{ForwardId, PortId, ServiceId};
use guestnet_core::{NetworkCommand, NetworkError};
use guestnet_io::{Command, CommandError, Event, ListenKind, Value, WorkerCommand};
use guestnet_wire::ether::Mac;
use guestnet_wire::{arp, proto, tcp};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

fn udp_works<L: Link>(g: &mut Guest<L>, echo: SocketAddrV4) {
    g.udp_send(5000, echo, b"are you there?");
    let Got { src, payload, .. } = g.udp_receive(5000);
    assert_eq!((src, &payload[..]), (SocketAddr::V4(echo), &b"are you there?"[..]));
}

fn tcp_works<L: Link>(g: &mut Guest<L>, echo: SocketAddrV4, len: usize) {
    let mut c = g.connect(4000, echo).unwrap();
    let data = pattern(len);
    assert!(g.exchange(&mut c, &data, len) == data);
    assert!(g.close(&mut c).is_empty());
}

#[test]
fn stream() {
    let net = Net::new();
    let mut g = net.stream_guest(1);
    udp_works(&mut g, udp_echo());
    tcp_works(&mut g, tcp_echo(), 3_000_000);
    let s = net.workers.stats();
    assert!(s.io.segmented_frames > 0, "large frames are cut for a stream");
}

#[test]
fn what_a_stream_brought_of_one_flow_is_one_frame() {
    let net = Net::new();
    let mut g = net.stream_guest(1);
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let SocketAddr::V4(at) = server.local_addr().unwrap() else { panic!() };
    let mut c = g.connect(4000, SocketAddrV4::new(HOST, at.port())).unwrap();
    let (mut conn, _) = server.accept().unwrap();
    let data = pattern(40 * 1400);
    let before = net.workers.stats().core;
    let mut wire = Vec::new();
    for (i, piece) in data.chunks(1400).enumerate() {
        let push = if i % 10 == 9 { tcp::flags::PSH } else { 0 };
        let b = g.tcp_bytes(&c, tcp::flags::ACK | push, &tcp::Options::default(), piece);
        let f = g.ipv4(proto::TCP, *c.remote.ip(), &b);
        wire.extend_from_slice(&(f.len() as u32).to_be_bytes());
        wire.extend_from_slice(&f);
        c.snd = c.snd.wrapping_add(1400);
    }
    g.link.stream.write_all(&wire).unwrap();
    let mut got = vec![0; data.len()];
    conn.read_exact(&mut got).unwrap();
    assert!(got == data);
    while c.una != c.snd {
        c.una = g.receive(proto::TCP, 4000, PATIENCE).expect("an ACK").tcp.unwrap().ack;
    }
    let deadline = Instant::now() + PATIENCE;
    let after = loop {
        // Counters are published a moment after.
        let now = net.workers.stats().core;
        if now.rx_bytes - before.rx_bytes >= data.len() as u64 {
            break now;
        }
        assert!(Instant::now() < deadline, "the frames are counted");
        std::thread::yield_now();
    };
    let frames = after.rx_frames - before.rx_frames;
    assert!((4..30).contains(&frames), "{frames} frames for 40 of the guest, in four bursts");
}

#[test]
fn dgram() {
    let net = Net::new();
    let mut g = net.dgram_guest(1);
    udp_works(&mut g, udp_echo());
    tcp_works(&mut g, tcp_echo(), 1_000_000);
}

#[test]
fn packets_of_a_connection() {
    let net = Net::new();
    let dir = TempDir::new("seqpacket");
    let path = dir.join("s");
    let l = seqpacket(&path, true);
    net.command(Command::Listen { listener: 3, kind: ListenKind::Stream, fd: l, template: port_config() });
    // It speaks like a datagram socket once it is connected.
    let mut g = Guest::new(UnixDatagram::from(seqpacket(&path, false)), 1);
    let (port, _) = net.port_up();
    udp_works(&mut g, udp_echo());
    drop(g);
    assert_eq!(net.port_down().0, port);
}

/// A SOCK_SEQPACKET socket that listens on a path, or is connected to it.
#[allow(unsafe_code)]
fn seqpacket(path: &std::path::Path, listen: bool) -> std::os::fd::OwnedFd {
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    use std::os::unix::ffi::OsStrExt;
    // SAFETY: the address is plain bytes; the calls get its length; the descriptor is new.
    unsafe {
        let fd =
            OwnedFd::from_raw_fd(libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0));
        let mut a: libc::sockaddr_un = std::mem::zeroed();
        a.sun_family = libc::AF_UNIX as u16;
        for (d, s) in a.sun_path.iter_mut().zip(path.as_os_str().as_bytes()) {
            *d = *s as libc::c_char;
        }
        let len = std::mem::size_of_val(&a) as u32;
        let p = (&raw const a).cast();
        if listen {
            assert_eq!(libc::bind(fd.as_raw_fd(), p, len), 0);
            assert_eq!(libc::listen(fd.as_raw_fd(), 8), 0);
        } else {
            assert_eq!(libc::connect(fd.as_raw_fd(), p, len), 0);
        }
        fd
    }
}

#[test]
fn memory() {
    let net = Rc::new(Net::new());
    let mut g = net.memory_guest(1);
    udp_works(&mut g, udp_echo());
    tcp_works(&mut g, tcp_echo(), 50_000);
}

#[test]
fn unixgram_with_and_without_magic() {
    let net = Net::new();
    let dir = TempDir::new("unixgram");
    let server = UnixDatagram::bind(dir.join("s")).unwrap();
    net.command(Command::Listen {
        listener: 1,
        kind: ListenKind::Unixgram,
        fd: server.into(),
        template: port_config(),
    });
    let bind = |name: &str| {
        let s = UnixDatagram::bind(dir.join(name)).unwrap();
        s.connect(dir.join("s")).unwrap();
        s
    };
    let a = bind("a");
    a.send(b"VFKT").unwrap();
    let (port_a, peer) = net.port_up();
    assert_eq!(PathBuf::from(peer), dir.join("a"));
    let mut a = Guest::new(a, 1);
    let echo = udp_echo();
    udp_works(&mut a, echo);
    // No magic: the first datagram is the first frame, and is not lost.
    let mut b = Guest::new(bind("b"), 2);
    udp_works(&mut b, echo);
    let (port_b, _) = net.port_up();
    assert!(port_a != port_b && port_a.0 >= 0x8000_0000);
    // Both are on one segment and nobody hears what is for the other.
    tcp_works(&mut a, tcp_echo(), 300_000);
    udp_works(&mut b, echo);
    // The same path says hello again: a guest that started anew.
    Link::send(&mut a.link, b"VFKT");
    assert_eq!(net.port_down().0, port_a);
    let (port_a2, _) = net.port_up();
    assert_ne!(port_a2, port_a);
    udp_works(&mut a, echo);
    // A guest that left is noticed when somebody comes.
    drop(b);
    std::fs::remove_file(dir.join("b")).unwrap();
    let mut c = Guest::new(bind("c"), 3);
    udp_works(&mut c, echo);
    assert_eq!(net.port_down().0, port_b);
    // Who has no name cannot be answered.
    let nobody = UnixDatagram::unbound().unwrap();
    nobody.send_to(b"VFKT", dir.join("s")).unwrap();
    udp_works(&mut c, echo);
    net.command(Command::StopListening { listener: 1 });
    net.port_down();
    net.port_down();
    assert!(matches!(net.command(NetworkCommand::PortStats), Value::Ports(p) if p.is_empty()));
}

/// A guest can send four bytes that are the magic, as often as it likes. Each is a new port, which the control
/// side has to hear of; others are not to wait for that.
#[test]
fn a_guest_does_not_start_again_without_end() {
    let net = Net::new();
    let dir = TempDir::new("again");
    let server = UnixDatagram::bind(dir.join("s")).unwrap();
    net.command(Command::Listen {
        listener: 1,
        kind: ListenKind::Unixgram,
        fd: server.into(),
        template: port_config(),
    });
    let s = UnixDatagram::bind(dir.join("a")).unwrap();
    s.connect(dir.join("s")).unwrap();
    let mut a = Guest::new(s, 1);
    let begin = Instant::now();
    for _ in 0..300 {
        Link::send(&mut a.link, b"VFKT");
    }
    // It goes on as who it was.
    udp_works(&mut a, udp_echo());
    let seconds = begin.elapsed().as_secs() as usize + 1;
    net.command(NetworkCommand::PortStats);
    let ports = net.count(|e| matches!(e, Event::PortUp { .. }));
    assert!((1..=1 + 8 * seconds).contains(&ports), "{ports} ports in {seconds} s");
}

#[test]
fn qemu_dgram_guests_are_not_connected() {
    let net = Net::new();
    let dir = TempDir::new("dgram");
    let server = UnixDatagram::bind(dir.join("s")).unwrap();
    net.command(Command::Listen {
        listener: 1,
        kind: ListenKind::Dgram,
        fd: server.into(),
        template: port_config(),
    });
    struct Unconnected(UnixDatagram, PathBuf);
    impl Link for Unconnected {
        fn send(&mut self, frame: &[u8]) {
            self.0.send_to(frame, &self.1).unwrap();
        }
        fn receive(&mut self, wait: Duration) -> Option<Vec<u8>> {
            self.0.receive(wait)
        }
    }
    let mut guests: Vec<_> = (0..3u8)
        .map(|n| {
            let s = UnixDatagram::bind(dir.join(format!("g{n}"))).unwrap();
            Guest::new(Unconnected(s, dir.join("s")), n)
        })
        .collect();
    let (udp, tcp) = (udp_echo(), tcp_echo());
    for g in &mut guests {
        udp_works(g, udp);
        net.port_up();
    }
    for g in &mut guests {
        tcp_works(g, tcp, 200_000);
    }
}

#[test]
fn guests_of_a_stream_listener_come_and_go() {
    let net = Net::new();
    let dir = TempDir::new("listener");
    let l = UnixListener::bind(dir.join("s")).unwrap();
    net.command(Command::Listen {
        listener: 9,
        kind: ListenKind::Stream,
        fd: l.into(),
        template: port_config(),
    });
    let echo = udp_echo();
    let come = |n| Guest::new(StreamLink::new(UnixStream::connect(dir.join("s")).unwrap()), n);
    let mut a = come(1);
    let (port_a, _) = net.port_up();
    let mut b = come(2);
    let (port_b, _) = net.port_up();
    udp_works(&mut a, echo);
    udp_works(&mut b, echo);
    // One dies in the middle of a frame.
    a.link.stream.write_all(&[0, 0, 1, 0, 1, 2, 3]).unwrap();
    drop(a);
    let (port, why) = net.port_down();
    assert!(port == port_a && why.contains("middle"), "{why}");
    udp_works(&mut b, echo);
    // One announces a frame that cannot be.
    b.link.stream.write_all(&[0xff, 0, 0, 0]).unwrap();
    let (port, why) = net.port_down();
    assert!(port == port_b && why.contains("4278190080"), "{why}");
    let mut c = come(3);
    net.port_up();
    udp_works(&mut c, echo);
    net.command(Command::StopListening { listener: 9 });
    assert_eq!(net.try_command(Command::StopListening { listener: 9 }), Err(CommandError::NoSuchListener(9)));
    udp_works(&mut c, echo);
}

#[test]
fn a_guest_that_does_not_read_is_bounded_and_alone() {
    let net = Net::new();
    let mut deaf = net.stream_guest(1);
    let mut other = net.stream_guest(2);
    let (udp, tcp) = (udp_echo(), tcp_echo());
    deaf.gateway();
    // Straight through the switch, many times what waits for a guest at most.
    other.gateway();
    let mut datagram = [0; 1400];
    guestnet_wire::udp::emit(&mut datagram, other.ip.into(), deaf.ip.into(), 7, 7);
    let mut frame = other.ipv4(proto::UDP, deaf.ip, &datagram);
    frame[..6].copy_from_slice(&deaf.mac.0);
    for _ in 0..8000 {
        other.link.send(&frame);
    }
    tcp_works(&mut other, tcp, 500_000);
    udp_works(&mut other, udp);
    net.until("a port was full", |s| s.core.drops[guestnet_core::stats::DropReason::PortFull as usize] > 0);
    // When it reads again, it is served again.
    while deaf.link.receive(Duration::from_millis(200)).is_some() {}
    udp_works(&mut deaf, udp);
    tcp_works(&mut deaf, tcp, 200_000);
}

/// A guest of a datagram listener, whose socket is connected or not.
struct Arrived {
    socket: UnixDatagram,
    to: Option<PathBuf>,
}

impl Arrived {
    fn new(dir: &std::path::Path, name: &str, connects: bool) -> Arrived {
        let socket = UnixDatagram::bind(dir.join(name)).unwrap();
        if connects {
            socket.connect(dir.join("s")).unwrap();
        }
        Arrived { socket, to: (!connects).then(|| dir.join("s")) }
    }
}

impl Link for Arrived {
    fn send(&mut self, frame: &[u8]) {
        match &self.to {
            Some(path) => self.socket.send_to(frame, path).unwrap(),
            None => self.socket.send(frame).unwrap(),
        };
    }
    fn receive(&mut self, wait: Duration) -> Option<Vec<u8>> {
        self.socket.receive(wait)
    }
}

/// Sends more to a guest than may wait for it.
fn fill(from: &mut Guest<Arrived>, to: &Guest<Arrived>) {
    let mut datagram = [0; 1400];
    guestnet_wire::udp::emit(&mut datagram, from.ip.into(), to.ip.into(), 7, 7);
    let mut frame = from.ipv4(proto::UDP, to.ip, &datagram);
    frame[..6].copy_from_slice(&to.mac.0);
    for _ in 0..3000 {
        from.link.send(&frame);
    }
}

#[test]
fn a_guest_of_a_datagram_listener_that_does_not_read_silences_nobody() {
    for (kind, connects) in
        [(ListenKind::Dgram, false), (ListenKind::Dgram, true), (ListenKind::Unixgram, true)]
    {
        let net = Net::new();
        let dir = TempDir::new(&format!("deaf-{kind:?}-{connects}"));
        let fd = UnixDatagram::bind(dir.join("s")).unwrap().into();
        net.command(Command::Listen { listener: 1, kind, fd, template: port_config() });
        let mut other = Guest::new(Arrived::new(&dir, "other", connects), 9);
        other.gateway();
        let mut deaf = Vec::new();
        for n in 1..4 {
            let mut d = Guest::new(Arrived::new(&dir, &format!("deaf{n}"), connects), n);
            d.gateway();
            fill(&mut other, &d);
            udp_works(&mut other, udp_echo());
            tcp_works(&mut other, tcp_echo(), 100_000);
            deaf.push(d);
        }
        // Those that read again are served again.
        for d in &mut deaf {
            while d.link.receive(Duration::from_millis(100)).is_some() {}
            udp_works(d, udp_echo());
        }
    }
}

/// Two that connected before either had sent anything share a socket. It becomes the first one's when the other does
/// not read, and the other is told to come again, which it can.
#[test]
fn guests_that_came_in_the_same_moment_are_parted_when_one_does_not_read() {
    let net = Net::new();
    let dir = TempDir::new("same-moment");
    let fd = UnixDatagram::bind(dir.join("s")).unwrap().into();
    net.command(Command::Listen { listener: 1, kind: ListenKind::Dgram, fd, template: port_config() });
    let mut first = Guest::new(Arrived::new(&dir, "first", true), 1);
    let mut second = Guest::new(Arrived::new(&dir, "second", true), 2);
    first.gateway();
    let (owner, _) = net.port_up();
    second.gateway();
    let (other, _) = net.port_up();
    udp_works(&mut first, udp_echo());
    udp_works(&mut second, udp_echo());
    fill(&mut first, &second);
    let (gone, why) = net.port_down();
    assert!(gone == other && why.contains("start it again"), "{why}");
    udp_works(&mut first, udp_echo());
    tcp_works(&mut first, tcp_echo(), 100_000);
    drop(second);
    std::fs::remove_file(dir.join("second")).unwrap();
    let mut second = Guest::new(Arrived::new(&dir, "second", true), 2);
    udp_works(&mut second, udp_echo());
    assert_ne!(net.port_up().0, owner);
}

/// QEMU binds its path anew when it starts again, and does not say `VFKT`.
#[test]
fn a_datagram_guest_that_starts_again_is_answered_at_its_new_socket() {
    let net = Net::new();
    let dir = TempDir::new("anew");
    let fd = UnixDatagram::bind(dir.join("s")).unwrap().into();
    net.command(Command::Listen { listener: 1, kind: ListenKind::Dgram, fd, template: port_config() });
    let mut first = Guest::new(Arrived::new(&dir, "guest", false), 1);
    udp_works(&mut first, udp_echo());
    let (port, _) = net.port_up();
    drop(first);
    std::fs::remove_file(dir.join("guest")).unwrap();
    let mut second = Guest::new(Arrived::new(&dir, "guest", false), 1);
    // Its first frames may still be answered to the old socket, which shows that it is gone.
    let end = Instant::now() + PATIENCE;
    while net.count(|e| matches!(e, Event::PortDown { .. })) == 0 {
        assert!(Instant::now() < end);
        second.arp(arp::REQUEST, Mac::default(), GATEWAY);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(net.port_down().0, port);
    udp_works(&mut second, udp_echo());
    assert_ne!(net.port_up().0, port);
}

/// The clock of a turn is one for all attachments: frames that open flows are slow, and a guest on a stream may bring
/// hundreds of them in one read.
#[test]
fn a_turn_of_a_stream_guest_that_opens_flows_ends_by_time() {
    let net = Net::new();
    let mut g = net.stream_guest(1);
    let to = udp_echo();
    udp_works(&mut g, to);
    let frames: Vec<u8> = (0..2000u16)
        .flat_map(|i| {
            let mut datagram = [0; 10];
            guestnet_wire::udp::emit(&mut datagram, g.ip.into(), (*to.ip()).into(), 10_000 + i, to.port());
            let frame = g.ipv4(proto::UDP, *to.ip(), &datagram);
            [&(frame.len() as u32).to_be_bytes()[..], &frame].concat()
        })
        .collect();
    g.link.stream.write_all(&frames).unwrap();
    // All are taken, and nothing waits for another frame to come.
    let end = Instant::now() + PATIENCE;
    loop {
        let stats = net.workers.stats();
        if stats.core.flows_opened > 2000 {
            // 64 sockets are not opened in 100 us.
            assert_eq!(stats.io.batch_histogram[7], 0, "{:?}", stats.io.batch_histogram);
            break;
        }
        assert!(Instant::now() < end, "{} flows", stats.core.flows_opened);
        std::thread::sleep(Duration::from_millis(1));
    }
    udp_works(&mut g, to);
}

#[test]
fn guests_that_come_all_at_once_are_let_in_at_a_pace() {
    let net = Net::new();
    let dir = TempDir::new("storm");
    let fd = UnixListener::bind(dir.join("s")).unwrap().into();
    net.command(Command::Listen { listener: 1, kind: ListenKind::Stream, fd, template: port_config() });
    let begin = Instant::now();
    let mut guests = Vec::new();
    while guests.len() < 400 {
        guests.push(UnixStream::connect(dir.join("s")).unwrap());
    }
    let ups = |net: &Net| net.count(|e| matches!(e, Event::PortUp { .. }));
    let end = begin + PATIENCE;
    while ups(&net) < 400 {
        let let_in = ups(&net);
        // Counted before the clock is read, so that a slow test is no fault.
        let most = 256 + begin.elapsed().as_millis() as usize * 500 / 1000 + 1;
        assert!(let_in <= most, "{let_in} guests, {most} allowed");
        assert!(Instant::now() < end, "{let_in} guests");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(net.workers.stats().io.listener_pauses > 0);
}

/// A port with more flows than are closed at once goes in steps, and is acknowledged when it is gone.
#[test]
fn a_port_with_many_flows_is_removed_whole() {
    let net = Net::new();
    let mut g = net.stream_guest(1);
    let to = udp_echo();
    udp_works(&mut g, to);
    for i in 0..3000u16 {
        let mut datagram = [0; 8];
        guestnet_wire::udp::emit(&mut datagram, g.ip.into(), (*to.ip()).into(), 5000, 10_000 + i);
        let frame = g.ipv4(proto::UDP, *to.ip(), &datagram);
        g.link.send(&frame);
    }
    let flows = |net: &Net| match net.command(NetworkCommand::ListFlows) {
        Value::Flows(f) => f.len(),
        other => panic!("{other:?}"),
    };
    let end = Instant::now() + PATIENCE;
    while flows(&net) < 3000 {
        assert!(Instant::now() < end, "{} flows", flows(&net));
    }
    net.command(Command::RemovePort { port: PortId(1) });
    assert_eq!(flows(&net), 0);
    assert!(matches!(net.command(NetworkCommand::PortStats), Value::Ports(p) if p.is_empty()));
    assert_eq!(
        net.try_command(Command::RemovePort { port: PortId(1) }),
        Err(CommandError::Network(NetworkError::NoSuchPort(PortId(1))))
    );
    // The number is free again.
    let mut again = net.stream_guest(1);
    udp_works(&mut again, to);
}

#[test]
fn a_deaf_guest_on_a_shared_socket_is_alone_too() {
    let net = Net::new();
    let dir = TempDir::new("deaf");
    let server = UnixDatagram::bind(dir.join("s")).unwrap();
    net.command(Command::Listen {
        listener: 1,
        kind: ListenKind::Unixgram,
        fd: server.into(),
        template: port_config(),
    });
    let come = |name: &str, n| {
        let s = UnixDatagram::bind(dir.join(name)).unwrap();
        s.connect(dir.join("s")).unwrap();
        Guest::new(s, n)
    };
    let mut deaf = come("deaf", 1);
    deaf.gateway();
    let mut other = come("other", 2);
    other.gateway();
    let mut datagram = [0; 1400];
    guestnet_wire::udp::emit(&mut datagram, other.ip.into(), deaf.ip.into(), 7, 7);
    let mut frame = other.ipv4(proto::UDP, deaf.ip, &datagram);
    frame[..6].copy_from_slice(&deaf.mac.0);
    for _ in 0..8000 {
        Link::send(&mut other.link, &frame);
    }
    udp_works(&mut other, udp_echo());
    tcp_works(&mut other, tcp_echo(), 500_000);
    while deaf.link.receive(Duration::from_millis(200)).is_some() {}
    udp_works(&mut deaf, udp_echo());
}

#[test]
fn garbage_is_counted_and_harms_nobody() {
    let net = Net::new();
    let mut bad = net.dgram_guest(1);
    let mut worse = net.stream_guest(2);
    let mut good = net.stream_guest(3);
    let noise = pattern(100_000);
    for i in 0..3000usize {
        let at = (i * 31) % 90_000;
        let mut f = noise[at..at + (i * 7) % 1600].to_vec();
        if i % 3 == 0 && f.len() > 14 {
            f[..6].fill(0xff);
            f[12..14].copy_from_slice(&[8, 0]);
        }
        Link::send(&mut bad.link, &f);
        worse.link.send(&f);
    }
    udp_works(&mut good, udp_echo());
    tcp_works(&mut good, tcp_echo(), 100_000);
    net.until("most of the noise dropped", |s| s.core.drops.iter().sum::<u64>() > 1000);
    assert!(net.workers.is_healthy());
}

#[test]
fn refused_is_seen_as_refused() {
    let net = Net::new();
    let mut g = net.stream_guest(1);
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let to = SocketAddrV4::new(HOST, closed);
    let got = g.connect(4000, to).unwrap_err();
    assert_eq!(got.tcp.unwrap().flags & tcp::flags::RST, tcp::flags::RST);
    // ICMP has no ports: the error is found by its type.
    g.udp_send(5000, to, b"anybody?");
    let icmp = g.receive(proto::ICMP, 0, PATIENCE).expect("an ICMP error");
    assert_eq!(icmp.src.ip(), HOST, "{icmp:?}");
}

#[test]
fn half_close() {
    let net = Net::new();
    let l = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = SocketAddrV4::new(HOST, l.local_addr().unwrap().port());
    let server = std::thread::spawn(move || {
        let (mut s, _) = l.accept().unwrap();
        let mut all = Vec::new();
        s.read_to_end(&mut all).unwrap();
        s.write_all(&pattern(200_000)).unwrap();
        all
    });
    let mut g = net.dgram_guest(1);
    let mut c = g.connect(4000, to).unwrap();
    assert!(g.exchange(&mut c, b"question", 0).is_empty());
    assert!(g.close(&mut c) == pattern(200_000), "data after our FIN");
    assert_eq!(server.join().unwrap(), b"question");
}

#[test]
fn published_ports() {
    let net = Net::new();
    let mut g = net.stream_guest(1);
    g.gateway();
    net.command(NetworkCommand::BindAddress { port: PortId(1), ip: g.ip.into(), mac: Some(g.mac) });
    let l = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = l.local_addr().unwrap();
    net.command(Command::AddForward {
        forward: ForwardId(1),
        proto: proto::TCP,
        guest: SocketAddr::new(g.ip.into(), 80),
        entry: Entry::Published,
        fds: vec![l.into()],
    });
    let client = std::thread::spawn(move || {
        let mut s = TcpStream::connect(at).unwrap();
        s.write_all(b"hello guest").unwrap();
        s.shutdown(std::net::Shutdown::Write).unwrap();
        let mut all = Vec::new();
        s.read_to_end(&mut all).unwrap();
        all
    });
    let mut c = g.accept(80);
    assert_eq!(g.exchange(&mut c, b"hello client", 11), b"hello guest");
    g.close(&mut c);
    assert_eq!(client.join().unwrap(), b"hello client");

    let s = UdpSocket::bind("0.0.0.0:0").unwrap();
    let port = s.local_addr().unwrap().port();
    net.command(Command::AddForward {
        forward: ForwardId(2),
        proto: proto::UDP,
        guest: SocketAddr::new(g.ip.into(), 53),
        entry: Entry::Published,
        fds: vec![s.into()],
    });
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    // The answer comes from the address that was asked.
    let asked: SocketAddr = format!("127.0.0.77:{port}").parse().unwrap();
    client.send_to(b"query", asked).unwrap();
    let q = g.udp_receive(53);
    assert_eq!(q.payload, b"query");
    let SocketAddr::V4(from) = q.src else { panic!() };
    g.udp_send(53, from, b"answer");
    let mut buf = [0; 20];
    let (n, from) = client.recv_from(&mut buf).unwrap();
    assert_eq!((&buf[..n], from), (&b"answer"[..], asked));
    net.command(Command::RemoveForward { forward: ForwardId(1) });
    net.command(Command::RemoveForward { forward: ForwardId(2) });
    assert!(TcpStream::connect(at).is_err());
}

#[test]
fn a_forward_waits_for_its_guest() {
    let net = Net::new();
    let mut g = net.stream_guest(1);
    g.gateway();
    let l = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = l.local_addr().unwrap();
    let forward = ForwardId(1);
    let nobody = SocketAddr::from(([0, 0, 0, 0], 80));
    net.command(Command::AddForward {
        forward,
        proto: proto::TCP,
        guest: nobody,
        entry: Entry::Published,
        fds: vec![l.into()],
    });
    let mut refused = TcpStream::connect(at).unwrap();
    assert!(refused.read(&mut [0; 1]).is_err(), "reset at once");
    let guest = SocketAddr::new(g.ip.into(), 80);
    net.command(NetworkCommand::RetargetForward { forward, guest });
    let client = std::thread::spawn(move || {
        let mut s = TcpStream::connect(at).unwrap();
        s.write_all(b"hello").unwrap();
        let mut answer = [0; 5];
        s.read_exact(&mut answer).unwrap();
        answer
    });
    let mut c = g.accept(80);
    assert_eq!(g.exchange(&mut c, b"world", 5), b"hello");
    assert_eq!(client.join().unwrap(), *b"world");
    let unknown = NetworkCommand::RetargetForward { forward: ForwardId(2), guest };
    assert_eq!(
        net.try_command(unknown),
        Err(CommandError::Network(NetworkError::NoSuchForward(ForwardId(2))))
    );
}

#[test]
fn services() {
    let net = Net::new();
    let dir = TempDir::new("services");
    let mut g = net.stream_guest(1);
    let l = UnixListener::bind(dir.join("web")).unwrap();
    std::thread::spawn(move || {
        for s in l.incoming() {
            let mut s = s.unwrap();
            let mut buf = [0; 3];
            s.read_exact(&mut buf).unwrap();
            s.write_all(b"page").unwrap();
        }
    });
    net.command(WorkerCommand::AddService {
        service: ServiceId(1),
        proto: proto::TCP,
        address: common::GATEWAY.into(),
        port: 80,
        unix_path: Some(dir.join("web")),
    });
    let mut c = g.connect(4000, SocketAddrV4::new(common::GATEWAY, 80)).unwrap();
    assert_eq!(g.exchange(&mut c, b"get", 4), b"page");

    net.command(WorkerCommand::AddService {
        service: ServiceId(2),
        proto: proto::UDP,
        address: common::GATEWAY.into(),
        port: 53,
        unix_path: None,
    });
    let gateway = SocketAddrV4::new(common::GATEWAY, 53);
    g.udp_send(5353, gateway, b"name?");
    let (src, mac) = net.wait("datagram", |e| match e {
        Event::Core(effects::Event::Datagram { service: ServiceId(2), src, mac, payload, .. }) => {
            assert_eq!(&payload[..], b"name?");
            Some((*src, *mac))
        }
        _ => None,
    });
    net.command(NetworkCommand::ServiceSend {
        port: PortId(1),
        dst_mac: mac,
        src: SocketAddr::V4(gateway),
        dst: src,
        payload: b"address!".to_vec(),
    });
    assert_eq!(g.udp_receive(5353).payload, b"address!");
}

#[test]
fn a_path_that_nobody_listens_on_is_a_refused_service() {
    let net = Net::new();
    let mut g = net.stream_guest(1);
    let dir = TempDir::new("noservice");
    let address = Ipv4Addr::new(192, 168, 64, 200);
    net.command(WorkerCommand::AddService {
        service: ServiceId(1),
        proto: proto::TCP,
        address: address.into(),
        port: 80,
        unix_path: Some(dir.join("nobody")),
    });
    let got = g.connect(4000, SocketAddrV4::new(address, 80)).unwrap_err();
    assert_eq!(got.tcp.unwrap().flags & tcp::flags::RST, tcp::flags::RST);
}
