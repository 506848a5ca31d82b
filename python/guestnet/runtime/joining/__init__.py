"""The socket by which guests join a running network."""
