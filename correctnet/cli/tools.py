"""The commands around the pipeline: data, configuration, machine, models, progress and throughput."""

from __future__ import annotations

import json
from pathlib import Path

import click

from correctnet.cli.options import PATH, data_option
from correctnet.datasets import DATASETS
from correctnet.errors import UserError
from correctnet.files import storage
from correctnet.pipeline.config import Config


@click.command()
@click.argument("name", type=click.Choice(list(DATASETS)))
@data_option
def fetch(name: str, data_dir: Path | None) -> None:
    """Download a data set if it is missing."""
    from correctnet.datasets import loading

    loading.fetch(name, data_dir)


@click.command("new")
@click.argument("folder", type=PATH)
def new_study(folder: Path) -> None:
    """Write a small study into the new FOLDER: config.yaml, a network, data, and the workflow that runs them."""
    import shlex

    from correctnet.pipeline import study

    study.new(folder)
    click.echo(f"{folder}: a study that runs as it is: cd {shlex.quote(str(folder))} && snakemake --cores 2")


@click.command()
@click.argument("configs", type=PATH, nargs=-1)
@click.option("--run", help="Also print an estimate of the time that this run takes.")
def check(configs: tuple[Path, ...], run: str | None) -> None:
    """Check config.yaml, or CONFIGS, each merged over those before it as by `snakemake --configfile`."""
    configs = configs or (Path("config.yaml"),)
    config = " + ".join(map(str, configs))
    loaded = Config.load(*configs)
    click.echo(f"{config}: {len(loaded.pairs)} pairs, {len(loaded.rows)} rows, no mistakes")
    for name in loaded.runs:
        try:
            loaded.level_of(name)
        except UserError as error:
            if name == run:
                raise
            click.echo(f"{config}: {error}; each pair can be run, this table not")
    if run:
        from correctnet.machine import available_cpus
        from correctnet.pipeline import estimate

        click.echo(estimate.report(loaded, run, available_cpus()))


@click.command()
@click.argument("results", type=PATH, envvar="CORRECTNET_RESULTS", default=Path("results"))
def progress(results: Path) -> None:
    """Print the latest line of progress of each job that runs into the folder RESULTS."""
    from correctnet.pipeline.head import running

    lines = [f"{job}: {line}" for job, line, _ in running(results)]
    click.echo("\n".join(lines) or f"{results}: no job has reported progress in the last minutes")


@click.command()
@click.argument("model", type=PATH, required=False)
def info(model: Path | None) -> None:
    """Describe this machine's kernels, and which layers of MODEL (of any stage) the C++ core runs."""
    import platform

    import torch

    from correctnet import __version__, machine
    from correctnet.noise import core, device
    from correctnet.pipeline.stages.evaluation import describe_engine

    status = core.status(check=False)
    click.echo(f"correctnet {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    click.echo(f"CPU: {machine.cpu_name()}, {machine.available_cpus()} usable")
    if status.built:
        missing = [isa for isa in status.compiled if isa not in status.available]
        click.echo(f"C++ core: compiled for {', '.join(status.compiled)}")
        click.echo(f"  this CPU has {', '.join(status.available)}; it lacks {', '.join(missing) or 'none of them'}")
        click.echo(f"  in use: {status.isa}, {status.reason}")
        if status.problem:
            click.echo(f"  it computes {status.problem}")
    else:
        click.echo(f"C++ core: {status.reason}; numpy draws the noise and torch runs the networks")
    gpu = device.status()
    click.echo(f"CUDA kernels: {'' if gpu.usable or not gpu.built else 'built, but '}{gpu.reason}")
    if torch.cuda.is_available():
        click.echo(f"  GPU: {torch.cuda.get_device_name()}")
    if model is not None:
        click.echo(describe_engine(model))


@click.command()
@click.argument("model", type=PATH)
def show(model: Path) -> None:
    """Describe a model: its network, compensation, overhead and history."""
    from correctnet.pipeline.models import read_network

    click.echo(json.dumps(read_network(model)[1], indent=2))


@click.command()
@click.option(
    "--work",
    "works",
    type=click.Choice(["lenet5-250x10000", "vgg16-8x2000", "vgg16-64x64", "vgg16-250x10000", "noise"]),
    multiple=True,
    help="Workload to measure; may be repeated.  [default: all]",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="With cuda: its own workloads, the crossover of the engine's methods, and training.",
)
@click.option("--scaling", is_flag=True, help="Also measure cost against samples, images and threads.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Measurements of each side.")
@click.option("--threads", type=click.IntRange(1), help="At most this many CPU threads.  [default: all]")
@click.option("--full", is_flag=True, help="Run plain loops over all chips, not only for ten seconds.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of images, weights and chips.")
@click.option("--json", "json_file", type=PATH, help="JSON file to write, with all measurements.")
@click.option("--plot", type=PATH, help="Plot to write (.png, .svg, ...); with --scaling a second one beside it.")
def bench(
    works: tuple[str, ...],
    device: str,
    scaling: bool,
    rounds: int,
    threads: int | None,
    full: bool,
    seed: int,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Measure the Monte Carlo engine against the best loops in plain PyTorch on this machine."""
    import matplotlib

    matplotlib.use("Agg")  # no window, no display
    from correctnet.bench import cpu as benchmark
    from correctnet.bench import report
    from correctnet.machine import available_cpus, set_threads

    if json_file is not None:
        storage.check_writable(json_file)
    if plot is not None:
        report.check_plot(plot)

    def log(text: str) -> None:
        click.echo(text, err=True)

    if device == "cuda":
        from correctnet.bench import gpu as bench_gpu

        if plot is not None or scaling:
            raise UserError("bench --device cuda: --plot and --scaling are for the CPU's measurements")
        if unknown := [work for work in works if work not in bench_gpu.WORKLOADS]:
            raise UserError(
                f"bench --device cuda: {unknown[0]} is measured on the CPU (here: {', '.join(bench_gpu.WORKLOADS)})"
            )
        few = bool(works)
        measured = bench_gpu.measure(
            works or tuple(bench_gpu.WORKLOADS), training=not few, crossover=not few, rounds=rounds, seed=seed, log=log
        )
        click.echo(bench_gpu.table(measured))
        if json_file is not None:
            storage.write_json(json_file, measured)
        return
    if unknown := [work for work in works if work not in benchmark.WORKLOADS and work != "noise"]:
        raise UserError(f"bench: {unknown[0]} is measured on a GPU (--device cuda)")
    set_threads(threads or available_cpus())
    measured = benchmark.measure(
        [work for name, work in benchmark.WORKLOADS.items() if not works or name in works],
        noise=not works or "noise" in works,
        scaling=scaling,
        rounds=rounds,
        full=full,
        seed=seed,
        log=log,
    )
    click.echo(report.table(measured))
    if json_file is not None:
        storage.write_json(json_file, measured)
    if plot is not None:
        report.plot(measured, plot)
