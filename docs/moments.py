"""Whether one Gaussian with the moments of a pair stands for its two devices: accuracies of the same network on both.

    python docs/moments.py MODEL results/reference/devices/moments.csv [--chips 250] [--images 2000]

MODEL is a trained network of any stage. `matched` is what `Device` draws; `exact` draws both devices of every weight on
its own, keeps their states from being negative, and subtracts. The devices that hold a weight have the same normal
numbers in both, so the accuracies of a chip are paired.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from correctnet import Device, convert, evaluate
from correctnet.datasets import loading
from correctnet.files import storage
from correctnet.noise import specification
from correctnet.pipeline.models import read_network

IDLE = 1 << 8  # purpose of the words of a pair's idle device
DEVICES = (("pcm-nandakumar-2019", None), ("pcm-hermes-1", None), ("rram-wan-2022", "1d"), ("rram-milo-2021", None))


@dataclass(frozen=True)
class ExactPair(Device):
    """A pair whose two devices are drawn on their own."""

    def sample(self, weight: Tensor, seed: int, layer: int, sample: int) -> Tensor:
        """See `Variation.sample`; without a gradient."""
        w = weight.detach().double()
        largest, (low, high) = self.mapping.largest(w), self.limits

        def states(target: Tensor, purpose: int) -> Tensor:
            words = specification.words(seed, layer, sample, w.numel(), purpose=purpose)
            out, channels, *kernel = w.shape
            z = torch.from_numpy(specification.standard_normal(words)).double()
            mean, std = self.programming.gaussian(target)
            return (mean + std * z.view(out, *kernel, channels).movedim(-1, 1)).clamp(min=0)

        active = states(low + (high - low) * w.abs() / largest, 0)
        idle = states(torch.full_like(w, low), IDLE)
        return (w.sign() * (active - idle) * largest / (high - low)).to(weight.dtype)


def main() -> None:
    """Measure the devices, and write the differences."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--chips", type=int, default=250)
    parser.add_argument("--images", type=int, default=2000)
    args = parser.parse_args()
    network, description = read_network(args.model)
    data = loading.load(description["data"]["dataset"]).test
    split = data.images[: args.images], data.labels[: args.images]
    rows = []
    for name, time in DEVICES:
        matched = Device.preset(name, time)
        exact = ExactPair(matched.programming, matched.mapping, name=f"exact {name}")
        found = {
            kind: evaluate(convert(network, device, 0), split, args.chips, engine=engine).accuracies
            for kind, device, engine in (("matched", matched, "auto"), ("exact", exact, "torch"))
        }
        difference = found["matched"] - found["exact"]
        half = stats.t.ppf(0.975, args.chips - 1) * difference.std(ddof=1) / np.sqrt(args.chips)
        rows.append(
            {
                "device": f"{name} {time or ''}".strip(),
                **{f"{kind}_{what}": getattr(a, what)() for kind, a in found.items() for what in ("mean", "std")},
                "difference": difference.mean(),
                "low": difference.mean() - half,
                "high": difference.mean() + half,
            }
        )
        print(rows[-1], flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    storage.write_csv(args.out, pd.DataFrame(rows).assign(chips=args.chips, images=args.images))


if __name__ == "__main__":
    main()
