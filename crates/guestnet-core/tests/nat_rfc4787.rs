//! Theory of operation: RFC 4787 (UDP), requirement by requirement, on the packet engine with a simulated outside.
mod nat_common;
use guestnet_core::nat::Behaviour::{AddressAndPortDependent, AddressDependent, EndpointIndependent};
use guestnet_core::stats::DropReason;
use guestnet_wire::ipv4;
use nat_common::*;

const A1000: &str = "192.168.64.2:50000";

#[test]
fn rfc4787_req1_endpoint_independent_mapping() {
    let mut lab = Lab::default();
    let first = lab.map(&udp(A1000, "198.51.100.1:1"));
    assert_eq!(lab.map(&udp(A1000, "198.51.100.1:2")), first);
    assert_eq!(lab.map(&udp(A1000, "198.51.100.2:1")), first);
    assert_eq!(*first.ip(), ip(EXT));
}

#[test]
fn rfc4787_req1_mapping_behaviour_can_be_chosen() {
    for (b, same_address, same_port) in [
        (EndpointIndependent, true, true),
        (AddressDependent, true, false),
        (AddressAndPortDependent, false, false),
    ] {
        let mut lab = Lab::new(|c| c.mapping_udp = b);
        let first = lab.map(&udp(A1000, "198.51.100.1:1"));
        assert_eq!(lab.map(&udp(A1000, "198.51.100.1:2")) == first, same_address, "{b:?}");
        assert_eq!(lab.map(&udp(A1000, "198.51.100.2:1")) == first, same_port, "{b:?}");
        assert_eq!(lab.map(&udp(A1000, "198.51.100.1:1")), first, "{b:?}");
    }
}

#[test]
fn rfc4787_req2_pooling_is_paired() {
    let mut lab = Lab::new(|c| c.external = (1..=4).map(|i| ip(&format!("203.0.113.{i}"))).collect());
    let mut used = std::collections::HashSet::new();
    for guest in 2..30 {
        let first = lab.map(&udp(&format!("192.168.64.{guest}:50000"), "198.51.100.1:1"));
        used.insert(*first.ip());
        for port in 50001..50010 {
            let next = lab.map(&udp(&format!("192.168.64.{guest}:{port}"), "198.51.100.2:9"));
            assert_eq!(next.ip(), first.ip());
        }
    }
    assert_eq!(used.len(), 4, "the guests are spread over the addresses");
}

#[test]
fn rfc4787_req3_no_port_overloading() {
    let mut lab = Lab::default();
    let a = lab.map(&udp("192.168.64.2:50000", "198.51.100.1:1"));
    let b = lab.map(&udp("192.168.64.3:50000", "198.51.100.1:1"));
    assert_ne!(a, b);
    let mut seen = std::collections::HashSet::from([a, b]);
    for guest in 4..100 {
        assert!(seen.insert(lab.map(&udp(&format!("192.168.64.{guest}:50000"), "198.51.100.1:1"))));
    }
}

#[test]
fn rfc4787_req3a_port_range_class() {
    let mut lab = Lab::new(|c| {
        c.ports = (1, 65535);
        c.port_preservation = false;
    });
    for port in [500, 5000] {
        let ext = lab.map(&udp(&format!("192.168.64.2:{port}"), "198.51.100.1:1"));
        assert_eq!(ext.port() < 1024, port < 1024);
    }
}

#[test]
fn rfc4787_req2_a_port_that_is_published_on_another_address_keeps_that_one() {
    let mut lab = Lab::new(|c| c.external = vec![ip("203.0.113.1"), ip("203.0.113.2")]);
    let first = *lab.map(&udp(A1000, "198.51.100.1:1")).ip();
    let other = if first == ip("203.0.113.1") { "203.0.113.2:53" } else { "203.0.113.1:53" };
    lab.nat.add_forward(17, at(other), at("192.168.64.2:53")).unwrap();
    assert_eq!(lab.map(&udp("192.168.64.2:53", "198.51.100.1:9")), at(other));
    assert_eq!(*lab.map(&udp("192.168.64.2:50001", "198.51.100.1:1")).ip(), first);
}

#[test]
fn rfc4787_req3a_where_the_range_has_such_ports() {
    let mut lab = Lab::default();
    assert!(lab.map(&udp("192.168.64.2:500", "198.51.100.1:1")).port() >= 49152, "the default has none");
    let mut lab = Lab::new(|c| c.ports = (1022, 65535));
    let low =
        |lab: &mut Lab, port| lab.map(&udp(&format!("192.168.64.2:{port}"), "198.51.100.1:1")).port() < 1024;
    assert_eq!([500, 501, 502].map(|port| low(&mut lab, port)), [true, true, false]);
}

#[test]
fn rfc4787_req4_parity_ends_with_the_ports_that_have_it() {
    let mut lab = Lab::new(|c| c.ports = (60_000, 60_003));
    let odd =
        |lab: &mut Lab, port| lab.map(&udp(&format!("192.168.64.2:{port}"), "198.51.100.1:1")).port() % 2;
    assert_eq!([2000, 2002, 2004].map(|port| odd(&mut lab, port)), [0, 0, 1]);
}

#[test]
fn rfc4787_req4_parity() {
    let mut lab = Lab::default();
    for port in 2000..2100u16 {
        let ext = lab.map(&udp(&format!("192.168.64.2:{port}"), "198.51.100.1:1"));
        assert!((49152..=65535).contains(&ext.port()));
        assert_eq!(ext.port() % 2, port % 2);
    }
}

#[test]
fn rfc4787_req5_mapping_lives_300_seconds() {
    let mut lab = Lab::default();
    let ext = lab.map(&udp(A1000, "198.51.100.1:1"));
    let reply = udp("198.51.100.1:1", &ext.to_string());
    // Without inbound refresh, so that the reply does not prolong what it measures.
    for (wait, lives) in [(119, true), (299, true), (301, false)] {
        let mut lab = Lab::new(|c| c.inbound_refresh = false);
        assert_eq!(lab.map(&udp(A1000, "198.51.100.1:1")), ext);
        lab.sleep(wait);
        assert_eq!(lab.inn(&reply) == Translated, lives, "after {wait} s");
        lab.wait(1);
        assert_eq!(lab.nat.connection_count(), usize::from(lives));
    }
}

#[test]
fn rfc4787_req5a_shorter_for_answered_dns() {
    let mut lab = Lab::default();
    let ext = lab.map(&udp(A1000, "198.51.100.1:53"));
    let reply = udp("198.51.100.1:53", &ext.to_string());
    lab.wait(100);
    lab.take(&reply);
    lab.wait(9);
    lab.take(&reply);
    lab.wait(2);
    assert_eq!(lab.inn(&reply), Dropped(DropReason::NoFlow));
    assert_eq!(lab.nat.connection_count(), 0);
}

#[test]
fn rfc4787_req6_outbound_refresh() {
    let mut lab = Lab::new(|c| c.inbound_refresh = false);
    let ext = lab.map(&udp(A1000, "198.51.100.1:1"));
    for _ in 0..12 {
        lab.wait(100);
        assert_eq!(lab.map(&udp(A1000, "198.51.100.1:1")), ext);
    }
    lab.take(&udp("198.51.100.1:1", &ext.to_string()));
}

#[test]
fn rfc4787_req6a_inbound_refresh_can_be_chosen() {
    for refresh in [true, false] {
        let mut lab = Lab::new(|c| c.inbound_refresh = refresh);
        let ext = lab.map(&udp(A1000, "198.51.100.1:1"));
        let reply = udp("198.51.100.1:1", &ext.to_string());
        lab.wait(200);
        lab.take(&reply);
        lab.wait(200);
        assert_eq!(lab.inn(&reply) == Translated, refresh);
    }
}

#[test]
fn rfc4787_req7_address_conflict_is_an_error() {
    let mut c = guestnet_core::nat::NatEngineConfig::new(ip("192.168.64.1"));
    c.secret = [1; 32];
    assert!(guestnet_core::nat::NatEngine::new(c).is_err());
}

#[test]
fn rfc4787_req8_filtering() {
    for (b, other_port, other_host) in [
        (EndpointIndependent, true, true),
        (AddressDependent, true, false),
        (AddressAndPortDependent, false, false),
    ] {
        let mut lab = Lab::new(|c| c.filtering_udp = b);
        let ext = lab.map(&udp(A1000, "198.51.100.1:1")).to_string();
        assert_eq!(lab.inn(&udp("198.51.100.1:1", &ext)), Translated);
        assert_eq!(lab.inn(&udp("198.51.100.1:2", &ext)) == Translated, other_port, "{b:?}");
        assert_eq!(lab.inn(&udp("198.51.100.2:1", &ext)) == Translated, other_host, "{b:?}");
        if !other_host {
            assert_eq!(lab.inn(&udp("198.51.100.2:1", &ext)), Dropped(DropReason::Filtered));
        }
        // Nobody outside makes state.
        assert_eq!(lab.nat.connection_count(), 1);
    }
}

#[test]
fn rfc4787_req9_hairpin_source_is_the_external_end() {
    let mut lab = Lab::default();
    // B has opened a port towards A's external address.
    let b_ext = lab.map(&udp("192.168.64.3:50001", "198.51.100.1:1"));
    let a_ext = lab.map(&udp(A1000, "198.51.100.1:1"));
    assert_eq!(
        lab.out(&udp(A1000, &b_ext.to_string())),
        Dropped(DropReason::Filtered),
        "filtered as from outside"
    );
    // B's packet is filtered at A's end too, but opens B's.
    assert_eq!(
        lab.out(&udp("192.168.64.3:50001", &a_ext.to_string())),
        Hairpinned,
        "A tried B, so B may answer"
    );
    let (r, p) = lab.send(&udp(A1000, &b_ext.to_string()), Outbound);
    assert_eq!(r, Hairpinned);
    assert_eq!((src(&p), dst(&p)), (a_ext, at("192.168.64.3:50001")));
    assert_eq!(p[8], 63, "one hop, one step of the TTL");
    let (r, p) = lab.send(&udp("192.168.64.3:50001", &a_ext.to_string()), Outbound);
    assert_eq!(r, Hairpinned);
    assert_eq!((src(&p), dst(&p)), (b_ext, at(A1000)));
}

#[test]
fn rfc4787_req9a_hairpin_with_independent_filtering() {
    let mut lab = Lab::new(|c| c.filtering_udp = EndpointIndependent);
    let b_ext = lab.map(&udp("192.168.64.3:50001", "198.51.100.1:1"));
    let (r, p) = lab.send(&udp(A1000, &b_ext.to_string()), Outbound);
    assert_eq!(r, Hairpinned);
    assert_eq!(*src(&p).ip(), ip(EXT));
    assert_eq!(dst(&p), at("192.168.64.3:50001"));
    let mut off = Lab::new(|c| c.hairpin = false);
    assert_eq!(off.out(&udp(A1000, "203.0.113.1:50001")), Dropped(DropReason::Policy));
}

#[test]
fn rfc4787_req10_no_alg() {
    let mut lab = Lab::default();
    for (port, data) in [
        (21, &b"PORT 192,168,64,2,195,80\r\n"[..]),
        (5060, b"INVITE sip:x@198.51.100.1 SIP/2.0\r\nContact: <sip:a@192.168.64.2:50000>\r\n\r\n"),
        (1720, b"\x03\x00\x00\x10\xc0\xa8\x40\x02\xc3\x50 h323"),
    ] {
        let dst = format!("198.51.100.1:{port}");
        let (r, p) = lab.send(&udp_packet(at(A1000), at(&dst), data).bytes(), Outbound);
        assert_eq!((r, &p[28..]), (Translated, data));
        let (r, p) = lab.send(&tcp_packet(at(A1000), at(&dst), 2, b"").bytes(), Outbound);
        assert_eq!((r, p.len()), (Translated, 40));
        let (r, p) = lab.send(&tcp_packet(at(A1000), at(&dst), 0x18, data).bytes(), Outbound);
        assert_eq!((r, &p[40..]), (Translated, data));
    }
}

#[test]
fn rfc4787_req11_deterministic_when_the_port_is_taken() {
    let mut lab = Lab::default();
    let taken = lab.map(&udp("192.168.64.3:50000", "198.51.100.1:1"));
    assert_eq!(taken.port(), 50000);
    let first = lab.map(&udp(A1000, "198.51.100.1:1"));
    assert_ne!(first.port(), 50000);
    assert_eq!(lab.map(&udp(A1000, "198.51.100.2:2")), first);
    let ext = first.to_string();
    assert_eq!(lab.inn(&udp("198.51.100.1:7", &ext)), Translated);
    assert_eq!(lab.inn(&udp("198.51.100.9:7", &ext)), Dropped(DropReason::Filtered));
}

#[test]
fn rfc4787_req12_icmp_keeps_the_mapping_and_is_not_filtered_by_source() {
    let mut lab = Lab::default();
    let (_, sent) = lab.send(&udp(A1000, "198.51.100.1:1"), Outbound);
    let ext = src(&sent);
    for (kind, code) in [(3, 0), (3, 1), (3, 3), (11, 0)] {
        let e = error("192.0.2.99", EXT, kind, code, [0; 4], &sent);
        let p = lab.take(&e);
        assert_eq!(*dst(&p).ip(), ip(A));
        assert_eq!(*src(&p).ip(), ip("192.0.2.99"));
        assert_eq!(lab.map(&udp(A1000, "198.51.100.1:1")), ext);
    }
}

#[test]
fn rfc4787_req13_dont_fragment_too_big() {
    let mut lab = Lab::new(|c| (c.mtu_outside, c.mtu_inside) = (1400, 1300));
    let big = udp_packet(at(A1000), at("198.51.100.1:1"), &[7; 3000]).df().bytes();
    assert_eq!(lab.out(&big), TooBig(1400));
    let (d, p, t, c) = lab.the_error();
    assert_eq!((d, t, c, &p[26..28]), (Inbound, 3, 4, &1400u16.to_be_bytes()[..]));
    assert_eq!((*src(&p).ip(), *dst(&p).ip()), (ip("192.168.64.1"), ip(A)));
    assert_eq!(&p[28..48], &big[..20], "it quotes what the guest sent");
    assert_eq!(lab.nat.connection_count(), 0);
    let ext = lab.map(&udp(A1000, "198.51.100.1:1"));
    let big = udp_packet(at("198.51.100.1:1"), ext, &[7; 3000]).df().bytes();
    assert_eq!(lab.inn(&big), TooBig(1300));
    let (d, p, t, c) = lab.the_error();
    assert_eq!((d, t, c, *src(&p).ip()), (Outbound, 3, 4, ip(EXT)));
}

/// What is turned round leaves by the link that it came by: the MTU outside says nothing of it.
#[test]
fn rfc4787_req13_hairpinned_packets_have_the_mtu_of_the_way_they_go() {
    for (outside, inside) in [(1500, 1400), (1400, 1500)] {
        let mut lab = Lab::new(|c| {
            (c.mtu_outside, c.mtu_inside) = (outside, inside);
            c.filtering_udp = EndpointIndependent;
        });
        let b_ext = lab.map(&udp("192.168.64.3:2222", "198.51.100.1:9"));
        // The first packet of a connection, and a later one, which is known by then.
        for _ in 0..2 {
            let packet = udp_packet(at(A1000), b_ext, &[7; 1422]);
            let r = lab.out(&packet.clone().df().bytes());
            if inside < 1450 {
                assert_eq!(r, TooBig(inside));
                let (d, p, t, c) = lab.the_error();
                assert_eq!((d, t, c, &p[26..28]), (Inbound, 3, 4, &inside.to_be_bytes()[..]));
                assert_eq!((*src(&p).ip(), *dst(&p).ip()), (ip("192.168.64.1"), ip(A)));
                assert_eq!(lab.out(&packet.bytes()), Fragmented);
                let out = lab.output();
                assert!(out.iter().all(|(d, f)| *d == Inbound && f.len() <= 1400), "{out:?}");
                assert_eq!(out.len(), 2);
            } else {
                assert_eq!(r, Hairpinned);
            }
        }
        // Fragments too, the first and a later one, and errors.
        let cut = udp_packet(at(A1000), b_ext, &[7; 2800]).fragments(1424);
        for (i, f) in cut.iter().take(2).enumerate() {
            let mut f = f.clone();
            f[6] |= 0x40;
            ipv4::fill_checksum(&mut f);
            let want = if inside < 1444 { TooBig(inside) } else { Hairpinned };
            assert_eq!(lab.out(&f), want, "fragment {i}, MTU inside {inside}");
        }
    }
}

/// An ICMP error may be of any length. One with DF set is not fragmented, and causes no further error.
#[test]
fn rfc4787_req13_errors_too_big_for_the_next_link_keep_dont_fragment() {
    let mut lab = Lab::new(|c| (c.mtu_outside, c.mtu_inside) = (1500, 600));
    let (_, sent) = lab.send(&udp_packet(at(A1000), at("198.51.100.1:1"), &[1; 1000]).bytes(), Outbound);
    let mut large = error("198.51.100.1", EXT, 3, 3, [0; 4], &sent);
    assert_eq!(lab.inn(&large), Fragmented);
    assert_eq!(lab.output().len(), 2);
    large[6] = 0x40;
    ipv4::fill_checksum(&mut large);
    assert_eq!(lab.inn(&large), TooBig(600));
    assert_eq!(lab.output(), []);
}

#[test]
fn rfc4787_req13a_fragments_in_order() {
    let mut lab = Lab::new(|c| (c.mtu_outside, c.mtu_inside) = (1400, 1300));
    let data: Vec<u8> = (0..3000).map(|i| i as u8).collect();
    let (r, whole) = lab.send(&udp_packet(at(A1000), at("198.51.100.1:1"), &data).bytes(), Outbound);
    assert_eq!(r, Fragmented);
    let out = lab.output();
    assert_eq!(out.len(), 3);
    let mut joined = Vec::new();
    for (d, f) in &out {
        let v = guestnet_wire::parse::parse_ip(f, 0).unwrap();
        let frag = v.fragment.unwrap();
        assert_eq!((*d, frag.offset as usize), (Outbound, joined.len()));
        assert!(f.len() <= 1400);
        joined.extend_from_slice(&f[20..]);
        assert_eq!(frag.more, joined.len() < 3008);
    }
    assert_eq!(joined, whole[20..]);
}

/// Outside, the fragments of two guests come from one address: no two packets have one identification.
#[test]
fn rfc4787_req13a_packets_that_are_cut_have_identifications_of_their_own() {
    let mut lab = Lab::new(|c| {
        (c.mtu_outside, c.mtu_inside) = (1400, 1400);
        c.filtering_udp = EndpointIndependent;
    });
    let b_ext = lab.map(&udp("192.168.64.3:2222", "198.51.100.1:9"));
    for (to, direction) in [(at("198.51.100.1:1"), Outbound), (b_ext, Inbound)] {
        let mut ids = std::collections::BTreeSet::new();
        for guest in [A1000, "192.168.64.4:50000", "192.168.64.5:50000"] {
            assert_eq!(lab.out(&udp_packet(at(guest), to, &[7; 3000]).id(77).bytes()), Fragmented);
            let out = lab.output();
            assert!(out.len() == 3 && out.iter().all(|(d, f)| *d == direction && f[4..6] == out[0].1[4..6]));
            ids.insert(out[0].1[4..6].to_vec());
        }
        assert_eq!(ids.len(), 3);
    }
}

#[test]
fn rfc4787_req14_fragments_in_any_order() {
    let data: Vec<u8> = (0..4000).map(|i| (i / 8) as u8).collect();
    let packet = udp_packet(at(A1000), at("198.51.100.1:1"), &data);
    let orders: [&[usize]; 4] = [&[0, 1, 2, 3], &[3, 2, 1, 0], &[1, 3, 0, 2], &[2, 0, 3, 1]];
    for order in orders {
        let mut lab = Lab::default();
        let parts = packet.fragments(1024);
        let mut got = Vec::new();
        for i in order {
            match lab.send(&parts[*i], Outbound) {
                (Translated, p) => got.push(p),
                (Held, _) => {}
                (r, _) => panic!("{r:?}"),
            }
            got.extend(lab.output().into_iter().map(|(d, p)| {
                assert_eq!(d, Outbound);
                p
            }));
        }
        assert_eq!(got.len(), 4, "{order:?}");
        let mut whole = vec![0; 4008];
        for p in &got {
            assert_checksums(p);
            assert_eq!((*src(p).ip(), p[8]), (ip(EXT), 63));
            assert_eq!(&p[4..6], &got[0][4..6], "one id for all");
            let off = usize::from(guestnet_wire::be16(p, 6) & 0x1fff) * 8;
            whole[off..off + p.len() - 20].copy_from_slice(&p[20..]);
        }
        let joined = IpPacket::new(ip(EXT), ip(X1), 17, whole).bytes();
        assert_checksums(&joined);
        assert_eq!(&joined[28..], data);
    }
}

/// A packet of any length in pieces of any size: where some of it went, the rest does.
#[test]
fn rfc4787_req14_any_number_of_fragments() {
    let data: Vec<u8> = (0..65_000).map(|i| (i / 256) as u8).collect();
    for size in [8, 48, 552, 904] {
        for reversed in [false, true] {
            let mut lab = Lab::default();
            let mut parts = udp_packet(at(A1000), at("198.51.100.1:1"), &data).fragments(size);
            if reversed {
                // The first fragment comes first, or more would have to wait than there is room for.
                parts[1..].reverse();
            }
            let went = parts.iter().filter(|p| lab.out(p) == Translated).count();
            assert_eq!(went, parts.len(), "pieces of {size} bytes");
            // Duplicates go too, and an overlap anywhere ends it.
            assert_eq!(lab.out(&parts[went / 2]), Translated);
            let mut overlap = udp_packet(at(A1000), at("198.51.100.1:1"), &[2; 2000]);
            overlap.payload.truncate(16);
            overlap.frag = (64 / 8) | ipv4::MF;
            if size != 16 {
                assert_eq!(lab.out(&overlap.bytes()), Dropped(DropReason::Reassembly));
                assert_eq!(lab.out(&parts[went / 2]), Dropped(DropReason::Reassembly));
                assert_eq!(lab.nat.fragment_usage(), (1, 0));
            }
        }
    }
}

#[test]
fn rfc4787_req14_inbound_fragments_in_any_order() {
    let mut lab = Lab::default();
    let ext = lab.map(&udp(A1000, "198.51.100.1:1"));
    let parts = udp_packet(at("198.51.100.1:1"), ext, &[9; 3000]).fragments(1000);
    assert_eq!(lab.inn(&parts[2]), Held);
    assert_eq!(lab.inn(&parts[1]), Held);
    assert_eq!(lab.inn(&parts[0]), Translated);
    let held = lab.output();
    assert_eq!(held.len(), 2);
    assert!(held.iter().all(|(d, p)| *d == Inbound && *dst(p).ip() == ip(A)));
    assert_eq!(lab.inn(&parts[3]), Translated);
}

#[test]
fn rfc4787_req14a_fragment_flood_is_bounded() {
    let mut lab = Lab::default();
    // 10,000 packets of which the first fragment never comes.
    for i in 0..10_000u16 {
        let f = udp_packet(at("192.168.64.9:5"), at("198.51.100.1:1"), &[0; 2000]).id(i).fragments(1000);
        lab.out(&f[1]);
    }
    let (sets, bytes) = lab.nat.fragment_usage();
    assert!(sets <= 1024 && bytes <= 1 << 20, "{sets} sets, {bytes} bytes");
    // Another guest does not notice.
    let f = udp_packet(at(A1000), at("198.51.100.1:1"), &[0; 2000]).fragments(1000);
    assert_eq!(lab.out(&f[1]), Held);
    assert_eq!(lab.out(&f[0]), Translated);
    assert_eq!(lab.output().len(), 1);
    lab.wait(16);
    assert_eq!(lab.nat.fragment_usage(), (0, 0));
}

/// Neither sets nor bytes are first come, first served, and the outside has its own.
#[test]
fn rfc4787_req14a_fragments_have_a_share_for_each_sender() {
    let data = [0; 2000];
    let incomplete = |from: String, to: String, id: u16| {
        udp_packet(at(&from), at(&to), &data).id(id).fragments(1000).remove(1)
    };
    let mut lab = Lab::new(|c| (c.fragment_sets, c.fragment_bytes) = (64, 400_000));
    let mine = udp_packet(at(A1000), at("198.51.100.1:1"), &data).fragments(1000);
    assert_eq!(lab.out(&mine[1]), Held);
    // Any number of addresses outside, each with next to nothing.
    for i in 0..2000u16 {
        let from = format!("198.51.{}.{}:5", 101 + i / 250, 1 + i % 250);
        lab.inn(&incomplete(from, format!("{EXT}:7"), i));
    }
    // Guests that want all that there is.
    for guest in 10..30 {
        for id in 0..100 {
            lab.out(&incomplete(format!("192.168.64.{guest}:5"), "198.51.100.1:1".into(), id));
        }
    }
    let (sets, bytes) = lab.nat.fragment_usage();
    assert!(sets <= 64 && bytes <= 400_000, "{sets} sets, {bytes} bytes");
    assert_eq!((lab.out(&mine[0]), lab.output().len()), (Translated, 1), "what waited is still there");
    let other = udp_packet(at("192.168.64.99:5"), at("198.51.100.1:1"), &data).fragments(1000);
    assert_eq!((lab.out(&other[1]), lab.out(&other[0]), lab.output().len()), (Held, Translated, 1));
    // Of bytes one sender has no more than it leaves to others.
    let mut lab = Lab::new(|c| (c.fragment_sets, c.fragment_bytes) = (1024, 80_000));
    for id in 0..60 {
        lab.out(&incomplete("192.168.64.9:5".into(), "198.51.100.1:1".into(), id));
    }
    let (_, bytes) = lab.nat.fragment_usage();
    assert!((18_000..=20_000).contains(&bytes), "{bytes} bytes");
    assert_eq!((lab.out(&mine[1]), lab.out(&mine[0]), lab.output().len()), (Held, Translated, 1));
}

#[test]
fn rfc4787_req14a_overlapping_fragments_are_refused() {
    let mut lab = Lab::default();
    let f = udp_packet(at(A1000), at("198.51.100.1:1"), &[1; 2000]).fragments(1000);
    let mut overlap = udp_packet(at(A1000), at("198.51.100.1:1"), &[2; 1992]);
    overlap.frag = 992 / 8;
    overlap.payload.truncate(1000);
    assert_eq!(lab.out(&f[0]), Translated);
    assert_eq!(lab.out(&overlap.bytes()), Dropped(DropReason::Reassembly));
    assert_eq!(lab.out(&f[1]), Dropped(DropReason::Reassembly), "the packet can never be whole now");
}
