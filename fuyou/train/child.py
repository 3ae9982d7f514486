"""One child process whose signals, terminal and end are those of this process.

[Note: who gets a signal] The child must get each exactly once: a second Ctrl-C would break off the clean-up that the
first one began.
 - In the terminal's foreground the child stays in this process's group. Ctrl-C, Ctrl-\\, Ctrl-Z and a hang-up then reach
   both, from the kernel; this process passes on only what a process sent to it alone (`kill PID`).
 - Elsewhere (batch jobs, CI, services, background jobs) the child gets a group of its own, and everything comes through
   this process: a signal sent to the whole group (`timeout`, os.killpg) would otherwise reach the child twice.
Signals that were ignored when this process began (nohup, `&` in a script) stay ignored in both.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

PASSED_ON = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
    signal.SIGTSTP, signal.SIGCONT,
)  # fmt: skip
_FROM_KERNEL = 0x80  # si_code SI_KERNEL: typed at the terminal, not sent by a process
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class End:
    """How the child ended: `code` as subprocess has it (−9: killed by signal 9), and its highest resident memory."""

    code: int
    peak_rss_bytes: int

    @property
    def exit_status(self) -> int:
        """As shells have it: the child's own, or 128 + the signal that killed it."""
        return self.code if self.code >= 0 else 128 - self.code


def run_child(command: Sequence[str], environment: Mapping[str, str], cores: frozenset[int] | None) -> End:
    """Start `command`, pass signals on, wait for its end whatever comes. If this process is killed, the child gets SIGTERM.

    Raises OSError where it cannot be started.
    """
    in_foreground = _in_foreground()
    with _held(PASSED_ON) as (watched, before):
        child = _start(command, environment, cores, before, own_group=not in_foreground)
        try:
            return _watch(child, watched, in_foreground)
        finally:
            if child.returncode is None:  # an error of our own: nothing is left behind
                child.terminate()
                child.wait()


def _start(
    command: Sequence[str], environment: Mapping[str, str], cores: frozenset[int] | None, mask: set, own_group: bool
) -> subprocess.Popen:
    parent = os.getpid()

    def before_exec() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # the parent died before prctl: the signal will not come
            os._exit(128 + signal.SIGTERM)
        if own_group:
            os.setpgid(0, 0)
        if cores is not None:
            os.sched_setaffinity(0, cores)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # a mask survives exec; last, so that all above is done

    return subprocess.Popen(list(command), env=dict(environment), preexec_fn=before_exec)


def _watch(child: subprocess.Popen, watched: set, in_foreground: bool) -> End:
    """Until the child's end: pass signals on, stop and go on with it."""
    asked_to_stop = False
    while True:
        info = signal.sigwaitinfo(watched)
        if info.si_signo == signal.SIGCHLD:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG | os.WUNTRACED)
            if pid == 0:
                continue
            if os.WIFSTOPPED(status):
                if in_foreground or asked_to_stop:  # the shell waits for this process: it must see the stop here
                    asked_to_stop = False
                    os.kill(os.getpid(), signal.SIGSTOP)
                    os.kill(child.pid, signal.SIGCONT)  # somebody has continued this process
                continue
            child.returncode = os.waitstatus_to_exitcode(status)
            return End(child.returncode, usage.ru_maxrss * 1024)
        if in_foreground and info.si_code == _FROM_KERNEL:
            continue  # [Note: who gets a signal]: the child has it
        asked_to_stop = asked_to_stop or info.si_signo == signal.SIGTSTP
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, info.si_signo)  # it is not reaped yet, so the number is still its own


@contextlib.contextmanager
def _held(signals: Sequence[signal.Signals]) -> Iterator[tuple[set, set]]:
    """Block `signals` (but ignored ones) and SIGCHLD, so that sigwaitinfo has them. Yields them and the mask before."""
    watched = {each for each in signals if signal.getsignal(each) is not signal.SIG_IGN} | {signal.SIGCHLD}
    child_handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, wait would find no child
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    try:
        yield watched, set(before)
    finally:
        while signal.sigtimedwait({signal.SIGCHLD}, 0):
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGCHLD, child_handler if child_handler is not None else signal.SIG_DFL)


def _in_foreground() -> bool:
    """This process's group is the one that its terminal's keys reach."""
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
    except OSError:  # no terminal
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
