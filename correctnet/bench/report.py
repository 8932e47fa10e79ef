"""Tables and plots of the CPU benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from correctnet.bench.workloads import PRECISIONS, Row
from correctnet.errors import UserError
from correctnet.files import storage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def table(measured: dict[str, Any]) -> str:
    """Format the result of `correctnet.bench.cpu.measure` for a terminal."""
    threads = measured["threads"]
    lines = [
        f"{measured['cpu']}, {threads} thread{'s' * (threads != 1)}, {measured['isa']}; torch {measured['torch']}",
        f"{measured['data']}, sigma {measured['sigma']:g}; medians; the load of the machine was {measured['load']:.1f}",
        "peak in registers: "
        + "; ".join(
            f"{name} {of['one'] / 1e9:.0f} GFLOP/s on one thread, {of['all'] / 1e9:.0f} on {threads}"
            for name, of in measured["peak_flop_per_s"].items()
        ),
    ]
    of_work: dict[str, list[Row]] = {}
    for row in measured["rows"]:
        of_work.setdefault(row["work"], []).append(row)
    for name, rows in of_work.items():
        tables = {"noise": _noise_table, "noise kinds": _kinds_table, "scaling": _scaling_table}
        shown = tables.get(name, _work_table)
        lines += ["", *shown(rows)]
    if any("limit_images_per_s" in row for row in measured["rows"]):
        lines += [
            "",
            "limit: executed FLOP / peak + weights drawn × time a weight, on all threads",
            "*: the fastest plain loop; forward: without drawing weights; × bf16, × float32: speed-up of the engine",
        ]
    return "\n".join(lines)


def _by_precision(rows: list[Row], key: str) -> dict[str, Row]:
    return {p: row for p in PRECISIONS for row in rows if row[key] == p}


def _work_table(rows: list[Row]) -> list[str]:
    ours, plain = _by_precision(rows, "precision"), _by_precision(rows, "plain_precision")
    ratio = {(row["precision"], row["plain_precision"]): row["ratio"] for row in rows}
    best = next(row["plain_precision"] for row in rows if row["against"] == "best")
    lines = [
        f"{rows[0]['work']}: {rows[0]['chips']} chips × {rows[0]['images']:,} images",
        f"  {'engine':<74}{'chips':>6}{'images/s':>10}{'of limit':>10}",
    ]
    for p, row in ours.items():
        lines.append(f"  {p:<74}{row['chips']:>6}{row['images_per_s']:>10,.0f}{row['fraction_of_limit']:>10.0%}")
    times = "".join(f"{'× ' + p:>10}" for p in ours)
    lines.append(f"  {'plain PyTorch':<74}{'chips':>6}{'images/s':>10}{'forward':>10}{times}")
    for p, row in plain.items():
        times = "".join(f"{ratio[q, p]:>9.1f}×" for q in ours)
        rates = f"{row['plain_images_per_s']:>10,.0f}{row['plain_forward_images_per_s']:>10,.0f}"
        lines.append(f"{'*' if p == best else ' '} {row['plain']:<74}{row['plain_chips']:>6}{rates}{times}")
    return lines


def _noise_table(rows: list[Row]) -> list[str]:
    return [
        "noise: millions of weights a second on one thread",
        f"  {'':<10}{'core':>8}{'plain PyTorch':>16}{'ratio':>8}",
        *(
            f"  {row['precision']:<10}{row['weights_per_s'] / 1e6:>8,.0f}{row['plain_weights_per_s'] / 1e6:>16,.0f}"
            f"{row['ratio']:>7.1f}×"
            for row in rows
            if row["against"] == row["precision"]
        ),
    ]


def _kinds_table(rows: list[Row]) -> list[str]:
    return [
        "kinds of noise: millions of weights a second on one thread, float32 in a cache",
        f"  {'':<26}{'core':>8}{'time':>8}",
        *(f"  {row['kind']:<26}{row['weights_per_s'] / 1e6:>8,.0f}{row['relative_time']:>7.2f}×" for row in rows),
    ]


def _scaling_table(rows: list[Row]) -> list[str]:
    return [
        "scaling: LeNet-5 in bf16",
        f"  {'':<8}{'chips':>8}{'images':>8}{'threads':>9}{'seconds':>10}{'images/s':>11}",
        *(
            f"  {row['axis']:<8}{row['chips']:>8,}{row['images']:>8,}{row['threads']:>9}{row['seconds']:>10.3f}"
            f"{row['images_per_s']:>11,.0f}"
            for row in rows
        ),
    ]


def check_plot(path: Path) -> None:
    """Check that a plot can be written to `path`. Raises UserError where it cannot."""
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:] not in known:
        raise UserError(f"--plot {path}: the name must end with one of {', '.join('.' + k for k in sorted(known))}")
    storage.check_writable(path)


def plot(measured: dict[str, Any], path: Path) -> list[Path]:
    """Plot the rates to `path`, and the scaling, if measured, to a file beside it. Returns the files written."""
    import matplotlib.pyplot as plt

    from correctnet.report import figures

    written = []
    scaling = [row for row in measured["rows"] if row["work"] == "scaling"]
    rates = [row for row in measured["rows"] if row["work"] not in ("scaling", "noise kinds")]
    with plt.rc_context(figures.STYLE):
        for rows, draw, to in (
            (rates, _draw_rates, path),
            (scaling, _draw_scaling, path.with_stem(f"{path.stem}-scaling")),
        ):
            if not rows:
                continue
            figure = draw(rows)
            where = f"{measured['cpu']}, {measured['isa']}, torch {measured['torch']}"
            figure.supxlabel(where, fontsize=6, color=figures.GREY)
            with storage.replacing(to) as temporary:
                figure.savefig(temporary, format=to.suffix[1:], dpi=160)
            plt.close(figure)
            written.append(to)
    return written


def _draw_rates(rows: list[Row]) -> Figure:
    """Draw a panel a workload: the engine and the best baseline in both precisions, and the engine's limits."""
    import matplotlib.pyplot as plt

    works = list(dict.fromkeys(row["work"] for row in rows))
    columns = min(2, len(works))
    lines = -(-len(works) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 2.3 * lines + 0.3), squeeze=False)
    for ax in axes.flat[len(works) :]:
        ax.remove()
    for ax, work in zip(axes.flat, works, strict=False):
        _draw_work(ax, [row for row in rows if row["work"] == work])
    return figure


def _draw_work(ax: Axes, rows: list[Row]) -> None:
    from correctnet.report.style import BLUE, GREY, ORANGE

    unit = "weights_per_s" if rows[0]["work"] == "noise" else "images_per_s"
    ours, plain = _by_precision(rows, "precision"), _by_precision(rows, "plain_precision")
    best = {row["precision"]: row for row in rows if row["against"] == "best"}
    labels = [*(f"engine, {p}" for p in ours), *(f"plain, {p}" for p in plain)]
    rates = [*(row[unit] for row in ours.values()), *(row[f"plain_{unit}"] for row in plain.values())]
    bars = ax.barh(labels, rates, color=[BLUE] * len(ours) + [ORANGE] * len(plain), height=0.65)
    texts = [_short(rate) for rate in rates]
    for i, p in enumerate(ours):
        texts[i] += f" ({best[p]['ratio']:.1f}×)"
    for text in ax.bar_label(bars, texts, padding=4, fontsize=8):
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8})
    for i, row in enumerate(ours.values()):
        if row["fraction_of_limit"]:
            ax.vlines(row["limit_images_per_s"], i - 0.4, i + 0.4, color=GREY, linewidth=2, label="" if i else "limit")
    ax.invert_yaxis()
    ax.margins(x=0.3)
    ax.grid(axis="y", visible=False)
    ax.set_axisbelow(True)
    ax.xaxis.set_major_formatter(lambda rate, _: _short(rate))
    of_what = "weights/s on one thread" if unit == "weights_per_s" else "images/s"
    ax.set(title=rows[0]["work"], xlabel=f"{of_what} (× the best plain PyTorch)")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="lower right")


def _draw_scaling(rows: list[Row]) -> Figure:
    """Draw the measured points over samples, images and threads, each with a line through the origin."""
    import matplotlib.pyplot as plt

    from correctnet.report.style import BLUE, GREY

    figure, axes = plt.subplots(1, 3, figsize=(9.6, 2.9))
    fixed = {"samples": ("images", "threads"), "images": ("chips", "threads"), "threads": ("chips", "images")}
    for ax, axis in zip(axes, fixed, strict=True):
        of_axis = [row for row in rows if row["axis"] == axis]
        xs = [row["chips" if axis == "samples" else axis] for row in of_axis]
        value = "images_per_s" if axis == "threads" else "seconds"
        ys = [row[value] for row in of_axis]
        slope = ys[0] / xs[0] if axis == "threads" else ys[-1] / xs[-1]
        ax.plot([0, xs[-1]], [0, slope * xs[-1]], color=GREY, linestyle="--", label="proportional")
        ax.plot(xs, ys, color=BLUE, marker="o", markersize=4, linestyle="", label="measured")
        ax.set(xlabel="chip samples" if axis == "samples" else axis, ylabel=value.replace("_per_", "/"), ylim=(0, None))
        ax.set_title(", ".join(f"{of_axis[0][name]:,} {name}" for name in fixed[axis]), fontsize=8)
        ax.yaxis.set_major_formatter(lambda y, _: _short(y) if y >= 10 else f"{y:g}")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend()
    return figure


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
