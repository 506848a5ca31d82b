"""What can go wrong, as types that a program can tell apart. Each message says what to do."""

from __future__ import annotations


class GuestnetError(Exception):
    """The root of all errors of guestnet."""


class ConfigError(GuestnetError, ValueError):
    """A value of the configuration, or an argument, is wrong; the message names it."""


class UnsupportedError(GuestnetError):
    """This system cannot do it; the message says how to get it."""


class EndpointExists(GuestnetError):
    """An endpoint with this id is there already."""


class EndpointNotFound(GuestnetError, LookupError):
    """There is no endpoint with this id."""


class AlreadyRunning(GuestnetError):
    """The network runs already."""


class NotRunning(GuestnetError):
    """The network does not run (any more), and this needs it to."""


class AddressPoolExhausted(GuestnetError):
    """Every address of the subnet is in use."""


class AddressInUse(GuestnetError):
    """The address belongs to another endpoint, to the gateway or to a service."""


class PortInUse(GuestnetError):
    """A port of the host that was to be published is taken."""


class TooManyFiles(GuestnetError):
    """The process can have no more descriptors; each published port and each connection is one."""


class ForwardNotFound(GuestnetError, LookupError):
    """The forward was taken back already, or is another network's."""


class AttachError(GuestnetError):
    """A descriptor or a path is not what an attachment needs."""


class BusyError(GuestnetError):
    """Too much is under way at once: do it again later."""


class DataPlaneError(GuestnetError):
    """A packet thread could not start or has failed; the network has to be started again."""
