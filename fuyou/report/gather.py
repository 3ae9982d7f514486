"""From a run's parts to the dict of its report."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fuyou.core.ledger import TIERS
from fuyou.core.limits import read_memory
from fuyou.plan.explain import explain, remedies
from fuyou.report.steps import achieved, backward_count, block_seconds, step_content
from fuyou.report.words import bound_sentence
from fuyou.runtime.measure import peak_rss_bytes, rss_bytes
from fuyou.runtime.movers import Movers
from fuyou.runtime.tiers import Tiers
from fuyou.swap.rates import Rates
from fuyou.swap.unit import Member, Unit

VERSION = 1  # of the dict's schema
TRAFFIC = ("nvme_read_bytes", "nvme_write_bytes", "host_to_device_bytes", "device_to_host_bytes")
LARGEST = 10
LINK_BYTES_PER_S = 20e9  # in the cost model, of copies whose time is not known
DAY_S = 86400.0


def gather(
    tiers: Tiers, movers: Movers, units: Sequence[Unit], baseline: Mapping[str, int], device: torch.device
) -> dict[str, Any]:
    """The content of a report, as Report.dict describes it. `baseline`: bytes of rss, device, committed, heap_free after `wrap`."""
    steps = list(movers.clock.steps)
    warm = steps[1:] or steps  # the first step also finds its way
    traffic = {
        f"{name}_per_step": round(sum(each["traffic"][name] for each in warm) / len(warm)) if warm else 0
        for name in TRAFFIC
    }
    memory = tiers.ledger.summary()
    recorder = tiers.recorder
    step = step_content(recorder, {tier: memory[tier]["held_by_category"] for tier in TIERS})
    seconds = step.get("seconds", 0.0)
    model = _account(tiers, movers, seconds)
    content = {
        "version": VERSION,
        "tiers": memory,
        "process": _process(tiers, baseline, memory, device),
        "traffic": traffic,
        "steps": steps,
        "step_count": movers.clock.count,
        "step": step,
        "updates": dict(movers.updates.counts),
        "update_seconds": dict(movers.updates.seconds),
        "prefetch": dict(movers.swapper.prefetches),
        "plan": movers.schedule.plan_summary(),
        "model": model,
        "speeds": _speeds(tiers),
        "parameters": _parameters(units, traffic, model),
        "wear": _wear(tiers, traffic, seconds),
        "largest_tensors": _largest(units),
        "resident_units": [
            {"name": each.name, "bytes": each.nbytes, "used_by": each.users} for each in movers.swapper.resident
        ],
        "device": str(device),
        "lane_times": "queued" if device.type == "cuda" else "run",
        "drives": tiers.store.summary() if tiers.store is not None else [],
        "engine": {"io": tiers.engine.name if tiers.engine is not None else "none", "adam": tiers.kernels.name},
        "notes": list(tiers.notes),
    }
    content["bound"] = bound_sentence(content)
    return content


def _process(
    tiers: Tiers, baseline: Mapping[str, int], memory: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """Of the growth of resident memory since `wrap`, what the ledger held at the highest that was noted, torch's temporaries,
    freed memory that the heap holds, and what nobody has charged. On a CPU the device tier is resident memory too."""
    recorder = tiers.recorder
    tracked = recorder.held_then.get("committed", 0) - baseline["committed"]
    reserve = 0
    if device.type == "cpu":
        tracked += recorder.held_then.get("device", 0) - baseline["device"]
        reserve = memory["device"]["reserve_bytes"]
    growth = max(0, recorder.most_resident - baseline["rss"])
    tracked = max(0, tracked) if growth else 0
    left = max(0, growth - tracked)
    temporaries = min(reserve, left)
    # Not all that the heap says is free has pages: at most as much as nothing else explains.
    heap_free = min(max(0, recorder.held_then.get("heap_free", 0) - baseline["heap_free"]), left - temporaries)
    group = read_memory().tightest()
    content: dict[str, Any] = {
        "baseline_rss_bytes": baseline["rss"],
        "peak_rss_bytes": peak_rss_bytes(),
        "rss_bytes": rss_bytes(),
        "committed_host_bytes": tiers.committed_bytes,
        "growth_bytes": growth,
        "tracked_growth_bytes": tracked,
        "temporaries_bytes": temporaries,
        "heap_free_bytes": heap_free,
        "untracked_bytes": left - temporaries - heap_free,
        "control_group_limit_bytes": group.limit_bytes if group is not None else None,
        "control_group_used_bytes": group.used_bytes if group is not None else None,
    }
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # of a device that has failed
            content["cuda_allocator"] = {
                "allocated_bytes": torch.cuda.memory_allocated(device),
                "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
                "reserved_bytes": torch.cuda.memory_reserved(device),
                "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
            }
    return content


def _account(tiers: Tiers, movers: Movers, seconds: float) -> dict[str, Any]:
    """The cost model held to the steps as they were: what binds them, and what would help."""
    names = {each.name: each.index for each in movers.schedule.blocks if each.index is not None}
    blocks = block_seconds(tiers.recorder, names)
    if not seconds or not any(forward for forward, _ in blocks.values()):
        return {}
    speeds = achieved(tiers.recorder)
    rates = Rates(
        speeds["device_to_host"] or LINK_BYTES_PER_S,
        speeds["host_to_device"] or LINK_BYTES_PER_S,
    )
    prediction = movers.deciding.account(blocks, seconds, backward_count(tiers.recorder), rates)
    moved = {
        "nvme_read_bytes_per_step": prediction.nvme_read_bytes,
        "nvme_write_bytes_per_step": prediction.nvme_write_bytes,
    }
    if tiers.link.is_cuda:  # blocks' seconds are those of queueing them: nothing follows from these but what is moved
        return {**moved, "bound_by": None, "busy_seconds": {}, "words": "", "advice": []}
    return {
        **moved,
        "bound_by": prediction.bound_by,
        "busy_seconds": dict(prediction.busy_s),
        "words": explain(prediction),
        "advice": [{"change": each.change, "times_as_fast": each.gain} for each in remedies(prediction)],
    }


def _speeds(tiers: Tiers) -> dict[str, Any]:
    """Of drives and links, bytes a second while they moved any, beside what the drives were measured at alone."""
    measured = sum(each.bytes_per_s for each in tiers.store.drives) if tiers.store is not None else 0.0
    return {
        lane: {"achieved_bytes_per_s": rate, "measured_bytes_per_s": (measured or None) if "nvme" in lane else None}
        for lane, rate in achieved(tiers.recorder).items()
    }


def _parameters(units: Sequence[Unit], traffic: Mapping[str, int], model: Mapping[str, Any]) -> dict[str, Any]:
    """Counts, and bytes a trained parameter over the drives' link against what the plan needs at least."""
    members = [member for unit in units for member in unit.members]
    trained = sum(member.parameter.numel() for member in members if member.optimized)
    moved = traffic["nvme_read_bytes_per_step"] + traffic["nvme_write_bytes_per_step"]
    ideal = model.get("nvme_read_bytes_per_step", 0) + model.get("nvme_write_bytes_per_step", 0)
    return {
        "count": sum(member.parameter.numel() for member in members),
        "trained": trained,
        "nvme_bytes_per_parameter": moved / trained if trained else None,
        "ideal_nvme_bytes_per_parameter": ideal / trained if trained and model else None,
    }


def _wear(tiers: Tiers, traffic: Mapping[str, int], seconds: float) -> dict[str, Any]:
    written = traffic["nvme_write_bytes_per_step"]
    drives = len(tiers.store.drives) if tiers.store is not None else 0
    per_day = written * DAY_S / seconds if seconds else 0.0
    return {
        "written_bytes_per_step": written,
        "written_bytes_per_day": round(per_day),
        "days_for_600_tb_per_drive": drives * 600e12 / per_day if per_day else None,
    }


def _largest(units: Sequence[Unit]) -> list[dict[str, Any]]:
    def of(member: Member) -> dict[str, Any]:
        parameter = member.parameter
        elements, unit = parameter.numel(), member.unit
        weights = elements * unit.dtype.itemsize
        state = elements * ((10 if unit.split else 8) if member.optimized else 0)
        return {
            "name": member.name,
            "shape": list(parameter.shape),
            "dtype": str(unit.dtype).removeprefix("torch."),
            "bytes": weights + state + (weights if member.optimized else 0),
        }

    members = sorted((m for unit in units for m in unit.members), key=lambda m: -m.parameter.numel())
    return [of(each) for each in members[:LARGEST]]
