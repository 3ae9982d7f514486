"""`fuyou export RUN OUT`: the weights of a run's newest step, read from its store or a checkpoint; nothing is trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fuyou.checkpoint.export import MemoryTensor, TensorSource
from fuyou.checkpoint.pretrained import export_pretrained
from fuyou.core.errors import ConfigError
from fuyou.runtime.manifest import SavedTensors
from fuyou.runtime.source import Source, check_all, read_source
from fuyou.tiers.folders import check_folders
from fuyou.train.adapters import add_adapters
from fuyou.train.config import TrainConfig, read_config
from fuyou.train.model import load_model, load_tokenizer
from fuyou.train.resume import checkpoints

_PIECE_ELEMENTS = 1 << 20


class SavedSource:
    """One parameter's compute copy, a few MiB at a time."""

    def __init__(self, name: str, saved_name: str, tensors: SavedTensors) -> None:
        self.name = name
        self.dtype = tensors.dtype(saved_name)
        self.shape = tensors.shape(saved_name)
        self._saved_name = saved_name
        self._tensors = tensors

    def chunks(self) -> Iterator[memoryview]:
        count = torch.Size(self.shape).numel()
        for first in range(0, count, _PIECE_ELEMENTS):
            last = min(first + _PIECE_ELEMENTS, count)
            piece = bytearray((last - first) * self.dtype.itemsize)
            self._tensors.read(self._saved_name, "weights", first, last, memoryview(piece))
            yield memoryview(piece)


def export_run(run: Path, out: Path) -> int:
    """Write the model as `fuyou train` writes it to model/; returns the step. ConfigError, StoreError."""
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run} holds no run: name the output folder of `fuyou train`, with its config.yaml.")
    config = read_config(path)
    source = _newest(run, config)
    try:
        check_all(source)
        model = _model(config)
        names = {id(each): name for name, each in model.named_parameters()}
        missing = [name for name in names.values() if name not in source.manifest.names]
        if missing:
            raise ConfigError(
                f"Step {source.saved.step} has no {', '.join(missing[:5])}: it is of another model than {config.model}."
            )
        tensors = source.tensors

        def source_of(name: str, tensor: torch.Tensor) -> TensorSource:
            known = names.get(id(tensor))
            return MemoryTensor(name, tensor) if known is None else SavedSource(name, known, tensors)

        export_pretrained(out, model, source_of, merge_adapters=config.lora is not None and config.lora.merge)
        load_tokenizer(config.model, config.sequence_length).save_pretrained(out)
    finally:
        source.close()
    return source.saved.step


def _newest(run: Path, config: TrainConfig) -> Source:
    places = [[str(path)] for path in checkpoints(run)[-1:]]
    if config.nvme is not None and config.durability != "checkpoint":
        places.insert(0, check_folders(config.nvme_folders()))
    for folders in places:
        source = read_source(folders)
        if source is not None:
            return source
    raise ConfigError(f"The run in {run} has no complete step and no checkpoint: there is nothing to export.")


def _model(config: TrainConfig) -> Any:
    """Its names, shapes and files beside the weights: those that it began with, which are not exported."""
    model, _ = load_model(config.model, config.precision, config.sequence_length)
    return model if config.lora is None else add_adapters(model, config.lora, config.seed)
