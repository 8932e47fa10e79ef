"""Runtime of a stage: where and how it runs, and its resume checkpoints."""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from correctnet.crossbar.calibration import add_converters
from correctnet.crossbar.converters import Converters
from correctnet.crossbar.layers import analog_layers, analog_names
from correctnet.datasets import loading
from correctnet.datasets.base import DataSet, Split
from correctnet.engine.engine import MEMORY
from correctnet.errors import UserError
from correctnet.evaluation.simulation import Simulation
from correctnet.files import storage
from correctnet.methods.front import digital_share, front_layers
from correctnet.pipeline.specs import STAGES, Stage
from correctnet.settings import Data, Settings


@dataclass(frozen=True)
class Runtime:
    """Where and how a stage runs; it does not change what the stage computes."""

    data_dir: str | None = None
    device: str = "cpu"
    quiet: bool = False
    work: Path | None = None
    """folder of resume checkpoints; None: none are kept"""
    memory: int = MEMORY
    """bytes that Monte Carlo may use beside the data, approximately"""

    def load(self, settings: Settings, description: dict[str, Any] | None = None, source: Path | str = "") -> DataSet:
        """Load the data set of a stage's settings onto the device, split as for the model at `source`, if any.

        The images are split with the seed that the model was trained with: a different seed in the settings applies to
        chips and batches alone. Raises UserError where the settings name another data set than the model's, or hold out
        another fraction.
        """
        seed = split_seed(settings, description, source)
        if seed != settings.seed:
            warnings.warn(
                f"seed {settings.seed} is that of chips and batches; the images are split with seed {seed}, as they "
                f"were for {source}",
                stacklevel=2,
            )
        data = settings.data
        if data.kind == "dataset":
            return loading.load(data.place, self.data_dir, data.validation, seed).to(self.device)
        return loading.load_own(data.kind, data.place, data.digest, data.validation, seed).to(self.device)

    def simulation(self, settings: Settings, start: int, progress: bool = True) -> Simulation:
        """The simulation of a stage's chips, the first of which is number `start`."""
        own = settings.montecarlo
        progress = progress and not self.quiet
        return Simulation(start, "auto", own.precision, own.gpu_method, self.memory, progress)


def digital_layers(settings: Settings, network: nn.Module, images: Split) -> tuple[str, ...]:
    """Names of the layers that the settings make digital; `images` show which ones the network runs first.

    Raises UserError for more layers than the network has, or a name that it has not.
    """
    names = front_layers(network, images, settings.digital.front)
    names += tuple(name for name in settings.digital.layers if name not in names)
    digital_share(network, names)  # refuses unknown names
    return names


def give_converters(
    settings: Settings, analog: nn.Module, images: Split, saved: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """Give a converted network the converters of the settings, and return what is saved with the model; None: none.

    The ranges are those saved with a model that was trained with the same converters in the same layers, else those of
    the first of `images`, of the training set.
    """
    own = settings.converters
    described = own.model_dump(mode="json")
    if not (converters := Converters(own.dac_bits, own.adc_bits, own.quantile)):
        return None
    names = analog_names(analog)
    ranges = None
    if saved is not None and {k: v for k, v in saved.items() if k != "ranges"} == described:
        ranges = {name: tuple(limits) for name, limits in saved["ranges"].items()}
        if set(ranges) != {names[id(layer)] for layer in analog_layers(analog)}:  # the layers of another conversion
            ranges = None
    seen = images.take(own.images).images if ranges is None else None
    return {**described, "ranges": add_converters(analog, converters, seen, ranges)}


def split_seed(settings: Settings, description: dict[str, Any] | None, source: Path | str) -> int:
    """The seed of the split into training and validation images: that of the model, if there is one.

    Raises UserError where the settings name other images than those that the model was trained on.
    """
    made = storage.training_data(description or {})
    data = settings.data
    trained_on = next((made[key] for key in Data.sources if made.get(key) is not None), data.place)
    # Own data is known by its digest, wherever it lies now.
    same = made["digest"] == data.digest if made.get("digest") and data.digest else trained_on == data.place
    if not same:
        option = "--data-factory" if data.kind == "factory" else f"--{data.kind}"
        changed = ", which has changed since" if trained_on == data.place else ""
        raise UserError(f"{option} {data.place}: {source} was trained on {trained_on}{changed}")
    if made.get("validation", settings.data.validation) != settings.data.validation:
        raise UserError(
            f"--validation {settings.data.validation}: {source} was trained with {made['validation']} of the training "
            "images held out"
        )
    return made.get("seed", settings.seed)


def stage_identity(stage: Stage, settings: Settings, description: dict[str, Any], *inputs: Path | str) -> str:
    """Everything that a stage's result depends on, as text: settings, network, images, their split, input files."""
    base = json.dumps([description.get("network"), storage.training_data(description)], sort_keys=True)
    known = loading.digest(settings.data.place) if settings.data.kind == "dataset" else str(settings.data.digest)
    return "\n".join(
        [stage, STAGES[stage].canonical(settings), base, known, *(storage.sha256(path) for path in inputs)]
    )


def resumable(folder: Path, name: str, identity: str) -> Path:
    """Path of the CSV file of a stage's finished work, a separate one for each `identity` of settings and inputs."""
    return folder / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.csv"


def discard(path: Path) -> None:
    """Delete the checkpoint of a finished stage, and its folder if it is then empty."""
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the folder is not empty
        path.parent.rmdir()
