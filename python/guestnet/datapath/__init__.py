"""The datapath in Python, step by step, with an engine of its own or that of a network."""

from guestnet.datapath.poller import Datapath, DatapathPoller, FdUplink, MemoryUplink

__all__ = ["Datapath", "DatapathPoller", "FdUplink", "MemoryUplink"]
