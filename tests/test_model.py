"""Model folders and hub ids as `fuyou train` meets them: what is missing, damaged or of another kind is said in words."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jobs
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fuyou.cli import main
from fuyou.core.errors import ConfigError
from fuyou.train.model import learnt_positions, load_configuration, load_model, load_tokenizer

transformers = pytest.importorskip("transformers", reason="fuyou train reads models through transformers")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return jobs.make_inputs(tmp_path_factory.mktemp("inputs")) / "m"


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "m"))


def configure(folder: Path, **values: object) -> None:
    """Change keys of config.json; None removes one."""
    path = folder / "config.json"
    held = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in held.items() if value is not None}))


def split_into_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for shard, some in shards.items():
        save_file({name: tensors[name] for name in some}, folder / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, some in shards.items() for name in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def shorten(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def drop_shard(folder: Path) -> None:
    split_into_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def shorten_shard(folder: Path) -> None:
    split_into_shards(folder)
    shorten(folder / "model-00002-of-00002.safetensors", 100)


def break_index(folder: Path) -> None:
    split_into_shards(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')


def break_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[20] = 0
    path.write_bytes(data)


REFUSED = {
    "weights cut short": (lambda folder: shorten(folder / "model.safetensors", 1), r"the header says \d+ bytes .* has \d+"),
    "weights too long": (lambda folder: (folder / "model.safetensors").open("ab").write(b"\0"), "too long"),
    "weights empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "damaged: 0 B long"),
    "weights of something else": (lambda folder: (folder / "model.safetensors").write_bytes(b"<html>" * 99), "damaged"),
    "header damaged": (break_header, "header cannot be read"),
    "shard missing": (drop_shard, "lacks 1 of the 2 shards .* model-00002-of-00002.safetensors"),
    "shard cut short": (shorten_shard, r"model-00002-of-00002.safetensors are cut short"),
    "index damaged": (break_index, "index.json is damaged"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "only a pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "only pytorch_model.bin, a pickle.*makes a safetensors copy",
    ),
    "other shapes": (lambda folder: configure(folder, intermediate_size=80), r"6 tensors .* \(64, 96\) in the file and \(64, 80\)"),
    "more layers": (lambda folder: configure(folder, num_hidden_layers=3), "lack 9 tensors"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer that can be read"),
    "tokenizer damaged": (lambda folder: (folder / "tokenizer.json").write_text("{"), "The tokenizer of model .* cannot be"),
    "tokenizer too large": (lambda folder: configure(folder, vocab_size=399), "400 tokens and the model's vocabulary 399"),
    "unknown architecture": (lambda folder: configure(folder, model_type="lama"), "'lama'.*did you mean 'llama'.*pip install"),
    "no architecture": (lambda folder: configure(folder, model_type=None), "has no model_type"),
    "its own code": (
        lambda folder: configure(folder, model_type="mine", auto_map={"AutoConfig": "configuration_mine.Mine"}),
        "'mine', whose code comes with the model.*runs no code",
    ),
    "not causal": (lambda folder: configure(folder, model_type="t5"), "not a causal language model"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "has no model_type"),
    "config holds nonsense": (lambda folder: configure(folder, hidden_size="wide"), "hidden_size"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
}  # fmt: skip


def load_all(name: str) -> None:
    load_tokenizer(name, 48)
    load_model(name, None, 48)


@pytest.mark.parametrize("what", REFUSED)
def test_a_folder_that_cannot_be_trained_is_refused_in_words(folder, capfd, what):
    load_all(str(folder))
    breaking, reason = REFUSED[what]
    breaking(folder)
    with pytest.raises(ConfigError, match=reason) as caught:
        load_all(str(folder))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert "Do you wish to run" not in capfd.readouterr().out  # nothing is asked on the terminal


def test_shards_are_read_and_weights_without_a_place_are_told_of(folder):
    split_into_shards(folder)
    expected = {name: tensor for shard in folder.glob("model-*") for name, tensor in load_file(shard).items()}
    model, notes = load_model(str(folder), "fp32")
    assert notes == []
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())
    configure(folder, num_hidden_layers=1)
    _, notes = load_model(str(folder), "fp32")
    assert len(notes) == 1 and "9 tensors that LlamaForCausalLM has no place for" in notes[0]


def test_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for name, reason in (
        (str(tmp_path / "file"), "is a file"),
        (str(tmp_path / "none"), "does not exist"),
        ("a/b/c", "does not exist"),
        ("a b/c", "no id of the hub"),
    ):
        with pytest.raises(ConfigError, match=reason):
            load_configuration(name)


# --- positions ----------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
LEARNT = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=12)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
            max_position_embeddings=12, word_embed_proj_dim=16,
        )
    ),
    "roberta": lambda: transformers.RobertaForCausalLM(
        transformers.RobertaConfig(**SMALL, max_position_embeddings=14, is_decoder=True, pad_token_id=1)
    ),
    "bert": lambda: transformers.BertLMHeadModel(
        transformers.BertConfig(**SMALL, max_position_embeddings=12, is_decoder=True)
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", LEARNT)
def test_learnt_positions_are_those_that_a_forward_can_take(family):
    model = LEARNT[family]().eval()
    longest = 0
    for length in range(2, 20):
        try:
            model(input_ids=torch.full((1, length), 7))
        except (IndexError, RuntimeError):
            break
        longest = length
    assert learnt_positions(model) == longest < 19


def test_computed_positions_have_no_end():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, max_position_embeddings=12))
    assert learnt_positions(model) is None
    model(input_ids=torch.full((1, 30), 7))


def test_a_row_longer_than_the_positions_is_refused(tmp_path, whole):
    LEARNT["roberta"]().save_pretrained(tmp_path)
    load_model(str(tmp_path), None, 12)
    with pytest.raises(ConfigError, match="sequence_length=13 is more than the 12 positions"):
        load_model(str(tmp_path), None, 13)
    with pytest.raises(ConfigError, match="sequence_length=65 is more than the 64 positions"):
        load_tokenizer(str(whole), 65)


# --- a model without a loss ---------------------------------------------------------------------------------------


class WithoutLossConfig(transformers.PretrainedConfig):
    model_type = "fuyou-without-loss"
    vocab_size = 400


class WithoutLoss(transformers.PreTrainedModel):
    """A causal language model that gives logits, whatever labels it is given."""

    config_class = WithoutLossConfig

    def __init__(self, config: WithoutLossConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(400, 8)
        self.head = nn.Linear(8, 400)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> object:
        logits = self.head(self.embedding(input_ids))
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


def test_a_batch_without_loss_is_refused_in_words(tmp_path, folder, capsys):
    transformers.AutoConfig.register("fuyou-without-loss", WithoutLossConfig, exist_ok=True)
    transformers.AutoModelForCausalLM.register(WithoutLossConfig, WithoutLoss, exist_ok=True)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    WithoutLoss(WithoutLossConfig()).save_pretrained(folder)
    (tmp_path / "d.txt").write_text("One thing after another.\n\nAnd so on.")
    settings = {"model": str(folder), "data": str(tmp_path / "d.txt"), "sequence_length": 16, "eval_share": 0}
    assert main(["train", str(jobs.write_job(tmp_path, tmp_path, **settings, packing="stream"))]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "WithoutLoss was given labels and returned none as loss" in message and "fuyou.wrap" in message
    assert not (tmp_path / "out").exists() and list((tmp_path / "nvme").iterdir()) == []


# --- the hub ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(whole) -> Iterator[str]:
    """A hub on this machine that has one model, someone/small."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path == "/api/models/someone/small":
                self.answer(200, json.dumps({"id": "someone/small", "sha": "c" * 40, "siblings": []}).encode())
            elif path.startswith("/someone/small/resolve/"):
                file = whole / path.rsplit("/", 1)[1]
                found = file.read_bytes() if file.is_file() else None
                self.answer(404 if found is None else 200, found or b"", "EntryNotFound" if found is None else "")
            elif path.startswith("/api/models/someone/small/tree/"):
                self.answer(200, b"[]")  # no chat templates in folders of their own
            else:
                self.answer(404, b"{}", "RepoNotFound")

        def answer(self, status: int, body: bytes, error: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hash(body) & 0xFFFFFFFF:x}"')
            self.send_header("X-Repo-Commit", "c" * 40)
            if error:
                self.send_header("X-Error-Code", error)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


SCRIPT = """
import sys
from fuyou.train.model import load_model, load_tokenizer
from fuyou.core.errors import ConfigError
for name in sys.argv[1:]:
    try:
        load_tokenizer(name, 48)
        print("loaded", sum(p.numel() for p in load_model(name, None)[0].parameters()))
    except ConfigError as error:
        print("refused", error)
"""


def from_hub(endpoint: str, cache: Path, *names: str) -> list[str]:
    """What comes of loading each of `names`, in a process of its own: the hub's address is read on import."""
    environment = {
        key: value for key, value in os.environ.items() if "OFFLINE" not in key and "proxy" not in key.lower()
    }
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names], env=environment, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    assert "Retry" not in result.stderr  # a hub that does not answer is not asked again and again, for 23 s
    return result.stdout.strip().splitlines()[-len(names) :]


def test_the_hub_gives_a_model_and_its_cache_gives_it_again(hub, tmp_path, whole):
    expected = f"loaded {sum(tensor.numel() for tensor in load_file(whole / 'model.safetensors').values())}"
    found, refused = from_hub(hub, tmp_path, "someone/small", "someone/else")
    assert found == expected and "someone/else is no folder here, and the hub has no such model" in refused
    nowhere = "http://127.0.0.1:9"  # nobody listens there
    found, refused = from_hub(nowhere, tmp_path, "someone/small", "someone/else")
    assert found == expected and "someone/else is no folder here, and neither the hub nor its cache" in refused
