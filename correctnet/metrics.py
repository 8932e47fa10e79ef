"""What outputs are judged by: accuracy, and other metrics that are sums over the data.

A metric maps outputs and targets of a batch to a sum and a count. Sums and counts are added over the batches, and
`finish` makes one number of them: the mean, unless it says otherwise. So batches of any size give the same value.

    Metric("hinge", lambda outputs, targets: (1 - outputs[:, 0] * targets).clamp(min=0).sum(), higher=False)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from correctnet.errors import UserError, one_line, whole
from correctnet.reloading import survives_reload

Targets = Literal["classes", "pixels", "numbers", "any"]
Loss = Callable[[Any, Any], Tensor]
"""maps outputs and targets of a batch to the loss, a tensor of one element"""


def mean(total: Tensor, count: float) -> float:
    """total / count: the mean over all items; NaN where there are none."""
    return total.item() / count if count else math.nan


@survives_reload
@dataclass(frozen=True)
class Metric:
    """A number by which the outputs of a network are judged.

    Attributes:
        name: in words, for texts and tables, e.g. "mean squared error".
        function: maps the network's outputs and the targets of a batch to (sum, count), or to the sum alone; the count
            is then the number of targets, N. The sum is a number or a tensor of any shape, the same for all batches.
        finish: maps the total of the sums, a float64 tensor, and that of the counts, to the value; default: their
            quotient.
        higher: whether larger values are better.
        fraction: whether values lie in 0 to 1. They are then shown as percent, and are on the scale of (12).
        targets: what targets are checked to be: "classes", (N,) whole numbers below the number of classes; "pixels",
            (N, ...) whole numbers; "numbers", (N, ...) finite; "any", a tensor (N, ...).
        loss: of trainings that are given none; None: the cross entropy.

    Raises:
        UserError: a field of another kind, or the name "accuracy", which has a metric.
    """

    name: str
    function: Callable[[Any, Tensor], Any]
    finish: Callable[[Tensor, float], float] = mean
    higher: bool = True
    fraction: bool = False
    targets: Targets = "any"
    loss: Loss | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip() or len(self.name.splitlines()) > 1:
            raise UserError(f"metric: name is a text of one line, not {self.name!r}")
        for field in ("function", "finish", "loss"):
            value = getattr(self, field)
            if not callable(value) and not (field == "loss" and value is None):
                raise UserError(f"metric {self.name}: {field} is a function, not {value!r}")
        for field in ("higher", "fraction"):
            if not isinstance(getattr(self, field), bool):
                raise UserError(f"metric {self.name}: {field} is True or False, not {getattr(self, field)!r}")
        if self.targets not in get_args(Targets):
            raise UserError(f"metric {self.name}: targets is one of {', '.join(get_args(Targets))}")
        if self.is_accuracy and getattr(self.function, "__qualname__", "") != "_correct":
            raise UserError("metric: the name 'accuracy' is taken by the metric that is used where none is given")

    @property
    def is_accuracy(self) -> bool:
        """Whether it is the accuracy, which the engine counts itself."""
        return self.name == "accuracy"

    @property
    def reads_main(self) -> bool:
        """Whether it is known to read `main_output` alone, as those of this module do."""
        return self.function in (_correct, _squared, _absolute) or isinstance(self.function, _Within | _PerPixel)

    def __str__(self) -> str:
        return f"{self.name} (ignore {self.function.ignore})" if isinstance(self.function, _PerPixel) else self.name

    def describe(self) -> dict[str, Any]:
        """Everything that values depend on, functions by name, as a JSON object."""
        functions = {"function": self.function, "finish": self.finish, "loss": self.loss}
        named = {key: None if f is None else _name(f) for key, f in functions.items()}
        return {"name": self.name, **named, "higher": self.higher, "fraction": self.fraction, "targets": self.targets}

    def batch(self, outputs: Any, targets: Tensor, what: str) -> tuple[Tensor, float]:
        """The sum over a batch, float64 with the function's shape, and the count.

        Raises UserError, which begins with `what`, where the function fails or gives something else.
        """
        try:
            found = self.function(outputs, targets)
        except UserError as error:
            raise UserError(f"{what}: {self.name}: {error}") from error
        except Exception as error:  # the user's function may raise anything
            shapes = f"outputs {_shape(outputs)} and targets {_shape(targets)}"
            reason = f"{type(error).__name__}: {one_line(error, 200)}"
            raise UserError(f"{what}: {self.name} cannot be computed from {shapes}: {reason}") from error
        total, count = found if isinstance(found, tuple) and len(found) == 2 else (found, len(targets))
        try:
            total = torch.as_tensor(total).detach().to(torch.float64)
            count = float(count)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{what}: {self.name} must give a sum, or (sum, count), as numbers or tensors, not a "
                f"{type(found).__name__}"
            ) from error
        return total, count

    def value(self, total: Tensor, count: float, what: str) -> float:
        """The value of totals over all batches. Raises UserError, which begins with `what`, unless it is finite."""
        if self.finish is mean and total.numel() != 1:
            raise UserError(f"{what}: {self.name} sums to a tensor of shape {tuple(total.shape)}; give it a finish")
        try:
            value = float(self.finish(total, count))
        except Exception as error:  # the user's function may raise anything
            reason = f"{type(error).__name__}: {one_line(error, 200)}"
            raise UserError(f"{what}: {self.name}: finish fails: {reason}") from error
        if not math.isfinite(value):
            why = "" if count else "; it counted nothing"
            raise UserError(f"{what}: {self.name} is {value}{why}")
        if self.fraction and not 0 <= value <= 1:
            raise UserError(f"{what}: {self.name} is {value:.6g}, and was said to be a fraction from 0 to 1")
        return value

    def as_good(self, value: float, other: float) -> bool:
        """Whether `value` is as good as `other`, or better."""
        return value >= other if self.higher else value <= other

    def bound(self, threshold: float, original: float) -> float:
        """The value that counts as `threshold` (0.95 in the paper) of `original`.

        It is threshold * original where larger values are better, and original / threshold where smaller ones are: at
        95 %, an accuracy of 0.8 may fall to 0.76, and an error of 0.8 may rise to 0.842.
        """
        return threshold * original if self.higher else original / threshold

    def text(self, value: float) -> str:
        """A value as text: percent for a fraction, else four digits."""
        return f"{value:.2%}" if self.fraction else f"{value:.4g}"

    def spread(self, value: float) -> str:
        """A standard deviation as text behind a value: in percentage points for a fraction."""
        return f"{100 * value:.2f}" if self.fraction else f"{value:.4g}"


def checked(metric: Any, what: str) -> Metric:
    """`metric`, if it is one; the accuracy for None. Raises UserError for anything else."""
    if metric is None:
        return ACCURACY
    if isinstance(metric, Metric):
        return metric
    hint = ""
    if callable(metric):
        hint = "; a function becomes one as correctnet.Metric('its name', function, higher=True or False)"
    raise UserError(f"{what}: metric is a correctnet.Metric, not {metric!r}{hint}")


def loss_of(metric: Metric, loss: Loss | None, what: str) -> Loss | None:
    """The loss of a training: the one given, else the metric's, else None for the cross entropy of classes.

    Raises UserError, which begins with `what`, where labels are not such that the cross entropy can read them.
    """
    found = loss or metric.loss
    if found is None and metric.targets == "pixels":
        return _PixelLoss(-100)
    if found is None and metric.targets != "classes":
        raise UserError(f"{what}: there is no loss for the {metric.name}; give one as loss")
    return found


def main_output(outputs: Any) -> Tensor:
    """The tensor that shipped metrics and losses read of a network's outputs.

    A tensor itself; `.logits` of an object; "logits" or "out" of a dict, or its only value; the first of a tuple or
    list. Raises UserError for anything else.
    """
    found = chosen(outputs)
    if not isinstance(found, Tensor):
        raise UserError(
            "the network must return one tensor, an object with .logits, a dict with 'logits' or 'out', or a tuple "
            f"whose first element is one, not {kind_of(outputs)}"
        )
    return found


def chosen(outputs: Any) -> Any:
    """What `main_output` returns, of any type; None where nothing can be chosen."""
    if isinstance(outputs, Mapping):
        names = [name for name in ("logits", "out") if name in outputs] or list(outputs)
        return outputs[names[0]] if len(names) == 1 or names[0] in ("logits", "out") else None
    if hasattr(outputs, "logits"):
        return outputs.logits
    if isinstance(outputs, tuple | list):
        return outputs[0] if outputs else None
    return outputs


def floats(outputs: Any) -> list[Tensor]:
    """All floating-point tensors of a network's outputs, in order."""
    plain = outputs if isinstance(outputs, Tensor | tuple | list | Mapping) else vars(outputs)
    leaves = tree_leaves(dict(plain) if isinstance(plain, Mapping) else plain)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def not_finite(outputs: Any, count: int) -> int:
    """How many of the `count` items of a batch have an output that is NaN or infinite."""
    bad = [~f.flatten(1).isfinite().all(1) for f in floats(outputs) if f.dim() > 1 and len(f) == count]
    bad += [~f.isfinite() for f in floats(outputs) if f.dim() == 1 and len(f) == count]
    return int(torch.stack(bad).any(0).sum()) if bad else 0


def kind_of(value: Any) -> str:
    """A description of a value, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(map(repr, list(value)[:4]))}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)} ({', '.join(kind_of(v) for v in value[:3])})"
    return f"a {type(value).__name__}"


def _name(function: Any) -> str:
    """A function's name, and the settings of a shipped one."""
    if isinstance(function, _Within | _PerPixel):
        return repr(function)
    return getattr(function, "__qualname__", type(function).__qualname__)


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else kind_of(value)


def _ranks(outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) how many outputs come before that of the label, the first of equal ones first; (N,) whether any is NaN."""
    scores = main_output(outputs)
    if scores.dim() != 2:
        raise UserError(f"outputs (N, classes) are expected, not {tuple(scores.shape)}")
    own = scores.gather(1, labels[:, None])
    before = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    return ((scores > own) | ((scores == own) & before)).sum(1), scores.isnan().any(1)


def _correct(outputs: Any, labels: Tensor) -> Tensor:
    """The number of images whose first largest output is that of the label; none with a NaN."""
    ranks, nan = _ranks(outputs, labels)
    return ((ranks == 0) & ~nan).sum()


ACCURACY = Metric("accuracy", _correct, higher=True, fraction=True, targets="classes")
"""fraction of images whose first largest output is that of the label, without a NaN among the outputs"""


@dataclass(frozen=True)
class _Within:
    """The number of images whose label is among the k largest outputs; none with a NaN."""

    k: int

    def __call__(self, outputs: Any, labels: Tensor) -> Tensor:
        classes = main_output(outputs).shape[-1]
        if self.k >= classes:
            raise UserError(f"the network has {classes} classes, so every image is among the {self.k} best")
        ranks, nan = _ranks(outputs, labels)
        return ((ranks < self.k) & ~nan).sum()


def top_k(k: int = 5) -> Metric:
    """The fraction of images whose label is among the k largest of the outputs (N, classes).

    Of equal outputs, the first count as larger. Raises UserError unless k is at least 1.
    """
    k = whole(k, "top_k: k")
    if k < 1:
        raise UserError(f"top_k: k must be at least 1, not {k}")
    return Metric(f"top-{k} accuracy", _Within(k), fraction=True, targets="classes")


def aligned(outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and targets of a regression with the same shape: a column (N, 1) of either is (N,).

    Raises UserError for other shapes, which would be broadcast, or outputs that are no floating-point numbers.
    """
    values = main_output(outputs)
    if not values.is_floating_point():
        raise UserError(f"outputs of floating point are expected, not {values.dtype}".replace("torch.", ""))
    if values.dim() == 2 and values.shape[1] == 1 and targets.dim() == 1:
        values = values[:, 0]
    if targets.dim() == 2 and targets.shape[1] == 1 and values.dim() == 1:
        targets = targets[:, 0]
    if values.shape != targets.shape:
        raise UserError(f"outputs {tuple(values.shape)} and targets {tuple(targets.shape)} differ in shape")
    return values, targets


def _squared(outputs: Any, targets: Tensor) -> tuple[Tensor, int]:
    values, targets = aligned(outputs, targets)
    return (values.double() - targets.double()).square().sum(), targets.numel()


def _absolute(outputs: Any, targets: Tensor) -> tuple[Tensor, int]:
    values, targets = aligned(outputs, targets)
    return (values.double() - targets.double()).abs().sum(), targets.numel()


def _squared_loss(outputs: Any, targets: Tensor) -> Tensor:
    values, targets = aligned(outputs, targets)
    return F.mse_loss(values, targets.to(values.dtype))


def _absolute_loss(outputs: Any, targets: Tensor) -> Tensor:
    values, targets = aligned(outputs, targets)
    return F.l1_loss(values, targets.to(values.dtype))


def mean_squared_error() -> Metric:
    """The mean of (output - target)^2 over all elements of outputs and targets, (N,) or (N, ...); also the loss."""
    return Metric("mean squared error", _squared, higher=False, targets="numbers", loss=_squared_loss)


def mean_absolute_error() -> Metric:
    """The mean of |output - target| over all elements of outputs and targets, (N,) or (N, ...); also the loss."""
    return Metric("mean absolute error", _absolute, higher=False, targets="numbers", loss=_absolute_loss)


@dataclass(frozen=True)
class _PerPixel:
    """What metrics of labels per pixel have in common.

    Attributes:
        ignore: the label of pixels that are left out.
    """

    ignore: int

    def __call__(self, outputs: Any, labels: Tensor) -> tuple[Tensor, int]:
        """((2, classes), pixels): of each class, the pixels of label and prediction, and of label or prediction."""
        scores = main_output(outputs)
        self.check(scores, labels)
        classes, known = scores.shape[1], labels != self.ignore
        labels, scores = labels[known], scores.movedim(1, -1)[known]
        predicted = scores.argmax(1).masked_fill(scores.isnan().any(1), classes)  # NaN predicts no class
        hit = torch.bincount(labels[predicted == labels], minlength=classes)
        of_label = torch.bincount(labels, minlength=classes)
        of_output = torch.bincount(predicted, minlength=classes + 1)[:classes]
        return torch.stack([hit, of_label + of_output - hit]), labels.numel()

    def check(self, scores: Tensor, labels: Tensor) -> None:
        """Raise UserError unless scores are (N, classes, ...) and labels (N, ...) below the number of classes."""
        if scores.dim() < 3 or scores.shape[1] < 2 or not scores.is_floating_point():
            found = f"{tuple(scores.shape)} {scores.dtype}".replace("torch.", "")
            raise UserError(f"outputs (N, classes, height, width) with 2 classes or more are expected, not {found}")
        if (scores.shape[0], *scores.shape[2:]) != labels.shape:
            found = f"outputs {tuple(scores.shape)} and labels {tuple(labels.shape)}"
            raise UserError(f"labels (N, height, width) of the outputs' size are expected; these are {found}")
        known = labels[labels != self.ignore]
        if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < scores.shape[1]:
            wrong = int(known.min()) if known.min() < 0 else int(known.max())
            hint = f"; pixels that are left out have the label ignore, {self.ignore} here"
            raise UserError(f"there is a label {wrong}, and the network has {scores.shape[1]} classes{hint}")


@dataclass(frozen=True)
class _CorrectPixels(_PerPixel):
    """The number of pixels with the right class, and of all that have a label."""

    def __call__(self, outputs: Any, labels: Tensor) -> tuple[Tensor, int]:
        found, pixels = super().__call__(outputs, labels)
        return found[0].sum(), pixels


@dataclass(frozen=True)
class _PixelLoss(_PerPixel):
    """The cross entropy over the pixels that have a label."""

    def __call__(self, outputs: Any, labels: Tensor) -> Tensor:
        scores = main_output(outputs)
        self.check(scores, labels)
        if not (labels != self.ignore).any():  # a mean over nothing is NaN
            return scores.sum() * 0.0
        return F.cross_entropy(scores, labels, ignore_index=self.ignore)


def _mean_over_classes(total: Tensor, count: float) -> float:
    intersection, union = total
    return (intersection / union)[union > 0].mean().item()


def mean_iou(ignore: int = -100) -> Metric:
    """Intersection over union of labels and predictions per pixel, a mean over classes.

    Outputs are (N, classes, height, width), or more or fewer axes of pixels; labels (N, height, width). Intersections
    and unions are summed over all images before they are divided. Classes in neither labels nor predictions are left
    out. The loss is the cross entropy.

    Args:
        ignore: the label of pixels that are left out, of value and loss.
    """
    ignore = whole(ignore, "mean_iou: ignore")
    kind: dict[str, Any] = {"fraction": True, "targets": "pixels", "loss": _PixelLoss(ignore)}
    return Metric("mean IoU", _PerPixel(ignore), _mean_over_classes, **kind)


def pixel_accuracy(ignore: int = -100) -> Metric:
    """The fraction of pixels whose largest output is that of the label; arguments and loss as `mean_iou`."""
    ignore = whole(ignore, "pixel_accuracy: ignore")
    kind: dict[str, Any] = {"fraction": True, "targets": "pixels", "loss": _PixelLoss(ignore)}
    return Metric("pixel accuracy", _CorrectPixels(ignore), **kind)
