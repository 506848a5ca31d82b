"""A laboratory of network namespaces for tests and benchmarks.

Theory of operation: `Lab` makes three namespaces in a row. *host* is where guestnet runs, *out* is the
outside with its servers, and *far* lies one router (out) and a smaller MTU further away. Nothing else is
connected to them, so no packet can leave the machine. Names contain the process id of the test run; the next
run removes what a dead run left behind. Every process is tracked and ended with the lab. Tests wait for
conditions with a deadline, never for a fixed time.

    host 203.0.113.1 ---- 203.0.113.2, .3 out 198.51.100.1 ---- (MTU 1400) ---- 198.51.100.2 far
"""

from lab.namespaces import Lab
from lab.process import Process, wait_until

__all__ = ["Lab", "Process", "wait_until"]
