"""How far float32 is from float64 on chips of networks with random weights: torch, the core, and chance.

    python docs/precision.py results/reference/precision/chips.csv [--chips 48] [--networks resnet18 ...]

Needs torchvision, which correctnet does not depend on. Weights and BatchNorms are random, so that the networks amplify
rounding, some chips by a thousand times more than others. For each chip, the largest error of the outputs of a batch
of images over the largest output, against the same network in float64, of

    torch          contiguous
    channels_last  torch, whose kernels add in another order there
    engine         the C++ core
    unfused        the core's convolutions, with every BatchNorm and what follows it by torch
    chance_median  float64 in which the output of every layer is multiplied by 1 + e, with independent e of the standard
    chance_most    deviation 2^-24 each; of eight such runs. What ideal float32 arithmetic could give on this chip.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn

from correctnet import LogNormalVariation, convert
from correctnet.crossbar.layers import analog_layers
from correctnet.engine import engine
from correctnet.noise import draw

SIGMA, SIZE, IMAGES, RUNS = 0.5, 64, 8, 8
COLUMNS = ("network", "chip", "largest", "torch", "channels_last", "engine", "unfused", "chance_median", "chance_most")


def build(name: str) -> nn.Module:
    """A torchvision network with random weights, its BatchNorms' statistics those of random images."""
    library = torch.library.Library("torchvision", "FRAGMENT")  # what its import asks for beside a torch without CUDA
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(64, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5)))
    return model.eval()


def chip_of(model: nn.Module, analog: nn.Module, chip: int) -> nn.Module:
    """The network with the weights of a chip."""
    names, twin = {id(m): n for n, m in analog.named_modules()}, copy.deepcopy(model)
    for layer in analog_layers(analog):
        weight = twin.get_submodule(names[id(layer)]).weight
        weight.data = draw.noisy_weight(weight, 0, layer.layer_index, chip, SIGMA)
    return twin


def perturbed(model: nn.Module, x: Tensor, seed: int) -> Tensor:
    """The outputs where every layer's output is off by 2^-24 of itself, at random."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output * (1 + 2.0**-24 * torch.randn(output.shape, generator=generator, dtype=output.dtype))

    leaves = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))]
    hooks = [m.register_forward_hook(disturb) for m in leaves]
    try:
        return model(x)
    finally:
        for hook in hooks:
            hook.remove()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--chips", type=int, default=48)
    parser.add_argument("--networks", nargs="+", default=["regnet_y_400mf", "mobilenet_v3_small"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    engine.CHECK_TOLERANCE = float("inf")  # what is measured here
    x = torch.randn(IMAGES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    with args.out.open("w", newline="", encoding="utf-8") as file, torch.no_grad():
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for name in args.networks:
            model = build(name)
            analog = convert(model, LogNormalVariation(SIGMA), 0)
            fused = engine.Engine(analog, x)
            apart = copy.deepcopy(analog)
            for module in apart.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.register_forward_hook(lambda *_: None)  # what has a hook is torch's
            unfused = engine.Engine(apart, x)
            for chip in range(args.chips):
                on_chip = chip_of(model, analog, chip)
                exact = copy.deepcopy(on_chip).double()
                wanted = exact(x.double())
                largest = wanted.abs().max().item()

                def error(found: Tensor, wanted: Tensor = wanted, largest: float = largest) -> float:
                    return (found.double() - wanted).abs().max().item() / largest

                last = {"memory_format": torch.channels_last}
                errors = [error(on_chip(x)), error(copy.deepcopy(on_chip).to(**last)(x.contiguous(**last)))]
                errors += [error(core.outputs(x, [chip])[0]) for core in (fused, unfused)]
                chance = [error(perturbed(exact, x.double(), seed)) for seed in range(RUNS)]
                numbers = [largest, *errors, statistics.median(chance), max(chance)]
                rows.writerow([name, chip, *(f"{number:.3g}" for number in numbers)])
                file.flush()


if __name__ == "__main__":
    main()
