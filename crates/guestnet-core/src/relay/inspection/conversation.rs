//! How the bytes of a TCP conversation are understood, apart from what follows from that. [`Conversation::read`] takes what a
//! flow holds back and says what it shows. Pure.

use crate::relay::tcp::Held;
use guestnet_wire::inspect::{HttpInspector, HttpProgress, Progress, StreamInspector};

/// A conversation, as far as it is understood.
#[derive(Debug)]
pub(super) enum Conversation {
    /// Its first bytes are not understood yet.
    Begins(StreamInspector),
    /// TLS, whose name was allowed; another ClientHello may follow.
    Tls(StreamInspector),
    /// HTTP/1.
    Http(HttpInspector),
    /// HTTP/1, and the server is asked to switch to another protocol; what it says to that is not known.
    Switching(HttpInspector),
    /// It was refused.
    Refused,
}

/// What a conversation shows.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing new. So many bytes of those that are held back may pass, and others `wait` for more.
    Nothing { pass: usize, wait: bool },
    /// A name, or that there is none.
    Name(Shown),
    /// It is something else, or the readable part is over.
    Opaque,
    /// It breaks the rules of its protocol, or ended in the middle.
    Malformed(&'static str),
}

/// What a ClientHello or a request shows. If that is allowed, so many bytes may pass.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Shown {
    pub name: Option<Box<[u8]>>,
    pub ech: bool,
    pub switches: bool,
    pub pass: usize,
}

impl Conversation {
    pub fn new() -> Conversation {
        Conversation::Begins(StreamInspector::new())
    }

    /// Bytes of memory that it holds.
    pub fn memory(&self) -> usize {
        match self {
            Conversation::Begins(s) | Conversation::Tls(s) => s.memory(),
            Conversation::Http(h) | Conversation::Switching(h) => h.memory(),
            Conversation::Refused => 0,
        }
    }

    /// Reads on.
    pub fn read(&mut self, held: &Held<'_>) -> Found {
        let found = match self {
            Conversation::Begins(_) | Conversation::Tls(_) => self.read_stream(held),
            Conversation::Http(http) => read_http(http, held.unseen, held.len()),
            Conversation::Switching(http) => match held.switches {
                Some(true) => Found::Opaque,
                Some(false) => {
                    let mut http = std::mem::take(http);
                    let found = read_http(&mut http, held.all, held.len());
                    *self = Conversation::Http(http);
                    found
                }
                None => Found::Nothing { pass: 0, wait: !held.is_empty() },
            },
            Conversation::Refused => Found::Nothing { pass: 0, wait: false },
        };
        let silent = held.ended && held.is_empty() && matches!(self, Conversation::Begins(_));
        match found {
            Found::Nothing { .. } if silent => Found::Opaque,
            Found::Nothing { pass, wait: true } if held.ended || held.full && pass == 0 => {
                Found::Malformed("a conversation that ends or stops in the middle")
            }
            found => found,
        }
    }

    fn read_stream(&mut self, held: &Held<'_>) -> Found {
        let (Conversation::Begins(stream) | Conversation::Tls(stream)) = self else {
            return Found::Opaque;
        };
        // Behind what was let pass, and looked at before.
        let unseen: usize = held.unseen.iter().map(|part| part.len()).sum();
        let mut at = held.len().saturating_sub(unseen);
        for part in held.unseen {
            let (taken, progress) = stream.feed(part);
            at = at.saturating_add(taken);
            match progress {
                Progress::More => {}
                Progress::Tls(hello) => {
                    let shown = Shown { name: hello.server_name, ech: hello.ech, switches: false, pass: at };
                    return Found::Name(shown);
                }
                Progress::Http => {
                    let mut http = HttpInspector::new();
                    let found = read_http(&mut http, held.all, held.len());
                    *self = Conversation::Http(http);
                    return found;
                }
                Progress::Opaque(_) => return Found::Opaque,
                Progress::Malformed(why) => return Found::Malformed(why),
            }
        }
        match self {
            Conversation::Begins(_) => Found::Nothing { pass: 0, wait: !held.is_empty() },
            Conversation::Tls(stream) => {
                let pending = stream.pending();
                Found::Nothing { pass: held.len().saturating_sub(pending), wait: pending > 0 }
            }
            _ => Found::Opaque,
        }
    }

    /// The name that was shown is allowed.
    pub fn allowed(&mut self, switches: bool) {
        *self = match std::mem::replace(self, Conversation::Refused) {
            Conversation::Begins(stream) => Conversation::Tls(stream),
            Conversation::Http(http) if switches => Conversation::Switching(http),
            other => other,
        };
    }
}

impl Conversation {
    /// The server cannot be asked to switch to another protocol now: what follows is HTTP.
    pub fn does_not_switch(&mut self) {
        if let Conversation::Switching(http) = self {
            *self = Conversation::Http(std::mem::take(http));
        }
    }
}

/// Reads `parts`, the last bytes of the `all` that are held back, to the end of the next head.
fn read_http(http: &mut HttpInspector, parts: [&[u8]; 2], all: usize) -> Found {
    let new: usize = parts.iter().map(|part| part.len()).sum();
    let mut at = all.saturating_sub(new);
    for part in parts {
        let (taken, progress) = http.feed(part);
        at = at.saturating_add(taken);
        match progress {
            HttpProgress::More => {}
            HttpProgress::Head(head) => {
                return Found::Name(Shown { name: head.host, ech: false, switches: head.upgrade, pass: at });
            }
            HttpProgress::Malformed(why) => return Found::Malformed(why),
        }
    }
    let pending = http.pending();
    Found::Nothing { pass: all.saturating_sub(pending), wait: pending > 0 }
}
