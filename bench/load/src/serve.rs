//! Theory of operation: threads wait in accept, each serves a connection to its end, so a short connection costs
//! no thread to start. The first line says what a connection is for. UDP: datagrams of a counted run are
//! counted, those on the DNS port get an address, all others go back.

use crate::{Numbers, bad, bulk, datagrams, exchanges::PAGE};
use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

/// More than any workload has busy connections at once.
pub(crate) const THREADS: usize = 320;
/// Those of an agent, who has one caller at a time; a hundred of them are on one machine.
pub(crate) const AGENT_THREADS: usize = 48;
const STACK: usize = 256 * 1024;
const IDLE_PATIENCE: Duration = Duration::from_secs(30);
/// For the first line: a little longer than a client waits for an answer, so that a slow contender loses no
/// request, and not so long that connections of one that hangs hold the threads for all that follows.
const FIRST_PATIENCE: Duration = Duration::from_secs(10);

/// What connections and the datagram thread share.
pub(crate) struct Shared {
    /// The server's datagram socket.
    pub(crate) socket: UdpSocket,
    /// Datagrams received of each run that is counted.
    pub(crate) counts: Mutex<HashMap<u64, Arc<AtomicU64>>>,
    /// Where the first datagram of a run came from that is not counted.
    pub(crate) callers: Mutex<HashMap<u64, SocketAddr>>,
    idle: Mutex<Vec<TcpStream>>,
}

/// The lock, whatever became of a thread that had it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn connection(mut stream: TcpStream, shared: &Shared) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(FIRST_PATIENCE))?;
    let mut reader = BufReader::with_capacity(4096, stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    stream.set_read_timeout(Some(IDLE_PATIENCE))?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let number = |at: usize| words.get(at).and_then(|w| w.parse::<u64>().ok()).ok_or_else(|| bad(&line));
    match words.first().copied() {
        Some("GET") => pages(&mut reader, &mut stream),
        Some("echo") => {
            let mut data = [0_u8; 4096];
            loop {
                match reader.read(&mut data)? {
                    0 => return Ok(()),
                    n => stream.write_all(&data[..n])?,
                }
            }
        }
        Some("up") => {
            let span = Duration::from_millis(number(1)?);
            let (bytes, nanos) = bulk::receive(&mut stream, span)?;
            stream.write_all(format!("{bytes} {nanos}\n").as_bytes())?;
            stream.shutdown(std::net::Shutdown::Write)?;
            // What is still on its way is taken, or the answer would end in a reset.
            stream.set_read_timeout(Some(Duration::from_secs(2)))?;
            io::copy(&mut stream, &mut io::sink()).map(|_| ())
        }
        Some("down") => bulk::send(&mut stream, Duration::from_millis(number(1)?)),
        Some("idle") => {
            stream.write_all(b"k")?;
            lock(&shared.idle).push(stream);
            Ok(())
        }
        Some("forget") => {
            // Closed without the lock, which those that still come need.
            drop(std::mem::take(&mut *lock(&shared.idle)));
            stream.write_all(b"k")
        }
        Some("udpup") => datagrams::count(number(1)?, shared, &mut reader, &mut stream),
        Some("udpdown") => {
            let span = Duration::from_millis(number(4)?);
            datagrams::pour(number(1)?, number(2)? as usize, number(3)?, span, shared, &mut stream)
        }
        _ => Ok(()),
    }
}

/// Pages, the request line of the first being read.
fn pages(reader: &mut impl BufRead, stream: &mut TcpStream) -> io::Result<()> {
    let mut line = Vec::new();
    loop {
        let mut keep = true;
        loop {
            line.clear();
            if reader.read_until(b'\n', &mut line)? == 0 {
                return Ok(());
            }
            if line == b"\r\n" {
                break;
            }
            keep &= line != b"Connection: close\r\n";
        }
        stream.write_all(PAGE)?;
        if !keep {
            return Ok(());
        }
    }
}

fn echo_datagrams(shared: &Shared) -> io::Result<()> {
    let mut data = vec![0_u8; 65536];
    let mut last: Option<(u64, Arc<AtomicU64>)> = None;
    loop {
        let Ok((n, from)) = shared.socket.recv_from(&mut data) else { continue };
        let Some(run) = datagrams::run_of(&data[..n]) else {
            // Nothing can be done about an answer that finds no way.
            let _ = shared.socket.send_to(&data[..n], from);
            continue;
        };
        if let Some((known, counter)) = &last
            && *known == run
        {
            counter.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        if let Some(counter) = lock(&shared.counts).get(&run) {
            counter.fetch_add(1, Ordering::Relaxed);
            last = Some((run, Arc::clone(counter)));
        } else {
            let mut callers = lock(&shared.callers);
            if callers.len() > 4096 {
                callers.clear();
            }
            callers.insert(run, from);
        }
    }
}

/// An address for every name (RFC 1035 section 4.1).
fn answer_names(socket: &UdpSocket) -> io::Result<Numbers> {
    let mut data = [0_u8; 1500];
    loop {
        let Ok((n, from)) = socket.recv_from(&mut data) else { continue };
        // The question ends after the root label, type and class; what follows (EDNS) is not answered.
        let Some(end) =
            data[..n].get(12..).and_then(|q| q.iter().position(|b| *b == 0)).map(|at| 12 + at + 5)
        else {
            continue;
        };
        if end > n {
            continue;
        }
        let mut answer = data[..end].to_vec();
        answer[2] = 0x81;
        answer[3] = 0x80;
        answer[4..12].copy_from_slice(&[0, 1, 0, 1, 0, 0, 0, 0]);
        answer.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 7]);
        let _ = socket.send_to(&answer, from);
    }
}

/// Starts the server's threads on `port`; DNS where port 53 is free and allowed.
pub(crate) fn start(port: u16, threads: usize) -> io::Result<()> {
    let listener = Arc::new(TcpListener::bind(("0.0.0.0", port))?);
    let shared = Arc::new(Shared {
        socket: UdpSocket::bind(("0.0.0.0", port))?,
        counts: Mutex::default(),
        callers: Mutex::default(),
        idle: Mutex::default(),
    });
    for _ in 0..threads {
        let (listener, shared) = (Arc::clone(&listener), Arc::clone(&shared));
        thread::Builder::new().stack_size(STACK).spawn(move || {
            loop {
                match listener.accept() {
                    // A client that went away is counted by the client.
                    Ok((stream, _)) => drop(connection(stream, &shared)),
                    // No more descriptors: all threads would spin, and take the processor from what is measured.
                    Err(_) => thread::sleep(Duration::from_millis(10)),
                }
            }
        })?;
    }
    thread::spawn(move || echo_datagrams(&shared));
    if let Ok(names) = UdpSocket::bind(("0.0.0.0", 53)) {
        thread::spawn(move || answer_names(&names));
    }
    Ok(())
}
