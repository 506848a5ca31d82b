"""Counters, flows, captures and events."""

from __future__ import annotations

import os
from collections.abc import Callable
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any, TypeVar, overload

from guestnet.api.base import NetworkBase
from guestnet.control.event_hub import EventStream
from guestnet.control.portal import blocking
from guestnet.errors import UnsupportedError
from guestnet.model.events import NetworkEvent
from guestnet.model.stats import ConnTrackStats, FlowRecord, NatStats, NetworkStats
from guestnet.model.values import path as checked_path
from guestnet.model.values import whole_number

if TYPE_CHECKING:
    pass

_E = TypeVar("_E", bound=NetworkEvent)


class MonitoringMethods(NetworkBase):
    """Counters, flows, captures and events."""

    def stats(self) -> NetworkStats:
        """Returns the counters since the start, at most some 10 milliseconds old. It never waits.

        Returns:
            The counters; after `stop`, those of the last run.
        """
        session = self._running()
        if session is None:
            return self._last_stats
        return NetworkStats.from_native(session.control.plane.stats())

    def worker_stats(self) -> list[NetworkStats]:
        """Returns the counters of each worker (`NatConfig.workers`).

        Returns:
            One snapshot for each worker, none while the network does not run.
        """
        session = self._running()
        if session is None:
            return []
        return [NetworkStats.from_native(one) for one in session.control.plane.worker_stats()]

    async def aendpoint_stats(self) -> dict[str, NetworkStats]:
        """Returns the counters of each endpoint.

        Returns:
            The counters by id.

        Raises:
            NotRunning: The network does not run.
        """
        return await self._do(self._live().endpoint_stats())

    endpoint_stats = blocking(aendpoint_stats)

    async def auplink_nat_stats(self) -> NatStats:
        """What the engine of the uplink "tun" did.

        Returns:
            The counters since the start.

        Raises:
            NotRunning: The network does not run.
            UnsupportedError: The uplink is "sockets", which has no engine.
        """
        return (await self._uplink_stats())[0]

    uplink_nat_stats = blocking(auplink_nat_stats)

    async def auplink_conntrack_stats(self) -> ConnTrackStats:
        """What the engine of the uplink "tun" holds.

        Returns:
            The counters.

        Raises:
            NotRunning: The network does not run.
            UnsupportedError: The uplink is "sockets", which has no engine.
        """
        return (await self._uplink_stats())[1]

    uplink_conntrack_stats = blocking(auplink_conntrack_stats)

    async def _uplink_stats(self) -> tuple[NatStats, ConnTrackStats]:
        session = self._live()
        if session.uplink is None:
            raise UnsupportedError(
                "The uplink 'sockets' has no NAT engine: see `stats`, or use NatConfig(uplink='tun')."
            )
        return await self._do(session.nat_stats())

    @property
    def external(self) -> tuple[IPv4Address, ...]:
        """The external addresses of the guests while it runs with the uplink "tun", else none."""
        session = self._session
        return () if session is None or session.uplink is None else session.uplink.external

    @property
    def uplink_device(self) -> str | None:
        """The name of the TUN device while it runs with the uplink "tun"."""
        session = self._session
        return None if session is None or session.uplink is None else session.uplink.device

    async def aflows(self) -> list[FlowRecord]:
        """Lists the flows that the network carries now.

        Returns:
            One record for each.

        Raises:
            NotRunning: The network does not run.
        """
        return await self._do(self._live().flows())

    flows = blocking(aflows)

    async def astart_capture(self, file: str | os.PathLike[str] | int) -> None:
        """Writes every frame to a file in the pcapng format. It replaces a capture that is being written.

        An earlier capture at that path is replaced. A file with other content is not.

        Args:
            file: A path, or a descriptor, which stays yours.

        Raises:
            ConfigError: The file cannot be written, or has other content.
            NotRunning: The network does not run.
        """
        await self._do(self._live().capture.start(_capture_target(file)))

    start_capture = blocking(astart_capture)

    async def astop_capture(self) -> None:
        """Ends the capture. Its file is complete then.

        Raises:
            NotRunning: The network does not run.
        """
        await self._do(self._live().capture.stop())

    stop_capture = blocking(astop_capture)

    @overload
    def on_event(self, callback: Callable[[NetworkEvent], object]) -> Callable[[], None]: ...
    @overload
    def on_event(
        self, callback: Callable[[_E], object], first: type[_E], /, *more: type[_E]
    ) -> Callable[[], None]: ...

    def on_event(self, callback: Callable[[Any], object], *types: type[NetworkEvent]) -> Callable[[], None]:
        """Calls a function for every event, one at a time and in order, in a thread for callbacks.

        The function may use the network. While it has not returned, up to 4096 later events wait, of which
        each guest has a share; further ones are lost and counted (`events_lost`, and an `EventsLost`).

        Args:
            callback: Takes an event.
            *types: The classes of events to deliver. By default all but `FlowEvent`, of which guests cause
                as many as they like.

        Returns:
            A function that ends the delivery.

        Raises:
            TypeError: The callback cannot be called, or a type is no class of events.

        Example:
            >>> from guestnet import GuestUp, NatNetwork
            >>> network, came = NatNetwork(), []
            >>> stop_listening = network.on_event(lambda event: came.append(event.endpoint), GuestUp)
            >>> with network:
            ...     vm = network.create_endpoint("vm1")
            ...     guest = network.attach("vm1", "memory")
            >>> came
            ['vm1']
        """
        if not callable(callback):
            raise TypeError(f"{callback!r} cannot be called: give a function that takes a NetworkEvent.")
        return self._events.add_callback(callback, types)

    @overload
    def events(self, *, most: int = 4096) -> EventStream[NetworkEvent]: ...
    @overload
    def events(self, first: type[_E], /, *more: type[_E], most: int = 4096) -> EventStream[_E]: ...

    def events(self, *types: type[NetworkEvent], most: int = 4096) -> EventStream[Any]:
        """The events from now on, for `async for`. Ends when the network stops.

        Args:
            *types: The classes of events, as of `on_event`.
            most: How many events wait for a task that has not taken them; each guest has a share. Further
                ones are lost and counted (`EventStream.lost`, and an `EventsLost`).

        Returns:
            The iterator. `close` ends it, and so does the end of its `with` block.

        Example:
            >>> import asyncio
            >>> from guestnet import GuestUp, NatNetwork
            >>> async def first_guest():
            ...     async with NatNetwork() as network:
            ...         with network.events(GuestUp) as events:
            ...             await network.acreate_endpoint("vm1")
            ...             await network.aattach("vm1", "memory")
            ...             async for event in events:
            ...                 return event.endpoint
            >>> asyncio.run(first_guest())
            'vm1'
        """
        return self._events.add_stream(types, whole_number("most", most, 1, 1_000_000))

    @property
    def events_lost(self) -> int:
        """How many events receivers missed, because they had not taken earlier ones."""
        return self._events.lost


def _capture_target(value: object) -> str | int:
    if isinstance(value, int) and not isinstance(value, bool):
        return whole_number("The capture descriptor", value, 0, 0x7FFFFFFF)
    return checked_path("The capture file", value)
