"""Make what the quickstart trains, in the working directory: data.jsonl, nvme/, and model/ with its tokenizer.

Text: the docstrings of this interpreter's standard library, as instruction data (signature → docstring). Model: a
Llama of 36.8M parameters with random weights, in bf16. Whatever is there already is kept.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from fuyou.train.config import read_config
from fuyou.train.documents import read_documents, split

VOCABULARY = 8192
SHORTEST = 32  # characters; shorter docstrings ("Return self.") say little
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data"}


def main(config_path: str) -> None:
    logging.disable_progress_bar()
    config = read_config(config_path)
    Path(config.nvme_folders()[0]).mkdir(exist_ok=True)
    if not Path(config.data[0]).exists():
        write_data(Path(config.data[0]))
    if not Path(config.model).exists():
        training, held_out = split(read_documents(config.data), config.eval_share, config.seed)
        print(f"     {len(training):,} docstrings to train on, {len(held_out):,} held out")
        making = Path(f"{config.model}.making")
        shutil.rmtree(making, ignore_errors=True)
        train_tokenizer(document.prompt + document.text for document in training).save_pretrained(making)
        parameters = save_model(making, config.seed)
        print(f"     {parameters / 1e6:.1f}M parameters, {12 * parameters / 1e6:.0f} MB of training state")
        os.replace(making, config.model)


def write_data(path: Path) -> None:
    """A JSON object a docstring; one that stands within another is left out, so that no held-out text is learnt."""
    found: dict[str, dict[str, str]] = {}
    for signature, docstring in signatures():
        found.setdefault(" ".join(docstring.split()), {"prompt": signature, "completion": docstring})
    everything = "\0".join(found)
    rows = [row for text, row in found.items() if everything.count(text) == 1]
    making = path.with_suffix(".making")
    making.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    os.replace(making, path)


def signatures() -> Iterator[tuple[str, str]]:
    """(signature, docstring) of every class and function in the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    warnings.simplefilter("ignore")  # old escapes in string literals
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if LEFT_OUT & set(inside.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates and deliberately broken files
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(node)
                if docstring and len(docstring) >= SHORTEST:
                    yield f"# {inside.as_posix()}\n{signature(node)}\n", docstring


def signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"def {node.name}({ast.unparse(node.args)}){returns}:"


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE (as GPT-2's): every text can be written in it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def save_model(folder: Path, seed: int) -> int:
    """The number of parameters of the model that is now in `folder`."""
    torch.manual_seed(seed)
    llama = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=704,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=11,
        num_key_value_heads=11,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(llama).to(torch.bfloat16)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main(sys.argv[1])
