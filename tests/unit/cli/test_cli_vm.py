"""What `guestnet vm` adds to a QEMU command."""

from __future__ import annotations

import pytest
from guestnet.cli import vm

MAC = bytes.fromhex("020000000001")
NETDEV = "stream,id=guestnet0,server=off,addr.type=fd,addr.str=7"


def test_adds_netdev_and_card() -> None:
    made = vm.qemu_command(["qemu-system-x86_64", "-m", "1G"], 7, MAC)
    assert made == [
        *("qemu-system-x86_64", "-m", "1G", "-netdev", NETDEV),
        *("-device", "virtio-net-pci,netdev=guestnet0,mac=02:00:00:00:00:01"),
    ]


def test_a_command_without_options() -> None:
    assert vm.qemu_command(["qemu"], 7, MAC)[:3] == ["qemu", "-netdev", NETDEV]
    assert vm.other_network(["qemu", "-nic"]) == "-nic "


def test_keeps_the_users_own_card_and_learns_its_mac() -> None:
    command = ["qemu-system-x86_64", "-device", "e1000,mac=02:00:00:00:00:09,netdev=guestnet0"]
    assert vm.qemu_command(command, 7, MAC) == [*command, "-netdev", NETDEV]
    assert vm.own_mac(command) == bytes.fromhex("020000000009")


@pytest.mark.parametrize("machine", ["microvm", "microvm,acpi=off", "type=microvm", "accel=kvm,type=microvm"])
def test_microvm_has_no_pci(machine: str) -> None:
    for option in ("-M", "-machine", "--machine"):
        made = vm.qemu_command(["qemu-system-x86_64", option, machine], 7, MAC)
        assert made[-1].startswith("virtio-net-device,")


@pytest.mark.parametrize(
    ("options", "other"),
    [
        (["-nic", "user"], "-nic user"),
        (["-netdev", "user,id=a"], "-netdev user,id=a"),
        (["-net", "nic", "-net", "user"], "-net user"),
        (["-nic", "none"], None),
        (["-m", "1G"], None),
    ],
)
def test_another_network_is_noticed(options: list[str], other: str | None) -> None:
    assert vm.other_network(["qemu-system-x86_64", *options]) == other
