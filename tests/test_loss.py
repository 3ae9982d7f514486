"""The loss of `fuyou train`, from logits in tiles: equal to the model's own within rounding, as near to the truth in fp64,
smaller; the same bits in a wrapped model; the model's own where a model does more with its logits."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import fuyou
from fuyou.core.errors import BudgetError
from fuyou.train import token_losses
from fuyou.train.loss import DeferredHead, Logits
from fuyou.train.token_losses import TokenLosses

transformers = pytest.importorskip("transformers", reason="the losses are those of transformers' models")

VOCABULARY = 300
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {**SMALL, "tie_word_embeddings": False}),
    "Llama tied": ("Llama", {**SMALL, "tie_word_embeddings": True}),
    "GPT2": ("GPT2", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
                      "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "Gemma2, capped": ("Gemma2", {**SMALL, "head_dim": 8, "final_logit_softcapping": 0.5}),
    "Granite, divided": ("Granite", {**SMALL, "logits_scaling": 0.3}),
    "Cohere, scaled": ("Cohere", {**SMALL, "logit_scale": 3.0}),
    "Mixtral, router loss": ("Mixtral", {**SMALL, "num_local_experts": 4, "output_router_logits": True}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """13 rows of 300 fp32 logits at a time, 64 columns: several tiles, the last of each kind smaller."""
    monkeypatch.setitem(token_losses.TILE_BYTES, "cpu", 16 * 2**10)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def built(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    transformers.logging.set_verbosity_error()
    name, config = FAMILIES[family]
    torch.manual_seed(0)
    configuration = getattr(transformers, f"{name}Config")(**{**config, **options})
    configuration._experts_implementation = "eager"  # the grouped product knows no fp64
    kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    return getattr(transformers, kind)(configuration).to(dtype).train()


def batch(rows: int = 2, length: int = 19, seed: int = 0) -> dict[str, torch.Tensor]:
    """Some labels ignored, as prompts are."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.masked_fill(ids % 5 == 0, -100)}


def deferring(head: DeferredHead | None) -> contextlib.AbstractContextManager[None]:
    return head.deferring() if head is not None else contextlib.nullcontext()


def outcome(model: nn.Module, inputs: dict[str, torch.Tensor], head: DeferredHead | None = None):
    """(loss, {name: gradient})"""
    model.zero_grad()
    with deferring(head):
        value = model(**inputs, use_cache=False).loss
    value.backward()
    return value.detach(), {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def truth(model: nn.Module, inputs: dict[str, torch.Tensor]):
    """The same in fp64, of whole logits: shifted, meaned over labels that count, the router's loss added."""
    model.zero_grad()
    output = model(input_ids=inputs["input_ids"], use_cache=False)
    logits, labels = output.logits[:, :-1].reshape(-1, VOCABULARY), inputs["labels"][:, 1:].reshape(-1)
    assert logits.dtype == torch.float64
    value = functional.cross_entropy(logits, labels)
    if getattr(output, "aux_loss", None) is not None:
        value = value + model.config.router_aux_loss_coef * output.aux_loss
    value.backward()
    return value.detach(), {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    square = sum((found[name].double() - each.double()).square().sum().item() for name, each in expected.items())
    return (square / sum(each.double().square().sum().item() for each in expected.values())) ** 0.5


def no_words(text: str) -> None:
    pytest.fail(text)


# --- the same loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_models_own(family):
    model, inputs = built(family), batch()
    own = outcome(model, inputs)
    found = outcome(model, inputs, DeferredHead(model, no_words))
    exact = truth(built(family, torch.float64), inputs)
    assert found[0].dtype == own[0].dtype
    rounding = torch.finfo(torch.float32).eps
    assert abs(found[0] - own[0]) <= 4 * rounding * abs(own[0])
    assert distance(found[1], own[1]) < 8 * rounding
    assert abs(found[0] - exact[0]) <= abs(own[0] - exact[0]) + 2 * rounding * exact[0]
    assert distance(found[1], exact[1]) <= 1.3 * distance(own[1], exact[1])


@pytest.mark.parametrize("family", ["Llama tied", "Gemma2, capped", "Cohere, scaled"])
def test_in_bf16_it_is_as_near_to_the_models_own(family):
    model, inputs = built(family, torch.bfloat16), batch(4, 33)
    own = outcome(model, inputs)
    found = outcome(model, inputs, DeferredHead(model, no_words))
    assert found[0].dtype == own[0].dtype == torch.float32
    assert abs(found[0] - own[0]) < 1e-5 * abs(own[0])  # a loss rounded to bf16 would be 4e-3 away
    assert all(each.dtype == torch.bfloat16 for each in found[1].values())
    assert distance(found[1], own[1]) < 4e-3  # the gradients are rounded to 8 bits


@pytest.mark.parametrize("capped", [False, True])
def test_bf16_gradients_lose_nothing_to_the_tiles(capped):
    """Of one output layer: 40 tiles of rows and 5 of columns; a sum in bf16 over either would show."""
    torch.manual_seed(0)
    hidden = torch.randn(512, 32).bfloat16().requires_grad_()
    weight = torch.randn(VOCABULARY, 32).mul_(0.3).bfloat16().requires_grad_()
    labels = torch.randint(VOCABULARY, (512,))
    steps: tuple = ((torch.div, (5.0,)), (torch.tanh, ()), (torch.mul, (5.0,))) if capped else ()

    def whole(hidden, weight):
        logits = functional.linear(hidden, weight)
        return functional.cross_entropy(logits.div(5).tanh().mul(5) if capped else logits, labels, reduction="sum")

    wide = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    exact = torch.autograd.grad(whole(*wide), wide)
    logits = functional.linear(hidden, weight)
    logits = logits.div(5).tanh().mul(5) if capped else logits
    own = torch.autograd.grad(functional.cross_entropy(logits.float(), labels, reduction="sum"), (hidden, weight))
    losses = TokenLosses.apply(hidden, weight, None, labels, -100, (*steps, (torch.Tensor.to, (torch.float32,))))
    found = torch.autograd.grad(losses.sum(), (hidden, weight))
    for mine, theirs, right in zip(found, own, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - right).norm() <= 1.02 * (theirs.double() - right).norm()


def test_derivatives_are_those_of_finite_differences():
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), (130, 3), (130,))
    )
    labels = torch.tensor([0, 129, -7, 64, 63])
    steps = ((torch.div, (2.0,)), (torch.tanh, ()), (torch.mul, (2.0,)))
    torch.autograd.gradcheck(lambda *each: TokenLosses.apply(*each, labels, -7, steps), (hidden, weight, bias))


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 7)])
@pytest.mark.parametrize("ignored", [False, True])
def test_few_labels_and_none(shape, ignored):
    model, inputs = built("Llama"), batch(*shape)
    inputs["labels"] = torch.full(shape, -100) if ignored else inputs["input_ids"]
    own, found = outcome(model, inputs), outcome(model, inputs, DeferredHead(model, no_words))
    if ignored or shape == (1, 1):
        assert own[0].isnan() and found[0].isnan()
    else:
        assert abs(found[0] - own[0]) <= 1e-6 * own[0] and distance(found[1], own[1]) < 1e-6


def test_a_confident_loss_keeps_its_digits():
    """As far as fp32 knows 1 + loss. The log of the sum of exponents, near 20, less the label's logit is up to 1e-6 off."""
    hidden = torch.tensor([[20.0, 1.0]], requires_grad=True)
    weight = torch.zeros(VOCABULARY, 2)
    weight[7] = torch.tensor([1.0, 0.3])
    labels = torch.tensor([7])
    exact = functional.cross_entropy(functional.linear(hidden.double(), weight.double()), labels)
    found = TokenLosses.apply(hidden, weight, None, labels, -100, ())
    assert exact < 1e-6 and abs(found[0] - exact) <= torch.finfo(torch.float32).eps
    right = torch.autograd.grad(exact, hidden)[0]
    assert (torch.autograd.grad(found[0], hidden)[0] - right).abs().max() < 3e-7


def test_documents_of_one_row_stay_apart():
    model, inputs = built("Llama"), batch(2, 20)
    inputs["position_ids"] = torch.arange(20).remainder(9).expand(2, 20)
    own, found = outcome(model, inputs), outcome(model, inputs, DeferredHead(model, no_words))
    without = outcome(model, {name: each for name, each in inputs.items() if name != "position_ids"})
    assert abs(found[0] - own[0]) <= 1e-6 * own[0] and distance(found[1], own[1]) < 1e-6
    assert distance(found[1], without[1]) > 1e-3


# --- what a model may do with its logits ---------------------------------------------------------------------------

USES = {
    "shifted by hand": lambda logits, labels: functional.cross_entropy(
        logits[..., :-1, :].contiguous().view(-1, logits.size(-1)), labels[..., 1:].reshape(-1)
    ),
    "summed": lambda logits, labels: nn.CrossEntropyLoss(reduction="sum")(
        logits.float().reshape(-1, VOCABULARY), labels.view(-1)
    ) / 7,
    "each": lambda logits, labels: functional.cross_entropy(
        logits[:, 1:].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1), reduction="none", ignore_index=9
    ).square().mean(),
    "chosen by a mask": lambda logits, labels: functional.cross_entropy(logits[labels % 2 == 0], labels[labels % 2 == 0]),
    "capped": lambda logits, labels: functional.cross_entropy(
        (torch.tanh(logits / 0.2) * 0.2).to(torch.float32).flatten(0, 1), labels.flatten()
    ),
    "scaled": lambda logits, labels: functional.cross_entropy(
        input=(2 * logits.tanh())[0], target=labels[0]
    ),
}  # fmt: skip
MORE = {
    "z-loss": lambda logits, labels: USES["summed"](logits, labels) + logits.logsumexp(-1).square().mean(),
    "bias": lambda logits, labels: USES["summed"](logits + torch.arange(VOCABULARY) / 9, labels),
    "mask": lambda logits, labels: (logits.__setitem__((..., slice(5)), -9.0), USES["summed"](logits, labels))[1],
    "smoothed": lambda logits, labels: functional.cross_entropy(
        logits.view(-1, VOCABULARY), labels.view(-1), label_smoothing=0.1
    ),
    "weighted": lambda logits, labels: functional.cross_entropy(
        logits.view(-1, VOCABULARY), labels.view(-1), torch.arange(VOCABULARY) / 9
    ),
    "cut": lambda logits, labels: functional.cross_entropy(
        logits[..., :299].reshape(-1, 299), labels.view(-1).clamp(max=298)
    ),
    "transposed": lambda logits, labels: functional.cross_entropy(logits.transpose(1, 2), labels),
}


class Own(nn.Module):
    """A language model whose loss is `use` of its logits."""

    def __init__(self, use) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY)
        self.use = use

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids, labels, use_cache=None):
        return transformers.modeling_outputs.CausalLMOutput(loss=self.use(self.head(self.embedding(input_ids)), labels))


@pytest.mark.parametrize("use", {**USES, **MORE})
def test_whatever_a_model_does_with_its_logits(use):
    inputs = batch(3, 17)
    inputs["labels"] = inputs["input_ids"]
    model, words = Own({**USES, **MORE}[use]), []
    head = DeferredHead(model, words.append)
    own = outcome(model, inputs)
    for again in (False, True):
        found = outcome(model, inputs, head)
        assert abs(found[0] - own[0]) <= 1e-6 * abs(own[0]) and distance(found[1], own[1]) < 1e-6
        assert (again and use in MORE) <= torch.equal(found[0], own[0])  # left alone from the second time on
    whole = "flatten" if use == "capped" else ""  # right, but not deferred
    assert len(words) == (use in MORE or bool(whole)), words
    assert all("all logits of a batch at once: Own asks more of its logits" in each for each in words)


def test_logits_have_the_shape_and_kind_of_a_tensor():
    model = Own(lambda logits, labels: logits)
    head = DeferredHead(model, no_words)
    seen = Logits(head, torch.zeros(2, 3, 8))
    assert (
        seen.shape == (2, 3, VOCABULARY) == seen.size() and seen.size(-1) == VOCABULARY and seen.dim() == seen.ndim == 3
    )
    assert seen.dtype == torch.float32 and seen.to(torch.bfloat16).dtype == torch.bfloat16 and seen.device.type == "cpu"
    assert not hasattr(seen, "keys") and not hasattr(seen, "__deepcopy__")


def test_nothing_stays_on_the_model():
    model = built("Llama")
    head = DeferredHead(model, no_words)
    for inputs in (batch(), {"input_ids": None}):
        with contextlib.suppress(ValueError), head.deferring():
            assert "forward" in vars(model.lm_head)
            model(**inputs)
        assert "forward" not in vars(model.lm_head) and isinstance(model(**batch()).logits, torch.Tensor)


def test_models_without_a_plain_layer_of_their_own_are_left_alone():
    peft = pytest.importorskip("peft", reason="adapters are PEFT's")
    adapted = peft.get_peft_model(built("Llama"), peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    masked = transformers.BertLMHeadModel(transformers.BertConfig(**{**SMALL, "is_decoder": True}))
    for model, reason in (
        (adapted, "not a plain linear one"),
        (masked, "inside of a larger block"),
        (nn.Linear(1, 1), "no output"),
    ):
        words: list[str] = []
        head = DeferredHead(model, words.append)
        assert len(words) == 1 and reason in words[0]
        if model is adapted:
            own, found = outcome(model, batch()), outcome(model, batch(), head)
            assert torch.equal(own[0], found[0]) and distance(found[1], own[1]) == 0


# --- in a wrapped model ---------------------------------------------------------------------------------------------


def trained(model: nn.Module, folder: Path | None, activations: str = "recompute") -> tuple[list[float], dict]:
    """Two steps of two backwards and an evaluation each, by the tiled loss, in plain PyTorch or wrapped."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2, fused=True)
    seen = []
    with contextlib.ExitStack() as stack:
        if folder is not None:
            config = fuyou.Config(activations=activations)
            run = stack.enter_context(fuyou.wrap(model, optimizer, nvme=folder, device="cpu", config=config))
            optimizer = run.optimizer
        head = DeferredHead(model, no_words)

        def value(seed: int) -> torch.Tensor:
            with head.deferring():
                return model(**batch(seed=seed), use_cache=False).loss

        for step in range(2):
            for seed in (2 * step, 2 * step + 1):
                found = value(seed)
                (found / 2).backward()
                seen.append(found.item())
            seen.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
            with torch.no_grad():
                seen.append(value(9).item())
            optimizer.step()
            optimizer.zero_grad()
        values = {name: each.detach().clone() for name, each in model.named_parameters()}
    return seen, values


@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize("family", ["Llama", "Llama tied", "Gemma2, capped", "Mixtral, router loss", "adapted"])
def test_a_wrapped_model_trains_to_the_same_bits(nvme, family, activations):
    def model():
        if family != "adapted":
            return built(family)
        peft = pytest.importorskip("peft", reason="adapters are PEFT's")
        base = built("Llama")
        torch.manual_seed(1)
        return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))

    expected, found = trained(model(), None), trained(model(), nvme, activations)
    assert found[0] == expected[0]
    assert [name for name, each in expected[1].items() if not torch.equal(each, found[1][name])] == []


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_large_vocabulary_fits_where_whole_logits_do_not(nvme, monkeypatch, evaluated):
    """4 x 256 rows of 48,000 fp32 logits are 188 MiB, of which the model's own loss keeps at least one."""
    monkeypatch.setitem(token_losses.TILE_BYTES, "cpu", 2**20)
    inputs = {"input_ids": torch.randint(48_000, (4, 256))}
    inputs["labels"] = inputs["input_ids"]
    refused = {}
    for kind in ("model", "chunked"):
        model = built("Llama", vocab_size=48_000, num_hidden_layers=1, hidden_size=16)
        optimizer = torch.optim.AdamW(model.parameters())
        config = fuyou.Config(activations="recompute")
        with fuyou.wrap(model, optimizer, nvme=nvme, gpu="150MiB", device="cpu", config=config) as run:
            head = DeferredHead(model, no_words) if kind == "chunked" else None
            refused[kind] = False
            try:
                with torch.set_grad_enabled(not evaluated), deferring(head):
                    value = model(**inputs, use_cache=False).loss
                if not evaluated:
                    value.backward()
                    run.optimizer.step()
            except BudgetError:
                refused[kind] = True
            peak = run.report().dict()["tiers"]["device"]["peak_bytes"]
    assert refused == {"model": True, "chunked": False}
    assert peak < 4 * 256 * 48_000 * 4 // 2
