"""The head process of the workflow: what it does around the jobs that Snakemake runs.

Before them it tells stages where they run (`environment`) and prints the estimate of a full run; while they run it
shows the progress that their logs hold (`Progress`); at the end it prints Table I and where everything is (`summary`).
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import yaml

from correctnet.errors import UserError
from correctnet.files import storage
from correctnet.pipeline.config import Config
from correctnet.pipeline.layout import Layout
from correctnet.progress import FIRST, MOST, PREFIX
from correctnet.sections import exact

# Seconds without news after which a job does not count as running: a line comes once a minute, or with a slow step.
SILENT = 15 * 60.0


def environment(config: Config, command: str, variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Environment variables that tell every stage where it runs.

    They change no result, so they are no params of a job. Raises UserError where this locale cannot encode the folder
    of results.
    """
    try:
        os.fsencode(config.results)
    except UnicodeEncodeError:
        raise UserError(
            f"results: {config.results!a} has letters that this locale's encoding, {sys.getfilesystemencoding()}, has "
            "not; set PYTHONUTF8=1, or another name"
        ) from None
    return {
        "CORRECTNET_DATA": variables.get("CORRECTNET_DATA") or os.path.abspath(config.data_dir),  # empty is not set
        "CORRECTNET_DEVICE": config.device,
        "CORRECTNET_RESULTS": config.results,
        # Stages end when this process does: if it is killed, they do not go on without it.
        "CORRECTNET_HEAD": str(os.getpid()),
        # For the page of provenance. A job that another Snakemake started keeps what that one says.
        "CORRECTNET_COMMAND": variables.get("CORRECTNET_COMMAND", command),
    }


def write_configuration(layout: Layout, run: str, values: Mapping[str, Any]) -> None:
    """Write the merged configuration, all files and `--config` of the command line together, to a run's folder."""
    folder = Path(layout.summary(run))
    folder.mkdir(parents=True, exist_ok=True)
    plain = json.loads(json.dumps(values))  # Snakemake's own types of mappings as dicts
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)
    storage.write_text(folder / "config.yaml", f"# The configuration of the run {run}, merged.\n{text}")


def print_estimate(run: str, cores: int, values: Mapping[str, Any]) -> None:
    """Print how long a run may take, measured in a process of its own."""
    command = [sys.executable, "-m", "correctnet.pipeline.estimate", "--run", run, "--cores", str(cores)]
    subprocess.run(command, input=json.dumps(values), text=True, check=True)


def summary(layout: Layout, runs: Iterable[str], configfiles: Iterable[str] = ()) -> str:
    """Table I of each run, and where its figures, pages and report are, as text.

    `configfiles` are those of the command line, without which the runs of an experiment are not known.
    """
    parts, options = [], "".join(f" --configfile {shlex.quote(str(file))}" for file in configfiles)
    for run in runs:
        folder = Path(layout.summary(run))
        pages = [name for name in ("search.html", "provenance.html") if (folder / name).exists()]
        figures = ", ".join(layout.figures(run))
        target = "" if run not in layout.target_runs() else f" {run}"
        table = terminal_table((folder / "table1.md").read_text(encoding="utf-8"))
        parts.append(
            f"{run}, Table I{_at(layout, run)}:\n\n{table}\n\n"
            f"Table:    {folder}/table1.md (all columns), table1.csv, table1.html (beside the paper's values)\n"
            f"Figures:  {folder}/figure-NAME.png and .svg (NAME: {figures})\n"
            f"Pages:    {folder}/ ({', '.join(pages)})\n"
            f"Report:   snakemake --report report.html{target}{options}"
        )
    return "\n\n".join(parts)


def _at(layout: Layout, run: str) -> str:
    """The level of a run's table as text: sigma of the lognormal, or the level of devices; empty where pairs differ."""
    level = layout.config.level_of(run)
    key = layout.config.settings(layout.config.runs[run][0]).tested.level_key
    return "" if level is None else f" at {key} = {exact(level)}"


# What a terminal has room for.
COLUMNS = ("pair", "row", "clean", "mean ± std", "ratio", "overhead", "paper")


def terminal_table(markdown: str) -> str:
    """A Markdown table as text with aligned columns: those of `COLUMNS` that are not empty."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    header, rule, *rows = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines)
    columns = [
        [name, *cells]
        for name, cells in zip(header, zip(*rows, strict=True), strict=True)
        if name in COLUMNS and any(cells)
    ]
    right = {name for name, align in zip(header, rule, strict=True) if align.endswith(":")}
    aligned = []
    for name, *cells in columns:
        width = max(map(len, [name, *cells]))
        aligned.append([f"{cell:{'>' if name in right else '<'}{width}}" for cell in (name, "-" * width, *cells)])
    return "\n".join("  ".join(row).rstrip() for row in zip(*aligned, strict=True))


def running(results: str | Path) -> Iterator[tuple[str, str, float]]:
    """(job, its latest line of progress, when it was written) of each job that runs, from the logs under `results`.

    A job's log ends with a line of progress only while it runs, or after it was killed without notice: one that has
    been silent for 15 minutes is left out.
    """
    folder = Path(results, ".logs")
    for path in sorted(folder.rglob("*.log")):
        try:
            written = path.stat().st_mtime
            if time.time() - written > SILENT:
                continue
            line = _last_line(path)
        except OSError:  # Snakemake has just removed it
            continue
        if line.startswith(PREFIX):
            job = path.relative_to(folder).with_suffix("")
            # A loop that is named as its job, e.g. one/pretrain, needs no name.
            yield str(job), line.removeprefix(PREFIX).removeprefix(f"{job.name}: "), written


def _last_line(path: Path, most: int = 4096) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - most))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return lines[-1] if lines else ""


class Progress:
    """Prints each new line of progress of the running jobs, from a thread of its own, while a process lives.

    Args:
        results: folder of the results.
        out: where it prints.
        every: seconds between two looks at the logs, at first; a long run is looked at once a minute.
    """

    def __init__(self, results: str | Path, out: TextIO | None = None, every: float = FIRST):
        self.results, self.every = results, every
        self._out, self._shown = out, {job: written for job, _, written in running(results)}

    def start(self) -> None:
        """Begin to print."""
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        began = time.monotonic()
        while True:
            time.sleep(max(self.every, min(MOST, (time.monotonic() - began) / 20)))
            self.show()

    def show(self) -> None:
        """Print what is new since the last time."""
        lines = []
        for job, line, written in running(self.results):
            if self._shown.get(job) != written:
                self._shown[job] = written
                lines.append(f"    {job}: {line}\n")
        if lines:
            out = self._out or sys.stderr
            out.write("".join(lines))
            out.flush()
