"""The commands of the stages, in the order of the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from correctnet.cli.options import PATH, name_values, runtime_options, settings_options
from correctnet.sections import exact
from correctnet.settings import Settings

if TYPE_CHECKING:
    from correctnet.pipeline.runtime import Runtime

out_option = click.option("--out", type=PATH, required=True, help="Folder for the result.")
pretrained_option = click.option("--pretrained", type=PATH, required=True, help="Model of `pretrain`.")
base_option = click.option(
    "--base", type=PATH, required=True, help="Model to add to: of `suppress`, or of `pretrain` or `inject`."
)


@click.command()
@settings_options("pretrain")
@runtime_options
@out_option
def pretrain(settings: Settings, runtime: Runtime, out: Path) -> None:
    """Train the network without any method."""
    from correctnet.pipeline import stages

    stages.pretrain(settings, out, runtime)


@click.command()
@settings_options("suppress")
@runtime_options
@pretrained_option
@out_option
def suppress(settings: Settings, runtime: Runtime, pretrained: Path, out: Path) -> None:
    """Train under the modified Lipschitz regulariser, (10) and (11) of the paper."""
    from correctnet.pipeline import stages

    stages.suppress(settings, pretrained, out, runtime)


@click.command()
@settings_options("inject")
@runtime_options
@pretrained_option
@out_option
def inject(settings: Settings, runtime: Runtime, pretrained: Path, out: Path) -> None:
    """Variation-aware training: train on with variation injected into all weights (a baseline without overhead)."""
    from correctnet.pipeline import stages

    stages.inject(settings, pretrained, out, runtime)


@click.command()
@settings_options("distil")
@runtime_options
@pretrained_option
@out_option
def distil(settings: Settings, runtime: Runtime, pretrained: Path, out: Path) -> None:
    """Train on with variation in all weights, and with the original network as a teacher (a baseline)."""
    from correctnet.pipeline import stages

    stages.distil(settings, pretrained, out, runtime)


@click.command()
@settings_options("moments")
@runtime_options
@pretrained_option
@out_option
def moments(settings: Settings, runtime: Runtime, pretrained: Path, out: Path) -> None:
    """Train on with the moments of what variation does, instead of chips (a baseline)."""
    from correctnet.pipeline import stages

    stages.moments(settings, pretrained, out, runtime)


@click.command()
@settings_options("sidepath")
@runtime_options
@base_option
@out_option
def sidepath(settings: Settings, runtime: Runtime, base: Path, out: Path) -> None:
    """Train digital paths beside analog layers, with variation and all else frozen (a baseline)."""
    from correctnet.pipeline import stages

    stages.sidepath(settings, base, out, runtime)


@click.command()
@settings_options("sweep")
@runtime_options
@pretrained_option
@base_option
@out_option
def sweep(settings: Settings, runtime: Runtime, pretrained: Path, base: Path, out: Path) -> None:
    """Find the candidate layers: variation from the last layer backwards."""
    from correctnet.pipeline import stages

    stages.sweep(settings, pretrained, base, out, runtime)


@click.command()
@settings_options("sensitivity")
@runtime_options
@click.option("--model", type=PATH, required=True, help="Model of any stage.")
@click.option("--out", type=PATH, required=True, help="CSV file to write, one row per layer and chip.")
def sensitivity(settings: Settings, runtime: Runtime, model: Path, out: Path) -> None:
    """Measure the accuracy lost with variation in one layer alone, for each layer of a model."""
    from correctnet.pipeline import stages

    stages.sensitivity(settings, model, out, runtime)


@click.command()
@settings_options("search")
@runtime_options
@base_option
@click.option("--candidates", type=PATH, required=True, help="candidates.json of `sweep`.")
@click.option("--limit", type=float, default=0.03, show_default=True, help="Overhead allowed, a fraction.")
@click.option("--known", type=PATH, multiple=True, help="A state scored with --state; may be repeated.")
@click.option(
    "--state",
    type=click.IntRange(0),
    help="Score only this one (from 0) of the states that the search needs next; --out is its JSON file.",
)
@out_option
def search(
    settings: Settings,
    runtime: Runtime,
    base: Path,
    candidates: Path,
    limit: float,
    known: tuple[Path, ...],
    state: int | None,
    out: Path,
) -> None:
    """Search where to compensate and with how many filters, within one overhead limit."""
    from correctnet.pipeline import stages

    if state is None:
        stages.search(settings, base, candidates, limit, out, runtime, known)
    else:
        stages.search_state(settings, base, candidates, limit, known, state, out, runtime)


@click.command()
@settings_options("compensate")
@runtime_options
@base_option
@click.option("--found", type=PATH, required=True, multiple=True, help="best.json of `search`; may be repeated.")
@out_option
def compensate(settings: Settings, runtime: Runtime, base: Path, found: tuple[Path, ...], out: Path) -> None:
    """Train the compensators of the best state that the searches found."""
    from correctnet.pipeline import stages

    stages.compensate(settings, base, found, out, runtime)


@click.command()
@settings_options("finetune")
@runtime_options
@click.option("--compensated", type=PATH, required=True, help="Model of `compensate`.")
@out_option
def finetune(settings: Settings, runtime: Runtime, compensated: Path, out: Path) -> None:
    """Train analog weights and compensators together, with variation in the former (beyond the paper)."""
    from correctnet.pipeline import stages

    stages.finetune(settings, compensated, out, runtime)


@click.command()
@settings_options("evaluate")
@runtime_options
@click.option("--model", type=PATH, required=True, help="Model of any stage.")
@click.option("--chips", type=click.IntRange(1), default=250, show_default=True, help="Chip samples.")
@click.option("--start", type=click.IntRange(0), default=0, show_default=True, help="Number of the first chip.")
@click.option("--note", multiple=True, metavar="NAME=VALUE", help="A further column of the CSV; may be repeated.")
@click.option(
    "--prefix",
    type=click.IntRange(1),
    multiple=True,
    metavar="N",
    help="With --sigma 0: also count the correct ones among the first N images; may be repeated.",
)
@click.option("--out", type=PATH, required=True, help="CSV file to write, one row per chip.")
def evaluate(
    settings: Settings,
    runtime: Runtime,
    model: Path,
    chips: int,
    start: int,
    note: tuple[str, ...],
    prefix: tuple[int, ...],
    out: Path,
) -> None:
    """Evaluate a model over chip samples: a CSV with the accuracy of each."""
    from correctnet.pipeline import stages

    notes = name_values("--note", note)
    result = stages.evaluate_chips(
        settings, model, out, runtime, chips=chips, start=start, notes=notes, prefixes=prefix
    )
    first = result.table.iloc[0]
    level = "".join(f", {key} {exact(first[key])}" for key in ("sigma", "level") if key in first)
    device = f"{first['variation']} {first['on']}s{level}, centre {first['centre']}"
    if "factor_cv" in first:  # not every device multiplies weights by a factor
        device += f": w / nominal has mean {first['factor_mean']:.3f} and coefficient of variation "
        device += f"{first['factor_cv']:.1%}"
    click.echo(f"{device}\n{result}", err=True)
