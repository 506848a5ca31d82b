//! Theory of operation: frames as pcapng (draft-ietf-opsawg-pcapng), one interface per port. The worker puts
//! blocks in a chunk of memory; a thread of its own writes chunks to the file, which may be slow or a pipe
//! that nobody reads. When it is behind, whole chunks are left out and counted; the descriptions of
//! interfaces in them are kept, so that the file stays readable.
//!
//! An interface has the name of its port's endpoint. A guest that comes to a listener gets its name from its
//! first frame, so frames of a port without a name are held until it has one: at most [`HELD_PORT`] bytes of
//! a port, [`HELD`] in all, and [`HELD_NS`]. After that the port goes by its number.

use crate::control::port_names::PortNames;
use guestnet_core::types::{PortId, Time};
use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

/// A chunk goes to the writer when it has this many bytes.
const CHUNK: usize = 256 << 10;
/// Chunks that may wait for the writer.
const CHUNKS: usize = 16;
/// Bytes kept of a frame where nothing else is asked for: more than any frame has.
const SNAPLEN: u32 = 262_144;

/// Bytes held of a port without a name, and of all of them.
const HELD_PORT: usize = 64 << 10;
const HELD: usize = 1 << 20;
/// Nanoseconds for which they are held.
const HELD_NS: u64 = 1_000_000_000;

const LINKTYPE_ETHERNET: u16 = 1;
/// The option with a comment, and the bytes that it has at most.
const COMMENT: u16 = 1;
const COMMENT_MAX: usize = 512;

/// Which way a frame went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the guest: "inbound" in pcapng.
    FromGuest,
    /// To the guest: "outbound".
    ToGuest,
}

/// A running capture.
pub(crate) struct Capture {
    to: SyncSender<Vec<u8>>,
    /// Written chunks come back, to be filled again.
    spent: Receiver<Vec<u8>>,
    thread: Option<JoinHandle<bool>>,
    chunk: Vec<u8>,
    frames: u64,
    interfaces: HashMap<PortId, u32>,
    names: PortNames,
    /// Frames of ports without a name.
    held: HashMap<PortId, Held>,
    held_bytes: usize,
    /// Blocks of interfaces that are in the chunk at hand.
    described: Vec<u8>,
    snaplen: u32,
    /// Where the last packet begins, and of which port it is, while it is the last block of the chunk at hand.
    last: Option<(usize, PortId)>,
    /// Wall clock minus monotonic clock, nanoseconds.
    epoch: u64,
    /// Frames left out.
    pub dropped: u64,
}

/// Frames of one port that wait for its name: blocks with the interface left out.
struct Held {
    since: Time,
    blocks: Vec<u8>,
    frames: u64,
}

impl Capture {
    /// Starts the writer on `fd`. `snaplen` 0 keeps frames whole.
    pub(crate) fn start(fd: OwnedFd, snaplen: u32, now: Time, names: PortNames) -> std::io::Result<Capture> {
        let (to, from) = sync_channel::<Vec<u8>>(CHUNKS);
        let (back, spent) = sync_channel::<Vec<u8>>(CHUNKS);
        let mut file = File::from(fd);
        let thread = std::thread::Builder::new().name("guestnet-pcapng".into()).spawn(move || {
            while let Ok(mut chunk) = from.recv() {
                // A full disk or a reader that is gone ends the capture; the sender sees it.
                if file.write_all(&chunk).is_err() {
                    return false;
                }
                chunk.clear();
                let _full = back.try_send(chunk);
            }
            true
        })?;
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
        let mut c = Capture {
            to,
            spent,
            thread: Some(thread),
            chunk: Vec::with_capacity(CHUNK),
            frames: 0,
            interfaces: HashMap::new(),
            names,
            held: HashMap::new(),
            held_bytes: 0,
            described: Vec::new(),
            snaplen: if snaplen == 0 { SNAPLEN } else { snaplen },
            last: None,
            epoch: wall.saturating_sub(now.0),
            dropped: 0,
        };
        section(&mut c.chunk);
        // Like interfaces, the head of the file may not be left out.
        c.described.clone_from(&c.chunk);
        Ok(c)
    }

    /// Adds a frame that consists of `parts`.
    pub(crate) fn frame(&mut self, now: Time, port: PortId, way: Direction, parts: &[&[u8]]) {
        let time = self.epoch.wrapping_add(now.0);
        let id = self.interfaces.get(&port).copied().or_else(|| {
            let name = self.names.get(port)?;
            Some(self.describe(port, &name))
        });
        let Some(id) = id else {
            let held =
                self.held.entry(port).or_insert_with(|| Held { since: now, blocks: Vec::new(), frames: 0 });
            let before = held.blocks.len();
            packet(&mut held.blocks, 0, time, way, parts, self.snaplen);
            held.frames += 1;
            let full = held.blocks.len() > HELD_PORT;
            self.held_bytes += held.blocks.len() - before;
            if full || self.held_bytes > HELD {
                self.describe(port, &format!("port{}", port.0));
            }
            return;
        };
        self.last = Some((self.chunk.len(), port));
        packet(&mut self.chunk, id, time, way, parts, self.snaplen);
        self.frames += 1;
        if self.chunk.len() >= CHUNK {
            self.send_chunk();
        }
    }

    /// Comments the frame that was added last, if it is of this port. What has gone to the writer meanwhile, and what is
    /// held, gets no comment.
    pub(crate) fn comment(&mut self, port: PortId, text: &str) {
        let Some((at, _)) = self.last.take().filter(|(_, of)| *of == port) else { return };
        // The end of the options and the length come again behind the comment.
        self.chunk.truncate(self.chunk.len().saturating_sub(8));
        let mut end = text.len().min(COMMENT_MAX);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        option(&mut self.chunk, COMMENT, text.as_bytes().get(..end).unwrap_or(&[]));
        option(&mut self.chunk, 0, &[]);
        end_block(&mut self.chunk, at);
    }

    /// Describes a port as an interface, and adds what was held of it.
    fn describe(&mut self, port: PortId, name: &str) -> u32 {
        let id = self.interfaces.len() as u32;
        self.last = None;
        self.interfaces.insert(port, id);
        let at = self.chunk.len();
        interface(&mut self.chunk, name, self.snaplen);
        self.described.extend_from_slice(self.chunk.get(at..).unwrap_or(&[]));
        if let Some(mut held) = self.held.remove(&port) {
            self.held_bytes -= held.blocks.len();
            set_interface(&mut held.blocks, id);
            self.chunk.extend_from_slice(&held.blocks);
            self.frames += held.frames;
        }
        id
    }

    /// Adds frames that were held, where their port has a name by now or they have waited long enough.
    fn release(&mut self, now: Option<Time>) {
        let over = |h: &Held| now.is_none_or(|now| now.0.saturating_sub(h.since.0) >= HELD_NS);
        let ports: Vec<(PortId, bool)> = self.held.iter().map(|(p, h)| (*p, over(h))).collect();
        for (port, over) in ports {
            match self.names.get(port) {
                Some(name) => drop(self.describe(port, &name)),
                None if over => drop(self.describe(port, &format!("port{}", port.0))),
                None => {}
            }
        }
    }

    /// True when something waits for [`Capture::flush`].
    pub(crate) fn is_dirty(&self) -> bool {
        !self.chunk.is_empty() || !self.held.is_empty()
    }

    /// Hands what there is to the writer. False: the writer is gone.
    pub(crate) fn flush(&mut self, now: Time) -> bool {
        self.release(Some(now));
        self.send_chunk()
    }

    fn send_chunk(&mut self) -> bool {
        self.last = None;
        if self.chunk.is_empty() {
            return true;
        }
        let next = self.spent.try_recv().unwrap_or_default();
        match self.to.try_send(std::mem::replace(&mut self.chunk, next)) {
            Ok(()) => self.described.clear(),
            Err(TrySendError::Full(mut chunk)) => {
                self.dropped += self.frames;
                chunk.clear();
                chunk.extend_from_slice(&self.described);
                self.chunk = chunk;
            }
            Err(TrySendError::Disconnected(_)) => {
                self.dropped += self.frames;
                self.frames = 0;
                return false;
            }
        }
        self.frames = 0;
        true
    }

    /// Ends the capture; the rest is written without the worker waiting for it.
    pub(crate) fn finish(mut self) -> Closing {
        self.release(None);
        Closing { to: Some(self.to), last: Some(self.chunk), thread: self.thread }
    }
}

/// A capture as a worker has it.
pub(crate) enum Capturing {
    /// Its own.
    Own(Box<Capture>),
    /// All workers', and whether this one tells of what was left out.
    Shared(SharedCapture, bool),
}

/// A capture of several workers, which write to it in turn.
#[derive(Clone)]
pub struct SharedCapture(Arc<Mutex<Capture>>);

impl std::fmt::Debug for SharedCapture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SharedCapture")
    }
}

impl SharedCapture {
    pub(crate) fn new(capture: Capture) -> SharedCapture {
        SharedCapture(Arc::new(Mutex::new(capture)))
    }

    fn lock(&self) -> MutexGuard<'_, Capture> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Capturing {
    pub(crate) fn frame(&mut self, now: Time, port: PortId, way: Direction, parts: &[&[u8]]) {
        match self {
            Capturing::Own(c) => c.frame(now, port, way, parts),
            Capturing::Shared(s, _) => s.lock().frame(now, port, way, parts),
        }
    }

    pub(crate) fn comment(&mut self, port: PortId, text: &str) {
        match self {
            Capturing::Own(c) => c.comment(port, text),
            Capturing::Shared(s, _) => s.lock().comment(port, text),
        }
    }

    pub(crate) fn is_dirty(&self) -> bool {
        match self {
            Capturing::Own(c) => c.is_dirty(),
            Capturing::Shared(s, _) => s.lock().is_dirty(),
        }
    }

    pub(crate) fn flush(&mut self, now: Time) -> bool {
        match self {
            Capturing::Own(c) => c.flush(now),
            Capturing::Shared(s, _) => s.lock().flush(now),
        }
    }

    /// Frames left out, as far as this worker tells of them.
    pub(crate) fn dropped(&self) -> u64 {
        match self {
            Capturing::Own(c) => c.dropped,
            Capturing::Shared(s, true) => s.lock().dropped,
            Capturing::Shared(_, false) => 0,
        }
    }

    /// Ends it, and frames left out. `None`: other workers still have it.
    pub(crate) fn finish(self) -> Option<(Closing, u64)> {
        let c = match self {
            Capturing::Own(c) => *c,
            Capturing::Shared(s, _) => {
                Arc::into_inner(s.0)?.into_inner().unwrap_or_else(PoisonError::into_inner)
            }
        };
        let dropped = c.dropped;
        Some((c.finish(), dropped))
    }
}

/// A capture that has ended but is not all written.
pub(crate) struct Closing {
    to: Option<SyncSender<Vec<u8>>>,
    last: Option<Vec<u8>>,
    thread: Option<JoinHandle<bool>>,
}

impl Closing {
    /// Goes on, without waiting. True once everything is written, false once it cannot be.
    pub(crate) fn poll(&mut self) -> Option<bool> {
        if let (Some(to), Some(last)) = (&self.to, self.last.take()) {
            if let Err(TrySendError::Full(last)) = to.try_send(last) {
                self.last = Some(last);
                return None;
            }
            // The writer ends when it has written what it has.
            self.to = None;
        }
        if self.thread.as_ref().is_some_and(|t| !t.is_finished()) {
            return None;
        }
        Some(self.thread.take().is_none_or(|t| t.join().unwrap_or(false)))
    }
}

fn u32s(b: &mut Vec<u8>, values: &[u32]) {
    for v in values {
        b.extend_from_slice(&v.to_le_bytes());
    }
}

fn pad(b: &mut Vec<u8>) {
    b.resize(b.len().next_multiple_of(4), 0);
}

fn option(b: &mut Vec<u8>, code: u16, value: &[u8]) {
    b.extend_from_slice(&code.to_le_bytes());
    b.extend_from_slice(&(value.len() as u16).to_le_bytes());
    b.extend_from_slice(value);
    b.resize(b.len() + (4 - value.len() % 4) % 4, 0);
}

/// A block: type, length, body, length again. Blocks start at multiples of 4 of the chunk.
fn block(b: &mut Vec<u8>, kind: u32, body: impl FnOnce(&mut Vec<u8>)) {
    let at = b.len();
    u32s(b, &[kind, 0]);
    body(b);
    end_block(b, at);
}

/// Writes the length of the block at `at`, at both ends.
fn end_block(b: &mut Vec<u8>, at: usize) {
    let len = (b.len() - at + 4) as u32;
    u32s(b, &[len]);
    if let Some(field) = b.get_mut(at + 4..at + 8) {
        field.copy_from_slice(&len.to_le_bytes());
    }
}

fn section(b: &mut Vec<u8>) {
    block(b, 0x0a0d_0d0a, |b| {
        u32s(b, &[0x1a2b_3c4d, 1, u32::MAX, u32::MAX]);
        option(b, 4, concat!("guestnet ", env!("CARGO_PKG_VERSION")).as_bytes());
        option(b, 0, &[]);
    });
}

/// An enhanced packet block.
fn packet(b: &mut Vec<u8>, interface: u32, time: u64, way: Direction, parts: &[&[u8]], snaplen: u32) {
    let len: usize = parts.iter().map(|p| p.len()).sum();
    let keep = len.min(snaplen as usize);
    block(b, 6, |b| {
        u32s(b, &[interface, (time >> 32) as u32, time as u32, keep as u32, len as u32]);
        let mut left = keep;
        for p in parts {
            let n = p.len().min(left);
            b.extend_from_slice(p.get(..n).unwrap_or(&[]));
            left -= n;
        }
        pad(b);
        let flags: u32 = if way == Direction::FromGuest { 1 } else { 2 };
        option(b, 2, &flags.to_le_bytes());
        option(b, 0, &[]);
    });
}

/// Writes the interface into enhanced packet blocks.
fn set_interface(blocks: &mut [u8], id: u32) {
    let mut rest = blocks;
    while let Some(&len) = rest.get(4..8).and_then(|l| l.first_chunk::<4>()) {
        if let Some(field) = rest.get_mut(8..12) {
            field.copy_from_slice(&id.to_le_bytes());
        }
        rest = rest.get_mut(u32::from_le_bytes(len) as usize..).unwrap_or(&mut []);
    }
}

fn interface(b: &mut Vec<u8>, name: &str, snaplen: u32) {
    block(b, 1, |b| {
        b.extend_from_slice(&LINKTYPE_ETHERNET.to_le_bytes());
        b.extend_from_slice(&[0, 0]);
        u32s(b, &[snaplen]);
        option(b, 2, name.as_bytes());
        // Nanoseconds.
        option(b, 9, &[9]);
        option(b, 0, &[]);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    fn blocks(mut b: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let mut out = Vec::new();
        while !b.is_empty() {
            let w = |at: usize| u32::from_le_bytes(b[at..at + 4].try_into().unwrap());
            let len = w(4) as usize;
            assert!(len.is_multiple_of(4) && w(len - 4) as usize == len);
            out.push((w(0), b[8..len - 4].to_vec()));
            b = &b[len..];
        }
        out
    }

    fn named(names: &[(u32, &str)]) -> PortNames {
        let all = PortNames::default();
        names.iter().for_each(|(port, name)| all.set(PortId(*port), Some(name)));
        all
    }

    fn written(c: Capture, mut b: UnixStream) -> Vec<(u32, Vec<u8>)> {
        assert!(finish(c));
        let mut bytes = Vec::new();
        b.read_to_end(&mut bytes).unwrap();
        blocks(&bytes)
    }

    /// The name of each interface, and the interface of each frame with its first byte.
    fn seen(blocks: &[(u32, Vec<u8>)]) -> (Vec<String>, Vec<(u8, u8)>) {
        let text = |b: &[u8]| String::from_utf8(b[12..12 + usize::from(b[10])].to_vec()).unwrap();
        let names = blocks.iter().filter(|(k, _)| *k == 1).map(|(_, b)| text(b)).collect();
        let frames = blocks.iter().filter(|(k, _)| *k == 6).map(|(_, b)| (b[0], b[20])).collect();
        (names, frames)
    }

    #[test]
    fn frames_are_held_until_their_port_has_a_name() {
        let (a, b) = UnixStream::pair().unwrap();
        let names = named(&[(1, "early")]);
        let mut c = Capture::start(a.into(), 0, Time(0), names.clone()).unwrap();
        let mut frame = |at: u64, port: u32, byte: u8| {
            c.frame(Time(at), PortId(port), Direction::FromGuest, &[&[byte; 3]]);
        };
        frame(1, 7, b'a');
        frame(2, 1, b'b');
        frame(3, 7, b'c');
        names.set(PortId(7), Some("vm7"));
        frame(4, 7, b'd');
        frame(5, 8, b'e');
        frame(6, 9, b'f');
        assert!(c.is_dirty());
        names.set(PortId(9), Some("vm9"));
        c.flush(Time(7));
        assert!(c.is_dirty(), "port 8 has no name yet");
        c.flush(Time(5 + HELD_NS));
        assert!(!c.is_dirty());
        c.frame(Time(8), PortId(10), Direction::ToGuest, &[b"g"]);
        let (names, frames) = seen(&written(c, b));
        assert_eq!(names, ["early", "vm7", "vm9", "port8", "port10"]);
        let all = [(0, b'b'), (1, b'a'), (1, b'c'), (1, b'd'), (2, b'f'), (3, b'e'), (4, b'g')];
        assert_eq!(frames, all);
    }

    #[test]
    fn what_is_held_is_bounded_by_port_and_in_all() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut c = Capture::start(a.into(), 0, Time(0), PortNames::default()).unwrap();
        let reader = std::thread::spawn(move || {
            let (mut b, mut bytes) = (b, Vec::new());
            b.read_to_end(&mut bytes).unwrap();
            bytes
        });
        for i in 0..4000u32 {
            c.frame(Time(0), PortId(i % 40), Direction::FromGuest, &[&[1; 1500]]);
            assert!(c.held_bytes <= HELD);
            assert!(c.held.values().all(|h| h.blocks.len() <= HELD_PORT));
            assert_eq!(c.held_bytes, c.held.values().map(|h| h.blocks.len()).sum::<usize>());
        }
        assert!(c.held.is_empty());
        let dropped = c.dropped as usize;
        assert!(finish(c));
        let (names, frames) = seen(&blocks(&reader.join().unwrap()));
        assert_eq!((names.len(), frames.len() + dropped), (40, 4000));
    }

    fn finish(c: Capture) -> bool {
        let mut closing = c.finish();
        loop {
            if let Some(written) = closing.poll() {
                return written;
            }
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_full_disk_is_noticed_at_the_end_at_the_latest() {
        let full = || File::options().write(true).open("/dev/full").unwrap();
        assert!(!finish(Capture::start(full().into(), 0, Time(0), PortNames::default()).unwrap()));
        let mut c = Capture::start(full().into(), 0, Time(0), PortNames::default()).unwrap();
        c.frame(Time(0), PortId(1), Direction::ToGuest, &[b"abc"]);
        while c.flush(Time(0)) {
            c.frame(Time(0), PortId(1), Direction::ToGuest, &[b"abc"]);
            std::thread::yield_now();
        }
        assert!(!finish(c));
    }

    #[test]
    fn writes_blocks_that_can_be_read() {
        let (a, mut b) = UnixStream::pair().unwrap();
        let mut c = Capture::start(a.into(), 5, Time(7), named(&[(3, "vm1"), (4, "vm2")])).unwrap();
        c.frame(Time(8), PortId(3), Direction::FromGuest, &[b"abc", b"defg"]);
        c.frame(Time(9), PortId(4), Direction::ToGuest, &[b"x"]);
        c.frame(Time(9), PortId(3), Direction::ToGuest, &[b"yz"]);
        assert!(finish(c));
        let mut bytes = Vec::new();
        b.read_to_end(&mut bytes).unwrap();
        let got = blocks(&bytes);
        let kinds: Vec<u32> = got.iter().map(|(k, _)| *k).collect();
        assert_eq!(kinds, [0x0a0d_0d0a, 1, 6, 1, 6, 6]);
        assert_eq!(&got[2].1[12..25], [5, 0, 0, 0, 7, 0, 0, 0, b'a', b'b', b'c', b'd', b'e']);
        assert_eq!((got[4].1[0], got[5].1[0]), (1, 0));
    }

    #[test]
    fn the_last_frame_gets_a_comment_if_it_is_of_the_port() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut c = Capture::start(a.into(), 0, Time(7), named(&[(3, "vm1"), (4, "vm2")])).unwrap();
        c.comment(PortId(3), "nothing was captured");
        c.frame(Time(8), PortId(3), Direction::FromGuest, &[b"abc"]);
        c.comment(PortId(3), "guestnet: rule: policy");
        c.comment(PortId(3), "it has one");
        c.frame(Time(9), PortId(4), Direction::FromGuest, &[b"defgh"]);
        c.comment(PortId(3), "another port");
        c.frame(Time(9), PortId(3), Direction::FromGuest, &[b"x"]);
        assert!(c.flush(Time(10)));
        c.comment(PortId(3), "it has gone");
        let got = written(c, b);
        let packets: Vec<&Vec<u8>> = got.iter().filter(|(k, _)| *k == 6).map(|(_, b)| b).collect();
        let comment = b"\x01\0\x16\0guestnet: rule: policy\0\0\0\0\0\0";
        assert!(packets[0].ends_with(comment), "{:?}", packets[0]);
        assert_eq!(packets.len(), 3);
        assert!(packets[1..].iter().all(|p| !p.windows(8).any(|w| w == b"guestnet" || w == b"it has g")));
    }

    #[test]
    fn a_reader_that_does_not_read_costs_frames_and_no_time() {
        let (a, mut b) = UnixStream::pair().unwrap();
        let mut c = Capture::start(a.into(), 0, Time(0), PortNames::default()).unwrap();
        for i in 0..400u32 {
            c.frame(Time(0), PortId(i % 50), Direction::ToGuest, &[&[7; 60_000]]);
        }
        assert!(c.dropped > 0);
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            b.read_to_end(&mut bytes).unwrap();
            bytes
        });
        while c.is_dirty() {
            c.flush(Time(2 * HELD_NS));
            std::thread::yield_now();
        }
        let dropped = c.dropped as usize;
        assert!(finish(c));
        let got = blocks(&reader.join().unwrap());
        // Every interface is described before it is used, and nothing else is missing.
        let mut known = 0;
        for (kind, body) in &got[1..] {
            match kind {
                1 => known += 1,
                6 => assert!(u32::from_le_bytes(body[..4].try_into().unwrap()) < known),
                k => panic!("block {k}"),
            }
        }
        assert_eq!(known, 50);
        assert_eq!(got.iter().filter(|(k, _)| *k == 6).count() + dropped, 400);
    }
}
