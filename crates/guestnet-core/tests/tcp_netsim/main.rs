//! Theory of operation: the relay against a TCP that it does not share a line with. smoltcp is the guest, a
//! seeded simulator is the link (loss, reordering, repetition, a port that is often full) and the host (short
//! sends, bytes in dribs and drabs). Time is virtual, so a run is a function of its seed. Whatever happens,
//! all bytes arrive intact both ways, both sides close in order, and nothing stays buffered.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;
mod link;
mod pair;
mod sim;
#[path = "../tcp_support/mod.rs"]
mod tcp_support;

use link::Faults;
use pair::transfer;
use proptest::prelude::*;
use sim::{Scenario, run};

fn scenario() -> impl Strategy<Value = Scenario> {
    let sizes = (0usize..120_000, 0usize..120_000);
    let link = (0u32..120, 0u32..200, 0u32..100, prop_oneof![Just(576u16), Just(1500), Just(9000)]);
    let guest = (600usize..70_000, 600usize..70_000, any::<bool>());
    let relay = (any::<bool>(), prop_oneof![Just(0u32), Just(9000), Just(65000)], any::<bool>());
    (any::<u64>(), sizes, link, guest, relay).prop_map(|(seed, sizes, link, guest, relay)| Scenario {
        seed,
        upload: sizes.0,
        download: sizes.1,
        delay_us: 50,
        loss: link.0,
        reorder: link.1,
        repeat: link.2,
        mtu: link.3,
        guest_rx: guest.0,
        guest_tx: guest.1,
        timestamps: guest.2,
        inbound: relay.0,
        gso_max: relay.1,
        rough_host: relay.2,
    })
}

proptest! {
    #![proptest_config(ProptestConfig {
        max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn bytes_arrive_intact_both_ways(s in scenario()) {
        run(&s).map_err(TestCaseError::fail)?;
    }
}

fn clean() -> Scenario {
    Scenario {
        seed: 1,
        upload: 3_000_000,
        download: 3_000_000,
        delay_us: 50,
        loss: 0,
        reorder: 0,
        repeat: 0,
        mtu: 1500,
        guest_rx: 400_000,
        guest_tx: 400_000,
        timestamps: false,
        inbound: false,
        gso_max: 65_000,
        rough_host: false,
    }
}

#[test]
fn a_clean_link_needs_no_retransmission() {
    let outcome = run(&clean()).unwrap();
    assert_eq!(outcome.retransmits, 0);
    assert!(outcome.ms < 4500, "{} ms", outcome.ms);
}

#[test]
fn three_megabytes_through_one_percent_loss() {
    let outcome = run(&Scenario { loss: 10, seed: 7, ..clean() }).unwrap();
    assert!(outcome.ms < 120_000, "{} ms", outcome.ms);
}

#[test]
fn a_very_bad_link() {
    run(&Scenario {
        loss: 250,
        reorder: 300,
        repeat: 200,
        upload: 60_000,
        download: 60_000,
        rough_host: true,
        ..clean()
    })
    .unwrap();
}

/// Once stuck: each side's ACKs lay outside the other's window.
#[test]
fn a_window_smaller_than_a_segment_on_a_bad_link() {
    run(&Scenario {
        seed: 12_791_488_831_572_915_738,
        upload: 111_409,
        download: 82_788,
        delay_us: 50,
        loss: 92,
        reorder: 29,
        repeat: 11,
        mtu: 9000,
        guest_rx: 2967,
        guest_tx: 36_293,
        timestamps: false,
        inbound: true,
        gso_max: 0,
        rough_host: true,
    })
    .unwrap();
}

/// 50 ms from end to end and back.
fn lossy(loss: u32) -> Faults {
    Faults { delay_us: 25_000, loss, reorder: 0, repeat: 0 }
}

/// What a window of `sqrt(3 / 2p)` segments a round trip carries (Mathis et al., 1997), in bytes a second.
fn expected(loss: u32) -> f64 {
    1448.0 / 0.05 * (1.5 / (f64::from(loss) / 1000.0)).sqrt()
}

/// Loss per mille, bytes, and the least part of the expected rate that is reached either way. At 10 % the window is
/// so small that much loss is found by the timeout alone, which the expectation leaves out.
const LOSSES: [(u32, usize, f64); 3] = [(10, 20_000_000, 0.9), (50, 6_000_000, 0.8), (100, 3_000_000, 0.6)];

#[test]
fn loss_costs_what_congestion_control_asks_and_no_more() {
    for (loss, size, least) in LOSSES {
        for back in [false, true] {
            let runs: Vec<_> = (1..=8).map(|seed| transfer(seed, size, back, lossy(loss)).unwrap()).collect();
            let ms = runs.iter().map(|t| t.ms).sum::<u64>() / runs.len() as u64;
            let again = runs.iter().map(|t| t.sent_again).sum::<u64>() / runs.len() as u64;
            let ratio = size as f64 * 1000.0 / ms as f64 / expected(loss);
            println!(
                "{loss} per mille, back {back}: {ms} ms, {again} sent again, {ratio:.2} of the expected"
            );
            assert!(ratio > least, "{loss} per mille, back {back}: {ms} ms, {ratio:.2} of the expected");
        }
    }
}

#[test]
fn hardly_anything_is_sent_twice_for_nothing() {
    for (loss, size, _) in LOSSES {
        let segments = size as f64 / 1448.0;
        let lost = segments * f64::from(loss) / 1000.0;
        for back in [false, true] {
            let again =
                (1..=8).map(|seed| transfer(seed, size, back, lossy(loss)).unwrap().sent_again).sum::<u64>();
            let again = again as f64 / 8.0;
            assert!(again < 1.5 * lost, "{loss} per mille, back {back}: {again} of {segments} sent again");
        }
    }
}

#[test]
fn reordering_alone_costs_little() {
    // Every fifth frame up to 3 ms late, of a round trip of 50 ms.
    let faults = Faults { reorder: 200, ..lossy(0) };
    let t = transfer(1, 20_000_000, false, faults).unwrap();
    assert!(t.sent_again < 140, "{} of 13,800 segments sent again", t.sent_again);
    assert!(t.ms < 4000, "{} ms", t.ms);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// A sender with SACK against a receiver with SACK, on any link.
    #[test]
    fn two_relays_understand_each_other(
        seed: u64,
        size in 0usize..200_000,
        back: bool,
        (loss, reorder, repeat) in (0u32..250, 0u32..300, 0u32..200),
        delay_us in prop_oneof![Just(50u64), 50u64..100_000],
    ) {
        let faults = Faults { delay_us, loss, reorder, repeat };
        transfer(seed, size, back, faults).map_err(TestCaseError::fail)?;
    }
}
