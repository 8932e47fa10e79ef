"""The machine at hand: its processor, the CPUs that this process may use, and torch's threads."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path


def cpu_name() -> str:
    """Return the processor's model name as the operating system reports it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def available_cpus() -> int:
    """Return the number of CPUs that this process may use, by its affinity and its control group's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            cpus = min(cpus, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no control group limits this process
    return cpus


def set_threads(threads: int) -> None:
    """Let torch use `threads` threads within an operation, at most `available_cpus()`, and one operation at a time."""
    import torch

    torch.set_num_threads(max(1, min(threads, available_cpus())))
    if torch.get_num_interop_threads() != 1:
        torch.set_num_interop_threads(1)
