"""What differs between systems that train this way: fuyou, and the Fuyou paper's, whose published times check the model.

Everything about a system that the cost model's constants hold stands here; everything about a machine stands in its
hardware file.
"""

from __future__ import annotations

from dataclasses import dataclass

from fuyou.plan.cost import FUYOU_BF16, FUYOU_FP32, PAPER, Traffic
from fuyou.plan.phases import Update
from fuyou.plan.planner import CHUNK_ELEMENTS, MANY, SLOT_BLOCKS, WORKING_BYTES


@dataclass(frozen=True)
class System:
    """`itemsize`: bytes of a weight and an activation on the device. `device_slots`: tried in this order, blocks of weights
    on the device at once. `budget_share`: of a machine's memory that it uses when no budget is given."""

    name: str
    traffic: Traffic
    itemsize: int
    updates: tuple[Update, ...]  # the first is used where NVMe has room for two slots of what it rewrites
    device_slots: tuple[int, ...]
    gradient_slots: int
    in_flight: int
    state_slots: int  # on NVMe, of what updates rewrite
    working_bytes: int  # of the device, for torch's workspaces
    context_bytes: int  # of the device, that CUDA takes before anybody asks
    tile_bytes: int  # of logits at a time
    budget_share: float
    uses_host: bool  # host memory is a home for weights, gradients and state as far as it goes
    swaps_to_host: bool  # and for activations
    keeps_on_device: bool  # activations stay on the device where there is room
    temporaries: bool  # gradients of activations take memory beside what was saved
    slices_batches: bool  # a block can run a part of the batch at a time

    def staging_bytes(self, host_bytes: int, with_nvme: bool) -> int:
        """Of host memory: planner.py's largest chunks with as many in flight as a drive likes, a quarter at most; nothing
        where nothing is on NVMe."""
        if not with_nvme:
            return 0
        chunk, its = CHUNK_ELEMENTS[0], self.traffic
        update = its.weight_bytes + its.gradient_bytes + its.state_bytes
        a_parameter = (
            MANY.inbound * its.weight_bytes + (MANY.updates + 1) * update + MANY.gradients * its.gradient_bytes
        )
        return min(round(chunk * a_parameter), host_bytes // 4)


def fuyou_system(precision: str = "bf16", device: str = "cuda") -> System:
    """fuyou as it is: the planner's slots and reserves, `wrap`'s 80 % of what is free, fuyou train's tiled loss."""
    return System(
        name="fuyou",
        traffic=FUYOU_BF16 if precision == "bf16" else FUYOU_FP32,
        itemsize=2 if precision == "bf16" else 4,
        updates=("speculative", "deferred"),
        device_slots=(SLOT_BLOCKS, 3, 2, 1),
        gradient_slots=1,
        in_flight=1,
        state_slots=2,
        working_bytes=WORKING_BYTES[device],
        context_bytes=512 * 2**20 if device == "cuda" else 0,  # a CUDA context with cuBLAS, as nvidia-smi shows it
        tile_bytes=2 * (128 if device == "cuda" else 16) * 2**20,  # fuyou/train/token_losses.py: logits, their gradient
        budget_share=0.8,
        uses_host=True,
        swaps_to_host=True,
        keeps_on_device=True,
        temporaries=True,
        slices_batches=True,
    )


# As its artifact (RC4ML/LoHan) does it: the update runs under backward, group by group, each gradient used as it comes; model
# states on the drives however much host memory there is; activations swapped through host memory to the drives. Two blocks
# of weights and two of gradients on the device: one computes, one is on its way. Weights come in with the drives' reads of
# forward only. In 24 GB it ran 13B at batch 128, where a block saves 21.5 GB: nothing can have been beside it but weights and
# gradients of blocks (2.5 GB), so gradients of activations reuse what was saved, and the head is not there.
PAPER_SYSTEM = System(
    name="the Fuyou paper's system",
    traffic=PAPER,
    itemsize=2,
    updates=("backward",),
    device_slots=(2,),
    gradient_slots=2,
    in_flight=0,
    state_slots=1,
    working_bytes=0,
    context_bytes=512 * 2**20,
    tile_bytes=0,
    budget_share=1.0,
    uses_host=False,
    swaps_to_host=False,
    keeps_on_device=False,
    temporaries=False,
    slices_batches=False,
)
