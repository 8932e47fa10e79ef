"""A device in numbers: what programming leaves, and what that means for the layers of a network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from correctnet.crossbar.layers import crossbar_layers, nominal_weight
from correctnet.devices.device import Device
from correctnet.devices.presets import PRESETS
from correctnet.devices.programming import time_text
from correctnet.files import storage
from correctnet.report.style import BLUE, ORANGE, STYLE

PARTS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
"""of the range, at which a device without levels is shown"""


def states(device: Device) -> list[tuple[float, float, float]]:
    """Return (target, mean, standard deviation) of the device's levels, or at `PARTS` of its range."""
    low, high = device.limits
    targets = device.targets or tuple(low + (high - low) * part for part in PARTS)
    mean, variance = device.programming.moments(torch.tensor(targets, dtype=torch.float64), device.noise)
    return list(zip(targets, mean.tolist(), variance.sqrt().tolist(), strict=True))


def text(device: Device) -> str:
    """Describe a device in lines: where it is from, how it is used, and its states."""
    (low, high), mapping, faults = device.limits, device.mapping, device.faults
    unit, time_seconds = device.programming.unit, device.programming.time_seconds
    lines = [f"{device.name}: {PRESETS[device.name].source if device.name in PRESETS else 'measurements'}"]
    used = [f"cell {mapping.cell}, {low:g} to {high:g} {unit}, scale by {mapping.scale}"]
    used += [f"clipped at {mapping.clip_rms:g} rms"] if mapping.clip_rms is not None else []
    used += [f"{len(device.targets)} levels"] if device.targets else []
    used += ["right after programming" if time_seconds is None else f"after {time_text(time_seconds)}"]
    used += [f"{device.noise:g} times the measured deviations"] if device.noise != 1 else []
    used += ["mean weights on the nominal ones"] if device.centre == "mean" else []
    used += [f"stuck off {faults.off:g}, on {faults.on:g}"] if faults.off or faults.on else []
    heads = f"target, {unit}", "mean", "deviation", "of the range"
    lines += [", ".join(used), "  {:>12} {:>10} {:>10} {:>13}".format(*heads)]
    for target, mean, std in states(device):
        lines.append(f"  {target:>12.5g} {mean:>10.5g} {std:>10.4g} {std / (high - low):>13.2%}")
    return "\n".join(lines)


def layers(device: Device, model: nn.Module) -> Iterator[tuple[str, float, float, float, float]]:
    """Yield (name, largest weight / rms, relative mean, relative deviation, lambda) of each conv and linear layer.

    The first number is that of the mapping, after clipping; for a scale by output their mean. The other two are
    `Variation.relative_moments`, with stuck devices among the layer's, and lambda is the bound (10) at k = 1.
    """
    for name, layer in crossbar_layers(model):
        weight = nominal_weight(layer).detach()
        if not weight.any():
            continue
        rms = weight.double().square().mean().sqrt()
        crest = (device.mapping.largest(weight.double()) / rms).mean().item()
        mean, deviation = device.relative_moments(weight)
        yield name, crest, mean, deviation, 1 / (mean + 3 * deviation)


def layers_text(device: Device, model: nn.Module) -> str:
    """Tabulate `layers`."""
    found = list(layers(device, model))
    width = max([len(name) for name, *_ in found] + [5])
    lines = [f"  {'layer':<{width}} {'w_max / rms':>12} {'mean':>8} {'deviation':>10} {'lambda':>8}"]
    for name, crest, mean, deviation, bound in found:
        lines.append(f"  {name:<{width}} {crest:>12.2f} {mean:>8.3f} {deviation:>10.3f} {bound:>8.4f}")
    return "\n".join(lines)


def plot(device: Device, out: Path) -> None:
    """Draw the deviation over the target, and mean and deviation of a weight over the nominal one."""
    low, high = device.limits
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.8))
        targets = torch.linspace(low, high, 401, dtype=torch.float64)
        _, variance = device.programming.moments(targets, device.noise)
        left.plot(targets.numpy(), 100 * variance.sqrt().numpy() / (high - low), color=BLUE)
        if device.targets:
            at = np.array(states(device))
            left.plot(at[:, 0], 100 * at[:, 2] / (high - low), "o", color=BLUE)
        left.set(xlabel=f"target, {device.programming.unit}", ylabel="deviation, % of the range", ylim=(0, None))
        x = torch.linspace(-1, 1, 401, dtype=torch.float64)
        mean, std = (m.numpy() for m in device.curve(x))
        right.plot(x.numpy(), mean, color=BLUE, label="mean")
        right.fill_between(x.numpy(), mean - std, mean + std, color=BLUE, alpha=0.2, label="± deviation")
        right.plot(x.numpy(), x.numpy(), color=ORANGE, linewidth=0.8, label="nominal")
        right.set(xlabel="nominal weight / w_max", ylabel="weight / w_max")
        right.legend()
        figure.suptitle(device.name)
        with storage.replacing(out) as temporary:
            figure.savefig(temporary, format=out.suffix.lstrip(".") or "png", dpi=200)
        plt.close(figure)
