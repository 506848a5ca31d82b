//! Theory of operation: a network whose DNS authority and name servers are played by the test, with time as a variable.
#![allow(dead_code, missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub use crate::net::*;
use guestnet_core::effects::Event;
use guestnet_core::types::{FlowId, PortId, ServiceId, SockId};
use guestnet_core::{DnsVerdict, Limits, NameServers};
use guestnet_wire::dns::{Answer, Record};
use guestnet_wire::proto;
use std::net::SocketAddr;

pub const DNS: ServiceId = ServiceId(2);
pub const SERVER: &str = "203.0.113.53:53";
pub const SECOND: &str = "203.0.113.54:53";
pub const EDNS: &[u8] = &[0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0];
pub const SERVFAIL: u8 = 2;
pub const NXDOMAIN: u8 = 3;
pub const REFUSED: u8 = 5;

pub fn labels(name: &str) -> Vec<u8> {
    let mut out = Vec::new();
    for label in name.split('.').filter(|l| !l.is_empty()) {
        out.push(label.len() as u8);
        out.extend_from_slice(label.as_bytes());
    }
    out.push(0);
    out
}

pub fn query(id: u16, name: &str, edns: &[u8]) -> Vec<u8> {
    let mut q = id.to_be_bytes().to_vec();
    q.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, u8::from(!edns.is_empty())]);
    q.extend_from_slice(&labels(name));
    q.extend_from_slice(&[0, 1, 0, 1]);
    q.extend_from_slice(edns);
    q
}

/// Where the question of a message ends.
pub fn question_end(m: &[u8]) -> usize {
    12 + m[12..].iter().position(|b| *b == 0).unwrap() + 5
}

/// A response with `count` addresses to a query.
pub fn answer(query: &[u8], count: u8, ttl: u32, address: u8) -> Vec<u8> {
    let mut a = query[..question_end(query)].to_vec();
    (a[2], a[3]) = (0x81, 0x80);
    a[4..12].copy_from_slice(&[0, 1, 0, count, 0, 0, 0, 0]);
    for _ in 0..count {
        a.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1]);
        a.extend_from_slice(&ttl.to_be_bytes());
        a.extend_from_slice(&[0, 4, 192, 0, 2, address]);
    }
    a
}

/// A response without records.
pub fn code(query: &[u8], code: u8) -> Vec<u8> {
    let mut a = answer(query, 0, 0, 0);
    a[3] |= code;
    a
}

pub fn truncated(query: &[u8]) -> Vec<u8> {
    let mut a = answer(query, 0, 0, 0);
    a[2] |= 2;
    a
}

pub fn framed(message: &[u8]) -> Vec<u8> {
    [&(message.len() as u16).to_be_bytes()[..], message].concat()
}

pub fn rcode(a: &[u8]) -> u8 {
    a[3] & 15
}

pub fn ttl(a: &[u8]) -> u32 {
    let at = question_end(a) + 6;
    u32::from_be_bytes(a[at..at + 4].try_into().unwrap())
}

/// The text of a response's extended error.
pub fn why(a: &[u8]) -> String {
    let option = &a[Answer::parse(a).unwrap().explanation];
    String::from_utf8(option.get(6..).unwrap_or(&[]).to_vec()).unwrap()
}

pub fn record(name: &str, kind: u16, data: &[u8]) -> Record {
    Record { name: labels(name).into(), kind, ttl: 60, data: data.into() }
}

/// The verdict on an own name with one address.
pub fn own(name: &str, address: u8) -> DnsVerdict {
    let answers = vec![record(name, 1, &[192, 0, 2, address])];
    DnsVerdict::Own { rcode: 0, answers, authority: Vec::new(), searched: None, target: None }
}

/// The verdict on a name of the own zone that does not exist.
pub fn nothing(searched: Option<&str>) -> DnsVerdict {
    let soa = [&labels("ns")[..], &labels("h"), &[0; 16], &[0, 0, 0, 5]].concat();
    let authority = vec![record("guests.test", 6, &soa)];
    let searched = searched.map(|name| labels(name).into());
    DnsVerdict::Own { rcode: 3, answers: Vec::new(), authority, searched, target: None }
}

pub struct World {
    pub n: Net,
    pub generation: u64,
    pub servers: NameServers,
}

impl World {
    /// A network with an authority and one name server.
    pub fn new() -> World {
        World::with(&[SERVER], |_| {})
    }

    pub fn with(servers: &[&str], limits: impl FnOnce(&mut Limits)) -> World {
        let mut n = Net::with_limits(limits);
        n.core.add_service(DNS, proto::UDP, GATEWAY.parse().unwrap(), 53);
        let servers = NameServers {
            servers: servers.iter().map(|s| addr(s)).collect(),
            timeout_ms: 2000,
            attempts: 1,
            rotate: false,
            use_tcp: false,
        };
        let mut w = World { n, generation: 0, servers };
        w.change();
        w.confirm();
        w
    }

    /// The authority's records have changed.
    pub fn change(&mut self) {
        self.generation += 1;
        let own = ["guests.test", "own.example"].map(|n| labels(n).into());
        self.n.core.set_dns_zones(DNS, self.generation, own.to_vec());
    }

    /// The control side says which name servers there are.
    pub fn confirm(&mut self) {
        self.n.core.set_name_servers(self.n.now, self.servers.clone());
    }

    pub fn verdict(&mut self, ticket: u64, verdict: DnsVerdict) -> Vec<(PortId, Vec<u8>)> {
        self.n.fx.frames.clear();
        self.n.core.dns_verdict(self.n.now, ticket, self.generation, verdict, &mut self.n.fx);
        self.n.core.audit().unwrap();
        self.taken()
    }

    pub fn taken(&mut self) -> Vec<(PortId, Vec<u8>)> {
        self.n.fx.take().iter().map(|s| (s.port, read(s).payload().to_vec())).collect()
    }

    /// What a guest's query gets at once.
    pub fn ask(&mut self, port: PortId, query: &[u8]) -> Option<Vec<u8>> {
        let out = self.n.ask(port, udp_frame(port, 4000, addr("192.168.64.1:53"), query));
        self.n.core.audit().unwrap();
        assert!(out.len() <= 1 && out.iter().all(|s| s.port == port));
        let got = read(out.first()?);
        assert_eq!((got.src(), got.dst()), (addr("192.168.64.1:53"), guest_addr(port, 4000)));
        Some(got.payload().to_vec())
    }

    /// The ticket, where the query is asked of the authority.
    pub fn ticket(&mut self, port: PortId, query: &[u8]) -> Option<u64> {
        let before = self.n.fx.events.len();
        assert_eq!(self.ask(port, query), None);
        self.n.fx.events.get(before..).unwrap().iter().find_map(|e| match e {
            Event::DnsQuestion { port: p, ticket, .. } if *p == port => Some(*ticket),
            _ => None,
        })
    }

    /// Whether the query goes up to the authority.
    pub fn goes_up(&mut self, port: PortId, query: &[u8]) -> bool {
        let sent = self.n.fx.datagrams.len();
        let up = self.ticket(port, query).is_some();
        assert!(!up || self.n.fx.datagrams.len() == sent, "asked twice");
        up
    }

    /// Asks the authority, which knows an address.
    pub fn own(&mut self, port: PortId, query: &[u8], verdict: DnsVerdict) -> Vec<u8> {
        let ticket = self.ticket(port, query).expect("a question");
        self.verdict(ticket, verdict).remove(0).1
    }

    /// What was sent to a name server last: the flow of its socket, and the query.
    pub fn sent(&self) -> (FlowId, Vec<u8>) {
        let d = self.n.fx.datagrams.last().unwrap();
        (self.n.fx.socks[&d.sock].flow.unwrap(), d.payload.clone())
    }

    /// Where it was sent to.
    pub fn sent_to(&self) -> SocketAddr {
        self.n.fx.datagrams.last().unwrap().dst
    }

    pub fn hear(&mut self, flow: FlowId, from: &str, message: &[u8]) -> Vec<(PortId, Vec<u8>)> {
        self.n.fx.frames.clear();
        self.n.core.udp_received(self.n.now, flow, addr(from), message, 0, &mut self.n.fx);
        self.n.core.audit().unwrap();
        self.taken()
    }

    /// The server answers the last query.
    pub fn reply(&mut self, reply: impl FnOnce(&[u8]) -> Vec<u8>) -> Vec<(PortId, Vec<u8>)> {
        let ((flow, sent), from) = (self.sent(), self.sent_to().to_string());
        self.hear(flow, &from, &reply(&sent))
    }

    /// Asks a name server, which answers.
    pub fn resolve(&mut self, port: PortId, query: &[u8], reply: impl FnOnce(&[u8]) -> Vec<u8>) -> Vec<u8> {
        assert!(!self.goes_up(port, query), "asked of the authority");
        self.reply(reply).remove(0).1
    }

    /// Lets time pass; what guests get meanwhile.
    pub fn pass(&mut self, ms: u64) -> Vec<(PortId, Vec<u8>)> {
        self.n.fx.frames.clear();
        self.n.pass_ms(ms);
        self.n.core.audit().unwrap();
        self.taken()
    }

    /// The connection to a name server that was opened last is accepted; the query that was sent on it.
    pub fn connect(&mut self) -> (FlowId, SockId, Vec<u8>) {
        let (flow, sock) = *self.n.fx.connects.last().unwrap();
        self.n.core.tcp_connected(self.n.now, flow, Ok(()), &mut self.n.fx);
        self.n.core.audit().unwrap();
        let sent = self.n.fx.sock(sock).sent.clone();
        assert_eq!(usize::from(u16::from_be_bytes([sent[0], sent[1]])), sent.len() - 2);
        (flow, sock, sent[2..].to_vec())
    }

    /// Bytes come on a connection to a name server.
    pub fn hear_tcp(
        &mut self,
        flow: FlowId,
        sock: SockId,
        bytes: &[u8],
        eof: bool,
    ) -> Vec<(PortId, Vec<u8>)> {
        self.n.fx.frames.clear();
        let s = self.n.fx.sock(sock);
        s.inbox.extend(bytes);
        s.eof = eof;
        self.n.core.tcp_ready(self.n.now, flow, true, false, &mut self.n.fx);
        self.n.core.audit().unwrap();
        self.taken()
    }

    /// Bytes of a guest's connection; how many were read, and the responses.
    pub fn stream(&mut self, port: PortId, sock: u32, data: &[u8], ended: bool) -> (usize, Vec<Vec<u8>>) {
        let n = self.n.core.stream_received(self.n.now, port, SockId(sock), data, ended, &mut self.n.fx);
        self.n.core.audit().unwrap();
        (n, self.stream_got(sock))
    }

    /// Responses on a guest's connection.
    pub fn stream_got(&mut self, sock: u32) -> Vec<Vec<u8>> {
        let bytes = self.n.fx.streams.remove(&SockId(sock)).unwrap_or_default();
        let (mut at, mut out) = (0, Vec::new());
        while at < bytes.len() {
            let end = at + 2 + usize::from(u16::from_be_bytes([bytes[at], bytes[at + 1]]));
            out.push(bytes[at + 2..end].to_vec());
            at = end;
        }
        out
    }

    /// Hits, misses, asked.
    pub fn counts(&self) -> (u64, u64, u64) {
        let c = self.n.core.counters();
        (c.dns_hits, c.dns_misses, c.dns_asked)
    }

    /// Cached responses, bytes of them, outstanding queries, connections.
    pub fn holds(&self) -> (usize, usize, usize, usize) {
        self.n.core.dns_holds()
    }
}
