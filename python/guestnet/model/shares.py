"""How much of a pool one guest may have: a dynamic threshold, as switches share their buffer."""

from __future__ import annotations

_RESERVE = 8
"""One in so many is for guests that have next to nothing."""


def fair_share(total: int, taken: int, times: int = 4) -> int:
    """How many of `total` one guest may have while `taken` are taken, by it and by others.

    That is `times` what is left: a guest alone gets some 70 %, one that comes when others have much gets
    less, and some are always left. Connections have the same rule (`Limits::descriptors` of the core).

    >>> fair_share(1000, 0), fair_share(1000, 700), fair_share(1000, 875)
    (3500, 700, 0)
    """
    return times * max(0, total - max(1, total // _RESERVE) - taken)
