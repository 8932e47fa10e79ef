"""Short trainings of compensators with changed settings, compared on validation images: tables of reproduction.md.

    python docs/trials.py MODEL --dataset cifar10 --filters conv1.layer=64 --filters conv2.layer=64 --images 8000 \\
        'learning_rate=1e-3 epochs=4' 'learning_rate=1e-3 batch=128 epochs=4' --out trials.csv

MODEL is the output of a stage (suppress, pretrain, inject). Each quoted argument is a trial: fields of
`correctnet.settings.Compensate`. Seed 0, sigma 0.5; all trials use the same chips and images. The first row of the CSV
is the model without compensation.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch

from correctnet import LogNormalVariation, convert, evaluate
from correctnet.datasets import loading
from correctnet.files.storage import training_data, write_csv
from correctnet.methods.compensation import overhead
from correctnet.methods.compensation_training import prepare, trained_parameters
from correctnet.noise import streams
from correctnet.pipeline.models import read_network
from correctnet.sections import validate
from correctnet.settings import Compensate
from correctnet.training.loop import fit


def _value(text: str) -> Any:
    """Parse a setting's value: a number, true, false or null, else text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


@click.command()
@click.argument("model", type=Path)
@click.argument("trials", nargs=-1, required=True)
@click.option("--dataset", required=True)
@click.option("--filters", multiple=True, required=True, metavar="LAYER=M", help="Generator filters of a layer.")
@click.option("--images", default=5000, help="Training images.")
@click.option("--validation", default=1000, help="Validation images.")
@click.option("--chips", default=30)
@click.option("--augment", default="none")
@click.option("--precision", default="bfloat16", help="Of training and simulation.")
@click.option("--threads", default=1)
@click.option("--out", type=Path, required=True)
def main(
    model: Path,
    trials: tuple[str, ...],
    dataset: str,
    filters: tuple[str, ...],
    images: int,
    validation: int,
    chips: int,
    augment: str,
    precision: str,
    threads: int,
    out: Path,
) -> None:
    torch.set_num_threads(threads)
    network, description = read_network(model)
    made = training_data(description)
    if made.get("dataset", dataset) != dataset:
        raise click.UsageError(f"--dataset {dataset}: {model} was trained on {made['dataset']}")
    # Hold out the images that were held out when the model was trained.
    loaded = loading.load(dataset, validation=made.get("validation", 0.1), seed=made.get("seed", 0))
    train, judged = loaded.train.take(images), loaded.validation.take(validation)
    plan = {name: int(m) for name, m in (item.split("=") for item in filters)}
    variation = LogNormalVariation(0.5)
    rows: list[dict[str, Any]] = []

    def judge(trial: str, analog: torch.nn.Module, added: float, seconds: float) -> None:
        first = streams.chips("validation", chips).start
        result = evaluate(analog, judged, chips, start=first, precision=precision, progress=False)
        row = {"trial": trial, "training_images": images, "overhead": added, "seconds": round(seconds, 1)}
        rows.append(row | {"mean": result.mean, "std": result.std, "chips": chips, "validation_images": len(judged)})
        write_csv(out, pd.DataFrame(rows))
        click.echo(f"{result.mean:.2%} +- {100 * result.std:.2f}  {trial}")

    judge("not compensated", convert(network, variation, 0), 0.0, 0.0)
    for trial in trials:
        fields = {key: _value(text) for key, text in (item.split("=", 1) for item in trial.split())}
        section = validate(Compensate, {"precision": precision, "epochs": 1, **fields}, trial)
        analog, _, hooks = prepare(network, plan, section, variation, 0)
        hooks.augment = augment
        trained = trained_parameters(analog, section)
        began = time.monotonic()
        fit(analog, train, section, 0, stage="fit_compensators", parameters=trained, hooks=hooks, quiet=True)
        judge(trial, analog, overhead(network, plan), time.monotonic() - began)


if __name__ == "__main__":
    main()
