"""The public methods of a network, by topic; `guestnet.runtime.network` joins them."""
