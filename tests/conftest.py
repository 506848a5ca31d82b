"""Random cases are the same on every run. `GUESTNET_EXPLORE=1` tries others, and more of them."""

from __future__ import annotations

import os

from hypothesis import settings

# No deadlines: a busy machine is no defect.
settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.register_profile("explore", max_examples=1000, deadline=None)
settings.load_profile("explore" if os.environ.get("GUESTNET_EXPLORE") else "same")
