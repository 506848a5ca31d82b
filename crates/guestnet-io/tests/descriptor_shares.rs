//! Theory of operation: front-ends that bring as many descriptors as they may, on a host that has few. In a process of
//! its own, because it lowers the limit.
#![allow(missing_docs, unsafe_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::temp_dir::TempDir;
use common::vhost::message::*;
use common::vhost::*;
use common::{Guest, Net, StreamLink, port_config, tcp_echo};
use guestnet_io::{Command, ListenKind};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};

const LIMIT: u64 = 2048;

#[test]
fn front_ends_of_one_listener_leave_descriptors_to_everybody_else() {
    let lower = libc::rlimit { rlim_cur: LIMIT, rlim_max: LIMIT };
    // SAFETY: the struct lives.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &lower) }, 0);
    let net = Net::new();
    let mut honest = net.stream_guest(1);
    let dir = TempDir::new("shares");
    let listen = |listener, kind, name: &str| {
        let fd = UnixListener::bind(dir.join(name)).unwrap().into();
        net.command(Command::Listen { listener, kind, fd, template: port_config() });
    };
    listen(1, ListenKind::VhostUser, "vhost");
    listen(2, ListenKind::Stream, "stream");
    // Each with three descriptors for each of sixteen queues, from one set of eventfds.
    let events = [eventfd(), eventfd(), eventfd()];
    let mut held = Vec::new();
    for _ in 0..60 {
        let stream = UnixStream::connect(dir.join("vhost")).unwrap();
        stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
        let mut f = Front::new(stream);
        // Once the share is used up, guestnet hangs up at once: before the first message or after any of them.
        f.try_send(SET_OWNER, &[], &[]);
        for q in 0..16u64 {
            for (request, fd) in [SET_VRING_CALL, SET_VRING_ERR].into_iter().zip(&events) {
                f.try_send(request, &longs(&[q]), &[fd.as_raw_fd()]);
            }
        }
        // An answer, or the end.
        f.try_send(GET_QUEUE_NUM, &[], &[]);
        let alive = f.reply().is_some();
        if alive {
            held.push(f);
        }
    }
    assert!((4..60).contains(&held.len()), "{} front-ends stay", held.len());
    let stats = net.workers.stats().io;
    assert!(stats.guests_refused > 0 || held.len() < 60);
    // Others come, and connect.
    let mut more: Vec<Guest<StreamLink>> = (0..8)
        .map(|n| Guest::new(StreamLink::new(UnixStream::connect(dir.join("stream")).unwrap()), 10 + n))
        .collect();
    let tcp = tcp_echo();
    for g in more.iter_mut().chain([&mut honest]) {
        let mut c = g.connect(4000, tcp).unwrap();
        assert_eq!(g.exchange(&mut c, b"hello", 5), b"hello");
    }
    // The share is free again when they have gone.
    drop(held);
    let again = UnixStream::connect(dir.join("vhost")).unwrap();
    let mut f = Front::new(again);
    let end = std::time::Instant::now() + common::PATIENCE;
    loop {
        f.try_send(GET_QUEUE_NUM, &[], &[]);
        if f.reply().is_some() {
            break;
        }
        assert!(std::time::Instant::now() < end);
        f = Front::new(UnixStream::connect(dir.join("vhost")).unwrap());
    }
}
