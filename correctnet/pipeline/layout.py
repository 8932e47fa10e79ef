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

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from correctnet.errors import UserError
from correctnet.pipeline.config import DEFAULT_RUN
from correctnet.pipeline.jobs import Jobs
from correctnet.pipeline.specs import Stage, is_rival
from correctnet.sections import exact
from correctnet.settings import Settings

FIGURES = {
    "2": "Figure 2: unprotected, over σ",
    "7": "Figure 7: CorrectNet, over σ",
    "8": "Figure 8: accuracy over overhead",
    "9": "Figure 9: candidate layers",
    "10": "Figure 10: the search",
    "rows": "All rows",
    "yield": "Yield",
    "sensitivity": "Sensitivity of each layer",
    "time": "Accuracy over time after programming",
}
# The stages whose networks `sensitivity` compares.
COMPARED: tuple[Stage, ...] = ("pretrain", "suppress", "compensate")


class Layout(Jobs):
    """The jobs and files of a configuration; see `Jobs` for those of the stages."""

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

    # --- table and figures

    def table_level(self, wildcards: Any) -> str:
        """The level of Table I as options: sigma, or that of devices, or one for each pair.

        Raises UserError where the pairs of the run differ in it and are one table.
        """
        level = self.config.level_of(wildcards.run)
        if level is not None:
            return f"--sigma {exact(level)}"
        pairs = self.config.runs[wildcards.run]
        return " ".join(f"--level {pair}={exact(self.config.settings(pair).tested.level)}" for pair in pairs)

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
        compared = ["8"] if self.compared_pairs(run) else []
        of_method = ["7", "9", "10", "sensitivity"] if self.pairs_with(run, "correctnet") else []
        return [*first, "rows", "yield", *of_method, *compared, *(["time"] if self._over_time(run) else [])]

    def _over_time(self, run: str) -> bool:
        """Whether a network of a run is evaluated at several times after programming."""
        times: dict[tuple[str, str], set[str | None]] = {}
        for pair in self.config.runs[run]:
            for row in self.config.rows_of(pair):
                tested = self.config.settings(pair, row).tested
                model = self.folder(pair, row, self.config.rows[row].evaluate)
                times.setdefault((pair, model), set()).add(getattr(tested, "time", None))
        return any(len(found - {None}) > 1 for found in times.values())

    def compared_pairs(self, run: str) -> list[str]:
        """The pairs of a run that Figure 8 shows: those with CorrectNet and a baseline that Figure 8 is about."""
        return [
            pair
            for pair in self.pairs_with(run, "correctnet")
            if any(
                is_rival(self.config.settings(pair, row), *self.stages_of(pair, row))
                for row in self.config.rows_of(pair)
            )
        ]

    @staticmethod
    def figure_label(wildcards: Any) -> dict[str, str]:
        """The labels of a figure in the report."""
        return {"figure": FIGURES[wildcards.name], "run": wildcards.run}

    def figure_inputs(self, wildcards: Any) -> list[str]:
        """The files that a figure is drawn from."""
        run = wildcards.run
        match wildcards.name:
            case "8":
                return [f"{self.results}/{pair}/samples.csv" for pair in self.compared_pairs(run)]
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
        level = self.table_level(wildcards) if wildcards.name in ("7", "8", "rows", "yield", "time") else ""
        labelled = wildcards.name in ("8", "rows", "time")
        return f"{level} --labels {shlex.quote(self.labels(wildcards))}" if labelled else level

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
            "name": "|".join(name for name in FIGURES if name != "8"),  # which has a rule of its own
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
