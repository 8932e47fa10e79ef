"""The commands that make tables, figures and pages of the results of stages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from correctnet.cli.options import PATH, check_printable, name_values
from correctnet.errors import UserError, one_line
from correctnet.files import storage
from correctnet.files.yamlfile import json_values


def _levels(texts: tuple[str, ...]) -> dict[str, float]:
    """Levels of pairs from --level."""
    levels = {}
    for pair, level in name_values("--level", texts).items():
        try:
            levels[pair] = float(level)
        except ValueError:
            levels[pair] = math.nan
        if not math.isfinite(levels[pair]):
            raise UserError(f"--level {pair}={level}: a number is expected")
    return levels


level_option = click.option(
    "--level", multiple=True, metavar="PAIR=LEVEL", help="Instead of --sigma, the level of a pair; may be repeated."
)


def _labels(texts: tuple[str, ...], given: str | None) -> dict[str, str]:
    """Labels of rows from --label and --labels."""
    labels: Any = {}
    if given is not None:
        try:
            labels = json_values(given)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--labels: not JSON ({one_line(error)})") from error
        if not isinstance(labels, dict) or not all(isinstance(label, str) for label in labels.values()):
            raise UserError("--labels: a JSON object from rows to labels is expected")
        for label in labels.values():
            check_printable("--labels", label)
    return labels | name_values("--label", texts)


@click.command("merge")
@click.argument("files", type=PATH, nargs=-1, required=True)
@click.option("--out", type=PATH, required=True, help="CSV file to write.")
def merge_chunks(files: tuple[Path, ...], out: Path) -> None:
    """Concatenate the CSV files of the chunks of one evaluation, in the order of the chips."""
    from correctnet.evaluation.results import Result, missing_chip

    storage.check_writable(out)
    storage.check_distinct([out], files)
    merged = Result.concatenate(Result.from_csv(path) for path in files)
    chips = merged.table["sample"]
    if (missing := missing_chip(chips)) is not None:
        raise UserError(f"merge: chip {missing} is missing; the chunks have chips {chips.min()} to {chips.max()}")
    merged.to_csv(out)


@click.command()
@click.argument("files", type=PATH, nargs=-1, required=True)
@click.option("--out", type=PATH, required=True, help="CSV file to write.")
def collect(files: tuple[Path, ...], out: Path) -> None:
    """Concatenate the CSV files of several evaluations (rows, sigmas)."""
    from correctnet.report import tables

    storage.check_writable(out)
    storage.check_distinct([out], files)
    samples = tables.read_samples(files)
    storage.write_csv(out, samples.drop(columns="level") if "sigma" in samples else samples)


@click.command()
@click.argument("samples", type=PATH, nargs=-1, required=True)
@click.option(
    "--sigma",
    type=float,
    default=0.5,
    show_default=True,
    help="The sigma of the table, or the level of its devices.",
)
@level_option
@click.option("--label", multiple=True, metavar="ROW=LABEL", help="Label of a row; may be repeated.")
@click.option("--labels", metavar="JSON", help="Labels of rows, as a JSON object.")
@click.option("--out", type=PATH, required=True, help="CSV file to write, with .md and .html beside it.")
def table(
    samples: tuple[Path, ...],
    sigma: float,
    level: tuple[str, ...],
    label: tuple[str, ...],
    labels: str | None,
    out: Path,
) -> None:
    """Make Table I of the paper from per-chip results."""
    from correctnet.report import pages, tables

    csv, markdown, page = _beside(out, ".csv", ".md", ".html")
    storage.check_distinct([csv, markdown, page], samples)
    rows = tables.table1(tables.read_samples(samples), sigma, _labels(label, labels), _levels(level))
    text = tables.markdown(rows, sigma)
    storage.write_csv(csv, rows)
    storage.write_text(markdown, text)
    storage.write_text(page, pages.table1(rows, sigma))
    click.echo(text, err=True)


def _beside(out: Path, *suffixes: str) -> list[Path]:
    """The files, one for each suffix, that a command writes for one --out.

    `out` itself is the file of its own suffix, or of the first where it has none of them; see `storage.beside` for the
    names of the others. Raises UserError where one cannot be written.
    """
    paths = [storage.beside(out, suffix, suffixes) for suffix in suffixes]
    if out.suffix.lower() not in suffixes:
        paths[0] = out
    else:
        paths[suffixes.index(out.suffix.lower())] = out
    for path in paths:
        storage.check_writable(path)
    return paths


@click.command()
@click.argument("name", type=click.Choice(["2", "7", "8", "9", "10", "rows", "yield", "sensitivity", "time"]))
@click.argument("files", type=PATH, nargs=-1, required=True)
@click.option(
    "--label", multiple=True, metavar="ROW=LABEL", help="Label of a row in 8, `rows` and `time`; may be repeated."
)
@click.option("--labels", metavar="JSON", help="Labels of rows in 8, `rows` and `time`, as a JSON object.")
@click.option("--only", multiple=True, metavar="ROW", help="Show only this row in 8 and `rows`; may be repeated.")
@click.option(
    "--sigma",
    type=float,
    help="The sigma, or level, of Table I (7, 8, rows, yield, time); else the largest that all rows have.",
)
@level_option
@click.option("--out", type=PATH, required=True, help="PNG file to write, with an SVG beside it.")
def figure(
    name: str,
    files: tuple[Path, ...],
    label: tuple[str, ...],
    labels: str | None,
    only: tuple[str, ...],
    sigma: float | None,
    level: tuple[str, ...],
    out: Path,
) -> None:
    """Draw a figure: 2, 7 to 10 of the paper, all rows, the yield over accuracy, each layer's sensitivity, or
    the accuracy over the time after programming.

    FILES are per-chip results (2, 7, 8, rows, yield, time), accuracy.csv of `sweep` (9), log.csv of `search` (10), or
    the files of `sensitivity`; the title of a panel is the name of the folder of its pair. The points of 8 are written
    as CSV, too.
    """
    import matplotlib

    matplotlib.use("Agg")  # no window, no display
    from correctnet.report import figures

    figures.draw(name, files, out, _labels(label, labels), only, sigma, _levels(level))


@click.command()
@click.argument("logs", type=PATH, nargs=-1, required=True)
@click.option("--out", type=PATH, required=True, help="HTML file to write.")
def explore(logs: tuple[Path, ...], out: Path) -> None:
    """Make an interactive scatter plot, in one HTML file, of the states that searches explored (their log.csv)."""
    from correctnet.report import pages

    storage.check_writable(out)
    storage.check_distinct([out], logs)
    storage.write_text(out, pages.search_scatter(logs))


@click.command("provenance")
@click.argument("run")
@click.option(
    "--results",
    type=PATH,
    envvar="CORRECTNET_RESULTS",
    default=Path("results"),
    help="Folder of all results.  [CORRECTNET_RESULTS, else: results]",
)
@click.option("--pair", "pairs", multiple=True, required=True, help="A pair of the run; may be repeated.")
@click.option("--seed", "seeds", multiple=True, help="A seed of the run; may be repeated.")
@click.option(
    "--command", envvar="CORRECTNET_COMMAND", help="The command of the run.  [CORRECTNET_COMMAND, else this command]"
)
@click.option(
    "--jobs",
    metavar="JSON",
    help="The jobs of the run: folders as objects, jobs in a folder as a list.  [default: all jobs of the pairs]",
)
@click.option("--out", type=PATH, required=True, help="CSV file to write, one row per job, with .html beside it.")
def provenance_page(
    run: str,
    results: Path,
    pairs: tuple[str, ...],
    seeds: tuple[str, ...],
    command: str | None,
    jobs: str | None,
    out: Path,
) -> None:
    """List command, revision, versions, machine, time and memory of each job of a RUN."""
    from correctnet.pipeline import provenance
    from correctnet.report import pages

    csv, page = _beside(out, ".csv", ".html")
    names = None if jobs is None else provenance.unfold(jobs)
    table, here = provenance.jobs(results, list(pairs), names), provenance.here()
    storage.write_csv(csv, table)
    here |= {"command": command} if command else {}
    storage.write_text(page, pages.provenance(run, here, table, seeds))
