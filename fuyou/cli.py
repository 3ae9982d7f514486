"""The `fuyou` command: one small function a command, and one place where errors become a paragraph and a status."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from fuyou.core.errors import FuyouError

_INTERRUPTED = 130  # typer makes this status of Ctrl-C by itself, or an Abort in older versions


@dataclass
class Invocation:
    """What a command tells `main` beside its return."""

    debug: bool = False
    status: int | None = None  # of a launched script: the command's own


app = typer.Typer(
    help="Fine-tune models whose training state does not fit in memory.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _remember_debug(context: typer.Context, wanted: bool) -> bool:
    if isinstance(context.obj, Invocation):
        context.obj.debug = wanted
    return wanted


Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_remember_debug, is_eager=True)
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fuyou {version('fuyou')}")
        raise typer.Exit()


@app.callback()
def fuyou(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune models whose training state does not fit in memory."""


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The file to write.", show_default=True)] = Path(
        "fuyou.yaml"
    ),
    model: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="A Hugging Face folder, or an id on the hub.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(metavar="FILE", help="A file of training data; repeatable.")] = None,
    output: Annotated[str | None, typer.Option(metavar="FOLDER", help="The folder that the run fills.")] = None,
    nvme: Annotated[
        list[str] | None,
        typer.Option(metavar="FOLDER", help="A folder on the drive, one a drive; repeatable. `null`: host RAM only."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
    debug: Debug = False,
) -> None:
    """Write a commented configuration for `fuyou train`: every key with its default, and these values filled in."""
    from fuyou.train.init import write_config

    values: dict[str, Any] = {"model": model, "output": output}
    values = {key: value for key, value in values.items() if value is not None}
    for key, items in (("data", data), ("nvme", nvme)):
        if items:
            values[key] = items[0] if len(items) == 1 else items
    if values.get("nvme") == "null":
        values["nvme"] = None
    left = write_config(path, values, force)
    first = f"fill in {', '.join(left)}, then try" if left else "try"
    print(f"Wrote {path}: {first} `fuyou train {path} --dry-run`.")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="A flat YAML file of keys and values.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="key=value", help="Override a key of the file; repeatable.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Resolve and check everything, show what would run, and train nothing.")
    ] = False,
    discard: Annotated[
        bool, typer.Option("--discard", help="Begin though the nvme folders hold steps of a run that was killed.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune as CONFIG.yaml says; the model, metrics and memory report are in its `output` folder."""
    from fuyou.core.environment import places
    from fuyou.train.config import read_config

    settings = read_config(config, set_ or ())
    # Budgets and a device that are null are the environment's, as they would be in `wrap`; so the run's folder shows them.
    found = places(settings.nvme, settings.nvme_limit, settings.ram, settings.gpu, settings.device)
    settings = settings.model_copy(update=found._asdict())
    from fuyou.train.job import run_job  # only now: a configuration that is refused need not wait for torch

    run_job(settings, dry_run=dry_run, resume=False if discard else None)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The output folder of a run that was broken off.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="key=value", help="Other budgets, drives or io from here on; repeatable."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Go on with a run from its newest complete step: same bits, as if nothing had happened."""
    from fuyou.train.resume import read_run

    settings, source = read_run(run, set_ or ())
    from fuyou.train.job import run_job

    run_job(settings, resume=source)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The output folder of a run, complete or not.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder that is filled.")],
    debug: Debug = False,
) -> None:
    """Write the weights of a run's newest complete step in Hugging Face's layout; nothing is trained."""
    from fuyou.train.export import export_run

    step = export_run(run, out)
    print(f"Wrote the weights of step {step} to {out}.")


@app.command(
    context_settings={"allow_interspersed_args": False},  # what follows SCRIPT is the script's, --help and -- too
    epilog="Example: fuyou launch --nvme /mnt/nvme --ram 48GiB finetune.py --lr 1e-5",
)
def launch(
    context: typer.Context,
    script: Annotated[list[str], typer.Argument(metavar="SCRIPT [ARGS]", help="A Python file, and its arguments.")],
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is the name of a module, as for `python -m`.")] = False,
    nvme: Annotated[
        list[str] | None, typer.Option(metavar="FOLDER", help="A folder on the drive, one a drive; repeatable.")
    ] = None,
    nvme_limit: Annotated[str | None, typer.Option(metavar="SIZE", help="What the drives may hold.")] = None,
    ram: Annotated[str | None, typer.Option(metavar="SIZE", help="What host memory may hold, as 48GiB.")] = None,
    gpu: Annotated[str | None, typer.Option(metavar="SIZE", help="What the device's memory may hold.")] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cuda, cuda:1 or cpu.")] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="Compute threads; else OMP_NUM_THREADS, else one a physical core of those granted."),
    ] = None,
    cores: Annotated[
        str | None, typer.Option(metavar="LIST", help="Bind to these cores, as 0-7,16; else those next to the GPU.")
    ] = None,
    no_bind: Annotated[bool, typer.Option("--no-bind", help="Bind to no cores.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Do not say what was set.")] = False,
    debug: Debug = False,
) -> None:
    """Run your own script in Python, with these as defaults for its `fuyou.wrap`; an argument in the script wins.

    They are passed in the environment: FUYOU_NVME (folders with ":" between them), FUYOU_NVME_LIMIT, FUYOU_RAM,
    FUYOU_GPU, FUYOU_DEVICE. Signals reach the script, and its exit status is this command's (128 + N where signal N
    killed it, and then standard error says why). Give this command's options before SCRIPT.
    """
    from fuyou.train.launch import Launch, launch

    context.obj.status = launch(
        Launch(
            script[0], script[1:], module, nvme or (), nvme_limit, ram, gpu, device, threads, cores, not no_bind, quiet
        )
    )


@app.command(
    epilog="Example: fuyou plan --layers 40 --heads 40 --hidden 5120 --vocab 50257 --batch 16 --sequence 1024 "
    "--hardware rtx4090-4xgen4"
)
def plan(
    context: typer.Context,
    batch: Annotated[int, typer.Option(min=1, help="Rows a GPU and backward.")],
    sequence: Annotated[int, typer.Option(min=1, help="Tokens a row.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="A Hugging Face folder, or an id in the cache; only its config is read."),
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="In place of --model: blocks of a GPT.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads of each.")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Their width.")] = None,
    vocab: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the embedding and the head; left out: neither.")
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A hardware file, or the name of one that comes with fuyou (any other name lists "
            "them). Left out: this machine, measured in some seconds.",
        ),
    ] = None,
    accumulation: Annotated[int, typer.Option(min=1, help="Backwards a step.")] = 1,
    gpu_count: Annotated[
        int, typer.Option("--gpu-count", min=1, help="GPUs with rows of their own: a prediction, fuyou trains on one.")
    ] = 1,
    drives: Annotated[
        int | None, typer.Option(min=0, help="As many drives, like the machine's first; the array's limit stays.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Budget of each GPU's memory, as 20GiB; else 80 %.")
    ] = None,
    ram: Annotated[str | None, typer.Option(metavar="SIZE", help="Budget of host memory; else 80 %.")] = None,
    nvme: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE|FOLDER",
            help="With --hardware, what the drives may hold, as 2TB. Without it, a folder on "
            "the drive to measure, one a drive, repeatable; left out: the working directory.",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="bf16 or fp32; else bf16, and fp32 on this machine without a GPU."),
    ] = None,
    system: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="fuyou, or paper: the Fuyou paper's own, whose published times check the model."
        ),
    ] = "fuyou",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Predict a training step on this machine or another: whether it fits, its time, what bounds it, the drives' wear.

    Exit status 0: it fits. 1: it does not, and the smallest change that would is printed. 2: a bad argument.
    """
    from fuyou.train.plan_job import PlanArguments
    from fuyou.train.plan_job import plan as run_plan

    arguments = PlanArguments(
        model, layers, heads, hidden, vocab, hardware, batch, sequence, accumulation, gpu_count, drives, gpu, ram,
        nvme or (), precision, system,
    )  # fmt: skip
    context.obj.status = run_plan(arguments, as_json)


@app.command(
    epilog="Example: fuyou doctor --nvme /mnt/nvme --save machine.json && fuyou plan --hardware machine.json …"
)
def doctor(
    context: typer.Context,
    nvme: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR", help="A folder on a drive to examine; repeatable. Left out: those of FUYOU_NVME."),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write what was measured as a hardware file, for `fuyou plan --hardware`."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: findings, and the facts behind them.")] = False,
    debug: Debug = False,
) -> None:
    """Examine this machine: what it is, how fast it is, what holds fuyou back, and the cure. Nothing is left on a drive.

    Exit status 0: it can train. 1: something is a problem. 2: a bad argument.
    """
    from fuyou.core.environment import nvme_folders
    from fuyou.doctor.command import doctor as run_doctor

    context.obj.status = run_doctor(nvme or nvme_folders() or (), as_json, save)


@app.command(
    epilog="Example: fuyou verify job.yaml --steps 5, or fuyou verify --model m --data d.jsonl --nvme /mnt/nvme"
)
def verify(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="The configuration of a job of `fuyou train`.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="In place of CONFIG.yaml: a Hugging Face folder, or an id.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(metavar="FILE", help="With --model; repeatable.")] = None,
    nvme: Annotated[
        list[str] | None, typer.Option(metavar="FOLDER", help="With --model; repeatable. Left out: host RAM only.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="key=value", help="Override a key of the job; repeatable.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps that both sides train.")] = 3,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Layers at most; else as many as plain PyTorch has memory for.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Train some steps of a job with fuyou and in plain PyTorch, and compare every parameter. No file is left.

    Exit status 0: exact, or within tolerance where bits are not promised. 1: wrong. 2: it cannot be compared.
    """
    from fuyou.train.config import config_to_verify

    settings = config_to_verify(config, model, data or (), nvme or (), set_ or ())
    from fuyou.train.verify import verify as run_verify

    context.obj.status = run_verify(settings, steps, layers, as_json)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The output folder of a run, or of one that failed.")],
    compare: Annotated[
        Path | None, typer.Option(metavar="OTHER", help="Another run's folder: its figures beside this one's.")
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show the page in a browser.")] = False,
    debug: Debug = False,
) -> None:
    """Print what a run held, moved and waited for, and write its page (report.html) and trace (trace.json) beside it."""
    from fuyou.train.report_job import report_run

    report_run(run, compare, open_)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. 0: done; 2: a bad argument, configuration or input; 1: any other failure; 130: interrupted; of
    `launch`, the script's own."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    invocation = Invocation()
    try:
        status = app(args=given, prog_name="fuyou", standalone_mode=False, obj=invocation)
        if invocation.status is not None:
            return invocation.status
        return _interrupted(given) if status == _INTERRUPTED else status if isinstance(status, int) else 0
    except KeyboardInterrupt:
        return _interrupted(given)
    except Exception as error:
        if invocation.debug:
            traceback.print_exc()
        if isinstance(error, typer.Abort):
            return _interrupted(given)
        if hasattr(error, "format_message"):  # the command line itself, refused by typer's parser
            message = error.format_message()
            stop = "" if message.endswith((".", "?")) else "."
            return _fail(f"{message}{stop} Try `fuyou {_command(given)}--help`.", 2)
        if isinstance(error, FuyouError):
            return _fail(str(error), error.exit_status)
        return _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1)


def _command(given: Sequence[str]) -> str:
    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    return f"{given[0]} " if given and given[0] in known else ""


def _interrupted(given: Sequence[str]) -> int:
    train = given[:1] == ["train"]
    return _fail(
        "interrupted: the run was closed, and nothing was exported." if train else "interrupted.", _INTERRUPTED
    )


def _fail(message: str, status: int) -> int:
    print(f"fuyou: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
