"""What `correctnet.correct` returns: the corrected network, its accuracies, and how it was found."""

from __future__ import annotations

import base64
import html
import io
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from torch import nn

from correctnet import __version__, machine
from correctnet.errors import UserError
from correctnet.evaluation.results import NO_INTERVAL, Result
from correctnet.files import storage
from correctnet.methods.candidates import Sweep
from correctnet.methods.placement import Placement
from correctnet.metrics import ACCURACY, Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {"unprotected": "unprotected", "suppressed": "suppressed", "corrected": "corrected (CorrectNet)"}
STYLES = {"unprotected": "unprotected", "suppressed": "suppressed", "corrected": "correctnet"}
"""rows of the report's figures, by their colours"""


@dataclass(frozen=True, eq=False)
class Correction:
    """The outcome of `correctnet.correct`.

    Attributes:
        network: the corrected network, a plain `nn.Module` in evaluation mode, for `correctnet.convert` and
            `correctnet.save`.
        suppressed: the network after suppression, without compensators; None where suppression was left out.
        results: by row ("unprotected", "suppressed", "corrected"), the accuracies of all chips on the test images.
        clean: by row, the accuracy with nominal weights on the same images.
        sweep: accuracies with variation from each layer to the last, on the validation images.
        search: the layers that are compensated, their filters, and the explored states.
        judged: mean accuracies on validation chips with the compensators and without, and which were kept; None where
            no layer is compensated.
        threshold: fraction of the original network's clean accuracy from which on a chip counts for the yield.
        settings: everything that the outcome depends on apart from network and data, as a JSON object.
        metric: what accuracies stand for above, where it is not the accuracy.
    """

    network: nn.Module
    suppressed: nn.Module | None
    results: Mapping[str, Result]
    clean: Mapping[str, float]
    sweep: Sweep
    search: Placement
    judged: Mapping[str, Any] | None
    threshold: float
    settings: Mapping[str, Any]
    metric: Metric = ACCURACY

    @property
    def candidates(self) -> tuple[str, ...]:
        """Names of the candidate layers."""
        return self.sweep.candidates

    @property
    def good(self) -> float:
        """The accuracy from which on a chip counts for the yield: threshold * clean accuracy of the original.

        Of a metric of which smaller values are better, the value up to which it does: clean value / threshold.
        """
        bound = self.metric.bound(self.threshold, self.clean["unprotected"])
        return min(bound, 1.0) if self.metric.fraction else bound

    @property
    def table(self) -> pd.DataFrame:
        """One line a row: row, clean, mean, std, ci_low, ci_high, yield, overhead, layers, chips, images.

        All but the last three are fractions; with another metric than the accuracy, clean, mean, std, ci_low and
        ci_high are its values. ci_low and ci_high are the 95 % t interval of the mean; yield is the fraction of chips
        at or above `good` (at or below, where smaller is better); layers are compensated ones. One chip has no std and
        no interval.
        """
        rows = []
        for row, result in self.results.items():
            interval, corrected = result.interval(), row == "corrected"
            rows.append(
                {
                    "row": row,
                    "clean": self.clean[row],
                    "mean": result.mean,
                    "std": result.std if result.chips > 1 else None,
                    "ci_low": interval.low,
                    "ci_high": interval.high,
                    "yield": result.yield_at(self.good).estimate,
                    "overhead": self.search.overhead if corrected else 0.0,
                    "layers": len(self.search.filters) if corrected else 0,
                    "chips": result.chips,
                    "images": result.images,
                }
            )
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        lines = [
            f"{r['row']:12s} clean {self.metric.text(r['clean']):>7s}   {self._mean(r):18s} yield {r['yield']:7.2%}   "
            f"overhead {r['overhead']:.2%}"
            for r in self.table.to_dict("records")
        ]
        if not self.metric.is_accuracy:
            lines.insert(0, self.metric.name)
        chips, images = self.results["unprotected"].chips, self.results["unprotected"].images
        sign, good = ">=" if self.metric.higher else "<=", self.metric.text(self.good)
        lines.append(f"compensated: {self.search.where}; {chips} chips x {images} images; yield: {sign} {good}")
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None, what: Literal["rows", "candidates", "search"] = "rows") -> Axes:
        """Draw the outcome.

        Args:
            ax: matplotlib axes to draw on; None: those of a new figure.
            what: "rows": the accuracy of each chip, the mean with its 95 % interval, and the accuracy without
                variation, of each row; "candidates": accuracy with variation from each layer to the last, with the
                candidates (Fig. 9); "search": overhead and accuracy of the explored states (Fig. 10).

        Returns:
            The axes.

        Raises:
            UserError: another `what`.
        """
        import matplotlib.pyplot as plt  # slow to import, and needed for plots only
        from matplotlib.ticker import PercentFormatter

        from correctnet.report import figures

        sizes = {"rows": (7, 1.2 + 0.4 * len(self.results)), "candidates": (6, 3.4), "search": (6, 3.8)}
        if what not in sizes:
            raise UserError(f"plot: what must be 'rows', 'candidates' or 'search', not {what!r}")
        with plt.rc_context(figures.STYLE):
            if ax is None:
                _, ax = plt.subplots(figsize=sizes[what])
            if what != "rows" and self.metric.fraction:
                ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            if what == "candidates":
                figures.draw_sweep(ax, self.sweep.table(), self.metric)
            elif what == "search":
                limit = "any overhead" if self.search.limit is None else f"limit {self.search.limit:g}"
                figures.draw_search(ax, [(limit, self.search.log)], self.metric)
            else:
                named = {STYLES[row]: result for row, result in self.results.items()}
                labels = {STYLES[row]: LABELS[row] for row in self.results}
                figures.draw_rows(ax, named, [[self.clean[row]] for row in self.results], labels)
                ax.set(xlabel=self.metric.name)
                key = figures.rows_key()
                ax.legend(handles=key, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=len(key))
        return ax

    def report(self, path: str | Path) -> None:
        """Write the outcome as one HTML file: table, figures, the explored states, settings and versions.

        It needs no other file and no network. Raises UserError where it cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() not in (".html", ".htm"):
            raise UserError(f"report: {path}: an HTML file is written; end the name with .html")
        storage.check_writable(path)
        storage.write_text(path, self._page())

    def _page(self) -> str:
        from correctnet.report import pages

        text, spread = self.metric.text, self.metric.spread
        columns = ["", "clean", "mean ± std", "95 % CI of the mean", "yield", "overhead", "layers", "chips × images"]
        rows = [
            [
                html.escape(LABELS[r["row"]]),
                text(r["clean"]),
                f"<b>{html.escape(self._mean(r))}</b>",
                NO_INTERVAL if r["chips"] == 1 else f"{spread(r['ci_low'])} to {spread(r['ci_high'])}",
                f"{r['yield']:.1%}",
                f"{r['overhead']:.2%}",
                str(r["layers"]),
                f"{r['chips']} × {r['images']:,}",
            ]
            for r in self.table.to_dict("records")
        ]
        name, device = html.escape(self.metric.name), html.escape(_device(self.settings["variation"]))
        rule = f"{self.threshold:.0%} of the original network's"
        if not self.metric.higher:
            rule = f"the original network's divided by {self.threshold:g}"
        bound = "least" if self.metric.higher else "most"
        body = (
            f"<p>{name[0].upper() + name[1:]} under device variation ({device}) on the test images. Yield: the "
            f"fraction of chips of {_article(name)} {name} of at {bound} {text(self.good)}, {rule}.</p>\n"
        )
        body += pages.html_table(columns, rows, (0,)) + self._image("rows")
        candidates = ", ".join(self.candidates) or "none"
        body += f"<h2>Candidate layers</h2>\n<p>{html.escape(candidates)}</p>\n"
        body += self._image("candidates")
        body += f"<h2>Search</h2>\n<p>{html.escape(str(self.search))}</p>\n"
        if len(self.search.log):
            body += self._image("search")
        if self.judged is not None:
            body += (
                f"<p>The trained compensators are kept if they help: over {self.judged['chips']} chips on "
                f"{self.judged['images']} validation images the mean {name} is {text(self.judged['with'])} with "
                f"them and {text(self.judged['without'])} without.</p>\n"
            )
        versions = f"correctnet {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
        facts = {"versions": versions, "CPU": machine.cpu_name(), **self.settings}
        listed = [
            [
                f"<b>{html.escape(key)}</b>",
                f"<code>{html.escape(value if isinstance(value, str) else json.dumps(value))}</code>",
            ]
            for key, value in facts.items()
        ]
        body += "<h2>Settings</h2>\n" + pages.html_table(["", ""], listed, (0, 1))
        return pages.page(f"CorrectNet: {name} under variation", body)

    def _mean(self, row: Mapping[str, Any]) -> str:
        """Mean and deviation of a row of the table, as text."""
        mean = self.metric.text(row["mean"])
        return mean if row["chips"] == 1 else f"{mean} ± {self.metric.spread(row['std'])}"

    def _image(self, what: Literal["rows", "candidates", "search"]) -> str:
        """A plot as an HTML image."""
        import matplotlib.pyplot as plt

        from correctnet.report import figures

        ax, written = self.plot(what=what), io.BytesIO()
        with plt.rc_context(figures.STYLE):
            ax.figure.savefig(written, format="svg", metadata={"Date": None})
        plt.close(ax.figure)
        data = base64.b64encode(written.getvalue()).decode()
        return f'<p><img alt="{what}" src="data:image/svg+xml;base64,{data}"></p>\n'


def _article(name: str) -> str:
    return "an" if name[0].lower() in "aeiou" else "a"


def _device(described: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in described.items() if key not in ("mean", "cv"))
