//! Theory of operation: one process, one core (but for the ring), the same packets for both engines: frames in
//! one buffer, drawn at random from the flows. Each figure is the best of several rounds, since what is
//! measured is the engine and not its neighbours on the machine. What one thread does is timed by what it had of
//! the processor, the ring by the clock on the wall. Writes a list of
//! `{"name", "guestnet", "arcbox", "unit"}` to the file named by the first argument.

mod packets;

use arcbox_conntrack as arcbox;
use guestnet_core::nat::{Contiguous, NatDirection, NatEngine, NatEngineConfig, NatResult, Prefix};
use guestnet_core::types::Time;
use guestnet_io::memory::pool::PacketPool;
use guestnet_io::memory::ring::Ring;
use guestnet_wire::checksum::{adjust, difference};
use packets::{ETH, Load, Mix};
use std::hint::black_box;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

struct Row {
    name: String,
    guestnet: f64,
    arcbox: Option<f64>,
    unit: &'static str,
}

fn engine(connections: usize) -> NatEngine {
    let external = (1..=32).map(|i| Ipv4Addr::new(203, 0, 113, i)).collect();
    let mut c = NatEngineConfig::new(Ipv4Addr::new(203, 0, 113, 1));
    c.external = external;
    c.internal = Prefix::new(Ipv4Addr::new(10, 0, 0, 0), 8).unwrap();
    c.ports = (1024, 65535);
    c.table_size = connections;
    c.secret = [9; 32];
    let mut e = NatEngine::new(c).unwrap();
    guestnet_io::os::hugepages::advise(&e.memory_ranges());
    e.prefault();
    e
}

fn peer() -> arcbox::NatEngine {
    let c = arcbox::NatEngineConfig::new(Ipv4Addr::new(203, 0, 113, 1)).with_port_range(1024, 65535);
    let mut e = arcbox::NatEngine::new(&c);
    e.set_internal_network(Ipv4Addr::new(10, 0, 0, 0), 8);
    e
}

/// Runs `round` for about `budget`, and gives the best rate of a round, in millions a second.
fn best(budget: Duration, mut round: impl FnMut() -> (usize, Duration)) -> f64 {
    let end = Instant::now() + budget;
    let mut best = 0f64;
    loop {
        let (n, t) = round();
        best = best.max(n as f64 / t.as_secs_f64() / 1e6);
        if Instant::now() > end {
            return best;
        }
    }
}

fn run_guestnet(e: &mut NatEngine, load: &mut Load, direction: NatDirection, now: Time) {
    let mut results = [NatResult::PassThrough; 256];
    let mut at = 0;
    while at < load.spans.len() {
        let n = 256.min(load.spans.len() - at);
        let mut batch = Contiguous { buffer: &mut load.bytes, spans: &load.spans[at..at + n] };
        e.translate_batch(&mut batch, direction, now, &mut results[..n]);
        for r in &results[..n] {
            assert_eq!(*r, NatResult::Translated);
        }
        at += n;
    }
}

fn run_arcbox(e: &mut arcbox::NatEngine, load: &mut Load, direction: arcbox::NatDirection) {
    for (start, len) in &load.spans {
        let from = *start as usize - ETH;
        let frame = &mut load.bytes[from..from + ETH + *len as usize];
        black_box(e.translate(frame, direction).unwrap());
    }
}

/// What this thread had of the processor while `f` ran.
fn timed(f: impl FnOnce()) -> Duration {
    let t = own_time();
    f();
    own_time() - t
}

/// Packets of known flows, outbound (and inbound for us).
fn hits(rows: &mut Vec<Row>, label: &str, flows: usize, mix: Mix, budget: Duration) {
    let fresh = Load::every_flow(flows, mix);
    let master = Load::random(flows, mix);
    let n = master.spans.len();
    let mut e = engine(flows.max(1024));
    let mut opened = fresh.clone();
    run_guestnet(&mut e, &mut opened, NatDirection::Outbound, Time(1));
    // TCP is established when the other side's SYN has come.
    opened.mirror();
    run_guestnet(&mut e, &mut opened, NatDirection::Inbound, Time(1));
    assert_eq!(e.connection_count(), flows);
    // What the outside answers: the translated packets, mirrored.
    let mut replies = master.clone();
    run_guestnet(&mut e, &mut replies, NatDirection::Outbound, Time(2));
    replies.mirror();
    let mut work = master.clone();
    let outbound = best(budget, || {
        work.restore(&master);
        (n, timed(|| run_guestnet(&mut e, &mut work, NatDirection::Outbound, Time(3))))
    });
    let inbound = best(budget, || {
        work.restore(&replies);
        (n, timed(|| run_guestnet(&mut e, &mut work, NatDirection::Inbound, Time(4))))
    });
    if flows == 1_000_000 {
        let s = e.conntrack_stats();
        let per = s.memory as f64 / s.connections as f64;
        rows.push(Row {
            name: "memory_per_connection_1m".into(),
            guestnet: per,
            arcbox: None,
            unit: "bytes",
        });
        rows.push(expiry(&mut e));
    }
    drop(e);
    let mut a = peer();
    run_arcbox(&mut a, &mut fresh.clone(), arcbox::NatDirection::Outbound);
    let theirs = best(budget, || {
        work.restore(&master);
        (n, timed(|| run_arcbox(&mut a, &mut work, arcbox::NatDirection::Outbound)))
    });
    rows.push(Row { name: format!("hit_{label}"), guestnet: outbound, arcbox: Some(theirs), unit: "Mpps" });
    rows.push(Row { name: format!("hit_in_{label}"), guestnet: inbound, arcbox: None, unit: "Mpps" });
}

/// Time that this thread had the processor: what others take of it is no pause of ours.
fn own_time() -> Duration {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
}

/// The longest pause while a million connections run out, in microseconds, in steps of 256 visits.
fn expiry(e: &mut NatEngine) -> Row {
    let now = Time(400_000_000_000);
    let mut worst = Duration::ZERO;
    while e.connection_count() > 0 {
        let t = own_time();
        black_box(e.expire(now, 256));
        worst = worst.max(own_time() - t);
    }
    Row {
        name: "expire_1m_longest_pause".into(),
        guestnet: worst.as_secs_f64() * 1e6,
        arcbox: None,
        unit: "us",
    }
}

/// First packets of flows, each from a socket of its own. The slowest tenth counts too: `never`.
fn new_flows(rows: &mut Vec<Row>) {
    const N: usize = 1_000_000;
    let fresh = Load::every_flow(N, Mix::Udp64);
    let mut slowest = f64::MAX;
    let ours = best(Duration::from_secs(4), || {
        let mut work = fresh.clone();
        let mut e = engine(N);
        let t = own_time();
        let mut results = [NatResult::PassThrough; 256];
        let mut last = t;
        let mut low = f64::MAX;
        for (i, spans) in fresh.spans.chunks(256).enumerate() {
            let mut batch = Contiguous { buffer: &mut work.bytes, spans };
            e.translate_batch(&mut batch, NatDirection::Outbound, Time(1), &mut results[..spans.len()]);
            if i % 391 == 390 {
                let now = own_time();
                low = low.min(256.0 * 391.0 / (now - last).as_secs_f64() / 1e6);
                last = now;
            }
        }
        let took = own_time() - t;
        assert_eq!(e.connection_count(), N);
        slowest = if slowest == f64::MAX { low } else { slowest.max(low) };
        (N, took)
    });
    let theirs = best(Duration::from_secs(2), || {
        let mut work = fresh.clone();
        let mut a = peer();
        (N, timed(|| run_arcbox(&mut a, &mut work, arcbox::NatDirection::Outbound)))
    });
    rows.push(Row { name: "new_flows".into(), guestnet: ours, arcbox: Some(theirs), unit: "Mpps" });
    rows.push(Row { name: "new_flows_slowest_100k".into(), guestnet: slowest, arcbox: None, unit: "Mpps" });
}

/// New flows of a guest that chose its tuples so that they collide under a known hash (all keys equal but
/// for bits that a multiply without secret would lose), against random ones.
fn attack(rows: &mut Vec<Row>) {
    const N: usize = 100_000;
    for (name, load) in [
        ("new_flows_100k_random", Load::every_flow(N, Mix::Udp64)),
        ("new_flows_100k_attack", Load::attack(N)),
    ] {
        let mut probe = 0;
        let rate = best(Duration::from_secs(1), || {
            let mut work = load.clone();
            let mut e = engine(N);
            let t = timed(|| run_guestnet(&mut e, &mut work, NatDirection::Outbound, Time(1)));
            probe = e.longest_probe();
            (N, t)
        });
        rows.push(Row { name: name.into(), guestnet: rate, arcbox: None, unit: "Mpps" });
        rows.push(Row {
            name: format!("{name}_longest_run"),
            guestnet: probe as f64,
            arcbox: None,
            unit: "slots",
        });
    }
}

/// Updates in a row, each of the last one's field: what one takes until the next can begin.
fn checksum(rows: &mut Vec<Row>) {
    const N: u32 = 500_000;
    let mut field = 0x1234u16;
    let rate = best(Duration::from_millis(500), || {
        let t = timed(|| {
            for i in 0..N {
                let (old, new) = (black_box(i as u16), black_box((i >> 3) as u16));
                field = adjust(field, difference(old, new));
            }
            black_box(field);
        });
        (N as usize, t)
    });
    rows.push(Row { name: "checksum_update".into(), guestnet: 1e3 / rate, arcbox: None, unit: "ns" });
}

/// Keeps this thread on one processor, where the system lets it.
fn pin(to: usize) {
    let mut one = rustix::thread::CpuSet::new();
    one.set(to);
    let _ = rustix::thread::sched_setaffinity(None, &one);
}

/// The first two processors that this process may use.
fn two_processors() -> Option<[usize; 2]> {
    let may = rustix::thread::sched_getaffinity(None).ok()?;
    let mut list = (0..rustix::thread::CpuSet::MAX_CPU).filter(|i| may.is_set(*i));
    Some([list.next()?, list.next()?])
}

/// Items through the ring, from a thread on one processor to a thread on another. Rounds are short and begin when
/// both threads run, so that some are over before either has to give its processor to somebody else. Done on a
/// thread of its own, which keeps the processor that it was tied to.
fn ring_rounds() -> f64 {
    const N: usize = 500_000;
    let processors = two_processors();
    if let Some([here, _]) = processors {
        pin(here);
    }
    best(Duration::from_secs(4), || {
        let (mut p, mut c) = Ring::<u32>::new(4096).unwrap().split();
        let ready = Arc::new(AtomicUsize::new(0));
        let meet = |ready: &AtomicUsize| {
            ready.fetch_add(1, Ordering::AcqRel);
            while ready.load(Ordering::Acquire) < 2 {
                std::hint::spin_loop();
            }
        };
        let theirs = Arc::clone(&ready);
        let producer = std::thread::spawn(move || {
            if let Some([_, there]) = processors {
                pin(there);
            }
            let batch: [u32; 256] = std::array::from_fn(|i| i as u32);
            meet(&theirs);
            let mut sent = 0;
            while sent < N {
                let n = p.enqueue_batch(&batch[..256.min(N - sent)]);
                sent += n;
                if n == 0 {
                    std::hint::spin_loop();
                }
            }
        });
        meet(&ready);
        let t = Instant::now();
        let (mut got, mut out) = (0, [0u32; 256]);
        while got < N {
            let n = c.dequeue_batch(&mut out);
            got += n;
            black_box(&out);
            if n == 0 {
                std::hint::spin_loop();
            }
        }
        let took = t.elapsed();
        producer.join().unwrap();
        (N, took)
    })
}

fn ring(rows: &mut Vec<Row>) {
    let rate = std::thread::spawn(ring_rounds).join().unwrap();
    rows.push(Row { name: "ring_batch_256".into(), guestnet: rate, arcbox: None, unit: "Mops" });
}

fn pool(rows: &mut Vec<Row>) {
    const N: usize = 200_000;
    let pool = PacketPool::new(4096).unwrap();
    let rate = best(SECOND / 4, || {
        let t = timed(|| {
            for _ in 0..N {
                let i = black_box(pool.alloc().unwrap());
                pool.free(i).unwrap();
            }
        });
        (N, t)
    });
    rows.push(Row { name: "pool_alloc_free".into(), guestnet: 1e3 / rate, arcbox: None, unit: "ns" });
}

/// The parts of the race, by the word that chooses them.
type Part = (&'static str, fn(&mut Vec<Row>));
const PARTS: &[Part] = &[
    ("small", |rows| {
        checksum(rows);
        ring(rows);
        pool(rows);
    }),
    ("udp64_64", |rows| hits(rows, "udp64_64_flows", 64, Mix::Udp64, SECOND)),
    ("tcp1500_64", |rows| hits(rows, "tcp1500_64_flows", 64, Mix::Tcp1500, SECOND)),
    ("udp64_10k", |rows| hits(rows, "udp64_10k_flows", 10_000, Mix::Udp64, SECOND)),
    ("udp64_100k", |rows| hits(rows, "udp64_100k_flows", 100_000, Mix::Udp64, SECOND)),
    ("udp64_1m", |rows| hits(rows, "udp64_1m_flows", 1_000_000, Mix::Udp64, 2 * SECOND)),
    ("new", new_flows),
    ("attack", attack),
];
const SECOND: Duration = Duration::from_secs(1);

/// `FILE [PART]`: all of the race, or one part of it.
fn main() {
    let path = std::env::args().nth(1).unwrap_or_else(|| "engine.json".into());
    let only = std::env::args().nth(2);
    let mut rows = Vec::new();
    for (name, part) in PARTS {
        if only.as_deref().is_none_or(|only| only == *name) {
            part(&mut rows);
        }
    }
    let mut json = String::from("[\n");
    println!("{:32} {:>10} {:>10}  {:6} {:>6}", "", "guestnet", "arcbox", "", "times");
    for (i, r) in rows.iter().enumerate() {
        let theirs = r.arcbox.map_or("null".into(), |a| format!("{a:.3}"));
        let sep = if i + 1 < rows.len() { "," } else { "" };
        json += &format!(
            "  {{\"name\": \"{}\", \"guestnet\": {:.3}, \"arcbox\": {theirs}, \"unit\": \"{}\"}}{sep}\n",
            r.name, r.guestnet, r.unit
        );
        let a = r.arcbox.map_or(String::new(), |a| format!("{a:.2}"));
        let x = r.arcbox.map_or(String::new(), |a| format!("{:.1}", r.guestnet / a));
        println!("{:32} {:>10.2} {a:>10}  {:6} {x:>6}", r.name, r.guestnet, r.unit);
    }
    json += "]\n";
    if let Err(e) = std::fs::write(&path, json) {
        eprintln!("cannot write {path}: {e}");
        std::process::exit(1);
    }
}
