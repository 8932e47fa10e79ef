"""Online adaptation: the protected weights of a network trained on the chip that it carries (after [8] and [9]).

On a chip the weights of a layer are W_eff = (1 - M) W e^theta + M S. S, the digital weights, starts at W and is
trained; the chip, all other weights, biases and BatchNorm stay as they are. It needs labelled images and gradients
through every chip.

    protect(analog, masks)
    result = evaluate(analog, test, chips=20, prepare=lambda chip: adapt(chip, train))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from correctnet.crossbar.convert import chip_of
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
    """Train the protected weights of a converted network on its chip, in place, and nothing else.

    The weights after the last step are kept, whatever they reach. BatchNorm normalises with the stored statistics, and
    dropout is off. Training images are not augmented.

    Args:
        model: from `correctnet.convert`, with weights that `correctnet.protect` protects, and one chip programmed.
        train: training images (N, ...) and labels (N,), as for `correctnet.suppress`.
        loss: replaces the cross entropy: a function of outputs and labels that returns the mean over the images.
        metric: a `correctnet.Metric`, which says what labels are, and may have a loss; None: the accuracy.
        seed: of the order of the images, the same on each chip.
        progress: show a progress bar.
        settings: fields of `correctnet.settings.Adapt`, e.g. images=512; `passes` is 1 where it is not given.

    Raises:
        UserError: no chip or several, nothing protected, a protected weight that is derived from other parameters, a
            device on which other weights depend on the protected ones, data, outputs or a loss that are not those of a
            classifier, an unknown setting, or a loss that is not finite. The weights are then as before.
    """
    section = validate(Adapt, {"passes": 1, **settings}, "adapt")
    seed, metric, sample = whole(seed, "adapt: the seed"), checked(metric, "adapt"), chip_of(model).sample
    if not isinstance(sample, int):
        raise UserError("adapt: one chip is trained; program one, or give adapt to evaluate as prepare")
    layers = _protected(model)
    parameters = {id(own): own.owner._parameters[own.parameter] for own, _ in layers}
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    frozen = [_others(own, mask, sample) for own, mask in layers]
    hooked = [parameters[id(own)].register_hook(_only(mask)) for own, mask in layers]
    try:
        fit(
            model,
            take(train, section.images),
            section.training(),
            seed,
            stage="adapt",
            parameters=list(parameters.values()),
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
            for key, parameter in parameters.items():
                parameter.copy_(before[key])
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


def _only(mask: Tensor) -> Any:
    """A hook that leaves the gradient of the weights in a mask, and makes that of all others 0."""
    zero = torch.zeros((), device=mask.device)
    return lambda gradient: torch.where(mask, gradient, zero.to(gradient.dtype))


@torch.no_grad()
def _others(own: OnCrossbar, mask: Tensor, sample: int) -> Tensor:
    """The weights on the chip that are not protected."""
    return own.variation.sample(own.nominal.detach(), own.chip.seed, own.layer_index, sample)[~mask]
