//! Theory of operation: any packets, in any direction, at any time, through a small NatEngine, one by one and in
//! batches. Nothing may panic, lengths stay, what is not translated keeps every byte, what waits in the
//! output is whole, and memory stays bounded. Fragments have their own part of the input.
#![no_main]

use arbitrary::{Arbitrary, Unstructured};
use guestnet_core::nat::{Behaviour, Contiguous, NatDirection, NatEngine, NatEngineConfig, NatResult};
use guestnet_core::types::Time;
use guestnet_wire::{be16, ipv4, parse};
use libfuzzer_sys::fuzz_target;
use std::net::Ipv4Addr;

#[derive(Arbitrary, Debug)]
struct Choices {
    behaviour: [u8; 4],
    mtu: u8,
    ports: u8,
    table: u8,
    flags: u8,
}

fn engine(c: &Choices) -> NatEngine {
    let behaviour = |i: usize| match c.behaviour[i] % 3 {
        0 => Behaviour::EndpointIndependent,
        1 => Behaviour::AddressDependent,
        _ => Behaviour::AddressAndPortDependent,
    };
    let mut n = NatEngineConfig::new(Ipv4Addr::new(203, 0, 113, 1));
    (n.mapping_udp, n.mapping_tcp) = (behaviour(0), behaviour(1));
    (n.filtering_udp, n.filtering_tcp) = (behaviour(2), behaviour(3));
    n.mtu_outside = 68 + u16::from(c.mtu) * 8;
    n.mtu_inside = 68 + u16::from(c.mtu) * 4;
    n.ports = (50_000, 50_000 + u16::from(c.ports));
    n.table_size = 1 + usize::from(c.table);
    n.inbound_refresh = c.flags & 1 != 0;
    n.tcp_pickup = c.flags & 2 != 0;
    n.decrement_ttl = c.flags & 4 == 0;
    n.fragment_sets = 20;
    n.fragment_bytes = 10_000;
    n.output_bytes = 20_000;
    NatEngine::new(n).expect("a good configuration")
}

/// Makes bytes look like a packet of this network, so that more than header checks are reached.
fn dress(p: &mut Vec<u8>, how: u8) {
    if how & 1 == 0 {
        return;
    }
    p.resize(p.len().max(28), 0);
    let n = p.len() as u16;
    p[0] = 0x45;
    p[2..4].copy_from_slice(&n.to_be_bytes());
    if how & 2 != 0 {
        p[6] = 0;
        p[7] = 0;
    }
    p[9] = [1, 6, 17, 47][usize::from(p[9] & 3)];
    let (inside, outside, ext) =
        ([192, 168, 64, p[15] & 3 | 2], [198, 51, 100, p[19] & 3 | 1], [203, 0, 113, 1]);
    let (s, d) = match how >> 2 & 3 {
        0 => (inside, outside),
        1 => (outside, ext),
        2 => (inside, ext),
        _ => (inside, inside),
    };
    p[12..16].copy_from_slice(&s);
    p[16..20].copy_from_slice(&d);
    for at in [20, 22] {
        p[at] = 195;
        p[at + 1] = 80 | p[at + 1] & 7;
    }
    if p[9] == 17 && how & 2 != 0 {
        let len = (n - 20).to_be_bytes();
        p[24..26].copy_from_slice(&len);
    }
    ipv4::fill_checksum(p);
}

fuzz_target!(|data: &[u8]| {
    let mut u = Unstructured::new(data);
    let Ok(choices) = Choices::arbitrary(&mut u) else { return };
    let mut nat = engine(&choices);
    // Since boot, or since 1970.
    let mut now = if choices.flags & 8 == 0 { 0 } else { 1_796_084_126_000_000_000u64 };
    let (mut buffer, mut spans) = (Vec::new(), Vec::new());
    // `Unstructured` gives zeros when it has run out.
    while !u.is_empty() {
        let Ok((how, wait, len)) = <(u8, u8, u8)>::arbitrary(&mut u) else { return };
        let Ok(bytes) = u.bytes(usize::from(len).min(u.len())) else { return };
        let mut p = bytes.to_vec();
        dress(&mut p, how);
        let leap = if wait == 255 { 9 * 365 * 24 * 3600 * 1_000_000_000 } else { 0 };
        now = now.saturating_add(u64::from(wait) * u64::from(wait) * 50_000_000 + leap);
        let way = if how & 4 == 0 { NatDirection::Outbound } else { NatDirection::Inbound };
        spans.push((buffer.len() as u32, p.len() as u32));
        buffer.extend_from_slice(&p);
        let before = p.clone();
        let result = nat.translate(&mut p, way, Time(now));
        assert_eq!(before.len(), p.len());
        match result {
            NatResult::Translated | NatResult::Hairpinned | NatResult::Fragmented => {
                let v = parse::parse_ip(&p, 0);
                if let (Ok(v), Ok(b)) = (v, parse::parse_ip(&before, 0)) {
                    assert_eq!(parse::verify_ipv4_header(&before, &b), parse::verify_ipv4_header(&p, &v));
                }
            }
            _ => assert_eq!(before, p),
        }
        if how & 0x80 != 0 {
            nat.expire(Time(now), 100);
        }
        // Now and then the output is left to fill up.
        while how & 0x60 != 0
            && let Some((_, out)) = nat.poll_output()
        {
            assert_eq!(usize::from(be16(&out, 2)), out.len());
        }
        let (sets, held) = nat.fragment_usage();
        assert!(sets <= 20 && held <= 10_000);
        assert!(nat.connection_count() <= nat.config().table_size);
    }
    // Where there is work to do, doing it makes progress.
    let mut turns = 0;
    while nat.next_timer().is_some_and(|t| t <= Time(now)) {
        nat.expire(Time(now), 16);
        turns += 1;
        assert!(turns < 10_000);
    }
    let mut results = vec![NatResult::PassThrough; spans.len()];
    let before = buffer.clone();
    let mut batch = Contiguous { buffer: &mut buffer, spans: &spans };
    nat.translate_batch(&mut batch, NatDirection::Outbound, Time(now), &mut results);
    for ((start, len), r) in spans.iter().zip(&results) {
        if !matches!(r, NatResult::Translated | NatResult::Hairpinned | NatResult::Fragmented) {
            let at = *start as usize..(*start + *len) as usize;
            assert_eq!(before[at.clone()], buffer[at]);
        }
    }
});
