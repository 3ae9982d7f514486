"""Fine-tune a causal language model on a text file with the Hugging Face Trainer, which is used as it is.

    fuyou launch --nvme /mnt/nvme --ram 48GiB --gpu 20GiB examples/trainer.py MODEL TEXT OUTPUT
    python examples/trainer.py MODEL TEXT OUTPUT         # no drive, and 80 % of the memory that is free

MODEL is a Hugging Face folder or an id on the hub, TEXT a file of plain text, OUTPUT the folder to write the model to.
The Trainer is given the wrapped model and `run.optimizer`; it accumulates, clips and schedules as ever. At the end
`run.save_pretrained` writes the model, in a stream that needs no memory for all of it. With --save-steps N the Trainer saves
checkpoints of its own, and the same command goes on from the newest after a kill.
"""

import argparse
import shutil
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
    parser.add_argument("--save-steps", type=int, default=0, help="steps between the Trainer's checkpoints; 0: none")
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


def has_checkpoint(output: Path) -> bool:
    """Whether there is one to go on from. One that was being saved in a kill goes: the Trainer would take it for the newest."""
    checkpoints = [*output.glob("checkpoint-*")]
    for each in checkpoints:
        if not (each / "trainer_state.json").exists():  # which is written last
            shutil.rmtree(each)
    return any(each.exists() for each in checkpoints)


def main() -> None:
    arguments = read_arguments()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = read_rows(arguments.text, tokenizer, arguments.length)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)

    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.01, fused=True)
    scheduler = get_cosine_schedule_with_warmup(optimizer, arguments.warmup, arguments.steps)
    # Folders and budgets: those of `fuyou launch`. No step is committed but by the Trainer, which loads its own checkpoints.
    with fuyou.wrap(model, optimizer, config=fuyou.Config(durability="checkpoint")) as run:
        settings = TrainingArguments(
            output_dir=str(arguments.output),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            gradient_accumulation_steps=arguments.accumulation,
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="steps" if arguments.save_steps else "no",
            save_steps=arguments.save_steps or 500,
            save_total_limit=2,
            report_to=[],
            seed=arguments.seed,
            use_cpu=run.device.type == "cpu",
        )
        trainer = Trainer(model, settings, train_dataset=rows, optimizers=(run.optimizer, scheduler))
        trainer.train(resume_from_checkpoint=has_checkpoint(arguments.output))
        run.save_pretrained(arguments.output)
        tokenizer.save_pretrained(arguments.output)
        print(run.report().table())
    print(f"The model is in {arguments.output}.")


if __name__ == "__main__":
    main()
