"""`python -m guestnet`: the same as the command `guestnet`."""

import sys

from guestnet.cli import main

if __name__ == "__main__":
    sys.exit(main())
