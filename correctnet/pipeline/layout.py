"""Paths, inputs and parameters of every job of the workflow, computed from a configuration.

`Layout(config)` is what the rules in workflow/rules bind to. Its methods that have a parameter `wildcards` are input,
params or resource functions of Snakemake: `wildcards` is any object whose attributes are a job's wildcards. Methods
that take the name of a stage give the pattern of a path, or such a function. Nothing here imports Snakemake or torch.

    RESULTS/PAIR/STAGE[@VARIANT]/...               what a stage writes
    RESULTS/PAIR/evaluate/ROW/sigma-SIGMA.csv      accuracy of every chip of a row
    RESULTS/PAIR/samples.csv                       all rows of a pair
    RESULTS/summary/RUN/...                        Table I, figures and pages of a run
    RESULTS/.logs, .benchmarks, .data, PAIR/.resume
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from correctnet.devices.configuration import DeviceSettings
from correctnet.errors import UserError
from correctnet.pipeline import resources
from correctnet.pipeline.config import DEFAULT_RUN, Config
from correctnet.pipeline.specs import MODEL, STAGES, Stage, lineage
from correctnet.sections import exact
from correctnet.settings import SEARCHING, Settings, search_rounds

FIGURES = {
    "2": "Figure 2: unprotected, over σ",
    "7": "Figure 7: CorrectNet, over σ",
    "9": "Figure 9: candidate layers",
    "10": "Figure 10: the search",
    "rows": "All rows",
    "yield": "Yield",
    "sensitivity": "Sensitivity of each layer",
}
# The stages whose networks `sensitivity` compares.
COMPARED: tuple[Stage, ...] = ("pretrain", "suppress", "compensate")


class Layout:
    """The jobs and files of a configuration.

    Args:
        config: the checked configuration.
    """

    def __init__(self, config: Config):
        self.config = config
        self.results = config.results
        self.gpus = int(config.device == "cuda")

    # --- runs

    def target_runs(self) -> list[str]:
        """The runs that have a target of their own name; the default run's target is `all`."""
        return [run for run in self.config.runs if run != DEFAULT_RUN]

    def requested_runs(self, targets: Any) -> list[str]:
        """The runs among the targets of the command line; without a target, the default run."""
        asked = {DEFAULT_RUN if target == "all" else target for target in targets or ["all"]}
        return [run for run in self.config.runs if run in asked]

    def targets(self, run: str) -> list[str]:
        """The files that a run ends with: everything that people look at."""
        return [*self.shown(run), self.summary(run, "provenance.html")] if run in self.config.runs else []

    def shown(self, run: str) -> list[str]:
        """Table I, the figures and the page of the search of a run."""
        search = ["search.html"] if self.pairs_with(run, "correctnet") else []
        names = ["table1.md", *(f"figure-{name}.png" for name in self.figures(run)), *search]
        return [self.summary(run, name) for name in names]

    def summary(self, run: str, name: str | None = None) -> str:
        """The folder of a run's table and figures, or a file in it."""
        folder = f"{self.results}/summary/{run}"
        return folder if name is None else f"{folder}/{name}"

    def pairs_with(self, run: str, row: str) -> list[str]:
        """The pairs of a run that have a row; figures of the row leave the other pairs out."""
        return [pair for pair in self.config.runs[run] if row in self.config.rows_of(pair)]

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
        variation = self.settings_of(wildcards).variation
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

    def sigmas(self, pair: str, row: str) -> dict[float, int]:
        """{level: chips} at which a row is evaluated: clean, the pair's own level, and those of the curves.

        The level is sigma, or the multiple of a measured device's deviations.
        """
        settings, own = self.config.settings(pair, row), self.config.settings(pair).variation.level
        chips = {0.0: 1}
        if self.config.rows[row].curve:
            chips |= dict.fromkeys(settings.evaluate.sigmas, settings.evaluate.curve_chips)
        return chips | {own: settings.evaluate.chips if own else 1}

    def chunk_settings(self, wildcards: Any) -> str:
        """The settings of `evaluate` at a job's level, as a canonical string."""
        settings = self.settings_of(wildcards)
        sigma, own = float(wildcards.sigma), self.config.settings(wildcards.pair).variation.level
        changed: dict[str, Any] = {"variation": settings.variation.at(sigma)}
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

    # --- table and figures

    def table_level(self, wildcards: Any) -> str:
        """The level of Table I as options: sigma, or that of devices, or one for each pair.

        Raises UserError where the pairs of the run differ in it and are one table.
        """
        level = self.config.level_of(wildcards.run)
        if level is not None:
            return f"--sigma {exact(level)}"
        pairs = self.config.runs[wildcards.run]
        return " ".join(f"--level {pair}={exact(self.config.settings(pair).variation.level)}" for pair in pairs)

    def table_inputs(self, wildcards: Any) -> list[str]:
        """The files of Table I; raises UserError before any job runs where its pairs differ in sigma."""
        self.table_level(wildcards)
        return self.samples(wildcards.run)

    def labels(self, wildcards: Any) -> str:
        """The labels of the rows of a run in Table I, as JSON, which a shell passes on in any locale."""
        names = {row for pair in self.config.runs[wildcards.run] for row in self.config.rows_of(pair)}
        return json.dumps({name: row.label for name, row in self.config.rows.items() if name in names})

    def figures(self, run: str) -> list[str]:
        """The names of the figures of a run."""
        first = ["2"] if self.pairs_with(run, "unprotected") else []
        of_method = ["7", "9", "10", "sensitivity"] if self.pairs_with(run, "correctnet") else []
        return [*first, "rows", "yield", *of_method]

    @staticmethod
    def figure_label(wildcards: Any) -> dict[str, str]:
        """The labels of a figure in the report."""
        return {"figure": FIGURES[wildcards.name], "run": wildcards.run}

    def figure_inputs(self, wildcards: Any) -> list[str]:
        """The files that a figure is drawn from."""
        run = wildcards.run
        match wildcards.name:
            case "2":
                return self.samples(run, "unprotected")
            case "7":
                return self.samples(run, "correctnet")
            case "9":
                pairs = self.pairs_with(run, "correctnet")
                return [f"{self.folder(pair, 'correctnet', 'sweep')}/accuracy.csv" for pair in pairs]
            case "10":
                return self.search_logs(run)
            case "sensitivity":
                return self.sensitivities(run)
            case _:
                return self.samples(run)

    def figure_options(self, wildcards: Any) -> str:
        """Options of a figure: the level of Table I, and the labels of rows."""
        level = self.table_level(wildcards) if wildcards.name in ("7", "rows", "yield") else ""
        return f"{level} --labels {shlex.quote(self.labels(wildcards))}" if wildcards.name == "rows" else level

    def sensitivities(self, run: str) -> list[str]:
        """Accuracy lost to each layer, for the networks that lead to each pair's row `correctnet`."""
        pairs = self.pairs_with(run, "correctnet")
        return [f"{self.results}/{pair}/sensitivity/{stage}.csv" for pair in pairs for stage in COMPARED]

    # --- provenance

    def run_facts(self, wildcards: Any) -> str:
        """The pairs and seeds of a run, as options."""
        pairs = self.config.runs[wildcards.run]
        seeds = {self.config.settings(pair, row).seed for pair in pairs for row in self.config.rows_of(pair)}
        return " ".join([*(f"--pair {shlex.quote(pair)}" for pair in pairs), *(f"--seed {n}" for n in sorted(seeds))])

    def run_jobs(self, wildcards: Any) -> str:
        """The jobs of a run that have benchmark files, as `provenance.fold` writes them.

        Benchmark files of its pairs that are not among them are of earlier settings.
        """
        from correctnet.pipeline import provenance  # imports pandas, which no other job's process needs

        names: dict[str, None] = {}
        for pair in self.config.runs[wildcards.run]:
            for row in self.config.rows_of(pair):
                settings = self.config.settings(pair, row)
                for stage in self.stages_of(pair, row):
                    names |= dict.fromkeys(self._stage_jobs(settings, self.folder(pair, row, stage), stage))
                for sigma, chips in self.sigmas(pair, row).items():
                    folder = self._evaluation(pair, row, exact(sigma))
                    names |= dict.fromkeys(f"{folder}/{chunk}" for chunk in self.chunk_names(settings, chips))
        names |= dict.fromkeys(path.removesuffix(".csv") for path in self.sensitivities(wildcards.run))
        return provenance.fold(name.removeprefix(f"{self.results}/") for name in names)

    def _stage_jobs(self, settings: Settings, folder: str, stage: Stage) -> Iterator[str]:
        """The jobs that make the folder of a stage: one, or those of the search within each limit."""
        if stage != "search":
            yield folder
            return
        for limit in self.limits(settings):
            own = f"{folder}-{exact(limit)}"
            yield from (
                f"{own}/round-{r}-state-{k}" for r, size in enumerate(self.rounds(settings)) for k in range(size)
            )
            yield own

    # --- wildcards

    def constraints(self) -> dict[str, str]:
        """Regular expressions of the wildcards."""
        names = {"pair": self.config.pairs, "row": self.config.rows, "run": self.config.runs}
        return {
            **{key: "|".join(map(re.escape, known)) for key, known in names.items()},
            # '' for a pair's own stage, '@' and the settings that differ for that of a row (Config.variant)
            "variant": r"(@[A-Za-z0-9._+-]+)?",
            "model": "|".join(COMPARED),
            "name": "|".join(FIGURES),
            **dict.fromkeys(("limit", "sigma"), r"[0-9.e+-]+"),
            **dict.fromkeys(("round", "state", "start", "stop"), r"\d+"),
        }

    # --- the folder of results

    def check_place(self) -> None:
        """Raise UserError where the results were made under another name.

        Snakemake records under that name what they were made with: under another one, changed settings would go
        unnoticed.
        """
        try:
            before = Path(self.results, ".place").read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return
        if before != self.results:
            raise UserError(
                f"results: {self.results} holds what was made as {before!r}, and Snakemake's records go by that name; "
                f"say 'results: {before}' and put a link there: ln -s {os.path.abspath(self.results)} {before}"
            )

    def note_place(self) -> None:
        """Write down the name under which results are made."""
        os.makedirs(self.results, exist_ok=True)
        Path(self.results, ".place").write_text(f"{self.results}\n", encoding="utf-8")
