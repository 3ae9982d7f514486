"""SIGKILL at random moments, in steps, in commits, in the recovery itself: the newest complete step is gone on from, and in the
end nothing tells that anybody was ever killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_tools import run_script

SCRIPT = """
    import json, os, random, signal, sys, time
    from pathlib import Path
    import torch
    torch.set_num_threads(1)  # whoever forks has no threads that compute
    from fault_tools import forked
    from killed_job import work
    from resuming import digest, trainer

    folder, kills, seed, clamps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "True"
    STEPS = 4 * kills + 8
    drives = ["one", "two"]
    for name in drives:
        (folder / name).mkdir()
    DRIVES = (["one"], ["one", "two"], ["two"], ["two", "one"])
    draw = random.Random(seed)

    def options():
        if draw.random() < 0.5:  # as it was, the most common case
            return {"drives": ["one"], "ram": "1MiB"}
        return {
            "drives": draw.choice(DRIVES),
            "ram": draw.choice(["600KiB", "1MiB", "64MiB"]),
            "io": draw.choice(["auto", "threads"]),
            "update": draw.choice(["auto", "deferred"]),
        }

    def lines(pipe, seconds, after_first_word=False):
        # What comes in so many seconds, from now on or from the first line on.
        text = b""
        os.set_blocking(pipe, False)
        until = time.monotonic() + (60 if after_first_word else seconds)
        while time.monotonic() < until:
            try:
                more = os.read(pipe, 1 << 16)
            except BlockingIOError:
                time.sleep(0.002)
                continue
            if not more:
                break
            if after_first_word and not text:
                until = time.monotonic() + seconds
            text += more
        return text

    # What nobody kills takes, so that kills fall anywhere in it.
    loop = trainer(clamps)
    losses, rows, states = [], [], {}
    for step in range(1, STEPS + 1):
        loop.read.clear()
        losses.append(loop.step().hex())
        rows.append(list(loop.read))
        states[str(step)] = digest(loop.state())
    expected = digest(loop.state())

    history = []
    newest, done, in_recovery, at_work, last = 0, None, 0, 0, ["one"]
    for turn in range(kills + 50):
        ours, theirs = os.pipe()
        its = options()
        if not set(its["drives"]) & set(last):  # a store somewhere else is nobody's to look for
            its["drives"] = last
        pid = forked(work, folder, {**its, "clamps": clamps}, STEPS, theirs)
        os.close(theirs)
        alive = turn >= kills
        if alive:
            text = lines(ours, 600)
        elif turn % 3 == 0:  # while it opens, or recovers
            text = lines(ours, draw.random() * 0.5)
        else:
            text = lines(ours, draw.random() ** 2 * 0.5, after_first_word=True)
        if not alive:
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        text += lines(ours, 600)
        os.close(ours)
        assert status in (0, -signal.SIGKILL), (turn, status, its)
        told = [line.split() for line in text.decode().splitlines()]
        history.append((its, told[:1], told[-1:]))
        for verb, what in told:
            if verb == "resumed":
                assert int(what) >= newest, (turn, its, what, newest)  # never from an older one
                last = its["drives"]
            if verb == "done":
                done = what
            else:
                newest = max(newest, int(what))
        in_recovery += not told
        at_work += bool(told)
        if done is not None:
            break
    found = [json.loads(line) for line in (folder / "metrics").read_text().splitlines()]
    steps = [each["step"] for each in found]
    assert steps == list(range(STEPS)), (steps, history)
    wrong = [each["step"] for each, loss, its in zip(found, losses, rows) if (each["loss"], each["rows"]) != (loss, its)]
    assert wrong == [], (wrong, history)
    assert done == expected, history
    assert in_recovery and at_work, (in_recovery, at_work)
    saved = [path for path in (folder / "saves").iterdir() if not path.name.startswith(".")]  # each is whole
    assert saved
    (folder / "other").mkdir()
    for path in saved:
        loop = trainer(clamps)
        with loop.wrapped(folder / "other", ram="64MiB", resume=str(path)):
            assert digest(loop.state()) == states[path.name], path.name
    print("kills", turn, "before the first word", in_recovery, "after it", at_work, "OK", sep=" ")
"""


@pytest.mark.parametrize(
    ("kills", "seed", "clamps"),
    [
        (10, 0, False),
        pytest.param(100, 1, True, marks=pytest.mark.slow),
        pytest.param(100, 2, False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(1800)
def test_nothing_tells_that_a_run_was_killed(nvme: Path, kills: int, seed: int, clamps: bool) -> None:
    """`clamps`: see resuming.trainer."""
    run_script(SCRIPT, str(nvme), str(kills), str(seed), str(clamps), timeout_s=1700)
