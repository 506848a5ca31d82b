//! Theory of operation: the control side may not keep up, and then events are lost. Each one is counted at the port whose
//! guest caused it, and nothing counts as delivered that was not.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/net.rs"]
mod net;

use guestnet_core::stats::DropReason::EventRingFull;
use guestnet_core::types::{PortId, ServiceId};
use guestnet_wire::ether::Mac;
use guestnet_wire::{arp, proto};
use net::{A, B, Net, addr, arp_frame, guest_ip, mac, port_config, udp_frame};

#[test]
fn every_kind_of_lost_event_is_counted() {
    let mut n = Net::new();
    n.core.add_service(ServiceId(1), proto::UDP, addr("192.168.64.1:67").ip(), 67);
    n.fx.event_ring_full = true;
    // A datagram for a service.
    n.dropped(EventRingFull, |n| n.udp(A, 68, "192.168.64.1:67", b"request"));
    // A flow that opens.
    n.dropped(EventRingFull, |n| n.udp(A, 4000, "203.0.113.1:9", b"out"));
    assert_eq!(n.core.flows().count(), 1, "the flow works all the same");
    // A flow that ends.
    n.dropped(EventRingFull, |n| assert!(n.pass_ms(400_000) > 0));
    // A refusal; the packet itself is dropped for its own reason.
    let before = n.drops(EventRingFull);
    n.send(A, udp_frame(A, 4000, addr("192.168.64.1:99"), b"to nobody"));
    assert_eq!(n.drops(EventRingFull) - before, 1);
    // An address that is seen.
    let c = PortId(3);
    n.core.add_port(c, port_config()).unwrap();
    n.dropped(EventRingFull, |n| {
        n.send(c, arp_frame(arp::REQUEST, mac(c), guest_ip(c), Mac::BROADCAST, guest_ip(c)));
    });
    assert!(n.fx.events.is_empty());
    assert_eq!(n.core.port_counters(B).unwrap().drops[EventRingFull as usize], 0);
}
