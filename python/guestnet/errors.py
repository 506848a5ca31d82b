"""The errors of guestnet, as types that a program can tell apart. Each message says what to do."""

from __future__ import annotations


class GuestnetError(Exception):
    """The base class of all errors of guestnet.

    Example:
        >>> from guestnet import NatNetwork
        >>> try:
        ...     NatNetwork().flows()
        ... except GuestnetError as error:
        ...     print(error)
        The network does not run: start it first.
    """


class ConfigError(GuestnetError, ValueError):
    """A setting or an argument is wrong. The message names it."""


class PolicyError(ConfigError):
    """A policy or a rule of one is wrong. The message names the file, the line and the rule."""


class UnsupportedError(GuestnetError):
    """This system cannot do it. The message says what is missing."""


class EndpointExists(GuestnetError):
    """An endpoint with this id exists already."""


class EndpointNotFound(GuestnetError, LookupError):
    """There is no endpoint with this id."""


class AlreadyRunning(GuestnetError):
    """The network runs already."""


class NotRunning(GuestnetError):
    """The network does not run, or no longer runs."""


class AddressPoolExhausted(GuestnetError):
    """Every address of the subnet is in use."""


class AddressInUse(GuestnetError):
    """The address belongs to another endpoint, to the gateway or to a service."""


class PortInUse(GuestnetError):
    """A port of the host that was to be published is in use."""


class TooManyFiles(GuestnetError):
    """The process can open no more descriptors. Each published port and each connection needs one."""


class ForwardNotFound(GuestnetError, LookupError):
    """The forward is no longer published, or belongs to another network."""


class AttachError(GuestnetError):
    """A descriptor or a path does not suit the attachment."""


class BusyError(GuestnetError):
    """Too much is under way at once. Try again later."""


class DataPlaneError(GuestnetError):
    """A packet thread could not start, or failed. The network has to be started again."""
