"""Online adaptation: the protected weights of a network trained on the chip that it carries (after [8] and [9]).

On a chip the weights of a layer are W_eff = (1 - M) W e^theta + M S. S, the digital weights, starts at W and is
trained; the chip, all other weights, biases and BatchNorm stay as they are. It needs labelled images and gradients
through every chip.

    protect(analog, masks)
    result = evaluate(analog, test, chips=20, prepare=lambda chip: adapt(chip, train))

Two variants train other weights. "digital" ones are those of whole layers that are digital, with their biases, as in
HyperX ([18]), whose last layers are. "all" are those on the crossbars themselves, as if each chip, with a variation
that is known and stays, were programmed again after every step: close to a ceiling for what can be done on a chip
(after [12]), and no rival.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from correctnet.crossbar.convert import chip_of
from correctnet.crossbar.kinds import crossbars
from correctnet.crossbar.layers import OnCrossbar, analog_layers, analog_names
from correctnet.datasets.batches import Batches, take
from correctnet.devices.protected import Protected
from correctnet.errors import UserError, whole
from correctnet.metrics import Loss, Metric, checked
from correctnet.sections import validate
from correctnet.settings import Adapt
from correctnet.training.loop import Hooks, fit


def adapt(
    model: nn.Module,
    train: Batches,
    *,
    loss: Loss | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    progress: bool = False,
    **settings: Any,
) -> None:
    """Train the protected weights of a converted network on its chip, in place, and nothing else; or others, see above.

    The weights after the last step are kept, whatever they reach. BatchNorm normalises with the stored statistics, and
    dropout is off. Training images are not augmented.

    Args:
        model: from `correctnet.convert`, with weights that `correctnet.protect` protects, or with digital layers for
            weights="digital", and one chip programmed.
        train: training images (N, ...) and labels (N,), as for `correctnet.suppress`.
        loss: replaces the cross entropy: a function of outputs and labels that returns the mean over the images.
        metric: a `correctnet.Metric`, which says what labels are, and may have a loss; None: the accuracy.
        seed: of the order of the images, the same on each chip.
        progress: show a progress bar.
        settings: fields of `correctnet.settings.Adapt`, e.g. images=512; `passes` is 1 where it is not given.

    Raises:
        UserError: no chip or several, nothing protected, or no digital layer, a trained weight that is derived from
            other parameters, a device on which other weights depend on the protected ones, data, outputs or a loss that
            are not those of a classifier, an unknown setting, or a loss that is not finite. The weights are then as
            before.
    """
    section = validate(Adapt, {"passes": 1, **settings}, "adapt")
    seed, metric, sample = whole(seed, "adapt: the seed"), checked(metric, "adapt"), chip_of(model).sample
    if not isinstance(sample, int):
        raise UserError("adapt: one chip is trained; program one, or give adapt to evaluate as prepare")
    layers = _protected(model) if section.weights == "protected" else []
    if section.weights == "protected":
        trained = [own.owner._parameters[own.parameter] for own, _ in layers]
    else:
        trained = _digital(model) if section.weights == "digital" else _programmed(model)
    before = [parameter.detach().clone() for parameter in trained]
    frozen = [_others(own, mask, sample) for own, mask in layers]
    masked = zip(trained, layers, strict=False)  # without layers all of a weight is trained
    hooked = [parameter.register_hook(_only(mask)) for parameter, (_, mask) in masked]
    try:
        fit(
            model,
            take(train, section.images),
            section.training(),
            seed,
            stage="adapt",
            parameters=trained,
            hooks=Hooks(dropout=False, update_batchnorm=False, loss=loss, metric=metric),
            title="adapt",
            quiet=not progress,
        )
        for (own, mask), value in zip(layers, frozen, strict=True):
            if not torch.equal(_others(own, mask, sample), value):
                raise UserError(
                    f"adapt: on a {type(own.variation.device).__name__} the other weights of a layer depend on the "
                    "protected ones, as by its largest weight, so that these cannot be trained alone"
                )
    except BaseException:
        with torch.no_grad():
            for parameter, value in zip(trained, before, strict=True):
                parameter.copy_(value)
        raise
    finally:
        for each in hooked:
            each.remove()


def _protected(model: nn.Module) -> list[tuple[OnCrossbar, Tensor]]:
    """Crossbars with protected weights, and their masks. Raises UserError where there are none, or they are derived."""
    found, names = [], analog_names(model)
    for own in analog_layers(model):
        mask = own.variation.mask(own.nominal, own.layer_index) if isinstance(own.variation, Protected) else None
        if mask is None or not mask.any():
            continue
        if own.owner._parameters.get(own.parameter) is None:
            raise UserError(f"adapt: the weights of {names[id(own)]} are derived from others and cannot be trained")
        found.append((own, mask))
    if not found:
        raise UserError("adapt: no weight is protected, so there is nothing to train; protect some with `protect`")
    return found


def _digital(model: nn.Module) -> list[nn.Parameter]:
    """Weights and biases of the layers that are digital. Raises UserError where there are none."""
    analog = {id(own.owner) for own in analog_layers(model)}
    layers = dict.fromkeys(each.module for each in crossbars(model) if id(each.module) not in analog)
    found = [p for layer in layers for p in layer.parameters(recurse=False) if p.is_floating_point()]
    if not found:
        raise UserError("adapt: no layer is digital, so there is nothing to train; exclude some in `convert`")
    return found


def _programmed(model: nn.Module) -> list[nn.Parameter]:
    """The weights on crossbars. Raises UserError where one is derived from others."""
    found, names = [], analog_names(model)
    for own in analog_layers(model):
        if own.owner._parameters.get(own.parameter) is None:
            raise UserError(f"adapt: the weights of {names[id(own)]} are derived from others and cannot be trained")
        found.append(own.owner._parameters[own.parameter])
    return found


def _only(mask: Tensor) -> Any:
    """A hook that leaves the gradient of the weights in a mask, and makes that of all others 0."""
    zero = torch.zeros((), device=mask.device)
    return lambda gradient: torch.where(mask, gradient, zero.to(gradient.dtype))


@torch.no_grad()
def _others(own: OnCrossbar, mask: Tensor, sample: int) -> Tensor:
    """The weights on the chip that are not protected."""
    return own.variation.sample(own.nominal.detach(), own.chip.seed, own.layer_index, sample)[~mask]
