"""What commands that run a network share: its lifetime, its sockets, what it reports."""
