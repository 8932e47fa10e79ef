"""Table I of the paper, made from per-chip results, with the paper's values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from correctnet.errors import UserError
from correctnet.evaluation.results import COLUMNS, NO_INTERVAL, Result, missing_chip, read_chips
from correctnet.sections import exact

# What the paper states (Section IV), as fractions, by (network, data set): clean accuracy, and by row at sigma 0.5
# (mean, standard deviation). Table I itself is not legible in the copies at hand; these are the values of its text.
# VGG16-CIFAR100's clean accuracy is not stated: 67.01 % is "more than 95 %" of it, so it is at most 70.54 %.
PAPER_CLEAN = {("lenet5", "cifar10"): 0.8089}
PAPER_CLEAN_AT_MOST = {("vgg16", "cifar100"): 0.7054}
PAPER = {
    ("vgg16", "cifar100"): {
        "unprotected": (0.0169, None),
        "correctnet": (0.6701, 0.0087),
        "all-candidates": (0.6714, 0.0083),
    },
    ("lenet5", "cifar10"): {"correctnet": (0.749, None)},
}
PAPER_SIGMA = 0.5

KEYS = ["pair", "row", "network", "dataset", "split", "centre", "overhead", "layers", "epochs"]
LEVELS = ("sigma", "level")
"""the columns of which an evaluation has one: sigma of the lognormal, or the level of another device"""


def paper_mean(samples: pd.DataFrame, row: str) -> float | None:
    """Mean that the paper states for a row at PAPER_SIGMA, network and data set of the samples; None: not stated."""
    key = (samples["network"].iloc[0], samples["dataset"].iloc[0])
    return PAPER.get(key, {}).get(row, (None,))[0]


def read_samples(files: Iterable[Path]) -> pd.DataFrame:
    """Read per-chip results of several files into one table.

    Its column `level` is how much the device varies: sigma of the lognormal, or a multiple of a measured device's
    deviations. Where there are results of both, there is no column `sigma`.

    Raises:
        UserError: a file is malformed or lacks a column, or a chip of a row occurs twice.
    """
    tables = []
    for path in files:
        table = read_chips(path, by=("pair", "row", *LEVELS))
        level = [name for name in LEVELS if name in table.columns]
        missing = [c for c in [*KEYS, *COLUMNS] if c not in table.columns] + ([] if level else [LEVELS[0]])
        if missing:
            raise UserError(f"{path}: no column {missing[0]!r}; evaluate with --note {missing[0]}=...")
        tables.append(table.assign(level=table[level[0]]))
    samples = pd.concat(tables, ignore_index=True)
    if not all("sigma" in table for table in tables):
        samples = samples.drop(columns="sigma", errors="ignore")
    twice = samples.duplicated(["pair", "row", "level", "seed", "sample"])
    if twice.any():
        first = samples[twice].iloc[0]
        raise UserError(
            f"chip {first['sample']} of row {first['row']} of {first['pair']} at {level_name(samples)} "
            f"{exact(first['level'])} comes twice"
        )
    return samples


def check_rows(samples: pd.DataFrame, rows: Iterable[str], what: str) -> None:
    """Raise a UserError, which begins with `what`, for a row that no pair has."""
    known = list(samples["row"].unique())
    for row in rows:
        if row not in known:
            raise UserError(f"{what}: no row {row!r} (rows: {', '.join(known)})")


def is_lognormal(samples: pd.DataFrame) -> bool:
    """Whether all results at a level above 0 have a sigma: those of measured devices have not."""
    if "sigma" in samples or "variation" not in samples:
        return True
    return bool((samples["variation"][samples["level"] > 0] == "lognormal").all())


def level_name(samples: pd.DataFrame) -> str:
    """What the level of these results is called: sigma, or level where not all are under the lognormal."""
    return "sigma" if is_lognormal(samples) else "level"


def device_text(of_row: pd.DataFrame) -> str:
    """The device of results at one level above 0, with its time and level."""
    first = of_row.iloc[0]
    time = first.get("time")
    after = f" after {time}" if isinstance(time, str) and time else ""
    name = first.get("variation") or "lognormal"
    return f"{name}{after}, {level_name(of_row)} {exact(first['level'])}"


def own_level(
    of_pair: pd.DataFrame, given: float | None = None, levels: Mapping[str, float] | None = None, what: str = "figure"
) -> float:
    """The level of a pair in Table I: that of `levels`, or `given`, else the largest at which all rows have results.

    Raises UserError where there are no results at it.
    """
    pair, name = of_pair["pair"].iloc[0], level_name(of_pair)
    given = (levels or {}).get(pair, given)
    if given is not None:
        if given not in set(of_pair["level"]):
            raise UserError(f"{what}: pair {pair} has no results at {name} {exact(given)}")
        return given
    rows = of_pair.groupby("level")["row"].nunique()
    common = rows.index[rows == of_pair["row"].nunique()]
    if common.empty:
        raise UserError(f"{what}: pair {pair} has no {name} at which all of its rows have results; give --sigma")
    return common.max()


def table1(
    samples: pd.DataFrame,
    sigma: float | None,
    labels: Mapping[str, str] | None = None,
    levels: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """Table with one line per pair and row: accuracy at `sigma` against the clean accuracy of the unprotected network.

    Columns: pair, row, label, centre, clean (accuracy of the row's own network without variation), mean and std over
    chips, ci_low and ci_high (95 % t interval of the mean), ratio (mean / clean accuracy of the row `unprotected`, or
    else of the pair's first row, on the same images), overhead, layers (compensated ones), chips, images, epochs, seed,
    paper (mean in the paper, at sigma 0.5) and difference. One chip has no std and no interval. Where not all pairs are
    under the lognormal, or each is at a level of its own, the column `variation` says of each row its device and level.

    Rows may differ in the number of chips and images; fewer chips or images are the first of them. The ratio of a row
    with fewer images needs the clean accuracy on those (`correctnet evaluate --sigma 0 --prefix N`), or is left empty.

    Args:
        samples: from `read_samples`.
        sigma: level of variation of the table, see `read_samples`; None: of each pair as `own_level` has it.
        labels: text for each row, by its name.
        levels: instead of `sigma`, the level of a pair, by its name.

    Raises:
        UserError: a row lacks its clean accuracy or a chip between its first and last, or rows of a pair differ in
            data set, split, seed or first chip.
    """
    rows = []
    samples = samples if "level" in samples else samples.assign(level=samples["sigma"])
    name, said = level_name(samples), bool(levels) or sigma is None or not is_lognormal(samples)
    for pair, of_pair in samples.groupby("pair", sort=False):
        level = own_level(of_pair, sigma, levels, "table")
        varied = of_pair[of_pair["level"] == level]
        check_comparable(pair, of_pair, level)
        nominal = of_pair[of_pair["level"] == 0].groupby("row").first()
        clean = nominal["accuracy"]
        names = list(varied["row"].unique())
        if left_out := [row for row in of_pair["row"].unique() if row not in names]:
            raise UserError(f"table: row {left_out[0]} of {pair} has no results at {name} {exact(level)}")
        if missing := [row for row in names if row not in clean.index]:
            raise UserError(f"table: row {missing[0]} of {pair} has no results at {name} 0")
        reference = "unprotected" if "unprotected" in names else names[0]  # files may come in any order
        for row, of_row in varied.groupby("row", sort=False):
            result, first = Result(of_row), of_row.iloc[0]
            interval = result.interval()
            reference_clean = _clean_on(nominal.loc[reference], result.images)
            paper = paper_mean(of_row, row) if level == PAPER_SIGMA and is_lognormal(of_row) else None
            rows.append(
                {
                    "pair": pair,
                    "row": row,
                    "label": (labels or {}).get(row, row),
                    **({"variation": device_text(of_row)} if said else {}),
                    "centre": first["centre"],
                    "clean": clean[row],
                    "mean": result.mean,
                    "std": result.std if result.chips > 1 else None,
                    "ci_low": interval.low,
                    "ci_high": interval.high,
                    "ratio": None if reference_clean is None else result.mean / reference_clean,
                    "overhead": first["overhead"],
                    "layers": int(first["layers"]),
                    "chips": result.chips,
                    "images": result.images,
                    "epochs": first["epochs"],
                    "seed": first["seed"],
                    "paper": paper,
                    "difference": None if paper is None else result.mean - paper,
                }
            )
    return pd.DataFrame(rows)


def check_comparable(pair: str, of_pair: pd.DataFrame, sigma: float, what: str = "table") -> None:
    """Raise a UserError if rows of a pair are not comparable at a level `sigma`.

    They are not if they differ in images, seed or first chip, or if a chip between the first and the last is missing.
    """
    varied = of_pair[of_pair["level"] == sigma]
    shape = varied.groupby("row", sort=False).apply(_shape, include_groups=False)
    if shape.nunique() != 1:
        listed = "; ".join(f"{row}: {text}" for row, text in shape.items())
        raise UserError(f"{what}: rows of {pair} are not comparable ({listed})")
    _check_images(pair, of_pair[of_pair["level"].isin([0, sigma])], what)
    for row, of_row in varied.groupby("row", sort=False):
        _check_chips(pair, row, of_row, what)


def _escaped(text: str) -> str:
    """Text escaped for a cell of a Markdown table, so that it is shown literally."""
    text = re.sub(r"[\\`*\[\]<>|~$&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", text)
    return "<br>".join(text.splitlines())


def _shape(rows: pd.DataFrame) -> str:
    seeds = "/".join(str(n) for n in sorted(rows["seed"].unique()))
    images = f"{rows['split'].iloc[0]} images of {rows['dataset'].iloc[0]}"
    return f"chips from {rows['sample'].min()} on, {images}, seed {seeds}"


def _check_images(pair: str, of_pair: pd.DataFrame, what: str) -> None:
    """Raise a UserError if results of a pair are on different images, as far as the files say."""
    sources = (of_pair["split"] + " images of " + of_pair["dataset"]).unique()
    if len(sources) > 1:
        raise UserError(f"{what}: rows of {pair} are not comparable: they are on {', and on '.join(sources)}")
    if "data" not in of_pair:
        return
    known = of_pair[of_pair["data"].notna() & (of_pair["data"] != "")]
    for images, digests in known.groupby("images")["data"]:
        if digests.nunique() > 1:
            first = known.loc[digests.index].drop_duplicates("data")
            name = level_name(of_pair)
            listed = ", ".join(f"{row} at {name} {exact(level)}" for row, level in first[["row", "level"]].to_numpy())
            raise UserError(f"{what}: rows of {pair} are not comparable: other {images} images ({listed})")


def _check_chips(pair: str, row: str, of_row: pd.DataFrame, what: str) -> None:
    """Raise a UserError if a chip between the first and the last is missing."""
    for _, samples in of_row.groupby("seed")["sample"]:
        if (missing := missing_chip(samples)) is not None:
            raise UserError(f"{what}: row {row} of {pair} lacks chip {missing} and has chip {samples.max()}")


def _clean_on(nominal: pd.Series, images: int) -> float | None:
    """Clean accuracy on the first `images` images, from a row at level 0; None: not known."""
    if nominal["images"] == images:
        return nominal["accuracy"]
    counted = nominal.get("prefixes")
    if not isinstance(counted, str):
        return None
    try:
        prefixes = {int(n): int(correct) for n, correct in (part.split(":") for part in counted.split())}
    except ValueError as error:
        raise UserError(f"table: prefixes {counted!r}: IMAGES:CORRECT ... is expected") from error
    if any(not 0 <= correct <= n < nominal["images"] or n == 0 for n, correct in prefixes.items()):
        raise UserError(f"table: prefixes {counted!r}: more correct than images, or more images than there are")
    correct = prefixes.get(images)
    return None if correct is None else correct / images


def variations(table: pd.DataFrame) -> dict[str, list[str]] | None:
    """{device and level: pairs} of a table that says them; None for one under the lognormal at one sigma."""
    if "variation" not in table:
        return None
    found: dict[str, list[str]] = {}
    for pair, device in table[["pair", "variation"]].drop_duplicates().itertuples(index=False):
        found.setdefault(device, []).append(pair)
    return found


def markdown(table: pd.DataFrame, sigma: float | None) -> str:
    """Table I as Markdown: percentages with confidence intervals, and the paper's values."""
    devices = variations(table)
    if devices is None:
        at = f"sigma = {exact(sigma or 0)}"
    else:
        at = "under " + "; ".join(f"{_escaped(name)} ({', '.join(map(_escaped, of))})" for name, of in devices.items())
    lines = [
        f"Accuracies in %; {at}; mean ± standard deviation over chips, [95 % confidence interval of "
        "the mean]; ratio: mean / clean accuracy, on the same images, of the row unprotected, or else of the pair's "
        "first row (–: not known).",
        "",
        "| pair | row | clean | mean ± std | 95 % CI | ratio | overhead | layers | chips × images | epochs | seed "
        "| paper | difference |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|",
    ]
    for r in table.to_dict("records"):
        paper = "" if pd.isna(r["paper"]) else f"{r['paper']:.2%}"
        ratio = "–" if pd.isna(r["ratio"]) else f"{r['ratio']:.2%}"
        difference = "" if pd.isna(r["difference"]) else f"{100 * r['difference']:+.2f}"
        lines.append(
            f"| {_escaped(r['pair'])} | {_escaped(r['label'])} | {r['clean']:.2%} "
            f"| {_mean(r)} | {_interval(r)} | {ratio} | {r['overhead']:.2%} "
            f"| {r['layers']} | {r['chips']} × {r['images']} | {r['epochs']} | {r['seed']} | {paper} | {difference} |"
        )
    return "\n".join(lines) + "\n"


def _mean(row: dict[str, Any]) -> str:
    return f"{row['mean']:.2%}" if row["chips"] == 1 else f"{row['mean']:.2%} ± {100 * row['std']:.2f}"


def _interval(row: dict[str, Any]) -> str:
    return NO_INTERVAL if row["chips"] == 1 else f"[{100 * row['ci_low']:.2f}, {100 * row['ci_high']:.2f}]"
