"""Knowledge distillation: variation-aware training in which the original network is a teacher (after [8]).

    loss = (1 - alpha) CE(z_s, label) + alpha T^2 KL( softmax(z_t / T) || softmax(z_s / T) )

z_s are the logits of the student, which carries a fresh chip sample each batch, and z_t those of the teacher, which
carries no variation. T^2 keeps the size of the teacher's gradient, which T divides twice.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from correctnet.crossbar.convert import check_plain, convert, copy_model, program
from correctnet.crossbar.probe import left_alone, run
from correctnet.datasets.batches import Batches, Data
from correctnet.datasets.inputs import Inputs
from correctnet.devices.base import Variation
from correctnet.devices.straight import with_gradient
from correctnet.errors import UserError, whole
from correctnet.evaluation.montecarlo import clean_value
from correctnet.methods import multiteacher
from correctnet.methods import work as folder
from correctnet.methods.compensation import compensation_modules
from correctnet.metrics import Loss, Metric, checked, main_output
from correctnet.noise import streams
from correctnet.precision import products
from correctnet.sections import validate
from correctnet.settings import Distil
from correctnet.training.loop import Hooks, fit


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL( softmax(teacher / T) || softmax(student / T) ), a mean over the images.

    Args:
        student, teacher: logits (N, classes), or (N, classes, ...) with a distribution at each place, of which the mean
            is taken as well.
        temperature: T, above 0.

    Raises:
        UserError: logits of different shapes.
    """
    if student.shape != teacher.shape:
        raise UserError(
            f"distil: the student's outputs {tuple(student.shape)} are not those of the teacher {tuple(teacher.shape)}"
        )
    log_s = (student.float() / temperature).log_softmax(1)
    log_t = (teacher.float() / temperature).log_softmax(1)
    divergence = (log_t.exp() * (log_t - log_s)).sum(1)
    return temperature**2 * divergence.mean()


def learn_from(teacher: nn.Module | Sequence[nn.Module], hooks: Hooks, section: Distil) -> None:
    """Add the teacher's term to the loss of a training with these hooks.

    Args:
        teacher: a network without variation; it is copied, and runs in evaluation mode. Or several in evaluation mode,
            the mean of whose logits is learnt.
        hooks: of the student's training; `loss_weight` and `term` are set.
        section: temperature, alpha, and the precision in which the teacher runs.
    """
    one = isinstance(teacher, nn.Module)
    teachers = [copy_model(teacher, "distil").eval().requires_grad_(False)] if one else list(teacher)

    def term(images: Tensor | Inputs, outputs: Any) -> Tensor:
        with torch.no_grad(), products(section.precision, next(teachers[0].parameters()).device):
            logits = [main_output(run(each, images, "distil")) for each in teachers]
        wanted = logits[0] if one else torch.stack([each.float() for each in logits]).mean(0)
        return section.alpha * distillation_loss(main_output(outputs), wanted, section.temperature)

    hooks.loss_weight, hooks.term = 1 - section.alpha, term


def distil(
    network: nn.Module,
    train: Batches,
    variation: Variation,
    *,
    teacher: nn.Module | None = None,
    validation: Batches | None = None,
    exclude: Iterable[str] | str = (),
    loss: Loss | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    work: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> nn.Module:
    """Train a copy of `network` with a fresh chip sample each batch and with a teacher, as at the top of the module.

    With alpha = 0 this is variation-aware training alone.

    Args:
        network: a trained network that `correctnet.convert` accepts, with outputs (N, classes). It is left unchanged.
        train: training images (N, ...) and labels (N,), a pair of tensors or a loader of such pairs, each of whose
            batches is a step.
        variation: the device model.
        teacher: a network with the same outputs, without variation; None: `network` itself, as it is now. With
            teachers=(0.1, 0.5) among the settings there are several instead, which are first trained at these levels of
            the device, and teach with their noise (`correctnet.methods.multiteacher`, after MTRD).
        validation: images and labels whose accuracy without variation is shown after each epoch.
        exclude: names of layers that are digital, as for `correctnet.convert`.
        loss: replaces the cross entropy: a function of outputs and labels that returns the mean over the images.
        metric: a `correctnet.Metric`, which says what labels are, and may have a loss; None: the accuracy.
        seed: of the batches, the chips and dropout.
        work: a folder. A call that was stopped continues from its last epoch when it is repeated.
        progress: show a progress bar.
        settings: fields of `correctnet.settings.Distil`, e.g. epochs=5, alpha=0.9.

    Returns:
        The trained copy, a plain network in evaluation mode.

    Raises:
        UserError: data, outputs or a loss that are not those of a classifier, an unknown setting, a network or teacher
            that is converted, a network that is compensated, or a loss that is not finite.
    """
    section = validate(Distil, settings, "distil")
    seed, metric = whole(seed, "distil: the seed"), checked(metric, "distil")
    teacher = network if teacher is None else teacher
    for what, model in (("network", network), ("teacher", teacher)):
        check_plain(model, "distil", what)
    if compensation_modules(network):
        raise UserError("distil: the network is compensated already; distil first, then compensate")
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    analog = convert(network, with_gradient(variation, section.gradient), seed, exclude)
    trained, shown = copy_model(network, "distil"), None
    if validation is not None:  # read once, not after each epoch
        with left_alone(analog):
            shown = Data.of(validation, what="distil: validation", targets=metric.targets)
    hooks = Hooks(
        before_batch=lambda draw: program(analog, streams.chip("train-distil", draw)),
        update_batchnorm=section.batchnorm == "updated",
        loss=loss,
        metric=metric,
    )
    parts = {"network": network, "teacher": teacher, "train": train, "variation": variation, "seed": seed}
    parts |= folder.judged_by(metric) | {"loss": loss, "exclude": exclude}
    text = "" if work is None else folder.identity("distil", **parts, settings=section)
    if section.teachers:
        how = {"exclude": exclude, "loss": loss, "metric": metric, "quiet": not progress}
        saved = functools.partial(folder.checkpoint, work, text=text)
        teachers = multiteacher.train_teachers(network, train, variation, section, seed, checkpoint=saved, **how)
        multiteacher.with_chips(hooks, teachers)
        learn_from(teachers, hooks, section)
    else:
        learn_from(teacher, hooks, section)
    fit(
        analog,
        train,
        section,
        seed,
        stage="distil",
        hooks=hooks,
        validate=None if shown is None else lambda: clean_value(analog, shown, metric=metric),
        checkpoint=folder.checkpoint(work, "distil", text),
        title="distil",
        quiet=not progress,
    )
    trained.load_state_dict(analog.state_dict())
    return trained.eval()
