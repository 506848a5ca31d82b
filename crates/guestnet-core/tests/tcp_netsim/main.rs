//! Theory of operation: the relay against a TCP that it does not share a line with. smoltcp is the guest, a
//! seeded simulator is the link (loss, reordering, repetition, a port that is often full) and the host (short
//! sends, bytes in dribs and drabs). Time is virtual, so a run is a function of its seed. Whatever happens,
//! all bytes arrive intact both ways, both sides close in order, and nothing stays buffered.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;
mod link;
mod sim;
#[path = "../tcp_support/mod.rs"]
mod tcp_support;

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
