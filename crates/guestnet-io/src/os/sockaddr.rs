//! Theory of operation: socket addresses as the kernel reads and writes them.

// The storage is read and written as the structure that its family names.
#![allow(unsafe_code)]

use std::mem::{size_of, zeroed};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

/// Room for any socket address.
#[derive(Clone, Copy)]
pub(crate) struct RawAddr {
    pub storage: libc::sockaddr_storage,
    pub len: libc::socklen_t,
}

impl Default for RawAddr {
    fn default() -> Self {
        // SAFETY: sockaddr_storage is plain bytes; zero is AF_UNSPEC.
        RawAddr { storage: unsafe { zeroed() }, len: size_of::<libc::sockaddr_storage>() as u32 }
    }
}

impl RawAddr {
    /// Of an IP address and port.
    pub(crate) fn ip(addr: SocketAddr) -> RawAddr {
        let mut raw = RawAddr::default();
        match addr {
            SocketAddr::V4(a) => {
                let sin = libc::sockaddr_in {
                    sin_family: libc::AF_INET as u16,
                    sin_port: a.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(a.ip().octets()) },
                    sin_zero: [0; 8],
                };
                raw.put(sin);
            }
            SocketAddr::V6(a) => {
                let sin6 = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as u16,
                    sin6_port: a.port().to_be(),
                    sin6_flowinfo: a.flowinfo(),
                    sin6_addr: libc::in6_addr { s6_addr: a.ip().octets() },
                    sin6_scope_id: a.scope_id(),
                };
                raw.put(sin6);
            }
        }
        raw
    }

    /// Of a unix socket's path, or abstract name where it starts with NUL. `None` when too long.
    pub(crate) fn unix(path: &[u8]) -> Option<RawAddr> {
        let mut raw = RawAddr::default();
        // SAFETY: plain bytes.
        let mut sun: libc::sockaddr_un = unsafe { zeroed() };
        if path.is_empty() || path.len() >= sun.sun_path.len() {
            return None;
        }
        sun.sun_family = libc::AF_UNIX as u16;
        for (d, s) in sun.sun_path.iter_mut().zip(path) {
            *d = *s as libc::c_char;
        }
        raw.put(sun);
        let nul = usize::from(path.first() != Some(&0));
        raw.len = (std::mem::offset_of!(libc::sockaddr_un, sun_path) + path.len() + nul) as u32;
        Some(raw)
    }

    fn put<T: Copy>(&mut self, value: T) {
        const { assert!(size_of::<T>() <= size_of::<libc::sockaddr_storage>()) };
        // SAFETY: sockaddr_storage is at least as large (checked above) and aligned for every sockaddr.
        unsafe { (&raw mut self.storage).cast::<T>().write(value) };
        self.len = size_of::<T>() as u32;
    }

    pub(crate) fn as_ptr(&self) -> *const libc::sockaddr {
        (&raw const self.storage).cast()
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut libc::sockaddr {
        (&raw mut self.storage).cast()
    }

    /// The IP address in it.
    pub(crate) fn to_ip(self) -> Option<SocketAddr> {
        match i32::from(self.storage.ss_family) {
            libc::AF_INET if self.len as usize >= size_of::<libc::sockaddr_in>() => {
                // SAFETY: the family says what it is, and it is long enough.
                let a = unsafe { *(&raw const self.storage).cast::<libc::sockaddr_in>() };
                let ip = Ipv4Addr::from(a.sin_addr.s_addr.to_ne_bytes());
                Some(SocketAddrV4::new(ip, u16::from_be(a.sin_port)).into())
            }
            libc::AF_INET6 if self.len as usize >= size_of::<libc::sockaddr_in6>() => {
                // SAFETY: as above.
                let a = unsafe { *(&raw const self.storage).cast::<libc::sockaddr_in6>() };
                let ip = Ipv6Addr::from(a.sin6_addr.s6_addr);
                let port = u16::from_be(a.sin6_port);
                Some(match ip.to_ipv4_mapped() {
                    Some(v4) => SocketAddrV4::new(v4, port).into(),
                    None => SocketAddrV6::new(ip, port, a.sin6_flowinfo, a.sin6_scope_id).into(),
                })
            }
            _ => None,
        }
    }

    /// The path (or abstract name) in it; `None` for unnamed and for other families.
    pub(crate) fn to_path(self) -> Option<Vec<u8>> {
        let at = std::mem::offset_of!(libc::sockaddr_un, sun_path);
        let len = (self.len as usize).min(size_of::<libc::sockaddr_un>()).checked_sub(at)?;
        if i32::from(self.storage.ss_family) != libc::AF_UNIX || len == 0 {
            return None;
        }
        // SAFETY: the storage is at least as large as sockaddr_un, and `at + len` lies in it.
        let bytes =
            unsafe { std::slice::from_raw_parts((&raw const self.storage).cast::<u8>().add(at), len) };
        // The kernel counts the terminating NUL of a path; an abstract name starts with one.
        let end =
            if bytes.first() == Some(&0) { len } else { bytes.iter().position(|b| *b == 0).unwrap_or(len) };
        Some(bytes.get(..end)?.to_vec())
    }
}
