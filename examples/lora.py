"""Fine-tune a LoRA adapter (peft) of a causal language model on a text file, with gradient checkpointing.

    fuyou launch --nvme /mnt/nvme --ram 48GiB --gpu 20GiB examples/lora.py MODEL TEXT OUTPUT
    python examples/lora.py MODEL TEXT OUTPUT            # no drive, and 80 % of the memory that is free

MODEL is a Hugging Face folder or an id on the hub, TEXT a file of plain text, OUTPUT the folder to write the adapter to,
which `peft.PeftModel.from_pretrained(base, OUTPUT)` reads. The model's own weights are frozen: fuyou streams them to the
device and never writes them, and only the adapter has gradients and optimizer state.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import fuyou


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a LoRA adapter of a causal language model on a text file.")
    parser.add_argument("model", help="a Hugging Face folder, or an id on the hub")
    parser.add_argument("text", type=Path, help="a file of plain text")
    parser.add_argument("output", type=Path, help="the folder to write the adapter to")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter's matrices")
    parser.add_argument("--targets", default="all-linear", help="layers to adapt: names with commas, or all-linear")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4, help="rows a step")
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--lr", type=float, default=2e-4)
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


def add_adapter(model: torch.nn.Module, rank: int, targets: str) -> torch.nn.Module:
    """The model with a LoRA adapter, which alone is trained, and with its layers checkpointed."""
    layers = targets if targets == "all-linear" else targets.split(",")
    adapted = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=layers)
    )
    adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted.config.use_cache = False  # a cache of keys and values is for generating
    return adapted


def main() -> None:
    arguments = read_arguments()
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = read_rows(arguments.text, tokenizer, arguments.length)
    model = add_adapter(AutoModelForCausalLM.from_pretrained(arguments.model), arguments.rank, arguments.targets)
    model.train()
    model.print_trainable_parameters()

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.lr, weight_decay=0.0, fused=True)
    config = fuyou.Config(activations="keep")  # the model checkpoints by itself: once is enough
    with fuyou.wrap(model, optimizer, config=config) as run:  # folders and budgets: those of `fuyou launch`
        for step in range(1, arguments.steps + 1):
            batch = rows[torch.randint(len(rows), (arguments.batch_size,))].to(run.device)
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            run.optimizer.step()
            run.optimizer.zero_grad()
            print(f"step {step} loss {loss.item():.4f}", flush=True)
        run.save_pretrained(arguments.output)
        tokenizer.save_pretrained(arguments.output)
        print(run.report().table())
    print(f"The adapter is in {arguments.output}.")


if __name__ == "__main__":
    main()
