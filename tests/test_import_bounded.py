"""A model that does not fit into the budgets is imported and exported within them, and comes out as it went in."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fuyou.checkpoint.export import write_safetensors

JOB = Path(__file__).with_name("import_job.py")
PIECE = 1 << 20  # elements
SLACK = 1.05

LARGE = {  # 508M parameters in layers, 49M in each embedding: 2.1 GiB in fp32 where tied, 2.3 GiB where not
    "vocab_size": 32000, "hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 18, "num_attention_heads": 12,
}  # fmt: skip
MEDIUM = {
    "vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """A tensor of random numbers that exist a piece at a time; the same each time."""

    name: str
    shape: tuple[int, ...]
    number: int
    dtype: torch.dtype = torch.float32

    def chunks(self) -> Iterator[memoryview]:
        count = int(np.prod(self.shape))
        for start in range(0, count, PIECE):
            draw = np.random.Generator(np.random.SFC64(self.number * 2**32 + start))
            yield memoryview(draw.random(min(PIECE, count - start), dtype=np.float32) - np.float32(0.5))


def make_model(folder: Path, configuration: Any, shard_bytes: int) -> list[Drawn]:
    """The folder of a Llama that was never in memory."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(configuration)
    tensors = [Drawn(name, tuple(each.shape), number) for number, (name, each) in enumerate(model.named_parameters())]
    write_safetensors(folder, tensors, shard_bytes=shard_bytes)
    configuration.architectures, configuration.dtype = ["LlamaForCausalLM"], "float32"
    configuration.save_pretrained(folder)
    return tensors


def places(folder: Path) -> dict[str, tuple[Path, int, int]]:
    """Name → (file, first byte, past the last), read from the files themselves."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found |= {
            name: (path, *(8 + length + each for each in entry["data_offsets"])) for name, entry in header.items()
        }
    return found


def check_export(folder: Path, tensors: list[Drawn]) -> None:
    found = places(folder)
    assert found.keys() == {each.name for each in tensors}
    for each in tensors:
        path, begin, end = found[each.name]
        assert end - begin == 4 * np.prod(each.shape)
        with path.open("rb") as file:
            file.seek(begin)
            for chunk in each.chunks():
                assert file.read(chunk.nbytes) == chunk.tobytes(), each.name


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("size", "ram", "tied", "sharded"),
    [
        pytest.param(MEDIUM, 24 << 20, True, True, id="180 MiB, tied, sharded"),
        *(
            pytest.param(LARGE, 256 << 20, tied, sharded, id=f"2 GiB{name}", marks=pytest.mark.slow)
            for name, tied, sharded in (("", False, False), (", tied", True, False), (", sharded", False, True))
        ),
    ],
)
def test_import_and_export_stay_within_the_budgets(tmp_path, nvme, size, ram, tied, sharded):
    tiny = transformers.LlamaConfig(**{**size, "vocab_size": 64, "hidden_size": 96, "num_hidden_layers": 1})
    make_model(tmp_path / "small", tiny, 10**9)
    configuration = transformers.LlamaConfig(**size, tie_word_embeddings=tied)
    tensors = make_model(
        tmp_path / "model", configuration, 10**8 if sharded and size is MEDIUM else 6 * 10**8 if sharded else 10**10
    )
    nbytes = sum(4 * int(np.prod(each.shape)) for each in tensors)
    assert nbytes > (2 << 30 if size is LARGE else 160 << 20) and nbytes > 4 * ram
    assert (len(list((tmp_path / "model").glob("*.safetensors"))) > 1) == sharded
    arguments = [tmp_path / "small", tmp_path / "model", nvme, tmp_path / "out", ram]
    try:
        job = subprocess.run([sys.executable, JOB, *map(str, arguments)], capture_output=True, text=True, timeout=3000)
        assert job.returncode == 0, job.stderr
        seen = json.loads(job.stdout.splitlines()[-1])
        rates = {name: nbytes / seen[f"{name}ed_s"] / 1e9 for name in ("import", "export")}
        print({**seen, "tiers": None, "bytes": nbytes, "gb_per_s": rates})
        limit = SLACK * (seen["ram"] + seen["gpu"])
        assert 0 < seen["import_growth_bytes"] <= limit and 0 < seen["export_growth_bytes"] <= limit
        # Nothing is computed: what the device budget is for is not needed, and `ram` alone bounds what is held.
        assert max(seen["import_growth_bytes"], seen["export_growth_bytes"]) <= SLACK * ram + (16 << 20)
        assert seen["tiers"]["host"]["peak_bytes"] <= ram
        check_export(tmp_path / "out", tensors)
        written = json.loads((tmp_path / "out" / "config.json").read_text())
        assert written["tie_word_embeddings"] == tied and written["dtype"] == "float32"
    finally:
        for folder in ("model", "out"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
