"""Published ports of a running network: their handles, their sockets on the host, and where they lead."""
