//! Theory of operation: a bound datagram socket where guests arrive, each known by the path that its own socket
//! is bound to (vfkit and its kin; QEMU's `-netdev dgram`). vfkit first sends the four bytes `VFKT`, others begin
//! with a frame; both are understood. The same magic from a known path is a guest that started again, and so a
//! new guest, a few times a second: it may be a frame that a guest made. Without the magic it shows by another
//! socket at the path.
//!
//! How a guest is answered depends on whether it has connected its socket:
//! - One that has not (QEMU) hears everybody. It is answered over a socket of its own, which is connected to it
//!   once, when it arrives.
//! - One that has (vfkit) hears only the very socket that it found at the path. That socket is left to it, and a
//!   new one takes its place at the path ([`Unixgram::replace`]). Guests that had found the same one by then share
//!   it, until one of them does not read; then it is the first one's alone ([`Unixgram::leave_to`]).
//!
//! So what a guest leaves unread fills the send buffer of its own socket and nobody else's.
//!
//! A path is another user's to change. It is looked up once, when the guest arrives, no link is followed in its
//! last part, and the socket found there has to be the sender's own: otherwise guestnet could be made to write
//! to sockets that the sender itself may not write to. A guest that is connected to our socket has shown that;
//! of others the owner of the file is compared with the user that the kernel names as sender.

use super::FRAME_MAX;
use super::dgram::{Dgram, set_buffers};
use crate::os::sockaddr::RawAddr;
use crate::os::sys;
use guestnet_core::types::{PortId, Time};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

/// What vfkit sends before the first frame.
pub(crate) const MAGIC: &[u8] = b"VFKT";
/// Guests on one socket.
pub(crate) const PEERS_MAX: usize = 256;
/// Guests of one socket that may start again in a second. Each is a port that goes and one that comes.
const RESTARTS: u32 = 4;
/// After this long without a frame the socket at the path may be another one, in nanoseconds.
const SILENT: u64 = 1_000_000_000;

/// A guest that has arrived.
pub(crate) struct Peer {
    pub port: PortId,
    how: How,
    heard: Time,
}

/// How a guest came.
#[derive(Debug, Clone, Copy)]
pub(crate) struct How {
    /// It is connected to the socket where it came, and is answered over that one.
    pub connected: bool,
    /// What its path named then; an abstract name has nothing.
    found: Option<Found>,
}

/// What tells the socket at a path from a later one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Found {
    file: (u64, u64),
    changed: (i64, i64),
}

impl From<libc::stat> for Found {
    fn from(s: libc::stat) -> Found {
        Found { file: (s.st_dev, s.st_ino), changed: (s.st_ctime, s.st_ctime_nsec) }
    }
}

/// The socket and who came.
pub(crate) struct Unixgram {
    pub fd: Arc<OwnedFd>,
    pub peers: HashMap<Vec<u8>, Peer>,
    /// Where guests find it. A socket that took another's place goes on giving the name that it was bound to.
    path: Option<Vec<u8>>,
    /// `VFKT` may come.
    magic: bool,
    /// Another socket has taken its place at the path, and it is left to this guest.
    pub owner: Option<PortId>,
    /// The second at hand, and who started again in it.
    restarts: (u64, u32),
}

/// Who sent a datagram, and what it is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Sender {
    /// A frame of this length by a known guest.
    Known(PortId, usize),
    /// Somebody new, with a frame of this length, or with none but the magic; and the user who sent it. The port
    /// is that of the guest that had the path before, and is over.
    New { path: Vec<u8>, user: Option<u32>, frame: Option<usize>, old: Option<PortId> },
    /// Nothing that can be used.
    Refused,
    /// Nothing now.
    Empty,
    /// The socket is broken.
    Broken(i32),
}

/// A guest that is let in.
pub(crate) struct Arrival {
    pub dgram: Dgram,
    pub how: How,
}

impl Unixgram {
    pub(crate) fn new(fd: OwnedFd, magic: bool) -> Unixgram {
        set_buffers(&fd);
        // Where it fails, nobody is let in who has not connected.
        let _users_are_known = sys::set_opt(&fd, libc::SOL_SOCKET, libc::SO_PASSCRED, 1);
        let path = sys::local_addr(&fd).and_then(RawAddr::to_path).filter(|p| p.first() == Some(&b'/'));
        Unixgram { path, fd: Arc::new(fd), peers: HashMap::new(), magic, owner: None, restarts: (0, 0) }
    }

    /// Reads one datagram to `buf`.
    pub(crate) fn read(&mut self, now: Time, buf: &mut [u8]) -> Sender {
        let (n, addr, user) = match sys::recv_from_user(&self.fd, buf, libc::MSG_TRUNC) {
            Ok(r) => r,
            Err(e) if sys::would_block(e) => return Sender::Empty,
            // An earlier send to somebody who is gone.
            Err(libc::ECONNREFUSED | libc::ECONNRESET) => return Sender::Refused,
            Err(e) => return Sender::Broken(e),
        };
        let Some(path) = addr.to_path().filter(|_| n <= buf.len().min(FRAME_MAX)) else {
            return Sender::Refused;
        };
        let hello = self.magic && buf.get(..n) == Some(MAGIC);
        let frame = (!hello).then_some(n);
        match self.peers.get_mut(&path) {
            Some(peer) if !hello => {
                let silent = now.since(std::mem::replace(&mut peer.heard, now)) > SILENT;
                if silent
                    && peer.how.found.is_some_and(|f| sys::stat(&path).is_ok_and(|s| Found::from(s) != f))
                {
                    return Sender::New { old: Some(peer.port), path, user, frame };
                }
                Sender::Known(peer.port, n)
            }
            old => Sender::New { old: old.map(|p| p.port), path, user, frame },
        }
    }

    /// Whether one more guest may start again now.
    pub(crate) fn may_restart(&mut self, now: Time) -> bool {
        let second = now.as_ms() / 1000;
        if self.restarts.0 != second {
            self.restarts = (second, 0);
        }
        self.restarts.1 += 1;
        self.restarts.1 <= RESTARTS
    }

    /// Puts a new socket at the path of this one, which stays with the guests that found it. `None` where
    /// that is not needed, or cannot be done; then the guests share the socket.
    pub(crate) fn replace(&self) -> Option<Unixgram> {
        if self.owner.is_some() {
            return None;
        }
        let at = self.path.clone()?;
        let beside = [&at, &b".new"[..]].concat();
        let fd = sys::socket(libc::AF_UNIX, libc::SOCK_DGRAM, 0).ok()?;
        let (path, beside_path) = (Path::new(OsStr::from_bytes(&at)), Path::new(OsStr::from_bytes(&beside)));
        let (_old, old) = sys::open_path(&at).ok()?;
        let mode = old.st_mode & 0o777;
        let to = RawAddr::unix(&beside)?;
        // What a guestnet left that was killed in between would stand in the way for ever.
        if sys::connect(&fd, &to) == Err(libc::ECONNREFUSED) {
            let _best_effort = std::fs::remove_file(beside_path);
        }
        // Bind takes the mode from here, so that at no time more are let in than at the old one.
        sys::set_mode(&fd, mode);
        sys::bind(&fd, &to).ok()?;
        // In one step, so that nobody finds nothing there.
        let placed = restore_mode(&beside, mode).and_then(|()| std::fs::rename(beside_path, path));
        if placed.is_err() {
            let _left = std::fs::remove_file(beside_path);
            return None;
        }
        Some(Unixgram { path: Some(at), ..Unixgram::new(fd, self.magic) })
    }

    /// The attachment of a guest that arrives.
    ///
    /// # Errors
    /// Why it cannot be let in, as a sentence for the log.
    pub(crate) fn attach(&self, path: &[u8], user: Option<u32>) -> Result<Arrival, String> {
        let name = || String::from_utf8_lossy(path).replace('\0', "@");
        let refused = |e: i32| super::reason(&format!("{} cannot be answered", name()), e);
        let own = sys::socket(libc::AF_UNIX, libc::SOCK_DGRAM, 0).map_err(refused)?;
        let (to, file) = match path.first() {
            Some(0) => (RawAddr::unix(path).ok_or_else(|| refused(libc::EINVAL))?, None),
            Some(b'/') => {
                let (file, stat) = sys::open_path(path).map_err(refused)?;
                if stat.st_mode & libc::S_IFMT != libc::S_IFSOCK {
                    return Err(format!("{} is not a socket any more", name()));
                }
                let to =
                    RawAddr::unix(sys::path_of(&file).as_bytes()).ok_or_else(|| refused(libc::EINVAL))?;
                (to, Some((file, stat)))
            }
            _ => {
                return Err(format!(
                    "{:?} is a relative path, which says nothing here: bind the guest's socket to an absolute one",
                    name()
                ));
            }
        };
        match sys::connect(&own, &to) {
            Ok(()) => {}
            // It hears only the socket that it is connected to, which is this one or refuses to send.
            Err(libc::EPERM) => {
                let found = file.as_ref().map(|(_, s)| Found::from(*s));
                let dgram = Dgram::peer(Arc::clone(&self.fd), to, file.map(|(fd, _)| fd));
                return Ok(Arrival { dgram, how: How { connected: true, found } });
            }
            Err(libc::ENOENT) if file.is_some() => {
                return Err(format!("{} cannot be answered: /proc is not mounted", name()));
            }
            Err(e) => return Err(refused(e)),
        }
        let Some((_file, stat)) = file else {
            return Err(format!("{} has an abstract name and has not connected its socket", name()));
        };
        // Root may reach every socket by itself, and whoever runs guestnet the same ones as guestnet.
        let trusted = user.is_some_and(|u| u == stat.st_uid || u == 0 || u == sys::own_user());
        if !trusted {
            let sender = user.map_or("an unknown user".into(), |u| format!("user {u}"));
            return Err(format!(
                "the socket {} belongs to user {}, and a frame in its name came from {sender}: a guest's \
                 socket has to be its own user's",
                name(),
                stat.st_uid
            ));
        }
        set_buffers(&own);
        let how = How { connected: false, found: Some(stat.into()) };
        Ok(Arrival { dgram: Dgram::connected(own), how })
    }

    /// A guest was let in as `port`. Where it came to a socket that is another one's, what the two leave unread is
    /// bounded, so that there is room left for the one that stays.
    pub(crate) fn arrived(&mut self, now: Time, path: &[u8], port: PortId, how: How) {
        self.peers.insert(path.to_vec(), Peer { port, how, heard: now });
        if self.owner.is_some() && self.peers.len() == 2 {
            let granted = sys::get_opt(&self.fd, libc::SOL_SOCKET, libc::SO_SNDBUF).unwrap_or(0);
            // The kernel says twice what it was told, and takes half of that.
            let _best_effort = sys::set_opt(&self.fd, libc::SOL_SOCKET, libc::SO_SNDBUF, granted / 4);
        }
    }

    /// Guests that are not connected come to the socket that is at the path now.
    pub(crate) fn hand_on(&mut self, next: &mut Unixgram) {
        next.peers.extend(self.peers.extract_if(|_, peer| !peer.how.connected));
    }

    /// The guest to which the socket is left, and those that have to go for that. `None` where nobody has to, or
    /// where no other socket could take its place.
    pub(crate) fn leave_to(&mut self) -> Option<(PortId, Vec<PortId>)> {
        let owner = self.owner?;
        let first = self.peers.values().map(|p| p.port).min_by_key(|p| (*p != owner, p.0))?;
        let others: Vec<PortId> = self.peers.values().map(|p| p.port).filter(|p| *p != first).collect();
        if others.is_empty() {
            return None;
        }
        set_buffers(&self.fd);
        self.owner = Some(first);
        Some((first, others))
    }

    /// Guests whose sockets nobody has open any more.
    pub(crate) fn gone(&self) -> Vec<PortId> {
        let Ok(probe) = sys::socket(libc::AF_UNIX, libc::SOCK_DGRAM, 0) else { return Vec::new() };
        let dead = |path: &[u8]| {
            // A connect sends nothing, but it fails for a path without a socket. EPERM is a socket that is
            // connected elsewhere, and so alive.
            RawAddr::unix(path).is_none_or(|a| {
                matches!(sys::connect(&probe, &a), Err(libc::ECONNREFUSED | libc::ENOENT | libc::ENOTDIR))
            })
        };
        self.peers.iter().filter(|(path, _)| dead(path)).map(|(_, peer)| peer.port).collect()
    }
}

/// Gives a socket that was bound just now the mode that the umask took from it. It is not looked for by its path,
/// where somebody else's file may be by now.
fn restore_mode(path: &[u8], mode: u32) -> std::io::Result<()> {
    let (file, stat) = sys::open_path(path).map_err(std::io::Error::from_raw_os_error)?;
    if stat.st_mode & libc::S_IFMT != libc::S_IFSOCK || stat.st_uid != sys::own_user() {
        return Err(std::io::ErrorKind::AlreadyExists.into());
    }
    std::fs::set_permissions(sys::path_of(&file), std::fs::Permissions::from_mode(mode))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::temp_dir::TempDir;
    use std::os::unix::net::UnixDatagram;

    const NOW: Time = Time(1_000_000_000);
    const ME: How = How { connected: true, found: None };

    #[test]
    fn the_next_socket_is_for_the_same_users_whatever_was_left_beside_it() {
        let dir = TempDir::new("next");
        let (path, beside) = (dir.join("s"), dir.join("s.new"));
        let s = UnixDatagram::bind(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        drop(UnixDatagram::bind(&beside).unwrap());
        let u = Unixgram::new(s.into(), true);
        // A third in the place of the second too.
        let mut second = u.replace().unwrap();
        let mut third = second.replace().unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let guest = UnixDatagram::bind(dir.join("guest")).unwrap();
        guest.send_to(b"x", &path).unwrap();
        assert!(matches!(second.read(NOW, &mut [0; 4]), Sender::Empty));
        assert!(matches!(third.read(NOW, &mut [0; 4]), Sender::New { .. }));
        // Somebody's socket that is in use stays.
        let _others = UnixDatagram::bind(&beside).unwrap();
        assert!(third.replace().is_none());
    }

    #[test]
    fn knows_guests_by_their_path() {
        let dir = TempDir::new("paths");
        let path = |n: &str| dir.join(n);
        let s = UnixDatagram::bind(path("s")).unwrap();
        let mut u = Unixgram::new(s.into(), true);
        let a = UnixDatagram::bind(path("a")).unwrap();
        let b = UnixDatagram::bind(path("b")).unwrap();
        for x in [&a, &b] {
            x.connect(path("s")).unwrap();
        }
        let mut buf = [0; 100];
        assert_eq!(u.read(NOW, &mut buf), Sender::Empty);
        a.send(MAGIC).unwrap();
        let Sender::New { path: pa, frame: None, old: None, .. } = u.read(NOW, &mut buf) else { panic!() };
        u.arrived(NOW, &pa, PortId(1), ME);
        b.send(b"frame").unwrap();
        let Sender::New { path: pb, frame: Some(5), old: None, user } = u.read(NOW, &mut buf) else {
            panic!()
        };
        assert_eq!(user, Some(sys::own_user()));
        u.arrived(NOW, &pb, PortId(2), ME);
        a.send(b"VFKTx").unwrap();
        assert_eq!(u.read(NOW, &mut buf), Sender::Known(PortId(1), 5));
        a.send(MAGIC).unwrap();
        assert_eq!(
            u.read(NOW, &mut buf),
            Sender::New { path: pa.clone(), user, frame: None, old: Some(PortId(1)) }
        );
        let unnamed = UnixDatagram::unbound().unwrap();
        unnamed.send_to(b"who?", path("s")).unwrap();
        assert_eq!(u.read(NOW, &mut buf), Sender::Refused);
        b.send(&[0; 101]).unwrap();
        assert_eq!(u.read(NOW, &mut buf), Sender::Refused);
        // A guest is answered through the shared socket, which is all that its connected socket hears.
        let mut d = u.attach(&pa, user).unwrap().dgram;
        d.push(b"he", b"llo");
        assert_eq!(d.flush(), super::super::Flushed::All);
        assert_eq!((a.recv(&mut buf).unwrap(), &buf[..5]), (5, &b"hello"[..]));
        assert_eq!(u.gone(), []);
        drop(a);
        assert_eq!(u.gone(), [PortId(1)]);
    }

    fn socket(dir: &TempDir, name: &str) -> UnixDatagram {
        let s = UnixDatagram::bind(dir.join(name)).unwrap();
        s.set_nonblocking(true).unwrap();
        s
    }

    fn path(dir: &TempDir, name: &str) -> Vec<u8> {
        dir.join(name).into_os_string().into_encoded_bytes()
    }

    fn refusal(u: &Unixgram, path: &[u8], user: Option<u32>) -> String {
        u.attach(path, user).map(|_| ()).unwrap_err()
    }

    #[test]
    fn a_guest_keeps_the_socket_that_it_arrived_with_whatever_its_path_leads_to_later() {
        let dir = TempDir::new("pinned");
        let u = Unixgram::new(socket(&dir, "s").into(), false);
        for connects in [false, true] {
            let (guest, victim) = (socket(&dir, "guest"), socket(&dir, "victim"));
            if connects {
                guest.connect(dir.join("s")).unwrap();
            }
            let arrival = u.attach(&path(&dir, "guest"), Some(sys::own_user())).unwrap();
            assert_eq!(arrival.how.connected, connects);
            let mut d = arrival.dgram;
            std::fs::remove_file(dir.join("guest")).unwrap();
            std::os::unix::fs::symlink(dir.join("victim"), dir.join("guest")).unwrap();
            d.push(b"frame", b"");
            assert_eq!(d.flush(), super::super::Flushed::All);
            assert_eq!(guest.recv(&mut [0; 9]).unwrap(), 5);
            assert!(victim.recv(&mut [0; 9]).is_err());
            for name in ["guest", "victim"] {
                std::fs::remove_file(dir.join(name)).unwrap();
            }
        }
    }

    #[test]
    fn a_path_that_is_not_the_senders_own_socket_is_refused() {
        let dir = TempDir::new("owner");
        let u = Unixgram::new(socket(&dir, "s").into(), false);
        let _victim = socket(&dir, "victim");
        let me = sys::own_user();
        let other = if me == 12345 { 54321 } else { 12345 };
        assert!(u.attach(&path(&dir, "victim"), Some(me)).is_ok());
        let why = refusal(&u, &path(&dir, "victim"), Some(other));
        assert!(why.contains(&format!("belongs to user {me}")) && why.contains("user 12345"), "{why}");
        assert!(refusal(&u, &path(&dir, "victim"), None).contains("an unknown user"));
        // Links are not followed, and what is no socket is none.
        std::os::unix::fs::symlink(dir.join("victim"), dir.join("link")).unwrap();
        std::fs::write(dir.join("file"), "").unwrap();
        for name in ["link", "file"] {
            assert!(refusal(&u, &path(&dir, name), Some(me)).contains("not a socket"), "{name}");
        }
        assert!(refusal(&u, &path(&dir, "nothing"), Some(me)).contains("No such file"));
        assert!(
            refusal(&u, b"relative/socket", Some(me)).contains("bind the guest's socket to an absolute one")
        );
    }

    /// An abstract name has no owner, and belongs to a network namespace that may not be the sender's.
    #[test]
    fn a_guest_with_an_abstract_name_has_to_connect() {
        let dir = TempDir::new("abstract");
        let u = Unixgram::new(socket(&dir, "s").into(), false);
        let name = format!("\0guestnet-abstract-{}", std::process::id()).into_bytes();
        let fd = sys::socket(libc::AF_UNIX, libc::SOCK_DGRAM, 0).unwrap();
        sys::bind(&fd, &RawAddr::unix(&name).unwrap()).unwrap();
        assert!(refusal(&u, &name, Some(sys::own_user())).contains("has not connected"));
        sys::connect(&fd, &RawAddr::unix(&path(&dir, "s")).unwrap()).unwrap();
        let mut d = u.attach(&name, Some(12345)).unwrap().dgram;
        d.push(b"frame", b"");
        assert_eq!(d.flush(), super::super::Flushed::All);
        assert_eq!(sys::recv(&fd, &mut [0; 9], 0), Ok(5));
    }

    #[test]
    fn another_socket_at_the_path_of_a_silent_guest_is_another_guest() {
        let dir = TempDir::new("restart");
        let mut u = Unixgram::new(socket(&dir, "s").into(), false);
        let (s, mut buf) = (dir.join("s"), [0; 100]);
        let first = socket(&dir, "guest");
        first.send_to(b"x", &s).unwrap();
        let Sender::New { path, user, old: None, .. } = u.read(NOW, &mut buf) else { panic!() };
        let arrival = u.attach(&path, user).unwrap();
        u.arrived(NOW, &path, PortId(1), arrival.how);
        let later = |s: u64| Time(NOW.0 + s * 1_000_000_000);
        first.send_to(b"x", &s).unwrap();
        assert_eq!(u.read(later(5), &mut buf), Sender::Known(PortId(1), 1));
        drop(first);
        std::fs::remove_file(dir.join("guest")).unwrap();
        let second = socket(&dir, "guest");
        second.send_to(b"x", &s).unwrap();
        let got = u.read(later(10), &mut buf);
        assert!(matches!(got, Sender::New { old: Some(PortId(1)), frame: Some(1), .. }), "{got:?}");
    }

    #[test]
    fn a_guest_that_does_not_read_fills_no_other_guests_socket() {
        let dir = TempDir::new("unread");
        let u = Unixgram::new(socket(&dir, "s").into(), false);
        let (deaf, guest) = (socket(&dir, "deaf"), socket(&dir, "guest"));
        let to = |name: &str| u.attach(&path(&dir, name), Some(sys::own_user())).unwrap().dgram;
        let (mut to_deaf, mut to_guest) = (to("deaf"), to("guest"));
        for _ in 0..2000 {
            to_deaf.push(&[7; 1000], b"");
        }
        assert_eq!(to_deaf.flush(), super::super::Flushed::Blocked);
        to_guest.push(b"frame", b"");
        assert_eq!(to_guest.flush(), super::super::Flushed::All);
        assert_eq!(guest.recv(&mut [0; 9]).unwrap(), 5);
        // Room in the one's queue is told by its own socket.
        assert_eq!(sys::poll_now(&to_deaf.fd, libc::POLLOUT), 0);
        while deaf.recv(&mut [0; 2000]).is_ok() {}
        assert_eq!(sys::poll_now(&to_deaf.fd, libc::POLLOUT), libc::POLLOUT);
    }

    /// Two that found the same socket, of which one does not read: what it holds is bounded, and the socket becomes
    /// the first one's alone.
    #[test]
    fn a_shared_socket_that_stalls_is_left_to_the_first_guest() {
        let dir = TempDir::new("shared");
        let mut u = Unixgram::new(socket(&dir, "s").into(), true);
        let (first, second) = (socket(&dir, "first"), socket(&dir, "second"));
        let mut come = |s: &UnixDatagram, name: &str, port| {
            s.connect(dir.join("s")).unwrap();
            let a = u.attach(&path(&dir, name), Some(sys::own_user())).unwrap();
            u.owner.get_or_insert(PortId(1));
            u.arrived(NOW, &path(&dir, name), PortId(port), a.how);
            a.dgram
        };
        let (mut to_first, mut to_second) = (come(&first, "first", 1), come(&second, "second", 2));
        for _ in 0..2000 {
            to_second.push(&[7; 1000], b"");
        }
        to_first.push(b"frame", b"");
        let mut stalls = 0;
        for _ in 0..3 * 200 {
            assert_eq!(to_second.flush(), super::super::Flushed::Retry);
            stalls += usize::from(to_second.has_stalled());
        }
        assert_eq!((stalls, to_first.flush()), (1, super::super::Flushed::Retry));
        assert_eq!(u.leave_to(), Some((PortId(1), vec![PortId(2)])));
        u.peers.retain(|_, p| p.port == PortId(1));
        assert_eq!(u.leave_to(), None);
        to_first.take_socket();
        assert_eq!(to_first.flush(), super::super::Flushed::All);
        assert_eq!(first.recv(&mut [0; 9]).unwrap(), 5);
        assert_eq!(second.send(b"frame").unwrap_err().raw_os_error(), Some(libc::EPERM));
        first.send(b"frame").unwrap();
        assert!(matches!(u.read(NOW, &mut [0; 9]), Sender::Known(PortId(1), 5)));
    }
}
