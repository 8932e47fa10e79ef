"""Figures 2, 7, 8, 9 and 10 of the paper, with its values where it states them; of rows, yield and sensitivity."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from correctnet.devices.programming import seconds
from correctnet.errors import UserError
from correctnet.evaluation.results import Result, check_accuracies
from correctnet.files import csvfile, storage
from correctnet.methods.search_log import best_state
from correctnet.metrics import ACCURACY, Metric
from correctnet.report import tables
from correctnet.report.overheads import figure8, overheads
from correctnet.report.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    RETRAINED,
    ROW_STYLE,
    SKY,
    STYLE,
    YELLOW,
    wrapped,
)

SEARCH_COLOURS = (BLUE, GREEN, PINK, ORANGE)  # by overhead limit
SENSITIVITY_STYLE = {
    "pretrain": (ORANGE, "original network"),
    "suppress": (GREEN, "Lipschitz regularisation alone"),
    "compensate": (BLUE, "CorrectNet"),
}


def draw(
    name: str,
    files: Sequence[Path],
    out: Path,
    labels: Mapping[str, str] | None = None,
    only: Sequence[str] = (),
    sigma: float | None = None,
    levels: Mapping[str, float] | None = None,
) -> None:
    """Draw a figure and write it as PNG and SVG, and what Figure 8 shows as CSV.

    Args:
        name: a key of FIGURES.
        files: result files that the figure shows.
        out: PNG or SVG; the other one is written next to it.
        labels, only: see `rows`; for the figures in LABELLED and ONLY.
        sigma: sigma, or level, of Table I, for the figures in AT_SIGMA.
        levels: instead of it, the level of a pair, by its name; for the same figures.

    Raises:
        UserError: an option does not apply to the figure, or a file cannot be read or written.
    """
    for option, value in (("--sigma", sigma), ("--level", levels or None)):
        if value is not None and name not in AT_SIGMA:
            raise UserError(f"{option}: figure {name} does not show one of several")
    for option, given, names in (("--label", labels, LABELLED), ("--only", only, ONLY)):
        if given and name not in names:
            raise UserError(f"{option}: figure {name} names no rows")
    if out.suffix.lower() in (".pdf", ".eps", ".ps", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"):
        raise UserError(f"--out {out}: a PNG and an SVG are written; end the name with .png")
    kinds = (".png", ".svg", *((".csv",) if name == "8" else ()))
    paths = {kind: storage.beside(out, kind, (".png", ".svg")) for kind in kinds}
    for path in paths.values():
        storage.check_writable(path)
    storage.check_distinct(paths.values(), files)
    with plt.rc_context(STYLE):
        at = {"sigma": sigma, "levels": levels} if name in AT_SIGMA else {}
        at |= {"labels": labels} if name in LABELLED else {}
        at |= {"only": only} if name in ONLY else {}
        figure = FIGURES[name](files, **at)
        if name == "8":
            storage.write_csv(paths[".csv"], overheads(tables.read_samples(files), **at))
        for kind, metadata in ((".png", None), (".svg", {"Date": None})):
            with storage.replacing(paths[kind]) as temporary:
                figure.savefig(temporary, format=kind[1:], dpi=160, metadata=metadata)
        plt.close(figure)


def _panels(titles: Sequence[str]) -> tuple[plt.Figure, list[Axes]]:
    columns = min(2, len(titles))
    rows = -(-len(titles) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.1 * rows), squeeze=False)
    for ax in axes.flat[len(titles) :]:
        ax.remove()
    for ax, title in zip(axes.flat, titles, strict=False):
        ax.set_title(wrapped(title, 48))
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure, list(axes.flat[: len(titles)])


def folder_name(path: Path, above: int) -> str:
    """Name of the folder `above` levels over that of a file, which the workflow names after the pair; "" if none."""
    folders = path.absolute().parents
    return folders[above].name if above < len(folders) else ""


def _curve(ax: Axes, of_row: pd.DataFrame, colour: str, marker: str, label: str) -> None:
    """Mean over the level of variation with the standard deviation as a band."""
    by_level = of_row.groupby("level")["accuracy"]
    mean, std = by_level.mean(), by_level.std().fillna(0.0)
    ax.plot(mean.index, mean, color=colour, marker=marker, markersize=4, label=label)
    ax.fill_between(mean.index, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)


def _counts(table: pd.DataFrame) -> str:
    varied = table[table["level"] > 0]
    chips = (table if varied.empty else varied).groupby(["row", "level"]).size()
    images = "/".join(str(n) for n in sorted(table["images"].unique()))
    low, high = chips.min(), chips.max()
    return f"{_chips(low) if low == high else f'{low} to {high} chips'}, {images} images"


def _chips(count: int) -> str:
    """Number of chips as text; a single chip has no interval."""
    return tables.NO_INTERVAL if count == 1 else f"{count} chips"


def figure2(files: Sequence[Path]) -> plt.Figure:
    """Accuracy of the unprotected networks over sigma, or a device's level: mean and deviation over chips."""
    samples = tables.read_samples(files)
    return _over_level(samples, ["unprotected"])


def figure7(files: Sequence[Path], sigma: float | None = None, levels: Mapping[str, float] | None = None) -> plt.Figure:
    """Accuracy of CorrectNet, trained at the sigma of Table I, and of the unprotected network, over sigma.

    A row "correctnet-sigma-S" is CorrectNet trained for sigma = S; these rows form a curve of their own, to which each
    contributes its point at S.
    """
    samples = tables.read_samples(files)
    trained_for = samples["row"].map(_trained_for)
    retrained = samples["row"].str.startswith(RETRAINED) & (samples["level"] == trained_for)
    # The row of Table I was trained for the table's sigma.
    of_table = samples["pair"].map(
        {pair: tables.own_level(of_pair, sigma, levels) for pair, of_pair in samples.groupby("pair")}
    )
    own = (samples["row"] == "correctnet") & (samples["level"] == of_table)
    with_retrained = samples["pair"].isin(samples["pair"][retrained].unique())
    curve = samples[(retrained | own) & with_retrained].assign(row=RETRAINED)
    return _over_level(pd.concat([samples, curve]), ["correctnet"], ["unprotected", RETRAINED])


def _trained_for(row: str) -> float:
    """S of a row "correctnet-sigma-S"; NaN for other rows."""
    try:
        return float(row.removeprefix(RETRAINED)) if row.startswith(RETRAINED) else float("nan")
    except ValueError:
        return float("nan")


def _level_axis(of_pair: pd.DataFrame) -> str:
    """The name of the axis of a pair's level of variation."""
    if tables.is_lognormal(of_pair):
        return "device variation σ"
    varied = of_pair[of_pair["level"] > 0]
    return f"multiple of the measured deviations of {' and '.join(varied['variation'].unique())}"


def _over_level(samples: pd.DataFrame, rows: Sequence[str], optional: Sequence[str] = ()) -> plt.Figure:
    pairs = list(samples["pair"].unique())
    figure, axes = _panels(pairs)
    for ax, pair in zip(axes, pairs, strict=True):
        of_pair = samples[(samples["pair"] == pair) & samples["row"].isin([*rows, *optional])]
        for row in [*rows, *optional]:
            of_row = of_pair[of_pair["row"] == row]
            if of_row.empty:
                if row in optional:
                    continue
                raise UserError(f"figure: pair {pair} has no row {row!r}")
            colour, marker, label = ROW_STYLE[row]
            _curve(ax, of_row, colour, marker, label)
            _paper_point(ax, of_row, row, colour)
        ax.set(xlabel=_level_axis(of_pair), ylabel="accuracy", ylim=(0, 1.02))
        ax.text(0.02, 0.02, _counts(of_pair), transform=ax.transAxes, fontsize=7, color=GREY)
        ax.legend(loc="lower left", bbox_to_anchor=(0, 0.08))
    return figure


def _paper_point(ax: Axes, of_row: pd.DataFrame, row: str, colour: str) -> None:
    style = {"marker": "*", "s": 90, "facecolor": "none", "edgecolor": colour, "zorder": 3}
    if (mean := tables.paper_mean(of_row, row)) is not None and tables.is_lognormal(of_row):
        ax.scatter([tables.PAPER_SIGMA], [mean], **style, label=f"paper, {ROW_STYLE[row][2]}")
    key = (of_row["network"].iloc[0], of_row["dataset"].iloc[0])
    if row == "unprotected" and key in tables.PAPER_CLEAN:
        ax.scatter([0], [tables.PAPER_CLEAN[key]], **style, label="paper, clean")


def figure9(files: Sequence[Path]) -> plt.Figure:
    """Accuracy of the suppressed network with variation from layer i to the last, on validation images."""
    figure, axes = _panels([folder_name(path, 1) for path in files])
    for ax, path in zip(axes, files, strict=True):
        draw_sweep(ax, read_table(path, ["layer", "accuracy", "original", "threshold", "images"]))
    return figure


def draw_sweep(ax: Axes, table: pd.DataFrame, metric: Metric = ACCURACY) -> None:
    """One panel of Figure 9: mean accuracy and standard deviation by first layer with variation, and the candidates.

    `table` has a row a layer and chip, as `correctnet.methods.candidates.Sweep.table`.
    """
    by_layer = table.groupby("layer")["accuracy" if metric.is_accuracy else "value"]
    mean, std = by_layer.mean(), by_layer.std().fillna(0.0)
    ax.plot(mean.index, mean, color=BLUE, marker="o", markersize=4, label="without compensation")
    ax.fill_between(mean.index, mean - std, mean + std, color=BLUE, alpha=0.2, linewidth=0)
    original, threshold = table["original"].iloc[0], table["threshold"].iloc[0]
    line, label = metric.bound(threshold, original), f"{threshold:.0%} of the original {metric.name}"
    if not metric.higher:
        label = f"original {metric.name} / {threshold:g}"
    ax.axhline(line, color=ORANGE, linestyle="--", label=label)
    below = mean.index[~metric.as_good(mean, line)]
    if len(below):
        ax.axvspan(0.5, below.max() + 0.5, color=ORANGE, alpha=0.1, linewidth=0, label="candidates")
    text = f"{_chips(by_layer.size().iloc[0])}, {table['images'].iloc[0]} validation images"
    ax.text(0.98, 0.02, text, transform=ax.transAxes, fontsize=7, color=GREY, ha="right")
    ax.set(xlabel="first layer with variation", ylabel=metric.name, xticks=mean.index)
    ax.legend(loc="lower right", bbox_to_anchor=(1, 0.08))


def figure10(files: Sequence[Path]) -> plt.Figure:
    """Overhead and validation accuracy of the states that the search explored; a ring marks the chosen state."""
    by_pair: dict[str, list[Path]] = {}
    for path in files:
        by_pair.setdefault(folder_name(path, 2), []).append(path)
    figure, axes = _panels(list(by_pair))
    for ax, logs in zip(axes, by_pair.values(), strict=True):
        names = [path.parent.name.replace("limit-", "limit ") for path in logs]
        read = [read_table(path, ["overhead", "mean", "std"]) for path in logs]
        draw_search(ax, list(zip(names, read, strict=True)))
    return figure


def draw_search(ax: Axes, logs: Sequence[tuple[str, pd.DataFrame]], metric: Metric = ACCURACY) -> None:
    """One panel of Figure 10: the states in the logs of searches, with their names; a ring marks each chosen state."""
    for k, (name, log) in enumerate(logs):
        colour, marker = SEARCH_COLOURS[k % len(SEARCH_COLOURS)], "osD^"[k % 4]
        table = log.dropna(subset=["mean"])
        if table.empty:  # nothing was searched
            continue
        x = 100 * table["overhead"]
        ax.errorbar(x, table["mean"], table["std"], fmt=marker, color=colour, alpha=0.6, markersize=4, label=name)
        best = table.index[best_state(list(table["mean"]), list(table["overhead"]), metric.higher)]
        ring = {"s": 110, "facecolor": "none", "edgecolor": colour, "linewidth": 1.5, "zorder": 3}
        ax.scatter([x[best]], [table["mean"][best]], **ring)
    ax.set(xlabel="overhead, % of the network's parameters", ylabel=f"validation {metric.name}")
    if ax.containers:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)
    else:
        ax.text(0.5, 0.5, "no search", transform=ax.transAxes, color=GREY, ha="center")


def yield_curve(
    files: Sequence[Path], sigma: float | None = None, levels: Mapping[str, float] | None = None
) -> plt.Figure:
    """Yield: the fraction of chips at or above an accuracy, for every row of Table I at its sigma."""
    samples = tables.read_samples(files)
    pairs = list(samples["pair"].unique())
    figure, axes = _panels(pairs)
    for ax, pair in zip(axes, pairs, strict=True):
        of_pair = samples[samples["pair"] == pair]
        at = tables.own_level(of_pair, sigma, levels)
        tables.check_comparable(pair, of_pair, at, "figure")
        varied = of_pair[of_pair["level"] == at]
        colours = itertools.chain((GREEN, PINK, YELLOW, SKY), itertools.cycle(plt.cm.tab20.colors))
        for row in varied["row"].unique():
            accuracies = np.sort(varied["accuracy"][varied["row"] == row].to_numpy())
            # N - n of the N chips are at or above any accuracy from the (n-1)-th lowest (exclusive) to the n-th lowest.
            fraction = 1 - np.arange(len(accuracies)) / len(accuracies)
            x = np.concatenate([accuracies, accuracies[-1:]])
            style = {"color": ROW_STYLE[row][0], "linewidth": 2} if row in ROW_STYLE else {"color": next(colours)}
            ax.step(x, np.append(fraction, 0.0), where="pre", label=row, **style)
        ax.set(xlabel="accuracy", ylabel="fraction of chips at or above", ylim=(0, 1.02))
        ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        chips = varied.groupby("row").size()
        level = f"σ = {at:g}" if tables.is_lognormal(varied) else tables.device_text(varied)
        ax.text(0.02, 0.02, f"{level}, {_chips(chips.min())}", transform=ax.transAxes, fontsize=7)
        ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)
    return figure


def rows(
    files: Sequence[Path],
    labels: Mapping[str, str] | None = None,
    only: Sequence[str] = (),
    sigma: float | None = None,
    levels: Mapping[str, float] | None = None,
) -> plt.Figure:
    """Every row of Table I at its sigma: clean accuracy, accuracy of each chip, mean with 95 % confidence interval.

    The dotted line marks the mean of the first row, a star the paper's mean where it is known.

    Args:
        files: samples.csv of one pair or more.
        labels: text for each row, by its name.
        only: rows to show; empty for all.
        sigma, levels: see `tables.own_level`.

    Raises:
        UserError: no pair has a row of `only`.
    """
    samples = tables.read_samples(files)
    tables.check_rows(samples, only, "figure")
    sigmas = {pair: tables.own_level(of_pair, sigma, levels) for pair, of_pair in samples.groupby("pair")}
    if only:
        samples = samples[samples["row"].isin(only)]
    pairs = list(samples["pair"].unique())
    counts = samples.groupby("pair")["row"].nunique()
    heights = [0.8 + 0.28 * counts[pair] for pair in pairs]
    size = (8, 0.6 + sum(heights))
    figure, axes = plt.subplots(len(pairs), 1, figsize=size, squeeze=False, height_ratios=heights)
    stars = False
    for ax, pair in zip(axes.flat, pairs, strict=True):
        of_pair = samples[samples["pair"] == pair]
        tables.check_comparable(pair, of_pair, sigmas[pair], "figure")
        varied = of_pair[of_pair["level"] == sigmas[pair]]
        names = list(varied["row"].unique())
        of_paper = sigmas[pair] == tables.PAPER_SIGMA and tables.is_lognormal(varied)
        published = [tables.paper_mean(varied, row) if of_paper else None for row in names]
        clean = [of_pair[(of_pair["row"] == row) & (of_pair["level"] == 0)]["accuracy"] for row in names]
        draw_rows(ax, {row: Result(varied[varied["row"] == row]) for row in names}, clean, labels, published)
        stars = stars or any(mean is not None for mean in published)
        ax.set(title=wrapped(pair if tables.is_lognormal(varied) else f"{pair}: {tables.device_text(varied)}", 72))
    axes[-1, 0].set(xlabel="accuracy")
    key = rows_key(stars)
    figure.legend(handles=key, fontsize=7, loc="outside lower center", ncols=len(key))
    return figure


def draw_rows(
    ax: Axes,
    results: Mapping[str, Result],
    clean: Sequence[Any],
    labels: Mapping[str, str] | None = None,
    published: Sequence[float | None] = (),
) -> None:
    """One panel of `rows`: the results by row.

    Args:
        ax: the axes.
        results: by row, from top to bottom.
        clean: accuracies, or values, without variation of each row, a sequence each, which may be empty.
        labels: text for each row, by its name.
        published: mean in the paper for each row, None where there is none.
    """
    texts = []
    ax.axvline(next(iter(results.values())).mean, color=GREY, linewidth=0.8, linestyle=":")
    for y, (row, result) in enumerate(results.items()):
        text, lone = wrapped((labels or {}).get(row, row), 48), result.chips == 1
        texts.append(f"{text}\n({tables.NO_INTERVAL})" if lone else text)
        interval, colour = result.interval(), ROW_STYLE[row][0] if row in ROW_STYLE else GREEN
        ax.plot(result.values, np.full(result.chips, y), "|", color=colour, alpha=0.15, markersize=9)
        error = None if lone else [[result.mean - interval.low], [interval.high - result.mean]]
        ax.errorbar([result.mean], [y], xerr=error, fmt="o", color=colour, markersize=5, capsize=3)
        ax.plot(clean[y], np.full(len(clean[y]), y), "D", color=colour, markerfacecolor="none", markersize=5)
        if published and published[y] is not None:
            ax.plot([published[y]], [y], "*", color="black", markerfacecolor="none", markersize=9)
    ax.set(yticks=range(len(results)), yticklabels=texts, ylim=(len(results) - 0.4, -0.6))
    ax.tick_params(axis="y", labelsize=8)
    if next(iter(results.values())).metric.fraction:
        ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def rows_key(stars: bool = False) -> list[Line2D]:
    """Handles of the legend of `rows`; with `stars`, that of the paper's means, too."""
    marks = [("|", GREY, "one chip"), ("o", GREY, "mean, 95 % interval"), ("D", "none", "without variation")]
    marks += [("*", "none", "mean in the paper")] if stars else []
    return [
        Line2D([], [], color=GREY, marker=marker, linestyle="", markerfacecolor=face, markersize=5, label=text)
        for marker, face, text in marks
    ]


def over_time(
    files: Sequence[Path],
    labels: Mapping[str, str] | None = None,
    sigma: float | None = None,
    levels: Mapping[str, float] | None = None,
) -> plt.Figure:
    """Accuracy of each network over the time after programming, at the level of Table I: mean and deviation over chips.

    Rows that evaluate one network at several times are one curve, with the label of the first of them.

    Args:
        files: per-chip results.
        labels: text for each row, by its name.
        sigma, levels: see `draw`.

    Raises:
        UserError: no network of a pair is evaluated at two times.
    """
    samples = tables.read_samples(files)
    timed = samples[samples["time"].notna()] if {"time", "model"} <= set(samples) else samples[:0]
    at = {
        pair: of_pair[of_pair["level"] == tables.own_level(of_pair, sigma, levels)]
        for pair, of_pair in timed.groupby("pair", sort=False)
    }
    at = {pair: table for pair, table in at.items() if (table.groupby("model")["time"].nunique() > 1).any()}
    if not at:
        raise UserError("figure: no network is evaluated at two times after programming")
    figure, axes = _panels(list(at))
    for ax, table in zip(axes, at.values(), strict=True):
        curves = [of_model for _, of_model in table.groupby("model", sort=False)]
        for number, of_model in enumerate(curves):
            row = of_model["row"].iloc[0]
            colour, marker = ROW_STYLE.get(row, ((BLUE, GREEN, PINK, YELLOW, SKY, GREY)[number % 6], "o"))[:2]
            by_time = of_model.assign(seconds=of_model["time"].map(seconds)).groupby("seconds")["accuracy"]
            mean, std = by_time.mean(), by_time.std().fillna(0.0)
            ax.plot(mean.index, mean, color=colour, marker=marker, markersize=4, label=(labels or {}).get(row, row))
            ax.fill_between(mean.index, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)
        times = sorted(set(table["time"]), key=seconds)
        ax.set_xscale("symlog", linthresh=1.0)  # 0 is right after programming
        ax.set_xticks([seconds(time) for time in times], times)
        ax.minorticks_off()
        device = " and ".join(table["variation"].unique())
        ax.set(xlabel=f"time after programming {device}", ylabel="accuracy")
        ax.text(0.02, 0.02, _counts(table), transform=ax.transAxes, fontsize=7, color=GREY)
        ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    return figure


def sensitivity(files: Sequence[Path]) -> plt.Figure:
    """Loss of accuracy under variation in one layer alone, by layer and network, on validation images."""
    by_pair: dict[str, list[Path]] = {}
    for path in files:
        by_pair.setdefault(folder_name(path, 1), []).append(path)
    figure, axes = _panels(list(by_pair))
    for ax, paths in zip(axes, by_pair.values(), strict=True):
        for k, path in enumerate(paths):
            table = read_table(path, ["layer", "name", "accuracy", "clean", "stage", "images"])
            stage = table["stage"].iloc[0]
            colour, label = SENSITIVITY_STYLE.get(stage, (GREY, stage))
            drop = (table["clean"] - table["accuracy"]).groupby(table["layer"])
            mean, error = drop.mean(), drop.sem().fillna(0.0)
            x = mean.index + 0.26 * (k - (len(paths) - 1) / 2)
            ax.bar(x, mean, 0.24, yerr=error, color=colour, label=label, error_kw={"linewidth": 0.8})
        ax.axhline(0, color=GREY, linewidth=0.8)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
        ax.set(xlabel="layer with variation", ylabel="loss of accuracy, points", xticks=mean.index)
        chips = _chips(table.groupby("layer").size().iloc[0])
        text = f"{chips}, {table['images'].iloc[0]} validation images"
        ax.text(0.98, 0.98, text, transform=ax.transAxes, fontsize=7, color=GREY, ha="right", va="top")
        ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)
    return figure


def read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read a CSV with at least these columns. Raises UserError, naming the line, if it is malformed or truncated."""
    read = csvfile.read(path, columns)
    if {"correct", "images", "accuracy"} <= set(read.table):
        check_accuracies(read)
    return read.table


FIGURES: dict[str, Callable[..., plt.Figure]] = {
    "2": figure2,
    "7": figure7,
    "8": figure8,
    "9": figure9,
    "10": figure10,
    "rows": rows,
    "yield": yield_curve,
    "sensitivity": sensitivity,
    "time": over_time,
}
AT_SIGMA = ("7", "8", "rows", "yield", "time")
LABELLED = ("8", "rows", "time")
ONLY = ("8", "rows")
