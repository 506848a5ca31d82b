//! Theory of operation: small questions and answers: one at a time for latency, many at a time for rates. All
//! run for a time and count, so that a slow contender takes no longer than a fast one. What a slow contender has
//! not answered by the end of the time is left, not a failure. A contender that answers nobody for `PATIENCE`
//! hangs, and that is a failure.

use crate::{Numbers, PATIENCE, bulk, connect, late, waits, within};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
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
    let stream = connect(to)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn percentile(sorted: &[u64], hundredths: usize) -> f64 {
    let at = (sorted.len() * hundredths / 100).min(sorted.len().saturating_sub(1));
    sorted.get(at).map_or(f64::NAN, |ns| *ns as f64 / 1000.0)
}

/// How long an answer to a datagram is waited for; a late one does not count.
const UDP_ANSWER: Duration = Duration::from_millis(200);

/// Microseconds for a byte there and back: median and 99th percentile. `busy`: a download runs beside it.
pub(crate) fn latency(tcp: bool, span: Duration, to: SocketAddr, busy: bool) -> io::Result<Numbers> {
    // Opened first, so that a slow connect takes nothing of the time.
    let mut stream = tcp.then(|| open(to)).transpose()?;
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
    if let Some(stream) = &mut stream {
        stream.write_all(b"echo\n")?;
        let mut byte = [0x78_u8];
        while start.elapsed() < span {
            let sent = Instant::now();
            stream.write_all(&byte)?;
            within("answer", stream.read_exact(&mut byte))?;
            times.push(sent.elapsed().as_nanos() as u64);
        }
    } else {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect(to)?;
        let mut answer = [0_u8; 16];
        let mut number = 0_u32;
        while start.elapsed() < span || (times.is_empty() && start.elapsed() < PATIENCE) {
            // The first answer of a slow contender may take longer.
            let patience = if start.elapsed() < span { UDP_ANSWER } else { 5 * UDP_ANSWER };
            socket.set_read_timeout(Some(patience))?;
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
        return Err(late("answer", start.elapsed()));
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

/// How long clients may take for what they are in the middle of when the time is over.
const GRACE: Duration = Duration::from_millis(300);

/// Counts what `clients` threads do in `span`. The first failure ends all. Clients that wait for an answer when
/// the others have ended are left to themselves and counted as `stalled`. When all wait, it is for `patience`
/// since the last answer.
fn rate<F>(clients: usize, span: Duration, patience: Duration, job: F) -> io::Result<Numbers>
where
    F: Fn(&dyn Fn() -> bool) -> io::Result<()> + Send + Sync + 'static,
{
    let done = Arc::new(AtomicU64::new(0));
    let done_late = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let job = Arc::new(job);
    let (sender, results) = mpsc::channel();
    let start = Instant::now();
    for _ in 0..clients {
        let (done, done_late) = (Arc::clone(&done), Arc::clone(&done_late));
        let (stop, job, sender) = (Arc::clone(&stop), Arc::clone(&job), sender.clone());
        thread::spawn(move || {
            // Called before each question: was one answered, and is there time for another?
            let first = AtomicBool::new(true);
            let more = || {
                let in_time = start.elapsed() < span;
                if !first.swap(false, Ordering::Relaxed) {
                    let counter = if in_time { &done } else { &done_late };
                    counter.fetch_add(1, Ordering::Relaxed);
                }
                in_time && !stop.load(Ordering::Relaxed)
            };
            // Nobody listens when this client was left to itself.
            let _ = sender.send(job(&more));
        });
    }
    drop(sender);
    let answers = || done.load(Ordering::Relaxed) + done_late.load(Ordering::Relaxed);
    let (mut ended, mut seen, mut changed) = (0, 0, start);
    let hangs = loop {
        match results.recv_timeout(Duration::from_millis(20)) {
            Ok(Ok(())) => ended += 1,
            Ok(Err(error)) if !waits(&error) => {
                stop.store(true, Ordering::Relaxed);
                return Err(error);
            }
            Err(RecvTimeoutError::Disconnected) => break ended == 0,
            Ok(Err(_)) | Err(RecvTimeoutError::Timeout) => {}
        }
        if answers() > seen {
            (seen, changed) = (answers(), Instant::now());
        }
        if start.elapsed() >= span + GRACE && (ended > 0 || changed.elapsed() >= patience) {
            break ended == 0;
        }
    };
    stop.store(true, Ordering::Relaxed);
    if hangs {
        let what = format!("answer to any of {clients} clients, after {} answers,", answers());
        return Err(late(&what, changed.elapsed()));
    }
    let in_time = done.load(Ordering::Relaxed);
    let (count, took) = if in_time > 0 { (in_time, span) } else { (answers(), start.elapsed()) };
    Ok(vec![
        ("rate", count as f64 / took.as_secs_f64()),
        ("count", count as f64),
        ("stalled", (clients - ended) as f64),
    ])
}

/// Requests a second, each on a connection of its own or all of a client on one.
pub(crate) fn http(keep: bool, clients: usize, span: Duration, to: SocketAddr) -> io::Result<Numbers> {
    rate(clients, span, PATIENCE, move |more| {
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
    rate(clients, span, PATIENCE, move |more| {
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

/// A connection that does nothing, opened within `left`.
fn open_idle(to: SocketAddr, left: Duration) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&to, left)?;
    stream.set_read_timeout(Some(left))?;
    stream.write_all(b"idle\n")?;
    stream.read_exact(&mut [0_u8])?;
    Ok(stream)
}

/// Opens connections that do nothing, `count` of them or as many as a slow or limited contender opens in `span`;
/// they live as long as `held`. The seconds are those until the last of them.
pub(crate) fn idle(
    count: usize,
    span: Duration,
    to: SocketAddr,
    held: &mut Vec<TcpStream>,
) -> io::Result<Numbers> {
    const OPENERS: usize = 32;
    let start = Instant::now();
    let taken = Arc::new(AtomicUsize::new(0));
    let threads: Vec<_> = (0..OPENERS)
        .map(|_| {
            let taken = Arc::clone(&taken);
            thread::spawn(move || {
                let (mut opened, mut last) = (Vec::new(), Duration::ZERO);
                while taken.fetch_add(1, Ordering::Relaxed) < count {
                    let left = span.saturating_sub(start.elapsed()).min(PATIENCE);
                    if left.is_zero() {
                        break;
                    }
                    match open_idle(to, left) {
                        Ok(stream) => opened.push(stream),
                        // The contender has no more: the others find out themselves.
                        Err(error) => return (opened, last, Some(error)),
                    }
                    last = start.elapsed();
                }
                (opened, last, None)
            })
        })
        .collect();
    let (mut seconds, mut failure) = (Duration::ZERO, None);
    for thread in threads {
        let (opened, last, error) = thread.join().map_err(|_| io::Error::other("a thread ended"))?;
        held.extend(opened);
        seconds = seconds.max(last);
        failure = failure.or(error);
    }
    match failure {
        Some(error) if held.is_empty() => within("connection", Err(error)),
        _ => Ok(vec![("open", held.len() as f64), ("seconds", seconds.as_secs_f64())]),
    }
}

/// The server closes the idle connections that it holds.
pub(crate) fn forget(to: SocketAddr) -> io::Result<Numbers> {
    let mut stream = open(to)?;
    stream.write_all(b"forget\n")?;
    within("answer", stream.read_exact(&mut [0_u8]))?;
    Ok(vec![("open", 0.0)])
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPAN: Duration = Duration::from_millis(50);
    const LONG: Duration = Duration::from_secs(600);

    fn value(numbers: &Numbers, name: &str) -> f64 {
        numbers.iter().find(|(key, _)| *key == name).map(|(_, value)| *value).unwrap()
    }

    #[test]
    fn clients_that_wait_when_the_others_have_ended_are_no_failure() {
        let number = AtomicUsize::new(0);
        let numbers = rate(4, SPAN, LONG, move |more| {
            let waits = number.fetch_add(1, Ordering::Relaxed) == 0;
            while more() {
                thread::sleep(if waits { LONG } else { Duration::from_millis(1) });
            }
            Ok(())
        })
        .unwrap();
        assert_eq!(value(&numbers, "stalled"), 1.0);
        assert!(value(&numbers, "count") >= 3.0);
    }

    #[test]
    fn a_time_out_of_one_client_is_no_failure_of_the_others() {
        let number = AtomicUsize::new(0);
        let numbers = rate(2, SPAN, LONG, move |more| {
            let fails = number.fetch_add(1, Ordering::Relaxed) == 0;
            while more() {
                if fails {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        })
        .unwrap();
        assert_eq!(value(&numbers, "stalled"), 1.0);
    }

    #[test]
    fn answers_that_all_come_after_the_time_are_counted_by_how_long_they_took() {
        let numbers = rate(3, SPAN, LONG, |more| {
            while more() {
                thread::sleep(4 * SPAN);
            }
            Ok(())
        })
        .unwrap();
        assert_eq!((value(&numbers, "count"), value(&numbers, "stalled")), (3.0, 0.0));
        assert!(value(&numbers, "rate") <= 3.0 / (4 * SPAN).as_secs_f64());
    }

    #[test]
    fn a_contender_that_answers_nobody_any_more_hangs() {
        let number = AtomicUsize::new(0);
        let error = rate(2, SPAN, 4 * SPAN, move |more| {
            while more() {
                if number.fetch_add(1, Ordering::Relaxed) >= 5 {
                    thread::sleep(LONG);
                }
            }
            Ok(())
        })
        .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(
            error.to_string().starts_with("no answer to any of 2 clients, after 5 answers, in "),
            "{error}"
        );
    }

    #[test]
    fn other_failures_end_the_run() {
        let error = rate(2, LONG, LONG, |_| Err(io::ErrorKind::ConnectionReset.into())).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[test]
    fn as_many_idle_connections_are_held_as_the_contender_opens() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            let mut kept = Vec::new();
            for stream in listener.incoming().take(60) {
                let mut stream = stream.unwrap();
                stream.read_exact(&mut [0; 5]).unwrap();
                // The last ones are refused after the handshake, as by a relay without descriptors.
                if kept.len() < 40 {
                    stream.write_all(b"k").unwrap();
                    kept.push(stream);
                }
            }
        });
        let mut held = Vec::new();
        let numbers = idle(60, LONG, to, &mut held).unwrap();
        assert_eq!((value(&numbers, "open"), held.len()), (40.0, 40));
        drop(server);
    }

    #[test]
    fn a_contender_that_opens_none_says_why() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        drop(listener);
        let error = idle(10, LONG, to, &mut Vec::new()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
}
