//! Theory of operation: the few system calls that the workers need, each once, with its errors as `errno`
//! numbers and its pointers checked here, so that the rest of the crate deals in slices and descriptors.

// System calls take raw pointers.
#![allow(unsafe_code)]

use crate::os::cmsg::{self};
use crate::os::sockaddr::RawAddr;
use guestnet_core::effects::SockError;
use guestnet_core::types::Time;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Turns the -1 of a system call into its errno.
pub(crate) fn check(ret: libc::c_int) -> Result<libc::c_int, i32> {
    if ret < 0 { Err(errno()) } else { Ok(ret) }
}

/// As [`check`], for calls that return a length.
pub(crate) fn check_len(ret: isize) -> Result<usize, i32> {
    usize::try_from(ret).map_err(|_| errno())
}

/// errno of the call that failed last on this thread.
pub(crate) fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

/// What `errno` means, in the system's words alone: `io::Error` adds its number.
pub(crate) fn errno_text(errno: i32) -> String {
    let text = io::Error::from_raw_os_error(errno).to_string();
    match text.rfind(" (os error ") {
        Some(end) => text[..end].to_string(),
        None => text,
    }
}

/// What `error` says, without the number that a system's error has.
#[must_use]
pub fn error_text(error: &io::Error) -> String {
    error.raw_os_error().map_or_else(|| error.to_string(), errno_text)
}

/// True for "not now".
pub(crate) fn would_block(e: i32) -> bool {
    e == libc::EAGAIN || e == libc::EWOULDBLOCK || e == libc::EINTR
}

/// True when the process or the host is out of descriptors or memory for them.
pub(crate) fn exhausted(e: i32) -> bool {
    matches!(e, libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS)
}

/// What guests can be told of an errno.
pub(crate) fn sock_error(e: i32) -> SockError {
    match e {
        libc::ECONNREFUSED | libc::ENOENT => SockError::Refused,
        libc::ECONNRESET | libc::EPIPE | libc::ECONNABORTED | libc::ENOTCONN => SockError::Reset,
        libc::ENETUNREACH | libc::ENETDOWN | libc::EADDRNOTAVAIL => SockError::NetUnreachable,
        libc::EHOSTUNREACH | libc::EHOSTDOWN => SockError::HostUnreachable,
        libc::ETIMEDOUT => SockError::TimedOut,
        libc::EACCES | libc::EPERM => SockError::Prohibited,
        libc::EMSGSIZE => SockError::MessageTooBig(0),
        e if exhausted(e) => SockError::Exhausted,
        e => SockError::Other(e),
    }
}

/// Monotonic time.
pub(crate) fn now() -> Time {
    // SAFETY: a timespec is plain numbers.
    let mut ts: libc::timespec = unsafe { zeroed() };
    // SAFETY: the pointer is to a live timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut ts) };
    Time((ts.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(ts.tv_nsec as u64))
}

/// Lets others run that want this processor; returns at once when there are none.
pub(crate) fn yield_now() {
    // SAFETY: no pointers; it does not fail on Linux.
    unsafe { libc::sched_yield() };
}

/// Takes ownership of a descriptor that a system call has just made.
fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the caller got it from the kernel this moment, so nobody else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A non-blocking, close-on-exec socket.
pub(crate) fn socket(family: i32, kind: i32, protocol: i32) -> Result<OwnedFd, i32> {
    // SAFETY: no pointers.
    check(unsafe { libc::socket(family, kind | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, protocol) })
        .map(owned)
}

/// An eventfd, non-blocking, close-on-exec.
pub(crate) fn eventfd() -> Result<OwnedFd, i32> {
    // SAFETY: no pointers.
    check(unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) }).map(owned)
}

/// Makes an eventfd readable.
pub(crate) fn eventfd_signal(fd: &OwnedFd) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: eight bytes are readable. It can only fail when the counter is full, and then it is readable.
    unsafe { libc::write(fd.as_raw_fd(), one.as_ptr().cast(), one.len()) };
}

/// Takes what is in an eventfd.
pub(crate) fn eventfd_clear(fd: &OwnedFd) {
    let mut count = [0u8; 8];
    // SAFETY: eight bytes are writable. It fails when there is nothing, which is as well.
    unsafe { libc::read(fd.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
}

/// Makes a descriptor that came from outside non-blocking and close-on-exec.
pub(crate) fn adopt(fd: &OwnedFd) -> Result<(), i32> {
    let raw = fd.as_raw_fd();
    // SAFETY: no pointers.
    let flags = check(unsafe { libc::fcntl(raw, libc::F_GETFL) })?;
    // SAFETY: no pointers.
    check(unsafe { libc::fcntl(raw, libc::F_SETFL, flags | libc::O_NONBLOCK) })?;
    // SAFETY: no pointers.
    check(unsafe { libc::fcntl(raw, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    Ok(())
}

/// A descriptor of our own for what `fd` names, so that its owner may close theirs when they like. This is
/// how the control side hands over what it holds by number.
///
/// # Errors
/// EBADF when `fd` is not open, EMFILE when there is no room for another.
pub fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let new =
        check(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) }).map_err(io::Error::from_raw_os_error)?;
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}

/// Sets an integer option.
pub(crate) fn set_opt(fd: &OwnedFd, level: i32, name: i32, value: i32) -> Result<(), i32> {
    let len = size_of::<i32>() as libc::socklen_t;
    // SAFETY: `value` lives and is `len` bytes.
    check(unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const value).cast(), len) })
        .map(|_| ())
}

/// Reads an integer option.
pub(crate) fn get_opt(fd: &OwnedFd, level: i32, name: i32) -> Result<i32, i32> {
    let mut value: i32 = 0;
    let mut len = size_of::<i32>() as libc::socklen_t;
    // SAFETY: `value` lives and is `len` bytes.
    check(unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, (&raw mut value).cast(), &mut len) })?;
    Ok(value)
}

/// Parts of TCP_INFO.
pub(crate) struct TcpInfo {
    /// Segments sent and not acknowledged.
    pub unacked: u32,
    /// Bytes never sent.
    pub unsent: u32,
    /// Segments received, those without data too.
    pub segments_in: u32,
}

/// What the kernel knows of a connection. `None` where it does not tell all of it (before Linux 4.6).
#[cfg(target_os = "linux")]
pub(crate) fn tcp_info(fd: &OwnedFd) -> Option<TcpInfo> {
    // struct tcp_info of linux/tcp.h, to which fields are only ever appended; libc has no more than the first.
    const UNACKED: usize = 24;
    const SEGMENTS_IN: usize = 140;
    const UNSENT: usize = 144;
    let mut info = [0u8; UNSENT + 4];
    let mut len = info.len() as libc::socklen_t;
    // SAFETY: `info` lives and is `len` bytes.
    check(unsafe {
        let value = info.as_mut_ptr().cast();
        libc::getsockopt(fd.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, value, &mut len)
    })
    .ok()?;
    let at = |at: usize| info.get(..len as usize)?.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
    Some(TcpInfo { unacked: at(UNACKED)?, unsent: at(UNSENT)?, segments_in: at(SEGMENTS_IN)? })
}

/// What the kernel knows of a connection: nothing is asked here.
#[cfg(not(target_os = "linux"))]
pub(crate) fn tcp_info(_: &OwnedFd) -> Option<TcpInfo> {
    None
}

/// Bytes of memory that a socket holds: received, to be sent, and not yet looked at. `None` where the system does not
/// tell.
pub(crate) fn socket_memory(fd: &OwnedFd) -> Option<usize> {
    // SK_MEMINFO_RMEM_ALLOC, _WMEM_QUEUED and _BACKLOG of linux/sock_diag.h.
    const SO_MEMINFO: i32 = 55;
    const PARTS: [usize; 3] = [0, 5, 7];
    let mut info = [0u32; 9];
    let mut len = size_of_val(&info) as libc::socklen_t;
    // SAFETY: `info` lives and is `len` bytes.
    check(unsafe {
        let value = info.as_mut_ptr().cast();
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, SO_MEMINFO, value, &mut len)
    })
    .ok()?;
    Some(PARTS.iter().filter_map(|i| info.get(*i)).map(|n| *n as usize).sum())
}

/// Bytes that all TCP sockets of the host may hold before the kernel presses them, about.
pub(crate) fn tcp_memory() -> usize {
    // Of a network namespace there is no tcp_mem; where nobody changed it, it is a sixteenth of the memory.
    let all = memory_of_machine().unwrap_or(1 << 30) / 16;
    let set = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_mem").ok();
    let pages = set.as_deref().and_then(|s| s.split_whitespace().nth(1)).and_then(|p| p.parse::<u64>().ok());
    let most = pages.map_or(all, |p| p.saturating_mul(page_size()).min(all));
    usize::try_from(most).unwrap_or(usize::MAX)
}

/// Lets a socket have only what a classic BPF program says (socket(7)).
pub(crate) fn attach_filter(fd: &OwnedFd, program: &mut [libc::sock_filter]) -> Result<(), i32> {
    let prog = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    let len = size_of::<libc::sock_fprog>() as libc::socklen_t;
    // SAFETY: `prog` lives, is `len` bytes and points to as many instructions as it says.
    check(unsafe {
        let value = (&raw const prog).cast();
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, value, len)
    })
    .map(|_| ())
}

/// Makes `close` send a reset.
pub(crate) fn set_abort(fd: &OwnedFd) {
    let l = libc::linger { l_onoff: 1, l_linger: 0 };
    let len = size_of::<libc::linger>() as libc::socklen_t;
    // SAFETY: `l` lives and is `len` bytes. Where it fails the close is an ordinary one.
    unsafe {
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, (&raw const l).cast(), len)
    };
}

/// SO_ERROR, cleared by reading; 0 for none.
pub(crate) fn take_error(fd: &OwnedFd) -> i32 {
    get_opt(fd, libc::SOL_SOCKET, libc::SO_ERROR).unwrap_or_else(|e| e)
}

/// send(2), without SIGPIPE.
pub(crate) fn send(fd: &impl AsRawFd, data: &[u8]) -> Result<usize, i32> {
    // SAFETY: the slice is readable.
    check_len(unsafe {
        libc::send(fd.as_raw_fd(), data.as_ptr().cast(), data.len(), libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT)
    })
}

/// recv(2) with flags; never waits.
pub(crate) fn recv(fd: &OwnedFd, buf: &mut [u8], flags: i32) -> Result<usize, i32> {
    // SAFETY: the slice is writable.
    check_len(unsafe {
        libc::recv(fd.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len(), flags | libc::MSG_DONTWAIT)
    })
}

/// Throws `len` bytes of a TCP socket's unread data away without copying them.
pub(crate) fn recv_discard(fd: &OwnedFd, len: usize) -> Result<usize, i32> {
    // SAFETY: with MSG_TRUNC TCP writes nothing to the buffer, which may be null (tcp(7)).
    check_len(unsafe {
        libc::recv(fd.as_raw_fd(), std::ptr::null_mut(), len, libc::MSG_TRUNC | libc::MSG_DONTWAIT)
    })
}

/// read(2).
pub(crate) fn read(fd: &OwnedFd, buf: &mut [u8]) -> Result<usize, i32> {
    // SAFETY: the slice is writable.
    check_len(unsafe { libc::read(fd.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len()) })
}

/// writev(2) of up to four parts.
pub(crate) fn writev(fd: &impl AsRawFd, parts: &[&[u8]]) -> Result<usize, i32> {
    let (iov, n) = io_vec(parts);
    // SAFETY: the first `n` entries describe live slices.
    check_len(unsafe { libc::writev(fd.as_raw_fd(), iov.as_ptr(), n as i32) })
}

/// An iovec of up to four parts, and how many it has.
pub(crate) fn io_vec(parts: &[&[u8]]) -> ([libc::iovec; 4], usize) {
    let mut iov = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; 4];
    for (v, p) in iov.iter_mut().zip(parts) {
        *v = libc::iovec { iov_base: p.as_ptr().cast_mut().cast(), iov_len: p.len() };
    }
    (iov, parts.len().min(4))
}

/// connect(2).
pub(crate) fn connect(fd: &impl AsRawFd, to: &RawAddr) -> Result<(), i32> {
    // SAFETY: the address lives and has that length.
    check(unsafe { libc::connect(fd.as_raw_fd(), to.as_ptr(), to.len) }).map(|_| ())
}

/// fchmod(2) of a socket that is not bound yet: the mode of what bind makes, less the umask.
pub(crate) fn set_mode(fd: &OwnedFd, mode: u32) {
    // SAFETY: plain numbers.
    let _best_effort = unsafe { libc::fchmod(fd.as_raw_fd(), (mode & 0o777) as libc::mode_t) };
}

/// bind(2).
pub(crate) fn bind(fd: &OwnedFd, to: &RawAddr) -> Result<(), i32> {
    // SAFETY: the address lives and has that length.
    check(unsafe { libc::bind(fd.as_raw_fd(), to.as_ptr(), to.len) }).map(|_| ())
}

/// Has a socket send and receive through one interface alone. Needs no privilege if it was not bound to one before
/// (Linux 5.7).
pub(crate) fn bind_to_device(fd: &OwnedFd, name: &str) -> Result<(), i32> {
    let (level, option) = (libc::SOL_SOCKET, libc::SO_BINDTODEVICE);
    let len = name.len() as libc::socklen_t;
    // SAFETY: as many bytes of the name as are said can be read.
    check(unsafe { libc::setsockopt(fd.as_raw_fd(), level, option, name.as_ptr().cast(), len) }).map(drop)
}

/// accept4(2): a non-blocking, close-on-exec connection and who it is from.
pub(crate) fn accept(fd: &OwnedFd) -> Result<(OwnedFd, RawAddr), i32> {
    let mut from = RawAddr::default();
    // SAFETY: the address is writable and `len` says how long it is.
    let new = check(unsafe {
        libc::accept4(
            fd.as_raw_fd(),
            from.as_mut_ptr(),
            &mut from.len,
            libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
        )
    })?;
    Ok((owned(new), from))
}

/// The socket's own address.
pub(crate) fn local_addr(fd: &OwnedFd) -> Option<RawAddr> {
    let mut a = RawAddr::default();
    // SAFETY: the address is writable and `len` says how long it is.
    check(unsafe { libc::getsockname(fd.as_raw_fd(), a.as_mut_ptr(), &mut a.len) }).ok()?;
    Some(a)
}

/// recvmsg(2) of one datagram: its length, where it is from, and the user who sent it, which the kernel says of
/// a socket with SO_PASSCRED.
pub(crate) fn recv_from_user(
    fd: &OwnedFd,
    buf: &mut [u8],
    flags: i32,
) -> Result<(usize, RawAddr, Option<u32>), i32> {
    // Room for the user and nothing else, so that descriptors that come along are closed by the kernel.
    #[repr(C, align(8))]
    struct Room([u8; CREDENTIALS]);
    // SAFETY: CMSG_SPACE is arithmetic.
    const CREDENTIALS: usize = unsafe { libc::CMSG_SPACE(size_of::<libc::ucred>() as u32) } as usize;
    let mut control = Room([0; CREDENTIALS]);
    let mut from = RawAddr::default();
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    let mut msg = cmsg::msghdr();
    msg.msg_name = from.as_mut_ptr().cast();
    msg.msg_namelen = from.len;
    msg.msg_iov = &raw mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control.0.as_mut_ptr().cast();
    msg.msg_controllen = control.0.len() as _;
    // SAFETY: buffer, address and control buffer are writable, live until it returns, and their lengths are given.
    let n = check_len(unsafe {
        libc::recvmsg(fd.as_raw_fd(), &mut msg, flags | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC)
    })?;
    from.len = msg.msg_namelen;
    let mut uid = None;
    cmsg::for_each(&msg, |level, kind, data| {
        if (level, kind) == (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) {
            // struct ucred { pid, uid, gid }.
            uid = data.get(4..).and_then(cmsg::as_i32).map(|uid| uid as u32);
        }
    });
    Ok((n, from, uid))
}

/// The file that a path names, without following a link in its last part, and what it is. The descriptor stands
/// for it even when the path leads elsewhere later.
pub(crate) fn open_path(path: &[u8]) -> Result<(OwnedFd, libc::stat), i32> {
    let path = std::ffi::CString::new(path).map_err(|_| libc::EINVAL)?;
    // SAFETY: the path lives and ends with NUL.
    let fd = check(unsafe { libc::open(path.as_ptr(), libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC) })
        .map(owned)?;
    // SAFETY: a stat is plain numbers.
    let mut stat: libc::stat = unsafe { zeroed() };
    // SAFETY: the struct lives.
    check(unsafe { libc::fstat(fd.as_raw_fd(), &mut stat) })?;
    Ok((fd, stat))
}

/// A path that leads to what `fd` stands for.
pub(crate) fn path_of(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// What a path names now, as stat(2) says it without following a link in its last part.
pub(crate) fn stat(path: &[u8]) -> Result<libc::stat, i32> {
    let path = std::ffi::CString::new(path).map_err(|_| libc::EINVAL)?;
    // SAFETY: a stat is plain numbers.
    let mut stat: libc::stat = unsafe { zeroed() };
    // SAFETY: the path lives and ends with NUL, and the struct lives.
    check(unsafe { libc::lstat(path.as_ptr(), &mut stat) })?;
    Ok(stat)
}

/// The user whose rights the process has.
pub(crate) fn own_user() -> u32 {
    // SAFETY: no pointers; it does not fail.
    unsafe { libc::geteuid() }
}

/// sendto(2).
pub(crate) fn send_to(fd: &OwnedFd, data: &[u8], to: &RawAddr) -> Result<usize, i32> {
    // SAFETY: slice and address are readable and their lengths are given.
    check_len(unsafe {
        libc::sendto(
            fd.as_raw_fd(),
            data.as_ptr().cast(),
            data.len(),
            libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
            to.as_ptr(),
            to.len,
        )
    })
}

/// Blocks all signals for the calling thread: they are the control side's. Those of the thread's own faults
/// stay, since one that is blocked ends the process.
pub(crate) fn block_signals() {
    // SAFETY: a sigset_t is plain numbers, filled in by sigfillset.
    unsafe {
        let mut set: libc::sigset_t = zeroed();
        libc::sigfillset(&mut set);
        for fault in [libc::SIGBUS, libc::SIGSEGV, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP] {
            libc::sigdelset(&mut set, fault);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
    }
}

/// struct __user_cap_header_struct and __user_cap_data_struct of linux/capability.h.
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilitySet {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// Drops the calling thread's capabilities but those of `keep`, a bit for each number.
pub(crate) fn limit_capabilities(keep: u64) -> Result<(), i32> {
    let mut header = CapabilityHeader { version: CAPABILITY_VERSION_3, pid: 0 };
    let mut sets = [CapabilitySet::default(); 2];
    // SAFETY: version 3 has a header and two sets, which live; the kernel writes no more.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) } as i32)?;
    for (set, keep) in sets.iter_mut().zip([keep as u32, (keep >> 32) as u32]) {
        let left = set.permitted & keep;
        *set = CapabilitySet { effective: left, permitted: left, inheritable: 0 };
    }
    // SAFETY: as above; the kernel only reads.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()) } as i32).map(|_| ())
}

/// A system call with `first` and -1 for its other arguments, for tests of what is refused: 0 or its errno.
#[cfg(test)]
pub(crate) fn raw_call(number: i64, first: i64) -> i32 {
    // SAFETY: it is refused before it is looked at; else -1 is no address, length, descriptor or flag of a call.
    let result = unsafe { libc::syscall(number, first, -1_i64, -1_i64, -1_i64, -1_i64, -1_i64) };
    if result == -1 { io::Error::last_os_error().raw_os_error().unwrap_or(0) } else { 0 }
}

/// Sends FIN. It fails when the connection is over, and then there is nothing to do.
pub(crate) fn shutdown_write(fd: &OwnedFd) {
    // SAFETY: no pointers.
    unsafe { libc::shutdown(fd.as_raw_fd(), libc::SHUT_WR) };
}

/// Which of `events` are there now.
pub(crate) fn poll_now(fd: &OwnedFd, events: i16) -> i16 {
    let mut p = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    // SAFETY: one live pollfd.
    unsafe { libc::poll(&mut p, 1, 0) };
    p.revents
}

/// Lets the process have as many descriptors as it is allowed to: every relayed connection is one. Returns how
/// many that are.
pub(crate) fn raise_descriptor_limit() -> u32 {
    let mut l = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the struct lives. Where either call fails the limit stays what it is.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut l) == 0 && l.rlim_cur < l.rlim_max {
            l.rlim_cur = l.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &l);
        }
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut l) < 0 {
            return 1024;
        }
    }
    u32::try_from(l.rlim_cur).unwrap_or(u32::MAX)
}

/// How often this thread has slept of its own accord: for what it waited for, not for the processor.
pub(crate) fn times_slept() -> i64 {
    // SAFETY: a rusage is plain numbers.
    let mut usage: libc::rusage = unsafe { zeroed() };
    // SAFETY: the struct is writable.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &mut usage) };
    usage.ru_nvcsw
}

/// Two connected sockets that keep the bounds of packets, close-on-exec. They wait.
pub(crate) fn packet_pair() -> Result<(OwnedFd, OwnedFd), i32> {
    let mut pair = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: room for two descriptors.
    check(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, pair.as_mut_ptr()) })?;
    let [a, b] = pair;
    Ok((owned(a), owned(b)))
}

/// Bytes of address space that the process may have; `None`: as much as there is.
pub(crate) fn address_space_limit() -> Option<u64> {
    let mut l = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the struct lives.
    let got = unsafe { libc::getrlimit(libc::RLIMIT_AS, &mut l) };
    (got == 0 && l.rlim_cur != libc::RLIM_INFINITY).then_some(l.rlim_cur)
}

/// Bytes of a page.
pub(crate) fn page_size() -> u64 {
    // SAFETY: no pointers.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// Bytes of memory of this machine.
pub(crate) fn memory_of_machine() -> Option<u64> {
    // SAFETY: no pointers.
    let pages = u64::try_from(unsafe { libc::sysconf(libc::_SC_PHYS_PAGES) }).ok()?;
    pages.checked_mul(page_size())
}

/// Opens the file behind a descriptor of somebody else's once more, for reading and writing: position and flags of
/// the new description are ours alone.
pub(crate) fn open_again(fd: &OwnedFd) -> Result<OwnedFd, i32> {
    let path = format!("/proc/self/fd/{}\0", fd.as_raw_fd());
    // SAFETY: the path ends with NUL.
    check(unsafe { libc::open(path.as_ptr().cast(), libc::O_RDWR | libc::O_CLOEXEC | libc::O_NONBLOCK) })
        .map(owned)
}

/// True when there is data in a file from byte `from` on, and before byte `to`. What was never written is a hole.
pub(crate) fn has_data(fd: &OwnedFd, from: u64, to: u64) -> bool {
    let Ok(from) = libc::off_t::try_from(from) else { return false };
    // SAFETY: no pointers.
    let found = unsafe { libc::lseek(fd.as_raw_fd(), from, libc::SEEK_DATA) };
    match u64::try_from(found) {
        Ok(found) => found < to,
        // Behind the last data. Where the file cannot tell, there is data.
        Err(_) => errno() != libc::ENXIO,
    }
}

/// True when the next byte of a TCP socket is one that the peer sent as urgent (sockatmark(3)).
pub(crate) fn at_mark(fd: &OwnedFd) -> bool {
    const SIOCATMARK: u32 = 0x8905;
    let mut at: libc::c_int = 0;
    // SAFETY: the pointer is to a live int.
    let asked = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCATMARK as _, &raw mut at) };
    asked == 0 && at != 0
}

/// Sends with MSG_OOB: the last byte is urgent.
pub(crate) fn send_urgent(fd: &OwnedFd, data: &[u8]) -> Result<usize, i32> {
    let flags = libc::MSG_OOB | libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: the slice is readable.
    check_len(unsafe { libc::send(fd.as_raw_fd(), data.as_ptr().cast(), data.len(), flags) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_errors_have_no_numbers() {
        assert_eq!(errno_text(libc::ECONNRESET), "Connection reset by peer");
        assert_eq!(error_text(&io::Error::from_raw_os_error(libc::EMFILE)), "Too many open files");
        assert_eq!(error_text(&io::Error::other("it (os error 5) is quoted")), "it (os error 5) is quoted");
    }
}
