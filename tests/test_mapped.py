"""A model larger than the device: its state_dict() is mapped from the drive, and the Trainer saves it within the budgets."""

from __future__ import annotations

import gc
import io
import os
from pathlib import Path

import models
import pytest
import torch
from fault_tools import run_script
from sides import Side

import fuyou
from fuyou.runtime.away import SMALLEST_MAPPED_BYTES

BUDGETS = {"ram": "2MiB", "gpu": "1GiB", "device": "cpu"}


def started() -> tuple[models.Case, torch.nn.Module, torch.optim.Optimizer, Side]:
    """A case, a model with its optimizer, and the same in plain PyTorch."""
    case = models.CASES["gpt"]

    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        return models.Gpt(width=96, layers=6).train()

    plain = Side(case, build(), None, None)
    plain.optimizer = models.optimizer_of(models.groups_of(plain.model))
    plain.scheduler = models.schedule_of(plain.optimizer)
    model = build()
    return case, model, models.optimizer_of(models.groups_of(model)), plain


def shrink(run: fuyou.Run, model: torch.nn.Module) -> None:
    """All weights are one page more than the device could ever hold."""
    whole = sum(each.numel() * 4 for each in model.parameters())
    run._ledger.budgets["device"] = whole - 4096 + run._ledger.budgets["device"] - run._ledger.most("device")


def mapped_in(folder: Path) -> int:
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_a_state_dict_of_more_than_the_device_is_mapped_and_has_plain_pytorchs_bits(nvme):
    case, model, passed, plain = started()
    with fuyou.wrap(model, passed, nvme, **BUDGETS) as run:
        side = Side(case, model, run.optimizer, models.schedule_of(run.optimizer))
        assert side.steps(2) == plain.steps(2)
        before, held = mapped_in(nvme), run._ledger.held("nvme", "weights")
        shrink(run, model)
        state, expected = model.state_dict(), plain.model.state_dict()
        large = {value.data_ptr() for value in state.values() if value.nbytes >= SMALLEST_MAPPED_BYTES}
        assert len(large) > 6 and mapped_in(nvme) - before == len(large)
        nbytes = sum({value.data_ptr(): value.nbytes for value in state.values() if value.data_ptr() in large}.values())
        assert run._ledger.held("nvme", "weights") - held == nbytes
        assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr()  # tied weights are once
        assert list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in state)
        stream = io.BytesIO()
        torch.save(state, stream)
        stream.seek(0)
        again = torch.load(stream)
        assert all(torch.equal(again[name], expected[name]) for name in expected)
        # As everything that is read: it is the parameter's until the next step, and what it was from then on.
        with torch.no_grad():
            for values in (state, expected):
                values["layers.3.up.weight" if "layers.3.up.weight" in values else _matrix(values)].mul_(0.5)
        kept = {name: value.clone() for name, value in expected.items()}
        assert side.steps(2) == plain.steps(2)
        assert all(torch.equal(state[name], kept[name]) for name in state)
        assert models.differing(model, models.values_of(plain.model)) == []
        del state, values
        gc.collect()
        assert side.steps(1) == plain.steps(1)
        assert mapped_in(nvme) == before and run._ledger.held("nvme", "weights") == held
        assert not [name for name in os.listdir(nvme) if name.startswith("tmp")]


def _matrix(values: dict[str, torch.Tensor]) -> str:
    return next(name for name, value in values.items() if name.startswith("layers") and value.dim() == 2)


def test_drives_without_the_room_say_so(nvme):
    _, model, passed, _ = started()
    with fuyou.wrap(model, passed, nvme, nvme_limit="64MiB", **BUDGETS) as run:
        shrink(run, model)
        run._ledger.budgets["nvme"] = run._ledger.held("nvme") + SMALLEST_MAPPED_BYTES
        with pytest.raises(fuyou.BudgetError, match=r"a copy of \S+ on top of") as refused:
            model.state_dict()
        assert refused.value.tier == "nvme"


SCRIPT = """
    import json, sys, threading, time
    from pathlib import Path
    import torch
    from torch.utils.serialization import config as serialization
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
    import fuyou

    folder, mode, SLACK = Path(sys.argv[1]), sys.argv[2], 1.05
    serialization.load.mmap = True  # optimizer.pt, which the Trainer would read whole

    def anonymous():
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["RssAnon"].split()[0]) * 1024

    class Peak:
        # Of memory that is nobody's file: what the kernel cannot have back.
        def __enter__(self):
            self.most, self.on = 0, True
            self.thread = threading.Thread(target=self.watch)
            self.thread.start()
            return self

        def watch(self):
            while self.on:
                self.most = max(self.most, anonymous())
                time.sleep(0.001)

        def __exit__(self, *_):
            self.on = False
            self.thread.join()

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            tokens = torch.randint(1, 4096, (32,), generator=torch.Generator().manual_seed(index))
            return {"input_ids": tokens, "labels": tokens}

    def build(**changes):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{
            "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 16,
            "num_attention_heads": 8, "num_key_value_heads": 8, "attention_dropout": 0.1, "tie_word_embeddings": True, **changes,
        })).train()

    def trained(model, optimizer, steps, output, resume=None):
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        arguments = TrainingArguments(
            str(output), max_steps=steps, save_steps=1, save_total_limit=1, per_device_train_batch_size=1, logging_steps=1,
            report_to=[], use_cpu=True, disable_tqdm=True, seed=3,
        )
        trainer = Trainer(model, arguments, train_dataset=Rows(), optimizers=(optimizer, scheduler))
        trainer.train(resume_from_checkpoint=resume)
        return [each["loss"] for each in trainer.state.log_history if "loss" in each]

    tiny = build(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=4096)
    trained(tiny, torch.optim.AdamW(tiny.parameters(), fused=True), 2, folder / "tiny")  # imports, threads
    trained(tiny, torch.optim.AdamW(tiny.parameters(), fused=True), 3, folder / "tiny", True)
    del tiny
    if mode == "plain":
        model = build()
        losses = trained(model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), 3, folder / "plain")
        (folder / "losses").write_text(json.dumps(losses))
        print("OK")
        sys.exit()
    baseline = anonymous()
    expected = json.loads((folder / "losses").read_text())
    ram, gpu = 96 << 20, 160 << 20
    limit = int(baseline + SLACK * (ram + gpu))
    steps, resume = {"save": (2, None), "load": (3, True)}[mode]
    model = build()
    whole = sum(each.numel() * 4 for each in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    config = fuyou.Config(durability="checkpoint")
    (folder / "nvme").mkdir(exist_ok=True)
    with fuyou.wrap(model, optimizer, folder / "nvme", ram=ram, gpu=gpu, device="cpu", config=config) as run:
        with Peak() as peak:
            losses = trained(model, run.optimizer, steps, folder / "output", resume)
    print(mode, *(f"{each >> 20} MiB" for each in (whole, peak.most, limit, baseline)), "weights, peak, limit, baseline")
    assert losses == expected[:steps], (losses, expected)
    assert whole > gpu > ram
    assert peak.most <= limit, peak.most - limit
    print("OK")
"""


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_trainers_checkpoints_are_saved_and_loaded_within_the_budgets(nvme):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs it")
    for mode in ("plain", "save", "load"):  # one process each: memory of one is nothing to the other
        print(run_script(SCRIPT, str(nvme), mode, timeout_s=140, env={"OMP_NUM_THREADS": "2"}).stdout)
