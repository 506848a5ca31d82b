//! Theory of operation: datagrams of one size at a fixed rate, one way. A TCP connection says what comes and
//! what came. The sender keeps to its schedule: when it was held up it catches up, and what it could not offer
//! in the time is told apart from what was lost.

use crate::serve::{self, Shared};
use crate::{Numbers, PATIENCE, bad, connect, within};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Datagrams begin with this and the number of their run.
pub(crate) const MARK: [u8; 4] = *b"gn01";
const HEAD: usize = 12;
/// How long what is still on its way may take.
const LINGER: Duration = Duration::from_millis(300);

/// A number that no other run has; process numbers would not do, guests count their own.
fn fresh_run() -> u64 {
    RandomState::new().hash_one(Instant::now())
}

fn datagram(run: u64, bytes: usize) -> Vec<u8> {
    let mut data = vec![0_u8; bytes.max(HEAD)];
    data[..4].copy_from_slice(&MARK);
    data[4..HEAD].copy_from_slice(&run.to_be_bytes());
    data
}

/// The run that a datagram belongs to.
pub(crate) fn run_of(data: &[u8]) -> Option<u64> {
    let number: [u8; 8] = data.get(4..HEAD)?.try_into().ok()?;
    (data[..4] == MARK).then(|| u64::from_be_bytes(number))
}

/// Sends at `rate` a second for `span`; gives how many went out.
fn offer(socket: &UdpSocket, to: SocketAddr, data: &[u8], rate: u64, span: Duration) -> io::Result<u64> {
    let start = Instant::now();
    let (mut sent, mut refused) = (0_u64, 0_u32);
    loop {
        let age = start.elapsed();
        if age >= span {
            return Ok(sent);
        }
        let due = (age.as_nanos() * u128::from(rate) / 1_000_000_000) as u64;
        if sent >= due {
            // Short waits by turning, long ones asleep: a timer is 50 us late.
            let next = Duration::from_nanos((u128::from(sent + 1) * 1_000_000_000 / u128::from(rate)) as u64);
            if next > age + Duration::from_micros(200) {
                std::thread::sleep(Duration::from_micros(100));
            } else {
                std::thread::yield_now();
            }
            continue;
        }
        match socket.send_to(data, to) {
            Ok(_) => sent += 1,
            // A full queue, or news of an earlier one.
            Err(error) if refused < 100_000 && error.kind() != io::ErrorKind::InvalidInput => refused += 1,
            Err(error) => return Err(error),
        }
    }
}

fn numbers(line: &str) -> io::Result<(u64, u64)> {
    let mut words = line.split_whitespace().map_while(|w| w.parse().ok());
    match (words.next(), words.next()) {
        (Some(a), Some(b)) => Ok((a, b)),
        _ => Err(bad("the server saw no datagrams")),
    }
}

/// Gbit/s received, the share of what was sent that was lost, and datagrams.
pub(crate) fn client(
    up: bool,
    bytes: usize,
    rate: u64,
    span: Duration,
    to: SocketAddr,
) -> io::Result<Numbers> {
    let own = fresh_run();
    let mut control = connect(to)?;
    let mut reader = BufReader::new(control.try_clone()?);
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let data = datagram(own, bytes);
    let mut line = String::new();
    let (sent, got);
    if up {
        control.write_all(format!("udpup {own}\n").as_bytes())?;
        within("start of the upload", reader.read_line(&mut line))?;
        sent = offer(&socket, to, &data, rate, span)?;
        std::thread::sleep(LINGER);
        control.write_all(b"end\n")?;
        line.clear();
        within("result of the upload", reader.read_line(&mut line))?;
        (got, _) = numbers(&line)?;
    } else {
        control.write_all(format!("udpdown {own} {bytes} {rate} {}\n", span.as_millis()).as_bytes())?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let mut count = 0_u64;
        let mut buffer = vec![0_u8; 65536];
        let start = Instant::now();
        let mut quiet = Instant::now();
        let mut asked = None::<Instant>;
        loop {
            if count == 0 && asked.is_none_or(|at| at.elapsed() > Duration::from_millis(100)) {
                socket.send_to(&data[..HEAD], to)?;
                asked = Some(Instant::now());
            }
            match socket.recv(&mut buffer) {
                Ok(n) if run_of(&buffer[..n]) == Some(own) => {
                    count += 1;
                    quiet = Instant::now();
                }
                _ if start.elapsed() > PATIENCE => break,
                _ if count > 0 && quiet.elapsed() > LINGER => break,
                _ => {}
            }
        }
        within("result of the download", reader.read_line(&mut line))?;
        (sent, _) = numbers(&line)?;
        got = count.min(sent);
    }
    let seconds = span.as_secs_f64();
    Ok(vec![
        ("gbits", got as f64 * bytes as f64 * 8.0 / seconds / 1e9),
        ("lost", if sent == 0 { 1.0 } else { 1.0 - got as f64 / sent as f64 }),
        ("offered", sent as f64 / (seconds * rate as f64)),
        ("million", got as f64 / 1e6),
    ])
}

/// The server's side of an upload: counts what comes of `run` until it is told to stop.
pub(crate) fn count(
    run: u64,
    shared: &Shared,
    reader: &mut impl BufRead,
    control: &mut TcpStream,
) -> io::Result<()> {
    let counter = serve::lock(&shared.counts).entry(run).or_default().clone();
    control.write_all(b"go\n")?;
    let mut line = String::new();
    reader.read_line(&mut line)?;
    serve::lock(&shared.counts).remove(&run);
    control.write_all(format!("{} 0\n", counter.load(Ordering::Relaxed)).as_bytes())
}

/// The server's side of a download: sends to where the first datagram of `run` came from.
pub(crate) fn pour(
    run: u64,
    bytes: usize,
    rate: u64,
    span: Duration,
    shared: &Shared,
    control: &mut TcpStream,
) -> io::Result<()> {
    let start = Instant::now();
    let to = loop {
        if let Some(to) = serve::lock(&shared.callers).remove(&run) {
            break to;
        }
        if start.elapsed() > PATIENCE {
            return Err(bad("nobody asked"));
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    let sent = offer(&shared.socket, to, &datagram(run, bytes), rate, span)?;
    control.write_all(format!("{sent} 0\n").as_bytes())
}
