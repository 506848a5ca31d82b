//! Theory of operation: a stream of bytes one way. The receiver counts and takes the time, and leaves out the
//! first part of it (slow start and the opening of windows), so that a short run tells what a long one would.

use crate::{Numbers, PATIENCE};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

const PIECE: usize = 128 * 1024;
/// The part of a run that is not counted, in hundredths.
const WARM: u32 = 25;

/// Bytes and nanoseconds.
pub(crate) type Received = (u64, u64);

/// How long a read or a write may stand still before the time is looked at.
const GLANCE: Duration = Duration::from_millis(100);

fn waits(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

/// Sends for `span`, then says that it is done.
pub(crate) fn send(stream: &mut TcpStream, span: Duration) -> io::Result<()> {
    let piece = vec![0x5a_u8; PIECE];
    stream.set_write_timeout(Some(GLANCE))?;
    let start = Instant::now();
    while start.elapsed() < span {
        match stream.write(&piece) {
            Err(error) if !waits(&error) => return Err(error),
            _ => {}
        }
    }
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.shutdown(std::net::Shutdown::Write)
}

/// Counts what comes between the warm part of `span` and its end. A stream that stands still is one of few
/// bytes, not a failure.
pub(crate) fn receive(stream: &mut TcpStream, span: Duration) -> io::Result<Received> {
    let mut piece = vec![0_u8; PIECE];
    stream.set_read_timeout(Some(GLANCE))?;
    let (start, warm) = (Instant::now(), span * WARM / 100);
    let (mut bytes, mut all) = (0, 0);
    let mut end = span;
    loop {
        match stream.read(&mut piece) {
            Ok(0) => {
                // The sender's clock began a little before ours.
                end = start.elapsed().min(span);
                break;
            }
            Ok(n) => {
                all += n as u64;
                if start.elapsed() >= warm {
                    bytes += n as u64;
                }
            }
            Err(error) if waits(&error) => {}
            Err(error) => return Err(error),
        }
        if start.elapsed() >= span {
            break;
        }
    }
    if all == 0 {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "no byte came"));
    }
    Ok((bytes, end.max(span / 2).saturating_sub(warm).as_nanos() as u64))
}

fn one(up: bool, span: Duration, to: SocketAddr, start: &Barrier) -> io::Result<Received> {
    let opened = TcpStream::connect_timeout(&to, PATIENCE);
    start.wait();
    let mut stream = opened?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let way = if up { "up" } else { "down" };
    stream.write_all(format!("{way} {}\n", span.as_millis()).as_bytes())?;
    if !up {
        return receive(&mut stream, span);
    }
    send(&mut stream, span)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let mut words = answer.split_whitespace().map_while(|w| w.parse::<u64>().ok());
    match (words.next(), words.next()) {
        (Some(bytes), Some(took)) if took > 0 => Ok((bytes, took)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the server saw no stream")),
    }
}

/// Gbit/s over all streams, and the slowest and fastest of them.
pub(crate) fn client(up: bool, streams: usize, span: Duration, to: SocketAddr) -> io::Result<Numbers> {
    let barrier = Arc::new(Barrier::new(streams));
    let threads: Vec<_> = (0..streams)
        .map(|_| {
            let barrier = Arc::clone(&barrier);
            thread::spawn(move || one(up, span, to, &barrier))
        })
        .collect();
    let mut rates = Vec::new();
    let (mut total, mut failure) = (0, None);
    for thread in threads {
        match thread.join() {
            Ok(Ok((bytes, took))) => {
                total += bytes;
                rates.push(bytes as f64 * 8.0 / took as f64);
            }
            Ok(Err(error)) => failure = Some(error),
            Err(_) => failure = Some(io::Error::other("a thread ended")),
        }
    }
    if let Some(error) = failure {
        return Err(error);
    }
    let least = rates.iter().copied().fold(f64::INFINITY, f64::min);
    let most = rates.iter().copied().fold(0.0, f64::max);
    let gigabytes = total as f64 / 1e9 / f64::from(100 - WARM) * 100.0;
    Ok(vec![("gbits", rates.iter().sum()), ("least", least), ("most", most), ("gigabytes", gigabytes)])
}
