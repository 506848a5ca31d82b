//! Theory of operation: frames that the network makes for guests, of both families: whole, in fragments over the MTU, and
//! with an unfinished checksum for a port that takes large frames.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/net.rs"]
mod net;

use guestnet_core::types::{Csum, PortConfig, PortId};
use guestnet_wire::{ether, gso, parse, proto};
use net::*;
use std::net::SocketAddr;

const C: PortId = PortId(7);

/// Has the network send a datagram to a guest whose link has this MTU; the frames.
fn datagram(src: &str, dst: &str, payload: &[u8], mtu: u16, gso_max: u32) -> Vec<(Vec<u8>, Csum)> {
    let mut n = Net::new();
    n.core.add_port(C, PortConfig { mtu, gso_max, ..port_config() }).unwrap();
    let (src, dst): (SocketAddr, SocketAddr) = (addr(src), addr(dst));
    n.core.service_send(n.now, C, mac(C), src, dst, payload, &mut n.fx);
    n.fx.take().into_iter().map(|s| (s.frame, s.meta.csum)).collect()
}

const ENDS: [(&str, &str); 2] =
    [("192.168.127.1:53", "192.168.127.7:1024"), ("[fd00::1]:53", "[fd00::7]:1024")];

#[test]
fn a_datagram_is_one_frame_of_its_family() {
    for (src, dst) in ENDS {
        for gso_max in [0, 65000] {
            let frames = datagram(src, dst, b"hello", 1500, gso_max);
            let [(frame, csum)] = frames.as_slice() else { panic!("one frame: {frames:?}") };
            let mut frame = frame.clone();
            if let Csum::Partial { start, offset } = *csum {
                gso::complete_checksum(&mut frame, start, offset).unwrap();
            }
            let p = parse::parse_ip(&frame, ether::HEADER_LEN).unwrap();
            assert!(parse::verify_ipv4_header(&frame, &p) && parse::verify_l4(&frame, &p), "{src}");
            assert_eq!(SocketAddr::new(p.src, p.src_port), addr(src));
            assert_eq!(SocketAddr::new(p.dst, p.dst_port), addr(dst));
            assert_eq!(&frame[p.payload..p.end], b"hello");
        }
    }
}

#[test]
fn over_the_mtu_it_is_fragments_of_its_family() {
    let payload: Vec<u8> = (0..4000u16).map(|i| i as u8).collect();
    for (src, dst) in ENDS {
        let mut data = Vec::new();
        let mut id = None;
        for (frame, _) in datagram(src, dst, &payload, 1280, 0) {
            assert!(frame.len() <= ether::HEADER_LEN + 1280);
            let p = parse::parse_ip(&frame, ether::HEADER_LEN).unwrap();
            let f = p.fragment.unwrap();
            assert_eq!((f.offset as usize, p.proto), (data.len(), proto::UDP));
            assert_eq!(*id.get_or_insert(f.id), f.id);
            data.extend_from_slice(&frame[p.l4..p.end]);
        }
        assert_eq!(data[8..], payload, "{src}");
    }
}

#[test]
fn addresses_of_two_families_make_no_frame() {
    assert!(datagram(ENDS[0].0, ENDS[1].1, b"hello", 1500, 0).is_empty());
}
