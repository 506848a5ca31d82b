"""micro_vm.py: in place of a microVM monitor, opens the TAP device `tap0` by name and is the guest behind it.

The guest has the address 192.168.64.2 without DHCP, as microVMs often have. It prints "resolved ADDRESS" of
www.example.test, then serves "a page of the guest" on port 80.
"""

import fcntl
import os
import struct
import threading
from ipaddress import IPv4Address, IPv4Interface

from guestnet.testing.guest import Guest
from guestnet.testing.tcp import Connection
from lab.tap import IFF_NO_PI, IFF_TAP, TUNSETIFF

MAC = bytes.fromhex("aafc00000001")
PAGE = b"a page of the guest\n"


def answer(connection: Connection) -> None:
    connection.recv(1)
    connection.send(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(PAGE), PAGE))
    connection.close()


def main() -> None:
    tap = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", b"tap0", IFF_TAP | IFF_NO_PI))
    guest = Guest(MAC, lambda frame: void(os.write(tap, frame)))

    def read() -> None:
        while True:
            guest.receive(os.read(tap, 65536))

    threading.Thread(target=read, daemon=True).start()
    guest.address = IPv4Interface("192.168.64.2/24")
    guest.router = guest.name_server = IPv4Address("192.168.64.1")
    print("resolved", guest.resolve("www.example.test"), flush=True)
    guest.serve(80, answer)
    print("serving", flush=True)
    threading.Event().wait()


def void(_: object) -> None:
    pass


main()
