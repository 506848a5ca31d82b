//! Theory of operation: any segments and events in any order. The relay must not panic, must keep the rules
//! of the socket interface (the mock fails on a breach), must give the host only bytes that the guest sent at
//! that place of its stream, and must give back its buffers when it ends. Segments are drawn near what the
//! relay said last, so that runs get deep into the states, and now and then far from it.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod tcp_support;

use common::Mock;
use guestnet_core::effects::SockError;
use guestnet_core::policy::shaping::Allowance;
use guestnet_core::stats::Counters;
use guestnet_core::tcp::{Budget, Ctx, Fate, Path, Tcb, Timeouts};
use guestnet_core::types::{SockId, Time};
use guestnet_wire::tcp::{Options, SackBlocks, Tcp, flags};
use proptest::prelude::*;
use tcp_support::{FLOW, GUEST_ISN, OUR_ISN, PORT, dissect, path, stream};

#[derive(Debug, Clone)]
enum Op {
    Segment {
        flags: u8,
        seq: i32,
        ack: i32,
        window: u16,
        len: usize,
        ts: Option<i32>,
        mss: Option<u16>,
        ws: Option<u8>,
        urgent: u16,
        sack: Vec<(i32, i32)>,
    },
    HostData(usize),
    HostEof,
    HostError {
        send: bool,
    },
    SendRoom(Option<usize>),
    Ready(bool, bool),
    PortRoom(usize),
    PortGone,
    PortWritable,
    BatchEnd,
    Connected(Result<(), SockError>),
    Start,
    Recheck,
    /// Segments of the peer, whether something waits for it, and whether that can be known at all.
    Peer(u32, bool, bool),
    Pass(u64),
    Mtu(u16, u32),
}

fn near() -> impl Strategy<Value = i32> {
    prop_oneof![8 => Just(0), 4 => -3i32..4, 2 => -3000i32..3000, 1 => -2_000_000i32..2_000_000, 1 => any::<i32>()]
}

fn op() -> impl Strategy<Value = Op> {
    let flag = prop_oneof![
        10 => Just(flags::ACK),
        4 => Just(flags::ACK | flags::PSH),
        2 => Just(flags::ACK | flags::FIN),
        1 => Just(flags::SYN),
        1 => Just(flags::SYN | flags::ACK),
        1 => Just(flags::RST),
        1 => any::<u8>(),
    ];
    let len = prop_oneof![4 => Just(0usize), 4 => 1usize..3000, 1 => 1usize..66_000];
    let window = prop_oneof![2 => Just(0u16), 2 => 0u16..4000, 3 => any::<u16>(), 3 => Just(65535)];
    let urgent = prop_oneof![3 => Just(0u16), 1 => 1u16..3000, 1 => any::<u16>()];
    let segment = (
        (flag, near(), near(), window, len, urgent),
        (proptest::option::of(near()), proptest::option::of(any::<u16>()), proptest::option::of(any::<u8>())),
        proptest::collection::vec((near(), -3000i32..3000), 0..5),
    )
        .prop_map(|((flags, seq, ack, window, len, urgent), (ts, mss, ws), sack)| Op::Segment {
            flags,
            seq,
            ack,
            window,
            len,
            ts,
            mss,
            ws,
            urgent,
            sack,
        });
    let error = prop_oneof![Just(SockError::Refused), Just(SockError::TimedOut), Just(SockError::Other(5))];
    prop_oneof![
        30 => segment,
        6 => (1usize..80_000).prop_map(Op::HostData),
        1 => Just(Op::HostEof),
        1 => any::<bool>().prop_map(|send| Op::HostError { send }),
        3 => proptest::option::of(0usize..5000).prop_map(Op::SendRoom),
        5 => any::<(bool, bool)>().prop_map(|(r, w)| Op::Ready(r, w)),
        3 => prop_oneof![Just(0usize), 0usize..5000, Just(usize::MAX)].prop_map(Op::PortRoom),
        1 => Just(Op::PortGone),
        4 => Just(Op::PortWritable),
        10 => Just(Op::BatchEnd),
        3 => Just(Op::Connected(Ok(()))),
        1 => error.prop_map(|e| Op::Connected(Err(e))),
        1 => Just(Op::Start),
        1 => Just(Op::Recheck),
        3 => (0u32..3, any::<bool>(), proptest::bool::weighted(0.1)).prop_map(|(n, b, u)| Op::Peer(n, b, u)),
        5 => prop_oneof![0u64..3000, 0u64..10_000_000].prop_map(Op::Pass),
        1 => (68u16..=65520, prop_oneof![Just(0u32), any::<u32>()]).prop_map(|(m, g)| Op::Mtu(m, g)),
    ]
}

struct World {
    mock: Mock,
    tcb: Tcb,
    path: Path,
    budget: Budget,
    counters: Counters,
    now: Time,
    sock: SockId,
    fate: Fate,
    /// The guest's next sequence number and our next, as the last frame told.
    guest_nxt: u32,
    our_nxt: u32,
    /// First byte of the guest's stream, known once acknowledged.
    base: Option<u32>,
    ts: u32,
}

/// The guest's byte at a sequence number.
fn guest_byte(seq: u32) -> u8 {
    (seq.wrapping_mul(0x9e37_79b1) >> 24) as u8
}

impl World {
    fn call(&mut self, f: impl FnOnce(&mut Tcb, &mut Ctx<'_, Mock>) -> Fate) {
        if self.fate != Fate::Live {
            return;
        }
        let mut cx = Ctx {
            turn: 32 << 10,
            allowance: Allowance::ALL,
            now: self.now,
            fx: &mut self.mock,
            counters: &mut self.counters,
            path: &self.path,
            budget: &mut self.budget,
        };
        self.fate = f(&mut self.tcb, &mut cx);
        assert!(self.budget.used <= self.budget.limit, "{:?}", self.budget);
        self.look();
    }

    /// Reads the frames as a guest would.
    fn look(&mut self) {
        for sent in self.mock.take() {
            let seen = dissect(&sent, &self.path);
            let t = seen.tcp;
            let at = t.seq.wrapping_sub(OUR_ISN).wrapping_sub(1) as usize;
            assert!(seen.payload.is_empty() || seen.payload == stream(at, seen.payload.len()));
            if t.flags & flags::RST != 0 {
                continue;
            }
            let len = seen.payload.len() as u32 + u32::from(t.flags & (flags::SYN | flags::FIN) != 0);
            self.our_nxt = t.seq.wrapping_add(len);
            if t.flags & flags::ACK != 0 {
                self.guest_nxt = t.ack;
                if self.tcb.totals().0 == 0 {
                    self.base.get_or_insert(t.ack);
                }
            }
        }
    }

    fn run(&mut self, op: Op) {
        match op {
            Op::Segment { flags, seq, ack, window, len, ts, mss, ws, urgent, sack } => {
                let seq = self.guest_nxt.wrapping_add(seq as u32);
                let payload: Vec<u8> = (0..len as u32)
                    .map(|i| guest_byte(seq.wrapping_add(i).wrapping_add(u32::from(flags & flags::SYN != 0))))
                    .collect();
                let tcp = Tcp {
                    seq,
                    ack: self.our_nxt.wrapping_add(ack as u32),
                    flags,
                    window,
                    header_len: 20,
                    urgent,
                    ..Tcp::default()
                };
                self.ts = self.ts.wrapping_add(1);
                let timestamps = ts.map(|t| (self.ts.wrapping_add(t as u32), 0));
                let mut blocks = SackBlocks::default();
                for (at, len) in sack {
                    let left = self.our_nxt.wrapping_add(at as u32);
                    blocks.push(left, left.wrapping_add(len as u32));
                }
                let options =
                    Options { mss, wscale: ws, sack_permitted: ack & 1 == 0, timestamps, sack: blocks };
                self.call(|t, cx| t.segment(cx, &tcp, &options, &payload));
            }
            Op::HostData(n) => {
                let s = self.mock.sock(self.sock);
                if !s.eof {
                    let from = s.discarded as usize + s.inbox.len();
                    s.inbox.extend(stream(from, n));
                    self.call(|t, cx| t.ready(cx, true, false));
                }
            }
            Op::HostEof => {
                let s = self.mock.sock(self.sock);
                s.eof = true;
                s.tells_last = s.inbox.len().is_multiple_of(2);
                self.call(|t, cx| t.ready(cx, true, true));
            }
            Op::HostError { send } => {
                let s = self.mock.sock(self.sock);
                if send {
                    s.send_error = Some(SockError::Reset)
                } else {
                    s.peek_error = Some(SockError::Reset)
                }
            }
            Op::SendRoom(room) => self.mock.sock(self.sock).send_room = room,
            Op::Ready(r, w) => self.call(|t, cx| t.ready(cx, r, w)),
            Op::PortRoom(room) => self.mock.port(PORT).room = room,
            Op::PortGone => self.mock.port(PORT).gone = true,
            Op::PortWritable => self.call(|t, cx| t.port_writable(cx)),
            Op::BatchEnd => self.call(|t, cx| t.batch_end(cx)),
            Op::Connected(r) => self.call(|t, cx| t.connected(cx, r)),
            Op::Start => self.call(|t, cx| t.start(cx)),
            Op::Recheck => self.call(|t, cx| t.recheck(cx)),
            Op::Peer(segments, busy, unknown) => {
                let s = self.mock.sock(self.sock);
                s.segments_in = s.segments_in.wrapping_add(segments);
                (s.busy, s.peer_unknown) = (busy, unknown);
            }
            Op::Mtu(mtu, gso_max) => (self.path.mtu, self.path.gso_max) = (mtu, gso_max),
            Op::Pass(ms) => {
                let end = self.now.plus_ms(ms);
                for _ in 0..10_000 {
                    match self.tcb.deadline() {
                        Some(at) if at <= end && self.fate == Fate::Live => {
                            self.now = self.now.max(at);
                            self.call(|t, cx| t.timer(cx));
                        }
                        _ => {
                            self.now = end;
                            return;
                        }
                    }
                }
                panic!("a timer that never rests");
            }
        }
    }
}

fn world(inbound: bool, limit: usize) -> World {
    let mut mock = Mock::new();
    let sock = mock.new_sock();
    let now = Time(0);
    let timeouts = Timeouts::default();
    let syn = Tcp { seq: GUEST_ISN, flags: flags::SYN, window: 65535, ..Tcp::default() };
    let options = Options { mss: Some(1460), wscale: Some(7), sack_permitted: true, ..Options::default() };
    let tcb = if inbound {
        Tcb::inbound(FLOW, sock, OUR_ISN, timeouts, now)
    } else {
        Tcb::outbound(FLOW, sock, &syn, &options, OUR_ISN, timeouts, now)
    };
    World {
        mock,
        tcb,
        path: path(),
        budget: Budget { used: 0, limit },
        counters: Counters::default(),
        now,
        sock,
        fate: Fate::Live,
        guest_nxt: GUEST_ISN,
        our_nxt: OUR_ISN,
        base: None,
        ts: 0,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_order_of_anything(
        inbound: bool,
        open: bool,
        limit in prop_oneof![Just(64usize << 20), 0usize..100_000],
        ops in proptest::collection::vec(op(), 1..120),
    ) {
        let mut w = world(inbound, limit);
        if inbound {
            w.call(|t, cx| t.start(cx));
        }
        if open {
            let (flags, seq) = if inbound { (flags::SYN | flags::ACK, 0) } else { (flags::ACK, 0) };
            if !inbound {
                w.run(Op::Connected(Ok(())));
            }
            w.run(Op::Segment { flags, seq, ack: 0, window: 65535, len: 0, ts: None, mss: Some(1000), ws: Some(4), urgent: 0, sack: vec![] });
            w.run(Op::BatchEnd);
            prop_assert_eq!(w.tcb.state_name(), "established");
        }
        for op in ops {
            w.run(op);
        }
        if w.fate == Fate::Live {
            w.call(|t, cx| { t.abort(cx); Fate::Closed });
        }
        prop_assert_eq!(w.budget.used, 0);
        let sock = w.sock;
        prop_assert!(w.mock.sock(sock).closed.is_some());
        if let Some(base) = w.base {
            for (i, &b) in w.mock.sock(sock).sent.iter().enumerate() {
                prop_assert_eq!(b, guest_byte(base.wrapping_add(i as u32)), "byte {} at the host", i);
            }
        }
    }
}
