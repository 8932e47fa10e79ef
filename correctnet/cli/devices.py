"""The command that shows a device: of a preset or of a file of measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from correctnet.cli.options import PATH
from correctnet.errors import UserError
from correctnet.files import storage


@click.command()
@click.argument("source", metavar="FILE|PRESET")
@click.argument("model", type=PATH, required=False)
@click.option("--unit", help="Unit of the states in FILE, e.g. uS, unless its header says so.")
@click.option("--time", help="Time after programming, e.g. 1h or 2d.  [default: right after it]")
@click.option(
    "--cell",
    type=click.Choice(["pair", "two-sided", "offset", "direct"]),
    help="Devices of a weight.  [default: as published; pair]",
)
@click.option("--g-min", type=float, help="Smallest state in use.  [default: the smallest measured]")
@click.option("--g-max", type=float, help="Largest state in use.  [default: the largest measured]")
@click.option("--scale", type=click.Choice(["layer", "output"]), default="layer", show_default=True)
@click.option("--clip", "--clip-rms", type=float, help="Clip weights at this multiple of their root mean square.")
@click.option("--levels", type=int, default=0, help="Number of equidistant levels.  [default: any state, or FILE's]")
@click.option("--centre", type=click.Choice(["target", "mean"]), default="target", show_default=True)
@click.option(
    "--noise", "--level", type=float, default=1.0, show_default=True, help="Multiple of the measured deviations."
)
@click.option("--stuck-off", type=float, default=0.0, help="Probability that a device is stuck at g_min.")
@click.option("--stuck-on", type=float, default=0.0, help="Probability that a device is stuck at g_max.")
@click.option("--plot", type=PATH, help="Plot to write (.png, .svg, ...).")
def device(
    source: str,
    model: Path | None,
    unit: str | None,
    time: str | None,
    cell: str | None,
    clip: float | None,
    stuck_off: float,
    stuck_on: float,
    plot: Path | None,
    **options: Any,
) -> None:
    """Show a device: its states, their deviation over its range and, for each layer of MODEL, what that means.

    PRESET is a published device (`correctnet device list` names them). FILE is a CSV file of measurements: a summary
    (level,mean,std), samples (target,measured, or one column a target) or a curve (g,std). Deviations from device to
    device and from cycle to cycle are one thing for a chip that is programmed once.
    """
    import matplotlib

    matplotlib.use("Agg")  # no window, no display
    from correctnet.bench.report import check_plot
    from correctnet.devices.device import Device
    from correctnet.devices.presets import PRESETS
    from correctnet.pipeline.models import read_network
    from correctnet.report import devices as report

    if source == "list":
        click.echo("\n".join(f"{name}: {preset.source}" for name, preset in PRESETS.items()))
        return
    if plot is not None:
        check_plot(plot)
    options["clip_rms"] = clip
    if cell is not None:
        options["cell"] = cell
    if source in PRESETS:
        if unit is not None:
            raise UserError(f"--unit: {source} is a preset, whose unit is known")
        made = Device.preset(source, time, **options)
    elif Path(source).exists() or Path(source).suffix:
        storage.check_distinct([plot] if plot else [], [Path(source)])
        made = Device.from_csv(source, unit, time, **options)
    else:
        raise UserError(f"{source}: neither a file nor a preset ({', '.join(PRESETS)})")
    made = made.stuck(stuck_off, stuck_on)
    click.echo(report.text(made))
    if model is not None:
        click.echo(report.layers_text(made, read_network(model)[0]))
    if plot is not None:
        report.plot(made, plot)
