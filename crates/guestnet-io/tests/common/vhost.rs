//! Theory of operation: a vhost-user front-end with its guest, by hand: memory in a memfd, virtqueues written
//! word by word, so that a test can write them wrong. [`Front`] speaks the protocol and owns the memory;
//! [`VhostLink`] is a well-behaved virtio-net driver on it.

use super::Link;
use guestnet_wire::gso::{self, Gso};
use guestnet_wire::{be16, checksum, parse, proto};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use std::time::{Duration, Instant};

pub const CSUM: u64 = 1 << 0 | 1 << 1;
pub const TSO: u64 = CSUM | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 12;
pub const MRG: u64 = 1 << 15;
pub const MQ: u64 = 1 << 22;
pub const INDIRECT: u64 = 1 << 28;
pub const EVENT_IDX: u64 = 1 << 29;
pub const PROTOCOL: u64 = 1 << 30;
pub const V1: u64 = 1 << 32;
/// What every guest here takes.
pub const PLAIN: u64 = V1 | PROTOCOL;

/// Where the guest has its memory, and where the front-end says that it has it.
pub const GUEST: u64 = 0x1000_0000;
pub const USER: u64 = 0x7000_0000_0000;
pub const MEMORY: usize = 24 << 20;

pub fn memfd(len: usize) -> OwnedFd {
    // SAFETY: a name, and a new descriptor.
    #[allow(unsafe_code)]
    let fd = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC)) };
    File::from(fd.try_clone().unwrap()).set_len(len as u64).unwrap();
    fd
}

pub fn eventfd() -> OwnedFd {
    // SAFETY: a new descriptor.
    #[allow(unsafe_code)]
    unsafe {
        OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC))
    }
}

/// How often an eventfd was signalled since it was asked last.
pub fn signals(fd: &OwnedFd) -> u64 {
    let mut b = [0; 8];
    File::from(fd.try_clone().unwrap()).read(&mut b).map_or(0, |_| u64::from_ne_bytes(b))
}

pub fn signal(fd: &OwnedFd) {
    File::from(fd.try_clone().unwrap()).write_all(&1u64.to_ne_bytes()).unwrap();
}

/// Memory that the guest and the worker both see.
pub struct Shared {
    pub fd: OwnedFd,
    base: *mut u8,
    len: usize,
}

// SAFETY: all access is by volatile or atomic operations on a mapping that lives as long as this.
#[allow(unsafe_code)]
unsafe impl Send for Shared {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Shared {}

#[allow(unsafe_code)]
impl Shared {
    pub fn new(len: usize) -> Shared {
        let fd = memfd(len);
        // SAFETY: a new mapping of a file of that length.
        let base = unsafe {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED, fd.as_raw_fd(), 0)
        };
        assert_ne!(base, libc::MAP_FAILED);
        Shared { fd, base: base.cast(), len }
    }

    pub fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.len);
        for (i, b) in bytes.iter().enumerate() {
            // SAFETY: inside (checked above).
            unsafe { self.base.add(at + i).write_volatile(*b) };
        }
    }

    pub fn read(&self, at: usize, len: usize) -> Vec<u8> {
        assert!(at + len <= self.len);
        // SAFETY: inside (checked above).
        (0..len).map(|i| unsafe { self.base.add(at + i).read_volatile() }).collect()
    }

    pub fn word(&self, at: usize) -> &AtomicU16 {
        assert!(at + 2 <= self.len && at.is_multiple_of(2));
        // SAFETY: inside and aligned (checked above), and accessed as atomic or by the other process.
        unsafe { AtomicU16::from_ptr(self.base.add(at).cast()) }
    }
}

impl Drop for Shared {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: what `new` mapped.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

/// A queue in the memory: its parts in a row from `at`.
#[derive(Clone, Copy)]
pub struct Queue {
    pub index: u32,
    pub at: usize,
    pub size: u16,
}

impl Queue {
    pub fn desc(&self) -> usize {
        self.at
    }
    pub fn avail(&self) -> usize {
        self.at + 16 * usize::from(self.size)
    }
    pub fn used(&self) -> usize {
        (self.avail() + 6 + 2 * usize::from(self.size)).next_multiple_of(4096)
    }
}

pub const F_NEXT: u16 = 1;
pub const F_WRITE: u16 = 2;
pub const F_INDIRECT: u16 = 4;

pub fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut d = [0; 16];
    d[..8].copy_from_slice(&addr.to_le_bytes());
    d[8..12].copy_from_slice(&len.to_le_bytes());
    d[12..14].copy_from_slice(&flags.to_le_bytes());
    d[14..].copy_from_slice(&next.to_le_bytes());
    d
}

/// The front-end.
pub struct Front {
    pub stream: UnixStream,
    pub memory: std::sync::Arc<Shared>,
    pub features: u64,
    /// Kick, call and err of each queue.
    pub events: Vec<[OwnedFd; 3]>,
}

pub mod message {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
}
use message::*;

pub fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_ne_bytes()).collect()
}

pub fn longs(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_ne_bytes()).collect()
}

impl Front {
    pub fn new(stream: UnixStream) -> Front {
        stream.set_read_timeout(Some(super::PATIENCE)).unwrap();
        let memory = std::sync::Arc::new(Shared::new(MEMORY));
        Front { stream, memory, features: 0, events: vec![] }
    }

    /// Sends bytes, with descriptors.
    pub fn raw(&self, bytes: &[u8], fds: &[RawFd]) {
        assert_eq!(self.try_raw(bytes, fds), bytes.len() as isize, "{}", std::io::Error::last_os_error());
    }

    /// Sends a message to a back-end that may have hung up.
    pub fn try_send(&self, request: u32, body: &[u8], fds: &[RawFd]) {
        let m = [words(&[request, 1, body.len() as u32]), body.to_vec()].concat();
        let _hung_up = self.try_raw(&m, fds);
    }

    #[allow(unsafe_code)]
    fn try_raw(&self, bytes: &[u8], fds: &[RawFd]) -> isize {
        let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let mut control = [0u64; 64];
        // SAFETY: the buffers live and are large enough for the descriptors (at most 64).
        unsafe {
            let mut msg: libc::msghdr = std::mem::zeroed();
            msg.msg_iov = &mut iov;
            msg.msg_iovlen = 1;
            if !fds.is_empty() {
                let len = size_of_val(fds);
                assert!(len <= 256);
                msg.msg_control = control.as_mut_ptr().cast();
                msg.msg_controllen = libc::CMSG_SPACE(len as u32) as usize;
                let c = libc::CMSG_FIRSTHDR(&msg);
                (*c).cmsg_level = libc::SOL_SOCKET;
                (*c).cmsg_type = libc::SCM_RIGHTS;
                (*c).cmsg_len = libc::CMSG_LEN(len as u32) as usize;
                std::ptr::copy_nonoverlapping(fds.as_ptr().cast(), libc::CMSG_DATA(c), len);
            }
            libc::sendmsg(self.stream.as_raw_fd(), &msg, libc::MSG_NOSIGNAL)
        }
    }

    pub fn send(&self, request: u32, flags: u32, body: &[u8], fds: &[RawFd]) {
        let mut m = words(&[request, 1 | flags, body.len() as u32]);
        m.extend_from_slice(body);
        self.raw(&m, fds);
    }

    pub fn reply(&mut self) -> Option<Vec<u8>> {
        let mut head = [0; 12];
        self.stream.read_exact(&mut head).ok()?;
        let word = |at: usize| u32::from_ne_bytes(head[at..at + 4].try_into().unwrap());
        assert_eq!(word(4), 5, "version and reply");
        let mut body = vec![0; word(8) as usize];
        self.stream.read_exact(&mut body).ok()?;
        Some(body)
    }

    pub fn ask(&mut self, request: u32, body: &[u8]) -> u64 {
        self.send(request, 0, body, &[]);
        u64::from_ne_bytes(self.reply().expect("a reply").try_into().unwrap())
    }

    /// Tells, and hears whether it was done.
    #[track_caller]
    pub fn tell(&mut self, request: u32, body: &[u8], fds: &[RawFd]) -> bool {
        if self.features & PROTOCOL == 0 {
            // There is no asking.
            self.send(request, 0, body, fds);
            return true;
        }
        self.send(request, 8, body, fds);
        let r = self.reply().expect("an answer");
        u64::from_ne_bytes(r.try_into().unwrap()) == 0
    }

    /// True when the back-end has hung up.
    pub fn is_over(&mut self) -> bool {
        self.stream.read(&mut [0; 1]).is_ok_and(|n| n == 0)
            || self.stream.take_error().is_ok_and(|e| e.is_some())
    }

    pub fn region(guest: u64, size: u64, user: u64, offset: u64) -> Vec<u8> {
        longs(&[guest, size, user, offset])
    }

    pub fn table(regions: &[Vec<u8>]) -> Vec<u8> {
        let mut b = words(&[regions.len() as u32, 0]);
        b.extend(regions.concat());
        b
    }

    /// Agrees on features and shares the memory.
    pub fn begin(&mut self, features: u64) {
        self.features = features;
        let offered = self.ask(GET_FEATURES, &[]);
        assert_eq!(features & !offered, 0);
        if features & PROTOCOL != 0 {
            assert_eq!(self.ask(GET_PROTOCOL_FEATURES, &[]) & 9, 9);
            self.send(SET_PROTOCOL_FEATURES, 0, &longs(&[9]), &[]);
            assert!(self.ask(GET_QUEUE_NUM, &[]) >= 2);
        }
        self.send(SET_OWNER, 0, &[], &[]);
        self.send(SET_FEATURES, 0, &longs(&[features]), &[]);
        let table = Front::table(&[Front::region(GUEST, MEMORY as u64, USER, 0)]);
        self.send(SET_MEM_TABLE, 0, &table, &[self.memory.fd.as_raw_fd()]);
    }

    /// Where the parts of a queue are, as a message says it.
    pub fn address(q: &Queue) -> Vec<u8> {
        let at = |x: usize| USER + x as u64;
        let mut b = words(&[q.index, 0]);
        b.extend(longs(&[at(q.desc()), at(q.used()), at(q.avail()), 0]));
        b
    }

    /// Sets a queue going.
    pub fn start(&mut self, q: &Queue, base: u16) -> bool {
        while self.events.len() <= q.index as usize {
            self.events.push([eventfd(), eventfd(), eventfd()]);
        }
        let [kick, call, err] = self.events[q.index as usize].each_ref().map(AsRawFd::as_raw_fd);
        let all = self.tell(SET_VRING_NUM, &words(&[q.index, u32::from(q.size)]), &[])
            && self.tell(SET_VRING_BASE, &words(&[q.index, u32::from(base)]), &[])
            && self.tell(SET_VRING_ADDR, &Front::address(q), &[])
            && self.tell(SET_VRING_ERR, &longs(&[u64::from(q.index)]), &[err])
            && self.tell(SET_VRING_CALL, &longs(&[u64::from(q.index)]), &[call])
            && self.tell(SET_VRING_KICK, &longs(&[u64::from(q.index)]), &[kick]);
        all && (self.features & PROTOCOL == 0 || self.tell(SET_VRING_ENABLE, &words(&[q.index, 1]), &[]))
    }
}

/// The driver of one queue.
pub struct Driver {
    pub q: Queue,
    next_avail: u16,
    pub last_used: u16,
}

impl Driver {
    pub fn new(q: Queue) -> Driver {
        Driver { q, next_avail: 0, last_used: 0 }
    }

    pub fn put_descriptor(&self, m: &Shared, i: u16, d: [u8; 16]) {
        m.write(self.q.desc() + 16 * usize::from(i), &d);
    }

    /// Makes a chain available; to be kicked for by the caller where [`Driver::wants_kick`].
    pub fn offer(&mut self, m: &Shared, head: u16) {
        let slot = usize::from(self.next_avail % self.q.size);
        m.word(self.q.avail() + 4 + 2 * slot).store(head, Ordering::Relaxed);
        self.next_avail = self.next_avail.wrapping_add(1);
        m.word(self.q.avail() + 2).store(self.next_avail, Ordering::Release);
    }

    pub fn wants_kick(&self, m: &Shared, event_idx: bool, before: u16) -> bool {
        fence(Ordering::SeqCst);
        if event_idx {
            let event = m.word(self.q.used() + 4 + 8 * usize::from(self.q.size)).load(Ordering::Relaxed);
            self.next_avail.wrapping_sub(event).wrapping_sub(1) < self.next_avail.wrapping_sub(before)
        } else {
            m.word(self.q.used()).load(Ordering::Relaxed) & 1 == 0
        }
    }

    pub fn available(&self) -> u16 {
        self.next_avail
    }

    /// The next chain that came back: head and bytes.
    pub fn take(&mut self, m: &Shared) -> Option<(u16, u32)> {
        if m.word(self.q.used() + 2).load(Ordering::Acquire) == self.last_used {
            return None;
        }
        let e = m.read(self.q.used() + 4 + 8 * usize::from(self.last_used % self.q.size), 8);
        self.last_used = self.last_used.wrapping_add(1);
        let long = |at: usize| u32::from_le_bytes(e[at..at + 4].try_into().unwrap());
        Some((long(0) as u16, long(4)))
    }

    /// Asks to be called for the next one.
    pub fn want_call(&self, m: &Shared) {
        m.word(self.q.avail() + 4 + 2 * usize::from(self.q.size)).store(self.last_used, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }
}

/// How the driver of a link is to be.
#[derive(Clone, Copy)]
pub struct Shape {
    pub features: u64,
    /// Entries of each queue.
    pub size: u16,
    /// Bytes of a receive buffer.
    pub buffer: usize,
}

impl Shape {
    pub fn new(features: u64) -> Shape {
        let buffer = if features & MRG != 0 || features & TSO != TSO { 1600 } else { 65_600 };
        Shape { features, size: 256, buffer }
    }
}

/// A virtio-net driver with one pair of queues.
pub struct VhostLink {
    pub front: Front,
    pub rx: Driver,
    pub tx: Driver,
    pub shape: Shape,
    /// Frames cut from a large one.
    cut: std::collections::VecDeque<Vec<u8>>,
    /// Large frames that came.
    pub large: usize,
    /// Where frames to be sent go, a slot each.
    pub next_tx: u16,
}

const RX_BUFFERS: usize = 1 << 20;
const TX_BUFFERS: usize = 20 << 20;
const TX_SLOTS: u16 = 8;
const TX_SLOT: usize = 128 << 10;

impl VhostLink {
    pub fn new(stream: UnixStream, shape: Shape) -> VhostLink {
        let mut front = Front::new(stream);
        front.begin(shape.features);
        VhostLink::on(front, shape)
    }

    /// Takes up the queues on a front-end that has begun.
    pub fn on(mut front: Front, shape: Shape) -> VhostLink {
        let rx = Queue { index: 0, at: 0, size: shape.size };
        let tx = Queue { index: 1, at: 0x8_0000, size: shape.size };
        assert!(front.start(&rx, 0) && front.start(&tx, 0));
        let mut link = VhostLink {
            front,
            rx: Driver::new(rx),
            tx: Driver::new(tx),
            shape,
            cut: Default::default(),
            large: 0,
            next_tx: 0,
        };
        for i in 0..shape.size {
            if RX_BUFFERS + (usize::from(i) + 1) * shape.buffer > TX_BUFFERS {
                break;
            }
            let d = descriptor(link.rx_buffer(i), shape.buffer as u32, F_WRITE, 0);
            link.rx.put_descriptor(&link.front.memory, i, d);
            link.rx.offer(&link.front.memory, i);
        }
        link.kick(0);
        link
    }

    fn rx_buffer(&self, i: u16) -> u64 {
        GUEST + (RX_BUFFERS + usize::from(i) * self.shape.buffer) as u64
    }

    pub fn kick(&self, queue: usize) {
        signal(&self.front.events[queue][0]);
    }

    fn has(&self, feature: u64) -> bool {
        self.shape.features & feature != 0
    }

    pub fn header_len(&self) -> usize {
        if self.has(V1 | MRG) { 12 } else { 10 }
    }

    /// Puts a frame with a virtio header in memory and in the queue, and kicks where that is wanted.
    pub fn send_with(&mut self, header: &[u8], frame: &[u8]) {
        let before = self.tx.available();
        self.queue(header, frame);
        if self.tx.wants_kick(&self.front.memory, self.has(EVENT_IDX), before) {
            self.kick(1);
        }
    }

    /// The same without a kick.
    pub fn queue(&mut self, header: &[u8], frame: &[u8]) {
        // Not before the slot was given back.
        let end = Instant::now() + super::PATIENCE;
        while self.tx.available().wrapping_sub(self.tx.last_used) >= TX_SLOTS.min(self.shape.size / 4) {
            if self.tx.take(&self.front.memory).is_none() {
                assert!(Instant::now() < end, "no frame is taken");
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        let slot = self.next_tx % TX_SLOTS.min(self.shape.size / 4);
        self.next_tx = self.next_tx.wrapping_add(1);
        let at = TX_BUFFERS + usize::from(slot) * TX_SLOT;
        let m = &self.front.memory;
        m.write(at, header);
        m.write(at + header.len(), frame);
        let addr = GUEST + at as u64;
        // The header apart, the frame in two.
        let half = frame.len() / 2;
        let (h, f) = (header.len() as u64, frame.len() as u32);
        let parts = [(addr, h as u32), (addr + h, half as u32), (addr + h + half as u64, f - half as u32)];
        let head = slot * 4;
        if self.has(INDIRECT) {
            let table = at + TX_SLOT - 64;
            for (i, (a, n)) in parts.into_iter().enumerate() {
                let flags = if i < 2 { F_NEXT } else { 0 };
                m.write(table + 16 * i, &descriptor(a, n, flags, i as u16 + 1));
            }
            self.tx.put_descriptor(m, head, descriptor(GUEST + table as u64, 48, F_INDIRECT, 0));
        } else {
            for (i, (a, n)) in parts.into_iter().enumerate() {
                let i = i as u16;
                let flags = if i < 2 { F_NEXT } else { 0 };
                self.tx.put_descriptor(m, head + i, descriptor(a, n, flags, head + i + 1));
            }
        }
        self.tx.offer(&self.front.memory, head);
    }

    /// Takes one frame that came, if one did, and gives its buffers again.
    fn take(&mut self) -> Option<Vec<u8>> {
        let m = std::sync::Arc::clone(&self.front.memory);
        let (head, len) = self.rx.take(&m)?;
        let mut frame = m.read((self.rx_buffer(head) - GUEST) as usize, len as usize);
        let before = self.rx.available();
        self.rx.offer(&m, head);
        let n = self.header_len();
        let header: Vec<u8> = frame.drain(..n).collect();
        let count = if n == 12 { u16::from_le_bytes([header[10], header[11]]) } else { 1 };
        assert!(count == 1 || count > 1 && self.has(MRG), "{count} buffers");
        for _ in 1..count {
            // All of a frame is shown at once.
            let (head, len) = self.rx.take(&m).expect("the rest of the frame");
            frame.extend(m.read((self.rx_buffer(head) - GUEST) as usize, len as usize));
            self.rx.offer(&m, head);
        }
        if self.rx.wants_kick(&m, self.has(EVENT_IDX), before) {
            self.kick(0);
        }
        self.finish(&header, frame);
        self.cut.pop_front()
    }

    /// Does what the header leaves to be done.
    fn finish(&mut self, header: &[u8], mut frame: Vec<u8>) {
        let le = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        if header[0] & 1 != 0 {
            assert!(self.has(CSUM));
            gso::complete_checksum(&mut frame, le(6), le(8)).unwrap();
        }
        let gso = match header[1] {
            0 => return self.cut.push_back(frame),
            1 | 4 => Gso::Tcp(le(4)),
            other => panic!("segmentation of kind {other}"),
        };
        assert_eq!(self.shape.features & TSO, TSO);
        let p = parse::parse_ip(&frame, 14).unwrap();
        assert_eq!(usize::from(le(2)), p.payload, "length of the headers");
        // Before it is cut: whole and right.
        let sum = checksum::pseudo(p.src, p.dst, proto::TCP, (p.end - p.l4) as u32);
        assert_eq!(checksum::finish(checksum::sum(&frame[p.l4..p.end], sum)), 0);
        self.large += 1;
        let cut = &mut self.cut;
        gso::segment(&frame, gso, |h, piece| cut.push_back([h, piece].concat())).unwrap();
    }
}

impl Link for VhostLink {
    fn send(&mut self, frame: &[u8]) {
        let header = vec![0; self.header_len()];
        self.send_with(&header, frame);
    }

    #[allow(unsafe_code)]
    fn receive(&mut self, wait: Duration) -> Option<Vec<u8>> {
        let end = Instant::now() + wait;
        loop {
            if let Some(f) = self.cut.pop_front().or_else(|| self.take()) {
                return Some(f);
            }
            // Sleeps for the call alone: one that is left out is a test that fails.
            self.rx.want_call(&self.front.memory);
            if let Some(f) = self.take() {
                return Some(f);
            }
            let call = &self.front.events[0][1];
            let mut p = libc::pollfd { fd: call.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            let left = end.saturating_duration_since(Instant::now());
            // SAFETY: one live pollfd.
            let n = unsafe { libc::poll(&mut p, 1, left.as_millis() as i32 + 1) };
            if n == 0 {
                return None;
            }
            signals(call);
        }
    }
}

/// The frame as a TSO request: its checksum begun, and the virtio header.
pub fn as_tso(frame: &mut [u8], size: u16) -> Vec<u8> {
    let p = parse::parse_ip(frame, 14).unwrap();
    let sum = checksum::fold(checksum::pseudo(p.src, p.dst, proto::TCP, (p.end - p.l4) as u32));
    frame[p.l4 + 16..p.l4 + 18].copy_from_slice(&sum.to_be_bytes());
    let mut h = vec![1, 1];
    for v in [p.payload as u16, size, p.l4 as u16, 16, 0] {
        h.extend_from_slice(&v.to_le_bytes());
    }
    assert_eq!(be16(frame, 12), 0x0800);
    h
}
