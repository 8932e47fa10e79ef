"""Checkpoints of a training: model, optimizer, epoch and log in one safetensors file."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from correctnet.errors import UserError
from correctnet.files import storage


@dataclass
class Checkpoint:
    """The file from which a training is resumed.

    Args:
        path: of the file.
        identity: any text that identifies the training (its settings, its inputs). A file with another identity is a
            remnant of an earlier version of the run, and is not used.
    """

    path: Path
    identity: str
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        self.fingerprint = hashlib.sha256(self.identity.encode()).hexdigest()

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, log: list[dict[str, Any]]) -> None:
        """Write the state after `epoch` epochs, atomically."""
        tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
        storage.write_tensors(self.path, tensors, {"fingerprint": self.fingerprint, "epoch": epoch, "log": log})

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, list[dict[str, Any]]]:
        """Restore the state: (finished epochs, their log), or (0, []) if there is nothing to resume."""
        if not self.path.exists():
            return 0, []
        try:
            tensors, metadata = storage.read_tensors(self.path)
            found = metadata["fingerprint"], metadata["epoch"], metadata["log"]
        except (UserError, KeyError, TypeError) as error:
            # Starting over costs time only, and the next checkpoint replaces this one.
            tqdm.write(f"warning: {self.path}: not a usable checkpoint; training starts from its beginning ({error})")
            return 0, []
        if found[0] != self.fingerprint:
            return 0, []
        model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, i, key = name.split(".", 2)
                state.setdefault(int(i), {})[key] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        for parameter, restored in optimizer.state.items():
            for key, value in restored.items():
                if value.shape == parameter.shape:  # in the parameter's memory order, as in an uninterrupted run
                    restored[key] = torch.empty_like(parameter).copy_(value)
        return found[1], found[2]

    def discard(self) -> None:
        """Delete the file, and its folder if that is empty then, once the training's result is saved."""
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()
