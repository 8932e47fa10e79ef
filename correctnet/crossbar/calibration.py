"""Ranges of converters, found on calibration images, and what they clip.

analog = convert(network, device)
add_converters(analog, Converters(dac_bits=8, adc_bits=8), images)
clipped(analog, images, sample=0)         # fractions of inputs and outputs beyond the ranges, by layer
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from correctnet.crossbar.convert import chip_of, programmed
from correctnet.crossbar.converters import Converters, Periphery, Quantizer
from correctnet.crossbar.layers import AnalogConv2d, AnalogLayer, AnalogLinear, analog_layers, analog_names
from correctnet.crossbar.probe import left_alone, run
from correctnet.datasets.inputs import Inputs
from correctnet.errors import UserError
from correctnet.files import storage
from correctnet.reloading import survives_reload

BINS = 4096  # of a histogram of magnitudes: a range is found to within 1 / 4096 of the largest magnitude
CLIPPED = 0.01  # a larger fraction is worth a warning
BATCH = 100  # images in a forward pass

Ranges = dict[str, tuple[float, float]]
"""by layer, the largest magnitudes of inputs and outputs that are not clipped"""
Equip = Callable[[nn.Module], object]
"""what is done to a network once it is converted, such as adding converters"""


def equipped(analog: nn.Module, equip: Equip | None) -> nn.Module:
    """Return a converted network, equipped where anything is given for that."""
    if equip is not None:
        equip(analog)
    return analog


@survives_reload
class ClippingWarning(UserWarning):
    """Converters clip more than 1 % of what a layer reads or computes."""


def add_converters(
    model: nn.Module,
    converters: Converters | None,
    images: Tensor | Inputs | None = None,
    ranges: Mapping[str, tuple[float, float]] | str | Path | None = None,
) -> Ranges:
    """Give each analog layer of a converted network a DAC before its inputs and an ADC behind its outputs.

    They are in use while a chip is programmed: with nominal weights the network is digital. Biases are added behind the
    ADC. The ranges are those of all inputs of a layer, and of all outputs, without the bias: they cover the `quantile`
    of the magnitudes on the images, with nominal weights and without converters. Copies and pickles of the network keep
    its converters; a further call replaces them.

    Args:
        model: from `correctnet.convert`; its analog layers are linear or two-dimensional convolutions.
        converters: their resolution; None, or one without any bits: no converters.
        images: calibration images, (N >= 1, ...), or several inputs; images of the training set.
        ranges: instead of images, what this function has returned, or `ranges_of`; or the path of a model that
            `correctnet.save`, or a stage that trains with converters, has written.

    Returns:
        The ranges, by name of the layer.

    Raises:
        UserError: a model that was not converted, another kind of layer, not one of images and ranges, a layer that the
            images do not reach, or in which all inputs or outputs are 0, ranges that do not fit the model, or a file
            without ranges.
    """
    if not converters:
        chip_of(model)
        for own in analog_layers(model):
            own.periphery = None
        return {}
    layers = _layers(model)
    if (images is None) == (ranges is None):
        raise UserError("converters: calibration images are expected, or ranges")
    if isinstance(ranges, str | Path):
        ranges = _saved_ranges(ranges)
    found = _calibrated(model, layers, images, converters.quantile) if ranges is None else dict(ranges)
    if set(found) != set(layers):
        odd = sorted(set(found) ^ set(layers))[0]
        raise UserError(f"converters: {odd!r} is {'no analog layer' if odd in found else 'a layer without ranges'}")
    made = {name: _periphery(name, converters, found[name]) for name in layers}
    for name, layer in layers.items():
        layer.periphery = made[name]
    return found


def _saved_ranges(path: str | Path) -> Ranges:
    """Return the ranges that are saved with a model."""
    file = storage.model_files(path)[1]
    saved = storage.read_json(file)
    ranges = (saved.get("converters") or {}).get("ranges") if isinstance(saved, dict) else None
    pairs = ranges.values() if isinstance(ranges, dict) else [None]
    if not all(isinstance(p, list) and len(p) == 2 and all(isinstance(n, int | float) for n in p) for p in pairs):
        raise UserError(f"converters: {file} holds no ranges of converters")
    return {name: tuple(pair) for name, pair in ranges.items()}


def _layers(model: nn.Module) -> dict[str, AnalogLayer]:
    """Return the analog layers of a network by name. Raises UserError for kinds that have no converters."""
    chip_of(model)
    names = analog_names(model)
    found = {}
    for own in analog_layers(model):
        if not isinstance(own, AnalogLinear | AnalogConv2d):
            raise UserError(
                f"converters: {names[id(own)]} is a {own.owner.plain.__name__}; linear layers and two-dimensional "
                "convolutions can have converters"
            )
        found[names[id(own)]] = own
    return found


def _periphery(name: str, converters: Converters, ranges: tuple[float, float]) -> Periphery:
    """Return the converters of a layer."""
    made = []
    for what, bits, limit in zip(
        ("inputs", "outputs"), (converters.dac_bits, converters.adc_bits), ranges, strict=True
    ):
        if bits is not None and limit == 0:
            raise UserError(f"converters: all {what} of {name or 'the layer'} are 0 on the calibration images")
        made.append(None if bits is None else Quantizer(bits, float(limit)))
    return Periphery(*made)


@contextmanager
def without_converters(*models: nn.Module) -> Iterator[None]:
    """Take the converters off networks for the length of a block."""
    layers = [own for model in models for own in analog_layers(model)]
    before = [own.periphery for own in layers]
    try:
        for own in layers:
            own.periphery = None
        yield
    finally:
        for own, periphery in zip(layers, before, strict=True):
            own.periphery = periphery


def ranges_of(model: nn.Module) -> Ranges:
    """Return the ranges of a network's converters, by name of the layer; 0 where there is none."""
    names = analog_names(model)
    found = {names[id(own)]: own.periphery for own in analog_layers(model) if own.periphery is not None}
    return {
        name: tuple(0.0 if part is None else part.limit for part in (own.dac, own.adc)) for name, own in found.items()
    }


def clipped(model: nn.Module, images: Tensor | Inputs, sample: int = 0, first_layer: int = 0) -> Ranges:
    """Return the fractions of inputs and outputs of each layer that its converters clip on a chip.

    Args:
        model: with converters; it is left as it is.
        images: (N >= 1, ...), or several inputs.
        sample: number of the chip.
        first_layer: layers of a smaller index are nominal and have no converters in use.

    Returns:
        (fraction of inputs, fraction of outputs) by name of the layer; layers without converters are left out.

    Raises:
        UserError: a model that was not converted, or that cannot run on the images.
    """
    chip_of(model)
    names = analog_names(model)
    layers = {
        names[id(own)]: own
        for own in analog_layers(model)
        if own.periphery is not None and own.layer_index >= first_layer
    }
    counts = {name: [[0, 0], [0, 0]] for name in layers}

    def count(name: str, what: int, values: Tensor, quantizer: Quantizer | None) -> None:
        if quantizer is not None:
            counts[name][what][0] += int(quantizer.clips(values).sum())
        counts[name][what][1] += values.numel()

    with left_alone(model), programmed(model, sample, first_layer), _watched(layers, count):
        _run(model, images)
    return {name: tuple(bad / max(1, total) for bad, total in both) for name, both in counts.items()}


def most_clipped(fractions: Ranges) -> float:
    """Return the largest of the fractions that `clipped` returns; 0 without any."""
    return max((part for both in fractions.values() for part in both), default=0.0)


def warn_of_clipping(model: nn.Module, images: Tensor | Inputs, sample: int = 0, first_layer: int = 0) -> None:
    """Warn where the converters of a network clip more than 1 % of a layer's inputs or outputs; arguments of `clipped`.

    Warns:
        ClippingWarning: with the layers and fractions.
    """
    if all(own.periphery is None for own in analog_layers(model)):
        return
    lost = [
        f"{part:.1%} of the {what} of {name or 'the layer'}"
        for name, both in clipped(model, images, sample, first_layer).items()
        for what, part in zip(("inputs", "outputs"), both, strict=True)
        if part > CLIPPED
    ]
    if lost:
        warnings.warn(
            f"converters clip {', '.join(lost)} (chip {sample}); calibrate with other images or a larger quantile",
            ClippingWarning,
            stacklevel=4,
        )


class _Watched(Periphery):
    """The converters of a layer that report what they are given."""

    def __init__(self, own: Periphery, report: Callable[[int, Tensor, Quantizer | None], None]):
        super().__init__(own.dac, own.adc)
        object.__setattr__(self, "report", report)

    def inputs(self, x: Tensor) -> Tensor:
        """See `Periphery.inputs`."""
        self.report(0, x, self.dac)
        return super().inputs(x)

    def outputs(self, sums: Tensor) -> Tensor:
        """See `Periphery.outputs`."""
        self.report(1, sums, self.adc)
        return super().outputs(sums)


@contextmanager
def _watched(layers: Mapping[str, AnalogLayer], report: Callable[..., None]) -> Iterator[None]:
    """Report (name, 0 or 1, values, converter) of inputs and outputs for the length of a block."""
    before = {name: layer.periphery for name, layer in layers.items()}

    def own(name: str) -> Callable[..., None]:
        return lambda what, values, quantizer: report(name, what, values, quantizer)

    try:
        for name, layer in layers.items():
            layer.periphery = _Watched(before[name], own(name))
        yield
    finally:
        for name, layer in layers.items():
            layer.periphery = before[name]


@torch.no_grad()
def _calibrated(
    model: nn.Module, layers: Mapping[str, AnalogLayer], images: Tensor | Inputs, quantile: float
) -> Ranges:
    """Return the ranges that the images give, from a pass for the largest magnitudes and one for their histograms."""
    largest = {name: [0.0, 0.0] for name in layers}
    counts = {name: [torch.zeros(BINS, dtype=torch.float64) for _ in range(2)] for name in layers}
    seen: set[str] = set()

    def note_largest(name: str, what: int, values: Tensor) -> None:
        seen.add(name)
        top = float(values.abs().max()) if values.numel() else 0.0
        if not top < float("inf"):
            raise UserError(f"converters: {name or 'the layer'} has values that are not finite on calibration images")
        largest[name][what] = max(largest[name][what], top)

    def count(name: str, what: int, values: Tensor) -> None:
        if top := largest[name][what]:
            counts[name][what] += torch.histc(values.abs().float(), BINS, 0.0, top).double().cpu()

    if len(images) == 0:
        raise UserError("converters: no calibration images")
    with left_alone(model), programmed(model, None):
        for record in (note_largest, count):
            with _hooked(layers, record):
                _run(model, images)
    if unseen := sorted(set(layers) - seen):
        raise UserError(f"converters: {unseen[0]} is not called as a layer, so that it has no inputs to convert")
    return {
        name: tuple(
            _quantile(histogram, top, quantile) for histogram, top in zip(counts[name], largest[name], strict=True)
        )
        for name in layers
    }


def _quantile(histogram: Tensor, top: float, quantile: float) -> float:
    """Return the upper end of the first bin up to which the quantile of all values lies."""
    if top == 0 or quantile == 1:
        return top
    covered = histogram.cumsum(0) / histogram.sum()
    return top * (int((covered < quantile).sum()) + 1) / BINS


@contextmanager
def _hooked(layers: Mapping[str, AnalogLayer], record: Callable[[str, int, Tensor], Any]) -> Iterator[None]:
    """Record (name, 0, inputs) and (name, 1, outputs without bias) of each layer for the length of a block."""

    def hook(name: str) -> Callable[..., None]:
        def after(layer: AnalogLayer, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Tensor) -> None:
            (x,) = (*args, *kwargs.values())
            record(name, 0, x)
            record(name, 1, outputs if layer.bias is None else outputs - layer.along_outputs(layer.bias))

        return after

    handles = [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(model: nn.Module, images: Tensor | Inputs) -> None:
    device = next(model.parameters()).device
    with torch.no_grad():
        for part in images.split(BATCH):
            run(model, part.to(device), "converters")
