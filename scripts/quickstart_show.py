"""End of the quickstart: held-out loss before and after, and a text that the exported model writes.

Exits 1 where the loss did not begin near chance and fall by a quarter: then this machine trains something else.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

PROMPT = "# os.py\ndef copy_file(source, target, overwrite=False):\n"


def main(run: Path) -> int:
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval_loss" in line]
    before, after = evaluations[0]["eval_loss"], evaluations[-1]["eval_loss"]
    chance = math.log(len(tokenizer))

    print(f"\nHeld-out loss over {evaluations[0]['tokens']:,} tokens of documents that were not trained on:")
    print(f"  before  {before:.3f}   (chance: ln {len(tokenizer)} = {chance:.3f})")
    print(f"  after   {after:.3f}   ({1 - after / before:.0%} less)")

    print("\nThe exported model, given a signature, writes a docstring (its form; sense takes more training):")
    for line in (PROMPT + sample(run / "model", tokenizer)).splitlines():
        print(f"  | {line}")

    if abs(before - chance) > 0.3 or after > 0.75 * before:
        print("\nquickstart: the loss should begin within 0.3 of chance and fall by a quarter.", file=sys.stderr)
        return 1
    return 0


def sample(folder: Path, tokenizer: AutoTokenizer) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    given = tokenizer(PROMPT, return_tensors="pt").input_ids
    written = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=60,
        do_sample=True,
        temperature=0.7,
        top_k=40,
        repetition_penalty=1.2,
    )
    return tokenizer.decode(written[0, given.shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
