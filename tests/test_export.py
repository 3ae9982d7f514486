"""Exports load bit-equal in safetensors and transformers, hold a few MiB, and leave nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from fuyou.checkpoint.export import INDEX, WEIGHTS, MemoryTensor, write_safetensors
from fuyou.checkpoint.pretrained import export_pretrained, names_to_export
from fuyou.core.errors import ConfigError, StorageIOError, StoreError


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / WEIGHTS).exists():
        return load_file(folder / WEIGHTS)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    loaded: dict[str, torch.Tensor] = {}
    for file in sorted(set(weight_map.values())):
        part = load_file(folder / file)
        assert {name for name, where in weight_map.items() if where == file} == set(part)
        loaded |= part
    return loaded


DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
]


def mixed_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t{i}.{str(dtype).removeprefix('torch.')}": torch.randint(0, 2, (3, 5 + i), generator=generator).to(dtype)
        for i, dtype in enumerate(DTYPES)
    }
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.empty(0, 4)
    tensors["transposed"] = torch.randn(7, 3, generator=generator).t()
    tensors["naïve.ß"] = torch.tensor([float("nan"), float("inf"), -0.0])
    tensors["large"] = torch.randn(3 << 20, generator=generator)  # 12 MiB: several chunks
    return tensors


@pytest.mark.parametrize("shard_bytes", [10**9, 200, 1])
def test_every_dtype_and_shape_loads_bit_equal(tmp_path: Path, shard_bytes: int) -> None:
    tensors = mixed_tensors()
    files = write_safetensors(
        tmp_path, [MemoryTensor(name, tensor) for name, tensor in tensors.items()], shard_bytes=shard_bytes
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in files)
    assert (len(files) == 1) == (shard_bytes == 10**9)
    loaded = load_all(tmp_path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert bits(loaded[name]) == bits(tensor), name
    with safe_open(files[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_stay_under_their_limit_except_for_a_single_larger_tensor(tmp_path: Path) -> None:
    tensors = [MemoryTensor(f"t{i}", torch.zeros(size)) for i, size in enumerate([10, 10, 10, 100, 10, 20])]
    write_safetensors(tmp_path, tensors, shard_bytes=4 * 30)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    shards: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        shards.setdefault(file, []).append(name)
    assert list(shards.values()) == [["t0", "t1", "t2"], ["t3"], ["t4", "t5"]]
    assert json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"] == 4 * 160


# --- bounded and atomic -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """A tensor that exists only as a stream of pieces."""

    name: str
    shape: tuple[int, ...]
    piece: bytes = b"\0" * (1 << 20)
    count: int | None = None  # pieces to give; None: what the shape says
    error: Exception | None = None
    dtype: torch.dtype = torch.float32

    def chunks(self) -> Iterator[bytes]:
        total = 4
        for size in self.shape:
            total *= size
        for _ in range(total // len(self.piece) if self.count is None else self.count):
            yield self.piece
        if self.error:
            raise self.error


def test_memory_does_not_grow_with_the_size(tmp_path: Path) -> None:
    script = """
import resource, sys, torch
from test_export import Stream
from fuyou.checkpoint.export import write_safetensors
write_safetensors(sys.argv[1], [Stream("a", (1 << 20,))])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_safetensors(sys.argv[1], [Stream("a", (64 << 20,)), Stream("b", (8 << 20, 2))])  # 256 + 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    assert int(result.stdout) < 8 << 10, f"{result.stdout.strip()} KiB more for 320 MiB"
    assert (tmp_path / WEIGHTS).stat().st_size > 320 << 20


def test_interrupted_export_leaves_the_earlier_one_whole(tmp_path: Path) -> None:
    write_safetensors(tmp_path, [MemoryTensor("a", torch.ones(4))])
    with pytest.raises(KeyError, match="cable"):
        write_safetensors(tmp_path, [Stream("a", (1 << 19,), error=KeyError("cable"))])
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]
    assert torch.equal(load_file(tmp_path / WEIGHTS)["a"], torch.ones(4))


def test_killed_export_leaves_the_earlier_one_whole_and_the_next_clears_up(tmp_path: Path) -> None:
    write_safetensors(tmp_path, [MemoryTensor("a", torch.ones(4))])
    pid = os.fork()
    if pid == 0:

        class Killer(Stream):
            def chunks(self) -> Iterator[bytes]:
                yield self.piece
                os.kill(os.getpid(), 9)

        try:
            write_safetensors(tmp_path, [Killer("a", (1 << 19,))])
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    assert torch.equal(load_file(tmp_path / WEIGHTS)["a"], torch.ones(4))
    assert len(list(tmp_path.iterdir())) == 2
    write_safetensors(tmp_path, [MemoryTensor("a", torch.zeros(4))])
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]


@pytest.mark.parametrize("first", [1, 10**9])
@pytest.mark.parametrize("second", [1, 10**9])
def test_an_export_replaces_the_earlier_one(tmp_path: Path, first: int, second: int) -> None:
    (tmp_path / "notes.txt").write_text("the user's own")
    write_safetensors(tmp_path, [MemoryTensor(name, torch.ones(4)) for name in "abc"], shard_bytes=first)
    files = write_safetensors(tmp_path, [MemoryTensor(name, torch.zeros(4)) for name in "ab"], shard_bytes=second)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", *(path.name for path in files)}
    loaded = load_all(tmp_path)
    assert set(loaded) == {"a", "b"} and not loaded["a"].any()


@pytest.mark.parametrize("count", [1, 3])
def test_a_source_of_another_size_is_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(StorageIOError, match=r"tensor 'a' .* bytes where 2097152 belong"):
        write_safetensors(tmp_path, [Stream("a", (1 << 19,), count=count)])
    assert not list(tmp_path.iterdir())


def test_a_failing_drive_is_named(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, before[1]))
    try:
        with pytest.raises(StorageIOError, match="File too large .* at offset 3145728"):
            write_safetensors(tmp_path, [Stream("a", (1 << 20,))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_no_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"needs .* free .* short"):
        write_safetensors(tmp_path, [Stream("a", (1 << 40, 1 << 10))])
    assert not list(tmp_path.iterdir())


def test_bad_names_dtypes_and_folders_are_refused(tmp_path: Path) -> None:
    tensor = torch.ones(1)
    with pytest.raises(ConfigError, match="two tensors to export are called 'a'"):
        write_safetensors(tmp_path, [MemoryTensor("a", tensor), MemoryTensor("a", tensor)])
    for name in ("", "__metadata__", "a\nb"):
        with pytest.raises(ConfigError, match="cannot be called"):
            write_safetensors(tmp_path, [MemoryTensor(name, tensor)])
    with pytest.raises(ConfigError, match="complex32"):
        write_safetensors(tmp_path, [MemoryTensor("a", tensor.to(torch.complex32))])
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="a file"):
            write_safetensors(folder, [MemoryTensor("a", tensor)])


# --- the Hugging Face layout --------------------------------------------------------------------------------------

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {**SMALL, "intermediate_size": 32}
GROUPED = {**WIDE, "num_key_value_heads": 2}
MODELS = {
    "gpt2, tied": ("GPT2", "LMHeadModel", {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "llama": ("Llama", "ForCausalLM", GROUPED),
    "llama, tied": ("Llama", "ForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "t5": (
        "T5",
        "ForConditionalGeneration",
        {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
    ),
    "bert": ("Bert", "ForMaskedLM", WIDE),
    "mixtral": ("Mixtral", "ForCausalLM", {**GROUPED, "num_local_experts": 4}),
    "vit, renamed": ("ViT", "ForImageClassification", {**WIDE, "image_size": 16, "patch_size": 8}),
    "gpt-neox, renamed": ("GPTNeoX", "ForCausalLM", WIDE),
}


def build(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the Hugging Face layout is read by transformers")
    prefix, suffix, config = MODELS[family]
    torch.manual_seed(0)
    model = getattr(transformers, prefix + suffix)(getattr(transformers, prefix + "Config")(**config))
    return model.to(dtype)


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 5000])
@pytest.mark.parametrize("family", MODELS)
def test_from_pretrained_gives_the_same_model(tmp_path: Path, family: str, shard_bytes: int) -> None:
    model = build(family, torch.bfloat16)
    files = export_pretrained(tmp_path, model, shard_bytes=shard_bytes)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in files}
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    expected = model.state_dict()
    got = loaded.state_dict()
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == torch.bfloat16 or not tensor.is_floating_point()
        assert bits(got[name]) == bits(tensor), name
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):  # ties are ties again
        assert a.shape == b.shape


@pytest.mark.parametrize("family", [family for family in MODELS if family != "mixtral"])
def test_names_are_those_of_transformers_own_export(tmp_path: Path, family: str) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    assert {name for name, _ in names_to_export(model)} == set(load_file(tmp_path / WEIGHTS))


def test_config_beside_the_weights_says_what_was_exported(tmp_path: Path) -> None:
    model = build("llama")
    before = model.config.to_dict()
    export_pretrained(tmp_path, model, lambda name, tensor: MemoryTensor(name, tensor.bfloat16()))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    assert (tmp_path / "generation_config.json").exists()
    assert model.config.to_dict() == before


def test_names_of_a_plain_module() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(4, 3)
            self.head = nn.Linear(3, 4, bias=False)
            self.head.weight = self.embedding.weight
            self.norm = nn.BatchNorm1d(3)
            self.again = self.norm
            self.register_buffer("scratch", torch.zeros(2), persistent=False)

    model = Tied()
    names = [name for name, _ in names_to_export(model)]
    state = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert names == ["embedding.weight", *(f"norm.{name}" for name in state)]


def test_names_need_no_bytes() -> None:
    """Parameters away from their block share one placeholder's storage and must not be taken for tied ones."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    away = torch.tensor(float("nan"))
    for parameter in model.parameters():
        parameter.data = away.expand(parameter.shape)
    assert [name for name, _ in names_to_export(model)] == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_plain_module_is_exported_without_a_config(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    files = export_pretrained(tmp_path, model)
    assert [path.name for path in files] == [WEIGHTS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["gpt2, tied", "vit, renamed", "mixtral"])
def test_a_run_exports_what_it_trained(tmp_path: Path, nvme: Path, family: str, dtype: torch.dtype) -> None:
    import fuyou

    model = build(family, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    with pytest.raises(fuyou.BudgetError) as refused:
        fuyou.wrap(model, optimizer, nvme=nvme, ram=1, gpu="128MiB", device="cpu")
    least = refused.value.needed_bytes  # so that the weights lie on the drive
    with fuyou.wrap(model, optimizer, nvme=nvme, ram=least, gpu="128MiB", device="cpu") as run:
        if family.startswith("vit"):
            loss = model(pixel_values=torch.ones(1, 3, 16, 16, dtype=dtype)).logits.float().square().mean()
        else:
            tokens = torch.arange(8).reshape(1, 8)
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        run.optimizer.step()
        run.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model", dtype=dtype)
    got = loaded.state_dict()
    for name, tensor in model.state_dict().items():  # ordinary again, as the last step left it
        assert bits(got[name]) == bits(tensor), name
