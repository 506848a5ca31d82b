"""The guest and the outside of `guestnet demo`."""
