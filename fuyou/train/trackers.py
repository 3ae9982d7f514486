"""Where metrics go beside metrics.jsonl: TensorBoard, Trackio, Weights & Biases, each imported only when asked for."""

from __future__ import annotations

import contextlib
import importlib.util
import netrc
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from fuyou.core.config import nearest
from fuyou.core.errors import ConfigError

PROJECT = "fuyou"


class Tracker(Protocol):
    """One place that shows metrics. `values` are numbers, by the names that metrics.jsonl has."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in output/tensorboard (32-bit floats, as the format has it): tensorboard --logdir output."""

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(output / "tensorboard"))
        self._writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in settings.items()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """A run of project `fuyou` in Trackio's own folder (TRACKIO_DIR, else its cache): trackio show --project fuyou."""

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        import trackio

        self._trackio = trackio
        with contextlib.redirect_stdout(sys.stderr):  # it prints, and standard output is the job's own
            self._run = trackio.init(
                PROJECT,
                name=str(output.absolute()),
                config=dict(settings),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._trackio.finish()


class Wandb:
    """A run in output/wandb: offline (`wandb sync` sends it) unless the user is logged in or WANDB_MODE says otherwise."""

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        (output / "wandb").mkdir(exist_ok=True)  # wandb falls back to a temporary folder where it cannot write
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=output.absolute().name,
            dir=str(output),
            config=dict(settings),
            mode=None if "WANDB_MODE" in os.environ or _logged_in_to_wandb() else "offline",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


_TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
}  # each package is called as its tracker, and so is its extra


class Trackers:
    """Several trackers as one. One that fails is said so once and left out from then on: training matters more."""

    def __init__(
        self, names: Sequence[str], output: Path, settings: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        self._say = say
        self._open: dict[str, Tracker] = {}
        for name in names:
            with self._surviving(name):
                self._open[name] = _TRACKERS[name](output, settings)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers are passed on; what is null or not a number is in metrics.jsonl only."""
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float)) and name != "step"}
        for name, tracker in list(self._open.items()):
            with self._surviving(name):
                tracker.log(step, numbers)

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            with self._surviving(name):
                tracker.close()
        self._open.clear()

    @contextlib.contextmanager
    def _surviving(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a library raises in there
            self._open.pop(name, None)
            reason = " ".join(str(error).split())
            self._say(
                f"The tracker {name} failed and is left out from here on ({type(error).__name__}: {reason}); "
                "training goes on, and metrics.jsonl has every step."
            )


def check_trackers(names: Sequence[str]) -> None:
    """ConfigError for a name that is unknown, given twice, or whose package is not installed."""
    for name in names:
        if name not in _TRACKERS:
            raise ConfigError(f"report_to={name!r} is no tracker{nearest(name, list(_TRACKERS))}")
        if list(names).count(name) > 1:
            raise ConfigError(f"report_to names {name!r} twice: once is enough.")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"report_to={name!r} needs the package {name}, which is not installed: pip install 'fuyou[{name}]', or "
                "leave it out; metrics are in output/metrics.jsonl as well."
            )


def _logged_in_to_wandb() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
