//! Theory of operation: one bound datagram socket on which many guests arrive, each known by the path that
//! its own socket is bound to (vfkit and its kin; QEMU's `-netdev dgram`). vfkit first sends the four bytes
//! `VFKT`, others begin with a frame; both are understood. The same magic from a known path is a guest that
//! started again, and so a new guest, a few times a second: it may be a frame that a guest made. Who has no
//! path cannot be answered and is refused.
//!
//! vfkit connects, so it hears only the very socket that it found at the path, and what it leaves unread
//! fills that socket's send buffer, for all guests on it. Therefore a socket that a guest of vfkit has come
//! to is left to that guest, and a new one takes its place at the path ([`Unixgram::replace`]).

use super::FRAME_MAX;
use super::dgram::{Dgram, set_buffers};
use crate::sys::{self, RawAddr};
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

/// The socket and who came.
pub(crate) struct Unixgram {
    pub fd: Arc<OwnedFd>,
    pub peers: HashMap<Vec<u8>, PortId>,
    /// Where guests find it. A socket that took another's place goes on giving the name that it was bound to.
    path: Option<Vec<u8>>,
    /// `VFKT` may come.
    magic: bool,
    /// Another socket has taken its place at the path.
    pub replaced: bool,
    /// The second at hand, and who started again in it.
    restarts: (u64, u32),
}

/// Who sent a datagram, and what it is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum From {
    /// A frame of this length by a known guest.
    Known(PortId, usize),
    /// Somebody new, with a frame of this length, or with none but the magic. The port is that of the guest
    /// that had the path before, and is over.
    New { path: Vec<u8>, frame: Option<usize>, old: Option<PortId> },
    /// Nothing that can be used.
    Refused,
    /// Nothing now.
    Empty,
    /// The socket is broken.
    Broken(i32),
}

impl Unixgram {
    pub(crate) fn new(fd: OwnedFd, magic: bool) -> Unixgram {
        set_buffers(&fd);
        let path = sys::local_addr(&fd).and_then(RawAddr::to_path).filter(|p| p.first() == Some(&b'/'));
        Unixgram { path, fd: Arc::new(fd), peers: HashMap::new(), magic, replaced: false, restarts: (0, 0) }
    }

    /// Reads one datagram to `buf`.
    pub(crate) fn read(&self, buf: &mut [u8]) -> From {
        let (n, addr) = match sys::recv_from(&self.fd, buf, libc::MSG_TRUNC) {
            Ok(r) => r,
            Err(e) if sys::would_block(e) => return From::Empty,
            // An earlier send to somebody who is gone.
            Err(libc::ECONNREFUSED | libc::ECONNRESET) => return From::Refused,
            Err(e) => return From::Broken(e),
        };
        let Some(path) = addr.to_path().filter(|_| n <= buf.len().min(FRAME_MAX)) else {
            return From::Refused;
        };
        let hello = self.magic && buf.get(..n) == Some(MAGIC);
        match self.peers.get(&path) {
            Some(port) if !hello => From::Known(*port, n),
            old => From::New { path, frame: (!hello).then_some(n), old: old.copied() },
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
        if !self.magic || self.replaced {
            return None;
        }
        let at = self.path.clone()?;
        let beside = [&at, &b".new"[..]].concat();
        let fd = sys::socket(libc::AF_UNIX, libc::SOCK_DGRAM, 0).ok()?;
        let (path, beside_path) = (Path::new(OsStr::from_bytes(&at)), Path::new(OsStr::from_bytes(&beside)));
        let mode = std::fs::metadata(path).ok()?.permissions();
        let to = RawAddr::unix(&beside)?;
        // What a guestnet left that was killed in between would stand in the way for ever.
        if sys::connect(&fd, &to) == Err(libc::ECONNREFUSED) {
            let _best_effort = std::fs::remove_file(beside_path);
        }
        // Bind takes the mode from here, so that at no time more are let in than at the old one.
        sys::set_mode(&fd, mode.mode());
        sys::bind(&fd, &to).ok()?;
        // In one step, so that nobody finds nothing there.
        let placed =
            std::fs::set_permissions(beside_path, mode).and_then(|()| std::fs::rename(beside_path, path));
        if placed.is_err() {
            let _left = std::fs::remove_file(beside_path);
            return None;
        }
        Some(Unixgram { path: Some(at), ..Unixgram::new(fd, true) })
    }

    /// The attachment of a guest.
    pub(crate) fn attach(&self, path: &[u8]) -> Option<Dgram> {
        Some(Dgram::peer(Arc::clone(&self.fd), Some(RawAddr::unix(path)?)))
    }

    /// Guests whose sockets nobody has open any more.
    pub(crate) fn gone(&self) -> Vec<(Vec<u8>, PortId)> {
        let Ok(probe) = sys::socket(libc::AF_UNIX, libc::SOCK_DGRAM, 0) else { return Vec::new() };
        let dead = |path: &[u8]| {
            // A connect sends nothing, but it fails for a path without a socket. EPERM is a socket that is
            // connected elsewhere, and so alive.
            RawAddr::unix(path).is_none_or(|a| {
                matches!(sys::connect(&probe, &a), Err(libc::ECONNREFUSED | libc::ENOENT | libc::ENOTDIR))
            })
        };
        self.peers.iter().filter(|(path, _)| dead(path)).map(|(path, port)| (path.clone(), *port)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn the_next_socket_is_for_the_same_users_whatever_was_left_beside_it() {
        let dir = std::env::temp_dir().join(format!("guestnet-unixgram-next-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (path, beside) = (dir.join("s"), dir.join("s.new"));
        let s = UnixDatagram::bind(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        drop(UnixDatagram::bind(&beside).unwrap());
        let u = Unixgram::new(s.into(), true);
        // A third in the place of the second too.
        let second = u.replace().unwrap();
        let third = second.replace().unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let guest = UnixDatagram::bind(dir.join("guest")).unwrap();
        guest.send_to(b"x", &path).unwrap();
        assert!(matches!(second.read(&mut [0; 4]), From::Empty));
        assert!(matches!(third.read(&mut [0; 4]), From::New { .. }));
        // Somebody's socket that is in use stays.
        let _others = UnixDatagram::bind(&beside).unwrap();
        assert!(third.replace().is_none());
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn knows_guests_by_their_path() {
        let dir = std::env::temp_dir().join(format!("guestnet-unixgram-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = |n: &str| dir.join(n);
        for n in ["s", "a", "b"] {
            let _none = std::fs::remove_file(path(n));
        }
        let s = UnixDatagram::bind(path("s")).unwrap();
        let mut u = Unixgram::new(s.into(), true);
        let a = UnixDatagram::bind(path("a")).unwrap();
        let b = UnixDatagram::bind(path("b")).unwrap();
        for x in [&a, &b] {
            x.connect(path("s")).unwrap();
        }
        let mut buf = [0; 100];
        assert_eq!(u.read(&mut buf), From::Empty);
        a.send(MAGIC).unwrap();
        let From::New { path: pa, frame: None, old: None } = u.read(&mut buf) else { panic!() };
        u.peers.insert(pa.clone(), PortId(1));
        b.send(b"frame").unwrap();
        let From::New { path: pb, frame: Some(5), old: None } = u.read(&mut buf) else { panic!() };
        u.peers.insert(pb, PortId(2));
        a.send(b"VFKTx").unwrap();
        assert_eq!(u.read(&mut buf), From::Known(PortId(1), 5));
        a.send(MAGIC).unwrap();
        assert_eq!(u.read(&mut buf), From::New { path: pa.clone(), frame: None, old: Some(PortId(1)) });
        let unnamed = UnixDatagram::unbound().unwrap();
        unnamed.send_to(b"who?", path("s")).unwrap();
        assert_eq!(u.read(&mut buf), From::Refused);
        b.send(&[0; 101]).unwrap();
        assert_eq!(u.read(&mut buf), From::Refused);
        // A guest is answered through the shared socket, which is all that its connected socket hears.
        let mut d = u.attach(&pa).unwrap();
        d.push(b"he", b"llo");
        assert_eq!(d.flush(), super::super::Flushed::All);
        assert_eq!((a.recv(&mut buf).unwrap(), &buf[..5]), (5, &b"hello"[..]));
        assert_eq!(u.gone(), []);
        drop(a);
        assert_eq!(u.gone(), [(pa, PortId(1))]);
        std::fs::remove_dir_all(dir).unwrap();
    }
}
