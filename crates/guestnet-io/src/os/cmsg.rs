//! Theory of operation: control messages of sendmsg(2) and recvmsg(2).

// Control messages are walked by pointers.
#![allow(unsafe_code)]

use std::mem::{MaybeUninit, size_of};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Space for control messages, aligned for their headers.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub(crate) struct Control(pub [u8; 256]);

impl Control {
    pub(crate) const EMPTY: Control = Control([0; 256]);
}

/// Calls `each(level, type, data)` for every control message of `msg`, whose control buffer must live.
pub(crate) fn for_each(msg: &libc::msghdr, mut each: impl FnMut(i32, i32, &[u8])) {
    // SAFETY: the kernel wrote `msg_controllen` bytes of well-formed control messages to the buffer.
    let mut c = unsafe { libc::CMSG_FIRSTHDR(msg) };
    while !c.is_null() {
        // SAFETY: `c` points to a header inside the buffer; its length covers header and data.
        unsafe {
            let head = libc::CMSG_LEN(0) as usize;
            let len = ((*c).cmsg_len as usize).saturating_sub(head);
            each((*c).cmsg_level, (*c).cmsg_type, std::slice::from_raw_parts(libc::CMSG_DATA(c), len));
            c = libc::CMSG_NXTHDR(msg, c);
        }
    }
}

/// Writes one control message at `at` of `control`; returns the end of it.
pub(crate) fn put<T: Copy>(control: &mut Control, at: usize, level: i32, kind: i32, value: T) -> usize {
    let size = size_of::<T>() as u32;
    // SAFETY: CMSG_SPACE is arithmetic.
    let space = unsafe { libc::CMSG_SPACE(size) } as usize;
    if at + space > control.0.len() || !at.is_multiple_of(8) {
        return at;
    }
    // SAFETY: `at` is aligned for cmsghdr, and header and data fit (checked above).
    unsafe {
        let c = control.0.as_mut_ptr().add(at).cast::<libc::cmsghdr>();
        (*c).cmsg_level = level;
        (*c).cmsg_type = kind;
        (*c).cmsg_len = libc::CMSG_LEN(size) as _;
        libc::CMSG_DATA(c).cast::<T>().write_unaligned(value);
    }
    at + space
}

/// An empty msghdr.
pub(crate) fn msghdr() -> libc::msghdr {
    // SAFETY: null pointers and zero lengths are an empty message.
    unsafe { MaybeUninit::<libc::msghdr>::zeroed().assume_init() }
}

/// Reads a native i32 from the front of a control message.
pub(crate) fn as_i32(data: &[u8]) -> Option<i32> {
    data.get(..4)?.try_into().ok().map(i32::from_ne_bytes)
}

/// The address of an in_pktinfo or in6_pktinfo.
pub(crate) fn pktinfo_addr(level: i32, kind: i32, data: &[u8]) -> Option<IpAddr> {
    match (level, kind) {
        // struct in_pktinfo { ifindex, spec_dst, addr }: spec_dst is the local address to answer from.
        (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
            let a: [u8; 4] = data.get(4..8)?.try_into().ok()?;
            Some(Ipv4Addr::from(a).into())
        }
        (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
            let a: [u8; 16] = data.get(..16)?.try_into().ok()?;
            let ip = Ipv6Addr::from(a);
            Some(ip.to_ipv4_mapped().map_or(IpAddr::V6(ip), IpAddr::V4))
        }
        _ => None,
    }
}
