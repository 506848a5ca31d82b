//! Theory of operation: what is known of the bytes in flight to the guest while some of them seem to be missing.
//! The scoreboard lists neighbouring spans from the first unacknowledged byte up to the highest byte that a SACK
//! block reported (RFC 2018), or up to all that was sent after a timeout; what lies above is in flight. A span is
//! - *sacked*: the guest has it;
//! - *skipped*: the guest reported later bytes, so it is late or lost;
//! - *lost*: to be sent again;
//! - *resent*: sent again, with the time of it.
//!
//! [`Scoreboard::detect`] decides what is lost as RACK does (RFC 8985 6.2): by the order in which bytes were sent,
//! with some time for reordering. First transmissions go out in order of sequence number, so the order of what was
//! skipped needs no record, and its reordering window starts when it was skipped. Only what is sent again has a
//! time of its own. Without SACK the caller names what is lost (RFC 6582).
//!
//! Bounds: up to [`SPANS_FREE`] spans cost nothing but themselves; a list that grows longer is charged to the
//! endpoint's budget with the most that it can take. Blocks that find no room are ignored, and their bytes are
//! sent again.

use crate::interface::types::Time;
use crate::relay::tcp::Budget;
use crate::relay::tcp::seq::Seq;
use crate::util::account::charge;

/// Spans that any flow may have.
const SPANS_FREE: usize = 8;
/// Spans that blocks of the guest can make; resending can split each of them once more.
const SPANS_MAX: usize = 256;
/// What a long list is charged with.
const LONG_COST: usize = 2 * SPANS_MAX * size_of::<Span>();
/// Neighbours that were resent within this time share a span. Nanoseconds.
const SAME_TIME: u64 = 1_000_000;
/// Segments that must have arrived above a skipped one for it to be lost (RFC 6675 2, DupThresh).
const DUP_THRESH: u32 = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Sacked,
    Skipped {
        since: Time,
    },
    Lost,
    /// `end` is the end of all that had been sent by then.
    Resent {
        at: Time,
        end: Seq,
    },
}

#[derive(Debug, Clone, Copy)]
struct Span {
    end: Seq,
    state: State,
}

/// What an ACK said of bytes that were in flight.
#[derive(Debug, Default)]
pub(super) struct Delivery {
    /// Bytes that arrived and were not known to have.
    pub bytes: u32,
    /// Some arrived by their first transmission, after later ones.
    pub reordered: bool,
    /// The latest time at which any of them was resent.
    pub resent: Option<Time>,
}

/// How patient [`Scoreboard::detect`] is.
#[derive(Debug)]
pub(super) struct Rule {
    /// Segment size.
    pub mss: u32,
    /// The reordering window in nanoseconds.
    pub window: u64,
    /// Round-trip time of what arrived last, in nanoseconds.
    pub rtt: u64,
    /// The latest resend that is known to have arrived.
    pub newest: Time,
    /// Reordering was seen: nothing is lost before the window is over.
    pub reordered: bool,
    /// Loss is certain by now, as in a recovery or after a tail loss probe: the window is nothing without
    /// reordering.
    pub hasty: bool,
}

#[derive(Debug)]
pub(super) struct Scoreboard {
    /// First byte not acknowledged.
    start: Seq,
    spans: Vec<Span>,
    sacked: u32,
    lost: u32,
    /// End of the highest sacked span.
    highest: Seq,
    charged: bool,
}

impl Scoreboard {
    pub fn new(start: Seq) -> Scoreboard {
        Scoreboard { start, spans: Vec::new(), sacked: 0, lost: 0, highest: start, charged: false }
    }

    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Bytes that are to be sent again.
    pub fn lost(&self) -> u32 {
        self.lost
    }

    /// Bytes of all up to `snd_max` that the network should still have (RFC 6675 4, pipe).
    pub fn in_flight(&self, snd_max: Seq) -> u32 {
        snd_max.since(self.start).saturating_sub(self.sacked).saturating_sub(self.lost)
    }

    /// True when the guest has the byte at `at`.
    pub fn has(&self, at: Seq) -> bool {
        let state = self.spans.get(self.index(at)).map(|s| s.state);
        self.start.le(at) && state == Some(State::Sacked)
    }

    /// True when the guest reported the first unacknowledged byte, which a guest that keeps what it reported
    /// would have acknowledged.
    pub fn reneged(&self) -> bool {
        self.has(self.start)
    }

    /// The first span that is to be sent again: where, and how much.
    pub fn first_lost(&self) -> Option<(Seq, u32)> {
        if self.lost == 0 {
            return None;
        }
        let i = self.spans.iter().position(|s| s.state == State::Lost)?;
        Some((self.start_of(i), self.len_of(i)))
    }

    fn covered(&self) -> Seq {
        self.spans.last().map_or(self.start, |s| s.end)
    }

    /// The span that holds the byte at `at`, or the number of spans.
    fn index(&self, at: Seq) -> usize {
        self.spans.partition_point(|s| s.end.le(at))
    }

    fn start_of(&self, i: usize) -> Seq {
        i.checked_sub(1).and_then(|before| self.spans.get(before)).map_or(self.start, |s| s.end)
    }

    fn len_of(&self, i: usize) -> u32 {
        self.spans.get(i).map_or(0, |s| s.end.since(self.start_of(i)))
    }

    /// Makes a border at `at`; returns the index of the span that starts there.
    fn split(&mut self, at: Seq) -> usize {
        let i = self.index(at);
        match self.spans.get(i) {
            Some(s) if self.start_of(i) != at => {
                let part = Span { end: at, state: s.state };
                self.spans.insert(i, part);
                i.saturating_add(1)
            }
            _ => i,
        }
    }

    /// Joins neighbours of one state and counts anew.
    fn settle(&mut self) {
        self.spans.dedup_by(|next, before| {
            let same = next.state == before.state;
            if same {
                before.end = next.end;
            }
            same
        });
        (self.sacked, self.lost) = (0, 0);
        let mut from = self.start;
        for s in &self.spans {
            let len = s.end.since(from);
            match s.state {
                State::Sacked => self.sacked = self.sacked.saturating_add(len),
                State::Lost => self.lost = self.lost.saturating_add(len),
                State::Skipped { .. } | State::Resent { .. } => {}
            }
            from = s.end;
        }
    }

    /// `bytes` of the span `s` have arrived. `genuine` tells for the time of a resend whether it was the resend
    /// that arrived, and not the first transmission after all. `highest` is the end of what had arrived before.
    fn arrived(s: Span, bytes: u32, highest: Seq, genuine: &impl Fn(Time) -> bool, d: &mut Delivery) {
        if s.state == State::Sacked {
            return;
        }
        d.bytes = d.bytes.saturating_add(bytes);
        match s.state {
            State::Resent { at, .. } if genuine(at) => d.resent = d.resent.max(Some(at)),
            _ => d.reordered |= s.end.le(highest),
        }
    }

    /// All before `una` is acknowledged.
    pub fn acknowledge(&mut self, una: Seq, genuine: impl Fn(Time) -> bool, d: &mut Delivery) {
        let covered = self.covered();
        let mut gone = 0_usize;
        let mut from = self.start;
        for s in &self.spans {
            if una.le(from) {
                break;
            }
            Self::arrived(*s, s.end.min_of(una).since(from), self.highest, &genuine, d);
            gone = gone.saturating_add(usize::from(s.end.le(una)));
            from = s.end;
        }
        if covered.lt(una) {
            d.bytes = d.bytes.saturating_add(una.since(covered));
        }
        self.spans.drain(..gone);
        self.start = una;
        self.highest = self.highest.max(una);
        self.settle();
    }

    /// The guest has `from..to`, both within what was sent and not acknowledged. False when there is no room to
    /// note it.
    pub fn sack(
        &mut self,
        (from, to): (Seq, Seq),
        now: Time,
        genuine: impl Fn(Time) -> bool,
        budget: &mut Budget,
        d: &mut Delivery,
    ) -> bool {
        if !self.has_room(budget) {
            return false;
        }
        let covered = self.covered();
        if covered.lt(to) {
            if covered.lt(from) {
                self.spans.push(Span { end: from, state: State::Skipped { since: now } });
            }
            self.spans.push(Span { end: to, state: State::Sacked });
            d.bytes = d.bytes.saturating_add(to.since(covered.max(from)));
        }
        if from.lt(covered) {
            let (first, last) = (self.split(from), self.split(to.min_of(covered)));
            for i in first..last {
                let len = self.len_of(i);
                if let Some(s) = self.spans.get_mut(i) {
                    Self::arrived(*s, len, self.highest, &genuine, d);
                    s.state = State::Sacked;
                }
            }
        }
        self.highest = self.highest.max(to);
        self.settle();
        true
    }

    fn has_room(&mut self, budget: &mut Budget) -> bool {
        // A block adds two spans at most.
        let after = self.spans.len().saturating_add(2);
        if !self.charged && after > SPANS_FREE && budget.free() >= LONG_COST {
            charge(&mut budget.used, LONG_COST);
            self.charged = true;
        }
        after <= if self.charged { SPANS_MAX } else { SPANS_FREE }
    }

    /// Forgets the spans and gives back what was charged for them.
    pub fn release(&mut self, budget: &mut Budget) {
        self.spans = Vec::new();
        (self.sacked, self.lost) = (0, 0);
        if std::mem::take(&mut self.charged) {
            budget.used = budget.used.saturating_sub(LONG_COST);
        }
    }

    /// Marks what is lost; returns how many bytes, and when to look again.
    pub fn detect(&mut self, now: Time, rule: &Rule) -> (u32, Option<Time>) {
        let window = if rule.hasty && !rule.reordered { 0 } else { rule.window };
        let (mut newly, mut again) = (0u32, None::<Time>);
        let (mut above, mut runs) = (0u32, 0u32);
        for i in (0..self.spans.len()).rev() {
            let len = self.len_of(i);
            let highest = self.highest;
            let Some(s) = self.spans.get_mut(i) else { break };
            let due = match s.state {
                State::Sacked => {
                    (above, runs) = (above.saturating_add(len), runs.saturating_add(1));
                    continue;
                }
                State::Lost => continue,
                State::Skipped { since } => {
                    let enough = above > rule.mss.saturating_mul(DUP_THRESH - 1) || runs >= DUP_THRESH;
                    if enough && !rule.reordered { now } else { Time(since.0.saturating_add(window)) }
                }
                // Only what was sent later and has arrived tells anything of it.
                State::Resent { at, end } if end.lt(highest) || at < rule.newest => {
                    Time(at.0.saturating_add(rule.rtt).saturating_add(window))
                }
                State::Resent { .. } => continue,
            };
            if due <= now {
                s.state = State::Lost;
                newly = newly.saturating_add(len);
            } else {
                again = Some(again.map_or(due, |a| a.min(due)));
            }
        }
        if newly > 0 {
            self.settle();
        }
        (newly, again)
    }

    /// The first `len` bytes are lost, of what reaches to `snd_max`; not those that were resent already.
    pub fn lose_first(&mut self, len: u32, snd_max: Seq) {
        let to = self.start.plus(len).min_of(snd_max);
        if self.covered().lt(to) {
            self.spans.push(Span { end: to, state: State::Skipped { since: Time(0) } });
        }
        let last = self.split(to);
        for s in self.spans.iter_mut().take(last) {
            if matches!(s.state, State::Skipped { .. }) {
                s.state = State::Lost;
            }
        }
        self.settle();
    }

    /// All up to `snd_max` is lost but what the guest reported, and that too with `distrust` (RFC 2018 8: a guest
    /// may throw away what it reported).
    pub fn lose_all(&mut self, snd_max: Seq, distrust: bool) {
        for s in &mut self.spans {
            if distrust || s.state != State::Sacked {
                s.state = State::Lost;
            }
        }
        if distrust {
            self.highest = self.start;
        }
        if self.covered().lt(snd_max) {
            self.spans.push(Span { end: snd_max, state: State::Lost });
        }
        self.settle();
    }

    /// The first `len` bytes of the first lost span were sent again at `at`, when `snd_max` was the end of all.
    pub fn resent(&mut self, len: u32, at: Time, snd_max: Seq) {
        let Some(i) = self.spans.iter().position(|s| s.state == State::Lost) else { return };
        let to = self.start_of(i).plus(len.min(self.len_of(i)));
        let state = State::Resent { at, end: snd_max };
        let full = self.spans.len() >= SPANS_MAX;
        if let Some(before) = i.checked_sub(1).and_then(|b| self.spans.get_mut(b))
            && let State::Resent { at: earlier, .. } = before.state
            && (full || at.since(earlier) <= SAME_TIME)
        {
            // One span with the later time: it can only be given up on later.
            *before = Span { end: to, state };
            if self.spans.get(i).is_some_and(|s| s.end == to) {
                self.spans.remove(i);
            }
        } else {
            self.split(to);
            if let Some(s) = self.spans.get_mut(i) {
                s.state = state;
            }
        }
        self.settle();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MSS: u32 = 1000;
    const MS: u64 = 1_000_000;

    fn rule() -> Rule {
        Rule { mss: MSS, window: 10 * MS, rtt: 40 * MS, newest: Time(0), reordered: false, hasty: false }
    }

    fn budget() -> Budget {
        Budget { used: 0, limit: 1 << 20 }
    }

    /// Segment numbers instead of sequence numbers, from a start near the wrap.
    fn at(segment: u32) -> Seq {
        Seq(u32::MAX - 2500).plus(segment * MSS)
    }

    fn sacked(b: &mut Scoreboard, from: u32, to: u32, now: u64) -> Delivery {
        let mut d = Delivery::default();
        assert!(b.sack((at(from), at(to)), Time(now * MS), |_| true, &mut budget(), &mut d));
        d
    }

    #[test]
    fn three_segments_above_a_hole_make_it_lost_at_once() {
        let mut b = Scoreboard::new(at(0));
        sacked(&mut b, 1, 3, 5);
        assert_eq!(b.detect(Time(5 * MS), &rule()), (0, Some(Time(15 * MS))));
        assert_eq!(b.in_flight(at(10)), 8 * MSS);
        sacked(&mut b, 3, 4, 6);
        assert_eq!(b.detect(Time(6 * MS), &rule()), (MSS, None));
        assert_eq!(b.first_lost(), Some((at(0), MSS)));
        assert_eq!(b.in_flight(at(10)), 6 * MSS);
    }

    #[test]
    fn fewer_segments_make_it_lost_after_the_reordering_window() {
        let mut b = Scoreboard::new(at(0));
        sacked(&mut b, 1, 2, 5);
        assert_eq!(b.detect(Time(14 * MS), &rule()).0, 0);
        assert_eq!(b.detect(Time(15 * MS), &rule()).0, MSS);
    }

    #[test]
    fn after_reordering_was_seen_the_window_is_always_waited_for() {
        let mut b = Scoreboard::new(at(0));
        sacked(&mut b, 1, 9, 5);
        let rule = Rule { reordered: true, hasty: true, ..rule() };
        assert_eq!(b.detect(Time(5 * MS), &rule), (0, Some(Time(15 * MS))));
        let d = sacked(&mut b, 0, 1, 6);
        assert!(d.reordered);
    }

    #[test]
    fn a_lost_resend_is_found_by_what_was_sent_after_it() {
        let mut b = Scoreboard::new(at(0));
        sacked(&mut b, 1, 4, 5);
        b.detect(Time(5 * MS), &rule());
        b.resent(MSS, Time(6 * MS), at(4));
        assert_eq!((b.lost(), b.in_flight(at(4))), (0, MSS));
        let rule = Rule { hasty: true, ..rule() };
        // Nothing sent later has arrived: it may still be under way.
        assert_eq!(b.detect(Time(900 * MS), &rule), (0, None));
        sacked(&mut b, 5, 6, 45);
        assert_eq!(b.detect(Time(45 * MS), &rule), (MSS, Some(Time(46 * MS))));
        assert_eq!(b.first_lost(), Some((at(4), MSS)), "a skipped one in a recovery is lost at once");
        assert_eq!(b.detect(Time(46 * MS), &rule).0, MSS);
        assert_eq!(b.first_lost(), Some((at(0), MSS)));
    }

    #[test]
    fn what_was_resent_is_told_from_the_first_transmission() {
        for genuine in [true, false] {
            let mut b = Scoreboard::new(at(0));
            sacked(&mut b, 1, 4, 5);
            b.detect(Time(5 * MS), &rule());
            b.resent(MSS, Time(6 * MS), at(4));
            let mut d = Delivery::default();
            b.acknowledge(at(4), |_| genuine, &mut d);
            assert_eq!((d.bytes, d.reordered), (MSS, !genuine));
            assert_eq!(d.resent, genuine.then_some(Time(6 * MS)));
            assert!(b.is_empty());
        }
    }

    #[test]
    fn a_long_list_is_charged_and_a_poor_budget_keeps_it_short() {
        for limit in [1 << 20, 100] {
            let mut budget = Budget { used: 0, limit };
            let mut b = Scoreboard::new(at(0));
            let mut d = Delivery::default();
            let taken = (0..2 * SPANS_MAX as u32)
                .filter(|i| b.sack((at(2 * i + 1), at(2 * i + 2)), Time(0), |_| true, &mut budget, &mut d))
                .count();
            let most = if limit > LONG_COST { SPANS_MAX } else { SPANS_FREE };
            assert_eq!(taken, most / 2);
            assert_eq!(budget.used, if limit > LONG_COST { LONG_COST } else { 0 });
            b.lose_all(at(5000), false);
            while let Some((_, len)) = b.first_lost() {
                b.resent(len.min(MSS), Time(0), at(5000));
            }
            assert!(b.spans.len() <= 2 * most, "{}", b.spans.len());
            b.release(&mut budget);
            assert_eq!(budget.used, 0);
        }
    }

    #[derive(Debug, Clone)]
    enum Op {
        Sack(u32, u32),
        Ack(u32),
        Detect(bool),
        LoseAll(bool),
        LoseFirst(u32),
        Resend(u32),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            8 => (1u32..300, 1u32..20).prop_map(|(a, n)| Op::Sack(a, n)),
            2 => (0u32..20).prop_map(Op::Ack),
            4 => any::<bool>().prop_map(Op::Detect),
            1 => any::<bool>().prop_map(Op::LoseAll),
            1 => (1u32..5).prop_map(Op::LoseFirst),
            6 => (1u32..5).prop_map(Op::Resend),
        ]
    }

    proptest! {
        /// The scoreboard against a list with one entry for each byte.
        #[test]
        fn same_as_a_list_of_bytes(ops in proptest::collection::vec(op(), 1..120), base: u32) {
            const END: u32 = 400;
            let at = |n: u32| Seq(base).plus(n);
            let mut budget = budget();
            let mut b = Scoreboard::new(at(0));
            // ' ' in flight, 's' sacked, 'k' skipped, 'l' lost, 'r' resent
            let mut model = vec![' '; END as usize];
            let (mut una, mut now) = (0u32, 0u64);
            for op in ops {
                now += MS;
                let mut d = Delivery::default();
                match op {
                    Op::Sack(from, len) => {
                        let (from, to) = (from.max(una + 1), (from + len).min(END));
                        if from < to && b.sack((at(from), at(to)), Time(now), |_| true, &mut budget, &mut d) {
                            let news = model[from as usize..to as usize].iter().filter(|c| **c != 's').count();
                            prop_assert_eq!(d.bytes as usize, news);
                            model[from as usize..to as usize].fill('s');
                            for c in &mut model[una as usize..from as usize] {
                                if *c == ' ' { *c = 'k'; }
                            }
                        }
                    }
                    Op::Ack(n) => {
                        let to = (una + n).min(END);
                        let news = model[una as usize..to as usize].iter().filter(|c| **c != 's').count();
                        b.acknowledge(at(to), |_| true, &mut d);
                        prop_assert_eq!(d.bytes as usize, news);
                        una = to;
                    }
                    Op::Detect(hasty) => {
                        let before = b.lost();
                        let (newly, _) = b.detect(Time(now), &Rule { hasty, mss: 2, ..rule() });
                        prop_assert_eq!(b.lost(), before + newly);
                        // Which, is tested above; here that counts and places agree.
                        for i in una..END {
                            let s = b.spans.get(b.index(at(i))).map(|s| s.state);
                            let c = &mut model[i as usize];
                            if s == Some(State::Lost) {
                                prop_assert!("klr".contains(*c), "{} became lost", *c);
                                *c = 'l';
                            }
                        }
                    }
                    Op::LoseAll(distrust) => {
                        b.lose_all(at(END), distrust);
                        for c in &mut model[una as usize..] {
                            if distrust || *c != 's' { *c = 'l'; }
                        }
                    }
                    Op::LoseFirst(n) => {
                        b.lose_first(n, at(END));
                        for c in model[una as usize..].iter_mut().take(n as usize) {
                            if " k".contains(*c) { *c = 'l'; }
                        }
                    }
                    Op::Resend(n) => {
                        if let Some((from, len)) = b.first_lost() {
                            let first = (una..END).find(|i| model[*i as usize] == 'l');
                            prop_assert_eq!(Some(from.since(at(0))), first);
                            let n = n.min(len);
                            b.resent(n, Time(now), at(END));
                            let from = from.since(at(0)) as usize;
                            model[from..from + n as usize].fill('r');
                        }
                    }
                }
                let count = |what: char| model[una as usize..].iter().filter(|c| **c == what).count() as u32;
                prop_assert_eq!((b.sacked, b.lost), (count('s'), count('l')));
                prop_assert_eq!(b.in_flight(at(END)), END - una - count('s') - count('l'));
                for i in una..END {
                    prop_assert_eq!(b.has(at(i)), model[i as usize] == 's');
                }
            }
        }
    }
}
