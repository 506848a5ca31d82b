//! Two relays with a link between them: each takes the other for its guest, so that one's sender meets the other's
//! receiver. What the relay makes of loss both ways is measured this way, as a function of the seed alone.

use crate::common::Mock;
use crate::link::{Faults, Rng, Wire};
use crate::tcp_support::{FLOW, OUR_ISN, path, stream};
use guestnet_core::effects::Close;
use guestnet_core::policy::shaping::Allowance;
use guestnet_core::stats::Counters;
use guestnet_core::tcp::{Budget, Ctx, Fate, Path, Tcb, Timeouts};
use guestnet_core::types::{Csum, SockId, Time};
use guestnet_wire::gso::{complete_checksum, segment};
use guestnet_wire::tcp::{MIN_LEN, Options, Tcp, flags};
use guestnet_wire::{ether, parse};

/// One relay and the link towards it.
struct End {
    mock: Mock,
    sock: SockId,
    tcb: Option<Tcb>,
    path: Path,
    budget: Budget,
    counters: Counters,
    fate: Fate,
    arriving: Wire,
    /// Resets for segments of a flow that is over, as the core answers them.
    resets: Vec<Tcp>,
}

impl End {
    fn new() -> End {
        let mut mock = Mock::new();
        let sock = mock.new_sock();
        End {
            mock,
            sock,
            tcb: None,
            path: path(),
            budget: Budget { used: 0, limit: 64 << 20 },
            counters: Counters::default(),
            fate: Fate::Live,
            arriving: Wire::default(),
            resets: Vec::new(),
        }
    }

    fn call(&mut self, now: Time, f: impl FnOnce(&mut Tcb, &mut Ctx<'_, Mock>) -> Fate) {
        let Some(tcb) = self.tcb.as_mut().filter(|_| self.fate == Fate::Live) else { return };
        let mut cx = Ctx {
            turn: 32 << 10,
            allowance: Allowance::ALL,
            now,
            fx: &mut self.mock,
            counters: &mut self.counters,
            path: &self.path,
            budget: &mut self.budget,
        };
        self.fate = f(tcb, &mut cx);
    }

    fn end_batch(&mut self, now: Time) {
        if self.tcb.as_ref().is_some_and(Tcb::wants_batch_end) {
            self.call(now, |t, cx| t.batch_end(cx));
        }
    }

    /// The frames that arrived, and the timers that are due.
    fn step(&mut self, now_us: u64) {
        let now = Time(now_us * 1000);
        for frame in self.arriving.arrived(now_us) {
            let p = parse::parse_ip(&frame, ether::HEADER_LEN).unwrap();
            assert!(parse::verify_l4(&frame, &p), "TCP checksum");
            let tcp = Tcp::parse(&frame[p.l4..p.end]).unwrap();
            let options = Options::parse(&frame[p.l4 + MIN_LEN..p.payload]);
            if self.fate != Fate::Live && tcp.flags & flags::RST == 0 {
                self.resets.push(Tcp { seq: tcp.ack, flags: flags::RST, ..Tcp::default() });
            } else if self.tcb.is_none() {
                let timeouts = Timeouts::default();
                self.tcb = Some(Tcb::outbound(FLOW, self.sock, &tcp, &options, OUR_ISN, timeouts, now));
                self.call(now, |t, cx| t.connected(cx, Ok(())));
            } else {
                self.call(now, |t, cx| t.segment(cx, &tcp, &options, &frame[p.payload..p.end]));
            }
        }
        self.end_batch(now);
        while self.fate == Fate::Live && self.tcb.as_ref().and_then(Tcb::deadline).is_some_and(|at| at <= now)
        {
            self.call(now, |t, cx| t.timer(cx));
            self.end_batch(now);
        }
    }

    fn frames(&mut self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        for mut sent in self.mock.take() {
            if let Some(gso) = sent.meta.gso {
                segment(&sent.frame, gso, |h, p| frames.push([h, p].concat())).unwrap();
            } else {
                if let Csum::Partial { start, offset } = sent.meta.csum {
                    complete_checksum(&mut sent.frame, start, offset).unwrap();
                }
                frames.push(sent.frame);
            }
        }
        frames
    }

    fn next_at(&self) -> Option<u64> {
        let timer = self.tcb.as_ref().filter(|_| self.fate == Fate::Live).and_then(Tcb::deadline);
        // As the wheel has it, in whole milliseconds.
        let timer = timer.map(|at| at.0.div_ceil(1_000_000) * 1000);
        [timer, self.arriving.next_at()].into_iter().flatten().min()
    }
}

#[derive(Debug)]
pub struct Transfer {
    pub ms: u64,
    pub sent_again: u64,
}

/// `size` bytes from the relay that opens the connection to the other, or back. Both close, and all must be there.
pub fn transfer(seed: u64, size: usize, back: bool, faults: Faults) -> Result<Transfer, String> {
    let mut rng = Rng(seed);
    let (mut a, mut b) = (End::new(), End::new());
    let mut now_us = 1_000_000;
    a.tcb = Some(Tcb::inbound(FLOW, a.sock, OUR_ISN, Timeouts::default(), Time(now_us * 1000)));
    a.call(Time(now_us * 1000), |t, cx| t.start(cx));
    let from = if back { &mut b } else { &mut a };
    let sock = from.sock;
    from.mock.sock(sock).inbox.extend(stream(0, size));
    for end in [&mut a, &mut b] {
        let sock = end.sock;
        (end.mock.sock(sock).eof, end.mock.sock(sock).tells_last) = (true, true);
    }
    let mut done_us = None;
    while now_us < 4_000_000_000 {
        a.step(now_us);
        b.step(now_us);
        for reset in std::mem::take(&mut a.resets) {
            b.call(Time(now_us * 1000), |t, cx| t.segment(cx, &reset, &Options::default(), &[]));
        }
        for reset in std::mem::take(&mut b.resets) {
            a.call(Time(now_us * 1000), |t, cx| t.segment(cx, &reset, &Options::default(), &[]));
        }
        for frame in a.frames() {
            b.arriving.send(now_us, frame, faults, &mut rng);
        }
        for frame in b.frames() {
            a.arriving.send(now_us, frame, faults, &mut rng);
        }
        let to = if back { &mut a } else { &mut b };
        if done_us.is_none() && to.mock.socks[&to.sock].sent.len() == size {
            done_us = Some(now_us);
        }
        let over = |e: &End| e.fate != Fate::Live || e.tcb.as_ref().is_some_and(Tcb::is_over);
        if over(&a) && over(&b) {
            break;
        }
        let Some(next) = [a.next_at(), b.next_at()].into_iter().flatten().min() else { break };
        now_us = next.max(now_us + 1);
    }
    let from = if back { &b } else { &a };
    let sent_again = from.counters.retransmits;
    let to = if back { &a } else { &b };
    let sock = &to.mock.socks[&to.sock];
    if sock.sent != stream(0, size) || sock.closed != Some(Close::Graceful) {
        let state =
            |e: &End| (e.fate, e.tcb.as_ref().map(Tcb::state_name), e.tcb.as_ref().and_then(Tcb::deadline));
        let (arrived, closed) = (sock.sent.len(), sock.closed);
        let ms = now_us / 1000;
        return Err(format!(
            "{arrived} of {size} bytes arrived, closed {closed:?}, at {ms} ms {:?} and {:?}",
            state(&a),
            state(&b)
        ));
    }
    if a.budget.used + b.budget.used > 0 {
        return Err(format!("{} and {} bytes stay charged", a.budget.used, b.budget.used));
    }
    let ms = (done_us.ok_or("never complete")? - 1_000_000) / 1000;
    Ok(Transfer { ms, sent_again })
}
