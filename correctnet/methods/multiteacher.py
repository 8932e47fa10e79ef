"""Distillation from several teachers that were trained at sigmas of their own, and teach with their noise (after MTRD).

    loss = (1 - alpha) CE(z_s, label) + alpha T^2 KL( softmax(z / T) || softmax(z_s / T) )

z is the mean of the teachers' logits. Each teacher is the original network after variation-aware training at its sigma.
While the student is trained, each batch is also seen by a fresh chip of every teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from correctnet.crossbar.convert import convert, program
from correctnet.datasets.batches import Batches
from correctnet.devices.base import Variation
from correctnet.devices.straight import with_gradient
from correctnet.errors import UserError
from correctnet.metrics import ACCURACY, Loss, Metric
from correctnet.noise import streams
from correctnet.sections import exact
from correctnet.settings import Distil
from correctnet.training.checkpoint import Checkpoint
from correctnet.training.loop import Hooks, fit

# Of the chips of this purpose, the student has the first of these ranges, each teacher another one for its training,
# and another one, from the middle on, for its teaching.
RANGE, TEACHING = 1 << 24, 1 << 27


def chip_of_teacher(number: int, draw: int, teaching: bool) -> int:
    """The chip of the `number`-th teacher (from 0) at a step of its training, or of the student's."""
    if not 0 <= draw < RANGE or not 0 <= number < TEACHING // RANGE - 1:
        raise UserError(f"distil: 7 teachers and {RANGE} steps are possible at most")
    return streams.chip("train-distil", teaching * TEACHING + (number + 1) * RANGE + draw)


def train_teachers(
    network: nn.Module,
    train: Batches,
    variation: Variation,
    section: Distil,
    seed: int,
    *,
    exclude: Iterable[str] = (),
    loss: Loss | None = None,
    metric: Metric = ACCURACY,
    augment: str = "none",
    checkpoint: Callable[[str], Checkpoint | None] = lambda name: None,
    quiet: bool = False,
) -> list[nn.Module]:
    """Train a copy of a network at each sigma of `section.teachers`, with the section's epochs, batches and optimiser.

    Args:
        network: the original network.
        train: training images and labels.
        variation: the device model, of which each teacher has another level.
        section: how they are trained.
        seed: of the batches and the chips.
        exclude: names of layers that are digital, as for `correctnet.convert`.
        loss, metric, augment, quiet: as for `correctnet.training.loop.Hooks` and `fit`.
        checkpoint: of a teacher's training, by its name.

    Returns:
        The teachers, converted, in evaluation mode.
    """
    teachers = []
    for number, sigma in enumerate(section.teachers):
        analog = convert(network, with_gradient(variation.at(sigma), section.gradient), seed, exclude)
        name = f"distil-teacher-{exact(sigma)}"
        hooks = Hooks(
            before_batch=lambda draw, own=analog, k=number: program(own, chip_of_teacher(k, draw, teaching=False)),
            update_batchnorm=section.batchnorm == "updated",
            augment=augment,
            loss=loss,
            metric=metric,
        )
        saved = checkpoint(name)
        fit(analog, train, section, seed, stage=name, hooks=hooks, checkpoint=saved, title=name, quiet=quiet)
        teachers.append(analog.eval().requires_grad_(False))
    return teachers


def with_chips(hooks: Hooks, teachers: Sequence[nn.Module]) -> None:
    """Let every teacher carry a fresh chip in each batch of a training with these hooks."""
    own = hooks.before_batch

    def before_batch(draw: int) -> None:
        own(draw)
        for number, teacher in enumerate(teachers):
            program(teacher, chip_of_teacher(number, draw, teaching=True))

    hooks.before_batch = before_batch
