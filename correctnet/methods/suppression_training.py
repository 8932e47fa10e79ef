"""Training under the modified Lipschitz regulariser (11)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from correctnet.crossbar.convert import check_plain, copy_model
from correctnet.crossbar.probe import left_alone
from correctnet.datasets.batches import Batches, Data
from correctnet.devices.base import Variation
from correctnet.errors import UserError, whole
from correctnet.evaluation.montecarlo import clean_value
from correctnet.methods import work as folder
from correctnet.methods.compensation import compensation_modules
from correctnet.methods.suppression import analog_weights, batchnorms, bounds, penalty
from correctnet.metrics import Loss, Metric, checked
from correctnet.sections import validate
from correctnet.settings import Suppress
from correctnet.training.loop import Hooks, fit


def regularised(model: nn.Module, section: Suppress, variation: Variation) -> Hooks:
    """The training hooks that add beta times (11), with lambda of (10), to the loss of `model`.

    Where lambda depends on a layer's weights, it is that of the weights at the beginning of each epoch.

    Raises UserError as `batchnorms`, if BatchNorm is to be folded in, and for a device without moments.
    """
    lams: list[float] = []

    def renew() -> None:
        lams[:] = bounds(model, variation, section.k)

    try:
        renew()
    except NotImplementedError as error:
        raise UserError(f"suppress: {error}, from which the bound (10) is made; go without suppression") from error
    norms = batchnorms(model) if section.fold_batchnorm else {}
    return Hooks(
        before_epoch=renew,
        penalty=lambda: penalty(analog_weights(model, norms), lams, section.form),
        penalty_weight=lambda done: section.beta * min(1.0, done / section.ramp) if section.ramp else section.beta,
        temperature=section.temperature,
        sizes=section.sizes,
    )


def suppress(
    network: nn.Module,
    train: Batches,
    variation: Variation,
    *,
    validation: Batches | None = None,
    loss: Loss | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    work: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> nn.Module:
    """Error suppression: train a copy of `network` under the modified Lipschitz regulariser, (10) and (11).

    The loss is cross entropy + beta sum over layers || W^T W - lambda^2 I ||_F^2, with lambda = k / (mean + 3 standard
    deviations of w / w_nominal). Smaller norms let deviations of the weights grow less from layer to layer. For devices
    whose deviations are no factor of the weight lambda is that of each layer (`Variation.bound`), anew in each epoch.

    Args:
        network: a trained network that `correctnet.convert` accepts, with outputs (N, classes). It is left unchanged.
        train: training images (N, ...) and labels (N,), a pair of tensors or a loader of such pairs, each of whose
            batches is a step.
        variation: the device model; it has to give the moments of w / w_nominal, or of the weights.
        validation: images and labels whose accuracy, or metric, is shown after each epoch; nothing is chosen by it.
        loss: replaces the cross entropy: a function of outputs and labels that returns the mean over the images.
        metric: a `correctnet.Metric`, which says what labels are, and may have a loss; None: the accuracy.
        seed: of the batches and of dropout.
        work: a folder. A call that was stopped continues from its last epoch when it is repeated.
        progress: show a progress bar.
        settings: fields of `correctnet.settings.Suppress` apart from `start`, e.g. epochs=5, beta=1e-3.

    Returns:
        The trained copy, in evaluation mode.

    Raises:
        UserError: data, outputs or a loss that are not those of a classifier, an unknown setting, a device model
            without moments, a network that is converted or compensated already, or a loss that is not finite.
    """
    section = validate(Suppress, settings, "suppress")
    if section.start != "pretrained":
        raise UserError(
            "suppress: start: the weights of the network are the start; initialise them to start from scratch"
        )
    seed, metric = whole(seed, "suppress: the seed"), checked(metric, "suppress")
    check_plain(network, "suppress")
    if compensation_modules(network):
        raise UserError("suppress: the network is compensated already; suppress it first, then compensate it")
    model, shown = copy_model(network, "suppress"), None
    if validation is not None:  # read once, not after each epoch
        with left_alone(model):
            shown = Data.of(validation, what="suppress: validation", targets=metric.targets)
    hooks = regularised(model, section, variation)
    hooks.loss, hooks.metric = loss, metric
    parts = {"network": network, "train": train, "variation": variation, "seed": seed, "loss": loss}
    parts |= folder.judged_by(metric)
    text = "" if work is None else folder.identity("suppress", **parts, settings=section)
    fit(
        model,
        train,
        section,
        seed,
        stage="suppress",
        hooks=hooks,
        validate=None if shown is None else lambda: clean_value(model, shown, metric=metric),
        checkpoint=folder.checkpoint(work, "suppress", text),
        title="suppress",
        quiet=not progress,
    )
    return model.eval()
