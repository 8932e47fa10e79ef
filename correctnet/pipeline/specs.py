"""The stages: for each, in one place, what it reads, what it starts from, what it writes, and what it costs.

The command line, the workflow's params, its paths, and the estimates follow from `STAGES`. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from correctnet.errors import UserError, one_line
from correctnet.files.yamlfile import json_values
from correctnet.pipeline import workload
from correctnet.pipeline.workload import Costs
from correctnet.sections import Section, validate
from correctnet.settings import Compensate, Data, Search, Settings

Stage = Literal[
    "pretrain",
    "suppress",
    "inject",
    "distil",
    "moments",
    "sidepath",
    "sweep",
    "search",
    "compensate",
    "finetune",
    "evaluate",
    "sensitivity",
]
MODEL = ("model.safetensors", "model.json", "log.csv")


@dataclass(frozen=True)
class StageSpec:
    """What a stage is."""

    reads: tuple[str, ...]
    """the settings that it reads, whole sections or SECTION.SETTING: no other makes it run again"""
    after: tuple[str, ...]
    """the stages whose results it starts from; "base" is the one that the setting of that name names"""
    seconds: Callable[[Settings, Costs, int | None], float]
    """seconds of one thread that a job of it takes (all epochs; a search within one limit; so many chips)"""
    version: int = 3
    """raised when its code changes what it computes"""
    writes: tuple[str, ...] = MODEL
    """the files in its folder; none where its result is one file"""
    resumes: bool = False
    """whether it keeps what it has done when it is stopped; the others take minutes"""

    @property
    def makes_model(self) -> bool:
        """Whether its result is a model that can be evaluated."""
        return self.writes == MODEL

    def read(self, settings: Settings) -> Settings:
        """The settings that the stage reads, and nothing else: reading another one is an AttributeError."""
        cut = _empty(settings)
        for key in self.reads:
            *groups, leaf = key.split(".")
            source: Section = settings
            target: Section = cut
            for group in groups:
                source = getattr(source, group)
                target = target.__dict__.setdefault(group, _empty(source))
            target.__dict__[leaf] = getattr(source, leaf)
        return cut

    def values(self, settings: Settings) -> dict[str, Any]:
        """The settings that the stage reads, as nested values that JSON has."""
        everything, cut = settings.model_dump(mode="json"), {}
        for key in self.reads:
            *groups, leaf = key.split(".")
            source, target = everything, cut
            for group in groups:
                source, target = source[group], target.setdefault(group, {})
            if leaf in source:  # a source of data or networks that is not used has no value
                target[leaf] = source[leaf]
        return cut

    def canonical(self, settings: Settings) -> str:
        """`values` and the version as one JSON string with sorted keys: equal strings, equal results."""
        return json.dumps({"version": self.version, **self.values(settings)}, sort_keys=True)

    def parse(self, text: str, stage: str) -> Settings:
        """The inverse of `canonical`; settings that the stage does not read keep their defaults."""
        try:
            values = json_values(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--settings: not JSON ({one_line(error)})") from error
        if not isinstance(values, dict):
            raise UserError("--settings: a JSON object is expected")
        version = values.pop("version", self.version)
        if version != self.version:
            raise UserError(f"--settings: made for version {version} of the {stage} stage, this is {self.version}")
        return validate(Settings, values, "--settings")


def _empty(section: Section) -> Any:
    """A section of the same kind without any setting."""
    empty = type(section).model_construct()
    empty.__dict__.clear()
    return empty


IMAGES = (*(f"data.{key}" for key in (*Data.sources, "digest")), "data.validation")
STAGES: dict[Stage, StageSpec] = {
    "pretrain": StageSpec(
        reads=("seed", "data", "network", "pretrain"),
        after=(),
        version=4,
        seconds=lambda s, cost, _: workload.training(s, s.pretrain, cost),
        resumes=True,
    ),
    "suppress": StageSpec(
        reads=("seed", "data", "variation", "suppress"),
        after=("pretrain",),
        version=5,
        seconds=lambda s, cost, _: workload.training(s, s.suppress, cost),
        resumes=True,
    ),
    "inject": StageSpec(
        reads=("seed", "data", "variation", "converters", "digital", "inject"),
        after=("pretrain",),
        seconds=lambda s, cost, _: workload.training_with_variation(s, s.inject, cost),
        resumes=True,
    ),
    "distil": StageSpec(
        reads=("seed", "data", "variation", "converters", "digital", "distil"),
        after=("pretrain",),
        version=1,
        seconds=lambda s, cost, _: workload.distil(s, cost),
        resumes=True,
    ),
    "moments": StageSpec(
        reads=("seed", "data", "variation", "digital", "moments"),
        after=("pretrain",),
        version=1,
        seconds=lambda s, cost, _: workload.moments(s, cost),
        resumes=True,
    ),
    "sidepath": StageSpec(
        reads=("seed", "data", "variation", "converters", "digital", "sidepath"),
        after=("base",),
        version=1,
        seconds=lambda s, cost, _: workload.sidepath(s, cost),
        resumes=True,
    ),
    "sweep": StageSpec(
        reads=("seed", *IMAGES, "variation", "converters", "digital", "montecarlo", "sweep"),
        after=("pretrain", "base"),
        writes=("accuracy.csv", "candidates.json"),
        seconds=lambda s, cost, _: workload.layer_by_layer(s, s.sweep.chips, s.sweep.images, cost),
    ),
    "search": StageSpec(
        reads=(
            "seed",
            "data",
            "variation",
            "converters",
            "digital",
            *(f"compensate.{k}" for k in Compensate.model_fields if k != "epochs"),  # its own are search.train_epochs
            "montecarlo",
            *(f"search.{k}" for k in Search.model_fields if k != "limits"),
        ),
        after=("sweep",),
        version=5,
        writes=("best.json", "log.csv"),
        seconds=lambda s, cost, _: workload.search(s, cost),
        resumes=True,
    ),
    "compensate": StageSpec(
        reads=("seed", "data", "variation", "converters", "digital", "compensate"),
        after=("search",),
        seconds=lambda s, cost, _: workload.compensate(s, cost),
        resumes=True,
    ),
    "finetune": StageSpec(
        reads=("seed", "data", "variation", "converters", "digital", "finetune"),
        after=("compensate",),
        seconds=lambda s, cost, _: workload.training_with_variation(s, s.finetune, cost),
        resumes=True,
    ),
    "evaluate": StageSpec(
        reads=(
            "seed",
            *IMAGES,
            "variation",
            "converters",
            "digital",
            "protect",
            "adapt",
            "calibrate",
            "mapping",
            "montecarlo",
            "evaluate.split",
            "evaluate.images",
            "evaluate.recalibrate",
            "evaluate.recalibrate_images",
            "evaluate.until",
        ),
        after=(),
        writes=(),
        seconds=lambda s, cost, chips: workload.evaluate(s, chips or s.evaluate.chips, cost),
        resumes=True,
    ),
    "sensitivity": StageSpec(
        reads=("seed", *IMAGES, "variation", "converters", "digital", "montecarlo", "sensitivity"),
        after=(),
        writes=(),
        seconds=lambda s, cost, _: workload.layer_by_layer(s, s.sensitivity.chips, s.sensitivity.images, cost),
    ),
}


def lineage(settings: Settings, stage: str) -> tuple[Stage, ...]:
    """The stages that the result of `stage` depends on, in order, itself the last."""
    before = (settings.base if earlier == "base" else earlier for earlier in STAGES[stage].after)
    return tuple(dict.fromkeys([*(s for earlier in before for s in lineage(settings, earlier)), stage]))


def is_rival(settings: Settings, *stages: Stage) -> bool:
    """Whether a row with these stages is what Figure 8 compares with CorrectNet.

    It trains with variation, has digital weights or is mapped to each chip, and is not compensated.
    """
    digital = (
        settings.digital.front
        or settings.digital.layers
        or settings.protect.fraction
        or settings.calibrate.images
        or settings.adapt.passes
    )
    trained = {"inject", "distil", "moments", "sidepath"} & {*stages}
    return "compensate" not in stages and bool(digital or trained or settings.mapping.rows != "given")
