"""LoRA: a job equal to a plain loop with PEFT, frozen weights that are only read, adapters as PEFT writes and merges them."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import jobs
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fuyou
from fuyou.checkpoint.pretrained import export_pretrained
from fuyou.cli import main
from fuyou.core.errors import ConfigError
from fuyou.train.adapters import add_adapters
from fuyou.train.config import LoraSettings

peft = pytest.importorskip("peft", reason="adapters are PEFT's")
transformers = pytest.importorskip("transformers", reason="and on transformers' models")

LLAMA = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return jobs.make_inputs(tmp_path_factory.mktemp("inputs"))


def llama(dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=96, **{**LLAMA, **options})
    return transformers.LlamaForCausalLM(config).to(dtype)


def gpt2(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=2, n_positions=32)
    ).to(dtype)


def disturbed(model: nn.Module) -> nn.Module:
    """Adapters begin as nothing (B is 0); these do something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# --- a whole job --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "targets"), [("fp32", "all-linear"), ("bf16", ["q_proj", "down_proj"]), ("fp32", None)]
)
def test_a_job_equals_a_plain_loop_with_peft(inputs, tmp_path, capsys, precision, targets):
    lora = {"r": 4, "alpha": 6, "dropout": 0.1, "target_modules": targets}
    path = jobs.write_job(inputs, tmp_path, **{**jobs.SETTINGS, "precision": precision, "ram": "256KiB", "lora": lora})
    status = main(["train", str(path)])
    captured = capsys.readouterr()
    assert status == 0, captured.err

    plain = jobs.Plain(inputs, precision, 0.5, "chunked")
    torch.manual_seed(5)
    plain.model = peft.get_peft_model(
        plain.model,
        peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, target_modules=targets, task_type="CAUSAL_LM"),
        autocast_adapter_dtype=False,
    )
    torch.manual_seed(5)  # as the job does before its first step: dropout draws from here on
    steps, evaluations = plain.train()
    found_steps, found_evaluations = jobs.metrics_of(tmp_path)
    assert [(line["step"], line["loss"], line["lr"], line["grad_norm"]) for line in found_steps] == steps
    assert [line["eval_loss"] for line in found_evaluations] == evaluations

    folder = tmp_path / "out" / "model"
    plain.model.save_pretrained(tmp_path / "plain")
    expected, found = (
        load_file(tmp_path / "plain/adapter_model.safetensors"),
        load_file(folder / "adapter_model.safetensors"),
    )
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == plain.dtype and bits(found[name]) == bits(tensor), name
    base = transformers.AutoModelForCausalLM.from_pretrained(inputs / "m", dtype=plain.dtype)
    loaded = peft.PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)
    for (name, ours), (_, theirs) in zip(loaded.named_parameters(), plain.model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert transformers.AutoTokenizer.from_pretrained(folder).encode("def tell") == plain.tokenizer.encode("def tell")
    assert not (folder / "model.safetensors").exists()


def test_packed_rows_reach_the_model_inside(inputs, tmp_path):
    """Before its first step an adapter changes nothing: the held-out loss over packed rows is that of the plain model."""
    rows = [{"text": f"Note {number}: {'again and ' * (number % 4)}done."} for number in range(24)]
    (tmp_path / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {**jobs.SETTINGS, "data": str(tmp_path / "short.jsonl"), "packing": True, "eval_share": 0.5}
    losses = []
    for name, lora in (("full", None), ("lora", {})):
        path = jobs.write_job(inputs, tmp_path / name, **{**settings, "steps": 2, "eval_every": None, "lora": lora})
        assert main(["train", str(path)]) == 0
        losses.append(jobs.metrics_of(tmp_path / name)[1][0]["eval_loss"])
        held_out = json.loads((tmp_path / name / "out" / "report.json").read_text())["data"]["held_out"]
        assert held_out["documents"] == 12 > held_out["rows"]  # some rows do hold several
    assert losses[0] == losses[1]


def test_merge_exports_the_whole_model(inputs, tmp_path, capsys):
    lora = {"r": 4, "target_modules": "all-linear", "merge": True}
    settings = {**jobs.SETTINGS, "steps": 2, "ram": "256KiB", "lora": lora}
    assert main(["train", str(jobs.write_job(inputs, tmp_path, **settings))]) == 0, capsys.readouterr().err
    again = {**settings, "lora": {**lora, "merge": False}, "output": str(tmp_path / "adapters")}
    assert main(["train", str(jobs.write_job(inputs, tmp_path, **again))]) == 0, capsys.readouterr().err
    base = transformers.AutoModelForCausalLM.from_pretrained(inputs / "m")
    expected = peft.PeftModel.from_pretrained(base, tmp_path / "adapters/model").merge_and_unload()
    merged, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/model", output_loading_info=True)
    assert not any(info.values()), info
    for name, parameter in expected.named_parameters():
        assert torch.equal(merged.get_parameter(name), parameter), name
    untouched = transformers.AutoModelForCausalLM.from_pretrained(inputs / "m")
    layer = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(merged.get_parameter(layer), untouched.get_parameter(layer))
    assert not (tmp_path / "out/model/adapter_config.json").exists()


# --- frozen weights are only read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_frozen_weights_have_no_gradient_and_no_state_and_are_never_written(nvme, dtype):
    base = llama(dtype, num_hidden_layers=6)
    before = {name: bits(parameter) for name, parameter in base.named_parameters()}
    base_bytes = sum(map(len, before.values()))
    model = add_adapters(base, LoraSettings(r=2, dropout=0, target_modules=["q_proj", "v_proj"]), seed=0)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in adapters)
    assert {parameter.dtype for parameter in adapters} == {dtype}  # one precision a run
    optimizer = torch.optim.AdamW(adapters, lr=1e-2, fused=True)
    tokens = torch.arange(32).reshape(2, 16)
    config = fuyou.Config(
        update="step", durability="checkpoint"
    )  # a step's writes are in that step, and nothing beside them
    with fuyou.wrap(model, optimizer, nvme=nvme, ram="320KiB", gpu="128MiB", device="cpu", config=config) as run:
        for _ in range(3):
            run.model(input_ids=tokens, labels=tokens).loss.backward()
            assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
            run.optimizer.step()
            run.optimizer.zero_grad()
        run.settle()
        report = run.report().dict()
    # Each layer's four adapters are one unit, of 1024 elements without a gap between them; each kind of it takes pages.
    size = dtype.itemsize
    state = 8 if size == 4 else 10  # two moments in fp32; in bf16 the other half of the master as well
    weights, gradients, moments = (6 * -(-1024 * each // 4096) * 4096 for each in (size, size, state))
    assert count == 6 * 1024
    held = {
        category: sum(report["tiers"][tier]["by_category"][category] for tier in ("host", "nvme"))
        for category in ("weights", "gradients", "optimizer")
    }
    assert held["gradients"] == gradients
    assert moments <= held["optimizer"] <= 2 * moments  # two slots on NVMe
    assert held["weights"] >= base_bytes
    assert report["traffic"]["nvme_write_bytes_per_step"] <= weights + gradients + moments < base_bytes / 10
    assert report["traffic"]["nvme_read_bytes_per_step"] > base_bytes  # which really is on the drive, and streamed
    inside = model.get_base_model()
    frozen = {
        name.replace(".base_layer", ""): bits(parameter)
        for name, parameter in inside.named_parameters()
        if not parameter.requires_grad
    }
    assert frozen == before


# --- in PEFT's layout ---------------------------------------------------------------------------------------------

KINDS = {
    "lora": lambda: peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "lora without task": lambda: peft.LoraConfig(target_modules=["q_proj", "up_proj"]),
    "dora": lambda: peft.LoraConfig(target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "modules to save": lambda: peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "embeddings": lambda: peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM"),
    "bias": lambda: peft.LoraConfig(target_modules=["q_proj"], bias="lora_only", lora_bias=True),
    "ia3": lambda: peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def same_files(ours: Path, theirs: Path) -> None:
    """Equal tensors under equal names, and an equal adapter_config.json (a set has no order)."""
    found, expected = load_file(ours / "adapter_model.safetensors"), load_file(theirs / "adapter_model.safetensors")
    assert {name: bits(tensor) for name, tensor in found.items()} == {
        name: bits(tensor) for name, tensor in expected.items()
    }
    configs = [json.loads((each / "adapter_config.json").read_text()) for each in (ours, theirs)]
    for config in configs:
        if isinstance(config.get("target_modules"), list):
            config["target_modules"].sort()
    assert configs[0] == configs[1]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_exported_as_peft_exports_them(tmp_path, nvme, kind):
    model = disturbed(peft.get_peft_model(llama(), KINDS[kind]()))
    model.save_pretrained(tmp_path / "theirs")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    with fuyou.wrap(model, optimizer, nvme=nvme, ram="4MiB", gpu="128MiB", device="cpu") as run:
        run.save_pretrained(tmp_path / "ours")
    same_files(tmp_path / "ours", tmp_path / "theirs")
    assert not list((tmp_path / "ours").glob(".fuyou*")) and not (tmp_path / "ours/model.safetensors").exists()


def test_every_adapter_has_its_folder(tmp_path):
    model = peft.get_peft_model(llama(), KINDS["lora"]())
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("second")
    disturbed(model)
    model.save_pretrained(tmp_path / "theirs")
    export_pretrained(tmp_path / "ours", model)
    same_files(tmp_path / "ours", tmp_path / "theirs")
    same_files(tmp_path / "ours/second", tmp_path / "theirs/second")


def test_adapters_that_transformers_added(tmp_path):
    model = llama()
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    disturbed(model)
    model.save_pretrained(tmp_path / "theirs")
    export_pretrained(tmp_path / "ours", model)
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert {name: bits(tensor) for name, tensor in found.items()} == {
        name: bits(tensor) for name, tensor in expected.items()
    }
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours")
    assert torch.equal(
        loaded.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight,
        model.model.layers[0].self_attn.q_proj.lora_A["default"].weight,
    )


# --- merged -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "llama, tied", "gpt2"])
def test_merged_weights_have_the_bits_of_pefts_merge(tmp_path, nvme, family, dtype):
    if family == "gpt2":
        base, settings = gpt2(dtype), LoraSettings(r=5, target_modules=["c_attn", "c_proj"])
    else:
        base, settings = (
            llama(dtype, tie_word_embeddings=family.endswith("tied")),
            LoraSettings(target_modules="all-linear"),
        )
    model = disturbed(add_adapters(base, settings, seed=0))
    expected = copy.deepcopy(model).merge_and_unload()
    first = next(name for name, parameter in model.named_parameters() if ".base_layer.weight" in name)
    plain = first.removeprefix("base_model.model.").replace(".base_layer", "")
    assert not torch.equal(model.get_parameter(first), expected.get_parameter(plain))  # there is something to merge
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    # So little host memory that weights are staged in pieces whose edges are not edges of rows.
    with fuyou.wrap(model, optimizer, nvme=nvme, ram="300KiB", gpu="128MiB", device="cpu") as run:
        run.save_pretrained(tmp_path / "merged", merge_adapters=True)
    loaded, info = type(expected).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    for name, parameter in expected.named_parameters():
        assert bits(loaded.get_parameter(name)) == bits(parameter), name
    theirs = tmp_path / "theirs"
    expected.save_pretrained(theirs)
    assert set(load_file(tmp_path / "merged/model.safetensors")) == set(load_file(theirs / "model.safetensors"))


def test_merging_holds_a_few_pieces_of_the_model(tmp_path):
    script = """
import resource, sys, peft, torch
from torch import nn
from fuyou.checkpoint.pretrained import export_pretrained

def adapted(size, count):
    model = nn.Sequential(*[nn.Linear(size, size, bias=False) for _ in range(count)])
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=[str(each) for each in range(count)]))

export_pretrained(sys.argv[1], adapted(64, 2), merge_adapters=True)
large = adapted(2048, 12)  # 192 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export_pretrained(sys.argv[1], large, merge_adapters=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    root = Path(fuyou.__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(result.stdout) < 64 << 10, f"{result.stdout.strip()} KiB more for 192 MiB"  # BLAS takes 30 of it
    assert (tmp_path / "model.safetensors").stat().st_size > 192 << 20


@pytest.mark.parametrize("kind", ["dora", "modules to save", "embeddings", "bias", "ia3"])
def test_what_cannot_be_merged_in_a_stream_is_refused(tmp_path, kind):
    model = peft.get_peft_model(llama(), KINDS[kind]())
    with pytest.raises(ConfigError, match="merge_and_unload"):
        export_pretrained(tmp_path, model, merge_adapters=True)
    with pytest.raises(ConfigError, match="no adapters"):
        export_pretrained(tmp_path, llama(), merge_adapters=True)
    assert list(tmp_path.iterdir()) == []


# --- refused in words ---------------------------------------------------------------------------------------------


def test_targets_that_the_model_does_not_have_are_refused():
    for targets, reason in (
        (["q_proj", "v_prj"], "'v_prj'.*did you mean 'v_proj'"),
        (["zzz"], "it has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"),
        (["input_layernorm"], "cannot add adapters"),
    ):
        with pytest.raises(ConfigError, match=reason):
            add_adapters(llama(), LoraSettings(target_modules=targets), seed=0)


def test_an_architecture_without_default_targets_names_the_candidates():
    class NewConfig(transformers.LlamaConfig):
        model_type = "something-new"

    model = transformers.LlamaForCausalLM(NewConfig(vocab_size=96, **LLAMA))
    with pytest.raises(ConfigError, match="something-new.*all-linear.*q_proj, k_proj, v_proj, o_proj, gate_proj"):
        add_adapters(model, LoraSettings(), seed=0)
