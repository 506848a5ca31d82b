"""A laboratory of network namespaces for tests and benches.

Theory of operation: `Lab` makes three namespaces in a row. *host* is where guestnet runs, *out* is the
outside with its servers, and *far* lies one router (out) and a smaller MTU further away. Nothing else is
connected to them, so no packet can leave the machine. Names carry the pid of the test run; what a dead run
left behind is swept by the next. Everything started is tracked by pid and ended with the lab. Waiting is
always for a condition, with a deadline, never for a time.

    host 203.0.113.1 ---- 203.0.113.2, .3 out 198.51.100.1 ---- (MTU 1400) ---- 198.51.100.2 far
"""

from lab.namespaces import Lab
from lab.process import Process, wait_until

__all__ = ["Lab", "Process", "wait_until"]
