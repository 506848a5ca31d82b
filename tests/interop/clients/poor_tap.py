"""poor_tap.py NS REFUSED: a network on a TAP of an old kernel, with one endpoint in namespace NS.

REFUSED is "headers" for a TAP without virtio headers, "io_uring" for a system
without it, else a mask of the TUN_F_ offloads that TUNSETOFFLOAD
refuses as a whole, as a kernel does that does not know one of them; a seccomp filter plays that kernel.
"""

import ctypes
import errno
import os
import struct
import sys

from guestnet import NatConfig, NatNetwork
from lab.tap import open_tap

TUNSETOFFLOAD = 0x400454D0
IOCTL = {"x86_64": 16, "aarch64": 29}[os.uname().machine]
IO_URING_SETUP = 425
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EINVAL
NUMBER, REQUEST, ARGUMENT = 0, 24, 32
"""Where seccomp_data has the number of the call, and the low halves of its second and third argument."""


def refuse_offloads(mask: int) -> None:
    """TUNSETOFFLOAD fails from here on when its argument has a bit of the mask."""
    install(
        (LOAD, 0, 0, NUMBER),
        (EQUAL, 0, 5, IOCTL),
        (LOAD, 0, 0, REQUEST),
        (EQUAL, 0, 3, TUNSETOFFLOAD),
        (LOAD, 0, 0, ARGUMENT),
        (ANY_BIT, 0, 1, mask),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW),
    )


def refuse_io_uring() -> None:
    """io_uring_setup fails from here on, as in many containers."""
    install(
        (LOAD, 0, 0, NUMBER), (EQUAL, 0, 1, IO_URING_SETUP), (RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)
    )


def install(*instructions: tuple[int, int, int, int]) -> None:
    program = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    code = ctypes.create_string_buffer(program)
    filter_ = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filter_, 0, 0):
        raise OSError(ctypes.get_errno(), "no seccomp filter")


def main(ns: str, refused: str) -> None:
    tap = open_tap(ns, "eth0", headers=refused != "headers")
    if refused == "io_uring":
        refuse_io_uring()
    elif refused != "headers":
        refuse_offloads(int(refused, 0))
    with NatNetwork(NatConfig()) as network:
        network.create_endpoint("guest")
        network.attach("guest", "tap", fd=tap)
        print("ready", flush=True)
        for _ in sys.stdin:
            print(f"segmented {network.stats().io['segmented_frames']}", flush=True)


main(*sys.argv[1:])
