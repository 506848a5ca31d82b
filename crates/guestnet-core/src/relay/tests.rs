//! The relay over the layers that it uses, without a network around them.

use crate::common::Mock;
use crate::context::Layers;
use crate::interface::config::{ForwardSpec, Limits};
use crate::interface::effects::{Close, Event};
use crate::interface::stats::DropReason;
use crate::interface::types::{FlowId, ForwardId, FrameMeta, PortConfig, PortId, ServiceId, SockId, Time};
use crate::l2::lan::Sender;
use crate::net::{A, B, Ip4, addr, config, guest_addr, guest_ip, mac, port_config, read, syn, udp_frame};
use crate::relay::Relay;
use guestnet_wire::{parse, proto};

struct World {
    layers: Layers,
    relay: Relay,
    fx: Mock,
    now: Time,
}

impl World {
    fn new(limit: impl FnOnce(&mut Limits)) -> World {
        let now = Time(1_000_000_000);
        let mut c = config();
        limit(&mut c.limits);
        let mut w = World { layers: Layers::new(&c), relay: Relay::new(&c, now), fx: Mock::new(), now };
        for port in [A, B] {
            let config = PortConfig { mac: Some(mac(port)), ..port_config() };
            let slot = w.layers.lan.add_port(now, port, config).unwrap().unwrap();
            w.layers.lan.bind_address(now, port, guest_ip(port).into(), None).unwrap();
            w.layers.gateway.add_port(now, slot, port.0);
            w.relay.add_port(now, slot);
        }
        w
    }

    fn slot(&self, port: PortId) -> u32 {
        self.layers.lan.slot(port).unwrap()
    }

    fn udp(&mut self, port: PortId, from: u16, to: &str) -> Result<Option<ServiceId>, DropReason> {
        let mut frame = udp_frame(port, from, addr(to), b"ping");
        let p = parse::parse_ip(&frame, 14).unwrap();
        let sender = Sender { slot: self.slot(port), mac: mac(port) };
        let cx = &mut self.layers.context(self.now, &mut self.fx);
        self.relay.udp_out(cx, sender, &mut frame, &p, FrameMeta::default())
    }

    fn tcp(&mut self, port: PortId, from: u16, to: &str) -> Result<(), DropReason> {
        let mut frame = syn(port, from, to);
        let p = parse::parse_ip(&frame, 14).unwrap();
        let sender = Sender { slot: self.slot(port), mac: mac(port) };
        let cx = &mut self.layers.context(self.now, &mut self.fx);
        self.relay.tcp_out(cx, sender, &mut frame, &p, FrameMeta::default())
    }

    fn audit(&self) {
        self.relay.audit(&self.layers.lan).unwrap();
    }
}

#[test]
fn flows_of_one_source_port_share_a_socket_that_ends_with_the_last_one() {
    let mut w = World::new(|_| ());
    assert_eq!(w.udp(A, 4000, "203.0.113.1:9"), Ok(None));
    assert_eq!(w.udp(A, 4000, "203.0.113.2:9"), Ok(None));
    assert_eq!(w.fx.opened.len(), 1);
    w.audit();
    let (mapping, sock) = w.fx.opened[0];
    let cx = &mut w.layers.context(w.now, &mut w.fx);
    w.relay.udp_in(cx, mapping, addr("203.0.113.2:9"), b"pong", 0);
    let got = read(&w.fx.take()[0]);
    assert_eq!((got.src(), got.dst()), (addr("203.0.113.2:9"), guest_addr(A, 4000)));
    while let Some(at) = w.relay.next_timer(w.now) {
        w.now = w.now.max(at);
        w.relay.timers(&mut w.layers.context(w.now, &mut w.fx));
    }
    assert_eq!(w.fx.closed, [(sock, Close::Graceful)]);
    assert_eq!(w.relay.flows(&w.layers.lan, w.now).count(), 0);
    w.audit();
}

#[test]
fn a_guest_at_its_limit_evicts_its_own_flows_alone() {
    let mut w = World::new(|l| l.flows_per_port = 2);
    assert_eq!(w.udp(B, 1, "203.0.113.1:9"), Ok(None));
    for port in 1..=5 {
        assert_eq!(w.udp(A, port, "203.0.113.1:9"), Ok(None));
        w.audit();
    }
    assert_eq!([A, B].map(|p| w.relay.flows_of(w.slot(p))), [2, 1]);
    let sources: Vec<u16> = w.relay.flows(&w.layers.lan, w.now).map(|f| f.guest.port()).collect();
    assert!(sources.contains(&4) && sources.contains(&5), "{sources:?}");
}

#[test]
fn a_datagram_for_a_service_is_returned_to_the_caller() {
    let mut w = World::new(|_| ());
    w.layers.lan.addressing_mut().add_service(ServiceId(7), proto::UDP, addr("192.168.64.1:53").ip(), 53);
    assert_eq!(w.udp(A, 4000, "192.168.64.1:53"), Ok(Some(ServiceId(7))));
    assert_eq!(w.udp(A, 4000, "192.168.64.1:54"), Err(DropReason::BadDestination));
    assert_eq!(w.relay.flows_of(w.slot(A)), 0);
}

#[test]
fn a_port_that_goes_takes_its_flows_along() {
    let mut w = World::new(|_| ());
    w.tcp(A, 1, "203.0.113.1:80").unwrap();
    w.tcp(A, 2, "203.0.113.1:80").unwrap();
    w.udp(A, 3, "203.0.113.1:80").unwrap();
    w.udp(B, 3, "203.0.113.1:80").unwrap();
    let slot = w.slot(A);
    let more = w.relay.close_flows(&mut w.layers.context(w.now, &mut w.fx), slot, 1);
    assert_eq!((more, w.relay.flows_of(slot)), (true, 2));
    w.relay.remove_port(&mut w.layers.context(w.now, &mut w.fx), slot);
    assert_eq!((w.fx.closed.len(), w.relay.flows_of(slot)), (3, 0));
    w.audit();
    let closed = w.fx.events.iter().filter(|e| matches!(e, Event::FlowClosed { port: A, .. })).count();
    assert_eq!(closed, 3);
}

#[test]
fn a_connection_from_outside_waits_until_the_guest_is_known() {
    let mut w = World::new(|_| ());
    let (c, at) = (PortId(3), w.now);
    let slot = w.layers.lan.add_port(at, c, port_config()).unwrap().unwrap();
    w.layers.lan.bind_address(at, c, guest_ip(c).into(), None).unwrap();
    w.layers.gateway.add_port(at, slot, c.0);
    w.relay.add_port(at, slot);
    w.relay.add_forward(ForwardId(1), ForwardSpec::published(proto::TCP, guest_addr(c, 80)));
    let accept = |w: &mut World, sock: SockId| {
        let cx = &mut w.layers.context(w.now, &mut w.fx);
        w.relay.accept_tcp(cx, ForwardId(1), sock, addr("203.0.113.9:5000"))
    };
    let sock = w.fx.new_sock();
    let flow: FlowId = accept(&mut w, sock).unwrap();
    assert_eq!(w.fx.take().len(), 1, "an ARP request");
    w.relay.resume(&mut w.layers.context(w.now, &mut w.fx), flow, mac(c));
    let got = read(&w.fx.take()[0]);
    assert_eq!((got.src(), got.dst()), (addr("203.0.113.9:5000"), guest_addr(c, 80)));
    let other = w.fx.new_sock();
    let flow = accept(&mut w, other).unwrap();
    w.relay.give_up(&mut w.layers.context(w.now, &mut w.fx), flow);
    assert_eq!(w.fx.closed.last().map(|c| c.0), Some(other));
    assert_eq!(w.layers.lan.counters().drops[DropReason::NoEndpoint as usize], 1);
    w.audit();
}

#[test]
fn a_report_of_a_flow_that_was_lost_is_counted() {
    let mut w = World::new(|_| ());
    w.fx.event_ring_full = true;
    w.udp(A, 1, "203.0.113.1:9").unwrap();
    let slot = w.slot(A);
    w.relay.remove_port(&mut w.layers.context(w.now, &mut w.fx), slot);
    assert_eq!(w.layers.lan.counters().drops[DropReason::EventRingFull as usize], 2);
}

#[test]
fn a_protocol_that_is_not_relayed_reaches_other_guests_and_nothing_else() {
    const SCTP: u8 = 132;
    let mut w = World::new(|_| ());
    let mut send = |to: &str| {
        let mut frame = Ip4::new(A, to.parse().unwrap(), SCTP).frame(&[0; 12]);
        let p = parse::parse_ip(&frame, 14).unwrap();
        let sender = Sender { slot: w.slot(A), mac: mac(A) };
        let cx = &mut w.layers.context(w.now, &mut w.fx);
        let done = w.relay.other_out(cx, sender, &mut frame, &p, FrameMeta::default());
        let sent = w.fx.take();
        assert_eq!(sent.len(), 1);
        (done, sent[0].port, read(&sent[0]).p.proto)
    };
    assert_eq!(send("192.168.64.12"), (Ok(()), B, SCTP));
    let refused = Err(DropReason::UnsupportedProtocol);
    assert_eq!(send("203.0.113.1"), (refused, A, proto::ICMP));
    assert_eq!(send("192.168.64.1"), (refused, A, proto::ICMP));
}
