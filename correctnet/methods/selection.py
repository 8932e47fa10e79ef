"""Choice of the weights that are protected: kept in digital memory as well, and exact on every chip.

    masks = protected_weights(network, 0.05, "fisher", data=(images, labels))
    analog = convert(network, variation)
    protect(analog, masks)

With independent factors e^theta on all weights, the expected loss grows to second order by

    E[(e^theta - 1)^2] / 2  sum_i w_i^2 H_ii,    H_ii = d^2 L / d w_i^2

so w_i^2 H_ii is what protecting weight i is worth. The Fisher information E[(dL/dw_i)^2], which one pass over labelled
images gives, takes the place of H_ii.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from correctnet.crossbar.convert import convert, program
from correctnet.crossbar.layers import analog_layers, analog_names
from correctnet.crossbar.probe import left_alone, run
from correctnet.datasets.batches import Batches, Data, check_outputs
from correctnet.devices.base import Variation
from correctnet.errors import UserError, whole
from correctnet.metrics import Loss, Metric, checked, loss_of, main_output
from correctnet.networks.blocks import original_parameters
from correctnet.noise import streams
from correctnet.settings import Allocation, Selection


class _Factors(Variation):
    """Weights times factors of value 1, whose gradients are those of the loss in the relative change of each weight."""

    def __init__(self) -> None:
        self.factors: dict[int, Tensor] = {}

    def sample(self, weight: Tensor, seed: int, layer: int, sample: int) -> Tensor:
        """See `Variation.sample`."""
        if layer not in self.factors:
            self.factors[layer] = torch.ones_like(weight).requires_grad_()
        return weight.detach() * self.factors[layer]

    def describe(self) -> dict[str, Any]:
        """See `Variation.describe`."""
        return {"model": "factors"}


def importance(
    network: nn.Module,
    data: Batches,
    *,
    loss: Loss | None = None,
    metric: Metric | None = None,
    exclude: Iterable[str] | str = (),
) -> dict[str, Tensor]:
    """Importance of each weight: w^2 E[(dL/dw)^2], the mean over images of the squared relative gradient.

    The gradients are those of the network in evaluation mode, with nominal weights and the labels of the data, image by
    image. It takes a forward and a backward pass of one image for each.

    Args:
        network: any network that `correctnet.convert` accepts.
        data: training images and labels, as in `correctnet.evaluate`.
        loss: replaces the cross entropy, as for `correctnet.fit_compensators`.
        metric: a `correctnet.Metric`, which says what labels are and may have a loss; None: the accuracy.
        exclude: names of layers that are digital, as for `correctnet.convert`.

    Returns:
        By name of the layer, or of the weight in modules with several, a float64 tensor in the shape of the weight.

    Raises:
        UserError: data, outputs or a loss that are not those of a classifier, or gradients that are not finite.
    """
    metric, device = checked(metric, "importance"), _Factors()
    own = loss_of(metric, loss, "importance")
    analog = convert(network, device, exclude=exclude)
    names = {layer.layer_index: analog_names(analog)[id(layer)] for layer in analog_layers(analog)}
    for parameter in analog.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # of a copy; frozen weights count as the others
    place = next(network.parameters()).device
    with left_alone(analog):
        found = Data.of(data, what="importance", targets=metric.targets)
        program(analog, 0)
        sums = {
            layer.layer_index: torch.zeros_like(layer.nominal, dtype=torch.float64) for layer in analog_layers(analog)
        }
        for images, labels in found:
            for i in range(len(labels)):
                x, y = images[i : i + 1].to(place), labels[i : i + 1].to(place)
                with torch.enable_grad():
                    outputs = check_outputs(run(analog, x, "importance"), x, found.largest, "importance", metric)
                    term = F.cross_entropy(main_output(outputs), y) if own is None else own(outputs, y)
                    used = list(device.factors)
                    gradients = torch.autograd.grad(term, [device.factors[k] for k in used], allow_unused=True)
                for k, gradient in zip(used, gradients, strict=True):
                    if gradient is not None:
                        sums[k] += gradient.double().square()
    scores = {names[k]: total / found.images for k, total in sums.items()}
    for name, score in scores.items():
        if not score.isfinite().all():
            raise UserError(f"importance: the gradients of {name} are not finite")
    return scores


def protected_weights(
    network: nn.Module,
    fraction: float,
    select: Selection = "fisher",
    allocation: Allocation | Mapping[str, float] | None = None,
    *,
    data: Batches | None = None,
    loss: Loss | None = None,
    metric: Metric | None = None,
    exclude: Iterable[str] | str = (),
    seed: int = 0,
) -> dict[str, Tensor]:
    """Choose the weights to protect: masks for `correctnet.protect`, one for all chips.

    Args:
        network: the network that will be converted, not converted itself.
        fraction: protected weights / weights that carry variation, from 0 to 1.
        select: "random": uniformly; "magnitude": the largest |w|; "fisher": the largest `importance`; "sampled": drawn
            without replacement with probabilities proportional to the importance.
        allocation: how many in each layer. "global": as the selection over all layers together has it; "equal": the
            same fraction of each; "weighted": in proportion to the sum of the importance in a layer, at most all of its
            weights. Or numbers by name of the layer, e.g. accuracies lost, in proportion to which they are allotted.
            None: "equal" for a random selection, else "global".
        data: training images and labels, where importance is asked for.
        loss, metric, exclude: as for `importance`; weights of excluded layers are digital already.
        seed: of random draws.

    Returns:
        By name as `importance` has it, bool tensors in the shapes of the weights.

    Raises:
        UserError: an unknown selection or allocation, a fraction outside of [0, 1], importance without data, or
            weights of layers that are negative, not finite, or for other layers.
    """
    allocation = allocation if allocation is not None else "equal" if select == "random" else "global"
    _check_choice("select", select, get_args(Selection))
    if not isinstance(allocation, Mapping):
        _check_choice("allocation", allocation, get_args(Allocation))
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction <= 1:
        raise UserError(f"protected_weights: fraction lies between 0 and 1 (0.05, not 5), not {fraction!r}")
    seed = whole(seed, "protected_weights: the seed")
    scores = {}
    if select in ("fisher", "sampled") or allocation == "weighted":
        if data is None:
            raise UserError("protected_weights: importance is found from images and labels; give data")
        scores = importance(network, data, loss=loss, metric=metric, exclude=exclude)
    analog = convert(network, _Factors(), exclude=exclude)
    names = analog_names(analog)
    weights = {names[id(layer)]: layer.nominal.detach() for layer in analog_layers(analog)}
    keys = {name: _keys(select, weight, scores.get(name), seed, name) for name, weight in weights.items()}
    sizes = {name: weight.numel() for name, weight in weights.items()}
    total = round(fraction * sum(sizes.values()))
    if allocation == "global":
        joined = _largest(torch.cat([key.flatten() for key in keys.values()]), total).split(list(sizes.values()))
        return {name: part.view(weights[name].shape) for name, part in zip(sizes, joined, strict=True)}
    if allocation == "equal":
        shares: Mapping[str, float] = sizes
    elif allocation == "weighted":
        shares = {name: float(score.sum()) for name, score in scores.items()}
    else:
        shares = _checked_shares(allocation, sizes)
    counts = allotted([shares[name] for name in sizes], list(sizes.values()), total)
    return {
        name: _largest(keys[name].flatten(), count).view(weights[name].shape)
        for name, count in zip(sizes, counts, strict=True)
    }


def protected_share(network: nn.Module, masks: Mapping[str, Tensor]) -> float:
    """Overhead of protected weights: their number / parameters of the original network.

    Args:
        network: converted or not, compensated or not; compensation is no part of the original network.
        masks: of `protected_weights`.
    """
    original = original_parameters(network)
    return sum(int(mask.sum()) for mask in masks.values()) / original


def allotted(shares: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """Divide `total` in proportion to `shares`, at most `sizes` each; what one cannot take, the others get.

    Where all that is left has a share of 0, it is divided in proportion to the sizes. Fractions are rounded so that the
    sum is `total`: up for the largest ones, of equals the first.
    """
    wanted, open_, left = [0.0] * len(sizes), set(range(len(sizes))), float(total)
    while open_ and left > 0:
        weight = {i: float(shares[i]) for i in open_}
        if not sum(weight.values()) > 0:
            weight = {i: float(sizes[i]) for i in open_}
        scale = left / sum(weight.values())
        full = {i for i in open_ if weight[i] * scale >= sizes[i]}
        for i in full or open_:
            wanted[i] = float(sizes[i]) if full else weight[i] * scale
        if not full:
            break
        left -= sum(sizes[i] for i in full)
        open_ -= full
    counts = [min(int(share), size) for share, size in zip(wanted, sizes, strict=True)]
    rest = sorted(range(len(sizes)), key=lambda i: counts[i] - wanted[i])
    for i in [i for i in rest if counts[i] < sizes[i]][: total - sum(counts)]:
        counts[i] += 1
    return counts


def _keys(select: Selection, weight: Tensor, score: Tensor | None, seed: int, name: str) -> Tensor:
    """Numbers of which the largest are protected."""
    if select == "magnitude":
        return weight.abs().double()
    if select == "fisher":
        return score
    # The largest of log p + Gumbel noise are a draw without replacement with probabilities proportional to p.
    generator = streams.torch_generator(seed, "mask", name)
    uniform = torch.rand(weight.shape, dtype=torch.float64, generator=generator).to(weight.device)
    gumbel = -(-uniform.log()).log()
    return gumbel if select == "random" else score.log() + gumbel


def _largest(keys: Tensor, count: int) -> Tensor:
    """A mask of the `count` largest, of equals the first."""
    mask = torch.zeros(keys.shape, dtype=torch.bool, device=keys.device)
    mask[keys.sort(descending=True, stable=True).indices[:count]] = True
    return mask


def _checked_shares(shares: Mapping[str, float], sizes: Mapping[str, int]) -> Mapping[str, float]:
    if set(shares) != set(sizes):
        raise UserError(f"protected_weights: allocation has {', '.join(shares)}, but the layers are {', '.join(sizes)}")
    for name, share in shares.items():
        if not 0 <= share < float("inf"):
            raise UserError(
                f"protected_weights: allocation: the weight of {name} is a number of at least 0, not {share}"
            )
    return shares


def _check_choice(option: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"protected_weights: {option} is one of {', '.join(known)}, not {value!r}")
