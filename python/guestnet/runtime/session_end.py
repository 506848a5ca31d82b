"""How a session ends: by `stop`, at the end of the program, or because nobody holds its network any more.

A network that is garbage is found by whatever thread allocates next, perhaps the network's own control
thread, perhaps one that holds a lock. So nothing is waited for there: a thread of its own ends the session.
"""

from __future__ import annotations

import _thread
import atexit
import logging
import os
import threading
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guestnet.runtime.session import Session

_log = logging.getLogger("guestnet")

_EXIT_SECONDS = 5.0

_running: dict[Session, int] = {}
"""Sessions that run, with the process that they run in. A fork has the entries and not the threads."""
_ending: set[threading.Event] = set()
"""Of sessions that a thread of their own ends."""


def began(session: Session) -> None:
    """A session runs: it is ended at the end of the program at the latest."""
    _running[session] = os.getpid()


def claim(session: Session) -> bool:
    """Whether the caller is the one that ends the session. True once."""
    return _running.pop(session, None) == os.getpid()


def end(session: Session) -> None:
    """Ends a session and waits for it. Not in the session's own control thread."""
    try:
        session.control.wait(session.close())
    except Exception as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        _log.warning("the network did not end in order: %s", why)
    finally:
        session.control.stop()
        session.closed()


def end_unheld(session: Session) -> None:
    """Nobody holds the network of a session any more. Returns at once."""
    if not claim(session):
        return
    done = threading.Event()

    def work() -> None:
        try:
            end(session)
        except Exception:
            _log.exception("a network that nobody held did not end in order")
        finally:
            _ending.discard(done)
            done.set()

    _ending.add(done)
    # Not threading.Thread: the garbage collector may run while this thread holds a lock of that module.
    _thread.start_new_thread(work, ())
    warnings.warn(
        f"a running NatNetwork ({session.config.subnet}) was dropped: call stop(), or use `with`",
        ResourceWarning,
        stacklevel=2,
    )


@atexit.register
def _end_all() -> None:
    for session in list(reversed(_running)):
        if claim(session):
            end(session)
            session.emit.close()
    for done in list(_ending):
        done.wait(_EXIT_SECONDS)  # its sockets are to be removed
