//! What tests of inspection share: rules about names, ClientHellos, and a guest that speaks TCP by hand.
#![allow(dead_code, missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::common::Sent;
use crate::net::*;
use guestnet_core::effects::{Event, FlowDenied};
use guestnet_core::policy::spec::{
    Action, Destination, Name, NameMatch, NamePattern, PolicyOptions, PolicySpec, PortRange, Protocol,
    RuleDirection, RuleSpec,
};
use guestnet_core::policy::table::RuleTable;
use guestnet_core::types::{FlowId, FrameMeta, PortId, SockId};
use guestnet_wire::proto;
use guestnet_wire::tcp::{Tcp, flags};
use std::net::IpAddr;
use std::sync::Arc;

/// The address that the guest got for `ok.example`.
pub const OK: &str = "203.0.113.7";
pub const OK_TLS: &str = "203.0.113.7:443";
pub const OK_HTTP: &str = "203.0.113.7:80";

pub fn rule(label: &str, action: Action, destination: Destination) -> RuleSpec {
    RuleSpec {
        label: label.into(),
        action,
        direction: RuleDirection::Out,
        endpoints: None,
        from: vec![],
        destination,
        ports: vec![],
        by: NameMatch::Conversation,
        log: false,
        limit: None,
        all_query_types: false,
    }
}

pub fn exact(text: &str) -> Destination {
    Destination::Name(NamePattern::Exact(Name::new(text.as_bytes()).unwrap()))
}

/// Allows a name on the ports of the web.
pub fn allow(text: &str) -> RuleSpec {
    let port = |protocol, port| PortRange { protocol, first: port, last: port };
    let ports = vec![port(Protocol::Tcp, 80), port(Protocol::Tcp, 443), port(Protocol::Udp, 443)];
    RuleSpec { ports, ..rule(text, Action::Allow, exact(text)) }
}

pub fn deny(text: &str) -> RuleSpec {
    rule(&format!("no {text}"), Action::Deny, exact(text))
}

pub fn table(default: Action, rules: Vec<RuleSpec>, options: PolicyOptions) -> Arc<RuleTable> {
    Arc::new(RuleTable::compile(PolicySpec { rules, default, options }).unwrap())
}

pub fn set(n: &mut Net, default: Action, rules: Vec<RuleSpec>) {
    n.core.set_rules(n.now, None, Some(table(default, rules, PolicyOptions::default())));
    n.pass_ms(0);
}

pub fn pin(n: &mut Net, name: &str, address: &str) {
    let address: IpAddr = address.parse().unwrap();
    assert!(n.core.note_pin(n.now, A, address, name.as_bytes(), 300));
}

/// A network that allows `ok.example` and `also.example` and nothing else; the guest got [`OK`] for both, and for
/// `other.example`.
pub fn strict() -> Net {
    let mut n = Net::new();
    set(&mut n, Action::Deny, vec![allow("ok.example"), allow("also.example")]);
    for name in ["ok.example", "also.example", "other.example"] {
        pin(&mut n, name, OK);
    }
    n
}

/// A network that denies `bad.example` and allows everything else.
pub fn lenient() -> Net {
    let mut n = Net::new();
    set(&mut n, Action::Allow, vec![deny("bad.example")]);
    n
}

pub fn denials(n: &Net) -> Vec<FlowDenied> {
    let denied = |e: &Event| match e {
        Event::FlowDenied(d) => Some((**d).clone()),
        _ => None,
    };
    n.fx.events.iter().filter_map(denied).collect()
}

/// A ClientHello message. `fill` bytes of another extension stand for a key share.
pub fn hello_message(name: Option<&str>, fill: usize) -> Vec<u8> {
    let mut extensions = Vec::new();
    let mut add = |kind: u16, data: &[u8]| {
        extensions.extend_from_slice(&kind.to_be_bytes());
        extensions.extend_from_slice(&(data.len() as u16).to_be_bytes());
        extensions.extend_from_slice(data);
    };
    add(51, &vec![1; fill]);
    add(43, &[2, 3, 4]);
    if let Some(name) = name {
        let len = name.len() as u16;
        add(0, &[&(len + 3).to_be_bytes()[..], &[0], &len.to_be_bytes(), name.as_bytes()].concat());
    }
    let mut body = vec![3, 3];
    body.extend_from_slice(&[7; 32]);
    body.extend_from_slice(&[0, 0, 2, 0x13, 1, 1, 0]);
    body.extend_from_slice(&(extensions.len() as u16).to_be_bytes());
    body.extend_from_slice(&extensions);
    let len = (body.len() as u32).to_be_bytes();
    [&[1, len[1], len[2], len[3]][..], &body].concat()
}

pub fn record(kind: u8, data: &[u8]) -> Vec<u8> {
    [&[kind, 3, 1][..], &(data.len() as u16).to_be_bytes(), data].concat()
}

pub fn hello(name: &str) -> Vec<u8> {
    record(22, &hello_message(Some(name), 100))
}

pub fn get(host: &str) -> Vec<u8> {
    format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").into_bytes()
}

/// The alert access_denied.
pub const ALERT: &[u8] = &[21, 3, 3, 0, 2, 2, 49];

/// A connection of guest A, whose handshake is done.
pub struct Client {
    pub flow: FlowId,
    pub sock: SockId,
    pub port: u16,
    pub to: &'static str,
    /// The next sequence number of the guest, and the next it expects.
    pub seq: u32,
    pub ack: u32,
}

/// What the guest read: bytes, and whether the connection ended in order or by a reset.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Told {
    pub bytes: Vec<u8>,
    pub fin: bool,
    pub rst: bool,
}

impl Client {
    #[track_caller]
    pub fn open(n: &mut Net, port: u16, to: &'static str) -> Client {
        let (flow, sock) = n.open_tcp(A, port, to);
        n.fx.frames.clear();
        Client { flow, sock, port, to, seq: 1001, ack: n.isn.wrapping_add(1) }
    }

    /// One whose SYN was sent already, and which the server answers now.
    pub fn connected(n: &mut Net, port: u16, to: &'static str) -> Client {
        let (flow, sock) = n.finish_tcp(A, port, to);
        n.fx.frames.clear();
        Client { flow, sock, port, to, seq: 1001, ack: n.isn.wrapping_add(1) }
    }

    fn segment(&self, n: &mut Net, flags: u8, data: &[u8]) {
        let to = addr(self.to);
        let seg = Tcp {
            src_port: self.port,
            dst_port: to.port(),
            seq: self.seq,
            ack: self.ack,
            flags,
            window: 65535,
            ..Tcp::default()
        };
        let mut frame = tcp_frame(&Ip4::new(A, to.ip(), proto::TCP), &seg, data);
        n.core.frame(n.now, A, &mut frame, FrameMeta::default(), &mut n.fx);
    }

    /// Sends bytes, in a batch of their own.
    pub fn send(&mut self, n: &mut Net, data: &[u8]) {
        for part in data.chunks(1400) {
            self.segment(n, flags::ACK | flags::PSH, part);
            self.seq = self.seq.wrapping_add(part.len() as u32);
        }
        self.end_batch(n);
    }

    pub fn end_batch(&self, n: &mut Net) {
        for _ in 0..8 {
            n.core.batch_end(n.now, &mut n.fx);
        }
    }

    pub fn fin(&mut self, n: &mut Net) {
        self.segment(n, flags::ACK | flags::FIN, &[]);
        self.seq = self.seq.wrapping_add(1);
        self.end_batch(n);
    }

    pub fn rst(&mut self, n: &mut Net) {
        self.segment(n, flags::RST, &[]);
        self.end_batch(n);
    }

    /// Reads what was sent to the guest and acknowledges it.
    pub fn read(&mut self, n: &mut Net) -> Told {
        let mut told = Told::default();
        for _ in 0..8 {
            let frames: Vec<Sent> = n.fx.take();
            if frames.is_empty() {
                break;
            }
            for frame in frames {
                let got = read(&frame);
                if got.p.proto != proto::TCP || got.dst().port() != self.port {
                    continue;
                }
                let tcp = Tcp::parse(got.l4()).unwrap();
                told.rst |= tcp.flags & flags::RST != 0;
                if tcp.seq == self.ack {
                    told.bytes.extend_from_slice(got.payload());
                    self.ack = self.ack.wrapping_add(got.payload().len() as u32);
                    if tcp.flags & flags::FIN != 0 {
                        told.fin = true;
                        self.ack = self.ack.wrapping_add(1);
                    }
                }
            }
            if !told.rst {
                self.segment(n, flags::ACK, &[]);
                self.end_batch(n);
            }
        }
        told
    }

    /// The server says something.
    pub fn server_says(&self, n: &mut Net, bytes: &[u8]) {
        n.fx.sock(self.sock).inbox.extend(bytes);
        n.core.tcp_ready(n.now, self.flow, true, false, &mut n.fx);
        self.end_batch(n);
    }

    /// What the server got.
    pub fn at_server(&self, n: &mut Net) -> Vec<u8> {
        n.fx.sock(self.sock).sent.clone()
    }
}

pub fn udp_sent(n: &Net) -> Vec<Vec<u8>> {
    n.fx.datagrams.iter().map(|d| d.payload.clone()).collect()
}

pub fn flows_of(n: &Net, port: PortId) -> usize {
    n.core.flows().filter(|f| f.port == port).count()
}
