"""One module for each subcommand: `guestnet NAME` calls `main` of `commands/NAME.py`."""
