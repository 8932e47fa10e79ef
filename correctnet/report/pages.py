"""HTML pages of the report: Table I, an interactive scatter plot of the search, and provenance.

Each is one self-contained file.
"""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from correctnet.methods.search_log import best_state
from correctnet.report import tables
from correctnet.report.figures import SEARCH_COLOURS, folder_name, read_table
from correctnet.sections import exact

STYLE = """
:root { color-scheme: light; }
body { font: 14px/1.45 system-ui, sans-serif; color: #222; background: #fff; margin: 1.5em; }
h1 { font-size: 1.3em; } h2 { font-size: 1.1em; margin-top: 1.6em; }
p { max-width: 60em; color: #444; }
table { border-collapse: collapse; }
th, td { padding: .3em .7em; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top;
         font-variant-numeric: tabular-nums; white-space: nowrap; }
th { border-bottom: 2px solid #888; background: #f5f5f5; }
td.text, th.text { text-align: left; white-space: normal; }
td.first { border-top: 2px solid #888; }
code { font-size: .9em; overflow-wrap: anywhere; }
summary { cursor: pointer; color: #0072b2; }
"""


def page(title: str, body: str) -> str:
    """HTML document with a title and a body."""
    title = html.escape(title)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><h1>{title}</h1>\n{body}</body></html>\n'


def html_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int], firsts: Sequence[int] = ()
) -> str:
    """HTML table of HTML cells; columns in `text` are left-aligned, rows in `firsts` begin a group."""

    def cell(tag: str, i: int, content: str, first: bool) -> str:
        names = " ".join(name for name, holds in (("text", i in text), ("first", first)) if holds)
        return f'<{tag} class="{names}">{content}</{tag}>'

    lines = ["<tr>" + "".join(cell("th", i, c, False) for i, c in enumerate(columns)) + "</tr>"]
    for number, row in enumerate(rows):
        first = number > 0 and number in firsts
        lines.append("<tr>" + "".join(cell("td", i, c, first) for i, c in enumerate(row)) + "</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>\n"


def table1(table: pd.DataFrame, sigma: float | None) -> str:
    """Page with Table I (`correctnet.report.tables.table1`), the paper's values and the differences."""
    columns = ["pair", "row", "clean", "mean ± std", "95 % CI of the mean", "mean / clean", "overhead", "layers"]
    columns += ["paper", "difference", "chips × images", "epochs", "seed"]
    rows, firsts = [], []
    for number, r in enumerate(table.to_dict("records")):
        new = number == 0 or r["pair"] != table["pair"].iloc[number - 1]
        firsts += [number] if new else []
        known, one = not pd.isna(r["paper"]), r["chips"] == 1
        rows.append(
            [
                html.escape(r["pair"]) if new else "",
                "<br>".join(html.escape(r["label"]).splitlines()),
                f"{r['clean']:.2%}",
                f"<b>{r['mean']:.2%}</b>" + ("" if one else f" ± {100 * r['std']:.2f}"),
                tables.NO_INTERVAL if one else f"{100 * r['ci_low']:.2f} to {100 * r['ci_high']:.2f}",
                "–" if pd.isna(r["ratio"]) else f"{r['ratio']:.1%}",
                f"{r['overhead']:.2%}",
                str(r["layers"]),
                f"{r['paper']:.2%}" if known else "–",
                f"{100 * r['difference']:+.2f}" if known else "–",
                f"{r['chips']} × {r['images']:,}",
                html.escape(str(r["epochs"])),
                str(r["seed"]),
            ]
        )
    clean = [
        f"{network} on {data}: clean {of} {value:.2%}"
        for of, values in (("", tables.PAPER_CLEAN), ("at most", tables.PAPER_CLEAN_AT_MOST))
        for (network, data), value in values.items()
    ]
    devices = tables.variations(table)
    if devices is None:
        under = f"lognormal variation of σ = {exact(sigma or 0)}"
    else:
        under = "; ".join(f"{html.escape(name)} ({html.escape(', '.join(of))})" for name, of in devices.items())
    note = (
        f"<p>Accuracy under {under}, over chip samples; “mean / clean” is of the "
        "clean accuracy of the original network, the row “unprotected” or the pair's first, on the same images (–: not "
        "known); the difference to the paper is "
        f"in points. The paper states values for some pairs only ({'; '.join(clean)}).</p>\n"
    )
    return page("Table I: accuracy under variation", note + html_table(columns, rows, (0, 1, 11), firsts))


def search_scatter(logs: Sequence[Path]) -> str:
    """Page with an interactive scatter plot of overhead and accuracy of the explored states (log.csv of each limit)."""
    from bokeh.embed import json_item
    from bokeh.layouts import column
    from bokeh.models import ColumnDataSource, HoverTool, PlainText, Title
    from bokeh.plotting import figure
    from bokeh.resources import Resources

    by_pair: dict[str, list[Path]] = {}
    for path in logs:
        by_pair.setdefault(folder_name(path, 2), []).append(path)
    drawn = []
    for pair, paths in by_pair.items():
        axes = {"x_axis_label": "overhead, % of the network's parameters", "y_axis_label": "validation accuracy, %"}
        plot = figure(
            title=Title(text=PlainText(pair)),  # else "$$" would begin a formula
            height=420,
            sizing_mode="stretch_width",
            tools="pan,box_zoom,wheel_zoom,reset,save",
            **axes,
        )
        for colour, path in zip(itertools.cycle(SEARCH_COLOURS), paths, strict=False):
            table = read_table(path, ["evaluation", "episode", "filters", "overhead", "mean", "std", "candidates"])
            table = table.dropna(subset=["mean"]).fillna({"std": 0.0})
            chosen = best_state(list(table["mean"]), list(table["overhead"])) if len(table) else None
            best = [i == chosen for i in range(len(table))]
            source = ColumnDataSource(
                {
                    "x": 100 * table["overhead"],
                    "y": 100 * table["mean"],
                    "low": 100 * (table["mean"] - table["std"]),
                    "high": 100 * (table["mean"] + table["std"]),
                    "marker": ["star" if b else "circle" for b in best],
                    "size": [16 if b else 9 for b in best],
                    "state": [_state(row) for row in table.to_dict("records")],
                }
            )
            label = path.parent.name.replace("limit-", "limit ")
            points = plot.scatter(
                "x", "y", source=source, marker="marker", size="size", color=colour, legend_label=label
            )
            error = {"x0": "x", "x1": "x", "y0": "low", "y1": "high", "color": colour, "alpha": 0.4}
            plot.segment(**error, source=source, legend_label=label)
            plot.add_tools(HoverTool(renderers=[points], tooltips="@state{safe}"))
        plot.legend.click_policy = "hide"
        plot.add_layout(plot.legend[0], "right")
        drawn.append(plot)
    note = (
        "<p>Every trained state: mean and standard deviation of the accuracy over chips, on validation images. A star "
        "marks the state that the search chose within each limit: the best mean, at equal means the least overhead. "
        "Hover over a state for its layers and filters, drag to move, use the tools to zoom, click the legend to hide "
        "a limit.</p>\n"
    )
    # Only the core of Bokeh: pages above 1.5 MB do not open inside the report, as browsers limit the length of data
    # URLs. Bokeh's widgets would exceed that, and so would Plotly.
    scripts = Resources(mode="inline", components=["bokeh"]).render_js()
    plots = json.dumps(json_item(column(*drawn, sizing_mode="stretch_width"), "plots")).replace("</", "<\\/")
    body = (
        f'{note}<div id="plots"></div>\n{scripts}\n<script type="application/json" id="states">{plots}</script>\n'
        '<script>Bokeh.embed.embed_item(JSON.parse(document.getElementById("states").textContent))</script>\n'
    )
    return page("States explored by the search", body)


def _state(row: dict[str, Any]) -> str:
    """Tooltip of a state: accuracy, overhead, and the filters of each compensated layer."""
    names, filters = str(row["candidates"]).split(), str(row["filters"]).split()
    chosen = [f"{name}: {m}" for name, m in zip(names, filters, strict=True) if m != "0"]
    return (
        f"<b>{row['mean']:.2%} ± {100 * row['std']:.2f}</b>, overhead {row['overhead']:.2%}<br>"
        f"episode {row['episode']}, evaluation {row['evaluation']}<br>"
        + ("generator filters:<br>" + "<br>".join(map(html.escape, chosen)) if chosen else "no compensation")
    )


def provenance(run: str, here: dict[str, Any], jobs: pd.DataFrame, seeds: Sequence[Any]) -> str:
    """Page with the provenance of a run: command, revision, versions, machine, seeds, time and memory of each job."""
    facts = {
        "command": f"<code>{html.escape(str(here['command']))}</code>",
        "revision": html.escape(str(here["revision"] or "not a git checkout")),
        "versions": html.escape(f"correctnet {here['version']}, torch {here['torch']}, Python {here['python']}"),
        "CPU": html.escape(f"{here['cpu']}; C++ core: {here['kernels']}"),
        "seeds": html.escape(", ".join(map(str, seeds))),
        "summarised": html.escape(here["started"]),
        "jobs": f"{len(jobs)}, {jobs['seconds'].sum() / 3600:.2f} hours of wall time, "
        f"at most {_number(jobs['memory_mib'].max(), 0)} MiB",
    }
    body = html_table(["", ""], [[f"<b>{key}</b>", value] for key, value in facts.items()], (0, 1))
    body += (
        "<h2>Jobs</h2>\n<p>Wall time and peak memory are those of a job's last process: a resumed training has taken "
        "longer in total, see the epochs in its log.csv. Revision and CPU are those of the job.</p>\n"
    )
    rows = [
        [
            f"<details><summary>{html.escape(r['job'])}</summary><code>{html.escape(_text(r['command']))}</code></details>",
            _number(r["seconds"], 1),
            _number(r["memory_mib"], 0),
            _number(r["cpu_seconds"] / max(r["seconds"], 1e-9), 1),
            *(html.escape(_text(r[key])) for key in ("started", "revision", "torch", "cpu")),
        ]
        for r in jobs.to_dict("records")
    ]
    columns = ["job", "seconds", "MiB", "CPUs busy", "started", "revision", "torch", "CPU"]
    return page(f"Provenance of {run}", body + html_table(columns, rows, (0, 4, 5, 6, 7)))


def _number(value: float, digits: int) -> str:
    return "–" if pd.isna(value) else f"{value:,.{digits}f}"


def _text(value: Any) -> str:
    return "–" if value is None or pd.isna(value) else str(value)
