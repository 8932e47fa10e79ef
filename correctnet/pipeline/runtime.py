"""Where and how a stage runs, and what it keeps to resume from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from correctnet.datasets import loading
from correctnet.datasets.base import DataSet
from correctnet.engine.engine import MEMORY
from correctnet.errors import UserError
from correctnet.evaluation.simulation import Simulation
from correctnet.files import storage
from correctnet.pipeline.specs import STAGES, Stage
from correctnet.settings import Settings


@dataclass(frozen=True)
class Runtime:
    """Where and how a stage runs; none of it changes what the stage is asked for."""

    data_dir: str | None = None
    device: str = "cpu"
    quiet: bool = False
    work: Path | None = None
    """folder for what a killed stage needs to go on; None: it begins anew"""
    memory: int = MEMORY
    """bytes that Monte Carlo may take beside the data, about"""

    def load(self, settings: Settings, description: dict[str, Any] | None = None, source: Path | str = "") -> DataSet:
        """The data set that a stage's settings name, on the device; that of the model at `source`, if it is described.

        The model's images are split as they were for it: another seed of the settings is that of chips and batches
        alone. Raises UserError where the settings name another data set than the model's, or hold out another fraction.
        """
        seed = split_seed(settings, description, source)
        if seed != settings.seed:
            warnings.warn(
                f"seed {settings.seed} is that of chips and batches; the images are split with seed {seed}, as they "
                f"were for {source}",
                stacklevel=2,
            )
        return loading.load(settings.data.dataset, self.data_dir, settings.data.validation, seed).to(self.device)

    def simulation(self, settings: Settings, start: int, progress: bool = True) -> Simulation:
        """How a stage simulates its chips, the first of which is `start`."""
        own = settings.montecarlo
        progress = progress and not self.quiet
        return Simulation(start, "auto", own.precision, own.gpu_method, self.memory, progress)


def split_seed(settings: Settings, description: dict[str, Any] | None, source: Path | str) -> int:
    """The seed of the split into training and validation images: that of the model, if there is one.

    Raises UserError where the settings name other images than those that the model was trained on.
    """
    made = storage.training_data(description or {})
    if made.get("dataset", settings.data.dataset) != settings.data.dataset:
        raise UserError(f"--dataset {settings.data.dataset}: {source} was trained on {made['dataset']}")
    if made.get("validation", settings.data.validation) != settings.data.validation:
        raise UserError(
            f"--validation {settings.data.validation}: {source} was trained with {made['validation']} of the training "
            "images held out"
        )
    return made.get("seed", settings.seed)


def stage_identity(stage: Stage, settings: Settings, description: dict[str, Any], *inputs: Path | str) -> str:
    """What a stage was asked for, as text: settings, network, images and their split, input files."""
    base = json.dumps([description.get("network"), storage.training_data(description)], sort_keys=True)
    known = loading.digest(settings.data.dataset)
    return "\n".join(
        [stage, STAGES[stage].canonical(settings), base, known, *(storage.sha256(path) for path in inputs)]
    )


def resumable(folder: Path, name: str, identity: str) -> Path:
    """The CSV in which a stage notes what is done: one of its own for each `identity` of settings and inputs."""
    return folder / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.csv"


def discard(path: Path) -> None:
    """Remove what a finished stage no longer needs to go on, and its folder where that is empty then."""
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the folder holds something else
        path.parent.rmdir()
