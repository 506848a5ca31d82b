"""Makes a TAP device in another namespace and brings its descriptor here, as a launcher does for a guest."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from pathlib import Path

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
CLONE_NEWNET = 0x40000000


def open_tap(ns: str | Path, device: str, *, headers: bool = True) -> int:
    """Makes TAP `device` in the namespace named `ns`, or in that of a file, and gives its descriptor;
    `headers`: virtio's. Needs root."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pid = os.fork()
        if pid == 0:
            # The child enters the namespace, so that this process need not.
            status = 1
            try:
                libc = ctypes.CDLL(None, use_errno=True)
                with open(Path("/run/netns") / ns, "rb") as target:
                    if libc.setns(target.fileno(), CLONE_NEWNET) != 0:
                        raise OSError(ctypes.get_errno(), "setns")
                tap = os.open("/dev/net/tun", os.O_RDWR)
                flags = IFF_TAP | IFF_NO_PI | (IFF_VNET_HDR if headers else 0)
                fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", device.encode(), flags))
                socket.send_fds(theirs, [b"1"], [tap])
                status = 0
            finally:
                os._exit(status)
        theirs.close()
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        os.waitpid(pid, 0)
    if not fds:
        raise OSError(f"no TAP device {device} could be made in {ns}")
    os.set_blocking(fds[0], False)
    return fds[0]
