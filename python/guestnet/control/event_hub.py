"""Delivers the events of a network to callbacks and to asynchronous iterators.

Theory of operation:

- The control thread emits events. It waits for no receiver: each receiver has a bounded queue.
- In a queue each guest has a share, so that what one guest causes does not displace the events of others.
- An event that finds no room is lost for this receiver and counted. A receiver that wants `EventsLost` gets
  one with the count before the next event that finds room.
- A receiver names the classes of events that it wants. Events of flows are emitted by the packet threads only
  while a receiver wants them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, cast

from guestnet.control.callbacks import WAITING_MOST, CallbackPool, CallbackQueue
from guestnet.model.events import EventCallback, EventsLost, FlowEvent, NetworkEvent
from guestnet.model.shares import fair_share

_E_co = TypeVar("_E_co", bound=NetworkEvent, covariant=True)
Types = tuple[type[NetworkEvent], ...]

_WAIT_SECONDS = 5.0


class Receiver:
    """Which events a receiver wants, and what it has lost."""

    def __init__(self, types: Types, most: int) -> None:
        for one in types:
            if not isinstance(one, type) or not issubclass(one, NetworkEvent):
                raise TypeError(f"{one!r} is not a class of events: give one such as GuestUp.")
        self._types = types or (NetworkEvent,)
        self._wants_losses = issubclass(EventsLost, self._types)
        self.wants_flows = any(issubclass(one, FlowEvent) or one is NetworkEvent for one in types)
        self._most = most
        self._lock = threading.Lock()
        self._waiting: Counter[str | None] = Counter()
        self._unreported = 0
        self.lost = 0
        """Events that were lost for this receiver."""

    def wants(self, event: NetworkEvent) -> bool:
        """Whether an event is of the classes that were asked for.

        Args:
            event: The event.

        Returns:
            True when it is to be delivered here.
        """
        return isinstance(event, self._types) and (self.wants_flows or not isinstance(event, FlowEvent))

    def put(self, event: NetworkEvent) -> None:
        """Takes an event, or counts it as lost. Called in the control thread.

        Args:
            event: The event.
        """
        with self._lock:
            held = self._waiting.total()
            share = self._most if event.endpoint is None else fair_share(self._most, held)
            if held >= self._most or self._waiting[event.endpoint] >= share:
                self.lost += 1
                self._unreported += 1
                return
            lost, self._unreported = self._unreported, 0
            self._waiting[event.endpoint] += 1
        if lost and self._wants_losses:
            self._deliver(
                EventsLost(network=event.network, time=event.time, sequence=event.sequence, count=lost)
            )
        self._deliver(event)

    def taken(self, event: NetworkEvent) -> None:
        """Frees the room of an event that has left the queue.

        Args:
            event: The event.
        """
        with self._lock:
            self._waiting[event.endpoint] -= 1
            if self._waiting[event.endpoint] <= 0:
                del self._waiting[event.endpoint]

    def _deliver(self, event: NetworkEvent) -> None:
        raise NotImplementedError


class CallbackReceiver(Receiver):
    """Calls a function for each event, in a thread for callbacks."""

    def __init__(self, callback: EventCallback, types: Types, most: int = WAITING_MOST) -> None:
        super().__init__(types, most)
        self._callback = callback
        self._calls: CallbackQueue | None = None

    def open(self, pool: CallbackPool) -> None:
        """The network starts."""
        # In a fork, what waited waits in the parent, and a thread of the parent may have held the lock.
        self._lock = threading.Lock()
        self._waiting = Counter()
        self._calls = CallbackQueue(pool, 2 * self._most)

    def wait(self, seconds: float) -> None:
        """Waits until the callback has returned from what was emitted."""
        if self._calls is not None:
            self._calls.wait(seconds)

    def _deliver(self, event: NetworkEvent) -> None:
        if self._calls is None or not self._calls.put(partial(self._call, event)):
            self._release(event)

    def _call(self, event: NetworkEvent) -> None:
        self._release(event)
        self._callback(event)

    def _release(self, event: NetworkEvent) -> None:
        if not isinstance(event, EventsLost):
            self.taken(event)


class EventStream(Receiver, Generic[_E_co]):
    """Events of a network, for `async for`. It ends when the network stops, or by `close`.

    `NatNetwork.events` returns it. One task at a time may iterate.

    Example:
        >>> from guestnet import NatNetwork
        >>> async def kinds():
        ...     network = NatNetwork()
        ...     events = network.events()
        ...     async with network:
        ...         await network.acreate_endpoint("vm1")
        ...         await network.aattach("vm1", "memory")
        ...     return [event.kind async for event in events]
        >>> asyncio.run(kinds())
        ['guest_up']
    """

    def __init__(self, types: Types, most: int, ended: Callable[[Receiver], object]) -> None:
        super().__init__(types, most)
        self._events: deque[NetworkEvent] = deque()
        self._closed = False
        self._when_closed = ended
        self._wake: Callable[[], object] = lambda: None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> _E_co:
        loop = asyncio.get_running_loop()
        while not self._events:
            if self._closed:
                raise StopAsyncIteration
            came = asyncio.Event()

            def wake(came: asyncio.Event = came) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                    loop.call_soon_threadsafe(came.set)

            self._wake = wake
            if not self._events and not self._closed:
                await came.wait()
        event = self._events.popleft()
        if not isinstance(event, EventsLost):
            self.taken(event)
        return cast("_E_co", event)

    def close(self) -> None:
        """Ends the iteration after the events that have come."""
        self._closed = True
        self._when_closed(self)
        self._wake()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _deliver(self, event: NetworkEvent) -> None:
        self._events.append(event)
        self._wake()


class Emitter:
    """Emits events of a network without holding the network."""

    def __init__(self, hub: EventHub) -> None:
        self._hub = weakref.ref(hub)

    def __call__(
        self, kind: type[NetworkEvent], endpoint: str | None = None, **fields: Any
    ) -> NetworkEvent | None:
        """As `EventHub.emit`; nothing happens when the network is gone."""
        return None if (hub := self._hub()) is None else hub.emit(kind, endpoint, **fields)

    def close(self) -> None:
        """As `EventHub.close`."""
        if (hub := self._hub()) is not None:
            hub.close()

    @property
    def wants_flows(self) -> bool:
        """Whether a receiver wants the events of flows."""
        hub = self._hub()
        return hub is not None and hub.wants_flows


class EventHub:
    """All receivers of one network."""

    def __init__(self, network: str, flows_wanted: Callable[[bool], object] = lambda _wanted: None) -> None:
        self._network = network
        self._flows_wanted = flows_wanted
        self._numbers = itertools.count(1)
        self._receivers: tuple[Receiver, ...] = ()
        self._pool: CallbackPool | None = None

    @property
    def wants_flows(self) -> bool:
        """Whether a receiver wants the events of flows."""
        return any(receiver.wants_flows for receiver in self._receivers)

    @property
    def lost(self) -> int:
        """Events that were lost, for all receivers together."""
        return sum(receiver.lost for receiver in self._receivers)

    def add_callback(self, callback: EventCallback, types: Types) -> Callable[[], None]:
        """Calls `callback` for events of `types`; returns what ends it."""
        receiver = CallbackReceiver(callback, types)
        if self._pool is not None:
            receiver.open(self._pool)
        self._add(receiver)
        return partial(self._remove, receiver)

    def add_stream(self, types: Types, most: int) -> EventStream[Any]:
        """An iterator over events of `types`, that holds `most` of them."""
        stream: EventStream[Any] = EventStream(types, most, self._remove)
        self._add(stream)
        return stream

    def open(self, pool: CallbackPool) -> None:
        """The network starts."""
        self._pool = pool
        for receiver in self._receivers:
            if isinstance(receiver, CallbackReceiver):
                receiver.open(pool)

    def close(self) -> None:
        """The network has ended: iterators end, and callbacks get what was emitted, within five seconds."""
        self._pool = None
        deadline = time.monotonic() + _WAIT_SECONDS
        for receiver in self._receivers:
            if isinstance(receiver, EventStream):
                receiver.close()
            elif isinstance(receiver, CallbackReceiver):
                receiver.wait(max(0.0, deadline - time.monotonic()))

    def emit(self, kind: type[NetworkEvent], endpoint: str | None = None, **fields: Any) -> NetworkEvent:
        """Makes an event and gives it to the receivers that want it."""
        event = kind(
            network=self._network,
            time=time.time(),
            sequence=next(self._numbers),
            endpoint=endpoint,
            **fields,
        )
        for receiver in self._receivers:
            if receiver.wants(event):
                receiver.put(event)
        return event

    def _add(self, receiver: Receiver) -> None:
        self._receivers = (*self._receivers, receiver)
        if receiver.wants_flows:
            self._flows_wanted(True)

    def _remove(self, receiver: Receiver) -> None:
        self._receivers = tuple(one for one in self._receivers if one is not receiver)
        if receiver.wants_flows:
            self._flows_wanted(self.wants_flows)
