"""guestnet: the network for guests that nobody trusts."""
