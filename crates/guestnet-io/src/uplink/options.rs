//! Theory of operation: options of the sockets that carry traffic of guests: TTL, traffic class, fragments, the error queue, merging. None is
//! worth refusing a flow for.

use crate::os::sys;
use std::os::fd::OwnedFd;

pub(crate) const SOL_UDP: i32 = 17;
pub(crate) const UDP_GRO: i32 = 104;

/// Sets the TTL or hop limit of what a socket sends.
pub(crate) fn set_ttl(fd: &OwnedFd, v6: bool, ttl: u8) {
    let (level, name) =
        if v6 { (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS) } else { (libc::IPPROTO_IP, libc::IP_TTL) };
    // A TTL that the kernel refuses (0) leaves the one before; the core sends none such.
    let _kept = sys::set_opt(fd, level, name, i32::from(ttl));
}

/// Sets the DSCP, and of datagrams the ECN, of what a socket sends.
pub(crate) fn set_tos(fd: &OwnedFd, v6: bool, tos: u8) {
    let (level, name) =
        if v6 { (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) } else { (libc::IPPROTO_IP, libc::IP_TOS) };
    // Some values are for privileged programs alone on some systems; the mark before stays then.
    let _kept = sys::set_opt(fd, level, name, i32::from(tos));
}

/// Forbids fragments of what a socket sends, or sees to it that none is forbidden.
pub(crate) fn set_df(fd: &OwnedFd, v6: bool, df: bool) {
    let (level, name) = if v6 {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER)
    } else {
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER)
    };
    let value = if df { libc::IP_PMTUDISC_DO } else { libc::IP_PMTUDISC_DONT };
    let _kept = sys::set_opt(fd, level, name, value);
}

/// Asks for the error queue.
pub(crate) fn set_recverr(fd: &OwnedFd, v6: bool) {
    let (level, name) =
        if v6 { (libc::IPPROTO_IPV6, libc::IPV6_RECVERR) } else { (libc::IPPROTO_IP, libc::IP_RECVERR) };
    let _without = sys::set_opt(fd, level, name, 1);
}

/// Asks for merged datagrams; without, they come one by one.
pub(crate) fn set_gro(fd: &OwnedFd) {
    let _without = sys::set_opt(fd, SOL_UDP, UDP_GRO, 1);
}
