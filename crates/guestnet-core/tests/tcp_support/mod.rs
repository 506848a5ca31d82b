//! Theory of operation: scenarios of the TCP relay that read like packet traces. [`Sim`] holds one flow, the
//! mock world and a virtual clock. Segments are written as in tcpdump, with sequence numbers relative to each
//! side's SYN: `"S 0 win 65535 mss 1460 ws 7"`, `". 1 ack 1"`, `"P. 1:101 ack 1"`, `"F. 101 ack 1"`, `"R 101"`.
//! An ACK with SACK blocks is `". 1 ack 1 sack 1461:2921,4381:5841"`.
//! Payload is a fixed pattern of the stream's offset, so that what arrives can be checked byte by byte.
#![allow(dead_code, missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::common::{Mock, MockSock, Sent};
use guestnet_core::effects::{Close, SockError};
use guestnet_core::policy::shaping::Allowance;
use guestnet_core::stats::{Counters, DropReason};
use guestnet_core::tcp::{Budget, Ctx, Fate, Path, Tcb, Timeouts};
use guestnet_core::types::{Csum, FlowId, Gso, PortId, SockId, Time};
use guestnet_wire::ether::{self, Ether, Mac};
use guestnet_wire::gso::complete_checksum;
use guestnet_wire::tcp::{MIN_LEN, Options, SackBlocks, Tcp, flags};
use guestnet_wire::{parse, proto};

pub const GUEST_ISN: u32 = 0xffff_ff00;
pub const OUR_ISN: u32 = 0xffff_fe00;
pub const PORT: PortId = PortId(3);
pub const FLOW: FlowId = FlowId { index: 1, generation: 1 };

/// Byte `at` of the pattern that both streams carry.
pub fn pattern(at: usize) -> u8 {
    (at * 7 % 251) as u8
}

pub fn stream(from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(pattern).collect()
}

pub fn path() -> Path {
    Path {
        port: PORT,
        gateway_mac: Mac([2, 0, 0, 0, 0, 1]),
        guest_mac: Mac([2, 0, 0, 0, 0, 2]),
        guest: "192.168.64.2:40000".parse().unwrap(),
        remote: "203.0.113.7:80".parse().unwrap(),
        mtu: 1500,
        gso_max: 65000,
    }
}

/// A segment, as the traces write it; sequence numbers are relative.
#[derive(Debug, Default, Clone)]
pub struct Line {
    flags: u8,
    seq: u32,
    len: usize,
    ack: Option<u32>,
    win: Option<u16>,
    options: Options,
    no_ws: bool,
    no_ts: bool,
    gso: Option<u16>,
    urgent: u16,
}

impl Line {
    #[track_caller]
    pub fn parse(text: &str) -> Line {
        let mut words = text.split_whitespace();
        let mut line = Line::default();
        for c in words.next().expect("flags").chars() {
            line.flags |= match c {
                'S' => flags::SYN,
                'F' => flags::FIN,
                'R' => flags::RST,
                'P' => flags::PSH,
                'U' => flags::URG,
                '.' => flags::ACK,
                '-' => 0,
                c => panic!("flag {c:?} in {text:?}"),
            };
        }
        let range = words.next().expect("sequence number");
        let (from, to) = range.split_once(':').unwrap_or((range, range));
        line.seq = from.parse().unwrap();
        line.len = to.parse::<usize>().unwrap() - from.parse::<usize>().unwrap();
        while let Some(word) = words.next() {
            let mut number = || words.next().expect("a number").parse::<u32>().expect("a number");
            match word {
                "ack" => line.ack = Some(number()),
                "urg" => line.urgent = number() as u16,
                "win" => line.win = Some(number() as u16),
                "mss" => line.options.mss = Some(number() as u16),
                "ws" => line.options.wscale = Some(number() as u8),
                "ts" => line.options.timestamps = Some((number(), number())),
                "sackok" => line.options.sack_permitted = true,
                // `sack 1461:2921,4381:5841`: of the peer's numbers, as `ack` is.
                "sack" => {
                    for block in words.next().expect("SACK blocks").split(',') {
                        let (left, right) = block.split_once(':').expect("a block");
                        assert!(
                            line.options.sack.push(left.parse().unwrap(), right.parse().unwrap()),
                            "{text:?}"
                        );
                    }
                }
                "gso" => line.gso = Some(number() as u16),
                "nows" => line.no_ws = true,
                "nots" => line.no_ts = true,
                other => panic!("{other:?} in {text:?}"),
            }
        }
        line
    }
}

/// The blocks with their numbers counted from `isn`.
fn shifted(blocks: &SackBlocks, isn: u32) -> SackBlocks {
    let mut shifted = SackBlocks::default();
    for (left, right) in blocks.as_slice() {
        assert!(shifted.push(isn.wrapping_add(*left), isn.wrapping_add(*right)));
    }
    shifted
}

/// A frame of the relay, taken apart.
#[derive(Debug, Clone)]
pub struct Seen {
    pub tcp: Tcp,
    pub options: Options,
    pub payload: Vec<u8>,
    pub gso: Option<u16>,
}

/// Takes a frame to the guest apart; checks addresses, lengths and the checksum (completed where begun).
#[track_caller]
pub fn dissect(sent: &Sent, path: &Path) -> Seen {
    let mut frame = sent.frame.clone();
    if let Csum::Partial { start, offset } = sent.meta.csum {
        complete_checksum(&mut frame, start, offset).unwrap();
    }
    assert_eq!(sent.port, path.port);
    let e = Ether::parse(&frame).unwrap();
    assert_eq!((e.dst, e.src), (path.guest_mac, path.gateway_mac));
    let p = parse::parse_ip(&frame, ether::HEADER_LEN).unwrap();
    assert_eq!((p.src, p.dst, p.proto), (path.remote.ip(), path.guest.ip(), proto::TCP));
    assert_eq!((p.src_port, p.dst_port), (path.remote.port(), path.guest.port()));
    assert_eq!(p.end, frame.len());
    assert!(path.guest.is_ipv6() || parse::verify_ipv4_header(&frame, &p), "IP checksum");
    assert!(parse::verify_l4(&frame, &p), "TCP checksum");
    let tcp = Tcp::parse(&frame[p.l4..]).unwrap();
    let options = Options::parse(&frame[p.l4 + MIN_LEN..p.l4 + usize::from(tcp.header_len)]);
    let gso = match sent.meta.gso {
        Some(Gso::Tcp(n)) => Some(n),
        None => None,
        other => panic!("{other:?} on a TCP frame"),
    };
    let payload = frame[p.payload..].to_vec();
    let biggest = gso.map_or(payload.len(), usize::from) + p.payload - p.l3;
    assert!(biggest <= usize::from(path.mtu), "{biggest} bytes on a path of {}", path.mtu);
    Seen { tcp, options, payload, gso }
}

pub struct Sim {
    pub mock: Mock,
    pub tcb: Tcb,
    pub path: Path,
    pub budget: Budget,
    pub counters: Counters,
    pub now: Time,
    pub sock: SockId,
    pub fate: Fate,
    /// How often somebody was to look at what the flow holds back.
    pub looks: usize,
    /// Window that the relay offered last, in bytes, and the edge; checked never to move back.
    shift: u8,
    edge: u32,
    guest_wscale: bool,
}

macro_rules! call {
    ($s:ident, $method:ident $(, $arg:expr)*) => {{
        let mut cx = Ctx { turn: 32 << 10,
            allowance: Allowance::ALL, now: $s.now, fx: &mut $s.mock, counters: &mut $s.counters, path: &$s.path, budget: &mut $s.budget };
        let fate = $s.tcb.$method(&mut cx $(, $arg)*);
        $s.note(fate)
    }};
}

impl Sim {
    fn with(tcb: Tcb, mock: Mock, sock: SockId) -> Sim {
        Sim {
            mock,
            tcb,
            path: path(),
            budget: Budget { used: 0, limit: 64 << 20 },
            counters: Counters::default(),
            now: Time(1_000_000_000_000),
            sock,
            fate: Fate::Live,
            looks: 0,
            shift: 0,
            edge: GUEST_ISN,
            guest_wscale: false,
        }
    }

    /// The guest sent this SYN, the connect is under way. ACKs wait for nothing.
    pub fn outbound(syn: &str) -> Sim {
        Sim::outbound_with(syn, Timeouts { ack_delay_ms: 0, ..Timeouts::default() })
    }

    /// As [`Sim::outbound`], with these timeouts.
    pub fn outbound_with(syn: &str, timeouts: Timeouts) -> Sim {
        let line = Line::parse(syn);
        let mut mock = Mock::new();
        let sock = mock.new_sock();
        let now = Time(1_000_000_000_000);
        let tcp = Tcp {
            seq: GUEST_ISN.wrapping_add(line.seq),
            flags: line.flags,
            window: line.win.unwrap_or(65535),
            ..Tcp::default()
        };
        let tcb = Tcb::outbound(FLOW, sock, &tcp, &line.options, OUR_ISN, timeouts, now);
        let mut s = Sim::with(tcb, mock, sock);
        s.guest_wscale = line.options.wscale.is_some();
        s
    }

    /// A client was accepted; nothing sent yet.
    pub fn inbound() -> Sim {
        let mut mock = Mock::new();
        let sock = mock.new_sock();
        let timeouts = Timeouts { ack_delay_ms: 0, ..Timeouts::default() };
        let tcb = Tcb::inbound(FLOW, sock, OUR_ISN, timeouts, Time(1_000_000_000_000));
        Sim::with(tcb, mock, sock)
    }

    /// An open flow: MSS 1460, no timestamps, scale 7 with a window of 65535 << 7.
    pub fn open() -> Sim {
        Sim::open_with("S 0 win 65535 mss 1460 ws 7", 65535)
    }

    /// As [`Sim::open`], and the ACK of a little data may wait this many milliseconds for an answer.
    #[track_caller]
    pub fn open_patient(ack_delay_ms: u32) -> Sim {
        let timeouts = Timeouts { ack_delay_ms, ..Timeouts::default() };
        Sim::opened(Sim::outbound_with("S 0 win 65535 mss 1460 ws 7", timeouts), 65535)
    }

    /// As [`Sim::open`], with the guest's bytes held back, and those of the host too where `both_ways`.
    #[track_caller]
    pub fn open_held(both_ways: bool) -> Sim {
        let mut s = Sim::outbound("S 0 win 65535 mss 1460 ws 7 sackok");
        s.tcb = s.tcb.with_hold(both_ways);
        Sim::opened(s, 65535)
    }

    #[track_caller]
    pub fn open_with(syn: &str, win: u16) -> Sim {
        Sim::opened(Sim::outbound(syn), win)
    }

    #[track_caller]
    fn opened(mut s: Sim, win: u16) -> Sim {
        s.connected(Ok(()));
        s.recv("S. 0 ack 1");
        s.send(&format!(". 1 ack 1 win {win}"));
        s.silent();
        s
    }

    fn note(&mut self, fate: Fate) {
        assert_eq!(self.fate, Fate::Live, "a call on a flow that is over");
        if fate == Fate::Look {
            self.looks += 1;
            return;
        }
        self.fate = fate;
        if fate != Fate::Live {
            assert_eq!(self.budget.used, 0, "a flow that is over holds buffers");
            assert!(self.host().closed.is_some(), "a flow that is over holds its socket");
        }
    }

    pub fn host(&mut self) -> &mut MockSock {
        self.mock.sock(self.sock)
    }

    pub fn start(&mut self) {
        call!(self, start);
    }
    pub fn recheck(&mut self) {
        call!(self, recheck);
    }
    pub fn connected(&mut self, result: Result<(), SockError>) {
        call!(self, connected, result);
    }
    pub fn ready(&mut self, readable: bool, writable: bool) {
        call!(self, ready, readable, writable);
        self.end();
    }
    pub fn port_writable(&mut self) {
        call!(self, port_writable);
        self.end();
    }
    /// The end of a batch.
    pub fn end(&mut self) {
        if self.fate == Fate::Live && self.tcb.wants_batch_end() {
            call!(self, batch_end);
        }
    }
    /// An ICMP error of the guest that quotes the segment at `seq` of the stream.
    pub fn path_mtu(&mut self, mtu: u16, seq: u32) {
        let seq = OUR_ISN.wrapping_add(seq);
        call!(self, path_mtu, mtu, seq);
        self.end();
    }
    /// All that is held back was looked at.
    pub fn note_seen(&mut self) {
        call!(self, note_seen);
    }
    pub fn let_pass(&mut self, bytes: usize) {
        call!(self, let_pass, bytes);
        self.end();
    }
    pub fn await_answer(&mut self) -> bool {
        let mut cx = Ctx {
            turn: 32 << 10,
            allowance: Allowance::ALL,
            now: self.now,
            fx: &mut self.mock,
            counters: &mut self.counters,
            path: &self.path,
            budget: &mut self.budget,
        };
        self.tcb.await_answer(&mut cx)
    }
    pub fn end_hold(&mut self) {
        call!(self, end_hold);
        self.end();
    }
    pub fn answer(&mut self, words: &[u8]) {
        call!(self, answer, words);
        if let Some(sock) = self.mock.answers.last() {
            self.sock = *sock;
        }
        self.end();
    }
    pub fn abort(&mut self) {
        let mut cx = Ctx {
            turn: 32 << 10,
            allowance: Allowance::ALL,
            now: self.now,
            fx: &mut self.mock,
            counters: &mut self.counters,
            path: &self.path,
            budget: &mut self.budget,
        };
        self.tcb.abort(&mut cx);
        self.note(Fate::Closed);
    }

    /// A segment of the guest that is a batch of its own.
    #[track_caller]
    pub fn send(&mut self, text: &str) {
        self.seg(text);
        self.end();
    }

    /// A segment of the guest within a batch.
    #[track_caller]
    pub fn seg(&mut self, text: &str) {
        let line = Line::parse(text);
        let payload = stream(line.seq.saturating_sub(1) as usize, line.len);
        let tcp = Tcp {
            src_port: self.path.guest.port(),
            dst_port: self.path.remote.port(),
            seq: GUEST_ISN.wrapping_add(line.seq),
            ack: line.ack.map_or(0, |a| OUR_ISN.wrapping_add(a)),
            header_len: 20,
            flags: line.flags,
            window: line.win.unwrap_or(65535),
            urgent: line.urgent,
        };
        if line.flags & flags::SYN != 0 {
            self.guest_wscale = line.options.wscale.is_some();
        }
        let options = Options { sack: shifted(&line.options.sack, OUR_ISN), ..line.options };
        call!(self, segment, &tcp, &options, &payload);
    }

    /// Bytes and perhaps the end come from the outside.
    pub fn host_writes(&mut self, len: usize) {
        let sock = self.host();
        let from = sock.discarded as usize + sock.inbox.len();
        sock.inbox.extend(stream(from, len));
        self.ready(true, false);
    }
    pub fn host_closes(&mut self) {
        self.host().eof = true;
        self.ready(true, false);
    }

    /// What the outside received, all of it.
    #[track_caller]
    pub fn host_has(&mut self, len: usize) {
        let sent = &self.host().sent;
        assert_eq!(sent.len(), len, "bytes at the host");
        assert!(*sent == stream(0, len), "bytes at the host differ");
    }

    /// The next frame to the guest is this one; what the line does not name is not compared, but for flags,
    /// sequence number and length.
    #[track_caller]
    pub fn recv(&mut self, text: &str) -> Seen {
        let line = Line::parse(text);
        assert!(!self.mock.frames.is_empty(), "no frame where {text:?} was expected");
        let sent = self.mock.frames.remove(0);
        let seen = dissect(&sent, &self.path);
        let shown = show(&seen);
        assert_eq!(seen.tcp.flags & !flags::PSH, line.flags & !flags::PSH, "{shown} is not {text}");
        let base = if line.flags & flags::RST != 0 && seen.tcp.seq == 0 { 0 } else { OUR_ISN };
        assert_eq!(seen.tcp.seq, base.wrapping_add(line.seq), "{shown} is not {text}");
        assert_eq!(seen.payload.len(), line.len, "{shown} is not {text}");
        assert!(seen.payload == stream(line.seq.saturating_sub(1) as usize, line.len), "payload of {shown}");
        if let Some(ack) = line.ack {
            assert_eq!(seen.tcp.ack, GUEST_ISN.wrapping_add(ack), "{shown} is not {text}");
        }
        if let Some(win) = line.win {
            assert_eq!(seen.tcp.window, win, "{shown} is not {text}");
        }
        if let Some(mss) = line.options.mss {
            assert_eq!(seen.options.mss, Some(mss), "{shown} is not {text}");
        }
        if let Some(ws) = line.options.wscale {
            assert_eq!(seen.options.wscale, Some(ws), "{shown} is not {text}");
        }
        if let Some((_, echo)) = line.options.timestamps {
            assert_eq!(seen.options.timestamps.map(|t| t.1), Some(echo), "{shown} is not {text}");
        }
        assert!(!line.no_ws || seen.options.wscale.is_none(), "{shown} is not {text}");
        assert!(!line.no_ts || seen.options.timestamps.is_none(), "{shown} is not {text}");
        if line.options.sack_permitted {
            assert!(seen.options.sack_permitted, "{shown} is not {text}");
        }
        if !line.options.sack.is_empty() {
            assert_eq!(seen.options.sack, shifted(&line.options.sack, GUEST_ISN), "{shown} is not {text}");
        }
        if let Some(gso) = line.gso {
            assert_eq!(seen.gso, Some(gso), "{shown} is not {text}");
        }
        self.check_edge(&seen);
        seen
    }

    /// The window's right edge never moves back (RFC 9293 3.8.6) but by the rounding of its scale (RFC 7323 2.4).
    #[track_caller]
    fn check_edge(&mut self, seen: &Seen) {
        if seen.tcp.flags & flags::SYN != 0 {
            self.shift = if self.guest_wscale { seen.options.wscale.unwrap_or(0) } else { 0 };
        }
        if seen.tcp.flags & flags::ACK == 0 || seen.tcp.flags & flags::RST != 0 {
            return;
        }
        let shift = if seen.tcp.flags & flags::SYN != 0 { 0 } else { self.shift };
        let edge = seen.tcp.ack.wrapping_add(u32::from(seen.tcp.window) << shift);
        assert!(edge.wrapping_sub(self.edge) as i32 > -(1 << shift), "the window shrank: {}", show(seen));
        self.edge = edge;
    }

    /// Bytes of window that the relay offers beyond relative sequence number `from`.
    pub fn window_beyond(&self, from: u32) -> u32 {
        self.edge.wrapping_sub(GUEST_ISN.wrapping_add(from))
    }

    /// Nothing was sent to the guest.
    #[track_caller]
    pub fn silent(&self) {
        if let Some(f) = self.mock.frames.first() {
            panic!("unexpected {}", show(&dissect(f, &self.path)));
        }
    }

    /// Takes whatever was sent.
    pub fn take(&mut self) -> Vec<Seen> {
        let path = self.path;
        let all: Vec<Seen> = self.mock.take().iter().map(|f| dissect(f, &path)).collect();
        for seen in &all {
            self.check_edge(seen);
        }
        all
    }

    /// Time passes; timers run when they are due.
    pub fn pass(&mut self, ms: u64) {
        let end = self.now.plus_ms(ms);
        while self.fate == Fate::Live
            && let Some(at) = self.tcb.deadline()
            && at <= end
        {
            assert!(at >= self.now || at == self.tcb.deadline().unwrap());
            self.now = self.now.max(at);
            call!(self, timer);
            self.end();
        }
        self.now = end;
    }

    #[track_caller]
    pub fn closed(&mut self, how: Close) {
        assert_eq!(self.host().closed, Some(how));
        if self.tcb.state_name() != "time_wait" {
            assert_eq!(self.fate, Fate::Closed);
        }
    }

    /// The guest knew nothing of the open flow any more.
    #[track_caller]
    pub fn forgotten(&mut self) {
        assert_eq!((self.host().closed, self.fate), (Some(Close::Reset), Fate::Forgotten));
    }

    #[track_caller]
    pub fn live(&mut self) {
        assert_eq!(self.fate, Fate::Live);
    }

    pub fn dropped(&self, why: DropReason) -> u64 {
        self.counters.drops[why as usize]
    }
}

/// A frame, as the traces write it.
pub fn show(seen: &Seen) -> String {
    let t = &seen.tcp;
    let mut f = String::new();
    for (bit, c) in [
        (flags::SYN, 'S'),
        (flags::FIN, 'F'),
        (flags::RST, 'R'),
        (flags::PSH, 'P'),
        (flags::URG, 'U'),
        (flags::ACK, '.'),
    ] {
        if t.flags & bit != 0 {
            f.push(c);
        }
    }
    let from = t.seq.wrapping_sub(OUR_ISN);
    let ack = t.ack.wrapping_sub(GUEST_ISN);
    let to = from.wrapping_add(seen.payload.len() as u32);
    format!("{f} {from}:{to} ack {ack} win {} {:?} gso {:?}", t.window, seen.options, seen.gso)
}
