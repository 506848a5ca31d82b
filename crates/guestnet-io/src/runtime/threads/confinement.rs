//! Theory of operation: a packet thread parses what nobody trusts, so at its start it gives up what it never
//! needs, for good: new privileges, capabilities, and system calls that lead out of its work. What is refused
//! fails with EPERM; everything else is allowed. Threads that it starts inherit all of it. Other threads of the
//! process are not touched.
//!
//! - `no_new_privs` is set, which a filter needs and no work of the thread misses.
//! - Of its capabilities it keeps CAP_DAC_OVERRIDE (the path of a datagram peer may be another user's) and, where
//!   the host lets nobody open a ping socket, CAP_NET_RAW.
//! - Two seccomp filters refuse system calls: one those of [`refused`], one other ABIs than the thread's own, whose
//!   numbers the first does not know, and clone3, whose flags no filter can see. The C library goes on to clone.

use crate::os::sys;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use std::collections::BTreeMap;
use std::sync::OnceLock;

const CAP_DAC_OVERRIDE: u32 = 1;
const CAP_NET_RAW: u32 = 13;

/// Flags of clone that make namespaces.
const NAMESPACES: [i32; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];

/// Numbers from here on are of the ABI with 32-bit pointers (x86-64 alone).
const X32: u32 = 0x4000_0000;

/// What a packet thread never calls: other programs, other processes, mounts, namespaces, keys, modules, the
/// clock, the whole machine.
fn refused() -> Vec<i64> {
    let mut calls = vec![
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_pidfd_getfd,
        libc::SYS_kcmp,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_move_mount,
        libc::SYS_open_tree,
        libc::SYS_fsopen,
        libc::SYS_fsconfig,
        libc::SYS_fsmount,
        libc::SYS_fspick,
        libc::SYS_mount_setattr,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_userfaultfd,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_request_key,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_delete_module,
        libc::SYS_kexec_load,
        libc::SYS_open_by_handle_at,
        libc::SYS_quotactl,
        libc::SYS_acct,
        libc::SYS_swapon,
        libc::SYS_swapoff,
        libc::SYS_reboot,
        libc::SYS_settimeofday,
        libc::SYS_clock_settime,
        libc::SYS_clock_adjtime,
        libc::SYS_adjtimex,
        libc::SYS_sethostname,
        libc::SYS_setdomainname,
    ];
    if cfg!(target_arch = "x86_64") {
        calls.extend(only_x86());
    }
    calls
}

#[cfg(target_arch = "x86_64")]
fn only_x86() -> [i64; 4] {
    [libc::SYS_iopl, libc::SYS_ioperm, libc::SYS_modify_ldt, libc::SYS_kexec_file_load]
}

#[cfg(not(target_arch = "x86_64"))]
fn only_x86() -> [i64; 0] {
    []
}

/// Confines the calling thread. What the kernel does not let it give up is in the error, and the rest is given
/// up all the same.
pub(crate) fn confine() -> Result<(), String> {
    let ping = sys::socket(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP).is_ok();
    let raw = if ping { 0 } else { 1 << CAP_NET_RAW };
    let dropped = sys::limit_capabilities(raw | 1 << CAP_DAC_OVERRIDE)
        .map_err(|e| format!("capabilities stay ({})", sys::errno_text(e)));
    dropped.and(filter())
}

/// Puts the calling thread under the filters.
fn filter() -> Result<(), String> {
    static PROGRAMS: OnceLock<Result<[BpfProgram; 2], String>> = OnceLock::new();
    let programs = PROGRAMS.get_or_init(|| Ok([calls().map_err(|e| e.to_string())?, abi()]));
    for program in programs.as_ref().map_err(Clone::clone)? {
        seccompiler::apply_filter(program).map_err(|e| format!("no seccomp filter ({e})"))?;
    }
    Ok(())
}

fn calls() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = refused().into_iter().map(|n| (n, vec![])).collect();
    let namespaces = NAMESPACES.iter().map(|flag| {
        let flag = u64::from(flag.cast_unsigned());
        let is_set = SeccompCmpOp::MaskedEq(flag);
        SeccompRule::new(vec![SeccompCondition::new(0, SeccompCmpArgLen::Dword, is_set, flag)?])
    });
    rules.insert(libc::SYS_clone, namespaces.collect::<Result<_, _>>()?);
    let refuse = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    SeccompFilter::new(rules, SeccompAction::Allow, refuse, std::env::consts::ARCH.try_into()?)?.try_into()
}

/// The numbers that the other filter does not know: it ends the process on other architectures.
fn abi() -> BpfProgram {
    let op = |code, jt, jf, k| seccompiler::sock_filter { code, jt, jf, k };
    let (load, equal, at_least, give) = (0x20, 0x15, 0x35, 0x06);
    let unknown = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned();
    let x32 = if cfg!(target_arch = "x86_64") { X32 } else { u32::MAX };
    vec![
        op(load, 0, 0, 0),
        op(equal, 1, 0, libc::SYS_clone3 as u32),
        op(at_least, 0, 1, x32),
        op(give, 0, 0, unknown),
        op(give, 0, 0, libc::SECCOMP_RET_ALLOW),
    ]
}

/// Whether packet threads can be confined here; why not. Tried in a thread of its own.
///
/// # Errors
/// What the kernel does not let a thread give up.
pub fn confinement_works() -> Result<(), String> {
    let thread = std::thread::Builder::new().name("guestnet-doctor".into()).spawn(confine);
    let ended = thread.map_err(|e| format!("no thread ({})", sys::error_text(&e)))?.join();
    ended.unwrap_or_else(|_| Err("the attempt failed".into()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// What a confined thread gets: 0 or the errno.
    fn confined(call: impl FnOnce() -> i32 + Send + 'static) -> i32 {
        let thread = std::thread::spawn(move || {
            confine().unwrap();
            call()
        });
        thread.join().unwrap()
    }

    #[test]
    fn every_refused_call_fails_with_eperm() {
        let results = std::thread::spawn(|| {
            confine().unwrap();
            refused().into_iter().map(|n| (n, sys::raw_call(n, -1))).collect::<Vec<_>>()
        });
        for (number, result) in results.join().unwrap() {
            assert_eq!(result, libc::EPERM, "system call {number}");
        }
    }

    #[test]
    fn clone_makes_no_namespace() {
        for flag in NAMESPACES {
            assert_eq!(confined(move || sys::raw_call(libc::SYS_clone, i64::from(flag))), libc::EPERM);
        }
        assert_eq!(confined(|| sys::raw_call(libc::SYS_clone3, -1)), libc::ENOSYS);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn another_abi_is_no_way_round() {
        let x32 = i64::from(X32);
        assert_eq!(confined(move || sys::raw_call(x32 | libc::SYS_unshare, -1)), libc::ENOSYS);
    }

    #[test]
    fn a_confined_thread_starts_threads_and_opens_sockets() {
        let result = confined(|| {
            let thread = std::thread::spawn(|| std::net::UdpSocket::bind("127.0.0.1:0").is_ok());
            let works = thread.join().unwrap() && std::net::TcpListener::bind("127.0.0.1:0").is_ok();
            if works { 0 } else { libc::EIO }
        });
        assert_eq!(result, 0);
    }

    #[test]
    fn a_confined_thread_has_few_capabilities_and_gets_no_more() {
        let status = std::thread::spawn(|| {
            confine().unwrap();
            std::fs::read_to_string("/proc/thread-self/status").unwrap()
        });
        let status = status.join().unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|l| l.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().to_owned()
        };
        for set in ["CapEff:", "CapPrm:", "CapInh:"] {
            let held = u64::from_str_radix(&field(set), 16).unwrap();
            assert_eq!(held & !(1 << CAP_DAC_OVERRIDE | 1 << CAP_NET_RAW), 0, "{set} {held:x}");
        }
        assert_eq!((field("NoNewPrivs:"), field("Seccomp:")), ("1".into(), "2".into()));
    }
}
