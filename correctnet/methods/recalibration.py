"""Recalibration of BatchNorm statistics under variation: a baseline without hardware overhead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from correctnet.crossbar.convert import programmed
from correctnet.crossbar.probe import modes_kept, run
from correctnet.errors import UserError
from correctnet.precision import Precision, products


@torch.no_grad()
def recalibrate(
    model: nn.Module, images: Tensor, samples: Sequence[int] | None = None, precision: Precision = "float32"
) -> None:
    """Replace the running mean and variance of every BatchNorm by those on `images`, in place.

    With `samples` the statistics are taken over all images on all these chips: the variance of a BatchNorm's input is

        Var[x] = mean over chips of Var[x | chip] + variance over chips of E[x | chip]

    Each BatchNorm is estimated while those before it are in evaluation mode and normalise with their new statistics, as
    in use. Over these chips and images, the output of every BatchNorm therefore has mean 0 and variance 1 before scale
    and shift. This takes part of a forward pass for each BatchNorm and chip.

    Args:
        model: from `correctnet.convert`. The mode of each module is left unchanged.
        images: (N, C, H, W), training images.
        samples: None: the chip that is programmed now, which on real hardware means measuring each chip; else these
            simulated chips, which needs no measurement.
        precision: of products, "float32" or "bfloat16" (half the time on CPUs that support it). Statistics are summed
            in float32.

    Raises:
        UserError: a model without a BatchNorm that keeps statistics, or that cannot run on the images; no images or
            empty `samples`; or, with `samples`, a BatchNorm that is called more than once in a forward pass. The
            statistics are unchanged then.
    """
    names = {m: name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    norms = [m for m in names if m.running_mean is not None]
    if not norms:
        raise UserError("recalibration: the network has no BatchNorm that keeps statistics")
    if samples is not None:
        if not isinstance(samples, Iterable):
            raise UserError(f"recalibration: samples are numbers of chips, as range(10), not {samples!r}")
        samples = list(samples)
        if not samples:
            raise UserError("recalibration: no chip samples")
    if not isinstance(images, Tensor) or len(images) == 0:
        raise UserError("recalibration: a tensor of images is expected, at least one")
    images = images.to(next(model.parameters()).device)
    if images.dim() == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    with _modes(model, norms), products(precision, images.device):
        model.eval()
        if samples is None:
            for m in norms:
                m.reset_running_stats()
                m.momentum = None  # a cumulative average
                m.train()
            run(model, images, "recalibration")
            return
        calls = _calls(model, norms, images[:1], samples[0])
        for m in (m for m in calls if calls[m] > 1):
            raise UserError(f"recalibration: BatchNorm {names[m]} is called more than once; recalibrate on the chip")
        for m in calls:  # in the order in which they are called
            mean, variance = _moments(model, m, images, samples)
            m.reset_running_stats()
            m.running_mean.copy_(mean)
            m.running_var.copy_(variance)


@contextmanager
def _modes(model: nn.Module, norms: Sequence[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    """Restore the modes of all modules and the momenta of `norms` at the end; after an error, statistics, too."""
    statistics = [(own, own.clone()) for norm in norms for own in norm.buffers()]
    momenta = [m.momentum for m in norms]
    try:
        with modes_kept(model):
            yield
    except BaseException:
        for own, value in statistics:
            own.copy_(value)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _calls(model: nn.Module, norms: Sequence[nn.Module], images: Tensor, sample: int) -> dict[nn.Module, int]:
    """Number of calls of each of `norms` in a forward pass, in the order of their first calls."""
    calls: dict[nn.Module, int] = {}

    def count(module: nn.Module, _: object) -> None:
        calls[module] = calls.get(module, 0) + 1

    hooks = [m.register_forward_pre_hook(count) for m in norms]
    try:
        with programmed(model, sample):
            run(model, images, "recalibration")
    finally:
        for hook in hooks:
            hook.remove()
    return calls


class _Reached(Exception):
    """Ends a forward pass once the input of a BatchNorm is known."""


def _moments(model: nn.Module, norm: nn.Module, images: Tensor, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance, (C,) each, of the input of `norm` over all images and chips."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].transpose(0, 1).flatten(1).float())
        raise _Reached

    means, variances, count = [], [], 0
    hook = norm.register_forward_pre_hook(stop)
    try:
        for sample in samples:
            try:
                with programmed(model, sample):
                    model(images.clone())  # a network may write into its input
            except _Reached:
                x = seen.pop()
            else:
                raise UserError("recalibration: a BatchNorm is called on some chips only; recalibrate on the chip")
            variance, mean = torch.var_mean(x, dim=1, correction=0)
            means.append(mean.double())
            variances.append(variance.double())
            count += x.shape[1]
    finally:
        hook.remove()
    between, mean = torch.var_mean(torch.stack(means), dim=0, correction=0)
    variance = (torch.stack(variances).mean(0) + between) * count / max(1, count - 1)
    return mean, variance
