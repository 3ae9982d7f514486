"""`fuyou launch`: real child processes, real signals, real deaths. What the script saw, it says itself."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from launch_tools import ENVIRONMENT, GIB, SHOWS, command, launched, paragraph
from launch_tools import script as script

import fuyou

# Counts the signals that reach it, says when it is ready, and ends 0.6 s after the first: time enough for a second.
# With a second argument it also counts those that it was started to ignore.
COUNTS = """
    import json, os, signal, sys, time
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
    seen = []
    for name in names:
        number = getattr(signal, name)
        if signal.getsignal(number) is not signal.SIG_IGN or sys.argv[2:]:
            signal.signal(number, lambda number, _: seen.append(signal.Signals(number).name))
    print("ready", os.getpid(), flush=True)
    until = time.monotonic() + 30
    while not seen and time.monotonic() < until:
        time.sleep(0.01)
    end = time.monotonic() + 0.6
    while time.monotonic() < end:
        time.sleep(0.01)
    with open(sys.argv[1], "w") as file:
        json.dump(seen, file)
    sys.exit(7)
"""


@pytest.fixture(autouse=True)
def signals_at_their_defaults():
    """Whoever runs the tests may ignore some (nohup, a shell's `&`), and then children would inherit that."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)}
    for each, handler in before.items():
        if handler is signal.SIG_IGN:
            signal.signal(each, signal.default_int_handler if each is signal.SIGINT else signal.SIG_DFL)
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


# --- what the script is given --------------------------------------------------------------------------------------


def test_options_become_the_environment_and_arguments_stay_the_scripts(script, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    os.symlink(tmp_path / "one", tmp_path / "link")
    path = script(SHOWS)
    done = launched(
        "--nvme", str(tmp_path / "link"), "--nvme", str(tmp_path / "two"), "--nvme-limit", "3GiB", "--ram", "4GiB",
        "--gpu", "1.5GB", "--device", "cpu", path, "--help", "-m", "--", "--ram", "7", "--debug",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["argv"] == [path, "--help", "-m", "--", "--ram", "7", "--debug"]
    given = {name: value for name, value in shown["environment"].items() if name.startswith("FUYOU_")}
    assert given == {
        "FUYOU_NVME": f"{tmp_path}/one:{tmp_path}/two", "FUYOU_NVME_LIMIT": "3GiB", "FUYOU_RAM": "4GiB",
        "FUYOU_GPU": "1.5GB", "FUYOU_DEVICE": "cpu",
    }  # fmt: skip
    line = paragraph(done)
    assert all(value in line for value in ("ram=4GiB", "gpu=1.5GB", "device=cpu", f"nvme={tmp_path}/one"))
    assert launched("--quiet", path).stderr == ""


def test_a_module_is_run_as_python_does(script, tmp_path):
    (tmp_path / "pack").mkdir()
    Path(script(SHOWS)).rename(tmp_path / "pack" / "tool.py")
    done = launched("-m", "pack.tool", "-m", "x", env={"PYTHONPATH": f"{tmp_path}:{ENVIRONMENT['PYTHONPATH']}"})
    assert json.loads(done.stdout)["argv"][1:] == ["-m", "x"]


def test_options_win_over_the_environment_which_is_passed_on(script):
    path = script(SHOWS)
    given = {"FUYOU_RAM": "1GiB", "FUYOU_GPU": "2GiB"}
    shown = json.loads(launched("--ram", "3GiB", path, env=given).stdout)["environment"]
    assert (shown["FUYOU_RAM"], shown["FUYOU_GPU"]) == ("3GiB", "2GiB")


@pytest.mark.parametrize(
    ("arguments", "env", "reason"),
    [
        ([], {}, "Missing argument 'SCRIPT"),
        (["nowhere.py"], {}, "nowhere.py does not exist"),
        (["."], {}, "The script . is not a file"),
        (["--raam", "1GiB", "SCRIPT"], {}, "No such option: --raam"),
        (["--ram", "lots", "SCRIPT"], {}, "--ram='lots' is not a size"),
        (["--nvme-limit", "0", "SCRIPT"], {}, "--nvme-limit='0' must be more than 0"),
        (["--nvme", "nowhere", "SCRIPT"], {}, "nowhere does not exist"),
        (["--nvme", ".", "--nvme", ".", "SCRIPT"], {}, "given twice"),
        (["--nvme", "a:b", "SCRIPT"], {}, "FUYOU_NVME separates folders with ':'"),
        (["--device", "tpu", "SCRIPT"], {}, "--device='tpu' is no device"),
        (["--threads", "0", "SCRIPT"], {}, "--threads=0 must be at least 1"),
        (["--cores", "0-", "SCRIPT"], {}, "is not a list of cores"),
        (["--cores", "0-99999999999", "SCRIPT"], {}, "names core 99999999999, which this process may not use"),
        (["SCRIPT"], {"FUYOU_GPU": "much"}, "FUYOU_GPU='much' is not a size"),
        (["SCRIPT"], {"FUYOU_NVME": "/nowhere"}, "FUYOU_NVME='/nowhere' in the environment names '/nowhere'"),
        (["SCRIPT"], {"FUYOU_DEVICE": "gpu"}, "FUYOU_DEVICE='gpu' is no device"),
    ],
)
def test_what_cannot_work_is_refused_before_the_script_starts(
    script, tmp_path, monkeypatch, capsys, arguments, env, reason
):
    from fuyou.cli import main

    monkeypatch.chdir(tmp_path)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    path = script("open('started', 'w')")
    assert main(["launch", *(path if each == "SCRIPT" else each for each in arguments)]) == 2
    said = capsys.readouterr().err
    assert reason in said and said.startswith("fuyou: ") and len(said.splitlines()) == 1
    assert not (tmp_path / "started").exists()


def test_the_launcher_holds_little_memory(script):
    """It waits beside the training for its whole life, and torch alone would be 200 MB."""
    path = script("""
        import os
        print(open(f"/proc/{os.getppid()}/status").read())
    """)
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", launched(path).stdout)[1])
    assert peak < 80 * 1024, f"{peak} kB"


# --- the environment, in wrap --------------------------------------------------------------------------------------


def small() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(64, 64)
    return model, torch.optim.AdamW(model.parameters(), fused=True)


def tiers_of(**arguments: object) -> dict:
    with fuyou.wrap(*small(), **arguments) as run:
        return run.report().dict()["tiers"]


def test_wrap_takes_what_is_left_out_from_the_environment(nvme, monkeypatch):
    monkeypatch.setenv("FUYOU_NVME", str(nvme))
    monkeypatch.setenv("FUYOU_NVME_LIMIT", "40MiB")
    monkeypatch.setenv("FUYOU_RAM", "48MiB")
    monkeypatch.setenv("FUYOU_GPU", "700MiB")
    monkeypatch.setenv("FUYOU_DEVICE", "cpu")
    tiers = tiers_of()
    budgets = [tiers[name]["budget_bytes"] for name in ("nvme", "host", "device")]
    assert budgets == [40 * 2**20, 48 * 2**20, 700 * 2**20]
    tiers = tiers_of(nvme=[nvme], nvme_limit=30 * 2**20, ram="50MiB", gpu="1GiB", device="cpu")
    budgets = [tiers[name]["budget_bytes"] for name in ("nvme", "host", "device")]
    assert budgets == [30 * 2**20, 50 * 2**20, GIB]
    assert tiers_of(nvme=None)["nvme"]["budget_bytes"] == 0  # None given is None
    monkeypatch.delenv("FUYOU_NVME")
    assert tiers_of()["nvme"]["budget_bytes"] == 0
    monkeypatch.setenv("FUYOU_NVME", "")  # empty is not set
    assert tiers_of()["nvme"]["budget_bytes"] == 0


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FUYOU_RAM", "48 gigs"), ("FUYOU_GPU", "-1"), ("FUYOU_NVME_LIMIT", "0"), ("FUYOU_DEVICE", "gpu"),
        ("FUYOU_DEVICE", "cuda:63"), ("FUYOU_NVME", "/nowhere/at/all"), ("FUYOU_NVME", "/tmp:"),
    ],
)  # fmt: skip
def test_a_variable_that_means_nothing_is_named(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    model, optimizer = small()
    before = model.weight.detach().clone()
    with pytest.raises(fuyou.ConfigError, match=f"{variable}.*"):
        fuyou.wrap(model, optimizer)
    assert torch.equal(model.weight, before) and not hasattr(optimizer, "run")


def test_a_folder_in_memory_is_warned_of(nvme, tmp_path):
    folder = Path("/dev/shm") / f"fuyou-test-{os.getpid()}"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    try:
        for name in (folder, tmp_path / "link"):
            with pytest.warns(UserWarning, match="on a tmpfs: it holds its bytes in RAM") as caught:
                with fuyou.wrap(*small(), nvme=name, ram="48MiB", gpu="1GiB", device="cpu") as run:
                    assert any("tmpfs" in note for note in run.report().dict()["notes"])
            assert [each.filename for each in caught] == [__file__]  # once, at the call of wrap
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with fuyou.wrap(*small(), nvme=nvme, ram="48MiB", gpu="1GiB", device="cpu") as run:
                assert not any("tmpfs" in note for note in run.report().dict()["notes"])
    finally:
        folder.rmdir()


# --- its end -------------------------------------------------------------------------------------------------------


def test_the_scripts_status_and_traceback_are_its_own(script):
    assert launched("--quiet", script("import sys; sys.exit(41)")).returncode == 41
    path = script("def deep():\n    raise LookupError('of mine')\ndeep()\n")
    plain = subprocess.run([sys.executable, path], capture_output=True, text=True, env=ENVIRONMENT)
    done = launched("--quiet", path)
    assert (done.returncode, done.stderr, done.stdout) == (1, plain.stderr, "") and "LookupError" in plain.stderr


def test_standard_input_is_the_scripts(script):
    done = subprocess.run(
        command("--quiet", script("print(input()[::-1])")),
        input="abc\n",
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.stdout == "cba\n"


BUS = """
    import mmap, os, sys
    with open(sys.argv[1], "w+b") as file:
        file.truncate(8192)
        view = mmap.mmap(file.fileno(), 8192)
        file.truncate(0)
        view[4096]  # a page that the file has no longer: what a full /dev/shm does too
"""


def test_deaths_are_explained(script, tmp_path):
    kill = script("import os, signal, sys; os.kill(os.getpid(), int(sys.argv[1]))")
    done = launched("--ram", "3GiB", kill, "9")
    assert done.returncode == 128 + 9
    said = paragraph(done)
    total = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) / 2**20
    assert "SIGKILL" in said and "Most likely it was out of memory" in said and "kill -9" in said
    assert "ram=3GiB, gpu left to fuyou.wrap" in said and f"the machine has {total:.2f} GiB" in said

    done = launched(script(BUS, "bus.py"), str(tmp_path / "cut"))
    assert done.returncode == 128 + 7
    status = os.statvfs("/dev/shm")
    assert f"/dev/shm has {status.f_blocks * status.f_frsize / GIB:.2f} GiB" in paragraph(done)
    assert "--shm-size" in paragraph(done) and "num_workers" in paragraph(done)

    for number, words in ((signal.SIGSEGV, "PYTHONFAULTHANDLER"), (signal.SIGILL, "this CPU does not have")):
        done = launched(kill, str(int(number)))
        assert done.returncode == 128 + number and words in paragraph(done)
    done = launched(kill, "15")
    assert paragraph(done) == "fuyou launch: The script was killed by SIGTERM (signal 15; exit status 143)."
    assert "fuyou launch: The script" not in launched(kill, "2").stderr  # Ctrl-C explains itself


# --- signals -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(*arguments: str, **options: object) -> Iterator[tuple[subprocess.Popen, int]]:
    """A launcher, and the process of its script once that is ready. Both are gone afterwards."""
    launcher = subprocess.Popen(
        command("--quiet", *arguments),
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
        **options,
    )
    pid = 0
    try:
        pid = int(launcher.stdout.readline().split()[1])
        yield launcher, pid
    finally:
        for each in (launcher.pid, pid):
            with contextlib.suppress(ProcessLookupError):
                if each and (each == launcher.pid or alive(each)):
                    os.kill(each, signal.SIGKILL)
        launcher.wait()
        launcher.stdout.close()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"])
def test_a_signal_reaches_the_script_once(script, tmp_path, name):
    """Sent to the launcher alone; the script's own end, and status, come after its clean-up."""
    with running(script(COUNTS), str(tmp_path / "seen")) as (launcher, pid):
        os.kill(launcher.pid, getattr(signal, name))
        assert launcher.wait(30) == 7
        assert json.loads((tmp_path / "seen").read_text()) == [name] and not alive(pid)


@contextlib.contextmanager
def held_up(launcher: int) -> Iterator[None]:
    """What the script gets meanwhile is not from the launcher; what the launcher passes on comes 0.2 s later. Two that
    come at once would be one: a signal that is pending already is not counted again."""
    os.kill(launcher, signal.SIGSTOP)
    try:
        yield
        time.sleep(0.2)
    finally:
        os.kill(launcher, signal.SIGCONT)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_the_whole_group_reaches_the_script_once(script, tmp_path, name):
    with running(script(COUNTS), str(tmp_path / "seen")) as (launcher, _):
        with held_up(launcher.pid):
            os.killpg(launcher.pid, getattr(signal, name))
        assert launcher.wait(30) == 7
        assert json.loads((tmp_path / "seen").read_text()) == [name]


def test_a_script_does_not_outlive_its_launcher(script, tmp_path):
    """Killed as hard as can be, the launcher cannot pass anything on: the kernel sends SIGTERM for it."""
    with running(script(COUNTS), str(tmp_path / "seen")) as (launcher, pid):
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait()
        deadline = time.monotonic() + 30
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert json.loads((tmp_path / "seen").read_text()) == ["SIGTERM"]


@pytest.mark.parametrize("listens", [False, True])
def test_a_signal_that_was_ignored_stays_ignored(script, tmp_path, listens):
    """nohup fuyou launch …, and a script that leaves it at that, or has a handler of its own."""

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    arguments = [str(tmp_path / "seen"), *(["all"] if listens else [])]
    with running(script(COUNTS), *arguments, preexec_fn=ignore) as (launcher, pid):
        for each in [launcher.pid] if listens else [launcher.pid, pid]:
            os.kill(each, signal.SIGHUP)
        time.sleep(0.2)
        os.kill(launcher.pid, signal.SIGUSR1)
        assert launcher.wait(30) == 7
        assert json.loads((tmp_path / "seen").read_text()) == ["SIGUSR1"]


# A shell on a terminal of its own: it starts the launcher in a group of its own in the foreground, and says how it ends.
# With job control it says too when that is stopped, and continues it.
SHELL = """
    import os, signal, sys
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    job = os.fork()
    if job == 0:
        os.setpgid(0, 0)
        os.tcsetpgrp(0, os.getpid())
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)
        os.execv(sys.argv[2], sys.argv[2:])
    print("job", job, flush=True)
    while True:
        _, status = os.waitpid(job, os.WUNTRACED if sys.argv[1] == "jobs" else 0)
        if not os.WIFSTOPPED(status):
            break
        os.tcsetpgrp(0, os.getpgrp())
        print("stopped", flush=True)
        os.tcsetpgrp(0, job)
        os.killpg(job, signal.SIGCONT)
        print("continued", flush=True)
    os.tcsetpgrp(0, os.getpgrp())
    print("status", os.waitstatus_to_exitcode(status), flush=True)
"""


class Terminal:
    """A pseudo-terminal with SHELL and its job: what is typed goes to the foreground's group, as from a keyboard."""

    def __init__(self, shell: str, *job: str) -> None:
        self.pid, self.keys = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [sys.executable, shell, *job], ENVIRONMENT)
        self.said = ""

    def read_until(self, pattern: str) -> str:
        """What the first group matched."""
        deadline = time.monotonic() + 60
        while not (found := re.search(pattern, self.said)):
            assert time.monotonic() < deadline, self.said
            with contextlib.suppress(OSError):
                self.said += os.read(self.keys, 4096).decode(errors="replace")
        return found[1]

    def close(self) -> None:
        os.close(self.keys)
        os.waitpid(self.pid, 0)


@pytest.fixture
def terminal(script, tmp_path):
    """terminal(kind): a shell with a launcher of COUNTS that is ready; its script's process is `.script`."""
    opened = []

    def start(kind: str) -> Terminal:
        shell = script(SHELL, "shell.py")
        opened.append(Terminal(shell, kind, *command("--quiet", script(COUNTS), str(tmp_path / "seen"))))
        opened[0].script = int(opened[0].read_until(r"ready (\d+)\s"))
        return opened[0]

    yield start
    for each in opened:
        each.close()


def test_ctrl_c_at_a_terminal_reaches_the_script_once(terminal, tmp_path):
    at = terminal("plain")
    with held_up(int(at.read_until(r"job (\d+)\s"))):
        os.write(at.keys, b"\x03")
    assert at.read_until(r"status (-?\d+)\s") == "7"
    assert json.loads((tmp_path / "seen").read_text()) == ["SIGINT"] and not alive(at.script)


def test_ctrl_z_at_a_terminal_stops_launcher_and_script(terminal, tmp_path):
    """So that the shell sees it; and they go on together, with the keys still theirs."""
    at = terminal("jobs")
    os.write(at.keys, b"\x1a")
    at.read_until(r"(stopped)\s+continued\s")
    assert alive(at.script) and not (tmp_path / "seen").exists()
    os.write(at.keys, b"\x03")
    assert at.read_until(r"status (-?\d+)\s") == "7"
    assert json.loads((tmp_path / "seen").read_text()) == ["SIGINT"] and not alive(at.script)
