"""Fine-tune a causal language model on a text file, in a loop of your own.

    fuyou launch --nvme /mnt/nvme --ram 48GiB --gpu 20GiB examples/finetune.py MODEL TEXT OUTPUT
    python examples/finetune.py MODEL TEXT OUTPUT        # no drive, and 80 % of the memory that is free

MODEL is a Hugging Face folder or an id on the hub, TEXT a file of plain text, OUTPUT the folder to write the model to.
The loop is an ordinary PyTorch loop: what is fuyou's is the `with` line, `run.optimizer` and `run.save_pretrained`.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fuyou


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a causal language model on a text file.")
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


def read_rows(path: Path, tokenizer, length: int) -> torch.Tensor:
    """The text as rows of tokens, (rows, length) int64; a last row that would not be full is left out."""
    tokens = tokenizer(path.read_text(encoding="utf-8"))["input_ids"]
    count = len(tokens) // length
    if count == 0:
        raise SystemExit(f"{path} has {len(tokens)} tokens, less than one row of {length}: add text or give --length.")
    return torch.tensor(tokens[: count * length]).view(count, length)


def batches(rows: torch.Tensor, batch_size: int, seed: int):
    """Batches without end, (batch_size, length): every row once in a new order, and again."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while True:
        while len(order) < batch_size:
            order += torch.randperm(len(rows), generator=generator).tolist()
        yield rows[order[:batch_size]]
        del order[:batch_size]


def main() -> None:
    arguments = read_arguments()
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = read_rows(arguments.text, tokenizer, arguments.length)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    model.train()

    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / arguments.warmup))
    with fuyou.wrap(model, optimizer) as run:  # folders and budgets: those of `fuyou launch`
        data = batches(rows, arguments.batch_size, arguments.seed)
        for step in range(1, arguments.steps + 1):
            total = 0.0
            for _ in range(arguments.accumulation):
                batch = next(data).to(run.device)
                loss = model(input_ids=batch, labels=batch).loss / arguments.accumulation
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            run.optimizer.step()
            scheduler.step()
            run.optimizer.zero_grad()
            print(f"step {step} loss {total:.4f}", flush=True)
        run.save_pretrained(arguments.output)
        tokenizer.save_pretrained(arguments.output)
        print(run.report().table())
    print(f"The model is in {arguments.output}.")


if __name__ == "__main__":
    main()
