"""Pins automatic ids of published ports (`-p 2222:vm1:22`) to machines.

Theory of operation: ids vm1, vm2 and so on depend on the order of arrival, which a restart may change. So the
MAC of the first guest that gets such an id is stored in a file beside the socket. In the next run this guest
gets the id and the address again. The file is JSON, `{"version": 1, "guests": {MAC: {"id": ..., "ip":
...}}}`, with the guests as `NatNetwork.state` writes them. It is replaced as a whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from guestnet.cli.runner import confined
from guestnet.errors import ConfigError, GuestnetError
from guestnet.model.events import AddressChanged, GuestUp, LeaseTaken, NetworkEvent

if TYPE_CHECKING:
    from guestnet.model.forward_spec import ForwardSpec
    from guestnet.runtime.network import NatNetwork

SUFFIX = ".guests"
_VERSION = 1
_LARGEST = 1 << 20
_CLOSING_SECONDS = 2.0


def automatic_ids(publications: Iterable[ForwardSpec], leased: Iterable[str | None]) -> list[str]:
    """The ids in published ports that guests get by order of arrival."""
    from guestnet.runtime.registry import is_automatic

    given = {name for name in leased if name is not None}
    wanted = (one.guest for one in publications)
    return sorted({one for one in wanted if one is not None and is_automatic(one) and one not in given})


class PinnedGuests:
    """Remembers the guests that have one of `ids`.

    `event` is for `NatNetwork.on_event`. A disk may be slow, so a thread of its own writes the file. Raises
    GuestnetError for a file that cannot be read.
    """

    def __init__(self, network: NatNetwork, ids: Iterable[str], path: str) -> None:
        self._network = network
        self._ids = frozenset(ids)
        self._path = path
        self._changed = threading.Event()
        self._ended = False
        self.failure: str | None = None
        """Why the file could not be written."""
        self.set_aside: str | None = None
        """Where a damaged file was moved to."""
        self.guests = {mac: known for mac, known in self._read().items() if known["id"] in self._ids}
        """By MAC: `id` and `ip`."""
        for mac in list(self.guests):
            known = self.guests[mac]
            try:
                network.recall_guest(mac, known["id"], known["ip"])
            except ConfigError:  # of another subnet: the guest has its id, and another address
                network.recall_guest(mac, known["id"])
        self._thread = threading.Thread(
            target=self._write_all, args=(self.guests,), name="guestnet-pinned", daemon=True
        )
        self._thread.start()

    def event(self, event: NetworkEvent) -> None:
        """An event of the network."""
        if not isinstance(event, GuestUp | AddressChanged | LeaseTaken) or event.endpoint not in self._ids:
            return
        endpoint = self._network.get_endpoint(event.endpoint or "")
        if endpoint is None or endpoint.listener is None:
            return
        known = {"id": endpoint.id, "ip": str(endpoint.ip)}
        if self.guests.get(endpoint.mac) != known:
            others = {mac: one for mac, one in self.guests.items() if one["id"] != endpoint.id}
            self.guests = {**others, endpoint.mac: known}
            self._changed.set()

    def close(self) -> None:
        """Writes what is not written yet."""
        self._ended = True
        self._changed.set()
        self._thread.join(_CLOSING_SECONDS)

    def _write_all(self, written: dict[str, dict[str, str]]) -> None:
        confined.settle_thread()
        while not self._ended or written is not self.guests:
            self._changed.wait()
            self._changed.clear()
            guests = self.guests
            if guests is not written:
                self._write(guests)
                written = guests

    def _write(self, guests: dict[str, dict[str, str]]) -> None:
        temporary = f"{self._path}.{os.getpid()}"
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(fd, "w", encoding="ascii") as file:
                json.dump({"version": _VERSION, "guests": guests}, file, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)
        except OSError as error:
            self.failure = error.strerror
            with contextlib.suppress(OSError):
                os.unlink(temporary)

    def _read(self) -> dict[str, dict[str, str]]:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(fd, encoding="utf-8") as file:
                text = file.read(_LARGEST + 1)
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            raise GuestnetError(
                f"{self._path!r}, which says which guest is {', '.join(sorted(self._ids))}, cannot be read "
                f"({getattr(error, 'strerror', 'it is not text')}): move it away."
            ) from error
        found = _parse(text)
        if found is None:
            self.set_aside = f"{self._path}.damaged"
            with contextlib.suppress(OSError):
                os.replace(self._path, self.set_aside)
            return {}
        return found


def _parse(text: str) -> dict[str, dict[str, str]] | None:
    """The guests in the file; None when it is not what was written."""
    from guestnet.model.network_state import guests_from_dict

    try:
        content: Any = json.loads(text)
        if content["version"] != _VERSION or len(text) > _LARGEST:
            return None
        guests = guests_from_dict(content["guests"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # a ConfigError is a ValueError
        return None
    if any(ip is None for _, ip in guests.values()):
        return None
    return {mac: {"id": id, "ip": str(ip)} for mac, (id, ip) in guests.items()}
