"""`guestnet run` as a wrapper of a command: status, signals, terminal, what is left behind.

The network is a stand-in that starts a thread and moves no packet: tests/interop has the real one.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from guestnet.cli import checks
from lab.runner import without_host_ids_note
from lab.terminal import Terminal

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux")
    or checks.check_namespaces().state != checks.OK
    or checks.check_tun().state != checks.OK,
    reason="no namespaces or no /dev/net/tun here: `guestnet doctor` says how to get them",
)

_DRIVER = """
import os, sys, threading, types
from guestnet import errors

class Network:
    runtime = types.SimpleNamespace(call_in_threads=lambda function: None)
    def __init__(self, config): self.is_running = False
    def start(self):
        self.is_running, self.done = True, threading.Event()
        self.thread = threading.Thread(target=self.done.wait)
        self.thread.start()
    def stop(self): self.done.set(); self.thread.join()
    def create_endpoint(self, *args, **kwargs): pass
    def attach(self, endpoint, kind, *, fd): os.fstat(fd)
    def publish(self, spec):
        if 80 in spec.host_ports: raise errors.GuestnetError("Port 80 is taken: choose another.")
        return spec
    def flows(self):
        moving = types.SimpleNamespace(protocol="tcp", state="established", idle=0.0)
        return [moving] if "MOVING" in os.environ else []
    def stats(self): return {"rx_frames": 3, "tx_frames": 0, "drops": {"truncated": 1}}

def module(name, **members):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(members)

module("guestnet.runtime.network", NatNetwork=Network)
from guestnet.cli import main
sys.exit(main(["run", *sys.argv[1:]]))
"""
# Root's own Python may be where others have no way to.
_OPTIONS = ("--host-ids",) if os.geteuid() == 0 else ()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", _DRIVER, *_OPTIONS, *arguments]


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs it to its end; stderr is without the note about --host-ids, which has a test of its own."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        **options,  # type: ignore[call-overload]
    )
    if _OPTIONS:
        done.stderr = without_host_ids_note(done.stderr)
    return done


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 42", 42), ("exit 255", 255), ("kill -KILL $$", 137), ("kill -TERM $$", 143)],
)
def test_status_is_the_commands_own(script: str, status: int) -> None:
    got = run("--", "sh", "-c", script)
    assert (got.returncode, got.stderr) == (status, "")


@pytest.mark.parametrize(("name", "status"), [("no-such-command-here", 127), ("/etc/passwd", 126)])
def test_a_command_that_cannot_start(name: str, status: int) -> None:
    got = run("--", name)
    assert got.returncode == status
    assert name in got.stderr
    assert len(got.stderr.splitlines()) == 1


def test_a_port_in_use_is_reported_before_the_command_starts() -> None:
    got = run("-p", "80:80", "--", "echo", "started")
    assert (got.returncode, got.stdout) == (125, "")
    assert got.stderr == "guestnet: Port 80 is taken: choose another.\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="--host-ids is for root")
def test_a_command_with_the_ids_of_the_host_is_warned_of_before_it_starts() -> None:
    words = [sys.executable, "-c", _DRIVER, "--host-ids", "--", "sh", "-c", "echo started >&2"]
    got = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    note, started = got.stderr.splitlines()
    assert note.startswith("guestnet: Note: ")
    assert "root of this host's files" in note
    assert "leave --host-ids out" in note
    assert started == "started"


@pytest.mark.skipif(os.geteuid() != 0, reason="--host-ids is for root")
def test_quiet_leaves_out_the_warning_of_the_ids_of_the_host() -> None:
    words = [sys.executable, "-c", _DRIVER, "--host-ids", "--quiet", "--", "true"]
    got = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert (got.returncode, got.stderr) == (0, "")


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user has no --host-ids")
def test_a_command_of_root_with_ids_of_its_own_needs_no_warning() -> None:
    words = [sys.executable, "-c", _DRIVER, "--", "true"]
    got = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert (got.returncode, got.stderr) == (0, "")


def test_streams_pass_through() -> None:
    got = run("--", "sh", "-c", "cat; echo oops >&2", input="one\ntwo\n")
    assert (got.stdout, got.stderr) == ("one\ntwo\n", "oops\n")


def test_a_limit_on_file_sizes_that_prevents_name_resolution_is_named() -> None:
    def no_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    got = run("--", "true", preexec_fn=no_files)
    assert got.returncode == 0
    (line,) = got.stderr.splitlines()
    assert "(File too large): raise the limit on the size of files (`ulimit -f`)" in line


def test_stats_are_printed_when_asked_for() -> None:
    lines = [line.split() for line in run("--stats", "--", "true").stderr.splitlines()]
    assert lines == [["rx", "frames", "3"], ["drops", "truncated", "1"]]


def test_descendants_end_with_the_command() -> None:
    """They hold stdout, so `run` returning at all before the sleeps end shows that they were ended."""
    script = "sleep 600 & (setsid sleep 600 &); nohup sh -c 'sleep 600 & sleep 600' & echo here"
    start = time.monotonic()
    assert run("--", "sh", "-c", script).stdout == "here\n"
    assert time.monotonic() - start < 25


@pytest.mark.parametrize("nested", [False, True])
def test_descendants_end_when_guestnet_is_killed(nested: bool) -> None:
    """They hold stdout, which ends only when the last of them has."""
    script = "sleep 600 & (setsid sleep 600 &); nohup sh -c 'sleep 600 & sleep 600' 2>&- & echo here; wait"
    words = ["sh", "-c", script]
    process = subprocess.Popen(
        command("--", *(command("--", *words) if nested else words)), stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"here\n"
    process.kill()
    process.wait(20)
    assert select.select([process.stdout], [], [], 20)[0], "something is left"
    assert process.stdout.read() == b""
    process.stdout.close()


def test_the_command_reaches_nothing_of_the_host_through_guestnets_own_processes() -> None:
    """The first process of its PID namespace is guestnet's, and all that it sees of guestnet."""
    script = """
import os
for name in filter(str.isdigit, os.listdir("/proc")):
    if int(name) == os.getpid():
        continue
    for way in ("root/etc", "cwd/.", "mem"):
        try:
            os.close(os.open(f"/proc/{name}/{way}", os.O_RDONLY))
            print(name, way, open(f"/proc/{name}/cmdline").read())
        except OSError:
            pass
print("looked")
"""
    assert run("--", sys.executable, "-c", script).stdout == "looked\n"


def test_the_command_ends_no_process_outside() -> None:
    """All that it may signal are its own, and the first process of its PID namespace takes no signal."""
    got = run("--", "sh", "-c", "sleep 600 & kill -KILL -1; kill -KILL 1; kill -STOP 1; echo alive")
    assert (got.stdout, got.returncode) == ("alive\n", 0), got.stderr


def test_nothing_is_left_when_the_command_kills_its_process_group() -> None:
    """guestnet is in that group, as it is in a shell's pipeline. What left the group ends with it."""
    script = "(setsid sh -c 'trap : HUP TERM; sleep 600; sleep 600' &); echo here; kill -KILL 0"
    process = subprocess.Popen(
        command("--", "sh", "-c", script), stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    assert process.wait(20) == -signal.SIGKILL
    assert select.select([process.stdout], [], [], 20)[0], "something is left"
    assert process.stdout.read() == b"here\n"
    process.stdout.close()


_TYPE = """
import ctypes, errno, fcntl, mmap, os, platform, sys, termios
def said(name, number): print(name, errno.errorcode.get(number, "done"), flush=True)
libc = ctypes.CDLL(None, use_errno=True)
text = ctypes.create_string_buffer(b"\\x03x")
for name, request in (("TIOCSTI", 0x5412), ("TIOCLINUX", 0x541C), ("high bits", 0x7_0000_5412)):
    number = 16 if platform.machine() == "x86_64" else 29
    result = libc.syscall(ctypes.c_long(number), ctypes.c_long(0), ctypes.c_long(request), text)
    said(name, ctypes.get_errno() if result else 0)
if platform.machine() == "x86_64":
    # mov eax, 54; mov ebx, 0; mov ecx, TIOCSTI; mov edx, text; int 0x80; ret
    low = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40, prot=7)
    at = ctypes.addressof(ctypes.c_char.from_buffer(low))
    code = b"\\x53\\xb8\\x36\\0\\0\\0\\xbb\\0\\0\\0\\0\\xb9\\x12\\x54\\0\\0\\xba"
    low[:64] = (code + (at + 64).to_bytes(4, "little") + b"\\xcd\\x80\\x5b\\xc3").ljust(64, b"\\x90")
    if os.fork() == 0:  # a kernel without 32-bit programs ends it
        said("32 bits", -ctypes.CFUNCTYPE(ctypes.c_int)(at)())
        os._exit(0)
    os.wait()
print("tried")
"""


def test_the_command_cannot_type_into_the_terminal() -> None:
    """By no ABI that the machine has: 32-bit programs have another number for the call."""
    terminal = Terminal(*command("--", sys.executable, "-c", _TYPE))
    terminal.until(lambda text: "tried" in text)
    lines = terminal.text.splitlines()
    assert terminal.status() == 0
    assert "TIOCSTI EPERM" in lines
    assert "TIOCLINUX EPERM" in lines
    assert "high bits EPERM" in lines
    assert "done" not in terminal.text


def test_sigterm_skips_draining_in_flight_data() -> None:
    """The command has ended, and a connection of its guest still moves: seconds, unless somebody says no."""
    words = command("--", "sh", "-c", "trap '' TERM; echo ready")
    process = subprocess.Popen(words, env={**os.environ, "MOVING": "1"}, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    start = time.monotonic()
    while process.poll() is None:
        process.terminate()  # while the command runs it is the command's, which does not care
        time.sleep(0.02)
    assert process.returncode == 0
    assert time.monotonic() - start < 4
    process.stdout.close()


def test_closed_streams_stay_closed() -> None:
    """As the shell left them, and no descriptor of ours has their numbers."""
    code = "import os, sys; print(*sorted(os.listdir('/proc/self/fd')), file=open(sys.argv[1], 'w'))"
    for closed, left in (("<&-", "1 2"), (">&-", "0 2"), ("<&- >&- 2>&-", "")):
        with tempfile.NamedTemporaryFile("r") as file:
            words = command("--", sys.executable, "-c", code, file.name)
            done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *words], timeout=30, check=False)
            assert done.returncode == 0
            # One more is the directory, with the lowest number that is free.
            lowest = min(set("0123") - set(left.split()))
            assert set(file.read().split()) == {*left.split(), lowest}


@pytest.mark.parametrize("guest", ["vm1", "192.168.64.2", "web", "WEB"])
def test_a_port_of_the_guest_by_any_of_its_names(guest: str) -> None:
    assert run("--hostname", "Web", "-p", f"8080:{guest}:80", "--", "true").returncode == 0


@pytest.mark.parametrize("guest", ["nobody", "10.0.0.9", "192.168.64.3"])
def test_a_port_of_a_guest_that_will_never_be_there(guest: str) -> None:
    got = run("-p", f"8080:{guest}:80", "--", "echo", "started")
    assert (got.returncode, got.stdout) == (2, "")
    assert guest in got.stderr
    assert len(got.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "number",
    [
        *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2),
        *(signal.SIGWINCH, signal.SIGALRM, signal.SIGPROF, signal.SIGIO, signal.SIGPWR),
        *(signal.SIGRTMIN + 3, signal.SIGRTMAX),
    ],
)
def test_signals_pass_through(number: int) -> None:
    script = "import signal, sys, time\n"
    script += f"signal.signal({int(number)}, lambda *_: sys.exit(33))\n"
    script += "print('ready', flush=True)\ntime.sleep(60)\n"
    process = subprocess.Popen(command("--", sys.executable, "-c", script), stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(number)
    assert process.wait(20) == 33
    process.stdout.close()


def test_death_by_a_signal_is_the_exit_status() -> None:
    process = subprocess.Popen(command("--", "sh", "-c", "echo ready; exec sleep 60"), stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM
    process.stdout.close()


def test_ctrl_c_reaches_the_command_once() -> None:
    script = (
        "import signal, sys, time\nn = []\nsignal.signal(2, lambda *_: n.append(1))\n"
        "print('re' + 'ady', flush=True)\nwhile not n: time.sleep(0.05)\n"
        "time.sleep(0.5); print('got', len(n), sys.stdin.isatty(), flush=True)\nsys.exit(7)"
    )
    terminal = Terminal(*command("--", sys.executable, "-c", script))
    terminal.until(lambda text: "ready" in text)
    terminal.type("\x03")
    terminal.until(lambda text: "got 1 True" in text)
    assert terminal.status() == 7


def test_a_shell_has_job_control() -> None:
    terminal = Terminal(*command("--", "sh", "-i"))
    terminal.type("sh -c 'echo in''side; exec sleep 60'\n")
    terminal.until(lambda text: "inside" in text)  # so it is in the foreground
    terminal.type("\x1a")
    terminal.until(lambda text: "Stopped" in text)
    terminal.type("kill -KILL %1; wait\nexit 5\nexit 5\n")  # dash refuses the first exit: "stopped jobs"
    terminal.until(lambda text: "exit 5" in text)
    assert terminal.status() == 5


def test_a_shell_that_suspends_itself_is_a_stopped_job() -> None:
    """`suspend` stops the command alone, which keeps the terminal: the shell outside has to get it back."""
    terminal = Terminal("bash", "--norc", "-i")
    terminal.type(f"{shlex.join(command('--', 'bash', '--norc', '-i'))}\n")
    terminal.type("echo in''side\n")
    terminal.until(lambda text: "inside" in text)
    terminal.type("suspend\n")
    terminal.until(lambda text: "Stopped" in text)
    terminal.type("fg\n")
    terminal.type("echo in''side again; exit 9\n")
    terminal.until(lambda text: "inside again" in text)
    terminal.type("echo out''side\nexit 3\nexit 3\n")
    terminal.until(lambda text: "outside" in text)
    assert terminal.status() == 3


@pytest.mark.parametrize("first", ["", " &"])
def test_a_command_stops_and_goes_on_as_a_job(first: str, tmp_path: Path) -> None:
    """By Ctrl-Z in the foreground, or as it reads from the terminal in the background; `fg` brings it the
    terminal."""
    file = tmp_path / "job.sh"
    file.write_text(
        f"exec {shlex.join(command('--', 'sh', '-c', 'echo ready; read word; echo got $word'))}\n"
    )
    terminal = Terminal("bash", "--norc", "-ib")
    terminal.type(f"sh {file}{first}\n")
    terminal.until(lambda text: "ready" in text)
    if not first:
        terminal.type("\x1a")
    terminal.until(lambda text: "Stopped" in text)
    terminal.type("fg\n")
    terminal.type("a-word\n")
    terminal.until(lambda text: "got a-word" in text)
    terminal.type("echo out''side\nexit 3\nexit 3\n")
    terminal.until(lambda text: "outside" in text)
    assert terminal.status() == 3


def test_a_pipeline_keeps_the_terminal(tmp_path: Path) -> None:
    """The command does not take the terminal from others of its process group."""
    terminal = Terminal("bash", "--norc", "-i")
    file, reader = tmp_path / "job.sh", tmp_path / "reader.sh"
    file.write_text(f"exec {shlex.join(command('--', 'echo', 'from-the-guest'))}\n")
    reader.write_text("read word </dev/tty; cat; echo got $word\n")
    terminal.type(f"sh {file} | sh {reader}\n")
    terminal.type("a-word\n")
    terminal.until(lambda text: "from-the-guest\r\ngot a-word" in text)
    terminal.type("exit 3\n")
    assert terminal.status() == 3


def test_a_command_that_is_stopped_in_the_background_stops_nothing_else() -> None:
    """Who stops it by its pid continues it by its pid."""
    process = subprocess.Popen(
        command("--", "sh", "-c", "echo $$; exec sleep 60"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"2\n"
    pid = _outside(process.pid, 2)
    os.kill(pid, signal.SIGSTOP)
    _until_state(pid, "T")
    os.kill(pid, signal.SIGCONT)
    _until_state(pid, "S")
    process.terminate()  # passed on: guestnet is not stopped
    assert process.wait(20) == 128 + signal.SIGTERM
    process.stdout.close()


def _outside(parent: int, inside: int) -> int:
    """The process id here of the child of `parent` that has the id `inside` in its own PID namespace."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/status") as file:
            lines = dict(line.split(":", 1) for line in file)
            if int(lines["PPid"]) == parent and int(lines["NSpid"].split()[-1]) == inside:
                return int(name)
    raise AssertionError(f"{parent} has no such child")


def _until_state(pid: int, state: str) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with open(f"/proc/{pid}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] == state:
                return
        time.sleep(0.01)
    raise AssertionError(f"{pid} is not in state {state}")


def test_a_terminal_that_is_gone_ends_the_command() -> None:
    """The kernel tells the session's leader alone: guestnet, where ssh or a terminal started it."""
    terminal = Terminal(*command("--", "sh", "-c", "echo re''ady; exec sleep 60"))
    terminal.until(lambda text: "ready" in text)
    os.close(terminal.fd)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(terminal.pid, os.WNOHANG)) == (0, 0):
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.02)
    assert os.waitstatus_to_exitcode(ended[1]) == 128 + signal.SIGHUP
