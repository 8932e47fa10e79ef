"""Training of generators and compensators, and the check that they are better than none."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from correctnet.crossbar.calibration import Equip, equipped
from correctnet.crossbar.convert import convert, program
from correctnet.crossbar.probe import left_alone, run
from correctnet.datasets.base import Split
from correctnet.datasets.batches import (
    Batches,
    Data,
    check_batch,
    check_loader,
    check_outputs,
    first_batch,
    largest_label,
)
from correctnet.datasets.inputs import Inputs, as_pair
from correctnet.devices.base import Variation
from correctnet.errors import UserError, whole
from correctnet.evaluation.montecarlo import simulate
from correctnet.evaluation.simulation import Simulation
from correctnet.methods import work as folder
from correctnet.methods.compensation import (
    check_filters,
    compensate,
    compensation_modules,
    compensation_parameters,
    layer_of,
)
from correctnet.metrics import ACCURACY, Loss, Metric, checked
from correctnet.noise import streams
from correctnet.sections import validate
from correctnet.settings import JUDGED_CHIPS, Compensate
from correctnet.training.checkpoint import Checkpoint
from correctnet.training.loop import Hooks, fit

# With at least this many images and none given for validation, `fit_compensators` holds out a tenth of them.
LEAST_TO_SPLIT = 20


class CompensationWarning(UserWarning):
    """Trained compensators lost accuracy under variation and were replaced by the identity, or layers have none."""


def trained_parameters(model: nn.Module, section: Compensate) -> list[nn.Parameter]:
    """The parameters to train: those of the compensation, with `batchnorm: affine` also BatchNorm's scales and shifts.

    The list is empty if no layer is compensated.
    """
    parameters = compensation_parameters(model)
    if parameters and section.batchnorm == "affine":
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine]
        parameters += [p for norm in norms for p in norm.parameters()]
    return parameters


def prepare(
    model: nn.Module,
    filters: Mapping[str, int],
    section: Compensate,
    variation: Variation,
    seed: int,
    stage: str = "fit_compensators",
    loss: Loss | None = None,
    metric: Metric = ACCURACY,
    exclude: Iterable[str] = (),
    equip: Equip | None = None,
) -> tuple[nn.Module, dict[str, Any], Hooks]:
    """Build the analog model with untrained compensators, the compensation plan, and the training hooks.

    The hooks program `section.chips_per_batch` fresh chip samples for every batch, from the range of chips on which
    this stage alone trains. The loss is that of the original network.

    Args:
        model: the digital network, suppressed or not.
        filters: generator filters by layer name.
        section: how the compensators are built and trained.
        variation: the device model.
        seed: of the chips and of the initial weights.
        stage: the stage that trains, "compensate", "search" or "fit_compensators"; see `correctnet.noise.streams`.
        loss, metric: as for `fit_compensators`.
        exclude: names of layers that are digital, as for `correctnet.convert`.
        equip: called with the converted network, e.g. to add converters.

    Returns:
        The converted copy of `model`; the arguments of `compensate` that gave it; the hooks for `fit`.
    """
    plan = {"filters": dict(filters), "place": section.place, "seed": seed}
    plan |= {"activation": section.activation, "init": section.init, "pool": section.pool}
    analog = equipped(convert(compensate(model, **plan, stage=stage), variation, seed, exclude), equip)
    hooks = Hooks(
        before_batch=lambda draw: program(analog, streams.chip(f"train-{stage}", draw)),
        draws_per_batch=section.chips_per_batch,
        dropout=False,
        update_batchnorm=section.batchnorm == "updated",
        loss=loss,
        metric=metric,
    )
    return analog, plan, hooks


def keep_better(
    analog: nn.Module,
    model: nn.Module,
    plan: Mapping[str, Any],
    data: Batches,
    seed: int,
    stage: str = "fit_compensators",
    simulation: Simulation | None = None,
    stacklevel: int = 3,
    metric: Metric = ACCURACY,
) -> dict[str, Any]:
    """Compare trained compensators with none, and replace them by the identity if they lost accuracy.

    Both are evaluated on the same `JUDGED_CHIPS` chips, which are used neither for training nor for another choice.

    Args:
        analog: the trained network, from `prepare`; its compensators may be replaced.
        model, plan: the digital network and the plan it was made from.
        data: validation images.
        seed: of the initial weights.
        stage: as for `prepare`.
        simulation: how chips are simulated, apart from `start` and `progress`.
        stacklevel: of the warning, as for `warnings.warn`.
        metric: what they are compared by.

    Returns:
        without, with: mean accuracies, or values; kept: "without" or "with"; chips, images: their numbers.

    Warns:
        CompensationWarning: the compensators are not kept.
    """
    chips = streams.chips(f"validate-{stage}", JUDGED_CHIPS)
    trained = {name: value.clone() for name, value in analog.state_dict().items()}
    simulation = replace(simulation or Simulation(), start=chips.start, progress=False)
    identity = compensate(model, **{**plan, "init": "identity"}, stage=stage).state_dict()
    with left_alone(analog):
        data = Data.of(data, memory=simulation.memory, what=stage, targets=metric.targets)

    def mean(state: dict[str, Tensor]) -> float:
        analog.load_state_dict(state)
        return simulate(analog, data, len(chips), simulation, metric=metric).mean

    without, with_them = mean(identity), mean(trained)
    kept = "with" if metric.as_good(with_them, without) else "without"
    if kept == "without":
        analog.load_state_dict(identity)
        warnings.warn(
            f"the trained compensators are not kept: over {len(chips)} validation chips the network has a mean "
            f"{metric.name} of {metric.text(with_them)} with them and of {metric.text(without)} without; train them "
            "for more epochs or with a lower learning rate",
            CompensationWarning,
            stacklevel=stacklevel,
        )
    return {"without": without, "with": with_them, "kept": kept, "chips": len(chips), "images": data.images}


def train_compensators(
    model: nn.Module,
    filters: Mapping[str, int],
    train: Batches,
    judged: Batches,
    section: Compensate,
    variation: Variation,
    seed: int,
    stage: str,
    *,
    loss: Loss | None = None,
    metric: Metric = ACCURACY,
    checkpoint: Checkpoint | None = None,
    simulation: Simulation | None = None,
    quiet: bool = False,
    stacklevel: int = 2,
    exclude: Iterable[str] = (),
) -> tuple[nn.Module, dict[str, Any] | None]:
    """Train compensators, and keep them if they are better than none: what `fit_compensators` does after its checks.

    Args:
        train, judged: training images, and those on which trained compensators are compared with none.
        section: how the compensators are built and trained.
        checkpoint: saved after each epoch; the training is resumed from it.
        simulation: of the comparison, as for `keep_better`.
        model, filters, variation, seed, stage, loss, metric, quiet, exclude: as for `fit_compensators`.
        stacklevel: of the warning, counted from this function's caller: 2 is that one's caller.

    Returns:
        The compensated network in evaluation mode, and the comparison as `keep_better` returns it; None where no layer
        is compensated.
    """
    analog, plan, hooks = prepare(model, filters, section, variation, seed, stage, loss, metric, exclude)
    compensated = compensate(model, **plan, stage=stage).eval()
    with left_alone():
        images, labels = first_batch(train, stage, metric.targets)
    pairs = [pair for pair in (as_pair(train), as_pair(judged), (images, labels)) if pair is not None]
    device = next(model.parameters(), torch.empty(0)).device
    largest = max(largest_label(y, metric.targets) for _, y in pairs)
    check_calls(compensated, images[:8].to(device), labels[:8].to(device), largest, stage, metric)
    parameters, better = trained_parameters(analog, section), None
    if parameters:  # none where no layer is compensated
        fit(
            analog,
            train,
            section,
            seed,
            stage=stage,
            parameters=parameters,
            hooks=hooks,
            checkpoint=checkpoint,
            title="compensators",
            quiet=quiet,
        )
        better = keep_better(analog, model, plan, judged, seed, stage, simulation, stacklevel + 2, metric)
    compensated.load_state_dict(analog.state_dict())
    return compensated, better


def fit_compensators(
    model: nn.Module,
    filters: Mapping[str, int],
    images: Any,
    labels: Tensor | None = None,
    variation: Variation | None = None,
    *,
    validation: Batches | None = None,
    loss: Loss | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    exclude: Iterable[str] | str = (),
    stage: Literal["fit_compensators", "compensate"] = "fit_compensators",
    work: str | Path | None = None,
    quiet: bool = False,
    **settings: Any,
) -> nn.Module:
    """Train generators and compensators for `model`; returns a compensated copy as a plain `nn.Module`.

    After training, the network is evaluated on a few chips with compensators and without. If they lost accuracy, a
    warning says so, and the compensators of the copy are the identity: it computes what `model` does. `model` and
    torch's global generators are left unchanged.

    Args:
        model: any network that `correctnet.convert` accepts, with outputs (N, classes).
        filters: generator filters by layer name, e.g. {"conv1": 16}, as `correctnet.search` finds them.
        images: (N, ...) training inputs, or a dict or tuple of several; or, without `labels`, a loader of batches
            (images, labels), each a step.
        labels: (N,) their classes, integers.
        variation: the device model to compensate.
        validation: images and labels for that comparison, tensors or a loader. None: a tenth of `images`, drawn with
            `seed` and not used for training; with fewer than 20 images none is held out, and the training images are
            used. A loader for training needs it.
        loss: replaces the cross entropy: a function of outputs and labels that returns the mean over the images.
        metric: a `correctnet.Metric` by which they are compared with none. It says what labels are, and may have a
            loss; None: the accuracy.
        seed: of the batches, the chips, the initial weights and the images that are held out.
        exclude: names of layers that are digital, as for `correctnet.convert`.
        stage: whose chips, batches and initial weights are drawn: "compensate" are those of the workflow and of
            `correctnet.correct`.
        work: a folder. A call that was stopped continues from its last epoch when it is repeated.
        quiet: show no progress bar.
        settings: fields of `correctnet.settings.Compensate`, e.g. epochs=5, learning_rate=1e-3.

    Returns:
        The compensated network, in evaluation mode.

    Raises:
        UserError: inputs, outputs or a loss that are not those of a classifier, an unknown layer or setting, a layer
            whose weight the network uses without calling it, so that it cannot be compensated, or a loss that is not
            finite.

    Warns:
        CompensationWarning: the trained compensators are not kept.
    """
    caller = "fit_compensators"
    section = validate(Compensate, settings, caller)
    check_filters(filters, caller)
    seed, metric = whole(seed, f"{caller}: the seed"), checked(metric, caller)
    if stage not in (caller, "compensate"):
        raise UserError(f"{caller}: stage must be '{caller}' or 'compensate', not {stage!r}")
    if variation is None:
        raise UserError(f"{caller}: variation: a device model such as LogNormalVariation(0.5) is expected")
    device = next(model.parameters(), torch.empty(0)).device
    given: Any = images if labels is None else (images, labels)
    if labels is None and as_pair(images) is None and not isinstance(images, Tensor):
        train: Batches = check_loader(given, caller)
        if validation is None:
            raise UserError(
                f"{caller}: validation: a loader's images cannot be held out; give images and labels on which the "
                "compensators are compared with none"
            )
        judged: Batches = validation
    else:
        train = _labelled(given, f"{caller}: images and labels", device, metric)
        if validation is not None:
            judged = validation
        elif len(train) >= LEAST_TO_SPLIT:
            generator = streams.torch_generator(seed, "held-out", caller)
            order = torch.randperm(len(train), generator=generator, device="cpu").to(device)
            held_out, rest = order[: len(train) // 10], order[len(train) // 10 :]
            train, judged = (Split(train.images[part], train.labels[part]) for part in (rest, held_out))
        else:
            judged = train
    if as_pair(judged) is not None or isinstance(judged, Tensor) or _pair_of_others(judged):
        judged = _labelled(judged, f"{caller}: validation", device, metric)
    else:
        judged = Data.of(judged, what=f"{caller}: validation", targets=metric.targets)
    parts = {"network": model, "filters": filters, "train": train, "judged": judged, "variation": variation}
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    parts |= folder.judged_by(metric) | ({"exclude": exclude} if exclude else {})
    text = "" if work is None else folder.identity(stage, **parts, seed=seed, loss=loss, settings=section)
    compensated, _ = train_compensators(
        model,
        filters,
        train,
        judged,
        section,
        variation,
        seed,
        stage,
        loss=loss,
        metric=metric,
        checkpoint=folder.checkpoint(work, stage, text),
        simulation=Simulation(engine="torch"),
        quiet=quiet,
        exclude=exclude,
    )
    return compensated


def _pair_of_others(data: Any) -> bool:
    """Whether data is meant as a pair, of arrays instead of tensors, and not as two batches."""
    batches = tuple | list | Mapping
    return isinstance(data, tuple | list) and len(data) == 2 and not all(isinstance(x, batches) for x in data)


def _labelled(data: Any, what: str, device: torch.device, metric: Metric) -> Split:
    """Images and labels on the model's device, checked."""
    pair = as_pair(data)
    if pair is None:
        raise UserError(f"{what}: a tensor of images and one of labels are expected")
    split = Split(*check_batch(tuple(part.to(device) for part in pair), what, metric.targets))
    if not len(split):
        raise UserError(f"{what}: there are no images")
    return split


def check_calls(
    model: nn.Module, images: Tensor | Inputs, labels: Tensor, largest: int, what: str, metric: Metric = ACCURACY
) -> None:
    """Raise UserError if a compensated network is not a classifier, or uses a compensated layer's weight itself.

    With another metric its outputs must be what that reads. The network runs as in evaluation, without gradients and
    without hooks: where there are hooks, torch takes other code paths, which call layers that it does not call
    otherwise.
    """
    compensated, calls = compensation_modules(model), dict.fromkeys(compensation_modules(model), 0)
    layers = {name: layer_of(m.original) for name, m in compensated.items()}
    own = dict.fromkeys(layers, 0)
    with _counted(compensated, calls), _counted(layers, own), torch.no_grad():
        outputs = run(model, images, what)
    metric.batch(check_outputs(outputs, images, largest, what, metric), labels, what)
    for name in compensated:
        if calls[name] == 0:
            raise UserError(
                f"{what}: {name} is never called on these images, so compensating it has no effect: the network does "
                "not use it, or uses its weight directly"
            )
        if own[name] > calls[name]:
            raise UserError(f"{what}: {name} is also called from where it cannot be compensated (a list or function)")


@contextmanager
def _counted(modules: Mapping[str, nn.Module], calls: dict[str, int]) -> Iterator[None]:
    """Count the calls of modules, by name, for the length of a block, without hooks."""

    def count(name: str, module: nn.Module) -> None:
        forward = module.forward

        def counting(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return forward(*args, **kwargs)

        module.forward = counting

    before = [(module, module.__dict__.get("forward")) for module in modules.values()]
    for name, module in modules.items():
        count(name, module)
    try:
        yield
    finally:
        for module, forward in before:
            if forward is None:
                del module.forward
            else:
                module.forward = forward
