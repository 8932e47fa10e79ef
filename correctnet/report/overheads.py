"""Figure 8 of the paper: accuracy over what a method keeps in digital hardware, as a table and as a figure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, PercentFormatter, StrMethodFormatter

from correctnet.evaluation.results import Result
from correctnet.report import tables
from correctnet.report.style import GREEN, GREY, PINK, ROW_STYLE, SKY, YELLOW, wrapped

# Columns of what a chip has been trained or measured with; an empty cell, or none, is a chip that has not.
ON_CHIP = ("adapt_images", "adapt_passes", "adapt_seconds", "calibrate_images")
POINT = re.compile(r"(.+)-[0-9]+(\.[0-9]+)?")


def series_of(row: str) -> str:
    """The method of a row: rows that differ in a number at the end, such as a fraction, are points of one series."""
    found = POINT.fullmatch(row)
    return found[1] if found else row


def overheads(
    samples: pd.DataFrame,
    labels: Mapping[str, str] | None = None,
    only: Sequence[str] = (),
    sigma: float | None = None,
    levels: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """Table with one line per pair and row: its accuracy under variation, and what it needs.

    Columns: pair, row, label, series (see `series_of`), online (whether something is measured or trained on each
    chip), overhead (digital weights / parameters of the network), digital_macs (digital multiplications / those of the
    network, NaN where they were not counted), mean and std over chips, ci_low and ci_high (95 % t interval of the
    mean), chips, images, seed, and what each chip needs: adapt_images, adapt_passes, adapt_seconds (the mean over
    chips) and calibrate_images, empty for rows that do without. One chip has no std and no interval.

    Args:
        samples: from `tables.read_samples`.
        labels: text for each row, by its name.
        only: rows to keep; empty for all.
        sigma, levels: see `tables.own_level`.

    Raises:
        UserError: no pair has a row of `only`, or rows of a pair are not comparable, see `tables.check_comparable`.
    """
    tables.check_rows(samples, only, "figure")
    found: list[dict[str, Any]] = []
    for pair, of_pair in samples.groupby("pair", sort=False):
        level = tables.own_level(of_pair, sigma, levels)
        tables.check_comparable(pair, of_pair, level, "figure")
        for row, of_row in of_pair[of_pair["level"] == level].groupby("row", sort=False):
            if only and row not in only:
                continue
            result, first = Result(of_row), of_row.iloc[0]
            interval, several = result.interval(), result.chips > 1
            need = {key: of_row[key].astype(float).mean() if key in of_row else np.nan for key in ON_CHIP}
            macs = float(first.get("digital_macs", np.nan))
            found.append(
                {
                    "pair": pair,
                    "row": row,
                    "label": (labels or {}).get(row, row),
                    "series": series_of(row),
                    "online": bool(need["adapt_passes"] > 0 or need["calibrate_images"] > 0)
                    or first.get("mapping") == "rows",
                    "overhead": first["overhead"],
                    # Rows without anything digital have no column of multiplications.
                    "digital_macs": 0.0 if np.isnan(macs) and first["overhead"] == 0 else macs,
                    "mean": result.mean,
                    "std": result.std if several else np.nan,
                    "ci_low": interval.low,
                    "ci_high": interval.high,
                    "chips": result.chips,
                    "images": result.images,
                    "seed": first["seed"],
                    **need,
                }
            )
    return pd.DataFrame(found)


def series_label(labels: Sequence[str], series: str) -> str:
    """Text for a series: what the labels of its rows, cut at commas, begin with together; else its name."""
    split = [label.split(", ") for label in labels]
    common = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ", ".join(common) or series


def figure8(
    files: Sequence[Path],
    labels: Mapping[str, str] | None = None,
    only: Sequence[str] = (),
    sigma: float | None = None,
    levels: Mapping[str, float] | None = None,
) -> plt.Figure:
    """Accuracy over overhead, for each pair in weights and in multiplications: mean and deviation over chips.

    Filled markers are rows that measure or train something on each chip, open ones those that are not; the points of a
    series are joined. The horizontal axes are linear up to 1 % and logarithmic beyond. Rows whose digital
    multiplications were not counted are not in the second panel.

    Args:
        files: samples.csv of one pair or more.
        labels, only, sigma, levels: see `overheads`.
    """
    table = overheads(tables.read_samples(files), labels, only, sigma, levels)
    pairs = list(table["pair"].unique())
    figure, axes = plt.subplots(len(pairs), 2, figsize=(9, 0.9 + 3.1 * len(pairs)), squeeze=False, sharey="row")
    # A method has one colour and marker, trained on the chips or not, and in all pairs.
    methods = list(dict.fromkeys(name.removesuffix("-online") for name in table["series"]))
    colours, markers = (
        itertools.cycle((GREEN, PINK, YELLOW, SKY, "black", GREY, "brown")),
        itertools.cycle("^vDPX<>*ph"),
    )
    style = {name: ROW_STYLE[name][:2] if name in ROW_STYLE else (next(colours), next(markers)) for name in methods}
    for pair, (left, right) in zip(pairs, axes, strict=True):
        of_pair = table[table["pair"] == pair]
        for ax, column, what in ((left, "overhead", "weights"), (right, "digital_macs", "multiplications")):
            for name, points in of_pair.groupby("series", sort=False):
                _series(ax, points, column, *style[name.removesuffix("-online")], name)
            ax.set_xscale("symlog", linthresh=1, linscale=0.5)
            ax.set(xlabel=f"digital {what}, % of the network's", xlim=(-0.1, None))
            ax.xaxis.set_major_locator(FixedLocator((0, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)))
            ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        left.set(title=wrapped(pair, 48), ylabel="accuracy")
        chips, images = (" or ".join(map(str, sorted(of_pair[key].unique()))) for key in ("chips", "images"))
        missing = int(of_pair["digital_macs"].isna().sum())
        texts = f"{chips} chips, {images} images", f"{missing} of {len(of_pair)} rows not counted" if missing else ""
        for ax, text in zip((left, right), texts, strict=True):
            ax.text(0.98, 0.02, text, transform=ax.transAxes, fontsize=7, color=GREY, ha="right")
    handles = {own.get_label(): own for ax in axes[:, 0] for own in ax.containers}
    figure.legend(handles=[*handles.values()], fontsize=7, loc="outside lower center", ncols=3)
    return figure


def _series(ax: Axes, points: pd.DataFrame, column: str, colour: Any, marker: str, series: str) -> None:
    """The rows of a method: a marker each with its deviation, joined where their overheads differ."""
    points = points.dropna(subset=column).sort_values(column)
    if points.empty:
        return
    online = bool(points["online"].all())
    text = series_label(list(points["label"]), series) + (" (on each chip)" if online else "")
    ax.errorbar(
        100 * points[column],
        points["mean"],
        points["std"].fillna(0.0),
        color=colour,
        marker=marker,
        markerfacecolor=colour if online else "white",
        markersize=5,
        linewidth=0.8,
        linestyle="-" if points[column].nunique() > 1 else "",
        elinewidth=0.6,
        capsize=2,
        label=text,
    )
