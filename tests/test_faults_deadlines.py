"""Every wait has a deadline, given by Config.deadline_s, and its error names what has not ended."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import fuyou
from fuyou.core.errors import ConfigError, DeadlineError
from fuyou.core.ledger import Ledger
from fuyou.core.ticket import AllOf
from fuyou.tiers.host import Arena
from fuyou.tiers.worker import Worker

MIB = 1 << 20


@pytest.mark.parametrize("value", [0, -1, True, "soon", None, float("inf"), float("nan")])
def test_a_deadline_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match="deadline_s=.* must be a number of seconds, more than 0"):
        fuyou.Config(deadline_s=value)


def test_the_default_is_generous_and_a_whole_number_will_do():
    assert fuyou.Config().deadline_s == 300.0
    assert fuyou.Config(deadline_s=7) == fuyou.Config(deadline_s=7.0) != fuyou.Config()


def test_an_arena_says_who_holds_what():
    arena = Arena(4 * MIB, Ledger({"device": 0, "host": 4 * MIB, "nvme": 0}), deadline_s=0.05)
    held = [arena.lease(MIB, "staging"), arena.lease(MIB, "staging"), arena.lease(MIB, "optimizer")]
    started = time.monotonic()
    with pytest.raises(DeadlineError) as caught:
        arena.lease(2 * MIB, "weights", "layer 3")
    assert 0.04 < time.monotonic() - started < 5
    for words in ("Waited 0.05 s for 2.00 MiB", "layer 3", "3 leases", "staging 2.00 MiB", "optimizer 1.00 MiB"):
        assert words in str(caught.value)
    held.pop().release()
    threading.Timer(0.05, held.pop().release).start()  # what comes back in time is waited for
    arena.lease(3 * MIB, "weights", timeout_s=30).release()
    held.pop().release()
    arena.close()


def test_a_worker_names_its_job_those_behind_it_and_the_operations_in_flight():
    go_on = threading.Event()
    worker = Worker("slow", deadline_s=0.05, in_flight=lambda: ["read 4096 bytes at 0 of /drive/data"])
    worker.submit(go_on.wait, "reading layer 1")
    second = worker.submit(lambda: None, "reading layer 2")
    worker.submit(lambda: None, "reading layer 3")
    with pytest.raises(DeadlineError) as caught:
        second.wait()
    for words in (
        "0.05 s for reading layer 2",
        "slow runs: reading layer 1",
        "queued behind it: reading layer 2; reading",
    ):
        assert words in str(caught.value)
    assert "1 operations in flight: read 4096 bytes at 0 of /drive/data" in str(caught.value)
    with pytest.raises(DeadlineError, match=r"0.05 s to close slow; slow runs: reading layer 1"):
        worker.close()
    go_on.set()
    worker.deadline_s = 30
    worker.close()
    second.wait()
    assert not any(thread.name == "slow" for thread in threading.enumerate())


def test_several_tickets_share_one_deadline_or_have_each_their_own():
    waited: list[float | None] = []

    class Late:
        def done(self) -> bool:
            return False

        def wait(self, timeout_s: float | None = None) -> None:
            waited.append(timeout_s)
            time.sleep(0.1)

    AllOf([Late(), Late(), Late()]).wait(0.15)
    assert waited[0] == pytest.approx(0.15, abs=0.02) and waited[1] < 0.06 and waited[2] == 0.0
    waited.clear()
    AllOf([Late(), Late()]).wait()
    assert waited == [None, None]


def test_every_part_of_a_run_has_its_configs_deadline(nvme):
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    config = fuyou.Config(deadline_s=7)
    with fuyou.wrap(model, optimizer, nvme=nvme, ram="300KiB", gpu="256MiB", device="cpu", config=config) as run:
        tiers = run._tiers
        assert {tiers.link.deadline_s, run._movers.swapper._loader.deadline_s, tiers.arena._deadline_s} == {7.0}
        assert tiers.engine.deadline_s == 7.0
