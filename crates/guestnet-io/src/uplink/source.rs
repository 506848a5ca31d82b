//! Theory of operation: where flows to the outside leave from, if the owner has chosen: an address of the host, or
//! an interface. Each socket is bound before its first packet. If the address or the interface is gone, or the
//! destination is of the other family, the socket is not made and the guest is told that the network is
//! unreachable; no flow leaves from another address instead. Sockets that only talk to the host's own loopback are not
//! bound: their packets do not leave the host, and local services often accept local addresses alone.

use crate::os::sockaddr::RawAddr;
use crate::os::sys;
use guestnet_core::effects::SockError;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

/// The longest name of an interface.
const NAME_MAX: usize = 15;

/// Where flows leave from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Source {
    /// Wherever the host's routes say.
    #[default]
    Routed,
    /// An address of the host.
    Address(IpAddr),
    /// An interface of the host.
    Interface(Box<str>),
}

impl Source {
    /// Whether the host has it now, and this process may use it.
    ///
    /// # Errors
    /// Says what is wrong, in the words of the system.
    pub fn check(&self) -> Result<(), std::io::Error> {
        let family = match self {
            Source::Routed => return Ok(()),
            Source::Address(IpAddr::V6(_)) => libc::AF_INET6,
            Source::Address(IpAddr::V4(_)) | Source::Interface(_) => libc::AF_INET,
        };
        let fd = sys::socket(family, libc::SOCK_DGRAM, 0).map_err(std::io::Error::from_raw_os_error)?;
        self.bind_errno(&fd).map_err(std::io::Error::from_raw_os_error)
    }

    /// Binds a socket that is to send to `like`, or to others of its family. A loopback `like` means that the socket
    /// sends to loopback addresses alone.
    pub(crate) fn bind(&self, fd: &OwnedFd, like: IpAddr) -> Result<(), SockError> {
        match self {
            Source::Routed => Ok(()),
            _ if like.is_loopback() => Ok(()),
            Source::Address(ip) if ip.is_ipv4() != like.is_ipv4() => Err(SockError::NetUnreachable),
            _ => self.bind_errno(fd).map_err(|e| match e {
                libc::ENODEV => SockError::NetUnreachable,
                e => sys::sock_error(e),
            }),
        }
    }

    fn bind_errno(&self, fd: &OwnedFd) -> Result<(), i32> {
        match self {
            Source::Routed => Ok(()),
            Source::Address(ip) => {
                // The port is chosen when the destination is known, so that many connections can share one. Without
                // the option a connection takes a port for itself.
                let _best_effort = sys::set_opt(fd, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1);
                sys::bind(fd, &RawAddr::ip(SocketAddr::new(*ip, 0)))
            }
            Source::Interface(name) if name.is_empty() || name.len() > NAME_MAX => Err(libc::ENODEV),
            Source::Interface(name) => sys::bind_to_device(fd, name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// linux/socket.h.
    const SO_BINDTOIFINDEX: i32 = 62;

    fn socket(v6: bool) -> OwnedFd {
        let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
        sys::socket(family, libc::SOCK_DGRAM, 0).unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_socket_is_bound_to_the_address() {
        let (fd, source) = (socket(false), Source::Address(ip("127.0.0.9")));
        source.check().unwrap();
        source.bind(&fd, ip("203.0.113.7")).unwrap();
        assert_eq!(sys::local_addr(&fd).and_then(RawAddr::to_ip).unwrap().ip(), ip("127.0.0.9"));
    }

    #[test]
    fn what_goes_to_loopback_is_not_bound() {
        for source in [Source::Address(ip("192.0.2.77")), Source::Interface("none0".into())] {
            assert_eq!(source.bind(&socket(false), ip("127.0.0.1")), Ok(()));
            assert_eq!(source.bind(&socket(true), ip("::1")), Ok(()));
        }
    }

    #[test]
    fn an_address_or_interface_that_the_host_has_not_is_an_error_and_not_another_one() {
        // The documentation's addresses are nobody's.
        for source in [Source::Address(ip("192.0.2.77")), Source::Interface("none0".into())] {
            assert!(source.check().is_err(), "{source:?}");
            assert_eq!(source.bind(&socket(false), ip("203.0.113.7")), Err(SockError::NetUnreachable));
        }
        for name in ["", "a-name-that-is-too-long"] {
            let source = Source::Interface(name.into());
            assert_eq!(source.bind(&socket(false), ip("203.0.113.7")), Err(SockError::NetUnreachable));
        }
    }

    #[test]
    fn the_other_family_has_no_way_out() {
        let source = Source::Address(ip("127.0.0.9"));
        assert_eq!(source.bind(&socket(true), ip("2001:db8::1")), Err(SockError::NetUnreachable));
        assert_eq!(Source::Routed.bind(&socket(true), ip("2001:db8::1")), Ok(()));
    }

    #[test]
    fn a_socket_is_bound_to_the_interface() {
        let (fd, source) = (socket(false), Source::Interface("lo".into()));
        source.check().unwrap();
        source.bind(&fd, ip("203.0.113.7")).unwrap();
        // The loopback interface is the first of every network namespace.
        assert_eq!(sys::get_opt(&fd, libc::SOL_SOCKET, SO_BINDTOIFINDEX), Ok(1));
    }
}
