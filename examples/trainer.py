"""Fine-tune a causal language model on a text file with the Hugging Face Trainer, which is used as it is.

    fuyou launch --nvme /mnt/nvme --ram 48GiB --gpu 20GiB examples/trainer.py MODEL TEXT OUTPUT
    python examples/trainer.py MODEL TEXT OUTPUT         # no drive, and 80 % of the memory that is free

MODEL is a Hugging Face folder or an id on the hub, TEXT a file of plain text, OUTPUT the folder to write the model to.
The Trainer is given the wrapped model and `run.optimizer`; it accumulates, clips and schedules as ever. Checkpoints of
its own are off: `run.save_pretrained` writes the model, in a stream that needs no memory for all of it.
"""

import argparse
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)

import fuyou


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fine-tune a causal language model on a text file with the HF Trainer."
    )
    parser.add_argument("model", help="a Hugging Face folder, or an id on the hub")
    parser.add_argument("text", type=Path, help="a file of plain text")
    parser.add_argument("output", type=Path, help="the folder to write the fine-tuned model to")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=1, help="rows a backward")
    parser.add_argument("--accumulation", type=int, default=4, help="backwards a step")
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--warmup", type=int, default=10, help="steps until the full learning rate")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not arguments.text.is_file():
        parser.error(f"the text {arguments.text} is not a file: give a file of plain text to train on")
    return arguments


def read_rows(path: Path, tokenizer, length: int) -> list[dict[str, list[int]]]:
    """The text as rows of `length` tokens; a last row that would not be full is left out."""
    tokens = tokenizer(path.read_text(encoding="utf-8"))["input_ids"]
    starts = range(0, len(tokens) - length + 1, length)
    if not starts:
        raise SystemExit(f"{path} has {len(tokens)} tokens, less than one row of {length}: add text or give --length.")
    return [{"input_ids": tokens[at : at + length], "labels": tokens[at : at + length]} for at in starts]


def main() -> None:
    arguments = read_arguments()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = read_rows(arguments.text, tokenizer, arguments.length)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)

    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.01, fused=True)
    scheduler = get_cosine_schedule_with_warmup(optimizer, arguments.warmup, arguments.steps)
    with fuyou.wrap(model, optimizer) as run:  # folders and budgets: those of `fuyou launch`
        settings = TrainingArguments(
            output_dir=str(arguments.output),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            gradient_accumulation_steps=arguments.accumulation,
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            seed=arguments.seed,
            use_cpu=run.device.type == "cpu",
        )
        Trainer(model, settings, train_dataset=rows, optimizers=(run.optimizer, scheduler)).train()
        run.save_pretrained(arguments.output)
        tokenizer.save_pretrained(arguments.output)
        print(run.report().table())
    print(f"The model is in {arguments.output}.")


if __name__ == "__main__":
    main()
