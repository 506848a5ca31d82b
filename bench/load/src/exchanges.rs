//! Theory of operation: small questions and answers: one at a time for latency, many at a time for rates. All
//! run for a time and count, so that a slow contender takes no longer than a fast one.

use crate::{Numbers, PATIENCE, bulk};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// What a page of the server looks like; the same bytes in both kinds of answer.
pub(crate) const PAGE: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 20\r\n\r\n\
a page from outside\n";
const ASK: [&[u8]; 2] = [
    b"GET / HTTP/1.1\r\nHost: outside\r\nConnection: close\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: outside\r\nConnection: keep-alive\r\n\r\n",
];

fn open(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn percentile(sorted: &[u64], hundredths: usize) -> f64 {
    let at = (sorted.len() * hundredths / 100).min(sorted.len().saturating_sub(1));
    sorted.get(at).map_or(f64::NAN, |ns| *ns as f64 / 1000.0)
}

/// Microseconds for a byte there and back: median and 99th percentile. `busy`: a download runs beside it.
pub(crate) fn latency(tcp: bool, span: Duration, to: SocketAddr, busy: bool) -> io::Result<Numbers> {
    let load = busy.then(|| {
        let long = span + Duration::from_millis(300);
        thread::spawn(move || bulk::client(false, 1, long, to))
    });
    if busy {
        thread::sleep(Duration::from_millis(200));
    }
    let mut times = Vec::new();
    let start = Instant::now();
    let mut lost = 0_u32;
    if tcp {
        let mut stream = open(to)?;
        stream.write_all(b"echo\n")?;
        let mut byte = [0x78_u8];
        while start.elapsed() < span {
            let sent = Instant::now();
            stream.write_all(&byte)?;
            stream.read_exact(&mut byte)?;
            times.push(sent.elapsed().as_nanos() as u64);
        }
    } else {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(Duration::from_millis(200)))?;
        let mut answer = [0_u8; 16];
        let mut number = 0_u32;
        while start.elapsed() < span {
            number = number.wrapping_add(1);
            let question = number.to_be_bytes();
            let sent = Instant::now();
            socket.send(&question)?;
            loop {
                match socket.recv(&mut answer) {
                    // An answer to a question that was given up is no answer to this one.
                    Ok(4) if answer[..4] == question => {
                        times.push(sent.elapsed().as_nanos() as u64);
                        break;
                    }
                    Ok(_) => {}
                    Err(_) => {
                        lost += 1;
                        break;
                    }
                }
            }
        }
    }
    if let Some(load) = load {
        load.join().map_err(|_| io::Error::other("a thread ended"))??;
    }
    if times.is_empty() {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "no answer came"));
    }
    times.sort_unstable();
    Ok(vec![
        ("median", percentile(&times, 50)),
        ("p99", percentile(&times, 99)),
        ("count", times.len() as f64),
        ("lost", f64::from(lost)),
    ])
}

fn read_page(stream: &mut TcpStream, until_end: bool) -> io::Result<()> {
    let mut page = [0_u8; 256];
    let mut have = 0;
    while have < PAGE.len() || until_end {
        match stream.read(&mut page[have..])? {
            0 => break,
            n => have += n,
        }
    }
    if have == PAGE.len() { Ok(()) } else { Err(io::Error::new(io::ErrorKind::UnexpectedEof, "half a page")) }
}

/// Counts what `clients` threads do in `span`; the first failure ends all.
fn rate<F>(clients: usize, span: Duration, job: F) -> io::Result<Numbers>
where
    F: Fn(&dyn Fn() -> bool) -> io::Result<()> + Send + Sync + 'static,
{
    let done = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let job = Arc::new(job);
    let start = Instant::now();
    let threads: Vec<_> = (0..clients)
        .map(|_| {
            let (done, stop, job) = (Arc::clone(&done), Arc::clone(&stop), Arc::clone(&job));
            thread::spawn(move || {
                // Called before each question: was one answered, and is there time for another?
                let first = AtomicBool::new(true);
                let more = || {
                    let in_time = start.elapsed() < span && !stop.load(Ordering::Relaxed);
                    if !first.swap(false, Ordering::Relaxed) && start.elapsed() < span {
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                    in_time
                };
                let result = job(&more);
                if result.is_err() {
                    stop.store(true, Ordering::Relaxed);
                }
                result
            })
        })
        .collect();
    for thread in threads {
        thread.join().map_err(|_| io::Error::other("a thread ended"))??;
    }
    let count = done.load(Ordering::Relaxed) as f64;
    Ok(vec![("rate", count / span.as_secs_f64()), ("count", count)])
}

/// Requests a second, each on a connection of its own or all of a client on one.
pub(crate) fn http(keep: bool, clients: usize, span: Duration, to: SocketAddr) -> io::Result<Numbers> {
    rate(clients, span, move |more| {
        let mut kept = None;
        while more() {
            let mut stream = match kept.take() {
                Some(stream) => stream,
                None => open(to)?,
            };
            stream.write_all(ASK[usize::from(keep)])?;
            read_page(&mut stream, !keep)?;
            if keep {
                kept = Some(stream);
            }
        }
        Ok(())
    })
}

/// A query for the address of `n`NUMBER.example.test (RFC 1035 section 4.1).
fn query(number: u16) -> Vec<u8> {
    let mut data = number.to_be_bytes().to_vec();
    data.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in [format!("n{number}").as_str(), "example", "test"] {
        data.push(label.len() as u8);
        data.extend_from_slice(label.as_bytes());
    }
    data.extend_from_slice(&[0, 0, 1, 0, 1]);
    data
}

/// DNS queries a second that were answered; a client asks one at a time.
pub(crate) fn dns(clients: usize, span: Duration, to: SocketAddr) -> io::Result<Numbers> {
    let numbers = Arc::new(AtomicU64::new(0));
    rate(clients, span, move |more| {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        let mut answer = [0_u8; 512];
        let mut missed = 0;
        while more() {
            let question = query(numbers.fetch_add(1, Ordering::Relaxed) as u16);
            loop {
                socket.send(&question)?;
                match socket.recv(&mut answer) {
                    Ok(n) if n > 12 && answer[..2] == question[..2] && answer[7] > 0 => break,
                    Ok(_) => {
                        return Err(io::Error::new(io::ErrorKind::InvalidData, "no address in the answer"));
                    }
                    Err(_) if missed < 3 => missed += 1,
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    })
}

/// Opens connections that do nothing; they live as long as `held`.
pub(crate) fn idle(count: usize, to: SocketAddr, held: &mut Vec<TcpStream>) -> io::Result<Numbers> {
    const OPENERS: usize = 32;
    let start = Instant::now();
    let threads: Vec<_> = (0..OPENERS)
        .map(|i| {
            let share = count / OPENERS + usize::from(i < count % OPENERS);
            thread::spawn(move || {
                (0..share)
                    .map(|_| {
                        let mut stream = open(to)?;
                        stream.write_all(b"idle\n")?;
                        let mut byte = [0_u8];
                        stream.read_exact(&mut byte)?;
                        Ok(stream)
                    })
                    .collect::<io::Result<Vec<_>>>()
            })
        })
        .collect();
    for thread in threads {
        held.extend(thread.join().map_err(|_| io::Error::other("a thread ended"))??);
    }
    Ok(vec![("open", held.len() as f64), ("seconds", start.elapsed().as_secs_f64())])
}

/// The server closes the idle connections that it holds.
pub(crate) fn forget(to: SocketAddr) -> io::Result<Numbers> {
    let mut stream = open(to)?;
    stream.write_all(b"forget\n")?;
    stream.read_exact(&mut [0_u8])?;
    Ok(vec![("open", 0.0)])
}
