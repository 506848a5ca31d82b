"""`python -m guestnet`: the same as the command `guestnet`."""

from guestnet.cli import entry_point

if __name__ == "__main__":
    entry_point()
