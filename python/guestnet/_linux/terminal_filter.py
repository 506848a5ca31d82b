"""A seccomp filter that keeps a command from typing into the terminal that it was started from.

Theory of operation: TIOCSTI puts bytes into the terminal's input, and TIOCLINUX pastes on a virtual console.
The shell outside would read them after the command has ended, and execute them. Under the filter both calls
fail with EPERM, and every other system call is allowed. It applies to everything that the command starts, in
each ABI of the machine, because a 32-bit program has another number for the same call. Only the low 32 bits
of the request count, as in the kernel.

The caller needs CAP_SYS_ADMIN in its user namespace, so that no_new_privs can stay off.
"""

from __future__ import annotations

import errno
import struct

from guestnet._linux import libc

_REQUESTS = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX

# The architecture as seccomp reports it (linux/audit.h), and its numbers of ioctl.
_X32 = 0x4000_0000
_IOCTL = {
    0xC000_003E: (16, _X32 | 514, _X32 | 16),  # x86-64, and its ABI with 32-bit pointers
    0x4000_0003: (54,),  # i386
    0xC000_00B7: (29,),  # arm64
    0x4000_0028: (54,),  # arm
    0xC000_00F3: (29,),  # riscv64
}

# linux/bpf_common.h, linux/seccomp.h
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _FAIL = 0x7FFF_0000, 0x0005_0000
_NUMBER_AT, _ARCHITECTURE_AT, _REQUEST_AT = 0, 4, 24


def _program() -> bytes:
    """The filter: a block for each architecture, then the test of the request."""
    code: list[tuple[int, int, int, int]] = [(_LOAD, 0, 0, _ARCHITECTURE_AT)]
    before = 1 + sum(3 + len(numbers) for numbers in _IOCTL.values())
    look = before + 1  # behind the verdict on all other architectures
    for architecture, numbers in _IOCTL.items():
        code.append((_JUMP_IF_EQUAL, 0, 2 + len(numbers), architecture))
        code.append((_LOAD, 0, 0, _NUMBER_AT))
        for number in numbers:
            code.append((_JUMP_IF_EQUAL, look - len(code) - 1, 0, number))
        code.append((_RETURN, 0, 0, _ALLOW))
    code.append((_RETURN, 0, 0, _ALLOW))
    code.append((_LOAD, 0, 0, _REQUEST_AT))
    for left, request in zip(range(len(_REQUESTS), 0, -1), _REQUESTS, strict=True):
        code.append((_JUMP_IF_EQUAL, left, 0, request))
    code.append((_RETURN, 0, 0, _ALLOW))
    code.append((_RETURN, 0, 0, _FAIL | errno.EPERM))
    return b"".join(struct.pack("=HBBI", *step) for step in code)


def install() -> None:
    """Installs the filter for the calling thread and everything that it starts.

    Raises OSError if the kernel has no seccomp, or forbids it here.
    """
    libc.install_seccomp_filter(_program())
