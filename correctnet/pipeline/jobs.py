"""Paths, inputs and parameters of the jobs of the stages: the part of a layout that knows no runs.

Its methods are those of `correctnet.pipeline.layout.Layout`, which describes them. Nothing here imports Snakemake or
torch.
"""

from __future__ import annotations

import functools
import os
import shlex
from collections.abc import Callable
from typing import Any

from correctnet.devices.configuration import DeviceSettings
from correctnet.errors import UserError
from correctnet.pipeline import resources
from correctnet.pipeline.config import Config
from correctnet.pipeline.specs import MODEL, STAGES, Stage, lineage
from correctnet.sections import exact
from correctnet.settings import SEARCHING, Settings, search_rounds


class Jobs:
    """The jobs of the stages of a configuration, and their files.

    Args:
        config: the checked configuration.
    """

    def __init__(self, config: Config):
        self.config = config
        self.results = config.results
        self.gpus = int(config.device == "cuda")

    # --- rows, their stages and settings

    def stages_of(self, pair: str, row: str) -> list[Stage]:
        """The stages before a row's evaluation, and for `correctnet` also those that figures show."""
        settings = self.config.settings(pair, row)
        shown: tuple[Stage, ...] = ("suppress", "compensate") if row == "correctnet" else ()
        stages = (self.config.rows[row].evaluate, *shown)
        return list(dict.fromkeys(before for stage in stages for before in lineage(settings, stage)))

    @functools.cache  # noqa: B019 - a layout lives as long as its process
    def rows_by_variant(self, pair: str) -> dict[str, dict[Stage | None, str]]:
        """{variant: {stage: a row that has the stage in this variant}}, the latest stage first."""
        found: dict[str, dict[Stage | None, str]] = {}
        for stage in reversed(STAGES):
            for row in self.config.rows_of(pair):
                if stage in self.stages_of(pair, row):
                    found.setdefault(self.config.variant(pair, row, stage), {}).setdefault(stage, row)
        return found

    def row_of(self, wildcards: Any, stage: Stage | None = None) -> str | None:
        """The row whose settings make a job's files; None: the pair's own settings.

        Where several rows share a variant and `stage` is not given, the row that has it at the latest stage: all
        earlier stages differ in what the variant's name says. Raises UserError where no row has the variant.
        """
        if hasattr(wildcards, "model"):
            return "correctnet"
        if hasattr(wildcards, "row"):
            return wildcards.row
        if not wildcards.variant:
            return None
        rows = self.rows_by_variant(wildcards.pair).get(wildcards.variant)
        if rows is None:
            raise UserError(f"pair {wildcards.pair}: no row has a stage that differs in {wildcards.variant[1:]}")
        return rows.get(stage) or next(iter(rows.values()))

    def settings_of(self, wildcards: Any, stage: Stage | None = None) -> Settings:
        """All settings of the row (or pair) that a job is for."""
        return self.config.settings(wildcards.pair, self.row_of(wildcards, stage))

    def canonical(self, stage: Stage) -> Callable[[Any], str]:
        """A params function: exactly the settings that `stage` reads, as one canonical string."""
        return lambda wildcards: STAGES[stage].canonical(self.settings_of(wildcards, stage))

    # --- files of a stage

    def folder(self, pair: str, row: str | None, stage: Stage) -> str:
        """The folder of a stage of a row; of pairs that share an original network, that of the pair which trains it."""
        variant = self.config.variant(pair, row, stage) if row else ""
        shared = stage == "pretrain" and not variant
        return f"{self.results}/{self.config.pretrains(pair) if shared else pair}/{stage}{variant}"

    def output(self, path: str) -> str:
        """The pattern of a file of a pair, e.g. `sweep{variant}/accuracy.csv`."""
        return f"{self.results}/{{pair}}/{path}"

    def model(self, stage: Stage) -> dict[str, str]:
        """The patterns of the files of a stage that trains a network."""
        keys = ("model", "description", "epochs")
        return {k: self.output(f"{stage}{{variant}}/{name}") for k, name in zip(keys, MODEL, strict=True)}

    def log(self, job: str) -> str:
        """The pattern of a job's log, e.g. of `{pair}/sweep{variant}`."""
        return f"{self.results}/.logs/{job}.log"

    def benchmark(self, job: str) -> str:
        """The pattern of the file with a job's time and memory."""
        return f"{self.results}/.benchmarks/{job}.tsv"

    def result(self, stage: Stage, name: str = "model.safetensors") -> Callable[[Any], str]:
        """An input function: a file of another stage of the same row."""
        return lambda wildcards: f"{self.folder(wildcards.pair, self.row_of(wildcards), stage)}/{name}"

    def base_model(self, wildcards: Any) -> str:
        """The model that a row sweeps, searches and compensates."""
        return self.result(self.settings_of(wildcards).base)(wildcards)

    def evaluated_model(self, wildcards: Any) -> str:
        """The model that a row of Table I evaluates."""
        return self.result(self.config.rows[wildcards.row].evaluate)(wildcards)

    def compared_model(self, wildcards: Any) -> str:
        """The model whose layers `sensitivity` varies one by one."""
        return self.result(wildcards.model)(wildcards)

    def dataset_ready(self, wildcards: Any) -> list[str]:
        """The file that says that a job's data set is there; none for data of one's own.

        The digest of that is one of the settings, so that a changed picture reruns what has seen it.
        """
        data = self.settings_of(wildcards).data
        return [f"{self.results}/.data/{data.place}.ready"] if data.kind == "dataset" else []

    def measurements(self, wildcards: Any) -> list[str]:
        """The file of measurements that a job's device is made of; none for the lognormal and for published devices.

        As with data of one's own, its digest is one of the settings: a changed file reruns what has used it.
        """
        settings = self.settings_of(wildcards)
        variation = settings.tested if hasattr(wildcards, "sigma") else settings.variation
        path = variation.path if isinstance(variation, DeviceSettings) else None
        return [] if path is None or float(getattr(wildcards, "sigma", 1)) == 0 else [str(path)]

    # --- resources

    def threads(self, wildcards: Any) -> int:
        """Threads of a job that trains or simulates a whole network."""
        return resources.training_threads(self.settings_of(wildcards))

    def resources(self, stage: Stage, state: bool = False) -> dict[str, Any]:
        """Memory (MiB), time (minutes) and GPUs of a job; `state`: of one state of a search alone."""

        def mem_mb(wildcards: Any, attempt: int) -> int:
            return resources.memory_mib(self.settings_of(wildcards), attempt, cuda=bool(self.gpus))

        def runtime(wildcards: Any, attempt: int) -> int:
            chips = int(wildcards.stop) - int(wildcards.start) if stage == "evaluate" else None
            return resources.minutes(stage, self.settings_of(wildcards), attempt, chips=chips, state=state)

        return {"mem_mb": mem_mb, "runtime": runtime, "gpu": self.gpus}

    # --- commands

    @staticmethod
    def command(stage: Stage) -> Callable[[Any, Any], str]:
        """A params function: a stage and its named input files as options, e.g. `sweep --base results/.../model...`.

        A job of the search has its limit, and one that trains a single state the number of the state. The data set
        goes through the environment, and a file of measurements is one of the settings.
        """

        def command(wildcards: Any, input: Any) -> str:
            parts = [stage]
            for name, files in input.items():
                each = [files] if isinstance(files, str) else files
                parts += [f"--{name} {shlex.quote(str(file))}" for file in each if name not in ("data", "device")]
            parts += [f"--{name} {getattr(wildcards, name)}" for name in ("limit", "state") if hasattr(wildcards, name)]
            return " ".join(parts)

        return command

    @staticmethod
    def output_folder(wildcards: Any, output: Any) -> str:
        """The folder of a job's results."""
        return os.path.dirname(output[0])

    @staticmethod
    def output_file(wildcards: Any, output: Any) -> str:
        """The only file that a job writes."""
        return str(output[0])

    # --- the search

    @staticmethod
    def limits(settings: Settings) -> tuple[float, ...]:
        """The overhead limits that are searched.

        `strategy: all` compensates everything: its only limit is 1. `greedy` uses the largest.
        """
        search = settings.search
        return {"all": (1.0,), "greedy": (max(search.limits),)}.get(search.strategy, search.limits)

    def found_states(self, wildcards: Any) -> list[str]:
        """The best state within each limit, of the searches of a row."""
        folder = self.folder(wildcards.pair, self.row_of(wildcards), "search")
        return [f"{folder}/limit-{exact(limit)}/best.json" for limit in self.limits(self.settings_of(wildcards))]

    @staticmethod
    def rounds(settings: Settings) -> list[int]:
        """The number of states in each round of a search whose states are jobs; empty where one job trains them all.

        Round 0 is the state without compensation.
        """
        search = settings.search
        spread = search.population and search.strategy in SEARCHING
        return [1, *[search.population] * search_rounds(search)] if spread else []

    def _states(self, wildcards: Any, sizes: list[int]) -> list[str]:
        folder = f"{self.folder(wildcards.pair, self.row_of(wildcards), 'search')}/limit-{wildcards.limit}"
        return [f"{folder}/round-{r}/state-{k}.json" for r, size in enumerate(sizes) for k in range(size)]

    def earlier_states(self, wildcards: Any) -> list[str]:
        """The states of all rounds before a state's own, from which its round follows."""
        search, before = self.settings_of(wildcards).search, int(wildcards.round)
        return self._states(wildcards, [1, *[search.population] * (before - 1)] if before else [])

    def all_states(self, wildcards: Any) -> list[str]:
        """All states of a search that are jobs of their own."""
        return self._states(wildcards, self.rounds(self.settings_of(wildcards)))

    def search_logs(self, run: str) -> list[str]:
        """The logs of the searches of each pair's row `correctnet`."""
        return [
            f"{self.folder(pair, 'correctnet', 'search')}/limit-{exact(limit)}/log.csv"
            for pair in self.pairs_with(run, "correctnet")
            for limit in self.limits(self.config.settings(pair, "correctnet"))
        ]

    # --- the evaluation over chips

    def pairs_with(self, run: str, row: str) -> list[str]:
        """The pairs of a run that have a row; figures of the row leave the other pairs out."""
        return [pair for pair in self.config.runs[run] if row in self.config.rows_of(pair)]

    def sigmas(self, pair: str, row: str) -> dict[float, int]:
        """{level: chips} at which a row is evaluated: clean, the pair's own level, and those of the curves.

        The level is sigma, or the multiple of a measured device's deviations.
        """
        settings, own = self.config.settings(pair, row), self.config.settings(pair).tested.level
        chips = {0.0: 1}
        if self.config.rows[row].curve:
            chips |= dict.fromkeys(settings.evaluate.sigmas, settings.evaluate.curve_chips)
        return chips | {own: settings.evaluate.chips if own else 1}

    def chunk_settings(self, wildcards: Any) -> str:
        """The settings of `evaluate` at a job's level, as a canonical string."""
        settings = self.settings_of(wildcards)
        sigma, own = float(wildcards.sigma), self.config.settings(wildcards.pair).tested.level
        changed: dict[str, Any] = {"variation": settings.tested.at(sigma)}
        if sigma not in (0.0, own) and settings.evaluate.curve_images:
            images = {"images": settings.evaluate.curve_images}
            changed["evaluate"] = settings.evaluate.model_copy(update=images)
        return STAGES["evaluate"].canonical(settings.model_copy(update=changed))

    @staticmethod
    def chunk_chips(wildcards: Any) -> int:
        """The number of chips of a chunk."""
        return int(wildcards.stop) - int(wildcards.start)

    def prefixes(self, wildcards: Any) -> str:
        """Options for the clean accuracy on the first images, for rows that are evaluated on fewer of them.

        Table I divides each row's accuracy by the clean accuracy of the original network on the same images.
        """
        rows = self.config.rows_of(wildcards.pair)
        if float(wildcards.sigma) or wildcards.row != ("unprotected" if "unprotected" in rows else rows[0]):
            return ""
        own = self.settings_of(wildcards).evaluate.images
        counts = {self.config.settings(wildcards.pair, row).evaluate.images for row in rows} - {None, own}
        return " ".join(f"--prefix {count}" for count in sorted(counts) if own is None or count < own)

    def chunks(self, wildcards: Any) -> list[str]:
        """The chunks of a Monte Carlo evaluation, named by their first chip and the one after their last.

        Raises UserError where the row is not evaluated at this sigma.
        """
        at = {exact(sigma): chips for sigma, chips in self.sigmas(wildcards.pair, wildcards.row).items()}
        if wildcards.sigma not in at:
            raise UserError(
                f"pair {wildcards.pair}: row {wildcards.row} is not evaluated at sigma {wildcards.sigma} "
                f"({', '.join(at)})"
            )
        folder = self._evaluation(wildcards.pair, wildcards.row, wildcards.sigma)
        names = self.chunk_names(self.settings_of(wildcards), at[wildcards.sigma])
        return [f"{folder}/{name}.csv" for name in names]

    @staticmethod
    def chunk_names(settings: Settings, chips: int) -> list[str]:
        """The names of the chunks of `chips` chips; one where the first of them say how many are enough."""
        size = settings.evaluate.chunk if settings.evaluate.until is None else chips
        return [f"chips-{start}-{min(start + size, chips)}" for start in range(0, chips, size)]

    def _evaluation(self, pair: str, row: str, sigma: str) -> str:
        return f"{self.results}/{pair}/evaluate/{row}/sigma-{sigma}"

    def evaluations(self, wildcards: Any) -> list[str]:
        """The evaluations of all rows of a pair."""
        pair = wildcards.pair
        return [
            f"{self._evaluation(pair, row, exact(sigma))}.csv"
            for row in self.config.rows_of(pair)
            for sigma in self.sigmas(pair, row)
        ]

    def samples(self, run: str, row: str | None = None) -> list[str]:
        """Per-chip accuracies of the pairs of a run, or of those that have a row."""
        pairs = self.config.runs[run] if row is None else self.pairs_with(run, row)
        return [f"{self.results}/{pair}/samples.csv" for pair in pairs]
