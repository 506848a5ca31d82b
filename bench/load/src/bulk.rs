//! Theory of operation: a stream of bytes one way. The receiver counts and takes the time, and leaves out the
//! first part of it (slow start and the opening of windows), so that a short run tells what a long one would.

use crate::{Numbers, PATIENCE, connect, late, waits, within};
use std::io::{self, BufRead, BufReader, Read, Write};
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

/// Counts what comes between the warm part of `span` and its end. A slow stream is one of few bytes, not a
/// failure: when nothing has come by the end, the first bytes are waited for up to `PATIENCE`.
pub(crate) fn receive(stream: &mut TcpStream, span: Duration) -> io::Result<Received> {
    let mut piece = vec![0_u8; PIECE];
    stream.set_read_timeout(Some(GLANCE))?;
    let (start, warm) = (Instant::now(), span * WARM / 100);
    let (mut bytes, mut all) = (0, 0);
    let (mut end, mut first_at) = (span, Duration::ZERO);
    loop {
        match stream.read(&mut piece) {
            Ok(0) => {
                // The sender's clock began a little before ours.
                end = start.elapsed().min(span);
                break;
            }
            Ok(n) => {
                if all == 0 {
                    first_at = start.elapsed();
                }
                all += n as u64;
                if start.elapsed() >= warm {
                    bytes += n as u64;
                }
            }
            Err(error) if waits(&error) => {}
            Err(error) => return Err(error),
        }
        let age = start.elapsed();
        if age >= span && all > 0 {
            end = end.max(first_at);
            break;
        }
        if age >= span.max(PATIENCE) {
            return Err(late("byte of the stream", age));
        }
    }
    if all == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the stream ended before its first byte"));
    }
    Ok((bytes, end.max(span / 2).saturating_sub(warm).as_nanos() as u64))
}

fn one(up: bool, span: Duration, to: SocketAddr, start: &Barrier) -> io::Result<Received> {
    let opened = connect(to);
    start.wait();
    let mut stream = opened?;
    let way = if up { "up" } else { "down" };
    stream.write_all(format!("{way} {}\n", span.as_millis()).as_bytes())?;
    if !up {
        return receive(&mut stream, span);
    }
    send(&mut stream, span)?;
    // The line, not the end of the stream: pasta sometimes keeps the server's FIN to itself.
    let mut answer = String::new();
    within("result of the upload", BufReader::new(stream).read_line(&mut answer))?;
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
    let (mut total, mut failed, mut failure) = (0, 0, None);
    for thread in threads {
        match thread.join() {
            Ok(Ok((bytes, took))) => {
                total += bytes;
                rates.push(bytes as f64 * 8.0 / took as f64);
            }
            Ok(Err(error)) => (failed, failure) = (failed + 1, Some(error)),
            Err(_) => (failed, failure) = (failed + 1, Some(io::Error::other("a thread ended"))),
        }
    }
    if let Some(error) = failure {
        let which = if streams > 1 { format!("{failed} of {streams} streams: ") } else { String::new() };
        return Err(io::Error::new(error.kind(), format!("{which}{error}")));
    }
    let least = rates.iter().copied().fold(f64::INFINITY, f64::min);
    let most = rates.iter().copied().fold(0.0, f64::max);
    let gigabytes = total as f64 / 1e9 / f64::from(100 - WARM) * 100.0;
    Ok(vec![("gbits", rates.iter().sum()), ("least", least), ("most", most), ("gigabytes", gigabytes)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::sync::mpsc;

    const SPAN: Duration = Duration::from_millis(50);

    /// The address of a server that handles one connection by `serve`.
    fn server(serve: impl FnOnce(BufReader<TcpStream>) + Send + 'static) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        thread::spawn(move || {
            let mut stream = BufReader::new(listener.accept().unwrap().0);
            stream.read_line(&mut String::new()).unwrap();
            serve(stream);
        });
        to
    }

    #[test]
    fn the_result_of_an_upload_needs_no_end_of_the_stream() {
        let (end, ended) = mpsc::channel::<()>();
        let to = server(move |mut stream| {
            io::copy(&mut stream, &mut io::sink()).unwrap();
            stream.get_mut().write_all(b"1000 1000\n").unwrap();
            let _ = ended.recv(); // the connection stays open
        });
        let numbers = client(true, 1, SPAN, to).unwrap();
        assert_eq!(numbers[0], ("gbits", 8.0));
        drop(end);
    }

    #[test]
    fn a_download_whose_first_byte_is_late_is_slow() {
        let to = server(|mut stream| {
            thread::sleep(4 * SPAN);
            stream.get_mut().write_all(&[0; 1000]).unwrap();
        });
        let numbers = client(false, 1, SPAN, to).unwrap();
        assert!(numbers[0].1 > 0.0);
        assert!(numbers[0].1 <= 8000.0 / (3 * SPAN).as_nanos() as f64, "{numbers:?}");
    }

    #[test]
    fn a_stream_without_a_byte_is_named_with_its_reason() {
        let to = server(drop);
        let error = client(false, 1, SPAN, to).unwrap_err();
        assert_eq!(error.to_string(), "the stream ended before its first byte");
    }
}
