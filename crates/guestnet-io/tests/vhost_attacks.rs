//! Theory of operation: what a front-end or its guest can try against the process, and against others of it: address
//! space, descriptors that are none, notifications that block, holes, and turns that take long. After each attempt
//! the worker lives, and another guest on it has its network.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::temp_dir::TempDir;
use common::vhost::message::*;
use common::vhost::*;
use common::{Guest, Net, PATIENCE, StreamLink, pattern, port_config, tcp_echo, udp_echo};
use guestnet_core::NetworkCommand;
use guestnet_io::{Command, ListenKind};
use std::fs::File;
use std::io::Write;
use std::net::SocketAddrV4;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

struct Attack {
    net: Net,
    honest: Guest<StreamLink>,
    echo: SocketAddrV4,
    ports: u32,
}

impl Attack {
    fn new() -> Attack {
        let net = Net::new();
        let honest = net.stream_guest(1);
        Attack { net, honest, echo: udp_echo(), ports: 1 }
    }

    fn front(&mut self) -> Front {
        self.ports += 1;
        let port = self.net.add_port(self.ports);
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.net.command(Command::AttachVhostUser { port, fd: theirs.into() });
        Front::new(ours)
    }

    fn guest(&mut self, features: u64) -> Guest<VhostLink> {
        let front = self.front();
        let number = self.ports as u8;
        Guest::new(VhostLink::new(front.stream, Shape::new(features)), number)
    }

    fn all_is_well(mut self) {
        self.honest.udp_send(5000, self.echo, b"are you there?");
        assert_eq!(self.honest.udp_receive(5000).payload, b"are you there?");
        assert!(self.net.workers.is_healthy());
    }
}

fn wait_for(what: &str, mut there: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !there() {
        assert!(Instant::now() < end, "no {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

#[test]
fn a_front_end_cannot_fill_the_address_space() {
    let mut a = Attack::new();
    let sparse = memfd(0);
    File::from(sparse.try_clone().unwrap()).set_len(1 << 62).unwrap();
    let mut held = Vec::new();
    let (mut size, mut mapped) = (1u64 << 46, 0u64);
    while size >= 1 << 30 && held.len() < 60 {
        let mut f = a.front();
        f.begin(PLAIN);
        let table = Front::table(&[Front::region(0, size, 0x1000, 0)]);
        if f.tell(SET_MEM_TABLE, &table, &[sparse.as_raw_fd()]) {
            mapped += size;
            held.push(f);
        } else {
            size /= 2;
        }
    }
    assert!(mapped > 0, "a share is to be had");
    assert!(mapped <= 1 << 45, "{mapped} bytes, a quarter of the address space at most");
    // There is room for everybody else's memory.
    assert!(Vec::<u8>::new().try_reserve_exact(1 << 30).is_ok());
    let mut other = a.guest(PLAIN);
    let echo = a.echo;
    other.udp_send(5000, echo, b"hello");
    assert_eq!(other.udp_receive(5000).payload, b"hello");
    a.all_is_well();
}

#[test]
fn only_eventfds_are_taken_for_notifications() {
    let mut a = Attack::new();
    for request in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
        let (socket, other) = UnixStream::pair().unwrap();
        let (mut reads, writes) = std::io::pipe().unwrap();
        let file = File::options().write(true).open("/dev/null").unwrap();
        for fd in [socket.as_raw_fd(), writes.as_raw_fd(), file.as_raw_fd()] {
            let mut f = a.front();
            f.begin(PLAIN);
            let q = Queue { index: 1, at: 0, size: 8 };
            assert!(f.start(&q, 0));
            assert!(!f.tell(request, &longs(&[1]), &[fd]), "{request}");
        }
        drop(writes);
        assert_eq!(std::io::Read::read(&mut reads, &mut [0; 8]).unwrap(), 0, "nothing was written to it");
        other.set_nonblocking(true).unwrap();
        assert!(std::io::Read::read(&mut &other, &mut [0; 8]).map_or(true, |n| n == 0));
    }
    a.all_is_well();
}

#[test]
fn a_notification_that_would_block_is_not_waited_for() {
    let mut a = Attack::new();
    let mut g = a.guest(PLAIN);
    // A call of its own, of which the counter is full and O_NONBLOCK is off once the worker has it.
    // SAFETY: a new descriptor.
    #[allow(unsafe_code)]
    let call = unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC)) };
    for index in [0, 1] {
        assert!(g.link.front.tell(SET_VRING_CALL, &longs(&[index]), &[call.as_raw_fd()]));
    }
    // SAFETY: no pointers.
    #[allow(unsafe_code)]
    unsafe {
        libc::fcntl(call.as_raw_fd(), libc::F_SETFL, 0);
    }
    let mut count = [0; 8];
    let mut file = File::from(call.try_clone().unwrap());
    let _signals = std::io::Read::read(&mut file, &mut count).unwrap();
    file.write_all(&(u64::MAX - 1).to_ne_bytes()).unwrap();
    let gateway = [2, 0, 0, 0, 0, 1];
    let frame = [gateway.as_slice(), &[2, 0, 0, 0, 0, 9, 0x88, 0xb5], &[0; 46]].concat();
    let m = Arc::clone(&g.link.front.memory);
    for _ in 0..20 {
        let before = g.link.tx.last_used;
        g.link.send_with(&[0; 12], &frame);
        wait_for("buffer that came back", || {
            while g.link.tx.take(&m).is_some() {}
            g.link.tx.last_used != before
        });
    }
    a.all_is_well();
}

#[test]
fn reading_holes_of_guest_memory_allocates_nothing() {
    let mut a = Attack::new();
    let mut f = a.front();
    f.begin(PLAIN);
    let len = 1u64 << 30;
    let sparse = memfd(len as usize);
    let table = Front::table(&[
        Front::region(GUEST, MEMORY as u64, USER, 0),
        Front::region(1 << 32, len, USER + (1 << 40), 0),
    ]);
    assert!(f.tell(SET_MEM_TABLE, &table, &[f.memory.fd.as_raw_fd(), sparse.as_raw_fd()]));
    let q = Queue { index: 1, at: 0, size: 256 };
    assert!(f.start(&q, 0));
    let mut d = Driver::new(q);
    let m = Arc::clone(&f.memory);
    for i in 0..256u16 {
        // Each frame on sixteen pages that nobody has written.
        d.put_descriptor(&m, i, descriptor((1 << 32) + (u64::from(i) << 16), 65_000, 0, 0));
        d.offer(&m, i);
    }
    signal(&f.events[1][0]);
    let mut back = 0;
    wait_for("end of the frames", || {
        while d.take(&m).is_some() {
            back += 1;
        }
        back == 256
    });
    assert_eq!(File::from(sparse).metadata().unwrap().blocks(), 0);
    a.all_is_well();
}

#[test]
fn a_turn_of_long_chains_ends_after_so_many_descriptors() {
    let mut a = Attack::new();
    let mut g = a.guest(PLAIN | INDIRECT);
    let m = Arc::clone(&g.link.front.memory);
    while g.link.tx.take(&m).is_some() {}
    // A table of as many descriptors as there may be, of a byte each.
    let (table, byte) = (0xe_0000, GUEST + 0xd_0000);
    for i in 0..1024u16 {
        let flags = if i < 1023 { F_NEXT } else { 0 };
        m.write(table + 16 * usize::from(i), &descriptor(byte, 1, flags, i + 1));
    }
    let stats = || {
        a.net.command(NetworkCommand::PortStats);
        a.net.workers.stats().io
    };
    let frames = 128;
    let before = stats();
    for i in 0..frames {
        let head = 100 + i % 100;
        g.link.tx.put_descriptor(&m, head, descriptor(GUEST + table as u64, 16 * 1024, F_INDIRECT, 0));
        g.link.tx.offer(&m, head);
    }
    g.link.kick(1);
    let mut back = 0;
    wait_for("end of the frames", || {
        while g.link.tx.take(&m).is_some() {
            back += 1;
        }
        back == frames
    });
    let commands = before.commands;
    wait_for("counters", || {
        let now = stats();
        now.commands > commands && now.batch_histogram != before.batch_histogram
    });
    let after = stats();
    // Buckets of the histogram: 0, 1, 2-3, 4-7 and so on.
    let longer: u64 = (3..8).map(|i| after.batch_histogram[i] - before.batch_histogram[i]).sum();
    assert_eq!(longer, 0, "turns of four frames and more");
    a.all_is_well();
}

#[test]
fn many_pages_of_a_file_that_is_cut_off_cost_only_their_own_guest() {
    let mut a = Attack::new();
    let mut g = a.guest(PLAIN);
    let m = Arc::clone(&g.link.front.memory);
    while g.link.tx.take(&m).is_some() {}
    // Each page was seen, so that the file is not asked again.
    for round in 0..2 {
        for i in 0..64u16 {
            let at = (4 << 20) + (usize::from(i) << 16);
            if round == 0 {
                for page in 0..16 {
                    m.write(at + 4096 * page, &[1]);
                }
            }
            g.link.tx.put_descriptor(&m, 100 + i, descriptor(GUEST + at as u64, 65_000, 0, 0));
            g.link.tx.offer(&m, 100 + i);
        }
        if round == 1 {
            File::from(m.fd.try_clone().unwrap()).set_len(0x10_0000).unwrap();
        }
        g.link.kick(1);
        if round == 0 {
            let mut back = 0;
            wait_for("end of the frames", || {
                while g.link.tx.take(&m).is_some() {
                    back += 1;
                }
                back == 64
            });
        }
    }
    let (_, why) = a.net.port_down();
    assert!(why.contains("taken away"), "{why}");
    a.all_is_well();
}

/// Frees pages of a file again, or allocates them.
#[allow(unsafe_code)]
fn fallocate(file: &File, mode: i32, from: i64, len: i64) {
    // SAFETY: no pointers.
    assert_eq!(unsafe { libc::fallocate(file.as_raw_fd(), mode, from, len) }, 0);
}

fn works(g: &mut Guest<VhostLink>, echo: SocketAddrV4) {
    g.udp_send(5000, echo, b"are you there?");
    assert_eq!(g.udp_receive(5000).payload, b"are you there?");
    let data = pattern(500_000);
    let mut c = g.connect(4000, tcp_echo()).unwrap();
    assert!(g.exchange(&mut c, &data, data.len()) == data);
}

/// A touch of memory that is being freed waits until all of it is free, which nobody can see beforehand.
#[test]
fn a_front_end_that_makes_the_worker_wait_gets_a_thread_of_its_own() {
    let a = Attack::new();
    let dir = TempDir::new("stall");
    let fd = UnixListener::bind(dir.join("s")).unwrap().into();
    let template = port_config();
    a.net.command(Command::Listen { listener: 5, kind: ListenKind::VhostUser, fd, template });
    let features = PLAIN | TSO | MRG | INDIRECT | EVENT_IDX;
    let come = |number| {
        let link = VhostLink::new(UnixStream::connect(dir.join("s")).unwrap(), Shape::new(features));
        Guest::new(link, number)
    };
    let mut g = come(7);
    let first = a.net.port_up().0;
    works(&mut g, a.echo);
    // Half a gigabyte more, of which the last pages are used.
    let len = 512 << 20;
    let file = File::from(memfd(len));
    let table = Front::table(&[
        Front::region(GUEST, MEMORY as u64, USER, 0),
        Front::region(1 << 32, len as u64, USER + (1 << 40), 0),
    ]);
    let fds = [g.link.front.memory.fd.as_raw_fd(), file.as_raw_fd()];
    assert!(g.link.front.tell(SET_MEM_TABLE, &table, &fds));
    let m = Arc::clone(&g.link.front.memory);
    // The guest sends without end while the front-end frees the memory and fills it again.
    let (worker, done) = (&a.net.workers, AtomicBool::new(false));
    std::thread::scope(|threads| {
        threads.spawn(|| {
            let mut n = 0u16;
            while !done.load(Ordering::Relaxed) || g.link.tx.last_used != g.link.tx.available() {
                if g.link.tx.take(&m).is_some() || done.load(Ordering::Relaxed) {
                    continue;
                }
                if g.link.tx.available().wrapping_sub(g.link.tx.last_used) < 32 {
                    n = (n + 1) % 32;
                    let at = (1 << 32) + len as u64 - (u64::from(n) + 1) * 65_536;
                    g.link.tx.put_descriptor(&m, 100 + n, descriptor(at, 64, 0, 0));
                    g.link.tx.offer(&m, 100 + n);
                    g.link.kick(1);
                }
            }
        });
        let ones = vec![1; 1 << 20];
        let end = Instant::now() + 6 * PATIENCE;
        while worker.stats().io.front_ends_isolated == 0 && Instant::now() < end {
            for at in (0..len as u64).step_by(ones.len()) {
                file.write_all_at(&ones, at).unwrap();
            }
            fallocate(&file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, 0, len as i64);
        }
        done.store(true, Ordering::Relaxed);
    });
    let io = a.net.workers.stats().io;
    assert_eq!(io.front_ends_isolated, 1, "{io:?}");
    works(&mut g, a.echo);
    // The next one from there has its own thread from the first.
    let mut next = come(8);
    let second = a.net.port_up().0;
    wait_for("second thread", || a.net.workers.stats().io.front_ends_isolated == 2);
    works(&mut next, a.echo);
    works(&mut g, a.echo);
    for (guest, port) in [(g, first), (next, second)] {
        drop(guest);
        let (down, why) = a.net.port_down();
        assert_eq!(down, port);
        assert!(why.contains("closed the connection"), "{why}");
    }
    a.all_is_well();
}
