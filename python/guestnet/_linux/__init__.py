"""What guestnet asks of Linux that the standard library of Python 3.11 does not offer.

Nothing here starts a program: a `guestnet run` that spawned `ip` and `mount` would spend its start-up time on
that and would need them installed. Imported only where Linux is certain (namespaces, `doctor`, `demo`).
"""
