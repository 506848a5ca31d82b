//! A link with faults and the smoltcp device at its end.

use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;
use std::collections::VecDeque;

/// splitmix64: small, seeded, good enough to spread faults.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
    pub fn permille(&mut self, p: u32) -> bool {
        self.below(1000) < u64::from(p)
    }
}

/// One direction: frames with the time of their arrival.
#[derive(Default)]
pub struct Wire {
    queue: Vec<(u64, u64, Vec<u8>)>,
    count: u64,
}

/// Per mille of frames that are lost, delayed past others, or arrive twice; and the time that each takes.
#[derive(Clone, Copy)]
pub struct Faults {
    pub delay_us: u64,
    pub loss: u32,
    pub reorder: u32,
    pub repeat: u32,
}

impl Wire {
    pub fn send(&mut self, now_us: u64, frame: Vec<u8>, faults: Faults, rng: &mut Rng) {
        if rng.permille(faults.loss) {
            return;
        }
        if rng.permille(faults.repeat) {
            self.put(now_us + faults.delay_us + rng.below(2000), frame.clone());
        }
        let delay = if rng.permille(faults.reorder) { rng.below(3000) } else { 0 };
        self.put(now_us + faults.delay_us + delay, frame);
    }

    fn put(&mut self, at: u64, frame: Vec<u8>) {
        self.count += 1;
        self.queue.push((at, self.count, frame));
    }

    pub fn next_at(&self) -> Option<u64> {
        self.queue.iter().map(|f| f.0).min()
    }

    /// What has arrived by now, in order of arrival.
    pub fn arrived(&mut self, now_us: u64) -> Vec<Vec<u8>> {
        let (mut due, rest): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.queue).into_iter().partition(|f| f.0 <= now_us);
        self.queue = rest;
        due.sort_by_key(|f| (f.0, f.1));
        due.into_iter().map(|f| f.2).collect()
    }
}

/// The guest's NIC.
pub struct Nic {
    pub rx: VecDeque<Vec<u8>>,
    pub tx: Vec<Vec<u8>>,
    pub mtu: usize,
}

pub struct Rx(Vec<u8>);
pub struct Tx<'a>(&'a mut Vec<Vec<u8>>);

impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let r = f(&mut frame);
        self.0.push(frame);
        r
    }
}

impl Device for Nic {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Rx, Tx<'_>)> {
        self.rx.pop_front().map(|f| (Rx(f), Tx(&mut self.tx)))
    }
    fn transmit(&mut self, _now: Instant) -> Option<Tx<'_>> {
        Some(Tx(&mut self.tx))
    }
    fn capabilities(&self) -> DeviceCapabilities {
        let mut c = DeviceCapabilities::default();
        c.max_transmission_unit = self.mtu + 14;
        c.medium = Medium::Ethernet;
        c
    }
}
