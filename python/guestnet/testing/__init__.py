"""Guests for tests and the demo: an in-memory guest that speaks Ethernet, and the messages that clients send.

They are clients in plain Python, written apart from the data plane, so that each checks the other.
"""
