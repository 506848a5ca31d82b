"""The same random cases on every run; `GUESTNET_EXPLORE=1` tries others, and more of them."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("same", derandomize=True, database=None)
settings.register_profile("explore", max_examples=1000)
settings.load_profile("explore" if os.environ.get("GUESTNET_EXPLORE") else "same")
