"""Images a second of training VGG16: plain torch in its two memory orders against `correctnet.precision.products`.

    python docs/training_rate.py training.csv

A step is forward and backward of 128 random images. The ways take turns in one process; a row holds a way's median.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click
import pandas as pd
import torch
import torch.nn.functional as F

from correctnet import machine
from correctnet import precision as arithmetic
from correctnet.files.storage import write_csv
from correctnet.networks.building import build
from correctnet.noise import core

BATCH = 128


def step(size: int, channels_last: bool, ours: bool, precision: arithmetic.Precision) -> Callable[[], None]:
    """A step, ready to run."""
    order = torch.channels_last if channels_last else torch.contiguous_format
    model = build("vgg16", 100, 3).to(memory_format=order)
    images = torch.randn(BATCH, 3, size, size).contiguous(memory_format=order)
    labels = torch.arange(BATCH) % 100

    def run() -> None:
        model.zero_grad(set_to_none=True)
        plain = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
        with arithmetic.products(precision, "cpu") if ours else plain:
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()

    return run


@click.command()
@click.argument("out", type=Path)
@click.option("--threads", default=2)
@click.option("--rounds", default=5)
def main(out: Path, threads: int, rounds: int) -> None:
    torch.set_num_threads(threads)
    precisions: list[arithmetic.Precision] = ["float32"]
    if arithmetic.available("bfloat16", "cpu") == "bfloat16":
        precisions.append("bfloat16")
    rows = []
    for size in (16, 24, 32):
        for precision in precisions:
            ways = {"contiguous": (False, False), "channels_last": (True, False), "correctnet": (True, True)}
            steps = {name: step(size, *way, precision) for name, way in ways.items()}
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for turn in range(rounds + 1):
                for name, run in steps.items():
                    began = time.perf_counter()
                    run()
                    if turn:  # the first one prepares
                        seconds[name].append(time.perf_counter() - began)
            rate = {name: BATCH / median(taken) for name, taken in seconds.items()}
            best = max(rate["contiguous"], rate["channels_last"])
            for name in ways:
                row = {"size": size, "precision": precision, "way": name, "images_per_s": round(rate[name], 1)}
                rows.append(row | {"to_best_plain": round(rate[name] / best, 3)})
                print(row, f"{rate[name] / best:.2f}")
    about = {"cpu": machine.cpu_name(), "isa": core.status().isa, "threads": threads, "torch": torch.__version__}
    write_csv(out, pd.DataFrame(rows).assign(batch=BATCH, rounds=rounds, **about))


if __name__ == "__main__":
    main()
