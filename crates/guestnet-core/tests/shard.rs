//! Theory of operation: a network whose ports are on two cores that hear of each other late. Guests say that they
//! have each other's MACs and addresses; when all news has come, no two ports have the same.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/net.rs"]
mod net;

use common::Mock;
use guestnet_core::Network;
use guestnet_core::shard::PeerUpdate;
use guestnet_core::types::{FrameMeta, PortConfig, PortId, Time};
use guestnet_wire::arp;
use guestnet_wire::ether::Mac;
use net::*;
use proptest::prelude::*;
use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;

/// Ports, two on each core.
const PORTS: u32 = 4;

#[derive(Debug, Clone)]
enum Op {
    /// The guest announces an address, from a MAC.
    Say {
        port: u32,
        mac: u8,
        ip: u8,
    },
    /// Some of what one core has told reaches the other.
    Hear {
        to: usize,
        count: usize,
    },
    /// The control side gives an address.
    Bind {
        port: u32,
        ip: u8,
    },
    Unbind {
        ip: u8,
    },
    /// It comes anew, with a MAC that the control side knows or without; nobody else is given that one.
    Replug {
        port: u32,
        mac: bool,
    },
    /// What the control side knew of one is another's from now on.
    Move {
        from: u32,
        to: u32,
    },
    Pass(u64),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (1..=PORTS, 0u8..6, 0u8..8).prop_map(|(port, mac, ip)| Op::Say { port, mac, ip }),
        4 => (0usize..2, 1usize..5).prop_map(|(to, count)| Op::Hear { to, count }),
        2 => (1..=PORTS, 0u8..8).prop_map(|(port, ip)| Op::Bind { port, ip }),
        1 => (0u8..8).prop_map(|ip| Op::Unbind { ip }),
        1 => (1..=PORTS, any::<bool>()).prop_map(|(port, mac)| Op::Replug { port, mac }),
        1 => (1..=PORTS, 1..=PORTS).prop_map(|(from, to)| Op::Move { from, to }),
        1 => prop_oneof![Just(1000u64), Just(70_000), Just(400_000)].prop_map(Op::Pass),
    ]
}

struct World {
    cores: Vec<Network>,
    fx: Vec<Mock>,
    /// What is on its way to each core.
    late: Vec<VecDeque<PeerUpdate>>,
    /// MACs that the control side gave, by port.
    given: BTreeMap<u32, u8>,
    now: Time,
}

fn host(port: u32) -> usize {
    port as usize % 2
}

fn mac_of(n: u8) -> Mac {
    Mac([2, 0, 0, 0, 9, n])
}

fn ip_of(n: u8) -> IpAddr {
    IpAddr::from([192, 168, 64, 20 + n])
}

impl World {
    fn new() -> World {
        let now = Time(1_000_000_000);
        let mut cores: Vec<Network> = (0..2).map(|_| Network::new(config(), now)).collect();
        for core in &mut cores {
            core.share(2);
            core.take_peer_updates(100, &mut Vec::new());
        }
        let fx = vec![Mock::new(), Mock::new()];
        let mut world = World { cores, fx, late: vec![VecDeque::new(); 2], given: BTreeMap::new(), now };
        for port in 1..=PORTS {
            world.plug(port);
        }
        world
    }

    fn plug(&mut self, port: u32) {
        let config = PortConfig { mac: self.given.get(&port).map(|n| mac_of(*n)), ..port_config() };
        self.cores[host(port)].add_port(PortId(port), config).unwrap();
        self.tell(host(port));
    }

    fn unplug(&mut self, port: u32) {
        self.given.remove(&port);
        let to = host(port);
        self.cores[to].remove_port(self.now, PortId(port), &mut self.fx[to]);
        self.tell(to);
    }

    fn tell(&mut self, from: usize) {
        let mut news = Vec::new();
        self.cores[from].take_peer_updates(100, &mut news);
        self.late[1 - from].extend(news);
    }

    fn hear(&mut self, to: usize, count: usize) {
        for _ in 0..count {
            let Some(news) = self.late[to].pop_front() else { return };
            self.cores[to].peer_update(self.now, 1 - to as u16, news, &mut self.fx[to]);
            self.tell(to);
        }
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Say { port, mac, ip } => {
                let (IpAddr::V4(ip), to) = (ip_of(ip), host(port)) else { return };
                let mut frame = arp_frame(arp::REQUEST, mac_of(mac), ip, Mac::BROADCAST, ip);
                let fx = &mut self.fx[to];
                self.cores[to].frame(self.now, PortId(port), &mut frame, FrameMeta::default(), fx);
                self.tell(to);
            }
            Op::Hear { to, count } => self.hear(to, count),
            Op::Bind { port, ip } => {
                let _taken = self.cores[host(port)].bind_address(PortId(port), ip_of(ip), None);
                self.tell(host(port));
            }
            Op::Unbind { ip } => {
                for to in 0..2 {
                    self.cores[to].unbind_address(self.now, ip_of(ip), &mut self.fx[to]);
                    self.tell(to);
                }
            }
            Op::Replug { port, mac } => {
                self.unplug(port);
                let free = (0..6).find(|n| self.given.values().all(|g| g != n));
                if let Some(n) = free.filter(|_| mac) {
                    self.given.insert(port, n);
                }
                self.plug(port);
            }
            Op::Move { from, to } if from != to => {
                let given = self.given.get(&from).copied();
                for port in [from, to] {
                    self.unplug(port);
                }
                if let Some(n) = given {
                    self.given.insert(to, n);
                }
                for port in [from, to] {
                    self.plug(port);
                }
            }
            Op::Move { .. } => {}
            Op::Pass(ms) => self.now = self.now.plus_ms(ms),
        }
    }

    fn settle(&mut self) {
        for _ in 0..10_000 {
            if self.late.iter().all(VecDeque::is_empty) {
                return;
            }
            self.hear(0, 1);
            self.hear(1, 1);
        }
        panic!("the cores never agree: {:?}", self.late);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    #[test]
    fn when_all_is_heard_nobody_has_what_another_has(ops in proptest::collection::vec(op(), 1..60)) {
        let mut world = World::new();
        world.settle();
        for op in ops {
            world.step(op);
        }
        world.settle();
        let (mut macs, mut ips) = (BTreeMap::new(), BTreeMap::new());
        for p in world.cores.iter().flat_map(Network::ports) {
            if let Some(mac) = p.mac {
                prop_assert_eq!(macs.insert(mac, p.port), None, "{} of {:?}", mac, p.port);
            }
            if let Some(n) = world.given.get(&p.port.0) {
                prop_assert_eq!(p.mac, Some(mac_of(*n)), "{:?} has lost what it was given", p.port);
            }
            for ip in p.addresses {
                prop_assert_eq!(ips.insert(ip, p.port), None, "{} of {:?}", ip, p.port);
            }
        }
        for core in &world.cores {
            prop_assert_eq!(core.audit(), Ok(()));
        }
    }
}
