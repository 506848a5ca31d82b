"""What guestnet needs from Linux and the standard library of Python 3.11 does not offer.

Nothing here starts a program: a `guestnet run` that spawned `ip` and `mount` would spend its start-up time on
them, and would need them installed. The package is imported only where Linux is certain (namespaces,
`doctor`, `demo`).
"""
