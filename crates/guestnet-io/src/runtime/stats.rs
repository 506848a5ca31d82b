//! Theory of operation: a worker's counters are its own plain numbers. Before it sleeps, and now and then
//! while it is busy, it publishes them through a seqlock of atomics, so a reader gets one consistent moment
//! and never makes the worker wait.

use crate::attachment::vhost_user::Counts;
use guestnet_core::stats::{Counters, DropReason};
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// Buckets of the histogram of batch sizes: 0, 1, 2-3, 4-7, 8-15, 16-31, 32-63, 64 and more.
pub const BUCKETS: usize = 8;
const DROPS: usize = DropReason::ALL.len();

macro_rules! io_counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What the I/O side of one worker counts.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct IoCounters {
            $($(#[$doc])* pub $name: u64,)*
            /// How many polls found how many ready descriptors; see [`BUCKETS`].
            pub poll_histogram: [u64; BUCKETS],
            /// How many batches had how many frames from a guest; see [`BUCKETS`].
            pub batch_histogram: [u64; BUCKETS],
        }
        const IO_PLAIN: usize = [$(stringify!($name)),*].len();
        impl IoCounters {
            /// The names of the single counters, in the order of [`IoCounters::values`].
            pub const NAMES: &'static [&'static str] = &[$(stringify!($name)),*];
            /// The single counters.
            #[must_use]
            pub fn values(&self) -> [u64; IO_PLAIN] {
                [$(self.$name),*]
            }
            fn from_values(v: [u64; IO_PLAIN]) -> IoCounters {
                let [$($name),*] = v;
                IoCounters { $($name,)* ..IoCounters::default() }
            }
        }
    };
}

io_counters! {
    /// Polls of all kinds.
    polls,
    /// Polls that slept and were woken, by a descriptor or by the time.
    wakeups,
    /// Polls that did not wait and found nothing.
    empty_spins,
    /// Events from the kernel.
    ready_events,
    /// Commands done.
    commands,
    /// Events for the control side dropped because its ring was full.
    events_dropped,
    /// Frames cut in software because the attachment cannot.
    segmented_frames,
    /// Frames from a guest that are not what their attachment or virtio header says.
    bad_frames,
    /// Frames to a guest that its attachment refused.
    refused_frames,
    /// Frames to a guest whose buffers are on pages of its memory that are not allocated, and of which no more may
    /// be allocated for it.
    unallocated_frames,
    /// Frames for a port without attachment.
    unattached_frames,
    /// Front-ends that made their worker wait and got threads of their own.
    front_ends_isolated,
    /// Guests refused on a listener (no name, too many).
    guests_refused,
    /// Connections to published ports that were reset because the network has no more descriptors for them.
    connections_refused,
    /// Times a listener was paused because the host had no more descriptors.
    listener_pauses,
    /// Datagrams that the host refused to send.
    datagrams_refused,
    /// System calls that sent datagrams.
    datagram_sends,
    /// Datagrams sent.
    datagrams_sent,
    /// System calls that received datagrams.
    datagram_receives,
    /// Datagrams received.
    datagrams_received,
    /// Runs of small writes that were put off to the end of a batch.
    write_runs,
    /// Small writes in them.
    writes_put_off,
    /// Frames left out of the capture.
    capture_dropped,
    /// Largest number of host sockets open at once.
    sockets_peak,
    /// Host sockets open now.
    sockets_open,
}

impl IoCounters {
    /// Adds what the thread of a front-end has dropped and cut.
    pub(crate) fn add_isolated(&mut self, counts: Counts) {
        let Counts { bad, refused, unallocated, segmented } = counts;
        self.bad_frames += bad;
        self.refused_frames += refused;
        self.unallocated_frames += unallocated;
        self.segmented_frames += segmented;
    }

    /// The bucket of a batch of `n`.
    #[must_use]
    pub fn bucket(n: usize) -> usize {
        ((usize::BITS - n.leading_zeros()) as usize).min(BUCKETS - 1)
    }
}

/// All counters of a worker at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StatsSnapshot {
    /// Of the core: frames, flows, drops by reason.
    pub core: Counters,
    /// Of the I/O side.
    pub io: IoCounters,
}

const CORE_PLAIN: usize = 13;
const WORDS: usize = CORE_PLAIN + DROPS + IO_PLAIN + 2 * BUCKETS;

impl StatsSnapshot {
    fn words(&self) -> [u64; WORDS] {
        let c = &self.core;
        let plain = [
            c.rx_frames,
            c.rx_bytes,
            c.tx_frames,
            c.tx_bytes,
            c.flows_opened,
            c.flows_closed,
            c.retransmits,
            c.icmp_errors,
            c.dns_hits,
            c.dns_misses,
            c.dns_asked,
            c.dns_refused,
            c.dns_unanswered,
        ];
        let io = self.io.values();
        let all = plain.iter().chain(&c.drops).chain(&io).chain(&self.io.poll_histogram);
        let mut out = [0; WORDS];
        for (o, v) in out.iter_mut().zip(all.chain(&self.io.batch_histogram)) {
            *o = *v;
        }
        out
    }

    fn from_words(w: &[u64; WORDS]) -> StatsSnapshot {
        let mut it = w.iter().copied();
        let mut next = || it.next().unwrap_or(0);
        let mut core = Counters {
            rx_frames: next(),
            rx_bytes: next(),
            tx_frames: next(),
            tx_bytes: next(),
            flows_opened: next(),
            flows_closed: next(),
            retransmits: next(),
            icmp_errors: next(),
            dns_hits: next(),
            dns_misses: next(),
            dns_asked: next(),
            dns_refused: next(),
            dns_unanswered: next(),
            ..Counters::default()
        };
        core.drops.fill_with(&mut next);
        let mut io = [0; IO_PLAIN];
        io.fill_with(&mut next);
        let mut io = IoCounters::from_values(io);
        io.poll_histogram.fill_with(&mut next);
        io.batch_histogram.fill_with(&mut next);
        StatsSnapshot { core, io }
    }

    /// Adds another worker's.
    pub fn add(&mut self, other: &StatsSnapshot) {
        let mut words = self.words();
        for (mine, theirs) in words.iter_mut().zip(other.words()) {
            *mine += theirs;
        }
        *self = StatsSnapshot::from_words(&words);
    }

    /// What was counted since `earlier`. Counters that can fall (`sockets_open`) are 0 when they fell.
    #[must_use]
    pub fn since(&self, earlier: &StatsSnapshot) -> StatsSnapshot {
        let (mut now, then) = (self.words(), earlier.words());
        for (n, t) in now.iter_mut().zip(then) {
            *n = n.saturating_sub(t);
        }
        StatsSnapshot::from_words(&now)
    }
}

/// Where a worker publishes.
pub(crate) struct Published {
    /// Odd while it is written.
    sequence: AtomicU64,
    words: [AtomicU64; WORDS],
}

impl Published {
    pub(crate) fn new() -> Published {
        Published { sequence: AtomicU64::new(0), words: std::array::from_fn(|_| AtomicU64::new(0)) }
    }

    /// Publishes; only ever called by the one worker.
    pub(crate) fn write(&self, snapshot: &StatsSnapshot) {
        let s = self.sequence.load(Ordering::Relaxed);
        self.sequence.store(s + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        for (to, from) in self.words.iter().zip(snapshot.words()) {
            to.store(from, Ordering::Relaxed);
        }
        self.sequence.store(s + 2, Ordering::Release);
    }

    /// One consistent moment.
    pub(crate) fn read(&self) -> StatsSnapshot {
        loop {
            let before = self.sequence.load(Ordering::Acquire);
            let mut words = [0; WORDS];
            for (to, from) in words.iter_mut().zip(&self.words) {
                *to = from.load(Ordering::Relaxed);
            }
            fence(Ordering::Acquire);
            if before.is_multiple_of(2) && self.sequence.load(Ordering::Relaxed) == before {
                return StatsSnapshot::from_words(&words);
            }
            std::thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn comes_back_as_it_went_and_subtracts() {
        let mut a = StatsSnapshot::default();
        a.core.rx_frames = 1;
        a.core.icmp_errors = 8;
        a.core.dns_asked = 11;
        a.core.dns_unanswered = 12;
        a.core.drop(DropReason::PortsExhausted);
        a.io.polls = 5;
        a.io.sockets_open = 6;
        a.io.poll_histogram[7] = 9;
        a.io.batch_histogram[0] = 3;
        assert_eq!(StatsSnapshot::from_words(&a.words()), a);
        let mut b = a.clone();
        b.core.rx_frames += 10;
        b.io.sockets_open = 2;
        let d = b.since(&a);
        assert_eq!((d.core.rx_frames, d.io.polls, d.io.sockets_open), (10, 0, 0));
    }

    #[test]
    fn buckets_by_powers_of_two() {
        let b = [0, 1, 2, 3, 4, 7, 8, 63, 64, 1000].map(IoCounters::bucket);
        assert_eq!(b, [0, 1, 2, 2, 3, 3, 4, 6, 7, 7]);
    }

    #[test]
    fn a_reader_sees_one_moment() {
        let p = Arc::new(Published::new());
        let q = Arc::clone(&p);
        let t = std::thread::spawn(move || {
            let mut s = StatsSnapshot::default();
            for i in 1..20_000 {
                (s.core.rx_frames, s.io.batch_histogram[7]) = (i, i);
                q.write(&s);
            }
        });
        while !t.is_finished() {
            let s = p.read();
            assert_eq!(s.core.rx_frames, s.io.batch_histogram[7]);
        }
        t.join().unwrap();
    }
}
