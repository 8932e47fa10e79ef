"""The configuration file, validated before anything runs.

`Config` is the whole file, and `Config.settings(pair, row)` merges defaults < pair < row into one `Settings`. Which of
them a stage reads is in `correctnet.pipeline.specs`, so that a change elsewhere reruns nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from correctnet.devices.configuration import DeviceSettings
from correctnet.errors import UserError
from correctnet.files.yamlfile import read_values
from correctnet.networks import NETWORKS
from correctnet.pipeline.specs import STAGES, Stage, lineage
from correctnet.pipeline.workload import training_images
from correctnet.sections import Section, exact, merge, suggest, unprintable, validate
from correctnet.settings import SEARCHING, Network, Settings, Training, layered

# Names are parts of paths and commands.
PAIR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
ROW_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,99}")
# Rules of the workflow; no run can have their names.
RULES = ("all", "fetch", "pretrain", "suppress", "inject", "distil", "moments", "sidepath", "sweep", "sensitivity")
RULES += ("search_state", "search", "compensate", "finetune", "evaluate", "gather", "collect", "table1", "figure")
RULES += ("overheads", "explore", "provenance")
# The run of `snakemake` without a target.
DEFAULT_RUN = "paper"


def _expanded(path: str) -> str:
    """A folder of the configuration with `~` expanded. Raises ValueError for one that no command can be given."""
    expanded = os.path.expanduser(path)
    if not path.strip():
        raise ValueError("a folder is expected")
    if expanded.startswith("~"):
        raise ValueError("there is no such user; write ./~ for a folder of that name")
    if unprintable(path) or "\n" in path or "\t" in path:
        raise ValueError("a path without control characters is expected")
    return expanded


class Row(Section):
    """One row of Table I: whose weights are evaluated, under which changed settings."""

    evaluate: Literal[tuple(name for name, stage in STAGES.items() if stage.makes_model)]
    """the stage whose model is evaluated"""
    label: str
    """how tables and figures name the row"""
    curve: bool = False
    """whether it is also evaluated at `evaluate.sigmas`, for Figures 2 and 7"""
    set: dict[str, Any] = Field(default_factory=dict)
    """settings that differ for this row, in the sections of the defaults"""

    @field_validator("label")
    @classmethod
    def _label(cls, value: str) -> str:
        if unprintable(value):
            raise ValueError("printable characters are expected")
        return value


class Config(Section):
    """config.yaml."""

    data_dir: str = "data"
    """where the data sets lie or are downloaded to (the environment's CORRECTNET_DATA comes first)"""
    results: str = "results"
    """where everything is written"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where tensors are computed"""
    runs: dict[str, tuple[str, ...]]
    """the pairs of each target: `snakemake` runs `paper`, which must be there, `snakemake NAME` the others"""
    rows: dict[str, Row]
    """the rows of Table I"""
    defaults: dict[str, Any] = Field(default_factory=dict)
    """settings of every pair"""
    pairs: dict[str, dict[str, Any]]
    """network-data pairs: settings that differ from the defaults; `like`, another pair, whose settings they are merged
    over and whose rows the pair has unless it names its own; and `rows`: those that are evaluated, as a list, or as a
    mapping from rows to settings that differ for the row in this pair"""

    _merged: dict[tuple[str, str | None], Settings] = PrivateAttr(default_factory=dict)

    @field_validator("data_dir", "results")
    @classmethod
    def _folders(cls, value: str, info: ValidationInfo) -> str:
        value = _expanded(value)
        if info.field_name == "results":
            value = os.path.normpath(value)
            # Wildcards and path variables of Snakemake, and what a command would take for an option.
            if value.startswith("-") or set(value) & set("{}<>"):
                raise ValueError("a path without '{', '}', '<' and '>' that does not begin with '-' is expected")
        return value

    @model_validator(mode="before")
    @classmethod
    def _as_mappings(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and isinstance(values.get("pairs"), Mapping):
            pairs = {name: {} if pair is None else pair for name, pair in values["pairs"].items()}
            values = {**values, "pairs": pairs}
        return values

    @classmethod
    def load(cls, *paths: str | Path) -> Config:
        """Read and check files, each merged over those before it, as Snakemake does with `--configfile`.

        Raises UserError with one line for each mistake.
        """
        values: dict[str, Any] = {}
        for path in paths:
            values = merge(values, _mapping(read_values(path), str(path)))
        return cls.check(values, " + ".join(map(str, paths)))

    @classmethod
    def check(cls, values: Any, source: str = "config.yaml") -> Config:
        """Check the values of a file, every pair and row."""
        config = validate(cls, _mapping(values, source), source)
        mistakes = list(config._mistakes(source))
        if mistakes:
            raise UserError("\n".join(dict.fromkeys(mistakes)))
        return config

    def _mistakes(self, source: str) -> Iterator[str]:
        yield from self._mistaken_names(source)
        for run, pairs in self.runs.items():
            if not pairs:
                yield f"{source}: runs.{run}: one pair or more is expected"
            yield from (f"{source}: runs.{run}: {pair!r} is listed twice" for pair in _repeated(pairs))
            for pair in pairs:
                if pair not in self.pairs:
                    yield f"{source}: runs.{run}: no pair {pair!r}{suggest(pair, self.pairs)}"
        if not self.rows:
            yield f"{source}: rows: one row or more is expected"
        layers = [("defaults", self.defaults), *((f"rows.{one_word(n)}.set", r.set) for n, r in self.rows.items())]
        for name, pair in ((one_word(name), pair) for name, pair in self.pairs.items()):
            layers.append((f"pairs.{name}", _without_rows(pair)))
            if isinstance(pair.get("rows"), Mapping):
                layers += [
                    (f"pairs.{name}.rows.{row}", {} if own is None else own) for row, own in pair["rows"].items()
                ]
        wrong = not self.rows
        for place, values in layers:
            try:
                validate(Settings, values, source, prefix=place)
            except UserError as error:
                wrong = True
                yield str(error)
        for pair in self.pairs:
            if mistake := self._mistaken_like(pair):
                wrong = True
                yield f"{source}: pairs.{pair}.like: {mistake}"
            if found := list(self._mistaken_rows(pair)):
                wrong = True
                yield from (f"{source}: pairs.{pair}.rows: {mistake}" for mistake in found)
        for pair in () if wrong else self.pairs:
            if self.rows[self.rows_of(pair)[0]].evaluate != "pretrain":
                yield f"{source}: pairs.{pair}.rows: the first row must evaluate the original network (pretrain)"
            for row in self.rows_of(pair):
                try:
                    settings = self.settings(pair, row)
                except UserError as error:  # layers that do not go together, or files that cannot be used
                    yield f"{source}: pairs.{pair}: {str(error).removeprefix(f'pair {pair}: ')}"
                    break
                yield from (
                    f"{source}: pairs.{pair}.rows: {text}" for text in self._not_comparable(pair, row, settings)
                )
                if settings.evaluate.recalibrate != "none" and not _has_batchnorm(settings.network):
                    yield f"{source}: pairs.{pair}.rows: {row!r} recalibrates BatchNorm, which the network has not"
                if settings.adapt.passes and (mistake := adapt_mistake(settings)):
                    yield f"{source}: pairs.{pair}.rows: {row!r} {mistake}"
                stages = lineage(settings, self.rows[row].evaluate)
                yield from (
                    f"{source}: pairs.{pair}.rows: {row!r}: {text}"
                    for text in map(functools.partial(lone_image, settings), stages)
                    if text
                )
                searches = "search" in stages
                if settings.evaluate.recalibrate == "chip" and searches and settings.search.strategy in SEARCHING:
                    yield (
                        f"{source}: pairs.{pair}.rows: {row!r} recalibrates BatchNorm on each chip, which the search "
                        "does not; give it search.strategy greedy or all"
                    )
                if mistake := network_mistake(settings):
                    yield f"{source}: pairs.{pair}: {mistake}"

    def _mistaken_names(self, source: str) -> Iterator[str]:
        """Names that paths, commands or the workflow cannot have."""
        expected = "a name of at most 100 letters, digits, '-', '_' and '.' is expected, a letter, digit or '_' first"
        for kind, names, taken, reason in (
            ("runs", self.runs, RULES, "is a rule of the workflow"),
            ("pairs", self.pairs, ("summary",), "is the folder of tables and figures"),
        ):
            for name in names:
                if not PAIR_NAME.fullmatch(name):
                    yield f"{source}: {kind}.{one_word(name)}: {expected}"
                elif name in taken:
                    yield f"{source}: {kind}.{name}: {name} {reason}; another name is expected"
        for row in self.rows:
            if not ROW_NAME.fullmatch(row):
                yield (
                    f"{source}: rows.{one_word(row)}: a name of lower-case letters, digits, '-' and '.' is expected, "
                    "a letter or digit first, at most 100"
                )
        if DEFAULT_RUN not in self.runs:
            yield f"{source}: runs.{DEFAULT_RUN}: missing; `snakemake` without a target runs its pairs"

    def _mistaken_like(self, pair: str) -> str | None:
        """The mistake in the `like` of a pair, if any."""
        like = self.pairs[pair].get("like")
        if like is None:
            return None
        if not isinstance(like, str):
            return f"the name of a pair is expected, not {like!r}"
        if like not in self.pairs:
            return f"no pair {like!r}{suggest(like, self.pairs)}"
        if self.pairs[like].get("like") is not None:
            return f"{like!r} is itself like another pair; name that one"
        return None

    def _mistaken_rows(self, pair: str) -> Iterator[str]:
        """Mistakes in the `rows` of a pair."""
        rows = self.pairs[pair].get("rows")
        if rows is None:
            return
        if not isinstance(rows, list | tuple | Mapping):
            yield "a list of rows, or a mapping from rows to settings is expected"
            return
        if not rows:
            yield "one row or more is expected; without the key, it is all rows"
        for row in rows:
            if not isinstance(row, str):
                yield f"the name of a row is expected, not {row!r}"
            elif row not in self.rows:
                yield f"no row {row!r}{suggest(row, self.rows)}"
        yield from (f"{row!r} is listed twice" for row in _repeated(row for row in rows if isinstance(row, str)))

    def _not_comparable(self, pair: str, row: str, settings: Settings) -> Iterator[str]:
        """Settings that all rows of a table share and in which a row differs from the first one of its pair."""
        first = self.rows_of(pair)[0]
        own = self.settings(pair, first)
        for key, mine, other in (
            ("seed", settings.seed, own.seed),
            (f"data.{settings.data.kind}", settings.data.place, own.data.place),
            ("evaluate.split", settings.evaluate.split, own.evaluate.split),
        ):
            if mine != other:
                yield f"{row!r} has {key} {mine} and {first!r} {other}, which are no rows of one table; make it a pair"
        # A row is evaluated at the level of its pair, which is one of the pair's device.
        mine, other = (getattr(s.tested, "device", "none") for s in (settings, self.settings(pair)))
        if mine != other:
            yield f"{row!r} has variation.device {mine} and the pair {other}; a table is of one device; make it a pair"

    def rows_of(self, pair: str) -> tuple[str, ...]:
        """The rows of a pair: its own list, else that of the pair it is like, else all."""
        return tuple(self._merged_pair(pair).get("rows") or self.rows)

    def _merged_pair(self, pair: str) -> dict[str, Any]:
        """The values of a pair, merged over those of the pair that it is like; its own rows, if it has any."""
        own = self.pairs[pair]
        if own.get("like") is None:
            return own
        parent = self.pairs[own["like"]]
        return {**layered(parent, own), "rows": own.get("rows") or parent.get("rows")}

    def pretrains(self, pair: str) -> str:
        """The pair that trains the original network of a pair: of one under a device, the pair that it is like.

        It does where both pairs have the same settings of `pretrain`, none of which is the device's. So it does for a
        pair that is evaluated under another variation than it is trained for.
        """
        like, own = self.pairs[pair].get("like"), self.settings(pair)
        if like is None or not (isinstance(own.variation, DeviceSettings) or own.evaluate.variation):
            return pair
        canonical = STAGES["pretrain"].canonical
        return like if canonical(own) == canonical(self.settings(like)) else pair

    def level_of(self, run: str) -> float | None:
        """The level of a run's table, sigma or the multiple of a device's deviations; None: each pair has its own.

        Pairs under the lognormal and pairs under devices are one table, each at its level.

        Raises:
            UserError: pairs under one kind of variation differ in it. That matters for this table only: each pair can
                be run by itself.
        """
        levels: dict[str, set[float]] = {}
        for pair in self.runs[run]:
            variation = self.settings(pair).tested
            levels.setdefault(variation.level_key, set()).add(variation.level)
        for key, found in levels.items():
            if len(found) > 1:
                listed = ", ".join(map(exact, sorted(found)))
                raise UserError(f"runs.{run}: its pairs are one table, but their variation.{key} differ ({listed})")
        whole = set.union(*levels.values())
        return whole.pop() if len(whole) == 1 else None

    def settings(self, pair: str, row: str | None = None) -> Settings:
        """The settings of a pair, or of one of its rows."""
        if (pair, row) not in self._merged:  # the workflow needs them for every job
            self._merged[pair, row] = self._settings(pair, row)
        return self._merged[pair, row]

    def _settings(self, pair: str, row: str | None) -> Settings:
        own = self._merged_pair(pair)
        layers = [self.defaults, _without_rows(own)]
        if row:
            rows = own.get("rows")
            layers += [self.rows[row].set, (rows.get(row) or {}) if isinstance(rows, Mapping) else {}]
        merged: dict[str, Any] = {}
        for layer in layers:
            merged = layered(merged, layer)
        return validate(Settings, merged, f"pair {pair}").identified()

    def variant(self, pair: str, row: str, stage: Stage) -> str:
        """Suffix of the folder of a row's stage: '' for the pair's own, else '@' and the settings that differ.

        Rows that agree in all settings that a stage and the stages before it read share one run of it. The folder's
        name depends on nothing else, so that other rows can be added and removed.
        """
        own, changed = self.settings(pair), self.settings(pair, row)
        stages = lineage(changed, stage)

        def read(settings: Settings) -> dict[str, Any]:
            leaves = dict(leaf for s in stages for leaf in _leaves(STAGES[s].values(settings)))
            if "compensate" in stages:  # it uses the best of the searches within these limits
                leaves["search.limits"] = list(settings.search.limits)
            return leaves

        before, after = read(own), read(changed)
        # Digests are of files that the other settings name: a file that changes makes no other folder.
        differing = {
            key: value
            for key, value in after.items()
            if not key.endswith(".digest") and (key not in before or value != before[key])
        }
        if lineage(own, stage) != stages:
            differing = {"base": changed.base, **differing}
        if not differing:
            return ""
        name = "+".join(f"{key}-{_plain(value)}" for key, value in differing.items())
        plain = re.sub(r"[^A-Za-z0-9._+-]", "_", name)
        if len(name) > LONGEST or plain != name:
            plain = f"{plain[:LONGEST]}+{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        return f"@{plain}"


def _mapping(values: Any, source: str) -> Mapping[str, Any]:
    """The values of a file, which must be a mapping."""
    if not isinstance(values, Mapping):
        raise UserError(f"{source}: a mapping of settings is expected")
    return values


def _without_rows(pair: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a pair."""
    return {key: value for key, value in pair.items() if key not in ("rows", "like")}


def _repeated(names: Iterable[str]) -> list[str]:
    """The names that occur more than once."""
    return [name for name, count in Counter(list(names)).items() if count > 1]


# Characters of a folder's name for the settings that differ; file systems allow 255 in all.
LONGEST = 120


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> str:
    """A setting's value in characters that file names and the workflow's wildcards allow."""
    return "_".join(map(_plain, value)) if isinstance(value, list) else json.dumps(value).strip('"')


def network_mistake(settings: Settings) -> str | None:
    """The setting that does not fit the network or the data set, once all settings are merged; None if all do."""
    network, facts = settings.network, settings.data.facts()
    if facts is not None and not 0 < round(settings.data.validation * facts.train) < facts.train:
        fraction = exact(settings.data.validation)
        return f"data.validation: {fraction} of the {facts.train} training images leaves one part empty"
    if network.name is not None:
        if network.options:
            return f"network.options: those of a factory, and {network.name} is none"
        architecture = NETWORKS[network.name]
        if network.widths and len(network.widths) != len(architecture.widths):
            count = len(architecture.widths)
            return f"network.widths: {count} are expected for {network.name}: {architecture.layers}"
        if facts is not None and (facts.height, facts.width) != (32, 32) and not architecture.any_size:
            return (
                f"network.name: {network.name} takes images of 32 x 32 pixels only, and those of {settings.data.name} "
                f"are {facts.height} x {facts.width}"
            )
    return sizes_mistake(settings, "pretrain", network.name) or sizes_mistake(settings, "suppress", network.name)


def sizes_mistake(settings: Settings, stage: Literal["pretrain", "suppress"], network: str | None) -> str | None:
    """A message where the smaller images of a training do not fit the network or the images, else None.

    `network` is a key of `correctnet.networks.NETWORKS`; None: the user's own, which is tried where it is made.
    """
    sizes, facts = getattr(settings, stage).sizes, settings.data.facts()
    if not sizes:
        return None
    if network is not None and not NETWORKS[network].any_size:
        return f"{stage}.sizes: {network} takes images of 32 x 32 pixels only"
    if facts is not None and facts.height != facts.width:
        return f"{stage}.sizes: square images are expected, and those of {settings.data.name} are not"
    if facts is not None and max(sizes) > facts.height:
        return f"{stage}.sizes: sides between 1 and {facts.height} pixels are expected, not {max(sizes)}"
    return None


def adapt_mistake(settings: Settings) -> str | None:
    """A message where a chip is to be trained and has no weights of the kind that is trained, else None."""
    if settings.adapt.weights == "protected" and not settings.protect.fraction:
        return "trains protected weights (adapt), and protects none"
    if settings.adapt.weights == "digital" and not (settings.digital.front or settings.digital.layers):
        return "trains digital layers (adapt), and none is digital"
    return None


def lone_image(settings: Settings, stage: Stage) -> str | None:
    """A message where a stage normalises with each batch and the last batch of an epoch is one image, else None."""
    training = getattr(settings, stage, None)
    if not isinstance(training, Training) or not training.epochs or not _has_batchnorm(settings.network):
        return None
    if settings.network.name is None or settings.data.facts() is None:
        return None  # not known before the network is made, or the images are read
    if stage == "pretrain" and settings.network.weights is not None:
        return None
    if getattr(training, "batchnorm", "updated") != "updated":
        return None
    images, _ = training_images(settings)
    if training.batch > 1 and images % training.batch != 1:
        return None
    return (
        f"{stage}.batch: of {images} images, batches of {training.batch} leave one alone, which BatchNorm cannot take"
    )


def _has_batchnorm(network: Network) -> bool:
    """Whether the network has, or, if it is the user's own, may have BatchNorm."""
    return network.name is None or (NETWORKS[network.name].batchnorm and network.batchnorm != "none")


def one_word(name: str) -> str:
    """A name of the configuration for a message, quoted unless it is one printable word."""
    return name if name.isprintable() and name and " " not in name else repr(name)
