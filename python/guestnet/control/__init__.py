"""Threads that networks share, and the way in and out of them."""
