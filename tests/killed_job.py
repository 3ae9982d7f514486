"""The process that test_killed.py kills: a fork that trains, from wherever the one before it came to."""

from __future__ import annotations

import json
import os
from pathlib import Path

from resuming import digest, trainer

import fuyou


def work(folder: Path, options: dict, steps: int, pipe: int) -> None:
    """Train to `steps`. Tells the pipe "resumed N", then "committed N" once `run.committed_step` says so, and "done DIGEST"
    of the last state; metrics are a line a step in folder/metrics, cut back to the step that the run goes on from. Every third
    step is saved to folder/saves, beside training, where it is not there yet."""

    def tell(*words: object) -> None:
        os.write(pipe, (" ".join(map(str, words)) + "\n").encode())

    loop = trainer(options.pop("clamps"))
    nvme = [folder / name for name in options.pop("drives")]
    with loop.wrapped(nvme, resume=True, **options) as run:
        first = told = run.committed_step
        tell("resumed", first)
        metrics = folder / "metrics"
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        (folder / "cut").write_text("".join(lines[:first]))  # whole or not, whoever kills
        (folder / "cut").rename(metrics)
        with metrics.open("a") as file:
            for step in range(first, steps):
                loop.read.clear()
                loss = loop.step()
                file.write(json.dumps({"step": step, "loss": loss.hex(), "rows": loop.read}) + "\n")
                file.flush()
                if step % 3 == 2 and not (folder / f"saves/{step + 1}").exists():
                    run.save(folder / f"saves/{step + 1}")
                if run.committed_step > told:
                    told = run.committed_step
                    tell("committed", told)
            run.settle()
            tell("committed", run.committed_step)
        tell("done", digest(loop.state()))


assert fuyou.__name__ == "fuyou"  # imported here, once, for all forks
