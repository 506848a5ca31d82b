"""What a network is made with when nobody says otherwise. Commands show it before they import a network."""

from __future__ import annotations

DEFAULT_SUBNET = "192.168.64.0/24"
DEFAULT_ZONE = "guestnet.internal"
"""The domain of the gateway's and the guests' names."""
