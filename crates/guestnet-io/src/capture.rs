//! Theory of operation: frames as pcapng (draft-ietf-opsawg-pcapng), one interface per port. The worker puts
//! blocks in a chunk of memory; a thread of its own writes chunks to the file, which may be slow or a pipe
//! that nobody reads. When it is behind, whole chunks are left out and counted; the descriptions of
//! interfaces in them are kept, so that the file stays readable.

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

const LINKTYPE_ETHERNET: u16 = 1;

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
    /// Blocks of interfaces that are in the chunk at hand.
    described: Vec<u8>,
    snaplen: u32,
    /// Wall clock minus monotonic clock, nanoseconds.
    epoch: u64,
    /// Frames left out.
    pub dropped: u64,
}

impl Capture {
    /// Starts the writer on `fd`. `snaplen` 0 keeps frames whole.
    pub(crate) fn start(fd: OwnedFd, snaplen: u32, now: Time) -> std::io::Result<Capture> {
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
            described: Vec::new(),
            snaplen: if snaplen == 0 { SNAPLEN } else { snaplen },
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
        let id = match self.interfaces.get(&port) {
            Some(id) => *id,
            None => {
                let id = self.interfaces.len() as u32;
                self.interfaces.insert(port, id);
                let at = self.chunk.len();
                interface(&mut self.chunk, port, self.snaplen);
                self.described.extend_from_slice(self.chunk.get(at..).unwrap_or(&[]));
                id
            }
        };
        let len: usize = parts.iter().map(|p| p.len()).sum();
        let keep = len.min(self.snaplen as usize);
        let time = self.epoch.wrapping_add(now.0);
        block(&mut self.chunk, 6, |b| {
            u32s(b, &[id, (time >> 32) as u32, time as u32, keep as u32, len as u32]);
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
        self.frames += 1;
        if self.chunk.len() >= CHUNK {
            self.flush();
        }
    }

    /// True when something waits for [`Capture::flush`].
    pub(crate) fn is_dirty(&self) -> bool {
        !self.chunk.is_empty()
    }

    /// Hands the chunk to the writer. False: the writer is gone.
    pub(crate) fn flush(&mut self) -> bool {
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
    pub(crate) fn finish(self) -> Closing {
        Closing { to: Some(self.to), last: Some(self.chunk), thread: self.thread }
    }
}

/// A capture as a worker has it.
pub(crate) enum Capturing {
    /// Its own.
    Own(Capture),
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

    pub(crate) fn is_dirty(&self) -> bool {
        match self {
            Capturing::Own(c) => c.is_dirty(),
            Capturing::Shared(s, _) => s.lock().is_dirty(),
        }
    }

    pub(crate) fn flush(&mut self) -> bool {
        match self {
            Capturing::Own(c) => c.flush(),
            Capturing::Shared(s, _) => s.lock().flush(),
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
            Capturing::Own(c) => c,
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

fn interface(b: &mut Vec<u8>, port: PortId, snaplen: u32) {
    block(b, 1, |b| {
        b.extend_from_slice(&LINKTYPE_ETHERNET.to_le_bytes());
        b.extend_from_slice(&[0, 0]);
        u32s(b, &[snaplen]);
        option(b, 2, format!("port{}", port.0).as_bytes());
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
        assert!(!finish(Capture::start(full().into(), 0, Time(0)).unwrap()));
        let mut c = Capture::start(full().into(), 0, Time(0)).unwrap();
        c.frame(Time(0), PortId(1), Direction::ToGuest, &[b"abc"]);
        while c.flush() {
            c.frame(Time(0), PortId(1), Direction::ToGuest, &[b"abc"]);
            std::thread::yield_now();
        }
        assert!(!finish(c));
    }

    #[test]
    fn writes_blocks_that_can_be_read() {
        let (a, mut b) = UnixStream::pair().unwrap();
        let mut c = Capture::start(a.into(), 5, Time(7)).unwrap();
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
    fn a_reader_that_does_not_read_costs_frames_and_no_time() {
        let (a, mut b) = UnixStream::pair().unwrap();
        let mut c = Capture::start(a.into(), 0, Time(0)).unwrap();
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
            c.flush();
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
