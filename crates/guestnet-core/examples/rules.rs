//! Theory of operation: what rules cost, printed as a table (`make bench-rules`):
//!
//! - a decision about a new flow, with 10 and with 10,000 rules (half prefixes, half names), against none. Each decision is
//!   about another address; every other one is about a guest that got the address for a name;
//! - opening a whole UDP flow with the same rules;
//! - a change of 10,000 rules while 100,000 flows run, half of which the new rules forbid: until the last one is cut, and the
//!   longest time that the packet thread was stopped;
//! - compiling 10,000 and 100,000 rules, and the memory of a pinned name.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "hotpaths.rs"]
#[allow(dead_code)]
mod hotpaths;

use guestnet_core::NetworkConfig;
use guestnet_core::policy::pins::{PER_GUEST, Pins};
use guestnet_core::policy::spec::{
    Action, Destination, Name, NameMatch, NamePattern, Net as Prefix, PolicyOptions, PolicySpec,
    RuleDirection, RuleSpec,
};
use guestnet_core::policy::table::RuleTable;
use guestnet_core::policy::{Direction, Evidence, Policy, Request, Shown, Verdict};
use guestnet_core::types::{FrameMeta, PortConfig, PortId, Time};
use guestnet_wire::{proto, put};
use hotpaths::*;
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

const COUNTS: [usize; 3] = [0, 10, 10_000];
const DECISIONS: usize = 200_000;
const ROUNDS: usize = 7;
const FLOWS: usize = 100_000;
const PORTS: usize = 10;

fn address_of(number: usize) -> Ipv4Addr {
    // 24 bits of 32.0.0.0/8 in an order that no cache likes.
    Ipv4Addr::from_bits(0x2000_0000 | (number as u32).wrapping_mul(0x9e37_79b1) >> 8)
}

fn rule(label: String, action: Action, destination: Destination) -> RuleSpec {
    RuleSpec {
        label: label.into(),
        action,
        direction: RuleDirection::Out,
        endpoints: None,
        from: Vec::new(),
        destination,
        ports: Vec::new(),
        by: NameMatch::Conversation,
        log: false,
        limit: None,
        all_query_types: false,
    }
}

fn name(number: usize) -> String {
    format!("host{number}.example{}.test", number % 97)
}

/// Half of the rules are about /24 prefixes, half about names.
fn rules(count: usize, default: Action) -> PolicySpec {
    let rules = (0..count).map(|number| {
        let (text, destination) = if number % 2 == 0 {
            let prefix = Prefix::new(address_of(number * 7).into(), 24).expect("a prefix");
            (format!("prefix {number}"), Destination::Net(prefix))
        } else {
            let text = name(number);
            let exact = NamePattern::Exact(Name::new(text.as_bytes()).expect("a name"));
            (text, Destination::Name(exact))
        };
        rule(text, Action::Allow, destination)
    });
    PolicySpec { rules: rules.collect(), default, options: PolicyOptions::default() }
}

fn table(count: usize, default: Action) -> Arc<RuleTable> {
    Arc::new(RuleTable::compile(rules(count, default)).expect("a table"))
}

fn config() -> NetworkConfig {
    let mut config = NetworkConfig::new(GATEWAY_MAC, GATEWAY, (Ipv4Addr::new(192, 168, 64, 0), 24), [7; 32]);
    config.limits.flows_per_port = 131_072;
    config.limits.udp_sockets_per_port = 131_072;
    config
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Nanoseconds of a decision.
fn decision(count: usize) -> f64 {
    let mut policy = Policy::new(&config());
    if count > 0 {
        policy.change_rules(Time(1), None, Some(table(count, Action::Deny)));
    }
    let pinned: Vec<Name> = (0..64).map(|i| Name::new(name(i * 2 + 1).as_bytes()).expect("a name")).collect();
    let source = SocketAddr::from((address(A), 4000));
    let once = || {
        let mut allowed = 0usize;
        let start = Instant::now();
        for i in 0..DECISIONS {
            let destination = SocketAddr::from((address_of(i), 443));
            let request = Request {
                direction: Direction::Outbound,
                endpoint: A,
                protocol: proto::TCP,
                source,
                destination,
            };
            let pins = if i % 2 == 0 { &[] } else { std::slice::from_ref(&pinned[i / 2 % pinned.len()]) };
            let verdict = policy.judge_with(black_box(&request), Evidence { pins, shown: Shown::NotYet });
            allowed += usize::from(!matches!(verdict, Verdict::Deny { .. }));
        }
        let time = start.elapsed().as_nanos() as f64 / DECISIONS as f64;
        assert!(black_box(allowed) > 0, "nothing was allowed");
        time
    };
    once();
    median((0..ROUNDS).map(|_| once()).collect())
}

fn port_config() -> PortConfig {
    PortConfig {
        mac: Some(mac(A)),
        addresses: Vec::new(),
        mtu: 1500,
        gso_max: 0,
        lax_offload: false,
        uplink: false,
    }
}

/// A network with `PORTS` guests, each with its address.
fn network() -> Net {
    let mut net = Net::with(config());
    for port in 3..=PORTS as u32 {
        let mut config = port_config();
        config.mac = Some(mac(PortId(port)));
        config.addresses = vec![IpAddr::V4(address(PortId(port)))];
        net.core.add_port(PortId(port), config).expect("a port");
    }
    net
}

/// Opens `count` UDP flows, to `address_of` their number.
fn open(net: &mut Net, count: usize) -> Duration {
    let ports = PORTS as u32;
    let start = Instant::now();
    for i in 0..count {
        let port = PortId(1 + i as u32 % ports);
        let mut frame = udp_frame(GATEWAY_MAC, address(port), address_of(i), 64);
        put(&mut frame, 6, &mac(port).0);
        net.frame(port, &mut frame, FrameMeta::default());
    }
    start.elapsed()
}

/// Nanoseconds of a flow that is opened.
fn opening(count: usize) -> f64 {
    let once = || {
        let mut net = network();
        if count > 0 {
            net.core.set_rules(net.now, None, Some(table(count, Action::Allow)));
        }
        let time = open(&mut net, FLOWS / 2);
        assert_eq!(net.core.flows().count(), FLOWS / 2);
        time.as_nanos() as f64 / (FLOWS / 2) as f64
    };
    median((0..ROUNDS).map(|_| once()).collect())
}

/// Milliseconds until the last forbidden flow is cut, and of the longest step.
fn swap() -> (f64, f64, u64) {
    let mut net = network();
    net.core.set_rules(net.now, None, Some(table(10_000, Action::Allow)));
    open(&mut net, FLOWS);
    assert_eq!(net.core.flows().count(), FLOWS);
    assert!(finish(&mut net).2 == 0);
    let mut spec = rules(10_000, Action::Allow);
    let half = Prefix::new(Ipv4Addr::new(32, 0, 0, 0).into(), 9).expect("a prefix");
    spec.rules.insert(0, rule("half".into(), Action::Deny, Destination::Net(half)));
    let rules = Arc::new(RuleTable::compile(spec).expect("a table"));
    let kept = net.core.set_rules(net.now, None, Some(rules));
    let found = finish(&mut net);
    drop(kept);
    found
}

/// Runs the steps of a sweep until it is done.
fn finish(net: &mut Net) -> (f64, f64, u64) {
    let (start, mut longest) = (Instant::now(), Duration::ZERO);
    loop {
        let step = Instant::now();
        net.core.timers(net.now, &mut net.fx);
        longest = longest.max(step.elapsed());
        if let Some(cut) = net.core.take_flows_cut() {
            let ms = |d: Duration| d.as_secs_f64() * 1e3;
            return (ms(start.elapsed()), ms(longest), cut);
        }
        net.now = Time(net.now.0 + 1);
    }
}

fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").expect("statm");
    text.split(' ').nth(1).expect("a field").parse::<usize>().expect("a number") * 4096
}

/// Bytes of a pinned name: many guests with as many names as they may have, each name of one guest.
fn pinned() -> f64 {
    let (guests, now) = (100, Time(1_000_000_000));
    let mut pins = Pins::default();
    let before = resident();
    for guest in 0..guests {
        for number in 0..PER_GUEST {
            let at = guest * PER_GUEST + number;
            assert!(pins.note(guest as u32, address_of(at).into(), name(at).as_bytes(), 300, now));
        }
    }
    let bytes = (resident() - before) as f64 / (guests * PER_GUEST) as f64;
    black_box(&pins);
    bytes
}

fn compiling(count: usize) -> f64 {
    let once = || {
        let spec = rules(count, Action::Deny);
        let start = Instant::now();
        black_box(RuleTable::compile(spec).expect("a table"));
        start.elapsed().as_secs_f64() * 1e3
    };
    median((0..3).map(|_| once()).collect())
}

fn main() {
    let bytes = pinned();
    let decisions = COUNTS.map(decision);
    let opened = COUNTS.map(opening);
    println!("| | no rules | 10 rules | 10,000 rules |\n|---|---|---|---|");
    for (title, figures) in [("decision, ns", decisions), ("opening a UDP flow, ns", opened)] {
        println!("| {title} | {:.0} | {:.0} | {:.0} |", figures[0], figures[1], figures[2]);
    }
    let more = |figures: [f64; 3], at: usize| figures[at] - figures[0];
    println!("| more than without, ns | | {:.0} | {:.0} |", more(decisions, 1), more(decisions, 2));
    let mut swaps: Vec<_> = (0..ROUNDS).map(|_| swap()).collect();
    swaps.sort_by(|a, b| a.0.total_cmp(&b.0));
    let longest = swaps.iter().map(|s| s.1).fold(0.0, f64::max);
    let (total, _, cut) = swaps[ROUNDS / 2];
    println!(
        "\nA change of 10,000 rules with {FLOWS} flows: {total:.1} ms until the last of {cut} was cut (median of \
         {ROUNDS}), the longest stop of the packet thread {longest:.2} ms."
    );
    println!(
        "Compiling 10,000 rules: {:.0} ms, 100,000 rules: {:.0} ms.",
        compiling(10_000),
        compiling(100_000)
    );
    println!("A pinned name takes {bytes:.0} bytes.");
}
