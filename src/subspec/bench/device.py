"""How fast a CUDA device's link is, and which kernels a draft would take there; times by CUDA events.

Knows nothing of models or plans.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from subspec.planning.device import gpu_facts, why_no_gpu
from subspec.substitute.choice import Shape, choose_on

LINK_BYTES = (4 << 20, 16 << 20, 64 << 20)
REPEATS = 20


def seconds(work: Callable[[int], object], repeats: int = REPEATS) -> float:
    """Median seconds of ``work``, which is told the number of its call."""
    times = []
    for number in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        work(number)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return float(statistics.median(times[3:]))


def link_speeds() -> list[dict[str, Any]]:
    """Bytes/s of copies of each size: pinned each way, pageable up, and on the device itself."""
    found = []
    for size in LINK_BYTES:
        near, other = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
        pinned, plain = (
            torch.empty(size, dtype=torch.uint8, pin_memory=True),
            torch.ones(size, dtype=torch.uint8),
        )
        ways = {
            "h2d": (near, pinned, True),
            "d2h": (pinned, near, True),
            "h2d_pageable": (near, plain, False),
            "d2d": (other, near, True),
        }
        for way, (target, source, free) in ways.items():
            took = seconds(partial(_copy, target, source, free))
            found.append({"way": way, "bytes": size, "bytes_per_s": size / took})
    return found


def _copy(target: Tensor, source: Tensor, free: bool, number: int) -> None:  # noqa: ARG001
    """One copy, blocking or not."""
    target.copy_(source, non_blocking=free)


def examine_device(shapes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The CUDA device, its link, and the draft's products on it; or why there is none.

    Args:
        shapes: (N, K) of the weights to try products with.
    """
    facts = gpu_facts()
    if facts is None:
        return {"device": None, "why_none": why_no_gpu()}
    found: dict[str, Any] = {"device": str(facts), **asdict(facts), "usable": facts.usable}
    if facts.usable:
        tried = [Shape(n, k, 1) for n, k in shapes]
        dtype = torch.bfloat16 if facts.bf16 else torch.float16
        found["link"] = link_speeds()
        found["draft_product"] = choose_on(torch.device("cuda", 0), tried, dtype, tiles_kept=False).describe()
    return found
