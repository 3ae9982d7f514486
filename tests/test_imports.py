"""Weights that stay in their files until they are home: the bits of `from_pretrained`, whatever the files are like."""

from __future__ import annotations

import gc
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import jobs
import peft
import pytest
import torch
import transformers
from architectures import TEXTS, UNREPEATABLE
from architectures_media import MEDIA
from import_tools import BUDGETS, SMALL, adamw, bits, change, llama, same, tensors_of, train
from safetensors.torch import load_file
from torch import nn

import fuyou
from fuyou.checkpoint.imports import import_pretrained, in_short
from fuyou.checkpoint.stored import Stored, converted_bytes, value_of
from fuyou.core.errors import ConfigError

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}

# --- equal to from_pretrained -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("wanted", ["fp32", "bf16", None])
@pytest.mark.parametrize("kept", DTYPES)
def test_every_dtype_is_converted_as_transformers_does(tmp_path, nvme, kept, wanted, tied, shard):
    folder = llama(tmp_path / "m", DTYPES[kept], shard, tie_word_embeddings=tied)
    assert (folder / "model.safetensors").exists() == (shard == "1GB")
    dtype = DTYPES[wanted] if wanted else None
    if wanted is None and kept in ("fp16", "fp64"):
        with pytest.raises(ConfigError, match="is float(16|64): fuyou trains float32 and bfloat16"):
            fuyou.load_pretrained(folder, nvme=nvme, **BUDGETS)
        assert list(nvme.iterdir()) == []
        return
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    with fuyou.load_pretrained(folder, nvme=nvme, dtype=dtype, **BUDGETS) as run:
        run.save_pretrained(tmp_path / "out")
    same(run.model, expected)
    assert (run.model.lm_head.weight is run.model.model.embed_tokens.weight) == tied
    assert all(type(parameter) is nn.Parameter for parameter in run.model.parameters())
    assert run.model.config.to_dict() == expected.config.to_dict() and not run.model.training
    assert run.model.generation_config.to_dict() == expected.generation_config.to_dict()
    same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), expected)


@pytest.mark.parametrize("where", ["host", "nvme"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_trains_as_if_it_had_been_wrapped_from_memory(tmp_path, nvme, precision, where):
    folder = llama(tmp_path / "m", attention_dropout=0.1)
    dtype = DTYPES[precision]
    config = fuyou.Config(durability="checkpoint")
    places: dict[str, Any] = {**BUDGETS, "nvme": nvme if where == "nvme" else None, "config": config}
    if where == "nvme":
        places["ram"] = "300KiB"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with fuyou.wrap(model, adamw(model), **places) as run:
        expected = train(model, run.optimizer)
    with fuyou.load_pretrained(folder, {"lr": 1e-2}, dtype=dtype, **places) as run:
        held = run.report().dict()["tiers"]["nvme"]["by_category"]
        assert bool(held["weights"]) == (where == "nvme")
        assert train(run.model, run.optimizer) == expected
    same(run.model, model)
    if precision == "fp32":  # and that is plain PyTorch's
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        assert train(plain, adamw(plain)) == expected
        same(run.model, plain)


def test_a_master_of_32_bits_beside_parameters_of_16(tmp_path, nvme):
    """precision="bf16" of fp32 parameters keeps what bf16 rounds away: the export has the bits of `master.bfloat16()`."""
    folder = llama(tmp_path / "m")
    results = []
    for load in (True, False):
        config = fuyou.Config(precision="bf16")
        if load:
            run = fuyou.load_pretrained(folder, {"lr": 1e-2}, nvme, config=config, **BUDGETS)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder)
            run = fuyou.wrap(model, adamw(model), nvme, config=config, **BUDGETS)
        with run:
            losses = train(run.model, run.optimizer)
            masters = {name: run.optimizer.state[each]["master"] + 0 for name, each in run.model.named_parameters()}
            run.save_pretrained(tmp_path / f"out{load}")
        results.append((losses, masters, load_file(tmp_path / f"out{load}" / "model.safetensors")))
    (losses, masters, exported), (expected, expected_masters, expected_export) = results
    assert losses == expected and masters.keys() == expected_masters.keys() == exported.keys()
    for name, master in masters.items():
        assert bits(master) == bits(expected_masters[name])
        assert bits(exported[name]) == bits(expected_export[name]) == bits(master.bfloat16())


ARCHITECTURES = {**TEXTS, **MEDIA, **UNREPEATABLE}
BY_DEFAULT = (
    "Albert", "Bart", "Bert", "CLIP", "DeepseekV3", "GPT2", "GPTNeoX", "Mamba", "Marian", "Mixtral", "MobileViT", "Qwen3Moe",
    "Rwkv", "T5", "ViT", "Wav2Vec2", "Whisper",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
)
def test_architectures_are_imported_as_from_pretrained_loads_them(tmp_path, name):
    """Renamed and split tensors, mixtures of experts, ties of several kinds, buffers that are computed."""
    model = ARCHITECTURES[name].build()
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    expected, info = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    torch.manual_seed(1)
    imported = import_pretrained(tmp_path, type(model), torch.bfloat16, initialize=info["missing_keys"])
    assert imported.unused == sorted(info["unexpected_keys"])
    assert torch.rand(()).item() == _after(1, type(model), tmp_path)
    still = [each for each in imported.model.parameters() if isinstance(each, Stored)]
    share = 0.4 if name == "Encodec" else 0.8  # weight norm, which transformers computes with while it loads, is read
    assert sum(each.numel() for each in still) > share * sum(each.numel() for each in expected.parameters())
    found, wanted = tensors_of(imported.model), tensors_of(expected)
    assert list(found) == list(wanted)
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype and bits(value_of(found[key])) == bits(tensor), key
    for key, each in expected.named_parameters():
        assert found[key].requires_grad == each.requires_grad, key


def _after(seed: int, model_class: Any, folder: Path) -> float:
    """The next random number behind from_pretrained."""
    torch.manual_seed(seed)
    model_class.from_pretrained(folder, dtype=torch.bfloat16)
    return torch.rand(()).item()


# --- what does not fit --------------------------------------------------------------------------------------------


def configure(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_everything_that_does_not_fit_is_named_at_once(tmp_path, nvme):
    folder = llama(tmp_path / "m")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(3):
            del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
        del tensors["model.norm.weight"]
        tensors["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(7, 32)
        tensors["lm_head.weight"] = torch.zeros(65, 32)
        tensors["lm_head.scale"] = torch.zeros(1)

    change(folder, spoil)
    with pytest.raises(ConfigError) as refused:
        fuyou.load_pretrained(folder, nvme=nvme, **BUDGETS)
    for part in (
        "2 tensors have another shape",
        "lm_head.weight: (65, 32) in the file and (64, 32) in the model",
        "model.layers.1.self_attn.q_proj.weight: (7, 32) in the file and (32, 32) in the model",
        "lack 4 tensors of the model",
        "model.layers.{0,1,2}.mlp.up_proj.weight",
        "model.norm.weight",
        "hold 1 tensor that the model has no place for: lm_head.scale",
        str(folder),
    ):
        assert part in str(refused.value)
    assert list(nvme.iterdir()) == []


def test_names_that_differ_in_a_number_are_told_together():
    names = ["b.2.c", "b.10.c", "b.1.c", "a", "d.1.x.1", "d.2.x.2", "e.3"]
    assert in_short(names) == "a, b.{1,2,10}.c, d.1.x.1, d.2.x.2, e.3"


def test_a_new_head_is_refused_unless_it_is_named(tmp_path, nvme):
    folder = llama(tmp_path / "m")
    model_class = transformers.AutoModelForSequenceClassification
    with pytest.raises(ConfigError, match=r"lack 1 tensor of the model, .*: score.weight"):
        fuyou.load_pretrained(folder, model_class=model_class, nvme=nvme, **BUDGETS)
    torch.manual_seed(3)
    expected = model_class.from_pretrained(folder)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match=r"1 tensors .* no place for \(lm_head.weight\)"):
        run = fuyou.load_pretrained(folder, model_class=model_class, initialize=["score.*"], nvme=nvme, **BUDGETS)
    run.close()
    same(run.model, expected)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds adapters"),
        (lambda folder: configure(folder, quantization_config={"quant_method": "fp8"}), "are quantized"),
        (lambda folder: configure(folder, transformers_weights="other.safetensors"), "file of another name"),
        (lambda folder: configure(folder, intermediate_size=2**22, num_hidden_layers=512), "[0-9,]+ numbers, .* not of that"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: shutil.rmtree(folder), "does not exist"),
        (lambda folder: configure(folder, auto_map={"AutoConfig": "mine.Mine"}, model_type="mine"), "runs no code"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_trained_is_refused(tmp_path, nvme, spoil, reason):
    folder = llama(tmp_path / "m")
    spoil(folder)
    with pytest.raises(ConfigError, match=reason):
        fuyou.load_pretrained(folder, nvme=nvme, **BUDGETS)


def test_arguments_are_refused_in_words(tmp_path, nvme):
    folder = llama(tmp_path / "m")
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="options of AdamW"):
        fuyou.load_pretrained(folder, torch.optim.AdamW(model.parameters()), nvme=nvme, **BUDGETS)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="prepare must return the model"):
        fuyou.load_pretrained(folder, nvme=nvme, prepare=lambda model: None, **BUDGETS)  # type: ignore[arg-type,return-value]


# --- what is done before wrap -------------------------------------------------------------------------------------


def test_adapters_on_streamed_weights_train_and_export_as_on_loaded_ones(tmp_path, nvme):
    folder = llama(tmp_path / "m")

    def prepare(model: nn.Module) -> nn.Module:
        torch.manual_seed(4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return peft.get_peft_model(
                model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
            )

    expected = prepare(transformers.AutoModelForCausalLM.from_pretrained(folder))
    losses = train(expected, adamw(expected))
    with fuyou.load_pretrained(folder, {"lr": 1e-2}, nvme, prepare=prepare, **BUDGETS) as run:
        assert train(run.model, run.optimizer) == losses
        run.save_pretrained(tmp_path / "adapters")
        run.save_pretrained(tmp_path / "merged", merge_adapters=True)
    same(run.model, expected)
    assert not (tmp_path / "adapters" / "model.safetensors").exists()
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    same(peft.PeftModel.from_pretrained(base, tmp_path / "adapters", is_trainable=True), expected)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    same(merged, expected.merge_and_unload())
    assert json.loads((tmp_path / "adapters/adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)


def test_a_weight_that_is_used_before_wrap_is_an_ordinary_one(tmp_path, nvme):
    folder = llama(tmp_path / "m")

    def prepare(model: Any) -> nn.Module:
        assert not any(value.isnan().any() for value in model.state_dict().values())  # nobody sees a placeholder
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(2)
            model.lm_head.weight.data.clamp_(-1, 1)
            model.model.norm.weight.data = model.model.norm.weight.data + 1
        model.model.embed_tokens.requires_grad_(False)
        return model

    expected = prepare(transformers.AutoModelForCausalLM.from_pretrained(folder))
    losses = train(expected, adamw(expected))
    with fuyou.load_pretrained(folder, adamw, nvme, prepare=prepare, **BUDGETS) as run:
        assert train(run.model, run.optimizer) == losses
    same(run.model, expected)


def test_a_file_that_becomes_shorter_leaves_nothing_behind(tmp_path, nvme):
    folder = llama(tmp_path / "m")

    def spoil(model: nn.Module) -> torch.optim.Optimizer:
        os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 100)
        return adamw(model)

    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(fuyou.StorageIOError, match="shorter while it was read"):
        fuyou.load_pretrained(folder, spoil, nvme, **BUDGETS)
    gc.collect()
    assert list(nvme.iterdir()) == [] and len(os.listdir("/proc/self/fd")) == files
    with fuyou.load_pretrained(llama(tmp_path / "again"), nvme=nvme, **BUDGETS):
        pass


def test_files_are_closed_and_the_tokenizer_travels(tmp_path, nvme):
    source = jobs.make_inputs(tmp_path) / "m"
    gc.collect()

    def held() -> list[str]:
        links = [f"/proc/self/fd/{each}" for each in os.listdir("/proc/self/fd")]
        return [
            os.readlink(each) for each in links if os.path.exists(each) and "model.safetensors" in os.readlink(each)
        ]

    with fuyou.load_pretrained(source, nvme=nvme, **BUDGETS) as run:
        gc.collect()
        assert held() == []
        run.save_pretrained(tmp_path / "out", max_shard_size="100KB")
    text = "def tell(self): pass"
    tokenizers = [transformers.AutoTokenizer.from_pretrained(each) for each in (source, tmp_path / "out")]
    assert tokenizers[0].encode(text) == tokenizers[1].encode(text)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), run.model)


# --- what is computed whole ---------------------------------------------------------------------------------------


def test_what_is_converted_whole_has_its_room_in_the_budget(tmp_path, nvme, monkeypatch):
    """Experts whose runs are too short to be read one by one."""
    folder = tmp_path / "m"
    torch.manual_seed(0)
    values = {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**values)).save_pretrained(folder)
    monkeypatch.setattr("fuyou.checkpoint.stored._SHORTEST_RUN_BYTES", 2**30)
    largest = 4 * 2 * 48 * 32 * 4  # bytes of the gates of a layer's experts
    whole = 3 * largest  # what they are made of, the result and one on the way
    imported = import_pretrained(folder).model
    assert converted_bytes(imported) == whole
    with pytest.raises(fuyou.BudgetError) as short:
        fuyou.wrap(imported, adamw(imported), nvme, ram=1, gpu="128MiB", device="cpu")
    with fuyou.wrap(
        imported, adamw(imported), nvme, ram=short.value.needed_bytes + whole, gpu="128MiB", device="cpu"
    ) as run:
        host = run.report().dict()["tiers"]["host"]
        assert whole < host["peak_bytes"] <= host["budget_bytes"]
    same(imported, transformers.AutoModelForCausalLM.from_pretrained(folder))
