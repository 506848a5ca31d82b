"""What `guestnet vm` adds to a QEMU command."""

from __future__ import annotations

import os
import socket

import pytest
from guestnet.cli import UsageError
from guestnet.cli.commands import vm

MAC = bytes.fromhex("020000000001")


def test_adds_netdev_and_card() -> None:
    assert vm.stream_options(7) == ["-netdev", "stream,id=guestnet0,server=off,addr.type=fd,addr.str=7"]
    made = vm.card_options(["qemu-system-x86_64", "-m", "1G"], MAC)
    assert made == ["-device", "virtio-net-pci,netdev=guestnet0,mac=02:00:00:00:00:01"]


def test_a_command_without_options() -> None:
    assert vm.card_options(["qemu"], MAC)[0] == "-device"
    assert vm.other_network(["qemu", "-nic"]) == "-nic "


def test_keeps_the_users_own_card_and_learns_its_mac() -> None:
    command = ["qemu-system-x86_64", "-device", "e1000,mac=02:00:00:00:00:09,netdev=guestnet0"]
    assert vm.card_options(command, MAC) == []
    assert vm.own_mac(command) == bytes.fromhex("020000000009")


@pytest.mark.parametrize("machine", ["microvm", "microvm,acpi=off", "type=microvm", "accel=kvm,type=microvm"])
def test_microvm_has_no_pci(machine: str) -> None:
    for option in ("-M", "-machine", "--machine"):
        made = vm.card_options(["qemu-system-x86_64", option, machine], MAC)
        assert made[-1].startswith("virtio-net-device,")


def test_vhost_user_shares_the_guests_memory() -> None:
    made = vm.vhost_user_options(["qemu-system-x86_64", "-m", "1G"], "/tmp/a,b/s")
    assert made == [
        *("-chardev", "socket,id=guestnet0c,path=/tmp/a,,b/s"),
        *("-netdev", "vhost-user,id=guestnet0,chardev=guestnet0c"),
        *("-object", f"memory-backend-memfd,id=guestnet0m,size={1 << 30},share=on"),
        *("-machine", "memory-backend=guestnet0m"),
    ]


@pytest.mark.parametrize(
    "own", [["-machine", "pc,memory-backend=mine"], ["-numa", "node,memdev=mine"], ["-M", "memory-backend=x"]]
)
def test_memory_that_the_user_arranges_is_left_alone(own: list[str]) -> None:
    made = vm.vhost_user_options(["qemu-system-x86_64", *own], "/tmp/s")
    assert made[4:] == []


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ([], 128 << 20),
        (["-m", "512"], 512 << 20),
        (["-m", "512M"], 512 << 20),
        (["-m", "2g"], 2 << 30),
        (["-m", "size=3G,slots=2,maxmem=8G"], 3 << 30),
        (["-m", "256,slots=2,maxmem=8G"], 256 << 20),
        (["-m", "slots=2,maxmem=8G"], 128 << 20),
    ],
)
def test_memory_size_is_qemus(options: list[str], size: int) -> None:
    assert vm.memory_size(["qemu-system-x86_64", *options]) == size


def test_an_invalid_memory_size_is_refused() -> None:
    with pytest.raises(UsageError, match="-m 1G"):
        vm.memory_size(["qemu-system-x86_64", "-m", "much"])


@pytest.mark.parametrize(
    ("options", "msix"),
    [([], False), (["-enable-kvm"], True), (["-accel", "kvm"], True), (["-machine", "q35,accel=kvm"], True)],
)
def test_vhost_user_without_kvm_has_no_msix(options: list[str], msix: bool) -> None:
    made = vm.card_options(["qemu-system-x86_64", *options], MAC, vhost_user=True)
    assert made[-1].endswith(",vectors=0") != msix


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


def test_a_listener_without_a_name_is_reached_by_its_descriptor() -> None:
    listening, theirs = vm._nameless_listener()
    with listening, socket.socket(socket.AF_UNIX) as front_end:
        assert not os.path.exists(listening.getsockname())
        assert not os.path.exists(os.path.dirname(listening.getsockname()))
        front_end.connect(f"/proc/self/fd/{theirs}")
        listening.accept()[0].close()
    os.close(theirs)
