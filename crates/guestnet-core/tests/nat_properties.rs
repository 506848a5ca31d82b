//! Theory of operation: what holds for any packet and any history. Any bytes give a defined result and leave
//! untranslated packets alone; a reply mirrored from a translated packet comes back as the original's mirror;
//! a batch does what single packets do; and a simple model of maps agrees on who has which external end.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod nat_common;
use guestnet_core::nat::{Behaviour, Contiguous, NatDirection, NatEngine, NatResult};
use guestnet_core::types::Time;
use guestnet_wire::tcp::flags::{ACK, FIN, RST, SYN};
use guestnet_wire::{be16, ipv4, put};
use nat_common::*;
use proptest::prelude::*;
use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddrV4};

fn swap_ends(p: &[u8]) -> Vec<u8> {
    let mut q = p.to_vec();
    q[12..16].copy_from_slice(&p[16..20]);
    q[16..20].copy_from_slice(&p[12..16]);
    if matches!(p[9], 6 | 17) {
        q[20..22].copy_from_slice(&p[22..24]);
        q[22..24].copy_from_slice(&p[20..22]);
    }
    q
}

/// A plausible packet, or nearly one.
fn packet() -> impl Strategy<Value = Vec<u8>> {
    let ends = (2u8..6, 0u16..6, 1u8..4, 0u16..4);
    let kind = (0u8..6, prop::sample::select(vec![SYN, ACK, SYN | ACK, FIN | ACK, RST, 0, 0xff]));
    let shape = (prop::collection::vec(any::<u8>(), 0..120), 0u8..4, any::<bool>());
    (ends, kind, shape).prop_map(|((g, gp, x, xp), (kind, flags), (data, ttl, inward))| {
        let inside = SocketAddrV4::new([192, 168, 64, g].into(), 50_000 + gp);
        let outside = SocketAddrV4::new([198, 51, 100, x].into(), 50 + xp);
        let ext = SocketAddrV4::new([203, 0, 113, 1].into(), 50_000 + gp);
        let (s, d) = if inward { (outside, ext) } else { (inside, outside) };
        let p = match kind {
            0..=1 => udp_packet(s, d, &data),
            2..=3 => tcp_packet(s, d, flags, &data),
            4 => echo_packet(*s.ip(), *d.ip(), if inward { 0 } else { 8 }, 50_000 + gp),
            _ => IpPacket::new(*s.ip(), *d.ip(), 47, data),
        };
        let ttl = if ttl == 0 { 1 } else { 60 + ttl };
        p.ttl(ttl).bytes()
    })
}

fn direction(p: &[u8]) -> NatDirection {
    if p.first_chunk::<20>().is_some_and(|h| h[12] == 192) { Outbound } else { Inbound }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_have_a_defined_result(
        packets in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..200), any::<bool>()), 1..50),
        mtu in 68u16..300,
    ) {
        let mut lab = Lab::new(|c| (c.mtu_outside, c.mtu_inside) = (mtu, mtu));
        for (mut p, out) in packets {
            if let Some(b) = p.first_mut() {
                *b = 0x45 + (*b & 1);
            }
            lab.send(&p, if out { Outbound } else { Inbound });
            while lab.nat.poll_output().is_some() {}
        }
    }

    #[test]
    fn nearly_right_packets_have_a_defined_result(
        packets in prop::collection::vec((packet(), any::<u16>(), any::<u8>(), 0usize..200), 1..80),
    ) {
        let mut lab = Lab::default();
        for (mut p, at, value, cut) in packets {
            let n = p.len();
            if let Some(b) = p.get_mut(usize::from(at) % (2 * n)) {
                *b = value;
            }
            p.truncate(n.saturating_sub(cut / 10));
            let d = direction(&p);
            let mut q = p.clone();
            let r = lab.nat.translate(&mut q, d, Time(0));
            prop_assert_eq!(p.len(), q.len());
            if !matches!(r, Translated | Hairpinned | Fragmented) {
                prop_assert_eq!(p, q);
            }
        }
    }

    #[test]
    fn no_byte_changes_unless_the_result_says_so(
        ops in prop::collection::vec((0u8..10, 0usize..1400, 0usize..11, any::<bool>(), 0u8..5), 1..60),
        (outside, inside, room) in (68u16..1500, 68u16..1500, 0usize..20_000),
    ) {
        let mut lab = Lab::new(|c| {
            (c.mtu_outside, c.mtu_inside, c.output_bytes) = (outside, inside, room);
            (c.filtering_udp, c.filtering_tcp) = (Behaviour::EndpointIndependent, Behaviour::EndpointIndependent);
        });
        let (a, b, x) = (at("192.168.64.2:50000"), at("192.168.64.3:50001"), at("198.51.100.1:80"));
        let ext = |of: SocketAddrV4| SocketAddrV4::new(ip(EXT), of.port());
        for of in [a, b] {
            lab.nat.translate(&mut udp_packet(of, x, b"").bytes(), Outbound, Time(0));
        }
        for (kind, size, words, dont_fragment, fate) in ops {
            let data = vec![size as u8; size];
            // `send` compares the bytes with what the result says.
            let (packet, way) = match kind {
                0 => (udp_packet(a, x, &data), Outbound),
                1 => (udp_packet(x, ext(a), &data), Inbound),
                2 => (udp_packet(a, ext(b), &data), Outbound),
                3 => (tcp_packet(b, ext(a), SYN, &data), Outbound),
                _ => {
                    // An error about a packet that was sent: from outside, from a guest, and about a hairpin.
                    let about = [(x, ext(a)), (x, a), (ext(b), a)][usize::from(kind) % 3];
                    let (src, dst, way) = match kind % 3 {
                        0 => (*x.ip(), ip(EXT), Inbound),
                        1 => (*a.ip(), *x.ip(), Outbound),
                        _ => (*a.ip(), ip(EXT), Outbound),
                    };
                    let (src_of_quote, dst_of_quote) = if kind % 3 == 0 { (about.1, about.0) } else { about };
                    let quote = udp_packet(src_of_quote, dst_of_quote, &data).bytes();
                    let bytes = error(&src.to_string(), &dst.to_string(), 3, 3, [0; 4], &quote);
                    (IpPacket::new(src, dst, 1, bytes[20..].to_vec()), way)
                }
            };
            let options = vec![1; 4 * words];
            let mut packet = packet.options(&options).id(size as u16);
            if dont_fragment {
                packet = packet.df();
            }
            if fate == 4 && packet.payload.len() > 64 {
                for f in packet.fragments(64).iter().rev() {
                    lab.send(f, way);
                }
            } else {
                lab.send(&packet.bytes(), way);
            }
            if fate == 0 {
                while lab.nat.poll_output().is_some() {}
            }
        }
    }

    #[test]
    fn the_mirrored_reply_restores_the_original(p in packet()) {
        let mut lab = Lab::new(|c| c.decrement_ttl = false);
        let (r, q) = lab.send(&p, Outbound);
        if r == Translated && !(p[9] == 6 && p[33] & RST != 0) {
            let (r, back) = lab.send(&swap_ends(&q), Inbound);
            prop_assert_eq!(r, Translated);
            prop_assert_eq!(back, swap_ends(&p));
        }
    }

    #[test]
    fn a_batch_does_what_single_packets_do(packets in prop::collection::vec(packet(), 1..200), step in 0u64..40) {
        let new = || Lab::new(|c| c.timeouts.udp = 20);
        let (mut one, mut many) = (new(), new());
        let mut now = 0;
        for chunk in packets.chunks(70) {
            for way in [Outbound, Inbound] {
                let chosen: Vec<&Vec<u8>> = chunk.iter().filter(|p| direction(p) == way).collect();
                let mut buffer = Vec::new();
                let mut spans = Vec::new();
                let mut singles = Vec::new();
                for p in chosen {
                    spans.push((buffer.len() as u32, p.len() as u32));
                    buffer.extend_from_slice(p);
                    let mut q = p.clone();
                    singles.push((one.nat.translate(&mut q, way, Time(now)), q));
                }
                let mut results = vec![PassThrough; spans.len()];
                let mut batch = Contiguous { buffer: &mut buffer, spans: &spans };
                many.nat.translate_batch(&mut batch, way, Time(now), &mut results);
                for ((single, result), (start, len)) in singles.iter().zip(&results).zip(&spans) {
                    prop_assert_eq!(&single.0, result);
                    prop_assert_eq!(&single.1[..], &buffer[*start as usize..][..*len as usize]);
                }
            }
            now += step * 1_000_000_000;
            // Expiry work is done at another pace, and until it is done a dead connection has its port.
            one.nat.expire(Time(now), 10_000);
            many.nat.expire(Time(now), 10_000);
        }
        let (a, b) = (one.nat.stats(), many.nat.stats());
        prop_assert_eq!((a.outbound, a.inbound, a.created, a.drops), (b.outbound, b.inbound, b.created, b.drops));
    }

    #[test]
    fn checksums_at_their_corners(words in prop::collection::vec(prop::sample::select(vec![0u16, 0xffff, 1, 0xfffe, 0x8000]), 1..20), id in any::<u16>()) {
        // Data and header words of all ones and zeros, against full recomputation (in `send`).
        let data: Vec<u8> = words.iter().flat_map(|w| w.to_be_bytes()).collect();
        let mut lab = Lab::new(|c| c.ports = (1, 65535));
        for p in [
            udp_packet(at("192.168.64.2:65535"), at("198.51.100.1:1"), &data).id(id),
            tcp_packet(at("192.168.64.2:1"), at("223.255.255.255:65535"), SYN, &data).id(id),
        ] {
            let p = p.bytes();
            prop_assert_eq!(lab.out(&p), Translated);
            let ext = lab.map(&p);
            let reply = swap_ends(&lab_translate(&mut lab.nat, &p));
            prop_assert_eq!(lab.inn(&reply), Translated);
            prop_assert_eq!(*ext.ip(), ip(EXT));
        }
    }

    #[test]
    fn a_simple_model_agrees(
        ops in prop::collection::vec((0u8..8, 2u8..8, 0u16..12, 1u8..4, 0u16..3, 1u64..12), 1..300),
        filtering in prop::sample::select(vec![
            Behaviour::EndpointIndependent,
            Behaviour::AddressDependent,
            Behaviour::AddressAndPortDependent,
        ]),
    ) {
        // UDP only: internal end -> (external end, remote ends with their deadlines).
        let mut lab = Lab::new(|c| {
            c.filtering_udp = filtering;
            c.ports = (50_000, 50_039);
            // Time passes in tens of seconds, so no deadline falls on a moment that is looked at.
            c.timeouts.udp = 125;
            c.inbound_refresh = false;
        });
        let mut model: HashMap<SocketAddrV4, (SocketAddrV4, HashMap<SocketAddrV4, u64>)> = HashMap::new();
        // External end -> who had it last, and when that ends.
        let mut last: HashMap<SocketAddrV4, (Ipv4Addr, u64)> = HashMap::new();
        let mut now = 0u64;
        for (op, g, gp, x, xp, wait) in ops {
            let inside = SocketAddrV4::new([192, 168, 64, g].into(), 50_000 + gp);
            let outside = SocketAddrV4::new([198, 51, 100, x].into(), 50 + xp);
            if op == 0 {
                lab.wait(10 * wait);
                now += 10 * wait;
            } else if op < 5 {
                let (r, p) = lab.send(&udp_packet(inside, outside, b"x").bytes(), Outbound);
                let live: HashMap<_, _> = model
                    .iter()
                    .filter(|(_, (_, s))| s.values().any(|d| *d > now))
                    .map(|(k, (e, _))| (*e, *k))
                    .collect();
                let known = live.values().any(|k| *k == inside);
                let free = |(guest, end): &(Ipv4Addr, u64)| {
                    *end <= now
                        && (filtering != Behaviour::EndpointIndependent || guest == inside.ip() || end + 120 <= now)
                };
                if !known && r == Dropped(guestnet_core::stats::DropReason::PortsExhausted) {
                    // Under endpoint-independent filtering ports rest, and a guest has only its own of those.
                    prop_assert_eq!(last.values().filter(|l| !free(l)).count(), 40);
                    while lab.nat.poll_output().is_some() {}
                    continue;
                }
                prop_assert_eq!(r, Translated);
                let ext = src(&p);
                if known {
                    prop_assert_eq!(live.get(&ext), Some(&inside), "the mapping stays");
                } else {
                    prop_assert!(last.get(&ext).is_none_or(free), "a port rests");
                    prop_assert!(!live.contains_key(&ext), "an external end belongs to one");
                    model.insert(inside, (ext, HashMap::new()));
                }
                last.insert(ext, (*inside.ip(), now + 125));
                model.entry(inside).and_modify(|m| {
                    m.1.insert(outside, now + 125);
                });
            } else {
                let ext = SocketAddrV4::new([203, 0, 113, 1].into(), 50_000 + gp * 3);
                let (r, p) = lab.send(&udp_packet(outside, ext, b"y").bytes(), Inbound);
                let allowed = model.iter().find(|(_, (e, s))| {
                    *e == ext
                        && s.iter().any(|(o, deadline)| {
                            *deadline > now
                                && match filtering {
                                    Behaviour::EndpointIndependent => true,
                                    Behaviour::AddressDependent => o.ip() == outside.ip(),
                                    Behaviour::AddressAndPortDependent => *o == outside,
                                }
                        })
                });
                match r {
                    Translated => {
                        let (k, _) = allowed.expect("somebody who expects it");
                        prop_assert_eq!(dst(&p), *k);
                    }
                    _ => prop_assert!(allowed.is_none(), "{r:?}"),
                }
            }
        }
    }
}

#[test]
fn a_packet_without_room_for_its_fragments_is_unchanged() {
    // Each of 8 bytes of data has a header of 60; there is room for the packet, and not for that.
    let mut lab = Lab::new(|c| {
        (c.mtu_outside, c.mtu_inside, c.output_bytes) = (68, 68, 10_000);
        c.filtering_udp = Behaviour::EndpointIndependent;
    });
    let (a, x) = (at("192.168.64.2:50000"), at("198.51.100.1:80"));
    let ext = lab.map(&udp_packet(a, x, b"").bytes());
    for (packet, way) in [
        (udp_packet(a, x, &[7; 1200]), Outbound),
        (udp_packet(x, ext, &[7; 1200]), Inbound),
        (udp_packet(a, ext, &[7; 1200]), Outbound),
    ] {
        let before = lab.nat.stats().drops_for(guestnet_core::stats::DropReason::BufferLimit);
        let packet = packet.options(&[1; 40]);
        let (r, bytes) = lab.send(&packet.bytes(), way);
        assert_eq!(r, Dropped(guestnet_core::stats::DropReason::BufferLimit));
        assert_eq!(bytes, packet.bytes());
        assert_eq!(lab.nat.stats().drops_for(guestnet_core::stats::DropReason::BufferLimit), before + 1);
        // A fragment of a packet, too, and the rest of the engine is as it was.
        assert_eq!(lab.nat.output_len(), 0);
    }
    let cut = udp_packet(a, x, &[7; 100]).options(&[1; 40]);
    assert_eq!(lab.out(&cut.bytes()), Fragmented);
    assert!(lab.nat.output_len() > 10);
}

fn lab_translate(nat: &mut NatEngine, p: &[u8]) -> Vec<u8> {
    let mut q = p.to_vec();
    assert_eq!(nat.translate(&mut q, Outbound, Time(0)), NatResult::Translated);
    q
}

#[test]
fn a_hundred_thousand_fragments_stay_bounded() {
    let mut lab = Lab::new(|c| (c.fragment_sets, c.fragment_bytes) = (64, 20_000));
    let mut seed = 7u32;
    for i in 0..100_000u32 {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let mut p =
            udp_packet(at("192.168.64.2:50000"), at("198.51.100.1:80"), &[1; 64]).id((seed >> 20) as u16);
        p.frag = ((seed >> 8) as u16 & 0x3f) | if seed & 4 == 0 { ipv4::MF } else { 0 };
        let mut p = p.bytes();
        if seed & 3 == 0 {
            put(&mut p, 12, &[192, 168, 64, (seed >> 24) as u8 | 2]);
            ipv4::fill_checksum(&mut p);
        }
        lab.ns += 1000;
        lab.nat.translate(&mut p, if i % 3 == 0 { Inbound } else { Outbound }, Time(lab.ns));
        while lab.nat.poll_output().is_some() {}
        let (sets, bytes) = lab.nat.fragment_usage();
        assert!(sets <= 64 && bytes <= 20_000);
        assert!(be16(&p, 2) as usize == p.len());
    }
}
