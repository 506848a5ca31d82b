"""The audit log: its lines, its rotation, and what happens when the file cannot be written."""

import json
import os
import resource
import signal
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from guestnet.errors import ConfigError
from guestnet.model.events import EventsLost, FlowClosed, FlowDenied, FlowOpened
from guestnet.runtime.policy.audit import AuditLog

GUEST = (IPv4Address("192.168.64.2"), 40000)
REMOTE = (IPv4Address("192.0.2.7"), 443)


def opened(flow: str = "flow-1", **fields: object) -> FlowOpened:
    values = {"network": "lab", "endpoint": "vm1", "time": 100.0, "protocol": 6, "inbound": False}
    return FlowOpened(**{**values, "flow": flow, "guest": GUEST, "remote": REMOTE, **fields})


def closed(flow: str = "flow-1") -> FlowClosed:
    return FlowClosed(network="lab", endpoint="vm1", time=102.5, flow=flow, bytes_out=10, bytes_in=2000)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_flow_is_one_line_at_its_end(tmp_path: Path) -> None:
    log = AuditLog(str(tmp_path / "a"))
    log.note(opened())
    assert lines(tmp_path / "a") == []
    log.note(closed())
    log.close()
    (line,) = lines(tmp_path / "a")
    assert line["time"] == "1970-01-01T00:01:42.500Z"
    assert (line["event"], line["guest"], line["protocol"], line["verdict"]) == ("end", "vm1", "tcp", "allow")
    assert (line["source"], line["destination"]) == ("192.168.64.2:40000", "192.0.2.7:443")
    assert (line["bytes_out"], line["bytes_in"], line["seconds"]) == (10, 2000, 2.5)
    assert os.stat(tmp_path / "a").st_mode & 0o777 == 0o600


def test_starts_are_written_by_choice_and_inbound_flows_name_the_client_first(tmp_path: Path) -> None:
    log = AuditLog(str(tmp_path / "a"), starts=lambda _event: True)
    log.note(opened(inbound=True))
    log.close()
    (line,) = lines(tmp_path / "a")
    assert (line["event"], line["direction"], line["source"]) == ("start", "inbound", "192.0.2.7:443")


def test_denials_and_losses_are_lines(tmp_path: Path) -> None:
    log = AuditLog(str(tmp_path / "a"))
    denied = FlowDenied(
        network="lab", endpoint="vm1", direction="outbound", protocol=17, guest=GUEST, remote=REMOTE,
        rule="default", reason="policy", unreported=4,
    )  # fmt: skip
    log.note(denied)
    log.note(EventsLost(network="lab", count=7))
    log.close()
    first, second = lines(tmp_path / "a")
    assert (first["verdict"], first["rule"], first["unreported"]) == ("deny", "default", 4)
    assert (second["event"], second["count"]) == ("lost", 7)


def test_a_file_that_grows_is_rotated_and_only_so_many_are_kept(tmp_path: Path) -> None:
    log = AuditLog(str(tmp_path / "a"), size=600, kept=2)
    for number in range(20):
        log.note(opened(f"flow-{number}"))
        log.note(closed(f"flow-{number}"))
    log.close()
    assert sorted(os.listdir(tmp_path)) == ["a", "a.1", "a.2"]
    kept = [line["flow"] for name in ("a.2", "a.1", "a") for line in lines(tmp_path / name)]
    assert kept == [f"flow-{n}" for n in range(20 - len(kept), 20)]
    assert all((tmp_path / name).stat().st_size <= 600 for name in os.listdir(tmp_path))


def test_lines_that_cannot_be_written_are_counted_and_reported_once(tmp_path: Path) -> None:
    reasons: list[str | None] = []
    log = AuditLog(str(tmp_path / "a"))
    log.failed = reasons.append
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        log.note(closed("flow-1"))
        log.note(closed("flow-2"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    log.note(closed("flow-3"))
    log.close()
    (line,) = lines(tmp_path / "a")
    assert (line["flow"], line["lost_before"], log.lost) == ("flow-3", 2, 2)
    assert len(reasons) == 2
    assert reasons[0] is not None
    assert reasons[1] is None


@pytest.mark.parametrize("name", ["", "missing/a", "directory"])
def test_a_file_that_cannot_be_opened_is_a_config_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        AuditLog(f"{tmp_path}/{name}")


def test_a_link_in_a_directory_of_others_is_not_followed(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    (tmp_path / "a").symlink_to(tmp_path / "b")
    with pytest.raises(ConfigError, match="symbolic link"):
        AuditLog(str(tmp_path / "a"))
