//! Theory of operation: one program makes all the load of bench/, so that every contender is measured by the
//! same client and server, in a namespace and in a virtual machine (it is linked statically). It blocks in
//! threads: as little work of its own as a socket allows, and alike for all. `serve` is the server, one TCP and
//! one UDP port; the first line of a connection says what it is for. `agent` reads commands from its input,
//! one a line, and answers each with `RESULT ID JSON`; it can serve too, for published ports. Anything else is
//! one such command. Rates are those that arrived, by the receiver's clock.

mod bulk;
mod datagrams;
mod exchanges;
mod serve;

use std::io::{self, BufRead, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

/// What a command gives: names and numbers, written as JSON.
pub(crate) type Numbers = Vec<(&'static str, f64)>;

/// The longest that a client waits for a connection or an answer. A contender that lets it wait longer hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(8);

/// Whether an error of a socket means that nothing has happened yet.
pub(crate) fn waits(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

/// `result` of a call that waits up to `PATIENCE` for `what`: a time-out says so in words.
pub(crate) fn within<T>(what: &str, result: io::Result<T>) -> io::Result<T> {
    result.map_err(|error| if waits(&error) { late(what, PATIENCE) } else { error })
}

pub(crate) fn late(what: &str, span: Duration) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("no {what} in {:.0} s", span.as_secs_f64()))
}

/// A connection to `to`, opened within `PATIENCE`; reads from it wait as long.
pub(crate) fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = within("connection", TcpStream::connect_timeout(&to, PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

const USAGE: &str = "\
load serve PORT                         the server
load agent [PORT]                       commands from the input; a server on PORT
load tcp up|down STREAMS MS ADDR        Gbit/s
load udp up|down BYTES PER_SECOND MS ADDR
load rr tcp|udp MS ADDR [busy]          request and response, one at a time
load http close|keep CLIENTS MS ADDR    requests a second
load dns CLIENTS MS ADDR                queries a second
load idle COUNT MS ADDR                 opens connections, as many as it can in the time, and keeps them until
                                        the next command
load forget ADDR                        the server lets go of its ends of such connections";

fn bad(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text.to_owned())
}

fn number<T: std::str::FromStr>(word: &str) -> io::Result<T> {
    word.parse().map_err(|_| bad(&format!("{word} is not a number")))
}

fn address(word: &str) -> io::Result<SocketAddr> {
    word.parse().map_err(|_| bad(&format!("{word} is not ADDRESS:PORT")))
}

fn millis(word: &str) -> io::Result<Duration> {
    Ok(Duration::from_millis(number(word)?))
}

/// Runs one command. `held` keeps idle connections from one command to the next.
fn run(words: &[&str], held: &mut Vec<TcpStream>) -> io::Result<Numbers> {
    held.clear();
    match words {
        ["tcp", way @ ("up" | "down"), streams, ms, to] => {
            bulk::client(*way == "up", number(streams)?, millis(ms)?, address(to)?)
        }
        ["udp", way @ ("up" | "down"), bytes, rate, ms, to] => {
            datagrams::client(*way == "up", number(bytes)?, number(rate)?, millis(ms)?, address(to)?)
        }
        ["rr", proto @ ("tcp" | "udp"), ms, to] => {
            exchanges::latency(*proto == "tcp", millis(ms)?, address(to)?, false)
        }
        ["rr", proto @ ("tcp" | "udp"), ms, to, "busy"] => {
            exchanges::latency(*proto == "tcp", millis(ms)?, address(to)?, true)
        }
        ["http", kind @ ("close" | "keep"), clients, ms, to] => {
            exchanges::http(*kind == "keep", number(clients)?, millis(ms)?, address(to)?)
        }
        ["dns", clients, ms, to] => exchanges::dns(number(clients)?, millis(ms)?, address(to)?),
        ["forget", to] => exchanges::forget(address(to)?),
        ["idle", count, ms, to] => exchanges::idle(number(count)?, millis(ms)?, address(to)?, held),
        _ => Err(bad(USAGE)),
    }
}

fn json(result: io::Result<Numbers>) -> String {
    match result {
        Ok(numbers) => {
            let fields: Vec<String> = numbers.iter().map(|(k, v)| format!("\"{k}\": {v:.6}")).collect();
            format!("{{{}}}", fields.join(", "))
        }
        Err(error) => format!("{{\"error\": {:?}}}", error.to_string()),
    }
}

fn agent() -> io::Result<()> {
    let mut held = Vec::new();
    println!("AGENT ready");
    for line in io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let Some((id, command)) = words.split_first() else { continue };
        let answer = json(run(command, &mut held));
        println!("RESULT {id} {answer}");
        io::stdout().flush()?;
    }
    Ok(())
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["serve", port] => number(port).and_then(|port| serve::start(port, serve::THREADS)).and_then(|()| {
            println!("ready");
            loop {
                std::thread::park();
            }
        }),
        ["agent"] => agent(),
        ["agent", port] => {
            number(port).and_then(|port| serve::start(port, serve::AGENT_THREADS)).and_then(|()| agent())
        }
        _ => {
            let result = run(&words, &mut Vec::new());
            let failed = result.is_err();
            println!("{}", json(result));
            return ExitCode::from(u8::from(failed));
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("load: {error}");
            ExitCode::FAILURE
        }
    }
}
