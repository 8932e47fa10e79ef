"""The GPU of the benchmarks: timing by CUDA events, and memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

from correctnet.engine.engine import MEMORY

DEVICE = "cuda"  # tests set "cpu", where all but CUDA graphs and timing can run


def seconds(call: Callable[[], object], at_least: float = 0.0) -> float:
    """Return the seconds a call between CUDA events, averaged over as many calls as fit into `at_least` seconds."""
    calls, total = 0, 0.0
    while calls == 0 or total < at_least:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        total += start.elapsed_time(end) / 1e3
        calls += 1
    return total / calls


def memory() -> int:
    """Return the bytes that an engine may take, half of the free memory: large enough for few, large launches."""
    return torch.cuda.mem_get_info()[0] // 2 if DEVICE == "cuda" else MEMORY
