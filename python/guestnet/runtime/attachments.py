"""Attachments, by which the frames of an endpoint enter, and listeners, where guests arrive."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from threading import Condition
from typing import TYPE_CHECKING, Any

from guestnet.control.callbacks import CallbackQueue
from guestnet.control.portal import blocking
from guestnet.errors import AttachError, BusyError, ConfigError, NotRunning
from guestnet.model.values import path as checked_path

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from guestnet.control.callbacks import CallbackPool
    from guestnet.control.channel import Control

_log = logging.getLogger("guestnet")

ATTACHMENTS = ("tap", "stream", "dgram", "vhost-user", "memory")
LISTENERS = ("stream", "dgram", "unixgram", "vhost-user")
_CONNECTED = ("stream", "vhost-user")
PATH_LONGEST = 107
"""sun_path of Linux is 108 bytes with its final zero."""
_BACKLOG = 128
_KEPT_FRAMES = 4096
_SEND_SECONDS = 1.0
_RETRY_SECONDS = 0.0005


class Attachment:
    """How the frames of an endpoint enter and leave. `NatNetwork.attach` returns it.

    Example:
        >>> import socket
        >>> from guestnet import NatNetwork
        >>> ours, theirs = socket.socketpair()
        >>> with theirs, NatNetwork() as network:
        ...     vm = network.create_endpoint("vm1")
        ...     network.attach("vm1", "stream", sock=ours)
        <Attachment attachment-1 stream of 'vm1'>
    """

    def __init__(self, id: str, endpoint_id: str, kind: str) -> None:
        self.id = id
        """Its id, unique for the life of the network."""
        self.endpoint_id = endpoint_id
        self.kind = kind

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.kind} of {self.endpoint_id!r}>"


class MemoryAttachment(Attachment):
    """A guest in this process.

    `send` gives its frames to the network. Frames for the guest go to `on_frame`, in a thread for callbacks;
    without `on_frame` they wait for `recv`. 4096 frames wait at most.

    Example:
        >>> from guestnet import NatNetwork
        >>> with NatNetwork() as network:
        ...     vm = network.create_endpoint("vm1")
        ...     guest = network.attach("vm1", "memory")
        ...     guest.send(b"too short for a frame")
        ...     guest.recv(timeout=0)
    """

    def __init__(
        self,
        id: str,
        endpoint_id: str,
        control: Control,
        port: int,
        on_frame: Callable[[bytes], object] | None,
        callbacks: CallbackPool,
    ) -> None:
        super().__init__(id, endpoint_id, "memory")
        self._control: Control | None = control
        self._port = port
        self._on_frame = on_frame
        self._calls = None if on_frame is None else CallbackQueue(callbacks, _KEPT_FRAMES)
        self._frames: deque[bytes] = deque(maxlen=_KEPT_FRAMES)
        self._arrived = Condition()
        self._wakers: set[Callable[[], None]] = set()
        """Of tasks in `arecv`."""
        self._ended = False
        self.lost = 0
        """Frames that were lost on the way from the guest, or for which `on_frame` was too slow."""

    def send(self, frame: Buffer) -> None:
        """Sends a frame from the guest, Ethernet header first. From any thread.

        It waits up to a second when the network is behind. If that lasts, the frame is lost and counted in
        `lost`.

        Args:
            frame: Bytes, or any object that has contiguous bytes.

        Raises:
            NotRunning: The network was stopped, or the endpoint removed.
        """
        control = self._control
        if control is None:
            raise self._over()
        deadline = 0.0 if control.is_own_thread else time.monotonic() + _SEND_SECONDS
        while True:
            if self._ended:
                raise self._over()
            try:
                control.plane.inject(self._port, frame)
                return
            except BusyError:
                if not control.plane.is_healthy:
                    raise self._over() from None
                if time.monotonic() >= deadline:
                    self.lost += 1
                    return
                time.sleep(_RETRY_SECONDS)

    def recv(self, timeout: float | None = None) -> bytes | None:
        """Waits for the next frame for the guest.

        Args:
            timeout: Seconds to wait; None waits without limit.

        Returns:
            The frame, None when none arrived in time.

        Raises:
            NotRunning: No frame will arrive any more.
        """
        with self._arrived:
            self._arrived.wait_for(lambda: bool(self._frames) or self._ended, timeout)
            if self._frames:
                return self._frames.popleft()
            if self._ended:
                raise self._over()
            return None

    async def arecv(self, timeout: float | None = None) -> bytes | None:  # noqa: ASYNC109 - as `recv`
        """Waits for the next frame for the guest. If it is cancelled, the next call returns that frame.

        Args:
            timeout: Seconds to wait; None waits without limit.

        Returns:
            The frame, None when none arrived in time.

        Raises:
            NotRunning: No frame will arrive any more.
        """
        loop = asyncio.get_running_loop()
        came: asyncio.Future[None] = loop.create_future()

        def set_came() -> None:
            if not came.done():
                came.set_result(None)

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(set_came)

        try:
            async with asyncio.timeout(timeout):
                while True:
                    with self._arrived:
                        if self._frames:
                            return self._frames.popleft()
                        if self._ended:
                            raise self._over()
                        came = loop.create_future()
                        self._wakers.add(wake)
                    await came
        except TimeoutError:
            return None
        finally:
            with self._arrived:
                self._wakers.discard(wake)

    def end(self) -> None:
        """Ends the attachment. Called by the network when it is stopped, or the endpoint removed."""
        with self._arrived:
            self._ended = True
            self._control = None  # who keeps this does not keep the descriptors of a network that was stopped
            self._arrived.notify_all()
            self._wake_tasks()

    def _wake_tasks(self) -> None:
        for wake in self._wakers:
            wake()
        self._wakers.clear()

    def _over(self) -> NotRunning:
        return NotRunning(f"The network of {self.endpoint_id!r} was stopped, or the endpoint removed.")

    def deliver(self, frame: bytes) -> None:
        """Takes a frame for the guest. Called by the network.

        Args:
            frame: The frame.
        """
        if self._calls is not None:
            if not self._calls.put(partial(self._call, frame)):
                self.lost += 1
            return
        with self._arrived:
            self._frames.append(frame)
            self._arrived.notify()
            self._wake_tasks()

    def _call(self, frame: bytes) -> None:
        assert self._on_frame is not None
        try:
            self._on_frame(frame)
        except BaseException:  # sys.exit() too
            _log.exception("on_frame of %r failed", self.endpoint_id)


class KeptAttachments(dict[int, Attachment]):
    """Attachments of a running network, by port. The network has it, and what serves the network knows it
    weakly: a callback of a memory attachment may hold the network."""


class Listener:
    """A socket where guests arrive. `NatNetwork.listen` returns it.

    Each guest that comes is an endpoint of its own.

    Example:
        >>> import os, tempfile
        >>> from guestnet import NatNetwork
        >>> with tempfile.TemporaryDirectory() as folder, NatNetwork() as network:
        ...     listener = network.listen("stream", os.path.join(folder, "net.sock"))
        ...     listener.kind, os.path.exists(listener.path)
        ('stream', True)
    """

    def __init__(
        self,
        id: str,
        number: int,
        kind: str,
        path: str,
        close: Callable[[Listener], Coroutine[Any, Any, None]],
    ) -> None:
        self._close = close
        self.id = id
        """Its id, unique for the life of the network."""
        self.number = number
        self.kind = kind
        self.path = path

    async def aclose(self) -> None:
        """Accepts no more guests, and removes the socket.

        Guests with a connection of their own stay; others leave. Nothing happens if it is closed already, or
        if its network has ended.
        """
        await self._close(self)

    close = blocking(aclose)

    def unlink(self) -> None:
        """Removes the file of the socket."""
        with contextlib.suppress(OSError):
            os.unlink(self.path)

    def __repr__(self) -> str:
        return f"<Listener {self.id} {self.kind} {self.path}>"


def listening_socket(kind: str, path: str | os.PathLike[str]) -> socket.socket:
    """A unix socket that only this user can reach, bound to `path`, and listening where guests connect."""
    if kind not in LISTENERS:
        raise ConfigError(f"{kind!r} is not a kind of listener: choose one of {', '.join(LISTENERS)}.")
    name = checked_path("The socket path", path, "net.sock")
    if len(os.fsencode(name)) > PATH_LONGEST:
        raise ConfigError(f"The socket path {name!r} must have 1 to {PATH_LONGEST} bytes: choose another.")
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM if kind in _CONNECTED else socket.SOCK_DGRAM)
    try:
        # The file gets the mode that the socket has when it is bound, so that there is no moment at which
        # somebody else could attach.
        os.fchmod(made.fileno(), 0o600)
        made.bind(name)
        if kind in _CONNECTED:
            made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        remedy = {errno.ENOENT: "make its directory first", errno.EADDRINUSE: "remove what is there"}
        if os.path.isdir(os.path.dirname(name) or "."):
            remedy[errno.ENOENT] = "its file system has no sockets"
        raise AttachError(
            f"Guests cannot attach to {name!r} ({error.strerror}): "
            f"{remedy.get(error.errno or 0, 'look at its directory')}, or choose another path."
        ) from error
    return made


def taken_descriptor(kind: str, fd: int | None, sock: socket.socket | None, on_frame: object) -> int | None:
    """The descriptor that an attachment of `kind` is given; checks that it is what the kind needs."""
    if kind not in ATTACHMENTS:
        raise ConfigError(f"{kind!r} is not a kind of attachment: choose one of {', '.join(ATTACHMENTS)}.")
    if on_frame is not None and not callable(on_frame):
        raise TypeError(f"on_frame {on_frame!r} cannot be called: give a function that takes a frame.")
    if sock is not None and not isinstance(sock, socket.socket):
        raise TypeError(f"sock {sock!r} is not a socket: give one, or a descriptor as fd.")
    if kind == "memory":
        if fd is not None or sock is not None:
            raise ConfigError("A memory attachment has no descriptor: leave out fd and sock.")
        return None
    if on_frame is not None:
        raise ConfigError(f"on_frame is for a memory attachment, not for {kind!r}: leave it out.")
    if (fd is None) == (sock is None):
        raise ConfigError(f"A {kind} attachment needs either fd or sock: give one of them.")
    number = sock.fileno() if sock is not None else fd
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 1 << 31:
        raise AttachError(f"The descriptor {number!r} is not open: give one that is.")
    return number


def release_descriptor(fd: int | None, sock: socket.socket | None) -> None:
    """The network has a descriptor of its own now: the one that it was given is closed."""
    if sock is not None:
        sock.close()
    elif fd is not None:
        os.close(fd)
