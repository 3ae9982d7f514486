"""Seconds a step and peak memory of DeepSpeed ZeRO-3 on bench_step's model: a child of bench_step.py, in its own process.

    python scripts/bench_deepspeed.py --nvme DIR --rows 16 --length 256 --setting '{...}'

fp32 on DeepSpeed's CPU accelerator, one process: parameters in RAM (offload_param cpu), DeepSpeedCPUAdam with master
weights and moments on NVMe (offload_optimizer nvme). `--setting` holds what SETTINGS vary. The last line printed is JSON:
seconds of each timed step, losses, peak resident bytes (VmHWM). Needs DeepSpeed, a C++ compiler and libaio's
headers; its first run on a machine compiles its operators, which takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_gpt import LAYERS, VOCABULARY, Gpt
from bench_tools import peak_rss_bytes

# The published advice for NVMe offload, with the pipelining of its swapper on and off, and finer groups of parameters.
SETTINGS: tuple[dict[str, Any], ...] = (
    {"sub_group_size": 100_000_000, "pipeline": True, "block_bytes": 1 << 20, "queue_depth": 32, "threads": 1},
    {"sub_group_size": 10_000_000, "pipeline": True, "block_bytes": 1 << 20, "queue_depth": 32, "threads": 1},
    {"sub_group_size": 10_000_000, "pipeline": True, "block_bytes": 8 << 20, "queue_depth": 16, "threads": 2},
    {"sub_group_size": 10_000_000, "pipeline": False, "block_bytes": 8 << 20, "queue_depth": 16, "threads": 2},
)


def engine_config(setting: dict[str, Any], rows: int, folder: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": setting["sub_group_size"],
            "offload_param": {"device": "cpu", "pin_memory": False},
            "offload_optimizer": {
                "device": "nvme",
                "nvme_path": folder,
                "pin_memory": False,
                "buffer_count": 4,
                "pipeline_read": setting["pipeline"],
                "pipeline_write": setting["pipeline"],
            },
        },
        "aio": {
            "block_size": setting["block_bytes"],
            "queue_depth": setting["queue_depth"],
            "intra_op_parallelism": setting["threads"],
            "single_submit": False,
            "overlap_events": True,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000,
    }


def train(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    model = Gpt(checkpointed=True, layers=options.layers, max_tokens=options.length)
    optimizer = DeepSpeedCPUAdam(model.parameters(), lr=1e-4, weight_decay=0.01, adamw_mode=True)
    config = engine_config(options.setting, options.rows, folder)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    generator = torch.Generator().manual_seed(1)
    seconds, losses = [], []
    for _ in range(options.warmup + options.steps):
        tokens = torch.randint(0, VOCABULARY, (options.rows, options.length), generator=generator)
        began = time.perf_counter()
        loss = engine(tokens)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    return {
        "version": deepspeed.__version__,
        "steps_s": seconds[options.warmup :],
        "losses": losses,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nvme", required=True, help="folder on the drive")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--setting", type=json.loads, default=SETTINGS[0], help="JSON, like one of SETTINGS")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `timeout` leaves no gigabytes in the folder
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # one process, which is all of its world
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_PORT", str(29500 + os.getpid() % 1000))
    with tempfile.TemporaryDirectory(prefix="bench-deepspeed-", dir=Path(options.nvme)) as folder:
        result = train(options, folder)
    sys.stdout.flush()
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
