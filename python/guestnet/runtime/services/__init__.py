"""What joins the services of `guestnet.services` to a running network."""
