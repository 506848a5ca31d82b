"""Guests for tests: an in-memory guest that speaks Ethernet, and the messages that clients send.

They are clients in plain Python, written independently of the data plane, so that each checks the other.

    guestnet.testing.guest       Guest: ARP, DHCP, DNS, ICMP and TCP of one guest
    guestnet.testing.tcp         Connection: a TCP connection of a Guest
    guestnet.testing.messages    DHCP and DNS messages
    guestnet.testing.frames      Ethernet, ARP, IPv4, UDP, ICMP and TCP headers

This guest gets an address and resolves a name:

    >>> from guestnet import NatNetwork
    >>> from guestnet.testing.guest import Guest
    >>> with NatNetwork(dns_records={"api.example": "192.0.2.7"}) as network:
    ...     vm = network.create_endpoint("vm1", mac="02:00:00:00:00:01")
    ...     guest = Guest(bytes.fromhex("020000000001"), lambda frame: attachment.send(frame))
    ...     attachment = network.attach("vm1", "memory", on_frame=guest.receive)
    ...     str(guest.lease().address), str(guest.resolve("api.example"))
    ('192.168.64.2', '192.0.2.7')
"""
