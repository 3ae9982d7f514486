"""The unmodified transformers.Trainer, killed at random moments and started again: it ends as if nobody had ever killed it."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_tools import run_script

pytest.importorskip("accelerate", reason="transformers.Trainer needs it")

SCRIPT = """
    import json, os, random, signal, sys, time
    from pathlib import Path
    import torch
    torch.set_num_threads(1)  # whoever forks has no threads that compute
    import clients, models
    from fault_tools import forked
    from trainer_job import STEPS, is_whole, plain, work
    import fuyou
    from commit_tools import newest
    from fuyou.tiers.saved import was_left_open

    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    draw = random.Random(seed)
    (folder / "nvme").mkdir()
    output, began = folder / "output", folder / "began"
    expected, weights = plain(folder / "plain")
    assert len(expected) == STEPS and len({each["learning_rate"] for each in expected}) > STEPS // 2

    def being_saved():
        return not all(map(is_whole, output.glob("checkpoint-*")))

    def wait_for(what, pid):
        until = time.monotonic() + 60
        while not what() and time.monotonic() < until:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
            time.sleep(0.0005)

    # Steps that are committed are nobody's here: the Trainer's own checkpoint says where it goes on.
    OPTIONS = (
        {"durability": "checkpoint"}, {"durability": "step", "resume": False},
        {"durability": "checkpoint", "resume": False, "activations": "keep"},
        {"durability": "step", "resume": False, "verify_reads": True, "update": "deferred"},
    )
    in_saving = resumed = refused = 0
    for turn in range(kills + 1):
        began.unlink(missing_ok=True)
        its = dict(OPTIONS[1 if turn == 0 else draw.randrange(len(OPTIONS))])
        if "resume" not in its and was_left_open(str(folder / "nvme")) and newest(folder / "nvme"):
            # A kill left steps there, and nobody has said that they may go.
            model, optimizer, _ = clients.started(models.CASES["llama"].model)
            try:
                clients.wrapped(model, optimizer, folder / "nvme", ram="320KiB", config=fuyou.Config(**its))
                sys.exit("a step that was left was discarded unasked")
            except fuyou.StateError as error:
                assert "Config(resume=False)" in str(error) and "Trainer" in str(error), error
            its["resume"], refused = False, refused + 1
        resumed += any(map(is_whole, output.glob("checkpoint-*")))
        pid = forked(work, folder, its)
        wait_for(began.exists, pid)
        if turn < kills:
            if turn == 0:  # after its first checkpoint
                wait_for(lambda: any(map(is_whole, output.glob("checkpoint-*"))), pid)
                time.sleep(draw.random() * 0.1)
            elif turn % 2:  # in the next checkpoint
                wait_for(being_saved, pid)
                time.sleep(draw.random() * 0.03)
            else:
                time.sleep(draw.random() ** 2 * 1.0)
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL), (turn, status, its)
        in_saving += being_saved()
        if status == 0:
            break
    found, digest = json.loads((folder / "result").read_text())
    assert found == expected, [(a, b) for a, b in zip(found, expected) if a != b][:2]
    assert digest == weights
    kept = {each.name for each in output.glob("checkpoint-*")}
    assert kept == {"checkpoint-12", "checkpoint-14"}, kept
    assert resumed and (in_saving or kills < 10), (in_saving, resumed)
    print("kills", turn, "in a checkpoint", in_saving, "gone on from one", resumed, "refused", refused, "OK")
"""


@pytest.mark.parametrize(
    ("kills", "seed"), [(2, 0), *(pytest.param(25, seed, marks=pytest.mark.slow) for seed in range(1, 4))]
)
@pytest.mark.timeout(900)
def test_nothing_tells_that_a_trainer_was_killed(nvme: Path, kills: int, seed: int) -> None:
    print(run_script(SCRIPT, str(nvme), str(kills), str(seed), timeout_s=800).stdout)
