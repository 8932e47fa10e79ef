"""Folders of resumable work: each file's name holds a digest of all that its content depends on.

A call that is repeated with the same arguments and folder continues where it was stopped; with other arguments it finds
no file of its own, starts from the beginning, and leaves the other files alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from correctnet.datasets.batches import Data
from correctnet.datasets.inputs import as_pair, tensors_of
from correctnet.devices.base import Variation
from correctnet.errors import UserError
from correctnet.evaluation.montecarlo import state_digest
from correctnet.files import storage
from correctnet.metrics import Metric
from correctnet.sections import Section
from correctnet.training.checkpoint import Checkpoint

VERSION = 1
"""raised when code changes what any of the functions with a folder computes"""


def identity(stage: str, **parts: Any) -> str:
    """All that a result depends on, as text: networks, data and settings by name.

    Tensors are told apart by their content; a network by its modules, parameters and buffers; a loader by its kind,
    length and batch size alone, as reading it would cost an epoch and its augmentation differs each time; functions by
    name.
    """
    return json.dumps({"stage": stage, "version": VERSION, **{name: _text(part) for name, part in parts.items()}})


def judged_by(metric: Metric) -> dict[str, Metric]:
    """What a metric adds to the parts of `identity`: nothing for the accuracy."""
    return {} if metric.is_accuracy else {"metric": metric}


def _text(part: Any) -> Any:
    if part is None or isinstance(part, str | int | float | bool):
        return part
    if isinstance(part, nn.Module):
        return state_digest(part)
    if isinstance(part, Section):
        return part.model_dump(mode="json")
    if isinstance(part, Variation) or callable(getattr(part, "describe", None)):
        return [type(part).__qualname__, part.describe()]
    if isinstance(part, Data):
        return part.digest
    if (pair := as_pair(part)) is not None:
        return [f"{name}{_digest(tensor)}" for values in pair for name, tensor in tensors_of(values)]
    if isinstance(part, Mapping):
        return {str(key): _text(value) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return [_text(value) for value in part]
    if isinstance(part, Tensor):
        return _digest(part)
    if hasattr(part, "__iter__"):
        own = [type(part).__qualname__, _length(part), getattr(part, "batch_size", None)]
        data = getattr(part, "dataset", None)
        return own if data is None else [*own, type(data).__qualname__, _length(data)]
    return getattr(part, "__qualname__", type(part).__qualname__)


def _length(value: Any) -> int | None:
    try:
        return len(value)
    except (TypeError, NotImplementedError):
        return None


def _digest(tensor: Tensor) -> str:
    """A digest of a tensor's type, shape and values, in order."""
    found = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    if tensor.numel():
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def file(work: str | Path, stage: str, suffix: str, text: str) -> Path:
    """The path in `work` of a stage's file that belongs to the identity `text`.

    Raises UserError where `work` is no folder that can be written to.
    """
    if not isinstance(work, str | Path):
        raise UserError(f"{stage}: work is the path of a folder, not a {type(work).__name__}")
    storage.check_writable(work, "folder")
    return Path(work) / f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:16]}{suffix}"


def checkpoint(work: str | Path | None, stage: str, text: str) -> Checkpoint | None:
    """The checkpoint of a training in `work`; None without a folder. It is kept at the end, and so is its result."""
    return None if work is None else Checkpoint(file(work, stage, ".safetensors", text), text)
