"""The machine at hand: the CPUs that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def set_threads(threads: int) -> None:
    """Use `threads` threads within and between operations, never more than the CPUs this process may use."""
    threads = max(1, min(threads, available_cpus()))
    torch.set_num_threads(threads)
    if torch.get_num_interop_threads() != 1:
        torch.set_num_interop_threads(1)  # nothing here runs two operations at once


def available_cpus() -> int:
    """The CPUs that this process may use: its affinity, and its control group's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            cpus = min(cpus, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no control group limits this process
    return cpus
