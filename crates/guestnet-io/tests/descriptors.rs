//! Theory of operation: a host without descriptors. In a process of its own, because it takes them all.
#![allow(missing_docs, unsafe_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::temp_dir::TempDir;
use common::{Guest, Net, StreamLink, port_config, tcp_echo, udp_echo};
use guestnet_io::{Command, ListenKind};
use std::fs::File;
use std::os::unix::net::{UnixListener, UnixStream};

#[test]
fn a_host_without_descriptors_refuses_and_recovers() {
    let net = Net::new();
    let mut g = net.stream_guest(1);
    let (tcp, udp) = (tcp_echo(), udp_echo());
    g.udp_send(5000, udp, b"before");
    g.udp_receive(5000);
    let dir = TempDir::new("fds");
    let l = UnixListener::bind(dir.join("s")).unwrap();
    net.command(Command::Listen {
        listener: 1,
        kind: ListenKind::Stream,
        fd: l.into(),
        template: port_config(),
    });
    let lower = libc::rlimit { rlim_cur: 256, rlim_max: 256 };
    // SAFETY: the struct lives.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &lower) }, 0);
    let waiting = UnixStream::connect(dir.join("s"));
    let (port, _) = net.port_up();
    drop(waiting);
    assert_eq!(net.port_down().0, port);
    // The client's socket exists before the last descriptor is taken; only its connection does not.
    let late = UnixStream::pair().unwrap();
    let mut taken: Vec<File> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
    taken.pop();
    let guest = UnixStream::connect(dir.join("s")).unwrap();
    let paused = net.until("the listener pauses", |s| s.io.listener_pauses >= 1);
    // What exists goes on, what is new is refused as a host does that cannot.
    g.udp_send(5000, udp, b"meanwhile");
    assert_eq!(g.udp_receive(5000).payload, b"meanwhile");
    assert!(g.connect(4000, tcp).is_err());
    // The listener rests between two attempts. A worker that turned in circles would try, or wake up, hundreds of times
    // before its counters are published.
    let again =
        net.until("the listener tries again", |s| s.io.listener_pauses >= paused.io.listener_pauses + 2);
    let io = again.since(&paused).io;
    assert!(io.wakeups < 100 && io.listener_pauses < 5, "it must not turn in circles");
    drop((taken, late));
    net.port_up();
    let mut guest = Guest::new(StreamLink::new(guest), 2);
    guest.udp_send(5000, udp, b"after");
    assert_eq!(guest.udp_receive(5000).payload, b"after");
    let mut c = g.connect(4001, tcp).unwrap();
    assert_eq!(g.exchange(&mut c, b"again", 5), b"again");
}
