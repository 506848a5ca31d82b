//! Theory of operation: many networks in one process. They share threads and buffers, and nothing else: all of them have
//! the same subnet and the same guests here, and none sees anything of another.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Guest, Net, StreamLink, tcp_echo, udp_echo};
use guestnet_core::NetworkCommand;
use guestnet_io::{Event, IoError, Runtime, Value, WorkerCommand};
use guestnet_wire::ether::Mac;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

fn threads_named(name: &str) -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let named = |comm: &str| comm.trim() == name || comm.trim().starts_with(&format!("{name}-"));
    tasks
        .filter(|t| {
            let comm = t.as_ref().unwrap().path().join("comm");
            named(&std::fs::read_to_string(comm).unwrap_or_default())
        })
        .count()
}

/// Waits until so many threads have the name, which a thread gives itself.
fn until_threads(name: &str, n: usize) {
    let end = Instant::now() + common::PATIENCE;
    while threads_named(name) != n {
        assert!(Instant::now() < end, "{} threads, not {n}", threads_named(name));
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn numbered(n: usize) -> [u8; 8] {
    (n as u64).to_be_bytes()
}

#[test]
fn networks_with_the_same_subnet_are_side_by_side_and_nothing_crosses() {
    let runtime = Runtime::new("gn-same", 2);
    let nets: Vec<Net> = (0..50).map(|_| Net::on(&runtime, |_| ())).collect();
    assert_eq!(runtime.load(), (2, 50));
    until_threads("gn-same", 2);
    let mut guests: Vec<[Guest<StreamLink>; 2]> =
        nets.iter().map(|net| [net.stream_guest(1), net.stream_guest(2)]).collect();
    let (udp, tcp) = (udp_echo(), tcp_echo());
    // Each says something to all of its network, and to the outside.
    for (n, [a, b]) in guests.iter_mut().enumerate() {
        a.udp_send_to(Mac::BROADCAST, 7, SocketAddrV4::new(b.ip, 7), &numbered(n));
        a.udp_send(5000, udp, &numbered(n));
    }
    for (n, [a, b]) in guests.iter_mut().enumerate() {
        assert_eq!(a.udp_receive(5000).payload, numbered(n));
        assert_eq!(b.receive(17, 7, common::PATIENCE).unwrap().payload, numbered(n));
        let mut c = a.connect(4000, tcp).unwrap();
        assert_eq!(a.exchange(&mut c, &numbered(n), 8), numbered(n));
    }
    for (net, [a, b]) in nets.iter().zip(&mut guests) {
        // The one broadcast was all that came.
        assert!(a.receive(17, 7, Duration::ZERO).is_none() && b.receive(17, 7, Duration::ZERO).is_none());
        let Value::Flows(flows) = net.command(NetworkCommand::ListFlows) else { panic!() };
        assert_eq!(flows.len(), 2, "{flows:?}");
        let Value::Ports(ports) = net.command(NetworkCommand::PortStats) else { panic!() };
        assert_eq!(ports.len(), 2, "{ports:?}");
    }
    drop(nets);
    assert_eq!(runtime.load(), (0, 0));
    until_threads("gn-same", 0);
}

#[test]
fn networks_come_and_go_while_others_work() {
    let runtime = Runtime::new("gn-churn", 2);
    let steady: Vec<Net> = (0..4).map(|_| Net::on(&runtime, |_| ())).collect();
    let mut guests: Vec<Guest<StreamLink>> = steady.iter().map(|net| net.stream_guest(1)).collect();
    let (udp, tcp) = (udp_echo(), tcp_echo());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let busy: Vec<_> = guests
            .iter_mut()
            .map(|g| {
                let done = &done;
                scope.spawn(move || {
                    let mut c = g.connect(4000, tcp).unwrap();
                    let data = common::pattern(20_000);
                    let mut rounds = 0;
                    while !done.load(Ordering::Relaxed) || rounds == 0 {
                        assert!(g.exchange(&mut c, &data, data.len()) == data);
                        rounds += 1;
                    }
                    rounds
                })
            })
            .collect();
        // They end with flows, with frames under way, and before they had anything.
        for round in 0..30u16 {
            let net = Net::on(&runtime, |_| ());
            if round % 3 > 0 {
                let mut g = net.stream_guest(1);
                g.udp_send(5000 + round, udp, &[7; 100]);
                if round % 3 == 2 {
                    let mut c = g.connect(4000, tcp).unwrap();
                    g.exchange(&mut c, &[1; 1000], 1000);
                }
            }
            net.workers.stop();
            assert!(net.workers.has_ended());
        }
        done.store(true, Ordering::Relaxed);
        for b in busy {
            assert!(b.join().unwrap() > 0);
        }
    });
    assert!(steady.iter().all(|net| net.workers.is_healthy()));
    assert_eq!(runtime.load(), (2, 4));
}

#[test]
fn a_network_is_stopped_without_waiting_where_that_is_asked_for() {
    let runtime = Runtime::new("gn-stop", 1);
    let (one, other) = (Net::on(&runtime, |_| ()), Net::on(&runtime, |_| ()));
    let mut g = one.stream_guest(1);
    let mut c = g.connect(4000, tcp_echo()).unwrap();
    g.exchange(&mut c, b"x", 1);
    one.workers.begin_stop();
    let end = Instant::now() + common::PATIENCE;
    while !one.workers.has_ended() {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(one.workers.submit(NetworkCommand::ListFlows).is_err());
    assert_eq!(one.workers.stats().io.sockets_open, 0);
    other.command(NetworkCommand::ListFlows);
}

#[test]
fn a_network_of_several_workers_is_over_several_threads() {
    let runtime = Runtime::new("gn-wide", 3);
    let nets: Vec<Net> = (0..3).map(|_| Net::on(&runtime, |c| c.workers = 2)).collect();
    assert_eq!(runtime.load(), (3, 6));
    until_threads("gn-wide", 3);
    let udp = udp_echo();
    for net in &nets {
        let mut guests: Vec<_> = (1..=4).map(|n| net.stream_guest(n)).collect();
        for (n, g) in guests.iter_mut().enumerate() {
            g.udp_send(5000, udp, &numbered(n));
            assert_eq!(g.udp_receive(5000).payload, numbered(n));
        }
        // From a guest on one worker to one on the other.
        let (first, others) = guests.split_first_mut().unwrap();
        for g in others {
            first.udp_send_to(Mac::BROADCAST, 7, SocketAddrV4::new(g.ip, 7), b"to all");
            assert_eq!(g.receive(17, 7, common::PATIENCE).unwrap().payload, b"to all");
        }
    }
    let mut config = guestnet_io::WorkerConfig::new(guestnet_core::config::NetworkConfig::new(
        Mac([2, 0, 0, 0, 0, 1]),
        common::GATEWAY,
        (Ipv4Addr::new(192, 168, 64, 0), 24),
        [9; 32],
    ));
    config.workers = 4;
    assert!(matches!(runtime.spawn(config), Err(IoError::TooFewWorkers { wanted: 4, workers: 3 })));
    drop(nets);
    assert_eq!(runtime.load(), (0, 0));
}

#[test]
fn every_event_of_a_network_comes_before_its_end() {
    let runtime = Runtime::new("gn-last", 1);
    let nets: Vec<Net> = (0..3).map(|_| Net::on(&runtime, |_| ())).collect();
    let n = nets[1].workers.submit(WorkerCommand::Stop).unwrap();
    nets[1].wait("acknowledgement", |e| match e {
        Event::Done { sequence, .. } if *sequence == n => Some(()),
        _ => None,
    });
    nets[1].workers.stop();
    assert!(nets[0].workers.is_healthy() && !nets[1].workers.is_healthy());
    nets[2].command(NetworkCommand::ListFlows);
}
