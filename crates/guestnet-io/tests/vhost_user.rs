//! Theory of operation: vhost-user guests through a worker, with every combination of what can be agreed; and
//! front-ends and guests that lie. After each lie the worker lives, and another guest on it has its network.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::temp_dir::TempDir;
use common::vhost::message::*;
use common::vhost::*;
use common::{Guest, Link, Net, PATIENCE, StreamLink, pattern, port_config, tcp_echo, udp_echo};
use guestnet_core::NetworkCommand;
use guestnet_core::types::PortId;
use guestnet_io::{Command, CommandError, ListenKind};
use guestnet_wire::tcp::{Options, flags};
use std::fs::File;
use std::io::Read;
use std::net::SocketAddrV4;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const OFF: u64 = PLAIN;
const ALL: u64 = PLAIN | TSO | MRG | INDIRECT | EVENT_IDX;

fn attach(net: &Net, n: u32) -> (PortId, UnixStream) {
    let port = net.add_port(n);
    let (ours, theirs) = UnixStream::pair().unwrap();
    net.command(Command::AttachVhostUser { port, fd: theirs.into() });
    (port, ours)
}

fn guest(net: &Net, n: u32, shape: Shape) -> Guest<VhostLink> {
    let (_, stream) = attach(net, n);
    Guest::new(VhostLink::new(stream, shape), n as u8)
}

fn udp_works<L: Link>(g: &mut Guest<L>, echo: SocketAddrV4) {
    g.udp_send(5000, echo, b"are you there?");
    assert_eq!(g.udp_receive(5000).payload, b"are you there?");
}

fn tcp_works<L: Link>(g: &mut Guest<L>, len: usize) {
    let mut c = g.connect(4000, tcp_echo()).unwrap();
    let data = pattern(len);
    assert!(g.exchange(&mut c, &data, len) == data);
    assert!(g.close(&mut c).is_empty());
}

/// Waits until a counter says so.
fn until(net: &Net, what: &str, mut there: impl FnMut(&guestnet_io::IoCounters) -> bool) {
    let end = Instant::now() + PATIENCE;
    while !there(&net.workers.stats().io) {
        assert!(Instant::now() < end, "no {what}: {:?}", net.workers.stats().io);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A worker with an honest guest, a guest to lie with, and what must hold in the end.
struct Lies {
    net: Net,
    honest: Guest<StreamLink>,
    echo: SocketAddrV4,
    bad: u64,
}

impl Lies {
    fn new() -> Lies {
        let net = Net::new();
        let honest = net.stream_guest(1);
        Lies { net, honest, echo: udp_echo(), bad: 0 }
    }

    fn guest(&self, features: u64) -> Guest<VhostLink> {
        guest(&self.net, 2, Shape::new(features))
    }

    fn bad_frames(&mut self, n: u64) {
        self.bad += n;
        let bad = self.bad;
        until(&self.net, "bad frame", |io| io.bad_frames >= bad);
        assert_eq!(self.net.workers.stats().io.bad_frames, bad);
    }

    fn all_is_well(mut self) {
        udp_works(&mut self.honest, self.echo);
        assert!(self.net.workers.is_healthy());
    }
}

#[test]
fn nothing_agreed() {
    let net = Net::new();
    let mut g = guest(&net, 1, Shape::new(OFF));
    udp_works(&mut g, udp_echo());
    tcp_works(&mut g, 600_000);
    assert_eq!(g.link.large, 0);
}

#[test]
fn everything_agreed() {
    let net = Net::new();
    let mut g = guest(&net, 1, Shape::new(ALL));
    udp_works(&mut g, udp_echo());
    tcp_works(&mut g, 3_000_000);
    assert!(g.link.large > 0, "large frames come whole");
    assert_eq!(net.workers.stats().io.segmented_frames, 0);
}

#[test]
fn each_feature_alone_and_left_out() {
    for one in [CSUM, TSO, MRG, INDIRECT, EVENT_IDX] {
        for features in [OFF | one, if one == CSUM { ALL & !TSO } else { ALL & !(one & !CSUM) }] {
            let net = Net::new();
            let mut g = guest(&net, 1, Shape::new(features));
            udp_works(&mut g, udp_echo());
            tcp_works(&mut g, 200_000);
            assert_eq!(g.link.large > 0, features & TSO == TSO, "{features:#x}");
        }
    }
}

#[test]
fn a_legacy_driver_has_a_shorter_header() {
    let net = Net::new();
    let mut g = guest(&net, 1, Shape::new(TSO));
    udp_works(&mut g, udp_echo());
    tcp_works(&mut g, 200_000);
    assert_eq!(g.link.header_len(), 10);
}

#[test]
fn small_queues_and_buffers() {
    for (size, buffer) in [(8, 1600), (16, 700), (32, 128), (256, 300), (1024, 4096)] {
        let net = Net::new();
        let mut g = guest(&net, 1, Shape { size, buffer, ..Shape::new(ALL) });
        udp_works(&mut g, udp_echo());
        tcp_works(&mut g, 100_000);
    }
}

#[test]
fn a_guest_sends_large_frames() {
    let net = Net::new();
    let mut g = guest(&net, 1, Shape::new(ALL));
    let mut c = g.connect(4000, tcp_echo()).unwrap();
    let data = pattern(300_000);
    let mut got = Vec::new();
    for part in data.chunks(30_000) {
        g.segment_large(&c, part);
        c.snd = c.snd.wrapping_add(part.len() as u32);
        c.una = c.snd;
        got.extend(g.exchange(&mut c, &[], part.len()));
    }
    assert!(got == data);
    assert_eq!(net.workers.stats().io.bad_frames, 0);
}

#[test]
fn two_guests_reach_each_other_with_and_without_offloads() {
    for (a, b) in [(ALL, ALL), (ALL, OFF), (OFF, ALL), (OFF, OFF)] {
        let net = Net::new();
        let (mut a, mut b) = (guest(&net, 1, Shape::new(a)), guest(&net, 2, Shape::new(b)));
        let _known = (a.gateway(), b.gateway());
        let (mac, ip) = (b.mac, SocketAddrV4::new(b.ip, 77));
        a.udp_send_to(mac, 66, ip, b"hello");
        assert_eq!(b.udp_receive(77).payload, b"hello");
        // A TSO frame from one to the other arrives whole or in pieces, as the other takes it.
        if a.link.shape.features == ALL {
            let data = pattern(20_000);
            let mut f = a.tcp_to(mac, 1, ip, &data);
            let h = as_tso(&mut f, 1448);
            a.link.send_with(&h, &f);
            let mut got = Vec::new();
            while got.len() < data.len() {
                let g = b.receive(guestnet_wire::proto::TCP, 77, PATIENCE).expect("a piece");
                got.extend(g.payload);
            }
            assert!(got == data);
            assert_eq!(b.link.large, usize::from(b.link.shape.features == ALL));
        }
    }
}

#[test]
fn a_batch_is_one_notification() {
    let net = Net::new();
    for features in [ALL, OFF] {
        let n = if features == ALL { 1 } else { 3 };
        let (mut a, mut b) = (guest(&net, n, Shape::new(features)), guest(&net, n + 1, Shape::new(features)));
        let _known = (a.gateway(), b.gateway());
        let (mac, ip) = (b.mac, SocketAddrV4::new(b.ip, 77));
        a.udp_send_to(mac, 66, ip, b"first");
        b.udp_receive(77);
        let before = signals(&a.link.front.events[1][1]) + signals(&b.link.front.events[0][1]);
        let _of_before = before;
        b.link.rx.want_call(&b.link.front.memory);
        a.link.tx.want_call(&a.link.front.memory);
        // Eight frames, one kick.
        let frame = a.udp_frame(mac, 66, ip, b"one of many");
        while a.link.tx.take(&a.link.front.memory.clone()).is_some() {}
        a.link.tx.want_call(&a.link.front.memory);
        signals(&a.link.front.events[1][1]);
        for _ in 0..8 {
            let header = vec![0; a.link.header_len()];
            a.link.queue(&header, &frame);
        }
        a.link.kick(1);
        for _ in 0..8 {
            // Polled, so that the guest does not ask again in between.
            let end = Instant::now() + PATIENCE;
            let m = Arc::clone(&b.link.front.memory);
            while b.link.rx.take(&m).is_none() {
                assert!(Instant::now() < end);
                std::thread::yield_now();
            }
        }
        let end = Instant::now() + PATIENCE;
        let (mut sender, mut receiver) = (0, 0);
        while (sender == 0 || receiver == 0) && Instant::now() < end {
            sender += signals(&a.link.front.events[1][1]);
            receiver += signals(&b.link.front.events[0][1]);
        }
        assert_eq!((sender, receiver), (1, 1), "calls for eight frames, features {features:#x}");
    }
}

#[test]
fn several_queue_pairs() {
    let net = Net::new();
    let (_, stream) = attach(&net, 1);
    let mut link = VhostLink::new(stream, Shape::new(ALL | MQ));
    let second = [Queue { index: 2, at: 0x9_0000, size: 64 }, Queue { index: 3, at: 0xa_0000, size: 64 }];
    for q in &second {
        assert!(link.front.start(q, 0));
    }
    let mut g = Guest::new(link, 1);
    udp_works(&mut g, udp_echo());
    // A datagram that goes out by the second pair is answered on it.
    let m = Arc::clone(&g.link.front.memory);
    let (mut rx, mut tx) = (Driver::new(second[0]), Driver::new(second[1]));
    let at = 0xf_0000;
    rx.put_descriptor(&m, 0, descriptor(GUEST + at, 2048, F_WRITE, 0));
    rx.offer(&m, 0);
    let echo = udp_echo();
    let gateway = g.gateway();
    let frame = g.udp_frame(gateway, 6001, echo, b"by the other");
    m.write(0xe_0000, &[[0; 12].to_vec(), frame.clone()].concat());
    tx.put_descriptor(&m, 0, descriptor(GUEST + 0xe_0000, 12 + frame.len() as u32, 0, 0));
    tx.offer(&m, 0);
    g.link.kick(3);
    let end = Instant::now() + PATIENCE;
    let (_, len) = loop {
        if let Some(got) = rx.take(&m) {
            break got;
        }
        assert!(Instant::now() < end, "nothing on the second pair");
        std::thread::sleep(Duration::from_micros(100));
    };
    assert!(m.read(at as usize, len as usize).ends_with(b"by the other"));
}

#[test]
fn a_queue_that_is_stopped_goes_on_where_it_was() {
    let net = Net::new();
    let mut g = guest(&net, 1, Shape::new(ALL));
    let echo = udp_echo();
    udp_works(&mut g, echo);
    for index in [0, 1] {
        g.link.front.send(GET_VRING_BASE, 0, &words(&[index, 0]), &[]);
        let r = g.link.front.reply().unwrap();
        let base = u16::from_ne_bytes(r[4..6].try_into().unwrap());
        let (q, available) = match index {
            0 => (g.link.rx.q, g.link.rx.last_used),
            _ => (g.link.tx.q, g.link.tx.available()),
        };
        assert_eq!(base, available);
        assert!(g.link.front.start(&q, base));
    }
    udp_works(&mut g, echo);
    tcp_works(&mut g, 100_000);
}

#[test]
fn what_was_put_in_before_the_start_is_seen() {
    let net = Net::new();
    let (_, stream) = attach(&net, 1);
    let mut front = Front::new(stream);
    front.begin(OFF);
    let q = Queue { index: 1, at: 0, size: 8 };
    let mut d = Driver::new(q);
    front.memory.write(0x4000, &[0; 64]);
    d.put_descriptor(&front.memory, 0, descriptor(GUEST + 0x4000, 64, 0, 0));
    d.offer(&front.memory, 0);
    assert!(front.start(&q, 0));
    let end = Instant::now() + PATIENCE;
    while d.take(&front.memory).is_none() {
        assert!(Instant::now() < end, "not seen");
        std::thread::sleep(Duration::from_micros(100));
    }
}

#[test]
fn a_front_end_goes_and_another_comes_to_the_same_port() {
    let net = Net::new();
    let dir = TempDir::new("vhost");
    let path = dir.join("s");
    let port = net.add_port(1);
    let listener = UnixListener::bind(&path).unwrap();
    net.command(Command::AttachVhostUser { port, fd: listener.into() });
    let echo = udp_echo();
    for features in [ALL, OFF, ALL] {
        let link = VhostLink::new(UnixStream::connect(&path).unwrap(), Shape::new(features));
        let mut g = Guest::new(link, 1);
        udp_works(&mut g, echo);
    }
}

#[test]
fn guests_of_a_listener_come_and_go() {
    let net = Net::new();
    let dir = TempDir::new("vhosts");
    let path = dir.join("s");
    let fd = UnixListener::bind(&path).unwrap().into();
    net.command(Command::Listen { listener: 5, kind: ListenKind::VhostUser, fd, template: port_config() });
    let come = |n| {
        let link = VhostLink::new(UnixStream::connect(&path).unwrap(), Shape::new(ALL));
        (Guest::new(link, n), net.port_up().0)
    };
    let echo = udp_echo();
    let (mut a, first) = come(1);
    let (mut b, second) = come(2);
    udp_works(&mut a, echo);
    udp_works(&mut b, echo);
    drop(a);
    assert_eq!(net.port_down().0, first);
    let (mut c, third) = come(3);
    udp_works(&mut b, echo);
    udp_works(&mut c, echo);
    assert!(first != second && second != third && first != third);
}

#[test]
fn a_socket_of_another_kind_is_refused() {
    let net = Net::new();
    let port = net.add_port(1);
    for fd in [eventfd(), std::net::TcpListener::bind("127.0.0.1:0").unwrap().into()] {
        let e = net.try_command(Command::AttachVhostUser { port, fd });
        assert!(matches!(e, Err(CommandError::BadDescriptor(_))), "{e:?}");
    }
}

// ---- lies of the guest ------------------------------------------------------------------------------------

/// Puts a chain by hand in the queue of frames from the guest, and waits until it came back.
fn lie(g: &mut Guest<VhostLink>, descriptors: &[(u16, [u8; 16])], head: u16) {
    let m = Arc::clone(&g.link.front.memory);
    while g.link.tx.take(&m).is_some() {}
    for (i, d) in descriptors {
        g.link.tx.put_descriptor(&m, *i, *d);
    }
    g.link.tx.offer(&m, head);
    g.link.kick(1);
    let end = Instant::now() + PATIENCE;
    while g.link.tx.take(&m).is_none() {
        assert!(Instant::now() < end, "the chain does not come back");
        std::thread::sleep(Duration::from_micros(100));
    }
}

const PLACE: u64 = GUEST + 0xf_0000;

#[test]
fn a_chain_that_is_a_loop() {
    let mut l = Lies::new();
    let mut g = l.guest(OFF);
    let d = |next| descriptor(PLACE, 1, F_NEXT, next);
    lie(&mut g, &[(100, d(101)), (101, d(100))], 100);
    l.bad_frames(1);
    // Of nothing, which adds up to nothing.
    let d = |next| descriptor(PLACE, 0, F_NEXT, next);
    lie(&mut g, &[(100, d(100))], 100);
    l.bad_frames(1);
    udp_works(&mut g, l.echo);
    l.all_is_well();
}

#[test]
fn a_chain_that_leads_out_of_the_table() {
    let mut l = Lies::new();
    let mut g = l.guest(OFF);
    for next in [256, 257, 0xffff] {
        lie(&mut g, &[(100, descriptor(PLACE, 12, F_NEXT, next))], 100);
        l.bad_frames(1);
    }
    udp_works(&mut g, l.echo);
    l.all_is_well();
}

#[test]
fn buffers_that_are_not_memory() {
    let mut l = Lies::new();
    let mut g = l.guest(OFF);
    let end = GUEST + MEMORY as u64;
    for (addr, len) in [
        (0, 64),
        (GUEST - 1, 64),
        (end, 64),
        (end - 63, 64),
        (u64::MAX, 64),
        (u64::MAX - 20, 64),
        (GUEST, u32::MAX),
        (USER, 64),
    ] {
        lie(&mut g, &[(100, descriptor(addr, len, 0, 0))], 100);
        l.bad_frames(1);
    }
    udp_works(&mut g, l.echo);
    l.all_is_well();
}

#[test]
fn frames_of_no_length_and_of_too_much() {
    let mut l = Lies::new();
    let mut g = l.guest(OFF);
    for len in [0, 1, 11, 65536 + 128 + 13, MEMORY as u32 - 0xf_0000] {
        lie(&mut g, &[(100, descriptor(PLACE, len, 0, 0))], 100);
        l.bad_frames(1);
    }
    udp_works(&mut g, l.echo);
    l.all_is_well();
}

#[test]
fn buffers_to_write_in_a_queue_to_read() {
    let mut l = Lies::new();
    let mut g = l.guest(OFF);
    lie(&mut g, &[(100, descriptor(PLACE, 64, F_WRITE, 0))], 100);
    let two = [(100, descriptor(PLACE, 12, F_NEXT, 101)), (101, descriptor(PLACE, 60, F_WRITE, 0))];
    lie(&mut g, &two, 100);
    l.bad_frames(2);
    udp_works(&mut g, l.echo);
    l.all_is_well();
}

#[test]
fn indirect_tables_that_are_none() {
    let mut l = Lies::new();
    let mut g = l.guest(PLAIN | INDIRECT);
    let m = Arc::clone(&g.link.front.memory);
    let table = |i: u64, d: [u8; 16]| m.write(0xe_0000 + 16 * i as usize, &d);
    let at = GUEST + 0xe_0000;
    // A table in a table; one that leads to itself; one that leads out; a length that is none.
    table(0, descriptor(at, 32, F_INDIRECT, 0));
    table(1, descriptor(PLACE, 1, F_NEXT, 1));
    table(2, descriptor(PLACE, 1, F_NEXT, 99));
    let end = GUEST + MEMORY as u64;
    for (addr, len, flags) in [
        (at, 16, F_INDIRECT),
        (at + 16, 16, F_INDIRECT),
        (at + 16, 32, F_INDIRECT),
        (at + 32, 48, F_INDIRECT),
        (at, 0, F_INDIRECT),
        (at, 17, F_INDIRECT),
        (at, 16 * 1025, F_INDIRECT),
        (at, !15, F_INDIRECT),
        (end - 8, 16, F_INDIRECT),
        (u64::MAX - 15, 32, F_INDIRECT),
        (at, 16, F_INDIRECT | F_NEXT),
    ] {
        lie(&mut g, &[(100, descriptor(addr, len, flags, 101))], 100);
        l.bad_frames(1);
    }
    // At any address, though: tables need no alignment.
    m.write(0xe_1001, &descriptor(PLACE, 64, 0, 0));
    lie(&mut g, &[(100, descriptor(GUEST + 0xe_1001, 16, F_INDIRECT, 0))], 100);
    udp_works(&mut g, l.echo);
    assert_eq!(l.net.workers.stats().io.bad_frames, l.bad);
    l.all_is_well();
}

#[test]
fn an_indirect_table_that_changes_while_it_is_read() {
    let mut l = Lies::new();
    let mut g = l.guest(PLAIN | INDIRECT);
    let m = Arc::clone(&g.link.front.memory);
    let done = Arc::new(AtomicBool::new(false));
    let changer = {
        let (m, done) = (Arc::clone(&m), Arc::clone(&done));
        std::thread::spawn(move || {
            let lies = [
                descriptor(PLACE, 30, F_NEXT, 1),
                descriptor(u64::MAX, u32::MAX, F_NEXT, 0xffff),
                descriptor(PLACE, 0, F_NEXT, 0),
                descriptor(GUEST, 70_000, F_WRITE | F_INDIRECT, 3),
                descriptor(PLACE, 60, 0, 0),
            ];
            let mut i = 0usize;
            while !done.load(Ordering::Relaxed) {
                m.write(0xe_0000 + 16 * (i % 3), &lies[i * 7 % lies.len()]);
                i += 1;
            }
        })
    };
    for _ in 0..2000 {
        lie(&mut g, &[(100, descriptor(GUEST + 0xe_0000, 48, F_INDIRECT, 0))], 100);
    }
    done.store(true, Ordering::Relaxed);
    changer.join().unwrap();
    udp_works(&mut g, l.echo);
    l.bad = l.net.workers.stats().io.bad_frames;
    l.all_is_well();
}

#[test]
fn headers_that_lie() {
    let mut l = Lies::new();
    let mut g = l.guest(ALL);
    let frame = vec![0x55; 100];
    let header = |flags: u8, kind: u8, size: u16, start: u16, offset: u16| {
        let mut h = vec![flags, kind, 0xff, 0xff];
        for v in [size, start, offset, 0] {
            h.extend_from_slice(&v.to_le_bytes());
        }
        h
    };
    let lies = [
        // The checksum field outside the frame, no size to cut to, a kind that nobody knows or offered.
        header(1, 0, 0, 90, 20),
        header(1, 0, 0, 0xffff, 0xffff),
        header(1, 1, 0, 34, 16),
        header(1, 3, 100, 34, 16),
        header(1, 5, 100, 34, 6),
        header(1, 0x7f, 100, 34, 16),
    ];
    for h in &lies {
        g.link.send_with(h, &frame);
    }
    l.bad_frames(lies.len() as u64);
    udp_works(&mut g, l.echo);
    // Nothing was agreed: neither are partial checksums or large frames.
    let mut plain = guest(&l.net, 3, Shape::new(OFF));
    plain.link.send_with(&header(1, 0, 0, 34, 16), &frame);
    plain.link.send_with(&header(1, 1, 1000, 34, 16), &frame);
    l.bad_frames(2);
    udp_works(&mut plain, l.echo);
    l.all_is_well();
}

#[test]
fn large_frames_with_lying_headers_inside() {
    let mut l = Lies::new();
    let mut g = l.guest(ALL);
    let echo = tcp_echo();
    let mut c = g.connect(4000, echo).unwrap();
    for (at, value) in [(14, 0x4f), (16, 0xff), (46, 0xff), (46, 0), (23, 17)] {
        let gateway = g.gateway();
        let mut f = g.tcp_to(gateway, 4000, echo, &[7; 9000]);
        let h = as_tso(&mut f, 1448);
        f[at] = value;
        g.link.send_with(&h, &f);
    }
    let data = pattern(50_000);
    assert!(g.exchange(&mut c, &data, data.len()) == data);
    udp_works(&mut g, l.echo);
    l.bad = l.net.workers.stats().io.bad_frames;
    l.all_is_well();
}

#[test]
fn an_index_that_jumps_stops_the_queue_alone() {
    let l = Lies::new();
    let mut g = l.guest(ALL);
    udp_works(&mut g, l.echo);
    let m = Arc::clone(&g.link.front.memory);
    let now = g.link.tx.available();
    m.word(g.link.tx.q.avail() + 2).store(now.wrapping_add(257), Ordering::Release);
    g.link.kick(1);
    let err = &g.link.front.events[1][2];
    let end = Instant::now() + PATIENCE;
    while signals(err) == 0 {
        assert!(Instant::now() < end, "nobody says that the queue is broken");
        std::thread::sleep(Duration::from_micros(100));
    }
    // It can be set going again, as by a driver that starts anew.
    m.word(g.link.tx.q.avail() + 2).store(now, Ordering::Release);
    let q = g.link.tx.q;
    assert!(g.link.front.start(&q, now));
    udp_works(&mut g, l.echo);
    l.all_is_well();
}

#[test]
fn a_head_outside_the_table_stops_the_queue() {
    let l = Lies::new();
    let mut g = l.guest(ALL);
    let m = Arc::clone(&g.link.front.memory);
    g.link.tx.offer(&m, 256);
    g.link.kick(1);
    let end = Instant::now() + PATIENCE;
    while signals(&g.link.front.events[1][2]) == 0 {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_micros(100));
    }
    l.all_is_well();
}

#[test]
fn receive_buffers_that_are_none_stop_that_queue() {
    for (flags, addr, len) in [(0, PLACE, 2000), (F_WRITE, 0, 2000), (F_WRITE | F_NEXT, PLACE, 0)] {
        let mut l = Lies::new();
        let (_, stream) = attach(&l.net, 2);
        let mut front = Front::new(stream);
        front.begin(ALL);
        let (rx, tx) = (Queue { index: 0, at: 0, size: 8 }, Queue { index: 1, at: 0x8_0000, size: 8 });
        let mut d = Driver::new(rx);
        d.put_descriptor(&front.memory, 0, descriptor(addr, len, flags, 0));
        d.offer(&front.memory, 0);
        assert!(front.start(&rx, 0) && front.start(&tx, 0));
        // A broadcast of the honest guest comes to this one too.
        let nobody = SocketAddrV4::new([192, 168, 64, 255].into(), 9);
        l.honest.udp_send_to(guestnet_wire::ether::Mac::BROADCAST, 9, nobody, b"anybody?");
        let end = Instant::now() + PATIENCE;
        while signals(&front.events[0][2]) == 0 {
            assert!(Instant::now() < end, "{flags} {addr:#x}");
            std::thread::sleep(Duration::from_micros(100));
        }
        l.all_is_well();
    }
}

#[test]
fn a_guest_that_gives_no_buffers_holds_up_nobody() {
    let mut l = Lies::new();
    let mut g = l.guest(ALL);
    let echo = tcp_echo();
    let c = g.connect(4000, echo).unwrap();
    // It asks for a lot and takes nothing.
    for _ in 0..20 {
        g.segment(&c, flags::ACK, &Options::default(), &[1; 1400]);
    }
    for _ in 0..20 {
        udp_works(&mut l.honest, l.echo);
    }
    l.all_is_well();
}

#[test]
fn kicks_without_end_keep_nobody_waiting() {
    let mut l = Lies::new();
    let g = l.guest(ALL);
    let done = Arc::new(AtomicBool::new(false));
    let kicker = {
        let (kick, done) = (g.link.front.events[1][0].try_clone().unwrap(), Arc::clone(&done));
        std::thread::spawn(move || {
            while !done.load(Ordering::Relaxed) {
                signal(&kick);
            }
        })
    };
    for _ in 0..50 {
        udp_works(&mut l.honest, l.echo);
    }
    done.store(true, Ordering::Relaxed);
    kicker.join().unwrap();
    l.all_is_well();
}

#[test]
fn a_queue_that_is_not_enabled_is_emptied_and_nothing_comes_of_it() {
    let mut l = Lies::new();
    let mut g = l.guest(OFF);
    g.gateway();
    assert!(g.link.front.tell(SET_VRING_ENABLE, &words(&[1, 0]), &[]));
    let gateway = g.gateway();
    let frame = g.udp_frame(gateway, 5000, l.echo, b"unheard");
    g.link.send(&frame);
    l.bad_frames(1);
    assert!(g.link.front.tell(SET_VRING_ENABLE, &words(&[1, 1]), &[]));
    // Else the answer to the first would be there before this one's.
    udp_works(&mut g, l.echo);
    l.all_is_well();
}

// ---- lies of the front-end --------------------------------------------------------------------------------

fn front(l: &Lies) -> Front {
    let (_, stream) = attach(&l.net, 2);
    Front::new(stream)
}

/// Each time that a front-end says that a queue runs, it is looked at; but once for all that it says at once,
/// or it would have as many batches before the others have their turn.
#[test]
fn a_queue_that_is_enabled_many_times_is_looked_at_once() {
    let l = Lies::new();
    let mut f = front(&l);
    f.begin(OFF | PROTOCOL);
    let q = Queue { index: 1, at: 0, size: 8 };
    assert!(f.start(&q, 0));
    let settled = |commands: u64| {
        l.net.command(NetworkCommand::PortStats);
        until(&l.net, "command", |io| io.commands >= commands);
        l.net.workers.stats().io
    };
    let before = settled(l.net.workers.stats().io.commands + 1);
    let mut message = words(&[SET_VRING_ENABLE, 1, 8]);
    message.extend(words(&[1, 1]));
    f.raw(&message.repeat(30), &[]);
    f.ask(GET_FEATURES, &[]);
    let after = settled(before.commands + 1);
    let looks = after.batch_histogram[0] - before.batch_histogram[0];
    assert!((1..=3).contains(&looks), "looked at {looks} times");
}

#[test]
fn queues_of_no_size_and_of_any_other() {
    let l = Lies::new();
    let mut f = front(&l);
    f.begin(ALL);
    for size in [0, 3, 255, 32769, 65536, u32::MAX] {
        assert!(!f.tell(SET_VRING_NUM, &words(&[0, size]), &[]), "{size}");
    }
    for size in [1, 32768] {
        assert!(f.tell(SET_VRING_NUM, &words(&[0, size]), &[]), "{size}");
    }
    assert!(f.start(&Queue { index: 1, at: 0, size: 32768 }, 0), "the largest there is");
    // Without a size, without addresses.
    assert!(!f.tell(SET_VRING_KICK, &longs(&[2]), &[eventfd().as_raw_fd()]));
    l.all_is_well();
}

#[test]
fn queues_that_there_are_not() {
    let l = Lies::new();
    for request in [SET_VRING_NUM, SET_VRING_BASE, SET_VRING_ENABLE] {
        let mut f = front_of(&l.net, 20 + request);
        f.begin(ALL);
        for index in [16, 255, u32::MAX] {
            assert!(!f.tell(request, &words(&[index, 1]), &[]));
        }
        assert!(!f.tell(SET_VRING_CALL, &longs(&[16]), &[eventfd().as_raw_fd()]));
        assert!(!f.tell(SET_VRING_KICK, &longs(&[255]), &[eventfd().as_raw_fd()]));
        let addr = [words(&[99, 0]), longs(&[USER, USER, USER, 0])].concat();
        assert!(!f.tell(SET_VRING_ADDR, &addr, &[]));
    }
    l.all_is_well();
}

fn front_of(net: &Net, n: u32) -> Front {
    Front::new(attach(net, n).1)
}

#[test]
fn rings_that_are_not_in_memory() {
    let l = Lies::new();
    let mut f = front(&l);
    f.begin(ALL);
    let end = USER + MEMORY as u64;
    let good = USER + 0x1000;
    for (desc, used, avail) in [
        (0, good, good),
        (good, 0, good),
        (good, good, 0),
        (GUEST, good, good),
        (end - 16, good, good),
        (good, end - 8, good),
        (good, good, end - 4),
        (u64::MAX - 7, good, good),
        (good + 8, good, good),
        (good, good + 2, good),
        (good, good, good + 1),
    ] {
        assert!(f.tell(SET_VRING_NUM, &words(&[0, 256]), &[]));
        assert!(f.tell(SET_VRING_ADDR, &[words(&[0, 0]), longs(&[desc, used, avail, 0])].concat(), &[]));
        let kick = eventfd();
        assert!(!f.tell(SET_VRING_KICK, &longs(&[0]), &[kick.as_raw_fd()]), "{desc:#x} {used:#x} {avail:#x}");
    }
    l.all_is_well();
}

#[test]
fn memory_that_overlaps_wraps_or_is_not_there() {
    let l = Lies::new();
    let mut f = front(&l);
    f.begin(ALL);
    let m = MEMORY as u64;
    let r = Front::region;
    let lies: Vec<Vec<Vec<u8>>> = vec![
        vec![r(GUEST, 8192, USER, 0), r(GUEST + 4096, 8192, USER + 0x10_0000, 0)],
        vec![r(GUEST, 8192, USER, 0), r(0, 8192, USER + 8191, 0)],
        vec![r(GUEST, 4096, USER, 0), r(GUEST, 4096, USER, 0)],
        vec![r(GUEST, 0, USER, 0)],
        vec![r(u64::MAX, 4096, USER, 0)],
        vec![r(GUEST, 4096, u64::MAX - 1, 0)],
        vec![r(GUEST, 4096, USER, u64::MAX)],
        vec![r(GUEST, u64::MAX, USER, 0)],
        vec![r(GUEST, m + 1, USER, 0)],
        vec![r(GUEST, 4096, USER, m)],
        vec![r(GUEST, 1 << 62, USER, 0)],
    ];
    for table in &lies {
        let fds = vec![f.memory.fd.as_raw_fd(); table.len()];
        assert!(!f.tell(SET_MEM_TABLE, &Front::table(table), &fds), "{table:?}");
    }
    // What was there before still is.
    assert!(f.start(&Queue { index: 1, at: 0, size: 8 }, 0));
    // A file that somebody may keep from being read.
    let file = File::open(env!("CARGO_MANIFEST_PATH")).unwrap();
    let readonly = Front::table(&[r(GUEST, 16, USER, 0)]);
    assert!(!f.tell(SET_MEM_TABLE, &readonly, &[file.as_raw_fd()]));
    assert!(!f.tell(SET_MEM_TABLE, &readonly, &[eventfd().as_raw_fd()]));
    l.all_is_well();
}

#[test]
fn regions_side_by_side_are_one_memory() {
    let net = Net::new();
    let (_, stream) = attach(&net, 1);
    let mut f = Front::new(stream);
    f.begin(ALL);
    // In eight parts, swapped about for the front-end; buffers cross from one to the next.
    let part = MEMORY as u64 / 8;
    let table: Vec<_> =
        (0..8).map(|i| Front::region(GUEST + i * part, part, USER + i * part, i * part)).collect();
    let fds = vec![f.memory.fd.as_raw_fd(); 8];
    assert!(f.tell(SET_MEM_TABLE, &Front::table(&table), &fds));
    let mut g = Guest::new(VhostLink::on(f, Shape::new(ALL)), 1);
    tcp_works(&mut g, 500_000);
}

#[test]
fn memory_that_vanishes_stops_its_queues() {
    let l = Lies::new();
    let mut g = l.guest(ALL);
    udp_works(&mut g, l.echo);
    // The queues are in the first megabyte.
    let table = Front::table(&[Front::region(GUEST + (1 << 20), 1 << 20, USER + (1 << 20), 1 << 20)]);
    let fd = g.link.front.memory.fd.as_raw_fd();
    assert!(g.link.front.tell(SET_MEM_TABLE, &table, &[fd]));
    assert!(signals(&g.link.front.events[0][2]) > 0 && signals(&g.link.front.events[1][2]) > 0);
    g.link.kick(1);
    assert!(g.link.front.tell(SET_MEM_TABLE, &Front::table(&[]), &[]));
    l.all_is_well();
}

#[test]
fn memory_is_exchanged_under_a_running_queue() {
    let net = Net::new();
    let mut g = guest(&net, 1, Shape::new(ALL));
    let echo = udp_echo();
    udp_works(&mut g, echo);
    let more = memfd(1 << 20);
    let table =
        Front::table(&[Front::region(0, 1 << 20, 0x1000, 0), Front::region(GUEST, MEMORY as u64, USER, 0)]);
    for _ in 0..3 {
        let fds = [more.as_raw_fd(), g.link.front.memory.fd.as_raw_fd()];
        assert!(g.link.front.tell(SET_MEM_TABLE, &table, &fds));
        udp_works(&mut g, echo);
    }
    tcp_works(&mut g, 100_000);
}

#[test]
fn a_file_that_is_cut_off_costs_only_its_own_guest() {
    let l = Lies::new();
    let mut g = l.guest(ALL);
    udp_works(&mut g, l.echo);
    let memory = File::from(g.link.front.memory.fd.try_clone().unwrap());
    memory.set_len(0).unwrap();
    g.link.kick(1);
    let (_, why) = l.net.port_down();
    assert!(why.contains("taken away"), "{why}");
    assert!(g.link.front.is_over());
    l.all_is_well();
}

#[test]
fn messages_that_are_none() {
    let l = Lies::new();
    let lies: Vec<(&str, Vec<u8>)> = vec![
        ("too long", words(&[GET_FEATURES, 1, 100_000])),
        ("too long by far", words(&[GET_FEATURES, 1, u32::MAX])),
        ("another version", words(&[GET_FEATURES, 2, 0])),
        ("a reply", words(&[GET_FEATURES, 5, 0])),
        ("nothing that exists", words(&[4711, 1, 0])),
        ("a body too short", words(&[SET_FEATURES, 1, 4, 0])),
        ("a body too long", words(&[SET_VRING_NUM, 1, 12, 0, 0, 0])),
        ("a table of nine", [words(&[SET_MEM_TABLE, 1, 8, 9, 0])].concat()),
        ("regions without files", [words(&[SET_MEM_TABLE, 1, 40, 1, 0]), longs(&[0; 4])].concat()),
        ("a kick without its descriptor", [words(&[SET_VRING_KICK, 1, 8]), longs(&[0])].concat()),
        ("features nobody offered", [words(&[SET_FEATURES, 1, 8]), longs(&[u64::MAX])].concat()),
        ("others", [words(&[SET_PROTOCOL_FEATURES, 1, 8]), longs(&[1 << 40])].concat()),
    ];
    for (i, (what, bytes)) in lies.iter().enumerate() {
        let mut f = front_of(&l.net, 50 + i as u32);
        f.raw(bytes, &[]);
        assert!(f.is_over(), "{what}");
    }
    l.all_is_well();
}

#[test]
fn more_descriptors_than_there_may_be() {
    let l = Lies::new();
    for n in [9, 40, 60] {
        let mut f = front_of(&l.net, 50 + n);
        let fds: Vec<OwnedFd> = (0..n).map(|_| eventfd()).collect();
        let raw: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        f.raw(&words(&[GET_FEATURES, 1, 0]), &raw);
        assert!(f.is_over(), "{n}");
    }
    // One where none belongs, or two where one does.
    let mut f = front_of(&l.net, 120);
    let fd = eventfd();
    f.send(SET_VRING_KICK, 0, &longs(&[0x100]), &[fd.as_raw_fd()]);
    assert!(f.is_over());
    let mut f = front_of(&l.net, 121);
    f.send(SET_VRING_CALL, 0, &longs(&[0]), &[fd.as_raw_fd(), fd.as_raw_fd()]);
    assert!(f.is_over());
    l.all_is_well();
}

#[test]
fn a_kick_that_cannot_be_watched() {
    let l = Lies::new();
    let mut f = front(&l);
    f.begin(ALL);
    assert!(f.tell(SET_VRING_NUM, &words(&[0, 256]), &[]));
    let file = File::open(env!("CARGO_MANIFEST_PATH")).unwrap();
    assert!(!f.tell(SET_VRING_KICK, &longs(&[0]), &[file.as_raw_fd()]));
    l.all_is_well();
}

#[test]
fn half_a_message_keeps_nobody_waiting() {
    let mut l = Lies::new();
    let mut f = front(&l);
    let whole = words(&[GET_FEATURES, 1, 0]);
    for (i, b) in whole.iter().enumerate() {
        f.raw(&[*b], &[]);
        if i % 4 == 0 {
            udp_works(&mut l.honest, l.echo);
        }
    }
    assert_eq!(f.reply().unwrap().len(), 8);
    f.raw(&words(&[SET_FEATURES, 1, 8, 0]), &[]);
    udp_works(&mut l.honest, l.echo);
    f.raw(&words(&[1]), &[]);
    assert!(f.ask(GET_FEATURES, &[]) & V1 != 0);
    l.all_is_well();
}

#[test]
fn a_front_end_that_reads_no_replies_is_given_up() {
    let l = Lies::new();
    let f = front(&l);
    f.stream.set_nonblocking(true).unwrap();
    let ask = words(&[GET_FEATURES, 1, 0]);
    let end = Instant::now() + PATIENCE;
    let over = loop {
        use std::io::Write;
        match (&f.stream).write(&ask) {
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => std::thread::yield_now(),
            Err(_) => break true,
        }
        if Instant::now() > end {
            break false;
        }
    };
    assert!(over);
    // What it was sent is still there to be read, and then the end.
    f.stream.set_nonblocking(false).unwrap();
    let mut rest = Vec::new();
    let _reset = (&f.stream).read_to_end(&mut rest);
    l.all_is_well();
}

#[test]
fn rings_started_twice_and_changed_while_they_run() {
    let l = Lies::new();
    let mut g = l.guest(ALL);
    udp_works(&mut g, l.echo);
    let tx = g.link.tx.q;
    let front = &mut g.link.front;
    assert!(!front.tell(SET_VRING_NUM, &words(&[1, 8]), &[]), "the size of a queue that runs");
    assert!(!front.tell(SET_VRING_BASE, &words(&[1, 8]), &[]), "its place");
    // Another kick, and the same addresses again.
    let kick = eventfd();
    assert!(front.tell(SET_VRING_KICK, &longs(&[1]), &[kick.as_raw_fd()]));
    assert!(front.tell(SET_VRING_ADDR, &Front::address(&tx), &[]));
    front.events[1][0] = kick;
    udp_works(&mut g, l.echo);
    l.all_is_well();
}
