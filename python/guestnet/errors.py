"""What can go wrong, as types that a program can tell apart. Each message says what to do."""

from __future__ import annotations


class GuestnetError(Exception):
    """The root of all errors of guestnet."""


class ConfigError(GuestnetError, ValueError):
    """A value of the configuration is wrong; the message names it."""


class UnsupportedError(GuestnetError):
    """This system cannot do it; the message says how to get it."""
