"""How chip samples are simulated: one object that evaluation, sweep, search and sensitivity analysis pass on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from correctnet.engine.engine import MEMORY, Method, check_method
from correctnet.errors import UserError, whole
from correctnet.noise import core
from correctnet.precision import Precision, say_once


@dataclass(frozen=True)
class Simulation:
    """How a range of chip samples is simulated.

    Attributes:
        start: number of the first chip sample, in [0, 2^32).
        engine: "auto": the C++ core, with torch for what the core cannot run, or torch alone where a network is in
            several pieces and that is faster; "torch": torch alone.
        precision: of weights and activations in the core, "float32" or "bfloat16" (sums are float32). On CPUs without
            instructions for bfloat16, where float32 is faster, it is float32.
        gpu_method: where noisy weights are generated on a GPU, see `correctnet.engine.engine`; without effect on a CPU.
        memory: bytes that the core may use, approximately, >= 1.
        progress: show progress bars.

    Raises:
        UserError: a value outside these ranges.
    """

    start: int = 0
    engine: Literal["auto", "torch"] = "auto"
    precision: Precision = "float32"
    gpu_method: Method = "auto"
    memory: int = MEMORY
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("start", "memory"):
            object.__setattr__(self, name, whole(getattr(self, name), f"evaluate: {name}"))
        if not 0 <= self.start < 2**32:
            raise UserError(f"evaluate: chips lie in [0, 2^32); start is {self.start}")
        if self.memory < 1:
            raise UserError(f"evaluate: memory must be at least 1 byte, not {self.memory}")
        if self.engine not in ("auto", "torch"):
            raise UserError(f"evaluate: engine must be 'auto' or 'torch', not {self.engine!r}")
        check_method(self.gpu_method)

    def on(self, device: torch.device) -> Simulation:
        """What is done on a device: in float32, with a note, where a CPU has no instructions for bfloat16."""
        if self.precision == "float32" or device.type != "cpu" or core.multiplies_bfloat16():
            return self
        say_once("note: this CPU has no instructions for bfloat16; chips are evaluated in float32 instead")
        return replace(self, precision="float32")
